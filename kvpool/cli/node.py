"""``kvpool-node``: parse, check, run."""

from __future__ import annotations

import sys
from typing import Any

import click

from kvpool.cli.options import CONTEXT, load_settings, one_line_errors, settings_options, version_option
from kvpool.config import NodeSettings


@click.command("node", context_settings=CONTEXT)
@settings_options(NodeSettings)
@version_option("kvpool-node")
def command(config: str | None, **flags: Any) -> None:
    """Run this host's node: it gives memory to the pool and keeps the blocks in it.

    \b
    Examples:
      kvpool-node --master 10.0.0.7:50088 --segment_size 100GB
      kvpool-node --master 10.0.0.7:50088 --segment_size 100GB --socket_mode 0660 --socket_path /run/kvpool/node.sock
      MOONCAKE_CONFIG_PATH=mooncake.json kvpool-node
      kvpool-node --master 10.0.0.7:50088 --segment_size 100GB --storage_backends /mnt/kv
    Sizes are bytes or 1GB, 512MB (powers of 1024).
    """
    loaded = load_settings(NodeSettings, flags, config)
    given = [name for name, source in loaded.sources.items() if name.startswith("storage_") and source != "default"]
    if given and not loaded.settings.storage_backends:
        loaded.notes.append(f"without storage_backends there are no files; not used: {', '.join(given)}")
    from kvpool.server.node import run

    with one_line_errors():
        sys.exit(run(loaded.settings, loaded.notes))


def main() -> None:
    """Run kvpool-node."""
    command(prog_name="kvpool-node")


if __name__ == "__main__":
    main()
