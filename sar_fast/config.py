"""SARConfig: what the method does, validated once and serialisable."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import TYPE_CHECKING, Any, Literal, get_args

from sar_fast.base import json_text
from sar_fast.base.errors import ArgumentError, ArgumentTypeError, check_choice
from sar_fast.base.scalars import is_integer, kind, plain
from sar_fast.method.options import DecodeMode, Normalize, PriorSource, RecordRows, TextQueries, check_beta

if TYPE_CHECKING:
    from sar_fast.method.weighting import Weighting
    from sar_fast.method.weighting.rows import RowStatistic

BackendName = Literal["auto", "triton", "composed", "torch"]
CHOICES = {
    "normalize": Normalize,
    "text_queries": TextQueries,
    "prior_source": PriorSource,
    "decode": DecodeMode,
    "backend": BackendName,
    "record_rows": RecordRows,
}
PAPER_OPTIONS = {"beta": 0.5, "protect_first_head": True, "normalize": "none"}  # of its rule, which another replaces


@dataclasses.dataclass(frozen=True)
class SARConfig:
    """Options of SAR (docs/method.md).

    Args:
        activation_layer_k: number K of final attention layers that are re-weighted; 0 switches SAR off, more than
            the model has is an error when the config meets the model.
        beta: temperature of the softmax over heads; default 0.5. None with a ``weighting``, as the next two.
        protect_first_head: give head 0 the largest weight of its layer; default True.
        normalize: ``"none"`` (SAV / beta; the default) or ``"standardize"`` (SAV standardised over heads, then / beta).
        text_queries: which positions are text queries: those after the sample's last visual token, or after its first.
        prior_source: ``"vision_layer"`` (norms of vision block ``min(2L//3, L-1)``) or ``"projected"`` (norms of the
            projected features that enter the language model).
        decode: weights at decode steps: ``"running"`` means, statistics of the ``"step"`` alone, or the ``"prompt"``'s.
        sav_grad: let gradients flow through the weights (False: the weights are constants in backward).
        backend: which implementation computes attention; ``"auto"`` chooses by device and options.
        record: keep each layer's statistics of the last call in ``handle.stats``.
        record_rows: ``"last_text"`` keeps, per layer, each head's attention of the last text query over the visual
            keys in ``handle.rows``, without eager attention; ``"none"`` costs nothing.
        weighting: any other rule for the heads' weights (docs/weighting.md), in place of the three options above.
        row_statistics: with ``record``, statistics to be kept beside AV and SA (docs/row_statistics.md), as objects or
            by name: "mass", "entropy", "score_sum".
    """

    activation_layer_k: int = 10
    beta: float | None = None
    protect_first_head: bool | None = None
    normalize: Normalize | None = None
    text_queries: TextQueries = "after_last_image"
    prior_source: PriorSource = "vision_layer"
    decode: DecodeMode = "running"
    sav_grad: bool = False
    backend: BackendName = "auto"
    record: bool = False
    record_rows: RecordRows = "none"
    weighting: Weighting | None = None
    row_statistics: tuple[RowStatistic, ...] = ()

    def __post_init__(self) -> None:
        k = plain(self.activation_layer_k)
        if not is_integer(k):
            raise ArgumentTypeError("activation_layer_k", kind(k), "be an int")
        if k < 0:
            raise ArgumentError("activation_layer_k", k, "be >= 0")
        object.__setattr__(self, "activation_layer_k", k)  # Python's numbers, which JSON can hold
        self._check_rule()
        self._check_rows()
        for name in ("sav_grad", "record"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(name, kind(getattr(self, name)), "be a bool")
        for name, choices in CHOICES.items():
            if name == "normalize" and self.weighting is not None:
                continue
            if name != "backend":
                check_choice(name, getattr(self, name), get_args(choices))
            elif not (isinstance(self.backend, str) and self.backend in get_args(choices)):  # a registered one, or none
                from sar_fast.backends.select import check_backend_name

                check_backend_name(name, self.backend)
            object.__setattr__(self, name, str(getattr(self, name)))

    def _check_rule(self) -> None:
        """A weighting comes alone; without one the paper's options get their defaults."""
        if self.weighting is not None:
            from sar_fast.method.weighting.softmax import choose_weighting

            choose_weighting(self.weighting, *(getattr(self, name) for name in PAPER_OPTIONS))
            return
        for name, default in PAPER_OPTIONS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        object.__setattr__(self, "beta", check_beta(self.beta))
        if not isinstance(self.protect_first_head, bool):
            raise ArgumentTypeError("protect_first_head", kind(self.protect_first_head), "be a bool")

    def _check_rows(self) -> None:
        if isinstance(self.row_statistics, (tuple, list)) and not self.row_statistics:
            object.__setattr__(self, "row_statistics", ())
            return
        from sar_fast.method.weighting.rows import named

        object.__setattr__(self, "row_statistics", named(self.row_statistics))
        if not self.record:
            raise ArgumentError("row_statistics", "record=False", "come with record=True, which keeps them")

    @property
    def rule(self) -> Weighting:
        """How statistics become weights: ``weighting``, or the paper's rule with its options."""
        if self.weighting is not None:
            return self.weighting
        from sar_fast.method.weighting.softmax import SoftmaxOverHeads

        return SoftmaxOverHeads(*(getattr(self, name) for name in PAPER_OPTIONS))

    @property
    def weighs_by_statistics(self) -> bool:
        """Whether weights come from the statistics of what a model was shown, and a cache carries them on."""
        return self.activation_layer_k > 0 and getattr(self.weighting, "needs_statistics", True)

    @property
    def measures(self) -> bool:
        """Whether statistics of pictures are needed, to weigh by or to be kept."""
        records = self.record or self.record_rows != "none"
        return self.weighs_by_statistics or (self.activation_layer_k > 0 and records)

    def replace(self, **changes: Any) -> SARConfig:
        """A validated copy with ``changes`` applied; a ``weighting`` takes the place of the paper's options."""
        if changes.get("weighting") is not None:
            changes = {**dict.fromkeys(PAPER_OPTIONS), **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``from_dict`` inverts it. What the paper's rule has no use for is left out.

        Raises:
            ValueError: a ``weighting`` or a row statistic that is not registered, which has no name to write.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rule, rows = values.pop("weighting"), values.pop("row_statistics")
        if rule is not None:
            from sar_fast.method.weighting.registry import weighting_to_dict

            values = {
                **{n: v for n, v in values.items() if n not in PAPER_OPTIONS},
                "weighting": weighting_to_dict(rule),
            }
        if rows:
            from sar_fast.method.weighting.rows import names_of

            values["row_statistics"] = names_of(rows)
        return values

    def __getstate__(self) -> dict[str, Any]:
        """For pickles, which find functions by name."""
        try:
            pickle.dumps(self.weighting)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise pickle.PicklingError(
                f"weighting: {self.weighting!r} cannot be pickled ({error}); define it at the top of a module"
            ) from error
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> SARConfig:
        """A copy of a model takes a copy of a rule with parameters along; what cannot be copied is shared."""
        return self if self.weighting is None else self.replace(weighting=copy.deepcopy(self.weighting, memo))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SARConfig:
        """Build from ``to_dict``'s output; unknown keys are an error that lists the known ones."""
        if not isinstance(values, dict):
            raise ArgumentTypeError("values", kind(values), "be a dict of SARConfig fields")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known, key=str)
        if unknown:
            raise ArgumentError("values", unknown, f"hold fields of SARConfig, {sorted(known)}")
        if isinstance(values.get("weighting"), (str, dict)):
            from sar_fast.method.weighting.find import find_weighting

            values = {**values, "weighting": find_weighting(values["weighting"])}
        return cls(**values)

    def to_json(self) -> str:
        """One JSON object; ``from_json`` inverts it."""
        return json_text.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SARConfig:
        """Build from ``to_json``'s output."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArgumentError("text", f"{text[:40]!r} ({error})", "be JSON") from error
        return cls.from_dict(values)
