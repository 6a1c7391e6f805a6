"""Plug-ins for training stacks, without the stacks: stand-ins of the few names that they use of them."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from sar_fast import SARConfig
from sar_fast.hf.features import handle_of
from sar_fast.integrations.options import config_of
from tests.hf.tiny import llava

REPOSITORY = Path(__file__).parents[1]
STACKS = ("trl", "swift", "axolotl", "unsloth", "llamafactory", "lmms_engine")
PLUGINS = ("sar_fast.integrations.ms_swift", "sar_fast.integrations.axolotl")


def stand_in(monkeypatch, name, **contents):
    """A module ``name``, its packages, and nothing of any plug-in imported before."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    vars(sys.modules[name]).update(contents)


@pytest.fixture
def swift(monkeypatch):
    """Our plug-in, as ms-swift imports it, and the registry that it found."""
    registry = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=registry)
    monkeypatch.delitem(sys.modules, PLUGINS[0], raising=False)
    yield importlib.import_module(PLUGINS[0]), registry
    sys.modules.pop(PLUGINS[0])


@pytest.fixture
def axolotl(monkeypatch):
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    monkeypatch.delitem(sys.modules, PLUGINS[1], raising=False)
    yield importlib.import_module(PLUGINS[1])
    sys.modules.pop(PLUGINS[1])


class Template:
    """ms-swift's, as far as the plug-in knows it: it merges pictures in front of the model."""

    sequence_parallel_size = 1

    def _post_encode(self, model, inputs):
        return {"inputs_embeds": None}


def trainer(**changes):
    template = Template()
    vars(template).update(changes)
    return types.SimpleNamespace(template=template)


# ms-swift


def test_swift_callback_puts_sar_on_the_model(swift, monkeypatch):
    plugin, registry = swift
    assert registry == {"sar": plugin.SwiftSARCallback}
    for name, text in {"SAR_BETA": "1e-05", "SAR_ACTIVATION_LAYER_K": "2", "SAR_SAV_GRAD": "True"}.items():
        monkeypatch.setenv(name, text)  # as --model_kwargs leaves them
    runs, model = trainer(), llava()
    registry["sar"](None, runs).on_init_end(None, None, None, model=model)
    assert handle_of(model.base_model).config == SARConfig(activation_layer_k=2, beta=1e-5, sav_grad=True)
    inputs = {"input_ids": torch.zeros(1, 1), "pixel_values": torch.zeros(1)}
    assert runs.template._post_encode(model, inputs) is inputs


def test_swift_options_of_the_environment(swift):
    read = swift[0].read_options
    assert read({"PATH": "x", "SAR_NORMALIZE": "standardize", "SAR_WEIGHTING": "{'name': 'equal'}"}) == {
        "normalize": "standardize",
        "weighting": {"name": "equal"},
    }
    with pytest.raises(ValueError, match=r"^SAR_BETTA sets no option of SAR; did you mean SAR_BETA\? known: SAR_ACT"):
        read({"SAR_BETTA": "1"})


@pytest.mark.parametrize(
    ("text", "error"), [("-1", r"^SAR_BETA must be > 0"), ("none", r"^SAR_BETA must be"), ("[1]", r"^SAR_BETA must be")]
)
def test_a_bad_swift_option_is_named_as_it_was_given(swift, monkeypatch, text, error):
    monkeypatch.setenv("SAR_BETA", text)
    with pytest.raises((ValueError, TypeError), match=error):
        swift[0].SwiftSARCallback(None, trainer()).on_init_end(None, None, None, model=llava())


def test_swift_sequence_parallelism_is_refused(swift):
    with pytest.raises(ValueError, match="sequence_parallel_size must be 1 with SAR; got 2"):
        swift[0].SwiftSARCallback(None, trainer(sequence_parallel_size=2))


# Axolotl


class Keys(dict):
    """Axolotl's configuration: a key that is not there is None."""

    def __getattr__(self, name):
        return self.get(name)

    __getitem__ = __getattr__


def test_axolotl_plugin_puts_sar_on_the_model(axolotl):
    plugin, model = axolotl.SARPlugin(), llava()
    module, name = plugin.get_input_args().rsplit(".", 1)
    arguments = getattr(importlib.import_module(module), name)
    keys = arguments(base_model="x", sar_activation_layer_k=2, sar_normalize="standardize").model_dump()
    plugin.post_model_load(Keys(keys), model)
    assert handle_of(model.base_model).config == SARConfig(activation_layer_k=2, normalize="standardize")


def test_axolotl_plugin_can_be_switched_off(axolotl):
    model = llava()
    axolotl.SARPlugin().post_model_load(Keys(axolotl.SARArgs(use_sar=False).model_dump()), model)
    assert handle_of(model.base_model) is None


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"sar_betta": 1}, "sar_betta: no option of SAR; known: use_sar, sar_activation_layer_k"),
        ({"sar_normalize": "zscore"}, "sar_normalize"),
        ({"context_parallel_size": 2}, "context_parallel_size must be 1 with SAR; got 2"),
    ],
)
def test_axolotl_refuses_keys_before_a_model_is_loaded(axolotl, keys, error):
    with pytest.raises(ValueError, match=error):
        axolotl.SARArgs(**keys)


def test_axolotl_splits_sequences_without_sar(axolotl):
    assert not axolotl.SARArgs(use_sar=False, context_parallel_size=2).use_sar


def test_a_bad_axolotl_value_is_named_as_its_key(axolotl):
    with pytest.raises(ValueError, match=r"^sar_beta must be > 0"):
        axolotl.SARPlugin().post_model_load(Keys(use_sar=True, sar_beta=-1.0), llava())


# all


def test_a_rule_gets_the_sizes_of_the_model():
    config = config_of({"weighting": {"name": "head_scales"}}, {"weighting": "key"}, llava().config)
    assert sum(p.numel() for p in config.weighting.parameters()) == 16


@pytest.mark.slow
def test_the_library_imports_no_training_stack():
    script = """
import importlib, pkgutil, sys, sar_fast
for module in pkgutil.walk_packages(sar_fast.__path__, "sar_fast."):
    own = module.name.startswith("sar_fast.integrations.") and not module.name.startswith("sar_fast.hf")
    if not own and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(sorted({name.split(".")[0] for name in sys.modules}))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    imported = eval(ended.stdout.splitlines()[-1])
    assert "sar_fast" in imported
    assert not set(STACKS) & set(imported)
