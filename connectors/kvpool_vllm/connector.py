"""``KVPoolConnector``: vLLM's connector contract, translated to the two sides that do the work.

Upstream contract: ``vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1``.
"""

from __future__ import annotations

import functools
import inspect
import sys
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

import torch

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
    from vllm.v1.request import RequestStatus
except ImportError as error:
    raise ImportError(f"KVPoolConnector needs vLLM 0.32 or later: {error}") from error

from kvpool.errors import ConfigError
from kvpool.model import Namespace
from kvpool.processes import run_threads_on
from kvpool_vllm import LOGGER_NAME, announce
from kvpool_vllm.cpus import free_cpus
from kvpool_vllm.device import KVBlocks, open_device
from kvpool_vllm.events import PoolEvents, vllm_events
from kvpool_vllm.groups import read_groups
from kvpool_vllm.metadata import GroupFacts, RankFacts, StepMeta, WorkerMeta
from kvpool_vllm.namespace import (
    agreed_namespaces,
    check_supported,
    hash_fingerprint,
    namespace_fields,
    place_of,
    stored_head_groups,
    total_kv_heads,
)
from kvpool_vllm.naps import install, nap_for
from kvpool_vllm.scheduler import SchedulerSide
from kvpool_vllm.seeds import NAMES
from kvpool_vllm.settings import autostart, connect, read_settings, role_of, transfer_roles
from kvpool_vllm.stats import KVPoolPromMetrics, KVPoolStats
from kvpool_vllm.tally import say_once
from kvpool_vllm.transfers import Engine
from kvpool_vllm.worker import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(LOGGER_NAME)

RUN = uuid.uuid4().hex
"""Names what an engine stores after a reset: the same for all connectors of its process, and for no other run."""

KVConnectorMetadata.register(StepMeta)
KVConnectorWorkerMetadata.register(WorkerMeta)


def _recompute_on_failure(transfer_config: Any) -> None:
    """See to it that a lost block costs time and not a request: vLLM fails such requests by default."""
    if transfer_config.kv_load_failure_policy == "recompute":
        return
    logger.warning(
        "kvpool: kv_load_failure_policy was %r, which ends a request in an error when a block cannot be loaded; "
        "it is now 'recompute'",
        transfer_config.kv_load_failure_policy,
    )
    transfer_config.kv_load_failure_policy = "recompute"


def _multi_connector(frame: FrameType | None) -> Any:
    """Return the ``MultiConnector`` that makes this connector, or None.

    vLLM reads the failure policy in its configuration, and shows its children a copy that it never reads again.
    """
    caller = frame.f_back if frame is not None else None
    maker = caller.f_locals.get("self") if caller is not None else None
    return maker if isinstance(maker, MultiConnector) else None


def _place(multi: Any) -> int | None:
    """Return the place of the connector that ``multi`` makes now, as ``transfer_roles`` takes it.

    Beside a connector of somebody else's no place is the first: that one may move prompts, and only one can.
    """
    if multi is None:
        return None
    others = (multi._kv_transfer_config.kv_connector_extra_config or {}).get("connectors", ())
    foreign = any(other.get("kv_connector") not in {KVPoolConnector.__name__, *NAMES} for other in others)
    return len(multi.sub_connectors) + foreign  # it makes its connectors one after the other


Hook = TypeVar("Hook", bound="Callable[..., Any]")


def _harmless(answer: Any) -> Callable[[Hook], Hook]:
    """Have a hook answer so when it fails, and say it once: what goes wrong with the pool is a miss and ends no engine.

    Only where nothing wrong follows from what it left undone. Other hooks plan, hand over or report loads: if those
    went on after a failure, a request would wait for ever, or take a block for filled that is not.
    """

    def decorate(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def call(self: KVPoolConnector, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception:  # whatever it was: vLLM would end
                say_once(self._side.counters, "hook.errors", f"kvpool: {hook.__name__} failed")
                return answer

        return call  # type: ignore[return-value]  # of the same signature

    return decorate


def _isa(vllm_config: Any, block_tokens: int) -> str:
    """Return the instruction set that the CPU kernels pack KV for, which changes the bytes; "" on devices."""
    if not current_platform.is_cpu():
        return ""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    arch = current_platform.get_cpu_architecture().name.lower()
    return f"{arch}-{_get_attn_isa(model.dtype, block_tokens, model.get_head_size(), cache.cache_dtype)}"


class KVPoolConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Loads a prompt's blocks from the pool instead of computing them, and stores what was computed."""

    # vLLM makes one object per role and calls only that role's methods; only that role's side is set.
    scheduler: SchedulerSide
    worker: WorkerSide

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Raise InvalidArgumentError for settings and models that cannot work."""
        super().__init__(vllm_config, role, kv_cache_config)
        multi = _multi_connector(inspect.currentframe())
        number = _place(multi)
        self._settings = read_settings(self._kv_transfer_config, number, tell=role == KVConnectorRole.SCHEDULER)
        self._produces, self._consumes = transfer_roles(self._kv_transfer_config, self._settings, number)
        others = [] if multi is None else [c for c in multi.sub_connectors if isinstance(c, KVPoolConnector)]
        if (self._produces or self._consumes) and any(other._produces or other._consumes for other in others):
            raise ConfigError("transfer", "may be true for one connector of a MultiConnector only")
        self._head_groups = stored_head_groups(vllm_config, self._settings)
        check_supported(vllm_config, kv_cache_config, self._head_groups)
        _, self._hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
        draft = vllm_config.speculative_config is not None and vllm_config.speculative_config.use_eagle()
        self._groups = read_groups(kv_cache_config.kv_cache_groups, self._hash_tokens, draft=draft)
        self._block_tokens = self._groups.block_tokens
        self._facts: frozenset[RankFacts] = frozenset()
        self._resets = 0
        self._in_step = vllm_config.parallel_config.data_parallel_size > 1 and vllm_config.model_config.is_moe
        if not self._in_step:  # there, naps would hold up what all ranks compute
            install()
        if role == KVConnectorRole.SCHEDULER:
            self._outer_config = self._kv_transfer_config if multi is None else multi._kv_transfer_config
            _recompute_on_failure(self._outer_config)
            # Kept, because a dropped handle of a running process warns; the kernel ends it with this process.
            self._node_process = autostart(self._settings, vllm_config.parallel_config.local_world_size)
            self.scheduler = self._make_scheduler(vllm_config)
        else:
            if current_platform.is_cpu():
                run_threads_on(free_cpus())  # before any of them is started
            self.worker = self._make_worker(vllm_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A pool is best effort: a save that is dropped is a miss later."""
        return False

    def shutdown(self) -> None:
        """Stop threads and leave the pool."""
        self._side.close()

    @property
    def _side(self) -> SchedulerSide | WorkerSide:
        return self.scheduler if self._role == KVConnectorRole.SCHEDULER else self.worker

    # ---- scheduler ----

    def _loads_sync(self, vllm_config: Any) -> bool:
        """Whether loads are for the step that plans them; not where a failed one would be known too late."""
        if self._settings.load_async and not self._settings.use_layerwise:
            return False
        late = {
            "async_scheduling": vllm_config.scheduler_config.async_scheduling,
            "pipeline_parallel_size above 1": vllm_config.parallel_config.pipeline_parallel_size > 1,
            "sliding windows or chunks": not self._groups.prefixes_help,
            # vLLM leaves these out only for a use_layerwise in the extra config, which it reads itself.
            "graphs of whole models": self._settings.use_layerwise
            and vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
        }
        reasons = [name for name, there in late.items() if there]
        if reasons:
            logger.warning(
                "kvpool: loads are asynchronous and whole in spite of load_async and use_layerwise: with %s the engine "
                "would go on from blocks that failed to load before it hears of it",
                " and ".join(reasons),
            )
        return not reasons

    def _make_scheduler(self, vllm_config: Any) -> SchedulerSide:
        self._fields = namespace_fields(vllm_config, self._head_groups)
        self._client = connect(self._settings, f"vllm {self._kv_transfer_config.engine_id} scheduler")
        role = role_of(self._kv_transfer_config.kv_role, self._settings)
        said = announce.facts(vllm_config, self._outer_config.kv_role, self._settings, sys.argv)
        moves = self._produces or self._consumes
        layerwise = moves and self._settings.use_layerwise
        self._client.announce_engine(**said, loads=role.loads, transfers=moves, layerwise=layerwise)
        return SchedulerSide(
            self._client,
            self._settings,
            self._namespaces,
            role=role,
            groups=self._groups,
            ranks=vllm_config.parallel_config.world_size,
            sync=self._loads_sync(vllm_config),
            engine=Engine(
                self._produces,
                self._consumes,
                self._kv_transfer_config.engine_id,
                vllm_config.parallel_config.tensor_parallel_size,
                self._in_step,
            ),
        )

    def _namespaces(self) -> list[Namespace] | None:
        """Return the namespace of each KV cache group; None until the workers have said how they hold KV.

        And from then on, if that cannot be stored.
        """
        if not self._facts:
            return None
        fingerprint = hash_fingerprint(self._vllm_config, self._hash_tokens)
        namespaces = agreed_namespaces(self._fields, self._groups, self._facts, fingerprint)
        if namespaces is None:
            self._facts = frozenset()
            return None
        for namespace in namespaces:
            logger.info("kvpool: namespace %s: %s", namespace.digest.hex(), namespace)
        self._client.announce_engine(namespaces=[namespace.digest for namespace in namespaces])
        return namespaces

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Take the block pool, in whose blocks saves hold references, and whose events tell what the engine holds."""
        self.scheduler.bind_block_pool(gpu_block_pool)
        watch, config = self.scheduler.watch, self._vllm_config.kv_events_config
        if config is not None and config.enable_kv_cache_events:
            watch.events = PoolEvents(vllm_events(), self._block_tokens)
        if self._settings.report_residency:
            gpu_block_pool.enable_kv_cache_events = True  # where nobody listens, vLLM throws them away each step
        if gpu_block_pool.enable_kv_cache_events:
            watch.report_residency(self._groups.main)
            self._client.announce_engine(residency=True)

    @_harmless(None)
    def on_new_request(self, request: Request) -> None:
        """Begin a request."""
        self.scheduler.track(request)

    @_harmless((0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens the pool can load, asynchronously; None while the lookup runs."""
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load into the request's blocks."""
        self.scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return this step's loads and saves."""
        state = scheduler_output.kv_connector_block_state
        meta = self.scheduler.build_meta(scheduler_output.num_scheduled_tokens, state.get_block_ids)
        nap_for(meta.wait_s)
        return meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the workers' reports."""
        meta = connector_output.kv_connector_worker_meta
        if meta is not None and meta.facts:
            self._facts = meta.facts
        self.scheduler.worker_report(meta, connector_output.finished_recving or ())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As below, where the engine does without groups."""
        return self.request_finished_all_groups(request, (block_ids,))

    @_harmless((False, None))
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """End the request; saves hold blocks by reference, so the engine may free its own at once."""
        # Its one token may be one that ends an answer: the other engine chooses its own.
        whole = request.status in {RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED}
        return False, self.scheduler.finished(request, block_ids, handed_over=whole)

    @_harmless(())
    def take_events(self) -> list[Any]:
        """Return what was stored in the pool, or found gone, since the last call."""
        return self.scheduler.watch.take_events()

    def has_pending_push_work(self) -> bool:
        """Whether the engine has to keep stepping so that saved blocks are let go of."""
        return self.scheduler.saving

    def reset_cache(self) -> bool:
        """Leave everything behind that was stored so far: other weights may be in the engine by now."""
        if self._role == KVConnectorRole.SCHEDULER:
            self._resets += 1
            since = f"+reset-{RUN}-{self._kv_transfer_config.engine_id}-{self._resets}"
            self._fields["revision"] = self._fields["revision"].partition("+reset-")[0] + since
            self.scheduler.forget_namespace()
        return True

    # ---- both ----

    @_harmless(None)
    def get_kv_connector_stats(self) -> KVPoolStats | None:
        """Return what was counted since the last call; the scheduler's side is asked at the end of each step."""
        scheduler = self._role == KVConnectorRole.SCHEDULER
        data = self.scheduler.step_ended() if scheduler else self.worker.stats()
        return None if data is None else KVPoolStats(data=data)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVPoolStats:
        """Return stats, in the process that logs."""
        return KVPoolStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVPoolPromMetrics:
        """Return what the stats are to vLLM's ``/metrics``."""
        return KVPoolPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- worker ----

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether layers are waited for one by one, which a graph of all of them would not do."""
        return bool(extra_config.get("use_layerwise"))

    def _make_worker(self, vllm_config: Any) -> WorkerSide:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        if vllm_config.device_config.device_type == "cpu":
            # A first forward of one or two tokens, as after a full hit, runs AMX tiles before the kernel
            # has been asked for permission, and dies of SIGILL.
            torch.cpu._init_amx()
        place = place_of(
            total_kv_heads(vllm_config.model_config),
            vllm_config.parallel_config.tensor_parallel_size,
            get_tp_group().rank_in_group,
            get_pp_group().rank_in_group,
            self._head_groups,
        )
        self._shards = place.shards
        client = connect(self._settings, f"vllm {self._kv_transfer_config.engine_id} worker {place.shard}")
        return WorkerSide(client, self._settings, place)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the KV tensors; raise InvalidArgumentError for layouts without whole blocks."""
        layers = self._vllm_config.compilation_config.static_forward_context
        memory, facts = [], []
        for group in self._groups.all:
            # Layers that share the cache of another one are named beside it.
            own = {kv_caches[name].data_ptr(): name for name in reversed(group.layers)}
            caches = {name: kv_caches[name] for name in own.values()}
            kv = KVBlocks(caches, self._kv_cache_config.num_blocks, group.heads)
            backend = layers[kv.names[0]].get_attn_backend().get_name()
            memory.append(kv)
            shard = kv.split(self._shards)[0]
            facts.append(GroupFacts(len(kv), shard.layer_block_bytes, f"{backend}:{kv.layout}"))
        isa = _isa(self._vllm_config, self._block_tokens)
        self.worker.attach(memory, RankFacts(tuple(facts), isa), open_device(memory))

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Begin a step, before its forward."""
        super().bind_connector_metadata(connector_metadata)
        nap_for(self._step().wait_s)
        self.worker.begin_step(self._step())

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ARG002 -- vLLM's
        """Start this step's loads; those that its forward needs are there, or failed, when their layer begins."""
        self.worker.start_loads(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for the layer where blocks of the running forward are loaded layer by layer."""
        self.worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,  # noqa: ARG002 -- vLLM's
        attn_metadata: Any,  # noqa: ARG002 -- vLLM's
        **kwargs: Any,  # noqa: ARG002 -- vLLM's
    ) -> None:
        """Return at once; the layer is saved meanwhile where another engine waits for it, with ``use_layerwise``."""
        self.worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """Start this step's saves, whose KV is in memory now; wait for none."""
        self.worker.start_saves(self._step())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return the requests whose load ended, aborted ones included, and those whose blocks cannot be named."""
        if wait_s := self._step().wait_s:
            self.worker.wait_for_progress(wait_s)
        finished, failed = self.worker.finished_loads(finished_req_ids)
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that the loads just reported left unfilled."""
        return self.worker.failed_blocks()

    def build_connector_worker_meta(self) -> WorkerMeta | None:
        """Return what ended, for the scheduler's side."""
        report = self.worker.report()
        if report is not None and (report.loaded or report.saved):
            nap_for(0.0)  # the next step may be what was waited for
        return report

    def _step(self) -> StepMeta:
        meta: StepMeta = self._get_connector_metadata()
        return meta


# Under the names of other stores' connectors, for configurations that give this module as kv_connector_module_path.
AscendStoreConnector = MooncakeConnectorStoreV1 = MooncakeStoreConnector = UCMConnector = KVPoolConnector
MooncakeConnectorV1 = LLMDataDistCMgrConnector = KVPoolConnector
