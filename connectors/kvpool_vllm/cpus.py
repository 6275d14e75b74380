"""On which processors our threads run beside those of an engine that computes on processors.

OpenMP binds such an engine's first thread to a core of its own, and every thread that is started later inherits that:
all our copies would share the one core that everything else the engine computes has to wait for. It is the worker's
process alone that is bound, so its parent's processors are those that the operator gave the engine.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def free_cpus(nodes: Path = NODES) -> set[int]:
    """Return the processors of this worker's engine in the memory nodes that it runs in; none where nobody can tell."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return set()  # whoever started us says nothing of where an engine may run
    try:
        ours, engine = os.sched_getaffinity(0), os.sched_getaffinity(parent.pid)
    except OSError:
        return set()
    if not ours <= engine:
        return set()
    near: set[int] = set()
    for path in nodes.glob("node[0-9]*/cpulist"):
        try:
            cpus = _cpus(path.read_text())
        except (OSError, ValueError):
            continue
        if cpus & ours:
            near |= cpus
    return engine & near if ours <= near else engine


def _cpus(text: str) -> set[int]:
    """Return the numbers of a list as the kernel writes it: ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found
