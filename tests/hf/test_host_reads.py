"""A GPU is waited for once a prompt, for all that SAR must know of its values, and never by a decode step.

The device is pretended, so that branches for GPUs are taken; what waits is counted by the operators that would.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from sar_fast import SARConfig, apply_sar
from tests.hf.operators import HostReads
from tests.hf.pretend_devices import FIRST, Devices
from tests.hf.tiny import CASES, VERSION, llava, llava_batch

SAR = SARConfig(activation_layer_k=3, beta=0.02, backend="torch")
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "mistral3", "lfm2_vl"]
PATTERNED = ["gemma3", "gemma4", "paligemma", "paligemma2", "llama4", "cohere2_vision", "aya_vision", "exaone4_5"]
TILED = ["llava_next", "llava_onevision"]


def on_device(devices, model, batch):
    """The batch on the pretended device, where the model is put."""
    for tensor in (*model.parameters(), *model.buffers()):
        devices.put(tensor, FIRST)
    return devices.inputs(batch)


def reads_of_passes(model, run):
    """What every pass of ``run`` reads, with what is read before it, such as pictures'; and ``run``'s result."""
    seen, reads = [Counter()], HostReads()
    hook = model.base_model.register_forward_hook(lambda *_: seen.append(Counter(reads.found)))
    with reads:
        result = run()
    hook.remove()
    return [now - before for before, now in itertools.pairwise(seen)], result


@pytest.mark.everyday(pictures=[[1, 2, 0]], cache=["dynamic"])
@pytest.mark.everyday(name=["llava"])
@pytest.mark.parametrize("pictures", [[1, 2, 0], [1]], ids=["padded", "whole"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_generation_reads_once_a_prompt(name, cache, pictures):
    if cache == "static" and VERSION < (5, 9):
        pytest.skip("its counter and positions leave the devices that exist in name only")
    model, batch = CASES[name].make(), CASES[name].batch(pictures)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    with apply_sar(model, SAR):
        want = model.generate(**batch, **options)
        with Devices() as devices:
            batch = on_device(devices, model, batch)
            (prompt, *steps), got = reads_of_passes(model, lambda: model.generate(**batch, **options))
    assert torch.equal(got, want)
    assert prompt == {"host_facts.py:__getitem__": 1}
    assert steps == [{}] * 3


@pytest.mark.everyday(pictures=[[1, 2, 0]], name=("gemma3", "gemma4", "paligemma", "llama4"))
@pytest.mark.parametrize("pictures", [[1, 2, 0], [1]], ids=["padded", "whole"])
@pytest.mark.parametrize("name", [name for name in PATTERNED if name in CASES])
def test_windows_chunks_and_blocks_ask_no_more(name, pictures):
    model, batch = CASES[name].make(), CASES[name].batch(pictures)
    config = SAR.replace(activation_layer_k=1)
    with apply_sar(model, config):
        want = model.generate(**batch, max_new_tokens=3, do_sample=False)
        with Devices() as devices:
            batch = on_device(devices, model, batch)
            run = lambda: model.generate(**batch, max_new_tokens=3, do_sample=False)
            (prompt, *steps), got = reads_of_passes(model, run)
    assert torch.equal(got, want)
    assert prompt == {"host_facts.py:__getitem__": 1}
    assert not any(steps)


@pytest.mark.parametrize("name", TILED)
def test_tiles_ask_once_for_the_sizes_of_all_pictures(name):
    """They are packed by the model's own functions, which need them on the host, and how many each row has."""
    model, batch = CASES[name].make(), CASES[name].batch([1, 2, 0])
    if name == "llava_onevision":
        batch["batch_num_images"] = torch.tensor([1, 1, 1])  # each tiled, as without
    with apply_sar(model, SAR), torch.no_grad():
        want = model(**batch).logits
        with Devices() as devices:
            batch = on_device(devices, model, batch)
            (found,), got = reads_of_passes(model, lambda: model(**batch).logits)
    torch.testing.assert_close(got, want)
    assert found == {"host_facts.py:__getitem__": 2}  # these, and what all families are asked


def packed_row(with_lengths):
    rows = [llava_batch([n], first_image=i) for i, n in enumerate([1, 2])]
    lengths = [row["input_ids"].shape[1] for row in rows]
    batch = {
        "input_ids": torch.cat([row["input_ids"] for row in rows], 1),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return batch | ({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends} if with_lengths else {})


@pytest.mark.parametrize("with_lengths", [False, True], ids=["positions", "lengths"])
def test_a_packed_row_is_read_once(with_lengths):
    model, batch = llava(), packed_row(with_lengths)
    with apply_sar(model, SAR), torch.no_grad():
        want = model(**batch, use_cache=False).logits
        with Devices() as devices:
            batch = on_device(devices, model, batch)
            (found,), got = reads_of_passes(model, lambda: model(**batch, use_cache=False).logits)
    torch.testing.assert_close(got, want)
    assert found == {"host_facts.py:__getitem__": 1}


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_features_that_are_not_finite_are_an_error_there_too(how):
    model, batch = llava(), llava_batch([1, 2])
    batch["pixel_values"][1] = torch.nan
    with apply_sar(model, SAR), Devices() as devices:
        batch = on_device(devices, model, batch)
        with pytest.raises(ValueError, match="pixel_values: vision features are not finite"):
            model(**batch) if how == "forward" else model.generate(**batch, max_new_tokens=2)


def test_a_mask_that_a_model_changes_is_an_error():
    """A prompt's mask is read before the model runs; what the model makes of it must hide no more."""
    model, batch = llava(), llava_batch([1])

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[:, :2] = 0
        return args, {**kwargs, "attention_mask": mask}

    with apply_sar(model, SAR), Devices() as devices:
        batch = on_device(devices, model, batch)
        model.get_decoder().register_forward_pre_hook(hide, with_kwargs=True)
        with pytest.raises(ValueError, match="attention_mask: the model hides positions"):
            model(**batch)
