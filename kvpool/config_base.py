"""What all settings have in common: fields that say what they take, values checked at construction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from kvpool.config_kinds import Kind
from kvpool.errors import ConfigError, InvalidArgumentError


def setting(default: Any, kind: Kind, text: str, *, shown: str = "") -> Any:
    """Return a dataclass field; ``default`` is written as a user would, ``shown`` when it is computed."""
    metadata = {"kind": kind, "help": text, "shown": shown or ("" if default is None else str(default))}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Values are parsed and checked at construction, so that a settings object is always a valid one."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None:
                object.__setattr__(self, item.name, parsed_value(item, value))
        self._check()

    def _check(self) -> None:
        """Check what concerns several fields; raise InvalidArgumentError."""


def parsed_value(item: dataclasses.Field[Any], value: Any) -> Any:
    """Return a field's value as it is kept. Raises ConfigError."""
    kind: Kind = item.metadata["kind"]
    try:
        return kind.parse(value, item.name)
    except ConfigError:
        raise
    except InvalidArgumentError as error:
        raise ConfigError(error.field, error.problem) from None
