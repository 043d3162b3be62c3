"""Dynamic loss scaling for fp16, as in torch.amp.GradScaler."""

from dataclasses import dataclass

# GradScaler's defaults. Powers of two, so that scaling is exact.
_INITIAL, _FACTOR, _GROWTH_INTERVAL, _MINIMUM = 2.0**16, 2.0, 2000, 1.0


@dataclass
class LossScale:
    """The factor that the loss is multiplied by. Halved when gradients overflow, doubled after 2,000 steps without."""

    value: float = _INITIAL
    good_steps: int = 0
    """Steps since the value last changed."""
    skipped: int = 0
    """Steps of the whole run that were skipped because gradients overflowed."""

    def update(self, is_finite: bool) -> None:
        """Called after each step, with whether its gradients were finite."""
        if not is_finite:
            self.value /= _FACTOR
            self.good_steps = 0
            self.skipped += 1
            return
        self.good_steps += 1
        if self.good_steps == _GROWTH_INTERVAL:
            self.value *= _FACTOR
            self.good_steps = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow even without scaling, so that fp16 is not the cause."""
        return self.value < _MINIMUM
