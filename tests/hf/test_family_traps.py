"""What goes wrong in one family or another, a test each; where transformers itself fails, its failure is asserted."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING, LogitsProcessor, LogitsProcessorList

from sar_fast import SARConfig, apply_sar
from sar_fast.hf import Family, UnsupportedModelError, register_family
from sar_fast.hf.attention import register
from sar_fast.hf.cache_state import state_of
from sar_fast.hf.families import find_family, supported_model_types
from tests.hf.families_table import PAGE, registry_part
from tests.hf.oracle import (
    TEXT_INPUTS,
    Oracle,
    eager_oracle,
    lacking_without_sar,
    required,
    visual_features,
    visual_prior,
)
from tests.hf.test_families import (
    BOUND,
    KINDS,
    ROWS,
    alone,
    assert_close,
    assert_maps_alike,
    config_of,
    logits,
    model_of,
    token_weights,
)
from tests.hf.tiny import CASES, EVERY_CASE, IMAGE, VERSION, VIDEO
from tests.hf.tiny.grids import kimi_video
from tests.hf.tiny.lacks import ANY_PASS, SECOND_TURN, lack_of
from tests.hf.tiny.tiles import onevision


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


# how the model is called


@pytest.mark.everyday(case=KINDS)
def test_vision_tower_under_the_name_sar_too_is_left_alone(case):
    """``set_attn_implementation("sar")`` switches the vision tower too; Qwen, GLM and Kimi leak keywords into it."""
    register()
    batch = case.batch(ROWS)
    with apply_sar(model_of(case.name), config_of(case)):
        want = logits(model_of(case.name), batch)
    model = case.make()
    model.set_attn_implementation("sar")
    with apply_sar(model, config_of(case)):
        assert_close(logits(model, batch), want)


@pytest.mark.everyday(case=KINDS)
def test_positional_input_ids_do_not_turn_sar_off(case):
    model, batch = model_of(case.name), case.batch(ROWS)
    plain = logits(model, batch)
    with apply_sar(model, config_of(case)), torch.no_grad():
        want = model(**batch).logits
        ids = batch.pop("input_ids")
        got = model(ids, **batch).logits
    assert torch.equal(got, want)
    assert not torch.equal(got, plain)


# transformers needs ids for three-dimensional positions: without SAR, too, embeddings give other logits here
POSITIONS_NEED_IDS = ("qwen", "glm")


@pytest.mark.everyday(case=KINDS)
def test_embeddings_instead_of_ids(case):
    """Without ids, placeholders are the positions that hold the placeholder's embedding."""
    model, batch = case.make(), case.batch([1, 1])
    embedded = {n: x for n, x in batch.items() if n != "input_ids"}
    with torch.no_grad():
        embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    if case.name == "llama4":
        with pytest.raises(ValueError, match="both pixel_values and inputs_embeds"):
            logits(model, embedded)
        lacking_without_sar("no pictures with embeddings")
    with apply_sar(model, config_of(case)) as handle:
        want, roles, prior = logits(model, batch), handle.roles, handle.prior
        got = logits(model, embedded)
        assert torch.equal(handle.roles.visual_mask, roles.visual_mask)
        assert torch.equal(handle.roles.text_mask, roles.text_mask)
        assert torch.equal(handle.prior, prior)
    if case.name.startswith(POSITIONS_NEED_IDS):
        assert (logits(model, embedded) - logits(model, batch)).abs().max() > 0.1
    else:
        assert_close(got, want)


@pytest.mark.everyday(case=KINDS)
def test_output_attentions_are_refused_and_rows_are_recorded_instead(case):
    """There is no matrix to return; ``record_rows`` has the attention over visual keys."""
    model, batch = model_of(case.name), case.batch(ROWS)
    with apply_sar(model, config_of(case, record_rows="last_text")) as handle:
        with pytest.raises(ValueError, match="output_attentions must be False"):
            logits(model, batch | {"output_attentions": True})
        logits(model, batch)
        visual = handle.roles.visual_mask
        assert sorted(handle.rows) == handle.sar_layers
        assert (handle.rows[handle.sar_layers[-1]].sum(-1) > 0).all()  # the last layers see everything
        for rows in handle.rows.values():
            assert (rows[~visual[:, None].expand_as(rows)] == 0).all()


@pytest.mark.everyday(case=KINDS)
def test_pictures_encoded_beforehand(case):
    """As ``generate`` does it: features from the model's own method, handed over with the ids."""
    model, batch = model_of(case.name), case.batch(ROWS)
    pixels = {name: x for name, x in batch.items() if name not in TEXT_INPUTS}
    base = getattr(model, "model", model)
    with torch.no_grad():
        before = base.get_image_features(**pixels, **required(model), return_dict=True)
    for name in [name for name in pixels if name in inspect.signature(base.get_image_features).parameters]:
        if "grid" not in name:  # positions need it
            del pixels[name]
    text = {name: x for name, x in batch.items() if name in TEXT_INPUTS} | pixels
    with apply_sar(model, config_of(case)), torch.no_grad():
        want = model(**batch).logits
        arguments = {name: x for name, x in batch.items() if name not in TEXT_INPUTS}
        encoded = base.get_image_features(**arguments, **required(model), return_dict=True)
        if "mm_encoder_outputs" not in inspect.signature(type(base).forward).parameters:  # before 5.18
            with pytest.raises(ValueError, match="of this transformers version would ignore it; pass pixels"):
                model(**text, mm_encoder_outputs={"image": encoded})
            return
        assert_close(model(**text, mm_encoder_outputs={"image": encoded}).logits, want)
        with pytest.raises(ValueError, match="must come whole from the model"):
            model(**text, mm_encoder_outputs={"image": before})


@pytest.mark.everyday(case=KINDS)
def test_base_model_without_a_head(case):
    model, batch = case.make(), case.batch(ROWS)
    base = model.base_model
    with apply_sar(model, config_of(case)), torch.no_grad():
        want = base(**batch)[0]
    with torch.no_grad():
        plain = base(**batch)[0]
    with apply_sar(base, config_of(case)), torch.no_grad():
        got = base(**batch)[0]
    assert torch.equal(got, want)
    assert not torch.equal(got, plain)


# what SAR reads from the model


@pytest.mark.everyday(case=KINDS)
def test_describe_says_what_the_attention_function_gets(case):
    model = model_of(case.name)
    row = alone(case, 0)
    prior = visual_prior(model, row, case.blocks, case.output)
    with eager_oracle(model, ids=row["input_ids"][0], prior=prior, k=1, beta=1.0, attending=case.attending) as oracle:
        logits(model, row)
    q, k, _ = oracle.shapes[case.attending[-1]]
    with apply_sar(model, config_of(case)) as handle:
        found = handle.describe()
    assert (found["num_heads"], found["head_dim"], found["num_kv_heads"]) == (q[1], q[3], k[1])
    assert list(oracle.shapes) == list(case.attending)
    assert found["attention_layers"] == len(case.attending)
    assert found["model_type"] == model.config.model_type


@pytest.mark.everyday(case=KINDS)
def test_k_counts_layers_that_attend(case):
    model = model_of(case.name)
    with pytest.raises(ValueError, match=f"number of attention layers, {len(case.attending)}"):
        apply_sar(model, SARConfig(activation_layer_k=len(case.attending) + 1))


@pytest.mark.everyday(case=KINDS)
def test_projected_prior_is_the_norm_of_what_enters_the_language_model(case):
    model, batch = model_of(case.name), case.batch(ROWS)
    entering = []
    text_model = model.get_decoder()
    hook = text_model.register_forward_pre_hook(
        lambda m, args, kwargs: entering.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with apply_sar(model, config_of(case, prior_source="projected")) as handle:
        logits(model, batch)
    hook.remove()
    norms = entering[0].norm(dim=-1) * (batch["input_ids"] == IMAGE)
    torch.testing.assert_close(handle.prior, norms / norms.sum(-1, keepdim=True))


@pytest.mark.everyday(case=KINDS)
def test_a_map_with_the_wrong_number_of_tokens_is_an_error(case):
    model, batch = model_of(case.name), case.batch(ROWS)
    family = find_family(model.config)
    names = {f: getattr(family, f) for f in ("vision_blocks", "placeholder_ids", "features", "projects_later")}

    def without_first(*given):
        found = family.token_norms(*given)
        return found[1:] if isinstance(found, torch.Tensor) else tuple(x.flatten()[1:] for x in found)

    short = Family("short", (model.config.model_type,), token_norms=without_first, **names)
    register_family(short, replace=True)
    try:
        with (
            apply_sar(model, config_of(case)),
            pytest.raises((RuntimeError, ValueError), match=r"short family maps patches to .*, the model made \d+"),
        ):
            logits(model, batch)
    finally:
        register_family(family, replace=True)


def test_a_block_that_does_not_run_is_an_error():
    """A path to layers outside the vision encoder exists, but gives no prior."""
    model = CASES["llava"].make()
    family = find_family(model.config)
    register_family(Family("elsewhere", ("llava",), ("language_model.layers",), family.token_norms), replace=True)
    try:
        with (
            apply_sar(model, config_of(CASES["llava"])),
            pytest.raises(RuntimeError, match=r"ran 0 times in get_image_features.*elsewhere family"),
        ):
            logits(model, CASES["llava"].batch(ROWS))
    finally:
        register_family(family, replace=True)


def test_generating_with_attentions_is_refused_too():
    case = CASES["llava"]
    model, batch = case.make(), case.batch(ROWS)
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    with apply_sar(model, config_of(case)), pytest.raises(ValueError, match="output_attentions must be False"):
        model.generate(**batch, max_new_tokens=1, **asked)
    model.config._attn_implementation_internal = "eager"  # the flag is not taken beside any other
    model.config.output_attentions = True
    with apply_sar(model, config_of(case)), pytest.raises(ValueError, match="output_attentions must be False"):
        logits(model, batch)


def test_every_registered_model_type_has_a_tiny_model():
    known = {model_type for model_type in supported_model_types() if model_type in CONFIG_MAPPING}
    assert {case.make().config.model_type for case in EVERY_CASE if case.since <= VERSION} == known


@pytest.mark.parametrize("case", [case for case in EVERY_CASE if lack_of(ANY_PASS, case.name)], ids=lambda c: c.name)
def test_models_left_out_do_not_run_without_sar(case):
    with pytest.raises(lack_of(ANY_PASS, case.name).errors):
        logits(case.make(), case.batch(ROWS))
    lacking_without_sar("any pass with pictures")


def test_the_page_of_families_is_that_of_the_registry():
    """Its second half comes from a test run: ``python -m tests.hf.families_table --check``."""
    assert PAGE.read_text().startswith(registry_part())


def test_cross_attention_is_refused_with_the_reason():
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"cross_attention_layers": [1], "vocab_size": 64, "intermediate_size": 32, "pad_token_id": 0}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 28}
    vision |= {"intermediate_size": 32, "patch_size": 14, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    with pytest.raises(UnsupportedModelError, match=r"mllama.*cross-attention layers see visual keys only"):
        apply_sar(model, SARConfig(activation_layer_k=1))


# families whose attention is special


def test_layers_that_compute_only_the_last_query_get_all_of_them():
    """Gemma 4's layers without own keys drop queries when only the last logits are wanted; T is more than those."""
    case = CASES["gemma4-shared-kv"]
    model, batch = model_of(case.name), case.batch(ROWS)
    with apply_sar(model, config_of(case, record=True)) as handle, torch.no_grad():
        want = model(**batch).logits[:, -1:]
        weights = {i: s.head_weights for i, s in handle.stats.items()}
        counts = {i: s.query_count for i, s in handle.stats.items()}
        got = model(**batch, logits_to_keep=1).logits
    assert got.shape == want.shape
    assert_close(got, want)
    for i in weights:
        assert torch.equal(handle.stats[i].query_count, counts[i])
        assert (counts[i] > 1).all()
        torch.testing.assert_close(handle.stats[i].head_weights, weights[i])


def test_variance_is_of_capped_scores():
    case = CASES["paligemma2"]
    model, row = model_of(case.name), alone(case, 0)
    prior = visual_prior(model, row, case.blocks)
    last = case.attending[-1]

    class Uncapped(Oracle):
        def __call__(self, module, *args, softcap=None, **kwargs):
            assert softcap == model.config.text_config.attn_logit_softcapping
            return super().__call__(module, *args, softcap=None if module.layer_idx == last else softcap, **kwargs)

    weights = []
    for oracle in (Oracle, Uncapped):
        with eager_oracle(
            model, ids=row["input_ids"][0], prior=prior, k=1, beta=case.beta, attending=case.attending, kind=oracle
        ) as ran:
            logits(model, row)
        weights.append(ran.weights[last])
    with apply_sar(model, config_of(case, activation_layer_k=1, record=True)) as handle:
        logits(model, row)
    got = handle.stats[last].head_weights[0]
    torch.testing.assert_close(got, weights[0], rtol=1e-3, atol=1e-4)
    assert (got - weights[1]).abs().max() > 0.01


def test_a_prefix_attends_in_both_directions():
    """PaliGemma's modules say ``is_causal=False``: text before the end of the prompt sees later text."""
    case = CASES["paligemma"]
    model, row = model_of(case.name), alone(case, 0)
    other = row | {"input_ids": row["input_ids"].clone()}
    other["input_ids"][0, -1] = 20
    with apply_sar(model, config_of(case)):
        assert (logits(model, row) - logits(model, other))[0, 0].abs().max() > 1e-3


def test_a_packed_image_with_newlines_weighs_patches_as_the_model_does():
    """LLaVA-OneVision shrinks large pictures by interpolation; newline tokens stand for no patch."""
    case = CASES["llava_onevision"]
    for aspect in ("anyres_max_9", "anyres_max_1"):
        model = onevision(aspect)
        row = {n: x for n, x in case.batch([2]).items() if n not in ("input_ids", "attention_mask")}
        leaves = []

        def cut(module, args, output, leaves=leaves):
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        hook = model.model.multi_modal_projector.register_forward_hook(cut)
        features = visual_features(model, row)
        hook.remove()
        own = torch.stack(
            [torch.autograd.grad(f[0], leaves[0], retain_graph=True)[0][..., 0].flatten() for f in features]
        )
        got = token_weights(model, case, row)
        torch.testing.assert_close(got, own)
        sums = got.sum(-1)
        assert ((sums - 1).abs() < 1e-5).any()
        assert (sums == 0).any()  # newlines
        if aspect == "anyres_max_1":
            assert ((got > 0) & (got < 0.999)).any()  # interpolated


def test_several_pictures_in_a_row_are_not_cut_into_tiles():
    """LLaVA-OneVision with ``batch_num_images``: a row's single picture is tiled, others are one tile and a newline."""
    case = CASES["llava_onevision"]
    batch = case.batch(ROWS)
    batch["batch_num_images"] = torch.tensor(ROWS)
    model = model_of(case.name)
    assert_maps_alike(model, case, batch)
    with torch.no_grad():
        features = visual_features(model, batch)
    assert len(features) == (batch["input_ids"][0] == IMAGE).sum() + 2 * 17


# generation


class Force(LogitsProcessor):
    """Generate one token only."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


@pytest.mark.everyday(case=KINDS)
def test_a_generated_placeholder_is_no_picture(case):
    """Roles are never read from ids that the model made up."""
    model, batch = model_of(case.name), case.batch(ROWS)
    with apply_sar(model, config_of(case, activation_layer_k=1, record=True)) as handle:
        logits(model, batch)
        last = handle.sar_layers[-1]
        prompt = handle.stats[last].query_count.clone()
        out = model.generate(
            **batch,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            logits_processor=LogitsProcessorList([Force(IMAGE)]),
            return_dict_in_generate=True,
        )
        assert (out.sequences[:, -4:] == IMAGE).all()
        state = state_of(out.past_key_values)
        assert state.visual_mask.sum() == (batch["input_ids"] == IMAGE).sum()
        assert torch.equal(handle.stats[last].query_count, prompt + 3)  # the fourth never became a query


@pytest.mark.everyday(case=KINDS)
def test_beams_of_a_batch_equal_rows_alone(case):
    model, batch = model_of(case.name), case.batch(ROWS)
    options = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "suppress_tokens": [2, IMAGE, VIDEO]}
    rows = [alone(case, b) for b in range(len(ROWS))]
    if case.name == ("exaone4_5" if VERSION < (5, 18) else "llama4"):
        with pytest.raises(RuntimeError if VERSION < (5, 18) else ValueError):
            model.generate(**batch, **options)
        lacking_without_sar("pictures are not repeated for beams")
    with apply_sar(model, config_of(case)):
        together = model.generate(**batch, **options)[:, -4:]
        apart = torch.cat([model.generate(**row, **options)[:, -4:] for row in rows])
    assert torch.equal(together, apart)


def conversation(case, model):
    """Two turns of one picture each, apart and as one prompt; positions where ids alone would not give them."""
    first, second = alone(case, 0, [1, 1]), alone(case, 1, [1, 1])
    along = lambda name: (
        1 if name in TEXT_INPUTS or case.name in ("idefics3", "smolvlm") else 0
    )  # pictures by row there
    whole = {name: torch.cat([first[name], second[name]], along(name)) for name in first}
    if case.name.startswith(POSITIONS_NEED_IDS):
        grids = {"image_grid_thw": whole["image_grid_thw"], "mm_token_type_ids": whole["mm_token_type_ids"]}
        positions, _ = model.model.get_rope_index(whole["input_ids"], **grids)
        second["position_ids"] = positions[..., first["input_ids"].shape[1] :]
    return first, second, whole


@pytest.mark.everyday(case=KINDS)
def test_a_second_picture_on_a_cache_equals_the_whole_conversation(case):
    """With SAR on the last layer alone, earlier positions do not depend on the weights, so both ways must agree."""
    model = case.make()
    first, second, whole = conversation(case, model)

    def both():
        with torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            turn = model(**second, past_key_values=cache, use_cache=True).logits
            return turn, model(**whole).logits[:, -turn.shape[1] :]

    turn, together = both()
    error = (turn - together).abs().max()
    if lack_of(SECOND_TURN, case.name):
        assert error > 0.1
        lacking_without_sar("another turn on a cache")
    assert error <= 1e-3
    plain = turn
    with apply_sar(model, config_of(case, activation_layer_k=1)):
        turn, together = both()
    assert (turn - together).abs().max() <= BOUND * together.abs().max() + 2 * error
    assert (turn - plain).abs().max() > 10 * (BOUND * together.abs().max() + 2 * error)


@pytest.mark.everyday(case=KINDS)
def test_decoding_by_hand_with_a_padded_mask(case):
    """One step on the cache; models with three-dimensional positions cannot take a two-dimensional mask there."""
    model, batch = case.make(), case.batch(ROWS)
    ids = torch.full((len(ROWS), 1), 20)
    step = {"input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(ids)], 1)}
    if case.name.startswith(POSITIONS_NEED_IDS):
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match=r"[Ss]izes? of tensor"):
            logits(model, step | {"past_key_values": cache})
        lacking_without_sar("positions get the mask's length")
    with apply_sar(model, config_of(case, record=True)) as handle, torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        before = {i: s.query_count for i, s in handle.stats.items()}
        logits(model, step | {"past_key_values": cache})
        last = handle.sar_layers[-1]
        assert torch.equal(handle.stats[last].query_count, before[last] + 1)


@pytest.mark.skipif(not (5, 13) <= VERSION < (5, 24), reason="Kimi K2.5 came with 5.13, and 5.24 takes such clips")
def test_a_clip_of_several_frames_fails_in_transformers():
    """Kimi K2.5: tokens are means over the frames, but the features are split as if there were one per frame."""
    case, row = CASES["kimi_k25"], kimi_video(3)
    with pytest.raises(RuntimeError, match="split_sizes"):
        logits(model_of(case.name), row)


# precision


@pytest.mark.everyday(case=KINDS)
def test_bf16_errors_are_those_of_bf16(case):
    """SAR in bf16 against fp32 errs as plain attention does; beta is large enough not to amplify it."""
    batch = case.batch(ROWS)
    real = batch["attention_mask"].bool()
    model, narrow = model_of(case.name), case.make().to(torch.bfloat16)
    small = {n: x.bfloat16() if x.is_floating_point() else x for n, x in batch.items()}
    plain_error = (logits(narrow, small).float() - logits(model, batch))[real].abs().mean()
    config = config_of(case, beta=0.5)
    with apply_sar(model, config), apply_sar(narrow, config):
        error = (logits(narrow, small).float() - logits(model, batch))[real].abs().mean()
    assert error <= 2 * plain_error + BOUND
