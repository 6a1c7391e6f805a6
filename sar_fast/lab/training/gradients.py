"""Gradient sparsity while a Trainer trains (section 3.2 of the paper): what attention learns from, and how evenly.

Values are those of the gradient that the optimizer is about to use, before clipping: summed over accumulated
micro-batches, averaged over ranks, without the loss scale of fp16.
"""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.structure import unwrap
from sar_fast.lab.training.gini import LIMIT, gini
from sar_fast.lab.training.metrics_log import MetricsLog
from sar_fast.lab.training.projections import Share, query_and_key_shares
from sar_fast.lab.training.trainer_of import trainer_of

logger = logging.getLogger(__name__)

FILE_NAME = "gradient_sparsity.jsonl"
LIMIT_ON_GPU = 1 << 24
L1 = "gradient_analysis/avg_{}_token_grad_L1"
PER_LAYER = "attention_grad_sparsity_per_layer/layer_{}_{}_gini"
AGGREGATE = "attention_grad_sparsity_agg/avg_{}_{}_gini"


class GradientSparsityCallback(TrainerCallback):
    """Logs how sparse the gradients of queries and keys are, and how strong those of visual and text tokens.

    ``Trainer(..., callbacks=[GradientSparsityCallback(every=10)])``, of whatever library the Trainer is. Keys:

    - ``attention_grad_sparsity_per_layer/layer_{i}_{q,k}_gini``: Gini coefficient of |g| over the projection's weight
      (its LoRA matrices, its rows of a fused projection: :mod:`~sar_fast.lab.training.projections`).
    - ``attention_grad_sparsity_agg/avg_{shallow,middle,deep,total}_{q,k}_gini``: means over the first third of the
      layers (L // 3), up to the second (2 L // 3), the rest, and all.
    - ``gradient_analysis/avg_{visual,text}_token_grad_L1``: mean over positions of the L1 norm of the loss's gradient
      at the embedding that enters the language model. Visual positions are those that image or video features fill;
      text is every other position that is not padding.

    They go to ``output_dir/gradient_sparsity.jsonl``, and to Weights & Biases and TensorBoard where the Trainer
    reports to them. After a resume the file continues at the checkpoint's step. Works with accumulation, mixed
    precision, DDP and DeepSpeed ZeRO-0 to 3: all ranks measure together, every Gini coefficient on one of them.

    Args:
        trainer: any Hugging Face Trainer of a multimodal model; by default the one that the callback runs in.
        every: optimizer steps between measurements; the first step is always measured.
        path: of the JSONL file, if not in the output folder.
    """

    def __init__(self, trainer: Trainer | None = None, every: int = 10, path: Path | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError("every", repr(every), "be an int of at least 1")
        self.trainer, self.every, self.path = trainer, every, path
        self._undo: list[Any] = []
        self._measuring = False
        self._values: dict[str, float] | None = None

    # events of the Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()
        if self.trainer is None:
            self.trainer = trainer_of(state)
        self.log = MetricsLog(self.trainer, self.path or Path(args.output_dir) / FILE_NAME)
        model = unwrap(self.trainer.model)
        self.layers = query_and_key_shares(model)
        self.visual_ids = [
            int(token)
            for name in ("image_token_id", "video_token_id")
            if (token := getattr(model.config, name, None)) is not None
        ]
        if not self.visual_ids:
            raise ArgumentError(
                "model",
                "none",
                "have an image_token_id in its config, by which gradients of visual tokens are told apart",
            )
        self._install(model)
        if state.is_world_process_zero:
            self.log.start(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        self._measuring = step == 1 or step % self.every == 0
        self._positions = torch.zeros(4, dtype=torch.float64, device=args.device)  # L1 and count, visual then text

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measuring = False
        if self._values is not None and state.is_world_process_zero:
            if not all(map(math.isfinite, self._values.values())):
                logger.warning("step %d: gradients are not finite", state.global_step)
            self.log.write(self._values, state)
        self._values = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    # where gradients are read

    def _install(self, model: nn.Module) -> None:
        """Read gradients between backward and clipping; DeepSpeed clips and steps inside ``accelerator.backward``."""
        accelerator = self.trainer.accelerator
        kind = str(accelerator.distributed_type.value)
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED"):
            raise ValueError(f"GradientSparsityCallback does not know how {kind} keeps gradients; use DDP or DeepSpeed")
        if kind == "DEEPSPEED":
            engine = self.trainer.model_wrapped
            if engine.zero_optimization_stage() == 2 and engine.zero_round_robin_gradients():
                raise ValueError("deepspeed: gradients cannot be read with round_robin_gradients; set it to false")
            step = engine.step

            def measured_step(*args: Any, **kwargs: Any) -> Any:
                if self._measuring and engine.is_gradient_accumulation_boundary():
                    self._measure(float(getattr(engine.optimizer, "loss_scale", 1.0)))
                return step(*args, **kwargs)

            engine.step = measured_step
            self._undo.append(lambda: engine.__dict__.pop("step", None))
        else:
            backward = accelerator.backward

            def measured_backward(*args: Any, **kwargs: Any) -> None:
                backward(*args, **kwargs)
                if self._measuring and accelerator.sync_gradients:
                    self._measure(1.0 if accelerator.scaler is None else accelerator.scaler.get_scale())

            accelerator.backward = measured_backward
            self._undo.append(lambda: accelerator.__dict__.pop("backward", None))
        for hook in (
            model.base_model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.get_decoder().register_forward_pre_hook(self._before_decoder, with_kwargs=True),
        ):
            self._undo.append(hook.remove)

    def remove(self) -> None:
        """Take its hooks off the model and the Trainer; a second call does nothing."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell visual from text positions; the decoder gets embeddings only."""
        if not (self._measuring and torch.is_grad_enabled()):
            return
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = next((a for a in args if isinstance(a, Tensor) and not a.is_floating_point()), None)
        if ids is None:
            raise ArgumentError(
                "input_ids", None, "be given: GradientSparsityCallback tells visual tokens from text by them"
            )
        visual = torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))
        mask = kwargs.get("attention_mask")
        real = mask != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(visual)
        self._roles = visual & real, ~visual & real

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if not (self._measuring and torch.is_grad_enabled()):
            return None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            raise ValueError(f"{type(module).__name__} gets no inputs_embeds; visual gradients cannot be read there")
        if not embeds.requires_grad:  # all that comes before is frozen
            embeds = embeds.detach().requires_grad_()
        embeds.register_hook(functools.partial(self._add_positions, *self._roles))
        return args, {**kwargs, "inputs_embeds": embeds}

    def _add_positions(self, visual: Tensor, text: Tensor, gradient: Tensor) -> None:
        l1 = torch.linalg.vector_norm(gradient, ord=1, dim=-1, dtype=torch.float32).double()  # (B, S)
        parts = [part for mask in (visual, text) for part in ((l1 * mask).sum(), mask.sum())]
        self._positions += torch.stack([p.double() for p in parts]).to(self._positions.device)

    # what is computed of them

    @torch.no_grad()
    def _measure(self, loss_scale: float) -> None:
        """Fill ``_values``; every rank enters, as gathering a partitioned gradient is a collective."""
        accelerator = self.trainer.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        names = [(layer, kind) for layer in range(len(self.layers)) for kind in ("q", "k")]
        found = torch.zeros(len(names), 2, dtype=torch.float64, device=self._positions.device)  # Gini, known
        for number, (layer, kind) in enumerate(names):
            gradients = [full_gradient(share) for share in self.layers[layer][kind]]
            if number % world == rank and gradients and all(g is not None for g in gradients):
                if not all(g.isfinite().all() for g in gradients):
                    found[number] = found.new_tensor([math.nan, 1.0])
                else:
                    limit = LIMIT if gradients[0].device.type == "cpu" else LIMIT_ON_GPU
                    found[number] = found.new_tensor([gini(gradients, limit), 1.0])
        if world > 1:
            dist.all_reduce(found)
            dist.all_reduce(self._positions)
        ginis = {name: value for name, (value, known) in zip(names, found.tolist()) if known}
        self._values = self._summary(ginis, self._positions.tolist(), loss_scale * world)

    def _summary(self, ginis: dict[tuple[int, str], float], positions: list[float], scale: float) -> dict[str, float]:
        total = len(self.layers)
        depths = {
            "shallow": range(total // 3),
            "middle": range(total // 3, 2 * total // 3),
            "deep": range(2 * total // 3, total),
            "total": range(total),
        }
        values = {}
        for kind, l1, count in zip(("visual", "text"), positions[::2], positions[1::2]):
            if count:
                values[L1.format(kind)] = l1 / count / scale
        for (layer, kind), value in ginis.items():
            values[PER_LAYER.format(layer, kind)] = value
        for depth, layers in depths.items():
            for kind in ("q", "k"):
                known = [ginis[layer, kind] for layer in layers if (layer, kind) in ginis]
                if known:
                    values[AGGREGATE.format(depth, kind)] = sum(known) / len(known)
        return values


def full_gradient(share: Share) -> Tensor | None:
    """This share of a parameter's gradient, gathered if ZeRO partitions it (then a collective); None if it has none."""
    parameter = share.parameter
    if any(hasattr(parameter, name) for name in ("ds_id", "_hp_mapping", "_hp_grad")):
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
    else:
        gradient = parameter.grad
    return None if gradient is None else share.of(gradient)
