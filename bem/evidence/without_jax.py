"""bm25s, imported without JAX.

Where JAX is installed, bm25s calls it while it is imported, and JAX then takes three quarters of the
GPU's memory for itself, in every process, or fails where there is no GPU left to take. We use the part
of bm25s that needs none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Importing these modules is an ImportError in here."""
    kept = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))  # pyright: ignore - None means: not to be imported
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


with _hidden("jax", "jax.lax"):
    import bm25s

__all__ = ["bm25s"]
