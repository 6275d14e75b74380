"""What is asked in a measurement of routing: conversations that grow, under system prompts that many of them share.

A workload is a list of requests in a fixed order. As a file it has one JSON object a line, with the fields of
``Ask`` and the whole prompt as text: other load generators read ``prompt`` and ``output_tokens`` of it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvpool.errors import InvalidArgumentError

_CONSONANTS: Final = "bcdfglmnprst"
_WORDS: Final = [a + b + c for a in _CONSONANTS for b in "aeiou" for c in "nrsl"]
"""Three letters and a blank: a token for the models that are made on the spot, and about one for any other."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. It is sent once the session's turn before it was answered, and not before ``at``."""

    session: int
    turn: int
    prompt: str
    output_tokens: int
    at: float | None = None
    """Seconds since the start; None: as soon as one of the requests that run has ended."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Of what a workload is made; pairs are the least and the most, in tokens, drawn for each."""

    about: str
    sessions: int
    turns: int
    active: int
    """Sessions that are under way at a time: so many turns, about, lie between two of the same session."""
    systems: int
    """System prompts; a session begins with one of them."""
    system: tuple[int, int] = (0, 0)
    document: tuple[int, int] = (0, 0)
    documents: float = 0.0
    """Share of the sessions that begin with a document of their own."""
    question: tuple[int, int] = (32, 128)
    answer: tuple[int, int] = (64, 256)
    """What the history holds for an answer, whatever the engine said."""
    output: tuple[int, int] = (16, 64)
    """What the engine is asked to say."""


KINDS: Final = {
    "small": Kind("a few short conversations: for engines on a CPU", 8, 4, 4, 2, (192, 256), question=(24, 48),
                  answer=(48, 96), output=(4, 8)),
    "chat": Kind("conversations under eight system prompts", 96, 6, 32, 8, (256, 768)),
    "documents": Kind("questions about long documents", 64, 4, 16, 1, (64, 64), (1024, 4096), 1.0),
    "mixed": Kind("conversations, every second one about a document", 96, 4, 32, 8, (256, 768), (1024, 4096), 0.5),
    "shared": Kind("one question each, under one system prompt", 256, 1, 32, 1, (1024, 1024)),
    "unique": Kind("one question each, nothing in common", 256, 1, 32, 0, question=(256, 1024)),
}  # fmt: skip
"""Not only what routing by prefixes is good at: every instance soon holds all of ``shared``, none any of ``unique``."""


class _Text:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def words(self, span: tuple[int, int]) -> str:
        """Return a text of about so many tokens."""
        return " ".join(self._rng.choices(_WORDS, k=self._rng.randint(*span)))


def make(kind: Kind, seed: int, *, rate: float = 0.0, think_s: float = 0.0) -> list[Ask]:
    """Return the workload of a kind; the same seed gives the same one.

    ``rate``: sessions begin at so many a second, by a Poisson process; 0: in a closed loop. ``think_s``: mean of
    the pauses (exponential) before a session's next turn; in a closed loop nobody thinks.
    """
    rng = random.Random(seed)
    text = _Text(rng)
    systems = [text.words(kind.system) for _ in range(kind.systems)]
    talks = [_session(number, kind, systems, text, rng) for number in range(kind.sessions)]
    if rate:
        return _timed(talks, rng, rate, think_s)
    waiting, active, order = talks[kind.active :], talks[: kind.active], []
    while active:
        at = rng.randrange(len(active))
        order.append(active[at].pop(0))
        if not active[at]:
            active[at : at + 1] = waiting[:1]
            waiting = waiting[1:]
    return order


def _session(number: int, kind: Kind, systems: Sequence[str], text: _Text, rng: random.Random) -> list[Ask]:
    history = f"[system] {rng.choice(systems)}\n" if systems else ""
    if rng.random() < kind.documents:
        history += f"[document] {text.words(kind.document)}\n"
    asks = []
    for turn in range(kind.turns):
        history += f"[user] {text.words(kind.question)}\n[assistant]"
        asks.append(Ask(number, turn, history, rng.randint(*kind.output)))
        history += f" {text.words(kind.answer)}\n"
    return asks


def _timed(talks: Sequence[Sequence[Ask]], rng: random.Random, rate: float, think_s: float) -> list[Ask]:
    now, timed = 0.0, []
    for talk in talks:
        now += rng.expovariate(rate)
        at = now
        for ask in talk:
            timed.append(dataclasses.replace(ask, at=round(at, 4)))
            at += rng.expovariate(1 / think_s) if think_s else 0.0
    return sorted(timed, key=lambda ask: (ask.at, ask.session, ask.turn))


def marked(asks: Sequence[Ask], mark: str) -> list[Ask]:
    """Return the same workload with other prompts, of which no cache knows the first block: equal but unseen."""
    return [dataclasses.replace(ask, prompt=f"[{mark}] {ask.prompt}") for ask in asks]


def write(asks: Sequence[Ask], path: str) -> None:
    """Write a workload file. Raises InvalidArgumentError("write")."""
    lines = (json.dumps({k: v for k, v in dataclasses.asdict(ask).items() if v is not None}) + "\n" for ask in asks)
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise InvalidArgumentError("write", f"cannot write {path}: {error.strerror}") from None


def read(path: str) -> list[Ask]:
    """Return the workload in a file. Raises InvalidArgumentError("read") for what is none."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            asks = list(_parse(file, path))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("read", f"cannot read {path}: {error}") from None
    if not asks:
        raise InvalidArgumentError("read", f"{path} holds no request")
    turns: dict[int, int] = {}
    for number, ask in enumerate(asks, 1):
        if ask.turn != turns.get(ask.session, 0):
            raise InvalidArgumentError(
                "read", f"{path}, line {number}: turn {ask.turn} of session {ask.session} comes out of order"
            )
        turns[ask.session] = ask.turn + 1
    return asks


def _parse(lines: Iterable[str], path: str) -> Iterator[Ask]:
    for number, line in enumerate(lines, 1):
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError("read", f"{path}, line {number}: {error}") from None
        whole = ("session", "turn", "output_tokens")
        known = isinstance(found, dict) and found.keys() <= {"prompt", "at", *whole}
        if not (known and all(type(found.get(name)) is int for name in whole)):
            raise InvalidArgumentError(
                "read",
                f"{path}, line {number}: needs session, turn, output_tokens (whole numbers) and prompt (text)",
            )
        prompt, at = found.get("prompt"), found.get("at")
        timed = at is None or (isinstance(at, int | float) and at >= 0)
        if not (isinstance(prompt, str) and prompt and found["output_tokens"] >= 1 and timed):
            raise InvalidArgumentError(
                "read", f"{path}, line {number}: prompt must not be empty, output_tokens at least 1, at no less than 0"
            )
        yield Ask(**found)
