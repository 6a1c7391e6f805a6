"""Fixtures of the evaluation's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def arrow_cache(tmp_path_factory):
    """Arrow copies of the tables go to a folder of their own."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before
