"""Every sentence of the error list: the type, and a message with the argument, what came and what is needed."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch

from sar_fast import (
    SARAttention,
    SARConfig,
    SARState,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    sar_attn_func,
    sar_attn_varlen_func,
    sar_attn_with_kvcache,
    semantic_prior,
    token_roles,
)
from sar_fast.reference import sar_attention_reference

B, S, H, HKV, D = 2, 6, 4, 2, 8
zeros = lambda *shape, dtype=torch.float32, device="cpu": torch.zeros(*shape, dtype=dtype, device=device)
mask = lambda *shape, **kw: zeros(*shape, dtype=torch.bool, **kw)
meta = torch.device("meta")


def dense() -> dict:
    return {
        "q": zeros(B, S, H, D),
        "k": zeros(B, S, HKV, D),
        "v": zeros(B, S, HKV, D),
        "visual_mask": mask(B, S),
        "text_mask": mask(B, S),
        "prior": zeros(B, S),
        "key_padding_mask": ~mask(B, S),
    }


QKV_ERRORS = {
    "q: rank": (
        {"q": zeros(S, H, D)},
        ValueError,
        r"q must be \(batch, seqlen, heads, head_dim\); got shape \(6, 4, 8\)",
    ),
    "k: rank": ({"k": zeros(S, H, D)}, ValueError, r"k must be \(batch.*got shape \(6, 4, 8\)"),
    "v: rank": ({"v": zeros(S, H, D)}, ValueError, r"v must be \(batch.*got shape \(6, 4, 8\)"),
    "k: batch": ({"k": zeros(3, S, HKV, D)}, ValueError, r"k must have q's batch size 2; got shape \(3, 6, 2, 8\)"),
    "k: head dim": ({"k": zeros(B, S, HKV, 4)}, ValueError, r"k must have q's head dim 8; got shape \(2, 6, 2, 4\)"),
    "v: length": ({"v": zeros(B, 5, HKV, D)}, ValueError, r"v must have k's .*\(2, 6, 2\); got shape \(2, 5, 2, 8\)"),
    "v: heads": ({"v": zeros(B, S, 4, D)}, ValueError, r"v must have k's .*\(2, 6, 2\); got shape \(2, 6, 4, 8\)"),
    "H not a multiple of Hkv": (
        {"k": zeros(B, S, 3, D), "v": zeros(B, S, 3, D)},
        ValueError,
        r"q's number of heads must be a multiple of k's; got 4 query and 3 key/value heads",
    ),
    "no key heads": (
        {"k": zeros(B, S, 0, D), "v": zeros(B, S, 0, D)},
        ValueError,
        r"q's number of heads must be a multiple of k's; got 4 query and 0",
    ),
    "no heads": (
        {n: zeros(B, S, 0, D) for n in "qkv"},
        ValueError,
        r"q's number of heads must be a multiple of k's; got 0 query and 0",
    ),
    "no query heads": ({"q": zeros(B, S, 0, D)}, ValueError, r"q's number of heads .*; got 0 query and 2 key/value"),
    "sparse": ({"q": zeros(B, S, H, D).to_sparse()}, TypeError, r"q must be a dense tensor; got .*sparse_coo"),
    "head dim that no kernel supports": (
        {"q": zeros(B, S, H, 257), "k": zeros(B, S, HKV, 257)},
        ValueError,
        r"q's head dim must be between 1 and 256; got 257",
    ),
    "head dim 0": ({"q": zeros(B, S, H, 0), "k": zeros(B, S, HKV, 0)}, ValueError, r"q's head dim .*got 0"),
    "value head dim": ({"v": zeros(B, S, HKV, 300)}, ValueError, r"v's head dim must be between 1 and 256; got 300"),
    "q: dtype": ({"q": zeros(B, S, H, D, dtype=torch.int64)}, TypeError, r"must have q's dtype torch.int64; got"),
    "integers": (
        {n: zeros(B, S, HKV, D, dtype=torch.int32) for n in "qkv"},
        TypeError,
        r"q must be a floating point tensor; got torch.int32",
    ),
    "float8": (
        {n: zeros(B, S, HKV, D).to(torch.float8_e4m3fn) for n in "qkv"},
        TypeError,
        r"q must be float16, bfloat16, float32 or float64; got torch.float8_e4m3fn",
    ),
    "k: dtype": (
        {"k": zeros(B, S, HKV, D, dtype=torch.bfloat16)},
        TypeError,
        r"k must have q's dtype torch.float32; got torch.bfloat16",
    ),
    "v: dtype": (
        {"v": zeros(B, S, HKV, D, dtype=torch.float64)},
        TypeError,
        r"v must have q's dtype torch.float32; got torch.float64",
    ),
    "k: device": ({"k": zeros(B, S, HKV, D, device=meta)}, ValueError, r"k must be on q's device cpu; got meta"),
    "v: device": ({"v": zeros(B, S, HKV, D, device=meta)}, ValueError, r"v must be on q's device cpu; got meta"),
    "not a tensor": ({"q": [[1.0]]}, TypeError, r"q must be a torch.Tensor; got list"),
    "softmax_scale": (
        {"softmax_scale": float("nan")},
        ValueError,
        r"softmax_scale must be a finite number > 0; got nan",
    ),
    "softmax_scale: zero": ({"softmax_scale": 0.0}, ValueError, r"softmax_scale must be a finite number > 0; got 0.0"),
    "softmax_scale: negative": ({"softmax_scale": -0.5}, ValueError, r"softmax_scale must be a finite .*; got -0.5"),
    "softmax_scale: type": ({"softmax_scale": "1"}, TypeError, r"softmax_scale must be a number or None; got str"),
    "softcap": ({"softcap": -1.0}, ValueError, r"softcap must be a finite number >= 0 .*got -1.0"),
    "window_size": ({"window_size": (-2, 0)}, ValueError, r"window_size must hold two ints >= -1 .*got \(-2, 0\)"),
    "window_size: length": (
        {"window_size": (1, 2, 3)},
        ValueError,
        r"window_size must be \(left, right\).*\(1, 2, 3\)",
    ),
    "causal": ({"causal": 1}, TypeError, r"causal must be a bool; got int"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto'.*got 'cuda'"),
}

SAR_ERRORS = {
    **{
        f"{name}: {what}": ({name: value}, error, rf"{name} must {message}")
        for name in ("visual_mask", "text_mask", "key_padding_mask")
        for what, value, error, message in (
            ("not bool", torch.ones(B, S), TypeError, r"be a bool tensor; got torch.float32"),
            ("shape", mask(B, S + 1), ValueError, r"have shape \(2, 6\); got \(2, 7\)"),
            ("rank", mask(S), ValueError, r"have shape \(2, 6\); got \(6,\)"),
            ("device", mask(B, S, device=meta), ValueError, r"be on q's device cpu; got meta"),
            ("type", [[True]], TypeError, r"be a torch.Tensor; got list"),
        )
    },
    "attn_mask: not bool": ({"attn_mask": torch.ones(B, 1, S, S)}, TypeError, r"attn_mask must be a bool tensor; got"),
    "attn_mask: shape": ({"attn_mask": mask(B, H, S, S)}, ValueError, r"attn_mask must .*\(2, 1, 6, 6\); got \(2, 4"),
    "attn_mask: batch": ({"attn_mask": mask(3, 1, S, S)}, ValueError, r"attn_mask must .*\(2, 1, 6, 6\); got \(3, 1"),
    "prior: shape": ({"prior": zeros(B, S + 1)}, ValueError, r"prior must have shape \(2, 6\); got \(2, 7\)"),
    "prior: dtype": ({"prior": zeros(B, S, dtype=torch.int64)}, TypeError, r"prior must be a floating point .*int64"),
    "prior: device": ({"prior": zeros(B, S, device=meta)}, ValueError, r"prior must be on q's device cpu; got meta"),
    "prior: negative": ({"prior": torch.full((B, S), -0.1)}, ValueError, r"prior must be .*non-negative; got .*-0.1"),
    "prior: nan": ({"prior": torch.full((B, S), torch.nan)}, ValueError, r"prior must be finite .*; got .*nan"),
    "prior: infinite": ({"prior": torch.full((B, S), torch.inf)}, ValueError, r"prior must be finite .*; got .*inf"),
    "beta: zero": ({"beta": 0.0}, ValueError, r"beta must be > 0 .*got 0.0"),
    "beta: negative": ({"beta": -1.0}, ValueError, r"beta must be > 0 .*got -1.0"),
    "beta: nan": ({"beta": float("nan")}, ValueError, r"beta must be > 0 .*got nan"),
    "beta: type": ({"beta": "0.5"}, TypeError, r"beta must be a number; got str"),
    "normalize": ({"normalize": "l2"}, ValueError, r"normalize must be one of 'none', 'standardize'; got 'l2'"),
    "beta: too large for a float": (
        {"beta": 10**400},
        ValueError,
        r"beta must be > 0 .* within a float's range; got 1000",
    ),
    "protect_first_head": ({"protect_first_head": 0}, TypeError, r"protect_first_head must be a bool; got int"),
    "sav_grad": ({"sav_grad": 1}, TypeError, r"sav_grad must be a bool; got int"),
    "return_stats": ({"return_stats": "no"}, TypeError, r"return_stats must be a bool; got str"),
}


def parametrized(errors: dict):
    return pytest.mark.parametrize(("changes", "error", "message"), errors.values(), ids=errors)


@parametrized({**QKV_ERRORS, **SAR_ERRORS})
def test_sar_attn_func(changes, error, message):
    with pytest.raises(error, match=message):
        sar_attn_func(**{**dense(), **changes})


@parametrized({n: e for n, e in {**QKV_ERRORS, **SAR_ERRORS}.items() if n != "backend"})
def test_the_reference_checks_the_same(changes, error, message):
    with pytest.raises(error, match=message):
        sar_attention_reference(**{**dense(), **changes})


def test_what_a_result_is_asked_for_must_be_a_bool():
    arguments = {name: value for name, value in dense().items() if name in "qkv"}
    with pytest.raises(TypeError, match="return_attn_probs must be a bool; got str"):
        flash_attn_func(**arguments, return_attn_probs="no")
    with pytest.raises(TypeError, match="return_softmax_lse must be a bool; got int"):
        flash_attn_with_kvcache(**cached(), return_softmax_lse=1)


@parametrized(QKV_ERRORS)
def test_flash_attn_func(changes, error, message):
    arguments = {name: value for name, value in dense().items() if name in "qkv"}
    with pytest.raises(error, match=message):
        flash_attn_func(**{**arguments, **changes})


@pytest.mark.parametrize("bad", [-0.1, torch.nan])
def test_a_bad_prior_is_found_wherever_it_is(bad):
    """Also in a gradient-taking call, and outside the visual keys."""
    arguments = dense()
    arguments["q"].requires_grad_()
    arguments["prior"][1, 5] = bad
    with pytest.raises(ValueError, match="prior must be finite and non-negative"):
        sar_attn_func(**arguments, sav_grad=True)


def packed() -> dict:
    ends = torch.tensor([0, 4, 6], dtype=torch.int32)
    return {
        "q": zeros(S, H, D), "k": zeros(S, HKV, D), "v": zeros(S, HKV, D), "cu_seqlens_q": ends,
        "cu_seqlens_k": ends, "max_seqlen_q": 4, "max_seqlen_k": 4,
    }  # fmt: skip


PACKED_ERRORS = {
    "q: rank": (
        {"q": zeros(1, S, H, D)},
        ValueError,
        r"q must be \(total, heads, head_dim\); got shape \(1, 6, 4, 8\)",
    ),
    "H": ({"q": zeros(S, 3, D)}, ValueError, r"q's number of heads must be a multiple of k's; got 3 query and 2"),
    "cu_seqlens_q: dtype": ({"cu_seqlens_q": torch.tensor([0, 6])}, TypeError, r"cu_seqlens_q must be int32; got .*64"),
    "cu_seqlens_k: rank": (
        {"cu_seqlens_k": zeros(1, 3, dtype=torch.int32)},
        ValueError,
        r"cu_seqlens_k must have shape \(num_sequences \+ 1,\); got \(1, 3\)",
    ),
    "cu_seqlens_q: device": (
        {"cu_seqlens_q": zeros(3, dtype=torch.int32, device=meta)},
        ValueError,
        r"cu_seqlens_q must be on q's device cpu; got meta",
    ),
    "cu_seqlens_q: type": ({"cu_seqlens_q": [0, 6]}, TypeError, r"cu_seqlens_q must be a torch.Tensor; got list"),
    "as many sequences": (
        {"cu_seqlens_k": torch.tensor([0, 6], dtype=torch.int32)},
        ValueError,
        r"cu_seqlens_k must describe as many sequences as cu_seqlens_q; got 1 and 2",
    ),
    "max_seqlen_q": ({"max_seqlen_q": -1}, ValueError, r"max_seqlen_q must be an int >= 0; got -1"),
    "max_seqlen_k": ({"max_seqlen_k": 4.0}, ValueError, r"max_seqlen_k must be an int >= 0; got 4.0"),
}


@parametrized(PACKED_ERRORS)
def test_packed(changes, error, message):
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**{**packed(), **changes})
    roles = {"visual_mask": mask(S), "text_mask": mask(S), "prior": zeros(S)}
    with pytest.raises(error, match=message):
        sar_attn_varlen_func(**{**packed(), **roles, **changes})


@pytest.mark.parametrize("name", ["visual_mask", "text_mask", "prior"])
def test_packed_roles(name):
    roles = {"visual_mask": mask(S), "text_mask": mask(S), "prior": zeros(S)}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(6,\); got \(7,\)"):
        sar_attn_varlen_func(**packed(), **{**roles, name: roles[name].new_zeros(7)})
    with pytest.raises(TypeError, match=rf"{name} must be a .* tensor; got torch.int32"):
        sar_attn_varlen_func(**packed(), **{**roles, name: zeros(S, dtype=torch.int32)})


def cached() -> dict:
    return {
        "q": zeros(B, 1, H, D), "k_cache": torch.randn(B, S, HKV, D), "v_cache": torch.randn(B, S, HKV, D),
        "k": torch.ones(B, 1, HKV, D), "v": torch.ones(B, 1, HKV, D), "cache_seqlens": torch.tensor([3, 4]),
    }  # fmt: skip


def paged(**changes) -> dict:
    table = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    return {"k_cache": torch.randn(6, 2, HKV, D), "v_cache": torch.randn(6, 2, HKV, D), "block_table": table, **changes}


CACHE_ERRORS = {
    "q: rank": ({"q": zeros(B, H, D)}, ValueError, r"q must be \(batch.*got shape \(2, 4, 8\)"),
    "q: heads": ({"q": zeros(B, 1, 3, D)}, ValueError, r"q's number of heads must be a multiple of k_cache's; got 3"),
    "k_cache: batch": (
        {"k_cache": zeros(3, S, HKV, D)},
        ValueError,
        r"k_cache must have q's batch size 2; got .*\(3, 6",
    ),
    "k_cache: dtype": (
        {"k_cache": zeros(B, S, HKV, D, dtype=torch.float16)},
        TypeError,
        r"k_cache must have q's dtype torch.float32; got torch.float16",
    ),
    "k_cache: device": (
        {"k_cache": zeros(B, S, HKV, D, device=meta)},
        ValueError,
        r"k_cache must be on .*cpu; got meta",
    ),
    "v_cache: length": (
        {"v_cache": zeros(B, 9, HKV, D)},
        ValueError,
        r"v_cache must have k_cache's .*got .*\(2, 9, 2, 8",
    ),
    "k alone": ({"v": None}, ValueError, r"k and v must be given together; got only k"),
    "v alone": ({"k": None}, ValueError, r"k and v must be given together; got only v"),
    "k: shape": ({"k": zeros(B, 1, 1, D)}, ValueError, r"k must have shape \(2, 1, 2, 8\); got \(2, 1, 1, 8\)"),
    "v: shape": ({"v": zeros(B, 2, HKV, D)}, ValueError, r"v must have shape \(2, 1, 2, 8\); got \(2, 2, 2, 8\)"),
    "k: dtype": ({"k": zeros(B, 1, HKV, D).half()}, TypeError, r"k must have k_cache's dtype torch.float32; got .*16"),
    "v: device": ({"v": zeros(B, 1, HKV, D, device=meta)}, ValueError, r"v must be on q's device cpu; got meta"),
    "no room": (
        {"cache_seqlens": torch.tensor([3, 6])},
        ValueError,
        r"cache_seqlens\[1\] must leave room for 1 .*got 6",
    ),
    "no room, int": ({"cache_seqlens": 6}, ValueError, r"cache_seqlens\[0\] must leave room for 1 .* of 6; got 6"),
    "negative length": ({"cache_seqlens": -1}, ValueError, r"cache_seqlens\[0\] must .*; got -1"),
    "cache_seqlens: shape": (
        {"cache_seqlens": torch.ones(3).int()},
        ValueError,
        r"cache_seqlens must .*\(2,\).*got \(3,\)",
    ),
    "cache_seqlens: dtype": (
        {"cache_seqlens": torch.ones(2)},
        TypeError,
        r"cache_seqlens must be .*int32; got .*float32",
    ),
    "cache_seqlens: device": (
        {"cache_seqlens": torch.ones(2, dtype=torch.int32, device=meta)},
        ValueError,
        r"cache_seqlens must be on q's device cpu; got meta",
    ),
    "block_table: shape": (
        paged(block_table=zeros(3, 2).int()),
        ValueError,
        r"block_table must have .*\(2, pages\); got",
    ),
    "block_table: dtype": (paged(block_table=zeros(B, 3).long()), TypeError, r"block_table must be int32; got .*int64"),
    "block_table: type": (paged(block_table=[[0]]), TypeError, r"block_table must be a torch.Tensor; got list"),
    "block_table: page": (
        paged(block_table=torch.tensor([[0, 1, 2], [3, 4, 6]], dtype=torch.int32)),
        ValueError,
        r"block_table\[1\] must hold pages between 0 and 5; got \[3, 4, 6\]",
    ),
    "softcap": ({"softcap": -1.0}, ValueError, r"softcap must be a finite number >= 0"),
    "backend": ({"softcap": 1.0, "backend": "composed"}, ValueError, r"got 'composed', which does not support softcap"),
    "unknown backend": ({"backend": "cuda"}, ValueError, r"backend must be one of"),
}
SAR_CACHE_ERRORS = {
    "visual_mask: capacity": (
        {"visual_mask": mask(B, 4)},
        ValueError,
        r"visual_mask must have shape \(2, 6\); got \(2, 4",
    ),
    "visual_mask: not bool": ({"visual_mask": zeros(B, S)}, TypeError, r"visual_mask must be a bool tensor; got"),
    "text_mask: shape": ({"text_mask": mask(B, 2)}, ValueError, r"text_mask must have shape \(2, 1\); got \(2, 2\)"),
    "prior: negative": ({"prior": torch.full((B, S), -1.0)}, ValueError, r"prior must be finite and non-negative"),
    "prior: nan in the last row": (
        {"prior": torch.tensor([[0.0] * S, [torch.nan] * S])},
        ValueError,
        r"prior must be finite and non-negative",
    ),
    "decode": ({"decode": "frozen"}, ValueError, r"decode must be one of 'running', 'step', 'prompt'; got 'frozen'"),
    "cache_seqlens: none": ({"cache_seqlens": None}, TypeError, r"cache_seqlens must be an int or .*; got None"),
    "return_stats": ({"return_stats": 1}, TypeError, r"return_stats must be a bool; got int"),
    "state: type": ({"state": (1, 2)}, TypeError, r"state must be a SARState or None; got tuple"),
    "state: heads": (
        {"state": SARState.empty(B, 3)},
        ValueError,
        r"state must be for batch 2 and 4 heads; got \(2, 3\)",
    ),
    **{
        f"state: {name} of another {what}": (
            {"state": dataclasses.replace(SARState.empty(B, H), **{name: value})},
            error,
            message,
        )
        for name, per_head in (("av_sum", True), ("sa_sum", True), ("count", False), ("head_weights", True))
        for what, value, error, message in (
            ("batch", zeros(1, H) if per_head else zeros(1), ValueError, rf"state must be for batch 2 .* in {name}"),
            ("rank", zeros(B, H, 1), ValueError, rf"state must be for batch 2 .*got \(2, 4, 1\) in {name}"),
            (
                "dtype",
                (zeros(B, H) if per_head else zeros(B)).double(),
                TypeError,
                rf"state.{name} must be .*float32; got",
            ),
            ("device", zeros(B, H, device=meta) if per_head else zeros(B, device=meta), ValueError, "got meta"),
        )
    },
    "state: one row for all": (
        {"state": dataclasses.replace(SARState.empty(B, H), sa_sum=zeros(1, H).expand(B, H))},
        ValueError,
        r"state.sa_sum must have entries that do not share memory, .*got strides \(0, 1\)",
    ),
    "state: device": ({"state": SARState.empty(B, H, meta)}, ValueError, r"state must be on q's device cpu; got meta"),
    "no prompt": ({"state": None, "decode": "prompt"}, ValueError, r"state must hold the prompt's weights.*got None"),
    "beta": ({"beta": 0.0}, ValueError, r"beta must be > 0"),
}


def assert_nothing_written(function, arguments: dict, error: type, message: str) -> None:
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    if isinstance(arguments.get("state"), SARState):
        tensors += arguments["state"].tensors()
    before = [x.clone() for x in tensors]
    with pytest.raises(error, match=message):
        function(**arguments)
    for x, kept in zip(tensors, before):
        assert x.device == meta or torch.equal(x.nan_to_num(), kept.nan_to_num())


@parametrized(CACHE_ERRORS)
def test_flash_attn_with_kvcache(changes, error, message):
    assert_nothing_written(flash_attn_with_kvcache, {**cached(), **changes}, error, message)


@parametrized({**CACHE_ERRORS, **SAR_CACHE_ERRORS})
def test_sar_attn_with_kvcache(changes, error, message):
    roles = {"visual_mask": mask(B, S), "prior": zeros(B, S), "state": SARState.empty(B, H)}
    assert_nothing_written(sar_attn_with_kvcache, {**cached(), **roles, **changes}, error, message)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SARAttention(32, 0), ValueError, r"num_heads must be a multiple .*; got 0 and 0"),
        (lambda: SARAttention(32, 4, 0), ValueError, r"num_heads must be a multiple .*; got 4 and 0"),
        (lambda: SARAttention(32, -4), ValueError, r"num_heads must be a multiple .*; got -4 and -4"),
        (lambda: SARAttention(2048, 4), ValueError, r"head_dim must be between 1 and 256; got 512"),
        (lambda: SARConfig.from_json("[]"), TypeError, r"values must be a dict of SARConfig fields; got list"),
        (lambda: SARConfig(record=numpy.bool_(True)), TypeError, r"record must be a bool; got numpy.bool"),
        (lambda: SARConfig(beta=10**400), ValueError, r"beta must be > 0"),
        (lambda: SARState.from_stats(None), TypeError, r"stats must be the SARStats of a prompt; got NoneType"),
        (
            lambda: SARState.from_means(zeros(2, 4), zeros(2, 4), zeros(2, 4), zeros(1)),
            ValueError,
            r"count must have shape \(2,\); got \(1,\)",
        ),
        (
            lambda: SARState.from_means(zeros(2, 4), zeros(1, 4), zeros(2, 4), zeros(2)),
            ValueError,
            r"sa must have shape \(2, 4\); got \(1, 4\)",
        ),
        (lambda: SARState.empty(2, 2).index_select([0]), TypeError, r"rows must be an int64 tensor; got list"),
        (lambda: semantic_prior(torch.ones(2, 3).long(), ~mask(1, 2)), TypeError, r"features must be floating point"),
        (lambda: semantic_prior(torch.full((2, 3), torch.nan), ~mask(1, 2)), ValueError, r"features must be finite"),
        (lambda: token_roles(zeros(1, 2).long(), None, 9.5), TypeError, r"image_token_id must be an int .*; got 9.5"),
        (lambda: token_roles(zeros(1, 2).long(), None, None), TypeError, r"image_token_id must be an int .*; got None"),
    ],
)
def test_modules_states_and_roles(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_varlen_func])
def test_dropout(function):
    arguments = packed() if function is flash_attn_varlen_func else {n: x for n, x in dense().items() if n in "qkv"}
    with pytest.raises(ValueError, match=r"dropout_p must be 0.0: .*no dropout; got 0.1"):
        function(**arguments, dropout_p=0.1)


def test_running_state_has_no_backward():
    from sar_fast.attention import ops
    from sar_fast.backends.select import BACKENDS
    from sar_fast.method.values import Call, Roles, Scores, Sums
    from sar_fast.weighting import SoftmaxOverHeads

    x = dense()
    roles = Roles(x["visual_mask"], x["text_mask"], x["prior"])
    carried = Sums(zeros(B, H), zeros(B, H), zeros(B))
    call = Call(x["q"].requires_grad_(), x["k"], x["v"], Scores(0.25), roles, carried=carried)
    with pytest.raises(
        ValueError, match=r"state must come under torch.no_grad.*no backward; got inputs that require gradients"
    ):
        ops.attention(call, SoftmaxOverHeads(), BACKENDS["torch"])
