"""Runs the command line again and again in processes of its own, without importing everything anew each time.

As a module, a client: `with Forks() as forks: status = forks.run([...], folder)`. As a program, the server: it reads
one JSON request a line, forks, and answers with the (first) child's number and then the exit status (negative for a
signal). Several processes of one run find each other as those that torchrun starts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DEADLINE = 900
"""Seconds after which a process is ended by the system (SIGALRM), whatever it does."""


class Forks:
    """The client."""

    def __enter__(self) -> Forks:
        self.server = subprocess.Popen(  # noqa: S603
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.server.kill()
        self.server.wait()

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        errors: Path = Path(os.devnull),
        meanwhile: Callable[[int], None] | None = None,
        processes: int = 1,
    ) -> int:
        """One command's exit status (of several processes the first that is not 0); its error output goes to `errors`.

        meanwhile: given the first process's number.
        """
        request = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment or {}),
                   "errors": str(errors), "processes": processes}  # fmt: skip
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        process = int(self.server.stdout.readline())
        if meanwhile is not None:
            meanwhile(process)
        return int(self.server.stdout.readline())


def child(request: Mapping[str, Any]) -> int:
    """One command, as the shell would run it."""
    from prefero.cli import main

    signal.alarm(DEADLINE)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    with Path(os.devnull).open("w") as nothing, Path(request["errors"]).open("a") as errors:
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    status = main(request["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process of a launch; nothing to a single one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
              "LOCAL_WORLD_SIZE": str(processes)}  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def fork(request: Mapping[str, Any]) -> int:
    """The number of a new process that runs the command and ends."""
    process = os.fork()
    if not process:
        status = 1
        try:
            status = child(request)
        finally:
            os._exit(status)
    return process


def serve() -> None:
    """Until the input ends."""
    import prefero.recipes.run  # noqa: F401 - what takes long is done once, before the forks

    for line in sys.stdin:
        request = json.loads(line)
        Path(request["errors"]).write_text("")
        children = [
            fork({**request, "environment": request["environment"] | rank}) for rank in ranks(request["processes"])
        ]
        print(children[0], flush=True)
        ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
        print(next((status for status in ended if status), 0), flush=True)


if __name__ == "__main__":
    serve()
