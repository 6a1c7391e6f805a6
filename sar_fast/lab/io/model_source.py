"""Where a model lies, and the one that is shipped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sar_fast.lab.io.model_errors import ModelError

MINIATURE = "miniature"
MINIATURE_PATH = Path(__file__).parents[2] / "assets" / "miniature"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model lies.

    Attributes:
        name: as it was given.
        weights: folder (absolute) or hub id of the whole model; of an adapter, its base.
        adapter: folder or hub id of the adapter; None for a whole model.
        revision: of a base on the hub, if the adapter names one.
    """

    name: str
    weights: str
    adapter: str | None = None
    revision: str | None = None

    @property
    def is_miniature(self) -> bool:
        """Whether the weights are the shipped ones."""
        return self.weights == str(MINIATURE_PATH)

    @property
    def base_name(self) -> str:
        """How the whole model is called: ``miniature``, a folder or a hub id."""
        return MINIATURE if self.is_miniature else self.weights

    @property
    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` of the weights needs besides their place."""
        return {} if self.revision is None else {"revision": self.revision}

    def error(self, text: str, **values: Any) -> ModelError:
        """An error that begins with the model's name, and its base's."""
        on = f" (an adapter on {self.base_name!r})" if self.adapter else ""
        return ModelError("{model} {name!r}{on} " + text, name=self.name, on=on, **values)
