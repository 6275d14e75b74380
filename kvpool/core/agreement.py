"""Engines that should share blocks and cannot: their namespaces differ in nothing but hashing."""

from __future__ import annotations

from collections.abc import Iterable

from kvpool.core.index import Space

HASHING = frozenset({"hash_algorithm", "hash_fingerprint"})

IN_USE_S = 3600.0
"""A namespace without blocks counts for so long after an engine has announced it."""


def in_use(space: Space, now: float) -> bool:
    """Return whether an engine may still work with this namespace."""
    return len(space.table) > 0 or (space.announced is not None and now - space.announced < IN_USE_S)


def disagreeing(space: Space, now: float) -> list[Space]:
    """Return the namespaces in use that differ from this one in nothing but hashing."""
    if space.descriptor is None:
        return []
    return [
        other
        for other in space.siblings
        if other.descriptor and set(space.descriptor.differences(other.descriptor)) <= HASHING and in_use(other, now)
    ]


def warning(space: Space, others: Iterable[Space]) -> str:
    """Return, for people, what engines of this namespace disagree on with those of the others; "" if on nothing."""
    here = space.descriptor
    found = []
    for other in others:
        there = other.descriptor
        if here is not None and there is not None:
            fields = [f"{n} {getattr(here, n)!r} and {getattr(there, n)!r}" for n in here.differences(there)]
            found.append(f"{other.digest.hex()} ({', '.join(fields)})")
    if not found or here is None:
        return ""
    return (
        f"engines of model {here.model} hash prompts differently and share nothing: namespace {space.digest.hex()} "
        f"and {'; '.join(found)}. Give them the same prefix_caching_hash_algo, and the same PYTHONHASHSEED if it is set"
    )


def warnings(spaces: Iterable[Space], now: float) -> list[str]:
    """Return one warning for each group of namespaces in use that differ in nothing but hashing."""
    said: set[int] = set()
    found = []
    for space in spaces:
        if space.number not in said and in_use(space, now) and (others := disagreeing(space, now)):
            said.update(other.number for other in others)
            found.append(warning(space, others))
    return found
