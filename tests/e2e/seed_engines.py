"""Engines one after another in this process, each from a ``--kv-transfer-config`` as it stands on a command line.

A program: it reads ``{"do": NAME, ...}`` from standard input and answers with one line each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.e2e.engine import Engine


class Heard(logging.Handler):
    """What the connector logged since it was last asked."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: list[str] = []
        logger = logging.getLogger("vllm.kvpool")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        """Return the lines, and forget them."""
        lines, self._lines = self._lines, []
        return lines


def transfer_config(text: str) -> Any:
    """Return what ``vllm serve`` makes of the argument."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--kv-transfer-config", text]).kv_transfer_config


def start(model: Path, request: dict[str, Any]) -> Engine:
    """Start an engine with a configuration and other systems' variables."""
    os.environ.update(request["environment"])
    try:
        engine = Engine(model, {}, kv_transfer_config=transfer_config(request["config"]), **request["arguments"])
        for side in (engine.scheduler, engine.worker):
            wait_joined(side._client)
        return engine
    finally:
        for name in request["environment"]:
            del os.environ[name]


def wait_joined(client: Any) -> None:
    """Wait until a client knows its pool; on a busy machine an engine is ready before."""
    deadline = time.monotonic() + 30
    while not (client._link.up and client.has_node()):
        assert time.monotonic() < deadline, "the client did not find the pool"
        time.sleep(0.01)


def stop(engine: Engine) -> None:
    """End an engine so that another can start in this process."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    engine.close()
    ensure_kv_transfer_shutdown()


def main() -> None:
    """Serve; the argument is the model."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is not an answer
    heard = Heard()
    engine: Engine | None = None
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request["do"] == "start":
            engine = start(Path(sys.argv[1]), request)
            answer = {
                "connector": type(engine.vllm_scheduler.connector).__name__,
                "recomputes": engine.vllm_scheduler.recompute_kv_load_failures,
                "heard": heard.take(),
            }
        elif engine is not None and request["do"] == "generate":
            answer = engine.generate(request["prompt"], 4).__dict__
        elif engine is not None and request["do"] == "state":
            answer = [engine.counters(), engine.scheduler._client.stats(), engine.worker._client.stats(), heard.take()]
        elif engine is not None and request["do"] == "stop":
            stop(engine)
            engine = None
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
