"""Arrays of zeros that cost memory only where they are touched, one small page at a time."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def zeros(shape: int | tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return what ``numpy.zeros`` does, on small pages.

    numpy asks for huge pages, and the kernel then clears two MiB (with bad luck, after compacting
    memory) inside the one call that happens to touch a new page: stalls of milliseconds.
    """
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), kind, count=size // kind.itemsize).reshape(shape)
