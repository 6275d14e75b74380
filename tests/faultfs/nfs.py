"""A real NFS server in user space (NFS-Ganesha), with a directory of its own, mounted through FUSE and libnfs."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from tests.faultfs.mount import ROOT, detach, why_no_fuse
from tests.integration.pool import free_port, wait_for

LIBRARY = "libnfs.so.13"
RPCBIND = "/run/rpcbind.sock"
WATCHDOG_S = 600.0
"""More than all tests of a mount take."""

_CONFIGURATION = """
NFS_CORE_PARAM {{
  NFS_Port = {port}; MNT_Port = {mount_port}; Protocols = 3; Enable_UDP = false;
  Bind_addr = 127.0.0.1; Enable_RQUOTA = false; Enable_NLM = false;
}}
NFSV4 {{ Graceless = true; Minor_Versions = 0; RecoveryRoot = {state}; }}
EXPORT {{
  Export_Id = 1; Path = {directory}; Pseudo = /export; Protocols = 3; Access_Type = RW; Squash = None; SecType = sys;
  FSAL {{ Name = VFS; }}
}}
"""


def _which(program: str) -> str:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or ""


def _answers(address: str | tuple[str, int]) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as one, suppress(OSError):
        one.connect(address)
        return True
    return False


def why_no_nfs() -> str:
    """Return why there can be no NFS mount here, "" when there can."""
    if why := why_no_fuse():
        return why
    for program, package in (("ganesha.nfsd", "nfs-ganesha nfs-ganesha-vfs"), ("rpcbind", "rpcbind")):
        if not _which(program):
            return f"{program} is not installed (Debian: {package})"
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return f"{LIBRARY} is not installed (Debian: libnfs13)"
    return ""


class NfsMount:
    """``path`` is what a client sees of ``below``, a directory of the server."""

    def __init__(self, directory: Path) -> None:
        self.below, self.path, state = directory / "below", directory / "mounted", directory / "state"
        for path in (self.below, self.path, state):
            path.mkdir(parents=True)
        self.log = directory / "nfs.log"
        self._port, self._mount_port = free_port(), free_port()
        self._configuration = directory / "ganesha.conf"
        self._configuration.write_text(
            _CONFIGURATION.format(port=self._port, mount_port=self._mount_port, directory=self.below, state=state)
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watchdog = threading.Timer(WATCHDOG_S, self._fail)
        self._watchdog.daemon = True
        # There is one rpcbind on a host, and one server of a kind that it knows: others wait for their turn.
        self._turn = (Path(tempfile.gettempdir()) / "kvpool-tests-nfs.lock").open("w")
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        client = [sys.executable, "-m", "tests.faultfs.nfs_client", LIBRARY, str(self._port), str(self._mount_port)]
        try:
            self._start_rpcbind()
            self.start_server()
            self._client = self._start([*client, str(self.below), str(self.path)])
            self._watchdog.start()
            wait_for(lambda: self._alive() and os.path.ismount(self.path), "it is mounted")
        except BaseException as exc:  # an interrupt included: nothing may be left behind
            self.close()
            raise RuntimeError(self.log.read_text()[-2000:]) from exc

    def _start_rpcbind(self) -> None:
        """The server does not start unless it can tell one where it listens; nobody asks it."""
        if not _answers(RPCBIND):
            self._start([_which("rpcbind"), "-f"])
            wait_for(lambda: self._alive() and _answers(RPCBIND), "rpcbind answers")

    def start_server(self) -> None:
        """Start the server and wait until it answers."""
        files = ["-f", str(self._configuration), "-L", str(self.log), "-p", str(self.path.parent / "ganesha.pid")]
        self._server = self._start([_which("ganesha.nfsd"), "-F", *files])
        wait_for(lambda: self._alive() and _answers(("127.0.0.1", self._port)), "the server answers")

    def kill_server(self) -> None:
        """Kill -9."""
        self._processes.remove(self._server)
        self._server.kill()
        self._server.wait()

    def _fail(self) -> None:
        """A hard mount that hangs would hold whoever waits for it for ever: without its client it fails instead."""
        self._client.kill()

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
        self._processes.append(process)
        return process

    def _alive(self) -> bool:
        assert all(process.poll() is None for process in self._processes), "it has ended"
        return True

    def close(self) -> None:
        """Unmount and end everything."""
        self._watchdog.cancel()
        detach(self.path)
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._turn.close()
