"""Checks of the functions and records that callers hand in: each error names what to pass instead.

They look at types, attributes and shapes only, never at values, so they cost nothing under `jit`,
where they run while a function is traced. Any callable may be a network, a denoiser or a weighting.
"""

import inspect
from typing import Any

import jax
import numpy as np

from .schedules import Schedule


def schedule(value: Any) -> None:
    """Raise a TypeError unless `value` is a schedule: it is callable and has `log_snr`."""
    if not (callable(value) and callable(getattr(value, "log_snr", None))):
        raise TypeError(
            f"need a Schedule, such as diffjax.cosine(), got {_described(value)}; network or "
            "denoiser come before the schedule, data after it"
        )


def network(value: Any) -> None:
    """Raise a TypeError unless `value` may be a network: no schedule, and no denoiser of ours."""
    if isinstance(value, Schedule) or not callable(value):
        raise TypeError(
            f"need a network, a function (x_t, log_snr, cond) -> estimate of the target, got "
            f"{_described(value)}; the network comes before the schedule"
        )
    if isinstance(getattr(value, "schedule", None), Schedule) and _ours(value):
        raise TypeError(
            "need a network, got a denoiser, which already predicts x_0 and eps: pass the network "
            "that it was made from"
        )


def weighting(value: Any) -> None:
    """Raise a TypeError unless `value` may be a weighting, or is None."""
    if value is not None and (not callable(value) or _makes(value, "weightings")):
        raise TypeError(
            f"need a weighting, such as diffjax.weightings.min_snr(), got {_described(value)}"
        )


def sampler(value: Any) -> None:
    """Raise a TypeError unless `value` is a sampler: it has `init` and `step`."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "step", None))):
        raise TypeError(
            f"need a Sampler, such as diffjax.ddim(denoise, schedule), got {_described(value)}"
        )


def output(out: Any, x_t: Any) -> None:
    """Raise a TypeError if a network returned something else than an array for the data x_t."""
    if not (hasattr(out, "shape") and hasattr(out, "dtype")):
        raise TypeError(
            f"the network returned a {type(out).__name__}: need one array of shape "
            f"{jax.numpy.shape(x_t)}, the estimate of the target"
        )


def prediction(out: Any, x_t: Any) -> None:
    """Raise an error unless a denoiser returned x_0 and eps, each of the shape of x_t.

    Raises:
      TypeError: if it returned something else.
      ValueError: if a shape is another.
    """
    if not (hasattr(out, "x_0") and hasattr(out, "eps")):
        raise TypeError(
            f"the denoiser returned a {type(out).__name__}, not a Prediction of x_0 and eps: make "
            "a network a denoiser by diffjax.denoiser(network, schedule, target)"
        )
    given, *found = map(np.shape, (x_t, out.x_0, out.eps))
    if found != [given, given]:
        raise ValueError(
            f"x_t has shape {given}, and the denoiser predicts x_0 and eps of shapes {found[0]} "
            f"and {found[1]}: all must be equal; a teacher must be of the same data"
        )


def takes(denoise: Any, *args: Any, **given: Any) -> None:
    """Raise a TypeError if a denoiser cannot be called with these arguments."""
    try:
        inspect.signature(denoise).bind(*args, **given)
    except TypeError as error:
        if "s" in given:
            raise TypeError(
                "need a flow map, a function (x_t, t, cond=None, s=None) -> Prediction, got one "
                f"without the time s at which a step ends ({error}): make a network of two times a "
                "flow map by diffjax.flow_map(network, schedule, target), and guide its teacher, "
                "not the map"
            ) from None
        raise TypeError(
            f"need a denoiser, a function (x_t, t, cond=None) -> Prediction, got one of other "
            f"arguments ({error}): make a network a denoiser by diffjax.denoiser(network, "
            "schedule, target), and bind a condition by functools.partial(denoise, cond=...)"
        ) from None
    except ValueError:
        pass  # a callable without a signature


def batched(x: Any, name: str) -> None:
    """Raise a ValueError unless x has an axis of examples and at least one of data."""
    if jax.numpy.ndim(x) < 2:
        raise ValueError(
            f"{name} of shape {jax.numpy.shape(x)}: need [batch, ...]; pass one example as x[None],"
            " and numbers as x[:, None]"
        )


def note_cond(error: Exception) -> None:
    """Add a note to the error of a network that was called without a condition."""
    _note(
        error,
        "The network was called as network(x_t, log_snr, cond) with cond=None. If it needs a "
        "condition, pass cond=... to a loss, and give a sampler's denoiser its own by "
        "functools.partial(denoise, cond=...).",
    )


def note_denoiser(error: Exception) -> None:
    """Add a note to the error of a denoiser that may be a network."""
    _note(
        error,
        "It was called as denoise(x_t, t, cond=None), with one time t for the batch. If it is a "
        "network, make a denoiser of it: diffjax.denoiser(network, schedule, target).",
    )


def _note(error, text):
    if text not in getattr(error, "__notes__", ()):  # of a denoiser within a denoiser
        error.add_note(text)


def _described(value):
    """What a caller passed, and how it becomes what is needed."""
    if isinstance(value, str):
        return f"the name {value!r}: names are for configs, here call the function of that name"
    if isinstance(value, Schedule):
        return "a schedule"
    if _makes(value, ""):
        return f"the function {value.__name__}, which makes one: call it, {value.__name__}(...)"
    if inspect.isfunction(value):
        return f"the function {value.__qualname__}"
    return f"a {type(value).__name__}"


def _makes(value, module):
    """Whether this is a function that a module of diffjax defines, not one that such returned."""
    return inspect.isfunction(value) and (
        value.__module__.startswith(f"diffjax.{module}") and "<locals>" not in value.__qualname__
    )


def _ours(value):
    """Whether diffjax defined this function, or the class of this object."""
    defined = value if inspect.isfunction(value) else type(value)
    return (defined.__module__ or "").startswith("diffjax.")
