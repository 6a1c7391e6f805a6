"""JSON that every reader takes: Python's writer has names for infinity and NaN, which JSON has not."""

from __future__ import annotations

import json
import re
from typing import Any

_STRING_OR_NAME = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')
_NUMBER_OF = {"Infinity": "1e999", "-Infinity": "-1e999"}


def dumps(value: Any, **options: Any) -> str:
    """``json.dumps`` with infinity (an allowed beta) as 1e999, which readers take for it; ``ValueError`` for NaN."""

    def plain(found: re.Match[str]) -> str:
        if found[0] == "NaN":
            raise ValueError("a number is NaN, which JSON cannot hold")
        return _NUMBER_OF.get(found[0], found[0])

    return _STRING_OR_NAME.sub(plain, json.dumps(value, **options))
