"""Prompts on their way from a prefilling to a decoding engine, as the scheduler's side keeps them.

The pool is asked on a thread of its own. The two engines know of each other only through ``kv_transfer_params``, the
transfer's number in them, and what the master says of it.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvpool.client_transfers import Claimed, TransferPart, TransferState
from kvpool.model import KEY_BYTES, SHARDS_MAX, NodeAddress
from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.idle import IN_STEP_MAX_S, MAX_S, Idle
from kvpool_vllm.keeper import Incoming, Keeper, Outgoing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvpool.client import Client
    from kvpool.config import ConnectorSettings
    from kvpool.model import Namespace
    from kvpool_vllm.metadata import SaveJob
    from kvpool_vllm.names import Names
    from kvpool_vllm.step_time import StepTime

logger = logging.getLogger(LOGGER_NAME)

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


class Transfers:
    """All transfers of one engine, in its scheduler's thread."""

    def __init__(
        self, client: Client, settings: ConnectorSettings, engine: Engine, counters: Counter[str], step: StepTime
    ) -> None:
        """``counters``: where "transfer.*" is counted."""
        self._settings = settings
        self._step = step
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
        params = _params(request)
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
        params = _params(request)
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
        """Return whether it is known where the prompt's blocks are; ``incoming.gone`` says why they will not come.

        The master's first answer is waited for within this step's time.
        """
        if not incoming.answered and self._keeper is not None:
            wait_s = self._step.for_answer(new=incoming.new)
            incoming.new = False
            with self._step.taken():
                self._keeper.wait_for_answer(incoming, wait_s)
        if incoming.tokens not in {None, request.num_prompt_tokens}:
            incoming.gone = "prompt"
        found = incoming.found  # read once: what the keeper's thread brings meanwhile is looked at in the next step
        for claimed in (incoming.told, found):
            if claimed is None:
                continue
            if not namespaces or claimed.namespaces != tuple(namespace.digest for namespace in namespaces):
                incoming.gone = "namespace"
            elif len(claimed.nodes) != namespaces[0].shards or not all(n and n.node_id for n in claimed.nodes):
                incoming.gone = incoming.gone or "no_node"
        if found is None and not incoming.gone:
            now = time.monotonic()
            if incoming.give_up_at is None:
                wait_s = self._settings.transfer_open_timeout / 1000
                incoming.give_up_at = now + (wait_s if incoming.told is None else TOLD_WAIT_S)
            if now < incoming.give_up_at:
                return False
            incoming.gone = "not_opened"
        return found is not None

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


def _params(request: Any) -> Mapping[str, Any]:
    """Return what a request says of transfers: clients may put anything in that place."""
    params = request.kv_transfer_params
    return params if isinstance(params, dict) else {}


def _number(params: Mapping[str, Any]) -> int:
    """Return the transfer that parameters name, 0 for none."""
    text = params.get("transfer_id")
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
