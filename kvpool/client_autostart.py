"""Starts a node for a host that has none: ``autostart_node``."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
from pathlib import Path

from kvpool.config import AUTOSTARTED, ClientSettings, child_environment, default_socket_path
from kvpool.errors import UnavailableError
from kvpool.processes import module_command
from kvpool.transport.channel import Channel

log = logging.getLogger(__name__)

PROBE_S = 0.5


def start_node(settings: ClientSettings, ranks: int) -> subprocess.Popen[bytes] | None:
    """Start a node of ``segment_size`` x ``ranks`` unless this host has one or is about to; never waits for it.

    Call it from the main thread: the node ends with the thread that started it. Returns None when there
    was nothing to start. Clients attach by themselves once the node is ready.
    """
    path = settings.node or default_socket_path()
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        log.warning("no node is started: %s", exc)
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        log.info("a node is being started at %s by another process", path)
        return None
    try:
        if _answers(path):
            return None
        arguments, secrets = node_arguments(settings, ranks, path)
        log.info("starting a node at %s: %s", path, " ".join(arguments))
        # The child inherits the lock and so keeps others from starting a second node for as long as it lives.
        return subprocess.Popen(
            [*module_command("kvpool.server.child"), str(os.getpid()), "kvpool.cli.node", *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=child_environment(secrets),
            pass_fds=(lock,),
        )
    finally:
        os.close(lock)


def node_arguments(settings: ClientSettings, ranks: int, path: str) -> tuple[list[str], dict[str, str]]:
    """Return a node's command line, and settings that do not belong on one because they may be secret."""
    given = {"master": settings.master, "socket_path": path, "segment_size": str(settings.segment_size * max(1, ranks))}
    if settings.advertise_host is not None:
        given["advertise_host"] = settings.advertise_host
    if settings.cache_buffer_capacity_gb is not None:
        del given["segment_size"]  # this one is for the host
    switches = []
    for name in AUTOSTARTED:
        value = getattr(settings, name)
        if isinstance(value, bool):
            switches.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None and name != "storage_options":
            given[name] = ",".join(value) if isinstance(value, tuple) else str(value)
    secrets = {"storage_options": json.dumps(settings.storage_options)} if settings.storage_options else {}
    return [word for name, value in given.items() for word in (f"--{name}", value)] + switches, secrets


def _answers(path: str) -> bool:
    try:
        Channel.connect_unix(path, PROBE_S).close()
    except UnavailableError:
        return False
    return True
