r"""Super-resolution and cascades, by a network that is conditioned on the small image.

The network is given x_t and the small image, which is noised, with the log-SNR of its noise
("conditioning augmentation", Ho et al. 2022, "Cascaded diffusion models for high fidelity image
generation", section 4.2):

    z ~ q(z_t | small)    t drawn from U(0, max_cond_noise) in training, and chosen in sampling

A network trained in this way tolerates the errors of small images that another model has sampled.
`inverse` does super-resolution by a network that was not trained for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from . import keys
from .process import q_sample
from .schedules import Schedule
from .types import Data, Key, Real, Time, at_least_float32

Images = Float[Real, "batch height width channels"]
Small = Float[Real, "batch low_height low_width channels"]


def size_of(shape: tuple[int, ...], height: int) -> tuple[int, int]:
    """Height and width of an image of another height, with the proportions of an image.

    Args:
      shape: of the image, `(height, width, ...)`.
      height: the other height.

    Raises:
      ValueError: unless the width is a whole number.

    >>> size_of((30, 45, 3), 20)
    (20, 30)
    """
    width, rest = divmod(shape[1] * height, shape[0])
    if height < 1 or rest:
        raise ValueError(
            f"{height=}: images of {shape[0]} x {shape[1]} then have a width of "
            f"{shape[1] * height / shape[0]:g}, which must be a whole number of at least 1"
        )
    return height, width


def shrink(x: Num[Real, "batch height width channels"], height: int) -> Small:
    """Average images `[batch, any, any, channels]` down to a height; the proportions stay.

    Each pixel is the mean of the area that it covers, in which a pixel that lies across its edge
    counts in part, so that the height need not divide that of x.

    Raises:
      ValueError: if the height exceeds that of x, or the width would not be a whole number.

    >>> rows = jnp.array([0.0, 1.0, 2.0])[None, :, None, None] * jnp.ones((1, 3, 3, 1))
    >>> [round(float(row), 4) for row in shrink(rows, 2)[0, :, 0, 0]]
    [0.3333, 1.6667]
    """
    if height > x.shape[1]:
        raise ValueError(f"{height=}: must be at most that of the images, {x.shape[1]}")
    size = size_of(x.shape[1:], height)
    dtype = jnp.result_type(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else jnp.float32
    rows, columns = (
        jnp.asarray(_shares(*pair), dtype) for pair in zip(x.shape[1:3], size, strict=True)
    )
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision="highest")


def _shares(high, low):
    """The shares of `high` pixels in each of `low` pixels that cover the same line, `[low, high]`.

    In units of 1 / (high low) every edge is a whole number, so that a share is exact.
    """
    pixel, start = low * np.arange(high), high * np.arange(low)[:, None]
    common = np.minimum(pixel + low, start + high) - np.maximum(pixel, start)
    return np.maximum(common, 0) / high


def enlarge(small: Small, height: int) -> Images:
    """Enlarge images to a height, by bicubic interpolation; the proportions stay.

    >>> enlarge(jnp.ones((1, 2, 3, 1)), 4).shape
    (1, 4, 6, 1)
    """
    shape = (len(small), *size_of(small.shape[1:], height), small.shape[-1])
    return jax.image.resize(jnp.asarray(small), shape, "cubic")


def small_image(key: Key, schedule: Schedule, small: Small, t: Time) -> dict[str, Data]:
    """Noise a small image: the entries `image` and `image_log_snr` of the network's `cond`.

    Args:
      key: one key, or one per example `[batch]`.
      schedule: the `Schedule` whose q(z_t | small) adds the noise.
      small: images `[batch, any, any, channels]` in [-1, 1].
      t: the time of the noise, `[]` or `[batch]`, from 0 (the schedule's lowest noise level) to 1.
    """
    z = q_sample(schedule, small, t, keys.normal(key, small.shape, small.dtype))
    return {"image": z, "image_log_snr": jnp.broadcast_to(schedule.log_snr(t), len(small))}


def psnr(x: Data, y: Data) -> Float[Real, " batch"]:
    """The peak signal-to-noise ratio of images in [-1, 1], in decibels `[batch]`.

    10 log10(peak^2 / mean squared difference) with a peak of 2. It favours blur: the mean of all
    images that match a small one minimises the squared difference, but is not one of them.

    >>> psnr(jnp.zeros((1, 4, 4, 1)), jnp.full((1, 4, 4, 1), 0.2))  # 10 log10(4 / 0.04)
    Array([20.], dtype=float32)
    """
    error = at_least_float32(x - y)
    return 10 * jnp.log10(4 / jnp.square(error).mean(tuple(range(1, error.ndim))))


def beside(x: Images, truth: Images, low: int) -> Float[Real, "rows height width channels"]:
    """Arrange images in four rows: small, bicubic, sampled and true, `[4 batch, ...]`.

    Image 4 i + j is row j of column i, as `plots.samples` with four classes draws them.
    """
    small, height = shrink(truth, low), x.shape[1]
    coarse = jax.image.resize(small, truth.shape, "nearest")
    return jnp.stack([coarse, enlarge(small, height), x, truth], 1).reshape(-1, *x.shape[1:])
