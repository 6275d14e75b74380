"""``kvpoolctl pin | unpin | pins``: blocks that an operator wants to keep."""

from __future__ import annotations

import re
from typing import Any

import click

from kvpool.cli import printers
from kvpool.cli.ctl_blocks import HASHES_HELP, NAMESPACE_HELP, find_namespace, read_hashes
from kvpool.cli.options import CONTEXT, RefusedUsage, one_line_errors
from kvpool.cli.remote import ExitCode, Remote, asks_master
from kvpool.model import KEY_BYTES, parse_duration_ms
from kvpool.rpc.v1 import admin_pb2

LABEL_CHARS_MAX = 256


@click.command("pin", context_settings=CONTEXT)
@click.option("--namespace", required=True, metavar="NS", help=NAMESPACE_HELP)
@click.option("--hashes", required=True, metavar="HEX", help=HASHES_HELP)
@click.option("--hard", is_flag=True, help="Never evict them, until unpinned.")
@click.option("--for", "soft_for", metavar="DURATION", help="Evict them last, for so long: 30m, 1h, 7d.")
@click.option("--label", default="", metavar="TEXT", help="A name to show in `kvpoolctl pins`, and to unpin by.")
@asks_master
def pin(remote: Remote, namespace: str, hashes: str, hard: bool, soft_for: str | None, label: str) -> None:
    """Keep blocks from eviction; those that are not stored yet too, once they are. Exit code 1 when none is.

    \b
    Examples:
      kvpoolctl pin --namespace Qwen2.5-72B --hashes @hashes.txt --hard --label "system prompt"
      kvpoolctl pin --namespace 4be1 --hashes 9f86d081884c7d659a2feaa0c55ad015 --for 1h
    """
    if hard == (soft_for is not None):
        raise click.UsageError("give either --hard or --for DURATION")
    _check_label(label)
    with one_line_errors():
        ttl_ms = 0 if soft_for is None else parse_duration_ms(soft_for, "for")
    keys = read_hashes(hashes)
    digest = find_namespace(remote, namespace)
    request = admin_pb2.PinBlocksRequest(namespace=digest, keys=keys, ttl_ms=ttl_ms, label=label)
    reply = remote.call("PinBlocks", request)
    asked = len(keys) // KEY_BYTES
    name = f"{reply.pin:016x}"
    if remote.as_json:
        printers.print_json({"pin": name, "asked": asked, "present": reply.blocks})
    else:
        absent = "" if reply.blocks == asked else f"; {reply.blocks} of them are stored now, the others when they come"
        click.echo(f"pin {name} keeps {asked} blocks{absent}")
    if not reply.blocks:
        raise click.exceptions.Exit(ExitCode.NOTHING)


@click.command("unpin", context_settings=CONTEXT)
@click.argument("pins", nargs=-1, metavar="[PIN]...")
@click.option("--label", metavar="TEXT", help="All pins with this label.")
@click.option("--all", "every", is_flag=True, help="All pins.")
@asks_master
def unpin(remote: Remote, pins: tuple[str, ...], label: str | None, every: bool) -> None:
    """End pins; the blocks stay until they are the coldest. Exit code 1 when there is no such pin.

    \b
    Examples:
      kvpoolctl unpin 00f3a1c09be42d17
      kvpoolctl unpin --label "system prompt"
    """
    if sum((bool(pins), label is not None, every)) != 1:
        raise click.UsageError("give pins, --label or --all")
    if label == "":
        raise RefusedUsage("label: must not be empty; --all ends all pins")
    _check_label(label or "")
    request = admin_pb2.UnpinBlocksRequest(pins=[_pin_id(text) for text in pins], label=label or "", all=every)
    reply = remote.call("UnpinBlocks", request)
    if remote.as_json:
        printers.print_json({"pins": reply.pins, "blocks": reply.blocks})
    else:
        click.echo(f"ended {reply.pins} pins of {reply.blocks} blocks")
    if not reply.pins:
        raise click.exceptions.Exit(ExitCode.NOTHING)


def _check_label(label: str) -> None:
    if len(label) > LABEL_CHARS_MAX or not label.isprintable():
        raise RefusedUsage(f"label: must be at most {LABEL_CHARS_MAX} printable characters")


def _pin_id(text: str) -> int:
    if not re.fullmatch(r"[0-9a-fA-F]{1,16}", text):
        raise RefusedUsage(f"pin: {text[:40]!r} is no pin; kvpoolctl pins lists them")
    return int(text, 16)


@click.command("pins", context_settings=CONTEXT)
@asks_master
def pins(remote: Remote) -> None:
    """List the pins that stand. Exit code 1 when there is none.

    \b
    Examples:
      kvpoolctl pins
      kvpoolctl --json pins | jq -r '.pins[] | select(.present < .blocks) | .label'
    """
    reply = remote.call("Pins", admin_pb2.PinsRequest())
    data = pins_data(reply)
    if remote.as_json:
        printers.print_json(data)
    elif data["pins"]:
        print_pins(data)
    else:
        click.echo("nothing is pinned")
    if not data["pins"]:
        raise click.exceptions.Exit(ExitCode.NOTHING)


def pins_data(reply: admin_pb2.PinsResponse) -> dict[str, Any]:
    """Return all pins as plain data; ``left_s`` is None for a hard one."""
    return {
        "pins": [
            {
                "pin": f"{each.pin:016x}",
                "label": each.label,
                "namespace": each.namespace.hex(),
                "blocks": each.blocks,
                "present": each.present,
                "left_s": each.left_s or None,
            }
            for each in sorted(reply.pins, key=lambda each: (each.label, each.pin))
        ]
    }


def print_pins(data: dict[str, Any]) -> None:
    """Print all pins for people."""
    rows = [
        (
            each["pin"],
            each["label"],
            each["namespace"],
            f"{each['present']} of {each['blocks']}",
            "until unpinned" if each["left_s"] is None else f"for {printers.seconds(each['left_s'])}",
        )
        for each in data["pins"]
    ]
    printers.print_table("Pins", ("pin", "label", "namespace", "blocks stored", "kept"), rows)
