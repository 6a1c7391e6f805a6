"""Grounding on tiny random models: original checkpoints convert to the model they were made of; masks are cached."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    GroundingDinoProcessor,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    SamProcessor,
)
from typer.testing import CliRunner

from sar_fast.cli import app
from sar_fast.cli.evaluate.arguments import parse
from sar_fast.cli.evaluate.focus import run
from sar_fast.lab.focus import (
    FocusMetricsEvaluator,
    GroundingSample,
    SampleSkipped,
    summarise,
)
from sar_fast.lab.focus.grounding import GroundedMasks, caption
from sar_fast.lab.io.original_checkpoints import grounding_dino
from sar_fast.lab.io.original_checkpoints.convert import convert_into
from sar_fast.lab.io.original_checkpoints.grounding_dino import load_detector, read_config
from sar_fast.lab.io.original_checkpoints.sam import load_segmenter
from tests.evaluation.original_models import (  # noqa: F401 -- fixtures
    DINO,
    SAM,
    bert,
    detector,
    miniature,
    original,
    original_dino,
    original_sam,
    picture,
    segmenter,
    tiny_swin,
    write_config,
)


class TestDetectorCheckpoint:
    def test_names_of_the_original_are_what_its_modules_are_called(self, detector):
        names = set(original_dino(detector))
        for name in (  # read off GroundingDINO's modules
            "backbone.0.layers.0.blocks.0.attn.qkv.weight",
            "backbone.0.layers.1.downsample.reduction.weight",
            "transformer.level_embed",
            "transformer.encoder.layers.1.self_attn.sampling_offsets.weight",
            "transformer.encoder.text_layers.0.self_attn.in_proj_weight",
            "transformer.encoder.text_layers.0.linear1.weight",
            "transformer.encoder.fusion_layers.1.gamma_l",
            "transformer.encoder.fusion_layers.0.attn.values_l_proj.weight",
            "transformer.decoder.layers.1.ca_text.in_proj_bias",
            "transformer.decoder.layers.0.cross_attn.value_proj.weight",
            "transformer.decoder.layers.0.catext_norm.weight",
            "transformer.decoder.layers.0.norm3.weight",
            "transformer.decoder.layers.0.linear2.bias",
            "transformer.decoder.bbox_embed.1.layers.2.weight",
            "transformer.enc_output_norm.bias",
            "transformer.enc_out_bbox_embed.layers.0.weight",
            "bbox_embed.0.layers.0.weight",
            "input_proj.3.1.weight",
            "bert.encoder.layer.1.attention.self.key.weight",
        ):
            assert name in names

    def test_the_converted_model_is_the_model(self, detector, original, bert):
        model, processor = load_detector(*original, text_encoder=str(bert))
        assert isinstance(processor, GroundingDinoProcessor)
        expected = detector.state_dict()
        for name, value in model.state_dict().items():
            if ".swin.layernorm." not in name:  # not in such checkpoints, and not used
                assert torch.equal(value, expected[name]), name
        inputs = processor(images=picture(), text="red circle.", return_tensors="pt")
        # Upstream: shorter side 800, unless the longer one then exceeds 1333: round(1333 * 70 / 120)
        assert tuple(inputs["pixel_values"].shape[-2:]) == (778, 1333)
        inputs["pixel_values"] = inputs["pixel_values"][..., :96, :128]
        inputs["pixel_mask"] = inputs["pixel_mask"][..., :96, :128]
        with torch.no_grad():
            a, b = model(**inputs), detector(**inputs)
        assert torch.equal(a.pred_boxes, b.pred_boxes)
        assert torch.equal(a.logits, b.logits)

    def test_preprocessing_is_upstreams(self, original, bert):
        # Upstream: Pillow's bilinear resize, shorter side 800 and longer at most 1333, then ImageNet's mean and
        # deviation of values in 0..1, channels first.
        _, processor = load_detector(*original, text_encoder=str(bert))
        pixels = processor(images=picture(), text="red.", return_tensors="pt")["pixel_values"][0]
        resized = np.asarray(picture().resize((1333, 778), Image.Resampling.BILINEAR), dtype=np.float64) / 255
        expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        torch.testing.assert_close(pixels.double(), torch.tensor(expected).permute(2, 0, 1), rtol=0, atol=1e-5)

    def test_bad_files_say_what_is_wrong(self, original, bert, tmp_path):
        checkpoint, config = original
        state = torch.load(checkpoint, weights_only=True)["model"]
        missing = {k: v for k, v in state.items() if "level_embed" not in k}
        torch.save({"model": missing}, tmp_path / "missing.pth")
        with pytest.raises(ValueError, match=r"1 tensors missing \(first \['model.level_embed'\]\)"):
            load_detector(tmp_path / "missing.pth", config, str(bert))
        torch.save({"model": state | {"extra.weight": torch.zeros(1)}}, tmp_path / "extra.pth")
        with pytest.raises(ValueError, match=r"1 left over \(first \['extra.weight'\]\)"):
            load_detector(tmp_path / "extra.pth", config, str(bert))
        with pytest.raises(ValueError, match="other shapes"):
            load_detector(checkpoint, write_config(tmp_path, num_queries=30), str(bert))
        with pytest.raises(ValueError, match="backbone 'resnet50' is none of"):
            load_detector(checkpoint, write_config(tmp_path, backbone="resnet50"), str(bert))
        (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match="is not a checkpoint"):
            load_detector(tmp_path / "garbage.pth", config, str(bert))
        (tmp_path / "empty.py").write_text("batch_size = 1\n")
        with pytest.raises(ValueError, match="sets no backbone"):
            read_config(tmp_path / "empty.py")


class TestSegmenterCheckpoint:
    def test_the_converted_model_is_the_model(self, segmenter, tmp_path):
        state = original_sam(segmenter)
        for name in (  # read off segment-anything's modules
            "image_encoder.blocks.0.norm1.weight",
            "image_encoder.blocks.2.attn.qkv.bias",
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
            "prompt_encoder.point_embeddings.3.weight",
            "mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight",
            "mask_decoder.transformer.layers.0.norm4.weight",
            "mask_decoder.transformer.norm_final_attn.weight",
            "mask_decoder.output_hypernetworks_mlps.2.layers.1.weight",
            "mask_decoder.iou_prediction_head.layers.2.bias",
            "mask_decoder.output_upscaling.3.weight",
        ):
            assert name in state
        torch.save(state, tmp_path / "sam.pth")
        model, processor = load_segmenter(tmp_path / "sam.pth")
        for name, value in segmenter.state_dict().items():
            if not name.startswith("shared_image_embedding"):
                assert torch.equal(model.state_dict()[name], value), name
        assert model.config.vision_config.global_attn_indexes == [1]
        inputs = processor(images=picture(), input_boxes=[[[10.0, 20.0, 60.0, 50.0]]], return_tensors="pt")
        assert inputs["pixel_values"].shape[-2:] == (128, 128)
        assert inputs["reshaped_input_sizes"].tolist() == [[75, 128]]  # longer side 120 -> 128, then padding
        # Upstream: Pillow's bilinear resize, ImageNet's mean and deviation in grey levels, then zeros below and right
        resized = np.asarray(picture().resize((128, 75), Image.Resampling.BILINEAR), dtype=np.float64)
        expected = np.zeros((128, 128, 3))
        expected[:75] = (resized - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
        found = inputs["pixel_values"][0].double().permute(1, 2, 0)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
        with torch.no_grad():
            found = model(**inputs, multimask_output=False).pred_masks
        assert found.shape[:3] == (1, 1, 1)

    def test_another_type_or_file_is_an_error(self, segmenter, tmp_path):
        state = original_sam(segmenter)
        state["image_encoder.pos_embed"] = torch.zeros(1, 8, 8, 1024)
        torch.save(state, tmp_path / "large.pth")
        with pytest.raises(ValueError, match=r"model_type must be 'vit_l', which .* is; got 'vit_h'"):
            load_segmenter(tmp_path / "large.pth", "vit_h")
        torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="no SAM checkpoint"):
            load_segmenter(tmp_path / "other.pth")


@pytest.fixture
def small_pictures(monkeypatch):
    """The detector sees pictures of a tenth of the size, for the tests' speed."""
    load = grounding_dino.load_detector

    def load_for_small(*args):
        model, processor = load(*args)
        processor.image_processor.size = type(processor.image_processor.size)(shortest_edge=96, longest_edge=160)
        return model, processor

    monkeypatch.setattr(grounding_dino, "load_detector", load_for_small)


@pytest.mark.usefixtures("small_pictures")
class TestGroundedMasks:
    @pytest.fixture
    def masks(self, original, bert, segmenter, tmp_path):
        torch.save(original_sam(segmenter), tmp_path / "sam.pth")
        return lambda **more: GroundedMasks(
            str(original[0]),
            str(tmp_path / "sam.pth"),
            detector_config=str(original[1]),
            text_encoder=str(bert),
            **{"box_threshold": 0.0, "cache": tmp_path / "masks", **more},
        )

    def test_a_phrase_becomes_a_mask_of_the_pictures_shape_and_is_kept(self, masks, monkeypatch):
        sample = GroundingSample("0", picture(), "where is it?", "Red circle")
        first = masks()
        monkeypatch.setattr(GroundedMasks, "best_box", lambda self, image, phrase: [10.0, 20.0, 60.0, 50.0])
        found = first.mask(sample)
        assert found.shape == (70, 120)
        assert found.dtype == bool
        monkeypatch.setattr(GroundedMasks, "models", lambda self: pytest.fail("the cached mask was not used"))
        assert np.array_equal(masks().mask(sample), found)
        assert np.array_equal(masks().mask(GroundingSample("1", picture(), "other words", "red circle.")), found)
        for other in (
            GroundingSample("2", picture(), "where is it?", "blue square"),
            GroundingSample("3", picture(121), "where is it?", "red circle"),
        ):
            with pytest.raises(pytest.fail.Exception):
                masks().mask(other)

    def test_another_checkpoint_of_the_same_name_and_size_has_masks_of_its_own(self, masks, tmp_path, monkeypatch):
        sample = GroundingSample("0", picture(), "where is it?", "Red circle")
        monkeypatch.setattr(GroundedMasks, "best_box", lambda self, image, phrase: [10.0, 20.0, 60.0, 50.0])
        first = masks()
        first.mask(sample)
        weights = torch.load(tmp_path / "sam.pth")
        (tmp_path / "other").mkdir()
        torch.save({name: value * 2 for name, value in weights.items()}, tmp_path / "other" / "sam.pth")
        assert (tmp_path / "other" / "sam.pth").stat().st_size == (tmp_path / "sam.pth").stat().st_size
        other = masks()
        other.segmenter = str(tmp_path / "other" / "sam.pth")
        assert other.describe() != first.describe()
        other.mask(sample)
        assert len(list((tmp_path / "masks").iterdir())) == 2

    def test_the_best_box_is_in_pixels_of_the_picture(self, masks):
        # The detector's own outputs, scaled by hand: boxes are centre x, centre y, width, height in 0..1
        grounded = masks()
        detector, processor, _, _ = grounded.models()
        inputs = processor(images=picture(), text="red circle.", return_tensors="pt")
        with torch.no_grad():
            outputs = detector(**inputs)
        best = outputs.logits.sigmoid().amax(-1)[0].argmax()
        x, y, w, h = outputs.pred_boxes[0, best].tolist()
        expected = [(x - w / 2) * 120, (y - h / 2) * 70, (x + w / 2) * 120, (y + h / 2) * 70]
        assert grounded.best_box(picture(), "red circle") == pytest.approx(expected, abs=1e-3)

    def test_nothing_grounded_is_a_skip_that_is_kept_too(self, masks, monkeypatch):
        sample = GroundingSample("0", picture(), "where is it?", "red circle")
        unsure = masks(box_threshold=0.99)
        decoder = unsure.models()[0].model.decoder.layer_norm  # scores are products of its output with the words
        torch.nn.init.zeros_(decoder.weight)
        torch.nn.init.zeros_(decoder.bias)
        with pytest.raises(SampleSkipped, match=r"nothing grounded: 'red circle' at 0\.99"):
            unsure.mask(sample)
        monkeypatch.setattr(GroundedMasks, "models", lambda self: pytest.fail("the answer was not kept"))
        with pytest.raises(SampleSkipped, match="nothing grounded"):
            masks(box_threshold=0.99).mask(sample)

    def test_a_phrase_is_cut_to_what_the_detector_reads(self, masks, miniature, monkeypatch):
        """32 tokens: the mark of the beginning and 31 words. tests/acceptance compares it with the original."""
        words = ["red", "circle"] * 20
        phrase = lambda changed=None: " ".join("blue" if i == changed else word for i, word in enumerate(words))
        grounded = masks()
        box = grounded.best_box(picture(), phrase())
        assert grounded.best_box(picture(), phrase(31)) == box  # the first word that it does not read
        assert grounded.best_box(picture(), phrase(30)) != box
        short, long = (
            GroundingSample(i, picture(), "where is it?", p) for i, p in (("short", "red"), ("long", phrase()))
        )
        note = "phrase cut to the 32 tokens that the detector reads"
        monkeypatch.setattr(GroundedMasks, "segment", lambda self, image, box: np.ones((70, 120), bool))
        first = FocusMetricsEvaluator(*miniature, masks=grounded).score([short, long])
        monkeypatch.setattr(GroundedMasks, "models", lambda self: pytest.fail("the cached mask was not used"))
        again = FocusMetricsEvaluator(*miniature, masks=masks()).score([short, long])
        for records in (first, again):
            assert "note" not in records[0]
            assert summarise(records)["notes"] == {note: ["long"]}

    def test_a_cut_phrase_that_finds_nothing_says_so(self, masks, monkeypatch):
        sample = GroundingSample("0", picture(), "where is it?", "red circle " * 20)
        message = r"nothing grounded: .* at 0\.99, phrase cut to the 32 tokens that the detector reads"
        unsure = masks(box_threshold=0.99)
        decoder = unsure.models()[0].model.decoder.layer_norm
        torch.nn.init.zeros_(decoder.weight)
        torch.nn.init.zeros_(decoder.bias)
        with pytest.raises(SampleSkipped, match=message):
            unsure.mask(sample)
        monkeypatch.setattr(GroundedMasks, "models", lambda self: pytest.fail("the answer was not kept"))
        with pytest.raises(SampleSkipped, match=message):
            masks(box_threshold=0.99).mask(sample)

    @pytest.mark.parametrize("kind", ["sam", "sam2"])
    def test_folders_of_transformers_models(self, kind, detector, segmenter, original, bert, tmp_path):
        _, processor = load_detector(*original, text_encoder=str(bert))
        detector.save_pretrained(tmp_path / "dino")
        processor.save_pretrained(tmp_path / "dino")
        if kind == "sam":
            torch.save(original_sam(segmenter), tmp_path / "sam.pth")
            model, processor = load_segmenter(tmp_path / "sam.pth")
        else:
            pytest.importorskip("torchvision", reason="transformers' SAM 2 processor needs torchvision")
            backbone = {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 16,
                "embed_dim_per_stage": [16, 32, 64, 128],
                "blocks_per_stage": [1, 1, 1, 1],
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "global_attention_blocks": [2],
            }
            vision = {"backbone_config": backbone, "backbone_channel_list": [128, 64, 32, 16]}
            model, processor = Sam2Model(Sam2Config(vision_config=vision)), Sam2Processor(Sam2ImageProcessor())
        model.save_pretrained(tmp_path / kind)
        processor.save_pretrained(tmp_path / kind)
        grounded = GroundedMasks(str(tmp_path / "dino"), str(tmp_path / kind), box_threshold=0.0)
        assert grounded.segment(picture(), [10.0, 20.0, 60.0, 50.0]).shape == (70, 120)
        with pytest.raises(ValueError, match="needed sam or sam2"):
            GroundedMasks(str(tmp_path / "dino"), str(tmp_path / "dino")).models()

    def test_bad_arguments(self, original, tmp_path):
        with pytest.raises(ValueError, match="detector_config must be the config file of"):
            GroundedMasks(str(original[0]), "facebook/sam-vit-base")
        with pytest.raises(ValueError, match="segmenter must be a file that exists"):
            GroundedMasks("IDEA-Research/grounding-dino-tiny", str(tmp_path / "none.pth"))
        with pytest.raises(ValueError, match="box_threshold"):
            GroundedMasks("a", "b", box_threshold=2.0)

    def test_the_research_codes_flags_run(self, original, bert, segmenter, tmp_path, monkeypatch):
        torch.save(original_sam(segmenter), tmp_path / "sam.pth")
        config = write_config(tmp_path, text_encoder_type=str(bert))
        flags = (
            "--model_name_or_path miniature --device cpu --do_sfs_fi_eval --dataset shapes_grounding --max_samples 3 "
        )
        flags += f"--gd_config_path {config} --gd_checkpoint_path {original[0]} --gd_box_threshold 0.0 "
        flags += f"--sam_checkpoint_path {tmp_path}/sam.pth --output_dir {tmp_path}/out --per_device_eval_batch_size 4"
        segment = np.zeros((64, 64), bool)
        segment[10:20, 30:50] = True
        monkeypatch.setattr(GroundedMasks, "segment", lambda *_: segment)  # a random SAM may well find nothing
        found = run(parse(flags.split()))
        assert found["num_samples_evaluated"] == 3
        assert found["uniform_focus_score"] == pytest.approx(200 / 64**2)
        assert found["metadata"]["settings"]["masks"]["source"] == "grounding"
        assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 3
        monkeypatch.setattr(GroundedMasks, "models", lambda self: pytest.fail("masks were not kept"))
        again = run(parse([*flags.split(), "--overwrite_output_dir", "true"]))
        assert again["semantic_focus_score"] == found["semantic_focus_score"]

    def test_phrases_are_captions(self):
        assert caption(" The Red circle. ") == "the red circle."
        assert caption("cat") == "cat."


class TestConvert:
    """``sar-fast convert``: a folder instead of the file, and the same masks."""

    @pytest.fixture
    def files(self, original, bert, segmenter, tmp_path):
        """A detector's options and a segmenter's, as the command takes them."""
        torch.save(original_sam(segmenter), tmp_path / "sam.pth")
        dino = [str(original[0]), "--config", str(original[1]), "--text_encoder", str(bert)]
        return dino, [str(tmp_path / "sam.pth")]

    def test_masks_from_folders_are_those_from_the_files(self, files, original, bert, tmp_path):
        for words, name in zip(files, ("dino", "sam")):
            result = CliRunner().invoke(app, ["convert", *words, "--output_dir", str(tmp_path / name)])
            assert (result.exit_code, result.stdout.split()[-1]) == (0, str(tmp_path / name))
        of_files = GroundedMasks(
            str(original[0]), files[1][0], detector_config=str(original[1]), text_encoder=str(bert), box_threshold=0.0
        )
        of_folders = GroundedMasks(str(tmp_path / "dino"), str(tmp_path / "sam"), box_threshold=0.0)
        for masks in (of_files, of_folders):  # a tenth of the size, for the test's speed
            size = masks.models()[1].image_processor.size
            masks.models()[1].image_processor.size = type(size)(shortest_edge=96, longest_edge=160)
        box = of_files.best_box(picture(), "red circle")
        assert of_folders.best_box(picture(), "red circle") == box
        found = of_files.segment(picture(), [10.0, 20.0, 60.0, 50.0])
        assert np.array_equal(of_folders.segment(picture(), [10.0, 20.0, 60.0, 50.0]), found)
        for old, new in zip(of_files.models()[::2], of_folders.models()[::2]):
            state = new.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in old.state_dict().items())

    def test_what_is_refused_leaves_nothing(self, files, tmp_path):
        dino, sam = files
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "mine.txt").write_text("mine")
        torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
        out, before = ["--output_dir", str(tmp_path / "out")], sorted(tmp_path.rglob("*"))
        for words, message in (
            ([*sam, "--output_dir", str(tmp_path / "taken")], "--output_dir must be a folder that is not there yet"),
            (["nowhere.pth", *out], "SOURCE must be a file that exists; got nowhere.pth"),
            ([dino[0], *out], "--config must be Grounding DINO's config file"),
            ([*dino[:2], str(tmp_path / "none.py"), *out], "--config must be a file that exists"),
            ([*dino[:3], "--text_encoder", str(tmp_path), *out], "--text_encoder must be BERT's folder or hub id"),
            ([*dino, "--model_type", "vit_b", *out], "--model_type must be left out"),
            ([*sam, "--config", dino[2], *out], "--config must be left out"),
            ([*sam, "--model_type", "vit_x", *out], "--model_type must be one of 'vit_b', 'vit_l', 'vit_h'"),
            ([str(tmp_path / "other.pth"), *dino[1:], *out], "other.pth is another model"),
        ):
            result = CliRunner().invoke(app, ["convert", *words])
            assert result.exit_code == 2, result.output
            assert message in result.output
        assert sorted(tmp_path.rglob("*")) == before

    def test_an_interrupted_write_leaves_nothing(self, files, tmp_path, monkeypatch):
        full = lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        monkeypatch.setattr(SamProcessor, "save_pretrained", full)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=r"output_dir must be a folder that can be written; .*No space left"):
            convert_into(files[1][0], tmp_path / "sam")
        assert sorted(tmp_path.rglob("*")) == before
