"""One master for each ``data_dir``: two would undo each other's catalog."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvpool.errors import ConfigError

LOCK_FILE = "master.lock"

WAIT_S = 1.0
"""How long a master that was killed may seem to be there: what it was starting holds the lock until it runs."""

_POLL_S = 0.02


@contextmanager
def held(data_dir: str | None) -> Iterator[None]:
    """Hold the directory, if there is one, as long as this process lives. Raises ConfigError("data_dir").

    The kernel lets go of it with the process, however that ends; no child inherits it. The file stays.
    """
    if data_dir is None:
        yield
        return
    path = Path(data_dir) / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError("data_dir", f"cannot keep the catalog in {data_dir}: {error}") from None
    try:
        try:
            _take(lock)
        except BlockingIOError:
            raise ConfigError("data_dir", f"another master uses {data_dir}") from None
        except OSError as error:
            raise ConfigError("data_dir", f"cannot lock {path}: {error.strerror}") from None
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)  # also for what is being started at this moment
        os.close(lock)


def _take(lock: int) -> None:
    """Lock a file, which may take ``WAIT_S``. Raises BlockingIOError when somebody else keeps it, OSError."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_POLL_S)
        else:
            return
