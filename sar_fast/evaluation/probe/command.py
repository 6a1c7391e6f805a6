"""``--do_layerwise_probe``: from the flags to ``layerwise_probe_results.json`` and Figure 5."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sar_fast.evaluation.arguments import EvaluationArguments
from sar_fast.evaluation.focus.dataset import dataset_settings, load_grounding_samples
from sar_fast.evaluation.models import load
from sar_fast.evaluation.probe.features import DONE
from sar_fast.evaluation.probe.heads import HeadTraining
from sar_fast.evaluation.probe.plot import draw_scores
from sar_fast.evaluation.probe.probe import LayerwiseProbe, ProbeResults
from sar_fast.evaluation.results import write_json
from sar_fast.evaluation.session import Session, model_settings

RESULTS = "layerwise_probe_results.json"
DETAILS = "layerwise_probe_details.json"
FIGURE = "layerwise_probe.png"
FEATURES = "features"


def run(arguments: EvaluationArguments) -> dict[str, float]:
    """Reads features that are not on disk yet, trains and scores the heads; every process of a launch calls it.

    Returns layer -> score, on the main process; ``{}`` on the others.
    """
    session = Session(arguments)
    state = session.state
    samples = load_grounding_samples(
        arguments.dataset, arguments.dataset_dir, arguments.media_dir, arguments.max_samples
    )
    settings = {
        "analysis": "layerwise_probe",
        **dataset_settings(arguments.dataset, samples),
        **model_settings(arguments),
        "task": arguments.layerwise_probe_task,
    }
    folder = session.open(
        arguments.output_dir,
        settings,
        products=[RESULTS, DETAILS, FIGURE, f"{FEATURES}/features*"],
        work=f"{FEATURES}/{DONE}",
    )
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
    probe.check(kept, skipped)
    session.begin(f"probe, {arguments.layerwise_probe_task}", len(samples), len(kept))
    features = folder.path / FEATURES
    if state.is_main_process:
        probe.open_store(kept, features)  # one process makes the files
    state.wait_for_everyone()
    store, passes = probe.extract(
        kept, features, state.process_index, state.num_processes, progress=state.is_main_process
    )
    if not session.worked():
        return {}
    results = dataclasses.replace(probe.fit(kept, store), skipped=skipped, forward_passes=passes)
    folder.merge([{"key": name, "right": row.tolist()} for name, row in results.by_sample.items()])
    write_json(folder.path / RESULTS, results.by_layer())
    metadata = {"settings": settings, **session.metadata}
    write_json(folder.path / DETAILS, {**details(results, probe), "metadata": metadata})
    draw_scores(results, arguments.layerwise_probe_task, folder.path / FIGURE)
    session.finish()
    _report(results, folder.path)
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


def _report(results: ProbeResults, output: Path) -> None:
    print("layer  score  95 % interval")
    for layer, (score, (low, high)) in enumerate(zip(results.scores, results.intervals)):
        print(f"{layer:5d}  {score:.3f}  {low:.3f} to {high:.3f}")
    print(f"{'':5}  {results.baseline:.3f}  without features")
    for reason, ids in results.skipped.items():
        print(f"skipped, {reason}: {len(ids)}, first {ids[0]}")
    print(f"{results.sizes['validation_samples']} validation samples; {output / RESULTS}")
