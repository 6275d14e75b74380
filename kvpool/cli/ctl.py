"""``kvpoolctl``: look into a pool."""

from __future__ import annotations

import click

from kvpool.cli import ctl_blocks, ctl_engines, ctl_explain, ctl_fs, ctl_pins, ctl_pool, ctl_topology
from kvpool.cli.options import CONTEXT, open_output, version_option
from kvpool.cli.remote import EXIT_CODES_HELP, remote_options


@click.group("ctl", context_settings=CONTEXT, epilog=f"{EXIT_CODES_HELP}  6  the output cannot be written\n")
@remote_options
@version_option("kvpoolctl")
@click.pass_context
def command(ctx: click.Context, master: str | None, as_json: bool | None, timeout: str | None) -> None:
    """Look into a pool, keep blocks in it or drop them, and look after its files.

    \b
    Examples:
      kvpoolctl status
      kvpoolctl --master 10.0.0.7:50088 --json nodes
      kvpoolctl explain 9f86d081884c7d659a2feaa0c55ad015
      kvpoolctl evict --coldest 10GB
      kvpoolctl fs verify /mnt/kv
    """
    ctx.obj = {"master": master, "as_json": as_json, "timeout": timeout}


_COMMANDS = (
    ctl_pool.status, ctl_pool.nodes, ctl_engines.engines, ctl_pool.namespaces, ctl_blocks.lookup, ctl_explain.explain,
    ctl_blocks.evict, ctl_pins.pin, ctl_pins.unpin, ctl_pins.pins, ctl_fs.fs, ctl_topology.topology,
    ctl_topology.ranktable,
)  # fmt: skip
for _command in _COMMANDS:
    command.add_command(_command)


def main() -> None:
    """Run kvpoolctl."""
    open_output()
    command(prog_name="kvpoolctl")


if __name__ == "__main__":
    main()
