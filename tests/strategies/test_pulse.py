"""Signs of life between the processes of a run."""

import subprocess
import sys

ENDS = """
import os, threading, time
import torch.distributed as dist
from prefero.strategies.pulse import Pulse

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}

class Slow:
    def set(self, key, value):
        inside.set()
        time.sleep(1)
        print(value.split()[-1], flush=True)

inside, pulse = threading.Event(), Pulse(0, 2)
pulse._store = Slow()
assert inside.wait(60)
"""


def test_a_sign_of_life_on_its_way_ends_before_the_process_does() -> None:
    """Torch's store aborts a process that goes down while a thread is inside of it."""
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "start\nended\n"
