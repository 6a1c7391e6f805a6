"""Facts about tensors on which a pass depends, brought to the host together: on a GPU, one wait for all of them."""

from __future__ import annotations

import torch
from torch import Tensor


class HostFacts:
    """Numbers that are asked for where their tensors are at hand, and read later.

    The first that is read brings all that were asked for so far. Nothing is asked in a graph, which has no values.
    """

    def __init__(self) -> None:
        self._asked: dict[str, Tensor] = {}
        self._known: dict[str, list[int]] = {}

    def ask(self, name: str, values: Tensor) -> None:
        """Name some values, (n,) or () bool or integer, on any device."""
        self._asked[name] = values.reshape(-1)

    def __contains__(self, name: str) -> bool:
        return name in self._asked or name in self._known

    def __getitem__(self, name: str) -> list[int]:
        """The (n,) values that were named so."""
        if name not in self._known:
            home = self._asked[name].device
            numbers = torch.cat([values.to(home, torch.int64) for values in self._asked.values()]).tolist()
            for other, values in self._asked.items():
                self._known[other], numbers = numbers[: len(values)], numbers[len(values) :]
            self._asked.clear()
        return self._known[name]
