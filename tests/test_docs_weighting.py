"""The Python blocks of the pages on weightings run in order, and do what the pages say of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sar_fast import SARConfig, apply_sar, flash_attn_func, sar_attn_func
from sar_fast.lab.measure.timing import attention_inputs
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.questions import build_prompt, draw_questions
from sar_fast.method.weighting import registry
from sar_fast.weighting import Fixed, ReinforceHeads, TopHeads
from tests.helpers import max_error

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
CALL = ("q", "k", "v", "visual_mask", "text_mask", "prior")


def blocks(page: str) -> list[str]:
    """The page's Python blocks."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert found, page
    return found


def run(page: str, names: dict[str, object]) -> dict[str, object]:
    """What the page's blocks leave in ``names``; one that begins with a file's name is written to that file."""
    for number, source in enumerate(blocks(page)):
        if file := re.match(r"# (\w+\.py)\n", source):
            Path(file[1]).write_text(source)
        else:
            exec(compile(source, f"{page}, block {number}", "exec"), names)
    return names


@pytest.fixture
def names(monkeypatch, tmp_path) -> dict[str, object]:
    """What the pages say is there; files are written to a folder of the test's, rules registered for it alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    call = attention_inputs(96, 48, torch.float32, heads=8, kv_heads=4, head_dim=16, batch=2)
    model, processor = load_miniature()
    pairs = draw_questions(np.random.default_rng(0), 1, ("plain",))[:2]
    texts, images = [build_prompt(question.text) for _, question in pairs], [scene.image for scene, _ in pairs]
    batch = lambda **given: dict(processor(padding=True, return_tensors="pt", **given))
    seen = batch(text=texts, images=images)
    unseen = batch(text=[text.replace("<image>\n", "") for text in texts])
    return {**dict(zip(CALL, call)), "model": model, "inputs": seen, "inputs_without_picture": unseen}


def test_weighting_page(names):
    found = run("docs/weighting.md", names)
    q, k, v = (found[name] for name in CALL[:3])
    call = [found[name] for name in CALL]
    plain = flash_attn_func(q, k, v, causal=True)

    # the function, and the same compiled
    out, stats = sar_attn_func(*call, weighting=found["proportional"], return_stats=True)
    torch.testing.assert_close(stats.head_weights.mean(-1), torch.ones(2))
    assert stats.head_weights.std(-1).min() > 0.01
    torch.testing.assert_close(stats.head_weights, stats.sav / stats.sav.mean(-1, keepdim=True))
    assert max_error(found["same"], out) <= 1e-6

    # the tables: a head that is off, weights per sample
    assert max_error(found["out"], plain * found["per_sample"][:, None, :, None]) <= 1e-6
    model, inputs = found["model"], found["inputs"]
    with torch.no_grad():
        full = model(**inputs).logits
    assert max_error(found["ablated"], full) > 0.1
    with torch.no_grad():
        attention = [model.model.language_model.layers[i].self_attn.o_proj.weight for i in (0, 2)]
        attention[0][:, 3 * 16 : 4 * 16] = 0
        attention[1][:, 5 * 16 : 6 * 16] *= 1.5
        assert max_error(found["ablated"], model(**inputs).logits) <= 1e-4

    # what learned, and what did not
    assert found["importance"].shape == (4, 8)
    assert (found["importance"] > 0).all()
    assert found["slope_gradient"].abs().min() > 0
    assert found["gates"].bias.abs().min() > 0  # after one step
    assert all(p.grad is None or not p.requires_grad for p in model.parameters())

    # divergence, names, files
    assert sorted(found["divergence"]) == [0, 1, 2, 3]
    assert found["again"].weighting == found["ByMass"](0.3)
    assert '"by_mass"' in found["text"]
    assert found["by_name"] == TopHeads(4)
    rule = found["from_file"]
    _, kept = sar_attn_func(*call, weighting=rule, return_stats=True)
    above = kept.semantic_alignment > kept.semantic_alignment.mean(-1, keepdim=True)
    torch.testing.assert_close(kept.head_weights, torch.where(above, 1.0, 0.2))
    assert ReinforceHeads(found["divergence"]).options()["factor"] == 2.0


def test_row_statistics_page(names):
    found = run("docs/row_statistics.md", names)
    call = [found[name] for name in CALL]
    _, stats = sar_attn_func(*call, weighting=found["Focused"](), row_statistics=(found["Peak"](),), return_stats=True)
    assert set(stats.rows) == {"mass", "entropy", "peak"}
    assert (stats.rows["peak"] < stats.rows["mass"]).all()
    with apply_sar(
        found["model"], SARConfig(activation_layer_k=4, weighting=found["Focused"](), record=True)
    ) as handle:
        found["model"](**found["inputs"])
    torch.testing.assert_close(handle.stats[0].head_weights.mean(-1), torch.ones(2))


SHIPPED = r"^\| `(\w+)` \| `(\w+)\("


def test_every_shipped_rule_is_in_the_table():
    """By its name and its class, with the defaults that it has."""
    page = (ROOT / "docs/weighting.md").read_text()
    listed = dict(re.findall(SHIPPED, page, flags=re.MULTILINE))
    shipped = {name: rule.__name__ for name, rule in registry._rules.items() if rule.__module__.startswith("sar_fast.")}
    assert listed == shipped


BAD = {"list": lambda: [1.0] * 8, "five": lambda: torch.ones(5), "nan": lambda: torch.full((8,), torch.nan)}


@pytest.mark.parametrize("bad", BAD)
def test_errors_are_those_of_the_page(names, bad):
    def my_rule(statistics, layer):
        return BAD[bad]()

    with pytest.raises((TypeError, ValueError)) as raised:
        sar_attn_func(*(names[name] for name in CALL), weighting=my_rule)
    assert f"`{raised.type.__name__}: {raised.value}`" in (ROOT / "docs/weighting.md").read_text()


def test_readme_snippet(names):
    """Three rules on a model, each put on, asked, and taken off."""
    (source,) = (block for block in blocks("README.md") if "weighting=" in block)
    handles = []

    def spied(model, config):
        handles.append(apply_sar(model, dataclasses.replace(config, record=True)))
        return handles[-1]

    exec(compile(source, "README.md", "exec"), {**names, "SARConfig": SARConfig, "apply_sar": spied})
    proportional, top = ([handle.stats[i].head_weights for i in range(4)] for handle in handles[:2])
    for c in proportional:
        torch.testing.assert_close(c.mean(-1), torch.ones(2))
    assert all(((c == 1).sum(-1) == 4).all() and ((c == 0).sum(-1) == 4).all() for c in top)
    assert handles[2].config.weighting == Fixed([1.0, 0.0] * 4)
    assert names["model"].model.language_model.config._attn_implementation != "sar"
