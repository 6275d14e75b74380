"""One client process of the hammer: puts, gets, looks up and evicts as fast as it can, and checks every byte.

``python -m tests.integration.hammer MASTER SOCKET OUTPUT SEED SECONDS CHECKSUM``; "-" is no node. Writes
its counts as JSON, and ends with 1 at the first wrong byte.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import numpy as np

from kvpool import Client, Namespace
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc
from tests.integration.pool import Bytes, chain_of, content_of

SPACES = {
    Namespace(model="hammer", layers=4): 64 << 10,
    Namespace(model="hammer", layers=1, revision="one piece"): 96 << 10,
    Namespace(model="hammer", layers=8, layer_groups=2): 256 << 10,  # of one shard
}
CHAINS, CHAIN_BLOCKS = 30, 32
TOTAL_BYTES = sum(size * space.shards for space, size in SPACES.items()) * CHAINS * CHAIN_BLOCKS
"""Of all blocks that any process may store."""

THREADS = 2


class WrongBytesError(Exception):
    """The one unforgivable thing."""


class Worker:
    """What one thread does to the pool."""

    def __init__(self, client: Client, address: str, seed: str, counts: Counter[str]) -> None:
        self.client = client
        self.address = address
        self.random = random.Random(seed)
        self.counts = counts
        self.buffers = [np.zeros(max(SPACES.values()), np.uint8) for _ in range(CHAIN_BLOCKS)]

    def step(self) -> None:
        """Do one thing."""
        chance = self.random.random()
        space, size = self.random.choice(list(SPACES.items()))
        chain = min(int(self.random.paretovariate(0.7)) - 1, CHAINS - 1)  # some prompts are asked for often
        keys = chain_of(chain, self.random.randint(1, CHAIN_BLOCKS))
        if chance < 0.7:
            self._serve(space, size, keys)
        elif chance < 0.9:
            self.random.shuffle(keys)
            self._get(space, size, keys, self.random.randrange(space.shards))
        elif chance < 0.98:
            self._put(space, size, keys, self.random.randrange(space.shards))
        else:
            self._evict(space, keys)

    def _serve(self, space: Namespace, size: int, keys: list[bytes]) -> None:
        """Do as an engine does: load what is there, compute and store the rest."""
        lease = self.random.random() < 0.5
        lookup = self.client.lookup(space, keys, lease=lease)
        self.counts[f"lookup {lookup.reason}"] += 1
        if not 0 <= lookup.prefix <= len(keys):
            raise WrongBytesError(f"a prefix of {lookup.prefix} of {len(keys)}")
        for shard in range(space.shards):
            if lookup.prefix:
                self._get(space, size, keys[: lookup.prefix], shard, lookup)
            self._put(space, size, keys[lookup.prefix :], shard)
        if lookup.lease:
            if self.random.random() < 0.1:
                self.client.renew([lookup.lease])
            self.client.release([lookup.lease])

    def _get(self, space: Namespace, size: int, keys: list[bytes], shard: int, lookup: object = None) -> None:
        first = self.random.randrange(space.shard_layers)
        end = self.random.randint(first + 1, space.shard_layers)
        step = size // space.shard_layers
        buffers = [buffer[: (end - first) * step] for buffer in self.buffers[: len(keys)]]
        result = self.client.get(space, keys, buffers, shard=shard, layers=(first, end), lookup=lookup)  # type: ignore[arg-type]
        for key, buffer, ok in zip(keys, buffers, result.ok, strict=True):
            if ok:
                self.counts["checked"] += 1
                right = self._content(space, key, size, shard)[first * step : end * step]
                if not np.array_equal(buffer, right):
                    raise WrongBytesError(f"{key.hex()}/{shard}, layers {first} to {end}: {result}")
        for tier, blocks in result.tiers.items():
            self.counts[f"got {tier}"] += blocks
        for reason, blocks in result.reasons.items():
            self.counts[f"missed {reason}"] += blocks

    def _put(self, space: Namespace, size: int, keys: list[bytes], shard: int) -> None:
        if keys:
            result = self.client.put(space, keys, [self._content(space, key, size, shard) for key in keys], shard=shard)
            self.counts["stored"] += result.stored
            self.counts["existed"] += result.existed
            for reason, blocks in result.errors.items():
                self.counts[f"put failed {reason}"] += blocks

    def _evict(self, space: Namespace, keys: list[bytes]) -> None:
        request = admin_pb2.EvictBlocksRequest(namespace=space.digest, keys=b"".join(keys))
        if self.random.random() < 0.2:
            request = admin_pb2.EvictBlocksRequest(coldest_bytes=4 << 20)
        with grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                reply = admin_pb2_grpc.AdminStub(channel).EvictBlocks(request, timeout=2)
                self.counts["evicted"] += reply.blocks
            except grpc.RpcError as exc:
                self.counts[f"evict failed {exc.code().name}"] += 1  # type: ignore[attr-defined]

    @staticmethod
    def _content(space: Namespace, key: bytes, size: int, shard: int) -> Bytes:
        word = int.from_bytes(key[:8], "little") ^ int.from_bytes(space.digest[:8], "little") ^ shard
        return content_of(word.to_bytes(8, "little"), size)


def main() -> None:
    """Run until the time is over."""
    address, socket_path, output, seed, seconds, checksum = sys.argv[1:]
    os.nice(10)  # it takes what other tests leave
    end = time.monotonic() + float(seconds)
    counts: Counter[str] = Counter()
    errors: list[str] = []
    node = None if socket_path == "-" else socket_path
    with Client(address, node=node or f"{output}.none", checksum=checksum) as client:
        for space in SPACES:
            client.register(space)

        def run(number: int) -> None:
            worker = Worker(client, address, f"{seed}/{number}", counts)
            try:
                while time.monotonic() < end and not errors:
                    worker.step()
                    counts["steps"] += 1
            except BaseException as exc:  # whatever it was, it is no miss with a reason
                errors.append(f"{type(exc).__name__}: {exc}")
                raise

        threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts.update({f"client {name}": count for name, count in client.stats().items()})
    made = Path(f"{output}.part")
    made.write_text(json.dumps({"errors": errors, "counts": dict(sorted(counts.items()))}))
    made.rename(output)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
