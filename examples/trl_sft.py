"""SAR in TRL's SFTTrainer: fine-tunes the shipped miniature on drawn pictures with re-weighted heads, on a CPU.

    pip install "sar_fast[trl]"
    python examples/trl_sft.py --max_steps 20

Of TRL's own script for pictures one line is new, ``callbacks=[SARCallback(config)]``.
"""

from __future__ import annotations

import argparse

import numpy as np
from datasets import Dataset, Image
from PIL import Image as Picture
from trl import SFTConfig, SFTTrainer

from sar_fast import SARConfig
from sar_fast.integrations.trainer_callback import SARCallback
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.questions import draw_questions


def draw_dataset(per_kind: int) -> Dataset:
    """Questions and answers about drawn pictures, in TRL's columns; ``per_kind`` of each of the five kinds."""
    drawn = draw_questions(np.random.default_rng(0), per_kind, ("texture",))
    rows = {
        "images": [[Picture.fromarray(scene.image)] for scene, _ in drawn],
        "prompt": [[{"role": "user", "content": question.text}] for _, question in drawn],
        "completion": [[{"role": "assistant", "content": question.answer}] for _, question in drawn],
    }
    return Dataset.from_dict(rows).cast_column("images", [Image()])


def make_trainer(config: SARConfig | None, output_dir: str, **changes: object) -> SFTTrainer:
    """A trainer of the miniature; ``config`` None trains it without SAR, ``changes`` are fields of ``SFTConfig``."""
    model, processor = load_miniature()
    arguments = {
        "output_dir": output_dir,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": None,  # a picture's tokens must not be cut
        "bf16": False,
        "use_cpu": True,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**(arguments | changes)),
        train_dataset=draw_dataset(per_kind=16),
        processing_class=processor,
        callbacks=[] if config is None else [SARCallback(config)],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--sar_activation_layer_k", type=int, default=2)
    parser.add_argument("--sar_beta", type=float, default=0.05)
    parser.add_argument("--output_dir", default="results/trl")
    given = parser.parse_args()
    sar = SARConfig(activation_layer_k=given.sar_activation_layer_k, beta=given.sar_beta)
    make_trainer(sar, given.output_dir, max_steps=given.max_steps).train()
