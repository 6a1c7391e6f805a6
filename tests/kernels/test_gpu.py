"""What only a GPU can show: real sizes in 16 bits, CUDA graphs, no waiting, no recompilation, repeatable bits."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, both_gradients, check_forward, check_gradients, make

from sar_kernels.attention import AttentionOptions, WeightOptions, attention_forward, sar_backward, sar_forward
from sar_kernels.configs import CLOSED_FORM
from sar_kernels.decode.call import append_kv, decode_workspace, sar_decode_forward

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
REAL = Case(name="real", images=(((35, 611),),), beta=0.5)
OPTIONS = [
    {},
    {"causal": False, "images": (((35, 611),), ((0, 300),))},
    {"window": (700, -1), "softcap": 20.0},
    {"padding": ((100, 1000),), "text_only_rows": False},
]


def sized(seqlen: int, head_dim: int, dtype: torch.dtype, **options) -> Case:
    return REAL.but(seqlen_q=seqlen, seqlen_k=seqlen, head_dim=head_dim, dtype=dtype, **options)


def everything(inputs) -> list[torch.Tensor]:
    """A forward and an exact backward pass: every tensor that they return."""
    out, lse, *saved = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    gradients = sar_backward(
        out, inputs.q, inputs.k, inputs.v, out, lse, *inputs.sav, *saved, **inputs.kwargs(), sav_grad=True
    )
    return [out, lse, *saved, *gradients]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [1000, 4096])
def test_forward(seqlen, head_dim, dtype):
    inputs = make(sized(seqlen, head_dim, dtype))
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_variance_in_closed_form(head_dim, dtype):
    """Keys about a common offset, a channel that outgrows the others, and a picture of few tokens beside."""
    images = (((35, 2083),), ((100, 150),))
    inputs = make(sized(CLOSED_FORM, head_dim, dtype, images=images, heads=2, kv_heads=1))
    channel, offset = (20, 30) if dtype == torch.bfloat16 else (4, 5)  # eager PyTorch sums scores in float16
    inputs.k[..., 3] *= channel
    inputs.k += offset * torch.randn(head_dim).to(dtype)
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))


@pytest.mark.parametrize("head_dim", [80, 256])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_with_options(head_dim, options):
    inputs = make(sized(1023, head_dim, torch.bfloat16, **options))
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))


@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant-c", "sav-grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seqlen", "head_dim"), [(1000, 64), (1000, 128), (1000, 256), (2048, 128), (4096, 64)])
def test_backward(seqlen, head_dim, dtype, sav_grad):
    check_gradients(*both_gradients(sized(seqlen, head_dim, dtype), sav_grad))


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_backward_with_options(options):
    check_gradients(*both_gradients(sized(1023, 128, torch.bfloat16, **options), True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_every_time(head_dim):
    """Nothing is added in an order that depends on timing, and no program reads what another still writes."""
    inputs = make(sized(2048, head_dim, torch.bfloat16))
    first = everything(inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(everything(inputs), first))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_without_image_is_plain_attention_bit_for_bit(head_dim, dtype):
    """The compiler must contract the same products with the statistics as without."""
    inputs = make(sized(1500, head_dim, dtype, images=(((35, 611),), ()), beta=1e-4))
    plain, plain_lse = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    out, lse, *_ = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    assert torch.equal(out[1], plain[1])
    assert torch.equal(lse[1], plain_lse[1])
    assert not torch.equal(out[0], plain[0])


class Decode:
    """A cache of two samples that have room for `steps` more tokens; `step` needs no host and no new memory."""

    batch, heads, kv_heads, page = 2, 8, 2, 16

    def __init__(self, mode: str, head_dim: int, capacity: int, paged: bool, dtype=torch.bfloat16):
        normal = lambda *shape: torch.randn(*shape).to(dtype)
        self.mode = mode
        self.options, self.weights = AttentionOptions(True, head_dim**-0.5), WeightOptions(0.5)
        self.cache = normal(2, self.batch, capacity, self.kv_heads, head_dim)
        self.table = None
        if paged:
            pages = self.batch * capacity // self.page
            self.cache = self.cache.view(2, pages, self.page, self.kv_heads, head_dim)
            self.table = torch.randperm(pages).view(self.batch, -1).to(torch.int32)
        self.lengths = torch.tensor([capacity // 2, capacity // 3], dtype=torch.int32)
        token = torch.arange(capacity).expand(self.batch, -1)
        self.visual = (token >= 5) & (token < capacity // 4)
        self.prior = self.visual / self.visual.sum(-1, keepdim=True)
        self.text = torch.ones(self.batch, 1, dtype=torch.bool)
        self.state = torch.rand(self.batch, self.heads), torch.rand(self.batch, self.heads), torch.full((2,), 3.0)
        self.head_weights = torch.rand(self.batch, self.heads)
        self.new = normal(self.batch, 1, self.heads + 2 * self.kv_heads, head_dim)
        sizes = (self.batch, 1, self.heads, self.kv_heads, head_dim, capacity)
        self.workspace = decode_workspace(*sizes, dtype=dtype, device=self.lengths.device)

    def changing(self) -> list[torch.Tensor]:
        return [self.cache, self.lengths, *self.state]

    def step(self) -> tuple[torch.Tensor, ...]:
        q, k, v = self.new.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        self.lengths.add_(1)
        append_kv(self.cache[0], self.cache[1], k, v, self.lengths, self.table)
        return sar_decode_forward(
            q,
            self.cache[0],
            self.cache[1],
            self.lengths,
            *((None, None, None) if self.mode == "prompt" else (self.visual, self.text, self.prior)),
            *self.state,
            self.head_weights,
            options=self.options,
            weights=self.weights,
            mode=self.mode,
            block_table=self.table,
            workspace=self.workspace,
        )


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
def test_decode_step_in_a_cuda_graph(mode, head_dim, paged):
    """A captured step, replayed with new tokens, does what the same step does when it is launched."""
    decode = Decode(mode, head_dim, 1024, paged)
    start = [t.clone() for t in decode.changing()]
    tokens = torch.randn(8, *decode.new.shape).to(decode.new.dtype)

    def reset() -> None:
        for tensor, value in zip(decode.changing(), start):
            tensor.copy_(value)

    launched = []
    for token in tokens:
        decode.new.copy_(token)
        launched.append([t.clone() for t in decode.step()])
    after = [t.clone() for t in decode.changing()]
    reset()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = decode.step()
    reset()
    for token, expected in zip(tokens, launched):
        decode.new.copy_(token)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
    assert all(torch.equal(a, b) for a, b in zip(decode.changing(), after))


def test_nothing_waits_for_the_gpu():
    inputs, decode = make(sized(1000, 64, torch.bfloat16)), Decode("running", 64, 1024, True)
    everything(inputs), decode.step()  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(inputs), decode.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def _untuned(monkeypatch, tmp_path):
    """The rules' tiles: measured ones may differ between short and long sequences."""
    from sar_kernels import configs
    from sar_kernels.decode import configs as decode_configs

    monkeypatch.setattr(configs, "TUNED", tmp_path / "tuned.json")
    chosen = configs.choose, decode_configs.choose_decode
    for choose in chosen:
        choose.cache_clear()
    yield
    for choose in chosen:
        choose.cache_clear()


@pytest.mark.usefixtures("_untuned")
def test_lengths_never_compile_another_kernel():
    """The launch cache of every kernel stays as it is when only lengths change."""
    from sar_kernels.decode import cache
    from sar_kernels.decode import kernels as decode
    from sar_kernels.dense import dkdv, dq, forward, moments, prepare, statistics, weights

    modules = (cache, decode, dkdv, dq, forward, moments, prepare, statistics, weights)
    kernels = {k for m in modules for k in vars(m).values() if hasattr(k, "device_caches")}
    compiled = lambda: {k.__name__: len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels}

    def run(length: int) -> None:
        everything(make(REAL.but(seqlen_q=length, seqlen_k=length, images=(((0, length // 2),),), dtype=torch.float16)))
        decode = Decode("running", 64, 16 * length, False)
        decode.step()

    run(1001)
    run(CLOSED_FORM + 5)
    before = compiled()
    assert sum(before.values()) > 8
    for length in (17, 1024, 64, 3, CLOSED_FORM, CLOSED_FORM + 64):
        run(length)
    assert compiled() == before
