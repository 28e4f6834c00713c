"""Each turn goes to the expert whose training turns its own text is nearest to, and nothing else is read."""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from bem.bases.cache import is_here
from bem.bases.named import NAMED
from bem.config import RoutingConfig
from bem.errors import DataError, MissingExtra
from bem.evidence import encoders
from bem.experiments.routing.encoder import encoder_route, fit_nearest, said
from bem.experiments.routing.skills import skills_of
from bem.tasks.load import Task
from bem.training.data import Example


def test_the_class_with_the_largest_cosine_to_the_mean_of_its_texts_is_chosen():
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    nearest = fit_nearest(vectors, np.array([2, 2, 1, 3]))
    # the mean of class 2 is (.9, .3), of norm .9487
    assert nearest.classes.tolist() == [1, 2, 3]
    np.testing.assert_allclose(nearest.centroids, [[0, 1], [0.94868, 0.31623], [-1, 0]], atol=1e-5)
    # cosines of (.6, .8): .8, .8222, -.6; of (.58, .8146): .8146, .8078
    asked = np.array([[0.6, 0.8], [0.58, 0.8146], [-0.9, 0.436]])
    assert nearest(asked).tolist() == [2, 1, 3]


def test_a_class_that_no_text_is_of_is_never_chosen_however_far_the_others_are():
    nearest = fit_nearest(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 3]))
    assert nearest(np.array([[-1.0, -0.5]])).tolist() == [3]


def row(i, task, text, history=(), skills=None):
    meta = {"skills": skills} if skills else {}
    return Example(f"{task}{i}", text, ("yes",), task=task, history=history, meta=meta)


SQL = "Write the SQL query. How many {} are there?"
QA = "Answer from the story. Where is {}?"
TRAIN = [
    *[row(i, "sql", SQL.format(w)) for i, w in enumerate(("orders", "teams", "players"))],
    *[row(i, "qa", QA.format(w)) for i, w in enumerate(("Mary", "Daniel", "the milk"))],
]


def artifacts(encoder, told=None):
    tasks = [
        Task(name, [r for r in TRAIN if r.task == name], [], ("em",), "em", max_new_tokens=2)
        for name in ("sql", "qa")
    ]
    return SimpleNamespace(
        routing=RoutingConfig(encoder=encoder),
        inputs=SimpleNamespace(device="cpu"),
        skills=skills_of(RoutingConfig(), tasks),
        labelled_rows=lambda: TRAIN,
        say=lambda *at: told is None or told.append(at),
    )


def talk(last, earlier, skills):
    return row(9, skills[-1], last, ((earlier, "no"),), skills)


def test_every_turn_is_judged_by_its_own_text_alone():
    rows = [
        talk(SQL.format("games"), QA.format("John"), ["qa", "sql"]),
        talk(SQL.format("games"), SQL.format("goals"), ["sql", "sql"]),
        talk(QA.format("John"), SQL.format("games"), ["sql", "sql"]),  # the last turn shows no cue
    ]
    assert said(rows[0]) == [QA.format("John"), SQL.format("games")]
    told = []
    options, facts = encoder_route(artifacts("base:bem-tiny", told), rows)  # type: ignore[arg-type]
    assert options == [[2, 1], [1, 1], [1, 2]]
    assert facts == {"accuracy_per_turn": 5 / 6, "trained_on": 6, "encoder": "base:bem-tiny"}
    assert told[-1] == ("encoding turns", 9, 9, "base:bem-tiny")  # each text once


@pytest.mark.skipif(
    not find_spec("sentence_transformers") or not is_here(NAMED["minilm"]),
    reason="needs the extra `retrieval`, and `bem base get minilm`",
)
def test_minilm_knows_skills_by_other_words_than_it_was_shown():
    rows = [
        talk("Select the number of goals from the table", "Who went to the garden?", ["qa", "sql"])
    ]
    options, facts = encoder_route(artifacts("minilm"), rows)  # type: ignore[arg-type]
    assert options == [[2, 1]] and facts["accuracy_per_turn"] == 1.0


def test_an_encoder_that_cannot_be_had_names_what_to_type(monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"No sentence-transformers model .*or use the base's own"):
        encoder_route(artifacts(str(tmp_path)), [])  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"minilm needs sentence-transformers: pip install 'bem\[retrieval\]'"):  # fmt: skip
        encoders.load_encoder("minilm")
