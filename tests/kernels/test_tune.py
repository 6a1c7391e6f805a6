"""The tuner's control flow, on a device and a clock that are made up; and the shortlist, on the compiler itself."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from sar_kernels.configs import KernelConfig
from sar_kernels.tools import shortlist as shortlists
from sar_kernels.tools import tune
from sar_kernels.tools.shortlist import Choice, Outcome, Shortlist, choices, describe, rank, resident
from sar_kernels.tools.tune import Bench, decide, main, spread

ARCH = "sm_90"
DQ, FORWARD = (Choice(kernel, 128, torch.bfloat16) for kernel in ("dq", "forward"))
FAST, SLOW, BAD = KernelConfig(64, 64, 4, 3), KernelConfig(64, 32, 4, 2), KernelConfig(128, 128, 4, 2)


class Device:
    """Measures by a table of milliseconds, or raises what stands there; time passes only while it measures."""

    def __init__(self, **times):
        self.times, self.now, self.measured, self.broken = times, 0.0, [], False
        self.bench = Bench(ARCH, "none", self.measure, self.synchronize, lambda: self.now, self.launches)

    def launches(self, choice, config):
        return choice.kernel, config or choice.present(ARCH)

    def measure(self, work, milliseconds, stop_at):
        kernel, config = work
        self.measured.append((kernel, config, stop_at))
        self.now += 1.0
        time = self.times.get(kernel, {}).get(config, 1.0)
        if isinstance(time, Exception):
            self.broken = "illegal" in str(time)
            raise time
        return [time] * 3 if stop_at and time > stop_at else [0.99 * time, time, 1.01 * time] * 3

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def listed(tmp_path):
    """Writes a shortlist of these configurations, the present one first, for each of these choices."""

    def write(*configs, of=(DQ,), arch=ARCH):
        keys = {c.key(arch): [{**asdict(x), "registers": 128} for x in (c.present(arch), *configs)] for c in of}
        path = tmp_path / "shortlist.json"
        path.write_text(json.dumps({"arch": arch, "triton": "3.6.0", "keys": keys}))
        return path

    return write


@pytest.fixture
def run(tmp_path):
    """Runs the command on a device; its file's content."""
    out = tmp_path / "out.json"

    def command(device, path, *arguments, status=0):
        assert main(["--shortlist", str(path), "--out", str(out), *arguments], device.bench) == status
        return json.loads(out.read_text()) if out.exists() else None

    return command


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_the_fastest_is_chosen_and_all_times_are_kept(listed, run, capsys):
    device = Device(dq={FAST: 0.5, SLOW: 2.0})
    found = run(device, listed(SLOW, FAST))
    key, present = DQ.key(ARCH), DQ.present(ARCH)
    assert {key: KernelConfig(**value) for key, value in found["configs"].items()} == {key: FAST}
    rows = {KernelConfig(**{n: row[n] for n in tune.CONFIG}): row for row in found["measured"][key]["candidates"]}
    assert {config: row["milliseconds"] for config, row in rows.items()} == {present: 1.0, SLOW: 2.0, FAST: 0.5}
    assert last_line(capsys) == "1 of 1 keys done (0 before), 1 changed, 0 missing, 0 errors"
    # The present one first and, since another was faster, last; the others no longer than 1.3 times the best.
    assert device.measured == [("dq", c, s) for c, s in ((present, None), (SLOW, 1.3), (FAST, 1.3), (present, None))]
    assert rows[SLOW]["samples"] == 3  # it was left after the first look
    assert rows[present]["samples"] == 18


def test_a_gain_within_the_present_ones_spread_changes_nothing(listed, run, capsys):
    found = run(Device(dq={FAST: 0.985, SLOW: 1.0}), listed(FAST, SLOW))
    assert found["configs"] == {}
    assert found["measured"][DQ.key(ARCH)]["complete"]
    assert "(unchanged)" in capsys.readouterr().out


def test_a_clock_that_drifts_counts_as_spread(listed, run):
    """Every later measurement is faster, the present configuration's second one too: no reason to change."""
    device = Device(dq={FAST: 0.9})
    measure, again = device.measure, []

    def drifting(work, milliseconds, stop_at):
        again.append(work)
        return (
            [0.85 * s for s in measure(work, milliseconds, stop_at)] if len(again) == 3 else measure(work, 20, stop_at)
        )

    device.bench = Bench(ARCH, "none", drifting, device.synchronize, lambda: 0.0, device.launches)
    assert run(device, listed(FAST))["configs"] == {}
    assert len(again) == 3


def test_decision():
    a, b = [1.0, 1.1, 1.2], {FAST: [0.9], SLOW: [0.99]}
    assert spread([3.0]) == 0
    assert spread(a) == pytest.approx(0.1)
    assert decide(a, b) == FAST
    assert decide(a, {SLOW: [1.05]}) is None
    assert decide(a, {}) is None
    assert decide([], b) == FAST  # the present one does not even run


def test_errors_are_recorded_and_end_nothing(listed, run, capsys):
    device = Device(dq={BAD: RuntimeError("out of resource: registers"), FAST: 0.5}, forward={BAD: ValueError("no")})
    found = run(device, listed(BAD, FAST, of=(DQ, FORWARD)))
    assert set(found["configs"]) == {DQ.key(ARCH)}
    errors = [row["error"] for record in found["measured"].values() for row in record["candidates"] if "error" in row]
    assert errors == ["RuntimeError: out of resource: registers", "ValueError: no"]
    lines = capsys.readouterr().out.splitlines()
    assert f"{DQ.key(ARCH)}: 128x128, 4 warps, 2 stages: RuntimeError: out of resource: registers" in lines
    assert lines[-1] == "2 of 2 keys done (0 before), 1 changed, 0 missing, 2 errors"


def test_a_present_choice_that_fails_is_replaced(listed, run):
    found = run(Device(dq={DQ.present(ARCH): RuntimeError("no"), FAST: 7.0}), listed(FAST))
    assert found["configs"][DQ.key(ARCH)] == asdict(FAST)


def test_a_gpu_that_breaks_down_ends_the_run_with_what_was_found(listed, run, capsys):
    path = listed(FAST, BAD, SLOW, of=(FORWARD, DQ))
    crash = RuntimeError("CUDA error: an illegal memory access was encountered")
    found = run(Device(forward={FAST: 0.5}, dq={FAST: 0.5, BAD: crash}), path, status=1)
    assert set(found["configs"]) == {FORWARD.key(ARCH), DQ.key(ARCH)}
    assert [found["measured"][c.key(ARCH)]["complete"] for c in (FORWARD, DQ)] == [True, False]
    line = last_line(capsys)
    assert line.startswith("1 of 2 keys done (0 before), 2 changed, 1 missing (dq/sm_90/128")
    assert line.endswith("1 errors; the GPU no longer answers")
    device = Device(dq={FAST: 0.5, BAD: crash})  # the next run goes on, without what broke the first one down
    found = run(device, path)
    assert [config for _, config, _ in device.measured] == [DQ.present(ARCH), FAST, SLOW, DQ.present(ARCH)]
    assert found["measured"][DQ.key(ARCH)]["complete"]
    assert last_line(capsys) == "2 of 2 keys done (1 before), 2 changed, 0 missing, 1 errors"


def test_the_deadline_ends_the_run_with_what_there_is(listed, run, capsys):
    path = listed(FAST, SLOW, of=(DQ, FORWARD))
    found = run(Device(dq={FAST: 0.5}), path, "--seconds", "2")  # a measurement takes one
    assert found["configs"] == {DQ.key(ARCH): asdict(FAST)}
    assert not found["measured"][DQ.key(ARCH)]["complete"]
    assert FORWARD.key(ARCH) not in found["measured"]
    output = capsys.readouterr().out
    assert "(cut short)" in output
    assert output.splitlines()[-1].startswith("0 of 2 keys done (0 before), 1 changed, 2 missing (dq/")
    run(Device(dq={FAST: 0.5}), path)
    assert last_line(capsys) == "2 of 2 keys done (0 before), 1 changed, 0 missing, 0 errors"


def test_a_file_is_continued_unless_it_is_to_be_measured_again(listed, run, capsys):
    path = listed(FAST)
    run(Device(dq={FAST: 0.5}), path)
    device = Device(dq={FAST: 2.0})
    assert run(device, path)["configs"] == {DQ.key(ARCH): asdict(FAST)}
    assert not device.measured
    assert last_line(capsys) == "1 of 1 keys done (1 before), 1 changed, 0 missing, 0 errors"
    assert run(device, path, "--again")["configs"] == {}
    assert device.measured
    assert last_line(capsys) == "1 of 1 keys done (0 before), 0 changed, 0 missing, 0 errors"


def test_other_arguments_leave_a_part_of_the_shortlist(listed, run):
    wide = Choice("dq", 64, torch.bfloat16)
    device = Device()
    run(device, listed(FAST, of=(DQ, FORWARD, wide)), "--kernel", "dq", "--head-dim", "128")
    assert {kernel for kernel, _, _ in device.measured} == {"dq"}
    assert len(device.measured) == 2


def test_without_a_shortlist_all_candidates_are_measured(tmp_path):
    device, out = Device(), tmp_path / "out.json"
    assert main(["--kernel", "dq", "--head-dim", "128", "--seqlen", "4096", "--out", str(out)], device.bench) == 0
    every = choices(["dq"], [128], ["bfloat16"], [4096])
    assert sorted(json.loads(out.read_text())["measured"]) == sorted(choice.key(ARCH) for choice in every)
    assert {c for _, c, _ in device.measured} == {*shortlists.candidates("dq"), DQ.present(ARCH)}


def refused(capsys, arguments, device=None):
    with pytest.raises(SystemExit):
        main([*map(str, arguments)], device and device.bench)
    return capsys.readouterr().err


def test_a_shortlist_for_another_gpu_is_refused_by_name(listed, tmp_path, capsys):
    path, out = listed(FAST, arch="sm_80"), tmp_path / "out.json"
    message = refused(capsys, ["--shortlist", path, "--out", out], Device())
    assert f"--shortlist: got {path}, made for sm_80, need one for this GPU's sm_90" in message
    assert not out.exists()


def test_files_that_cannot_be_read_are_refused_by_name(listed, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert f"--shortlist: got {broken} (JSONDecodeError" in refused(capsys, ["--shortlist", broken], Device())
    path = listed(FAST)
    assert f"--out: got {broken} (JSONDec" in refused(capsys, ["--shortlist", path, "--out", broken], Device())
    nowhere = tmp_path / "no" / "out.json"
    assert "there is no folder" in refused(capsys, ["--shortlist", path, "--out", nowhere], Device())
    path.write_text(path.read_text().replace("dq/", "dp/"))
    assert "with dp/sm_90/128/bfloat16/causal/plain/long, need keys of" in refused(
        capsys, ["--shortlist", path, "--out", tmp_path / "out.json"], Device()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head-dim", "64", "300"], "--head-dim: got [64, 300], need 1 to 256"),
        (["--seqlen", "600", "700"], "--seqlen: got [600, 700], need one up to 512, one above, or both"),
        (["--seqlen", "0"], "--seqlen: got [0], need"),
        (["--kernel", "scale"], "invalid choice: 'scale'"),
        (["--seconds", "0"], "--seconds: got 0.0, need more than 0"),
        (["--milliseconds", "-1"], "--milliseconds: got -1.0, need more than 0"),
    ],
)
def test_the_tuner_refuses_by_name(arguments, message, capsys):
    assert message in refused(capsys, arguments)


@pytest.fixture
def compiler():
    """Stands for the compiler: few registers and no spills, but what the test says of a configuration."""

    def make(**special):
        calls = []

        def compile_all(tasks):
            calls.extend(task[2] for task in tasks)
            return [special.get(describe(task[2]), Outcome("", 128, 0, 65536, 2, True)) for task in tasks]

        compile_all.calls = calls
        return compile_all

    return make


def test_one_that_is_not_clean_is_left_out(compiler):
    first = Shortlist(DQ, ARCH, 6, compiler()).run()
    best = KernelConfig(**{name: first[1][name] for name in tune.CONFIG})
    for problem in ("spills", "wgmma serialised", "error: PTXASError"):
        search = Shortlist(DQ, ARCH, 6, compiler(**{describe(best): Outcome(problem, 255, 8, 65536, 1, True)}))
        rows = search.run()
        assert best not in [KernelConfig(**{name: row[name] for name in tune.CONFIG}) for row in rows]
        assert search.left_out[problem] == 1
        assert sum(search.left_out.values()) + len(rows) - 1 == len(set(DQ.candidates(ARCH)) - {search.present})


def test_the_present_choice_is_first_even_if_it_spills(compiler):
    present = Outcome("spills", 255, 8, 98304, 1, True)
    rows = Shortlist(DQ, ARCH, 2, compiler(**{describe(DQ.present(ARCH)): present})).run()
    assert len(rows) == 3
    assert KernelConfig(**{name: rows[0][name] for name in tune.CONFIG}) == DQ.present(ARCH)
    assert (rows[0]["problem"], rows[0]["spill_bytes"], rows[0]["blocks_per_sm"]) == ("spills", 8, 1)


def test_the_same_list_whatever_the_number_of_jobs(compiler):
    spilled = {describe(KernelConfig(128, 64, w, 2)): Outcome("spills", 255, 80, 0, 1, True) for w in (4, 8)}
    serial, parallel = (Shortlist(DQ, ARCH, 4, compiler(**spilled), jobs) for jobs in (1, 5))
    assert serial.run() == parallel.run()
    assert serial.left_out == parallel.left_out


def test_what_cannot_be_clean_or_is_dominated_is_not_compiled(compiler):
    compile_all = compiler()
    search = Shortlist(FORWARD, ARCH, 2, compile_all)
    search.run()
    assert len(compile_all.calls) < len(set(FORWARD.candidates(ARCH)))
    assert search.bound(KernelConfig(128, 128, 8, 4)) == 0  # four stages of 64 KiB
    assert search.bound(KernelConfig(128, 128, 4, 2)) == 0  # 256 registers of accumulators
    assert not {c for c in compile_all.calls if not search.bound(c)}
    assert search.left_out["dominated"] > 0


def test_rank_is_bounded_by_arithmetic():
    """More resident blocks never rank lower, so the fewest registers and bytes bound the rank."""
    for choice in choices(shortlists.TUNABLE, (64, 128), ("bfloat16",), (4096,)):
        for config in choice.candidates(ARCH):
            ranks = [rank(choice, ARCH, config, blocks) for blocks in range(1, 9)]
            assert ranks == sorted(ranks)
    assert resident(ARCH, 128, 65536, 4) == 3
    assert resident(ARCH, 168, 0, 4) == 3


def child(code_or_module, *arguments):
    """Runs without the interpreter that this process has switched on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *code_or_module, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


TINY = ("--arch", ARCH, "--kernel", "statistics", "--head-dim", "64", "--at-most", "2", "--jobs", "1")


@pytest.mark.slow  # every day the list on a compiler that is none
def test_a_tiny_shortlist(tmp_path):
    out = tmp_path / "shortlist.json"
    result = child(("-m", "sar_kernels.tools.shortlist"), *TINY, "--out", out)
    assert result.returncode == 0, result.stderr[-2000:]
    arch, keys = tune.read_shortlist(out)
    choice = Choice("statistics", 64, torch.bfloat16, sav=True)
    assert (arch, list(keys)) == (ARCH, [choice.key(ARCH)])
    (configs,) = keys.values()
    assert configs[0] == choice.present(ARCH)
    assert 2 <= len(configs) == len(set(configs)) <= 3
    for row in json.loads(out.read_text())["keys"][choice.key(ARCH)]:
        assert (row["problem"], row["spill_bytes"]) == ("", 0)
        assert 0 < row["registers"] <= 255
        assert row["blocks_per_sm"] > 0
    before = out.read_bytes()
    result = child(("-m", "sar_kernels.tools.shortlist"), *TINY, "--out", out)
    assert result.stdout == f"{choice.key(ARCH)}: kept from before\n"
    assert out.read_bytes() == before


def test_a_file_for_another_architecture_is_not_continued(listed, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = listed(FAST)
    with pytest.raises(SystemExit):
        shortlists.main(["--arch", "sm_80", "--out", str(path)])
    assert f"--out: got {path}, made for sm_90, need a file for sm_80" in capsys.readouterr().err


SPILLS = """
import torch
from sar_kernels.configs import KernelConfig
from sar_kernels.tools.shortlist import Choice, compiled
statistics = Choice("statistics", 128, torch.bfloat16, sav=True)
print(compiled(statistics, "sm_90", KernelConfig(128, 128, 2, 1), True).problem)
print(compiled(statistics, "sm_90", KernelConfig(64, 96, 4, 1), True).problem)
"""


@pytest.mark.slow
def test_the_compiler_says_what_spills_and_what_it_cannot_do():
    result = child(("-c", SPILLS))
    assert result.stdout.splitlines() == ["spills", "error: CompilationError"], result.stderr[-2000:]


SAME = """
import torch
from sar_kernels.tools.aot_measure import compile_key
from sar_kernels.tools.shortlist import TUNABLE, choices, variants
from sar_kernels.tools.tune import launches

for choice in choices(TUNABLE, (128,), ("bfloat16",), (512, 4096)):
    measured = launches(choice, None, "meta", "sm_90")[-1]
    keys = {compile_key(launch, "sm_90") for _, launch in variants(choice, "sm_90", choice.present("sm_90"))}
    assert compile_key(measured, "sm_90") in keys, choice
"""


def test_what_is_compiled_is_what_is_measured():
    """The figures are those of the very kernel that the tuner launches."""
    result = child(("-c", SAME))
    assert result.returncode == 0, result.stderr[-2000:]


def test_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        shortlists.main(["--arch", ARCH, "--out", "shortlist.json"])
    assert "TRITON_INTERPRET is set: unset it, the interpreter compiles nothing" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_measurement_on_the_gpu():
    """Some milliseconds of the statistics kernel; one that is slower than it may be is left after the first look."""
    work = tune.launches(Choice("statistics", 64, torch.bfloat16, sav=True, seqlen=512), None)
    times = tune.sample(work, 5)
    assert len(times) >= tune.FIRST_LOOK
    assert 0 < statistics.median(times) < 50
    assert len(tune.sample(work, 5, stop_at=0.0)) == tune.FIRST_LOOK
