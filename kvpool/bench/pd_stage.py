"""What a workload is sent to: engines, ours or given ones, and a proxy for each way of routing in front."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from kvpool.bench.pd_counts import Counters
from kvpool.bench.pool import BenchPool, bench_children
from kvpool.bench.ttft_engines import HOST, EngineSpec, Model, Python, end_groups, kvpool_transfer
from kvpool.bench.ttft_http import Server
from kvpool.server.launch import free_port, join_address

START_S: Final = 60.0
LEARN_S: Final = 30.0
POLL_S: Final = 0.3
ROUND_ROBIN: Final = "round robin"
PREFIX: Final = "prefix"
POLICIES: Final[Mapping[str, str]] = {ROUND_ROBIN: "round_robin", PREFIX: "prefix"}

NIXL: Final[Mapping[str, Any]] = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_buffer_device": "cpu",
}
NIXL_ENVIRONMENT: Final[Mapping[str, str]] = {"UCX_TLS": "tcp,sm,self", "UCX_NET_DEVICES": "lo"}


def host(number: int) -> str:
    """Return the address of machine ``number``, from 0: each engine and its node count as on one of their own."""
    return f"127.0.0.{number + 1}"


@dataclass(frozen=True, slots=True)
class Shape:
    """How many engines, and what they are: ``decode`` 0 means that all of them do everything."""

    serving: int
    decode: int = 0
    connector: str = "kvpool"
    """kvpool, nixl, or none."""

    @property
    def engines(self) -> int:
        """All of them."""
        return self.serving + self.decode

    @property
    def words(self) -> str:
        """What to call it in a table."""
        return f"{self.serving}P{self.decode}D" if self.decode else f"{self.serving} engines"


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """Of every engine."""

    blocks: int
    block_tokens: int
    model_tokens_max: int
    arguments: tuple[str, ...] = ()


def engine_specs(
    shape: Shape, sizes: EngineSizes, python: Python, model: Model, pool: BenchPool | None, more: Mapping[str, Any]
) -> list[EngineSpec]:
    """Return what the engines of a shape are started with; ``more``: keys of our connector's extra config."""
    specs = []
    for number in range(shape.engines):
        role = "kv_both"
        if shape.decode:
            role = "kv_producer" if number < shape.serving else "kv_consumer"
        transfer: dict[str, Any] | None = None
        environment: dict[str, str] = {}
        if shape.connector == "nixl":
            transfer = dict(NIXL)
            environment = {
                **NIXL_ENVIRONMENT,
                "VLLM_NIXL_SIDE_CHANNEL_HOST": host(number),
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port(host(number))),
            }
        elif pool is not None:
            transfer = kvpool_transfer(
                pool.master, pool.sockets[number % len(pool.sockets)], {"report_residency": True, **more}
            )
            transfer["kv_role"] = role
        specs.append(
            EngineSpec(
                f"{role.removeprefix('kv_')} {number + 1}", python, model, sizes.blocks, sizes.block_tokens,
                sizes.model_tokens_max, transfer, environment, sizes.arguments, resettable=True, host=host(number),
            )
        )  # fmt: skip
    return specs


@dataclass(slots=True)
class Stage:
    """Engines that run, and the proxies in front of them by routing."""

    serving: Sequence[Server]
    decoding: Sequence[Server] = ()
    proxies: dict[str, Server] = field(default_factory=dict)

    @property
    def counters(self) -> Counters:
        """Those of all engines."""
        return Counters(self.serving, self.decoding)


@contextmanager
def proxies(stage: Stage, routings: Mapping[str, str], master: str | None, more: Sequence[str]) -> Iterator[None]:
    """Run a proxy for each routing (name to policy) in front of all engines, and note it in ``stage.proxies``."""
    children = bench_children()
    try:
        for name, policy in routings.items():
            port = free_port(HOST)
            arguments = ["--host", HOST, "--port", str(port), "--policy", policy, "--log_level", "warning"]
            if master and policy == "prefix":
                arguments += ["--master", master]
            arguments += [*_sides(stage), *more]
            children.start(f"proxy, {name}", "kvpool.cli.proxy", arguments)
            stage.proxies[name] = Server(
                f"http://{join_address(HOST, port)}", model=stage.serving[0].model, ignore_eos=True
            )
        deadline = time.monotonic() + START_S
        for name, proxy in stage.proxies.items():
            children.wait_until(proxy.is_healthy, f"the proxy, {name}, was not ready", deadline)
        yield
    finally:
        end_groups(children.children)


def _sides(stage: Stage) -> list[str]:
    if not stage.decoding:
        return ["--instances", *(server.url for server in stage.serving)]
    arguments = []
    for flag, servers in (("prefiller", stage.serving), ("decoder", stage.decoding)):
        arguments += [f"--{flag}_hosts", *(server.host for server in servers)]
        arguments += [f"--{flag}_ports", *(str(server.port) for server in servers)]
    return arguments


def learn(stage: Stage, prompt: str, output_tokens: int, timeout_s: float) -> bool:
    """Send a prompt to a proxy that asks a master until it was told something; False where that never came."""
    proxy = stage.proxies.get(PREFIX)
    deadline = time.monotonic() + LEARN_S
    while proxy is not None and time.monotonic() < deadline:
        proxy.complete(prompt, output_tokens, timeout_s)
        if proxy.sample('kvpool_proxy_lookups_total{outcome="found"}'):
            return True
        time.sleep(POLL_S)
    return proxy is None
