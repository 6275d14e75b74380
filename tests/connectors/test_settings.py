"""Settings of the connector: what a role may do."""

from __future__ import annotations

import pytest

from kvpool.errors import ConfigError
from kvpool_vllm.settings import ConnectorSettings, Role, role_of

ALL = {"producer_is_to_load": True, "consumer_is_to_load": True, "consumer_is_to_put": True}


@pytest.mark.parametrize(
    ("kv_role", "flags", "loads", "saves"),
    [
        ("kv_both", {}, True, True),
        ("kv_both", dict.fromkeys(ALL, False), True, True),
        ("kv_producer", {}, False, True),
        ("kv_producer", {"producer_is_to_load": True}, True, True),
        ("kv_producer", {"consumer_is_to_load": True, "consumer_is_to_put": True}, False, True),
        ("kv_consumer", {}, False, False),
        ("kv_consumer", {"consumer_is_to_load": True}, True, False),
        ("kv_consumer", {"consumer_is_to_put": True}, False, True),
        ("kv_consumer", ALL, True, True),
    ],
)
def test_roles(kv_role: str, flags: dict[str, bool], loads: bool, saves: bool) -> None:
    """A producer saves, a consumer does what it is told, each flag concerns its own role alone."""
    assert role_of(kv_role, ConnectorSettings(**flags)) == Role(loads=loads, saves=saves)


@pytest.mark.parametrize("kv_role", [None, "", "both"])
def test_no_role(kv_role: str | None) -> None:
    """Without a role nobody guesses."""
    with pytest.raises(ConfigError, match="kv_role: must be kv_both, kv_producer or kv_consumer"):
        role_of(kv_role, ConnectorSettings())
