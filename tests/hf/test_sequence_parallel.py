"""A sequence split over two real processes equals one: loss, gradients and head weights of a multimodal batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.sequence_parallel import split_sequence
from sar_fast.method.distributed import Shards
from tests.distributed_workers import run_ranks
from tests.hf.tiny import CASES, MODELS, llava, llava_batch

CONFIG = SARConfig(activation_layer_k=2, beta=0.01, record=True)
needs_deepspeed = "DeepSpeed is an extra: pip install sar_fast[deepspeed]"


def padded_batch(make_batch=llava_batch):
    """Three rows padded on the right to an even length, and labels on the text behind the pictures."""
    batch = make_batch([1, 2, 1], side="right")
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    batch = {n: (F.pad(x, (0, x.shape[1] % 2)) if n in per_token else x) for n, x in batch.items()}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch, labels.masked_fill(labels >= 96, -100)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_process(model, config, batch, labels):
    """(loss, statistics by layer, gradients by parameter)."""
    with apply_sar(model, config) as handle:
        loss = model(**batch, labels=labels).loss
        loss.backward()
        return loss.detach(), dict(handle.stats), gradients(model)


def assert_equal_on_all_ranks(model, split, batch, labels, expected):
    """Loss and gradients of the ranks' slices add up to those of one process."""
    loss, _, expected_gradients = expected
    mine = {"labels": split.slice(labels), "shift_labels": split.shifted(labels)}
    counted = int((labels[:, 1:] != -100).sum())
    total = model(**batch, use_cache=False, **mine, num_items_in_batch=counted).loss
    total.backward()
    got = gradients(model)
    total = total.detach()
    dist.all_reduce(total)
    for gradient in got.values():
        dist.all_reduce(gradient)
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
    assert got.keys() == expected_gradients.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def context_parallel_worker(rank, world, name, config):
    make, make_batch = MODELS[name]
    batch, labels = padded_batch(make_batch)
    expected = one_process(make(), config, batch, labels)
    model = make()
    handle = apply_sar(model, config, shards=Shards(queries=dist.group.WORLD))
    split = split_sequence(model, dist.group.WORLD)
    assert_equal_on_all_ranks(model, split, batch, labels, expected)
    for layer, stats in expected[1].items():
        assert not torch.allclose(stats.head_weights[0], torch.ones(4), atol=0.2)  # the layer re-weights
        torch.testing.assert_close(handle.stats[layer].head_weights, stats.head_weights, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(handle.stats[layer].alignment_variance, stats.alignment_variance)
        torch.testing.assert_close(handle.stats[layer].semantic_alignment, stats.semantic_alignment)
    split.remove()
    with pytest.raises(RuntimeError, match=r"shards\.queries has 2 ranks, and this one attends with (\d+) of \1 pos"):
        model(**batch, use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
def test_context_parallel_of_every_layout(name, sav_grad):
    run_ranks(context_parallel_worker, name, CONFIG.replace(sav_grad=sav_grad))


def refusals(world):
    """What SAR would compute silently wrong: every one an error before a layer runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    batch, _ = padded_batch()
    model, group = llava(), dist.group.WORLD
    handle = apply_sar(model, CONFIG)
    with pytest.raises(
        ValueError,
        match=r"group must be given to SAR: apply_sar.*Shards\(queries=group\).*; got one that SAR",
    ):
        split_sequence(model, group)
    ids = batch["input_ids"].clone()
    mesh = init_device_mesh("cpu", (world,))
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
        assert ids.shape[1] == batch["input_ids"].shape[1] // world
        with pytest.raises(RuntimeError, match=r"torch's context_parallel \(cp_size\).*shards=Shards\(queries=group\)"):
            model(input_ids=ids, pixel_values=batch["pixel_values"])
    model(**batch)  # not for good
    handle.remove()
    with pytest.raises(ValueError, match=r"plain causal attention in all layers, .*; got layers of sliding_attention"):
        split_sequence(CASES["gemma3"].make(), group)

    prefix = CASES["paligemma"]
    model = prefix.make()
    apply_sar(model, CONFIG, shards=Shards(queries=group))
    split_sequence(model, group)
    even = {n: x[:, : x.shape[1] // 2 * 2] if x.dim() == 2 else x for n, x in prefix.batch([1, 1], "right").items()}
    with pytest.raises(ValueError, match=r"given a mask .* that is not plain causal"):
        model(**even, use_cache=False)
    three = llava(hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"shards\.heads must have ranks that share 3 heads evenly; got 2"):
        apply_sar(three, CONFIG, shards=Shards(heads=group))


def everyday_worker(rank, world):
    context_parallel_worker(rank, world, "llava", CONFIG.replace(sav_grad=True, normalize="standardize"))
    refusals(world)


def test_context_parallel_equals_one_process_and_wrong_splits_are_refused():
    run_ranks(everyday_worker)


def ulysses_worker(rank, world, sav_grad):
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on first use
    deepspeed.init_distributed("gloo")
    batch, labels = padded_batch()
    config = CONFIG.replace(sav_grad=sav_grad)
    expected = one_process(llava(), config, batch, labels)

    model = llava()
    handle = apply_sar(model, config, shards=Shards(heads=dist.group.WORLD))
    text = model.model.language_model
    UlyssesSPAttentionHF.register_with_transformers(text, "sar", sequence_parallel_size=world, micro_batch_size=3)
    split = split_sequence(model, dist.group.WORLD)
    assert_equal_on_all_ranks(model, split, batch, labels, expected)
    for layer, stats in expected[1].items():
        assert not torch.allclose(stats.head_weights[0], torch.ones(4), atol=0.2)
        torch.testing.assert_close(handle.stats[layer].head_weights, stats.head_weights.chunk(world, 1)[rank])

    odd = {n: x[:, :-1] if x.dim() == 2 else x for n, x in batch.items()}
    with pytest.raises(ValueError, match="must be padded to a multiple of the 2 ranks"):
        model(**odd, use_cache=False)
    with pytest.raises(ValueError, match="padding on the right"):
        model(**{**batch, "attention_mask": batch["attention_mask"].flip(1)}, use_cache=False)
    with pytest.raises(ValueError, match="use_cache must be False"):
        model(**batch, use_cache=True)
    unnamed = llava()  # as accelerate's sp_size leaves it: whoever applied SAR did not know
    apply_sar(unnamed, config)
    with pytest.raises(RuntimeError, match=r"DeepSpeed's sequence parallelism \(Ulysses, sp_size\) is on"):
        unnamed(**batch, use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
def test_ulysses_equals_one_process(sav_grad):
    pytest.importorskip("deepspeed", reason=needs_deepspeed)
    run_ranks(ulysses_worker, sav_grad)


def uneven_ulysses_worker(rank, world):
    """Three heads over two ranks: refused by DeepSpeed where it comes first, by SAR where that does."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    model = llava(hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    text = model.model.language_model
    with pytest.raises(ValueError, match="head count 3 is not divisible by SP size 2"):
        UlyssesSPAttentionHF.register_with_transformers(
            text, text.config._attn_implementation, sequence_parallel_size=world, micro_batch_size=3
        )
    with pytest.raises(ValueError, match=r"shards\.heads must have ranks that share 3 heads evenly; got 2"):
        apply_sar(model, CONFIG, shards=Shards(heads=dist.group.WORLD))


@pytest.mark.slow
def test_uneven_heads_under_ulysses_are_refused():
    pytest.importorskip("deepspeed", reason=needs_deepspeed)
    run_ranks(uneven_ulysses_worker)
