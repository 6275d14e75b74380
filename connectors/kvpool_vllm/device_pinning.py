"""The node's segment as page-locked memory of a device: registered in the background, used when it is done.

Registering takes seconds for a large segment and holds the driver up meanwhile, so it is done by a thread,
in chunks, when the segment is first met. No torch here: what registers is handed in.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from kvpool.model import format_size
from kvpool.processes import start_thread
from kvpool_vllm import LOGGER_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

logger = logging.getLogger(LOGGER_NAME)

CHUNK_BYTES = 1 << 30
"""Registered at a time: the driver serves other calls in between."""

CLOSE_S = 10.0
"""How long closing waits for copies that use the segment; past it the memory stays registered."""

HOST_REGISTER_PORTABLE = 1
"""Page-locked for all contexts of the process (``cudaHostRegisterPortable``)."""


class Registrar(Protocol):
    """What page-locks memory for a device; called from a thread of its own."""

    def register(self, address: int, size: int) -> str:
        """Page-lock ``size`` bytes; return "" or why that failed."""
        ...

    def unregister(self, address: int) -> None:
        """Undo ``register``."""
        ...


class CudaRegistrar:
    """``cudaHostRegister`` and ``cudaHostUnregister``; both give up the GIL."""

    def __init__(self, runtime: Any) -> None:
        """``runtime``: what ``torch.cuda.cudart()`` returns."""
        self._runtime = runtime

    def register(self, address: int, size: int) -> str:
        """Page-lock memory; return "" or the runtime's words."""
        return self._failure(self._runtime.cudaHostRegister(address, size, HOST_REGISTER_PORTABLE))

    def unregister(self, address: int) -> None:
        """Undo ``register``. Raises RuntimeError."""
        failure = self._failure(self._runtime.cudaHostUnregister(address))
        if failure:
            raise RuntimeError(failure)

    def _failure(self, error: Any) -> str:
        return "" if error == self._runtime.cudaError.success else str(self._runtime.cudaGetErrorString(error))


class PinState(Enum):
    """How far a segment has come."""

    UNREGISTERED = "unregistered"
    REGISTERING = "registering"
    REGISTERED = "registered"
    FAILED = "failed"
    CLOSED = "closed"


def address_of(memory: Bytes) -> int:
    """Return where an array's bytes lie."""
    address: int = memory.__array_interface__["data"][0]
    return address


class PinnedSegment:
    """One mapped segment on its way to being page-locked; ``reason`` says why it failed."""

    def __init__(self, memory: Bytes, registrar: Registrar, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Hold on to ``memory``, whose address must be page-aligned, until closed; register nothing yet."""
        self.memory: Bytes | None = memory
        self.state = PinState.UNREGISTERED
        self.reason = ""
        self._registrar = registrar
        self._address = address_of(memory)
        self._chunk_bytes = chunk_bytes
        self._chunks: list[int] = []
        self._changed = threading.Condition()
        self._users = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to register, on a thread of its own; once."""
        with self._changed:
            if self.state is not PinState.UNREGISTERED:
                return
            self.state = PinState.REGISTERING
            self._thread = start_thread(self._register, "kvpool-pin")
            if self._thread is None:  # copies go through a buffer
                self.state, self.reason = PinState.FAILED, "no thread can be started"
                self._changed.notify_all()

    @contextlib.contextmanager
    def using(self) -> Iterator[bool]:
        """Yield whether the device may copy from and to the segment; it stays so until the block ends."""
        with self._changed:
            usable = self.state is PinState.REGISTERED
            self._users += usable
        try:
            yield usable
        finally:
            with self._changed:
                self._users -= usable
                self._changed.notify_all()

    def pieces(self, view: Bytes) -> list[Bytes]:
        """Return a view of the segment in pieces of which none crosses from one registered chunk to the next."""
        start = address_of(view) - self._address
        end = start + len(view)
        border = (start // self._chunk_bytes + 1) * self._chunk_bytes
        if end <= border:
            return [view]
        cuts = [0, *range(border - start, len(view), self._chunk_bytes), len(view)]
        return [view[a:b] for a, b in itertools.pairwise(cuts)]

    def wait(self, timeout_s: float) -> bool:
        """Wait until registering has ended, well or not; returns whether the segment is usable."""
        with self._changed:
            ended = {PinState.REGISTERED, PinState.FAILED, PinState.CLOSED}
            self._changed.wait_for(lambda: self.state in ended, timeout_s)
            return self.state is PinState.REGISTERED

    def close(self) -> None:
        """Unregister and let go of the memory, once no copy uses it."""
        with self._changed:
            thread = self._thread
            self.state = PinState.CLOSED
            self._changed.notify_all()
        if thread is not None:
            thread.join(CLOSE_S)
        with self._changed:
            idle = self._changed.wait_for(lambda: not self._users, CLOSE_S)
        if (thread is not None and thread.is_alive()) or not idle:
            logger.warning("kvpool: a device still uses the node's memory; it stays registered until we end")
            return
        self._unregister()
        self.memory = None

    def _register(self) -> None:
        memory = self.memory
        if memory is None:
            return
        for start in range(0, len(memory), self._chunk_bytes):
            size = min(self._chunk_bytes, len(memory) - start)
            if self.state is PinState.CLOSED:
                return
            try:
                self.reason = self._registrar.register(self._address + start, size)
            except Exception as exc:  # a driver's error is no reason to die: copies go through a buffer then
                self.reason = f"{type(exc).__name__}: {exc}"
            if self.reason:
                logger.warning(
                    "kvpool: cannot page-lock %s of the node's memory: %s; copies go through a buffer",
                    format_size(len(memory)),
                    self.reason,
                )
                self._unregister()
                break
            self._chunks.append(self._address + start)
        with self._changed:
            if self.state is PinState.REGISTERING:
                self.state = PinState.FAILED if self.reason else PinState.REGISTERED
            self._changed.notify_all()

    def _unregister(self) -> None:
        while self._chunks:
            try:
                self._registrar.unregister(self._chunks.pop())
            except Exception:  # the device is failing: nothing more can be done about it
                logger.exception("kvpool: cannot unregister the node's memory")


class Pinning:
    """The segment of this host's node, whichever that is now: another one after the node was restarted."""

    def __init__(self, registrar: Registrar | None, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Without a ``registrar`` nothing is ever page-locked."""
        self._registrar = registrar
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._segment: PinnedSegment | None = None
        self._closed = False

    @property
    def possible(self) -> bool:
        """Whether anything can be page-locked."""
        return self._registrar is not None

    def segment(self, memory: Bytes | None) -> PinnedSegment | None:
        """Return the segment that ``memory`` is, registering it from the first time on; None where that cannot be.

        Any other is let go of. Nothing is registered before there is a job: no driver call of another thread may
        fall into a capture of CUDA graphs.
        """
        if self._registrar is None:
            return None
        with self._lock:
            current = self._segment
            if self._closed or (current is not None and current.memory is memory):
                return None if self._closed else current
            started = None
            if memory is not None:
                started = PinnedSegment(memory, self._registrar, chunk_bytes=self._chunk_bytes)
                started.start()
            self._segment = started
        if current is not None and start_thread(current.close, "kvpool-unpin") is None:
            current.close()
        return started

    def let_go(self) -> None:
        """Unregister the segment of a node that is gone, on a thread of its own."""
        self.segment(None)

    def close(self) -> None:
        """Unregister what is registered."""
        with self._lock:
            self._closed = True
            segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()
