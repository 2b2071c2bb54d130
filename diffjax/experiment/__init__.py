"""Experiments: a config as data, the functions that it means, and the directory of a run.

A `Config` (`config`) comes from a file and the command line (`command_line`); `rules` refuses one
that cannot run; `resolve` (`functions`) turns it, once, into an `Experiment`, a record of pure functions which
everything that trains, samples or evaluates takes. `dataset` has its data, `run_directory` what a
run leaves on the disk, and `inspect` prints that.
"""

from .config import Config, Data, Optimizer, Sampling, Walk, smoke, variant_of
from .functions import Experiment, resolve

__all__ = [
    "Config",
    "Data",
    "Experiment",
    "Optimizer",
    "Sampling",
    "Walk",
    "resolve",
    "smoke",
    "variant_of",
]
