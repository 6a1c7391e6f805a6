"""What all commands have in common: names of options, start-up, and how anything that a user can mend ends."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from sar_fast.base import json_text
from sar_fast.cli import app, loading
from sar_fast.cli import train as training
from sar_fast.cli.evaluate.arguments import parse as parse_evaluation
from sar_fast.cli.evaluate.sweep import parse as parse_sweep
from sar_fast.lab.training.arguments import parse as parse_training
from sar_fast.lab.training.run import run_metadata
from tests.training.runs import flags
from tests.training.samples import REPOSITORY

DATA = REPOSITORY / "experiments" / "data"
PICTURE = str(DATA / "images" / "025.png")
ASK = ("--image", PICTURE, "--question", "What colour is the circle?")
COMMANDS = typer.main.get_command(app)
LEAVES = {
    f"{name} {inner}".strip(): command
    for name, group in COMMANDS.commands.items()
    for inner, command in getattr(group, "commands", {"": group}).items()
}


def answer(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def fails(*words: object) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    done = answer(*words)
    assert done.exit_code == 2, (words, done.output, done.exception)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("-- ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


def test_help_does_not_wait_for_torch():
    """Nor does an option that does not exist."""
    code = (
        "import sys; from typer.testing import CliRunner; from sar_fast.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "assert CliRunner().invoke(app, ['demo', '--nope']).exit_code == 2; "
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_found_when_they_are_asked_for():
    import sar_fast

    assert set(sar_fast.__all__) <= set(dir(sar_fast))
    assert all(getattr(sar_fast, name).__name__ == name for name in sar_fast.__all__)
    with pytest.raises(AttributeError, match="'sar_fast' has no attribute 'apply_sra'"):
        _ = sar_fast.apply_sra


# names


@pytest.mark.parametrize("name", LEAVES)
def test_options_are_named_as_the_flags_of_the_scripts(name):
    options = [option for p in LEAVES[name].params for option in (*p.opts, *p.secondary_opts) if option[:2] == "--"]
    assert [option for option in options if "-" in option[2:]] == []
    assert not {"--out", "--output"} & set(options)


@pytest.mark.parametrize("name", ["output_dir", "output-dir"])
def test_both_spellings_are_one_option(tmp_path, name):
    """Of commands, and of the scripts' flags, which one command passes on."""
    (tmp_path / "file").touch()
    wanted = f"--output_dir must be a folder to write into; got '{tmp_path}/file': "
    assert fails("demo", f"--{name}", tmp_path / "file").startswith(wanted)
    assert fails("demo", f"--{name}={tmp_path}/file").startswith(wanted)
    assert fails("paper", f"--{name}", tmp_path / "file").startswith(wanted)
    sweep = ("sweep", "--model-name-or-path", "miniature", "--task", "mme", "--data_dir", DATA / "benchmarks" / "mme")
    assert fails(*sweep, f"--{name}", tmp_path / "file").startswith(wanted)


def test_both_spellings_have_the_same_effect(tmp_path):
    done = [answer("generate", *ASK, use, most, "2") for use in ("--use_sar", "--use-sar")
            for most in ("--max_new_tokens", "--max-new-tokens")]  # fmt: skip
    assert {one.exit_code for one in done} == {0}
    assert len({one.stdout for one in done}) == 1
    sizes = ("--num-questions", 1, "--sample_size", 0)
    done = answer("demo", *sizes, "--no-timings", "--output-dir", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").is_file()


# what is wrong with a command line


@pytest.mark.parametrize("name", [name for name in LEAVES if "llamafactory" not in name])  # which needs its package
def test_an_unknown_option_names_the_nearest(name):
    for spelling in ("output_dirr", "output-dirr"):
        line = fails(*name.split(), f"--{spelling}", "x")
        assert line.startswith(("unknown option --output_dirr", "unknown flag --output")), line
        if name in ("demo", "paper", "plot", "sweep"):
            assert "; did you mean --output" in line


def test_flags_of_other_programs_are_known_and_nothing_unrelated_is_suggested():
    for words, message in (
        ("generate --stage sft", "unknown option --stage"),
        ("generate --top_k 3", "unknown option --top_k: answers are generated greedily"),
        ("inspect --flash_attn fa2", "unknown option --flash_attn: it is for training, and has no meaning here"),
        ("generate --use_dora true", "unknown option --use_dora: it is for training, and has no meaning here"),
        ("demo --dataset x", "unknown option --dataset"),
        ("bench train --heads 3", "unknown option --heads"),
        ("paper --task mme", "unknown option --task"),
        ("merge --out x", "unknown option --out; did you mean --output_dir?"),
    ):
        line = fails(*words.split())
        assert line.startswith(message), line
        assert ("did you mean" in line) == ("did you mean" in message), line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate", "Missing option '--image'. ({} generate --help)"),
        ("generate --image x.png", "Missing option '--question'. ({} generate --help)"),
        ("plot", "Missing argument 'runs'. ({} plot --help)"),
        ("data check", "Missing argument 'file'. ({} data check --help)"),
    ],
)
def test_what_is_required_and_missing_is_named(words, message):
    assert fails(*words.split()) == message.format("root")


def test_what_a_sweep_misses_is_named_once():
    assert fails("sweep", "--task", "mme").endswith("are required: --model_name_or_path, --output_dir")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demmo", "No such command 'demmo'. Did you mean 'demo'?"),
        ("data chek x", "No such command 'chek'. Did you mean 'check'?"),
        ("--verson", "unknown option --verson; did you mean --version?"),
        ("demo more", "unexpected extra argument"),
        ("demo --num_questions many", "'--num_questions': Input should be a valid integer"),
        ("demo --num_questions many", "; got 'many'"),
        ("demo --num_questions 0", "; got '0'"),
        ("demo --output_dir", "'--output_dir' requires an argument"),
        ("bench train --peak_flops 0", "--peak_flops must be a number above 0; got 0.0"),
        ("bench train --peak_flops nan", "--peak_flops must be a number above 0; got nan"),
        ("plot nowhere", "nowhere does not exist"),
        ("sweep nowhere.yaml", "nowhere.yaml cannot be read: No such file or directory"),
        ("sweep {folder}.yaml", ".yaml cannot be read: Is a directory"),
        ("sweep {utf16}", "utf16.yaml cannot be read: 'utf-8' codec can't decode"),
        ("data check nowhere.json", "nowhere.json does not exist"),
        ("generate --image {picture} --question hi --device meta", "--device 'meta' cannot be used here"),
        ("inspect --image {picture} --question hi --heatmap no/c.png", "--heatmap must be a .png file in a folder"),
        ("inspect --image {picture} --question hi --heatmap c.jpg", "--heatmap must be a .png file in a folder"),
    ],
)
def test_wrong_words(tmp_path, words, message):
    (tmp_path / "utf16.yaml").write_text("task: mme", encoding="utf-16")
    (tmp_path / "folder.yaml").mkdir()
    places = {"picture": PICTURE, "folder": tmp_path / "folder", "utf16": tmp_path / "utf16.yaml"}
    assert message in fails(*words.format(**places).split())


@pytest.mark.parametrize("command", [("generate", *ASK, "--use_sar"), ("inspect",), ("demo",), ("bench", "train")])
def test_options_of_sar_are_checked_before_a_model_is_loaded(monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("loaded a model"))
    assert fails(*command, "--beta", "-1").startswith("--beta must be > 0")
    assert fails(*command, "--k", "-1").startswith("--k must be >= 0")
    assert fails(*command, "--backend", "cuda").startswith("--backend must be one of")
    assert list(tmp_path.iterdir()) == []


def test_an_infinite_beta_is_valid_json_everywhere(tmp_path):
    """Commands that print a configuration, and folders of results that keep it."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = lambda text: json.loads(text, parse_constant=refuse)
    assert read(answer("inspect", "--beta", "inf", "--json").stdout)["config"]["beta"] == math.inf
    timed = answer("bench", "train", "--steps", 1, "--length", 90, "--beta", "inf", "--json")
    assert read(timed.stdout)["config"]["beta"] == math.inf
    small = ("--num_questions", 1, "--sample_size", 0, "--no_timings", "--output_dir", tmp_path / "demo")
    assert answer("demo", *small, "--beta", "inf").exit_code == 0
    assert read((tmp_path / "demo" / "metrics.json").read_text())["meta"]["config"]["beta"] == math.inf
    data = ("--model_name_or_path", "miniature", "--task", "mme", "--data_dir", DATA / "benchmarks" / "mme")
    more = ("--max_samples", 2, "--k", 0, 1, "--beta", "inf", "--output_dir", tmp_path / "sweep")
    done = answer("sweep", *data, *more)
    assert done.exit_code == 0, done.output
    assert read((tmp_path / "sweep" / "sweep.json").read_text())["settings"][1]["beta"] == math.inf
    assert read((tmp_path / "sweep" / "k1_betainf" / "run_metadata.json").read_text())
    trained = json_text.dumps(run_metadata(parse_training(flags(tmp_path, use_sar=True, sar_beta="inf"))))
    assert read(trained)["configuration"]["model"]["sar_beta"] == math.inf


# folders for results


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/below"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "gradient_sparsity.jsonl").write_text('{"step": 1, "gradient_analysis/avg_text_token_grad_L1": 0.5}\n')
    message = f"--output_dir must be a folder to write into; got '{place}': "
    for words in (["demo"], ["paper"], ["plot", tmp_path]):
        assert message in fails(*words, "--output_dir", place)
    base = ["--model_name_or_path", "miniature", "--task", "mme", "--output_dir", place]
    for parse, words in (
        (parse_evaluation, base),
        (parse_sweep, [*base, "--k", "1"]),
        (parse_training, flags(place)),
    ):
        with pytest.raises(ValueError, match=message):
            parse(words)


def test_a_folder_that_can_be_made_is_not_made_by_looking(tmp_path):
    parse_training(flags(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_looks_at_the_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RANK", "1")
    parse_evaluation(["--model_name_or_path", "miniature", "--task", "mme", "--output_dir", str(tmp_path / "file")])


# what goes wrong while a command runs


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "a/b.json"), "a/b.json: No space left on device"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
        (ConnectionError("no network"), "no network"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB."), "CUDA out of memory. Tried to"),
        (ModuleNotFoundError("No module named 'peft'", name="peft.tuners"), "this command needs peft: pip install"),
    ],
)
def test_errors_of_the_machine_are_one_line(monkeypatch, error, line):
    def load(*_):
        raise error

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert fails("inspect").startswith(line)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("bug"), ModuleNotFoundError("x", name="sar_fast.nope")])
def test_errors_of_the_program_are_not_hidden(monkeypatch, error):
    def load(*_):
        raise error

    monkeypatch.setattr(loading, "load_model", load)
    assert answer("inspect").exception is error


def test_ctrl_c_is_one_word():
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", interrupted)
        done = answer("inspect")
    assert (done.exit_code, done.stderr.split()) == (130, ["interrupted"])


def test_ctrl_c_on_a_training_says_how_to_go_on(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_train", interrupted)
    with pytest.raises(SystemExit) as end:
        training.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("\ninterrupted: --resume_from_checkpoint true goes on from")


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    def gone(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(loading, "load_model", gone)
    done = answer("inspect")
    assert (done.exit_code, done.output) == (1, "")
