"""Files of backends on their way out: asked of nodes in batches, and what happens when somebody writes them meanwhile.

Whether a write or a removal of the same file came first only the storage knows. So a file whose removal somebody has
been asked for stays doomed until that is confirmed, whoever says that it is there. It counts from then on, and
is looked for once nobody can be removing it any more, as is a file that is told of so late that it may have been
removed since.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import islice

from kvpool.core.effects import CatalogFiles, Effect, FileChange, Send
from kvpool.core.index import Index
from kvpool.core.messages import BlockRun, LookForFiles, RemoveFiles
from kvpool.core.nodes import Node
from kvpool.core.slots import file_bytes
from kvpool.core.storage import BATCH_FILES, Batch, Doubt, StorageBackend, named, names
from kvpool.model import DIGEST_BYTES, KEY_BYTES, BackendState, mask_shards

BATCHES_AT_ONCE = 4
REMOVE_RETRY_S = 30.0
"""When somebody else is asked, and the one who was asked first does nothing any more, see ``REMOVE_WITHIN_S``."""

LATE_S = 10.0
"""So long after a removal may a node that is heard all the time tell of a file that it wrote before it."""

LATELY_MAX = 1 << 16
"""Files whose removal is remembered, and files to be looked for, of one backend."""

_FAILED_SPLIT = 16


class FileRemovals:
    """The doomed and the doubtful files of all backends. ``up`` is the master's own time, as of its last tick."""

    def __init__(self, index: Index, counters: Counter[str]) -> None:
        self.up = 0.0
        self.next_batch = 1
        self._index = index
        self._counters = counters
        self._late: dict[str, float] = {}  # until when a node may tell what it wrote long ago

    def begin(self, up: float, next_batch: int) -> None:
        """Say what time it is, and how batches are numbered, at the master's start."""
        self.up, self.next_batch = up, next_batch

    # ---- what comes and goes -------------------------------------------------------------------------

    def doom(self, backend: StorageBackend, run: BlockRun) -> list[Effect]:
        """Have files removed that the catalog has."""
        for shard in mask_shards(run.shards):
            self._await(backend, replace(run, shards=1 << shard, backend=b""))
        return [CatalogFiles(backend.id, FileChange.DOOMED, (run,))]

    def load(self, backend: StorageBackend, run: BlockRun, again: Collection[bytes]) -> None:
        """Have files of one shard removed, but for those that are there ``again``: by an earlier master's word.

        Nodes may be removing all of them just now.
        """
        backend.lately.update(dict.fromkeys(names(run), self.up + REMOVE_RETRY_S))
        if len(rest := named(run, (name for name in names(run) if name not in again))):
            self._await(backend, rest)

    def _await(self, backend: StorageBackend, run: BlockRun) -> None:
        size = self._size(run)
        for name in names(run):
            backend.removing_bytes += size - backend.doomed.get(name, (0, 0))[1]
            backend.doomed[name] = (0, size)
            backend.again.pop(name, None)
            backend.doubtful.pop(name, None)
        backend.waiting.append(run)

    def _size(self, run: BlockRun) -> int:
        space = self._index.spaces.get(run.namespace)
        layers = space.descriptor.shard_layers if space is not None and space.descriptor is not None else 1
        return file_bytes(run.shard_bytes, layers)

    def late(self, node_id: str) -> None:
        """Expect that a node tells what it has not been able to tell for long."""
        self._late[node_id] = math.inf

    def forget(self, node_id: str) -> None:
        """Forget a node that is gone for long."""
        self._late.pop(node_id, None)

    def there(self, backend: StorageBackend, piece: BlockRun, node_id: str) -> tuple[list[BlockRun], list[Effect]]:
        """Take in that a node has written, or seen, these files; returns those that count from now on."""
        if self._late.get(node_id) == math.inf:
            self._late[node_id] = self.up + LATE_S
        late = self.up < self._late.get(node_id, 0.0)
        if not (late or backend.lately or backend.doomed):
            return [piece], [CatalogFiles(backend.id, FileChange.ADDED, (piece,))]
        runs: list[BlockRun] = []
        effects: list[Effect] = []
        for shard in mask_shards(piece.shards):
            run = replace(piece, shards=1 << shard)
            sure: list[bytes] = []
            unsure: list[bytes] = []
            spared: list[bytes] = []
            for name in names(run):
                batch, until = backend.doomed.get(name, (-1, 0))[0], backend.lately.get(name)
                if batch > 0 or (batch == 0 and until is not None and until > self.up):
                    backend.again[name] = node_id, run.shard_bytes
                    continue
                (sure if until is None else unsure).append(name)
                if batch == 0:
                    backend.again.pop(name, None)
                    spared.append(name)
            self._undoom(backend, spared)
            effects += _told(backend, FileChange.REMOVED, named(run, spared))
            effects += _told(backend, FileChange.ADDED, named(run, sure))
            if late:
                self._doubt(backend, named(run, sure), node_id)
            effects += self.doubt(backend, named(run, unsure), node_id)
            runs += [some for some in (named(run, sure), named(run, unsure)) if len(some)]
        return runs, effects

    def doubt(self, backend: StorageBackend, run: BlockRun, node_id: str) -> list[Effect]:
        """Have files of one shard looked for that somebody has been asked to remove.

        Until then the catalog has them as doomed: should the master end before, they go for certain.
        """
        doubted = self._doubt(backend, run, node_id)
        return _told(backend, FileChange.DOUBTED if doubted else FileChange.ADDED, run)

    @staticmethod
    def _doubt(backend: StorageBackend, run: BlockRun, node_id: str) -> bool:
        if len(backend.doubtful) >= LATELY_MAX:
            return False
        backend.doubtful.update(dict.fromkeys(names(run), Doubt(node_id, run.shard_bytes)))
        return True

    @staticmethod
    def _undoom(backend: StorageBackend, some: Iterable[bytes]) -> None:
        for name in some:
            backend.removing_bytes -= backend.doomed.pop(name)[1]

    def confirm(self, backend: StorageBackend, batch_id: int) -> tuple[list[Effect], list[tuple[str, BlockRun]]]:
        """Take in that a batch is carried out; returns, too, the files of it that are there again, and who says so."""
        if (look := backend.looks.pop(batch_id, None)) is not None:
            return self._looked(backend, look), []
        if (batch := backend.batches.pop(batch_id, None)) is None:
            return [], []
        removed: list[BlockRun] = []
        again: list[tuple[str, BlockRun]] = []
        for run in batch.blocks:
            gone = [name for name in names(run) if backend.doomed.get(name, (-1, 0))[0] == batch_id]
            self._undoom(backend, gone)
            removed += [named(run, gone)] if gone else []
            for name in gone:
                if batch.alone:
                    backend.lately[name] = self.up
                if name in backend.again:
                    node_id, shard_bytes = backend.again.pop(name)
                    again.append((node_id, replace(named(run, [name]), shard_bytes=shard_bytes, backend=backend.id)))
        self._counters["files_removed"] += sum(map(len, removed))
        backend.batch_files = min(BATCH_FILES, 2 * backend.batch_files)
        return [CatalogFiles(backend.id, FileChange.REMOVED, tuple(removed))] if removed else [], again

    @staticmethod
    def _looked(backend: StorageBackend, look: Batch) -> list[Effect]:
        """Have the catalog keep the files that were looked for and found: the others are doomed by now."""
        effects: list[Effect] = []
        for run in look.blocks:
            found = [n for n in names(run) if (doubt := backend.doubtful.get(n)) is not None and doubt.look == look.id]
            for name in found:
                del backend.doubtful[name]
            effects += _told(backend, FileChange.REMOVED, named(run, found))
            effects += _told(backend, FileChange.ADDED, named(run, found))
        return effects

    # ---- what nodes are asked ------------------------------------------------------------------------

    def tick(self, backend: StorageBackend, nodes: list[Node], up: float, *, loading: bool) -> list[Effect]:
        """Ask ``nodes``, which serve the backend, for what is due."""
        able = [n for n in nodes if backend.servers[n.address.node_id].state is BackendState.UP] or nodes
        self._forget(backend, up)
        if not able:
            return []
        effects = self._remove(backend, able, up)
        # While the catalog is read, nobody knows yet what an earlier master has had removed.
        return effects if loading else effects + self._look(backend, able, up)

    @staticmethod
    def _forget(backend: StorageBackend, up: float) -> None:
        """Forget the removals that nobody can tell of any more, oldest first."""
        past = 0
        for until in backend.lately.values():
            if until + LATE_S > up and len(backend.lately) - past <= LATELY_MAX:
                break
            past += 1
        for name in list(islice(backend.lately, past)):
            del backend.lately[name]

    def _remove(self, backend: StorageBackend, able: list[Node], up: float) -> list[Effect]:
        """Keep a few batches under way, at most half of them of files that were tried before."""
        effects: list[Effect] = []
        for batch in list(backend.batches.values()):
            late = up - batch.sent_at >= REMOVE_RETRY_S
            if not late and any(node.address.node_id == batch.sent_to for node in able):
                continue
            blocks = tuple(r for run in batch.blocks if len(r := self._still(backend, run, batch.id)))
            del backend.batches[batch.id]
            if late:
                self._put_back(backend, batch, blocks)
            elif blocks:
                effects.append(self._remove_by(backend, replace(batch, blocks=blocks, sent_at=up), able))
        again = sum(batch.again for batch in backend.batches.values())
        while len(backend.batches) < BATCHES_AT_ONCE:
            tried = bool(backend.failed) and again < BATCHES_AT_ONCE // 2
            if not tried and not backend.waiting:
                break
            number, self.next_batch = self.next_batch, self.next_batch + 1
            again += tried
            run, node_id = backend.failed.popleft() if tried else (None, "")
            blocks = (self._claim(backend, run, number),) if run is not None else self._next_blocks(backend, number)
            if any(map(len, blocks)):
                others = [node for node in able if node.address.node_id != node_id] or able
                effects.append(self._remove_by(backend, Batch(number, blocks, "", up, tried), others))
        return effects

    def _put_back(self, backend: StorageBackend, batch: Batch, blocks: tuple[BlockRun, ...]) -> None:
        """Try these again in smaller batches: in the end, a file that cannot be removed keeps back only itself."""
        if blocks and not batch.again:
            backend.batch_files = max(1, backend.batch_files // 4)  # or a slow storage would be asked for ever more
        step = max(1, sum(map(len, blocks)) // _FAILED_SPLIT) * KEY_BYTES
        for run in blocks:
            for name in names(run):
                backend.doomed[name] = (0, backend.doomed[name][1])
            for at in range(0, len(run.keys), step):
                backend.failed.append((replace(run, keys=run.keys[at : at + step]), batch.sent_to))

    @staticmethod
    def _still(backend: StorageBackend, run: BlockRun, batch: int) -> BlockRun:
        return named(run, (name for name in names(run) if backend.doomed.get(name, (-1, 0))[0] == batch))

    def _next_blocks(self, backend: StorageBackend, number: int) -> tuple[BlockRun, ...]:
        blocks: list[BlockRun] = []
        room = min(BATCH_FILES, backend.batch_files)
        while backend.waiting and room > 0:
            run = backend.waiting.popleft()
            if len(run) > room:
                cut = room * KEY_BYTES
                backend.waiting.appendleft(replace(run, keys=run.keys[cut:]))
                run = replace(run, keys=run.keys[:cut])
            run = self._claim(backend, run, number)
            if len(run):
                blocks.append(run)
                room -= len(run)
        return tuple(blocks)

    def _claim(self, backend: StorageBackend, run: BlockRun, number: int) -> BlockRun:
        run = self._still(backend, run, 0)
        for name in names(run):
            backend.doomed[name] = (number, backend.doomed[name][1])
        return run

    def _remove_by(self, backend: StorageBackend, batch: Batch, nodes: list[Node]) -> Effect:
        backend.turn += 1
        node = nodes[backend.turn % len(nodes)]
        some = [name for run in batch.blocks for name in names(run)]
        alone = all(backend.lately.pop(name, 0.0) <= batch.sent_at for name in some)
        backend.lately.update(dict.fromkeys(some, batch.sent_at + REMOVE_RETRY_S))
        backend.batches[batch.id] = replace(batch, sent_to=node.address.node_id, alone=alone)
        return Send(node.session or 0, RemoveFiles(batch.id, backend.id, batch.blocks))

    def _look(self, backend: StorageBackend, able: list[Node], up: float) -> list[Effect]:
        """Have doubtful files looked for that nobody can be removing."""
        sessions = {node.address.node_id: node.session or 0 for node in able}
        for look in list(backend.looks.values()):
            if up - look.sent_at >= REMOVE_RETRY_S or look.sent_to not in sessions:
                del backend.looks[look.id]
        room = max(0, BATCHES_AT_ONCE - len(backend.looks)) * BATCH_FILES
        due: dict[tuple[str, bytes, int], list[bytes]] = {}
        for name in islice(self._due(backend, up), room):
            doubt = backend.doubtful[name]
            node_id = doubt.node_id if doubt.node_id in sessions else able[0].address.node_id
            due.setdefault((node_id, name[:-KEY_BYTES], doubt.shard_bytes), []).append(name)
        effects: list[Effect] = []
        for (node_id, head, shard_bytes), some in due.items():
            run = named(BlockRun(head[:DIGEST_BYTES], 1 << head[-1], shard_bytes, b""), some)
            number, self.next_batch = self.next_batch, self.next_batch + 1
            backend.looks[number] = Batch(number, (run,), node_id, up)
            for name in some:
                backend.doubtful[name] = replace(backend.doubtful[name], look=number)
            effects.append(Send(sessions[node_id], LookForFiles(number, backend.id, (run,))))
        return effects

    @staticmethod
    def _due(backend: StorageBackend, up: float) -> Iterator[bytes]:
        for name, doubt in backend.doubtful.items():
            if doubt.look not in backend.looks and backend.lately.get(name, 0.0) <= up:
                yield name


def _told(backend: StorageBackend, change: FileChange, run: BlockRun) -> list[Effect]:
    return [CatalogFiles(backend.id, change, (run,))] if len(run) else []
