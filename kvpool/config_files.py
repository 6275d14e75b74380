"""Configuration files: the mapping in a JSON or YAML file, read strictly enough that a slip is no other setting."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from kvpool.errors import ConfigError

CONFIG_BYTES_MAX = 1 << 20


class _TwiceError(Exception):
    """A key stands twice in one mapping: the parsers would drop one of the values silently."""


def _check_once(keys: Iterable[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise _TwiceError(key)
        seen.add(key)


class _Loader(yaml.SafeLoader):
    """YAML without doubled keys; what only looks like a number or date is text, which the setting's kind judges."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping as it is written, before keys of others are merged into it."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        _check_once(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return node


def _or_text(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def constructed(loader: Any, node: Any) -> Any:
        try:
            value = construct(loader, node)
            str(value)  # raises ValueError for more digits than Python writes down
            return value
        except (ArithmeticError, AttributeError, LookupError, ValueError):
            return node.value

    return constructed


for _name in ("bool", "float", "int", "timestamp"):
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_constructor(_tag, _or_text(yaml.SafeLoader.yaml_constructors[_tag]))


def read_file(path: str) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file; raise ConfigError where it holds none."""
    try:
        with Path(path).expanduser().open("rb") as stream:
            data = stream.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError("config", f"cannot read {path}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # no such user's home, or no path at all
        raise ConfigError("config", f"cannot read {path!r}: {error}") from None
    if len(data) > CONFIG_BYTES_MAX:
        raise ConfigError("config", f"{path} is larger than {CONFIG_BYTES_MAX} bytes")
    try:
        content = _parse(data.decode("utf-8-sig"))
    except _TwiceError as error:
        raise ConfigError(str(error), f"stands twice in one mapping (from {path})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError("config", f"{path} is neither YAML nor JSON{where}") from None
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError("config", f"{path} must hold one mapping of names to values")
    return content


def _parse(text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=_json_object, parse_int=_json_int)
        except json.JSONDecodeError:  # YAML has braces, too; it refuses tabs between them
            pass
    return yaml.load(text, _Loader)  # noqa: S506 -- a safe one


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_once(key for key, _ in pairs)
    return dict(pairs)


def _json_int(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # longer than Python converts
        return digits
