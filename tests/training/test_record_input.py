"""What may stand in a record's fields: every wrong value is named, and what OpenAI's parts carry is a picture."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sar_fast.lab.io.datasets import find_datasets
from sar_fast.lab.io.records import Layout, RecordError, open_image, read_rows, to_record
from sar_fast.lab.training.data import FEATURES, load_records
from tests.training.samples import image_bytes

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
ANSWER = {"role": "assistant", "content": "red"}
HALF = "\ud800"  # half of a surrogate pair, as JSON may hold it
CONTENT = image_bytes()
DATA_URL = "data:image/png;base64," + base64.b64encode(CONTENT).decode()
ALPACA = {"instruction": "What?", "input": "", "output": "red", "history": [["q", "a"]], "system": "brief", "id": "x"}
SHAREGPT = {"id": 1, "conversations": TURNS, "images": ["a.png"], "system": "brief"}
PARTS = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": DATA_URL}}]
OPENAI = {"id": None, "messages": [{"role": "user", "content": PARTS}, ANSWER], "images": None}
EXAMPLES = [(ALPACA, "alpaca"), (SHAREGPT, "sharegpt"), (OPENAI, "sharegpt")]


def asked(*parts, **columns):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **columns}


def places(value, path=()):
    """Every place in a JSON value, the whole first."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def put(row, path, value):
    row = copy.deepcopy(row)
    place = row
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return row


def check(row, layout):
    """A row is a record that can be stored, or an error of one line that can be printed; returns the error."""
    message = None
    try:
        record = to_record(row, layout, Path("/media"))
    except RecordError as error:
        message = str(error)
    if message is not None:
        assert message.isprintable(), message
        assert len(message) < 1000, message
        return message
    assert pa.Table.from_pylist([{"source": "test", **record}], schema=FEATURES.arrow_schema).num_rows == 1
    assert sum(m["content"].count("<image>") for m in record["messages"]) == len(record["images"])
    return None


WRONG = [None, 0, 1.5, True, "", " ", HALF, [], {}, [None], ["a"], [[]], [[["a"]]], [HALF], {"a": 1}, {"bytes": "x"}]
WRONG += [{"url": HALF}, {"path": 3}, {"type": []}, {"type": {"a": 1}}, b"", b"\xff", "<image>", "x" * 100_000, 10**400]


@pytest.mark.parametrize(("row", "formatting"), EXAMPLES, ids=["alpaca", "sharegpt", "openai"])
def test_every_wrong_value_in_every_place_is_named(row, formatting):
    assert check(row, Layout(formatting)) is None
    paths = [path for path in places(row) if path]
    assert len(paths) > 8
    for path in paths:
        for value in WRONG:
            check(put(row, path, value), Layout(formatting))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None, categories=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(
    ["conversations", "messages", "images", "image", "system", "id", "instruction", "input", "output", "history"]
)


@given(st.data(), json_values)
@settings(max_examples=300, deadline=None)
def test_no_value_anywhere_makes_another_error(data, value):
    row, formatting = data.draw(st.sampled_from(EXAMPLES))
    path = data.draw(st.sampled_from([path for path in places(row) if path]))
    check(put(row, path, value), Layout(formatting))


@given(st.dictionaries(names, json_values, max_size=5), st.sampled_from(["alpaca", "sharegpt"]))
@settings(max_examples=150, deadline=None)
def test_no_row_makes_another_error(row, formatting):
    check(row, Layout(formatting))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": []}, "id is list [], needed text or a number"),
        ({"id": True}, "id is bool True"),
        ({"id": HALF}, r"id has '\ud800' at character 1: half of a surrogate pair"),
        ({"system": 3}, "system is int 3, needed text"),
        ({"system": 0}, "system is int 0, needed text"),
        ({"system": ["a"]}, "system is list ['a'], needed text"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 1: 'from' is ['human'], needed one of human"),
        ({"conversations": [{"from": None, "value": "x"}]}, "turn 1: 'from' is None, needed one of"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": None}]}, "turn 2: 'value' is missing, needed text"),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "a" + HALF}]}, r"'value' has '\ud800' at character 2"),
        ({"conversations": [{"from": "system", "value": "x"}, *TURNS], "system": "y"}, "a system column and"),
        ({"images": [["a.png"]]}, "image is list ['a.png'], needed a path"),
        ({"images": ["a.png", 3]}, "image 2 is int 3, needed a path"),
        ({"images": [None]}, "image is missing, needed a path"),
        ({"images": ""}, "image is the empty path ''"),
        ({"images": [{"bytes": "iVBORw0KGgo"}]}, "image has bytes that are str 'iVBORw0KGgo', needed bytes"),
        ({"images": [{"path": ["a.png"]}]}, "image has a path that is list"),
        ({"images": ["a" + HALF]}, r"image's path has '\ud800'"),
        ({"images": ["https://host/a.png"]}, "image is the URL 'https://host/a.png': nothing is downloaded"),
        ({"image": "b.png"}, "images and image are both given and differ"),
        ({"messages": [{"role": "user", "content": "x"}, ANSWER]}, "conversations and messages are both given"),
        ({"videos": ["a.mp4"]}, "record has videos, and pictures are all that is read"),
        ({"audios": "a.wav"}, "record has audios, and pictures are all that is read"),
    ],
)  # fmt: skip
def test_wrong_fields_of_sharegpt(changes, message, tmp_path):
    with pytest.raises(RecordError) as caught:
        to_record({"conversations": TURNS, "images": ["a.png"], **changes}, Layout(), tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": None}, "prompt is missing, needed text"),
        ({"output": ["red"]}, "response is list ['red'], needed text"),
        ({"input": 3}, "query is int 3, needed text"),
        ({"input": []}, "query is list [], needed text"),
        ({"history": 0}, "history is int 0, needed a list of pairs"),
        ({"history": {"a": "b"}}, "history is dict {'a': 'b'}, needed a list of pairs"),
        ({"history": [None]}, "history holds missing, needed pairs"),
        ({"history": ["ab"]}, "history holds str 'ab', needed pairs"),
        ({"history": [["q", None]]}, "history, pair 1: the assistant's turn is missing, needed text"),
        ({"history": [["q", "a"], [3, "a"]]}, "history, pair 2: the user's turn is int 3, needed text"),
        ({"history": [["q", HALF]]}, r"has '\ud800'"),
    ],
)
def test_wrong_fields_of_alpaca(changes, message, tmp_path):
    with pytest.raises(RecordError) as caught:
        to_record({**ALPACA, **changes}, Layout("alpaca"), tmp_path)
    assert message in str(caught.value)


def test_what_columns_leave_out_is_left_out(tmp_path):
    """null, and an empty list, are how a table says that a row has nothing there."""
    for images in ({"images": None, "image": "a.png"}, {"images": [], "image": "a.png"}, {"images": ["a.png"]},
                   {"images": ["a.png"], "image": "a.png"}, {"image": {"path": "a.png", "bytes": None}}):  # fmt: skip
        record = to_record({"conversations": TURNS, "messages": None, **images}, Layout(), tmp_path)
        assert record["images"] == [{"path": str(tmp_path / "a.png"), "bytes": None}]
    text = [{"from": "human", "value": "What?"}, TURNS[1]]
    for images in (
        {},
        {"image": None},
        {"images": []},
        {"images": None, "image": None},
        {"videos": [], "audios": None},
    ):
        assert to_record({"conversations": text, **images}, Layout(), tmp_path)["images"] == []
    record = to_record({**ALPACA, "input": None, "history": None, "system": ""}, Layout("alpaca"), tmp_path)
    assert [m["content"] for m in record["messages"]] == ["What?", "red"]


class TestParts:
    """OpenAI's messages: pictures stand in the turns."""

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": DATA_URL}},
            {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
            {"type": "image_url", "image_url": DATA_URL, "text": None, "image": None},
            {"type": "image", "image": DATA_URL, "image_url": None},
            {"type": "image", "image": CONTENT},
            {"type": "image", "image": {"bytes": CONTENT, "path": None}},
            {"type": "image", "url": DATA_URL},
            {"type": "image", "bytes": CONTENT},
        ],
    )
    def test_bytes(self, part, tmp_path):
        record = to_record(asked(part, {"type": "text", "text": "\nWhat?"}), Layout(), tmp_path)
        assert record["messages"][0]["content"] == "<image>\nWhat?"
        assert record["images"] == [{"path": None, "bytes": CONTENT}]

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image", "image": "a.png"},
            {"type": "image", "path": "a.png"},
            {"type": "image_url", "image_url": {"url": "a.png"}},
            {"type": "image_url", "image_url": "a.png"},
            {"type": "image_url", "image_url": {"url": "file://{}/a.png"}},
        ],
    )
    def test_files(self, part, tmp_path):
        part = json.loads(json.dumps(part).replace("{}", str(tmp_path)))
        assert to_record(asked(part), Layout(), tmp_path)["images"] == [
            {"path": str(tmp_path / "a.png"), "bytes": None}
        ]

    def test_decoded_pictures(self, tmp_path):
        part = {"type": "image", "image": Image.new("CMYK", (4, 3))}
        (reference,) = to_record(asked(part), Layout(), tmp_path)["images"]
        assert open_image(reference).getpixel((0, 0)) == (255, 255, 255)

    def test_pictures_stay_in_order_over_parts_and_turns(self, tmp_path):
        pictures = [image_bytes(value=n) for n in (10, 20, 30)]
        parts = [{"type": "image", "image": content} for content in pictures]
        text = {"type": "text", "text": "and"}
        row = {
            "messages": [
                {"role": "user", "content": [parts[0], text, parts[1]]},
                ANSWER,
                {"role": "user", "content": [text, parts[2]]},
                ANSWER,
            ]
        }
        record = to_record(row, Layout(), tmp_path)
        assert [m["content"] for m in record["messages"][::2]] == ["<image>and<image>", "and<image>"]
        assert [image["bytes"] for image in record["images"]] == pictures

    def test_pictures_are_counted_once(self, tmp_path):
        part = {"type": "image", "image": "a.png"}
        alone = to_record(asked(part), Layout(), tmp_path)
        assert to_record(asked(part, images=["a.png"]), Layout(), tmp_path) == alone
        assert to_record(asked({"type": "image"}, images=["a.png"]), Layout(), tmp_path) == alone
        for row, message in (
            (asked(part, images=["b.png"]), "both have pictures, and they differ"),
            (asked(part, part, images=["a.png"]), "both have pictures, and they differ"),
            (asked(part, {"type": "image"}, images=["b.png"]), "1 of 2 image parts have a picture"),
            (asked(part, {"type": "text", "text": "<image>"}), "2 <image> placeholder.* for 1 image"),
            (asked({"type": "image"}), "1 <image> placeholder.* for 0 image"),
        ):
            with pytest.raises(RecordError, match=message):
                to_record(row, Layout(), tmp_path)

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"type": "image_url"}, "turn 1: a part of type image_url has no image_url"),
            ({"type": "image_url", "image_url": {"url": "https://host/a.png"}}, "nothing is downloaded, give a local"),
            ({"type": "image_url", "image_url": {}}, "image is dict {}, needed bytes, path or url"),
            ({"type": "image", "image": ""}, "image is the empty path ''"),
            ({"type": "text", "text": 3}, "turn 1: a part's 'text' is int 3, needed text"),
            ({"type": "text"}, "turn 1: a part's 'text' is missing, needed text"),
            ({"type": "text", "text": HALF}, "a part's 'text' has '"),
            ({"type": "video", "video": "a.mp4"}, "turn 1: a part is dict {"),
            ({"type": ["text"]}, "turn 1: a part is dict {"),
            ("What?", "turn 1: a part is str 'What?', needed type text, image or image_url"),
            ({"type": "image", "image": DATA_URL[:-3] + "*" * 5}, "base64 is broken"),
        ],
    )  # fmt: skip
    def test_wrong_parts(self, part, message, tmp_path):
        with pytest.raises(RecordError) as caught:
            to_record(asked(part), Layout(), tmp_path)
        assert message in str(caught.value)

    def test_a_dataset_of_them_loads(self, tmp_path):
        rows = [asked({"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": "What?"})] * 2
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        records = load_records(find_datasets(str(tmp_path / "rows.json"), tmp_path))
        assert [len(images) for images in records["images"]] == [1, 1]
        assert open_image(records[1]["images"][0]).size == (64, 64)


def test_a_picture_as_text_is_not_printed_whole(tmp_path):
    for image in (base64.b64encode(CONTENT * 9).decode(), DATA_URL * 9, {"bytes": DATA_URL * 9}, [DATA_URL * 9] * 9):
        try:
            reference = to_record({"conversations": TURNS, "images": [image]}, Layout(), tmp_path)["images"][0]
        except RecordError as error:
            message = str(error)
        else:
            with pytest.raises(RecordError) as caught:
                open_image(reference)
            message = str(caught.value)
        assert len(message) < 600


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_data(name, tmp_path):
    text = json.dumps({"conversations": TURNS, "images": ["a.png"], "id": "ä"}, ensure_ascii=False)
    (tmp_path / name).write_text(f"[{text}]" if name.endswith("json") else text + "\n", encoding="utf-8-sig")
    (row,) = [row for _, row in read_rows(tmp_path / name)]
    assert row["id"] == "ä"
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": name, "formatting": "sharegpt"}}), "utf-8-sig"
    )
    assert len(load_records(find_datasets("rows", tmp_path))) == 1


def test_json_that_cannot_be_held_is_named_with_its_place(tmp_path):
    for line, message in (("[" * 100_000, "line 2 is nested too deeply"), ("1" * 5000, "line 2 is not JSON")):
        (tmp_path / "rows.jsonl").write_text("{}\n" + line + "\n")
        with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
            list(read_rows(tmp_path / "rows.jsonl"))


def test_a_parquet_file_with_bad_text_is_named(tmp_path):
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"output": broken}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet is not a parquet file that can be read"):
        list(read_rows(tmp_path / "rows.parquet"))


def test_records_are_read_without_the_libraries_of_models():
    code = "import sys, sar_fast.lab.io.records; print([n for n in sys.argv[1:] if n in sys.modules])"
    heavy = ["transformers", "datasets", "pyarrow", "accelerate", "skimage", "matplotlib"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
