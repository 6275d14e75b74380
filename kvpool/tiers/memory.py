"""How much memory this process may take: the host's and its cgroup's limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def allowed_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> tuple[int, str]:
    """Return the bytes that can still be taken and what sets that limit."""
    best, why = _available(proc), "memory available on this host"
    for directory, limit_name, use_name, cache_names in _groups(proc, cgroup):
        limit = _number(directory / limit_name)
        used = _number(directory / use_name)
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        # Page cache counts as used, but is given up before anything fails.
        stat = _table(directory / "memory.stat")
        left = max(0, limit - max(0, used - sum(stat.get(name, 0) for name in cache_names)))
        if left < best:
            best, why = left, "left in the cgroup's memory limit"
    return best, why


def _available(proc: Path) -> int:
    try:
        text = (proc / "meminfo").read_text()
    except OSError:
        return _UNLIMITED
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED


def _groups(proc: Path, root: Path) -> Iterator[tuple[Path, str, str, tuple[str, str]]]:
    """Yield this process's memory cgroups and their ancestors: version 2, and version 1's controller."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = root, ("memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                ("total_inactive_file", "total_active_file"),
            )
        else:
            continue
        # Inside a container the path may be the host's; what is mounted is then our own group.
        relative = PurePosixPath(path.lstrip("/"))
        for group in (relative, *relative.parents):
            yield base / group, *names


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
