"""docs/families.md from the registry and a run of the family tests: ``python -m tests.hf.families_table [--check]``.

``--check`` writes nothing and fails if the file is not what the registry and the run give.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from sar_fast.hf.families import find_family, refused_model_types, registered_families
from tests.hf.tiny import CASES, EVERY_CASE
from tests.hf.tiny.lacks import ANY_PASS, SECOND_TURN, STATIC_CACHE

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = {  # heading -> the tests that must pass for a yes
    "tokens": ("test_a_token_gets_the_mean_norm_of_the_patches_it_depends_on",),
    "clips": (
        "test_a_clips_tokens_get_the_mean_norm_of_the_patches_they_depend_on",
        "test_clip_equals_dense_oracle",
    ),
    "batch": (
        "test_padded_batch_equals_dense_oracle_of_each_row",
        "test_huge_beta_unprotected_equals_sdpa",
        "test_text_only_row_is_left_alone",
    ),
    "generate": ("test_greedy_decoding_equals_one_dense_pass_over_prompt_and_answer",),
    "static": ("test_static_cache_equals_dynamic",),
    "beams": ("test_beams_of_a_batch_equal_rows_alone",),
    "train": (
        "test_gradients_through_the_weights_equal_the_dense_oracles",
        "test_checkpointed_gradients_equal_plain_ones",
    ),
    "remove": ("test_remove_restores_bit_for_bit",),
}
MASKS = "test_no_layer_gets_a_dense_mask"  # records these, by layer type
RECORDED = ("mask", "prompt on a GPU", "step on a GPU")
INTRODUCTION = """\
# Model families

Written by `python -m tests.hf.families_table` from the registry and a run of the family tests; not by hand.

`apply_sar` knows a family by `config.model_type`. Anything else is an `UnsupportedModelError`; `register_family` adds
one (see CONTRIBUTING.md). K, `activation_layer_k`, counts layers that attend, from the last.

## What SAR reads

The prior is the norm of each patch after block `min(2L // 3, L - 1)` of the vision encoder's L blocks, brought onto the
language model's visual tokens as this table says (docs/method.md, section 2).

| family | `model_type` | placeholders | norm of a visual token | note |
|---|---|---|---|---|
"""
REFUSED = """
Refused:

| `model_type` | why |
|---|---|
"""
BY_VERSION = """
## By version of transformers

From 5.4 on, all of them but those that came later. Failures of a version itself, without SAR, are listed in
`tests/hf/tiny/lacks.py`, and the tests show them; `tests/acceptance/transformers_versions.py` runs several versions.

| model | transformers | what |
|---|---|---|
"""
TESTED = """
## What was tested

Random models of two to six layers with pictures of several sizes, in fp32 on the CPU, transformers {version}. Real
checkpoints were not run here.

- **tokens**: each visual token's norm is the mean over exactly the patches that it depends on, as autograd finds them;
  **clips**: the same for video tokens, and logits against the oracle.
- **batch**: logits of a padded batch (left and right, one and two pictures per row) against a dense oracle that runs
  each row alone, within 1e-4 of the largest logit; SAR moves logits by more than 1e-2 of it. With a huge beta and no
  protected head: the logits of SDPA. A row of text alone keeps its logits.
- **generate**: greedy decoding of that batch, `decode="running"` and `"prompt"`, against one dense pass over prompt and
  answer; **static**: the same with a static cache; **beams**: two beams, two sequences, batch against rows alone.
- **train**: gradients of all parameters, through the weights too, against the oracle's, and with activation
  checkpointing against without; **remove**: logits and modules are bit for bit what they were.

"no, transformers": the same call fails in transformers without SAR, and the test asserts that failure.

"""
SEEN = """
## What the layers' masks are

Of the same models, as a test sees them in a padded batch and its answer; it fails where any of them is dense. "causal"
needs no mask but padding; anything else is, for every query of a prompt, the run of keys that it sees, and comes from
windows, chunks, or blocks that see ahead (pictures, PaliGemma's prompt). One query of an answer needs no more than a
mask of its keys. The backends are those that `backend="auto"` takes on a GPU for the same calls in bf16.

A dense mask is left where a graph of more than single queries is traced, where padding lies between real tokens of a
model that has such patterns, and under masks and mask functions of the user's own.

"""


class Outcomes:
    """A pytest plugin: the outcomes of every test, by its name and the tiny model that it ran on."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.recorded: dict[tuple[str, str], set[str]] = defaultdict(set)  # (model, heading) -> cells
        self._ran: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            self._ran[item.nodeid] = (item.originalname, params.get("case") or params.get("video_case"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":  # a failure ends the program, so what is skipped here is an expected failure
            test, model = self._ran[report.nodeid]
            self.found[test, model].append(report.outcome)
            for heading, cell in report.user_properties:
                self.recorded[model, heading].add(cell)


def run_tests() -> Outcomes:
    """Run the family tests; any failure ends the program."""
    outcomes = Outcomes()
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_families.py", "test_family_traps.py")]
    tests = " or ".join((MASKS, *(test for column in COLUMNS.values() for test in column)))
    code = pytest.main(["-q", "-k", f"({tests}) and not reentrant", *files], [outcomes])
    if code != 0:
        sys.exit("the family tests failed; no table")
    return outcomes


def registry_part() -> str:
    """The table of families and the table of refused types."""
    lines = [INTRODUCTION]
    for family in sorted(registered_families(), key=lambda family: family.name):
        types = ", ".join(f"`{t}`" for t in family.model_types)
        norms = family.token_norms.__doc__.strip().splitlines()[0]
        if family.video_token_norms is not None:
            norms += f" Clips: {family.video_token_norms.__doc__.strip().splitlines()[0]}"
        lines.append(f"| {family.name} | {types} | {', '.join(family.placeholder_ids)} | {norms} | {family.note} |\n")
    lines.append(REFUSED)
    lines += [f"| `{model_type}` | {reason} |\n" for model_type, reason in refused_model_types().items()]
    return "".join(lines) + version_part()


def version_part() -> str:
    """What each version of transformers lacks."""
    later = sorted({(case.since, case.name) for case in EVERY_CASE if case.since > (5, 4)})
    lines = [BY_VERSION, *(f"| `{name}` | before {_version(since)} | not there |\n" for since, name in later)]
    for what, lacks in (
        ("any pass", ANY_PASS),
        ("static cache", STATIC_CACHE),
        ("another turn on a cache", SECOND_TURN),
    ):
        for lack in lacks:
            models = ", ".join(f"`{model}`" for model in lack.models)
            from_, before = (_version(v) if v not in ((5, 4), (6, 0)) else "" for v in (lack.since, lack.before))
            span = (
                " ".join(part for part in (from_ and f"from {from_}", before and f"before {before}") if part) or "all"
            )
            how = " or ".join(f"`{error.__name__}`" for error in lack.errors) or "wrong answers"
            lines.append(f"| {models} | {span} | {what}: {how} |\n")
    return "".join(lines)


def _version(parts: tuple[int, int]) -> str:
    return ".".join(map(str, parts))


def tested_part(outcomes: Outcomes) -> str:
    """One row per tiny model."""
    import transformers

    lines = [TESTED.format(version=transformers.__version__)]
    lines.append(f"| model | family | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}\n")
    for name, case in CASES.items():
        cells = []
        for tests in COLUMNS.values():
            results = [r for test in tests for r in outcomes.found.get((test, name), [])]
            cells.append("-" if not results else "no, transformers" if "skipped" in results else "yes")
        lines.append(f"| `{name}` | {find_family(case.make().config).name} | {' | '.join(cells)} |\n")
    return "".join(lines)


def masks_part(outcomes: Outcomes) -> str:
    """One row per tiny model."""
    lines = [SEEN, f"| model | {' | '.join(RECORDED)} |\n|---|{'---|' * len(RECORDED)}\n"]
    for name in CASES:
        cells = ("; ".join(sorted(outcomes.recorded[name, heading])) for heading in RECORDED)
        lines.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with docs/families.md instead of writing it")
    check = parser.parse_args().check
    outcomes = run_tests()
    page = registry_part() + tested_part(outcomes) + masks_part(outcomes)
    if not check:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        sys.exit(f"{PAGE.name} is out of date: run python -m tests.hf.families_table")


if __name__ == "__main__":
    main()
