"""SARAttention: equal to transformers' modules with SAR off, to the reference with SAR on; caches; sharing; errors."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from sar_fast import SARAttention, SARConfig
from sar_fast.modules.positions import rotate
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
    with pytest.raises(ValueError, match="Linear lacks q_proj"):
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
