"""``--do_sfs_fi_eval`` and ``--do_layerwise_probe`` from the flags to the files."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sar_fast.cli.evaluate import focus, probe
from sar_fast.cli.evaluate.arguments import parse
from sar_fast.lab.focus import DatasetMasks, FocusMetricsEvaluator, SampleSkipped
from sar_fast.lab.focus.dataset import load_grounding_samples
from sar_fast.lab.focus.samples import decode_mask

ROOT = Path(__file__).parents[2]
YAMLS = ROOT / "experiments" / "sar_paper"
DATA = ROOT / "experiments" / "data"
FOCUS = [
    "--do_sfs_fi_eval",
    "--dataset",
    "shapes_grounding",
    "--max_samples",
    "20",
    "--per_device_eval_batch_size",
    "4",
]
PROBE = ["--do_layerwise_probe", "--dataset", "shapes_grounding", "--max_samples", "40", "--probe_seeds", "1"]


# a box of 6 x 4 pixels and a piece of a row, in 10 x 20; text by pycocotools 2.0.11
RUNS = [
    [21, 6, 4, 6, 4, 6, 4, 6, 101, 1, 9, 1, 9, 1, 9, 1, 9, 1, 1],
    "e06400000Q3KTM0000000H",
    b"e06400000Q3KTM0000000H",
]


def arguments(flags: list[str], output: Path, *more: str):
    base = ["--model_name_or_path", "miniature", "--device", "cpu", "--output_dir", str(output)]
    return parse([*base, *flags, *more])


class TestFocusCommand:
    def test_interrupted_and_continued_is_one_run(self, tmp_path, monkeypatch):
        whole = focus.run(arguments(FOCUS, tmp_path / "whole"))
        score, calls = FocusMetricsEvaluator.score, []

        def stop_in_the_third_batch(self, samples):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return score(self, samples)

        monkeypatch.setattr(FocusMetricsEvaluator, "score", stop_in_the_third_batch)
        with pytest.raises(KeyboardInterrupt):
            focus.run(arguments(FOCUS, tmp_path / "stopped"))
        assert not (tmp_path / "stopped" / "focus_metrics_results.json").exists()
        calls.extend([1, 1])
        continued = focus.run(arguments(FOCUS, tmp_path / "stopped"))
        assert len(calls) == 3 + 2 + 3  # of five batches, two were done
        assert (tmp_path / "stopped" / "samples.jsonl").read_bytes() == (
            tmp_path / "whole" / "samples.jsonl"
        ).read_bytes()
        different = {"metadata"}
        assert {k: v for k, v in continued.items() if k not in different} == {
            k: v for k, v in whole.items() if k not in different
        }
        again = focus.run(arguments(FOCUS, tmp_path / "whole"))  # nothing left to do
        assert again["semantic_focus_score"] == whole["semantic_focus_score"]
        assert len(calls) == 8

    def test_results_have_the_research_codes_keys_and_the_runs_metadata(self, tmp_path):
        focus.run(arguments(FOCUS, tmp_path, "--focus_overlays", "true"))
        found = json.loads((tmp_path / "focus_metrics_results.json").read_text())
        assert 0 <= found["semantic_focus_score"] <= 1
        assert 0 <= found["focus_instability"] <= 2
        assert found["num_samples_evaluated"] == 20
        assert found["metadata"]["settings"]["masks"] == {"source": "dataset"}
        assert len(found["metadata"]["settings"]["templates"]) == 5
        assert {"versions", "commit", "seed"} <= set(found["metadata"])
        assert len(list((tmp_path / "overlays").glob("*.png"))) == 20
        records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        mean = np.mean([r["semantic_focus_score"] for r in records])
        assert found["semantic_focus_score"] == pytest.approx(mean)

    def test_other_settings_need_another_folder(self, tmp_path):
        focus.run(arguments(FOCUS, tmp_path))
        with pytest.raises(ValueError, match="other settings: layers was"):
            focus.run(arguments(FOCUS, tmp_path, "--focus_layers", "-2"))
        focus.run(arguments(FOCUS, tmp_path, "--focus_layers", "-2", "--overwrite_output_dir", "true"))

    @pytest.mark.parametrize("column", ["image", "mask"])
    @pytest.mark.parametrize("run", [focus.run, probe.run])
    def test_other_pictures_or_masks_in_the_same_file_need_another_folder(self, tmp_path, run, column):
        rows = pq.read_table(DATA / "shapes_grounding.parquet").to_pylist()[:8]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        kind = {focus.run: ["--do_sfs_fi_eval"], probe.run: ["--do_layerwise_probe", "--probe_seeds", "1"]}[run]
        flags = [*kind, "--dataset", str(tmp_path / "rows.parquet")]
        run(arguments(flags, tmp_path / "out"))
        for row in rows:
            value = row[column] if isinstance(row[column], dict) else {"bytes": row[column]}
            with Image.open(io.BytesIO(value["bytes"])) as picture:
                other = Image.new(picture.mode, picture.size, 1)
            other.save(buffer := io.BytesIO(), format="PNG")
            row[column] = {**value, "bytes": buffer.getvalue()} if isinstance(row[column], dict) else buffer.getvalue()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        with pytest.raises(ValueError, match=r'other settings: asked was "\w+", now'):
            run(arguments(flags, tmp_path / "out"))

    def test_with_sar_maps_are_also_weighted(self, tmp_path):
        flags = ["--use_sar", "--sar_activation_layer_k", "2", "--sar_beta", "0.1", "--max_samples", "6"]
        found = focus.run(arguments(FOCUS, tmp_path, *flags))
        assert set(found["c_weighted"]) >= {"semantic_focus_score", "focus_instability"}

    def test_half_a_grounding_pair_is_an_error(self, tmp_path):
        with pytest.raises(
            ValueError, match="--sam_checkpoint_path must be given: masks by grounding need a detector and a segmenter"
        ):
            focus.run(arguments(FOCUS, tmp_path, "--gd_checkpoint_path", "x"))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--gd_config_path x.py", "--gd_config_path must be left out without --gd_checkpoint_path and --sam_check"),
            ("--sam_model_type vit_x", "--sam_model_type must be left out without"),
            ("--gd_box_threshold 0.5", "--gd_box_threshold must be left out without"),
            ("--sam_mask_cache x", "--sam_mask_cache must be left out without"),
            ("--gd_checkpoint_path a/b --sam_checkpoint_path c.pth --sam_model_type vit_x", "vit_h; got 'vit_x'"),
            (
                "--gd_checkpoint_path a/b --sam_checkpoint_path c/d --sam_model_type vit_b",
                "--sam_model_type must be left out for",
            ),
            (
                "--gd_checkpoint_path a/b --sam_checkpoint_path c/d --gd_config_path x",
                "--gd_config_path must be left out for",
            ),
            (
                "--gd_checkpoint_path /nope --sam_checkpoint_path c/d",
                "--gd_checkpoint_path must be a folder on",
            ),
            (
                "--gd_checkpoint_path {pth} --sam_checkpoint_path c/d --gd_config_path x",
                "--gd_config_path must be a file that exists; got x",
            ),
            (
                "--gd_checkpoint_path {pth} --sam_checkpoint_path c/d --gd_config_path {pth} --gd_text_encoder /nope",
                "--gd_text_encoder must be a folder on this machine",
            ),
        ],
    )
    def test_flags_of_grounding_models(self, tmp_path, flags, message):
        (tmp_path / "x.pth").touch()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            focus.run(arguments(FOCUS, tmp_path / "out", *flags.format(pth=tmp_path / "x.pth").split()))
        assert not (tmp_path / "out").exists()


class TestProbeCommand:
    def test_files_and_a_second_run_without_forward_passes(self, tmp_path):
        scores = probe.run(arguments(PROBE, tmp_path))
        found = json.loads((tmp_path / "layerwise_probe_results.json").read_text())
        assert found == scores
        assert list(found) == ["0", "1", "2", "3"]
        details = json.loads((tmp_path / "layerwise_probe_details.json").read_text())
        assert details["forward_passes"] == 5  # 40 samples, 8 a batch: one pass a batch, not one a layer
        assert set(details["scores_ci95"]) == set(found)
        assert (tmp_path / "layerwise_probe.png").stat().st_size > 1000
        assert probe.run(arguments(PROBE, tmp_path)) == scores
        assert json.loads((tmp_path / "layerwise_probe_details.json").read_text())["forward_passes"] == 0

    def test_another_training_of_the_heads_overwrites_nothing_unasked(self, tmp_path):
        probe.run(arguments(PROBE, tmp_path))
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
        for flags, message in (
            (["--probe_lr", "0.01"], r"training\.lr was 0\.001, now 0\.01"),
            (["--probe_epochs", "6"], r"training\.epochs was 5, now 6"),
            (["--probe_batch_size", "8"], r"training\.batch_size was 32, now 8"),
            (["--probe_feature_scale", "none"], r'training\.feature_scale was "standardize", now "none"'),
            (["--probe_seeds", "2"], r"training\.seeds was 1, now 2"),
            (["--seed", "7"], r"training\.seed was 42, now 7"),
            (["--layerwise_probe_task", "classification"], 'task was "grounding", now "classification"'),
        ):
            with pytest.raises(ValueError, match=f"holds results of other settings: {message}.*overwrite_output_dir"):
                probe.run(arguments(PROBE, tmp_path, *flags))
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
        probe.run(arguments(PROBE, tmp_path, "--probe_lr", "0.01", "--overwrite_output_dir", "true"))
        details = json.loads((tmp_path / "layerwise_probe_details.json").read_text())
        assert details["training"]["lr"] == 0.01
        assert details["forward_passes"] == 0  # the features are of the same settings, and stay
        flags = ["--use_sar", "--sar_activation_layer_k", "2", "--sar_beta", "0.1", "--overwrite_output_dir", "true"]
        probe.run(arguments(PROBE, tmp_path, *flags))
        details = json.loads((tmp_path / "layerwise_probe_details.json").read_text())
        assert details["forward_passes"] == 5

    @pytest.mark.slow
    def test_heads_that_have_not_learned_are_named_with_a_remedy(self, tmp_path, capsys):
        """The research code's settings on few samples: too few steps for the rate, and every score is 0."""
        found = probe.run(arguments(PROBE, tmp_path / "few"))
        assert set(found.values()) == {0.0}
        details = json.loads((tmp_path / "few" / "layerwise_probe_details.json").read_text())
        (warning,) = details["warnings"]
        assert f"warning: {warning}" in capsys.readouterr().err
        assert details["training"]["steps"] == 5 * -(-details["train_samples"] // 32)
        assert min(details["train_loss"].values()) > details["constant_loss"]
        assert warning.startswith(
            "heads of every layer have not learned, and their scores say nothing of the layers: after 5"
        )
        assert "give more --probe_epochs (1000 make 1000 steps) or a larger --probe_lr" in warning

        raw = ["--probe_feature_scale", "none", "--probe_epochs", "20"]
        probe.run(arguments(PROBE, tmp_path / "raw", *raw))
        details = json.loads((tmp_path / "raw" / "layerwise_probe_details.json").read_text())
        (warning,) = details["warnings"]
        assert "raw features are" in warning
        assert "give --probe_feature_scale standardize" in warning

        probe.run(arguments(PROBE, tmp_path / "enough", "--probe_epochs", "1000"))
        details = json.loads((tmp_path / "enough" / "layerwise_probe_details.json").read_text())
        assert details["warnings"] == []
        assert max(details["train_loss"].values()) < details["constant_loss"]
        assert "has not learned" not in capsys.readouterr().err.split("raw features")[-1]

    def test_classification(self, tmp_path):
        found = probe.run(
            arguments(PROBE, tmp_path, "--layerwise_probe_task", "classification", "--probe_epochs", "40")
        )
        assert max(found.values()) > 0.6  # the query names the shape


@pytest.mark.parametrize("name", ["analysis_sec4.3_sfs_fi_eval", "analysis_sec6.3_layerwise_probe"])
@pytest.mark.parametrize("scale", ["", "_mini"])
def test_yamls_parse(name, scale, tmp_path):
    found = parse([str(YAMLS / f"{name}{scale}.yaml"), f"output_dir={tmp_path}"])
    assert found.do_sfs_fi_eval == ("4.3" in name)
    assert found.dataset == ("shapes_grounding" if scale else "refcoco_val_sar")


def test_the_research_codes_commands_parse():
    for flags in (
        "--do_sfs_fi_eval --dataset refcoco_val_sar --output_dir results/sfs_fi_eval --per_device_eval_batch_size 4 "
        "--predict_with_generate --bf16 --gd_config_path c.py --gd_checkpoint_path g.pth --sam_checkpoint_path s.pth",
        "--do_layerwise_probe --dataset refcoco_val_sar --layerwise_probe_task grounding --output_dir "
        "results/layerwise_probe --probe_lr 1e-3 --probe_epochs 5 --probe_batch_size 32",
    ):
        parse(["--model_name_or_path", "m", *flags.split()])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [FOCUS, PROBE], ids=["focus", "probe"])
def test_two_processes_are_one(flags, tmp_path):
    run = focus.run if flags is FOCUS else probe.run
    run(arguments(flags, tmp_path / "one"))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = [str(ROOT / "experiments" / "evaluate.py"), "--model_name_or_path", "miniature", "--device", "cpu"]
    subprocess.run(
        [sys.executable, *launch, *script, *flags, "--output_dir", str(tmp_path / "two")],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert (tmp_path / "two" / "samples.jsonl").read_bytes() == (tmp_path / "one" / "samples.jsonl").read_bytes()


class TestDataset:
    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (20, 10), (9, 9, 9)).save(buffer, format="PNG")
        return buffer.getvalue()

    def write(self, folder: Path, **changes) -> Path:
        row = {"image": {"bytes": self.png(), "path": None}, "query": "where?", "object_prompt": "cat"}
        row |= {"bbox": [1.0, 2.0, 8.0, 9.0]} | changes
        row = {k: v for k, v in row.items() if v is not None}
        pq.write_table(pa.Table.from_pylist([row]), folder / "rows.parquet")
        return folder / "rows.parquet"

    def test_drawn_rows_bring_masks_boxes_and_labels(self):
        samples = load_grounding_samples("shapes_grounding", DATA, limit=3)
        assert [s.id for s in samples] == ["0", "1", "2"]
        for sample in samples:
            mask = DatasetMasks().mask(sample)
            x1, y1, x2, y2 = map(int, sample.bbox)
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            assert sample.label in sample.object_prompt

    def test_polygons_become_masks(self, tmp_path):
        # COCO's flat x, y list: a rectangle 4 wide and 6 high, corners included by Pillow's polygon
        path = self.write(tmp_path, segmentation=[2.0, 1.0, 5.0, 1.0, 5.0, 6.0, 2.0, 6.0])
        (sample,) = load_grounding_samples(str(path), DATA)
        mask = DatasetMasks().mask(sample)
        assert mask.shape == (10, 20)
        assert np.argwhere(mask).min(0).tolist() == [1, 2]
        assert np.argwhere(mask).max(0).tolist() == [6, 5]

    @pytest.mark.parametrize("column", ["mask", "segmentation"])
    @pytest.mark.parametrize("counts", RUNS)
    def test_cocos_run_lengths_become_masks(self, counts, column, tmp_path):
        path = self.write(tmp_path, bbox=None, **{column: {"size": [10, 20], "counts": counts}})
        (sample,) = load_grounding_samples(str(path), DATA)
        mask = DatasetMasks().mask(sample)
        expected = np.zeros((10, 20), bool)
        expected[1:7, 2:6] = expected[8, 15:] = True
        np.testing.assert_array_equal(mask, expected)

    def test_an_ellipse_in_run_lengths(self):
        # differences to earlier runs of both signs; text by pycocotools 2.0.11
        y, x = np.mgrid[:10, :20]
        ellipse = ((x - 8) / 6) ** 2 + ((y - 4) / 3.5) ** 2 < 1
        text = {"size": (10, 20), "counts": "Q1362N2O000000000001N2Nj1"}
        np.testing.assert_array_equal(decode_mask(text, (20, 10)), ellipse)

    def test_run_lengths_of_other_sizes_are_listed_skips(self, tmp_path):
        numbers = {
            "fits": {"size": [10, 20], "counts": [21, 9, 170]},
            "short": {"size": [10, 20], "counts": [21, 9, 169]},
            "transposed": {"size": [20, 10], "counts": [21, 9, 170]},
            "empty": {"size": [10, 20], "counts": [200]},
        }
        written = {"cut": "e06400000Q3KTM0000000h", "no": "e0 6", "backwards": "e06400000Q3KTM000000TN", "none": ""}
        texts = {name: {"size": [10, 20], "counts": text} for name, text in written.items()}
        row = {"image": {"bytes": self.png(), "path": None}, "query": "where?", "object_prompt": "cat"}
        for name, masks in (("numbers", numbers), ("texts", texts)):
            table = pa.Table.from_pylist([{**row, "id": i, "segmentation": mask} for i, mask in masks.items()])
            pq.write_table(table, tmp_path / f"{name}.parquet")
        flags = ["--do_sfs_fi_eval", "--dataset", str(tmp_path / "numbers.parquet")]
        found = focus.run(arguments(flags, tmp_path / "out"))
        assert found["skipped"] == {
            "unreadable mask": ["short"],
            "mask of another shape than its picture": ["transposed"],
            "empty mask": ["empty"],
        }
        record = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[1])
        assert record["detail"] == (
            "unreadable mask: run lengths make up 199 pixels, needed 10 x 20 (height, width), as their size says"
        )
        reasons = {}
        for sample in load_grounding_samples(str(tmp_path / "texts.parquet"), DATA):
            with pytest.raises(SampleSkipped) as skipped:
                DatasetMasks().mask(sample)
            reasons[sample.id] = str(skipped.value)
        assert "ends within a number" in reasons["cut"]
        assert "has ' ', which stands for no number" in reasons["no"]
        assert "make up" in reasons["backwards"]
        assert "make up 0 pixels" in reasons["none"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"query": None}, "row 0: no query; it has image, object_prompt, bbox"),
            ({"query": " "}, "query is ' ', needed words"),
            ({"bbox": [1.0, 2.0, 3.0]}, "needed four numbers"),
            ({"bbox": [1.0, 2.0, 3.0, float("nan")]}, "needed four numbers"),
            ({"image": 5}, "image is int 5, needed a path"),
            ({"mask": 3.5}, "mask is float 3.5, needed a path, .*; or polygons, or run lengths"),
            ({"segmentation": 3.5}, "row 0: segmentation is float 3.5"),
            (
                {"segmentation": {"size": [10], "counts": [200]}},
                r"segmentation: size is \[10\], needed \[hei",
            ),
            ({"segmentation": {"size": [10, 0], "counts": [0]}}, "size is .*needed"),
            ({"segmentation": {"size": [10, 20], "counts": [-1, 201]}}, r"counts is '\[-1, 201\]', needed run lengths"),
            ({"segmentation": {"counts": [200]}}, "segmentation: size is None"),
            ({"segmentation": {"size": [10, 20]}}, "segmentation: counts is 'None'"),
        ],
    )
    def test_bad_rows_name_file_row_and_column(self, changes, message, tmp_path):
        path = self.write(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            load_grounding_samples(str(path), DATA)

    def test_unknown_and_missing_datasets(self, tmp_path):
        with pytest.raises(ValueError, match=r"'refcoco' is not in .*; known: .*shapes_grounding"):
            load_grounding_samples("refcoco", DATA)
        with pytest.raises(FileNotFoundError, match="needed its columns image, query, object_prompt, bbox"):
            load_grounding_samples("refcoco_val_sar", DATA)

    def test_an_unreadable_picture_is_a_listed_skip(self, tmp_path):
        path = self.write(tmp_path, image={"bytes": b"no picture", "path": None})
        rows = pq.read_table(path).to_pylist() + pq.read_table(self.write(tmp_path)).to_pylist()
        pq.write_table(pa.Table.from_pylist(rows), path)
        flags = ["--do_sfs_fi_eval", "--dataset", str(path)]
        found = focus.run(arguments(flags, tmp_path / "out"))
        assert found["skipped"] == {"unreadable image": ["0"]}
        record = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
        assert record["detail"] == "unreadable image: its format is unknown"  # the same in every run
        assert found["num_samples_evaluated"] == 1

    def test_bad_masks_words_and_truncated_pictures_are_listed_skips(self, tmp_path):
        path = self.write(tmp_path)
        (good,) = pq.read_table(path).to_pylist()
        truncated = good["image"]["bytes"][: len(good["image"]["bytes"]) // 2]
        other = io.BytesIO()
        Image.new("L", (3, 5), 255).save(other, format="PNG")
        changes = (
            {"mask": b"no picture"},
            {"mask": other.getvalue()},
            {"query": "an <image> of it"},
            {"object_prompt": "<image>"},
            {"image": {"bytes": truncated, "path": None}},
        )
        rows = [{**good, "id": str(n), "mask": None, **change} for n, change in enumerate(({}, *changes))]
        pq.write_table(pa.Table.from_pylist(rows), path)
        found = focus.run(arguments(["--do_sfs_fi_eval", "--dataset", str(path)], tmp_path / "out"))
        assert found["skipped"] == {
            "unreadable mask": ["1"],
            "mask of another shape than its picture": ["2"],
            "words with the placeholder of a picture": ["3", "4"],
            "unreadable image": ["5"],
        }
        more = pq.read_table(DATA / "shapes_grounding.parquet").to_pylist()[:20]
        more = [{**row, "mask": None, "id": f"more {number}"} for number, row in enumerate(more)]
        columns = [{k: row.get(k) for k in rows[0]} for row in (*rows, *more)]
        pq.write_table(pa.Table.from_pylist(columns), path)
        flags = ["--do_layerwise_probe", "--dataset", str(path), "--probe_seeds", "1"]
        probe.run(arguments(flags, tmp_path / "probe"))
        details = json.loads((tmp_path / "probe" / "layerwise_probe_details.json").read_text())
        assert details["skipped"] == {"words with the placeholder of a picture": ["3"], "unreadable image": ["5"]}
        assert details["num_samples_skipped"] == 2

    def test_a_missing_mask_file_names_its_row(self, tmp_path):
        with pytest.raises(ValueError, match=r"row 0: mask file .*gone\.png cannot be read"):
            load_grounding_samples(str(self.write(tmp_path, mask="gone.png")), DATA)
