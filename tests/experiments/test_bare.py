"""The bare base is an arm like any other: asked, timed, saved and reported, at no cost."""

import numpy as np
import pytest
import torch

from bem.config import ArmConfig, ExperimentConfig
from bem.errors import BaseMismatch, CheckpointError, ConfigError, DataError, MeasurementError
from bem.experiments.adapted import put_on
from bem.experiments.bare import Bare, few_shot, load_bare
from bem.experiments.cell import cell_key
from bem.experiments.inputs import RunInputs
from bem.experiments.measuring.answers import measure
from bem.experiments.measuring.memory import added_memory
from bem.experiments.plan import plan_arms
from bem.experiments.run import evaluate, run
from bem.files import read_json
from bem.runs.folder import RunFolder, checkpoint_kind, read_jsonl
from bem.runs.verdicts import controls_of
from bem.training.data import encode
from tests.conftest import make_llama
from tests.experiments.measuring.test_answers import by_hand, task
from tests.experiments.test_run import make_config, write_rows

ARMS = [
    {"name": "s0", "role": "baseline"},
    {"name": "base", "shots": 0, "role": "control"},
    {"name": "base-2shot", "shots": 2, "role": "control"},
    {"name": "v4", "adapters": {"variant": "v4"}, "match": "none"},
]


def test_it_says_what_the_base_says_and_leaves_it_as_it_was(micro_llama, tokenizer):
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        before = micro_llama(input_ids=ids).logits
    rows = task(4)
    with put_on(micro_llama, Bare) as bare:
        m = measure(bare, tokenizer, rows, batch_size=2)
        given = dict(turn_starts=torch.zeros_like(ids).bool(), evidence=torch.zeros(1, 8))
        with torch.no_grad():
            assert torch.equal(bare.model(input_ids=ids, **given).logits, before)
        answers = [by_hand(bare, tokenizer, row, 6) for row in rows.dev]
    np.testing.assert_allclose(m.metrics["loss"][0], [loss for _, loss in answers], atol=1e-4)
    assert m.adapter_parameters == 0 and m.adapter_flops_per_token == 0
    assert m.kv_needed.min() > 0 and np.array_equal(m.kv_hits, m.kv_needed)
    assert "generate" not in vars(micro_llama) and not micro_llama._forward_pre_hooks
    with pytest.raises(ValueError, match="turn_starts"):
        micro_llama.generate(ids, max_new_tokens=1, turn_starts=given["turn_starts"])


def test_it_adds_no_memory_and_is_saved_with_what_was_asked(tmp_path):
    bare = Bare(make_llama())
    assert added_memory({"base": bare}, bare.model) == {"base": 0.0}
    bare.save(tmp_path / "b", 3, "d")
    assert checkpoint_kind(tmp_path / "b") == "bare"
    assert read_json(tmp_path / "b" / "manifest.json")["shots"] == 3
    assert load_bare(make_llama(), tmp_path / "b").price().parameters == 0
    other = make_llama()
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    with pytest.raises(BaseMismatch, match="was made for a base with hash"):
        load_bare(other, tmp_path / "b")
    (tmp_path / "b" / "manifest.json").write_text('{"kind": "router"}')
    with pytest.raises(CheckpointError, match="holds no bare base"):
        load_bare(make_llama(), tmp_path / "b")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, micro_base):
    folder = tmp_path_factory.mktemp("bare")
    write_rows(folder / "rows.jsonl")
    config = make_config(folder, micro_base, arms=ARMS)
    events = []
    return config, run(config, events.append), events


def test_a_run_reports_it_beside_the_others(finished):
    _, result, events = finished
    folder = RunFolder(result.folder)
    assert list(result.verdicts) == ["v4"]
    assert set(read_json(folder.verdicts)["controls"]) == {"base", "base-2shot"}
    report = (result.folder / "report.md").read_text()
    assert "the base itself, zero-shot" in report
    assert "the base itself, 2 examples of the skill shown" in report
    (line,) = [row for row in report.splitlines() if row.startswith("| base |") and "–" in row]
    assert "| – | 0 (×0.00) | 0 (×0.00) |" in line
    assert {event.detail for event in events if event.stage == "arm base"} == {
        "the bare base, zero-shot"
    }


def test_zero_shot_answers_do_not_depend_on_the_seed_and_are_computed_once(finished):
    config, result, _ = finished
    folder = RunFolder(result.folder)
    said = {
        (arm, seed): [row["prediction"] for row in read_jsonl(folder.cell(arm, seed).predictions)]
        for arm in ("base", "base-2shot")
        for seed in config.seeds
    }
    assert said["base", 0] == said["base", 1]
    taken = read_json(folder.cell("base", 1).measurement)["meta"]["taken_over"]
    assert taken == len(said["base", 1]) == 24
    assert read_json(folder.cell("base", 0).measurement)["meta"]["taken_over"] == 0


def test_a_checkpoint_of_it_is_nothing_to_open(finished):
    config, result, _ = finished
    checkpoint = RunFolder(result.folder).cell("base", 0).checkpoint
    with pytest.raises(CheckpointError, match="holds no adapter: its arm was the bare base"):
        evaluate(config, checkpoint)


def inputs_of(tmp_path, tokenizer, rows, max_length=64):
    config = make_config(tmp_path, tmp_path, arms=ARMS)
    training = config.training.model_copy(update={"max_length": max_length})
    config = config.model_copy(update={"training": training})
    folder = RunFolder(tmp_path / "run")
    return RunInputs(config, folder, [rows], [], make_llama(), tokenizer, "cpu", {}, "b")


def test_no_example_is_cut_off_and_what_the_base_cannot_hold_is_refused(tmp_path, tokenizer):
    named = [r.__class__(**{**vars(r), "task": "t"}) for r in task(20).dev]
    rows = task(4, train=named[4:], dev=named[:4])
    inputs = inputs_of(tmp_path, tokenizer, rows)
    assert few_shot(inputs, 0, 0) == ([rows], 64)
    (shown,), max_length = few_shot(inputs, 4, 0)
    longest = max(len(encode(row, tokenizer, 10_000)) for row in shown.dev)
    assert max_length == longest > 64
    assert few_shot(inputs_of(tmp_path, tokenizer, rows, 500), 4, 0)[1] == 500
    inputs.model.config.max_position_embeddings = longest - 1
    with pytest.raises(MeasurementError, match=rf"behind 4 examples has .*, with its answer \d+; the base has room for {longest - 1}"):  # fmt: skip
        few_shot(inputs, 4, 0)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"adapters": {"rank": 2}}, r"arms\.b: adapters has no effect with shots: 0"),
        ({"training": {"steps": 2}}, r"arms\.b: training has no effect"),
        ({"match": "flops"}, r"arms\.b: match has no effect"),
        ({"route": "gold"}, r"arms\.b: route has no effect"),
        ({"role": "candidate"}, "the bare base has no adapter .* Set `role: control`"),
        ({"shots": -1}, "greater than or equal to 0"),
    ],
)
def test_what_has_no_effect_on_the_bare_base_is_refused(tmp_path, arm, message):
    bare = {"name": "b", "shots": 0, "role": "control", **arm}
    values = make_config(tmp_path, tmp_path).model_dump(mode="json")
    values |= {"arms": [ARMS[0], bare], "routing": {}}
    with pytest.raises((ConfigError, ValueError), match=message):
        ExperimentConfig.model_validate(values)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"name": "b", "shots": 99, "role": "control"}, "99 shots of mine need"),
        ({"name": "e", "route": "encoder", "role": "control"}, "No sentence-transformers model"),
    ],
)
def test_what_would_end_a_long_run_late_ends_it_before_anything_is_trained(
    tmp_path, micro_base, arm, message
):
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "nothing").mkdir()
    routing = {"encoder": str(tmp_path / "nothing")}
    config = make_config(tmp_path, micro_base, arms=[ARMS[0], arm], routing=routing)
    with pytest.raises(DataError, match=message):
        run(config)
    assert not (tmp_path / "runs" / "small" / "arms").exists()


def test_tuning_does_not_touch_it(tmp_path):
    plain, tuned = (
        make_config(tmp_path, tmp_path, arms=ARMS),
        make_config(
            tmp_path,
            tmp_path,
            arms=ARMS,
            tuning={"rates": [1e-3, 1e-2], "steps": 2},
            data={"tasks": ["forms"], "validation_rows": 2},
        ),
    )
    keys = []
    for config in (plain, tuned):
        inputs = RunInputs(
            config, RunFolder(tmp_path / "run"), [], [], make_llama(), None, "cpu", {"train": "d"}, "b"
        )  # fmt: skip
        plans = {plan.arm.name: plan for plan in plan_arms(inputs.model, config)}
        keys.append([cell_key(inputs, plans[name], 0) for name in ("base", "base-2shot", "v4")])
    assert keys[0][:2] == keys[1][:2] and len({*keys[0], *keys[1]}) == 4


def test_it_is_no_control_that_a_candidate_is_held_against(tmp_path):
    config = make_config(tmp_path, tmp_path, arms=ARMS)
    assert config.variant_of(ArmConfig(name="b", shots=0)) == "base"
    assert controls_of(config, config.arms[3]) == []
    plans = {plan.arm.name: plan for plan in plan_arms(make_llama(), config)}
    assert plans["base"].adapter is None and plans["base"].record() == {}
