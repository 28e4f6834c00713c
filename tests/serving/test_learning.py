"""What a server tells of a learner: as it stands in the learner's folder."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bem.online.told import Journal, Scores, scores
from bem.serving.metrics import Metrics
from tests.serving.learned import learn, told_of

DEPLOY = Path(__file__).parents[2] / "deploy"
OWN = re.compile(r"(?:vllm:|bem_)[a-z0-9_]+")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A learner that promoted and rolled back; what a server with it tells; and its metrics' text."""
    home = tmp_path_factory.mktemp("told")
    learn(home)
    learning = told_of(home)
    metrics = Metrics("toy")
    metrics.registry.register(learning)
    page = learning.read()
    return home, json.loads(json.dumps(page)), metrics.text().decode()


def test_candidates_and_moves_are_told_with_their_evidence(told):
    _, page, text = told
    rolled = page["candidates"][-1]
    assert rolled["what"] == "rolled back" and rolled["why"]
    assert {"score incoming", "score held_out"} <= {m["metric"] for m in rolled["metrics"]}
    assert min(m["e_not_worse"] for m in rolled["metrics"]) >= 20  # 1/alpha
    assert [move["event"] for move in page["ledger"]] == ["rollback", "promote"]
    assert [m["what"] for m in page["marks"]][:3] == ["candidate", "promoted", "rolled back"]
    assert page["alive"] is False and page["moves"]["promoted"] == 1
    assert 'bem_online_moves_total{move="rolled_back"} 1.0' in text
    assert "bem_online_up 0.0" in text and "bem_online_events_total 72.0" in text


def test_scores_are_put_together_and_never_over_two_versions(told):
    home, page, _ = told
    assert [p["event"] for p in page["scores"]] == list(range(8, 73, 8))
    few = scores(home / "online", most=4)
    assert sum(p["n"] for p in few) == 72
    assert len({p["version"] for p in few}) == len({p["version"] for p in page["scores"]}) == 2
    whole = sum(p["mean"] * p["n"] for p in page["scores"])
    assert sum(p["mean"] * p["n"] for p in few) == pytest.approx(whole)


def test_what_is_going_to_be_done_again_is_not_told_twice(told, tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text((told[0] / "online" / "scores.jsonl").read_text() + '{"event": 80, "n"')
    Scores(tmp_path, event=40)
    assert [p["event"] for p in scores(tmp_path)] == [8, 16, 24, 32, 40]


def test_a_damaged_status_is_a_problem_that_is_told(told, tmp_path):
    shutil.copytree(told[0] / "online", tmp_path / "online")
    (tmp_path / "online" / "status.json").write_text("{")
    page = told_of(tmp_path).read()
    assert (
        "cannot be read" in page["problem"]
        and str(tmp_path) not in page["problem"]
        and page["status"] is None
    )
    assert page["ledger"] == [] and page["candidates"]


def test_a_journal_is_read_on_and_anew_where_it_was_cut(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = ['{"event": 1, "what": "discarded"}', '{"event": 2, "what": "drift"}']
    journal = Journal(path)
    journal.look()
    assert journal.entries == []
    path.write_text(lines[0] + "\n" + lines[1] + '\n{"event": 3, "wh')
    journal.look()
    assert [e["event"] for e in journal.entries] == [2] and journal.counts["discarded"] == 1
    path.write_text(lines[0] + "\n" + lines[1] + '\n{"event": 3, "what": "kept"}\n')
    journal.look()
    assert [e["event"] for e in journal.entries] == [2, 3]
    path.write_text(lines[1] + "\n")
    journal.look()
    assert [e["event"] for e in journal.entries] == [2] and journal.counts["discarded"] == 0


def exported(text: str) -> set[str]:
    """Names that a query may use."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + end for end in ends}
    return found


def expressions(values) -> list[str]:
    """Everything under `expr` or `query` in a dashboard."""
    if isinstance(values, list):
        return [e for value in values for e in expressions(value)]
    if not isinstance(values, dict):
        return []
    own = [v for k, v in values.items() if k in ("expr", "query") and isinstance(v, str)]
    return own + [e for value in values.values() for e in expressions(value)]


@pytest.mark.parametrize("name", ["grafana/bem.json", "prometheus/alerts.yaml"])
def test_every_metric_that_is_looked_at_is_exported(told, name):
    text = (DEPLOY / name).read_text()
    asked = " ".join(expressions(json.loads(text))) if name.endswith("json") else text
    wanted = set(OWN.findall(asked))
    assert len(wanted) > 10 and wanted <= exported(told[2])


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    panels = json.loads((DEPLOY / "grafana/bem.json").read_text())["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (p["gridPos"] for p in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Prometheus)")
@pytest.mark.parametrize("command", [("check", "alerts.yaml"), ("test", "alerts_test.yaml")])
def test_alerts_do_what_they_say(command):
    words = ["promtool", command[0], "rules", command[1]]
    done = subprocess.run(words, cwd=DEPLOY / "prometheus", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
