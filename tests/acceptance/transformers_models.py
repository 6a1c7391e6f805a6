"""Small models for transformers' common model tests, where a checkout has no ``tests/models`` (its source archive).

Imported by the file that ``transformers_suite.py`` writes into a copy of that archive's ``tests``.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE = 99
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


class ModelTester:
    """What the mixin asks of a tester: sizes, a config, and inputs with one picture of 16 tokens a row."""

    batch_size, num_channels, image_size, is_training = 2, 3, 16, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 64, 2, 4, 120
    seq_length = 24

    def __init__(self, model_type: str, text_type: str, vision_type: str, **text: object) -> None:
        self.types = model_type, text_type, vision_type
        self.text = text
        self.config = self.get_config()
        self.model_class = type(AutoModelForImageTextToText.from_config(self.config))

    def get_config(self):
        model_type, text_type, vision_type = self.types
        return AutoConfig.for_model(
            model_type,
            text_config={"model_type": text_type, **_TEXT, **self.text},
            vision_config={"model_type": vision_type, **_VISION},
            image_token_id=IMAGE,
            image_seq_length=16,
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 90, (self.batch_size, self.seq_length), generator=generator)
        ids[:, 3:19] = IMAGE
        pixels = torch.randn(self.batch_size, 3, 16, 16, generator=generator)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


FAMILIES = {
    "Llava": lambda: ModelTester("llava", "llama", "clip_vision_model"),
    "LlavaQwen2": lambda: ModelTester("llava", "qwen2", "clip_vision_model"),
    "LlavaMistral": lambda: ModelTester("llava", "mistral", "clip_vision_model", sliding_window=12),
    "AyaVision": lambda: ModelTester("aya_vision", "cohere2", "siglip_vision_model", sliding_window=12),
    "DeepseekVL": lambda: ModelTester("deepseek_vl", "llama", "siglip_vision_model"),
}
