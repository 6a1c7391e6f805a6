"""Fixtures of the training tests: the miniature's processor, records, offline caches."""

from __future__ import annotations

import pytest

from sar_fast.lab.miniature.checkpoint import load_miniature
from tests.training.samples import image_bytes


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory, monkeypatch):
    """No test reads what another run left in the user's cache, and none asks the network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def processor():
    return load_miniature()[1]


@pytest.fixture
def picture():
    """The bytes of a small PNG."""
    return image_bytes()
