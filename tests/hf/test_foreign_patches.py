"""What training libraries do to attention, made again from descriptions of it: SAR works there, or raises and says why.

Every patch is a right one: without SAR, the patched model's logits are the original's.
"""

from __future__ import annotations

import functools
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.mask_patterns import _readers
from tests.hf.test_wrappers import assert_close, logits
from tests.hf.tiny import llava, llava_batch, qwen2_5_vl, qwen_batch

SAR = SARConfig(activation_layer_k=3, beta=0.02)
ALL = r"attention layers \[1, 2, 3\] of the re-weighted \[1, 2, 3\]"


def project(attention, x, rotary, rotate):
    """Queries, keys and values (B, heads, S, D) of hidden states (B, S, width), positions in them."""
    shape = (*x.shape[:2], -1, attention.head_dim)
    q, k, v = (getattr(attention, f"{n}_proj")(x).view(shape).transpose(1, 2) for n in "qkv")
    return *rotate(q, k, *rotary), v


def attend(q, k, v, **options):
    """(B, S, heads * D) by PyTorch's own attention."""
    out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return out.transpose(1, 2).flatten(2)


def attend_by_sequence(q, k, v, ends):
    """Causal attention of sequences packed into one row, as variable-length kernels compute it."""
    pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return torch.cat([attend(*(x[:, :, piece] for x in (q, k, v)), is_causal=True) for piece in pieces], 1)


def ends_of(real):
    """(B + 1,) int32: where the rows of a mask (B, S) begin and end when their real tokens are joined."""
    return nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()


# lmms-engine: no padding inside the text model (use_rmpad). The forwards of the text model and of its attention are
# replaced on their classes: all rows' real tokens run as one row, with arguments of the library's own.


def unpadded_text_model(self, inputs_embeds=None, attention_mask=None, position_ids=None, **kwargs):
    real = attention_mask.bool()
    x, ends = inputs_embeds[real][None], ends_of(real).tolist()
    rotary = self.rotary_emb(x, position_ids[-3:, real][:, None])
    for layer in self.layers:
        x = x + layer.self_attn(layer.input_layernorm(x), rotary, ends)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    padded = torch.zeros_like(inputs_embeds)
    padded[real] = self.norm(x)[0]
    return modeling_qwen2_5_vl.BaseModelOutputWithPast(last_hidden_state=padded)


def rotary_of(attention):
    """How this transformers rotates Qwen2.5-VL's queries and keys: older ones by the sections of three positions."""
    if hasattr(modeling_qwen2_5_vl, "apply_rotary_pos_emb"):
        return modeling_qwen2_5_vl.apply_rotary_pos_emb
    sections = attention.config.rope_parameters["mrope_section"]
    return functools.partial(modeling_qwen2_5_vl.apply_multimodal_rotary_pos_emb, mrope_section=sections)


def unpadded_attention(self, hidden_states, rotary, ends):
    qkv = project(self, hidden_states, rotary, rotary_of(self))
    return self.o_proj(attend_by_sequence(*qkv, ends))


def test_text_models_without_padding_are_an_error_that_names_the_library(monkeypatch):
    model, batch = qwen2_5_vl(), qwen_batch([1, 2])
    real = batch["attention_mask"].bool()
    want = logits(model, batch)[real]
    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLTextModel, "forward", unpadded_text_model)
    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLAttention, "forward", unpadded_attention)
    assert_close(logits(model, batch)[real], want)
    apply_sar(model, SAR)
    with pytest.raises(RuntimeError, match=rf"{ALL}.*forward is {__name__}\.unpadded_attention, which another library"):
        logits(model, batch)


# qwen-vl-finetune: packed rows (data_flatten) whose attention_mask says where sequences end; it replaces the
# attention's forward and lets the text model hand that mask on as it is.


def packed_attention(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    qkv = project(self, hidden_states, position_embeddings, rotary_of(self))
    return self.o_proj(attend_by_sequence(*qkv, attention_mask.tolist())), None


def flatten(model, batch):
    """The batch's real tokens as one row, with the three rows of positions that they have in it."""
    real, seen = batch["attention_mask"].bool(), []
    hook = model.get_decoder().register_forward_pre_hook(lambda m, a, kw: seen.append(kw), with_kwargs=True)
    logits(model, batch)
    hook.remove()
    joined = {name: batch[name][real][None] for name in ("input_ids", "mm_token_type_ids")}
    positions = seen[0]["position_ids"][-3:, real][:, None]
    return {**batch, **joined, "position_ids": positions, "attention_mask": ends_of(real)}


def test_packed_rows_with_ends_for_a_mask_are_an_error(monkeypatch):
    model, batch = qwen2_5_vl(), qwen_batch([1, 2])
    want, packed = logits(model, batch)[batch["attention_mask"].bool()], flatten(model, batch)
    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLAttention, "forward", packed_attention)
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(modeling_qwen2_5_vl, name, lambda *args, attention_mask=None, **kwargs: attention_mask)
    assert_close(logits(model, packed)[0], want)
    apply_sar(model, SAR)
    with pytest.raises(ValueError, match=r"attention_mask must be .* got shape \(3,\)\..*cu_seq_lens_q"):
        logits(model, packed)


# ms-swift: sequence parallelism. A hook of the text model cuts its inputs; the attention functions "sdpa" and
# "flash_attention_2" alone, replaced in transformers' registry, put the sequence together again.


class Ranks(threading.local):
    """The ranks of a process group, as threads."""

    size, shelf, barrier = 2, {}, threading.Barrier(2, timeout=60)

    def run(self, work):
        def as_rank(rank):
            self.rank = rank
            return work()

        with ThreadPoolExecutor(self.size) as pool:
            return [task.result() for task in [pool.submit(as_rank, rank) for rank in range(self.size)]]

    def split(self, x, dim):
        return x.tensor_split(self.size, dim)[self.rank]

    def gather(self, x, dim):
        self.shelf[self.rank] = x
        self.barrier.wait()
        whole = torch.cat([self.shelf[rank] for rank in range(self.size)], dim)
        self.barrier.wait()
        return whole


def split_sequences(model, monkeypatch):
    """The ranks that split the sequences of a model's text model."""
    ranks, whole = Ranks(), ALL_ATTENTION_FUNCTIONS["sdpa"]

    def split(module, args, kwargs):
        return args, kwargs | {name: ranks.split(kwargs[name], 1) for name in ("inputs_embeds", "position_ids")}

    def gathered(module, query, key, value, attention_mask, **kwargs):
        if not isinstance(module, modeling_llama.LlamaAttention):
            return whole(module, query, key, value, attention_mask, **kwargs)
        out, _ = whole(module, *(ranks.gather(x, 2) for x in (query, key, value)), None, **kwargs)
        return ranks.split(out, 1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", gathered)
    model.get_decoder().register_forward_pre_hook(split, with_kwargs=True)
    return ranks


def test_split_sequences_are_an_error(monkeypatch):
    model = llava()
    batch = {name: x for name, x in llava_batch([1]).items() if name != "attention_mask"}
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    want = logits(model, batch)
    ranks = split_sequences(model, monkeypatch)
    assert_close(torch.cat(ranks.run(lambda: logits(model, batch)), 1), want)
    apply_sar(model, SAR)
    with pytest.raises(
        RuntimeError, match=r"attends with 1 x \d+ .* of a pass that has 1 x \d+: .* sequence parallelism"
    ):
        ranks.run(lambda: logits(model, batch))


# Unsloth: language models loaded by FastLanguageModel get a forward of its own on their attention class, as does Gemma
# 3 in float16 on its vision path. Other multimodal models get rewritten classes, which call transformers' interface.


def fast_attention(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    qkv = project(self, hidden_states, position_embeddings, modeling_llama.apply_rotary_pos_emb)
    return self.o_proj(attend(*qkv, attn_mask=attention_mask, is_causal=attention_mask is None)), None


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([1], rf"{ALL}.*forward is {__name__}\.fast_attention, which another library put in place"),
        ([1, 2], rf"(?s)must match.*SAR: this attention's forward is {__name__}\.fast_attention.*masks that only SAR"),
    ],
    ids=["unpadded", "padded"],
)
def test_a_forward_of_its_own_is_an_error_that_names_it(monkeypatch, pictures, message):
    model, batch = llava(), llava_batch(pictures)
    real = batch["attention_mask"].bool()
    want = logits(model, batch)[real]
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", fast_attention)
    assert_close(logits(model, batch)[real], want)
    apply_sar(model, SAR)
    with pytest.raises(RuntimeError, match=message):
        logits(model, batch)


def test_an_error_in_an_attention_of_its_own_forward_gets_no_note():
    model = llava()
    apply_sar(model, SAR)

    def fail(module, args):
        raise MemoryError("too large")

    model.get_decoder().layers[0].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError) as caught:
        logits(model, llava_batch([1]))
    assert not hasattr(caught.value, "__notes__")


def rewritten_forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
    qkv = project(self, hidden_states, position_embeddings, modeling_llama.apply_rotary_pos_emb)
    interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, _ = interface(self, *qkv, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
    return self.o_proj(out.flatten(2)), None


class RewrittenAttention(modeling_llama.LlamaAttention):
    """The class as a compiler of models writes it: its forward is a function of the module."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        return rewritten_forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)


def test_rewritten_classes_that_call_the_interface_are_reweighted():
    model, batch = llava(), llava_batch([1, 2])
    with apply_sar(model, SAR):
        want = logits(model, batch)
    for layer in model.get_decoder().layers:
        layer.self_attn.__class__ = RewrittenAttention
    plain = logits(model, batch)
    assert_close(plain, logits(llava(), batch))
    apply_sar(model, SAR)
    assert_close(logits(model, batch), want)
    assert (plain - want).abs().max() > 1e-2


@pytest.fixture
def own_mask_functions(monkeypatch):
    """Unsloth's factory of masks of packed sequences: its closures keep a copy of the ids on each device."""

    def factory(packed_sequence_mask):
        copies = {packed_sequence_mask.device: packed_sequence_mask}

        def same_sequence(batch_idx, head_idx, q_idx, kv_idx):
            ids = copies[q_idx.device]
            return ids[batch_idx, q_idx] == ids[batch_idx, kv_idx]

        return same_sequence

    monkeypatch.setattr(masking_utils, "packed_sequence_mask_function", factory)
    _readers.cache_clear()
    yield
    _readers.cache_clear()


def pack(batch):
    """The rows' real tokens in one row, with positions that begin again."""
    real = batch["attention_mask"].bool()
    positions = torch.cat([torch.arange(n) for n in real.sum(1).tolist()])[None]
    return {
        "input_ids": batch["input_ids"][real][None],
        "position_ids": positions,
        "pixel_values": batch["pixel_values"],
    }


def test_mask_functions_of_another_library_are_used(request):
    model, batch = llava(), pack(llava_batch([1, 2]))
    plain = logits(model, batch)
    apply_sar(model, SAR)
    want = logits(model, batch)
    request.getfixturevalue("own_mask_functions")
    assert torch.equal(logits(llava(), batch), plain)
    assert_close(logits(model, batch), want)
    assert (want - plain).abs().max() > 1e-2
