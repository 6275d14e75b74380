"""Settings of the connector: whose keys mean what, and what a role may do."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from kvpool.config import MOONCAKE_IGNORED, MOONCAKE_TO_KVPOOL
from kvpool.config_foreign import UCM_KEYS
from kvpool.errors import ConfigError
from kvpool_vllm import LOGGER_NAME, seeds
from kvpool_vllm.settings import ConnectorSettings, Role, connect, read_settings, role_of, transfer_roles

FLAGS = ("producer_is_to_load", "consumer_is_to_load", "consumer_is_to_put")


@dataclass
class TransferConfig:
    """What the connector reads of vLLM's ``KVTransferConfig``, with vLLM's defaults."""

    kv_connector_extra_config: dict[str, Any] = field(default_factory=dict)
    kv_connector: str = "AscendStoreConnector"
    kv_role: str | None = "kv_both"
    engine_id: str = "7"
    kv_port: int = 14579
    kv_buffer_device: str = field(default_factory=lambda: "cpu")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_BUFFER_POOL", "ASCEND_CONNECT_TIMEOUT", "ASCEND_TRANSFER_TIMEOUT", "UCM_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MOONCAKE_CONFIG_PATH", raising=False)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, LOGGER_NAME)
    return lambda: [record.message.removeprefix("kvpool: ") for record in caplog.records if record.name == LOGGER_NAME]


@pytest.mark.parametrize(
    ("kv_role", "told", "loads", "saves"),
    [
        ("kv_both", (), True, True),
        ("kv_producer", (), False, True),
        ("kv_producer", ("producer_is_to_load",), True, True),
        ("kv_producer", ("consumer_is_to_load", "consumer_is_to_put"), False, True),
        ("kv_consumer", (), False, False),
        ("kv_consumer", ("consumer_is_to_load",), True, False),
        ("kv_consumer", ("consumer_is_to_put",), False, True),
        ("kv_consumer", ("producer_is_to_load",), False, False),
        ("kv_consumer", FLAGS, True, True),
    ],
)
def test_roles(kv_role: str, told: tuple[str, ...], loads: bool, saves: bool) -> None:
    """A producer saves, a consumer does what it is told, each flag concerns its own role alone."""
    assert role_of(kv_role, ConnectorSettings(**dict.fromkeys(told, True))) == Role(loads=loads, saves=saves)


def test_kv_both_heeds_no_flag() -> None:
    """The flags are for the other roles."""
    assert role_of("kv_both", ConnectorSettings(**dict.fromkeys(FLAGS, False))) == Role(loads=True, saves=True)


@pytest.mark.parametrize(
    ("name", "kv_role", "number", "transfer", "moves"),
    [
        ("KVPoolConnector", "kv_both", None, "auto", (True, True)),
        ("KVPoolConnector", "kv_producer", None, "auto", (True, False)),
        ("KVPoolConnector", "kv_consumer", None, "auto", (False, True)),
        ("KVPoolConnector", "kv_both", 0, "auto", (False, False)),
        ("KVPoolConnector", "kv_producer", 0, "auto", (True, False)),
        ("KVPoolConnector", "kv_consumer", 0, "auto", (False, True)),
        ("KVPoolConnector", "kv_producer", 1, "auto", (False, False)),
        ("MooncakeConnectorV1", "kv_producer", None, "auto", (True, False)),
        ("MooncakeConnectorV1", "kv_both", 1, "auto", (True, True)),
        ("LLMDataDistCMgrConnector", "kv_consumer", None, "auto", (False, True)),
        *((name, "kv_both", None, "auto", (False, False)) for name in seeds.STORES),
        ("UCMConnector", "kv_both", 1, True, (True, True)),
        ("KVPoolConnector", "kv_both", None, False, (False, False)),
        ("MooncakeConnectorV1", "kv_producer", None, "false", (False, False)),
    ],
)
def test_who_moves_prompts(
    name: str, kv_role: str, number: int | None, transfer: Any, moves: tuple[bool, bool]
) -> None:
    """By its name and its place, unless it is told; only ever what its role allows."""
    config = TransferConfig(kv_connector=name, kv_role=kv_role)
    assert transfer_roles(config, ConnectorSettings(transfer=transfer), number) == moves


def test_an_engine_that_moves_prompts_has_something_to_do(said: Callable[[], list[str]]) -> None:
    """A consumer of transfers need not be told how to load."""
    read_settings(TransferConfig(kv_connector="MooncakeConnectorV1", kv_role="kv_consumer"))
    assert said() == []


@pytest.mark.parametrize("kv_role", [None, "", "both"])
def test_without_a_role_nobody_guesses(kv_role: str | None) -> None:
    """The error names the three there are."""
    with pytest.raises(ConfigError, match="kv_role: must be kv_both, kv_producer or kv_consumer"):
        read_settings(TransferConfig(kv_role=kv_role))


@pytest.mark.parametrize(
    ("kv_role", "extra", "warned"),
    [
        ("kv_both", {}, None),
        ("kv_producer", {}, "this kv_producer saves, and does not load; to load: producer_is_to_load"),
        ("kv_producer", {"producer_is_to_load": True}, None),
        ("kv_consumer", {}, "this kv_consumer neither loads nor saves; to load: consumer_is_to_load"),
        ("kv_consumer", {"consumer_is_to_load": True}, None),
    ],
)
def test_an_engine_that_does_not_load_is_told_how(
    kv_role: str, extra: dict[str, Any], warned: str | None, said: Callable[[], list[str]]
) -> None:
    """Once, at start."""
    read_settings(TransferConfig(extra, kv_role=kv_role))
    assert said() == ([warned] if warned else [])


def test_own_keys() -> None:
    """A client's keys and the connector's own."""
    settings = read_settings(TransferConfig({"master": "10.0.0.1:50088", "load_threads": 3, "transfer_timeout": "2s"}))
    assert (settings.master, settings.load_threads, settings.transfer_timeout) == ("10.0.0.1:50088", 3, 2000)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("load_thread", "load_threads"),
        ("lookup_rcp_port", "lookup_rpc_port"),
        ("consumer_to_load", "consumer_is_to_load"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(key: str, near: str) -> None:
    """A typing error is no silent default, whosever key was meant."""
    with pytest.raises(ConfigError, match=rf"{key}: .*did you mean {near}\?.*kv_connector_extra_config"):
        read_settings(TransferConfig({key: 1}))


def test_a_wrong_value_names_its_key() -> None:
    """And where it came from."""
    with pytest.raises(ConfigError, match=r"use_layerwise: 'maybe' is not allowed.*from kv_connector_extra_config"):
        read_settings(TransferConfig({"use_layerwise": "maybe"}))


def test_keys_of_ascend_store(said: Callable[[], list[str]]) -> None:
    """All of them are accepted: those that mean something here work, each other is named once with the reason."""
    honoured = {
        "load_async": False,
        "use_layerwise": True,
        "consumer_is_to_put": True,
        "consumer_is_to_load": True,
        "save_decode_cache": True,
        "discard_partial_chunks": False,
        "layerwise_prefetch_layers": 3,
        "prefill_tp_size": 4,
        "decode_tp_size": 1,
    }
    named = {
        "backend": "mooncake",
        "lookup_rpc_port": "1",
        "mooncake_rpc_port": "0",
        "prefill_pp_size": 1,
        "register_buffer": True,
    }
    settings = read_settings(TransferConfig(honoured | named))
    assert {name: getattr(settings, name) for name in honoured} == honoured
    notes = said()
    assert [note.split(" is not used: ")[0] for note in notes] == [f"kv_connector_extra_config: {key}" for key in named]
    assert all(note.split(" is not used: ")[1] for note in notes)


def test_sizes_of_both_sides(said: Callable[[], list[str]]) -> None:
    """Of the seeds' ``prefill`` and ``decode`` the TP counts; what else they say is named."""
    sides = {"prefill": {"tp_size": 2, "dp_size": 4}, "decode": {"tp_size": 8}}
    settings = read_settings(TransferConfig(sides))
    assert (settings.prefill_tp_size, settings.decode_tp_size) == (2, 8)
    assert [note.split(" is not used: ")[0] for note in said()] == ["kv_connector_extra_config: prefill.dp_size"]
    assert read_settings(TransferConfig({**sides, "prefill_tp_size": 1})).prefill_tp_size == 1
    with pytest.raises(ConfigError, match="prefill: must be an object"):
        read_settings(TransferConfig({"prefill": 2}))
    with pytest.raises(ConfigError, match=r"decode_tp_size: 'x' .*from kv_connector_extra_config: decode.tp_size"):
        read_settings(TransferConfig({"decode": {"tp_size": "x"}}))


def test_keys_of_connectors_that_move_prompts(
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides' TP says how heads are stored; ports, DP and rank tables mean nothing here, and are named once."""
    monkeypatch.setenv("DISAGGREGATED_PREFILL_RANK_TABLE_PATH", "/ranktable.json")
    extra = {
        "use_ascend_direct": True,
        "prefill": {"dp_size": 4, "tp_size": "2"},
        "decode": {"dp_size": 4, "tp_size": 1},
    }
    settings = read_settings(TransferConfig(extra, "MooncakeConnectorV1", kv_port=28000))
    assert (settings.prefill_tp_size, settings.decode_tp_size) == (2, 1)
    named = [note.split(" is not used: ")[0].rpartition(": ")[2] for note in said() if " is not used: " in note]
    assert named == ["kv_port", "DISAGGREGATED_PREFILL_RANK_TABLE_PATH", "prefill.dp_size", "decode.dp_size"]
    with pytest.raises(ConfigError, match=r"prefill_tp_size: .*prefill\.tp_size"):
        read_settings(TransferConfig({"prefill": {"tp_size": "many"}}))


def test_others_keys_in_the_extra_config_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As our own there; others' variables do not."""
    monkeypatch.setenv("KVPOOL_PREFILL_TP_SIZE", "8")
    monkeypatch.setenv("KVPOOL_TRANSFER_TIMEOUT", "200")
    monkeypatch.setenv("ASCEND_TRANSFER_TIMEOUT", "9000")
    extra: dict[str, Any] = {"prefill": {"tp_size": 2}, "timeout_ms": 30_000}
    settings = read_settings(TransferConfig(extra))
    assert (settings.prefill_tp_size, settings.transfer_timeout) == (2, 30_000)
    assert read_settings(TransferConfig({**extra, "transfer_timeout": 7})).transfer_timeout == 7
    assert read_settings(TransferConfig()).transfer_timeout == 200


def test_only_one_process_of_an_engine_tells(said: Callable[[], list[str]]) -> None:
    """Sixteen ranks do not say the same sixteen times."""
    read_settings(TransferConfig({"backend": "mooncake"}, kv_role="kv_consumer"), tell=False)
    assert said() == []


def test_keys_of_mooncake_in_the_extra_config(said: Callable[[], list[str]]) -> None:
    """What a ``mooncake.json`` says may stand in the extra config; our own name for it wins."""
    mooncake = {"master_server_address": "10.0.0.1:50088", "global_segment_size": "2GB", "protocol": "ascend"}
    settings = read_settings(TransferConfig({**mooncake, "segment_size": "4GB"}))
    assert (settings.master, settings.segment_size) == ("10.0.0.1:50088", 4 << 30)
    assert said() == ["kv_connector_extra_config: these Mooncake keys mean nothing here: protocol"]


def test_mooncake_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """The file that ``MOONCAKE_CONFIG_PATH`` names is read; what the extra config says wins over it."""
    path = tmp_path / "mooncake.json"
    path.write_text(
        json.dumps(
            {
                "metadata_server": "P2PHANDSHAKE",
                "protocol": "ascend",
                "device_name": "",
                "master_server_address": "10.0.0.1:50088",
                "global_segment_size": 107374182400,
            }
        )
    )
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(path))
    settings = read_settings(TransferConfig())
    assert (settings.master, settings.segment_size) == ("10.0.0.1:50088", 100 << 30)
    assert said() == [f"{path}: these Mooncake keys mean nothing here: device_name, metadata_server, protocol"]
    assert read_settings(TransferConfig({"master": "10.0.0.2:1"})).master == "10.0.0.2:1"


class TestUCM:
    """A UCM file, named in the extra config or by the environment, or its content in the extra config."""

    FILE = """
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "/mnt/test1"
      cache_buffer_capacity_gb: 64
      timeout_ms: 30000
enable_event_sync: true
use_layerwise: true
persist_token_threshold: 512
"""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "ucm.yaml"
        path.write_text(self.FILE)
        return path

    def check(self, settings: ConnectorSettings) -> None:
        assert settings.use_layerwise
        assert (settings.save_min_tokens, settings.load_min_tokens) == (512, 512)
        assert settings.transfer_timeout == 30_000

    def test_file(self, path: Path, said: Callable[[], list[str]]) -> None:
        """Each key without a meaning here is named with the reason."""
        self.check(read_settings(TransferConfig({"UCM_CONFIG_FILE": str(path)}, "UCMConnector")))
        named = [note.split(" is not used: ")[0] for note in said()]
        node = "cache_buffer_capacity_gb, pipeline, storage_backends"
        assert named == [
            f"{path}: ucm_connector_name",
            f"{path}: enable_event_sync",
            f"for kvpool-node, which this engine does not start (autostart_node): {node}",
        ]

    def test_the_store_of_a_node_that_the_engine_starts(self, path: Path, said: Callable[[], list[str]]) -> None:
        """Its files and its memory are as the file says."""
        extra = {"UCM_CONFIG_FILE": str(path), "autostart_node": True}
        settings = read_settings(TransferConfig(extra, "UCMConnector"))
        assert (settings.pipeline, settings.storage_backends) == ("Cache|Posix", ("/mnt/test1",))
        assert settings.cache_buffer_capacity_gb == 64
        assert not any("kvpool-node" in note for note in said())

    def test_settings_of_ours_may_stand_in_the_file(self, path: Path) -> None:
        """One file then does for the node and for the engine."""
        path.write_text(self.FILE + 'master: "10.0.0.1:50088"')
        assert read_settings(TransferConfig({"UCM_CONFIG_FILE": str(path)}, "UCMConnector")).master == "10.0.0.1:50088"

    def test_environment(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only UCM's connector is named in UCM's variable."""
        monkeypatch.setenv("UCM_CONFIG_FILE", str(path))
        self.check(read_settings(TransferConfig({}, "UCMConnector")))
        assert not read_settings(TransferConfig({}, "AscendStoreConnector")).use_layerwise

    @pytest.mark.parametrize(
        ("store", "meant"),
        [
            ({"storage_backends": "/mnt/a:/mnt/b"}, {"storage_backends": ("/mnt/a", "/mnt/b")}),
            ({"storage_backends": "/mnt/a"}, {"pipeline": "Cache|Posix"}),
            ({"storage_backends": ["/mnt/a"]}, {"storage_backends": ("/mnt/a",)}),
            ({"storage_backends": "/a", "posix_capacity_gb": 0}, {"storage_capacity": None}),
            ({"storage_backends": "/a", "posix_capacity_gb": 1.5}, {"storage_capacity": 3 << 29}),
            ({"storage_backends": "/a", "io_direct": False}, {"storage_direct": "off"}),
            ({"storage_backends": "/a", "use_direct": True}, {"storage_direct": "auto"}),
            ({"storage_backends": "/a", "posix_data_trans_concurrency": 8}, {"storage_threads": 8}),
            ({"storage_backends": "/a", "store_pipeline": "Posix"}, {"pipeline": "Posix"}),
        ],
    )
    def test_a_stores_own_settings(self, store: dict[str, Any], meant: dict[str, Any]) -> None:
        """Are those of a node, in other words."""
        extra = {"ucm_connectors": [{"ucm_connector_config": store}], "autostart_node": True}
        settings = read_settings(TransferConfig(extra, "UCMConnector"))
        assert {name: getattr(settings, name) for name in meant} == meant

    def test_a_store_that_cannot_be(self) -> None:
        """Is refused where it would be started, with the key and the file."""
        store = {"store_pipeline": "Cache|Ds3fs", "storage_backends": "/a"}
        with pytest.raises(ConfigError, match=r"pipeline: 'Cache\|Ds3fs' is not allowed.*: store_pipeline"):
            read_settings(TransferConfig({"ucm_connectors": [{"ucm_connector_config": store}]}, "UCMConnector"))
        with pytest.raises(ConfigError, match="needs storage_backends"):
            read_settings(TransferConfig({"pipeline": "Cache|Posix", "autostart_node": True}))

    def test_inline(self) -> None:
        """As a list of stores, or one store."""
        store = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": {"timeout_ms": 30000}}
        common = {"use_layerwise": True, "persist_token_threshold": 512}
        self.check(read_settings(TransferConfig({"ucm_connectors": [store], **common}, "UCMConnector")))
        self.check(read_settings(TransferConfig({**store, **common}, "UCMConnector")))

    def test_the_extra_config_wins(self, path: Path) -> None:
        """Nearer to the engine means stronger."""
        extra = {"UCM_CONFIG_FILE": str(path), "use_layerwise": False, "load_min_tokens": 1}
        settings = read_settings(TransferConfig(extra, "UCMConnector"))
        assert (settings.use_layerwise, settings.load_min_tokens, settings.save_min_tokens) == (False, 1, 512)

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("use_layerwyse: true", r"use_layerwyse: no such setting; did you mean use_layerwise\?"),
            ("ucm_connectors: {a: 1}", "ucm_connectors: must be a list of stores"),
            ("ucm_connectors: [1]", "ucm_connectors: must hold names and values, not 1"),
            ("ucm_connectors: [{ucm_connector_config: {storage_backend: /x}}]", "did you mean storage_backends"),
            ("use_layerwise: sometimes", "use_layerwise: 'sometimes' is not allowed.*ucm.yaml"),
            ("[1]", "UCM_CONFIG_FILE: .*must hold one mapping"),
        ],
    )
    def test_what_is_wrong_in_the_file(self, tmp_path: Path, text: str, error: str) -> None:
        """Said with the key and the file."""
        path = tmp_path / "ucm.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=error):
            read_settings(TransferConfig({"UCM_CONFIG_FILE": str(path)}, "UCMConnector"))

    def test_no_file(self, tmp_path: Path) -> None:
        """A path that leads nowhere is an error of the configuration, as it would be in UCM."""
        with pytest.raises(ConfigError, match=r"UCM_CONFIG_FILE: cannot read .*absent"):
            read_settings(TransferConfig({"UCM_CONFIG_FILE": str(tmp_path / "absent")}, "UCMConnector"))


def test_ascend_variables(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """Timeouts are ours, in milliseconds; our own names for them win; the buffer pool is named."""
    monkeypatch.setenv("ASCEND_BUFFER_POOL", "4:8")
    monkeypatch.setenv("ASCEND_CONNECT_TIMEOUT", "10000")
    monkeypatch.setenv("ASCEND_TRANSFER_TIMEOUT", "9000")
    settings = read_settings(TransferConfig())
    assert (settings.connect_timeout, settings.transfer_timeout) == (10_000, 9000)
    assert said() == ["environment: ASCEND_BUFFER_POOL is not used: the buffers on the device have a fixed size"]
    assert read_settings(TransferConfig({"transfer_timeout": 100})).transfer_timeout == 100
    monkeypatch.setenv("KVPOOL_TRANSFER_TIMEOUT", "200")
    assert read_settings(TransferConfig()).transfer_timeout == 200
    monkeypatch.setenv("ASCEND_CONNECT_TIMEOUT", "soon")
    with pytest.raises(
        ConfigError, match=r"connect_timeout: 'soon' is not a duration.*\(from ASCEND_CONNECT_TIMEOUT\)"
    ):
        read_settings(TransferConfig())


def test_top_level_keys(said: Callable[[], list[str]]) -> None:
    """What somebody gave is named; vLLM's defaults are not."""
    read_settings(TransferConfig(kv_port=20001, kv_buffer_device="npu"))
    named = [note.split(" is not used: ")[0] for note in said()]
    assert named == ["kv-transfer-config: kv_port", "kv-transfer-config: kv_buffer_device"]


def test_the_client_is_made_as_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a client's settings reaches it."""
    made: dict[str, Any] = {}
    monkeypatch.setattr("kvpool.client.Client", lambda master, **options: made.update(options, master=master))
    values = {
        "master": "10.0.0.1:1",
        "node": "/run/node.sock",
        "checksum": "transfer",
        "copy_threads": 5,
        "lookup_timeout": 11,
        "transfer_timeout": 12,
        "connect_timeout": 13,
        "breaker_failures": 6,
        "breaker_probe_interval": 14,
    }
    connect(ConnectorSettings(**values), "engine 7")
    assert {name.removesuffix("_ms"): value for name, value in made.items()} == values | {"name": "engine 7"}


DOCUMENT = (Path(__file__).parents[2] / "docs" / "connector.md").read_text()


@pytest.mark.parametrize("item", fields(ConnectorSettings), ids=lambda item: item.name)
def test_each_setting_is_documented(item: Field[Any]) -> None:
    """With its default and what it does, as ``--help`` would say it."""
    default = item.metadata["shown"] or "none"
    default = default.lower() if default in {"True", "False"} else default
    text = item.metadata["help"].replace("|", "\\|")  # a bar would end the table's cell
    assert f"| `{item.name}` | {default} | {text} |" in DOCUMENT


@pytest.mark.parametrize(
    "key",
    sorted(  # the same order in all processes that run tests
        (
            *(*seeds.EXTRA_IGNORED, *UCM_KEYS, seeds.UCM_FILE),
            *(*seeds.ENVIRONMENT_HONOURED, *seeds.ENVIRONMENT_IGNORED, *MOONCAKE_TO_KVPOOL, *MOONCAKE_IGNORED),
            *(*seeds.TOP_LEVEL_IGNORED, *seeds.TOP_LEVEL_REMOVED, *seeds.NAMES, *seeds.MODULES),
        )
    ),
)
def test_each_foreign_key_is_documented(key: str) -> None:
    """Whoever brings a configuration finds its keys."""
    assert f"`{key}`" in DOCUMENT


@pytest.mark.parametrize("text", re.findall(r"--kv-transfer-config '(.*?)'", DOCUMENT, re.DOTALL))
def test_documented_commands_are_understood(text: str) -> None:
    """Each configuration in the document names the master that it shows."""
    config = json.loads(text)
    children = config["kv_connector_extra_config"].get("connectors", [config])
    ours = [child for child in children if child["kv_connector"] == "KVPoolConnector"]
    assert [read_settings(TransferConfig(**child)).master for child in ours] == ["10.0.0.1:50088"]


@pytest.mark.parametrize("factory", ["nowhere", "no.such.module:f", "kvpool_vllm.settings:absent"])
def test_client_factory_must_exist(factory: str) -> None:
    """A wrong name is an error of the configuration."""
    with pytest.raises(ConfigError, match="client_factory: must be MODULE:FUNCTION"):
        connect(ConnectorSettings(client_factory=factory), "test")
