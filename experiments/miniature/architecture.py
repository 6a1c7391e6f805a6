"""What is trained: LLaVA-1.5 models of a few million parameters, their word-level tokenizers and processors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sar_fast.lab.miniature.drawing import COLOURS, PATCH_SIZE, SHAPES
from sar_fast.lab.miniature.questions import BOX_BINS, POSITIONS, WORDINGS, build_prompt

IMAGE_SIZE = 64
GRID = IMAGE_SIZE // PATCH_SIZE
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Design:
    """A model: side of its square picture in pixels, options of ``LlamaConfig`` and ``CLIPVisionConfig``."""

    side: int
    text: dict[str, Any]
    vision: dict[str, Any]


MINIATURE = Design(
    side=IMAGE_SIZE,
    text={
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,  # 0.02 is meant for widths from 768 on: at 128 colour and shape never bind
    },
    vision={"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6},
)


def vocabulary() -> list[str]:
    """Every word and punctuation mark of the miniature's prompts and answers."""
    fill = {"colour": " ".join(COLOURS), "shape": " ".join(SHAPES)}
    texts = [build_prompt(w.format(**fill)) for wordings in WORDINGS.values() for w in wordings]
    return words_of([*texts, *POSITIONS, "yes no", *map(str, range(BOX_BINS))])


def words_of(texts: Iterable[str]) -> list[str]:
    """The words and punctuation marks of texts, sorted, in lower case."""
    return sorted({w for t in texts for w in re.findall(r"\w+|[^\w\s]", t.replace("<image>", "").lower())})


def build_processor(vocabulary: Iterable[str], design: Design, *, longest: int = 256) -> LlavaProcessor:
    """The processor: any picture to (3, side, side), any text to the vocabulary's words and ``<unk>``."""
    words = [*SPECIAL_TOKENS, *vocabulary]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\bcolor\b"), "colour")]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
    )
    side = {"height": design.side, "width": design.side}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def grid_sinusoids(grid: int, width: int) -> torch.Tensor:
    """(grid * grid, width) sines and cosines of every patch's column and row, at width / 4 wavelengths from 6 to 600
    patches."""
    rates = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


def build_model(tokenizer: PreTrainedTokenizerFast, design: Design) -> LlavaForConditionalGeneration:
    """A fresh model in fp32, initialised from torch's global random state."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    grid = design.side // PATCH_SIZE
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=design.side, patch_size=PATCH_SIZE, **design.vision),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **design.text, **special),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=grid**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            layer.weight.normal_(0, layer.in_features**-0.5)
            layer.bias.zero_()
        # A learned position embedding that starts as noise far below the patches leaves neighbours hard to find.
        embedding = model.model.vision_tower.embeddings.position_embedding.weight
        embedding[1:] = 0.3 * grid_sinusoids(grid, embedding.shape[1])
    model.generation_config.update(**special, max_new_tokens=8, do_sample=False)
    return model
