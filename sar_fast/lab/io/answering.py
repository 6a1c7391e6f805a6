"""Answers of a model to a batch of questions about pictures: generated, or chosen by their first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.chat_template import build_prompt, read_template, tokenizer_of
from sar_fast.lab.io.processors import call_processor

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}

GRID = "image_grid_thw"  # what processors call a picture's patches, if they report them


def encode(processor: Any, pictures: Sequence[Any], prompts: Sequence[str]) -> Any:
    """Model inputs on the CPU, left-padded: question i about picture i, in the model's chat template."""
    return encode_texts(processor, pictures, [build_prompt(processor, prompt) for prompt in prompts])


def encode_texts(processor: Any, pictures: Sequence[Any], texts: Sequence[str], **options: Any) -> Any:
    """Model inputs on the CPU of conversations in the model's template; ``pictures`` in the order of their places.

    ``options`` are further ones of the processor. :class:`~.processors.ProcessorRefusal` if it makes none.
    """
    options |= {"padding": True, "return_tensors": "pt", "add_special_tokens": not marks_beginning(processor, texts)}
    return call_processor(processor, texts, pictures, **options)


def marks_beginning(processor: Any, texts: Sequence[str]) -> bool:
    """Whether the texts begin with the tokenizer's own first token: templates of some families write it themselves."""
    bos = tokenizer_of(processor).bos_token
    return bool(bos) and texts[0].startswith(bos)


def prepare_processor(processor: Any, template: str | None = None) -> None:
    """Pad on the left, with a chat template: the model's own, or the Jinja file ``template``.

    ``ArgumentError``: no template, or one that does not fit the processor; ``ValueError`` for a file that is none.
    """
    if template is not None:
        processor.chat_template = read_template(template)
    if not getattr(processor, "chat_template", None):
        raise ArgumentError("template", "none", "be given for a model that has no chat template")
    try:
        prompt = build_prompt(processor, "What is this?")
    except ArgumentError as error:
        raise ArgumentError(error.argument, error.came, f"{error.needed}, or with {{template}}") from error
    pad_left(processor)
    if template is not None:
        try:
            encode_texts(processor, [Image.new("RGB", (64, 64))], [prompt])
        except ValueError as error:  # of processors that count placeholders; others are found out by their tokens
            raise ArgumentError("template", f"{template}: {error}", "be one that fits the model's processor") from error


def pad_left(processor: Any) -> None:
    """Let a processor's tokenizer pad on the left, so that new tokens continue every row of a batch."""
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def frames(inputs: Any, processor: Any, count: int) -> list[list[int] | None]:
    """(width, height) in pixels of every picture as the model saw it, where a family's boxes are written in those."""
    grid = inputs.get(GRID)
    if grid is None:
        return [None] * count
    patch = processor.image_processor.patch_size
    return [[int(w) * patch, int(h) * patch] for _, h, w in grid.tolist()]


@torch.inference_mode()
def generate(model: nn.Module, processor: Any, inputs: Any, max_new_tokens: int, **options: Any) -> list[str]:
    """Answers in words, without special tokens; greedy unless ``options`` of ``model.generate`` say otherwise."""
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer_of(processor).pad_token_id,
        **(GREEDY | options),
    )
    new = output[:, inputs["input_ids"].shape[1] :]  # [B, new tokens]
    return [reply.strip() for reply in tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)]


@torch.inference_mode()
def option_log_probabilities(
    model: nn.Module, processor: Any, inputs: Any, options: Sequence[Sequence[Sequence[str]]]
) -> list[list[float]]:
    """Natural log-probability that each option's answer starts with, per sample; one forward pass, nothing decoded.

    ``options[i][j]`` are the wordings of sample i's option j; their first tokens' probabilities add up.
    """
    logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()  # [B, vocabulary]
    log_p: Tensor = logits.log_softmax(-1).cpu()
    tokenizer = tokenizer_of(processor)
    return [
        [torch.logsumexp(row[list(ids)], 0).item() for ids in first_tokens(tokenizer, sample)]
        for row, sample in zip(log_p, options)
    ]


def first_tokens(tokenizer: Any, options: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """Per option, the tokens that its wordings may start with, at the start of a line and after a space.

    A token that two options share says nothing and is left out; ``ValueError`` if an option has no other.
    """
    found = [
        {
            ids[0]
            for wording in wordings
            for text in (wording, " " + wording)
            if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])
        }
        - {tokenizer.unk_token_id}
        for wordings in options
    ]
    own = []
    for number, mine in enumerate(found):
        others = set().union(*(ids for n, ids in enumerate(found) if n != number))
        if not mine - others:
            names = ", ".join(repr(wordings[0]) for wordings in options)
            raise ArgumentError(
                "scoring",
                f"first_token for {names}, which does not tell {options[number][0]!r} from the others",
                "be generate for options that begin alike",
            )
        own.append(tuple(sorted(mine - others)))
    return own


def build_inputs(model: nn.Module, processor: Any, pictures: Sequence[Any], questions: Sequence[str]) -> Any:
    """Model inputs of a batch, question i about picture i, on the model's device and in its dtype.

    :class:`~sar_fast.lab.io.processors.ProcessorRefusal` if the processor makes none.
    """
    texts = [build_prompt(processor, q) for q in questions]
    inputs = call_processor(processor, texts, pictures, padding=True, return_tensors="pt")
    return inputs.to(model.device, model.dtype)


@torch.no_grad()
def answer(
    model: nn.Module, processor: Any, pictures: Sequence[Any], questions: Sequence[str], max_new_tokens: int = 32
) -> list[str]:
    """Greedy answers to question i about picture i, as one batch."""
    inputs = build_inputs(model, processor, pictures, questions)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [reply.strip() for reply in tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)]
