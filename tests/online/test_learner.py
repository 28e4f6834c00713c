import pytest

from bem.config import OnlineConfig, parse
from bem.errors import ConfigError
from bem.online.learner import Learner
from bem.online.replay import Item
from tests.online.toys import CONFIG, Toy


class Recorder(Toy):
    """Keeps what it was taught."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def learn(self, lessons):
        self.batches.append([lesson["id"][0] for lesson in lessons])
        return super().learn(lessons)


def learner(trusted=12, **changes):
    config = OnlineConfig(**{**CONFIG.model_dump(), "batch_size": 8, **changes})
    made = Learner(Recorder(), config)
    made.trust([item(f"t{i}") for i in range(trusted)])
    for i in range(400):
        made.take_in(item(f"s{i}"), labelled=False)
    return made


def item(id):
    return Item(id, f"user {id}", {"skill": 0, "target": 1.0, "id": id})


def test_a_full_reservoir_does_not_crowd_out_what_is_trusted():
    """400 lessons of a stream and 6 trusted ones: of a batch of 8 four are fresh and two trusted at least."""
    made = learner()
    for _ in range(20):
        assert made.step().taken
    assert all(batch[4:6] == ["t", "t"] for batch in made.trainee.batches)
    assert sum(batch[6:].count("t") for batch in made.trainee.batches) <= 4


def test_without_trusted_lessons_a_batch_is_full():
    made = learner(trusted=0)
    assert made.step().taken and len(made.trainee.batches[0]) == 8


@pytest.mark.parametrize("size", [1, 3])
def test_shares_that_are_rounded_up_fit_into_the_batch(size):
    made = learner(batch_size=size, fresh_share=0.5, trusted_share=0.5)
    assert made.step().taken and len(made.trainee.batches[0]) == size


def test_shares_above_one_are_refused():
    with pytest.raises(ConfigError, match="fresh_share"):
        parse(OnlineConfig, {"fresh_share": 0.9, "trusted_share": 0.2}, "here")
