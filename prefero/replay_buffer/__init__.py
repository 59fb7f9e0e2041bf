"""The seed's path to the replay buffers."""

from prefero.rollout.buffer import NaiveReplayBuffer, ReplayBuffer

__all__ = ["NaiveReplayBuffer", "ReplayBuffer"]
