"""The seed's path to the helpers of the replay buffers."""

from prefero.rollout.buffer import BufferItem, make_experience_batch, split_experience_batch, zero_pad_sequences

__all__ = ["BufferItem", "make_experience_batch", "split_experience_batch", "zero_pad_sequences"]
