"""Evaluates a multimodal model (docs/evaluation.md): ``evaluate.py config.yaml [--flag value ...]``."""

from sar_fast.evaluation.run import main

if __name__ == "__main__":
    main()
