"""SAR in lmms-eval, without a fork: ``lmms-eval --model sar_hf --model_args pretrained=...,sar_beta=0.5 --tasks ...``.

The entry point ``lmms_eval.models`` calls :func:`manifests`.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval registers: the model ``sar_hf``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="sar_hf", chat_class_path="sar_fast.integrations.lmms_eval.model.SARHuggingFace")]
