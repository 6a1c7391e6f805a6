"""``probe_layers``: what linear heads can read off each layer of a model that the caller has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sar_fast.base.extras import need
from sar_fast.config import SARConfig
from sar_fast.lab.focus.dataset import GroundingDataset
from sar_fast.lab.focus.samples import GroundingSample
from sar_fast.lab.probe.heads import HeadTraining
from sar_fast.lab.probe.results import ProbeResults, read_results
from sar_fast.lab.probe.run import Probing, run
from sar_fast.lab.run.session import Session, folder_or_none, processes_of
from sar_fast.lab.run.subject import Subject


def probe_layers(
    model: nn.Module,
    processor: Any,
    samples: Sequence[GroundingSample] | str | Path,
    *,
    sar: SARConfig | None = None,
    task: str = "grounding",
    training: HeadTraining | None = None,
    seeds: int = 3,
    batch_size: int = 8,
    folder: str | Path | None = None,
    overwrite: bool = False,
    dataset_dir: str | Path | None = None,
    media_dir: str | Path | None = None,
    max_samples: int | None = None,
    seed: int = 42,
) -> ProbeResults:
    """What a linear head can read off each decoder layer: an object's box, or its class (section 6.3, Figure 5).

    The same as ``experiments/evaluate.py --do_layerwise_probe``. One forward pass per batch serves all layers; the
    model is given back as it came.

    Args:
        model: of transformers, of a supported family, PEFT-wrapped or not. processor: its processor.
        samples: pictures with a query, and a box or a label; or a dataset's name or file. Two pictures or more.
        sar: SAR while features are read. None: the model as it is, with the SAR that may be on it.
        task: ``"grounding"``: the box by L1 loss, right at IoU >= 0.5; ``"classification"``: the label.
        training: of the heads; by default the research code's rate, epochs and batch, on standardised features.
        seeds: how often heads are trained, from different initial weights and orders; scores are means.
        batch_size: prompts per forward pass.
        folder: where features and results stay; another training of the heads takes the features as they are. None
            keeps nothing.
        overwrite: replace the results of another call in the folder; features of the same settings stay.
        dataset_dir, media_dir: of a dataset's name or file: where the registry is, and where pictures' paths start.
        max_samples: take the first ones alone. seed: of the split into training and validation pictures, and the heads.

    Returns:
        Scores by layer, and what is to be known of them (``warnings``), on every process of a launch.

    Raises:
        ArgumentError: an argument that cannot be, before anything runs or is written; a folder of other results.
        ValueError: a dataset that is none, or too few samples.
    """
    need("probe_layers", "matplotlib")
    probing = Probing(task, HeadTraining() if training is None else training, seeds, batch_size)
    subject = Subject.of(model, processor, sar)
    dataset = GroundingDataset.find(samples, dataset_dir, media_dir, max_samples)
    asked = {
        "samples": dataset.name,
        **probing.settings(seed),
        "batch_size": batch_size,
        "max_samples": max_samples,
        "sar": None if sar is None else sar.to_dict(),
    }
    state = processes_of(model)
    with folder_or_none(folder, overwrite, state) as path:
        run(subject, dataset, probing, Session(asked, state, seed=seed, overwrite=overwrite), path)
        state.wait_for_everyone()
        return read_results(path)
