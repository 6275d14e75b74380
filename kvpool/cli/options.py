"""What every command shares: options derived from settings, lazy groups, one line for a bad setting."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from kvpool import __version__
from kvpool.config import BOOL, CONFIG_ENV, ENV_PREFIX, MOONCAKE_ENV, Kind, Loaded, MasterSettings, Settings, load
from kvpool.errors import ConfigError, InvalidArgumentError, KVPoolError

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=Settings)

# Mooncake's operators type underscores, everybody else dashes: both are the same option.
CONTEXT: dict[str, Any] = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}


class RefusedUsage(click.ClickException):
    """A value that is not allowed: one line and exit code 2."""

    exit_code = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn kvpool's own errors into one line: exit code 2 for bad input, 1 for the rest."""
    try:
        yield
    except InvalidArgumentError as error:
        raise RefusedUsage(str(error)) from None
    except KVPoolError as error:
        raise click.ClickException(str(error)) from None


def version_option(program: str) -> Callable[[F], F]:
    """Return ``--version`` for a program."""
    return click.version_option(__version__, prog_name=program)


def setting_option(item: dataclasses.Field[Any]) -> Callable[[F], F]:
    """Return the option for one setting; its value stays text until the settings check it."""
    kind: Kind = item.metadata["kind"]
    shown = item.metadata["shown"]
    if kind is BOOL:
        spelling = f"--{item.name}/--no_{item.name}"
        shown = shown.lower()
    else:
        spelling = f"--{item.name}"
    default = f"default: {shown}; " if shown else ""
    text = f"{item.metadata['help']}  [{default}{ENV_PREFIX}{item.name.upper()}]"
    if kind is BOOL:
        return click.option(spelling, item.name, default=None, help=text)
    return click.option(spelling, item.name, default=None, metavar=kind.metavar, help=text)


def settings_options(cls: type[Settings], *, leave_out: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Give a command one option for each setting of ``cls``, and ``--config``."""
    mooncake = "" if cls is MasterSettings else f" or {MOONCAKE_ENV}"

    def decorate(function: F) -> F:
        for item in reversed(dataclasses.fields(cls)):
            if item.name not in leave_out:
                function = setting_option(item)(function)
        text = f"YAML or JSON file with the same names; also a mooncake.json or UCM's YAML.  [{CONFIG_ENV}{mooncake}]"
        return click.option("--config", metavar="FILE", help=text)(function)

    return decorate


def load_settings(cls: type[S], flags: Mapping[str, Any], config: str | None) -> Loaded[S]:
    """Return checked settings, or end the program with one line and exit code 2."""
    try:
        return load(cls, flags=flags, config_path=config)
    except ConfigError as error:
        raise RefusedUsage(str(error)) from None


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy  # name -> (module:attribute, one line of help)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in the order they were given."""
        return [*self._lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{attribute} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        rows = [(name, text) for name, (_, text) in self._lazy.items()]
        for name in super().list_commands(ctx):
            command = super().get_command(ctx, name)
            if command is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(limit=80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)
