"""FlashAttention's own tests, run against this project's ``flash_attn_*`` functions.

    git clone https://github.com/Dao-AILab/flash-attention && pip install einops
    python tests/acceptance/flash_attention.py --checkout flash-attention                   # CPU: PyTorch backends
    python tests/acceptance/flash_attention.py --checkout flash-attention --backend triton  # GPU, or interpreted
    python tests/acceptance/flash_attention.py --checkout flash-attention --cases ::97                # every 97th

The test file is taken as it is, but for its device string and its grids: their sizes (``--head-dims``,
``--max-seqlen``), values that ask for what is refused by name (``OFF``), which leave them, and values that a test takes
but its grid leaves out (``ADDED``). Left out are ``test_flash_attn_varlen_paged_kv_num_splits``, which calls a private
function of theirs, and on a CPU the search for races. pytest's own summary says what passed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import types
from pathlib import Path

import pytest

RACES = "test_flash_attn_race_condition"  # 250 repeats of batches of 60, which a CPU has no races for
TESTS = (
    *("test_flash_attn_qkvpacked", "test_flash_attn_varlen_qkvpacked"),
    *("test_flash_attn_output", "test_flash_attn_varlen_output", "test_flash_attn_causal"),
    *("test_flash_attn_varlen_causal", "test_flash_attn_splitkv", "test_flash_attn_kvcache", RACES),
    *("test_flash_attn_bwd_overflow", "test_flash_attn_bwd_transpose", "test_flash_attn_bwd_varlen_overflow"),
    *("test_flash_attn_deterministic", "test_flash_attn_varlen_deterministic"),
)

OFF = {"dropout_p": [0.0], "alibi": [False]}  # argument -> the values that stay
OFF_COMPOSED = {"softcap": [0.0]}  # PyTorch's fused kernels have no soft-capping
ADDED = {"has_batch_idx": [False, True]}  # argument -> all values that the test takes


def stub_flash_attn(backend: str) -> None:
    """Modules named ``flash_attn`` whose functions are ours."""
    import torch
    import torch.nn.functional as F

    import sar_fast

    def bound(function):
        return lambda *args, **kwargs: function(*args, backend=backend, **kwargs)

    def unpad_input(x, mask):
        lengths = mask.sum(-1, dtype=torch.int32)
        index = mask.flatten().nonzero()[:, 0]
        cu = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return x.flatten(0, 1)[index], index, cu, int(lengths.max()), lengths

    def pad_input(x, index, batch, seqlen):
        out = x.new_zeros(batch * seqlen, *x.shape[1:])
        return out.index_put((index,), x).view(batch, seqlen, *x.shape[1:])

    def refused(*args, **kwargs):
        raise AssertionError("called by a test that this run does not select")

    def apply_rotary_emb(x, cos, sin, seqlen_offsets, interleaved):
        """x (B, S, H, D) at positions seqlen_offsets (B,) and on, as a product of complex numbers."""
        at = seqlen_offsets[:, None].long() + torch.arange(x.shape[1], device=x.device)
        angle = torch.complex(cos.float(), sin.float())[at][:, :, None]  # [B, S, 1, R / 2]
        half = cos.shape[1]
        front, rest = x.float()[..., : 2 * half], x[..., 2 * half :]
        pairs = front.unflatten(-1, (half, 2)) if interleaved else front.unflatten(-1, (2, half)).mT
        pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
        return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2).to(x.dtype), rest], -1)

    root = types.ModuleType("flash_attn")
    for name in sar_fast.__all__:
        if name.startswith("flash_attn_"):
            setattr(root, name, bound(getattr(sar_fast, name)))
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = pad_input, unpad_input
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._get_block_size_n, interface.USE_TRITON_ROCM = refused, False
    layers, rotary = types.ModuleType("flash_attn.layers"), types.ModuleType("flash_attn.layers.rotary")
    rotary.apply_rotary_emb = apply_rotary_emb
    for module in (root, padding, interface, layers, rotary):
        sys.modules[module.__name__] = module


class SmallGrids:
    """pytest plugin: keep only the parameter values that this run covers."""

    def __init__(self, backend: str, head_dims: list[int], max_seqlen: int, dtypes: list, cases: slice) -> None:
        self.keep = {**OFF, **(OFF_COMPOSED if backend == "composed" else {}), "d": head_dims}
        self.max_seqlen, self.dtypes, self.cases = max_seqlen, dtypes, cases

    def pytest_generate_tests(self, metafunc) -> None:
        for mark in metafunc.definition.iter_markers("parametrize"):
            names = (
                [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else list(mark.args[0])
            )
            values = ADDED.get(names[0], mark.args[1])
            mark.args[1][:] = [v for v in values if self._covers(names, v)]

    def pytest_collection_modifyitems(self, config, items) -> None:
        chosen = items[self.cases]
        if not chosen:
            raise pytest.UsageError(f"--cases: got {self.cases}, need some of {len(items)}")
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen

    def _covers(self, names: list[str], value) -> bool:
        parts = value if len(names) > 1 else (value,)
        for name, part in zip(names, parts):
            if name in self.keep and part not in self.keep[name]:
                return False
            if name in ("seqlen_q", "seqlen_k", "seqlen") and part > self.max_seqlen:
                return False
            if name == "dtype" and part not in self.dtypes:
                return False
        return True


def case_range(text: str) -> slice:
    """ "100:200", "100:", ":200" or "::50": positions in the order of collection, as Python's slices."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not "".join(parts).isdecimal() or parts[2:] == ["0"]:
        raise argparse.ArgumentTypeError(f"got {text!r}, need START:END or START:END:STEP, of which parts may be empty")
    return slice(*(int(part) if part else None for part in parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of Dao-AILab/flash-attention")
    parser.add_argument("--backend", default="auto", choices=["auto", "triton", "composed", "torch"])
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--max-seqlen", type=int, default=256)
    parser.add_argument("--tests", nargs="+", choices=TESTS, metavar="TEST", help="default: all that suit the device")
    parser.add_argument(
        "--cases", type=case_range, default=slice(None), help="START:END:STEP of the collected cases, to run some"
    )
    args, pytest_args = parser.parse_known_args()
    source = args.checkout / "tests" / "test_flash_attn.py"
    if not source.is_file():
        parser.error(f"--checkout must hold tests/test_flash_attn.py; {source} does not exist")

    if args.backend == "triton" and args.device in (None, "cpu"):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # ignored below if a GPU is chosen
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        torch.cuda.get_device_capability = lambda *a, **k: (8, 0)
        torch.cuda.get_device_properties = lambda *a, **k: types.SimpleNamespace(total_memory=80 * 2**30)
        torch.cuda.synchronize = lambda *a, **k: None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and args.backend == "triton"
    dtypes = [torch.float16] if interpreted else [torch.float16, torch.bfloat16]  # bf16 is wrong in the interpreter
    stub_flash_attn(args.backend)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "test_flash_attn.py"
        copy.write_text(source.read_text().replace('"cuda"', repr(device)))
        tests = args.tests or [name for name in TESTS if device == "cuda" or name != RACES]
        selected = [f"{copy}::{name}" for name in tests]
        plugin = SmallGrids(args.backend, args.head_dims, args.max_seqlen, dtypes, args.cases)
        return pytest.main(
            [*selected, "-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", os.devnull, *pytest_args], [plugin]
        )


if __name__ == "__main__":
    raise SystemExit(main())
