"""Samples packed into one row train every listed family as they would alone: loss and gradients, SAR off and on."""

from __future__ import annotations

import pytest
import torch

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.families import packable_model_types
from sar_fast.lab.training.data import Collator
from sar_fast.lab.training.encoding import IGNORED
from sar_fast.lab.training.run import check_packing
from tests.hf.tiny import CASES, qwen2_5_vl
from tests.hf.tiny.base import IMAGE

PICTURES = [2, 0, 1]  # of three samples
PACKED_CASES = sorted(name for name, case in CASES.items() if case.make().config.model_type in packable_model_types())


def samples_of(case):
    """Three samples as the encoder makes them, words alone labelled, the first never."""
    samples = []
    for number, count in enumerate(PICTURES):
        row = case.batch([count], first_image=sum(PICTURES[:number]))
        ids = row["input_ids"][0].tolist()
        sample = {n: x[0].tolist() if n in ("input_ids", "attention_mask") else x for n, x in row.items()}
        last = max((n for n, token in enumerate(ids) if token >= IMAGE - 4), default=0)
        sample["labels"] = [IGNORED] * (last + 1) + ids[last + 1 :]
        samples.append(sample)
    return samples


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(int((row[1:] != IGNORED).sum()) for row in batch["labels"])


def test_every_listed_family_has_a_case():
    assert {CASES[name].make().config.model_type for name in PACKED_CASES} == set(packable_model_types())


@pytest.mark.parametrize("reweighted", [False, True], ids=["plain", "sar"])
@pytest.mark.parametrize("name", PACKED_CASES)
def test_a_packed_row_trains_as_its_samples_alone(name, reweighted):
    case = CASES[name]
    model, samples = case.make(), samples_of(case)
    if reweighted:
        apply_sar(model, SARConfig(activation_layer_k=2, beta=case.beta, sav_grad=True))
    alone = [loss_and_gradients(model, Collator(0)([sample])) for sample in samples]
    packed = Collator(0, packing=True)(samples)
    assert packed["input_ids"].shape[0] == 1
    assert "attention_mask" not in packed
    loss, gradients, _ = loss_and_gradients(model, packed)
    total = sum(count for *_, count in alone)
    torch.testing.assert_close(loss, sum(each * count / total for each, _, count in alone), rtol=1e-5, atol=1e-6)
    names = {n for _, some, _ in alone for n in some}
    assert gradients.keys() == names
    for n in names:
        expected = sum(some[n] * count / total for _, some, count in alone if n in some)
        # fp32 sums over other partners: 1e-5 of the largest entry, or of nothing where the true gradient is zero
        assert (gradients[n] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-5, n


def test_other_families_are_refused():
    with pytest.raises(
        ValueError, match=r"packing must be False for qwen2_5_vl; it is known to be right for .*llava, "
    ):
        check_packing(qwen2_5_vl())
