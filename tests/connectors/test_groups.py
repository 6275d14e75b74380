"""Which blocks of a hybrid model's groups a prefix needs, against brute force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.errors import InvalidArgumentError
from kvpool_vllm.groups import CHUNKED_LOCAL, FULL, MLA, SLIDING_WINDOW, Group, Groups, read_groups

BLOCKS = 12


def tokens_read(group: Group, position: int) -> set[int]:
    """Return the earlier tokens that the token at ``position`` attends to: the definition of each kind."""
    first = {
        SLIDING_WINDOW: position - group.span + 1,
        CHUNKED_LOCAL: position - position % group.span if group.span else 0,
    }.get(group.kind, 0)
    return set(range(max(0, first), position))


def blocks_read(group: Group, blocks: int) -> set[int]:
    """Return the blocks that all tokens from the end of ``blocks`` blocks on read, of those before."""
    start = blocks * group.block_tokens
    read = set().union(*(tokens_read(group, position) for position in range(start, start + group.block_tokens)))
    return {token // group.block_tokens for token in read if token < start}


@st.composite
def a_group(draw: st.DrawFn, number: int, block_tokens: int, kinds: tuple[str, ...]) -> Group:
    kind = draw(st.sampled_from(kinds))
    span = {SLIDING_WINDOW: st.integers(1, 30), CHUNKED_LOCAL: st.integers(1, 4).map(lambda n: n * block_tokens)}
    return Group(number, kind, block_tokens, draw(span[kind]) if kind in span else 0)


@st.composite
def some_groups(draw: st.DrawFn) -> Groups:
    block_tokens = draw(st.sampled_from([1, 2, 4]))
    kinds = [(FULL, MLA)] + [(FULL, SLIDING_WINDOW, CHUNKED_LOCAL)] * draw(st.integers(0, 3))
    order = draw(st.permutations(kinds))
    return Groups(
        tuple(draw(a_group(number, block_tokens, choice)) for number, choice in enumerate(order)), block_tokens, 1
    )


@given(groups=some_groups(), blocks=st.integers(0, BLOCKS))
def test_needed_blocks_are_those_that_attention_reads(groups: Groups, blocks: int) -> None:
    """Not one more, not one less, for every kind."""
    for group in groups.all:
        needed = set(range(group.first_needed(blocks), blocks))
        assert needed == blocks_read(group, blocks)
        if group.span:
            assert len(needed) <= group.last_blocks


@given(groups=some_groups(), data=st.data())
def test_loads_and_what_the_engine_holds_cover_what_is_read(groups: Groups, data: st.DataObject) -> None:
    """An engine that held the prefix ``first`` can go on behind ``end`` with what is loaded."""
    end = data.draw(st.integers(0, BLOCKS))
    first = data.draw(st.integers(0, end))
    for group, (start, stop) in zip(groups.all, groups.load_ranges(first, end), strict=True):
        held = blocks_read(group, first) | set(range(first)) & blocks_read(group, end)
        assert blocks_read(group, end) <= held | set(range(start, stop))
        assert set(range(start, stop)) == {block for block in blocks_read(group, end) if block >= first}


@given(groups=some_groups(), prompt=st.integers(1, BLOCKS * 4))
def test_the_last_token_can_be_computed_again(groups: Groups, prompt: int) -> None:
    """Where the engine steps back from a whole prompt, nothing outside the loaded blocks is read."""
    blocks = groups.blocks_max(prompt)
    position = min(blocks * groups.block_tokens, prompt - 1)
    assert prompt - groups.block_tokens <= blocks * groups.block_tokens <= prompt
    for group in groups.all:
        read = {token // group.block_tokens for token in tokens_read(group, position)}
        assert read <= set(range(group.first_needed(blocks), blocks))


def spec(name: str, block_size: int = 32, **fields: Any) -> Any:
    return type(name, (), {"block_size": block_size, **fields})()


def of(*specs: Any) -> list[Any]:
    return [
        SimpleNamespace(kv_cache_spec=one, layer_names=[f"layers.{number}"]) for number, one in enumerate(specs)
    ]


FULL_SPEC = spec("FullAttentionSpec")
WINDOW_SPEC = spec("SlidingWindowSpec", sliding_window=96, extra_retained_tokens=0)


def test_a_hybrid_model_is_read() -> None:
    """The group that needs every block is asked for first, wherever the engine lists it."""
    groups = read_groups(of(WINDOW_SPEC, FULL_SPEC), 16)
    assert [g.label for g in groups.all] == ["sliding_window:96", "full"]
    assert (groups.main, groups.block_tokens, groups.hashes_per_block) == (1, 32, 2)
    assert [g.last_blocks for g in groups.others] == [3]
    assert not groups.prefixes_help
    assert read_groups(of(FULL_SPEC), 32).prefixes_help
    assert not read_groups(of(WINDOW_SPEC), 32).prefixes_help, "a window without its middle is of no use"


def test_layers_of_one_kind_in_a_wrapper_are_one_group() -> None:
    """The engine wraps the layers of a group where they differ in size."""
    wrapper = spec("UniformTypeKVCacheSpecs", kv_cache_specs={"a": FULL_SPEC, "b": spec("FullAttentionSpec")})
    assert read_groups(of(wrapper), 32).all[0].kind == FULL


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (of(FULL_SPEC, spec("MambaSpec")), "model: has KV of kind MambaSpec, .* kept for whole requests"),
        (of(spec("CrossAttentionSpec")), "depends on an encoder's input"),
        (of(spec("NewSpec")), "supported are chunked_local, full, mla, sliding_window"),
        (of(FULL_SPEC, spec("FullAttentionSpec", 16)), "blocks of 16, 32 tokens"),
        (of(spec("FullAttentionSpec", 24)), "block_size: of 24 tokens is no multiple of the 16"),
        (of(spec("ChunkedLocalAttentionSpec", attention_chunk_size=48)), "must divide the model's attention chunks"),
        (
            of(spec("UniformTypeKVCacheSpecs", kv_cache_specs={"a": FULL_SPEC, "b": WINDOW_SPEC})),
            "mixes full, sliding_window:96 in one KV cache group",
        ),
        ([], "has no KV cache"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_a_sentence(groups: list[Any], said: str) -> None:
    """At start, not at run time."""
    with pytest.raises(InvalidArgumentError, match=said):
        read_groups(groups, 16)


def test_a_draft_model_of_a_hybrid_model_is_refused() -> None:
    """Its windows would have to be one block longer."""
    with pytest.raises(InvalidArgumentError, match="speculative_config: a draft model cannot be combined with 2"):
        read_groups(of(WINDOW_SPEC, FULL_SPEC), 16, draft=True)
