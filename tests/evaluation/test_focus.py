"""Attention of prompts against eager attention one prompt at a time, and the evaluator on the miniature."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sar_fast import SARConfig, apply_sar
from sar_fast.hf import shared_prefix
from sar_fast.hf.shared_prefix import PER_TOKEN, PromptGroups, Sharing
from sar_fast.hf.structure import find_decoder_layers
from sar_fast.lab.focus import FocusMetricsEvaluator, GroundingSample, summarise
from sar_fast.lab.focus import attention as under_test
from sar_fast.lab.focus.attention import prompt_attention
from sar_fast.lab.focus.prompts import check_templates
from sar_fast.lab.focus.samples import box_mask
from sar_fast.lab.io.prompts import PromptFormat
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.drawing import draw_scene
from tests.hf.tiny import CASES
from tests.hf.tiny.base import IMAGE

TAILS = ([21, 22], [23], [21, 25, 26, 27])  # what three prompts about one picture end with
# Two orders of the same fp32 sums, through four layers with logits of order 1: seen 1e-6 to 7e-6 of the peak
CLOSE = {"rtol": 0, "atol": 5e-5}


def groups_of(case, pictures: int = 2) -> PromptGroups:
    inputs = case.batch([1] * pictures)
    real = [inputs["attention_mask"][b].bool() for b in range(pictures)]
    ids = [inputs["input_ids"][b][real[b]].tolist() for b in range(pictures)]
    extras = {
        name: [[inputs[name][b][real[b]].tolist() + [0] * len(t) for t in TAILS] for b in range(pictures)]
        for name in PER_TOKEN
        if name in inputs
    }
    return PromptGroups(inputs, [[row + t for t in TAILS] for row in ids], extras, 0)


def eager_rows(model, case, layer: int) -> list[list[torch.Tensor]]:
    """[B][P] (V,): every prompt by itself, all attention matrices materialised by transformers."""
    model.set_attn_implementation("eager")
    found = []
    for b in range(2):
        inputs = case.batch([1], first_image=b)
        ids = inputs["input_ids"][0].tolist()
        whole = groups_of(case).ids[b]
        assert whole[0][: len(ids)] == ids
        found.append([])
        for row in whole:
            more = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            more |= {
                name: torch.tensor([inputs[name][0].tolist() + [0] * (len(row) - len(ids))])
                for name in PER_TOKEN
                if name in inputs
            }
            with torch.no_grad():
                weights = model(**{**inputs, **more}, output_attentions=True).attentions[layer][0]  # (H, S, S)
            found[-1].append(weights.mean(0)[-1][torch.tensor(row) == IMAGE])
    model.set_attn_implementation("sdpa")
    return found


def flat(rows: list[list]) -> list:
    return [one for row in rows for one in row]


class TestPromptAttention:
    @pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
    def test_rows_are_those_of_eager_attention_one_prompt_at_a_time(self, name):
        case = CASES[name]
        model = case.make()
        expected = eager_rows(model, case, -1)
        found = prompt_attention(model, groups_of(case), [-1])
        for mine, theirs in zip(flat(found), flat(expected)):
            torch.testing.assert_close(mine.mean / theirs.max(), theirs / theirs.max(), **CLOSE)
            torch.testing.assert_close(mine.weighted, mine.mean)

    @pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "glm4v", "kimi_k25"])
    def test_continuing_a_shared_prefix_changes_nothing(self, name, monkeypatch):
        model, groups = CASES[name].make(), groups_of(CASES[name])
        shared = prompt_attention(model, groups, [-1, 1])
        monkeypatch.setattr(shared_prefix, "sharing_of", lambda model: Sharing("", "not here"))
        for a, b in zip(flat(shared), flat(prompt_attention(model, groups, [-1, 1]))):
            torch.testing.assert_close(a.mean / b.mean.max(), b.mean / b.mean.max(), **CLOSE)

    def test_with_sar_rows_are_those_of_whole_prompts_with_sar(self):
        case, config = CASES["llava"], SARConfig(activation_layer_k=2, beta=0.02, record=True, record_rows="last_text")
        model, groups = case.make(), groups_of(case)
        found = prompt_attention(model, groups, [-1], config)
        off = prompt_attention(model, groups, [-1])
        with apply_sar(model, config) as handle, torch.no_grad():
            for b, rows in enumerate(groups.ids):
                pixels = case.batch([1], first_image=b)["pixel_values"]
                for p, row in enumerate(rows):
                    model(input_ids=torch.tensor([row]), pixel_values=pixels)
                    seen = handle.rows[3][0][:, torch.tensor(row) == IMAGE]  # (H, V)
                    c = handle.stats[3].head_weights[0]
                    weighted = (c[:, None] * seen).sum(0) / c.sum()
                    torch.testing.assert_close(found[b][p].mean / seen.max(), seen.mean(0) / seen.max(), **CLOSE)
                    torch.testing.assert_close(found[b][p].weighted / seen.max(), weighted / seen.max(), **CLOSE)
        assert (found[0][0].mean - off[0][0].mean).abs().max() > 1e-4  # SAR does something here
        assert (found[0][0].weighted - found[0][0].mean).abs().max() > 1e-3

    @pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "llava_next", "internvl", "mistral3"])
    @pytest.mark.parametrize("k", [1, 3])
    def test_sharing_the_layers_below_sar_changes_nothing(self, name, k, monkeypatch):
        # In fp64: at this beta SAR blows fp32 rounding up a hundredfold within three layers
        model, groups = CASES[name].make().double(), groups_of(CASES[name])
        for key, value in groups.inputs.items():
            groups.inputs[key] = value.double() if value.is_floating_point() else value
        config, passed = SARConfig(activation_layer_k=k, beta=0.02), []
        layers = find_decoder_layers(model)
        for i, layer in enumerate(layers):
            layer.mlp.register_forward_hook(lambda m, a, out, i=i: passed.append((i, out.shape[0], out.shape[1])))
        shared = prompt_attention(model, groups, [-1], config)
        below = [(rows, length) for i, rows, length in passed if i < len(layers) - k]
        longest = max(len(ids) for rows in groups.ids for ids in rows)
        assert {rows for rows, _ in below} == {2, 6}  # two pictures, six prompts
        assert max(length for rows, length in below if rows == 6) <= 5  # what the prompts do not share
        after = max(
            len(ids) - 1 - max(i for i, t in enumerate(ids) if t == IMAGE) for rows in groups.ids for ids in rows
        )
        above = [(r, n) for i, r, n in passed if i >= len(layers) - k]
        assert above == [(6, longest)] * (k - 1) + [(6, after)]  # of the last layer, text queries alone
        monkeypatch.setattr(shared_prefix, "sharing_of", lambda model: Sharing("", "not here"))
        whole = prompt_attention(model, groups, [-1], config)
        for a, b in zip(flat(shared), flat(whole)):
            torch.testing.assert_close(a.mean / b.mean.max(), b.mean / b.mean.max(), **CLOSE)
            torch.testing.assert_close(a.weighted / b.weighted.max(), b.weighted / b.weighted.max(), **CLOSE)

    def test_every_layer_under_sar_runs_whole_prompts(self):
        model, groups = CASES["llava"].make(), groups_of(CASES["llava"])
        config = SARConfig(activation_layer_k=4, beta=0.02)
        assert len(flat(prompt_attention(model, groups, [-1], config))) == 6

    @pytest.mark.parametrize("config", [None, SARConfig(activation_layer_k=2)])
    def test_each_picture_is_encoded_once_and_attention_is_never_eager(self, config):
        case = CASES["llava"]
        model, seen, implementations = case.make(), [], set()
        model.base_model.vision_tower.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))

        def watch(module, args, kwargs):
            implementations.add(module.config._attn_implementation)
            assert not kwargs.get("output_attentions")

        for layer in model.base_model.language_model.layers:
            layer.self_attn.register_forward_pre_hook(watch, with_kwargs=True)
        prompt_attention(model, groups_of(case), [-1], config)
        assert seen == [2]  # one call, two pictures, six prompts
        assert implementations == {"sar"}
        assert model.config.get_text_config()._attn_implementation == "sdpa"  # restored

    def test_layers_that_are_not_there_or_not_recorded(self):
        model, groups = CASES["llava"].make(), groups_of(CASES["llava"])
        with pytest.raises(ValueError, match="among the model's 4 attention layers"):
            prompt_attention(model, groups, [4])
        with pytest.raises(ValueError, match="one attention layer or more"):
            prompt_attention(model, groups, [])
        with pytest.raises(ValueError, match="layers 2 to 3"):
            prompt_attention(model, groups, [1], SARConfig(activation_layer_k=2))


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


def drawn(count: int, size: int = 48) -> list[GroundingSample]:
    rng, samples = np.random.default_rng(7), []
    for number in range(count):
        scene = draw_scene(rng, size=size, objects=2)
        thing = scene.objects[0]
        words = f"Where is the {thing.name}?"
        samples.append(
            GroundingSample(str(number), Image.fromarray(scene.image), words, thing.name, thing.box, thing.mask)
        )
    return samples


class TestPrompts:
    def test_tokens_are_the_processors_own(self, miniature):
        model, processor = miniature
        sample = drawn(1)[0]
        questions = ["Is there a red circle?", "the blue square in the image", "blue"]
        groups = PromptFormat.of(model, processor).encode_groups([sample.image], [questions])
        for question, ids in zip(questions, groups.ids[0]):
            text = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
            assert ids == processor(images=[sample.image], text=[text])["input_ids"][0]
        assert groups.inputs["pixel_values"].shape[0] == 1

    def test_templates_need_one_place_for_the_object(self):
        assert check_templates(["the {}"]) == ("the {}",)
        for bad in (
            ["the object"],
            ["{} and {}"],
            [],
            "the {}",
            ["the {} in {scene}"],
            ["the {0} {}"],
            ["a { {}"],
            ["the {:>9}"],
        ):
            with pytest.raises(ValueError, match="templates"):
                check_templates(bad)

    def test_a_processor_that_writes_no_visual_token_is_an_error(self, miniature):
        _, processor = miniature
        other = CASES["llava"].make()  # its placeholder is another id
        with pytest.raises(ValueError, match="no visual token"):
            PromptFormat.of(other, processor).encode_groups([drawn(1)[0].image], [["red", "blue"]])


class TestEvaluator:
    def test_attention_of_a_known_model_gives_the_closed_form(self, miniature, monkeypatch):
        # The model's attention replaced by a uniform one: SFS is then the mask's share of the picture and FI is 0.
        model, processor = miniature
        even = under_test.PromptAttention(torch.full((64,), 0.01), torch.full((64,), 0.01))
        monkeypatch.setattr("sar_fast.lab.focus.evaluator.prompt_attention", lambda *_: [[even] * 6 for _ in range(3)])
        for record, sample in zip(FocusMetricsEvaluator(model, processor).score(drawn(3)), drawn(3)):
            assert record["semantic_focus_score"] == pytest.approx(sample.mask.mean(), rel=1e-5)
            assert record["focus_instability"] == pytest.approx(0, abs=1e-9)

    def test_batching_and_neighbours_change_nothing(self, miniature):
        evaluator, samples = FocusMetricsEvaluator(*miniature), drawn(5)
        together = evaluator.score(samples)
        alone = [evaluator.score([sample])[0] for sample in samples]
        for a, b in zip(together, alone):
            assert a["id"] == b["id"]
            assert a["semantic_focus_score"] == pytest.approx(b["semantic_focus_score"], abs=2e-5)
            assert a["focus_instability"] == pytest.approx(b["focus_instability"], abs=2e-4)
            assert 0 <= a["focus_instability"] <= 1
            assert len(a["ssim"]) == 5

    def test_samples_of_one_picture_share_its_encoding(self, miniature):
        model, processor = miniature
        one, other = drawn(2)
        again = GroundingSample("again", one.image, "What is at the left?", "blue square", (2, 2, 20, 30))
        encoded = []
        hook = model.base_model.vision_tower.register_forward_pre_hook(lambda m, args: encoded.append(len(args[0])))
        evaluator = FocusMetricsEvaluator(model, processor)
        together = evaluator.score([one, other, again])
        hook.remove()
        assert encoded == [2]
        for found, sample in zip(together, (one, other, again)):
            (alone,) = evaluator.score([sample])
            assert found["id"] == sample.id
            assert found["semantic_focus_score"] == pytest.approx(alone["semantic_focus_score"], abs=2e-5)
            assert found["focus_instability"] == pytest.approx(alone["focus_instability"], abs=2e-4)

    def test_one_template_equal_to_the_query_is_stable(self, miniature):
        samples = [GroundingSample("a", drawn(1)[0].image, "the red circle", "red circle", (4, 4, 30, 20))]
        (record,) = FocusMetricsEvaluator(*miniature, templates=["the {}"]).score(samples)
        assert record["focus_instability"] == pytest.approx(0, abs=1e-6)

    def test_an_upright_picture_keeps_its_axes(self, miniature):
        # The model sees the picture stretched to a square. Rows of the map must be rows of the picture: the map of a
        # picture stretched to twice its height is the map stretched to twice its height.
        square = drawn(1)[0]
        tall = Image.fromarray(np.repeat(np.asarray(square.image), 2, axis=0))
        x1, y1, x2, y2 = square.bbox
        samples = [
            GroundingSample("square", square.image, square.query, square.object_prompt, (x1, y1, x2, y2)),
            GroundingSample("tall", tall, square.query, square.object_prompt, (x1, 2 * y1, x2, 2 * y2)),
        ]
        evaluator = FocusMetricsEvaluator(*miniature)
        a, b = evaluator.score(samples)
        assert a["mask_share"] == pytest.approx(b["mask_share"])
        # stretching by pixel repetition and the processor's bicubic filter do not commute exactly
        assert a["semantic_focus_score"] == pytest.approx(b["semantic_focus_score"], rel=0.1)

    def test_unusable_samples_are_counted_and_listed(self, miniature):
        good, other = drawn(2)
        bad = [
            GroundingSample("outside", other.image, other.query, other.object_prompt, (99, 0, 120, 9)),
            GroundingSample("flat", other.image, other.query, other.object_prompt, (9, 9, 9, 20)),
            GroundingSample("blank", other.image, other.query, other.object_prompt, mask=np.zeros((48, 48), bool)),
        ]
        records = FocusMetricsEvaluator(*miniature).score([good, *bad])
        found = summarise(records)
        assert found["num_samples_evaluated"] == 1
        assert found["num_samples_skipped"] == 3
        expected = {"box outside the image": ["outside"], "box has no area": ["flat"], "empty mask": ["blank"]}
        assert found["skipped"] == expected
        assert json.loads(json.dumps(found)) == found
        with pytest.raises(ValueError, match=r"no sample could be scored: .*empty mask \(1\)"):
            summarise(records[1:])
        nowhere = GroundingSample("nowhere", good.image, "red", "red")
        with pytest.raises(ValueError, match="neither mask nor bbox"):
            FocusMetricsEvaluator(*miniature).score([nowhere])

    def test_a_picture_that_ssim_has_no_window_for_is_a_listed_skip(self, miniature):
        (good,) = drawn(1)
        sizes = [(2, 40), (40, 2), (1, 1), (3, 40), (4, 4)]
        narrow = [
            GroundingSample(f"{w}x{h}", Image.new("RGB", (w, h), "red"), "Where is it?", "it", (0, 0, w, h))
            for w, h in sizes
        ]
        records = {record["id"]: record for record in FocusMetricsEvaluator(*miniature).score([good, *narrow])}
        assert [name for name, record in records.items() if "skipped" in record] == ["2x40", "40x2", "1x1"]
        detail = "picture too small for SSIM: needed 3 x 3 pixels or more; got 2 x 40"
        assert records["2x40"]["detail"] == detail
        assert summarise([*records.values()])["skipped"] == {"picture too small for SSIM": ["2x40", "40x2", "1x1"]}

    def test_with_sar_both_weightings_are_scored(self, miniature):
        config = SARConfig(activation_layer_k=2, beta=0.1)
        records = FocusMetricsEvaluator(*miniature, config=config).score(drawn(3))
        found = summarise(records)
        assert found["c_weighted"]["semantic_focus_score"] != found["semantic_focus_score"]
        low, high = found["semantic_focus_score_ci95"]
        assert low <= found["semantic_focus_score"] <= high

    def test_overlays_show_the_picture_with_the_masks_edge(self, miniature, tmp_path):
        sample = drawn(1, size=60)[0]
        FocusMetricsEvaluator(*miniature, overlay_dir=str(tmp_path / "overlays")).score([sample])
        overlay = np.asarray(Image.open(tmp_path / "overlays" / "0.png"))
        assert overlay.shape == (60, 60, 3)
        x1, y1, x2, y2 = sample.bbox
        edge = box_mask(sample.bbox, (60, 60)) & (overlay == 255).all(-1)
        assert edge[y1:y2, x1].any()
        assert edge[y2 - 1, x1:x2].any()
        assert not (overlay == 255).all(-1)[~sample.mask].any()
