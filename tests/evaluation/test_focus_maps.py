"""Maps and scores on hand-made attention whose answer is known; pictures are asymmetric, so swapped axes fail."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sar_fast.hf.families import find_family
from sar_fast.lab.focus.bootstrap import interval_of_mean
from sar_fast.lab.focus.grids import TokenGrid, token_grids
from sar_fast.lab.focus.maps import attention_map, focus_instability, semantic_focus, structural_similarities
from sar_fast.lab.focus.samples import box_mask, check_mask, decode_mask, picture_hash
from sar_fast.lab.io.skips import SampleSkipped
from tests.hf.tiny import CASES

SIZE = (96, 40)  # width, height


def grid(rows: int, columns: int, region: tuple[int, int, int, int] = (0, 0, *SIZE)) -> TokenGrid:
    return TokenGrid(np.arange(rows * columns).reshape(rows, columns), region)


def one_hot(rows: int, columns: int, row: int, column: int) -> np.ndarray:
    values = np.zeros(rows * columns)
    values[row * columns + column] = 1
    return values


class TestAttentionMap:
    def test_uniform_attention_gives_the_mask_its_share_of_the_picture(self):
        attention = attention_map(np.full(15, 0.01), [grid(3, 5)], SIZE)
        mask = box_mask((10, 5, 50, 25), SIZE)
        assert attention.shape == (40, 96)
        assert attention.sum() == pytest.approx(1, abs=1e-12)
        # Pillow's bicubic filter keeps constants to fp32 rounding
        assert semantic_focus(attention, mask) == pytest.approx(40 * 20 / (96 * 40), rel=1e-6)

    def test_one_token_lies_where_its_row_and_column_are(self):
        attention = attention_map(one_hot(2, 6, 1, 4), [grid(2, 6)], SIZE)
        y, x = np.unravel_index(attention.argmax(), attention.shape)
        assert 64 <= x < 80  # column 4 of 6 over 96 pixels
        assert 20 <= y < 40  # row 1 of 2 over 40 pixels
        centre = (attention.sum(0) * (np.arange(96) + 0.5)).sum()
        assert abs(centre - 72) < 1.5  # the undershoot that is cut off is not symmetric at the border

    def test_a_bicubic_row_of_two_cells_is_known_in_closed_form(self):
        # Keys' cubic with a = -1/2, cells (1, 0), 2 -> 4 pixels, Pillow's support stretched by nothing (upsampling).
        # Pixel centres lie at 0.25, 0.75, 1.25, 1.75 cells; weights of the two existing cells are renormalised.
        kernel = lambda t: np.where(
            abs(t) < 1, 1.5 * abs(t) ** 3 - 2.5 * t**2 + 1, -0.5 * abs(t) ** 3 + 2.5 * t**2 - 4 * abs(t) + 2
        )
        pixels = np.array([0.25, 0.75, 1.25, 1.75])
        first, second = kernel(pixels - 0.5), kernel(pixels - 1.5)
        expected = (first / (first + second)).clip(0)
        expected /= expected.sum() * 4
        attention = attention_map(np.array([1.0, 0.0]), [grid(1, 2, (0, 0, 4, 4))], (4, 4))
        np.testing.assert_allclose(attention, np.tile(expected, (4, 1)), rtol=1e-6, atol=1e-8)

    def test_swapped_axes_would_be_seen(self):
        right = attention_map(one_hot(4, 9, 0, 8), [grid(4, 9)], SIZE)
        mask = box_mask((85, 0, 96, 10), SIZE)
        assert semantic_focus(right, mask) > 0.8
        swapped = attention_map(one_hot(4, 9, 0, 8).reshape(4, 9).T.ravel(), [grid(9, 4)], SIZE)
        assert semantic_focus(swapped, mask) < 0.05

    def test_grids_keep_the_share_of_their_tokens(self):
        whole = TokenGrid(np.arange(4).reshape(2, 2), (0, 0, *SIZE))
        half = TokenGrid(np.arange(4, 10).reshape(2, 3), (48, 0, 96, 40))
        values = np.r_[np.full(4, 0.1), np.full(6, 0.1)]
        attention = attention_map(values, [whole, half], SIZE)
        assert attention[:, 48:].sum() == pytest.approx((0.2 + 0.6) / 1.0, rel=1e-6)

    def test_what_lies_beyond_the_picture_is_not_counted(self):
        square = grid(4, 4, (0, -28, 96, 68))  # a 96 x 96 square with padding above and below
        attention = attention_map(np.full(16, 1.0), [square], SIZE)
        np.testing.assert_allclose(attention, 1 / attention.size, rtol=1e-6)

    def test_bad_values(self):
        with pytest.raises(ValueError, match="values must put attention on the picture"):
            attention_map(np.zeros(4), [grid(2, 2)], SIZE)
        with pytest.raises(ValueError, match="finite and >= 0"):
            attention_map(np.array([1, -1, 0, 0.0]), [grid(2, 2)], SIZE)


class TestScores:
    def test_identical_maps_have_no_instability(self):
        attention = attention_map(np.random.default_rng(0).random(24), [grid(4, 6)], SIZE)
        assert focus_instability(attention, [attention.copy() for _ in range(5)]) == pytest.approx(0, abs=1e-12)

    def test_moved_attention_is_unstable(self):
        here, there = (attention_map(one_hot(4, 6, *p), [grid(4, 6)], SIZE) for p in ((0, 0), (3, 5)))
        assert focus_instability(here, [there]) > focus_instability(here, [0.5 * here + 0.5 * there]) > 0.01

    def test_similarity_is_the_formula_over_windows(self):
        # SSIM by its definition: 7 x 7 windows, sample variances, averaged where the window fits.
        rng = np.random.default_rng(1)
        a, b = rng.random((9, 11)), rng.random((9, 11))
        L = max(a.max(), b.max())
        c1, c2 = (0.01 * L) ** 2, (0.03 * L) ** 2
        found = []
        for y in range(9 - 6):
            for x in range(11 - 6):
                p, q = a[y : y + 7, x : x + 7].ravel(), b[y : y + 7, x : x + 7].ravel()
                covariance = np.cov(p, q)
                found.append(
                    (2 * p.mean() * q.mean() + c1) * (2 * covariance[0, 1] + c2)
                    / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2))
                )  # fmt: skip
        assert structural_similarities(a, [b])[0] == pytest.approx(np.mean(found), rel=1e-9)

    def test_without_scikit_image_the_error_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "skimage", None)
        with pytest.raises(ImportError, match=r"pip install 'sar_fast\[reports\]'"):
            structural_similarities(np.ones((8, 8)), [np.ones((8, 8))])

    def test_bad_masks(self):
        attention = np.full((40, 96), 1 / 3840)
        with pytest.raises(ValueError, match="picture's shape"):
            semantic_focus(attention, np.ones((96, 40), bool))
        with pytest.raises(ValueError, match="mask must have a pixel to focus on; got an empty one"):
            semantic_focus(attention, np.zeros((40, 96), bool))
        with pytest.raises(TypeError, match="mask must be bool; got float64"):
            semantic_focus(attention, np.ones((40, 96)))
        with pytest.raises(ValueError, match=r"attention must have \d x \d pixels or more for SSIM; got 9 x 1"):
            structural_similarities(attention[:1, :9], [attention[:1, :9]])
        with pytest.raises(ValueError, match="values and groups must have the same length > 0; got 2 and 3"):
            interval_of_mean([0.5, 0.5], [0, 1, 2])
        with pytest.raises(ValueError, match="at least two prompts"):
            focus_instability(attention, [])

    def test_interval_covers_the_mean_and_grows_with_shared_pictures(self):
        rng = np.random.default_rng(0)
        by_picture = np.repeat(rng.random(40), 5)
        alone = interval_of_mean(by_picture, range(200))
        grouped = interval_of_mean(by_picture, np.repeat(np.arange(40), 5).tolist())
        assert alone[0] < by_picture.mean() < alone[1]
        # five equal samples per picture: the standard error is sqrt(5) = 2.2 times that of independent ones
        assert 1.8 < (grouped[1] - grouped[0]) / (alone[1] - alone[0]) < 2.7


class TestMasks:
    def test_a_box_holds_the_pixels_whose_centres_are_in_it(self):
        mask = box_mask((1.4, 0.0, 3.6, 2.0), (5, 4))
        assert np.argwhere(mask).tolist() == [[y, x] for y in (0, 1) for x in (1, 2, 3)]

    def test_a_box_over_the_edge_is_cut(self):
        assert box_mask((90, 30, 200, 200), SIZE).sum() == 6 * 10

    @pytest.mark.parametrize(
        ("box", "reason"),
        [
            ((200, 0, 300, 10), "box outside the image"),
            ((-9, -9, -1, -1), "box outside the image"),
            ((10, 10, 10, 20), "box has no area"),
            ((30, 10, 10, 20), "box has no area"),
            ((10.6, 10.6, 10.9, 10.9), "empty mask"),
            ((0.1, 0.2, 0.9, 1.0), "box in fractions of the picture, needed pixels"),
        ],
    )
    def test_unusable_boxes_are_skips_with_a_reason(self, box, reason):
        with pytest.raises(SampleSkipped) as skipped:
            box_mask(box, SIZE)
        assert skipped.value.reason == reason

    def test_unusable_masks(self):
        with pytest.raises(ValueError, match="four finite numbers"):
            box_mask((1, 2, 3, float("nan")), SIZE)
        with pytest.raises(SampleSkipped, match="empty mask"):
            check_mask(np.zeros((40, 96)), SIZE)
        with pytest.raises(SampleSkipped, match="as its picture"):
            check_mask(np.ones((96, 40)), SIZE)
        fractions = [0.1, 0.1, 0.9, 0.1, 0.9, 0.9]
        for bad in (b"no picture", [1, 2, 3, 4], [[1, 2, 3, 4, 5, "x"]], [[9, 2, 30, 4, float("nan"), 9]], fractions):
            with pytest.raises(SampleSkipped, match="unreadable mask"):
                decode_mask(bad, SIZE)

    def test_hash_is_of_pixels_and_shape(self):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 4, 3), dtype=np.uint8))
        assert picture_hash(picture) == picture_hash(picture.copy())
        turned = Image.frombytes("RGB", (6, 4), picture.tobytes())
        assert picture_hash(picture) != picture_hash(turned)


PLACES = [(8, 10), (70, 6), (40, 20), (90, 34), (52, 36)]  # x, y of a bright spot in a picture of SIZE


def spotted(x: int, y: int) -> Image.Image:
    """A black picture with a white spot of 8 x 8 pixels."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[max(y - 4, 0) : y + 4, max(x - 4, 0) : x + 4] = 255
    return Image.fromarray(pixels)


def brightness(patches: torch.Tensor) -> torch.Tensor:
    """(n, ...) -> (n,) mean above the darkest patch's."""
    means = patches.flatten(1).double().mean(1)
    return means - means.min()


class TestRealProcessors:
    """From the picture to the map through each family's own processor and its own order of patches and tokens."""

    def spot_is_found(self, values: torch.Tensor, grids: list[TokenGrid], x: int, y: int, cell: tuple[float, float]):
        attention = attention_map(values, grids, SIZE)
        row, column = np.unravel_index(attention.argmax(), attention.shape)
        assert abs(column + 0.5 - x) <= cell[0]  # the middle of a cell that the spot lies in, or its neighbour's edge
        assert abs(row + 0.5 - y) <= cell[1]

    @pytest.mark.parametrize(("x", "y"), PLACES)
    def test_qwen_merges_blocks_of_a_picture_in_its_own_shape(self, x, y):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        model = CASES["qwen2_vl"].make()
        processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=10**6)
        inputs = processor(images=[spotted(x, y)], return_tensors="pt")
        norms = brightness(inputs["pixel_values"])
        values = find_family(model.config).token_norms(model.base_model, norms, inputs)
        grids = token_grids(model, processor, inputs, 0, len(values), SIZE)
        assert grids[0].index.shape == (5, 12)  # 40 x 96 pixels, tokens of 8 x 8
        self.spot_is_found(values, grids, x, y, (8, 8))

    @pytest.mark.parametrize(("x", "y"), [place for place in PLACES if 28 < place[0] < 68])
    def test_llava_sees_the_middle_of_a_wide_picture(self, x, y):
        model = CASES["llava"].make()
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        pixels = processor(images=[spotted(x, y)], return_tensors="pt")["pixel_values"]
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(16, -1)
        inputs = {"pixel_values": pixels, "input_ids": torch.zeros(1, 20)}
        grids = token_grids(model, processor, inputs, 0, 16, SIZE)
        assert grids[0].region == (28, 0, 68, 40)
        self.spot_is_found(brightness(patches), grids, x, y, (10, 10))

    @pytest.mark.parametrize(("x", "y"), PLACES)
    def test_llava_next_joins_tiles_and_crops_their_border(self, x, y):
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        model = CASES["llava_next"].make()
        sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        processor = LlavaNextImageProcessorPil(**sides, image_grid_pinpoints=model.config.image_grid_pinpoints)
        inputs = processor(images=[spotted(x, y)], return_tensors="pt")
        tiles = inputs["pixel_values"][0]  # (tiles, 3, 16, 16), the whole picture first
        patches = tiles.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(tiles) * 16, -1)
        norms = brightness(patches).view(len(tiles), 16)
        norms = torch.cat([torch.zeros(len(tiles), 1), norms], dim=1)  # a class token
        values = find_family(model.config).token_norms(model.base_model, norms, inputs)
        grids = token_grids(model, processor, inputs, 0, len(values), SIZE)
        newlines = set(range(len(values))) - {int(i) for grid in grids for i in grid.index.ravel()}
        assert newlines == set(range(16 + grids[1].index.shape[1], len(values), grids[1].index.shape[1] + 1))
        self.spot_is_found(values, grids[1:], x, y, (12, 13.4))
        self.spot_is_found(values, grids, x, y, (24, 13.4))


class TestGrids:
    """Shapes and regions by family."""

    def shapes(self, name: str, size: tuple[int, int] = SIZE) -> list[list[TokenGrid]]:
        case = CASES[name]
        model, inputs = case.make(), case.batch([1, 1, 1])
        tokens = (inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist()
        return [token_grids(model, None, inputs, i, n, size) for i, n in enumerate(tokens)]

    def test_llava_is_square(self):
        for (one,) in self.shapes("llava"):
            assert one.index.tolist() == np.arange(16).reshape(4, 4).tolist()
            assert one.region == (0, 0, *SIZE)

    def test_merged_grids_have_each_pictures_own_shape(self):
        # patches (8, 12), (12, 8), (6, 10), merged 2 x 2
        for name in ("qwen2_5_vl", "qwen2_vl", "qwen3_vl"):
            assert [one.index.shape for (one,) in self.shapes(name)] == [(4, 6), (6, 4), (3, 5)]

    @pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
    def test_tiles_follow_the_whole_and_newlines_are_left_out(self, name):
        found = self.shapes(name)
        assert all(len(grids) == 2 and grids[0].index.shape == (4, 4) for grids in found)
        wide, tall, _ = (grids[1].index for grids in found)
        assert wide.shape[0] < wide.shape[1]
        assert tall.shape[0] > tall.shape[1]
        for index in (wide, tall):
            assert index[0, 0] == 16
            assert (np.diff(index, axis=1) == 1).all()
            assert (np.diff(index, axis=0) == index.shape[1] + 1).all()  # one newline ends every row

    def test_padding_of_a_padded_square_is_beyond_the_picture(self):
        (one,) = self.shapes("deepseek_vl")[0]
        assert one.region == (0, -28, 96, 68)

    def test_a_centre_crop_is_the_region(self):
        class Processor:
            do_center_crop, crop_size = True, {"height": 16, "width": 16}
            size = {"shortest_edge": 16}  # noqa: RUF012

        model, inputs = CASES["llava"].make(), CASES["llava"].batch([1])
        (one,) = token_grids(model, Processor(), inputs, 0, 16, SIZE)
        assert one.region == (28, 0, 68, 40)

    def test_unordered_tiles_are_an_error(self):
        model, inputs = CASES["llava"].make(), CASES["llava"].batch([1])
        inputs["pixel_values"] = torch.zeros(4, 3, 16, 16)
        with pytest.raises(ValueError, match="do not form one rectangle"):
            token_grids(model, None, inputs, 0, 64, SIZE)
