"""runs.py: what a run folder holds, who may write it, damage; what a search folder says."""

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import make_config, make_trial, other_writer

import runs
from common import UserError, write_json
from config import Config, from_dict, resolve
from phantom import PHANTOM, write_phantom


def test_new_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(version="v1", shared=(4, 5, 6))

    def lock(**options):
        with ExitStack() as stack:
            return runs.lock_run_folder(replace(config, **options), stack)

    for name in ("runs/v1-L456", "runs/v1-L456-2", "runs/v1-L456-3"):
        assert lock() == Path(name)
        assert lock() == Path(name)  # a folder without config.json holds no run
        Path(name, "config.json").touch()
    with other_writer(lock()):  # a training that starts at the same moment
        assert lock() == Path("runs/v1-L456-5")
    assert lock() == Path("runs/v1-L456-4")
    assert lock(out="a/b") == Path("a/b")
    assert Path("a/b/.lock").exists()
    assert lock(version="v2", shared=()) == Path("runs/v2-Lnone")
    assert lock(version="nnunet") == Path("runs/nnunet")


def test_without_data_a_phantom_is_simulated(tmp_path, monkeypatch):
    def write_small_phantom(root, progress):
        write_phantom(root, patients=2, progress=progress)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "write_phantom", write_small_phantom)
    lines = []
    config = Config(version="v5", workers=1)
    folder = runs.find_data(config, lines.append)
    assert PHANTOM.is_dir()
    assert folder.kind == "petct"
    assert "writing a simulated PET/CT cohort" in lines[0]

    config = resolve(config, folder.kind)
    cases = runs.load_cases(folder, config, lines.append)
    assert len(cases) == 3
    assert all(case.meta.spacing == [5, 5, 6] and case.organs for case in cases)
    assert "(AutoPET (TCIA), simulated): 3 studies of 2 patients, 2 with a lesion" in lines[2]
    names = runs.with_organ_names(config, cases, lines.append).organ_names
    assert len(names) > 1
    v1 = replace(config, version="v1")
    assert runs.with_organ_names(v1, cases, lines.append) is v1


def test_organ_maps_are_needed_to_train_but_not_to_evaluate(base):
    config = resolve(replace(base, version="v5", phi=None), "petct")
    folder = runs.find_data(config)
    with pytest.raises(UserError, match="v5 learns organs. .* --organs"):
        runs.load_cases(folder, config)
    trained = replace(config, organ_names=("spleen", "liver"))
    cases = runs.load_cases(folder, trained)
    assert not any(case.organs for case in cases)
    assert runs.with_organ_names(trained, cases) == trained


def test_training_without_a_lesion_is_refused(base, cases, tmp_path):
    names = [case.name for case in cases if not case.has_lesion]
    write_json(tmp_path / "splits.json", {"train": names[:1], "val": names[1:2], "test": names[2:]})
    config = replace(base, splits=str(tmp_path / "splits.json"))
    with pytest.raises(UserError, match="No study of the training part has a lesion"):
        runs.choose_splits(config, cases)


def test_a_patch_that_does_not_fit_the_network_is_refused():
    config = make_config("deepmts", patch=(48, 48, 16))
    message = "deepmts takes sides that divide by 16 and are at least 32"
    for patch in ((48, 48, 16), (48, 48, 40)):
        with pytest.raises(UserError, match=message):
            runs.build_model(replace(config, patch=patch))


def test_the_record_of_a_run_tells_all_that_made_it(base, finished, monkeypatch, tmp_path):
    record = json.loads((finished[0] / "config.json").read_text())
    assert from_dict(record["config"]) == resolve(base, "petct")
    assert record["torch"] == str(torch.__version__)
    assert record["ran_on"] == "cpu"
    assert len(record["commit"].split("+")[0]) in (0, 40)
    monkeypatch.setenv("PATH", "")  # git is not needed
    runs.save_config(tmp_path, base, "cpu")
    assert json.loads((tmp_path / "config.json").read_text())["commit"] == ""


def test_metrics_come_back_without_what_an_epoch_did_not_have(tmp_path):
    first = {"epoch": 1, "loss": 0.5, "seconds": 2.0}
    second = {"epoch": 2, "loss": 0.25, "seconds": 2.0, "val_dice": 0.125, "val_seconds": 1.0}
    second |= {"grad_seg": 1.0, "seg": 0.2, "cls": 0.05}
    assert runs.read_metrics(tmp_path, 2) == []
    runs.write_csv(tmp_path / "metrics.csv", [first, second])
    assert runs.read_metrics(tmp_path, 2) == [first, second]
    assert runs.read_metrics(tmp_path, 1) == [first]
    assert runs.training_seconds([first, second]) == 5
    assert runs.peak_gpu_memory([first, second]) is None
    assert runs.peak_gpu_memory([{"gpu_memory_mb": 3.0}, {"gpu_memory_mb": 2.0}]) == 3
    assert runs.loss_term_names(second) == ["seg", "cls"]


def test_one_process_writes_a_run_while_it_lives(tmp_path):
    """The lock of another process holds, and no longer than that."""
    busy = pytest.raises(runs.FolderBusy, match="another process is writing")
    with other_writer(tmp_path), busy, runs.lock_folder(tmp_path):
        pass
    with runs.lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("damage", ["flipped", "other version", "list", "no model", "gone"])
def test_damaged_checkpoints_are_named(finished, tmp_path, damage):
    run = shutil.copytree(finished[0], tmp_path / "run")
    best = run / "best.pt"
    content = torch.load(best, weights_only=True)
    if damage == "flipped":
        data = bytearray(best.read_bytes())
        data[len(data) // 2] ^= 0x40
        best.write_bytes(data)
    elif damage == "gone":
        best.unlink()
    elif damage == "list":
        torch.save([1], best)
    elif damage == "no model":
        torch.save({"epoch": 1}, best)
    else:
        model = runs.build_model(make_config("v4"))
        torch.save({**content, "model": model.state_dict()}, best)
    with pytest.raises(UserError, match="best.pt: "):
        runs.load_run(run, "best", {})


def test_a_run_is_loaded_with_its_weights_and_the_options_given(finished):
    loaded = runs.load_run(finished[0], "last", {"overlap": 0.5})
    saved = torch.load(finished[0] / "last.pt", weights_only=True)["model"]
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, saved[name])
    config = loaded.config
    assert (config.overlap, config.amp, loaded.device.type) == (0.5, "none", "cpu")
    assert loaded.checkpoint["val_dice"] is None
    assert loaded.checkpoint["epoch"] == 2
    with pytest.raises(UserError, match="--window-batch 0"):
        runs.load_run(finished[0], "best", {"window_batch": 0})


# ------------------------------------------------------------------ a search folder


def test_results_have_a_row_per_trial_from_its_folder(tmp_path):
    config = make_config("v4", shared=(), epochs=4, val_every=1)
    statuses = ["done", "failed", "unfinished", "waiting"]
    searches = ("layers", "free")
    for status in statuses:
        make_trial(tmp_path, status, config, status, searches, gpu_memory_mb=123.0)
    trials = runs.read_trials(tmp_path).set_index("trial")
    frame = pd.read_csv(tmp_path / "results.csv", keep_default_na=False).set_index("trial")
    assert frame.status[statuses].tolist() == statuses

    done, unfinished = frame.loc["done"], frame.loc["unfinished"]
    assert (done.shared, float(done.theta), done.phi, done.epochs) == ("none", 0.2, "none", 4)
    assert (done.lambda_rec, done.search) == ("", "layers free")  # v4 has no λ_rec
    assert (float(done.test_dice), float(done.gpu_memory_mb), float(done.seconds)) == (0.5, 123, 50)
    numbers = [float(unfinished[name]) for name in ("epochs_done", "val_dice", "seconds")]
    assert numbers == [3, 0.3, 34.5]
    assert unfinished.test_dice == ""
    assert frame.reason["failed"] == "the loss is nan"
    assert frame.epochs_done["waiting"] == 0

    # Another budget is another trial, even in a folder that was made for this one.
    assert runs.trial_status(tmp_path / "done", 5)["status"] == "unfinished"
    assert trials["dice"]["done"] == 50
    assert math.isnan(trials["dice"]["unfinished"])
    assert trials["config"]["done"].theta == 0.2
    with pytest.raises(UserError, match="no trials of a search"):
        runs.read_trials(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name, content",
    [
        ("trial.json", b"[]"),
        ("trial.json", b"garbage"),
        ("trial.json", b'{"config": {"a": 1}}'),
        ("summary.json", b""),
        ("summary.json", b"[]"),
        ("metrics.csv", b"garbage"),
        ("metrics.csv", b"epoch,val_dice\n1,0.5\n"),
    ],
)
def test_a_damaged_file_of_one_trial_does_not_end_the_search(name, content, tmp_path):
    make_trial(tmp_path, "good", make_config())
    bad = make_trial(tmp_path, "bad", make_config(), "unfinished")
    (bad / name).write_bytes(content)
    trials = runs.read_trials(tmp_path).set_index("trial")
    assert trials["status"].to_dict() == {"good": "done", "bad": "failed"}
    assert trials["reason"]["bad"].startswith("damaged folder: ")
    assert trials["dice"]["good"] == 50
