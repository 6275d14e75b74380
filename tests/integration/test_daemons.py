"""What the daemons do about their terminal, their directory, and the commands about their output."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from kvpool import Namespace
from tests.integration.pool import ROOT, Pool, T, chain_of, environment, free_port, put_chain, run_module, wait_for

MASTER = "kvpool.cli.master"


def test_a_hangup_ends_daemons_in_order(bare_pool: Pool) -> None:
    """Whoever closes the terminal leaves no socket behind."""
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may be run by nohup
    try:
        bare_pool.start_master()
        bare_pool.start_node("a")
    finally:
        signal.signal(signal.SIGHUP, ours)
    for daemon in (bare_pool.nodes["a"], bare_pool.master):
        daemon.send(signal.SIGHUP)
        assert daemon.popen.wait(T) == 0, daemon.words()
    assert not Path(bare_pool.socket_path("a")).exists()


def test_a_hangup_that_is_ignored_ends_nothing(bare_pool: Pool) -> None:
    """That is what nohup is for."""
    run = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    log = bare_pool.directory / "master.log"
    command = [sys.executable, "-m", MASTER, "--host", "127.0.0.1", "--port", str(free_port())]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-c", run, *command], stdout=output, stderr=output, env=environment(), cwd=ROOT
        ) as master,
    ):
        wait_for(lambda: "serves on" in log.read_text(), "the master serves")
        status = Path(f"/proc/{master.pid}/status").read_text()
        ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:")).split()[1]
        assert int(ignored, 16) & 1 << signal.SIGHUP - 1
        master.terminate()
        assert master.wait(T) == 0


def test_two_masters_share_no_directory(bare_pool: Pool) -> None:
    """The second one is refused, the first one goes on; one that was killed is in nobody's way."""
    directory = str(bare_pool.directory / "catalog")
    bare_pool.start_master("--data_dir", directory)
    second = (MASTER, "--host", "127.0.0.1", "--port", str(free_port()), "--data_dir", directory)
    done = run_module(*second)
    assert (done.returncode, done.stderr) == (2, f"Error: data_dir: another master uses {directory}\n")
    bare_pool.start_node("a")
    bare_pool.master.kill()
    bare_pool.start_master()
    wait_for(lambda: bare_pool.state("a") == "live", "the node has found the next master")


def ctl(pool: Pool, *arguments: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvpool.cli.ctl", "--master", pool.address, *arguments]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *command],
        capture_output=True, text=True, timeout=T, check=False, env=environment(**env), cwd=ROOT,
    )  # fmt: skip


def test_an_output_that_cannot_be_written_is_one_line(bare_pool: Pool) -> None:
    """With an exit code that says nothing else; an output that was closed is none at all."""
    bare_pool.start_master()
    for arguments in (["status"], ["--json", "status"], ["namespaces"], ["--help"]):
        full = ctl(bare_pool, *arguments, redirect=">/dev/full")
        assert (full.returncode, full.stderr) == (6, "Error: cannot write the output: No space left on device\n")
    closed = ctl(bare_pool, "status", redirect=">&-")
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_reader_that_has_left_is_no_error(bare_pool: Pool) -> None:
    """Nothing is said to somebody who wants to hear nothing."""
    bare_pool.start_master()
    read = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-m", "kvpool.cli.ctl", "--master", bare_pool.address, "status"]
    done = subprocess.run(
        [sys.executable, "-c", read, *command], stderr=subprocess.PIPE, timeout=T, check=False, env=environment(),
        cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (6, b"")


def test_names_of_all_scripts_go_to_any_terminal(bare_pool: Pool) -> None:
    """What its encoding lacks is a question mark; JSON has everything."""
    bare_pool.start_master()
    bare_pool.start_node("a")
    put_chain(bare_pool.client("a"), Namespace(model="模型-A"), chain_of(1, 1), 4096)
    table = ctl(bare_pool, "namespaces", PYTHONIOENCODING="ascii")
    assert table.returncode == 0 and "??-A" in table.stdout, table.stderr
    script = ctl(bare_pool, "--json", "namespaces", PYTHONIOENCODING="ascii")
    assert json.loads(script.stdout)["namespaces"][0]["descriptor"]["model"] == "模型-A"


def test_up_passes_on_that_a_setting_is_refused(tmp_path: Path) -> None:
    """By a part that it has started, or because a file is in the way."""
    up = ("kvpool.cli.main", "up", "--port", "0", "--base_dir", str(tmp_path))
    done = run_module(*up, "--segment_size", "1")
    assert done.returncode == 2 and "segment_size: must be at least" in done.stderr, done.stderr
    (tmp_path / "node-0").rmdir()
    (tmp_path / "node-0").touch()
    done = run_module(*up, "--segment_size", "8MB")
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"Error: base_dir: cannot make {tmp_path / 'node-0'}: File exists\n"
