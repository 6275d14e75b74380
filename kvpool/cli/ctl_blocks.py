"""``kvpoolctl lookup | evict``: blocks of one namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from kvpool.cli import printers
from kvpool.cli.options import CONTEXT, RefusedUsage, one_line_errors
from kvpool.cli.remote import ExitCode, Remote, RemoteError, asks_master
from kvpool.errors import InvalidArgumentError
from kvpool.model import DIGEST_BYTES, KEY_BYTES, pack_keys, parse_size
from kvpool.rpc.v1 import admin_pb2, master_pb2

HASHES_CHARS_MAX = 256 << 20

NAMESPACE_HELP = "Digest in hex, the beginning of one that is unique, or a model's name."
HASHES_HELP = "Prefix hashes in hex, in prompt order: separated by commas, @FILE, or - for standard input."


@click.command("lookup", context_settings=CONTEXT)
@click.option("--namespace", required=True, metavar="NS", help=NAMESPACE_HELP)
@click.option("--hashes", required=True, metavar="HEX", help=HASHES_HELP)
@asks_master
def lookup(remote: Remote, namespace: str, hashes: str) -> None:
    """Show how much of a prompt is in the pool, and where. Touches and leases nothing. Exit code 1 on no hit.

    \b
    Examples:
      kvpoolctl lookup --namespace Qwen2.5-72B --hashes 9f86d081884c7d659a2feaa0c55ad015,3a7bd3e2360a3d29...
      kvpoolctl lookup --namespace 4be1 --hashes @hashes.txt
    """
    keys = read_hashes(hashes)
    digest = find_namespace(remote, namespace)
    reply = remote.call("Inspect", master_pb2.LookupRequest(namespace=digest, hashes=keys))
    asked = len(keys) // KEY_BYTES
    if remote.as_json:
        printers.print_json(printers.lookup_data(reply, digest, asked))
    else:
        printers.print_lookup(reply, digest, asked)
    if reply.prefix == 0:
        raise click.exceptions.Exit(ExitCode.NOTHING)


@click.command("evict", context_settings=CONTEXT)
@click.option("--namespace", metavar="NS", help=f"Drop blocks of one namespace. {NAMESPACE_HELP}")
@click.option("--hashes", metavar="HEX", help=f"Only these of it. {HASHES_HELP}")
@click.option("--coldest", metavar="SIZE", help="Instead: this many bytes, coldest first, whatever they belong to.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@asks_master
def evict(remote: Remote, namespace: str | None, hashes: str | None, coldest: str | None, yes: bool) -> None:
    """Ask the nodes to drop blocks. Leased blocks go too, pinned ones stay. Exit code 1 when there are none.

    \b
    Examples:
      kvpoolctl evict --coldest 10GB
      kvpoolctl evict --namespace old-model --yes
      kvpoolctl evict --namespace 4be1 --hashes @hashes.txt --yes
    """
    if (namespace is None) == (coldest is None):
        raise click.UsageError("give either --namespace or --coldest")
    if hashes is not None and namespace is None:
        raise click.UsageError("--hashes needs --namespace")
    if hashes == "-" and not yes:
        raise click.UsageError("--hashes - needs --yes: standard input cannot answer the question as well")
    if coldest is not None:
        with one_line_errors():
            request = admin_pb2.EvictBlocksRequest(coldest_bytes=parse_size(coldest, "coldest"))
        what = f"the coldest {coldest}"
    else:
        keys = read_hashes(hashes) if hashes is not None else b""
        digest = find_namespace(remote, namespace or "")
        request = admin_pb2.EvictBlocksRequest(namespace=digest, keys=keys)
        amount = f"{len(keys) // KEY_BYTES} blocks" if keys else "all blocks"
        what = f"{amount} of namespace {digest.hex()}"
    if not yes and not click.confirm(f"Drop {what} from the pool at {remote.address}?", err=True):
        raise click.exceptions.Exit(ExitCode.NOTHING)
    reply = remote.call("EvictBlocks", request)
    if remote.as_json:
        printers.print_json(printers.evict_data(reply))
    else:
        printers.print_evict(reply)
    if reply.blocks == 0:
        raise click.exceptions.Exit(ExitCode.NOTHING)


def read_hashes(text: str) -> bytes:
    """Return packed keys from the command line, a file (``@path``) or standard input (``-``)."""
    where = "standard input" if text == "-" else text[1:]
    try:
        if text == "-":
            text = sys.stdin.read(HASHES_CHARS_MAX + 1)
        elif text.startswith("@"):
            with Path(where).expanduser().open(encoding="ascii") as stream:
                text = stream.read(HASHES_CHARS_MAX + 1)
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # the last one: no such user's home
        raise RefusedUsage(f"hashes: cannot read {where}: {error}") from None
    if len(text) > HASHES_CHARS_MAX:
        raise RefusedUsage(f"hashes: at most {HASHES_CHARS_MAX} characters")
    words = [word for word in re.split(r"[,\s]+", text) if word]
    if not words:
        raise RefusedUsage("hashes: there are none")
    hashes = []
    for number, word in enumerate(words, start=1):
        try:
            hashes.append(bytes.fromhex(word.removeprefix("0x")))
        except ValueError:
            raise RefusedUsage(f"hashes: number {number}, {word[:40]!r}, is not hexadecimal") from None
    try:
        return pack_keys(hashes)
    except InvalidArgumentError as error:
        raise RefusedUsage(str(error)) from None


def find_namespace(remote: Remote, text: str) -> bytes:
    """Return the digest meant by a digest, the beginning of one, or a model's name."""
    if re.fullmatch(rf"[0-9a-fA-F]{{{2 * DIGEST_BYTES}}}", text):
        return bytes.fromhex(text)
    reply = remote.call("Namespaces", admin_pb2.NamespacesRequest())
    found = {bytes(item.digest) for item in reply.namespaces if item.descriptor.model == text}
    if not found and re.fullmatch(r"[0-9a-fA-F]+", text):
        found = {bytes(item.digest) for item in reply.namespaces if item.digest.hex().startswith(text.lower())}
    if not found:
        raise RemoteError(ExitCode.NOTHING, f"no namespace is called {text!r}; kvpoolctl namespaces lists them")
    if len(found) > 1:
        listed = ", ".join(sorted(digest.hex() for digest in found))
        raise RefusedUsage(f"namespace: {text!r} means several: {listed}")
    return found.pop()
