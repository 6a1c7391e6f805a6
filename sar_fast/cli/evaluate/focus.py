"""``--do_sfs_fi_eval``: SFS and FI of a model on a dataset, from its flags to ``focus_metrics_results.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sar_fast.base.errors import arguments_named
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.cli.evaluate.loading import FLAGS as SHARED
from sar_fast.cli.evaluate.loading import session_of, subject_of
from sar_fast.lab.focus.dataset import GroundingDataset
from sar_fast.lab.focus.prompts import DEFAULT_TEMPLATES
from sar_fast.lab.focus.results import RESULTS, FocusResults, read_results
from sar_fast.lab.focus.run import Looking
from sar_fast.lab.focus.run import run as measure
from sar_fast.lab.focus.samples import DatasetMasks, MaskSource

MASKS = "masks"
FLAGS = SHARED | {
    "layers": "--focus_layers",
    "templates": "--focus_templates",
    "detector": "--gd_checkpoint_path",
    "detector_config": "--gd_config_path",
    "text_encoder": "--gd_text_encoder",
    "box_threshold": "--gd_box_threshold",
    "text_threshold": "--gd_text_threshold",
    "segmenter": "--sam_checkpoint_path",
    "segmenter_type": "--sam_model_type",
}


@arguments_named(FLAGS)
def run(arguments: EvaluationArguments) -> dict[str, Any]:
    """Scores what is not scored yet, then summarises all; every process of a launch calls it.

    Returns what ``focus_metrics_results.json`` holds, on the main process; ``{}`` on the others.
    """
    session = session_of(arguments)
    dataset = GroundingDataset.find(
        arguments.dataset, arguments.dataset_dir, arguments.media_dir, arguments.max_samples
    )
    looking = Looking(
        masks=mask_source(arguments, str(session.state.device)),
        layers=arguments.focus_layers,
        templates=arguments.focus_templates or DEFAULT_TEMPLATES,
        batch_size=arguments.per_device_eval_batch_size,
        overlays=arguments.focus_overlays,
    )
    measure(subject_of(arguments, session.state), dataset, looking, session, arguments.output_dir)
    if not session.state.is_main_process:
        return {}
    results = read_results(arguments.output_dir)
    _report(results, Path(arguments.output_dir))
    return results.to_dict()


def mask_source(arguments: EvaluationArguments, device: str) -> MaskSource:
    """Grounding models where their checkpoints are given, else the dataset's masks and boxes."""
    detector, segmenter = arguments.gd_checkpoint_path, arguments.sam_checkpoint_path
    if detector is None:
        return DatasetMasks()
    from sar_fast.lab.focus.grounding import GroundedMasks

    return GroundedMasks(
        detector,
        segmenter,
        detector_config=arguments.gd_config_path,
        text_encoder=arguments.gd_text_encoder,
        segmenter_type=arguments.sam_model_type,
        box_threshold=arguments.gd_box_threshold,
        text_threshold=arguments.gd_text_threshold,
        cache=Path(arguments.sam_mask_cache or Path(arguments.output_dir) / MASKS),
        device=device if arguments.device == "auto" else arguments.device,
    )


def _report(results: FocusResults, output: Path) -> None:
    for name, value, (low, high) in (
        ("SFS", results.sfs, results.sfs_interval), ("FI", results.fi, results.fi_interval)
    ):  # fmt: skip
        print(f"{name:>5}  {value:.4f}  95 % interval {low:.4f} to {high:.4f}")
    print(f"{'':>5}  SFS of a map that is the same everywhere: {results.uniform_sfs:.4f}")
    for reason, ids in results.skipped.items():
        print(f"skipped, {reason}: {len(ids)}, first {ids[0]}")
    for note, ids in results.notes.items():
        print(f"{note}: {len(ids)}, first {ids[0]}")
    counts = results.summary
    print(f"{counts['num_samples_evaluated']} samples of {counts['num_pictures']} pictures; {output / RESULTS}")
