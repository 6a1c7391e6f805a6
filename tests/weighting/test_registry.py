"""Rules by name, in files and of installed packages, and back."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import pickle
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from sar_fast.method.values import Statistics
from sar_fast.method.weighting import registry
from sar_fast.method.weighting.registry import registered, weighting_to_dict
from sar_fast.weighting import (
    Equal,
    Fixed,
    HeadScales,
    ReinforceHeads,
    SoftmaxOverHeads,
    SuppressHeads,
    ThresholdHeads,
    TopHeads,
    find_weighting,
    register_weighting,
)

pytestmark = pytest.mark.usefixtures("own_rules")

SHIPPED = {
    "softmax": SoftmaxOverHeads(0.25, False, "standardize"),
    "equal": Equal(),
    "fixed": Fixed([[0.5, 2.0], [1.0, 0.1]], per_layer=True),
    "top_heads": TopHeads(0.25, damp=0.5, by="mass"),
    "threshold_heads": ThresholdHeads(0.7, damp=-1.0, by="av"),
    "suppress_heads": SuppressHeads(keep=3, damp=0.1),
    "reinforce_heads": ReinforceHeads({0: torch.tensor([[0.1, 0.3]]), 2: [0.5, 0.25]}, share=0.3, factor=1.5),
}
RULES = """
import dataclasses
import torch

@dataclasses.dataclass(frozen=True)
class Power:
    exponent: float
    floor: float = 0.0
    needs_statistics = True

    def __call__(self, statistics, layer):
        return (statistics.sav ** self.exponent).clamp_min(self.floor)

def double(statistics, layer):
    return torch.full_like(statistics.av, 2.0)

square = Power(2.0)
number = 3
LOADED = "LOADED" in globals()
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "my.rules.py"
    path.write_text(RULES)
    return path


def statistics(heads=3) -> Statistics:
    return Statistics(torch.full((1, heads), 2.0), torch.arange(1.0, heads + 1)[None], torch.ones(1))


@dataclasses.dataclass
class Mine:
    scale: float = 1.0

    def __call__(self, statistics, layer):
        return statistics.sav * self.scale


@dataclasses.dataclass(slots=True)
class Slots:
    scale: float = 1.0

    def __call__(self, statistics, layer):
        return statistics.av


def plain_rule(statistics, layer):
    return statistics.sa


# by name


def test_shipped_names():
    assert set(registered()) == {*SHIPPED, "head_scales"}


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip(name):
    """Also through JSON's text, and as a text that a command line takes."""
    written = weighting_to_dict(SHIPPED[name])
    assert written["name"] == name
    assert json.loads(json.dumps(written)) == written
    for spec in (written, json.dumps(written), "  " + json.dumps(written)):
        again = find_weighting(spec)
        assert type(again) is type(SHIPPED[name])
        assert again == SHIPPED[name]
        assert weighting_to_dict(again) == written
        assert hash(again) == hash(SHIPPED[name])


def test_round_trip_of_learned_scales():
    """A module is equal to itself only; its sizes come back, its values with its state."""
    written = weighting_to_dict(HeadScales(3, 2))
    assert written == {"name": "head_scales", "options": {"layers": 3, "heads": 2}}
    assert weighting_to_dict(find_weighting(json.dumps(written))) == written


def test_a_name_alone_takes_the_defaults():
    assert find_weighting("softmax") == SoftmaxOverHeads()
    assert find_weighting({"name": "suppress_heads"}) == SuppressHeads()
    assert find_weighting({"name": "suppress_heads", "options": None}) == SuppressHeads()
    assert find_weighting({"name": "suppress_heads", "options": {"keep": 2}}) == SuppressHeads(2)


def test_sizes_go_to_rules_that_ask_and_were_not_told():
    assert find_weighting("head_scales", layers=3, heads=5).options() == {"layers": 3, "heads": 5}
    told = {"name": "head_scales", "options": {"layers": 7}}
    assert find_weighting(told, layers=3, heads=5).options() == {"layers": 7, "heads": 5}
    assert find_weighting("equal", layers=3, heads=5) == Equal()


def test_unknown_names():
    with pytest.raises(ValueError, match=r"weighting must be one of .*softmax.*, or FILE.py:NAME; got 'soft_max'"):
        find_weighting("soft_max")
    with pytest.raises(ValueError, match=r"weighting must be one of .*; got ''"):
        find_weighting("")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "softmax", "options": {"betta": 1}},
            "options that 'softmax' takes, beta, protect_first_head, normalize; got betta",
        ),
        ({"name": "softmax", "options": {"b": 1, 3: 1}}, "options that 'softmax' takes, beta, .*; got 3, b"),
        ({"name": "equal", "options": {"c": 1}}, "options that 'equal' takes, none; got c"),
        ("top_heads", "weighting must have the option keep; got 'top_heads' without"),
        ("head_scales", "weighting must have the option layers, heads; got 'head_scales' without"),
        ({"name": "top_heads", "options": {"keep": 0}}, "keep must be a number of heads"),
    ],
)
def test_options(spec, message):
    with pytest.raises(ValueError, match=message):
        find_weighting(spec)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"name": 3},
        {"name": "equal", "option": {}},
        {"name": "equal", "options": []},
        {"name": "equal", "options": 0},
        {"options": {}},
        "{",
        '{"name": "equal"',
        '{"name": ["equal"]}',
        '{"name": "equal", "options": "x"}',
    ],
)
def test_malformed_specs(spec):
    with pytest.raises(ValueError, match=r'weighting must be a name, FILE.py:NAME, or \{"name": ...'):
        find_weighting(spec)


@pytest.mark.parametrize("spec", [None, 3, ["equal"], Equal(), Equal])
def test_kinds_of_specs(spec):
    with pytest.raises(TypeError, match=r"weighting must be a name, .* got"):
        find_weighting(spec)


def test_options_by_keyword_alone():
    @register_weighting("keyword")
    class Keyword:
        def __init__(self, *, scale, shift=0.0):
            self.scale, self.shift = scale, shift

        def __call__(self, statistics, layer):
            return statistics.sav * self.scale + self.shift

    with pytest.raises(ValueError, match="weighting must have the option scale; got 'keyword' without"):
        find_weighting("keyword")
    assert find_weighting({"name": "keyword", "options": {"scale": 3.0}}).scale == 3.0
    rule = Keyword(scale=2.0)
    assert weighting_to_dict(rule) == {"name": "keyword", "options": {"scale": 2.0, "shift": 0.0}}
    del rule.scale
    with pytest.raises(
        ValueError, match=r"weighting must say which options it got: .*; got .*Keyword, which takes scale"
    ):
        weighting_to_dict(rule)


def test_options_without_names():
    """``**options`` takes any, and none of them is missing or written."""

    @register_weighting("open")
    class Open(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.given = options

        def forward(self, statistics, layer):
            return statistics.av

    assert find_weighting("open", layers=3).given == {}
    assert find_weighting({"name": "open", "options": {"anything": 1}}).given == {"anything": 1}


def test_a_module_without_arguments_is_written():
    @register_weighting("bare")
    class Bare(torch.nn.Module):
        def forward(self, statistics, layer):
            return statistics.av

    written = weighting_to_dict(Bare())
    assert written == {"name": "bare", "options": {}}
    assert type(find_weighting(written)) is Bare


# registering


def test_registered_rules_come_back():
    assert register_weighting("mine", Mine) is Mine
    assert register_weighting("plain", plain_rule) is plain_rule
    assert find_weighting({"name": "mine", "options": {"scale": 2.0}}) == Mine(2.0)
    assert find_weighting("plain") is plain_rule
    assert weighting_to_dict(Mine(3.0)) == {"name": "mine", "options": {"scale": 3.0}}
    assert weighting_to_dict(plain_rule) == {"name": "plain", "options": {}}
    instance = Equal()
    register_weighting("an_instance", instance)
    assert find_weighting("an_instance") is instance
    with pytest.raises(ValueError, match="weighting must be without options: 'plain' takes none; got \\['scale'\\]"):
        find_weighting({"name": "plain", "options": {"scale": 2.0}})
    assert {"mine", "plain", "an_instance"} <= set(registered())


def test_as_a_decorator():
    @register_weighting("decorated")
    def decorated(statistics, layer):
        return statistics.sa

    assert find_weighting("decorated") is decorated


def test_what_is_not_registered_is_refused_by_name():
    for rule, name in ((Mine(), "Mine"), (plain_rule, "plain_rule")):
        with pytest.raises(
            ValueError, match=rf"weighting must be registered, .*\('its name', {name}\) makes it known; got {name}"
        ):
            weighting_to_dict(rule)

    class Softer(SoftmaxOverHeads):
        pass

    with pytest.raises(ValueError, match=r"must be registered, .*; got .*Softer"):  # what it adds would be lost
        weighting_to_dict(Softer())


def again(name: str, module: str = __name__) -> type:
    """A class as a cell that runs again makes it: another object under the same name."""
    cls = dataclasses.make_dataclass(name, [("scale", float, 1.0)], namespace={"__call__": lambda self, s, layer: s.av})
    cls.__module__ = module
    return cls


def test_the_same_source_may_register_again():
    first, second = again("Cell"), again("Cell")
    register_weighting("cell", first)
    register_weighting("cell", first)
    register_weighting("cell", second)
    assert type(find_weighting("cell")) is second
    assert weighting_to_dict(second(2.0)) == {"name": "cell", "options": {"scale": 2.0}}
    with pytest.raises(ValueError, match=r"must be registered, .*; got .*Cell"):
        weighting_to_dict(first())
    register_weighting("cell of values", first(2.0))
    register_weighting("cell of values", second(2.0))
    assert type(find_weighting("cell of values")) is second
    register_weighting("slots", Slots(2.0))
    register_weighting("slots", Slots(2.0))
    with pytest.raises(ValueError, match="name must be one that no other weighting has; got 'slots'"):
        register_weighting("slots", Slots(3.0))


def test_another_source_may_not():
    closures = []
    for n in (1.0, 2.0):

        def scaled(statistics, layer, n=n):
            return statistics.av * n + len(closures)

        closures.append(scaled)
    pairs = [
        (again("Cell"), again("Other")),
        (again("Cell"), again("Cell", "elsewhere")),
        (Mine, plain_rule),
        (plain_rule, Mine(1.0)),
        (Mine(1.0), Mine(2.0)),
        (Fixed([1.0]), Equal()),  # of one module
        (lambda statistics, layer: statistics.av, lambda statistics, layer: statistics.sa),
        tuple(closures),
    ]
    for n, (first, second) in enumerate(pairs):
        register_weighting(f"taken {n}", first)
        with pytest.raises(ValueError, match=f"name must be one that no other weighting has; got 'taken {n}'"):
            register_weighting(f"taken {n}", second)
        assert registry._rules[f"taken {n}"] is first
    with pytest.raises(ValueError, match="name must be one that no other weighting has; got 'softmax'"):
        register_weighting("softmax", Mine)


@pytest.mark.parametrize("name", ["", "a:b", None, 3])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="name must be a text without ':'; got"):
        register_weighting(name, Mine)


def test_only_rules_can_be_registered():
    with pytest.raises(TypeError, match=r"weighting must be a callable \(statistics, layer\) -> c"):
        register_weighting("number", 3)
    assert "number" not in registered()


@pytest.mark.parametrize("value", [object(), {1, 2}, math.nan])
def test_options_that_json_has_not(value):
    register_weighting("mine", Mine)
    with pytest.raises(ValueError, match="have options that are values of JSON; got option scale of 'mine'"):
        weighting_to_dict(Mine(value))


def test_options_of_tensors_and_numpy_are_plain():
    numpy = pytest.importorskip("numpy")
    register_weighting("mine", Mine)
    for value in (torch.tensor([1.0, 2.0]), numpy.array([1.0, 2.0])):
        assert weighting_to_dict(Mine(value))["options"] == {"scale": [1.0, 2.0]}
    assert type(weighting_to_dict(Mine(numpy.float32(0.5)))["options"]["scale"]) is float


# files


def test_a_class_in_a_file(rules):
    rule = find_weighting({"name": f"{rules}:Power", "options": {"exponent": 2, "floor": 5.0}})
    assert rule(statistics(), None).tolist() == [[5, 16, 36]]
    written = weighting_to_dict(rule)
    assert written == {"name": f"{rules}:Power", "options": {"exponent": 2, "floor": 5.0}}
    assert find_weighting(written) == rule
    with pytest.raises(ValueError, match=r"must have the option exponent; got .*Power' without"):
        find_weighting(f"{rules}:Power")


def test_functions_and_instances_in_a_file(rules):
    assert find_weighting(f"{rules}:double")(statistics(), None).tolist() == [[2, 2, 2]]
    square = find_weighting(json.dumps({"name": f"{rules}:square"}))
    assert square(statistics(), None).tolist() == [[4, 16, 36]]
    assert weighting_to_dict(square) == {"name": f"{rules}:square", "options": {}}
    with pytest.raises(ValueError, match=r"must be without options: .*double' takes none"):
        find_weighting({"name": f"{rules}:double", "options": {"exponent": 2}})


def test_a_file_runs_once(rules):
    first = find_weighting(f"{rules}:square")
    assert find_weighting(f"{rules}:square") is first
    assert find_weighting(f"{rules.parent}/../{rules.parent.name}/{rules.name}:square") is first


def test_rules_of_a_file_can_be_pickled(rules):
    """By another process too, once it has looked the rule up: the module's name depends on nothing but its place."""
    rule = find_weighting({"name": f"{rules}:Power", "options": {"exponent": 3.0}})
    assert pickle.loads(pickle.dumps(rule)) == rule
    code = (
        "import pickle, sys; from sar_fast.weighting import find_weighting\n"
        f"find_weighting({str(rules) + ':square'!r}); print(pickle.loads(bytes.fromhex(sys.argv[1])).exponent)"
    )
    done = subprocess.run([sys.executable, "-c", code, pickle.dumps(rule).hex()], capture_output=True, text=True)
    assert done.stdout.strip() == "3.0", done.stderr


def test_a_relative_path_means_what_lies_there_now(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rules.py").write_text(f"def rule(statistics, layer):\n    return {folder!r}\n")
    for folder in ("a", "b", "a"):
        monkeypatch.chdir(tmp_path / folder)
        rule = find_weighting("rules.py:rule")
        assert rule(None, None) == folder
        assert weighting_to_dict(rule) == {"name": "rules.py:rule", "options": {}}


@pytest.mark.parametrize("name", ["rules.py:rule", "nowhere/rules.py:rule", ":rule", "softmax:rule", "rules.txt:rule"])
def test_files_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.txt").write_text(RULES)
    with pytest.raises(ValueError, match=r"must be FILE.py:NAME; got .*: no such Python file"):
        find_weighting(name)


def test_names_that_a_file_lacks(rules):
    for name in ("power", ""):
        with pytest.raises(ValueError, match=f"my.rules.py has no {name!r}"):
            find_weighting(f"{rules}:{name}")
    with pytest.raises(TypeError, match=r"must be a rule, a callable or a class of one; got int from .*number'"):
        find_weighting(f"{rules}:number")
    assert f"{rules}:number" not in registered()


@pytest.mark.parametrize("text", ["def rule(:\n", "\0", "# -*- coding: nonsense -*-\n"])
def test_files_that_are_no_python(text, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"weighting: .*broken.py cannot be read as Python; ."):
        find_weighting(f"{path}:rule")


def test_a_file_whose_code_fails_runs_anew(tmp_path):
    """Its own error, and no half of it stays."""
    path = tmp_path / "failing.py"
    path.write_text("rule = 1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            find_weighting(f"{path}:rule")
    path.write_text(RULES)
    assert find_weighting(f"{path}:double")(statistics(), None).tolist() == [[2, 2, 2]]


# installed packages


@pytest.fixture
def installed(monkeypatch):
    """Entry points as packages declare them."""

    def declare(*points: tuple[str, str]) -> None:
        found = EntryPoints(EntryPoint(n, value, "sar_fast.weightings") for n, value in points)
        others = EntryPoints([EntryPoint("mine", f"{__name__}:plain_rule", "console_scripts")])
        every = EntryPoints([*found, *others])
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda **chosen: every.select(**chosen))

    return declare


def test_rules_of_installed_packages(installed):
    installed(("mine", f"{__name__}:Mine"), ("theirs", "no_such_package:Rule"))
    assert {"mine", "theirs", "softmax"} <= set(registered())
    rule = find_weighting({"name": "mine", "options": {"scale": 4.0}})
    assert rule == Mine(4.0)
    assert weighting_to_dict(rule) == {"name": "mine", "options": {"scale": 4.0}}
    with pytest.raises(ImportError, match=r"weighting 'theirs' of .* cannot be imported: .*no_such_package"):
        find_weighting("theirs")
    with pytest.raises(ValueError, match=r"must be one of .*mine.*theirs.*; got 'others'"):
        find_weighting("others")


def test_shipped_rules_are_not_replaced(installed):
    installed(("softmax", f"{__name__}:Mine"))
    assert find_weighting("softmax") == SoftmaxOverHeads()


def test_two_packages_with_one_name(installed):
    installed(("mine", f"{__name__}:Mine"), ("mine", f"{__name__}:plain_rule"))
    with pytest.raises(ValueError, match=r"must be one installed package's; got 'mine' of .*:Mine and .*:plain_rule"):
        find_weighting("mine")
    installed(("mine", f"{__name__}:Mine"), ("mine", f"{__name__}:Mine"))  # one, found in two places
    assert find_weighting("mine") == Mine()


def test_an_entry_point_that_is_no_rule(installed):
    installed(("mine", f"{__name__}:RULES"))
    with pytest.raises(TypeError, match="weighting must be a callable"):
        find_weighting("mine")
