"""SARAttention: equal to transformers' modules with SAR off, to the reference with SAR on; caches; sharing; errors."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from sar_fast import SARAttention, SARConfig
from sar_fast.hf.dense_masks import has_values
from sar_fast.hf.module.positions import rotate
from sar_fast.reference import sar_attention_reference

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
}
PLAIN = SARConfig(activation_layer_k=0)


def hf_module(kind, **more):
    config_cls, cls = {
        "llama": (LlamaConfig, LlamaAttention),
        "qwen2": (Qwen2Config, Qwen2Attention),
        "qwen3": (Qwen3Config, Qwen3Attention),
    }[kind]
    torch.manual_seed(0)
    config = config_cls(**SIZES, **more)
    config._attn_implementation = "sdpa"
    return config, cls(config, layer_idx=1).eval()


def roles(B, S):
    visual = torch.zeros(B, S, dtype=torch.bool)
    visual[:, 2:9] = True
    text = torch.zeros(B, S, dtype=torch.bool)
    text[:, 9:] = True
    prior = torch.rand(B, S) * visual
    return visual, text, prior / prior.sum(-1, keepdim=True)


def rotary(config, S):
    return LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(S)[None])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_equals_the_transformers_module_with_sar_off(kind):
    config, module = hf_module(kind)
    ours = SARAttention.from_module(module, PLAIN)
    assert ours.state_dict().keys() == module.state_dict().keys()
    assert ours.q_proj.weight is module.q_proj.weight
    x = torch.randn(2, 17, 64)
    embeddings = rotary(config, 17)
    want = module(x, position_embeddings=embeddings, attention_mask=None)[0]
    torch.testing.assert_close(ours(x, embeddings)[0], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x)[0], want, rtol=1e-4, atol=1e-5)  # its own rotary embedding


def test_built_from_values_loads_a_transformers_state_dict():
    _, module = hf_module("qwen3", attention_bias=False)
    ours = SARAttention(64, 4, 2, head_dim=module.head_dim, qk_norm=True)
    ours.load_state_dict(module.state_dict())
    assert ours.o_proj.weight is not module.o_proj.weight


def test_sar_on_equals_the_reference():
    torch.manual_seed(0)
    module = SARAttention(64, 4, 2, qkv_bias=True, config=SARConfig(beta=0.01))
    x, (visual, text, prior) = torch.randn(2, 15, 64), roles(2, 15)
    out = module(x, visual_mask=visual, text_mask=text, prior=prior)[0]
    q, k, v = (p(x).view(2, 15, -1, 16) for p in (module.q_proj, module.k_proj, module.v_proj))
    cos, sin = module._rotary(None, 0, x)
    want, stats = sar_attention_reference(
        rotate(q, cos, sin), rotate(k, cos, sin), v, visual, text, prior, beta=0.01, return_stats=True
    )
    torch.testing.assert_close(out, module.o_proj(want.flatten(2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.last_stats.head_weights, stats.head_weights, rtol=1e-4, atol=1e-5)


def test_cached_decoding_continues_the_sums():
    torch.manual_seed(0)
    module = SARAttention(64, 4, 2, layer_idx=0, config=SARConfig(beta=0.01)).eval()
    x, (visual, text, prior) = torch.randn(1, 14, 64), roles(1, 14)
    cache = DynamicCache()
    with torch.no_grad():
        module(x[:, :11], None, None, cache, visual_mask=visual[:, :11], text_mask=text[:, :11], prior=prior[:, :11])
        for i in range(11, 14):
            last = module(x[:, i : i + 1], None, None, cache)[0]
        whole = module(x, visual_mask=visual, text_mask=text, prior=prior)[0]
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-4, atol=1e-5)


def test_padding_masks_agree():
    torch.manual_seed(0)
    module = SARAttention(64, 4, config=SARConfig(beta=0.01))
    x, (visual, text, prior) = torch.randn(2, 15, 64), roles(2, 15)
    real = torch.ones(2, 15, dtype=torch.long)
    real[0, :2] = 0
    causal = torch.ones(15, 15, dtype=torch.bool).tril()
    dense = (causal & real[:, None, None].bool()).expand(2, 1, 15, 15)
    named = {"visual_mask": visual, "text_mask": text, "prior": prior}
    a = module(x, attention_mask=real, **named)[0]
    b = module(x, attention_mask=dense, **named)[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_trains():
    module = SARAttention(64, 4, 2, config=SARConfig(beta=0.01, sav_grad=True))
    visual, text, prior = roles(1, 15)
    module(torch.randn(1, 15, 64), visual_mask=visual, text_mask=text, prior=prior)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    module = SARAttention(64, 4, 2, config=SARConfig(beta=0.01))
    x, (visual, text, prior) = torch.randn(1, 15, 64), roles(1, 15)
    named = {"visual_mask": visual, "text_mask": text, "prior": prior}
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **named)[0], module(x, **named)[0])


def test_prompt_without_roles_is_an_error():
    with pytest.raises(ValueError, match=r"visual_mask, text_mask and prior must be given.*visual_mask=None"):
        SARAttention(64, 4)(torch.randn(1, 5, 64))


def test_bad_construction():
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads; got 4 and 3"):
        SARAttention(64, 4, 3)
    with pytest.raises(ValueError, match="head_dim must be given"):
        SARAttention(65, 4)
    with pytest.raises(ValueError, match="module must be a LLaMA/Qwen-style self-attention; got Linear without q_proj"):
        SARAttention.from_module(torch.nn.Linear(2, 2))


def test_bad_masks():
    module = SARAttention(64, 4)
    visual, text, prior = roles(1, 15)
    x = torch.randn(1, 15, 64)
    with pytest.raises(ValueError, match=r"visual_mask must be bool of shape \(1, 15\)"):
        module(x, visual_mask=visual.float(), text_mask=text, prior=prior)
    with pytest.raises(ValueError, match="attention_mask must cover the cached and the new positions, 15"):
        module(x, attention_mask=torch.ones(1, 7), visual_mask=visual, text_mask=text, prior=prior)
    with pytest.raises(ValueError, match="text_mask and prior must be given together"):
        module(x, visual_mask=visual)


def test_dropin_keywords_without_effect_are_ignored():
    module, x = SARAttention(64, 4, config=PLAIN), torch.randn(1, 5, 64)
    passed = {
        "use_cache": True,
        "cache_position": torch.arange(5),
        "output_hidden_states": True,
        "output_router_logits": True,
        "num_items_in_batch": 3,
        "output_attentions": False,
        "is_causal": True,
        "sliding_window": None,
        "cu_seq_lens_q": None,
        "whatever": None,
        "position_ids": torch.arange(5)[None],
    }
    assert torch.equal(module(x, **passed)[0], module(x)[0])


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        (
            "cu_seq_lens_q",
            torch.tensor([0, 5]),
            "cu_seq_lens_q must be left out: packed rows need .*varlen_func; got Tensor",
        ),
        ("cu_seq_lens_k", torch.tensor([0, 5]), "cu_seq_lens_k must be left out"),
        ("max_length_q", 5, "max_length_q must be left out: .*; got 5"),
        ("max_length_k", 5, "max_length_k must be left out"),
        ("seq_idx", torch.zeros(1, 5), "seq_idx must be left out"),
        ("output_attentions", True, "output_attentions must be left out: no attention matrix exists.*; got True"),
        ("sliding_window", 4, "sliding_window must be left out: .*; got 4"),
        ("is_causal", False, "is_causal must be left out: .*; got False"),
        ("softcap", 50.0, "softcap must be left out: it is given at construction; got 50.0"),
        ("dropout", 0.1, "dropout must be left out"),
        ("position_ids", torch.tensor([[0, 1, 2, 0, 1]]), "position_ids must not start anew inside a row"),
    ],
)
def test_keywords_that_would_change_the_result_are_errors(keyword, value, message):
    with pytest.raises(ValueError, match=message):
        SARAttention(64, 4, config=PLAIN)(torch.randn(1, 5, 64), **{keyword: value})


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("visual_masks", "unknown keyword 'visual_masks'; did you mean visual_mask?"),
        ("visualmask", "did you mean visual_mask?"),
        ("txt_mask", "did you mean text_mask?"),
        ("priors", "did you mean prior?"),
        ("past_key_value", "did you mean past_key_values?"),
        ("attn_mask", "did you mean attention_mask?"),
        ("spam", "unknown keyword 'spam'; pass only what attention needs"),
    ],
)
def test_unknown_keywords_are_errors_with_the_nearest_name(keyword, message):
    """Also with SAR off, and False: a mask under a wrong name would leave SAR without its picture."""
    for config in (PLAIN, SARConfig()):
        for value in (torch.ones(1, 5, dtype=torch.bool), False):
            with pytest.raises(TypeError, match=re.escape(message)):
                SARAttention(64, 4, config=config)(torch.randn(1, 5, 64), **{keyword: value})


META = torch.ones(2, 15, dtype=torch.bool, device="meta")


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 16)},
            ValueError,
            r"attention_mask must cover .*, 15 positions; got \(2, 16\)",
        ),
        ({"attention_mask": torch.ones(1, 15)}, ValueError, r"attention_mask must be \(2, 15\) or .*; got \(1, 15\)"),
        ({"attention_mask": torch.ones(3, 15)}, ValueError, r"got \(3, 15\)"),
        ({"attention_mask": torch.ones(2, 1, 14, 15).bool()}, ValueError, r"got \(2, 1, 14, 15\)"),
        ({"attention_mask": torch.ones(2, 4, 15, 15).bool()}, ValueError, r"got \(2, 4, 15, 15\)"),
        ({"attention_mask": torch.ones(2, 15, 15)}, ValueError, r"2 or 4 dimensions; got shape \(2, 15, 15\)"),
        ({"attention_mask": torch.ones(2, 1, 15, 15).long()}, TypeError, "must be bool or additive floating"),
        ({"attention_mask": torch.ones(2, 1, 15, 15)}, ValueError, "scores with a bias are not supported"),
        ({"attention_mask": torch.full((2, 1, 15, 15), -2.0)}, ValueError, "scores with a bias are not supported"),
        ({"attention_mask": torch.full((2, 15), -torch.inf)}, ValueError, "got negative values"),
        ({"attention_mask": META}, ValueError, "attention_mask must be on hidden_states' device cpu; got meta"),
        ({"attention_mask": [1] * 15}, TypeError, "attention_mask must be a tensor or None; got list"),
        ({"visual_mask": META}, ValueError, "visual_mask must be on hidden_states' device cpu; got meta"),
        ({"text_mask": META}, ValueError, "text_mask must be on hidden_states' device cpu; got meta"),
        ({"prior": META.float()}, ValueError, "prior must be on hidden_states' device cpu; got meta"),
        ({"prior": META.long()}, ValueError, "prior must have shape .* and be floating point; got torch.int64"),
        ({"visual_mask": [True]}, ValueError, "visual_mask must be bool of shape .*; got list"),
        ({"visual_mask": None}, ValueError, "visual_mask must be given together with prior"),
        ({"position_ids": torch.arange(14)[None]}, ValueError, r"position_ids must be integers .*; got \(1, 14\)"),
        ({"position_ids": torch.arange(15.0)[None]}, ValueError, "position_ids must be integers"),
        ({"position_embeddings": (torch.ones(1, 1, 16),) * 2}, ValueError, r"position_embeddings must .*\(1, 1, 16\)"),
        ({"position_embeddings": (torch.ones(1, 15, 18),) * 2}, ValueError, "R even and at most head_dim, 16; got"),
        ({"position_embeddings": torch.ones(2, 15, 16)}, ValueError, "position_embeddings must be .*; got Tensor"),
        ({"hidden_states": torch.ones(15, 64)}, ValueError, r"hidden_states must be .*; got shape \(15, 64\)"),
    ],
)
def test_bad_arguments_name_themselves(named, error, message):
    visual, text, prior = roles(2, 15)
    given = {"hidden_states": torch.randn(2, 15, 64), "visual_mask": visual, "text_mask": text, "prior": prior}
    with pytest.raises(error, match=message):
        SARAttention(64, 4)(**{**given, **named})


def test_bad_options_of_the_constructor():
    with pytest.raises(ValueError, match=r"softcap must be a finite number >= 0 .*; got -1"):
        SARAttention(64, 4, softcap=-1)
    with pytest.raises(ValueError, match="rope_theta must be a finite number > 0, or None; got 0"):
        SARAttention(64, 4, rope_theta=0)
    with pytest.raises(TypeError, match="config must be a SARConfig or None; got dict"):
        SARAttention(64, 4, config={"beta": 0.5})
    with pytest.raises(TypeError, match="config must be a SARConfig or None; got dict"):
        SARAttention.from_module(hf_module("llama")[1], {"beta": 0.5})


def test_gradient_checkpointing_changes_no_gradient():
    module, x = SARAttention(64, 4, 2, config=SARConfig(beta=0.3, sav_grad=True)), torch.randn(1, 15, 64)
    named = dict(zip(("visual_mask", "text_mask", "prior"), roles(1, 15)))
    grads = []
    for call in (module, lambda *a, **k: checkpoint(module, *a, use_reentrant=False, **k)):
        module.zero_grad()
        call(x, **named)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_half_precision_beside_fp32_cosines():
    """As under autocast, and with embeddings that a caller keeps in fp32."""
    module, x = SARAttention(64, 4, 2, config=PLAIN).bfloat16(), torch.randn(1, 9, 64).bfloat16()
    cos, sin = module._rotary(None, 0, x.float())
    cache = DynamicCache()
    out = module(x, (cos, sin), None, cache)[0]
    assert out.dtype == cache.layers[0].keys.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module.float()(x.float(), (cos, sin))[0], rtol=0.05, atol=0.02)


def test_a_mask_that_all_layers_get_is_looked_at_once(monkeypatch):
    """On a GPU each look waits for it; what was changed since is looked at again."""
    looked, mask = [], torch.zeros(2, 1, 9, 9).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    bad = lambda m: looked.append(1) or (m != 0) & ~(m <= -1e4)
    assert not has_values(mask, bad)
    assert not has_values(mask, bad)
    assert len(looked) == 1
    mask[0, 0, 3, 1] = -2.0
    assert has_values(mask, bad)
    assert has_values(mask, bad)
    assert len(looked) == 3
