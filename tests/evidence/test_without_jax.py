"""bm25s is imported without touching an installed JAX."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
{before}
import bem.evidence.bm25 as bm25
print("jax" in sys.modules, bm25.tokens("A red lamp"))
"""


def outcome(folder: Path, before: str = "") -> str:
    (folder / "jax").mkdir(exist_ok=True)
    (folder / "jax/__init__.py").write_text("")
    (folder / "jax/lax.py").write_text("def top_k(*args): raise RuntimeError('no GPU left')")
    paths = os.pathsep.join([str(folder), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip


def test_jax_is_neither_imported_nor_called(tmp_path):
    assert outcome(tmp_path) == "False ['red', 'lamp']"


def test_a_jax_that_is_in_use_stays(tmp_path):
    assert outcome(tmp_path, "import jax.lax") == "True ['red', 'lamp']"
