"""``sar-fast merge``: a plain model with the adapter's answers, whole or not there."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from sar_fast.lab.io.merging import merge_into
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.io.models import find_model, load_model
from sar_fast.method.weighting.files import save_weighting
from sar_fast.weighting import HeadScales, find_weighting
from tests.adapters import TARGETS, base_model, logits, lora, usual_mode, write_adapter
from tests.test_cli import fails, run

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter")


CONFIGS = {
    "lora": lambda: lora(),
    "dora": lambda: lora(use_dora=True),
    "modules_to_save": lambda: lora(
        modules_to_save=["multi_modal_projector"], target_modules=["embed_tokens", "q_proj"]
    ),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=2),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.everyday(config=["lora", "modules_to_save"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_merged_model_answers_as_the_adapter_does(tmp_path, config):
    folder = write_adapter(tmp_path / "adapter", CONFIGS[config]())
    merge_into(find_model(str(folder)), tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    expected = logits(load_model(find_model(str(folder)), "cpu", "float32")[0])
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(base_model()), atol=1e-3)
    assert type(merged) is type(base_model())


def test_a_merged_folder_is_like_its_bases(adapter, tmp_path):
    out = tmp_path / "new" / "merged"
    assert run("merge", str(adapter), "--output_dir", str(out)).strip() == str(out)
    shipped = {file.name for file in MINIATURE_PATH.iterdir()} - {"training.json"}
    assert {file.name for file in out.iterdir()} == shipped
    assert [p.name for p in out.parent.iterdir()] == ["merged"]
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {usual_mode(tmp_path)}
    assert out.stat().st_mode == out.parent.stat().st_mode
    written, base = (json.loads((place / "config.json").read_text()) for place in (out, MINIATURE_PATH))
    assert written["text_config"]["use_cache"] is True
    assert "use_cache" not in written
    assert written["dtype"] == base["dtype"]
    generation = [json.loads((place / "generation_config.json").read_text()) for place in (out, MINIATURE_PATH)]
    assert generation[0]["max_new_tokens"] == generation[1]["max_new_tokens"] == 8
    assert set(load_file(out / "model.safetensors")) == set(load_file(MINIATURE_PATH / "model.safetensors"))
    assert AutoProcessor.from_pretrained(out).chat_template == (adapter / "chat_template.jinja").read_text()


def test_head_weights_that_were_learned_with_the_adapter_come_along(tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    rule = HeadScales(4, 4)
    rule.scales.data.uniform_(0.5, 2)
    save_weighting(rule, folder)
    merge_into(find_model(str(folder)), tmp_path / "merged")
    assert torch.equal(find_weighting(str(tmp_path / "merged")).scales, rule.scales)


def test_a_dtype_can_be_given(adapter, tmp_path):
    merge_into(find_model(str(adapter)), tmp_path / "merged", "bfloat16")
    assert {w.dtype for w in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    line = fails("merge", str(adapter), "--output_dir", str(tmp_path / "other"), "--dtype", "half")
    assert line == "error: --dtype must be auto, float32, bfloat16, float16; got 'half'"


def test_nothing_is_replaced_before_the_new_model_is_whole(adapter, tmp_path, monkeypatch):
    out = tmp_path / "merged"
    out.mkdir()
    merge_into(find_model(str(adapter)), out)  # an empty folder is taken
    before = (out / "model.safetensors").read_bytes()
    line = fails("merge", str(adapter), "--output_dir", str(out))
    needed = "be an empty or a new folder, or come with --overwrite_output_dir"
    assert line == f"error: --output_dir must {needed}; got {str(out)!r}, which is not empty"
    other = write_adapter(tmp_path / "other", lora(r=2))

    def fail(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.processing_utils.ProcessorMixin.save_pretrained", fail)
        line = fails("merge", str(other), "--output_dir", str(out), "--overwrite_output_dir")
    assert line == f"error: --output_dir must be a folder to write into; got {str(out)!r}: No space left on device"
    assert (out / "model.safetensors").read_bytes() == before
    run("merge", str(other), "--output_dir", str(out), "--overwrite_output_dir")
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "other"]


def test_folders_that_must_not_be_replaced(adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "runs" / "adapter")
    for output, message in (
        (own, "which holds the adapter"),
        (tmp_path / "runs", "which holds the adapter"),
        (MINIATURE_PATH, "which holds its base"),
        (tmp_path, "which holds the adapter"),
        (own / CONFIG_FILE, "--output_dir must be a folder; got "),
    ):
        assert message in fails("merge", str(own), "--output_dir", str(output), "--overwrite_output_dir")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    line = fails("merge", str(own), "--output_dir", str(tmp_path / "letters"), "--overwrite_output_dir")
    assert (
        "--output_dir must be an empty or a new folder, or one of a model that --overwrite_output_dir may replace"
        in line
    )
    assert (tmp_path / "letters" / "dear.txt").is_file()
    line = fails("merge", str(own), "--output_dir", str(own / CONFIG_FILE / "below"))
    assert "--output_dir must be a folder" in line


CONFIG_FILE = "adapter_config.json"


def test_what_cannot_be_merged(adapter, tmp_path):
    out = ("--output_dir", str(tmp_path / "merged"))
    assert "ADAPTER 'miniature' is no adapter: there is nothing to merge" in fails("merge", "miniature", *out)
    assert "ADAPTER '/gone' is no folder on this machine" in fails("merge", "/gone", *out)
    assert "--base_model '/gone' is no folder" in fails("merge", str(adapter), *out, "--base_model", "/gone")
    base = shutil.copytree(MINIATURE_PATH, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    line = fails("merge", str(adapter), *out, "--base_model", str(base))
    assert "has a quantized base (bitsandbytes), whose weights cannot hold the sum" in line
    (base / "config.json").write_text(json.dumps(config))
    weights = load_file(base / "model.safetensors")
    weights[next(name for name in weights if "q_proj" in name and "vision" not in name)][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    line = fails("merge", str(adapter), *out, "--base_model", str(base))
    assert "cannot be merged (LORA): NaNs detected" in line
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_is_named_and_leaves_nothing(adapter, tmp_path):
    """The kernel lets no file grow to the weights' size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        line = fails("merge", str(adapter), "--output_dir", str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "--output_dir" in line
    assert "--output_dir must be a folder to write into; got " in line
    assert list(tmp_path.iterdir()) == []
