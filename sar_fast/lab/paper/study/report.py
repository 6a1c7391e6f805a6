"""The study's tables, from the answers that :mod:`.run` keeps, and the page that carries them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sar_fast.config import SARConfig
from sar_fast.lab.measure.paired import Difference, holm, interval_of_share, paired_difference
from sar_fast.lab.miniature.places.checkpoint import SIDES
from sar_fast.lab.miniature.places.questions import CHANCE, KINDS
from sar_fast.lab.miniature.places.scenes import SIDE
from sar_fast.lab.miniature.places.sets import SETS
from sar_fast.lab.paper.study.run import MASSES, OTHER_PICTURES, PLAIN, answer_file, questions, right_of
from sar_fast.lab.paper.study.settings import CHANCE_SEEDS, GROUPS, PAPER, TREATED, Study, decodes, grid, name_of
from sar_fast.lab.run.results import read_json, write_text

NAMES = {"base": "Base", "sft": "SFT", "control": "Control", "unbiased": "SFT, no habits"}
COMPARED = ("balanced", "reversed")  # sets on which a setting is tested
Rows = Iterator[Sequence[str]]


def rights(study: Study, group: str, part: str, name: str, side: int, setting: str) -> np.ndarray:
    """(seeds, questions) bool."""
    return np.stack([right_of(answer_file(study, seed, group, part, name, side, setting)) for seed in study.seeds])


def table(head: Sequence[str], rows: Rows) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def groups_table(study: Study, found: Mapping[str, Any]) -> str:
    """Accuracy of the groups on the three sets, and without their pictures."""
    columns = [*((name, PLAIN) for name in SETS), *(("balanced", shown) for shown in OTHER_PICTURES)]
    chance = np.mean([CHANCE[q.kind] for _, q in questions("test", "balanced", SIDE, study.test)])

    def rows() -> Rows:
        for group in GROUPS:
            shares = [rights(study, group, "test", name, SIDE, setting) for name, setting in columns]
            yield [NAMES[group], *(_share(right) for right in shares)]
        yield ["chance", *[_percent(chance)] * len(columns)]

    return table(["", *SETS, "balanced, grey pictures", "balanced, another's picture"], rows())


def kinds_table(study: Study, found: Mapping[str, Any]) -> str:
    """Accuracy by kind of question on the balanced and the reversed set."""
    kinds = {n: np.array([q.kind for _, q in questions("test", n, SIDE, study.test)]) for n in COMPARED}

    def rows() -> Rows:
        for kind in KINDS:
            cells = []
            for name in COMPARED:
                for group in GROUPS:
                    right = rights(study, group, "test", name, SIDE, PLAIN)[:, kinds[name] == kind]
                    cells.append(_percent(right.mean()))
            yield [kind, _percent(CHANCE[kind]), *cells]

    return table(["", "chance", *(f"{NAMES[group]}, {name}" for name in COMPARED for group in GROUPS)], rows())


def sar_table(study: Study, found: Mapping[str, Any]) -> str:
    """What SAR and its rivals change for SFT, in points, on the test questions."""
    rivals = {
        "SAR, the paper's setting": [name_of(SARConfig(**PAPER))],
        "SAR, chosen on validation": [found["chosen"]],
        "its weights, shuffled over heads": [f"shuffled_{seed}" for seed in CHANCE_SEEDS],
        "random weights of its spread": [f"random_{seed}" for seed in CHANCE_SEEDS],
        "oracle: attention on the object": ["oracle"],
        "oracle, standardized": ["oracle_standardized"],
    }
    differences = {(row, name): _against_plain(study, name, SIDE, s) for row, s in rivals.items() for name in COMPARED}
    p = holm({f"{row}, {name}": d.p for (row, name), d in differences.items()})

    def rows() -> Rows:
        for row in rivals:
            cells = []
            for name in COMPARED:
                cells += [_points(differences[row, name]), f"{p[f'{row}, {name}']:.3f}"]
            yield [row, *cells]

    return table(["SFT with", *(cell for name in COMPARED for cell in (f"{name}, points", "p (Holm)"))], rows())


def sides_table(study: Study, found: Mapping[str, Any]) -> str:
    """SFT and what SAR changes, against the number of visual tokens."""

    def rows() -> Rows:
        for side in study.sides:
            cells = []
            for name in COMPARED:
                cells.append(_share(rights(study, TREATED, "test", name, side, PLAIN)))
                for setting in (name_of(SARConfig(**PAPER)), found["chosen"]):
                    cells.append(_points(_against_plain(study, name, side, [setting])))
            yield [str(SIDES[side]), *cells]

    columns = ("SFT", "paper's setting", "chosen setting")
    return table(["visual tokens", *(f"{name}: {column}" for name in COMPARED for column in columns)], rows())


def grid_table(study: Study, found: Mapping[str, Any]) -> str:
    """On validation questions no SAR, the grid's best and worst settings, and the chosen one with each ``decode``."""
    ask = lambda name: rights(study, TREATED, "validation", "balanced", SIDE, name).mean()
    order = sorted(grid(), key=ask, reverse=True)
    names = dict.fromkeys([PLAIN, *order[:3], *order[-3:], *decodes(grid()[found["chosen"]])])
    return table(["setting", "right"], ([f"`{name}`", _percent(ask(name))] for name in names))


def focus_table(study: Study, found: Mapping[str, Any]) -> str:
    """Focus, attention on pictures and objects, and sparsity of gradients by group, mean over seeds."""

    def rows() -> Rows:
        for group in GROUPS:
            focus = [found["focus"][seed][group] for seed in study.seeds]
            cells = [
                f"{np.mean([f[name] for f in focus]):.4f}" for name in ("semantic_focus_score", "focus_instability")
            ]
            masses = [
                read_json(answer_file(study, seed, group, "test", "balanced", SIDE, MASSES)) for seed in study.seeds
            ]
            for name in ("visual_mass", "object_mass"):
                cells.append(f"{np.mean([m[name] for m in masses]):.4f}")
            for name in ("avg_total_q_gini", "avg_total_k_gini"):
                values = [found["sparsity"][seed][group] for seed in study.seeds]
                cells.append(f"{np.mean([v[name] for v in values]):.3f}" if all(values) else "-")
            yield [NAMES[group], *cells]

    head = ["", "SFS", "FI", "attention on the picture", "on the object", "Gini of q's gradient", "of k's"]
    return table(head, rows())


TABLES: dict[str, Callable[[Study, Mapping[str, Any]], str]] = {
    "groups": groups_table,
    "kinds": kinds_table,
    "sar": sar_table,
    "sides": sides_table,
    "grid": grid_table,
    "focus": focus_table,
}


def write_page(study: Study, found: Mapping[str, Any], page: Path) -> None:
    """Put every table between its marks ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{page} has no marks {begin.strip()} and {end}")
        before, rest = text.split(begin)
        text = before + begin + make(study, found) + end + rest.split(end)[1]
    write_text(page, text)


def _against_plain(study: Study, name: str, side: int, settings: Sequence[str]) -> Difference:
    """A setting, or the mean over several that differ by chance, against no SAR."""
    after = np.mean([rights(study, TREATED, "test", name, side, setting) for setting in settings], axis=0)
    return paired_difference(rights(study, TREATED, "test", name, side, PLAIN), after)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _share(right: np.ndarray) -> str:
    mean, low, high = interval_of_share(right)
    return f"{_percent(mean)} [{_percent(low)}, {_percent(high)}]"


def _points(d: Difference) -> str:
    return f"{100 * d.mean:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
