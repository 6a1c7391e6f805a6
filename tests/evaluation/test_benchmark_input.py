"""``evaluate.py --task`` on input that is wrong: an error that names it, or a skip that is counted and listed."""

from __future__ import annotations

import shutil

import pyarrow
import pyarrow.parquet as pq
import pytest
from transformers import LlavaProcessor

from sar_fast.cli.evaluate import benchmark, focus, probe
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.io.prompts import PromptFormat
from tests.evaluation.benchmarks import DATA, arguments, lines, mme_rows, picture_bytes, write_table

pytestmark = pytest.mark.usefixtures("one_thread", "arrow_cache")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"template .*t\.jinja, line 1 cannot be rendered: "),
        ("{{ messages[7].content.x }}", r"t\.jinja cannot be rendered: list object has no element 7"),
        ("{{ raise_exception('no system turn') }}", "cannot be rendered: no system turn"),
        ("USER: <image> ASSISTANT:", "leaves out the user's words"),
    ],
)
def test_a_bad_template_is_named_before_anything_is_written(tmp_path, template, message):
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path / "out", template=str(tmp_path / "t.jinja"))
    with pytest.raises(ValueError, match=r"template must be a Jinja file; .*; got '.*gone\.jinja'"):
        arguments(tmp_path / "out", template=str(tmp_path / "gone.jinja"))


def test_a_template_without_the_picture_is_named(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content[1].text }} ASSISTANT:")
    with pytest.raises(
        ValueError, match=r"--template must be one that fits the model's processor; got .*t\.jinja: .*0 <image> tokens"
    ):
        benchmark.run(arguments(tmp_path / "out", template=str(tmp_path / "t.jinja")))


def test_a_models_own_template_that_fails_is_named(tmp_path):
    shutil.copytree(MINIATURE_PATH, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[7].content.x }}")
    with pytest.raises(
        ValueError, match=r"--model_name_or_path must be one whose chat template can .*or with --template"
    ):
        benchmark.run(arguments(tmp_path / "out", model_name_or_path=str(tmp_path / "model")))


def test_the_models_own_template_as_a_file_changes_nothing(tmp_path):
    (tmp_path / "t.jinja").write_text((MINIATURE_PATH / "chat_template.jinja").read_text())
    benchmark.run(arguments(tmp_path / "own"))
    benchmark.run(arguments(tmp_path / "file", template=str(tmp_path / "t.jinja")))
    assert lines(tmp_path / "own") == lines(tmp_path / "file")


def test_a_placeholder_in_a_question_is_a_listed_skip(tmp_path):
    rows = mme_rows(2)
    rows[2]["question"] = "Is an <image> in it?"
    data = write_table(tmp_path / "data", rows)
    results = benchmark.run(arguments(tmp_path / "out", data_dir=data))
    assert results["num_samples_evaluated"] == 2
    assert results["skipped"][0] == {
        "key": "2",
        "reason": "row 2: the prompt has '<image>', which stands for a picture",
    }


def test_a_box_outside_of_its_picture_is_skipped_and_listed(tmp_path):
    rows = [
        {"question_id": str(n), "image": {"bytes": picture_bytes(), "path": None}, "answer": ["red"], "bbox": box}
        for n, box in enumerate([[2.0, 2.0, 8.0, 8.0], [20.0, 2.0, 8.0, 8.0]])  # the picture is 24 x 16
    ]
    data = write_table(tmp_path / "data", rows, "val-00000-of-00001.parquet")
    results = benchmark.run(arguments(tmp_path / "out", task="refcoco", data_dir=data, box_format="miniature"))
    assert results["num_samples_evaluated"] == 1
    ((key, reason),) = [(s["key"], s["reason"]) for s in results["skipped"]]
    assert key == "1/0"
    assert "lies outside of the picture's 24 x 16 pixels" in reason


def test_replies_that_were_not_understood_are_said_on_the_console(tmp_path, capsys):
    given = {"task": "scienceqa", "data_dir": str(DATA / "scienceqa"), "max_samples": 4, "max_new_tokens": 3}
    results = benchmark.run(arguments(tmp_path / "out", **given))
    assert results["unparsed"] == 4
    assert "warning: 4 of 4 replies were not understood and count as wrong" in capsys.readouterr().err
    results = benchmark.run(arguments(tmp_path / "cloze", choice_format="cloze", **given))
    assert results["unparsed"] == 0
    assert "not understood" not in capsys.readouterr().err


def test_a_box_format_that_needs_the_resized_size_is_refused_before_the_run(tmp_path):
    with pytest.raises(
        ValueError, match=r"--box_format must be another one, since .* does not report .* got resized_pix"
    ):
        benchmark.run(
            arguments(tmp_path / "out", task="refcoco", data_dir=str(DATA / "refcoco"), box_format="resized_pixels")
        )
    assert not (tmp_path / "out").exists()


def test_an_object_without_expressions_is_a_listed_skip(tmp_path):
    image = {"bytes": picture_bytes(), "path": None}
    rows = [
        {"question_id": str(n), "image": image, "answer": answer, "bbox": [2.0, 2.0, 8.0, 8.0]}
        for n, answer in enumerate((["red"], []))
    ]
    data = write_table(tmp_path / "data", rows, "val-00000-of-00001.parquet")
    results = benchmark.run(arguments(tmp_path / "out", task="refcoco", data_dir=data, box_format="miniature"))
    assert results["skipped"] == [{"key": "row 1", "reason": "answer has no expression"}]


def test_a_table_without_rows_is_named(tmp_path):
    write_table(tmp_path / "data", mme_rows(1))
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(ValueError, match=r"mme: .*data has no rows"):
        benchmark.run(arguments(tmp_path / "out", data_dir=str(tmp_path / "data")))


def refuse_narrow(monkeypatch):
    """The processor behaves as Qwen's does on a narrow picture, and refuses one word."""
    call = LlavaProcessor.__call__

    def picky(self, images=None, text=None, **options):
        for picture in images or ():
            if max(picture.size) > 20 * min(picture.size):
                raise ValueError("absolute aspect ratio must be smaller than 20, got\n" + str(picture.size))
        if any("unspeakable" in words for words in text):
            raise KeyError("unspeakable")
        return call(self, images=images, text=text, **options)

    monkeypatch.setattr(LlavaProcessor, "__call__", picky)


@pytest.mark.parametrize("size", [1, 8])
def test_what_the_processor_refuses_is_a_skip_that_names_the_sample(tmp_path, monkeypatch, size, capsys):
    rows = mme_rows(4)
    rows[2]["image"] = rows[3]["image"] = {"bytes": picture_bytes(size=(2, 90)), "path": None}
    rows[5]["question"] = "Is there an unspeakable circle?"
    data = write_table(tmp_path / "data", rows)
    refuse_narrow(monkeypatch)
    results = benchmark.run(arguments(tmp_path / "out", data_dir=data, per_device_eval_batch_size=size))
    reasons = {skip["key"]: skip["reason"] for skip in results["skipped"]}
    assert list(reasons) == ["2", "3", "5", "4"]
    assert reasons["2"] == (
        "row 2: the processor refuses its picture of 2 x 90 pixels: ValueError: absolute aspect ratio must be smaller "
        "than 20, got (2, 90)"
    )
    assert "row 5: the processor refuses its words 'Is there an unspeakable circle?" in reasons["5"]
    assert results["num_samples_evaluated"] == 4
    assert results["num_skipped_by_kind"] == {
        "refused by the model's processor": 3,
        "another sample of its group is skipped": 1,
    }
    assert results["num_samples_skipped"] == 4
    counts = "4 skipped (3 refused by the model's processor, 1 another sample of its group is skipped; listed in"
    assert counts in capsys.readouterr().err


def test_a_processor_that_refuses_everything_is_an_error(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("pixel")

    monkeypatch.setattr(LlavaProcessor, "__call__", broken)
    with pytest.raises(ValueError, match="the processor makes no prompt of any picture: KeyError: 'pixel'"):
        benchmark.run(arguments(tmp_path / "out"))


@pytest.mark.parametrize("error", [MemoryError("no room"), ModuleNotFoundError("No module named 'torchvision'")])
def test_what_is_no_refusal_is_no_skip(tmp_path, monkeypatch, error):
    """Too little memory, a missing package: for one picture alone too, since the next one may pass."""
    rows = mme_rows(4)
    rows[2]["image"] = rows[3]["image"] = {"bytes": picture_bytes(size=(2, 90)), "path": None}
    data = write_table(tmp_path / "data", rows)
    call = LlavaProcessor.__call__

    def failing(self, images=None, text=None, **options):
        if any(picture.size == (2, 90) for picture in images or ()):
            raise error
        return call(self, images=images, text=text, **options)

    monkeypatch.setattr(LlavaProcessor, "__call__", failing)
    with pytest.raises(type(error), match=str(error)):
        benchmark.run(arguments(tmp_path / "out", data_dir=data))


def test_a_fault_of_ours_is_no_refusal(tmp_path, monkeypatch):
    """Only what the processor raises is: with any error taken for one, a bug would become a list of skips."""
    rows = mme_rows(4)
    rows[2]["image"] = rows[3]["image"] = {"bytes": picture_bytes(size=(2, 90)), "path": None}
    encode = PromptFormat.encode_groups

    def faulty(self, pictures, questions):
        if any(picture.size == (2, 90) for picture in pictures):
            raise IndexError("ours")
        return encode(self, pictures, questions)

    monkeypatch.setattr(PromptFormat, "encode_groups", faulty)
    with pytest.raises(IndexError, match="ours"):
        benchmark.run(arguments(tmp_path / "out", data_dir=write_table(tmp_path / "data", rows)))


def test_the_analyses_name_what_the_processor_refuses(tmp_path, monkeypatch):
    refuse_narrow(monkeypatch)
    rows = pq.read_table(DATA.parent / "shapes_grounding.parquet").to_pylist()[:6]
    rows[1] |= {"image": {"bytes": picture_bytes(size=(90, 4)), "path": None}, "bbox": [0, 0, 9, 4], "mask": None}
    rows[4]["query"] = "Where is the unspeakable circle?"
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    given = {"task": None, "data_dir": None, "dataset": str(tmp_path / "rows.parquet"), "max_samples": None}
    found = focus.run(arguments(tmp_path / "focus", do_sfs_fi_eval=True, **given))
    assert found["skipped"] == {"refused by the model's processor": ["1", "4"]}
    assert found["num_samples_evaluated"] == 4
    with pytest.raises(ValueError, match="sample 1: the processor refuses its picture of 90 x 4 pixels: ValueError"):
        probe.run(arguments(tmp_path / "probe", do_layerwise_probe=True, **given))


def test_skips_are_counted_by_kind(tmp_path):
    """Rows of the table, samples and partners of a skipped one are different things."""
    rows = mme_rows(4, broken=[1])
    rows[4]["image"] = {"bytes": b"no picture", "path": None}
    data = write_table(tmp_path / "data", rows[:-1])
    results = benchmark.run(arguments(tmp_path / "out", data_dir=data))
    assert results["num_skipped_by_kind"] == {
        "picture with one question": 1,
        "unreadable image": 3,
        "another sample of its group is skipped": 1,
    }
    assert results["num_samples_skipped"] == sum(results["num_skipped_by_kind"].values()) == len(results["skipped"])


def test_totals_of_some_categories_say_so(tmp_path, capsys):
    results = benchmark.run(arguments(tmp_path / "out"))
    assert results["partial"]["perception"] == "1 of 10 categories"
    output = capsys.readouterr()
    (line,) = [line for line in output.out.splitlines() if line.lstrip().startswith("perception")]
    assert line.endswith("(partial: 1 of 10 categories)")
    assert "warning: totals of a part of the benchmark, not to be compared with published ones: overall (1 of 14" in (
        output.err
    )
    assert any("perception (1 of 10 categories)" in warning for warning in results["warnings"])
