"""Benchmarks of others: registered, or those of an installed package, with options of their own."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys

import pytest

from sar_fast.base.errors import ArgumentError
from sar_fast.cli.evaluate.arguments import parse
from sar_fast.cli.evaluate.sweep import flags as sweep_flags
from sar_fast.lab import evaluate, sweep
from sar_fast.lab.benchmark.tasks import Task, find_task, known_tasks, option, register_task, registry
from sar_fast.lab.benchmark.tasks.mme import MME
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.run.results import METADATA, SAMPLES
from tests.evaluation.benchmarks import ROOT, picture_bytes, write_table
from tests.evaluation.conftest import arrow_cache  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "arrow_cache", "own_tasks")

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "their-benchmarks"
version = "1.0"

[project.entry-points."sar_fast.tasks"]
colours = "theirs:Colours"
broken = "theirs:Gone"
renamed = "theirs:Colours"

[tool.setuptools]
py-modules = ["theirs"]
"""
THEIRS = '''
import dataclasses

from sar_fast.lab.benchmark.tasks import Sample, Task, option


class Colours(Task):
    """Share of pictures whose colour is named."""

    @dataclasses.dataclass(frozen=True)
    class Options(Task.Options):
        their_option: str = option("plain", "How colours are asked for.", ("plain", "loud"))

    name = "colours"
    split = "test"
    columns = ("colour",)
    suffix = " One word."
    scorings = ("generate",)

    def samples(self, rows):
        question = "What colour is the circle?" + self.words_after
        loud = question.upper() if self.options.their_option == "loud" else question
        return [Sample(str(n), n, loud, str(n), about={"colour": row["colour"]}) for n, row in enumerate(rows)], []

    def judge(self, record):
        return {"prediction": record["reply"], "correct": record["reply"] == record["colour"]}

    def scores(self, records):
        return {"overall": {"accuracy": 100 * sum(r["correct"] for r in records) / len(records)}}

    def headline(self, scores):
        return [("accuracy", scores["overall"]["accuracy"])]
'''


@pytest.fixture
def own_tasks(monkeypatch):
    """Tasks that a test registers are unknown after it."""
    monkeypatch.setattr(registry, "_tasks", dict(registry._tasks))
    yield
    sys.modules.pop("theirs", None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of installed packages with theirs in it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "theirs.py").write_text(THEIRS)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    subprocess.run([*pip, str(site), str(source)], check=True, capture_output=True, text=True)
    return site


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rows = [{"image": {"bytes": picture_bytes(c), "path": None}, "colour": c} for c in ("red", "blue")]
    return write_table(tmp_path_factory.mktemp("colours"), rows)


def test_an_installed_task_is_asked_by_the_command_and_by_the_function(site, installed, table, tmp_path):
    words = ["--model_name_or_path", "miniature", "--task", "colours", "--their_option", "loud", "--data_dir", table]
    command = [sys.executable, str(ROOT / "experiments" / "evaluate.py"), *words, "--output_dir", str(tmp_path / "out")]
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    stored = json.loads((tmp_path / "out" / METADATA).read_text())
    assert stored["settings"]["their_option"] == "loud"
    assert stored["sessions"][0]["configuration"]["their_option"] == "loud"
    found = evaluate(*load_miniature(), "colours", their_option="loud", data_dir=table)
    assert found.records == [json.loads(line) for line in (tmp_path / "out" / SAMPLES).read_text().splitlines()]
    assert found.records[0]["prompt"] == "WHAT COLOUR IS THE CIRCLE? ONE WORD."
    assert "colours" in known_tasks()


def test_errors_name_the_package(installed, monkeypatch):
    with pytest.raises(ImportError, match=r"task 'broken' of the package their-benchmarks cannot be imported: .*Gone"):
        find_task("broken")
    with pytest.raises(ValueError, match="task 'renamed' of the package their-benchmarks calls itself 'colours'"):
        find_task("renamed")
    (point,) = importlib.metadata.entry_points(group="sar_fast.tasks", name="colours")
    also = importlib.metadata.EntryPoint("colours", "others:Colours", "sar_fast.tasks")
    for name, points, owners in (
        ("colours", [point, also], "'colours' of others:Colours and the package their-benchmarks"),
        (
            "mme",
            [importlib.metadata.EntryPoint("mme", "others:MME", "sar_fast.tasks")],
            "'mme' of sar_fast and others:MME",
        ),
    ):
        every = importlib.metadata.EntryPoints(points)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda every=every, **chosen: every.select(**chosen))
        with pytest.raises(ArgumentError, match=rf"task must be one (installed )?package's; got {owners}"):
            find_task(name)


def test_flags_are_those_of_the_task_that_is_asked_for(installed, tmp_path, capsys):
    given = ["--model_name_or_path", "miniature", "--output_dir", str(tmp_path / "out"), "--task"]
    assert parse([*given, "colours", "--their_option", "loud"]).task_options.their_option == "loud"
    assert parse([*given, "colours"]).task_options == find_task("colours").Options()
    assert parse([*given, "mmbench", "--choice_format", "cloze"]).to_dict()["choice_format"] == "cloze"
    for words, message in (
        (["colours", "--their_opton", "x"], r"unknown flag --their_opton; did you mean --their_option\?"),
        (["colours", "--their_option", "x"], "argument --their_option: invalid choice: 'x'"),
        (["colours", "--box_format", "pixels"], "--box_format must be left out with --task colours; got pixels"),
        (["mme", "--their_option", "loud"], "unknown flag --their_option"),
        (["colour"], "--task must be one of mme, .*, colours.*; got 'colour'; did you mean 'colours'"),
        (["broken"], "task 'broken' of the package their-benchmarks cannot be imported"),
    ):
        with pytest.raises((ValueError, ImportError), match=message):
            parse([*given, *words])
    with pytest.raises(SystemExit):
        parse(["--task", "colours", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--prompt_suffix", "--box_format", "--choice_format", "--their_option"):
        assert flag in text
    assert "Of scienceqa, mmbench. letters (default)" in text
    assert {"prompt_suffix", "box_format", "choice_format", "k"} <= dict(sweep_flags()).keys()


class Mine(MME):
    name = "mine"


def test_a_registered_task_is_known_by_its_name(tmp_path):
    assert register_task(Mine) is Mine
    assert find_task("mine") is Mine
    again = type("Mine", (MME,), {"name": "mine", "__module__": Mine.__module__, "__qualname__": Mine.__qualname__})
    assert register_task(again) is again  # a cell that ran again
    with pytest.raises(
        ValueError, match=r"task must have a name that no other task has; got 'mine', which is that of .*Mine"
    ):
        register_task(type("Other", (MME,), {"name": "mine"}))
    with pytest.raises(
        ValueError, match=r"task must have a name that no other task has; got 'mme', which is that of .*MME"
    ):
        register_task(type("Other", (MME,), {}))
    given = ["--model_name_or_path", "miniature", "--output_dir", str(tmp_path), "--task", "mine"]
    assert parse([*given, "--prompt_suffix", ""]).task_options.prompt_suffix == ""


@dataclasses.dataclass(frozen=True)
class Seeded(Task.Options):
    seed: int = option(3, "Of the choice of rows.")


@dataclasses.dataclass(frozen=True)
class Open(Task.Options):
    level: int = dataclasses.field(kw_only=True)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("mme", "task must be a subclass of Task; got 'mme'"),
        (dict, "task must be a subclass of Task"),
        (
            type("Bare", (Task,), {"name": "bare"}),
            "task must have headline, judge, samples, scores, split, columns; got Bare without",
        ),
        (type("Empty", (MME,), {"name": ""}), "name of Empty must be a text; got ''"),
        (type("Loose", (MME,), {"name": "x", "Options": dict}), "Options of Loose must be a frozen dataclass"),
        (
            type("Plain", (MME,), {"name": "x", "Options": type("Options", (Task.Options,), {})}),
            "Options of Plain must be a frozen dataclass that extends Task.Options",
        ),
        (
            type("Needy", (MME,), {"name": "x", "Options": Open}),
            "Options of Needy must have defaults; got none for level",
        ),
        (
            type("Clash", (MME,), {"name": "x", "Options": Seeded}),
            "Options of Clash must have names of their own, .*; got .'seed'",
        ),
    ],
)
def test_what_is_no_task(task, message):
    with pytest.raises((TypeError, ValueError), match=message):
        register_task(task)


def test_names_that_options_must_not_have_are_the_arguments_there_are(tmp_path):
    arguments = {name for call in (evaluate, sweep) for name in inspect.signature(call).parameters}
    assert set(registry.TAKEN) == arguments - {"options"}
    flagged = dataclasses.make_dataclass(
        "Options", [("bf16", bool, option(False, ""))], bases=(Task.Options,), frozen=True
    )
    register_task(type("Flagged", (MME,), {"name": "flagged", "Options": flagged}))
    with pytest.raises(
        ValueError, match="--task must have options whose names no other flag has; got flagged with bf16"
    ):
        parse(["--model_name_or_path", "miniature", "--output_dir", str(tmp_path), "--task", "flagged"])


def test_a_task_that_is_not_on_the_hub_needs_a_folder():
    task = type("Local", (MME,), {"name": "local", "hub_id": None})
    with pytest.raises(ArgumentError, match="data_dir must be given for local, which is not on the hub; got None"):
        evaluate(*load_miniature(), task)
