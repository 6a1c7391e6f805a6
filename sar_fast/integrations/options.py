"""SAR's options as settings of another library, whose names errors use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sar_fast.config import SARConfig
from sar_fast.lab.run.sar_flags import find_rule, naming_flags


def config_of(options: Mapping[str, Any], names: Mapping[str, str], model_config: Any) -> SARConfig:
    """The configuration of the given options; ``ValueError`` or ``TypeError`` begins with the setting's name.

    Args:
        options: field of :class:`SARConfig` -> value; a ``weighting`` as :func:`~sar_fast.weighting.find_weighting`
            takes it.
        names: field -> the setting that sets it.
        model_config: the model's, whose sizes a weighting may ask for.
    """
    with naming_flags(names, dashes=""):
        if options.get("weighting") is not None:
            options = {**options, "weighting": find_rule(options["weighting"], model_config)}
        return SARConfig(**options)
