"""A picture decides where the text leaves it open, and only there."""

import numpy as np
import pytest
import torch

from bem.config import VISION_FEATURES
from bem.errors import DataError
from bem.training.data import collate
from bem.training.fit_router import fit_router
from bem.training.picture import PENALTY, fit_votes
from bem.training.router_scores import at_turns, router_path
from bem.training.router_targets import prompts_of
from bem.training.routing_rows import read_routing_rows
from tests.conftest import make_llama, make_tokenizer
from tests.training.skills import CUES, NAMES, write_loras


def seen(concept: int) -> list[float]:
    told = dict.fromkeys(VISION_FEATURES, 0.0) | {"gate": 1.0, "certainty": 1.0}
    told[f"concept_{concept + 1}"] = 1.0
    return list(told.values())


def rows(n, first=0):
    """Half of the rows say what is wanted, beside a picture of anything; half leave it to the picture."""
    made = []
    for i in range(first, first + n):
        for at, name in enumerate(NAMES):
            number = i * 7919 % 1000
            made.append(
                {
                    "id": f"t{name}-{i}",
                    "prompt": f"{CUES[name]} {number}",
                    "label": name,
                    "vision": seen(number % 3),
                }
            )
            made.append({"id": f"p{name}-{i}", "prompt": f"the value {number}", "label": name, "vision": seen(at)})  # fmt: skip
    return made


def right(mounted, asked):
    prompts = prompts_of(read_routing_rows(asked, NAMES), make_tokenizer(), 400)
    paths = router_path(mounted, prompts, 0, 8)
    chosen = at_turns(paths, np.array([[len(path)] for path in paths]))[:, 0]
    named = [mounted.router.space.name(o) for o in chosen]
    return [one == row["label"] for one, row in zip(named, asked, strict=True)]


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    loras = write_loras(tmp_path_factory.mktemp("loras"))
    return fit_router(make_llama(), make_tokenizer(), loras, rows(16), vision="colours@1", seed=1)


def test_the_picture_decides_where_the_text_does_not(fit):
    new = rows(8, first=100)
    by_picture = [row for row in new if row["id"].startswith("p")]
    assert np.mean(right(fit.mounted, by_picture)) > 0.95
    unseen = [{**row, "vision": [0.0] * len(VISION_FEATURES)} for row in by_picture]
    assert np.mean(right(fit.mounted, unseen)) < 0.6


def test_where_the_text_decides_a_picture_changes_nothing(fit):
    by_text = [row for row in rows(8, first=100) if row["id"].startswith("t")]
    assert np.mean(right(fit.mounted, by_text)) > 0.95


def test_hysteresis_follows_the_picture_too(fit):
    """Q of every expert moves with the logits, so that the rules never contradict them."""
    router, told = fit.mounted.router, rows(2, first=100)
    prompts = prompts_of(read_routing_rows(told, NAMES), make_tokenizer(), 400)
    batch = {k: v for k, v in collate(prompts, 0).items() if k != "labels"}
    with torch.no_grad(), router.watched() as tape:
        fit.mounted.model(**batch, use_cache=False)
    last = tape[-1]
    logits = router.policy.actor.logits(last.observation)[0]
    gaps = [x - x[:, 1:2] for x in (fit.learned.worth * logits, last.boundary.q)]
    assert torch.allclose(gaps[0][:, 1:], gaps[1][:, 1:], rtol=0.05, atol=0.05)


def test_pictures_that_would_not_be_looked_at_are_refused(tmp_path):
    loras = write_loras(tmp_path)
    with pytest.raises(DataError, match="reads none"):
        fit_router(make_llama(), make_tokenizer(), loras, rows(12))
    bare = [{k: v for k, v in row.items() if k != "vision"} for row in rows(12)]
    with pytest.raises(DataError, match="no row has a picture"):
        fit_router(make_llama(), make_tokenizer(), loras, bare, vision="colours@1")


def test_the_map_is_the_regression_that_it_says():
    """Its gradient vanishes: checked by hand, against the formula."""
    generator = torch.Generator().manual_seed(0)
    told, weight = (torch.rand(90, n, generator=generator) for n in (4, 1))
    wanted = torch.nn.functional.one_hot(torch.arange(90) % 3, 3).float()
    w = fit_votes(told, wanted, weight[:, 0])
    error = weight * ((told @ w.T).softmax(-1) - wanted)
    assert torch.allclose(error.T @ told / 90 + 2 * PENALTY * w, torch.zeros(3, 4), atol=1e-4)
