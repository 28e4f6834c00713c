"""Reserved directions are orthogonal, or refused; interference is judged against its limit."""

import pytest
import torch

from bem.errors import AttachError, MeasurementError
from bem.experts.subspace import interference, orthogonality_error, reserve


@pytest.mark.parametrize("dims", [[4, 4, 4], [1, 0, 7], [32], [16, 16], []])
def test_bases_are_orthonormal_and_orthogonal_to_each_other(dims):
    bases = reserve(32, dims, seed=3)
    assert [tuple(b.shape) for b in bases] == [(32, dim) for dim in dims]
    whole = torch.cat([torch.zeros(32, 0), *bases], dim=1).double()
    assert (whole.T @ whole - torch.eye(sum(dims))).abs().max() <= 1e-5 if sum(dims) else True
    assert orthogonality_error(bases) <= 1e-5


def test_64_experts_fill_a_wide_output_to_the_last_direction():
    assert orthogonality_error(reserve(1024, [16] * 64, seed=0)) <= 1e-5


def test_the_same_seed_gives_the_same_bases():
    one, two, other = (reserve(16, [3, 5], seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], other[0])


def test_more_directions_than_there_are_is_refused_with_the_numbers():
    with pytest.raises(AttachError, match=r"3 experts want 33 directions .*16, 16, 1.*has 32"):
        reserve(32, [16, 16, 1], seed=0)
    with pytest.raises(AttachError, match="directions"):
        reserve(32, [-1], seed=0)


def test_the_error_is_the_largest_cosine_between_experts():
    one = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, 3.0], [0.0, 0.0], [5.0, 4.0]])  # cosines 0, 0 and 0.6, 0
    assert orthogonality_error([one, other]) == pytest.approx(0.6)
    assert orthogonality_error([one, torch.zeros(3, 2), torch.zeros(3, 0)]) == 0.0
    assert orthogonality_error([one]) == 0.0


def test_interference_is_the_relative_growth_of_each_experts_loss():
    report = interference({"sql": 2.0, "json": 1.0}, {"sql": 2.03, "json": 0.9})
    assert [loss.growth for loss in report.losses] == pytest.approx([0.015, -0.1])
    assert report.passed
    assert not interference({"sql": 2.0}, {"sql": 2.05}).passed
    assert interference({"sql": 2.0}, {"sql": 2.05}, limit=0.03).passed


def test_the_table_names_every_expert_and_who_is_over_the_limit():
    lines = interference({"sql": 2.0, "json": 1.0}, {"sql": 2.2, "json": 1.0}).table().split("\n")
    assert lines[0].split() == ["expert", "alone", "mounted", "growth"]
    assert lines[1].split() == ["sql", "2.0000", "2.2000", "+10.00%", "over", "2.0%"]
    assert lines[2].split() == ["json", "1.0000", "1.0000", "+0.00%", "ok"]


def test_a_loss_that_says_nothing_does_not_pass():
    for bad in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(MeasurementError, match="growth cannot be computed"):
            interference({"sql": 1.0}, {"sql": bad})
    with pytest.raises(MeasurementError, match="missing: \\['json'\\]"):
        interference({"sql": 1.0, "json": 1.0}, {"sql": 1.0})
    with pytest.raises(MeasurementError, match="missing: all"):
        interference({}, {})
