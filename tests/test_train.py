"""train.py: a step, the loop, the run folder, what a killed run resumes with, several processes.

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
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_config
from tqdm import tqdm

import devices
import eval as evaluation
import plots
import runs
import train
from common import UserError, write_json
from config import Config, from_dict, resolve, to_dict
from devices import Ranks, choose_amp
from losses import LOSSES
from mirror_unet import MirrorUNet

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TERMS = {
    "v1": {"rec_ct", "seg"},
    "v2": {"rec_ct", "rec_pet", "seg"},
    "v3": {"rec_ct", "rec_pet", "seg", "cls"},
    "v4": {"seg"},
}
CLOCK = ["patches_per_s", "data_wait", "seconds", "val_seconds"]  # differ from run to run


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out the figures, which take longer than these runs."""
    monkeypatch.setattr(plots, "draw_curves", lambda run: None)
    monkeypatch.setattr(plots, "draw_examples", lambda *args: None)


def assert_same(a, b, at):
    """Two checkpoints are equal; tensors in every bit."""
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), at
    else:
        assert a == b, at


def assert_same_run(run, reference):
    """All that both checkpoints hold, and all of metrics.csv but the clock."""
    for name in ("last.pt", "best.pt"):
        expected = torch.load(reference / name, weights_only=True)
        assert_same(torch.load(run / name, weights_only=True), expected, name)
    rows = pd.read_csv(run / "metrics.csv").drop(columns=CLOCK)
    expected = pd.read_csv(reference / "metrics.csv").drop(columns=CLOCK)
    pd.testing.assert_frame_equal(rows, expected, check_exact=False, rtol=1e-12)


# ------------------------------------------------------------------ one epoch


class Epoch:
    """An epoch: its row, the network before and after, and what the first step was given."""

    def __init__(self, config, cases, monkeypatch=None, steps=1):
        config = replace(resolve(config, "petct"), steps=steps)
        self.model = runs.build_model(config)
        parameters = self.model.named_parameters()
        self.before = {name: value.detach().clone() for name, value in parameters}
        self.inputs, self.targets = [], []
        state = train.make_state(Path("run"), config, CPU, Ranks(CPU), self.model)
        state.wrapped.register_forward_pre_hook(
            lambda net, images: self.inputs.append([image.clone() for image in images])
        )
        if monkeypatch:
            self.loss = LOSSES["petct"][config.version]
            monkeypatch.setitem(LOSSES["petct"], config.version, self.record_loss)
        loader = train.make_loader(cases, state)
        self.row = train.train_epoch(state, loader, 0, tqdm(disable=True))
        keys = [(0, i) for i in range(config.batch_size)]
        self.images = loader.patches.batch(keys)["image"].float()

    def record_loss(self, output, batch, weights):
        self.targets.append(batch)
        return self.loss(output, batch, weights)


LEGAL = [("v4", "none")]
for version in ("v1", "v2", "v3"):
    LEGAL += [(version, "none"), (version, "noise"), (version, "shuffle")]


@pytest.mark.parametrize("version, phi", LEGAL)
def test_every_version_steps_with_every_phi(base, cases, monkeypatch, version, phi):
    """Φ changes what the CT branch is given, not what it has to reconstruct."""
    epoch = Epoch(replace(base, version=version, phi=phi), cases, monkeypatch)
    row, terms = epoch.row, TERMS[version]
    assert terms == set(runs.loss_term_names(row))
    assert row["loss"] == pytest.approx(sum(row[term] for term in terms))
    assert {name for name in row if name.startswith("grad_")} == {f"grad_{t}" for t in terms}
    for term in terms:
        assert np.isfinite(row[term]) and row[f"grad_{term}"] > 0

    [(ct, pet)], [batch] = epoch.inputs, epoch.targets
    assert torch.equal(pet, epoch.images[:, 1:])
    assert torch.equal(ct, epoch.images[:, :1]) == (phi == "none")
    assert torch.equal(torch.cat([batch["ct"], batch["pet"]], dim=1), epoch.images)
    assert set(batch) == {"ct", "pet", "mask", "tumor"}
    for name, value in epoch.model.named_parameters():  # every task reached its weights
        assert name == "theta" or not torch.equal(value, epoch.before[name]), name


def test_a_run_of_the_control(base, tmp_path, monkeypatch, no_figures):
    """CT is swapped within each part; eval.py finds the same; masks are refused."""
    run, seen = tmp_path / "run", []
    make_loader, evaluate = train.make_loader, train.evaluate
    monkeypatch.setattr(train, "make_loader", lambda c, s: seen.append(c) or make_loader(c, s))
    monkeypatch.setattr(
        train, "evaluate", lambda state, c, **k: seen.append(c) or evaluate(state, c, **k)
    )
    config = replace(base, ct="other", epochs=1, steps=1, out=str(run))
    train.train(config)
    splits = json.loads((run / "splits.json").read_text())
    assert len(seen) == 3
    for part, studies in zip(("train", "val", "test"), seen, strict=True):
        assert [case.name for case in studies] == splits[part]
        for case in studies:
            assert case.lender.patient != case.patient
            assert case.lender.name in splits[part]

    evaluation.eval_command([config.out, "--out", str(tmp_path / "again")])
    again = tmp_path / "again" / "run" / "test_studies.csv"
    assert again.read_bytes() == (run / "test_studies.csv").read_bytes()
    with pytest.raises(UserError, match="--predict: a run with --ct other"):
        evaluation.eval_command([config.out, "--predict", base.data, "--out", str(tmp_path / "m")])


def test_v1_with_nothing_shared_trains_its_pet_branch_as_the_pet_unet(base, cases, monkeypatch):
    """Five steps from the same weights, with equal weights of the mask: CT has no part in it."""
    options = dict(widths=Config.widths, weight_decay=0.0, phi="none", lr=1e-4)
    build, start = runs.build_model, {}

    def build_alike(config):
        model = build(config)
        model.load_state_dict({**model.state_dict(), **start})
        return model

    pet = Epoch(replace(base, version="pet", **options), cases, steps=5)
    first = build(resolve(replace(base, version="pet", **options), "petct"))
    for name, value in first.state_dict().items():
        start[name.replace("layers", "pet")] = value
    monkeypatch.setattr(runs, "build_model", build_alike)
    config = replace(base, version="v1", shared=(), lambda_seg=1.0, **options)
    ours = Epoch(config, cases, steps=5).model.state_dict()
    for name, weight in pet.model.state_dict().items():
        assert torch.allclose(ours[name.replace("layers", "pet")], weight, atol=1e-6), name
        if weight.dim() > 1:
            assert not torch.equal(weight, first.state_dict()[name])


def test_nothing_shared_has_no_shared_gradient(base, cases):
    row = Epoch(replace(base, version="v1", shared=()), cases).row
    assert row["loss"] > 0
    assert not any(name.startswith("grad_") for name in row)


@pytest.mark.parametrize(
    "theta, lr, low, high",
    [("learn", 1e-3, 0.498, 0.502), ("learn", 10.0, 0, 1), (0.3, 10.0, 0.3, 0.3)],
)
def test_theta_is_learned_within_0_and_1(base, cases, theta, lr, low, high):
    config = replace(base, version="v4", phi=None, theta=theta, lr=lr)
    epoch = Epoch(config, cases, steps=2)
    assert low <= round(epoch.row["theta"], 6) <= high
    assert epoch.row["theta"] == epoch.model.theta.item()
    assert torch.equal(epoch.model.theta, epoch.before["theta"]) == (theta != "learn")


@pytest.mark.parametrize("version", ["v1", "v3", "v4"])
def test_a_step_opens_the_gates(base, cases, version):
    """g moves, its mean |g| is in metrics.csv, and from then on the mask depends on CT."""
    phi = "none" if version == "v4" else base.phi
    config = replace(base, version=version, phi=phi, shared=(4, 6), bottleneck="gate")
    epoch = Epoch(config, cases)
    net, row = epoch.model, epoch.row
    assert list(net.gates) == ["ct_4", "pet_4", "ct_6", "pet_6"]
    assert {name for name in row if name.startswith("gate_")} == {f"gate_{n}" for n in net.gates}
    assert set(runs.loss_term_names(row)) == TERMS[version]
    for name, gate in net.gates.items():
        assert not epoch.before[f"gates.{name}.g"].any()
        assert gate.g.all()
        assert row[f"gate_{name}"] == gate.g.abs().mean().item()

    ct, pet = epoch.images[:, :1], epoch.images[:, 1:]
    net.eval()
    with torch.no_grad():
        masks = [net(image, pet, heads=("seg",)).seg for image in (ct, 1 - ct)]
    assert not torch.equal(*masks)


def test_the_learning_rate_drops_to_a_tenth():
    config = Config(lr=1e-3, lr_drop=3, epochs=4)
    rates = [train.learning_rate(config, epoch) for epoch in range(5)]
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 2)
    assert train.learning_rate(replace(config, lr_drop=0), 9) == 1e-3


def test_what_does_not_decay(base):
    config = make_config("v4", theta="learn", lr=base.lr)
    model = runs.build_model(config)
    weights, scalars = train.make_optimizer(model, config, CPU).param_groups
    assert scalars["params"] == [model.theta] and scalars["weight_decay"] == 0
    assert weights["weight_decay"] == 1e-6 and weights["lr"] == base.lr

    model = runs.build_model(make_config("v1", bottleneck="gate"))
    weights, gates = train.make_optimizer(model, config, CPU).param_groups
    assert gates["params"] == [model.gates["ct_5"].g, model.gates["pet_5"].g]
    assert gates["weight_decay"] == 0
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(weights["params"]) == len(learned) - 2


# ------------------------------------------------------------------ the machine


def test_a_torch_for_cuda_that_sees_no_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    blind = "cpu (this torch is built for CUDA but sees no GPU)"
    for built, description in ((None, "cpu"), ("12.8", blind)):
        monkeypatch.setattr(torch.version, "cuda", built)
        assert devices.describe_device(CPU) == description


@pytest.mark.parametrize("version, smallest", [("v3", 48), ("deepmts", 64)])
def test_bf16_on_the_cpu_is_refused_where_torch_is_wrong(version, smallest):
    """The smallest maps must have three voxels a side."""
    config = make_config(version, amp="bf16", patch=(smallest,) * 3)
    model = runs.build_model(config)
    assert choose_amp(config, CPU, model).amp == "bf16"
    with pytest.raises(UserError, match=f"below {smallest}"):
        choose_amp(replace(config, patch=(smallest, smallest, smallest - 16)), CPU, model)


def test_threads_are_no_more_than_the_cores(capsys):
    before = torch.get_num_threads()
    devices.set_threads(99999, print)
    cores = torch.get_num_threads()
    if hasattr(os, "sched_getaffinity"):
        assert cores == len(os.sched_getaffinity(0))
    line = f"threads    {cores}, one per core, in place of --threads 99999\n"
    assert capsys.readouterr().out == line
    devices.set_threads(before, print)
    devices.set_threads(0, print)
    assert torch.get_num_threads() == before
    assert capsys.readouterr().out == ""


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
def test_a_run_that_cannot_start_names_the_reason(base, cases, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train.train(replace(base, **{"out": str(tmp_path / "run"), **options}))
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_part_without_lesions_is_announced(base, cases, tmp_path, no_figures, capsys):
    with_lesion = [case.name for case in cases if case.has_lesion]
    without = [case.name for case in cases if not case.has_lesion]
    splits = {"train": with_lesion[:1], "val": with_lesion[-1:], "test": without[:1]}
    write_json(tmp_path / "splits.json", splits)
    options = {"splits": str(tmp_path / "splits.json"), "out": str(tmp_path / "run")}
    train.train(replace(base, epochs=1, steps=1, **options))
    output = capsys.readouterr().out
    assert "no lesion in the test part: no Dice, no FNV" in output
    assert "in the val part" not in output


def test_run_folder_is_complete(finished):
    run, _, rows = finished
    files = (
        "config.json splits.json metrics.csv last.pt best.pt curves.png examples.png "
        "summary.json test_studies.csv tensorboard .lock"
    )
    assert {path.name for path in run.iterdir()} >= set(files.split())
    for name in ("curves.png", "examples.png"):
        picture = matplotlib.image.imread(run / name)
        assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05
    [events] = (run / "tensorboard").iterdir()
    for tag in (b"train/loss", b"gradient/seg", b"val_dice"):
        assert events.read_bytes().count(tag) == 2

    frame = pd.read_csv(run / "metrics.csv")
    terms = TERMS["v3"]
    gradients = {f"grad_{term}" for term in terms}
    others = {"epoch", "lr", "loss", "val_dice", "val_fpv_healthy_ml", *CLOCK}
    assert set(frame) == terms | gradients | others
    assert frame["epoch"].tolist() == [1, 2]
    assert not frame.isna().any(axis=None)
    assert [row["loss"] for row in rows] == pytest.approx(frame["loss"].tolist(), rel=1e-12)


def test_checkpoints_load_as_plain_types_and_hold_the_best_epoch(finished):
    frame = pd.read_csv(finished[0] / "metrics.csv").set_index("epoch")
    last = torch.load(finished[0] / "last.pt", weights_only=True)
    best = torch.load(finished[0] / "best.pt", weights_only=True)
    assert last["epoch"] == 2 and last["config"]["shared"] == [5]
    assert best["val_dice"] == last["best_dice"] == pytest.approx(frame["val_dice"].max())
    assert best["epoch"] == frame["val_dice"].idxmax()


@pytest.mark.parametrize(
    "dices, best", [((0.4, 0.3), 1), ((0.3, 0.4), 2), ((np.nan, np.nan), 2), ((0.1, np.nan), 1)]
)
def test_best_is_the_epoch_of_the_highest_dice(
    base, cases, tmp_path, no_figures, monkeypatch, dices, best
):
    """Without a lesion to validate on, the last validated epoch is the best."""
    values = iter(dices)
    monkeypatch.setattr(train, "summarize_validation", lambda rows: {"val_dice": next(values)})
    monkeypatch.setattr(train, "test_best_checkpoint", lambda *args: {})
    train.train(replace(base, steps=1, out=str(tmp_path)))
    assert runs.load_checkpoint(tmp_path / "best.pt")["epoch"] == best


def test_results_are_those_of_the_test_studies(finished):
    run, result, _ = finished
    frame = pd.read_csv(run / "test_studies.csv")
    splits = json.loads((run / "splits.json").read_text())
    assert frame["study"].tolist() == splits["test"] and len(frame) == 3
    assert result["run"] == str(run) and result["epochs"] == 2
    positive = frame[frame["has_lesion"]]
    expected = {
        "dice": positive["dice"].mean(),
        "fpv_ml": frame["fpv_ml"].mean(),
        "fnv_ml": positive["fnv_ml"].mean(),
        "tumor_accuracy": ((frame["tumor_score"] > 0.5) == frame["has_lesion"]).mean(),
    }
    for name, mean in expected.items():
        assert result["test"][name] == pytest.approx(mean)


CHANGES = [{"lr": 1e-2}, {"shared": (4,)}, {"seed": 2}, {"fold": 1}, {"phi": "none"}]


def test_a_run_is_neither_overwritten_nor_mixed(base, finished, monkeypatch):
    run, result, _ = finished
    files = [path for path in run.iterdir() if path.name != ".lock"]
    before = [path.stat().st_mtime_ns for path in files]
    with pytest.raises(UserError, match="holds a run already. Add --resume"):
        train.train(base)
    for change in CHANGES:
        [name] = change
        with pytest.raises(UserError, match=f"resumes with the options .*{name} was"):
            train.train(replace(base, resume=True, **change))
    with pytest.raises(UserError, match="has 2 epochs already, more than --epochs 1"):
        train.train(replace(base, resume=True, epochs=1))
    monkeypatch.setattr(train, "evaluate", None)  # neither trained nor tested again
    assert train.train(replace(base, resume=True)) == result
    assert [path.stat().st_mtime_ns for path in files] == before


def test_resume_takes_the_saved_options(base, finished):
    config = train.parse_train(["--resume", "--out", base.out, "--epochs", "5"])
    saved = resolve(base, "petct")
    assert config == replace(saved, resume=True, epochs=5)
    assert train.parse_train(["--resume", "--out", "new", "--lr", "1"]).lr == 1
    with pytest.raises(UserError, match="--resume: say which run with --out"):
        train.parse_train(["--resume"])
    with pytest.raises(UserError, match="seed was 1, now 2"):
        train.parse_train(["--resume", "--out", base.out, "--seed", "2"])


def test_a_loss_that_is_no_number_stops_the_run(base, tmp_path, monkeypatch, no_figures):
    """The second epoch diverges: the checkpoint of the first is kept."""
    train_step, steps = train.train_step, []

    def diverge(*args):
        steps.append(1)
        terms = train_step(*args)
        if len(steps) == 2:
            terms["seg"] = terms["seg"] * float("nan")
        return terms

    monkeypatch.setattr(train, "train_step", diverge)
    with pytest.raises(UserError, match="the loss is nan in epoch 2"):
        train.train(replace(base, out=str(tmp_path), steps=1))
    assert runs.load_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    assert pd.read_csv(tmp_path / "metrics.csv")["epoch"].tolist() == [1]


@pytest.mark.parametrize(
    "version, side, column",
    [("nnunet", 32, "dice"), ("weninger", 16, "tumor_score"), ("valindria", 16, "pet_dice")],
)
def test_a_system_of_each_mechanism_from_training_to_masks(
    base, cases, tmp_path, version, side, column
):
    """Deep supervision, a classifier beside reconstructions, alternating branches."""
    run, masks = tmp_path / version, tmp_path / "masks"
    options = dict(version=version, phi=None, patch=(side,) * 3, epochs=1, steps=1)
    config = replace(base, widths=Config.widths, out=str(run), **options)
    assert train.train(config)["epochs"] == 1
    assert (run / "examples.png").exists()
    assert column in pd.read_csv(run / "test_studies.csv")
    study = next(Path(base.data).glob("PETCT_*/*"))
    evaluation.eval_command([str(run), "--predict", str(study), "--out", str(masks)])
    assert len(list(masks.iterdir())) == 1


def test_time_left_is_that_of_the_epochs_of_this_launch(tmp_path, capsys):
    rows = []
    for epoch, seconds in ((1, 99.0), (2, 10.0), (3, 20.0)):
        row = {"epoch": epoch, "seconds": seconds, "loss": 1.0}
        rows.append({**row, "patches_per_s": 1.0, "data_wait": 0.0})
    state = SimpleNamespace(
        run=tmp_path,
        config=Config(epochs=6),
        ranks=SimpleNamespace(main=True),
        epoch=1,
    )
    with train.Log(state, crops=1) as log:
        for count in (2, 3):
            state.rows = rows[:count]
            log.write_epoch()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["left", "0:00:40", "0:00:45"]
    assert len({len(line) for line in lines}) == 1


def test_a_machine_without_tensorboardx_trains(base, tmp_path, no_figures, monkeypatch):
    monkeypatch.setattr(train, "SummaryWriter", None)
    train.train(replace(base, out=str(tmp_path), epochs=1, steps=1))
    assert not (tmp_path / "tensorboard").exists()


def test_every_step_of_every_epoch_has_a_seed_of_its_own(base, tmp_path, no_figures, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    train.train(replace(base, out=str(tmp_path)))
    assert len(seeds) == len(set(seeds)) == 1 + 4  # of the weights and of two epochs of two steps


# ------------------------------------------------------------------ killed and resumed


class Killed(Exception):
    """Stands for kill -9: nothing after it is done."""


def die(*args):
    raise Killed


def die_at(patch, moment):
    save, seed = runs.save_checkpoint, train.step_seed

    def save_or_die(path, content):
        now = f"{path.name} of epoch {content['epoch']}"
        return die() if now == moment else save(path, content)

    patch.setattr(runs, "save_checkpoint", save_or_die)
    if moment == "in an epoch":
        second = lambda *at: die() if at[1:3] == (1, 1) else seed(*at)  # noqa: E731
        patch.setattr(train, "step_seed", second)
    if moment == "in the test":
        patch.setattr(train, "add_tumor_calls", die)


def resume(run, report=None, **options):
    config = train.parse_train(["--resume", "--out", str(run)])
    return train.train(replace(config, **options), report)


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
    if kept:
        assert runs.load_checkpoint(run / "last.pt")["epoch"] == kept
    rows = []
    result = resume(run, rows.append)
    assert [row["epoch"] for row in rows] == [1, 2][kept:]
    assert_same_run(run, finished[0])
    assert result == {**finished[1], "run": str(run)}


def run_script(*words, launcher=()):
    """This file as a process: see the end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, __file__, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_kill_9_inside_a_checkpoint(base, finished, tmp_path, no_figures):
    """Half of the second last.pt is on the disk, under its temporary name."""
    run = tmp_path / "run"
    done = run_script("killed", json.dumps(to_dict(replace(base, out=str(run)))))
    assert done.returncode == -signal.SIGKILL, done.stderr
    [half] = run.glob(".last.pt*.tmp")
    os.utime(half, (0, 0))  # more than a day old
    resume(run)
    assert_same_run(run, finished[0])
    assert not half.exists()


def test_more_epochs_continue_a_finished_run(base, finished, tmp_path, no_figures):
    run = tmp_path / "run"
    assert train.train(replace(base, out=str(run), epochs=1))["epochs"] == 1
    result = resume(run, epochs=2)
    assert_same_run(run, finished[0])
    assert result == {**finished[1], "run": str(run)}


def test_a_run_with_gates_resumes_bit_for_bit(base, tmp_path, no_figures):
    words = ["--version", "v3", "--shared", "4", "5", "6", "--bottleneck", "gate"]
    given = train.parse_train(words)
    config = replace(base, shared=given.shared, bottleneck=given.bottleneck)
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = train.train(replace(config, out=str(whole)))
    train.train(replace(config, out=str(run), epochs=1))
    assert resume(run, epochs=2) == {**result, "run": str(run)}
    assert_same_run(run, whole)
    gates = [name for name in pd.read_csv(run / "metrics.csv") if name.startswith("gate_")]
    assert gates == [f"gate_{branch}_{i}" for i in (4, 5, 6) for branch in ("ct", "pet")]


def test_workers_do_not_change_the_weights(base, finished, tmp_path, no_figures):
    train.train(replace(base, out=str(tmp_path), workers=2))
    assert_same_run(tmp_path, finished[0])


def test_a_start_that_made_no_checkpoint_leaves_no_splits(base, tmp_path, monkeypatch, no_figures):
    """Interrupted before its first checkpoint, then started with another fold."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", die)
        with pytest.raises(Killed):
            train.train(replace(base, out=str(tmp_path)))
    first = json.loads((tmp_path / "splits.json").read_text())
    train.train(replace(base, out=str(tmp_path), fold=1, epochs=1, steps=1))
    assert json.loads((tmp_path / "splits.json").read_text()) != first


def untested(finished, tmp_path, **changes):
    """A copy of the finished run that has yet to be tested, its last.pt changed."""
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (run / "summary.json").unlink()
    content = torch.load(run / "last.pt", weights_only=True)
    torch.save({**content, **changes}, run / "last.pt")
    return run


def test_a_trial_without_last_pt_is_not_extended(finished, tmp_path):
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (run / "last.pt").unlink()
    with pytest.raises(UserError, match="has summary.json but no last.pt"):
        resume(run, epochs=3)
    assert resume(run)["epochs"] == 2


def test_changed_data_do_not_resume(finished, tmp_path, no_figures):
    studies = torch.load(finished[0] / "last.pt", weights_only=True)["studies"]
    names = list(studies)
    run = untested(finished, tmp_path, studies={**studies, **dict.fromkeys(names[:5], "other")})
    message = f"{run}: changed since the run began: {', '.join(names[:4])} (5 in all). Restore"
    with pytest.raises(UserError) as caught:
        resume(run)
    assert str(caught.value).startswith(message)
    study = json.loads((run / "splits.json").read_text())["train"][0]
    titles = [f"{study} ({title})" for title in ("CT", "PET", "mask", "splits")]
    assert set(titles) <= set(names) and len(names) == 4 * 9
    images = {studies[name] for name in names if name.endswith(("(CT)", "(PET)"))}
    assert len(images) == 2 * 9  # the digests tell the studies apart


def test_other_splits_do_not_resume(base, finished, tmp_path, no_figures):
    file = tmp_path / "splits.json"
    config = torch.load(finished[0] / "last.pt", weights_only=True)["config"]
    run = untested(finished, tmp_path, config={**config, "splits": str(file)})
    splits = json.loads((run / "splits.json").read_text())
    other = {**splits, "val": splits["test"], "test": splits["val"]}
    for given, saved, message in (
        (other, splits, f"{file}: not the splits of {run}"),
        (other, other, f"{run}: changed since the run began: .* .splits., .* .6 in all.. Restore"),
        (splits, {"train": []}, f"{run / 'splits.json'}: "),
    ):
        write_json(file, given)
        write_json(run / "splits.json", saved)
        with pytest.raises(UserError, match=message):
            resume(run, splits=str(file))
    file.unlink()  # the run has its own copy
    write_json(run / "splits.json", splits)
    assert resume(run, splits=str(file))["test"] == finished[1]["test"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("last.pt", b""),
        ("last.pt", 100),
        ("best.pt", 100),
        ("config.json", b"[1]"),
        ("config.json", b'{"config": {"shared": 5}}'),
        ("config.json", b'{"config": {"data": 5}}'),
        ("config.json", b'{"config": {"epochs": NaN}}'),
        ("splits.json", b'{"train": [1]}'),
        ("splits.json", b"[]"),
        ("summary.json", b"[]"),
        ("summary.json", b'{"systems": {}}'),
        ("summary.json", b'{"systems": {"model": {"dice": {"mean": "x"}}}}'),
        ("metrics.csv", b"\xff\x00"),
        ("metrics.csv", b"epoch,seconds\n1,x\n2,y\n"),
        ("metrics.csv", b"epoch,seconds\n1,1\n"),
        ("metrics.csv", b"loss\n1\n"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(finished, tmp_path, no_figures, name, content):
    run = untested(finished, tmp_path)
    if isinstance(content, int):
        content = (run / name).read_bytes()[:content]
    (run / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        resume(run)
    message = str(caught.value)
    assert message.startswith(f"{run / name}: ")
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimizer", {}),
        ("model", {"a": 1}),
        ("scaler", 3),
        ("best_dice", "x"),
        ("epoch", None),
        ("config", []),
        ("studies", None),
    ],
)
def test_a_checkpoint_of_another_content_is_named(finished, tmp_path, name, value):
    run = untested(finished, tmp_path, **{name: value})
    with pytest.raises(UserError, match=f"^{run / 'last.pt'}: damaged.*[.]$"):
        resume(run)


@pytest.mark.parametrize("name", ["best.pt", "metrics.csv", "last.pt", "tensorboard"])
def test_a_full_disk_stops_a_run_that_resumes_later(
    base, finished, tmp_path, no_figures, monkeypatch, name
):
    """In its second epoch; at best.pt in the first, since the second may be no better."""
    run, turns = tmp_path / "run", []
    move, flush = os.replace, train.SummaryWriter.flush

    def fail(path):
        if Path(path).name == name:
            turns.append(1)
            if len(turns) == (1 if name == "best.pt" else 2):
                raise OSError(errno.ENOSPC, "No space left on device")

    def full_move(source, target):
        fail(target)
        move(source, target)

    def full_flush(writer):
        fail("tensorboard")
        flush(writer)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_move)
        patch.setattr(train.SummaryWriter, "flush", full_flush)
        with pytest.raises(OSError, match="No space left") as caught:
            train.train(replace(base, out=str(run)))
    assert caught.value.filename == str(run / name)
    assert not list(run.glob(".*.tmp"))
    resume(run)
    assert_same_run(run, finished[0])


# ------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_train_one_network(base, tmp_path):
    """Ten steps under torchrun: one set of weights, the same crops in total, one writer; the first
    rank fills the cache."""
    run = tmp_path / "run"
    options = {"out": str(run), "cache": str(tmp_path / "cache")}
    config = replace(base, epochs=2, steps=5, batch_size=4, **options)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_script("rank", json.dumps(to_dict(config)), launcher=torchrun)
    assert done.returncode == 0, done.stderr
    one = json.loads(Path(f"{run}.0.json").read_text())
    two = json.loads(Path(f"{run}.1.json").read_text())
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
    config = Config(batch_size=2, patch=(48,) * 3, crops=1)
    with pytest.raises(UserError, match="--batch-size 2 does not divide by 4 devices"):
        train.check_batch_size(config, MirrorUNet(), world=4, study_count=9)


def rank_of_a_run(config):
    """One rank of a data-parallel run; writes what it saw to <out>.<rank>.json."""
    models, keys, writes, hashes = [], [], [], []
    build, read, save = runs.build_model, train.Patches.batch, runs.save_checkpoint

    def record_model(config):
        models.append(build(config))
        return models[0]

    def record_keys(patches, batch_keys, pinned):
        keys.extend(batch_keys)
        return read(patches, batch_keys, pinned)

    def record_write(path, content):
        writes.append(path.name)
        save(path, content)

    def record_hash(row):
        whole = hashlib.sha256()
        for value in models[0].state_dict().values():
            whole.update(value.contiguous().numpy().tobytes())
        hashes.append(whole.hexdigest())

    runs.build_model = record_model
    train.Patches.batch = record_keys
    runs.save_checkpoint = record_write
    result = train.train(config, record_hash)
    seen = {"keys": keys, "writes": writes, "hashes": hashes, "result": result}
    Path(f"{config.out}.{os.environ['RANK']}.json").write_text(json.dumps(seen))


def killed_run(config):
    """train() until half of the second last.pt is written."""
    save, turns = torch.save, []

    def half_save(content, file):
        if "optimizer" in content:
            turns.append(1)
        if len(turns) == 2:
            file.write(b"PK half of a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    torch.save = half_save
    train.train(config)


if __name__ == "__main__":
    scripts = {"rank": rank_of_a_run, "killed": killed_run}
    scripts[sys.argv[1]](from_dict(json.loads(sys.argv[2])))
