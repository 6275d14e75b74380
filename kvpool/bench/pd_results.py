"""What became of a workload under one routing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvpool.bench.pd_workload import Ask
from kvpool.bench.ttft_data import Ratios, percentile, ratios


class Where(StrEnum):
    """Where a prompt's token came from, nearest first."""

    HBM = "hbm"
    OWN = "own_node"
    OTHER = "other_node"
    NONE = "computed"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that was answered; times in seconds."""

    ask: Ask
    ttft_s: float
    total_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """All of them, how long they took together, and where the tokens of their prompts came from."""

    asked: Sequence[Asked]
    wall_s: float
    tokens: Mapping[Where, int]
    """Empty where the engines do not tell."""
    moved: int = 0
    """Tokens that decode engines have loaded."""

    @property
    def near_tokens(self) -> int:
        """Hits in the engine's own cache or its own node's memory: what a router can bring about."""
        return self.tokens.get(Where.HBM, 0) + self.tokens.get(Where.OWN, 0)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(one.prompt_tokens for one in self.asked)

    @property
    def output_tokens_s(self) -> float:
        """Generated a second."""
        return sum(one.output_tokens for one in self.asked) / self.wall_s if self.wall_s else 0.0

    @property
    def ttft_ms(self) -> list[float]:
        """In the order of sessions and turns, so that runs can be compared request by request."""
        ordered = sorted(self.asked, key=lambda one: (one.ask.session, one.ask.turn))
        return [one.ttft_s * 1000 for one in ordered]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: one workload under one routing, all rounds of it."""

    workload: str
    routing: str
    rounds: Sequence[Result]
    engines: str = ""

    @property
    def moved(self) -> int:
        """Tokens that decode engines have loaded."""
        return sum(result.moved for result in self.rounds)

    @property
    def ttft_ms(self) -> list[float]:
        """Of all rounds, one after the other."""
        return [value for result in self.rounds for value in result.ttft_ms]

    def tokens(self, where: Where) -> int | None:
        """Return how many tokens came from there; None where the engines do not tell."""
        if not all(result.tokens for result in self.rounds):
            return None
        return sum(result.tokens[where] for result in self.rounds)

    @property
    def near_tokens(self) -> int:
        """Hits in the engine's own cache or its own node's memory."""
        return sum(result.near_tokens for result in self.rounds)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(result.prompt_tokens for result in self.rounds)

    @property
    def mean_ms(self) -> float:
        """Mean time to first token."""
        return statistics.fmean(self.ttft_ms)

    def ttft_at(self, share: float) -> float:
        """Return a percentile of the times to first token in ms."""
        return percentile(self.ttft_ms, share)

    @property
    def output_tokens_s(self) -> float:
        """Generated a second, the middle of the rounds."""
        return statistics.median(result.output_tokens_s for result in self.rounds)

    def beside(self, other: Row) -> Ratios:
        """Return this row's times to first token over another's, request by request."""
        return ratios(self.ttft_ms, other.ttft_ms)
