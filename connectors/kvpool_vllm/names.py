"""Names of a request's blocks: what engines of one namespace call the same KV."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Any

from kvpool.model import KEY_BYTES

if TYPE_CHECKING:
    from kvpool_vllm.groups import Groups


class Names:
    """Names blocks by their tokens; those of which tokens do not say all have a name in one transfer alone."""

    def __init__(self, groups: Groups, *, discard_tails: bool) -> None:
        """``discard_tails``: a prompt's partial block is nothing to share."""
        self._groups = groups
        self._block_tokens = groups.block_tokens
        self._discard_tails = discard_tails

    def full_blocks(self, request: Any) -> int:
        """Return how many full blocks the request's tokens make."""
        return len(request.block_hashes) // self._groups.hashes_per_block

    def hashes(self, request: Any) -> list[bytes]:
        """Return one hash per full block; each covers all tokens before it."""
        step = self._groups.hashes_per_block
        hashes: list[bytes] = request.block_hashes
        return hashes if step == 1 else hashes[step - 1 :: step]

    def chain(self, request: Any) -> list[bytes]:
        """Return a list of its own: the hashes of the full blocks, and a name for the partial one if it counts."""
        chain = list(self.hashes(request)[: self._groups.blocks_max(request.num_tokens)])
        if self.has_tail(request):
            chain.append(self.tail(request))
        return chain

    @staticmethod
    def may_share(request: Any) -> bool:
        """Whether the request's hashes name its KV: a LoRA adapter is hashed by its name alone."""
        return request.lora_request is None

    # ---- partial blocks ----

    def has_tail(self, request: Any) -> bool:
        """Whether the chain ends in a partial block, which generated tokens have not yet filled."""
        return self.shares_tail(request) and (
            self.full_blocks(request) == request.num_prompt_tokens // self._block_tokens
        )

    def shares_tail(self, request: Any) -> bool:
        """Whether the prompt ends in a partial block that is kept for others."""
        return not self._discard_tails and request.num_prompt_tokens % self._block_tokens > 0 and self._is_told(request)

    def tail(self, request: Any) -> bytes:
        """Return the key of a partial block, which only the very same tokens have."""
        number, tokens = divmod(request.num_prompt_tokens, self._block_tokens)
        parent = self.hashes(request)[number - 1] if number else repr(request.cache_salt).encode()
        ids = request.all_token_ids[number * self._block_tokens : request.num_prompt_tokens]
        return hashlib.sha256(b"partial block" + parent + struct.pack(f"<{tokens}q", *ids)).digest()

    def _is_told(self, request: Any) -> bool:
        """Whether the tokens of a partial block say all that is in it."""
        return (
            self._groups.prefixes_help
            and not self._groups.drop_last
            and not request.mm_features
            and request.prompt_embeds is None
        )

    # ---- transfers ----

    def of_transfer(self, request: Any, transfer: int) -> tuple[list[bytes], int]:
        """Return the names of all blocks of a prompt in one of its transfers, and how many of the last it alone has."""
        whole, rest = divmod(request.num_prompt_tokens, self._block_tokens)
        tails = int(rest > 0 and not self._groups.drop_last)
        names = list(self.hashes(request)[:whole])
        if tails:
            names.append(self.tail(request))
        if not self.may_share(request):
            return [_private(transfer, name) for name in names], len(names)
        told = self._is_told(request)
        if tails and not told:
            names[-1] = _private(transfer, names[-1])
        return names, int(tails and (self._discard_tails or not told))


def _private(transfer: int, name: bytes) -> bytes:
    # Of other tokens nobody shall get the KV, not even in this transfer: a chat template may say the time.
    return hashlib.sha256(b"transfer" + struct.pack("<Q", transfer) + name).digest()[:KEY_BYTES]
