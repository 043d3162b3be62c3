"""Random numbers as pure functions of their names: no generator, no state, no dependence on who asks.

The draw named (seed, epoch, sample, …) is the same on every machine, in every worker and after every resume, and
many draws are made in one numpy call. The mixer is splitmix64's finaliser (Steele, Lea and Flood 2014).
"""

import numpy as np

Names = int | np.ndarray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def bits(*names: Names) -> np.ndarray:
    """64 random bits for each combination of `names`; arrays among them broadcast."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(name) for name in names)), np.uint64)
    with np.errstate(over="ignore"):
        for name in names:
            state = _mix(state + _GOLDEN + np.asarray(name).astype(np.uint64))
    return state


def uniform(*names: Names) -> np.ndarray:
    """Floats in [0, 1) for each combination of `names`."""
    return (bits(*names) >> np.uint64(11)) * 2.0**-53


def permutation(length: int, *names: int) -> np.ndarray:
    """A random order of 0 … length - 1."""
    return np.argsort(bits(*names, np.arange(length)), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
