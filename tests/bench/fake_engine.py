"""A server that answers as vLLM does over HTTP, with caches that are sets of prompts; it computes nothing."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BLOCK = 4
Prompt = tuple[int, ...]


class FakePool:
    """The prompts that any engine has stored."""

    def __init__(self) -> None:
        self.prompts: set[Prompt] = set()


class FakeEngine(ThreadingHTTPServer):
    """One engine: an own cache of so many prompts, the least recent of which go first, and a pool behind it."""

    daemon_threads = True

    def __init__(self, pool: FakePool, capacity: int = 4) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pool = pool
        self.capacity = capacity
        self.own: OrderedDict[Prompt, None] = OrderedDict()
        self.own_hits = self.pool_hits = 0
        self.lock = threading.Lock()
        self.has_metrics = self.can_reset = True
        self.requests: list[dict[str, Any]] = []
        self.answer: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None] | None = None
        """Answers completions in place of the usual, when set."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def take(self, prompt: Prompt) -> int:
        """Answer a prompt from the caches and store it; returns how many of its tokens were cached."""
        cached = (len(prompt) - 1) // BLOCK * BLOCK
        with self.lock:
            if prompt in self.own:
                self.own_hits += cached
            elif prompt in self.pool.prompts:
                self.pool_hits += cached
            else:
                cached = 0
            self.pool.prompts.add(prompt)
            self.own[prompt] = None
            self.own.move_to_end(prompt)
            while len(self.own) > self.capacity:
                self.own.popitem(last=False)
        return cached


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeEngine

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _body(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        engine = self.server
        if self.path == "/v1/models":
            self._body(200, json.dumps({"data": [{"id": "fake"}]}))
        elif self.path == "/health":
            self._body(200, "")
        elif self.path == "/metrics" and engine.has_metrics:
            self._body(
                200,
                "# HELP vllm:prefix_cache_hits_total x\n"
                f'vllm:prefix_cache_hits_total{{engine="0"}} {float(engine.own_hits)}\n'
                f'vllm:external_prefix_cache_hits_total{{engine="0"}} {float(engine.pool_hits)}\n'
                f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="{engine.capacity * 5}"}} 1.0\n',
            )
        else:
            self._body(404, "{}")

    def do_POST(self) -> None:
        engine = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/reset_prefix_cache":
            if engine.can_reset:
                engine.own.clear()
            self._body(200 if engine.can_reset else 404, '{"success": true}' if engine.can_reset else "{}")
            return
        request = json.loads(body)
        engine.requests.append(request)
        if engine.answer is not None:
            engine.answer(self, request)
            return
        cached = engine.take(tuple(request["prompt"]))
        begin_stream(self)
        for number in range(request["max_tokens"]):
            send_event(self, {"choices": [{"text": f"t{request['prompt'][0]}-{number}"}]})
        usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": request["max_tokens"]}
        send_event(self, {"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": cached}}})
        send_chunk(self, b"data: [DONE]\n\n")
        send_chunk(self, b"")


def begin_stream(handler: BaseHTTPRequestHandler) -> None:
    """Send the head of a streamed answer."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()


def send_chunk(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """Send one chunk; an empty one is the last."""
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
    handler.wfile.flush()


def send_event(handler: BaseHTTPRequestHandler, event: dict[str, Any]) -> None:
    """Send one event."""
    send_chunk(handler, b"data: " + json.dumps(event).encode() + b"\n\n")


@contextmanager
def serving(*engines: FakeEngine) -> Iterator[None]:
    """Serve until the block ends."""
    threads = [threading.Thread(target=engine.serve_forever, args=(0.01,), daemon=True) for engine in engines]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for engine in engines:
            engine.shutdown()
            engine.server_close()
        for thread in threads:
            thread.join(5)


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
