"""Names and module paths that lead to the connector; with vLLM itself in the end-to-end tests."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from kvpool_vllm import LOGGER_NAME, plugin

UCM = "ucm.integration.vllm.ucm_connector"


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names as if vLLM had no MooncakeStoreConnector of its own; nothing is left behind."""
    monkeypatch.setattr(plugin, "_names", {"KVPoolConnector", "AscendStoreConnector", "UCMConnector"})
    monkeypatch.setattr(plugin, "_modules", {plugin.MODULE})
    monkeypatch.setattr(plugin, "_told", set())
    yield
    sys.modules.pop(UCM, None)


def test_a_module_path_leads_to_the_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very path can be imported and holds the connector's names; the package stays absent."""
    connector = ModuleType(plugin.MODULE)
    connector.UCMConnector = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, plugin.MODULE, connector)
    plugin._stand_in(UCM)
    module = importlib.import_module(UCM)
    assert module.UCMConnector is connector.UCMConnector
    with pytest.raises(AttributeError):
        _ = module.SomethingElse
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ucm")


def test_an_installed_package_is_never_shadowed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it lacks the module."""
    (tmp_path / "ucm").mkdir()
    (tmp_path / "ucm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin._stand_in(UCM)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(UCM)


def child(**config: Any) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [{"kv_connector": "P"}, config]},
    }


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"kv_connector": "KVPoolConnector"}, True),
        ({"kv_connector": "AscendStoreConnector"}, True),
        ({"kv_connector": "MooncakeStoreConnector"}, False),
        ({"kv_connector": "MooncakeStoreConnector", "kv_connector_module_path": "kvpool_vllm.connector"}, True),
        ({"kv_connector": "AscendStoreConnector", "kv_connector_module_path": "elsewhere"}, False),
        ({"kv_connector": "NixlConnector"}, False),
        ({}, False),
        (child(kv_connector="UCMConnector"), True),
        (child(kv_connector="NixlConnector"), False),
        (child(**child(kv_connector="UCMConnector")), True),
        ({"kv_connector": "MultiConnector", "kv_connector_extra_config": "nonsense"}, False),
        ({"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": "nonsense"}}, False),
    ],
)
def test_which_configurations_concern_us(config: dict[str, Any], ours: bool) -> None:
    """Those that name the connector, alone or inside MultiConnector; vLLM's own connectors stay vLLM's."""
    assert plugin.concerned(config) is ours


def test_keys_that_vllm_no_longer_has(caplog: pytest.LogCaptureFixture) -> None:
    """They are taken out of our configurations, with a reason said once, and left in others for vLLM to refuse."""
    caplog.set_level(logging.WARNING, LOGGER_NAME)
    ours = {"kv_connector": "KVPoolConnector", "kv_parallel_size": 1, "kv_port": 1}
    assert plugin._adapted(ours) == {
        "kv_connector": "KVPoolConnector",
        "kv_port": 1,
        "kv_load_failure_policy": "recompute",
    }
    plugin._adapted(ours)
    assert [record.message for record in caplog.records] == [
        "kvpool: kv-transfer-config: kv_parallel_size is not used: engines join and leave the pool as they like"
    ]
    others = {"kv_connector": "NixlConnector", "kv_parallel_size": 1}
    assert plugin._adapted(others) == others


def test_a_failure_policy_that_was_given_stays() -> None:
    """Ours is a default."""
    config = {"kv_connector": "KVPoolConnector", "kv_load_failure_policy": "fail"}
    assert plugin._adapted(config) == config
