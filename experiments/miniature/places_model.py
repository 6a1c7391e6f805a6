"""The miniature of places: a LLaVA-1.5 of 2.9 million parameters with eight layers, for pictures of three sizes."""

from __future__ import annotations

import torch
from architecture import Design, words_of
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

from sar_fast.lab.miniature.drawing import FORMS, PALETTE, PATCH_SIZE
from sar_fast.lab.miniature.places.habits import PLACES
from sar_fast.lab.miniature.places.questions import RELATIONS, WORDINGS, plural
from sar_fast.lab.miniature.places.scenes import SIDE
from sar_fast.lab.miniature.questions import POSITIONS, build_prompt

DESIGN = Design(
    side=SIDE,
    text={
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,  # as in the smaller miniature
    },
    vision={"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4},
)
LONGEST = 768  # tokens of a prompt with 576 visual ones
TURN = 16  # tokens of the longest question with its answer
PACKED = "packed_turns"  # name of the attention below


def vocabulary() -> list[str]:
    """Every word and punctuation mark of prompts and answers."""
    texts = [*PLACES, *PALETTE, *POSITIONS, "yes no 1 2 3", build_prompt("In the ,")]
    for form in FORMS:
        words = {"form": form, "forms": plural(form), "other": form, "colour": "red"}
        wordings = [wording for pair in WORDINGS.values() for wording in pair]
        texts += [w.format(**words, relation=relation) for w in wordings for relation in RELATIONS.values()]
    return words_of(texts)


def packed_turns(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """Attention of rows that are an image and then turns of ``TURN`` tokens, each of which sees the image and itself.

    ``query`` is (B, H, S, D), ``key`` and ``value`` (B, Hkv, S, D); how many of the S tokens are turns is
    ``module.config.packed_turns``. Equal to a dense mask, of which it computes only what is visible.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    turns = module.config.packed_turns
    image = query.shape[2] - turns * TURN
    hidden = lambda n: torch.full((n, n), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    query = query * scaling
    (q_image, q), (k_image, k), (v_image, v) = (x.split([image, turns * TURN], 2) for x in (query, key, value))
    out_image = (q_image @ k_image.mT + hidden(image)).softmax(-1) @ v_image
    own = [x.unflatten(2, (turns, TURN)) for x in (q, k, v)]  # (B, H, turns, TURN, D)
    to_image = (q @ k_image.mT).unflatten(2, (turns, TURN))
    to_own = own[0] @ own[1].mT + hidden(TURN)
    p_image, p_own = torch.cat([to_image, to_own], -1).softmax(-1).split([image, TURN], -1)
    out = p_image.flatten(2, 3) @ v_image + (p_own @ own[2]).flatten(2, 3)
    return torch.cat([out_image, out], 2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_turns)


class Learner(nn.Module):
    """The language model's side of a LLaVA over features of its frozen tower, for pictures of any size.

    The tower's position embeddings are interpolated where a picture is not of the model's own size, as
    :func:`sar_fast.lab.miniature.places.checkpoint.at_side` does once and for all.
    """

    def __init__(self, model: LlavaForConditionalGeneration, turns: int):
        super().__init__()
        self.model = model
        text = model.model.language_model
        text.set_attn_implementation(PACKED)
        text.config.packed_turns = turns
        model.model.vision_tower.set_attn_implementation("eager")

    def close(self) -> LlavaForConditionalGeneration:
        """The model as transformers runs it."""
        self.model.set_attn_implementation("sdpa")
        del self.model.model.language_model.config.packed_turns
        return self.model.eval()

    def features(self, pixels: Tensor) -> Tensor:
        """(B, N, width) of pictures (B, 3, side, side)."""
        own = pixels.shape[-1] == self.model.config.vision_config.image_size
        hidden = self.model.model.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=not own)
        return hidden.hidden_states[-2][:, 1:]

    def forward(self, input_ids: Tensor, position_ids: Tensor, features: Tensor, first: int) -> Tensor:
        """(B, S, hidden): the last layer over (B, S) tokens, whose image begins at token ``first`` of every row."""
        inner = self.model.model
        visual = inner.multi_modal_projector(features)
        words = inner.get_input_embeddings()(input_ids)
        embedded = torch.cat([words[:, :first], visual.to(words.dtype), words[:, first + visual.shape[1] :]], 1)
        return inner.language_model(
            inputs_embeds=embedded, position_ids=position_ids, attention_mask=None, use_cache=False
        ).last_hidden_state


def grid_of(side: int) -> int:
    """Patches along a side in pixels."""
    return side // PATCH_SIZE
