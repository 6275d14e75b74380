"""The settings of kvpool-proxy."""

from __future__ import annotations

from dataclasses import dataclass

from kvpool.config_base import Settings, setting
from kvpool.config_kinds import (
    ADDRESS,
    BOOL,
    DURATION,
    HOST,
    HOSTS,
    LOG_LEVEL,
    PORT,
    PORTS,
    SIZE,
    TEXT,
    URLS,
    choice,
    count,
)
from kvpool.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ProxySettings(Settings):
    """Settings of kvpool-proxy. Durations are milliseconds, sizes bytes."""

    host: str = setting("0.0.0.0", HOST, "Address to listen on.")
    port: int = setting(8000, PORT, "Port to listen on; 0 takes a free one.")
    prefiller_hosts: tuple[str, ...] | None = setting(None, HOSTS, "Hosts of the prefill instances, one for each port.")
    prefiller_ports: tuple[int, ...] | None = setting(None, PORTS, "Ports of the prefill instances.")
    decoder_hosts: tuple[str, ...] | None = setting(None, HOSTS, "Hosts of the decode instances, one for each port.")
    decoder_ports: tuple[int, ...] | None = setting(None, PORTS, "Ports of the decode instances.")
    instances: tuple[str, ...] | None = setting(None, URLS, "Instances that prefill and decode themselves.")
    master: str | None = setting(None, ADDRESS, "The pool's master, to ask what lies where.", shown="nobody is asked")
    discover: str = setting(
        "auto", choice("auto", "on", "off"), "Take engines that announce themselves; auto: where no instance is named."
    )
    hash_seed: str | None = setting(
        None, TEXT, "PYTHONHASHSEED of the instances, where it is set.", shown="the seed of engines without one"
    )
    lookup_timeout: int = setting(
        "100ms", DURATION, "How long the master, and an instance for tokens, may take before the proxy decides alone."
    )
    policy: str = setting(
        "prefix", choice("prefix", "round_robin"), "Choose by prefixes held and load, or each in turn."
    )
    skip_prefill: str = setting(
        "pool", choice("pool", "blocks", "off"),
        "Leave prefill out where a decode instance can load the prompt from the pool, or all but a part of a block.",
    )  # fmt: skip
    decode_start: str = setting(
        "auto", choice("auto", "with_prefill", "after_prefill"),
        "When the decode instance is asked; auto: with the prefill where both load layer by layer.",
    )  # fmt: skip
    api_key: str | None = setting(None, TEXT, "Ask this of clients as a bearer token, and give it to the instances.")
    insecure: bool = setting(False, BOOL, "Let peers of other hosts change instances without api_key.")
    instance_requests_max: int = setting(256, count(1, 1 << 20), "Requests at once for one instance; more wait.")
    queue_max: int = setting(1024, count(0, 1 << 20), "Requests that may wait for an instance; more are refused.")
    queue_timeout: int = setting("30s", DURATION, "How long a request waits for an instance.")
    attempts_max: int = setting(3, count(1, 100), "Instances that a request is tried on.")
    connect_timeout: int = setting("2s", DURATION, "How long connecting to an instance may take.")
    first_byte_timeout: int = setting("5m", DURATION, "How long a stream's first token may take, and a prefill.")
    idle_timeout: int = setting(
        "1m", DURATION, "How long a request or a stream may stand still, and a client take nothing of an answer."
    )
    request_timeout: int = setting("1h", DURATION, "How long a request may take in all, its arrival included.")
    drain_timeout: int = setting("30s", DURATION, "How long requests may go on once the proxy was told to end.")
    health_interval: int = setting("2s", DURATION, "How often instances are asked for their health.")
    health_timeout: int = setting("2s", DURATION, "How long such an answer may take.")
    body_size_max: int = setting("64MB", SIZE, "Largest request, and largest answer that is no stream.")
    bodies_size_max: int = setting(
        "1GB", SIZE, "Memory for requests held at once, reckoned by their bytes and values, those still read included."
    )
    prefix_tokens: int = setting(
        1 << 20, count(1, 1 << 32), "Tokens of prompts remembered for an instance that does not say what it can hold."
    )
    log_level: str = setting("info", LOG_LEVEL, "What to log.")

    def _check(self) -> None:
        """Check that hosts and ports belong together."""
        for side in ("prefiller", "decoder"):
            hosts, ports = getattr(self, f"{side}_hosts"), getattr(self, f"{side}_ports")
            if hosts and not ports:
                raise ConfigError(f"{side}_hosts", f"needs as many {side}_ports")
            if ports and not hosts:
                object.__setattr__(self, f"{side}_hosts", ("127.0.0.1",) * len(ports))
            elif ports and len(hosts) != len(ports):
                raise ConfigError(
                    f"{side}_ports", f"must be as many as {side}_hosts: {len(hosts)}, not {len(ports)}"
                )
        if self.instances and (self.prefiller_ports or self.decoder_ports):
            raise ConfigError("instances", "goes without prefiller_ports and decoder_ports")
        if self.discover == "on" and self.master is None:
            raise ConfigError("discover", "needs master, to whom engines announce themselves")
        if self.prefiller_ports and not self.decoder_ports and not self.discovers:
            raise ConfigError("prefiller_ports", "needs decoder_ports: somebody has to decode")

    @property
    def discovers(self) -> bool:
        """Whether engines that announce themselves become instances."""
        if self.discover == "auto":
            return self.master is not None and not (self.instances or self.prefiller_ports or self.decoder_ports)
        return self.discover == "on"

    def urls(self, side: str) -> tuple[str, ...]:
        """Return the base URLs of the prefillers or decoders."""
        hosts, ports = getattr(self, f"{side}_hosts") or (), getattr(self, f"{side}_ports") or ()
        return tuple(f"http://[{h}]:{p}" if ":" in h else f"http://{h}:{p}" for h, p in zip(hosts, ports, strict=True))
