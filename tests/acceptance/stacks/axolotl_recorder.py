"""A plugin of Axolotl that keeps a run's first batch, as its model gets it."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin

from tests.acceptance.stacks.common import record_first_batch


class RecorderPlugin(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        record_first_batch(trainer.model)
