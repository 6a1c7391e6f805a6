"""Chat records with images: the formats they come in, and what makes one good.

A record is ``messages`` (an optional system turn, then user and assistant in turn, the last one an answer) and
``images``, one for each ``<image>`` in the user's words. Formats: sharegpt with LLaMA-Factory's columns and tags
(LLaVA's instruction files and OpenAI's messages are cases of it), alpaca; as .json, .jsonl or .parquet.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sar_fast.base.errors import ArgumentError
from sar_fast.base.wording import cut, describe, quote
from sar_fast.lab.io.pictures import PictureError, find_picture, open_picture, picture_name

IMAGE = "<image>"
SUFFIXES = (".json", ".jsonl", ".parquet")
FORMATTINGS = ("sharegpt", "alpaca")
DEFAULT_COLUMNS = {  # the names that are tried
    "sharegpt": {"messages": ("conversations", "messages"), "images": ("images", "image")},
    "alpaca": {
        "prompt": ("instruction",),
        "query": ("input",),
        "response": ("output",),
        "images": ("images", "image"),
    },
}
KNOWN_COLUMNS = {
    "sharegpt": ("messages", "system", "images"),
    "alpaca": ("prompt", "query", "response", "system", "history", "images"),
}
UNREAD = ("videos", "audios")  # LLaMA-Factory's columns: without them a record says something else
DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


class RecordError(ValueError):
    """A record that cannot be trained on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a file keeps what: LLaMA-Factory's ``formatting``, ``columns`` and ``tags``.

    ``columns`` and ``tags`` hold only what differs from the defaults. Without ``columns["images"]`` the columns
    ``images`` and ``image`` (LLaVA's) are tried; without tags, OpenAI's ``role``/``content`` beside sharegpt's.
    """

    formatting: str = "sharegpt"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.formatting not in FORMATTINGS:
            raise ArgumentError("formatting", repr(self.formatting), f"be one of {', '.join(FORMATTINGS)}")
        known = KNOWN_COLUMNS[self.formatting]
        for name in self.columns:
            if name not in known:
                raise ArgumentError("columns", repr(name), f"be some of {', '.join(known)} in {self.formatting}")
        for name in self.tags:
            if name not in DEFAULT_TAGS:
                raise ArgumentError("tags", repr(name), f"be some of {', '.join(DEFAULT_TAGS)}")

    def column(self, row: Mapping[str, Any], name: str) -> Any:
        """The row's value for a column's role, None where the row has none.

        ``RecordError`` if the row has two columns for it that differ.
        """
        given = self.columns.get(name)
        names = (given,) if given else DEFAULT_COLUMNS[self.formatting].get(name, (name,))
        found = {n: row[n] for n in names if row.get(n) is not None}
        found = {n: value for n, value in found.items() if value != []} or found
        values = list(found.values()) or [None]
        if any(_as_list(value) != _as_list(values[0]) for value in values[1:]):
            raise RecordError(f"{' and '.join(found)} are both given and differ; leave one out, or name it in columns")
        return values[0]


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, row) of a .json (one list), .jsonl (one object a line; blank lines do not count) or .parquet file.

    ``ValueError`` names the file, and the line where one is not JSON. Only .jsonl and .parquet are read piece by piece.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, needed a file: {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is a {path.suffix or 'nameless'} file, needed one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path))
        return
    try:
        yield from _json_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:  # the byte-order mark that some editors put first is no JSON
        if path.suffix == ".jsonl":
            lines = ((n, line) for n, line in enumerate(file, start=1) if line.strip())
            for index, (number, line) in enumerate(lines):
                yield index, _parse(line, f"{path}, line {number}")
            return
        rows = _parse(file.read(), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a JSON {type(rows).__name__}, needed a list of records")
    yield from enumerate(rows)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # of a number of thousands of digits too
        raise ValueError(f"{place} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply to be read") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from error


def to_record(row: Any, layout: Layout, media_dir: Path) -> dict[str, Any]:
    """``{"id", "messages": [{"role", "content"}], "images": [{"path", "bytes"}]}`` of a row, checked.

    Image paths become absolute, from ``media_dir``; the files are not opened here (:func:`open_image` does).
    ``RecordError`` says what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"record is a {type(row).__name__}, needed an object")
    if left_out := [name for name in UNREAD if row.get(name)]:
        raise RecordError(f"record has {' and '.join(left_out)}, and pictures are all that is read")
    name = _id(row)
    turns, parts = _sharegpt_turns(row, layout) if layout.formatting == "sharegpt" else _alpaca_turns(row, layout)
    system = layout.column(row, "system")
    if system is not None and check_text(system, "system"):
        if turns[0]["role"] == "system":
            raise RecordError("record has a system column and a system turn, needed one of them")
        turns.insert(0, {"role": "system", "content": system})
    images = _images(parts, layout.column(row, "images"), media_dir)
    check_messages(turns, len(images))
    return {"id": name, "messages": turns, "images": images}


def id_in_messages(row: Any) -> str:
    """A row's id as messages name it, whatever it is; "" where there is none."""
    value = row.get("id") if isinstance(row, Mapping) else None
    return "" if value is None else cut(value if isinstance(value, str) else quote(value), 100)


def check_text(value: Any, what: str) -> str:
    """The value, if it is text that can be stored and tokenized; else ``RecordError``, which begins with ``what``."""
    if not isinstance(value, str):
        raise RecordError(f"{what} is {describe(value)}, needed text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise RecordError(f"{what} has {half!r} at character {error.start + 1}: half of a surrogate pair") from error
    return value


def check_messages(messages: list[dict[str, str]], num_images: int) -> None:
    """``RecordError`` unless turns alternate, end in an answer, no answer is empty, and ``<image>`` counts match."""
    turns = [m for m in messages if m["role"] != "system"]
    if not turns:
        raise RecordError("record has no turns")
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise RecordError(f"turn {number + 1} is the {turn['role']}'s, needed the {expected}'s")
        if turn["role"] == "assistant":
            if not turn["content"].strip():
                raise RecordError(f"turn {number + 1}: the answer is empty")
            if IMAGE in turn["content"]:
                raise RecordError(f"turn {number + 1}: the answer contains {IMAGE}")
    if turns[-1]["role"] != "assistant":
        raise RecordError("record has no answer: the last turn is the user's")
    if any(m["role"] == "system" for m in messages[1:]):
        raise RecordError("a system turn comes after the first turn")
    placeholders = sum(m["content"].count(IMAGE) for m in messages)
    if placeholders != num_images:
        raise RecordError(f"record has {placeholders} {IMAGE} placeholder(s) for {num_images} image(s)")


def _id(row: Mapping[str, Any]) -> str:
    value = row.get("id")
    if value is None:
        return ""
    if isinstance(value, str):
        return check_text(value, "id")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise RecordError(f"id is {describe(value)}, needed text or a number")
    return str(value)


def _sharegpt_turns(row: Mapping[str, Any], layout: Layout) -> tuple[list[dict[str, str]], list[Any]]:
    """(turns, what each image part says of its picture: None where it says nothing)."""
    turns = layout.column(row, "messages")
    if not isinstance(turns, list) or not turns:
        wanted = layout.columns.get("messages", "conversations")
        raise RecordError(f"column {wanted!r} is {describe(turns)}, needed a list of turns; {_columns(row)}")
    messages, pictures = [], []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RecordError(f"turn {number} is {describe(turn)}, needed an object")
        tags = {**DEFAULT_TAGS, **(OPENAI_TAGS if not layout.tags and "role" in turn else {}), **layout.tags}
        roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
        role, content = turn.get(tags["role_tag"]), turn.get(tags["content_tag"])
        if not isinstance(role, str) or role not in roles:
            raise RecordError(f"turn {number}: {tags['role_tag']!r} is {quote(role)}, needed one of {', '.join(roles)}")
        if isinstance(content, list):
            content = "".join(_part(part, number, pictures) for part in content)
        content = check_text(content, f"turn {number}: {tags['content_tag']!r}")
        messages.append({"role": roles[role], "content": content})
    return messages, pictures


def _part(part: Any, turn: int, pictures: list[Any]) -> str:
    """The words of one of OpenAI's parts, ``<image>`` for a picture, of which ``pictures`` gets what the part says."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return check_text(part.get("text"), f"turn {turn}: a part's 'text'")
    if kind == "image":
        named = any(part.get(key) is not None for key in ("bytes", "path", "url"))
        picture = part.get("image")
        pictures.append(part if picture is None and named else picture)
    elif kind == "image_url":
        if part.get("image_url") is None:
            raise RecordError(f"turn {turn}: a part of type image_url has no image_url: {quote(part)}")
        pictures.append(part["image_url"])
    else:
        raise RecordError(f"turn {turn}: a part is {describe(part)}, needed type text, image or image_url")
    return IMAGE


def _alpaca_turns(row: Mapping[str, Any], layout: Layout) -> tuple[list[dict[str, str]], list[Any]]:
    """(turns, no image parts)."""
    prompt, query, response = (layout.column(row, name) for name in ("prompt", "query", "response"))
    for name, value in (("prompt", prompt), ("response", response)):
        if not isinstance(value, str):
            raise RecordError(f"{name} is {describe(value)}, needed text; {_columns(row)}")
    history = layout.column(row, "history")
    if history is not None and not isinstance(history, (list, tuple)):
        raise RecordError(f"history is {describe(history)}, needed a list of pairs of question and answer")
    messages = []
    for number, pair in enumerate(history or (), start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RecordError(f"history holds {describe(pair)}, needed pairs of question and answer")
        for role, words in zip(("user", "assistant"), pair):
            messages.append({"role": role, "content": check_text(words, f"history, pair {number}: the {role}'s turn")})
    question = check_text(prompt, "prompt")
    if query is not None and check_text(query, "query"):
        question = f"{question}\n{query}"
    answer = check_text(response, "response")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], []


def _images(parts: list[Any], column: Any, media_dir: Path) -> list[dict[str, Any]]:
    """The pictures of a record, from its image parts if they have some, else from its column."""
    listed = _references(_as_list(column), media_dir)
    carried = [part for part in parts if part is not None]
    if not carried:
        return listed
    if len(carried) < len(parts):
        raise RecordError(f"{len(carried)} of {len(parts)} image parts have a picture, needed one in all or in none")
    own = _references(carried, media_dir)
    if listed and listed != own:
        raise RecordError("the turns' image parts and the images column both have pictures, and they differ")
    return own


def _references(images: list[Any], media_dir: Path) -> list[dict[str, Any]]:
    references = []
    for number, image in enumerate(images, start=1):
        name = "image" if len(images) == 1 else f"image {number}"
        try:
            place = find_picture(image, media_dir)
        except PictureError as error:
            raise RecordError(f"{name} {error}") from error
        if isinstance(place, bytes):
            references.append({"path": None, "bytes": place})
        else:
            references.append({"path": check_text(str(place), f"{name}'s path"), "bytes": None})
    return references


def open_image(reference: Mapping[str, Any]) -> Image.Image:
    """The picture of a record's image as it is shown, mode RGB (:func:`sar_fast.lab.io.pictures.open_picture`).

    ``RecordError`` if the file is missing or is no whole picture.
    """
    name = f"image file {picture_name(reference['path'])}" if reference["path"] else "image in the record"
    try:
        return open_picture(reference["bytes"] or reference["path"])
    except PictureError as error:
        raise RecordError(f"{name} {error}") from error


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _columns(row: Mapping[str, Any]) -> str:
    return "columns: " + cut(", ".join(map(str, row)))
