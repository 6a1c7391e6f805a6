"""Training with SAR on, gradient checkpointing, and torch.compile of whole models."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from sar_fast import SARConfig, apply_sar
from tests.helpers import combinations
from tests.hf.oracle import eager_oracle, llava_prior, refuse_one_graph
from tests.hf.tiny import MODELS, llava, llava_batch

BETA = 0.02


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    labels = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 0, -100)
    loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# every day each two of these together
CHECKPOINTED = combinations(
    *(MODELS, (False, True), (False, True)),
    daily=lambda family, reentrant, sav_grad: (family == "llava") == (reentrant == sav_grad),
)


@pytest.mark.parametrize(("family", "reentrant", "sav_grad"), CHECKPOINTED)
def test_checkpointed_gradients_equal_plain_ones(family, reentrant, sav_grad):
    make, batch_of = MODELS[family]
    model, batch = make().train(), batch_of([1, 2, 0])
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, sav_grad=sav_grad)):
        loss, want = loss_and_gradients(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again, got = loss_and_gradients(model, batch)
    assert torch.equal(loss, again)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)


def test_gradients_through_the_weights_equal_the_eager_oracles():
    model = llava()
    row = {k: v for k, v in llava_batch([1]).items() if k != "attention_mask"}
    with torch.no_grad():
        prior = llava_prior(model, row["pixel_values"])
    with eager_oracle(model, ids=row["input_ids"][0], prior=prior, k=3, beta=BETA):
        loss, want = loss_and_gradients(model, row)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, sav_grad=True)):
        got_loss, got = loss_and_gradients(model, row)
    torch.testing.assert_close(got_loss, loss, rtol=1e-5, atol=1e-6)
    for name in want:
        bound = 1e-3 * want[name].abs().max() + 1e-6  # some gradients are exactly 0 but for rounding (k biases)
        assert (got[name] - want[name]).abs().max() <= bound, name
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, sav_grad=False)):
        _, constant = loss_and_gradients(model, row)
    name = "model.language_model.layers.2.self_attn.q_proj.weight"
    assert (constant[name] - want[name]).abs().max() > 1e-2 * want[name].abs().max()


@pytest.mark.parametrize("sav_grad", [False, True])
def test_loss_decreases(sav_grad):
    model, batch = llava(), llava_batch([1, 2, 1])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with apply_sar(model, SARConfig(activation_layer_k=4, beta=0.5, sav_grad=sav_grad)):
        losses = []
        for _ in range(12):
            loss, _ = loss_and_gradients(model, batch)
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("family", MODELS)
def test_autocast_bf16_runs_in_bf16(family):
    make, batch_of = MODELS[family]
    model, batch = make(), batch_of([1, 2])
    with apply_sar(model, SARConfig(activation_layer_k=4, beta=0.5)), torch.no_grad():
        want = model(**batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert (got.float() - want)[real].abs().mean() < 0.1 * want[real].abs().mean()


@pytest.mark.everyday(padded=[True])
@pytest.mark.parametrize("padded", [False, True])
def test_whole_model_compiles_in_one_graph(padded):
    model, batch = llava(), llava_batch([1, 2] if padded else [1])
    if not padded:
        batch.pop("attention_mask")
    refuse_one_graph(model, batch | {"use_cache": False})
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)), torch.no_grad():
        want = model(**batch, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.everyday(what=["text model"])
@pytest.mark.parametrize(("what", "first"), [("model", "compile"), ("base", "sar"), ("text model", "compile")])
def test_models_compiled_with_graph_breaks(what, first):
    """No fullgraph: the hooks of a pass and what they see run in pieces, traced and not."""
    model, batch, config = llava(), llava_batch([1, 2, 0]), SARConfig(activation_layer_k=3, beta=BETA)
    run = lambda: compiled(**batch, use_cache=False).logits
    torch._dynamo.reset()
    compiled = model
    with torch.no_grad():
        with apply_sar(model, config):
            want = run()
        handle = apply_sar(model, config) if first == "sar" else None
        if what == "model":
            compiled = torch.compile(model, backend="eager")
        elif what == "base":
            model.model.compile(backend="eager")
        else:
            model.model.language_model = torch.compile(model.model.language_model, backend="eager")
        handle = handle or apply_sar(compiled, config)
        for _ in range(2):
            torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-4)
        handle.remove()


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
def test_compiled_decode_on_a_static_cache(mode):
    from torch._dynamo.testing import CompileCounter

    model, batch = llava(), llava_batch([1, 2, 0])
    counter = CompileCounter()

    def decode(forward, steps):
        cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
        mask, logits = batch["attention_mask"], []
        with torch.no_grad():
            model(**batch, past_key_values=cache, use_cache=True)
            for i in range(steps):
                token = torch.full((3, 1), 20 + i)
                mask = torch.cat([mask, torch.ones_like(token)], 1)
                positions = mask.sum(-1, keepdim=True) - 1
                out = forward(
                    input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                logits.append(out.logits)
        return torch.cat(logits, 1)

    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, decode=mode)):
        want = decode(model, 6)
        torch._dynamo.reset()
        compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
        torch.testing.assert_close(decode(compiled, 6), want, rtol=1e-4, atol=1e-4)
        graphs = counter.frame_count
        decode(compiled, 12)
        assert counter.frame_count == graphs <= 2  # the growing mask is one dynamic dimension, nothing else recompiles


def test_compiled_steps_without_sar_are_seen_on_a_static_cache():
    """One graph without SAR, one with: noticing costs no compilation."""
    from torch._dynamo.testing import CompileCounter

    model, batch = llava(), llava_batch([1])
    config, counter = SARConfig(activation_layer_k=2, beta=BETA), CompileCounter()
    cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
    step = lambda: compiled(input_ids=torch.tensor([[20]]), past_key_values=cache, use_cache=True)
    with torch.no_grad():
        with apply_sar(model, config):
            model(**batch, past_key_values=cache, use_cache=True)
        for _ in range(3):
            step()
        assert counter.frame_count == 1
        with apply_sar(model, config), pytest.raises(ValueError, match="SAR filled not all, so"):
            model(input_ids=torch.tensor([[20]]), past_key_values=cache, use_cache=True)
