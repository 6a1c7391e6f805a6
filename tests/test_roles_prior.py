"""Token roles and the semantic prior."""

from __future__ import annotations

import pytest
import torch

from sar_fast import semantic_prior, token_roles

IMAGE, VIDEO, PAD = 7, 8, 0
# i = image token, v = video token, t = text, . = padding
WORDS = {"i": IMAGE, "v": VIDEO, "t": 3, ".": PAD}


def prompt(*rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[WORDS[c] for c in row] for row in rows])
    return ids, torch.tensor([[c != "." for c in row] for row in rows]).long()


def drawn(roles) -> list[str]:
    """V, T or - for every position."""
    assert not (roles.visual_mask & roles.text_mask).any()
    letter = lambda v, t: "V" if v else "T" if t else "-"
    return ["".join(letter(v, t) for v, t in zip(*row)) for row in zip(roles.visual_mask, roles.text_mask)]


LAST, FIRST = "after_last_image", "after_first_image"


@pytest.mark.parametrize(
    ("row", "option", "expected"),
    [
        ("tiiitt", LAST, "-VVVTT"),
        ("tiiitt", FIRST, "-VVVTT"),
        ("..tiit", LAST, "---VVT"),
        ("tiit..", LAST, "-VVT--"),
        ("tiittiit", LAST, "-VV--VVT"),
        ("tiittiit", FIRST, "-VVTTVVT"),
        (".iit.tii.t", FIRST, "-VVT-TVV-T"),
        (".iit.tii.t", LAST, "-VV---VV-T"),
        ("tttt", LAST, "----"),
        ("tttt", FIRST, "----"),
        ("ttii", LAST, "--VV"),
        ("iiii", FIRST, "VVVV"),
        ("tit", LAST, "-VT"),
        ("....", LAST, "----"),
        ("", LAST, ""),
    ],
)
def test_one_prompt(row, option, expected):
    ids, mask = prompt(row)
    assert drawn(token_roles(ids.long(), mask, IMAGE, text_queries=option)) == [expected]


def test_samples_of_a_batch_are_independent():
    ids, mask = prompt("tiit..", "..tiit", "tttttt", "itittt")
    assert drawn(token_roles(ids, mask, IMAGE)) == ["-VVT--", "---VVT", "------", "V-VTTT"]
    assert drawn(token_roles(ids, mask.bool(), IMAGE)) == ["-VVT--", "---VVT", "------", "V-VTTT"]


def test_without_an_attention_mask_everything_is_real():
    ids, _ = prompt("tiit..")
    assert drawn(token_roles(ids, None, IMAGE)) == ["-VVTTT"]


def test_a_padding_token_that_looks_like_an_image_is_padding():
    ids, _ = prompt("iitiit")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert drawn(token_roles(ids, mask, IMAGE)) == ["---VVT"]
    assert drawn(token_roles(ids, 1 - mask, IMAGE)) == ["VV----"]


def test_several_ids():
    ids, mask = prompt("tiitvvt")
    assert drawn(token_roles(ids, mask, [IMAGE, VIDEO])) == ["-VV-VVT"]
    assert drawn(token_roles(ids, mask, (IMAGE, VIDEO), text_queries=FIRST)) == ["-VVTVVT"]
    assert drawn(token_roles(ids, mask, VIDEO)) == ["----VVT"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"input_ids": torch.zeros(4)},
            ValueError,
            r"input_ids must be .*\(batch, seqlen\) integer tensor; got \(4,\)",
        ),
        ({"input_ids": torch.zeros(1, 4)}, ValueError, r"input_ids must be .*integer tensor; got"),
        ({"input_ids": [[1]]}, ValueError, r"input_ids must be .*integer tensor; got list"),
        ({"attention_mask": torch.ones(1, 5)}, ValueError, r"attention_mask must .*\(1, 4\); got \(1, 5\)"),
        ({"image_token_id": []}, TypeError, r"image_token_id must be an int or a sequence of ints; got \[\]"),
        ({"image_token_id": [1.5]}, TypeError, r"image_token_id must be an int or a sequence of ints; got \[1.5\]"),
        ({"image_token_id": True}, TypeError, r"image_token_id must be an int .*got True"),
        ({"text_queries": "all"}, ValueError, r"text_queries must be one of .*'after_first_image'; got 'all'"),
    ],
    ids=str,
)
def test_wrong_role_arguments(arguments, error, message):
    call = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": None, "image_token_id": IMAGE}
    with pytest.raises(error, match=message):
        token_roles(**{**call, **arguments})


MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]]).bool()
NORMS = [3.0, 1.0, 0.0, 5.0, 15.0]  # row 0, row 0, row 0, row 2, row 2
EXPECTED = torch.tensor([[0, 0.75, 0.25, 0, 0], [0, 0, 0, 0, 0], [0.25, 0, 0, 0.75, 0]])


def features() -> torch.Tensor:
    """(5, 4) with the norms above, in directions that have nothing to do with them."""
    directions = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    return directions * torch.tensor(NORMS)[:, None]


def aligned() -> torch.Tensor:
    """(B, S, F): features at the visual positions, large numbers elsewhere."""
    grid = torch.full((3, 5, 4), 100.0)
    grid[MASK] = features()
    return grid


FORMS = {
    "all in one": features(),
    "per sample": [features()[:3], features()[:0], features()[3:]],
    "per image": (features()[:3], features()[3:4], features()[4:]),
    "with a batch dimension": [features()[None, :3], features()[None, 3:]],
    "aligned with the mask": aligned(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_features(form):
    prior = semantic_prior(form, MASK)
    assert prior.dtype == torch.float32
    torch.testing.assert_close(prior, EXPECTED)
    assert not prior[~MASK].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_are_taken_in_fp32(dtype):
    """The sum of squares of 1,000 entries of 100 is beyond fp16's largest number."""
    features = torch.full((5, 1000), 100.0, dtype=dtype)
    features[0] /= 2
    prior = semantic_prior(features, MASK)
    assert prior.dtype == torch.float32
    torch.testing.assert_close(prior[0], torch.tensor([0, 0.2, 0.4, 0.4, 0]))


def test_a_sample_of_zero_features_has_the_uniform_prior():
    zero_row = features()
    zero_row[:3] = 0
    prior = semantic_prior(zero_row, MASK)
    torch.testing.assert_close(prior[0], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0]))
    torch.testing.assert_close(prior[2], EXPECTED[2])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_the_prior_does_not_depend_on_the_scale_of_the_features(scale):
    torch.testing.assert_close(semantic_prior(features().double() * scale, MASK), EXPECTED)


def test_gradients_reach_the_features():
    leaf = features().requires_grad_()
    weights = torch.arange(15.0).view(3, 5)
    (semantic_prior(leaf, MASK) * weights).sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0].any()


@pytest.mark.parametrize("features", [torch.zeros(0, 4), []], ids=["empty tensor", "no tensors"])
def test_a_batch_without_images(features):
    assert not semantic_prior(features, torch.zeros(2, 3, dtype=torch.bool)).any()


@pytest.mark.parametrize(
    ("features", "mask", "error", "message"),
    [
        (
            torch.ones(4, 4),
            MASK,
            ValueError,
            r"features must hold one vector per visual token, of which mask has 5; got 4",
        ),
        ([torch.ones(3, 4)] * 2, MASK, ValueError, r"features must hold one vector .*mask has 5; got 6"),
        (torch.ones(2, 5, 4), MASK, ValueError, r"features must be .*mask's \(B, S\) = \(3, 5\); got \(2, 5, 4\)"),
        (torch.ones(5), MASK, ValueError, r"features must be \(total_visual, F\).*got \(5,\)"),
        (torch.ones(5, 4), MASK.long(), TypeError, r"mask must be a \(batch, seqlen\) bool tensor; got torch.int64"),
        (torch.ones(3, 5, 4), MASK.long(), TypeError, r"mask must be a \(batch, seqlen\) bool tensor; got torch.int64"),
        (torch.ones(5, 4), MASK[0], TypeError, r"mask must be a \(batch, seqlen\) bool tensor; got .*\(5,\)"),
    ],
    ids=["too few", "too many", "other batch", "rank", "int mask", "int mask and a grid", "mask rank"],
)
def test_wrong_prior_arguments(features, mask, error, message):
    with pytest.raises(error, match=message):
        semantic_prior(features, mask)
