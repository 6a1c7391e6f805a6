"""Axolotl: ``axolotl train`` with the plugin, full and LoRA, on the miniature; what is refused."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import yaml

from sar_fast.lab.io.model_source import MINIATURE_PATH
from tests.acceptance.stacks.common import (
    CONFIG,
    RECORD,
    draw_records,
    plain_losses,
    report,
    report_losses,
    report_refusal,
    run,
    write_lines,
)

SAR = "sar_fast.integrations.axolotl.SARPlugin"
RECORDER = "tests.acceptance.stacks.axolotl_recorder.RecorderPlugin"
COMMON = {
    **{"processor_type": "AutoProcessor", "chat_template": "tokenizer_default", "attn_implementation": "sdpa"},
    **{"skip_prepare_dataset": True, "remove_unused_columns": False, "sample_packing": False, "val_set_size": 0.0},
    **{"micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "num_epochs": 1, "logging_steps": 1},
    **{"learning_rate": 1e-4, "optimizer": "adamw_torch", "sequence_len": 256, "save_strategy": "no"},
    **{"bf16": False, "fp16": False, "tf32": False, "plugins": [SAR, RECORDER]},
    **{"sar_activation_layer_k": CONFIG.activation_layer_k, "sar_beta": CONFIG.beta},
}
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"]}
LORA |= dict.fromkeys(("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"), False)  # its own fail on LLaVA


def train(folder: Path, name: str, **changes: object) -> tuple[int, str]:
    """One ``axolotl train``; ``changes`` are keys of its YAML."""
    keys = {"base_model": str(folder / "miniature"), "output_dir": str(folder / name)}
    keys["datasets"] = [
        {"path": str(folder / "train.jsonl"), "ds_type": "json", "type": "chat_template", "split": "train"}
    ]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(keys | COMMON | changes))
    command = [sys.executable, "-m", "axolotl.cli.train", str(file)]
    return run(command, folder / f"{name}.log", **{RECORD: str(folder / f"{name}.pt"), "AXOLOTL_DO_NOT_TRACK": "1"})


def message(question: str, answer: str, picture: str) -> dict:
    asked = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    said = [{"type": "text", "text": answer}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def main(folder: Path) -> None:
    write_lines(folder / "train.jsonl", [message(q, a, p) for p, q, a in draw_records(folder)])
    shutil.copytree(MINIATURE_PATH, folder / "miniature", dirs_exist_ok=True)
    for name, changes in {"full": {}, "lora": LORA}.items():
        code, output = train(folder, name, **changes)
        logged = re.search(r"'loss': '?([\d.]+)", output)
        if code or logged is None:
            raise SystemExit(f"axolotl train, {name}, failed: {folder / name}.log")
        report_losses(f"axolotl train, miniature-{name}", float(logged[1]), folder / f"{name}.pt")
    code, output = train(folder, "off", use_sar=False)
    off, plain = float(re.search(r"'loss': '?([\d.]+)", output)[1]), plain_losses(folder / "off.pt")["plain"]
    report("use_sar: false", code == 0 and abs(off - plain) <= 6e-4 * plain, logged=off, plain=plain)
    report_refusal("an unknown key", train(folder, "typo", sar_betta=1), "sar_betta: no option of SAR")
    report_refusal("a bad value", train(folder, "value", sar_beta=-1), "sar_beta must be > 0")
    split = train(folder, "split", context_parallel_size=2)
    report_refusal("context parallel", split, "context_parallel_size must be 1 with SAR; got 2")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
