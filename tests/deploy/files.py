"""What the tests of deploy/ share: its files, the pods in its manifests, and the commands of kvpool's that they run."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROGRAMS = {
    "kvpool-master": "kvpool.cli.master",
    "kvpool-node": "kvpool.cli.node",
    "kvpool-proxy": "kvpool.cli.proxy",
    "kvpoolctl": "kvpool.cli.ctl",
    "kvpool": "kvpool.cli.main",
    "kvpool-bench": "kvpool.cli.bench",
}


@dataclass
class Call:
    """A program of ours with its arguments and environment, and where it stands."""

    where: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    config: dict[str, Path] = field(default_factory=dict)  # as the program sees it -> the file in the checkout

    def __str__(self) -> str:
        return f"{self.where}: {self.argv[0]}"

    def command(self) -> Any:
        """The click command that parses the arguments."""
        return importlib.import_module(PROGRAMS[self.argv[0]]).command


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """Every Kubernetes object in deploy/, patches and kustomizations left out."""
    found = []
    for path in sorted([*(DEPLOY / "kubernetes").rglob("*.yaml"), *(DEPLOY / "kthena").rglob("*.yaml")]):
        if path.name == "kustomization.yaml" or path in patches():
            continue
        found += [(f"{named(path)}#{item['kind']}/{item['metadata']['name']}", item) for item in documents(path)]
    return found


def kustomizations() -> list[Path]:
    return sorted((DEPLOY / "kubernetes").rglob("kustomization.yaml"))


def patches() -> list[Path]:
    return [
        path.parent / patch["path"]
        for path in kustomizations()
        for patch in yaml.safe_load(path.read_text()).get("patches", [])
    ]


def pod_specs(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods that an object makes; a Kthena ModelServing makes one for each role."""
    if item["kind"] == "ModelServing":
        return [role["entryTemplate"]["spec"] for role in item["spec"]["template"]["roles"]]
    spec = item.get("spec") or {}
    return [spec["template"]["spec"]] if "template" in spec else []


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for where, item in [*manifests(), *((named(path), item) for path in patches() for item in documents(path))]:
        for spec in pod_specs(item):
            for container in [*spec.get("initContainers", []), *spec["containers"]]:
                yield f"{where}/{container['name']}", container


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())


def compose_engine() -> dict[str, Any]:
    """The engine that stands in comments, as it would be without them."""
    lines = (DEPLOY / "compose" / "compose.yaml").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip() == "# engine:")
    block = [line.replace("  # ", "", 1) for line in lines[first:] if line.strip().startswith("#")]
    return yaml.safe_load("\n".join(block))["engine"]


def calls() -> list[Call]:
    """Every call of a program of ours in any file."""
    found = [*_of_containers(), *_of_compose(), *_of_units(), *_of_text()]
    return [call for call in found if call.argv and call.argv[0] in PROGRAMS]


def _of_containers() -> Iterator[Call]:
    for where, container in containers():
        env = {item["name"]: item.get("value", "from-the-cluster") for item in container.get("env", [])}
        argv = [*container.get("command", []), *container.get("args", [])]
        yield Call(where, [str(word) for word in argv] or ["kvpool-node"], env)


def _of_compose() -> Iterator[Call]:
    folder = DEPLOY / "compose"
    content = compose()
    config = {
        mount["target"]: folder / content["configs"][mount["source"]]["file"]
        for service in content["services"].values()
        for mount in service.get("configs", [])
    }
    for name, service in content["services"].items():
        yield Call(f"compose.yaml#{name}", service["command"], service.get("environment", {}), config)


def _of_units() -> Iterator[Call]:
    for path in sorted((DEPLOY / "systemd").glob("*.service")):
        line = next(line for line in path.read_text().splitlines() if line.startswith("ExecStart="))
        argv = [word.replace("${", "/").replace("}", "") for word in shlex.split(line.partition("=")[2])]
        config = {f"/etc/kvpool/{file.name}": file for file in (DEPLOY / "systemd").glob("*.yaml")}
        yield Call(named(path), argv[1:], {}, config)


def _of_text() -> Iterator[Call]:
    """Commands in comments, in Dockerfiles and in docs/deployment.md: a line that begins with a program's name."""
    texts = [path for path in DEPLOY.rglob("*") if path.is_file()] + [ROOT / "docs" / "deployment.md"]
    start = re.compile(rf"^[#\s]*(?:CMD )?[\[\"\s]*({'|'.join(map(re.escape, PROGRAMS))})\b[\", ]+-")
    for path in sorted(texts):
        lines = iter(path.read_text().splitlines())
        for line in lines:
            if not start.match(line):
                continue
            text = line
            while text.endswith("\\"):
                text = text[:-1] + next(lines).lstrip("#")
            if "CMD" in text:
                words = yaml.safe_load(text.partition("CMD")[2])
            else:
                words = shlex.split(text.lstrip("# "), comments=True)
            yield Call(named(path), words)
