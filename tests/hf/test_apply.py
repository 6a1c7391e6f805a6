"""apply_sar on tiny LLaVA-1.5 and Qwen2.5-VL: against SDPA, an eager oracle, singles; removal; errors."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import DynamicCache

from sar_fast import SARConfig, apply_sar, patch_model_for_sar, remove_sar
from sar_fast.hf import UnsupportedModelError, families
from sar_fast.hf.cache_state import state_of
from sar_fast.weighting import TopHeads
from tests.hf.oracle import eager_oracle, llava_prior, qwen_prior
from tests.hf.tiny import MODELS, VERSION, llava, llava_batch

FAMILIES = list(MODELS)
BETA = 0.02  # small enough that the weights are far from uniform on these models


@pytest.fixture(params=FAMILIES)
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def one_row(batch_of, count, first_image):
    """One sample without padding, with the pictures that row has in a larger batch."""
    row = batch_of([count], first_image=first_image)
    return {name: x for name, x in row.items() if name != "attention_mask"}


def oracle_logits(model, row, **options):
    prior = None
    if "pixel_values" in row:
        with torch.no_grad():
            if "image_grid_thw" in row:
                prior = qwen_prior(model, row["pixel_values"], row["image_grid_thw"])
            else:
                prior = llava_prior(model, row["pixel_values"])
    with eager_oracle(model, ids=row["input_ids"][0], prior=prior, **options) as oracle:
        return logits(model, row)[0], oracle.weights


@pytest.mark.parametrize("side", ["left", "right"])
def test_huge_beta_unprotected_equals_sdpa(family, side):
    model, batch_of = family
    batch = batch_of([1, 2, 0], side)
    real = batch["attention_mask"].bool()
    plain = logits(model, batch)
    with apply_sar(model, SARConfig(activation_layer_k=4, beta=1e30, protect_first_head=False)):
        torch.testing.assert_close(logits(model, batch)[real], plain[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_eager_oracle_of_each_sample(family, side):
    model, batch_of = family
    images = [1, 2, 0]
    batch = batch_of(images, side)
    expected = [
        oracle_logits(model, one_row(batch_of, n, sum(images[:b])), k=3, beta=BETA) for b, n in enumerate(images)
    ]
    plain = logits(model, batch)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, record=True)) as handle:
        got = logits(model, batch)
        assert sorted(handle.stats) == [1, 2, 3]
        for b, (want, weights) in enumerate(expected):
            real = batch["attention_mask"][b].bool()
            bound = 1e-4 * want.abs().max()
            assert (got[b][real] - want).abs().max() <= bound
            for layer, c in weights.items():
                torch.testing.assert_close(handle.stats[layer].head_weights[b], c, rtol=1e-3, atol=1e-5)
            moved = (plain[b][real] - want).abs().max()
            assert moved > 100 * bound if images[b] else moved <= bound  # SAR does something, but only with pictures


def test_text_only_row_is_bit_for_bit_plain(family):
    model, batch_of = family
    batch = batch_of([2, 0, 1])
    real = batch["attention_mask"][1].bool()
    plain = logits(model, batch)[1][real]
    with apply_sar(model, SARConfig(activation_layer_k=4, beta=BETA)):
        assert torch.equal(logits(model, batch)[1][real], plain)


def test_text_only_batch_is_plain(family):
    model, batch_of = family
    batch = batch_of([0, 0])
    plain = logits(model, batch)
    with apply_sar(model, SARConfig(activation_layer_k=4, beta=BETA)):
        assert torch.equal(logits(model, batch), plain)


def test_second_picture_of_the_same_size_gets_its_own_prior(family):
    model, batch_of = family
    with apply_sar(model, SARConfig(activation_layer_k=4, beta=BETA)) as handle:
        priors = []
        for first in (0, 3):  # same grid, other picture
            logits(model, batch_of([1], first_image=first))
            priors.append(handle.prior.clone())
        assert priors[0].shape == priors[1].shape
        assert not torch.allclose(priors[0], priors[1])
        torch.testing.assert_close(priors[0].sum(-1), torch.ones(1))


def test_projected_prior_uses_the_projected_features(family):
    model, batch_of = family
    batch = batch_of([1])
    arguments = {k: v for k, v in batch.items() if k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(**arguments, return_dict=True).pooler_output))
    norms = features.norm(dim=-1).flatten()
    with apply_sar(model, SARConfig(activation_layer_k=2, prior_source="projected")) as handle:
        logits(model, batch)
        visual = handle.roles.visual_mask[0]
        torch.testing.assert_close(handle.prior[0][visual], norms / norms.sum())


def test_remove_restores_everything(family):
    model, batch_of = family
    batch = batch_of([1, 0])
    before = logits(model, batch)
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    handle = apply_sar(model, SARConfig(activation_layer_k=4, beta=BETA))
    assert model.config.text_config._attn_implementation == "sar"
    assert model.config.vision_config._attn_implementation == "sdpa"
    handle.remove()
    handle.remove()
    assert model.config.text_config._attn_implementation == "sdpa"
    assert attributes == {name: set(m.__dict__) for name, m in model.named_modules()}
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    assert torch.equal(logits(model, batch), before)


def test_k_zero_is_plain_and_k_counts_last_layers(family):
    model, batch_of = family
    batch = batch_of([1])
    plain = logits(model, batch)
    with apply_sar(model, SARConfig(activation_layer_k=0)) as handle:
        assert handle.sar_layers == []
        assert torch.equal(logits(model, batch), plain)
    with apply_sar(model, SARConfig(activation_layer_k=1, record=True)) as handle:
        logits(model, batch)
        assert list(handle.stats) == handle.sar_layers == [3]


def test_rows_are_the_eager_attention_of_the_last_query():
    model, batch = llava(), llava_batch([1, 2], "left")
    config = SARConfig(
        activation_layer_k=4, beta=float("inf"), protect_first_head=False, record=True, record_rows="last_text"
    )
    with apply_sar(model, config) as handle:
        logits(model, batch)
        rows, visual = handle.rows, handle.roles.visual_mask
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    for layer, row in rows.items():
        want = attentions[layer][:, :, -1] * visual[:, None]
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-6)


def test_inputs_embeds_instead_of_input_ids():
    model, batch = llava(), llava_batch([1, 2], "left")
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        want = logits(model, batch)
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
        got = logits(model, {**{k: v for k, v in batch.items() if k != "input_ids"}, "inputs_embeds": embeds})
    torch.testing.assert_close(got, want)


def test_deepcopy_has_its_own_sar():
    model, batch = llava(), llava_batch([1])
    plain = logits(model, batch)
    apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA))
    want = logits(model, batch)
    clone = copy.deepcopy(model)
    remove_sar(model)
    assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(clone, batch), want)
    remove_sar(clone)
    assert torch.equal(logits(clone, batch), plain)


def test_threads_share_a_model():
    model = llava()
    batches = [llava_batch([n], first_image=7 * n) for n in (1, 2, 3)]
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        want = [logits(model, b) for b in batches]
        got = [None] * 3

        def work(i):
            for _ in range(5):
                got[i] = logits(model, batches[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


def test_patch_model_for_sar_is_the_research_name():
    model = llava()
    assert patch_model_for_sar(model, use_sar=False) is None
    handle = patch_model_for_sar(model, use_sar=True, sar_activation_layer_k=2, sar_beta=0.25)
    assert (handle.config.activation_layer_k, handle.config.beta) == (2, 0.25)
    handle.remove()


def test_patch_model_for_sar_takes_another_rule_in_place_of_beta():
    model, rule = llava(), TopHeads(2)
    handle = patch_model_for_sar(model, sar_activation_layer_k=2, weighting=rule)
    assert handle.config == SARConfig(activation_layer_k=2, weighting=rule)
    handle.remove()
    with pytest.raises(ValueError, match=r"weighting must come without beta, .*; got TopHeads and beta=0\.5"):
        patch_model_for_sar(model, sar_beta=0.5, weighting=rule)
    assert patch_model_for_sar(model, True, 2).config == SARConfig(activation_layer_k=2, beta=0.5)


def test_from_pretrained_with_the_implementation_named(tmp_path):
    from sar_fast.hf.attention import register

    model, batch = llava(), llava_batch([1, 2])
    model.save_pretrained(tmp_path)
    register()
    loaded = type(model).from_pretrained(tmp_path, attn_implementation={"text_config": "sar"})
    config = SARConfig(activation_layer_k=3, beta=BETA)
    with apply_sar(model, config), apply_sar(loaded, config):
        torch.testing.assert_close(logits(loaded, batch), logits(model, batch))


def test_saved_checkpoint_is_clean(tmp_path):
    model = llava()
    with apply_sar(model, SARConfig(activation_layer_k=3)):
        names = set(model.state_dict())
        model.save_pretrained(tmp_path)
    assert names == set(model.state_dict())
    assert "sar" not in (tmp_path / "config.json").read_text()


# errors


def test_too_many_layers():
    with pytest.raises(ValueError, match=r"activation_layer_k must be at most .* 4; got 5"):
        apply_sar(llava(), SARConfig(activation_layer_k=5))


def test_applied_twice():
    model = llava()
    apply_sar(model, SARConfig(activation_layer_k=1))
    with pytest.raises(ValueError, match="that SAR is applied to already"):
        apply_sar(model, SARConfig(activation_layer_k=1))
    remove_sar(model)
    with pytest.raises(ValueError, match="model must be one that SAR is applied to; got one without"):
        remove_sar(model)


def test_unknown_family_says_what_is_known():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
    with pytest.raises(UnsupportedModelError, match=r"model_type 'llama'.*llava.*qwen2_5_vl"):
        apply_sar(model, SARConfig(activation_layer_k=1))


def test_not_a_model():
    with pytest.raises(TypeError, match=r"model must be a transformers PreTrainedModel.*Linear"):
        apply_sar(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config must be a SARConfig; got dict"):
        apply_sar(llava(), {"beta": 0.5})


def test_language_model_alone_is_an_error_not_plain_attention():
    model = llava()
    with apply_sar(model, SARConfig(activation_layer_k=1)), pytest.raises(RuntimeError, match="no SAR context"):
        model.model.language_model(input_ids=torch.tensor([[5, 6, 7]]))


def test_wrong_vision_layout_is_an_error():
    broken = families.Family("broken", ("llava",), ("vision_tower.nowhere",), lambda *_: None)
    original = families.find_family(llava().config)
    families.register_family(broken, replace=True)
    try:
        with pytest.raises(UnsupportedModelError, match=r"vision_tower\.nowhere"):
            apply_sar(llava(), SARConfig(activation_layer_k=1))
    finally:
        families.register_family(original, replace=True)
    with pytest.raises(ValueError, match="registered already"):
        families.register_family(broken)


def test_a_model_whose_cache_has_another_name_is_refused(monkeypatch):
    """A newer transformers may rename it once more; decode steps would be plain without a word."""
    model = llava()

    def forward(self, input_ids=None, key_values=None, **kwargs):
        raise AssertionError

    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(ValueError, match="LlavaModel takes no cache or past_key_values"):
        apply_sar(model, SARConfig(activation_layer_k=1))


@pytest.mark.parametrize("name", ["past_key_values", *(["cache"] if VERSION >= (5, 24) else [])])
def test_a_cache_is_seen_under_the_name_that_it_came_by(name):
    model, batch = llava(), llava_batch([1])
    with apply_sar(model, SARConfig(activation_layer_k=2, beta=0.01, record=True)) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model.model(**batch, **{name: cache}, use_cache=True)
        assert state_of(cache).length == batch["input_ids"].shape[1]
        model.model(input_ids=torch.tensor([[20]]), **{name: cache}, use_cache=True)
        assert handle.stats[3].query_count.item() > 1


@pytest.mark.skipif(VERSION < (5, 24), reason="older transformers hand out no features with a pass's output")
def test_features_that_a_pass_hands_out_are_the_models_own():
    """Who makes the output anew from its fields, as DDP does, finds a field for each."""
    model, batch = llava(), llava_batch([1])
    with apply_sar(model, SARConfig(activation_layer_k=2)), torch.no_grad():
        found = model(**batch).image_outputs
        encoded = model.model.get_image_features(batch["pixel_values"])
        again = model.model(input_ids=batch["input_ids"], mm_encoder_outputs={"image": encoded}).image_outputs
    for features in (found, again):
        assert torch.equal(type(features)(**features).pooler_output[0], features.pooler_output[0])
    assert any(key.startswith("sar_") for key in encoded)  # which may come again
