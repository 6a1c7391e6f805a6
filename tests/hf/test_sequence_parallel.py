"""DeepSpeed Ulysses over two real processes equals one: loss, gradients and head weights of a multimodal batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sar_fast import SARConfig, apply_sar
from sar_fast.distributed import Shards
from tests.distributed_workers import run_ranks
from tests.hf.tiny import llava, llava_batch

CONFIG = SARConfig(activation_layer_k=2, beta=0.01, record=True)


def padded_batch():
    """Three rows padded on the right to an even length, and labels on the text behind the pictures."""
    batch = llava_batch([1, 2, 1], side="right")
    batch = {n: (torch.nn.functional.pad(x, (0, x.shape[1] % 2)) if x.dim() == 2 else x) for n, x in batch.items()}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch, labels.masked_fill(labels == 99, -100)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_process(config, batch, labels):
    """(loss, head weights by layer, gradients by parameter)."""
    model = llava()
    with apply_sar(model, config) as handle:
        loss = model(**batch, labels=labels).loss
        loss.backward()
        weights = {layer: stats.head_weights for layer, stats in handle.stats.items()}
    return loss, weights, gradients(model)


def ulysses_worker(rank, world, sav_grad):
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    from sar_fast.integrations.hf.sequence_parallel import split_sequence

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on first use
    deepspeed.init_distributed("gloo")
    batch, labels = padded_batch()
    config = CONFIG.replace(sav_grad=sav_grad)
    loss, weights, expected = one_process(config, batch, labels)

    model = llava()
    handle = apply_sar(model, config, shards=Shards(heads=dist.group.WORLD))
    text = model.model.language_model
    UlyssesSPAttentionHF.register_with_transformers(text, "sar", sequence_parallel_size=world, micro_batch_size=3)
    split = split_sequence(model, dist.group.WORLD)
    mine = {"labels": split.slice(labels), "shift_labels": split.shifted(labels)}
    counted = int((labels[:, 1:] != -100).sum())
    total = model(**batch, use_cache=False, **mine, num_items_in_batch=counted).loss
    total.backward()
    got = gradients(model)
    dist.all_reduce(total.detach())
    for gradient in got.values():
        dist.all_reduce(gradient)
    torch.testing.assert_close(total.detach(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    for layer, all_weights in weights.items():
        assert not torch.allclose(all_weights[0], torch.ones(4), atol=0.2)
        torch.testing.assert_close(handle.stats[layer].head_weights, all_weights.chunk(world, 1)[rank])

    odd = {n: x[:, :-1] if x.dim() == 2 else x for n, x in batch.items()}
    with pytest.raises(ValueError, match="must be padded to a multiple of the 2 ranks"):
        model(**odd, use_cache=False)
    with pytest.raises(ValueError, match="padding on the right"):
        model(**{**batch, "attention_mask": batch["attention_mask"].flip(1)}, use_cache=False)
    with pytest.raises(ValueError, match="use_cache must be False"):
        model(**batch, use_cache=True)


@pytest.mark.slow
@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
def test_ulysses_equals_one_process(sav_grad):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra: pip install sar_fast[deepspeed]")
    run_ranks(ulysses_worker, sav_grad)
