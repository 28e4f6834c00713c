"""`report.html` and `report.md` of a run, made from what lies in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from bem.errors import CheckpointError
from bem.files import read_json, write_text
from bem.report import words
from bem.report.plots import figures
from bem.report.sections import (
    arms,
    effects,
    evidence,
    examples,
    routing,
    scores,
    setting,
    training,
    tuning,
)
from bem.runs.folder import RunFolder
from bem.runs.verdicts import measurements, read_verdicts


@dataclass(frozen=True)
class Page:
    """Everything that the templates show."""

    name: str
    headline: str
    lead: str
    gate_changes: str
    """Settings of the gates that are not the defaults; "" if all are."""
    arms: list[arms.Arm]
    effects: list[figures.ForestRow]
    forest: str
    scatter: str
    curves: str
    tuning: tuning.TuningPart | None
    scores: list[scores.Score]
    price_columns: list[str]
    controls: list[effects.Contrast]
    routing: routing.RoutingPart | None
    evidence: evidence.EvidencePart | None
    examples: list[examples.SideBySide]
    environment: list[tuple[str, str]]
    family: str
    seeds: int
    alpha: float
    repeat: str
    config: str

    @property
    def candidates(self) -> list[arms.Arm]:
        return [arm for arm in self.arms if arm.role == "candidate"]

    @property
    def refused(self) -> list[arms.Arm]:
        return [arm for arm in self.candidates if arm.decision != "PROMOTE"]

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Anchor and title of what is there."""
        titles = [
            ("effects", "Effects", True),
            ("latency", "Latency", self.scatter),
            ("scores", "Scores and prices", True),
            ("controls", "Controls", self.controls),
            ("routing", "Routing", self.routing),
            ("evidence", "Evidence", self.evidence),
            ("gates", "Gates", self.candidates),
            ("refused", "Not promoted", self.refused),
            ("training", "Training", self.curves or self.tuning),
            ("predictions", "Predictions", self.examples),
            ("environment", "Environment", True),
            ("repeat", "How to repeat it", True),
        ]
        return [(anchor, title) for anchor, title, there in titles if there]


def write(run: str | Path) -> Path:
    """Write both reports of a run; returns the path of the HTML one.

    Raises:
        CheckpointError: the folder holds no run, or the run has not finished.
    """
    folder = RunFolder(Path(run))
    page, templates = page_of(folder), _templates()
    write_text(folder.path / "report.md", templates.get_template("report.md.j2").render(page=page))
    html = folder.path / "report.html"
    write_text(html, templates.get_template("report.html.j2").render(page=page))
    return html


def page_of(folder: RunFolder) -> Page:
    """Read a run's folder and put together what the report shows."""
    config = folder.config
    environment = read_json(folder.path / "environment.json", CheckpointError)
    judgement = read_verdicts(folder.verdicts).judgement
    measured = measurements(folder, config)
    shown = arms.arms_of(folder, config, judgement, measured)
    colours = {arm.name: arm.colour for arm in shown}
    differences = effects.effects_of(judgement, colours)
    base = measured[config.baseline.name]
    return Page(
        name=config.name,
        headline=words.headline(judgement.candidates, config.baseline.name),
        lead=setting.lead(config, base),
        gate_changes=words.gate_changes(config.gates),
        arms=shown,
        effects=differences,
        forest=figures.forest(differences) if differences else "",
        scatter=effects.scatter(config, judgement, colours),
        curves=training.curves_of(folder, config, colours),
        tuning=tuning.part_of(folder, config),
        scores=list(scores.scores_of(config, measured, judgement.family)),
        price_columns=arms.price_columns(base),
        controls=list(effects.contrasts_of(judgement)),
        routing=routing.part_of(folder, config, measured, colours),
        evidence=evidence.part_of(folder, config, measured, colours),
        examples=examples.examples_of(folder, config, colours),
        environment=list(setting.environment_rows(environment)),
        family=", ".join(judgement.family),
        seeds=len(config.seeds),
        alpha=config.gates.alpha,
        repeat=setting.repeat(folder, config, environment),
        config=(folder.path / "config.yaml").read_text(encoding="utf-8"),
    )


def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("bem.report"),
        autoescape=select_autoescape(["html.j2", "html"]),
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["cell"] = _cell
    return templates


def _visible(value: Any) -> Any:
    """Whatever a template shows: a model's answer may hold anything."""
    if isinstance(value, Markup):
        return Markup(words.visible(value))
    return words.visible(value) if isinstance(value, str) else value


def _cell(text: Any) -> str:
    """Text inside a table of Markdown: one line, no markup of its own."""
    line = " ".join(str(text).split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
