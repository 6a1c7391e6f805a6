"""A rule that learns: alone or with the model, resumed exactly, and saved so that it weighs as it did in memory."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.rule_module import NAME, rule_of
from sar_fast.hf.structure import unwrap
from sar_fast.lab.io.models import find_model, load_model
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.run import build, run
from sar_fast.lab.training.trainers import SFTTrainer
from sar_fast.method.weighting.files import PARAMETERS, RULE
from sar_fast.weighting import HeadScales, find_weighting
from tests.adapters import logits
from tests.training.runs import flags, history, launch, parameters, train
from tests.training.samples import REPOSITORY, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread", "own_rules")

LAYERS, HEADS, K = 4, 8, 2
SLOPES = f"{REPOSITORY}/tests/training/own_rules.py:Slopes"
SCALES = {
    "use_sar": True,
    "sar_activation_layer_k": K,
    "sar_weighting": "head_scales",
    "finetuning_type": "rule",
    "learning_rate": 3e-2,
    "gradient_analysis": False,
}
STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def scales_of(folder):
    return load_file(folder / PARAMETERS)["scales"]


def weights_of(folder):
    """Every tensor of a folder's files of weights, by name and file."""
    return {f"{n} of {f.name}": x for f in sorted(folder.glob("*.safetensors")) for n, x in load_file(f).items()}


# what learns


@pytest.mark.everyday(rule=["head_scales"])
@pytest.mark.parametrize("rule", ["head_scales", SLOPES], ids=["scales", "slopes"])
def test_the_loss_goes_down_by_the_rule_alone(tmp_path, rule):
    """The same two samples in every step; no other weight changes."""
    changes = {"max_samples": 2, "max_steps": 8, "lr_scheduler_type": "constant", "sar_weighting": rule}
    lr = 0.1 if rule == "head_scales" else 2.0  # SAV is small
    trainer = train(tmp_path, **{**SCALES, **changes, "learning_rate": lr})
    losses = history(tmp_path)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    assert [n for n, p in trainer.model.named_parameters() if p.requires_grad] == [f"model.{NAME}.scales"]
    before = load_miniature()[0].state_dict()
    after = load_model(find_model(str(tmp_path)), "cpu", "float32")[0].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.everyday(kind=["freeze", "lora"])
@pytest.mark.parametrize("kind", ["full", "freeze", "lora", "rule"])
def test_every_type_trains_the_rule_and_saves_it(tmp_path, kind, caplog):
    """The last K layers' scales; what is saved weighs as the model in memory does."""
    trainer = train(tmp_path, **{**SCALES, "finetuning_type": kind, "save_strategy": "steps", "save_steps": 3})
    rule = rule_of(trainer.model)
    assert rule.scales.requires_grad
    assert (rule.scales[-K:] != 1).all()
    assert (rule.scales[:-K] == 1).all()
    others = {n for n, p in unwrap(trainer.model).named_parameters() if p.requires_grad and NAME not in n}
    assert bool(others) == (kind != "rule")
    want = logits(trainer.model.eval())
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        assert json.loads((folder / RULE).read_text())["name"] == "head_scales"
        assert [n for n in weights_of(folder) if "scales" in n] == [f"scales of {PARAMETERS}"]
        caplog.clear()
        model, _ = load_model(find_model(str(folder)), "cpu", "float32")
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        learned = SARConfig(activation_layer_k=K, weighting=find_weighting(folder, layers=LAYERS, heads=HEADS))
        assert torch.equal(logits(model, learned), want)
        assert not torch.allclose(logits(model), want, atol=1e-2)  # without it another model


def test_a_trained_rule_is_trained_on(tmp_path):
    train(tmp_path / "first", **SCALES)
    trainer = train(tmp_path / "more", **{**SCALES, "sar_weighting": tmp_path / "first", "learning_rate": 0})
    assert torch.equal(rule_of(trainer.model).scales, scales_of(tmp_path / "first"))
    assert torch.equal(scales_of(tmp_path / "more"), scales_of(tmp_path / "first"))
    assert json.loads((tmp_path / "more" / RULE).read_text())["name"] == "head_scales"


def test_scales_are_not_decayed(tmp_path):
    """Layers that are not re-weighted keep their 1; other weights do decay."""
    changes = {"finetuning_type": "freeze", "weight_decay": 0.5, "learning_rate": 1e-2}
    trainer = train(tmp_path, **{**SCALES, **changes, "sar_activation_layer_k": 1})
    assert (scales_of(tmp_path)[:-1] == 1).all()
    names = trainer.get_decay_parameter_names(trainer.model)
    assert f"model.{NAME}.scales" not in names
    assert "model.language_model.layers.3.self_attn.q_proj.weight" in names


# how it is computed


@pytest.mark.slow  # every day tests/training/test_distributed.py, and rules over ranks in tests/weighting/test_split.py
def test_two_ranks_equal_one(tmp_path):
    """DDP, gradient checkpointing and accumulation: losses, and scales after three steps."""
    changes = {**SCALES, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    done = launch(flags(tmp_path / "two", **changes))
    assert done.returncode == 0, done.stderr[-3000:]
    train(tmp_path / "one", **{**changes, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1})
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-3)
    torch.testing.assert_close(scales_of(tmp_path / "two"), scales_of(tmp_path / "one"), rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rule", "lora"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_one_process(tmp_path, stage, kind):
    """And a run that is resumed from a checkpoint that DeepSpeed wrote. Under ZeRO-3 adapters start elsewhere."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install sar_fast[deepspeed]")
    changes = {**SCALES, **STEPS, "finetuning_type": kind}
    zero = {**changes, "deepspeed": REPOSITORY / "experiments" / "deepspeed" / f"zero{stage}.json"}
    done = launch(flags(tmp_path / "two", **zero))
    assert done.returncode == 0, done.stderr[-3000:]
    train(tmp_path / "one", **{**changes, "per_device_train_batch_size": 4})
    for part in (".", "checkpoint-2") if (kind, stage) != ("lora", 3) else ():
        got, want = (scales_of(tmp_path / run / part) for run in ("two", "one"))
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    done = launch(flags(tmp_path / "again", resume_from_checkpoint="true", **zero))
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(scales_of(tmp_path / "again"), scales_of(tmp_path / "two"), rtol=0, atol=1e-6)
    assert (scales_of(tmp_path / "two")[-K:] - scales_of(tmp_path / "two" / "checkpoint-2")[-K:]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_in_half_precision(tmp_path, stage):
    """ZeRO-1 and 2 take the rule along into bf16, with an fp32 copy for the optimizer; ZeRO-3 leaves it in fp32."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install sar_fast[deepspeed]")
    config = REPOSITORY / "experiments" / "deepspeed" / f"zero{stage}.json"
    done = launch(flags(tmp_path / "two", **SCALES, deepspeed=config, bf16=True, gradient_checkpointing=True))
    assert done.returncode == 0, done.stderr[-3000:]
    train(tmp_path / "one", **{**SCALES, "per_device_train_batch_size": 4})
    got, want = (scales_of(tmp_path / run)[-K:] for run in ("two", "one"))
    assert got.dtype == torch.float32 if stage == 3 else torch.bfloat16
    assert ((got.float() - 1).sign() == (want - 1).sign()).float().mean() > 0.85


@pytest.mark.everyday(packing=[False])
@pytest.mark.parametrize("packing", [False, True])
def test_half_precision_learns_nearly_the_same(tmp_path, packing):
    """bf16 rounds to 2^-8; Adam's first steps have the learning rate's size where a gradient is not near 0."""
    common = {**SCALES, "gradient_checkpointing": True, "packing": packing, "max_steps": 2}
    for bf16 in (True, False):
        train(tmp_path / str(bf16), **common, bf16=bf16)
    half, single = (scales_of(tmp_path / name)[-K:] - 1 for name in ("True", "False"))
    assert half.dtype == torch.float32
    assert (half.sign() == single.sign()).float().mean() > 0.85
    assert history(tmp_path / "True")[0] == pytest.approx(history(tmp_path / "False")[0], rel=0.05)


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_batch_without_pictures_changes_nothing_that_learns_from_them(tmp_path, checkpointing):
    words = {"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "red"}
    data = write_jsonl(tmp_path / "words.jsonl", [{"messages": words}] * 4)
    changes = {"dataset": data, "sar_weighting": SLOPES, "gradient_checkpointing": checkpointing, "max_steps": 2}
    train(tmp_path / "run", **{**SCALES, **changes})
    assert (scales_of(tmp_path / "run") == 1).all()
    assert all(loss > 0 for loss in history(tmp_path / "run"))
    with pytest.raises(
        ValueError, match=r"packing must be False with .*learn from statistics: it has no place for the blank image"
    ):
        build(parse(flags(tmp_path / "packed", **{**SCALES, "sar_weighting": SLOPES, "packing": True})))


# runs that go on


@pytest.mark.everyday(kind=["lora"])
@pytest.mark.parametrize("kind", ["full", "lora", "rule"])
def test_a_resumed_run_is_the_run_left_alone(tmp_path, kind):
    """Bit for bit: the rule, the model, and the optimizer's state."""
    changes = {**SCALES, **STEPS, "finetuning_type": kind}
    train(tmp_path / "whole", **changes)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    train(tmp_path / "half", **changes, resume_from_checkpoint="true")
    for part in (".", "checkpoint-4"):
        got, want = (weights_of(tmp_path / run / part) for run in ("half", "whole"))
        assert got.keys() == want.keys()
        assert f"scales of {PARAMETERS}" in want
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert history(tmp_path / "half") == history(tmp_path / "whole")
    assert not torch.equal(scales_of(tmp_path / "whole"), scales_of(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.everyday(kind=["lora"])
@pytest.mark.parametrize("kind", ["lora", "rule"])
def test_the_best_models_rule_is_loaded_at_the_end(tmp_path, kind):
    """The best by a metric that the first step has most of."""
    watched = {"do_eval": True, "eval_dataset": "shapes_llava", "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "greater_is_better": True}
    trainer = train(tmp_path, **{**SCALES, **watched, **best, "finetuning_type": kind, "max_samples": 4})
    chosen = tmp_path / trainer.state.best_model_checkpoint.rpartition("/")[2]
    assert chosen.name != "checkpoint-3"
    assert torch.equal(rule_of(trainer.model).scales, scales_of(chosen))
    assert torch.equal(scales_of(tmp_path), scales_of(chosen))


def test_another_rule_is_no_resume(tmp_path):
    source = tmp_path / "mine.py"
    shutil.copy(SLOPES.rpartition(":")[0], source)
    changes = {**SCALES, **STEPS, "max_steps": 2, "sar_weighting": f"{source}:Slopes"}
    train(tmp_path / "run", **changes)
    changes["resume_from_checkpoint"] = "true"
    with pytest.raises(ValueError, match=r"sar_weighting is head_scales, was mine.py:Slopes \(content "):
        build(parse(flags(tmp_path / "run", **{**changes, "sar_weighting": "head_scales"})))
    moved = tmp_path / "moved" / "mine.py"
    moved.parent.mkdir()
    source.rename(moved)
    build(parse(flags(tmp_path / "run", **{**changes, "sar_weighting": f"{moved}:Slopes"})))
    moved.write_text(moved.read_text() + "\n# another\n")
    with pytest.raises(ValueError, match=r"sar_weighting is mine.py:Slopes \(content .*, was mine.py:Slopes \(content"):
        build(parse(flags(tmp_path / "run", **{**changes, "sar_weighting": f"{moved}:Slopes"})))


def test_a_checkpoint_that_lost_its_rule_is_no_resume(tmp_path):
    train(tmp_path, **{**SCALES, **STEPS, "max_steps": 2})
    (tmp_path / "train_results.json").unlink()
    (tmp_path / "checkpoint-2" / PARAMETERS).unlink()
    arguments = parse(flags(tmp_path, **{**SCALES, **STEPS, "max_steps": 2}, resume_from_checkpoint="true"))
    trainer, checkpoint = build(arguments)
    with pytest.raises(ValueError, match=r"HeadScales has parameters, and .*checkpoint-2 holds none"):
        run(trainer, arguments, checkpoint)


def test_an_earlier_runs_rule_goes_with_it(tmp_path):
    train(tmp_path, **{**SCALES, "max_steps": 1})
    train(tmp_path, max_steps=1, overwrite_output_dir=True)
    assert not (tmp_path / RULE).exists()
    assert not (tmp_path / PARAMETERS).exists()


# errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sar": None, "sar_activation_layer_k": None, "finetuning_type": "full"}, "--sar_weighting .*--use_sar"),
        ({"sar_weighting": None}, "--sar_weighting must be given, with --use_sar, for --finetuning_type rule"),
        (
            {"sar_weighting": "equal"},
            "sar_weighting must have parameters with finetuning_type rule, which trains them; got 'equal'",
        ),
        ({"sar_beta": 0.1}, "--sar_weighting must come without .*; got --sar_beta"),
        ({"sar_normalize": "standardize"}, "--sar_weighting must come without .*; got --sar_normalize"),
        ({"sar_weighting": "head_scale"}, "--sar_weighting must be one of .*head_scales.*; got 'head_scale'"),
        (
            {"sar_weighting": "./no/run"},
            "--sar_weighting must be a name, .* or a folder on this machine; got './no/run'",
        ),
        ({"sar_weighting": "no.py:Rule"}, "--sar_weighting must be FILE.py:NAME; got 'no.py:Rule'"),
        (
            {"sar_weighting": '{"name": "head_scales", "options": {"rows": 2}}'},
            "--sar_weighting must have options that .*; got rows",
        ),
        ({"finetuning_type": "scales"}, "invalid choice: 'scales'"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(parse(flags(tmp_path / "run", **{**SCALES, **changes})))
    assert not (tmp_path / "run").exists()


def test_options_reach_the_rule(tmp_path):
    """Given as in a YAML file; a rule for more layers than the model has is the user's to give."""
    spec = {"name": "head_scales", "options": {"layers": LAYERS + 1}}
    (tmp_path / "run.yaml").write_text(json.dumps({"sar_weighting": spec}))
    words = [str(tmp_path / "run.yaml"), *flags(tmp_path / "run", **{**SCALES, "sar_weighting": None})]
    trainer, _ = build(parse(words))
    assert rule_of(trainer.model).scales.shape == (LAYERS + 1, HEADS)


def test_a_rule_without_a_name_is_refused_before_it_is_trained(tmp_path):
    class Mine(HeadScales):
        pass

    model = load_miniature()[0]
    apply_sar(model, SARConfig(activation_layer_k=K, weighting=Mine(LAYERS, HEADS)))
    arguments = parse(flags(tmp_path))
    with pytest.raises(ValueError, match=r"must be registered, .*; got .*Mine"):
        SFTTrainer(model=model, args=arguments.training)


def test_plain_runs_have_no_rule(tmp_path):
    trainer = train(tmp_path, use_sar=True, sar_activation_layer_k=K, max_steps=1)
    assert rule_of(trainer.model) is None
    assert not (tmp_path / RULE).exists()
    assert len(parameters(trainer.model)) == len(parameters(load_miniature()[0]))
