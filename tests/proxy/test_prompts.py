"""Prompts as routing sees them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.errors import InvalidArgumentError
from kvpool.proxy.prompts import CHAT, CHUNK_CHARS, COMPLETIONS, alone, for_decode, for_prefill, read
from kvpool.proxy.routing import CHUNK_TOKENS

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
NAMES = st.sampled_from(["prompt", "messages", "model", "n", "stream", "max_tokens", "tools", "logprobs", "echo"])


def prompt_of(path=COMPLETIONS, **body):
    return read(path, json.dumps(body).encode()).prompt


def common(a, b):
    return sum(x == y for x, y in zip(a.chunks, b.chunks, strict=False))


@given(st.sampled_from([CHAT, COMPLETIONS]), st.dictionaries(NAMES, VALUES))
def test_any_body_is_read_or_refused(path, body):
    """Nothing that JSON can hold does anything else."""
    try:
        asked = read(path, json.dumps(body).encode())
    except InvalidArgumentError as error:
        assert error.field in {"prompt", "messages"}
    else:
        assert asked.prompt.tokens >= 0


@given(st.text(max_size=3000), st.text(max_size=600), st.text(max_size=600))
def test_chunks_are_of_the_prefix(head, one, other):
    """What two prompts have in common, their chunks have, to the chunk."""
    a, b = prompt_of(prompt=head + one), prompt_of(prompt=head + other)
    assert common(a, b) >= len(head) // CHUNK_CHARS
    assert len(a.chunks) == len(head + one) // CHUNK_CHARS
    differ = next((n for n, (x, y) in enumerate(zip(head + one, head + other, strict=False)) if x != y), None)
    if differ is not None:
        assert common(a, b) == differ // CHUNK_CHARS


def test_tokens_are_counted_exactly():
    """Where the client has done the tokenizer's work."""
    asked = prompt_of(prompt=list(range(200)))
    assert (asked.tokens, len(asked.chunks)) == (200, 200 // CHUNK_TOKENS)


def test_models_and_salts_share_nothing():
    """Their KV is of no use to each other."""
    text = "word " * 200
    plain = prompt_of(prompt=text, model="a")
    assert common(plain, prompt_of(prompt=text, model="b")) == 0
    assert common(plain, prompt_of(prompt=text, model="a", cache_salt="s")) == 0
    assert common(plain, prompt_of(prompt=text, model="a", temperature=1)) == len(plain.chunks)


def test_a_chat_grows_at_its_end():
    """Each turn begins with all turns before; tools come first, and pictures count."""
    picture = {"type": "image_url", "image_url": {"url": "data:" + "A" * 900}}
    talk = [{"role": "system", "content": "s" * 600}, {"role": "user", "content": [picture]}]
    first = prompt_of(CHAT, messages=talk)
    second = prompt_of(CHAT, messages=[*talk, {"role": "assistant", "content": "a" * 300}])
    assert common(first, second) == len(first.chunks)
    assert len(second.chunks) > len(first.chunks) > 4
    assert common(first, prompt_of(CHAT, messages=talk, tools=[{"type": "function"}])) == 0


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, 256),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 10**6}, 256),
        ({"max_completion_tokens": 9, "max_tokens": 3}, 9),
        ({"max_tokens": "x"}, 256),
    ],
)
def test_output_is_expected_within_reason(body, tokens):
    """What a client allows, few answers use up."""
    assert prompt_of(prompt="p", **body).output_tokens == tokens


def test_the_decode_request_keeps_what_it_does_not_know():
    """All fields but the transfer's."""
    body = {"prompt": "p", "x": 1, "kv_transfer_params": {"a": 1}}
    assert for_decode(body, None) == {"prompt": "p", "x": 1}
    assert for_decode(body, {"b": 2}) == {"prompt": "p", "x": 1, "kv_transfer_params": {"b": 2}}


def test_nothing_that_names_a_transfer_is_kept():
    """Engines take it from a request's further arguments too."""
    named = {"kv_transfer_params": "x", "ec_transfer_params": {"x": 1}}
    body = {"prompt": "p", "vllm_xargs": {"y": 2} | named} | named
    assert for_decode(body, None) == {"prompt": "p", "vllm_xargs": {"y": 2}}
    assert for_prefill(body)["vllm_xargs"] == {"y": 2}
    assert "ec_transfer_params" not in for_prefill(body)
    assert for_decode({"vllm_xargs": "x"}, None) == {"vllm_xargs": "x"}
    assert body["vllm_xargs"].keys() == {"y", *named}


@pytest.mark.parametrize("prompt", ["word " * 100, list(range(100)), [7]], ids=["text", "tokens", "a token"])
def test_a_list_of_one_prompt_is_that_prompt(prompt):
    """As engines answer it."""
    one, plain = (read(COMPLETIONS, json.dumps({"prompt": given}).encode()) for given in ([prompt], prompt))
    assert (one.prompt, one.divisible) == (plain.prompt, True)
    assert alone([prompt]) == alone(prompt) == prompt
    for other in ([prompt, prompt], [], None, 7, [[]], [[prompt]], [None]):
        assert alone(other) == other
