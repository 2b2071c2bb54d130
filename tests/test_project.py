"""What the project promises of itself: layers, tables, documentation, a README that runs."""

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from catalogue import SAMPLERS, SCHEDULES, TARGETS, WEIGHTINGS
from diffjax import couplings, data, weightings
from diffjax.densities import DENSITIES
from diffjax.evaluation import distances
from diffjax.experiment import (
    Config,
    Data,
    Eval,
    FlowMap,
    Optimizer,
    Sampling,
    Walk,
    command_line,
    resolve,
)
from diffjax.models import MODELS, make_module, name_of
from diffjax.samplers import multistep, onestep
from diffjax.training import runners
from diffjax.training.runners import RUNNERS
from diffjax.training.writers import WRITERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffjax"
STUDIES = ROOT / "studies"

MAY_IMPORT = {
    "mathematics": {"mathematics", "extras"},
    "models": {"mathematics", "models"},
    "data": {"data", "extras"},
    "extras": {"extras"},
    "training": {"mathematics", "training", "extras"},
    "plots": {"mathematics", "data", "extras"},
    "experiment": {"mathematics", "models", "data", "training", "experiment"},
    "published": {"mathematics", "models", "training", "experiment", "published"},
    "evaluation": {
        *("mathematics", "models", "data", "training", "plots"),
        *("experiment", "published", "evaluation"),
    },
    "doors": {"mathematics", "data", "training", "experiment", "published", "evaluation"},
}
"""Which parts of diffjax may import which. `mathematics` is every file and package of diffjax/ that
is not named here."""
OF_TRAINING = {"types", "keys", "losses", "averages"}
"""The mathematics that training may know: it trains anything."""
DOORS = {"checkpoint", "launch", "inspect", "export", "averages/__main__", "data/convert"}
"""Modules that users name: `diffjax.checkpoint.load` and `python -m diffjax.launch`."""


def part_of_file(path):
    """The part that a file of diffjax/ belongs to."""
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    return part_of(name if name in DOORS else name.split("/")[0])


def part_of(name):
    """The part that a module or package of diffjax/ belongs to."""
    if name in DOORS:
        return "doors"
    return name if name in MAY_IMPORT else "mathematics"


def imports_of(path):
    """The first names below diffjax of the modules that a file imports from it."""
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = parts[: len(parts) - node.level]  # of a package such as training/
            if inside:
                yield inside[0]
            elif node.module:
                yield node.module.split(".")[0]
            else:
                yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_layers(path):
    part = part_of_file(path)
    imported = {name for name in imports_of(path) if name != "__version__"}
    assert {part_of(name) for name in imported} <= MAY_IMPORT[part]
    if part in ("training", "models"):
        core = {name for name in imported if part_of(name) == "mathematics"}
        assert core <= OF_TRAINING


def test_the_mathematics_knows_of_nothing_else():
    """Its files import JAX, NumPy, jaxtyping and the standard library; two functions more."""
    allowed = {"jax", "numpy", "jaxtyping", "diffrax", "scipy", *sys.stdlib_module_names}
    for path in PACKAGE.rglob("*.py"):
        if part_of_file(path) == "mathematics":
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [str(node.module)]
                assert {name.split(".")[0] for name in names} <= allowed, path


def test_importing_the_core_imports_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import jax, numpy, jaxtyping; "
        "known = {m.split('.')[0] for m in sys.modules}; import diffjax; "
        "print(sorted({m.split('.')[0] for m in sys.modules} - known))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['diffjax']", done.stdout + done.stderr


def returning(module, kind):
    """The public functions that a module defines and that return a `kind`."""
    for name, f in vars(module).items():
        if inspect.isfunction(f) and not name.startswith("_") and f.__module__ == module.__name__:
            hint = typing.get_type_hints(f).get("return")
            if hint == kind:
                yield name


@pytest.mark.parametrize(
    "command",
    [
        *("train.py", "sample.py", "evaluate.py"),
        *(f"-m diffjax.{name}" for name in ("averages", "inspect", "export", "data.convert")),
    ],
)
def test_every_command_explains_itself(command):
    """As it was typed, and without comments of the source."""
    argv = [sys.executable, *command.split(), "--help"]
    shown = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert f"usage: {command.replace('-m', 'python -m')} " in shown and "noqa" not in shown


@pytest.mark.parametrize("name", diffjax.GUIDANCES)
def test_what_a_guidance_returns_is_a_prediction(name):
    """Whatever it does to x_0 and eps, they add up to x_t; and it is chosen by its name."""
    parameters = inspect.signature(diffjax.GUIDANCES[name]).parameters
    _, *others = parameters.values()
    needed = [
        p.name
        for p in others
        if p.default is p.empty and p.name not in ("denoise", "schedule", "null")
    ]
    options = ",".join(f"{option}={2 * i + 1}" for i, option in enumerate(needed))
    model = MODELS["unet"].config(labels=3, null_label=True)
    # Some change the guidance before them.
    before = ("cfg_zero:weight=2",) if "denoise" in list(parameters)[1:] else ()
    sampling = Sampling(guidance=(*before, f"{name}:{options}".rstrip(":")))
    e = resolve(Config(model=model, sampling=sampling))
    network = lambda x_t, log_snr, cond: jnp.tanh(x_t + cond["label"][:, None])
    x_t, t = jax.random.normal(jax.random.key(0), (4, 5)), 0.3
    denoise = e.denoiser(network)
    guided = e.guide(denoise, weaker=denoise)(x_t, t, {"label": jnp.arange(4) % 3})
    alpha, sigma = diffjax.scales_at(e.schedule, t, x_t)
    np.testing.assert_allclose(alpha * guided.x_0 + sigma * guided.eps, x_t, rtol=1e-5, atol=1e-6)


def test_every_row_is_there_and_every_row_is_tested():
    """A schedule, weighting, sampler or guidance that was left out of its table is found here."""
    made = " ".join(inspect.getsource(sys.modules["catalogue"]).split())
    # Those that take more than numbers are not in a table: the catalogue makes them itself.
    for name in returning(diffjax.schedules, diffjax.Schedule):
        assert name in diffjax.SCHEDULES or f"diffjax.{name}(" in made, name
    assert set(returning(weightings, weightings.Weighting)) <= set(weightings.WEIGHTINGS)
    assert set(returning(diffjax.densities, diffjax.densities.Density)) == set(DENSITIES)
    assert set(returning(couplings, couplings.Coupling)) == set(couplings.COUPLINGS)
    for module in (onestep, multistep):
        assert set(returning(module, diffjax.Sampler)) <= set(diffjax.SAMPLERS)
    guidances = set(returning(diffjax.guidance, diffjax.Denoiser))
    assert guidances == set(diffjax.GUIDANCES) | {"classifier_guidance"}  # which needs a function
    assert set(returning(diffjax.guidance, diffjax.Sampler)) == set(diffjax.STEP_GUIDANCES)
    assert set(returning(runners, runners.Runner)) == {*RUNNERS, "choose"}
    assert set(returning(data.readers, tuple)) == set(data.readers.READERS)
    assert set(returning(data.toy, np.ndarray)) == set(data.toy.TOYS)
    measured = {row.measure.__name__ for row in distances.METRICS.values()}
    for kind in (float, distances.Estimate):
        assert set(returning(distances, kind)) <= measured
    by_denoisers = {name for name, row in diffjax.SAMPLERS.items() if not row.two_times}
    assert set(diffjax.SAMPLERS) - by_denoisers == {"jump"}  # of test_flow_maps
    for table, rows in (
        (diffjax.SCHEDULES, SCHEDULES),
        (by_denoisers, SAMPLERS),
        (weightings.WEIGHTINGS, WEIGHTINGS),
        (diffjax.TARGETS, TARGETS),
    ):
        assert set(table) <= set(rows)
    # And each is public, if it is a function of its name.
    guidances = diffjax.GUIDANCES | diffjax.STEP_GUIDANCES
    for name in (*diffjax.SCHEDULES, *diffjax.SAMPLERS, *guidances):
        assert name in diffjax.__all__ and callable(getattr(diffjax, name))
    assert {row.times for row in diffjax.SAMPLERS.values()} <= set(diffjax.samplers.TIMES)


def test_every_name_of_a_table_can_be_asked_for_on_the_command_line(capsys):
    """`--help` lists all choices, whatever rows are added."""
    with pytest.raises(SystemExit):
        command_line.parse(["--help"])
    text = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    for table in (
        *(diffjax.TARGETS, diffjax.SCHEDULES, diffjax.SAMPLERS, diffjax.samplers.TIMES),
        *(weightings.WEIGHTINGS, DENSITIES, data.DATASETS, RUNNERS, WRITERS),
        *(diffjax.GUIDANCES | diffjax.STEP_GUIDANCES, couplings.COUPLINGS),
    ):
        assert "{" + ",".join(table) + "}" in text
    assert ",".join(MODELS) in text


def test_every_network_is_a_row_that_trains(tmp_path):
    """Its config is what a run needs to know of it, and its output has the shape of the data."""
    others = {"__init__", "autoencoder_kl", "layers", "sizes"}  # no networks of diffusion
    files = {p.stem for p in (PACKAGE / "models").glob("*.py")} - others
    assert files == set(MODELS)
    for name, row in MODELS.items():
        config = row.config()
        assert dataclasses.is_dataclass(config) and name_of(config) == name
        for field in ("dropout", "out_channels", "labels", "null_label"):
            getattr(config, field)
        takes = [shape for shape in ((32, 32, 3), (2,)) if accepts(config, shape)]
        assert takes, name
        make = functools.partial(make_module(config).init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((1, *takes[0]), np.float32)
        assert "params" in jax.eval_shape(make, x, jax.ShapeDtypeStruct((1,), np.float32), None)


def accepts(config, shape):
    try:
        config.check_input(shape)
    except ValueError:
        return False
    return True


def test_every_field_of_a_config_is_explained():
    """A field without a docstring is one that `--help` does not explain."""
    for section in (
        Config,
        Data,
        Optimizer,
        Walk,
        Sampling,
        Eval,
        FlowMap,
        *(row.config for row in MODELS.values()),
    ):
        tree = ast.parse(inspect.getsource(section)).body[0]
        for field, after in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign):
                sections = ("data", "optimizer", "sampling", "eval", "flow_map")
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert explained or field.target.id in sections, (section, field.target.id)


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
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 128
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(block.strip().splitlines()) <= 30
    scope = {}
    exec(block, scope)
    assert scope["samples"].shape == scope["mean"].shape == (256, 2)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "x_0",
        "eps",
        "score",
    ]


def test_what_the_first_page_says_of_an_oracle(capsys):
    page = (ROOT / "docs" / "start.md").read_text()
    *_, block = re.findall(r"```python\n(.*?)```", page, re.S)
    scope = {"jax": jax, "jnp": jnp, "diffjax": diffjax}
    exec(block, scope)
    error = scope["error"]
    # Between the modes the flow parts, and 100 steps are coarse for it.
    assert np.median(error) < 1e-3 and error.max() < 0.05
    assert re.search(r"first mode: 0\.(2[7-9]|3[0-3]), where", capsys.readouterr().out)


def test_every_message_that_says_how_to_install_an_extra_holds():
    """The words are in one place, and the extras that it is asked for are those of the package."""
    sources = {path: path.read_text() for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]}
    assert [path.name for path, text in sources.items() if "pip install" in text] == ["extras.py"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    asked = {name for text in sources.values() for name in re.findall(r"install\('(\w+)'\)", text)}
    assert asked and asked | {row.extra for row in WRITERS.values()} <= set(extras)


def test_every_link_of_the_readme_leads_somewhere():
    for path in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


def test_the_page_on_performance_says_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    speed_page = importlib.import_module("speed_page")
    assert speed_page.text() == speed_page.PAGE.read_text()


def test_the_page_on_accelerators_says_what_is_on_record(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    aot = importlib.import_module("aot")
    assert aot.page(aot.on_record()) == aot.PAGE.read_text()


@pytest.mark.parametrize("name", ["numerics", "samplers", "scaling"])
def test_a_page_that_is_measured_has_the_words_of_its_study(name):
    """All that its template has between the numbers, which only the study itself could check."""
    (template,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((STUDIES / f"{name}.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAGE"
    )
    words = map(re.escape, re.split(r"\{\w+(?::[^}]*)?\}", template))
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert re.fullmatch(".*".join(words), page, re.DOTALL)


UNMEASURED = {"studies/results/gpu.json", "studies/results/race.json"}
"""Records of studies that have not been run as a whole."""


def test_every_study_is_listed_and_every_study_that_is_named_exists():
    listed = (STUDIES / "README.md").read_text()
    for path in STUDIES.glob("*.py"):
        assert f"`{path.name}`" in listed, path
    for link in re.findall(r"\]\(([^)#]+)\)", listed):
        assert (STUDIES / link).exists(), link
    named = [ROOT / "Makefile", ROOT / "README.md", *STUDIES.glob("*.*")]
    for path in [*named, *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"\bstudies/[\w/]+\.(?:py|json)", path.read_text()):
            assert (ROOT / name).exists() or name in UNMEASURED, (path, name)


def test_the_page_of_results_says_what_is_on_record(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    results = importlib.import_module("results")
    record = json.loads(results.RECORD.read_text())
    assert results.page(record) == (results.DOCS / "results.md").read_text()


def test_the_page_of_inverse_problems_says_what_is_on_record(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    study = importlib.import_module("inverse")
    record = json.loads(study.RECORD.read_text())
    assert study.page(record) == (ROOT / "docs" / "inverse.md").read_text()
    rtol = 1e-6 if jax.__version__ == record["jax"] else 0.3  # another version draws other samples
    for name, seed in itertools.product(study.OPERATORS, study.SEEDS):
        measured = study.references(name, seed)["exact"]
        np.testing.assert_allclose(record["runs"][f"{name}/exact/{seed}"], measured, rtol=rtol)


def test_one_more_run_lies_in_the_band_of_those_on_record(monkeypatch):
    """Except once in a thousand, if the numbers are normal."""
    monkeypatch.syspath_prepend(STUDIES)
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
