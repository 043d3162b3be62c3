"""Stateless (counter-based) random numbers: each is a pure function of a key of integers, as in jax.random.

The number with key (seed, epoch, sample, …) is the same on every machine, in every worker and after every resume.
Arrays of keys are hashed in one numpy call, with the finaliser of splitmix64 (Steele, Lea and Flood 2014).
"""

import numpy as np

Key = int | np.ndarray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def bits(*key: Key) -> np.ndarray:
    """64 random bits per key. The parts of the key are integers, or arrays, which broadcast."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(part) for part in key)), np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state + _GOLDEN + np.asarray(part).astype(np.uint64))
    return state


def uniform(*key: Key) -> np.ndarray:
    """A random float in [0, 1) per key."""
    return (bits(*key) >> np.uint64(11)) * 2.0**-53


def permutation(length: int, *key: int) -> np.ndarray:
    """A random permutation of 0 … length - 1."""
    return np.argsort(bits(*key, np.arange(length)), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
