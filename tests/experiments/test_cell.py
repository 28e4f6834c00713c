"""A cell keeps every fact that was measured, and is named by everything that it depends on."""

import pytest

import bem
from bem.config import AdapterConfig, ArmConfig, GatesConfig
from bem.experiments.adapted import adapted, put_on
from bem.experiments.cell import cell_key, seeded, with_plans
from bem.experiments.inputs import RunInputs
from bem.experiments.measuring.answers import measure
from bem.experiments.plan import Layers, Plan
from bem.routing.mount import blank_expert, mount
from bem.runs.folder import RunFolder
from bem.stats.costs import cost_checks
from bem.tasks.load import Task
from bem.training.data import Example
from tests.experiments.test_run import make_config

LAYERS = Layers((0, 1), 2)


def rows(note):
    return [Example(f"r{i}", f"{note}: say {i}", ("value",), group=f"g{i}") for i in range(24)]


def test_a_routed_arm_on_retrieval_tasks_keeps_its_index_swap_beside_its_plans(
    micro_llama, tokenizer
):
    worse = {"corrupt": rows("return"), "shuffled": rows("name")}
    task = Task("t", [], rows("value"), ("em", "loss"), "em", max_new_tokens=2, variants=worse)
    mounted = mount(micro_llama, [blank_expert(micro_llama, name, 2) for name in ("a", "b")])
    facts = with_plans(measure(mounted, tokenizer, task), [1, 2, 1])
    assert facts.router.plan_lengths == [1, 2, 1]
    assert set(facts.router.index_swap) == {"clean", "corrupt", "shuffled"}
    gates = GatesConfig(waived=("budget", "latency", "memory", "kv_hit"), n_bootstrap=100)
    judged = " ".join(check.name for check in cost_checks(facts, facts, gates))
    assert "plan" in judged and "corrupt" in judged and "shuffled" in judged


def test_an_arm_without_a_router_has_plans_alone(micro_llama, tokenizer):
    task = Task("t", [], rows("value")[:2], ("em", "loss"), "em", max_new_tokens=2)
    with adapted(micro_llama, AdapterConfig(rank=2)) as attached:
        measurement = measure(attached, tokenizer, task)
    assert measurement.router is None
    assert with_plans(measurement, [2]).router.index_swap is None


def test_the_base_is_the_same_object_and_bare_again_after_every_adapter(micro_llama):
    blanks = [blank_expert(micro_llama, name, 2) for name in ("a", "b")]
    for context in (
        adapted(micro_llama, AdapterConfig(variant="v1")),
        put_on(micro_llama, lambda base: mount(base, blanks)),
    ):
        with context as attached:
            assert attached.base is micro_llama and micro_llama.peft_config
        assert not getattr(micro_llama, "peft_config", None)
    with pytest.raises(KeyboardInterrupt), adapted(micro_llama, AdapterConfig()):
        raise KeyboardInterrupt
    bem.attach(micro_llama, "s0")


def make_inputs(tmp_path, **changes) -> RunInputs:
    config = make_config(tmp_path, tmp_path / "base", **changes)
    folder = RunFolder(tmp_path / "run")
    return RunInputs(config, folder, [], [], None, None, "cpu", {"train": "d"}, "b")


def test_a_cell_is_named_by_adapter_seed_training_data_and_base(tmp_path):
    plan = Plan(ArmConfig(name="v1"), AdapterConfig(variant="v1", seed=3), LAYERS)
    inputs = make_inputs(tmp_path)
    key = cell_key(inputs, plan, 0)
    assert key == cell_key(make_inputs(tmp_path), plan, 0)
    wider = Plan(plan.arm, AdapterConfig(variant="v1", rank=9), LAYERS)
    longer = make_inputs(tmp_path, training={"steps": 5, "batch_size": 4, "max_length": 64})
    others = [
        cell_key(inputs, plan, 1),
        cell_key(inputs, wider, 0),
        cell_key(longer, plan, 0),
        cell_key(RunInputs(**{**vars(inputs), "data": {"train": "other"}}), plan, 0),
        cell_key(RunInputs(**{**vars(inputs), "base": "other"}), plan, 0),
    ]
    assert len({key, *others}) == 6
    assert [seeded(plan, seed).seed for seed in (0, 2)] == [3, 5]
