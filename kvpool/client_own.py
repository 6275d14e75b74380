"""Hold of this host's own node: found, attached, lost and attached anew."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from kvpool.client_node import LocalNode
from kvpool.config import boot_id, default_socket_path
from kvpool.errors import KVPoolError
from kvpool.model import Namespace, NodeAddress
from kvpool.processes import start_thread

log = logging.getLogger(__name__)

REATTACH_S = 0.5


class OwnNode:
    """This host's node as long as it is there. Thread-safe."""

    def __init__(
        self,
        path: str | None,
        name: str,
        namespaces: Callable[[], Iterable[Namespace]],
        known: Callable[[], Sequence[NodeAddress] | None],
        submit: Callable[[Callable[[], None]], object],
        register_s: float,
    ) -> None:
        """``path``: of its socket, None to look for it; ``known``: the master's nodes, None without a master.

        ``submit`` runs something on another thread; ``namespaces`` are what a node is told when it is attached.
        """
        self._path = path
        self._name = name
        self._namespaces = namespaces
        self._known = known
        self._submit = submit
        self._register_s = register_s
        self._lock = threading.Lock()
        self.node: LocalNode | None = None
        """The node attached last, alive or not."""
        self.id = ""
        """Its id, even while it is lost."""
        self.watchers: set[Callable[[], object]] = set()
        """Called whenever it is let go of, for those who hold on to its memory."""
        self._left: list[LocalNode] = []  # lost ones whose reservations the node may still keep for us
        self._attach_at = 0.0
        self._asked = threading.Lock()  # held while the attach that ``get`` has asked for is waited for
        self._closed = threading.Event()

    def get(self) -> LocalNode | None:
        """Return the node if it is there; otherwise see to it that somebody looks for it. Quick."""
        node = self.node
        here = node is not None and node.alive
        if (self._left or not here) and time.monotonic() >= self._attach_at and not self._closed.is_set():
            # Not here: a node that is stopped lets us connect, and then says nothing. Nor by several threads at once,
            # which lookups need.
            self._attach_at = time.monotonic() + REATTACH_S
            if self._asked.acquire(blocking=False):
                try:
                    self._submit(self._attach_asked)
                except RuntimeError:  # no thread can be started
                    self._asked.release()
        return node if here else None

    def close(self) -> None:
        """Let go of it."""
        self._closed.set()
        if self.node is not None:
            self.node.close()

    def _attach_asked(self) -> None:
        try:
            self.attach()
        finally:
            self._asked.release()

    def attach(self) -> None:
        """Attach to this host's node if there is one and we have none; quick, and at most twice a second."""
        with self._lock:
            if self._closed.is_set():
                return
            if self.node is not None and self.node.alive:
                self.node.look()
            if self.node is not None and self.node.alive:
                self._abandon(self.node)
                return
            if self.node is not None:
                self.node.close()
                self._left.append(self.node)
                self.node = None
                for tell in list(self.watchers):
                    tell()
            for path in self._paths():
                try:
                    node = LocalNode(path, self._name)
                except KVPoolError as exc:
                    log.debug("no node at %s: %s", path, exc)
                    continue
                self.node, self.id = node, node.node_id
                if self._closed.is_set():  # meanwhile, by who saw no node here yet
                    node.close()
                    return
                start_thread(node.prefault, "kvpool-prefault")
                log.info("attached to node %s at %s", node.node_id, path)
                break
            else:
                return
        try:
            for namespace in list(self._namespaces()):
                node.register(namespace, self._register_s)
        except KVPoolError as exc:
            log.debug("node %s fails right after we attached: %s", node.path, exc)
        with self._lock:
            self._abandon(node)

    def _abandon(self, node: LocalNode) -> None:
        """Have the node free what our lost connections had reserved, once nobody copies there any more."""
        try:
            for left in [n for n in self._left if not n.writing]:
                if left.epoch == node.epoch:
                    node.abandon(left.writer)
                self._left.remove(left)
        except KVPoolError as exc:
            log.debug("node %s does not take back what was reserved: %s", node.path, exc)

    def _paths(self) -> list[str]:
        if self._path is not None:
            return [self._path]
        default = default_socket_path()
        paths = [default]
        nodes = self._known()
        if nodes is not None:
            here = boot_id()
            mine = [n.socket_path for n in nodes if here and n.boot_id == here]
            if nodes and default not in mine:
                paths = []  # a node of another pool has the usual place
            paths += [path for path in mine if path not in paths]
        return paths
