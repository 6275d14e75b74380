"""What a server says and whom it lets in while the machine lacks something: a disk, files to be open."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvpool.config import MasterSettings
from kvpool.core.effects import Send
from kvpool.core.messages import Ack
from kvpool.errors import OverloadedError
from kvpool.server.dataplane import DataPlane
from kvpool.server.master import Pool


def test_a_disk_that_is_full_for_long_costs_one_answer_a_session() -> None:
    """Each is sent when all that it speaks of is kept, no sooner; what is kept at once is sent at once."""
    pool = Pool(MasterSettings(), None)
    sent: list[tuple[int, int]] = []
    waiting: list[Callable[[], None]] = []
    pool._put = lambda session, message: sent.append((session, message.sequence))  # type: ignore[method-assign]
    pool.keeper = SimpleNamespace(after=waiting.append, perform=lambda effect: None, generation=7)  # type: ignore[assignment]
    for sequence in range(1, 1000):
        pool.perform([Send(1, Ack(sequence)), Send(2, Ack(sequence))])
    assert (len(waiting), sent) == (1, [])
    waiting.pop()()
    assert sent == [(1, 1)]
    waiting.pop()()
    assert sorted(sent) == [(1, 1), (1, 999), (2, 999)]
    assert not waiting
    pool.keeper = SimpleNamespace(after=lambda call: call(), perform=lambda effect: None, generation=7)  # type: ignore[assignment]
    pool.perform([Send(1, Ack(1000)), Send(2, Ack(1000))])
    assert sent[3:] == [(1, 1000), (2, 1000)]


@pytest.mark.parametrize(("number", "refused"), [(errno.EMFILE, True), (errno.ENOMEM, True), (errno.ESRCH, False)])
def test_a_process_that_cannot_be_watched_is_not_let_in(
    monkeypatch: pytest.MonkeyPatch, number: int, refused: bool
) -> None:
    """Its memory would be given to others while it may still write to it; one that is gone writes no more."""

    def fail(pid: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", fail)
    plane: Any = SimpleNamespace(_processes={})
    conn: Any = SimpleNamespace(id=1, peer=SimpleNamespace(unix=True, pid=os.getpid()))
    with pytest.raises(OverloadedError, match="no process can be watched") if refused else contextlib.nullcontext():
        DataPlane.opened(plane, conn)
    assert not plane._processes
