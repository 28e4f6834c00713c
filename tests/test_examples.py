"""Every example does what its first lines say (examples/system.py runs in tests/walk)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "attach.py": r"step 30: loss 0\.\d+\n.*It is blue",
    "evidence.py": r"0\.\d+  The first Nobel Prize.*\n.*margin",
    "judge_scores.py": r"better: \+0\.\d+ \[\+.*kept after the false discovery rate: \[True, False\]",
    "routing.py": r"router: \d+% of held-out answers.*saved and loaded it says the same: True",
}


def test_all_are_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, "system.py"}


@pytest.mark.parametrize("name", SAYS)
def test_it_says_what_it_should(name):
    ran = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert re.search(SAYS[name], ran.stdout, re.DOTALL), ran.stdout
