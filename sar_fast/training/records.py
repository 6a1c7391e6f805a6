"""Chat records with images: the formats they come in, and what makes one good.

A record is ``messages`` (an optional system turn, then user and assistant in turn, the last one an answer) and
``images``, one for each ``<image>`` in the user's words. Formats: sharegpt with LLaMA-Factory's columns and tags
(LLaVA's instruction files and OpenAI's messages are cases of it), alpaca; as .json, .jsonl or .parquet.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

IMAGE = "<image>"
SUFFIXES = (".json", ".jsonl", ".parquet")
FORMATTINGS = ("sharegpt", "alpaca")
DEFAULT_COLUMNS = {
    "sharegpt": {"messages": "conversations"},
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
}
KNOWN_COLUMNS = {
    "sharegpt": ("messages", "system", "images"),
    "alpaca": ("prompt", "query", "response", "system", "history", "images"),
}
DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
PICTURE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
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
            raise ValueError(f"formatting must be one of {', '.join(FORMATTINGS)}; got {self.formatting!r}")
        known = KNOWN_COLUMNS[self.formatting]
        for name in self.columns:
            if name not in known:
                raise ValueError(f"columns of {self.formatting} may be {', '.join(known)}; got {name!r}")
        for name in self.tags:
            if name not in DEFAULT_TAGS:
                raise ValueError(f"tags may be {', '.join(DEFAULT_TAGS)}; got {name!r}")

    def column(self, row: Mapping[str, Any], name: str) -> Any:
        """The row's value for a column's role, None where the row has none."""
        given = self.columns.get(name) or DEFAULT_COLUMNS[self.formatting].get(name)
        if given is None and name == "images":
            given = "images" if "images" in row else "image"
        if self.formatting == "sharegpt" and name == "messages" and "messages" not in self.columns:
            given = "messages" if "messages" in row and given not in row else given
        return row.get(given) if given else row.get(name)


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
    with path.open(encoding="utf-8") as file:
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
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error


def to_record(row: Any, layout: Layout, media_dir: Path) -> dict[str, Any]:
    """``{"id", "messages": [{"role", "content"}], "images": [{"path", "bytes"}]}`` of a row, checked.

    Image paths become absolute, from ``media_dir``; the files are not opened here (:func:`open_image` does).
    ``RecordError`` says what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"record is a {type(row).__name__}, needed an object")
    messages = _sharegpt_messages(row, layout) if layout.formatting == "sharegpt" else _alpaca_messages(row, layout)
    system = layout.column(row, "system")
    if system:
        messages.insert(0, {"role": "system", "content": str(system)})
    images = [_image_reference(image, media_dir) for image in _as_list(layout.column(row, "images"))]
    check_messages(messages, len(images))
    return {"id": str(row.get("id", "")), "messages": messages, "images": images}


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


def _sharegpt_messages(row: Mapping[str, Any], layout: Layout) -> list[dict[str, str]]:
    turns = layout.column(row, "messages")
    if not isinstance(turns, list) or not turns:
        wanted = layout.columns.get("messages", "conversations")
        raise RecordError(f"column {wanted!r} is {_describe(turns)}, needed a list of turns; columns: {sorted(row)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RecordError(f"turn {number} is {_describe(turn)}, needed an object")
        tags = {**DEFAULT_TAGS, **(OPENAI_TAGS if not layout.tags and "role" in turn else {}), **layout.tags}
        roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
        role, content = turn.get(tags["role_tag"]), turn.get(tags["content_tag"])
        if role not in roles:
            raise RecordError(f"turn {number}: {tags['role_tag']!r} is {role!r}, needed one of {', '.join(roles)}")
        messages.append({"role": roles[role], "content": _plain_text(content, number, tags["content_tag"])})
    return messages


def _plain_text(content: Any, number: int, tag: str) -> str:
    """Words of a turn; OpenAI's list of parts is joined, an image part being ``<image>``."""
    if isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "image"):
                raise RecordError(f"turn {number}: a part is {_describe(part)}, needed type 'text' or 'image'")
            parts.append(part.get("text", "") if kind == "text" else IMAGE)
        content = "".join(parts)
    if not isinstance(content, str):
        raise RecordError(f"turn {number}: {tag!r} is {_describe(content)}, needed text")
    return content


def _alpaca_messages(row: Mapping[str, Any], layout: Layout) -> list[dict[str, str]]:
    prompt, query, response = (layout.column(row, name) for name in ("prompt", "query", "response"))
    for name, value in (("prompt", prompt), ("response", response)):
        if not isinstance(value, str):
            raise RecordError(f"{name} is {_describe(value)}, needed text; columns: {sorted(row)}")
    messages = []
    for pair in layout.column(row, "history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RecordError(f"history holds {_describe(pair)}, needed pairs of question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{prompt}\n{query}" if query else prompt
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": response}]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _image_reference(image: Any, media_dir: Path) -> dict[str, Any]:
    if isinstance(image, str):
        return {"path": str(media_dir / image), "bytes": None}
    if isinstance(image, (bytes, bytearray)):
        return {"path": None, "bytes": bytes(image)}
    if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
        path = image.get("path")
        return {"path": str(media_dir / path) if path else None, "bytes": image.get("bytes")}
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"path": None, "bytes": buffer.getvalue()}
    raise RecordError(f"image is {_describe(image)}, needed a path, bytes, or an object with one of them")


def open_image(reference: Mapping[str, Any]) -> Image.Image:
    """The RGB picture of a record's image; ``RecordError`` if the file is missing or is no whole picture."""
    name = reference["path"] or "image in the record"
    try:
        source = io.BytesIO(reference["bytes"]) if reference["bytes"] else reference["path"]
        with Image.open(source) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise RecordError(f"image file {name} does not exist") from error
    except PICTURE_ERRORS as error:
        raise RecordError(f"{name} cannot be read as a picture: {picture_problem(error)}") from error


def picture_problem(error: Exception) -> str:
    """Why Pillow cannot read a picture, in the same words in every run: its own may hold an object's address."""
    return "its format is unknown" if isinstance(error, UnidentifiedImageError) else str(error)


def _describe(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
