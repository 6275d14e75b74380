"""The connector's settings: a client's, and a few of its own, from ``kv_connector_extra_config``."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from kvpool.config import TEXT, ClientSettings, count, load, setting
from kvpool.errors import ConfigError
from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from kvpool.client import Client

logger = logging.getLogger(LOGGER_NAME)

SOURCE = "kv_connector_extra_config"


@dataclass(frozen=True, kw_only=True)
class ConnectorSettings(ClientSettings):
    """Settings of the connector; durations are milliseconds."""

    load_threads: int = setting(2, count(1, 64), "Requests loaded at once.")
    save_threads: int = setting(1, count(1, 64), "Requests saved at once.")
    client_factory: str = setting(
        "kvpool_vllm.settings:make_client", TEXT, "MODULE:FUNCTION that makes the client; tests inject a faulty one."
    )


def read_settings(extra: Mapping[str, Any]) -> ConnectorSettings:
    """Return the checked settings; raise ConfigError naming the nearest known one for an unknown key."""
    loaded = load(ConnectorSettings, flags=extra, flags_from=SOURCE)
    if loaded.settings.autostart_node:
        raise ConfigError("autostart_node", "the connector starts no node so far; run kvpool-node on this host")
    for note in loaded.notes:
        logger.info("%s", note)
    return loaded.settings


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
