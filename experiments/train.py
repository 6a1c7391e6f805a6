"""Fine-tunes a multimodal model: ``python experiments/train.py config.yaml [--flag value ...]`` (docs/training.md)."""

from sar_fast.training.run import main

if __name__ == "__main__":
    main()
