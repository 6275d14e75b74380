"""Every reason that a lookup, get, put or transfer may give stands in the documentation, and nothing else does."""

import re
from pathlib import Path

from kvpool import client_files, client_gets
from kvpool.client_results import reason_of_error
from kvpool.errors import KVPoolError, OverloadedError, UnavailableError
from kvpool.model import Reason
from kvpool_vllm.transfers import WHY

ROOT = Path(__file__).parent.parent
SAID = re.compile(
    r'answers = \["(\w+)"\]|(?:counts|errors)\["(\w+)"\]|_abort\("(\w+)"\)|reasons?(?:\[\w+\])? = "(\w+)"'
)
FINE = {"", "stored", "existed", "being_written"}


def named(page: str, heading: str = "") -> set[str]:
    """The reasons in the first column of a page's tables, or of the first one below a heading."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = text[text.index(heading) :].partition("\n\n#")[0] if heading else text
    cells = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    return {reason for cell in cells for reason in re.findall(r"`(\w+)`", cell)}


def test_every_reason_of_a_block_is_explained():
    """What the client's tables have, and what its sources say."""
    found = {reason.value for reason in Reason} | client_gets.NO_MASTER | client_gets.ELSEWHERE | client_gets.BAD_FILE
    found |= {*client_files.REASONS.values(), *client_files.TROUBLE, *client_files.ANSWERS, client_files.reason_of(-99)}
    found |= {reason_of_error(kind("x")) for kind in (KVPoolError, OverloadedError, UnavailableError)}
    for path in (ROOT / "kvpool").glob("client_*.py"):
        found |= {word for match in SAID.findall(path.read_text(encoding="utf-8")) for word in match}
    assert found - FINE <= named("reasons.md")


def test_every_reason_that_is_explained_is_given():
    """None is left from what the pool once said."""
    sources = [*(ROOT / "kvpool").glob("*.py"), *(ROOT / "connectors").rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert {word for word in named("reasons.md") if f'"{word}"' not in text and f'.{word}"' not in text} == set()


def test_every_reason_of_a_transfer_is_explained():
    """Those that the connector logs and counts."""
    assert named("connector.md", "| reason | what happened |") == {*WHY, "foreign"}
