"""Training on any devices and surviving faults, with no knowledge of configs or of diffusion.

A training step is a pure function (`step`), which a runner maps over devices (`runners`) of one or
many processes (`distributed`). The state is kept in sealed checkpoints (`checkpoints`), metrics go
to a file, a terminal and other writers (`recorder`, `metrics`, `writers`, `telemetry`), and a run
that is asked to stop saves first (`preemption`). `python -m diffjax.launch` (`launch`) starts and
restarts several processes of one machine.
"""

from .step import Batch, Losses, LossFn, TrainState, ema_warmup, init_state, projected, train_step

__all__ = [
    "Batch",
    "LossFn",
    "Losses",
    "TrainState",
    "ema_warmup",
    "init_state",
    "projected",
    "train_step",
]
