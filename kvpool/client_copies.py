"""Copies between a node's memory and a caller's buffers, checksums computed on the way.

Each holds the memory, which so stays mapped until it ends, whatever becomes of the node meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvpool.client_bytes import Blocks, Bytes, CopyThreads, copy_hashed, copy_plain, view
from kvpool.client_rows import digest64, rows_in, rows_out


def copy_in(
    memory: Bytes,
    items: list[tuple[int, int]],
    blocks: Blocks,
    known: list[list[int]] | None,
    copies: CopyThreads,
) -> list[list[int]]:
    """Copy blocks into their slots; returns each one's checksums, computed on the way unless they are known."""
    digests: list[list[int]] = known or [[]] * len(blocks)
    whole = view(memory)
    if blocks.rows is not None:
        for (i, _), found in zip(items, rows_in(whole, blocks.rows, items, copies), strict=True):
            digests[i] = found
        return digests

    def work(part: Sequence[tuple[int, int]]) -> None:
        for i, offset in part:
            slot = memory[offset : offset + blocks.shard_bytes]
            if known is None:
                digests[i] = copy_hashed(blocks.pieces[i], [slot], blocks.layer_bytes, blocks.layers)
            else:
                copy_plain(blocks.pieces[i], [slot], blocks.layer_bytes)

    def quick(part: Sequence[tuple[int, int]]) -> None:
        size, pieces = blocks.shard_bytes, blocks.pieces
        for i, offset in part:
            whole[offset : offset + size] = view(pieces[i][0])

    copies.run(items, blocks.shard_bytes, quick if known is not None and blocks.simple else work)
    return digests


def copy_out(
    memory: Bytes,
    items: Sequence[tuple[int, int, int, int]],
    checksums: Sequence[int],
    blocks: Blocks,
    verify: bool,
    copies: CopyThreads,
    reasons: list[str],
) -> None:
    """Copy from the segment: (number of the block, offset, first and end of its checksums) for each."""
    whole = view(memory)
    if blocks.rows is not None:
        rows_out(whole, blocks.rows, items, checksums if verify else None, copies, reasons)
        return

    def quick(part: Sequence[tuple[int, int, int, int]]) -> None:
        size, pieces = blocks.shard_bytes, blocks.pieces
        for i, offset, first, _ in part:
            (target,) = pieces[i]
            view(target)[:] = whole[offset : offset + size]
            reasons[i] = "" if digest64(target) == checksums[first] else "corrupt"

    def work(part: Sequence[tuple[int, int, int, int]]) -> None:
        for i, offset, first, last in part:
            slot = memory[offset : offset + blocks.shard_bytes]
            if not verify:
                copy_plain([slot], blocks.pieces[i], blocks.layer_bytes)
                reasons[i] = ""
                continue
            digests = copy_hashed([slot], blocks.pieces[i], blocks.layer_bytes, blocks.layers)
            reasons[i] = "" if tuple(digests) == checksums[first:last] else "corrupt"

    copies.run(items, blocks.shard_bytes, quick if verify and blocks.simple else work)
