"""kvpoolctl pin, unpin and pins, against a master that keeps pins in a dict."""

import json

import pytest
from click.testing import CliRunner

from kvpool.cli.ctl import command
from kvpool.model import Namespace
from tests.cli.fake_storage import serving

SPACE = Namespace(model="one").digest
KEYS = [bytes([n]) * 16 for n in range(3)]
HEX = ",".join(key.hex() for key in KEYS)


@pytest.fixture
def master():
    with serving() as fake:
        yield fake


@pytest.fixture
def ctl(master):
    def run(*arguments):
        return CliRunner().invoke(command, ["--master", master.address, *arguments])

    return run


def pin(*options):
    return ("pin", "--namespace", SPACE.hex(), "--hashes", HEX, *options)


def test_a_hard_pin_has_no_deadline(ctl, master):
    """Keys, label and kind arrive; the id that is printed is the one to unpin."""
    master.present = 3
    result = ctl(*pin("--hard", "--label", "system prompt"))
    assert result.exit_code == 0, result.output
    (asked,) = master.asked
    assert (asked.namespace, asked.keys, asked.ttl_ms, asked.label) == (SPACE, b"".join(KEYS), 0, "system prompt")
    assert result.stdout == "pin 0000000000000abc keeps 3 blocks\n"


def test_a_soft_pin_has_one(ctl, master):
    """Durations are written as everywhere; what is not stored yet is said."""
    result = ctl(*pin("--for", "1h"))
    assert master.asked[0].ttl_ms == 3_600_000
    assert "1 of them are stored now" in result.stdout
    assert json.loads(ctl("--json", *pin("--for", "1h")).stdout) == {
        "pin": "0000000000000abd",
        "asked": 3,
        "present": 1,
    }


def test_nothing_stored_yet_is_exit_code_1(ctl, master):
    """The pin stands all the same."""
    master.present = 0
    assert ctl(*pin("--hard")).exit_code == 1
    assert master.pins


@pytest.mark.parametrize(
    "options",
    [[], ["--hard", "--for", "1h"], ["--for", "soon"], ["--for", "0s"], ["--hard", "--label", "x" * 300]],
)
def test_unclear_pins_are_exit_code_2(ctl, master, options):
    """Hard or soft is said, never guessed."""
    result = ctl(*pin(*options))
    assert result.exit_code == 2
    assert master.asked == []


def test_pins_are_listed(ctl, master):
    """How many of a pin's blocks are stored, and for how long it stands."""
    assert ctl("pins").exit_code == 1
    ctl(*pin("--hard", "--label", "b[red]"))
    ctl(*pin("--for", "90s", "--label", "a"))
    data = json.loads(ctl("--json", "pins").stdout)["pins"]
    assert [(each["label"], each["blocks"], each["present"], each["left_s"]) for each in data] == [
        ("a", 3, 1, 90.0),
        ("b[red]", 3, 1, None),
    ]
    table = ctl("pins").stdout
    for said in ("b[red]", "until unpinned", "for 1.5 min", "1 of 3", SPACE.hex()):
        assert said in table


def test_unpin_by_id_label_and_all(ctl, master):
    """Exit code 1 when there was none."""
    for label in ("a", "b", "b", "c"):
        ctl(*pin("--hard", "--label", label))
    assert ctl("unpin", "abc").stdout == "ended 1 pins of 3 blocks\n"
    assert json.loads(ctl("--json", "unpin", "--label", "b").stdout) == {"pins": 2, "blocks": 6}
    assert [each.label for each in master.pins.values()] == ["c"]
    assert ctl("unpin", "0000000000000abc").exit_code == 1
    assert ctl("unpin", "--all").exit_code == 0
    assert master.pins == {}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["abc", "--all"],
        ["--label", ""],
        ["xyz"],
        ["--all", "--label", "a"],
        ["--label", "\udcff"],
        ["--label", "x" * 300],
    ],
)
def test_unclear_unpins_are_exit_code_2(ctl, master, arguments):
    """Nothing is unpinned by guessing."""
    assert ctl("unpin", *arguments).exit_code == 2
    assert master.asked == []
