"""A static LoRA learns what a routed stack says; the teacher and the base stay as they are."""

import math

import pytest
import torch

import bem
from bem.adapters.copies import without_adapter
from bem.config import TrainingConfig
from bem.errors import TrainingError
from bem.training.data import Example, collate, encode
from bem.training.distill import answer_kl, distill, divergence
from bem.training.losses import answer_logits
from tests.conftest import make_llama
from tests.routing.mounted import mounted


def rows(n=12):
    words = ["name", "the", "function", "that", "this", "docstring"]
    return [
        Example(str(i), " ".join(words[i % 3 :]), (" ".join(words[: 1 + i % 5]),)) for i in range(n)
    ]


def sharp_llama():
    """Logits of a size at which experts make a difference."""
    model = make_llama(tie_word_embeddings=False)
    model.lm_head.weight.data *= 20
    return model


def routed(model=None):
    """Three strong experts and a router, untrained: it chooses all the same."""
    made = mounted(model or sharp_llama())
    for stack in made.stacks.values():
        for u in stack.u.values():
            u.data *= 20
    return made


def settings(**changes):
    values = {"steps": 30, "batch_size": 4, "learning_rate": 0.01, "checkpoint_every": 10}
    return TrainingConfig(**{**values, "max_length": 128, **changes})


def test_the_divergence_of_a_hand_made_pair_is_the_formula():
    teacher = torch.tensor([[[0.0, math.log(3.0)], [9.0, 9.0], [0.0, 0.0]]])  # p = 1/4, 3/4
    student = torch.tensor([[[0.0, 0.0], [1.0, 5.0], [0.0, 0.0]]])  # q = 1/2, 1/2
    targets = torch.tensor([[1, -100, -100]])  # column 0 predicts the one answer token
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(answer_kl(teacher, student, targets)) == pytest.approx(by_hand)
    both = torch.tensor([[1, 0, -100]])  # column 1 counts too: p = 1/2, 1/2
    q = torch.tensor([1.0, 5.0]).softmax(-1)
    second = sum(0.5 * math.log(0.5 / float(x)) for x in q)
    assert float(answer_kl(teacher, student, both)) == pytest.approx(by_hand + second)


@pytest.mark.parametrize("kind", ["routed", "v1"])
def test_the_student_comes_close_and_nothing_else_moves(kind, tokenizer, tmp_path):
    model = sharp_llama()
    base = {n: p.clone() for n, p in model.named_parameters()}
    teacher = routed(model) if kind == "routed" else bem.attach(model, "v1", rank=4)
    if kind == "v1":
        for p in teacher.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    batch = collate([encode(e, tokenizer, 128) for e in rows(3)], 0)
    said = answer_logits(teacher.model, batch)
    at_birth = divergence(teacher, without_adapter(teacher), tokenizer, rows())
    made = distill(teacher, tokenizer, rows(), 8, settings(steps=20), tmp_path, seed=0)
    assert made.training.losses[0] == pytest.approx(at_birth, rel=0.5) and at_birth > 0.1
    after = divergence(teacher, made.student.model, tokenizer, rows())
    assert after < 0.5 * at_birth
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    assert torch.equal(answer_logits(teacher.model, batch), said)
    now = dict(made.student.detach().named_parameters())
    assert all(torch.equal(p, base[n]) for n, p in now.items())
    mine = {p.data_ptr() for p in teacher.base.parameters()}
    assert all(p.data_ptr() in mine for p in now.values())  # no second copy of the weights


def test_the_divergence_is_that_of_whole_forward_passes_one_by_one(tokenizer, tmp_path):
    teacher = routed()
    student = without_adapter(teacher)
    total = count = 0.0
    for example in rows(5):
        e = encode(example, tokenizer, 128)
        ids, turns = torch.tensor([e.input_ids]), torch.tensor([e.turn_starts])
        with torch.no_grad():
            p = teacher.model(input_ids=ids, turn_starts=turns).logits[0].softmax(-1)
            q = student(input_ids=ids).logits[0].softmax(-1)
        for t in range(e.prompt_length, len(e)):
            total += float((p[t - 1] * (p[t - 1] / q[t - 1]).log()).sum())
            count += 1
    found = divergence(teacher, student, tokenizer, rows(5), batch_size=2)
    assert found == pytest.approx(total / count, rel=1e-4)
    with pytest.raises(TrainingError, match="no examples"):
        divergence(teacher, student, tokenizer, [])


def test_the_same_seed_gives_the_same_weights_also_after_a_kill(tokenizer, tmp_path):
    teacher = routed()

    def run(folder, seed=0, stop=None):
        def kill(step):
            if step.step == stop:
                raise KeyboardInterrupt

        short = settings(steps=6, checkpoint_every=2)
        made = distill(teacher, tokenizer, rows(), 4, short, tmp_path / folder, seed, kill)
        return made.student.state_dict()

    one, other = run("one"), run("another seed", seed=1)
    with pytest.raises(KeyboardInterrupt):
        run("killed", stop=3)
    for again in (run("again"), run("killed")):
        assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_state_belongs_to_one_teacher(tokenizer, tmp_path):
    teacher = routed()
    distill(teacher, tokenizer, rows(), 4, settings(steps=2), tmp_path, seed=0)
    with torch.no_grad():
        next(iter(teacher.stacks.values())).u["0"].mul_(2)
    with pytest.raises(TrainingError, match="objective was KL to"):
        distill(teacher, tokenizer, rows(), 4, settings(steps=2), tmp_path, seed=0)


def test_the_student_is_saved_as_s0_and_as_a_plain_lora(tokenizer, tmp_path):
    from peft import PeftModel

    teacher = routed()
    made = distill(teacher, tokenizer, rows(), 4, settings(steps=4), tmp_path / "work", seed=0)
    ids = torch.arange(2, 40)[None]
    said = made.student.model(input_ids=ids).logits
    made.student.save(tmp_path / "s0", made.training.data_hash)
    made.student.save_lora(tmp_path / "lora")
    loaded = bem.load(sharp_llama(), tmp_path / "s0").model
    plain = PeftModel.from_pretrained(sharp_llama(), tmp_path / "lora")
    for again in (loaded, plain):
        torch.testing.assert_close(again(input_ids=ids).logits, said, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sharp_llama()(input_ids=ids).logits, said, atol=1e-3)


def test_it_is_stopped_early_where_the_settings_say_so(tokenizer, tmp_path):
    teacher, given = routed(), rows()
    patient = settings(steps=4, patience=1, evaluate_every=2)
    made = distill(
        teacher, tokenizer, given[:8], 4, patient, tmp_path, seed=0, validation=given[8:]
    )
    assert made.training.validation and made.training.best_step in (2, 4)
