"""sar-fast paper: all stages on a fraction of the data, a report with every figure, and nothing done twice."""

from __future__ import annotations

import json
import re

import pytest

from sar_fast.paper import Paper, run
from sar_fast.paper import run as package_run
from sar_fast.paper.report import findings

GROUPS = ("Base", "SFT", "SFT + SAR", "Control")


@pytest.mark.slow
def test_the_whole_paper_on_a_fraction_of_the_data(tmp_path):
    paper = Paper(tmp_path, max_samples=8, epochs=0.1, swept_k=(0, 1, 4), swept_beta=(0.5,))
    page = run(paper).read_text()
    assert all(f"<h2>Figure {n}</h2>" in page for n in (3, 4, 5, 6))
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+", "", page)  # self-contained
    for group in GROUPS:
        assert f"<th>{group}</th>" in page
    summary = json.loads((tmp_path / "paper.json").read_text())
    assert len(summary["stages"]) == 2 + len(GROUPS) * (6 + 2) + 1
    sar = next(s for s in summary["stages"] if s["title"] == "pope: SFT + SAR")
    assert "--use_sar --sar_activation_layer_k 2 --sar_beta 0.5" in sar["command"]
    trained = (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns

    again = run(paper)
    assert (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns == trained
    same = json.loads((tmp_path / "paper.json").read_text())
    scores = lambda found: [s["results"].get("headline") for s in found["stages"]]
    assert scores(same) == scores(summary)
    assert again.is_file()
    with pytest.raises(ValueError, match="holds a training of other settings"):
        run(Paper(tmp_path, max_samples=8, epochs=0.2))


def stages(with_sar: float, sfs: float) -> dict:
    """Stages of made-up results: every benchmark scores 50, but with SAR."""
    from sar_fast.paper.run import TASKS

    made = {}
    for group in GROUPS:
        value = with_sar if group == "SFT + SAR" else 50.0
        made |= {f"{task}: {group}": {"results": {"main": value}} for task in TASKS}
        focus = {
            "semantic_focus_score": sfs if group == "SFT + SAR" else 0.3,
            "semantic_focus_score_ci95": [0.25, 0.35],
        }
        made[f"SFS and FI: {group}"] = {"results": focus}
    return made


@pytest.mark.parametrize(
    ("with_sar", "sfs", "said"),
    [
        (52.0, 0.4, ("raises", "beyond")),
        (48.0, 0.3, ("lowers", "within")),
        (50.01, 0.2, ("does not change", "beyond")),
    ],
)
def test_findings_say_what_came_out_for_and_against(tmp_path, with_sar, sfs, said):
    first, _, last = findings(Paper(tmp_path), stages(with_sar, sfs))
    assert said[0] in first
    assert said[1] in last


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[package_run.__module__], "EXPERIMENTS", tmp_path / "experiments")
    with pytest.raises(FileNotFoundError, match="runs from a checkout of the repository"):
        run(Paper(tmp_path))
