"""An S3 server of its own process, and a gate in front of it that can be closed."""

from __future__ import annotations

import contextlib
import pickle
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from tests.faultfs.s3_server import BUCKET
from tests.integration.pool import ROOT, T, free_port, wait_for

KEY, SECRET = "AKIDFORTESTS", "a-secret-for-tests"


class S3Server:
    """moto's server. It keeps everything in memory: what it held when it was killed, `restart` gives back to it."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.log = directory / "s3.log"
        self._held = directory / "s3.held"
        self._process = self._start({})

    def options(self, endpoint: str = "") -> dict[str, Any]:
        """Return what fsspec needs to know."""
        return {"key": KEY, "secret": SECRET, "endpoint_url": endpoint or self.endpoint}

    def _start(self, held: dict[str, bytes] | None) -> subprocess.Popen[bytes]:
        self._held.write_bytes(pickle.dumps(held))
        arguments = ["-m", "tests.faultfs.s3_server", str(self.port), str(self._held)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT
            )
        try:
            wait_for(self._answers, "the S3 server answers")
        except BaseException:  # an interrupt included: no process may be left behind
            process.kill()
            process.wait()
            raise
        return process

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def put(self, path: str, data: bytes) -> None:
        """Store an object past everything else."""
        request = urllib.request.Request(f"{self.endpoint}/{path}", data=data, method="PUT")
        with urllib.request.urlopen(request, timeout=T):
            pass

    def _filesystem(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(**self.options(), skip_instance_cache=True, use_listings_cache=False)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return what is stored, by name within the bucket."""
        fs = self._filesystem()
        found = {path.partition("/")[2]: fs.cat_file(path) for path in fs.find(f"{BUCKET}/{prefix}")}
        fs.close_session(fs.loop, fs.s3)
        return found

    def kill(self) -> dict[str, bytes]:
        """Kill -9; return what it held."""
        held = self.objects()
        self.close()
        return held

    def restart(self, held: dict[str, bytes] | None) -> None:
        """Start it again where it was, with some objects, or even without its bucket."""
        self._process = self._start(held)

    def close(self) -> None:
        """Kill it for good."""
        self._process.kill()
        self._process.wait()


class Gate:
    """A TCP port that leads to another one. Closed, it takes what it is sent and passes nothing on."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self._waiting: set[int] = set()
        self._sockets: list[socket.socket] = [self._listener]
        self._spawn(self._accept)

    @staticmethod
    def _spawn(target: Any, *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def hold(self) -> None:
        """Close the gate."""
        self._open.clear()

    def release(self) -> None:
        """Open the gate: what was sent meanwhile goes on."""
        self._open.set()

    @property
    def waiting(self) -> int:
        """How many connections have sent something that was not passed on."""
        with self._lock:
            return len(self._waiting)

    def close(self) -> None:
        """End it and all its connections."""
        self._open.set()
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                with self._lock:
                    self._sockets += [client, server]
                self._spawn(self._pass_on, client, server, True)
                self._spawn(self._pass_on, server, client, False)

    def _pass_on(self, source: socket.socket, target: socket.socket, gated: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if gated and not self._open.is_set():
                    with self._lock:
                        self._waiting.add(id(source))
                    self._open.wait()
                    with self._lock:
                        self._waiting.discard(id(source))
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
