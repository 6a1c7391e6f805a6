"""Rules in folders: what was learned comes back, and what does not fit is an error."""

from __future__ import annotations

import json
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sar_fast.method.weighting.files import PARAMETERS, RULE, files_of, read_parameters, save_weighting
from sar_fast.weighting import Fixed, HeadScales, SoftmaxOverHeads, Split, find_weighting, register_weighting
from tests.training.samples import REPOSITORY

pytestmark = pytest.mark.usefixtures("own_rules")

SLOPES = f"{REPOSITORY}/tests/training/own_rules.py:Slopes"


def drawn(layers=3, heads=4, dtype=torch.float32):
    rule = HeadScales(layers, heads)
    rule.scales.data = torch.randn(layers, heads, generator=torch.Generator().manual_seed(0)).to(dtype)
    return rule


@pytest.fixture
def folder(tmp_path):
    save_weighting(drawn(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_a_rule_comes_back_with_what_it_learned(tmp_path, dtype, split):
    rule = drawn(dtype=dtype)
    save_weighting(Split(rule, heads=object()) if split else rule, tmp_path)
    for spec in (tmp_path, str(tmp_path), f"{tmp_path}/"):
        found = find_weighting(spec, layers=3, heads=4)
        assert type(found) is HeadScales
        assert found.scales.dtype == dtype
        assert found.scales.requires_grad
        assert torch.equal(found.scales, rule.scales)
        assert found.scales is not rule.scales
    assert json.loads((tmp_path / RULE).read_text()) == {"name": "head_scales", "options": {"layers": 3, "heads": 4}}
    (tmp_path / "new").touch()
    assert stat.S_IMODE((tmp_path / PARAMETERS).stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)


def test_parameters_are_read_in_place(folder):
    rule = HeadScales(3, 4)
    scales = rule.scales
    read_parameters(rule, folder)
    assert rule.scales is scales
    assert torch.equal(scales, drawn().scales)


def test_a_rule_without_parameters_is_its_name_and_options(folder):
    """And what another rule left is no longer there."""
    for rule in (SoftmaxOverHeads(beta=0.25), Fixed([1.0, 2.0])):
        save_weighting(rule, folder)
        assert find_weighting(folder) == rule
        assert [p.name for p in folder.iterdir()] == [RULE]


def test_parameters_that_share_memory_are_written(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Parameter(torch.ones(2))

        def forward(self, statistics, layer):
            return self.a

    register_weighting("tied of the tests", Tied)
    save_weighting(Tied(), tmp_path)
    assert find_weighting(tmp_path).b.tolist() == [1, 1]


def test_a_rule_of_a_file_is_found_where_it_was_and_beside(tmp_path):
    source, run = tmp_path / "rules.py", tmp_path / "run"
    shutil.copy(SLOPES.rpartition(":")[0], source)
    run.mkdir()
    save_weighting(find_weighting(f"{source}:Slopes", layers=2, heads=2), run)
    assert files_of(run) == [run / RULE, run / PARAMETERS, source]
    assert type(find_weighting(run)).__name__ == "Slopes"
    source.rename(tmp_path / "elsewhere.py")
    with pytest.raises(ValueError, match=rf"no such Python file '{run}/rules.py'"):
        find_weighting(run)
    shutil.copy(tmp_path / "elsewhere.py", run / "rules.py")
    assert type(find_weighting(run)).__name__ == "Slopes"
    assert files_of(run)[-1] == run / "rules.py"


def test_the_files_that_a_spec_means(folder):
    assert files_of("head_scales") == files_of('{"name": "equal"}') == files_of({"name": "equal"}) == []
    assert [str(f) for f in files_of(SLOPES)] == [SLOPES.rpartition(":")[0]]
    assert files_of(str(folder)) == [folder / RULE, folder / PARAMETERS]


def test_a_registered_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "equal").mkdir()
    (tmp_path / "learned").mkdir()
    save_weighting(drawn(), tmp_path / "learned")
    assert find_weighting("equal").options() == {}
    assert torch.equal(find_weighting("learned").scales, drawn().scales)
    with pytest.raises(ValueError, match=r"^weighting: equal holds no rule; it has no sar_weighting.json"):
        find_weighting("./equal")


def lose_rule(folder):
    (folder / RULE).unlink()


def break_rule(folder):
    (folder / RULE).write_text("{")


def other_rule(folder):
    (folder / RULE).write_text('{"name": "nobody\'s"}')


def no_mapping(folder):
    (folder / RULE).write_text("[1]")


def lose_parameters(folder):
    (folder / PARAMETERS).unlink()


def break_parameters(folder):
    (folder / PARAMETERS).write_bytes(b"{}")


def rename(folder):
    save_file({"scale": torch.ones(3, 4)}, folder / PARAMETERS)


def one_more(folder):
    save_file({**load_file(folder / PARAMETERS), "bias": torch.ones(1)}, folder / PARAMETERS)


def fewer_heads(folder):
    save_file({"scales": torch.ones(3, 2)}, folder / PARAMETERS)


def none_taken(folder):
    (folder / RULE).write_text('{"name": "equal"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_rule, "holds no rule; it has no sar_weighting.json"),
        (break_rule, "sar_weighting.json cannot be read"),
        (other_rule, 'must be one of .*; got "nobody\'s"'),
        (no_mapping, "sar_weighting.json cannot be read; weighting must be .*; got list"),
        (lose_parameters, "HeadScales has parameters, and .* holds none; it has no sar_weighting.safetensors"),
        (break_parameters, "sar_weighting.safetensors cannot be read"),
        (rename, "sar_weighting.safetensors has no scales, which HeadScales needs"),
        (one_more, "sar_weighting.safetensors holds bias, for which HeadScales has no place"),
        (fewer_heads, r"scales of .*safetensors has shape \(3, 2\); HeadScales needs \(3, 4\)"),
        (none_taken, r"Equal has no parameters, and .* holds some \(sar_weighting.safetensors\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_an_error(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=f"^weighting:? .*{message}"):
        find_weighting(folder, layers=3, heads=4)


@pytest.mark.parametrize(
    ("sizes", "what"), [({"heads": 8}, "8 heads; got {}, for 4"), ({"layers": 2}, "2 layers; got {}, for 3")]
)
def test_a_rule_for_another_model_is_an_error(folder, sizes, what):
    with pytest.raises(ValueError, match="must be for the model's " + what.format(f"the rule in {folder}")):
        find_weighting(folder, **sizes)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"must be a name, FILE.py:NAME or a folder on this machine; got '.*/nowhere'"):
        find_weighting(tmp_path / "nowhere")


def test_a_rule_without_a_name_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"must be registered, .*; got .*<lambda>"):
        save_weighting(lambda statistics, layer: statistics.av, tmp_path)
    assert not any(tmp_path.iterdir())
