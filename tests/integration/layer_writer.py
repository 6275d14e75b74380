"""A process that writes blocks layer by layer, each when a file says so; says what it has done on its output."""

from __future__ import annotations

import sys
from pathlib import Path

from kvpool import Client
from tests.integration.pool import SPACE, chain_of, content_of, say, wait_for


def main() -> None:
    """Write all layers but those of which no file says so, then commit."""
    address, socket_path, directory, chain, blocks, size, transfer = sys.argv[1:]
    keys, block_bytes = chain_of(int(chain), int(blocks)), int(size)
    step = block_bytes // SPACE.shard_layers
    with Client(address, node=socket_path) as client:
        client.register(SPACE)
        put = client.put_layers(SPACE, keys, shard=0, shard_bytes=block_bytes, transfer=int(transfer))
        assert put is not None
        say(f"reserved {len(put.wanted)}")
        sys.stdout.flush()
        for layer in range(SPACE.shard_layers):
            wait_for((Path(directory) / f"layer{layer}").exists, f"layer {layer} is wanted", 300)
            part = slice(layer * step, (layer + 1) * step)
            put.write(layer, layer + 1, [content_of(keys[number], block_bytes)[part] for number in put.wanted])
            say(f"wrote {layer}")
            sys.stdout.flush()
        wait_for((Path(directory) / "commit").exists, "the commit is wanted", 300)
        say(f"committed {put.commit().stored}")


if __name__ == "__main__":
    main()
