"""`bem index build | search | evidence | info`, through the command line."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from bem.cli.index import index_app
from bem.errors import BemError, ConfigError, DataError

ROWS = [
    {"id": "cat", "text": "The cat sat on the mat. " + "It slept. " * 30},
    {"id": "ada", "title": "Ada Lovelace", "text": "wrote the first [bold]program[/]"},
    {"id": "copy", "title": "Ada Lovelace", "text": "wrote the first [bold]program[/]"},
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def call(*arguments) -> str:
    """What a command prints; its problems are raised."""
    wide = {"COLUMNS": "400"}  # nothing is folded, whatever the paths of this machine
    result = CliRunner().invoke(index_app, [str(a) for a in arguments], env=wide)
    if isinstance(result.exception, BemError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_build_search_and_info_with_the_states_of_a_base(corpus, tmp_path, micro_base):
    out = tmp_path / "ix"
    said = call("build", corpus, "--out", out, "--encoder", "base", "--base", micro_base)
    assert "2 (1 copies left out)" in said and f"base:{micro_base}, 32 dimensions" in said
    found = call("search", out, "first program", "-k", "1", "--method", "hybrid")
    assert "1 ada hybrid" in found
    assert "Ada Lovelace: wrote the first [bold]program[/]" in found  # not taken for markup
    assert "files are as the manifest says" in call("info", out)


def test_bm25_alone_is_the_default_and_a_base_without_its_encoder_is_refused(corpus, tmp_path):
    assert "none: BM25 alone" in call("build", corpus, "--out", tmp_path / "ix")
    with pytest.raises(ConfigError, match="Add `--encoder base`, or leave --base out"):
        call("build", corpus, "--out", tmp_path / "other", "--base", "bem-tiny")
    assert not (tmp_path / "other").exists()


def test_vectors_are_deleted_by_force_alone(corpus, tmp_path, micro_base):
    out = tmp_path / "ix"
    call("build", corpus, "--out", out, "--encoder", "base", "--base", micro_base)
    with pytest.raises(DataError, match=f"holds vectors by encoder base:{micro_base};.*`--force`"):
        call("build", corpus, "--out", out, "--encoder", "none")
    assert "32 dimensions" in call("info", out)
    printed = call("build", corpus, "--out", out, "--encoder", "none", "--force")
    assert "none: BM25 alone" in printed


def test_json_lines_carry_whole_passages(corpus, tmp_path):
    call("build", corpus, "--out", tmp_path / "ix", "--encoder", "none")
    lines = call("search", tmp_path / "ix", "cats", "--json").splitlines()
    (hit,) = [json.loads(line) for line in lines]
    assert (hit["id"], hit["text"], hit["title"]) == ("cat", ROWS[0]["text"], "")
    assert hit["score"] == hit["lexical"] > 0


def test_long_passages_are_shortened_for_people(corpus, tmp_path):
    call("build", corpus, "--out", tmp_path / "ix", "--encoder", "none")
    shown = "".join(call("search", tmp_path / "ix", "mat").splitlines()[1:])
    assert shown.endswith("...") and len(shown) == 200


def test_nothing_found_is_said(corpus, tmp_path):
    call("build", corpus, "--out", tmp_path / "ix", "--encoder", "none")
    assert "Nothing found" in call("search", tmp_path / "ix", "библиотека")
    assert call("search", tmp_path / "ix", "библиотека", "--json") == ""


def test_problems_say_what_to_do(corpus, tmp_path):
    call("build", corpus, "--out", tmp_path / "ix", "--encoder", "none")
    with pytest.raises(ConfigError, match="bm25, dense, hybrid"):
        call("search", tmp_path / "ix", "x", "--method", "magic")
    with pytest.raises(DataError, match="--encoder minilm"):
        call("search", tmp_path / "ix", "x", "--method", "dense")
    with pytest.raises(DataError, match="bem index build"):
        call("info", tmp_path)
    with pytest.raises(DataError, match=r"absent\.jsonl is missing"):
        call("build", tmp_path / "absent.jsonl", "--out", tmp_path / "other")


def test_the_commands_are_importable_without_the_heavy_libraries():
    code = (
        "import sys, bem.cli.index; "
        "heavy = {'torch', 'bm25s', 'faiss', 'sentence_transformers', 'transformers', 'Stemmer'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_index_is_a_group_of_four_commands():
    group = typer.main.get_command(index_app)
    assert set(group.commands) == {"build", "search", "evidence", "info"}


def test_evidence_says_what_the_model_would_be_told(corpus, tmp_path):
    call("build", corpus, "--out", tmp_path / "ix", "--encoder", "none")
    said = call("evidence", tmp_path / "ix", "Who wrote the first program?")
    assert said.startswith("ada relevant with probability") and "told to the model" in said
    found = json.loads(call("evidence", tmp_path / "ix", "first program", "--json"))
    assert found["passages"][0]["id"] == "ada" and found["record"]["reranked"] is True
    assert found["record"]["features"][0] == 1 and len(found["record"]["digest"]) == 64


def test_a_question_in_an_unknown_script_is_told_to_have_no_evidence(corpus, tmp_path):
    call("build", corpus, "--out", tmp_path / "ix", "--encoder", "none")
    said = call("evidence", tmp_path / "ix", "猫はどこ")
    assert "Nothing found" in said and "present 0.00" in said
