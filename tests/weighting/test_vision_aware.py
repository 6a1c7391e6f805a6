"""How far a picture moves each head's output, and heads that are reinforced by it, against eager attention.

The oracle runs one row at a time, without padding, in an attention function of its own that loops over heads.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from sar_fast.hf import UnsupportedModelError
from sar_fast.hf.structure import find_attention_modules
from sar_fast.lab.measure.head_divergence import head_divergence, last_head_outputs, last_positions
from sar_fast.method.values import Statistics
from sar_fast.method.weighting.protocol import head_weights, no_statistics
from sar_fast.method.weighting.registry import weighting_to_dict
from sar_fast.weighting import ReinforceHeads, find_weighting
from tests.hf.tiny import CASES, IMAGE, llava, llava_batch
from tests.hf.tiny.base import pad

pytestmark = pytest.mark.usefixtures("one_thread")
MARKERS = (97, 96)  # around a picture's tokens
# layouts of a head's output: GQA, mrope, soft caps and windows, latent values, another projection's name, two head dims
FAMILIES = ("llava", "qwen2_vl", "paligemma2", "kimi_k25", "lfm2_vl", "gemma4")


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


def blind(batch: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The same questions without their pictures, padded anew."""
    rows = [ids[real.bool()].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"])]
    inputs = pad([[t for t in row if t not in (IMAGE, *MARKERS)] for row in rows], side)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in batch:
            inputs[name] = torch.zeros_like(inputs["input_ids"]).to(batch[name].dtype)
    return inputs


@contextlib.contextmanager
def eager_heads(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Within the block text layers attend in loops, and layer -> (H, Dv), the outputs of the last position, is kept."""
    attending = [id(m) for layer in find_attention_modules(model) for m in layer.modules()]
    seen: dict[int, Tensor] = {}

    def attend(module, query, key, value, attention_mask, scaling, softcap=None, **_):
        B, H, S, _ = query.shape
        out = query.new_zeros(B, H, S, value.shape[-1])
        for h in range(H):
            g = h * key.shape[1] // H
            s = query[:, h] @ key[:, g].mT * scaling
            s = torch.tanh(s / softcap) * softcap if softcap else s
            out[:, h] = torch.softmax(s + attention_mask[:, 0, :, : s.shape[-1]], -1) @ value[:, g]
        seen[attending.index(id(module))] = out[0, :, -1]
        return out.transpose(1, 2), None

    AttentionInterface.register("eager_heads", attend)
    AttentionMaskInterface.register("eager_heads", eager_mask)
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": "eager_heads"})
    try:
        yield seen
    finally:
        model.set_attn_implementation({"text_config": before})


def oracle(model: nn.Module, row: dict[str, Tensor]) -> list[Tensor]:
    """(H, Dv) of each attending layer in depth order, for one row without padding."""
    with eager_heads(model) as seen, torch.no_grad():
        model(**row, use_cache=False)
    return [seen[at] for at in sorted(seen)]


def hooks_of(model: nn.Module, batch: dict[str, Tensor]) -> list[object]:
    """All that are there after a pass: the first one puts hooks of transformers on the model, for good."""
    with torch.no_grad():
        model(**batch)
    return [
        hook for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks) for hook in hooks.values()
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_divergence(name, side):
    case, images = CASES[name], [1, 2]
    model, cast = case.make(), dict
    if name != "kimi_k25":  # its experts have no fp64
        model, cast = model.double(), double
    batch = cast(case.batch(images, side))
    rows = [cast(case.batch([n], side, first_image=sum(images[:b]))) for b, n in enumerate(images)]
    without = blind(batch, side)
    assert not bool(batch["attention_mask"].all())
    assert not bool(without["attention_mask"].all())
    before = hooks_of(model, batch)
    found = head_divergence(model, batch, without)
    assert hooks_of(model, batch) == before
    assert list(found) == list(range(len(case.attending)))  # counted among the layers that attend
    outputs = last_head_outputs(model, batch)
    for b, row in enumerate(rows):
        seen, not_seen = oracle(model, row), oracle(model, blind(row, side))
        for layer, (x, y) in enumerate(zip(seen, not_seen)):
            assert torch.allclose(outputs[layer][b], x, atol=1e-4)  # rotary embeddings are fp32 in every model
            expected = torch.tensor([math.dist(x[h].tolist(), y[h].tolist()) for h in range(4)])
            assert found[layer].shape == (2, 4)
            assert found[layer].dtype == model.dtype
            assert torch.allclose(found[layer][b], expected.to(model.dtype), atol=1e-4)
            assert (expected > 0.01).all(), "a picture that moves nothing would prove nothing"


@pytest.mark.everyday(name=["llava", "qwen2_5_vl", "gemma3", "lfm2_vl", "kimi_k25"])
@pytest.mark.parametrize("name", CASES)
def test_every_family(name):
    """Each has a projection that is found, with heads of one width."""
    case = CASES[name]
    found = head_divergence(case.make(), case.batch([1, 2]), case.batch([0, 0]))
    assert [(layer, x.shape) for layer, x in found.items()] == [(n, (2, 4)) for n in range(len(case.attending))]
    assert all((x > 0).all() for x in found.values())


def test_what_passes_through_the_model_is_not_changed():
    model, batch = llava(), llava_batch([1, 1])
    with torch.no_grad():
        expected = model(**batch).logits
        outputs = []
        hook = (
            model.get_decoder()
            .layers[1]
            .self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0].clone()))
        )
        found = head_divergence(model, batch, blind(batch, "left"))
        hook.remove()
        assert torch.equal(model(**batch).logits, expected)
    last = [x[:, -1].unflatten(-1, (4, 16)) for x in outputs]  # padded on the left
    assert torch.equal(found[1], (last[0] - last[1]).norm(dim=-1))
    assert not found[1].requires_grad
    assert found[1].dtype == torch.float32


def test_half_precision_is_measured_in_fp32():
    model, batch = llava(), llava_batch([1, 1])
    exact = head_divergence(model, batch, blind(batch, "left"))
    half = {n: x.bfloat16() if x.is_floating_point() else x for n, x in batch.items()}
    found = head_divergence(model.bfloat16(), half, blind(batch, "left"))
    for layer, x in found.items():
        assert x.dtype == torch.float32
        assert torch.allclose(x, exact[layer], rtol=0.1, atol=0.05)


def test_without_a_mask_nothing_is_padding():
    model, batch = llava().double(), double(llava_batch([1]))
    without = blind(batch, "left")
    bare = [{n: x for n, x in inputs.items() if n != "attention_mask"} for inputs in (batch, without)]
    expected, found = head_divergence(model, batch, without), head_divergence(model, *bare)
    assert all(torch.allclose(found[layer], expected[layer]) for layer in expected)
    embedded = {"inputs_embeds": model.get_input_embeddings()(without["input_ids"])}
    found = head_divergence(model, batch, embedded)
    assert all(torch.allclose(found[layer], expected[layer]) for layer in expected)


def test_surges_are_no_divergence():
    """He et al., equation 6: where the output without the picture is large as well."""
    model, batch = llava().double(), double(llava_batch([1, 2, 1, 3]))
    without = blind(batch, "left")
    plain = head_divergence(model, batch, without)
    zeroed = head_divergence(model, batch, without, zero_surges=True)
    activation = {layer: x.square().sum(-1) for layer, x in last_head_outputs(model, without).items()}
    surges = 0
    for layer, divergence in plain.items():
        for b in range(4):
            d, a = divergence[b].tolist(), activation[layer][b].tolist()
            for h in range(4):
                large = [x[h] > sum(x) / 4 + math.sqrt(sum((y - sum(x) / 4) ** 2 for y in x) / 3) for x in (d, a)]
                assert zeroed[layer][b, h] == (0 if all(large) else d[h])
                surges += all(large)
    assert 0 < surges < 16


def adapted(**options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llava().double(), peft.LoraConfig(**options)).eval()


WRAPPED = {
    "adapter": lambda: adapted(target_modules=["q_proj", "o_proj"]),
    "copies": lambda: adapted(target_modules=["fc1"], modules_to_save=["self_attn"]),
    "compiled": lambda: torch.compile(llava().double(), backend="eager"),
}


@pytest.mark.everyday(how=["adapter", "copies"])
@pytest.mark.parametrize("how", WRAPPED)
def test_heads_of_a_wrapped_model(how):
    model, batch = llava().double(), double(llava_batch([1, 2]))
    without = blind(batch, "left")
    expected = head_divergence(model, batch, without)
    found = head_divergence(WRAPPED[how](), batch, without)
    assert all(torch.allclose(found[layer], expected[layer]) for layer in expected)


# errors


@pytest.mark.parametrize("inside", ["self_attn.q_proj", "mlp"])
def test_hooks_go_after_an_error(inside):
    model, batch = llava(), llava_batch([1])
    before = hooks_of(model, batch)

    def fail(*_):
        raise KeyError("this layer is broken")

    hook = model.get_submodule(f"model.language_model.layers.2.{inside}").register_forward_hook(fail)
    with pytest.raises(KeyError, match="this layer is broken"):
        head_divergence(model, batch, blind(batch, "left"))
    hook.remove()
    assert hooks_of(model, batch) == before


def test_hooks_go_where_a_later_layer_has_no_projection():
    model, batch = llava(), llava_batch([1])
    before = hooks_of(model, batch)
    attention = model.get_decoder().layers[3].self_attn
    attention.the_output = attention._modules.pop("o_proj")
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaAttention has no output projection .* q_proj, .* the_output"
    ):
        head_divergence(model, batch, blind(batch, "left"))
    attention.o_proj = attention._modules.pop("the_output")
    assert hooks_of(model, batch) == before


def test_an_attention_that_splits_its_heads():
    """As a rank's share of them does."""
    model, batch = llava(), llava_batch([1])
    attention = model.get_decoder().layers[1].self_attn
    attention.config = copy.copy(attention.config)
    attention.config.num_attention_heads = 8
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaAttention of layer 1 must give .* 8 x 16\); got \(1, 2\d, 64\)"
    ):
        last_head_outputs(model, batch)


def test_an_attention_that_passes_its_projection_by():
    model, batch = llava(), llava_batch([1])
    attention = model.get_decoder().layers[2].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match="LlamaAttention of layer 2, ran no output projection"):
        last_head_outputs(model, batch)


def test_a_model_in_training_mode():
    with pytest.raises(ValueError, match="model must be in eval mode"):
        head_divergence(llava().train(), llava_batch([1]), llava_batch([0]))


def test_other_samples():
    with pytest.raises(ValueError, match="must hold the same samples; got batches of 2 and 1"):
        head_divergence(llava(), llava_batch([1, 1]), llava_batch([0]))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "inputs must have input_ids or inputs_embeds"),
        ([], TypeError, "inputs must be a mapping"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"must have shape .*\(2, 3\) like the tokens; got \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, ValueError, r"attention_mask'\] must have shape"),
        ({"attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}, ValueError, "a sample that is all padding"),
    ],
)
def test_inputs_that_do_not_fit(inputs, error, message):
    if isinstance(inputs, dict) and inputs:
        inputs = {"input_ids": torch.full((2, 3), 5), **inputs}
    with pytest.raises(error, match=message):
        last_head_outputs(llava(), inputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_last_positions(dtype):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]]).to(dtype)
    found = last_positions({"input_ids": torch.zeros(5, 4), "attention_mask": mask})
    assert found.tolist() == [3, 1, 3, 2, 0]
    assert last_positions({"input_ids": None, "inputs_embeds": torch.zeros(2, 7, 16)}).tolist() == [6, 6]


# ReinforceHeads


def of(batch: int, heads: int, dtype=torch.float32) -> Statistics:
    return no_statistics(batch, heads, torch.zeros(1), dtype)


def reinforced(values: list[float], n: int, factor: float) -> list[float]:
    best = sorted(range(len(values)), key=lambda h: (-values[h], h))[:n]
    return [factor if h in best and values[h] > 0 else 1.0 for h in range(len(values))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("share", "n"), [(0.5, 3), (0.34, 2), (1.0, 7), (1, 7), (0.01, 1)])
def test_reinforced_heads(share, n, dtype):
    g = torch.Generator().manual_seed(0)
    divergence = {layer: torch.rand(2, 7, generator=g) for layer in (0, 3)}
    rule = ReinforceHeads(divergence, share, 1.3)
    for layer, x in divergence.items():
        c = head_weights(rule, of(2, 7, dtype), layer)
        assert c.dtype == dtype
        assert c.tolist() == torch.tensor([reinforced(row, n, 1.3) for row in x.tolist()], dtype=dtype).tolist()


@pytest.mark.parametrize("heads", [4, 7, 32])
def test_by_default_the_heads_above_the_median_are_doubled(heads):
    """The paper's rule and alpha."""
    x = torch.rand(5, heads, generator=torch.Generator().manual_seed(heads), dtype=torch.float64)
    c = ReinforceHeads({1: x})(of(5, heads, torch.float64), 1)
    median = x.quantile(0.5, dim=-1, keepdim=True)
    assert torch.equal(c, torch.where(x > median, 2.0, 1.0).double())


def test_heads_that_no_picture_moves_are_not_reinforced():
    c = ReinforceHeads({0: [[0.0, 0.3, 0.0, 0.0], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]]})(of(3, 4), 0)
    assert c.tolist() == [[1, 2, 1, 1], [2, 2, 1, 1], [1, 1, 1, 1]]


def test_a_divergence_for_any_sample():
    rule = ReinforceHeads({0: torch.tensor([0.1, 0.4]), 1: torch.tensor([[0.3, 0.2]])})
    for batch in (1, 5):
        assert head_weights(rule, of(batch, 2), 0).tolist() == [[1, 2]] * batch
        assert head_weights(rule, of(batch, 2), 1).tolist() == [[2, 1]] * batch


def test_layers():
    rule = ReinforceHeads({3: [0.1, 0.4], 1: [0.4, 0.1]})
    with pytest.raises(ValueError, match="must have a divergence of layer 2; got ReinforceHeads with layers 1, 3"):
        rule(of(1, 2), 2)
    with pytest.raises(
        ValueError,
        match="weighting must have no layers for a call without a layer index; got ReinforceHeads with layers 1, 3",
    ):
        rule(of(1, 2), None)
    assert ReinforceHeads({3: [0.1, 0.4]})(of(1, 2), None).tolist() == [[1, 2]]


@pytest.mark.parametrize(("batch", "heads"), [(3, 4), (2, 5), (1, 4)])
def test_calls_that_the_divergence_does_not_fit(batch, heads):
    message = rf"must have a divergence of {heads} heads, for each of the {batch} samples or for any; got .*\(2, 4\)"
    with pytest.raises(ValueError, match=message):
        ReinforceHeads({0: torch.rand(2, 4)})(of(batch, heads), 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": [[0.1]]}, TypeError, "divergence must be a mapping"),
        ({"divergence": {}}, ValueError, "divergence must have at least one layer"),
        ({"divergence": {-1: [0.1]}}, ValueError, "layer indices >= 0 as keys; got -1"),
        ({"divergence": {"first": [0.1]}}, ValueError, "layer indices >= 0 as keys; got 'first'"),
        ({"divergence": {True: [0.1]}}, ValueError, "layer indices >= 0 as keys; got True"),
        ({"divergence": {1: [0.1], "1": [0.1]}}, ValueError, "each layer once; got '1' twice"),
        ({"divergence": {"2": 0.1}}, ValueError, r"divergence\['2'\] must have shape .* got \(\)"),
        ({"divergence": {2: []}}, ValueError, r"divergence\[2\] must have shape"),
        ({"divergence": {2: [[[0.1]]]}}, ValueError, r"divergence\[2\] must have shape"),
        ({"divergence": {2: "abc"}}, TypeError, r"divergence\[2\] must be a tensor or lists of numbers; got str"),
        ({"divergence": {2: [[0.1], [0.1, 0.2]]}}, TypeError, r"divergence\[2\] must be a tensor or lists"),
        (
            {"divergence": {2: torch.ones(2).long()}},
            TypeError,
            r"divergence\[2\] must be floating point; got torch.int64",
        ),
        (
            {"divergence": {2: [0.1, -0.1]}},
            ValueError,
            r"divergence\[2\] must be finite and >= 0; got values from -0.1",
        ),
        ({"divergence": {2: [0.1, math.nan]}}, ValueError, r"divergence\[2\] must be finite and >= 0"),
        ({"share": 0}, ValueError, r"share must be in \(0, 1\]; got 0"),
        ({"share": 1.5}, ValueError, r"share must be in \(0, 1\]"),
        ({"share": "half"}, TypeError, "share must be a number in"),
        ({"factor": math.inf}, ValueError, "factor must be finite"),
        ({"factor": None}, TypeError, "factor must be a number"),
    ],
)
def test_options_that_are_none(options, error, message):
    with pytest.raises(error, match=message):
        ReinforceHeads(**{"divergence": {0: [0.1, 0.2]}, **options})


def test_a_measured_rule_through_json():
    """What was measured on a model is written into a config and read again, bit for bit."""
    model, batch = llava(), llava_batch([1, 2])
    rule = ReinforceHeads(head_divergence(model, batch, blind(batch, "left")), share=0.25, factor=1.5)
    again = find_weighting(json.loads(json.dumps(weighting_to_dict(rule))))
    assert again == rule
    assert hash(again) == hash(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule
    for layer in range(4):
        c = head_weights(rule, of(2, 4), layer)
        assert torch.equal(head_weights(again, of(2, 4), layer), c)
        assert (c == 1.5).sum(-1).tolist() == [1, 1]
        assert not c.requires_grad
    assert rule != ReinforceHeads(rule.divergence, share=0.25)
    assert rule != ReinforceHeads({**rule.divergence, 0: rule.divergence[1]}, share=0.25, factor=1.5)


def test_the_measured_tensor_may_want_a_gradient():
    x = torch.rand(2, 4, requires_grad=True)
    assert not ReinforceHeads({0: x})(of(2, 4), 0).requires_grad
