"""The demo's page and numbers, and the pictures in it."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sar_fast import SARConfig, sar_attn_func
from sar_fast.cli import app, loading
from sar_fast.lab.demo import accuracy
from sar_fast.lab.io.answering import build_inputs
from sar_fast.lab.measure import measurements
from sar_fast.lab.measure.eager import eager_sar_attention
from sar_fast.lab.measure.recording import record, recording_off
from sar_fast.lab.measure.timing import attention_inputs
from sar_fast.lab.show import heatmap, overlay


def demo(folder, *arguments: str) -> tuple[str, dict]:
    """(page, metrics) of a demo run."""
    result = CliRunner().invoke(app, ["demo", "--output_dir", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    return (folder / "report.html").read_text(), json.loads((folder / "metrics.json").read_text())


def assert_self_contained(page: str) -> None:
    assert not re.search(r"https?://", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(s.startswith("data:image/") for s in sources)
    assert not re.search(r"@import|url\(|<script|<link", page)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    small = ("--num-questions", "5", "--sample-size", "2", "--no-timings", "--seed", "3", "--beta", "0.1", "--k", "4")
    return demo(tmp_path_factory.mktemp("demo"), *small)


def test_page_is_self_contained(drawn):
    page, _ = drawn
    assert_self_contained(page)
    assert page.count("<img") == 3 * 5
    assert "prefers-color-scheme: dark" in page


def test_page_and_metrics_agree(drawn):
    page, found = drawn
    total = found["total"]
    assert total["questions"] == 2 * 5 * 2
    assert total["right_on"] == total["right_off"] + total["gained"] - total["lost"]
    assert f"of {total['questions']} questions" in page
    assert found["meta"]["config"]["beta"] == 0.1
    assert set(found["head_weights"]) == {"0", "1", "2", "3"}
    for example in found["examples"]:
        assert example["question"] in page
        assert isinstance(example["right_on"], bool)


def test_same_seed_same_results(drawn, tmp_path):
    _, again = demo(
        tmp_path,
        "--num-questions",
        "5",
        "--sample-size",
        "0",
        "--no-timings",
        "--seed",
        "3",
        "--beta",
        "0.1",
        "--k",
        "4",
    )
    assert again["examples"] == drawn[1]["examples"]
    assert again["accuracy"] == {}


def test_own_picture_and_timings(tmp_path, monkeypatch):
    for name, value in {"ATTENTION_GRID": 8, "PREFILL_GRID": 8, "WIDTH": 64, "HEADS": 2, "REPEATS": 1}.items():
        monkeypatch.setattr(measurements, name, value)
    path = tmp_path / "<b>.png"  # names and questions are data, not markup
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(path)
    question = "What colour is the <script>circle</script>?"
    page, found = demo(tmp_path, "--image", str(path), "--question", question)
    assert_self_contained(page)
    assert "&lt;script&gt;" in page
    assert found["examples"][0]["truth"] is None
    assert found["total"] is None
    names = [set(t["seconds"]) for t in found["timings"]]
    assert names[:2] == [{measurements.PLAIN, measurements.EAGER, measurements.OURS}] * 2
    assert "What it costs" in page


def test_a_page_of_another_rule_names_it(drawn, tmp_path, own_rules):
    """The paper's sentence about head 0 is the paper's rule's, and so is the eager formulation."""
    assert "Head 0 is protected: it takes the largest factor of its layer." in drawn[0]
    assert "how sharply" in drawn[0]
    (tmp_path / "rules.py").write_text(
        "import torch\n\ndef some(statistics, layer):\n    return torch.tensor([0.0] * 7 + [-2.0])\n"
    )
    small = ("--num-questions", "2", "--sample-size", "1", "--k", "2", "--weighting", f"{tmp_path}/rules.py:some")
    page, found = demo(tmp_path, *small)
    assert "The rule is rules.py:some." in page
    assert not re.search("Head 0 is|how sharply|eager formulation", page)
    assert found["meta"]["config"]["weighting"]["name"] == f"{tmp_path}/rules.py:some"
    assert found["head_weights"] == {layer: [0.0] * 7 + [-2.0] for layer in ("2", "3")}
    assert [timing["short"] for timing in found["timings"]] == ["own prefill"]


def test_recording_off_changes_nothing():
    model, processor = loading.load_model("miniature")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    inputs = build_inputs(model, processor, [picture], ["What colour is the circle?"])
    seen = record(model, inputs, recording_off(model, SARConfig(activation_layer_k=2)))
    assert sorted(seen.stats) == [0, 1, 2, 3]
    assert all((s.head_weights == 1).all() for s in seen.stats.values())
    attention = seen.attention(0, [2, 3], weighted=False)
    assert attention.shape == (64,)
    assert 0 < attention.sum() < 1  # the rest of the query's attention is on text


def test_eager_formulation_is_the_same_function():
    inputs = attention_inputs(160, 96, torch.float64, heads=6, kv_heads=3, head_dim=16)
    torch.testing.assert_close(sar_attn_func(*inputs, beta=0.3), eager_sar_attention(*inputs, beta=0.3))
    with pytest.raises(ValueError, match="one sample"):
        eager_sar_attention(*(torch.cat([x, x]) for x in inputs))


def test_visual_grid():
    assert overlay.visual_grid({}, 576) == (24, 24)
    assert overlay.visual_grid({"image_grid_thw": torch.tensor([[1, 12, 20]])}, 60, merge_size=2) == (6, 10)
    with pytest.raises(ValueError, match="one rectangle"):
        overlay.visual_grid({}, 577)
    with pytest.raises(ValueError, match="one rectangle"):
        overlay.visual_grid({"image_grid_thw": torch.tensor([[1, 12, 20]] * 2)}, 120, merge_size=2)


def test_seen_region_is_the_centre_crop():
    class Crops:
        do_center_crop = True
        size = {"shortest_edge": 336}  # noqa: RUF012
        crop_size = {"width": 336, "height": 336}  # noqa: RUF012

    assert overlay.seen_region(Crops(), (600, 400)) == (100, 0, 500, 400)
    assert overlay.seen_region(object(), (600, 400)) == (0, 0, 600, 400)


def test_shares_and_head_average():
    mask = np.zeros((64, 96), dtype=bool)
    mask[:32, :24] = True
    uniform = np.full((8, 8), 1 / 64, dtype=np.float32)
    assert overlay.share_on_mask(uniform, mask) == pytest.approx(mask.mean())
    corner = np.zeros((8, 8), dtype=np.float32)
    corner[0, 0] = 0.3
    assert overlay.share_on_mask(corner, mask) == pytest.approx(1)
    rows = torch.tensor([[0.2, 0.0], [0.0, 0.4]])
    torch.testing.assert_close(overlay.head_average(rows), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(overlay.head_average(rows, torch.tensor([3.0, 1.0])), torch.tensor([0.15, 0.1]))
    torch.testing.assert_close(overlay.head_average(rows, torch.tensor([3.0, -1.0])), torch.tensor([0.15, 0.1]))
    nothing = overlay.head_average(rows, torch.zeros(2))  # every head is held back
    assert torch.equal(nothing, torch.zeros(2))
    assert overlay.share_on_mask(np.zeros((8, 8), dtype=np.float32), mask) == 0


def test_overlays_share_a_scale():
    picture = Image.new("RGB", (32, 32), "grey")
    weak, strong = np.full((4, 4), 0.1), np.full((4, 4), 0.2)
    bright = lambda values: np.asarray(overlay.heat_overlay(picture, values, 0.2)).mean()
    assert bright(strong) > bright(weak)
    with pytest.raises(ValueError, match="peak"):
        overlay.heat_overlay(picture, weak, 0.0)


def test_cell_colours_are_symmetric_about_one():
    (low, middle, high), *_ = heatmap.cell_colours(np.array([[0.5, 1.0, 2.0]]))
    assert middle[0].startswith("#f")  # nearly white
    assert low[0] != high[0]
    assert low[1] == high[1] == "#ffffff"
    assert heatmap.log_span(np.array([[0.5, 1.0]])) == 1.0
    assert heatmap.log_span(np.ones((1, 2))) == heatmap.LEAST_SPAN


def test_sign_test_and_verdict():
    counts = accuracy.PairedAccuracy(questions=100, right_off=80, right_on=90, gained=10, lost=0, changed=12)
    assert counts.p_value == pytest.approx(2 * 0.5**10)
    assert "SAR helped" in accuracy.verdict(counts)
    even = accuracy.PairedAccuracy(questions=100, right_off=80, right_on=80, gained=3, lost=3, changed=9)
    assert even.p_value == 1.0
    assert "within chance" in accuracy.verdict(even)
    assert math.isclose((counts + even).questions, 200)
    assert "no answer" in accuracy.verdict(accuracy.PairedAccuracy(10, 5, 5, 0, 0, 0))
