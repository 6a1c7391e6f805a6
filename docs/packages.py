"""Which package imports which: the picture in architecture.md, and the rule that no import goes up.

    python docs/packages.py            # redraws the picture from the imports as they are

Lazy imports and those for types alone count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/packages.py -->", "<!-- end of the picture -->"

ROOMS = {  # from the ground up: a room may import those before it
    "sar_kernels": "Triton kernels",
    "base": "errors, JSON, files",
    "method": "values, roles, weightings, oracle",
    "backends": "triton, composed, torch",
    "config": "SARConfig",
    "attention": "functions and operators",
    "hf": "apply_sar, families, SARAttention",
    "lab.io": "models, pictures, prompts",
    "lab.run": "result folders, sessions",
    "lab.show": "overlays, reports",
    "lab.measure": "recordings, times",
    "lab.miniature": "drawn pictures, small model",
    "lab.benchmark": "tasks, evaluate, sweep, ask",
    "lab.focus": "SFS and FI",
    "lab.probe": "layer-wise probe",
    "lab.training": "train, gradient sparsity",
    "lab.demo": "the demo",
    "lab.paper": "all experiments",
    "integrations": "other libraries' trainers",
    "cli": "commands",
}
FRONTS = {"sar_fast", "sar_fast.lab", "sar_fast.moved", "sar_fast.reference", "sar_fast.weighting", "sar_fast.__main__"}
VERSION = "sar_fast"  # of the fronts, what any room may ask for its version


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Module -> file, of both packages."""
    found = {}
    for base, package in ((root, "sar_fast"), (root / "kernels", "sar_kernels")):
        for file in sorted((base / package).rglob("*.py")):
            parts = file.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of both packages that it imports, wherever in it."""
    return {name: set(_imported(file, known)) for name, file in known.items()}


def _imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from below & known.keys()
            if below - known.keys():
                yield node.module


def room_of(module: str) -> str | None:
    """The room that a module is in; None for the fronts, through which users come in."""
    if module in FRONTS:
        return None
    path = module.removeprefix("sar_fast.")
    (found,) = (room for room in ROOMS if path == room or path.startswith(f"{room}."))
    return found


def arrows(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """(room, room that it imports)."""
    pairs = {(room_of(module), room_of(other)) for module, others in graph.items() for other in others}
    return {(a, b) for a, b in pairs if a is not None and b is not None and a != b}


def wrong_way(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room above, or of a front, as "module imports module"."""
    order, found = list(ROOMS), []
    for module, others in sorted(graph.items()):
        for other in sorted(others - {VERSION}):
            room, wanted = room_of(module), room_of(other)
            if room is not None and (wanted is None or order.index(wanted) > order.index(room)):
                found.append(f"{module} imports {other}")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import themselves through others, each circle once."""
    reached = {module: _reachable(graph, module) for module in graph}
    rings = {frozenset(m for m in reached[start] if start in reached[m]) for start in graph if start in reached[start]}
    return sorted(sorted(ring) for ring in rings)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = list(graph[start])
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += graph[module]
    return found


def picture(pairs: set[tuple[str, str]]) -> str:
    """The rooms as a Mermaid chart; an arrow that longer ways imply is left out."""
    graph = {room: {b for a, b in pairs if a == room} for room in ROOMS}
    implied = {(a, far) for a in graph for b in graph[a] for far in _reachable(graph, b)}
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {_node(room)}["<b>{room}</b><br/>{what}"]' for room, what in reversed(ROOMS.items())]
    lines += [f"    {_node(a)} --> {_node(b)}" for a in reversed(ROOMS) for b in ROOMS if (a, b) in pairs - implied]
    lines += ["```", "", f"{len(ROOMS)} rooms, {len(pairs)} arrows; those that longer ways imply are left out."]
    return "\n".join(lines)


def _node(room: str) -> str:
    return room.replace(".", "_")


def page(text: str, drawn: str) -> str:
    """A page's text with the picture in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{drawn}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), picture(arrows(imports(modules())))), encoding="utf-8")
