"""Measure how many images a core reads from each form of data: the table of docs/howto/data.md.

    python studies/reading.py

The images are made on the spot: smooth random fields with some noise, which shrink about as
photographs do. What is measured is CPU time, of this process alone.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from diffjax import data
from diffjax.data import convert
from markdown_table import table


def fields(n: int, side: int) -> np.ndarray:
    """n colour images, uint8 `[n, side, side, 3]`."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(n):
        small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
        large = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), int)
        made.append(np.clip(large + rng.normal(0, 6, large.shape), 0, 255).astype(np.uint8))
    return np.stack(made)


def speed(read: Callable[[int], object], batch: int, seconds: float = 3.0) -> float:
    """Images per second of CPU time, of a function that reads the batch of a step."""
    read(0)
    began, step = time.process_time(), 0
    while time.process_time() < began + seconds:
        step += 1
        read(step)
    return step * batch / (time.process_time() - began)


def measure(side: int, n: int, batch: int, folder: Path) -> dict[str, float]:
    """Images per second of each form of the same images."""
    x = fields(n, side)
    parts = data.Dataset(data.Examples(x), data.Examples(x[:1]))
    forms = {"memory": parts}
    for encoding in ("raw", "png", "jpeg"):
        convert.convert(parts, folder / encoding, encoding)
        forms[f"records, {encoding}"] = data.load("records", folder / encoding)
    files = folder / "files"
    files.mkdir()
    for i, each in enumerate(x):
        Image.fromarray(each).save(files / f"{i}.png")
    forms["folder of PNG"] = data.load("folder", files)
    return {
        name: speed(lambda step, d=d: data.train_batch(d.train, 0, step, batch), batch)
        for name, d in forms.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 256])
    parser.add_argument("--n", type=int, default=2000, help="number of images of 32 pixels")
    args = parser.parse_args()
    columns = {}
    for side in args.sides:
        n = max(100, args.n * 32 // side)
        with tempfile.TemporaryDirectory() as folder:
            columns[side] = measure(side, n, min(64, n // 2), Path(folder))
    rows = [
        [name, *(f"{columns[side][name]:,.0f}" for side in args.sides)]
        for name in columns[args.sides[0]]
    ]
    print(table(["images a second", *(f"{s}x{s}" for s in args.sides)], rows), end="")


if __name__ == "__main__":
    main()
