"""What the project promises of itself: layers, documentation, a README that runs."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

import diffjax
from catalogue import SAMPLERS, SCHEDULES, TARGETS, WEIGHTINGS
from diffjax import samplers, schedules, weightings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffjax"

MAY_IMPORT = {
    "types": set(),
    "keys": {"types"},
    "schedules": {"types"},
    "weightings": {"types"},
    "targets": {"types"},
    "process": {"types", "keys", "schedules"},
    "denoisers": {"types", "schedules", "process", "targets"},
    "losses": {"types", "keys", "schedules", "process", "targets", "weightings"},
    "loss_aware": {"types", "losses"},
    "learned_variance": {
        *("types", "schedules", "process", "targets", "denoisers", "weightings", "losses"),
        "likelihood",
    },
    "ode": {"types", "schedules", "process"},
    "oracles": {"types", "keys", "schedules", "process", "ode"},
    "samplers": {"types", "keys", "schedules", "process", "ode", "samplers"},
    "likelihood": {"types", "keys", "schedules", "process", "ode"},
    "inverse": {"types", "keys", "schedules", "process", "denoisers", "samplers"},
    "super_resolution": {"types", "keys", "schedules", "process", "inverse"},
    "models": {"types", "models"},
    "training": {"types", "keys"},
    "data": {"data"},
    "files": set(),
    "preemption": set(),
    "parallel": {"preemption", "telemetry"},
    "launch": {"parallel", "preemption", "telemetry"},
    "telemetry": set(),
    "metrics": {"types", "files", "telemetry", "writers"},
    "writers": set(),
    "plots": {"types", "schedules", "data", "metrics"},
    "evaluation": set(),
    "provenance": set(),
    "classifier": {"types", "data", "config"},
    "features": {"classifier", "evaluation", "provenance"},
    "comparison": {"config", "plots"},
    "drawing": {"types", "config", "data", "experiment", "parallel", "provenance"},
    "pretrained": set(),
}
"""Which of diffjax's modules a module may import; those above all others are not listed."""


def imports_of(path):
    """The modules of diffjax that a file imports, by their first name below the package."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = depth - node.level > 0  # of a sub-package such as models/
            if inside:
                found.add(path.relative_to(PACKAGE).parts[0])
            elif node.module:
                found.add(node.module.split(".")[0])
            else:
                found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_layers(name):
    path = PACKAGE / name
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        assert imports_of(file) <= MAY_IMPORT[name], file


def test_importing_the_core_imports_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import jax, numpy, jaxtyping; "
        "known = {m.split('.')[0] for m in sys.modules}; import diffjax; "
        "print(sorted({m.split('.')[0] for m in sys.modules} - known))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['diffjax']", done.stdout + done.stderr


def test_the_catalogue_is_complete():
    """A public schedule, target, weighting or sampler that the tests do not cover is an error."""

    def public(module, returns):
        for name, f in vars(module).items():
            if inspect.isfunction(f) and not name.startswith("_"):
                hint = typing.get_type_hints(f).get("return")
                if hint is returns:
                    yield name

    made = " ".join(inspect.getsource(sys.modules["catalogue"]).split())
    for name in public(diffjax.schedules, diffjax.Schedule):
        assert f"diffjax.{name}(" in made, name
    for name in public(diffjax.samplers, diffjax.Sampler):
        assert f"diffjax.{name}" in made, name
    plain = [
        name
        for name, f in vars(weightings).items()
        if inspect.isfunction(f) and list(inspect.signature(f).parameters)[:1] == ["log_snr"]
    ]
    assert len(plain) > 3
    for name in (*plain, *public(weightings, weightings.Weighting)):
        assert f"weightings.{name}" in made, name
    assert set(schedules.SCHEDULES) <= set(SCHEDULES)
    assert set(samplers.SAMPLERS) <= set(SAMPLERS)
    assert set(weightings.WEIGHTINGS) <= set(WEIGHTINGS)
    assert set(diffjax.TARGETS) == set(TARGETS)


def test_every_public_name_is_documented_with_its_arguments():
    for name in diffjax.__all__:
        item = getattr(diffjax, name)
        if inspect.isfunction(item):
            assert item.__doc__, name
            parameters = inspect.signature(item).parameters
            if len(parameters) > 3:
                described = [p for p in parameters if re.search(rf"\b{p}\b", item.__doc__)]
                assert len(described) == len(parameters), (name, set(parameters) - set(described))


def test_the_switch_between_targets_is_written_once():
    """No file but targets.py compares a target with a name."""
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]:
        if path.name != "targets.py":
            assert not re.search(r"target\w* (==|!=|in) ", path.read_text()), path


def test_the_readmes_quickstart_runs(capsys):
    block, second = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(block.strip().splitlines()) <= 30
    scope = {}
    exec(block, scope)
    assert scope["samples"].shape == scope["mean"].shape == (256, 2)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "x_0",
        "eps",
        "score",
    ]
    exec(second, scope)
    known = scope["data"].log_density(scope["x_0"], 0.0)
    error = abs(scope["log_p"] - known)
    # Between the modes the flow parts, and 100 steps are coarse for it.
    assert np.median(error) < 1e-3 and error.max() < 0.05


def test_every_link_of_the_readme_leads_somewhere():
    for path in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


def test_train_py_stays_a_story():
    assert len((ROOT / "train.py").read_text().splitlines()) < 200


def test_the_page_on_performance_says_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = importlib.import_module("page")
    assert page.text() == page.PAGE.read_text()


def test_the_page_of_results_says_what_is_on_record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    results = importlib.import_module("results")
    record = json.loads(results.RECORD.read_text())
    assert results.page(record) == (results.DOCS / "results.md").read_text()


def test_one_more_run_lies_in_the_band_of_those_on_record(monkeypatch):
    """But once in a thousand, if the numbers are normal."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    results = importlib.import_module("results")
    rng, outside = np.random.default_rng(0), 0
    for draw in rng.normal(3.0, 0.2, (5000, 4, 4)):
        on_record = {
            str(i): {str(seed): {"x": x} for seed, x in enumerate(runs[:3])}
            for i, runs in enumerate(draw)
        }
        bands = results.bands(on_record, "x")
        outside += sum(not low <= draw[int(i), 3] <= high for i, (low, high) in bands.items())
    assert 5 < outside < 40  # 20 expected
