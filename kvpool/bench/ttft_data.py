"""What is sent to the engines, and what is made of the times that come back."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000
BLOCKS_SPARE = 8
AGAIN_BLOCKS = 2
"""What a prompt that is in the cache still takes anew: its last block and one for the answer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens, how many prompts, and how many of them at a time."""

    input_tokens: int
    output_tokens: int
    concurrency: int
    prompts: int

    def blocks(self, block_tokens: int) -> int:
        """Blocks that one request takes in the engine."""
        return -(-(self.input_tokens + self.output_tokens) // block_tokens)

    def engine_blocks(self, block_tokens: int) -> int:
        """Blocks of an engine that holds this data set and has room for those that run: no more than that."""
        held = max(self.prompts, self.concurrency)
        return held * (self.blocks(block_tokens) + AGAIN_BLOCKS) + self.concurrency * AGAIN_BLOCKS + BLOCKS_SPARE

    def evicting_prompts(self, capacity_tokens: int) -> int:
        """Prompts of this shape that fill an engine's cache from end to end, so that nothing else is left in it."""
        return -(-capacity_tokens // self.input_tokens) + 1


class Prompts:
    """Random prompts of token ids in a range; the same seed gives the same ones, and none comes twice."""

    def __init__(self, seed: int, low: int, high: int) -> None:
        """Ids are at least ``low`` and less than ``high``."""
        self._rng = random.Random(seed)
        self._low, self._high = low, high

    def tokens(self, count: int) -> list[int]:
        """Return so many random tokens."""
        return self._rng.choices(range(self._low, self._high), k=count)

    def distinct(self, count: int, length: int) -> list[list[int]]:
        """Return prompts that have nothing in common."""
        return [self.tokens(length) for _ in range(count)]

    def sharing(self, prefixes: Sequence[list[int]], count: int, length: int) -> list[list[int]]:
        """Return prompts that begin with one of the prefixes, in turn, and go on with tokens of their own."""
        chosen = [prefixes[i % len(prefixes)] for i in range(count)]
        return [[*prefix, *self.tokens(length - len(prefix))] for prefix in chosen]


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile by linear interpolation; ``share`` is from 0 to 1, and there is at least one value."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Ratios:
    """Many ratios of one thing: the middle, the spread, and how sure the middle is."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    least: float
    most: float
    sure_from: float
    """The median of as many ratios drawn anew lies between these in 95 of 100 draws."""
    sure_to: float
    count: int


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Ratios:
    """Return what becomes of ``ours[i] / theirs[i]``; both hold at least one value, all above zero."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    rng = random.Random(len(each))
    drawn = [statistics.median(rng.choices(each, k=len(each))) for _ in range(RESAMPLES)]
    return Ratios(
        statistics.median(each),
        percentile(each, 0.25),
        percentile(each, 0.75),
        min(each),
        max(each),
        percentile(drawn, 0.025),
        percentile(drawn, 0.975),
        len(each),
    )
