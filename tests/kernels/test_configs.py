"""The choice of tiles: measured ones, where there are any, come before the rules."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from sar_kernels import configs
from sar_kernels.configs import KernelConfig, choose, config_key
from sar_kernels.decode.configs import LAYOUTS, cache_layout, choose_decode, decode_config_key
from sar_kernels.tools.shortlist import TUNABLE, candidates, choices, decode_candidates

BF16 = torch.bfloat16


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes measured configurations where the choosing functions look."""

    def write(found: dict[str, KernelConfig]) -> None:
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps({"configs": {key: asdict(config) for key, config in found.items()}}))
        monkeypatch.setattr(configs, "TUNED", path)
        choose.cache_clear()
        choose_decode.cache_clear()

    yield write
    choose.cache_clear()
    choose_decode.cache_clear()


def test_measured_tiles_come_first(tuned):
    measured = KernelConfig(64, 32, 4, 5, max_registers=168)
    decode = choose_decode("sm_90", 128, BF16, 4, "paged")
    forward = choose("forward", "sm_90", 128, BF16, causal=True, sav=True, length="long")
    assert measured not in (decode, forward)
    tuned(
        {
            decode_config_key("sm_90", 128, BF16, 4, "paged"): measured,
            config_key("forward", "sm_90", 128, BF16, True, False, "long"): measured,
        }
    )
    assert choose_decode("sm_90", 128, BF16, 4, "paged") == measured
    for sav in (False, True):  # plain attention must use the same tiles
        assert choose("forward", "sm_90", 128, BF16, causal=True, sav=sav, length="long") == measured
    assert choose_decode("sm_90", 128, BF16, 32, "paged") != measured
    assert choose_decode("sm_80", 128, BF16, 4, "paged") != measured
    assert choose("forward", "sm_90", 128, BF16, causal=False, sav=True, length="long") != measured


def test_every_key_that_the_tuner_writes_is_read(tuned):
    keys = [choice.key("sm_90") for choice in choices(TUNABLE, [64], ["bfloat16"], [512, 4096])]
    assert len(keys) == len(set(keys))
    found = {key: KernelConfig(16 * i, 16, 4, 1) for i, key in enumerate(keys)}
    tuned(found)
    read = [choose_decode("sm_90", 64, BF16, rows, layout) for rows in (4, 32) for layout in LAYOUTS]
    for kernel in configs.KERNELS:
        for causal in (True, False):
            for length in ("short", "long"):
                savs = {"forward": (False,), "statistics": (True,), "second_moments": (True,)}
                savs = savs.get(kernel, (False, True))
                read += [choose(kernel, "sm_90", 64, BF16, causal=causal, sav=sav, length=length) for sav in savs]
    assert sorted(map(repr, read)) == sorted(map(repr, found.values()))


def test_the_rules_are_among_the_candidates():
    """The tuner can find again what the compiler's figures chose."""
    for layout in LAYOUTS:
        for head_dim in (64, 128, 256):
            for rows in (4, 32):
                assert choose_decode("sm_90", head_dim, BF16, rows, layout) in decode_candidates(rows <= 16)
    forward = choose("forward", "sm_90", 128, BF16, causal=True, sav=False, length="long")
    assert replace(forward, max_registers=None) in candidates("forward")


def test_registers_are_limited_on_nvidia_alone():
    """Triton's AMD back end has no such option and would refuse it."""
    from sar_kernels.decode.configs import combine_config

    for arch in ("gfx942", "gfx950"):
        for layout in LAYOUTS:
            assert choose_decode(arch, 128, BF16, 4, layout).max_registers is None
        assert combine_config(arch).max_registers is None


def test_padding_and_a_soft_cap_lift_the_limit_on_registers():
    """In plain attention too: both must use the same tiles."""
    for sav in (False, True):
        limited, lifted = (
            choose("forward", "sm_90", 64, BF16, causal=True, sav=sav, length="long", padded_and_capped=both)
            for both in (False, True)
        )
        assert limited.max_registers == 168
        assert lifted == replace(limited, max_registers=None)


def test_small_pages_are_those_that_no_tile_fits_into():
    assert [cache_layout(page) for page in (0, 16, 48, 64, 96, 256)] == [
        *("dense", "small-pages", "small-pages", "paged", "small-pages", "paged")
    ]
    tiles = [choose_decode("sm_90", d, BF16, rows, "paged").block_n for d in (64, 128, 256) for rows in (4, 32)]
    assert all(64 % block_n == 0 for block_n in tiles)
