"""Files of version 0.1 still load: a run of 20 steps, its samples, and its exported network.

python train.py --config=configs/digits.py:smoke --config.steps=20 --config.keep=1
    --config.sampling.guidance=1.5 --workdir=run
python sample.py --workdir=run --n=20 --steps=3 --guidance=2
python evaluate.py --workdir=run --samples=run/generated.npz --held_out=16 --looks=4
python -m diffjax.export run exported.safetensors
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import newest, rows_of, run

import evaluate
import sample
from diffjax import checkpoint
from diffjax.evaluation import sampling
from diffjax.experiment import config as config_lib, run_directory
from diffjax.training import metrics, runners
from diffjax.training.files import digest

FILES = Path(__file__).with_name("files")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(FILES / "version_0_1.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_its_config_says_the_same(earlier):
    text = (earlier / "run/config.json").read_text()
    config = config_lib.from_json(text)
    assert config.sampling.guidance == ("classifier_free:weight=1.5",)
    # What this version writes, it reads back; every field that was not renamed has its value.
    assert config_lib.from_json(config_lib.to_json(config)) == config
    before, after = json.loads(text), json.loads(config_lib.to_json(config))
    for section in (None, "data", "model", "optimizer", "sampling"):
        was, now = (tree if section is None else tree[section] for tree in (before, after))
        prefix = "" if section is None else f"{section}."
        for name, value in was.items():
            new = config_lib.RENAMED.get(prefix + name, prefix + name).removeprefix(prefix)
            if not isinstance(value, dict) and name not in ("kind", "guidance"):
                assert now[new] == value, (section, name)
    assert before["model"]["kind"] == "UNetConfig" and after["model"]["kind"] == "unet"


def test_a_score_of_a_version_that_said_nothing_is_raw():
    """The default of a new run is the scaled score; files without the field mean the raw one."""
    new = config_lib.Config(target="score")
    assert new.scales_output and not config_lib.Config().scales_output
    assert config_lib.from_tree(config_lib.to_tree(new)).scales_output
    tree = config_lib.to_tree(new)
    del tree["unit_output"]
    raw = config_lib.from_tree(tree)
    assert not raw.scales_output
    assert config_lib.differences(raw, new) == ["unit_output: the run has False, asked for True"]
    # A run of another target is resumed by the same command as ever.
    tree = config_lib.to_tree(config_lib.Config()) | {"unit_output": False}
    assert config_lib.differences(config_lib.from_tree(tree), config_lib.Config()) == []


def test_every_renamed_field_is_read():
    tree = json.loads(config_lib.to_json(config_lib.Config()))
    for old, new in config_lib.RENAMED.items():
        section, _, name = new.rpartition(".")
        place = tree[section] if section else tree
        if name not in place:  # of another network
            continue
        place[old.rpartition(".")[2]] = place.pop(name)
    assert config_lib.from_tree(tree) == config_lib.Config()


def test_its_parameters_are_read_to_the_last_bit(earlier):
    _, params, _ = checkpoint.load(earlier / "run")
    _, exported, config = checkpoint.load(earlier / "exported.safetensors")
    _, settings = sampling.read(earlier / "run/generated.npz")
    assert digest(params) == digest(exported) == settings["parameters"]["sha256"]
    assert config.data.shape == (8, 8, 1)
    assert metrics.read(earlier / "run")[-1]["step"] == 20


@pytest.mark.faults
def test_its_run_is_resumed(finished, tmp_path):
    """Its command would have gone on exactly as a run of this version that was never stopped."""
    with tarfile.open(FILES / "version_0_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    argv = ["--config=configs/digits.py:smoke", "--config.keep=1", "--config.sampling.guidance=1.5"]
    run(tmp_path / "run", *argv, "--config.steps=40")
    assert newest(tmp_path / "run")[0] == 40
    # Its first 20 steps were compiled with other options than the tests'.
    for resumed, whole in zip(rows_of(tmp_path / "run"), rows_of(finished), strict=True):
        assert resumed["step"] == whole["step"]
        np.testing.assert_allclose(resumed["loss"], whole["loss"], rtol=1e-3)
    assert run_directory.read_config(tmp_path / "run").sampling.guidance


def test_a_run_of_its_config_has_the_same_arrays(earlier, finished):
    """Options that came later, such as averages, add nothing to a checkpoint without them."""
    then, now = (
        json.loads(path.read_text())
        for path in (
            earlier / "run/checkpoints/20/arrays.json",
            finished / "checkpoints/20/arrays.json",
        )
    )
    assert then == now


def test_its_samples_are_known_as_finished(earlier, capsys, monkeypatch):
    monkeypatch.setattr(runners, "in_batches", lambda *_: pytest.fail("drew again"))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    workdir = f"--workdir={earlier / 'run'}"
    sample.main([workdir, "--n=20", "--steps=3", "--guidance=2"])
    assert "20 samples" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"guidance: it has \['classifier_free:weight=2'\], ask"):
        sample.main([workdir, "--n=20", "--steps=3", "--guidance=3"])


def test_its_evaluation_is_compared(earlier, tmp_path, capsys):
    picture = tmp_path / "c.png"
    argv = ["--compare", str(earlier / "run"), str(earlier / "run/evaluation.json")]
    evaluate.main([*argv, f"--picture={picture}"])
    assert "3.851" in capsys.readouterr().out and picture.exists()
