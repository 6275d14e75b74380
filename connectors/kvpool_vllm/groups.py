"""KV cache groups of hybrid models: which blocks of each group a request needs to go on from a prefix.

A group is a set of layers that share one block table. Full attention needs every block before the point where a
request goes on; a sliding window only the last few; chunked local attention those of the chunk that is under way.
Nothing here imports vLLM: its specifications are read by their names and attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvpool.errors import InvalidArgumentError

FULL = "full"
MLA = "mla"
SLIDING_WINDOW = "sliding_window"
CHUNKED_LOCAL = "chunked_local"

_KINDS = {
    "FullAttentionSpec": FULL,
    "MLAAttentionSpec": MLA,
    "SlidingWindowSpec": SLIDING_WINDOW,
    "ChunkedLocalAttentionSpec": CHUNKED_LOCAL,
}
_WHY_NOT = {
    "MambaSpec": "its state is kept for whole requests, not for block boundaries that another prompt could go on from",
    "CrossAttentionSpec": "it depends on an encoder's input, which prefix hashes do not name",
    "EncoderOnlyAttentionSpec": "an encoder's KV is not a prefix of anything",
}


@dataclass(frozen=True, slots=True)
class Group:
    """One KV cache group of an engine."""

    number: int
    """Its place in the engine's list."""
    kind: str
    block_tokens: int
    span: int = 0
    """Tokens of the sliding window or of a chunk; 0 for full attention."""
    layers: tuple[str, ...] = ()
    stored: str = ""
    """Type of the stored numbers, with the way they are quantised; "" where that is not known."""
    heads: int = 0
    """KV heads that a rank has of each layer; 0 where layers differ in that."""

    @property
    def label(self) -> str:
        """What tells groups of different kinds apart, for people and for the namespace."""
        return f"{self.kind}:{self.span}" if self.span else self.kind

    @property
    def last_blocks(self) -> int:
        """At most how many of the last blocks are needed, wherever a request goes on; 0 for all."""
        if self.kind == CHUNKED_LOCAL:
            return max(1, self.span // self.block_tokens - 1)
        return max(1, -(-(self.span - 1) // self.block_tokens)) if self.span else 0

    def first_needed(self, blocks: int) -> int:
        """Return the first block that is read by a request that goes on behind ``blocks`` whole blocks."""
        return min(blocks, self.first_needed_at(blocks * self.block_tokens))

    def first_needed_at(self, tokens: int) -> int:
        """Return the first block that is read by a request that goes on behind so many tokens."""
        if self.kind == SLIDING_WINDOW:
            return max(0, tokens - self.span + 1) // self.block_tokens
        if self.kind == CHUNKED_LOCAL:
            return tokens // self.span * self.span // self.block_tokens
        return 0


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of an engine; all have blocks of one size."""

    all: tuple[Group, ...]
    block_tokens: int
    hashes_per_block: int
    """A block's key is every so-manieth hash of the request, the one that covers the block's last token."""
    drop_last: bool = False
    """The last block of a hit is computed again: what a draft model keeps for it depends on the token behind it."""

    @property
    def main(self) -> int:
        """Number of the group whose every block must be there; a lookup asks for it first."""
        return next((g.number for g in self.all if not g.span), 0)

    @property
    def others(self) -> tuple[Group, ...]:
        """All groups but the main one."""
        return tuple(g for g in self.all if g.number != self.main)

    @property
    def prefixes_help(self) -> bool:
        """Whether the leading blocks of a load are of use without the rest, so that it may fail in part."""
        return len(self.all) == 1 and not self.all[0].span

    def blocks_max(self, tokens: int) -> int:
        """Return how many leading blocks a request of so many tokens may take from elsewhere.

        The engine steps back one token from a whole prompt. Where a window ends, the block before it, which
        was not loaded, would then be read: only full attention may offer the whole prompt.
        """
        return (tokens if all(not g.span for g in self.all) else tokens - 1) // self.block_tokens

    def transfer_tokens(self, tokens: int) -> int:
        """Return how many tokens of a prompt are taken from another engine that has computed all of it."""
        if self.drop_last:
            return max(0, tokens // self.block_tokens - 1) * self.block_tokens
        return tokens if all(not g.span for g in self.all) else tokens - 1  # as blocks_max

    def load_ranges(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return, for each group, the blocks [first, end) to load where the engine holds ``first`` blocks itself.

        What lies before a group's window is neither loaded nor, by the engine, given a block.
        """
        return [(min(end, max(first, g.first_needed(end))), end) for g in self.all]

    def receive_ranges(self, first: int, tokens: int) -> list[tuple[int, int]]:
        """Return the same for a request that goes on behind so many tokens, whose last block need not be full."""
        end = -(-tokens // self.block_tokens)
        return [(min(end, max(first, g.first_needed_at(tokens))), end) for g in self.all]


def read_groups(kv_cache_groups: Sequence[Any], hash_tokens: int, *, draft: bool = False) -> Groups:
    """Return vLLM's KV cache groups in our words; raise InvalidArgumentError, in a sentence, for what cannot work.

    ``hash_tokens``: tokens from one of a request's hashes to the next. ``draft``: a draft model's layers, which
    look one token ahead, are among them.
    """
    if not kv_cache_groups:
        raise InvalidArgumentError("model", "has no KV cache; there is nothing to share")
    groups = tuple(_read(number, group) for number, group in enumerate(kv_cache_groups))
    sizes = {g.block_tokens for g in groups}
    if len(sizes) > 1:
        raise InvalidArgumentError(
            "model", f"has KV cache groups with blocks of {_words(sizes)} tokens; kvpool supports one size at a time"
        )
    (block_tokens,) = sizes
    if block_tokens % hash_tokens:
        raise InvalidArgumentError(
            "block_size", f"of {block_tokens} tokens is no multiple of the {hash_tokens} tokens between two hashes"
        )
    if draft and len(groups) > 1:
        raise InvalidArgumentError(
            "speculative_config", f"a draft model cannot be combined with {len(groups)} KV cache groups so far"
        )
    return Groups(groups, block_tokens, block_tokens // hash_tokens, drop_last=draft)


def _read(number: int, group: Any) -> Group:
    spec = group.kv_cache_spec
    specs = list(getattr(spec, "kv_cache_specs", {"": spec}).values())
    heads = {int(getattr(s, "num_kv_heads", 0)) for s in specs}
    found = {_read_spec(number, s, tuple(group.layer_names), max(heads) if len(heads) == 1 else 0) for s in specs}
    if len(found) > 1:
        raise InvalidArgumentError(
            "model", f"mixes {_words(g.label for g in found)} in one KV cache group; kvpool supports one kind a group"
        )
    return found.pop()


def _read_spec(number: int, spec: Any, layers: tuple[str, ...], heads: int) -> Group:
    name = type(spec).__name__
    if name not in _KINDS:
        reason = _WHY_NOT.get(name, f"supported are {_words(_KINDS.values())}")
        raise InvalidArgumentError("model", f"has KV of kind {name}, which kvpool cannot share: {reason}")
    kind = _KINDS[name]
    span = 0
    if kind == SLIDING_WINDOW:
        span = spec.sliding_window + getattr(spec, "extra_retained_tokens", 0)
    elif kind == CHUNKED_LOCAL:
        span = spec.attention_chunk_size
        if span % spec.block_size:
            raise InvalidArgumentError(
                "block_size", f"of {spec.block_size} tokens must divide the model's attention chunks of {span}"
            )
    return Group(number, kind, spec.block_size, span, layers, _stored(spec), heads)


def _stored(spec: Any) -> str:
    quant: Any = getattr(spec, "kv_quant_mode", None)
    dtype = str(getattr(spec, "dtype", "")).removeprefix("torch.")
    return f"{dtype}:{quant.name.lower()}" if quant else dtype


def _words(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values}))
