"""Training with Qwen2.5-VL's own processor classes on a tiny vocabulary: tokens, labels, batches and a run with SAR."""

from __future__ import annotations

import pytest
import torch

from sar_fast.lab.io.datasets import find_datasets
from sar_fast.lab.training.data import Collator, load_records
from sar_fast.lab.training.encoding import IGNORED, Encoder
from tests.training.qwen_checkpoint import write_qwen
from tests.training.runs import history, lines, train
from tests.training.samples import DATA


def torchvision_imports() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # a build for another torch fails with RuntimeError
        return False
    return True


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torchvision_imports(), reason="transformers' Qwen2.5-VL processor needs torchvision"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, *write_qwen(folder)


def test_samples_are_what_the_processor_makes(checkpoint):
    """Two pictures each of as many tokens as their grid has; the loss on the answers and their end alone."""
    _, model, processor = checkpoint
    encoder = Encoder(processor)
    records = load_records(find_datasets("shapes_pairs", DATA))
    samples = [encoder(record) for record in list(records)[:3]]
    for record, sample in zip(records, samples):
        answers = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
        labels = [token for token in sample["labels"] if token != IGNORED]
        assert processor.tokenizer.decode(labels) == "".join(f"{answer}<|im_end|>" for answer in answers)
        tokens = sample["image_grid_thw"].prod(-1).sum().item() // 4
        assert sample["input_ids"].count(processor.image_token_id) == tokens > 0
        assert [t != 0 for t in sample["mm_token_type_ids"]] == [
            token == processor.image_token_id for token in sample["input_ids"]
        ]
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    with torch.no_grad():  # right padding and joined patches change nothing
        together = model(**batch, use_cache=False).logits
        for row, sample in enumerate(samples):
            alone = model(**Collator(0)([sample]), use_cache=False).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-3, atol=1e-4)


def test_a_run_with_sar(checkpoint, tmp_path):
    common = {"model_name_or_path": checkpoint[0], "dataset": "shapes_pairs", "max_steps": 2}
    sar = {"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 1e-3, "sav_grad": True}
    train(tmp_path / "plain", **common)
    train(tmp_path / "sar", **common, **sar)
    plain, reweighted = (history(tmp_path / name) for name in ("plain", "sar"))
    assert all(0 < loss < 20 for loss in plain + reweighted)
    assert reweighted[0] != pytest.approx(plain[0], rel=1e-4)
    for line in lines(tmp_path / "sar" / "gradient_sparsity.jsonl"):
        assert line["gradient_analysis/avg_visual_token_grad_L1"] > 0
        assert 0 < line["attention_grad_sparsity_agg/avg_total_q_gini"] < 1
