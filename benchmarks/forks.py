"""Runs the command line again and again in processes of its own, without importing everything anew each time.

As a module, a client: `with Forks() as forks: status = forks.run([...], folder)`. As a program, the server: it reads
one JSON request a line, forks, and answers with the child's number and then its exit status (negative for a signal).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Forks:
    """The client."""

    def __enter__(self) -> Forks:
        self.server = subprocess.Popen(  # noqa: S603
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
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
    ) -> int:
        """One command's exit status; its error output goes to `errors`. meanwhile: given the process's number."""
        request = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment or {}),
                   "errors": str(errors)}  # fmt: skip
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

    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    with Path(os.devnull).open("w") as nothing, Path(request["errors"]).open("w") as errors:
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    status = main(request["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def serve() -> None:
    """Until the input ends."""
    import prefero.recipes.run  # noqa: F401 - what takes long is done once, before the forks

    for line in sys.stdin:
        process = os.fork()
        if not process:
            status = 1
            try:
                status = child(json.loads(line))
            finally:
                os._exit(status)
        print(process, flush=True)
        _, ended = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    serve()
