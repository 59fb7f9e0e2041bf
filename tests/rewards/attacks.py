"""Programs that want out of the sandbox, or more than they earned; run as a script it tries them and prints what came.

Each is (name, program, where it must fail): "always", or "isolated" where limits alone do not stop it. `solve()` is to
return 42; an attack that gets what it wants returns that, or has the test pass in another way.
"""

# ruff: noqa: E501 (an attack a line)

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from prefero.rewards.sandbox import Limits, Sandbox, SandboxError

CANARY = "canary-in-the-environment"
ESCAPED = Path(tempfile.gettempdir()) / "prefero-escaped"
SECONDS = 1.0
TEST = "assert solve() == 42, 'SECRET'"
NEEDLE = "'TERCES'[::-1]"
IMPORTS = "import ctypes, gc, json, os, signal, socket, struct, sys, threading, time\n"
DAEMON = """
def stay():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(15, b"NAME", 0, 0, 0)
            while True:
                time.sleep(1)
        os._exit(0)
    os.wait()
stay()
"""
FORGED = """
for fd in range(256):
    for text in (b"[true]", b'{"passed": [true], "late": false}'):
        try:
            os.write(fd, text); os.write(fd, struct.pack(">I", len(text)) + text)
        except OSError:
            pass
"""
ATTACKS: list[tuple[str, str, str]] = [
    ("a wrong answer", "def solve(): return 41", "always"),
    ("a fork bomb", "while True:\n    os.fork()", "always"),
    ("a thread bomb", "while True:\n    threading.Thread(target=time.sleep, args=(99,)).start()", "always"),
    ("a memory bomb", "x = []\nwhile True:\n    x.append(bytearray(1 << 24))", "always"),
    ("all memory at once", "def solve(): return len(bytearray(1 << 36)) and 42", "always"),
    ("endless output", "while True:\n    print('x' * 100000)", "always"),
    ("an answer without end", "def solve(): return 'x' * (1 << 28)", "always"),
    ("an answer without bottom", "def solve():\n    x = []\n    x.append(x)\n    return x", "always"),
    ("sleep", "time.sleep(99)", "always"),
    ("sleep inside", "def solve(): time.sleep(99)", "always"),
    ("a busy loop", "while True: pass", "always"),
    ("a long product", "def solve(): return 9 ** 9 ** 9", "always"),
    ("signals ignored", "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass", "always"),
    ("stopped by itself", "os.kill(os.getpid(), signal.SIGSTOP)", "always"),
    ("exit 0", "sys.exit(0)", "always"),
    ("exit 0 at once", "os._exit(0)", "always"),
    ("exit 0 inside", "def solve(): sys.exit(0)", "always"),
    ("exit 0 at once inside", "def solve(): os._exit(0)", "always"),
    ("a verdict printed", "print('[true]'); print('{\"passed\": [true]}')\ndef solve(): print('[true]', flush=True)", "always"),
    ("a verdict on every file", FORGED, "always"),
    ("a verdict on every file, inside", "def solve():\n" + FORGED.replace("\n", "\n    "), "always"),
    ("equal to everything", "class Yes:\n    def __eq__(self, other): return True\n    def __hash__(self): return 42\ndef solve(): return Yes()", "always"),
    ("a number equal to everything", "class Yes(int):\n    def __eq__(self, other): return True\n    def __repr__(self): return '42'\n    def __index__(self): return 42\ndef solve(): return Yes(41)", "always"),
    ("asserts overwritten", "import builtins\nbuiltins.AssertionError = None\nbuiltins.__debug__ = False\nAssertionError = None\ndef solve(): return 41", "always"),
    ("names of the tests overwritten", "int = float = list = len = range = lambda *a: 42\ndef solve(): return 41", "always"),
    ("asks the frames for what is expected", "def solve():\n    frame = sys._getframe()\n    while frame:\n        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n            if NEEDLE in repr(value): return 42\n        frame = frame.f_back", "always"),
    ("asks the heap for what is expected", "def solve():\n    for thing in gc.get_objects():\n        try:\n            if NEEDLE in repr(thing): return 42\n        except Exception: pass", "always"),
    ("asks the disk for what is expected", "def solve():\n    for place, _, files in os.walk(os.getcwd()):\n        for name in files:\n            if NEEDLE in open(os.path.join(place, name), errors='replace').read(): return 42", "always"),
    ("kills its parent", "os.kill(os.getppid(), signal.SIGKILL)", "always"),
    ("kills whom it can", "for p in range(1, 400):\n    if p != os.getpid():\n        try: os.kill(p, signal.SIGKILL)\n        except OSError: pass", "isolated"),
    ("kills everyone", "os.kill(-1, signal.SIGKILL)", "isolated"),
    ("a daemon", DAEMON, "always"),
    ("reads the environment", f"def solve(): return 42 if {CANARY!r} in os.environ.values() else 0", "always"),
    ("reads its parent's memory", "def solve():\n    open(f'/proc/{os.getppid()}/mem', 'rb')\n    return 42", "always"),
    ("traces its parent", "def solve(): return 42 if ctypes.CDLL(None).ptrace(16, os.getppid(), None, None) == 0 else 0", "always"),
    ("reads everybody's environment", f"def solve():\n    for p in os.listdir('/proc'):\n        try:\n            if {CANARY!r}.encode() in open(f'/proc/{{p}}/environ', 'rb').read(): return 42\n        except OSError: pass", "isolated"),
    ("writes outside", f"def solve():\n    open({str(ESCAPED)!r}, 'w').write('x')\n    return 42", "isolated"),
    ("writes over Python", "def solve():\n    open(json.__file__, 'a')\n    return 42", "isolated"),
    ("reads the users", "def solve(): return 42 if 'root' in open('/etc/passwd').read() else 0", "isolated"),
    ("follows a link out", "def solve():\n    os.symlink('/etc', 'out')\n    return 42 if os.listdir('out') else 0", "isolated"),
    ("calls home", "def solve():\n    socket.create_connection(('127.0.0.1', PORT), 1)\n    return 42", "isolated"),
    ("a namespace within", "def solve(): return 42 if ctypes.CDLL(None).unshare(0x10000000) == 0 else 0", "isolated"),
    ("mounts", "def solve(): return 42 if ctypes.CDLL(None).mount(b'x', b'/work', b'tmpfs', 0, None) == 0 else 0", "always"),
    ("becomes root", "def solve():\n    os.setuid(0)\n    return 42 if os.getuid() == 0 else 0", "always"),
    ("raises its limits", "import resource\ndef solve():\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n    return 42", "always"),
    ("a file too large", "def solve():\n    with open('big', 'wb') as f: f.write(bytes(1 << 25))\n    return 42", "always"),
    ("too many open files", "def solve():\n    kept = [open('/dev/null') for _ in range(9999)]\n    return 42", "always"),
    ("an undeletable folder", "os.makedirs('a/b/c')\nopen('a/b/c/d', 'w')\nos.chmod('a/b', 0)\nos.chmod('a', 0)", "always"),
    ("nonsense", "\x00\x01 def", "always"),
    ("no text", "", "always"),
    ("half a character", "x = '\ud800'", "always"),
]  # fmt: skip


def try_all(isolated: bool, name: str) -> dict[str, bool]:
    """Whether each attack was scored as passed. Also: "alive", a right answer after all of them; "daemon", "escaped"."""
    os.environ["CANARY"] = CANARY
    ESCAPED.unlink(missing_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        sandbox = Sandbox(Limits(seconds=SECONDS, processes=8), isolated=isolated, num_workers=2)
        chosen = [attack for attack in ATTACKS if isolated or attack[2] == "always"]
        programs = [
            program.replace("NAME", name).replace("PORT", port).replace("NEEDLE", NEEDLE) for _, program, _ in chosen
        ]
        jobs = [{"kind": "tests", "program": IMPORTS + p, "tests": [TEST]} for p in programs]
        begun = time.monotonic()
        answers = sandbox.map(jobs)
        found = {
            attack[0]: answer is not None and answer["passed"] == [True]
            for attack, answer in zip(chosen, answers, strict=True)
        }
        right = {"kind": "tests", "program": "def solve(): return 42", "tests": [TEST]}
        alive = sandbox.map([right] * 4)
    found["in time"] = time.monotonic() - begun < len(jobs) * (SECONDS + 2)
    found["alive"] = all(answer is not None and answer["passed"] == [True] for answer in alive)
    found["daemon"] = any(_name(place) == name for place in Path("/proc").glob("[0-9]*/comm"))
    found["escaped"] = ESCAPED.exists()
    sandbox.close()
    found["left behind"] = any(Path(tempfile.gettempdir()).glob("prefero-sandbox-*/*/program.py"))
    return found


def _name(place: Path) -> str:
    try:
        return place.read_text().strip()
    except OSError:
        return ""


if __name__ == "__main__":
    try:
        print(json.dumps(try_all(sys.argv[1] == "isolated", sys.argv[2])))
    except SandboxError as error:
        print(json.dumps({"refused": str(error)}))
