"""The slice of the libraries beneath backend "composed", and the table of speeds that is made of its records."""

from __future__ import annotations

import json

import providers
import pytest
import speed_table
import torch
from gpu_suite import attention, kernels, libraries
from gpu_suite.records import NAME

from sar_fast.backends import select
from sar_fast.backends.select import BY_NAME
from sar_kernels.launch import Launch
from tests.gpu_suite.test_bench import told
from tests.providers import libraries as stand_ins


@pytest.fixture
def on_cpu(monkeypatch):
    """A provider that runs here under the benchmarks' name for it."""
    operators = stand_ins.operator_library()
    monkeypatch.setattr(select, "PROVIDERS", dict(select.PROVIDERS))
    before = dict(BY_NAME)
    select.register_provider(stand_ins.PROVIDERS["torch"])
    name = "sar-composed:test-torch"
    monkeypatch.setitem(providers.PROVIDERS, name, providers._ours("composed:test-torch"))
    monkeypatch.setattr(attention, "unavailable", lambda name, device: None)
    monkeypatch.setattr(libraries, "NAMES", (name,))
    yield name
    BY_NAME.clear()
    BY_NAME.update(before)
    operators._destroy()


def test_the_slice_measures_what_is_green_and_launches_what_is_planned(bench, on_cpu, monkeypatch):
    launched, run = set(), Launch.run

    def note(launch: Launch) -> None:
        launched.add(told(launch))
        run(launch)

    monkeypatch.setattr(Launch, "run", note)
    libraries.libraries(bench)
    records = bench.records.all()
    gate = {r["mode"]: r["green"] for r in records if r["kernel"] == "gate"}
    assert gate == {"forward": True, "constant": True, "through": True}
    times = {(r["mode"], r["provider"]) for r in records if r["kernel"] == "attention" and "p50" in r}
    modes = ("libraries", "libraries, forward+backward")
    assert times == {(m, p) for m in modes for p in ("sar-triton", on_cpu)}
    assert [r["provider"] for r in records if r["kernel"] == "launches"] == ["sar launches"]
    planned = {told(x) for x in kernels.launches_of("libraries", arch="cpu", dtype=torch.float32, tiny=True)}
    assert launched - planned == set()


def record(provider: str, milliseconds: float, *, mode: str = "libraries", length: int = 8192, **more) -> dict:
    shape = {"B": 1, "N": length, "H": 32, "Hkv": 8, "D": 128, "T": 0.05}
    about = {"kernel": "attention", "provider": provider, "mode": mode, "shape": shape, "gpu": "G", "key": "k"}
    return {**about, "p50": milliseconds, **more}


MACHINE = {"kernel": "machine", "provider": "x", "mode": "facts", "shape": {}, "gpu": "G", "key": "k", "arch": "sm_90"}


def test_rows_are_ordered_by_what_was_measured():
    found = speed_table.rows(
        [
            record("sar-triton", 9.0, key="older"),
            MACHINE,
            record("sar-triton", 1.0),
            record("sar-composed:cudnn", 0.7),
            record("sar-composed:fa2", 0.99),  # less than 2 % is nothing
            record("sar-composed:fa3", 0.1),
            {**record("sar-composed:fa3", 0.0), "kernel": "gate", "failures": ["out: error"]},
            record("sar-composed:cudnn", 2.0, mode="libraries, forward+backward"),
            record("sar-triton", 3.0, mode="libraries, forward+backward"),
            record("sar-triton", 3.0, mode="forward"),
        ]
    )
    at = {"arch": "sm_90", "head_dim": 128, "length": 8192}
    assert found == [
        {**at, "direction": "forward", "order": ["composed:cudnn", "triton", "composed:fa2"]},
        {**at, "direction": "training", "order": ["composed:cudnn", "triton"]},
    ]


def test_the_table_keeps_other_architectures_and_is_read_back(tmp_path, capsys):
    table, folder = tmp_path / "speed.json", tmp_path / "gpu"
    other = {"arch": "sm_80", "direction": "forward", "head_dim": 64, "length": 1, "order": ["triton"]}
    table.write_text(json.dumps({"source": "", "rows": [other, {**other, "arch": "sm_90"}]}))
    folder.mkdir()
    lines = [MACHINE, record("sar-triton", 1.0)]
    (folder / NAME).write_text("".join(json.dumps(r) + "\n" for r in lines))
    call = ["--records", str(folder), "--out", str(table)]
    before = table.read_text()
    assert speed_table.main([*call, "--dry-run"]) == 0
    assert table.read_text() == before
    assert speed_table.main(call) == 0
    written = json.loads(table.read_text())
    assert written["source"] == "G"
    assert [r["arch"] for r in written["rows"]] == ["sm_80", "sm_90"]
    assert written["rows"][1]["head_dim"] == 128
    (folder / NAME).write_text(json.dumps(record("sar-triton", 1.0)) + "\n")
    for wrong, text in ((call, "tells its architecture"), (["--records", str(tmp_path)], "is not there")):
        with pytest.raises(SystemExit):
            speed_table.main(wrong)
        assert text in capsys.readouterr().err
