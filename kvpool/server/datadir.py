"""One master for each ``data_dir``: two would undo each other's catalog."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvpool.errors import ConfigError

LOCK_FILE = "master.lock"


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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("data_dir", f"another master uses {data_dir}") from None
        except OSError as error:
            raise ConfigError("data_dir", f"cannot lock {path}: {error.strerror}") from None
        yield
    finally:
        os.close(lock)
