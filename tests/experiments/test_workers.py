"""Several processes do what one does, and stop together."""

import numpy as np
import pytest

from bem.errors import DataError, MissingExtra
from bem.experiments.run import run
from bem.experiments.workers import _rebuilt
from bem.runs.folder import RunFolder, read_jsonl
from bem.stats import load
from tests.experiments.test_run import make_config, write_rows

ARMS = [
    {"name": "s0", "role": "baseline"},
    {"name": "v4", "adapters": {"variant": "v4"}, "match": "none"},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    write_rows(folder / "rows.jsonl")
    return folder


def test_two_workers_come_to_the_same_as_one(home, micro_base):
    events = []
    runs = {
        n: run(
            make_config(home, micro_base, name=f"by-{n}", workers=n, threads=1, arms=ARMS),
            events.append,
        )
        for n in (1, 2)
    }
    one, two = (RunFolder(result.folder) for result in runs.values())
    for arm in ("s0", "v4"):
        for seed in (0, 1):
            a, b = one.cell(arm, seed), two.cell(arm, seed)
            assert a.predictions.read_bytes() == b.predictions.read_bytes()
            assert [r["loss"] for r in read_jsonl(a.metrics)] == [
                r["loss"] for r in read_jsonl(b.metrics)
            ]
            for metric, scores in load(a.measurement).metrics.items():
                assert np.array_equal(scores, load(b.measurement).metrics[metric])
    assert sum(e.stage == "done" for e in events) == 8


def test_an_error_in_a_worker_stops_the_run_with_its_message(tmp_path, micro_base):
    write_rows(tmp_path / "rows.jsonl", word="an answer that is far longer than the context")
    settings = {"steps": 4, "batch_size": 4, "max_length": 16}
    config = make_config(tmp_path, micro_base, workers=2, arms=ARMS, training=settings)
    with pytest.raises(DataError, match=r"answer.*tokens.*16"):
        run(config)
    assert not (tmp_path / "runs" / "small" / "verdicts.json").exists()


def test_an_error_keeps_its_kind_and_words_between_processes():
    error = MissingExtra("datasets", "datasets", "loading from the hub")
    again = _rebuilt(type(error), str(error))
    assert isinstance(again, MissingExtra) and str(again) == str(error)
