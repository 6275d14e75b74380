"""Kinds of values that a setting accepts: each parses what a user wrote, or says what is allowed."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpool.errors import InvalidArgumentError
from kvpool.model import parse_duration_ms, parse_size

SOCKET_PATH_BYTES_MAX = 100
"""Of the kernel's 107: a node makes its socket under a longer name first."""


_LABEL = r"[A-Za-z0-9_-]{1,63}"
_HOST_NAME = re.compile(rf"(?=.{{1,255}}$){_LABEL}(\.{_LABEL})*\.?")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a setting accepts: ``parse`` takes a value and the field's name, and raises InvalidArgumentError."""

    metavar: str
    parse: Callable[[Any, str], Any]


def _refuse(name: str, value: object, allowed: str) -> InvalidArgumentError:
    return InvalidArgumentError(name, f"{value!r} is not allowed; allowed: {allowed}")


def _parse_int(low: int, high: int) -> Callable[[Any, str], int]:
    allowed = f"a whole number from {low} to {high}"

    def parse(value: Any, name: str) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(name, value, allowed)
        return value

    return parse


def _parse_ratio(value: Any, name: str) -> float:
    try:
        ratio = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
    except (OverflowError, ValueError):
        ratio = 0.0
    if not 0.0 < ratio <= 1.0:  # refuses nan too
        raise _refuse(name, value, "a ratio above 0 and up to 1, for example 0.95")
    return ratio


def _parse_size(value: Any, name: str) -> int:
    whole = isinstance(value, float) and value.is_integer()  # as programs write a large number into JSON
    return parse_size(int(value) if whole else value, name)


_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


def _parse_bool(value: Any, name: str) -> bool:
    word = str(value).strip().lower() if isinstance(value, (bool, int, str)) else ""
    if word not in _TRUE | _FALSE:
        raise _refuse(name, value, "true or false")
    return word in _TRUE


def _parse_text(value: Any, name: str) -> str:
    text = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    if not text or len(text) > 1024 or not text.isprintable():
        raise _refuse(name, value, "1 to 1024 printable characters")
    return text


def _parse_host(value: Any, name: str) -> str:
    host = value.strip().removeprefix("[").removesuffix("]") if isinstance(value, str) else ""
    if not _HOST_NAME.fullmatch(host) and not _is_ipv6(host):
        allowed = "a host name (1 to 63 characters between dots) or IP address without a port"
        raise _refuse(name, value, f'{allowed}, for example "0.0.0.0"')
    return host


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def split_address(value: Any, name: str) -> tuple[str, int]:
    """Return host and port of ``"10.0.0.7:50088"`` or ``"[::1]:50088"``; raises InvalidArgumentError."""
    match = re.fullmatch(r"\s*(?:\[(.+)\]|([A-Za-z0-9._-]+)):(\d{1,5})\s*", str(value))
    known = match is not None and (_is_ipv6(match[1]) if match[1] else _HOST_NAME.fullmatch(match[2]))
    if match is None or not known or not 1 <= int(match[3]) <= 65535:
        allowed = "HOST:PORT with a port from 1 to 65535 and 1 to 63 characters between the dots of a name"
        raise _refuse(name, value, f'{allowed}, for example "127.0.0.1:50088"')
    return match[1] or match[2], int(match[3])


def _parse_address(value: Any, name: str) -> str:
    host, port = split_address(value, name)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_path(value: Any, name: str) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip() or "\0" in str(value):
        raise _refuse(name, value, "a path")
    try:
        path = str(Path(value).expanduser().absolute())
        os.fsencode(path)
    except UnicodeEncodeError:
        raise _refuse(name, value, "a path of characters that a file's name can have") from None
    except RuntimeError:
        raise _refuse(name, value, "a path, with ~ for the home of a user that there is") from None
    return path


def _parse_socket_path(value: Any, name: str) -> str:
    path = _parse_path(value, name)
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        allowed = f"at most {SOCKET_PATH_BYTES_MAX} bytes"
        raise InvalidArgumentError(name, f"{path!r} is too long for a unix socket; allowed: {allowed}")
    return path


def _parse_mode(value: Any, name: str) -> int:
    allowed = "an octal file mode from 0 to 777, for example 0660"
    if isinstance(value, str) and re.fullmatch(r"\s*(0o)?[0-7]{1,4}\s*", value):
        value = int(value.strip().removeprefix("0o"), 8)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 0o777:
        raise _refuse(name, value, allowed)
    return value


def choice(*words: str, metavar: str = "") -> Kind:
    """Return the kind of one word out of some; ``metavar`` where they would not fit on a line of help."""
    spelled = {word.lower(): word for word in words}

    def parse(value: Any, name: str) -> str:
        word = spelled.get(str(value).strip().lower())
        if word is None:
            raise _refuse(name, value, " or ".join(words))
        return word

    return Kind(metavar or "|".join(words), parse)


def _parse_gigabytes(value: Any, name: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
    except (OverflowError, ValueError):
        number = 0.0
    if not 0.0 < number <= 1 << 20:  # refuses nan too
        raise _refuse(name, value, "a number of GiB, for example 64 or 0.5")
    return number


def _parse_backends(value: Any, name: str) -> tuple[str, ...]:
    # UCM has colons between directories; that of a URL is followed by two slashes.
    parts = re.split(r",|:(?=/(?!/))", value) if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not 0 < len(parts) <= 64:
        raise _refuse(name, value, "1 to 64 directories or URLs, with commas between them or as a list")
    backends = tuple(_parse_backend(_parse_text(part, name), name) for part in parts)
    if len(set(backends)) < len(backends):
        raise _refuse(name, value, "backends that differ")
    return backends


def _parse_backend(text: str, name: str) -> str:
    protocol, separator, rest = text.partition("://")
    if not separator:
        return _parse_path(text, name)
    if not protocol or (not rest.strip("/") and protocol != "memory"):
        raise _refuse(name, text, "a directory, or a URL with a bucket or path, for example s3://bucket/pool")
    return text


def _parse_mapping(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidArgumentError(name, "is not allowed; allowed: a JSON object")  # it may hold secrets
    return value


_MANY_MAX = 1024


def _parse_url(value: Any, name: str) -> str:
    """Return ``http://host:port`` of a server; the scheme may be left out."""
    scheme, mark, rest = str(value).strip().rpartition("://")
    if mark and scheme.lower() not in {"http", "https"}:
        raise _refuse(name, value, "HOST:PORT, http://HOST:PORT or https://HOST:PORT")
    return f"{scheme.lower() or 'http'}://{_parse_address(rest.removesuffix('/'), name)}"


def many(kind: Kind) -> Kind:
    """Return the kind of several values: a list, or text with commas or blanks between them; repeats are allowed."""

    def parse(value: Any, name: str) -> tuple[Any, ...]:
        parts = re.split(r"[,\s]+", value.strip(", \t\r\n")) if isinstance(value, str) else value
        parts = [parts] if isinstance(parts, int) and not isinstance(parts, bool) else parts
        if not isinstance(parts, (list, tuple)) or not 0 < len(parts) <= _MANY_MAX:
            raise _refuse(name, value, f"1 to {_MANY_MAX} values, with commas or blanks between them or as a list")
        return tuple(kind.parse(part, name) for part in parts)

    return Kind(f"{kind.metavar} ...", parse)


BOOL = Kind("", _parse_bool)
PORT = Kind("PORT", _parse_int(0, 65535))
RATIO = Kind("RATIO", _parse_ratio)
SIZE = Kind("SIZE", _parse_size)
DURATION = Kind("DURATION", parse_duration_ms)
TEXT = Kind("TEXT", _parse_text)
GIGABYTES = Kind("GIB", _parse_gigabytes)
BACKENDS = Kind("DIR|URL,...", _parse_backends)
MAPPING = Kind("JSON", _parse_mapping)
HOST = Kind("HOST", _parse_host)
ADDRESS = Kind("HOST:PORT", _parse_address)
PATH = Kind("PATH", _parse_path)
SOCKET_PATH = Kind("PATH", _parse_socket_path)
MODE = Kind("MODE", _parse_mode)
URL = Kind("URL", _parse_url)
HOSTS, PORTS, URLS = many(HOST), many(Kind("PORT", _parse_int(1, 65535))), many(URL)
LOG_LEVEL = choice("debug", "info", "warning", "error")


def count(low: int, high: int) -> Kind:
    """Return the kind of a whole number within bounds."""
    return Kind("N", _parse_int(low, high))


TOKENS = count(0, 1 << 31)
