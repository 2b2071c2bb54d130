"""Execute the notebooks: run each NAME.py, and write it with its outputs as NAME.ipynb.

    make notebooks                                # all of them
    python notebooks/execute.py 01 04             # some

Edit the `.py` files, which are the sources, in Jupytext's percent format. The `.ipynb` beside each is
for reading on GitHub: its pictures are reduced to 256 colours, and what changes from run to run is
left out as far as possible.
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
    """The notebook of a source with its outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    client = NotebookClient(
        read(source),
        resources={"metadata": {"path": HERE}},
        record_timing=False,
        coalesce_streams=True,  # how a cell's text is split depends on timing
        timeout=1200,
    )
    # The first cell runs `python`, which should be the one that runs this.
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
    """The same picture with 256 colours, in base64; it is a third as large."""
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
