"""Files that are changed at random are read, or refused in a sentence that names them."""

import contextlib
import json
import random
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from rich.console import Console

from diffjax.evaluation import comparison, sampling
from diffjax.experiment import Config, Data, inspect, resolve, run_directory
from diffjax.experiment.config import to_json, to_tree
from diffjax.models import MLPConfig
from diffjax.published import weights
from diffjax.training import checkpoints, metrics
from diffjax.training.files import digest, file_digest

TOY = Config(
    data=Data("two_moons", shape=(2,)), model=MLPConfig(width=8, blocks=1), schedule="linear_betas"
)
DIGITS = Config(schedule_options={"log_snr_max": 12.0}, writers=("tensorboard",))
ODD = (
    *(None, True, 0, -1, 1, 2, 10**9, 10**30, 10**400, 0.5, -1e300, 1e300, float("nan")),
    *(float("inf"), "", "x", "\0", "../..", "cosine", "\ud800", "a\nb", [], [None], [[]], [1, "x"]),
    *({}, {"": {}}, {"kind": 1}, [0] * 1000),
)
"""Values that take the place of others."""


def deep(kind):
    return json.loads(f'{{"a":{"[" * 200}{"]" * 200}}}') if kind else [[[[]]]]


def changed_tree(rng, tree):
    """A tree of JSON in which a few values are odd, lost, added or renamed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        places = [(None, None)]
        stack = [tree]
        while stack:
            at = stack.pop()
            keys = list(at) if isinstance(at, dict) else range(len(at))
            places += [(at, key) for key in keys]
            stack += [at[key] for key in keys if isinstance(at[key], dict | list) and at[key]]
        at, key = rng.choice(places)
        value = json.loads(json.dumps(rng.choice((*ODD, deep(0), deep(1)))))
        what = rng.random()
        if at is None:
            if what < 0.1:
                return value
        elif what < 0.15:
            del at[key]
        elif what < 0.25 and isinstance(at, dict):
            at[rng.choice(("x", "", "a\nb", str(key) + "x"))] = at.pop(key)
        elif what < 0.35 and isinstance(at, dict):
            at[rng.choice(("x", "kind", "steps"))] = value
        elif what < 0.45:
            at[key] = [at[key]]
        else:
            at[key] = value
        tree = tree if isinstance(tree, dict) and tree else {"x": tree}
    return json.loads(json.dumps(tree))


def changed_bytes(rng, raw):
    """Bytes of which some are others, are missing or are there twice."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, what = rng.randrange(len(raw) + 1), rng.random()
        if what < 0.5 and at < len(raw):
            raw[at] = rng.choice((rng.randrange(256), ord(rng.choice('{}[]",:0-9etrun \n'))))
        elif what < 0.6:
            del raw[at:]
        elif what < 0.75:
            del raw[at : at + rng.randint(1, 20)]
        elif what < 0.9:
            raw[at:at] = raw[at : at + rng.randint(1, 40)]
        else:
            raw[at:at] = rng.choice(
                (b"{", b"[" * 3000, b"1e999", b"NaN", b"9" * 5000, b"\xff", b"\0")
            )
        raw = raw or bytearray(b" ")
    return bytes(raw)


def changed_json(rng, tree):
    if rng.random() < 0.5:
        return changed_bytes(rng, json.dumps(tree, indent=1).encode())
    return json.dumps(changed_tree(rng, tree)).encode()


class Json:
    """A file that is JSON."""

    def __init__(self, name, tree, use):
        self.name, self.tree, self.use = name, tree, use

    def write(self, rng, path):
        path.write_bytes(changed_json(rng, self.tree))


class ConfigFile(Json):
    def __init__(self):
        super().__init__("config.json", None, self.read)

    def write(self, rng, path):
        path.write_bytes(changed_json(rng, to_tree(rng.choice((TOY, DIGITS)))))

    def read(self, path):
        config = run_directory.read_config(path.parent)
        to_json(config)
        try:
            resolve(config)
        except ValueError as error:  # a rule, which names the field
            raise ValueError(f"{path}: {error}") from error


class Rows(Json):
    ROW = {"step": 20, "loss": 0.5, "eval_loss": 0.25, "loss_by_log_snr": [None, 0.5]} | {
        "count_by_log_snr": [0, 7]
    }

    def __init__(self):
        super().__init__("metrics.jsonl", None, self.read)

    def write(self, rng, path):
        path.write_bytes(
            b"\n".join(
                changed_json(rng, self.ROW | {"step": step}).replace(b"\n", b"")
                if rng.random() < 0.6
                else json.dumps(self.ROW | {"step": step}).encode()
                for step in (10, 20, 30)
            )
        )

    def read(self, path):
        rows = metrics.read(path.parent)
        assert all(row["step"] < 2**63 for row in rows)
        json.dumps(rows)
        (path.parent / "config.json").write_text(to_json(TOY))
        inspect.report(path.parent, Console(quiet=True))


class Samples(Json):
    def __init__(self):
        super().__init__("generated.npz", None, self.read)
        x = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
        self.arrays = {"x": x, "index": np.arange(20)}
        self.settings = {"n": 20, "label": None, "seed": 0, "function_evaluations": 50}
        self.settings |= {"parameters": {"ema": 0.999, "sha256": "a"}, "config": to_tree(TOY)}
        self.settings |= {"sha256": digest(x), "shape": [2]}

    def write(self, rng, path):
        as_bytes = rng.random() < 0.3
        settings = json.dumps(self.settings)
        if not as_bytes:
            settings = changed_json(rng, self.settings).decode(errors="replace")
        np.savez(path, **self.arrays, settings=settings)
        if as_bytes:
            path.write_bytes(changed_bytes(rng, path.read_bytes()))

    def read(self, path):
        examples, settings = sampling.read(path)
        assert len(examples.x) == settings["n"]
        assert isinstance(settings["parameters"], dict)


class Weights(Json):
    def __init__(self):
        super().__init__("net.safetensors", None, weights.read)
        self.params = jax.tree.map(np.asarray, resolve(TOY).init(jax.random.key(0), (2,)))

    def write(self, rng, path):
        as_bytes = rng.random() < 0.3
        text = to_json(TOY)
        if not as_bytes:
            text = changed_json(rng, to_tree(TOY)).decode(errors="replace")
        metadata = {weights.CONFIG: text, weights.SEAL: digest(self.params)}
        safetensors.numpy.save_file(flatten_dict(self.params, sep="/"), path, metadata)
        if as_bytes:
            path.write_bytes(changed_bytes(rng, path.read_bytes()))


class Seal(Json):
    def __init__(self):
        tree = {"step": 20, "about": {"config": to_tree(TOY), "data": {"train": {"n": 4}}}}
        super().__init__("seal.json", tree, self.read)

    def write(self, rng, path):
        arrays = path.with_name(checkpoints.ARRAYS)
        arrays.write_text(json.dumps({"['w']": "float32[3]"}))
        files = {arrays.name: [arrays.stat().st_size, file_digest(arrays)]}
        path.write_bytes(changed_json(rng, self.tree | {"files": files}))

    def read(self, path):
        damage = checkpoints.damage_of(path.parent)
        assert damage is None or len(damage) < 1000
        checkpoints.read_seal(path.parent)
        with contextlib.suppress(FileNotFoundError):
            run_directory.read_config(path.parents[2])


EVALUATION = {"bound_bits_per_dim": 2.0, "bound_standard_error": 0.1, "frechet": 0.5, "recall": 0.6}
EVALUATION |= {"held_out": {"n": 300, "levels": 17, "sha256": "a"}, "samples": {"n": 9, "seed": 0}}
EVALUATION |= {"features": {"name": "pca24", "sha256": "b"}, "reference": {"sha256": "c"}}
EVALUATION |= {"config": to_tree(TOY)}


def compare(path):
    other = path.with_name("other.json")
    other.write_text(json.dumps(EVALUATION))
    results = comparison.read([path, other])
    comparison.table(results)
    comparison.lines(results[str(path)])


KINDS = {
    "config": ConfigFile,
    "samples": Samples,
    "metrics": Rows,
    "weights": Weights,
    "comparison": lambda: Json("evaluation.json", EVALUATION, compare),
    "seal": Seal,
}


def unclear(kind, count, folder):
    """What is neither a result nor a clear error, in `count` files of a kind."""
    kind, rng, found, read = KINDS[kind](), random.Random(0), [], 0
    folder = folder / "run" / "checkpoints" / "20" if kind.name == "seal.json" else folder / "run"
    folder.mkdir(parents=True)
    path = folder / kind.name
    for i in range(count):
        kind.write(rng, path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.use(path)
            read += 1
        except (ValueError, FileNotFoundError) as error:
            first = str(error).split("\n")[0]
            if kind.name not in str(error) or len(first) > 2000:
                found.append(f"{i}: {error!r}"[:300])
        except Exception as error:  # a bug
            found.append(f"{i}: {type(error).__name__} {error!r}"[:300])
    # Some changes do no harm; a seal has a hash of its own, so that each change of it does.
    assert read > count / 100 or kind.name == "seal.json"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_read_or_refused_by_name(tmp_path, kind, capsys):
    assert unclear(kind, 150, tmp_path) == []


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_many_changed_files_are_read_or_refused_by_name(tmp_path, kind, capsys):
    assert unclear(kind, 10_000, tmp_path) == []
