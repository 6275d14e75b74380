"""An object store as a backend, or whatever else fsspec reaches: the files of ``kvpool/tiers/posix.py`` as objects.

A block is one object, written by one put and read by one get: nobody sees half of one. Calls may come from many
threads; those of an asynchronous filesystem (S3, GCS, Azure) meet in fsspec's own loop, where their requests overlap.
Filesystems whose puts show before they are whole (a directory, SFTP) get a temporary object and a move.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import itertools
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import fsspec
import numpy as np
from fsspec.asyn import sync

from kvpool.errors import ConfigError
from kvpool.model import Namespace, format_size
from kvpool.tiers.layout import (
    ASIDE,
    ASIDE_MAX,
    BLOCKS,
    IDENTITY_FILE,
    NAMESPACES,
    TEMPORARY,
    Identity,
    namespace_path,
    owner_name,
    pack_namespace,
    parse_namespace,
)
from kvpool.tiers.store import (
    FileName,
    StoreBrokenError,
    StoredFile,
    StoreError,
    StoreFullError,
    StoreMissingError,
    StoreReadOnlyError,
    StoreSizeError,
)

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 20.0
"""No call of an asynchronous filesystem takes longer, its retries included."""

_S3: Final = {"s3", "s3a"}
_ATOMIC: Final = _S3 | {"gs", "gcs", "az", "abfs", "abfss", "oss", "cos", "obs", "tos", "oci", "memory"}
"""Protocols whose objects appear whole."""

_S3_OPTIONS: Final[Mapping[str, Any]] = {
    "max_concurrency": 1,  # a get is one request; more would ask for the size first
    "config_kwargs": {
        "connect_timeout": 3,
        "read_timeout": 10,
        "retries": {"total_max_attempts": 2, "mode": "standard"},
        "max_pool_connections": 64,
        # A block's own checksums are verified by who reads it; these would be computed on the loop's thread.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    },
}
_ONE_PUT_BYTES: Final = 1 << 32  # more than any shard: a multipart upload could be left unfinished

_AT_ONCE = 32  # requests of one call that are under way together
_BULK_MAX = 1000  # names in one bulk removal, S3's limit
_HALF_WRITTEN_S = 2.0  # how long a kvpool.json that makes no sense may still be one that is being written

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientCapacity"}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_DENIED_CODES = {"AccessDenied", "AllAccessDisabled", "403"}
_GONE_CODES = {"NoSuchBucket"}

_SECRET = re.compile(r"secret|token|password|passwd|key|credential|sas|connection_string|account", re.IGNORECASE)
_FAN = re.compile(r".*/[0-9a-f]{3}")
_NAMESPACE = re.compile(r".*/[0-9a-f]{32}")

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # as filesystems call it

_counter = itertools.count(1)


class ObjectStore:
    """Blocks at a fsspec URL; ``options`` are its filesystem's, for S3 over ours. Errors name no secrets.

    ``capacity_bytes`` counts for who makes the backend, and must then be given. Raises ConfigError naming
    ``storage_backends``, ``storage_options`` or ``storage_capacity``.
    """

    def __init__(
        self,
        url: str,
        *,
        owner: str,
        capacity_bytes: int | None = None,
        options: Mapping[str, Any] | None = None,
        create: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._secrets = sorted(_secrets(url, options or {}), key=len, reverse=True)
        self.url = self._public(url.partition("?")[0].rstrip("/"))
        self._owner = owner_name(owner)
        self._writing: set[str] = set()  # temporary objects that are being written right now
        self._timeout_s = timeout_s
        self._connect = functools.partial(self._filesystem, url, dict(options or {}))
        self._fs, root = self._connect()
        self._root = root.rstrip("/")
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        self._s3 = bool(protocols & _S3)
        self._atomic = bool(protocols & _ATOMIC)
        identity = self._open(capacity_bytes, create=create)
        self.id = identity.id
        self.capacity_bytes = identity.capacity_bytes

    def __repr__(self) -> str:
        return f"<ObjectStore {self.url}>"

    # ---- opening -----------------------------------------------------------------------------------

    def _filesystem(self, url: str, options: dict[str, Any]) -> tuple[Any, str]:
        protocol = url.partition("://")[0]
        if protocol in _S3:
            config = {**_S3_OPTIONS["config_kwargs"], **options.get("config_kwargs", {})}
            options = {**_S3_OPTIONS, **options, "config_kwargs": config}
        try:
            # Listings are never remembered: other nodes write too.
            fs, root = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
        except ImportError as exc:
            extra = " (pip install 'kvpool[s3]')" if protocol in _S3 else ""
            needed = f"{self.url} needs a package: {self._public(str(exc))}{extra}"
            raise ConfigError("storage_backends", needed) from None
        except TypeError as exc:
            raise ConfigError("storage_options", f"{self.url}: {self._public(str(exc))}") from None
        except ValueError as exc:
            raise ConfigError("storage_backends", f"{self.url}: {self._public(str(exc))}") from None
        except OSError as exc:  # one that connects at once
            failed = StoreError(f"{self.url}: {self._public(str(exc))}")
            raise ConfigError("storage_backends", str(failed)) from failed
        return fs, root

    def _open(self, capacity_bytes: int | None, *, create: bool) -> Identity:
        try:
            identity = self._identity()
            if identity is None and not create:
                raise ConfigError("storage_backends", f"{self.url} is no backend: there is no {IDENTITY_FILE}")
            if identity is None and capacity_bytes is None:
                raise ConfigError(
                    "storage_capacity",
                    f"must be given to the first node that opens {self.url}: an object store does not say what is "
                    'free; it is recorded there and counts for all nodes, for example "10TB"',
                )
            if identity is None:
                identity = self._settle(Identity.make(capacity_bytes or 0))
        except StoreError as exc:
            raise ConfigError("storage_backends", str(exc)) from exc
        if capacity_bytes not in {None, identity.capacity_bytes}:
            recorded = format_size(identity.capacity_bytes)
            log.warning(
                "%s: storage_capacity is ignored, the backend was made with %s; to change that, edit capacity_bytes in "
                "its %s and restart the nodes", self.url, recorded, IDENTITY_FILE,
            )  # fmt: skip
        return identity

    def _identity(self) -> Identity | None:
        """Return what is recorded here, None where nothing is. Raises StoreError."""
        deadline = time.monotonic() + _HALF_WRITTEN_S
        while True:
            try:
                with self._errors(IDENTITY_FILE):
                    return Identity.parse(self._call("cat_file", self._path(IDENTITY_FILE)))
            except StoreMissingError:
                return None
            except StoreBrokenError:
                if self._atomic or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _settle(self, offered: Identity) -> Identity:
        """Offer an identity; return the one that came first, where the filesystem can tell. Raises StoreError."""
        with self._errors(IDENTITY_FILE, writing=True), contextlib.suppress(FileExistsError):
            self._create(self._path(IDENTITY_FILE), offered.pack())
        found = self._identity()
        if found is None:
            raise StoreError(f"{self.url}: {IDENTITY_FILE} is gone as soon as it was made")
        return found

    def _create(self, path: str, data: bytes) -> None:
        """Put an object that must not be there yet, where the filesystem knows of such a thing."""
        try:
            if self._atomic:
                self._call("pipe_file", path, data, mode="create")
                return
            self._make_parent(path)
            with self._fs.open(path, "xb") as file:
                file.write(data)
        except (NotImplementedError, ValueError, TypeError):
            self._call("pipe_file", path, data)

    # ---- blocks ------------------------------------------------------------------------------------

    def write(self, name: FileName, data: memoryview) -> None:
        """Put an object. Raises StoreError."""
        self._put(f"{BLOCKS}/{name}", _bytes_of(data))

    def read_into(self, name: FileName, target: memoryview) -> None:
        """Get an object of exactly the target's length. Raises StoreMissingError, StoreSizeError, StoreError."""
        try:
            with self._errors(f"{BLOCKS}/{name}"):
                data = self._call("cat_file", self._path(f"{BLOCKS}/{name}"))
        except StoreMissingError:
            self._present()
            raise
        if len(data) != len(target):
            raise StoreSizeError(name, len(data))
        _copy(target, data)

    def remove(self, names: Sequence[FileName]) -> None:
        """Remove objects, all that can be. Raises the first StoreError at the end."""
        failed: StoreError | None = None
        for some in _batches([self._path(f"{BLOCKS}/{name}") for name in names], _BULK_MAX if self._s3 else _AT_ONCE):
            try:
                with self._errors(some[0], writing=True):
                    self._remove_some(some)
            except StoreError as exc:
                failed = failed or exc
        if failed:
            raise failed

    def _remove_some(self, paths: list[str]) -> None:
        if not self._s3:
            self._checked(self._each("rm_file", paths))
            return
        # s3fs' own bulk removal keeps to itself what was not removed.
        bucket = self._fs.split_path(paths[0])[0]
        objects = [{"Key": self._fs.split_path(path)[1]} for path in paths]
        delete = {"Objects": objects, "Quiet": True}
        refused = self._call("call_s3", "delete_objects", Bucket=bucket, Delete=delete).get("Errors", [])
        for error in refused:
            kind = PermissionError if error.get("Code") in _DENIED_CODES else OSError
            raise kind(f"{error.get('Key')} and {len(refused) - 1} more: {error.get('Message') or error.get('Code')}")

    def set_aside(self, name: FileName) -> None:
        """Move an object to ``aside``, of which the oldest go. Raises StoreError."""
        path = self._path(f"{BLOCKS}/{name}")
        kept = self._path(f"{ASIDE}/{time.time_ns():020d}.{name.namespace.hex()}.{name.key.hex()}.{name.shard}")
        with self._errors(f"{BLOCKS}/{name}", writing=True):
            self._make_parent(kept)
            with contextlib.suppress(FileNotFoundError):
                self._call("cp_file", path, kept)
            self._checked(self._each("rm_file", [path]))
        self._drop_aside(ASIDE_MAX)

    def aside_files(self) -> list[tuple[str, int]]:
        """Return name and length of what was set aside, oldest first. Raises StoreError."""
        with self._errors(ASIDE):
            found = [entry for entry in self._listed([self._path(ASIDE)]) if entry["type"] == "file"]
        return sorted((entry["name"].rpartition("/")[2], entry["size"]) for entry in found)

    def drop_aside(self) -> None:
        """Remove what was set aside. Raises StoreError."""
        self._drop_aside(0)

    def _drop_aside(self, kept: int) -> None:
        names = [name for name, _ in self.aside_files()]
        gone = names[: max(0, len(names) - kept)]
        with self._errors(ASIDE, writing=True):
            self._checked(self._each("rm_file", [self._path(f"{ASIDE}/{name}") for name in gone]))

    def files(self, since: float = 0.0) -> Iterator[StoredFile]:
        """Yield every block's object, a few fan-out directories at a time. Raises StoreError."""
        del since
        for entry in self._block_entries():
            name = FileName.parse(entry["name"])
            if name is not None and entry["type"] == "file":
                yield StoredFile(name, entry["size"])

    def older_than(self, names: Sequence[FileName], age_s: float) -> list[FileName]:
        """Return those of these objects that are there, and were put that long ago. Raises StoreError."""
        with self._errors(BLOCKS):
            entries = self._checked(self._each("info", [self._path(f"{BLOCKS}/{name}") for name in names]))
        old = [FileName.parse(entry["name"]) for entry in entries if _modified(entry) < time.time() - age_s]
        return [name for name in old if name is not None]

    def _block_entries(self) -> Iterator[dict[str, Any]]:
        with self._errors(BLOCKS):
            namespaces = [entry["name"].rstrip("/") for entry in self._listed([self._path(BLOCKS)])]
        if not namespaces:
            self._present()
        for namespace in namespaces:
            if _NAMESPACE.fullmatch(namespace):
                with self._errors(namespace):
                    fans = [entry["name"].rstrip("/") for entry in self._listed([namespace])]
                for some in _batches([fan for fan in fans if _FAN.fullmatch(fan)], _AT_ONCE):
                    with self._errors(namespace):
                        found = self._listed(some)
                    yield from found

    # ---- beside the blocks -------------------------------------------------------------------------

    def namespaces(self, *, strict: bool = False) -> list[Namespace]:
        """Return the descriptors. Raises StoreError; if ``strict`` also where one may be there and cannot be read."""
        with self._errors(NAMESPACES):
            paths = [entry["name"] for entry in self._listed([self._path(NAMESPACES)]) if entry["type"] == "file"]
            found = self._each("cat_file", paths)
            if strict:
                self._checked(found)
        read = zip(paths, found, strict=True)
        parsed = [parse_namespace(path.rpartition("/")[2], data) for path, data in read if isinstance(data, bytes)]
        return [namespace for namespace in parsed if namespace is not None]

    def keep_namespace(self, namespace: Namespace) -> None:
        """Put a descriptor. Raises StoreError."""
        self._put(namespace_path(namespace.digest), pack_namespace(namespace))

    def clean(self, older_than_s: float) -> int:
        """Remove temporary objects of interrupted writers; where a put is all or nothing, there are none."""
        if self._atomic:
            return 0
        oldest = time.time() - older_than_s
        removed = []
        with self._errors(""):
            beside = self._listed([self._path(""), self._path(NAMESPACES)])
        for entry in itertools.chain(beside, self._block_entries()):
            path = entry["name"]
            match = TEMPORARY.fullmatch(path.rpartition("/")[2])
            if not match or path.removeprefix("/") in self._writing:
                continue
            if match[1] == self._owner or _modified(entry) < oldest:
                removed.append(path)
        return sum(not isinstance(result, Exception) for result in self._each("rm_file", removed))

    def probe(self) -> None:
        """Put, get and remove something small; an identity that is gone is put again. Raises StoreError."""
        try:
            self._try_all()
        except StoreError as exc:
            if self._fs.async_impl or type(exc) is not StoreError:
                raise
            # Those of one connection (SFTP, FTP) do not make a new one when it was lost.
            try:
                self._fs, _ = self._connect()
            except ConfigError:
                raise exc from None
            self._try_all()

    def _try_all(self) -> None:
        found = self._identity() or self._settle(Identity(self.id, self.capacity_bytes))
        if found.id != self.id:
            raise StoreError(f"{self.url}: holds another backend now, {found.id.hex()} instead of {self.id.hex()}")
        data = self._owner.encode()
        with self._errors("probe", writing=True), self._temporary(self._path("probe")) as path:
            self._call("pipe_file", path, data)
            back = self._call("cat_file", path)
            self._call("rm_file", path)
        if back != data:
            raise StoreError(f"{self.url}: what is read is not what was written")

    def free_bytes(self) -> int | None:
        """Return None: only the recorded capacity is known."""
        return None

    def close(self) -> None:
        """Close connections, where they are kept in a way that is known."""
        client = getattr(self._fs, "_s3", None)
        if client is not None:
            with contextlib.suppress(TimeoutError):  # then they end with the process
                sync(self._fs.loop, client.__aexit__, None, None, None, timeout=1)

    # ---- parts -------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the filesystem; an asynchronous one has a deadline."""
        coroutine = getattr(self._fs, f"_{method}", None) if self._fs.async_impl else None
        if coroutine is None:
            return getattr(self._fs, method)(*args, **kwargs)
        return sync(self._fs.loop, coroutine, *args, timeout=self._timeout_s, **kwargs)

    def _each(self, method: str, paths: Sequence[str], **kwargs: Any) -> list[Any]:
        """Call a method with each path, a few at a time; return results, and exceptions among them."""
        if self._fs.async_impl:
            results = []
            for some in _batches(paths, _AT_ONCE):
                results += sync(
                    self._fs.loop, _together, [getattr(self._fs, f"_{method}")] * len(some), some, kwargs,
                    timeout=self._timeout_s,
                )  # fmt: skip
            return results
        return [_outcome(getattr(self._fs, method), path, kwargs) for path in paths]

    def _listed(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """Return what lies directly below some paths; one that does not exist has nothing."""
        found = self._checked(self._each("ls", paths, detail=True))
        return [entry for entries in found for entry in entries]

    def _checked(self, results: Sequence[Any]) -> list[Any]:
        """Return results without those of paths that do not exist; raise the first other exception."""
        for result in results:
            if isinstance(result, Exception) and (
                not isinstance(result, (FileNotFoundError, NotADirectoryError)) or _code(result) in _GONE_CODES
            ):
                raise result
        return [result for result in results if not isinstance(result, Exception)]

    def _put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._errors(name, writing=True):
            if self._atomic:
                self._call("pipe_file", path, data, **({"chunksize": _ONE_PUT_BYTES} if self._s3 else {}))
                return
            with self._temporary(path) as temporary:
                try:
                    self._call("pipe_file", temporary, data)
                except FileNotFoundError:
                    self._identity_is_there()
                    self._make_parent(temporary)
                    self._call("pipe_file", temporary, data)
                self._call("mv", temporary, path)

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[str]:
        """Yield a name beside a path that nobody else uses; what fails leaves nothing there."""
        directory, _, file = path.rpartition("/")
        temporary = f"{directory}/.{file}.{self._owner}.{next(_counter)}.tmp"
        self._writing.add(temporary.removeprefix("/"))
        try:
            yield temporary
        except BaseException:
            with contextlib.suppress(Exception):  # whatever the filesystem raises: the first error counts
                self._call("rm_file", temporary)
            raise
        finally:
            self._writing.discard(temporary.removeprefix("/"))

    def _make_parent(self, path: str) -> None:
        if not self._atomic:
            self._call("makedirs", path.rpartition("/")[0], exist_ok=True)

    def _present(self) -> None:
        """Raise StoreError if the whole backend is away: then nothing is known of what it holds."""
        with self._errors(IDENTITY_FILE):
            self._identity_is_there()

    def _identity_is_there(self) -> None:
        try:
            self._call("info", self._path(IDENTITY_FILE))
        except FileNotFoundError:
            raise StoreError(f"{self.url}: {IDENTITY_FILE} is gone: the backend was removed, or is away") from None

    @contextlib.contextmanager
    def _errors(self, name: str, *, writing: bool = False) -> Iterator[None]:
        """Turn what a filesystem raises into the store's errors."""
        try:
            yield
        except (StoreError, ConfigError):
            raise
        except Exception as exc:  # every filesystem brings errors of its own, without a common base
            # Not "from exc": an error that is logged with its cause would show what was taken out here.
            raise self._error(exc, name, writing=writing) from None

    def _error(self, exc: Exception, name: str, *, writing: bool) -> StoreError:
        code, number = _code(exc), getattr(exc, "errno", None)
        what = self._public(" ".join(str(exc).split())[:300])
        if isinstance(exc, TimeoutError) and not what:
            what = f"no answer within {self._timeout_s:g} s"
        text = f"{self.url}: {name}: {what or type(exc).__name__}" + (f" ({code})" if code and code not in what else "")
        if isinstance(exc, FileNotFoundError) and not writing and code not in _GONE_CODES:
            return StoreMissingError(text)
        if writing and (number in _FULL or code in _FULL_CODES):
            return StoreFullError(text)
        denied = code in _DENIED_CODES if code else isinstance(exc, PermissionError) or number in _READ_ONLY
        if writing and denied:
            return StoreReadOnlyError(text)
        return StoreError(text)

    def _public(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _secrets(url: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield what must not be shown: a URL's user and password, and options that sound like it, however deep."""
    user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    if at:
        yield user
        yield from filter(None, user.split(":"))
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets("", value)
        elif isinstance(value, str) and value and _SECRET.search(name):
            yield value


def _copy(target: memoryview, data: bytes | memoryview) -> None:
    """Copy bytes as numpy does, which lets other threads run meanwhile."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))


def _bytes_of(data: memoryview) -> bytes:
    """Return a copy, as ``_copy`` makes one: filesystems take nothing but bytes."""
    copied = io.BytesIO(bytes(len(data)))  # zeros that no memory is touched for, and that are its own
    with copied.getbuffer() as buffer:
        _copy(buffer, data)
    return copied.getvalue()  # what it has, without another copy


def _code(exc: BaseException) -> str:
    """Return the code that an S3 server gave, "" for other errors."""
    response = getattr(exc, "response", None) or getattr(exc.__cause__, "response", None)
    error = response.get("Error", {}) if isinstance(response, Mapping) else {}
    return str(error.get("Code", ""))


def _modified(entry: Mapping[str, Any]) -> float:
    """Return when an object was written, by its listing; one that does not say may have been just now."""
    value = next((entry[name] for name in _TIMES if name in entry), math.inf)
    value = value.timestamp() if hasattr(value, "timestamp") else value
    return float(value) if isinstance(value, (int, float)) else math.inf


def _batches(items: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _outcome(function: Any, path: str, kwargs: dict[str, Any]) -> Any:
    try:
        return function(path, **kwargs)
    except Exception as exc:  # looked at by who asked, beside the other outcomes
        return exc


async def _together(functions: Sequence[Any], paths: Sequence[str], kwargs: dict[str, Any]) -> list[Any]:
    calls = [function(path, **kwargs) for function, path in zip(functions, paths, strict=True)]
    return await asyncio.gather(*calls, return_exceptions=True)
