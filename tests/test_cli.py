"""Every bad input becomes one message on stderr and exit code 3, without a traceback."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import bem
from bem.cli import main
from tests.conftest import make_llama, make_tokenizer
from tests.experiments.finished_run import make_run


def bem_command(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command run in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def problem(capsys, *arguments) -> str:
    """The message of a command that must end with exit code 3."""
    code, _, message = bem_command(capsys, *arguments)
    assert code == 3 and message.startswith("Error: ") and "Traceback" not in message
    return message


@pytest.fixture
def config(tmp_path, micro_base):
    """A config that runs: two arms, own rows, three steps."""
    data, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    for file, first in ((data, 0), (held_out, 12)):
        rows = [
            {"input": f"say {word} {i}", "references": [word], "group": f"doc{i // 2}"}
            for i in range(first, first + 12)
            for word in ("yes", "no")
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "config.yaml"
    path.write_text(f"""
name: small
output: {tmp_path}/runs
base: {micro_base}
seeds: [0]
data: {{tasks: [{{name: mine, train: {data}, dev: {held_out}, max_new_tokens: 3}}]}}
adapters: {{rank: 2}}
arms:
  - {{name: s0, role: baseline}}
  - {{name: v4, adapters: {{variant: v4}}, match: none}}
training: {{steps: 3, batch_size: 4, max_length: 64, checkpoint_every: 2}}
gates: {{n_bootstrap: 200}}
latency_rounds: 2
""")
    return path


def scores(path, em, **columns):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "em", *columns])
        table.writerows(zip(range(len(em)), em, *columns.values(), strict=True))
    return path


@pytest.fixture
def sides(tmp_path):
    """Score files of a baseline, and of a better, a worse and an equal candidate."""
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.6).astype(int)
    candidates = {
        "base": base,
        "better": np.where(rng.random(400) < 0.12, 1, base),
        "worse": np.where(rng.random(400) < 0.2, 0, base),
        "same": np.where(rng.random(400) < 0.05, 1 - base, base),
    }
    return {name: scores(tmp_path / f"{name}.csv", em) for name, em in candidates.items()}


# -- validate


@pytest.mark.parametrize(
    ("candidate", "code", "decision"),
    [("better", 0, "PROMOTE"), ("worse", 1, "REJECT"), ("same", 2, "INCONCLUSIVE")],
)
def test_the_exit_code_of_validate_is_the_decision(capsys, sides, candidate, code, decision):
    got, out, _ = bem_command(capsys, "validate", sides["base"], sides[candidate])
    assert got == code
    assert out.startswith(f"{candidate} {decision} ")
    assert "Waived: budget, kv_hit, latency, memory." in out


def test_validate_judges_several_candidates_and_writes_the_verdicts(capsys, sides, tmp_path):
    out = tmp_path / "verdicts.json"
    names = ("worse", "better", "same")
    code, _, _ = bem_command(
        capsys, "validate", sides["base"], *(sides[n] for n in names), "--out", out
    )
    assert code == 0
    verdicts = json.loads(out.read_text())
    assert [verdicts[n]["decision"] for n in names] == ["REJECT", "PROMOTE", "INCONCLUSIVE"]
    assert verdicts["better"]["family_size"] == 3


def test_validate_takes_gates_from_a_file(capsys, sides, tmp_path):
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates: {quality_margin: 10}\n")
    code, _, _ = bem_command(capsys, "validate", sides["base"], sides["better"], "--gates", gates)
    assert code != 0
    gates.write_text("quality_margn: 10\n")
    message = problem(capsys, "validate", sides["base"], sides["better"], "--gates", gates)
    assert "unknown key 'quality_margn'. Did you mean 'quality_margin'?" in message


def test_validate_names_what_is_wrong_with_a_file(capsys, sides, tmp_path):
    missing = tmp_path / "nowhere.csv"
    assert "nowhere.csv" in problem(capsys, "validate", sides["base"], missing)
    broken = tmp_path / "broken.csv"
    broken.write_text("id,em\nq1,maybe\n")
    assert "broken.csv:2" in problem(capsys, "validate", sides["base"], broken)
    short = scores(tmp_path / "short.csv", [1, 0])
    code, out, _ = bem_command(capsys, "validate", sides["base"], short)
    assert code == 2 and "not measured on the same examples" in " ".join(out.split())


# -- run


def test_run_writes_a_report_and_skips_what_is_done(capsys, config):
    code, out, err = bem_command(capsys, "run", config)
    assert (code, err) == (0, "")
    report = config.parent / "runs" / "small" / "report.html"
    assert f"Report: {report}" in out.replace("\n", "") and report.is_file()
    assert re.search(r"^v4 (REJECT|INCONCLUSIVE) ", out, re.MULTILINE)
    _, again, _ = bem_command(capsys, "run", config)
    assert again.count("finished before: skipped") == 2
    code, out, _ = bem_command(capsys, "report", report.parent)
    assert code == 0 and str(report) in out.replace("\n", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.stesp=5", "unknown key 'training.stesp'. Did you mean 'steps'?"),
        ("training.steps=many", "training.steps"),
        ("training.steps", "must look like section.key=value"),
        ("base=nowhere/at/all", "No base model 'nowhere/at/all'"),
        ("data.tasks=[jsn_snips]", "No task 'jsn_snips'. Did you mean 'json_snips'?"),
        ("data.tasks=[json_snips]", "set data.root (--data)"),
        ("adapters.variant=v9", "adapters.variant"),
        ("device=cuda:77", "No device 'cuda:77' here. There is: cpu"),
    ],
)
def test_a_bad_setting_is_one_message(capsys, config, change, message):
    assert message in problem(capsys, "run", config, "--set", change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl holds no rows"),
        ('{"input": "a", "references": ["b"]}\n{"input": \n', "rows.jsonl:2: not JSON"),
        ('{"input": "a"}\n', "rows.jsonl:1: missing references"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_written(capsys, config, content, message):
    (config.parent / "rows.jsonl").write_text(content)
    assert message in problem(capsys, "run", config)
    assert not (config.parent / "runs" / "small" / "arms").exists()


def test_an_answer_longer_than_the_context_is_named(capsys, config):
    row = {"id": "long", "input": "say it", "references": ["on and " * 60]}
    (config.parent / "rows.jsonl").write_text(json.dumps(row))
    assert "Row 'mine/long': its answer has" in problem(capsys, "run", config)


def test_a_missing_or_broken_config_is_one_message(capsys, tmp_path):
    assert "No config file at" in problem(capsys, "run", tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    assert "is not valid YAML" in problem(capsys, "run", broken)


def test_a_loss_that_is_not_finite_stops_with_arm_and_step(capsys, config, tmp_path):
    broken = make_llama()
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    message = problem(capsys, "run", config, "--base", tmp_path / "broken")
    assert "s0 seed 0: the loss was nan in step 1" in message
    assert "Kept the state after step 0." in message


def test_a_full_disk_is_one_message_and_the_run_goes_on_later(capsys, config, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "measurement.json")

    with monkeypatch.context() as patch:
        patch.setattr("bem.experiments.cell.save", full)
        assert "The disk is full: measurement.json" in problem(capsys, "run", config)
    code, _, _ = bem_command(capsys, "run", config)
    assert code == 0


def test_control_c_can_be_resumed_with_the_same_command(config):
    command = [sys.executable, "-c", "from bem.cli import main; main()", "run", str(config)]
    long = ["--set", "training.steps=5000", "--set", "training.checkpoint_every=10"]
    metrics = config.parent / "runs" / "small" / "arms" / "s0" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    # a test run started in the background inherits "ignore" for Ctrl-C
    awake = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(
        [*command, *long], stderr=subprocess.PIPE, text=True, preexec_fn=awake
    ) as running:
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                assert time.monotonic() < deadline and running.poll() is None
                time.sleep(0.1)
            running.send_signal(signal.SIGINT)
            _, message = running.communicate(timeout=300)
        finally:
            running.kill()
    assert running.returncode == 130
    assert "run the same command again" in message and "Traceback" not in message
    assert (metrics.parent / "state.pt").is_file()


# -- train, evaluate, promote, doctor


def test_train_and_evaluate_one_arm(capsys, config, tmp_path):
    code, out, _ = bem_command(capsys, "train", "arm", config, "--arm", "v4")
    checkpoint = tmp_path / "runs" / "small" / "arms" / "v4" / "seed-0" / "checkpoint"
    assert code == 0 and str(checkpoint) in out.replace("\n", "")
    out_file = tmp_path / "scores.json"
    code, out, _ = bem_command(capsys, "evaluate", config, checkpoint, "--out", out_file)
    assert code == 0 and "quality" in out
    assert out_file.is_file()
    code, _, error = bem_command(capsys, "validate", out_file, out_file)
    assert code == 2, error
    table = tmp_path / "scores.jsonl"
    code, out, _ = bem_command(capsys, "evaluate", config, checkpoint, "--out", table)
    assert code == 0 and "Scores alone" in out
    assert json.loads(table.read_text().splitlines()[0]).keys() >= {"id", "cluster", "em", "f1"}
    assert bem_command(capsys, "validate", out_file, table)[0] == 2
    message = problem(capsys, "evaluate", config, checkpoint, "--out", tmp_path / "scores.xlsx")
    assert "written as .json, .jsonl, .csv or .tsv" in message
    assert "No arm 'v7'" in problem(capsys, "train", "arm", config, "--arm", "v7")
    assert "Seed 5 is none" in problem(capsys, "train", "arm", config, "--arm", "v4", "--seed", "5")
    assert "no `routing` section" in problem(capsys, "train", "router", config)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"other")
    assert "was changed after saving" in problem(capsys, "evaluate", config, checkpoint)


def test_promote_is_refused_without_a_verdict_that_says_so(capsys, tmp_path):
    run = make_run(tmp_path)
    assert "v3 was judged REJECT, not PROMOTE" in problem(capsys, "promote", run.path, "v3")
    code, out, _ = bem_command(capsys, "promote", run.path, "v1")
    assert code == 0 and "Promoted finished: v1, seed 0: version " in out
    assert "is no run" in problem(capsys, "promote", tmp_path / "nothing", "v1")


def test_doctor_tells_what_there_is(capsys):
    _, out, _ = bem_command(capsys, "doctor")
    for what in (
        "python",
        "cpu",
        "threads",
        "torch",
        "gpu",
        "bf16",
        "disk",
        "bem-tiny",
        "vision tower",
    ):
        assert what in out


# -- the command line itself


def test_version_and_help(capsys):
    assert bem_command(capsys, "--version") == (0, f"bem {bem.__version__}\n", "")
    assert bem_command(capsys, "--help")[0] == 0
    assert bem_command(capsys)[0] == 0


def test_a_mistyped_command_or_option_is_one_message(capsys):
    assert "Did you mean 'validate'" in problem(capsys, "validat")
    assert "--gatess" in problem(capsys, "validate", "--gatess", "x")
