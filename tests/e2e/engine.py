"""A vLLM engine in this process, driven step by step; as a program, the same behind JSON lines.

As a program it reads ``{"do": NAME, ...}`` from standard input and answers with one line each, so
that a test can have a second engine in a second process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 32
DEADLINE_S = 60.0
KV_CACHE_BYTES = 64 << 20

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def engine_environment(home: Path) -> dict[str, str]:
    """Return what vLLM needs to run offline and to leave its files under ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    folders = dict.fromkeys(("TMPDIR", "VLLM_RPC_BASE_PATH", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME"), str(home))
    return {**ENVIRONMENT, **folders}


@dataclass
class Answer:
    """What a prompt was answered with, and how sure the model was."""

    tokens: list[int]
    margin: float
    """The least distance, over all tokens, of the best from the second best log probability."""
    cached: int
    """Prompt tokens that were not computed."""
    margins: list[float] = field(default_factory=list)
    """Of each token."""
    params: dict[str, Any] | None = None
    """What another engine has to be told."""

    def sure_tokens(self, margin: float) -> list[int]:
        """Return the tokens before the first one that another came this close to."""
        unsure = next((i for i, seen in enumerate(self.margins) if seen < margin), len(self.margins))
        return self.tokens[:unsure]


def _ours(connector: Any) -> list[Any]:
    """Return our connectors, out of a ``MultiConnector`` too; the first one is asked for counters."""
    children = getattr(connector, "sub_connectors", [connector])
    return [child for child in children if type(child).__name__ == "KVPoolConnector"]


class Engine:
    """One engine with the connector; the test steps it, so nothing happens behind its back."""

    def __init__(self, model: Path, connector: dict[str, Any], **arguments: Any) -> None:
        from vllm import LLM
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        options: dict[str, Any] = {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "block_size": BLOCK_TOKENS,
            "max_model_len": 4096,
            "max_num_seqs": 8,
            "kv_transfer_config": {
                "kv_connector": "KVPoolConnector",
                "kv_role": "kv_both",
                # Tests slow loads down, and expect them all the same.
                "kv_connector_extra_config": {"gate": "off", **connector},
            },
        }
        self.llm = LLM(model=str(model), **(options | arguments))
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.vllm_scheduler = self.core.scheduler
        self.schedulers = [connector.scheduler for connector in _ours(self.vllm_scheduler.connector)]
        self.scheduler = self.schedulers[0]
        # Ranks may be processes.
        self.worker: Any = _ours(get_kv_transfer_group())[0].worker if has_kv_transfer_group() else None
        self._count = self.preemptions = 0
        preempt = self.vllm_scheduler._preempt_request

        def counted(*arguments: Any, **named: Any) -> Any:
            self.preemptions += 1
            return preempt(*arguments, **named)

        self.vllm_scheduler._preempt_request = counted
        self.scheduled_tokens = 0
        schedule = self.vllm_scheduler.schedule

        def scheduled(*arguments: Any, **named: Any) -> Any:
            planned = schedule(*arguments, **named)
            self.scheduled_tokens += planned.total_num_scheduled_tokens
            return planned

        self.vllm_scheduler.schedule = scheduled

    def submit(
        self,
        prompt: list[int],
        tokens: int = 8,
        salt: str | None = None,
        params: dict[str, Any] | None = None,
        stops: list[int] | None = None,
    ) -> str:
        """Add a request; nothing runs until somebody steps. A salt of its own makes it share no block.

        ``params``: its ``kv_transfer_params``; ``stops``: tokens that end it.
        """
        from vllm import SamplingParams

        self._count += 1
        more = {"extra_args": {"kv_transfer_params": params}} if params else {}
        parameters = SamplingParams(
            temperature=0.0, max_tokens=tokens, logprobs=2, ignore_eos=True, stop_token_ids=stops, **more
        )
        request_id = f"test-{self._count}"
        salted = {"cache_salt": salt} if salt else {}
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt, **salted}, parameters)
        return request_id

    def step_until(self, condition: Callable[[], bool]) -> dict[str, Any]:
        """Step until the condition holds; return the finished outputs by request."""
        finished = {}
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"the engine did not get there: {self.counters()}"
            for output in self.llm.llm_engine.step():
                if output.finished:
                    finished[output.request_id] = output
        return finished

    def drain(self) -> dict[str, Any]:
        """Step until nothing is left to do, saves included."""
        return self.step_until(lambda: not self.vllm_scheduler.has_requests())

    def mixed(self, requests: list[dict[str, Any]], at_once: int) -> list[Answer | None]:
        """Answer requests (prompt, tokens, salt, abort_after: steps until its client hangs up), some at once.

        None where a request was aborted before its end.
        """
        ids: list[str] = []
        due: dict[str, int] = {}
        outputs: dict[str, Any] = {}
        deadline = time.monotonic() + DEADLINE_S
        while len(ids) < len(requests) or self.vllm_scheduler.has_requests():
            assert time.monotonic() < deadline, f"answered {len(outputs)} of {len(requests)}: {self.counters()}"
            while len(ids) < len(requests) and self.llm.llm_engine.get_num_unfinished_requests() < at_once:
                one = requests[len(ids)]
                ids.append(self.submit(one["prompt"], one["tokens"], one.get("salt")))
                if "abort_after" in one:
                    due[ids[-1]] = one["abort_after"]
            for output in self.llm.llm_engine.step():
                if output.finished:
                    outputs[output.request_id] = output
            due = {request_id: steps - 1 for request_id, steps in due.items()}
            for request_id in [request_id for request_id, steps in due.items() if steps <= 0]:
                del due[request_id]
                self.abort(request_id)
        return [self._answer(outputs[request_id]) if request_id in outputs else None for request_id in ids]

    def generate_all(
        self, prompts: list[list[int]], tokens: int = 8, params: list[dict[str, Any] | None] | None = None
    ) -> list[Answer]:
        """Answer several prompts at once, and drain. ``params``: ``kv_transfer_params`` of each."""
        given = params or [None] * len(prompts)
        ids = [self.submit(prompt, tokens, params=own) for prompt, own in zip(prompts, given, strict=True)]
        outputs = self.drain()
        return [self._answer(outputs[request_id]) for request_id in ids]

    def generate(
        self,
        prompt: list[int],
        tokens: int = 8,
        params: dict[str, Any] | None = None,
        stops: list[int] | None = None,
    ) -> Answer:
        """Answer one prompt, and drain."""
        request_id = self.submit(prompt, tokens, params=params, stops=stops)
        return self._answer(self.drain()[request_id])

    @staticmethod
    def _answer(output: Any) -> Answer:
        best = output.outputs[0]
        margins = []
        for chosen, step in zip(best.token_ids, best.logprobs, strict=True):
            others = [logprob.logprob for token, logprob in step.items() if token != chosen]
            margins.append(step[chosen].logprob - max(others))
        params = output.kv_transfer_params
        return Answer(list(best.token_ids), min(margins), output.num_cached_tokens or 0, margins, params)

    def abort(self, request_id: str) -> None:
        """Abort as a client that hangs up does."""
        self.llm.llm_engine.abort_request([request_id])

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        assert self.llm.llm_engine.reset_prefix_cache(), "blocks are still held"

    def free_blocks(self) -> int:
        """Return how many blocks nobody holds."""
        free: int = self.vllm_scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return free

    def counters(self) -> dict[str, int]:
        """Return what both sides counted."""
        return {**self.scheduler.counters, **(self.worker.counters if self.worker else {})}

    def close(self) -> None:
        """End the engine and the connector's threads."""
        self.llm.llm_engine.engine_core.shutdown()


def _abort_during_load(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    """Abort a request while its load hangs; return what was held then, and what is held in the end."""
    from kvpool_vllm.testing import FAULTS

    free = engine.free_blocks()
    FAULTS.get_gate.close()
    request = engine.submit(prompt)
    engine.step_until(FAULTS.get_gate.arrived.is_set)
    engine.abort(request)
    engine.llm.llm_engine.step()
    held = free - engine.free_blocks()
    FAULTS.get_gate.open()
    engine.drain()
    engine.step_until(lambda: engine.scheduler.leases == 0)
    return {"held": held, "leaked": free - engine.free_blocks(), "tracked": len(engine.scheduler._requests)}


def _abort_after_load(engine: Engine, prompt: list[int]) -> None:
    """Abort a request right after the step that a load was for."""
    from kvpool_vllm.testing import FAULTS

    gets = FAULTS.gets
    request = engine.submit(prompt)
    engine.step_until(lambda: FAULTS.gets > gets)
    engine.abort(request)
    engine.drain()


def _hold_first_layer(engine: Engine, path: str) -> None:
    """Have each forward that saves layers wait, after its first one, until the other engine has received that."""
    done = engine.worker.layer_done

    def held(name: str) -> None:
        done(name)
        deadline = time.monotonic() + DEADLINE_S
        while engine.worker._forward is not None and not Path(path).exists():
            assert time.monotonic() < deadline, "nobody received the first layer"
            time.sleep(0.005)

    engine.worker.layer_done = held


def _tell_first_layer(path: str) -> None:
    """Leave a file when this engine has received some layers of blocks, and not the last."""
    from kvpool.client_receive import _Receive

    take = _Receive._take

    def told(self: Any, asked: Any, part: Any, layers: int) -> None:
        take(self, asked, part, layers)
        if part.layers < self._call.blocks.layers:
            Path(path).touch()

    _Receive._take = told  # type: ignore[method-assign]


def _set_faults(values: dict[str, Any]) -> int:
    """Do nothing wrong but what is given; return how many blocks the pool in this process holds."""
    from kvpool_vllm.testing import FAULTS, POOL

    FAULTS.reset()
    for name, value in values.items():
        setattr(FAULTS, name, value)
    return len(POOL.shards)


def _generate_killing(engine: Engine, prompt: list[int], pid: int) -> Answer:
    """Answer a prompt whose node is killed after the lookup, when its load begins."""
    from kvpool_vllm.testing import FAULTS

    FAULTS.before_get = lambda: os.kill(pid, signal.SIGKILL)
    try:
        return engine.generate(prompt)
    finally:
        FAULTS.reset()


def _generate_partly(engine: Engine, prompt: list[int], blocks: int) -> Answer:
    """Answer a prompt whose load ends after some blocks, with garbage in the others."""
    from kvpool_vllm.testing import FAULTS

    FAULTS.get_blocks_max, FAULTS.spoil_rest = blocks, True
    try:
        return engine.generate(prompt)
    finally:
        FAULTS.reset()


def _serve(engine: Engine, request: dict[str, Any]) -> Any:
    prompt = request.get("prompt", [])
    match request["do"]:
        case "generate":
            return engine.generate(prompt, request["tokens"], request.get("params"), request.get("stops")).__dict__
        case "generate_killing":
            return _generate_killing(engine, prompt, request["pid"]).__dict__
        case "generate_partly":
            return _generate_partly(engine, prompt, request["blocks"]).__dict__
        case "generate_all":
            return [answer.__dict__ for answer in engine.generate_all(request["prompts"], request["tokens"])]
        case "mixed":
            return [answer and answer.__dict__ for answer in engine.mixed(request["requests"], request["at_once"])]
        case "abort_during_load":
            return _abort_during_load(engine, prompt)
        case "abort_after_load":
            return _abort_after_load(engine, prompt)
        case "faults":
            return _set_faults(request["values"])
        case "hold_first_layer":
            return _hold_first_layer(engine, request["path"])
        case "tell_first_layer":
            return _tell_first_layer(request["path"])
        case "settle":
            engine.drain()
            engine.step_until(lambda: not any(side.leases for side in engine.schedulers))
            return None
        case "reset_all":
            assert engine.vllm_scheduler.reset_prefix_cache(reset_connector=True)
            return None
        case "forget":
            return engine.forget()
        case "state":
            sides = {"scheduler": engine.scheduler, "worker": engine.worker}
            return {
                "counters": engine.counters(),
                "free_blocks": engine.free_blocks(),
                "leases": sum(side.leases for side in engine.schedulers),
                "tracked": sum(len(side._requests) for side in engine.schedulers),
                "held_for_saving": sum(side._saves.blocks for side in engine.schedulers),
                "block_tokens": engine.llm.llm_engine.vllm_config.cache_config.block_size,
                "preemptions": engine.preemptions,
                "scheduled_tokens": engine.scheduled_tokens,
                "client": {name: side._client.stats() for name, side in sides.items() if side},
            }
    raise ValueError(request["do"])


def main() -> None:
    """Serve one engine; the arguments are the model, the connector's settings and vLLM's, both as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is not an answer
    engine = Engine(Path(sys.argv[1]), json.loads(sys.argv[2]), **json.loads(sys.argv[3]))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_serve(engine, json.loads(line))), file=answers, flush=True)
    engine.close()


if __name__ == "__main__":
    main()
