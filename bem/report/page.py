"""`report.html` and `report.md` of a run, made from what lies in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bem.config import ArmConfig, ExperimentConfig
from bem.report import words as wording
from bem.report.plots import figures as plots
from bem.report.sections import evidence as report_evidence
from bem.report.sections import routing as report_routing
from bem.runs.folder import RunFolder, read_json, read_jsonl, write_text
from bem.runs.verdicts import measurements, read_verdicts
from bem.stats.measurement import Measurement
from bem.tasks.scoring import QUALITY

MOST_EXAMPLES = 8
MOST_CHARACTERS = 1200
"""Of a prompt in the side-by-side view; its end is what the model answered."""


@dataclass(frozen=True)
class Arm:
    """One arm as the report shows it."""

    name: str
    role: str
    colour: int
    description: str
    price: list[str]
    decision: str = ""
    sentence: str = ""
    reasons: list[str] = field(default_factory=list)
    checks: list[wording.Gate] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """One row of the score table."""

    label: str
    whole: bool
    """Over all examples, not one slice."""
    values: list[str]
    best: int | None
    """Which arm is best; None: all equal."""


@dataclass(frozen=True)
class Contrast:
    """A candidate beside one of its controls."""

    candidate: str
    control: str
    metric: str
    gain: str
    control_gain: str
    difference: str
    reading: str


@dataclass(frozen=True)
class Answer:
    arm: str
    colour: int
    text: str
    score: str


@dataclass(frozen=True)
class SideBySide:
    task: str
    id: str
    prompt: str
    reference: str
    answers: list[Answer]


@dataclass(frozen=True)
class Page:
    """Everything that the templates show."""

    name: str
    headline: str
    lead: str
    arms: list[Arm]
    effects: list[plots.Effect]
    forest: str
    scatter: str
    curves: str
    scores: list[Score]
    price_columns: list[str]
    controls: list[Contrast]
    routing: report_routing.RoutingPart | None
    evidence: report_evidence.EvidencePart | None
    examples: list[SideBySide]
    environment: list[tuple[str, str]]
    family: str
    seeds: int
    alpha: float
    repeat: str
    config: str

    @property
    def candidates(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.role == "candidate"]

    @property
    def refused(self) -> list[Arm]:
        return [arm for arm in self.candidates if arm.decision != "PROMOTE"]

    @property
    def sections(self) -> list[tuple[str, str]]:
        found = [
            ("effects", "Effects", True),
            ("latency", "Latency", self.scatter),
            ("scores", "Scores and prices", True),
            ("controls", "Controls", self.controls),
            ("routing", "Routing", self.routing),
            ("evidence", "Evidence", self.evidence),
            ("gates", "Gates", self.candidates),
            ("refused", "Not promoted", self.refused),
            ("training", "Training", self.curves),
            ("predictions", "Predictions", self.examples),
            ("environment", "Environment", True),
            ("repeat", "How to repeat it", True),
        ]
        return [(anchor, title) for anchor, title, there in found if there]


def write(run: str | Path) -> Path:
    """Write both reports of a run; returns the path of the HTML one.

    Raises:
        CheckpointError: the folder holds no run, or the run has not finished.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    folder = RunFolder(Path(run))
    page = page_of(folder)
    templates = Environment(
        loader=PackageLoader("bem.report"),
        autoescape=select_autoescape(["html.j2", "html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    write_text(folder.path / "report.md", templates.get_template("report.md.j2").render(page=page))
    html = folder.path / "report.html"
    write_text(html, templates.get_template("report.html.j2").render(page=page))
    return html


def page_of(folder: RunFolder) -> Page:
    """Read a run's folder and put together what the report shows."""
    config = folder.config
    environment = read_json(folder.path / "environment.json")
    verdicts = read_verdicts(folder.verdicts)
    measured = measurements(folder, config)
    arms = _arms(folder, config, verdicts, measured)
    colours = {arm.name: arm.colour for arm in arms}
    effects = _effects(config, verdicts, colours)
    base = measured[config.baseline.name]
    return Page(
        name=config.name,
        headline=_headline(arms),
        lead=_lead(config, base),
        arms=arms,
        effects=effects,
        forest=plots.forest(effects),
        scatter=_scatter(config, verdicts, colours),
        curves=_curves(folder, config, colours),
        scores=list(_scores(config, measured, verdicts["family"])),
        price_columns=["rank", "parameters", "FLOPs / token", *_phases(base), "peak memory"],
        controls=list(_contrasts(verdicts)),
        routing=report_routing.part_of(folder, config, measured, colours),
        evidence=report_evidence.part_of(folder, config, measured, colours),
        examples=_examples(folder, config, colours),
        environment=list(_environment(environment)),
        family=", ".join(verdicts["family"]),
        seeds=len(config.seeds),
        alpha=config.gates.alpha,
        repeat=_repeat(folder, config, environment),
        config=(folder.path / "config.yaml").read_text(encoding="utf-8"),
    )


def _headline(arms: Sequence[Arm]) -> str:
    candidates = [arm for arm in arms if arm.role == "candidate"]
    baseline = next(arm.name for arm in arms if arm.role == "baseline")
    better = [arm.name for arm in candidates if arm.decision == "PROMOTE"]
    if better:
        return f"Better than {baseline}: {', '.join(better)}"
    if all(arm.decision == "REJECT" for arm in candidates):
        return f"Nothing here is better than {baseline}"
    return f"Nothing here is proven better than {baseline}"


def _lead(config: ExperimentConfig, base: Measurement) -> str:
    tasks = [t if isinstance(t, str) else t.name for t in config.data.tasks]
    groups = len(set(base.clusters)) if base.clusters is not None else base.n
    return (
        f"Run {config.name}: {len(config.arms)} arms on {config.base}, tasks {', '.join(tasks)}; "
        f"{base.n:,} held-out examples from {groups:,} source documents, "
        f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}, "
        f"{config.training.steps} training steps each."
    )


def _arms(
    folder: RunFolder,
    config: ExperimentConfig,
    verdicts: dict[str, Any],
    measured: dict[str, Measurement],
) -> list[Arm]:
    base = measured[config.baseline.name]
    ordered = sorted(config.arms, key=lambda arm: arm.role != "baseline")  # the baseline first
    arms = []
    for colour, arm in enumerate(ordered):
        manifest = read_json(folder.cell(arm.name, config.seeds[0]).checkpoint / "manifest.json")
        judged = verdicts["candidates"].get(arm.name) or verdicts["controls"].get(arm.name)
        price = _price(measured[arm.name], base, _rank(manifest, config), judged)
        shown = Arm(arm.name, arm.role, colour, _describe(config, arm), price)
        if arm.role == "candidate" and judged:
            shown = replace(
                shown,
                decision=judged["decision"],
                sentence=wording.sentence(judged),
                reasons=wording.reasons(judged),
                checks=wording.gates(judged),
            )
        arms.append(shown)
    return arms


ABOUT = {
    "s0": "static LoRA",
    "pt1": "head-group gates",
    "v1": "head-group gates and rank mask",
    "v2": "head-group gates and attention temperatures, shaped by evidence",
    "v3": "Kronecker update at the MLP",
    "v4": "FiLM on the residual stream",
}


def _describe(config: ExperimentConfig, arm: ArmConfig) -> str:
    if arm.route:
        return f"experts, {report_routing.ROUTES[arm.route]}"
    changes = {k: v for k, v in arm.adapters.items() if k not in ("variant", "rank")}
    details = [f"{key} {value}" for key, value in changes.items()]
    if arm.role != "baseline":
        details.append("rank as configured" if arm.match == "none" else f"equal {arm.match}")
    about = ABOUT[config.adapter_of(arm).variant]
    return f"{about} ({', '.join(details)})" if details else about


def _rank(manifest: dict[str, Any], config: ExperimentConfig) -> str:
    """`8`, `8 / 4` where the two sites differ; `7 × 8 + 16`: seven experts and a shared one."""
    adapter = manifest.get("adapter")
    if adapter is None:
        assert config.routing is not None
        shared = config.routing.shared_rank if "experts" in manifest else 0
        experts = manifest["experts"] if "experts" in manifest else manifest["peer"]["experts"]
        count = len(experts) - (shared > 0)
        return f"{count} × {config.routing.expert_rank}" + (f" + {shared}" if shared else "")
    ranks = [adapter.get("rank_attn"), adapter.get("rank_mlp")]
    if all(r is None for r in ranks):
        return str(adapter["rank"])
    return " / ".join(str(adapter["rank"] if r is None else r) for r in ranks)


def _price(
    m: Measurement, base: Measurement, rank: str, judged: dict[str, Any] | None
) -> list[str]:
    ratios = {c["name"]: c["value"] for c in judged["checks"]} if judged else {}
    return [
        rank,
        _against(m.adapter_parameters, base.adapter_parameters),
        _against(m.adapter_flops_per_token, base.adapter_flops_per_token),
        *(_latency(m, phase, ratios.get(f"latency.{phase}")) for phase in base.latency_ms),
        "–" if m.memory_bytes is None else f"{m.memory_bytes / 2**20:.0f} MiB",
    ]


def _against(value: float | None, base: float | None) -> str:
    if value is None:
        return "–"
    ratio = f" (×{value / base:.2f})" if base else ""
    return f"{value:,.0f}{ratio}"


def _latency(m: Measurement, phase: str, ratio: float | None) -> str:
    p50 = f"{float(np.median(np.asarray(m.latency_ms[phase]))):.1f} ms"
    return p50 + (f" (×{ratio:.2f})" if ratio else "")


def _phases(base: Measurement) -> list[str]:
    return [f"{phase} p50" for phase in base.latency_ms]


def _effects(
    config: ExperimentConfig, verdicts: dict[str, Any], colours: dict[str, int]
) -> list[plots.Effect]:
    """The primary family on all examples, candidates before controls."""
    rows = []
    judged = {**verdicts["candidates"], **verdicts["controls"]}
    for metric in verdicts["family"]:
        for name, verdict in judged.items():
            for e in verdict["effects"]:
                if e["metric"] != metric or e["slice"] is not None or e["ci_low"] is None:
                    continue
                points = e["points_per_unit"] or 1.0
                low, high = e["ci_low"] * points, e["ci_high"] * points
                rows.append(
                    plots.Effect(
                        group=metric + ("" if e["points_per_unit"] else " (own units)"),
                        label=name,
                        value=e["gain"] * points,
                        low=low,
                        high=high,
                        colour=colours[name],
                        clear=low > 0 or high < 0,
                        control=name in verdicts["controls"],
                    )
                )
    return rows


def _scatter(config: ExperimentConfig, verdicts: dict[str, Any], colours: dict[str, int]) -> str:
    """One panel per phase: quality in the first primary metric against the latency ratio."""
    metric = verdicts["family"][0]
    panels: dict[str, list[plots.Point]] = {}
    for name, verdict in {**verdicts["candidates"], **verdicts["controls"]}.items():
        found = [e for e in verdict["effects"] if e["metric"] == metric and e["slice"] is None]
        for check in verdict["checks"]:
            kind, _, phase = check["name"].partition(".")
            if kind != "latency" or check["value"] is None or not found:
                continue
            e, points = found[0], found[0]["points_per_unit"] or 1.0
            panels.setdefault(phase, []).append(
                plots.Point(
                    label=name,
                    latency=check["value"],
                    latency_low=check["ci_low"] or check["value"],
                    latency_high=check["ci_high"] or check["value"],
                    quality=e["gain"] * points,
                    quality_low=e["ci_low"] * points,
                    quality_high=e["ci_high"] * points,
                    colour=colours[name],
                    control=name in verdicts["controls"],
                )
            )
    if not panels:
        return ""
    return plots.quality_latency(panels, config.gates.latency_ratio_max, metric)


def _curves(folder: RunFolder, config: ExperimentConfig, colours: dict[str, int]) -> str:
    curves = []
    for arm in config.arms:
        for seed in config.seeds:
            rows = read_jsonl(folder.cell(arm.name, seed).metrics)
            if rows:
                steps, loss = [r["step"] for r in rows], [r["loss"] for r in rows]
                control = arm.role == "control"
                curves.append(plots.Curve(arm.name, steps, loss, colours[arm.name], control))
    return plots.training_curves(curves) if curves else ""


def _scores(
    config: ExperimentConfig, measured: dict[str, Measurement], family: Sequence[str]
) -> Iterator[Score]:
    """Means over examples and seeds: every metric on the whole, the first primary one on each slice."""
    arms = sorted(config.arms, key=lambda arm: arm.role != "baseline")
    base = measured[config.baseline.name]
    for metric in base.metrics:
        if metric == QUALITY and metric not in family:
            continue  # the same numbers as the tasks' own metric
        meaning = base.metric(metric)
        whole = np.ones(base.n, dtype=bool)
        parts = {"": whole, **(base.slices if metric == family[0] else {})}
        for part, mask in parts.items():
            values = [_mean(measured[arm.name], metric, np.asarray(mask)) for arm in arms]
            known = [v for v in values if np.isfinite(v)]
            best = None
            if known and max(known) > min(known):
                top = max(known) if meaning.higher_is_better else min(known)
                best = values.index(top)
            scale = meaning.points_per_unit or 1.0
            digits = 1 if meaning.points_per_unit else 3
            shown = [f"{v * scale:.{digits}f}" if np.isfinite(v) else "–" for v in values]
            yield Score(part or metric, not part, shown, best)


def _mean(m: Measurement, metric: str, mask: np.ndarray) -> float:
    """NaN where the arm has no such metric, or no example of the slice has it."""
    if metric not in m.metrics:
        return float("nan")
    return float(np.asarray(m.metrics[metric])[:, mask].mean())


def _contrasts(verdicts: dict[str, Any]) -> Iterator[Contrast]:
    """Every primary metric of every candidate beside its controls, where either shows something."""
    for name, row in verdicts["contrasts"].items():
        for control, contrast in row.items():
            for metric in verdicts["family"]:
                gain = _whole(verdicts["candidates"][name], metric)
                control_gain = _whole(verdicts["controls"][control], metric)
                difference = _whole(contrast, metric)
                if gain is None or control_gain is None or difference is None:
                    continue
                yield Contrast(
                    candidate=name,
                    control=control,
                    metric=metric,
                    gain=_with_interval(gain),
                    control_gain=_with_interval(control_gain),
                    difference=_with_interval(difference),
                    reading=_reading(difference, control),
                )


def _whole(verdict: dict[str, Any], metric: str) -> dict[str, Any] | None:
    fits = (e for e in verdict["effects"] if e["metric"] == metric and e["slice"] is None)
    return next((e for e in fits if e["ci_low"] is not None), None)


def _with_interval(e: dict[str, Any]) -> str:
    return f"{wording.signed(e, e['gain'])} {wording.interval(e)}"


def _reading(difference: dict[str, Any], control: str) -> str:
    if difference["ci_low"] > 0:
        return f"more than {control}"
    if difference["ci_high"] < 0:
        return f"less than {control}"
    return f"not told apart from {control}"


def _examples(
    folder: RunFolder, config: ExperimentConfig, colours: dict[str, int]
) -> list[SideBySide]:
    """Of each task the examples on which the arms differ most, with the first seed's answers."""
    seed = config.seeds[0]
    said = {a: read_jsonl(folder.cell(a, seed).predictions) for a in colours}
    if not all(said.values()):
        return []
    rows = list(zip(*said.values(), strict=True))
    tasks = list(dict.fromkeys(row[0]["task"] for row in rows))
    chosen = []
    for task in tasks:
        mine = [row for row in rows if row[0]["task"] == task and _spread(row) > 0]
        chosen += sorted(mine, key=_spread, reverse=True)[: max(1, MOST_EXAMPLES // len(tasks))]
    return [_side_by_side(row, list(said), colours) for row in chosen]


def _spread(row: Sequence[dict[str, Any]]) -> float:
    qualities = [answer["scores"]["quality"] for answer in row]
    return max(qualities) - min(qualities)


def _side_by_side(
    row: Sequence[dict[str, Any]], arms: Sequence[str], colours: dict[str, int]
) -> SideBySide:
    prompt = row[0]["input"]
    return SideBySide(
        task=row[0]["task"],
        id=row[0]["id"].removeprefix(row[0]["task"] + "/"),
        prompt="…" * (len(prompt) > MOST_CHARACTERS) + prompt[-MOST_CHARACTERS:],
        reference=row[0]["references"][0],
        answers=[
            Answer(arm, colours[arm], answer["prediction"], f"{answer['scores']['quality']:.2f}")
            for arm, answer in zip(arms, row, strict=True)
        ],
    )


def _environment(environment: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in environment.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, dict):
            yield from _environment(value, name)
        elif key != "command":
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _repeat(folder: RunFolder, config: ExperimentConfig, environment: dict[str, Any]) -> str:
    again = f"bem run {folder.path}/config.yaml --name {config.name}-again"
    lines = [environment["command"]] if environment.get("command") else []
    lines.append(f"# or, from the resolved config beside this report:\n{again}" if lines else again)
    if environment.get("revision"):
        lines.insert(0, f"git checkout {environment['revision'].rstrip('+')}")
    return "\n".join(lines)
