"""Settings: one name everywhere, a clear order of who wins, and errors that name the field and what is allowed."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.config import (
    COMPONENTS,
    MOONCAKE_IGNORED,
    TEXT,
    ClientSettings,
    MasterSettings,
    NodeSettings,
    load,
    plain_environment,
    runtime_dir,
    setting,
    split_address,
)
from kvpool.config_foreign import UCM_IGNORED, UCM_TO_KVPOOL
from kvpool.errors import ConfigError, InvalidArgumentError


@pytest.fixture
def write(tmp_path):
    def write(content, name="kvpool.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


class TestDefaults:
    def test_defaults_are_what_operators_expect(self):
        """Without any setting a master listens on 50088 with a small eviction gap."""
        loaded = load(MasterSettings, flags={}, environ={})
        assert loaded.settings.port == 50088
        assert loaded.settings.eviction_high_watermark_ratio == 0.99
        assert loaded.settings.eviction_ratio == 0.01
        assert loaded.settings.default_kv_lease_ttl == 10_000
        assert loaded.settings.client_ttl == 10_000
        assert set(loaded.sources.values()) == {"default"}
        assert loaded.notes == []

    def test_a_node_gives_one_gigabyte_by_default(self):
        """Sizes are bytes once parsed."""
        settings = load(NodeSettings, flags={}, environ={}).settings
        assert settings.segment_size == 1 << 30
        assert settings.socket_mode == 0o600
        assert settings.lock_memory

    def test_the_socket_is_in_the_users_runtime_directory(self, tmp_path):
        """Two users of one host never share a default socket."""
        assert runtime_dir({"XDG_RUNTIME_DIR": "/run/user/7"}).as_posix() == "/run/user/7/kvpool"
        assert runtime_dir({}).name.startswith("kvpool-")

    @pytest.mark.parametrize("component", COMPONENTS)
    def test_every_setting_explains_itself(self, component):
        """Help, kind and name are there for every field."""
        for item in dataclasses.fields(component):
            assert item.metadata["help"].endswith(".")
            assert item.name == item.name.lower()


class TestPrecedence:
    def test_flag_beats_environment_beats_file_beats_default(self, write):
        """Each layer overrides the one below, and the source is remembered."""
        path = write("port: 1\nhost: file.example\nclient_ttl: 1s\n")
        environ = {"KVPOOL_PORT": "2", "KVPOOL_HOST": "env.example"}
        loaded = load(MasterSettings, flags={"port": "3", "host": None}, config_path=path, environ=environ)
        assert (loaded.settings.port, loaded.settings.host, loaded.settings.client_ttl) == (3, "env.example", 1000)
        assert loaded.sources["port"] == "flag --port"
        assert loaded.sources["host"] == "KVPOOL_HOST"
        assert loaded.sources["client_ttl"] == path
        assert loaded.sources["max_blocks"] == "default"

    def test_the_file_can_be_named_in_the_environment(self, write):
        """KVPOOL_CONFIG is --config."""
        environ = {"KVPOOL_CONFIG": write({"port": 7})}
        assert load(MasterSettings, flags={}, environ=environ).settings.port == 7

    def test_an_empty_variable_counts_as_not_set(self):
        """Templates leave empty variables behind."""
        assert load(MasterSettings, flags={}, environ={"KVPOOL_PORT": ""}).settings.port == 50088

    def test_null_in_a_file_counts_as_not_set(self, write):
        """`port:` without a value is the default."""
        assert load(MasterSettings, flags={}, config_path=write("port:\n"), environ={}).settings.port == 50088

    def test_an_empty_file_is_no_error(self, write):
        """A file of comments only is a file without settings."""
        assert load(MasterSettings, flags={}, config_path=write("# nothing\n"), environ={}).settings.port == 50088

    def test_a_size_under_another_name_obeys_the_same_order(self, write):
        """Whoever says one of the two names means neither of what was said before."""
        path = write("cache_buffer_capacity_gb: 64\n")
        environ = {"KVPOOL_CACHE_BUFFER_CAPACITY_GB": "32"}
        by_flag = load(NodeSettings, flags={"segment_size": "128MB"}, config_path=path, environ=environ)
        assert by_flag.settings.segment_size == 128 << 20
        assert by_flag.sources["cache_buffer_capacity_gb"] == "default"
        by_environment = load(NodeSettings, flags={}, config_path=path, environ={"KVPOOL_SEGMENT_SIZE": "256MB"})
        assert by_environment.settings.segment_size == 256 << 20
        environ = {"KVPOOL_SEGMENT_SIZE": "256MB"}
        by_other = load(NodeSettings, flags={"cache_buffer_capacity_gb": 2}, config_path=path, environ=environ)
        assert by_other.settings.segment_size == 2 << 30

    def test_both_names_of_a_size_at_once_are_refused(self, write):
        """Nobody can tell which of them was meant."""
        path = write("cache_buffer_capacity_gb: 64\nsegment_size: 1GB\n")
        environ = {"KVPOOL_CACHE_BUFFER_CAPACITY_GB": "32", "KVPOOL_SEGMENT_SIZE": "1GB"}
        for config_path, around, source in ((path, {}, path), (None, environ, "KVPOOL_CACHE_BUFFER_CAPACITY_GB")):
            with pytest.raises(ConfigError, match="cache_buffer_capacity_gb: means the same as segment_size") as caught:
                load(NodeSettings, flags={}, config_path=config_path, environ=around)
            assert f"(from {source})" in str(caught.value)

    def test_a_plain_environment_has_no_settings(self):
        """For programs whose settings are on their command line; what tests and tools pass on stays."""
        around = {"PATH": "/bin", "KVPOOL_TEST_X": "1", "KVPOOL_BENCH_Y": "2"}
        settings = {"KVPOOL_DATA_DIR": "/x", "KVPOOL_CONFIG": "/y", "MOONCAKE_CONFIG_PATH": "/z"}
        assert plain_environment({**settings, **around}) == around


class TestUnknown:
    def test_an_unknown_key_names_the_nearest_and_the_file(self, write):
        """A typo in a file is refused with what was probably meant."""
        path = write("segment_sise: 1GB\n")
        with pytest.raises(ConfigError) as caught:
            load(NodeSettings, flags={}, config_path=path, environ={})
        assert caught.value.field == "segment_sise"
        assert "did you mean segment_size?" in str(caught.value)
        assert path in str(caught.value)

    def test_an_unknown_variable_names_the_nearest(self):
        """A typo in the environment is refused too."""
        with pytest.raises(ConfigError, match=r"KVPOOL_SEGMENT_SIZ: .*KVPOOL_SEGMENT_SIZE\?"):
            load(NodeSettings, flags={}, environ={"KVPOOL_SEGMENT_SIZ": "1GB"})

    def test_an_unknown_flag_names_its_origin(self):
        """An engine's connector hands its own settings over as flags."""
        with pytest.raises(ConfigError, match=r"checksums: .*did you mean checksum\?.*extra_config"):
            load(ClientSettings, flags={"checksums": "always"}, environ={}, flags_from="extra_config")

    def test_what_another_component_knows_is_fine(self, write):
        """One environment and one file serve all parts of a host."""
        path = write("segment_size: 1GB\nport: 5\n")
        environ = {"KVPOOL_CHECKSUM": "transfer"}
        loaded = load(MasterSettings, flags={}, config_path=path, environ=environ)
        assert loaded.settings.port == 5
        assert len(loaded.notes) == 1
        assert "segment_size" in loaded.notes[0]

    def test_a_settings_class_may_be_extended(self):
        """A connector's own settings have names in file and environment as well."""

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Extended(ClientSettings):
            flavour: str = setting("plain", TEXT, "A taste.")

        loaded = load(Extended, flags={}, environ={"KVPOOL_FLAVOUR": "sour", "KVPOOL_MASTER": "a:1"})
        assert (loaded.settings.flavour, loaded.settings.master) == ("sour", "a:1")

    def test_variables_of_a_kubernetes_service_are_no_settings(self):
        """A service called kvpool or kvpool-master puts variables like these beside every pod."""
        environ = {
            "KVPOOL_PORT": "tcp://10.0.0.1:50088",
            "KVPOOL_SERVICE_HOST": "10.0.0.1",
            "KVPOOL_SERVICE_PORT_GRPC": "50088",
            "KVPOOL_PORT_50088_TCP_ADDR": "10.0.0.1",
            "KVPOOL_MASTER_PORT": "tcp://10.0.0.1:50088",
            "KVPOOL_MASTER_SERVICE_PORT": "50088",
            "KVPOOL_MASTER_PORT_50088_TCP": "tcp://10.0.0.1:50088",
        }
        assert load(MasterSettings, flags={}, environ=environ).settings.port == 50088

    def test_a_lower_case_variable_is_refused(self):
        """One spelling in the environment."""
        with pytest.raises(ConfigError, match="KVPOOL_PORT"):
            load(MasterSettings, flags={}, environ={"KVPOOL_port": "1"})


GOOD = [
    (MasterSettings, "port", "0", 0),
    (MasterSettings, "port", 65535, 65535),
    (MasterSettings, "eviction_ratio", "0.05", 0.05),
    (MasterSettings, "eviction_high_watermark_ratio", 1, 1.0),
    (MasterSettings, "default_kv_lease_ttl", "11000", 11_000),
    (MasterSettings, "default_kv_lease_ttl", 11000, 11_000),
    (MasterSettings, "default_kv_lease_ttl", "1h", 3_600_000),
    (MasterSettings, "insecure", "Yes", True),
    (MasterSettings, "insecure", False, False),
    (MasterSettings, "host", "::", "::"),
    (MasterSettings, "host", "fe80::1%eth0", "fe80::1%eth0"),
    (MasterSettings, "host", "node-1.rack_2.example.", "node-1.rack_2.example."),
    (MasterSettings, "host", "x" * 63, "x" * 63),
    (MasterSettings, "log_level", "DEBUG", "debug"),
    (NodeSettings, "segment_size", 107374182400, 107374182400),
    (NodeSettings, "segment_size", "1GB", 1 << 30),
    (NodeSettings, "segment_size", "1024MB", 1 << 30),
    (NodeSettings, "segment_size", "1048576KB", 1 << 30),
    (NodeSettings, "segment_size", "1073741824B", 1 << 30),
    (NodeSettings, "segment_size", "1073741824", 1 << 30),
    (NodeSettings, "master", "[::1]:50088", "[::1]:50088"),
    (NodeSettings, "master", "pool.example.:50088", "pool.example.:50088"),
    (NodeSettings, "socket_mode", "0660", 0o660),
    (NodeSettings, "socket_mode", "0o660", 0o660),
    (NodeSettings, "socket_mode", 0o660, 0o660),
    (NodeSettings, "node_id", 7, "7"),
    (ClientSettings, "checksum", "transfer", "transfer"),
    (ClientSettings, "lookup_timeout", "25ms", 25),
]

BAD = [
    (MasterSettings, "port", "65536", "0 to 65535"),
    (MasterSettings, "port", "-1", "0 to 65535"),
    (MasterSettings, "port", "http", "0 to 65535"),
    (MasterSettings, "port", True, "0 to 65535"),
    (MasterSettings, "port", 1.5, "0 to 65535"),
    (MasterSettings, "eviction_ratio", "0", "above 0 and up to 1"),
    (MasterSettings, "eviction_ratio", "nan", "above 0 and up to 1"),
    (MasterSettings, "eviction_high_watermark_ratio", "1.01", "above 0 and up to 1"),
    (MasterSettings, "eviction_high_watermark_ratio", "95%", "above 0 and up to 1"),
    (MasterSettings, "eviction_high_watermark_ratio", [1], "above 0 and up to 1"),
    (MasterSettings, "default_kv_lease_ttl", "0", "1ms"),
    (MasterSettings, "default_kv_lease_ttl", "soon", "ms"),
    (MasterSettings, "insecure", "maybe", "true or false"),
    (MasterSettings, "host", "a b", "host name"),
    (MasterSettings, "host", "localhost:50088", "without a port"),
    (MasterSettings, "host", "a..b", "1 to 63 characters between dots"),
    (MasterSettings, "host", ".", "1 to 63 characters between dots"),
    (MasterSettings, "host", "x" * 64, "1 to 63 characters between dots"),
    (MasterSettings, "host", "a.b..", "1 to 63 characters between dots"),
    (MasterSettings, "host", "a." * 128, "1 to 63 characters between dots"),
    (MasterSettings, "log_level", "loud", "debug or info"),
    (MasterSettings, "max_blocks", 0, "1 to"),
    (MasterSettings, "data_dir", 5, "path"),
    (MasterSettings, "data_dir", "~nobody-here/x", "path"),
    (NodeSettings, "segment_size", "1XB", "KB, MB, GB"),
    (NodeSettings, "segment_size", "0", "from 1"),
    (NodeSettings, "master", "localhost", "HOST:PORT"),
    (NodeSettings, "master", "localhost:0", "1 to 65535"),
    (NodeSettings, "master", "10.0.0..7:50088", "1 to 63 characters between the dots"),
    (NodeSettings, "master", f"{'x' * 64}.example:50088", "1 to 63 characters between the dots"),
    (NodeSettings, "master", "[nonsense]:5", "HOST:PORT"),
    (NodeSettings, "socket_mode", "999", "0 to 777"),
    (NodeSettings, "socket_mode", 0o1777, "0 to 777"),
    (NodeSettings, "socket_path", "/" + "x" * 120, "100 bytes"),
    (NodeSettings, "node_id", "a\nb", "printable"),
    (NodeSettings, "connections_max", 0, "1 to 65536"),
    (ClientSettings, "checksum", "never", "always or transfer"),
    (ClientSettings, "copy_threads", 65, "1 to 64"),
]


class TestValues:
    @pytest.mark.parametrize(("component", "name", "value", "meaning"), GOOD)
    def test_accepted(self, component, name, value, meaning):
        """Every spelling that operators know means the same on every way in."""
        assert getattr(component(**{name: value}), name) == meaning
        assert getattr(load(component, flags={name: value}, environ={}).settings, name) == meaning

    @pytest.mark.parametrize(("component", "name", "value", "allowed"), BAD)
    def test_refused(self, component, name, value, allowed):
        """A value that is not allowed names the field, its origin, and what is."""
        with pytest.raises(ConfigError) as caught:
            load(component, flags={name: value}, environ={})
        assert caught.value.field == name
        assert allowed in caught.value.problem
        assert f"(from flag --{name})" in caught.value.problem
        with pytest.raises(ConfigError):
            component(**{name: value})

    def test_the_eviction_ratio_is_at_most_the_watermark(self, write):
        """What concerns two fields names the one to change, and where it came from."""
        with pytest.raises(ConfigError, match=r"eviction_ratio: must be at most .*0\.5.*KVPOOL_EVICTION_RATIO"):
            load(
                MasterSettings,
                flags={"eviction_high_watermark_ratio": "0.5"},
                environ={"KVPOOL_EVICTION_RATIO": "0.6"},
            )

    def test_so_it_is_for_files(self):
        """The pair of the backends."""
        with pytest.raises(ConfigError, match=r"storage_eviction_ratio: must be at most storage_high_.*0\.5"):
            MasterSettings(storage_high_watermark_ratio=0.5, storage_eviction_ratio=0.6)

    def test_the_seed_ratios_are_accepted(self):
        """0.9/0.1 and 0.95/0.05 are in use elsewhere."""
        for high, gap in (("0.9", "0.1"), ("0.95", "0.05")):
            settings = MasterSettings(eviction_high_watermark_ratio=high, eviction_ratio=gap)
            assert settings.eviction_ratio == float(gap)

    @given(st.sampled_from(COMPONENTS), st.data())
    def test_any_value_is_taken_or_refused_with_its_field(self, component, data):
        """Nothing that can stand in a file raises anything but ConfigError."""
        name = data.draw(st.sampled_from([item.name for item in dataclasses.fields(component)]))
        scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
        value = data.draw(scalar | st.lists(scalar, max_size=2) | st.dictionaries(st.text(), scalar, max_size=2))
        try:
            load(component, flags={name: value}, environ={})
        except ConfigError as error:
            assert error.field in {name, "eviction_ratio", "storage_eviction_ratio"}

    @given(st.text())
    def test_split_address_is_total(self, text):
        """Any text is an address with a usable port, or refused."""
        try:
            host, port = split_address(text, "master")
        except InvalidArgumentError as error:
            assert error.field == "master"
        else:
            assert host
            assert 1 <= port <= 65535


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("[1, 2]", "one mapping"),
            ("5", "one mapping"),
            ("1: 2", "one mapping"),
            ("a: b: c", "line 1"),
            ("a: !!python/object:os.system x", "neither YAML nor JSON"),
            ("\0", "neither YAML nor JSON"),
            ("[" * 5000, "neither YAML nor JSON"),
        ],
    )
    def test_a_file_that_is_no_mapping_is_refused(self, write, content, problem):
        """The error names the file and what is wrong with it."""
        path = write(content)
        with pytest.raises(ConfigError, match=problem) as caught:
            load(MasterSettings, flags={}, config_path=path, environ={})
        assert path in str(caught.value)

    def test_a_missing_file_is_named(self, tmp_path):
        """So is one that cannot be read."""
        with pytest.raises(ConfigError, match=r"config: cannot read .*: No such file"):
            load(MasterSettings, flags={}, config_path=str(tmp_path / "none.yaml"), environ={})

    @pytest.mark.parametrize(
        ("content", "field"),
        [
            ("port: 2026-13-45", "port"),
            ("port: !!timestamp abc", "port"),
            ("port: !!int abc", "port"),
            ('port: !!int ""', "port"),
            ("port: !!float abc", "port"),
            ("port: 0x_", "port"),
            ("insecure: !!bool abc", "insecure"),
            (f"port: {'1' * 5000}", "port"),
            (f"port: 0x{'f' * 5000}", "port"),
            (f'{{"port": {"1" * 5000}}}', "port"),
            (f"eviction_ratio: {'1' * 400}", "eviction_ratio"),
            ('{"data_dir": "/tmp/\\ud800"}', "data_dir"),
            ("port: 1\nport: 2", "port"),
            ('{"port": 1, "port": 2}', "port"),
            ("{port: 1, port: 2}", "port"),
        ],
    )
    def test_a_value_that_cannot_be_is_refused_with_its_name(self, write, content, field):
        """Whatever the parsers make of it; a key that stands twice is no answer to which value was meant."""
        path = write(content)
        with pytest.raises(ConfigError) as caught:
            load(MasterSettings, flags={}, config_path=path, environ={})
        assert caught.value.field == field
        assert path in str(caught.value)
        str(caught.value).encode()

    def test_so_it_is_for_a_nodes_values(self, write):
        """A capacity without end, a socket whose name no file can have."""
        for content, field in (
            (f"cache_buffer_capacity_gb: {'1' * 400}", "cache_buffer_capacity_gb"),
            ('{"socket_path": "/tmp/\\ud800"}', "socket_path"),
        ):
            with pytest.raises(ConfigError) as caught:
                load(NodeSettings, flags={}, config_path=write(content), environ={})
            assert caught.value.field == field

    def test_text_that_looks_like_a_date_is_text(self, write):
        """There is no such day; as a name it is as good as any."""
        path = write("data_dir: /srv/2026-13-45\nhost: 2026-13-45\n")
        assert load(MasterSettings, flags={}, config_path=path, environ={}).settings.host == "2026-13-45"

    @pytest.mark.parametrize("content", ['{\n\t"port": 7\n}', '\ufeff{\t"port": 7}', "\ufeffport: 7", "{port: 7}"])
    def test_json_is_json(self, write, content):
        """With tabs, which YAML refuses; what begins with a brace may be YAML all the same."""
        assert load(MasterSettings, flags={}, config_path=write(content), environ={}).settings.port == 7

    def test_a_merged_key_may_be_overridden(self, write):
        """That is what YAML has merging for."""
        path = write("storage_backends: s3://b/p\nstorage_options: {<<: {key: a, secret: s}, key: b}\n")
        options = load(NodeSettings, flags={}, config_path=path, environ={}).settings.storage_options
        assert options == {"key": "b", "secret": "s"}

    @pytest.mark.parametrize("path", ["~nobody-here/x.yaml", "a\0b"])
    def test_a_path_that_cannot_be_is_named(self, path):
        """It is no traceback."""
        with pytest.raises(ConfigError, match="config: cannot read "):
            load(MasterSettings, flags={}, config_path=path, environ={})

    @pytest.mark.parametrize("text", ["440", "0660", "432"])
    def test_a_mode_in_a_file_is_in_quotes(self, write, text):
        """Else nobody knows which number was meant."""
        with pytest.raises(ConfigError, match=r'socket_mode: .*in quotes, for example "0660"'):
            load(NodeSettings, flags={}, config_path=write(f"socket_mode: {text}\n"), environ={})
        loaded = load(NodeSettings, flags={}, config_path=write('socket_mode: "0660"\n'), environ={})
        assert loaded.settings.socket_mode == 0o660

    def test_bytes_that_are_no_text_are_refused(self, tmp_path):
        """A binary file is not parsed."""
        path = tmp_path / "kvpool.yaml"
        path.write_bytes(b"\xff\xfe\xff")
        with pytest.raises(ConfigError, match="neither YAML nor JSON"):
            load(MasterSettings, flags={}, config_path=str(path), environ={})

    def test_a_huge_file_is_refused(self, write):
        """Only so much is read."""
        with pytest.raises(ConfigError, match="larger than"):
            load(MasterSettings, flags={}, config_path=write("#" * (1 << 20) + "\n"), environ={})


MOONCAKE = {
    "local_hostname": "10.0.0.8",
    "metadata_server": "P2PHANDSHAKE",
    "protocol": "tcp",
    "device_name": "",
    "use_ascend_direct": True,
    "master_server_address": "10.0.0.7:50088",
    "global_segment_size": "2GB",
}


class TestUCM:
    """UCM's YAML is a node's configuration: its pipeline, its directories, its memory."""

    FILE = """
ucm_connectors:
  - ucm_connector_name: "UcmPipelineStore"
    ucm_connector_config:
      store_pipeline: "Cache|Posix"
      storage_backends: "/mnt/test1:/mnt/test2"
      cache_buffer_capacity_gb: 64
      posix_capacity_gb: 1024
      io_direct: true
enable_event_sync: true
use_layerwise: true
hit_ratio: 0.8
"""

    def test_a_node_understands_it(self, write):
        """What concerns the engine is named as such, what means nothing too: one line each."""
        path = write(self.FILE)
        loaded = load(NodeSettings, flags={}, config_path=path, environ={})
        settings = loaded.settings
        assert settings.pipeline == "Cache|Posix"
        assert settings.storage_backends == ("/mnt/test1", "/mnt/test2")
        assert (settings.segment_size, settings.storage_capacity) == (64 << 30, 1 << 40)
        assert settings.storage_direct == "auto"
        assert loaded.notes == [
            f"{path}: these UCM keys mean nothing here: enable_event_sync, hit_ratio, ucm_connector_name",
            f"{path}: meant for other parts of kvpool, not used here: use_layerwise",
        ]

    def test_our_own_names_may_stand_beside_it(self, write):
        """A node needs to know its master, too; environment and flags win as ever."""
        path = write(self.FILE + "master: 10.0.0.1:50088")
        environ = {"KVPOOL_CACHE_BUFFER_CAPACITY_GB": "0.5"}
        settings = load(NodeSettings, flags={"pipeline": "Posix"}, config_path=path, environ=environ).settings
        assert (settings.master, settings.segment_size, settings.pipeline) == ("10.0.0.1:50088", 1 << 29, "Posix")

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("ucm_connectors: {a: 1}", "ucm_connectors: must be a list of stores"),
            ("ucm_connectors: [{ucm_connector_config: {storage_backend: /x}}]", "did you mean storage_backends"),
            ("ucm_connectors: []\nuse_layerwyse: true", r"use_layerwyse: .*did you mean use_layerwise\?"),
            ("ucm_connectors: [{ucm_connector_config: {store_pipeline: Fake}}]", "pipeline: 'Fake' is not allowed"),
            ("ucm_connectors: [{ucm_connector_config: {store_pipeline: Posix}}]", "needs storage_backends"),
            ("ucm_connectors: [{ucm_connector_config: {posix_capacity_gb: .inf}}]", "storage_capacity: inf .*posix_c"),
            ("ucm_connectors: [{ucm_connector_config: {posix_capacity_gb: .nan}}]", "storage_capacity: nan .*posix_c"),
        ],
    )
    def test_what_is_wrong_is_said(self, write, text, error):
        """With the key."""
        with pytest.raises(ConfigError, match=error):
            load(NodeSettings, flags={}, config_path=write(text), environ={})

    def test_every_key_is_honoured_or_explained(self):
        """And none is both."""
        assert not UCM_TO_KVPOOL.keys() & UCM_IGNORED.keys()
        assert all(UCM_IGNORED.values())
        names = {item.name for component in COMPONENTS for item in dataclasses.fields(component)}
        assert {name for ours in UCM_TO_KVPOOL.values() for name in ours} <= names


@pytest.mark.parametrize(
    ("text", "backends"),
    [
        ("/mnt/a", ("/mnt/a",)),
        ("/mnt/a,/mnt/b", ("/mnt/a", "/mnt/b")),
        ("/mnt/a:/mnt/b:/mnt/c", ("/mnt/a", "/mnt/b", "/mnt/c")),
        ("s3://bucket/pool", ("s3://bucket/pool",)),
        ("file:///mnt/a,s3://host:9000/b", ("file:///mnt/a", "s3://host:9000/b")),
        (["/mnt/a:/x", "memory://"], ("/mnt/a:/x", "memory://")),
    ],
)
def test_storage_backends(text, backends):
    """Commas or colons between directories; a URL keeps its own colons."""
    pipeline = "Cache|Object" if "://" in backends[-1] else "Cache|Posix"
    settings = NodeSettings(storage_backends=text)
    assert (settings.storage_backends, settings.pipeline) == (backends, pipeline)


@pytest.mark.parametrize("text", ["", ",", "/a,/a", "/a:/a", [], [1.5, None], {"a": 1}, "/a\tb"])
def test_storage_backends_that_cannot_be(text):
    """Say what is allowed."""
    with pytest.raises(ConfigError, match=r"storage_backends: .*allowed"):
        NodeSettings(storage_backends=text)


class TestMooncake:
    @pytest.mark.parametrize("component", [NodeSettings, ClientSettings])
    def test_a_mooncake_json_is_understood(self, write, component):
        """By node and connector, through MOONCAKE_CONFIG_PATH; what means nothing here is one note."""
        path = write(MOONCAKE, "mooncake.json")
        loaded = load(component, flags={}, environ={"MOONCAKE_CONFIG_PATH": path})
        assert loaded.settings.master == "10.0.0.7:50088"
        assert loaded.settings.segment_size == 2 << 30
        assert loaded.settings.advertise_host == "10.0.0.8"
        assert loaded.sources["master"] == f"{path}: master_server_address"
        (note,) = loaded.notes
        for key in ("metadata_server", "protocol", "device_name", "use_ascend_direct"):
            assert key in note

    def test_it_may_be_given_as_config(self, write):
        """Its keys tell what it is."""
        path = write({**MOONCAKE, "transfer_timeout": 5}, "pool.json")
        assert load(NodeSettings, flags={}, config_path=path, environ={}).settings.segment_size == 2 << 30

    @pytest.mark.parametrize(
        "size", [107374182400, 107374182400.0, "1GB", "1024MB", "1048576KB", "1073741824B", "1073741824"]
    )
    def test_every_way_to_write_a_segment_size(self, write, size):
        """A number or a string, with or without a unit."""
        path = write({**MOONCAKE, "global_segment_size": size})
        expected = 1 << 30 if isinstance(size, str) else 100 << 30
        assert load(NodeSettings, flags={}, config_path=path, environ={}).settings.segment_size == expected

    def test_an_unknown_key_is_refused_with_the_nearest(self, write):
        """A typo is not taken for something to ignore."""
        path = write({**MOONCAKE, "global_segmentsize": "1GB"})
        with pytest.raises(ConfigError, match=r"global_segmentsize: .*did you mean global_segment_size\?"):
            load(NodeSettings, flags={}, environ={"MOONCAKE_CONFIG_PATH": path})

    def test_environment_and_flags_win(self, write):
        """It is a file like any other."""
        environ = {"MOONCAKE_CONFIG_PATH": write(MOONCAKE), "KVPOOL_SEGMENT_SIZE": "3GB"}
        loaded = load(NodeSettings, flags={"master": "h:1"}, environ=environ)
        assert (loaded.settings.master, loaded.settings.segment_size) == ("h:1", 3 << 30)

    def test_config_wins_over_it_and_says_so(self, write):
        """Of two files, the one named to us."""
        own, theirs = write({"segment_size": "3GB"}, "own.yaml"), write(MOONCAKE, "mooncake.json")
        loaded = load(NodeSettings, flags={}, config_path=own, environ={"MOONCAKE_CONFIG_PATH": theirs})
        assert loaded.settings.segment_size == 3 << 30
        assert loaded.settings.master == "127.0.0.1:50088"
        assert any(own in note and theirs in note for note in loaded.notes)

    def test_the_master_does_not_read_it(self):
        """Nothing in it is about the master; a wrong path does not stop one."""
        assert load(MasterSettings, flags={}, environ={"MOONCAKE_CONFIG_PATH": "/does/not/exist"}).notes == []

    @pytest.mark.parametrize(
        ("hostname", "advertised"),
        [("10.0.0.8:12345", "10.0.0.8"), ("", None), ("node-3", "node-3"), ("fd00::1", "fd00::1")],
    )
    def test_a_transport_port_behind_the_hostname_is_left_out(self, write, hostname, advertised):
        """Some deployments write one there."""
        path = write({**MOONCAKE, "local_hostname": hostname})
        assert load(NodeSettings, flags={}, config_path=path, environ={}).settings.advertise_host == advertised

    def test_a_bad_value_names_the_setting_and_the_file(self, write):
        """The name is ours, the file and the key in it are theirs."""
        path = write({**MOONCAKE, "global_segment_size": "lots"})
        with pytest.raises(ConfigError, match="segment_size: 'lots'") as caught:
            load(NodeSettings, flags={}, config_path=path, environ={})
        assert f"(from {path}: global_segment_size)" in str(caught.value)

    def test_ignored_keys_are_told_apart_from_ours(self):
        """A key is translated or ignored, never both."""
        assert "master_server_address" not in MOONCAKE_IGNORED


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"pipeline": "Cache|Object", "storage_backends": "/kv"}, "pipeline: .*is for URLs"),
        ({"pipeline": "Cache|Posix", "storage_backends": "s3://bucket/pool"}, "pipeline: .*is for directories"),
        ({"pipeline": "Posix"}, "pipeline: .*needs storage_backends"),
        ({"pipeline": "Cache", "storage_backends": "/kv"}, "pipeline: .*has no files"),
        ({"storage_backends": "s3://"}, "storage_backends: .*with a bucket"),
        ({"storage_backends": "/kv", "storage_capacity": 1}, "storage_capacity: must be at least 1MB"),
    ],
)
def test_storage_that_does_not_fit_together(settings, problem):
    """Is refused with the name of what to change."""
    with pytest.raises(ConfigError, match=problem):
        NodeSettings(**settings)


@pytest.mark.parametrize("pipeline", ["Cache|Object", "Object", "Cache|Posix", "Posix", None])
def test_a_directory_that_is_named_by_a_url_is_both(pipeline):
    """Whoever writes file:// may think of either."""
    settings = NodeSettings(storage_backends="file:///mnt/kv", **({"pipeline": pipeline} if pipeline else {}))
    assert settings.pipeline == (pipeline or "Cache|Posix")


def test_a_relative_directory_is_the_same_wherever_it_is_read_from():
    """As every other path in the settings."""
    settings = NodeSettings(storage_backends="kv,file:///mnt/kv")
    assert settings.storage_backends == (str(Path("kv").absolute()), "file:///mnt/kv")
    assert settings.pipeline == "Cache|Posix"


@pytest.mark.parametrize(("component", "program"), [(MasterSettings, "kvpool-master"), (NodeSettings, "kvpool-node")])
def test_the_page_has_every_setting_and_no_other(component, program):
    """With its default and what it is for."""
    page = (Path(__file__).parent.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    part = page.partition(f"## {program}\n")[2].partition("\n## ")[0]
    rows = []
    for item in dataclasses.fields(component):
        shown = str(item.metadata["shown"] or "none")
        shown = shown.lower() if shown in {"True", "False"} else shown
        text = item.metadata["help"].replace("|", "\\|")  # a bar would end the table's cell
        rows.append(f"| `{item.name}` | {shown} | {text} |")
    assert [line for line in part.splitlines() if line.startswith("| `")] == rows
