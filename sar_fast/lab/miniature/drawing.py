"""Pictures with known contents: coloured shapes on plain, textured or photographic backgrounds.

Every picture comes with the box and the mask of every object in it, so grounding and attention can be
measured without annotation. All randomness comes from the ``numpy.random.Generator`` that is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from sar_fast.base.errors import ArgumentError
from sar_fast.base.extras import need

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 40),
    "green": (40, 170, 60),
    "blue": (40, 75, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 50, 190),
    "cyan": (60, 205, 220),
}
SHAPES = ("circle", "square", "triangle")
# What can be drawn: the miniature knows the first six and the first three of it, the miniature of places all.
PALETTE: dict[str, tuple[int, int, int]] = COLOURS | {"orange": (245, 140, 30), "pink": (250, 130, 190)}
FORMS = (*SHAPES, "diamond", "cross", "ring", "bar", "crescent")
PATCH_SIZE = 8  # pixels, of both miniatures' towers
BACKGROUNDS = ("plain", "gradient", "texture", "photograph")

# All of them are files of scikit-image's wheel (no download). The second group is never drawn on in training.
TRAINING_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "clock",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
)
HELD_OUT_PHOTOGRAPHS = ("camera", "chelsea", "coffee")

HALF_EXTENT = (0.12, 0.21)  # half the width of an object, as a fraction of the shorter side of the picture
GAP = 0.03  # least distance between the boxes of two objects, same unit
COLOUR_JITTER = 18  # grey levels, per channel


@dataclass(frozen=True)
class ObjectSpec:
    """What to draw and where, independent of the resolution.

    ``centre`` is (x, y) as fractions of width and height, y pointing down; ``half_extent`` is half the width and half
    the height as a fraction of the shorter side; ``rgb`` is the fill, by default the pure value of ``colour``.
    """

    colour: str
    shape: str
    centre: tuple[float, float]
    half_extent: float
    rgb: tuple[int, int, int] | None = None

    def __post_init__(self):
        if self.colour not in PALETTE:
            raise ArgumentError("colour", repr(self.colour), f"be one of {', '.join(PALETTE)}")
        if self.shape not in FORMS:
            raise ArgumentError("shape", repr(self.shape), f"be one of {', '.join(FORMS)}")
        if not (0 < self.half_extent <= 0.5):
            raise ArgumentError("half_extent", self.half_extent, "be a fraction in (0, 0.5]")
        if not all(0 <= c <= 1 for c in self.centre):
            raise ArgumentError("centre", self.centre, "be (x, y) as fractions in [0, 1]")


@dataclass(frozen=True)
class DrawnObject:
    """An object of a scene: ``box`` is (x1, y1, x2, y2) in pixels, x2 and y2 exclusive; ``mask`` is (H, W) bool."""

    colour: str
    shape: str
    box: tuple[int, int, int, int]
    mask: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture, ``image`` (H, W, 3) uint8 RGB, its ``objects``, and the kind of its ``background``."""

    image: np.ndarray
    objects: tuple[DrawnObject, ...]
    background: str


def compose(background: np.ndarray, specs: Sequence[ObjectSpec], kind: str = "plain") -> Scene:
    """Draws objects, anti-aliased and in the order given, onto a copy of ``background`` (H, W, 3) uint8.

    The mask of an object is where it covers at least half of a pixel and no later object hides it; the box is the
    tightest one around the mask. Raises ``ValueError`` if the background is not uint8 RGB or an object leaves no
    visible pixel.
    """
    if background.ndim != 3 or background.shape[2] != 3 or background.dtype != np.uint8:
        raise ArgumentError("background", f"{background.shape} {background.dtype}", "be (H, W, 3) uint8")
    height, width = background.shape[:2]
    canvas = background.astype(np.float32)
    masks: list[np.ndarray] = []
    for spec in specs:
        window, coverage = _coverage(spec, width, height)
        rgb = np.asarray(spec.rgb or PALETTE[spec.colour], dtype=np.float32)
        canvas[window] += coverage[..., None] * (rgb - canvas[window])
        visible = np.zeros((height, width), dtype=bool)
        visible[window] = coverage >= 0.5
        masks = [mask & ~visible for mask in masks] + [visible]
    objects = tuple(DrawnObject(s.colour, s.shape, _tight_box(m, s), m) for s, m in zip(specs, masks))
    return Scene(np.rint(canvas).astype(np.uint8), objects, kind)


def draw_scene(
    rng: np.random.Generator,
    *,
    size: int = 64,
    objects: int | None = None,
    background: str = "plain",
    photographs: Sequence[str] = HELD_OUT_PHOTOGRAPHS,
    recolour: bool = False,
) -> Scene:
    """Draws a random square scene of ``size`` x ``size`` pixels.

    ``objects`` is 1 to 3; by default 1, 2 or 3 with probabilities 0.35, 0.5 and 0.15. No two objects share both colour
    and shape, and they do not touch. ``background`` is one of ``BACKGROUNDS``; ``photographs`` are the names to crop
    from, and ``recolour`` permutes the channels of a photograph or tints a grey one (an augmentation for training).
    """
    if objects not in (None, 1, 2, 3):
        raise ArgumentError("objects", repr(objects), "be 1, 2, 3 or None")
    count = objects or int(rng.choice((1, 2, 3), p=(0.35, 0.5, 0.15)))
    ground = draw_background(rng, background, size, photographs=photographs, recolour=recolour)
    return compose(ground, sample_specs(rng, count), background)


def sample_specs(rng: np.random.Generator, count: int) -> list[ObjectSpec]:
    """Samples ``count`` objects that do not touch, all inside the picture, each a distinct pair of colour and shape."""
    if not 1 <= count <= 3:
        raise ArgumentError("count", count, "be 1 to 3 objects")
    pairs = rng.permutation(len(COLOURS) * len(SHAPES))[:count]
    names = list(COLOURS)
    while True:  # three of the largest objects always fit, so a rejected layout only needs another draw
        half = rng.uniform(*HALF_EXTENT, size=count)
        centre = rng.uniform(half[:, None], 1 - half[:, None], size=(count, 2))
        distance = np.abs(centre[:, None] - centre[None]).max(-1)
        apart = distance >= half[:, None] + half[None] + GAP
        if apart[~np.eye(count, dtype=bool)].all():
            break
    specs = []
    for pair, c, h in zip(pairs, centre, half):
        colour = names[pair // len(SHAPES)]
        jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3)
        rgb = tuple(int(v) for v in np.clip(np.add(COLOURS[colour], jitter), 0, 255))
        specs.append(ObjectSpec(colour, SHAPES[pair % len(SHAPES)], (float(c[0]), float(c[1])), float(h), rgb))
    return specs


def draw_background(
    rng: np.random.Generator,
    kind: str,
    size: int,
    *,
    photographs: Sequence[str] = HELD_OUT_PHOTOGRAPHS,
    recolour: bool = False,
) -> np.ndarray:
    """Draws a background (size, size, 3) uint8. Arguments as in :func:`draw_scene`."""
    if size < 16:
        raise ArgumentError("size", size, "be at least 16 pixels")
    if kind == "plain":
        pixels = np.broadcast_to(_pale(rng), (size, size, 3))
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:size, :size] / size - 0.5
        ramp = np.clip(0.5 + 0.7 * (x * np.cos(angle) + y * np.sin(angle)), 0, 1)[..., None]
        pixels = ramp * _pale(rng) + (1 - ramp) * _pale(rng)
    elif kind == "texture":
        pixels = _texture(rng, size)
    elif kind == "photograph":
        return _crop(rng, photograph(str(rng.choice(photographs))), size, recolour)
    else:
        raise ArgumentError("background", repr(kind), f"be one of {', '.join(BACKGROUNDS)}")
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


@cache
def photograph(name: str) -> np.ndarray:
    """The photograph (H, W, 3) uint8, read-only, out of scikit-image's wheel; ``ImportError`` without scikit-image."""
    if name not in TRAINING_PHOTOGRAPHS + HELD_OUT_PHOTOGRAPHS:
        known = ", ".join(TRAINING_PHOTOGRAPHS + HELD_OUT_PHOTOGRAPHS)
        raise ArgumentError("photograph", repr(name), f"be one of {known}")
    need("a photographic background", "skimage")
    from skimage import data

    pixels = getattr(data, name)()
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    pixels = np.ascontiguousarray(pixels[..., :3])
    pixels.setflags(write=False)
    return pixels


def _coverage(spec: ObjectSpec, width: int, height: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of the picture that an object can reach, and the fraction (h, w) of every pixel there that it covers,
    from the signed distance of the pixel's centre to its edge."""
    r = spec.half_extent * min(width, height)
    spans = []
    for centre, side in ((spec.centre[1] * height, height), (spec.centre[0] * width, width)):
        spans.append(slice(max(int(centre - r) - 1, 0), min(int(centre + r) + 2, side)))
    y, x = (np.arange(span.start, span.stop, dtype=np.float32) + 0.5 for span in spans)
    x = (x - spec.centre[0] * width)[None, :]
    y = (y - spec.centre[1] * height)[:, None]
    return tuple(spans), np.clip(0.5 - _DISTANCES[spec.shape](x, y, r), 0, 1).astype(np.float32)


def _box_distance(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _crescent(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - r, 0.75 * r - np.hypot(x - 0.5 * r, y))


# Signed distance in pixels to the edge, negative inside; x (1, w), y (h, 1) from the centre, r half the extent.
_DISTANCES = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: _box_distance(x, y, r, r),
    # Apex up; the sides climb two pixels per pixel.
    "triangle": lambda x, y, r: np.maximum(y - r, (2 * np.abs(x) - y - r) / np.sqrt(5.0)),
    "diamond": lambda x, y, r: (np.abs(x) + np.abs(y) - r) / np.sqrt(2.0),
    "cross": lambda x, y, r: np.minimum(_box_distance(x, y, r, 0.34 * r), _box_distance(x, y, 0.34 * r, r)),
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r,
    "bar": lambda x, y, r: _box_distance(x, y, r, 0.36 * r),
    "crescent": _crescent,
}


def _tight_box(mask: np.ndarray, spec: ObjectSpec) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        raise ValueError(f"the {spec.colour} {spec.shape} has no visible pixel: it is hidden or smaller than a pixel")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _pale(rng: np.random.Generator) -> np.ndarray:
    """A colour of low saturation, so that no background is the colour of an object."""
    return np.clip(rng.uniform(15, 240) + rng.uniform(-18, 18, size=3), 0, 255)


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise with a power-law spectrum, the second-order statistics of natural images, in correlated channels."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    frequency = np.maximum(np.hypot(fx, fy), 1 / size)
    spectrum = np.fft.rfft2(rng.standard_normal((4, size, size))) * frequency ** -rng.uniform(0.7, 1.8)
    noise = np.fft.irfft2(spectrum, s=(size, size))
    noise = (noise - noise.mean((1, 2), keepdims=True)) / noise.std((1, 2), keepdims=True)
    luminance, chroma = rng.uniform(10, 60), rng.uniform(0, 30)
    return _pale(rng) + luminance * noise[0][..., None] + chroma * noise[1:].transpose(1, 2, 0)


def _crop(rng: np.random.Generator, pixels: np.ndarray, size: int, recolour: bool) -> np.ndarray:
    height, width = pixels.shape[:2]
    side = int(min(height, width) * rng.uniform(0.3, 1.0))
    x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    window = pixels[y : y + side, x : x + side]
    if rng.random() < 0.5:
        window = window[:, ::-1]
    crop = np.asarray(Image.fromarray(window).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0))
    if not recolour:
        return np.ascontiguousarray(crop)
    tint = rng.uniform(0.6, 1.1, size=3) if rng.random() < 0.5 else np.ones(3)
    return np.clip(crop[..., rng.permutation(3)] * tint, 0, 255).astype(np.uint8)
