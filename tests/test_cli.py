"""The command line on the shipped miniature: what is printed, what is written, and one-line errors with exit code 2."""

from __future__ import annotations

import base64
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sar_fast import __version__
from sar_fast.cli import app, loading
from sar_fast.lab.io.chat_template import build_prompt
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.drawing import draw_scene

QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture that is not square."""
    scene = draw_scene(np.random.default_rng(3), size=96, objects=2)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.pad(scene.image, ((0, 0), (0, 32), (0, 0)), mode="edge")).save(path)
    return str(path)


def run(*arguments: str):
    """(result, stdout) of a command that must succeed."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: str) -> str:
    """The one line of an error that a user can mend."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


def test_version():
    assert run("--version").strip() == f"sar_fast {__version__}"


@pytest.mark.parametrize("command", ["demo", "generate", "inspect", "doctor"])
def test_help_has_examples(command):
    text = run(command, "--help")
    assert "Examples" in text
    assert f"sar-fast {command}" in text


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_sweep_lists_its_flags(word):
    text = run("sweep", word)
    assert all(f"--{name} " in text for name in ("k", "beta", "weighting", "task", "data_dir", "sar_normalize"))
    assert "--sar_beta" not in text
    assert "--sar_weighting" not in text
    assert "--probe_lr" not in text


def test_generate_streams_the_answer(picture):
    plain = run("generate", "--image", picture, "--question", QUESTION)
    assert plain.strip()
    neutral = run("generate", "--image", picture, "--question", QUESTION, "--use_sar", "--beta", "inf")
    assert neutral == plain  # all heads weigh 1 at infinite beta
    run("generate", "--image", picture, "--question", QUESTION, "--use_sar", "--k", "4", "--decode", "step")


def test_generate_takes_a_folder(picture):
    shipped = run("generate", "--image", picture, "--question", QUESTION)
    assert run("generate", "--model", str(MINIATURE_PATH), "--image", picture, "--question", QUESTION) == shipped


def test_prompt_without_chat_template():
    class Bare:
        chat_template = None

    assert build_prompt(Bare(), QUESTION) == f"USER: <image>\n{QUESTION} ASSISTANT:"


def test_miniature_chat_template_is_its_training_prompt():
    _, processor = loading.load_model("miniature")
    assert build_prompt(processor, QUESTION) == f"USER: <image>\n{QUESTION} ASSISTANT:"


def test_inspect_describes_a_model():
    found = json.loads(run("inspect", "--json", "--k", "3"))
    assert found["attention_layers"] == 4
    assert found["sar_layers"] == [1, 2, 3]
    assert found["config"]["activation_layer_k"] == 3
    assert "layers" not in found
    assert "re-weighted layers" in run("inspect")


def test_a_picture_may_be_given_as_a_url_of_its_content(picture):
    with open(picture, "rb") as file:
        url = "data:image/png;base64," + base64.b64encode(file.read()).decode()
    for image in (url, f"file://{picture}"):
        assert run("generate", "--image", image, "--question", QUESTION) == run(
            "generate", "--image", picture, "--question", QUESTION
        )


def test_what_the_models_processor_refuses_is_an_error_of_one_line(picture, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("absolute aspect ratio must be smaller than 200")

    monkeypatch.setattr(type(loading.load_model("miniature")[1].image_processor), "preprocess", refuse)
    for command in ("generate", "inspect"):
        line = fails(command, "--image", picture, "--question", QUESTION)
        assert "--image and --question: the model's processor refuses pictures of 128 x 96 pixels" in line


def test_inspect_measures_an_input(picture, tmp_path):
    png = tmp_path / "heads.png"
    given = ("--image", picture, "--question", QUESTION)
    found = json.loads(run("inspect", *given, "--json", "--k", "2", "--heatmap", str(png)))
    assert found["input"]["visual_tokens"] == 64
    assert 0 < found["input"]["text_queries"] < found["input"]["prompt_tokens"] - 64
    for row in found["layers"]:
        sav = torch.tensor(row["alignment_variance"]) * torch.tensor(row["semantic_alignment"])
        torch.testing.assert_close(torch.tensor(row["sav"]), sav)
        expected = 8 * torch.softmax(sav / 0.5, dim=0)
        expected[0] = expected.max()
        torch.testing.assert_close(torch.tensor(row["head_weights"]), expected, rtol=1e-4, atol=1e-5)
    with Image.open(png) as drawn:
        assert drawn.format == "PNG"
    assert "largest c" in run("inspect", *given)


RULES = """
import torch

def signed(statistics, layer):
    return torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, 3.0, 0.25, 1.5]) + layer

signed.needs_statistics = False

def rank(statistics, layer):
    return statistics.sa.argsort(-1).argsort(-1).to(statistics.sa)
"""


@pytest.fixture
def rules(tmp_path, own_rules):
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return str(path)


def test_inspect_shows_a_rule_and_measures_for_it(picture, rules, tmp_path):
    """Also for a rule that needs no statistics, and one whose weights are not positive."""
    given = ("--image", picture, "--question", QUESTION, "--k", "2", "--json")
    papers = json.loads(run("inspect", *given))
    png = tmp_path / "heads.png"
    found = json.loads(run("inspect", *given, "--weighting", f"{rules}:signed", "--heatmap", str(png)))
    assert found["config"]["weighting"] == {"name": f"{rules}:signed", "options": {}}
    assert not {"beta", "normalize"} & set(found["config"])
    assert "weighting" not in papers["config"]
    first, _ = found["layers"]
    for name in ("alignment_variance", "semantic_alignment", "sav"):  # plain layers are below: the same statistics
        assert first[name] == pytest.approx(papers["layers"][0][name], rel=1e-5)
    for row in found["layers"]:
        assert row["head_weights"] == [c + row["layer"] for c in (2.0, -1.0, 0.5, 0.0, 1.0, 3.0, 0.25, 1.5)]
    assert png.stat().st_size > 1000
    for row in json.loads(run("inspect", *given, "--weighting", f"{rules}:rank"))["layers"]:
        assert row["head_weights"] == torch.tensor(row["semantic_alignment"]).argsort().argsort().tolist()


def test_the_table_of_a_rule_names_it_and_its_largest_head(picture, rules):
    text = run("inspect", "--image", picture, "--question", QUESTION, "--k", "1", "--weighting", f"{rules}:signed")
    assert "weighting" in text
    assert "beta, normalize" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("│     3 ")]
    assert row.split("│")[5:8] == [" 2.000 ", " 6.000 ", "                 5 "]


def test_a_rule_of_the_model_may_ask_for_its_sizes(rules):
    with open(rules, "a") as file:
        file.write("""
class Sized(torch.nn.Module):
    needs_statistics = False
    def __init__(self, layers, heads):
        super().__init__()
        self.sizes = {"layers": layers, "heads": heads}
    def options(self):
        return self.sizes
    def forward(self, statistics, layer):
        return statistics.av.new_ones(self.sizes["heads"])
""")
    found = json.loads(run("inspect", "--weighting", f"{rules}:Sized", "--json"))
    assert found["config"]["weighting"]["options"] == {"layers": 4, "heads": 8}


def test_generate_takes_a_rule(picture, rules):
    given = ("generate", "--image", picture, "--question", QUESTION)
    plain = run(*given)
    assert run(*given, "--use_sar", "--weighting", "equal") == plain
    assert run(*given, "--use_sar", "--k", "4", "--weighting", f"{rules}:signed") != plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "--weighting must be one of ...; got 'nope'"),
        (["gone.py:f"], "--weighting must be FILE.py:NAME; got 'gone.py:f': no such Python file 'gone.py'"),
        (["{"], "--weighting must be a name, FILE.py:NAME, or "),
        (
            ['{"name": "softmax", "options": {"beta": 0}}'],
            '--weighting {"name": "softmax", "options": {"beta": 0}}: beta must be > 0',
        ),
        (["equal", "--beta", "0.5"], "--weighting must come without options of the paper's rule; got --beta"),
        (
            ["equal", "--normalize", "none"],
            "--weighting must come without options of the paper's rule; got --normalize",
        ),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "generate", "demo"])
def test_errors_of_rules_name_the_option(picture, tmp_path, command, words, message):
    where = {"generate": ("--use_sar",), "demo": ("--output_dir", str(tmp_path / "demo")), "inspect": ()}[command]
    line = fails(command, "--image", picture, "--question", QUESTION, *where, "--weighting", *words)
    assert line.startswith("error: " + message.partition("...")[0])
    assert line.endswith(message.partition("...")[2])
    assert not (tmp_path / "demo").exists()
    if command == "generate":
        line = fails(command, "--image", picture, "--question", QUESTION, "--weighting", words[0])
        assert line == f"error: --weighting must be left out without --use_sar; got {words[0]}"


def test_doctor_compares_backends():
    found = json.loads(run("doctor", "--json"))
    assert found["versions"]["torch"] == torch.__version__
    results = {(t["backend"], t["device"], t["dtype"]): t for t in found["backends"]}
    for name in ("torch", "composed"):
        assert results[name, "cpu", "float32"]["status"] == "works"
        assert results[name, "cpu", "float32"]["error"] < 1e-5
    assert all(t["reason"] for t in found["backends"] if t["status"] == "unavailable")


def test_doctor_finds_a_wrong_backend(monkeypatch):
    monkeypatch.setattr("sar_fast.attention.functional.sar_attn_func", lambda q, *rest, **options: q)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert any(t["status"] == "wrong" for t in json.loads(result.stdout)["backends"])


def test_errors_name_the_option(picture, tmp_path):
    text = tmp_path / "no_picture.png"
    text.write_text("not a picture")
    broken = tmp_path / "broken.png"
    with open(picture, "rb") as whole:
        broken.write_bytes(whole.read()[:200])
    ask = ("--question", QUESTION)
    ok = ("generate", "--image", picture, *ask)
    assert "--image" in fails("generate", "--image", str(tmp_path / "missing.png"), *ask)
    assert "cannot be read" in fails("generate", "--image", str(text), *ask)
    assert "cannot be read" in fails("generate", "--image", str(broken), *ask)
    assert "--image" in fails("generate", "--image", str(tmp_path), *ask)
    url = "https://host//a.png"
    assert fails("generate", "--image", url, *ask).startswith(f"error: --image is the URL {url!r}: nothing is downl")
    assert fails("inspect", "--image", "", *ask).startswith("error: --image is the empty path ''")
    assert "--question" in fails("generate", "--image", picture, "--question", " ")
    assert "--question must be without '<image>'" in fails("generate", "--image", picture, "--question", "a <image> b")
    assert "--model" in fails(*ok, "--model", "./no/such/folder")
    assert "--model" in fails(*ok, "--model", str(tmp_path))
    assert "--device" in fails(*ok, "--device", "warp")
    assert "--dtype" in fails(*ok, "--dtype", "int3")
    assert fails(*ok, "--use_sar", "--k", "5").startswith("error: --k must be at most")
    assert fails(*ok, "--use_sar", "--k", "-1").startswith("error: --k must be >= 0")
    assert fails(*ok, "--use_sar", "--beta", "0").startswith("error: --beta must be > 0")
    assert fails(*ok, "--use_sar", "--normalize", "l2").startswith("error: --normalize must be one of")
    assert fails(*ok, "--use_sar", "--backend", "cuda").startswith("error: --backend must be one of")
    assert "--use_sar" in fails(*ok, "--beta", "0.1")
    assert "--question is missing" in fails("inspect", "--image", picture)
    assert "--heatmap" in fails("inspect", "--heatmap", "x.png")
    heatmap = ("--heatmap", str(tmp_path / "nowhere" / "x.png"))
    assert "--heatmap" in fails("inspect", "--image", picture, *ask, *heatmap)
    assert "--image is missing" in fails("demo", *ask, "--output_dir", str(tmp_path))
    assert "--model" in fails("demo", "--model", "some/model", "--output_dir", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "--output_dir" in fails("demo", "--output-dir", str(tmp_path / "file"))


def test_demo_says_what_it_does_where_there_is_no_terminal(tmp_path):
    folder = str(tmp_path / "demo")
    sizes = ["--num-questions", "2", "--sample-size", "1"]
    result = CliRunner().invoke(app, ["demo", *sizes, "--no-timings", "--output_dir", folder])
    assert [line for line in result.stderr.splitlines() if line.startswith("-- ")] == [
        "-- loading the model",
        "-- asking with and without SAR",
        "-- counting right answers to 5 questions, with and without SAR, plain backgrounds",
        "-- counting right answers to 5 questions, with and without SAR, photographs",
    ]


def test_a_text_model_is_refused(picture, tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINIATURE_PATH / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ask = ("generate", "--model", str(tmp_path), "--image", picture, "--question", QUESTION)
    assert "cannot be loaded as an image-text-to-text model" in fails(*ask)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 8}))  # not a multiple of the heads
    assert "cannot be loaded" in fails(*ask)


def test_a_missing_package_is_named(picture, monkeypatch, tmp_path):
    from transformers import AutoProcessor

    def needs_torchvision(*_, **__):
        raise ImportError("\nVideoProcessor requires the torchvision library but it was not found in your environment.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", needs_torchvision)
    shutil.copytree(MINIATURE_PATH, tmp_path / "model")  # the shipped one always gets Pillow's image processor
    line = fails("generate", "--model", str(tmp_path / "model"), "--image", picture, "--question", QUESTION)
    assert "pip install torchvision" in line
