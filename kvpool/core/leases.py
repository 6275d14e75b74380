"""Leases: a scheduler's announcement that it will load these blocks, so evict them last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from kvpool.core.index import Index
from kvpool.core.keytable import Rows


class _Lease(NamedTuple):
    rows: Rows
    deadline: float


class Leases:
    """Tokens to leased rows. All leases have one TTL, so the oldest renewal is the next to expire."""

    def __init__(self, index: Index, ttl_s: float, first_token: int, blocks_max: int) -> None:
        self._index = index
        self._ttl_s = ttl_s
        self._next = first_token
        self._leases: OrderedDict[int, _Lease] = OrderedDict()
        self._blocks_max = blocks_max
        self.blocks = 0  # leased blocks, counted once per lease
        self.expired = 0
        self.refused = 0

    def __len__(self) -> int:
        """Return the number of leases."""
        return len(self._leases)

    def next_token(self, blocks: int) -> int:
        """Return a token for ``take`` to give to a lease on so many blocks; 0 = no room for it."""
        if self.blocks + blocks > self._blocks_max:
            self.refused += 1
            return 0
        self._next += 1
        return self._next - 1

    def take(self, token: int, rows: Rows, now: float) -> None:
        """Lease distinct rows under a token of ``next_token``."""
        self._index.lease(rows)
        self._leases[token] = _Lease(rows, now + self._ttl_s)
        self.blocks += len(rows)

    def renew(self, tokens: Iterable[int], now: float) -> list[int]:
        """Start the TTL of these leases anew; returns the tokens that are unknown."""
        unknown = []
        for token in tokens:
            lease = self._leases.get(token)
            if lease is None:
                unknown.append(token)
            else:
                self._leases[token] = lease._replace(deadline=now + self._ttl_s)
                self._leases.move_to_end(token)
        return unknown

    def release(self, tokens: Iterable[int]) -> list[int]:
        """End these leases; returns the tokens that are unknown."""
        unknown = []
        for token in tokens:
            lease = self._leases.pop(token, None)
            if lease is None:
                unknown.append(token)
            else:
                self._index.unlease(lease.rows)
                self.blocks -= len(lease.rows)
        return unknown

    def expire(self, now: float, at_most: int) -> None:
        """End leases whose time is over; no further one once so many blocks, or leases, have been let go of."""
        while at_most > 0:
            token, lease = next(iter(self._leases.items()), (0, None))
            if lease is None or lease.deadline > now:
                return
            self.release([token])
            self.expired += 1
            at_most -= max(1, len(lease.rows))
