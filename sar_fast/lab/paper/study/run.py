"""The study's measurements, each kept in a file of its own, so that an interrupted run goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sar_fast.config import SARConfig
from sar_fast.lab.focus import GroundingSample
from sar_fast.lab.focus.measure import measure_focus
from sar_fast.lab.io.weights import weights_stamp
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.places.checkpoint import at_side
from sar_fast.lab.miniature.places.scenes import SIDE
from sar_fast.lab.miniature.places.sets import SETS, Pair, draw_set
from sar_fast.lab.paper.study.answers import answers
from sar_fast.lab.paper.study.rules import ObjectHeads
from sar_fast.lab.paper.study.settings import (
    GROUPS,
    LAYERS,
    PAPER,
    TEST,
    TREATED,
    VALIDATION,
    Study,
    decodes,
    grid,
    name_of,
    rules,
)
from sar_fast.lab.run.progress import progress_bar
from sar_fast.lab.run.results import read_json, read_lines, write_json
from sar_fast.lab.run.run_metadata import versions
from sar_fast.method.weighting import Equal

SPARSITY = "gradient_sparsity.jsonl"  # of a training's folder
PLAIN, MASSES = "plain", "masses"


def run(study: Study) -> dict[str, Any]:
    """All measurements; what ``study.json`` in the output folder holds.

    ``ValueError`` if the folder has answers of other models or other numbers of questions.
    """
    study.out.mkdir(parents=True, exist_ok=True)
    stamp = {
        "models": {seed: {g: weights_stamp(str(study.model(seed, g))) for g in GROUPS} for seed in study.seeds},
        "validation": study.validation,
        "test": study.test,
        "pictures": study.pictures,
    }
    known = study.out / "stamp.json"
    if known.exists() and read_json(known) != stamp:
        raise ValueError(f"{study.out} has answers of other models or settings; give another folder, or remove it")
    write_json(known, stamp)

    for seed in study.seeds:
        for group in GROUPS:
            _plain(study, seed, group)
        _asked(study, seed, TREATED, "validation", "balanced", SIDE, {PLAIN: None, **grid()})
    chosen = choose(study)
    for seed in study.seeds:
        _asked(study, seed, TREATED, "validation", "balanced", SIDE, decodes(chosen))
        for side in study.sides:
            for name in SETS:
                _asked(study, seed, TREATED, "test", name, side, settings_of(chosen, side))
    found = {
        "chosen": name_of(chosen),
        "stamp": stamp,
        "versions": versions(),
        "focus": {
            seed: {group: read_json(_focus_file(study, seed, group)) for group in GROUPS} for seed in study.seeds
        },
        "sparsity": {seed: {g: _sparsity(study.model(seed, g)) for g in GROUPS} for seed in study.seeds},
    }
    write_json(study.out / "study.json", found)
    return found


def settings_of(chosen: SARConfig, side: int) -> dict[str, SARConfig]:
    """What is asked of the test questions beside no SAR at all; the comparison of rules for the smallest pictures."""
    paper = SARConfig(**PAPER)
    found = {name_of(paper): paper, name_of(chosen): chosen}
    return found | (rules(chosen) if side == SIDE else {})


def choose(study: Study) -> SARConfig:
    """The setting of the grid with the most right answers to the validation questions, over all seeds."""
    settings = grid()
    files = {
        name: [answer_file(study, seed, TREATED, "validation", "balanced", SIDE, name) for seed in study.seeds]
        for name in settings
    }
    return settings[max(settings, key=lambda name: np.mean([right_of(path).mean() for path in files[name]]))]


@functools.lru_cache(maxsize=16)
def questions(part: str, name: str, side: int, per_kind: int) -> list[Pair]:
    """A set; the same for every model."""
    first = {"validation": VALIDATION, "test": TEST}[part]
    return draw_set(np.random.default_rng([first, SETS.index(name), side]), name, per_kind, side=side)


def right_of(path: Path) -> np.ndarray:
    """(questions,) bool of a file of answers."""
    return np.array([c == "1" for c in read_json(path)["right"]])


def answer_file(study: Study, seed: str, group: str, part: str, name: str, side: int, setting: str) -> Path:
    return study.out / "answers" / seed / group / f"{part}_{name}_{side}" / f"{setting}.json"


def _plain(study: Study, seed: str, group: str) -> None:
    """A group without SAR: all test sets, without its pictures too, its heads' masses, and its focus."""
    for side in study.sides:
        for name in SETS:
            _asked(study, seed, group, "test", name, side, {PLAIN: None})
    _asked(study, seed, group, "test", "balanced", SIDE, dict.fromkeys(OTHER_PICTURES))
    equal = SARConfig(activation_layer_k=LAYERS, weighting=Equal())
    _asked(study, seed, group, "test", "balanced", SIDE, {MASSES: equal})
    if not (path := _focus_file(study, seed, group)).exists():
        model, processor = load_miniature(path=study.model(seed, group))
        found = measure_focus(model, processor, focus_samples(study.pictures))
        _write(path, dict(found.summary))


def focus_samples(count: int) -> list[GroundingSample]:
    """Colour questions of balanced pictures, with the mask of the object that they are about."""
    samples = []
    for number, (drawn, question) in enumerate(questions("test", "balanced", SIDE, max(count, 8))):
        if question.kind == "colour" and len(samples) < count:
            item = drawn.scene.objects[question.targets[0]]
            samples.append(
                GroundingSample(
                    str(number), Image.fromarray(drawn.scene.image), question.text, item.shape, mask=item.mask
                )
            )
    return samples


def _focus_file(study: Study, seed: str, group: str) -> Path:
    return study.out / "focus" / seed / f"{group}.json"


def _asked(
    study: Study, seed: str, group: str, part: str, name: str, side: int, settings: Mapping[str, SARConfig | None]
) -> None:
    """Answers under every setting that has none yet."""
    paths = {setting: answer_file(study, seed, group, part, name, side, setting) for setting in settings}
    missing = [setting for setting, path in paths.items() if not path.exists()]
    if not missing:
        return
    pairs = questions(part, name, side, getattr(study, part))
    model, processor = at_side(*load_miniature(path=study.model(seed, group)), side)
    with progress_bar(len(missing), f"{seed} {group}, {part} {name} {side}", unit="setting") as bar:
        for setting in missing:
            config = settings[setting]
            rule = config.weighting if config is not None else None
            found = answers(
                model,
                processor,
                pairs,
                config,
                pictures=OTHER_PICTURES[setting](pairs) if setting in OTHER_PICTURES else None,
                objects=rule.objects if isinstance(rule, ObjectHeads) else None,
                statistics=setting == MASSES,
            )
            _write(paths[setting], found.to_json())
            bar.update()


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def _grey(pairs: list[Pair]) -> Callable[[int], np.ndarray]:
    return lambda number: np.full_like(pairs[number][0].scene.image, 128)


def _swapped(pairs: list[Pair]) -> Callable[[int], np.ndarray]:
    """The picture of another question: half the set further on."""
    return lambda number: pairs[(number + len(pairs) // 2) % len(pairs)][0].scene.image


OTHER_PICTURES = {"grey": _grey, "swapped": _swapped}  # shown to see what a model knows without the question's own


def _sparsity(folder: Path) -> dict[str, float] | None:
    """Mean over the training of each aggregated Gini index of gradients; None for a base, which was not fine-tuned."""
    path = folder / SPARSITY
    if not path.is_file():
        return None
    rows = read_lines(path)
    names = sorted({name for row in rows for name in row if name.startswith("attention_grad_sparsity_agg/")})
    return {name.split("/")[1]: float(np.mean([row[name] for row in rows if name in row])) for name in names}
