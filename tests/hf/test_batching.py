"""Rows in a batch, rows packed into one, and embeddings instead of ids: each sample as if it were alone."""

from __future__ import annotations

import pytest
import torch

from sar_fast import SARConfig, apply_sar
from sar_fast.hf import mask_function
from tests.hf.generation_oracle import decode_oracle, prior_of
from tests.hf.oracle import eager_oracle, refuse_one_graph
from tests.hf.test_caches import sliding_llava
from tests.hf.tiny import CASES, IMAGE, MODELS, llava, llava_batch, qwen2_5_vl, qwen_batch

BETA = 0.02
IMAGES = [1, 2, 0, 1]


@pytest.fixture(params=list(MODELS))
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def row_of(batch_of, images, b):
    row = batch_of([images[b]], first_image=sum(images[:b]))
    return {name: x for name, x in row.items() if name != "attention_mask"}


def oracle_logits(model, row, k=3):
    """(S, vocabulary) logits of one sample, every matrix materialised."""
    with eager_oracle(model, ids=row["input_ids"][0], prior=prior_of(model, row), k=k, beta=BETA):
        return logits(model, row)[0]


def assert_close(got, want):
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def pack(rows):
    """One row that holds all of ``rows``, and the lengths. Positions restart with every sequence."""
    lengths = [row["input_ids"].shape[1] for row in rows]
    packed = {"input_ids": torch.cat([row["input_ids"] for row in rows], 1)}
    pictures = [row["pixel_values"] for row in rows if "pixel_values" in row]
    if pictures:
        packed["pixel_values"] = torch.cat(pictures)
    if any("image_grid_thw" in row for row in rows):
        packed["image_grid_thw"] = torch.cat([row["image_grid_thw"] for row in rows if "image_grid_thw" in row])
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    return packed, lengths


def lengths_kwargs(lengths):
    """The packing as FlashAttention's keyword arguments say it."""
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def mrope(model, rows):
    """Four rows of positions for packed Qwen input: the text's, then the rotary embedding's three, per sequence."""
    parts = []
    for row in rows:
        n = row["input_ids"].shape[1]
        rotary, _ = model.model.get_rope_index(
            row["input_ids"], mm_token_type_ids=row["mm_token_type_ids"], image_grid_thw=row.get("image_grid_thw")
        )
        parts.append(torch.cat([torch.arange(n)[None, None], rotary]))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_with_several_pictures_equal_the_oracle(family, side):
    model, batch_of = family
    batch = batch_of(IMAGES, side)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        got = logits(model, batch)
    for b in range(len(IMAGES)):
        assert_close(got[b][batch["attention_mask"][b].bool()], oracle_logits(model, row_of(batch_of, IMAGES, b)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_trap1_padding_reaches_the_attention_function(family, side):
    """Without a registered mask function the padding is lost silently: text alone, K = 0, must equal SDPA."""
    model, batch_of = family
    batch = batch_of([0, 2, 0], side)
    real = batch["attention_mask"].bool()
    want = logits(model, batch)
    with apply_sar(model, SARConfig(activation_layer_k=0)):
        assert_close(logits(model, batch)[real], want[real])
    if side == "left":  # the mask does matter here
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        assert (logits(model, batch)[real] - want[real]).abs().max() > 0.05


def test_trap3_the_vision_tower_keeps_its_attention(family, monkeypatch):
    """Only the text model may run "sar": the vision blocks' attention is SDPA, whatever keywords reach it."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, batch_of = family
    seen = []

    def spy(module, *args, **kwargs):
        seen.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", spy)
    with apply_sar(model, SARConfig(activation_layer_k=2)) as handle:
        logits(model, batch_of([1]))
        assert model.config.vision_config._attn_implementation == model.config._attn_implementation == "sdpa"
        assert set(seen) == {m for m in handle.layout.vision_blocks.modules() if type(m).__name__.endswith("Attention")}


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences_equal_the_oracle_of_each(how, use_cache):
    model = llava()
    rows = [row_of(llava_batch, IMAGES, b) for b in range(len(IMAGES))]
    packed, lengths = pack(rows)
    if how != "position_ids":
        packed |= lengths_kwargs(lengths)
    if how == "cu_seq_lens":
        del packed["position_ids"]  # rotary embeddings only see differences
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, record=True)) as handle:
        got = logits(model, packed | {"use_cache": use_cache})[0].split(lengths)
        assert handle.stats[3].head_weights.shape == (4, 4)
        assert (handle.stats[3].query_count == 0).tolist() == [n == 0 for n in IMAGES]
        sums = [prior.sum() for prior in handle.prior[0].split(lengths)]
        torch.testing.assert_close(torch.stack(sums), torch.tensor([1.0, 1.0, 0.0, 1.0]))
        assert [int(t.sum()) for t in handle.roles.text_mask[0].split(lengths)] == [8, 9, 0, 8]
    for b, row in enumerate(rows):
        assert_close(got[b], oracle_logits(model, row))


def test_packed_qwen_with_four_rows_of_positions():
    model = qwen2_5_vl()
    rows = [row_of(qwen_batch, IMAGES, b) for b in range(len(IMAGES))]
    packed, lengths = pack(rows)
    packed["position_ids"] = mrope(model, rows)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        got = logits(model, packed)[0].split(lengths)
        for b, row in enumerate(rows):
            assert_close(got[b], logits(model, row)[0])
    for b, row in enumerate(rows):
        assert_close(got[b], oracle_logits(model, row))


def test_packed_qwen_with_three_rows_is_an_error():
    """transformers cannot see the packing in the rotary rows alone, and would attend across sequences."""
    model = qwen2_5_vl()
    rows = [row_of(qwen_batch, IMAGES, b) for b in range(2)]
    packed, _ = pack(rows)
    packed["position_ids"] = mrope(model, rows)[1:]
    with apply_sar(model, SARConfig(activation_layer_k=2)), pytest.raises(ValueError, match=r"position_ids.*four rows"):
        logits(model, packed)


def test_packed_rows_of_a_batch_are_packed_each():
    model = llava()
    rows = [row_of(llava_batch, [1, 0, 0, 1], b) for b in range(4)]
    first, lengths = pack(rows[:2])
    second, _ = pack(rows[:1:-1])  # the other way round: the same lengths' sum
    second, other = pack([rows[3], rows[2]])
    assert sum(lengths) == sum(other)
    batch = {name: torch.cat([first[name], second[name]]) for name in first}
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        got = logits(model, batch)
    for part, row in zip(got[0].split(lengths), rows[:2]):
        assert_close(part, oracle_logits(model, row))
    for part, row in zip(got[1].split(other), (rows[3], rows[2])):
        assert_close(part, oracle_logits(model, row))


@pytest.mark.everyday(how=["both"], window=[20], use_cache=[False])
@pytest.mark.everyday(how=["position_ids"], full_layers=[2])
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("full_layers", [0, 2])
@pytest.mark.parametrize("window", [20, 500])
def test_packed_sequences_in_a_sliding_window(how, use_cache, full_layers, window, monkeypatch):
    """Layers with a window and without, each with its own mask; windows count inside each sequence."""
    model = sliding_llava(window, full_layers)
    rows = [row_of(llava_batch, IMAGES, b) for b in range(len(IMAGES))]
    packed, lengths = pack(rows)
    if how != "position_ids":
        packed |= lengths_kwargs(lengths)
    if how == "cu_seq_lens":
        del packed["position_ids"]
    refuse_dense_masks(monkeypatch)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        got = logits(model, packed | {"use_cache": use_cache})[0].split(lengths)
    monkeypatch.undo()
    for b, row in enumerate(rows):
        assert_close(got[b], oracle_logits(model, row))


@pytest.mark.skipif("llama4" not in CASES, reason="this transformers cannot run Llama 4")
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences_in_chunks_equal_rows_alone(use_cache, monkeypatch):
    case = CASES["llama4"]
    model = case.make()
    rows = [row_of(case.batch, IMAGES, b) for b in range(len(IMAGES))]
    packed, lengths = pack(rows)
    refuse_dense_masks(monkeypatch)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=case.beta)):
        got = logits(model, packed | {"use_cache": use_cache})[0].split(lengths)
        for b, row in enumerate(rows):
            assert_close(got[b], logits(model, row)[0])


def refuse_dense_masks(monkeypatch):
    def dense(**kwargs):
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(mask_function, "sdpa_mask", dense)


def test_packed_plain_causal_never_builds_a_dense_mask(monkeypatch):
    refuse_dense_masks(monkeypatch)
    packed, _ = pack([row_of(llava_batch, IMAGES, b) for b in range(2)])
    with apply_sar(llava(), SARConfig(activation_layer_k=3)) as handle:
        logits(handle.model, packed | {"use_cache": False})


@pytest.mark.parametrize("sav_grad", [False, True])
def test_packed_gradients_equal_those_of_the_rows(sav_grad):
    model = llava()
    rows = [row_of(llava_batch, IMAGES, b) for b in range(len(IMAGES))]
    packed, _ = pack(rows)

    def gradients(batches):
        model.zero_grad(set_to_none=True)
        for batch in batches:
            model(**batch, use_cache=False).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, sav_grad=sav_grad)):
        want, got = gradients(rows), gradients([packed])
    for name in want:
        bound = 1e-4 * want[name].abs().max() + 1e-4
        assert (got[name] - want[name]).abs().max() <= bound, name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_under_torch_compile(how):
    """Positions break the graph once, where they are read; the sequences, their weights and gradients stay apart."""
    model = llava().train()
    packed, lengths = pack([row_of(llava_batch, IMAGES, b) for b in range(len(IMAGES))])
    if how == "cu_seq_lens":
        del packed["position_ids"]
        packed |= lengths_kwargs(lengths)

    def logits_and_gradients(called):
        model.zero_grad(set_to_none=True)
        out = called(**packed, use_cache=False).logits
        out.square().sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, sav_grad=True)) as handle:
        want, gradients = logits_and_gradients(model)
        torch._dynamo.reset()
        got, compiled = logits_and_gradients(torch.compile(model, backend="eager"))
        assert [int(t.sum()) for t in handle.roles.text_mask[0].split(lengths)] == [8, 9, 0, 8]
    assert_close(got, want)
    assert compiled.keys() == gradients.keys()
    for name in gradients:
        assert (compiled[name] - gradients[name]).abs().max() <= 1e-4 * gradients[name].abs().max() + 1e-4, name


@pytest.mark.slow  # every day whole models in one graph, in test_training_compile.py
def test_position_ids_that_one_graph_cannot_read_are_an_error():
    """``fullgraph=True`` leaves no room to look at them; a mask says that the row is not packed."""
    model = llava()
    row = row_of(llava_batch, IMAGES, 0)
    row["position_ids"] = torch.arange(row["input_ids"].shape[1])[None]
    row["use_cache"] = False  # a cache of its own cannot be traced
    masked = row | {"attention_mask": torch.ones_like(row["input_ids"])}
    refuse_one_graph(model, masked)
    with apply_sar(model, SARConfig(activation_layer_k=2)):
        want = logits(model, masked)  # transformers cannot trace a model's very first call
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"fullgraph=True pass cu_seq_lens_q"):
            logits(compiled, row)
        torch._dynamo.reset()
        assert_close(logits(compiled, masked), want)


def test_packed_cache_cannot_be_continued():
    model = llava()
    packed, _ = pack([row_of(llava_batch, IMAGES, b) for b in range(2)])
    with apply_sar(model, SARConfig(activation_layer_k=2)), torch.no_grad():
        cache = model(**packed, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"past_key_values.*packed"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seq_lens_k": None}, "cu_seq_lens_k must be given together"),
        ({"cu_seq_lens_k": torch.tensor([0, 5, 52], dtype=torch.int32)}, "cu_seq_lens_k must equal cu_seq_lens_q"),
        ({"cu_seq_lens_q": [0, 52]}, "cu_seq_lens_q must be a tensor; got list"),
        ({"attention_mask": torch.zeros(1, 1).long()}, "attention_mask must be None or all ones"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32)} | {"both": True},
            "rise from 0 to the packed length",
        ),
    ],
)
def test_packing_that_contradicts_itself_is_an_error(change, message):
    packed, lengths = pack([row_of(llava_batch, [0, 0], b) for b in range(2)])
    packed |= lengths_kwargs(lengths) | change
    if "attention_mask" in packed:
        packed["attention_mask"] = torch.zeros_like(packed["input_ids"])
    with apply_sar(llava(), SARConfig(activation_layer_k=2)) as handle, pytest.raises(ValueError, match=message):
        logits(handle.model, packed)


def test_lengths_of_several_rows_or_of_a_continued_cache_are_errors():
    batch, ends = llava_batch(IMAGES), torch.tensor([0, 3], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    with apply_sar(llava(), SARConfig(activation_layer_k=2)) as handle, torch.no_grad():
        rows = batch["input_ids"].shape[0]
        with pytest.raises(ValueError, match=f"cu_seq_lens_q must describe one packed row; got a batch of {rows}"):
            handle.model(**batch, **lengths)
        prompt = row_of(llava_batch, IMAGES, 0)
        cache = handle.model(**prompt, use_cache=True).past_key_values
        needed = r"cu_seq_lens_q must come without a cache: SAR packs whole sequences; got \d+ cached positions"
        with pytest.raises(ValueError, match=needed):
            handle.model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, **lengths)


def test_record_rows_of_packed_sequences_is_an_error():
    packed, _ = pack([row_of(llava_batch, IMAGES, b) for b in range(2)])
    config = SARConfig(activation_layer_k=2, record_rows="last_text")
    with apply_sar(llava(), config) as handle, pytest.raises(ValueError, match="record_rows"):
        logits(handle.model, packed)


def test_trap11_embeddings_instead_of_ids(family):
    model, batch_of = family
    batch = batch_of([1, 2, 0])
    embeds = {k: v for k, v in batch.items() if k != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"]).detach()
    positions = {}
    if "image_grid_thw" in batch:  # without ids Qwen cannot find the pictures' positions itself
        positions["position_ids"], _ = model.model.get_rope_index(
            **{k: batch[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        )
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        assert_close(logits(model, embeds | positions), logits(model, batch | positions))


def test_trap11_generation_from_embeddings():
    model, batch = llava(), llava_batch([1, 2, 0])
    embeds = {k: v for k, v in batch.items() if k != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"]).detach()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        want = model.generate(**batch, **options)[:, -4:]
        assert torch.equal(model.generate(**embeds, **options)[:, -4:], want)


def test_trap2_generate_takes_no_keyword_and_encodes_pictures_first(family):
    """SAR needs no argument of generate(), and finds features that were encoded before the model was called."""
    model, batch_of = family
    batch = batch_of([1])
    order = []
    hooks = [
        model.base_model.register_forward_pre_hook(lambda *_: order.append("model")),
        model.base_model.get_submodule(
            "vision_tower" if hasattr(model.model, "vision_tower") else "visual"
        ).register_forward_pre_hook(lambda *_: order.append("vision")),
    ]
    with apply_sar(model, SARConfig(activation_layer_k=1, beta=BETA, record=True)) as handle:
        model.generate(**batch, max_new_tokens=1, do_sample=False)
        from_generate = handle.stats[3].head_weights
        encodes_first = hasattr(model, "_supports_mm_encoder_outputs")  # not before 5.18
        assert order == (["vision", "model"] if encodes_first else ["model", "vision"])
        order.clear()
        logits(model, batch)
        assert order == ["model", "vision"]
        assert torch.equal(handle.stats[3].head_weights, from_generate)
        with pytest.raises(ValueError, match="sar_context"):
            model.generate(**batch, sar_context=object(), max_new_tokens=1)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap14_half_precision_tolerance_comes_from_the_models_own(family, dtype):
    """Against fp32 SAR the error may be twice that of eager attention with the same statistics in this dtype."""
    model, batch_of = family
    row = row_of(batch_of, [1], 0)
    prior, half = prior_of(model, row), {k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()}
    options = {"k": 3, "beta": BETA, "mode": "running", "prior": prior}
    with decode_oracle(model, row, **options):
        want = logits(model, row)
    model = model.to(dtype)
    with decode_oracle(model, half, **options):
        in_dtype = (logits(model, half) - want).abs().max()
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        error = (logits(model, half) - want).abs().max()
    assert error <= 2 * in_dtype + 1e-5


def test_visual_tokens_of_a_row_are_its_own():
    """The same picture and text in another row of another batch: the same weights."""
    model = llava()
    with apply_sar(model, SARConfig(activation_layer_k=2, beta=BETA, record=True)) as handle:
        logits(model, llava_batch([2, 1, 0]))
        together = handle.stats[3].head_weights.clone()
        logits(model, llava_batch([1], first_image=2))
        torch.testing.assert_close(together[1:2], handle.stats[3].head_weights, rtol=1e-4, atol=1e-6)
    assert torch.equal(together[2], torch.ones(4))
    assert IMAGE not in llava_batch([0])["input_ids"]
