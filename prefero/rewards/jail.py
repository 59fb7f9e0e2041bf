"""What runs inside the sandbox: a program on its own, started as a script, that trusts nothing it is given to run.

`python -I jail.py` is the keeper. It reads messages (four bytes of length, then JSON) from its standard input and
answers on its standard output. Its first message says how it is to close itself off; each further one is a job, done in
processes of its own, all of which are dead when it answers. `python -I -S jail.py program FD` is the process that runs
a program whose functions tests call over the socket FD.

Three parties share a job, each in a process of its own: the keeper, the tests (trusted no more than a data set is) and
the program (not trusted at all). The program never holds an expected value, the text of a test, or the pipe that the
verdict goes through: what it prints, overwrites or exits with decides nothing.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import importlib
import importlib.abc
import importlib.util
import io
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST = 64 * 2**20
"""Bytes a message may have."""
_CLONE = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000  # user, mount, net, pid, ipc, uts
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE, _MS_REMOUNT = 0x1000, 0x2000, 0x4000, 0x40000, 0x20
_MNT_DETACH, _AT_RECURSIVE, _ATTR_RDONLY_NOSUID, _AT_FDCWD, _MOUNT_SETATTR = 2, 0x8000, 3, -100, 442
_PR_PDEATHSIG, _PR_DUMPABLE, _PR_SUBREAPER, _PR_NO_NEW_PRIVS = 1, 4, 36, 38
_CAPABILITIES_V3 = 0x20080522
_DIGITS = 100_000  # of whole numbers that pass between tests and program
_FOREIGN = 2_000_000_000
"""User ids from here on belong to nobody: where the keeper is root, what it runs is one of them."""
_TESTS, _PROGRAM = 1, 2


# --- messages ------------------------------------------------------------------------------------------------------


def framed(message: Any) -> bytes:
    """A message as it travels."""
    text = json.dumps(message).encode()
    return struct.pack(">I", len(text)) + text


def send(fd: int, message: Any) -> None:
    """Writes one message."""
    data = memoryview(framed(message))
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> Any:
    """The next message; None at the end. Raises ValueError for one that is none."""
    head = _exactly(fd, 4)
    if head is None:
        return None
    (size,) = struct.unpack(">I", head)
    if size > MOST:
        raise ValueError(f"a message of {size} bytes")
    text = _exactly(fd, size)
    return None if text is None else json.loads(text)


def _exactly(fd: int, size: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < size:
        piece = os.read(fd, min(1 << 16, size - len(pieces)))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)


# --- plain values, between tests and program -----------------------------------------------------------------------


def pack(value: Any, keep: Callable[[Any], int]) -> Any:
    """A value as JSON: plain data as it is, anything else as the number that `keep` gives it."""
    if value is None or isinstance(value, bool):
        return value
    # What is told is what it is, not what a class of the program's says of itself.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": list(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[pack(key, keep), pack(item, keep)] for key, item in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item, keep) for item in value]}
    return {"object": keep(value)}


_COLLECTIONS: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes,
    "complex": lambda parts: complex(*parts),
}  # fmt: skip


def unpack(packed: Any, find: Callable[[int], Any]) -> Any:
    """The value that `pack` made JSON of."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "object":
        return find(int(content))
    if kind == "dict":
        return {unpack(key, find): unpack(item, find) for key, item in content}
    return _COLLECTIONS[kind](unpack(item, find) for item in content)


# --- the program ---------------------------------------------------------------------------------------------------


def run_program(fd: int) -> None:
    """Runs ./program.py, tells the names it defines, and then does what the tests ask of them."""
    sys.set_int_max_str_digits(_DIGITS)
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    found = runpy.run_path("program.py", run_name="program")
    names: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, types.ModuleType):
            names[name] = {"module": value.__name__}
        elif not name.startswith("__"):
            names[name] = pack(value, keep)
    send(fd, names)
    doings: dict[str, Callable[..., Any]] = {
        "call": lambda value, *args, **named: value(*args, **named),
        "get": getattr,
        "list": list,
        "len": len,
        "item": lambda value, key: value[key],
    }
    while (asked := receive(fd)) is not None:
        try:
            args = [unpack(arg, kept.__getitem__) for arg in asked["args"]]
            named = {name: unpack(arg, kept.__getitem__) for name, arg in asked["named"].items()}
            answer = {"value": pack(doings[asked["do"]](kept[asked["of"]], *args, **named), keep)}
        except Exception as error:  # noqa: BLE001 (whatever a stranger's function raises, the tests are told)
            answer = {"error": [type(error).__name__, str(error)]}
        send(fd, answer)


# --- the tests -----------------------------------------------------------------------------------------------------


class Remote:
    """Stands, in the tests, for something that only the program has; compared by identity, never by its own word."""

    def __init__(self, link: Link, number: int) -> None:
        self._link, self._number = link, number

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._link.ask("call", self._number, *args, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("get", self._number, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._link.ask("list", self._number))

    def __len__(self) -> int:
        return int(self._link.ask("len", self._number))

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("item", self._number, key)


class Link:
    """The tests' end of the socket to the program."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def names(self) -> dict[str, Any]:
        """What the program defines: plain values, stand-ins for its functions and classes, modules of the library."""
        told = receive(self.fd)
        if not isinstance(told, dict):
            raise RuntimeError("the program ended")
        found: dict[str, Any] = {}
        for name, packed in told.items():
            if isinstance(packed, dict) and "module" in packed:
                if packed["module"].partition(".")[0] in sys.stdlib_module_names:
                    found[name] = importlib.import_module(packed["module"])
            else:
                found[name] = unpack(packed, self._remote)
        return found

    def ask(self, do: str, of: int, *args: Any, **named: Any) -> Any:
        """Has the program do something; what it raises is raised here, if it is one of Python's own exceptions."""
        packed = [pack(arg, self._number) for arg in args]
        send(
            self.fd, {"do": do, "of": of, "args": packed, "named": {k: pack(v, self._number) for k, v in named.items()}}
        )
        answer = receive(self.fd)
        if not isinstance(answer, dict):
            raise RuntimeError("the program ended")
        if "value" in answer:
            return unpack(answer["value"], self._remote)
        name, text = answer["error"]
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(str(text))
        raise RuntimeError(f"{name}: {text}")

    def _remote(self, number: int) -> Remote:
        return Remote(self, number)

    @staticmethod
    def _number(value: Any) -> int:
        if isinstance(value, Remote):
            return value._number
        raise TypeError(f"a test passes a {type(value).__name__} to the program: only plain values can be passed")


class Source(importlib.abc.SourceLoader):
    """A module whose text never lies in a file, where the program could read it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get_filename(self, fullname: str) -> str:
        """What tracebacks show."""
        return "<tests>"

    def get_data(self, path: Any) -> bytes:
        """The text."""
        return self.text.encode()


def run_tests(fd: int, tests: list[str]) -> list[bool]:
    """Which of the tests, each a piece of Python, end without an error; the program's names are theirs."""
    sys.set_int_max_str_digits(_DIGITS)
    passed = [False] * len(tests)
    with contextlib.suppress(Exception):
        link = Link(fd)
        names = link.names()
        for number, text in enumerate(tests):
            module = types.ModuleType("tests")
            vars(module).update(names)
            try:
                Source(text).exec_module(module)
                passed[number] = True
            except (Exception, SystemExit):  # noqa: BLE001, S112 (a test that fails, whatever way it fails)
                continue
    return passed


# --- the keeper ----------------------------------------------------------------------------------------------------


class Keeper:
    """Does jobs in processes that it confines, and ends them.

    settings: "isolated" (in namespaces of its own: no network, no sight of other processes or of files but Python's
    own), "seconds" a job may take, "memory" and "file_size" in bytes, "open_files", "processes", "output" in bytes,
    "judge": a file whose function `judge` answers jobs of that kind (or ""), "imports": where that finds its modules,
    "paths": what must be readable, "folder": where work is done that is not isolated.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.isolated = bool(settings["isolated"])
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.first_id: int | None = None
        self.folder = Path("/")
        self.deadline = 0.0
        self.judge: Callable[[Any], Any] | None = None
        self.own: tuple[int, ...] = ()
        self.started: list[int] = []

    def close_off(self) -> None:
        """Takes the namespaces of its own, where it is to, and loads the judge. Raises OSError where it may not."""
        if self.isolated:
            self._enter_namespaces()
            self._own_root()
        elif sys.platform == "linux":
            self.libc.prctl(_PR_SUBREAPER, 1, 0, 0, 0)
            if os.geteuid() == 0 and not self.settings["judge"]:
                self.first_id = _FOREIGN + int.from_bytes(os.urandom(3), "big")
        self._hide()
        if file := self.settings["judge"]:
            self._begin()  # some modules want a folder to write to while they are loaded
            self.judge = _load_judge(file, self.settings["imports"])
            self._end()

    def _hide(self) -> None:
        """No process of the same user may look into this one."""
        if sys.platform == "linux":
            self.libc.prctl(_PR_DUMPABLE, 0, 0, 0, 0)

    def _done(self, status: int, what: str) -> None:
        if status != 0:
            raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")

    def _enter_namespaces(self) -> None:
        """Goes on in a child, the first process of its namespaces, mapped so that root outside is nobody inside.

        The processes outside only wait: one writes the maps of users, the other is in all namespaces but that of
        processes, which begins with its child.
        """
        if not hasattr(self.libc, "unshare"):
            raise OSError(f"{sys.platform} has no namespaces")
        (told, tell), (mapped, map_) = os.pipe(), os.pipe()
        user, group, outer = os.geteuid(), os.getegid(), os.fork()
        if outer:
            os.close(tell)
            if os.read(told, 1):
                _write_maps(outer, user, group)
                os.write(map_, b"1")
            os.close(map_)
            _wait_as(outer)
        os.close(told)
        os.close(map_)
        self.libc.prctl(_PR_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self._done(self.libc.unshare(_CLONE), "unshare")
        os.write(tell, b"1")
        if not os.read(mapped, 1):
            raise OSError("the user namespace could not be mapped")
        if inner := os.fork():
            _wait_as(inner)
        self.libc.prctl(_PR_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):  # containers may show these read-only
            Path("/proc/sys/user/max_user_namespaces").write_text("0")  # of this namespace: none within it
        self.first_id = 0 if user == 0 else None

    def _own_root(self) -> None:
        """A root of its own in memory: Python and the system's libraries to read, /work to write, nothing else."""
        mount = self._mount
        mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        mount("jail", "/proc", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
        for path in self.settings["paths"]:
            place = Path("/proc" + path)
            if place.exists() or not Path(path).exists():
                continue
            if Path(path).is_symlink():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(Path(path).readlink())
            else:
                self._bind(path, place)
        for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
            self._bind(device, Path("/proc" + device))
        for folder in ("/proc/work", "/proc/tmp"):
            Path(folder).mkdir(exist_ok=True)
        os.chdir("/proc")
        mount(".", "/", None, _MS_MOVE)
        os.chroot(".")
        os.chdir("/")
        mount(None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)

    def _bind(self, path: str, place: Path) -> None:
        """Shows a file or folder, with all below it, for reading alone."""
        if Path(path).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        self._mount(path, str(place), None, _MS_BIND | _MS_REC)
        if not path.startswith("/dev/"):
            attributes = struct.pack("=QQQQ", _ATTR_RDONLY_NOSUID, 0, 0, 0)
            where = (_AT_FDCWD, str(place).encode(), _AT_RECURSIVE)
            self._done(self.libc.syscall(_MOUNT_SETATTR, *where, attributes, len(attributes)), "mount_setattr")

    def _mount(self, source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        texts = [None if text is None else text.encode() for text in (source, target, kind)]
        done = self.libc.mount(*texts, ctypes.c_ulong(flags), None if data is None else data.encode())
        self._done(done, f"mount {target}")

    # --- jobs

    def serve(self, inlet: int, outlet: int) -> None:
        """Answers jobs until there are no more."""
        self.own = (inlet, outlet)
        while (job := receive(inlet)) is not None:
            answer = {}
            self._begin()
            try:
                answer = {"tests": self._tests, "inputs": self._inputs, "judge": self._judged}[job["kind"]](job)
            finally:
                self._end()
            send(outlet, answer)

    def _begin(self) -> None:
        if self.isolated:
            owner = "" if self.first_id is None else f",uid={_PROGRAM},gid={_PROGRAM}"
            size = max(1, self.settings["file_size"] * 4 >> 20)
            self._mount(
                "work", "/work", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size}m,nr_inodes=1024,mode=755{owner}"
            )
            self.folder = Path("/work")
        else:
            self.folder = Path(tempfile.mkdtemp(dir=self.settings["folder"]))
            if self.first_id is not None:
                os.chown(self.folder, self.first_id + _PROGRAM, self.first_id + _PROGRAM)
        os.environ["HOME"] = os.environ["TMPDIR"] = str(self.folder)
        self.deadline = time.monotonic() + self.settings["seconds"]

    def _end(self) -> None:
        """Nothing of the job is left: not a process, not a file."""
        if self.isolated:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # the namespace, all of it but this process, at one stroke
            _reap()
            os.chdir("/")
            self._done(self.libc.umount2(b"/work", _MNT_DETACH), "umount /work")
            return
        for user in () if self.first_id is None else (self.first_id + _TESTS, self.first_id + _PROGRAM):
            if (killer := os.fork()) == 0:
                with contextlib.suppress(OSError):
                    os.setresuid(user, user, user)
                    os.kill(-1, signal.SIGKILL)
                os._exit(0)
            os.waitpid(killer, 0)
        _end_children(self.started, time.monotonic() + 5.0)
        self.started.clear()
        os.chdir("/")
        shutil.rmtree(self.folder, ignore_errors=True)
        for place, folders, _ in os.walk(self.folder):  # which may have lost its own owner's right to delete it
            for inner in (Path(place, name) for name in folders):
                if not inner.is_symlink():
                    inner.chmod(0o700)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _confine(self, who: int) -> None:
        """In a child: a session of its own, limits, no rights."""
        settings = self.settings
        os.setsid()
        seconds = int(settings["seconds"]) + 1
        limits = {
            "CPU": seconds, "AS": settings["memory"], "FSIZE": settings["file_size"], "NOFILE": settings["open_files"],
            "CORE": 0,
        }  # fmt: skip
        if self.isolated or self.first_id is not None:
            limits["NPROC"] = settings["processes"] + (0 if self.first_id is not None else 3)
        elif not settings["judge"]:
            limits["NPROC"] = settings["processes"] + _own_threads()
        for name, most in limits.items():
            _, hard = resource.getrlimit(kind := getattr(resource, f"RLIMIT_{name}"))
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            with contextlib.suppress(ValueError) if sys.platform == "darwin" else contextlib.nullcontext():
                resource.setrlimit(kind, (most, most))
        if self.first_id is not None:
            user = self.first_id + who
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        if sys.platform == "linux":
            self.libc.prctl(_PR_NO_NEW_PRIVS, 1, 0, 0, 0)
            self.libc.capset(ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITIES_V3, 0), 8), bytes(24))
            self._hide()

    def _child(self, do: Callable[[], Any], *keeps: int) -> int:
        """A confined child, with the files `keeps` and no others, whose answer, as JSON, comes out of a pipe."""
        outlet, inlet = os.pipe()
        if child := os.fork():
            self.started.append(child)
            os.close(inlet)
            return outlet
        with contextlib.suppress(BaseException):
            for fd in range(3, max(inlet, *keeps, *self.own) + 1):
                if fd not in (inlet, *keeps):
                    with contextlib.suppress(OSError):
                        os.close(fd)
            self._confine(_TESTS)
            text = json.dumps(do()).encode()
            with open(inlet, "wb") as file:  # noqa: PTH123 (a descriptor)
                file.write(text)
        os._exit(0)

    def _exec(self, command: list[str], files: dict[int, int]) -> int:
        """Starts a program in a child: a fresh Python that has nothing of this process's memory or files."""
        if child := os.fork():
            self.started.append(child)
            return child
        folder = self.folder
        with contextlib.suppress(BaseException):
            os.chdir(folder)
            self._confine(_PROGRAM)
            for ours, theirs in files.items():
                os.dup2(ours, theirs)
                os.set_inheritable(theirs, True)
            environment = {"HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
            os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", *command], environment)  # noqa: S606
        os._exit(127)

    def _write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        if self.first_id is not None:
            os.chown(file, self.first_id + _PROGRAM, self.first_id + _PROGRAM)

    def _tests(self, job: dict[str, Any]) -> dict[str, Any]:
        """Which tests the program passes."""
        self._write("program.py", job["program"])
        ours, theirs = socket.socketpair()

        def do() -> list[bool]:
            return run_tests(ours.fileno(), job["tests"])

        outlet = self._child(do, ours.fileno())
        ours.close()
        self._exec([__file__, "program", "3"], {theirs.fileno(): 3})
        theirs.close()
        text, late = self._read(outlet, MOST)
        passed = json.loads(text) if text and not late else [False] * len(job["tests"])
        return {"passed": passed, "late": late}

    def _inputs(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the program prints for each input; None where it failed or printed too much."""
        printed: list[str | None] = []
        late = False
        self._write("program.py", job["program"])
        for number, text in enumerate(job["inputs"]):
            if late:
                printed.append(None)
                continue
            self._write(f"input-{number}", text)
            given = os.open(self.folder / f"input-{number}", os.O_RDONLY)
            outlet, inlet = os.pipe()
            child = self._exec(["program.py"], {given: 0, inlet: 1})
            os.close(inlet)
            os.close(given)
            out, late = self._read(outlet, self.settings["output"])
            ended = not late and len(out) <= self.settings["output"] and self._ended_well(child)
            printed.append(out.decode("utf-8", "replace") if ended else None)
        return {"printed": printed, "late": late}

    def _judged(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the judge says of a question."""
        assert self.judge is not None
        judge = self.judge
        outlet = self._child(lambda: judge(job["question"]))
        text, late = self._read(outlet, MOST)
        return {"verdict": json.loads(text) if text and not late else None, "late": late}

    def _read(self, fd: int, most: int) -> tuple[bytes, bool]:
        """What comes out of a pipe until it is closed, one byte more than `most` at the most; whether time ran out."""
        pieces = bytearray()
        try:
            while len(pieces) <= most:
                left = self.deadline - time.monotonic()
                if left <= 0 or not select.select([fd], [], [], left)[0]:
                    return bytes(pieces), True
                piece = os.read(fd, min(1 << 16, most + 1 - len(pieces)))
                if not piece:
                    break
                pieces += piece
        finally:
            os.close(fd)
        return bytes(pieces), False

    def _ended_well(self, child: int) -> bool:
        """Whether a process that has closed its output ends with status 0 before the deadline."""
        while time.monotonic() < self.deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return status == 0
            time.sleep(0.001)
        return False


def _load_judge(file: str, imports: list[str]) -> Callable[[Any], Any]:
    sys.path[:] = imports
    spec = importlib.util.spec_from_file_location("judge", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    judge: Callable[[Any], Any] = module.judge
    return judge


def _write_maps(child: int, user: int, group: int) -> None:
    """Who is who in the child's user namespace; root outside may lend it users that exist nowhere else."""
    foreign = _FOREIGN + int.from_bytes(os.urandom(3), "big") * 8
    where = Path(f"/proc/{child}")
    if user == 0:
        for name in ("uid_map", "gid_map"):
            (where / name).write_text(f"0 0 1\n1 {foreign} 8\n")
        return
    (where / "setgroups").write_text("deny")
    (where / "uid_map").write_text(f"{user} {user} 1\n")
    (where / "gid_map").write_text(f"{group} {group} 1\n")


def _wait_as(child: int) -> None:
    """Nothing but to wait for the child, and to end as it did."""
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _reap() -> None:
    """Waits for every child."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _end_children(started: list[int], deadline: float) -> None:
    """Kills and reaps children, and those they leave behind (which on Linux become ours), until there are none."""
    known = {*started}  # until they are reaped: then a number may be somebody else's
    while time.monotonic() < deadline:
        for child in {*known, *_children()}:
            for end in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    end(child, signal.SIGKILL)
        known.clear()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _processes() -> Iterator[tuple[int, int, int]]:
    """(process, its parent, its threads) of all that can be seen."""
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = place.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            yield int(place.parent.name), int(fields[1]), int(fields[17])


def _children() -> list[int]:
    return [process for process, parent, _ in _processes() if parent == os.getpid()]


def _own_threads() -> int:
    """Threads that this user has running: the limit on processes counts them all."""
    me, count = os.geteuid(), 0
    for process, _, threads in _processes():
        with contextlib.suppress(OSError):
            count += threads if Path(f"/proc/{process}").stat().st_uid == me else 0
    return count


def main() -> None:
    """The keeper, or with the argument `program` the process that runs one."""
    if sys.argv[1:2] == ["program"]:
        run_program(int(sys.argv[2]))
        return
    # What is printed by accident must not be taken for an answer.
    inlet, outlet = os.dup(0), os.dup(1)
    settings = receive(inlet)
    if settings is None:
        return
    keeper = Keeper(settings)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    sys.stdout = sys.stderr = io.StringIO()
    try:
        keeper.close_off()
    except (OSError, ImportError) as error:
        send(outlet, {"refused": str(error)})
        return
    send(outlet, {"ready": True})
    keeper.serve(inlet, outlet)


if __name__ == "__main__":
    main()
