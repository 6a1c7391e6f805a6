"""Fine-tunes a multimodal model: ``python experiments/train.py config.yaml [--flag value ...]`` (docs/training.md)."""

from sar_fast.base.extras import TRAINING, need_or_exit

if __name__ == "__main__":
    need_or_exit("experiments/train.py", *TRAINING)

    from sar_fast.cli.train import main

    main()
