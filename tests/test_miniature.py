"""The shipped miniature: its pictures, its questions, its checkpoint and what it can answer."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.checkpoint import answer, load_miniature
from sar_fast.lab.miniature.drawing import (
    BACKGROUNDS,
    COLOURS,
    HALF_EXTENT,
    HELD_OUT_PHOTOGRAPHS,
    SHAPES,
    TRAINING_PHOTOGRAPHS,
    ObjectSpec,
    compose,
    draw_background,
    draw_scene,
    photograph,
    sample_specs,
)
from sar_fast.lab.miniature.questions import (
    BOX_BINS,
    KINDS,
    Question,
    ask,
    box_iou,
    build_prompt,
    decode_box,
    draw_questions,
    encode_box,
    is_correct,
    quadrant,
)

GREY = np.full((64, 64, 3), 128, dtype=np.uint8)
# About 0.04 below what experiments/miniature/accuracy.json states: three standard errors of 120 questions at 0.97.
FLOOR = {"colour": 0.93, "shape": 0.93, "existence": 0.9, "position": 0.9, "box": 0.85}


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the miniature must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---- drawing


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_same_seed_draws_the_same_scene(background):
    first, second, other = (draw_scene(np.random.default_rng(s), background=background) for s in (7, 7, 8))
    assert np.array_equal(first.image, second.image)
    assert [(o.name, o.box) for o in first.objects] == [(o.name, o.box) for o in second.objects]
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_boxes_masks_and_pixels_agree(background):
    rng = np.random.default_rng(0)
    for _ in range(30):
        scene = draw_scene(rng, background=background)
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        assert len({o.name for o in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            x1, y1, x2, y2 = item.box
            assert item.mask[y1:y2, x1:x2].sum() == item.mask.sum()
            assert all(
                edge.any() for edge in (item.mask[y1], item.mask[y2 - 1], item.mask[:, x1], item.mask[:, x2 - 1])
            )
            assert 2 * HALF_EXTENT[0] * 64 - 2 <= x2 - x1 <= 2 * HALF_EXTENT[1] * 64 + 2
            nearest = min(COLOURS, key=lambda c: np.abs(scene.image[item.mask].mean(0) - COLOURS[c]).sum())
            assert nearest == item.colour
        assert sum(o.mask.astype(int) for o in scene.objects).max() == 1


def test_x_is_horizontal_y_points_down_and_the_triangle_points_up():
    scene = compose(GREY, [ObjectSpec("red", "triangle", centre=(0.75, 0.25), half_extent=0.2)])
    (item,) = scene.objects
    assert item.box == (35, 4, 61, 29)  # the first row of the apex is covered by less than half
    assert scene.image[16, 48].tolist() == list(COLOURS["red"])
    assert scene.image[48, 16].tolist() == [128, 128, 128]
    widths = item.mask.sum(1)[4:29]
    assert (np.diff(widths) >= 0).all()
    assert widths[-1] > 4 * widths[0]
    wide = compose(np.zeros((40, 120, 3), np.uint8), [ObjectSpec("blue", "square", (0.9, 0.5), 0.25)])
    assert wide.objects[0].box == (98, 10, 118, 30)  # half of the shorter side, in both directions


def test_areas_are_those_of_the_shapes():
    extent = 2 * 0.3 * 256
    area = {s: compose_one(s).objects[0].mask.sum() / extent**2 for s in SHAPES}
    assert area["square"] == pytest.approx(1, rel=0.02)
    assert area["circle"] == pytest.approx(np.pi / 4, rel=0.02)
    assert area["triangle"] == pytest.approx(1 / 2, rel=0.02)


def compose_one(shape):
    return compose(np.zeros((256, 256, 3), np.uint8), [ObjectSpec("red", shape, (0.5, 0.5), 0.3)])


def test_a_later_object_hides_an_earlier_one():
    below, above = ObjectSpec("red", "square", (0.5, 0.5), 0.3), ObjectSpec("blue", "circle", (0.6, 0.5), 0.2)
    scene = compose(GREY, [below, above])
    assert not (scene.objects[0].mask & scene.objects[1].mask).any()
    with pytest.raises(ValueError, match="red square has no visible pixel"):
        compose(GREY, [ObjectSpec("red", "square", (0.5, 0.5), 0.1), ObjectSpec("blue", "square", (0.5, 0.5), 0.3)])


def test_photographs_of_training_and_of_evaluation_are_apart():
    assert not set(TRAINING_PHOTOGRAPHS) & set(HELD_OUT_PHOTOGRAPHS)
    for name in TRAINING_PHOTOGRAPHS + HELD_OUT_PHOTOGRAPHS:
        pixels = photograph(name)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: draw_scene(rng, objects=4), "objects must be .*; got 4"),
        (lambda rng: draw_scene(rng, background="sea"), "background must be one of .*; got 'sea'"),
        (lambda rng: draw_background(rng, "plain", 8), "size must be at least 16 pixels; got 8"),
        (lambda rng: photograph("lena"), "photograph must be one of .*; got 'lena'"),
        (lambda rng: ObjectSpec("mauve", "circle", (0.5, 0.5), 0.2), "colour must be one of .*; got 'mauve'"),
        (lambda rng: ObjectSpec("red", "star", (0.5, 0.5), 0.2), "shape must be one of .*; got 'star'"),
        (lambda rng: ObjectSpec("red", "circle", (0.5, 1.5), 0.2), "centre must be .*; got"),
        (lambda rng: ObjectSpec("red", "circle", (0.5, 0.5), 20), "half_extent must be a fraction in .*; got 20"),
        (lambda rng: compose(GREY[..., 0], []), "background must be .* uint8; got .64, 64. uint8"),
        (lambda rng: sample_specs(rng, 4), "count must be 1 to 3 objects; got 4"),
        (lambda rng: draw_questions(rng, 0, ("plain",)), "per_kind must be at least 1; got 0"),
        (lambda rng: build_prompt("What is <image>?"), "text must be a question in words: .*; got '<image>' in it"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))


# ---- questions


def test_answers_follow_from_the_scene():
    rng = np.random.default_rng(1)
    seen = dict.fromkeys(KINDS, 0)
    answers = {"yes": 0, "no": 0}
    for _ in range(300):
        scene = draw_scene(rng)
        names = [o.name for o in scene.objects]
        for question in ask(scene, rng, paraphrase=True):
            seen[question.kind] += 1
            target = None if question.target is None else scene.objects[question.target]
            if question.kind == "colour":
                assert [o.colour for o in scene.objects if o.shape in question.text] == [question.answer]
            elif question.kind == "shape":
                assert [o.shape for o in scene.objects if o.colour in question.text] == [question.answer]
            elif question.kind == "existence":
                answers[question.answer] += 1
                assert any(name in question.text for name in names) == (question.answer == "yes")
                assert (target is None) == (question.answer == "no")
            elif question.kind == "position":
                rows, columns = np.nonzero(target.mask)
                vertical = "top" if rows.mean() < 32 else "bottom"
                assert question.answer == f"{vertical} {'left' if columns.mean() < 32 else 'right'}"
            else:
                assert box_iou(decode_box(question.answer, (64, 64)), target.box) > BOX_IOU_OF_THE_BINS
            assert target is None or target.colour in question.text or target.shape in question.text
    assert min(seen.values()) > 200
    assert answers["yes"] == answers["no"]


BOX_IOU_OF_THE_BINS = 0.6  # 16 bins of 4 pixels around objects of at least 15


def test_quadrants_leave_out_the_midlines():
    assert quadrant((40, 2, 60, 20), (64, 64)) == "top right"
    assert quadrant((2, 40, 20, 60), (64, 64)) == "bottom left"
    assert quadrant((24, 2, 40, 20), (64, 64)) is None
    assert quadrant((40, 2, 60, 20), (30, 200)) == "top left"


def test_boxes_survive_the_bins():
    box = (8.0, 20.0, 30.0, 50.0)
    decoded = decode_box(encode_box(box, (64, 128)), (64, 128))
    assert np.abs(np.subtract(decoded, box)).max() <= 128 / BOX_BINS / 2
    assert encode_box((0, 0, 64, 64), (64, 64)) == "0 0 15 15"
    for reply in ("", "red", "1 2 3", "1 2 3 16", "5 5 5 9", "9 1 3 4", "-1 2 3 4"):
        assert decode_box(reply, (64, 64)) is None
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_replies_are_scored():
    scene = compose(GREY, [ObjectSpec("red", "square", (0.3, 0.3), 0.2)])
    box = Question("box", "Give the box of the red square.", encode_box(scene.objects[0].box, (64, 64)), 0)
    assert is_correct(box, box.answer, scene)
    assert not is_correct(box, "8 8 12 12", scene)
    assert not is_correct(box, "no", scene)
    colour = Question("colour", "What colour is the square?", "red", 0)
    assert is_correct(colour, " red ", scene)
    assert not is_correct(colour, "red red", scene)


# ---- checkpoint


def test_the_auto_classes_load_it(no_network):
    model = AutoModelForImageTextToText.from_pretrained(MINIATURE_PATH)
    processor = AutoProcessor.from_pretrained(MINIATURE_PATH)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    text = model.config.text_config
    assert text.num_hidden_layers >= 4
    assert text.num_attention_heads > text.num_key_value_heads
    assert model.config.vision_feature_select_strategy == "default"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(f.stat().st_size for f in MINIATURE_PATH.iterdir()) < 5_000_000


def test_loading_another_dtype_and_a_folder_without_checkpoint(tmp_path, no_network):
    model, _ = load_miniature(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    with pytest.raises(FileNotFoundError, match=r"needed a folder with the miniature's config\.json"):
        load_miniature(path=tmp_path)


def test_the_prompt_holds_one_image_and_the_question_after_it(miniature):
    model, processor = miniature
    picture = Image.fromarray(np.zeros((90, 300, 3), np.uint8))
    inputs = processor(images=picture, text=build_prompt("What colour is the circle?"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    ids = inputs["input_ids"][0]
    visual = ids == model.config.image_token_index
    assert visual.sum() == 64
    last = int(visual.nonzero()[-1])
    words = processor.tokenizer.convert_ids_to_tokens(ids[last + 1 :])
    assert words == ["what", "colour", "is", "the", "circle", "?", "assistant", ":"]


def test_words_of_users():
    tokenizer = load_miniature()[1].tokenizer
    ids = lambda text: tokenizer(text)["input_ids"]
    assert ids("What color is the CIRCLE ?") == ids("what colour is the circle?")
    assert ids("Where is my red square?").count(tokenizer.unk_token_id) == 1
    for kind_words in (COLOURS, SHAPES, map(str, range(BOX_BINS))):
        assert tokenizer.unk_token_id not in ids(" ".join(kind_words))


def test_the_chat_template_builds_the_same_prompt(miniature):
    pytest.importorskip("jinja2")
    content = [{"type": "image"}, {"type": "text", "text": "Where is the red circle?"}]
    prompt = miniature[1].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == build_prompt("Where is the red circle?")


def test_a_batch_answers_as_one_by_one(miniature):
    pairs = draw_questions(np.random.default_rng(5), 2, ("plain",))
    images, texts = [s.image for s, _ in pairs], [q.text for _, q in pairs]
    together = answer(*miniature, images, texts)
    assert together == [answer(*miniature, [i], [t])[0] for i, t in zip(images, texts)]
    with pytest.raises(ValueError, match="questions must be one per image; got 1 for 2 images"):
        answer(*miniature, images[:2], texts[:1])


@pytest.mark.everyday(size=[200])
@pytest.mark.parametrize("size", [64, 200])
def test_it_answers_held_out_questions(miniature, size):
    pairs = draw_questions(np.random.default_rng([99, size]), 120, ("plain", "gradient", "photograph"), size=size)
    replies = answer(*miniature, [s.image for s, _ in pairs], [q.text for _, q in pairs])
    right = {kind: [] for kind in KINDS}
    for (scene, question), reply in zip(pairs, replies):
        right[question.kind].append(is_correct(question, reply, scene))
    accuracy = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    assert all(accuracy[kind] >= FLOOR[kind] for kind in KINDS), accuracy


def test_the_answers_depend_on_the_picture(miniature):
    pairs = draw_questions(np.random.default_rng(6), 60, ("plain",))
    pairs = [(s, q) for s, q in pairs if q.kind in ("colour", "shape", "position", "box")]
    blank = answer(*miniature, [np.full_like(s.image, 128) for s, _ in pairs], [q.text for _, q in pairs])
    assert np.mean([is_correct(q, r, s) for (s, q), r in zip(pairs, blank)]) < 0.4


def test_the_training_record_is_that_of_the_checkpoint():
    record = json.loads((MINIATURE_PATH / "training.json").read_text())
    model, _ = load_miniature()
    assert record["result"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert {"seed", "steps", "vision_steps", "torch", "transformers"} <= set(record["settings"])


def test_weights_are_named_as_in_published_checkpoints():
    """transformers before 5.6 knows no other names, and would start the vision encoder anew."""
    with safe_open(MINIATURE_PATH / "model.safetensors", "pt") as weights:
        parts = {name.split(".")[0]: name.split(".")[1] for name in weights.keys()}  # noqa: SIM118  it is no mapping
    assert parts["vision_tower"] == "vision_model"
    assert set(parts) == {"vision_tower", "language_model", "multi_modal_projector"}
