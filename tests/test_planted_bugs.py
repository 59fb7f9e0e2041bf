"""The tests can fail: each known silent bug, planted into a copy of the code, is found by the tests named for it.

A bug is a piece of a file and what it is replaced by; when the code changes so that the piece is gone, plant it anew.
The copy is all of the checkout, where the same tests pass without the bug.
"""
# ruff: noqa: E501 (a bug a line)

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VECTORS = "tests/functional/test_formula_vectors.py"
METAMORPHIC = "tests/trainer/test_metamorphic_ppo.py"
PACKING = "tests/models/test_model_packing.py"
PREFERENCES = "tests/functional/test_preference_vectors.py"
PAIRS = "tests/trainer/test_preference_trainers.py"
ILQL = "tests/functional/test_ilql_formula.py"
DISTRIBUTED = "tests/strategies/test_distributed.py"
BUGS = [
    # the formulas
    ("the KL estimate is inverted", "functional/kl.py", "return logprobs - ref_logprobs", "return ref_logprobs - logprobs", VECTORS),
    ("the KL penalty is paid out", "functional/kl.py", "- coefficient * penalty", "+ coefficient * penalty", VECTORS),
    ("GAE bootstraps from padding", "functional/advantages.py", "torch.where(kept[:, here], values[:, here], next_value)", "values[:, here]", VECTORS),
    ("GAE forgets to discount", "functional/advantages.py", "gamma * next_value", "next_value", VECTORS),
    ("PPO takes the better of the two losses", "functional/policy.py", "torch.maximum(-advantages * ratio", "torch.minimum(-advantages * ratio", VECTORS),
    ("the value loss takes the smaller error", "functional/value.py", "torch.maximum(", "torch.minimum(", VECTORS),
    ("the margin is added", "functional/reward.py", "difference - margin", "difference + margin", VECTORS),
    ("whitening divides by n - 1", "functional/masked.py", "count - float(unbiased)", "count - 1", VECTORS),
    ("the vocabulary's head forgets the temperature", "functional/logprobs.py", "logits.div_(self.temperature)", "logits", METAMORPHIC),
    ("an answer is its own baseline", "functional/advantages.py", "_over_groups(rewards, member, count)[member] - rewards", "_over_groups(rewards, member, count)[member]", "tests/functional/test_group_formulas.py"),
    ("GRPO's spread is the biased one", "functional/advantages.py", "member, count) / (count - 1)", "member, count) / count", "tests/functional/test_group_formulas.py"),
    ("GSPO's ratio is the product", "functional/policy.py", "log_ratio = masked.mean(", "log_ratio = masked.sum(", "tests/functional/test_group_formulas.py"),
    ("CISPO's weight gets a gradient", "functional/policy.py", "(logprobs.detach() - old_logprobs)", "(logprobs - old_logprobs)", "tests/functional/test_group_formulas.py"),
    ("DPO forgets the reference of the rejected", "functional/preference.py", "rejected = _log_ratio(rejected_logps, ref_rejected_logps)", "rejected = _log_ratio(rejected_logps, ref_chosen_logps)", PREFERENCES),
    ("KTO's reference point may be negative", "functional/preference.py", ".mean().clamp_min(0.0).detach()", ".mean().detach()", PREFERENCES),
    ("KTO's reference point is learned from", "functional/preference.py", "z0.detach() if isinstance(z0, Tensor) else z0", "z0", PREFERENCES),
    ("one minus a probability near 1 loses its digits", "functional/preference.py", "torch.log(-torch.expm1(torch.where(near, below, -1.0)))", "torch.log1p(-torch.exp(torch.where(near, below, -1.0)))", PREFERENCES),
    ("of equal scores the last is chosen", "functional/best_of_n.py", "_mean_of_ties(ordered, worth) * weights", "worth * weights", "tests/functional/test_formula_best_of_n.py"),
    ("subsets hold a sample twice", "functional/best_of_n.py", "(places - k).clamp_min(0.0) / (count - k)", "places / count", "tests/functional/test_formula_best_of_n.py"),
    # who scores
    ("steps are paid at the end", "trainer/collate.py", "per_token[row, index] += points", "per_token[row, -1] += points", "tests/algorithms/test_ppo_steps.py"),
    ("what cannot be judged is right", "rewards/verified.py", "value = 0.0 if found is None", "value = 1.0 if found is None", "tests/rewards/test_verified.py"),
    ("words are products of letters", "rewards/judge_math.py", "or not _WORD.search(text)", "or True", "tests/rewards/test_verified.py"),
    ("a program is asked whether it is right", "rewards/jail.py", '        return iter(self._link.ask("list", self._number))', '        return iter(self._link.ask("list", self._number))\n\n    def __eq__(self, other):\n        return self._link.ask("get", self._number, "__eq__")(other)', "tests/rewards/test_sandbox.py"),
    ("programs have a network", "rewards/jail.py", "| 0x40000000 |", "|", "tests/rewards/test_sandbox.py"),
    # what reads what
    ("log-probabilities are off by one", "models/base.py", "attention_mask)[:, -num_actions - 1 : -1]\n        index", "attention_mask)[:, -num_actions:]\n        index", METAMORPHIC),
    ("values see the token they judge", "models/base.py", "hidden[:, -count - 1 : -1]", "hidden[:, -count:]", "tests/trainer/test_one_file.py"),
    ("positions count padding", "models/trunk.py", "attention_mask.long().cumsum(dim=-1)", "torch.ones_like(attention_mask).long().cumsum(dim=-1)", PACKING),
    ("packed texts count on from the one before", "models/packing.py", "return Packing(source, positions,", "return Packing(source, torch.arange(len(source)),", PACKING),
    ("a block of queries sees what comes after", "models/blocks.py", "numbers[first:] > positions.unsqueeze(-1)", "numbers[first:] > positions.unsqueeze(-1) + 1", "tests/models/test_model_blocks.py"),
    ("padded queries pass on a gradient", "models/blocks.py", "errors.masked_fill_(", "errors.masked_fill(", "tests/models/test_model_blocks.py"),
    ("the reward is read at the last column", "models/base.py", "last = sequences.shape[1] - 1 - mask.long().flip(1).argmax(dim=1)", "last = torch.full_like(mask[:, 0].long(), -1)", "tests/models/test_model_critic_and_reward.py"),
    ("padding is whatever equals the end token", "data/collate.py", "return _pad(sequences, pad_id, left=False)", "ids, _ = _pad(sequences, pad_id, left=False)\n    return ids, (ids != pad_id).long()", "tests/data"),
    ("a role on the backbone has a copy of it", "models/shared.py", "return deepcopy(model, {id(tensor): tensor for tensor in frozen})", "return deepcopy(model)", "tests/models/test_model_shared.py"),
    ("a role keeps the adapters of another", "models/shared.py", "setattr(parent, name, child.get_base_layer())", "pass", "tests/models/test_model_shared.py"),
    ("a hydra's value is of the state after", "models/shared.py", "score_hidden(self.value_head, hidden[:, -action_mask.shape[1] - 1 : -1])", "score_hidden(self.value_head, hidden[:, -action_mask.shape[1] :])", "tests/models/test_model_shared.py"),
    ("reward adapters are put on any weights", "models/shared.py", 'known["fingerprint"] != fingerprint(trunk.config, state)', "False", "tests/models/test_model_shared.py"),
    ("a role's checkpoint moves the weights of others", "strategies/base.py", "self._check_shared(model, state)", "pass", "tests/models/test_model_shared.py"),
    # values of tokens
    ("a text's last action is followed by itself", "functional/ilql.py", "ahead[:, 1:], (0, 1), value=beyond)", "ahead[:, 1:], (0, 1), value=beyond - 1)", ILQL),
    ("V learns to be what it is compared with", "functional/ilql.py", "next_values(values.detach(), mask)", "next_values(values, mask)", ILQL),
    ("V is the mean of the worse half", "functional/ilql.py", "torch.where(error < 0, (1.0 - tau) * square, tau * square)", "torch.where(error > 0, (1.0 - tau) * square, tau * square)", ILQL),
    ("what others say takes time", "functional/ilql.py", "places = torch.where(mask.bool(), columns, beyond)", "places = columns", ILQL),
    ("the slow copies learn by gradients too", "models/ilql.py", "freeze(deepcopy(self.q1)), freeze(deepcopy(self.q2))", "deepcopy(self.q1), deepcopy(self.q2)", "tests/models/test_model_ilql.py"),
    ("the slow copies never move", "trainer/ilql.py", "self.algorithm.stepped(self.num_steps)", "pass", "tests/trainer/test_ilql_trainer.py"),
    ("values guide by what still learns", "models/ilql.py", "target_qs = [self.target_q1(hidden), self.target_q2(hidden)]", "target_qs = [self.q1(hidden), self.q2(hidden)]", "tests/models/test_model_ilql.py"),
    ("values read the token they choose", "models/ilql.py", "found = self.heads.read(hidden.flatten(0, 1).index_select(0, index), chosen)", "found = self.heads.read(hidden.flatten(0, 1).roll(-1, 0).index_select(0, index), chosen)", "tests/models/test_model_ilql.py"),
    ("a walk that is too late is worth something", "data/randomwalks.py", "length = min(place, MAX_NODES)", "length = place", "tests/worlds/test_randomwalks.py"),
    # the loop
    ("every micro-batch is averaged by itself", "trainer/update.py", "losses(batch, total)", "losses(batch, float(count(batch)))", METAMORPHIC),
    ("dropout stays on while PPO learns", "trainer/ppo.py", "learning_mode(learner.model, dropout=False)", "learning_mode(learner.model, dropout=True)", METAMORPHIC),
    ("advantages are not whitened", "algorithms/ppo.py", "advantages = whitening(batch.advantages)", "advantages = batch.advantages", "tests/trainer/test_one_file.py"),
    ("unfinished answers are rewarded", "algorithms/ppo.py", "scores - settings.missing_eos_penalty", "scores + settings.missing_eos_penalty", "tests/trainer/test_silent_bugs.py"),
    ("the reference keeps learning", "algorithms/ppo.py", "with self.actor.reference():", "if True:", "tests/trainer"),
    ("the references of chosen and rejected are swapped", "algorithms/dpo.py", "theirs[batch.chosen], theirs[batch.rejected]", "theirs[batch.rejected], theirs[batch.chosen]", PAIRS),
    ("a prompt's tokens count as the completion's", "algorithms/completions.py", "masked.sum(token_logprobs(actor, texts), mask, dim=1), mask.sum(1)", "masked.sum(token_logprobs(actor, TokenBatch(texts.token_ids, texts.attention_mask, texts.attention_mask)), texts.attention_mask[:, 1:], dim=1), mask.sum(1)", PAIRS),
    ("adapters stay on in their own reference", "algorithms/completions.py", "actor.reference() if reference is None else nullcontext()", "nullcontext()", PAIRS),
    ("every micro-batch has its own reference point", "trainer/preference.py", "self.kto.look_ahead(micro_batches.parts, self.strategy.group)", "self.kto.look_ahead(micro_batches.parts[:1], self.strategy.group)", PAIRS),
    ("ORPO imitates the rejected", "algorithms/orpo.py", "dim=1)[batch.chosen]", "dim=1)[batch.rejected]", PAIRS),
    ("all of a conversation's answers count", "data/tokenize.py", "    while place >= 0 and mask[place]:\n        place -= 1\n    return", "    place = -1\n    return", "tests/data/test_data_pairs.py"),
    ("numbers of another reference are believed", "recipes/reference_cache.py", "other = [name for name, fact in facts.items() if told.get(name) != fact]", "other: list[str] = []", "tests/recipes/test_reference_cache.py"),
    # the sampler
    ("samples of one prompt are equal", "rollout/sampling.py", 'struct.pack("<qqq", seed, step, sample_index)', 'struct.pack("<qqq", seed, step, 0)', "tests/rollout"),
    ("a sample depends on its neighbours", "rollout/rows.py", "[row.key for row in rows]", "[row.key + len(rows) for row in rows]", "tests/rollout"),
    ("the sampler's logits are rounded", "rollout/hf.py", "evaluating(self.model), replaced(head):", "evaluating(self.model):", "tests/rollout"),
    # the optimum, the older system's script
    ("the KL price has no effect", "algorithms/ppo.py", "coefficient = self.kl_coef if reference is not None else 0.0", "coefficient = 0.0", "tests/trainer/test_known_optimum.py"),
    ("LoRA's merge moves the live weights", "models/lora.py", "whole(own, name).float() + _turned(_update(layers[layer], layer, own), turned)", "whole(own, name).add_(_turned(_update(layers[layer], layer, own), turned))", "tests/models/test_model_lora.py"),
    ("what int8 matrices pass back is not scaled", "models/frozen.py", "gradient @ widened(weight[:, columns], scale, gradient.dtype)", "gradient @ weight[:, columns].to(gradient.dtype)", "tests/models/test_frozen.py"),
    ("what SFT's adapters learned is rounded away", "recipes/start.py", 'adapter_of(name) if frozen != "fp32" and lora_rank else None', "None", "tests/recipes/test_few_bytes.py"),
    ("processes average what should be summed", "strategies/base.py", "scale = float(self.group.world_size)", "scale = 1.0", f"{DISTRIBUTED}::test_training_is_that_of_one_process[ddp-2]"),
    ("a checkpoint is believed unchecked", "strategies/checkpoint.py", 'if name not in believed and _sha256(file) != facts["sha256"]:', "if False:", "tests/examples/test_benchmarks.py::test_damage_to_checkpoints_is_always_noticed"),
    ("what was just saved is thrown away", "strategies/checkpoint.py", "[*folders[:own], *folders[own + self.keep :]]", "folders[self.keep :]", "tests/strategies/test_checkpoint_files.py"),
    ("lost checkpoints are begun over in silence", "strategies/checkpoint.py", "if not folders and (self.folder / POINTER).exists():", "if False:", "tests/strategies/test_checkpoint_files.py"),
    ("a resumed run reads its data from the start", "recipes/session.py", 'self.loader.load_state_dict(state["loader"])', "pass", "tests/recipes/test_resume.py"),
    ("a loss that is not finite goes into the weights", "trainer/update.py", "else loss.value * math.nan", "else loss.value", "tests/trainer/test_not_finite.py"),
    ("gradients of what memory did not suffice for are counted", "trainer/update.py", "            learner.optimizer.zero_grad()\n", "", "tests/trainer/test_out_of_memory.py"),
    ("what was drawn differs between processes", "strategies/fsdp.py", "self._start_alike(model.fill(part))", "model.fill(part)", f"{DISTRIBUTED}::test_models_built_without_weights_are_filled_in_part_by_part[zero2-2]"),
    ("adapters that are switched off count as frozen", "models/lora.py", "parameter.requires_grad_(requires_grad)", "pass", f"{DISTRIBUTED}::test_training_is_that_of_one_process[zero3-2]"),
    ("weights that drift apart go unnoticed", "strategies/ddp.py", "if len(set(everyone)) > 1:", "if False:", f"{DISTRIBUTED}::test_weights_that_drift_apart_are_noticed[ddp-2]"),
    ("who scores sees the data's answer", "data/tokenize.py", 'further["messages"] = list(messages)', 'further.setdefault("messages", list(messages))', "tests/data/test_data_tokenize.py"),
    ("samples of one prompt count as independent", "recipes/evaluation.py", "differences.setdefault(rollout.prompt.id, [])", "differences.setdefault(str(len(differences)), [])", "tests/recipes/test_evaluation.py"),
    ("nothing is learned", "trainer/update.py", "strategy.optimizer_step(learner.optimizer, max_norm=max_norm)", "0.0", "tests/test_seed_snippet.py"),
    ("the older system's arguments moved", "trainer/ppo.py", "actor_optim", "policy_optim", "tests/test_public_surface.py"),
]  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, without what was made in it."""
    folder = tmp_path_factory.mktemp("planted") / "copy"
    made = (".git", ".venv", "venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made))
    return folder


@pytest.fixture
def planted(request: pytest.FixtureRequest, copy: Path) -> Iterator[Path]:
    """The copy with one bug in it."""
    _, name, piece, bug, _ = request.param
    file = copy / "prefero" / name
    text = file.read_text(encoding="utf-8")
    assert piece in text, f"{name} has no {piece!r} any more: plant this bug anew"
    file.write_text(text.replace(piece, bug), encoding="utf-8")
    yield copy
    file.write_text(text, encoding="utf-8")


def test_the_readme_says_how_many() -> None:
    assert f"| {len(BUGS)} silent bugs planted one by one" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "tests"), [(bug, bug[-1]) for bug in BUGS], indirect=["planted"], ids=[bug[0] for bug in BUGS]
)
def test_a_planted_bug_is_found(planted: Path, tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(planted)}
    done = subprocess.run(command, cwd=planted, env=environment, capture_output=True, text=True, timeout=600)
    # A test that fails has found it; one that cannot run has not.
    assert done.returncode == 1 and "FAILED" in done.stdout, f"not found: {done.stdout[-2000:]}{done.stderr[-2000:]}"
