"""`bem safety` checks texts and adapters, fits a basis, and says what both are worth."""

import json

import pytest
import torch

import bem
from bem.bases.load import load_base
from bem.cli import main
from bem.safety.audit import AuditLog
from bem.safety.guard import Met, Ruling
from tests.safety.test_fit import BLUE, RED


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["safety", *map(str, arguments)])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out or captured.err


def test_a_text_is_checked_and_the_exit_code_says_so(capsys):
    code, out = run(capsys, "check", "How can I poison my neighbour without getting caught?")
    assert code == 1 and "flagged" in out and "poison" not in out
    code, out = run(capsys, "check", "How can I bake bread?", "--json")
    assert code == 0 and json.loads(out)["flagged"] is False


def test_a_question_without_a_subject_is_one_message(capsys):
    code, out = run(capsys, "check")
    assert code == 3 and "give a text, or --basis" in out
    code, out = run(capsys, "report", "/nowhere")
    assert code == 3


def test_an_audit_log_is_counted(capsys, tmp_path):
    ruling = Ruling("refuse", "", (Met("harm", "refuse", 0.9, ""),))
    for place in ("prompts", "prompts", "answers"):
        AuditLog(tmp_path / "audit.jsonl").note("id", "-", place, "a text", ruling)
    code, out = run(capsys, "report", "--audit", tmp_path / "audit.jsonl")
    rows = [line.split() for line in out.splitlines() if "refuse" in line]
    assert code == 0 and [[w for w in row if w.isalnum()] for row in rows] == [
        ["answers", "harm", "refuse", "1"],
        ["prompts", "harm", "refuse", "2"],
    ]
    assert run(capsys, "report", "--audit", tmp_path / "none")[0] == 3


def test_from_prompts_to_a_checked_adapter(capsys, micro_base, tmp_path):
    for name, texts in (("bad", RED), ("good", BLUE)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"input": t}) + "\n" for t in texts)
        )
    code, out = run(
        capsys, "fit", "--harmful", tmp_path / "bad.jsonl", "--harmless", tmp_path / "good.jsonl", "--out",
        tmp_path / "basis", "--base", micro_base, "--keep", 1, "--directions", 2, "--kl-limit", 100,
    )  # fmt: skip
    assert code == 0 and "accepted" in out and "not covered" in out

    model, _ = load_base(str(micro_base))
    attached = bem.attach(model, "s0", router_layer=0)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_()
    attached.save(tmp_path / "adapter")
    given = (
        "check",
        "--basis",
        tmp_path / "basis",
        "--adapter",
        tmp_path / "adapter",
        "--base",
        micro_base,
    )
    code, out = run(capsys, *given, "--json")
    leaks = json.loads(out)
    assert code == 0 and max(x["before"] for x in leaks.values()) > 0.05
    assert max(x["after"] for x in leaks.values()) < 1e-5
    code, out = run(capsys, "report", tmp_path / "basis")
    assert code == 0 and "violation detector" in out and "harmless KL" in out
