"""The same input under another mask, longer than the positions, dense, packed or a dict: the same logits."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from sar_fast import SARConfig, apply_sar
from tests.hf.test_wrappers import assert_close
from tests.hf.tiny import CASES, IMAGE, llava, llava_batch
from tests.hf.tiny.base import stacked

CAUSAL = ["llava", "llava_next", "llava_onevision", "internvl", "idefics3", "mistral3", "smolvlm", "qwen2_5_vl"]
ROWS = [1, 2, 0]


def config_of(case, **options):
    return SARConfig(**{"activation_layer_k": 3, "beta": case.beta, **options})


def logits(model, batch, **options):
    with torch.no_grad():
        return model(**{**batch, "use_cache": False, **options}).logits


def dense(mask, kind="bool"):
    """(B, 1, S, S) causal mask with padding, of (B, S)."""
    S = mask.shape[1]
    visible = torch.ones(S, S, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    if kind == "bool":
        return visible
    if kind == "unmasked":  # rows that see nothing see everything, as some callers write padding
        return visible | ~visible.any(-1, keepdim=True)
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@pytest.mark.everyday(name=("llava", "qwen2_5_vl"))
@pytest.mark.everyday(side=["left"], kind=["bool"])
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bool", "additive", "unmasked", "dict"])
def test_a_dense_mask_says_what_a_2d_one_does(name, side, kind):
    case = CASES[name]
    model, batch = case.make(), case.batch(ROWS, side)
    real = batch["attention_mask"].bool()
    mask = dense(batch["attention_mask"], "bool" if kind == "dict" else kind)
    if kind == "dict":
        text = model.config.get_text_config()
        if not hasattr(text, "layer_types"):
            pytest.skip("transformers takes a dict of masks where layers have types")
        mask = dict.fromkeys(set(text.layer_types), mask)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    options = {} if name == "qwen2_5_vl" else {"position_ids": positions}
    if name == "qwen2_5_vl":  # finds its positions by the 2D mask
        ids = batch["input_ids"]
        places, _ = model.model.get_rope_index(
            ids, **{k: v for k, v in batch.items() if k in ("image_grid_thw", "attention_mask", "mm_token_type_ids")}
        )
        options = {"position_ids": places}
    plain, same = logits(model, batch, **options), logits(model, {**batch, "attention_mask": mask}, **options)
    assert_close(same[real], plain[real])
    with apply_sar(model, config_of(case)) as handle:
        want, roles = logits(model, batch, **options)[real], handle.roles
        assert (want - plain[real]).abs().max() > 1e-2 * plain.abs().max()
        assert_close(logits(model, {**batch, "attention_mask": mask}, **options)[real], want)
        assert all(torch.equal(a & real, b) for a, b in zip(handle.roles, roles))


def packed_inputs(rows, pads, kind):
    """Rows of llava_batch one after the other in one, each followed by ``pads`` of padding."""
    ids, pixels, index = [], [], []
    for number, row in enumerate(rows, 1):
        n = row["input_ids"].shape[1]
        ids += [*row["input_ids"][0].tolist(), *[0] * pads]
        index += [number] * n + [0] * pads
        pixels += [row["pixel_values"]] if "pixel_values" in row else []
    index = torch.tensor(index)
    S = len(index)
    together = (index[:, None] == index) & (index > 0) & torch.ones(S, S, dtype=torch.bool).tril()
    mask = together[None, None]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(r["input_ids"].shape[1] + pads) for r in rows])[None]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": mask, "position_ids": positions}
    return {**inputs, "pixel_values": torch.cat(pixels)}, index


def rows_alone(counts):
    rows = [llava_batch([n], first_image=sum(counts[:i])) for i, n in enumerate(counts)]
    return [{k: v for k, v in row.items() if k != "attention_mask"} for row in rows]


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences_in_a_dense_mask_weigh_by_themselves(pads, kind, use_cache):
    """LLaMA-Factory's neat packing and the like."""
    model, rows = llava(), rows_alone([1, 0, 2])
    batch, index = packed_inputs(rows, pads, kind)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=0.02)) as handle:
        got = logits(model, batch, use_cache=use_cache)[0]
        assert handle.roles.text_mask[0, index == 0].sum() == 0
        for number, row in enumerate(rows, 1):
            assert_close(got[index == number], logits(model, row)[0])


def test_packed_gradients_in_a_dense_mask():
    model, rows = llava(), rows_alone([1, 2])
    batch, index = packed_inputs(rows, 2, "bool")

    def gradients(calls):
        model.zero_grad(set_to_none=True)
        for inputs, keep in calls:
            model(**inputs, use_cache=False).logits[0, keep].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with apply_sar(model, SARConfig(activation_layer_k=3, beta=0.02, sav_grad=True)):
        got = gradients([(batch, index > 0)])
        want = gradients([(row, slice(None)) for row in rows])
    largest = max(g.abs().max() for g in want)  # a key's bias has no gradient but rounding
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6 * largest


def test_a_plain_packed_dense_mask_runs_as_packed(monkeypatch):
    """No loop over the sequences: the mask says no more than packing does."""
    from sar_fast.hf import attention

    model, rows = llava(), rows_alone([1, 2])
    batch, _ = packed_inputs(rows, 0, "bool")
    masks = []
    original = attention.packed_attention

    def keep(*args, **kwargs):
        masks.append(args[1].attn_mask)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "packed_attention", keep)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=0.02)):
        logits(model, batch)
    assert masks == [None] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | torch.eye(m.shape[-1], dtype=torch.bool).roll(7, 0), "see across"),
        (lambda m: m.long(), "bool or additive"),
        (lambda m: m.int(), "bool or additive"),
        (lambda m: m[..., :2].int().expand(2, -1, -1, -1), "got shape"),
        (lambda m: m * 0.5 - 1.0, "scores with a bias"),
        (lambda m: m.expand(-1, 4, -1, -1), "same for all heads"),
        (lambda m: m[0], r"must be \(batch, positions\)"),
        (lambda m: m[:, :, 1:], "got shape"),
    ],
)
def test_masks_that_sar_cannot_read_are_errors(change, message):
    model, rows = llava(), rows_alone([1, 2])
    batch, _ = packed_inputs(rows, 0, "bool")
    with apply_sar(model, SARConfig(activation_layer_k=3)), pytest.raises((ValueError, TypeError), match=message):
        logits(model, {**batch, "attention_mask": change(batch["attention_mask"])})


def test_a_mask_that_numbers_sequences_is_an_error():
    model, batch = llava(), llava_batch([1])
    numbers = batch["attention_mask"].clone()
    numbers[:, 20:] = 2
    logits(model, {**batch, "attention_mask": numbers})
    with apply_sar(model, SARConfig(activation_layer_k=3)), pytest.raises(ValueError, match="number packed sequences"):
        logits(model, {**batch, "attention_mask": numbers})


# masks longer than past and new


def steps(model, batch, cache, columns, tokens=(20, 21, 22)):
    """Logits (B, 1 + steps, vocabulary) of a prompt's last position and of steps, masks ``columns`` wide."""
    mask, outs = batch["attention_mask"], []
    B, S = mask.shape
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    real = torch.cat([mask, torch.ones(B, len(tokens), dtype=mask.dtype)], 1)
    wide = lambda n: torch.nn.functional.pad(real[:, :n], (0, (columns or n) - n))
    with torch.no_grad():
        outs.append(
            model(**{**batch, "attention_mask": wide(S)}, position_ids=positions, past_key_values=cache).logits[:, -1]
        )
        for i, token in enumerate(tokens):
            outs.append(
                model(
                    input_ids=torch.full((B, 1), token),
                    attention_mask=wide(S + i + 1),
                    position_ids=positions.amax(-1, keepdim=True) + 1 + i,
                    past_key_values=cache,
                ).logits[:, -1]
            )
    return torch.stack(outs, 1)


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
def test_a_mask_over_the_whole_static_cache(side, mode):
    model, batch = llava(), llava_batch(ROWS, side)
    text = model.config.get_text_config()
    static = lambda: StaticCache(text, max_cache_len=80)
    plain = steps(model, batch, DynamicCache(config=text), None)
    assert_close(steps(model, batch, static(), 80), plain)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=0.02, decode=mode)):
        want = steps(model, batch, DynamicCache(config=text), None)
        assert (want - plain).abs().max() > 1e-2 * plain.abs().max()
        assert_close(steps(model, batch, static(), 80), want)
        assert_close(steps(model, batch, static(), None), want)
        assert_close(steps(model, batch, DynamicCache(config=text), 80), want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_made_before_a_static_prefill(side):
    model, batch = llava(), llava_batch(ROWS, side)
    text = model.config.get_text_config()
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=0.02)), torch.no_grad():
        want = logits(model, batch)[batch["attention_mask"].bool()]
        cache = StaticCache(text, max_cache_len=80)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        mask = create_masks_for_generate(model.config, embeds, batch["attention_mask"], cache, position_ids=None)
        got = model(**{**batch, "attention_mask": mask}, past_key_values=cache).logits
        assert_close(got[batch["attention_mask"].bool()], want)


def test_a_mask_that_misses_the_cached_positions_is_an_error():
    model, batch = llava(), llava_batch(ROWS)
    cache = DynamicCache(config=model.config.get_text_config())
    with apply_sar(model, SARConfig(activation_layer_k=3)), torch.no_grad():
        model(**batch, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask must cover the"):
            model(input_ids=torch.full((3, 1), 20), attention_mask=torch.ones(3, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_a_second_turn_of_layers_that_say_they_are_not_causal(name, side):
    """PaliGemma's: the prefix sees itself by its mask, what follows is causal."""
    case = CASES[name]
    model = case.make()
    model.set_attn_implementation({"text_config": "eager"})  # transformers' SDPA has no soft-cap
    batch = case.batch([1] if side == "none" else [1, 2], "left" if side == "none" else side)
    real = torch.cat([batch["attention_mask"], torch.ones(len(batch["input_ids"]), 5, dtype=torch.long)], 1)
    turn = {"input_ids": torch.arange(20, 25).expand(len(real), -1)}
    if side != "none":
        turn["attention_mask"] = real

    def second_turn():
        cache = DynamicCache(config=model.config.get_text_config())
        logits(model, batch, past_key_values=cache, use_cache=True)
        return logits(model, turn, past_key_values=cache, use_cache=True)

    want = second_turn()
    with apply_sar(model, config_of(case, activation_layer_k=0)):
        assert_close(second_turn(), want)
    with apply_sar(model, config_of(case, beta=1e30, protect_first_head=False)):
        assert_close(second_turn(), want)


# visual tokens that the mask hides


@pytest.mark.parametrize("kind", ["2d", "dense"])
def test_the_prior_is_that_of_the_visual_tokens_in_sight(kind):
    model, batch = llava(), llava_batch([2, 1])
    hidden = batch["attention_mask"].clone()
    first = (batch["input_ids"] == IMAGE).float().argmax(-1)
    for b in range(2):
        hidden[b, first[b] : first[b] + 7] = 0
    mask = hidden if kind == "2d" else dense(hidden)
    positions = (hidden.cumsum(-1) - 1).clamp_min(0)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=0.02)) as handle:
        logits(model, {**batch, "attention_mask": batch["attention_mask"]})
        whole = handle.prior
        got = logits(model, {**batch, "attention_mask": mask}, position_ids=positions)
        visual, prior = handle.roles.visual_mask, handle.prior
        assert torch.equal(visual, (batch["input_ids"] == IMAGE) & hidden.bool())
        torch.testing.assert_close((prior * visual).sum(-1), torch.ones(2))
        assert prior[~visual].abs().max() == 0
        kept = whole * visual
        torch.testing.assert_close(prior, kept / kept.sum(-1, keepdim=True))
        assert torch.isfinite(got[hidden.bool()]).all()


def test_a_picture_that_the_mask_hides_whole_is_none():
    model = llava()
    batch = stacked(16)([1, 1])
    hidden = batch["attention_mask"].clone()
    hidden[1][batch["input_ids"][1] == IMAGE] = 0
    positions = (hidden.cumsum(-1) - 1).clamp_min(0)
    batch = {**batch, "attention_mask": hidden}
    real = hidden[1].bool()
    plain = logits(model, batch, position_ids=positions)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=0.02)):
        got = logits(model, batch, position_ids=positions)
    assert_close(got[1][real], plain[1][real])
    assert (got[0] - plain[0]).abs().max() > 1e-2 * plain.abs().max()
