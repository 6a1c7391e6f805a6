"""The registry of model families: what SAR must know of one, found by ``config.model_type``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.base import plugins
from sar_fast.base.errors import ArgumentError
from sar_fast.method.value_checks import check_holds

TokenNorms = Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor | tuple[Tensor, Tensor]]


class UnsupportedModelError(ValueError):
    """SAR cannot be applied to this model; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: how the family is called in tables and messages.
        model_types: values of ``config.model_type`` that it covers.
        vision_blocks: dotted paths, from the base model, of the vision encoder's list of blocks; the first that exists.
        token_norms: (base model, fp32 patch norms, the output of a block without its last dimension, arguments of
            ``get_image_features`` by name) -> (n,) norms in the order of the placeholders. Tokens made of several
            patches get the mean of their norms, tokens that are no patch get 0. Or, where a GPU would have to be asked
            how many there are, (norms, real): with gaps, and bool of the same shape, False at those.
        video_token_norms: the same for ``get_video_features``; None = ``token_norms`` does both.
        placeholder_ids: names of the config's fields that hold placeholder token ids, by modality.
        features: attribute of ``get_image_features``'s output that holds one feature per visual token.
        projectors: dotted paths of the modules that bring vision features to the language model's width, if they exist.
        projects_later: dotted path of the one that still projects ``features`` after that call, if one does.
        whole_video_features: (base model, features of ``get_video_features``, its arguments by name) -> those features
            with the tokens that the model's forward pass only then adds to them, if it does.
        computes_last_queries_only: the text model drops the other queries in its last layers when ``logits_to_keep`` is
            a number, as it is in ``generate``; SAR then asks for all of them, since T is more than the last one.
        whole_prompts: why prompts about one picture must each run from their first token. "": attention is causal and
            positions of a continued cache are right, so prompts may share the run of what they begin with.
        box_formats: model type -> how its models write boxes, a name in ``lab.io.boxes.FORMATS``; those not listed
            write fractions of the picture.
        packable: model types of which a row may hold several samples. Not where positions have several rows that must
            restart, or pictures' blocks look across samples.
        pads_to_square: the processor pads pictures evenly to a square.
        tiling: (base model) -> keyword arguments of its ``pack_image_features``, if it cuts pictures into tiles and
            packs them behind the small whole picture.
        note: what users of the family should know, for docs/families.md.
    """

    name: str
    model_types: tuple[str, ...]
    vision_blocks: tuple[str, ...]
    token_norms: TokenNorms
    video_token_norms: TokenNorms | None = None
    placeholder_ids: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"image": "image_token_id"})
    features: str = "pooler_output"
    projectors: tuple[str, ...] = ("multi_modal_projector",)
    projects_later: str | None = None
    whole_video_features: Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor] | None = None
    computes_last_queries_only: bool = False
    whole_prompts: str = "its family entry does not say that prompts can share what they begin with"
    box_formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    packable: tuple[str, ...] = ()
    pads_to_square: bool = False
    tiling: Callable[[nn.Module], Mapping[str, Any]] | None = None
    note: str = ""

    def norms_of_tokens(
        self, base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any], modality: str, tokens: int
    ) -> Tensor:
        """(tokens,) what :attr:`token_norms`, or those of clips, makes of patch norms.

        Raises:
            RuntimeError: it makes another number. ValueError, of a GPU in a later call, where it says that by gaps.
        """
        find = self.token_norms
        if modality == "video" and self.video_token_norms is not None:
            find = self.video_token_norms
        found = find(base_model, norms, arguments)
        wrong = lambda n: f"SAR: the {self.name} family maps patches to {n} visual tokens, the model made {tokens}"
        if isinstance(found, Tensor):
            if found.numel() != tokens:
                raise RuntimeError(wrong(found.numel()))
            return found
        values, real = (x.flatten() for x in found)
        check_holds(real.sum() == tokens, wrong("another number of"))
        place = torch.where(real, real.cumsum(0) - 1, tokens).clamp_max(tokens)  # one past the last for what is none
        return values.new_zeros(tokens + 1).scatter(0, place, values)[:tokens]

    def find_vision_blocks(self, base_model: nn.Module) -> nn.ModuleList:
        """The vision encoder's blocks, or an :class:`UnsupportedModelError` that lists the paths tried."""
        return base_model.get_submodule(self._vision_path(base_model))

    def vision_encoder(self, base_model: nn.Module) -> nn.Module:
        """The part of the base model that the vision blocks lie in; in some families the projectors too."""
        return base_model.get_submodule(self._vision_path(base_model).split(".")[0])

    def _vision_path(self, base_model: nn.Module) -> str:
        for path in self.vision_blocks:
            try:
                blocks = base_model.get_submodule(path)
            except AttributeError:
                continue
            if len(blocks):
                return path
        raise UnsupportedModelError(
            f"model: {type(base_model).__name__} has no vision blocks at {' or '.join(self.vision_blocks)}, where the "
            f"{self.name} family keeps them; register_family can describe another layout"
        )

    def find_projectors(self, base_model: nn.Module) -> list[nn.Module]:
        """The modules that bring vision features to the language model's width."""
        parts = dict(base_model.named_modules())
        return [parts[path] for path in self.projectors if path in parts]


KIND = "families"  # of entry points
_REGISTRY: dict[str, Family] = {}
_REFUSED: dict[str, str] = {}


def register_family(family: Family, *, replace: bool = False) -> None:
    """Add a family; ``replace=True`` overrides entries with the same ``model_types``.

    An installed package adds one by an entry point of the group ``sar_fast.families``: the model type, and where the
    :class:`Family` is.
    """
    taken = [t for t in family.model_types if t in _REGISTRY]
    if taken and not replace:
        raise ArgumentError(
            "model_types", f"{taken}, registered already", "be new ones, or {replace} be True to override"
        )
    for model_type in family.model_types:
        _REGISTRY[model_type] = family


def refuse_family(model_type: str, reason: str) -> None:
    """Say why SAR does not apply to a model type; :func:`register_family` of that type overrides it."""
    _REFUSED[model_type] = reason


def supported_model_types() -> tuple[str, ...]:
    """All registered ``config.model_type`` values."""
    return tuple(sorted({*_REGISTRY, *plugins.installed(KIND)}))


def registered_families() -> tuple[Family, ...]:
    """All families, in the order of registration."""
    return tuple({id(family): family for family in _REGISTRY.values()}.values())


def refused_model_types() -> dict[str, str]:
    """Model types that are known and refused, with the reason."""
    return {t: reason for t, reason in _REFUSED.items() if t not in _REGISTRY}


def known_family(model_type: str) -> Family | None:
    """The family of a model type, registered here or by an installed package; None where none is."""
    if model_type not in _REGISTRY:
        found = plugins.load(KIND, model_type, "model_type")
        if found is not None and (not isinstance(found, Family) or model_type not in found.model_types):
            needed = f"be in the model_types of its package's Family, {found!r}"
            raise ArgumentError("model_type", repr(model_type), needed)
        if found is not None:
            register_family(found, replace=True)
    return _REGISTRY.get(model_type)


def packable_model_types() -> tuple[str, ...]:
    """Model types of which a row may hold several samples."""
    return tuple(sorted({t for family in registered_families() for t in family.packable}))


def find_family(config: Any) -> Family:
    """The family of a model config, or an :class:`UnsupportedModelError` that names the supported types."""
    model_type = getattr(config, "model_type", None)
    family = known_family(model_type) if isinstance(model_type, str) else None
    if family is not None:
        return family
    if model_type in _REFUSED:
        raise UnsupportedModelError(f"model: SAR does not apply to model_type {model_type!r}: {_REFUSED[model_type]}")
    raise UnsupportedModelError(
        f"model: SAR does not know model_type {model_type!r}; it knows {', '.join(supported_model_types())}. "
        "sar_fast.hf.register_family adds a family"
    )
