"""As a PEFT method: what people do with PEFT, done with BEM."""

import subprocess
import sys

import peft
import pytest
import torch

import bem
from bem import BemConfig
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import VOCAB, tiny_model
from bem.errors import AttachError
from tests.conftest import make_llama


def config(variant="v1", **settings):
    return BemConfig(variant=variant, rank=4, chunk_size=8, task_type="CAUSAL_LM", **settings)


def perturb(model, name):
    torch.manual_seed(len(name))
    for key, parameter in model.named_parameters():
        if ".bem_" in key and f".{name}" in key:
            parameter.data = torch.randn_like(parameter) * 0.2


def test_get_peft_model_reports_what_trains():
    model = peft.get_peft_model(tiny_model("llama"), config())
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total
    assert all(".bem_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_two_adapters_side_by_side_and_switched():
    model = peft.get_peft_model(tiny_model("llama"), config()).eval()
    base = probe.logits(model, probe.token_ids())
    perturb(model, "default")
    first = probe.logits(model, probe.token_ids())
    model.add_adapter("other", config("v4"))
    perturb(model, "other")
    assert torch.equal(probe.logits(model, probe.token_ids()), first)
    model.set_adapter("other")
    second = probe.logits(model, probe.token_ids())
    assert not torch.allclose(second, first, atol=1e-2) and not torch.allclose(
        second, base, atol=1e-2
    )
    model.set_adapter("default")
    assert torch.equal(probe.logits(model, probe.token_ids()), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(probe.logits(model, probe.token_ids()), second)


def test_two_adapters_at_once_are_refused():
    model = peft.get_peft_model(tiny_model("llama"), config())
    model.add_adapter("other", config())
    with pytest.raises(AttachError, match="one BEM adapter is active at a time"):
        model.base_model.set_adapter(["default", "other"])


def test_merging_is_refused_with_a_way_out():
    model = peft.get_peft_model(tiny_model("llama"), config("s0"))
    with pytest.raises(NotImplementedError, match="save_lora"):
        model.merge_and_unload()


def test_transformers_saves_and_loads_it(tmp_path):
    model = tiny_model("llama")
    try:
        model.add_adapter(config())
    except ValueError as error:
        if "version of PEFT" in str(error):
            pytest.skip(f"this transformers and this PEFT do not work together: {error}")
        raise
    perturb(model, "default")
    wanted = probe.logits(model, probe.token_ids())
    model.save_pretrained(tmp_path)
    other = tiny_model("llama")
    other.load_adapter(str(tmp_path))
    assert torch.equal(probe.logits(other, probe.token_ids()), wanted)


def test_loading_with_low_cpu_memory(tmp_path):
    model = peft.get_peft_model(tiny_model("llama"), config()).eval()
    perturb(model, "default")
    wanted = probe.logits(model, probe.token_ids())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        tiny_model("llama"), str(tmp_path), low_cpu_mem_usage=True
    )
    assert torch.equal(probe.logits(loaded, probe.token_ids()), wanted)


COMPILED = """
import peft, torch, bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
model = tiny_model("llama")
before = torch.compile(model, fullgraph=True, backend="eager")
config = bem.BemConfig("v1", rank=4, chunk_size=8, task_type="CAUSAL_LM")
attached = probe.perturbed(bem.from_peft(peft.get_peft_model(model, config)))
logits = probe.logits(attached.model, probe.token_ids())
after = torch.compile(attached.model, fullgraph=True, backend="eager")
for compiled in (before, after):
    assert torch.allclose(probe.logits(compiled, probe.token_ids()), logits, atol=1e-5)
"""


def test_the_whole_model_compiles_without_a_graph_break():
    """In a process of its own: checking the shapes of signatures breaks graphs."""
    run = [sys.executable, "-c", COMPILED]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_trainer_trains_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = peft.get_peft_model(tiny_model("llama"), config())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    row = {"input_ids": list(range(1, 25)), "labels": [-100] * 10 + list(range(11, 25))}
    assert max(row["input_ids"]) < VOCAB
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        learning_rate=3e-2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=[row] * 8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] * 0.8
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_two_forwards_before_one_backward_under_checkpointing_are_exact():
    model = peft.get_peft_model(tiny_model("llama"), config(mask="fixed"))
    perturb(model, "default")
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def gradients():
        trained = [p for p in model.parameters() if p.grad is not None]
        values = [p.grad.clone() for p in trained]
        model.zero_grad()
        return values

    rows = [probe.token_ids(), probe.token_ids().flip(1)]
    both = [loss(ids) for ids in rows]
    (both[0] + both[1]).backward()
    together = gradients()
    for ids in rows:
        loss(ids).backward()
    one_by_one = gradients()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, one_by_one, strict=True))


IN_A_NEW_PROCESS = """
import sys
{first}
assert "torch" not in sys.modules or {torch}
import peft
from tests.conftest import make_llama
model = peft.PeftModel.from_pretrained(make_llama(), sys.argv[1])
assert any(".bem_" in name for name, _ in model.named_parameters())
assert peft.PeftConfig.from_pretrained(sys.argv[1]).variant == "v1"
"""


@pytest.mark.parametrize(
    ("first", "torch_is_there"),
    [("import bem", False), ("import peft; import bem", True), ("import bem; bem.attach", True)],
)
def test_importing_bem_is_enough_for_peft_to_load_it(tmp_path, first, torch_is_there):
    bem.attach(make_llama(), "v1", rank=2).save(tmp_path / "a")
    code = IN_A_NEW_PROCESS.format(first=first, torch=torch_is_there)
    run = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_looking_for_peft_without_importing_it_registers_nothing():
    code = (
        "import bem, importlib.util, sys; assert importlib.util.find_spec('peft'); "
        "assert 'peft' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
