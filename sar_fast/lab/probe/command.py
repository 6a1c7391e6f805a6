"""``--do_layerwise_probe``: from the flags to ``layerwise_probe_results.json`` and Figure 5."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sar_fast.base.errors import arguments_named
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.cli.evaluate.loading import FLAGS, load, model_settings, session_of
from sar_fast.lab.focus.dataset import dataset_settings, load_grounding_samples
from sar_fast.lab.probe.features import DONE
from sar_fast.lab.probe.heads import HeadTraining
from sar_fast.lab.probe.plot import draw_scores
from sar_fast.lab.probe.probe import LayerwiseProbe, ProbeResults
from sar_fast.lab.run.results import write_json

RESULTS = "layerwise_probe_results.json"
DETAILS = "layerwise_probe_details.json"
FIGURE = "layerwise_probe.png"
FEATURES = "features"
ENOUGH_STEPS = 1000  # in which heads on standardised features learn at the research code's learning rate


@arguments_named(FLAGS)
def run(arguments: EvaluationArguments) -> dict[str, float]:
    """Reads features that are not on disk yet, trains and scores the heads; every process of a launch calls it.

    Returns layer -> score, on the main process; ``{}`` on the others.
    """
    session = session_of(arguments)
    state = session.state
    samples = load_grounding_samples(
        arguments.dataset, arguments.dataset_dir, arguments.media_dir, arguments.max_samples
    )
    training = HeadTraining(
        lr=arguments.probe_lr,
        epochs=arguments.probe_epochs,
        batch_size=arguments.probe_batch_size,
        feature_scale=arguments.probe_feature_scale,
    )
    of_features = {**dataset_settings(arguments.dataset, samples), **model_settings(arguments)}
    settings = {
        "analysis": "layerwise_probe",
        **of_features,
        "task": arguments.layerwise_probe_task,
        "training": {**dataclasses.asdict(training), "seeds": arguments.probe_seeds, "seed": arguments.seed},
    }
    # features are no product: they know what they are of, and another training of the heads takes them as they are
    folder = session.open(
        arguments.output_dir, settings, products=[RESULTS, DETAILS, FIGURE], work=f"{FEATURES}/{DONE}"
    )
    model, processor, handle = load(arguments, state)
    if handle is not None:
        handle.remove()  # the probe puts SAR on while it reads features
    probe = LayerwiseProbe(
        model,
        processor,
        task=arguments.layerwise_probe_task,
        training=training,
        seeds=range(arguments.seed, arguments.seed + arguments.probe_seeds),
        split_seed=arguments.seed,
        batch_size=arguments.per_device_eval_batch_size,
        config=None if handle is None else handle.config,
        depends=of_features,
    )
    kept, skipped = probe.usable(samples)
    probe.check(kept, skipped)
    session.begin(f"probe, {arguments.layerwise_probe_task}", len(samples), len(kept))
    features = folder.path / FEATURES
    if state.is_main_process:
        probe.open_store(kept, features, overwrite=arguments.overwrite_output_dir)  # one process makes the files
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
    found = details(results, probe)
    write_json(folder.path / DETAILS, {**found, "metadata": metadata})
    draw_scores(results, arguments.layerwise_probe_task, folder.path / FIGURE)
    session.finish()
    _report(results, found["warnings"], folder.path)
    return results.by_layer()


def details(results: ProbeResults, probe: LayerwiseProbe) -> dict[str, Any]:
    """What lies beside layer -> score, as plain values."""
    return {
        "task": probe.task,
        "scores": results.by_layer(),
        "scores_ci95": {str(i): [float(v) for v in pair] for i, pair in enumerate(results.intervals)},
        "scores_by_seed": {str(seed): row.tolist() for seed, row in zip(probe.seeds, results.by_seed)},
        "baseline": results.baseline,
        "training": {**dataclasses.asdict(probe.training), "steps": results.steps},
        "train_loss": {str(i): float(loss) for i, loss in enumerate(results.train_loss)},
        "constant_loss": results.constant_loss,
        "feature_rms": {str(i): float(size) for i, size in enumerate(results.feature_rms)},
        "warnings": warnings(results, probe.training),
        "forward_passes": results.forward_passes,
        "num_samples_skipped": sum(map(len, results.skipped.values())),
        "skipped": results.skipped,
        **results.sizes,
    }


def warnings(results: ProbeResults, training: HeadTraining) -> list[str]:
    """What a reader of the scores has to know, in sentences: heads that have not learned, and what helps."""
    layers = results.unlearned
    if not layers:
        return []
    which = "every layer" if len(layers) == len(results.scores) else f"layers {', '.join(map(str, layers))}"
    span = lambda values: f"{min(values[i] for i in layers):.3g} to {max(values[i] for i in layers):.3g}"
    found = (
        f"heads of {which} have not learned, and their scores say nothing of the layers: after {results.steps} steps "
        f"with --probe_lr {training.lr:g} the training loss is {span(results.train_loss)}, that of a constant answer "
        f"{results.constant_loss:.3g}; "
    )
    if training.feature_scale == "none":
        remedy = f"raw features are {span(results.feature_rms)} large (rms): give --probe_feature_scale standardize"
    elif results.steps < ENOUGH_STEPS:
        epochs = math.ceil(ENOUGH_STEPS * training.epochs / results.steps)
        remedy = f"give more --probe_epochs ({epochs} make {ENOUGH_STEPS} steps) or a larger --probe_lr"
    else:
        remedy = "give another --probe_lr; if none helps, the features hold nothing that a linear head can read"
    return [f"{found}{remedy} (--overwrite_output_dir keeps the features)"]


def _report(results: ProbeResults, warnings: Sequence[str], output: Path) -> None:
    print("layer  score  95 % interval   training loss")
    for layer, (score, (low, high), loss) in enumerate(zip(results.scores, results.intervals, results.train_loss)):
        print(f"{layer:5d}  {score:.3f}  {low:.3f} to {high:.3f}  {loss:.4f}")
    print(f"{'':5}  {results.baseline:.3f}  {'without features':14}  {results.constant_loss:.4f}")
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")
    for reason, ids in results.skipped.items():
        print(f"skipped, {reason}: {len(ids)}, first {ids[0]}")
    print(f"{results.sizes['validation_samples']} validation samples; {output / RESULTS}")
