"""Drives an OpenAI-compatible server: streamed completions with the time of their first token, and its metrics.

Prompts are lists of token ids, which ``/v1/completions`` takes as they are. One connection a request; a
thread for each request in flight, since each of them does nothing but wait.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kvpool.bench.harness import BenchError
from kvpool.errors import InvalidArgumentError

ASK_S = 10.0
ERROR_BYTES_MAX = 300
LINE_BYTES_MAX = 1 << 20
METRICS_BYTES_MAX = 16 << 20
DONE = b"[DONE]"

Prompt = Sequence[int]

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed completion. Times in seconds; ``error`` is empty for a request that was answered."""

    ttft_s: float = 0.0
    total_s: float = 0.0
    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    """What the server says it did not compute; None where it does not say."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """The answers to a list of prompts, in its order, and how long all of them took together."""

    answers: list[Answer]
    wall_s: float

    @property
    def failed(self) -> list[Answer]:
        """Those that were not answered."""
        return [answer for answer in self.answers if answer.error]


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a vLLM server tells of its caches, in tokens; None for what it does not tell."""

    own_hits: float | None = None
    external_hits: float | None = None
    capacity_tokens: int | None = None
    block_tokens: int | None = None
    prompt_tokens: float | None = None
    pool_hits: Mapping[str, float] = field(default_factory=dict)
    """Of our connector, by where they were loaded from: local, remote, fs."""
    load_s: float | None = None
    """Of our connector: seconds that its loads took."""


@dataclass(slots=True)
class _Stream:
    """What has been read of one answer."""

    start_s: float
    first_s: float = 0.0
    text: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, data: bytes) -> None:
        """Take in one event. Raises ValueError for what is no completion."""
        event = json.loads(data)
        if not isinstance(event, dict) or "error" in event:
            raise ValueError(f"the server sent {data[:ERROR_BYTES_MAX].decode(errors='replace')}")
        for choice in event.get("choices") or ():
            if not self.first_s:
                self.first_s = time.monotonic()
            self.text.append(choice.get("text") or "")
        self.usage = event.get("usage") or self.usage

    def answer(self, end_s: float) -> Answer:
        """Return what came."""
        details = self.usage.get("prompt_tokens_details") or {}
        return Answer(
            self.first_s - self.start_s,
            end_s - self.start_s,
            "".join(self.text),
            self.usage.get("prompt_tokens"),
            self.usage.get("completion_tokens"),
            details.get("cached_tokens"),
        )


class Server:
    """One server by its URL, with or without ``/v1`` at its end."""

    def __init__(self, url: str, *, model: str = "", api_key: str = "", ignore_eos: bool = False) -> None:
        """Raise InvalidArgumentError for what is no URL; ``ignore_eos`` is vLLM's own extension."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1:
            raise InvalidArgumentError("url", f"must be http://HOST:PORT or https://HOST, not {url!r}")
        self._secure = parts.scheme == "https"
        self.host, self.port = parts.hostname, port or (443 if self._secure else 80)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._extra = {"ignore_eos": True} if ignore_eos else {}
        self._open: set[socket.socket] = set()
        self.url = url
        self.model = model

    @contextmanager
    def _connection(self, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=timeout_s)
        try:
            yield connection
        finally:
            connection.close()

    def _ask(self, method: str, path: str, bytes_max: int = LINE_BYTES_MAX) -> tuple[int, bytes]:
        """Return status and body of a short request. Raises OSError and http.client.HTTPException."""
        with self._connection(ASK_S) as connection:
            connection.request(method, self._root + path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read(bytes_max)

    def is_healthy(self) -> bool:
        """Return whether the server says it serves."""
        try:
            return self._ask("GET", "/health")[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def find_model(self) -> str:
        """Return the model to ask for, the server's first unless one was named. Raises BenchError."""
        if not self.model:
            try:
                status, body = self._ask("GET", "/v1/models")
                self.model = str(json.loads(body)["data"][0]["id"])
            except (OSError, http.client.HTTPException) as error:
                raise BenchError(f"the server at {self.url} does not answer: {error}") from None
            except (ValueError, KeyError, IndexError, TypeError):
                raise BenchError(f"the server at {self.url} names no model: status {status}") from None
        return self.model

    def reset_prefix_cache(self) -> bool:
        """Empty the server's own cache; False where it offers no such thing, or cannot now."""
        try:
            status, body = self._ask("POST", "/reset_prefix_cache")
            answer = json.loads(body or b"{}")
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return status == http.HTTPStatus.OK and answer.get("success", True) is True

    def metrics(self) -> Metrics:
        """Return what the server tells of its caches; empty where it has no such page."""
        try:
            status, body = self._ask("GET", "/metrics", METRICS_BYTES_MAX)
        except (OSError, http.client.HTTPException):
            return Metrics()
        return parse_metrics(body.decode(errors="replace")) if status == http.HTTPStatus.OK else Metrics()

    def sample(self, name: str) -> float:
        """Return a figure of the server's metrics by its name, or name and labels; 0 where it is not there."""
        try:
            status, body = self._ask("GET", "/metrics", METRICS_BYTES_MAX)
        except (OSError, http.client.HTTPException):
            return 0.0
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", body.decode(errors="replace"), re.MULTILINE)
        return sum(map(float, found)) if status == http.HTTPStatus.OK else 0.0

    def ask_whole(self, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request for a completion that is no stream and return the answer. Raises BenchError."""
        raw = json.dumps({"model": self.model, **body}, separators=(",", ":")).encode()
        try:
            with self._connection(timeout_s) as connection:
                connection.request("POST", self._root + "/v1/completions", raw, self._headers)
                response = connection.getresponse()
                text = response.read()
                answer = json.loads(text)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise BenchError(f"the server at {self.url} does not answer: {error}") from None
        if response.status != http.HTTPStatus.OK or not isinstance(answer, dict):
            raise BenchError(f"the server at {self.url} answers {response.status}: {text[:ERROR_BYTES_MAX]!r}")
        return answer

    def complete(self, prompt: Prompt | str, output_tokens: int, timeout_s: float, **more: Any) -> Answer:
        """Send one prompt and read its answer to the end; a failure is an answer with ``error``."""
        request = {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
            **more,
        }
        body = json.dumps(request, separators=(",", ":")).encode()
        start = time.monotonic()
        try:
            with self._connection(timeout_s) as connection:
                connection.connect()
                sock = connection.sock  # a response may take it from its connection
                self._open.add(sock)
                try:
                    return self._exchange(connection, sock, body, start, timeout_s)
                finally:
                    self._open.discard(sock)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return Answer(total_s=time.monotonic() - start, error=f"{type(error).__name__}: {error}")

    def _exchange(
        self, connection: http.client.HTTPConnection, sock: socket.socket, body: bytes, start: float, limit_s: float
    ) -> Answer:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.request("POST", self._root + "/v1/completions", body, self._headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            text = response.read(ERROR_BYTES_MAX).decode(errors="replace")
            return Answer(error=f"status {response.status}: {text}")
        return self._read(response, sock, start, limit_s)

    def _read(self, response: http.client.HTTPResponse, sock: socket.socket, start: float, limit_s: float) -> Answer:
        stream = _Stream(start)
        while True:
            left_s = start + limit_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no end within {limit_s:.0f} s")
            sock.settimeout(left_s)
            line = response.readline(LINE_BYTES_MAX)
            if not line:
                raise ValueError("the stream ended before it was done")
            name, _, data = line.strip().partition(b":")
            data = data.strip()
            if name != b"data":
                continue  # comments and empty lines between events
            if data == DONE:
                break
            stream.take(data)
        if not stream.first_s:
            raise ValueError("the stream held no token")
        return stream.answer(time.monotonic())

    def hang_up(self) -> None:
        """Give up all requests that run."""
        for sock in tuple(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def run(self, prompts: Sequence[Prompt], output_tokens: int, concurrency: int, timeout_s: float) -> Load:
        """Send all prompts, so many at a time, in their order."""
        with ThreadPoolExecutor(concurrency, "request") as threads:
            start = time.monotonic()
            try:
                running = [threads.submit(self.complete, prompt, output_tokens, timeout_s) for prompt in prompts]
                answers = [future.result() for future in running]
            except BaseException:  # Ctrl-C: what has not begun need not, what runs is hung up on
                threads.shutdown(wait=False, cancel_futures=True)
                self.hang_up()
                raise
            return Load(answers, time.monotonic() - start)


def parse_metrics(page: str) -> Metrics:
    """Return what a page in Prometheus' text format holds of vLLM's caches, summed over its engines."""
    sums: dict[str, float] = {}
    tiers: dict[str, float] = {}
    capacity: int | None = None
    block: int | None = None
    for line in page.splitlines():
        if not line.startswith("vllm:"):
            continue
        found = _SAMPLE.match(line)
        if found is None:
            continue
        name, labels, value = found.groups()
        if name == "vllm:cache_config_info":
            config = dict(_LABEL.findall(labels or ""))
            if config.get("block_size", "").isdigit() and config.get("num_gpu_blocks", "").isdigit():
                block = int(config["block_size"])
                capacity = (capacity or 0) + block * int(config["num_gpu_blocks"])
            continue
        try:
            number = float(value)
        except ValueError:
            continue
        sums[name] = sums.get(name, 0.0) + number
        if name == "vllm:kvpool_hit_tokens_total":
            tier = dict(_LABEL.findall(labels or "")).get("tier", "")
            tiers[tier] = tiers.get(tier, 0.0) + number
    return Metrics(
        sums.get("vllm:prefix_cache_hits_total"),
        sums.get("vllm:external_prefix_cache_hits_total"),
        capacity,
        block,
        sums.get("vllm:prompt_tokens_total"),
        tiers,
        sums.get("vllm:kvpool_load_seconds_total"),
    )
