"""`bem validate` on files of all kinds: a verdict, or one message with exit code 3."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from bem.cli import main

N = 400


@pytest.fixture(scope="module")
def answers():
    """EM of a baseline and of a clearly better candidate."""
    rng = np.random.default_rng(0)
    base = (rng.random(N) < 0.6).astype(int)
    return base, np.where(rng.random(N) < 0.15, 1, base)


def table(path, em, ids=None, **columns):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "em", *columns])
        writer.writerows(zip(ids or range(len(em)), em, *columns.values(), strict=True))
    return path


def validate(capsys, *arguments):
    """(exit code, stdout on one line, stderr)."""
    with pytest.raises(SystemExit) as stopped:
        main(["validate", *map(str, arguments)])
    captured = capsys.readouterr()
    return stopped.value.code, " ".join(captured.out.split()), captured.err


def problem(capsys, *arguments):
    code, out, err = validate(capsys, *arguments)
    assert (code, out) == (3, "") and err.startswith("Error: ") and "Traceback" not in err
    return err


def test_the_readmes_own_columns_are_judged(capsys, tmp_path, answers):
    groups = [f"doc-{i // 2}" for i in range(N)]
    sides = [
        table(tmp_path / f"{n}.csv", em, group=groups) for n, em in zip("ab", answers, strict=True)
    ]
    code, out, _ = validate(capsys, *sides)
    assert code == 0 and "in 200 clusters" in out


@pytest.mark.parametrize("holder", [0, 1])
def test_clusters_of_one_file_count_for_both(capsys, tmp_path, answers, holder):
    few = {"cluster": [f"doc{i // 100}" for i in range(N)]}
    sides = [
        table(tmp_path / f"{i}.csv", em, **(few if i == holder else {}))
        for i, em in enumerate(answers)
    ]
    code, out, _ = validate(capsys, *sides)
    assert code == 2 and "in 4 clusters" in out


@pytest.mark.parametrize("holder", [0, 1])
def test_slices_of_one_file_are_guarded(capsys, tmp_path, answers, holder):
    base, better = answers
    better = better.copy()
    better[:60] = 0
    hard = {"slice:hard": [int(i < 60) for i in range(N)]}
    sides = [
        table(tmp_path / f"{i}.csv", em, **(hard if i == holder else {}))
        for i, em in enumerate((base, better))
    ]
    code, out, _ = validate(capsys, *sides)
    assert code == 1 and "hard" in out


def test_seeds_of_one_file_are_averaged(capsys, tmp_path, answers):
    base, better = answers
    once = table(tmp_path / "base.csv", base)
    twice = table(
        tmp_path / "new.csv", np.tile(better, 2), list(range(N)) * 2, seed=np.repeat([0, 1], N)
    )
    code, out, _ = validate(capsys, once, twice)
    assert code == 0 and f"n {N}" in out


def test_percent_beside_shares_is_refused_with_line_and_id(capsys, tmp_path, answers):
    base, _ = answers
    sides = table(tmp_path / "base.csv", base), table(tmp_path / "new.csv", base * 100)
    message = problem(capsys, *sides)
    line = int(np.flatnonzero(base)[0]) + 2
    assert f"new.csv:{line} (id '{line - 2}'): column 'em' is '100'; em lies in 0 to 1" in message


def test_a_declared_metric_in_percent_in_one_file_is_refused(capsys, tmp_path, answers):
    for name, em in (("base", answers[0]), ("new", answers[0] * 100)):
        text = "id,reward:higher\n" + "".join(f"{i},{v}\n" for i, v in enumerate(em))
        (tmp_path / f"{name}.csv").write_text(text)
    message = problem(capsys, tmp_path / "base.csv", tmp_path / "new.csv")
    assert (
        "reward is at most 1 in the baseline base and 100 in new: is one of them in percent"
        in message
    )


def test_pandas_index_and_true_and_false_are_read(capsys, tmp_path, answers):
    for name, em in zip(("base", "new"), answers, strict=True):
        frame = pd.DataFrame({"id": [f"q{i}" for i in range(N)], "em": em.astype(bool)})
        frame.to_csv(tmp_path / f"{name}.tsv", sep="\t")
    assert validate(capsys, tmp_path / "base.tsv", tmp_path / "new.tsv")[0] == 0


def test_samples_of_lm_eval_are_judged(capsys, tmp_path, answers):
    for name, scores in zip(("base", "new"), answers, strict=True):
        rows = [
            {"doc_id": i, "doc": {}, "resps": [["x"]], "filtered_resps": ["x"], "filter": "none",
             "metrics": ["acc"], "acc": float(v)}
            for i, v in enumerate(scores)
        ]  # fmt: skip
        (tmp_path / f"samples_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = validate(capsys, tmp_path / "samples_base.jsonl", tmp_path / "samples_new.jsonl")
    assert code == 0 and "acc +" in out


def test_rows_may_stand_in_any_order_and_ids_be_numbers_or_text(capsys, tmp_path, answers):
    base, better = answers
    first = table(tmp_path / "base.csv", base)
    rows = [{"id": i, "em": int(v)} for i, v in enumerate(better)][::-1]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert validate(capsys, first, tmp_path / "new.jsonl")[0] == 0


def test_other_examples_are_not_decided_and_named(capsys, tmp_path, answers):
    base, better = answers
    sides = table(tmp_path / "base.csv", base), table(tmp_path / "new.csv", better[:-1])
    code, out, _ = validate(capsys, *sides)
    assert code == 2
    assert (
        "new was not measured on the same examples: it has 399, 1 of 400 are missing (first: '399')"
        in out
    )


def test_a_column_of_text_can_be_ignored_but_not_a_misspelt_one(capsys, tmp_path, answers):
    words = {"question": ["why?"] * N}
    sides = [table(tmp_path / f"{n}.csv", em, **words) for n, em in zip("ab", answers, strict=True)]
    assert "a.csv:2 (id '0'): column 'question' holds 'why?'" in problem(capsys, *sides)
    assert validate(capsys, *sides, "--ignore", "question")[0] == 0
    both = ["--ignore", "question", "--ignore", "quest"]
    assert "--ignore quest: no file has a column" in problem(capsys, *sides, *both)


def test_the_primary_metric_decides(capsys, tmp_path, answers):
    base, better = answers
    sides = [
        table(tmp_path / "a.csv", base, f1=np.full(N, 0.5)),
        table(tmp_path / "b.csv", better, f1=np.full(N, 0.5)),
    ]
    assert validate(capsys, *sides, "--primary", "em")[0] == 0
    assert validate(capsys, *sides, "--primary", "f1")[0] == 2
    assert "a has no such metric. Did you mean 'em'" in problem(capsys, *sides, "--primary", "emm")
    assert "It has: em, f1" in problem(capsys, *sides, "--primary", "rouge")


def test_a_metric_of_the_candidate_alone_is_said_to_be_not_judged(capsys, tmp_path, answers):
    base, better = answers
    sides = table(tmp_path / "a.csv", base), table(tmp_path / "b.csv", better, f1=np.full(N, 0.5))
    code, out, _ = validate(capsys, *sides)
    assert code == 0 and "Not judged: metric f1: a has none." in out


def test_files_of_one_name_in_two_folders_are_told_apart(capsys, tmp_path, answers):
    paths = []
    for folder, em in zip(
        ("base", "one", "two"), (answers[0], answers[1], answers[0]), strict=True
    ):
        (tmp_path / folder).mkdir()
        paths.append(table(tmp_path / folder / "scores.v1.csv", em))
    code, out, _ = validate(capsys, *paths)
    assert code == 0
    assert f"{tmp_path}/one/scores.v1 PROMOTE" in out and f"{tmp_path}/two/scores.v1 INCONC" in out
    assert "called" in problem(capsys, paths[0], paths[1], paths[1])


def test_verdicts_never_replace_scores(capsys, tmp_path, answers):
    sides = [table(tmp_path / f"{n}.csv", em) for n, em in zip("ab", answers, strict=True)]
    assert "would replace a file of scores" in problem(capsys, *sides, "--out", sides[1])
    assert validate(capsys, *sides, "--out", tmp_path / "new" / "verdicts.json")[0] == 0
    assert (
        json.loads((tmp_path / "new" / "verdicts.json").read_text())["b"]["decision"] == "PROMOTE"
    )


@pytest.mark.parametrize("content", ["5", "- a", "gates: 5", "a: [", "\0", "{" * 500])
def test_a_gates_file_that_is_none_is_one_message(capsys, tmp_path, answers, content):
    sides = [table(tmp_path / f"{n}.csv", em) for n, em in zip("ab", answers, strict=True)]
    gates = tmp_path / "gates.yaml"
    gates.write_text(content)
    assert "gates.yaml" in problem(capsys, *sides, "--gates", gates)
    assert "none.yaml" in problem(capsys, *sides, "--gates", tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["[bold]", "[/]", ":100:", "\\", "−", "\u2603", "x\u2028y"])
def test_names_are_shown_as_they_are(capsys, tmp_path, answers, name):
    columns = {f"{name}:higher:100": np.linspace(0, 1, N), f"slice:{name}": [1] * N}
    file = name.replace("/", "")
    sides = [
        table(tmp_path / f"{file}{n}.csv", em, **columns)
        for n, em in zip("ab", answers, strict=True)
    ]
    code, out, _ = validate(capsys, *sides)
    assert code in (0, 2) and f"{file}b ".replace("\u2028", " ") in out


@pytest.fixture
def promoted(tmp_path, answers):
    return [str(table(tmp_path / f"{n}.csv", em)) for n, em in zip("ab", answers, strict=True)]


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252", "COLUMNS": "40", "NO_COLOR": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"COLUMNS": "1", "FORCE_COLOR": "1", "TERM": "dumb"},
    ],
)
def test_the_verdict_does_not_depend_on_the_console(promoted, environment):
    done = run(["validate", promoted[1], promoted[0]], env={**os.environ, **environment})
    assert (done.returncode, done.stderr) == (1, b"")
    if "COLUMNS" not in environment and "FORCE_COLOR" not in environment:
        assert b"em -" in done.stdout or "em \u2212".encode() in done.stdout  # the sign is kept


def test_the_verdict_does_not_depend_on_whether_anybody_reads_it(promoted):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(["validate", *promoted], stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    code = "import os, sys; os.close(1); sys.stdout = None; from bem.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "validate", *promoted], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def run(arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    code = "from bem.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], timeout=300, **options)
