"""runs.py: what a run folder holds, who may write it, damage; what a search folder says."""

import json
import math
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import runs
from config import Config, as_config, plain, resolve
from files import UserError, write_json
from phantom import PHANTOM, write_phantom


@contextmanager
def other_writer(folder):
    """Another process that writes the folder."""
    code = "import fcntl, time\nfile = open('.lock', 'a+b')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
    words = [sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def test_new_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(version="v1", shared=(4, 5, 6))

    def claim(**options):
        with ExitStack() as stack:
            return runs.claim_run(replace(config, **options), stack)

    names = []
    for _ in range(3):
        path = claim()
        assert claim() == path  # a folder without config.json holds no run
        (tmp_path / path / "config.json").touch()
        names.append(path)
    assert names == ["runs/v1-L456", "runs/v1-L456-2", "runs/v1-L456-3"]
    with other_writer(tmp_path / claim()):  # a training that starts at the same moment
        assert claim() == "runs/v1-L456-5"
    assert claim() == "runs/v1-L456-4" and claim(out="a/b") == "a/b" and Path("a/b/.lock").exists()
    assert claim(version="v2", shared=()) == "runs/v2-Lnone"
    assert claim(version="nnunet") == "runs/nnunet"


def test_without_data_a_phantom_is_simulated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = lambda root, progress: write_phantom(root, patients=2, progress=progress)  # noqa: E731
    monkeypatch.setattr(runs, "write_phantom", small)
    said = []
    config, cases = runs.open_data(Config(workers=1), said.append)
    assert len(cases) == 3 and config.patch == (48, 48, 48) and config.data is None
    assert "simulated" in said[0] and PHANTOM.is_dir()
    assert "3 studies of 2 patients, 2 with a lesion" in said[-2]
    assert all(case.meta["spacing"] == [5, 5, 6] for case in cases)


def test_training_without_a_lesion_is_refused(base, cases, tmp_path):
    healthy = [case.name for case in cases if not case.has_lesion]
    parts = {"train": healthy[:1], "val": healthy[1:2], "test": healthy[2:]}
    write_json(tmp_path / "splits.json", parts)
    config = replace(base, splits=str(tmp_path / "splits.json"))
    with pytest.raises(UserError, match="No study of the training part has a lesion"):
        runs.choose_splits(config, cases, None)


def test_a_patch_that_does_not_fit_the_network_is_refused():
    config = resolve(Config(version="deepmts", patch=(48, 48, 16)), "petct", False)
    with pytest.raises(
        UserError, match="deepmts takes sides that divide by 16 and are at least 32"
    ):
        runs.build_model(config)


def test_the_record_of_a_run_tells_all_that_made_it(base, finished, monkeypatch, tmp_path):
    record = json.loads((finished[0] / "config.json").read_text())
    assert as_config(record["config"]) == resolve(base, "petct", False)
    assert record["torch"] == str(torch.__version__) and record["ran_on"] == "cpu"
    assert len(record["commit"].split("+")[0]) in (0, 40)
    monkeypatch.setenv("PATH", "")  # git is not needed
    runs.save_config(tmp_path, base, "cpu")
    assert json.loads((tmp_path / "config.json").read_text())["commit"] == ""


def test_metrics_come_back_without_what_an_epoch_did_not_have(tmp_path):
    rows = [{"epoch": 1, "loss": 0.5, "seconds": 2.0}, {"epoch": 2, "loss": 0.25, "seconds": 2.0}]
    rows[1] |= {"val_dice": 0.125, "val_seconds": 1.0, "grad_seg": 1.0, "seg": 0.2, "cls": 0.05}
    assert runs.read_metrics(tmp_path, 2) == []
    runs.write_metrics(tmp_path, rows)
    assert runs.read_metrics(tmp_path, 2) == rows and runs.read_metrics(tmp_path, 1) == rows[:1]
    assert runs.seconds_of(rows) == 5 and runs.most_gpu_memory(rows) is None
    assert runs.terms_of(rows[1]) == ["seg", "cls"]


def test_one_process_writes_a_run_while_it_lives(tmp_path):
    """The lock of another process holds, and no longer than that."""
    busy = pytest.raises(runs.Busy, match="another process is writing")
    with other_writer(tmp_path), busy, runs.only_writer(tmp_path):
        pass
    with runs.only_writer(tmp_path):
        pass


@pytest.mark.parametrize("damage", ["flipped", "other version", "list", "no model", "gone"])
def test_damaged_checkpoints_are_named(finished, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    best = run / "best.pt"
    if damage == "flipped":
        data = bytearray(best.read_bytes())
        data[len(data) // 2] ^= 0x40
        best.write_bytes(data)
    elif damage == "other version":
        model = runs.build_model(resolve(Config(version="v4"), "petct", False))
        torch.save({"model": model.state_dict(), "epoch": 1, "val_dice": 0.0}, best)
    elif damage == "gone":
        best.unlink()
    else:
        torch.save([1] if damage == "list" else {"epoch": 1}, best)
    with pytest.raises(UserError, match="best.pt: "):
        runs.load_run(run, "best", {})


def test_a_run_is_loaded_with_its_weights_and_the_options_given(finished):
    model, config, device, weights = runs.load_run(finished[0], "last", {"overlap": 0.5})
    saved = torch.load(finished[0] / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert (config.overlap, config.amp, device.type) == (0.5, "none", "cpu")
    assert weights["val_dice"] is None and weights["epoch"] == 2
    with pytest.raises(UserError, match="--window-batch 0"):
        runs.load_run(finished[0], "best", {"window_batch": 0})


# ------------------------------------------------------------------ a search folder


def make_trial(root, name, status, **changes):
    config = resolve(Config(epochs=4, val_every=1, **changes), "petct", True)
    run = root / name
    run.mkdir(parents=True)
    record = {"searches": ["layers", "free"], "config": plain(config), "studies": "s"}
    write_json(run / "trial.json", record)
    if status != "waiting":
        write_json(run / "config.json", {"config": plain(config)})
        took = {"seconds": 10.0, "val_seconds": 1.5}
        rows = [{"epoch": i + 1, "val_dice": v, **took} for i, v in enumerate((0.1, 0.3, 0.2))]
        runs.write_metrics(run, rows)
    if status == "done":
        metrics = {"dice": {"mean": 0.5, "n": 3}, "fpv_ml": {"mean": 2.5, "n": 6}}
        facts = {"epochs": 4, "val_dice": 0.3, "seconds": 50.0, "gpu_memory_mb": 123.0}
        write_json(run / "summary.json", facts | {"systems": {"model": metrics}})
    if status == "stopped":
        write_json(run / "stopped.json", {"epoch": 3, "val_dice": 0.3})
    if status == "failed":
        (run / "failed.txt").write_text("the loss is nan\n\nTraceback\n")
    return run


def test_results_have_a_row_per_trial_from_its_folder(tmp_path):
    states = ("done", "stopped", "failed", "unfinished", "waiting")
    for status in (*states, "going"):
        make_trial(tmp_path, status, status.replace("going", "unfinished"), version="v4", shared=())
    trials = runs.read_trials(tmp_path, running={"going", "done"}).set_index("trial")
    frame = pd.read_csv(tmp_path / "results.csv", keep_default_na=False).set_index("trial")
    # an ended one is not running
    assert [frame.status[s] for s in (*states, "going")] == [*states, "running"]
    done, stopped = frame.loc["done"], frame.loc["stopped"]
    assert [float(done[n]) for n in ("test_dice", "test_fpv_ml", "seconds")] == [0.5, 2.5, 50]
    assert (done.shared, float(done.theta), done.phi, done.epochs) == ("none", 0.2, "none", 4)
    assert done.lambda_rec == "" and done.search == "layers free"  # v4 reads no λ_rec
    assert stopped.reason == "by ASHA after epoch 3" and stopped.test_dice == ""
    assert [float(stopped[n]) for n in ("epochs_done", "val_dice", "seconds")] == [3, 0.3, 34.5]
    assert frame.reason["failed"] == "the loss is nan" and frame.epochs_done["waiting"] == 0
    # another budget is another trial, even in a folder that was made for this one
    assert runs.look(tmp_path / "done", 5)["status"] == "unfinished"
    assert trials["dice"]["done"] == 50 and math.isnan(trials["dice"]["stopped"])
    assert trials["config"]["done"].theta == 0.2
    with pytest.raises(UserError, match="no trials of a search"):
        runs.read_trials(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name, content",
    [
        ("trial.json", b"[]"), ("trial.json", b"garbage"), ("trial.json", b'{"config": {"a": 1}}'),
        ("summary.json", b""), ("summary.json", b"[]"), ("metrics.csv", b"garbage"),
        ("metrics.csv", b"epoch,val_dice\n1,0.5\n"), ("stopped.json", b"{}"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_one_trial_does_not_end_the_search(name, content, tmp_path):
    make_trial(tmp_path, "good", "done")
    (make_trial(tmp_path, "bad", "unfinished") / name).write_bytes(content)
    trials = runs.read_trials(tmp_path).set_index("trial")
    assert trials["status"].to_dict() == {"good": "done", "bad": "failed"}
    assert trials["reason"]["bad"].startswith("damaged folder: ") and trials["dice"]["good"] == 50
