"""Options that several commands share, and how they become a SARConfig."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sar_fast.cli.errors import UserError
from sar_fast.config import SARConfig
from sar_fast.lab.io.model_source import MINIATURE as MINIATURE
from sar_fast.lab.io.output_dir import check_output_dir

if TYPE_CHECKING:
    from torch import nn

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Folder or Hugging Face id of an image-text-to-text model, or of an adapter (LoRA); 'miniature' is the "
        "small one that is shipped.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base_model", help="The model that an adapter is for. Default: the one that the adapter names."),
]
Image = Annotated[str, typer.Option("--image", help="Picture file.", show_default=False)]
Question = Annotated[str, typer.Option("--question", help="Question about the picture.", show_default=False)]
K = Annotated[
    int | None,
    typer.Option(
        "--k", help="Number of final attention layers that are re-weighted. Default: 10, but at most half of them."
    ),
]
Beta = Annotated[float | None, typer.Option("--beta", help="Temperature of the softmax over heads, > 0. Default: 0.5.")]
Normalize = Annotated[
    str | None,
    typer.Option(
        "--normalize",
        help="'none', or 'standardize': SAV standardised over heads, so that beta means the same at any number of "
        "visual tokens. Default: none.",
    ),
]
WeightingRule = Annotated[
    str | None,
    typer.Option(
        "--weighting",
        help="Another rule for the heads' weights, in place of --beta and --normalize: a NAME, FILE.py:NAME, "
        '{"name": ..., "options": {...}}, or a folder that train.py saved.',
    ),
]
Decode = Annotated[
    str | None,
    typer.Option(
        "--decode",
        help="Weights while generating: 'running' means, the 'step' alone, or the 'prompt's. Default: running.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", help="'auto', 'triton', 'composed' or 'torch'; see `sar-fast doctor`. Default: auto."),
]
Device = Annotated[str, typer.Option("--device", help="'auto' (the GPU if there is one), 'cpu', 'cuda', 'cuda:1' ...")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="'auto' (bfloat16 on a GPU, else float32), 'float32', 'bfloat16', 'float16'.")
]


def make_folder(output_dir: Path) -> None:
    """The folder of ``--output_dir``; :class:`UserError` if nothing can be written into it."""
    try:
        check_output_dir(output_dir)
    except ValueError as error:
        raise UserError.of(error) from error
    output_dir.mkdir(parents=True, exist_ok=True)


def check_sar(k: int | None, **given: Any) -> None:
    """What can be wrong with the options of SAR whatever the model is, before one is loaded."""
    from sar_fast.lab.run.sar_flags import check_rule

    try:
        SARConfig(**_fields({"activation_layer_k": k, **given}, check_rule)).to_dict()  # as results keep it
    except (ValueError, TypeError) as error:
        raise UserError.of(error) from error


def sar_config(model: nn.Module, k: int | None, **given: Any) -> SARConfig:
    """The configuration that the options ask for, tried on the model; an option left at None takes its default."""
    from sar_fast.hf import apply_sar
    from sar_fast.lab.measure.recording import attention_layers
    from sar_fast.lab.run.sar_flags import find_rule

    try:
        if k is None:
            k = min(SARConfig().activation_layer_k, max(1, attention_layers(model) // 2))
        config = SARConfig(activation_layer_k=k, **_fields(given, lambda spec: find_rule(spec, model.config)))
        with apply_sar(model, config) as handle:
            handle.describe()  # chooses the backend, or says why it cannot run here
    except (ValueError, TypeError) as error:
        raise UserError.of(error) from error
    return config


def _fields(given: dict[str, Any], find: Callable[[str], Any]) -> dict[str, Any]:
    """The options that are given, as fields of ``SARConfig``; ``find`` the rule that a text names."""
    fields = {name: value for name, value in given.items() if value is not None}
    if "weighting" in fields:
        from sar_fast.lab.run.sar_flags import refuse_papers

        refuse_papers("--weighting", [f"--{name}" for name in ("beta", "normalize") if name in fields])
        fields["weighting"] = find(fields["weighting"])
    return fields
