"""From a record to what a model is trained on: chat template, tokens, and labels on the answers alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from sar_fast.base.errors import ArgumentError
from sar_fast.base.wording import reason
from sar_fast.lab.io.processors import ProcessorRefusal, call_processor
from sar_fast.lab.io.records import IMAGE, RecordError, open_image

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of positions without loss
TOO_LONG = ("drop", "error", "truncate")


class TooLong(RecordError):
    """A record longer than ``max_length``."""


class Encoder:
    """Encodes records for one processor: its chat template, its image placeholders, its special tokens.

    The loss falls on every answer and on the special token that the template puts behind it (``</s>``, ``<|im_end|>``),
    so that the model learns to stop. Where the answers are is found with the template itself, by rendering marks in
    their place; a template that changes the answers is an error.

    Args:
        processor: of an image-text-to-text model, with a fast tokenizer and a chat template.
        max_length: most tokens of a sample, image tokens included; None sets no limit.
        too_long: what happens beyond it: ``"drop"`` and ``"error"`` raise :class:`TooLong` (the dataset decides),
            ``"truncate"`` cuts words at the end. An image is never cut, nor is a sample left without a label.
    """

    def __init__(self, processor: Any, max_length: int | None = None, too_long: str = "drop") -> None:
        if too_long not in TOO_LONG:
            raise ArgumentError("too_long", repr(too_long), f"be one of {', '.join(TOO_LONG)}")
        if max_length is not None and max_length < 1:
            raise ArgumentError("max_length", max_length, "be at least 1")
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not self.tokenizer.is_fast:
            raise ArgumentError(
                "processor", f"{type(self.tokenizer).__name__}, which has no offsets", "have a fast tokenizer"
            )
        if not (getattr(processor, "chat_template", None) or self.tokenizer.chat_template):
            raise ArgumentError("processor", "none", "have a chat template; save one with it (chat_template.jinja)")
        self.max_length, self.too_long = max_length, too_long
        self.image_token = getattr(processor, "image_token", IMAGE)
        self.visual_ids = visual_token_ids(processor)
        specials = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        self._end = re.compile(r"\s*(?:" + "|".join(map(re.escape, specials)) + ")") if specials else None
        self._parts = self._takes_parts()

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Model inputs of one record as lists and tensors, without a batch dimension on the token lists.

        ``input_ids``, ``attention_mask``, ``labels`` (and ``mm_token_type_ids`` where the processor makes them) are
        lists of one length; vision inputs are tensors as the processor gives them for one sample. ``RecordError`` if
        the record cannot be encoded.
        """
        text, spans = self.render(record["messages"])
        images = [open_image(reference) for reference in record["images"]]
        inputs = self._process(text, images)
        offsets = inputs.pop("offset_mapping")[0]
        replacements = (inputs.pop("text_replacement_offsets", None) or [[]])[0]
        if images and not replacements:
            replacements = self._replacements(text, images, _length_of_text(offsets))
        shifted = _shift(spans, replacements)
        ids = list(inputs["input_ids"][0])
        labels = [
            token if any(a < end and b > start for start, end in shifted) else IGNORED
            for token, (a, b) in zip(ids, offsets)
        ]
        if all(label == IGNORED for label in labels[1:]):
            raise RecordError("no token of the answer is left to train on")
        features: dict[str, Any] = {"labels": labels}
        for name, value in inputs.items():
            per_token = isinstance(value, list) and len(value) == 1 and _length(value[0]) == len(ids)
            features[name] = list(value[0]) if per_token else value
        return self._fit(features)

    def _replacements(self, text: str, images: list[Image.Image], length: int) -> list[dict[str, tuple[int, int]]]:
        """Where a processor put pictures' tokens that does not say so, as before transformers 5.10.

        By the length of each picture's tokens in a text of its own; together they must make ``text`` ``length``
        characters long.
        """
        before = _length_of_text(self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
        places = [found.span() for found in re.finditer(re.escape(self.image_token), text)]
        alone = [self._process(self.image_token, [image])["offset_mapping"][0] for image in images]
        gains = [_length_of_text(offsets) - len(self.image_token) for offsets in alone]
        if len(places) != len(images) or before + sum(gains) != length:
            raise RecordError(
                f"{type(self.processor).__name__} does not say where it put pictures' tokens, and their lengths do not "
                "tell, so answers behind them cannot be found; transformers' own processors say it from 5.10 on"
            )
        found, gained = [], 0
        for (start, end), gain in zip(places, gains):
            found.append({"span": (start, end), "new_span": (start + gained, end + gained + gain)})
            gained += gain
        return found

    def blank_image(self) -> dict[str, Any]:
        """Tokens and vision inputs of one blank image, without words around it."""
        size = (56, 56)
        features = self._process(self.image_token, [Image.new("RGB", size)])
        features.pop("offset_mapping")
        features.pop("text_replacement_offsets", None)
        ids = list(features["input_ids"][0])
        keep = [n for n, token in enumerate(ids) if token not in set(self.tokenizer.all_special_ids) - self.visual_ids]
        per_token = {
            n for n, v in features.items() if isinstance(v, list) and len(v) == 1 and _length(v[0]) == len(ids)
        }
        return {n: [v[0][i] for i in keep] if n in per_token else v for n, v in features.items()}

    def render(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, image placeholders once each, and the character spans that are trained on."""
        messages = [{**m, "content": m["content"].strip()} for m in messages]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        marks = [f"\ue000{number}\ue001" for number in range(len(answers))]
        numbers = iter(marks)
        marked = self._template([{**m, "content": next(numbers)} if m["role"] == "assistant" else m for m in messages])
        text, spans, rest = "", [], marked
        for mark, answer in zip(marks, answers):
            before, found, rest = rest.partition(mark)
            if not found:
                raise RecordError(f"chat template leaves out answer {len(spans) + 1} of {len(answers)}")
            text += before
            start = len(text)
            text += answer
            end = self._end.match(rest) if self._end else None
            if end:
                text, rest = text + end.group(), rest[end.end() :]
            spans.append((start, len(text)))
        text += rest
        if text != self._template(messages):
            raise RecordError("chat template changes the answers; the loss cannot be put on them")
        return text, spans

    def _template(self, messages: Sequence[Mapping[str, str]]) -> str:
        owner = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
        turns = [{"role": m["role"], "content": self._content(m["content"])} for m in messages]
        try:
            return owner.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        except TemplateError as error:  # many raise one on purpose: a system turn, roles out of order
            raise RecordError(f"the model's chat template refuses the record: {reason(error)}") from error

    def _content(self, words: str) -> Any:
        """A turn's words as the template takes them: a list of parts, or one string with the model's placeholder."""
        pieces = words.split(IMAGE)
        if not self._parts:
            return self.image_token.join(pieces)
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            if number:
                parts.append({"type": "image"})
            if piece.strip():
                parts.append({"type": "text", "text": piece.strip()})
        return parts

    def _takes_parts(self) -> bool:
        """Whether the template reads content as a list of parts (image models') or as a string (text models')."""
        self._parts = True
        try:
            shown = self._template([{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe"}])
        except Exception:  # a template for strings fails on lists in as many ways as there are templates
            return False
        return "'type'" not in shown and shown.count("probe") == 2

    def _process(self, text: str, images: list[Image.Image]) -> dict[str, Any]:
        bos = self.tokenizer.bos_token
        options = {
            "return_offsets_mapping": True,
            "add_special_tokens": not (bos and text.startswith(bos)),
        }
        if self.processor is self.tokenizer:
            if images:
                raise RecordError("record has images, but the model has only a tokenizer")
            return dict(self.tokenizer([text], **options))
        if images:
            options["images_kwargs"] = {"return_tensors": "pt"}
        options |= {"return_text_replacement_offsets": True, "return_mm_token_type_ids": self._wants_types()}
        try:
            return dict(call_processor(self.processor, [text], images, **options))
        except ProcessorRefusal as error:
            raise RecordError(str(error)) from error

    def _wants_types(self) -> bool:
        return "mm_token_type_ids" in getattr(self.processor, "model_input_names", ())

    def _fit(self, features: dict[str, Any]) -> dict[str, Any]:
        """The sample as it is if it fits, cut at the end if that is wanted and cuts no image."""
        ids = features["input_ids"]
        if self.max_length is None or len(ids) <= self.max_length:
            return features
        last_visual = max((n for n, token in enumerate(ids) if token in self.visual_ids), default=-1)
        too_long = f"sample has {len(ids)} tokens, max_length is {self.max_length}"
        if self.too_long != "truncate":
            raise TooLong(too_long)
        if last_visual >= self.max_length:
            raise TooLong(f"{too_long}, and its last image token is number {last_visual + 1}: an image is not cut")
        cut = {n: v[: self.max_length] if _length(v) == len(ids) else v for n, v in features.items()}
        if all(label == IGNORED for label in cut["labels"][1:]):
            raise TooLong(f"{too_long}: cut there, no answer would be left")
        return cut


def visual_token_ids(processor: Any) -> frozenset[int]:
    """Ids of the placeholders that image or video features replace."""
    named = (getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video"))
    return frozenset(int(token) for token in named if token is not None)


def _length_of_text(offsets: Sequence[tuple[int, int]]) -> int:
    """Characters up to the last token; special tokens that stand for none have (0, 0)."""
    return max(end for _, end in offsets)


def _shift(spans: list[tuple[int, int]], replacements: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Spans of the text with single placeholders, as spans of the text in which the processor expanded them."""
    shifted = []
    for start, end in spans:
        gained = 0
        for replacement in replacements:
            if replacement["span"][1] <= start:
                gained = replacement["new_span"][1] - replacement["span"][1]
        shifted.append((start + gained, end + gained))
    return shifted


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple)) else -1
