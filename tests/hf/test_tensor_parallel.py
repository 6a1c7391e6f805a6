"""Heads split over ranks by transformers' tensor parallelism: two real processes equal one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import LlavaForConditionalGeneration

from sar_fast import SARConfig, apply_sar
from sar_fast.method.distributed import Shards
from sar_fast.weighting import Entropy, Fixed, HeadScales, ScoreSum, SuppressHeads
from tests.distributed_workers import run_ranks
from tests.hf.tiny import VERSION, llava, llava_batch

CONFIG = SARConfig(activation_layer_k=2, beta=0.01, record=True)
NO_GRAD = torch.no_grad()  # DeepSpeed's inference layers allow no gradients


def split_over_ranks():
    """Keyword arguments of ``from_pretrained``; the environment says how many ranks there are."""
    if VERSION < (5, 18):
        return {"tp_plan": "auto"}
    return {"distributed_config": transformers.DistributedConfig(tp_plan="auto")}


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


class Mixture(nn.Module):
    """Couples all heads, and uses row statistics of both kinds."""

    row_statistics = (Entropy(), ScoreSum())

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))

    def forward(self, statistics, layer):
        rows = statistics.rows
        mean = statistics.av + statistics.sa + rows["entropy"] / 9 + rows["score_sum"] / 20
        return 1 + layer * torch.tanh(mean @ self.mix) / 3


def assert_gradient(got, expected, rank, world):
    """Of a DTensor, or of this rank's part of the parameter, as older transformers keep it."""
    if hasattr(got, "full_tensor"):
        got = got.full_tensor()
    elif got.shape != expected.shape:
        (split,) = [d for d in range(got.dim()) if got.shape[d] != expected.shape[d]]
        expected = expected.chunk(world, split)[rank]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def rules_worker(rank, world, path):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    alone = LlavaForConditionalGeneration.from_pretrained(path)
    split = LlavaForConditionalGeneration.from_pretrained(path, **split_over_ranks())
    table = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) + 0.2
    for rule, options in (
        (Mixture(), {"sav_grad": True}),
        (Mixture(), {"decode": "step"}),
        (Mixture(), {"decode": "prompt"}),
        (Fixed(table), {}),
        (HeadScales(4, 4), {}),
        (SuppressHeads(2, 0.1), {}),
    ):
        config = SARConfig(activation_layer_k=2, weighting=rule, record=True, **options)
        alone.zero_grad()
        split.zero_grad()
        logits, tokens, weights, gradients = results(alone, config)
        parameters = list(rule.parameters()) if isinstance(rule, nn.Module) else []
        whole = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        mine = results(split, config)
        assert (mine[0] - logits).abs().max() <= 1e-4 * logits.abs().max()
        assert torch.equal(mine[1], tokens)
        for layer, expected in weights.items():
            torch.testing.assert_close(mine[2][layer], expected.chunk(world, 1)[rank], rtol=1e-4, atol=1e-5)
        for got, expected in zip(mine[3], gradients):
            assert_gradient(got, expected, rank, world)
        for p, expected in zip(parameters, whole):
            dist.all_reduce(p.grad)  # each rank's loss is of its own heads
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)


def test_rules_under_tensor_parallelism_equal_one_process(tmp_path):
    llava().save_pretrained(tmp_path)
    run_ranks(rules_worker, str(tmp_path))


def tensor_parallel_worker(rank, world, path, uneven):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    alone = LlavaForConditionalGeneration.from_pretrained(path)
    split = LlavaForConditionalGeneration.from_pretrained(path, **split_over_ranks())
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
            assert_gradient(got, expected, rank, world)
    # without the exchange, a softmax over half of the heads: refused
    handle = apply_sar(split, CONFIG)
    handle.shards = None
    with pytest.raises(RuntimeError, match=r"attends with 2 of 4 heads on this rank.*shards=Shards\(heads=group\)"):
        split(**llava_batch([1]))
    handle.shards = Shards(queries=dist.group.WORLD)
    with pytest.raises(RuntimeError, match=r"attends with 27 of 27 positions.* split_sequence\(model, group\)"):
        split(**llava_batch([1]))
    split = LlavaForConditionalGeneration.from_pretrained(uneven, **split_over_ranks())
    with pytest.raises(ValueError, match=r"shards\.heads must have ranks that share 3 heads evenly; got 2"):
        apply_sar(split, CONFIG)


def test_tensor_parallel_equals_one_process(tmp_path):
    llava().save_pretrained(tmp_path / "even")
    llava(hidden_size=48, num_attention_heads=3, num_key_value_heads=3).save_pretrained(tmp_path / "uneven")
    run_ranks(tensor_parallel_worker, str(tmp_path / "even"), str(tmp_path / "uneven"))


def auto_tp(model, rank, world, training):
    """The model, its layers split in place by DeepSpeed's AutoTP, and the ranks that share them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on first use
    deepspeed.init_distributed("gloo")
    if not training:
        engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": world}, dtype=torch.float32)
        return engine.module, engine.mp_group
    config = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": {"autotp_size": world}}
    engine = deepspeed.initialize(model=model, config=config)[0]
    return engine.module, deepspeed.utils.groups.get_tensor_model_parallel_group()


def auto_tp_worker(rank, world, training):
    alone, (split, group) = llava(), auto_tp(llava(), rank, world, training)
    assert split.model.language_model.layers[-1].self_attn.q_proj.weight.shape == (32, 64)  # half of the heads
    batch = llava_batch([1, 2, 0])
    handle = apply_sar(split, CONFIG)
    with pytest.raises(RuntimeError, match=r"attends with 2 of 4 heads on this rank.*Shards\(heads=group\)"), NO_GRAD:
        split(**batch)
    handle.remove()
    for config in (CONFIG, CONFIG.replace(sav_grad=True, normalize="standardize")):
        found = []
        for model, shards in ((alone, None), (split, Shards(heads=group))):
            model.zero_grad()
            with apply_sar(model, config, shards=shards) as handle, torch.set_grad_enabled(training):
                logits = model(**batch).logits
                weights = {layer: stats.head_weights for layer, stats in handle.stats.items()}
            if training:
                logits.logsumexp(-1).mean().backward()
            else:
                with apply_sar(model, config, shards=shards):
                    found.append(model.generate(**batch, max_new_tokens=4, do_sample=False))
            found.append((logits.detach(), weights, dict(model.named_parameters())))
        if not training:
            assert torch.equal(found.pop(0), found.pop(1))
        (logits, weights, expected), (got, mine, parameters) = found
        assert (got - logits).abs().max() <= 1e-4 * logits.abs().max()
        for layer, all_weights in weights.items():
            assert not torch.allclose(all_weights[0], torch.ones(4), atol=0.2)  # the layer re-weights
            torch.testing.assert_close(mine[layer], all_weights.chunk(world, 1)[rank], rtol=1e-4, atol=1e-6)
        for name, parameter in parameters.items() if training else ():
            whole = expected[name].grad
            if whole is None:
                continue
            for dim in range(whole.dim()):
                if whole.shape[dim] != parameter.shape[dim]:
                    whole = whole.chunk(world, dim)[rank]
            torch.testing.assert_close(parameter.grad, whole, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_deepspeed_auto_tp_equals_one_process(training):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra: pip install sar_fast[deepspeed]")
    run_ranks(auto_tp_worker, training)


def uneven_auto_tp_worker(rank, world):
    """Six heads in three groups: DeepSpeed gives one rank four heads and the other two."""
    model = llava(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    split, group = auto_tp(model, rank, world, training=True)
    apply_sar(split, CONFIG, shards=Shards(heads=group))
    mine = 4 if rank == 0 else 2
    with pytest.raises(RuntimeError, match=f"attends with {mine} of 6 heads.*over 2 rank.*must hold the same number"):
        split(**llava_batch([1]))


@pytest.mark.slow
def test_uneven_heads_under_auto_tp_are_refused():
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra: pip install sar_fast[deepspeed]")
    run_ranks(uneven_auto_tp_worker)
