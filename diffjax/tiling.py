r"""Images of any size by a denoiser of small windows, whose estimates are blended where they meet.

With weights w_i that add up to one at every pixel,

    x_0(x_t) = sum_i w_i x_0(window i of x_t),    and likewise eps,

so that x_t = alpha x_0 + sigma eps still holds (Bar-Tal et al. 2023, "MultiDiffusion"). Windows are
blended in every evaluation, so that all of them are drawn together, by any sampler, guidance or
inverse problem.

An estimate does not use what lies outside of its window. The weights are small near the edges of a
window, so that the result is close to the whole image's own denoiser if pixels are correlated over
less than about half of an overlap (`tests/test_tiling.py` has numbers); what is correlated over
more than a window is not drawn to fit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from .denoisers import bound_cond, is_flow_map, known_schedule, predict, with_schedule
from .types import Array, Cond, Denoiser, whole

Position = Float[Array, "2"]
"""Where a window is, (down, right): from -1 at the first edge of the image to 1 at the last."""


def position_of(corner: Int[Array, "2"], room: np.ndarray) -> Position:
    """The position of a window, (down, right) `[2]`, from -1 to 1.

    Args:
      corner: the first row and column of the window, `[2]`, from 0 to `room`.
      room: the height and width of the image minus those of the window, `[2]`. Along a side where
        it is 0, the position is 0.

    >>> position_of(jnp.array([0, 6]), np.array([0, 8]))
    Array([0. , 0.5], dtype=float32)
    """
    return jnp.where(room > 0, 2 * corner / np.maximum(room, 1) - 1, 0)


def tiled(
    denoise: Denoiser,
    size: int | tuple[int, int],
    overlap: int,
    tell: Callable[[Cond, Position], Cond] | None = None,
) -> Denoiser:
    """The denoiser of images that are larger than those of a given denoiser.

    The image is covered by windows at even distances, which overlap by at least `overlap` pixels.
    The weight of a window rises as sin^2 over this many pixels, from edges at which it has
    neighbours. Windows are denoised one after another; memory grows with the image, not with the
    network's activations for it.

    Args:
      denoise: a denoiser, or a flow map, of images `[batch, *size, channels]`, of any channels.
        Arrays of its `cond` with four axes are images, and are cut as x_t is: those of another
        size, such as the small images of super-resolution, in proportion.
      size: sides of a window, one number if they are equal.
      overlap: by how many pixels neighbours overlap, at least 1 and less than `size`. Along a side
        that is as long as the window there is one window, and no overlap.
      tell: (cond, `Position` of a window) -> the cond of this window; None: all have the same.

    Raises:
      ValueError: if `overlap` is out of range; when called, if x_t are no images, or smaller than a
        window, or if an image in `cond` cannot be cut in proportion.

    >>> import diffjax
    >>> schedule = diffjax.cosine()
    >>> data = diffjax.oracles.gaussian(schedule, jnp.zeros(8 * 8), 1.0)  # of windows of 8 x 8
    >>> window = lambda x_t, t, cond=None: jax.tree.map(
    ...     lambda x: x.reshape(x_t.shape), data(x_t.reshape(len(x_t), -1), t))
    >>> tiled(window, 8, overlap=4)(jnp.ones((1, 13, 20, 1)), 0.5).x_0.shape
    (1, 13, 20, 1)
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if not (all(map(whole, sides)) and whole(overlap) and overlap < max(sides)):
        raise ValueError(f"{size=}, {overlap=}: need 1 <= overlap < size, or there are seams")

    def of_image(x_t, t, cond=None, s=None):
        cond = bound_cond(denoise) if cond is None else cond
        if x_t.ndim != 4:
            raise ValueError(f"{x_t.shape}: need images [batch, height, width, channels]")
        rows, columns = (cover(*each, overlap) for each in zip(x_t.shape[1:3], sides, strict=True))
        pairs = [
            ((top, left), np.outer(down, right))
            for top, down in zip(*rows, strict=True)
            for left, right in zip(*columns, strict=True)
        ]
        corners, weights = (np.stack(each) for each in zip(*pairs, strict=True))
        around, edges = np.array(x_t.shape[1:3]), np.array([*corners, sides])

        def cut(x, corner):
            has = np.array(x.shape[1:3])
            if (edges * has % around).any():
                raise ValueError(
                    f"an image of {x.shape[1:3]} in cond cannot be cut as one of {x_t.shape[1:3]} "
                    f"in windows of {sides} at {corners.tolist()}: choose another overlap"
                )
            start = (0, *(corner * has // around), 0)
            return jax.lax.dynamic_slice(x, start, (len(x), *(sides * has // around), x.shape[3]))

        def part(corner, weight):
            given = jax.tree.map(lambda c: cut(c, corner) if jnp.ndim(c) == 4 else c, cond)
            if tell is not None:
                given = tell(given, position_of(corner, around - sides))
            found = predict(denoise, cut(x_t, corner), t, given, s)
            return jax.tree.map(lambda x: weight[None, :, :, None].astype(x.dtype) * x, found)

        def add(parts):
            def one(total, place):
                corner, x = place
                start = (0, corner[0], corner[1], 0)
                return jax.lax.dynamic_update_slice(total, cut(total, corner) + x, start), None

            zero = jnp.zeros((*x_t.shape[:3], parts.shape[-1]), parts.dtype)
            return jax.lax.scan(one, zero, (corners, parts))[0]

        parts = jax.lax.map(lambda each: part(*each), (jnp.asarray(corners), jnp.asarray(weights)))
        return jax.tree.map(add, parts)

    return with_schedule(known_schedule(denoise), of_image, is_flow_map(denoise))


def cover(length: int, size: int, overlap: int) -> tuple[np.ndarray, np.ndarray]:
    """Where windows along one side start, `[n]`, and their weights, `[n, size]`.

    The weights of the windows over a pixel add up to 1.

    Raises:
      ValueError: unless such windows cover the side.

    >>> starts, weights = cover(10, 4, overlap=2)
    >>> starts, weights[0].round(2)
    (array([0, 2, 4, 6]), array([1.  , 1.  , 0.85, 0.15]))
    """
    if length < size:
        raise ValueError(f"windows of {size} pixels are larger than the image, of {length}")
    if length > size and not 1 <= overlap < size:
        raise ValueError(f"{overlap=}: windows of {size} pixels cannot cover {length} with it")
    count = 1 if length == size else 1 - (size - length) // (size - overlap)
    starts = np.round(np.linspace(0, length - size, count)).astype(int)
    rise = np.sin(np.pi / 2 * np.minimum(1, (np.arange(size) + 0.5) / overlap)) ** 2
    weights = np.ones((count, size))  # without a rise at the edges of the image
    weights[1:] *= rise
    weights[:-1] *= rise[::-1]
    inside = starts[:, None] + np.arange(size)
    total = np.bincount(inside.ravel(), weights.ravel(), length)
    return starts, weights / total[inside]
