"""Trainers on preferences: the same step however it is cut, losses that are what they say, references, refusals."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import gpt2_config, llama_config, tiny_tokenizer
from torch import Tensor

from prefero.data import Comparison, EncodedPair, Example, collate_labelled, collate_pairs, encode_pair, with_unrelated
from prefero.functional import preference
from prefero.models.base import Actor
from prefero.models.gpt import GPTActor
from prefero.models.llama import LlamaActor, LlamaLM
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer, SFTTrainer, SimPOTrainer
from prefero.trainer.reference import reference_logprobs
from prefero.trainer.split import MicroBatchLimit
from prefero.types import LabelledBatch, PairBatch, ReferencedPairBatch

VOCAB = 23
PORTIONS = [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 30}]


def text(prompt: Sequence[int], completion: Sequence[int]) -> Example:
    return Example((*prompt, *completion), (*([0] * len(prompt)), *([1] * len(completion))))


PROMPTS = [(3, 4, 5, 6), (7, 8), (9, 10, 11, 4, 5)]
ANSWERS = [[(12, 2), (13, 14, 15, 2), (16, 17, 2)], [(12, 13, 2), (2,)], [(18, 19, 20, 21, 2), (12, 22, 2)]]


def pairs() -> list[Any]:
    return [
        EncodedPair(f"{p}{a}{b}", text(prompt, answers[a]), text(prompt, answers[b]))
        for p, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
        for a in range(len(answers))
        for b in range(len(answers))
        if a != b
    ][:7]


def labelled() -> list[Any]:
    rows = [(f"{p}{a}", text(prompt, answer), a % 2 == p % 2)
            for p, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
            for a, answer in enumerate(answers)]  # fmt: skip
    return with_unrelated(rows)


def actor(seed: int = 0, lora_rank: int = 0) -> Actor:
    torch.manual_seed(seed)
    return GPTActor(config=gpt2_config(VOCAB), lora_rank=lora_rank).double()


def moved(model: Actor, by: float = 0.05) -> Actor:
    """Another model like this one."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return other


TRAINERS: dict[str, Callable[..., Any]] = {
    "sigmoid": DPOTrainer,
    "cdpo": lambda *a, **k: DPOTrainer(*a, kind="cdpo", label_smoothing=0.1, **k),
    "robust": lambda *a, **k: DPOTrainer(*a, kind="robust", label_smoothing=0.1, **k),
    "ipo": lambda *a, **k: DPOTrainer(*a, kind="ipo", **k),
    "ipo_mean": lambda *a, **k: DPOTrainer(*a, kind="ipo_mean", **k),
    "apo_down": lambda *a, **k: DPOTrainer(*a, kind="apo_down", **k),
    "orpo": ORPOTrainer,
    "orpo-text": lambda *a, **k: ORPOTrainer(*a, nll="text", **k),
    "simpo": SimPOTrainer,
    "cpo": CPOTrainer,
    "kto": lambda *a, **k: KTOTrainer(*a, undesirable_weight=1.3, **k),
}
REFERENCED = ("sigmoid", "cdpo", "robust", "ipo", "ipo_mean", "apo_down", "kto")


def trainer(name: str, model: Actor, data: Any = None, held_out: Any = None, lr: float = 0.1, **how: Any) -> Any:
    """One that takes plain steps, with a reference that is not what it starts from."""
    if name in REFERENCED and "reference" not in how:
        how["reference"] = moved(actor())
    if data is None:
        data = [collate_labelled(labelled())] if name == "kto" else [collate_pairs(pairs())]
    how = {"scheduler": "constant", **how}
    return TRAINERS[name](
        model, NaiveStrategy("cpu"), torch.optim.SGD(model.parameters(), lr=lr), data, held_out, **how
    )


def assert_same(one: Actor, other: Actor, atol: float = 1e-10) -> None:
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=atol, msg=name)


@pytest.mark.parametrize("portion", PORTIONS, ids=str)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_does_not_depend_on_micro_batches(name: str, portion: dict[str, int]) -> None:
    whole, split = actor(), actor()
    metrics = trainer(name, whole, max_epochs=2).fit()
    split_metrics = trainer(name, split, max_epochs=2, **portion).fit()
    assert_same(whole, split)
    assert metrics == pytest.approx(split_metrics, rel=1e-8, abs=1e-12)
    assert not torch.equal(whole.state_dict()["model.lm_head.weight"], actor().state_dict()["model.lm_head.weight"])


@pytest.mark.parametrize("name", ["sigmoid", "orpo-text", "simpo", "kto"])
def test_padding_and_what_stands_in_it_do_not_matter(name: str) -> None:
    one, other = actor(), actor()
    batch: Any = collate_labelled(labelled()) if name == "kto" else collate_pairs(pairs())

    def widened(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([torch.where(mask.bool(), ids, 5), torch.full_like(ids[:, :3], 9)], 1)

    def longer(mask: Tensor) -> Tensor:
        return torch.nn.functional.pad(mask, (0, 3))

    fields = ("", "unrelated_") if name == "kto" else ("",)
    wide = replace(
        batch,
        **{(f"{f}ids" if f else "token_ids"): widened(vars(batch)[f"{f}ids" if f else "token_ids"],
                                                       vars(batch)[f"{f}attention_mask"]) for f in fields},
        **{f"{f}{kind}": longer(vars(batch)[f"{f}{kind}"]) for f in fields for kind in ("attention_mask", "loss_mask")},
    )  # fmt: skip
    trainer(name, one, [batch]).fit()
    trainer(name, other, [wide]).fit()
    assert_same(one, other)


def summed(model: Actor, example: Example) -> tuple[float, int]:
    """The plain way: the model's own logits, one text at a time."""
    ids = torch.tensor([example.token_ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(model.model(ids).logits[0, :-1], -1)
    own = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
    mask = torch.tensor(example.loss_mask[1:]).bool()
    return float(own[mask].sum()), int(mask.sum())


def test_losses_and_metrics_are_what_they_say() -> None:
    model, reference, rows = actor(), moved(actor()), pairs()
    held = [collate_pairs(rows)]
    found = trainer("sigmoid", model, held, held, lr=0.0, reference=reference, beta=0.3).fit()
    ours = [[summed(model, side)[0] for side in (row.chosen, row.rejected)] for row in rows]
    theirs = [[summed(reference, side)[0] for side in (row.chosen, row.rejected)] for row in rows]
    gains = 0.3 * (torch.tensor(ours) - torch.tensor(theirs)).double()
    expected = {
        "loss": float(-torch.nn.functional.logsigmoid(gains[:, 0] - gains[:, 1]).mean()),
        "accuracy": float((gains[:, 0] > gains[:, 1]).double().mean()),
        "margin": float((gains[:, 0] - gains[:, 1]).mean()),
        "chosen_reward": float(gains[:, 0].mean()),
        "rejected_reward": float(gains[:, 1].mean()),
        "chosen_logprob": sum(summed(model, r.chosen)[0] / summed(model, r.chosen)[1] for r in rows) / len(rows),
    }
    for key, number in expected.items():
        assert found[f"dpo/{key}"] == pytest.approx(number, rel=1e-4, abs=1e-6), key
        assert found[f"dpo/eval_{key}"] == pytest.approx(number, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("whole_text", [False, True])
def test_orpo_imitates_what_it_is_told_to(whole_text: bool) -> None:
    model, rows = actor(), pairs()
    found = trainer("orpo-text" if whole_text else "orpo", model, [collate_pairs(rows)], lr=0.0).fit()
    means, nlls = [], []
    for row in rows:
        means.append([summed(model, side)[0] / summed(model, side)[1] for side in (row.chosen, row.rejected)])
        imitated = Example(row.chosen.token_ids, (1,) * len(row.chosen.token_ids)) if whole_text else row.chosen
        total, count = summed(model, imitated)
        nlls.append(-total / count)
    odds = preference.orpo(*torch.tensor(means).double().unbind(1), 0.1)
    assert found["orpo/nll"] == pytest.approx(sum(nlls) / len(rows))
    assert found["orpo/loss"] == pytest.approx(sum(nlls) / len(rows) + float(odds.mean()))


def test_kto_counts_from_the_reference_point_of_the_whole_step() -> None:
    model, reference, rows = moved(actor(), 0.2), actor(), labelled()
    batch = collate_labelled(rows)
    found = trainer("kto", model, [batch], [batch], lr=0.0, reference=reference, micro_batch_size=1).fit()
    apart = [summed(model, row.unrelated)[0] - summed(reference, row.unrelated)[0] for row in rows]
    z0 = max(0.0, sum(apart) / len(apart))
    assert found["kto/z0"] == found["kto/eval_z0"] == pytest.approx(z0, rel=1e-6)
    gains = [summed(model, row.answer)[0] - summed(reference, row.answer)[0] for row in rows]
    wanted = torch.tensor([row.desirable for row in rows])
    signs = torch.where(wanted, 1.0, -1.0).double()
    weights = torch.where(wanted, 1.0, 1.3).double()
    losses = weights * (1 - torch.sigmoid(signs * 0.1 * (torch.tensor(gains).double() - z0)))
    assert found["kto/loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    rewards = 0.1 * torch.tensor(gains).double()
    assert found["kto/desirable_reward"] == pytest.approx(float(rewards[wanted].mean()), rel=1e-6)
    assert found["kto/eval_undesirable_reward"] == pytest.approx(float(rewards[~wanted].mean()), rel=1e-6)
    assert found["kto/margin"] == pytest.approx(float(rewards[wanted].mean() - rewards[~wanted].mean()), rel=1e-6)
    assert found["kto/desirable"] == pytest.approx(float(wanted.double().mean()))


def test_a_positive_reference_point_is_met() -> None:
    """The case above holds whether or not z0 is clamped; here it is above 0."""
    texts = [row.unrelated for row in labelled()]
    model, batch = actor(), collate_labelled(labelled())
    ids = type(batch)(**vars(batch))
    sft = SFTTrainer(model, NaiveStrategy("cpu"), torch.optim.SGD(model.parameters(), lr=0.2),
                     [{"input_ids": ids.unrelated_ids, "attention_mask": ids.unrelated_attention_mask}] * 3,
                     max_epochs=1, scheduler="constant")  # fmt: skip
    sft.fit()
    z0 = sum(summed(model, t)[0] - summed(actor(), t)[0] for t in texts) / len(texts)
    assert z0 > 1.0
    whole, split = deepcopy(model), deepcopy(model)
    found = trainer("kto", whole, [batch], reference=actor(), max_epochs=1).fit()
    assert found["kto/z0"] == pytest.approx(z0, rel=1e-6)
    trainer("kto", split, [batch], reference=actor(), max_epochs=1, micro_batch_size=1).fit()
    assert_same(whole, split)


@pytest.mark.parametrize("name", REFERENCED)
def test_references_known_beforehand_are_those_asked_in_every_step(name: str) -> None:
    strategy, reference = NaiveStrategy("cpu"), moved(actor())
    asked, known = actor(), actor()
    rows = labelled() if name == "kto" else pairs()
    sides = ("answer", "unrelated") if name == "kto" else ("chosen", "rejected")
    table = reference_logprobs(reference, [getattr(row, s) for row in rows for s in sides], strategy,
                               MicroBatchLimit(2))  # fmt: skip
    for example, number in table.items():
        assert number == pytest.approx(summed(reference, example)[0], rel=1e-6)
    collate: Any = collate_labelled if name == "kto" else collate_pairs
    trainer(name, asked, [collate(rows)], reference=reference).fit()
    trainer(name, known, [collate(rows, references=table)], reference=None, micro_batch_size=2).fit()
    assert_same(asked, known, atol=1e-6)  # what is kept is kept in float32


@pytest.mark.parametrize("name", ["sigmoid", "ipo_mean", "kto"])
def test_adapters_switched_off_are_the_reference(name: str) -> None:
    def adapted() -> Actor:
        torch.manual_seed(0)
        return GPTActor(config=gpt2_config(VOCAB), lora_rank=2).double()

    own, separate, before = adapted(), adapted(), adapted()
    metrics = trainer(name, own, reference=None, max_epochs=3, lr=1.0).fit()
    assert metrics == pytest.approx(trainer(name, separate, reference=before, max_epochs=3, lr=1.0).fit(), rel=1e-9)
    assert_same(own, separate)
    assert metrics["actor/gradient_norm_max"] > 0
    table = reference_logprobs(own, [row.chosen for row in pairs()], NaiveStrategy("cpu"))
    base = reference_logprobs(before, [row.chosen for row in pairs()], NaiveStrategy("cpu"))
    assert table == pytest.approx(base, rel=1e-9)


def test_prompts_are_read_once_and_the_reference_without_dropout() -> None:
    torch.manual_seed(0)
    model = LlamaActor(config=llama_config(VOCAB, attention_dropout=0.5), dropout=True)
    strategy, texts = NaiveStrategy("cpu"), [side for row in pairs() for side in (row.chosen, row.rejected)]
    seen: list[int] = []
    model.model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    model.train()
    first = reference_logprobs(model, texts, strategy)
    assert model.training and reference_logprobs(model, texts, strategy) == first
    distinct = {t.token_ids[:n] for t in texts for n in range(1, len(t.token_ids) + 1)}
    assert seen[-1] == len(distinct)
    seen.clear()
    trainer("simpo", model, [collate_pairs(pairs())]).fit()
    assert seen == [len(distinct)]


def test_rows_are_shuffled_into_batches_and_language_models_are_taken() -> None:
    tokenizer = tiny_tokenizer()
    rows = [encode_pair(tokenizer, Comparison(f"{i}{a}", f"tell me about the {w}", f" {a} !", f" {b} ."))
            for i, w in enumerate(("movie", "hotel")) for a in ("good", "great") for b in ("bad", "awful")]  # fmt: skip
    torch.manual_seed(0)
    model = LlamaLM(config=llama_config(len(tokenizer)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    training = SimPOTrainer(model, NaiveStrategy("cpu"), optimizer, rows, rows, 4, 8, eval_interval=3)
    metrics = training.fit()
    assert training.num_steps == 16
    assert metrics["simpo/eval_accuracy"] == 1.0 and metrics["simpo/eval_margin"] > 1.0


def test_what_makes_no_sense_is_refused() -> None:
    model, batch, rows = actor(), collate_pairs(pairs()), labelled()
    equal = replace(batch, rejected=batch.chosen.clone())
    twice = PairBatch(batch.token_ids[[0, 0]], batch.attention_mask[[0, 0]], batch.loss_mask[[0, 0]], torch.tensor([0]),
                      torch.tensor([1]), torch.tensor([True]))  # fmt: skip
    silent = replace(batch, loss_mask=batch.loss_mask * (torch.arange(len(batch.loss_mask)) != 2)[:, None])
    no_answer: LabelledBatch = replace(collate_labelled(rows), unrelated_loss_mask=torch.zeros(len(rows), 9).long())
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: trainer("sigmoid", model, reference=None).fit(), "the reference is missing: give a reference model"),
        (lambda: trainer("kto", model, reference=None).fit(), "the reference is missing"),
        (lambda: trainer("simpo", model, [equal]).fit(), "pair 0 of a batch has the same text as chosen and"),
        (lambda: trainer("simpo", model, [twice]).fit(), "the same text as chosen and as rejected"),
        (lambda: trainer("orpo", model, [silent]).fit(), "a completion has no token"),
        (lambda: trainer("kto", model, [no_answer]).fit(), "a completion has no token"),
        (lambda: trainer("simpo", model, [rows]).fit(), "PairBatch objects or as EncodedPair rows; got list"),
        (lambda: trainer("kto", model, [batch]).fit(), "LabelledBatch objects or as EncodedLabel rows; got PairBatch"),
        (lambda: trainer("simpo", model, []), "dataset of preferences is empty"),
        (lambda: trainer("simpo", model, beta=0.0), "beta=0.0 must be positive"),
        (lambda: trainer("simpo", model, gamma=-1.0), "gamma=-1.0"),
        (lambda: trainer("cpo", model, nll_coef=-1.0), "nll_coef=-1.0"),
        (lambda: trainer("orpo", model, nll="answer"), "nll='answer' is unknown: use 'completion' or 'text'"),
        (lambda: trainer("kto", model, beta=-1.0), "beta=-1.0"),
        (lambda: trainer("kto", model, desirable_weight=-1.0), "desirable_weight=-1.0"),
        (lambda: trainer("sigmoid", model, kind="sigmoyd"), "kind='sigmoyd' is unknown"),
        (lambda: trainer("sigmoid", model, label_smoothing=0.7), "label_smoothing=0.7"),
        (lambda: trainer("simpo", model).fit(use_lora=4), "lora_rank=4"),
        (lambda: reference_logprobs(model, [Example((3, 4), (0, 0))], NaiveStrategy("cpu")), "no completion token"),
    ]
    for attempt, message in refusals:
        with pytest.raises(ValueError, match=message):
            attempt()
    assert isinstance(collate_pairs(pairs(), references={t: 0.0 for r in pairs() for t in (r.chosen, r.rejected)}),
                      ReferencedPairBatch)  # fmt: skip
