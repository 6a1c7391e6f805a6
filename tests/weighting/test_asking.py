"""How a rule is asked, and what it may do with what it is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sar_fast import SARAttention, SARConfig, SARState, sar_attn_with_kvcache
from sar_fast.reference import sar_attention_reference
from sar_fast.weighting import Equal, Fixed, HeadScales, Mass, SoftmaxOverHeads
from tests.helpers import make_case, max_error
from tests.weighting.test_functions import ALL, H, without_beta

pytestmark = pytest.mark.usefixtures("one_thread")


class Doubled(SoftmaxOverHeads):
    def __call__(self, statistics, layer=None):
        return 2 * super().__call__(statistics, layer)


class Halved(Equal):
    def __call__(self, statistics, layer=None):
        return super().__call__(statistics, layer) / 2


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("rule", "base", "factor"), [(Doubled(0.1), SoftmaxOverHeads(0.1), 2), (Halved(), Equal(), 0.5)]
)
def test_a_subclass_of_a_rule_that_runs_in_the_backend_is_asked(backend, rule, base, factor):
    case = without_beta(make_case(18, H=H, D=16))
    _, want = case.run(backend, weighting=base)
    out, stats = case.run(backend, weighting=rule)
    counted = want.query_count > 0
    torch.testing.assert_close(stats.head_weights[counted], factor * want.head_weights[counted])
    reference, found = sar_attention_reference(
        *case.to(torch.float64).tensors, **case.options, weighting=rule, return_stats=True
    )
    torch.testing.assert_close(stats.head_weights, found.head_weights.float(), rtol=1e-3, atol=0)
    assert max_error(out, reference) <= 2e-5
    caches, roles = (case.k.clone(), case.v.clone()), {"visual_mask": case.visual, "prior": case.prior, "state": None}
    step = lambda rule: sar_attn_with_kvcache(
        case.q[:, -1:], *caches, cache_seqlens=18, weighting=rule, backend=backend, return_stats=True, **roles
    )
    (_, got), (_, paper) = step(rule), step(base)
    counted = paper.query_count > 0
    assert counted.any()
    torch.testing.assert_close(got.head_weights[counted], factor * paper.head_weights[counted])


def in_place(statistics, layer):
    return statistics.sa.mul_(2)


@pytest.mark.parametrize("learns", [False, True])
def test_a_rule_that_changes_its_statistics_is_an_error(learns):
    case = without_beta(make_case(18, H=H, D=16))
    case.q.requires_grad_(learns)
    with pytest.raises(ValueError, match="weighting must not change the statistics that it is given; got in_place"):
        case.run("torch", weighting=in_place)
    roles = {"visual_mask": case.visual, "prior": case.prior, "state": SARState.empty(3, H)}
    with torch.no_grad(), pytest.raises(ValueError, match=r"weighting must not change the statistics .*; got in_place"):
        sar_attn_with_kvcache(case.q[:, -1:], case.k, case.v, cache_seqlens=18, weighting=in_place, **roles)


@pytest.mark.parametrize("kind", ["table", "module"])
def test_recorded_weights_are_those_of_the_call(kind):
    case = without_beta(make_case(18, H=H, D=16))
    rule = Fixed(torch.ones(H)) if kind == "table" else HeadScales(1, H)
    _, stats = case.run("torch", weighting=rule)
    roles = {"visual_mask": case.visual, "prior": case.prior, "state": None}
    _, step = sar_attn_with_kvcache(
        case.q[:, -1:], case.k, case.v, cache_seqlens=18, weighting=rule, return_stats=True, **roles
    )
    with torch.no_grad():
        (rule.c if kind == "table" else rule.scales).mul_(5)
    assert torch.equal(stats.head_weights, torch.ones(3, H))
    assert torch.equal(step.head_weights, torch.ones(3, H))


class Ratio(nn.Module):
    """Divides by, and takes logarithms of, what is 0 in a sample without pictures."""

    row_statistics = (Mass(),)

    def __init__(self) -> None:
        super().__init__()
        self.power, self.bias = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.1))

    def forward(self, statistics, layer):
        mass, sav = statistics.rows["mass"], statistics.sav
        spread = (sav - sav.mean(-1, keepdim=True)) / sav.var(-1, keepdim=True).sqrt()
        return (mass / mass.mean(-1, keepdim=True)) ** self.power + (self.bias * (sav.log() + spread)).tanh()


def gradients(case, backend):
    """Of q, k and v of the first sample, and of the rule's parameters."""
    rule, leaves = Ratio(), case.leaves()
    out, stats = leaves.run(backend, weighting=rule, sav_grad=True)
    (out.square().sum() + stats.head_weights.square().sum()).backward()
    return [*(x.grad[0] for x in (leaves.q, leaves.k, leaves.v)), *(p.grad for p in rule.parameters())]


@pytest.mark.parametrize("backend", ALL)
def test_samples_without_pictures_spoil_no_gradient(backend):
    case = without_beta(make_case(18, H=H, D=16, layouts=("image", "text_only")))
    for got, want in zip(gradients(case, backend), gradients(case.rows(slice(1)), backend)):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    *_, power, bias = gradients(case.rows(slice(1, 2)), backend)
    assert (power, bias) == (0, 0)


class Contradictory:
    needs_statistics = False
    row_statistics = (Mass(),)

    def __call__(self, statistics, layer):
        return statistics.rows["mass"]


def test_row_statistics_need_statistics():
    case = without_beta(make_case(18, H=H, D=16))
    message = "weighting must have needs_statistics True beside row_statistics; got Contradictory"
    with pytest.raises(ValueError, match=message):
        case.run("torch", weighting=Contradictory())
    with pytest.raises(ValueError, match=message):
        SARConfig(weighting=Contradictory())


def test_an_attention_module_refers_to_its_rule():
    """One rule may be that of many layers: it is the caller's to move, to save and to train."""
    case, rule = without_beta(make_case(18, H=H, D=16)), Ratio()
    module = SARAttention(64, H, config=SARConfig(weighting=rule))
    out, _ = module(torch.randn(3, 18, 64), visual_mask=case.visual, text_mask=case.text, prior=case.prior)
    out.square().sum().backward()
    assert rule.power.grad != 0
    assert not {id(p) for p in rule.parameters()} & {id(p) for p in module.parameters()}
