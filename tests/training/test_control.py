"""The contrastive loss against its definition, its scale under accumulation, and weight 0 against plain SFT."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.contrastive import ContrastiveHead, ContrastiveSupervision, contrastive_loss, pool
from sar_fast.lab.training.data import Collator
from sar_fast.lab.training.encoding import Encoder
from sar_fast.lab.training.run import build
from tests.training.runs import flags, train
from tests.training.samples import conversation

pytestmark = pytest.mark.usefixtures("one_thread")


def by_loops(visual, text, valid, scale):
    """The formula, written over pairs in fp64."""
    unit = lambda x: (x.double() / x.double().norm()).tolist()
    rows = [(unit(v), unit(t)) for v, t, ok in zip(visual, text, valid) if ok]
    s = [[scale * sum(a * b for a, b in zip(v, t)) for _, t in rows] for v, _ in rows]
    n, total = len(rows), 0.0
    for i in range(n):
        for line in (s[i], [s[j][i] for j in range(n)]):
            total += math.log(sum(math.exp(x) for x in line)) - s[i][i]
    return total / (2 * n)


@pytest.mark.parametrize("valid", [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]])
def test_the_loss_is_the_formula(valid):
    g = torch.Generator().manual_seed(0)
    visual, text = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)
    valid = torch.tensor(valid, dtype=torch.bool)
    visual[~valid] = 0  # a sample without visual tokens pools to zero
    visual.requires_grad_()
    loss = contrastive_loss(visual, text, valid, 3.0)
    assert loss.item() == pytest.approx(by_loops(visual, text, valid, 3.0), abs=1e-6)
    loss.backward()
    assert visual.grad.isfinite().all()
    assert not visual.grad[~valid].any()


def test_no_sample_takes_part():
    x = torch.zeros(2, 3, requires_grad=True)
    loss = contrastive_loss(x, x, torch.zeros(2, dtype=torch.bool), 1.0)
    assert loss.item() == 0
    loss.backward()
    assert x.grad.isfinite().all()


def test_pools():
    hidden = torch.arange(12.0).view(1, 4, 3)
    mask = torch.tensor([[True, False, True, False]])
    assert torch.equal(pool(hidden, mask), hidden[:, [0, 2]].mean(1))
    assert torch.equal(pool(hidden, mask & False), torch.zeros(1, 3))


def test_what_the_supervision_cannot_work_with(processor):
    model, head = load_miniature()[0], ContrastiveHead(0.5)
    with pytest.raises(ValueError, match=r"visual_contrastive_text_pool must be one of .*; got 'most'"):
        ContrastiveSupervision(model, head, "most")
    with pytest.raises(ValueError, match="visual_contrastive_temperature must be > 0; got 0"):
        ContrastiveHead(0)
    supervision = ContrastiveSupervision(model, head)
    batch = Collator(0)([Encoder(processor)(conversation("Where is it?", "top left"))])
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    batch.pop("pixel_values")
    with pytest.raises(ValueError, match=r"input_ids must be given: .*; got None"), torch.no_grad():
        model(inputs_embeds=embeddings, **batch)
    supervision.remove()
    model.config.image_token_id = None
    with pytest.raises(ValueError, match=r"model must have an image_token_id in its config, .*; got none"):
        ContrastiveSupervision(model, head)


@pytest.mark.parametrize("text_pool", ["all", "prompt", "answer"])
def test_what_the_model_returns(processor, text_pool):
    """Pooled by hand from the last hidden state, sample by sample without padding."""
    model, _ = load_miniature()
    encoder = Encoder(processor)
    samples = [
        encoder(conversation("Where is the red circle?", a)) for a in ("top left", "bottom", "red circle square")
    ]
    supervision = ContrastiveSupervision(model, ContrastiveHead(0.5), text_pool)
    with torch.no_grad():
        got = model(**Collator(0)(samples))["loss_contrastive"].item()
    supervision.remove()
    pooled = []
    for sample in samples:
        with torch.no_grad():
            out = model(**Collator(0)([sample]), output_hidden_states=True)
        hidden = out.hidden_states[-1][0]
        ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
        text = ids != 4
        if text_pool != "all":
            text &= (labels != -100) == (text_pool == "answer")
        pooled.append((hidden[ids == 4].mean(0), hidden[text].mean(0)))
    visual, text = (torch.stack(x) for x in zip(*pooled))
    assert got == pytest.approx(by_loops(visual, text, [True] * 3, 2.0), abs=1e-5)


def test_weight_zero_is_plain_sft_step_for_step(tmp_path):
    common = {"gradient_accumulation_steps": 2, "max_steps": 4}
    plain = train(tmp_path / "plain", **common)
    zero = train(tmp_path / "zero", custom_trainer="control_sft", visual_contrastive_loss_weight=0, **common)
    weights = plain.model.state_dict()
    assert all(torch.equal(zero.model.state_dict()[n], weights[n]) for n in weights)
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (plain, zero)]
    assert losses[0] == losses[1]
    assert all(h["loss_contrastive"] > 0 for h in zero.state.log_history if "loss" in h)


@pytest.mark.parametrize("finetuning_type", ["full", "lora", "freeze"])
def test_the_step_is_that_of_the_summed_loss(tmp_path, finetuning_type):
    """Two micro-batches: text loss over all answer tokens, contrastive loss averaged over the micro-batches.

    With plain SGD one step moves the weights by the gradient itself, so the gradient is compared, not only the loss.
    """
    arguments = parse(
        flags(
            tmp_path, finetuning_type=finetuning_type, custom_trainer="control_sft", visual_contrastive_loss_weight=0.3,
            gradient_accumulation_steps=2, max_steps=1, optim="sgd", max_grad_norm=0, learning_rate=0.01,
            gradient_analysis=False,
        )
    )  # fmt: skip
    trainer, _ = build(arguments)
    batches: list[dict] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: batches.append(collate(samples)) or batches[-1]
    model = copy.deepcopy(trainer.model)
    trainer.train()
    model.train()
    tokens = sum((b["labels"][:, 1:] != -100).sum() for b in batches[:2])
    text = contrastive = 0.0
    for batch in batches[:2]:
        out = model(**batch)
        logits, labels = out["logits"][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        text = text + nn.functional.cross_entropy(logits, labels, reduction="sum") / tokens
        contrastive = contrastive + out["loss_contrastive"] / 2
    (text + 0.3 * contrastive).backward()
    (log,) = [h for h in trainer.state.log_history if "loss" in h]
    assert log["loss_text_gen"] == pytest.approx(text.item(), rel=1e-4)
    assert log["loss_contrastive"] == pytest.approx(contrastive.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((text + 0.3 * contrastive).item(), rel=1e-4)
    moved = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = parameter - 0.01 * parameter.grad
            torch.testing.assert_close(moved[name].detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_learnable_temperature_learns_and_is_saved(tmp_path):
    from safetensors.torch import load_file

    trainer = train(
        tmp_path, custom_trainer="control_sft", learnable_temperature=True, visual_contrastive_temperature=0.2
    )
    name = "visual_contrastive_head.log_scale"
    saved = load_file(tmp_path / "model.safetensors")[name]
    assert torch.equal(saved, dict(trainer.model.named_parameters())[name])
    assert abs(saved.item() - math.log(5)) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_contrastive_loss_weight": -1}, "visual_contrastive_loss_weight must be >= 0"),
        ({"visual_contrastive_temperature": 0}, "visual_contrastive_temperature must be > 0"),
        (
            {"visual_contrastive_loss_weight": 0, "learnable_temperature": True},
            "weight must be > 0 with learnable_temperature",
        ),
        (
            {"finetuning_type": "lora", "learnable_temperature": True},
            "learnable_temperature must be False for adapters",
        ),
    ],
)
def test_bad_options_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(parse(flags(tmp_path, custom_trainer="control_sft", **changes)))
