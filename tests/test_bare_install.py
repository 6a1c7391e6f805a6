"""What works without extras: every import is declared, and a command that needs an extra says which."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

from sar_fast.base import extras
from sar_fast.cli.evaluate import arguments as evaluation_arguments
from sar_fast.cli.evaluate.command import evaluate
from sar_fast.lab.training import arguments as training_arguments
from sar_fast.lab.training.run import build
from tests.training.runs import flags, train
from tests.training.samples import REPOSITORY

HOMES = {  # the only places where a module of an extra may be imported at once; elsewhere inside functions
    "train": ("cli/evaluate/", "lab/benchmark/", "lab/focus/", "lab/probe/", "lab/run/session.py", "lab/training/"),
    "lmms-eval": ("integrations/lmms_eval/",),
    "llamafactory": ("integrations/llamafactory/",),
    "ms-swift": ("integrations/ms_swift.py",),
    "axolotl": ("integrations/axolotl.py",),
}


@pytest.fixture(scope="module")
def declared() -> dict[str, list[Requirement]]:
    """Requirements that setup.py states: "core", and each extra."""
    stated = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **options: stated.update(options))
        patch.chdir(REPOSITORY)
        runpy.run_path("setup.py")
    lists = {"core": stated["install_requires"], **stated["extras_require"]}
    return {name: [Requirement(line) for line in lines] for name, lines in lists.items()}


def imports(root: Path) -> Iterator[tuple[str, bool, Path]]:
    """(top-level module, whether in a function or for types alone, file) of each third party's import in a folder."""
    own = {*sys.stdlib_module_names, "sar_fast", "sar_kernels"}
    for file in sorted(root.rglob("*.py")):
        todo = [(ast.parse(file.read_text(encoding="utf-8")), False)]
        while todo:
            node, inside = todo.pop()
            inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            inside |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - own:
                yield name, inside, file.relative_to(root)
            todo += [(child, inside) for child in ast.iter_child_nodes(node)]


def distribution(module: str) -> str:
    """What is installed for a module to be there, in the spelling of setup.py's lists."""
    named = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "skimage": "scikit-image",
        "lmms_eval": "lmms-eval",
        "swift": "ms-swift",
    }
    return named.get(module, module)


def test_every_import_is_declared(declared):
    names = {extra: {requirement.name for requirement in lines} for extra, lines in declared.items()}
    for module, inside, file in imports(REPOSITORY / "sar_fast"):
        needed = distribution(module)
        if needed in names["core"]:
            continue
        homes = [extra for extra in names if extra != "dev" and needed in names[extra]]
        assert homes, f"{file} imports {module}, which setup.py does not name"
        allowed = tuple(folder for extra in homes for folder in HOMES.get(extra, ()))
        assert inside or str(file).startswith(allowed), f"{file} imports {module} at once; it comes with {homes} only"


def test_kernels_need_torch_and_triton_alone():
    assert {module for module, *_ in imports(REPOSITORY / "kernels" / "sar_kernels")} == {"torch", "triton"}


def test_the_extras_that_are_named_are_those_of_setup(declared):
    for module, extra in extras.EXTRA_OF.items():
        assert distribution(module) in {requirement.name for requirement in declared[extra]}, module


# A folder of links to the packages that the core requirements bring, as the site-packages of an environment.


def closure(requirements: list[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that requirements bring, with theirs."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = [(requirement, "") for requirement in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        new = requirement.name not in found
        if new:
            found[requirement.name] = importlib.metadata.distribution(requirement.name)
        for wanted in (*requirement.extras, *([""] if new else [])):
            lines = found[requirement.name].requires or []
            todo += [(Requirement(line), wanted) for line in lines]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory, declared) -> Path:
    """The interpreter of an environment with the core requirements and nothing else."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    for name, found in closure(declared["core"]).items():
        tops = {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}
        assert tops, name
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    return home / "bin" / "python"


DATA = REPOSITORY / "experiments" / "data"
TABLE = str(DATA / "shapes_train.parquet")
ASK = ("--image", str(DATA / "images" / "025.png"), "--question", "What colour is the circle?")
YAMLS = "experiments/sar_paper"
ALL = "accelerate, datasets, pyarrow"
COMMANDS = (  # (words, how the error of an installation without extras ends; "" where the command works)
    (["--help"], ""),
    (["doctor", "--json"], ""),
    (["generate", *ASK], ""),
    (["generate", *ASK, "--use_sar"], ""),
    (["inspect", *ASK, "--json"], ""),
    (["inspect", *ASK, "--heatmap", "c.png"], "--heatmap needs matplotlib: pip install 'sar_fast[reports]'"),
    (["demo"], "the report needs matplotlib, scikit-image: pip install 'sar_fast[reports]'"),
    (["demo", *ASK], "the report needs matplotlib: pip install 'sar_fast[reports]'"),
    (["plot", "run"], "sar-fast plot needs matplotlib: pip install 'sar_fast[reports]'"),
    (["paper"], f"needs {ALL}, matplotlib, scikit-image: pip install 'sar_fast[train,reports]'"),
    (["sweep", "--help"], f"needs {ALL}, matplotlib: pip install 'sar_fast[train,reports]'"),
    (["sweep", "--task", "mme"], f"needs {ALL}, matplotlib: pip install 'sar_fast[train,reports]'"),
    (["merge", "adapter", "--output_dir", "merged"], "sar-fast merge needs peft: pip install 'sar_fast[train]'"),
    (["convert", "none.pth", "--output_dir", "x"], "SOURCE must be a file that exists; got none.pth"),
    (["bench", "train"], f"sar-fast bench train needs {ALL}: pip install 'sar_fast[train]'"),
    (["llamafactory", "train", "x.yaml"], "needs llamafactory: pip install 'sar_fast[llamafactory]'"),
    (["llamafactory", "export", "x.yaml"], "needs llamafactory: pip install 'sar_fast[llamafactory]'"),
    (["data", "check", TABLE], "pip install 'sar_fast[train]'"),
    (["experiments/train.py", f"{YAMLS}/exp_sec3.2_grad_sparsity_sft_mini.yaml"], "pip install 'sar_fast[train]'"),
    (["experiments/evaluate.py", f"{YAMLS}/eval_sec6.2_main_llava_mini.yaml"], "pip install 'sar_fast[train]'"),
)
RUN_ALL = """
import contextlib, io, json, runpy, sys
from sar_fast.cli import main

answers = []
for words in json.loads(sys.argv[1]):
    script = words[0].endswith(".py")
    sys.argv = words if script else ["sar-fast", *words]
    out, error, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            runpy.run_path(words[0], run_name="__main__") if script else main()
    except SystemExit as end:
        code = end.code or 0
    answers.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(answers))
"""


def test_every_command_works_or_names_the_extra(bare_python):
    """All in one process: no command can install anything for the next."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [bare_python, "-c", RUN_ALL, json.dumps([words for words, _ in COMMANDS])],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for (words, expected), (code, out, error) in zip(COMMANDS, json.loads(done.stdout.splitlines()[-1])):
        lines = [line for line in error.splitlines() if line.startswith("error")]
        if expected:
            assert (code, len(lines)) == (2, 1), (words, code, out, error)
            assert lines[0].endswith(expected), (words, error)
        else:
            assert (code, lines) == (0, []), (words, code, error)
            assert out.strip(), words


def test_all_commands_are_tried():
    from sar_fast.cli import app

    names = {command.callback.__name__ for command in app.registered_commands}
    names |= {
        f"{group.name} {command.callback.__name__}"
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    }
    assert {name for name in names if not any(" ".join(words).startswith(name) for words, _ in COMMANDS)} == set()


@pytest.mark.parametrize(
    ("changes", "module", "message"),
    [
        ({"finetuning_type": "lora"}, "peft", r"finetuning_type lora needs peft: pip install 'sar_fast\[train\]'"),
        ({"plot_loss": True}, "matplotlib", r"plot_loss needs matplotlib: pip install 'sar_fast\[reports\]'"),
        ({"report_to": "wandb"}, "wandb", r"report_to wandb needs wandb: pip install 'sar_fast\[wandb\]'"),
        (
            {"report_to": "tensorboard"},
            "tensorboard",
            r"report_to tensorboard needs tensorboard: pip install 'sar_",
        ),
    ],
)
def test_trainings_that_need_more_say_so_before_anything_runs(tmp_path, monkeypatch, changes, module, message):
    arguments = training_arguments.parse(flags(tmp_path / "out", **changes))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        build(arguments)
    assert not (tmp_path / "out").exists()


def test_a_training_needs_no_tracker(tmp_path, monkeypatch):
    for module in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    train(tmp_path / "out", max_steps=1)
    assert (tmp_path / "out" / "gradient_sparsity.jsonl").is_file()


@pytest.mark.parametrize(
    ("words", "module", "message"),
    [
        ("--do_sfs_fi_eval", "skimage", r"--do_sfs_fi_eval needs scikit-image: pip install 'sar_fast\[reports\]'"),
        ("--do_sfs_fi_eval --focus_overlays", "matplotlib", "--do_sfs_fi_eval needs matplotlib"),
        ("--do_layerwise_probe", "matplotlib", "--do_layerwise_probe needs matplotlib"),
    ],
)
def test_analyses_that_need_more_say_so_before_anything_runs(tmp_path, monkeypatch, words, module, message):
    base = f"--model_name_or_path miniature --dataset shapes_grounding --output_dir {tmp_path / 'out'}"
    arguments = evaluation_arguments.parse([*base.split(), *words.split()])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        evaluate(arguments)
    assert not (tmp_path / "out").exists()


def test_a_wheel_holds_every_file_that_is_read(tmp_path):
    root, source = REPOSITORY, tmp_path / "source"
    for folder in ("sar_fast", "kernels"):
        shutil.copytree(root / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "README.md"):
        shutil.copy(root / name, source)
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    packages = {"sar_fast": source, "kernels/sar_kernels": source / "kernels"}
    for folder, base in packages.items():
        files = {p.relative_to(base).as_posix() for p in (source / folder).rglob("*") if p.is_file()}
        assert {p for p in files if not p.endswith((".md", ".pyc"))} <= held
