"""float16's loss scale: what the loss is multiplied by, so that its small gradients do not vanish."""

from dataclasses import dataclass

# torch.amp.GradScaler's own. Powers of two, so that scaling rounds nothing.
_START, _GROWTH, _STEPS_TO_GROW, _LEAST = 2.0**16, 2.0, 2000, 1.0


@dataclass
class LossScale:
    """Halved where gradients overflow, whose step is then skipped; doubled after 2,000 steps without."""

    value: float = _START
    good_steps: int = 0
    """Since it last changed."""
    skipped: int = 0
    """Steps of the whole run."""

    def update(self, is_finite: bool) -> None:
        """After each step, with whether its gradients were finite."""
        if not is_finite:
            self.value /= _GROWTH
            self.good_steps = 0
            self.skipped += 1
            return
        self.good_steps += 1
        if self.good_steps == _STEPS_TO_GROW:
            self.value *= _GROWTH
            self.good_steps = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow without any scale: it is not the precision's fault."""
        return self.value < _LEAST
