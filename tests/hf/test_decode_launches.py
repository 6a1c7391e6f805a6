"""What a decode step launches beside attention itself: on a GPU its layers are short, and every kernel counts."""

from __future__ import annotations

from collections import Counter

import pytest

from sar_fast import SARConfig, apply_sar
from tests.hf.operators import Launches
from tests.hf.tiny import CASES


def launches_of_a_step(name, layers, cache, decode):
    """Operators of the second decode step by place, ``layers`` of the model's being re-weighted."""
    model, batch = CASES[name].make(), CASES[name].batch([1, 2, 0])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    seen, launches = [], Launches()
    with apply_sar(model, SARConfig(activation_layer_k=layers, decode=decode, beta=0.02)):
        hook = model.base_model.register_forward_hook(lambda *_: seen.append(Counter(launches.found)))
        with launches:
            model.generate(**batch, **options)
        hook.remove()
    return seen[2] - seen[1]


@pytest.mark.everyday(name=["llava"])
@pytest.mark.everyday(decode=["running"], cache=["dynamic"])
@pytest.mark.parametrize(
    ("decode", "cache", "a_layer"),
    [("running", "dynamic", 0), ("step", "dynamic", 2), ("prompt", "dynamic", 1), ("running", "static", 1)],
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_operators_of_a_layer(name, decode, cache, a_layer):
    """Of "step" av and sa times the count; where state is updated in place, a copy; NaN for a rule without."""
    one, two = (launches_of_a_step(name, layers, cache, decode) for layers in (1, 2))
    assert sum((two - one).values()) == a_layer


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_operators_of_a_pass(name):
    """V and T of one token, the prior over the keys that are there, and whether its mask hides any."""
    found = launches_of_a_step(name, 1, "dynamic", "running")
    assert sum(found.values()) <= 8
