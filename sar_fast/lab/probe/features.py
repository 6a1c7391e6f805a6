"""What every decoder layer knows at the end of a prompt: one forward pass per batch, all layers, kept on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.structure import find_decoder_layers

DONE = "features_done.bin"  # a byte per sample, 1 if its features are there
STORED_AS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}  # bf16 as its bits


@contextlib.contextmanager
def last_token_states(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Within, every forward pass leaves each decoder layer's output at the last position: layer -> (B, d)."""
    states: dict[int, Tensor] = {}

    def keep(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # (B, S, d)
            states[index] = hidden[:, -1].detach()

        return hook

    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(find_decoder_layers(model))]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_features(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, L, d) outputs of all L decoder layers at each prompt's last token, from one forward pass.

    ``inputs`` are left-padded model inputs; ``ValueError`` if a row ends in padding.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and not mask[:, -1].all():
        raise ArgumentError(
            "inputs['attention_mask']",
            "padding there",
            "pad prompts on the left, so that each ends at the last position",
        )
    with last_token_states(model) as states:
        model.base_model(**inputs, use_cache=False)
    return torch.stack([states[i] for i in sorted(states)], dim=1)


class FeatureStore:
    """Features (N, L, d) of N samples in a folder, filled in any order, by any number of processes.

    Args:
        folder: where ``features.bin``, ``features_done.bin`` and ``features.json`` lie.
        shape: (N, L, d). dtype: the model's. settings: what the features depend on.
        overwrite: delete features of other settings; those of the same ones stay.

    ``ValueError`` if the folder holds features of other settings that are not to be overwritten.
    """

    def __init__(
        self,
        folder: str | Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        settings: Mapping[str, Any],
        overwrite: bool = False,
    ):
        self.shape, self.dtype, folder = shape, dtype, Path(folder)
        header = {"shape": list(shape), "dtype": str(dtype), "settings": json.loads(json.dumps(settings))}
        path = folder / "features.json"
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in header if known.get(key) != header[key]]
            done = folder / DONE
            worked = done.is_file() and any(done.read_bytes())
            if differing and worked and not overwrite:
                raise ArgumentError(
                    "folder",
                    f"{folder} with features of another {', '.join(differing)}",
                    "be a new one; or delete them, or {overwrite} be True",
                )
            if differing:
                path.unlink()
        stored = STORED_AS[dtype]
        mode = "r+" if path.is_file() else "w+"
        self._values = np.memmap(folder / "features.bin", dtype=stored, mode=mode, shape=shape)
        self._done = np.memmap(folder / DONE, dtype=np.uint8, mode=mode, shape=shape[:1])
        if mode == "w+":
            path.write_text(json.dumps(header, indent=2), encoding="utf-8")

    def missing(self, rows: Sequence[int]) -> bool:
        """Whether one of the samples has no features yet."""
        return not self._done[list(rows)].all()

    def put(self, rows: Sequence[int], features: Tensor) -> None:
        """Keep the features (len(rows), L, d) of samples."""
        features = features.to("cpu", self.dtype).contiguous()
        if self.dtype == torch.bfloat16:
            features = features.view(torch.uint16)
        self._values[list(rows)] = features.numpy()
        self._values.flush()  # before they are called done
        self._done[list(rows)] = 1
        self._done.flush()

    def get(self, rows: Tensor) -> Tensor:
        """(len(rows), L, d) fp32 features of samples."""
        values = torch.from_numpy(np.array(self._values[rows.numpy()]))
        if self.dtype == torch.bfloat16:
            values = values.view(torch.bfloat16)
        return values.float()

    def __len__(self) -> int:
        return self.shape[0]
