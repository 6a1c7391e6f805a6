"""transformers' own attention tests, with this project's attention and mask functions under the name ``"sdpa"``.

    git clone --branch v5.23.0 --depth 1 https://github.com/huggingface/transformers
    python tests/acceptance/transformers_suite.py --checkout transformers --models llava qwen2_5_vl

runs ``tests/models/<model>`` twice, stock and with ours, and says what passed and what only ours fails. Without git,
the source archive of the package index will do: it has the common tests but no models, so those of
``transformers_models.py`` take their place (generation tests are not in it):

    pip download --no-binary :all: --no-deps transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
    python tests/acceptance/transformers_suite.py --checkout transformers-5.23.0

The checkout must be of the installed version; both need ``pip install parameterized``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).parent
OURS = "SAR_AS_SDPA"  # environment variable: this file, as a pytest plugin, registers our functions
SELECT = (
    "sdpa or eager_matches or attention or padding_free or sliding or gradient_checkpointing or generate or beam or "
    "assisted or cache or left_padding or custom_4d"
)

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
    from transformers import AttentionInterface, AttentionMaskInterface

    from sar_fast.integrations.hf.attention import sar_attention_forward, sar_mask

    AttentionInterface.register("sdpa", sar_attention_forward)
    AttentionMaskInterface.register("sdpa", sar_mask)


def complete(checkout: Path, into: Path) -> None:
    """A copy of a source archive's ``tests``, with small models and without what it does not bring."""
    shutil.copytree(checkout / "tests", into / "tests")
    for name, text in STUBS.items():
        path = into / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in [into / "tests", *(into / "tests").glob("**/")]:
        (folder / "__init__.py").touch()


def run(root: Path, targets: list[str], select: str, *, ours: bool, report: Path) -> dict[str, str]:
    """Test id -> passed, failed or skipped."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    environment |= {OURS: "1"} if ours else {}
    command = [sys.executable, "-m", "pytest", "-p", "transformers_suite", "-q", "--tb=no", "-k", select]
    subprocess.run([*command, f"--junitxml={report}", *targets], cwd=root, env=environment, check=False)
    if not report.exists():
        raise SystemExit(f"pytest ran nothing in {root}; its message is above")
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        state = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = state
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
    parser.add_argument("--models", nargs="+", default=["llava", "qwen2_5_vl"], help="folders of tests/models")
    parser.add_argument("-k", dest="select", default=SELECT, help="pytest's -k")
    args = parser.parse_args()
    check_version(args.checkout)
    with tempfile.TemporaryDirectory() as scratch:
        root, targets = args.checkout.resolve(), [f"tests/models/{m}" for m in args.models]
        if not (root / "tests" / "models").exists():
            complete(root, Path(scratch))
            root, targets = Path(scratch), ["tests/models/small"]
        outcomes = {
            ours: run(root, targets, args.select, ours=ours, report=Path(scratch) / f"{ours}.xml")
            for ours in (False, True)
        }
    stock, ours = outcomes[False], outcomes[True]
    count = lambda results, state: sum(s == state for s in results.values())
    for label, results in (("stock", stock), ("ours", ours)):
        print(f"{label:>6}: {', '.join(f'{count(results, s)} {s}' for s in ('passed', 'failed', 'skipped'))}")
    print("fail with both:", *sorted(t for t in stock if stock[t] == ours.get(t) == "failed"), sep="\n  ")
    only = sorted(t for t in stock if stock[t] == "passed" and ours.get(t) != "passed")
    print("pass stock, not with ours:", *(only or ["none"]), sep="\n  ")
    raise SystemExit(1 if only else 0)


if __name__ == "__main__":
    main()
