"""Runs the command line again and again in processes of its own without importing everything anew each time.

Reads one JSON request a line, {"arguments", "folder", "environment", "errors"}, forks, and answers with the exit status
of the child (negative for a signal), as subprocess does.
"""

import json
import os
import sys
from pathlib import Path

import prefero.recipes.run  # noqa: F401 - what takes long is done once, before the forks
from prefero.cli import main


def child(request: dict) -> int:
    """One command, as the shell would run it."""
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    with Path(os.devnull).open("w") as nothing, Path(request["errors"]).open("w") as errors:
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    status = main(request["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return status


for line in sys.stdin:
    process = os.fork()
    if not process:
        status = 1
        try:
            status = child(json.loads(line))
        finally:
            os._exit(status)
    _, ended = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(ended), flush=True)
