"""Training runs: SAR switched to plain attention follows SDPA, SAR follows the reference, and both learn.

How far may two runs of one mathematics be apart? The run in fp64 is taken as the truth. What is tested may be at most
three times as far from it as stock PyTorch in fp32 is (docs/method.md, section 5), which follows the same path with its
own rounding errors, plus 1e-5 of the quantity.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from sar_fast import SARConfig, apply_sar
from sar_fast.hf import attention
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.questions import build_prompt, draw_questions
from sar_fast.method.state import SARState
from sar_fast.reference import sar_attention_reference
from tests.hf.tiny import CASES

MODELS = ["llava", "qwen2_5_vl", "internvl", "deepseek_vl"]
PLAIN = SARConfig(activation_layer_k=4, beta=float("inf"), protect_first_head=False)
TOP = 10


@dataclasses.dataclass
class Run:
    """What a training run leaves: the loss of every step, the last step's top log-probabilities, the parameters."""

    losses: Tensor
    top: Tensor
    parameters: dict[str, Tensor]


def train(name: str, steps: int, sar: SARConfig | None, dtype: torch.dtype = torch.float32) -> Run:
    """AdamW on one padded batch with rows of one, two and no pictures, weights and data always the same."""
    case = CASES[name]
    model = case.make().to(dtype).train()
    batch = case.batch([1, 2, 0])
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)  # eps: gradients that are 0 stay noise-free
    handle = apply_sar(model, sar) if sar is not None else None
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(**batch, labels=labels, use_cache=False)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.detach().double())
    if handle is not None:
        handle.remove()
    real = batch["attention_mask"].bool()
    log_probs = out.logits.detach().double()[real].log_softmax(-1)
    parameters = {n: p.detach().double() for n, p in model.named_parameters()}
    return Run(torch.stack(losses), log_probs.topk(TOP).values, parameters)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def assert_follows(got: Run, other: Run, truth: Run) -> None:
    """``got`` is as near to ``truth`` as the rules allow, where ``other`` is stock PyTorch in fp32."""

    def check(what: str, pick) -> None:
        error, allowed = relative(pick(got), pick(truth)), 3 * relative(pick(other), pick(truth)) + 1e-5
        assert error <= allowed, f"{what}: {error:.2e} > {allowed:.2e}"

    check("losses", lambda run: run.losses)
    check("top log-probabilities", lambda run: run.top)
    check("parameters", lambda run: torch.cat([p.flatten() for p in run.parameters.values()]))
    for name in truth.parameters:
        if "language_model.layers" in name and name.endswith("proj.weight"):
            check(name, lambda run, name=name: run.parameters[name])


@pytest.fixture
def reference(monkeypatch):
    """Replace SAR's attention in the integration by the eager reference, differentiated by autograd."""

    def attend(call, *, config, **_):
        out, stats = sar_attention_reference(
            call.q,
            call.k,
            call.v,
            *call.roles,
            weighting=config.rule,
            softmax_scale=call.scores.scale,
            causal=call.scores.causal,
            window_size=call.scores.window,
            softcap=call.scores.softcap,
            key_padding_mask=call.key_padding_mask,
            attn_mask=call.attn_mask,
            sav_grad=config.sav_grad,
            return_stats=True,
        )
        return out, stats, SARState.from_stats(stats)

    def switch(on: bool) -> None:
        if on:
            monkeypatch.setattr(attention, "attend_with_state", attend)
        else:
            monkeypatch.undo()

    return switch


@pytest.mark.parametrize(
    ("name", "steps"),
    [("llava", 6), *(pytest.param(name, 32, marks=pytest.mark.slow) for name in MODELS)],
)
def test_without_reweighting_training_follows_sdpa(name, steps):
    """beta infinite, no protected head: every weight is 1."""
    truth = train(name, steps, None, torch.float64)
    assert truth.losses[-1] < 0.9 * truth.losses[0]
    assert_follows(train(name, steps, PLAIN), train(name, steps, None), truth)


@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "through-weights"])
@pytest.mark.parametrize(
    ("name", "steps", "backend", "k"),
    [
        ("llava", 4, "torch", 4),
        pytest.param("llava", 2, "triton", 1, marks=pytest.mark.slow),
        *(pytest.param(n, 32, b, 4, marks=pytest.mark.slow) for n in MODELS for b in ("torch", "composed")),
    ],
)
def test_reweighted_training_follows_the_reference(name, steps, backend, k, sav_grad, reference):
    """In fp64, where rounding errors that grow a hundred thousand times over 32 steps are still far below 1e-8.

    ``"triton"``, the kernel in Triton's interpreter, takes two steps in fp32: as near as the eager reference is.
    """
    if backend == "triton":
        pytest.importorskip("triton", reason="the Triton backend needs the package triton")
    config = SARConfig(activation_layer_k=k, beta=0.05, sav_grad=sav_grad)
    exact = backend != "triton"
    reference(True)
    truth = train(name, steps, config, torch.float64)
    other = None if exact else train(name, steps, config)
    reference(False)
    got = train(name, steps, config.replace(backend=backend), torch.float64 if exact else torch.float32)
    if exact:
        for run in (lambda run: run.losses, lambda run: run.top):
            assert relative(run(got), run(truth)) <= 1e-8
        for parameter, value in truth.parameters.items():
            assert (got.parameters[parameter] - value).abs().max() <= 1e-8 * max(1, value.abs().max()), parameter
    else:
        assert_follows(got, other, truth)
    plain = train(name, steps, PLAIN)
    start = lambda run: run.losses[:2]  # before rounding errors have grown
    assert relative(start(plain), start(truth)) > 100 * relative(start(got), start(truth))  # SAR was on


# the shipped miniature


def questions(processor, count, seed):
    """A batch of prompts with answers; the loss is on the answers alone."""
    pairs = draw_questions(np.random.default_rng(seed), count, ["plain"])
    texts = [build_prompt(question.text) for _, question in pairs]
    full = [f"{text} {question.answer}" for text, (_, question) in zip(texts, pairs)]
    images = [scene.image for scene, _ in pairs]
    batch = processor(images=images, text=full, padding=True, padding_side="right", return_tensors="pt")
    prompts = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for b, length in enumerate(prompts["attention_mask"].sum(-1).tolist()):
        labels[b, :length] = -100
    return {**batch, "labels": labels}


def miniature_losses(sar):
    """Losses of a few steps on disturbed weights, SAR off (None) or on."""
    model, processor = load_miniature()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.get_decoder().parameters():
            if p.dim() == 2:
                p += 0.3 * p.std() * torch.randn(p.shape, generator=generator)
    model.train()
    batch = questions(processor, 1, seed=0)
    optimizer = torch.optim.AdamW(model.get_decoder().parameters(), lr=1e-3)
    if sar is not None:
        apply_sar(model, sar)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("sav_grad", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_miniature_learns_under_sar_as_without(sav_grad):
    """Its weights are disturbed first. Fine-tuning must undo at least half as much of that as without SAR."""
    plain = miniature_losses(None)
    assert plain[-1] < 0.7 * plain[0]
    sar = miniature_losses(SARConfig(activation_layer_k=2, beta=0.5, sav_grad=sav_grad))
    assert sar[0] - sar[-1] > 0.5 * (plain[0] - plain[-1])
    assert sar[-1] < 0.7 * sar[0]
