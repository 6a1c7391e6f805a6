"""``evaluate.py --task``: from a folder of parquet files to scores, interrupted, continued and shared out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from sar_fast.cli.evaluate import benchmark, loading
from sar_fast.cli.evaluate.arguments import parse
from sar_fast.cli.evaluate.command import main
from sar_fast.lab.benchmark.asking import Asker
from sar_fast.lab.benchmark.tables import find_files
from sar_fast.lab.run.results import METADATA, PARTS, RESULTS, SAMPLES
from tests.distributed_workers import run_ranks
from tests.evaluation.benchmarks import DATA, ROOT, arguments, lines, mme_rows, write_table

pytestmark = pytest.mark.usefixtures("one_thread", "arrow_cache")


def same_files(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in (SAMPLES, RESULTS))


# --- a whole run


def test_the_miniature_answers_mme_and_what_is_written_agrees(tmp_path):
    out = tmp_path / "out"
    results = benchmark.run(arguments(out, max_samples=None))
    records = lines(out)
    assert json.loads((out / RESULTS).read_text()) == results
    assert len(records) == results["num_samples_evaluated"] == 96
    assert results["num_samples_skipped"] == 0
    # counted from the records alone
    for name, scores in results["categories"].items():
        mine = [r for r in records if r["category"] == name]
        right = [r["reply"].lower() == r["answer"] for r in mine]
        pairs = [all(right[i : i + 2]) for i in range(0, len(right), 2)]
        assert scores["score"] == pytest.approx(100 * sum(right) / len(right) + 100 * sum(pairs) / len(pairs))
        assert scores["score"] > 150  # it was trained on such pictures: about 190; a constant answer has 50
    assert not (out / PARTS).exists()
    metadata = json.loads((out / METADATA).read_text())
    assert metadata["settings"]["sar"] is None
    (session,) = metadata["sessions"]
    assert session["seed"] == 42
    assert session["versions"]["torch"] == torch.__version__
    assert session["configuration"]["per_device_eval_batch_size"] == 8
    assert session["finished"] >= session["started"]


@pytest.mark.parametrize(
    ("task", "options", "least"),
    [
        ("pope", {"scoring": "first_token"}, ("overall", "f1", 90)),
        ("refcoco", {"box_format": "miniature"}, ("overall", "accuracy", 80)),
        ("mmbench", {"choice_format": "cloze", "scoring": "first_token"}, ("overall", "accuracy", 80)),
        ("scienceqa", {"choice_format": "cloze"}, ("overall", "accuracy", 80)),
        ("textvqa", {}, ("overall", "accuracy", 80)),
    ],
)
def test_every_layout_is_read_asked_and_scored(tmp_path, task, options, least):
    out = tmp_path / "out"
    results = benchmark.run(arguments(out, task=task, data_dir=str(DATA / task), **options))
    group, name, value = least
    assert results[group][name] >= value
    assert results["num_samples_evaluated"] >= 16
    assert results["num_samples_skipped"] == 0


def test_sar_changes_log_probabilities_and_is_removed_with_the_model(tmp_path):
    plain, sar, off = tmp_path / "plain", tmp_path / "sar", tmp_path / "off"
    benchmark.run(arguments(plain, scoring="first_token"))
    benchmark.run(arguments(sar, scoring="first_token", use_sar=True, sar_activation_layer_k=2, sar_beta=0.05))
    benchmark.run(arguments(off, scoring="first_token", use_sar=True, sar_activation_layer_k=0))
    of = lambda out: torch.tensor([list(r["log_probabilities"].values()) for r in lines(out)])
    assert (of(plain) - of(sar)).abs().max() > 1e-3
    assert torch.equal(of(plain), of(off))  # K = 0 is the model as it was


# --- interrupting and continuing


class Stopped(Exception):
    pass


@pytest.mark.parametrize("scoring", ["generate", "first_token"])
def test_an_interrupted_run_continues_to_the_same_files(tmp_path, monkeypatch, scoring):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"scoring": scoring, "per_device_eval_batch_size": 4, "use_sar": True, "sar_activation_layer_k": 2}
    benchmark.run(arguments(whole, **settings))
    calls, answer = [], Asker.replies

    def stop_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Stopped
        return answer(*args)

    monkeypatch.setattr(Asker, "replies", stop_at_the_third)
    with pytest.raises(Stopped):
        benchmark.run(arguments(broken, **settings))
    assert not (broken / RESULTS).exists()
    (part,) = (broken / PARTS).iterdir()
    written = part.read_bytes()
    assert written.count(b"\n") == 8
    part.write_bytes(written[:-20])  # killed in the middle of a line: that sample counts as not answered
    benchmark.run(arguments(broken, **settings))
    assert len(calls) == 3 + 3  # the batch of the torn line, and the two that were left
    assert same_files(whole, broken)
    assert len(json.loads((broken / METADATA).read_text())["sessions"]) == 2


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_files(tmp_path):
    """SIGKILL while it writes: nothing is cleaned up."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    benchmark.run(arguments(whole, max_samples=None, per_device_eval_batch_size=1))
    command = [sys.executable, str(ROOT / "experiments" / "evaluate.py"), "--model_name_or_path", "miniature"]
    flags = ["--task", "mme", "--data_dir", str(DATA / "mme"), "--per_device_eval_batch_size", "1"]
    process = subprocess.Popen([*command, *flags, "--output_dir", str(killed)], stderr=subprocess.DEVNULL)
    part = killed / PARTS / "00000.jsonl"
    while process.poll() is None and not (part.is_file() and part.read_bytes().count(b"\n") >= 5):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed / RESULTS).exists(), "it was not killed in time: the test says nothing"
    benchmark.run(arguments(killed, max_samples=None, per_device_eval_batch_size=1))
    assert same_files(whole, killed)


def test_a_finished_run_is_scored_again_without_the_model(tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = benchmark.run(arguments(out))
    before = (out / SAMPLES).read_bytes()
    monkeypatch.setattr(loading, "load", None)
    assert benchmark.run(arguments(out)) == first
    assert (out / SAMPLES).read_bytes() == before


def test_batch_size_may_change_on_the_way(tmp_path):
    out = tmp_path / "out"
    benchmark.run(arguments(out, per_device_eval_batch_size=4))
    benchmark.run(arguments(out, per_device_eval_batch_size=16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sar": True, "sar_activation_layer_k": 2}, r'sar was null, now \{"activation_layer_k": 2'),
        ({"scoring": "first_token"}, 'scoring was "generate", now "first_token"'),
        ({"max_samples": 8}, "max_samples was 16, now 8"),
        ({"bf16": True}, 'dtype was "float32", now "bfloat16"'),
        ({"prompt_suffix": ""}, r'prompt_suffix was "\\n'),
        ({"task": "pope", "data_dir": str(DATA / "pope")}, 'task was "mme", now "pope"'),
    ],
)
def test_other_settings_in_the_same_folder_are_an_error_that_names_them(tmp_path, monkeypatch, change, message):
    out = tmp_path / "out"
    benchmark.run(arguments(out))
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(ValueError, match=message) as caught:
        benchmark.run(arguments(out, **change))
    assert "--overwrite_output_dir" in str(caught.value)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    results = benchmark.run(arguments(out, overwrite_output_dir=True, **change))
    assert len(json.loads((out / METADATA).read_text())["sessions"]) == 1
    assert results["num_samples_evaluated"] == len(lines(out))


def test_overwriting_leaves_other_files_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    benchmark.run(arguments(out))
    benchmark.run(arguments(out, overwrite_output_dir=True))
    assert (out / "notes.txt").read_text() == "mine"


def test_results_without_metadata_are_not_continued(tmp_path):
    (tmp_path / SAMPLES).write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds samples.jsonl but no run_metadata.json"):
        benchmark.run(arguments(tmp_path))


def test_a_broken_line_is_named(tmp_path):
    out = tmp_path / "out"
    benchmark.run(arguments(out))
    text = (out / SAMPLES).read_text().splitlines()
    (out / SAMPLES).write_text("\n".join([text[0], text[1][:30], *text[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2 is not JSON"):
        benchmark.run(arguments(out))


# --- two processes


def launch(out, *flags, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [str(ROOT / "experiments" / "evaluate.py"), "--model_name_or_path", "miniature", "--task", "mme"]
    where = ["--data_dir", str(DATA / "mme"), "--output_dir", str(out), "--max_samples", "16", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *script, *where], capture_output=True, text=True, env=env, timeout=300)


def half_of_it(rank, world, out):
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # as a launcher does; the group is there already
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    benchmark.run(arguments(out, per_device_eval_batch_size=4))


@pytest.mark.everyday(by=["processes"])
@pytest.mark.parametrize("by", ["processes", "torchrun"])
def test_two_processes_equal_one(tmp_path, by):
    """Every sample is answered once, by one of them, and the files are the same bytes."""
    one, two = tmp_path / "one", tmp_path / "two"
    benchmark.run(arguments(one, per_device_eval_batch_size=4))
    if by == "processes":
        run_ranks(half_of_it, two)
    else:
        done = launch(two, "--per_device_eval_batch_size", "4")
        assert done.returncode == 0, done.stderr
    assert same_files(one, two)
    session = json.loads((two / METADATA).read_text())["sessions"][0]
    assert session["world_size"] == 2


@pytest.mark.slow
def test_two_processes_continue_what_one_began_and_the_other_way_round(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    benchmark.run(arguments(whole, per_device_eval_batch_size=2))
    kept = lines(whole)[:6]
    for name, go_on in (
        ("two", lambda out: launch(out, "--per_device_eval_batch_size", "2")),
        ("one", lambda out: benchmark.run(arguments(out, per_device_eval_batch_size=2))),
    ):
        out = tmp_path / name
        shutil.copytree(whole, out)
        for done in (SAMPLES, RESULTS):
            (out / done).unlink()
        (out / PARTS).mkdir()
        for rank in range(2):  # as two processes would have left it
            mine = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept[rank::2])
            (out / PARTS / f"{rank:05d}.jsonl").write_text(mine)
        go_on(out)
        assert same_files(whole, out)


@pytest.mark.slow
def test_bad_input_ends_every_process_with_the_reason(tmp_path):
    done = launch(tmp_path / "out", "--split", "train")
    assert done.returncode != 0
    assert "has no train-*.parquet; it has test" in done.stderr


# --- bad input


def test_unreadable_pictures_are_skipped_counted_and_listed(tmp_path, capsys):
    data = write_table(tmp_path / "data", mme_rows(3, broken=[1]))
    results = benchmark.run(arguments(tmp_path / "out", data_dir=data, per_device_eval_batch_size=3))
    assert results["num_samples_evaluated"] == 4
    assert results["categories"]["existence"]["total"] == 4
    assert [s["key"] for s in results["skipped"]] == ["2", "3"]
    reason = "row {}: image in the record cannot be read as a picture: its format is unknown"  # the same in every run
    assert [s["reason"] for s in results["skipped"]] == [reason.format(2), reason.format(3)]
    assert "warning: 2 skipped" in capsys.readouterr().err
    records = lines(tmp_path / "out")
    assert [r["key"] for r in records] == ["0", "1", "2", "3", "4", "5"]
    assert "skipped" in records[2]
    assert "reply" not in records[2]


def test_nothing_left_to_score_is_an_error(tmp_path):
    data = write_table(tmp_path / "data", mme_rows(2, broken=[0, 1]))
    with pytest.raises(ValueError, match=r"mme: no sample is left to score; first: 0: row 0: .*cannot be read"):
        benchmark.run(arguments(tmp_path / "out", data_dir=data))
    assert not (tmp_path / "out" / RESULTS).exists()


def test_a_skipped_sample_takes_its_group_along(tmp_path):
    """One question of a pair with its own broken copy of the picture: accuracy+ of the pair is not defined."""
    rows = mme_rows(2)
    rows[2]["image"] = {"bytes": b"no picture", "path": None}
    data = write_table(tmp_path / "data", rows)
    results = benchmark.run(arguments(tmp_path / "out", data_dir=data))
    assert results["num_samples_evaluated"] == 2
    assert [(s["key"], s["reason"].split(":")[0]) for s in results["skipped"]] == [
        ("2", "row 2"),
        ("3", "another sample of existence/1.png is skipped"),
    ]


def test_a_missing_column_and_an_empty_table_are_named(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "category"} for row in mme_rows(1)]
    data = write_table(tmp_path / "data", rows)
    with pytest.raises(ValueError, match=r"mme: no column category in .*it has question_id, image, question, answer"):
        benchmark.run(arguments(tmp_path / "out", data_dir=data))
    assert not (tmp_path / "out").exists()


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1 but no parquet")
    with pytest.raises(ValueError, match=f"mme: a file of {tmp_path} cannot be read as parquet: "):
        benchmark.run(arguments(tmp_path / "out", data_dir=str(tmp_path)))


def test_max_samples_keeps_pairs_whole(tmp_path):
    results = benchmark.run(arguments(tmp_path / "out", max_samples=3))
    assert results["num_samples_evaluated"] == 4


def test_flags_that_do_not_fit_the_task_are_errors(tmp_path):
    with pytest.raises(ValueError, match="--scoring must be generate for textvqa; got 'first_token'"):
        benchmark.run(arguments(tmp_path, task="textvqa", data_dir=str(DATA / "textvqa"), scoring="first_token"))
    given = ["--model_name_or_path", "miniature", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--box_format must be left out with --task mme; got"):
        parse([*given, "--task", "mme", "--box_format", "pixels"])
    with pytest.raises(ValueError, match="--choice_format must be left out with --task mme; got"):
        parse([*given, "--task=mme", "--choice-format=cloze"])
    with pytest.raises(ValueError, match="--prompt_suffix must be left out without --task; got"):
        parse([*given, "--do_layerwise_probe", "--prompt_suffix", "x"])


def test_files_of_a_split_are_found_in_the_published_layouts(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    touch("pope/data/test-00000-of-00002.parquet", "pope/data/test-00001-of-00002.parquet")
    touch("pope/Full/random-00000-of-00001.parquet", "pope/Full/test-00000-of-00001.parquet")
    touch("mmb/en/dev-0.parquet", "mmb/cn/dev-0.parquet", "mmb/cc/test-0.parquet")
    touch("ref/data/testA-0.parquet", "ref/data/test-0.parquet")
    names = lambda *args: [str(f.relative_to(tmp_path)) for f in find_files(tmp_path / args[0], *args[1:])]
    assert names("pope", "test") == ["pope/data/test-00000-of-00002.parquet", "pope/data/test-00001-of-00002.parquet"]
    assert names("pope", "random") == ["pope/Full/random-00000-of-00001.parquet"]
    assert names("mmb", "dev", "en") == ["mmb/en/dev-0.parquet"]
    assert names("mmb/cn", "dev", "en") == ["mmb/cn/dev-0.parquet"]
    assert names("ref", "test") == ["ref/data/test-0.parquet"]  # testA is another split
    with pytest.raises(
        ValueError, match=r"data_dir must have dev in one folder; got .* with several, give one of them: .*cn, .*en"
    ):
        find_files(tmp_path / "mmb", "dev")
    with pytest.raises(FileNotFoundError, match=r"has no val-\*\.parquet; it has dev, test"):
        find_files(tmp_path / "mmb", "val", "en")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        find_files(tmp_path / "nowhere", "val")


# --- the command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tusk", "mme"], "error: unknown flag --tusk; did you mean --task?"),
        ([], "error: needed one of --task, --do_sfs_fi_eval, --do_layerwise_probe; got none"),
        (["--task", "mme", "--do_layerwise_probe"], "got --task and --do_layerwise_probe"),
        (["--task", "mme", "--sar_beta", "0.1"], "error: --sar_beta must be left out without --use_sar"),
        (["--task", "mme", "--use_sar", "--sar_beta", "0"], "error: --sar_beta must be > 0"),
        (
            ["--task", "mme", "--dataset", "x"],
            "error: --dataset must be left out with --task, which takes --data_dir; got x",
        ),
        (["--do_layerwise_probe"], "error: --dataset must be given with --do_layerwise_probe; got None"),
        (
            ["--do_layerwise_probe", "--dataset", "/x.json", "--dataset_dir", "y"],
            "error: --dataset_dir must be left out for a file with an absolute path; got y",
        ),
        (["--task", "mme", "--bf16", "--fp16"], "error: --bf16 must be False with --fp16; got True"),
        (
            ["--task", "mme", "--predict_with_generate", "--scoring", "first_token"],
            "error: --predict_with_generate must be False with --scoring first_token; got True",
        ),
        (
            ["--task", "mme", "--per_device_eval_batch_size", "0"],
            "per_device_eval_batch_size must be at least 1; got 0",
        ),
        (
            ["--task", "mme", "--scoring", "first_token", "--max_new_tokens", "5"],
            "error: --max_new_tokens must be left out with --scoring first_token",
        ),
        (
            ["--task", "mme", "--media_dir", "x"],
            "error: --media_dir must be left out with --task, which takes --data_dir",
        ),
        (
            ["--task", "mme", "--dataset_dir", "x"],
            "error: --dataset_dir must be left out with --task, which takes --data_dir",
        ),
        (["--task", "mme", "--dataloader_num_workers", "-1"], "dataloader_num_workers must be at least 0; got -1"),
        (["--task", "mme", "--scoring", "last"], "error: argument --scoring: invalid choice: 'last'"),
        (["--task", "mme", "--data_dir", "nowhere"], "error: data_dir nowhere is no folder"),
        (["--task", "mme", "--data_dir", str(DATA / "mme"), "--model_name_or_path", "./none"], "--model_name_or_path"),
        (
            ["--task", "mme", "--data_dir", str(DATA / "mme"), "--use_sar", "--sar_activation_layer_k", "9"],
            "error: --sar_activation_layer_k must be at most the number of attention layers, 4; got 9",
        ),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    base = ["evaluate.py", "--output_dir", str(tmp_path / "out"), "--model_name_or_path", "miniature"]
    monkeypatch.setattr(sys, "argv", base + flags)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(err) == 1
    assert message in err[0]


def test_the_research_codes_command_runs(tmp_path, monkeypatch, capsys):
    """Flags of its README, verbatim."""
    command = """--model_name_or_path miniature --use_sar --sar_activation_layer_k 2 --sar_beta 0.5 --task mme
        --output_dir results/eval_sars/mme --per_device_eval_batch_size 4 --predict_with_generate --bf16"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *command.split(), "--data_dir", str(DATA / "mme"), "--max_samples", "8"]
    )
    main()
    results = json.loads((tmp_path / "results/eval_sars/mme" / RESULTS).read_text())
    assert set(results["overall"]) == {"accuracy", "score", "correct", "total"}
    assert "existence" in capsys.readouterr().out


def test_a_model_without_pictures_is_named(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"--model_name_or_path '.*text' cannot be loaded as an image-text-to-text"):
        benchmark.run(arguments(tmp_path / "out", model_name_or_path=str(tmp_path / "text")))
