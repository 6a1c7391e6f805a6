"""What full and freeze training leave as it is: a family's vision encoder and its projector, wherever it keeps them."""

from __future__ import annotations

import dataclasses

import pytest

from sar_fast.lab.training.arguments import ModelArguments
from sar_fast.lab.training.models import set_trainable
from tests.hf.tiny import CASES

NEITHER = ModelArguments(model_name_or_path="tiny", finetuning_type="full")
PROJECTORS = {
    "deepseek_vl": "aligner",
    "ovis2": "visual_embeddings_table",
    "kimi_k25": "mm_projector",
    "idefics3": "connector",
    "smolvlm": "connector",
    **{name: "embed_vision" for name in CASES if name.startswith("gemma4")},
    **{name: "visual" for name in CASES if name.startswith(("qwen", "exaone", "glm"))},  # inside the encoder
}


def trained_parts(name, **options):
    """Names of the trained parameters of the base model that are none of the language model's."""
    model = set_trainable(CASES[name].make(), dataclasses.replace(NEITHER, **options))
    language = {id(p) for p in model.get_decoder().parameters()}
    return {n for n, p in model.base_model.named_parameters() if p.requires_grad and id(p) not in language}


@pytest.mark.parametrize("name", list(CASES))
def test_by_default_the_language_model_alone_is_trained(name):
    assert trained_parts(name) <= {"image_newline", "lm_head.weight"}  # of LLaVA's; of Llama 4's base model


@pytest.mark.parametrize("name", list(CASES))
def test_the_projector_may_be_trained_beside_it(name):
    trained = trained_parts(name, freeze_multi_modal_projector=False) - {"image_newline", "lm_head.weight"}
    assert {n.split(".")[0] for n in trained} == {PROJECTORS.get(name, "multi_modal_projector")}


@pytest.mark.parametrize("name", list(CASES))
def test_the_vision_encoder_may_be_trained_beside_it(name):
    blocks = [n for n in trained_parts(name, freeze_vision_tower=False) if CASES[name].blocks.split(".", 1)[1] in n]
    assert blocks
