"""Programs that need vLLM, forked from a process that has imported it: the imports are most of an engine's start.

What starts an engine as a user does (the scripts, kvpool-bench) runs it as ever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import IO

from kvpool.server.child import die_with_parent
from kvpool.server.launch import Child, Children

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.e2e.preload"])


class Forked:
    """``python -m MODULE ARGUMENTS`` in a group of its own; has of a Popen what ours is asked for."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        *,
        asks: bool = False,
        merge: bool = False,
    ) -> None:
        """``asks``: its input is a pipe, as its output is. ``merge``: its errors go there too."""
        self.stdin: IO[str] | None = None
        asked: Connection | None = None
        if asks:
            asked, asking = CONTEXT.Pipe(duplex=False)
            self.stdin = os.fdopen(os.dup(asking.fileno()), "w")
            asking.close()
        heard, said = CONTEXT.Pipe(duplex=False)
        self.stdout = os.fdopen(os.dup(heard.fileno()), "rb")
        heard.close()
        self.args = [module, *arguments]
        # A daemon is ended with this process, which would wait for it otherwise.
        self._process = CONTEXT.Process(target=_become, args=(self.args, environment, asked, said, merge), daemon=True)
        self._process.start()
        said.close()
        if asked is not None:
            asked.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """What it ended with, -N for signal N."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return what it ended with. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_forked(children: Children, name: str, command: Sequence[str]) -> Child:
    """Add ``env [-u NAME] [NAME=VALUE] PYTHON -m MODULE ARGUMENTS`` to the children, PYTHON being this one."""
    environment = dict(os.environ)
    words = iter(command)
    assert next(words) == "env"
    for word in words:
        variable, is_set, value = word.partition("=")
        if word == "-u":
            environment.pop(next(words), None)
        elif is_set:
            environment[variable] = value
        else:
            break
    assert (word, next(words)) == (sys.executable, "-m")
    child = Child(name, Forked(next(words), list(words), environment, merge=True))  # type: ignore[arg-type]
    children.children.append(child)
    child.follow(children._echo)
    return child


def _become(
    line: list[str], environment: dict[str, str], stdin: Connection | None, stdout: Connection, merge: bool
) -> None:
    """Be the program, in the child."""
    os.setsid()
    die_with_parent(os.getppid())
    multiprocessing.current_process()._config["daemon"] = False  # which must not have processes of its own
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing if stdin is None else stdin.fileno(), 0)
    os.close(nothing)
    os.dup2(stdout.fileno(), 1)
    if merge:
        os.dup2(1, 2)
    stdout.close()
    if stdin is not None:
        stdin.close()
    sys.stdin = os.fdopen(0)  # multiprocessing has closed the one before
    os.environ.clear()
    os.environ.update(environment)
    _fork_on()
    sys.argv = line
    sys.modules.pop(line[0], None)  # to be run it must not be there
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)


def _fork_on() -> None:
    """Have a server's engine forked too: made anew, it would import everything again. Ranks are not."""
    from vllm.model_executor.models import registry
    from vllm.v1.engine import utils

    assert utils.get_mp_context
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    assert registry._run_in_subprocess
    registry._run_in_subprocess = lambda look: look()
