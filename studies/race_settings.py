"""What race.py and race_peers.py share: plain numbers that both environments can read."""

from typing import NamedTuple

EVALUATIONS = 20
"""Steps of every sampler. Guidance evaluates the network twice."""
GUIDANCE = 3.5
"""The weight of classifier-free guidance, of networks that are trained with labels."""
GUIDED = (-3.0, 5.0)
"""The log-SNR from which and up to which they are guided."""
NULL = 10
"""The label that means "no label"; those of the data are 0 to 9."""
LOG_SNR = (-10.0, 10.0)
"""The ends of the cosine schedule."""


class Recipe(NamedTuple):
    """How a U-Net of ours is trained, and diffusers' network with the same parameters.

    Attributes:
      target: eps or v.
      rate: the largest learning rate.
      batch: examples of a step.
      ema: the decay of the moving average of parameters, after its warm-up.
      decays: whether the learning rate falls to 0 along a cosine.
    """

    target: str = "v"
    rate: float = 3e-3
    batch: int = 16
    ema: float = 0.995
    decays: bool = True
