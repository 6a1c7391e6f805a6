"""Options and sizes of the pytest-benchmark suites."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes",
        choices=["tiny", "real"],
        default=None,
        help="tiny proves that the suites run (default on CPU); real is what a GPU is measured at",
    )


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest, device: str) -> str:
    return request.config.getoption("--sizes") or ("real" if device == "cuda" else "tiny")
