"""Where the tokens of prompts came from, by the counters that the engines themselves keep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvpool.bench.pd_results import Where
from kvpool.bench.ttft_http import Metrics, Server

SETTLE_S: Final = 10.0
POLL_S: Final = 0.2
QUIET: Final = 3
"""Looks in a row that show the same figures: engines count a load a step after it."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Sums over engines since a reading; ``moved``: loaded by decode engines."""

    tokens: dict[Where, int]
    moved: int


class Counters:
    """The counters of all engines of a deployment."""

    def __init__(self, serving: Sequence[Server], decoding: Sequence[Server] = ()) -> None:
        """``serving``: those that prefill; ``decoding``: those that get what others have prefilled."""
        self._serving = serving
        self._decoding = decoding

    def read(self) -> list[Metrics]:
        """Return what all engines say once none of it changes any more."""
        deadline = time.monotonic() + SETTLE_S
        seen, same = self._now(), 0
        while same < QUIET and time.monotonic() < deadline:
            time.sleep(POLL_S)
            found = self._now()
            same = same + 1 if found == seen else 0
            seen = found
        return seen

    def since(self, before: Sequence[Metrics]) -> Counted | None:
        """Return what was counted since then; None where an engine does not tell."""
        after = self.read()
        deltas = [_delta(old, new) for old, new in zip(before, after, strict=True)]
        if any(delta is None for delta in deltas):
            return None
        known = [delta for delta in deltas if delta is not None]
        serving, decoding = known[: len(self._serving)], known[len(self._serving) :]
        tokens = {where: sum(delta[where] for delta in serving) for where in Where}
        tokens[Where.NONE] += sum(delta[Where.NONE] for delta in decoding)
        moved = sum(delta[Where.OWN] + delta[Where.OTHER] for delta in decoding)
        return Counted(tokens, moved)

    def _now(self) -> list[Metrics]:
        return [server.metrics() for server in (*self._serving, *self._decoding)]


def _delta(old: Metrics, new: Metrics) -> dict[Where, int] | None:
    """Return one engine's share of it; what a connector other than ours has loaded came from elsewhere."""
    if old.own_hits is None or new.own_hits is None or old.prompt_tokens is None or new.prompt_tokens is None:
        return None
    own = new.own_hits - old.own_hits
    loaded = (new.external_hits or 0.0) - (old.external_hits or 0.0)
    near = new.pool_hits.get("local", 0.0) - old.pool_hits.get("local", 0.0)
    near = min(near, loaded)
    prompts = new.prompt_tokens - old.prompt_tokens
    found = {Where.HBM: own, Where.OWN: near, Where.OTHER: loaded - near, Where.NONE: max(0.0, prompts - own - loaded)}
    return {where: round(value) for where, value in found.items()}
