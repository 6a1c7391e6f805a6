"""Rules on the command lines of evaluations: ``evaluate.py --sar_weighting`` and ``sar-fast sweep --weighting``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sar_fast import SARConfig
from sar_fast.cli.evaluate import arguments as arguments_module
from sar_fast.cli.evaluate import benchmark, focus, loading, probe, sweep
from sar_fast.cli.evaluate.arguments import parse
from sar_fast.cli.evaluate.loading import load, sar_config_of, start_processes
from sar_fast.cli.loading import load_model
from sar_fast.hf import apply_sar
from sar_fast.lab.benchmark.tables import open_table
from sar_fast.lab.benchmark.tasks import find_task
from sar_fast.lab.io.answering import answer, build_inputs
from sar_fast.lab.io.stamps import file_stamp
from sar_fast.lab.measure.recording import record
from sar_fast.lab.run.flags import expand
from sar_fast.lab.run.results import METADATA, differences, read_json
from sar_fast.lab.run.rules import rule_label, rule_settings, rule_slug, state_stamp
from sar_fast.weighting import Equal, SoftmaxOverHeads
from tests.evaluation.benchmarks import DATA, arguments, lines

pytestmark = pytest.mark.usefixtures("one_thread", "arrow_cache", "own_rules")

RULES = """
import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Power:
    exponent: float = 3.0

    def __call__(self, statistics, layer):
        return statistics.sav**self.exponent / (statistics.sav**self.exponent).mean(-1, keepdim=True)


def halves(statistics, layer):
    return torch.where(torch.arange(statistics.av.shape[-1]) % 2 == 0, 0.25, statistics.av.new_ones(()))


halves.needs_statistics = False


class Scales(torch.nn.Module):
    needs_statistics = False

    def __init__(self, layers, heads):
        super().__init__()
        self.layers, self.heads = layers, heads
        self.scales = torch.nn.Parameter(torch.linspace(-0.5, 1.5, layers * heads).reshape(layers, heads))

    def options(self):
        return {"layers": self.layers, "heads": self.heads}

    def forward(self, statistics, layer):
        return self.scales[layer]


class Silent:
    def __init__(self, exponent=2.0):
        self.half = exponent / 2

    def __call__(self, statistics, layer):
        return statistics.sav
"""

SMALL = """
class Small:
    def __init__(self, SIZE):
        if SIZE > 2:
            raise ValueError(f"SIZE must be at most 2; got {SIZE}")

        self.size = SIZE

    def options(self):
        return {"SIZE": self.size}

    def __call__(self, statistics, layer):
        return statistics.sav
"""


@pytest.fixture
def rules(tmp_path):
    """A file of rules."""
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def ruled(out, weighting, **change):
    return arguments(out, use_sar=True, sar_activation_layer_k=4, sar_weighting=weighting, **change)


# --- one evaluation


def power(statistics, layer):
    """The file's ``Power``, by hand."""
    cubes = statistics.av**3 * statistics.sa**3
    return cubes * cubes.shape[-1] / cubes.sum(-1, keepdim=True)


def test_a_rule_of_a_file_answers_as_apply_sar_by_hand(tmp_path, rules):
    benchmark.run(ruled(tmp_path / "out", f"{rules}:Power"))
    records = lines(tmp_path / "out")
    task = find_task("mme")()
    table = open_table(task, str(DATA / "mme"), None)
    rows = {sample.key: sample.row for sample in task.samples(table.rows)[0]}
    model, processor = load_model("miniature")
    pictures = [table.picture(rows[record["key"]]) for record in records]
    prompts = [record["prompt"] for record in records]
    plain = answer(model, processor, pictures, prompts)
    with apply_sar(model, SARConfig(activation_layer_k=4, weighting=power)):
        by_hand = answer(model, processor, pictures, prompts)
    assert [record["reply"] for record in records] == by_hand
    assert by_hand != plain


def test_equal_weights_are_the_model_without_sar(tmp_path):
    benchmark.run(arguments(tmp_path / "plain", scoring="first_token"))
    benchmark.run(ruled(tmp_path / "equal", "equal", scoring="first_token"))
    for one, other in zip(lines(tmp_path / "plain"), lines(tmp_path / "equal")):
        assert other["log_probabilities"] == pytest.approx(one["log_probabilities"], abs=1e-5)


def test_the_papers_rule_by_name_is_the_papers_rule(tmp_path):
    spec = json.dumps({"name": "softmax", "options": {"beta": 0.02}})
    benchmark.run(ruled(tmp_path / "named", spec, scoring="first_token"))
    benchmark.run(ruled(tmp_path / "paper", None, sar_beta=0.02, scoring="first_token"))
    assert lines(tmp_path / "named") == lines(tmp_path / "paper")


def test_a_rule_gets_the_models_sizes_and_its_own_weights(tmp_path, rules):
    """Layers below the re-weighted ones count: scales are found by the index of the attention layer."""
    given = arguments(tmp_path / "out", use_sar=True, sar_activation_layer_k=2, sar_weighting=f"{rules}:Scales")
    assert sar_config_of(given).weighting.options() == {"layers": 4, "heads": 8}
    model, processor, handle = load(given, start_processes("cpu"))
    handle.remove()
    inputs = build_inputs(model, processor, [Image.new("RGB", (20, 20))], ["What is this?"])
    seen = record(model, inputs, handle.config)
    assert sorted(seen.stats) == [2, 3]
    torch.testing.assert_close(seen.head_weights(), torch.linspace(-0.5, 1.5, 32).reshape(4, 8)[2:], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sfs_fi", "probe"])
def test_analyses_take_rules(tmp_path, rules, kind):
    module, flag = {"sfs_fi": (focus, "do_sfs_fi_eval"), "probe": (probe, "do_layerwise_probe")}[kind]
    common = {"task": None, "data_dir": None, "dataset": "shapes_grounding", "max_samples": 8, flag: True}
    common |= {"probe_seeds": 1} if kind == "probe" else {}
    for name, spec in (("scales", f"{rules}:Scales"), ("equal", "equal")):
        module.run(ruled(tmp_path / name, spec, **common))
    assert read_json(tmp_path / "scales" / METADATA)["settings"]["sar"]["weighting"]["name"] == "rules.py:Scales"
    file = {"sfs_fi": "samples.jsonl", "probe": "features/features.bin"}[kind]
    assert (tmp_path / "scales" / file).read_bytes() != (tmp_path / "equal" / file).read_bytes()


# --- what results keep of a rule


def test_results_name_the_rule(tmp_path, rules):
    spec = json.dumps({"name": f"{rules}:Power", "options": {"exponent": 2.0}})
    benchmark.run(ruled(tmp_path / "out", spec))
    stored = read_json(tmp_path / "out" / METADATA)
    found = stored["settings"]["sar"]
    assert {**found["weighting"], "file": None} == {
        "name": "rules.py:Power",
        "options": {"exponent": 2.0},
        "file": None,
    }
    assert not {"beta", "normalize"} & set(found)
    assert stored["sessions"][0]["configuration"]["sar_weighting"] == spec


def test_another_rule_does_not_continue(tmp_path, rules):
    out = tmp_path / "out"
    benchmark.run(ruled(out, f"{rules}:halves"))
    with pytest.raises(ValueError, match=r'sar\.weighting\.name was "rules\.py:halves", now "equal"'):
        benchmark.run(ruled(out, "equal"))
    with pytest.raises(ValueError, match=r"sar\.beta was null, now 0\.5; .*sar\.weighting was \{.*\}, now null"):
        benchmark.run(ruled(out, None))
    power = lambda exponent: json.dumps({"name": f"{rules}:Power", "options": {"exponent": exponent}})
    benchmark.run(ruled(tmp_path / "power", power(3.0)))
    with pytest.raises(ValueError, match=r"sar\.weighting\.options\.exponent was 3\.0, now 2\.0"):
        benchmark.run(ruled(tmp_path / "power", power(2.0)))


def test_a_changed_file_does_not_continue_a_moved_one_does(tmp_path, rules):
    out = tmp_path / "out"
    before = benchmark.run(ruled(out, f"{rules}:halves"))
    moved = tmp_path / "elsewhere" / rules.name
    moved.parent.mkdir()
    rules.rename(moved)
    assert benchmark.run(ruled(out, f"{moved}:halves")) == before
    assert len(read_json(out / METADATA)["sessions"]) == 2
    moved.write_text(RULES.replace("0.25", "0.5"))
    with pytest.raises(ValueError, match=r'sar\.weighting\.file was "\w+", now "\w+"'):
        benchmark.run(ruled(out, f"{moved}:halves"))


def test_a_file_that_registers_its_rule_is_stamped(rules):
    """It is known by the other name then."""
    rules.write_text(
        f"{RULES}\nfrom sar_fast.weighting import register_weighting\nregister_weighting('mine', halves)\n"
    )
    arguments = ruled("x", f"{rules}:halves")
    found = rule_settings(arguments.sar_weighting, sar_config_of(arguments))["weighting"]
    assert (found["name"], found["file"]) == ("mine", file_stamp(rules))
    assert "file" not in rule_settings("equal", SARConfig(weighting=Equal()))["weighting"]


def test_other_parameters_do_not_continue(rules):
    """As those of a folder that training saved anew."""
    arguments = ruled("x", f"{rules}:Scales")
    one, other = (sar_config_of(arguments) for _ in range(2))
    settings = rule_settings(arguments.sar_weighting, one)
    assert settings == rule_settings(arguments.sar_weighting, other)
    with torch.no_grad():
        other.weighting.scales[3, 7] += 1e-6
    (difference,) = differences(settings, rule_settings(arguments.sar_weighting, other))
    assert difference.startswith("weighting.state was ")


def test_a_stamp_of_parameters_sees_names_shapes_and_dtypes():
    x = torch.zeros(2, 2)
    states = [{"a": x}, {"b": x}, {"a": x.reshape(4)}, {"a": x.half()}, {"a": x, "b": x}, {"a": torch.tensor(0.0)}]
    states += [{"a": x.bfloat16()}, {"a": torch.zeros(2, 2, dtype=torch.bool)}, {"a": x + torch.eye(2)}]
    assert len({state_stamp(state) for state in states}) == len(states)
    assert state_stamp({"a": x, "b": x + 1}) == state_stamp({"b": x + 1, "a": x.clone()})


def test_results_of_a_revision_without_rules_continue(tmp_path):
    """What settings of benchmarks, and of the probe's features, were before there were rules; no more, no less."""
    before = {
        "activation_layer_k": 2, "beta": 0.5, "protect_first_head": True, "normalize": "none",
        "text_queries": "after_last_image", "prior_source": "vision_layer", "decode": "running", "sav_grad": False,
        "backend": "auto", "record": False, "record_rows": "none",
    }  # fmt: skip
    given = {"use_sar": True, "sar_activation_layer_k": 2, "max_samples": 8}
    benchmark.run(arguments(tmp_path / "mme", **given))
    given |= {"task": None, "data_dir": None, "dataset": "shapes_grounding", "do_layerwise_probe": True}
    probe.run(arguments(tmp_path / "probe", probe_seeds=1, **given))
    for stored in ("mme/" + METADATA, "probe/" + METADATA, "probe/features/features.json"):
        assert read_json(tmp_path / stored)["settings"]["sar"] == before


# --- flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "--sar_weighting must be one of .*; got 'nope'"),
        (["{rules}:nope"], "--sar_weighting: .*rules.py has no 'nope'"),
        (["gone.py:f"], "--sar_weighting must be FILE.py:NAME; got 'gone.py:f': no such Python file 'gone.py'"),
        (["{broken"], "--sar_weighting must be a name, FILE.py:NAME, or "),
        (['{"name": "softmax", "options": {"beta": 0}}'], r"--sar_weighting \{.*\}: beta must be > 0"),
        (
            ['{"name": "softmax", "options": {"bet": 1}}'],
            "--sar_weighting must have options that 'softmax' takes, beta, .*; got bet",
        ),
        (["{rules}:Silent"], "--sar_weighting must say which options it got: .*; got Silent, which takes exponent"),
        (
            ["equal", "--sar_beta", "0.5"],
            "--sar_weighting must come without options of the paper's rule; got --sar_beta",
        ),
        (
            ["equal", "--sar_normalize", "standardize", "--sar_beta", "1"],
            "--sar_weighting must come without options of the paper's rule; got --sar_beta, --sar_normalize",
        ),
    ],
)
def test_bad_flags(tmp_path, rules, words, message):
    words = [word.replace("{rules}", str(rules)) for word in words]
    base = ["--model_name_or_path", "miniature", "--task", "mme", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"^{message}"):
        parse([*base, "--use_sar", "--sar_weighting", *words])
    assert not (tmp_path / "out").exists()


def test_a_rule_needs_sar(tmp_path):
    with pytest.raises(ValueError, match="sar_weighting must be left out without use_sar; got equal"):
        arguments(tmp_path, sar_weighting="equal")
    arguments(tmp_path, sar_beta=0.5, sar_normalize="none")  # what SAR would do by itself: as good as not given


def test_a_rule_that_does_not_fit_the_model_is_found_before_it_is_loaded(tmp_path, rules, monkeypatch):
    rules.write_text(SMALL.replace("SIZE", "heads"))
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"^--sar_weighting .*rules\.py:Small: heads must be at most 2; got 8"):
        benchmark.run(ruled(tmp_path / "out", f"{rules}:Small"))


def test_only_the_model_tells_whether_its_sizes_fit(tmp_path, rules):
    """Numbers that stand for a model's in the first check are no reason to refuse a rule."""
    rules.write_text(SMALL.replace("SIZE > 2", "SIZE < 3").replace("most", "least").replace("SIZE", "layers"))
    benchmark.run(ruled(tmp_path / "out", f"{rules}:Small"))
    spec = lambda **options: json.dumps({"name": f"{rules}:Small", "options": options})
    with pytest.raises(ValueError, match=r"^--sar_weighting .*: layers must be at least 2; got 1"):
        ruled(tmp_path, spec(layers=1))
    with pytest.raises(ValueError, match=r"^--sar_weighting must have options that .* takes, layers; got heads"):
        ruled(tmp_path, spec(heads=1))


def test_yaml_holds_rules_as_they_are(tmp_path):
    """A mapping is JSON on the command line, also in a list."""
    path = tmp_path / "rules.yaml"
    path.write_text("sar_weighting: {name: softmax, options: {beta: 2}}\nweighting: [equal, {name: softmax}]\n")
    assert expand([str(path)]) == [
        "--sar_weighting", '{"name": "softmax", "options": {"beta": 2}}', "--weighting", "equal", '{"name": "softmax"}'
    ]  # fmt: skip
    words = ["--weighting", "equal", '{"name": "a=b"}', "k=1"]
    assert expand(words) == [*words[:3], "--k", "1"]


# --- names


def test_folders_of_rules_are_safe_and_unique():
    specs = [
        "equal", "softmax", "Equal", "beta0.5", "a/rules.py:mine", "b/rules.py:mine", "..", "/etc", "x" * 300,
        '{"name": "softmax", "options": {"beta": 2}}', '{"name": "softmax", "options": {"beta": 3}}',
        '{"name": "fixed", "options": {"c": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]}}',
    ]  # fmt: skip
    slugs = [rule_slug(spec) for spec in specs]
    assert slugs[:2] == ["equal", "softmax"]
    assert len({slug.lower() for slug in slugs}) == len(specs)
    for slug in slugs:
        assert Path(slug).name == slug
        assert len(slug) < 60
        assert set(slug) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    assert rule_slug('{"options":{"beta":2},"name":"softmax"}') == slugs[9]
    assert rule_slug('{"name": "equal"}') == "equal"


def test_labels():
    assert rule_label("a/rules.py:mine") == "rules.py:mine"
    assert rule_label('{"name": "softmax", "options": {"beta": 2, "normalize": "none"}}') == (
        'softmax(beta=2, normalize="none")'
    )
    assert len(rule_label({"name": "fixed", "options": {"c": list(range(99))}})) < 50


# --- sweeps


def words(folder, *more):
    common = ["--model_name_or_path", "miniature", "--task", "mme", "--data_dir", str(DATA / "mme"), "--device", "cpu"]
    return [*common, "--max_samples", "12", "--per_device_eval_batch_size", "4", "--output_dir", str(folder), *more]


@pytest.mark.slow  # every day sweeps over K and beta, in test_sweep.py
def test_a_sweep_over_rules_equals_separate_runs(tmp_path, rules):
    """Rules of both kinds and a beta, from one trunk: statistics or none, parameters of the model's sizes."""
    specs = {
        "halves": f"{rules}:halves", "scales": f"{rules}:Scales",
        "power": json.dumps({"name": f"{rules}:Power", "options": {"exponent": 2.5}}),
    }  # fmt: skip
    more = ["--scoring", "first_token", "--k", "0", "2", "4", "--beta", "0.02", "--weighting", *specs.values()]
    summary = sweep.run(sweep.parse(words(tmp_path / "sweep", *more)))
    rows = summary["settings"]
    rule = lambda row: (row["k"], row["beta"], row["weighting"])
    assert [rule(row) for row in rows] == [
        (0, None, None),
        *((k, *of) for k in (2, 4) for of in [(0.02, None), *((None, spec) for spec in specs.values())]),
    ]
    assert summary["layer_passes"]["branched"] == 4 + 4 * 2 + 4 * 4
    found = {}
    for row in rows[1:]:
        flags = ["--sar_beta", "0.02"] if row["beta"] else ["--sar_weighting", row["weighting"]]
        alone = tmp_path / "alone" / row["folder"]
        sar = ["--scoring", "first_token", "--use_sar", "--sar_activation_layer_k", str(row["k"]), *flags]
        benchmark.run(arguments_module.parse(words(alone, *sar)))
        found[rule(row)] = lines(alone)
        assert lines(tmp_path / "sweep" / row["folder"]) == found[rule(row)]
        assert (
            differences(*(read_json(d / METADATA)["settings"] for d in (alone, tmp_path / "sweep" / row["folder"])))
            == []
        )
    assert len({json.dumps(records) for records in found.values()}) == len(found)  # the rules do differ


def test_a_sweep_goes_on_and_refuses_another_file(tmp_path, rules):
    more = ["--k", "2", "--weighting", f"{rules}:halves", "equal"]
    first = sweep.run(sweep.parse(words(tmp_path / "sweep", *more)))
    assert [row["folder"].split("-")[0] for row in first["settings"]] == ["k2_rules.py", "k2_equal"]
    assert (tmp_path / "sweep" / "figure6.png").stat().st_size > 5000
    again = sweep.run(sweep.parse(words(tmp_path / "sweep", *more)))
    assert again["settings"] == first["settings"]
    rules.write_text(RULES.replace("0.25", "0.5"))
    with pytest.raises(ValueError, match=r"sar\.weighting\.file was"):
        sweep.run(sweep.parse(words(tmp_path / "sweep", *more)))


def test_rules_alone_leave_out_the_default_beta(tmp_path):
    folders = lambda *more: [
        Path(s.output_dir).name for s in sweep.parse(words(tmp_path, "--k", "1", *more)).settings()
    ]
    assert folders("--weighting", "equal") == ["k1_equal"]
    assert folders("--beta", "0.5", "--weighting", "equal") == ["k1_beta0.5", "k1_equal"]
    assert folders() == ["k1_beta0.5"]
    given = sweep.parse(
        words(tmp_path, "--k", "1", "--beta", "1", "--weighting", "equal", "--sar_normalize", "standardize")
    )
    configs = [setting.sar_config() for setting in given.settings()]
    assert [config.rule for config in configs] == [SoftmaxOverHeads(1.0, True, "standardize"), Equal()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "1", "--weighting", "nope"], "--weighting must be one of .*; got 'nope'"),
        (["--k", "1", "--weighting", "equal", '{"name":  "equal"}'], "--weighting must be different rules; got equal"),
        (["--k", "0", "--weighting", "equal"], "--weighting must be left out with --k 0 alone"),
        (["--k", "1", "--sar_weighting", "equal"], "--sar_weighting must be left out, as a sweep varies it: give"),
        (
            ["--k", "1", "--weighting", "equal", "--sar_normalize", "standardize"],
            "--sar_normalize must be left out with --weighting alone; or add --beta; got standardize",
        ),
        (["--k", "1", "--weighting", '{"name": "softmax", "options": {"beta": 0}}'], "--weighting {.*}: beta must be"),
    ],
)  # fmt: skip
def test_bad_sweeps(tmp_path, more, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sweep.parse(words(tmp_path / "out", *more))


def test_a_sweeps_rule_that_does_not_fit_the_model_is_named_by_its_flag(tmp_path, rules):
    rules.write_text(SMALL.replace("SIZE", "layers"))
    with pytest.raises(ValueError, match=r"^--weighting .*rules\.py:Small: layers must be at most 2; got 4"):
        sweep.run(sweep.parse(words(tmp_path / "out", "--k", "1", "--weighting", f"{rules}:Small")))
