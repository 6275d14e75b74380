"""Commands that the documentation shows: each parses, with the options it is shown with."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "kvpool-master": "kvpool.cli.master",
    "kvpool-node": "kvpool.cli.node",
    "kvpoolctl": "kvpool.cli.ctl",
    "kvpool-bench": "kvpool.cli.bench",
}


def shown(page: str) -> list[str]:
    """The commands of a page's shell examples, continued lines joined, without what follows a comment or a pipe."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.split(" ")[0] in PROGRAMS]


@pytest.mark.parametrize("page", ["README.md", "docs/file_tier.md"])
def test_every_command_shown_takes_its_options(page):
    """Nothing is run: --help is asked of the very command, behind its own options."""
    commands = shown(page)
    assert commands
    for line in commands:
        program, *arguments = shlex.split(line.split(" | ")[0], comments=True)
        command = importlib.import_module(PROGRAMS[program]).command
        result = CliRunner().invoke(command, [*arguments, "--help"])
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_a_wrong_option_would_be_noticed():
    """The check is one: click looks at all options before it shows its help."""
    command = importlib.import_module("kvpool.cli.ctl").command
    assert CliRunner().invoke(command, ["fs", "verify", "/mnt/kv", "--no_such_option", "--help"]).exit_code == 2
