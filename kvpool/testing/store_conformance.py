"""What every BlockStore has to do, as tests: subclass ``StoreConformance`` and give it a store.

Needs pytest and hypothesis.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvpool.model import Namespace
from kvpool.tiers import blockfile
from kvpool.tiers.layout import ASIDE_MAX
from kvpool.tiers.store import BlockStore, FileName, StoredFile, StoreMissingError, StoreSizeError

LAYERS = 4
SHARD_BYTES = 4 * 1000  # no whole unit of anything
PROCESS_S = 60.0
SPACES = (Namespace(model="one", layers=LAYERS), Namespace(model="two", layers=LAYERS))


def name_of(number: int, space: int = 0, shard: int = 0) -> FileName:
    """Return a name: the same for the same numbers."""
    return FileName(SPACES[space].digest, random.Random(number).randbytes(16), shard)


def extent_of(name: FileName, *, version: int = 0, shard_bytes: int = SHARD_BYTES) -> memoryview:
    """Return a whole extent in memory that a page begins, as in a segment; ``version`` changes the payload."""
    data = random.Random(f"{name} {version}").randbytes(shard_bytes)
    extent = blockfile.build(name, data, LAYERS)
    memory = memoryview(mmap(-1, len(extent)))
    memory[:] = extent
    return memory


def read(store: BlockStore, name: FileName, length: int | None = None) -> memoryview:
    """Return a file's bytes; ``length`` is a block's as of ``extent_of`` by default."""
    size = blockfile.extent_bytes(SHARD_BYTES, LAYERS) if length is None else length
    target = memoryview(mmap(-1, size))
    store.read_into(name, target)
    return target


def write_many(store: BlockStore, numbers: range) -> list[FileName]:
    """Write blocks; return their names."""
    names = [name_of(number) for number in numbers]
    for name in names:
        store.write(name, extent_of(name))
    return names


_CHILD = """
import sys
from kvpool.testing.store_conformance import extent_of, name_of
from kvpool.tiers.opening import open_store
url, owner, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
store = open_store(url, owner=owner, options=options or None)
print(store.id.hex(), store.capacity_bytes, flush=True)
sys.stdin.readline()
for turn in range(20):
    for number in range(4):
        name = name_of(number)
        store.write(name, extent_of(name))
store.close()
"""


class StoreConformance(ABC):
    """Tests of a store. A subclass says how one is opened, and what there is that other stores have not.

    ``url`` and ``options``, if the backend can be opened by another process, by ``open_store``.
    """

    options: dict[str, object] = {}  # noqa: RUF012 - replaced, never changed
    slow = False
    """Each call takes milliseconds: fewer of them are made."""

    @abstractmethod
    def open(self, owner: str, capacity_bytes: int | None = None) -> BlockStore:
        """Open the backend, the same one each time within a test."""

    def url(self) -> str | None:
        """Return what another process gives to ``open_store``; None if the backend is this process's own."""
        return None

    def put_foreign(self, path: str, data: bytes) -> bool:
        """Put something below the backend's root that is not ours; false if that cannot be done here."""
        del path, data
        return False

    @pytest.fixture
    def store(self) -> Iterator[BlockStore]:
        """Open the backend."""
        store = self.open("tester")
        yield store
        store.close()

    # ---- one file ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("shard_bytes", [LAYERS, 512, SHARD_BYTES, 1 << 17, (1 << 21) + 4, 5 << 20])
    def test_what_is_written_is_read(self, store: BlockStore, shard_bytes: int) -> None:
        """Every byte of an extent comes back, whatever its length."""
        name = name_of(1)
        extent = extent_of(name, shard_bytes=shard_bytes)
        store.write(name, extent)
        back = read(store, name, len(extent))
        assert back == extent
        blockfile.verify(back, name, shard_bytes, LAYERS)
        assert list(store.files()) == [StoredFile(name, len(extent))]

    @pytest.mark.parametrize("offset", [512, 1024, 4096, 7])
    def test_memory_may_begin_anywhere(self, store: BlockStore, offset: int) -> None:
        """A slot begins at any multiple of 512 bytes; other places work as well."""
        name = name_of(1)
        extent = extent_of(name)
        memory = memoryview(mmap(-1, 4 * len(extent)))
        memory[offset : offset + len(extent)] = extent
        store.write(name, memory[offset : offset + len(extent)])
        target = memory[2 * len(extent) + offset :][: len(extent)]
        store.read_into(name, target)
        assert target == extent
        assert not any(memory[2 * len(extent) + offset + len(extent) :]), "nothing is written beyond the target"

    def test_what_was_not_written_is_missing(self, store: BlockStore) -> None:
        """Another key, another namespace, another shard: no file."""
        store.write(name_of(1), extent_of(name_of(1)))
        for other in (name_of(2), name_of(1, space=1), name_of(1, shard=1)):
            with pytest.raises(StoreMissingError):
                read(store, other)

    @pytest.mark.parametrize("change", [-512, 512, 4096, -1])
    def test_a_target_of_another_length_is_refused(self, store: BlockStore, change: int) -> None:
        """The error says how long the file is, so that the next try can fit."""
        name = name_of(1)
        extent = extent_of(name)
        store.write(name, extent)
        with pytest.raises(StoreSizeError) as refused:
            read(store, name, len(extent) + change)
        assert refused.value.actual == len(extent)

    def test_a_name_can_be_written_again(self, store: BlockStore) -> None:
        """The same bytes: there is one file, and it is right."""
        name = name_of(1)
        for _ in range(3):
            store.write(name, extent_of(name))
        assert read(store, name) == extent_of(name)
        assert len(list(store.files())) == 1

    def test_a_broken_file_can_be_written_over_once_it_is_aside(self, store: BlockStore) -> None:
        """A torn write is no obstacle for a whole one."""
        name = name_of(1)
        store.write(name, extent_of(name)[:1024])
        store.set_aside(name)
        store.write(name, extent_of(name))
        assert read(store, name) == extent_of(name)

    def test_shards_are_files_of_their_own(self, store: BlockStore) -> None:
        """One can be there without the others, up to the highest number."""
        names = [name_of(1, shard=shard) for shard in (0, 1, 255)]
        for name in names:
            store.write(name, extent_of(name))
        store.remove([names[1]])
        assert {file.name for file in store.files()} == {names[0], names[2]}
        assert read(store, names[2]) == extent_of(names[2])

    # ---- going away --------------------------------------------------------------------------------

    def test_removed_files_are_gone(self, store: BlockStore) -> None:
        """Only those that were named; those that are not there are no error."""
        names = write_many(store, range(6))
        store.remove([*names[:3], name_of(99)])
        assert {file.name for file in store.files()} == set(names[3:])
        with pytest.raises(StoreMissingError):
            read(store, names[0])
        store.remove(names[:3])
        store.remove([])

    def test_a_file_set_aside_is_no_hit(self, store: BlockStore) -> None:
        """It is missing, not listed, and kept for people until it is dropped."""
        first, second = write_many(store, range(2))
        store.set_aside(first)
        with pytest.raises(StoreMissingError):
            read(store, first)
        assert [file.name for file in store.files()] == [second]
        assert [size for _, size in store.aside_files()] == [len(extent_of(first))]
        store.set_aside(first)  # gone already: nothing to do
        store.drop_aside()
        assert store.aside_files() == []
        assert read(store, second) == extent_of(second)

    def test_what_is_kept_aside_is_bounded(self, store: BlockStore) -> None:
        """The newest broken files are kept, not all of them for ever."""
        kept = ASIDE_MAX // 8 if self.slow else ASIDE_MAX
        for number in range(kept + 3):
            name = name_of(number)
            store.write(name, extent_of(name)[:512])
            store.set_aside(name)
        aside = [name for name, _ in store.aside_files()]
        assert len(aside) == min(kept + 3, ASIDE_MAX)
        assert name_of(kept + 2).key.hex() in aside[-1]

    # ---- beside the files --------------------------------------------------------------------------

    def test_descriptors_are_kept(self, store: BlockStore) -> None:
        """Whoever opens the backend later knows what its blocks mean."""
        assert store.namespaces() == []
        for space in (*SPACES, SPACES[0]):
            store.keep_namespace(space)
        again = self.open("another")
        assert {space.digest for space in again.namespaces()} == {space.digest for space in SPACES}
        assert SPACES[0] in again.namespaces()
        assert list(again.files()) == []

    def test_a_probe_leaves_nothing(self, store: BlockStore) -> None:
        """It works, and nobody sees it."""
        names = write_many(store, range(2))
        store.probe()
        assert {file.name for file in store.files()} == set(names)
        assert store.clean(0) == 0

    def test_cleaning_spares_whole_files(self, store: BlockStore) -> None:
        """Only what interrupted writers left goes, however old the rest is."""
        names = write_many(store, range(4))
        store.keep_namespace(SPACES[0])
        store.clean(0)
        assert {file.name for file in store.files()} == set(names)
        assert store.namespaces() == [SPACES[0]]

    def test_the_age_of_files_is_known(self, store: BlockStore) -> None:
        """Nothing is old that was just written; what is not there has no age."""
        names = write_many(store, range(3))
        assert store.older_than(names, 3600) == []
        assert store.older_than([*names[:2], name_of(99)], -3600) == names[:2]
        assert store.older_than([], 0) == []

    def test_what_is_free_is_a_number_or_nothing(self, store: BlockStore) -> None:
        """And never negative."""
        free = store.free_bytes()
        assert free is None or free >= 0

    def test_foreign_things_are_left_alone(self, store: BlockStore) -> None:
        """What others put into the tree is neither listed, nor removed, nor in the way."""
        name = name_of(1)
        store.write(name, extent_of(name))
        space, fan, file = str(name).split("/")
        foreign = (
            "README",
            "blocks/notes.txt",
            f"blocks/{space}/notes",
            f"blocks/{space}/{fan}/{file}.bak",
            f"blocks/{space}/{fan}/{file[:-2]}.00",
            f"blocks/{space}/{fan}/{file[:-2]}.256",
            f"blocks/{space}/{fan}/.{file}.half",
            f"blocks/{space}/fff0/{file}",
            f"blocks/{space}/{'000' if fan != '000' else '001'}/{file}",
            f"blocks/{space[:-1]}/{fan}/{file}",
            f"namespaces/{'0' * 32}.json",
            "namespaces/x",
        )
        for path in foreign:
            if not self.put_foreign(path, b"not ours"):
                pytest.skip("nobody else can put anything into this backend")
        store.clean(0)
        assert list(store.files()) == [StoredFile(name, len(extent_of(name)))]
        assert store.namespaces() == []
        assert read(store, name) == extent_of(name)

    # ---- several at once ---------------------------------------------------------------------------

    def test_who_opens_it_again_finds_everything(self, store: BlockStore) -> None:
        """Id, capacity and files are the backend's, not the opener's."""
        names = write_many(store, range(5))
        again = self.open("another", capacity_bytes=12345678)
        assert (again.id, again.capacity_bytes) == (store.id, store.capacity_bytes)
        assert {file.name for file in again.files()} == set(names)
        assert read(again, names[0]) == extent_of(names[0])
        again.remove(names[:1])
        with pytest.raises(StoreMissingError):
            read(store, names[0])

    def test_openers_at_once_agree(self) -> None:
        """Whoever comes first makes the backend; nobody has another id or capacity."""
        openers = 8
        barrier = threading.Barrier(openers)

        def opener(number: int) -> tuple[bytes, int]:
            barrier.wait()
            store = self.open(f"opener{number}", capacity_bytes=(number + 1) << 30)
            return store.id, store.capacity_bytes

        with ThreadPoolExecutor(openers) as threads:
            seen = set(threads.map(opener, range(openers)))
        assert len(seen) == 1
        [(identity, capacity)] = seen
        assert len(identity) == 16
        assert self.url() is None or capacity % (1 << 30) == 0, "it is one that was given"

    def test_threads_write_one_name(self, store: BlockStore) -> None:
        """Readers see a whole file or none while others write and remove it."""
        names = [name_of(number) for number in range(2)]
        extents = {name: extent_of(name) for name in names}
        rounds = 5 if self.slow else 40
        barrier = threading.Barrier(6)

        def writer() -> None:
            barrier.wait()
            for _ in range(rounds):
                for name in names:
                    store.write(name, extents[name])

        def reader() -> None:
            barrier.wait()
            for _ in range(rounds):
                for name in names:
                    try:
                        assert read(store, name) == extents[name]
                    except StoreMissingError:
                        continue

        def remover() -> None:
            barrier.wait()
            for _ in range(rounds):
                store.remove(names)

        actions: list[Callable[[], None]] = [writer, writer, writer, reader, reader, remover]
        with ThreadPoolExecutor(len(actions)) as threads:
            for done in [threads.submit(action) for action in actions]:
                done.result()
        for name in names:
            store.write(name, extents[name])
            assert read(store, name) == extents[name]
        assert store.clean(1e9) == 0, "nobody has left anything behind"

    def test_processes_write_one_name(self, store: BlockStore) -> None:
        """Nodes that share a backend write the same blocks and never disturb each other."""
        url = self.url()
        if url is None:
            pytest.skip("this backend is of one process")
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _CHILD, url, f"child{number}", repr(self.options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for number in range(3)
        ]  # fmt: skip
        try:
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline().split() == [store.id.hex(), str(store.capacity_bytes)]
            for child in children:
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
            while any(child.poll() is None for child in children):
                for number in range(4):
                    try:
                        assert read(store, name_of(number)) == extent_of(name_of(number))
                    except StoreMissingError:
                        continue
            assert [child.wait(PROCESS_S) for child in children] == [0, 0, 0]
        finally:
            for child in children:
                child.kill()
                child.communicate()
        assert {file.name for file in store.files()} == {name_of(number) for number in range(4)}
        assert read(store, name_of(3)) == extent_of(name_of(3))

    def test_files_are_listed_while_others_write(self, store: BlockStore) -> None:
        """What is there all the time is listed, whatever comes and goes meanwhile."""
        stay = set(write_many(store, range(10 if self.slow else 50)))
        stop = threading.Event()

        def churn() -> None:
            number = 1000
            while not stop.is_set():
                name = name_of(number)
                store.write(name, extent_of(name))
                store.remove([name])
                number += 1

        with ThreadPoolExecutor(1) as threads:
            churning = threads.submit(churn)
            try:
                for _ in range(3):
                    assert stay <= {file.name for file in store.files()}
            finally:
                stop.set()
            churning.result()

    # ---- anything in any order ---------------------------------------------------------------------

    def test_it_does_what_a_dict_does(self, store: BlockStore) -> None:
        """Random operations on a store and on a dict: the same is there afterwards."""

        class Machine(_AgainstDict):
            def __init__(self) -> None:
                store.remove([file.name for file in store.files()])
                super().__init__(store)

        machine_settings = settings(
            max_examples=5 if self.slow else 25, stateful_step_count=20, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        run_state_machine_as_test(Machine, settings=machine_settings)


_NAMES = st.builds(name_of, st.integers(0, 3), st.integers(0, 1), st.integers(0, 1))
_SIZES = st.sampled_from([512, 1024, 4096, 4608])


class _AgainstDict(RuleBasedStateMachine):
    """A store beside a dict."""

    def __init__(self, store: BlockStore) -> None:
        super().__init__()
        self.store = store
        self.model: dict[FileName, bytes] = {}

    @rule(name=_NAMES, size=_SIZES, version=st.integers(0, 3))
    def write(self, name: FileName, size: int, version: int) -> None:
        """Write; what exists under a name with other bytes is taken out of the way first."""
        data = extent_of(name, version=version, shard_bytes=size)
        if self.model.get(name, bytes(data)) != bytes(data):
            self.store.set_aside(name)
        self.store.write(name, data)
        self.model[name] = bytes(data)

    @rule(name=_NAMES)
    def read(self, name: FileName) -> None:
        """Read at the length that the model has."""
        data = self.model.get(name)
        if data is None:
            with pytest.raises(StoreMissingError):
                read(self.store, name)
        else:
            assert read(self.store, name, len(data)) == data

    @rule(names=st.lists(_NAMES, max_size=4))
    def remove(self, names: list[FileName]) -> None:
        """Remove some, there or not."""
        self.store.remove(names)
        for name in names:
            self.model.pop(name, None)

    @rule(name=_NAMES)
    def set_aside(self, name: FileName) -> None:
        """Set one aside, there or not."""
        self.store.set_aside(name)
        self.model.pop(name, None)

    @rule()
    def clean(self) -> None:
        """Clean: nothing is to be found."""
        assert self.store.clean(0) == 0

    @invariant()
    def same(self) -> None:
        """The files are the model's."""
        assert {file.name: file.bytes for file in self.store.files()} == {
            name: len(data) for name, data in self.model.items()
        }
