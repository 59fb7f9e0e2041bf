"""Loss scaling for fp16: gradients too small for half precision are kept alive by a large factor on the loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """A factor that doubles while steps succeed and halves when one overflows (arXiv 1710.03740, 3.2).

    growth_interval: good steps in a row before it grows. hysteresis: bad steps, counted since the last growth, before
    it shrinks. The names and defaults are those of the older system. Raises ValueError for numbers that make no sense.
    """

    initial_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 1000
    hysteresis: int = 2
    min_scale: float = 1.0
    max_scale: float = 2.0**32

    def __post_init__(self) -> None:
        checks = {
            "initial_scale": (
                self.min_scale <= self.initial_scale <= self.max_scale,
                "between min_scale and max_scale",
            ),
            "growth_factor": (self.growth_factor >= 1.0, "1 or more"),
            "backoff_factor": (0.0 < self.backoff_factor <= 1.0, "in (0, 1]"),
            "growth_interval": (self.growth_interval >= 1, "1 or more"),
            "hysteresis": (self.hysteresis >= 1, "1 or more"),
            "min_scale": (self.min_scale > 0.0, "above 0"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")
        self.scale = float(self.initial_scale)
        self.good_steps = 0
        self.patience = self.hysteresis

    @property
    def may_shrink(self) -> bool:
        """Whether a smaller factor could still make gradients finite that were not."""
        return self.scale > self.min_scale

    def update(self, finite: bool) -> None:
        """After every step: whether its gradients were finite."""
        if not finite:
            self.good_steps = 0
            self.patience -= 1
            if self.patience <= 0:
                self.scale = max(self.scale * self.backoff_factor, self.min_scale)
            return
        self.good_steps += 1
        if self.good_steps % self.growth_interval == 0:
            self.scale = min(self.scale * self.growth_factor, self.max_scale)
            self.patience = self.hysteresis

    def state_dict(self) -> dict[str, float]:
        """What it has learned so far."""
        return {"scale": self.scale, "good_steps": self.good_steps, "patience": self.patience}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from what `state_dict` gave."""
        self.scale, self.good_steps, self.patience = state["scale"], int(state["good_steps"]), int(state["patience"])
