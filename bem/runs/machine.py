"""What a result depends on beside the config: the machine, the versions, the revision."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bem

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy", "scipy", "sacrebleu")


def describe() -> dict[str, Any]:
    """Versions and machine, as they are written to `environment.json`."""
    return {
        "bem": bem.__version__,
        "revision": revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "versions": {name: installed(name) for name in LIBRARIES},
    }


def installed(library: str) -> str | None:
    """Version of an installed library, or None."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction sets of the processor; empty where the system does not tell."""
    return next((set(line.split()) for line in _cpuinfo() if line.startswith("flags")), set())


def usable_cores() -> int:
    """Cores that this process may use (a container or `taskset` may allow fewer than there are)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def revision() -> str | None:
    """Commit of the source tree that bem runs from, with a + if files differ; None outside git."""
    root = Path(bem.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit and commit[:12] + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text(errors="replace").splitlines() if info.is_file() else []
