"""What plain transformers cannot do with these models, by version: tests show each failure.

Seen with 5.4.0, 5.5.4, 5.6.2, 5.8.1, 5.9.0, 5.10.4, 5.13.1, 5.15.1, 5.17.0 to 5.24.0.
"""

from __future__ import annotations

import dataclasses

from tests.hf.tiny.base import VERSION


@dataclasses.dataclass(frozen=True)
class Lack:
    """A failure of transformers without SAR, from one version on, before another.

    Attributes:
        errors: what it raises; () = it answers, wrongly.
    """

    models: tuple[str, ...]
    errors: tuple[type[Exception], ...] = ()
    since: tuple[int, int] = (5, 4)
    before: tuple[int, int] = (6, 0)


ANY_PASS = (Lack(("llama4",), (AttributeError,), since=(5, 24), before=(5, 25)),)
HYBRID = ("qwen3_5", "qwen3_5_moe", "lfm2_vl")
STATIC_CACHE = (
    Lack(HYBRID, (KeyError, AttributeError), since=(5, 5), before=(5, 13)),
    Lack(("gemma4",), (IndexError,), before=(5, 10)),
    Lack(("gemma4",), since=(5, 10), before=(5, 23)),
    Lack(("gemma4-shared-kv",), before=(5, 23)),
    Lack(("gemma3",), (IndexError,), since=(5, 13), before=(5, 17)),
    Lack(("llama4",), (TypeError, AttributeError), since=(5, 9), before=(5, 20)),
    Lack(("paligemma2",), (AttributeError,), since=(5, 9)),
)
SECOND_TURN = (
    Lack(("gemma3", "gemma4", "gemma4-shared-kv", "paligemma", "paligemma2")),  # blocks of pictures begin anew
    Lack(("qwen3_5", "qwen3_5_moe"), before=(5, 8)),  # what the layers keep of the first is not read
    Lack(("lfm2_vl",), before=(5, 15)),
)


def lack_of(lacks: tuple[Lack, ...], model: str) -> Lack | None:
    """What this version lacks, if anything."""
    return next((lack for lack in lacks if model in lack.models and lack.since <= VERSION < lack.before), None)
