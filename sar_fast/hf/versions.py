"""Which transformers the integration works with; importing this module checks it.

Older ones were not run: SAR would fail in the middle of a forward pass, or go wrong. docs/transformers.md says what
differs between those that are taken.
"""

from __future__ import annotations

import transformers

OLDEST = (5, 4)


def check_transformers(version: str) -> None:
    """Raise ``ImportError`` unless ``version`` is one that the integration works with."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"sar_fast's Hugging Face integration needs transformers>={oldest}; found {version}. Upgrade transformers, "
            "or use sar_fast.sar_attn_func and sar_fast.SARAttention, which do not need it"
        )


check_transformers(transformers.__version__)
