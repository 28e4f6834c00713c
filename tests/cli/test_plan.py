"""`bem plan` through the command line."""

import csv
import re

import pytest

from bem.cli import main
from tests.stats.test_guards import draw


def plan(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out + captured.err


def numbers(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(row))
    return re.findall(r"[\d,.%]+", line.removeprefix(row))


def scores(path, em, slices):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "em", *(f"slice:{name}" for name in slices)])
        for i, value in enumerate(em):
            table.writerow([f"q{i}", value, *(int(mask[i]) for mask in slices.values())])
    return path


def test_it_says_how_many_rows_seeds_and_rounds_a_decision_needs(capsys):
    code, text = plan(capsys, "--gain", 3, "--rows", 1000)
    assert code == 0
    rows = [int(n.replace(",", "")) for n in numbers(text, "rows to promote +3 points")]
    assert rows == sorted(rows, reverse=True) and 800 < rows[0] < 950
    assert numbers(text, "chance of a promotion with 1,000 rows")[0] in ("84%", "85%", "86%")
    assert "Timing rounds to decide a latency of x1.05" in text


def test_the_spread_and_the_slices_are_taken_from_two_score_files(capsys, tmp_path):
    old, new, slices = draw([0], 1000, 5, 3.0)
    base = scores(tmp_path / "base.csv", old, slices)
    other = scores(tmp_path / "other.csv", new, slices)
    code, text = plan(capsys, "--gain", 3, "--baseline", base, "--candidate", other)
    assert code == 0 and "1,000 rows" in text
    assert numbers(text, "rows to promote +3 points with 5 slices")


def test_no_gain_is_never_promoted(capsys):
    assert "none will do" in plan(capsys, "--gain", 0)[1]


def test_gates_are_read_from_a_file(capsys, tmp_path):
    gates = tmp_path / "gates.yaml"
    gates.write_text("latency_ratio_max: 1.05\n")
    assert "no number decides" in plan(capsys, "--gain", 3, "--gates", gates)[1]
    gates.write_text("quality_margn: 1\n")
    code, text = plan(capsys, "--gain", 3, "--gates", gates)
    assert code == 3 and "Did you mean 'quality_margin'?" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gain", 3, "--baseline", "x.csv"], "go together"),
        (["--gain", 3, "--score", 100], "score must lie between"),
        (["--gain", 3, "--shared", 1], "shared must lie between"),
        ([], "--gain"),
    ],
)
def test_what_cannot_be_planned_is_one_message_and_exit_code_3(capsys, arguments, message):
    code, text = plan(capsys, *arguments)
    assert code == 3 and message in text and "Traceback" not in text


def test_a_folder_without_measurements_is_refused(capsys, tmp_path):
    code, text = plan(capsys, "--gain", 3, "--baseline", tmp_path, "--candidate", tmp_path)
    assert code == 3 and "seed-*/measurement.json" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gain", "nan"), ("--gain", "1e9"), ("--gain", "100"), ("--gain", "-inf"),
        ("--gain", 2, "--latency", "nan"), ("--gain", 2, "--latency", "inf"),
        ("--gain", 2, "--noise", "nan"), ("--gain", 2, "--noise", "inf"), ("--gain", 2, "--score", "nan"),
        ("--gain", 2, "--shared", "nan"), ("--gain", 2, "--cluster-size", "inf"),
    ],
)  # fmt: skip
def test_numbers_with_which_nothing_can_be_planned_are_refused(capsys, arguments):
    code, text = plan(capsys, *arguments)
    assert code == 3 and "Traceback" not in text and "Error: " in text
