"""Flags of train.py and evaluate.py: numbers that make no sense, other trainers' names, SAR's own names."""

from __future__ import annotations

import importlib.util

import pytest

from sar_fast.cli.evaluate import arguments as evaluation
from sar_fast.cli.evaluate import benchmark
from sar_fast.cli.train import main
from sar_fast.config import SARConfig
from sar_fast.lab.run.foreign_flags import ADVICE
from sar_fast.lab.run.sar_flags import count_attention_layers, naming_flags
from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.run import build
from tests.hf.tiny import CASES
from tests.training.runs import flags
from tests.training.samples import DATA

pytestmark = pytest.mark.usefixtures("one_thread")


NOT_HERE = [name for name in ("bitsandbytes", "liger_kernel", "mlflow") if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr_scheduler_kwargs x", "lr_scheduler_type must be one that can be made; got linear of 'x': "),
        ('--lr_scheduler_kwargs {"cycles":2}', "must be one that can be made; got linear of .*'cycles'"),
        ("--lr_scheduler_type cosine_with_min_lr", "must be one that can be made; got cosine_with_min_lr: .*min_lr"),
        ("--optim galore_adamw", "optim must be one that can be made; got galore_adamw: "),
        ("--deepspeed nowhere.json", "--deepspeed must be a file that exists; got nowhere.json"),
        ("--media_dir nowhere", "media_dir must be a folder; got 'nowhere'"),
        ("--report_to nope", "report_to must be trackers that can be started; got nope: nope is not supported"),
        *[("--optim adamw_bnb_8bit", "optim must be one that can be made; got adamw_bnb_8bit: .*bitsandbytes")]
        * ("bitsandbytes" in NOT_HERE),
        *[("--use_liger_kernel", "use_liger_kernel needs liger_kernel")] * ("liger_kernel" in NOT_HERE),
        *[("--report_to mlflow", "trackers that can be started; got mlflow: .*pip install mlflow")]
        * ("mlflow" in NOT_HERE),
    ],
)
def test_what_the_trainer_would_find_at_the_first_step_is_found_before_an_earlier_run_moves(tmp_path, words, message):
    (tmp_path / "model.safetensors").write_bytes(b"an earlier run's")
    with pytest.raises((ValueError, ImportError), match=message):
        build(parse([*flags(tmp_path, overwrite_output_dir=True), *words.split()]))
    assert (tmp_path / "model.safetensors").read_bytes() == b"an earlier run's"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_samples 0", "--max_samples must be at least 1; got 0"),
        ("--max_samples -1", "--max_samples must be at least 1; got -1"),
        ("--cutoff_len 0", "--cutoff_len must be at least 1; got 0"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1; got 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1; got 0"),
        ("--per_device_eval_batch_size -2", "--per_device_eval_batch_size must be at least 1; got -2"),
        ("--num_train_epochs -1", "--num_train_epochs must be > 0; got -1"),
        ("--num_train_epochs inf", "--num_train_epochs must be > 0 and finite; got inf"),
        ("--max_steps 0", "--max_steps must be at least 1, or -1 for --num_train_epochs; got 0"),
        ("--save_steps 0", "--save_steps must be > 0; got 0"),
        ("--logging_steps -3", "--logging_steps must be > 0; got -3"),
        ("--eval_steps 0", "--eval_steps must be > 0; got 0"),
        ("--save_total_limit 0", "--save_total_limit must be at least 1; got 0"),
        ("--learning_rate inf", "--learning_rate must be at least 0 and finite; got inf"),
        ("--learning_rate nan", "--learning_rate must be at least 0; got nan"),
        ("--weight_decay -0.1", "--weight_decay must be at least 0; got -0.1"),
        ("--neftune_noise_alpha -5", "--neftune_noise_alpha must be at least 0; got -5"),
        ("--seed -1", "--seed must be at least 0; got -1"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers must be at least 0; got -1"),
        ("--preprocessing_num_workers 0", "--preprocessing_num_workers must be at least 1; got 0"),
        ("--streaming --buffer_size 0", "--buffer_size must be at least 1; got 0"),
        ("--finetuning_type lora --lora_rank 0", "--lora_rank must be at least 1; got 0"),
        ("--finetuning_type lora --lora_dropout 1", "--lora_dropout must be at least 0 and below 1; got 1.0"),
        ("--finetuning_type freeze --freeze_trainable_layers 0", "--freeze_trainable_layers must be at least 1"),
        ("--gradient_analysis_steps 0", "--gradient_analysis_steps must be at least 1; got 0"),
        (
            "--custom_trainer control_sft --visual_contrastive_loss_weight -1",
            "loss_weight must be >= 0 and finite",
        ),
        ("--custom_trainer control_sft --visual_contrastive_temperature 0", "temperature must be > 0; got 0"),
    ],
)
def test_numbers_that_make_no_sense(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        parse([*flags(tmp_path), *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--metric_for_best_model eval_los --eval_strategy steps", "must be eval_loss, all .* measures; got eval_los"),
        ("--metric_for_best_model accuracy --eval_strategy steps", "must be eval_loss.*; got accuracy"),
        ("--metric_for_best_model loss", "--eval_strategy must be steps or epoch with --metric_for_best_model; got no"),
        (
            "--load_best_model_at_end true",
            "--eval_strategy must be steps or epoch with --load_best_model_at_end; got no",
        ),
        (
            "--save_strategy best --eval_strategy steps",
            "--metric_for_best_model must be eval_loss with --save_strategy best; got None",
        ),
        ("--do_predict", "--do_predict must be False here: experiments/evaluate.py .*; got True"),
        (
            "--streaming --train_sampling_strategy group_by_length",
            "--train_sampling_strategy must be another with --streaming, .*; got group_by_length",
        ),
        ("--train_sampling_strategy group_by_length --length_column_name n", "length_column_name must be 'length'"),
        ("--template llava", "--template must be a Jinja file; .*; got 'llava'"),
    ],
)
def test_flags_that_would_fail_late(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        parse([*flags(tmp_path), *words.split()])


@pytest.mark.parametrize("metric", ["eval_loss", "loss"])
def test_the_loss_may_choose_the_best_model(tmp_path, metric):
    given = {"metric_for_best_model": metric, "eval_strategy": "steps", "eval_steps": 1, "do_eval": True}
    training = parse(flags(tmp_path, eval_dataset="shapes_pairs", **given)).training
    assert training.metric_for_best_model == metric
    assert training.greater_is_better is False


def test_flags_of_llama_factory_are_known_by_name(tmp_path):
    assert parse([*flags(tmp_path), "--stage", "sft"]).model.stage == "sft"
    for words, message in (
        ("--stage dpo", "argument --stage: invalid choice: 'dpo'"),
        ("--flash_attn fa2", "unknown flag --flash_attn: --attn_implementation flash_attention_2, or --use_sar"),
        ("--quantization_bit 4", "unknown flag --quantization_bit: weights are not quantized here"),
        ("--val_size 0.1", "unknown flag --val_size: give --eval_dataset"),
        ("--image_max_pixels 262144", "unknown flag --image_max_pixels: pictures are resized"),
        ("--pref-beta 0.1", "unknown flag --pref-beta: that method is not here"),
        ("--group_by_length", "unknown flag --group_by_length: its name is --train_sampling_strategy group_by_length"),
        ("--evaluation_strategy steps", "its name is --eval_strategy"),
    ):
        with pytest.raises(ValueError, match=message):
            parse([*flags(tmp_path), *words.split()])


def test_what_is_known_as_another_trainers_flag_is_none_of_ours(tmp_path):
    for name in ADVICE:
        with pytest.raises(ValueError, match=f"unknown flag --{name}: "):
            parse([*flags(tmp_path), f"--{name}", "1"])


@pytest.mark.parametrize("name", ["--gpus", "--log_samples", "--devices", "--sar_layers", "--k", "--batch_size"])
def test_no_unrelated_flag_is_suggested(tmp_path, name):
    with pytest.raises(ValueError, match=f"unknown flag {name}$"):
        parse([*flags(tmp_path), name, "1"])


@pytest.mark.parametrize("name", ["--batch_size", "--k", "--heads", "--dtype"])
def test_evaluate_suggests_no_unrelated_flag(name):
    with pytest.raises(ValueError, match=f"unknown flag {name}$"):
        evaluation.parse(["--model_name_or_path", "miniature", "--task", "mme", name, "1"])


@pytest.mark.parametrize(("name", "meant"), [("out", "output_dir"), ("model", "model_name_or_path"), ("seeed", "seed")])
def test_the_beginning_of_one_flag_and_a_misspelt_one_are_told(tmp_path, name, meant):
    with pytest.raises(ValueError, match=f"unknown flag --{name}; did you mean --{meant}\\?$"):
        parse([*flags(tmp_path), f"--{name}", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sar_activation_layer_k 10", "--sar_activation_layer_k must be at most .* layers, 4; got 10"),
        ("--sar_activation_layer_k -1", "--sar_activation_layer_k must be >= 0; got -1"),
        ("--sar_beta nan", "--sar_beta must be > 0"),
    ],
)
def test_sars_errors_name_the_flag_before_data_are_read(tmp_path, words, message):
    """The dataset's name is wrong too, and would be an error of its own."""
    with pytest.raises(ValueError, match=f"^{message}"):
        build(parse([*flags(tmp_path, dataset="nowhere"), "--use_sar", *words.split()]))


def test_a_backend_that_cannot_run_names_its_flag_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = flags(tmp_path, dataset="nowhere", use_sar=True, sar_activation_layer_k=2, use_cpu=True)
    with pytest.raises(ValueError, match=r"^--sar_backend must be .* here; got 'triton', which does not support cpu"):
        build(parse([*words, "--sar_backend", "triton"]))


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_layers_that_attend_are_counted_by_the_configuration_alone(case):
    assert count_attention_layers(case.make().config) == len(case.attending)


def test_errors_that_name_no_flag_are_left_alone():
    with pytest.raises(ValueError, match=r"^model has no beta"), naming_flags({"beta": "sar_beta"}):
        raise ValueError("model has no beta")
    with pytest.raises(TypeError, match=r"^--sav_grad must be a bool"), naming_flags({"sav_grad": "sav_grad"}):
        SARConfig(sav_grad=3)


def test_evaluates_flags(tmp_path):
    words = ["--model_name_or_path", "miniature", "--output_dir", str(tmp_path), "--task", "mme"]
    for more, message in (
        ("--max_samples 0", "--max_samples must be at least 1; got 0"),
        ("--seed -4", "--seed must be at least 0; got -4"),
        ("--adapter_name_or_path x", "--adapter_name_or_path: --model_name_or_path takes an adapter's folder"),
        ("--flash_attn fa2", "unknown flag --flash_attn: it is for training, and has no meaning here"),
        ("--use_sar --sar_beta -1", "--sar_beta must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.parse([*words, *more.split()])


def test_evaluate_names_sars_flags_before_it_asks_anything(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = ["--model_name_or_path", "miniature", "--output_dir", str(tmp_path / "out"), "--device", "cpu", "--use_sar"]
    late = [*words, "--task", "mme", "--data_dir", "nowhere", "--sar_activation_layer_k", "10"]
    with pytest.raises(ValueError, match=r"^--sar_activation_layer_k must be at most .* layers, 4; got 10"):
        benchmark.run(evaluation.parse(late))
    asks = [*words, "--task", "mme", "--data_dir", str(DATA / "benchmarks" / "mme"), "--sar_activation_layer_k", "2"]
    with pytest.raises(ValueError, match=r"^--sar_backend must be .* here; got 'triton', which does not support cpu"):
        benchmark.run(evaluation.parse([*asks, "--sar_backend", "triton"]))
    assert not (tmp_path / "out").exists()


def test_a_senseless_number_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *flags(tmp_path), "--gradient_accumulation_steps", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == "error: --gradient_accumulation_steps must be at least 1; got 0\n"
