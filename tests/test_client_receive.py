"""Which parts of a prompt are asked for, given what was found without asking."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.client_receive import GAPS_MAX, PART_BYTES_MAX, PARTS, _gaps, _Receive

SIZE = 4 << 20


class Shards:
    """Blocks of which only size and number count."""

    shard_bytes = SIZE

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


def begun(here: list[bool]) -> Any:
    """Return a receive that knows what is here."""
    call: Any = SimpleNamespace(blocks=Shards(len(here)))
    receive = _Receive(call, 1, None)  # type: ignore[arg-type]
    receive.begin(list(here))
    return receive


@given(st.lists(st.booleans(), max_size=64))
def test_all_that_is_missing_is_asked_for_once(here: list[bool]) -> None:
    """And nothing that is here, but between many gaps."""
    receive = begun(here)
    asked = [number for part in receive._parts for number in range(part.first, part.end)]
    assert asked == [number for number, there in enumerate(receive.complete) if not there]
    assert {number for number, there in enumerate(here) if not there} <= set(asked)
    few = len(list(_gaps(here))) <= GAPS_MAX
    assert receive.complete == here if few else len(set(asked)) == asked[-1] + 1 - asked[0]
    assert all((part.end - part.first) * SIZE <= PART_BYTES_MAX for part in receive._parts)


@pytest.mark.parametrize("every", [2, 3, 7])
def test_many_gaps_are_not_as_many_questions(every: int) -> None:
    """Each would be a round trip, one after the other."""
    here = [number % every > 0 for number in range(840)]
    parts = begun(here)._parts
    assert len(parts) == -(-(840 - every + 1) * SIZE // PART_BYTES_MAX) > PARTS
    assert parts[0].first == 0
