"""``sar-fast bench``: what SAR costs, measured here."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from sar_fast.base import json_text
from sar_fast.base.extras import TRAINING, need
from sar_fast.cli import options
from sar_fast.cli.errors import Commands, UserError

bench = typer.Typer(cls=Commands, help="Measure on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure on this machine."""


@bench.command()
def train(
    model: options.Model = options.MINIATURE,
    base_model: options.BaseModel = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of the sample, image tokens included.")] = 200,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of each mode.")] = 10,
    k: options.K = None,
    beta: options.Beta = None,
    backend: options.Backend = None,
    sav_grad: Annotated[bool, typer.Option("--sav_grad", help="Gradients through SAR's weights too.")] = False,
    peak_flops: Annotated[
        float | None, typer.Option("--peak_flops", help="Of the device, per second. Default: known GPUs' data sheets.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time training steps with SAR off, on, and in the research code's eager formulation.

    Forward, backward and AdamW on one sample, every parameter trained; modes take turns, medians are shown. Compare
    within one call only.

    **Examples**

    * `sar-fast bench train`

    * `sar-fast bench train --model llava-hf/llava-1.5-7b-hf --length 2048 --dtype bfloat16`
    """
    need("sar-fast bench train", *TRAINING)
    from sar_fast.cli import loading
    from sar_fast.lab.training.benchmark import remark, sample_inputs, training_steps
    from sar_fast.lab.training.throughput import known_peak

    options.check_sar(k, beta=beta, backend=backend)
    if peak_flops is not None and not 0 < peak_flops < math.inf:
        raise UserError(f"--peak_flops must be a number above 0; got {peak_flops}")
    loaded, processor = loading.load_model(model, device, dtype, base_model)
    config = options.sar_config(loaded, k, beta=beta, backend=backend).replace(sav_grad=sav_grad)
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"--length must be at most {limit}, the model's positions; got {length}")
    try:
        inputs = sample_inputs(loaded, processor, length)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    for parameter in loaded.parameters():  # an adapter freezes its base
        parameter.requires_grad_(parameter.is_floating_point())
    peak = peak_flops or known_peak(loaded.device)
    records = training_steps(loaded.train(), inputs, config, steps, peak)
    note = remark(inputs["input_ids"].shape[1], limit)
    if as_json:
        shape = {
            "length": int(inputs["input_ids"].shape[1]),
            "note": note,
            "config": config.to_dict(),
            "device": str(loaded.device),
        }
        typer.echo(json_text.dumps({**shape, "modes": records}, indent=2))
        return
    plain = records[0]["step_seconds"]
    for r in records:
        more = "" if r["mfu"] is None else f", MFU {r['mfu']:.1%}"
        more += "" if r["memory_bytes"] is None else f", {r['memory_bytes'] / 2**30:.2f} GiB"
        typer.echo(
            f"{r['mode']:8} {1e3 * r['step_seconds']:9.1f} ms a step, x {r['step_seconds'] / plain:.2f}, "
            f"{r['tokens_per_second']:.0f} tokens/s{more}"
        )
    if note is not None:
        typer.echo(f"note: {note}")
