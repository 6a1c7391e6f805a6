"""Devices that exist in name only: tensors carry one, operators that mix them raise as CUDA does.

Memory and arithmetic are the CPU's. What is checked is where tensors are, by :class:`Devices`, a torch function mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

CPU, FIRST, SECOND = map(torch.device, ("cpu", "xpu:0", "xpu:1"))
MOVES = ("to", "copy_", "cpu")
INDEXING = ("__getitem__", "__setitem__")  # by indices on the CPU, as CUDA allows


class Devices(TorchFunctionMode):
    """In here tensors are on the CPU unless they were put, made or moved elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.places = WeakTensorKeyDictionary()

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Say that a tensor is on ``device``."""
        self.places[tensor] = device
        return tensor

    def place(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        return self.places.get(tensor, CPU)

    def spread(self, model: nn.Module, second: list[nn.Module]) -> None:
        """Put a model on the first device but for some of its modules; inputs move to where weights are.

        As accelerate's ``device_map`` does it: a hook on those modules, and on every module with weights of its own.
        """
        places = {module: SECOND for top in second for module in top.modules()}
        for module in model.modules():
            device = places.get(module, FIRST)
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in own:
                self.put(tensor, device)
            if own or module in second:
                module.register_forward_pre_hook(self._mover(device), with_kwargs=True)

    def _mover(self, device: torch.device) -> Any:
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x
        return lambda module, args, kwargs: tree_map(move, (args, kwargs))

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the first device."""
        return {name: self.put(x.clone(), FIRST) for name, x in batch.items()}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return self.place(args[0])
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        target = next((x for x in leaves if isinstance(x, torch.device)), None)
        if name == "to" and len(tensors) == 2:
            target = self.place(tensors[1])
        counted = tensors[:1] if name in INDEXING else [x for x in tensors if x.dim() or self.place(x) != CPU]
        places = {self.place(x) for x in counted}
        if len(places) > 1 and name not in MOVES:
            raise RuntimeError(f"{name}: expected all tensors on the same device, but found {sorted(map(str, places))}")
        where = target or (self.place(counted[0]) if counted else CPU)
        plain = lambda x: CPU if isinstance(x, torch.device) else x
        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        if isinstance(result, torch.Size):  # a tree of ints, which would become a tuple
            return result
        return tree_map(lambda x: self._tagged(x, where, copied=name == "to"), result)

    def _tagged(self, x: Any, where: torch.device, *, copied: bool) -> Any:
        if not isinstance(x, Tensor):
            return x
        if copied and self.place(x) != where:
            with torch._C.DisableTorchFunction():
                x = x.clone()  # to the real CPU, which it never left, torch copies nothing
        return self.put(x, where)
