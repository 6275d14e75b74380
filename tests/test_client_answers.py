"""Answers of a node that cannot be: they are refused before there is memory for what they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvpool.client_peers import take
from kvpool.client_receive import _leading
from kvpool.errors import FrameError


def test_more_than_the_answer_has_is_not_taken() -> None:
    """However much it says that follows."""
    channel: Any = SimpleNamespace(payload_left=8, recv_into=lambda _: None)
    assert len(take(channel, 8)) == 8
    for size in (9, 1 << 62):
        with pytest.raises(FrameError, match="8 bytes left"):
            take(channel, size)


def test_an_answer_for_fewer_blocks_than_were_asked_for() -> None:
    """It is none."""
    assert _leading(memoryview(bytes(32)), 2, 2) == 2
    for size in (0, 8, 31):
        with pytest.raises(FrameError, match="for 2 blocks"):
            _leading(memoryview(bytes(size)), 2, 2)
