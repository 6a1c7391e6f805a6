"""Pictures as they are shown: orientation, depth, transparency, modes, broken files, and where records keep them."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from sar_fast.lab.io.pictures import PictureError, encode_png, find_picture, open_mask, open_picture, shown_size

REPOSITORY = Path(__file__).parents[1]
ORIENTATION = 0x0112
RAMP = np.arange(0, 256, 15, dtype=np.uint8)[None].repeat(6, 0)  # 18 x 6, black to white


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file written by hand: what Pillow reads but does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def pixels(source) -> np.ndarray:
    picture = open_picture(source)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def corners() -> Image.Image:
    """40 x 24 with another colour in each quarter."""
    picture = np.zeros((24, 40, 3), np.uint8)
    picture[:12, :20], picture[:12, 20:], picture[12:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(picture)


FORMATS = ["JPEG", "PNG", "TIFF", "MPO", *(f for f in ("WEBP", "AVIF") if features.check(f.lower()))]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_shown_upright(kind, orientation):
    """What is stored is the shown picture turned back, so that every orientation shows the same."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions; 6 and 8 undo one another
    stored = corners() if orientation == 1 else corners().transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    shown = open_picture(content)
    assert shown.size == shown_size(content) == (40, 24)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(corners()))[2:10, 2:18].max() < 40  # JPEG's loss
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(corners()))[14:22, 2:18].max() < 40
    decoded = Image.open(io.BytesIO(content))
    assert shown_size(decoded) == (40, 24)
    again = open_picture(decoded)
    assert np.array_equal(again, shown)
    assert np.array_equal(open_picture(again), shown)  # what was turned is not turned twice


def test_the_picture_that_is_given_is_left_as_it_is():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    given = Image.open(io.BytesIO(encoded(corners(), "JPEG", exif=exif)))
    open_picture(given)
    assert (given.size, given.getexif()[ORIENTATION]) == ((40, 24), 6)
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    open_picture(clear)
    assert clear.getpixel((0, 0)) == (9, 9, 9, 0)


def test_exif_that_cannot_be_parsed_turns_nothing():
    assert open_picture(encoded(corners(), "JPEG", exif=b"Exif\0\0garbage")).size == (40, 24)
    exif = Image.Exif()
    exif[ORIENTATION] = 99
    assert open_picture(encoded(corners(), "JPEG", exif=exif)).size == (40, 24)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_not_clipped(kind):
    if kind == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("Pillow was built without JPEG 2000")
    content = encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), kind)
    assert np.array_equal(pixels(content), RAMP[..., None].repeat(3, -1))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bits_by_the_types_range_whatever_the_picture_holds(mode):
    dark = Image.new(mode, (4, 3), 256 * 20)
    assert (pixels(dark) == 20).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.25, 1.0]], [0, 64, 255]),  # 0..1
        ([[0.0, 51.0, 255.0]], [0, 51, 255]),  # 0..255
        ([[0.0, 25700.0, 65535.0]], [0, 100, 255]),  # 0..65535
        ([[-1.0, 0.0, 1.0]], [0, 128, 255]),  # the picture's own
        ([[0.0, 5e5, 1e6]], [0, 128, 255]),
        ([[1e6, 1e6, 1e6]], [0, 0, 0]),
        ([[-7.0, -7.0, -7.0]], [0, 0, 0]),
        ([[0.0, 0.0, 0.0]], [0, 0, 0]),
        ([[0.5, 0.5, 0.5]], [128, 128, 128]),
        ([[np.nan, 0.5, 1.0]], [0, 128, 255]),
        ([[-np.inf, 0.5, np.inf]], [0, 128, 255]),
        ([[np.nan, -2.0, 2.0]], [0, 0, 255]),
        ([[-3.4e38, 0.0, 3.4e38]], [0, 128, 255]),
    ],
)
def test_floats_by_the_first_range_that_holds_them(values, expected):
    shown = pixels(Image.fromarray(np.array(values, np.float32)))
    assert np.abs(shown[0, :, 0] - expected).max() <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = pixels(encoded(Image.fromarray(np.array(values, np.float32)), "TIFF"))
    assert np.array_equal(stored, shown)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 100, 255]], [0, 100, 255]),
        ([[0, 25700, 65535]], [0, 100, 255]),
        ([[-100, 0, 100]], [0, 128, 255]),
        ([[0, 1 << 29, 1 << 30]], [0, 128, 255]),
    ],
)
def test_32_bit_integers_by_the_first_range_that_holds_them(values, expected):
    shown = pixels(encoded(Image.fromarray(np.array(values, np.int32)), "TIFF"))
    assert np.abs(shown[0, :, 0] - expected).max() <= 1


def tiff(width: int, bits: int, row: bytes, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A TIFF file of one row of grey values, written by hand: what Pillow reads but does not write."""
    numbers = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 1, 279: len(row)}
    numbers |= {339: sample_format}  # 273: where the row begins, behind all tags
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items())
    return b"II" + struct.pack("<HIH", 42, 8, len(numbers)) + tags + struct.pack("<I", 0) + row


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(4, 12, bytes.fromhex("000333800fff")), [0, 51, 128, 255]),
        (tiff(3, 16, struct.pack("<3H", 0, 13107, 65535), photometric=0), [255, 204, 0]),
        (tiff(3, 32, floats(0, 0.2, 1), photometric=0, sample_format=3), [255, 204, 0]),
        (tiff(3, 32, floats(np.nan, 0, 1), photometric=0, sample_format=3), [0, 255, 0]),
        (tiff(3, 32, struct.pack("<3I", 0, 1 << 31, (1 << 32) - 1)), [0, 128, 255]),
        (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 100, 255), [0, 0, 1]),  # a dark picture of 16 bits
        (b"P5 3 1 4095\n" + struct.pack(">3H", 0, 8, 4095), [0, 0, 255]),
        (b"P2 3 1 4095\n0 2048 1000", [0, 128, 62]),
    ],
    ids=["12 bits", "white is 0", "float, white is 0", "NaN, white is 0", "unsigned", "dark PGM", "PGM", "plain PGM"],
)
def test_grey_means_what_its_file_says(content, expected):
    assert np.abs(pixels(content)[0, :, 0] - expected).max() <= 1


def test_values_that_are_no_numbers_are_no_picture():
    with pytest.raises(PictureError, match="has no finite value"):
        open_picture(Image.fromarray(np.full((3, 3), np.nan, np.float32)))


def see_through(mode: str) -> Image.Image:
    """Left half transparent, right half opaque black; half-way in the middle column."""
    picture = Image.new("RGBA", (9, 4), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 4))
    picture.paste((0, 0, 0, 128), (4, 0, 5, 4))
    return picture.convert("LA").convert("La") if mode == "La" else picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_lies_on_white(mode):
    row = pixels(see_through(mode))[0, :, 0]
    assert row[:4].tolist() == [255] * 4
    assert abs(row[4] - 127) <= 1
    assert row[5:].tolist() == [0] * 4
    if mode in ("RGBA", "LA"):
        assert np.array_equal(pixels(encoded(see_through(mode)))[0, :, 0], row)


def test_transparent_colours_of_palettes_and_of_pictures_without_alpha():
    """P with one transparent index, with an alpha per index; L, RGB, 1 and 16 bits with a transparent value."""
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30, 200, 0, 0])
    palette.paste(2, (0, 0, 2, 4))
    for clear in (2, b"\xff\xff\x00"):
        for kind in ("PNG", "GIF") if clear == 2 else ("PNG",):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                shown = pixels(encoded(palette, kind, transparency=clear))
            assert shown[0].tolist() == [[255] * 3] * 2 + [[10, 20, 30]] * 2
    grey = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    assert pixels(encoded(grey, transparency=7))[0, :, 0].tolist() == [0, 255, 255]
    colour = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    assert pixels(encoded(colour, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [1, 2, 4]]
    deep = Image.fromarray(np.array([[0, 2570, 65535]], np.uint16))
    assert pixels(encoded(deep, transparency=2570))[0, :, 0].tolist() == [0, 255, 255]
    bits = Image.new("1", (2, 2), 0)
    assert (pixels(encoded(bits, transparency=0)) == 255).all()


@pytest.mark.parametrize(("depth", "packed", "levels"), [(2, 0b00011011, [0, 85, 170, 255]), (4, 0x03, [0, 51])])
def test_a_transparent_value_counts_in_the_files_own_depth(depth, packed, levels):
    content = png((len(levels), 1), depth, 0, bytes([0, packed]), (b"tRNS", b"\0\0"))
    assert pixels(content)[0, :, 0].tolist() == [255, *levels[1:]]
    deep = png(
        (2, 1), 16, 2, b"\0" + struct.pack(">6H", 0, 0, 200, 65535, 0, 0), (b"tRNS", struct.pack(">3H", 0, 0, 200))
    )
    assert pixels(deep)[0].tolist() == [[255] * 3, [255, 0, 0]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "LAB"])
def test_every_mode_shows_its_colours(mode):
    colour = {"1": (255, 255, 255), "L": (90, 90, 90), "P": (51, 102, 153)}.get(mode, (200, 40, 60))
    picture = Image.new("RGB", (5, 4), colour)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
    else:
        picture = picture.convert(mode)
    assert np.abs(pixels(picture) - np.array(colour)).max() <= 4
    if mode in ("CMYK", "LAB"):
        assert np.abs(pixels(encoded(picture, "TIFF")) - np.array(colour)).max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "MPO", "TIFF", *(["WEBP"] if features.check("webp") else [])])
def test_the_first_of_several_pictures(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.abs(pixels(content) - (255, 0, 0)).max() < 6


def test_broken_files_say_what_is_wrong(tmp_path, monkeypatch):
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    cases = {
        tmp_path / "gone.png": "does not exist",
        str(tmp_path / "gone.png"): "does not exist",
        tmp_path: "is a folder, needed a file",
        tmp_path / "empty.png": "its format is unknown",
        tmp_path / "text.png": "its format is unknown",
        b"": "is empty",
        b"no picture": "its format is unknown",
        whole[: len(whole) // 2]: "truncated",
        encoded(corners())[:60]: "cannot be read as a picture",
        png((4, 4), 8, 2, b"\0\0"): "cannot be read as a picture",
        png((0, 4), 8, 2, b""): "cannot be read as a picture|has no pixels",
        "a\0b": "cannot be read as a picture",
        "x" * 5000: "File name too long",
    }
    for source, message in cases.items():
        for read in (open_picture, open_mask):
            with pytest.raises(PictureError, match=message) as caught:
                read(source)
            assert len(str(caught.value)) < 500
    for size in ((0, 5), (5, 0)):
        with pytest.raises(PictureError, match=f"has no pixels: {size[0]} x {size[1]}"):
            open_picture(Image.new("RGB", size))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PictureError, match="exceeds limit"):
        open_picture(encoded(corners()))


KINDS = [("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "CMYK"), ("TIFF", "LA"), ("GIF", "P"), ("BMP", "RGB"), ("PPM", "L")]
WHOLE = [encoded(corners().convert(mode), kind) for kind, mode in KINDS]


@given(st.sampled_from(WHOLE), st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_a_file_holds_it_is_a_picture_or_says_that_it_is_none(whole, data):
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(broken[: data.draw(st.integers(len(broken) // 2, len(broken)))])
    try:
        shown = open_picture(broken)
    except PictureError:
        return
    assert shown.mode == "RGB"
    assert shown_size(broken) == shown.size
    assert open_mask(broken).shape == shown.size[::-1]


def test_masks_are_values_not_colours():
    """Non-zero is the object, whatever the depth, the palette's colours, or the file's orientation."""
    wanted = np.zeros((6, 9), bool)
    wanted[1:4, 2:5] = True
    one = wanted.astype(np.uint8)
    palette = Image.new("P", (9, 6))
    palette.putdata(one.ravel())
    palette.putpalette([255, 255, 255, 0, 0, 0])  # background white, object black
    inverted = Image.new("RGBA", (9, 6), (255, 255, 255, 0))
    inverted.paste((0, 0, 0, 255), (2, 1, 5, 4))  # a black shape on nothing
    white = Image.new("LA", (9, 6), (255, 0))
    white.paste((255, 255), (2, 1, 5, 4))
    opaque = Image.new("RGBA", (9, 6), (0, 0, 0, 255))
    opaque.paste((0, 0, 7, 255), (2, 1, 5, 4))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    lying = Image.fromarray(one).transpose(Image.Transpose.ROTATE_90)
    forms = {
        "1": encoded(Image.fromarray(wanted)),
        "L, value 1": encoded(Image.fromarray(one)),
        "16 bits, value 1": encoded(Image.fromarray(one.astype(np.uint16))),
        "16 bits, value 256": encoded(Image.fromarray(one.astype(np.uint16) * 256)),
        "32 bits": encoded(Image.fromarray(-one.astype(np.int32)), "TIFF"),
        "floats": encoded(Image.fromarray(np.where(wanted, 1e-3, 0).astype(np.float32)), "TIFF"),
        "floats with NaN": encoded(Image.fromarray(np.where(wanted, 1, np.nan).astype(np.float32)), "TIFF"),
        "palette": encoded(palette),
        "RGB": encoded(Image.fromarray(np.stack([0 * one, 0 * one, one], -1))),
        "CMYK": encoded(Image.fromarray(255 * np.stack([one] * 3, -1)).convert("CMYK"), "TIFF"),
        "black on nothing": encoded(inverted),
        "white on nothing": encoded(white),
        "opaque": encoded(opaque),
        "EXIF": encoded(lying, exif=exif),
        "decoded": Image.fromarray(one),
    }
    for name, stored in forms.items():
        found = open_mask(stored)
        assert found.dtype == np.bool_, name
        assert np.array_equal(found, wanted), name
    for nothing in (Image.new("L", (3, 2)), Image.new("RGBA", (3, 2), (0, 0, 0, 255)), Image.new("LA", (3, 2), (9, 0))):
        assert not open_mask(encoded(nothing)).any()


class TestWherePicturesAre:
    def test_every_way_to_name_one(self, tmp_path):
        content = encoded(corners())
        text = base64.b64encode(content).decode()
        assert find_picture("a b.png", tmp_path) == tmp_path / "a b.png"
        assert find_picture("/x/a.png", tmp_path) == Path("/x/a.png")
        assert find_picture(Path("a.png"), tmp_path) == tmp_path / "a.png"
        for url in ("file:///x/a%20b.png", "FILE://localhost/x/a%20b.png", "file:/x/a%20b.png"):
            assert find_picture(url, tmp_path) == Path("/x/a b.png")
        for value in (
            content,
            bytearray(content),
            {"bytes": content, "path": "a.png"},
            f"data:image/png;base64,{text}",
            f"DATA:;BASE64,{text[:40]}\n{text[40:]}",
            {"url": f"data:image/png;base64,{text}", "detail": "low"},
        ):
            assert find_picture(value, tmp_path) == content
        assert find_picture({"bytes": None, "path": "a.png"}, tmp_path) == tmp_path / "a.png"
        assert find_picture({"url": "file:///x/a.png"}, tmp_path) == Path("/x/a.png")
        assert np.array_equal(pixels(find_picture(corners(), tmp_path)), np.asarray(corners()))

    @pytest.mark.parametrize("mode", ["CMYK", "F", "LAB", "RGBa", "YCbCr", "I;16"])
    def test_decoded_pictures_of_every_mode_are_kept_as_they_are_shown(self, mode):
        picture = Image.new(mode, (4, 3))
        assert np.array_equal(pixels(encode_png(picture)), pixels(picture))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("", "is the empty path ''"),
            (" ", "is the empty path ' '"),
            (b"", "is empty: no bytes"),
            (3, "is int 3, needed a path"),
            (None, "is missing, needed a path"),
            (True, "is bool"),
            (["a.png"], "is list"),
            ({}, "is dict {}, needed bytes, path or url in it"),
            ({"bytes": None, "path": ""}, "is dict {'bytes': None, 'path': ''}, needed bytes"),
            ({"bytes": "iVBORw0KGgo"}, "has bytes that are str 'iVBORw0KGgo', needed bytes"),
            ({"path": 3}, "has a path that is int 3"),
            ({"url": ["a"]}, "has a path that is list"),
            ("https://host/a.png", "is the URL 'https://host/a.png': nothing is downloaded, give a local file"),
            ("HTTP://host/a.png", "nothing is downloaded"),
            ({"url": "http://host/a.png"}, "nothing is downloaded"),
            ("s3://bucket/a.png", "nothing is downloaded"),
            ("file://host/a.png", "needed file:// and an absolute path"),
            ("file:a.png", "needed file:// and an absolute path"),
            ("data:image/png,abc", "needed data:image/...;base64,"),
            ("data:image/png;base64", "needed data:image/...;base64,"),
            ("data:image/png;base64,", "which is empty"),
            ("data:image/png;base64,abc", "base64 is broken"),
            ("data:image/png;base64,a*cd", "base64 is broken"),
            ("data:image/png;base64," + "*" * 100_000, "base64 is broken"),
        ],
    )
    def test_what_names_none(self, value, message, tmp_path):
        with pytest.raises(PictureError) as caught:
            find_picture(value, tmp_path)
        assert message in str(caught.value)
        assert len(str(caught.value)) < 400


def test_nothing_else_opens_or_converts_pictures():
    """One way to open a picture: whoever goes another way shows other pixels to a model than the rest does."""
    sources = [*(REPOSITORY / "sar_fast").rglob("*.py"), *(REPOSITORY / "experiments").rglob("*.py")]
    others = [path for path in sources if path != REPOSITORY / "sar_fast" / "lab" / "io" / "pictures.py"]
    assert len(others) > 100
    for path in others:
        for word in ("Image.open", 'convert("RGB', "convert('RGB", "Pictures.open"):
            assert word not in path.read_text(encoding="utf-8"), f"{path} has {word}: use sar_fast.lab.io.pictures"
