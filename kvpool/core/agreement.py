"""Engines that should share blocks and cannot: their namespaces differ in nothing but hashing."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields
from operator import attrgetter

from kvpool.core.index import Space
from kvpool.model import Namespace

HASHING = ("hash_algorithm", "hash_fingerprint")

NAMED_MAX = 10
"""Of the namespaces that one disagrees with, so many are named in a warning."""

IN_USE_S = 3600.0
"""A namespace without blocks counts for so long after an engine has announced it."""


_SHARED: attrgetter[Hashable] = attrgetter(*(f.name for f in fields(Namespace) if f.init and f.name not in HASHING))


def in_use(space: Space, now: float) -> bool:
    """Return whether an engine may still work with this namespace."""
    return len(space.table) > 0 or (space.announced is not None and now - space.announced < IN_USE_S)


def disagreeing(space: Space, now: float) -> list[Space]:
    """Return the namespaces in use that differ from this one in nothing but hashing."""
    if space.descriptor is None:
        return []
    shared = _SHARED(space.descriptor)
    return [
        other
        for other in space.siblings
        if other.descriptor and _SHARED(other.descriptor) == shared and in_use(other, now)
    ]


def groups(spaces: Iterable[Space], now: float) -> list[list[Space]]:
    """Return the namespaces in use that differ in nothing but hashing, together; those that differ from all left out.

    A look at each of them: their numbers may be large.
    """
    found: dict[Hashable, list[Space]] = {}
    for space in spaces:
        if space.descriptor is not None and in_use(space, now):
            found.setdefault(_SHARED(space.descriptor), []).append(space)
    return [group for group in found.values() if len(group) > 1]


def warning(space: Space, others: Sequence[Space]) -> str:
    """Return, for people, what engines of this namespace disagree on with those of the others; "" if on nothing."""
    here = space.descriptor
    found = []
    for other in others[:NAMED_MAX]:
        there = other.descriptor
        if here is not None and there is not None:
            pairs = [(name, getattr(here, name), getattr(there, name)) for name in HASHING]
            differing = [f"{name} {ours!r} and {theirs!r}" for name, ours, theirs in pairs if ours != theirs]
            found.append(f"{other.digest.hex()} ({', '.join(differing)})")
    if not found or here is None:
        return ""
    if len(others) > NAMED_MAX:
        found.append(f"{len(others) - NAMED_MAX} more")
    return (
        f"engines of model {here.model} hash prompts differently and share nothing: namespace {space.digest.hex()} "
        f"and {'; '.join(found)}. Give them the same prefix_caching_hash_algo, and the same PYTHONHASHSEED if it is set"
    )


def warnings(spaces: Iterable[Space], now: float) -> list[str]:
    """Return one warning for each group of namespaces in use that differ in nothing but hashing."""
    return [warning(first, others) for first, *others in groups(spaces, now)]
