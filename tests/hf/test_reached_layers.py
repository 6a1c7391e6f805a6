"""Every re-weighted layer of a pass attends through SAR, on the whole of the pass, or the pass is an error."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import multiprocessing, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from sar_fast import SARConfig, apply_sar, remove_sar
from tests.hf.test_removal import of_own_class, watched
from tests.hf.test_wrappers import assert_close, gradients, logits
from tests.hf.tiny import CASES, MODELS, llava, llava_batch

SAR = SARConfig(activation_layer_k=3, beta=0.02)


class Shell(nn.Module):
    """A wrapper that hides what it holds: neither reads nor writes are forwarded."""

    def __init__(self, inner):
        super().__init__()
        self.inside = nn.ModuleList([inner])

    def forward(self, *args, **kwargs):
        return self.inside[0](*args, **kwargs)


class Mirror(Shell):
    """A wrapper that forwards reads, but not writes, as FSDP1's does."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside")[0], name)


WRAPPERS = {
    "reentrant": lambda m: checkpoint_wrapper(m, CheckpointImpl.REENTRANT),
    "nonreentrant": lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
    "mirror": Mirror,
    "shell": Shell,
    "twice": lambda m: Mirror(Shell(m)),
}


def decoder_layers(model):
    return model.get_decoder().layers


@pytest.fixture(params=list(MODELS))
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch([1, 2, 0])


@pytest.mark.everyday(family=["llava"])
@pytest.mark.everyday(wrapper=["twice"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_wrapped_attention_is_reweighted(family, wrapper, when):
    model, batch = family
    with apply_sar(model, SAR):
        want, want_gradients = logits(model, batch), gradients(model, batch)
    handle = apply_sar(model, SAR) if when == "after" else None
    for layer in decoder_layers(model):
        layer.self_attn = WRAPPERS[wrapper](layer.self_attn)
    plain = None if handle else logits(model, batch)
    handle = handle or apply_sar(model, SAR)
    assert_close(logits(model, batch), want)
    if wrapper != "reentrant":  # its inputs are keyword arguments, which have no gradients there
        got = gradients(model, batch)
        assert len(got) == len(want_gradients)
        for pair in zip(got.values(), want_gradients.values()):
            assert_close(*pair)
    handle.remove()
    if plain is not None:
        assert torch.equal(logits(model, batch), plain)
    assert not any("_sar_layer" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("wrapper", ["nonreentrant", "mirror", "shell"])
def test_wrapped_decoder_layers_count_as_layers(family, wrapper):
    model, batch = family
    with apply_sar(model, SAR) as handle:
        want, layers = logits(model, batch), handle.sar_layers
    text = model.get_decoder()
    for index in (1, 3):
        text.layers[index] = WRAPPERS[wrapper](text.layers[index])
    with apply_sar(model, SAR) as handle:
        assert handle.sar_layers == layers
        assert_close(logits(model, batch), want)


def _sharded(rank, init_file, results):
    """FSDP of PyTorch 1 around every attention, in a process of its own."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=1)
    try:
        model, batch = llava(), llava_batch([1, 2, 0])
        for layer in decoder_layers(model):
            layer.self_attn = FullyShardedDataParallel(layer.self_attn, device_id=torch.device("cpu"))
        with apply_sar(model, SAR):
            torch.save(logits(model, batch), results)
    finally:
        torch.distributed.destroy_process_group()


def test_attention_under_fsdp1_is_reweighted(tmp_path):
    results = tmp_path / "logits.pt"
    arguments = (tmp_path / "rendezvous", results)
    multiprocessing.start_processes(_sharded, arguments, nprocs=1, start_method="forkserver")
    model, batch = llava(), llava_batch([1, 2, 0])
    with apply_sar(model, SAR):
        assert_close(torch.load(results), logits(model, batch))


def replaced(attention):
    """A forward of another library: right, with kernels of its own."""

    def forward(hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        B, S, _ = hidden_states.shape
        q, k, v = (
            p(hidden_states).view(B, S, -1, attention.head_dim).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attention.o_proj(out.transpose(1, 2).reshape(B, S, -1)), None

    return forward


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("generating", [False, True])
def test_a_forward_that_others_replaced_is_an_error(when, generating):
    model, batch = llava(), llava_batch([1])
    handle = apply_sar(model, SAR) if when == "after" else None
    for index in (1, 3):
        attention = decoder_layers(model)[index].self_attn
        attention.forward = replaced(attention)
    handle = handle or apply_sar(model, SAR)
    with pytest.raises(RuntimeError, match=r"attention layers \[1, 3\] of the re-weighted \[1, 2, 3\]"):
        model.generate(**batch, max_new_tokens=2) if generating else logits(model, batch)
    handle.reconfigure(SAR.replace(activation_layer_k=0))
    logits(model, batch)
    handle.reconfigure(SAR)
    logits(model, llava_batch([0]))  # no picture in sight: nothing is to be re-weighted


def test_a_skipped_layer_is_an_error():
    model, batch = llava(), llava_batch([1])
    apply_sar(model, SAR)
    decoder_layers(model)[2].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match=r"attention layers \[2\] of"):
        logits(model, batch)


def test_attention_class_patched_by_others_is_an_error():
    model, batch = llava(), llava_batch([1])
    cls = type(decoder_layers(model)[0].self_attn)
    before = cls.forward
    apply_sar(model, SAR)
    try:
        cls.forward = lambda self, *args, **kwargs: replaced(self)(*args, **kwargs)
        with pytest.raises(RuntimeError, match=r"attention layers \[1, 2, 3\]"):
            logits(model, batch)
    finally:
        cls.forward = before


def test_compiled_decoder_layers_are_seen_to_attend():
    model, batch = llava(), llava_batch([1])
    with apply_sar(model, SAR):
        want = logits(model, batch)
    for layer in decoder_layers(model):
        layer.compile(backend="eager")
    with apply_sar(model, SAR):
        assert_close(logits(model, batch), want)


# a slice of the pass


def test_a_text_model_that_sees_a_slice_is_an_error(family):
    model, batch = family
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {
                **kwargs,
                "inputs_embeds": kwargs["inputs_embeds"][:, : kwargs["inputs_embeds"].shape[1] // 2],
                "position_ids": None,
                "attention_mask": None,
            },
        ),
        with_kwargs=True,
    )
    logits(model, batch)
    apply_sar(model, SAR)
    with pytest.raises(RuntimeError, match=r"Attention \d attends with 3 x \d+ .* of a pass that has 3 x \d+"):
        logits(model, batch)


def test_attention_that_sees_some_rows_is_an_error():
    model, batch = llava(), llava_batch([1, 1])
    attention = decoder_layers(model)[-1].self_attn
    original = attention.forward

    def first_row(hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        out, _ = original(hidden_states[:1], position_embeddings=position_embeddings, attention_mask=None, **kwargs)
        return out.expand_as(hidden_states), None

    attention.forward = first_row
    logits(model, batch)
    apply_sar(model, SAR)
    with pytest.raises(RuntimeError, match="attends with 1 x"):
        logits(model, batch)


# PEFT's copies


def shake(wrapped, adapter, seed):
    """Move the saved copies of ``adapter`` away from the original."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if f"modules_to_save.{adapter}" in name:
                p += 0.05 * torch.randn(p.shape, generator=generator)


@pytest.mark.everyday(saved=["vision_tower"], first=["sar"])
@pytest.mark.everyday(saved=["self_attn"], first=["peft"])
@pytest.mark.parametrize("saved", ["vision_tower", "self_attn", "multi_modal_projector"])
@pytest.mark.parametrize("first", ["sar", "peft"])
def test_copies_that_peft_keeps_are_reweighted(saved, first):
    peft = pytest.importorskip("peft")
    model, batch = llava(), llava_batch([1, 2])
    real = batch["attention_mask"].bool()
    if first == "sar":
        apply_sar(model, SAR)
    targets = r".*language_model.*\.gate_proj"
    options = {"r": 2, "target_modules": targets, "modules_to_save": [saved], "init_lora_weights": True}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    wrapped.add_adapter("second", peft.LoraConfig(**options))
    wrapped.eval()
    shake(wrapped, "default", 3)
    shake(wrapped, "second", 4)
    if first == "peft":
        apply_sar(wrapped, SAR)
    seen = []
    for adapter in ("default", "second", None):
        if adapter is None:
            with wrapped.disable_adapter():
                got = logits(wrapped, batch)[real]
            twin = llava()
        else:
            wrapped.set_adapter(adapter)
            got = logits(wrapped, batch)[real]
            twin = llava()
            weights = twin.state_dict()
            for name, p in wrapped.named_parameters():
                if f"modules_to_save.{adapter}." in name:
                    plain = name.removeprefix("base_model.model.").replace(f"modules_to_save.{adapter}.", "")
                    weights[plain] = p.detach().clone()
            twin.load_state_dict(weights)
        with apply_sar(twin, SAR):
            assert_close(got, logits(twin, batch)[real])
        seen.append(got)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(seen))
    remove_sar(wrapped)
    assert not any("_sar_layer" in m.__dict__ for m in wrapped.modules())
    hooks = [h for m in wrapped.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any("sar_fast" in h.__module__ for h in hooks)
    with wrapped.disable_adapter():
        assert_close(logits(wrapped, batch)[real], logits(llava(), batch)[real])


def test_an_adapter_merged_under_sar_leaves_a_model_with_sar():
    peft = pytest.importorskip("peft")
    model, batch = llava(), llava_batch([1, 2])
    real = batch["attention_mask"].bool()
    plain = logits(model, batch)[real]
    apply_sar(model, SAR)
    want = logits(model, batch)[real]
    options = {"target_modules": r".*language_model.*\.gate_proj", "modules_to_save": ["vision_tower", "self_attn"]}
    merged = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).merge_and_unload()
    assert_close(logits(merged, batch)[real], want)
    remove_sar(merged)
    assert_close(logits(merged, batch)[real], plain)


# copies of parts, and pickles


@pytest.mark.parametrize("part", ["vision_tower", "language_model", "multi_modal_projector", ""])
def test_a_copy_of_a_part_carries_no_handle(part):
    (model, cls), batch = of_own_class(llava()), llava_batch([1])
    handle = apply_sar(model, SAR)
    want = logits(model, batch)
    original = model.base_model.get_submodule(part)
    seen = {}
    twin = copy.deepcopy(original, seen)
    assert id(handle) not in seen or seen[id(handle)] is None
    assert id(model) not in seen
    assert torch.equal(logits(model, batch), want)
    handle.remove()
    assert watched(cls) == []
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in original.parameters())


def test_a_copied_vision_tower_runs_by_itself():
    model, batch = llava(), llava_batch([1])
    apply_sar(model, SAR)
    twin = copy.deepcopy(model.model.vision_tower)
    got = twin(batch["pixel_values"]).last_hidden_state
    assert torch.equal(got, model.model.vision_tower(batch["pixel_values"]).last_hidden_state)


@pytest.mark.everyday(name=("llava", "llava_next", "qwen2_5_vl", "gemma3"))
@pytest.mark.parametrize("name", list(CASES))
def test_a_model_under_sar_can_be_pickled(name):
    case = CASES[name]
    model, batch = case.make(), case.batch([1, 2])
    real = batch["attention_mask"].bool()
    apply_sar(model, SARConfig(activation_layer_k=2, beta=case.beta))
    twin = pickle.loads(pickle.dumps(model))  # later, transformers' own hooks on outputs may be local functions
    want = logits(model, batch)[real]
    assert torch.equal(logits(twin, batch)[real], want)
    remove_sar(twin)
    remove_sar(model)
    assert torch.equal(logits(twin, batch)[real], logits(model, batch)[real])
    assert (logits(twin, batch)[real] - want).abs().max() > 1e-3


def test_a_model_that_ran_may_not_be_pickled_without_sar_either():
    model = llava()
    pickle.dumps(model)
    logits(model, llava_batch([1]))
    with pytest.raises(AttributeError, match="output_capturing_hook"):
        pickle.dumps(model)
