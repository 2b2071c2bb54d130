"""Pictures: grids of samples by Pillow, curves by Matplotlib (the extra `plots`)."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def image_grid(x: np.ndarray, columns: int, height: int = 56) -> Image.Image:
    """Images `[n, height, width, 1 or 3]` in [-1, 1] as one picture, row by row.

    Small images are enlarged by a whole factor to about `height` pixels.
    """
    n, h, w, c = x.shape
    scale = max(1, height // h)
    rows = -(-n // columns)
    pixels = np.clip(np.round((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    grid = np.full((rows * columns, h * scale + 2, w * scale + 2, c), 255, np.uint8)
    grid[:n, 1:-1, 1:-1] = pixels
    grid = grid.reshape(rows, columns, *grid.shape[1:]).swapaxes(1, 2)
    grid = grid.reshape(rows * (h * scale + 2), columns * (w * scale + 2), c)
    return Image.fromarray(grid[..., 0] if c == 1 else grid)


def scatter(x: np.ndarray, size: int = 480) -> Image.Image:
    """Points `[n, 2]` as a picture: the more, the darker; those beyond 1.25 are on its border."""
    x = np.clip(x, -1.25, 1.25)
    counts, _, _ = np.histogram2d(-x[:, 1], x[:, 0], bins=size // 4, range=[[-1.25, 1.25]] * 2)
    ink = 255 * np.exp(-3 * counts / max(counts.max(), 1))
    return Image.fromarray(ink.astype(np.uint8).repeat(4, 0).repeat(4, 1))


def save_samples(x: np.ndarray, classes: int, path: Path) -> None:
    """Samples to a PNG file: a grid of images, or a scatter plot of vectors.

    With classes, sample i being of class i modulo their number, the grid has a row for each.
    """
    if x.ndim != 4:
        picture = scatter(x)
    elif classes:
        columns = len(x) // classes
        picture = image_grid(
            x.reshape(columns, classes, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), columns
        )
    else:
        picture = image_grid(x, int(len(x) ** 0.5))
    picture.save(path)


def save_loss_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """The training loss and the held-out loss of rows of metrics, to a PNG file.

    Without Matplotlib there is no picture, and a warning.
    """
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn(f"no {path}: pip install 'diffjax[plots]' for curves", stacklevel=2)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for name, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=3, label=name)
    axes.legend()
    figure.savefig(path, dpi=120)
