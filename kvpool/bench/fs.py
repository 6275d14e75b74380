"""``kvpool-bench fs``: the file tier on one directory, beside what raw files on it can do, and other designs.

A pool with one node, whose memory is much smaller than the data, writes blocks behind and reads them back. Its
rounds alternate with rounds that write and read large files with the same I/O mode, the same number of threads and
calls of a block's size. Reads are cold: past the page cache, or after it has dropped the files. A fill has ended when
the master has catalogued the last file.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvpool.bench import restart
from kvpool.bench.fs_pool import FilePool, Sizes, storage_flags
from kvpool.bench.fs_raw import (
    Design,
    FilePerBlock,
    LargeFiles,
    Mode,
    PackedFiles,
    can_be_direct,
    fill,
    latencies,
    sweep,
)
from kvpool.bench.harness import layers_of, one_command
from kvpool.bench.pool import bench_pool, connected
from kvpool.bench.report import Figure, Report, json_option
from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES, format_size, parse_size, split_keys

SPARE = 1.25
"""Of the bytes that are written: headers, directories, and not to fill a disk to its last byte."""

PARTS = 2
"""Of a round, which the pool and raw files read in turns."""

SINGLE_READS = 200
QUICK = {"size": "192MB", "segment_size": "64MB", "rounds": 2, "restart_blocks": 20_000}


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    directory: Path
    sizes: tuple[Sizes, ...]
    rounds: int
    threads: int
    buffered: bool
    restart_blocks: int

    @property
    def space_bytes(self) -> int:
        """What is on the disk at once: a pool's rounds, and the raw files or another design's."""
        return int(SPARE * max(((self.rounds + 2) * sizes.bytes for sizes in self.sizes), default=0))

    @property
    def steps(self) -> int:
        """Steps to show."""
        return len(self.sizes) * (self.rounds + 4) + (1 if self.restart_blocks else 0)

    def check(self) -> None:
        """Raise InvalidArgumentError for what cannot be measured."""
        if not self.directory.is_dir():
            raise InvalidArgumentError("directory", f"{self.directory} is no directory")
        for sizes in self.sizes:
            layers_of(sizes.block_bytes)
            if 3 * sizes.segment_bytes > sizes.data_bytes:
                raise InvalidArgumentError(
                    "segment_size",
                    f"must be at most a third of --size, or reads would come from memory: {sizes.segment_bytes}",
                )
            if 16 * sizes.block_bytes > sizes.segment_bytes:
                raise InvalidArgumentError(
                    "block_bytes", f"16 blocks must fit the segment, {sizes.block_bytes} is more"
                )
        free = shutil.disk_usage(self.directory).free
        if free < self.space_bytes:
            raise InvalidArgumentError(
                "directory",
                f"{self.directory} has {format_size(free)} free, {format_size(self.space_bytes)} are needed: "
                "give less --size or --rounds",
            )


class FsBench:
    """Measures one size of block in one directory."""

    def __init__(self, plan: Plan, sizes: Sizes, mode: Mode, directory: Path, report: Report) -> None:
        self._plan = plan
        self._sizes = sizes
        self._mode = mode
        self._directory = directory
        self._report = report

    def run(self) -> None:
        """Measure everything. Raises KVPoolError, OSError."""
        sizes, mode, kept = self._sizes, self._mode, self._directory / "pool"
        flags = storage_flags(kept / "files", mode, 2 * self._plan.space_bytes)
        catalog = ["--data_dir", str(kept / "master")]
        with (
            bench_pool(None, segment_size=sizes.segment_bytes, master_flags=catalog, node_flags=flags) as pool,
            connected(pool.master, sizes.namespace, node=pool.sockets[0], name="fs") as client,
            closing(FilePool(pool, client, sizes, mode, kept / "files")) as files,
        ):
            self._report.step(f"{format_size(sizes.block_bytes)}: making directories")
            keys = files.make_directories()
            self._sequential(files)
            self._report.step(f"{format_size(sizes.block_bytes)}: single blocks of the pool")
            self._hits(files, keys)
        shutil.rmtree(kept)
        self._designs()

    def _sequential(self, files: FilePool) -> None:
        """Fill and read in turns with large raw files, and with raw files like the pool's: as many, of their size.

        A disk may read what was written last much faster than the rest, and files in one place than in another:
        those like the pool's are written in its directories, and are its own when they are read; out of
        and into as much memory as its node has.
        """
        size = self._sizes.bytes
        raw = LargeFiles(self._directory, size, self._sizes.block_bytes, self._mode)
        seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for number in range(self._plan.rounds):
            self._report.step(f"{format_size(self._sizes.block_bytes)}: round {number + 1} of {self._plan.rounds}")
            limit = raw.bytes / raw.write()
            first = files.write_raw() if number % 2 else 0.0
            seconds, keys = files.fill()
            seen.setdefault(("fill", "raw_write"), []).append((size / seconds, limit))
            like = size / (first or files.write_raw())
            seen.setdefault(("fill", "like_files"), []).append((size / seconds, like))
            limit = raw.bytes / raw.read()
            rate, like = self._read_in_turns(files, keys, number)
            seen.setdefault(("cold_read", "raw_read"), []).append((rate, limit))
            seen.setdefault(("cold_read", "like_files"), []).append((rate, like))
        raw.remove()
        for (name, against), rates in seen.items():
            self._compared(name, against, rates)

    def _read_in_turns(self, files: FilePool, keys: Sequence[bytes], first: int) -> tuple[float, float]:
        """Read parts of a round by the pool, and the parts between without it; returns bytes a second of both.

        No file twice: what lies below the filesystem may remember it.
        """
        step = -(-len(keys) // PARTS)
        parts = [keys[at : at + step] for at in range(0, len(keys), step)]
        ways = files.read, files.read_raw
        seconds, blocks = [0.0, 0.0], [0, 0]
        for number, part in enumerate(parts, start=first):
            seconds[number % 2] += ways[number % 2](part)
            blocks[number % 2] += len(part) * self._sizes.batch
        pool, raw = (n * self._sizes.block_bytes / s for n, s in zip(blocks, seconds, strict=True))
        return pool, raw

    def _compared(self, name: str, limit: str, seen: Sequence[tuple[float, float]]) -> None:
        ratios = sorted(ours / raw for ours, raw in seen)
        detail = {
            "block_bytes": self._sizes.block_bytes,
            **self._about,
            "ratio_min": math.floor(100 * ratios[0]) / 100,
            "ratio_max": math.ceil(100 * ratios[-1]) / 100,
        }
        value = statistics.median(ours for ours, _ in seen) / 1e9
        against = statistics.median(raw for _, raw in seen) / 1e9
        self._report.add(Figure(name, value, "GB/s", limit, statistics.median(ratios), detail, against))

    @property
    def _about(self) -> dict[str, str | int]:
        return {"mode": "O_DIRECT" if self._mode.direct else "buffered", "threads": self._mode.threads}

    def _hits(self, files: FilePool, keys: Sequence[bytes]) -> None:
        """Single blocks, and batches, out of files; then the same ones again, which memory has by then."""
        few = max(1, self._sizes.segment_bytes // 4 // (self._sizes.block_bytes * self._sizes.batch))
        single = split_keys(b"".join(keys[few:]))[: min(SINGLE_READS, few * self._sizes.batch)]
        files.forget()
        self._hit("files", files.latencies(single, "fs"), files.sweep(keys[:few], "fs"), few)
        self._hit("memory", files.latencies(single, "local"), files.sweep(keys[:few], "local"), few)

    def _hit(self, where: str, single: Sequence[float], seconds: float, batches: int) -> None:
        size = batches * self._sizes.batch * self._sizes.block_bytes
        self._latency(f"pool, {where}", single, size / seconds)

    def _latency(self, design: str, single: Sequence[float], rate: float) -> None:
        ordered = sorted(single)
        p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        detail = {
            "block_bytes": self._sizes.block_bytes,
            "design": design,
            "p99_us": round(p99 * 1e6),
            "rate_gb_s": float(f"{rate / 1e9:.3g}"),
        }
        self._report.add(Figure("hit", statistics.median(ordered) * 1e6, "us", detail=detail))

    def _designs(self) -> None:
        """Other ways to keep the same blocks in files."""
        sizes, mode = self._sizes, self._mode
        keys = [key.hex() for key in split_keys(os.urandom(KEY_BYTES * sizes.blocks))]
        directory = self._directory / "designs"
        directory.mkdir()
        per_block = FilePerBlock(directory, keys)
        self._report.step(f"{format_size(sizes.block_bytes)}: a buffered file per block")
        self._design("file per block, buffered, no checksum", per_block, per_block.forget)
        self._design(
            "the same, in the page cache", per_block, lambda: sweep(per_block, sizes.blocks, sizes.block_bytes, 1)
        )
        shutil.rmtree(directory)
        directory.mkdir()
        self._report.step(f"{format_size(sizes.block_bytes)}: packed files")
        with closing(PackedFiles(directory, sizes.blocks, sizes.block_bytes, mode)) as packed:
            self._design(
                f"packed files, {'O_DIRECT' if mode.direct else 'buffered'}, no checksum", packed, packed.forget
            )
        shutil.rmtree(directory)

    def _design(self, name: str, design: Design, prepare: Callable[[], object]) -> None:
        sizes, threads = self._sizes, self._mode.threads
        if not name.startswith("the same"):
            fill(design, sizes.blocks, sizes.block_bytes, threads)
        step = max(1, sizes.blocks // SINGLE_READS)
        prepare()
        single = latencies(design, range(0, sizes.blocks, step), sizes.block_bytes)
        prepare()
        seconds = sweep(design, sizes.blocks, sizes.block_bytes, threads)
        self._latency(name, single, sizes.blocks * sizes.block_bytes / seconds)


def _restart(blocks: int, report: Report) -> None:
    report.step(f"restart of a master with {blocks} catalogued blocks")
    seen = restart.measure(blocks)
    detail = {"blocks": seen.blocks}
    report.add(Figure("restart_first_answer", seen.answering_s, "s", detail=detail))
    report.add(Figure("restart_all_found", seen.whole_s, "s", detail=detail))


def measure(plan: Plan, report: Report) -> None:
    """Measure everything in a directory of our own, which goes away again. Raises KVPoolError."""
    try:
        with tempfile.TemporaryDirectory(
            prefix="kvpool-bench-fs-", dir=plan.directory, ignore_cleanup_errors=True
        ) as made:
            directory = Path(made)
            direct = not plan.buffered and can_be_direct(directory)
            if not direct and not plan.buffered:
                report.note("this filesystem has no O_DIRECT: everything goes through the page cache")
            mode = Mode(direct, plan.threads)
            for sizes in plan.sizes:
                FsBench(plan, sizes, mode, directory, report).run()
    except OSError as error:
        raise InvalidArgumentError("directory", f"{plan.directory}: {error}") from None
    if plan.restart_blocks:
        _restart(plan.restart_blocks, report)


@click.command("fs")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--block_bytes",
    multiple=True,
    default=("2MB", "128KB"),
    show_default=True,
    help="Size of a block; may be repeated.",
)
@click.option("--size", default="1GB", show_default=True, help="Bytes of blocks in one round.")
@click.option("--segment_size", default="256MB", show_default=True, help="Of the node: at most a third of --size.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="Rounds of fill and read.")
@click.option("--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="Threads, also of raw files.")
@click.option("--buffered", is_flag=True, help="Go through the page cache, also where O_DIRECT works.")
@click.option(
    "--restart_blocks", type=click.IntRange(0, 10_000_000), default=200_000, show_default=True,
    help="Catalogued blocks of the restarted master; 0 leaves it out.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Small sizes and few rounds, where they are not given: to see it run.")
@json_option
@click.pass_context
def command(ctx: click.Context, /, directory: Path, quick: bool, json_path: str | None, **options: Any) -> None:
    """The file tier in DIRECTORY, beside raw files, other designs, and memory. Removes what it has written.

    \b
    Examples:
      kvpool-bench fs /mnt/kv
      kvpool-bench fs /mnt/kv --quick
      kvpool-bench fs /mnt/nfs --buffered --block_bytes 1MB --json fs.json
    """
    default = click.core.ParameterSource.DEFAULT
    if quick:
        options |= {name: value for name, value in QUICK.items() if ctx.get_parameter_source(name) is default}
    report = Report("fs")
    with one_command():
        data, segment = (parse_size(options[name], name) for name in ("size", "segment_size"))
        sizes = tuple(Sizes(parse_size(text, "block_bytes"), data, segment) for text in options["block_bytes"])
        plan = Plan(
            directory.absolute(), sizes, options["rounds"], options["threads"], options["buffered"],
            options["restart_blocks"],
        )  # fmt: skip
        plan.check()
        with report.running(plan.steps):
            measure(plan, report)
    report.show(json_path)
