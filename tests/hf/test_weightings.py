"""Rules in whole models: against scales on the inputs of the output projections, and against the paper's rule."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.structure import find_attention_modules, inner_attention
from sar_fast.weighting import Equal, Fixed, SoftmaxOverHeads, TopHeads
from tests.hf.tiny import CASES

pytestmark = pytest.mark.usefixtures("one_thread")

H, LAYERS = 4, 4
PICTURED = ("llava", "qwen2_5_vl", "gemma3", "internvl")  # plain causal, three rotary rows, windows and pictures, tiles
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def table(layers: int = LAYERS) -> Tensor:
    return 1 + torch.randn(layers, H, generator=torch.Generator().manual_seed(4)) / 2


def case_of(name: str, pictures=(1, 1, 0)):
    case = CASES[name]
    return case.make(), case.batch(list(pictures), "left", 0)


@contextlib.contextmanager
def scaled_by_hand(model, scales: dict[int, Tensor]):
    """Each head's output times its scale where it enters the output projection."""
    hooks = []
    for index, module in enumerate(find_attention_modules(model)):
        if index in scales:
            projection = inner_attention(module).o_proj

            def scale(_, args, c=scales[index]):
                (x,) = args
                return ((x.unflatten(-1, (H, -1)) * c[:, None]).flatten(-2),)

            hooks.append(projection.register_forward_pre_hook(scale))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last(K: int, layers: int = LAYERS) -> dict[int, Tensor]:
    return {i: table(layers)[i] for i in range(layers - K, layers)}


def fixed(K: int, **options) -> SARConfig:
    return SARConfig(activation_layer_k=K, weighting=Fixed(table()), **options)


@pytest.mark.parametrize("name", PICTURED)
@pytest.mark.parametrize("record", [False, True])
def test_fixed_weights_scale_the_heads_of_every_row(name, record):
    """Also of the row without a picture, and with statistics kept."""
    model, batch = case_of(name)
    layers = len(find_attention_modules(model))
    with torch.no_grad(), scaled_by_hand(model, last(2, layers)):
        want = model(**batch).logits
    with torch.no_grad(), apply_sar(model, fixed(2).replace(record=record)) as handle:
        got = model(**batch).logits
        assert (set(handle.stats) == {layers - 2, layers - 1}) is record
        for index, stats in handle.stats.items():
            assert torch.equal(stats.head_weights, table()[index].expand(3, H))
            assert (stats.alignment_variance[:2] > 0).all()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits[real], want[real], atol=1e-3)


@pytest.mark.everyday(name=["llava"])
@pytest.mark.everyday(decode=["running"])
@pytest.mark.parametrize("decode", ["running", "step", "prompt"])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_fixed_weights_while_generating(name, decode):
    model, batch = case_of(name)
    layers = len(find_attention_modules(model))
    with scaled_by_hand(model, last(3, layers)):
        want = model.generate(**batch, **GREEDY)
    with apply_sar(model, fixed(3, decode=decode)):
        assert torch.equal(model.generate(**batch, **GREEDY), want)
    assert not torch.equal(model.generate(**batch, **GREEDY), want)


def test_fixed_weights_hold_for_text_alone_and_on_a_cache_that_was_filled_without():
    model, batch = case_of("llava", (0, 0))
    text = {"input_ids": batch["input_ids"][:, -6:]}
    with torch.no_grad():
        with scaled_by_hand(model, last(4)):
            want = model(**text).logits
        cache = model(**text).past_key_values
        with apply_sar(model, fixed(4)) as handle:
            torch.testing.assert_close(model(**text).logits, want, rtol=1e-4, atol=1e-4)
            embeds = model.get_input_embeddings()(text["input_ids"])
            torch.testing.assert_close(model(inputs_embeds=embeds).logits, want, rtol=1e-4, atol=1e-4)
            model(input_ids=text["input_ids"][:, -1:], past_key_values=cache)  # no statistics that it would miss
            handle.reconfigure(fixed(4, record=True))
            model(**text)
            assert set(handle.stats) == set()  # nothing to measure without a picture


def test_packed_rows():
    model, batch = case_of("llava", (1, 1))
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    length = ids.shape[1]
    mask = batch["attention_mask"].bool()
    assert mask.all()
    row = {
        "input_ids": ids.reshape(1, -1),
        "pixel_values": pixels,
        "position_ids": torch.arange(length).repeat(2)[None],
    }
    rule = lambda statistics, layer: 1 + torch.tanh(statistics.sav) + layer / 10
    for weighting in (Fixed(table()), rule):
        with torch.no_grad(), apply_sar(model, SARConfig(activation_layer_k=2, weighting=weighting)):
            want = model(input_ids=ids, pixel_values=pixels).logits
            got = model(**row, use_cache=False).logits
        torch.testing.assert_close(got.view(want.shape), want, rtol=1e-4, atol=1e-4)


@pytest.mark.everyday(name=["llava"])
@pytest.mark.everyday(decode=["running"])
@pytest.mark.parametrize("name", PICTURED)
@pytest.mark.parametrize("decode", ["running", "step", "prompt"])
def test_the_papers_rule_in_python_is_the_papers_rule(name, decode):
    """The general path against the fused one: prompt, decode steps, statistics."""
    model, batch = case_of(name)
    paper = SoftmaxOverHeads(CASES[name].beta, False)
    asked = []

    def rule(statistics, layer):
        asked.append(layer)
        return paper(statistics)

    config = SARConfig(activation_layer_k=2, decode=decode, record=True)
    generate = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    found = []
    for weighting in (paper, rule):
        with apply_sar(model, config.replace(weighting=weighting)) as handle:
            out = model.generate(**batch, **generate)
            found.append((torch.stack(out.logits), out.sequences, dict(handle.stats)))
    (want, want_ids, want_stats), (got, got_ids, got_stats) = found
    assert torch.equal(got_ids, want_ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    layers = len(find_attention_modules(model))
    assert set(asked) == set(want_stats) == {layers - 2, layers - 1}
    for index, stats in got_stats.items():
        torch.testing.assert_close(stats.head_weights, want_stats[index].head_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sav_grad", [False, True])
def test_a_rules_parameters_learn_with_the_model(checkpointing, sav_grad):
    """Scales of the heads, against autograd through hand-made scales; with gradient checkpointing the same."""
    model, batch = case_of("llava", (1, 1))
    model.train()
    batch = {**batch, "labels": batch["input_ids"]}
    by_hand = table().requires_grad_()
    with scaled_by_hand(model, {i: by_hand[i] for i in (2, 3)}):
        model(**batch).loss.backward()
    want = by_hand.grad, model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    scales = table().requires_grad_()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = SARConfig(activation_layer_k=2, weighting=Fixed(scales), sav_grad=sav_grad)
    with apply_sar(model, config):
        model(**batch, use_cache=False).loss.backward()
    torch.testing.assert_close(scales.grad, want[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, want[1], rtol=1e-3, atol=1e-5)
    assert (scales.grad[:2] == 0).all()


def test_another_rule_on_a_cache_that_holds_pictures_is_an_error():
    model, batch = case_of("llava", (1, 1))
    with apply_sar(model, SARConfig(activation_layer_k=2, weighting=TopHeads(2))) as handle, torch.no_grad():
        cache = model(**batch).past_key_values
        token = batch["input_ids"][:, -1:]
        model(input_ids=token, past_key_values=cache)
        handle.reconfigure(SARConfig(activation_layer_k=2, weighting=TopHeads(3)))
        with pytest.raises(ValueError, match=r"filled under SARConfig\(weighting=TopHeads\(keep=2.* continued under"):
            model(input_ids=token, past_key_values=cache)


def test_equal_weights_leave_the_model_as_it_is():
    model, batch = case_of("llava")
    with torch.no_grad():
        want = model(**batch).logits
        with apply_sar(model, SARConfig(activation_layer_k=4, weighting=Equal(), record=True)) as handle:
            got = model(**batch).logits
            assert len(handle.stats) == 4
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5)


def test_a_table_that_does_not_fit_the_model_is_an_error():
    model, batch = case_of("llava", (1, 1))
    for c, message in (
        (torch.ones(3, H), "must have weights of layer 3; got Fixed with weights of 3 layers"),
        (torch.ones(5), "of 4 heads"),
    ):
        with (
            apply_sar(model, SARConfig(activation_layer_k=1, weighting=Fixed(c))),
            pytest.raises(ValueError, match=message),
        ):
            model(**batch)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("before", ["nothing", "pictures"])
def test_positions_that_came_under_given_weights_have_no_statistics(record, before):
    """A rule that needs statistics cannot go on from them; given weights take any cache, unless they are recorded."""
    model, batch = case_of("llava", (1, 1))
    measured, given = SARConfig(activation_layer_k=2), fixed(2, record=record)
    token = batch["input_ids"][:, -1:]
    refused = pytest.raises(ValueError, match=r"past_key_values must .*; got (.* under SAR filled|one filled under)")
    with torch.no_grad(), apply_sar(model, given if before == "nothing" else measured) as handle:
        cache = model(**batch).past_key_values
        handle.reconfigure(given)
        with refused if record and before == "pictures" else contextlib.nullcontext():
            model(input_ids=token, past_key_values=cache)
        if before == "nothing" or not record:
            handle.reconfigure(measured)
            with refused:
                model(input_ids=token, past_key_values=cache)


@pytest.mark.parametrize("decode", ["running", "step", "prompt"])
def test_given_weights_are_recorded_at_every_step(decode):
    """With the statistics of the step's queries: none before them are carried on."""
    model, batch = case_of("llava", (1, 1))
    with torch.no_grad(), apply_sar(model, fixed(2, decode=decode, record=True)) as handle:
        cache = model(**batch).past_key_values
        prompt = dict(handle.stats)
        model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
        for index in (2, 3):
            stats = handle.stats[index]
            assert torch.equal(stats.head_weights, table()[index].expand(2, H))
            assert torch.equal(stats.query_count, torch.ones(2))
            assert (stats.alignment_variance > 0).all()
            assert not torch.equal(stats.alignment_variance, prompt[index].alignment_variance)
