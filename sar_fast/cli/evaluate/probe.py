"""``--do_layerwise_probe``: from the flags to ``layerwise_probe_results.json`` and Figure 5."""

from __future__ import annotations

import sys
from pathlib import Path

from sar_fast.base.errors import arguments_named
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.cli.evaluate.loading import FLAGS as SHARED
from sar_fast.cli.evaluate.loading import session_of, subject_of
from sar_fast.lab.focus.dataset import GroundingDataset
from sar_fast.lab.probe.heads import HeadTraining
from sar_fast.lab.probe.results import RESULTS, ProbeResults, read_results
from sar_fast.lab.probe.run import Probing
from sar_fast.lab.probe.run import run as measure

FLAGS = SHARED | {
    "task": "--layerwise_probe_task",
    "lr": "--probe_lr",
    "epochs": "--probe_epochs",
    "feature_scale": "--probe_feature_scale",
    "seeds": "--probe_seeds",
}


@arguments_named(FLAGS)
def run(arguments: EvaluationArguments) -> dict[str, float]:
    """Reads features that are not on disk yet, trains and scores the heads; every process of a launch calls it.

    Returns layer -> score, on the main process; ``{}`` on the others.
    """
    session = session_of(arguments)
    dataset = GroundingDataset.find(
        arguments.dataset, arguments.dataset_dir, arguments.media_dir, arguments.max_samples
    )
    training = HeadTraining(
        lr=arguments.probe_lr,
        epochs=arguments.probe_epochs,
        batch_size=arguments.probe_batch_size,
        feature_scale=arguments.probe_feature_scale,
    )
    probing = Probing(
        arguments.layerwise_probe_task, training, arguments.probe_seeds, arguments.per_device_eval_batch_size
    )
    measure(subject_of(arguments, session.state), dataset, probing, session, arguments.output_dir, words=FLAGS)
    if not session.state.is_main_process:
        return {}
    results = read_results(arguments.output_dir)
    _report(results, Path(arguments.output_dir))
    return results.by_layer()


def _report(results: ProbeResults, output: Path) -> None:
    print("layer  score  95 % interval   training loss")
    for layer, (score, (low, high), loss) in enumerate(zip(results.scores, results.intervals, results.train_loss)):
        print(f"{layer:5d}  {score:.3f}  {low:.3f} to {high:.3f}  {loss:.4f}")
    print(f"{'':5}  {results.baseline:.3f}  {'without features':14}  {results.constant_loss:.4f}")
    for warning in results.warned(FLAGS):
        sys.stderr.write(f"warning: {warning}\n")
    for reason, ids in results.skipped.items():
        print(f"skipped, {reason}: {len(ids)}, first {ids[0]}")
    print(f"{results.sizes['validation_samples']} validation samples; {output / RESULTS}")
