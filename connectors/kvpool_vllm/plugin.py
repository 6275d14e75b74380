"""Makes the connector known to vLLM; the entry point of group ``vllm.general_plugins``."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.seeds import MODULES, NAMES, TOP_LEVEL_REMOVED

logger = logging.getLogger(LOGGER_NAME)

NAME = "KVPoolConnector"
MODULE = "kvpool_vllm.connector"
_ASCEND = "vllm_ascend"

_names: set[str] = set()
"""Connector names that mean this connector in this process."""
_modules = {MODULE}
"""Module paths that hold it."""
_told: set[str] = set()
"""Keys that were named."""


def register() -> None:
    """Make ``kv_connector: KVPoolConnector`` and its aliases known, without importing the connector itself.

    vLLM calls this in each of its processes, some of which fork later: nothing here may start gRPC.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    # vllm-ascend registers its own under these names, and fails where somebody else came first.
    for name in (NAME,) if _installed(_ASCEND) else (NAME, *NAMES):
        try:
            KVConnectorFactory.register_connector(name, MODULE, NAME)
        except ValueError:
            continue  # vLLM's own, or a second call in this process
        _names.add(name)
    for path in MODULES:
        _stand_in(path)
    _adapt_transfer_config()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _stand_in(path: str) -> None:
    """Let this very module path lead here where its package is not installed; the package itself stays absent."""
    if path in sys.modules or _installed(path.partition(".")[0]):
        return

    def find(name: str) -> Any:
        if name not in {NAME, *NAMES}:
            raise AttributeError(name)
        return getattr(importlib.import_module(MODULE), name)

    module = ModuleType(path, f"Leads to {MODULE}: {path.partition('.')[0]} is not installed.")
    module.__getattr__ = find  # type: ignore[method-assign]
    sys.modules[path] = module
    _modules.add(path)


def _adapt_transfer_config() -> None:
    """Have vLLM's ``KVTransferConfig`` take what configurations that name this connector need.

    Keys that older versions of vLLM had would be refused, and a block that cannot be loaded would end its
    request in an error. Other connectors' configurations stay as they are.
    """
    from vllm.config.kv_transfer import KVTransferConfig

    if "__kvpool__" in KVTransferConfig.__dict__:
        return
    try:
        from pydantic_core import SchemaValidator, core_schema

        schema = core_schema.no_info_before_validator_function(_adapt, KVTransferConfig.__pydantic_core_schema__)
        KVTransferConfig.__pydantic_validator__ = SchemaValidator(schema)
        KVTransferConfig.__kvpool__ = True
    except Exception as error:  # vLLM's class is not what it was: its defaults are worse, and they work
        logger.warning("kvpool: vLLM's KVTransferConfig is left as it is: %r", error)


def _adapt(given: Any) -> Any:
    """Return what is to be checked instead of what was given: a mapping, or the arguments of a call."""
    from pydantic_core import ArgsKwargs

    if isinstance(given, ArgsKwargs):
        return ArgsKwargs(given.args, _adapted(given.kwargs or {})) if not given.args else given
    return _adapted(given) if isinstance(given, dict) else given


def _adapted(config: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(config)
    if not concerned(config):
        return result
    for key in TOP_LEVEL_REMOVED.keys() & result.keys():
        del result[key]
        if key not in _told:
            _told.add(key)
            # A warning, because vLLM parses its arguments before it configures logging: less would be lost.
            logger.warning("kvpool: kv-transfer-config: %s is not used: %s", key, TOP_LEVEL_REMOVED[key])
    result.setdefault("kv_load_failure_policy", "recompute")
    return result


def concerned(config: Mapping[str, Any]) -> bool:
    """Whether a ``--kv-transfer-config`` names this connector, alone or inside ``MultiConnector``."""
    path, name = config.get("kv_connector_module_path"), config.get("kv_connector")
    if path in _modules if path else name in _names:
        return True
    extra = config.get("kv_connector_extra_config")
    children = extra.get("connectors") if name == "MultiConnector" and isinstance(extra, Mapping) else None
    return isinstance(children, list) and any(isinstance(child, Mapping) and concerned(child) for child in children)
