"""Evaluates a multimodal model (docs/evaluation.md): ``evaluate.py config.yaml [--flag value ...]``."""

from sar_fast.base.extras import TRAINING, need_or_exit

if __name__ == "__main__":
    need_or_exit("experiments/evaluate.py", *TRAINING)

    from sar_fast.cli.evaluate.command import main

    main()
