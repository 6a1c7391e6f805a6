"""Reading records: every format gives the same record, and every bad one is named with its reason."""

from __future__ import annotations

import io
import json

import datasets
import pytest
from PIL import Image

from sar_fast.lab.io.datasets import find_datasets
from sar_fast.lab.io.records import Layout, RecordError, open_image, read_rows, to_record
from sar_fast.lab.training.data import load_records
from tests.training.samples import DATA, image_bytes, write_jsonl

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
MESSAGES = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"conversations": TURNS, "images": ["a.png"]}, Layout()),
        ({"id": 7, "conversations": TURNS, "image": "a.png"}, Layout()),
        ({"messages": MESSAGES, "images": ["a.png"]}, Layout()),
        ({"chat": TURNS, "pics": ["a.png"]}, Layout(columns={"messages": "chat", "images": "pics"})),
        (
            {"messages": [{"who": "U", "said": "<image>\nWhat?"}, {"who": "A", "said": "red"}], "images": ["a.png"]},
            Layout(tags={"role_tag": "who", "content_tag": "said", "user_tag": "U", "assistant_tag": "A"}),
        ),
        ({"instruction": "<image>\nWhat?", "output": "red", "images": ["a.png"]}, Layout("alpaca")),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
                    MESSAGES[1],
                ],
                "image": "a.png",
            },
            Layout(),
        ),
    ],
)
def test_formats_agree(row, layout, tmp_path):
    record = to_record(row, layout, tmp_path)
    assert record["messages"] == MESSAGES
    assert record["images"] == [{"path": str(tmp_path / "a.png"), "bytes": None}]


def test_alpaca_history_system_and_query(tmp_path):
    row = {"instruction": "q2", "input": "more", "output": "a2", "history": [["q1", "a1"]], "system": "be brief"}
    messages = to_record(row, Layout("alpaca"), tmp_path)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages] == ["be brief", "q1", "a1", "q2\nmore", "a2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "record is a list"),
        ({"conversations": []}, "column 'conversations'"),
        ({"conversations": TURNS[:1], "image": "a.png"}, "no answer"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "  "}], "image": "a.png"}, "answer is empty"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "'from' is 'bot'"),
        ({"conversations": [TURNS[1], TURNS[1]]}, "turn 1 is the assistant's"),
        ({"conversations": [TURNS[0], TURNS[1], TURNS[1]], "image": "a.png"}, "turn 3 is the assistant's"),
        ({"conversations": TURNS}, "1 <image> placeholder.* for 0 image"),
        ({"conversations": TURNS, "image": ["a.png", "b.png"]}, "1 <image> placeholder.* for 2 image"),
        ({"conversations": TURNS, "image": 3}, "image is int"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "<image>"}], "image": "a.png"}, "answer contains"),
        ({"conversations": [{"from": "human", "value": 3}, TURNS[1]]}, "'value' is int"),
    ],
)
def test_bad_records_say_why(row, message, tmp_path):
    with pytest.raises(RecordError, match=message):
        to_record(row, Layout(), tmp_path)


def test_images_missing_and_corrupt(tmp_path):
    with pytest.raises(RecordError, match=r"gone\.png does not exist"):
        open_image({"path": str(tmp_path / "gone.png"), "bytes": None})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(RecordError, match=r"text\.png cannot be read"):
        open_image({"path": str(tmp_path / "text.png"), "bytes": None})
    with pytest.raises(RecordError, match="cannot be read"):  # a file cut off while it was copied
        open_image({"path": None, "bytes": image_bytes((200, 200))[:150]})


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="needed a list"):
        list(read_rows(tmp_path / "object.json"))
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 3 is not JSON"):
        list(read_rows(tmp_path / "broken.jsonl"))
    (tmp_path / "broken.parquet").write_text("PAR0")
    with pytest.raises(ValueError, match="not a parquet"):
        list(read_rows(tmp_path / "broken.parquet"))
    with pytest.raises(ValueError, match=r"is a \.csv file"):
        list(read_rows(tmp_path / "rows.csv"))


def test_shipped_data_of_every_format_loads():
    records = load_records(find_datasets("shapes_llava,shapes_pairs,shapes_validation", DATA))
    assert len(records) == 32 + 16 + 48
    assert {len(images) for images in records["images"]} == {1, 2}
    for record in records:
        for image in record["images"]:
            assert open_image(image).size == (64, 64)
    assert records[32]["source"].endswith("shapes_pairs.json, record 0 (id shapes_pairs-0)")


def test_streaming_gives_the_same_records():
    infos = find_datasets("shapes_llava", DATA)
    assert list(load_records(infos, streaming=True)) == list(load_records(infos))


def test_a_bad_record_is_named_with_its_file(tmp_path):
    good = {"conversations": TURNS, "images": ["a.png"]}
    path = write_jsonl(tmp_path / "rows.jsonl", [good, {"id": "x7", "conversations": TURNS}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, record 1 \(id x7\): record has 1 <image>"):
        load_records(find_datasets(str(path), tmp_path))


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"conversations": TURNS, "images": ["a.png"]}])
    assert len(load_records(find_datasets(str(path), tmp_path))) == 1
    write_jsonl(path, [{"conversations": TURNS, "images": ["a.png"]}] * 3)
    assert len(load_records(find_datasets(str(path), tmp_path))) == 3


def test_the_registry(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"conversations": TURNS, "images": ["a.png"]}] * 5)
    entries = {
        "rows": {"file_name": "rows.jsonl", "formatting": "sharegpt", "num_samples": 2},
        "gone": {"file_name": "gone.json", "formatting": "sharegpt"},
        "ranked": {"file_name": "rows.jsonl", "ranking": True},
        "none": {"file_name": "rows.jsonl", "num_samples": 0},
        "odd": {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"picture": "images"}},
    }
    entries["tagged"] = {"file_name": "rows.jsonl", "formatting": "sharegpt", "tags": {"speaker": "from"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    assert len(load_records(find_datasets("rows", tmp_path))) == 2
    for name, kind, message in (
        ("row", ValueError, "did you mean 'rows'"),
        ("gone", FileNotFoundError, "gone.json does not exist"),
        ("ranked", ValueError, "ranking not supported"),
        ("none", ValueError, "num_samples must be a whole number, at least 1; got 0"),
        ("odd", ValueError, "columns must be some of .* in sharegpt; got 'picture'"),
        ("tagged", ValueError, "tags must be some of .*; got 'speaker'"),
        ("", ValueError, "dataset must be names of .*, or files; got ''"),
        ("missing.json", FileNotFoundError, "missing.json does not exist"),
    ):
        with pytest.raises(kind, match=message):
            find_datasets(name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no dataset_info\.json"):
        find_datasets("rows", tmp_path / "elsewhere")


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="'none' is empty"):
        load_records(find_datasets(str(tmp_path / "none.json"), tmp_path))


def hub(rows, calls):
    """A stand-in for the hub: what ``load_dataset`` gives, and a note of what it was asked for."""

    def load_dataset(name, subset=None, *, split, streaming):
        calls.append((name, subset, split, streaming))
        if name == "user/gone":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_iterable_dataset()

    return load_dataset


def test_datasets_of_the_hub(tmp_path, monkeypatch):
    """``hf_hub_url``, ``subset``, ``split`` and ``num_samples`` go where they should; pictures come decoded."""
    calls = []
    rows = [{"id": str(n), "conversations": TURNS, "image": {"bytes": image_bytes(value=n)}} for n in (10, 20, 30)]
    monkeypatch.setattr("sar_fast.lab.training.data.load_dataset", hub(rows, calls))
    entry = {"hf_hub_url": "user/set", "formatting": "sharegpt", "subset": "en", "split": "validation"}
    entries = {"all": entry, "some": {**entry, "num_samples": 2}, "gone": {**entry, "hf_hub_url": "user/gone"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    records = load_records(find_datasets("all", tmp_path))
    assert set(calls) == {("user/set", "en", "validation", True)}
    assert [record["source"] for record in records] == [f"user/set, record {n} (id {10 + 10 * n})" for n in range(3)]
    assert records[0]["messages"] == MESSAGES
    for record, value in zip(records, (10, 20, 30)):
        picture = open_image(record["images"][0])
        assert (picture.size, picture.getpixel((0, 0))) == ((64, 64), (value,) * 3)
        Image.open(io.BytesIO(record["images"][0]["bytes"])).verify()
    streamed = list(load_records(find_datasets("some", tmp_path), streaming=True))
    assert [record["id"] for record in streamed] == ["10", "20"]
    with pytest.raises(OSError, match="'user/gone' doesn't exist on the Hub"):  # one line on stderr, as any OSError
        load_records(find_datasets("gone", tmp_path))
    monkeypatch.setattr("sar_fast.lab.training.data.load_dataset", lambda *_, **__: iter(()))
    with pytest.raises(ValueError, match="dataset 'all' is empty: no record in user/set"):
        load_records(find_datasets("all", tmp_path))
