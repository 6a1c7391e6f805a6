"""ms-swift: ``swift sft`` with the plugin, full and LoRA, on the miniature and a tiny Qwen2.5-VL; what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from sar_fast.lab.io.model_source import MINIATURE_PATH
from tests.acceptance.stacks.common import (
    CONFIG,
    RECORD,
    draw_records,
    report_losses,
    report_refusal,
    run,
    write_lines,
)
from tests.acceptance.stacks.qwen import make_qwen

OPTIONS = {"sar_activation_layer_k": CONFIG.activation_layer_k, "sar_beta": CONFIG.beta}
COMMON = {
    **{"torch_dtype": "float32", "bf16": "false", "fp16": "false", "use_cpu": "true", "use_hf": "true"},
    **{"max_length": 512, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    **{"logging_steps": 1, "save_strategy": "no", "report_to": "none", "add_version": "false"},
    **{"dataset_shuffle": "false", "train_dataloader_shuffle": "false", "split_dataset_ratio": 0},
}


def sft(folder: Path, name: str, model: tuple[str, str], **changes: object) -> tuple[int, str]:
    """One ``swift sft`` of (folder, type) ``model`` with SAR; ``changes`` are flags of its."""
    path, kind = model
    flags = {"model": path, "model_type": kind, "template": kind, "dataset": folder / "train.jsonl"}
    flags |= {"output_dir": folder / name, "model_kwargs": json.dumps(OPTIONS)} | COMMON | changes
    plugins = [str(folder / "sar_plugin.py"), str(Path(__file__).with_name("swift_recorder.py"))]
    command = [str(Path(sys.executable).with_name("swift")), "sft", "--callbacks", "sar", "record"]
    command += ["--external_plugins", *plugins, *(x for k, v in flags.items() for x in (f"--{k}", str(v)))]
    processes = {"NPROC_PER_NODE": "2"} if changes.get("sequence_parallel_size") else {}
    return run(command, folder / f"{name}.log", **{RECORD: str(folder / f"{name}.pt")}, **processes)


def main(folder: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"<image>{q}"}, {"role": "assistant", "content": a}], "images": [p]}
        for p, q, a in draw_records(folder)
    ]
    write_lines(folder / "train.jsonl", rows)
    (folder / "sar_plugin.py").write_text("import sar_fast.integrations.ms_swift\n")
    shutil.copytree(MINIATURE_PATH, folder / "miniature", dirs_exist_ok=True)
    models = {"miniature": "llava1_5_hf", "qwen2_5_vl": "qwen2_5_vl"}
    make_qwen(folder / "qwen2_5_vl")
    for name, kind in models.items():
        for tuner in ("full", "lora"):
            case = f"{name}-{tuner}"
            code, output = sft(folder, case, (str(folder / name), kind), tuner_type=tuner)
            logged = re.search(r"'loss': '?([\d.]+)", output)
            if code or logged is None:
                raise SystemExit(f"swift sft, {case}, failed: {folder / case}.log")
            report_losses(f"swift sft, {case}", float(logged[1]), folder / f"{case}.pt", folder / name)
    miniature = (str(folder / "miniature"), "llava1_5_hf")
    split = sft(folder, "split", miniature, sequence_parallel_size=2)
    report_refusal("two ranks, sequence parallel", split, "sequence_parallel_size must be 1 with SAR; got 2")
    typo = sft(folder, "typo", miniature, model_kwargs='{"sar_betta": 1}')
    report_refusal("an unknown option", typo, "SAR_BETTA sets no option of SAR; did you mean SAR_BETA?")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
