"""The nouns of the file tier: a job for an I/O thread, what came of it, and somebody who waits for blocks."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, Final, NamedTuple

from kvpool.model import Backend, BackendState, Namespace

File = tuple[bytes, int]
"""A shard of a block: namespace digest and key, shard."""

FILES_OWNER: Final = -1
"""Who holds the segment's slots on behalf of files; connections have numbers above 0."""

PROBE_FIRST_S: Final = 0.5
PROBE_MAX_S: Final = 5.0
"""A backend that is not up is probed again after this long, twice as long each time, up to this long."""


ORDER_S: Final = 0.01
"""Deadlines within the same one of these are as good as equal: see ``order``."""

LOOKS_MAX: Final = 256
"""Queued files looked at in one search for jobs: what is gone or finds no room must not keep the loop for long."""

REMOVE_WITHIN_S: Final = 20.0
"""A removal that was not begun so long after it was asked for is dropped, and nothing is said of it.

The master asks somebody else after ``backends.REMOVE_RETRY_S``; whoever was slower would remove what was written since.
"""


class Miss(IntEnum):
    """Why a block that was asked for is not here: what Pin and Get answer instead of an offset or size."""

    NOT_HERE = -1
    FILE_MISSING = -4
    FILE_BROKEN = -5
    STORAGE_DOWN = -6
    NOT_IN_TIME = -7
    NO_ROOM = -8


class Trouble(Enum):
    """What a store can complain of."""

    MISSING = "missing"
    BROKEN = "broken"
    SIZE = "size"
    FULL = "full"
    READ_ONLY = "read_only"
    ERROR = "error"
    GIVEN_BACK = "given_back"  # nobody has begun it: says nothing of the store


class Failure(NamedTuple):
    """Why a job failed; ``actual_bytes`` is the file's real length when it is SIZE."""

    trouble: Trouble
    text: str
    actual_bytes: int = 0


@dataclass(slots=True, eq=False)
class Write:
    """Put ``size`` bytes of the segment at ``start`` into a file; ``namespace`` is to be kept beside it first."""

    backend: int
    file: File
    start: int
    size: int
    shard_bytes: int
    pin: int
    namespace: Namespace | None


@dataclass(slots=True, eq=False)
class Read:
    """Fill ``size`` bytes of the segment at ``start`` from a file: one for everybody who waits for it."""

    file: File
    places: list[int]  # backends where it may lie, the first one next
    named: bool  # the index says that it lies there
    deadline: float = math.inf  # the first of those who wait for it
    waits: dict[Wait, None] = field(default_factory=dict)
    queue: ReadQueue | None = None
    turn: int = 0  # among those that the queue has seen
    backend: int = -1  # that reads it now
    reservation: int = 0
    start: int = 0
    size: int = 0
    shard_bytes: int = 0
    layers: int = 0
    sized: bool = False  # its length was told by the file itself
    learned: bool = False  # its namespace was looked for in the backend


def order(deadline: float) -> float:
    """Return what reads are ordered by: deadlines of one call's parts differ a little, and others' lie between."""
    return deadline - deadline % ORDER_S if math.isfinite(deadline) else deadline


class ReadQueue:
    """Reads, those first that have to be done first: a call that asks for much gets all of it before a later one.

    Those without a deadline are last; of equal ones (see ``order``), the first to come.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Read]] = []  # with those that have left it, which cost too much to look for
        self._length = 0
        self._turns = 0

    def __len__(self) -> int:
        """Return how many reads are in it."""
        return self._length

    def __iter__(self) -> Iterator[Read]:
        """Yield the reads in their order."""
        for _, turn, read in sorted(self._heap):
            if read.queue is self and read.turn == turn:
                yield read

    def add(self, read: Read, *, first: bool = False) -> None:
        """Take a read that is in no queue; ``first``: before all others."""
        self._turns += 1
        read.queue, read.turn = self, self._turns
        heapq.heappush(self._heap, (-math.inf if first else order(read.deadline), self._turns, read))
        self._length += 1

    def pop(self) -> Read:
        """Take the first read out. Raises IndexError when there is none."""
        while True:
            _, turn, read = heapq.heappop(self._heap)
            if read.queue is self and read.turn == turn:
                read.queue = None
                self._length -= 1
                return read

    def remove(self, read: Read) -> None:
        """Take out a read that is in it."""
        read.queue = None
        self._length -= 1
        if len(self._heap) > 2 * self._length + 64:
            self._heap = [each for each in self._heap if each[2].queue is self and each[2].turn == each[1]]
            heapq.heapify(self._heap)


@dataclass(slots=True, eq=False)
class Remove:
    """Remove files, or only ``look`` which are gone; part of the master's command ``id``.

    After ``until`` it must not be begun.
    """

    backend: int
    id: int
    files: list[File]
    until: float = math.inf
    look: bool = False


@dataclass(slots=True, eq=False)
class Learn:
    """Read the namespaces that a backend keeps beside its files."""

    backend: int


Job = Write | Read | Remove | Learn


class Wait:
    """A request for blocks, until all have come or cannot come, or its deadline."""

    __slots__ = ("deadline", "misses", "pins", "reads", "token")

    def __init__(self, deadline: float, token: Any) -> None:
        self.deadline = deadline
        self.token = token  # whatever the server needs to answer
        self.reads: dict[File, Read] = {}  # still awaited
        self.misses: dict[File, Miss] = {}
        self.pins: list[int] = []  # protect what has come, until it is answered


class BackendWork:
    """One backend: what it can do, and what is queued for it."""

    def __init__(self, backend_id: bytes, url: str, capacity_bytes: int) -> None:
        self.id = backend_id
        self.url = url
        self.capacity_bytes = capacity_bytes
        self.state = BackendState.UP
        self.reason = ""
        self.full = False  # the master's word: write nothing
        self.reads = ReadQueue()  # somebody waits
        self.ahead = ReadQueue()  # somebody will
        self.writes: OrderedDict[File, int] = OrderedDict()  # bytes
        self.removes: deque[Remove] = deque()
        self.running: dict[File, Read] = {}
        self.learning = ReadQueue()  # wait for namespaces
        self.learn_asked = True
        self.learn_due = False  # it may have been made anew
        self.learned_at = -math.inf  # for that reason
        self.kept: set[bytes] = set()  # namespaces that lie beside the files
        self.kept_before: frozenset[bytes] = frozenset()  # those that did when they were last looked at
        self.missing: dict[File, int] = {}  # not found: true only if the backend proves to be itself
        self.counters: Counter[str] = Counter()
        self.errors = 0  # in a row
        self.probe_at: float | None = None
        self.probe_wait_s = PROBE_FIRST_S
        self.probing = False
        self.room_bytes = 0  # what a file needed that did not fit
        self.turn = 0
        self.looked = 0  # at so many files in the last search for jobs

    def __repr__(self) -> str:
        return f"<{self.url} {self.state.name} {len(self.reads)} reads, {len(self.writes)} writes {self.reason}>"

    @property
    def readable(self) -> bool:
        """Whether reads make sense."""
        return self.state is not BackendState.DOWN

    @property
    def writable(self) -> bool:
        """Whether writes make sense."""
        return self.state is BackendState.UP and not self.full

    def described(self) -> Backend:
        """Return what the master is told."""
        return Backend(self.id, self.url, self.capacity_bytes, self.state, self.reason)


def ranked(file: File, backends: Sequence[BackendWork], usable: Callable[[BackendWork], bool]) -> list[int]:
    """Return the backends that can be used, in the order in which this block prefers them (rendezvous hashing)."""
    numbers = [number for number, backend in enumerate(backends) if usable(backend)]
    if len(numbers) > 1:
        numbers.sort(key=lambda n: hashlib.blake2b(file[0] + backends[n].id, digest_size=8).digest())
    return numbers
