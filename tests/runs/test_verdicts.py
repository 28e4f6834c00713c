"""Seeds of one request are no further requests, missing facts stay missing, verdicts are read as written."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from bem.config import GatesConfig
from bem.errors import CheckpointError, MeasurementError
from bem.files import read_json, write_json
from bem.runs.folder import RunFolder
from bem.runs.verdicts import over_seeds, read_verdicts
from bem.stats.costs import cost_checks
from bem.stats.measurement import Measurement, RouterFacts
from tests.experiments.finished_run import make_run

N = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs"))


def measured(seed=0, **changes) -> Measurement:
    rng = np.random.default_rng(seed)
    values = dict(
        metrics={"em": rng.integers(0, 2, N)},
        example_ids=[f"r{i}" for i in range(N)],
        kv_hits=rng.integers(40, 80, N),
        kv_needed=np.full(N, 80),
        adapter_parameters=100 + seed,
        adapter_flops_per_token=200,
    )
    return Measurement(**{"name": f"seed {seed}", **values, **changes})


def test_scores_are_stacked_and_the_dearest_seed_is_the_price():
    whole = over_seeds("v1", [measured(0), measured(1)])
    assert whole.name == "v1" and np.shape(whole.metrics["em"]) == (2, N)
    assert whole.adapter_parameters == 101


def test_cache_use_has_one_row_for_each_request_whatever_the_number_of_seeds():
    parts = [measured(seed) for seed in range(3)]
    whole = over_seeds("v1", parts)
    assert len(whole.kv_hits) == len(whole.kv_needed) == N
    assert whole.kv_hits[0] == pytest.approx(sum(part.kv_hits[0] for part in parts) / 3)


def test_more_seeds_with_the_same_cache_use_make_no_interval_narrower():
    gates = GatesConfig(waived=("budget", "latency", "memory", "router"), n_bootstrap=200)
    one, three = (
        cost_checks(side, replace(side, kv_hits=side.kv_hits - np.arange(N) % 3), gates)[0]
        for side in (over_seeds("a", [measured()] * seeds) for seeds in (1, 3))
    )
    assert (one.ci_low, one.ci_high) == (three.ci_low, three.ci_high)


@pytest.mark.parametrize(
    "name", ["kv_hits", "kv_needed", "adapter_parameters", "adapter_flops_per_token"]
)
def test_a_fact_that_one_seed_lacks_is_missing(name):
    assert getattr(over_seeds("v1", [measured(0), measured(1)]), name) is not None
    assert getattr(over_seeds("v1", [measured(0), measured(1, **{name: None})]), name) is None


def test_router_facts_are_there_if_every_seed_has_them():
    swap = {"clean": np.ones(N), "corrupt": np.zeros(N)}
    full = RouterFacts(plan_lengths=[1, 2], index_swap=swap, clusters=["c"] * N, answer_loss=swap)
    whole = over_seeds("ar1", [measured(router=full), measured(router=full)]).router
    assert whole.plan_lengths == [1, 2, 1, 2] and np.shape(whole.index_swap["clean"]) == (2, N)
    no_plans = replace(full, plan_lengths=None)
    whole = over_seeds("ar1", [measured(router=full), measured(router=no_plans)]).router
    assert whole.plan_lengths is None and whole.index_swap is not None
    whole = over_seeds("ar1", [measured(router=full), measured()]).router
    assert (whole.plan_lengths, whole.index_swap, whole.answer_loss) == (None, None, None)
    assert over_seeds("ar1", [measured(), measured()]).router is None
    fewer = replace(full, index_swap={"clean": np.ones(N)})
    whole = over_seeds("ar1", [measured(router=full), measured(router=fewer)]).router
    assert list(whole.index_swap) == ["clean"]


def test_seeds_of_other_examples_are_refused():
    other = measured(example_ids=[f"x{i}" for i in range(N)])
    with pytest.raises(MeasurementError, match="v1: its seeds were measured on different examples"):
        over_seeds("v1", [measured(), other])


def test_verdicts_are_read_back_as_they_were_judged(run):
    file = read_verdicts(run.verdicts)
    assert file.unchanged and file.judgement.family == ("em", "f1")
    verdict = file.judgement.candidates["v1"]
    assert verdict.accepted and verdict.effect("em").primary
    written = read_json(run.verdicts)["candidates"]["v1"]
    assert verdict.to_dict() == written
    assert set(file.judgement.contrasts["v1"]) == {"v1-random"}


def test_a_number_that_was_not_finite_is_read_back_as_no_number(run, tmp_path):
    content = read_json(run.verdicts)
    content["candidates"]["v1"]["effects"][0]["ci_low"] = None
    write_json(tmp_path / "verdicts.json", content)
    file = read_verdicts(tmp_path / "verdicts.json")
    assert not file.unchanged
    assert math.isnan(asdict(file.judgement.candidates["v1"].effects[0])["ci_low"])


def test_verdicts_of_another_version_are_refused(tmp_path):
    write_json(tmp_path / "verdicts.json", {"format": "bem-verdicts-0"})
    with pytest.raises(MeasurementError, match="holds no verdicts of this version"):
        read_verdicts(tmp_path / "verdicts.json")
    with pytest.raises(CheckpointError, match=r"No nothing\.json"):
        read_verdicts(tmp_path / "nothing.json")
