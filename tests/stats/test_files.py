import gzip
import json

import numpy as np
import pytest

from bem.errors import DataError
from bem.stats.corpus import bleu_statistics
from bem.stats.files import from_dict, load, save, to_dict
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.scores import Metric


def full():
    return Measurement(
        "v1",
        {"em": [[1, 0], [1, 1]], "acc": [0.5, float("nan")]},
        ["x", "y"],
        clusters=["d", "d"],
        slices={"A": [True, False]},
        corpus={"corpus_bleu": bleu_statistics(["a b", "c"], [["a b"], ["d"]])},
        declared={"acc": Metric(True, 100.0)},
        latency_ms={"decode": [1.0, 2.0]},
        memory_bytes=5,
        adapter_parameters=7,
        kv_hits=[1],
        kv_needed=[2],
        router=RouterFacts([1, 2], {"clean": np.array([1.0])}),
        meta={"seeds": [0, 1]},
    )


@pytest.mark.parametrize("name", ["m.json", "m.json.gz"])
def test_json_round_trips(tmp_path, name):
    m = full()
    again = Measurement.from_json(m.to_json(tmp_path / name))
    assert json.dumps(to_dict(again)) == json.dumps(to_dict(m))
    assert again.metrics["em"].shape == (2, 2)
    assert again.declared["acc"].points_per_unit == 100.0
    assert again.adapter_flops_per_token is None
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing half-written is left


def test_the_same_measurement_is_the_same_bytes(tmp_path):
    one, two = save(full(), tmp_path / "a.json.gz"), save(full(), tmp_path / "b.json.gz")
    assert one.read_bytes() == two.read_bytes()


def test_csv_with_seeds_clusters_slices_and_declared_metrics(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text(
        "id,seed,cluster,em,acc:higher:100,cost:lower,slice:hard\n"
        "x,0,d1,1,0.5,3,1\ny,0,d2,0,0.25,4,0\ny,1,d2,1,0.5,2,0\nx,1,d1,1,1,1,1\n"
    )
    m = load(path)
    assert m.name == "scores"
    assert m.metrics["em"].tolist() == [[1, 0], [1, 1]]
    assert m.metrics["acc"].tolist() == [[0.5, 0.25], [1.0, 0.5]]
    assert m.clusters == ("d1", "d2")
    assert m.slices["hard"].tolist() == [True, False]
    assert not m.metric("cost").higher_is_better


def test_jsonl_with_repeated_ids_as_seeds(tmp_path):
    path = tmp_path / "scores.jsonl.gz"
    rows = [{"id": i, "f1": f} for i, f in (("x", 0.1), ("y", 0.2), ("x", 0.3), ("y", 0.4))]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert load(path).metrics["f1"].tolist() == [[0.1, 0.2], [0.3, 0.4]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "no rows"),
        ("a.csv", "key,em\nx,1\n", "no column id"),
        ("a.csv", "id,em\nx,1\ny,one\n", r"a.csv:3: column 'em' is 'one'"),
        ("a.csv", "id,em\nx,\n", r"a.csv:2: column 'em' is missing"),
        ("a.csv", "id,accuracy\nx,1\n", "Say which way is better"),
        ("a.csv", "id,acc:up\nx,1\n", "must look like"),
        ("a.csv", "id,em\nx,1\ny,1\nx,0\n", "seed 1 has 1 of 2"),
        ("a.csv", "id,seed,em\nx,0,1\nx,0,1\n", "appears twice"),
        ("a.jsonl", '{"id": 1, "em": 1}\n{"id": 2', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1 must be an object"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "is not a measurement"),
        ("a.json", '{"format": "bem-measurement-1", "nam": "x"}', r"unknown fields \['nam'\]"),
        ("a.txt", "", "unknown kind"),
    ],
)
def test_bad_files_are_refused_with_place_and_field(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load(path)


def test_a_missing_or_broken_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="Cannot read"):
        load(tmp_path / "none.json")
    broken = tmp_path / "b.json.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="Cannot read"):
        load(broken)


def test_a_bad_field_is_named_with_the_file():
    values = to_dict(full())
    values["metrics"]["em"] = [[1, 0, 1]]
    with pytest.raises(DataError, match=r"run/m.json: v1: metrics.em has shape"):
        from_dict(values, "run/m.json")
