"""The engines of ``ttft.py``: one vLLM in its default processes behind JSON lines, and a client that notes times.

As a program it takes vLLM's arguments as JSON, reads one prompt a line and answers each with one line.
All times are the kernel's monotonic clock, which every process of a machine shares.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from kvpool.client import GetResult, Lookup
from kvpool.config import ConnectorSettings

LOG = "TTFT_LOG"
"""Environment variable: the file that ``timed_client`` appends to."""


class TimedClient:
    """Any client, with a line in a file for each lookup and each load."""

    def __init__(self, inner: Any, path: Path) -> None:
        self._inner = inner
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _note(self, what: str, start: float, **facts: Any) -> None:
        line = json.dumps({"what": what, "start": start, "end": time.monotonic(), **facts})
        with self._path.open("a") as log:
            log.write(line + "\n")

    def lookup_async(self, *args: Any, **kwargs: Any) -> Future[Lookup]:
        start = time.monotonic()
        future: Future[Lookup] = self._inner.lookup_async(*args, **kwargs)
        future.add_done_callback(lambda done: self._note("lookup", start, blocks=done.result().prefix))
        return future

    def get(self, namespace: Any, hashes: Any, blocks: Any, **kwargs: Any) -> GetResult:
        start = time.monotonic()
        result: GetResult = self._inner.get(namespace, hashes, blocks, **kwargs)
        size = sum(part.nbytes for block in blocks for part in block)
        self._note("load", start, blocks=result.prefix, bytes=size, tiers=result.tiers)
        return result


def timed_client(settings: ConnectorSettings, name: str) -> TimedClient:
    """Return a client of the pool that notes times; for the setting ``client_factory``."""
    from kvpool_vllm.settings import make_client

    return TimedClient(make_client(settings, name), Path(os.environ[LOG]))


def main() -> None:
    """Serve one engine until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is not an answer
    from vllm import LLM, SamplingParams

    llm = LLM(**json.loads(sys.argv[1]))
    one_token = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    block_tokens = llm.llm_engine.vllm_config.cache_config.block_size
    print(json.dumps({"block_tokens": block_tokens}), file=answers, flush=True)
    for line in sys.stdin:
        prompt = {"prompt_token_ids": json.loads(line)}
        start = time.monotonic()
        output = llm.generate(prompt, one_token, use_tqdm=False)[0]
        answer = {
            "start": start,
            "ms": (time.monotonic() - start) * 1000,
            "cached": output.num_cached_tokens or 0,
            "token": output.outputs[0].token_ids[0],
        }
        print(json.dumps(answer), file=answers, flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
