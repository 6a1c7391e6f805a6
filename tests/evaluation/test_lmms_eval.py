"""The lmms-eval model: its options every day, a whole run where lmms-eval is installed."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sar_fast.cli.evaluate import benchmark
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.integrations.lmms_eval.options import cut, generation_options, refuse_unknown
from sar_fast.lab.io.answering import prepare_processor
from sar_fast.lab.io.chat_template import build_prompt
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.weighting import Equal, SoftmaxOverHeads

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, {"num_beams": 1}),
        ({"until": ["\n"], "do_sample": True, "temperature": 0}, {}),  # temperature 0 is greedy
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9, "do_sample": True}),
        ({"do_sample": True, "num_beams": 2}, {"do_sample": True, "num_beams": 2}),
        ({"num_beams": 3, "repetition_penalty": 1.1}, {"num_beams": 3, "repetition_penalty": 1.1}),
        ({"temperature": None, "top_p": None}, {}),
    ],
)
def test_a_tasks_options_as_generate_takes_them(options, expected):
    assert generation_options(options) == expected


def test_an_unknown_option_is_an_error():
    with pytest.raises(ValueError, match="generation_kwargs typical_p: known are do_sample"):
        generation_options({"typical_p": 0.2, "do_sample": True})


def test_an_unknown_model_argument_is_an_error():
    known = ("pretrained", "sar_beta", "unknown")
    refuse_unknown({}, known)
    with pytest.raises(ValueError, match=r"--model_args: sar_betta is unknown; did you mean sar_beta\? known: pretr"):
        refuse_unknown({"sar_betta": 1}, known)


@pytest.fixture
def harness(monkeypatch):
    """The model's class, on stand-ins of the few names that it imports from lmms-eval."""
    base = type("lmms", (), {"__init__": lambda self: None})
    names = {"api.instance": {"Instance": object}, "api.model": {"lmms": base}, "protocol": {"ChatMessages": Chat}}
    for name, content in {"": {}, "api": {}, **names}.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}".rstrip("."), module)
    monkeypatch.delitem(sys.modules, "sar_fast.integrations.lmms_eval.model", raising=False)
    yield importlib.import_module("sar_fast.integrations.lmms_eval.model").SARHuggingFace
    sys.modules.pop("sar_fast.integrations.lmms_eval.model")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": "./nowhere"}, "pretrained './nowhere' is no folder on this machine"),
        ({"pretrained": "{broken}"}, "pretrained '.*' cannot be loaded as an image-text-to-text model"),
        (
            {"pretrained": "{silent}"},
            "pretrained must be one whose chat template can be rendered, or with template; ",
        ),
        ({"dtype": "int8"}, "dtype must be auto, float32"),
        ({"device": "tpu:1"}, "device 'tpu:1' cannot be used here"),
        ({"sar_activation_layer_k": 9}, "sar_activation_layer_k must be at most the number of attention layers, 4; g"),
        ({"sar_activation_layer_k": -1}, "sar_activation_layer_k must be"),
        ({"sar_beta": 0}, "sar_beta must be > 0"),
        ({"sar_decode": "later"}, "sar_decode must be"),
        ({"sar_normalize": "most"}, "sar_normalize must be"),
        ({"sar_prior_source": "x"}, "sar_prior_source must be"),
        ({"sar_backend": "x"}, "sar_backend must be"),
        ({"sar_weighting": "nope"}, "sar_weighting must be one of .*; got 'nope'"),
        ({"sar_weighting": {"name": "softmax", "options": {"beta": 0}}}, "sar_weighting {.*}: beta must be > 0"),
        (
            {"sar_weighting": "equal", "sar_beta": 0.5},
            "sar_weighting must come without options of the paper's rule; got sar_beta",
        ),
        ({"template": "gone.jinja"}, "template must be a Jinja file; .*; got 'gone.jinja'"),
        ({"use_sar": "maybe"}, "--model_args: use_sar"),
        ({"sar_betta": 1}, "--model_args: sar_betta is unknown; did you mean sar_beta"),
    ],
)
def test_errors_name_the_arguments_as_lmms_evals_users_write_them(harness, tmp_path, given, message):
    (tmp_path / "broken").mkdir()
    shutil.copytree(MINIATURE_PATH, tmp_path / "silent")
    (tmp_path / "silent" / "chat_template.jinja").write_text("{{ messages[7].content.x }}")
    places = {name: str(tmp_path / name) for name in ("broken", "silent")}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises((ValueError, TypeError), match="^" + message) as caught:
        harness(**{"pretrained": "miniature", "device": "cpu", "sar_activation_layer_k": 2, **given})
    assert not re.search(r"--(?!model_args)\w", str(caught.value))


def test_a_rule_in_place_of_the_papers(harness):
    """As ``--model_args`` gives it: text, or JSON's values."""
    of = lambda **given: harness(pretrained="miniature", device="cpu", sar_activation_layer_k=2, **given).handle.config
    assert of(sar_weighting="equal").rule == Equal()
    assert of(sar_weighting={"name": "softmax", "options": {"beta": 0.1}}).rule == SoftmaxOverHeads(0.1)
    assert of(sar_beta="0.1", sar_normalize="standardize").rule == SoftmaxOverHeads(0.1, True, "standardize")
    assert of().rule == SoftmaxOverHeads()


def test_a_document_that_the_processor_refuses_is_named(adapter, monkeypatch):
    call = type(adapter.processor).__call__

    def picky(self, images=None, text=None, **options):
        if any(picture.size[0] < 4 for picture in images):
            raise ZeroDivisionError("no patch")
        return call(self, images=images, text=text, **options)

    monkeypatch.setattr(type(adapter.processor), "__call__", picky)
    text = build_prompt(adapter.processor, "What is this?")
    good, narrow = Image.new("RGB", (20, 20)), Image.new("RGB", (2, 20))
    names = ["task t, document 3", "task t, document 4"]
    assert adapter._encode(names, [text, text], [[good], [good]])["input_ids"].shape[0] == 2
    with pytest.raises(ValueError, match="task t, document 4: the processor refuses it: ZeroDivisionError: no patch"):
        adapter._encode(names, [text, text], [[good], [narrow]])


def test_stop_words_cut_the_reply():
    assert cut("yes\nUSER: and this?", ["USER:", "\n"]) == "yes"
    assert cut(" yes ", None) == "yes"
    assert cut("yes. no", "no") == "yes."
    assert cut("yes", [""]) == "yes"


def test_the_entry_point_names_what_is_there():
    (found,) = [e for e in entry_points(group="lmms_eval.models") if e.value.startswith("sar_fast")]
    assert found.value == "sar_fast.integrations.lmms_eval:manifests"
    assert callable(found.load())


class Chat:
    """What the adapter uses of lmms-eval's ``ChatMessages``: a question about one picture."""

    def __init__(self, messages):
        self.picture, self.question = messages

    def extract_media(self):
        return [self.picture], [], []

    def to_hf_messages(self):
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question}]}]


@pytest.fixture
def adapter(harness):
    """The adapter on the miniature."""
    model = object.__new__(harness)
    model.model, model.processor = load_miniature()
    prepare_processor(model.processor)
    return model


def request(model, picture, number=0):
    model.task_dict = {"a": {"test": {number: (picture, "What colour is the circle?")}}}
    return types.SimpleNamespace(args=("", lambda document: document, {"max_new_tokens": 4}, number, "a", "test"))


def test_pictures_of_tasks_are_shown_as_everywhere(adapter, monkeypatch):
    seen = []
    module = sys.modules[type(adapter).__module__]
    encode = module.encode_texts
    monkeypatch.setattr(
        module, "encode_texts", lambda p, pictures, texts: seen.append(pictures) or encode(p, pictures, texts)
    )
    plain = Image.fromarray(np.arange(40 * 24, dtype=np.uint8).reshape(24, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    turned.info["exif"] = exif.tobytes()
    deep = Image.fromarray(np.asarray(plain).astype(np.uint16) * 257)
    replies = [adapter._answer([request(adapter, picture)]) for picture in (plain, turned, deep)]
    assert replies[0] == replies[1] == replies[2]
    assert {(picture.mode, picture.tobytes()) for (picture,) in seen} == {("RGB", plain.convert("RGB").tobytes())}
    with pytest.raises(ValueError, match="task a: a picture of document 7 has no pixels: 0 x 4"):
        adapter._answer([request(adapter, Image.new("RGB", (0, 4)), 7)])


@pytest.mark.slow
def test_lmms_eval_gives_its_own_score_and_ours(tmp_path):
    """Its MME task, prompts and scorer on the drawn pictures: the same replies, the same total."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    model = "pretrained=miniature,sar_activation_layer_k=2,sar_beta=0.1"
    flags = ["--model", "sar_hf", "--model_args", model, "--tasks", "mme_mini", "--batch_size", "8", "--device", "cpu"]
    where = ["--include_path", "experiments/lmms_eval", "--output_path", str(tmp_path / "lmms"), "--log_samples"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "lmms_eval", *flags, *where]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "lmms").rglob("*_results.json")
    (samples,) = (tmp_path / "lmms").rglob("*_samples_mme_mini.jsonl")
    score = json.loads(results.read_text())["results"]["mme_mini"]["mme_perception_score,none"]
    ours = EvaluationArguments(
        model_name_or_path="miniature",
        output_dir=str(tmp_path / "ours"),
        task="mme",
        data_dir=str(ROOT / "experiments/data/benchmarks/mme"),
        use_sar=True,
        sar_activation_layer_k=2,
        sar_beta=0.1,
    )
    assert benchmark.run(ours)["perception"] == pytest.approx(score)
    theirs = {r["doc_id"]: r["filtered_resps"] for r in map(json.loads, samples.read_text().splitlines())}
    mine = {int(r["key"]): r["reply"] for r in map(json.loads, (tmp_path / "ours/samples.jsonl").open())}
    assert theirs == mine


def test_tasks_that_need_another_model_are_errors(adapter):
    with pytest.raises(NotImplementedError, match="loglikelihood needs another model"):
        adapter.loglikelihood([])
    with pytest.raises(NotImplementedError, match="multi-round task needs another model"):
        adapter.generate_until_multi_round([])
