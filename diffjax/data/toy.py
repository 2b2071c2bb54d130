"""Two-dimensional toy data sets, float32 in [-1, 1], whose samples can be checked by eye."""

from collections.abc import Callable

import numpy as np

from .examples import Source

Toy = Callable[[np.random.Generator, int], np.ndarray]


def two_moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two interleaved half circles, `[n, 2]`, with noise of standard deviation 0.03."""
    angle = np.pi * rng.random(n)
    upper = rng.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return _finish(rng, np.stack([x, y], -1) / 1.75, 0.03)


def checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """The dark squares of a 4x4 board, `[n, 2]`."""
    x = rng.integers(0, 4, n)
    y = 2 * rng.integers(0, 2, n) + x % 2
    corner = np.stack([x, y], -1)
    return _finish(rng, (corner + rng.random((n, 2))) / 2 - 1, 0.0)


def swiss_roll(rng: np.random.Generator, n: int) -> np.ndarray:
    """A spiral of one and a half turns, `[n, 2]`, with noise of standard deviation 0.02."""
    turn = 1.5 * np.pi * (1 + 2 * rng.random(n))
    spiral = turn[:, None] * np.stack([np.cos(turn), np.sin(turn)], -1)
    return _finish(rng, spiral / (1.1 * 4.5 * np.pi), 0.02)


def circles(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two concentric circles, `[n, 2]`, with noise of standard deviation 0.02."""
    angle = 2 * np.pi * rng.random(n)
    radius = np.where(rng.random(n) < 0.5, 0.9, 0.45)
    ring = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return _finish(rng, ring, 0.02)


def split(make: Toy, n_train: int = 16384, n_test: int = 2048) -> Callable[[], tuple]:
    """Make a reader of a toy data set, which returns the same points every time."""

    def load():
        x = make(np.random.default_rng(0), n_train + n_test)
        return (x[:n_train], None), (x[n_train:], None)

    return load


def _finish(rng, x, noise):
    x = x + noise * rng.standard_normal(x.shape)
    return np.clip(x, -1, 1).astype(np.float32)


TOYS: dict[str, Source] = {
    "two_moons": Source(split(two_moons), dtype=np.float32),
    "checkerboard": Source(split(checkerboard), dtype=np.float32),
    "swiss_roll": Source(split(swiss_roll), dtype=np.float32),
    "circles": Source(split(circles), dtype=np.float32),
}
"""The two-dimensional sets, by name."""
