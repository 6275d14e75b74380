"""``kvpool-bench``: the benchmarks, each imported when it is asked for."""

from __future__ import annotations

import click

from kvpool.cli.options import CONTEXT, LazyGroup, open_output, version_option

BENCHES = {
    "store": ("kvpool.bench.store:command", "Put and get: local and remote, beside a memory copy and a bare TCP copy."),
    "lookup": ("kvpool.bench.lookup:command", "Lookups and the index: latency, rate, memory."),
    "trace": ("kvpool.bench.trace:command", "Replay a trace of requests through a pool: the hit rate."),
    "fs": ("kvpool.bench.fs:command", "The file tier on a directory, beside raw files and other designs; a restart."),
    "device": ("kvpool.bench.device:command", "Copies between a GPU's blocks and a node's slots."),
    "ttft": ("kvpool.bench.ttft:command", "Real vLLM engines: the time to the first token, and what saving costs."),
    "pd": ("kvpool.bench.pd:command", "Conversations through kvpool-proxy: routed by prefixes, and in turn."),
}


@click.group("bench", cls=LazyGroup, lazy=BENCHES, context_settings=CONTEXT)
@version_option("kvpool-bench")
def command() -> None:
    """Measure a pool: a running one by --master, or one that the benchmark starts.

    \b
    Examples:
      kvpool-bench store --json store.json
      kvpool-bench lookup --master 10.0.0.7:50088
      kvpool-bench fs /mnt/kv
      kvpool-bench trace conversation_trace.jsonl
    """


def main() -> None:
    """Run kvpool-bench."""
    open_output()
    command(prog_name="kvpool-bench")


if __name__ == "__main__":
    main()
