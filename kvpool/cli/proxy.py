"""``kvpool-proxy``: parse, check, run."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Final

import click

from kvpool.cli.options import CONTEXT, load_settings, one_line_errors, settings_options, version_option
from kvpool.config import ProxySettings

_MANY: Final = frozenset(
    item.name for item in dataclasses.fields(ProxySettings) if item.metadata["kind"].metavar.endswith(" ...")
)


class ManyValues(click.Command):
    """A command whose options may have several values after one flag: ``--decoder-ports 9000 9001``.

    ``--decoder-port`` is the same: who writes one value leaves out the s, which other proxies' parsers let pass.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join the values of such options before click reads them."""
        joined: list[str] = []
        values: list[str] | None = None
        for word in args:
            if word.startswith("-"):
                values = None
            elif values is not None:
                values.append(word)
                joined[-1] = ",".join(values)
                continue
            name, equals, value = word.partition("=")
            bare = name.removeprefix("--").replace("-", "_")
            if bare in _MANY or f"{bare}s" in _MANY:
                values = [value] if equals else []
                joined += [name if bare in _MANY else f"{name}s", value]
            else:
                joined.append(word)
        return super().parse_args(ctx, joined)


@click.command("proxy", cls=ManyValues, context_settings=CONTEXT)
@settings_options(ProxySettings)
@version_option("kvpool-proxy")
def command(config: str | None, **flags: Any) -> None:
    """Hand requests in OpenAI's form to engines: to those that hold a prompt's prefix, as long as they are free.

    \b
    Examples:
      kvpool-proxy --port 8000 --instances 10.0.0.1:8100 10.0.0.2:8100 --master 10.0.0.7:50088
      kvpool-proxy --port 8000 --prefiller-hosts 10.0.0.1 10.0.0.1 --prefiller-ports 9000 9001 \\
        --decoder-hosts 10.0.0.2 10.0.0.2 --decoder-ports 9000 9001
    Durations are milliseconds or 5s, 1h; sizes bytes or 64MB.
    """
    loaded = load_settings(ProxySettings, flags, config)
    from kvpool.proxy.server import run

    with one_line_errors():
        sys.exit(run(loaded.settings, loaded.notes))


def main() -> None:
    """Run kvpool-proxy."""
    command(prog_name="kvpool-proxy")


if __name__ == "__main__":
    main()
