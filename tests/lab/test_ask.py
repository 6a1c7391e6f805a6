"""``ask``: one question about one picture, and where the model looked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sar_fast import SARConfig
from sar_fast.base.errors import ArgumentError
from sar_fast.hf import apply_sar
from sar_fast.lab import ask
from sar_fast.lab.io.answering import answer, build_inputs
from sar_fast.lab.measure.recording import record
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.drawing import draw_scene
from sar_fast.lab.show.overlay import heat_overlay
from tests.lab.lending import lent

pytestmark = pytest.mark.usefixtures("one_thread")

SAR = SARConfig(activation_layer_k=2, beta=0.05)
QUESTION = "Is there a red circle?"


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(5)
    return [Image.fromarray(draw_scene(rng).image) for _ in range(2)]


def test_the_answer_and_what_its_heads_measure(miniature, pictures):
    model, processor = miniature
    with lent(model, processor):
        found = ask(model, processor, pictures[0], QUESTION, sar=SAR)
    inputs = build_inputs(model, processor, pictures[:1], [QUESTION])
    with apply_sar(model, SAR):
        assert [found.text] == answer(model, processor, pictures[:1], [QUESTION])
    seen = record(model, inputs, SAR)
    assert sorted(found.head_weights) == sorted(found.sav) == sorted(found.attention) == [2, 3]
    for layer in (2, 3):
        assert torch.equal(found.head_weights[layer], seen.stats[layer].head_weights[0])
        assert torch.equal(found.sav[layer], seen.stats[layer].sav[0])
    frame = found.to_pandas()
    assert [*frame.columns] == ["layer", "head", "head_weight", "sav"]
    assert frame["head_weight"].tolist() == torch.cat([found.head_weights[layer] for layer in (2, 3)]).tolist()


def test_the_overlay_is_the_recordings_map(miniature, pictures, tmp_path):
    model, processor = miniature
    found = ask(model, processor, pictures[0], QUESTION, sar=SAR)
    seen = record(model, build_inputs(model, processor, pictures[:1], [QUESTION]), SAR)
    for layers in (None, [3]):
        values = seen.attention(0, layers or [2, 3], weighted=True).reshape(found.grid).numpy()
        expected = heat_overlay(pictures[0], values, float(values.max()))
        assert found.overlay(layers).tobytes() == expected.tobytes()
    with pytest.raises(ArgumentError, match=r"layers must be one or more of 2, 3; got \[0\]"):
        found.overlay([0])
    found.plot(tmp_path / "answer.png")
    assert (tmp_path / "answer.png").stat().st_size > 5000
    saved = found.save(tmp_path / "saved")
    stored = json.loads((saved / "answer.json").read_text())
    assert (stored["text"], len(stored["heads"])) == (found.text, 16)
    assert Image.open(saved / "picture.png").tobytes() == pictures[0].tobytes()
    with pytest.raises(ArgumentError, match="folder must be a new folder"):
        found.save(saved)


def test_without_sar_it_answers_and_measures_nothing(miniature, pictures):
    model, processor = miniature
    for sar in (None, SARConfig(activation_layer_k=0)):
        found = ask(model, processor, pictures[0], QUESTION, sar=sar)
        assert [found.text] == answer(model, processor, pictures[:1], [QUESTION])
        assert len(found.to_pandas()) == 0
        with pytest.raises(ValueError, match="no layer was re-weighted, and none looked at"):
            found.overlay()


def test_a_list_gives_a_list_and_sar_that_is_on_is_used(miniature, pictures, tmp_path):
    model, processor = miniature
    pictures[1].save(tmp_path / "two.png")
    alone = [ask(model, processor, one, words, sar=SAR) for one, words in zip(pictures, (QUESTION, "Where is it?"))]
    with apply_sar(model, SAR), lent(model, processor):
        together = ask(model, processor, [pictures[0], tmp_path / "two.png"], [QUESTION, "Where is it?"])
        (one,) = ask(model, processor, pictures[:1], QUESTION)
        several = ask(model, processor, pictures[0], [QUESTION, QUESTION])
    for a, b in zip([*together, one, *several], [*alone, *[alone[0]] * 3], strict=True):
        assert a.text == b.text
        assert all(torch.equal(a.head_weights[layer], b.head_weights[layer]) for layer in (2, 3))


def test_visual_tokens_without_a_rectangle_have_no_overlay(miniature, pictures, monkeypatch):
    monkeypatch.setattr("sar_fast.lab.benchmark.ask.visual_grid", lambda *_: (_ for _ in ()).throw(ValueError("tiles")))
    found = ask(*miniature, pictures[0], QUESTION, sar=SAR)
    assert found.grid is None
    with pytest.raises(ValueError, match="do not form one rectangle"):
        found.overlay()


@pytest.mark.parametrize(
    ("picture", "question", "change", "message"),
    [
        ("gone.png", QUESTION, {}, r"picture must be one that can be read; got one that does not exist \(gone\.png\)"),
        (b"", QUESTION, {}, "picture must be one that can be read; got one that is empty"),
        (None, QUESTION, {}, "picture must be one that can be read; got one that is missing"),
        ("grey", "  ", {}, "question must be some words; got '  '"),
        ("grey", "<image>?", {}, "question must be without '<image>', which stands for a picture"),
        ("grey", 3, {}, "question must be a text; got int"),
        (["grey", "grey"], [QUESTION], {}, "question must be one per picture; got 1 for 2 pictures"),
        ("grey", QUESTION, {"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1; got 0"),
        ("grey", QUESTION, {"sar": 2}, "sar must be a SARConfig or None; got int"),
    ],
)
def test_bad_arguments_change_nothing(miniature, picture, question, change, message):
    grey = Image.new("RGB", (8, 8))
    picture = [grey] * 2 if isinstance(picture, list) else grey if picture == "grey" else picture
    with pytest.raises(ArgumentError, match=message), lent(*miniature):
        ask(*miniature, picture, question, **change)
