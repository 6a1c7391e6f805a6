"""A plugin of ms-swift whose callback ``record`` keeps a run's first batch, as its model gets it."""

from __future__ import annotations

from swift.callbacks import TrainerCallback, callbacks_map

from tests.acceptance.stacks.common import record_first_batch


class Recorder(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        record_first_batch(getattr(model, "module", model))


callbacks_map["record"] = Recorder
