"""Questions about one picture are asked together, and answered as each is alone."""

from __future__ import annotations

import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image
from PIL import Image as Pictures

from sar_fast.cli.evaluate import benchmark
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.cli.loading import load_model
from sar_fast.hf.shared_prefix import Sharing
from sar_fast.lab.benchmark import asking
from sar_fast.lab.benchmark.asking import cut_batches, pending
from sar_fast.lab.benchmark.tasks import Sample
from sar_fast.lab.io.answering import prepare_processor
from sar_fast.lab.io.prompts import PromptFormat
from sar_fast.lab.miniature.drawing import draw_scene
from sar_fast.lab.run.results import METADATA, SAMPLES
from tests.evaluation.test_benchmark import Stopped

pytestmark = pytest.mark.usefixtures("one_thread")
COUNTS = (3, 1, 2)  # questions about each of three pictures
WORDS = ("Is there a red circle?", "Is there a blue square in the image?", "Is there anything green?")


class Numbered:
    """A table in which rows 0, 3, 6, ... have one picture, 1, 4, 7, ... another, and so on."""

    def picture_key(self, row):
        return str(row % 3)


def samples(count):
    return [Sample(str(i), i, "?", "") for i in range(count)]


def test_batches_keep_pictures_together_and_lose_nobody():
    batches = cut_batches(samples(12), Numbered(), 8)  # four questions about each of three pictures
    assert [[s.row % 3 for s in batch] for batch in batches] == [[0] * 4 + [1] * 4, [2] * 4]
    assert sorted(int(s.key) for batch in batches for s in batch) == list(range(12))
    # a picture that would be torn begins a batch; one that fits in none is cut
    assert [len(b) for b in cut_batches(samples(12), Numbered(), 6)] == [4, 4, 4]
    assert all(len(b) <= 3 for b in cut_batches(samples(12), Numbered(), 3))
    assert [len(b) for b in cut_batches(samples(5), Numbered(), 1)] == [1] * 5
    done = {s.key: {} for s in batches[0]}
    assert pending(batches, done) == batches[1:]


def picture(number):
    return draw_scene(np.random.default_rng(number)).image


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """POPE's layout, its questions about one picture apart, and in two splits."""
    folder, rows = tmp_path_factory.mktemp("pope"), []
    for turn in range(max(COUNTS)):
        for number, count in enumerate(COUNTS):
            if turn < count:
                file = folder / f"{number}.png"
                Pictures.fromarray(picture(number)).save(file)
                rows.append(
                    {
                        "question_id": str(len(rows)),
                        "image": {"bytes": file.read_bytes(), "path": None},
                        "question": WORDS[turn],
                        "answer": "yes",
                        "category": ("random", "popular")[turn % 2],
                    }
                )
    table = Dataset.from_list(rows).cast_column("image", Image())
    pq.write_table(table.data.table, folder / "test-00000-of-00001.parquet")
    return folder


def arguments(out, data, **change):
    given = {"model_name_or_path": "miniature", "output_dir": str(out), "task": "pope", "data_dir": str(data)}
    return EvaluationArguments(**{**given, "device": "cpu", "scoring": "first_token", **change})


def records(out):
    return [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]


def sharing(out):
    return json.loads((out / METADATA).read_text())["sessions"][-1]["sharing"]


SAR = {"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 0.05}


@pytest.mark.parametrize("sar", [{}, SAR], ids=["plain", "sar"])
def test_questions_asked_together_are_answered_as_alone(tmp_path, data, sar, monkeypatch):
    counts = []
    replies = asking.Asker.replies
    monkeypatch.setattr(asking.Asker, "replies", lambda *a: counts.append(a[2].counts) or replies(*a))
    benchmark.run(arguments(tmp_path / "together", data, **sar))
    assert counts == [list(COUNTS)]
    benchmark.run(arguments(tmp_path / "alone", data, per_device_eval_batch_size=1, **sar))
    assert counts[1:] == [[1]] * 6
    for a, b in zip(records(tmp_path / "together"), records(tmp_path / "alone"), strict=True):
        assert (a["key"], a["prompt"], a["reply"]) == (b["key"], b["prompt"], b["reply"])
        # log-probabilities of order 1 to 10 after four fp32 layers, summed in another order
        for name, value in a["log_probabilities"].items():
            assert value == pytest.approx(b["log_probabilities"][name], abs=1e-4)
    assert sharing(tmp_path / "together") == {
        "vision encoder": "once per picture",
        "common prefix": "once per picture",
    }


def test_generated_answers_are_those_of_questions_alone(tmp_path, data):
    words = {"scoring": "generate", **SAR}
    benchmark.run(arguments(tmp_path / "together", data, **words))
    benchmark.run(arguments(tmp_path / "alone", data, per_device_eval_batch_size=1, **words))
    assert records(tmp_path / "together") == records(tmp_path / "alone")


@pytest.mark.parametrize(
    ("what", "vision", "prefix"),
    [
        (Sharing("", "its tokens look ahead"), "once per picture", "once per prompt: its tokens look ahead"),
        (Sharing("it is odd", "it is odd"), "once per prompt: it is odd", "once per prompt: it is odd"),
    ],
)
def test_a_family_that_cannot_share_runs_plainly_and_says_so(tmp_path, data, what, vision, prefix, monkeypatch, caplog):
    benchmark.run(arguments(tmp_path / "shared", data, **SAR))
    monkeypatch.setattr(asking, "sharing_of", lambda model: what)
    monkeypatch.setattr("sar_fast.hf.shared_prefix.sharing_of", lambda model: what)
    with caplog.at_level(logging.INFO):
        benchmark.run(arguments(tmp_path / "plain", data, **SAR))
    assert sharing(tmp_path / "plain") == {"vision encoder": vision, "common prefix": prefix}
    assert what.prefix in caplog.text
    for a, b in zip(records(tmp_path / "shared"), records(tmp_path / "plain"), strict=True):
        assert a["reply"] == b["reply"]
        for name, value in a["log_probabilities"].items():
            assert value == pytest.approx(b["log_probabilities"][name], abs=1e-4)


def test_an_interrupted_run_of_grouped_questions_ends_in_the_same_file(tmp_path, data, monkeypatch):
    size = {"per_device_eval_batch_size": 3}  # a picture, then two
    benchmark.run(arguments(tmp_path / "whole", data, **size, **SAR))
    replies, calls = asking.Asker.replies, []

    def stop_at_the_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise Stopped
        return replies(*args)

    monkeypatch.setattr(asking.Asker, "replies", stop_at_the_second)
    with pytest.raises(Stopped):
        benchmark.run(arguments(tmp_path / "broken", data, **size, **SAR))
    benchmark.run(arguments(tmp_path / "broken", data, **size, **SAR))
    assert len(calls) == 3
    assert (tmp_path / "broken" / SAMPLES).read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()
    assert [r["key"] for r in records(tmp_path / "whole")] == ["0", "1", "2", "3", "4", "5"]  # the table's order


@pytest.mark.parametrize("own", ["", "<s>"])
def test_grouped_prompts_begin_once(own):
    """Templates that write the first token themselves; every prompt's tokens are the processor's own."""
    model, processor = load_model("miniature", "cpu", "float32")
    prepare_processor(processor)
    processor.chat_template = own + processor.chat_template
    groups = PromptFormat.of(model, processor).encode_groups([Pictures.fromarray(picture(0))], [list(WORDS)])
    bos = processor.tokenizer.bos_token_id
    for ids, words in zip(groups.ids[0], WORDS):
        assert ids.count(bos) == 1
        alone = PromptFormat.of(model, processor).encode_groups([Pictures.fromarray(picture(0))], [[words]])
        assert ids == alone.ids[0][0]
