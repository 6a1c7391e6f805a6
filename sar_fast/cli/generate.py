"""``sar-fast generate``: one answer, streamed."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from sar_fast.cli import options
from sar_fast.cli.errors import UserError


def generate(
    image: options.Image,
    question: options.Question,
    model: options.Model = options.MINIATURE,
    base_model: options.BaseModel = None,
    use_sar: Annotated[bool, typer.Option("--use_sar", help="Re-weight the heads.")] = False,
    k: options.K = None,
    beta: options.Beta = None,
    normalize: options.Normalize = None,
    weighting: options.WeightingRule = None,
    decode: options.Decode = None,
    backend: options.Backend = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1, help="Longest answer, in tokens.")] = 128,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Answer a question about a picture, word by word on stdout.

    Decoding is greedy. --k, --beta, --normalize, --weighting, --decode and --backend need --use_sar.

    **Examples**

    * `sar-fast generate --image photo.jpg --question "What colour is the circle?"`

    * `sar-fast generate --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is this?" --use_sar`
    """
    chosen = {
        "k": k,
        "beta": beta,
        "normalize": normalize,
        "weighting": weighting,
        "decode": decode,
        "backend": backend,
    }
    if not use_sar and any(value is not None for value in chosen.values()):
        name = next(name for name, value in chosen.items() if value is not None)
        raise UserError(f"--{name} must be left out without --use_sar; got {chosen[name]}")
    options.check_sar(**chosen)
    from sar_fast.cli import loading
    from sar_fast.lab.io.answering import build_inputs
    from sar_fast.lab.io.chat_template import tokenizer_of

    picture = loading.open_image(image)
    loaded, processor = loading.load_model(model, device, dtype, base_model)
    inputs = build_inputs(loaded, processor, [picture], [question])

    from transformers import TextStreamer

    from sar_fast.hf import apply_sar

    sar = apply_sar(loaded, options.sar_config(loaded, **chosen)) if use_sar else contextlib.nullcontext()
    streamer = TextStreamer(tokenizer_of(processor), skip_prompt=True, skip_special_tokens=True)
    with sar:
        loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
