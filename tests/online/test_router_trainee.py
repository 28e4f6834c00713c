import numpy as np
import pytest
import torch

from bem.config import OnlineConfig
from bem.online.marks import marks_by
from bem.online.router_trainee import FLOOR, RouterTrainee, chance_of
from bem.online.stream import Turn
from bem.training.example import Example
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

CONFIG = OnlineConfig(
    learning_rate=0.2,
    batch_size=8,
    max_length=64,
    explore=0.5,
    largest_step=0.5,
    largest_distance=5.0,
    kl_near=0.3,
    kl_far=3.0,
)
TURNS = [Turn(Example(f"r{i}", f"name the value {i}", ("value",)), f"u{i}") for i in range(12)]


def trainee(close=None, **changes):
    torch.manual_seed(0)
    tokenizer, made = make_tokenizer(), mounted(make_llama())
    if close is not None:
        with torch.no_grad():
            made.router.policy.actor.expert_bias.bias[close] = -30.0
    config = OnlineConfig(**{**CONFIG.model_dump(), **changes})
    return RouterTrainee(made, tokenizer, marks_by("tokens", tokenizer, 64), config), made


@pytest.fixture(scope="module")
def lessons():
    made, _ = trainee()
    answers = made.answers(made.born, TURNS * 3, np.random.default_rng(0))
    return [a.lesson for a in answers]


def favouring(lessons, option):
    """As if this expert alone were right."""
    return [{**lesson, "score": float(lesson["option"] == option)} for lesson in lessons]


def chance(made, lessons, option):
    obs = torch.tensor([lesson["observed"] for lesson in lessons])
    return float(
        made.actor.distribution(obs, made._masks(len(obs))).probs[0][:, option].mean().detach()
    )


def test_what_chance_chose_is_marked_and_its_chance_is_known():
    made, _ = trainee()
    answers = made.answers(made.born, TURNS, np.random.default_rng(0))
    assert {a.explored for a in answers} == {True, False}
    assert not any(a.explored for a in made.answers(made.born, TURNS, None))
    for a in answers:
        assert a.lesson["chance"] in (pytest.approx(0.625), pytest.approx(0.125))
        assert a.counts == (not a.explored)
    assert sum(chance_of(o, 2, 4, 0.5) for o in range(4)) == pytest.approx(1.0)


def test_it_learns_which_expert_was_right(lessons):
    made, _ = trainee()
    before = chance(made, lessons, 2)
    steps = [made.learn(favouring(lessons, 2)) for _ in range(30)]
    assert steps[0].taken and chance(made, lessons, 2) > before + 0.2


def test_whatever_is_learned_both_policies_stay_near(lessons):
    made, _ = trainee(kl_near=0.02, kl_far=0.05)
    for _ in range(40):
        made.learn(favouring(lessons, 3))
    near, far = made._region.kl(made.actor)
    assert near <= 0.02 and far <= 0.05
    for _ in range(3):
        made.accept(made.weights(), lessons)
        for _ in range(10):
            made.learn(favouring(lessons, 3))
    assert 0.02 < made._region.kl(made.actor)[1] <= 0.05


def test_an_option_that_was_never_right_can_be_learned():
    made, _ = trainee(close=3)
    assert float(made.born["expert_bias.bias"][3]) == FLOOR
    answers = made.answers(made.born, TURNS * 4, np.random.default_rng(1))
    seen = favouring([a.lesson for a in answers], 3)
    before = chance(made, seen, 3)
    for _ in range(30):
        made.learn(seen)
    assert chance(made, seen, 3) > 3 * before


def test_a_step_that_is_not_finite_is_discarded_bit_for_bit(lessons):
    made, _ = trainee()
    made.learn(lessons)
    before = made.weights()
    step = made.learn([{**lesson, "score": float("nan")} for lesson in lessons])
    assert not step.taken and "is not finite" in step.reason
    assert all(torch.equal(before[n], t) for n, t in made.weights().items())


def test_from_its_state_it_goes_on_with_the_same_bits(lessons):
    one, _ = trainee(ewc=0.1)
    one.learn(favouring(lessons, 1))
    one.accept(one.weights(), lessons)
    one.learn(favouring(lessons, 1))
    other, _ = trainee(ewc=0.1)
    other.load_state(one.state())
    for made in (one, other):
        made.learn(favouring(lessons, 2))
    assert all(torch.equal(t, other.weights()[n]) for n, t in one.weights().items())


def test_a_checkpoint_is_the_version_and_what_serves_is_untouched(tmp_path, lessons):
    made, serving = trainee()
    version = serving.version.digest
    for _ in range(5):
        made.learn(favouring(lessons, 2))
    weights = made.weights()
    made.save(weights, tmp_path / "a")
    again = made.read(tmp_path / "a")
    assert all(torch.equal(again[n], t) for n, t in weights.items())
    assert made.digest(weights) != made.digest(made.born) and serving.version.digest == version
