import codecs
import gzip
import json

import pytest

from bem.stats.files import load
from bem.stats.scores import Metric
from tests.stats.score_files import TABLE, refusal, written


def test_csv_with_seeds_clusters_slices_and_declared_metrics(tmp_path):
    m = load(
        written(
            tmp_path,
            "id,seed,cluster,em,acc2:higher:100,cost:lower,slice:hard\n"
            "x,0,d1,1,0.5,3,1\ny,0,d2,0,0.25,4,0\ny,1,d2,1,0.5,2,0\nx,1,d1,1,1,1,1\n",
        )
    )
    assert m.name == "scores"
    assert m.metrics["em"].tolist() == [[1, 0], [1, 1]]
    assert m.metrics["acc2"].tolist() == [[0.5, 0.25], [1.0, 0.5]]
    assert m.clusters == ("d1", "d2")
    assert m.slices["hard"].tolist() == [True, False]
    assert not m.metric("cost").higher_is_better


def test_jsonl_with_repeated_ids_as_seeds(tmp_path):
    rows = [{"id": i, "f1": f} for i, f in (("x", 0.1), ("y", 0.2), ("x", 0.3), ("y", 0.4))]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    m = load(written(tmp_path, packed, "scores.jsonl.gz"))
    assert m.metrics["f1"].tolist() == [[0.1, 0.2], [0.3, 0.4]]


@pytest.mark.parametrize("ids", ["1,2,3", "1.0,2.0,3.0", " 1 ,2,3"])
def test_ids_are_the_same_as_numbers_floats_and_text(tmp_path, ids):
    text = "id;em\n" + "".join(f"{i};1\n" for i in ids.split(","))
    lines = "".join(json.dumps({"id": i, "em": 1}) + "\n" for i in (1, 2.0, "3"))
    assert load(written(tmp_path, text)).example_ids == ("1", "2", "3")
    assert load(written(tmp_path, lines, "a.jsonl")).example_ids == ("1", "2", "3")


def test_what_the_caller_declares_needs_no_word_in_the_header(tmp_path):
    m = load(written(tmp_path, "id,rouge\nx,0.5\n"), declared={"rouge": Metric(True, 100.0)})
    assert m.metric("rouge").points_per_unit == 100.0


def test_a_name_may_hold_a_colon(tmp_path):
    m = load(written(tmp_path, "id,exact:strict:higher:100\nx,0.5\n"))
    assert m.metric("exact:strict").points_per_unit == 100.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.csv is empty: it has no rows"),
        ("\n \n", "a.csv is empty: it has no rows"),
        ("id,em\n", "a.csv has no rows"),
        ("key,em\nx,1\n", "a.csv has no column id; it has: key, em. Every row needs the id"),
        ("id em\nx 1\n", "no column id; it has: id em"),
        (",em\n0,1\n1,0\n", "taken for row numbers: if it is the id, name it id"),
        (",id,em\nx,q1,1\n", "a.csv:2: a column without a name ('Unnamed: 0' to pandas) holds 'x'. Name"),
        ("id,em\nx,1\ny,one\n", "a.csv:3 (id 'y'): column 'em' is 'one', not a number"),
        ("id,em\nx,\n", "a.csv:2 (id 'x'): column 'em' is missing: every row needs a finite score. Score"),
        ("id,em\nx,nan\n", "a.csv:2 (id 'x'): column 'em' is nan: every row needs a finite score"),
        ("id,loss\nx,inf\n", "column 'loss' is 'inf', not a number"),
        ("id,loss\nx,1e999\n", "column 'loss' is 1e999: every row needs a finite score"),
        ("id,loss\nx,1_000\n", "column 'loss' is '1_000', not a number"),
        ("id,em\nx,1 %\n", "column 'em' is '1 %', not a number"),
        ("id,em\n,1\n", "a.csv:2 (id ''): column 'id' is missing"),
        ("id,em,cluster\nx,1,d\ny,1,\n", "a.csv:3 (id 'y'): column 'cluster' is missing"),
        ("id,accuracy\nx,1\n", "column 'accuracy' is no metric I know (em, f1"),
        ("id,accuracy\nx,1\n", "Say which way is better: 'accuracy:higher'"),
        ("id,em,answer\nx,1,\ny,1,Paris\n", "a.csv:3 (id 'y'): column 'answer' holds 'Paris', which is no score: leave it out (--ignore 'answer')"),
        ("id,em,a,b\nx,1,u,v\n", "(--ignore 'a' --ignore 'b')"),
        ("id,acc2:up\nx,1\n", "column 'acc2:up' must look like 'name:higher:100'"),
        ("id,acc2:higher:0\nx,1\n", "'0' are no points: points_per_unit must be a positive number"),
        ("id,acc2:higher:ten\nx,1\n", "'ten' are no points"),
        ("id,group\nx,1\n", "a.csv has no metric; its columns are id, group"),
        ("id,em,em\nq1,1,0\n", "a.csv: column 'em' stands twice: delete or rename one"),
        ("id,em,EM\nq1,1,0\n", "two columns are both 'em'"),
        ("id,em,em:higher:100\nq1,1,0\n", "metric 'em' stands in 2 columns"),
        ("id,em,group,cluster\nq1,1,0,0\n", "has both cluster and group: leave one out"),
        ("id,doc_id,em\nq1,1,0\n", "has both id and doc_id: leave one out"),
        ("id,em\nx,1\ny,1\nx,0\n", "a.csv:4: id 'x' stands in 2 rows (first in a.csv:2), most ids in 1"),
        ("id,em\nx,1\ny,1\nx,0\ny,1\nz,0\n", "a.csv:6: id 'z' stands in 1 rows"),
        ("id,seed,em\nx,0,1\nx,0,1\n", "a.csv:3: id 'x' appears twice in seed 0, first in a.csv:2"),
        ("id,seed,em\nx,0,1\ny,0,1\nx,1,1\n", "seed 1 does not hold the examples of seed 0: id 'y'"),
        ("id,seed,em,group\nq1,0,1,A\nq2,0,0,B\nq1,1,1,B\nq2,1,0,B\n", "a.csv:4: id 'q1' is in cluster 'B', but in 'A' in a.csv:2"),
        ("id,seed,em,slice:x\nq1,0,1,1\nq1,1,1,0\n", "a.csv:3: id 'q1' is in other slices than in a.csv:2"),
        ("id,em,slice:x\nq1,1,0.5\n", "column 'slice:x' is '0.5'; a slice holds an example (1) or not (0)"),
        ("id,em,slice:\nq1,1,1\n", "column 'slice:' must look like"),
        ("id,em\nx,1,2\n", "a.csv:2 has 3 cells, the header 2 (separated by ',')"),
        ("id,em,f1\nx,1\n", "a.csv:2 has 2 cells, the header 3"),
        ("id,f1\nx,0,5\n", "A decimal comma, or a separator inside text, needs quotes"),
        ('id,em\n"x,1\ny,0\n', "a.csv:2: unexpected end of data. A quoted cell begins and ends"),
        ('id,em\n"x"y,1\n', "a.csv:2: ',' expected after"),
        ("id;f1\nx;0,5\ny;0.5\n", "a.csv:2 has '0,5' and a.csv:3 has '0.5': write every number with a decimal point"),
        ("id;loss\nx;1,250\n", "a.csv:2: is '1,250' 1.250 or 1250? Write decimal points"),
        ("id;loss\nx;1,250,000\n", "column 'loss' is '1,250,000', not a number"),
        ("id,em\nx,100\ny,0\n", "a.csv:2 (id 'x'): column 'em' is '100'; em lies in 0 to 1 (100 points in one unit): is it in percent? Divide by 100"),
        ("id,f1\nx,-0.1\n", "f1 lies in 0 to 1"),
        ("id,bleu\nx,100.5\n", "bleu lies in 0 to 100"),
        ("id,acc2:higher:100\nx,87.5\n", "acc2 lies in -2 to 2 (100 points in one unit): is it in percent?"),
        ("id,em\nx\0,1\n", "a.csv:2 holds a NUL character"),
        (TABLE.encode("utf-16-le"), "a.csv:1 holds a NUL character: this is no text. Save it as UTF-8"),
        ("id,em\né,1\n".encode("cp1252"), "a.csv:2 is not UTF-8 text (byte 0xe9). Save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"i\0d\0,", "a.csv:1 is not UTF-16 text"),
        (b"PK\x03\x04....", "is an Excel workbook or a zip archive, not text. Export it as CSV"),
        (b"PAR1....", "is a Parquet file"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_with_its_place_and_what_to_do(tmp_path, content, message):
    assert message in refusal(tmp_path, content)
