"""Other systems' files and what their keys are here: Mooncake's ``mooncake.json``, UCM's YAML.

Both functions raise ConfigError for a key that neither that system nor kvpool has.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpool.errors import ConfigError


def no_such_setting(name: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """Return what is wrong with a name that is not among those known."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"no such setting; did you mean {spell(near[0])}?" if near else "no such setting"


# ---- mooncake.json ---------------------------------------------------------------------------------

MOONCAKE_TO_KVPOOL = {
    "master_server_address": "master",
    "global_segment_size": "segment_size",
    "local_hostname": "advertise_host",
}
KVPOOL_TO_MOONCAKE = {ours: theirs for theirs, ours in MOONCAKE_TO_KVPOOL.items()}
# Its other keys: transports, a metadata server and a second storage stack, none of which exist here.
MOONCAKE_IGNORED = frozenset({
    "check_server", "client_server_address", "cluster_id", "decode_url", "device_name", "enable_offload",
    "enable_ssd_offload", "local_buffer_size", "master_metrics_port", "metadata_backend", "metadata_server",
    "preferred_segment", "prefill_url", "protocol", "replica_num", "ssd_offload_path", "standalone_storage",
    "storage_root_dir", "tenant_id", "transfer_timeout", "use_ascend_direct",
})  # fmt: skip
MOONCAKE_SIGNS = frozenset({"master_server_address", "metadata_server", "global_segment_size", "local_hostname"})


def from_mooncake(content: Mapping[str, Any], path: str, notes: list[str]) -> dict[str, Any]:
    """Return our settings for those of a ``mooncake.json``."""
    translated: dict[str, Any] = {}
    ignored = []
    for key, value in content.items():
        if key in MOONCAKE_TO_KVPOOL:
            translated[MOONCAKE_TO_KVPOOL[key]] = _mooncake_value(key, value)
        elif key in MOONCAKE_IGNORED:
            ignored.append(key)
        else:
            raise ConfigError(key, f"{no_such_setting(key, MOONCAKE_IGNORED | set(MOONCAKE_TO_KVPOOL))} (from {path})")
    if ignored:
        notes.append(f"{path}: these Mooncake keys mean nothing here: {', '.join(sorted(ignored))}")
    return translated


def _mooncake_value(key: str, value: Any) -> Any:
    if value == "":
        return None
    if key == "local_hostname" and isinstance(value, str) and re.fullmatch(r"[^:]+:\d+|\[.*\]:\d+", value):
        return value.rpartition(":")[0].strip("[]")  # a port of its transport, which we do not have
    return value


# ---- UCM -------------------------------------------------------------------------------------------

UCM_STORES = "ucm_connectors"
UCM_NAME, UCM_STORE = "ucm_connector_name", "ucm_connector_config"
UCM_SIGNS = frozenset({UCM_STORES, UCM_STORE, UCM_NAME})

UCM_TO_KVPOOL = {
    "use_layerwise": ("use_layerwise",),
    "persist_token_threshold": ("save_min_tokens", "load_min_tokens"),
    "timeout_ms": ("transfer_timeout",),
    "store_pipeline": ("pipeline",),
    "storage_backends": ("storage_backends",),
    "cache_buffer_capacity_gb": ("cache_buffer_capacity_gb",),
    "posix_capacity_gb": ("storage_capacity",),
    "posix_data_trans_concurrency": ("storage_threads",),
    "io_direct": ("storage_direct",),
    "use_direct": ("storage_direct",),
}
"""Of UCM's file and of its stores' settings within; the values are the same but for those in ``_ucm_value``."""

_QUEUES = "save_queue_blocks, load_threads and save_threads bound what waits and what runs"

UCM_IGNORED = {
    UCM_NAME: "kvpool is the store, whatever stood here",
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
    "posix_io_engine": "a node's threads read and write the files",
    "use_gdr": "copies go through the host's memory",
    "share_buffer_enable": "the ranks of a host share its node",
    "store_health": "the breaker is always on",
    "stream_number": _QUEUES,
    "cache_stream_number": _QUEUES,
    "waiting_queue_depth": _QUEUES,
    "running_queue_depth": _QUEUES,
}


@dataclass(slots=True)
class FromUCM:
    """What UCM's keys are here: our settings with the key each came from, keys of no effect with the reason."""

    taken: dict[str, tuple[Any, str]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    """Keys that are none of UCM's, outside of its stores' settings."""

    def take(self, content: Mapping[str, Any], source: str, *, inside: bool = False) -> None:
        """Take a mapping's keys; ``inside`` the settings of a store all of them must be UCM's."""
        for key, value in content.items():
            if key in UCM_TO_KVPOOL:
                for name in UCM_TO_KVPOOL[key]:
                    self.taken[name] = (_ucm_value(key, value), key)
            elif key in UCM_IGNORED:
                self.ignored[key] = UCM_IGNORED[key]
            elif key == UCM_STORE:
                self.take(_mapping(key, value, source), source, inside=True)
            elif key == UCM_STORES:
                if not isinstance(value, list):
                    raise ConfigError(key, f"must be a list of stores (from {source})")
                for store in value:
                    self.take(_mapping(key, store, source), source, inside=True)
            elif inside:
                raise ConfigError(str(key), f"{no_such_setting(str(key), UCM_KEYS)} (from {source})")
            else:
                self.rest[key] = value


UCM_KEYS = frozenset((*UCM_TO_KVPOOL, *UCM_IGNORED, UCM_STORES, UCM_STORE))


def from_ucm(content: Mapping[str, Any], path: str, notes: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return our settings for those of a UCM file, and their keys there; ours may stand beside them, and win."""
    found = FromUCM()
    found.take(content, path)
    if found.ignored:
        notes.append(f"{path}: these UCM keys mean nothing here: {', '.join(sorted(found.ignored))}")
    taken = {name: each for name, each in found.taken.items() if name not in found.rest}
    values = {name: value for name, (value, _) in taken.items()} | found.rest
    return values, {name: key for name, (_, key) in taken.items()}


def _ucm_value(key: str, value: Any) -> Any:
    if key == "posix_capacity_gb" and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            return value  # refused with the other values that are no size
        return round(value * (1 << 30)) or None  # 0: no limit was asked for
    if key in {"io_direct", "use_direct"} and isinstance(value, bool):
        return "auto" if value else "off"
    return value


def _mapping(key: str, value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(key, f"must hold names and values, not {value!r} (from {source})")
    return value
