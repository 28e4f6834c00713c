"""What acts on sequences that begin now, and what else stands ready for requests that name it."""

from __future__ import annotations

from typing import Any

import torch

from bem.engine.acts import Acts, acts_of, acts_of_shadow
from bem.errors import EngineError
from bem.routing.mounted import Mounted

SHORTEST = 8
"""Characters of a digest that name a version, if no other begins with them."""


class Versions:
    """One in use, and some that are kept beside it under names of their own."""

    def __init__(self, adapted: Any):
        self.adapted = adapted
        self.current = acts_of(adapted)
        self.kept: dict[str, Acts] = {}

    def renew(self, running: int) -> Acts:
        """What acts on sequences that begin now.

        Args:
            running: sequences that are under way.
        Raises:
            EngineError: another adapter is active, or weights were changed under those that run.
        """
        acts, before = self.in_use(), self.current
        if acts is before:
            return before
        if acts.wiring is not before.wiring:
            raise EngineError(
                "another adapter is active on the model now: make a new engine for it."
            )
        if not before.frozen and running:
            raise EngineError(
                f"the adapter's weights were changed in place while {running} sequences run on them: let "
                "them finish, or cancel them, before weights are changed."
            )
        self.current = acts
        return acts

    def in_use(self) -> Acts:
        """What would act on a sequence that began now; the same object while it is the same."""
        with torch.inference_mode(False):  # what is made here may train later
            acts, before = acts_of(self.adapted), self.current
        same = acts.version == before.version
        return before if same and (acts.acting is before.acting or not acts.frozen) else acts

    def is_gone(self, wanted: Acts | None) -> bool:
        """Was what a request named changed in place since it was submitted?"""
        if wanted is None or wanted.frozen:
            return False
        return wanted.version != self.current.version

    def keep(self, name: str, shadow: Any) -> str:
        """Have a release ready under a name; returns its digest. A name that is taken points to it from now on.

        Raises:
            EngineError: no routed model, whose releases alone can stand side by side; or an empty name.
            AttachError: it is no shadow of the model, or its weights are not finite.
        """
        if not name:
            raise EngineError("a version needs a name, got an empty one.")
        if not (isinstance(self.adapted, Mounted) and isinstance(shadow, Mounted)):
            raise EngineError(
                f"{name}: only releases of a model with experts stand side by side (bem.mount, shadow()): the "
                "weights of other adapters lie in the model itself, one version at a time."
            )
        with torch.inference_mode(False):
            self.kept[name] = acts_of_shadow(self.adapted, shadow)
        return self.kept[name].version.digest

    def drop(self, name: str) -> None:
        """Keep it no longer. Requests that were taken in under it go on.

        Raises:
            EngineError: there is none of that name.
        """
        if self.kept.pop(name, None) is None:
            raise EngineError(f"no version is kept as {name!r}. There is: {self._known()}.")

    def find(self, wanted: str) -> Acts:
        """By name or digest; a digest may be cut short.

        Raises:
            EngineError: there is none, or several.
        """
        if wanted in self.kept:
            return self.kept[wanted]
        there = {a.version.digest: a for a in (*self.kept.values(), self.in_use())}
        fits = [d for d in there if len(wanted) >= SHORTEST and d.startswith(wanted)]
        if len(fits) != 1:
            many = f"{len(fits)} versions begin with" if fits else "no version here is called"
            raise EngineError(f"{many} {wanted!r}. There is: {self._known()}.")
        return there[fits[0]]

    def _known(self) -> str:
        named = [f"{name} ({acts.version.digest[:12]})" for name, acts in self.kept.items()]
        return ", ".join([f"{self.in_use().version.digest[:12]} (in use)", *named])
