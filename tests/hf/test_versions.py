"""Which transformers are taken: the same range at install and at import."""

from __future__ import annotations

from pathlib import Path

import pytest

from sar_fast.hf.versions import OLDEST, check_transformers


@pytest.mark.parametrize("version", ["5.4.0", "5.17.0", "5.24.0", "5.30.1.dev0", "6.0.0rc1"])
def test_taken(version):
    check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.3.0"])
def test_refused_by_name(version):
    with pytest.raises(ImportError, match=rf"transformers>=5\.4; found {version}.*sar_attn_func"):
        check_transformers(version)


def test_setup_refuses_the_same():
    setup = Path(__file__).parents[2] / "setup.py"
    assert f'"transformers>={".".join(map(str, OLDEST))},<6"' in setup.read_text()
