"""Sends a workload over HTTP: each session's turns one by one, so many requests at a time or at their times."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvpool.bench.harness import BenchError
from kvpool.bench.pd_results import Asked
from kvpool.bench.pd_workload import Ask
from kvpool.bench.ttft_http import Server

THREADS_MAX = 256
"""Requests at a time, at most: those of a workload with times wait beyond that, and their times lie."""

POLL_S = 0.5


class Drive:
    """One run of a workload against one server."""

    def __init__(self, server: Server, asks: Sequence[Ask], concurrency: int, timeout_s: float) -> None:
        """``concurrency``: of requests that have no time of their own."""
        self._server = server
        self._todo = list(asks)
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._answered: dict[int, int] = {}
        self._running = 0
        self._asked: list[Asked] = []
        self._problem = ""
        self._start = 0.0

    def run(self) -> tuple[list[Asked], float]:
        """Return the answers, and how many seconds all of them took. Raises BenchError when a request failed."""
        timed = any(ask.at is not None for ask in self._todo)
        count = min(THREADS_MAX, len({ask.session for ask in self._todo})) if timed else self._concurrency
        threads = [threading.Thread(target=self._work, name=f"request-{n}", daemon=True) for n in range(count)]
        self._start = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(POLL_S)
        except BaseException:  # Ctrl-C: nothing more begins, what runs is hung up on
            self._fail("interrupted")
            self._server.hang_up()
            raise
        if self._problem:
            raise BenchError(f"a request to {self._server.url} failed: {self._problem}")
        return self._asked, time.monotonic() - self._start

    def _fail(self, why: str) -> None:
        with self._changed:
            self._problem = self._problem or why
            self._changed.notify_all()

    def _work(self) -> None:
        while (ask := self._next()) is not None:
            answer = self._server.complete(ask.prompt, ask.output_tokens, self._timeout_s)
            if answer.error:
                self._fail(answer.error)
                return
            tokens = answer.output_tokens or ask.output_tokens
            done = Asked(ask, answer.ttft_s, answer.total_s, answer.prompt_tokens or 0, tokens)
            with self._changed:
                self._asked.append(done)
                self._answered[ask.session] = ask.turn + 1
                self._running -= 1
                self._changed.notify_all()

    def _next(self) -> Ask | None:
        """Wait for the next request whose turn it is; None when there will be none."""
        with self._changed:
            while not self._problem:
                now = time.monotonic() - self._start
                ready = [ask for ask in self._todo if self._answered.get(ask.session, 0) == ask.turn]
                found = next((ask for ask in ready if self._is_due(ask, now)), None)
                if found is not None:
                    self._todo.remove(found)
                    self._running += 1
                    return found
                if not self._todo:
                    return None
                if not ready and not self._running:
                    self._problem = "the workload cannot go on: a turn is missing"
                    break
                later = [ask.at - now for ask in ready if ask.at is not None]
                self._changed.wait(min(later, default=None))
        return None

    def _is_due(self, ask: Ask, now: float) -> bool:
        return self._running < self._concurrency if ask.at is None else ask.at <= now
