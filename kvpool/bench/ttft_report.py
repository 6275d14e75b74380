"""Times to first token as a table, as JSON and as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from kvpool.bench.report import Figure, Report
from kvpool.bench.ttft_phases import COLD, HBM, LABELS, PHASES, Timing
from kvpool.errors import InvalidArgumentError

COLORS = {"kvpool": "#1b6ca8", "mooncake": "#c8553d"}
OTHER_COLOR = "#5b5f66"
PANEL_INCHES = (4.6, 4.2)
DPI = 150


class TTFTReport(Report):
    """A report that holds timings beside figures."""

    def __init__(self) -> None:
        super().__init__("ttft")
        self.timings: list[Timing] = []

    def add_timings(self, timings: Sequence[Timing]) -> None:
        """Take in all phases of one shape."""
        self.timings += timings
        for timing in timings:
            hbm, cold = _beside(timings, timing, HBM), _beside(timings, timing, COLD)
            shape = timing.shape
            detail = {
                "engine": timing.system,
                "input": shape.input_tokens,
                "output": shape.output_tokens,
                "concurrency": shape.concurrency,
                "prompts": shape.prompts,
                "p90_ms": round(timing.p90_ms, 2),
                "cold_over_this": None if cold is None else round(cold / timing.median_ms, 3),
                "hit_share": None if timing.hit_share is None else round(timing.hit_share, 4),
                "same_text_as_hbm_hit": timing.same_text,
                "ttft_ms": [round(value, 2) for value in timing.ttft_ms],
            }
            ratio = None if hbm is None else timing.median_ms / hbm
            limit = None if hbm is None else "ttft_hbm_hit"
            self.add(Figure(f"ttft_{timing.phase}", timing.median_ms, "ms", limit, ratio, detail, hbm))

    def tables(self, title: str) -> list[Table]:
        """Return one table for times to first token and one for throughput, as far as there are any."""
        found = []
        if self.timings:
            found.append(self._times(title))
        pairs = [figure for figure in self.figures if "pairs" in figure.detail]
        if pairs:
            found.append(self._ratios(pairs, title if not found else "Throughput, in pairs"))
        return found

    def _times(self, title: str) -> Table:
        table = Table(title=title, title_justify="left")
        headings = (
            "engine",
            "tokens",
            "at once",
            "TTFT of",
            "ms",
            "p90",
            "of HBM hit",
            "cold / this",
            "hits",
            "same text",
        )
        for heading in headings:
            left = heading in {"engine", "TTFT of"}
            table.add_column(heading, justify="left" if left else "right", no_wrap=not left)
        for timing in self.timings:
            shape = timing.shape
            hbm, cold = _beside(self.timings, timing, HBM), _beside(self.timings, timing, COLD)
            table.add_row(
                timing.system,
                f"{shape.input_tokens}/{shape.output_tokens}",
                str(shape.concurrency),
                LABELS[timing.phase],
                f"{timing.median_ms:,.1f}",
                f"{timing.p90_ms:,.1f}",
                "" if hbm is None else f"{timing.median_ms / hbm:.2f}",
                "" if cold is None else f"{cold / timing.median_ms:.2f}",
                "?" if timing.hit_share is None else f"{timing.hit_share:.0%}",
                "" if timing.same_text is None else f"{timing.same_text} of {len(timing.ttft_ms)}",
                end_section=timing.phase == PHASES[-1],
            )
        return table

    def _ratios(self, figures: Sequence[Figure], title: str) -> Table:
        table = Table(title=title, title_justify="left")
        for heading in ("figure", "connector", "of no connector", "95 % sure", "range", "CPU time", "pairs", "failed"):
            left = heading in {"figure", "connector"}
            table.add_column(heading, justify="left" if left else "right", no_wrap=not left)
        for figure in figures:
            of = figure.detail
            table.add_row(
                figure.name,
                of["engine"],
                f"{figure.value:.3f}",
                *("{:.3f} to {:.3f}".format(*of[name]) for name in ("sure", "range")),
                "" if of["cpu_over_off"] is None else f"{of['cpu_over_off']:.3f}",
                str(of["pairs"]),
                f"{of['failed']} of {of['requests']}",
            )
        return table


def _beside(timings: Sequence[Timing], timing: Timing, phase: str) -> float | None:
    """Return the median in ms of another phase of the same system and shape."""
    found = (t for t in timings if t.phase == phase and (t.system, t.shape) == (timing.system, timing.shape))
    return next((t.median_ms for t in found), None)


def check_plot(path: str) -> None:
    """Raise InvalidArgumentError("plot") where no picture could be drawn; asked before anything is measured."""
    if not path.endswith(".png"):
        raise InvalidArgumentError("plot", f"must end in .png, not {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise InvalidArgumentError("plot", f"{path} lies in no folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgumentError("plot", "needs matplotlib: pip install 'kvpool[plot]'")


def draw(timings: Sequence[Timing], path: str) -> None:
    """Draw the medians as bars and every prompt as a dot, a panel for each shape. Raises click.ClickException."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    shapes = list(dict.fromkeys(timing.shape for timing in timings))
    systems = list(dict.fromkeys(timing.system for timing in timings))
    picture = Picture(figsize=(PANEL_INCHES[0] * len(shapes), PANEL_INCHES[1]), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    width = 0.8 / len(systems)
    for panel, shape in zip(panels, shapes, strict=True):
        for number, system in enumerate(systems):
            mine = {t.phase: t for t in timings if (t.shape, t.system) == (shape, system)}
            color = COLORS.get(system, OTHER_COLOR)
            for place, phase in enumerate(PHASES):
                if phase not in mine:
                    continue
                timing, x = mine[phase], place + (number - (len(systems) - 1) / 2) * width
                label = system if phase == COLD else None
                panel.bar(x, timing.median_ms, width * 0.92, color=color, alpha=0.85, label=label)
                panel.text(x, max(timing.ttft_ms) * 1.08, f"{timing.median_ms:,.0f}", ha="center", fontsize=8)
                panel.plot([x] * len(timing.ttft_ms), timing.ttft_ms, ".", color="#20242a", markersize=3, alpha=0.6)
        panel.set_yscale("log")
        panel.set_xticks(range(len(PHASES)), [LABELS[phase].replace(", ", "\n") for phase in PHASES])
        panel.set_title(f"{shape.input_tokens} in, {shape.output_tokens} out, {shape.concurrency} at once", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    panels[0].set_ylabel("time to first token, ms")
    if len(systems) > 1:
        panels[-1].legend(frameon=False)
    try:
        picture.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise click.ClickException(f"plot: cannot write {path}: {error.strerror}") from None
