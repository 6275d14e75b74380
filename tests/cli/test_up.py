"""kvpool up: what it starts its parts with, and what it refuses to start; nothing is started here."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from kvpool.cli import master, node, up
from kvpool.cli.options import RefusedUsage
from kvpool.cli.printers import PIPE_WIDTH
from kvpool.rpc.v1 import admin_pb2, types_pb2
from kvpool.server.launch import StartError


@pytest.fixture
def started(monkeypatch):
    """The plans that were to be run."""
    plans = []
    monkeypatch.setattr(up, "_run", lambda plan, pool, work_dir, console: plans.append(plan))
    return plans


def run(*arguments, **environment):
    return CliRunner().invoke(up.command, ["--port", "0", *arguments], env=environment)


def flags(started, tmp_path):
    """The flags of the master and of the first node."""
    (plan,) = started
    asked = (master.command, plan.master_arguments()), (node.command, plan.node_arguments(0, tmp_path)[0])
    return [command.make_context("x", arguments).params for command, arguments in asked]


@pytest.mark.parametrize(
    ("arguments", "environment", "insecure"),
    [([], {}, False), (["--insecure"], {}, True), ([], {"KVPOOL_INSECURE": "true"}, True),
     (["--no_insecure"], {"KVPOOL_INSECURE": "true"}, False)],
)  # fmt: skip
def test_insecure_is_for_master_and_nodes(started, tmp_path, arguments, environment, insecure):
    """By flag, or by the environment."""
    result = run(*arguments, **environment)
    assert result.exit_code == 0, result.output
    assert [each["insecure"] for each in flags(started, tmp_path)] == [insecure, insecure]


def test_a_metrics_port_is_the_masters(started, tmp_path):
    """Two parts cannot listen on one."""
    assert run(KVPOOL_METRICS_PORT="9400").exit_code == 0
    assert [each["metrics_port"] for each in flags(started, tmp_path)] == [None, "0"]


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7"])
def test_an_address_that_nobody_is_answered_by_is_refused(started, host):
    """At once, instead of after a minute."""
    result = run("--host", host)
    assert (result.exit_code, started) == (2, [])
    (line,) = result.stderr.strip().splitlines()
    assert host in line
    assert "--insecure" in line


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_what_is_reached_by_the_loopback_is_fine(started, host):
    """By whatever name."""
    result = run("--host", host)
    assert result.exit_code == 0, result.output
    assert len(started) == 1


def test_a_socket_is_in_one_piece_where_there_is_no_terminal(monkeypatch):
    """Whoever reads it from a pipe wants to connect to it."""
    path = "/run/user/1000/" + "deep/" * 15 + "node.sock"
    address = types_pb2.NodeAddress(node_id="a", host="127.0.0.1", port=7, socket_path=path)
    shown = [admin_pb2.NodeStatus(address=address, state="live")]
    monkeypatch.setattr(up, "_run", lambda plan, pool, work_dir, out: up._show(out, plan.address, shown))
    result = run()
    assert path in result.stdout
    assert max(map(len, result.stdout.splitlines())) < PIPE_WIDTH


def test_a_file_in_the_place_of_a_nodes_directory_is_named(started, tmp_path):
    """It may be somebody's."""
    assert run("--base_dir", str(tmp_path)).exit_code == 0
    (tmp_path / "node-0").touch()
    with pytest.raises(RefusedUsage, match=f"base_dir: cannot make {tmp_path}/node-0: File exists"):
        started[0].node_arguments(0, tmp_path / "node-0")


@pytest.mark.parametrize(("refused", "code"), [(True, 2), (False, 1)])
def test_what_a_part_refuses_is_refused(monkeypatch, refused, code):
    """With the exit code that scripts know; any other end of a part is a failure."""

    def fail(plan, pool, work_dir, out):
        raise StartError("node 0 ended", refused=refused)

    monkeypatch.setattr(up, "_run", fail)
    result = run()
    assert (result.exit_code, result.stderr) == (code, "Error: node 0 ended\n")
