"""From a version store onto a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from bem.adapters.attach import load
from bem.adapters.attached import Attached
from bem.adapters.checkpoint import check_base
from bem.adapters.lora import CONFIG
from bem.adapters.version import BaseIdentity, base_identity
from bem.errors import CheckpointError
from bem.routing.mount import load_router
from bem.runs.release import Release
from bem.runs.store import Store, Taken


def base_of(store: Store) -> tuple[str, str] | None:
    """(name or folder, dtype) of the base for which what is in use was made, or else what was put in last; None:
    there is no release, or none that says so.

    Raises:
        CheckpointError: there is no store, or no release in it is whole.
    """
    release = store.load_current().release or next(iter(store.known()), None)
    if release is None:
        return None
    with store.shelf.folder(release) as folder:
        for config in sorted(folder.rglob(CONFIG)):
            if name := json.loads(config.read_text()).get("base_model_name_or_path"):
                return name, release.base["dtype"]
    return None


def attach_release(store: Store, release: Release, model: Any) -> Attached:
    """Put a release on its base: a static adapter, or a router with its experts (then a `Mounted`).

    Raises:
        BaseMismatch: the model is another base; says how it differs.
        CheckpointError: a file is missing or damaged, or the files are not the version that is named.
    """
    check_base(BaseIdentity(**release.base), model, f"release {release.short}")
    with store.shelf.folder(release) as folder:
        attached = load_router(model, folder) if release.kind == "router" else load(model, folder)
    if attached.version.digest != release.version:
        raise CheckpointError(
            f"release {release.short} loads as version {attached.version.digest[:12]}: another BEM wrote it."
        )
    return attached


def load_current(store: Store, model: Any) -> tuple[Attached | None, Taken]:
    """Put on a model what is in use, or where that is damaged the last good release before it.

    Returns:
        What was attached (None: the bare base is in use), and which release it is and why.
    Raises:
        BaseMismatch: the store serves another base.
        CheckpointError: there is no store, or no release in it is whole.
    """
    taken = store.load_current(asdict(base_identity(model)))
    release = taken.release
    return (attach_release(store, release, model) if release else None), taken
