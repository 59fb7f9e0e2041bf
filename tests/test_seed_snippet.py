"""The seed README's snippet runs after the documented edits."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import gpt2_config
from transformers import GPT2LMHeadModel

from prefero.models.gpt import GPTActor

SNIPPET = re.search(r"```python\n(.*?)```", Path(__file__).with_name("seed_snippet.md").read_text(), re.DOTALL)
assert SNIPPET is not None

# What a user changes: two package names, a model of this machine, and the dots.
EDITS = {
    "from chatgpt.": "from prefero.",
    "from colossalai.nn.optimizer": "from prefero.optimizer",
    ".cuda()": "",
    "pretrained='gpt2'": "pretrained='tiny-gpt2'",
    "GPTCritic()": "GPTCritic(pretrained='tiny-gpt2')",
    "                     ...)": "                     max_length=10, train_batch_size=4)",
    "trainer.fit(dataset, ...)": "trainer.fit(dataset, num_episodes=1, max_timesteps=2, update_timesteps=2)",
}


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    GPT2LMHeadModel(gpt2_config()).save_pretrained(tmp_path / "tiny-gpt2")
    # The checkpoints which the snippet loads: those of an earlier run.
    actor = GPTActor(pretrained=str(tmp_path / "tiny-gpt2"))
    torch.nn.init.constant_(actor.model.transformer.ln_f.bias, 0.25)
    optimizer = torch.optim.Adam(actor.parameters(), lr=5e-6)
    actor(torch.randint(3, 32, (2, 6)), 3).sum().backward()
    optimizer.step()
    torch.save(actor.model.state_dict(), tmp_path / "actor_checkpoint.pt")
    torch.save(optimizer.state_dict(), tmp_path / "actor_optim_checkpoint.pt")
    return tmp_path


@pytest.fixture(params=["ColossalAIStrategy()", "NaiveStrategy('cpu')"])
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    """As the snippet has it, or the one for one device; the process group of one is left again."""
    yield request.param
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_seeds_snippet_runs(model_folder: Path, strategy: str) -> None:
    assert SNIPPET is not None
    code = SNIPPET.group(1)
    name = strategy.partition("(")[0]
    for old, new in {**EDITS, "ColossalAIStrategy()": strategy, "import ColossalAIStrategy": f"import {name}"}.items():
        assert old in code, old
        code = code.replace(old, new)
    assert "chatgpt" not in code and "colossalai" not in code and "..." not in code.replace("'...'", "")
    names: dict[str, object] = {"dataset": torch.randint(3, 32, (40, 4))}
    before = torch.load(model_folder / "actor_checkpoint.pt", weights_only=True)
    exec(compile(code, "seed_snippet.md", "exec"), names)  # noqa: S102 - the snippet is in this folder
    after = torch.load(model_folder / "actor_checkpoint.pt", weights_only=True)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    # It went on from the loaded checkpoint (bias near .25), and every weight matrix learned at a rate of 5e-6.
    assert abs(float(after["transformer.ln_f.bias"].mean()) - 0.25) < 1e-3
    assert 0 < moved["transformer.h.0.attn.c_attn.weight"] < 1e-3
    state = torch.load(model_folder / "actor_optim_checkpoint.pt", weights_only=True)
    assert int(state["state"][0]["step"]) == 1 + 4  # 16 rows in batches of 4, after the step it was saved with
