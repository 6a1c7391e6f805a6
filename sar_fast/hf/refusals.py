"""Passes in which SAR cannot know where the pictures are: an error before plain attention passes for SAR's."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.cache_state import CacheState
from sar_fast.hf.structure import foreign_forward
from sar_fast.method.value_checks import check_holds

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # modality -> the argument that brings it
CURE = (
    "split in front of the text model instead: apply_sar(model, config, shards=Shards(queries=group)) and "
    "sar_fast.hf.sequence_parallel.split_sequence(model, group)"
)
OWN_FORWARD = (
    "Needed: attention modules that call transformers' attention interface and pass their keyword arguments on; leave "
    "the other library's packing or fused attention off"
)
PLAIN = "plain attention is remove_sar(model) or activation_layer_k=0"


def refuse_other_attention(came: str | None, needed: str) -> None:
    """``RuntimeError`` if the text model's layers call another attention function than SAR's."""
    if came != needed:
        raise RuntimeError(
            f"SAR: the text model's attention is {came!r}, not {needed!r}; nothing would be re-weighted. "
            "set_attn_implementation was called while SAR is applied: handle.remove() (or remove_sar(model)) keeps "
            "that choice, and apply_sar(model, config) after it puts SAR on again"
        )


def refuse_output_attentions(asked: Any, config: Any) -> None:
    """``ValueError`` if attention matrices are asked for, in the call or by the model's configuration."""
    if getattr(config, "output_attentions", False) if asked is None else asked:
        raise ArgumentError(
            "output_attentions",
            True,
            (
                "be False with SAR: no attention matrix exists. SARConfig(record=True) keeps each layer's "
                "statistics, record_rows='last_text' the rows over visual tokens"
            ),
        )


def refuse_unseen_cache(
    cache: Any, past: CacheState | None, past_length: int | Tensor, new: int, peft_configs: Mapping[str, Any]
) -> None:
    """``ValueError`` if the cache holds positions that no pass under SAR filled: V and the prior are unknown there.

    Args:
        past: the cache's state; None = no pass under SAR filled it.
        past_length: cached positions; a static cache's counter is read once, until the cache has a state.
        new: positions of this pass.
        peft_configs: those of the PEFT wrapper by adapter; the prefix that one learned is a cache without pictures.
    """
    if past is not None and (not past.unseen if cache.is_compileable else past_length <= past.length):
        return
    tracing = isinstance(past_length, Tensor) and torch.compiler.is_compiling()
    if new > 1 if tracing else not past_length:  # a counter cannot be read in a graph; decode steps have a past
        return
    learned = {c.num_virtual_tokens for c in peft_configs.values() if getattr(c, "is_prompt_learning", False)}
    if past is None and not tracing and past_length in learned:
        return
    filled = 0 if past is None else "not all" if cache.is_compileable else past.length
    raise ArgumentError(
        "past_key_values",
        (
            f"{'some' if tracing else int(past_length)} positions, of which passes under SAR filled {filled}, so SAR "
            "does not know its pictures and their prior: it was filled without SAR, or rebuilt without the state "
            "that rides on the cache object"
        ),
        (
            "be new, or one that cache.reset() emptied, and come with the whole prompt and SAR applied; "
            f"{PLAIN}; if it is the prefix that an adapter learned, apply SAR to the PEFT model"
        ),
    )


def refuse_ignored_features(base_model: nn.Module, encoded: Mapping[str, Any], parameters: Sequence[str]) -> None:
    """``ValueError`` if encoded features came to a model that takes none; ``parameters`` are its forward's."""
    if encoded and "mm_encoder_outputs" not in parameters:
        raise ArgumentError(
            "mm_encoder_outputs",
            f"{type(base_model).__name__} of this transformers version, which would ignore it",
            "be left out: pass pixels",
        )


def refuse_merged_embeddings(given: Mapping[str, Any], new: int, peft_configs: Mapping[str, Any]) -> None:
    """``ValueError`` for embeddings without ids and pixels that may hold pictures already.

    Not where ``mm_token_type_ids`` say that all is text, nor under PEFT's prompt learning, which embeds ids itself.
    """
    types = given.get("mm_token_type_ids")
    if new == 1 or any(getattr(c, "is_prompt_learning", False) for c in peft_configs.values()):
        return
    if types is not None and not bool(types.any()):
        return
    raise ArgumentError(
        "inputs_embeds",
        (
            f"neither input_ids nor {' or '.join(PIXELS.values())}; embeddings that hold pictures already look like "
            "any others, so SAR does not know where pictures are"
        ),
        (
            "come with input_ids and pixel_values, or with pixel_values and placeholders that are still those of "
            f"the embedding table; for text alone, with mm_token_type_ids of zeros; {PLAIN}"
        ),
    )


def refuse_unfilled(name: str, modality: str, count: int) -> None:
    """``ValueError`` if the argument ``name`` holds placeholders that no features fill."""
    if count:
        raise ArgumentError(
            name,
            f"{count} placeholders of {modality}s without them (prefill_chunk_size drops them)",
            (
                f"come with {PIXELS[modality]} or mm_encoder_outputs[{modality!r}] to fill its placeholders, or "
                f"without placeholders; {PLAIN}"
            ),
        )


def refuse_unreached(marked: Sequence[int], reached: Set[int], attention_modules: Sequence[nn.Module]) -> None:
    """``RuntimeError`` if re-weighted layers of a pass that sees pictures never came to SAR's attention function."""
    missing = [layer for layer in marked if layer not in reached]
    if missing:
        name = foreign_forward(attention_modules[missing[0]])
        why = (
            "their forward was replaced (by a kernel library, a fine-tuning framework), they are hidden in a wrapper, "
            "or they were skipped"
            if name is None
            else f"their forward is {name}, which another library put in place of their own"
        )
        raise RuntimeError(
            f"SAR: attention layers {missing} of the re-weighted {list(marked)} did not attend through SAR in this "
            f"pass, so their heads were not re-weighted: {why}. {OWN_FORWARD}"
        )


def explain_foreign_forward(error: BaseException, attention_modules: Sequence[nn.Module]) -> None:
    """A note on an error out of an attention module whose forward was replaced: what reads SAR's masks is SAR's alone.

    In Python 3.10, which has no notes, a warning.
    """
    raisers = {id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)}
    inside = next((m for m in attention_modules if any(id(part) in raisers for part in m.modules())), None)
    name = None if inside is None else foreign_forward(inside)
    if name is None:
        return
    note = (
        f"SAR: this attention's forward is {name}, which another library put in place of its own; under SAR it gets "
        f"masks that only SAR's attention function reads. {OWN_FORWARD}"
    )
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        warnings.warn(note, RuntimeWarning, stacklevel=2)


def refuse_slices(module: nn.Module, layer: int, came: tuple[int, int], needed: tuple[int, int]) -> None:
    """``RuntimeError`` if a layer attends with other (rows, positions) than its pass has."""
    if came != needed:
        raise RuntimeError(
            f"SAR: {type(module).__name__} {layer} attends with {came[0]} x {came[1]} (rows x positions) of a pass "
            f"that has {needed[0]} x {needed[1]}: something between the model and its layers hands on a slice, as "
            f"sequence parallelism does, whose statistics would be wrong. {CURE}"
        )


def refuse_features_not_finite(modality: str, norms: Tensor, samples: Tensor | None) -> None:
    """``ValueError`` that names the samples whose vision features are NaN or infinite; of a GPU in a later call.

    Args:
        norms: (B, S) their norms, 0 where there are none. samples: (B, S) packed sequence of each; None = its row.
    """
    if torch.compiler.is_compiling():  # the operator itself looks at the prior
        return
    bad = ~norms.isfinite()
    what = f"{PIXELS[modality]}: vision features are not finite (NaN or infinite)"
    cure = "the prior is made of their norms. Needed: finite pixels and a vision encoder whose dtype holds its values"
    if norms.device.type != "cpu":  # to say which samples would be to wait
        check_holds(~bad.any(), f"{what}; {cure}")
        return
    if not bool(bad.any()):
        return
    numbers = (bad.nonzero()[:, 0] if samples is None else samples[bad]).unique().tolist()
    samples = ", ".join(map(str, numbers))
    raise ValueError(f"{what} in sample(s) {samples} of the batch, counted from 0; {cure}")
