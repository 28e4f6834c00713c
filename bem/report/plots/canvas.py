"""The canvas of a report's figures: SVG text that takes its colours from the page, light or dark.

Colours are drawn as marker values that `svg` replaces by CSS variables: `--ink --muted --line --paper
--promote --reject --inconclusive` and `--arm-0 ... --arm-11`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

INK, MUTED, LINE, PAPER = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04"
PROMOTE, REJECT, INCONCLUSIVE = "#0a0a05", "#0a0a06", "#0a0a07"
N_ARM_COLOURS = 12

_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--paper",
    PROMOTE: "--promote",
    REJECT: "--reject",
    INCONCLUSIVE: "--inconclusive",
    **{f"#0a0b{i:02x}": f"--arm-{i}" for i in range(N_ARM_COLOURS)},
}


def arm_colour(index: int) -> str:
    return f"#0a0b{index % N_ARM_COLOURS:02x}"


def axes_of(width: float, height: float) -> tuple[Any, Any]:
    figure = blank_figure(width, height)
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def blank_figure(width: float, height: float) -> Any:
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def plain(axes: Any) -> None:
    """No frame but the bottom line, colours of the page."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=9, color=LINE)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    axes.set_axisbelow(True)


def svg(figure: Any, name: str, title: str) -> str:
    """The figure as one <svg> element: page colours, no date, ids of its own."""
    _literal(figure)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    view = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">") + 1 :]
    return f'<svg role="img" aria-label="{title}" {view.group(0) if view else ""}>{body}'


def labels_beside(axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside their marks, pushed apart vertically where they would overlap."""
    figure = axes.figure
    _literal(figure)
    axes.autoscale_view()
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    placed: list[tuple[float, float, float]] = []  # left, right and height in pixels
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        px, py = axes.transData.transform((x, y))
        left, width, at = px + 7 * scale, 6.2 * scale * len(text), py + 6 * scale
        while any(
            left < r and left + width > lft and abs(at - h) < 11 * scale for lft, r, h in placed
        ):
            at += 2 * scale
        placed.append((left, left + width, at))
        axes.annotate(
            text, (x, y), xytext=((left - px) / scale, (at - py) / scale),
            textcoords="offset points", color=colour, fontsize=9, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _literal(figure: Any) -> None:
    """Names are shown as they are: a dollar sign begins no formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def arrows(axes: Any, left: str, right: str) -> None:
    for x, text, align in ((0.0, f"← {left}", "left"), (1.0, f"{right} →", "right")):
        axes.text(
            x, 1.0, text, transform=axes.transAxes, ha=align, va="bottom", color=MUTED, fontsize=8
        )
