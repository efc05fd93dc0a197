"""Plots: an HTML page that needs nothing else, or a PNG where matplotlib is installed."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from encode_server.errors import StartupError

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50
COLORS = ("#2f6fd0", "#d18b2c", "#1d9a8a", "#c8362f", "#8e6bbf")
STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:32px auto;max-width:800px;padding:0 16px;color:#1b2330}
body{background:#fff}h1{font-size:20px}h2{font-size:15px;margin-bottom:4px}svg{width:100%;height:auto}
text{font:12px system-ui,sans-serif;fill:#5d6878}
.grid{stroke:#e3e6eb}.line{fill:none;stroke-width:2}p{color:#5d6878}"""


@dataclass(frozen=True)
class Line:
    """A line through `points` (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot. `limit`: a height to mark, with its name. `log`: both axes are logarithmic."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    limit: tuple[float, str] | None = None
    log: bool = False


def write_plot(path: Path, title: str, notes: Sequence[str], panels: Sequence[Panel]) -> None:
    """Write the panels as HTML or PNG, by the file's ending. Raises StartupError for another ending, or without
    matplotlib."""
    if path.suffix == ".html":
        path.write_text(as_html(title, notes, panels))
    elif path.suffix == ".png":
        _as_png(path, title, panels)
    else:
        raise StartupError(f"--plot: got {path.name!r}, takes a file that ends in .html or .png")


def as_html(title: str, notes: Sequence[str], panels: Sequence[Panel]) -> str:
    """A page of its own, with the plots as SVG."""
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    for panel in panels:
        body += [f"<h2>{html.escape(panel.title)}</h2>", _svg(panel)]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{STYLE}</style>{''.join(body)}</html>\n"


def _svg(panel: Panel) -> str:
    points = [point for line in panel.lines for point in line.points]
    heights = [y for _, y in points] + ([panel.limit[0]] if panel.limit else [])
    across, up = _Axis([x for x, _ in points], panel.log), _Axis(heights, panel.log)

    def at(x: float, y: float) -> str:
        left = LEFT + across.place(x) * (WIDTH - LEFT - RIGHT)
        return f"{left:.1f},{HEIGHT - BOTTOM - up.place(y) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(panel.title)}">']
    for tick in up.ticks():
        x, y = at(across.low, tick).split(",")
        parts.append(f'<path class="grid" d="M{x},{y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(y) + 4}" text-anchor="end">{tick:g}</text>')
    for tick in across.ticks():
        x = at(tick, up.low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    if panel.limit:
        x, y = at(across.low, panel.limit[0]).split(",")
        parts.append(f'<path d="M{x},{y}H{WIDTH - RIGHT}" stroke="#c8362f" stroke-dasharray="5 4"/>')
        name = html.escape(panel.limit[1])
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{float(y) - 6}" text-anchor="end">{name}</text>')
    for number, line in enumerate(panel.lines):
        color = COLORS[number % len(COLORS)]
        drawn = " ".join(at(x, y) for x, y in line.points)
        parts.append(f'<polyline class="line" stroke="{color}" points="{drawn}"/>')
        parts += [
            f'<circle r="3" fill="{color}" cx="{x}" cy="{y}"/>' for x, y in (at(*p).split(",") for p in line.points)
        ]
        left = LEFT + 12 + 150 * number
        parts.append(f'<circle r="4" fill="{color}" cx="{left}" cy="{TOP - 8}"/>')
        parts.append(f'<text x="{left + 9}" y="{TOP - 4}">{html.escape(line.name)}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(panel.x)}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    turned = f'transform="rotate(-90 16 {middle})"'
    parts.append(f'<text x="16" y="{middle}" text-anchor="middle" {turned}>{html.escape(panel.y)}</text></svg>')
    return "".join(parts)


class _Axis:
    """Where a value lies between the ends of an axis, 0 to 1."""

    def __init__(self, values: Sequence[float], log: bool) -> None:
        above = [value for value in values if value > 0] or [1.0]
        self._log = log
        if log:
            self.low = 10.0 ** math.floor(math.log10(min(above)))
            self.high = max(10.0 ** math.ceil(math.log10(max(above))), self.low * 10)
        else:
            self.low, self.high = 0.0, max(above) * 1.08

    def place(self, value: float) -> float:
        if self._log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return value / self.high

    def ticks(self) -> list[float]:
        if self._log:
            low, high = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**power for power in range(low, high + 1)]
        step = 10.0 ** math.floor(math.log10(self.high / 4))
        step *= next(factor for factor in (1, 2, 2.5, 5, 10) if self.high / (step * factor) <= 6)
        return [number * step for number in range(int(self.high / step) + 1)]


def _as_png(path: Path, title: str, panels: Sequence[Panel]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StartupError("--plot FILE.png needs matplotlib: pip install matplotlib, or take FILE.html") from None
    figure = Figure(figsize=(8, 3.6 * len(panels)), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        for color, line in zip(COLORS * 9, panel.lines, strict=False):
            axes.plot(*zip(*line.points, strict=True), marker="o", markersize=3.5, color=color, label=line.name)
        if panel.limit:
            axes.axhline(panel.limit[0], color="#c8362f", linestyle="--", linewidth=1, label=panel.limit[1])
        if panel.log:
            axes.loglog()
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.grid(color="#e3e6eb")
        axes.legend()
    figure.savefig(path, dpi=120)
