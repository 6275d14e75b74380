"""The question every request asks: how much of this prompt does the pool hold, and where."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvpool.core.index import Index, Space
from kvpool.core.keytable import Rows, Words, as_words
from kvpool.core.placement import Placement
from kvpool.errors import InvalidArgumentError
from kvpool.model import KEY_BYTES, KEYS_PER_CALL_MAX, Reason

SIBLINGS_ASKED = 16
"""In how many other namespaces of a model, the newest ones, a miss looks for its block."""


class Rule(IntEnum):
    """Which blocks of a KV group a prefix of n blocks needs."""

    FULL = 0
    LAST_N = 1
    LAST = 2


@dataclass(frozen=True, slots=True)
class Group:
    """One KV group of the prompt."""

    namespace: bytes
    rule: Rule = Rule.FULL
    last_n: int = 0


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt's chain of keys (16 bytes each); the first ``known_prefix`` are not checked."""

    groups: tuple[Group, ...]
    keys: bytes | memoryview
    known_prefix: int = 0
    lease: bool = False


@dataclass(slots=True)
class Answer:
    """The longest prefix, with ``runs`` of (blocks, placement) for what lies behind ``known_prefix``."""

    prefix: int
    reason: Reason
    runs: list[tuple[int, Placement]]
    hit_rows: Rows
    known_rows: Rows
    lease: int = 0
    detail: str = ""


HEAD_BLOCKS = 2048
"""What of a long prompt is looked at first."""

GROUPS_MAX = 64
"""KV cache groups of one model that a lookup may be about."""

_NO_ROWS: Rows = np.empty(0, np.int64)


def check(query: Query) -> None:
    """Raise InvalidArgumentError for a query that is not well formed."""
    if len(query.keys) % KEY_BYTES:
        raise InvalidArgumentError("hashes", f"must be a multiple of {KEY_BYTES} bytes, not {len(query.keys)}")
    blocks = len(query.keys) // KEY_BYTES
    if blocks > KEYS_PER_CALL_MAX:
        raise InvalidArgumentError("hashes", f"at most {KEYS_PER_CALL_MAX} blocks a lookup, not {blocks}")
    if not 0 <= query.known_prefix <= blocks:
        raise InvalidArgumentError("known_prefix", f"must be from 0 to the number of hashes ({blocks})")
    if not query.groups:
        raise InvalidArgumentError("namespace", "must be given")
    for group in query.groups:
        if len(group.namespace) != KEY_BYTES:
            raise InvalidArgumentError("namespace", f"must be {KEY_BYTES} bytes, not {len(group.namespace)}")
        if group.rule is Rule.LAST_N and group.last_n < 1:
            raise InvalidArgumentError("groups.last_n", "must be at least 1")
    if len(query.groups) > GROUPS_MAX:
        raise InvalidArgumentError("groups", f"at most {GROUPS_MAX} a lookup, not {len(query.groups)}")
    if len(query.groups) * blocks > KEYS_PER_CALL_MAX:
        raise InvalidArgumentError("groups", f"at most {KEYS_PER_CALL_MAX} blocks of all groups together")
    if query.groups[0].rule is not Rule.FULL:
        raise InvalidArgumentError("groups", "the first group's rule must be full")


def longest_prefix(index: Index, query: Query, *, warming: bool) -> Answer:
    """Answer a checked query. Reads only; ``warming`` says that some node is still reporting."""
    space = index.spaces.get(query.groups[0].namespace)
    if space is None or space.descriptor is None:
        reason = Reason.WARMING if warming else Reason.NAMESPACE_UNKNOWN
        return Answer(query.known_prefix, reason, [], _NO_ROWS, _NO_ROWS)
    keys = as_words(query.keys)
    if len(query.groups) > 1:
        return _hybrid(index, query, keys, warming=warming)
    known = query.known_prefix
    known_rows = _NO_ROWS
    if known:
        known_rows = space.table.find(keys[:known])
        known_rows = known_rows[known_rows >= 0]
    rows, numbers, length = _leading(index, space, keys[known:])
    runs = _runs(index, numbers[:length])
    if length == len(keys) - known:
        return Answer(len(keys), Reason.COMPLETE, runs, rows, known_rows)
    reason, detail = _why(index, space, keys[known + length], int(rows[length]), warming=warming)
    return Answer(known + length, reason, runs, rows[:length], known_rows, detail=detail)


def _leading(index: Index, space: Space, keys: Words) -> tuple[Rows, NDArray[np.int32], int]:
    """Return (rows, numbers of their placements, how many leading ones are hits); the first that is none is among them.

    Of a long prompt the index may hold nothing: its head is looked at first, and what follows as long as all is there.
    """
    rows: list[Rows] = []
    numbers: list[NDArray[np.int32]] = []
    at, end = 0, min(len(keys), HEAD_BLOCKS)
    while True:
        found = space.table.find(keys[at:end])
        placed = index.placement.take(found, mode="wrap")  # -1 reads some row; masked out next
        whole = index.placements.whole.take(placed) & (found >= 0)
        rows.append(found)
        numbers.append(placed)
        length = end if whole.all() else at + int(whole.argmin())
        if length < end or end == len(keys):
            break
        at, end = end, min(len(keys), 2 * end)
    if len(rows) == 1:
        return rows[0], numbers[0], length
    return np.concatenate(rows), np.concatenate(numbers), length


def _runs(index: Index, numbers: NDArray[np.int32]) -> list[tuple[int, Placement]]:
    if not len(numbers):
        return []
    if (numbers == numbers[0]).all():
        return [(len(numbers), index.placements[int(numbers[0])])]
    edges = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
    return [
        (end - start, index.placements[int(numbers[start])])
        for start, end in pairwise(edges)
    ]


def _why(index: Index, space: Space, key: Words, row: int, *, warming: bool) -> tuple[Reason, str]:
    """Say why a block is not a hit."""
    if row >= 0:
        number = int(index.placement[row])
        if not index.placements.complete[number]:
            return (Reason.WARMING if warming else Reason.NOT_WHOLE), ""
        return (Reason.WARMING if warming else Reason.OWNER_SUSPECT), ""
    for sibling in space.siblings[-SIBLINGS_ASKED:]:
        if sibling.descriptor and space.descriptor and sibling.table.find(key.reshape(1, 2))[0] >= 0:
            return Reason.NAMESPACE_MISMATCH, ", ".join(space.descriptor.differences(sibling.descriptor))
    return (Reason.WARMING if warming else Reason.NOT_STORED), ""


def _hybrid(index: Index, query: Query, keys: Words, *, warming: bool) -> Answer:
    """Longest prefix that satisfies every group's rule; the runs are the full group's."""
    first, *others = query.groups
    answer = longest_prefix(index, Query((first,), query.keys, query.known_prefix), warming=warming)
    fits = np.ones(answer.prefix + 1, bool)  # fits[n]: a prefix of n blocks is usable
    extra = []
    for group in others:
        space = index.spaces.get(group.namespace)
        if space is None or space.descriptor is None:
            fits[query.known_prefix + 1 :] = False
            continue
        rows = space.table.find(keys[: answer.prefix])
        there = index.placements.whole.take(index.placement.take(rows, mode="wrap")) & (rows >= 0)
        there[: query.known_prefix] = True  # the engine has what it needs of these
        need = {Rule.FULL: answer.prefix, Rule.LAST_N: group.last_n, Rule.LAST: 1}[group.rule]
        count = np.concatenate(([0], np.cumsum(there)))
        n = np.arange(answer.prefix + 1)
        fits &= count - count[np.maximum(0, n - need)] == np.minimum(n, need)
        extra.append((rows, need))
    fits[: query.known_prefix + 1] = True
    prefix = int(np.flatnonzero(fits)[-1])
    if prefix < answer.prefix:
        blocks = prefix - query.known_prefix
        answer.prefix, answer.hit_rows, answer.detail = prefix, answer.hit_rows[:blocks], ""
        answer.reason = Reason.WARMING if warming else Reason.NOT_STORED
        answer.runs = _runs(index, index.placement.take(answer.hit_rows))
    needed = [rows[max(query.known_prefix, prefix - need) : prefix] for rows, need in extra]
    answer.hit_rows = np.concatenate([r[r >= 0] for r in (*reversed(needed), answer.hit_rows)])
    return answer
