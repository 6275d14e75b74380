"""Settings of other KV stores: what each of their keys is here, or why it means nothing.

Upstream: AscendStoreConnector, MooncakeConnectorV1 and LLMDataDistCMgrConnector of vllm-ascend, Mooncake's
``mooncake.json``, UCM's YAML, vLLM's ``KVTransferConfig``.
"""

from __future__ import annotations

import dataclasses
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
from kvpool.config_foreign import UCM_IGNORED, UCM_KEYS, UCM_NAME, FromUCM
from kvpool.errors import ConfigError

SOURCE = "kv_connector_extra_config"

STORES = ("AscendStoreConnector", "MooncakeConnectorStoreV1", "MooncakeStoreConnector", "UCMConnector")
"""Other stores' connectors."""

MOVERS = ("MooncakeConnectorV1", "LLMDataDistCMgrConnector")
"""Connectors that move prompts from prefilling to decoding engines."""

NAMES = (*STORES, *MOVERS)
"""Under all of which this connector is known too."""

MODULES = (
    "ucm.integration.vllm.ucm_connector",
    "vllm_ascend.distributed.kv_transfer.kv_pool.ascend_store.ascend_store_connector",
    "vllm_ascend.distributed.llmdatadist_c_mgr_connector",
    "vllm_ascend.distributed.mooncake_connector",
)
"""What configurations name as ``kv_connector_module_path`` to get one of those."""

_MEMORY = "kvpool-node --segment_size says how much memory the pool has"
_GEOMETRY = "engines with other parallelism find each other's blocks by the namespace"
_NO_PORT = "the scheduler asks the master itself; the engine opens no port"
_NO_RANK_TABLE = "the master knows where engines and nodes are"

EXTRA_IGNORED = {
    "backend": UCM_IGNORED[UCM_NAME],
    "lookup_rpc_port": _NO_PORT,
    "mooncake_rpc_port": _NO_PORT,
    "register_buffer": "memory is registered where that is possible",
    "prefill_pp_size": _GEOMETRY,
}
"""Of ``kv_connector_extra_config``."""

SIDES = ("prefill", "decode")
"""Sizes of the engines that do one part, of ``kv_connector_extra_config`` too; their TP matters here."""

UCM_FILE = "UCM_CONFIG_FILE"
"""Names UCM's file; what such a file says may stand in ``kv_connector_extra_config`` too."""

ENVIRONMENT_HONOURED = {
    "ASCEND_CONNECT_TIMEOUT": "connect_timeout",
    "ASCEND_TRANSFER_TIMEOUT": "transfer_timeout",
}
"""Milliseconds there and here."""
ENVIRONMENT_IGNORED = {
    "ASCEND_BUFFER_POOL": "the buffers on the device have a fixed size",
    "DISAGGREGATED_PREFILL_RANK_TABLE_PATH": _NO_RANK_TABLE,
    "DISAGGREGATED_PREFILL_RANK_ID": _NO_RANK_TABLE,
    "VLLM_LLMDD_RPC_IP": _NO_PORT,
    "VLLM_LLMDD_RPC_PORT": _NO_PORT,
    "VLLM_ASCEND_LLMDD_RPC_PORT": _NO_PORT,
}

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
    """Our settings from ``kv_connector_extra_config``, those from elsewhere with their origin, and what to log.

    ``origins``: the keys of others that flags were translated from.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ignore(self, key: str, reason: str, source: str) -> None:
        """Note a key that has no effect."""
        self.notes.append(f"{source}: {key} is not used: {reason}")

    def translated(self, name: str, value: Any, key: str) -> None:
        """Take what another store's key in ``kv_connector_extra_config`` is here; our own name for it wins."""
        if self.flags.get(name) is None:
            self.flags[name], self.origins[name] = value, f"{SOURCE}: {key}"

    def take(self, found: FromUCM, source: str) -> None:
        """Take what UCM's keys are here."""
        for name, (value, key) in found.taken.items():
            if source == SOURCE:
                self.translated(name, value, key)
            else:
                self.foreign[name] = (value, f"{source}: {key}")
        for key, reason in found.ignored.items():
            self.ignore(key, reason, source)


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
    for key in [key for key in extra if key in _OURS or key in EXTRA_IGNORED]:
        if key in _OURS:
            result.flags[key] = extra.pop(key)
        else:
            result.ignore(key, EXTRA_IGNORED[key], SOURCE)
            del extra[key]
    for side in SIDES:
        if side in extra:
            _sizes(side, extra.pop(side), result)
    found = FromUCM()
    found.take(extra, SOURCE)
    for key in found.rest:
        known = {*_OURS, *EXTRA_IGNORED, *SIDES, *_MOONCAKE, *UCM_KEYS, UCM_FILE}
        raise ConfigError(key, f"{no_such_setting(key, known)} (from {SOURCE})")
    result.take(found, SOURCE)
    return result


def _sizes(side: str, sizes: Any, result: Translated) -> None:
    if not isinstance(sizes, dict):
        raise ConfigError(side, f'must be an object as {{"tp_size": 2}}, not {sizes!r} (from {SOURCE})')
    for key, value in sizes.items():
        if key == "tp_size":
            result.translated(f"{side}_tp_size", value, f"{side}.tp_size")
        else:
            result.ignore(f"{side}.{key}", _GEOMETRY, SOURCE)


def _ucm_file(path: str, result: Translated) -> None:
    try:
        content = read_file(path)
    except ConfigError as error:
        raise ConfigError(UCM_FILE, error.problem) from None
    found = FromUCM()
    found.take(content, path)
    for key, value in found.rest.items():
        if key not in _OURS:  # settings of ours may stand beside UCM's, as in a node's file
            raise ConfigError(key, f"{no_such_setting(key, UCM_KEYS | _OURS)} (from {path})")
        result.foreign[key] = (value, path)
    result.take(found, path)


def _given(transfer_config: Any, key: str) -> bool:
    """Whether a key of vLLM's own has another value than vLLM's default."""
    value = getattr(transfer_config, key, None)
    for item in dataclasses.fields(transfer_config) if dataclasses.is_dataclass(transfer_config) else ():
        if item.name == key:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            return bool(value != default)
    return value is not None
