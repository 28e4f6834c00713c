"""A killed writer leaves a whole store, in the last acknowledged state."""

import re
import subprocess
import sys
from pathlib import Path

from bem.runs.journal import account
from bem.runs.store import Store
from tests.runs.contents import make_store, promote

ROOT = Path(__file__).parent.parent.parent


def test_kills_at_random_and_at_every_operation_leave_a_whole_store(tmp_path):
    """200 random kills: benchmarks/results/store_kills.md, by the same script."""
    out = tmp_path / "kills.md"
    command = [sys.executable, ROOT / "benchmarks/store_kills.py", "--kills", "25"]
    command += ["--size", "20000", "--longest", "0.1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"\| ([a-z -,]+) \| ([\d,]+) \|", out.read_text())
    values = {what: int(number) for what, number in counts}
    assert values["operations of promote"] > 10 and values["operations of rollback"] > 5
    assert values["between ledger and pointer"] > 0  # the instant that matters was met


def test_the_pointer_is_there_before_anything_else_so_that_a_missing_one_was_lost(tmp_path):
    store = make_store(tmp_path)
    with store.journal.locked():
        assert sorted(p.name for p in store.path.iterdir()) == [
            ".lock", "current.json", "objects", "releases",
        ]  # fmt: skip
    assert store.current() is None and store.load_current().why == "nothing was promoted yet"


def test_the_time_in_the_ledger_is_utc_and_who_is_the_account_unless_named(tmp_path):
    assert Store(tmp_path).journal.by == account() != ""
    promote(store := make_store(tmp_path), tmp_path, "a")
    (entry,) = store.journal.ledger().entries
    assert (entry.by, entry.at) == ("ada", "2030-01-01T00:00:01.000+00:00")
