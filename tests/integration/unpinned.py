"""A client of a segment far too small: gets a few blocks at random, checks every byte, puts what was missing.

``python -m tests.integration.unpinned SOCKET OUTPUT SEED SECONDS CHECKSUM``. Writes its counts as JSON, and ends
with 1 at the first wrong byte.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from kvpool import Client, Namespace
from tests.integration.pool import chain_of, content_of, wait_for

SPACE = Namespace(model="unpinned", layers=2)
BLOCK_BYTES = 512 << 10
BLOCKS = 24
SEGMENT = 8 * (BLOCK_BYTES + 512)
"""Of which so few fit that every put takes somebody's slot, often one that is being read."""

BLOCKS_A_CALL = 4


def main() -> None:
    """Run until the time is over."""
    socket_path, output, seed, seconds, checksum = sys.argv[1:]
    choice = random.Random(seed)
    keys = chain_of(0, BLOCKS)
    contents = [content_of(key[:8], BLOCK_BYTES) for key in keys]
    buffers = [np.zeros(BLOCK_BYTES, np.uint8) for _ in range(BLOCKS_A_CALL)]
    counts: Counter[str] = Counter()
    end = time.monotonic() + float(seconds)
    with Client(None, node=socket_path, checksum=checksum) as client:
        client.register(SPACE)
        while time.monotonic() < end:
            numbers = choice.sample(range(BLOCKS), BLOCKS_A_CALL)
            got = client.get(SPACE, [keys[n] for n in numbers], buffers)
            for number, buffer, ok in zip(numbers, buffers, got.ok, strict=True):
                if ok and not np.array_equal(buffer, contents[number]):
                    counts["wrong"] += 1
            counts["right"] += sum(got.ok)
            counts["corrupt"] += got.reasons.get("corrupt", 0)
            missing = [n for n, ok in zip(numbers, got.ok, strict=True) if not ok]
            if missing:
                client.put(SPACE, [keys[n] for n in missing], [contents[n] for n in missing])
        wait_for(client.has_node, "the node is attached")
        node = client._local()
        assert node is not None
        assert node._unpinned is not None
        counts["unpinned"], counts["changed"] = node._unpinned.blocks, node._unpinned.changed
    made = Path(f"{output}.part")
    made.write_text(json.dumps(counts))
    made.rename(output)
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
