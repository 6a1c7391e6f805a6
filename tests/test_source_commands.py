"""The commands of the research code's README as it shows them, on a small model: files, their keys, and W&B's keys.

``<path_to_...>`` is a path here, ``...`` is what makes a run small and says where the data is. The model has 16 decoder
layers, so that every K of the README fits, and random weights: what is tested is that the commands run and what they
leave, not scores.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sar_fast.lab.focus.grounding import GroundedMasks
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.checkpoint import load_miniature
from tests.evaluation.original_models import bert, detector, original_sam, segmenter, tiny_swin, write_config  # noqa: F401
from tests.evaluation.original_models import original as original_detector  # noqa: F401
from tests.training.samples import DATA, REPOSITORY
from tests.training.test_gradients import wandb_history

LAYERS = 16
TRAIN = """train.py --model_name_or_path <path_to_base_model>
    --do_train
    --dataset llava_instruct_50k
    --finetuning_type full
    {control}
    --output_dir {output_dir}
    --overwrite_output_dir
    --per_device_train_batch_size 2
    --gradient_accumulation_steps 8
    --lr_scheduler_type cosine
    --logging_steps 10
    --save_steps 1000
    --learning_rate 5e-6
    --num_train_epochs 1.0
    --plot_loss
    --bf16
    --report_to wandb
    --run_name sft_gradient_analysis
    --dataset_dir data --media_dir <media>"""
CONTROL = "--custom_trainer control_sft --visual_contrastive_loss_weight 0.1"
FOCUS = """evaluate.py --model_name_or_path <path_to_your_sft_model>
    --do_sfs_fi_eval
    --dataset refcoco_val_sar
    --output_dir results/sfs_fi_eval
    --per_device_eval_batch_size 4
    --predict_with_generate
    --bf16
    --gd_config_path <path_to_groundingdino_config>
    --gd_checkpoint_path <path_to_groundingdino_checkpoint>
    --sam_checkpoint_path <path_to_sam_checkpoint>
    --dataset_dir data --max_samples 4 --gd_box_threshold 0.0"""
MME = "--data_dir <mme> --max_samples 8 --max_new_tokens 2"
TABLE = {
    "eval_base": f"evaluate.py --model_name_or_path <path_to_base_model> --task mme "
    f"--output_dir results/eval_base/mme {MME}",
    "eval_sft": f"evaluate.py --model_name_or_path <path_to_sft_model> --task mme "
    f"--output_dir results/eval_sft/mme {MME}",
    "eval_sars": f"""evaluate.py --model_name_or_path <path_to_sft_model>
        --use_sar
        --sar_activation_layer_k 10
        --sar_beta 0.5
        --task mme
        --output_dir results/eval_sars/mme
        {MME}""",
}
PROBE = """evaluate.py --model_name_or_path <path_to_model_to_probe>
    --do_layerwise_probe
    --dataset refcoco_val_sar
    --layerwise_probe_task grounding
    --output_dir results/layerwise_probe
    --dataset_dir data --max_samples 12 --probe_epochs 1 --probe_seeds 1"""
ABLATION = (
    """evaluate.py --model_name_or_path <path_to_sft_model>
    --use_sar --sar_activation_layer_k {k} --task mme
    --output_dir results/ablation_k_{k} """
    + MME
)
CONFIGURATIONS = (
    "exp_sec3.2_grad_sparsity_sft",
    "exp_sec3.3_grad_sparsity_control",
    "analysis_sec4.3_sfs_fi_eval",
    "eval_sec6.2_main_llava",
    "analysis_sec6.3_layerwise_probe",
    "eval_sec6.3_ablation_k",
)
GINI = {f"attention_grad_sparsity_per_layer/layer_{i}_{p}_gini" for i in range(LAYERS) for p in "qk"} | {
    f"attention_grad_sparsity_agg/avg_{depth}_q_gini" for depth in ("shallow", "middle", "deep", "total")
}
GRADIENTS = {f"gradient_analysis/avg_{kind}_token_grad_L1" for kind in ("visual", "text")}


class Workplace:
    """A folder in which the commands are typed, as if ``experiments/`` lay there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = {
            "path_to_base_model": "base",
            "path_to_sft_model": "results/sft_grad_analysis",
            "path_to_your_sft_model": "results/sft_grad_analysis",
            "path_to_model_to_probe": "results/sft_grad_analysis",
            "media": str(DATA),
            "mme": str(DATA / "benchmarks" / "mme"),
        }

    def type(self, command: str) -> str:
        """What the command prints."""
        for name, path in self.paths.items():
            command = command.replace(f"<{name}>", str(path))
        script, *flags = command.split()
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", [script, *flags])
            runpy.run_path(str(REPOSITORY / "experiments" / script), run_name="__main__")
        return printed.getvalue()

    def json(self, path: str) -> dict:
        return json.loads((self.folder / "results" / path).read_text())

    def train(self, output_dir: str, control: str) -> list[dict]:
        """What W&B was told."""
        import wandb

        wandb.teardown()  # a process keeps the folder of its first run
        known = set(self.folder.glob("wandb/offline-run-*"))
        try:
            self.type(TRAIN.format(output_dir=output_dir, control=control))
            assert wandb.run.name == "sft_gradient_analysis"
        finally:
            wandb.finish()
        (run,) = set(self.folder.glob("wandb/offline-run-*")) - known
        (file,) = run.glob("run-*.wandb")
        end = time.monotonic() + 60  # wandb's own process may still write after finish() has returned
        while len(rows := wandb_history(file)) < 4:  # gradients at steps 1 and 10, the loss at 10, the end
            assert time.monotonic() < end, rows
            time.sleep(0.2)
        return rows


def keys(rows: list[dict]) -> set[str]:
    return {name for row in rows for name in row}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    settings = json.loads((MINIATURE_PATH / "config.json").read_text())
    settings["text_config"] |= {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.1,
    }  # fmt: skip
    settings["vision_config"] |= {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2
    }  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(**settings)).save_pretrained(folder / "base")
    load_miniature()[1].save_pretrained(folder / "base")
    (folder / "data").mkdir()
    shutil.copy(DATA / "dataset_info.json", folder / "data")
    shapes = json.loads((DATA / "shapes_llava.json").read_text())
    (folder / "data" / "llava_instruct_50k.json").write_text(json.dumps(5 * shapes))  # 10 steps of 16
    made = Workplace(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        made.type(f"data/make_refcoco_sar.py --data_dir {DATA / 'benchmarks/refcoco'} --output_dir data")
        yield made
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fine_tuned(place) -> list[dict]:
    return place.train("results/sft_grad_analysis", "")


@pytest.fixture(scope="module")
def control(place, fine_tuned) -> list[dict]:
    return place.train("results/control_grad_analysis", CONTROL)


# Every day tests/test_whole_way.py: from training to a score, by the same programs.
@pytest.mark.slow
def test_fine_tuning_logs_gradient_sparsity(place, fine_tuned):
    folder = place.folder / "results" / "sft_grad_analysis"
    assert keys(fine_tuned) >= GRADIENTS | GINI
    assert {"train/loss", "train/learning_rate"} <= keys(fine_tuned)
    assert not any("loss_contrastive" in name for name in keys(fine_tuned))
    values = {name: value for row in fine_tuned for name, value in row.items()}
    assert all(0 <= values[name] <= 1 for name in GINI)
    assert all(values[name] > 0 for name in GRADIENTS)
    lines = [json.loads(line) for line in (folder / "gradient_sparsity.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10]
    assert all(set(line) >= GRADIENTS | GINI for line in lines)
    assert Image.open(folder / "training_loss.png").size[0] > 100
    assert {"train_loss", "train_runtime"} <= set(place.json("sft_grad_analysis/all_results.json"))
    assert (folder / "model.safetensors").is_file()


@pytest.mark.slow  # every day tests/training: the control trainer, its keys at W&B, the figures of a run
def test_the_control_group_logs_its_loss_and_the_figures_compare_both(place, fine_tuned, control):
    assert keys(control) >= GRADIENTS | GINI
    assert {"train/loss_contrastive", "train/loss_text_gen"} <= keys(control)
    from typer.testing import CliRunner

    from sar_fast.cli import app

    results = place.folder / "results"
    runs = [str(results / f"{name}_grad_analysis") for name in ("sft", "control")]
    done = CliRunner().invoke(app, ["plot", *runs, "--output_dir", str(results / "figures")])
    assert done.exit_code == 0, done.output
    for name in ("figure_3.png", "figure_4.png"):
        assert Image.open(results / "figures" / name).size[0] > 500


@pytest.mark.slow
def test_semantic_focus_with_grounding_models(place, fine_tuned, request, tmp_path, monkeypatch):
    bert_folder, (checkpoint, _) = request.getfixturevalue("bert"), request.getfixturevalue("original_detector")
    torch.save(original_sam(request.getfixturevalue("segmenter")), tmp_path / "sam.pth")
    place.paths |= {
        "path_to_groundingdino_config": write_config(tmp_path, text_encoder_type=str(bert_folder)),
        "path_to_groundingdino_checkpoint": checkpoint,
        "path_to_sam_checkpoint": tmp_path / "sam.pth",
    }
    segment = np.zeros((64, 64), bool)
    segment[10:20, 30:50] = True
    monkeypatch.setattr(GroundedMasks, "segment", lambda *_: segment)  # a random SAM may well find nothing
    printed = place.type(FOCUS)
    found = place.json("sfs_fi_eval/focus_metrics_results.json")
    assert found["num_samples_evaluated"] == 4
    assert 0 < found["semantic_focus_score"] < 1
    assert 0 <= found["focus_instability"] <= 2
    assert f"SFS  {found['semantic_focus_score']:.4f}" in printed
    assert f"FI  {found['focus_instability']:.4f}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_main_table(place, fine_tuned, name):
    place.type(TABLE[name])
    found = place.json(f"{name}/mme/all_results.json")
    assert found["num_samples_evaluated"] == 8
    assert {"accuracy", "score", "correct", "total"} <= set(found["overall"])
    sar = place.json(f"{name}/mme/run_metadata.json")["settings"]["sar"]
    assert sar is None if name != "eval_sars" else (sar["activation_layer_k"], sar["beta"]) == (10, 0.5)


@pytest.mark.slow
def test_the_probe_of_every_layer(place, fine_tuned):
    place.type(PROBE)
    found = place.json("layerwise_probe/layerwise_probe_results.json")
    assert list(found) == [str(layer) for layer in range(LAYERS)]
    assert all(0 <= score <= 1 for score in found.values())
    assert (place.folder / "results" / "layerwise_probe" / "layerwise_probe.png").is_file()


@pytest.mark.slow
def test_the_ablation_over_k(place, fine_tuned):
    for k in (5, 15):
        place.type(ABLATION.format(k=k))
        assert place.json(f"ablation_k_{k}/run_metadata.json")["settings"]["sar"]["activation_layer_k"] == k
        assert place.json(f"ablation_k_{k}/all_results.json")["overall"]["total"] == 8


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_configuration_files_have_the_names_that_are_given(name):
    assert (REPOSITORY / "experiments" / "sar_paper" / f"{name}.yaml").is_file()
