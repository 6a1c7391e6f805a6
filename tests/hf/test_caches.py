"""Every cache and decoding strategy of generate(), in every decode mode, against an oracle that decodes eagerly."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.cache_state import state_of
from tests.hf.generation_oracle import decode_oracle
from tests.hf.oracle import lacking_without_sar
from tests.hf.tiny import IMAGE, MODELS, VERSION, VIDEO, VOCAB, llava, llava_batch
from tests.hf.tiny.base import build, text, vision

BETA = 0.02
NEW = 6
MODES = ["running", "step", "prompt"]
IMAGES = [1, 2, 0]


def sliding_llava(window=20, full_layers=0):
    """LLaVA with a language model whose window is shorter than its prompts; its first ``full_layers`` see all."""
    return build(
        "llava",
        vision_config=vision("clip_vision_model"),
        text_config=text("qwen2", use_sliding_window=True, sliding_window=window, max_window_layers=full_layers),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


FAMILIES = {**MODELS, "sliding": (sliding_llava, llava_batch)}


@pytest.fixture(params=list(FAMILIES))
def family(request):
    make, batch = FAMILIES[request.param]
    return make(), batch


@pytest.fixture
def model():
    return llava()


REPEATS_ROWS = VERSION >= (5, 18)  # num_return_sequences: older ones repeat pictures one by one, not row by row
NO_PLACEHOLDERS = {"suppress_tokens": [IMAGE, VIDEO]}  # which a prompt of its own would take for pictures


def row_of(batch_of, images, b):
    """Row b of a batch by itself, without padding."""
    row = batch_of([images[b]], first_image=sum(images[:b]))
    return {name: x for name, x in row.items() if name != "attention_mask"}


def generate(model, batch, new=NEW, **options):
    """(tokens (B, new), logits (B, new, vocabulary)) of greedy decoding, or as ``options`` say."""
    out = model.generate(
        **batch,
        **{"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, **options},
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def assert_same(got, want):
    """Tokens equal, logits within 1e-4 of the largest."""
    assert torch.equal(got[0], want[0])
    assert (got[1] - want[1]).abs().max() <= 1e-4 * want[1].abs().max()


def config_of(mode, k=3):
    return SARConfig(activation_layer_k=k, beta=BETA, decode=mode)


def oracle_generate(model, row, mode, k=3, **options):
    with decode_oracle(model, row, k=k, beta=BETA, mode=mode):
        return generate(model, row, **options)


# caches


@pytest.mark.everyday(mode=["running"], cache=["dynamic"])
@pytest.mark.everyday(family=["sliding"], cache=["static"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_batch_equals_the_oracle_of_each_row(family, mode, cache):
    model, batch_of = family
    with apply_sar(model, config_of(mode)):
        tokens, logits = generate(model, batch_of(IMAGES), cache_implementation=cache)
    for b in range(len(IMAGES)):
        want = oracle_generate(model, row_of(batch_of, IMAGES, b), mode)
        assert_same((tokens[b : b + 1], logits[b : b + 1]), want)


@pytest.mark.everyday(mode=["running"])
@pytest.mark.everyday(mode=["prompt"], full_layers=[1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("full_layers", [0, 1])
def test_sliding_static_cache_that_rolls(mode, full_layers):
    """A prompt shorter than the window and an answer that goes beyond it: keys stop being at their positions."""
    model = sliding_llava(window=30, full_layers=full_layers)
    row = row_of(llava_batch, [1], 0)
    want = oracle_generate(model, row, mode, new=16)
    with apply_sar(model, config_of(mode)):
        assert_same(generate(model, row, new=16, cache_implementation="static"), want)
        assert_same(generate(model, row, new=16), want)


def skip_without_fp8(model):
    try:
        QuantizedCache("fp8", config=model.config.get_text_config())
    except ValueError as error:
        pytest.skip(f"this transformers has no fp8 cache: {error}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["fp8", "quanto"])
def test_quantized_cache(model, mode, backend):
    """fp8 needs no package. hqq's codes come from an iteration that turns rounding errors into other codes."""
    if backend == "fp8":
        skip_without_fp8(model)
    else:
        pytest.importorskip("optimum.quanto", reason="the quanto cache needs the package optimum-quanto")
    row = row_of(llava_batch, [2], 0)
    options = (
        {"backend": backend} if backend == "fp8" else {"backend": backend, "q_group_size": 16, "residual_length": 4}
    )
    quantized = {"cache_implementation": "quantized", "cache_config": options}
    want = oracle_generate(model, row, mode, **quantized)
    with apply_sar(model, config_of(mode)):
        assert_same(generate(model, row, **quantized), want)
        exact = generate(model, row)[1]
    assert (exact - want[1]).abs().max() > 1e-3  # it is a quantized cache


@pytest.mark.parametrize("mode", MODES)
def test_quantized_cache_is_reordered_with_its_state(model, mode):
    skip_without_fp8(model)
    row = row_of(llava_batch, [1], 0)
    with apply_sar(model, config_of(mode)), torch.no_grad():
        cache = QuantizedCache("fp8", config=model.config.get_text_config())
        logits = model(**row, past_key_values=cache).logits
        want = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([0]))
        token = logits[:, -1:].argmax(-1)
        assert torch.equal(
            model(input_ids=token, past_key_values=cache).logits, model(input_ids=token, past_key_values=want).logits
        )


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", MODES)
def test_without_a_cache_every_step_is_a_prompt_of_its_own(family, mode):
    """use_cache=False: the logits of every step are those of a plain forward pass on all tokens so far."""
    model, batch_of = family
    batch = batch_of(IMAGES)
    length = batch["input_ids"].shape[1]
    with apply_sar(model, config_of(mode)), torch.no_grad():
        tokens, logits = generate(model, batch, new=3, use_cache=False, **NO_PLACEHOLDERS)
        for step in range(3):
            grown = dict(batch)
            for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("input_ids", None)):
                if name in batch:
                    new = tokens[:, :step] if fill is None else torch.full_like(tokens[:, :step], fill)
                    grown[name] = torch.cat([batch[name], new.to(batch[name].dtype)], 1)
            want = model(**grown, use_cache=False).logits[:, length + step - 1]
            assert (logits[:, step] - want).abs().max() <= 1e-4 * want.abs().max()


def test_without_a_cache_equals_the_cache_with_one_layer(family):
    """What enters the last layer does not depend on its weights, so recomputing must give the running means."""
    model, batch_of = family
    with apply_sar(model, config_of("running", k=1)):
        want = generate(model, batch_of(IMAGES), **NO_PLACEHOLDERS)
        assert_same(generate(model, batch_of(IMAGES), use_cache=False, **NO_PLACEHOLDERS), want)


# strategies


def moved_copy(model, noise=0.0):
    """An assistant: the same weights, moved by ``noise``."""
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in assistant.parameters():
            p += noise * torch.randn(p.shape, generator=generator)
    return assistant


@pytest.fixture
def drafts(monkeypatch):
    """(drafted, kept) tokens of every check of a draft."""
    from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

    counts = []
    for cls in (AssistedCandidateGenerator, PromptLookupCandidateGenerator):
        update = cls.update_candidate_strategy

        def counted(self, input_ids, scores, num_matches, update=update):
            counts.append((scores.shape[1] - 1, int(num_matches)))
            return update(self, input_ids, scores, num_matches)

        monkeypatch.setattr(cls, "update_candidate_strategy", counted)
    return counts


@pytest.mark.everyday(mode=["running"])
@pytest.mark.everyday(family=["llava"])
@pytest.mark.parametrize("mode", MODES)
def test_assisted_decoding_equals_greedy(family, mode, drafts):
    """The assistant does not see the picture, so its drafts are poor."""
    model, batch_of = family
    old = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)
    if old and getattr(model.config.text_config, "use_sliding_window", False):
        pytest.skip("seen with 5.17: an assistant's own sliding cache outgrows its mask, with SDPA as well")
    row = row_of(batch_of, [1], 0)
    assistant = moved_copy(model, 0.02)
    with apply_sar(model, config_of(mode)), apply_sar(assistant, config_of(mode)):
        want = generate(model, row, new=12)
        assert_same(generate(model, row, new=12, assistant_model=assistant), want)
    assert any(kept < drafted for drafted, kept in drafts)


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", MODES)
def test_prompt_lookup_equals_greedy(model, mode, drafts):
    row = row_of(llava_batch, [1], 0)
    row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[30, 31, 30, 31, 30, 31, 30]])], 1)
    with apply_sar(model, config_of(mode)):
        want = generate(model, row, new=12)
        assert_same(generate(model, row, new=12, prompt_lookup_num_tokens=3), want)
    assert any(kept < drafted for drafted, kept in drafts)


class KnownAnswer:
    """A candidate generator whose drafts are the answer itself, every fifth token wrong."""

    requires_model_outputs = False

    def __init__(self, answer, prompt_length):
        self.answer, self.prompt_length = answer, prompt_length
        self.counts = []

    def get_candidates(self, input_ids, **kwargs):
        at = input_ids.shape[1] - self.prompt_length
        draft = self.answer[:, at : at + 3].clone()
        draft[:, [i for i in range(draft.shape[1]) if (at + i) % 5 == 4]] += 1
        return torch.cat([input_ids, draft], 1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        self.counts.append((scores.shape[1] - 1, int(num_matches)))


@pytest.mark.everyday(mode=["running"])
@pytest.mark.everyday(family=["llava"])
@pytest.mark.parametrize("mode", MODES)
def test_drafts_that_are_mostly_right_change_nothing(family, mode, monkeypatch):
    """Accepted and dropped tokens, in the prompt's pass and later ones: token by token what greedy decoding gives."""
    model, batch_of = family
    row = row_of(batch_of, [1], 0)
    with apply_sar(model, config_of(mode)):
        want = generate(model, row, new=12)
        known = KnownAnswer(want[0], row["input_ids"].shape[1])
        monkeypatch.setattr(type(model), "_get_candidate_generator", lambda self, **kwargs: known)
        assert_same(generate(model, row, new=12, prompt_lookup_num_tokens=3), want)
    assert {kept for _, kept in known.counts} >= {1, 3}


def test_first_check_of_a_draft_does_not_count_it_as_the_prompt(model):
    """generate() feeds prompt and first draft together; the prompt's weights must not see the draft."""
    row = row_of(llava_batch, [1], 0)
    length = row["input_ids"].shape[1]
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, decode="prompt")):
        cache = DynamicCache(config=model.config.get_text_config())
        model.generate(**row, past_key_values=cache, max_new_tokens=4, assistant_model=moved_copy(model))
        assisted = state_of(cache).layers[3]
        with torch.no_grad():
            plain = state_of(model(**row, use_cache=True).past_key_values).layers[3]
    assert int(assisted.count) == int(plain.count) == length - 19
    torch.testing.assert_close(assisted.head_weights, plain.head_weights)


def test_assisted_decoding_leaves_no_trace_on_the_model(model):
    row = row_of(llava_batch, [1], 0)
    names = set(model.__dict__)
    with apply_sar(model, config_of("running")):
        generate(model, row, assistant_model=moved_copy(model, 0.02))
    assert set(model.__dict__) == names


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", MODES)
def test_sampled_sequences_have_the_oracles_logits(model, mode):
    """num_return_sequences: each sampled sequence's logits, against the oracle fed with the same tokens."""
    pictures = [1, 2] if REPEATS_ROWS else [1, 1]
    with apply_sar(model, config_of(mode)):
        torch.manual_seed(0)
        tokens, logits = generate(model, llava_batch(pictures), do_sample=True, num_return_sequences=2, top_k=0)
    assert not torch.equal(tokens[0], tokens[1])
    for b in range(4):
        row = row_of(llava_batch, pictures, b // 2)
        with decode_oracle(model, row, k=3, beta=BETA, mode=mode), torch.no_grad():
            cache = DynamicCache(config=model.config.get_text_config())
            out = model(**row, past_key_values=cache)
            for step in range(NEW):
                want = out.logits[:, -1]
                assert (logits[b, step] - want).abs().max() <= 1e-4 * want.abs().max()
                out = model(input_ids=tokens[b : b + 1, step : step + 1], past_key_values=cache)


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", MODES)
def test_beams_in_a_batch_equal_beams_alone(family, mode):
    model, batch_of = family
    with apply_sar(model, config_of(mode)):
        together, _ = generate(model, batch_of([1, 2]), num_beams=3, num_return_sequences=2)
        for b in range(2):
            alone, _ = generate(model, row_of(batch_of, [1, 2], b), num_beams=3, num_return_sequences=2)
            assert torch.equal(alone, together[2 * b : 2 * b + 2])


def test_one_beam_scores_what_the_oracle_scores(model):
    """Beam search's own score of its answer, recomputed from the oracle's logits on that answer."""
    row = row_of(llava_batch, [1], 0)
    with apply_sar(model, config_of("running")):
        out = model.generate(
            **row,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            num_beams=3,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
    answer = out.sequences[:, row["input_ids"].shape[1] :]
    score = 0.0
    with decode_oracle(model, row, k=3, beta=BETA, mode="running"), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        logits = model(**row, past_key_values=cache).logits
        for step in range(NEW):
            log_probs = logits[0, -1].log_softmax(-1)
            if step < NEW:
                score += log_probs[answer[0, step]].item()
            logits = model(input_ids=answer[:, step : step + 1], past_key_values=cache).logits
    assert out.sequences_scores[0].item() == pytest.approx(score, rel=1e-4)


# state on the cache


def step(model, cache, token, rows=1):
    with torch.no_grad():
        return model(input_ids=torch.full((rows, 1), token), past_key_values=cache).logits


@pytest.mark.parametrize("mode", MODES)
def test_one_prompt_serves_several_continuations(model, mode):
    """A prompt is encoded once, its cache copied, repeated and cropped: all as if it were encoded for each."""
    row = row_of(llava_batch, [1], 0)
    with apply_sar(model, config_of(mode)), torch.no_grad():
        prompt = model(**row, use_cache=True).past_key_values
        length = prompt.get_seq_length()
        want = [step(model, copy.deepcopy(prompt), token) for token in (20, 21)]
        several = copy.deepcopy(prompt)
        several.batch_repeat_interleave(2)
        ids = torch.tensor([[20], [21]])
        got = model(input_ids=ids, past_key_values=several).logits
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
        several.crop(length - several.get_seq_length())
        several.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(step(model, several, 20), want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_trap9_rows_of_different_samples_take_their_weights_with_them(model, mode):
    batch = llava_batch([1, 2], "left")
    with apply_sar(model, config_of(mode)), torch.no_grad():
        logits = []
        for rows in ([0, 1], [1, 0], [1, 1, 0]):
            cache = model(**batch, use_cache=True).past_key_values
            cache.batch_select_indices(torch.tensor(rows))
            mask = torch.cat([batch["attention_mask"][rows], torch.ones(len(rows), 1, dtype=torch.long)], 1)
            ids = torch.full((len(rows), 1), 20)
            logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0][[1, 0]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[2], logits[0][[1, 1, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["running", "step"])
def test_trap10_second_image_on_a_cache_is_found_at_its_position(model, mode):
    first, second = [5, 6] + [IMAGE] * 16 + [7, 8], [10] + [IMAGE] * 16 + [12, 13]
    pixels = torch.randn(2, 3, 16, 16)
    with apply_sar(model, config_of(mode)) as handle, torch.no_grad():
        cache = model(input_ids=torch.tensor([first]), pixel_values=pixels[:1], use_cache=True).past_key_values
        model(input_ids=torch.tensor([second]), pixel_values=pixels[1:], past_key_values=cache)
        state = state_of(cache)
        whole = torch.tensor([first + second]) == IMAGE
        assert torch.equal(state.visual_mask, whole)
        norms = state.norms[whole]
        assert int(state.layers[3].count) == 2  # T starts afresh after the newest picture
        model(input_ids=torch.tensor([first + second]), pixel_values=pixels, use_cache=False)
        torch.testing.assert_close(norms / norms.sum(), handle.prior[whole])


def test_trap8_generated_image_token_is_no_picture(model):
    """The image token's id comes out of generate(): neither V nor the number of features may change."""
    row = row_of(llava_batch, [1], 0)
    bias = {"sequence_bias": [[[IMAGE], 100.0]]}
    with apply_sar(model, config_of("running")) as handle:
        tokens, logits = generate(model, row, **bias)
        assert (tokens == IMAGE).all()
        assert int(handle.roles.visual_mask.sum()) == 16
    want = oracle_generate(model, row, "running", **bias)
    assert_same((tokens, logits), want)


def test_trap13_output_attentions_is_an_error_not_an_empty_tuple(model):
    with (
        apply_sar(model, config_of("running")),
        pytest.raises(ValueError, match=r"output_attentions.*record_rows"),
        torch.no_grad(),
    ):
        model(**row_of(llava_batch, [1], 0), output_attentions=True)


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", MODES)
def test_many_steps_of_beam_search_keep_one_snapshot(model, mode):
    """Reordering every step must not grow with the answer."""
    cache = DynamicCache(config=model.config.get_text_config())
    with apply_sar(model, config_of(mode)):
        generate(model, row_of(llava_batch, [1], 0), new=12, num_beams=2, past_key_values=cache)
    assert all(len(log) <= 2 for log in state_of(cache).snapshots.values())


# refused


@pytest.mark.parametrize("mode", MODES)
def test_prefill_chunk_size_is_an_error(model, mode):
    with apply_sar(model, config_of(mode)), pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, row_of(llava_batch, [1], 0), prefill_chunk_size=8)


def test_prefill_chunk_size_of_text_alone_is_plain(model):
    row = row_of(llava_batch, [0], 0)
    plain = generate(model, row, prefill_chunk_size=4)
    with apply_sar(model, config_of("running")):
        assert_same(generate(model, row, prefill_chunk_size=4), plain)


def test_static_cache_is_reused_after_a_reset(model):
    row = row_of(llava_batch, [2], 0)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=80)
    with apply_sar(model, config_of("running")), torch.no_grad():
        out = [model(**row, past_key_values=cache).logits, step(model, cache, VOCAB - 1)]
        cache.reset()
        again = [model(**row, past_key_values=cache).logits, step(model, cache, VOCAB - 1)]
    for a, b in zip(out, again):
        assert torch.equal(a, b)


def test_continuous_batching_is_an_error_that_says_so(model):
    from transformers import GenerationConfig

    options = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=2, pad_token_id=0)
    if VERSION < (5, 9):
        with pytest.raises(AttributeError):
            model.generate_batch([[5, 6, 7, 8]], generation_config=options, progress_bar=False)
        lacking_without_sar("no continuous batching of multimodal models")
    with apply_sar(model, config_of("running")):
        small = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # not what memory there is
        results = model.generate_batch([[5, 6, 7, 8]], options, small, progress_bar=False)
    (result,) = results.values()
    assert ("continuous batching" if VERSION >= (5, 18) else "not 'sar'") in result.error
    assert "remove_sar" in result.error
    assert result.generated_tokens == []


def test_static_cache_decode_steps_get_masks_of_one_size():
    """generate() makes them outside the compiled step: one that grows would compile it again for every token."""
    model, batch, shapes = llava(), llava_batch([1, 2]), []
    seen = lambda module, args, given: shapes.append((given["input_ids"].shape[1], given["attention_mask"].shape[1]))
    with apply_sar(model, SARConfig(activation_layer_k=3)):
        model.model.register_forward_pre_hook(seen, with_kwargs=True)
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, cache_implementation="static", disable_compile=True)
    prompt, *steps = shapes
    assert prompt[0] == batch["input_ids"].shape[1]
    assert steps == [(1, prompt[0] + 3)] * 3
