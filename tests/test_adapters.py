"""Adapters open like models: what PEFT itself computes, wherever the base is; and one line for each broken one."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sar_fast import SARConfig
from sar_fast.lab.io.adapters import CONFIG
from sar_fast.lab.io.model_errors import FLAGS, ModelError
from sar_fast.lab.io.model_source import MINIATURE_PATH, ModelSource
from sar_fast.lab.io.models import find_model, load_model, load_processor, load_whole
from tests.adapters import TARGETS, base_model, logits, lora, write_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

SAR = SARConfig(activation_layer_k=2, beta=0.1)
WEIGHTS = "adapter_model.safetensors"
KINDS = {
    "lora": lambda: lora(),
    "suffixes": lambda: lora(target_modules=["q_proj", "up_proj"], use_rslora=True, bias="lora_only"),
    "everywhere": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(use_dora=True),
    "modules_to_save": lambda: lora(modules_to_save=["multi_modal_projector"]),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "tokens": lambda: lora(trainable_token_indices=[7, 8]),
    "ranks": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=2),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def own(adapter, tmp_path):
    """A copy of the adapter that a test may break."""
    return shutil.copytree(adapter, tmp_path / "adapter")


def rewrite(folder, **changes):
    """Other values in an adapter's configuration; None takes one out."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def reweigh(folder, change):
    """``change`` on the adapter's weights by name."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def opens(folder, base=None):
    return load_model(find_model(str(folder), base), "cpu", "float32")[0]


@pytest.mark.everyday(kind=["lora", "modules_to_save", "embedding", "ia3"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_that_of_peft_by_hand(tmp_path, kind):
    folder = write_adapter(tmp_path / kind, KINDS[kind]())
    by_hand = peft.PeftModel.from_pretrained(base_model(), folder).eval()
    model = opens(folder)
    for config in (None, SAR):
        answer = logits(model, config)
        assert torch.equal(answer, logits(by_hand, config))
        assert not torch.allclose(answer, logits(base_model(), config), atol=1e-3)
    assert not torch.equal(logits(model), logits(model, SAR))


def test_names_of_an_older_transformers_are_understood(own):
    """Before 5, a model's language model came first in the names of its layers."""
    expected = logits(opens(own))
    reweigh(own, lambda weights: [weights.update({_older(name): weights.pop(name)}) for name in list(weights)])
    assert torch.equal(logits(opens(own)), expected)


def _older(name):
    return name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")


def test_a_pickle_is_read(own):
    expected = logits(opens(own))
    torch.save(load_file(own / WEIGHTS), own / "adapter_model.bin")
    (own / WEIGHTS).unlink()
    assert torch.equal(logits(opens(own)), expected)


def test_where_the_base_is(own, tmp_path, monkeypatch):
    shutil.copytree(MINIATURE_PATH, tmp_path / "models" / "base")
    absolute = str(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    for recorded, expected in (
        (absolute, absolute),
        ("models/base", absolute),
        ("./models/base", absolute),
        ("../models/base", absolute),  # from the adapter's folder
        ("miniature", str(MINIATURE_PATH)),
        ("/opt/python/site-packages/sar_fast/assets/miniature", str(MINIATURE_PATH)),
        ("someone/some-model", "someone/some-model"),
    ):
        rewrite(own, base_model_name_or_path=recorded)
        assert find_model(str(own)).weights == expected
    rewrite(own, base_model_name_or_path="/gone/base")
    assert find_model(str(own), "models/base").weights == absolute
    assert find_model("adapter", "miniature").is_miniature


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ("/gone/base", "--model_name_or_path '.*' is an adapter on '/gone/base', which is no folder .* --base_model$"),
        ("./gone", "is an adapter on './gone', which is no folder on this machine: say where it is with --base_model"),
        (None, "is an adapter that does not say on which model .*: name it with --base_model"),
        (7, r"\(base_model_name_or_path is 7\): name it with --base_model"),
    ],
)
def test_a_base_that_is_not_there(own, recorded, message):
    rewrite(own, base_model_name_or_path=recorded)
    with pytest.raises(ModelError) as caught:
        find_model(str(own))
    line = caught.value.worded(**FLAGS)
    assert "\n" not in line
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)


def test_bases_that_are_none(own, tmp_path):
    with pytest.raises(
        ModelError, match=r"base_model 'miniature' has no effect on model 'miniature', which is no adapter"
    ):
        find_model("miniature", "miniature")
    with pytest.raises(ModelError, match=r"base_model '.*' is no folder on this machine"):
        find_model(str(own), str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"base_model '.*/adapter' of model '.*' is an adapter itself"):
        find_model(str(own), str(own))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"\(an adapter on '.*/empty'\) cannot be loaded .* say where with base_model"):
        opens(own, str(empty))


def test_the_processor_is_the_adapters_else_the_bases(own):
    own_template = "{# of the adapter #}" + (own / "chat_template.jinja").read_text()
    (own / "chat_template.jinja").write_text(own_template)
    assert load_processor(find_model(str(own))).chat_template == own_template
    for file in ("processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (own / file).unlink()
    shipped = load_processor(find_model("miniature"))
    assert load_processor(find_model(str(own))).chat_template == shipped.chat_template
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE_PATH)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(own)
    assert len(load_processor(find_model(str(own))).tokenizer) == len(shipped.tokenizer) + 1


LAYER = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
BROKEN_WEIGHTS = {
    "missing": (lambda w: w.pop(f"{LAYER}.lora_B.weight"), rf"{LAYER}.lora_B.weight is not in the adapter"),
    "left over": (
        lambda w: w.update(zebra=torch.zeros(2)),
        "no place for zebra; 1 of the adapter's weights are left over",
    ),
    "nan": (lambda w: w[f"{LAYER}.lora_A.weight"].fill_(float("nan")), "or not finite; 1 weights in all"),
    "empty": (lambda w: w.clear(), "is not in the adapter, or not finite; 24 weights in all"),
    "shape": (
        lambda w: w.update({f"{LAYER}.lora_A.weight": torch.zeros(2, 128)}),
        r"size mismatch for .*q_proj.*\[2, 128\].*\[4, 128\]",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_WEIGHTS)
def test_weights_that_do_not_fit(own, kind):
    change, message = BROKEN_WEIGHTS[kind]
    reweigh(own, change)
    with pytest.raises(
        ModelError, match=r"model '.*' \(an adapter on 'miniature'\) does not fit: .*" + message
    ) as caught:
        opens(own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["modules_to_save", "dora", "tokens"])
def test_every_kind_of_weight_is_missed(tmp_path, kind):
    folder = write_adapter(tmp_path / kind, KINDS[kind]())
    part = {"modules_to_save": "multi_modal_projector.linear_1.bias", "dora": "magnitude", "tokens": "token_adapter"}[
        kind
    ]
    reweigh(folder, lambda weights: weights.pop(next(name for name in weights if part in name)))
    with pytest.raises(ModelError, match=part):
        opens(folder)


def test_other_ranks_and_architectures(own, tmp_path):
    rewrite(own, r=8)
    with pytest.raises(ModelError, match=r"does not fit: size mismatch for .*\[4, 128\].*\[8, 128\]"):
        opens(own)
    rewrite(own, r=4, target_modules=["query_key_value"])
    with pytest.raises(ModelError, match=r"does not fit: Target modules .*query_key_value"):
        opens(own)
    base = tmp_path / "deeper"
    config = base_model().config
    config.text_config.num_hidden_layers = 3
    type(base_model())(config).save_pretrained(base)
    rewrite(own, target_modules=TARGETS)
    with pytest.raises(
        ModelError, match=r"\(an adapter on '.*deeper'\) does not fit: the model has no place for .*\.3\."
    ):
        opens(own, str(base))


BROKEN_FOLDERS = {
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:1000]), "does not fit: .*header"),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        "is an adapter without weights: it has no adapter_model.safetensors",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), "has adapter_model.safetensors but no adapter_config.json"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json: Expecting property name"),
    "a list": (
        lambda f: (f / CONFIG).write_text("[]"),
        "is no adapter that PEFT knows: adapter_config.json: holds list",
    ),
    "no kind": (lambda f: rewrite(f, peft_type=None), "peft_type is None"),
    "no known kind": (lambda f: rewrite(f, peft_type="ZEBRA"), "peft_type is 'ZEBRA'"),
    "kinds": (lambda f: rewrite(f, peft_type=["LORA"]), r"peft_type is \['LORA'\]"),
    "no rank": (lambda f: rewrite(f, r="four"), "does not fit: .*"),
    "alora": (lambda f: rewrite(f, alora_invocation_tokens=[7]), "depends on the prompt's words"),
    "whole": (
        lambda f: shutil.copy(MINIATURE_PATH / "model.safetensors", f),
        r"holds a whole model \(model.safetensors\) and an adapter \(adapter_config.json\)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_FOLDERS)
def test_broken_folders(own, kind):
    breaking, message = BROKEN_FOLDERS[kind]
    breaking(own)
    with pytest.raises(ModelError, match=message) as caught:
        opens(own)
    assert "\n" not in str(caught.value)


def test_learned_prompts_are_refused(tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    folder = write_adapter(tmp_path / "prompt", config)
    with pytest.raises(ModelError, match="is a PROMPT_TUNING adapter that puts learned tokens before the prompt"):
        find_model(str(folder))


def test_without_peft_the_extra_is_named(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"is an adapter, which needs peft: pip install 'sar_fast\[train\]'"):
        find_model(str(adapter))
    assert find_model("miniature").adapter is None


def test_whole_models_with_braces_in_their_names(tmp_path):
    folder = tmp_path / "{model}"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"'.*/\{model\}' cannot be loaded"):
        opens(folder)


def test_a_hub_id_is_asked_once_and_without_waiting(monkeypatch, own):
    """Offline a whole model's name costs nothing here; an adapter of the hub is found by its configuration."""
    from sar_fast.lab.io import adapters

    asked = []

    def exists(repository, name):
        asked.append((repository, name))
        if repository == "no/network":
            raise ConnectionError
        return repository == "an/adapter"

    monkeypatch.setattr("huggingface_hub.file_exists", exists)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(own / name))
    adapters._hub_file.cache_clear()
    assert find_model("no/network").adapter is None
    assert find_model("a/model").adapter is None
    assert find_model("a/model").weights == "a/model"
    source = find_model("an/adapter")
    assert (source.adapter, source.is_miniature) == ("an/adapter", True)
    assert asked == [(name, CONFIG) for name in ("no/network", "a/model", "an/adapter")]
    adapters._hub_file.cache_clear()


def test_an_adapter_that_the_hub_did_not_tell_of_is_no_whole_model(own):
    """The hub fails when it is asked and answers when weights are read: transformers would take the adapter in."""
    with pytest.raises(ModelError, match="is an adapter, which the hub did not say"):
        load_whole(ModelSource("some/adapter", str(own)), torch.float32)


def test_too_little_memory_is_not_called_a_broken_adapter(own, monkeypatch):
    from peft import PeftModel

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PeftModel, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"^no room$"):
        opens(own)
