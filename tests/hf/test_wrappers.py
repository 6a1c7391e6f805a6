"""SAR inside what people wrap models in: PEFT, autocast, offloading, checkpoints, quantised layers, processes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn

from sar_fast import SARConfig, apply_sar, remove_sar
from sar_fast.hf.attention import register
from tests.hf.generation_oracle import decode_oracle
from tests.hf.tiny import IMAGE, MODELS, llava, llava_batch, qwen2_5_vl, qwen_batch

BETA = 0.02
SAR = SARConfig(activation_layer_k=3, beta=BETA)
LORA_TARGETS = r".*language_model.*\.(q_proj|v_proj|o_proj)"


@pytest.fixture(params=list(MODELS))
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def answers(model, batch, new=4):
    return model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)[:, -new:]


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, want):
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


# PEFT


def with_adapter(model, **options):
    """A LoRA (or DoRA) model whose adapter is far from doing nothing, and its merged twin."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=LORA_TARGETS, **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return wrapped, copy.deepcopy(wrapped).merge_and_unload()


@pytest.mark.everyday(family=["llava"], use_dora=[False])
@pytest.mark.everyday(family=["qwen2_5_vl"], use_dora=[True], first=["sar"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("first", ["sar", "peft"])
def test_adapters_equal_their_merged_model(family, use_dora, first):
    model, batch_of = family
    batch = batch_of([1, 2, 0])
    real = batch["attention_mask"].bool()
    if first == "sar":
        apply_sar(model, SAR)
        wrapped, _ = with_adapter(model, use_dora=use_dora)
        remove_sar(wrapped)
        merged = copy.deepcopy(wrapped).merge_and_unload()
        apply_sar(wrapped, SAR)
    else:
        wrapped, merged = with_adapter(model, use_dora=use_dora)
        apply_sar(wrapped, SAR)
    plain = logits(merged, batch)[real]
    with apply_sar(merged, SAR):
        want = logits(merged, batch)[real]
        assert_close(logits(wrapped, batch)[real], want)
        assert torch.equal(answers(wrapped, batch), answers(merged, batch))
    assert (want - plain).abs().max() > 0.01
    remove_sar(wrapped)
    assert_close(logits(wrapped, batch)[real], plain)


def test_merging_under_sar_changes_nothing(family):
    model, batch_of = family
    batch = batch_of([1, 0])
    wrapped, _ = with_adapter(model)
    apply_sar(wrapped, SAR)
    want = logits(wrapped, batch)
    merged = wrapped.merge_and_unload()
    assert_close(logits(merged, batch), want)
    remove_sar(merged)


@pytest.mark.everyday(family=["llava"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_trap4_adapter_gradients_under_checkpointing(family, reentrant):
    """Nothing may be memoised inside a checkpointed layer: recomputation must see what the first pass saw."""
    model, batch_of = family
    batch = batch_of([1, 2, 0])
    wrapped, _ = with_adapter(model)
    wrapped.train()
    with apply_sar(wrapped, SARConfig(activation_layer_k=3, beta=BETA, sav_grad=True)):
        want = gradients(wrapped, batch)
        wrapped.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        wrapped.enable_input_require_grads()
        got = gradients(wrapped, batch)
    assert set(want) == {n for n, p in wrapped.named_parameters() if p.requires_grad}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)


def tuned(model, kind):
    """A prompt-tuned or prefix-tuned model with four virtual tokens."""
    peft = pytest.importorskip("peft")
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    text = model.config.get_text_config()
    wrapped = peft.get_peft_model(
        model,
        config(
            task_type="CAUSAL_LM",
            num_virtual_tokens=4,
            token_dim=text.hidden_size,
            num_attention_heads=text.num_attention_heads,
            num_layers=text.num_hidden_layers,
            num_transformer_submodules=1,
        ),
    ).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "prompt_encoder" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    return wrapped


def test_prompt_tuning_equals_the_oracle_on_its_embeddings():
    model, row = llava(), llava_batch([1])
    wrapped = tuned(llava(), "prompt")
    with torch.no_grad():
        virtual = wrapped.get_prompt(1)
        embeds = torch.cat([virtual, model.get_input_embeddings()(row["input_ids"])], 1)
    shifted = {
        "input_ids": torch.cat([torch.full((1, 4), 3), row["input_ids"]], 1),
        "pixel_values": row["pixel_values"],
    }
    with decode_oracle(model, shifted, k=3, beta=BETA, mode="running"), torch.no_grad():
        want = model(inputs_embeds=embeds, pixel_values=row["pixel_values"], use_cache=False).logits
    with apply_sar(wrapped, SAR) as handle:
        assert_close(logits(wrapped, row), want)
        assert torch.equal(handle.roles.visual_mask, shifted["input_ids"] == IMAGE)


def test_prefix_tuning_equals_the_oracle_behind_its_prefix():
    """The prefix is a cache that no pass filled: visual tokens lie behind it."""
    row = llava_batch([1])
    wrapped = tuned(llava(), "prefix")
    with apply_sar(wrapped, SAR) as handle:
        got = logits(wrapped, row)
        shifted = {"input_ids": torch.cat([torch.full((1, 4), 3), row["input_ids"]], 1)}
        oracle_row = shifted | {"pixel_values": row["pixel_values"]}
        assert handle.stats == {}
    with decode_oracle(wrapped.get_base_model(), oracle_row, k=3, beta=BETA, mode="running") as oracle:
        oracle.seen = dict.fromkeys(range(4), 4)
        assert_close(got, logits(wrapped, row))
    assert (got - logits(wrapped, row)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_tuned_models_generate_row_by_row_what_the_batch_does(kind):
    """Rows of one length: PEFT's own prompt tuning numbers positions through the padding, with or without SAR."""
    wrapped = tuned(llava(), kind)
    plain = answers(wrapped, llava_batch([1, 1]))
    with apply_sar(wrapped, SAR):
        together = answers(wrapped, llava_batch([1, 1]))
        for b in range(2):
            assert torch.equal(answers(wrapped, llava_batch([1], first_image=b))[0], together[b])
    assert not torch.equal(together, plain)


# autocast, dtypes, quantised layers


@pytest.mark.everyday(family=["llava"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_and_generates(family, dtype):
    """Error against fp32 within what plain attention's own autocast makes, of the same order as the logits' shift."""
    model, batch_of = family
    batch = batch_of([1, 2, 0])
    real = batch["attention_mask"].bool()

    def error(run):
        want = run(batch)[real]
        with torch.autocast("cpu", dtype=dtype):
            got = run(batch)[real]
        return (got.float() - want).abs().mean()

    config = SARConfig(activation_layer_k=4, beta=1.0)
    plain = error(lambda b: logits(model, b))
    with apply_sar(model, config):
        assert error(lambda b: logits(model, b)) <= 3 * plain
        with torch.autocast("cpu", dtype=dtype):
            assert answers(model, batch).shape == (3, 4)
            found = gradients(model, batch)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in found.values())


class RoundedLinear(nn.Module):
    """A linear layer that keeps its weight in int8 with a scale per row, as quantising packages do."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_quantised_linear_layers(family):
    """Weights that are no floating point parameters: SAR reads none of them."""
    model, batch_of = family
    batch = batch_of([1, 2])
    dense = copy.deepcopy(model)
    for layer, twin in zip(model.get_decoder().layers, dense.get_decoder().layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rounded = RoundedLinear(getattr(layer.self_attn, name))
            setattr(layer.self_attn, name, rounded)
            getattr(twin.self_attn, name).weight.data = rounded.codes.float() * rounded.scale
    with apply_sar(model, SAR), apply_sar(dense, SAR):
        assert_close(logits(model, batch), logits(dense, batch))
        assert torch.equal(answers(model, batch), answers(dense, batch))


@pytest.mark.parametrize("package", ["quanto", "torchao"])
def test_packages_that_quantise_linear_layers(package):
    model, batch = llava(), llava_batch([1, 2])
    with apply_sar(model, SAR):
        exact = logits(model, batch)
    if package == "quanto":
        quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        quanto.quantize(model.get_decoder(), weights=quanto.qint8)
        quanto.freeze(model.get_decoder())
    else:
        ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        ao.quantize_(model.get_decoder(), ao.Int8WeightOnlyConfig())
    plain = logits(model, batch)
    with apply_sar(model, SAR):
        got = logits(model, batch)
        assert answers(model, batch).shape == (2, 4)
    assert (got - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert (got - plain).abs().mean() > 0.1 * exact.abs().mean()


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.1), (8, 0.2)])
def test_bitsandbytes_models(bits, bound, tmp_path):
    """Against the dequantised twin: on a CPU bitsandbytes computes in bf16 with 4 bits, in int8 and fp16 with 8."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    llava(intermediate_size=128).save_pretrained(tmp_path)  # 4 bit comes in blocks of 64 inputs; the tower has 32
    batch = llava_batch([1, 2])
    real = batch["attention_mask"].bool()
    how = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    load = lambda: AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=how, device_map="cpu", dtype=torch.float32
    )
    model, twin = load(), load().dequantize()
    assert {4: torch.uint8, 8: torch.int8}[bits] == model.get_decoder().layers[0].self_attn.q_proj.weight.dtype
    plain = logits(model, batch)[real]
    with apply_sar(model, SAR), apply_sar(twin, SAR):
        got, want = logits(model, batch)[real], logits(twin, batch)[real]
        assert answers(model, batch).shape == (2, 4)
    assert (got - want).abs().mean() < bound * want.abs().mean()
    assert (got - plain).abs().mean() > 2 * bound * want.abs().mean()


# where the weights are


@pytest.mark.everyday(family=["llava"])
def test_accelerate_device_map_and_offload(family, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, batch_of = family
    batch = batch_of([1, 2, 0])
    with apply_sar(model, SAR):
        want, tokens = logits(model, batch), answers(model, batch)
    for dispatch in (
        lambda m: accelerate.cpu_offload(m, execution_device="cpu"),
        lambda m: accelerate.disk_offload(m, tmp_path, execution_device="cpu"),
        lambda m: accelerate.dispatch_model(m, device_map={"": "cpu"}, force_hooks=True),
    ):
        moved = copy.deepcopy(model)
        with apply_sar(dispatch(moved) or moved, SAR):
            assert torch.equal(logits(moved, batch), want)
            assert torch.equal(answers(moved, batch), tokens)


def test_from_pretrained_with_device_map_and_the_implementation_named(family, tmp_path):
    pytest.importorskip("accelerate")
    model, batch_of = family
    batch = batch_of([1, 2])
    with apply_sar(model, SAR):
        model.save_pretrained(tmp_path)
        want = logits(model, batch)
    assert "sar" not in (tmp_path / "config.json").read_text()
    register()
    loaded = type(model).from_pretrained(tmp_path, device_map="cpu", attn_implementation={"text_config": "sar"})
    plain = type(model).from_pretrained(tmp_path)
    assert_close(logits(loaded, batch), logits(plain, batch))  # the name alone re-weights nothing
    with apply_sar(loaded, SAR):
        assert torch.equal(logits(loaded, batch), want)
    assert loaded.config.text_config._attn_implementation == "sar"  # as it was before
    assert plain.config.text_config._attn_implementation == "sdpa"


def test_saved_adapter_is_clean(tmp_path):
    model, batch = llava(), llava_batch([1])
    wrapped, _ = with_adapter(model)
    with apply_sar(wrapped, SAR):
        want = logits(wrapped, batch)
        wrapped.save_pretrained(tmp_path)
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(llava(), tmp_path)
    with apply_sar(loaded, SAR):
        assert torch.equal(logits(loaded, batch), want)


def test_threads_that_generate_on_one_model():
    model = llava()
    batches = [llava_batch([n], first_image=7 * n) for n in (1, 2, 3)]
    with apply_sar(model, SAR):
        want = [answers(model, b, 6) for b in batches]
        got = [[] for _ in batches]

        def work(i):
            for _ in range(3):
                got[i].append(answers(model, batches[i], 6))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for g, w in zip(got, want):
        assert len(g) == 3
        assert all(torch.equal(x, w) for x in g)


@pytest.mark.slow
def test_compiled_model_is_unwrapped_and_trains():
    model, batch = llava(), llava_batch([1, 2])
    config = SARConfig(activation_layer_k=3, beta=BETA, sav_grad=True)
    with apply_sar(model, config):
        want = gradients(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with apply_sar(compiled, config):
        compiled(**batch, labels=batch["input_ids"], use_cache=False)
        model.zero_grad(set_to_none=True)
        compiled(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        for name, p in model.named_parameters():
            if name in want:
                torch.testing.assert_close(p.grad, want[name], rtol=1e-3, atol=1e-5)


# several processes


def _train(rank, world, kind, init_file, results):
    """Two ranks, a sample each: averaged gradients must be those of the batch of both in one process."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    try:
        model, batch_of = (llava(), llava_batch) if kind != "fsdp-qwen" else (qwen2_5_vl(), qwen_batch)
        model.train()
        config = SARConfig(activation_layer_k=3, beta=BETA, sav_grad=True)
        handle = None
        if kind == "ddp":
            # LLaVA's last vision block feeds nothing
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            handle = apply_sar(wrapped, config)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            handle = apply_sar(model, config)
            mesh = init_device_mesh("cpu", (world,))
            for layer in model.get_decoder().layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        batch = {k: v for k, v in batch_of([1], first_image=rank).items() if k != "attention_mask"}
        wrapped(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found = {}
        for name, p in model.named_parameters():
            if p.grad is not None:
                grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                found[name.removeprefix("module.")] = grad.clone()
        with torch.no_grad():
            out = wrapped(**batch, use_cache=False).logits
        handle.remove()
        if rank == 0:
            torch.save({"grads": found, "logits": out}, results)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.everyday(kind=["ddp"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp-qwen"])
def test_two_processes_equal_one(kind, tmp_path):
    results = tmp_path / "results.pt"
    arguments = (2, kind, tmp_path / "rendezvous", results)
    multiprocessing.start_processes(_train, arguments, nprocs=2, start_method="forkserver")
    got = torch.load(results)
    model, batch_of = (llava(), llava_batch) if kind != "fsdp-qwen" else (qwen2_5_vl(), qwen_batch)
    model.train()
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, sav_grad=True)):
        each = []
        for rank in range(2):
            batch = {k: v for k, v in batch_of([1], first_image=rank).items() if k != "attention_mask"}
            each.append(gradients(model, batch))
            if rank == 0:
                assert_close(got["logits"], logits(model, batch))
    for name in each[0]:
        want = (each[0][name] + each[1][name]) / 2
        assert (got["grads"][name] - want).abs().max() <= 1e-4 * want.abs().max() + 1e-6, name
