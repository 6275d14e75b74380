"""``kvpool``: one program in front of all others."""

from __future__ import annotations

import click

from kvpool import __version__
from kvpool.cli.options import CONTEXT, LazyGroup, open_output, version_option

COMMANDS = {
    "up": ("kvpool.cli.up:command", "Run a master and nodes in one go: a laptop, a demo, a test."),
    "master": ("kvpool.cli.master:command", "Run the master (kvpool-master)."),
    "node": ("kvpool.cli.node:command", "Run this host's node (kvpool-node)."),
    "proxy": ("kvpool.cli.proxy:command", "Route requests to engines, by the prefixes they hold (kvpool-proxy)."),
    "ctl": ("kvpool.cli.ctl:command", "Look into a pool (kvpoolctl)."),
    "bench": ("kvpool.cli.bench:command", "Measure a pool (kvpool-bench)."),
}


@click.group("kvpool", cls=LazyGroup, lazy=COMMANDS, context_settings=CONTEXT)
@version_option("kvpool")
def command() -> None:
    """A KV-cache pool for LLM servers.

    \b
    Start here:
      kvpool up                 a pool on this machine
      kvpool ctl status         what is in it
    """


@command.command("version")
def version() -> None:
    """Print the version."""
    click.echo(__version__)


def main() -> None:
    """Run kvpool."""
    open_output()
    command(prog_name="kvpool")


if __name__ == "__main__":
    main()
