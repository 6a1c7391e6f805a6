"""Prompts about pictures, in a model's own format; several about one picture are read together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import nn

from sar_fast.hf import UnsupportedModelError
from sar_fast.hf.families import find_family
from sar_fast.hf.shared_prefix import PER_TOKEN, PromptGroups
from sar_fast.lab.io.answering import encode_texts, marks_beginning
from sar_fast.lab.io.chat_template import build_prompt, tokenizer_of
from sar_fast.lab.io.processors import ProcessorRefusal, call_processor

PLAIN_PICTURE, PLAIN_WORDS = Image.new("RGB", (336, 336), "grey"), "What is this?"


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a processor writes prompts: all that makes tokens of questions, without the model.

    Attributes:
        processor: of the model. visual_ids: the token ids that stand for pictures; empty if the model's are not known.
    """

    processor: Any
    visual_ids: frozenset[int]

    @classmethod
    def of(cls, model: nn.Module, processor: Any) -> PromptFormat:
        """The format of a model; one without a family entry has no visual ids."""
        try:
            fields = find_family(model.config).placeholder_ids.values()
        except UnsupportedModelError:
            fields = ()
        known = (getattr(model.config, field, None) for field in fields)
        return cls(processor, frozenset(int(token) for token in known if token is not None))

    def encode_groups(self, pictures: Sequence[Any], questions: Sequence[Sequence[str]]) -> PromptGroups:
        """Tokens on the CPU of ``questions[b]`` about ``pictures[b]``.

        The image processor sees every picture once: what replaces the placeholder in the first prompt of a picture
        replaces it in the others. ``ValueError`` if the processor writes no visual token. Where the model's visual ids
        are not known every picture has one question.
        """
        texts = [[build_prompt(self.processor, question) for question in row] for row in questions]
        inputs = encode_texts(self.processor, pictures, [row[0] for row in texts])
        real = inputs["attention_mask"].bool()
        firsts = [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], real)]
        for number, first in enumerate(firsts):
            if self.visual_ids.isdisjoint(first) and self.visual_ids:
                raise ValueError(
                    f"the prompt of picture {number} has no visual token: {type(self.processor).__name__} wrote none "
                    f"of the ids {sorted(self.visual_ids)} of this model; its chat template, or the template given, "
                    f"must write the picture's placeholder; the prompt is {texts[number][0][:80]!r}"
                )
        groups = [
            [first, *self._others(picture, row, first)] if len(row) > 1 else [first]
            for picture, row, first in zip(pictures, texts, firsts)
        ]
        extras = {
            name: [
                [_token_types(inputs[name][b][real[b]].tolist(), rows[0], ids) for ids in rows]
                for b, rows in enumerate(groups)
            ]
            for name in PER_TOKEN
            if name in inputs
        }
        pad = getattr(tokenizer_of(self.processor), "pad_token_id", None)
        return PromptGroups(inputs, groups, extras, 0 if pad is None else pad)

    def refusal(self, picture: Any, question: str) -> str | None:
        """Why the processor makes no prompt of this picture and these words; None if it does.

        ``ValueError`` if it makes none of a plain picture and plain words either: that is no matter of a sample.
        """
        why = self._refused(picture, question)
        if why is None:
            return None
        if self._refused(PLAIN_PICTURE, PLAIN_WORDS) is not None:
            raise ValueError(f"the processor makes no prompt of any picture: {why}")
        width, height = picture.size
        alone = self._refused(picture, PLAIN_WORDS) is not None
        what = f"its picture of {width} x {height} pixels" if alone else f"its words {question[:80]!r}"
        return f"the processor refuses {what}: {why}"

    def _refused(self, picture: Any, question: str) -> str | None:
        try:
            self.encode_groups([picture], [[question]])
        except ProcessorRefusal as error:
            return error.why
        return None

    def _others(self, picture: Any, texts: Sequence[str], first: list[int]) -> list[list[int]]:
        """Tokens of all texts but the first about one picture, from those of the first."""
        end = max(i + 1 for i, token in enumerate(first) if token in self.visual_ids)
        tokenizer, special = tokenizer_of(self.processor), not marks_beginning(self.processor, texts)
        raw = call_processor(tokenizer, texts, (), add_special_tokens=special)["input_ids"]
        start = len(raw[0]) - (len(first) - end)  # where the text after the picture begins, with one placeholder
        if start > 0 and raw[0][start:] == first[end:] and all(ids[:start] == raw[0][:start] for ids in raw):
            return [first[:end] + ids[start:] for ids in raw[1:]]
        # the processor rewrites the text around pictures: let it do so for every prompt
        return [encode_texts(self.processor, [picture], [text])["input_ids"][0].tolist() for text in texts[1:]]


def _token_types(known: list[int], first: list[int], ids: list[int]) -> list[int]:
    """Types of a prompt's tokens: what the processor gave the same ids in the picture's first prompt, else text's."""
    types = dict(zip(first, known))
    return [types.get(token, 0) for token in ids]
