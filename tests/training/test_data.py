"""From dataset names to what the Trainer gets: limits, mixes, streams, checks that notice changed pictures, lengths."""

from __future__ import annotations

import collections
import itertools
import json
import logging
import os
import random
import shutil

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from sar_fast.cli.train import main
from sar_fast.lab.focus.dataset import load_grounding_samples
from sar_fast.lab.io.datasets import find_datasets
from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.checking import BadRecord
from sar_fast.lab.training.data import (
    Collator,
    encode_dataset,
    load_records,
    training_dataset,
    training_stream,
)
from sar_fast.lab.training.encoding import Encoder
from sar_fast.lab.training.mixing import Mix, mixed, shuffled
from sar_fast.lab.training.run import build
from tests.training.runs import flags, launch, train
from tests.training.samples import DATA, REPOSITORY, image_bytes, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


FIRST = {"a": 0, "b": 100, "long": 200}  # grey value of a file's first picture


def rows(folder, name, count, words="red"):
    """A file of ``count`` records, each with a picture of its own grey."""
    made = []
    for n in range(count):
        picture = folder / f"{name}{n}.png"
        picture.write_bytes(image_bytes(value=FIRST[name] + n))
        turns = [{"from": "human", "value": f"<image>{words}"}, {"from": "gpt", "value": "red"}]
        made.append({"conversations": turns, "image": picture.name})
    return write_jsonl(folder / f"{name}.jsonl", made)


def infos(folder, **sizes):
    names = ",".join(str(rows(folder, name, count)) for name, count in sizes.items())
    return find_datasets(names, None)


def pictures(processor, samples):
    """Names of the records that encoded samples are of, by the grey of their pictures."""
    images = processor.image_processor
    found = []
    for sample in samples:
        value = sample["features"]["pixel_values"].flatten(1)[0, 0].item()
        grey = round((value * images.image_std[0] + images.image_mean[0]) * 255)
        name = max((name for name in FIRST if FIRST[name] <= grey), key=FIRST.get)
        found.append(f"{name}{grey - FIRST[name]}")
    return found


@pytest.fixture
def encoder(processor):
    return Encoder(processor)


def test_max_samples_limits_every_dataset(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [])
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("benchmarks"))
    registry = tmp_path / "data" / "dataset_info.json"
    entries = json.loads(registry.read_text())
    entries["shapes_pairs"]["num_samples"] = 3
    registry.write_text(json.dumps(entries))
    for streaming in (False, True):
        found = find_datasets("shapes_llava,shapes_pairs,shapes_validation", tmp_path / "data", None, 5)
        counts = collections.Counter(r["source"].split(",")[0] for r in load_records(found, streaming))
        assert sorted(counts.values()) == [3, 5, 5]


def test_max_samples_limits_training_and_evaluation(tmp_path):
    given = {"dataset": "shapes_llava,shapes_pairs", "eval_dataset": "shapes_pairs,shapes_validation"}
    trainer, _ = build(parse(flags(tmp_path, **given, do_eval=True, max_samples=4)))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (8, 8)
    trainer, _ = build(parse(flags(tmp_path, **given, do_eval=True, max_samples=4, streaming=True)))
    assert len(list(trainer.eval_dataset)) == 8
    sources = {row["source"] for row in itertools.islice(trainer.train_dataset.records, 80)}
    assert len(sources) == 8


@pytest.mark.parametrize(("strategy", "stopping"), [("under", "first_exhausted"), ("over", "all_exhausted")])
def test_interleaving_is_that_of_the_datasets_library(strategy, stopping):
    parts = [[1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23, 24]]
    streams = [datasets.Dataset.from_dict({"x": part}).to_iterable_dataset() for part in parts]
    expected = [row["x"] for row in datasets.interleave_datasets(streams, stopping_strategy=stopping)]
    again = []
    got = mixed([part.__iter__ for part in parts], Mix(f"interleave_{strategy}"), random.Random(0), again.append)
    assert list(got) == expected
    assert again == ([] if strategy == "under" else [0, 1])


def test_shares_are_kept_and_every_record_is_read_once():
    parts = [range(1000), range(1000, 1100)]
    mix = Mix("interleave_over", (0.7, 0.3))
    order = list(mixed([part.__iter__ for part in parts], mix, random.Random(0), lambda n: None))
    assert set(order) == set(range(1100))
    assert sum(n < 1000 for n in order[:500]) == pytest.approx(350, abs=40)
    assert list(shuffled(iter(range(50)), 1, random.Random(0))) == list(range(50))
    moved = list(shuffled(iter(range(50)), 10, random.Random(0)))
    assert sorted(moved) == list(range(50))
    assert moved != list(range(50))
    assert all(n < place + 10 for place, n in enumerate(moved))  # none comes before it was read


def test_a_mix_of_stored_datasets(tmp_path, encoder, processor, caplog):
    found = infos(tmp_path, a=6, b=2)
    with caplog.at_level(logging.INFO):
        assert pictures(processor, training_dataset(found, encoder)) == [*(f"a{n}" for n in range(6)), "b0", "b1"]
        over = pictures(processor, training_dataset(found, encoder, Mix("interleave_over")))
    assert over == ["a0", "b0", "a1", "b1", "a2", "b0", "a3", "b1", "a4", "b0", "a5"]
    assert "mix of 2 datasets: interleave_over, in turn; 11 records an epoch" in caplog.text
    assert "b: 2 of 2 records, each up to 3 times" in caplog.text
    assert "a: 6 of 6 records\n" in caplog.text
    under = pictures(processor, training_dataset(found, encoder, Mix("interleave_under")))
    assert under == ["a0", "b0", "a1", "b1"]
    shares = [training_dataset(found, encoder, Mix("interleave_over", (0.5, 0.5)), seed) for seed in (1, 1, 2)]
    first, same, other = (pictures(processor, part) for part in shares)
    assert first == same != other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mix_strategy interleave_over", "--mix_strategy must be left out for one dataset, .*; got interleave_over"),
        ("--dataset a,b --interleave_probs 0.7,0.3", "must be an interleave one with --interleave_probs; got concat"),
        (
            "--dataset a,b --mix_strategy interleave_over --interleave_probs 1",
            "must be 2 numbers, one a dataset; got 1",
        ),
        ("--dataset a,b --mix_strategy interleave_over --interleave_probs 0.7,0.7", "add up to 1; got 0.7,0.7"),
        ("--dataset a,b --mix_strategy interleave_over --interleave_probs 1.5,-0.5", "must be above 0"),
        ("--dataset a,b --mix_strategy interleave_over --interleave_probs much", "numbers like 0.7,0.3; got 'much'"),
        ("--dataset a,b --mix_strategy both", "argument --mix_strategy"),
        ("--buffer_size 10", "--buffer_size must be left out without --streaming; got 10"),
    ],
)
def test_wrong_mixes(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        parse([*flags(tmp_path), *words.split()])


def test_a_stream_is_shuffled_anew_in_every_pass_and_repeats_no_set(tmp_path, encoder, processor):
    found = infos(tmp_path, a=8, b=2)
    everything = sorted([f"a{n}" for n in range(8)] + ["b0", "b1"])
    read = pictures(processor, itertools.islice(training_stream(found, encoder, buffer_size=100, seed=1), 30))
    passes = [read[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(one) == everything for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    again = pictures(processor, itertools.islice(training_stream(found, encoder, buffer_size=100, seed=1), 30))
    other = pictures(processor, itertools.islice(training_stream(found, encoder, buffer_size=100, seed=2), 30))
    assert read == again != other


def test_a_stream_says_what_it_mixes_and_repeats(tmp_path, encoder, caplog):
    found = infos(tmp_path, a=6, b=2)
    with caplog.at_level(logging.INFO):
        stream = training_stream(found, encoder, Mix("interleave_over"), buffer_size=3)
        list(itertools.islice(stream, 15))
    assert "stream of a, b: interleave_over, in turn, shuffled in a buffer of 3 records" in caplog.text
    assert "stream: dataset 'b' is repeated, time 3 in this pass" in caplog.text
    assert "stream: the data begin again, pass 2" in caplog.text
    training_stream(found, encoder)
    assert "concat reads one dataset after the other" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        list(itertools.islice(training_stream(found, encoder, announce=False), 15))
    assert caplog.text == ""


def test_workers_share_a_stream_of_one_file(tmp_path, encoder, processor):
    stream = training_stream(infos(tmp_path, a=9), encoder, buffer_size=100)
    loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=lambda batch: batch[0])
    read = pictures(processor, itertools.islice(loader, 18))
    assert sorted(read) == sorted([f"a{n}" for n in range(9)] * 2)


def test_a_stream_reads_only_what_its_buffer_needs(tmp_path, encoder):
    """The end of the file is no JSON, and is not reached."""
    path = rows(tmp_path, "a", 40)
    with path.open("a") as file:
        file.write("no json\n")
    stream = training_stream(find_datasets(str(path), None), encoder, buffer_size=8)
    assert len(list(itertools.islice(stream, 30))) == 30
    with pytest.raises(ValueError, match="line 41 is not JSON"):
        list(itertools.islice(stream, 41))


def test_a_stream_in_which_no_record_fits_is_an_error(tmp_path, processor, caplog):
    found = infos(tmp_path, a=3)
    with pytest.raises(ValueError, match="all 3 records are longer than max_length"):
        training_stream(found, Encoder(processor, 10))
    short = len(Encoder(processor)(next(iter(load_records(found))))["input_ids"])
    found += find_datasets(str(rows(tmp_path, "long", 2, words="red " * 20)), None)
    with caplog.at_level(logging.WARNING):
        read = pictures(processor, itertools.islice(training_stream(found, Encoder(processor, short + 2)), 6))
    assert read == ["a0", "a1", "a2"] * 2
    assert "1 of 4 records dropped so far" in caplog.text


def test_a_resumed_stream_goes_on_exactly(tmp_path):
    """Over several passes of a mix: the data end twice within the steps of this run."""
    common = {
        "dataset": f"{rows(tmp_path, 'a', 4)},{rows(tmp_path, 'b', 3)}", "streaming": True, "buffer_size": 4,
        "mix_strategy": "interleave_over", "save_strategy": "steps", "save_steps": 3, "max_steps": 6,
        "gradient_accumulation_steps": 2, "gradient_analysis": False,
    }  # fmt: skip
    whole = train(tmp_path / "whole", **common)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    again = train(tmp_path / "again", resume_from_checkpoint="true", **common)
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (whole, again)]
    assert losses[0] == losses[1]
    weights = whole.model.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in again.model.state_dict().items())


@pytest.mark.slow  # every day its shards, in test_workers_share_a_stream_of_one_file
def test_ranks_of_a_stream_train_on_different_rows(tmp_path):
    """Two ranks of two rows see what one process sees in batches of four: the losses are those of one run."""
    data = {"dataset": f"{rows(tmp_path, 'a', 6)},{rows(tmp_path, 'b', 4)}", "streaming": True, "max_steps": 5}
    common = {**data, "buffer_size": 4, "learning_rate": 1e-4, "gradient_analysis": False, "use_cpu": True}
    train(tmp_path / "one", **common, per_device_train_batch_size=4)
    done = launch(flags(tmp_path / "two", **common))
    assert done.returncode == 0, done.stderr[-3000:]
    losses = []
    for name in ("one", "two"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        losses.append([line["loss"] for line in state["log_history"] if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def keep_times(path, content):
    """Put other bytes of the same size into a file, whose times stay as they were."""
    before = path.stat()
    content = content[: before.st_size].ljust(before.st_size, b"\0")
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "record 1: image file .*a1.png does not exist"),
        (lambda path: path.write_bytes(b""), "record 1: .*a1.png cannot be read"),
        (lambda path: keep_times(path, b"no picture"), "record 1: .*a1.png cannot be read"),
    ],
    ids=["deleted", "emptied", "replaced"],
)
def test_a_picture_that_changed_since_the_last_check_is_checked_again(tmp_path, encoder, spoil, message):
    found = infos(tmp_path, a=3)
    assert len(training_dataset(found, encoder)) == 3
    assert len(training_dataset(found, encoder)) == 3
    spoil(tmp_path / "a1.png")
    with pytest.raises(BadRecord, match=message):
        training_dataset(found, encoder)


def test_a_bad_record_is_named_by_a_process_of_the_check_too(tmp_path, encoder):
    found = infos(tmp_path, a=6)
    (tmp_path / "a4.png").unlink()
    with pytest.raises(BadRecord, match=r"^\S+a\.jsonl, record 4: image file \S+ does not exist$"):
        training_dataset(found, encoder, num_proc=2)


def test_checks_are_kept_while_records_pictures_and_encoder_are_the_same(tmp_path, processor, monkeypatch):
    calls = []
    real = Encoder.__call__

    def counted(self, record):
        calls.append(record["source"])
        return real(self, record)

    monkeypatch.setattr(Encoder, "__call__", counted)
    found = infos(tmp_path, a=3)

    def checked(processor=processor, **options):
        calls.clear()
        training_dataset(found, Encoder(processor, **options))
        return len(calls)

    assert checked() == 3
    assert checked() == 0
    os.utime(tmp_path / "a1.png")  # only the time is another
    assert checked() == 0
    (tmp_path / "a1.png").write_bytes(image_bytes(value=200))
    assert checked() == 3
    assert checked(max_length=500) == 3
    assert checked(max_length=500, too_long="truncate") == 3
    monkeypatch.setattr(processor, "chat_template", processor.chat_template + " ")
    assert checked() == 3
    keep_times(tmp_path / "a.jsonl", (tmp_path / "a.jsonl").read_bytes().replace(b"a2.png", b"b2.png"))
    with pytest.raises(BadRecord, match=r"record 2: image file .*b2\.png"):
        checked()


def test_a_changed_record_is_noticed_whatever_the_files_times(tmp_path, encoder, processor):
    found = infos(tmp_path, a=2)
    assert pictures(processor, training_dataset(found, encoder)) == ["a0", "a1"]
    rows(tmp_path, "b", 1)
    path = tmp_path / "a.jsonl"
    keep_times(path, path.read_bytes().replace(b"a1.png", b"b0.png"))
    assert pictures(processor, training_dataset(found, encoder)) == ["a0", "b0"]


@pytest.mark.parametrize(("workers", "streaming"), [(2, False), pytest.param(0, True, marks=pytest.mark.slow)])
def test_a_picture_that_disappears_during_training_ends_the_run_in_one_line(
    tmp_path, workers, streaming, monkeypatch, capfd
):
    path = rows(tmp_path, "a", 12)
    real = Trainer.train

    def losing(self, *args, **kwargs):
        (tmp_path / "a7.png").unlink()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", losing)
    words = flags(tmp_path / "out", dataset=path, max_steps=20, dataloader_num_workers=workers, streaming=streaming)
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capfd.readouterr().err
    assert f"error: {path}, record 7: image file {tmp_path / 'a7.png'} does not exist" in told.splitlines()
    assert "Traceback" not in told


def test_records_are_grouped_by_the_lengths_that_were_measured(tmp_path, monkeypatch):
    """Neither the sampler nor the column of lengths encodes anything."""
    trainer, _ = build(parse(flags(tmp_path, train_sampling_strategy="group_by_length", packing=True)))
    encoded = []
    real = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, record: encoded.append(1) or real(self, record))
    sampler = trainer._get_train_sampler()
    order = list(sampler)
    lengths = trainer.train_dataset["length"]
    assert encoded == []
    assert sorted(order) == list(range(32))
    assert lengths == [len(row["features"]["input_ids"]) for row in trainer.train_dataset]
    apart = sum(abs(lengths[a] - lengths[b]) for a, b in zip(order[::2], order[1::2]))
    assert apart < sum(abs(lengths[a] - lengths[b]) for a, b in zip(range(0, 32, 2), range(1, 32, 2)))
    trainer.train()


def test_lengths_follow_dropping_and_mixing(tmp_path, processor):
    found = infos(tmp_path, a=4) + find_datasets(str(rows(tmp_path, "long", 2, words="red " * 20)), None)
    found += find_datasets(str(rows(tmp_path, "b", 2, words="red red")), None)
    whole = training_dataset(found, Encoder(processor))
    assert whole["length"] == [len(row["features"]["input_ids"]) for row in whole]
    limit = whole["length"][4] - 1
    with pytest.raises(ValueError, match="all 2 records are longer than max_length"):
        training_dataset(found, Encoder(processor, limit))
    kept = training_dataset([found[0], found[2]], Encoder(processor, limit), Mix("interleave_over"))
    assert kept["length"] == [len(row["features"]["input_ids"]) for row in kept]
    assert len(set(kept["length"])) > 1


def test_relative_files_are_looked_for_in_dataset_dir(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows(tmp_path / "data", "a", 2)
    monkeypatch.chdir(tmp_path)
    assert find_datasets("a.jsonl", tmp_path / "data")[0].files == (tmp_path / "data" / "a.jsonl",)
    (beside,) = find_datasets("data/a.jsonl", None)
    assert len(load_records([beside])) == 2
    with pytest.raises(FileNotFoundError, match=r"data/a\.jsonl exists, but paths start from dataset_dir"):
        find_datasets("data/a.jsonl", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl does not exist"):
        find_datasets("a.jsonl", None)
    absolute = str(tmp_path / "data" / "a.jsonl")
    with pytest.raises(ValueError, match="--dataset_dir must be left out for files with absolute paths"):
        parse(flags(tmp_path / "out", dataset=absolute, dataset_dir=tmp_path))
    assert parse(flags(tmp_path / "out", dataset=f"{absolute},shapes_llava", dataset_dir=DATA)).data.dataset_dir


def test_grounding_files_are_looked_for_in_dataset_dir(tmp_path, monkeypatch):
    shutil.copy(DATA / "shapes_grounding.parquet", tmp_path / "g.parquet")
    assert len(load_grounding_samples("g.parquet", tmp_path, limit=3)) == 3
    monkeypatch.chdir(REPOSITORY)
    assert len(load_grounding_samples("experiments/data/shapes_grounding.parquet", None, limit=3)) == 3
    assert len(load_grounding_samples("shapes_grounding", None, limit=3)) == 3
    with pytest.raises(FileNotFoundError, match=r"exists, but paths start from dataset_dir.*needed its columns"):
        load_grounding_samples("experiments/data/shapes_grounding.parquet", tmp_path)


def test_a_collator_takes_rows_of_both_kinds_of_dataset(tmp_path, encoder, processor):
    found = infos(tmp_path, a=2)
    stored, streamed = encode_dataset(load_records(found), encoder), encode_dataset(load_records(found, True), encoder)
    batches = [Collator(processor.tokenizer.pad_token_id)(list(part)) for part in (stored, streamed)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
