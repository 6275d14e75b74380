"""Settings of other KV stores: what each of their keys is here, or why it means nothing.

Upstream: AscendStoreConnector of vllm-ascend, Mooncake's ``mooncake.json``, UCM's YAML, vLLM's ``KVTransferConfig``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpool.config import (
    MOONCAKE_IGNORED,
    MOONCAKE_TO_KVPOOL,
    ConnectorSettings,
    foreign_environment,
    from_mooncake,
    no_such_setting,
    read_file,
)
from kvpool.errors import ConfigError

SOURCE = "kv_connector_extra_config"

NAMES = ("AscendStoreConnector", "MooncakeConnectorStoreV1", "MooncakeStoreConnector", "UCMConnector")
"""Other stores' connectors, under whose names this one is known too."""

MODULES = (
    "ucm.integration.vllm.ucm_connector",
    "vllm_ascend.distributed.kv_transfer.kv_pool.ascend_store.ascend_store_connector",
)
"""What configurations name as ``kv_connector_module_path`` to get one of those."""

_FILES = "blocks are kept in the memory of kvpool-node; an engine names no files"
_MEMORY = "kvpool-node --segment_size says how much memory the pool has"
_GEOMETRY = "engines with other parallelism find each other's blocks by the namespace"
_QUEUES = "save_queue_blocks, load_threads and save_threads bound what waits and what runs"
_NO_PORT = "the scheduler asks the master itself; the engine opens no port"
_NO_TRANSFER = "this is a store; prefill and decode meet in the pool"

EXTRA_IGNORED = {
    "backend": "kvpool is the store, whatever stood here",
    "lookup_rpc_port": _NO_PORT,
    "mooncake_rpc_port": _NO_PORT,
    "register_buffer": "memory is registered where that is possible",
    "prefill_tp_size": _GEOMETRY,
    "decode_tp_size": _GEOMETRY,
    "prefill_pp_size": _GEOMETRY,
    "prefill": _NO_TRANSFER,
    "decode": _NO_TRANSFER,
}
"""Of ``kv_connector_extra_config``."""

UCM_HONOURED = {
    "use_layerwise": ("use_layerwise",),
    "persist_token_threshold": ("save_min_tokens", "load_min_tokens"),
    "timeout_ms": ("transfer_timeout",),
}
UCM_IGNORED = {
    "enable_event_sync": "copies are always ordered behind the kernels that write",
    "hit_ratio": "hits are not made fewer for benchmarks",
    "load_tokens_threshold": "the gate decides which loads are worth it",
    "load_only_first_rank": "heads that ranks share are stored once",
    "use_lite": "the pool is in use; kvpoolctl shows its hits",
    "enable_metrics": "metrics are part of vLLM's own",
    "metrics_config_path": "metrics are part of vLLM's own",
    "enable_record_traces": "requests are not recorded",
    "use_inference_duration_monitor": "the gate measures the engine's speed anyway",
    "wa_dump_block_wise": "whole blocks are saved as they fill",
    "ucm_sparse_config": "attention is the engine's matter",
    # of a ucm_connector_config
    "store_pipeline": _FILES,
    "storage_backends": _FILES,
    "posix_capacity_gb": _FILES,
    "posix_io_engine": _FILES,
    "posix_data_trans_concurrency": _FILES,
    "io_direct": _FILES,
    "use_direct": _FILES,
    "use_gdr": "copies go through the host's memory",
    "cache_buffer_capacity_gb": _MEMORY,
    "share_buffer_enable": "the ranks of a host share its node",
    "store_health": "the breaker is always on",
    "stream_number": _QUEUES,
    "cache_stream_number": _QUEUES,
    "waiting_queue_depth": _QUEUES,
    "running_queue_depth": _QUEUES,
}
"""Of UCM's file, of its stores' settings within, and of the same written in ``kv_connector_extra_config``."""

UCM_FILE = "UCM_CONFIG_FILE"
UCM_STORES = "ucm_connectors"
UCM_NAME, UCM_STORE = "ucm_connector_name", "ucm_connector_config"

ENVIRONMENT_HONOURED = {
    "ASCEND_CONNECT_TIMEOUT": "connect_timeout",
    "ASCEND_TRANSFER_TIMEOUT": "transfer_timeout",
}
"""Milliseconds there and here."""
ENVIRONMENT_IGNORED = {"ASCEND_BUFFER_POOL": "the buffers on the device have a fixed size"}

TOP_LEVEL_IGNORED = {
    "kv_port": _NO_PORT,
    "kv_buffer_device": "KV goes straight between the engine's memory and the pool's",
    "enable_permute_local_kv": "blocks are stored as the engine holds them",
}
"""Of vLLM's ``KVTransferConfig``; ``engine_id`` is honoured: the pool knows the engine by it."""

TOP_LEVEL_REMOVED = {
    "kv_parallel_size": "engines join and leave the pool as they like",
    "kv_rank": "engines join and leave the pool as they like",
    "kv_ip": "the setting master says where the pool is",
    "kv_buffer_size": _MEMORY,
}
"""Of older versions of it; today's vLLM refuses them."""

_OURS = frozenset(item.name for item in dataclasses.fields(ConnectorSettings))
_MOONCAKE = frozenset((*MOONCAKE_IGNORED, *MOONCAKE_TO_KVPOOL)) - _OURS


@dataclass(slots=True)
class Translated:
    """Our settings from ``kv_connector_extra_config``, those from elsewhere with their origin, and what to log."""

    flags: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ignore(self, key: str, reason: str, source: str) -> None:
        """Note a key that has no effect."""
        self.notes.append(f"{source}: {key} is not used: {reason}")

    def take(self, key: str, value: Any, ours: Iterable[str], source: str) -> None:
        """Take a key's value for our settings."""
        for name in ours:
            self.foreign[name] = (value, f"{source}: {key}")


def translate(transfer_config: Any) -> Translated:
    """Return what a ``KVTransferConfig`` and other systems' variables say; raise ConfigError for unknown keys."""
    result = Translated()
    extra = dict(transfer_config.kv_connector_extra_config or {})
    for key, reason in TOP_LEVEL_IGNORED.items():
        if _given(transfer_config, key):
            result.ignore(key, reason, "kv-transfer-config")
    is_ucm = transfer_config.kv_connector == "UCMConnector"
    path = extra.pop(UCM_FILE, None) or (foreign_environment([UCM_FILE]).get(UCM_FILE) if is_ucm else None)
    if path is not None:
        _ucm_file(str(path), result)
    for name, value in foreign_environment([*ENVIRONMENT_HONOURED, *ENVIRONMENT_IGNORED]).items():
        if name in ENVIRONMENT_HONOURED:
            result.foreign[ENVIRONMENT_HONOURED[name]] = (value, name)
        else:
            result.ignore(name, ENVIRONMENT_IGNORED[name], "environment")
    mooncake = {key: extra.pop(key) for key in sorted(_MOONCAKE & extra.keys())}
    result.flags.update(from_mooncake(mooncake, SOURCE, result.notes))
    for key, value in extra.items():
        _extra_key(key, value, result)
    return result


def _extra_key(key: str, value: Any, result: Translated) -> None:
    if key in _OURS:
        result.flags[key] = value
    elif key in EXTRA_IGNORED:
        result.ignore(key, EXTRA_IGNORED[key], SOURCE)
    elif not _ucm_key(key, value, result, SOURCE):
        known = {*_OURS, *EXTRA_IGNORED, *_MOONCAKE, *_UCM_KEYS, UCM_FILE}
        raise ConfigError(key, f"{no_such_setting(key, known)} (from {SOURCE})")


_UCM_KEYS = frozenset((*UCM_HONOURED, *UCM_IGNORED, UCM_STORES, UCM_NAME, UCM_STORE))


def _ucm_file(path: str, result: Translated) -> None:
    try:
        content = read_file(path)
    except ConfigError as error:
        raise ConfigError(UCM_FILE, error.problem) from None
    _ucm_mapping(content, result, path)


def _ucm_mapping(content: Mapping[str, Any], result: Translated, source: str) -> None:
    for key, value in content.items():
        if not _ucm_key(key, value, result, source):
            raise ConfigError(str(key), f"{no_such_setting(str(key), _UCM_KEYS)} (from {source})")


def _ucm_key(key: str, value: Any, result: Translated, source: str) -> bool:
    """Take one key of UCM's; return whether it is one."""
    if key in UCM_HONOURED:
        result.take(key, value, UCM_HONOURED[key], source)
    elif key in UCM_IGNORED:
        result.ignore(key, UCM_IGNORED[key], source)
    elif key == UCM_NAME:
        result.ignore(key, EXTRA_IGNORED["backend"], source)
    elif key == UCM_STORE:
        _ucm_mapping(_mapping(key, value, source), result, source)
    elif key == UCM_STORES:
        if not isinstance(value, list):
            raise ConfigError(key, f"must be a list of stores (from {source})")
        for store in value:
            _ucm_mapping(_mapping(key, store, source), result, source)
    else:
        return False
    return True


def _mapping(key: str, value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(key, f"must hold names and values, not {value!r} (from {source})")
    return value


def _given(transfer_config: Any, key: str) -> bool:
    """Whether a key of vLLM's own has another value than vLLM's default."""
    value = getattr(transfer_config, key, None)
    for item in dataclasses.fields(transfer_config) if dataclasses.is_dataclass(transfer_config) else ():
        if item.name == key:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            return bool(value != default)
    return value is not None
