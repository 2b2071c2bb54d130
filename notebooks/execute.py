"""Execute the notebooks: each NAME.py is run, and written with its outputs as NAME.ipynb.

    make notebooks                                # all of them
    python notebooks/execute.py 01 04             # some

The `.py` files are the sources (Jupytext's percent format): edit those. The `.ipynb` beside each is
for reading on GitHub, so its pictures are reduced to 256 colours and nothing that changes from run
to run is kept, as far as it can be.
"""

import base64
import io
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent


def sources(names: tuple[str, ...] = ("",)) -> list[Path]:
    """The notebooks whose names begin with one of these."""
    return sorted(path for name in names for path in HERE.glob(f"{name or '[0-9]'}*.py"))


def read(source: Path) -> nbformat.NotebookNode:
    """A notebook without outputs, from its source. Its cells are named by their position."""
    notebook = jupytext.read(source)
    notebook.metadata.pop("jupytext", None)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata = {}
    return notebook


def execute(source: Path) -> nbformat.NotebookNode:
    """The same, executed; raises `nbclient.exceptions.CellExecutionError` if a cell fails."""
    client = NotebookClient(
        read(source), resources={"metadata": {"path": HERE}}, record_timing=False, timeout=1200
    )
    # The first cell asks `python` for diffjax: that should be this one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    notebook = client.execute(env={**os.environ, "PATH": path})
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                output.data = {"image/png": fewer_colours(png), "text/plain": "a picture"}
    return notebook


def fewer_colours(png: str) -> str:
    """The same picture in base64, a third as large."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    few = picture.quantize(256, kmeans=1, dither=Image.Dither.NONE)
    few.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for source in sources(tuple(sys.argv[1:]) or ("",)):
        began = time.perf_counter()
        nbformat.write(execute(source), source.with_suffix(".ipynb"))
        print(f"{source.stem}: {time.perf_counter() - began:.0f} s", flush=True)
