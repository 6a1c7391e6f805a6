"""The study of what fine-tuning does to sight: rules beside SAR, answers under settings, paired tests, tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

from sar_fast import ArgumentError, SARConfig
from sar_fast.lab.measure import paired
from sar_fast.lab.measure.paired import holm, interval_of_share, paired_difference
from sar_fast.lab.miniature.checkpoint import answer
from sar_fast.lab.miniature.places.questions import KINDS
from sar_fast.lab.miniature.places.sets import SETS, draw_set
from sar_fast.lab.paper.study import run as study_run
from sar_fast.lab.paper.study.answers import answers, target_patches
from sar_fast.lab.paper.study.report import TABLES, write_page
from sar_fast.lab.paper.study.rules import ObjectHeads, RandomHeads, ShuffledHeads
from sar_fast.lab.paper.study.run import answer_file, questions, run, settings_of
from sar_fast.lab.paper.study.settings import GROUPS, PAPER, Study, decodes, grid, name_of, rules
from sar_fast.method.values import Statistics, StatisticsWithRows
from sar_fast.weighting import Equal, SoftmaxOverHeads
from tests.lab.test_places_training import scripts, small  # noqa: F401 - fixtures

STATISTICS = Statistics(torch.rand(3, 8) * 4, torch.rand(3, 8), torch.ones(3))
RULE = SoftmaxOverHeads(beta=0.3)


def test_shuffled_heads_have_the_rule_s_weights_in_one_order_per_layer():
    c, shuffled = RULE(STATISTICS, 2), ShuffledHeads(RULE, seed=1)(STATISTICS, 2)
    assert torch.equal(c.sort(-1).values, shuffled.sort(-1).values)
    assert not torch.equal(c, shuffled)
    order = [int((row == value).nonzero()[0, 0]) for row, value in zip(c[:1].repeat(8, 1), shuffled[0])]
    assert len(set(c[0].tolist())) < 8 or torch.equal(c[1, order], shuffled[1])
    assert not torch.equal(shuffled, ShuffledHeads(RULE, seed=2)(STATISTICS, 2))
    assert not torch.equal(shuffled, ShuffledHeads(RULE, seed=1)(STATISTICS, 3))


def test_random_heads_have_the_rule_s_spread_and_nothing_else_of_it():
    c, random = RULE(STATISTICS, 2), RandomHeads(RULE, seed=1)(STATISTICS, 2)
    torch.testing.assert_close(random.sum(-1), torch.full((3,), 8.0))
    noise = torch.randn(8, generator=torch.Generator().manual_seed(1002))
    spread = c.log().std(-1, correction=0)
    torch.testing.assert_close(random.log().std(-1, correction=0), spread * noise.std(correction=0))
    equal = Statistics(torch.ones(1, 8), torch.ones(1, 8), torch.ones(1))
    torch.testing.assert_close(RandomHeads(RULE)(equal, 0), torch.ones(1, 8))


def test_the_oracle_is_the_paper_s_rule_with_attention_on_the_object_as_its_alignment():
    on_object = torch.rand(3, 8)
    given = StatisticsWithRows(STATISTICS.av, STATISTICS.sa, STATISTICS.count, {"object": on_object})
    expected = RULE(Statistics(STATISTICS.av, on_object, STATISTICS.count), 0)
    assert torch.equal(ObjectHeads(RULE)(given, 0), expected)


def test_target_patches_are_those_that_the_objects_cover():
    for pair in draw_set(np.random.default_rng(0), "balanced", 8):
        (drawn, question), patches = pair, target_patches(pair).reshape(12, 12)
        assert patches.any() == bool(question.targets)
        for index in question.targets:
            x1, y1, x2, y2 = drawn.scene.objects[index].box
            assert patches[y1 // 8 : -(-y2 // 8), x1 // 8 : -(-x2 // 8)].any()
        inside = np.zeros((96, 96), bool)
        for index in question.targets:
            inside |= drawn.scene.objects[index].mask
        assert inside[np.kron(patches, np.ones((8, 8), bool))].sum() >= 0.5 * inside.sum()


def test_answers_are_those_of_the_model_and_settings_change_them_alone(small):  # noqa: F811
    model, processor = small
    pairs = draw_set(np.random.default_rng(0), "balanced", 8)[:9]
    plain = answers(model, processor, pairs, batch_size=4)
    replies = answer(model, processor, [d.scene.image for d, _ in pairs], [q.text for _, q in pairs], batch_size=4)
    assert plain.replies == replies
    assert plain.right.tolist() == [r.split() == q.answer.split() for r, (_, q) in zip(replies, pairs)]
    equal = answers(model, processor, pairs, SARConfig(activation_layer_k=2, weighting=Equal()), statistics=True)
    assert equal.replies == plain.replies
    assert equal.head_weights.shape == equal.visual_mass.shape == equal.object_mass.shape == (2, 8)
    assert (equal.head_weights == 1).all()
    assert (equal.object_mass > 0).all()
    assert (equal.object_mass < equal.visual_mass).all()
    assert (equal.visual_mass < 1).all()
    with pytest.raises(ArgumentError, match="config must be given with statistics"):
        answers(model, processor, pairs, statistics=True)
    grey = answers(model, processor, pairs, pictures=lambda n: np.full((96, 96, 3), 128, np.uint8))
    again = [np.full((96, 96, 3), 128, np.uint8)] * 9
    assert grey.replies == answer(model, processor, again, [q.text for _, q in pairs])


def test_the_oracle_is_given_each_question_s_own_object(small):  # noqa: F811
    """Its statistic equals the recorded mass on the object, whatever else is in the batch."""
    model, processor = small
    pairs = [p for p in draw_set(np.random.default_rng(0), "balanced", 8) if p[1].targets][:6]
    alone = []
    for pair in pairs:
        rule = ObjectHeads(RULE)
        config = SARConfig(activation_layer_k=2, weighting=rule)
        alone.append(answers(model, processor, [pair], config, objects=rule.objects, statistics=True))
    rule = ObjectHeads(RULE)
    config = SARConfig(activation_layer_k=2, weighting=rule)
    together = answers(model, processor, pairs, config, objects=rule.objects, statistics=True)
    for name in ("object_mass", "head_weights"):
        mean = np.mean([getattr(a, name) for a in alone], axis=0)
        np.testing.assert_allclose(getattr(together, name), mean, rtol=1e-4)


def test_paired_differences_are_exact_on_pairs():
    before = np.zeros(40, bool)
    after = np.zeros(40, bool)
    after[:9] = True
    found = paired_difference(before, after)
    assert found.mean == 9 / 40
    assert 0 < found.low < 9 / 40 < found.high
    exact = stats.binomtest(9, 9).pvalue  # McNemar's exact test: signs of nine discordant pairs
    assert abs(found.p - exact) < 0.003
    assert paired_difference(after, after).p == 1.0
    runs = paired_difference(np.stack([before, before]), np.stack([after, before]))
    assert runs.mean == 9 / 80
    with pytest.raises(ArgumentError, match="after must have the questions of before"):
        paired_difference(before, after[:3])


def test_an_interval_covers_its_share_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [low <= 0.7 <= high for _, low, high in (interval_of_share(rng.random(200) < 0.7) for _ in range(60))]
    assert 0.85 <= np.mean(covered) <= 1.0
    assert interval_of_share(np.ones(5)) == (1.0, 1.0, 1.0)


def test_holm_corrects_for_the_number_of_tests():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_settings_have_names_of_their_own_and_rules_keep_all_but_the_weights():
    settings = grid()
    assert len(settings) == 64
    assert all(name_of(config) == name for name, config in settings.items())
    chosen = settings["k4_beta1_standardize_projected"]
    assert [c.decode for c in decodes(chosen).values()] == ["running", "step", "prompt"]
    for config in rules(chosen).values():
        assert config.activation_layer_k == 4
        assert config.prior_source == "projected"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of two seeds whose answers are drawn at random: SFT is right less often where SAR is off."""
    for seed in ("seed_0", "seed_1"):
        for group in GROUPS:
            (tmp_path / "models" / seed / group).mkdir(parents=True)
            (tmp_path / "models" / seed / group / "config.json").write_text("{}")
    monkeypatch.setattr(paired, "RESAMPLES", 499)
    study = Study(tmp_path / "models", tmp_path / "out", validation=8, test=16, pictures=8, sides=(96, 144))
    rng = np.random.default_rng(0)
    chosen = grid()["k4_beta1_standardize_projected"]

    def write(seed, group, part, name, side, setting, share):
        count = len(questions(part, name, side, getattr(study, part)))
        path = answer_file(study, seed, group, part, name, side, setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        right = "".join(rng.choice(["1", "0"], count, p=[share, 1 - share]))
        path.write_text(json.dumps({"right": right, "visual_mass": [[0.5]], "object_mass": [[0.1]]}))

    for seed in study.seeds:
        for group in GROUPS:
            for side in study.sides:
                for name in SETS:
                    write(seed, group, "test", name, side, "plain", 0.5)
            for setting in ("grey", "swapped", "masses"):
                write(seed, group, "test", "balanced", 96, setting, 0.3)
        for setting in dict.fromkeys(["plain", *grid(), *decodes(chosen)]):
            write(seed, "sft", "validation", "balanced", 96, setting, 0.9 if setting == name_of(chosen) else 0.5)
        for side in study.sides:
            for name in SETS:
                for setting in settings_of(chosen, side):
                    write(seed, "sft", "test", name, side, setting, 0.9 if setting == name_of(chosen) else 0.5)
    return study, chosen


def test_the_setting_is_chosen_on_validation_and_tables_say_what_was_answered(study, tmp_path):
    study, chosen = study
    assert study_run.choose(study) == chosen
    focus = {"semantic_focus_score": 0.25, "focus_instability": 0.125}
    sparsity = {"avg_total_q_gini": 0.5, "avg_total_k_gini": 0.25}
    found = {
        "chosen": name_of(chosen),
        "focus": {seed: dict.fromkeys(GROUPS, focus) for seed in study.seeds},
        "sparsity": {seed: {g: None if g == "base" else sparsity for g in GROUPS} for seed in study.seeds},
    }
    page = tmp_path / "page.md"
    page.write_text("Before\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\nwords\n" for name in TABLES))
    write_page(study, found, page)
    text = page.read_text()
    assert "old" not in text
    assert text.count("words") == len(TABLES)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    gain = rows["SAR, chosen on validation"].split("|")
    assert float(gain[2].split("[")[0]) > 20
    assert float(gain[3]) < 0.05
    paper = rows["SAR, the paper's setting"].split("|")
    assert float(paper[3]) > 0.05
    assert all(f"| `{name}` |" in text for name in ["plain", *decodes(chosen)])
    assert "0.2500 | 0.1250 | 0.5000 | 0.1000 | 0.500 | 0.250" in text
    assert all(f"\n| {kind} |" in text for kind in KINDS)
    write_page(study, found, page)
    assert page.read_text() == text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no marks"):
        write_page(study, found, page)


def test_wrong_studies_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="seed_0"):
        Study(tmp_path, tmp_path / "out")
    (tmp_path / "seed_0").mkdir()
    with pytest.raises(FileNotFoundError, match="base has no model"):
        Study(tmp_path, tmp_path / "out")
    with pytest.raises(ArgumentError, match="test must be at least 8"):
        Study(tmp_path, tmp_path / "out", test=2)
    with pytest.raises(ArgumentError, match="sides must be 96 and others"):
        Study(tmp_path, tmp_path / "out", sides=(100,))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_study_runs_and_goes_on(scripts, small, tmp_path, monkeypatch):  # noqa: F811
    model, processor = small
    for number, group in enumerate(GROUPS):
        torch.manual_seed(number)
        with torch.no_grad():
            model.lm_head.weight.normal_(0, 0.1)
        scripts("learning").save(model, processor, tmp_path / "models" / "seed_0" / group, {})
    tried = [SARConfig(activation_layer_k=2, beta=beta) for beta in (0.5, 0.1)]
    for module in (study_run, __import__("sar_fast.lab.paper.study.report", fromlist=["report"])):
        monkeypatch.setattr(module, "grid", lambda: {name_of(config): config for config in tried})
    monkeypatch.setattr(study_run, "LAYERS", 2)
    monkeypatch.setitem(PAPER, "activation_layer_k", 1)
    study = Study(tmp_path / "models", tmp_path / "out", validation=8, test=8, pictures=8, sides=(96,))
    found = run(study)
    for make in TABLES.values():
        assert make(study, found).count("\n") >= 3
    asked = []
    monkeypatch.setattr(study_run, "answers", lambda *a, **k: asked.append(a))
    assert run(study)["chosen"] == found["chosen"]
    assert not asked
    with pytest.raises(ValueError, match="other models or settings"):
        run(Study(tmp_path / "models", tmp_path / "out", validation=9, test=8, pictures=8, sides=(96,)))
