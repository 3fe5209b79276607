"""train.py: a step, the loop, the run folder, what a killed run goes on with, several processes.

Run as a script it is one rank of the data-parallel test, or a run that is killed.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from tqdm import tqdm

import console
import devices
import eval as evaluation
import plots
import runs
import train
from cache import Case
from config import Config, as_config, plain, resolve
from devices import Ranks, choose_amp
from files import UserError
from losses import LOSSES
from mirror_unet import MirrorUNet

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TERMS = {"v1": {"rec_ct", "seg"}, "v2": {"rec_ct", "rec_pet", "seg"}, "v4": {"seg"}}
TERMS["v3"] = TERMS["v2"] | {"cls"}
CLOCK = ["patches_per_s", "data_wait", "seconds", "val_seconds"]  # differ from run to run


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out the figures, which take longer than these runs."""
    monkeypatch.setattr(plots, "curves", lambda run: None)
    monkeypatch.setattr(plots, "examples", lambda *args: None)


def differences(a, b, at=""):
    """Where two checkpoints differ; tensors must agree in every bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(b.keys() - a.keys())]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{at}/{k}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        pairs = zip(a, b, strict=True)
        return [d for i, (x, y) in enumerate(pairs) for d in differences(x, y, f"{at}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    return [] if a == b and type(a) is type(b) else [at]


def assert_same_run(run, reference):
    """All that both checkpoints hold, and all of metrics.csv but the clock."""
    for name in ("last.pt", "best.pt"):
        one, other = (torch.load(p / name, weights_only=True) for p in (run, reference))
        assert differences(one, other) == [], name
    rows, expected = (pd.read_csv(f / "metrics.csv").drop(columns=CLOCK) for f in (run, reference))
    pd.testing.assert_frame_equal(rows, expected, check_exact=False, rtol=1e-12)


# ------------------------------------------------------------------ one epoch


class Spy(torch.nn.Module):
    """The network, and what it was given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inputs = model, []

    def forward(self, ct, pet):
        self.inputs.append((ct.clone(), pet.clone()))
        return self.model(ct, pet)


def one_epoch(config, cases, steps=1):
    """An epoch: its row, the network before and after, its inputs and the crops."""
    config = replace(resolve(config, "petct", False), steps=steps)
    model = runs.build_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = train.resume_or_start(Path("run"), config, CPU, Ranks(CPU), model, False)
    state.net = Spy(model)
    loader = train.load_crops(cases, state)
    row = train.train_epoch(state, loader, 0, tqdm(disable=True))
    first = loader.read([(0, i) for i in range(config.batch_size)])
    return row, before, model, state.net.inputs, first["image"].float()


LEGAL = [(v, phi) for v in ("v1", "v2", "v3") for phi in ("none", "noise", "shuffle")]


@pytest.mark.parametrize("version, phi", [*LEGAL, ("v4", "none")])
def test_every_version_steps_with_every_phi(base, cases, monkeypatch, version, phi):
    """Φ changes what the CT branch sees, not what it has to reconstruct."""
    config, targets = replace(base, version=version, phi=phi), []
    loss = LOSSES["petct"][version]
    record = lambda out, batch, w: targets.append(batch) or loss(out, batch, w)  # noqa: E731
    monkeypatch.setitem(LOSSES["petct"], version, record)
    row, before, model, inputs, images = one_epoch(config, cases)
    assert TERMS[version] == set(runs.terms_of(row))
    assert row["loss"] == pytest.approx(sum(row[term] for term in TERMS[version]))
    assert {f"grad_{t}" for t in TERMS[version]} == {n for n in row if n.startswith("grad_")}
    assert all(row[f"grad_{t}"] > 0 and np.isfinite(row[t]) for t in TERMS[version])
    [(ct, pet)], [batch] = inputs, targets
    assert torch.equal(pet, images[:, 1:])
    assert torch.equal(ct, images[:, :1]) == (phi == "none")
    assert torch.equal(torch.cat([batch["ct"], batch["pet"]], dim=1), images)
    assert {*batch} == {"ct", "pet", "mask", "tumor"}
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still <= {"theta"}  # every task reached its weights


class Planted(Case):
    """A study with a constant CT, the number of its patient."""

    def load(self, array):
        found = super().load(array)
        if array == "images":
            found = np.array(found)
            found[0] = int(self.patient[-2:], 16)
        return found


def test_the_control_sees_and_restores_another_patients_ct(base, cases, monkeypatch):
    targets, loss = [], LOSSES["petct"]["v1"]
    record = lambda out, batch, w: targets.append(batch) or loss(out, batch, w)  # noqa: E731
    monkeypatch.setitem(LOSSES["petct"], "v1", record)
    cases = [Planted(case.meta, case.folder) for case in cases]
    config = replace(base, version="v1", phi="none", batch_size=6)
    own, other = (one_epoch(replace(config, ct=ct), cases)[3:] for ct in ("own", "other"))
    crops = [inputs[0][0].amax((1, 2, 3, 4)).tolist() for inputs, _ in (own, other)]
    assert {*crops[0], *crops[1]} <= {int(case.patient[-2:], 16) for case in cases}
    assert not [1 for mine, lent in zip(*crops, strict=True) if mine == lent]
    assert torch.equal(targets[1]["ct"], other[0][0][0])  # what it sees it restores
    assert torch.equal(own[1][:, 1:], other[1][:, 1:]) and torch.equal(
        targets[0]["mask"], targets[1]["mask"]
    )


def test_a_run_of_the_control(base, cases, finished, tmp_path, monkeypatch, no_figures):
    """Validation and test lend CT within their part; eval.py finds the same; masks are refused."""
    seen, real = [], evaluation.evaluate
    record = lambda model, own, *a, **k: seen.append(own) or real(model, own, *a, **k)  # noqa: E731
    monkeypatch.setattr(train, "evaluate", record)
    config = replace(base, ct="other", epochs=1, steps=1, out=str(tmp_path / "run"))
    train.train(config)
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    for part, own in zip(("val", "test"), seen, strict=True):
        assert [case.name for case in own] == splits[part]
        assert all(c.lender.patient != c.patient and c.lender.name in splits[part] for c in own)
    evaluation.run_command([config.out, "--out", str(tmp_path / "again")])
    found, expected = (f / "run" / "test_studies.csv" for f in (tmp_path / "again", tmp_path))
    assert found.read_bytes() == expected.read_bytes()
    with pytest.raises(UserError, match="--predict: a run with --ct other"):
        evaluation.run_command([config.out, "--predict", base.data, "--out", str(tmp_path / "m")])
    ill = [case.name for case in cases if case.has_lesion and case.name in splits["train"]]
    alone = {"train": ill[:1], "val": splits["val"], "test": splits["test"]}
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    with pytest.raises(UserError, match="--ct other: .* no other patient in its part"):
        train.train(replace(config, splits=str(tmp_path / "alone.json"), out=str(tmp_path / "no")))
    assert not (tmp_path / "no" / "config.json").exists()


def test_v1_with_nothing_shared_trains_its_pet_branch_as_the_pet_unet(base, cases, monkeypatch):
    """Five steps from the same weights, with equal weights of the mask: CT has no part in it."""
    options = dict(widths=Config().widths, weight_decay=0.0, phi="none", lr=1e-4)
    build, start = runs.build_model, {}

    def build_alike(config):
        model = build(config)
        model.load_state_dict(
            {name: start.get(name, own) for name, own in model.state_dict().items()}
        )
        return model

    *_, pet, _, _ = one_epoch(replace(base, version="pet", **options), cases, steps=5)
    first = build(resolve(replace(base, version="pet", **options), "petct", False))
    start |= {n.replace("layers", "pet"): w for n, w in first.state_dict().items()}
    monkeypatch.setattr(runs, "build_model", build_alike)
    config = replace(base, version="v1", shared=(), lambda_seg=1.0, **options)
    *_, v1, _, _ = one_epoch(config, cases, steps=5)
    ours, theirs = v1.state_dict(), pet.state_dict()
    for name, weight in theirs.items():
        assert torch.allclose(ours[name.replace("layers", "pet")], weight, atol=1e-6), name
    moved = [not torch.equal(w, theirs[n]) for n, w in first.state_dict().items() if w.dim() > 1]
    assert all(moved)


def test_nothing_shared_has_no_shared_gradient(base, cases):
    row, *_ = one_epoch(replace(base, version="v1", shared=()), cases)
    assert row["loss"] > 0 and not [name for name in row if name.startswith("grad_")]


@pytest.mark.parametrize(
    "theta, lr, low, high",
    [("learn", 1e-3, 0.498, 0.502), ("learn", 10.0, 0, 1), (0.3, 10.0, 0.3, 0.3)],
)
def test_theta_is_learned_within_0_and_1(base, cases, theta, lr, low, high):
    config = replace(base, version="v4", phi=None, theta=theta, lr=lr)
    row, before, model, *_ = one_epoch(config, cases, steps=2)
    assert low <= round(row["theta"], 6) <= high and row["theta"] == model.theta.item()
    assert torch.equal(model.theta, before["theta"]) == (theta != "learn")


def test_a_part_without_lesions_is_told(base, cases, tmp_path, no_figures, capsys):
    ill, healthy = ([c.name for c in cases if c.has_lesion == sick] for sick in (True, False))
    parts = {"train": ill[:1], "val": ill[-1:], "test": healthy[:1]}
    (tmp_path / "splits.json").write_text(json.dumps(parts))
    told = {"splits": str(tmp_path / "splits.json"), "out": str(tmp_path / "run")}
    train.train(replace(base, epochs=1, steps=1, **told))
    said = capsys.readouterr().out
    assert "no lesion in the test part: no Dice, no FNV" in said and "in the val part" not in said


def test_a_torch_for_cuda_that_sees_no_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, said in (
        (None, "cpu"),
        ("12.8", "cpu (this torch is built for CUDA but sees no GPU)"),
    ):
        monkeypatch.setattr(torch.version, "cuda", built)
        assert devices.describe(CPU) == said


def test_learning_rates_of_the_four_schedules():
    def rates(schedule):
        config = Config(schedule=schedule, lr=1e-3, lr_drop=3, epochs=4)
        return [train.learning_rate(config, epoch) for epoch in range(4)]

    assert rates("step") == pytest.approx([1e-3] * 3 + [1e-4])
    assert rates("poly") == pytest.approx([1e-3 * (1 - e / 4) ** 0.9 for e in range(4)])
    assert rates("cosine") == pytest.approx([1e-3, 8.5355e-4, 5e-4, 1.4645e-4], rel=1e-4)
    assert rates("exp") == pytest.approx([1e-3, 9.85e-4, 9.70225e-4, 9.5567e-4], rel=1e-4)


def test_optimizers_and_what_does_not_decay(base):
    config = resolve(replace(base, version="v4", phi=None, theta="learn"), "petct", False)
    model = runs.build_model(config)
    weights, theta = train.make_optimizer(model, config, CPU).param_groups
    assert theta["params"] == [model.theta] and theta["weight_decay"] == 0
    assert weights["weight_decay"] == 1e-6 and weights["lr"] == base.lr
    sgd = train.make_optimizer(model, replace(config, optimizer="sgd"), CPU)
    assert sgd.defaults["nesterov"] and sgd.defaults["momentum"] == 0.99


@pytest.mark.parametrize("version, least", [("v3", 48), ("deepmts", 64)])
def test_bf16_on_the_cpu_is_refused_where_torch_is_wrong(version, least):
    """The smallest maps must have three voxels a side."""
    config = resolve(Config(version=version, amp="bf16", patch=(least,) * 3), "petct", False)
    model = runs.build_model(config)
    assert choose_amp(config, CPU, model).amp == "bf16"
    with pytest.raises(UserError, match=f"below {least}"):
        choose_amp(replace(config, patch=(least, least, least - 16)), CPU, model)


# ------------------------------------------------------------------ a run and its folder


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fold": 3}, "--fold 3 of --folds 3"),
        ({"folds": 8, "fold": 7}, "6 patients are too few for 8 folds"),
        ({"splits": "nowhere.json"}, "nowhere.json: No such file"),
        ({"data": "nowhere"}, "nowhere: no such folder"),
        ({"amp": "fp16"}, "--amp fp16"),
        ({"amp": "bf16"}, "--amp bf16 with --patch"),
        ({"batch_size": 1}, "leaves batch norm a single value"),
        ({"batch_size": 13}, "--batch-size 13: more than the 12 crops of an epoch, of 3 training"),
        ({"data": ""}, "--data '': an empty string"),
        ({"out": ""}, "--out '': an empty string"),
        ({"version": "v4", "lambda_cls": 1.0, "phi": "none"}, "--lambda-cls has no effect on v4"),
    ],
)
def test_a_run_that_cannot_start_says_why(base, cases, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train.train(replace(base, **{"out": str(tmp_path / "run")} | options))
    assert not (tmp_path / "run" / "last.pt").exists()


def test_run_folder_is_complete(finished):
    run, result, rows = finished
    assert {p.name for p in run.iterdir()} >= {
        "config.json", "splits.json", "metrics.csv", "last.pt", "best.pt", "curves.png",
        "examples.png", "summary.json", "test_studies.csv", "tensorboard", ".lock",
    }  # fmt: skip
    for name in ("curves.png", "examples.png"):
        picture = matplotlib.image.imread(run / name)
        assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05
    [events] = (run / "tensorboard").iterdir()
    assert all(tag in events.read_bytes() for tag in (b"train/loss", b"gradient/seg", b"val_dice"))
    frame = pd.read_csv(run / "metrics.csv")
    own = TERMS["v3"] | {f"grad_{term}" for term in TERMS["v3"]}
    validated = ("val_dice", "val_healthy", "val_fpv_healthy_ml")
    assert set(frame) == {"epoch", "lr", "loss", *validated, *own, *CLOCK}
    assert frame["epoch"].tolist() == [1, 2] and not frame.isna().any(axis=None)
    assert [row["loss"] for row in rows] == pytest.approx(frame["loss"].tolist(), rel=1e-12)
    head, line = console.epoch_line(rows[1], 3661, True).splitlines()
    assert head.split()[-4:] == ["Dice", "patches/s", "wait", "left"] and "1:01:01" in line
    assert len(head.replace("val Dice", "val_Dice").split()) == len(line.split())


def test_best_is_what_select_says(base, cases, tmp_path, no_figures, monkeypatch):
    """Epoch 1 has the better Dice, epoch 2 leaves the healthy alone."""
    found = iter(
        [{"val_dice": 0.4, "val_healthy": 0.2}, {"val_dice": 0.3, "val_healthy": 0.65}] * 2
    )
    monkeypatch.setattr(train, "validation", lambda rows: next(found))
    for select, epoch, dice in (("dice", 1, 0.4), ("healthy", 2, 0.3)):
        train.train(replace(base, select=select, out=str(tmp_path / select)))
        best = train.runs.load_checkpoint(tmp_path / select / "best.pt")
        assert (best["epoch"], best["val_dice"]) == (epoch, dice)


def test_checkpoints_load_as_plain_types_and_hold_the_best_epoch(finished):
    run, *_ = finished
    frame = pd.read_csv(run / "metrics.csv").set_index("epoch")
    last, best = (torch.load(run / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert last["epoch"] == 2 and last["config"]["shared"] == [5]
    assert best["val_dice"] == last["best_dice"] == pytest.approx(frame["val_dice"].max())
    assert best["epoch"] == frame["val_dice"].idxmax()


def test_results_are_those_of_the_test_studies(finished):
    run, result, _ = finished
    frame = pd.read_csv(run / "test_studies.csv")
    splits = json.loads((run / "splits.json").read_text())
    assert frame["study"].tolist() == splits["test"] and len(frame) == 3
    assert result["run"] == str(run) and result["epochs"] == 2
    ill = frame[frame["has_lesion"]]
    expected = {
        "dice": ill["dice"].mean(),
        "fpv_ml": frame["fpv_ml"].mean(),
        "fnv_ml": ill["fnv_ml"].mean(),
        "tumor_accuracy": ((frame["tumor_score"] > 0.5) == frame["has_lesion"]).mean(),
    }
    assert {name: result["test"][name] for name in expected} == pytest.approx(expected)


CHANGES = [{"lr": 1e-2}, {"shared": (4,)}, {"seed": 2}, {"fold": 1}, {"phi": "none"}]


def test_a_run_is_neither_overwritten_nor_mixed(base, finished, monkeypatch):
    run, result, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.iterdir() if p.name != ".lock"}
    with pytest.raises(UserError, match="holds a run already. Add --resume"):
        train.train(base)
    for change in CHANGES:
        with pytest.raises(UserError, match=f"goes on with its own settings.*{[*change][0]} was"):
            train.train(replace(base, resume=True, **change))
    with pytest.raises(UserError, match="has 2 epochs already, more than --epochs 1"):
        train.train(replace(base, resume=True, epochs=1))
    monkeypatch.setattr(train, "evaluate", None)  # neither trained nor tested again
    assert train.train(replace(base, resume=True)) == result
    assert {p: p.stat().st_mtime_ns for p in run.iterdir() if p.name != ".lock"} == before


def test_resume_takes_the_saved_options(base, finished):
    config = train.parse(["--resume", "--out", base.out, "--epochs", "5"])
    assert config == replace(resolve(base, "petct", False), resume=True, epochs=5)
    assert train.parse(["--resume", "--out", "new", "--lr", "1"]).lr == 1
    with pytest.raises(UserError, match="--resume: say which run with --out"):
        train.parse(["--resume"])


def test_a_schedule_over_all_epochs_cannot_be_extended(base, tmp_path, no_figures):
    run = tmp_path / "run"
    train.train(replace(base, out=str(run), epochs=1, steps=1, schedule="poly"))
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="--schedule poly was laid out for 1 epochs"):
        train.train(train.parse(["--resume", "--out", str(run), "--epochs", "2"]))
    (run / "last.pt").rename(run / "stopped.json")
    with pytest.raises(UserError, match="has stopped.json but no last.pt to go on from"):
        train.train(train.parse(["--resume", "--out", str(run)]))


def test_a_loss_that_is_no_number_stops_the_run(base, tmp_path, monkeypatch, no_figures):
    """The second epoch diverges: the checkpoint of the first is kept."""
    true_step, steps = train.train_step, []

    def diverge(*args):
        steps.append(1)
        terms = true_step(*args)
        return terms | {"seg": terms["seg"] * float("nan")} if len(steps) == 2 else terms

    monkeypatch.setattr(train, "train_step", diverge)
    with pytest.raises(UserError, match="the loss is nan in epoch 2"):
        train.train(replace(base, out=str(tmp_path), steps=1))
    assert runs.load_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    assert pd.read_csv(tmp_path / "metrics.csv")["epoch"].tolist() == [1]


SYSTEMS = [("nnunet", (32, 32, 32)), ("weninger", (16, 16, 16)), ("valindria", (16, 16, 16))]


@pytest.mark.parametrize("version, patch", SYSTEMS)
def test_a_system_of_each_mechanism_from_training_to_masks(base, cases, tmp_path, version, patch):
    """Deep supervision, a classifier beside reconstructions, alternating branches."""
    run = tmp_path / version
    options = dict(version=version, phi=None, patch=patch, epochs=1, steps=1, val_every=1)
    options |= dict(widths=Config.widths, out=str(run))
    result = train.train(replace(base, **options))
    assert result["epochs"] == 1 and (run / "examples.png").exists()
    frame = pd.read_csv(run / "test_studies.csv")
    assert ("pet_dice" in frame) == (version == "valindria")
    assert ("tumor_score" in frame) == (version == "weninger")
    study = next(Path(base.data).glob("*/*"))
    out = tmp_path / "masks"
    evaluation.run_command([str(run), "--predict", str(study), "--out", str(out)])
    assert len(list(out.iterdir())) == 1


def test_time_left_is_that_of_the_epochs_of_this_launch(tmp_path, capsys):
    speed = {"loss": 1.0, "patches_per_s": 1.0, "data_wait": 0.0}
    rows = [{"epoch": e, "seconds": s} | speed for e, s in ((1, 99.0), (2, 10.0), (3, 20.0))]
    with console.Log(tmp_path, 1, 6, 1, True) as log:
        log.tell(rows[:2])
        log.tell(rows)
    left = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert left == ["left", "0:00:40", "0:00:45"]


def test_every_step_of_every_epoch_has_a_seed_of_its_own(base, tmp_path, no_figures, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    train.train(replace(base, out=str(tmp_path)))
    assert len(seeds) == len(set(seeds)) == 1 + 4  # of the weights and of two epochs of two steps


# ------------------------------------------------------------------ killed and resumed


class Killed(Exception):
    """Stands for kill -9: nothing after it is done."""


def die_at(patch, moment):
    save, seed = runs.save_checkpoint, train.step_seed

    def die(*args):
        raise Killed

    def save_or_die(path, content):
        here = f"{path.name} of epoch {content['epoch']}"
        return die() if here == moment else save(path, content)

    patch.setattr(runs, "save_checkpoint", save_or_die)
    if moment == "in an epoch":
        second = lambda *at: die() if at[1:3] == (1, 1) else seed(*at)  # noqa: E731
        patch.setattr(train, "step_seed", second)
    if moment == "in the test":
        patch.setattr(evaluation, "to_native", die)


@pytest.mark.parametrize(
    "moment, kept",
    [("best.pt of epoch 1", 0), ("in an epoch", 1), ("last.pt of epoch 2", 1), ("in the test", 2)],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    base, finished, tmp_path, no_figures, monkeypatch, moment, kept
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_at(patch, moment)
        with pytest.raises(Killed):
            train.train(replace(base, out=str(run)))
    assert (run / "last.pt").exists() == (kept > 0)
    assert not kept or runs.load_checkpoint(run / "last.pt")["epoch"] == kept
    reported = []
    result = train.train(train.parse(["--resume", "--out", str(run)]), reported.append)
    assert [row["epoch"] for row in reported] == [1, 2][kept:]
    assert_same_run(run, finished[0])
    assert result == finished[1] | {"run": str(run)}


def run_script(*words, launcher=(), **env):
    """This file as a process: see the end."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, *launcher, __file__, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_kill_9_inside_a_checkpoint(base, finished, tmp_path, no_figures):
    """Half of the second last.pt is on the disk, under its temporary name."""
    run = tmp_path / "run"
    done = run_script("killed", json.dumps(plain(replace(base, out=str(run)))))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(run.glob(".last.pt.*.tmp"))) == 1
    train.train(train.parse(["--resume", "--out", str(run)]))
    assert_same_run(run, finished[0])
    assert not list(run.glob("*.tmp"))


def test_more_epochs_continue_a_finished_run(base, finished, tmp_path, no_figures):
    run = tmp_path / "run"
    assert train.train(replace(base, out=str(run), epochs=1))["epochs"] == 1
    result = train.train(train.parse(["--resume", "--out", str(run), "--epochs", "2"]))
    assert_same_run(run, finished[0])
    assert result == finished[1] | {"run": str(run)}


def test_workers_do_not_change_the_weights(base, finished, tmp_path, no_figures):
    train.train(replace(base, out=str(tmp_path), workers=2))
    assert_same_run(tmp_path, finished[0])


def test_a_start_that_made_no_checkpoint_leaves_no_splits(base, tmp_path, monkeypatch, no_figures):
    """Interrupted before its first checkpoint, then started with another fold."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(replace(base, out=str(tmp_path)))
    first = json.loads((tmp_path / "splits.json").read_text())
    train.train(replace(base, out=str(tmp_path), fold=1, epochs=1, steps=1))
    assert json.loads((tmp_path / "splits.json").read_text()) != first


def resume(run, **options):
    return train.train(replace(train.parse(["--resume", "--out", str(run)]), **options))


def untested(finished, tmp_path, **changes):
    """A copy of the finished run that has yet to be tested, its last.pt changed."""
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (run / "summary.json").unlink()
    content = torch.load(run / "last.pt", weights_only=True)
    for name, change in changes.items():
        content[name] = change(content[name])
    torch.save(content, run / "last.pt")
    return run


def test_changed_data_do_not_go_on(base, finished, tmp_path, no_figures):
    run, data = untested(finished, tmp_path), shutil.copytree(base.data, tmp_path / "data")
    splits = json.loads((run / "splits.json").read_text())
    changes = {"train": ("CT", "CTres"), "val": ("PET", "SUV"), "test": ("mask", "SEG")}
    for part, (slot, stem) in changes.items():
        path = data / splits[part][0] / f"{stem}.nii.gz"
        image = nib.load(path)
        middle = tuple(slice(n // 2, n // 2 + 4) for n in image.shape)
        values = np.asarray(image.dataobj).copy()
        values[middle] = 1 - values[middle] if slot == "mask" else values[middle] + 40
        nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    with pytest.raises(UserError) as caught:
        resume(run, data=str(data), cache=str(tmp_path / "cache"))
    found = ", ".join(f"{splits[part][0]} ({slot})" for part, (slot, _) in changes.items())
    assert str(caught.value).startswith(f"{run}: changed since the run began: {found}. Restore")
    assert resume(run)["epochs"] == 2  # restored


def test_other_splits_do_not_go_on(base, finished, tmp_path, no_figures):
    file = tmp_path / "splits.json"
    run = untested(finished, tmp_path, config=lambda config: config | {"splits": str(file)})
    splits = json.loads((run / "splits.json").read_text())
    other = splits | {"val": splits["test"], "test": splits["val"]}
    for given, own, message in (
        (other, splits, f"{file}: not the splits of {run}"),
        (other, other, f"{run}: changed since the run began: .* .splits., .* and 2 more. Restore"),
        (splits, {"train": []}, f"{run / 'splits.json'}: "),
    ):
        file.write_text(json.dumps(given))
        (run / "splits.json").write_text(json.dumps(own))
        with pytest.raises(UserError, match=message):
            resume(run, splits=str(file))
    file.unlink()  # the run has its own
    (run / "splits.json").write_text(json.dumps(splits))
    assert resume(run, splits=str(file))["test"] == finished[1]["test"]


def test_a_run_from_before_the_digests_goes_on_and_says_so(finished, tmp_path, no_figures, capsys):
    run = untested(finished, tmp_path, studies=lambda studies: None)
    assert resume(run)["test"] == finished[1]["test"]
    assert "whether its studies changed is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content",
    [
        ("last.pt", b""), ("last.pt", 100), ("best.pt", 100), ("config.json", "[1]"),
        ("config.json", '{"config": {"shared": 5}}'), ("config.json", '{"config": {"data": 5}}'),
        ("config.json", '{"config": {"epochs": NaN}}'), ("splits.json", '{"train": [1]}'),
        ("splits.json", "[]"), ("summary.json", "[]"), ("summary.json", '{"systems": {}}'),
        ("summary.json", '{"systems": {"model": {"dice": {"mean": "x"}}}}'),
        ("metrics.csv", b"\xff\x00"), ("metrics.csv", "epoch,seconds\n1,x\n2,y\n"),
        ("metrics.csv", "epoch,seconds\n1,1\n"), ("metrics.csv", "loss\n1\n"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(finished, tmp_path, no_figures, name, content):
    run = untested(finished, tmp_path)
    if isinstance(content, int):
        content = (run / name).read_bytes()[:content]
    (run / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        resume(run)
    found = str(caught.value)
    assert found.startswith(f"{run / name}: ") and "\n" not in found and found.endswith(".")


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimizer", {}), ("model", {"a": 1}), ("scaler", 3), ("best_dice", "x"), ("epoch", None),
        ("config", []),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_content_is_named(finished, tmp_path, name, value):
    run = untested(finished, tmp_path, **{name: lambda old: value})
    with pytest.raises(UserError, match=f"^{run / 'last.pt'}: damaged.*[.]$"):
        resume(run)


@pytest.mark.parametrize("name", ["best.pt", "metrics.csv", "last.pt", "tensorboard"])
def test_a_full_disk_stops_a_run_that_goes_on_later(
    base, finished, tmp_path, no_figures, monkeypatch, name
):
    """In its second epoch; at best.pt in the first, since the second may be no better."""
    run, full = tmp_path / "run", OSError(errno.ENOSPC, "No space left on device")
    replace_file, log, turns = os.replace, console.log_epoch, []

    def fail(path):
        turns.extend([1] if Path(path).name == name else [])
        if len(turns) == 1 + (name != "best.pt"):
            raise full

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: fail(new) or replace_file(old, new))
        patch.setattr(console, "log_epoch", lambda *args: fail("tensorboard") or log(*args))
        with pytest.raises(OSError, match="No space left") as caught:
            train.train(replace(base, out=str(run)))
    assert caught.value.filename == str(run / name)
    assert not list(run.glob(".*.tmp"))
    resume(run)
    assert_same_run(run, finished[0])


def test_threads_are_no_more_than_the_cores(capsys):
    before = torch.get_num_threads()
    devices.use_threads(99999, print)
    cores = torch.get_num_threads()
    assert cores == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    assert (
        capsys.readouterr().out
        == f"threads    {cores}, one per core, in place of --threads 99999\n"
    )
    devices.use_threads(before, print)
    devices.use_threads(0, print)
    assert torch.get_num_threads() == before and capsys.readouterr().out == ""


# ------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_train_one_network(base, cases, tmp_path):
    """Ten steps under torchrun: one set of weights, the same crops in total, one writer."""
    run = tmp_path / "run"
    config = replace(base, out=str(run), epochs=2, steps=5, batch_size=4)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_script("rank", json.dumps(plain(config)), launcher=torchrun)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(f"{run}.{rank}.json").read_text()) for rank in (0, 1))
    assert one["hashes"] == two["hashes"] and len(set(one["hashes"])) == 2
    assert two["writes"] == [] and one["writes"].count("last.pt") == 2
    assert one["result"] == two["result"]
    together = sorted(map(tuple, one["keys"] + two["keys"]))
    assert together == [(epoch, i) for epoch in (0, 1) for i in range(20)]
    assert len(one["keys"]) == len(two["keys"]) == 20
    assert pd.read_csv(run / "metrics.csv")["epoch"].tolist() == [1, 2]
    splits = json.loads((run / "splits.json").read_text())
    assert pd.read_csv(run / "test_studies.csv")["study"].tolist() == splits["test"]


def test_batch_must_divide_by_the_processes():
    with pytest.raises(UserError, match="--batch-size 2 does not divide by 4 devices"):
        train.refuse_batches(Config(batch_size=2, patch=(48,) * 3, crops=1), MirrorUNet(), 4, 9)


def test_the_command_ends_with_one_message_and_code_2(base, cases):
    """As a user runs it: no traceback, nothing on stdout but the data."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", base.data, "--cache", base.cache]
    command += ["--version", "v4", "--lambda-rec", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --lambda-rec has no effect on v4")
    assert done.stderr.count("\n") == 1


def rank_of_a_run(config):
    """One rank of a data-parallel run; writes what it saw to <out>.<rank>.json."""
    models, keys, writes, hashes = [], [], [], []
    build, read, save = runs.build_model, train.Patches.batch, runs.save_checkpoint
    runs.build_model = lambda config: models.append(build(config)) or models[0]
    train.Patches.batch = lambda self, own, pinned: keys.extend(own) or read(self, own, pinned)
    runs.save_checkpoint = lambda path, content: writes.append(path.name) or save(path, content)

    def digest():
        whole = hashlib.sha256()
        for value in models[0].state_dict().values():
            whole.update(value.contiguous().numpy().tobytes())
        return whole.hexdigest()

    result = train.train(config, lambda row: hashes.append(digest()))
    seen = {"keys": keys, "writes": writes, "hashes": hashes, "result": result}
    Path(f"{config.out}.{os.environ['RANK']}.json").write_text(json.dumps(seen))


def killed_run(config):
    """train() until half of the second last.pt is written."""
    save, turns = torch.save, []

    def half_save(content, file):
        turns.extend([1] if "optimizer" in content else [])
        if len(turns) == 2:
            file.write(b"PK half of a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    torch.save = half_save
    train.train(config)


if __name__ == "__main__":
    {"rank": rank_of_a_run, "killed": killed_run}[sys.argv[1]](as_config(json.loads(sys.argv[2])))
