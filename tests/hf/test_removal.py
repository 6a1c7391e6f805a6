"""What else sets attention functions or patches classes while SAR is on: no silent loss, and removal is exact."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

from sar_fast import SARConfig, apply_sar, patch_model_for_sar, remove_sar
from sar_fast.hf.features import norms_on
from tests.hf.tiny import CASES, MODELS, llava, llava_batch, qwen2_5_vl

SAR = SARConfig(activation_layer_k=3, beta=0.02)
FEATURES = ("get_image_features", "get_video_features")


@pytest.fixture(params=list(MODELS))
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# set_attn_implementation


@pytest.mark.parametrize("request_", ["sdpa", "eager", {"text_config": "sdpa"}])
def test_another_attention_under_sar_is_an_error(family, request_):
    model, batch_of = family
    handle = apply_sar(model, SAR)
    model.set_attn_implementation(request_)
    for call in (lambda: logits(model, batch_of([1])), lambda: model.generate(**batch_of([1]), max_new_tokens=2)):
        with pytest.raises(RuntimeError, match=r"'(sdpa|eager)'.*set_attn_implementation.*remove.*apply_sar"):
            call()
    handle.remove()


def implementations(model):
    return [
        model.config._attn_implementation,
        *(getattr(model.config, name)._attn_implementation for name in ("text_config", "vision_config")),
    ]


def test_removal_keeps_what_the_user_set_meanwhile(family):
    model, batch_of = family
    batch = batch_of([1, 0])
    real = batch["attention_mask"].bool()
    plain = logits(model, batch)[real]
    handle = apply_sar(model, SAR)
    model.set_attn_implementation("eager")
    handle.remove()
    assert implementations(model) == ["eager"] * 3
    torch.testing.assert_close(logits(model, batch)[real], plain, rtol=1e-4, atol=1e-4)
    with apply_sar(model, SAR):
        assert not torch.allclose(logits(model, batch)[real], plain, atol=1e-2)
    assert implementations(model) == ["eager"] * 3


def test_removal_restores_the_text_model_alone(family):
    model, batch_of = family
    batch = batch_of([1, 0])
    plain = logits(model, batch)
    handle = apply_sar(model, SAR)
    want = logits(model, batch)
    model.set_attn_implementation({"vision_config": "eager"})
    torch.testing.assert_close(logits(model, batch), want, rtol=1e-4, atol=1e-4)  # SAR is still on
    handle.remove()
    assert implementations(model) == ["sdpa", "sdpa", "eager"]
    torch.testing.assert_close(logits(model, batch), plain, rtol=1e-4, atol=1e-4)


def test_sar_goes_on_when_its_name_is_set_again(family):
    model, batch_of = family
    batch = batch_of([1, 0])
    with apply_sar(model, SAR):
        want = logits(model, batch)
        model.set_attn_implementation({"text_config": "sdpa"})
        model.set_attn_implementation({"text_config": "sar"})
        assert torch.equal(logits(model, batch), want)
    assert implementations(model) == ["sdpa"] * 3


# patch_model_for_sar


@pytest.mark.parametrize("use_sar", ["False", "True", None, 1])
def test_use_sar_must_be_a_bool(use_sar):
    with pytest.raises(TypeError, match=rf"use_sar must be a bool; got {type(use_sar).__name__}"):
        patch_model_for_sar(llava(), use_sar=use_sar)


def test_use_sar_false_means_without_sar():
    model, batch = llava(), llava_batch([1])
    plain = logits(model, batch)
    assert patch_model_for_sar(model, use_sar=False) is None  # nothing to remove
    patch_model_for_sar(model, sar_activation_layer_k=2, sar_beta=0.02)
    assert patch_model_for_sar(model, use_sar=False) is None
    assert torch.equal(logits(model, batch), plain)
    with pytest.raises(ValueError, match="model must be one that SAR is applied to; got one without"):
        remove_sar(model)


# the class that every model of a type shares


def of_own_class(model):
    """The model with a base model whose class no other test's model has, under a class with the features unwrapped.

    A model of another test that SAR was never removed from leaves its class wrapped.
    """
    base = model.base_model
    cls = type(base)
    ours = {n: getattr(cls, n) for n in FEATURES if hasattr(getattr(cls, n, None), "_sar_watches")}
    methods = {name: method.__wrapped__ for name, method in ours.items()}
    bare = type(cls.__name__, (cls,), {"__module__": __name__, **methods})
    base.__class__ = type(cls.__name__, (bare,), {"__module__": __name__})
    return model, type(base)


def watched(cls):
    return [name for name in FEATURES if name in cls.__dict__]


@pytest.mark.parametrize("make", [llava, qwen2_5_vl])
def test_removal_leaves_the_class_as_it_was(make):
    model, cls = of_own_class(make())
    before = dict(cls.__dict__)
    handle = apply_sar(model, SAR)
    assert watched(cls)
    handle.remove()
    assert dict(cls.__dict__) == before
    own = cls.get_image_features
    cls.get_image_features = own  # now the class has the attribute itself
    apply_sar(model, SAR).remove()
    assert cls.__dict__["get_image_features"] is own


def test_removal_leaves_the_class_of_every_family(case):
    model, cls = of_own_class(case.make())
    handle = apply_sar(model, SARConfig(activation_layer_k=1))
    assert watched(cls)
    handle.remove()
    assert not watched(cls)
    assert not any(hasattr(getattr(cls, name, None), "_sar_watches") for name in FEATURES)


@pytest.fixture(params=[name for name in ("llava", "qwen2_5_vl", "llama4", "gemma4") if name in CASES])
def case(request):
    return CASES[request.param]


def test_the_class_is_restored_by_the_last_of_its_handles():
    """Models made one by one and by deepcopy, removed in any order."""
    model, cls = of_own_class(llava())
    batch = llava_batch([1])
    plain = logits(model, batch)
    apply_sar(model, SAR)
    want = logits(model, batch)
    clone = copy.deepcopy(model)
    other = llava()
    other.base_model.__class__ = cls
    apply_sar(other, SAR)
    remove_sar(model)
    for live in (clone, other):
        assert torch.equal(logits(live, batch), want)
        live.generate(**batch, max_new_tokens=2)  # reads the pictures before the forward pass
    remove_sar(other)
    assert torch.equal(logits(clone, batch), want)
    remove_sar(clone)
    assert watched(cls) == []
    for one in (model, clone, other):
        assert torch.equal(logits(one, batch), plain)


def test_a_copy_made_after_removal_watches_nothing():
    model, cls = of_own_class(llava())
    handle = apply_sar(model, SAR)
    handle.remove()
    kept = copy.deepcopy(handle)
    assert watched(cls) == []
    kept.remove()


def test_a_model_that_is_gone_does_not_count():
    model, cls = of_own_class(llava())
    other = llava()
    other.base_model.__class__ = cls
    apply_sar(other, SAR)
    handle = apply_sar(model, SAR)
    del other
    gc.collect()
    handle.remove()
    assert watched(cls) == []


def test_a_patch_by_others_outlives_sar():
    model, cls = of_own_class(llava())
    handle = apply_sar(model, SAR)
    inner = cls.get_image_features
    cls.get_image_features = theirs = lambda self, *args, **kwargs: inner(self, *args, **kwargs)
    handle.remove()
    assert cls.__dict__["get_image_features"] is theirs
    logits(model, llava_batch([1]))


def test_threads_apply_and_remove_on_models_of_one_class():
    models = [of_own_class(llava())[0]]
    cls = type(models[0].base_model)
    for _ in range(3):
        models.append(llava())
        models[-1].base_model.__class__ = cls
    batch = llava_batch([1])
    with apply_sar(models[0], SAR):
        want = logits(models[0], batch)
    failures = []

    def work(model):
        try:
            for _ in range(8):
                with apply_sar(model, SAR):
                    assert torch.equal(logits(model, batch), want)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert watched(cls) == []


def test_data_parallel_replicas_weigh_as_their_model():
    """A replica has its model's attributes, SAR's among them, and other weights."""
    model, batch = llava(), llava_batch([1])
    with apply_sar(model, SAR):
        want = logits(model, batch)
        base = model.base_model
        replica = base._replicate_for_data_parallel()
        with torch.no_grad():
            features = replica.get_image_features(batch["pixel_values"], return_dict=True)
            got = base.get_image_features(batch["pixel_values"], return_dict=True)
        assert torch.equal(*(norms_on(x, "image", SAR.prior_source) for x in (features, got)))
        assert torch.equal(logits(model, batch), want)
