"""Pictures of samples and animations (Pillow), and figures (Matplotlib, the extra `plots`).

All functions are pure functions of arrays. They return pixels as a `PIL.Image`, and other pictures
as a Matplotlib `Figure`, which the caller owns: there is no global state, and no display is needed.
In a notebook, after `%matplotlib inline`, a figure is shown as the value of a cell;
`figure.savefig(path)` writes it to a file.

A function that takes `ax` draws into existing axes, so that pictures can be combined; `panels`
makes a figure of empty axes in the common style.

Images are `[n, height, width, channels]` in [-1, 1], and points are `[n, 2]`. A walk is a sampling
trajectory that `sample` records with `observe=lambda state, t: (state.x, state.x_0, t)`: x_t and
the estimates of x_0 `[steps, n, ...]`, and times `[steps]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax.numpy as jnp
import numpy as np
from PIL import Image

from .data import to_bytes
from .extras import install
from .losses import LOG_SNR_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .schedules import Schedule
    from .types import Array

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""Colours that stay distinct under colour blindness (Okabe & Ito 2008), with grey for yellow."""
INK = "#444444"
FAINT = "#E6E6E6"
MASSES = (0.99, 0.9, 0.7, 0.5, 0.3, 0.1)
"""The probabilities that the contours of a density enclose."""


def image_grid(x: np.ndarray, columns: int, height: int = 56) -> Image.Image:
    """Arrange images in a grid, row by row.

    Args:
      x: images `[n, height, width, channels]` in [-1, 1]; values outside are clipped. One channel
        is grey, three are RGB, and other numbers of channels are drawn side by side in grey.
      columns: images per row.
      height: small images are enlarged by an integer factor, to at most this height in pixels.
    """
    if x.shape[3] not in (1, 3):
        x = np.moveaxis(x, 3, 2).reshape(*x.shape[:2], -1, 1)
    n, h, w, c = x.shape
    scale = max(1, height // h)
    rows = -(-n // columns)
    pixels = to_bytes(np.asarray(x, np.float32)).repeat(scale, 1).repeat(scale, 2)
    grid = np.full((rows * columns, h * scale + 2, w * scale + 2, c), 255, np.uint8)
    grid[:n, 1:-1, 1:-1] = pixels
    grid = grid.reshape(rows, columns, *grid.shape[1:]).swapaxes(1, 2)
    grid = grid.reshape(rows * (h * scale + 2), columns * (w * scale + 2), c)
    return Image.fromarray(grid[..., 0] if c == 1 else grid)


def scatter(x: np.ndarray, size: int = 480) -> Image.Image:
    """Draw points `[n, 2]` as a picture that is darker where there are more points.

    Points outside [-1.25, 1.25] are drawn on the border, and points `[n, 1]` on the middle line.
    """
    x = np.clip(x, -1.25, 1.25)
    x = np.c_[x, 0 * x] if x.shape[1] == 1 else x
    counts, _, _ = np.histogram2d(-x[:, 1], x[:, 0], bins=size // 4, range=[[-1.25, 1.25]] * 2)
    ink = 255 * np.exp(-3 * counts / max(counts.max(), 1))
    return Image.fromarray(ink.astype(np.uint8).repeat(4, 0).repeat(4, 1))


def samples(x: np.ndarray, classes: int = 0) -> Image.Image:
    """Draw samples: a grid of images, or a scatter plot of points.

    Args:
      x: images `[n, height, width, channels]` (see `image_grid`), or points `[n, features]`, of
        which the first two features are drawn.
      classes: if sample i is of class i modulo this number, the grid has one row per class.

    Raises:
      ValueError: if x is neither, such as signals `[n, length, channels]`.
    """
    if x.ndim == 2:
        return scatter(x)
    if x.ndim != 4:
        raise ValueError(
            f"samples of shape {x.shape}: need images [n, height, width, channels] or points "
            "[n, features] for a picture"
        )
    if not classes:
        return image_grid(x, _columns(len(x)))
    columns = len(x) // classes
    by_class = x.reshape(columns, classes, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
    return image_grid(by_class, columns)


def _columns(n):
    """Columns of a full grid, at most eight times as wide as high, or of one nearly full."""
    root = math.isqrt(max(n - 1, 0)) + 1  # rounded up
    return next((c for c in range(root, n + 1) if n % c == 0 and c * c <= 8 * n), root)


def walk_frames(x_t: np.ndarray, x_0: np.ndarray, classes: int = 0) -> list[Image.Image]:
    """Draw the frames of a walk: x_t on the left, the estimate of x_0 on the right.

    Args:
      x_t: images or points after each step, `[steps, n, ...]`.
      x_0: the estimates that these steps used, of the same shape.
      classes: as in `samples`.
    """
    frames = []
    for pair in zip(x_t, x_0, strict=True):
        left, right = (np.asarray(samples(np.asarray(x), classes)) for x in pair)
        gap = np.full((len(left), 16, *left.shape[2:]), 255, np.uint8)
        frames.append(Image.fromarray(np.concatenate([left, gap, right], axis=1)))
    return frames


def save_animation(
    frames: Sequence[Image.Image], path: Path | str, seconds: float = 0.08, hold: float = 1.5
) -> None:
    """Write frames as an animation that repeats.

    Args:
      frames: pictures of one size.
      path: a `.gif` file, or a `.webp` file, which is smaller and keeps colours exactly.
      seconds: time for which each frame is shown; a GIF counts in hundredths of a second.
      hold: time for which the last frame is shown.

    Raises:
      ValueError: if the path has another suffix, there are no frames, or a time is below 0.02 s,
        which browsers do not show.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".webp") or not frames or min(seconds, hold) < 0.02:
        raise ValueError(
            f"{path}, {len(frames)} frames, {seconds=}, {hold=}: need a path ending in .gif or "
            ".webp, a frame, and times of at least 0.02 s"
        )
    times = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
    others = {"append_images": frames[1:], "duration": times, "loop": 0, "lossless": True}
    frames[0].save(path, save_all=True, **others)


def panels(
    rows: int = 1, columns: int = 1, width: float = 4.0, height: float = 3.0
) -> tuple[Figure, list[Axes]]:
    """Make a figure of empty axes in the style of all pictures here.

    Args:
      rows: number of rows of axes.
      columns: number of columns of axes.
      width: width of each, in inches.
      height: height of each, in inches.

    Returns:
      The figure, and its axes, row by row.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"figures need matplotlib: {install('plots')}") from error
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained", dpi=120)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    dashes = [dash for dash in ("-", "--", ":") for _ in COLOURS]
    for ax in axes:
        ax.set_prop_cycle(color=COLOURS * 3, linestyle=dashes)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["bottom", "left"]].set_color(INK)
        ax.grid(color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", colors=INK, labelsize=8, length=2.5)
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
            text.set(size=9, color=INK)
    return figure, axes


def rendered(figure: Figure) -> Image.Image:
    """Render a figure as an image, for an animation or a metrics writer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def sample_grid(x: np.ndarray, classes: int = 0, ax: Axes | None = None) -> Figure:
    """Draw `samples` into axes, for example beside other pictures.

    Args:
      x: images, or points.
      classes: as in `samples`.
      ax: axes to draw into; a new figure by default.
    """
    ax = _bare(_axes(ax))
    ax.imshow(samples(np.asarray(x), classes), cmap="gray", vmin=0, vmax=255)
    return _figure(ax)


def denoising_strip(
    x_t: np.ndarray,
    x_0: np.ndarray,
    ts: np.ndarray,
    columns: int = 9,
    ax: Axes | None = None,
) -> Figure:
    """Draw a walk from left to right: for each example x_t, and below it the estimate of x_0.

    Args:
      x_t: images after each step, `[steps, n, height, width, 1 or 3]`; clipped to [-1, 1].
      x_0: the estimates that these steps used, of the same shape.
      ts: the times after these steps, `[steps]`.
      columns: number of steps to show, evenly spaced, including the first and the last.
      ax: axes to draw into; a new figure by default.

    Raises:
      ValueError: if the arrays are not images, or their shapes do not agree.
    """
    x_t, x_0, ts = np.asarray(x_t), np.asarray(x_0), np.asarray(ts)
    if x_t.ndim != 5 or x_t.shape != x_0.shape or ts.shape != x_t.shape[:1] or columns < 1:
        raise ValueError(
            f"x_t {x_t.shape}, x_0 {x_0.shape}, ts {ts.shape}, {columns=}: need images [steps, n, "
            "height, width, 1 or 3] of equal shapes, times [steps], and at least one column"
        )
    shown = np.unique(np.linspace(0, len(ts) - 1, columns).round().astype(int))
    n, columns = x_t.shape[1], len(shown)
    # From [step, 2, example, ...] to rows of (example, x_t or x_0) and columns of steps.
    both = np.stack([x_t[shown], x_0[shown]], 1).swapaxes(0, 2)
    picture = image_grid(both.reshape(-1, *x_t.shape[2:]), columns)
    cell_width, cell_height = picture.width / columns, picture.height / (2 * n)
    if ax is None:
        ax = panels(1, 1, 0.75 * columns, 0.75 * columns * picture.height / picture.width)[1][0]
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
    _bare(ax).set_xticks((np.arange(columns) + 0.5) * cell_width, [f"{t:.2g}" for t in ts[shown]])
    ax.set_yticks((np.arange(2 * n) + 0.5) * cell_height, ["$x_t$", r"$\hat x_0$"] * n)
    ax.tick_params(length=0)
    ax.set_xlabel("$t$")
    return _figure(ax)


def schedule_curves(
    schedules: Mapping[str, Schedule], axes: Sequence[Axes] | None = None
) -> Figure:
    """Plot log-SNR, alpha and sigma over t for several schedules.

    Args:
      schedules: schedules by name.
      axes: three axes to draw into; a new figure by default.
    """
    axes = panels(1, 3, 3.2, 2.8)[1] if axes is None else axes
    t = jnp.linspace(0, 1, 401)
    for name, schedule in schedules.items():
        alpha, sigma = schedule(t)
        for ax, y in zip(axes, (schedule.log_snr(t), alpha, sigma), strict=True):
            ax.plot(t, np.broadcast_to(y, t.shape), label=name)
    for ax, label in zip(axes, ("log-SNR", r"$\alpha_t$", r"$\sigma_t$"), strict=True):
        ax.set(xlabel="$t$", ylabel=label)
    if axes[2].get_ylim()[1] > 4:  # variance exploding
        axes[2].set_yscale("log")
    _legend(axes[0])
    return _figure(axes[0])


def weight_curves(
    weights: Mapping[str, Callable[[Array], Any]],
    low: float = -12.0,
    high: float = 12.0,
    ax: Axes | None = None,
) -> Figure:
    """Plot functions of log-SNR, such as `losses.effective_weight` of several objectives.

    Args:
      weights: functions by name, from log-SNR `[n]` to weights `[n]`; zeros are not drawn.
      low: the smallest log-SNR.
      high: the largest log-SNR.
      ax: axes to draw into; a new figure by default.
    """
    ax = _axes(ax, xlabel="log-SNR", ylabel=r"weight of $|x_0 - \hat x_0|^2$", yscale="log")
    log_snr = jnp.linspace(low, high, 401)
    for name, weight in weights.items():
        y = np.asarray(weight(log_snr), np.float64)
        ax.plot(log_snr, np.where(y > 0, y, np.nan), label=name)
    _legend(ax)
    return _figure(ax)


def loss_by_log_snr(rows: Mapping[str, Mapping[str, Any]], ax: Axes | None = None) -> Figure:
    """Plot the loss over log-SNR for several rows of metrics.

    Args:
      rows: rows by name, of one run or of several; rows without `loss_by_log_snr` are left out.
      ax: axes to draw into; a new figure by default.
    """
    ax = _axes(ax, xlabel="log-SNR", ylabel="loss", yscale="log")
    for (name, row), colour in zip(rows.items(), itertools.cycle(COLOURS)):
        if "loss_by_log_snr" in row:
            losses = np.array(row["loss_by_log_snr"], np.float64)  # None becomes nan
            ax.stairs(losses, LOG_SNR_EDGES, baseline=None, color=colour, linewidth=1.5, label=name)
    _legend(ax)
    return _figure(ax)


def training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str = "loss", ax: Axes | None = None
) -> Figure:
    """Plot a metric of several runs over training steps, with dots for held-out data.

    Args:
      runs: rows of metrics, as `metrics.read` returns them, by name of the run.
      metric: name of the metric; its value on held-out data has this name after `eval_`.
      ax: axes to draw into; a new figure by default.
    """
    ax = _axes(ax, xlabel="step", ylabel=metric.replace("_", " "), yscale="log")
    for (name, rows), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        for key, style, label in (
            (metric, {}, name),
            (f"eval_{metric}", {"marker": "o", "markersize": 3.5, "linestyle": ""}, None),
        ):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, label=label, **style)
    _legend(ax)
    return _figure(ax)


def distances(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Plot the distances of samples to data that a run has measured, over its steps.

    Args:
      rows: rows of metrics, as `metrics.read` returns them; some have `eval_frechet` or the like.
    """
    found = {k: None for row in rows for k in row if k.startswith("eval_") and k != "eval_loss"}
    figure, axes = panels(1, len(found) or 1)
    for name, ax in zip(found, axes, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        ax.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=COLOURS[0])
        ax.set_xlabel("step")
        ax.set_title(name.removeprefix("eval_"))
    return rendered(figure)


def progress(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Plot the progress of a run: its training curve, and its loss by log-SNR early and late.

    The loss of training is that of the parameters, and the held-out loss that of their moving
    average.

    Args:
      rows: rows of metrics, as `metrics.read` returns them.
    """
    figure, (left, right) = panels(1, 2)
    training_curves({"training": rows}, ax=left)
    left.plot([], [], "o", markersize=3.5, color=COLOURS[0], label="held out, by the average")
    _legend(left)
    some = dict.fromkeys(rows[i]["step"] for i in (0, len(rows) // 4, -1) if rows)
    by_step = {row["step"]: row for row in rows}
    loss_by_log_snr({f"step {step}": by_step[step] for step in some}, right)
    return rendered(figure)


def order(evaluations: Sequence[int], errors: Sequence[float]) -> float:
    """Estimate the order of convergence: minus the slope of log error over log evaluations.

    >>> round(order([10, 20, 40], [0.4, 0.1, 0.025]), 6)
    2.0
    """
    return -float(np.polyfit(np.log(evaluations), np.log(errors), 1)[0])


def convergence(
    errors: Mapping[str, tuple[Sequence[int], Sequence[float]]], ax: Axes | None = None
) -> Figure:
    """Plot errors over evaluations of the network, labelled with the order of convergence.

    Args:
      errors: positive evaluations `[n]` and errors `[n]`, by name; the order is fitted to all of
        them, so give only the range in which it holds.
      ax: axes to draw into; a new figure by default.
    """
    ax = _axes(ax, xlabel="evaluations", ylabel="error", xscale="log", yscale="log")
    for name, (evaluations, error) in errors.items():
        label = f"{name}, order {order(evaluations, error):.1f}"
        ax.plot(evaluations, error, marker="o", markersize=3.5, label=label)
    counts = sorted({int(n) for evaluations, _ in errors.values() for n in evaluations})
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.set_xticks([], minor=True)
    _legend(ax)
    return _figure(ax)


def bound_terms(
    ts: np.ndarray,
    terms: Mapping[str, np.ndarray],
    ax: Axes | None = None,
) -> Figure:
    """Plot the terms of the bound over time, such as `denoising_term` at many times.

    Args:
      ts: times `[n]`.
      terms: terms by name, in nats, `[n]`, or `[n, batch]`, of which the mean is drawn with its
        standard error shaded.
      ax: axes to draw into; a new figure by default.
    """
    ax = _axes(ax, xlabel="$t$", ylabel="nats", yscale="log")
    for name, values in terms.items():
        values = np.asarray(values, np.float64)
        each = values.reshape(len(values), -1)
        mean = each.mean(1)
        (line,) = ax.plot(ts, mean, label=name)
        if values.ndim > 1:
            error = each.std(1, ddof=1) / np.sqrt(each.shape[1])
            ax.fill_between(
                ts, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0
            )
    _legend(ax)
    return _figure(ax)


def density(
    log_density: Callable[[Array], Any],
    low: float = -3.0,
    high: float = 3.0,
    ax: Axes | None = None,
) -> Figure:
    """Draw the regions of the plane that hold the fractions `MASSES` of a distribution.

    Args:
      log_density: a function from points `[n, 2]` to log densities `[n]`, up to a constant, such
        as `lambda x: oracle.log_density(x, 0.5)`.
      low: the smallest value of both coordinates.
      high: the largest value of both coordinates.
      ax: axes to draw into; a new figure by default.
    """
    ax = _plane(ax)
    side = np.linspace(low, high, 161)
    log_p = np.asarray(log_density(_mesh(side)), np.float64).reshape(len(side), -1)
    p = np.exp(log_p - log_p.max())
    falling = np.sort(p.ravel())[::-1]
    held = np.cumsum(falling) / falling.sum()
    levels = np.unique(falling[[np.searchsorted(held, mass) for mass in MASSES]])
    ax.contourf(side, side, p, levels=levels, extend="max", cmap="Blues", alpha=0.55, zorder=0)
    return _figure(ax)


def vector_field(
    field: Callable[[Array], Any],
    low: float = -3.0,
    high: float = 3.0,
    n: int = 17,
    equal: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Draw a vector field, such as a score or a network's output, as arrows on a grid.

    Args:
      field: a function from points `[n, 2]` to vectors `[n, 2]`, such as
        `lambda x: oracle.score(x, 0.5)`.
      low: the smallest value of both coordinates.
      high: the largest value of both coordinates.
      n: arrows per side.
      equal: draw all arrows with the same length, for vectors of very different lengths.
      ax: axes to draw into; a new figure by default.
    """
    ax = _plane(ax)
    points = _mesh(np.linspace(low, high, n))
    vectors = np.asarray(field(points), np.float64)
    if equal:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    ax.quiver(*np.asarray(points).T, *vectors.T, angles="xy", color=INK, width=0.004, zorder=2)
    return _figure(ax)


def trajectories(x: np.ndarray, ax: Axes | None = None) -> Figure:
    """Draw walks in the plane, each from a ring at its start to a dot at its end.

    Args:
      x: points `[steps, n, 2]`: the start, then the points that `sample` records after each step.
      ax: axes to draw into; a new figure by default.
    """
    ax, x = _plane(ax), np.asarray(x)
    ax.plot(x[..., 0], x[..., 1], "-", color=COLOURS[1], linewidth=0.7, alpha=0.7)
    ax.plot(*x[0].T, "o", markersize=3, color=COLOURS[1], markerfacecolor="white")
    ax.plot(*x[-1].T, "o", markersize=3, color=COLOURS[1])
    return _figure(ax)


def arrow(
    ax: Axes, tail: np.ndarray, head: np.ndarray, label: str = "", color: str = COLOURS[0]
) -> None:
    """Draw an arrow between two points, with a label to the left of its direction.

    The limits of the axes are extended to include both points.

    Args:
      ax: axes to draw into.
      tail: the start `[2]`.
      head: the end `[2]`.
      label: text of the label.
      color: colour of the arrow and the label.
    """
    tail, head = np.asarray(tail, float), np.asarray(head, float)
    middle = (tail + head) / 2
    style = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.4}
    _plane(ax).annotate("", tuple(head), tuple(tail), arrowprops=style, zorder=3)
    ax.update_datalim([tail, head])
    ax.autoscale_view()
    along = (head - tail) / max(float(np.linalg.norm(head - tail)), 1e-30)
    left = np.array([-along[1], along[0]])
    # Align the text by the side that faces the arrow, or by its centre if no side does.
    across, up = np.sign(np.round(left, 0)).astype(int)
    ax.annotate(
        label,
        tuple(middle),
        tuple(5 * left),
        textcoords="offset points",
        color=color,
        size=9,
        ha=("center", "left", "right")[across],
        va=("center", "bottom", "top")[up],
    )


def circle(
    ax: Axes, centre: np.ndarray, radius: float, label: str = "", color: str = COLOURS[0]
) -> None:
    """Draw a circle, such as one standard deviation about a mean, with a label above it.

    Args:
      ax: axes to draw into.
      centre: the centre `[2]`.
      radius: the radius, in the units of the axes.
      label: text of the label.
      color: colour of the circle and the label.
    """
    from matplotlib.patches import Circle

    x, y = np.asarray(centre, float)
    _plane(ax).add_patch(Circle((x, y), radius, fill=False, color=color, linewidth=1.2, zorder=3))
    ax.autoscale_view()
    ax.annotate(
        label, (x, y + radius), (0, 6), textcoords="offset points", color=color, size=9, ha="center"
    )


def _axes(ax: Axes | None, **options: Any) -> Axes:
    ax = panels()[1][0] if ax is None else ax
    ax.set(**options)
    return ax


def _plane(ax: Axes | None) -> Axes:
    """Give both coordinates of the axes the same scale."""
    ax = panels(1, 1, 3.6, 3.6)[1][0] if ax is None else ax
    ax.set_aspect("equal", adjustable="box")
    ax.grid(visible=False)
    return ax


def _bare(ax):
    """Remove grid, spines and ticks from axes that show pixels."""
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])
    return ax


def _figure(ax: Axes) -> Figure:
    return cast("Figure", ax.get_figure(root=True))


def _legend(ax):
    if len(ax.get_legend_handles_labels()[1]) > 0:
        ax.legend(frameon=False, fontsize=8, labelcolor=INK)


def _mesh(side):
    """All points of a square grid, `[n * n, 2]`; the first coordinate varies fastest."""
    return jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2))
