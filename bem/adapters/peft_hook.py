"""`import bem` is enough for PEFT to know our method, and imports neither PEFT nor torch.

PEFT has no entry point for methods of others. So we enter ours as soon as PEFT itself was imported, or
at once if it was imported before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

METHOD = "bem.adapters.peft_method"  # registers itself when it is imported


class AfterPeft(MetaPathFinder):
    """Finds PEFT as everybody does, and imports our method behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of PEFT, whose loader also runs our registration; None for all else."""
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                import_module(METHOD)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Make PEFT know BEM, now or as soon as it is imported."""
    if "peft" in sys.modules:
        import_module(METHOD)
    elif not any(isinstance(finder, AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterPeft())
