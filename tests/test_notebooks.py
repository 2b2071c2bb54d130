"""The notebooks: each agrees with its pair, uses names that exist, and (slow) runs."""

import ast
import functools
import importlib
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import execute

SOURCES = execute.sources()


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def source(request):
    return request.param


def test_the_pair_agrees(source):
    """What is read on GitHub is what the source says, executed in order, without an error."""
    ours = execute.read(source)
    theirs = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    parts = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert parts(ours) == parts(theirs), "run: make notebooks"
    nbformat.validate(theirs)
    code = [cell for cell in theirs.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {"stderr", "error"}.isdisjoint(o.get("name", o.output_type) for o in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert source.with_suffix(".ipynb").stat().st_size < 400_000


def test_every_name_of_diffjax_exists(source):
    """Attributes of diffjax and of its modules, and what is imported from them; none private."""
    modules, used = {}, []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "diffjax":
            for alias in node.names:
                used.append((node.module, alias.name))
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        if isinstance(node, ast.Attribute):
            used.append((ast.unparse(node.value), node.attr))
    modules["diffjax"] = "diffjax"
    ours = [(where, name) for where, name in used if where.split(".")[0] in ("diffjax", *modules)]
    assert len(ours) > 5
    for where, name in ours:
        first, *rest = where.split(".")
        parts = ".".join([modules.get(first, first), *rest]).split(".")[1:]
        owner = functools.reduce(getattr, parts, importlib.import_module("diffjax"))
        assert hasattr(owner, name) and not name.startswith("_"), f"{where}.{name}"


@pytest.mark.faults
def test_it_runs(source, monkeypatch):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):  # those of the tests
        monkeypatch.delenv(name, raising=False)
    execute.execute(source)
