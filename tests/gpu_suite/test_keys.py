"""What makes a measurement count again: the code that is measured, and nothing else."""

from __future__ import annotations

import shutil

import pytest
from gpu_suite.keys import BACKENDS, KERNELS, ROOT, SUITE, code_key, code_only


@pytest.fixture
def tree(tmp_path):
    for folder in (KERNELS, BACKENDS):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SUITE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def change(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_comments_docstrings_results_and_tools_do_not_count(tree):
    key = code_key(tree)
    change(tree / KERNELS / "dense/forward.py", '"""Forward kernel:', '"""The forward kernel:')
    change(tree / KERNELS / "dense/forward.py", "    # Only the right edge", "    # Of the mask only the right edge")
    change(tree / SUITE[1], "import gc\n", "# why\nimport gc  # collected\n\n\n")
    (tree / "benchmarks" / "results" / "gpu").mkdir(parents=True)
    (tree / "benchmarks" / "results" / "gpu" / "records.jsonl").write_text("{}\n")
    (tree / "benchmarks" / "gpu.py").write_text("print('another text')\n")
    (tree / KERNELS / "tools/tune.py").write_text("print('another tool')\n")
    assert code_key(tree) == key
    assert code_key() == code_key(ROOT)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (f"{KERNELS}/dense/dkdv.py", "member += 1", "member += 2"),
        (f"{KERNELS}/configs.py", "KernelConfig(128, 64, 8, 3)", "KernelConfig(128, 64, 8, 2)"),
        (f"{BACKENDS}/providers/cpu.py", "max(q.shape[-1], v.shape[-1])", "q.shape[-1]"),
        ("benchmarks/gpu_suite/device.py", "256 << 20", "128 << 20"),
    ],
)
def test_measured_code_counts(tree, path, old, new):
    key = code_key(tree)
    change(tree / path, old, new)
    assert code_key(tree) != key


def test_measured_tiles_count(tree):
    key = code_key(tree)
    (tree / KERNELS / "tuned.json").write_text('{"configs": {}}')
    assert code_key(tree) != key


SOURCE = """
def f(x):
    'Doc.'
    y = "# no comment"  # one

    if x:
        y = '''not
    a docstring'''
    return y
"""
KEPT = """def f(x):
    y = "# no comment"
    if x:
        y = '''not
    a docstring'''
    return y"""


def test_strings_and_indentation_stay():
    assert code_only(SOURCE) == KEPT
