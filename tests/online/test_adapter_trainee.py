import hashlib
import math

import pytest
import torch

import bem
from bem.adapters.copies import without_adapter
from bem.config import OnlineConfig
from bem.errors import CheckpointError
from bem.online.adapter_trainee import AdapterTrainee, lesson_of
from bem.online.marks import marks_by
from bem.online.stream import Turn
from bem.runs.release import read_content
from bem.training.answers import greedy_answers
from bem.training.data import encode
from bem.training.example import Example
from tests.conftest import make_llama, make_tokenizer

CONFIG = OnlineConfig(learning_rate=0.02, batch_size=4, max_length=64, largest_step=0.1, pull=0.1)
TURNS = [
    Turn(Example(f"r{i}", f"name the {w}", (w,)), f"u{i}")
    for i, w in enumerate(["function", "value", "docstring", "return"])
]


def trainee(metric="exact", variant="s0", **changes):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    attached = bem.attach(make_llama(), variant, rank=4)
    config = OnlineConfig(**{**CONFIG.model_dump(), **changes})
    return AdapterTrainee(attached, tokenizer, marks_by(metric, tokenizer, 64), config), attached


def taught(made, steps=40):
    lessons = [lesson_of(turn) for turn in TURNS]
    return [made.learn(lessons) for _ in range(steps)]


@pytest.fixture(scope="module")
def learned():
    made, attached = trainee(pull=0.0, learning_rate=0.03, largest_step=1.0, largest_distance=50.0)
    return made, attached, taught(made, 150)


def test_it_learns_what_was_corrected_and_what_serves_is_untouched(learned):
    made, attached, steps = learned
    before = made.answers(made.born, TURNS, None)
    after = made.answers(made.weights(), TURNS, None)
    assert [a.score for a in before] == [0.0] * 4 and [a.score for a in after] == [1.0] * 4
    assert all(s.taken for s in steps) and steps[-1].loss < steps[0].loss
    now = attached.state_dict()
    assert all(torch.equal(now[name], t) for name, t in made.born.items())


def test_an_exact_answer_is_what_generate_gives(learned):
    """The oracle: token by token through the cache, at every tenth of the way from old to new weights."""
    made, _, _ = learned
    new, tokenizer = made.weights(), made.tokenizer
    for share in (0.3, 0.5, 0.7, 1.0):
        mixed = {n: old + share * (new[n] - old) for n, old in made.born.items()}
        scores = [a.score for a in made.answers(mixed, TURNS, None)]
        prompts = [encode(t.row, tokenizer, 64, with_answer=False) for t in TURNS]
        given = greedy_answers(made._stage.model, tokenizer, prompts, 16)
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in given]
        assert scores == [float(a == t.row.answer) for a, t in zip(texts, TURNS, strict=True)]


def test_a_step_is_no_longer_than_its_bound_and_stays_near_what_was_accepted():
    made, _ = trainee(largest_step=0.01, largest_distance=0.05)
    lengths = [s.length for s in taught(made, 3)]
    assert max(lengths) == pytest.approx(0.01)
    steps = taught(made, 30)
    assert not steps[-1].taken and "away from the last accepted version" in steps[-1].reason


def test_a_step_that_is_not_finite_is_discarded_bit_for_bit():
    made, _ = trainee()
    taught(made, 2)
    before, state = made.weights(), made._trainer.state_dict()
    loss = made._trainer._losses
    made._trainer._losses = lambda *args: tuple(part * math.inf for part in loss(*args))
    step = made.learn([lesson_of(t) for t in TURNS])
    assert not step.taken and "which was not taken" in step.reason
    assert all(torch.equal(before[n], t) for n, t in made.weights().items())
    assert made._trainer.steps == state["steps"] == 2


def test_a_lesson_that_cannot_be_encoded_is_discarded():
    made, _ = trainee()
    step = made.learn([{"asked": {"input": "q"}, "answer": "value " * 200}])
    assert not step.taken and "only 61 fit" in step.reason


def test_from_its_state_it_goes_on_with_the_same_bits():
    one, _ = trainee(ewc=1.0)
    taught(one, 3)
    one.accept(one.weights(), [lesson_of(t) for t in TURNS])
    state = one.state()
    other, _ = trainee(ewc=1.0)
    other.load_state(state)
    assert [s.loss for s in taught(one, 3)] == [s.loss for s in taught(other, 3)]
    assert all(torch.equal(t, other.weights()[n]) for n, t in one.weights().items())


def test_elastic_weights_hold_it_near_an_accepted_version():
    """In the directions that matter: each weight's move counts by its Fisher information."""
    moved = []
    for strength in (1e-9, 1e6):
        made, _ = trainee(ewc=strength, pull=0.0)
        taught(made, 5)
        made.accept(made.weights(), [lesson_of(t) for t in TURNS])
        taught(made, 5)
        moved.append(float(made._ewc.penalty(made._named())[0]) / strength)
    assert 0 < moved[1] < 0.1 * moved[0]


@pytest.mark.parametrize("variant", ["s0", "v1"])
def test_a_checkpoint_is_the_version_and_the_same_bytes_every_time(tmp_path, variant):
    made, _ = trainee(variant=variant)
    taught(made, 2)
    weights = made.weights()
    made.save(weights, tmp_path / "a")
    made.save(made.born, tmp_path / "b")
    made.save(weights, tmp_path / "c")
    content = read_content(tmp_path / "a")
    assert content.version == made.digest(weights) != made.digest(made.born)
    assert content.files == read_content(tmp_path / "c").files
    again = made.read(tmp_path / "a")
    assert all(torch.equal(again[n], t) for n, t in weights.items())
    assert hashlib.sha256((tmp_path / "a" / "manifest.json").read_bytes()).hexdigest()


def test_another_adapter_is_refused(tmp_path):
    made, _ = trainee()
    bem.attach(without_adapter(made._stage), "s0", rank=2).save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds another adapter than the one that learns"):
        made.read(tmp_path / "a")
