import contextlib
import gzip
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bem.errors import DataError
from bem.stats.corpus import bleu_statistics
from bem.stats.files import FORMAT, from_dict, kind_of, load, save, to_dict
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.scores import Metric
from tests.stats.score_files import (
    IN_PLACE,
    TABLE,
    json_values,
    names_the_file,
    outcome,
    refusal,
    written,
)


def full():
    return Measurement(
        "v1",
        {"em": [[1, 0], [1, 1]], "acc": [0.5, float("nan")]},
        ["x", "y"],
        clusters=["d", "d"],
        slices={"A": [True, False]},
        corpus={"corpus_bleu": bleu_statistics(["a b", "c"], [["a b"], ["d"]])},
        declared={"acc": Metric(True, 100.0, range=(0, 1))},
        latency_ms={"decode": [1.0, 2.0]},
        memory_bytes=5,
        adapter_parameters=7,
        kv_hits=[1],
        kv_needed=[2],
        router=RouterFacts([1, 2], {"clean": np.array([1.0])}),
        meta={"seeds": [0, 1]},
    )


@pytest.mark.parametrize("name", ["m.json", "m.json.gz", "m"])
def test_json_round_trips(tmp_path, name):
    m = full()
    again = load(save(m, tmp_path / name))
    assert json.dumps(to_dict(again)) == json.dumps(to_dict(m))
    assert again.metrics["em"].shape == (2, 2)
    assert again.declared["acc"] == Metric(True, 100.0, range=(0.0, 1.0))
    assert again.adapter_flops_per_token is None
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing half-written is left


def test_the_same_measurement_is_the_same_bytes(tmp_path):
    one, two = save(full(), tmp_path / "a.json.gz"), save(full(), tmp_path / "b.json.gz")
    assert one.read_bytes() == two.read_bytes()


def test_a_bad_field_is_named_with_the_file():
    values = to_dict(full())
    values["metrics"]["em"] = [[1, 0, 1]]
    with pytest.raises(DataError, match=r"run/m.json: v1: metrics.em has shape"):
        from_dict(values, "run/m.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"em": ["1", "0"]}}, "metrics.em must be numbers, got str"),
        ({"metrics": {"em": [1, 10**400]}}, "metrics.em must be numbers"),
        ({"metrics": [1, 0]}, "metrics must map names to values"),
        ({"example_ids": "xy"}, "example_ids must be a list"),
        ({"example_ids": ["x", None]}, r"example_ids\[1\] is None"),
        ({"clusters": ["d", None]}, r"clusters\[1\] is None"),
        ({"slices": {"A": ["0", "1"]}}, "slices.A must be numbers"),
        ({"slices": {"A": [[1], [0, 1]]}}, "slices.A must be numbers"),
        ({"memory_bytes": "5 GB"}, "memory_bytes must be a number, got '5 GB'"),
        ({"declared": {"acc": {"higher_is_better": "no", "points_per_unit": 1}}}, "A metric is"),
        ({"declared": {"acc": {"higher_is_better": True, "points_per_unit": -1}}}, "positive"),
        ({"declared": {"acc": 5}}, "argument after"),
        ({"router": {"plan_lengths": "long"}}, "router.plan_lengths must be numbers"),
        ({"router": {"index_swap": [1]}}, "router.index_swap must map"),
        ({"router": {"facts": 1}}, "unexpected keyword"),
        ({"name": 5}, "name must be text"),
        ({"latency_ms": {"decode": [[1.0]]}}, "latency_ms.decode has shape"),
        ({"meta": 5}, "meta must map"),
        ({"nam": 5}, r"unknown fields \['nam'\]"),
    ],
)
def test_a_measurement_of_wrong_types_is_refused_with_the_field(change, message):
    with pytest.raises(DataError, match=message):
        from_dict({**to_dict(full()), **change})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(to_dict(full()))), json_values, max_size=3))
def test_a_measurement_with_any_fields_is_read_or_refused(change):
    with contextlib.suppress(DataError):
        from_dict({**to_dict(full()), **change, "format": FORMAT})


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.txt.gz"])
def test_our_json_is_read_whatever_its_name(tmp_path, name):
    save(full(), tmp_path / "m.json")
    again = load((tmp_path / "m.json").rename(tmp_path / name))
    assert json.dumps(to_dict(again)) == json.dumps(to_dict(full()))


def test_columns_can_be_ignored_and_are_listed(tmp_path):
    table = "id,em,question,len\nq1,1,why?,4\nq2,0,how?,4\n"
    m = load(written(tmp_path, table), ignore=["question", "len", "absent"])
    assert (list(m.metrics), m.meta) == (["em"], {"ignored": ["question", "len"]})
    save(full(), tmp_path / "m.json")
    n = load(tmp_path / "m.json", ignore=["acc", "slice:A", "corpus_bleu"])
    assert (list(n.metrics), n.slices, n.corpus) == (["em"], {}, {})
    assert n.meta["ignored"] == ["acc", "corpus_bleu", "slice:A"]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.json is missing"):
        load(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        load(tmp_path)
    packed = bytearray(gzip.compress(b"id,em\n" + b"".join(b"q%d,1\n" % i for i in range(500))))
    packed[12] ^= 255
    packed[13] ^= 255
    assert "cannot be read" in refusal(tmp_path, bytes(packed), "z.csv.gz")
    assert "cannot be read" in refusal(tmp_path, gzip.compress(TABLE.encode())[:-9], "z.csv.gz")


@IN_PLACE
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(b"\x1f\x8b\x08\x00")
@example(b'"sep=\r')
@example(b"sep=,\r\n")
def test_any_bytes_are_a_table_or_refused(tmp_path, content):
    for name in ("a.csv", "a.json.gz"):
        assert names_the_file(outcome(tmp_path, content, name), name)


# --- tables that are written


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
)
labels = names.map(str.strip).filter(bool)


@st.composite
def measurements(draw):
    ids = draw(st.lists(labels, min_size=1, max_size=5, unique=True))
    n, seeds = len(ids), draw(st.integers(1, 3))
    table = lambda values: draw(  # noqa: E731
        st.lists(st.lists(values, min_size=n, max_size=n), min_size=seeds, max_size=seeds)
    )
    return Measurement(
        "arm",
        {"em": table(st.floats(0, 1)), "cost": table(st.floats(-1e300, 1e300))},
        ids,
        clusters=draw(st.none() | st.lists(labels, min_size=n, max_size=n)),
        slices=draw(
            st.dictionaries(labels, st.lists(st.booleans(), min_size=n, max_size=n), max_size=2)
        ),
        declared={"cost": Metric(False, draw(st.none() | st.just(1e-303)))},
    )


@IN_PLACE
@given(
    measurements(), st.sampled_from(["arm.csv", "arm.tsv", "arm.jsonl", "arm.csv.gz", "arm.json"])
)
def test_scores_come_back_from_every_format(tmp_path, measurement, name):
    again = load(save(measurement, tmp_path / name))
    ids = [i.removesuffix(".0") for i in measurement.example_ids]  # 1.0, 2.0: pandas' ids
    assert [i.removesuffix(".0") for i in again.example_ids] == ids
    assert again.clusters == measurement.clusters
    assert again.declared == measurement.declared
    for key, scores in measurement.metrics.items():
        assert again.metrics[key].tolist() == scores.tolist()
    for key, members in measurement.slices.items():
        assert again.slices[key].tolist() == members.tolist()


def test_a_file_is_what_its_suffix_says(tmp_path):
    m = Measurement("m", {"em": [1, 0]}, ["a", "b"])
    assert save(m, tmp_path / "m.csv").read_text() == "id,em\na,1.0\nb,0.0\n"
    assert save(m, tmp_path / "m.tsv").read_text() == "id\tem\na\t1.0\nb\t0.0\n"
    assert json.loads(save(m, tmp_path / "m.jsonl").read_text().splitlines()[1]) == {
        "id": "b",
        "em": 0.0,
    }
    assert json.loads(save(m, tmp_path / "m.json").read_text())["format"] == FORMAT
    with pytest.raises(
        DataError, match=r"m.xlsx: scores are written as .json, .jsonl, .csv or .tsv"
    ):
        kind_of(tmp_path / "m.xlsx")
    with pytest.raises(DataError, match=r"corpus_bleu has no score per example: save as .json"):
        save(full(), tmp_path / "full.csv")
