"""What routing needs of a request in OpenAI's form, and the two requests that it becomes between prefill and decode."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import xxhash

from kvpool.errors import InvalidArgumentError
from kvpool.proxy.routing import CHUNK_TOKENS, Prompt

CHUNK_CHARS: Final = 4 * CHUNK_TOKENS
"""A token is about four characters."""

OUTPUT_TOKENS: Final = 256
"""Taken for requests that set no limit: few of them use what they could."""

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

REMOTE_DECODE: Final[dict[str, Any]] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""Asks a prefill instance to keep the prompt's KV for another one, and to say where it is."""


TRANSFERS: Final = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""Say what engines fetch, and from where, as fields of a request or in its ``vllm_xargs``."""

PARTS_MAX: Final = 4 << 20
"""Values in a body: each takes much more memory than it has bytes, and nobody else is served while they are read."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: its parsed body, its prompt, whether it streams, and whether its KV can come from elsewhere."""

    body: dict[str, Any]
    prompt: Prompt
    stream: bool
    divisible: bool


def read(path: str, raw: bytes) -> Asked:
    """Return what a request asks for. Raises InvalidArgumentError for what no engine could take."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > PARTS_MAX:
        raise InvalidArgumentError("body", f"must have at most {PARTS_MAX} values")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidArgumentError("body", "must be JSON") from None
    if not isinstance(body, dict):
        raise InvalidArgumentError("body", "must be a JSON object")
    seed = _seed(body)
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list):
            raise InvalidArgumentError("messages", "must be a list")
        chunks, tokens = _of_text("".join(_chat_parts(body, messages)), seed)
        single = True
    else:
        prompt = alone(body.get("prompt"))
        if prompt is None and "prompt_embeds" not in body:
            raise InvalidArgumentError("prompt", "must be given")
        single = isinstance(prompt, str) or _is_tokens(prompt)
        chunks, tokens = _of_prompts(prompt, seed)
    divisible = single and not any(body.get(name) for name in ("prompt_embeds", "use_beam_search"))
    divisible = divisible and body.get("prompt_logprobs") is None  # 0 asks for those of the prompt's own tokens
    divisible = divisible and body.get("n") in (None, 1) and body.get("best_of") in (None, 1)
    divisible = divisible and not (body.get("echo") and body.get("logprobs") is not None)
    return Asked(body, Prompt(chunks, tokens, _output_tokens(body)), body.get("stream") is True, divisible)


def fetch(transfer: str) -> dict[str, Any]:
    """Return what tells a decode instance to fetch KV while it is computed, by the id that the prefill was given."""
    return {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer}


def for_prefill(body: Mapping[str, Any], transfer: str = "") -> dict[str, Any]:
    """Return the request for the prefill instance: one token, no stream, and the KV kept for somebody else.

    ``transfer``: the id under which to keep it; else the instance chooses.
    """
    params = REMOTE_DECODE | ({"transfer_id": transfer} if transfer else {})
    left_out = {"stream_options", "min_tokens", "logprobs", "top_logprobs"}
    changed = {k: v for k, v in for_decode(body, None).items() if k not in left_out}
    changed |= {"max_tokens": 1, "stream": False, "kv_transfer_params": params}
    if "max_completion_tokens" in changed:
        changed["max_completion_tokens"] = 1
    return changed


def for_decode(body: Mapping[str, Any], params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the request for the decode instance: the client's, with what the prefill instance has said.

    What the client itself says of transfers does not count: it could name any host.
    """
    changed = {k: v for k, v in body.items() if k not in TRANSFERS}
    if isinstance(further := changed.get("vllm_xargs"), dict):
        changed["vllm_xargs"] = {k: v for k, v in further.items() if k not in TRANSFERS}
    return changed if params is None else changed | {"kv_transfer_params": dict(params)}


def alone(prompt: Any) -> Any:
    """Return the prompt in a list of one, which is answered as the prompt itself; whatever else it is, as it is."""
    if isinstance(prompt, list) and len(prompt) == 1 and (isinstance(prompt[0], str) or _is_tokens(prompt[0])):
        return prompt[0]
    return prompt


def _seed(body: Mapping[str, Any]) -> int:
    apart = [body.get("model"), body.get("cache_salt")]
    return xxhash.xxh3_64_intdigest(json.dumps(apart, default=str).encode())


def _chat_parts(body: Mapping[str, Any], messages: list[Any]) -> Iterator[str]:
    """Yield the conversation in the order in which templates write it: tools come first."""
    if body.get("tools"):
        yield json.dumps(body["tools"])
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), str):
            rest = {k: v for k, v in message.items() if k not in {"role", "content"}}
            yield f"\n{message.get('role')}\n{message['content']}{json.dumps(rest) if rest else ''}"
        else:
            yield json.dumps(message)


def _output_tokens(body: Mapping[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        limit = body.get(name)
        if isinstance(limit, int) and 0 <= limit < 1 << 31:
            return min(limit, OUTPUT_TOKENS)
    return OUTPUT_TOKENS


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and set(map(type, prompt)) == {int}


def _of_prompts(prompt: Any, seed: int) -> tuple[tuple[int, ...], int]:
    """Return chunks and tokens of what ``prompt`` may be; of several prompts, the first one's chunks."""
    if isinstance(prompt, str):
        return _of_text(prompt, seed)
    if _is_tokens(prompt):
        return _of_tokens(prompt, seed)
    parts = prompt if isinstance(prompt, list) else []
    read_parts = [_of_prompts(part, seed) for part in parts if isinstance(part, str) or _is_tokens(part)]
    return (read_parts[0][0], sum(tokens for _, tokens in read_parts)) if read_parts else ((), 0)


def _of_text(text: str, seed: int) -> tuple[tuple[int, ...], int]:
    chunks = []
    for start in range(0, len(text) - CHUNK_CHARS + 1, CHUNK_CHARS):
        seed = xxhash.xxh3_64_intdigest(text[start : start + CHUNK_CHARS].encode(errors="surrogatepass"), seed)
        chunks.append(seed)
    return tuple(chunks), -(-len(text) // 4)


def _of_tokens(tokens: list[int], seed: int) -> tuple[tuple[int, ...], int]:
    try:
        packed = array("q", tokens).tobytes()
    except OverflowError:
        raise InvalidArgumentError("prompt", "holds a token id that no vocabulary has") from None
    chunks = []
    size = 8 * CHUNK_TOKENS
    for start in range(0, len(packed) - size + 1, size):
        seed = xxhash.xxh3_64_intdigest(packed[start : start + size], seed)
        chunks.append(seed)
    return tuple(chunks), len(tokens)
