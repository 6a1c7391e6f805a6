"""Heads split over ranks by transformers' tensor parallelism: two real processes equal one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from transformers import DistributedConfig, LlavaForConditionalGeneration

from sar_fast import SARConfig, apply_sar
from sar_fast.distributed import Shards
from tests.distributed_workers import run_ranks
from tests.hf.tiny import llava, llava_batch

CONFIG = SARConfig(activation_layer_k=2, beta=0.01, record=True)


def results(model, config=CONFIG):
    """Logits, tokens and weights of a padded batch with pictures, and the gradients of a loss on its logits."""
    batch = llava_batch([1, 2, 0])
    with apply_sar(model, config) as handle:
        logits = model(**batch).logits
        weights = {layer: stats.head_weights for layer, stats in handle.stats.items()}
        logits.logsumexp(-1).mean().backward()
        tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    layer = model.model.language_model.layers[-1]
    gradients = [
        p.grad for p in (layer.self_attn.k_proj.weight, layer.self_attn.o_proj.weight, layer.mlp.up_proj.weight)
    ]
    return logits.detach(), tokens, weights, gradients


def tensor_parallel_worker(rank, world, path):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    alone = LlavaForConditionalGeneration.from_pretrained(path)
    split = LlavaForConditionalGeneration.from_pretrained(path, distributed_config=DistributedConfig(tp_plan="auto"))
    assert split.tp_size == world
    for config in (CONFIG, CONFIG.replace(decode="step"), CONFIG.replace(sav_grad=True, normalize="standardize")):
        alone.zero_grad()
        split.zero_grad()
        logits, tokens, weights, gradients = results(alone, config)
        mine = results(split, config)
        assert (mine[0] - logits).abs().max() <= 1e-4 * logits.abs().max()
        assert torch.equal(mine[1], tokens)
        for layer, expected in weights.items():
            assert not torch.allclose(expected[0], torch.ones(4), atol=0.2)  # the layer re-weights
            torch.testing.assert_close(mine[2][layer], expected.chunk(world, 1)[rank], rtol=1e-4, atol=1e-6)
        for got, expected in zip(mine[3], gradients):
            torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-3, atol=1e-5)
    # without the exchange, a softmax over half of the heads: refused
    handle = apply_sar(split, CONFIG)
    handle.shards = None
    with pytest.raises(RuntimeError, match=r"attends with 2 of 4 heads on this rank.*shards=Shards\(heads=group\)"):
        split(**llava_batch([1]))
    handle.shards = Shards(queries=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="attends with 2 of 4 heads"):
        split(**llava_batch([1]))


def test_tensor_parallel_equals_one_process(tmp_path):
    llava().save_pretrained(tmp_path)
    run_ranks(tensor_parallel_worker, str(tmp_path))
