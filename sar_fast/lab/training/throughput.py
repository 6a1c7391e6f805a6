"""Tokens per second, model FLOP utilisation and memory of a training run."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.structure import find_attention_modules, unwrap
from sar_fast.lab.measure.timing import seconds_now
from sar_fast.lab.training.metrics_log import MetricsLog

FILE_NAME = "throughput.jsonl"
PEAK_FLOPS = {  # dense bf16 per second, from the vendors' data sheets; the first name that occurs in the device's name
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


class ThroughputCallback(TrainerCallback):
    """Logs ``throughput/{tokens_per_second, samples_per_second, step_seconds, mfu, memory_bytes}``.

    Means over the steps since the last log, of all ranks; memory is the peak of this process's device (of its resident
    set on the CPU). Tokens are those of ``input_ids`` that are not padding, image tokens included. FLOPs are counted on
    the first micro-batch (:class:`TrainingFlops`); recomputation by checkpointing does not count. ``mfu`` needs the
    device's peak: ``peak_flops``, or a GPU in ``PEAK_FLOPS``.
    """

    def __init__(self, trainer: Trainer, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ArgumentError("peak_flops", peak_flops, "be > 0")
        self.trainer = trainer
        self.peak = peak_flops or known_peak(trainer.args.device)
        self.log = MetricsLog(trainer, Path(trainer.args.output_dir) / FILE_NAME)
        self._hooks: list[Any] = []
        self._tokens = self._first_step = 0  # an evaluation alone logs before anything is counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()
        self._hooks = [
            unwrap(self.trainer.model).register_forward_pre_hook(self._count, with_kwargs=True),
        ]
        self._flops: TrainingFlops | None = None  # of the first micro-batch, which has ``_counted`` tokens
        self._start_counting(args)
        if state.is_world_process_zero:
            self.log.start(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take its hook off the model; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = state.global_step - self._first_step
        if not steps or not self._tokens:
            return
        seconds = seconds_now(args.device) - self._began
        totals = torch.tensor([self._tokens, self._samples], dtype=torch.float64, device=args.device)
        totals = self.trainer.accelerator.reduce(totals, reduction="sum")
        tokens, samples = totals.tolist()
        values = {
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/samples_per_second": samples / seconds,
            "throughput/step_seconds": seconds / steps,
            "throughput/memory_bytes": float(peak_memory(args.device)),
        }
        if self.peak:
            flops = self._flops.total / self._counted * tokens / self.trainer.accelerator.num_processes
            values["throughput/mfu"] = flops / seconds / self.peak
        if state.is_world_process_zero:
            self.log.write(values, state)
        self._start_counting(args)

    def _start_counting(self, args: Any) -> None:
        self._tokens = self._samples = 0
        self._first_step = self.trainer.state.global_step
        self._began = seconds_now(args.device)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def _count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or not torch.is_grad_enabled():
            return
        tokens = int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()
        if self._flops is None:
            self._flops, self._counted = TrainingFlops(module, *ids.shape), tokens
        self._tokens += tokens
        self._samples += ids.shape[0]


class TrainingFlops:
    """Counts the model FLOPs of forward and backward in the next forward pass of ``model``; read ``total`` after it.

    Two for every multiply-add: linear layers once forward, once more for the gradient of an input that needs one and of
    a weight that is trained; attention's two products over the causal half, three times.

    Args:
        rows, length: shape of the pass's token ids, padding included.
    """

    def __init__(self, model: nn.Module, rows: int, length: int) -> None:
        self.total = 0.0
        for attention in find_attention_modules(model):
            width = attention.config.num_attention_heads * getattr(attention, "head_dim", 0)
            self.total += 3 * 2 * rows * length**2 * width
        self._hooks = [m.register_forward_hook(self._add) for m in model.modules() if isinstance(m, nn.Linear)]
        self._hooks.append(model.register_forward_hook(lambda *_: self.remove()))

    def _add(self, layer: nn.Linear, args: tuple, output: Tensor) -> None:
        passes = 1 + int(output.requires_grad and args[0].requires_grad) + int(layer.weight.requires_grad)
        self.total += passes * 2 * output.numel() * layer.in_features

    def remove(self) -> None:
        """Take its hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def known_peak(device: torch.device) -> float | None:
    """Peak dense bf16 FLOPs per second of a GPU, None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on the GPU, or the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
