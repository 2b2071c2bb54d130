"""Cascades: runs of which each enlarges what the one before has drawn, as their configs say.

A run of super-resolution names the runs before it, `sampling.cascade`. Here their configs are read
and compared, before any network is loaded; `evaluation.sampling` draws the samples.

Source: Ho et al. 2022, "Cascaded diffusion models for high fidelity image generation".
"""

from collections.abc import Sequence

from ..experiment import Config
from ..experiment.config import require
from ..experiment.dataset import example_shape
from ..experiment.rules import check_low_resolution
from .trained import read_config


def read(config: Config) -> list[tuple[str, Config]]:
    """The runs of a cascade before the run of this config, by name, and their configs.

    Raises:
      FileNotFoundError: if a run is missing.
      ValueError: if one cannot be read, or two know different classes.
    """
    found = []
    for source in config.sampling.cascade:
        try:
            found.append((source, read_config(source)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"sampling.cascade={source}: {error}") from None
        except ValueError as error:
            raise ValueError(f"sampling.cascade={source}: {error}") from None
    known = {c.model.labels for c in (config, *(c for _, c in found))} - {0}
    if len(known) > 1:
        raise ValueError(
            f"sampling.cascade={' '.join(config.sampling.cascade)}: the stages know "
            f"{' and '.join(map(str, sorted(known)))} classes; need one number, or none"
        )
    return found


def classes(config: Config) -> int:
    """The number of classes of a run's samples: the labels that it or its cascade knows.

    Raises:
      FileNotFoundError, ValueError: as for `read`.
    """
    return max(c.model.labels for c in (config, *(c for _, c in read(config))))


def chain(config: Config, shape: tuple[int, ...]) -> list[tuple[str, Config, tuple[int, ...]]]:
    """The runs of a cascade before this one, with their configs and the shapes that they draw.

    Args:
      config: of the last run.
      shape: that its samples have.

    Raises:
      FileNotFoundError, ValueError: as for `read`, or if the runs do not follow one another.
    """
    found = [(source, c, example_shape(c)) for source, c in read(config)]
    if found:
        check_sizes([*((c, size) for _, c, size in found), (config, shape)])
    return found


def check_sizes(stages: Sequence[tuple[Config, tuple[int, ...]]]) -> None:
    """Refuse stages that do not follow one another.

    Args:
      stages: the config of each, and the shape that its samples have.

    Raises:
      ValueError: unless the first draws images from nothing, and each other one enlarges images of
        the shape that the one before draws.
    """
    for number, (config, shape) in enumerate(stages, 1):
        low, said = config.low_resolution, f"stage {number} of the cascade"
        require(
            (
                number > 1 or low is None,
                f"{said}: low_resolution={low}: it enlarges images, and cannot be the first; name "
                "the run that draws its small images before it",
            ),
            (
                number == 1 or low is not None,
                f"{said}: low_resolution=None: it draws images from nothing, and cannot enlarge "
                "those of the stage before",
            ),
        )
        if low is not None:
            small, before = check_low_resolution(low, shape), stages[number - 2][1]
            require(
                (
                    small == before,
                    f"{said}: it enlarges images of shape {small}, and the stage before it draws "
                    f"{before}",
                )
            )
