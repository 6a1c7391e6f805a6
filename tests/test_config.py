"""SARConfig: defaults, validation, and round trips."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import yaml

from sar_fast import SARConfig
from sar_fast.base import json_text
from sar_fast.weighting import Entropy, Equal, Fixed, SoftmaxOverHeads


def test_defaults_are_those_of_the_method():
    config = SARConfig()
    assert (config.activation_layer_k, config.beta, config.protect_first_head) == (10, 0.5, True)
    assert (config.normalize, config.text_queries, config.prior_source) == ("none", "after_last_image", "vision_layer")
    assert (config.decode, config.sav_grad, config.backend, config.record) == ("running", False, "auto", False)


EVERY_FIELD_CHANGED = {
    "activation_layer_k": 3,
    "beta": 0.125,
    "protect_first_head": False,
    "normalize": "standardize",
    "text_queries": "after_first_image",
    "prior_source": "projected",
    "decode": "step",
    "sav_grad": True,
    "backend": "torch",
    "record": True,
    "record_rows": "last_text",
}


def test_every_field_round_trips():
    config = SARConfig(**EVERY_FIELD_CHANGED)
    default = SARConfig()
    assert {f.name for f in dataclasses.fields(SARConfig)} == {*EVERY_FIELD_CHANGED, "weighting", "row_statistics"}
    assert all(getattr(config, name) != getattr(default, name) for name in EVERY_FIELD_CHANGED)
    assert config.to_dict() == EVERY_FIELD_CHANGED
    assert SARConfig.from_dict(config.to_dict()) == config
    assert SARConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == EVERY_FIELD_CHANGED


@pytest.mark.parametrize("beta", [1e-8, 1, 1e30, float("inf"), np.float32(0.1), np.float64(2), np.int32(3)])
def test_temperatures_that_are_allowed_round_trip(beta):
    config = SARConfig(beta=beta)
    assert config.beta == beta
    assert SARConfig.from_json(config.to_json()) == config
    assert SARConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_values_of_numpy_become_pythons():
    given = {"activation_layer_k": np.int64(3), "beta": np.float16(0.5), "normalize": np.str_("standardize")}
    config = SARConfig(**given)
    assert [type(getattr(config, name)) for name in given] == [int, float, str]
    assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()


def test_what_is_no_configuration_is_named():
    with pytest.raises(ValueError, match=r"beta must be > 0 .*got nan"):
        SARConfig.from_json('{"beta": NaN}')
    with pytest.raises(ValueError, match=r"text must be JSON; got 'beta: 1' .Expecting value"):
        SARConfig.from_json("beta: 1")
    with pytest.raises(TypeError, match="values must be a dict of SARConfig fields; got list"):
        SARConfig.from_json("[1]")
    with pytest.raises(ValueError, match=r"values must hold fields of SARConfig, .*; got \[1, 'x'\]"):
        SARConfig.from_dict({"x": 1, 1: 2})
    with pytest.raises(ValueError, match=r"backend must be one of 'auto'.*got array"):
        SARConfig(backend=np.array(["auto", "torch"]))


def test_json_text_is_strict():
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    values = {"Infinity": [math.inf, -math.inf, 0.5], "text": 'NaN, "Infinity" and \\"', "none": None}
    assert json.loads(json_text.dumps(values, indent=2), parse_constant=refuse) == values
    with pytest.raises(ValueError, match="NaN, which JSON cannot hold"):
        json_text.dumps({"loss": [math.nan]})


def test_a_dict_may_name_some_fields():
    assert SARConfig.from_dict({"beta": 2.0}) == SARConfig(beta=2.0)


def test_replace_validates_and_leaves_the_original_alone():
    config = SARConfig()
    assert config.replace(beta=2.0, activation_layer_k=0) == SARConfig(beta=2.0, activation_layer_k=0)
    assert config == SARConfig()
    with pytest.raises(ValueError, match=r"beta must be > 0"):
        config.replace(beta=-1.0)
    with pytest.raises(TypeError, match="no_such_field"):
        config.replace(no_such_field=1)


def test_it_is_immutable_and_hashable():
    config = SARConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 1.0
    assert hash(config) == hash(SARConfig())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beta": 0}, ValueError, r"beta must be > 0 .*got 0"),
        ({"beta": -0.5}, ValueError, r"beta must be > 0 .*got -0.5"),
        ({"beta": float("nan")}, ValueError, r"beta must be > 0 .*got nan"),
        ({"beta": "0.5"}, TypeError, r"beta must be a number; got str"),
        ({"beta": True}, TypeError, r"beta must be a number; got bool"),
        ({"activation_layer_k": -1}, ValueError, r"activation_layer_k must be >= 0; got -1"),
        ({"activation_layer_k": 2.0}, TypeError, r"activation_layer_k must be an int; got float"),
        ({"activation_layer_k": True}, TypeError, r"activation_layer_k must be an int; got bool"),
        ({"protect_first_head": 1}, TypeError, r"protect_first_head must be a bool; got int"),
        ({"sav_grad": None}, TypeError, r"sav_grad must be a bool; got NoneType"),
        ({"record": "yes"}, TypeError, r"record must be a bool; got str"),
        ({"normalize": "l2"}, ValueError, r"normalize must be one of 'none', 'standardize'; got 'l2'"),
        ({"text_queries": "all"}, ValueError, r"text_queries must be one of 'after_last_image', .*; got 'all'"),
        ({"prior_source": "clip"}, ValueError, r"prior_source must be one of 'vision_layer', .*; got 'clip'"),
        ({"decode": "frozen"}, ValueError, r"decode must be one of 'running', 'step', 'prompt'; got 'frozen'"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto', .*; got 'cuda'"),
        ({"record_rows": "all"}, ValueError, r"record_rows must be one of 'none', 'last_text'; got 'all'"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_wrong_values(changes, error, message):
    with pytest.raises(error, match=message):
        SARConfig(**changes)
    with pytest.raises(error, match=message):
        SARConfig.from_dict(changes)


def test_unknown_fields_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"values must hold fields of SARConfig, .*'beta'.*; got \['K', 'temperature'\]"
    ):
        SARConfig.from_dict({"temperature": 0.5, "K": 3})
    with pytest.raises(ValueError, match=r"values must hold fields of SARConfig, .*; got \['temperature'\]"):
        SARConfig.from_json('{"temperature": 0.5}')


def test_a_weighting_takes_the_place_of_the_papers_options():
    config = SARConfig(beta=0.25).replace(weighting=Fixed([1.0, 0.5]))
    assert (config.beta, config.protect_first_head, config.normalize) == (None, None, None)
    assert config.rule is config.weighting
    assert SARConfig.from_json(config.to_json()) == config
    assert config.to_dict()["weighting"] == {"name": "fixed", "options": {"c": [1.0, 0.5], "per_layer": None}}
    assert config.replace(weighting=None) == SARConfig()
    assert SARConfig(beta=0.25).rule == SoftmaxOverHeads(0.25)
    with pytest.raises(ValueError, match="weighting must come without beta"):
        config.replace(beta=1.0)


def test_a_rule_that_has_no_name_cannot_be_written():
    config = SARConfig(weighting=lambda statistics, layer: statistics.sav)
    with pytest.raises(ValueError, match="must be registered, so that it can be written by name"):
        config.to_dict()


def test_a_rule_that_cannot_be_pickled_says_so():
    config = SARConfig(weighting=lambda statistics, layer: statistics.sav)
    with pytest.raises(pickle.PicklingError, match=r"weighting: .*lambda.* cannot be pickled .*; define it at the top"):
        pickle.dumps(config)
    assert copy.deepcopy(config) == config  # a copy of a model needs no pickle
    for rule in (Fixed([1.0]), SoftmaxOverHeads(0.25), Equal()):
        assert pickle.loads(pickle.dumps(SARConfig(weighting=rule))).weighting == rule


def test_row_statistics_are_kept_by_name():
    config = SARConfig(record=True, row_statistics=["mass", Entropy()])
    assert [s.name for s in config.row_statistics] == ["mass", "entropy"]
    with pytest.raises(ValueError, match=r"row_statistics must be one of .*, to be written by name; got Entropy"):
        config.to_dict()
    named = SARConfig(record=True, row_statistics=("mass", "score_sum"))
    assert SARConfig.from_json(named.to_json()) == named
    with pytest.raises(ValueError, match="row_statistics must come with record=True"):
        SARConfig(row_statistics=("mass",))
    with pytest.raises(ValueError, match=r"row_statistics must be one of mass, entropy.*; got 'sink'"):
        SARConfig(record=True, row_statistics=("sink",))
    with pytest.raises(TypeError, match="row_statistics must be a tuple of names or RowStatistic; got str"):
        SARConfig(record=True, row_statistics="mass")
