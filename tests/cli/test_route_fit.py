"""`bem route fit` end to end: rows in, a router that is loaded and asked out; errors are one message."""

import json

import pytest
from PIL import Image

import bem
from bem.bases.load import load_base
from bem.cli.route_fit import _looked_at
from bem.config import VISION_FEATURES
from bem.vision.scenes import Thing, draw
from tests.test_cli import bem_command, problem
from tests.training.skills import CUES, NAMES, labelled, write_loras


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return write_loras(tmp_path_factory.mktemp("loras"))


@pytest.fixture
def command(loras, micro_base, tmp_path):
    """The command on some rows; more options go behind it."""

    def made(rows, *options, experts=NAMES):
        path = tmp_path / "examples.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = [word for name in experts for word in ("--expert", f"{name}={loras[name]}")]
        where = ("--base", micro_base, "--examples", path, "--out", tmp_path / "mine")
        return ("route", "fit", *named, *where, *options)

    return made


def test_a_router_is_fitted_and_asked(capsys, command, micro_base, tmp_path):
    rows = labelled(20)
    for row in rows[::3]:
        row["completion"] = " value"
    code, out, err = bem_command(capsys, *command(rows))
    assert (code, err) == (0, "")
    for what in (
        "train: 45 rows (json 15, sql 15, chat 15)",
        "held out: 15 rows",
        "router",
    ):
        assert what in out
    for what in ("centroid 0 ", "centroid 3 ", "linear 0", "regret", "router leads by"):
        assert what in " ".join(out.split())
    assert f"Router: {tmp_path / 'mine'}" in out
    record = json.loads((tmp_path / "mine" / "fit.json").read_text())
    assert record["scores"][0]["accuracy"]["value"] == 1.0
    assert [e["name"] for e in record["experts"]] == list(NAMES)
    loaded = bem.load_router(load_base(str(micro_base))[0], tmp_path / "mine")
    assert loaded.router.trained and loaded.router.space.experts == NAMES
    asked = ("route", "explain", CUES["sql"] + " 1234", "--router", tmp_path / "mine")
    code, out, _ = bem_command(capsys, *asked, "--base", micro_base, "--json", "--answer")
    chunks = json.loads(out)["chunks"]
    assert code == 0 and [c["expert"] for c in chunks[:2]] == ["base", "sql"]


def test_a_narrow_console_loses_no_number(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = bem_command(capsys, *command(labelled(20)))
    assert (
        code == 0 and "…" not in out and max(map(len, out.split("Router:")[0].splitlines())) <= 40
    )


def test_what_cannot_be_fitted_is_one_message(capsys, command, tmp_path):
    rows = labelled(20)
    for options, message in (
        (("--expert", "sql"), "--expert must be NAME=LORA"),
        (("--expert", "sql=x"), "--expert sql was given twice"),
        (("--expert", f"x={tmp_path / 'none'}"), "is neither a folder nor a hub id"),
        (("--held-out", "1.5"), "held_out must be a share between 0 and 1, or rows; got 1.5"),
        (("--test", tmp_path / "none.jsonl"), "No examples at"),
        (("--device", "tpu"), "No device 'tpu' here"),
        (("--out", tmp_path), "exists already and holds no router"),
        (("--out", tmp_path / "examples.jsonl" / "mine"), "is no folder that you may write to"),
    ):
        assert message in problem(capsys, *command(rows, *options))
    rows[4]["label"] = "jason"
    said = problem(capsys, *command(rows))
    assert "examples.jsonl:5: label 'jason' names no expert. Did you mean 'json'?" in said
    assert "no row is labelled 'chat'" in problem(
        capsys, *command([r for r in labelled(20) if r["label"] != "chat"])
    )
    assert not (tmp_path / "mine").exists()
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "label": "sql"}\n{"prompt"\n')
    assert "broken.jsonl:2" in problem(capsys, *command(labelled(1), "--examples", path))


def test_images_of_rows_are_looked_at_through_the_named_tower(tmp_path):
    picture = draw(((Thing("circle", "red", 20, 20, 30),),))
    Image.fromarray(picture).save(tmp_path / "red.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Go on.", "label": "a", "image": "red.png"}) + "\n")
    (row,), test, tower = _looked_at("tiny", path, None)
    told = dict(zip(VISION_FEATURES, row["vision"], strict=True))
    assert told["gate"] == 1 and told["concept_10"] > 0.5 and test is None  # the tenth: red circle
    assert tower["vision"].startswith("tiny@") and _looked_at(None, path, None) == (path, None, {})
