"""The report: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from sar_fast.lab.io.pictures import open_picture


def data_uri(picture: Image.Image) -> str:
    """The picture as a JPEG ``data:`` URI."""
    buffer = io.BytesIO()
    open_picture(picture).save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def colour_stops(colourmap: str, count: int = 9) -> str:
    """A matplotlib colour map as the stops of a CSS gradient."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return ", ".join(to_hex(colormaps[colourmap](i / (count - 1))) for i in range(count))


def write_report(path: Path, **context: Any) -> None:
    """Renders ``templates/report.html.j2`` with ``context``; an undefined name in it is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("sar_fast.lab.show", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
    path.write_text(environment.get_template("report.html.j2").render(**context), encoding="utf-8")
