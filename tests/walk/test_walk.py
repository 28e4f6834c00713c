"""The whole way: a config, a trained and measured run, a verdict, a promoted adapter, its answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bem
from bem import config as configuration
from bem.errors import ConfigError, MeasurementError, NotAccepted
from bem.experiments import run as runner
from bem.runs import promotion
from bem.runs.loading import load_current


@pytest.fixture(scope="module")
def walked(tmp_path_factory, micro_base):
    """A baseline that can hardly learn, and two candidates: one that can, one just like it."""
    home = tmp_path_factory.mktemp("walk")
    data, held_out = home / "rows.jsonl", home / "held_out.jsonl"
    for file, first in ((data, 0), (held_out, 48)):
        rows = [
            {"input": f"return {i}", "references": ["the value"], "group": f"doc{i}"}
            for i in range(first, first + 48)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = home / "walk.yaml"
    path.write_text(f"""
name: walk
base: {micro_base}
seeds: [0]
data: {{tasks: [{{name: mine, train: {data}, dev: {held_out}, max_new_tokens: 4, metric: loss}}]}}
adapters: {{variant: s0, rank: 2, alpha: 0.001, router_layer: 3}}
arms:
  - {{name: frozen, role: baseline}}
  - {{name: learning, adapters: {{alpha: 16, rank: 4, router_layer: 0}}, match: none}}
  - {{name: same, match: none}}
training: {{steps: 30, batch_size: 8, max_length: 64, learning_rate: 0.01}}
gates: {{n_bootstrap: 500, waived: [budget, latency, memory]}}
latency_rounds: 2
""")
    config = configuration.load(path, [f"output={home / 'runs'}"])
    return config, runner.run(config)


def test_the_verdicts_say_what_happened(walked):
    _, result = walked
    learned = result.verdicts["learning"]
    assert learned.decision == "PROMOTE", learned.summary()
    assert learned.effect("quality").gain > 0.001  # a random base can only say so much
    assert result.verdicts["same"].decision != "PROMOTE"


def test_what_was_accepted_is_promoted_and_answers_better_than_the_base(walked, micro_base):
    _, result = walked
    release = promotion.promote(result.folder, "learning")
    with pytest.raises(NotAccepted):
        promotion.promote(result.folder, "same")
    store = promotion.store_of(result.folder)
    assert store.current() == release

    model, tokenizer = bem.load_base(str(micro_base))
    asked = tokenizer("User: return 7\nAssistant:", return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([asked["input_ids"], torch.tensor([tokenizer(" the value")["input_ids"]])], 1)
    labels = ids.clone()
    labels[:, : asked["input_ids"].shape[1]] = -100
    with torch.no_grad():
        before = model(ids, labels=labels).loss
        attached, _ = load_current(store, model)
        after = attached.model(input_ids=ids, labels=labels).loss
    assert after < before - 0.3


def test_a_second_run_stands_on_the_first(walked):
    config, result = walked
    again = runner.run(config)
    assert again.verdicts["learning"].to_dict() == result.verdicts["learning"].to_dict()


def test_the_names_of_the_source_document_go_the_same_way(walked):
    config, result = walked
    system = bem.BEMv13System(config)
    with pytest.raises(MeasurementError, match="nothing was validated yet"):
        system.deploy_production(["learning"])
    results = system.run_experiments()  # everything is finished: nothing is trained again
    assert results.folder == result.folder
    verdicts = system.validate_statistical_significance(results)
    assert {name: v.decision for name, v in verdicts.items()} == {
        name: v.decision for name, v in result.verdicts.items()
    }
    (release,) = system.deploy_production([n for n, v in verdicts.items() if v.accepted])
    assert promotion.store_of(result.folder).current() == release
    with pytest.raises(NotAccepted):
        system.deploy_production(["same"])
    with pytest.raises(ConfigError, match=r"No arm 'lerning'. Arms: frozen, learning, same"):
        system.run_experiments(["lerning"])


def test_the_example_of_the_three_calls_runs(walked):
    _, result = walked
    example = Path(bem.__file__).parent.parent / "examples" / "system.py"
    command = [sys.executable, str(example), str(result.folder / "config.yaml")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "learning: PROMOTE" in said and "same: PROMOTE" not in said
    assert "in use:" in said and str(result.report) in said


def test_a_tracker_measures_each_variant_once_and_compares_it_with_one_of_them(walked):
    config, result = walked
    folders = {
        arm: result.folder / "arms" / arm / "seed-0" / "checkpoint"
        for arm in ("frozen", "learning")
    }
    tracker = bem.PerformanceTracker(folders, config)
    measured = tracker.run_variant("learning")
    assert tracker.run_variant("learning") is measured
    gates = config.gates.model_copy(update={"waived": ("budget", "latency", "memory", "kv_hit")})
    verdict = tracker.compare_with_baseline("frozen", gates)["learning"]
    again = result.verdicts["learning"].effect("loss").gain
    assert verdict.effect("loss").gain == pytest.approx(again, abs=1e-6)
    with pytest.raises(ConfigError, match=r"No variant 'v9'. Variants: frozen, learning"):
        tracker.run_variant("v9")


def test_a_validator_keeps_its_settings():
    validator = bem.StatisticalValidator(bootstrap_samples=500, alpha=0.1, seed=3)
    scores = [0.1, 0.4, -0.2, 0.3, 0.5, 0.2, 0.0, 0.1]
    assert validator.bca_bootstrap(scores) == bem.bca_bootstrap(scores, 500, 0.1, 3)
    assert validator.fdr_correction([0.01, 0.5]).rejected.tolist() == [True, False]
