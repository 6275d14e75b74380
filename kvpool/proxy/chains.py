"""Block hashes as vLLM computes them: chained over parent, tokens and nothing else. No I/O.

Upstream contract: ``vllm.v1.core.kv_cache_utils.hash_block_tokens`` and ``vllm.utils.hashing``. Whether it is kept is
checked for each namespace, by its fingerprint: an engine's own hash of a fixed block.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

from kvpool.model import KEY_BYTES, Namespace

SEED: Final = "vllm-none-hash"
"""Of engines that run without PYTHONHASHSEED."""

BLOCK_TOKENS_MAX: Final = 1 << 14
"""Engines have blocks of some dozens of tokens; whoever says more is not believed."""

SLICE_TOKENS: Final = 1 << 10
"""Of a long prompt's, so many are hashed at a time: some 0.1 to 0.6 ms, and the loop is free again."""

_Block = tuple[bytes, tuple[int, ...], None]


def _pickled(value: str | _Block) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _cbor_head(kind: int, number: int) -> bytes:
    for width, (code, limit) in enumerate(((">B", 1 << 8), (">H", 1 << 16), (">I", 1 << 32), (">Q", 1 << 64))):
        if number < 24 and not width:
            return bytes([kind << 5 | number])
        if number < limit:
            return bytes([kind << 5 | 24 + width]) + struct.pack(code, number)
    raise OverflowError(number)


def _cbor(value: str | _Block) -> bytes:
    """Return RFC 8949's canonical form of the two kinds of values that are hashed."""
    if isinstance(value, str):
        text = value.encode()
        return _cbor_head(3, len(text)) + text
    parent, tokens, _ = value
    numbers = b"".join([_cbor_head(0, token) for token in tokens])
    return b"\x83" + _cbor_head(2, len(parent)) + parent + _cbor_head(4, len(tokens)) + numbers + b"\xf6"


_FORMS: Final[dict[str, Callable[[str | _Block], bytes]]] = {"sha256": _pickled, "sha256_cbor": _cbor}


def _hashes(algorithm: str, seed: str, block_tokens: int, tokens: Sequence[int]) -> Iterator[bytes]:
    form = _FORMS[algorithm]
    parent = hashlib.sha256(form(seed)).digest()
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = hashlib.sha256(form((parent, tuple(tokens[start : start + block_tokens]), None))).digest()
        yield parent


def can_hash(namespace: Namespace, seed: str = SEED) -> bool:
    """Return whether engines of this namespace hash as this module does."""
    if namespace.hash_algorithm not in _FORMS or namespace.block_tokens > BLOCK_TOKENS_MAX:
        return False
    block = range(namespace.block_tokens)
    return next(_hashes(namespace.hash_algorithm, seed, len(block), block)).hex()[:32] == namespace.hash_fingerprint


def key_slices(namespace: Namespace, tokens: Sequence[int], seed: str = SEED) -> Iterator[bytes]:
    """Yield the keys of a prompt's whole blocks, a piece at a time, and last that of the partial one behind them.

    The latter is the connector's own, ``kvpool_vllm.names.Names.tail``. Raises OverflowError for tokens below 0.
    """
    found = _hashes(namespace.hash_algorithm, seed, namespace.block_tokens, tokens)
    most = max(1, SLICE_TOKENS // namespace.block_tokens)
    parent = b"None"  # of a prompt without a whole block: that it has no salt
    while some := list(islice(found, most)):
        parent = some[-1]
        yield b"".join([name[:KEY_BYTES] for name in some])
    if rest := len(tokens) % namespace.block_tokens:
        packed = struct.pack(f"<{rest}q", *tokens[-rest:])
        yield hashlib.sha256(b"partial block" + parent + packed).digest()[:KEY_BYTES]


def block_keys(namespace: Namespace, tokens: Sequence[int], seed: str = SEED) -> bytes:
    """Return the keys of a prompt's whole blocks, 16 bytes each. Raises OverflowError for tokens below 0."""
    found = _hashes(namespace.hash_algorithm, seed, namespace.block_tokens, tokens)
    return b"".join([name[:KEY_BYTES] for name in found])
