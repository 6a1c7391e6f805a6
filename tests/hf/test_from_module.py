"""SARAttention.from_module: which attention it takes over, that it then equals it, and what it leaves untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, StaticCache

from sar_fast import SARAttention, SARConfig
from sar_fast.reference import sar_attention_reference
from tests.hf.tiny import VERSION

PLAIN = SARConfig(activation_layer_k=0)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
FULL = {"layer_types": ["full_attention", "full_attention"]}
rope = lambda kind, **more: {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}}
YARN = rope("yarn", original_max_position_embeddings=32)
LLAMA3 = rope("llama3", original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0)


def tiny(model_type, **more):
    """A random model of the type, whose attention matters: large weights."""
    config = CONFIG_MAPPING[model_type](**{**SMALL, **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=(3 / parameter.shape[1]) ** 0.5)
    return model


ACCEPTED = [
    ("llama", {}),
    ("llama", YARN),
    ("llama", LLAMA3),
    ("mistral", {"sliding_window": None}),
    ("mixtral", MOE),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3_moe", MOE),
    ("gemma", {}),
    ("gemma2", {**FULL, "attn_logit_softcapping": 5.0, "final_logit_softcapping": None}),
    ("vaultgemma", {**FULL, "attn_logit_softcapping": 5.0, "final_logit_softcapping": None}),
    ("gemma3_text", FULL),
    ("stablelm", {}),  # partial rotary
    ("granite", {"attention_multiplier": 0.5}),
    ("starcoder2", {}),
    ("olmo", {}),
    ("jamba", {**MOE, "attn_layer_period": 1, "attn_layer_offset": 0, "mamba_d_state": 8}),  # no positions at all
]


@pytest.mark.parametrize(("model_type", "more"), ACCEPTED, ids=[t for t, _ in ACCEPTED])
def test_a_model_with_its_attention_swapped_gives_the_same_logits(model_type, more, one_thread):
    model = tiny(model_type, **more)
    ids = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)}
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    generates = not (model_type == "jamba" and VERSION < (5, 9))
    if not generates:
        with pytest.raises(ValueError, match="has_previous_state"):  # of plain transformers
            model.generate(**call, **greedy)
    with torch.no_grad():
        want = model(**call, use_cache=False).logits
        tokens = model.generate(**call, **greedy) if generates else None
        for layer in model.model.layers:
            names = layer.self_attn.state_dict().keys()
            layer.self_attn = SARAttention.from_module(layer.self_attn, PLAIN)
            assert layer.self_attn.state_dict().keys() == names
        got = model(**call, use_cache=False).logits
    got, want = got[:, 2:], want[:, 2:]  # eager attention gives padding a mean of all values
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert not generates or torch.equal(model.generate(**call, **greedy), tokens)


@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
def test_a_swapped_model_decodes_alike_on_a_static_cache(mode, one_thread):
    """Masks go down through the model, a second picture too; layers share the cache's record of the pictures."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn = SARAttention.from_module(layer.self_attn, SARConfig(beta=0.3, decode=mode))
    ids = torch.randint(3, 99, (1, 30), generator=torch.Generator().manual_seed(0))
    visual = torch.zeros(1, 30, dtype=torch.bool)
    visual[:, 2:9] = visual[:, 18:24] = True
    given = lambda start, end: {
        "visual_mask": visual[:, :end],
        "text_mask": ~visual[:, start:end],
        "prior": visual[:, :end] / visual[:, :end].sum(),
    }
    turns = [(0, 14, given(0, 14)), (14, 15, {}), (15, 27, given(15, 27)), (27, 28, {}), (28, 30, {})]
    outs = []
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=40)):
        with torch.no_grad():
            calls = [model(ids[:, a:b], past_key_values=cache, use_cache=True, **roles).logits for a, b, roles in turns]
        outs.append(torch.cat(calls, dim=1))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outs[0], model_off(model, ids), rtol=0.01, atol=0.1)


def model_off(model, ids):
    for layer in model.model.layers:
        layer.self_attn.sar_config = PLAIN
    with torch.no_grad():
        return model(ids).logits


def test_a_sar_attention_is_refused(one_thread):
    with pytest.raises(ValueError, match="got a SARAttention already: set its sar_config"):
        SARAttention.from_module(SARAttention(64, 4))


DIFFERS = r"got {}, which differs on random input by \d"
REFUSED = [
    ("cohere", {}, DIFFERS.format("CohereAttention")),  # interleaved rotary
    ("helium", {}, DIFFERS.format("HeliumAttention")),
    ("ernie4_5", {}, DIFFERS.format("Ernie4_5Attention")),
    ("glm4", {}, DIFFERS.format("Glm4Attention")),
    ("cohere2", FULL, DIFFERS.format("Cohere2Attention")),  # no rotation
    ("smollm3", {"no_rope_layers": [0, 0]}, DIFFERS.format("SmolLM3Attention")),
    ("falcon_h1", {"key_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 4}, DIFFERS.format("FalconH1Attention")),
    ("olmo", {"clip_qkv": 2.0}, DIFFERS.format("OlmoAttention")),
    ("nanochat", {}, DIFFERS.format("NanoChatAttention")),  # norms after the rotation
    (
        "ministral3",
        rope("yarn", original_max_position_embeddings=32, llama_4_scaling_beta=0.1),
        DIFFERS.format("Ministral3Attention"),  # queries scaled by position, from the 32nd on
    ),
    ("gemma3_text", {**FULL, "attn_logit_softcapping": 5.0}, DIFFERS.format("Gemma3Attention")),  # it ignores it
    ("diffllama", {}, "DiffLlamaAttention, which also has lambda_k1, lambda_k2, lambda_q1, lambda_q2"),
    ("bitnet", {}, "BitNetAttention, which also has attn_sub_norm.weight"),
    ("hunyuan_v1_dense", rope("default"), "also has key_layernorm.weight, query_layernorm.weight"),
    ("doge", {}, "DogeAttention, which also has A, dt_proj.weight"),
    ("gpt_oss", {**MOE, **FULL}, "GptOssAttention, which also has sinks"),
    ("olmo2", {}, "to compare Olmo2Attention with .*; got RuntimeError .*: The size of tensor a"),
    (
        "qwen3_next",
        {**MOE, **FULL, "shared_expert_intermediate_size": 32},
        "config.*; got 8 from Qwen3NextAttention.q_proj",
    ),
    ("mistral", {"sliding_window": 8}, "module must attend to all positions; got sliding_window=8"),
    ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, "layer 0 of type 'sliding_attention'"),
    ("phi3", {}, "got Phi3Attention without q_proj, k_proj, v_proj"),
]


@pytest.mark.parametrize(("model_type", "more", "message"), REFUSED, ids=[t for t, *_ in REFUSED])
def test_attention_that_cannot_be_expressed_is_refused(model_type, more, message, one_thread):
    module = tiny(model_type, **more).model.layers[0].self_attn
    with pytest.raises(ValueError, match=message):
        SARAttention.from_module(module, PLAIN)


def test_attention_that_is_not_causal_stays_so(one_thread):
    """PaliGemma's text layers: without a mask, every query sees every key."""
    model = tiny("gemma", use_bidirectional_attention=True)
    module, x = model.model.layers[0].self_attn, torch.randn(2, 9, 64)
    embeddings = model.model.rotary_emb(x, torch.arange(9)[None])
    new = SARAttention.from_module(module, PLAIN)
    for mask in (None, torch.zeros(2, 1, 9, 9)):
        torch.testing.assert_close(new(x, embeddings, mask)[0], module(x, embeddings, mask)[0], rtol=1e-4, atol=1e-5)
    new(x, embeddings, is_causal=False)
    with pytest.raises(ValueError, match=r"is_causal must be left out: the module's own is_causal holds.*; got True"):
        new(x, embeddings, is_causal=True)


def test_chunked_attention_is_refused(one_thread):
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

    config = Llama4TextConfig(**{**SMALL, "num_hidden_layers": 4})
    for layer, message in ((0, "layer 0 of type 'chunked_attention'"), (3, "to compare Llama4TextAttention")):
        with pytest.raises(ValueError, match=message):
            SARAttention.from_module(Llama4TextAttention(config, layer))


@pytest.mark.parametrize("hide", ["zero", "meta", "bfloat16", "float16"])
@pytest.mark.parametrize(("model_type", "taken"), [("qwen3", True), ("cohere", False)])
def test_weights_hide_nothing(hide, model_type, taken, one_thread):
    module = tiny(model_type).model.layers[0].self_attn
    if hide == "zero":
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    elif hide == "meta":
        module.to("meta")
    else:
        module.to(getattr(torch, hide))
    if taken:
        new = SARAttention.from_module(module, PLAIN)
        assert new.q_proj is module.q_proj
        assert new.k_norm is module.k_norm
    else:
        with pytest.raises(ValueError, match="differs on random input by"):
            SARAttention.from_module(module, PLAIN)


def test_nothing_of_the_caller_changes(one_thread):
    """Random numbers, modes of shared parts, the config, hooks, gradients."""
    model = tiny("qwen3", attention_dropout=0.5)
    module, calls = model.model.layers[0].self_attn, []
    module.train()
    module.v_proj.eval()
    for part in (module, module.q_proj, module.q_norm):
        part.register_forward_hook(lambda *_: calls.append(1))
    model.set_attn_implementation("sdpa")
    before, values = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    config = dict(vars(module.config))
    new = SARAttention.from_module(module)
    assert torch.equal(before, torch.get_rng_state())
    assert not calls
    assert vars(module.config) == config
    assert module.config is model.config
    assert (new.training, new.q_proj.training, new.v_proj.training) == (True, True, False)
    assert all(torch.equal(t, values[name]) for name, t in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not any(b.requires_grad for b in new.buffers())


@pytest.mark.parametrize("context", ["inference", "autocast", "meta", "no_grad"])
def test_the_callers_context_does_not_matter(context, one_thread):
    cases = [(tiny(t).model.layers[0].self_attn, taken) for t, taken in (("gemma", True), ("helium", False))]
    around = {
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "meta": torch.device("meta"),
        "no_grad": torch.no_grad(),
    }[context]
    with around:
        for module, taken in cases:
            if taken:
                new = SARAttention.from_module(module, PLAIN)
            else:
                with pytest.raises(ValueError, match="differs on random input by"):
                    SARAttention.from_module(module, PLAIN)
    new(torch.randn(1, 5, 64))[0].sum().backward()  # its positions are no inference tensors


class Wrapped(nn.Module):
    """A projection as adapters and quantisers leave it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.register_buffer("codes", torch.zeros(3, dtype=torch.uint8))

    def forward(self, x):
        return 2 * self.base(x)


def test_wrapped_projections_are_shared(one_thread):
    model = tiny("llama")
    module = model.model.layers[0].self_attn
    for name in ("q_proj", "v_proj"):
        setattr(module, name, Wrapped(getattr(module, name)))
    x = torch.randn(2, 9, 64)
    embeddings = model.model.rotary_emb(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    new = SARAttention.from_module(module, PLAIN)
    assert new.q_proj is module.q_proj
    torch.testing.assert_close(new(x, embeddings)[0], module(x, embeddings, mask)[0], rtol=1e-4, atol=1e-5)


def test_a_peft_model_is_taken_over(one_thread):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    ids = torch.randint(3, 99, (1, 12))
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    tuned.eval()
    with torch.no_grad():
        want = tuned(ids).logits
        for layer in model.model.layers:
            layer.self_attn = SARAttention.from_module(layer.self_attn, PLAIN)
        torch.testing.assert_close(tuned(ids).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more", [{}, YARN, LLAMA3, rope("linear"), rope("dynamic")], ids=["default", "yarn", "llama3", "linear", "dynamic"]
)
def test_without_position_embeddings_the_models_own_are_used(more, one_thread):
    model = tiny("llama", **more)
    module = model.model.layers[0].self_attn
    new = SARAttention.from_module(module, PLAIN).to(torch.float64)
    module.double()
    for length in (40, 150):  # beyond original_max_position_embeddings, and max_position_embeddings
        x = torch.randn(1, length, 64, dtype=torch.float64)
        embeddings = model.model.rotary_emb(x, torch.arange(length)[None])
        torch.testing.assert_close(new(x)[0], new(x, embeddings)[0], rtol=1e-9, atol=1e-9)


def test_positions_of_each_layer_type_and_of_partial_rotary(one_thread):
    parameters = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    types = ["sliding_attention", "full_attention"]
    x, ids = torch.randn(1, 20, 64), torch.arange(20)[None]
    gemma = tiny("gemma3_text", layer_types=types, rope_parameters=parameters).model
    glm = tiny("glm4_moe", **MOE, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=2).model
    for model, embeddings in (
        (gemma, gemma.rotary_emb(x, ids, "full_attention")),
        (glm, glm.rotary_emb(x, ids)),
    ):
        new = SARAttention.from_module(model.layers[1].self_attn, PLAIN)
        torch.testing.assert_close(new(x)[0], new(x, embeddings)[0])


def test_positions_that_are_not_known_are_an_error(one_thread):
    """A module without a config: its model's rotary embedding cannot be built."""
    module = tiny("llama").model.layers[0].self_attn
    del module.config
    with pytest.raises(ValueError, match=r"must run as .*; got AttributeError from LlamaAttention"):
        SARAttention.from_module(module)

    class Own(type(module)):
        def forward(self, hidden_states, position_embeddings, attention_mask=None):
            self.config = type("Config", (), {"_attn_implementation": "eager"})
            return super().forward(hidden_states, position_embeddings, attention_mask)

    module.__class__ = Own
    new, x = SARAttention.from_module(module, PLAIN), torch.randn(1, 5, 64)
    with pytest.raises(ValueError, match=r"position_embeddings must be given: .* got None"):
        new(x)
    new(x, tiny("llama").model.rotary_emb(x, torch.arange(5)[None]))


def test_softcap_and_norms_under_sar_equal_the_reference(one_thread):
    """SAR's statistics are of the soft-capped scores; norms stay as the module has them (1 + weight)."""
    module = tiny("gemma3_text", **FULL).model.layers[0].self_attn
    nn.init.normal_(module.q_norm.weight)
    new = SARAttention.from_module(module, SARConfig(beta=0.3))
    new.softcap = 3.0
    x = torch.randn(2, 15, 64)
    visual, text = (torch.zeros(2, 15, dtype=torch.bool) for _ in range(2))
    visual[:, 2:9], text[:, 9:] = True, True
    prior = visual / visual.sum(-1, keepdim=True)
    got = new(x, visual_mask=visual, text_mask=text, prior=prior)[0]
    cos, sin = (t[:, :, None] for t in new._rotary(None, 0, x))
    heads = [p(x).view(2, 15, -1, 16) for p in (module.q_proj, module.k_proj, module.v_proj)]
    half = lambda t: torch.cat([-t[..., 8:], t[..., :8]], -1)
    q, k = (t * cos + half(t) * sin for t in (module.q_norm(heads[0]), module.k_norm(heads[1])))
    want = sar_attention_reference(
        q, k, heads[2], visual, text, prior, beta=0.3, softcap=3.0, softmax_scale=module.scaling
    )
    torch.testing.assert_close(got, module.o_proj(want.flatten(2)), rtol=1e-4, atol=1e-5)


def test_dropout_in_training_is_an_error(one_thread):
    module = tiny("llama", attention_dropout=0.25).model.layers[0].self_attn.train()
    new = SARAttention.from_module(module, PLAIN)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 in training.*; got 0.25"):
        new(torch.randn(1, 5, 64))
    new.eval()(torch.randn(1, 5, 64))


def test_a_forward_of_its_own_is_refused(one_thread):
    module = tiny("llama").model.layers[0].self_attn
    module.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="got a LlamaAttention with a forward of its own"):
        SARAttention.from_module(module)


def test_a_ranks_share_of_the_heads_is_refused(one_thread):
    module = tiny("llama").model.layers[0].self_attn
    half = copy.deepcopy(module)
    half.q_proj, half.k_proj, half.v_proj = nn.Linear(64, 32), nn.Linear(64, 16), nn.Linear(64, 16)
    half.o_proj = nn.Linear(32, 64)
    with pytest.raises(ValueError, match=r"heads of its layer, 4 by its config.*; got 2 from LlamaAttention.q_proj"):
        SARAttention.from_module(half)
    new = SARAttention.from_module(module, PLAIN)
    new.q_proj, new.k_proj, new.v_proj, new.o_proj = half.q_proj, half.k_proj, half.v_proj, half.o_proj
    with pytest.raises(ValueError, match=r"must give all heads, \(4, 2, 2\): .*; got 2, 1 and 1"):
        new(torch.randn(1, 5, 64))
