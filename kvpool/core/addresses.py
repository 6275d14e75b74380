"""What lies where in a range of bytes: a dict by address that never has to move all that it has at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

V = TypeVar("V")

PARTS: Final = 1024
"""Each a dict of its own, for a part of the range: what grows from one end makes one after the other grow."""


class ByAddress(Generic[V]):
    """A dict whose keys are addresses from 0 to ``end``."""

    __slots__ = ("_parts", "_span")

    def __init__(self, end: int) -> None:
        self._span = end // PARTS + 1
        self._parts: list[dict[int, V]] = [{} for _ in range(PARTS)]

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __contains__(self, address: int) -> bool:
        return address in self._parts[address // self._span]

    def __getitem__(self, address: int) -> V:
        return self._parts[address // self._span][address]

    def __setitem__(self, address: int, value: V) -> None:
        self._parts[address // self._span][address] = value

    def __delitem__(self, address: int) -> None:
        del self._parts[address // self._span][address]

    def get(self, address: int) -> V | None:
        """Return what lies at an address of the range."""
        return self._parts[address // self._span].get(address)

    def pop(self, address: int) -> V:
        """Take out and return what lies at an address. Raises KeyError."""
        return self._parts[address // self._span].pop(address)

    def values(self) -> Iterator[V]:
        """Yield what lies at all addresses."""
        return (value for part in self._parts for value in part.values())

    def items(self) -> Iterator[tuple[int, V]]:
        """Yield addresses with what lies there."""
        return (item for part in self._parts for item in part.items())
