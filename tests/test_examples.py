"""The notebooks in ``examples/``: every cell runs, the figures of one are those of heads cut off by hand."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.questions import build_prompt, draw_questions

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parents[1] / "examples"
LARGEST = 300_000  # bytes, so that it opens at once where repositories are read
RESULTS = ["accuracy", "plain", "effect", "importance", "curves", "kept"]  # names in the notebook that are looked at
ASK = f"""
import json
json.dumps({{n: x.tolist() if hasattr(x, "tolist") else x for n, x in globals().items() if n in {RESULTS}}})
"""


def execute(notebook: nbformat.NotebookNode) -> dict:
    """What the notebook's names hold after its last cell; ``CellExecutionError`` if one fails."""
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    (output,) = notebook.cells[-1].outputs
    return json.loads(eval(output.data["text/plain"]))  # the repr of a text


def log_probabilities_without(layer: int, head: int) -> torch.Tensor:
    """Of the notebook's answers, token by token, by a model whose head reaches no output projection."""
    model, processor = load_miniature()
    width = model.config.text_config.head_dim
    with torch.no_grad():
        projection = model.model.language_model.layers[layer].self_attn.o_proj.weight
        projection[:, head * width : (head + 1) * width] = 0
    found = []
    for scene, question in draw_questions(np.random.default_rng(7), 12, ("plain", "texture")):
        prompt = build_prompt(question.text)
        texts = (prompt, f"{prompt} {question.answer}")
        before, inputs = (processor(images=[scene.image], text=[x], return_tensors="pt") for x in texts)
        start, ids = before["input_ids"].shape[1], inputs["input_ids"][0]
        with torch.no_grad():
            log_p = model(**inputs).logits[0].log_softmax(-1)
        found.append(sum(log_p[i - 1, ids[i]] for i in range(start, len(ids))))
    return torch.stack(found)


@pytest.mark.slow
def test_ablating_heads(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = execute(nbformat.read(EXAMPLES / "ablate_heads.ipynb", as_version=4))
    effect, plain = torch.tensor(found["effect"]), torch.tensor(found["plain"])
    assert found["accuracy"] > 0.85
    layer, head = divmod(int(effect.argmin()), effect.shape[1])
    assert effect[layer, head] < -1  # e times less probable, in the mean
    for at in ((layer, head), (3, 0)):
        by_hand = (log_probabilities_without(*at) - plain).mean()
        assert abs(effect[at] - by_hand) < 1e-3
    assert torch.tensor(found["importance"]).min() > 0
    assert found["kept"][-1] == effect.shape[1]
    for curve in found["curves"].values():
        assert curve[-1] == pytest.approx(found["accuracy"])
        assert curve[0] < found["accuracy"] / 2


def test_a_cell_that_fails_fails():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_shipped_as_they_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < LARGEST
