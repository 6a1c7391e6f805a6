"""A part of the integration's tests on the oldest transformers that a training stack pins, unpacked by ``make``.

The whole of them, and other versions: ``tests/acceptance/transformers_versions.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "5.5.4"  # Makefile
ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / f"transformers-{VERSION}"
FILES = ("tests/hf/test_mask_patterns.py", "tests/hf/test_families.py", "tests/training/test_encoding.py")
PART = """
(patterns_of_models and (dynamic or none)) or labels_under
or ((padded_batch_equals or greedy_decoding) and (llava or gemma3 or paligemma or qwen2_5_vl) and not prompt)
"""
RUN = f"""
import sys, pytest, transformers
assert transformers.__version__ == {VERSION!r}
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_masks_families_and_labels():
    if not FOLDER.exists():
        reason = f"transformers {VERSION} is not unpacked in {FOLDER}, as `make install` does"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    path = os.pathsep.join([str(FOLDER), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "not slow"]
    done = subprocess.run(
        [*command, "-k", " ".join(PART.split()), *FILES], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
