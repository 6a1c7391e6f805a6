"""``sar-fast data``: look at training data before a run does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sar_fast.cli.errors import Commands, UserError

data = typer.Typer(cls=Commands, help="Training data.", no_args_is_help=True)


@data.callback()
def _group() -> None:
    """Training data."""


@data.command()
def check(
    file: Annotated[Path, typer.Argument(help="A .json, .jsonl or .parquet file of chat records.", show_default=False)],
    dataset_info: Annotated[
        Path | None,
        typer.Option("--dataset-info", help="Registry that describes the file. Default: the one beside it, if any."),
    ] = None,
    media_dir: Annotated[
        Path | None, typer.Option("--media-dir", help="Where image paths start. Default: the file's folder.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Encode every record for this model too: chat template, labels, length."),
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Longest sample, in tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every record of a file and name the bad ones.

    Turns, answers, placeholders against images, and every image file in full. Exit code 1 if a record is bad.

    **Examples**

    * `sar-fast data check experiments/data/shapes_train.parquet`

    * `sar-fast data check train.json --media-dir images --model llava-hf/llava-1.5-7b-hf --max-length 2048`
    """
    if max_length is not None and model is None:
        raise UserError("--max-length has no effect without --model; add it")
    encoder = _encoder(model, max_length) if model else None
    try:
        layout = _layout(file, dataset_info)
        found = summary(_verdicts(file, layout, media_dir or file.parent, encoder))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or error} does not exist") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for bad in found["bad"]:
            typer.echo(f"record {bad['record']}{bad['id'] and ' (id ' + bad['id'] + ')'}: {bad['reason']}")
        tokens = f", longest {found['longest']} tokens" if encoder else ""
        typer.echo(
            f"{file}: {found['records']} records, {found['images']} images, {found['answers']} answers{tokens}; "
            f"{len(found['bad'])} bad"
        )
    if found["bad"] or not found["records"]:
        raise typer.Exit(1)


def summary(verdicts: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Totals of the good records, and the bad ones with the reason."""
    total: dict[str, Any] = {"records": 0, "images": 0, "answers": 0, "longest": 0, "bad": []}
    for verdict in verdicts:
        total["records"] += 1
        if verdict["reason"]:
            total["bad"].append({k: verdict[k] for k in ("record", "id", "reason")})
            continue
        total["images"] += verdict["images"]
        total["answers"] += verdict["answers"]
        total["longest"] = max(total["longest"], verdict["length"])
    return total


def _verdicts(file: Path, layout: Any, media_dir: Path, encoder: Any) -> Iterator[dict[str, Any]]:
    from sar_fast.training.records import RecordError, open_image, read_rows, to_record

    for index, row in read_rows(file):
        verdict = {"record": index, "id": "", "reason": "", "images": 0, "answers": 0, "length": 0}
        if isinstance(row, dict):
            verdict["id"] = str(row.get("id", ""))
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


def _layout(file: Path, dataset_info: Path | None) -> Any:
    from sar_fast.training.records import Layout
    from sar_fast.training.registry import REGISTRY_NAME, load_registry

    folder = file.parent
    if dataset_info is not None:
        folder = dataset_info if dataset_info.is_dir() else dataset_info.parent
    if not (folder / REGISTRY_NAME).is_file() and dataset_info is None:
        return Layout()
    named = [e for e in load_registry(folder).values() if Path(e.get("file_name", "")).name == file.name]
    if not named:
        return Layout()
    return Layout(named[0].get("formatting", "alpaca"), named[0].get("columns", {}), named[0].get("tags", {}))


def _encoder(model: str, max_length: int | None) -> Any:
    from transformers import AutoProcessor

    from sar_fast.cli import loading
    from sar_fast.miniature.checkpoint import MINIATURE_PATH
    from sar_fast.training.encoding import Encoder

    source = str(MINIATURE_PATH) if model == loading.MINIATURE else model
    try:
        return Encoder(AutoProcessor.from_pretrained(source), max_length)
    except (ValueError, OSError) as error:
        raise UserError(f"--model {model!r}: {' '.join(str(error).split())}") from error
