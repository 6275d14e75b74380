"""What a benchmark hands back: figures, as a table for people and as JSON for scripts."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvpool import __version__
from kvpool.bench.harness import BadUsage
from kvpool.model import format_size

FILE_COLUMNS = 120
"""Width of a table that does not go to a terminal."""


def _writable(_ctx: click.Context, _param: click.Parameter, path: str | None) -> str | None:
    """Refuse a file that cannot be written before anything is measured; what is there stays until then."""
    if path is None:
        return None
    new = not os.path.lexists(path)
    try:
        if new or Path(path).is_file() or Path(path).is_dir():  # a pipe is opened once, with something to say
            Path(path).open("ab").close()
        if new:
            Path(path).unlink()
    except OSError as error:
        raise BadUsage(f"json: cannot write {path}: {error.strerror}") from None
    return path


json_option = click.option(
    "--json", "json_path", metavar="PATH", callback=_writable, help="Write the figures here too."
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. ``limit`` names what it is compared with, ``ratio`` is value / limit's value."""

    name: str
    value: float
    unit: str
    limit: str | None = None
    ratio: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    limit_value: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it as one flat object."""
        numbers = {"ratio": self.ratio, "limit_value": self.limit_value}
        compared = {name: None if number is None else _rounded(number) for name, number in numbers.items()}
        return {
            "name": self.name,
            **self.detail,
            "value": _rounded(self.value),
            "unit": self.unit,
            "limit": self.limit,
            **compared,
        }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value)


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:  # another kernel: its own words will do
        pass
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "model": model,
        "memory": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


class Report:
    """Collects the figures of one benchmark, and the steps on the way to them."""

    def __init__(self, bench: str) -> None:
        self.bench = bench
        self.figures: list[Figure] = []
        self.notes: list[str] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(bench, total=None)

    @contextmanager
    def running(self, steps: int) -> Iterator[None]:
        """Show progress over so many steps."""
        self._progress.update(self._task, total=steps)
        with self._progress:
            yield

    def step(self, text: str) -> None:
        """Say what is measured next."""
        self._progress.update(self._task, description=f"{self.bench}: {text}", advance=1)

    def advance(self, completed: int, text: str) -> None:
        """Say how far a single long step has come."""
        self._progress.update(self._task, description=f"{self.bench}: {text}", completed=completed)

    def add(self, figure: Figure) -> None:
        """Take in a figure."""
        self.figures.append(figure)

    def note(self, text: str) -> None:
        """Take in a line that belongs under the table."""
        self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        """Return everything for scripts."""
        figures = [figure.as_json() for figure in self.figures]
        return {"bench": self.bench, "version": __version__, "machine": machine(), "figures": figures}

    def tables(self, title: str) -> list[Table]:
        """Return the figures for people."""
        table = Table(title=title, title_justify="left")
        for heading in ("figure", "of", "value", "limit", "ratio"):
            table.add_column(heading, justify="right" if heading in {"value", "ratio"} else "left")
        for figure in self.figures:
            of = ", ".join(_shown(name, value) for name, value in figure.detail.items())
            ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
            limit = figure.limit or ""
            if figure.limit_value is not None:
                limit += f" {_rounded(figure.limit_value):,}"
            table.add_row(figure.name, of, f"{_rounded(figure.value):,} {figure.unit}", limit, ratio)
        return [table]

    def show(self, json_path: str | None) -> None:
        """Write the JSON where it was asked for, then print the tables. Raises click.ClickException."""
        unwritten = self._write(json_path) if json_path is not None else None
        console = Console()
        if not console.is_terminal:
            console = Console(width=FILE_COLUMNS)
        about = machine()
        title = f"kvpool-bench {self.bench} {__version__}: {about['cpus']} x {about['model']}, Python {about['python']}"
        for table in self.tables(title):
            console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)
        if unwritten is not None:
            raise unwritten

    def _write(self, path: str) -> click.ClickException | None:
        try:
            Path(path).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            return click.ClickException(f"json: cannot write {path}: {error.strerror}")
        return None


def _shown(name: str, value: Any) -> str:
    """Return a detail in few words: the table has to fit a terminal."""
    if name == "block_bytes":
        return format_size(value)
    if isinstance(value, bool):
        return name if value else f"not {name}"
    if isinstance(value, str):
        return value
    return f"{name} {value:,}"
