r"""Samplers: walks from x_1, noise, to x_0, data, along a grid of times of the caller's choice.

A `Sampler` is two pure functions. `init(x_1)` makes a state; `step(key, state, t, s)` moves it
from time t to time s. In a notebook call `step` in a `for` loop; `sample` is the same loop as one
`lax.scan`, to be jitted by its caller with the parameters as arguments.

Every sampler is a function `(denoise, schedule, *, options) -> Sampler`, and works with any
schedule over the whole of [0, 1]: log-SNR is finite there, so no step is special. A deterministic
one walks both ways. `docs/samplers.md` has their measured orders and errors.
"""

from .grids import discrete_times, karras_times, log_snr_times, uniform_times
from .multistep import dpm_solver_pp_2m, dpm_solver_pp_2m_sde, dpm_solver_pp_3m, lms, unipc
from .onestep import ancestral, ddim, edm, euler_maruyama, heun, predictor_corrector
from .walk import Sampler, State, check_times, init, sample

__all__ = [
    "Sampler",
    "State",
    "ancestral",
    "check_times",
    "ddim",
    "discrete_times",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "dpm_solver_pp_3m",
    "edm",
    "euler_maruyama",
    "heun",
    "init",
    "karras_times",
    "lms",
    "log_snr_times",
    "predictor_corrector",
    "sample",
    "uniform_times",
    "unipc",
]
