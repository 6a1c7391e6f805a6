"""Pictures as they are shown: every part of the library opens and finds them here.

Shown is what a viewer draws: turned as EXIF says, 8 bits per channel, on white where the file is transparent, the first
picture of several. Colour profiles are not applied.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from sar_fast.base.wording import cut, describe, quote, reason

Source: TypeAlias = Image.Image | bytes | str | Path

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEADER_TELLS = ("JPEG", "MPO", "WEBP", "GIF")  # orientation and size; others tell one of them when they are decoded
ON_THE_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
WHITE_IS_ZERO, UNSIGNED = 0, 1  # a photometric interpretation, a sample format
FLOAT_RANGES, INTEGER_RANGES = (1, 255, 65535), (255, 65535)  # of 32-bit values, which do not say their own
SCHEME = re.compile(r"(data|file|https?):|[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class PictureError(ValueError):
    """A picture that cannot be found, read or shown; the message goes on after its name: "does not exist".

    ``reason`` stands alone: the message, or only why the picture could not be decoded.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


def open_picture(source: Source) -> Image.Image:
    """The picture as it is shown: mode RGB, upright, without metadata; the same again for its own result.

    Grey of 16 bits is scaled by 65535, of 12 by 4095. Values of 32 bits do not say their range: it is the first of 0..1
    (floats only), 0..255 and 0..65535 that holds all finite ones, else from the least of them to the greatest. inf is
    white; -inf, NaN and a constant outside of the ranges are black. Where a TIFF says that 0 is white, all is turned
    over but NaN. EXIF data that cannot be parsed turns nothing.

    Args:
        source: a path, an encoded picture's bytes, or a decoded picture, which is left as it is.

    Raises:
        PictureError: the file is missing or cut off, its format unknown, it holds no pixel or no finite value, or is
            larger than Pillow's limit against decompression bombs (``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    with _opened(source) as picture:
        _load(picture)
        turn = TURNS.get(_orientation(picture))
        shown = _colours(picture)
        shown = shown if turn is None else shown.transpose(turn)
        shown.info = {}  # what it said of orientation and transparency is done
        return shown


def shown_size(source: Source) -> tuple[int, int]:
    """(width, height) of what :func:`open_picture` gives, from the file's header where the format allows it."""
    with _opened(source) as picture:
        if picture.format not in HEADER_TELLS:
            _load(picture)
        width, height = picture.size
        return (height, width) if _orientation(picture) in ON_THE_SIDE else (width, height)


def open_mask(source: Source) -> np.ndarray:
    """(height, width) bool of a mask that is stored as a picture: True where its value is not 0.

    Values are those of the file, whatever its depth: a palette's index, not its colour; any channel of several. What is
    fully transparent is False; if all that is visible has the value 0, as a black shape does, the mask is what is
    visible. NaN is False. It is turned as EXIF says. ``PictureError`` as :func:`open_picture`.
    """
    with _opened(source) as picture:
        _load(picture)
        mask = _values(picture)
        opacity = _opacity(picture)
        if opacity is not None:
            visible = np.asarray(opacity) > 0
            inside = mask & visible
            mask = inside if inside.any() or visible.all() else visible
        turn = TURNS.get(_orientation(picture))
        return mask if turn is None else np.asarray(Image.fromarray(mask).transpose(turn))


def png_text(source: Source) -> dict[str, str]:
    """The notes that a PNG file carries beside its pixels; none of another format."""
    with _opened(source) as picture:
        _load(picture)
        return dict(getattr(picture, "text", {}))


def encode_png(picture: Image.Image) -> bytes:
    """A decoded picture, as it is shown, as a PNG file."""
    buffer = io.BytesIO()
    open_picture(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def find_picture(value: Any, folder: Path) -> Path | bytes:
    """Where a picture is that a record names; nothing is opened, and nothing downloaded.

    Args:
        value: a path, which starts from ``folder`` unless it is absolute; a ``file://`` or base64 ``data:`` URL; an
            encoded picture's bytes; a decoded Pillow picture; or an object with ``bytes``, ``path`` or ``url``.

    Returns:
        A path, or an encoded picture's bytes.

    Raises:
        PictureError: anything else, an empty path or no bytes, a URL of the network.
    """
    if isinstance(value, Mapping):
        return _find_named(value, folder)
    if isinstance(value, Image.Image):
        return encode_png(value)
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise PictureError("is empty: no bytes")
        return bytes(value)
    if isinstance(value, Path):
        return folder / value
    if not isinstance(value, str):
        raise PictureError(
            f"is {describe(value)}, needed a path, bytes, a decoded picture, or an object with bytes, path or url"
        )
    if not value.strip():
        raise PictureError(f"is the empty path {value!r}, needed a file's")
    if SCHEME.match(value):
        return _find_url(value)
    return folder / value


def picture_name(source: Any) -> str:
    """A picture's name in messages: its path, cut short, or "the picture" where it has none."""
    return cut(str(source)) if source and isinstance(source, (str, Path)) else "the picture"


def _find_named(value: Mapping[str, Any], folder: Path) -> Path | bytes:
    content, place = value.get("bytes"), value.get("path") or value.get("url")
    if content is not None and not isinstance(content, (bytes, bytearray)):
        raise PictureError(
            f"has bytes that are {describe(content)}, needed bytes, as parquet files have them; "
            "a picture as text is a URL, data:image/png;base64,..."
        )
    if place is not None and not isinstance(place, (str, Path)):
        raise PictureError(f"has a path that is {describe(place)}, needed text")
    if content:
        return bytes(content)
    if place:
        return find_picture(place, folder)
    raise PictureError(f"is {describe(value)}, needed bytes, path or url in it")


def _find_url(value: str) -> Path | bytes:
    scheme, _, rest = value.partition(":")
    if scheme.lower() == "data":
        header, comma, content = rest.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise PictureError(f"is the URL {quote(value)}, needed data:image/...;base64,...")
        try:
            decoded = base64.b64decode("".join(content.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise PictureError(f"is the URL {quote(value)}, whose base64 is broken: {error}") from error
        if not decoded:
            raise PictureError(f"is the URL {quote(value)}, which is empty")
        return decoded
    if scheme.lower() == "file":
        host, slash, path = rest.removeprefix("//").partition("/")
        if host.lower() not in ("", "localhost") or not slash:
            raise PictureError(f"is the URL {quote(value)}, needed file:// and an absolute path")
        return Path("/" + unquote(path))
    raise PictureError(f"is the URL {quote(value)}: nothing is downloaded, give a local file")


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """The picture, not decoded yet. What goes wrong with it, here or by its user, is a :class:`PictureError`."""
    try:
        if isinstance(source, Image.Image):
            _refuse_empty(source)
            yield source
            return
        if isinstance(source, bytes) and not source:
            raise PictureError("is empty: no bytes")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            _refuse_empty(picture)
            yield picture
    except (PictureError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise PictureError("does not exist") from error
    except IsADirectoryError as error:
        raise PictureError("is a folder, needed a file") from error
    except UnidentifiedImageError as error:  # its own words may hold an object's address
        raise _undecoded("its format is unknown") from error
    except Exception as error:  # a broken file fails in as many ways as there are formats
        raise _undecoded((isinstance(error, OSError) and error.strerror) or reason(error)) from error


def _undecoded(why: str) -> PictureError:
    return PictureError(f"cannot be read as a picture: {why}", why)


def _refuse_empty(picture: Image.Image) -> None:
    if min(picture.size) < 1:
        raise PictureError(f"has no pixels: {picture.width} x {picture.height}")


def _load(picture: Image.Image) -> None:
    """Decodes, with the transparent colour in the units of the pixels: PNG has it in those of the file."""
    clear, tiles = picture.info.get("transparency"), getattr(picture, "tile", None)
    raw = tiles[0][3] if tiles and picture.format == "PNG" else None
    picture.load()
    if raw == "RGB;16B" and clear is not None:
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    elif raw in ("L;2", "L;4") and clear is not None:
        picture.info["transparency"] = clear * (85 if raw == "L;2" else 17)


def _orientation(picture: Image.Image) -> Any:
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as viewers do: EXIF data that cannot be parsed turns nothing
        return None
    return found if isinstance(found, int) else None


def _colours(picture: Image.Image) -> Image.Image:
    """Mode RGB, transparency on white; a picture of its own, in the file's orientation."""
    opacity, mode = _opacity(picture), picture.mode
    if "transparency" in picture.info:
        picture = picture.copy()
        if mode == "P":
            picture = picture.convert("RGBA")  # Pillow warns where it must drop a palette's transparency
        picture.info.pop("transparency", None)
    if mode in ("I", "F") or mode.startswith("I;16"):
        picture = _grey(picture)
    elif mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        picture = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
    elif mode in ("La", "RGBa"):
        picture = picture.convert(mode.upper())
    shown = picture.convert("RGB")
    return shown if opacity is None else Image.composite(shown, Image.new("RGB", shown.size, "white"), opacity)


def _opacity(picture: Image.Image) -> Image.Image | None:
    """Mode L, 0 where the picture is transparent; None if it says nothing of it."""
    mode, clear = picture.mode, picture.info.get("transparency")
    if mode[-1] in "Aa" and mode != "LAB":
        return picture.getchannel(mode[-1])
    if mode == "P":
        palette = picture.palette.mode if picture.palette else ""
        return None if clear is None and not palette.endswith("A") else picture.convert("RGBA").getchannel("A")
    if mode == "RGB" and isinstance(clear, tuple):
        same = (np.asarray(picture) == clear).all(-1)
    elif mode in ("1", "L", "I") or mode.startswith("I;16"):
        if not isinstance(clear, int):
            return None
        same = np.asarray(picture.convert("L") if mode == "1" else picture) == clear
    else:
        return None
    return Image.fromarray(np.where(same, 0, 255).astype(np.uint8))


def _grey(picture: Image.Image) -> Image.Image:
    """Mode L of values of 16 or 32 bits, by the ranges that :func:`open_picture` names."""
    values, top, inverted = _stored(picture)
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        raise PictureError("has no finite value")
    low, high = finite.min(), finite.max()
    known = (top,) if top else FLOAT_RANGES if values.dtype.kind == "f" else INTEGER_RANGES
    if low >= 0 and high <= known[-1]:
        low, high = 0, next(top for top in known if high <= top)
    levels = np.clip((values.astype(np.float64) - low) / max(high - low, 1e-300), 0, 1)
    levels = np.nan_to_num(1 - levels if inverted else levels)
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))


def _stored(picture: Image.Image) -> tuple[np.ndarray, int | None, bool]:
    """((height, width) values, the greatest that there can be, None for 32 bits; whether 0 is white)."""
    values = np.asarray(picture)
    top = 65535 if values.dtype.kind == "u" or (picture.format == "PPM" and picture.mode == "I") else None
    tags = getattr(picture, "tag_v2", None)
    if tags is None:
        return values, top, False
    bits, kind = (int(np.ravel(tags.get(tag, 1))[0]) for tag in (BITS_PER_SAMPLE, SAMPLE_FORMAT))
    if kind == UNSIGNED and values.dtype.kind == "u":
        top = 2**bits - 1  # 12 bits lie in 16
    elif kind == UNSIGNED and values.dtype.kind == "i":
        values = values.view(np.uint32)  # Pillow has signed ones alone
    return values, top, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def _values(picture: Image.Image) -> np.ndarray:
    """(height, width) bool: whether a pixel's value, or one of its colours', is not 0."""
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        picture = _colours(picture)
    values = np.asarray(picture)
    if values.ndim == 2:
        return np.nan_to_num(values) != 0
    colours = len(picture.mode.rstrip("AaX"))
    return (values[..., :colours] != 0).any(-1)
