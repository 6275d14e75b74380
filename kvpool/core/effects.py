"""What a state machine asks its server to do. Decide first, then perform."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvpool.core.messages import BlockRun, MasterMessage, NodeMessage
from kvpool.model import Backend, Namespace

# ---- events ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """A node's message came in on a session (a number the server gives each stream)."""

    session: int
    message: NodeMessage


@dataclass(frozen=True, slots=True)
class Closed:
    """A session's stream ended."""

    session: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. Expected every 100 ms."""


Event = Received | Closed | Tick


# ---- effects -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message on a session; a session that is gone swallows it."""

    session: int
    message: MasterMessage


@dataclass(frozen=True, slots=True)
class Close:
    """End a session's stream, after what was sent on it."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep a namespace descriptor across restarts."""

    namespace: Namespace


class FileChange(Enum):
    """What the catalog is told of files."""

    ADDED = "added"
    LOST = "lost"  # found to be missing or broken
    DOUBTED = "doubted"  # there, as it seems; until that is seen to, and ADDED, they are kept as doomed
    DOOMED = "doomed"  # no hits any more; to be removed
    REMOVED = "removed"  # doomed ones that are gone, or were written again


@dataclass(frozen=True, slots=True)
class CatalogFiles:
    """Keep across restarts what has changed about a backend's files."""

    backend: bytes
    change: FileChange
    blocks: tuple[BlockRun, ...]


@dataclass(frozen=True, slots=True)
class CatalogBackend:
    """Keep what is known of a backend; ``complete``: a scan of it has come to its end, once."""

    backend: Backend
    complete: bool


@dataclass(frozen=True, slots=True)
class CatalogPin:
    """Keep an operator's pin; ``until`` is in the state's own time, None for a hard one."""

    id: int
    label: str
    namespace: bytes
    until: float | None
    keys: bytes


@dataclass(frozen=True, slots=True)
class PinEnded:
    """Forget a pin."""

    id: int


@dataclass(frozen=True, slots=True)
class TransferExpired:
    """Nobody was heard of who wants a transfer; for the log."""

    id: int
    producer: str
    sealed: bool


@dataclass(frozen=True, slots=True)
class BackendChanged:
    """Something about a backend is worth a line in the log; ``bad`` if somebody should look at it."""

    name: str
    what: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A node's state changed; for the log and for people."""

    node_id: str
    state: str
    why: str


Effect = (
    Send | Close | Remember | CatalogFiles | CatalogBackend | CatalogPin | PinEnded | TransferExpired | BackendChanged
    | NodeChanged
)
