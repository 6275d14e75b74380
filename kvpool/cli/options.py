"""What every command shares: options derived from settings, lazy groups, one line for what is wrong, its output."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

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


class OutputError(click.ClickException):
    """Standard output cannot be written: one line and an exit code that means nothing else."""

    exit_code = 6


class _Output(io.FileIO):
    """Standard output that says once what is wrong with it; what follows is dropped, as nobody would get it."""

    def __init__(self) -> None:
        super().__init__(1, "wb", closefd=False)
        self._failed = False

    def write(self, data: Any) -> int:
        """Write bytes; raises OutputError, or Exit where the reader has left and wants to hear nothing."""
        if self._failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            if error.errno == errno.EPIPE:
                raise click.exceptions.Exit(OutputError.exit_code) from None
            raise OutputError(f"cannot write the output: {error.strerror}") from None


def open_output() -> None:
    """Make standard output one that takes any character and fails in one line: a program's first act."""
    stdout = cast("TextIO | None", sys.stdout)
    if stdout is None:  # whoever started us has closed it
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 -- for as long as we run
    else:
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output()), stdout.encoding, errors="replace", line_buffering=stdout.isatty()
        )


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
