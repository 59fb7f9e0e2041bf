"""Programs that want out, or more than they earned: what they get, what stays behind, who survives."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import ATTACKS, try_all

from prefero.rewards import jail, sandbox
from prefero.rewards.sandbox import Limits, Sandbox, SandboxError

PACKAGE = Path(sandbox.__file__).parents[1]
TO_BE_TRUE = {"in time", "alive"}
TWICE = "def twice(x): return 2 * x"


def passed(box: Sandbox, program: str, *tests: str) -> list[bool]:
    [answer] = box.map([{"kind": "tests", "program": program, "tests": list(tests)}])
    assert answer is not None
    found: list[bool] = answer["passed"]
    return found


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    made = Sandbox(Limits(seconds=5), num_workers=1)
    yield made
    made.close()


def test_no_attack_gets_what_it_wants() -> None:
    found = try_all(isolated=True, name=f"d{os.getpid()}")
    assert len(found) == len(ATTACKS) + 5
    assert {name for name, true in found.items() if true} == TO_BE_TRUE


@pytest.mark.slow
@pytest.mark.parametrize("how", ["isolated", "limited"])
@pytest.mark.parametrize("user", [65534, 0])
def test_no_attack_by_another_user_or_without_namespaces(how: str, user: int) -> None:
    """As an ordinary user, and as root by limits alone; where we are not root, as who we are."""
    folder = Path(tempfile.mkdtemp())  # where an ordinary user can read
    (folder / "prefero" / "rewards").mkdir(parents=True)
    for name in ("__init__.py", "rewards/__init__.py", "rewards/jail.py", "rewards/sandbox.py"):
        shutil.copy(PACKAGE / name, folder / "prefero" / name)
    shutil.copy(Path(__file__).with_name("attacks.py"), folder)
    for place in (folder, folder / "prefero", folder / "prefero" / "rewards"):
        place.chmod(0o755)
    is_root = os.geteuid() == 0
    as_user = {"user": user, "group": user, "extra_groups": []} if is_root and user else {}
    python = "/usr/bin/python3" if is_root and Path("/usr/bin/python3").exists() else sys.executable
    name = f"d{os.getpid()}-{user}"[:15]
    done = subprocess.run(
        [python, "-B", "attacks.py", how, name], cwd=folder, capture_output=True, text=True, timeout=240, check=True,
        env={"PYTHONPATH": str(folder)}, **as_user,
    )  # fmt: skip
    shutil.rmtree(folder)
    found = json.loads(done.stdout)
    assert {name for name, true in found.items() if true} == TO_BE_TRUE


def test_tests_see_plain_values_and_stand_ins(box: Sandbox) -> None:
    program = """
import math, collections
from math import *
LIMIT = 3
def nested(x): return [x, (x, {1: {x}}), frozenset([x]), 2j, b"ab", float("nan"), None, True, 10 ** 5000]
def counted(text): return collections.Counter(text)
def refuses(): raise KeyError("no")
def steps(n): yield from range(n)
class Stack:
    def __init__(self, *items, top=None): self.items = [*items]
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __getitem__(self, at): return self.items[at]
"""
    tests = [
        "value = nested(2)\nassert value[:5] == [2, (2, {1: {2}}), frozenset([2]), 2j, b'ab'] and math.isnan(value[5])",
        "assert nested(2)[6:] == [None, True, 10 ** 5000]",
        "assert counted('aab') == {'a': 2, 'b': 1} and LIMIT == 3 and floor(2.5) == 2",
        "s = Stack(1, top=9).push(2)\nassert s.items == [1, 2] and len(s) == 2 and s[1] == 2 and list(s) == [1, 2]",
        "assert list(steps(3)) == [0, 1, 2]",
        "try:\n    refuses()\n    assert False\nexcept KeyError:\n    pass",
        "def check(candidate):\n    assert candidate(1)[0] == 1\ncheck(nested)",
        "refuses()",
        "assert Stack(1) == Stack(1)",
        "import sys\nsys.exit(0)",
        "assert not_there() == 1",
    ]
    assert passed(box, program, *tests) == [True] * 7 + [False] * 4


def test_what_a_program_prints_for_its_inputs(box: Sandbox) -> None:
    program = "import sys\nn = int(input())\nprint(n * 2)\nif n == 3: sys.exit(1)\nif n == 4: print('x' * 9_000_000)"
    [answer] = box.map([{"kind": "inputs", "program": program, "inputs": ["1", "two", "3", "4", "5"]}])
    assert answer == {"printed": ["2\n", None, None, None, "10\n"], "late": False}


def test_an_answer_that_takes_too_long_is_late() -> None:
    box = Sandbox(Limits(seconds=0.5), num_workers=1)
    [slow, fast] = box.map(
        [{"kind": "tests", "program": p, "tests": ["assert twice(2) == 4"]} for p in ("while True: pass", TWICE)]
    )
    assert slow == {"passed": [False], "late": True}
    assert fast == {"passed": [True], "late": False}
    box.close()


def test_every_job_begins_in_an_empty_folder(box: Sandbox) -> None:
    program = "import os\nseen = os.listdir('.')\nopen('left', 'w').write('x')\ndef look(): return seen"
    for _ in range(2):
        assert passed(box, program, "assert look() == ['program.py']") == [True]


def test_answers_come_in_the_order_asked_from_as_many_as_there_are_workers() -> None:
    box = Sandbox(Limits(), num_workers=3)
    jobs = [{"kind": "inputs", "program": f"print({i})", "inputs": [""]} for i in range(12)]
    assert [answer and answer["printed"] for answer in box.map(jobs)] == [[f"{i}\n"] for i in range(12)]
    assert len({keeper.process.pid for keeper in box._keepers if keeper.process}) == 3
    box.close()
    assert all(keeper.process is None for keeper in box._keepers)


def test_a_keeper_that_is_lost_costs_one_answer(box: Sandbox) -> None:
    [keeper] = box._keepers
    assert passed(box, TWICE, "assert twice(1) == 2") == [True]
    process = keeper.process
    assert process is not None
    threading.Timer(0.3, process.kill).start()
    assert box.map([{"kind": "tests", "program": "import time\ntime.sleep(9)", "tests": ["1"]}]) == [None]
    assert passed(box, TWICE, "assert twice(1) == 2") == [True]


def test_the_end_of_the_run_is_the_end_of_the_keepers() -> None:
    """Killed outright, with a program running: nobody is left to wait for it."""
    code = (
        "from prefero.rewards.sandbox import *; box = Sandbox(Limits(seconds=2), num_workers=1)\n"
        "print(box._keepers[0].process.pid, flush=True)\n"
        "box.map([{'kind': 'tests', 'program': 'import time\\ntime.sleep(99)', 'tests': ['1']}])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        keeper = int(run.stdout.readline())
        time.sleep(0.3)
        run.kill()
    deadline = time.monotonic() + 20
    while _alive(keeper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(keeper)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_machine_that_refuses_is_told_apart_from_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match="ended at once"):
        Sandbox(Limits(), num_workers=1)


@pytest.mark.parametrize("change", [{"seconds": 0}, {"memory": -1}, {"processes": True}, {"seconds": float("nan")}])
def test_limits_that_mean_nothing_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"sandbox \w+ is .*above 0"):
        Limits(**change)  # type: ignore[arg-type]


def test_messages_have_a_limit() -> None:
    reading, writing = os.pipe()
    os.write(writing, (jail.MOST + 1).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="message of"):
        jail.receive(reading)
    os.close(writing)
    os.close(reading)
