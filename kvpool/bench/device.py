"""``kvpool-bench device``: blocks between an accelerator and a segment's slots, beside one large copy.

What is copied is what a worker copies: scattered blocks of real shapes, each to a slot of its own in shared
memory that is page-locked for the device. Rounds alternate with rounds of one run of as many bytes from
and to page-locked memory. Without an accelerator the CPU's implementation is measured beside a memory copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import numpy as np

from kvpool.bench.harness import BenchError, interleaved, one_command
from kvpool.bench.limits import Bytes
from kvpool.bench.report import Figure, Report, json_option
from kvpool.transport.shm import MappedMemory, create_memfd, seal

ROUNDS_S = 20.0


def _measuring() -> Any:
    """Return the module that copies; raise BenchError without torch, which no part of kvpool installs."""
    try:
        return importlib.import_module("kvpool_vllm.device_bench")
    except ModuleNotFoundError as error:
        raise BenchError(
            f"{error.name} is not installed here; it comes with the engine: install vLLM, then kvpool into the same "
            "environment (on a machine without an accelerator: make setup-vllm, .venv-vllm/bin/kvpool-bench device)"
        ) from None


@contextmanager
def _segment(size: int) -> Iterator[Bytes]:
    """Yield shared memory as a node has it, every page of it there."""
    fd = create_memfd("kvpool-bench", size)
    memory = MappedMemory(fd, size)
    seal(fd)
    try:
        memory.populate()
        yield np.frombuffer(memory.view, np.uint8)
    finally:
        memory.close()


def _measure(report: Report, measuring: Any, device: Any, shape: Any, blocks: int, rounds: int) -> None:
    size = 2 * shape.layers * int(np.prod(shape.block))
    with _segment(blocks * (measuring.HEADER_BYTES + size) + measuring.HEADER_BYTES) as memory:
        bench = measuring.DeviceBench(memory, device, shape, blocks)
        try:
            report.step(f"{shape.name}: filling and checking")
            if not bench.check():
                raise BenchError(f"{shape.name}: bytes that came back are not those that were sent")
            pairs = {"load": (bench.load, bench.copy_in), "store": (bench.store, bench.copy_out)}
            limit = "one memory copy" if device.type == "cpu" else "one pinned copy"
            for name, parts in pairs.items():
                report.step(f"{shape.name}: {name}")
                taken_s, limit_s = interleaved(parts, rounds, ROUNDS_S)
                rates = [bench.bytes / seconds / 1e9 for seconds in (taken_s, limit_s)]
                detail = {"model": shape.name, "blocks": blocks, "block_bytes": size}
                report.add(Figure(name, rates[0], "GB/s", limit, rates[0] / rates[1], detail, rates[1]))
            if device.type == "npu":
                report.note("The slots are not page-locked on Ascend: a worker copies through a buffer.")
        finally:
            bench.close()


@click.command("device")
@click.option("--blocks", type=click.IntRange(1, 4096), default=512, show_default=True, help="Blocks in one batch.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=15, show_default=True, help="Rounds of each figure.")
@json_option
def command(blocks: int, rounds: int, json_path: str | None) -> None:
    """Copies between a GPU's blocks and a node's slots.

    Prints GB/s for Llama-3-8B and DeepSeek-V3 blocks of 16 tokens beside one large copy of page-locked memory.
    """
    with one_command():
        measuring = _measuring()
        device = measuring.find_device()
        report = Report("device")
        with report.running(3 * len(measuring.SHAPES)):
            for shape in measuring.SHAPES:
                _measure(report, measuring, device, shape, blocks, rounds)
        if device.type == "cpu":
            report.note("No accelerator is here: this is the CPU's implementation, on one thread.")
        else:
            report.note(f"Device: {device}.")
        report.show(json_path)
