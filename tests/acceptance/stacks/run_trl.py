"""TRL: the example, and its first loss beside that of plain transformers."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from tests.acceptance.stacks.common import CONFIG, RECORD, record_first_batch, report, report_losses, run

EXAMPLE = Path(__file__).parents[3] / "examples" / "trl_sft.py"


def main(folder: Path) -> None:
    code, output = run([sys.executable, str(EXAMPLE), "--max_steps", "3", "--output_dir", str(folder)], folder / "log")
    report("examples/trl_sft.py", code == 0 and output.count("'loss'") == 3, exit_code=code)
    os.environ[RECORD] = str(folder / "batch.pt")
    trainer = runpy.run_path(str(EXAMPLE))["make_trainer"](CONFIG, str(folder), max_steps=2)
    record_first_batch(trainer.model)
    trainer.train()
    report_losses("SFTTrainer, miniature", trainer.state.log_history[0]["loss"], folder / "batch.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
