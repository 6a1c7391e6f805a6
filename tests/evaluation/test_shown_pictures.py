"""One picture, stored in many ways, is the same picture to training, benchmarks, analyses and commands."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sar_fast.cli import loading
from sar_fast.cli.errors import UserError
from sar_fast.lab.benchmark.tables import open_table
from sar_fast.lab.benchmark.tasks import find_task
from sar_fast.lab.benchmark.tasks.refcoco import RefCOCO
from sar_fast.lab.focus.dataset import load_grounding_samples
from sar_fast.lab.focus.grounding import GroundedMasks
from sar_fast.lab.focus.samples import DatasetMasks, GroundingSample, picture_hash
from sar_fast.lab.io.records import Layout, to_record
from sar_fast.lab.io.skips import SampleSkipped
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.probe.probe import LayerwiseProbe
from sar_fast.lab.show.overlay import heat_overlay
from sar_fast.lab.show.report import data_uri
from sar_fast.lab.training.encoding import Encoder
from tests.evaluation.benchmarks import write_table

GREY = np.arange(0, 24 * 40, dtype=np.uint16).reshape(24, 40) % 250 + 2  # 40 x 24, no two rows alike


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned(picture: Image.Image) -> bytes:
    """Stored lying on its side, with EXIF's word for it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture.transpose(Image.Transpose.ROTATE_90), exif=exif)


def on_nothing(grey: np.ndarray) -> Image.Image:
    """Black, as transparent as the grey is light: on white, the grey."""
    return Image.fromarray(np.stack([np.zeros_like(grey), 255 - grey], -1).astype(np.uint8))


PLAIN = Image.fromarray(GREY.astype(np.uint8))
STORED = {
    "RGB": encoded(PLAIN.convert("RGB")),
    "turned": turned(PLAIN),
    "16 bits": encoded(Image.fromarray(GREY * 257)),
    "floats": encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
    "palette": encoded(PLAIN.convert("P")),
    "transparent": encoded(on_nothing(GREY)),
}


def record_of(content: bytes) -> dict:
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}]
    return to_record({"messages": turns, "images": [content]}, Layout(), ".")


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_miniature()[1])


@pytest.mark.parametrize("form", list(STORED))
def test_everything_sees_the_picture_as_it_is_shown(form, encoder, tmp_path):
    content = STORED[form]
    (tmp_path / "a.png").write_bytes(content)
    rows = [
        {"question_id": "a", "image": image, "question": "q?", "answer": "yes", "category": "random"}
        for image in ({"bytes": content, "path": None}, {"bytes": None, "path": "a.png"})
    ]
    table = open_table(find_task("pope")(), write_table(tmp_path, rows), "test")
    decoded = Image.open(io.BytesIO(content))
    samples = [GroundingSample("a", source, "q") for source in (content, tmp_path / "a.png", decoded)]
    seen = [table.picture(0), table.picture(1), loading.open_image(tmp_path / "a.png"), *(s.image for s in samples)]
    for picture in seen:
        assert (picture.mode, picture.size) == ("RGB", (40, 24))
        assert np.abs(np.asarray(picture).astype(int) - GREY[..., None]).max() <= (form == "transparent")
    assert {sample.size for sample in samples} == {(40, 24)}
    if form != "transparent":  # rounds some values of grey
        assert {picture_hash(s.image) for s in samples} | {picture_hash(decoded)} == {picture_hash(PLAIN)}
        wanted = encoder(record_of(STORED["RGB"]))["pixel_values"]
        assert (encoder(record_of(content))["pixel_values"] == wanted).all()
        assert data_uri(decoded) == data_uri(PLAIN)
        heat = np.ones((2, 2))
        assert heat_overlay(decoded, heat, 1.0).tobytes() == heat_overlay(PLAIN.convert("RGB"), heat, 1.0).tobytes()


def test_boxes_and_masks_are_in_the_picture_as_it_is_shown(tmp_path):
    """An upright picture of 24 x 40 whose file says 40 x 24: a box below row 24 is in it."""
    upright = Image.new("RGB", (24, 40), "red")
    content = turned(upright)
    assert Image.open(io.BytesIO(content)).size == (40, 24)
    box, mask = (2.0, 30.0, 12.0, 40.0), np.zeros((40, 24), np.uint8)
    mask[30:40, 2:12] = 1
    stored = {"none": None, "plain": encoded(Image.fromarray(mask)), "turned": turned(Image.fromarray(mask))}
    polygon = [[2, 30, 11, 30, 11, 39, 2, 39]]
    for name, value in {**stored, "polygon": polygon, "array": mask}.items():
        found = DatasetMasks().mask(GroundingSample("a", content, "q", bbox=box, mask=value))
        assert np.array_equal(found, mask > 0), name
    column = {"bytes": content, "path": None}
    row = {"image": column, "query": "Where?", "object_prompt": "it", "bbox": list(box), "mask": stored["turned"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (sample,) = load_grounding_samples(str(tmp_path / "rows.parquet"), tmp_path)
    assert np.array_equal(DatasetMasks().mask(sample), mask > 0)
    kept, skipped = LayerwiseProbe(*load_miniature()).usable([sample])
    assert (kept, skipped) == ([sample], {})
    task = RefCOCO(RefCOCO.Options(box_format="pixels"))
    rows = [{"question_id": "a", "image": column, "answer": ["it"], "bbox": [2.0, 30.0, 10.0, 10.0]}]
    table = open_table(task, write_table(tmp_path / "refcoco", rows, "val-00000-of-00001.parquet"), None)
    (asked,), _ = task.samples(table.rows)
    assert task.objection(asked, table.picture(0).size) is None


def test_the_mask_cache_knows_a_picture_by_what_it_shows(tmp_path, monkeypatch):
    masks = GroundedMasks("detector", "segmenter", cache=tmp_path / "masks")
    found = np.zeros((24, 40), bool)
    found[3:9, 4:30] = True
    calls = []
    monkeypatch.setattr(masks, "ground", lambda picture, phrase: calls.append(picture.size) or found)
    for form in ("RGB", "turned", "16 bits", "palette"):
        assert np.array_equal(masks.mask(GroundingSample(form, STORED[form], "q", "it")), found)
    assert calls == [(40, 24)]
    (kept,) = (tmp_path / "masks").iterdir()
    kept.write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"{kept.name} of the mask cache cannot be read as a picture: .*; delete it"):
        masks.mask(GroundingSample("b", STORED["RGB"], "q", "it"))


def test_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for source, message in (
        (tmp_path / "gone.png", r"unreadable image: .*gone\.png does not exist"),
        (tmp_path / "text.png", r"unreadable image: .*text\.png cannot be read as a picture: its format is unknown"),
        (b"no picture", "unreadable image: its format is unknown"),
        (STORED["RGB"][:80], "unreadable image: "),
    ):
        sample = GroundingSample("a", source, "q")
        for look in (lambda s: s.image, lambda s: s.size):
            with pytest.raises(SampleSkipped, match=message):
                look(sample)
    torn = Image.open(io.BytesIO(STORED["RGB"][:80]))
    for look in (lambda s: s.image, lambda s: s.size, lambda s: s.picture_key):
        with pytest.raises(SampleSkipped, match="unreadable image: "):
            look(GroundingSample("a", torn, "q"))
    for path, message in (
        (tmp_path / "gone.png", r"--image '.*gone\.png' does not exist"),
        (tmp_path / "text.png", r"--image '.*text\.png' cannot be read as a picture: its format is unknown"),
        (tmp_path, r"--image '.*' is a folder, needed a file"),
    ):
        with pytest.raises(UserError, match=message):
            loading.open_image(path)


def test_a_grounding_table_names_pictures_as_records_do(tmp_path):
    row = {"query": "Where?", "object_prompt": "it", "bbox": [0.0, 0.0, 9.0, 9.0]}
    for image, message in (
        ("https://host/a.png", "row 0: image is the URL 'https://host/a.png': nothing is downloaded"),
        ("", "row 0: image is the empty path ''"),
        ({"bytes": "iVBOR"}, "row 0: image has bytes that are str 'iVBOR'"),
        ({"path": ""}, "row 0: image is dict"),
    ):
        pq.write_table(pa.Table.from_pylist([{**row, "image": image}]), tmp_path / "rows.parquet")
        with pytest.raises(ValueError, match=r"rows\.parquet, " + message):
            load_grounding_samples(str(tmp_path / "rows.parquet"), tmp_path)
    pq.write_table(
        pa.Table.from_pylist([{**row, "image": "a.png", "mask": "https://host/m.png"}]), tmp_path / "m.parquet"
    )
    with pytest.raises(ValueError, match=r"row 0: mask is the URL 'https://host/m.png': nothing is down"):
        load_grounding_samples(str(tmp_path / "m.parquet"), tmp_path)


def test_a_benchmark_row_whose_picture_is_nowhere_says_so(tmp_path):
    rows = [
        {"question_id": "a", "image": image, "question": "q?", "answer": "yes", "category": "random"}
        for image in ("https://host/a.png", "", "data:image/png;base64,***", "gone.png")
    ]
    table = open_table(find_task("pope")(), write_table(tmp_path, rows), "test")
    for number, message in enumerate(("nothing is downloaded", "the empty path", "base64 is broken", "does not exist")):
        with pytest.raises(ValueError, match=message):
            table.picture(number)
