"""The notebooks: each agrees with its pair, uses names that exist, and (slow) runs."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest

import diffjax

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import execute

SOURCES = execute.sources()


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def source(request):
    return request.param


def check(notebook):
    """It was executed in order, without an error or a warning, and has a picture."""
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    wrong = [o for o in outputs if o.get("name", o.output_type) in ("stderr", "error")]
    assert not wrong, wrong
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_pair_agrees(source):
    """What is read on GitHub is what the source says."""
    ours = execute.read(source)
    theirs = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    parts = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert parts(ours) == parts(theirs), "run: make notebooks"
    check(theirs)
    assert source.with_suffix(".ipynb").stat().st_size < 400_000


def test_every_name_of_diffjax_exists(source):
    """What is imported from diffjax, and the attributes of that and of diffjax; none private."""
    tree, scope = ast.parse(source.read_text()), {"diffjax": diffjax}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "diffjax":
            exec(ast.unparse(node), scope)
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    ours = [name for name in names if re.fullmatch(r"(\w+\.)+\w+", name)]
    ours = [name for name in ours if name.split(".")[0] in scope]
    assert len(ours) > 5
    for name in ours:
        eval(name, scope)
        assert "._" not in name


@pytest.mark.faults
def test_it_runs(source, monkeypatch):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):  # those of the tests
        monkeypatch.delenv(name, raising=False)
    check(execute.execute(source))
