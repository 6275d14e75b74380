"""Settings: the only reader of the environment and of configuration files.

A setting has one name: ``--segment_size`` on the command line (dashes do as well), ``segment_size`` in
a YAML or JSON file, ``KVPOOL_SEGMENT_SIZE`` in the environment. A flag wins over the environment, the
environment over the file, the file over the default. A ``mooncake.json`` and UCM's YAML are understood too.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from kvpool.config_base import Settings, parsed_value, setting
from kvpool.config_files import read_file
from kvpool.config_foreign import (
    KVPOOL_TO_MOONCAKE,
    MOONCAKE_IGNORED,
    MOONCAKE_SIGNS,
    MOONCAKE_TO_KVPOOL,
    UCM_SIGNS,
    from_mooncake,
    from_ucm,
    no_such_setting,
)
from kvpool.config_kinds import (
    ADDRESS,
    BACKENDS,
    BOOL,
    DURATION,
    GIGABYTES,
    HOST,
    LOG_LEVEL,
    MAPPING,
    MODE,
    PATH,
    PORT,
    RATIO,
    SIZE,
    SOCKET_PATH,
    TEXT,
    TOKENS,
    Kind,
    choice,
    count,
    split_address,
)
from kvpool.config_proxy import ProxySettings
from kvpool.errors import ConfigError
from kvpool.model import directory_of

__all__ = [
    "AUTOSTARTED", "BOOL", "COMPONENTS", "CONFIG_ENV", "ENV_PREFIX", "MOONCAKE_ENV", "MOONCAKE_IGNORED",
    "MOONCAKE_TO_KVPOOL", "TEXT",
    "ClientSettings", "ConnectorSettings", "Kind", "Loaded", "MasterSettings", "NodeSettings", "ProxySettings",
    "Settings", "boot_id", "child_environment", "default_socket_path", "foreign_environment", "from_mooncake",
    "load", "no_such_setting", "plain_environment", "read_file", "runtime_dir", "setting", "split_address",
]  # fmt: skip

ENV_PREFIX = "KVPOOL_"
CONFIG_ENV = "KVPOOL_CONFIG"
MOONCAKE_ENV = "MOONCAKE_CONFIG_PATH"

# Variables for our own tests and tools; no component reads them as a setting.
_RESERVED_PREFIXES = ("KVPOOL_TEST_", "KVPOOL_BENCH_")
# A Kubernetes service whose name begins with "kvpool" puts these into every pod beside it.
_SERVICE_LINK = re.compile(r"KVPOOL_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


# ---- the settings of each component ----------------------------------------------------------------


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory for this user's sockets: private by its place, or by its owner's number."""
    base = environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "kvpool" if base else Path(tempfile.gettempdir()) / f"kvpool-{os.getuid()}"


def default_socket_path() -> str:
    """Return where this user's node listens for local clients unless told otherwise."""
    return str(runtime_dir() / "node.sock")


@dataclass(frozen=True, kw_only=True)
class MasterSettings(Settings):
    """Settings of kvpool-master. Durations are milliseconds, sizes bytes."""

    port: int = setting(50088, PORT, "gRPC port for everybody; 0 takes a free one.")
    host: str = setting("0.0.0.0", HOST, "Address to listen on.")
    data_port: int = setting(0, PORT, "Port of the fast lookup path; clients learn it from --port. 0 takes a free one.")
    eviction_high_watermark_ratio: float = setting(0.99, RATIO, "Evict when a node is fuller than this.")
    eviction_ratio: float = setting(0.01, RATIO, "Share of a node's bytes to free in one go.")
    default_kv_lease_ttl: int = setting("10s", DURATION, "How long a lookup keeps blocks from eviction.")
    client_ttl: int = setting("10s", DURATION, "A node unheard of for this long is dead.")
    metrics_port: int = setting(0, PORT, "Serve Prometheus metrics on this port; 0 is off.")
    data_dir: str | None = setting(None, PATH, "Keep the catalog here: files, pins, namespaces; else all is forgotten.")
    insecure: bool = setting(False, BOOL, "Answer peers of other hosts without TLS or a token.")
    storage_high_watermark_ratio: float = setting(0.95, RATIO, "Remove files when a backend is fuller than this.")
    storage_eviction_ratio: float = setting(0.05, RATIO, "Share of a backend's bytes to free in one go.")
    max_blocks: int = setting(16777216, count(1, 1 << 30), "Blocks the index may hold.")
    log_level: str = setting("info", LOG_LEVEL, "What to log.")

    def _check(self) -> None:
        for name, most in (
            ("eviction_ratio", "eviction_high_watermark_ratio"),
            ("storage_eviction_ratio", "storage_high_watermark_ratio"),
        ):
            ratio, high = getattr(self, name), getattr(self, most)
            if ratio > high:
                raise ConfigError(name, f"must be at most {most} ({high}), not {ratio}")


@dataclass(frozen=True, kw_only=True)
class NodeSettings(Settings):
    """Settings of kvpool-node. Sizes are bytes."""

    master: str = setting("127.0.0.1:50088", ADDRESS, "The master.")
    segment_size: int = setting("1GB", SIZE, "Memory to give to the pool: bytes, or with KB, MB, GB, TB.")
    host: str = setting("0.0.0.0", HOST, "Address to listen on for other hosts.")
    port: int = setting(0, PORT, "Port for other hosts; 0 takes a free one.")
    advertise_host: str | None = setting(None, HOST, "Address that other hosts reach this node by.", shown="found out")
    socket_path: str = setting(
        default_socket_path,
        SOCKET_PATH,
        "Unix socket for clients of this host.",
        shown="in this user's runtime directory",
    )
    socket_mode: int = setting(0o600, MODE, "File mode of the socket: who may connect.", shown="0600")
    node_id: str | None = setting(None, TEXT, "Stable name of this node.", shown="kept from start to start")
    metrics_port: int = setting(0, PORT, "Serve Prometheus metrics on this port; 0 is off.")
    data_dir: str | None = setting(None, PATH, "Directory for what outlives the process.")
    pipeline: str | None = setting(
        None,
        choice("Cache", "Cache|Posix", "Cache|Object", "Posix", "Object", metavar="PIPELINE"),
        'Tiers in order: "Cache", "Cache|Posix", "Cache|Object"; with "Posix" or "Object" alone memory is a buffer.',
        shown="what storage_backends are, behind Cache",
    )
    storage_backends: tuple[str, ...] | None = setting(
        None, BACKENDS, "Where files go, balanced by key: directories, shared or not, or fsspec URLs (s3://bucket/pool)."
    )
    storage_options: Mapping[str, Any] | None = setting(
        None, MAPPING, "Options of an fsspec backend: key, secret, endpoint_url, ..."
    )
    storage_capacity: int | None = setting(
        None, SIZE, "Bytes of files in each backend; the first node's word is kept in the backend.",
        shown="90 % of what is free",
    )  # fmt: skip
    storage_write_policy: str = setting(
        "write_through",
        choice("write_through", "write_through_selective"),
        "Write every block behind, or only what is used a second time.",
    )
    storage_queue_size: int = setting("1GB", SIZE, "Bytes that may wait to be written; what comes more is not written.")
    storage_threads: int = setting(4, count(1, 64), "Threads that read and write files, for each backend.")
    storage_processes: int = setting(
        4, count(0, 64), "Of these threads, those with a process beside the node for small files in a directory."
    )
    storage_direct: str = setting("auto", choice("auto", "off"), "O_DIRECT where the filesystem can, or never.")
    storage_fsync: str = setting(
        "off", choice("off", "data", "full"), "Await the disk for nothing, for each file's data, or for its name too."
    )
    storage_timeout: int = setting("2s", DURATION, "A backend that keeps a read or write waiting this long is down.")
    cache_buffer_capacity_gb: float | None = setting(
        None, GIGABYTES, "Another name for segment_size, in GiB.", shown="segment_size"
    )
    lock_memory: bool = setting(True, BOOL, "Lock the segment in memory where the limits allow it.")
    insecure: bool = setting(False, BOOL, "Answer peers of other hosts without TLS or a token.")
    connections_max: int = setting(256, count(1, 65536), "Connections at once.")
    log_level: str = setting("info", LOG_LEVEL, "What to log.")

    def _check(self) -> None:
        """Fill in what follows from other settings."""
        if self.cache_buffer_capacity_gb is not None:
            object.__setattr__(self, "segment_size", round(self.cache_buffer_capacity_gb * (1 << 30)))
        _check_storage(self)


STORAGE_CAPACITY_MIN = 1 << 20


def _check_storage(settings: NodeSettings | ClientSettings) -> None:
    """Fill in the pipeline, and check that what concerns storage fits together."""
    if settings.pipeline is None:
        object.__setattr__(settings, "pipeline", default_pipeline(settings.storage_backends or ()))
    if (settings.pipeline == "Cache") == bool(settings.storage_backends):
        if settings.storage_backends:
            raise ConfigError("pipeline", '"Cache" has no files: leave out either it or storage_backends')
        raise ConfigError("pipeline", f'"{settings.pipeline}" needs storage_backends')
    urls = [backend for backend in settings.storage_backends or () if directory_of(backend) is None]
    if "Posix" in str(settings.pipeline) and urls:
        raise ConfigError("pipeline", f'"{settings.pipeline}" is for directories, a backend is a URL: leave it out')
    if "Object" in str(settings.pipeline) and not any("://" in backend for backend in settings.storage_backends or ()):
        raise ConfigError("pipeline", f'"{settings.pipeline}" is for URLs, all backends are directories: leave it out')
    if settings.storage_capacity is not None and settings.storage_capacity < STORAGE_CAPACITY_MIN:
        raise ConfigError("storage_capacity", f"must be at least 1MB, not {settings.storage_capacity}")
    if "Object" not in str(settings.pipeline) and settings.storage_options:
        raise ConfigError("storage_options", f'means nothing with pipeline "{settings.pipeline}"')


def default_pipeline(backends: Iterable[str]) -> str:
    """Return the pipeline of a node with these backends."""
    if not backends:
        return "Cache"
    return "Cache|Object" if any(directory_of(b) is None for b in backends) else "Cache|Posix"


AUTOSTARTED = (
    "cache_buffer_capacity_gb", "pipeline", "storage_backends", "storage_options", "storage_capacity",
    "storage_write_policy", "storage_queue_size", "storage_threads", "storage_processes", "storage_direct",
    "storage_fsync", "storage_timeout", "insecure",
)  # fmt: skip
"""Settings that a client passes on to a node which it starts."""


def _as_node(name: str) -> Any:
    """Return the field of a setting that an autostarted node is given."""
    item = NodeSettings.__dataclass_fields__[name]
    said = item.metadata["help"]
    text = f"{said if said.endswith('...') else said.removesuffix('.')} (of an autostarted node)."
    return setting(item.default, item.metadata["kind"], text, shown=item.metadata["shown"])


@dataclass(frozen=True, kw_only=True)
class ClientSettings(Settings):
    """Settings of a client, as an engine's connector reads them. Durations are milliseconds, sizes bytes."""

    master: str = setting("127.0.0.1:50088", ADDRESS, "The master.")
    node: str | None = setting(None, SOCKET_PATH, "Unix socket of this host's node.", shown="asked of the master")
    checksum: str = setting("always", choice("always", "transfer"), "When to verify what was loaded.")
    copy_threads: int = setting(2, count(1, 64), "Threads that copy and hash.")
    lookup_timeout: int = setting("40ms", DURATION, "How long a lookup may take before it is a miss.")
    transfer_timeout: int = setting("1s", DURATION, "How long a put or get may take before it ends.")
    connect_timeout: int = setting("400ms", DURATION, "How long connecting to another host's node may take.")
    autostart_node: bool = setting(
        False, BOOL, "Start a node when this host has none; it ends with the engine that started it."
    )
    segment_size: int = setting("1GB", SIZE, "Size of an autostarted node's segment, per local rank.")
    advertise_host: str | None = setting(None, HOST, "Address that other hosts reach an autostarted node by.")
    cache_buffer_capacity_gb: float | None = setting(
        None, GIGABYTES, "Size of an autostarted node's segment, in GiB, for all ranks together.", shown="segment_size"
    )
    pipeline: str | None = _as_node("pipeline")
    storage_backends: tuple[str, ...] | None = _as_node("storage_backends")
    storage_options: Mapping[str, Any] | None = _as_node("storage_options")
    storage_capacity: int | None = _as_node("storage_capacity")
    storage_write_policy: str = _as_node("storage_write_policy")
    storage_queue_size: int = _as_node("storage_queue_size")
    storage_threads: int = _as_node("storage_threads")
    storage_processes: int = _as_node("storage_processes")
    storage_direct: str = _as_node("storage_direct")
    storage_fsync: str = _as_node("storage_fsync")
    storage_timeout: int = _as_node("storage_timeout")
    insecure: bool = _as_node("insecure")

    def _check(self) -> None:
        if self.autostart_node:  # else they are somebody else's
            _check_storage(self)


@dataclass(frozen=True, kw_only=True)
class ConnectorSettings(ClientSettings):
    """Settings of an engine's connector: a client's, and what it does with it."""

    load_threads: int = setting(2, count(1, 64), "Requests loaded at once.")
    save_threads: int = setting(1, count(1, 64), "Requests saved at once.")
    load_async: bool = setting(True, BOOL, "Load while other requests run; false loads before the step that needs it.")
    use_layerwise: bool = setting(False, BOOL, "Load the next layers while a layer computes.")
    layerwise_prefetch_layers: int = setting(1, count(1, 1024), "Layers on their way ahead of the computing one.")
    save_decode_cache: bool = setting(False, BOOL, "Save the blocks of generated tokens too.")
    discard_partial_chunks: bool = setting(True, BOOL, "Leave out a prompt's last block where it is not full.")
    save_min_tokens: int = setting(0, TOKENS, "Save nothing of prompts shorter than this.")
    load_min_tokens: int = setting(0, TOKENS, "Load nothing into prompts shorter than this.")
    save_queue_blocks: int = setting(
        0, count(0, 1 << 24), "Blocks that may wait to be saved; more are dropped.", shown="a quarter of the engine's"
    )
    producer_is_to_load: bool = setting(False, BOOL, "With kv_role kv_producer: load too.")
    consumer_is_to_load: bool = setting(False, BOOL, "With kv_role kv_consumer: load.")
    consumer_is_to_put: bool = setting(False, BOOL, "With kv_role kv_consumer: save too.")
    transfer: str = setting(
        "auto", choice("auto", "true", "false"), "Move prompts between prefilling and decoding engines; auto: by name."
    )
    transfer_ttl: int = setting("5m", DURATION, "How long a prompt that was prefilled waits for its decoding engine.")
    transfer_open_timeout: int = setting(
        "10s", DURATION, "How long a decoding engine waits for a prefill to begin before it computes the prompt."
    )
    prefetch: bool = setting(True, BOOL, "Have a request's blocks read from files while it waits for its turn.")
    gate: str = setting("auto", choice("auto", "off"), "Skip loads slower than computing; off loads all.")
    report_residency: bool = setting(
        False, BOOL, "Tell the master what the engine's own cache holds, even where the engine's KV events are off."
    )
    head_groups: int = setting(
        0, count(0, 256), "Parts that the KV heads of a block are stored in, alike on all engines that share.",
        shown="the least common multiple of the TPs",
    )  # fmt: skip
    prefill_tp_size: int = setting(0, count(0, 1 << 16), "TP of engines that prefill.", shown="this engine's")
    decode_tp_size: int = setting(0, count(0, 1 << 16), "TP of engines that decode.", shown="this engine's")
    engine_address: str | None = setting(
        None, ADDRESS, "Where requests reach the engine, for routers.", shown="as engine_id or vllm serve say"
    )
    breaker_failures: int = setting(3, count(1, 1000), "Failures in a row after which a node or master is left alone.")
    breaker_probe_interval: int = setting("1s", DURATION, "How often who is left alone is tried again.")
    client_factory: str = setting(
        "kvpool_vllm.settings:make_client", TEXT, "MODULE:FUNCTION that makes the client; tests inject a faulty one."
    )


COMPONENTS: tuple[type[Settings], ...] = (
    MasterSettings, NodeSettings, ClientSettings, ConnectorSettings, ProxySettings,
)  # fmt: skip
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    """Checked settings, where each value came from, and lines worth logging once at start."""

    settings: S
    sources: dict[str, str]
    notes: list[str]


# ---- loading ---------------------------------------------------------------------------------------


def load(
    cls: type[S],
    *,
    flags: Mapping[str, Any],
    config_path: str | None = None,
    environ: Mapping[str, str] = os.environ,
    flags_from: str = "",
    origins: Mapping[str, str] = MappingProxyType({}),
    foreign: Mapping[str, tuple[Any, str]] = MappingProxyType({}),
) -> Loaded[S]:
    """Return the settings of one component from flags, environment, file and defaults.

    Flags that are None count as not given; ``flags_from`` names their origin when it is no command line, ``origins``
    that of single ones. ``foreign`` are values with their origin that other systems' settings were translated to;
    they win over the file. Raises ConfigError naming the field, where its value came from, and what is allowed.
    """
    notes: list[str] = []
    known = {item.name: item for item in dataclasses.fields(cls)}
    values: dict[str, tuple[Any, str]] = {}

    config_path = config_path or environ.get(CONFIG_ENV) or None
    mooncake_path = environ.get(MOONCAKE_ENV) if cls is not MasterSettings else None
    if config_path and mooncake_path:
        notes.append(f"{config_path} is used; {MOONCAKE_ENV}={mooncake_path} is not, because --config wins")
    path = config_path or mooncake_path
    given: dict[str, tuple[Any, str]] = {}
    for name, value in flags.items():
        if value is None:
            continue
        if name not in known:
            raise ConfigError(name, no_such_setting(name, known) + (f" (from {flags_from})" if flags_from else ""))
        given[name] = (value, origins.get(name) or flags_from or f"flag --{name}")
    for layer in (  # each wins over those before
        _file_values(cls, path, notes, mooncake=not config_path) if path else {},
        {name: value for name, value in foreign.items() if value[0] is not None},
        _environment_values(known, _all_names(cls), environ),
        given,
    ):
        _put_over(values, layer)

    parsed: dict[str, Any] = {}
    for name, (value, source) in values.items():
        try:
            parsed[name] = parsed_value(known[name], value)
        except ConfigError as error:
            raise ConfigError(error.field, f"{error.problem} (from {source})") from None
    sources = {name: values[name][1] if name in values else "default" for name in known}
    try:
        return Loaded(cls(**parsed), sources, notes)
    except ConfigError as error:  # of several fields at once
        raise ConfigError(error.field, f"{error.problem} (from {sources.get(error.field, 'default')})") from None


SIZE_NAMES = ("segment_size", "cache_buffer_capacity_gb")
"""Two names for one thing: who gives one of them means neither of what was said before."""


def _put_over(values: dict[str, tuple[Any, str]], layer: Mapping[str, tuple[Any, str]]) -> None:
    sizes = layer.keys() & set(SIZE_NAMES)
    if len(sizes) > 1:
        name, other = SIZE_NAMES
        raise ConfigError(other, f"means the same as {name}: give one of the two (from {layer[other][1]})")
    for name in SIZE_NAMES if sizes else ():
        values.pop(name, None)
    values.update(layer)


def _all_names(cls: type[Settings]) -> set[str]:
    """Return the names of all components, and of ``cls``, which may extend one of them."""
    return {item.name for component in (*COMPONENTS, cls) for item in dataclasses.fields(component)}


def _environment_values(
    known: Mapping[str, Any], everyone: set[str], environ: Mapping[str, str]
) -> dict[str, tuple[Any, str]]:
    values: dict[str, tuple[Any, str]] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable.startswith(_RESERVED_PREFIXES):
            continue
        if variable == CONFIG_ENV or _SERVICE_LINK.fullmatch(variable):
            continue
        if variable.endswith("_PORT") and _SERVICE_URL.match(value):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in everyone or variable != variable.upper():
            raise ConfigError(variable, no_such_setting(name, everyone, lambda near: ENV_PREFIX + near.upper()))
        if name in known and value:  # set but empty counts as not set, as templates leave it
            values[name] = (value, variable)
    return values


def child_environment(values: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a program of ours, with these settings in it: secrets are seen on command lines."""
    return {**environ, **{f"{ENV_PREFIX}{name.upper()}": value for name, value in values.items()}}


def plain_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a program whose settings are all on its command line: none of those around us."""
    return {
        name: value
        for name, value in environ.items()
        if name != MOONCAKE_ENV and (not name.startswith(ENV_PREFIX) or name.startswith(_RESERVED_PREFIXES))
    }


def foreign_environment(names: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return those of other systems' variables that are set and not empty."""
    return {name: environ[name] for name in names if environ.get(name)}


def _file_values(cls: type[Settings], path: str, notes: list[str], *, mooncake: bool) -> dict[str, tuple[Any, str]]:
    content = read_file(path)
    everyone = _all_names(cls)
    theirs: Mapping[str, str] = {}  # keys of other systems, by our names
    if mooncake or MOONCAKE_SIGNS & content.keys():
        content, theirs = from_mooncake(content, path, notes), KVPOOL_TO_MOONCAKE
    elif UCM_SIGNS & content.keys():
        content, theirs = from_ucm(content, path, notes)
    known = {item.name: item for item in dataclasses.fields(cls)}
    values: dict[str, tuple[Any, str]] = {}
    elsewhere = []
    for name, value in content.items():
        if name not in everyone:
            raise ConfigError(name, f"{no_such_setting(name, everyone)} (from {path})")
        if name not in known:
            elsewhere.append(name)
        elif known[name].metadata["kind"] is MODE and isinstance(value, int):
            # YAML reads 0660 as 432, and 440 as what stands there: nobody can tell which of the two was meant.
            raise ConfigError(name, f'{value} is not allowed; write it in quotes, for example "0660" (from {path})')
        elif value is not None:
            values[name] = (value, f"{path}: {theirs[name]}" if name in theirs else path)
    if elsewhere:
        notes.append(f"{path}: meant for other parts of kvpool, not used here: {', '.join(sorted(elsewhere))}")
    return values


def boot_id() -> str:
    """Return the kernel's boot id: two processes with the same one share a host; "" where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
