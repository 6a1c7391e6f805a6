"""``sar-fast data``: look at training data before a run does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sar_fast.cli import options
from sar_fast.cli.errors import Commands, UserError

data = typer.Typer(cls=Commands, help="Training data.", no_args_is_help=True)


@data.callback()
def _group() -> None:
    """Training data."""


@data.command()
def check(
    file: Annotated[
        Path,
        typer.Argument(help="A .json, .jsonl or .parquet file: chat records or grounding samples.", show_default=False),
    ],
    dataset_info: Annotated[
        Path | None,
        typer.Option("--dataset_info", help="Registry that describes the file. Default: the one beside it, if any."),
    ] = None,
    media_dir: Annotated[
        Path | None, typer.Option("--media_dir", help="Where image paths start. Default: the file's folder.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Encode every record for this model too: chat template, labels, length."),
    ] = None,
    base_model: options.BaseModel = None,
    max_length: Annotated[int | None, typer.Option("--max_length", help="Longest sample, in tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every record of a file and name the bad ones.

    Of chat records: turns, answers, placeholders against images, and every image file in full. Of a grounding table
    (columns image, query, object_prompt, bbox, as `refcoco_val_sar`): columns, boxes inside their picture, masks, and
    every image. Exit code 1 if a record is bad.

    **Examples**

    * `sar-fast data check experiments/data/shapes_train.parquet`

    * `sar-fast data check train.json --media_dir images --model llava-hf/llava-1.5-7b-hf --max_length 2048`
    """
    if max_length is not None and model is None:
        raise UserError(f"--max_length must be left out without --model; got {max_length}")
    if max_length is not None and max_length < 1:
        raise UserError(f"--max_length must be at least 1; got {max_length}")
    if base_model is not None and model is None:
        raise UserError(f"--base_model must be left out without --model; got {base_model}")
    if media_dir is not None and not media_dir.is_dir():
        raise UserError(f"--media_dir must be a folder; got {str(media_dir)!r}")
    encoder = _encoder(model, base_model, max_length) if model else None
    try:
        found = summary(_check(file, _entry(file, dataset_info), media_dir or file.parent, encoder))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist" if error.filename else str(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for bad in found["bad"]:
            typer.echo(f"record {bad['record']}{bad['id'] and ' (id ' + bad['id'] + ')'}: {bad['reason']}")
        tokens = f", longest {found['longest']} tokens" if encoder else ""
        counts = ", ".join(f"{found[name]} {name}" for name in found if name not in ("bad", "longest"))
        typer.echo(f"{file}: {counts}{tokens}; {len(found['bad'])} bad")
    if found["bad"] or not found["records"]:
        raise typer.Exit(1)


def summary(verdicts: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Totals of the good records, and the bad ones with the reason."""
    total: dict[str, Any] = {"records": 0}
    longest, bad = 0, []
    for verdict in verdicts:
        total["records"] += 1
        named = {name: verdict.pop(name) for name in ("record", "id", "reason")}
        good, length = not named["reason"], verdict.pop("length", 0)
        if good:
            longest = max(longest, length)
        else:
            bad.append(named)
        for name, count in verdict.items():
            total[name] = total.get(name, 0) + count * good
    return {**total, "longest": longest, "bad": bad}


def _check(file: Path, entry: dict[str, Any], media_dir: Path, encoder: Any) -> Iterator[dict[str, Any]]:
    """Verdicts on chat records, or on grounding samples: the first row says which."""
    from sar_fast.lab.focus.check import grounding_verdicts, is_grounding
    from sar_fast.lab.io.records import Layout, read_rows

    rows = read_rows(file)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{file} has no rows")
    rows = itertools.chain([first], rows)
    if is_grounding(first[1], entry.get("columns", {})):
        if encoder is not None:
            raise UserError(f"--model must be left out for a grounding table, which {file} is")
        return grounding_verdicts(rows, entry.get("columns", {}), media_dir)
    described = Layout(entry.get("formatting", "alpaca"), entry.get("columns", {}), entry.get("tags", {}))
    return _verdicts(rows, described if entry else Layout(), media_dir, encoder)


def _verdicts(rows: Iterable[tuple[int, Any]], layout: Any, media_dir: Path, encoder: Any) -> Iterator[dict[str, Any]]:
    from sar_fast.lab.io.records import RecordError, id_in_messages, open_image, to_record

    for index, row in rows:
        name = id_in_messages(row)
        verdict = {"record": index, "id": name, "reason": "", "images": 0, "answers": 0, "length": 0}
        try:
            record = to_record(row, layout, media_dir)
            if encoder is None:
                for reference in record["images"]:
                    open_image(reference)
            else:
                verdict["length"] = len(encoder(record)["input_ids"])
        except RecordError as error:
            verdict["reason"] = str(error)
        else:
            verdict["images"] = len(record["images"])
            verdict["answers"] = sum(m["role"] == "assistant" for m in record["messages"])
        yield verdict


def _entry(file: Path, dataset_info: Path | None) -> dict[str, Any]:
    """What the registry says about a file; nothing if it is not in one."""
    from sar_fast.lab.io.datasets import REGISTRY_NAME, load_registry

    folder = file.parent
    if dataset_info is not None:
        folder = dataset_info if dataset_info.is_dir() else dataset_info.parent
        if not (folder / REGISTRY_NAME).is_file() or dataset_info not in (folder, folder / REGISTRY_NAME):
            raise UserError(f"--dataset_info {str(dataset_info)!r} is no {REGISTRY_NAME} nor a folder with one")
    elif not (folder / REGISTRY_NAME).is_file():
        return {}
    named = (e for e in load_registry(folder).values() if Path(e.get("file_name", "")).name == file.name)
    return next(named, {})


def _encoder(model: str, base_model: str | None, max_length: int | None) -> Any:
    from sar_fast.cli import loading
    from sar_fast.lab.io import models
    from sar_fast.lab.training.encoding import Encoder

    with loading.options_named():
        processor = models.load_processor(models.find_model(model, base_model))
    try:
        return Encoder(processor, max_length)
    except (ValueError, OSError) as error:
        raise UserError(f"--model {model!r}: {' '.join(str(error).split())}") from error
