"""The daemons' command lines: options from settings, either spelling, one line for what is wrong."""

import dataclasses
import sys
import types

import click
import pytest
from click.testing import CliRunner

from kvpool import __version__
from kvpool.cli import bench, main, master, node
from kvpool.cli.options import LazyGroup
from kvpool.config import MasterSettings, NodeSettings
from kvpool.errors import InvalidArgumentError, UnavailableError


@pytest.fixture
def started(monkeypatch):
    """What the daemons were started with, instead of starting any."""
    calls = []
    for name in ("master", "node"):
        fake = types.ModuleType(f"kvpool.server.{name}")
        fake.run = lambda settings, notes: calls.append((settings, notes)) or 0
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return calls


def run(command, *arguments):
    return CliRunner().invoke(command, arguments)


class TestDaemons:
    @pytest.mark.parametrize("dash", ["-", "_"])
    def test_dashes_and_underscores_are_the_same(self, started, dash):
        """As operators of other pools know them."""
        flags = ["eviction_high_watermark_ratio", "eviction_ratio", "default_kv_lease_ttl"]
        high, gap, ttl = ("--" + flag.replace("_", dash) for flag in flags)
        result = run(master.command, "--port", "50088", high, "0.95", f"{gap}=0.05", ttl, "11000")
        assert result.exit_code == 0, result.output
        settings, _ = started[0]
        assert settings == MasterSettings(
            eviction_high_watermark_ratio=0.95, eviction_ratio=0.05, default_kv_lease_ttl=11_000
        )

    def test_a_node(self, started):
        """Switches have a no."""
        result = run(node.command, "--master", "h:1", "--segment-size", "2GB", "--no-lock-memory")
        assert result.exit_code == 0, result.output
        settings, _ = started[0]
        assert settings == NodeSettings(master="h:1", segment_size=2 << 30, lock_memory=False)

    def test_notes_reach_the_daemon(self, started, tmp_path):
        """What a file says in vain is for the log."""
        path = tmp_path / "mooncake.json"
        path.write_text('{"master_server_address": "h:1", "metadata_server": "P2PHANDSHAKE"}')
        assert run(node.command, "--config", str(path)).exit_code == 0
        assert any("metadata_server" in note for note in started[0][1])

    @pytest.mark.parametrize(
        ("command", "arguments", "words"),
        [
            (master.command, ["--port", "http"], ["port", "0 to 65535", "flag --port"]),
            (master.command, ["--eviction_ratio", "2"], ["eviction_ratio", "up to 1"]),
            (node.command, ["--segment_size", "1XB"], ["segment_size", "KB, MB, GB"]),
            (node.command, ["--config", "/does/not/exist"], ["config", "/does/not/exist"]),
        ],
    )
    def test_a_bad_value_is_one_line_and_exit_code_2(self, started, command, arguments, words):
        """It names the field and what is allowed, without a traceback."""
        result = run(command, *arguments)
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert all(word in result.stderr for word in words)
        assert started == []

    def test_a_mistyped_option_names_the_nearest(self, started):
        """Exit code 2 as well."""
        result = run(node.command, "--segment_siz", "1GB")
        assert result.exit_code == 2
        assert "--segment_size" in result.stderr

    @pytest.mark.parametrize(
        ("error", "code"), [(InvalidArgumentError("port", "is in use"), 2), (UnavailableError("x"), 1)]
    )
    def test_a_daemon_that_cannot_start_says_so_in_one_line(self, started, monkeypatch, error, code):
        """A port in use is no traceback."""

        def fail(settings, notes):
            raise error

        monkeypatch.setattr(sys.modules["kvpool.server.master"], "run", fail)
        result = run(master.command)
        assert result.exit_code == code
        assert result.stderr.strip() == f"Error: {error}"

    @pytest.mark.parametrize(("command", "settings"), [(master.command, MasterSettings), (node.command, NodeSettings)])
    def test_help_shows_every_setting_with_its_variable(self, command, settings):
        """Names, defaults and environment are on one page."""
        text = run(command, "--help").stdout
        for item in dataclasses.fields(settings):
            assert f"--{item.name}" in text
            assert f"KVPOOL_{item.name.upper()}" in text
        assert "Examples:" in text


class TestPrograms:
    def test_version(self):
        """Said the same way everywhere."""
        assert run(main.command, "version").stdout.strip() == __version__
        for command in (main.command, master.command, node.command, bench.command):
            assert __version__ in run(command, "--version").stdout

    def test_help_imports_no_command(self, monkeypatch):
        """Listing commands is quick, and works when one of them is broken."""
        monkeypatch.setattr(main.command, "_lazy", {"broken": ("kvpool.cli.not_there:command", "Is broken.")})
        result = run(main.command, "--help")
        assert result.exit_code == 0
        assert "Is broken." in result.stdout

    def test_aliases_are_the_same_commands(self):
        """`kvpool ctl` is kvpoolctl."""
        context = click.Context(main.command)
        assert main.command.get_command(context, "master") is master.command
        assert main.command.get_command(context, "bench") is bench.command
        assert main.command.get_command(context, "nonsense") is None

    def test_an_unknown_command_is_exit_code_2(self):
        """Click says which."""
        assert run(main.command, "upp").exit_code == 2

    def test_a_lazy_command_must_be_one(self):
        """A table with a wrong entry fails where it is used."""
        group = LazyGroup("g", lazy={"x": ("kvpool.model:parse_size", "")})
        with pytest.raises(TypeError, match="no command"):
            group.get_command(click.Context(group), "x")
