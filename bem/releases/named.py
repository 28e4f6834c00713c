"""Adapters that ship with this package, by name.

bem-smol/
  README.md         card: what it is, data and licences, training, verdict and its evidence
  router/           the experts and the router between them: `bem.load_router(model, "bem-smol")`
  static/           the static LoRA of as many parameters: `bem.load(model, "bem-smol")`
  held-out.jsonl.gz conversations that neither was trained on
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """One of them."""

    name: str
    base: str
    """Name of the base that it was trained on; see `bem base list`."""
    about: str

    @property
    def folder(self) -> Path:
        return Path(__file__).parent / self.name

    @property
    def router(self) -> Path:
        return self.folder / "router"

    @property
    def static(self) -> Path:
        return self.folder / "static"

    def held_out(self, task: str) -> Path:
        """Held-out rows of a task."""
        return self.folder / "held-out" / f"{task}.jsonl.gz"


RELEASES = {
    release.name: release
    for release in (
        Release(
            "bem-smol", "smollm2-135m",
            "seven skills in one conversation: QA over stories, styled text, JSON, intents, slots, SQL, shell",
        ),
    )
}  # fmt: skip
"""Name -> release."""


def static_of(folder: str | Path) -> Path:
    """The folder of a static adapter: that of a release's name, or the one that is named."""
    release = RELEASES.get(str(folder))
    return Path(folder) if release is None or Path(folder).exists() else release.static


def router_of(folder: str | Path) -> Path:
    """The folder of a router: that of a release's name, or the one that is named."""
    release = RELEASES.get(str(folder))
    return Path(folder) if release is None or Path(folder).exists() else release.router
