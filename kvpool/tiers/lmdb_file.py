"""What LMDB does not survive in a file of its own.

It trusts its files. They are mapped, so that reading behind the end of one ends the process; and LMDB calls abort()
where it walks onto a page that is none, as after a power loss. Neither is an exception.
"""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from pathlib import Path

import lmdb

from kvpool.processes import module_command

MAP_BYTES = 1 << 36
"""Address space, not disk: what a file may grow to."""

_META = struct.Struct("<16xI20xI92xQ")  # the head of a file's first two pages: magic, page size, last page
_META_PAGES = (0, 4096)
_MAGIC = 0xBEEFC0DE
_DEADLY = {signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV}

READ_S = 120.0
"""A million files are read in a second: what takes so long goes round in circles."""


def open_file(path: Path) -> lmdb.Environment:
    """Open a file, or make it. Raises lmdb.Error, OSError."""
    _fill_up(path)
    return lmdb.open(str(path), map_size=MAP_BYTES, max_dbs=16, subdir=False, sync=False, metasync=False)


def deadly(path: Path) -> str:
    """Read all of a file in a process of its own; returns what has ended that, empty if it was not the file."""
    command = [*module_command(__name__), str(path)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=READ_S)
    except subprocess.TimeoutExpired:
        return f"it was not read in {READ_S:.0f} s"
    if -done.returncode not in _DEADLY:
        return ""
    said = done.stderr.decode(errors="replace").strip() or "nothing was said"
    return f"{signal.Signals(-done.returncode).name} when it is read: {said.splitlines()[-1]}"


def _fill_up(path: Path) -> None:
    """Make a file that was cut off as long as it says it is: what is missing is then an error, no crash."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = path.stat().st_size
        needed = 0
        for start in _META_PAGES:
            file.seek(start)
            head = file.read(_META.size)
            if len(head) == _META.size:
                magic, page_bytes, last_page = _META.unpack(head)
                if magic == _MAGIC and page_bytes == _META_PAGES[1]:
                    needed = max(needed, (last_page + 1) * page_bytes)
        if size < needed <= MAP_BYTES:
            file.truncate(needed)


def _read_all(path: Path) -> None:
    with open_file(path) as env, env.begin(write=True) as txn:
        names = [bytes(name) for name, _ in txn.cursor()]
        for name in names:
            for _ in txn.cursor(env.open_db(name, txn=txn, create=False)):
                pass
        txn.put(b"\0", b"")  # who writes reads the list of free pages, too
        txn.delete(b"\0")


if __name__ == "__main__":
    _read_all(Path(sys.argv[1]))
