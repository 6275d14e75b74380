"""S3 for real: a server of its own process, spoken to by s3fs; slow, dead, and back again."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed")
pytest.importorskip("moto", reason="moto is not installed")

from kvpool.errors import ConfigError
from kvpool.testing.store_conformance import StoreConformance, extent_of, name_of, read, write_many
from kvpool.tiers.object import ObjectStore
from kvpool.tiers.store import StoreError, StoreMissingError, StoreReadOnlyError
from tests.faultfs.s3 import BUCKET, KEY, SECRET, Gate, S3Server
from tests.integration.pool import wait_for

CAPACITY = 7 << 30
READERS = 8
_numbers = itertools.count()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return a server that lives as long as the tests of this file."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture
def url() -> str:
    """Return a place of this test's own."""
    return f"s3://{BUCKET}/test{next(_numbers)}/pool"


@pytest.fixture
def gate(s3: S3Server) -> Iterator[Gate]:
    """Return a gate in front of the server."""
    gate = Gate(s3.port)
    yield gate
    gate.close()


def open_s3(s3: S3Server, url: str, *, endpoint: str = "", **more: Any) -> ObjectStore:
    return ObjectStore(url, owner="tester", capacity_bytes=CAPACITY, options=s3.options(endpoint), **more)


class TestS3(StoreConformance):
    """The suite of all stores."""

    slow = True

    @pytest.fixture(autouse=True)
    def place(self, s3: S3Server, url: str) -> None:
        self._s3, self._url = s3, url
        self.options = s3.options()

    def open(self, owner: str, capacity_bytes: int | None = None) -> ObjectStore:
        return ObjectStore(
            self._url, owner=owner, capacity_bytes=capacity_bytes or CAPACITY, options=self._s3.options()
        )

    def url(self) -> str:
        return self._url

    def put_foreign(self, path: str, data: bytes) -> bool:
        self._s3.put(f"{self._url.removeprefix('s3://')}/{path}", data)
        return True


def test_requests_of_threads_overlap(s3, url, gate):
    """As many are under way as there are threads: the server sees them all before it answers one."""
    store = open_s3(s3, url, endpoint=gate.endpoint)
    names = write_many(store, range(READERS))
    gate.hold()
    got: list[bool] = []
    threads = [
        threading.Thread(target=lambda name=name: got.append(read(store, name) == extent_of(name))) for name in names
    ]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: gate.waiting == READERS, "every thread has asked")
    finally:
        gate.release()
        for thread in threads:
            thread.join()
    assert got == [True] * READERS
    store.close()


def test_one_request_for_each_block(s3, url):
    """A block is one put and one get; nothing asks for sizes first."""
    store = open_s3(s3, url)
    [name] = write_many(store, range(1))
    before = s3.log.read_text()
    extent = extent_of(name, shard_bytes=9 << 20)
    store.remove([name])
    store.write(name, extent)
    assert read(store, name, len(extent)) == extent
    asked = s3.log.read_text()[len(before) :]
    assert [asked.count(f'"{verb} /{BUCKET}/') for verb in ("PUT", "GET", "HEAD")] == [1, 1, 0], asked
    store.close()


def test_a_server_that_says_nothing_is_an_error_in_time(s3, url, gate):
    """The deadline of a call includes its retries; afterwards everything works as before."""
    store = open_s3(s3, url, endpoint=gate.endpoint)
    [name] = write_many(store, range(1))
    patient_s, store._timeout_s = store._timeout_s, 1.0  # only here: what is answered may take its time
    gate.hold()
    for action in (lambda: read(store, name), lambda: store.write(name, extent_of(name)), store.probe):
        with pytest.raises(StoreError, match="no answer within 1 s") as failed:
            action()
        assert not isinstance(failed.value, StoreMissingError)
    gate.release()
    store._timeout_s = patient_s
    assert read(store, name) == extent_of(name)
    store.close()


def test_a_bucket_that_does_not_exist_is_down(s3):
    """It is not a backend without blocks, and no reason to make one."""
    with pytest.raises(ConfigError, match="NoSuchBucket"):
        open_s3(s3, "s3://no-such-bucket/pool")


def test_a_backend_that_is_gone_is_down(tmp_path, url):
    """With its bucket or without: its blocks are not missing, nothing is known of them."""
    server = S3Server(tmp_path)
    try:
        store = open_s3(server, url)
        [name] = write_many(store, range(1))
        server.kill()
        for held, reason in ((None, "NoSuchBucket"), ({}, "is gone")):
            server.close()
            server.restart(held)
            with pytest.raises(StoreError, match=reason) as failed:
                read(store, name)
            assert not isinstance(failed.value, StoreMissingError)
        store.close()
    finally:
        server.close()


def test_a_removal_that_is_refused_is_an_error(s3, url, monkeypatch):
    """A bulk removal answers for each object; what was not removed is said."""
    store = open_s3(s3, url)
    refusal = {"Errors": [{"Key": "k", "Code": "AccessDenied", "Message": "Access Denied"}]}

    async def refuse(*_: object, **__: object) -> dict[str, Any]:
        return refusal

    monkeypatch.setattr(store._fs, "_call_s3", refuse)
    with pytest.raises(StoreReadOnlyError, match="Access Denied"):
        store.remove([name_of(1)])
    monkeypatch.undo()
    store.close()


def test_killed_and_started_again(tmp_path, url):
    """While threads read and write, every error is a store's own and soon; afterwards all goes on, every byte right."""
    server = S3Server(tmp_path)
    stop = threading.Event()
    errors: list[BaseException] = []
    seen = {"right": 0, "failed": 0}
    try:
        store = open_s3(server, url, timeout_s=5.0)
        stay = write_many(store, range(4))

        def work(number: int) -> None:
            for turn in itertools.count():
                if stop.is_set():
                    return
                name = stay[turn % 4]
                try:
                    if number % 2:
                        store.write(name_of(100 + number), extent_of(name_of(100 + number)))
                    assert read(store, name) == extent_of(name)
                    seen["right"] += 1
                except StoreError as exc:
                    assert not isinstance(exc, StoreMissingError)
                    assert SECRET not in str(exc)
                    seen["failed"] += 1
                except BaseException as exc:
                    errors.append(exc)
                    raise

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: seen["right"] > 20, "blocks are read")
            held = server.kill()
            for _ in range(2):
                before = seen["failed"]
                wait_for(lambda before=before: seen["failed"] > before + 4, "every thread has met an error")
            with pytest.raises(StoreError, match="Could not connect"):
                store.probe()
            server.restart(held)
            before = seen["right"]
            wait_for(lambda: seen["right"] > before + 20, "blocks are read again")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert errors == []
        store.probe()
        assert set(stay) <= {file.name for file in store.files()}
        store.close()
    finally:
        server.close()


def test_a_wrong_key_shows_no_secret(s3, url, caplog):
    """What is logged and raised can be shown to anybody, with all of its causes."""
    with caplog.at_level("DEBUG", logger="kvpool"):
        store = open_s3(s3, url)
        assert SECRET not in repr(store) + store.url
        with pytest.raises(ConfigError) as refused:
            open_s3(s3, f"s3://{KEY}:{SECRET}@no-such-bucket/pool")
    assert SECRET not in str(refused.value) + caplog.text
    store.close()
