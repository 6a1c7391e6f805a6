"""Tensors whose entries lie further apart than 2^31 elements.

On a CPU the memory between them is reserved but never touched, so the operating system never provides it.
"""

import math
import mmap

import pytest
import torch
from kernel_cases import INTERPRETED, Case, assert_same_forward, assert_same_gradients, make

from sar_fast import sar_attn_func
from sar_kernels.attention import (
    attention_forward,
    attention_statistics,
    sar_backward,
    sar_forward,
)
from sar_kernels.call import MAX_TOKEN_STRIDE, AttentionOptions, Call, WeightOptions
from sar_kernels.decode.call import append_kv, decode_forward, sar_decode_forward
from sar_kernels.dense.plan import plan_sar_forward
from sar_kernels.launch import run_all

FAR = 2**31
MAP_NORESERVE = 0x4000  # Linux's, which not every Python names
CASE = Case(seqlen_q=70, seqlen_k=70, images=(((5, 45),), ((0, 20),)), heads=2, kv_heads=2, head_dim=16)


def reserve(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Flat memory of zeros; on a CPU only the pages that are touched exist."""
    if INTERPRETED:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
    need_free(elements * dtype.itemsize)
    return torch.zeros(elements, dtype=dtype)


def need_free(size: int) -> None:
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 1.1 * size:
        pytest.skip(f"{size / 2**30:.0f} GiB of GPU memory are not free")


def spread(tensor: torch.Tensor, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy (offset further into memory) whose samples, or pages, and heads lie far apart.

    The longer of the two dimensions has a stride that fits 32 bits and of which a multiple does not.
    """
    samples, _, heads, head_dim = tensor.shape
    near, far = FAR // 2, max(samples, heads) * FAR // 2
    strides = (near, head_dim, far, 1) if samples > heads else (far, head_dim, near, 1)
    return memory[offset:].as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.everyday(samples=[4])
@pytest.mark.parametrize(("samples", "heads"), [(2, 4), (4, 2)])
def test_samples_and_heads(samples, heads):
    inputs = make(CASE.but(images=CASE.images * (samples // 2), heads=heads, kv_heads=heads))
    call = lambda q, k, v: sar_forward(q, k, v, *inputs.sav, **inputs.kwargs())
    near = inputs.q, inputs.k, inputs.v
    out, lse, *saved = expected = call(*near)
    dout = torch.randn_like(out)
    back = lambda dout, *qkv: sar_backward(dout, *qkv, out, lse, *inputs.sav, *saved, **inputs.kwargs(), sav_grad=True)
    memory = reserve(4 * FAR, torch.float32)
    far = [spread(t, memory, i * 2**13) for i, t in enumerate((*near, dout))]
    assert_same_forward(call(*far[:3]), expected)
    assert_same_gradients(back(far[3], *far[:3]), back(dout, *near))


def test_tokens():
    """The last key tile begins beyond 2^31 elements, at a token stride of 2^23."""
    inputs = make(CASE.but(seqlen_k=300, images=(((5, 45),),), heads=1, kv_heads=1))
    expected = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    memory = reserve(300 * 2**23, torch.float32)
    far = torch.as_strided(memory, inputs.k.shape, (1, 2**23, 16, 1)).copy_(inputs.k)
    assert_same_forward(attention_forward(inputs.q, far, inputs.v, **inputs.kwargs(weights=False)), expected)


def test_packed_tokens(monkeypatch, poisoned_allocations):
    """The only sequence begins 2^31 elements into q, k, v, out and every gradient."""
    inputs = make(CASE.but(images=(((5, 45),),), heads=1, kv_heads=1, dtype=torch.float16))
    near = [t[0] for t in (inputs.q, inputs.k, inputs.v)]
    dout = torch.randn_like(near[0])
    start, length = FAR // 16 + 1, 70
    need_free(10 * FAR * 2)

    def run(start, q, k, v, dout, visual, text, prior):
        cu = torch.tensor([start, start + length], dtype=torch.int32)
        both = {"options": inputs.options, "weights": inputs.weights}
        both |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": length, "max_seqlen_k": length}
        out, lse, *saved = sar_forward(q, k, v, visual, text, prior, **both)
        gradients = sar_backward(dout, q, k, v, out, lse, visual, text, prior, *saved, **both, sav_grad=True)
        again = attention_statistics(q, k, lse, visual, text, prior, **both)
        per_token = [out[start:], lse[:, start:], *(g[start:] for g in gradients)]
        return [t.clone() for t in per_token], saved + list(again)

    roles = [t[0] for t in inputs.sav]
    per_token, statistics = run(0, *near, dout, *roles)
    far = []
    for tensor in (*near, dout, *roles):
        shape = (start + length, *tensor.shape[1:])
        far.append(reserve(math.prod(shape), tensor.dtype).view(shape))
        far[-1][start:] = tensor
    monkeypatch.setattr(torch, "empty", poisoned_allocations)  # filling gigabytes would touch them
    got = run(start, *far)
    assert_same_forward(got[0][:2] + got[1], per_token[:2] + statistics)
    assert_same_gradients(got[0][2:], per_token[2:])


@pytest.mark.everyday(page=[0, 8])
@pytest.mark.parametrize("page", [0, 8, 32])
def test_caches(page):
    """Samples, or pages, and heads of the cache far apart; pages smaller than a tile, and as large."""
    batch, capacity = 3, 64
    normal = lambda *shape: torch.randn(*shape)
    q, new = normal(batch, 1, 4, 16), normal(batch, 1, 2, 16)
    lengths = torch.tensor([60, 33, 64], dtype=torch.int32)
    visual = (torch.arange(capacity) < 20).expand(batch, -1)
    roles = visual, torch.ones(batch, 1, dtype=torch.bool), visual / 20
    options, weights = AttentionOptions(True, 0.25), WeightOptions(0.02)
    k, v = normal(batch, capacity, 2, 16), normal(batch, capacity, 2, 16)
    table = None
    if page:
        k, v = (t.view(-1, page, 2, 16) for t in (k, v))
        table = torch.randperm(len(k)).view(batch, -1).to(torch.int32)

    def run(k, v):
        append_kv(k, v, new, 2 * new, lengths, table)
        state = torch.zeros(batch, 4), torch.zeros(batch, 4), torch.zeros(batch), torch.ones(batch, 4)
        out = sar_decode_forward(
            q, k, v, lengths, *roles, *state, options=options, weights=weights, mode="running", block_table=table
        )
        return [t.clone() for t in out], [k.clone(), v.clone()]

    memory = reserve(len(k) * FAR, torch.float32)
    got, expected = run(*(spread(t, memory, i * 2**13) for i, t in enumerate((k, v)))), run(k, v)
    assert_same_forward(got[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1]))


@pytest.mark.everyday(stride=[9_000_001])
@pytest.mark.parametrize("stride", [9_000_000, 9_000_001, MAX_TOKEN_STRIDE - 1])
def test_tokens_of_one_chunk(stride):
    """2^31 elements lie between visual keys that are summed by one program: the variance's pivot is their mean.

    255 of these strides do not fit 32 bits. Both forms of the variance, the statistics alone, and the gradients.
    """
    inputs = make(CASE.but(seqlen_q=20, seqlen_k=256, images=(((0, 250),),), heads=1, kv_heads=1))
    dout = torch.randn_like(inputs.q)

    def run(k):
        out, lse, *saved = forward = sar_forward(inputs.q, k, inputs.v, *inputs.sav, **inputs.kwargs())
        again = attention_statistics(inputs.q, k, lse, *inputs.sav, **inputs.kwargs())
        call = Call(inputs.q, k, inputs.v, inputs.options, closed_form=True)
        closed, launches = plan_sar_forward(call, *inputs.sav, inputs.weights)
        run_all(launches)
        given = (*inputs.sav, *saved)
        gradients = sar_backward(dout, inputs.q, k, inputs.v, out, lse, *given, **inputs.kwargs(), sav_grad=True)
        return [*forward, *again, *closed[2:]], gradients

    memory = reserve(FAR + 256 * stride, torch.float32)[FAR:]  # an offset that wraps is still in it
    far = memory.as_strided(inputs.k.shape, (1, stride, 16, 1), FAR).copy_(inputs.k)
    (forward, gradients), (expected, exact) = run(far), run(inputs.k)
    assert_same_forward(forward, expected)
    assert_same_gradients(gradients, exact)


@pytest.mark.skipif(not INTERPRETED, reason="the memory between the tokens is for a CPU to reserve")
@pytest.mark.parametrize("stride", [MAX_TOKEN_STRIDE - 1, 2 * MAX_TOKEN_STRIDE])
@pytest.mark.parametrize("backend", ["torch", "composed"])
def test_tokens_far_apart_on_the_pytorch_backends(backend, stride):
    """Which have no limit."""
    inputs = make(CASE.but(seqlen_q=20, seqlen_k=256, images=(((0, 250),),), heads=1, kv_heads=1))
    memory = reserve(256 * stride, torch.float32)
    far = memory.as_strided(inputs.k.shape, (1, stride, 16, 1)).copy_(inputs.k)
    run = lambda k: sar_attn_func(inputs.q, k, inputs.v, *inputs.sav, backend=backend, return_stats=True)
    (out, stats), (expected, want) = run(far), run(inputs.k)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(stats.alignment_variance, want.alignment_variance)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strides_beyond_the_limit_are_refused(name):
    """By name, before anything is read; a single token's stride is never used."""
    tensors = {n: torch.zeros(1, 2, 1, 16) for n in "qkv"}
    run = lambda: attention_forward(**tensors, options=AttentionOptions(True, 0.25))
    far = torch.empty(2 * MAX_TOKEN_STRIDE, dtype=torch.float32, device="meta")
    tensors = {n: t.to("meta") for n, t in tensors.items()}
    tensors[name] = far.as_strided((1, 2, 1, 16), (1, MAX_TOKEN_STRIDE, 16, 1))
    with pytest.raises(ValueError, match=f"{name}: got token stride {MAX_TOKEN_STRIDE}, need less than"):
        run()


@pytest.mark.parametrize(("queries", "heads"), [(140, 1), (2, 4)])
def test_queries_and_heads_of_one_decode_step(queries, heads):
    """Queries, or heads of one group, whose strides fit 32 bits and of which a multiple does not."""
    normal = lambda *shape: torch.randn(*shape)
    q, k, v = normal(1, queries, heads, 16), normal(1, 150, 1, 16), normal(1, 150, 1, 16)
    lengths = torch.tensor([150], dtype=torch.int32)
    call = lambda q: [t.clone() for t in decode_forward(q, k, v, lengths, options=AttentionOptions(True, 0.25))]
    strides = (1, 2**24 - 1, 16, 1) if heads == 1 else (1, 16, FAR // 2, 1)
    memory = reserve(FAR + 2 * FAR, torch.float32)[FAR:]  # an offset that wraps is still in it
    assert_same_forward(call(memory.as_strided(q.shape, strides, FAR).copy_(q)), call(q))
