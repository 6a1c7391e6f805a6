"""transformers' own attention and generation tests, with our attention and mask functions under the name ``"sdpa"``.

    git clone --branch v5.23.0 --depth 1 https://github.com/huggingface/transformers
    python tests/acceptance/transformers_suite.py --checkout transformers --models llava qwen2_5_vl

runs ``tests/models/<model>`` twice, stock and with ours, and says what passed and what only one of them fails. Without
git, the source archive of the package index will do:

    pip download --no-binary :all: --no-deps transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    python tests/acceptance/transformers_suite.py --checkout transformers-5.23.0

It has the common tests, but none of a model and none of generation. ``--missing-from`` takes them from a clone of a
version near by; without it the models of ``transformers_models.py`` take their place, and nothing is generated.

The checkout must be of the installed version; all need ``pip install parameterized``. ``HF_HUB_OFFLINE=1`` lets tests
that want a model hub fail at once where there is none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
# environment variable: this file, as a pytest plugin, registers our functions and says in that file how often they ran
OURS = "SAR_AS_SDPA"
ATTENTION = (
    "sdpa",
    "eager_matches",
    "attention",
    "padding_free",
    "sliding",
    "gradient_checkpointing",
    "cache",
    "left_padding",
    "custom_4d",
)
GENERATION = "GenerationTesterMixin"  # all tests of this class, and what models put in their place

MODELS_FILE = """
import unittest

from transformers_models import FAMILIES

from ...test_modeling_common import ModelTesterMixin


def case(name, make):
    def setUp(self):
        self.model_tester = make()
        self.all_model_classes = (self.model_tester.model_class,)

    # the last vision block and the vision towers' heads feed nothing
    body = {"setUp": setUp, "_is_composite": True, "all_model_classes": (), "test_all_params_have_gradient": False}
    return type(f"{name}ModelTest", (ModelTesterMixin, unittest.TestCase), body)


globals().update({f"{name}ModelTest": case(name, make) for name, make in FAMILIES.items()})
"""
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "models/small/test_modeling_small.py": MODELS_FILE,
}


def pytest_configure(config) -> None:
    """As a pytest plugin: ours under the name of theirs."""
    if not os.environ.get(OURS):
        return
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    from sar_fast.hf.attention import sar_attention_forward
    from sar_fast.hf.mask_function import sar_mask

    def counted(*args, **kwargs):
        if not torch.compiler.is_compiling():  # a counter in a graph would be one more reason to compile again
            config.sar_calls += 1
        return sar_attention_forward(*args, **kwargs)

    config.sar_calls = 0
    AttentionInterface.register("sdpa", counted)
    AttentionMaskInterface.register("sdpa", sar_mask)


def pytest_terminal_summary(terminalreporter, config) -> None:
    """How often ours ran: no test means anything where it did not."""
    if os.environ.get(OURS):
        terminalreporter.write_line(f"our attention function ran {config.sar_calls} times")
        Path(os.environ[OURS]).write_text(str(config.sar_calls))


def is_generation_test(item) -> bool:
    """Whether ``GenerationTesterMixin`` has a test of that name."""
    bases = getattr(item, "cls", None)
    name = item.name.split("[")[0]
    return bases is not None and any(b.__name__ == GENERATION and hasattr(b, name) for b in bases.__mro__)


def pytest_collection_modifyitems(config, items) -> None:
    """Keeps attention and generation tests; the report says which is which."""
    kept, dropped = [], []
    for item in items:
        group = "generation" if is_generation_test(item) else "attention" if _about_attention(item.name) else None
        (dropped if group is None else kept).append(item)
        if group is not None:
            item.user_properties.append(("group", group))
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def _about_attention(name: str) -> bool:
    return any(word in name for word in ATTENTION)


def complete(checkout: Path, into: Path, clone: Path | None) -> None:
    """A copy of a source archive with the tests that it lacks: a clone's, or small models without generation."""
    shutil.copytree(checkout, into)
    if clone is not None:
        for path in [clone / "conftest.py", *(clone / "utils").rglob("*"), *(clone / "tests").rglob("*")]:
            target = into / path.relative_to(clone)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        return
    for name, text in STUBS.items():
        path = into / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in [into / "tests", *(into / "tests").glob("**/")]:
        (folder / "__init__.py").touch()


def run(root: Path, targets: list[str], select: str | None, *, ours: bool, report: Path) -> dict[str, tuple[str, str]]:
    """Test id -> (attention or generation, passed, failed or skipped)."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    calls = report.with_suffix(".calls")
    environment |= {OURS: str(calls)} if ours else {}
    command = [sys.executable, "-m", "pytest", "-p", "transformers_suite", "-q", "--tb=no", "-W", "ignore"]
    command += ["-k", select] if select else []
    subprocess.run([*command, f"--junitxml={report}", *targets], cwd=root, env=environment, check=False)
    if not report.exists():
        raise SystemExit(f"pytest ran nothing in {root}; its message is above")
    outcomes = read_report(report)
    if "passed" not in {state for _, state in outcomes.values()} or (ours and not int(calls.read_text())):
        raise SystemExit("no test passed, or our attention function never ran; pytest's message is above")
    return outcomes


def read_report(report: Path) -> dict[str, tuple[str, str]]:
    """The outcomes in pytest's XML; subtests count with their test."""
    rank = ("skipped", "passed", "failed")  # of several entries of one test the last of these counts
    outcomes: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        state = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        group = next((p.get("value") for p in case.iter("property") if p.get("name") == "group"), "collection")
        before = outcomes.get(name, (group, "skipped"))[1]
        outcomes[name] = group, max(before, state, key=rank.index)
    return outcomes


def check_version(checkout: Path) -> None:
    import transformers

    text = (checkout / "src" / "transformers" / "__init__.py").read_text()
    version = text.split('__version__ = "')[1].split('"')[0]
    if version != transformers.__version__:
        raise SystemExit(f"--checkout is transformers {version}; installed is {transformers.__version__}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="a clone or an unpacked source archive")
    parser.add_argument("--missing-from", type=Path, help="a clone near by, for the tests that an archive lacks")
    parser.add_argument("--models", nargs="+", default=["llava", "qwen2_5_vl"], help="folders of tests/models")
    parser.add_argument("-k", dest="select", help="pytest's -k, on top of the choice of tests")
    args = parser.parse_args()
    check_version(args.checkout)
    with tempfile.TemporaryDirectory() as scratch:
        root = args.checkout.resolve()
        has_models = args.missing_from is not None or (root / "tests" / "models").exists()
        if not (root / "tests" / "models").exists():
            complete(root, Path(scratch) / "tree", args.missing_from)
            root = Path(scratch) / "tree"
        targets = [f"tests/models/{m}/test_modeling_{m}.py" for m in (args.models if has_models else ["small"])]
        stock, ours = (
            run(root, targets, args.select, ours=ours, report=Path(scratch) / f"{ours}.xml") for ours in (False, True)
        )
    raise SystemExit(report_differences(stock, ours))


def report_differences(stock: dict[str, tuple[str, str]], ours: dict[str, tuple[str, str]]) -> int:
    """Prints counts and lists; 1 if a test passes stock and not with ours."""
    for label, results in (("stock", stock), ("ours", ours)):
        counts = Counter(results.values())
        for group in sorted({group for group, _ in results.values()}):
            parts = (f"{counts[group, state]} {state}" for state in ("passed", "failed", "skipped"))
            print(f"{label:>6} {group}:", ", ".join(parts))
    state = lambda results, test: results.get(test, ("", "missing"))[1]
    lists = {
        "fail with both": lambda a, b: a == b == "failed",
        "fail stock, pass with ours": lambda a, b: a == "failed" and b == "passed",
        "pass stock, not with ours": lambda a, b: a == "passed" and b != "passed",
    }
    for label, belongs in lists.items():
        tests = sorted(t for t in stock | ours if belongs(state(stock, t), state(ours, t)))
        print(f"{label} ({len(tests)}):", *(tests or ["none"]), sep="\n  ")
    return 1 if tests else 0


if __name__ == "__main__":
    main()
