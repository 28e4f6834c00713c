"""As a PEFT method: what people do with PEFT, done with BEM."""

import peft
import pytest
import torch

from bem import BemConfig
from bem.adapters.checks import _ids, _logits
from bem.adapters.checks_models import VOCAB, tiny_model
from bem.errors import AttachError


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
    base = _logits(model, _ids())
    perturb(model, "default")
    first = _logits(model, _ids())
    model.add_adapter("other", config("v4"))
    perturb(model, "other")
    assert torch.equal(_logits(model, _ids()), first)
    model.set_adapter("other")
    second = _logits(model, _ids())
    assert not torch.allclose(second, first, atol=1e-2) and not torch.allclose(
        second, base, atol=1e-2
    )
    model.set_adapter("default")
    assert torch.equal(_logits(model, _ids()), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(_logits(model, _ids()), second)


def test_two_adapters_at_once_are_refused():
    model = peft.get_peft_model(tiny_model("llama"), config())
    model.add_adapter("other", config())
    with pytest.raises(AttachError, match="one BEM adapter is active at a time"):
        model.base_model.set_adapter(["default", "other"])


def test_target_modules_on_queries_are_refused():
    with pytest.raises(AttachError, match="q_proj"):
        config(target_modules=["q_proj", "o_proj"])


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
    wanted = _logits(model, _ids())
    model.save_pretrained(tmp_path)
    other = tiny_model("llama")
    other.load_adapter(str(tmp_path))
    assert torch.equal(_logits(other, _ids()), wanted)


def test_loading_with_low_cpu_memory(tmp_path):
    model = peft.get_peft_model(tiny_model("llama"), config()).eval()
    perturb(model, "default")
    wanted = _logits(model, _ids())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        tiny_model("llama"), str(tmp_path), low_cpu_mem_usage=True
    )
    assert torch.equal(_logits(loaded, _ids()), wanted)


def test_the_whole_model_compiles_without_a_graph_break():
    model = peft.get_peft_model(tiny_model("llama"), config()).eval()
    perturb(model, "default")
    wanted = _logits(model, _ids())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(_logits(compiled, _ids()), wanted, atol=1e-5)


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


def test_two_forwards_before_one_backward_under_checkpointing_are_refused():
    from bem.errors import TrainingError

    model = peft.get_peft_model(tiny_model("llama"), config())
    perturb(model, "default")
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [model(input_ids=_ids(), labels=_ids(), use_cache=False).loss for _ in range(2)]
    with pytest.raises(TrainingError, match="two forward passes before one backward"):
        (losses[0] + losses[1]).backward()
