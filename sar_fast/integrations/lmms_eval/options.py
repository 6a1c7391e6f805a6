"""A task's ``generation_kwargs``, as ``model.generate`` takes them."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sar_fast.base.errors import arguments_named

SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
SAR_OPTIONS = ("activation_layer_k", "beta", "normalize", "weighting", "decode", "prior_source", "backend")
ARGUMENTS = {"model": "pretrained", "template": "template"} | {name: f"sar_{name}" for name in SAR_OPTIONS}
WORDS = (  # what the library and other commands call an argument -> what it is called here
    (re.compile(r"--(?:model_name_or_path|model)(?![\w-])"), "pretrained"),
    (re.compile(r"--(template|device|dtype|base_model)(?![\w-])"), r"\1"),
    (re.compile(rf"^({'|'.join(SAR_OPTIONS)})\b|(?<![\w-])({'|'.join(SAR_OPTIONS)})(?==)"), r"sar_\1\2"),
)
ELSEWHERE = ("until", "max_new_tokens", "image_aspect_ratio")  # used by the caller; the last one is other models'


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as ``model.generate`` takes them; ``ValueError`` for one that is not known.

    Temperature 0 means greedy, whatever ``do_sample`` says.
    """
    unknown = sorted(set(options) - {*SAMPLING, *ELSEWHERE})
    if unknown:
        raise ValueError(f"generation_kwargs {', '.join(unknown)}: known are {', '.join((*SAMPLING, *ELSEWHERE))}")
    chosen = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    sample = bool(chosen.pop("do_sample", False)) or chosen.get("temperature", 0) > 0
    if not sample or chosen.get("temperature") == 0:
        return {name: value for name, value in chosen.items() if name in ("num_beams", "repetition_penalty")}
    return chosen | {"do_sample": True}


def cut(reply: str, until: Sequence[str] | str | None) -> str:
    """The reply up to the first of the stop words."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            reply = reply.split(stop)[0]
    return reply.strip()


def in_own_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the arguments that its errors name called as in ``--model_args``."""

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        try:
            with arguments_named(ARGUMENTS):
                return function(*args, **given)
        except (ValueError, TypeError) as error:
            message = str(error)
            for pattern, word in WORDS:
                message = pattern.sub(word, message)
            raise (TypeError if isinstance(error, TypeError) else ValueError)(message) from error

    return call


def refuse_unknown(unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """``ValueError`` for the first of ``--model_args`` that the model does not have; it names the nearest."""
    names = [name for name in known if name != "unknown"]
    for name in unknown:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--model_args: {name} is unknown; {hint}known: {', '.join(names)}")
