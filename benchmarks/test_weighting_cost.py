"""The benchmark of rules runs on a small prompt, and times no wrong answer."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import weighting_cost as cost

NAMES = (cost.PLAIN, cost.INSIDE, "HeadScales, learned")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [pytest.param(cost.FORWARD, marks=pytest.mark.slow), cost.THROUGH])
def test_records(mode, monkeypatch, tmp_path, capsys, device):
    monkeypatch.setattr(cost, "MODES", {mode: NAMES})
    path = tmp_path / "cost.json"
    cost.main(["--lengths", "96", "--repeats", "2", "--json", str(path)])
    found = json.loads(path.read_text())
    assert [(r["provider"], r["mode"], r["shape"]["N"]) for r in found["records"]] == [(n, mode, 96) for n in NAMES]
    plain, inside, _ = found["records"]
    assert plain["times_plain"] == inside["times_inside"] == 1
    assert all(r["milliseconds_p50"] > 0 and r["peak_extra_bytes"] >= 0 for r in found["records"])
    assert found["meta"]["torch"] == torch.__version__
    assert all(name in capsys.readouterr().out for name in NAMES[:1])


def test_training_reaches_the_scales(device):
    run = cost.make_call("HeadScales, learned", cost.TRAINING, 96, device, cost.BACKENDS[device])
    gradients = run()[1:]
    assert [tuple(g.shape) for g in gradients[3:]] == [(1, cost.HEADS)]
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("what", ["output", "weights"])
def test_no_timing_of_a_wrong_answer(what, monkeypatch, device):
    right = cost.sar_attn_func

    def wrong(*inputs, **options):
        out, stats = right(*inputs, **options)
        if what == "output":
            return out * 1.01, stats
        return out * 1.01, dataclasses.replace(stats, head_weights=stats.head_weights * 1.01)

    cost.check(device, cost.BACKENDS[device])
    monkeypatch.setattr(cost, "sar_attn_func", wrong)
    with pytest.raises(SystemExit, match="no timing of a wrong answer"):
        cost.check(device, cost.BACKENDS[device])
