"""Experiments: a config as data, the functions that it means, and the directory of a run.

A `Config` (`config`) comes from a file and the command line (`command_line`), and `rules` refuses
one that cannot run. `resolve` (`functions`) turns it into an `Experiment`, once: a record of the
pure functions that it means, which everything that trains, samples or evaluates takes. `dataset`
loads its data, `run_directory` has the files of a run, and `inspect` prints what is in them.
"""

from .config import Config, Data, Eval, FlowMap, Optimizer, Sampling, Walk, smoke, variant_of
from .functions import Experiment, resolve, with_parameters

__all__ = [
    "Config",
    "Data",
    "Eval",
    "Experiment",
    "FlowMap",
    "Optimizer",
    "Sampling",
    "Walk",
    "resolve",
    "smoke",
    "variant_of",
    "with_parameters",
]
