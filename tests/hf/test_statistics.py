"""What ``record`` and ``record_rows`` keep: right per sample, in batches, generation, packed rows; free when off."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from sar_fast import SARConfig, SARStats, apply_sar
from sar_fast.hf import attention, decoding
from sar_fast.hf.forward_pass import Pass
from tests.hf.test_batching import pack, row_of
from tests.hf.test_caches import sliding_llava
from tests.hf.tiny import MODELS, llava, llava_batch

BETA = 0.02
IMAGES = [1, 2, 0]
NAMES = ("alignment_variance", "semantic_alignment", "sav", "head_weights")
NEUTRAL = SARConfig(
    activation_layer_k=4, beta=float("inf"), protect_first_head=False, record=True, record_rows="last_text"
)


@pytest.fixture(params=list(MODELS))
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch


def run(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False)


def test_off_computes_nothing(monkeypatch):
    """Neither function that builds what users read is called, and attention runs as often."""
    calls = {"stats": 0, "rows": 0, "attention": 0}
    counted = {
        (SARStats, "of"): "stats",
        (attention, "visual_attention_rows"): "rows",
        (decoding.ops, "attention"): "attention",
    }

    def counting(original, key):
        def count(*args, **kwargs):
            calls[key] += 1
            return original(*args, **kwargs)

        return count

    for (owner, name), key in counted.items():
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), key))
    model, batch = llava(), llava_batch(IMAGES)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)) as handle:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        off = calls["attention"]
        assert (calls["stats"], calls["rows"]) == (0, 0)
        assert handle.stats == handle.rows == {}
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, record=True, record_rows="last_text")):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert calls == {"stats": 6, "rows": 6, "attention": 2 * off}


def test_recording_does_not_change_the_output(family):
    model, batch_of = family
    batch = batch_of(IMAGES)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        want = run(model, batch).logits
    config = SARConfig(activation_layer_k=3, beta=BETA, record=True, record_rows="last_text")
    with apply_sar(model, config):
        assert torch.equal(run(model, batch).logits, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batchs_statistics_are_those_of_its_rows(family, side):
    """Shapes, dtypes, no gradient, and every row as if it were alone; rows of attention by visual token."""
    model, batch_of = family
    batch = batch_of(IMAGES, side)
    config = SARConfig(activation_layer_k=3, beta=BETA, record=True, record_rows="last_text")
    with apply_sar(model, config) as handle:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        stats, rows, visual = dict(handle.stats), dict(handle.rows), handle.roles.visual_mask
        assert sorted(stats) == sorted(rows) == handle.sar_layers
        for b, n in enumerate(IMAGES):
            run(model, row_of(batch_of, IMAGES, b))
            if not n:  # nothing is re-weighted, and nothing of the call before is left
                assert handle.stats == handle.rows == {}
                assert all((stats[layer].head_weights[b] == 1).all() for layer in stats)
                assert not any(stats[layer].query_count[b] for layer in stats)
            for layer, alone in handle.stats.items():
                assert int(stats[layer].query_count[b]) == int(alone.query_count)
                for name in NAMES:
                    whole = getattr(stats[layer], name)
                    assert (whole.shape, whole.dtype, whole.requires_grad) == ((3, 4), torch.float32, False)
                    torch.testing.assert_close(whole[b], getattr(alone, name)[0], rtol=1e-3, atol=1e-7)
                own = handle.rows[layer][0][:, handle.roles.visual_mask[0]]
                torch.testing.assert_close(rows[layer][b][:, visual[b]], own, rtol=1e-3, atol=1e-7)
            for layer in rows:
                assert not rows[layer][b][:, ~visual[b]].any()


def test_statistics_from_eager_attention(family):
    """AV, SA and rows recomputed from transformers' own attention matrices; SAR weighs all heads alike here."""
    model, batch_of = family
    row = row_of(batch_of, [2], 0)
    with apply_sar(model, NEUTRAL) as handle:
        run(model, row)
        stats, rows, roles, prior = handle.stats, handle.rows, handle.roles, handle.prior[0]
    visual, text = roles.visual_mask[0], roles.text_mask[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        matrices = model(**row, output_attentions=True, use_cache=False).attentions
    for layer, p in enumerate(matrices):
        over_pictures = p[0, :, text][:, :, visual].double()  # [H, T, V]
        sa = (over_pictures * prior[visual]).sum(-1).mean(-1)
        av = over_pictures.log().var(-1, unbiased=True).mean(-1)  # log p is the score up to a constant of the row
        torch.testing.assert_close(stats[layer].semantic_alignment[0].double(), sa, rtol=1e-3, atol=0)
        torch.testing.assert_close(stats[layer].alignment_variance[0].double(), av, rtol=1e-3, atol=0)
        torch.testing.assert_close(stats[layer].sav, stats[layer].alignment_variance * stats[layer].semantic_alignment)
        torch.testing.assert_close(rows[layer][0][:, visual], p[0, :, -1, visual], rtol=1e-3, atol=1e-7)
        assert int(stats[layer].query_count) == int(text.sum())


@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
def test_after_generation_the_handle_holds_the_last_step(mode):
    model, batch = llava(), llava_batch(IMAGES)
    config = SARConfig(activation_layer_k=2, beta=BETA, decode=mode, record=True, record_rows="last_text")
    with apply_sar(model, config) as handle:
        run(model, batch)
        prompt = handle.stats[3]
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        stats, rows = handle.stats[3], handle.rows[3]
        length = batch["input_ids"].shape[1]
        assert handle.roles.visual_mask.shape == (3, length)  # roles and prior stay the prompt's
        assert rows.shape == (3, 4, length + 3)
        assert not rows[..., length:].any()
        assert (rows[0].sum(-1) > 0).all()
        steps = {"running": prompt.query_count + 3, "step": torch.ones(3), "prompt": prompt.query_count}[mode]
        assert torch.equal(stats.query_count, steps * (prompt.query_count > 0))
        if mode == "prompt":
            torch.testing.assert_close(stats.head_weights, prompt.head_weights, rtol=1e-4, atol=1e-6)
        assert torch.equal(stats.head_weights[2], torch.ones(4))


def test_packed_rows_have_one_row_of_statistics_per_sequence():
    model = llava()
    rows = [row_of(llava_batch, IMAGES, b) for b in range(3)]
    with apply_sar(model, SARConfig(activation_layer_k=2, beta=BETA, record=True)) as handle:
        run(model, pack(rows)[0])
        packed = dict(handle.stats)
        for b, row in enumerate(rows):
            run(model, row)
            assert sorted(packed) == handle.sar_layers
            for layer, alone in handle.stats.items():
                for name in (*NAMES, "query_count"):
                    got, want = getattr(packed[layer], name)[b], getattr(alone, name)[0]
                    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)


# the log-sum-exp


class Scores:
    """Eager attention that keeps the (B, H, Sq) log-sum-exp of every layer."""

    def __init__(self):
        self.lse = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        s = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling + attention_mask
        self.lse[module.layer_idx] = torch.logsumexp(s.double(), -1)
        return (s.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def eager_scores(model):
    scores, before = Scores(), model.config.text_config._attn_implementation
    AttentionInterface.register("sar_test_scores", scores)
    AttentionMaskInterface.register("sar_test_scores", eager_mask)
    model.set_attn_implementation({"text_config": "sar_test_scores"})
    try:
        yield scores.lse
    finally:
        model.set_attn_implementation({"text_config": before})


@pytest.mark.parametrize("backend", ["torch", "composed"])
def test_log_sum_exp_of_every_query(family, backend):
    """(B, H, Sq) fp32, in a pass with and without gradients, against all scores; SAR weighs all heads alike here."""
    model, batch_of = family
    row = row_of(batch_of, [2], 0)
    with eager_scores(model) as want:
        run(model, row)
    with apply_sar(model, NEUTRAL.replace(backend=backend)) as handle:
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                model(**row, use_cache=False)
            for layer, stats in handle.stats.items():
                assert (stats.lse.dtype, stats.lse.requires_grad) == (torch.float32, False)
                torch.testing.assert_close(stats.lse.double(), want[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_log_sum_exp_of_padded_rows(family, side):
    model, batch_of = family
    batch = batch_of(IMAGES, side)
    real = batch["attention_mask"].bool()[:, None].expand(-1, 4, -1)
    with eager_scores(model) as want:
        run(model, batch)
    with apply_sar(model, NEUTRAL) as handle:
        run(model, batch)
        for layer, stats in handle.stats.items():
            assert stats.lse.shape == real.shape
            torch.testing.assert_close(stats.lse[real].double(), want[layer][real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
def test_log_sum_exp_of_a_decode_step(mode):
    model, batch = llava(), llava_batch([1, 2])
    length = batch["input_ids"].shape[1]
    with apply_sar(model, NEUTRAL.replace(decode=mode)) as handle:
        tokens = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        got = {layer: stats.lse for layer, stats in handle.stats.items()}
    whole = batch | {"input_ids": tokens[:, :-1]}
    whole["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    with eager_scores(model) as want:
        run(model, whole)
    for layer, lse in got.items():
        torch.testing.assert_close(lse[..., 0].double(), want[layer][..., length + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["running", "prompt"])
def test_log_sum_exp_of_a_draft_has_all_its_tokens(mode, monkeypatch):
    model, row = llava(), row_of(llava_batch, [1], 0)
    row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[30, 31, 30, 31, 30, 31, 30]])], 1)
    passed, recorded = [], []
    monkeypatch.setattr(Pass, "record", lambda self, layer, stats: recorded.append(stats.lse.shape))
    with apply_sar(model, NEUTRAL.replace(decode=mode)):
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: passed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        model.generate(**row, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert recorded == [(1, 4, n) for n in passed for _ in range(4)]
    assert any(1 < n < row["input_ids"].shape[1] for n in passed)


@pytest.mark.parametrize("how", ["plain", "window"])
def test_log_sum_exp_of_packed_rows(how):
    """(H, total queries), the sequences one after the other."""
    model = llava() if how == "plain" else sliding_llava()
    rows = [row_of(llava_batch, IMAGES, b) for b in range(3)]
    packed, lengths = pack(rows)
    with apply_sar(model, SARConfig(activation_layer_k=1, beta=BETA, record=True)) as handle:
        run(model, packed)
        parts = handle.stats[3].lse.split(lengths, -1)
    for part, row in zip(parts, rows):
        with eager_scores(model) as want:
            run(model, row)
        torch.testing.assert_close(part.double(), want[3][0], rtol=1e-4, atol=1e-4)
