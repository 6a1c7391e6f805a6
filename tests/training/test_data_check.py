"""``sar-fast data check`` on what cannot be read, on what a model refuses, and how little it imports."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from jinja2 import TemplateError
from PIL import Image
from typer.testing import CliRunner

from sar_fast.cli import app
from sar_fast.lab.io.records import RecordError
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.training.encoding import Encoder
from tests.training.runs import train
from tests.training.samples import REPOSITORY, conversation, image_bytes, write_jsonl

HALF = "\ud800"


def command(*words):
    """(exit code, output) of ``sar-fast``."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def turns(question="<image>What?", answer="red"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def pictures(tmp_path):
    """Files: ``good.png`` and ``wide.png`` of 8000 x 2, ``cut.png``, ``text.png``."""
    (tmp_path / "good.png").write_bytes(image_bytes())
    Image.new("RGB", (8000, 2)).save(tmp_path / "wide.png")
    (tmp_path / "cut.png").write_bytes(image_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


@pytest.fixture
def picky(monkeypatch):
    """The miniature's picture processor, which refuses extreme shapes as Qwen2-VL's does."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    kind = type(load_miniature()[1].image_processor)
    plain = kind.preprocess

    def preprocess(self, images, *args, **kwargs):
        for image in images if isinstance(images, list) else [images]:
            smart_resize(*getattr(image, "size", (64, 64)))
        return plain(self, images, *args, **kwargs)

    monkeypatch.setattr(kind, "preprocess", preprocess)


def test_every_bad_record_is_named_and_the_next_is_looked_at(pictures):
    rows = [
        {"id": "fine", "conversations": turns(), "image": "good.png"},
        {"id": "lost", "conversations": turns(), "image": "gone.png"},
        {"id": "cut", "conversations": turns(), "image": "cut.png"},
        {"id": "text", "conversations": turns(), "image": "text.png"},
        {"id": ["a"], "conversations": turns(), "image": "good.png"},
        {"id": "x" * 5000, "conversations": turns(), "image": ""},
        {"id": HALF + "\x1b[2J", "conversations": turns(), "image": "good.png"},
        {"id": "half", "conversations": turns(answer=HALF), "image": "good.png"},
        {"id": "net", "conversations": turns(), "image": "https://host/a.png"},
        {"id": "text64", "conversations": turns(), "image": "iVBORw0KGgo" * 5000},
        {"id": "last", "conversations": turns(), "image": "good.png"},
    ]
    code, output = command("data", "check", write_jsonl(pictures / "rows.jsonl", rows))
    assert code == 1
    for message in (
        "record 1 (id lost): ",
        "gone.png does not exist",
        "record 2 (id cut): ",
        "record 3 (id text): ",
        "text.png cannot be read as a picture: its format is unknown",
        "record 4 (id ['a']): id is list ['a'], needed text or a number",
        "image is the empty path ''",
        "record 6 (id \\ud800\\x1b[2J): id has '\\ud800'",
        "record 7 (id half): turn 2: 'value' has '\\ud800' at character 1",
        "record 8 (id net): image is the URL 'https://host/a.png': nothing is downloaded, give a local file",
        "record 9 (id text64): ",
        "11 records, 2 images, 2 answers; 9 bad",
    ):
        assert message in output, message
    assert max(map(len, output.splitlines())) < 800
    code, output = command("data", "check", pictures / "rows.jsonl", "--json")
    assert (code, len(json.loads(output)["bad"])) == (1, 9)


@pytest.mark.usefixtures("picky", "one_thread")
def test_what_the_models_processor_refuses_is_named_and_the_next_is_looked_at(pictures):
    rows = [{"id": name, "conversations": turns(), "image": f"{name}.png"} for name in ("good", "wide", "good", "cut")]
    path = write_jsonl(pictures / "rows.jsonl", rows)
    code, output = command("data", "check", path, "--model", "miniature")
    assert code == 1
    refusal = "record 1 (id wide): the model's processor refuses pictures of 8000 x 2 pixels with their words: absolute"
    assert refusal in output
    assert "record 3 (id cut): " in output
    assert "4 records, 2 images" in output
    code, output = command("data", "check", path)  # without a model nothing refuses it
    assert (code, "record 1" in output) == (1, False)


@pytest.mark.usefixtures("picky", "one_thread")
def test_a_run_names_the_record_before_it_starts(pictures, tmp_path):
    rows = [{"id": name, "conversations": turns(), "image": f"{name}.png"} for name in ("good", "wide")]
    path = write_jsonl(pictures / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl, record 1 \(id wide\): the model's processor refuses pictures"):
        train(tmp_path / "out", dataset=path)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_the_chat_template_refuses_is_a_bad_record(processor, monkeypatch):
    """A template that raises on purpose, as Gemma's does for a system turn, and one that leaves answers out."""
    record = conversation("What?", "red")
    encoder = Encoder(processor)

    def refuse(*args, **kwargs):
        raise TemplateError("System role not supported")

    monkeypatch.setattr(type(processor), "apply_chat_template", refuse)
    with pytest.raises(RecordError, match="the model's chat template refuses the record: System role not supported"):
        encoder(record)
    monkeypatch.setattr(type(processor), "apply_chat_template", lambda *args, **kwargs: "nothing")
    with pytest.raises(RecordError, match="chat template leaves out answer 1 of 1"):
        encoder(record)


def test_a_missing_package_is_no_bad_record(processor, monkeypatch):
    def lacking(*args, **kwargs):
        raise ImportError("needs torchvision")

    monkeypatch.setattr(type(processor.image_processor), "preprocess", lacking)
    with pytest.raises(ImportError, match="needs torchvision"):
        Encoder(processor)(conversation("What?", "red"))


def test_grounding_rows_that_cannot_be_scored_are_named(pictures):
    Image.new("RGB", (2, 40)).save(pictures / "narrow.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(pictures / "turned.jpg", exif=exif)  # shown as 20 x 40
    deep = io.BytesIO()
    Image.new("I;16", (64, 64), 1).save(deep, format="PNG")
    (pictures / "deep.png").write_bytes(deep.getvalue())
    good = {"image": "good.png", "query": "Where?", "object_prompt": "dog", "bbox": [1, 2, 30, 20]}
    rows = [
        good,
        {**good, "image": "narrow.png", "bbox": [0, 0, 2, 9]},
        {**good, "image": "turned.jpg", "bbox": [0, 25, 20, 40]},
        {**good, "image": "turned.jpg", "bbox": [25, 0, 40, 20]},
        {**good, "image": "gone.png"},
        {**good, "image": "https://host/a.png"},
        {**good, "mask": "deep.png"},
        {**good, "mask": "text.png"},
        {**good, "segmentation": {"size": [64, 64], "counts": [5]}},
        {**good, "query": "Where" + HALF},
        {**good, "id": HALF},
    ]
    code, output = command("data", "check", write_jsonl(pictures / "grounding.jsonl", rows))
    assert code == 1
    for message in (
        "record 1: picture too small for SSIM: needed 3 x 3 pixels or more; got 2 x 40",
        "record 3: box outside the image: [25.0, 0.0, 40.0, 20.0] in 20 x 40",
        "gone.png does not exist",
        "record 5: image is the URL 'https://host/a.png': nothing is downloaded",
        "record 7: unreadable mask: its format is unknown",
        "record 8: unreadable mask: run lengths make up 5 pixels",
        "record 9: query has '\\ud800' at character 6",
        "record 10: id has '\\ud800' at character 1",
        "11 records, 3 images, 3 boxes, 1 masks; 8 bad",
    ):
        assert message in output, (message, output)
    for good_one in (0, 2, 6):
        assert f"record {good_one}:" not in output


def test_a_media_dir_that_is_none_is_an_error_at_once(pictures):
    path = write_jsonl(pictures / "rows.jsonl", [{"conversations": turns(), "image": "good.png"}] * 3)
    code, output = command("data", "check", path, "--media-dir", pictures / "nowhere")
    assert (code, "--media_dir must be a folder; got " in output) == (2, True), output


NO_PACKAGE = "import sys, types; package = types.ModuleType('sar_fast'); package.__path__ = [sys.argv[1]]; "
NO_PACKAGE += "sys.modules['sar_fast'] = package; "  # the package's own imports are not what is looked at


@pytest.mark.parametrize("name", ["shapes_llava.json", "shapes_grounding.parquet"])
def test_looking_at_records_imports_nothing_of_models(name):
    """A second, not ten: neither torch nor what evaluations and trainings need."""
    code = "from sar_fast.cli.data import _check, _entry, summary; from pathlib import Path; path = Path(sys.argv[2]); "
    code += "found = summary(_check(path, _entry(path, None), path.parent, None)); "
    code += "print(len(found['bad']), [n for n in sys.argv[3:] if n in sys.modules])"
    heavy = ["torch", "transformers", "datasets", "accelerate", "skimage", "scipy", "matplotlib"]
    words = [REPOSITORY / "sar_fast", REPOSITORY / "experiments" / "data" / name, *heavy]
    stub = "from importlib import import_module; cli = types.ModuleType('sar_fast.cli'); "
    stub += "cli.__path__ = [sys.argv[1] + '/cli']; sys.modules['sar_fast.cli'] = cli; "
    done = subprocess.run(
        [sys.executable, "-c", NO_PACKAGE + stub + code, *map(str, words)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "0 []", done.stderr
