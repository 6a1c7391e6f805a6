"""The rules beside the paper's, against full attention matrices in fp64 and plain Python over heads."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from sar_fast.method.values import Statistics, StatisticsWithRows
from sar_fast.method.weighting.protocol import head_weights
from sar_fast.method.weighting.registry import weighting_to_dict
from sar_fast.weighting import (
    Equal,
    Fixed,
    HeadScales,
    ReinforceHeads,
    SuppressHeads,
    ThresholdHeads,
    TopHeads,
    find_weighting,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, HEADS = 3, 6


def measured(dtype=torch.float64, heads=HEADS, kv_heads=2, S=24, D=8, seed=0) -> StatisticsWithRows:
    """Statistics of a causal layer whose samples have pictures of 9, 14 and no tokens, from whole matrices."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, heads, S, D, generator=g, dtype=torch.float64)
    k = torch.randn(BATCH, kv_heads, S, D, generator=g, dtype=torch.float64)
    s = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(heads // kv_heads, 1)) / math.sqrt(D)
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    p = s.masked_fill(~causal, -torch.inf).softmax(-1)
    found = {name: torch.zeros(BATCH, heads, dtype=torch.float64) for name in ("av", "sa", "score_sum", "mass")}
    count = torch.zeros(BATCH, dtype=torch.float64)
    for b, pictures in enumerate([range(2, 11), range(1, 15), range(0)]):
        queries, keys = range(pictures.stop, S) if len(pictures) else range(0), list(pictures)
        count[b] = len(queries)
        for h in range(heads):
            for i in queries:
                found["av"][b, h] += s[b, h, i, keys].var() / len(queries)
                found["sa"][b, h] += sum(p[b, h, i, j] * (n + 1) for n, j in enumerate(keys)) / len(queries)
                found["mass"][b, h] += p[b, h, i, keys].sum() / len(queries)
                found["score_sum"][b, h] = s[b, h, i, keys].sum()  # of the last one that came
    av, sa, score_sum, mass = (x.to(dtype) for x in found.values())
    return StatisticsWithRows(av, sa, count.to(dtype), {"score_sum": score_sum, "mass": mass})


def values_of(statistics: StatisticsWithRows, by: str) -> list[list[float]]:
    if by == "sav":
        return [[a * s for a, s in zip(*rows)] for rows in zip(statistics.av.tolist(), statistics.sa.tolist())]
    return (getattr(statistics, by) if by in ("av", "sa") else statistics.rows[by]).tolist()


def oracle(values: list[float], kept: int, damp: float) -> list[float]:
    """1 for the heads with the largest values; an earlier head before a later one with the same."""
    best = sorted(range(len(values)), key=lambda h: (-values[h], h))[:kept]
    return [1.0 if h in best else damp for h in range(len(values))]


def of(*values: float, dtype=torch.float32) -> Statistics:
    """One sample whose SA are these; AV is 1, so SAV are the same."""
    sa = torch.tensor([values], dtype=dtype)
    return Statistics(torch.ones_like(sa), sa, torch.ones(1, dtype=dtype))


# TopHeads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", ["sav", "av", "sa", "score_sum", "mass"])
@pytest.mark.parametrize(("keep", "kept"), [(1, 1), (4, 4), (6, 6), (0.5, 3), (0.34, 2), (0.01, 1), (0.99, 5)])
def test_top_heads(keep, kept, by, dtype):
    statistics = measured(dtype)
    for damp in (0.0, 0.3, -1.0):
        c = TopHeads(keep, damp, by=by)(statistics, 0)
        expected = [oracle(row, kept, damp) for row in values_of(statistics, by)]
        assert c.dtype == dtype
        assert torch.equal(c[:2], torch.tensor(expected, dtype=dtype)[:2])  # the third sample has no picture
    assert len({tuple(row) for row in c[:2].tolist()}) == 2 or kept == HEADS, "samples must choose for themselves"


def test_by_default_by_sav():
    statistics = measured()
    orders = {by: TopHeads(3, by=by)(statistics)[:2].tolist() for by in ("sav", "av", "sa")}
    assert TopHeads(3)(statistics)[:2].tolist() == orders["sav"]
    assert len({str(order) for order in orders.values()}) == 3, "a case in which it matters"


@pytest.mark.parametrize(
    ("values", "kept"),
    [((1, 2, 2, 2), (1, 2)), ((0, 0, 0, 0), (0, 1)), ((3, 1, 3, 3), (0, 2)), ((-1, -2, -1, -1), (0, 2))],
)
def test_of_equal_heads_the_first_are_kept(values, kept):
    assert TopHeads(2)(of(*values))[0].nonzero()[:, 0].tolist() == list(kept)


def test_of_many_equal_heads_the_first_are_kept():
    """Long rows are sorted by another algorithm than short ones."""
    values = [float(h % 3) for h in range(500)]
    for keep in (1, 100, 250, 499):
        assert TopHeads(keep)(of(*values))[0].tolist() == oracle(values, keep, 0.0)


@pytest.mark.parametrize(("share", "heads", "kept"), [(0.29, 100, 29), (0.7, 10, 7), (0.95, 32, 30), (0.1, 4, 1)])
def test_a_share_is_rounded_down(share, heads, kept):
    """Not by the rounding of a product: 0.29 * 100 is 28.999999999999996."""
    assert TopHeads(share)(of(*range(heads))).sum() == kept


def test_weights_are_as_exact_as_the_statistics():
    for rule in (TopHeads(1, damp=0.05), SuppressHeads(keep=1)):
        c = rule(measured(torch.float64))
        assert set(c[0].tolist()) == {1.0, 0.05}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [TopHeads(1), ThresholdHeads(0.5), SuppressHeads(1)])
def test_statistics_that_are_no_numbers_decide_nothing(rule, bad):
    """They must not make a head that is kept, or damped, for no reason."""
    sa = torch.tensor([[0.1, bad, 0.2], [0.1, 0.3, 0.2]])
    statistics = StatisticsWithRows(torch.ones(2, 3), sa, torch.ones(2), {"score_sum": sa})
    c = rule(statistics)
    assert c[0].isnan().all()
    assert c[1].isfinite().all()


def test_more_heads_than_there_are():
    with pytest.raises(ValueError, match=r"^weighting must keep at most the layer's number of heads, 6; got keep=7"):
        TopHeads(7)(measured())


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.0, 1.5, math.nan, 3.0])
def test_numbers_of_heads_that_are_none(keep):
    for rule in (TopHeads, SuppressHeads):
        with pytest.raises(ValueError, match=r"keep must be a number of heads, an int >= 1, or a share .* got"):
            rule(keep)


@pytest.mark.parametrize("keep", [True, "4", None, [1]])
def test_kinds_of_keep_that_are_none(keep):
    for rule in (TopHeads, SuppressHeads):
        with pytest.raises(TypeError, match=r"keep must be .* got"):
            rule(keep)


@pytest.mark.parametrize("damp", [math.nan, math.inf, 10**400])
def test_damp_must_be_finite(damp):
    for make in (lambda d: TopHeads(1, d), lambda d: ThresholdHeads(0.5, d), lambda d: SuppressHeads(1, d)):
        with pytest.raises(ValueError, match="damp must be finite"):
            make(damp)
        with pytest.raises(TypeError, match="damp must be a number; got str"):
            make("0.5")


@pytest.mark.parametrize("rule", [TopHeads, ThresholdHeads])
def test_unknown_statistics(rule):
    for by in ("SA", "count", "", None, "rows"):
        with pytest.raises(ValueError, match=r"by must be one of 'sav', 'av', 'sa', .* got"):
            rule(0.5, by=by)
    with pytest.raises(
        ValueError, match="must be given the row statistic 'mass', which the call did not compute; got none"
    ):
        rule(0.5, by="mass")(of(1, 2))
    with pytest.raises(ValueError, match=r"must be given the row statistic 'entropy', .*; got 'score_sum', 'mass'"):
        rule(0.5, by="entropy")(measured())


# ThresholdHeads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", ["sav", "av", "sa", "mass"])
@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0, 1.2, 5.0])
def test_threshold_heads(threshold, by, dtype):
    statistics = measured(dtype)
    c = ThresholdHeads(threshold, damp=0.25, by=by)(statistics, 3)
    rows = values_of(statistics, by)
    expected = [[0.25 if x < threshold * sum(row) / len(row) else 1.0 for x in row] for row in rows]
    assert c.dtype == dtype
    assert c.tolist() == expected


def test_a_threshold_that_divides_heads():
    """The cases above are not all of one kind."""
    statistics = measured()
    damped = [int((ThresholdHeads(t)(statistics)[:2] == 0).sum()) for t in (0.3, 0.9, 1.0, 1.2, 5.0)]
    assert damped == sorted(damped)
    assert 0 < damped[2] < damped[4] == 2 * HEADS
    assert ThresholdHeads(1.0)(statistics).tolist() == ThresholdHeads(1.0, 0.0, "sa")(statistics).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 3, 6, 7, 28])
def test_heads_that_agree_are_not_below_their_mean(heads, dtype):
    """A mean that is rounded up would damp them all."""
    for value in (0.1, 1 / 3, 1e-30, 0.0):
        assert (ThresholdHeads(1.0)(of(*[value] * heads, dtype=dtype)) == 1).all()


def test_a_head_at_the_threshold_is_kept():
    assert ThresholdHeads(0.5)(of(1, 0.999, 3, 3.001))[0].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("threshold", [0, -0.5, math.nan, math.inf])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(ValueError, match="threshold must be"):
        ThresholdHeads(threshold)


# SuppressHeads


def spin(score_sums: list[float], kept: int, damp: float) -> list[float]:
    """The published order of work: divide by the deviation, softmax over heads, keep the largest gates."""
    x = torch.tensor(score_sums, dtype=torch.float64)
    gates = (x / x.std()).softmax(0)
    kept_heads = gates.topk(kept).indices.tolist()
    return [1.0 if h in kept_heads else damp for h in range(len(score_sums))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("keep", "kept"), [(1, 1), (3, 3), (0.95, 5), (0.7, 4)])
def test_suppress_heads(keep, kept, dtype):
    for seed in range(5):
        statistics = measured(dtype, seed=seed)
        rule = SuppressHeads(keep)
        c = rule(statistics, 7)
        expected = [spin(row, kept, 0.05) for row in statistics.rows["score_sum"][:2].tolist()]
        assert c.dtype == dtype
        assert torch.equal(c[:2], torch.tensor(expected, dtype=dtype))
        sums = statistics.rows["score_sum"]
        assert torch.allclose(rule.statistic(statistics)[:2], (sums / sums.std(-1, keepdim=True))[:2])
        assert c[:2].tolist() == TopHeads(keep, 0.05, by="score_sum")(statistics)[:2].tolist()


def test_suppress_heads_has_the_published_numbers():
    assert SuppressHeads() == SuppressHeads(keep=0.95, damp=0.05)
    statistics = measured()
    assert (SuppressHeads()(statistics)[:2] == 0.05).sum(-1).tolist() == [1, 1]  # int(0.95 * 6) = 5 stay


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_heads_that_agree_have_no_deviation(heads):
    sums = torch.full((1, heads), -3.5)
    statistics = StatisticsWithRows(sums, sums, torch.ones(1), {"score_sum": sums})
    assert SuppressHeads(1)(statistics)[0].tolist() == [1.0] + [pytest.approx(0.05)] * (heads - 1)


def test_rules_ask_for_the_row_statistics_that_they_read():
    """One object for all rules and calls: compiled graphs know it by its identity."""
    (sums,) = SuppressHeads().row_statistics
    assert (sums.name, sums.queries) == ("score_sum", "last")
    for rule in (TopHeads, ThresholdHeads):
        assert rule(0.5, by="score_sum").row_statistics[0] is sums
        for name in ("mass", "entropy"):
            (statistic,) = rule(0.5, by=name).row_statistics
            assert (statistic.name, statistic.queries) == (name, "text")
        assert [rule(0.5, by=by).row_statistics for by in ("av", "sa", "sav")] == [()] * 3
    with pytest.raises(
        ValueError, match="must be given the row statistic 'score_sum', which the call did not compute; got none"
    ):
        SuppressHeads()(of(1, 2))


# all that choose


@pytest.mark.parametrize("rule", [TopHeads(2), ThresholdHeads(0.9), SuppressHeads(2)])
def test_what_is_chosen_is_constant(rule):
    """And a sample without a picture weighs 1."""
    found = measured()
    leaves = [x.clone().requires_grad_() for x in (found.av, found.sa, found.rows["score_sum"])]
    c = head_weights(rule, StatisticsWithRows(*leaves[:2], found.count, {"score_sum": leaves[2]}), 0)
    assert not c.requires_grad
    assert not SuppressHeads().statistic(StatisticsWithRows(*leaves, {"score_sum": leaves[2]})).requires_grad
    assert (c[2] == 1).all()
    assert (c[:2] != 1).any(-1).all()


RULES = {
    "top": TopHeads(2),
    "top of rows": TopHeads(0.5, by="mass"),
    "threshold": ThresholdHeads(0.9),
    "suppress": SuppressHeads(2),
    "reinforce": ReinforceHeads({0: torch.rand(HEADS), 1: torch.rand(BATCH, HEADS)}),
    "scales": HeadScales(2, HEADS),
    "fixed": Fixed(torch.rand(2, HEADS)),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_compile_in_one_graph(name):
    def weigh(statistics, layer):
        return head_weights(RULES[name], statistics, layer)

    compiled = torch.compile(weigh, fullgraph=True, backend="eager")
    for layer in (0, 1):
        assert torch.equal(compiled(measured(), layer), weigh(measured(), layer))


@pytest.mark.parametrize("rule", [TopHeads(2), ThresholdHeads(0.9, 0.1), SuppressHeads(0.5)])
def test_rules_are_values(rule):
    again = find_weighting(weighting_to_dict(rule))
    assert again == rule
    assert hash(again) == hash(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(AttributeError):
        rule.damp = 1.0


def test_numbers_of_other_libraries_are_plain_afterwards():
    numpy = pytest.importorskip("numpy")
    assert TopHeads(numpy.int64(2), numpy.float32(0.5)) == TopHeads(2, 0.5)
    assert type(TopHeads(numpy.int64(2)).keep) is int
    assert type(TopHeads(torch.tensor(0.5)).keep) is float


# HeadScales


def test_head_scales_start_as_plain_attention_and_learn():
    rule, statistics = HeadScales(4, HEADS), measured(torch.float32)
    assert [(n, p.shape) for n, p in rule.named_parameters()] == [("scales", (4, HEADS))]
    c = head_weights(rule, statistics, 2)
    assert torch.equal(c, torch.ones(BATCH, HEADS))  # the sample without a picture too
    grad = torch.randn(BATCH, HEADS, generator=torch.Generator().manual_seed(0))
    (c * grad).sum().backward()
    expected = torch.zeros(4, HEADS)
    expected[2] = grad.sum(0)
    assert torch.allclose(rule.scales.grad, expected)
    with torch.no_grad():
        rule.scales[1, 3] = 5.0
    assert rule(statistics, 1).tolist() == [1, 1, 1, 5, 1, 1]
    assert rule(statistics, 2).tolist() == [1] * 6


def test_head_scales_without_a_layer():
    assert HeadScales(1, HEADS)(measured()).tolist() == [1] * 6
    with pytest.raises(
        ValueError,
        match="must have scales of one layer for a call without a layer index; got HeadScales with scales of 2",
    ):
        HeadScales(2, HEADS)(measured())


@pytest.mark.parametrize("layer", [3, -1])
def test_head_scales_of_a_layer_that_they_lack(layer):
    with pytest.raises(
        ValueError, match=f"weighting must have scales of layer {layer}; got HeadScales with scales of 3 layers"
    ):
        HeadScales(3, HEADS)(measured(), layer)


def test_head_scales_of_other_heads():
    with pytest.raises(ValueError, match="must have scales of the layer's 6 heads; got HeadScales with scales of 4"):
        HeadScales(3, 4)(measured(), 0)


@pytest.mark.parametrize(("sizes", "error"), [((0, 4), ValueError), ((4, -1), ValueError), ((2.0, 4), TypeError)])
def test_sizes_of_head_scales(sizes, error):
    with pytest.raises(error, match=r"(layers|heads) must be an int >= 1; got"):
        HeadScales(*sizes)


def test_head_scales_by_name_get_the_models_sizes():
    rule = find_weighting("head_scales", layers=3, heads=5)
    assert rule.scales.shape == (3, 5)
    with torch.no_grad():
        rule.scales.uniform_()
    again = find_weighting(weighting_to_dict(rule))
    again.load_state_dict(rule.state_dict())
    assert torch.equal(again.scales, rule.scales)


# Fixed and Equal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fixed_weights_come_back_from_json_as_they_were(dtype):
    c = torch.rand(2, HEADS, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    again = find_weighting(weighting_to_dict(Fixed(c)))
    assert again == Fixed(c)
    assert torch.equal(again(measured(), 1), Fixed(c)(measured(), 1))
    assert Fixed(c) != Fixed(c + 1)
    assert Fixed(c) != Fixed(c, per_layer=True)
    assert Fixed(c[:1]) != Fixed(c[0])


def test_a_table_of_one_layer_is_of_that_layer():
    statistics, table = measured(), torch.rand(1, HEADS)
    assert torch.equal(Fixed(table, per_layer=True)(statistics, 0), table[0].double())
    for layer, message in (
        (1, "must have weights of layer 1; got Fixed with weights of 1 layers"),
        (-1, "must have weights of layer -1; got Fixed with weights of 1 layers"),
        (None, "must be without tables per layer for a call without a layer index"),
    ):
        with pytest.raises(ValueError, match=message):
            Fixed(table, per_layer=True)(statistics, layer)
    for layer in (None, 0, 5):
        assert torch.equal(Fixed(table)(statistics, layer), table.double())  # one row for all


@pytest.mark.parametrize(
    ("c", "error"),
    [
        *((c, TypeError) for c in ("abc", [[1.0], [1.0, 2.0]], None, [True], [1j])),
        *((c, ValueError) for c in ([], 1.0, [math.nan], [[[1.0]]])),
    ],
)
def test_tables_that_are_none(c, error):
    with pytest.raises(error, match="c must"):
        Fixed(c)


def test_fixed_per_layer_is_a_flag():
    for per_layer in (1, "yes", 0):
        with pytest.raises(TypeError, match="per_layer must be a bool or None"):
            Fixed([[1.0, 2.0]], per_layer=per_layer)


def test_fixed_tables():
    statistics = measured()
    table = torch.rand(BATCH, HEADS, dtype=torch.float64)
    assert torch.equal(Fixed(table)(statistics), table)  # samples
    assert torch.equal(Fixed(table)(statistics, 1), table[1])  # layers
    assert torch.equal(Fixed(table, per_layer=False)(statistics, 1), table)
    assert torch.equal(Fixed(table[0])(statistics, 1), table[0])
    with pytest.raises(ValueError, match="weighting must have weights of 6 heads"):
        Fixed(table[:, :5])(statistics)
    leaf = table.clone().requires_grad_()
    head_weights(Fixed(leaf), statistics, 2).sum().backward()
    assert leaf.grad.sum(-1).tolist() == [0, 0, BATCH * HEADS]


def test_equal_is_one_and_constant():
    c = Equal()(measured())
    assert c.shape == (BATCH, HEADS)
    assert (c == 1).all()
    assert Equal() == find_weighting("equal")
