"""Network namespaces for tests: hosts of their own on this one, with a link to it each.

Run as a program with a namespace's name, a module and its arguments, it becomes that module in that namespace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

COMMAND_S = 10.0


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_S, check=False)


def refused() -> str:
    """Return why no network namespace can be made here; "" if one can."""
    if shutil.which("ip") is None:
        return "there is no ip command (Debian package iproute2)"
    name = f"kvpool-{os.getpid()}-try"
    made = _ip("netns", "add", name)
    _ip("netns", "del", name)
    return "" if made.returncode == 0 else f"network namespaces are not allowed: {made.stderr.strip()}"


class Host:
    """One namespace: its ``name``, its own ``address``, and this host's, ``gateway``, as it sees it."""

    def __init__(self, number: int) -> None:
        self.name = f"kvpool-{os.getpid()}-{number}"
        self.link = f"kvp{os.getpid() % 100_000}x{number}"
        subnet = f"10.{213 + number}.{os.getpid() % 250}"
        self.gateway, self.address = f"{subnet}.1", f"{subnet}.2"

    def cut(self) -> None:
        """Take its link down."""
        _ip("link", "set", self.link, "down")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Yield namespaces that reach this host, and nobody else; they are gone afterwards."""
    made = [Host(number) for number in range(count)]
    try:
        for host in made:
            for line in (
                f"netns add {host.name}",
                f"link add {host.link} type veth peer name eth0 netns {host.name}",
                f"addr add {host.gateway}/30 dev {host.link}",
                f"link set {host.link} up",
                f"-n {host.name} addr add {host.address}/30 dev eth0",
                f"-n {host.name} link set eth0 up",
                f"-n {host.name} link set lo up",
            ):
                done = _ip(*line.split())
                assert done.returncode == 0, f"ip {line}: {done.stderr}"
        yield made
    finally:
        for host in made:
            _ip("netns", "del", host.name)
            _ip("link", "del", host.link)


if __name__ == "__main__":
    os.execvp("ip", ["ip", "netns", "exec", sys.argv[1], sys.executable, "-m", *sys.argv[2:]])
