"""``--do_layerwise_probe``: from the flags to ``layerwise_probe_results.json`` and Figure 5."""

from __future__ import annotations

import dataclasses
import logging
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sar_fast.evaluation.arguments import EvaluationArguments
from sar_fast.evaluation.benchmark import start_session, weights_stamp
from sar_fast.evaluation.focus.dataset import load_grounding_samples
from sar_fast.evaluation.models import dtype_name, load, start_processes
from sar_fast.evaluation.probe.heads import HeadTraining
from sar_fast.evaluation.probe.plot import draw_scores
from sar_fast.evaluation.probe.probe import LayerwiseProbe, ProbeResults, check_count
from sar_fast.evaluation.results import ResultFolder, write_json

RESULTS = "layerwise_probe_results.json"
DETAILS = "layerwise_probe_details.json"
FIGURE = "layerwise_probe.png"
FEATURES = "features"

logger = logging.getLogger(__name__)


def run(arguments: EvaluationArguments) -> dict[str, float]:
    """Reads features that are not on disk yet, trains and scores the heads; every process of a launch calls it.

    Returns layer -> score, on the main process; ``{}`` on the others.
    """
    clock = time.time()
    state = start_processes(arguments.device)
    samples = load_grounding_samples(
        arguments.dataset, arguments.dataset_dir, arguments.media_dir, arguments.max_samples
    )
    settings = {
        "analysis": "layerwise_probe",
        "dataset": arguments.dataset,
        "samples": len(samples),
        "max_samples": arguments.max_samples,
        "model": arguments.model_name_or_path,
        "weights": weights_stamp(arguments.model_name_or_path),
        "dtype": dtype_name(arguments),
        "sar": arguments.sar_config().to_dict() if arguments.use_sar else None,
        "task": arguments.layerwise_probe_task,
        "batch_size": arguments.per_device_eval_batch_size,
    }
    output = Path(arguments.output_dir)
    folder = ResultFolder(output, settings, arguments.overwrite_output_dir)
    state.wait_for_everyone()
    if state.is_main_process:
        folder.prepare()
        if arguments.overwrite_output_dir:
            _remove(output)
    state.wait_for_everyone()
    model, processor, handle = load(arguments, state)
    if handle is not None:
        handle.remove()  # the probe puts SAR on while it reads features
    probe = LayerwiseProbe(
        model,
        processor,
        task=arguments.layerwise_probe_task,
        training=HeadTraining(
            arguments.probe_lr,
            arguments.probe_epochs,
            arguments.probe_batch_size,
            feature_scale=arguments.probe_feature_scale,
        ),
        seeds=range(arguments.seed, arguments.seed + arguments.probe_seeds),
        split_seed=arguments.seed,
        batch_size=arguments.per_device_eval_batch_size,
        config=arguments.sar_config() if arguments.use_sar else None,
    )
    kept, skipped = probe.usable(samples)
    check_count(kept, skipped)
    session = start_session(arguments, state, len(kept))
    if state.is_main_process:
        probe.open_store(kept, output / FEATURES)  # one process makes the files
        folder.write_session(session)
        logger.info("probe: %d samples, %s", len(kept), arguments.layerwise_probe_task)
    state.wait_for_everyone()
    store, passes = probe.extract(
        kept, output / FEATURES, state.process_index, state.num_processes, progress=state.is_main_process
    )
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    results = dataclasses.replace(probe.fit(kept, store), skipped=skipped, forward_passes=passes)
    folder.merge([{"key": name, "right": row.tolist()} for name, row in results.by_sample.items()])
    write_json(output / RESULTS, results.by_layer())
    write_json(output / DETAILS, {**details(results, probe), "metadata": {"settings": settings, **session}})
    draw_scores(results, arguments.layerwise_probe_task, output / FIGURE)
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    folder.write_session(session | {"finished": finished, "seconds": round(time.time() - clock, 3)})
    _report(results, output)
    return results.by_layer()


def details(results: ProbeResults, probe: LayerwiseProbe) -> dict[str, Any]:
    """What lies beside layer -> score, as plain values."""
    return {
        "task": probe.task,
        "scores": results.by_layer(),
        "scores_ci95": {str(i): [float(v) for v in pair] for i, pair in enumerate(results.intervals)},
        "scores_by_seed": {str(seed): row.tolist() for seed, row in zip(probe.seeds, results.by_seed)},
        "baseline": results.baseline,
        "training": dataclasses.asdict(probe.training),
        "forward_passes": results.forward_passes,
        "num_samples_skipped": sum(map(len, results.skipped.values())),
        "skipped": results.skipped,
        **results.sizes,
    }


def _remove(output: Path) -> None:
    for name in (RESULTS, DETAILS, FIGURE):
        (output / name).unlink(missing_ok=True)
    for file in (output / FEATURES).glob("features*"):
        file.unlink()


def _report(results: ProbeResults, output: Path) -> None:
    print("layer  score  95 % interval")
    for layer, (score, (low, high)) in enumerate(zip(results.scores, results.intervals)):
        print(f"{layer:5d}  {score:.3f}  {low:.3f} to {high:.3f}")
    print(f"{'':5}  {results.baseline:.3f}  without features")
    for reason, ids in results.skipped.items():
        print(f"skipped, {reason}: {len(ids)}, first {ids[0]}")
    print(f"{results.sizes['validation_samples']} validation samples; {output / RESULTS}")
