"""Routings beside each other: one table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click
from rich.table import Table

from kvpool.bench.pd_results import Row, Where
from kvpool.bench.report import Figure, Report

COLORS: Final = {Where.HBM: "#1b6ca8", Where.OWN: "#6aa9d8", Where.OTHER: "#e0a458", Where.NONE: "#c9ccd1"}
LABELS: Final = {
    Where.HBM: "engine's own cache",
    Where.OWN: "own node's memory",
    Where.OTHER: "other nodes",
    Where.NONE: "computed",
}
PANEL_INCHES: Final = (5.2, 4.2)
DPI: Final = 150


class PDReport(Report):
    """A report that holds rows beside figures."""

    def __init__(self) -> None:
        super().__init__("pd")
        self.rows: list[Row] = []

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Take in all routings of one workload; the first is what the others are compared with."""
        self.rows += rows
        base = rows[0]
        for row in rows:
            counted = {where.value: row.tokens(where) for where in Where}
            detail = {
                "workload": row.workload,
                "routing": row.routing,
                "engines": row.engines,
                "rounds": len(row.rounds),
                "requests": len(row.ttft_ms),
                "prompt_tokens": row.prompt_tokens,
                "tokens": counted,
                "moved_tokens": row.moved,
                "ttft_p50_ms": round(row.ttft_at(0.5), 2),
                "ttft_p90_ms": round(row.ttft_at(0.9), 2),
                "output_tokens_s": round(row.output_tokens_s, 2),
                "ttft_ms": [round(value, 2) for value in row.ttft_ms],
            }
            if row is not base:
                found = row.beside(base)
                detail["near_hits_ratio"] = _over(row, base)
                detail["ttft_ratio_each"] = {
                    "median": round(found.median, 4), "from": round(found.sure_from, 4), "to": round(found.sure_to, 4)
                }  # fmt: skip
            limit = None if row is base else f"ttft_mean, {base.routing}"
            ratio = None if row is base else row.mean_ms / base.mean_ms
            self.add(
                Figure("ttft_mean", row.mean_ms, "ms", limit, ratio, detail, None if row is base else base.mean_ms)
            )
            if row is not base:
                self.note(_words(row, base))

    def tables(self, title: str) -> list[Table]:
        """Return one table for workloads and one for the rest, as far as there are any."""
        found = [self._rows(title)] if self.rows else []
        rest = [figure for figure in self.figures if figure.name != "ttft_mean"]
        return [*found, _transfers(rest, "Transfer" if found else title)] if rest else found

    def _rows(self, title: str) -> Table:
        table = Table(title=title, title_justify="left")
        for heading in ("workload", "routing"):
            table.add_column(heading, no_wrap=True)
        for heading in ("prompt tokens", "HBM", "own node", "other node", "computed"):
            table.add_column(heading, justify="right")
        for heading in ("p50", "p90", "mean", "tok/s"):
            table.add_column(heading, justify="right", header_style="bold")
        for number, row in enumerate(self.rows):
            last = number + 1 == len(self.rows) or self.rows[number + 1].workload != row.workload
            table.add_row(
                row.workload, row.routing, f"{row.prompt_tokens:,}", *(_share(row, where) for where in Where),
                *(f"{value:,.0f}" for value in (row.ttft_at(0.5), row.ttft_at(0.9), row.mean_ms)),
                f"{row.output_tokens_s:,.1f}", end_section=last,
            )  # fmt: skip
        table.caption = "tokens of prompts by where they came from; times to first token, ms; tokens generated a second"
        return table


def _transfers(figures: Sequence[Figure], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("system", "decode asked", "figure", "ms", "each", "beside", "ms", "ratio"):
        table.add_column(heading, justify="right" if heading in {"ms", "ratio"} else "left")
    for figure in figures:
        detail = figure.detail
        table.add_row(
            detail["system"], detail["decode asked"], figure.name, f"{figure.value:,.1f}",
            ", ".join(f"{value:,.0f}" for value in detail["each_ms"]), figure.limit or "",
            "" if figure.limit_value is None else f"{figure.limit_value:,.1f}",
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
        )  # fmt: skip
    return table


def _share(row: Row, where: Where) -> str:
    tokens = row.tokens(where)
    if tokens is None:
        return "?"
    return f"{tokens:,} {tokens / row.prompt_tokens:4.0%}" if row.prompt_tokens else f"{tokens:,}"


def _over(row: Row, base: Row) -> float | None:
    return round(row.near_tokens / base.near_tokens, 3) if base.near_tokens else None


def _words(row: Row, base: Row) -> str:
    found, ratio = row.beside(base), _over(row, base)
    hits = "" if ratio is None else f"{ratio:.2f} x the tokens hit in HBM or in the own node's memory, "
    return (
        f"{row.workload}: {row.routing} beside {base.routing}: {hits}{row.mean_ms / base.mean_ms:.2f} x the mean time "
        f"to first token; request by request {found.median:.2f} x (95 %: {found.sure_from:.2f} to {found.sure_to:.2f})"
    )


def draw(rows: Sequence[Row], path: str) -> None:
    """Draw where tokens came from as bars, and times to first token as curves. Raises click.ClickException."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    workloads = list(dict.fromkeys(row.workload for row in rows))
    picture = Picture(figsize=(PANEL_INCHES[0] * len(workloads), 2 * PANEL_INCHES[1]), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(2, len(workloads), squeeze=False)
    for column, workload in enumerate(workloads):
        mine = [row for row in rows if row.workload == workload]
        bars, curves = panels[0][column], panels[1][column]
        left = [0.0] * len(mine)
        for where in Where:
            widths = [(row.tokens(where) or 0) / max(1, row.prompt_tokens) for row in mine]
            bars.barh([row.routing for row in mine], widths, left=left, color=COLORS[where], label=LABELS[where])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        bars.set_title(workload, fontsize=10)
        bars.invert_yaxis()
        bars.set_xlabel("share of the prompts' tokens")
        for row in mine:
            times = sorted(row.ttft_ms)
            curves.plot(times, [(n + 1) / len(times) for n in range(len(times))], label=row.routing)
        curves.set_xscale("log")
        curves.set_xlabel("time to first token, ms")
        curves.set_ylabel("share of requests")
        curves.grid(alpha=0.25)
        for panel in (bars, curves):
            panel.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(frameon=False, fontsize=8)
    panels[1][-1].legend(frameon=False, fontsize=8)
    try:
        picture.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise click.ClickException(f"plot: cannot write {path}: {error.strerror}") from None
