"""Python blocks of README and documents run as they stand, but for names of models that are replaced by small ones.

docs/weighting.md and docs/row_statistics.md are run by tests/test_docs_weighting.py, which looks at what they leave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from PIL import Image

import sar_fast
from sar_fast import SARAttention, SARConfig, apply_sar, sar_attn_func
from sar_fast.lab.focus import GroundingSample
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.measure.timing import attention_inputs
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.drawing import draw_scene
from sar_fast.lab.miniature.questions import build_prompt
from sar_fast.weighting import HeadScales
from tests.test_docs_weighting import ROOT, blocks

pytestmark = pytest.mark.usefixtures("one_thread", "own_rules")

DATA = ROOT / "experiments" / "data"
ELSEWHERE = {"docs/weighting.md", "docs/row_statistics.md"}
SMALL = {"activation_layer_k=10": "activation_layer_k=4"}


@dataclasses.dataclass(frozen=True)
class Page:
    """What a page takes for granted: names, and what stands in it for something larger or left out."""

    names: Callable[[], dict[str, Any]]
    replaced: dict[str, str] = dataclasses.field(default_factory=dict)


def call() -> dict[str, Any]:
    q, k, v, visual, text, prior = attention_inputs(64, 24, torch.float32, heads=4, kv_heads=2, head_dim=8, batch=2)
    return {"q": q, "k": k, "v": v, "visual_mask": visual, "text_mask": text, "prior": prior}


def model() -> dict[str, Any]:
    loaded, processor = load_miniature()
    scene = draw_scene(np.random.default_rng(0), background="plain")
    words = [build_prompt("What colour is the circle?")]
    inputs = dict(processor(images=[scene.image], text=words, padding=True, return_tensors="pt"))
    return {"model": loaded, "processor": processor, "inputs": inputs, "scene": scene}


def readme() -> dict[str, Any]:
    found = model()
    picture = Image.fromarray(found["scene"].image)
    return {**found, **call(), "layer": model()["model"].model.language_model.layers[0], "picture": picture}


def kernels() -> dict[str, Any]:
    found = call()
    found = {n: x.half() if n in "qkv" else x for n, x in found.items()}
    return {**found, "D": 8, "dout": torch.ones_like(found["q"])}


def laboratory() -> dict[str, Any]:
    """A photograph, records, and as many samples as a probe needs in place of the page's one."""
    found = model()
    picture = Image.fromarray(found["scene"].image)
    picture.save("photo.jpg")
    rng = np.random.default_rng(0)
    asked = []
    for number in range(16):
        scene = draw_scene(rng, background="plain")
        picture, (first, *_) = Image.fromarray(scene.image), scene.objects
        asked.append(
            GroundingSample(
                str(number), picture, f"Where is the {first.shape}?", first.shape, first.box, label=first.shape
            )
        )
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "circle"}]
    return {"picture": picture, "samples_here": asked, "records": [{"conversations": turns, "image": picture}] * 4}


def trainer() -> dict[str, Any]:
    found = model()
    made = transformers.Trainer(found["model"], transformers.TrainingArguments("out", report_to=[], use_cpu=True))
    return {**found, "Trainer": lambda *_, callbacks: [made.add_callback(c) for c in callbacks], "trainer": made}


def training() -> dict[str, Any]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    found = trainer()
    ids = found["inputs"]["input_ids"]
    return {
        **found,
        **{"apply_sar": apply_sar, "SARConfig": SARConfig, "HeadScales": HeadScales, "torch": torch},
        **{"sar_fast": sar_fast, "folder": ".", "batch": found["inputs"], "labels": ids, "answer_tokens": ids.numel()},
        **{"config": SARConfig(activation_layer_k=2), "group": dist.group.WORLD},
    }


def libraries() -> dict[str, Any]:
    found = call()
    mine = type("Mine", (), {"name": "mine"})
    return {
        **found,
        **{"visual": found["visual_mask"], "text": found["text_mask"], "sar_attn_func": sar_attn_func},
        **{"SARConfig": SARConfig, "MyAttention": mine},
    }


def pictures() -> dict[str, Any]:
    Image.new("RGB", (8, 6)).save("photo.jpg")
    Image.new("L", (8, 6), 255).save("object.png")
    return {}


PAGES = {
    "README.md": Page(
        readme,
        {
            **SMALL,
            '"llava-hf/llava-1.5-7b-hf"': repr(str(MINIATURE_PATH)),
            "stats[31]": "stats[3]",
            "rows[31]": "rows[3]",
            "record=True, ": "activation_layer_k=2, record=True, ",
            '"experiments/data/': f'"{DATA}/',
        },
    ),
    "kernels/README.md": Page(kernels),
    "docs/integrations.md": Page(trainer, SMALL),
    "docs/laboratory.md": Page(
        laboratory,
        {
            '"experiments/data/': f'"{DATA}/',
            ', "mme", ': ', "mme", max_samples=4, ',
            "sar=SARConfig()": "sar=SARConfig(activation_layer_k=2)",
            'samples = [GroundingSample("0", picture, "What is the dog doing?", "dog", bbox=(40, 60, 210, 300))]': (
                "samples = samples_here"
            ),
            "epochs=40": "epochs=2",
            '"max_steps": 500, "per_device_train_batch_size": 4': (
                '"max_steps": 2, "use_cpu": True, "report_to": [], "logging_steps": 1'
            ),
        },
    ),
    "docs/libraries.md": Page(
        libraries,
        {
            "sar_attn_func(..., backend=": "sar_attn_func(q, k, v, visual, text, prior, backend=",
            '"composed:torch-fa2"': '"composed"',  # without a GPU the library is torch's own
        },
    ),
    "docs/masks.md": Page(dict, {"B, S = 2, 700": "B, S = 1, 600"}),
    "docs/pictures.md": Page(pictures),
    "docs/training.md": Page(training, {**SMALL, "(layers=32, heads=32)": "(layers=4, heads=8)"}),
}


@pytest.fixture
def _process_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def _tasks(monkeypatch):
    from sar_fast.lab.benchmark.tasks import registry

    monkeypatch.setattr(registry, "_tasks", dict(registry._tasks))


@pytest.fixture
def _providers(monkeypatch):
    from sar_fast.backends import select

    monkeypatch.setattr(select, "PROVIDERS", dict(select.PROVIDERS))
    before = dict(select.BY_NAME)
    yield
    select.BY_NAME.clear()
    select.BY_NAME.update(before)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("_process_group", "_providers", "_tasks")
def test_python_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given, sources = PAGES[page], blocks(page)
    for old in given.replaced:
        assert any(old in source for source in sources), f"{page} no longer has {old!r}"
    names = given.names()
    for number, source in enumerate(sources):
        for old, new in given.replaced.items():
            source = source.replace(old, new)
        exec(compile(source, f"{page}, block {number}", "exec"), names)
        if isinstance(names.get("handle"), sar_fast.SARHandle):
            names["handle"].remove()
    if page == "README.md":
        assert isinstance(names["layer"].self_attn, SARAttention)


def test_every_page_with_python_is_run():
    pages = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    with_python = {p.relative_to(ROOT).as_posix() for p in pages if "```python\n" in p.read_text(encoding="utf-8")}
    assert with_python == PAGES.keys() | ELSEWHERE
