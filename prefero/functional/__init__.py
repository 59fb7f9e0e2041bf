"""The formulas: tensors in, tensors out; they import torch and nothing else.

`masked` means and whitening over the tokens that count, `logprobs` from logits or hidden states, `kl` estimators and
the penalty in the reward, `advantages`, `policy` and `value` losses of PPO and its kin, `reward` model losses,
`preference` losses (DPO and its kin), `supervised` cross-entropy, and the losses of `ilql`. Per-token tensors are
[B, T] and entry t speaks of the token at t. Whatever stands in a masked-out slot (NaN, infinity, 1e30) changes neither
a value nor a gradient.
"""
