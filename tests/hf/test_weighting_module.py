"""A rule with parameters is a part of the model for optimizers, copies, wrappers and checkpoints, until removal."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.hf.rule_module import NAME, rule_of
from sar_fast.weighting import Fixed, HeadScales, Split
from tests.hf.oracle import Oracle, eager_oracle, llava_prior, qwen_prior
from tests.hf.tiny import MODELS, llava, llava_batch
from tests.training.own_rules import Slopes

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, K = 4, 4, 3


def drawn(kind=HeadScales, **to):
    """A rule whose scales are all different."""
    rule = kind(LAYERS, HEADS)
    with torch.no_grad():
        rule.scales.copy_(1 + torch.randn(LAYERS, HEADS, generator=torch.Generator().manual_seed(3)) / 4)
    return rule.to(**to)


def config(rule, **options):
    return SARConfig(activation_layer_k=K, weighting=rule, **options)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def loss_of(model, batch):
    return model(**batch, use_cache=False).logits.float().log_softmax(-1)[:, -1, 7].mean()


# a part of the model


@pytest.mark.parametrize("kind", [HeadScales, Slopes])
@pytest.mark.parametrize("split", [False, True])
def test_the_rule_is_a_submodule_until_removal(kind, split):
    model, batch, rule = llava(), llava_batch([1]), drawn(kind)
    before, plain = dict(model.state_dict()), logits(model, batch)
    own = lambda: [vars(m).get("_keys_to_ignore_on_save", "the class's") for m in (model, model.model)]
    ignored = own()
    weighting = Split(rule, queries=object()) if split else rule  # a group is not asked before a pass
    handle = apply_sar(model, config(weighting))
    assert model.model.sar_weighting is rule is rule_of(model)
    assert set(model.state_dict()) - set(before) == {f"model.{NAME}.scales"}
    assert any(p is rule.scales for p in model.parameters())
    assert not rule.training
    model.train()
    assert rule.training
    handle.remove()
    model.eval()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name] is before[name] or torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model.model, NAME)
    assert rule_of(model) is None
    assert own() == ignored
    assert torch.equal(logits(model, batch), plain)


def test_another_attribute_of_that_name_is_left_alone():
    model = llava()
    model.model.sar_weighting = own = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"no attribute 'sar_weighting', .*rename .*; got a LlavaModel that has one"):
        apply_sar(model, config(drawn()))
    assert handle_of(model.model) is None
    assert model.model.config.text_config._attn_implementation != "sar"
    with apply_sar(model, SARConfig(activation_layer_k=1)):  # the paper's rule has no parameters to keep
        assert model.model.sar_weighting is own
    assert model.model.sar_weighting is own


def test_the_rule_moves_to_the_models_device_and_keeps_its_dtype():
    class Follows(HeadScales):
        def to(self, *args, **kwargs):
            self.asked = args, kwargs
            return super().to(*args, **kwargs)

    model, rule = llava().to(torch.bfloat16), Follows(LAYERS, HEADS)
    apply_sar(model, config(rule))
    assert rule.asked == ((model.lm_head.weight.device,), {})
    assert rule.scales.dtype == torch.float32
    assert model.to(torch.float64).model.sar_weighting.scales.dtype == torch.float64  # as any part


def test_a_rule_of_an_offloaded_model_stays_where_it_is():
    with torch.device("meta"):
        model = llava()
    rule = drawn()
    apply_sar(model, config(rule))
    assert rule.scales.device.type == "cpu"


def test_reconfigure_swaps_the_rule():
    model, batch = llava(), llava_batch([1, 0])
    first, second = drawn(), drawn(Slopes)
    handle = apply_sar(model, config(first))
    want = logits(model, batch)
    handle.reconfigure(handle.config.replace(record=True))
    assert model.model.sar_weighting is first
    handle.reconfigure(config(second))
    assert model.model.sar_weighting is second
    assert [p for n, p in model.named_parameters() if NAME in n] == [second.scales]
    handle.reconfigure(SARConfig(activation_layer_k=K, weighting=Fixed(torch.ones(HEADS))))
    assert not hasattr(model.model, NAME)
    handle.reconfigure(config(first))
    assert torch.equal(logits(model, batch), want)
    handle.remove()
    handle.reconfigure(config(second))  # of a handle that is off
    assert not hasattr(model.model, NAME)


# copies


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_one_rule_of_its_own(way):
    model, batch = llava(), llava_batch([1])
    handle = apply_sar(model, config(drawn()))
    twin = way(model)
    other = handle_of(twin.model)
    assert other is not handle
    assert other.config.weighting is other.config.rule is twin.model.sar_weighting
    assert twin.model.sar_weighting is not model.model.sar_weighting
    want = logits(model, batch)
    assert torch.equal(logits(twin, batch), want)
    optimizer = torch.optim.SGD([twin.model.sar_weighting.scales], lr=1.0)
    loss_of(twin, batch).backward()
    optimizer.step()
    assert (logits(twin, batch) - want).abs().max() > 1e-3
    assert torch.equal(logits(model, batch), want)
    assert model.model.sar_weighting.scales.grad is None
    other.remove()
    assert not hasattr(twin.model, NAME)
    assert model.model.sar_weighting is handle.config.weighting


def test_a_copy_of_a_split_rule_shares_the_ranks():
    group = object()
    split = Split(drawn(), heads=group)
    twin = copy.deepcopy(config(split)).weighting
    assert twin.heads is group
    assert twin.inner is not split.inner
    assert torch.equal(twin.inner.scales, split.inner.scales)


def replicated(model):
    """As DataParallel makes replicas: modules copied, parameters copied with their gradients' way back."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = child if child is None else copies[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
    return copies[model]


@pytest.mark.parametrize("kind", [HeadScales, Slopes])
def test_a_replica_is_weighed_by_a_replica_of_the_rule(kind):
    model, batch, rule = llava(), llava_batch([1]), drawn(kind)
    apply_sar(model, config(rule))
    want = logits(model, batch)
    replica = replicated(model)
    replica.model.sar_weighting.scales = replica.model.sar_weighting.scales + 1  # what no other part of the model has
    assert (logits(replica, batch) - want).abs().max() > 1e-3
    loss_of(replica, batch).backward()
    assert rule.scales.grad.abs().max() > 0
    assert torch.equal(logits(model, batch), want)


# gradients


class ScaledOracle(Oracle):
    """Rows of a layer's scales; with ``slopes`` of 1 + (scale - 1) * SAV, whose statistics are constants."""

    scales, slopes, layer = None, False, None

    def __call__(self, module, *args, **kwargs):
        self.layer = module.layer_idx
        return super().__call__(module, *args, **kwargs)

    def row_weights(self, s, p, allowed):
        scales = self.scales[self.layer]
        if self.slopes:
            keys = self.visual
            rows = torch.tensor(self.text)[:, None], torch.tensor(keys)[None]
            variance = s[(slice(None), *rows)].var(-1, unbiased=True).mean(-1)
            alignment = (p[(slice(None), *rows)] * self.prior).sum(-1).mean(-1)
            scales = 1 + (scales - 1) * (variance * alignment).detach()
        return scales.expand(s.shape[1], -1)


@pytest.mark.parametrize("kind", [HeadScales, Slopes])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_an_eager_model(name, kind):
    """Of the scales, and of a weight below them, as in whole."""
    make, batch_of = MODELS[name]
    model, batch, rule = make(), batch_of([1]), drawn(kind)
    watched = [p for n, p in model.named_parameters() if n.endswith("layers.0.self_attn.v_proj.weight")][-1]
    prior = (
        llava_prior(model, batch["pixel_values"])
        if name == "llava"
        else qwen_prior(model, batch["pixel_values"], batch["image_grid_thw"])
    )
    with eager_oracle(model, ScaledOracle, ids=batch["input_ids"][0], prior=prior, k=K, beta=1.0) as oracle:
        oracle.scales, oracle.slopes = rule.scales, kind is Slopes
        loss_of(model, batch).backward()
    want = [p.grad.clone() for p in (rule.scales, watched)]
    model.zero_grad()
    rule.zero_grad()
    with apply_sar(model, config(rule)):
        loss_of(model, batch).backward()
        got = [p.grad for p in (rule.scales, watched)]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
    assert (want[0][LAYERS - K :] != 0).all()
    assert (want[0][: LAYERS - K] == 0).all()


@pytest.mark.everyday(reentrant=[False], dtype=[torch.float32])
@pytest.mark.everyday(reentrant=[True], scales=[torch.float32])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_gradient(reentrant, dtype, scales):
    model, batch, rule = llava().to(dtype).train(), llava_batch([1, 0]), drawn(dtype=scales)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    apply_sar(model, config(rule))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        loss_of(model, batch).backward()
        found.append(rule.scales.grad.clone())
    assert found[0].dtype == scales
    assert torch.equal(*found)
    assert (found[0][LAYERS - K :] != 0).all()


def test_a_frozen_model_learns_its_rule():
    model, batch, rule = llava().requires_grad_(False), llava_batch([1]), HeadScales(LAYERS, HEADS)
    plain = logits(model, batch)
    apply_sar(model, config(rule))
    assert torch.equal(logits(model, batch), plain)  # scales of 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = -loss_of(model, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    assert not torch.equal(logits(model, batch), plain)


@pytest.mark.slow
def test_a_compiled_model_learns_its_rule():
    model, batch, rule = llava().train(), llava_batch([1]), drawn()
    compiled = torch.compile(model, backend="aot_eager")
    with apply_sar(compiled, config(rule)):
        loss_of(model, batch).backward()
        want = rule.scales.grad.clone()
        rule.zero_grad()
        loss_of(compiled, batch).backward()
    torch.testing.assert_close(rule.scales.grad, want, rtol=1e-3, atol=1e-5)


# checkpoints


def test_a_saved_model_is_plain(tmp_path, caplog):
    model = llava()
    names = list(model.state_dict())
    handle = apply_sar(model, config(drawn()))
    for part, folder in ((model, tmp_path / "whole"), (model.model, tmp_path / "base")):
        part.save_pretrained(folder)
        with caplog.at_level(logging.WARNING):
            logging.getLogger("transformers").propagate = True
            loaded, info = type(part).from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("unexpected_keys", "missing_keys"))
        assert NAME not in caplog.text
        assert list(loaded.state_dict()) == [n for n in part.state_dict() if NAME not in n]
    handle.remove()
    assert list(model.state_dict()) == names
