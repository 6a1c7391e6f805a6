"""Norms of the vision features that fill a pass's placeholders, as they come."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.host_facts import HostFacts


def placeholders_of(modality: str) -> str:
    """Name of the fact how many placeholders each row has."""
    return f"{modality} placeholders"


class IncomingNorms:
    """Norms of one pass's vision features, by modality; features come at once or picture by picture.

    In a graph, where no count is known, the model itself checks it.

    Attributes:
        placeholders: modality -> (B, S) bool, the positions that its features fill.
    """

    def __init__(self, placeholders: Mapping[str, Tensor], facts: HostFacts) -> None:
        self.placeholders, self._facts = placeholders, facts
        self._parts: dict[str, list[Tensor]] = {modality: [] for modality in placeholders}

    def add(self, modality: str, norms: Tensor) -> None:
        """Norms (n,) in placeholder order: of all placeholders, or of the next ones."""
        parts = self._parts[modality]
        if torch.compiler.is_compiling() or self._came(modality):  # the features come again, all of them
            parts.clear()
        parts.append(norms)
        if not torch.compiler.is_compiling() and sum(map(len, parts)) > self._total(modality):
            _refuse_count(modality, self._total(modality), sum(map(len, parts)))

    def put_encoded(self, modality: str, norms: Tensor) -> None:
        """Norms of features that were encoded before, of all placeholders.

        ``generate`` may have repeated every sample E times since: sample 0 E times, then sample 1; the norms are those
        of the samples once.
        """
        total = None if torch.compiler.is_compiling() else self._total(modality)
        if total is not None and norms.numel() != total:
            if norms.numel() == 0 or total == 0 or total % norms.numel():
                _refuse_count(modality, total, norms.numel())
            repeats = total // norms.numel()
            samples = norms.split(self._rows(modality)[::repeats])
            norms = torch.cat([part.repeat(repeats) for part in samples])
        self._parts[modality] = [norms]

    def norms(self, modality: str) -> Tensor:
        """(n,) all norms of a modality, once they came."""
        return torch.cat(self._parts[modality])

    @property
    def complete(self) -> bool:
        """Whether the norms of all placeholders are here."""
        return all(map(self._came, self.placeholders))

    def missing(self) -> str:
        """Which vision features have not come, for messages."""
        came = {m: sum(map(len, parts)) for m, parts in self._parts.items()}
        return ", ".join(f"{n} of {self._total(m)} {m} tokens" for m, n in came.items())

    def _rows(self, modality: str) -> list[int]:
        """Placeholders of each row."""
        if placeholders_of(modality) not in self._facts:
            self._facts.ask(placeholders_of(modality), self.placeholders[modality].sum(-1))
        return self._facts[placeholders_of(modality)]

    def _total(self, modality: str) -> int:
        return sum(self._rows(modality))

    def _came(self, modality: str) -> bool:
        parts = self._parts[modality]
        if not parts or torch.compiler.is_compiling():
            return bool(parts)
        return sum(map(len, parts)) == self._total(modality)


def _refuse_count(modality: str, placeholders: int, features: int) -> None:
    raise ArgumentError(
        "input_ids (or inputs_embeds)",
        f"{placeholders} tokens ({modality}) for {features} features",
        "hold as many visual placeholder tokens as the vision encoder gives features",
    )
