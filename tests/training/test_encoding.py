"""Labels are the answers and their end mark, nothing else, under any chat template; lengths never cut an image."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

from sar_fast.lab.io.datasets import find_datasets
from sar_fast.lab.io.records import RecordError
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.training.data import Collator, encode_dataset, join_padded, load_records
from sar_fast.lab.training.encoding import IGNORED, Encoder, TooLong
from tests.training.samples import CHATML, DATA, LLAMA2, VICUNA, conversation

DIALOGUE = ("What colour is the circle?", "red", "Where is the red circle?", "top left")


@pytest.fixture(scope="module")
def byte_level():
    """The miniature's processor with a byte-level tokenizer: words split into many tokens, white space counts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
    )
    own = load_miniature()[1]
    return LlavaProcessor(
        image_processor=own.image_processor,
        tokenizer=tokenizer,
        patch_size=own.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def labelled(encoder: Encoder, features: dict) -> str:
    return encoder.tokenizer.decode([t for t in features["labels"] if t != IGNORED])


def test_labels_of_the_miniature_are_the_answers(processor):
    encoder = Encoder(processor)
    features = encoder(conversation(*DIALOGUE))
    assert labelled(encoder, features).split() == ["red", "</s>", "top", "left", "</s>"]
    assert features["input_ids"].count(processor.image_token_id) == 64
    # the prompt that the model was trained on and generates from, then the answer
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DIALOGUE[0]}]}],
        add_generation_prompt=True,
    )
    first = next(n for n, label in enumerate(features["labels"]) if label != IGNORED)
    expected = processor.tokenizer(prompt.replace("<image>", "<image>" * 64))["input_ids"]
    assert features["input_ids"][:first] == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (VICUNA, " red</s> top left</s>"),
        (CHATML, "red<|im_end|>top left<|im_end|>"),
        (LLAMA2, " red </s> top left </s>"),
    ],
    ids=["vicuna", "chatml", "llama2"],
)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_labels_under_other_templates(byte_level, template, expected, images):
    processor = copy.copy(byte_level)
    processor.chat_template = template
    encoder = Encoder(processor)
    features = encoder(conversation(*DIALOGUE, images=images))
    assert labelled(encoder, features).replace(" ", "") == expected.replace(" ", "")
    tokens = features["input_ids"]
    assert tokens.count(processor.image_token_id) == 64 * images
    assert tokens.count(processor.tokenizer.bos_token_id) == template.count("<s>") * 2
    assert all(label in (IGNORED, token) for token, label in zip(tokens, features["labels"]))
    assert ("pixel_values" in features) == (images > 0)


@pytest.mark.parametrize("ending", ["", " \n"])  # which this tokenizer drops
@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_processor_that_hides_where_pictures_went(processor, monkeypatch, images, ending):
    """As those before transformers 5.10 and of remote code do: answers behind a picture are found by its length."""
    monkeypatch.setattr(processor, "chat_template", processor.chat_template + ending)
    want = Encoder(processor)(conversation(*DIALOGUE, images=images))
    encoder = Encoder(processor)
    told = encoder._process
    hidden = lambda *args: {n: v for n, v in told(*args).items() if n != "text_replacement_offsets"}
    monkeypatch.setattr(encoder, "_process", hidden)
    assert encoder(conversation(*DIALOGUE, images=images))["labels"] == want["labels"]


def test_pictures_that_are_not_found_by_their_lengths_are_an_error(processor, monkeypatch):
    encoder = Encoder(processor)
    told = encoder._process

    def hidden(text, images):
        inputs = {n: v for n, v in told(text, images).items() if n != "text_replacement_offsets"}
        if text == encoder.image_token:  # its tokens depend on what is around it
            inputs["offset_mapping"] = [[(0, 1)]]
        return inputs

    monkeypatch.setattr(encoder, "_process", hidden)
    with pytest.raises(RecordError, match="LlavaProcessor does not say where it put pictures' tokens"):
        encoder(conversation(*DIALOGUE))
    assert labelled(encoder, encoder(conversation(*DIALOGUE, images=0))).split() == [
        "red",
        "</s>",
        "top",
        "left",
        "</s>",
    ]


def test_answers_with_marks_of_the_template_in_them(byte_level):
    """An answer that repeats the question, the header or another answer is still labelled once, where it stands."""
    processor = copy.copy(byte_level)
    processor.chat_template = VICUNA
    encoder = Encoder(processor)
    features = encoder(conversation("say red", "say red", "again", "ASSISTANT: say red"))
    assert labelled(encoder, features) == "say red</s>ASSISTANT: say red</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the answers"),
        ("{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}", "leaves out answer 1"),
    ],
)
def test_templates_that_hide_answers_are_errors(byte_level, template, message):
    processor = copy.copy(byte_level)
    processor.chat_template = template
    with pytest.raises(ValueError, match=message):
        Encoder(processor)(conversation("a", "b", "c", "d", images=0))


def test_no_template_and_bad_options(byte_level, processor):
    with pytest.raises(ValueError, match="must have a chat template"):
        Encoder(byte_level)
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="processor must have a fast tokenizer; got SimpleNamespace, which has no off"):
        Encoder(slow)
    with pytest.raises(ValueError, match="too_long must be one of"):
        Encoder(processor, 10, "cut")
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        Encoder(processor, 0)


def test_max_length_never_cuts_an_image(processor):
    record = conversation(*DIALOGUE)
    full = Encoder(processor)(record)
    length = len(full["input_ids"])
    assert Encoder(processor, length)(record)["input_ids"] == full["input_ids"]
    with pytest.raises(TooLong, match=f"sample has {length} tokens, max_length is {length - 1}"):
        Encoder(processor, length - 1)(record)
    cut = Encoder(processor, length - 2, "truncate")(record)
    assert cut["input_ids"] == full["input_ids"][:-2]
    assert cut["labels"] == full["labels"][:-2]
    torch.testing.assert_close(cut["pixel_values"], full["pixel_values"])
    with pytest.raises(TooLong, match="an image is not cut"):
        Encoder(processor, 40, "truncate")(record)
    with pytest.raises(TooLong, match="no answer would be left"):
        Encoder(processor, 68, "truncate")(record)


def test_dropped_records_are_counted_and_logged(processor, caplog):
    records = load_records(find_datasets("shapes_llava", DATA))
    lengths = sorted(len(Encoder(processor)(r)["input_ids"]) for r in records)
    limit = lengths[len(lengths) // 2]
    with caplog.at_level(logging.WARNING):
        kept = encode_dataset(records, Encoder(processor, limit))
    assert len(kept) == sum(n <= limit for n in lengths)
    assert f"{len(lengths) - len(kept)} of 32 records dropped" in caplog.text
    assert "shapes_llava.json, record" in caplog.text
    with pytest.raises(ValueError, match=r"record \d+ .*max_length is"):
        encode_dataset(records, Encoder(processor, limit, "error"))
    with pytest.raises(ValueError, match="all 32 records are longer"):
        encode_dataset(records, Encoder(processor, 20))


def test_streaming_encodes_the_same_samples(processor):
    infos = find_datasets("shapes_llava", DATA)
    encoder = Encoder(processor, 105)
    stored = encode_dataset(load_records(infos), encoder)
    streamed = list(encode_dataset(load_records(infos, streaming=True), encoder))
    assert len(streamed) == len(stored)
    assert [s["features"]["input_ids"] for s in streamed] == [s["features"]["input_ids"] for s in stored]


def test_a_corrupt_image_is_named(processor, tmp_path):
    record = conversation("a", "b")
    record["images"][0]["bytes"] = b"no picture"
    with pytest.raises(RecordError, match="cannot be read as a picture"):
        Encoder(processor)(record)


def test_collator_pads_and_joins(processor):
    encoder = Encoder(processor)
    samples = [encoder(conversation(*DIALOGUE[:2], images=n)) for n in (2, 0, 1)]
    batch = Collator(processor.tokenizer.pad_token_id, pad_to_multiple_of=8)(samples)
    assert batch["pixel_values"].shape == (3, 3, 64, 64)
    assert batch["input_ids"].shape[1] % 8 == 0
    for row, sample in enumerate(samples):
        n = len(sample["input_ids"])
        assert batch["input_ids"][row, :n].tolist() == sample["input_ids"]
        assert batch["labels"][row, :n].tolist() == sample["labels"]
        assert (batch["labels"][row, n:] == IGNORED).all()
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
    order = [
        s["pixel_values"][i, 0, 0, 0].item() for s in (samples[0], samples[2]) for i in range(len(s["pixel_values"]))
    ]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == order


@pytest.mark.parametrize("beta", [None, 1e-3], ids=["plain", "sar"])
def test_a_packed_row_has_the_loss_of_its_samples(processor, beta):
    """Two pictures, none, one: no sample sees another, and SAR's statistics are each sample's own."""
    from sar_fast import SARConfig, apply_sar

    model, _ = load_miniature()
    encoder = Encoder(processor)
    samples = [encoder(conversation(*DIALOGUE[2 * (n == 1) :][:2], images=n)) for n in (2, 0, 1)]
    packed = Collator(0, packing=True)(samples)
    assert packed["input_ids"].shape == (1, sum(len(s["input_ids"]) for s in samples))
    assert "attention_mask" not in packed
    assert packed["pixel_values"].shape[0] == 3
    if beta:
        apply_sar(model, SARConfig(activation_layer_k=2, beta=beta))
    with torch.no_grad():
        got = model(**packed, use_cache=False).loss
        expected = model(**Collator(0)(samples)).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"packing must be False with .*: it leaves no padding"):
        Collator(0, packing=True, pad_to_multiple_of=8)


def test_vision_inputs_of_different_sizes():
    """LLaVA-NeXT has as many tiles as an image needs: the smaller are padded, nothing moves."""
    a, b = torch.rand(1, 2, 3), torch.rand(2, 4, 3)
    joined = join_padded([a, b])
    assert joined.shape == (3, 4, 3)
    assert torch.equal(joined[:1, :2], a)
    assert torch.equal(joined[1:], b)
    assert (joined[0, 2:] == 0).all()


def test_a_blank_image_changes_nothing(processor):
    """ZeRO-3's filler: a batch without images runs the vision encoder, and the loss is the same."""
    model, _ = load_miniature()
    encoder = Encoder(processor)
    samples = [encoder(conversation("Where is the red circle?", a, images=0)) for a in ("left", "top right")]
    blank = encoder.blank_image()
    assert blank["input_ids"] == [processor.image_token_id] * 64
    plain = Collator(0)(samples)
    filled = Collator(0, blank=blank)(samples)
    assert filled["pixel_values"].shape[0] == 1
    with torch.no_grad():
        expected, got = model(**plain).loss, model(**filled).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
