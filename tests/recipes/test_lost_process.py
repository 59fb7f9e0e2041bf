"""One of two processes is killed, or stands still: the other ends with its name, in time, and the run can go on."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pipeline import write_own_data

from prefero.faults import PHASES

pytestmark = pytest.mark.dist

CONFIG = """
data: {sft: sft.jsonl, preferences: pairs.jsonl, prompts: prompts.jsonl}
model: {path: base}
strategy: {kind: ddp, precision: fp32, threads: 1, timeout: 6}
checkpoint: {every: 1, minutes: 0}
sft: {steps: 4, batch_size: 8}
"""


def launch(folder: Path, *arguments: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "prefero"]
    return subprocess.run(
        [*launcher, *arguments], cwd=folder, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PREFERO_FAULT": fault},
    )  # fmt: skip


SLOW = """
import os, time
def score(prompt, completion, **columns):
    if os.environ["RANK"] == "0":
        time.sleep(300)
    return 1.0
"""


@pytest.mark.slow
def test_a_process_that_waits_for_nobody_notices_too(tmp_path: Path) -> None:
    """It hears of the end by torchrun's SIGTERM, and must not be killed without a word half a minute later."""
    write_own_data(tmp_path, tmp_path / "base")
    (tmp_path / "own.yaml").write_text(CONFIG)
    (tmp_path / "slow.py").write_text(SLOW)
    short = ["--ppo.steps", "2", "--prompts-per-step", "4", "--train-batch-size", "4", "--max-new-tokens", "4"]
    arguments = ["ppo", "own.yaml", "--out", "run", *short, "--rewards.r.use", "slow.py:score", "--eval-every", "0"]
    lost = launch(tmp_path, *arguments, fault="kill@score:1:rank1")
    told = re.search(r"prefero: error: rank 0 was in phase 'score': rank 1 does not answer any more.*", lost.stderr)
    assert told and "the run can be resumed" in told[0], lost.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_a_lost_process_is_named_and_the_run_goes_on(tmp_path: Path, kind: str) -> None:
    write_own_data(tmp_path, tmp_path / "base")
    (tmp_path / "own.yaml").write_text(CONFIG)
    began = time.monotonic()
    lost = launch(tmp_path, "sft", "own.yaml", "--out", "run", fault=f"{kind}@backward:3:rank1")
    took = time.monotonic() - began
    assert lost.returncode == 1, lost.stderr
    told = re.search(r"prefero: error: rank 0 waited for other processes in phase '(\w+)'.*", lost.stderr)
    assert told, lost.stderr[-4000:]
    # What it was about to do at its last sign of life, which is not long before.
    seen = re.search(r"rank 1 does not answer any more, last seen in phase '(\w+)'", told[0])
    assert seen and seen[1] in PHASES, told[0]
    assert "prefero resume run" in told[0]
    if kind == "stop":  # of a killed process torchrun reports that one
        assert "exitcode  : 76" in lost.stderr
    assert took < 120, "six seconds' patience, the survey, and torchrun's half minute for what stands still"
    resumed = launch(tmp_path, "resume", "run")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert "going on from step" in resumed.stderr
