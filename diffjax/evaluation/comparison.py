"""The results of evaluate.py, as lines for one run, or as a table and a figure for several runs."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from .. import plots
from ..training import parsing
from ..training.files import flatten
from .distances import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "evaluation.json"
"""The file of an evaluation, in its run's directory."""


class Measure(NamedTuple):
    """A measure in an evaluation.

    Attributes:
      title: its name in tables.
      known: its name in feature spaces in which it has one of its own.
      best: `min` or `max`, whichever is better.
      conditions: names of settings that must be equal for the values of two runs to be comparable.
      error: name of its standard error, which not every measure has.
    """

    title: str
    best: Callable[[Iterable[float]], float]
    conditions: tuple[str, ...]
    error: str
    names: Mapping[str, str] = MappingProxyType({})


BITS = ("held_out.n", "held_out.levels", "space.latents", "held_out.sha256")
DISTANCES = (
    "samples.n",
    "samples.draws",
    "features.name",
    "features.sha256",
    "reference.sha256",
    "space.samples",
    "space.sha256",
)
FLAGS = {
    "held_out.n": "held_out",
    "held_out.levels": "levels",
    "samples.n": "n",
    "samples.draws": "draws",
    "features.name": "features",
    "space.latents": "latents",
    "space.samples": "space",
}
"""The flag of evaluate.py, or another word, by the name of a setting in evaluation.json."""
ENOUGH = 5
"""Samples for each feature from which on a Frechet distance is not mostly its own bias."""
MEASURES = {
    "bound_bits_per_dim": Measure("bound, bits/dim", min, BITS, "bound_standard_error"),
    "flow_bits_per_dim": Measure("flow, bits/dim", min, BITS, "flow_standard_error"),
} | {
    name: Measure(metric.title, metric.best, DISTANCES, f"{name}_standard_error", metric.names)
    for name, metric in METRICS.items()
}

Result = dict[str, Any]
"""A flattened evaluation."""


def lines(result: Result) -> list[str]:
    """Format the numbers of an evaluation, one line each.

    What a number depends on has the name of its flag, if there is one.

    >>> lines({"bound_bits_per_dim": 2.069, "bound_standard_error": 0.017, "held_out.n": 300})
    ['bound, bits/dim: 2.069 +- 0.017 (held_out=300)']
    """
    found = []
    for name, measure in MEASURES.items():
        if name in result:
            # Hashes are left out; the file has them.
            given = [c for c in measure.conditions if c in result and not c.endswith("sha256")]
            conditions = ", ".join(f"{FLAGS[c]}={result[c]}" for c in given)
            mean = result.get(f"{name}_mean")
            several = (
                "" if mean is None else f", mean {mean:.4g} of {result['samples.draws']} draws"
            )
            found.append(f"{title(result, name)}: {shown(result, name)}{several} ({conditions})")
    dimension = result.get("features.dimension", 0)
    few = min(result.get(f"{part}.n", math.inf) for part in ("samples", "reference"))
    if few < ENOUGH * dimension:
        found.append(
            f"the Frechet distance is mostly its own bias: {few} samples or examples hardly give a "
            f"covariance of {dimension} features; {ENOUGH * dimension} or more do"
        )
    return found


def title(result: Result, name: str) -> str:
    """What a measure is called in the feature space of a result.

    >>> title({"features.name": "inception"}, "frechet"), title({}, "frechet")
    ('FID', 'Frechet distance')
    >>> title({"features.name": "inception of unknown weights"}, "frechet")
    'Frechet distance'
    """
    return MEASURES[name].names.get(result.get("features.name", ""), MEASURES[name].title)


def shown(result: Result, name: str) -> str:
    """Format a number, with its standard error if it has one, or a dash if it is missing."""
    if name not in result:
        return "-"
    error = result.get(MEASURES[name].error)
    return f"{result[name]:.4g}" + ("" if error is None else f" +- {error:.2g}")


def read(runs: Iterable[Path]) -> dict[str, Result]:
    """Read the evaluations of runs, given by their directories or by the evaluations' files.

    Raises:
      FileNotFoundError: if a run has not been evaluated.
      ValueError: if evaluate.py did not write a file, or if numbers are not comparable; the message
        says which, and why.
    """
    results = {}
    for run in runs:
        path = run if run.suffix == ".json" else run / RESULT
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: python evaluate.py --workdir={path.parent} writes it"
            )
        try:
            results[str(run)] = _checked(flatten(parsing.read(path)))
        except ValueError as error:
            raise ValueError(f"{path} is not a file of evaluate.py: {error}") from error

    differences = {}
    for name, measure in MEASURES.items():
        have = {run: result for run, result in results.items() if name in result}
        for condition in measure.conditions:
            values = {run: result.get(condition) for run, result in have.items()}
            if len(set(values.values())) > 1:
                which = ", ".join(f"{value} ({run})" for run, value in values.items())
                differences[f"{condition}: {which}"] = None
    if differences:
        raise ValueError("these runs cannot be compared:\n  " + "\n  ".join(differences))
    return results


def _checked(result):
    """An evaluation, if its numbers are numbers, and its settings can be compared."""
    for name, measure in MEASURES.items():
        for part in {name, measure.error, f"{name}_mean"} & result.keys():
            parsing.field(result, part, int, float)
        for condition in {*measure.conditions} & result.keys():
            parsing.field(result, condition, str, int, float, bool, type(None))
    return result


def best(results: dict[str, Result], name: str) -> float | None:
    """The best value of a measure, or None unless several runs have it."""
    values = [result[name] for result in results.values() if name in result]
    return MEASURES[name].best(values) if len(values) > 1 else None


def table(results: dict[str, Result]) -> Table:
    """Make a table with a row per run and a column per measure; a star marks the best value."""
    names = _present(results)
    made = Table("run", *(_heading(results, name) for name in names))
    for run, result in results.items():
        cells = [
            shown(result, name)
            + (" *" if name in result and result[name] == best(results, name) else "")
            for name in names
        ]
        made.add_row(run, *cells)
    return made


def figure(results: dict[str, Result]) -> "Figure":
    """Draw a panel per measure, with a point and its standard error per run.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
    """
    names, runs = _present(results), list(results)
    made, axes = plots.panels(1, len(names), width=2.6, height=1.3 + 0.35 * len(runs))
    for ax, name in zip(axes, names, strict=True):
        measure, winner = MEASURES[name], best(results, name)
        for row, result in enumerate(results.values()):
            if name in result:
                colour = plots.COLOURS[1 if result[name] == winner else 0]
                error = result.get(measure.error)
                ax.errorbar(result[name], row, xerr=error, fmt="o", color=colour, capsize=3)
        wanted = "lower" if measure.best is min else "higher"
        ax.set_xlabel(f"{_heading(results, name)}\n({wanted} is better)")
        ax.margins(x=0.2)
        ax.set_yticks(range(len(runs)), runs if ax is axes[0] else [""] * len(runs))
        ax.set_ylim(len(runs) - 0.5, -0.5)
    return made


def _heading(results, name):
    return next(title(result, name) for result in results.values() if name in result)


def _present(results):
    return [name for name in MEASURES if any(name in result for result in results.values())]
