"""An engine's part in transfers, without an engine: computes prompts for others, or takes what others have computed.

``python -m tests.integration.transfer_engine MASTER SOCKET`` reads ``{"do": "produce" or "consume", "transfer": N}``
from its standard input, one a line, several at once, and says on its output how each has ended.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kvpool import Client
from kvpool.client_transfers import TransferPart, TransferState
from tests.integration.pool import SPACE, Bytes, chain_of, content_of

SIZE = 32 << 10
LAYERS = SPACE.shard_layers
STEP = SIZE // LAYERS
CHUNK = 8
COMMON = 6
"""Different beginnings that prompts have in common."""

RENEW_EVERY_S = 0.3
OPEN_S = 3.0
RECEIVE_S = 8.0
TTL_MS = 3000
SILENCES_MAX = 2
CLAIM_EVERY_S = 0.02
COMPUTE_S = 0.5
"""What an engine is busy with a prompt that does not move."""

THERE = {TransferState.OPEN, TransferState.SEALED}


def keys_of(transfer: int) -> list[bytes]:
    """Return the blocks of a prompt; the last is of use to its transfer alone."""
    rng = random.Random(transfer)
    shared = chain_of(1000 + transfer % COMMON, rng.choice((0, 0, 4, 12)))
    return shared + chain_of(transfer << 16, rng.choice((1, 2, 9, 30)))


class Engine:
    """Does what it is told, and keeps alive what it has to do with."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._held: set[int] = set()
        threading.Thread(target=self._renew, daemon=True).start()

    def _renew(self) -> None:
        while True:
            time.sleep(RENEW_EVERY_S)
            with self._lock:
                held = sorted(self._held)
            if held:
                self._client.transfers.renew(held)

    def _hold(self, transfer: int, held: bool) -> None:
        with self._lock:
            (self._held.add if held else self._held.discard)(transfer)

    def produce(self, transfer: int) -> str:
        """Compute a prompt: layer by layer or as a whole, a few blocks at a time; some are given up."""
        client, rng, keys = self._client, random.Random(-transfer), keys_of(transfer)
        whole, given_up = rng.random() < 0.2, rng.random() < 0.05
        if not client.transfers.open(transfer, [TransferPart(SPACE, b"".join(keys), 1)], [client.own_node_id]):
            time.sleep(COMPUTE_S)
            return "refused"
        self._hold(transfer, True)
        try:
            for start in range(0, len(keys), CHUNK):
                time.sleep(rng.uniform(0, 0.02))
                chunk = keys[start : start + CHUNK]
                if given_up and start + CHUNK >= len(keys):
                    client.transfers.end([transfer])
                    return "given up"
                if whole or not self._put_layers(rng, chunk, transfer):
                    client.put(SPACE, chunk, [content_of(key, SIZE) for key in chunk], transfer=transfer)
        finally:
            self._hold(transfer, False)
        return "sealed" if client.transfers.seal(transfer, TTL_MS) else "not known any more"

    def _put_layers(self, rng: random.Random, keys: list[bytes], transfer: int) -> bool:
        put = self._client.put_layers(SPACE, keys, shard=0, shard_bytes=SIZE, transfer=transfer)
        if put is None:
            return False
        for layer in range(LAYERS):
            time.sleep(rng.uniform(0, 0.01))
            part = slice(layer * STEP, (layer + 1) * STEP)
            put.write(layer, layer + 1, [content_of(keys[number], SIZE)[part] for number in put.wanted])
        return not put.commit().failed

    def consume(self, transfer: int) -> str:
        """Take a prompt that is computed meanwhile, of which only the number is known."""
        give_up_at, silences = time.monotonic() + OPEN_S, 0
        while (claimed := self._client.transfers.claim(transfer)).state not in THERE:
            silences = silences + 1 if claimed.state is TransferState.NO_MASTER else 0
            if claimed.state is TransferState.ENDED or silences >= SILENCES_MAX or time.monotonic() > give_up_at:
                self._client.transfers.end([transfer])
                time.sleep(COMPUTE_S)
                return f"missed: {claimed.state}"
            time.sleep(CLAIM_EVERY_S)
        self._hold(transfer, True)
        try:
            return self._receive(transfer, claimed.nodes[0])
        finally:
            self._hold(transfer, False)
            self._client.transfers.end([transfer])

    def _receive(self, transfer: int, node: Any) -> str:
        if node is None:
            time.sleep(COMPUTE_S)
            return "missed: no node"
        silences = 0

        def alive() -> bool:
            nonlocal silences
            state = self._client.transfers.claim(transfer).state
            silences = silences + 1 if state is TransferState.NO_MASTER else 0
            return state is TransferState.OPEN or 0 < silences < SILENCES_MAX

        keys = keys_of(transfer)
        buffers: list[Bytes] = [np.zeros(SIZE, np.uint8) for _ in keys]
        result = self._client.receive(
            SPACE, keys, buffers, shard=0, transfer=transfer, node=node, alive=alive, timeout_ms=1000 * RECEIVE_S
        )
        for key, buffer, ok in zip(keys, buffers, result.ok, strict=True):
            if ok and not np.array_equal(buffer, content_of(key, SIZE)):
                return f"WRONG bytes of {key.hex()}"
        if result.prefix == len(keys):
            return "right"
        return f"missed: {', '.join(sorted(result.reasons))}" if result.reasons else "MISSED without a reason"


def main() -> None:
    """Serve until the end of the input."""
    address, socket_path = sys.argv[1:]
    said = threading.Lock()
    with Client(address, node=socket_path) as client, ThreadPoolExecutor(32) as threads:
        client.register(SPACE)
        engine = Engine(client)

        def run(do: str, transfer: int) -> None:
            begin = time.monotonic()
            try:
                end = (engine.produce if do == "produce" else engine.consume)(transfer)
            except BaseException as exc:
                end = f"ERROR {exc!r}"
                raise
            finally:
                line = json.dumps({"transfer": transfer, "end": end, "seconds": time.monotonic() - begin})
                with said:
                    sys.stdout.write(line + "\n")
                    sys.stdout.flush()

        for line in sys.stdin:
            threads.submit(run, **json.loads(line))


if __name__ == "__main__":
    main()
