"""SFT and reward modelling: splits, padding, masks, schedules, reports and refusals."""

import logging
import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from ppo_world import EOS, actor, assert_same
from tiny import gpt2_config, llama_config, tiny_tokenizer
from torch import nn

from prefero.dataset import RewardDataset, SFTDataset
from prefero.models.base import LM
from prefero.models.gpt import GPTRM, GPTActor
from prefero.models.llama import LlamaActor, LlamaLM, LlamaRM
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import RewardModelTrainer, SFTTrainer
from prefero.types import PreferenceBatch, TokenBatch


class Notes:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Any, step: int) -> None:
        self.logged.append((step, dict(metrics)))

    def log_samples(self, rows: Any, step: int) -> None: ...

    def close(self) -> None: ...


def tokens(extra: int = 0) -> TokenBatch:
    """Four rows of 2 to 7 tokens; the first token or two of each are prompt. Padding slots hold the EOS token."""
    lengths, prompts = [2, 7, 4, 5], [1, 2, 2, 1]
    generator = torch.Generator().manual_seed(4)
    ids = torch.full((4, 7 + extra), EOS)
    attention, loss = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids[row, : length - 1] = torch.randint(3, 12, (length - 1,), generator=generator)
        attention[row, :length] = 1
        loss[row, prompt:length] = 1
    return TokenBatch(ids, attention, loss)


def comparisons(extra: int = 0, side: str = "right") -> PreferenceBatch:
    """Five comparisons of four texts."""
    ids, attention = tokens(extra).token_ids, tokens(extra).attention_mask
    if side == "left":
        rolled = [(row.roll(int((1 - mask).sum())), mask.flip(0)) for row, mask in zip(ids, attention, strict=True)]
        ids, attention = torch.stack([row for row, _ in rolled]), torch.stack([mask for _, mask in rolled])
    margin = torch.tensor([0.0, 0.5, 0.0, 1.0, 0.2]).double()
    chosen, rejected = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([1, 2, 2, 2, 0])
    return PreferenceBatch(ids, attention, chosen, rejected, margin, torch.ones(5, dtype=torch.bool))


def reward_model() -> GPTRM:
    """GPT-2, because the norms of transformers' Llama compute in float32 even in a float64 model."""
    torch.manual_seed(0)
    return GPTRM(config=gpt2_config(12)).double()


def sft(model: Any, data: Any, **changes: Any) -> SFTTrainer:
    changes = {"max_epochs": 1, "scheduler": "constant", **changes}
    return SFTTrainer(model, NaiveStrategy("cpu"), torch.optim.SGD(model.parameters(), lr=1.0), data, **changes)


def rm(model: Any, data: Any, held_out: Any = None, **changes: Any) -> RewardModelTrainer:
    changes = {"max_epochs": 1, "scheduler": "constant", **changes}
    optimizer = torch.optim.SGD(model.parameters(), lr=changes.pop("lr", 1.0))
    return RewardModelTrainer(model, NaiveStrategy("cpu"), optimizer, data, held_out, **changes)


PORTIONS = [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 14}]


@pytest.mark.parametrize("portion", PORTIONS)
def test_sft_does_not_depend_on_micro_batches(portion: dict[str, int]) -> None:
    # Beginnings that texts share are summed before they go back, so that the float32 of Llama's norms would be seen.
    torch.manual_seed(0)
    whole = GPTActor(config=gpt2_config(12)).double()
    split = deepcopy(whole)
    metrics = sft(whole, [tokens()]).fit()
    split_metrics = sft(split, [tokens()], **portion).fit()
    assert_same(dict(whole.state_dict()), dict(split.state_dict()))
    assert metrics["sft/loss"] == pytest.approx(split_metrics["sft/loss"], rel=1e-9)


def test_the_sft_loss_is_the_mean_over_counted_tokens_and_no_others() -> None:
    model, batch = actor(), tokens()
    logits = model.model(batch.token_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    labels = torch.where(batch.loss_mask.bool(), batch.token_ids, -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 12), labels.reshape(-1))
    assert (batch.token_ids == EOS).sum() > (labels == EOS).sum() == 4  # the real EOS counts, the padding does not
    assert sft(model, [batch]).fit()["sft/loss"] == pytest.approx(float(expected.detach()), rel=1e-9)


def test_padding_and_what_stands_in_it_do_not_matter_to_sft() -> None:
    one, other = actor(), actor()
    wide = tokens(extra=3)
    wide = TokenBatch(torch.where(wide.attention_mask.bool(), wide.token_ids, 9), wide.attention_mask, wide.loss_mask)
    sft(one, [tokens()]).fit()
    sft(other, [wide]).fit()
    assert_same(dict(one.state_dict()), dict(other.state_dict()))


def test_dict_batches_rows_and_language_models_are_taken() -> None:
    batch = tokens()
    rows = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask,
            "labels": torch.where(batch.loss_mask.bool(), batch.token_ids, -100)}  # fmt: skip
    expected = sft(actor(), [batch]).fit()["sft/loss"]
    assert sft(actor(), [rows]).fit()["sft/loss"] == pytest.approx(expected, rel=1e-9)
    torch.manual_seed(0)
    model = LlamaLM(config=llama_config(12)).double()
    assert isinstance(model, LM)
    assert sft(model, [batch]).fit()["sft/loss"] == pytest.approx(expected, rel=1e-9)


def test_a_dataset_of_rows_is_shuffled_into_batches(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "tell me about the movie", "completion": f" {word} !"} for word in ("good", "bad", "great")]
    model = LlamaActor(config=llama_config(len(tokenizer)))
    trainer = sft(model, SFTDataset(rows, tokenizer, 16), eval_dataloader=SFTDataset(rows, tokenizer, 16), batch_size=2,
                  max_epochs=2, eval_interval=1)  # fmt: skip
    with caplog.at_level(logging.INFO):
        metrics = trainer.fit(logging.getLogger("sft"), log_interval=2)
    assert trainer.num_steps == 4 and [r.message.split(":")[0] for r in caplog.records] == ["step 2", "step 4"]
    assert metrics["sft/eval_perplexity"] == pytest.approx(math.exp(metrics["sft/eval_loss"]))


def test_the_cosine_reaches_zero_and_the_sampler_hears_of_epochs() -> None:
    class Sampler:
        heard: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.heard.append(epoch)

    notes, model = Notes(), actor()
    trainer = SFTTrainer(model, NaiveStrategy("cpu"), torch.optim.SGD(model.parameters(), lr=0.1), [tokens()] * 2,
                         sampler=Sampler(), tracker=notes)  # fmt: skip
    trainer.fit()
    rates = [metrics["sft/lr"] for _, metrics in notes.logged]
    assert [step for step, _ in notes.logged] == [1, 2, 3, 4] and Sampler.heard == [0, 1]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert trainer.learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_evaluation_weighs_batches_by_tokens_and_restores_the_mode() -> None:
    model = actor()
    parts = [TokenBatch(*(t[rows] for t in vars(tokens()).values())) for rows in (slice(0, 1), slice(1, 4))]
    trainer = sft(model, [tokens()])
    model.train()
    whole, split = trainer.evaluate([tokens()]), trainer.evaluate(parts)
    assert model.training and all(module.training for module in model.modules())
    assert whole == pytest.approx(split, rel=1e-9)


def test_dropout_acts_only_when_asked_for() -> None:
    def loss(dropout: bool) -> float:
        torch.manual_seed(0)
        model = LlamaActor(config=llama_config(12, attention_dropout=0.5), dropout=True).double()
        return sft(model, [tokens()], dropout=dropout).fit()["sft/loss"]

    torch.manual_seed(0)
    clean = sft(LlamaActor(config=llama_config(12)).double(), [tokens()]).fit()["sft/loss"]
    assert loss(False) == pytest.approx(clean, rel=1e-9)
    assert abs(loss(True) - clean) > 1e-6


def test_checkpointed_layers_give_the_same_gradient_without_dropout() -> None:
    torch.manual_seed(0)
    plain = LlamaActor(config=llama_config(12)).double()
    torch.manual_seed(0)
    saved = LlamaActor(config=llama_config(12, attention_dropout=0.5), checkpoint=True, dropout=True).double()
    sft(plain, [tokens()]).fit()
    sft(saved, [tokens()]).fit()
    assert any(getattr(module, "gradient_checkpointing", False) and module.training for module in saved.modules())
    assert_same(dict(plain.state_dict()), dict(saved.state_dict()))


@pytest.mark.parametrize("portion", PORTIONS)
@pytest.mark.parametrize("loss_fn", ["log_sig", "log_exp"])
def test_the_reward_model_does_not_depend_on_micro_batches(portion: dict[str, int], loss_fn: str) -> None:
    whole, split = reward_model(), reward_model()
    metrics = rm(whole, [comparisons()], loss_fn=loss_fn).fit()
    split_metrics = rm(split, [comparisons()], loss_fn=loss_fn, **portion).fit()
    assert_same(dict(whole.state_dict()), dict(split.state_dict()))
    assert metrics == pytest.approx(split_metrics, rel=1e-6)


@pytest.mark.parametrize(("extra", "side"), [(3, "right"), (0, "left"), (3, "left")])
def test_the_reward_model_does_not_depend_on_padding(extra: int, side: str) -> None:
    one, other = reward_model(), reward_model()
    rm(one, [comparisons()]).fit()
    rm(other, [comparisons(extra, side)]).fit()
    assert_same(dict(one.state_dict()), dict(other.state_dict()))


def test_loss_accuracy_and_distance_are_what_they_say() -> None:
    model, batch = reward_model(), comparisons()
    scores = model(batch.token_ids, batch.attention_mask).detach()
    gap = scores[batch.chosen] - scores[batch.rejected]
    trainer = rm(model, [batch], [batch], lr=0.0, valid_dataset=[batch])
    metrics = trainer.fit()
    assert (
        metrics["reward/accuracy"]
        == metrics["reward/valid_accuracy"]
        == pytest.approx(float((gap > 0).double().mean()))
    )
    assert metrics["reward/eval_distance"] == pytest.approx(float(gap.mean()))
    expected = -torch.nn.functional.logsigmoid(gap - batch.margin).mean()
    assert metrics["reward/loss"] == metrics["reward/eval_loss"] == pytest.approx(float(expected))


def test_a_loss_of_ones_own_is_taken() -> None:
    class Hinge(nn.Module):
        def forward(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
            return (1 - chosen + rejected).clamp(min=0).mean()

    model, batch = reward_model(), comparisons()
    scores = model(batch.token_ids, batch.attention_mask).detach()
    expected = (1 - scores[batch.chosen] + scores[batch.rejected]).clamp(min=0).mean()
    assert rm(model, [batch], loss_fn=Hinge(), micro_batch_size=2).fit()["reward/loss"] == pytest.approx(
        float(expected)
    )


def test_the_seeds_reward_dataset_is_learned() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": f"tell me about the {thing}", "chosen": f" {good} !", "rejected": f" {bad} ."}
            for thing in ("movie", "hotel") for good in ("good", "great") for bad in ("bad", "awful")]  # fmt: skip
    data = RewardDataset(rows, tokenizer, 16)
    torch.manual_seed(0)
    model = LlamaRM(config=llama_config(len(tokenizer)))
    trainer = RewardModelTrainer(model, NaiveStrategy("cpu"), torch.optim.Adam(model.parameters(), lr=0.01), data, data,
                                 4, 4)  # fmt: skip
    metrics = trainer.fit()
    assert trainer.num_steps == 8
    assert metrics["reward/eval_accuracy"] == 1.0 and metrics["reward/eval_distance"] > 1.0


def test_trainers_place_their_model_themselves() -> None:
    """As the older trainers did: a script that does not call prepare() must not train on the wrong device."""

    class Recorder(NaiveStrategy):
        def setup_model(self, model: nn.Module) -> nn.Module:
            placed.append(model)
            return super().setup_model(model)

    placed: list[nn.Module] = []
    model = actor(0)
    SFTTrainer(model, Recorder("cpu"), torch.optim.SGD(model.parameters(), lr=1.0), [tokens()])
    assert placed == [model]


def test_evaluating_a_dataset_leaves_the_random_state_alone() -> None:
    tokenizer = tiny_tokenizer()
    data = SFTDataset([{"prompt": "tell me", "completion": " good !"}] * 3, tokenizer, 16)
    subject = sft(LlamaActor(config=llama_config(len(tokenizer))), data, eval_dataloader=data)
    before = torch.get_rng_state()
    subject.evaluate(subject.eval_sets["eval"])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_makes_no_sense_is_refused() -> None:
    model = actor()
    empty = TokenBatch(tokens().token_ids, tokens().attention_mask, torch.zeros_like(tokens().loss_mask))
    refusals: list[tuple[Any, str]] = [
        (lambda: sft(model, [empty]).fit(), "nothing to learn"),
        (lambda: sft(model, []).fit(), "training data is empty"),
        (lambda: sft(model, [{"ids": 3}]).fit(), "input_ids"),
        (lambda: sft(model, [tokens()], scheduler="cosin"), "scheduler='cosin'"),
        (lambda: sft(model, iter([tokens()]), scheduler="cosine"), "number of batches"),
        (lambda: sft(model, [tokens()], max_epochs=0), "max_epochs=0"),
        (lambda: sft(model, [tokens()]).fit(use_lora=4), "lora_rank=4"),
        (lambda: sft(model, [tokens()]).evaluate([]), "evaluation data is empty"),
        (lambda: rm(reward_model(), [comparisons()], loss_fn="hinge"), "loss_fn='hinge'"),
        (lambda: rm(reward_model(), [tokens()]).fit(), "PreferenceBatch"),
        (lambda: rm(reward_model(), []), "comparisons is empty"),
        (lambda: SFTTrainer(model, NaiveStrategy("cpu"), torch.optim.SGD(deepcopy(model).parameters(), lr=1.0),
                            [tokens()]), "holds no parameter"),
    ]  # fmt: skip
    for attempt, message in refusals:
        with pytest.raises(ValueError, match=message):
            attempt()
