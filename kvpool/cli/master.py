"""``kvpool-master``: parse, check, run."""

from __future__ import annotations

import sys
from typing import Any

import click

from kvpool.cli.options import CONTEXT, load_settings, one_line_errors, settings_options, version_option
from kvpool.config import MasterSettings


@click.command("master", context_settings=CONTEXT)
@settings_options(MasterSettings)
@version_option("kvpool-master")
def command(config: str | None, **flags: Any) -> None:
    """Run the master: it knows which node holds which block, and decides what is evicted.

    \b
    Examples:
      kvpool-master --port 50088
      kvpool-master --port 50088 --eviction_high_watermark_ratio 0.95 --eviction_ratio 0.05
      kvpool-master --config pool.yaml --default_kv_lease_ttl 11000
    Sizes are bytes or 1GB, 512MB; durations milliseconds or 5s, 1h.
    """
    loaded = load_settings(MasterSettings, flags, config)
    from kvpool.server.master import run

    with one_line_errors():
        sys.exit(run(loaded.settings, loaded.notes))


def main() -> None:
    """Run kvpool-master."""
    command(prog_name="kvpool-master")


if __name__ == "__main__":
    main()
