r"""Samplers, which step from noise x_1 to data x_0 along a grid of times.

A `Sampler` is two pure functions. `init(x_1)` makes a state; `step(key, state, t, s)` moves it
from time t to time s. In a notebook, call `step` in a `for` loop; `sample` is the same loop as one
`lax.scan`, which its caller can jit with the parameters as arguments.

Every sampler is made by a function `(denoise, schedule, *, options) -> Sampler`, which raises a
ValueError if the denoiser carries another schedule; the schedule may be left out if the denoiser
carries one. A sampler works with any schedule on all of [0, 1], because log-SNR is finite there. A
deterministic sampler also steps from data to noise. `docs/samplers.md` reports measured orders and
errors, and `SAMPLERS` lists all samplers by name.
"""

from collections.abc import Callable
from typing import NamedTuple

from .grids import TIMES, discrete_times, karras_times, log_snr_times, uniform_times
from .multistep import dpm_solver_pp_2m, dpm_solver_pp_2m_sde, dpm_solver_pp_3m, lms, unipc
from .onestep import ancestral, ddim, edm, euler_maruyama, heun, jump, predictor_corrector
from .walk import Sampler, State as State, check_times as check_times, init as init, sample


class Method(NamedTuple):
    """A row of `SAMPLERS`.

    Attributes:
      make: (denoise, schedule, *, options) -> `Sampler`.
      times: the best grid for this sampler, a name in `TIMES`.
      two_times: whether it steps by a `FlowMap`, in place of a `Denoiser`.
    """

    make: Callable[..., Sampler]
    times: str
    two_times: bool = False


SAMPLERS = {
    "ancestral": Method(ancestral, "uniform"),
    "ddim": Method(ddim, "uniform"),
    "dpm_solver_pp_2m": Method(dpm_solver_pp_2m, "log_snr"),
    "dpm_solver_pp_2m_sde": Method(dpm_solver_pp_2m_sde, "log_snr"),
    "dpm_solver_pp_3m": Method(dpm_solver_pp_3m, "log_snr"),
    "edm": Method(edm, "karras"),
    "euler_maruyama": Method(euler_maruyama, "log_snr"),
    "heun": Method(heun, "uniform"),
    "jump": Method(jump, "uniform", two_times=True),
    "lms": Method(lms, "karras"),
    "predictor_corrector": Method(predictor_corrector, "uniform"),
    "unipc": Method(unipc, "log_snr"),
}
"""Samplers by name, as configs and the command line choose them."""

__all__ = [
    "SAMPLERS",
    "TIMES",
    "Sampler",
    "discrete_times",
    "karras_times",
    "log_snr_times",
    "sample",
    "uniform_times",
    *SAMPLERS,
]
