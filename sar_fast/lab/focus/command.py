"""``--do_sfs_fi_eval``: SFS and FI of a model on a dataset, from its flags to ``focus_metrics_results.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sar_fast.base.errors import arguments_named
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.cli.evaluate.loading import FLAGS, load, model_settings, session_of
from sar_fast.hf.shared_prefix import sharing_of
from sar_fast.lab.focus.dataset import dataset_settings, load_grounding_samples
from sar_fast.lab.focus.evaluator import FI, SFS, FocusMetricsEvaluator, overlay_path, summarise
from sar_fast.lab.focus.prompts import DEFAULT_TEMPLATES, check_templates
from sar_fast.lab.focus.samples import DatasetMasks, GroundingSample, MaskSource
from sar_fast.lab.run.progress import progress_bar
from sar_fast.lab.run.results import write_json
from sar_fast.lab.run.sar_flags import naming_flags

RESULTS = "focus_metrics_results.json"
OVERLAYS = "overlays"
MASKS = "masks"


@arguments_named(FLAGS)
def run(arguments: EvaluationArguments) -> dict[str, Any]:
    """Scores what is not scored yet, then summarises all; every process of a launch calls it.

    Returns what ``focus_metrics_results.json`` holds, on the main process; ``{}`` on the others.
    """
    session = session_of(arguments)
    state = session.state
    templates = check_templates(arguments.focus_templates or DEFAULT_TEMPLATES)
    samples = load_grounding_samples(
        arguments.dataset, arguments.dataset_dir, arguments.media_dir, arguments.max_samples
    )
    masks = mask_source(arguments, str(state.device))
    settings = {
        "analysis": "sfs_fi",
        **dataset_settings(arguments.dataset, samples),
        **model_settings(arguments),
        "layers": arguments.focus_layers,
        "templates": list(templates),
        "masks": masks.describe(),
    }
    folder = session.open(arguments.output_dir, settings, products=[RESULTS, f"{OVERLAYS}/*.png"])
    known = folder.records()
    overlays = folder.path / OVERLAYS if arguments.focus_overlays else None

    def done(sample: GroundingSample) -> bool:
        record = known.get(sample.id)
        drawn = overlays is None or record is None or "skipped" in record or overlay_path(overlays, sample.id).is_file()
        return record is not None and drawn

    size = arguments.per_device_eval_batch_size
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    batches = [batch for batch in batches if not all(map(done, batch))]
    if batches:
        model, processor, handle = load(arguments, state)
        if handle is not None:
            handle.remove()  # the evaluator puts SAR on while it looks
        with naming_flags({"layers": "focus_layers"}):
            evaluator = FocusMetricsEvaluator(
                model,
                processor,
                masks,
                config=None if handle is None else handle.config,
                layers=arguments.focus_layers,
                templates=templates,
                overlay_dir=overlays,
            )
    session.begin("SFS and FI", len(samples), sum(map(len, batches)))
    if batches:
        session.note(sharing=sharing_of(model).describe())
        mine = batches[state.process_index :: state.num_processes]
        bar = progress_bar(sum(map(len, mine)), "SFS/FI", here=state.is_main_process)
        with bar, folder.open_part(state.process_index) as part:
            for batch in mine:
                scored = evaluator.score(batch)
                part.append({"key": record["id"], **record} for record in scored if record["id"] not in known)
                bar.update(len(batch))
    if not session.worked():
        return {}
    known = folder.records()
    records = [known[sample.id] for sample in samples]
    results = {**summarise(records, arguments.seed), "metadata": {"settings": settings, **session.metadata}}
    folder.merge(records)
    write_json(folder.path / RESULTS, results)
    session.finish()
    _report(results, folder.path)
    return results


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


def _report(results: dict[str, Any], output: Path) -> None:
    for name, key in (("SFS", SFS), ("FI", FI)):
        low, high = results[f"{key}_ci95"]
        print(f"{name:>5}  {results[key]:.4f}  95 % interval {low:.4f} to {high:.4f}")
    print(f"{'':>5}  SFS of a map that is the same everywhere: {results['uniform_focus_score']:.4f}")
    for reason, ids in results["skipped"].items():
        print(f"skipped, {reason}: {len(ids)}, first {ids[0]}")
    for note, ids in results["notes"].items():
        print(f"{note}: {len(ids)}, first {ids[0]}")
    print(f"{results['num_samples_evaluated']} samples of {results['num_pictures']} pictures; {output / RESULTS}")
