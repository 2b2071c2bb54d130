"""Augmentations of images that do not leak into the samples, because the network is told of them.

An augmentation is a pure function of a key and an image, and returns the image that the network is
trained on and numbers that describe what was done, which are all zero where nothing was. The
network takes them as `cond["augment"]`. Samples are drawn with zeros, so that they look like images
that were not augmented (Karras et al. 2022, "Elucidating the design space of diffusion-based
generative models", appendix F.2).

A new augmentation is a function and a row of `AUGMENTATIONS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .tiling import position_of
from .types import Array, Key

Image = Float[Array, "height width channels"]
Drawn = Float[Array, "drawn_height drawn_width channels"]
Told = Float[Array, " numbers"]


class Augmentation(NamedTuple):
    """What is done to the images of training.

    Attributes:
      draw: (key, image) -> the image, and the numbers that describe what was done.
      numbers: how many they are.
      side: of the windows that it cuts out of images, which samples are then drawn by
        (`tiling.tiled`); None: images keep their size.
    """

    draw: Callable[[Key, Image], tuple[Drawn, Told]]
    numbers: int
    side: int | None = None


def edm(
    p: float = 0.12, scale: float = 0.2, stretch: float = 0.2, shift: float = 0.125
) -> Augmentation:
    """The augmentation of EDM (Karras et al. 2022, appendix F.2), for images that have no left.

    A mirror image is drawn with probability 1/2. Each of the others happens with probability p: the
    image is turned upside down (with probability p / 2), enlarged, rotated, stretched along a
    random direction, and shifted. These are one affine map (`warp`), so that nothing is blurred
    twice.

    Args:
      p: probability of each (EDM has 0.12 for CIFAR-10 and 0.15 for FFHQ and AFHQ).
      scale: the logarithm to base 2 of the enlargement is normal with this standard deviation.
      stretch: that of the stretching.
      shift: the standard deviation of the shift, as a part of the image's side.

    Raises:
      ValueError: unless p is in [0, 1], and the others are at least 0.
    """
    if not 0 <= p <= 1 or min(scale, stretch, shift) < 0:
        raise ValueError(
            f"p={p}: must be in [0, 1]; scale={scale}, stretch={stretch}, shift={shift}: must be "
            "at least 0"
        )

    def draw(key: Key, image: Image) -> tuple[Image, Told]:
        each = iter(jax.random.split(key, 12))
        happens = lambda: jax.random.bernoulli(next(each), p)
        half = lambda: jax.random.bernoulli(next(each))
        normal = lambda *shape: jax.random.normal(next(each), shape)
        angle = lambda: jax.random.uniform(next(each), (), minval=-jnp.pi, maxval=jnp.pi)

        mirrored, turned = half(), half() & happens()
        larger = jnp.where(happens(), normal(), 0)
        rotation = jnp.where(happens(), angle(), 0)
        along, longer = angle(), jnp.where(happens(), normal(), 0)
        moved = jnp.where(happens(), normal(2), 0)

        x = jnp.where(mirrored, image[:, ::-1], image)
        x = jnp.where(turned, x[::-1], x)
        matrix = jnp.exp2(scale * larger) * (
            _rotation(along)
            @ jnp.diag(jnp.exp2(stretch * longer * jnp.array([1.0, -1.0])))
            @ _rotation(-along)
            @ _rotation(rotation)
        )
        mapped = warp(x, matrix, shift * moved)
        unmoved = (larger == 0) & (rotation == 0) & (longer == 0) & (moved == 0).all()
        told = [
            *(mirrored, turned, larger, jnp.cos(rotation) - 1, jnp.sin(rotation)),
            *(longer * jnp.cos(along), longer * jnp.sin(along), *moved),
        ]
        return jnp.where(unmoved, x, mapped), jnp.stack([jnp.asarray(n, x.dtype) for n in told])

    return Augmentation(draw, 9)


def crop(pad: float = 4.0) -> Augmentation:
    """A random window of the image's own size, after it is continued by reflection.

    Args:
      pad: the most pixels by which the window is moved.

    Raises:
      ValueError: unless pad is at least 1.
    """
    if pad < 1 or pad != int(pad):
        raise ValueError(f"pad={pad}: must be a whole number of at least 1")
    pad = int(pad)

    def draw(key: Key, image: Image) -> tuple[Image, Told]:
        moved = jax.random.randint(key, (2,), -pad, pad + 1)
        wide = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
        window = jax.lax.dynamic_slice(wide, (*(moved + pad), 0), image.shape)
        return window, moved.astype(image.dtype) / pad

    return Augmentation(draw, 2)


def window(side: int | float) -> Augmentation:
    """A random square window of a larger image, and where it is.

    The numbers are its position, (down, right), from -1 at the first edge of the image to 1 at the
    last, as `tiling.tiled` tells them. The range does not depend on the size of the image, so that
    a network that draws larger images is told no position that it was not trained on (Wang et al.
    2023, "Patch diffusion", who tell the coordinates of each pixel).

    Args:
      side: of the window, in pixels, at most the image's height and width.

    Raises:
      ValueError: unless side is a whole number of at least 1.
    """
    if side < 1 or side != int(side):
        raise ValueError(f"side={side}: must be a whole number of at least 1")
    n = int(side)

    def draw(key: Key, image: Image) -> tuple[Drawn, Told]:
        room = np.array(image.shape[:2]) - n
        corner = jax.random.randint(key, (2,), 0, room + 1)
        cut = jax.lax.dynamic_slice(image, (*corner, 0), (n, n, image.shape[2]))
        return cut, position_of(corner, room).astype(image.dtype)

    return Augmentation(draw, 2, n)


AUGMENTATIONS: dict[str, Callable[..., Augmentation]] = {
    "edm": edm,
    "crop": crop,
    "window": window,
}
"""Augmentations by name, as configs and the command line choose them; each row makes one."""


def _rotation(angle: Array) -> Array:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[cos, -sin], [sin, cos]])


# The wavelet sym6 (Daubechies 1992), whose shifts by two are orthonormal: to halve what was doubled
# gives the same image.
SYM6 = np.array(
    [
        *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057),
        *(-0.048311742585633, 0.4910559419267466, 0.787641141030194),
        *(0.3379294217276218, -0.07263752278646252, -0.021060292512300564),
        *(0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
    ]
)
FIRST = 5
"""A pixel k gives to those from 2 k - FIRST on when it is doubled, in the order of the taps."""
DELAY = float(np.arange(len(SYM6)) @ SYM6 / SYM6.sum()) - FIRST
"""So it comes to lie at 2 k + DELAY, the centre of the taps."""


def warp(image: Image, matrix: Float[Array, "2 2"], shift: Float[Array, " 2"]) -> Image:
    """Apply an affine map about the centre of an image.

    What is at the point r, (down, right) from the centre, comes to `matrix @ r + shift * size`. The
    image is doubled by the wavelet sym6, read between its pixels by linear interpolation, and
    halved again. Beyond its edges it is continued by reflection.

    Args:
      image: `[height, width, channels]`.
      matrix: `[2, 2]`, invertible.
      shift: `[2]`, as parts of the height and the width.
    """
    column = lambda pair: jnp.asarray(pair, float)[:, None, None]  # of [2, rows, columns]
    size = column(image.shape[:2])
    centre = (size - 1) / 2
    rows, columns = (jnp.arange(-FIRST, 2 * n + FIRST) for n in image.shape[:2])
    at = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"))
    r = (at - DELAY) / 2 - centre - column(shift) * size
    source = jnp.einsum("ij,jkl->ikl", jnp.linalg.inv(matrix), r) + centre
    source = jnp.mod(source + 0.5, 2 * size)  # from the edge
    source = jnp.minimum(source, 2 * size - source) - 0.5
    coordinates = list(2 * source + DELAY + EDGE)
    read = lambda x: jax.scipy.ndimage.map_coordinates(x, coordinates, order=1, mode="nearest")
    found = jax.vmap(read, -1, -1)(_doubled(_doubled(image, 0), 1))
    return _halved(_halved(found, 0), 1).astype(image.dtype)


EDGE = 2
"""Pixels that a doubled image has beyond each edge, so that all are read between two others."""


def _doubled(x, axis):
    """Twice as many pixels along an axis, and EDGE more at each end."""
    x = jnp.moveaxis(x, axis, 0)
    pad = len(SYM6) // 2
    wide = jnp.pad(x, [(pad, pad), *[(0, 0)] * (x.ndim - 1)], mode="symmetric")
    spread = jnp.zeros((2 * len(wide), *x.shape[1:]), x.dtype).at[::2].set(wide)
    start, n = 2 * pad + FIRST - EDGE, 2 * len(x) + 2 * EDGE
    parts = [tap * spread[start - j : start - j + n] for j, tap in enumerate(SYM6 * np.sqrt(2))]
    return jnp.moveaxis(sum(parts), 0, axis)


def _halved(x, axis):
    """Half as many pixels along an axis, of which x has FIRST more at each end."""
    x = jnp.moveaxis(x, axis, 0)
    n = len(x) - 2 * FIRST
    parts = [tap * x[j : j + n : 2] for j, tap in enumerate(SYM6 / np.sqrt(2))]
    return jnp.moveaxis(sum(parts), 0, axis)
