"""The architecture's rules, held by reading the code: who may import what, who reads the environment, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES_MAX = 550
FUNCTION_LINES_MAX = 75

# A longer file, with the reason why cutting it would not help its reader.
LONGER = {
    "kvpool/core/master.py": (650, "one state machine: its rules are read together"),
    "kvpool/core/segment.py": (800, "one state machine: its rules are read together"),
}

# Part -> the parts of kvpool it may import; its own part is always allowed. Imports run downwards only.
WORDS = {"errors", "model", "hashing"}
CONTROL = WORDS | {"config", "processes"}
MAY_IMPORT = {
    "errors": set(),
    "model": {"errors"},
    "hashing": {"errors", "model"},
    "config": WORDS,
    "processes": set(),
    "core": {"errors", "model"},
    "tiers": WORDS | {"transport", "processes"},  # the memfd's making is shared with those who map it
    "rpc": WORDS | {"core"},
    "transport": WORDS | {"rpc", "processes"},
    "client": CONTROL | {"core", "rpc", "transport"},
    "server": CONTROL | {"core", "tiers", "transport", "rpc"},
    "testing": WORDS | {"core", "tiers", "transport", "rpc", "client"},
    "bench": CONTROL | {"core", "tiers", "transport", "rpc", "client", "server", "testing", "proxy"},
    "proxy": CONTROL | {"client", "rpc", "server"},
    "cli": CONTROL | {"client", "core", "rpc", "server", "tiers", "bench", "proxy"},
    "kvpool": {"client", "model"},
    "kvpool_vllm": CONTROL | {"client", "kvpool"},
}

CORE_FORBIDDEN = {
    *("asyncio", "concurrent", "datetime", "grpc", "io", "logging", "multiprocessing", "os", "pathlib"),
    *("random", "secrets", "selectors", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time"),
    *("uuid", "uvloop"),
}

# Third-party or system module -> the parts that may import it.
ONLY_IN = {
    "grpc": {"rpc", "server", "client", "cli", "bench", "proxy"},
    "grpc_health": {"server", "cli", "bench"},
    "grpc_reflection": {"server"},
    "lmdb": {"tiers"},
    "fsspec": {"tiers"},
    "aiohttp": {"proxy"},
    "prometheus_client": {"server", "kvpool_vllm", "proxy"},
    "uvloop": {"server", "transport", "bench"},
    "click": {"cli", "bench"},
    "rich": {"cli", "bench"},
    "yaml": {"config"},
    "vllm": {"kvpool_vllm"},
    "torch": {"kvpool_vllm"},
}


def sources() -> list[Path]:
    generated = ROOT / "kvpool" / "rpc" / "v1"
    found = [*(ROOT / "kvpool").rglob("*.py"), *(ROOT / "connectors").rglob("*.py")]
    return sorted(path for path in found if generated not in path.parents)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """The name of the layer a file belongs to: `client_io.py` belongs to `client`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return part_of_module(".".join(parts[1:] if parts[0] == "connectors" else parts))


def part_of_module(module: str) -> str:
    names = module.split(".")
    if names[0] != "kvpool":
        return names[0]
    inner = names[1] if len(names) > 1 and names[1] != "__init__" else "kvpool"
    return next((layer for layer in ("client", "config") if inner.startswith(layer)), inner)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported module with its line, those inside functions included; `from a import b` may mean a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""
            if node.module == "kvpool":
                for alias in node.names:
                    if (ROOT / "kvpool" / alias.name).exists() or (ROOT / "kvpool" / f"{alias.name}.py").exists():
                        yield node.lineno, f"kvpool.{alias.name}"


def problems_with_layers(path: Path) -> Iterator[str]:
    part = part_of(path)
    for line, module in imports(path):
        where = f"{named(path)}:{line}: {part} must not import {module}"
        top = module.split(".")[0]
        if top in {"kvpool", "kvpool_vllm"}:
            target = part_of_module(module)
            # The package itself holds only the version and names from the lowest layer.
            if target not in {part, "kvpool"} and target not in MAY_IMPORT[part]:
                yield where
        elif part not in ONLY_IN.get(top, {part}):
            yield where
        if part == "core" and (top in CORE_FORBIDDEN or module == "kvpool"):
            yield where


@pytest.mark.parametrize("path", sources(), ids=named)
def test_imports_run_downwards(path):
    """A layer imports only those below it, and each third-party library stays in the layer that owns it."""
    assert list(problems_with_layers(path)) == []


@pytest.mark.parametrize("path", sources(), ids=named)
def test_only_config_reads_the_environment(path):
    """A setting has one reader; everything else is handed values."""
    if part_of(path) == "config":
        return
    names = {"environ", "environb", "getenv", "getenvb"}
    reads = [
        f"{named(path)}:{node.lineno}"
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {alias.name for alias in node.names} & names)
    ]
    assert reads == []


@pytest.mark.parametrize("path", sources(), ids=named)
def test_files_and_functions_stay_readable(path):
    """A file fits a sitting, a function a screen."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit, _ = LONGER.get(named(path), (FILE_LINES_MAX, ""))
    assert lines <= limit, f"{named(path)} has {lines} lines"
    long = [
        f"{named(path)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert long == []


def test_every_part_has_a_rule():
    """A new top-level module is placed in the order before it is used."""
    assert {part_of(path) for path in sources()} - MAY_IMPORT.keys() == set()


def test_the_order_has_no_circle():
    """Downwards means something: no part can reach itself through the parts it may import."""
    remaining = {part: allowed - {"kvpool"} for part, allowed in MAY_IMPORT.items() if part != "kvpool"}
    while remaining:
        lowest = [part for part, allowed in remaining.items() if not allowed & remaining.keys()]
        assert lowest, f"these import each other in a circle: {sorted(remaining)}"
        for part in lowest:
            del remaining[part]


@pytest.mark.parametrize(
    ("file", "text", "refused"),
    [
        ("kvpool/core/x.py", "import time", True),
        ("kvpool/core/x.py", "from kvpool.transport import frames", True),
        ("kvpool/core/x.py", "def f():\n    import logging", True),
        ("kvpool/core/x.py", "from kvpool.core import index\nimport numpy", False),
        ("kvpool/transport/x.py", "import grpc", True),
        ("kvpool/model.py", "from kvpool import client", True),
        ("connectors/kvpool_vllm/x.py", "import torch\nimport kvpool", False),
        ("connectors/kvpool_vllm/x.py", "from kvpool.rpc.v1 import node_pb2", True),
        ("kvpool/client_io.py", "from kvpool.client import Client\nimport grpc", False),
        ("kvpool/client.py", "from kvpool.server.node import run", True),
    ],
)
def test_the_rules_catch_what_they_are_for(file, text, refused, tmp_path, monkeypatch):
    """The checker itself is right about samples of allowed and forbidden imports."""
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (tmp_path / "kvpool" / "client.py").parent.mkdir(exist_ok=True)
    (tmp_path / "kvpool" / "client.py").touch()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert bool(list(problems_with_layers(path))) is refused
