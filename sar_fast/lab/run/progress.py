"""Progress bars: in a terminal and in a notebook; nothing where output is piped."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from tqdm.autonotebook import tqdm as notebook_tqdm


def progress_bar(total: int, what: str, *, unit: str = "sample", here: bool = True) -> tqdm[Any]:
    """A bar to ``update``; of several processes the one where ``here`` is True shows it."""
    if in_notebook():
        return notebook_tqdm(total=total, desc=what, unit=unit, disable=not here)
    return tqdm(total=total, desc=what, unit=unit, disable=not (here and sys.stderr.isatty()))


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"
