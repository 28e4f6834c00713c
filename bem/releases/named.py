"""Adapters that ship with this package, by name; and folders elsewhere that are laid out alike.

    bem-smol/
      README.md      card: what it is, data and licences, training, verdict and its evidence
      config.yaml    the run that it comes from: base, dtype, tasks, which expert serves which skill, gates
      router/        the experts and the router between them: `bem.load_router(model, "bem-smol")`
      static/        a static LoRA that was trained on the same rows: `bem.load(model, "bem-smol")`
      held-out/      TASK.jsonl.gz: conversations that neither was trained on

`scripts/make_release.py` makes such a folder out of a finished run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bem.config import ExperimentConfig, load
from bem.errors import CheckpointError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shipped:
    """One release, in a folder as above."""

    name: str
    folder: Path
    about: str = ""

    @property
    def address(self) -> str:
        """What `bem.load` and a config take: its name, or its folder if the package does not have it."""
        return self.name if RELEASES.get(self.name) == self else str(self.folder)

    @property
    def card(self) -> Path:
        return self.folder / "README.md"

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def router(self) -> Path:
        return self.folder / "router"

    @property
    def static(self) -> Path:
        return self.folder / "static"

    def held_out(self, task: str) -> Path:
        """Held-out rows of a task."""
        return self.folder / "held-out" / f"{task}.jsonl.gz"

    @property
    def is_there(self) -> bool:
        return self.config_file.is_file()

    @property
    def verdict(self) -> str:
        """What the run that it comes from decided, in the card's words.

        Raises:
            CheckpointError: this installation does not hold it.
        """
        if not self.is_there:
            raise CheckpointError(_absent(self))
        section = self.card.read_text(encoding="utf-8").partition("\n## Verdict\n")[2]
        return " ".join(section.partition("\n|")[0].replace("**", "").split())

    @property
    def config(self) -> ExperimentConfig:
        """Of the run that it comes from: base, dtype, tasks, experts, gates.

        Raises:
            CheckpointError: this installation does not hold it.
        """
        if not self.is_there:
            raise CheckpointError(_absent(self))
        return load(self.config_file)


RELEASES = {
    release.name: release
    for release in (
        Shipped(
            "bem-smol",
            HERE / "bem-smol",
            "skills that switch inside one conversation, for smollm2-135m: QA over stories, styled text, "
            "JSON, intents, slots, SQL, shell",
        ),
    )
}
"""Name -> release."""


def static_of(name: str | Path) -> Path:
    """The folder of a static adapter: that of a release, by its name or folder; any other folder as it is.

    A name comes first: a folder of the same name is written `./NAME`.

    Raises:
        CheckpointError: neither a folder nor a release; the releases are listed.
    """
    return _part_of(name, "static")


def router_of(name: str | Path) -> Path:
    """The same for a router with its experts."""
    return _part_of(name, "router")


def _part_of(name: str | Path, part: str) -> Path:
    release = RELEASES.get(str(name))
    if release is not None and not release.is_there:
        raise CheckpointError(_absent(release))
    folder = Path(name) if release is None else release.folder
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {name} (looked in {folder.parent.resolve()}), and no release of that name. "
            f"Releases: {', '.join(RELEASES)}."
        )
    inside = folder / part
    return (
        inside
        if (inside / "manifest.json").is_file() and Shipped(str(name), folder).is_there
        else folder
    )


def _absent(release: Shipped) -> str:
    return (
        f"The release {release.name} is not in this installation: there is no {release.config_file}. Install BEM "
        "again, or make it with scripts/make_release.py."
    )
