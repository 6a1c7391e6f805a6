"""Answers of a batch: left padding, first-token scoring, what processors are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sar_fast import SARConfig
from sar_fast.cli.loading import load_model
from sar_fast.hf import apply_sar
from sar_fast.lab.benchmark.tasks.mme import YES_NO
from sar_fast.lab.io.answering import (
    encode,
    first_tokens,
    frames,
    generate,
    option_log_probabilities,
    prepare_processor,
)
from sar_fast.lab.miniature.drawing import draw_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def asked():
    """(model, processor, pictures, prompts) with prompts of different lengths."""
    model, processor = load_model("miniature")
    prepare_processor(processor)
    rng = np.random.default_rng(3)
    pictures = [Image.fromarray(draw_scene(rng).image) for _ in range(4)]
    prompts = ["Is there a red circle?", "What colour is the square?", "Is there a blue square in the image?", "Where?"]
    return model, processor, pictures, prompts


def test_a_left_padded_batch_answers_as_its_rows_alone_do(asked):
    model, processor, pictures, prompts = asked
    with apply_sar(model, SARConfig(activation_layer_k=2, beta=0.1)):
        inputs = encode(processor, pictures, prompts)
        assert inputs["attention_mask"].sum(1).unique().numel() > 1, "no padding: the test says nothing"
        assert (inputs["attention_mask"][:, -1] == 1).all()
        batch = generate(model, processor, inputs, 8)
        scored = option_log_probabilities(model, processor, inputs, [YES_NO] * 4)
        for index, (picture, prompt) in enumerate(zip(pictures, prompts)):
            alone = encode(processor, [picture], [prompt])
            assert generate(model, processor, alone, 8) == [batch[index]]
            (row,) = option_log_probabilities(model, processor, alone, [YES_NO])
            assert row == pytest.approx(scored[index], abs=1e-4)


def test_first_token_scoring_is_the_softmax_at_the_last_position(asked):
    """From the full logits of one unpadded prompt, in fp64."""
    model, processor, pictures, prompts = asked
    inputs = encode(processor, pictures[:1], prompts[:1])
    with torch.no_grad():
        p = model(**inputs).logits[0, -1].double().softmax(-1)
    ids = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    (found,) = option_log_probabilities(model, processor, inputs, [YES_NO])
    assert found == pytest.approx([p[i].log().item() for i in ids], abs=1e-5)


class Pieces:
    """A tokenizer of known pieces: a space is a token of its own before capitals, as SentencePiece's may be."""

    unk_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        yes = {"Yes": [5, 9], "yes": [6], " Yes": [1, 5], " yes": [7]}
        no = {"No": [8], "no": [0], " No": [1, 8], " no": [3]}
        return {"input_ids": (yes | no).get(text, [2])}


def test_first_tokens_leave_out_shared_and_unknown_ones():
    assert first_tokens(Pieces(), YES_NO) == [(5, 6, 7), (3, 8)]  # 1 starts both; 0 is unknown


def test_options_that_start_alike_are_an_error():
    with pytest.raises(
        ValueError, match=r"scoring must be generate .*; got first_token .* does not tell 'top left' from the others"
    ):
        first_tokens(Pieces(), (("top left",), ("top right",)))


def test_the_beginning_of_a_text_is_marked_once(asked):
    """Templates of some families write the token themselves; the tokenizer must not add another."""
    _, processor, pictures, prompts = asked
    bos = processor.tokenizer.bos_token_id
    template = processor.chat_template
    try:
        for own in ("", "<s>"):
            processor.chat_template = own + template
            ids = encode(processor, pictures, prompts)["input_ids"]
            assert (ids == bos).sum(1).tolist() == [1] * 4
    finally:
        processor.chat_template = template


def test_a_processor_without_a_chat_template_is_an_error(asked, tmp_path):
    _, processor, _, _ = asked
    template = processor.chat_template
    try:
        processor.chat_template = None
        with pytest.raises(ValueError, match="template must be given for a model that has no chat template"):
            prepare_processor(processor)
        with pytest.raises(ValueError, match=r"template must be a Jinja file; .*; got 'nowhere'"):
            prepare_processor(processor, "nowhere")
        (tmp_path / "t.jinja").write_text("detect <image> {{ messages[0]['content'][1]['text'] }}")
        prepare_processor(processor, str(tmp_path / "t.jinja"))
        assert processor.chat_template.startswith("detect")
    finally:
        processor.chat_template = template


def test_tokenizers_that_pad_on_the_right_are_turned(asked):
    _, processor, pictures, prompts = asked
    processor.tokenizer.padding_side = "right"
    prepare_processor(processor)
    assert (encode(processor, pictures, prompts)["attention_mask"][:, -1] == 1).all()


def test_the_resized_picture_is_width_by_height():
    """A grid of 1 x 20 rows x 30 columns of 14 pixels is a picture of 420 x 280."""

    class Processor:
        class image_processor:
            patch_size = 14

    inputs = {"image_grid_thw": torch.tensor([[1, 20, 30], [1, 4, 2]])}
    assert frames(inputs, Processor, 2) == [[420, 280], [28, 56]]
    assert frames({}, Processor, 2) == [None, None]
