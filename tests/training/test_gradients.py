"""The logged gradient values are those of the optimizer step, by an oracle that runs forward and backward by hand."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sar_fast.hf.structure import unwrap
from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.data import Collator
from sar_fast.lab.training.gradients import AGGREGATE, L1, PER_LAYER, GradientSparsityCallback
from sar_fast.lab.training.metrics_log import keep_until
from sar_fast.lab.training.projections import _fused_rows, query_and_key_shares
from sar_fast.lab.training.run import build
from tests.training.runs import flags, lines, train
from tests.training.test_gini import by_sort

pytestmark = pytest.mark.usefixtures("one_thread")


def oracle(model: nn.Module, samples: list[dict], sar: bool = False) -> dict[str, float]:
    """Values of one optimizer step over ``samples``, one sample at a time: no padding, no accumulation, no Trainer."""
    inner = unwrap(model).train()
    tokens = sum(sum(label != -100 for label in s["labels"][1:]) for s in samples)
    l1 = {"visual": [], "text": []}
    for sample in samples:
        batch = Collator(0)([sample])
        if sar:  # its context is the multimodal model's: ask that, and leave out the embeddings
            logits = inner(**batch).logits
            F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum").div(tokens).backward()
            continue
        embeds = inner.get_input_embeddings()(batch["input_ids"])
        visual = batch["input_ids"] == inner.config.image_token_id
        features = torch.cat(list(inner.model.get_image_features(batch["pixel_values"]).pooler_output))
        embeds = embeds.masked_scatter(visual[..., None], features)
        embeds = embeds if embeds.requires_grad else embeds.detach().requires_grad_()
        embeds.retain_grad()
        logits = inner.lm_head(inner.model.language_model(inputs_embeds=embeds).last_hidden_state)
        loss = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum") / tokens
        loss.backward()
        each = embeds.grad.abs().sum(-1)
        l1["visual"] += each[visual].tolist()
        l1["text"] += each[~visual].tolist()
    values = {L1.format(kind): sum(v) / len(v) for kind, v in l1.items() if v}
    for i, layer in enumerate(inner.model.language_model.layers):
        for kind in ("q", "k"):
            weights = [p for n, p in layer.self_attn.named_parameters() if f"{kind}_proj" in n and p.requires_grad]
            if weights:
                values[PER_LAYER.format(i, kind)] = by_sort(torch.cat([p.grad.flatten() for p in weights]))
    return values


@pytest.mark.everyday(
    changes=[{}, {"gradient_checkpointing": True}, {"finetuning_type": "lora", "lora_target": "q_proj,k_proj"}]
)
@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, range(4)),
        ({"gradient_checkpointing": True}, range(4)),
        ({"finetuning_type": "lora", "lora_target": "q_proj,k_proj"}, range(4)),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 1}, range(3, 4)),
        ({"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 1e-3, "sav_grad": True}, range(4)),
    ],
    ids=["full", "checkpointing", "lora", "freeze", "sar"],
)
def test_values_of_a_step(tmp_path, changes, layers):
    """Two micro-batches of two, clipped to a thousandth: the values are those of all four samples, before clipping."""
    arguments = parse(flags(tmp_path, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=1e-3, **changes))
    trainer, _ = build(arguments)
    taken: list[dict] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: taken.extend(s["features"] for s in samples) or collate(samples)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logged = lines(tmp_path / "gradient_sparsity.jsonl")
    assert [line["step"] for line in logged] == [1]
    trainer.model.load_state_dict(before, strict=False)
    trainer.model.zero_grad()
    expected = oracle(trainer.model, taken[:4], "use_sar" in changes)
    assert {key for key in expected if "layer_" in key} == {PER_LAYER.format(i, k) for i in layers for k in "qk"}
    for key, value in expected.items():
        assert logged[0][key] == pytest.approx(value, rel=2e-4), key
    thirds = {"shallow": range(1), "middle": range(1, 2), "deep": range(2, 4), "total": range(4)}
    for depth, members in thirds.items():
        known = [expected[PER_LAYER.format(i, "k")] for i in members if i in layers]
        assert (AGGREGATE.format(depth, "k") in logged[0]) == bool(known)
        if known:
            assert logged[0][AGGREGATE.format(depth, "k")] == pytest.approx(sum(known) / len(known), rel=2e-4)


def test_measuring_changes_nothing(tmp_path):
    weights = [
        train(tmp_path / name, gradient_analysis=name, finetuning_type="freeze").model.state_dict()
        for name in ("true", "false")
    ]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not (tmp_path / "false" / "gradient_sparsity.jsonl").exists()


def test_bf16_is_near_fp32(tmp_path):
    """Autocast's gradients are rounded to bf16 (2^-8) in every product; Gini coefficients average that out."""
    values = {}
    for bf16 in (False, True):
        train(tmp_path / str(bf16), bf16=bf16, max_steps=1)
        values[bf16] = lines(tmp_path / str(bf16) / "gradient_sparsity.jsonl")[0]
    for key, value in values[False].items():
        if "gini" in key or "L1" in key:
            assert values[True][key] == pytest.approx(value, rel=0.05), key


def test_steps_between_measurements(tmp_path):
    train(tmp_path, max_steps=5, gradient_analysis_steps=2)
    assert [line["step"] for line in lines(tmp_path / "gradient_sparsity.jsonl")] == [1, 2, 4]


def test_a_fused_projection_is_taken_apart():
    """Phi-3 stacks queries, keys and values in one weight; gradients of known rows must land where they belong."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    (first, _) = query_and_key_shares(Phi3ForCausalLM(config))
    rows = torch.arange(64.0)[:, None].expand(64, 32)  # 4 * 8 queries, 2 * 8 keys, 2 * 8 values
    assert torch.equal(first["q"][0].of(rows), rows[:32])
    assert torch.equal(first["k"][0].of(rows), rows[32:48])


def test_grouped_rows():
    """InternLM-2: per key/value head its two queries, its key, its value."""

    class Attention(nn.Module):
        config = type("Config", (), {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3})

    names = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    rows = [f"{name}.{n}" for name in names for n in range(3)]
    shares = _fused_rows(Attention(), nn.Linear(5, 24), "groups")
    picked = {kind: [rows[i] for i in index] for kind, index in shares.items()}
    assert picked["q"] == [f"q{h}.{n}" for h in range(4) for n in range(3)]
    assert picked["k"] == [f"k{h}.{n}" for h in range(2) for n in range(3)]
    with pytest.raises(ValueError, match=r"fused projections of 24 rows, .*; got 25"):
        _fused_rows(Attention(), nn.Linear(5, 25), "groups")


def test_unknown_projections_are_an_error(processor):
    from sar_fast.lab.miniature.checkpoint import load_miniature

    model, _ = load_miniature()
    for layer in model.model.language_model.layers:
        layer.self_attn.odd_proj = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ValueError, match=r"model must have a q projection .*; got LlamaAttention"):
        query_and_key_shares(model)
    with pytest.raises(ValueError, match="every must be"):
        GradientSparsityCallback(None, 0)


def test_a_resumed_log_goes_on_where_the_checkpoint_is(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 10, 20, 30)) + '{"step": 4')
    keep_until(path, 20)
    assert [line["step"] for line in lines(path)] == [1, 10, 20]


def test_wandb_gets_the_same_values(tmp_path, monkeypatch):
    """A Weights & Biases run without network, read back from its file."""
    wandb = pytest.importorskip("wandb")

    wandb.teardown()  # a process keeps the folder of its first run
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        train(tmp_path / "out", report_to="wandb", custom_trainer="control_sft", max_steps=2)
    finally:
        wandb.finish()
    logged = lines(tmp_path / "out" / "gradient_sparsity.jsonl")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 60  # wandb's own process may still write after finish() has returned
    while len(rows := wandb_history(file)) < 4 and time.monotonic() < end:
        time.sleep(0.2)
    for line in logged:
        (row,) = [r for r in rows if L1.format("visual") in r and r["train/global_step"] == line["step"]]
        for key, value in line.items():
            if key not in ("step", "epoch"):
                assert row[key] == pytest.approx(value), key
    assert sum("train/loss_contrastive" in row and "train/loss_text_gen" in row for row in rows) == 2


def test_tensorboard_gets_the_same_values(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, report_to="tensorboard", max_steps=2)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    for line in lines(tmp_path / "gradient_sparsity.jsonl"):
        for key, value in line.items():
            if key not in ("step", "epoch"):
                got = {e.step: e.value for e in events.Scalars(key)}
                assert got[line["step"]] == pytest.approx(value, rel=1e-6), key


def wandb_history(path) -> list[dict]:
    """Rows of an offline run: a file of 32 KiB blocks of records (checksum, length, type), each a protocol buffer."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            break
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if parsed.HasField("history"):
                items = parsed.history.item
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def in_fp16(output, scale, **changes):
    """A finished run whose Trainer was put into accelerate's fp16 mode, which it keeps for GPUs, on the CPU."""
    trainer, _ = build(parse(flags(output, **changes)))
    accelerator = trainer.accelerator
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    try:
        trainer.train()
    finally:
        accelerator.state._mixed_precision = "no"
    return trainer


def test_fp16_values_are_without_the_loss_scale(tmp_path):
    """fp16 has 11 bits: a few percent after some layers, where the scale would be a factor of 1024."""
    train(tmp_path / "fp32", max_steps=1)
    in_fp16(tmp_path / "fp16", 1024.0, max_steps=1)
    (expected,), (got,) = (lines(tmp_path / name / "gradient_sparsity.jsonl") for name in ("fp32", "fp16"))
    assert got == pytest.approx(expected, rel=0.05)


def test_gradients_that_overflow_are_null_and_no_step(tmp_path):
    """Scaled beyond fp16: no value is made up, the step is left out, and the scale comes down."""
    trainer = in_fp16(tmp_path, 2.0**40, max_steps=1)
    (line,) = lines(tmp_path / "gradient_sparsity.jsonl")
    assert all(value is None for name, value in line.items() if "gini" in name)
    assert trainer.accelerator.scaler.get_scale() == 2.0**39
    untouched = dict(build(parse(flags(tmp_path / "new")))[0].model.named_parameters())
    assert all(torch.equal(p, untouched[n]) for n, p in trainer.model.named_parameters())
