"""What trains the miniature of places: packed turns, the same numbers after an interruption, other pictures."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sar_fast import ArgumentError
from sar_fast.lab.miniature.checkpoint import answer, load_miniature
from sar_fast.lab.miniature.drawing import FORMS, PALETTE
from sar_fast.lab.miniature.places.checkpoint import SIDES, at_side
from sar_fast.lab.run.results import read_lines

MINIATURE = Path(__file__).parents[2] / "experiments" / "miniature"


@pytest.fixture
def scripts(monkeypatch):
    """Imports a module of the scripts' folder."""
    monkeypatch.syspath_prepend(str(MINIATURE))
    return importlib.import_module


@pytest.fixture
def small(scripts):
    """(model, processor) of two layers, untrained."""
    architecture, places = scripts("architecture"), scripts("places_model")
    design = dataclasses.replace(
        places.DESIGN,
        text=places.DESIGN.text | {"num_hidden_layers": 2},
        vision=places.DESIGN.vision | {"num_hidden_layers": 2},
    )
    processor = architecture.build_processor(places.vocabulary(), design, longest=places.LONGEST)
    torch.manual_seed(0)
    return architecture.build_model(processor.tokenizer, design).eval(), processor


def test_packed_turns_are_prompts_by_themselves(scripts, small):
    """One turn of a packed row gives the logits that a prompt of this turn alone gives the stock model."""
    model, processor = small
    places, batches = scripts("places_model"), scripts("places_batches")
    drawn = batches.training_places(np.random.default_rng(0), 2, bias=0.0, side=96)
    turns = batches.pack_turns(drawn, np.random.default_rng(1), processor, 5)
    pixels = scripts("batches").pixel_values([d.scene for d in drawn], processor)
    start = turns.input_ids.shape[1] - 5 * places.TURN
    alone = []
    with torch.no_grad():
        for number in range(5):
            first = start + number * places.TURN
            ids = torch.cat([turns.input_ids[:, :start], turns.input_ids[:, first : first + places.TURN]], 1)
            alone.append(model(input_ids=ids, pixel_values=pixels).logits[:, start:])
        learner = places.Learner(model, 5)
        hidden = learner(turns.input_ids, turns.position_ids, learner.features(pixels), turns.first)
        packed = model.lm_head(hidden)[:, start:]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-5, rtol=1e-4)
    learner.close()
    assert model.config.text_config._attn_implementation == "sdpa"
    assert not hasattr(model.model.language_model.config, "packed_turns")


def test_labels_are_the_answers_and_kinds_mark_their_words(scripts, small):
    _, processor = small
    batches = scripts("places_batches")
    drawn = batches.training_places(np.random.default_rng(0), 3, bias=0.9, side=96)
    turns = batches.pack_turns(drawn, np.random.default_rng(1), processor, 4)
    answered = turns.labels != -100
    assert (turns.labels[answered] == turns.input_ids[answered]).all()
    words = processor.tokenizer.convert_ids_to_tokens(turns.labels[turns.kinds >= 0])
    positions = words.count("left") + words.count("right")
    assert len(words) == 12 + positions
    assert positions > 0
    assert set(words) <= {*PALETTE, *FORMS, "yes", "no", "1", "2", "3", "top", "bottom", "left", "right"}
    assert (turns.labels[answered & (turns.kinds < 0)] == processor.tokenizer.eos_token_id).all()
    assert processor.tokenizer.unk_token_id not in turns.input_ids


def test_no_question_has_a_word_that_the_vocabulary_lacks_or_too_many(scripts, small):
    _, processor = small
    batches = scripts("places_batches")
    rng = np.random.default_rng(3)
    for bias in (0.0, 0.9):
        turns = batches.pack_turns(
            batches.training_places(rng, 60, bias=bias, side=96), rng, processor, 30
        )  # raises at a turn that is too long
        assert processor.tokenizer.unk_token_id not in turns.input_ids


def train(scripts, model, processor, folder: Path, stop: int | None):
    """Four steps of the language stage; ``stop`` interrupts after so many."""
    trainer, arguments = (
        scripts("train_places"),
        scripts("argparse").Namespace(turns=3, steps=4, batch=2, compile=False, bf16=False, device=torch.device("cpu")),
    )

    class Interrupted(trainer.Trainer):
        def step(self, *values):
            if self.step_number == stop:
                raise KeyboardInterrupt
            super().step(*values)

    log = [{"stage": "settings", "steps": 4}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "KEEP_EVERY", 2)
        patch.setattr(trainer, "Trainer", lambda *a: Interrupted(*a, every=2))
        trainer.train_language(model, processor, arguments, np.random.SeedSequence(7), log, folder / "run.pt")
    return log


def test_an_interrupted_training_goes_on_with_the_same_numbers(scripts, small, tmp_path):
    model, processor = small
    model.model.vision_tower.requires_grad_(False)
    start = {name: x.clone() for name, x in model.state_dict().items()}
    (tmp_path / "whole").mkdir()
    log = train(scripts, model, processor, tmp_path / "whole", None)
    whole = {name: x.clone() for name, x in model.state_dict().items()}

    model.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        train(scripts, model, processor, tmp_path, 3)
    model.load_state_dict(start)
    again = train(scripts, model, processor, tmp_path, None)
    assert [line["loss"] for line in again[1:]] == [line["loss"] for line in log[1:]]
    assert all((x == whole[name]).all() for name, x in model.state_dict().items())


def test_a_kept_run_of_other_settings_is_refused(scripts, small, tmp_path):
    model, _ = small
    learning = scripts("learning")
    trainer = learning.Trainer([model], "language", 2, [])
    learning.keep(tmp_path / "run.pt", model, trainer, np.random.default_rng(0), [{"steps": 2}])
    with pytest.raises(ValueError, match="other settings"):
        learning.go_on(tmp_path / "run.pt", model, trainer, np.random.default_rng(0), [{"steps": 3}])


def test_other_sides_have_interpolated_positions_and_the_own_side_the_same_answers(small):
    model, processor = small
    pixels = {side: torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)) for side in SIDES}
    for side, tokens in SIDES.items():
        resized, larger = at_side(model, processor, side)
        picture = np.zeros((50, 70, 3), dtype=np.uint8)
        inputs = larger(images=[picture], text=["USER: <image>\nWhat? ASSISTANT:"], return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens
        with torch.no_grad():
            assert resized(**inputs).logits.isfinite().all()
            tower = lambda m, **options: m.model.vision_tower(pixels[side], **options).last_hidden_state  # noqa: B023
            torch.testing.assert_close(tower(resized), tower(model, interpolate_pos_encoding=True))
    assert model.config.vision_config.image_size == 96
    with pytest.raises(ArgumentError, match="side must be one of 96, 144, 192"):
        at_side(model, processor, 100)


def test_conversations_begin_with_the_picture_and_have_the_answers(scripts):
    records = scripts("fine_tune_places").chat_records(np.random.default_rng(0), 3, 4, 0.9)
    for record in records:
        roles = [m["role"] for m in record["messages"]]
        assert roles == ["user", "assistant"] * 4
        assert [m["content"].count("<image>") for m in record["messages"]] == [1] + [0] * 7
        assert record["images"][0].size == (96, 96)


def run_script(scripts, monkeypatch, name: str, *words: object) -> None:
    monkeypatch.setattr("sys.argv", [name, "--threads", "1", *map(str, words)])
    scripts(name).main()


def test_the_miniature_s_script_writes_a_checkpoint_that_answers(scripts, monkeypatch, tmp_path):
    words = ["--vision_steps", 1, "--vision_batch", 2, "--steps", 1, 1, "--batch", 2, "--turns", 2, 2]
    run_script(scripts, monkeypatch, "train", "--output_dir", tmp_path / "out", "--log", tmp_path / "log.jsonl", *words)
    model, processor = load_miniature(path=tmp_path / "out")
    assert len(answer(model, processor, [np.zeros((64, 64, 3), np.uint8)], ["What colour is the circle?"])) == 1
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["batch"] == 2


def test_the_places_scripts_write_checkpoints_that_answer(scripts, monkeypatch, tmp_path):
    words = ["--vision_steps", 1, "--vision_batch", 2, "--steps", 1, "--batch", 2, "--turns", 2, "--no-compile"]
    run_script(scripts, monkeypatch, "train_places", "--output_dir", tmp_path / "base", *words)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    words = ["--groups", "sft", "--steps", 1, "--batch", 2, "--turns", 2]
    for _ in range(2):  # the second time finds it done
        run_script(
            scripts, monkeypatch, "fine_tune_places", "--base", tmp_path / "base", "--output_dir", tmp_path, *words
        )
    picture = np.zeros((96, 96, 3), np.uint8)
    for group in ("base", "sft"):
        model, processor = load_miniature(path=tmp_path / group)
        assert len(answer(model, processor, [picture], ["In the kitchen, is there a circle?"])) == 1
    assert read_lines(tmp_path / "sft" / "gradient_sparsity.jsonl")
