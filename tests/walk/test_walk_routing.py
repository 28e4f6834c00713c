"""From a config to a report with every kind of route: experts, AR0, AR1, controls and peers, for real."""

import json

import pytest

import bem
from bem import config as configuration
from bem.bases.load import load_base
from bem.errors import NotAccepted
from bem.experiments import run as runner
from bem.files import read_json
from bem.routing.explain import explain
from bem.runs.promotion import promote

ROUTES = (
    "ar1", "ar0", "oracle", "gold", "linear", "encoder", "single", "random", "wrong", "arrow", "xlora",
)  # fmt: skip


@pytest.fixture(scope="module")
def walked(tmp_path_factory, micro_base):
    work = tmp_path_factory.mktemp("walk")
    arms = [{"name": "s0", "adapters": {"variant": "s0"}, "role": "baseline"}]
    for route in ROUTES:
        role = "candidate" if route.startswith("ar") and route != "arrow" else "control"
        arms.append({"name": route, "route": route, "role": role})
    arms.append({"name": "base", "shots": 0, "role": "control"})
    values = {
        "name": "walk",
        "output": str(work),
        "base": str(micro_base),
        "seeds": [0],
        "data": {
            "tasks": [
                {"name": "forms", "metric": "f1", "max_new_tokens": 4},
                {"name": "sig2json", "metric": "f1", "max_new_tokens": 4},
            ],
            "train_rows": 12,
            "dev_rows": 2,
            "conversations": {"turns": 2, "max_characters": 500, "turn_characters": 400},
        },
        "adapters": {"rank": 4},
        "routing": {
            "experts": {
                "json": ["forms/json", "sig2json"],
                "other": [f"forms/{ask}" for ask in ("last", "name", "kind", "count", "call")],
            },
            "expert_rank": 2,
            "shared_rank": 1,
            "encoder": "base:bem-tiny",
            "cloning": {"rows": 8, "epochs": 3},
            "policy_gradient": {"iterations": 2, "episodes": 4, "max_new_tokens": 4},
            "peer_steps": 1,
        },
        "arms": arms,
        "training": {"steps": 2, "batch_size": 4, "max_length": 448},
        "gates": {"n_bootstrap": 200},
        "latency_rounds": 1,
    }
    config = configuration.parse(configuration.ExperimentConfig, values, "walk")
    events: list[runner.Event] = []
    return config, runner.run(config, events.append), events


def test_every_stage_is_made_once_and_every_arm_is_measured(walked):
    _, result, events = walked
    first = [e for e in events if e.stage == "training experts" and e.done == 1]
    assert len(first) == 1
    assert set(result.verdicts) == {"ar1", "ar0"}
    for route in ROUTES:
        assert (result.folder / "arms" / route / "seed-0" / "measurement.json").is_file()


def test_an_answer_under_one_route_is_computed_once_whichever_arms_choose_it(walked):
    _, result, _ = walked
    fixed = ("oracle", "gold", "linear", "encoder", "single", "random", "wrong")
    cells = [result.folder / "arms" / route / "seed-0" / "measurement.json" for route in fixed]
    taken = sum(read_json(path)["meta"]["taken_over"] for path in cells)
    kept = {
        key: given
        for path in (result.folder / "routing/seed-0/answers").rglob("*.json")
        for key, given in read_json(path).items()
    }
    asked = len(fixed) * len(read_json(cells[0])["example_ids"])
    assert taken > 0 and len(kept) == asked - taken


def test_the_report_shows_who_spoke(walked):
    _, result, _ = walked
    page = result.report.read_text(encoding="utf-8")
    for word in ("Routing", "xlora", "arrow", "gold", "linear", "no adapter, zero-shot"):
        assert word in page
    facts = json.loads((result.folder / "arms/ar1/seed-0/route.json").read_text())
    assert facts["conversations"]["shown"][0]["chunks"] and facts["interference"]["mounted"]
    assert facts["interference"]["mounted"]["passed"]  # a gate of zero disturbs nobody


def test_what_was_measured_can_be_loaded_and_asked(walked, micro_base):
    _, result, _ = walked
    model, tokenizer = load_base(str(micro_base))
    mounted = bem.load_router(model, result.folder / "arms/ar1/seed-0/checkpoint")
    ids = tokenizer("name the function")["input_ids"] * 30
    chunks = explain(mounted, ids, [False] * len(ids))
    assert len(chunks) == -(-len(ids) // 64)


def test_nothing_is_promoted_without_a_verdict(walked):
    _, result, _ = walked
    if result.verdicts["ar1"].decision != "PROMOTE":
        with pytest.raises(NotAccepted):
            promote(result.folder, "ar1")


def test_a_second_run_finds_everything_finished(walked):
    config, result, _ = walked
    events: list[runner.Event] = []
    again = runner.run(config, events.append)
    assert not [e for e in events if e.stage.startswith(("training", "tracing", "measuring"))]
    assert again.verdicts.keys() == result.verdicts.keys()
