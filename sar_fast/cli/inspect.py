"""``sar-fast inspect``: what SAR would do to a model, and what it measures on one input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sar_fast.base import json_text
from sar_fast.base.extras import need
from sar_fast.base.wording import cut
from sar_fast.cli import options
from sar_fast.cli.errors import UserError

LABELS = {
    "model_type": "model type",
    "family": "family",
    "attention_layers": "attention layers",
    "sar_layers": "re-weighted layers",
    "num_heads": "query heads",
    "num_kv_heads": "key-value heads",
    "head_dim": "head dimension",
    "vision_blocks": "vision blocks",
    "prior_source": "prior source",
    "prior_block": "prior from vision block",
    "backend": "backend",
    "image_token_ids": "placeholder ids",
}


def inspect(
    model: options.Model = options.MINIATURE,
    base_model: options.BaseModel = None,
    image: Annotated[str | None, typer.Option("--image", help="Picture file; needs --question.")] = None,
    question: Annotated[str | None, typer.Option("--question", help="Question; needs --image.")] = None,
    k: options.K = None,
    beta: options.Beta = None,
    normalize: options.Normalize = None,
    weighting: options.WeightingRule = None,
    backend: options.Backend = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="Also draw the factors c, heads by layers, as this PNG.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Show which layers, heads, backend and prior a model would get; with an input, what SAR measures on it.

    AV is the variance of the scores over the visual tokens, SA the attention on them weighted by the prior,
    SAV = AV x SA, and c the factor that a head's output is multiplied with (means over the text queries).

    **Examples**

    * `sar-fast inspect --model llava-hf/llava-1.5-7b-hf`

    * `sar-fast inspect --image photo.jpg --question "What colour is the circle?" --heatmap weights.png`
    """
    if (image is None) != (question is None):
        missing, given = ("--question", "--image") if question is None else ("--image", "--question")
        raise UserError(f"{missing} is missing; {given} needs it")
    if heatmap is not None and image is None:
        raise UserError("--heatmap draws what is measured on an input; it needs --image and --question")
    if heatmap is not None:
        need("--heatmap", "matplotlib")
        if heatmap.suffix != ".png" or heatmap.is_dir() or not heatmap.parent.is_dir():
            raise UserError(f"--heatmap must be a .png file in a folder that exists; got {str(heatmap)!r}")
    from sar_fast.cli import loading
    from sar_fast.lab.io.answering import build_inputs

    given = {"beta": beta, "normalize": normalize, "weighting": weighting, "backend": backend}
    options.check_sar(k, **given)
    picture = None if image is None else loading.open_image(image)
    loaded, processor = loading.load_model(model, device, dtype, base_model)
    config = options.sar_config(loaded, k, **given)

    from sar_fast.hf import apply_sar

    with apply_sar(loaded, config) as handle:
        found: dict[str, Any] = {"model": model, **handle.describe(), "config": config.to_dict()}
    if picture is not None:
        inputs = build_inputs(loaded, processor, [picture], [question])
        found |= _measure(loaded, inputs, config)
        from sar_fast.lab.io.pictures import picture_name

        found["input"] |= {"image": picture_name(image), "question": question}
    if heatmap is not None:
        _draw(found, heatmap)
    if as_json:
        typer.echo(json_text.dumps(found, indent=2))
    else:
        _print(found, heatmap)


def _measure(model: Any, inputs: Any, config: Any) -> dict[str, Any]:
    """What one prompt gets: ``input`` and per layer the statistics, lists over heads."""
    from sar_fast.lab.measure.recording import record

    try:
        seen = record(model, inputs, config)
    except ValueError as error:
        raise UserError.of(error) from error
    layers = [
        {
            "layer": layer,
            "backend": stats.backend,
            "alignment_variance": stats.alignment_variance[0].tolist(),
            "semantic_alignment": stats.semantic_alignment[0].tolist(),
            "sav": stats.sav[0].tolist(),
            "head_weights": stats.head_weights[0].tolist(),
        }
        for layer, stats in sorted(seen.stats.items())
    ]
    sizes = {
        "prompt_tokens": seen.visual_mask.shape[1],
        "visual_tokens": int(seen.visual_mask.sum()),
        "text_queries": int(seen.text_mask.sum()),
    }
    return {"input": sizes, "layers": layers}


def _draw(found: dict[str, Any], path: Path) -> None:
    import numpy as np

    from sar_fast.lab.show.heatmap import save_heatmap

    rows = found["layers"]
    if not rows:
        raise UserError("--heatmap has nothing to draw: --k is 0")
    try:
        save_heatmap(
            np.array([row["head_weights"] for row in rows]),
            [row["layer"] for row in rows],
            path,
            f"{found['model_type']}: {found['input']['question']}",
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--heatmap {str(path)!r} cannot be written: {error}") from error


def _print(found: dict[str, Any], heatmap: Path | None) -> None:
    console = Console()
    facts = Table(title=f"SAR on {found['model']}", title_justify="left", show_header=False, box=None)
    for key, label in LABELS.items():
        value = found[key]
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        facts.add_row(label, str(value))
    config = found["config"]
    rule = config.get("weighting")
    if rule is None:
        facts.add_row("beta, normalize", f"{config['beta']}, {config['normalize']}")
    else:
        facts.add_row("weighting", escape(cut(json.dumps(rule))))
    if "input" in found:
        sizes = found["input"]
        facts.add_row("prompt", f"{sizes['prompt_tokens']} tokens")
        facts.add_row("visual tokens", str(sizes["visual_tokens"]))
        facts.add_row("text queries", str(sizes["text_queries"]))
    console.print(facts)
    if "layers" not in found:
        console.print("\nGive --image and --question to measure an input.")
        return
    table = Table(title="\nStatistics of this input", title_justify="left", caption="AV, SA, SAV: mean over heads")
    for name in ("layer", "AV", "SA", "SAV", "c min", "c max", "largest c at head"):
        table.add_column(name, justify="right")
    mean = lambda values: sum(values) / len(values)
    for row in found["layers"]:
        c = row["head_weights"]
        table.add_row(
            str(row["layer"]),
            *(f"{mean(row[name]):.4g}" for name in ("alignment_variance", "semantic_alignment", "sav")),
            f"{min(c):.3f}",
            f"{max(c):.3f}",
            str(_strongest_head(row, by="sav" if rule is None else "head_weights")),
        )
    console.print(table)
    if heatmap is not None:
        console.print(f"Heatmap: {heatmap}")


def _strongest_head(row: dict[str, Any], by: str) -> int:
    """The head with the layer's largest c: by SAV for the paper's rule, whose protected head 0 copies it."""
    return max(range(len(row[by])), key=row[by].__getitem__)
