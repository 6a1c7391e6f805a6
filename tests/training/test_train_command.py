"""experiments/train.py as users call it: flags, files, what it leaves behind, and every error it promises."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from PIL import Image

from sar_fast.cli.train import main
from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.checkpoints import COMPLETE, checkpoints, last_complete
from sar_fast.lab.training.distributed import refuse_split_models
from sar_fast.lab.training.run import build
from tests.training.runs import SMALL, flags, launch, lines, train
from tests.training.samples import REPOSITORY, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = sorted((REPOSITORY / "experiments" / "sar_paper").glob("exp_sec3*.yaml"))
RESEARCH_CODE = (  # its documentation's command, word for word
    "--model_name_or_path {model} --do_train --dataset llava_instruct_50k --finetuning_type full "
    "--custom_trainer control_sft --visual_contrastive_loss_weight 0.1 --output_dir {out} --overwrite_output_dir "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --lr_scheduler_type cosine --logging_steps 10 "
    "--save_steps 1000 --learning_rate 5e-6 --num_train_epochs 1.0 --plot_loss --bf16 --report_to wandb "
    "--run_name sft_gradient_analysis"
)


def test_the_research_codes_command_is_understood(tmp_path):
    arguments = parse(RESEARCH_CODE.format(model="miniature", out=tmp_path).split())
    training = arguments.training
    assert (training.learning_rate, training.gradient_accumulation_steps, training.bf16) == (5e-6, 8, True)
    assert training.use_cpu == (not torch.cuda.is_available())
    assert training.plot_loss
    assert training.gradient_analysis
    assert arguments.control.custom_trainer == "control_sft"
    sar = parse([*flags(tmp_path), *["--use_sar", "--sar_activation_layer_k", "3", "--sar_beta", "0.2", "--sav_grad"]])
    config = sar.model.sar_config()
    assert (config.activation_layer_k, config.beta, config.sav_grad) == (3, 0.2, True)


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_the_papers_configurations_are_complete(path):
    arguments = parse([str(path), "--report_to", "none", *(["--deepspeed", ""] if "mini" not in path.stem else [])])
    assert arguments.training.gradient_analysis
    assert arguments.training.plot_loss
    assert (arguments.control.custom_trainer == "control_sft") == ("control" in path.stem)
    deepspeed = yaml.safe_load(path.read_text()).get("deepspeed")
    assert (deepspeed is None) == ("mini" in path.stem)
    assert deepspeed is None or (REPOSITORY / deepspeed).is_file()


def test_files_and_flags(tmp_path):
    """YAML first, flags and key=value after it; numbers that YAML reads as words; lists, flags that are off."""
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({**SMALL, "output_dir": str(tmp_path), "learning_rate": "2e-5", "report_to": ["none"]})
    )
    arguments = parse([str(path), "--seed", "9", "max_steps=7", "plot_loss=false"])
    training = arguments.training
    assert (training.learning_rate, training.seed, training.max_steps, training.plot_loss) == (2e-5, 9, 7, False)
    path.write_text("save_strategy: no\neval_strategy: no\nplot_loss: no\n")  # which YAML takes for False
    training = parse([*flags(tmp_path), str(path)]).training
    assert (training.save_strategy, training.eval_strategy, training.plot_loss) == ("no", "no", False)
    path.write_text("- a list")
    with pytest.raises(ValueError, match="holds list"):
        parse([str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", r"unknown flag --learning_rat; did you mean --learning_rate\?"),
        ("--custom_traner control_sft", r"did you mean --custom_trainer\?"),
        ("stray", "cannot make sense of stray"),
        ("--sar_beta 0.1", "--sar_beta must be left out without --use_sar"),
        ("--sav_grad", "--sav_grad must be left out without --use_sar"),
        ("--lora_rank 4", "--lora_rank must be left out without --finetuning_type lora; got 4"),
        ("--freeze_trainable_layers 1", "must be left out without --finetuning_type freeze"),
        ("--visual_contrastive_loss_weight 0.3", "must be left out without --custom_trainer control_sft"),
        ("--use_sar --sar_beta 0", "beta must be > 0"),
        ("--use_sar --attn_implementation eager", "must be left out with --use_sar, which sets the attention itself"),
        ("--streaming --max_steps -1", "--max_steps must be at least 1 with --streaming, which has no length"),
        ("--max_length 5 --cutoff_len 6", "--cutoff_len must be 5, as --max_length, .*; got 6"),
        ("--packing --custom_trainer control_sft", "--packing must be False with --custom_trainer control_sft"),
        ("--fp16 --use_cpu", "--fp16 must be False without a GPU"),
        ("--warmup_ratio 2", "warmup_ratio must be in"),
        ("--warmup_ratio 0.1 --warmup_steps 5", "must be 0 with --warmup_ratio; got 5"),
        ("--do_eval", "--eval_dataset must be given with --do_eval"),
        ("--do_train false", "nothing to do"),
    ],
)
def test_wrong_flags(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        parse([*flags(tmp_path), *words.split()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sar": True, "sar_activation_layer_k": 9}, "activation_layer_k must be at most .* 4"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 5}, "freeze_trainable_layers must be 1 to 4"),
        (
            {"finetuning_type": "lora", "lora_target": "q_proj,nope"},
            "lora_target must be all, or of the decoder's layers, .*; got nope",
        ),
        ({"dataset": "shapes_tran"}, "did you mean 'shapes_train'"),
        ({"dataset": "llava_instruct_50k"}, "llava_instruct_50k.json does not exist"),
        ({"template": "llava"}, "must be a Jinja file"),
        ({"torch_dtype": "half"}, "torch_dtype must be auto"),
        ({"max_length": 10}, "all 32 records are longer"),
        ({"resume_from_checkpoint": "nowhere"}, "must be a whole checkpoint"),
    ],
)
def test_wrong_values(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(parse(flags(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"do_train": False}, "--do_train must be True, or --do_eval, or both: there is nothing to do; got False"),
        ({"report_to": "nope"}, "--report_to must be trackers that can be started; got nope: "),
        ({"eval_dataset": "nope", "do_eval": True}, "--eval_dataset must be names in "),
        ({"lora_target": "nope", "finetuning_type": "lora"}, "--lora_target must be all, or of the decoder's layers, "),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint must be a whole checkpoint; got nowhere"),
    ],
)
def test_the_command_names_flags_whenever_a_value_is_refused(tmp_path, monkeypatch, capsys, changes, line):
    monkeypatch.setattr("sys.argv", ["train.py", *flags(tmp_path, **changes)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("deepspeed", "parallelism", "message"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, None, "deepspeed: tensor_parallel.autotp_size is 2: every sample"),
        ({"tensor_parallel": {"tp": {"tp_size": 4}}}, None, "deepspeed: tensor_parallel.tp_size is 4"),
        ({"sequence_parallel_size": 2, "data_parallel_size": 1}, None, "deepspeed: sequence_parallel_size is 2"),
        (None, {"cp_size": 2}, r"parallelism_config: cp_size is 2 \(context parallel\)"),
        (None, ParallelismConfig(tp_size=2), "parallelism_config: tp_size is 2"),
        (None, ParallelismConfig(sp_size=8), r"sp_size is 8 \(sequence parallel \(Ulysses\)\).*apply_sar"),
    ],
)
def test_models_split_over_ranks_are_refused(deepspeed, parallelism, message):
    with pytest.raises(ValueError, match=message):
        refuse_split_models(deepspeed, parallelism)


def test_splits_are_refused_wherever_they_are_asked_for(tmp_path, monkeypatch):
    refuse_split_models({"tensor_parallel": {"autotp_size": 1}, "zero_optimization": {"stage": 2}}, ParallelismConfig())
    with pytest.raises(ValueError, match="parallelism_config"):  # no value of this flag can be written down
        parse([*flags(tmp_path), "--parallelism_config", '{"cp_size": 2}'])
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")  # what `accelerate launch` sets
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with pytest.raises(ValueError, match="sp_size is 2"):
        parse(flags(tmp_path, use_sar=True))


def test_bad_data_is_named_before_training(tmp_path):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    good = {"conversations": turns, "image": "good.png"}
    for row, message in (
        ({**good, "image": "gone.png"}, r"record 1: image file .*gone\.png does not exist"),
        ({**good, "image": "bad.png"}, r"record 1: .*bad\.png cannot be read"),
        ({**good, "conversations": turns[:1]}, "record 1: record has no answer"),
        ({**good, "image": ["good.png", "good.png"]}, r"1 <image> placeholder\(s\) for 2"),
    ):
        path = write_jsonl(tmp_path / "rows.jsonl", [good, row])
        with pytest.raises(ValueError, match=message):
            build(parse(flags(tmp_path / "out", dataset=path)))
    assert not (tmp_path / "out").exists()


def test_too_few_image_tokens_are_noticed(tmp_path):
    """A processor and a model that disagree: transformers' own error must get through, not be trained over."""
    arguments = parse(flags(tmp_path))
    trainer, _ = build(arguments)
    collate = trainer.data_collator

    def one_token_less(samples):
        batch = collate(samples)
        batch["input_ids"][0, batch["input_ids"][0].tolist().index(4)] = 7
        return batch

    trainer.data_collator = one_token_less
    with pytest.raises(ValueError, match="do not match"):
        trainer.train()


def test_what_a_run_leaves_behind(tmp_path):
    trainer = train(
        tmp_path, plot_loss=True, do_eval=True, eval_dataset="shapes_pairs", log_throughput=True, peak_flops=1e12,
        save_strategy="steps", save_steps=2, use_sar=True, sar_activation_layer_k=2,
    )  # fmt: skip
    metadata = json.loads((tmp_path / "run_metadata.json").read_text())
    assert metadata["seed"] == 3
    assert metadata["versions"]["torch"] == torch.__version__
    assert metadata["configuration"]["model"]["sar_activation_layer_k"] == 2
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "train_runtime"} <= set(results)
    assert Image.open(tmp_path / "training_loss.png").size[0] > 100
    throughput = lines(tmp_path / "throughput.jsonl")
    assert [line["step"] for line in throughput] == [1, 2, 3]
    for line in throughput:
        assert line["throughput/tokens_per_second"] > 0
        assert 0 < line["throughput/mfu"] < 1
        assert line["throughput/memory_bytes"] > 1e8
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    # the checkpoint is a plain one: without SAR, by transformers alone
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tmp_path)
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())


def test_a_run_shorter_than_logging_steps_has_no_loss_to_plot(tmp_path, caplog):
    (tmp_path / "training_loss.png").write_bytes(b"of an earlier run")
    train(tmp_path, max_steps=1, logging_steps=10, plot_loss=True)
    assert "no loss to plot: 1 steps, and one is logged every 10" in caplog.text
    assert not (tmp_path / "training_loss.png").exists()
    assert (tmp_path / "model.safetensors").is_file()


def test_wandb_without_a_key_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()
    try:
        with pytest.raises(
            ValueError, match=r"report_to must come with a key for wandb: set WANDB_API_KEY.*WANDB_MODE=offline"
        ):
            build(parse(flags(tmp_path / "out", report_to="wandb")))
    finally:
        wandb.teardown()
    assert not (tmp_path / "out").exists()


def test_counted_flops_are_those_of_the_shapes(tmp_path):
    """Against the count by hand of the miniature: linear layers, and attention over the padded length."""
    trainer = train(tmp_path, max_steps=1, log_throughput=True, peak_flops=1.0, freeze_multi_modal_projector=False)
    (line,) = lines(tmp_path / "throughput.jsonl")
    flops = line["throughput/mfu"] * line["throughput/step_seconds"]
    inputs = trainer.data_collator(
        [trainer.train_dataset[i] for i in next(iter(trainer.get_train_dataloader().batch_sampler))]
    )
    B, S = inputs["input_ids"].shape
    config = trainer.model.config
    text, vision = config.text_config, config.vision_config
    d, f, kv = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim
    decoder = text.num_hidden_layers * (2 * d * d + 2 * d * kv + 3 * d * f) + d * text.vocab_size
    e = vision.hidden_size
    tower = vision.num_hidden_layers * (4 * e * e + 2 * e * vision.intermediate_size)  # frozen: forward only
    projector = 2 * e * d + 3 * d * d  # the first layer's input needs no gradient
    attention = text.num_hidden_layers * 6 * S * S * d
    expected = B * (6 * S * decoder + 2 * 65 * tower + 2 * 64 * projector + attention)
    assert flops == pytest.approx(expected, rel=0.02)


def test_an_earlier_run_is_not_mixed_in(tmp_path):
    common = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    train(tmp_path, **common)
    with pytest.raises(
        ValueError, match=r"come with resume_from_checkpoint true or .*; got .* holds checkpoint-2 of an earlier run"
    ):
        build(parse(flags(tmp_path, **common)))
    train(tmp_path, overwrite_output_dir=True, **{**common, "max_steps": 1})
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert [line["step"] for line in lines(tmp_path / "gradient_sparsity.jsonl")] == [1]


@pytest.mark.everyday(finetuning_type=["lora"])
@pytest.mark.parametrize("finetuning_type", ["full", "lora", "freeze"])
def test_resuming_goes_on_exactly(tmp_path, finetuning_type):
    """Half a checkpoint at the end is passed over; weights, optimizer, data order and log go on as if never stopped."""
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "finetuning_type": finetuning_type}
    whole = train(tmp_path / "whole", **common)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "checkpoint-4" / COMPLETE).unlink()
    assert last_complete(tmp_path / "again").name == "checkpoint-2"
    again = train(tmp_path / "again", resume_from_checkpoint="true", **common)
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (whole, again)]
    assert losses[0] == losses[1]
    weights = whole.model.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in again.model.state_dict().items())
    logs = [lines(tmp_path / name / "gradient_sparsity.jsonl") for name in ("whole", "again")]
    assert logs[0] == logs[1]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """The kernel refuses to let a file grow: the second checkpoint fails, is cleared away, and the first is whole."""
    arguments = parse(flags(tmp_path, save_strategy="steps", save_steps=1, max_steps=3))
    trainer, _ = build(arguments)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*args, **kwargs):
        if trainer.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))

    from transformers import TrainerCallback

    callback = TrainerCallback()
    callback.on_step_end = fill
    trainer.add_callback(callback)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError, match=r"checkpoint-2 could not be written: .*the last whole one is .*-1"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert last_complete(tmp_path).name == "checkpoint-1"


def test_limits_on_checkpoints_keep_the_newest(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3"]


def test_packing_trains_as_padding_does(tmp_path):
    padded, packed = (train(tmp_path / str(on), packing=on) for on in (False, True))
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (padded, packed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Adam amplifies rounding where a gradient is near zero
    logs = [lines(tmp_path / str(on) / "gradient_sparsity.jsonl") for on in (False, True)]
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-3)


def test_streaming_trains(tmp_path):
    trainer = train(tmp_path, streaming=True, max_steps=2)
    assert [h["step"] for h in trainer.state.log_history if "loss" in h] == [1, 2]


def test_errors_are_one_line(tmp_path):
    done = launch([*flags(tmp_path), "--learning_rat", "1"], processes=0)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: unknown flag --learning_rat; did you mean --learning_rate?"
    assert "Traceback" not in done.stderr


def test_an_evaluation_alone_has_no_throughput(tmp_path):
    trainer = train(
        tmp_path, do_train=None, do_eval=True, eval_dataset="shapes_pairs", max_samples=4, log_throughput=True
    )
    assert trainer.state.global_step == 0
    assert "eval_loss" in json.loads((tmp_path / "eval_results.json").read_text())
    assert not (tmp_path / "throughput.jsonl").exists()
