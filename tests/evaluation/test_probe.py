"""The layer-wise probe: batched heads equal heads alone, planted information is found, one forward pass per batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from sar_fast import SARConfig
from sar_fast.lab.focus import GroundingSample
from sar_fast.lab.io.boxes import box_iou
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.drawing import draw_scene
from sar_fast.lab.probe import HeadTraining, LayerwiseProbe
from sar_fast.lab.probe.features import FeatureStore, last_token_states, layer_features
from sar_fast.lab.probe.heads import Heads, corners, predict, scaled, train_heads
from sar_fast.lab.probe.probe import is_right, split_by_picture
from tests.hf.tiny import CASES

L, D = 6, 24


def random_features(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, L, D, generator=torch.Generator().manual_seed(seed))


def boxes(n: int) -> torch.Tensor:
    """(n, 4) centre x, y, width, height of boxes of varied size and place."""
    u = torch.rand(n, 4, generator=torch.Generator().manual_seed(9))
    return torch.cat([0.2 + 0.6 * u[:, :2], 0.1 + 0.3 * u[:, 2:]], dim=1)


class TestHeads:
    @pytest.mark.parametrize("task", ["grounding", "classification"])
    def test_training_together_is_training_each_alone(self, task):
        # Plain nn.Linear, AdamW and loss for one layer at a time, written out here.
        features, rows = random_features(70), torch.arange(10, 70)
        targets = boxes(70) if task == "grounding" else torch.randint(0, 5, (70,))
        outputs = 4 if task == "grounding" else 5
        training = HeadTraining(lr=1e-2, epochs=3, batch_size=16)
        heads = train_heads(features.__getitem__, targets, rows, outputs, training, seed=3)
        for layer in range(L):
            generator = torch.Generator().manual_seed(3)
            alone = torch.nn.Linear(D, outputs)
            with torch.no_grad():
                alone.weight.copy_(((2 * torch.rand(D, outputs, generator=generator) - 1) * D**-0.5).T)
                alone.bias.copy_((2 * torch.rand(outputs, generator=generator) - 1) * D**-0.5)
            optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2, weight_decay=0.01)
            for _ in range(3):
                order = rows[torch.randperm(60, generator=generator)]
                for batch in order.split(16):
                    output = alone(features[batch, layer])
                    if task == "grounding":
                        loss = torch.nn.functional.l1_loss(output, targets[batch])
                    else:
                        loss = torch.nn.functional.cross_entropy(output, targets[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            # Twelve steps of at most lr each: fp32 rounding of the gradients moves a step by about 1e-6 of it, a sign
            # of L1 that flips on a rounding error is ruled out by the seeds
            torch.testing.assert_close(heads.weight[layer].T, alone.weight.detach(), rtol=0, atol=1e-5)
            torch.testing.assert_close(heads.bias[layer], alone.bias.detach(), rtol=0, atol=1e-5)

    def test_a_layer_that_knows_the_box_scores_and_noise_does_not(self):
        n = 800
        targets, features = boxes(n), random_features(n, seed=1)
        mixing = torch.randn(4, D, generator=torch.Generator().manual_seed(2))
        features[:, 2] = 3 * (targets @ mixing) + 0.02 * features[:, 2]
        rows = torch.arange(n)
        features *= 10.0 ** torch.arange(-2, 4)[:, None]  # whatever the layers' scales
        training = HeadTraining(epochs=60, lr=3e-3)
        usable = scaled(features.__getitem__, rows[:640], training)
        heads = train_heads(usable, targets, rows[:640], 4, training, seed=0)
        scores = is_right(predict(heads, usable, rows[640:]), targets[640:]).double().mean(0)
        assert scores[2] > 0.95
        assert scores[[0, 1, 3, 4, 5]].max() < 0.3

    def test_scaled_features_have_unit_norm_on_average_and_constants_vanish(self):
        features, rows = 7 + 3 * random_features(600), torch.arange(300)
        features[:, 1, 2] = 5.0
        found = scaled(features.__getitem__, rows, HeadTraining())(rows)
        part = features[:300].double()
        expected = (part - part.mean(0)) / part.std(0, correction=0) / D**0.5
        expected[:, 1, 2] = 0
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        assert scaled(features.__getitem__, rows, HeadTraining(feature_scale="none"))(rows).equal(features[:300])
        with pytest.raises(ValueError, match="feature_scale must be"):
            HeadTraining(feature_scale="layer_norm")

    def test_iou_counts_cells(self):
        rng = np.random.default_rng(0)
        sides = rng.integers(1, 5, (2, 200, 2)) * 2  # boxes on a grid of unit cells, whose centres are on it too
        centres = rng.integers(4, 9, (2, 200, 2))
        boxes = torch.from_numpy(np.concatenate([centres, sides], axis=-1)).float()
        x, y = np.arange(16) + 0.5, np.arange(16)[:, None] + 0.5
        inside = lambda cx, cy, w, h: (abs(x - cx) < w / 2) & (abs(y - cy) < h / 2)
        cells = [[inside(*box) for box in row.tolist()] for row in boxes]
        expected = [(p & q).sum() / (p | q).sum() for p, q in zip(*cells)]
        np.testing.assert_allclose(box_iou(*corners(boxes)), expected, rtol=1e-12)
        assert box_iou(*corners(torch.tensor([[0.5, 0.5, -0.2, -0.2], [0.5, 0.5, 0.2, 0.2]]))) == 0

    def test_half_of_a_box_is_just_right(self):
        target = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
        half = torch.tensor([[[0.5, 0.5, 0.5, 0.25], [0.5, 0.5, 0.5, 0.2499]]])
        assert is_right(half, target).tolist() == [[True, False]]

    @pytest.mark.parametrize("bad", [{"lr": 0}, {"epochs": 0}, {"batch_size": 0}])
    def test_bad_training(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HeadTraining(**bad)


class TestFeatures:
    @pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
    def test_one_pass_gives_what_a_pass_per_layer_gives(self, name):
        # Oracle: transformers' own hidden states, one sample at a time without padding. Its last entry is normalised.
        case = CASES[name]
        model, passes = case.make(), []
        model.base_model.register_forward_hook(lambda *_: passes.append(1))
        features = layer_features(model, case.batch([1, 1]))
        assert passes == [1]
        norm = model.base_model.language_model.norm
        for b in range(2):
            inputs = case.batch([1], first_image=b)
            cut = int(case.batch([1, 1])["attention_mask"][b].sum())
            inputs = {k: v[:, :cut] if v.shape[:2] == inputs["input_ids"].shape else v for k, v in inputs.items()}
            with torch.no_grad():
                states = model(**inputs, output_hidden_states=True).hidden_states[1:]
            expected = torch.stack([state[0, -1] for state in states])
            mine = torch.cat([features[b, :-1], norm(features[b, -1:])]).detach()
            torch.testing.assert_close(mine, expected.detach(), rtol=1e-4, atol=1e-4)

    def test_right_padding_is_refused(self):
        model, inputs = CASES["llava"].make(), CASES["llava"].batch([1, 0], side="right")
        with pytest.raises(ValueError, match="must pad prompts on the left"):
            layer_features(model, inputs)

    def test_hooks_are_gone_afterwards(self):
        model = CASES["llava"].make()
        with last_token_states(model) as states:
            pass
        model(**CASES["llava"].batch([1]))
        assert states == {}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_store_keeps_bits_and_remembers_what_is_done(self, tmp_path, dtype):
        features = random_features(5).to(dtype)
        store = FeatureStore(tmp_path, (5, L, D), dtype, {"model": "a"})
        store.put([3, 1], features[[3, 1]])
        again = FeatureStore(tmp_path, (5, L, D), dtype, {"model": "a"})
        assert [again.missing([i]) for i in range(5)] == [True, False, True, False, True]
        assert torch.equal(again.get(torch.tensor([1, 3])), features[[1, 3]].float())
        with pytest.raises(ValueError, match="another settings"):
            FeatureStore(tmp_path, (5, L, D), dtype, {"model": "b"})
        with pytest.raises(ValueError, match="another shape"):
            FeatureStore(tmp_path, (6, L, D), dtype, {"model": "a"})


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


def drawn(count: int) -> list[GroundingSample]:
    """Two samples for every picture with two objects."""
    rng, samples = np.random.default_rng(5), []
    for number in range(count):
        scene = draw_scene(rng, size=48, objects=1 + number % 2)
        for thing in scene.objects:
            image, words = Image.fromarray(scene.image), f"Give the box of the {thing.name}."
            samples.append(
                GroundingSample(f"{number}-{thing.name}", image, words, thing.name, thing.box, None, thing.shape)
            )
    return samples


class TestProbe:
    def test_no_picture_is_on_both_sides(self):
        pictures = [str(i * 7 % 20) for i in range(60)]  # three samples of each, apart from one another
        train, validation = split_by_picture(pictures, seed=1)
        assert sorted([*train.tolist(), *validation.tolist()]) == list(range(60))
        assert {pictures[i] for i in train}.isdisjoint({pictures[i] for i in validation})
        assert len(validation) == 12
        with pytest.raises(ValueError, match="needed at least 2"):
            split_by_picture(["a"] * 5, seed=0)

    def test_interrupted_extraction_continues_and_makes_no_pass_twice(self, miniature, tmp_path):
        samples, probe = drawn(10), LayerwiseProbe(*miniature, seeds=(0,), batch_size=4)
        whole, passes = probe.extract(samples, str(tmp_path / "whole"))
        assert passes == -(-len(samples) // 4)
        calls = []

        def stop_after_two(*_):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        hook = miniature[0].base_model.register_forward_pre_hook(stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            probe.extract(samples, tmp_path / "resumed")
        hook.remove()
        resumed, passes = probe.extract(samples, tmp_path / "resumed")
        assert passes == -(-len(samples) // 4) - 2
        rows = torch.arange(len(samples))
        assert torch.equal(whole.get(rows), resumed.get(rows))
        assert probe.extract(samples, tmp_path / "resumed")[1] == 0

    def test_two_ranks_give_the_features_of_one(self, miniature, tmp_path):
        samples, probe = drawn(8), LayerwiseProbe(*miniature, batch_size=3)
        whole, passes = probe.extract(samples, tmp_path / "one")
        first = probe.extract(samples, tmp_path / "two", rank=0, world=2)[1]
        both, second = probe.extract(samples, tmp_path / "two", rank=1, world=2)
        assert first + second == passes
        assert torch.equal(both.get(torch.arange(len(samples))), whole.get(torch.arange(len(samples))))

    @pytest.mark.parametrize("task", ["grounding", "classification"])
    def test_the_miniature_is_probed(self, miniature, tmp_path, task):
        training = HeadTraining(epochs=60, lr=1e-2)
        probe = LayerwiseProbe(*miniature, task=task, training=training, seeds=(0, 1))
        results = probe.run(drawn(120), tmp_path)
        assert list(results.by_layer()) == ["0", "1", "2", "3"]
        assert results.by_seed.shape == (2, 4)
        np.testing.assert_allclose(results.by_seed.mean(0), results.scores)
        assert (results.intervals[:, 0] <= results.scores).all()
        assert (results.scores <= results.intervals[:, 1]).all()
        assert results.sizes["train_pictures"] == 96
        assert results.sizes["validation_pictures"] == 24
        assert len(results.by_sample) == results.sizes["validation_samples"]
        # the miniature answers these questions: its middle layers know the box, and the query names the shape
        assert results.scores[1] > {"grounding": 0.3, "classification": 0.95}[task] > results.baseline
        results.plot(tmp_path / "figure.png")
        pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
        assert pixels.std() > 5  # something is drawn

    def test_sar_changes_the_features_of_its_layers_alone(self, miniature, tmp_path):
        samples = drawn(3)
        config = SARConfig(activation_layer_k=1, beta=0.05)
        off, _ = LayerwiseProbe(*miniature).extract(samples, tmp_path / "off")
        on, _ = LayerwiseProbe(*miniature, config=config).extract(samples, tmp_path / "on")
        a, b = (store.get(torch.arange(len(samples))) for store in (off, on))
        torch.testing.assert_close(a[:, :3], b[:, :3], rtol=1e-4, atol=1e-4)
        assert (a[:, 3] - b[:, 3]).abs().max() > 1e-2

    def test_unusable_samples_are_listed(self, miniature, tmp_path):
        image = drawn(1)[0].image
        bad = [
            GroundingSample("out", image, "red", "red", (90, 0, 99, 9)),
            GroundingSample("flat", image, "red", "red", (9, 9, 9, 20)),
            GroundingSample("share", image, "red", "red", (0.2, 0.1, 0.7, 0.8)),
        ]
        kept, skipped = LayerwiseProbe(*miniature).usable([*drawn(2), *bad])
        assert len(kept) == len(drawn(2))
        assert skipped == {
            "box outside the image": ["out"],
            "box has no area": ["flat"],
            "box in fractions of the picture, needed pixels": ["share"],
        }
        with pytest.raises(ValueError, match=r"no sample can be probed: .*no area \(1\)"):
            LayerwiseProbe(*miniature).run(bad, tmp_path)
        with pytest.raises(ValueError, match="no bbox"):
            LayerwiseProbe(*miniature).usable([GroundingSample("a", image, "red")])
        same = [GroundingSample(s.id, s.picture, s.query, bbox=s.bbox, label="x") for s in drawn(4)]
        with pytest.raises(ValueError, match="at least two labels"):
            LayerwiseProbe(*miniature, task="classification").run(same, tmp_path)
        with pytest.raises(ValueError, match="task must be"):
            LayerwiseProbe(*miniature, task="segmentation")


def test_heads_are_a_batched_linear_layer():
    weight, bias = torch.randn(L, D, 4), torch.randn(L, 4)
    features = random_features(3)
    expected = torch.stack([features[:, i] @ weight[i] + bias[i] for i in range(L)], dim=1)
    torch.testing.assert_close(Heads(weight, bias)(features), expected, rtol=1e-5, atol=1e-5)
