"""What a state machine asks its server to do. Decide first, then perform."""

from __future__ import annotations

from dataclasses import dataclass

from kvpool.core.messages import MasterMessage, NodeMessage
from kvpool.model import Namespace

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


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A node's state changed; for the log and for people."""

    node_id: str
    state: str
    why: str


Effect = Send | Close | Remember | NodeChanged
