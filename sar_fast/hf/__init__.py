"""SAR on Hugging Face multimodal models: ``apply_sar(model, config)``.

How a forward pass goes: a pre-hook on the base model begins a :class:`~.forward_pass.Pass` (token roles) and sends it
down as the keyword ``sar_context``; the vision encoder's output brings the patch norms that become the prior; the
registered attention function reads both; decode state rides on the KV cache. Nothing is global. At the end of a pass
every re-weighted layer must have attended (:mod:`.flow`).
"""

import sar_fast.hf.versions  # noqa: F401 -- other versions fail later, without saying why

# isort: split
from sar_fast.hf.families import Family, UnsupportedModelError, register_family, supported_model_types
from sar_fast.hf.handle import SARHandle, apply_sar, patch_model_for_sar, remove_sar

__all__ = [
    "Family",
    "SARHandle",
    "UnsupportedModelError",
    "apply_sar",
    "patch_model_for_sar",
    "register_family",
    "remove_sar",
    "supported_model_types",
]
