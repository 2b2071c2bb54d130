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
from jaxtyping import Float

from . import keys
from .inverse import downsampling
from .process import q_sample
from .schedules import Schedule
from .types import Data, Key, Real, Time, at_least_float32

Images = Float[Real, "batch height width channels"]
Small = Float[Real, "batch low low channels"]


def shrink(x: Images, side: int) -> Small:
    """Average square images `[batch, height, height, channels]` down to `side` pixels per side.

    Raises:
      ValueError: unless `side` divides their height.
    """
    if side < 1 or x.shape[1] != x.shape[2] or x.shape[1] % side:
        raise ValueError(f"{side=}: must divide the side of square images, not {x.shape[1:3]}")
    return downsampling(x.shape[1] // side)(x)


def enlarge(small: Small, side: int) -> Images:
    """Enlarge square images to `side` pixels per side, by bicubic interpolation.

    >>> enlarge(jnp.ones((1, 2, 2, 1)), 4).shape
    (1, 4, 4, 1)
    """
    shape = (len(small), side, side, small.shape[-1])
    return jax.image.resize(jnp.asarray(small), shape, "cubic")


def small_image(key: Key, schedule: Schedule, small: Small, t: Time) -> dict[str, Data]:
    """Noise a small image: the entries `image` and `image_log_snr` of the network's `cond`.

    Args:
      key: one key, or one per example `[batch]`.
      schedule: the `Schedule` whose q(z_t | small) adds the noise.
      small: images `[batch, low, low, channels]` in [-1, 1].
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
    small, side = shrink(truth, low), x.shape[1]
    coarse = jax.image.resize(small, truth.shape, "nearest")
    return jnp.stack([coarse, enlarge(small, side), x, truth], 1).reshape(-1, *x.shape[1:])
