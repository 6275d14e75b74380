"""The connector's settings: a client's, and its own, from ``--kv-transfer-config``."""

from __future__ import annotations

import importlib
import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from kvpool.config import AUTOSTARTED, ConnectorSettings, Loaded, load
from kvpool.errors import ConfigError
from kvpool_vllm import LOGGER_NAME
from kvpool_vllm.seeds import MOVERS, SOURCE, STORES, translate

if TYPE_CHECKING:
    from kvpool.client import Client

logger = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True, slots=True)
class Role:
    """What this engine does with the pool."""

    loads: bool
    saves: bool


def role_of(kv_role: str | None, settings: ConnectorSettings) -> Role:
    """Return the role; raise ConfigError for a ``kv_role`` that is none of vLLM's."""
    match kv_role:
        case "kv_both":
            return Role(loads=True, saves=True)
        case "kv_producer":
            return Role(loads=settings.producer_is_to_load, saves=True)
        case "kv_consumer":
            return Role(loads=settings.consumer_is_to_load, saves=settings.consumer_is_to_put)
    raise ConfigError("kv_role", f"must be kv_both, kv_producer or kv_consumer, not {kv_role!r}")


def transfer_roles(transfer_config: Any, settings: ConnectorSettings, number: int | None) -> tuple[bool, bool]:
    """Return whether this engine moves prompts to others, and takes them from others.

    ``number``: the connector's place inside ``MultiConnector``, None alone. There a prompt's parameters may come from
    one connector only: from the first, if it moves prompts at all.
    """
    name, kv_role = transfer_config.kv_connector, transfer_config.kv_role
    if settings.transfer == "auto":
        moves = name in MOVERS or (
            name not in STORES and (number is None or (number == 0 and kv_role in {"kv_producer", "kv_consumer"}))
        )
    else:
        moves = settings.transfer == "true"
    return moves and kv_role in {"kv_producer", "kv_both"}, moves and kv_role in {"kv_consumer", "kv_both"}


def read_settings(transfer_config: Any, number: int | None = None, *, tell: bool = True) -> ConnectorSettings:
    """Return the checked settings of a ``KVTransferConfig``; raise ConfigError for what is not understood.

    ``number`` as for ``transfer_roles``. ``tell`` logs, for one of an engine's processes, which keys have no effect
    and why.
    """
    translated = translate(transfer_config)
    loaded = load(
        ConnectorSettings, flags=translated.flags, flags_from=SOURCE, origins=translated.origins,
        foreign=translated.foreign,
    )  # fmt: skip
    role = role_of(transfer_config.kv_role, loaded.settings)
    if tell:
        for note in (*translated.notes, *loaded.notes, *_not_the_engines(loaded)):
            logger.info("kvpool: %s", note)
        if not role.loads and not any(transfer_roles(transfer_config, loaded.settings, number)):
            flag = "producer_is_to_load" if transfer_config.kv_role == "kv_producer" else "consumer_is_to_load"
            does = "saves, and does not load" if role.saves else "neither loads nor saves"
            logger.warning("kvpool: this %s %s; to load: %s", transfer_config.kv_role, does, flag)
    return loaded.settings


def _not_the_engines(loaded: Loaded[ConnectorSettings]) -> list[str]:
    """Say which settings are those of a node, where this engine starts none."""
    given = [name for name in AUTOSTARTED if loaded.sources[name] != "default"]
    if loaded.settings.autostart_node or not given:
        return []
    return [f"for kvpool-node, which this engine does not start (autostart_node): {', '.join(given)}"]


def autostart(settings: ConnectorSettings, ranks: int) -> subprocess.Popen[bytes] | None:
    """Start a node for this host if that is wanted and there is none; call it from the main thread."""
    if not settings.autostart_node:
        return None
    from kvpool.client_autostart import start_node

    return start_node(settings, ranks)


def make_client(settings: ConnectorSettings, name: str) -> Client:
    """Return a client of the pool; never fails because the pool is absent."""
    from kvpool.client import Client  # pulls in gRPC: only where a connector really starts

    return Client(
        settings.master,
        node=settings.node,
        checksum=settings.checksum,
        copy_threads=settings.copy_threads,
        lookup_timeout_ms=settings.lookup_timeout,
        transfer_timeout_ms=settings.transfer_timeout,
        connect_timeout_ms=settings.connect_timeout,
        breaker_failures=settings.breaker_failures,
        breaker_probe_interval_ms=settings.breaker_probe_interval,
        name=name,
    )


def connect(settings: ConnectorSettings, name: str) -> Client:
    """Return the client that ``client_factory`` makes; raise ConfigError where it names nothing callable."""
    module, _, function = settings.client_factory.partition(":")
    try:
        factory = cast("Callable[[ConnectorSettings, str], Client]", getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise ConfigError("client_factory", f"must be MODULE:FUNCTION, {settings.client_factory!r}: {error}") from error
    return factory(settings, name)
