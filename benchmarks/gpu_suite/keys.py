"""What a measurement depends on, as one hash: the kernels, the backends, and how the suite measures.

Not the commit: to commit results, or to change a comment, a docstring or a message, must not throw results away.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what runs on the GPU and how it is chosen; the tools beside them compile and search, but run in no call
KERNELS = "kernels/sar_kernels"
TOOLS = "tools"
BACKENDS = "sar_fast/backends"
SUITE = ("benchmarks/providers.py", "benchmarks/gpu_suite/device.py", "benchmarks/gpu_suite/inputs.py")


def code_key(root: Path = ROOT) -> str:
    """12 hex digits that change when measured code changes."""
    kernels = [p for p in (root / KERNELS).rglob("*") if p.suffix in (".py", ".json") and p.parent.name != TOOLS]
    files = sorted([*kernels, *(root / BACKENDS).rglob("*.py"), *(root / name for name in SUITE)])
    digest = hashlib.sha256()
    for path in files:
        text = path.read_text(encoding="utf-8")
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update((code_only(text) if path.suffix == ".py" else text).encode())
    return digest.hexdigest()[:12]


def code_only(source: str) -> str:
    """Python source without comments, docstrings and blank lines; indentation stays."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            text = node.body[0]
            for number in range(text.lineno - 1, text.end_lineno):
                lines[number] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(kept for kept in (line.rstrip() for line in lines) if kept)
