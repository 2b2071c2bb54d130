"""sample.py and evaluate.py as their users run them, on a run of two devices."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
from diffjax import checkpoint, samplers
from diffjax.evaluation import comparison, sampling
from diffjax.experiment import config as config_lib, resolve
from diffjax.training import runners
from diffjax.drawing import Drawing

FEW = Drawing(n=20, steps=3)


def draw(workdir, out, devices=2, wanted=FEW, **options):
    """What sample.py writes, on so many devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "_devices", lambda: jax.devices()[:devices])
        patch.setattr(jax, "device_count", lambda: devices)
        patch.setitem(sampling.TILES, "cpu", 4)
        sample.sample(sample.Arguments(workdir, wanted, out=out, **options))
    return sampling.read(out)


@pytest.fixture(scope="module")
def drawn(finished, tmp_path_factory):
    """Twenty samples by two devices, at once."""
    out = tmp_path_factory.mktemp("drawn") / "twenty.npz"
    return out, draw(finished, out, batch_size=24)


def test_a_sample_depends_on_its_index_alone_bit_for_bit(finished, monkeypatch):
    """On any number of devices, in any batch; before it is rounded, which would hide a last bit."""
    monkeypatch.setattr(sampling.data, "to_bytes", lambda x: x)
    monkeypatch.setitem(sampling.TILES, "cpu", 4)
    network, params, config = checkpoint.load(finished)
    config = sampling.drawn_by(config, FEW)
    generate = resolve.make_generate(config, network, (8, 8, 1))
    label = sampling.labels(config, FEW)
    found, sizes = [], set()

    def tile(params, batch):
        sizes.add(len(batch["index"]))
        return generate(params, batch)

    for devices, size, some in ((1, 20, range(20)), (2, 8, range(5, 20)), (2, 24, range(20))):
        monkeypatch.setattr(runners, "_devices", lambda n=devices: jax.devices()[:n])
        monkeypatch.setattr(jax, "device_count", lambda n=devices: n)
        found.append(np.concatenate([*sampling.draw(tile, params, label, some, size)]))
    assert found[0].dtype == np.float32 and len({x.tobytes() for x in found[0]}) == 20
    np.testing.assert_array_equal(found[1], found[0][5:])
    np.testing.assert_array_equal(found[2], found[0])
    assert sizes == {4}  # a larger network's rounding depends on it


def test_a_drawing_that_was_stopped_goes_on(finished, drawn, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.npz"
    draw_all = sampling.draw

    def stopped(generate, params, label, indices, size):
        parts = draw_all(generate, params, label, indices, size)
        yield next(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw(finished, out, batch_size=8)
    assert not out.exists()
    seen = []
    monkeypatch.setattr(sampling, "draw", lambda *args: seen.append(args[3]) or draw_all(*args))
    (out.with_suffix(".parts") / "000000016.npy.tmp").write_text("cut off")
    # With other settings it is refused, by name, whether in parts or whole.
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"seed: it has 0, asked for 1\n  steps: it has 3, as"):
            draw(finished, out, wanted=Drawing(n=20, steps=4, seed=1))
        again = draw(finished, out, batch_size=24)
    assert seen == [range(8, 20), range(20, 20)]
    np.testing.assert_array_equal(again[0].x, drawn[1][0].x)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.png"]
    assert "20 samples" in capsys.readouterr().out


def test_what_was_drawn_says_how(finished, drawn, tmp_path):
    out, (examples, settings) = drawn
    assert examples.x.dtype == np.uint8 and examples.x.shape == (20, 8, 8, 1)
    assert examples.label.tolist() == [*range(10)] * 2
    assert settings["n"] == 20 and settings["function_evaluations"] == 3
    assert settings["sampler"] == "ddim" and settings["times"] == "uniform"
    assert settings["config"]["model"]["width"] == 8 and len(settings["parameters"]["sha256"]) == 64
    assert settings["program"]["jax"] == jax.__version__
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.size == (2 * 58, 10 * 58)  # a row for each class
    wanted = Drawing(n=3, label=7, sampler="unipc", steps=2, guidance=2.0)
    examples, settings = draw(finished, tmp_path / "sevens.npz", 1, wanted)
    assert examples.label.tolist() == [7, 7, 7]
    assert settings["times"] == "log_snr" and settings["guidance"] == 2
    assert not np.array_equal(examples.x, drawn[1][0].x[:3])


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_function_evaluations_are_counted(name):
    """Against what the samplers' docstrings say."""
    config = sampling.drawn_by(config_lib.Config(), Drawing(sampler=name, steps=5))
    twice = name in ("heun", "edm", "predictor_corrector")
    assert sampling.function_evaluations(config) == (10 if twice else 5)
    # The grid is the one that the docstring wants.
    text = " ".join(samplers.SAMPLERS[name].__doc__.split())
    wants = re.search(r"[Ww]ants (uniform t\b|uniform log-SNR|`karras_times`)", text)[1]
    times = {"uniform t": "uniform", "uniform log-SNR": "log_snr", "`karras_times`": "karras"}
    assert config.sampling.times == times[wants]


BAD = {
    "sampler": (Drawing(sampler="dim"), "unknown sampler 'dim': one of ancestral, ddim"),
    "times": (Drawing(times="even"), "unknown times 'even': one of uniform, log_snr, karras"),
    "option": (Drawing(options={"eta": 2.0}), "eta=2.0: must be in [0, 1]"),
    "options": (Drawing(sampler="heun", options={"eta": 1}), "sampler heun has no option eta"),
    "steps": (Drawing(steps=0), "steps=0: must be at least 1"),
    "n": (Drawing(n=0), "n=0: must be at least 1"),
    "label": (Drawing(label=10), "label=10: the run has classes 0 to 9"),
    "seed": (Drawing(seed=-1), "seed=-1: must be at least 0"),
    "guidance": (Drawing(guidance=float("nan")), "guidance=nan: must be finite"),
}


@pytest.mark.parametrize(("wanted", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(
    finished, tmp_path, monkeypatch, wanted, message
):
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
        draw(finished, tmp_path / "out" / "a.npz", wanted=wanted)
    assert not (tmp_path / "out").exists()


def test_other_refusals_of_sample(finished, tmp_path):
    out = tmp_path / "a.npz"
    for options, message in (
        ({"picture": 0}, "picture=0, batch_size=16: must be at least 1"),
        ({"shape": (8, 8, 3)}, r"shape \(8, 8, 3\) are not what the network was trained on"),
        ({"shape": (8,)}, r"examples of shape \(8,\): a U-Net"),
    ):
        with pytest.raises(SystemExit, match=message):
            draw(finished, out, **options)
    with pytest.raises(SystemExit, match="not the directory of a run"):
        draw(tmp_path, out)
    out.write_text("not samples")
    with pytest.raises(SystemExit, match=r"a\.npz is not a file of sample\.py's"):
        draw(finished, out)


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """A copy of the run, evaluated by all there is."""
    workdir = shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "run")
    main(workdir, drawing=FEW, held_out=32, looks=4, flow=True, flow_steps=4)
    return workdir


def main(workdir, **options):
    """What evaluate.py writes, on two devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "_devices", lambda: jax.devices()[:2])
        patch.setattr(jax, "device_count", lambda: 2)
        patch.setitem(sampling.TILES, "cpu", 4)
        evaluate.main(evaluate.Arguments(workdir, **options))
    return found(workdir)


def found(workdir):
    return json.loads((workdir / comparison.RESULT).read_text())


def test_every_number_comes_with_what_it_depends_on(evaluated):
    """An untrained network is no good, so the bound is loose; but it is one, and it is finite."""
    result = found(evaluated)
    for name in ("bound", "flow"):
        assert 0.5 < result[f"{name}_bits_per_dim"] < 20
        assert 0 < result[f"{name}_standard_error"] < 2
    assert result["held_out"]["n"] == 32 and result["held_out"]["levels"] == 17
    assert result["frechet"] > 1 and result["kernel"] > result["kernel_standard_error"] > 0
    assert 0 <= result["precision"] <= 1 and 0 <= result["recall"] <= 1
    assert result["samples"]["n"] == 20 and result["samples"]["function_evaluations"] == 3
    assert result["features"]["name"] == "pca24" and result["reference"]["n"] == 1497
    hashes = [result[part]["sha256"] for part in ("held_out", "features", "reference")]
    assert {len(h) for h in [*hashes, result["parameters"]["sha256"]]} == {64}
    assert result["config"]["target"] == "eps" and result["program"]["diffjax"]


def test_samples_that_were_drawn_are_measured_alike(evaluated, drawn, tmp_path):
    again = shutil.copytree(evaluated, tmp_path / "run")
    result = main(again, samples=drawn[0], held_out=0)
    assert {k: v for k, v in found(evaluated).items() if k in result} == result
    assert "bound_bits_per_dim" not in result
    _, settings = drawn[1]
    with np.load(drawn[0]) as file:
        other = settings | {"parameters": {"ema": 0.5, "sha256": "0"}}
        np.savez(tmp_path / "b.npz", **{**file, "settings": json.dumps(other)})
    with pytest.raises(SystemExit, match=r"b\.npz is of other parameters"):
        main(again, samples=tmp_path / "b.npz", held_out=0)


def test_the_other_runner_says_the_same(evaluated, tmp_path):
    again = shutil.copytree(evaluated, tmp_path / "run")
    config = (again / "config.json").read_text()
    (again / "config.json").write_text(config.replace('"pmap"', '"sharded"'))
    result = main(again, drawing=dataclasses.replace(FEW, n=0), held_out=32, looks=4)
    bits = "bound_bits_per_dim"
    np.testing.assert_allclose(result[bits], found(evaluated)[bits], rtol=1e-4)
    assert "frechet" not in result


def test_runs_are_compared(evaluated, tmp_path, capsys):
    other = shutil.copytree(evaluated, tmp_path / "other")
    result = found(other) | {"frechet": 0.01}
    (other / comparison.RESULT).write_text(json.dumps(result))
    picture = tmp_path / "c.png"
    evaluate.main(evaluate.Arguments(compare=(evaluated, other), picture=picture))
    assert "0.01 *" in capsys.readouterr().out
    with Image.open(picture) as drawn:
        assert np.asarray(drawn).std() > 1


def test_refusals_of_evaluate(finished, drawn):
    for options, message in (
        ({"looks": 1}, "looks=1: must be at least 2"),
        ({"flow_steps": 0}, "flow_steps=0: must be at least 1"),
        ({"held_out": 1}, "held_out=1: must be at least 2, or 0"),
        ({"drawing": Drawing(n=19)}, "n=19: must be at least 20, or 0"),
        (
            {"result": Path("no/where.json")},
            "result=no/where.json: must be a file .json in a folder",
        ),
        ({"reference": "all"}, "unknown reference 'all': one of train, test"),
        ({"features": "fid"}, "unknown features 'fid': one of pca24, fashion_classifier, or"),
        ({"samples": drawn[0], "drawing": FEW}, "they are drawn already; give no n"),
        ({"compare": (finished,), "looks": 3}, "compare: only reads and draws"),
        ({"compare": (finished,)}, "compare: only reads and draws"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
            evaluate.main(evaluate.Arguments(finished, **options))
