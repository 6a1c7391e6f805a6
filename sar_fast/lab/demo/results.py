"""Everything the demo finds out, and how it becomes ``report.html`` and ``metrics.json``."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sar_fast import __version__
from sar_fast.base import json_text
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.lab.demo import accuracy
from sar_fast.lab.demo.accuracy import PairedAccuracy
from sar_fast.lab.demo.examples import Example, Prompt, draw_maps
from sar_fast.lab.io.answering import answer, build_inputs
from sar_fast.lab.measure import measurements
from sar_fast.lab.measure.measurements import Timing
from sar_fast.lab.measure.recording import attention_layers, record, recording_off
from sar_fast.lab.miniature.questions import draw_questions
from sar_fast.lab.run.rules import rule_label
from sar_fast.lab.show import heatmap, overlay
from sar_fast.lab.show.report import colour_stops, write_report

BATCH = 64  # questions of the larger sample that run together


@dataclasses.dataclass
class Results:
    """What one run of the demo found out.

    ``head_weights`` (re-weighted layers, H) are the factors c, mean over the examples; ``accuracy`` is set -> kind ->
    counts, empty unless counted.
    """

    model_name: str
    seed: int
    config: SARConfig
    device: str
    dtype: str
    parameters: int
    attention_layers: int
    layers: list[int]
    examples: list[Example]
    head_weights: np.ndarray
    visual_tokens: int
    accuracy: dict[str, dict[str, PairedAccuracy]] = dataclasses.field(default_factory=dict)
    timings: list[Timing] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def total(self) -> PairedAccuracy:
        """Counts over all sets and kinds."""
        return sum((c for kinds in self.accuracy.values() for c in kinds.values()), PairedAccuracy(0, 0, 0, 0, 0, 0))

    @property
    def verdict(self) -> str:
        return accuracy.verdict(self.total)

    @property
    def about_weights(self) -> str:
        """A sentence on where the factors come from."""
        if self.config.weighting is None:
            return self.config.rule.about_head_0
        return f"The rule is {rule_label(self.config.to_dict()['weighting'])}."


def ask_both(
    model: nn.Module, processor: Any, prompts: Sequence[Prompt], config: SARConfig, *, model_name: str, seed: int
) -> Results:
    """Replies to all prompts, and the statistics and attention of their prefill, without SAR and with it."""
    pictures, questions = [p.picture for p in prompts], [p.question for p in prompts]
    replies_off, replies_on = _answer_both(model, processor, pictures, questions, config)
    inputs = build_inputs(model, processor, pictures, questions)
    off, on = record(model, inputs, recording_off(model, config)), record(model, inputs, config)
    layers = sorted(on.stats)
    merge = getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", 1)
    examples = []
    for i, (prompt, *replies) in enumerate(zip(prompts, replies_off, replies_on)):
        rows = off.attention(i, layers, weighted=False), on.attention(i, layers, weighted=True)
        try:
            grid = overlay.visual_grid(inputs, rows[0].numel(), merge)
        except ValueError as error:
            examples.append(Example(prompt, *replies, None, str(error)))
        else:
            examples.append(Example(prompt, *replies, draw_maps(prompt, processor, *rows, grid)))
    return Results(
        model_name=model_name,
        seed=seed,
        config=config,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        attention_layers=attention_layers(model),
        layers=layers,
        examples=examples,
        head_weights=on.head_weights().numpy(),
        visual_tokens=int(on.visual_mask[0].sum()),
    )


def count_right(results: Results, model: nn.Module, processor: Any, per_kind: int, say: Callable[[str], None]) -> None:
    """Fills ``results.accuracy``: ``per_kind`` questions of each kind on each kind of background. ``say``: progress."""
    for number, (name, backgrounds) in enumerate(accuracy.SETS.items()):
        rng = np.random.default_rng([results.seed, 2, number])
        pairs = draw_questions(rng, per_kind, backgrounds)
        pictures, questions = [s.image for s, _ in pairs], [q.text for _, q in pairs]
        say(f"counting right answers to {len(questions)} questions, with and without SAR, {name}")
        replies = _answer_both(model, processor, pictures, questions, results.config)
        results.accuracy[name] = accuracy.paired_accuracy(pairs, *replies)


def time_everything(results: Results, model: nn.Module, processor: Any, say: Callable[[str], None]) -> None:
    """Fills ``results.timings``; ``say`` what is timed."""
    device, dtype = model.device, model.dtype
    prompts = [e.prompt for e in results.examples]
    inputs = build_inputs(model, processor, [p.picture for p in prompts], [p.question for p in prompts])
    kinds = {
        "attention": lambda: measurements.time_attention(device, dtype, results.config, seed=results.seed),
        "prefill": lambda: measurements.time_prefill(device, dtype, results.config, seed=results.seed),
        "the whole model": lambda: measurements.time_model(model, inputs, results.config),
    }
    if results.config.weighting is not None:  # the eager formulation is of the paper's rule
        kinds = {"the whole model": kinds["the whole model"]}
    for name, measure in kinds.items():
        say(f"timing {name}")
        results.timings.append(measure())


def _answer_both(
    model: nn.Module, processor: Any, pictures: Sequence[Any], questions: Sequence[str], config: SARConfig
) -> tuple[list[str], list[str]]:
    def run() -> list[str]:
        starts = range(0, len(questions), BATCH)
        parts = [answer(model, processor, pictures[i : i + BATCH], questions[i : i + BATCH]) for i in starts]
        return [reply for part in parts for reply in part]

    off = run()
    with apply_sar(model, config):
        return off, run()


def write(results: Results, folder: Path) -> Path:
    """Writes ``metrics.json`` and ``report.html`` into an existing folder; returns the report's path."""
    found = metrics(results)
    (folder / "metrics.json").write_text(json_text.dumps(found, indent=2) + "\n", encoding="utf-8")
    report = folder / "report.html"
    write_report(
        report,
        results=results,
        metrics=found,
        cells=heatmap.cell_colours(results.head_weights) if results.layers else [],
        span=2 ** heatmap.log_span(results.head_weights) if results.layers else 1.0,
        heat_stops=colour_stops(overlay.COLOURMAP),
        weight_stops=colour_stops(heatmap.COLOURMAP),
        names=measurements,
    )
    return report


def metrics(results: Results) -> dict[str, Any]:
    """The run as plain values."""
    return {
        "meta": {
            "model": results.model_name,
            "parameters": results.parameters,
            "seed": results.seed,
            "config": results.config.to_dict(),
            "device": results.device,
            "dtype": results.dtype,
            "threads": torch.get_num_threads(),
            "versions": {
                "sar_fast": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "numpy", "pillow")},
            },
            "seconds": round(results.seconds, 1),
        },
        "examples": [_example_values(e) for e in results.examples],
        "head_weights": {str(i): row.tolist() for i, row in zip(results.layers, results.head_weights)},
        "accuracy": {
            name: {kind: dataclasses.asdict(counts) for kind, counts in kinds.items()}
            for name, kinds in results.accuracy.items()
        },
        "total": {**dataclasses.asdict(results.total), "p_value": results.total.p_value, "verdict": results.verdict}
        if results.accuracy
        else None,
        "timings": [dataclasses.asdict(timing) for timing in results.timings],
    }


def _example_values(example: Example) -> dict[str, Any]:
    maps = example.maps
    return {
        "question": example.prompt.question,
        "truth": example.prompt.truth,
        "reply_off": example.reply_off,
        "reply_on": example.reply_on,
        "right_off": example.right_off,
        "right_on": example.right_on,
        "attention_on_object_off": maps.on_object[0] if maps and maps.on_object else None,
        "attention_on_object_on": maps.on_object[1] if maps and maps.on_object else None,
        "object_area": maps.object_area if maps else None,
    }
