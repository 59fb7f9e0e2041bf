"""The older system's FAQ on checkpoints, line by line, for every process of a torchrun launch; see test_seed_faq.py.

python faq.py FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import OPTForCausalLM

from prefero.models.opt import OPTActor
from prefero.optimizer import HybridAdam
from prefero.trainer.strategies import ColossalAIStrategy, DDPStrategy, Strategy


def step(strategy: Strategy, actor: Any, optimizer: Any) -> None:
    """One step of training, on tokens of this process's own."""
    ids = torch.arange(20).reshape(2, 10) % 7 + strategy.group.rank
    strategy.backward(-actor(ids, 5).sum() / 40, actor, optimizer)
    strategy.optimizer_step(optimizer)


def trained(strategy: Strategy, folder: Path, steps: int) -> tuple[Any, Any]:
    actor = OPTActor(pretrained=str(folder))
    actor_optim = HybridAdam(actor.parameters(), lr=1e-2)
    actor, actor_optim = strategy.prepare((actor, actor_optim))
    for _ in range(steps):
        step(strategy, actor, actor_optim)
    return actor, actor_optim


def main(strategy: Strategy, base: Path) -> dict[str, Any]:
    """What the FAQ says, as far as this process sees it; the working directory is its own."""
    sharded, found = isinstance(strategy, ColossalAIStrategy), {}
    actor, actor_optim = trained(strategy, base, 2)

    strategy.save_model(actor, "actor_checkpoint.pt", only_rank0=True)
    found["model on only rank 0"] = Path("actor_checkpoint.pt").exists() == (strategy.group.rank == 0)
    strategy.save_model(actor, "everywhere.pt")
    whole = torch.load("everywhere.pt", weights_only=True)
    plain = OPTForCausalLM.from_pretrained(base).state_dict()
    found["whole"] = {"lm_head.weight", *whole} == set(plain) and all(
        tensor.shape == plain[name].shape for name, tensor in whole.items()
    )
    found["float32"] = all(tensor.dtype == torch.float32 for tensor in whole.values())

    strategy.save_optimizer(actor_optim, "actor_optim_checkpoint.pt", only_rank0=False)
    found["optimizer files"] = sorted(file.name for file in Path().glob("actor_optim*"))
    try:
        strategy.save_optimizer(actor_optim, "only_one.pt", only_rank0=True)
        found["only rank 0 for the optimizer"] = Path("only_one.pt").exists() == (strategy.group.rank == 0)
    except ValueError as error:
        found["only rank 0 for the optimizer"] = str(error)

    again, again_optim = trained(strategy, base, 0)
    strategy.load_model(again, "everywhere.pt", strict=False)
    strategy.load_optimizer(again_optim, "actor_optim_checkpoint.pt")
    for model, optimizer in ((actor, actor_optim), (again, again_optim)):
        step(strategy, model, optimizer)
    ours, theirs = strategy.whole_state(again), strategy.whole_state(actor)
    found["goes on alike"] = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found["sharded"] = sharded and any("DTensor" in type(p).__name__ for p in actor.parameters())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for kind in (DDPStrategy, ColossalAIStrategy):
        strategy = kind()
        own = folder / f"{kind.__name__}-{strategy.group.rank}"  # each process on a machine of its own, as it were
        own.mkdir()
        os.chdir(own)
        Path("found.json").write_text(json.dumps(main(strategy, folder / "opt")))
