"""``ask``: one question about one picture, and where the model looked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.base.scalars import is_integer
from sar_fast.config import SARConfig
from sar_fast.lab.io.answering import encode, generate
from sar_fast.lab.io.chat_template import build_prompt
from sar_fast.lab.io.pictures import PictureError, find_picture, open_picture, picture_name
from sar_fast.lab.measure.recording import Recording, record_with
from sar_fast.lab.run.exports import data_frame, new_folder
from sar_fast.lab.run.progress import progress_bar
from sar_fast.lab.run.results import write_json
from sar_fast.lab.run.subject import Loaded, Subject
from sar_fast.lab.show.figures import new_figure, written
from sar_fast.lab.show.heatmap import draw_heatmap
from sar_fast.lab.show.overlay import grid_of, head_average, heat_overlay, seen_region, visual_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to a question about a picture; with SAR, what the prompt's heads measured.

    Attributes:
        text: the answer.
        question, picture: what was asked about; the picture as it is shown, mode RGB.
        head_weights: layer -> (H,) fp32, c, the factors on the heads' outputs. Empty without SAR, as the next two.
        sav: layer -> (H,) fp32, AV x SA, from which the paper's rule makes them.
        attention: layer -> (H, V) fp32, of the last text query over the V visual tokens, before the factors.
        grid: (rows, columns) of the visual tokens on the picture, in reading order; None where they form no rectangle.
        region: (x1, y1, x2, y2) in pixels, the part of the picture that the model saw.
    """

    text: str
    question: str
    picture: Image.Image = dataclasses.field(repr=False)
    head_weights: Mapping[int, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    sav: Mapping[int, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    attention: Mapping[int, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    grid: tuple[int, int] | None = None
    region: tuple[int, int, int, int] | None = None

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row per layer and head: ``layer``, ``head``, ``head_weight``, ``sav``."""
        return data_frame(self._rows())

    def save(self, folder: str | Path) -> Path:
        """Write ``answer.json``, with the weights, and ``picture.png``; the folder. ``ArgumentError`` if anything lies
        there."""
        path = new_folder(folder)
        write_json(path / "answer.json", {"question": self.question, "text": self.text, "heads": self._rows()})
        self.picture.save(path / "picture.png")
        return path

    def overlay(self, layers: Sequence[int] | None = None) -> Image.Image:
        """Where the last text query looks, as heat over the part of the picture that the model saw.

        Args:
            layers: re-weighted layers that are averaged; None = all of them. Heads count by the size of their factors.

        Raises:
            ArgumentError: a layer that SAR does not re-weight.
            ValueError: asked without SAR; visual tokens that form no rectangle.
        """
        self._need_layers()
        layers = sorted(self.attention) if layers is None else layers
        if not layers or set(layers) - set(self.attention):
            known = ", ".join(map(str, sorted(self.attention)))
            raise ArgumentError("layers", list(layers), f"be one or more of {known}")
        if self.grid is None:
            raise ValueError("the visual tokens of this prompt do not form one rectangle of the picture")
        maps = [head_average(self.attention[layer], self.head_weights[layer]) for layer in layers]  # (V,) each
        values = grid_of(torch.stack(maps).mean(0), self.grid)
        return heat_overlay(self.picture.crop(self.region), values, float(values.max()))

    def plot(self, path: str | Path | None = None) -> Figure:
        """The overlay, and the factors of heads by layers beside it; written as a picture if a path is given."""
        self._need_layers()
        figure = new_figure(9, 4)
        left, right = figure.subplots(1, 2)
        left.imshow(self.overlay())
        left.set_axis_off()
        left.set_title(f"{self.question}\n{self.text}", fontsize="small", wrap=True)
        layers = sorted(self.head_weights)
        draw_heatmap(right, torch.stack([self.head_weights[layer] for layer in layers]).numpy(), layers)
        return written(figure, path)

    def _need_layers(self) -> None:
        if not self.attention:
            raise ValueError("no layer was re-weighted, and none looked at: ask with a SARConfig of K > 0")

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"layer": layer, "head": head, "head_weight": c, "sav": sav}
            for layer in sorted(self.head_weights)
            for head, (c, sav) in enumerate(zip(self.head_weights[layer].tolist(), self.sav[layer].tolist()))
        ]


def ask(
    model: nn.Module,
    processor: Any,
    picture: Any,
    question: str | Sequence[str],
    *,
    sar: SARConfig | None = None,
    max_new_tokens: int = 128,
) -> Answer | list[Answer]:
    """Greedy answers to questions about pictures, one after another, with or without SAR.

    With SAR each costs one more pass over the prompt, for the statistics.

    Args:
        model, processor: as of :func:`~.evaluate.evaluate`.
        picture: a path, bytes, or a Pillow picture, or a list of them.
        question: in words, or a list of questions. One picture or question beside a list goes with each of the other.
        sar: SAR while they are answered. None: the model as it is, with the SAR that may be on it.
        max_new_tokens: the longest answer.

    Returns:
        An answer; a list where a list was given.

    Raises:
        ArgumentError: a picture that cannot be opened, a question without words, lists of several lengths.
        ProcessorRefusal: the processor makes no input of a picture.
    """
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ArgumentError("max_new_tokens", repr(max_new_tokens), "be a whole number, at least 1")
    places, questions = _pairs(picture, question)
    pictures = [_open(place) for place in places]
    for words in questions:
        build_prompt(processor, words)  # refuses what is no question, before anything is changed
    answers = []
    bar = progress_bar(len(questions), "ask", unit="question", here=len(questions) > 1)
    with Subject.of(model, processor, sar).opened() as loaded, bar:
        for one, words in zip(pictures, questions):
            answers.append(_answer(loaded, one, words, max_new_tokens))
            bar.update()
    return answers if isinstance(picture, list | tuple) or isinstance(question, list | tuple) else answers[0]


def _pairs(picture: Any, question: Any) -> tuple[list[Any], list[str]]:
    """Pictures and questions, as many of each."""
    pictures, questions = ([*x] if isinstance(x, list | tuple) else None for x in (picture, question))
    if pictures is None:
        pictures = [picture] * (1 if questions is None else len(questions))
    if questions is None:
        questions = [question] * len(pictures)
    if len(pictures) != len(questions):
        raise ArgumentError("question", f"{len(questions)} for {len(pictures)} pictures", "be one per picture")
    for words in questions:
        if not isinstance(words, str):
            raise ArgumentError("question", type(words).__name__, "be a text")
    return pictures, questions


def _open(picture: Any) -> Image.Image:
    try:
        return open_picture(find_picture(picture, Path()))
    except PictureError as error:
        raise ArgumentError(
            "picture", f"one that {error} ({picture_name(picture)})", "be one that can be read"
        ) from error


def _answer(loaded: Loaded, picture: Image.Image, question: str, max_new_tokens: int) -> Answer:
    model, processor, handle = loaded
    inputs = encode(processor, [picture], [question]).to(model.device, model.dtype)
    (text,) = generate(model, processor, inputs, max_new_tokens)
    if handle is None or handle.config.activation_layer_k == 0:
        return Answer(text, question, picture)
    seen = record_with(handle, model, inputs)
    visual = seen.visual_mask[0]
    return Answer(
        text,
        question,
        picture,
        head_weights={layer: stats.head_weights[0].cpu() for layer, stats in seen.stats.items()},
        sav={layer: stats.sav[0].cpu() for layer, stats in seen.stats.items()},
        attention={layer: rows[0][:, visual].cpu() for layer, rows in seen.rows.items()},
        grid=_grid(model, inputs, seen),
        region=seen_region(getattr(processor, "image_processor", processor), picture.size),
    )


def _grid(model: nn.Module, inputs: Mapping[str, Tensor], seen: Recording) -> tuple[int, int] | None:
    merge = getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", 1)
    try:
        return visual_grid(inputs, int(seen.visual_mask[0].sum()), merge)
    except ValueError:
        return None
