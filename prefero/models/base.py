"""Actor, critic and reward model: a Hugging Face network, a head, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prefero.functional import logprobs as lp
from prefero.functional import masked
from prefero.models.export import read_head_bias, save_folder, save_reward_folder
from prefero.models.frozen import keep_frozen
from prefero.models.generation import action_mask_of, eos_ids, generate, leading_padding_mask
from prefero.models.loading import load_reward_backbone, new_reward_head, resolve
from prefero.models.lora import LoRAModule, below, merged, unmerged
from prefero.models.packed import hidden_states, logits, packs
from prefero.models.trunk import (
    by_length,
    contiguous_input,
    cropped,
    full_precision_head,
    head_is_plain,
    head_width,
    is_bidirectional,
    left_align,
    model_inputs,
    replaced,
    score_hidden,
    trunk_of,
)


class Actor(LoRAModule):
    """A policy: a causal language model (`.model`, Hugging Face's) asked for the log-probabilities of its answers."""

    forward_methods: tuple[str, ...] = (
        "generate",
        "decode",
        "can_pack",
    )  # other ways than `forward` into the network, for strategies that shard it

    def __init__(
        self, model: Any, lora_rank: int = 0, lora_train_bias: str = "none", lora_alpha: float | None = None
    ) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            raise ValueError(f"{type(model).__name__} has no language-model head: an actor needs a ...ForCausalLM")
        super().__init__(model, lora_rank, lora_train_bias, lora_alpha)
        head.register_forward_pre_hook(contiguous_input)
        self._plain_head: bool | None = None

    def forward(
        self,
        sequences: Tensor,
        num_actions: int,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
        action_mask: Tensor | None = None,
    ) -> Any:
        """Log-probabilities [B, A] of the last `num_actions` tokens; with return_entropy, also the entropies [B, A].

        Entropies are for the log: they carry no gradient.
        sequences, attention_mask: [B, S]; without a mask every token is real. action_mask: [B, A]; where it is false
        the output head is not applied and the answer is 0. Logits are divided by `temperature` before the softmax, so
        what is learned is what was sampled. Raises ValueError unless 1 <= num_actions < S.
        """
        logprobs, entropy, _ = self._read(
            sequences, num_actions, attention_mask, temperature, return_entropy, action_mask
        )
        return (logprobs, entropy) if return_entropy else logprobs

    def _read(
        self,
        sequences: Tensor,
        num_actions: int,
        attention_mask: Tensor | None,
        temperature: float,
        with_entropy: bool,
        action_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What `forward` gives, and the hidden states [B, A, D] from which the tokens are predicted."""
        check_num_actions(num_actions, sequences)
        mask = torch.ones_like(sequences[:, -num_actions:]) if action_mask is None else action_mask
        if self._head_is_plain():
            return self._from_hidden(sequences, mask, attention_mask, temperature, with_entropy)
        inputs = model_inputs(self.model, sequences, attention_mask, logits_to_keep=num_actions + 1)
        seen: list[Tensor] = []
        watch = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            with replaced(full_precision_head(self.model)):
                logits = self.model(**inputs).logits[:, -num_actions - 1 :]
        finally:
            watch.remove()
        logprobs = lp.token_logprobs(logits, sequences[:, -num_actions - 1 :], temperature)[:, 1:]
        entropy = masked.fill(lp.entropy(logits[:, :-1].detach(), temperature), mask) if with_entropy else None
        return masked.fill(logprobs, mask), entropy, seen[0][:, -num_actions - 1 : -1]

    def _from_hidden(
        self, sequences: Tensor, mask: Tensor, attention_mask: Tensor | None, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The head on just the positions that predict a token of the mask [B, A], which is often the minority."""
        num_actions = mask.shape[1]
        head = self.model.get_output_embeddings()
        hidden = hidden_states(trunk_of(self.model), sequences, attention_mask)[:, -num_actions - 1 : -1]
        index = mask.reshape(-1).nonzero().squeeze(1)
        logprobs, entropy = lp.selected(
            hidden.flatten(0, 1).index_select(0, index),
            head.weight,
            head.bias,
            sequences[:, -num_actions:].flatten().index_select(0, index),
            temperature,
            with_entropy=with_entropy,
            entropy_gradient=False,
        )
        return _at(mask, logprobs), None if entropy is None else _at(mask, entropy), hidden

    def _head_is_plain(self) -> bool:
        if self._plain_head is None:
            self._plain_head = head_is_plain(self.model)
        return self._plain_head

    def decode(self, **inputs: Any) -> Any:
        """One forward of the Hugging Face model with its own arguments and output, for engines.

        With `texts`, logits [P, V] of packed ones: see `packed.logits`.
        """
        return logits(self.model, **inputs) if "texts" in inputs else self.model(**inputs)

    def can_pack(self) -> bool:
        """Whether the network can read packed texts: see `packed.packs`."""
        return packs(trunk_of(self.model))

    def get_base_model(self) -> Any:
        """The Hugging Face model."""
        return self.model

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        return_action_mask: bool = True,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answers left-padded prompts [B, P]: (sequences [B, S], attention_mask [B, S], action_mask [B, S - P]).

        The action mask is true up to and including the first EOS of each answer; the attention mask is the prompt's
        followed by it. Without an attention_mask a leading run of `pad_token_id` is padding. kwargs: those of
        `models.generation.generate`. With return_action_mask=False the action mask is left out.
        """
        if attention_mask is None:
            attention_mask = leading_padding_mask(input_ids, kwargs.get("pad_token_id"))
        sequences = generate(self.model, input_ids, attention_mask=attention_mask, **kwargs)
        action_mask = action_mask_of(
            sequences[:, input_ids.shape[1] :], eos_ids(self.model, kwargs.get("eos_token_id"))
        )
        full_mask = torch.cat([attention_mask.long(), action_mask.long()], dim=1)
        return (sequences, full_mask, action_mask) if return_action_mask else (sequences, full_mask)

    def to_checkpoint(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Float32 weights with adapters merged, under the names of the plain Hugging Face model."""
        return merged(self.model, below("model.", own))

    def from_checkpoint(self, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a plain Hugging Face model of this architecture, under this module's names."""
        return {f"model.{name}": tensor for name, tensor in unmerged(self.model, below("model.", own), saved).items()}

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: Any = None,
        dtype: torch.dtype | str = torch.float32,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes a plain folder for `AutoModelForCausalLM.from_pretrained`; adapters are merged on a copy.

        state: this module's whole state (`Strategy.whole_state`) where the live one is sharded.
        """
        own = self.state_dict() if state is None else state
        save_folder(self.model, below("model.", own), directory, tokenizer, dtype)


class LM(Actor):
    """A language model to imitate with: the log-probability of every token."""

    def forward(  # type: ignore[override]
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, S] log-probabilities; entry t is that of token t given those before it, entry 0 is 0.

        loss_mask: [B, S]; where it is false the output head is not applied and the answer is 0.
        """
        mask = None if loss_mask is None else loss_mask[:, 1:]
        num_actions = sequences.shape[1] - 1
        logprobs: Tensor = super().forward(sequences, num_actions, attention_mask, temperature, action_mask=mask)
        return torch.nn.functional.pad(logprobs, (1, 0))


class Critic(LoRAModule):
    """A value function: a trunk (`.model`, no language-model head) and a one-output head that starts at zero.

    level "token" (the default) gives one value an action, "sequence" the seed's single number a row: the mean over
    real positions but the last, or over the prompt alone with use_action_mask.
    """

    def __init__(
        self,
        model: Any,
        value_head: nn.Module | None = None,
        lora_rank: int = 0,
        lora_train_bias: str = "none",
        use_action_mask: bool = False,
        level: Literal["token", "sequence"] = "token",
        lora_alpha: float | None = None,
    ) -> None:
        if level not in ("token", "sequence"):
            raise ValueError(f"level={level!r}: choose 'token' or 'sequence'")
        trunk = trunk_of(model)
        if level == "token" and is_bidirectional(trunk.config):
            raise ValueError(
                f"{type(trunk).__name__} sees the whole text, so it has no value per token: level='sequence'"
            )
        super().__init__(trunk, lora_rank, lora_train_bias, lora_alpha)
        self.value_head = zero_head(trunk.config) if value_head is None else check_head(value_head)
        self.use_action_mask = use_action_mask
        self.level = level

    def forward(
        self,
        sequences: Tensor,
        num_actions: int | Tensor | None = None,
        attention_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> Tensor:
        """Values [B, A] of the states in which the last A tokens are chosen; [B] in the sequence mode.

        sequences, attention_mask: [B, S]. num_actions: A, or the action mask [B, A] itself (the seed's second
        argument; also by keyword). Raises ValueError when the token mode is not told A, or A does not fit S.
        """
        actions = action_mask if action_mask is not None else num_actions
        count = actions.shape[1] if isinstance(actions, Tensor) else actions
        if self.level == "sequence":
            return self._sequence_value(sequences, count, attention_mask)
        if count is None:
            raise ValueError("num_actions is missing: a critic with a value per token needs it, or the action_mask")
        check_num_actions(count, sequences)
        hidden = hidden_states(self.model, sequences, attention_mask)
        return score_hidden(self.value_head, hidden[:, -count - 1 : -1])

    def _sequence_value(self, sequences: Tensor, count: int | None, attention_mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(sequences) if attention_mask is None else attention_mask
        end = -1
        if self.use_action_mask and count is not None:
            check_num_actions(count, sequences)
            end = -count
            if is_bidirectional(self.model.config):
                # An encoder's prompt positions see the answer too, unless the answer is not shown.
                sequences, mask, end = sequences[:, :end], mask[:, :end], sequences.shape[1]
        values = score_hidden(self.value_head, hidden_states(self.model, sequences, mask))
        return masked.mean(values[:, :end], mask[:, :end].bool(), dim=1)


class RewardModel(LoRAModule):
    """A judge of whole texts: one number read at the last real token, or an encoder's own summary ("cls").

    model: a trunk, a causal model (its head is dropped) or a `...ForSequenceClassification` of one label (its head is
    kept). value_head: one output; drawn anew without a bias when there is none. The pooling of an encoder with its own
    classification head is "cls" by nature.
    """

    def __init__(
        self,
        model: Any,
        value_head: nn.Module | None = None,
        lora_rank: int = 0,
        lora_train_bias: str = "none",
        pooling: Literal["last", "cls"] = "last",
        lora_alpha: float | None = None,
    ) -> None:
        if pooling not in ("last", "cls"):
            raise ValueError(f"pooling={pooling!r}: choose 'last' or 'cls'")
        own_head = type(model).__name__.endswith("ForSequenceClassification")
        if own_head and model.config.num_labels != 1:
            raise ValueError(f"a reward model has one output, this one has num_labels={model.config.num_labels}")
        score = getattr(model, "score", None) if own_head else None
        if isinstance(score, nn.Linear) and value_head is None:
            value_head = score
        self_scoring = own_head and is_bidirectional(model.config) and value_head is None
        network = model if self_scoring else trunk_of(model)
        super().__init__(network, lora_rank, lora_train_bias, lora_alpha)
        self.value_head: nn.Module | None = None
        if self_scoring:
            self.pooling = "cls"
            unfreeze_head(self.model)
        else:
            self.pooling = pooling
            self.value_head = new_reward_head(network.config) if value_head is None else check_head(value_head)

    def forward(self, sequences: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Rewards [B] of texts [B, S], padded on any side. Raises ValueError when a row has no real token."""
        mask = torch.ones_like(sequences) if attention_mask is None else attention_mask
        if not bool(mask.bool().any(dim=1).all()):
            raise ValueError("a text without any real token has no reward: drop empty texts, or check attention_mask")
        # Sharded weights are gathered anew at every forward, and every process must forward equally often.
        parts = [torch.arange(len(mask), device=mask.device)] if isinstance(self, FSDPModule) else by_length(mask)
        scores = torch.cat([self._score(*cropped(sequences[rows], mask[rows])) for rows in parts])
        return scores[torch.cat(parts).argsort()]

    def _score(self, sequences: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            sequences, mask = left_align(sequences, mask)
        if self.value_head is None:
            logits: Tensor = self.model(**model_inputs(self.model, sequences, mask)).logits
            return logits[:, 0].float()
        hidden = hidden_states(self.model, sequences, mask)
        if self.pooling == "cls":
            return score_hidden(self.value_head, hidden[:, 0])
        last = sequences.shape[1] - 1 - mask.long().flip(1).argmax(dim=1)
        return score_hidden(self.value_head, hidden[torch.arange(len(last), device=last.device), last])

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: Any = None,
        dtype: torch.dtype | str = torch.float32,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes a folder for `RewardModel.from_pretrained` and `AutoModelForSequenceClassification.from_pretrained`.

        state: as for an actor. Adapters are merged on a copy. See `export.save_reward_folder` for a head with a bias.
        Raises ValueError when transformers has no architecture that holds this reward model.
        """
        own = self.state_dict() if state is None else state
        if self.value_head is None:
            save_folder(self.model, below("model.", own), directory, tokenizer, dtype)
        elif self.pooling == "cls":
            raise ValueError("an encoder with a foreign head has no Hugging Face folder: use strategy.save_model")
        else:
            save_reward_folder(self.model, self.value_head, own, directory, tokenizer, dtype)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> RewardModel:
        """Reads what `save_pretrained` wrote, or any folder that can hold a reward model (a missing head is drawn).

        options: those of `loading.LoadOptions`; with frozen "bf16" or "int8" all its linear layers are kept so, below
        the head, and do not learn.
        """
        model = RewardModel(load_reward_backbone(directory, **options))
        keep_frozen(model, options.get("frozen", "fp32"), all_layers=True)
        model.restore_bias(directory)
        return model

    def restore_bias(self, directory: str | Path) -> None:
        """Gives the head the bias that `save_pretrained` had to put beside the weights, if there is one."""
        bias = read_head_bias(resolve(directory))
        if bias is not None:
            assert isinstance(self.value_head, nn.Linear)
            weight = self.value_head.weight
            self.value_head.bias = nn.Parameter(bias.to(weight.dtype) if weight.is_meta else bias.to(weight))


def _at(mask: Tensor, numbers: Tensor) -> Tensor:
    """A tensor of the mask's shape with `numbers` in order where it is true and zeros elsewhere."""
    return numbers.new_zeros(mask.shape).masked_scatter(mask.bool(), numbers)


def check_num_actions(num_actions: int, sequences: Tensor) -> None:
    """Raises ValueError unless every action has a token before it."""
    if not 1 <= num_actions < sequences.shape[1]:
        raise ValueError(
            f"num_actions={num_actions} must be between 1 and {sequences.shape[1] - 1}, one less than the row"
        )


def check_head(head: nn.Module) -> nn.Module:
    """The head itself; raises ValueError when it has more than one output."""
    outputs = getattr(head, "out_features", 1)
    if outputs != 1:
        raise ValueError(f"the value head must have out_features=1, not {outputs}")
    return head


def zero_head(config: Any) -> nn.Linear:
    """A critic's head: every value is zero at first, so the first advantages are the rewards themselves."""
    head = nn.Linear(head_width(config), 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def unfreeze_head(model: Any) -> None:
    """Lets the classification head beside the trunk learn where adapters have frozen everything."""
    for name, part in model.named_children():
        if name != model.base_model_prefix:
            part.requires_grad_(True)
