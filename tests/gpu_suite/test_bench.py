"""One way to measure: failures become records, a red gate withholds what rests on it, launches are those planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gpu
import providers
import pytest
import readme
import torch
from gpu_suite import attention, cases, commands, decode, gate, inputs, kernels, patterns
from gpu_suite.bench import OutOfTime
from gpu_suite.goals import goals, print_table
from gpu_suite.records import NAME, Records, merge
from providers import PROVIDERS

from sar_kernels.launch import Launch

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"B": 1, "N": 48, "H": 4, "Hkv": 2, "D": 16, "T": 0.3}


def waits(*_):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_provider_that_fails_is_a_record_and_the_others_go_on(bench, monkeypatch, capsys):
    monkeypatch.setitem(PROVIDERS, "plain-triton", waits)
    attention.short(bench)
    found = {r["provider"]: r for r in bench.records.all()}
    assert found["plain-triton"]["error"] == "RuntimeError: operation not permitted when stream is capturing"
    assert all("p50" in found[p] for p in ("sar-triton", "sdpa-flash"))
    bench.records.path.unlink()
    attention.short(bench)  # neither what is measured nor what failed is tried again
    assert not bench.records.path.exists()
    bench.retry_before = "9999"
    monkeypatch.setitem(PROVIDERS, "plain-triton", PROVIDERS["sdpa-flash"])
    attention.short(bench)
    assert all("p50" in r for r in bench.records.all())


def test_a_call_that_cannot_be_captured_is_a_record(bench):
    bench.device.graph = waits
    decode.decode(bench)
    assert {r["provider"] for r in bench.records.all() if "error" in r} == set(decode.PROVIDERS)


def test_a_red_row_withholds_the_speed_that_rests_on_it(bench, monkeypatch, capsys):
    right = gate.sar_attn_func

    def slightly_wrong(*args, **kwargs):
        out, stats = right(*args, **kwargs)
        return out * 1.001, stats

    monkeypatch.setattr(gate, "sar_attn_func", slightly_wrong)
    gate.gate(bench)
    rows = {(r["provider"], r["mode"]): r for r in bench.records.all()}
    assert not rows["sar-triton", "forward"]["green"]
    assert rows["sar-triton", "forward"]["failures"][0].startswith("out: error")
    assert rows["plain-triton", "forward"]["green"]
    assert all(rows[mode, "decode"]["green"] for mode in gate.MODES)
    attention.short(bench)
    decode.decode(bench)
    found = {r["provider"]: r for r in bench.records.all() if r["kernel"] in ("attention", "decode")}
    assert found["sar-triton"]["error"].startswith("withheld: the gate is red (sar-triton forward")
    assert all("p50" in found[p] for p in ("plain-triton", "sdpa-flash", "sar running", "plain"))
    print_table(bench.records.all())
    printed = capsys.readouterr().out
    assert "RED  gate sar-triton forward" in printed
    assert "1 figures withheld where the gate is red" in printed


def test_a_figure_without_a_gate_row_says_so(bench):
    attention.short(bench)
    found = {r["provider"]: r for r in bench.records.all()}
    assert found["sar-triton"]["gate"] == "missing"
    assert "gate" not in found["sdpa-flash"]


@pytest.mark.everyday(what=["dq"])
@pytest.mark.parametrize("what", ["out", "AV", "dq", "NaN"])
def test_the_gate_sees_what_is_wrong(what, monkeypatch):
    given = gate.make_inputs(*inputs.sizes(inputs.gate_shapes(True)[0]), dtype=torch.float32)
    right = gate.sar_attn_func

    def wrong(q, *args, **kwargs):
        out, stats = right(q, *args, **kwargs)
        if what == "AV":
            stats = dataclasses.replace(stats, alignment_variance=1.01 * stats.alignment_variance)
        elif what == "dq":
            out = out + 1e-2 * (q - q.detach())
        else:
            out = out * (float("nan") if what == "NaN" else 1.001)
        return out, stats

    rows = gate.check_prefill(right, given, True)
    assert not rows["forward"][0]
    assert not rows["gradients"][0]
    rows = gate.check_prefill(wrong, given, True)
    failures = [f.split(":")[0] for f in rows["forward"][0] + rows["gradients"][0]]
    assert ("out" if what == "NaN" else what) in failures


def test_deadlines_are_kept_between_shapes(bench):
    bench.until = 0
    with pytest.raises(OutOfTime):
        attention.short(bench)
    assert not bench.records.all()


SLICES = {
    "gate": gate.gate,
    "visibility": patterns.visibility,
    "forward": attention.forward,
    "backward": attention.backward,
    "short": attention.short,
}
SLICES["sanitize"] = lambda bench: cases.small({"dtype": torch.float32, "device": "cpu"}, True)
SLICES |= {"scaling": attention.scaling, "decode": decode.decode, "others": attention.others}


def told(launch: Launch) -> tuple:
    """What a launch tells the compiler, and more: every argument but the numbers in tensors and floats."""
    of = lambda x: x.dtype if isinstance(x, torch.Tensor) else "float" if isinstance(x, float) else x
    return launch.kernel.__name__, *sorted((name, str(of(x))) for name, x in launch.arguments.items()), launch.config


@pytest.mark.everyday(name=["short", "decode"])
@pytest.mark.parametrize("name", SLICES)
def test_what_is_compiled_beforehand_is_what_a_slice_launches(name, bench, monkeypatch):
    launched, run = set(), Launch.run

    def note(launch: Launch) -> None:
        if 0 not in launch.grid:
            launched.add(told(launch))
        run(launch)

    monkeypatch.setattr(Launch, "run", note)
    monkeypatch.setattr(kernels, "MULTIPROCESSORS", 4)  # the interpreter's
    SLICES[name](bench)
    planned = {told(x) for x in kernels.launches_of(name, arch="cpu", dtype=torch.float32, tiny=True)}
    assert launched - planned == set()
    assert planned - launched == set()


def test_goals_come_from_the_records(tmp_path, monkeypatch):
    path = tmp_path / "gpu" / NAME
    records = Records(path, {"gpu": "X", "key": "k", "driver": "1", "versions": {"torch": "2"}})
    shape = {"B": 8, "N": 2048, "H": 32, "Hkv": 8, "D": 128, "T": 0.05}
    for provider, t in {"sar-triton": 1.02, "plain-triton": 1.0, "sdpa-flash": 1.1, "sdpa-cudnn": 0.8}.items():
        records.add("attention", provider, "forward", "ms", shape, [t])
    found = {r.work: (round(r.value, 3), r.met) for r in goals(records.all())}
    assert found == {
        "forward, SAR on / off": (1.02, True),
        "forward, SAR / FlashAttention-2": (0.927, True),
        "forward, SAR / cuDNN": (1.275, False),
    }
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "| forward, SAR on / off | 128 | 1 | 1.02 .. 1.02 | <= 1.03 |" in readme.gpu()
    path.unlink()
    assert readme.gpu() == "No GPU has measured anything yet."


def test_records_of_another_machine_are_merged_once(tmp_path, capsys):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    records = Records(theirs / NAME, {"gpu": "X", "key": "k"})
    records.add("copy", "torch", "ceiling", "ms", {"bytes": 8}, [1.0])
    for expected in ("1 new", "0 new"):
        assert gpu.main(["--merge", str(theirs), "--out", str(ours)]) == 0
        assert expected in capsys.readouterr().out
    other_gpu = Records(tmp_path / NAME, {"gpu": "Y", "key": "k"}, [ours / NAME])
    same_gpu = Records(tmp_path / NAME, {"gpu": "X", "key": "k"}, [ours / NAME])
    assert (len(other_gpu.all()), len(same_gpu.all())) == (0, 1)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / NAME
    good = json.dumps({"kernel": "copy"})
    path.write_text(f'{good}\n{{"kernel": "co')
    assert merge([path], tmp_path / "other") == 1
    path.write_text(f'{{"kernel": "co\n{good}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        merge([path], tmp_path / "other")


NCU = """
  forward_kernel (32, 32, 4)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Frequency                  Ghz         2.61
    Elapsed Cycles                cycle      612,345
    Memory Throughput                 %        31.02
    ----------------------- ----------- ------------
    Block Size                                                   256
    OPT   This kernel's theoretical occupancy (12.5%) is limited by 1.
"""


def test_figures_of_ncu_are_read_off_its_page():
    assert commands.ncu_rows(NCU) == {
        "DRAM Frequency [Ghz]": "2.61",
        "Elapsed Cycles [cycle]": "612,345",
        "Memory Throughput [%]": "31.02",
        "Block Size": "256",
    }


def test_flex_attention_is_compiled_for_every_length(monkeypatch):
    """Beyond dynamo's limit of recompilations it would run eagerly, and hold all N x N scores."""
    compiled = []

    def count(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    stand_in = torch.compile(lambda q, k, v, block_mask, enable_gqa: q + 1, backend=count, dynamic=False)
    monkeypatch.setattr(providers, "_flex_for", lambda length, device: (stand_in, None))
    for length in range(2, 14):
        q = torch.zeros(1, length, 1, 4)
        PROVIDERS["flex"](q, q, q)
    assert len(compiled) == 12


def test_a_gate_that_cannot_run_withholds_too(bench, monkeypatch):
    monkeypatch.setattr(gate, "sar_attn_func", waits)
    gate.gate(bench)
    rows = {r["mode"]: r for r in bench.records.all() if r["provider"] == "sar-triton"}
    assert {m for m, r in rows.items() if "error" in r} == {"forward", "constant", "through"}
    attention.short(bench)
    assert bench.records.find("attention", "forward, graph", inputs.short_shapes(True)[0], "sar-triton")["withheld"]


def test_red_tests_run_again_and_green_ones_do_not(bench, monkeypatch):
    failures = iter([1, 0])

    def pytest_stand_in(_bench, command, _log):
        report = next(word for word in command if word.startswith("--junitxml=")).removeprefix("--junitxml=")
        inner = "<failure message='off'/>" * next(failures)
        Path(report).write_text(
            f"<testsuites><testsuite><testcase classname='t' name='a'>{inner}</testcase></testsuite></testsuites>"
        )
        return 0, ""

    monkeypatch.setattr(commands, "_run", pytest_stand_in)
    for failed in (1, 0, 0):
        commands.tests(bench)
        record = bench.records.find("tests", "pytest", {}, "everyday")
        assert (record["failed"], len(record["failures"])) == (failed, failed)


def test_a_tool_that_is_not_there_is_a_record(bench, monkeypatch):
    monkeypatch.setattr(bench.device, "command", lambda program, arguments: ["no-such-tool", *arguments])
    bench.until = 10**12
    commands.sanitize(bench)
    assert {r["mode"]: r["error"][:15] for r in bench.records.all()} == dict.fromkeys(
        ("memcheck", "racecheck"), "exit status 127"
    )
