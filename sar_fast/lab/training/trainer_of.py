"""The Trainer that a callback runs in: events say its state, arguments and model, not the Trainer itself."""

from __future__ import annotations

import gc

from transformers import Trainer, TrainerState

from sar_fast.base.errors import ArgumentError


def trainer_of(state: TrainerState) -> Trainer:
    """The Trainer whose state this is; ``ValueError`` if it is not found."""
    for found in gc.get_objects():
        if issubclass(type(found), Trainer) and found.state is state:  # isinstance would wake lazy stand-ins
            return found
    raise ArgumentError("trainer", None, "be given to the callback: the one that it runs in is not found")
