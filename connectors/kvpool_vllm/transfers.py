"""Prompts on their way from a prefilling to a decoding engine, as the scheduler's side keeps them.

The pool is asked on a thread of its own. The two engines know of each other only through ``kv_transfer_params``, the
transfer's number in them, and what the master says of it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvpool.client_transfers import Claimed, TransferPart, TransferState
from kvpool.model import KEY_BYTES, SHARDS_MAX, NodeAddress
from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.idle import IN_STEP_MAX_S, MAX_S, Idle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvpool.client import Client
    from kvpool.config import ConnectorSettings
    from kvpool.model import Namespace
    from kvpool_vllm.metadata import SaveJob
    from kvpool_vllm.names import Names

logger = logging.getLogger(LOGGER_NAME)

RENEW_EVERY_S = 3.0
"""An open or claimed transfer lives 10 s unless the master is told otherwise; two renewals may be lost."""

POLL_FIRST_S = 0.004
POLL_MAX_S = 0.064
"""How often a transfer that has not been opened is asked for."""

LOOK_EVERY_S = 1.0
"""How often it is looked whether a transfer has been opened that nobody here waits for any more."""

UNWANTED_MAX = 512
"""So many of those are remembered, the latest."""

SILENCES_MAX = 2
"""Without an answer of the master in a row: nobody knows of the transfer then, unless its request says where it is."""

TOLD_WAIT_S = 2.0
"""How long the master may take to hear of a transfer that its request says to be there already."""

TEXT_MAX = 1024
"""Characters of whatever a request says."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What this engine does with transfers, and what others are told of it."""

    produces: bool = False
    consumes: bool = False
    engine_id: str = ""
    tp_size: int = 1
    in_step: bool = False
    """Its ranks of data parallelism compute in step."""


@dataclass(eq=False, slots=True)
class Outgoing:
    """A prompt that this engine computes for another one."""

    transfer: int
    names: list[bytes]
    """Of all its blocks, the partial one too where that can be moved."""
    own_names: int
    """So many of the last are of no use to anybody else."""
    private: bool = False
    """Nobody else knows any of them."""
    asked: bool = False
    """The master was, or is about to be, asked to open it."""
    opened: bool = False
    """It has: what is of use to this transfer alone will be dropped with it. Set by the keeper's thread."""
    refused: bool = False
    """It did not; set by the keeper's thread."""
    jobs: set[int] = field(default_factory=set)
    """Saves that some rank has not reported."""
    planned: bool = False
    """There will be no more of them."""

    def tail_is_done(self, request: Any, computed: int, end: int, block_tokens: int) -> bool:
        """Whether the partial block that follows ``end`` is computed with so many tokens: nobody writes behind it."""
        whole, prompt = request.num_prompt_tokens // block_tokens, request.num_prompt_tokens
        return bool(end == whole < len(self.names) and computed >= prompt and request.max_tokens == 1)


@dataclass(eq=False, slots=True)
class Incoming:
    """A prompt that another engine computes, or has computed, for this one; for several requests, if samples of one."""

    transfer: int
    told: Claimed | None = None
    """Where it is by the request. Anybody may have written that: no node is asked that the master does not name, unless
    there is no master."""
    tokens: int | None = None
    """Of the prompt, where the other engine says it."""
    found: Claimed | None = None
    """Where it is; set by the keeper's thread."""
    give_up_at: float | None = None
    gone: str = ""
    """Why it will not come; set by the keeper's thread."""
    silences: int = 0
    """Questions in a row to which the master gave no answer."""
    requests: int = 0

    @property
    def settled(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.found is not None or bool(self.gone)


class Keeper:
    """Asks the pool for what the scheduler's thread may not wait for, in order, and keeps transfers alive."""

    def __init__(self, client: Client, name: str) -> None:
        """``name``: this engine's, for people."""
        self._client = client
        self._name = name
        self._consumer = f"{name[:200]}#{secrets.token_hex(4)}"
        """Another engine may have the same name."""
        self._changed = threading.Condition()
        self._news = threading.Event()
        self._calls: deque[Callable[[], object]] = deque()
        self._busy = False
        self._produced: dict[int, tuple[int, float] | None] = {}  # (ttl_ms, until when) of those that are to be sealed
        self._consumed: set[int] = set()
        self._claiming: dict[int, tuple[Incoming, float, float]] = {}  # (.., when next, pause then)
        self._unwanted: dict[int, float] = {}  # until when; if they are opened after all, they are ended
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvpool-transfers", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how many transfers are kept alive, or have something left to be said of them."""
        with self._changed:
            return len(self._calls) + self._busy + len(self._produced.keys() | self._consumed | self._claiming.keys())

    def open(self, outgoing: Outgoing, parts: Sequence[TransferPart], nodes: Sequence[str]) -> None:
        """Open a transfer, and renew it until it is sealed or ended."""

        def call() -> None:
            try:
                outgoing.opened = self._client.transfers.open(outgoing.transfer, parts, nodes, self._name)
            finally:
                outgoing.refused = not outgoing.opened

        with self._changed:
            self._produced[outgoing.transfer] = None
            self._call(call)

    def claim(self, incoming: Incoming) -> None:
        """Ask for a transfer until it is there, and renew it from then on, until it is ended."""
        with self._changed:
            self._unwanted.pop(incoming.transfer, None)
            self._claiming[incoming.transfer] = (incoming, 0.0, POLL_FIRST_S)
            self._changed.notify()

    def seal(self, transfer: int, ttl_ms: int) -> None:
        """Say that all is stored; the other engine has so much time to come for it."""
        with self._changed:
            self._produced[transfer] = ttl_ms, time.monotonic() + ttl_ms / 1000
            self._call(lambda: self._seal(transfer))

    def end(self, transfer: int) -> None:
        """End a transfer that was opened here."""
        with self._changed:
            self._produced.pop(transfer, None)
            self._call(lambda: self._client.transfers.end([transfer]))

    def leave(self, transfer: int, until_s: float, *, back: bool) -> None:
        """End a transfer that was claimed here; one that was never seen, whenever it is opened within ``until_s``.

        ``back``: it was not loaded, and another engine may come for it.
        """
        with self._changed:
            self._consumed.discard(transfer)
            claimed = self._claiming.pop(transfer, None)
            if claimed is not None and claimed[0].gone != "ended":
                self._unwanted[transfer] = time.monotonic() + until_s
                if len(self._unwanted) > UNWANTED_MAX:
                    del self._unwanted[next(iter(self._unwanted))]
            self._call(lambda: self._client.transfers.end([transfer], self._consumer, back=back))

    def close(self) -> None:
        """End what was not handed over, and stop."""
        with self._changed:
            produced, consumed = sorted(self._produced), sorted(self._consumed | self._claiming.keys())
            self._produced.clear()
            self._consumed.clear()
            self._claiming.clear()
            if produced:
                self._call(lambda: self._client.transfers.end(produced))
            if consumed:
                self._call(lambda: self._client.transfers.end(consumed, self._consumer, back=True))
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def wait_for_news(self, timeout_s: float) -> None:
        """Wait until something is known of some transfer that is being claimed."""
        if self._news.wait(timeout_s):
            self._news.clear()

    def _call(self, call: Callable[[], object]) -> None:
        self._calls.append(call)
        self._changed.notify()

    def _run(self) -> None:
        renew_at = look_at = time.monotonic() + RENEW_EVERY_S
        while True:
            with self._changed:
                self._busy = False
                looks = [look_at] if self._unwanted else []
                wake_at = min([renew_at, *looks, *(due for _, due, _ in self._claiming.values())])
                self._changed.wait_for(
                    lambda: self._calls or self._closed or any(not due for _, due, _ in self._claiming.values()),
                    max(0.0, wake_at - time.monotonic()),
                )
                if self._closed and not self._calls:
                    return
                calls, self._busy = list(self._calls), True
                self._calls.clear()
                now = time.monotonic()
                due = [entry for entry in self._claiming.values() if entry[1] <= now]
            for call in calls:
                self._try(call)
            for incoming, _, pause_s in due:
                self._try(self._claim, incoming, pause_s)
            if self._unwanted and time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_EVERY_S
                self._try(self._end_unwanted)
            if time.monotonic() >= renew_at:
                renew_at = time.monotonic() + RENEW_EVERY_S
                with self._changed:
                    held = sorted(self._produced.keys() | self._consumed)
                    unsealed = [transfer for transfer, sealing in self._produced.items() if sealing is not None]
                for transfer in unsealed:
                    self._try(self._seal, transfer)
                if held:
                    self._try(self._client.transfers.renew, held, self._consumer)

    @staticmethod
    def _try(call: Callable[..., object], *arguments: object) -> None:
        """Whatever becomes of it, the others are said, too: nobody else says these things."""
        try:
            call(*arguments)
        except Exception:  # whatever it was, the thread must live
            logger.exception("transfers")

    def _end_unwanted(self) -> None:
        with self._changed:
            now = time.monotonic()
            self._unwanted = {transfer: until for transfer, until in self._unwanted.items() if until > now}
            unwanted = list(self._unwanted)
        over = set(self._client.transfers.end(unwanted, self._consumer, back=True))
        with self._changed:
            for transfer in unwanted:
                if transfer not in over:
                    self._unwanted.pop(transfer, None)

    def _seal(self, transfer: int) -> None:
        """Seal a transfer, and again with the next renewal if nobody answers."""
        with self._changed:
            sealing = self._produced.get(transfer)
        if sealing is None:
            return  # ended meanwhile
        ttl_ms, until = sealing
        answer = self._client.transfers.seal(transfer, ttl_ms)
        if answer is not None or time.monotonic() > until:
            with self._changed:
                self._produced.pop(transfer, None)

    def _claim(self, incoming: Incoming, pause_s: float) -> None:
        found = self._client.transfers.claim(incoming.transfer, self._consumer)
        there = found.state in {TransferState.OPEN, TransferState.SEALED}
        incoming.silences = incoming.silences + 1 if found.state is TransferState.NO_MASTER else 0
        if there and incoming.found is None:
            incoming.found = found
        elif found.state is TransferState.ENDED:
            incoming.gone = "ended"
        elif incoming.silences >= SILENCES_MAX and incoming.found is None:
            incoming.found = incoming.told
            incoming.gone = "" if incoming.told is not None else "no_master"
        if incoming.settled:
            self._news.set()
        with self._changed:
            claiming = self._claiming.get(incoming.transfer)
            if claiming is None or claiming[0] is not incoming:
                return  # ended meanwhile; what was claimed just now is ended by the call that waits
            if there:
                del self._claiming[incoming.transfer]
                self._consumed.add(incoming.transfer)
            else:
                due = time.monotonic() + pause_s
                self._claiming[incoming.transfer] = (incoming, due, min(2 * pause_s, POLL_MAX_S))


class Transfers:
    """All transfers of one engine, in its scheduler's thread."""

    def __init__(self, client: Client, settings: ConnectorSettings, engine: Engine, counters: Counter[str]) -> None:
        """``counters``: where "transfer.*" is counted."""
        self._settings = settings
        self._engine = engine
        self._counters = counters
        self._keeper = Keeper(client, engine.engine_id) if engine.produces or engine.consumes else None
        self._jobs: dict[int, Outgoing] = {}
        self._early: list[tuple[Outgoing, SaveJob]] = []
        self._incoming: dict[int, Incoming] = {}
        self._nodes: dict[int, NodeAddress] = {}
        self._idle = Idle(IN_STEP_MAX_S if engine.in_step else MAX_S)
        self._told: set[str] = set()

    def __len__(self) -> int:
        """Return how many are not over, as far as this engine has to do with them."""
        return len(self._keeper) if self._keeper is not None else 0

    def close(self) -> None:
        """End what was not handed over."""
        if self._keeper is not None:
            self._keeper.close()

    def workers_nodes(self, nodes: Mapping[int, NodeAddress]) -> None:
        """Learn in which node each shard is stored."""
        self._nodes.update(nodes)

    # ---- for another engine ----

    def outgoing(self, request: Any, names: Names) -> Outgoing | None:
        """Return the transfer that the request is to be, if another engine goes on with it."""
        params = request.kv_transfer_params or {}
        if not (self._engine.produces and params.get("do_remote_decode")):
            return None
        transfer = _number(params) or secrets.randbits(64) | 1
        of_blocks, own = names.of_transfer(request, transfer)
        private = not names.may_share(request)
        return Outgoing(transfer, of_blocks, own, private) if of_blocks else None

    def open(self, outgoing: Outgoing, namespaces: Sequence[Namespace]) -> None:
        """Have the master know of a transfer before its blocks come."""
        assert self._keeper is not None  # noqa: S101 -- there is one where transfers are asked for
        outgoing.asked = True
        self._counters["transfer.opened"] += 1
        keys = b"".join(name[:KEY_BYTES] for name in outgoing.names)
        parts = [TransferPart(namespace, keys, outgoing.own_names) for namespace in namespaces]
        nodes = [self._nodes[shard].node_id if shard in self._nodes else "" for shard in range(namespaces[0].shards)]
        self._keeper.open(outgoing, parts, nodes)

    def saving(self, outgoing: Outgoing, job_id: int) -> None:
        """A save of some of its blocks begins."""
        outgoing.jobs.add(job_id)
        self._jobs[job_id] = outgoing

    def early(self, job: SaveJob) -> bool:
        """Whether a save has to wait, or nobody would drop what only its transfer wants if this engine died."""
        outgoing = self._jobs.get(job.job_id)
        if outgoing is None or outgoing.opened:
            return False
        last = outgoing.names[-1][:KEY_BYTES]
        tail = outgoing.own_names > 0 and any(part.keys.endswith(last) for part in job.parts)
        if not (outgoing.private or tail):
            return False
        self._early.append((outgoing, job))
        return True

    def in_time(self, cancel: Callable[[int], None]) -> list[SaveJob]:
        """Return the early saves that may begin now; ``cancel`` those of transfers that the master does not know."""
        early, self._early, begin = self._early, [], []
        for outgoing, job in early:
            if outgoing.opened:
                begin.append(job)
            elif outgoing.refused or not outgoing.asked:
                cancel(job.job_id)
                self.saved(job.job_id)
            else:
                self._early.append((outgoing, job))
        return begin

    def saved(self, job_id: int) -> None:
        """Every rank has reported a save, of whatever blocks."""
        outgoing = self._jobs.pop(job_id, None)
        if outgoing is not None:
            outgoing.jobs.discard(job_id)
            if outgoing.planned:
                self._seal(outgoing)

    def hand_over(self, outgoing: Outgoing, request: Any, namespaces: Sequence[Namespace]) -> dict[str, Any] | None:
        """Return what the other engine has to be told; None where there is nothing to be had."""
        shards = range(namespaces[0].shards) if namespaces else ()
        if not outgoing.asked or outgoing.refused or not all(shard in self._nodes for shard in shards):
            self._miss("refused" if outgoing.refused else "not_begun" if not outgoing.asked else "no_node")
            return None
        nodes = [self._nodes[shard] for shard in shards]
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self._engine.engine_id,
            "remote_host": nodes[0].host,
            "remote_port": nodes[0].port,
            "remote_block_ids": [],
            "tp_size": self._engine.tp_size,
            "transfer_id": f"{outgoing.transfer:016x}",
            "remote_nodes": [asdict(node) for node in nodes],
            "remote_namespaces": [namespace.digest.hex() for namespace in namespaces],
            "remote_tokens": request.num_prompt_tokens,
        }

    def all_planned(self, outgoing: Outgoing) -> None:
        """No save will follow: once all are reported the transfer is sealed."""
        outgoing.planned = True
        self._seal(outgoing)

    def give_up(self, outgoing: Outgoing) -> None:
        """Nobody will come for it."""
        if outgoing.asked and self._keeper is not None:
            self._counters["transfer.ended"] += 1
            self._keeper.end(outgoing.transfer)

    def _seal(self, outgoing: Outgoing) -> None:
        if not outgoing.jobs and self._keeper is not None:
            self._counters["transfer.sealed"] += 1
            self._keeper.seal(outgoing.transfer, self._settings.transfer_ttl)

    # ---- from another engine ----

    def incoming(self, request: Any) -> Incoming | None:
        """Return the transfer that the request comes with, if this engine takes part; it is claimed from now on."""
        params = request.kv_transfer_params or {}
        if not (self._engine.consumes and self._keeper is not None and params.get("do_remote_prefill")):
            return None
        transfer = _number(params)
        if not transfer:
            self._miss("foreign", "its kv_transfer_params have no transfer_id")
            return None
        incoming = self._incoming.get(transfer)
        if incoming is None:
            try:
                incoming = Incoming(transfer, *_told(params))
            except (TypeError, ValueError, AttributeError) as error:
                self._miss("foreign", f"its kv_transfer_params are not understood: {repr(error)[:TEXT_MAX]}")
                return None
            self._incoming[transfer] = incoming
            self._keeper.claim(incoming)
        incoming.requests += 1
        return incoming

    def idle(self, *, empty: bool, waits: bool, begins: bool) -> float:
        """Return how long to wait in this step; waits for the master's word if there is nothing else to wait for.

        ``empty``: nothing is computed; ``waits``: loads or saves are under way, whose workers wait; ``begins``: from
        this step on.
        """
        empty = empty and (waits or any(not incoming.settled for incoming in self._incoming.values()))
        wait_s = self._idle.wait_s(empty=empty, begins=begins)
        if wait_s and not waits and self._idle.quiet and self._keeper is not None:
            self._keeper.wait_for_news(wait_s)
        return wait_s

    def found(self, incoming: Incoming, request: Any, namespaces: Sequence[Namespace]) -> bool:
        """Return whether it is known where the prompt's blocks are; ``incoming.gone`` says why they will not come."""
        if incoming.tokens not in {None, request.num_prompt_tokens}:
            incoming.gone = "prompt"
        for claimed in (incoming.told, incoming.found):
            if claimed is None:
                continue
            if not namespaces or claimed.namespaces != tuple(namespace.digest for namespace in namespaces):
                incoming.gone = "namespace"
            elif len(claimed.nodes) != namespaces[0].shards or not all(n and n.node_id for n in claimed.nodes):
                incoming.gone = incoming.gone or "no_node"
        if incoming.found is None and not incoming.gone:
            now = time.monotonic()
            if incoming.give_up_at is None:
                wait_s = self._settings.transfer_open_timeout / 1000
                incoming.give_up_at = now + (wait_s if incoming.told is None else TOLD_WAIT_S)
            if now < incoming.give_up_at:
                return False
            incoming.gone = "not_opened"
        return incoming.found is not None

    def drop(self, incoming: Incoming, reason: str = "", *, back: bool = False) -> None:
        """Forget a transfer: it is loaded, not wanted any more, or, with a ``reason``, cannot be had.

        ``back``: nobody goes on with the request here, but another engine may.
        """
        if reason:
            self._miss(reason)
        incoming.requests -= 1
        if not incoming.requests:
            self._incoming.pop(incoming.transfer, None)
            if self._keeper is not None:
                self._keeper.leave(incoming.transfer, self._settings.transfer_ttl / 1000, back=back)

    def received(self, arrived: int, wanted: int) -> None:
        """Count a load."""
        self._counters["transfer.received" if arrived == wanted else "transfer.incomplete"] += 1

    def _miss(self, reason: str, text: str = "") -> None:
        self._counters[f"transfer.miss.{reason}"] += 1
        level = logging.DEBUG if reason in self._told else logging.WARNING
        self._told.add(reason)
        logger.log(level, "kvpool: a prompt is not transferred (%s): %s", reason, text or WHY.get(reason, ""))


WHY = {
    "refused": "the master did not take the transfer; the decoding engine finds what is in the pool, or computes",
    "not_begun": "the workers have not said in time how they hold KV",
    "no_node": "no node runs where the prefilling engine does, or it has gone",
    "ended": "it was given up, or its prefilling engine is gone",
    "no_master": "the master does not answer",
    "not_opened": "the prefill has not begun within transfer_open_timeout",
    "namespace": "the other engine's KV means something else here: kvpoolctl explain tells the difference",
    "prompt": "the other engine's prompt has another length",
    "unread": "the request asks for a prompt that is computed",
}


def _number(params: Any) -> int:
    """Return the transfer that parameters name, 0 for none."""
    text = (params or {}).get("transfer_id")
    try:
        number = int(text, 16) if isinstance(text, str) else 0
    except ValueError:
        return 0
    return number if 0 < number < 1 << 64 else 0


def _told(params: Mapping[str, Any]) -> tuple[Claimed | None, int | None]:
    """Return what the parameters themselves say of where the blocks are, and of the prompt's tokens.

    Raises TypeError, ValueError, AttributeError: they come from whoever has asked the engine.
    """
    tokens = params.get("remote_tokens")
    if tokens is not None and type(tokens) is not int:
        raise ValueError("remote_tokens must be a number")
    if "remote_nodes" not in params or "remote_namespaces" not in params:
        return None, tokens
    if max(len(params["remote_nodes"]), len(params["remote_namespaces"])) > SHARDS_MAX:
        raise ValueError(f"at most {SHARDS_MAX} nodes and namespaces")
    nodes = tuple(_node(**node) for node in params["remote_nodes"])
    namespaces = tuple(bytes.fromhex(text) for text in params["remote_namespaces"])
    return Claimed(TransferState.OPEN, namespaces, nodes), tokens


def _node(**told: Any) -> NodeAddress:
    node = NodeAddress(**told)
    texts = (node.node_id, node.host, node.socket_path, node.boot_id)
    if any(type(text) is not str or len(text) > TEXT_MAX for text in texts):
        raise ValueError(f"a node is named by texts of at most {TEXT_MAX} characters")
    if type(node.port) is not int or not 0 <= node.port < 1 << 16:
        raise ValueError("a node's port must be from 0 to 65535")
    return node
