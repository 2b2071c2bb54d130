r"""Measurement operators, and the checks of what is measured.

A linear operator may carry its singular value decomposition A = U S V^T, which `ddrm` needs.
Inpainting, averages of pixels and averages of channels have it in closed form for images of any
size; `with_svd` computes that of any linear operator on small data, such as a blur:

>>> import jax.numpy as jnp
>>> kernel = jnp.ones((3, 3)) / 9
>>> with_svd(blurring(kernel), shape=(8, 8, 1)).svd.values.shape
(64,)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..types import Data, Key, Real, whole

Measurement = Float[Real, "batch *measured"]
Measure = Callable[[Data], Measurement]
"""A function from data to measurements, both `[batch, ...]`, of each example separately."""


class SVD(NamedTuple):
    """The singular value decomposition A = U S V^T: coordinates in which A is a product.

    Attributes:
      values: S, at least 0, in a shape that broadcasts against the coordinates of one example; it
        is 0 for coordinates that are not measured.
      coordinates: x -> V^T x, all coordinates of the data, `[batch, ...]`.
      data: the inverse of `coordinates`.
      measured: y -> U^T y, in the shape of the coordinates; where `values` is 0 it is not used.
    """

    values: Float[Real, "..."]
    coordinates: Measure
    data: Measure
    measured: Measure


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A measurement operator, which is called as the function `apply`.

    The solvers take any function of data `[batch, ...]` that measures each example separately;
    one that is an `Operator` may also have an `SVD`.

    Attributes:
      apply: x -> A(x), from data to measurements, both `[batch, ...]`.
      svd: its singular value decomposition, if it is linear and this is known.
      mask: what it keeps, if it is `inpainting`.
    """

    apply: Measure
    svd: SVD | None = None
    mask: Float[Real, "..."] | None = None

    def __call__(self, x: Data) -> Measurement:
        """Measure data `[batch, ...]`."""
        return self.apply(x)


def inpainting(mask: Float[Real, "..."]) -> Operator:
    """Keep the data where `mask` is 1, and zero it where it is 0.

    Args:
      mask: of one example, `[height, width, 1]` or `[height, width, channels]` for images.

    Raises:
      ValueError: when called, if the mask does not have as many axes as an example, or does not
        broadcast to it.
    """
    same = lambda x: x

    def keep(x):
        sides = zip(jnp.shape(mask), x.shape[1:], strict=False)
        if jnp.ndim(mask) != x.ndim - 1 or any(a not in (1, b) for a, b in sides):
            raise ValueError(f"a mask of shape {jnp.shape(mask)} for examples of {x.shape[1:]}")
        return x * jnp.broadcast_to(mask, x.shape).astype(x.dtype)

    return Operator(keep, SVD(mask, same, same, same), mask)


def downsampling(factor: int) -> Operator:
    """Average each square of factor x factor pixels of images `[batch, height, width, channels]`.

    Raises:
      ValueError: unless `factor` is a whole number of at least 1; when called, if it does not
        divide height and width, or the data are no images.
    """
    if not whole(factor):
        raise ValueError(f"{factor=}: must be a whole number of at least 1")

    def squares(x):
        _check_images("downsampling", x)
        batch, height, width, channels = x.shape
        if height % factor or width % factor:
            raise ValueError(f"{factor=} does not divide an image of {height} x {width}")
        rows, columns = height // factor, width // factor
        x = x.reshape(batch, rows, factor, columns, factor, channels).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(batch, rows, columns, channels, factor**2)

    def pixels(x):
        batch, rows, columns, channels, _ = x.shape
        x = x.reshape(batch, rows, columns, channels, factor, factor).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(batch, rows * factor, columns * factor, channels)

    return _averaging(factor**2, squares, pixels)


def greying(channels: int = 3) -> Operator:
    """Average the channels of images, to `[batch, height, width, 1]`; colourisation inverts it.

    Args:
      channels: number of channels of the images.

    Raises:
      ValueError: unless `channels` is a whole number of at least 1; when called, if the images have
        another number of channels.
    """
    if not whole(channels):
        raise ValueError(f"{channels=}: must be a whole number of at least 1")

    def pixels(x):
        if x.shape[-1] != channels:
            raise ValueError(f"{channels=}: the images have {x.shape[-1]}")
        return x[..., None, :]

    return _averaging(channels, pixels, lambda z: z[..., 0, :])


def _averaging(n, groups, ungrouped):
    """The mean of each group of n numbers; groups: x -> the same numbers, `[batch, ..., n]`."""
    # The cosine transform of a group begins with its mean, times the root of n.
    k, j = np.indices((n, n))
    rows = np.cos(np.pi * k * (j + 0.5) / n)
    basis = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    first = (np.arange(n) == 0) * 1.0  # the only one that is measured
    return Operator(
        lambda x: groups(x).mean(-1),
        SVD(
            first / math.sqrt(n),
            coordinates=lambda x: _dot(groups(x), basis.T),
            data=lambda z: ungrouped(_dot(z, basis)),
            measured=lambda y: jnp.tensordot(y, first.astype(y.dtype), axes=0),
        ),
    )


def blurring(kernel: Float[Real, "..."]) -> Operator:
    """Convolve images with a kernel, with zeros beyond their edges; the size stays the same.

    Args:
      kernel: `[height, width]`, the same for all channels.

    Raises:
      ValueError: if the kernel does not have two axes, or is empty; when called, if the data are no
        images.
    """
    kernel = jnp.asarray(kernel)
    if kernel.ndim != 2 or not kernel.size:
        raise ValueError(f"a kernel of shape {kernel.shape}: must be [height, width], 1 or more")

    def measure(x):
        _check_images("blurring", x)
        channels = x.shape[-1]
        each = jnp.broadcast_to(
            jnp.asarray(kernel, x.dtype)[::-1, ::-1, None, None], (*kernel.shape, 1, channels)
        )
        return jax.lax.conv_general_dilated(
            x,
            each,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
            precision="highest",
        )

    return Operator(measure)


def compressed_sensing(key: Key, measurements: int, shape: tuple[int, ...]) -> Operator:
    """Random combinations of all numbers of an example, to `[batch, measurements]`.

    The weights are normal with variance 1 / (numbers of an example), so that a measurement is as
    large as one of the numbers.

    Args:
      key: one key, which decides the weights.
      measurements: how many combinations to measure.
      shape: the shape of one example.

    Raises:
      ValueError: unless `measurements` is a whole number of at least 1; when called, if an example
        has another shape.
    """
    if not whole(measurements):
        raise ValueError(f"{measurements=}: must be a whole number of at least 1")
    size = math.prod(shape)
    weights = jax.random.normal(key, (measurements, size)) / math.sqrt(size)

    def measure(x):
        if x.shape[1:] != tuple(shape):
            raise ValueError(f"compressed sensing of examples of shape {shape}, not {x.shape[1:]}")
        return _dot(x.reshape(len(x), size), weights.T)

    return Operator(measure)


def phase_retrieval(oversampling: int = 2) -> Operator:
    """The absolute values of the Fourier transform of images, which loses the phases.

    It is not linear. An image that is turned by 180 degrees, or negated, has the same measurement.

    Args:
      oversampling: the images are padded with zeros to so many times their height and width; the
        measurement has the padded size.

    Raises:
      ValueError: unless `oversampling` is a whole number of at least 1; when called, if the data
        are no images.
    """
    if not whole(oversampling):
        raise ValueError(f"{oversampling=}: must be a whole number of at least 1")

    def measure(x):
        _check_images("phase retrieval", x)
        size = tuple(oversampling * n for n in x.shape[1:3])
        return jnp.abs(jnp.fft.fft2(x, size, axes=(1, 2), norm="ortho")).astype(x.dtype)

    return Operator(measure)


def with_svd(operator: Measure, shape: tuple[int, ...]) -> Operator:
    """Add the singular value decomposition to a linear operator, from its matrix.

    An example of d numbers needs d^2 numbers of memory, and time that grows as d^3: seconds for
    28 x 28 pixels.

    Args:
      operator: A, linear or affine.
      shape: the shape of one example.

    Raises:
      ValueError: if the operator does not take such an example, or is not linear.
    """
    size = math.prod(shape)
    basis = jnp.eye(size).reshape(size, *shape)
    check_linear("with_svd", operator, basis)
    offset = operator(jnp.zeros_like(basis[:1]))
    matrix = np.asarray(operator(basis) - offset, np.float64).reshape(size, -1)  # A transposed
    v, found, u_t = np.linalg.svd(matrix)
    found[found < 1e-6 * found[0]] = 0  # rounding errors of a float32 matrix
    values = np.zeros(size)
    values[: len(found)] = found
    u_t = np.pad(u_t[:size], ((0, max(0, size - len(u_t))), (0, 0)))

    def measure(x):
        if x.shape[1:] != tuple(shape):
            raise ValueError(
                f"the decomposition is of examples of shape {shape}, not {x.shape[1:]}"
            )
        return operator(x)

    return Operator(
        measure,
        SVD(
            values,
            coordinates=lambda x: _dot(x.reshape(len(x), size), v),
            data=lambda z: _dot(z, v.T).reshape(len(z), *shape),
            measured=lambda y: _dot((y - offset).reshape(len(y), -1), u_t.T),
        ),
    )


def check(operator: Measure, x: Data, y: Float[Real, "..."]) -> None:
    """Raise a ValueError unless y has the shape of a measurement of data x, and both are real."""
    found = _measured(operator, x)
    if y.shape != found.shape:
        raise ValueError(f"a measurement of shape {y.shape}: the operator gives {found.shape}")
    if not all(jnp.issubdtype(each.dtype, jnp.floating) for each in (y, found)):
        raise ValueError(
            f"a measurement in {y.dtype}, by an operator that gives {found.dtype}: must be "
            "floating-point numbers, of complex ones the real and imaginary parts side by side"
        )


def check_linear(name: str, operator: Measure, x: Data) -> None:
    """Raise a ValueError unless JAX can transpose the operator: it must be linear or affine."""
    y = _measured(operator, x)
    try:
        jax.eval_shape(jax.linear_transpose(operator, x), y)
    except Exception as error:  # JAX raises errors of several kinds
        raise ValueError(
            f"{name} needs a linear operator: `dps`, `mmps` and `tds` take others"
        ) from error


def _check_images(what, x):
    """Raise a ValueError unless the data are images."""
    if x.ndim != 4:
        raise ValueError(
            f"{what} of data of shape {x.shape}: must be images, [batch, height, width, channels]"
        )


def _measured(operator, x):
    """The shape and dtype of a measurement."""
    try:
        return jax.eval_shape(operator, x)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the operator does not take data of shape {x.shape}: {error}") from error


def _dot(x, matrix):
    return jnp.matmul(x, jnp.asarray(matrix, x.dtype), precision="highest")
