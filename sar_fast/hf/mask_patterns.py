"""transformers' mask functions, read from their closures as the run of keys that each query sees.

A run holds the query itself or is empty just before it: so two runs always touch, and their union is a run again, as
their intersection is. What is not recognised has no run, and its mask is built dense.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from sar_fast.hf.packing import Packing
from sar_fast.method.value_checks import check_holds
from sar_fast.method.values import Bounds
from sar_fast.method.visibility import BROKEN_BLOCK, Visibility, block_runs


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """Where the queries of a mask are.

    Attributes:
        position: (B or 1, S) int64, as mask functions count: from the first position of the cache, or of the sequence.
        after: (B or 1, S) int64, one past each query among the keys that its run counts.
        num_keys: how many keys a run can hold; a tensor (B, S) in packed rows.
        most_keys: the most of them.
        num_positions: how many positions there are, or None in packed rows, where runs count from the first key of the
            query's own sequence.
        real: (B, positions) bool, False = padding; None = no padding.
    """

    position: Tensor
    after: Tensor
    num_keys: int | Tensor
    most_keys: int
    num_positions: int | None = None
    real: Tensor | None = None

    @classmethod
    def of_rows(cls, count: int, offset: int | Tensor, keys: range, real: Tensor | None, device: Any) -> Queries:
        """``count`` queries from position ``offset`` of every row, over the positions ``keys``."""
        position = (torch.arange(count, device=device) + offset)[None]
        return cls(position, position + 1 - keys.start, len(keys), len(keys), keys.stop, real)

    @classmethod
    def of_packing(cls, packing: Packing, shape: tuple[int, int], device: Any) -> Queries:
        """All positions of packed rows, (B, S)."""
        ends, sequence = packing.cu_seqlens.to(device, torch.int64), packing.samples(torch.Size(shape)).to(device)
        position = torch.arange(sequence.numel(), device=device).view(shape) - ends[sequence]
        return cls(position, position + 1, ends.diff()[sequence], packing.max_seqlen)

    @property
    def origin(self) -> Tensor:
        """(B or 1, S) int64: the position from which each run counts."""
        return self.position + 1 - self.after

    @property
    def packed(self) -> bool:
        return self.num_positions is None

    def see_all_before(self, run: Bounds) -> bool:
        """Whether a run says causal and no more."""
        return run.first is None and run.end is self.after

    def hide_padding(self, run: Bounds) -> Bounds:
        """A run without the padding at its ends, empty where the query is padding."""
        if self.real is None:
            return run
        real = self.real[:, -self.most_keys :]  # [B, keys]
        asks = real.gather(1, (self.after - 1).expand(real.shape[0], -1))  # [B, S]
        first, end = (x[:, None] for x in real_run(real))
        first = first if run.first is None else torch.maximum(run.first, first)
        end = end if run.end is None else torch.minimum(run.end, end)
        return Bounds(first.expand_as(asks), torch.where(asks, end, 0))


def real_run(real: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) int64 each: the first real position of a mask (B, L), and one past the last; (L, 0) where there is none."""
    index = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, index, real.shape[1]).amin(1), torch.where(real, index + 1, 0).amax(1)


def padding_between(real: Tensor) -> Tensor:
    """() bool: whether padding lies between real positions in any row of a mask (B, L)."""
    first, end = real_run(real)
    return (first + real.sum(1) < end).any()


def run_of(function: Any, queries: Queries) -> Bounds | None:
    """The (B or 1, S) int64 runs of a mask function, or None if it is none of those known here.

    A side that nothing limits is None. A block that is not in one piece has no run either; on a GPU, which is not
    waited for, it is an error of a later call.
    """
    read = _readers().get(getattr(function, "__code__", None)) or _model_readers(function)
    if read is None:
        return None
    captured = zip(function.__code__.co_freevars, function.__closure__ or ())
    return read(queries, **{name: cell.cell_contents for name, cell in captured})


def _causal(queries: Queries) -> Bounds:
    return Bounds(end=queries.after)


def _bidirectional(queries: Queries) -> Bounds:
    return Bounds()


def _sliding(queries: Queries, sliding_window: int) -> Bounds | None:
    if sliding_window < 1:
        return None
    return Bounds() if sliding_window >= queries.most_keys else Bounds(first=queries.after - sliding_window)


def _sliding_both_ways(queries: Queries, sliding_window: int) -> Bounds:
    return Bounds(queries.after - 1 - sliding_window, queries.after + sliding_window)


def _chunked(queries: Queries, chunk_size: int, left_padding: Tensor) -> Bounds:
    if not queries.packed and queries.num_positions <= chunk_size:  # what lies left of the first chunk is padding
        return Bounds()
    visibility = Visibility(chunk=chunk_size, chunk_start=left_padding)
    first, end = visibility.bounds(queries.position, queries.most_keys, causal=False)
    return Bounds(first - queries.origin, end - queries.origin)


def _blocks(queries: Queries, block_sequence_ids: Tensor) -> Bounds | None:
    end = queries.num_positions
    if end is None or block_sequence_ids.shape[1] < end:  # in packed rows they would reach over the sequences
        return None
    blocks, real = block_sequence_ids[:, :end], None if queries.real is None else queries.real[:, :end]
    follows = Visibility(blocks=blocks).follows(end, blocks.device, real)
    if blocks.device.type != "cpu":
        check_holds(follows, BROKEN_BLOCK)
    elif not bool(follows):
        return None
    runs = block_runs(blocks, real)
    return Bounds(*(x.gather(1, queries.position.expand(len(x), -1)) - queries.origin for x in runs))


def _vision_groups(
    queries: Queries,
    group_ids: Tensor | None = None,
    image_group_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Bounds | None:
    """Blocks as models themselves wrote them; they end with the prompt, behind which a static cache has free slots.

    ``token_type_ids`` say again which tokens are of no group.
    """
    groups = group_ids if image_group_ids is None else image_group_ids
    missing = 0 if queries.packed else max(0, queries.num_positions - groups.shape[1])
    return _blocks(queries, torch.nn.functional.pad(groups, (0, missing), value=-1))


def _same_sequence(queries: Queries, packed_sequence_mask: Tensor) -> Bounds | None:
    return Bounds() if queries.packed else None


def _remapped(queries: Queries, mask_function: Callable, position_ids: Tensor) -> Bounds | None:
    if not queries.packed:
        return None
    return run_of(mask_function, dataclasses.replace(queries, position=position_ids))


def _intersection(queries: Queries, mask_functions: tuple[Callable, ...]) -> Bounds | None:
    runs = [run_of(function, queries) for function in mask_functions]
    if any(run is None for run in runs):
        return None
    firsts, ends = ([x for x in side if x is not None] for side in zip(*runs))
    return Bounds(_reduced(torch.maximum, firsts), _reduced(torch.minimum, ends))


def _union(queries: Queries, mask_functions: tuple[Callable, ...]) -> Bounds | None:
    runs = [run_of(function, queries) for function in mask_functions]
    if any(run is None for run in runs):
        return None
    firsts, ends = ([] if any(x is None for x in side) else list(side) for side in zip(*runs))
    return Bounds(_reduced(torch.minimum, firsts), _reduced(torch.maximum, ends))


def _reduced(function: Callable[[Tensor, Tensor], Tensor], sides: list[Tensor]) -> Tensor | None:
    return functools.reduce(function, sides) if sides else None


def _model_readers(function: Any) -> Callable[..., Bounds | None] | None:
    """What reads a mask function of a model's own file, of which each has a copy."""
    name = getattr(function, "__qualname__", "")
    if not getattr(function, "__module__", "").startswith("transformers.models."):
        return None
    return _vision_groups if name == "token_type_ids_mask_function.<locals>.inner_mask" else None  # before 5.9


@functools.cache
def _readers() -> dict[Any, Callable[..., Bounds | None]]:
    """Code of a mask function -> what reads it; all closures of one factory share their code.

    A factory that another library replaced makes closures that hold other things: they are not known.
    """
    ids = torch.zeros(1, 1, dtype=torch.long)  # replaced ones may look at what they are given
    known = {
        masking_utils.causal_mask_function: _causal,
        masking_utils.bidirectional_mask_function: _bidirectional,
        masking_utils.and_masks(): _intersection,
        masking_utils.or_masks(): _union,
        masking_utils.sliding_window_overlay(1): _sliding,
        masking_utils.sliding_window_bidirectional_overlay(1): _sliding_both_ways,
        masking_utils.chunked_overlay(1, ids[0]): _chunked,
        masking_utils.packed_sequence_mask_function(ids): _same_sequence,
    }
    if hasattr(masking_utils, "blockwise_overlay"):  # from 5.9 on
        known[masking_utils.blockwise_overlay(ids)] = _blocks
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # in later ones
        remapped = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, ids)
        known[remapped] = _remapped
    return {function.__code__: read for function, read in known.items() if _holds_what_is_read(function, read)}


def _holds_what_is_read(function: Callable, read: Callable) -> bool:
    return {"queries", *function.__code__.co_freevars} == set(inspect.signature(read).parameters)
