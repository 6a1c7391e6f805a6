"""What a Trainer saves: a model like the one that it was given, apart from its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, Trainer

from sar_fast.base.errors import ArgumentError
from sar_fast.base.weight_files import open_to_readers
from sar_fast.hf.structure import unwrap

USE_CACHE = "use_cache"


class PlainModels:
    """Mix-in of a Trainer: trains without a cache of keys and values, and saves configurations as they were before.

    Training needs no cache, and packed rows allow none, so the Trainer's ``use_cache`` holds in the model's and in its
    text model's configuration; a saved model would generate without one ever after. Weights get the usual file
    mode.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if model is None:
            raise ArgumentError("model", "None", "be given: what it was before training is restored on saving")
        config = unwrap(model).config
        configs: list[PretrainedConfig] = [config, config.get_text_config()]
        self._given = [(c, vars(c)[USE_CACHE]) if USE_CACHE in vars(c) else (c, None) for c in configs]
        super().__init__(*args, **kwargs)
        self._set_cache()

    def _set_cache(self: Trainer) -> None:
        for config, _ in self._given:
            config.use_cache = self.args.use_cache

    def _save(self: Trainer, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        for config, value in self._given:
            vars(config).pop(USE_CACHE) if value is None else setattr(config, USE_CACHE, value)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self._set_cache()
        if self.args.should_save:
            open_to_readers(Path(output_dir or self.args.output_dir))
