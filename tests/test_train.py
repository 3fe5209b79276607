"""train.py: options, the run folder, what a killed run goes on with, several processes.

Run as a script it is one rank of the data-parallel test.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import eval as evaluation
import plots
import train
from data import Patches, Schedule, UserError, write_phantom
from mirror_unet import count_parameters

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TERMS = {
    "v1": {"rec_ct", "seg"},
    "v2": {"rec_ct", "rec_pet", "seg"},
    "v3": {"rec_ct", "rec_pet", "seg", "cls"},
    "v4": {"seg"},
}
CLOCK = [
    "patches_per_s",
    "data_wait",
    "seconds",
    "val_seconds",
]  # what differs from one run to the next


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run small enough for tests: 9 studies, 3 in each part, 2 epochs of 2 steps."""
    root = tmp_path_factory.mktemp("train")
    write_phantom(root / "data", patients=6)
    return train.Config(
        version="v3", data=str(root / "data"), cache=str(root / "cache"), device="cpu", amp="none",
        threads=1, workers=0, epochs=2, steps=2, batch_size=2, patch=(16, 16, 16),
        spacing=(16.0, 16.0, 16.0), folds=3, val_every=1, phi="noise", seed=1, lr=3e-3,
        out=str(root / "run"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(base):
    """The run folder of a finished run, what train() returned and what it reported."""
    rows = []
    result = train.train(base, rows.append)
    return Path(base.out), result, rows


@pytest.fixture(scope="module")
def cases(base):
    config, cases = train.open_data(base)
    return cases


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
        if (run / name).read_bytes() != (reference / name).read_bytes():
            one, other = (torch.load(p / name, weights_only=True) for p in (run, reference))
            assert differences(one, other) == [], name
    rows, expected = (pd.read_csv(folder / "metrics.csv") for folder in (run, reference))
    assert rows["epoch"].tolist() == expected["epoch"].tolist()
    pd.testing.assert_frame_equal(
        rows.drop(columns=CLOCK), expected.drop(columns=CLOCK), check_exact=False, rtol=1e-12
    )


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "kind, version, phantom, expected",
    [
        ("petct", "v1", False, {  # Sec. 3.4
            "epochs": 400, "batch_size": 4, "patch": (96, 96, 96), "spacing": (2, 2, 3),
            "lr": 1e-3, "weight_decay": 1e-6, "lesion_p": 2 / 3, "lambda_rec": 1e-4,
            "lambda_seg": 0.5, "lambda_cls": None, "theta": None, "phi": "shuffle", "folds": 5,
        }),
        ("petct", "v2", False, {"lambda_rec": 1e-4, "lambda_seg": 0.5, "lambda_cls": None}),
        ("petct", "v3", False, {"lambda_rec": 1e-4, "lambda_seg": 0.5, "lambda_cls": 1e-3}),
        ("petct", "v4", False, {
            "lambda_rec": None, "lambda_seg": None, "lambda_cls": None, "theta": 0.2,
            "phi": "none",
        }),
        ("mri", "v1", False, {  # supplement
            "patch": (224, 224, 144), "spacing": (1, 1, 1), "lambda_seg": 1 / 3,
            "lambda_rec": None, "theta": None, "phi": "none",
        }),
        ("mri", "v2", False, {"lambda_seg": 1 / 3, "lambda_rec": None, "phi": "none"}),
        ("mri", "v2-rec", False, {"lambda_seg": 0.5, "lambda_rec": 1e-4, "phi": "shuffle"}),
        ("petct", "v2", True, {"patch": (48, 48, 48), "folds": 3, "lr": 1e-3}),
    ],
)  # fmt: skip
def test_defaults_are_those_of_the_paper(kind, version, phantom, expected):
    config = train.resolve(train.Config(version=version), kind, phantom)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.kind == kind
    needed = set(asdict(config)) - {"data", "out", "steps", "splits", "theta"}
    needed = {name for name in needed if not name.startswith("lambda")}
    assert not [name for name in needed if getattr(config, name) is None]


def test_what_is_asked_for_is_kept():
    asked = train.Config(
        version="v3", epochs=7, patch=(32,), spacing=(4.0,), shared=(7, 3, 3), phi="none",
        lambda_rec=0.0, lr_drop=0, rec="mse",
    )  # fmt: skip
    config = train.resolve(asked, "petct", False)
    assert (config.epochs, config.lr_drop, config.phi, config.lambda_rec) == (7, 0, "none", 0.0)
    assert (config.patch, config.spacing, config.shared) == ((32,) * 3, (4.0,) * 3, (3, 7))
    assert train.resolve(replace(asked, lambda_rec=None), "petct", False).lambda_rec == 1e-3
    assert train.resolve(config, "petct", False) == config  # settled once


@pytest.mark.parametrize(
    "kind, options, flag",
    [
        ("petct", {"version": "v4", "lambda_rec": 1e-4}, "--lambda-rec"),
        ("petct", {"version": "v4", "lambda_seg": 0.5}, "--lambda-seg"),
        ("petct", {"version": "v2", "lambda_cls": 1e-3}, "--lambda-cls"),
        ("petct", {"version": "v1", "theta": "0.3"}, "--theta"),
        ("petct", {"version": "v4", "theta": "1.5"}, "--theta"),
        ("petct", {"version": "v4", "theta": "nan"}, "--theta"),
        ("petct", {"version": "v4", "theta": "auto"}, "--theta"),
        ("petct", {"version": "v4", "phi": "shuffle"}, "--phi"),
        ("mri", {"version": "v2", "phi": "noise"}, "--phi"),
        ("mri", {"version": "v3"}, "--version: v3"),
        ("petct", {"version": "v2-rec"}, "--version: v2-rec"),
        ("petct", {"version": "V2"}, "--version: V2"),
        ("petct", {"patch": (40,)}, "--patch"),
        ("petct", {"patch": (32, 32, 8)}, "--patch"),
        ("petct", {"patch": (32, 32)}, "--patch"),
        ("petct", {"patch": (0,)}, "--patch"),
        ("petct", {"spacing": (2.0, 0.0, 3.0)}, "--spacing"),
        ("petct", {"patch": (16,), "shuffle_edge": 17}, "--shuffle-edge 17"),
        ("petct", {"shuffle_edge": 0}, "--shuffle-edge 0"),
        ("petct", {"shuffle_count": -1}, "--shuffle-count"),
        ("petct", {"shared": (0,)}, "--shared"),
        ("petct", {"shared": (5, 9)}, "--shared"),
        ("petct", {"epochs": 0}, "--epochs 0"),
        ("petct", {"steps": 0}, "--steps 0"),
        ("petct", {"batch_size": 0}, "--batch-size 0"),
        ("petct", {"crops": 0}, "--crops 0"),
        ("petct", {"val_every": 0}, "--val-every 0"),
        ("petct", {"workers": -1}, "--workers -1"),
        ("petct", {"window_batch": 0}, "--window-batch 0"),
        ("petct", {"overlap": 1.0}, "--overlap 1.0"),
        ("petct", {"overlap": -0.1}, "--overlap -0.1"),
        ("petct", {"lesion_p": 1.01}, "--lesion-p 1.01"),
    ],
)
def test_options_that_do_not_fit_are_named(kind, options, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        train.resolve(replace(train.Config(), **options), kind, False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fold": 3}, "--fold 3 of --folds 3"),
        ({"folds": 1}, "--fold 0 of --folds 1"),
        ({"folds": 8, "fold": 7}, "6 patients are too few for 8 folds"),
        ({"splits": "nowhere.json"}, "nowhere.json: No such file"),
        ({"data": "nowhere"}, "nowhere: no such folder"),
        ({"amp": "fp16"}, "--amp fp16"),
        ({"amp": "bf16"}, "--amp bf16 with --patch"),
        ({"version": "v4", "lambda_cls": 1.0, "phi": "none"}, "--lambda-cls has no effect on v4"),
    ],
)
def test_a_run_that_cannot_start_says_why(base, cases, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train.train(replace(base, out=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("version, least", [("v3", 48), ("deepmts", 64)])
def test_bf16_on_the_cpu_is_refused_where_torch_is_wrong(version, least):
    """The smallest maps must have three voxels a side."""
    config = train.Config(version=version, amp="bf16", patch=(least,) * 3)
    assert train.choose_amp(config, CPU).amp == "bf16"
    with pytest.raises(UserError, match=f"below {least}"):
        train.choose_amp(replace(config, patch=(least, least, least - 16)), CPU)


def test_flags_are_the_fields_of_config():
    parser = argparse.ArgumentParser()
    train.add_flags(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    names = {f.name for f in fields(train.Config)} - {"kind"}  # found from the data
    assert flags == {f"--{name.replace('_', '-')}" for name in names} | {"-h", "--help"}
    assert all(action.help for action in parser._actions)


def test_command_line_gives_a_config():
    assert train.parse([]) == train.Config()
    line = (
        "--version v4 --shared 4 5 6 --theta learn --patch 32 --spacing 2 2.5 3 --lr 0.01 "
        "--epochs 3 --steps 5 --compile --lambda-seg 0.25 --lr-drop 0 --out runs/a"
    )
    expected = train.Config(
        version="v4", shared=(4, 5, 6), theta="learn", patch=(32,), spacing=(2.0, 2.5, 3.0),
        lr=0.01, epochs=3, steps=5, compile=True, lambda_seg=0.25, lr_drop=0, out="runs/a",
    )  # fmt: skip
    assert train.parse(line.split()) == expected
    assert train.parse(["--shared"]).shared == ()


@pytest.mark.parametrize("line", ["--phi blur", "--epochs 1.5", "--kind mri", "--rec", "stray"])
def test_bad_command_lines_end_with_code_2(line, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(line.split())
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "0.5 % of 96^3" in text and "--lambda-rec" in text


def test_new_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = train.Config(version="v1", shared=(4, 5, 6))
    names = []
    for _ in range(3):
        path = train.name_run(config)
        path.mkdir(parents=True)
        (path / "config.json").touch()  # a folder without it holds no run
        names.append(path.as_posix())
    assert names == ["runs/v1-L456", "runs/v1-L456-2", "runs/v1-L456-3"]
    assert train.name_run(train.Config(shared=())).name == "v2-Lnone"


def test_without_data_a_phantom_is_simulated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = lambda root, progress: write_phantom(root, patients=2, progress=progress)  # noqa: E731
    monkeypatch.setattr(train, "write_phantom", small)
    said = []
    config, cases = train.open_data(train.Config(workers=1), said.append)
    assert len(cases) == 3 and config.patch == (48, 48, 48) and config.data is None
    assert "simulated" in said[0] and Path("data/phantom").is_dir()
    assert all(case.meta["spacing"] == [5, 5, 6] for case in cases)


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
    """An epoch of train_epoch: its row, the network before and after, its inputs and the crops."""
    config = train.resolve(config, "petct", False)
    model = train.build_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    crops = Patches(cases, config.patch, config.seed)
    loader = DataLoader(crops, batch_sampler=Schedule(steps, config.batch_size))
    optimizer = train.make_optimizer(model, config, CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    spy, bar = Spy(model), tqdm(disable=True)
    row = train.train_epoch(
        0, spy, model, loader, optimizer, scaler, config, CPU, train.Ranks(CPU), bar
    )
    images = torch.stack([crops[0, i]["image"] for i in range(config.batch_size)]).float()
    return row, before, model, spy.inputs, images


LEGAL = [(v, phi) for v in ("v1", "v2", "v3") for phi in ("none", "noise", "shuffle")]


@pytest.mark.parametrize("version, phi", [*LEGAL, ("v4", "none")])
def test_every_version_steps_with_every_phi(base, cases, monkeypatch, version, phi):
    """Φ changes what the CT branch sees, not what it has to reconstruct."""
    config, targets = replace(base, version=version, phi=phi), []
    loss = train.LOSSES["petct"][version]
    record = lambda out, batch, w: targets.append(batch) or loss(out, batch, w)  # noqa: E731
    monkeypatch.setitem(train.LOSSES["petct"], version, record)
    row, before, model, inputs, images = one_epoch(config, cases)
    assert TERMS[version] == set(row) & set(plots.TERMS)
    assert row["loss"] == pytest.approx(sum(row[term] for term in TERMS[version]))
    assert {f"grad_{t}" for t in TERMS[version]} == {n for n in row if n.startswith("grad_")}
    assert all(row[f"grad_{t}"] > 0 and np.isfinite(row[t]) for t in TERMS[version])
    [(ct, pet)] = inputs
    assert torch.equal(pet, images[:, 1:])
    assert torch.equal(ct, images[:, :1]) == (phi == "none")
    assert torch.equal(torch.cat(targets[0][:2], dim=1), images)
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still <= {"theta"}  # every task reached its weights


@pytest.mark.parametrize(
    "shared, v4, v3",  # parameters of the released code at 96^3
    [
        ((3,), 9_396_201, 10_551_474),
        ((4,), 8_732_201, 9_887_474),
        ((5,), 6_929_065, 8_084_338),
        ((6,), 8_843_305, 9_998_578),
        ((7,), 9_479_401, 10_634_674),
        ((4, 5, 6), 5_268_901, 6_424_174),
        ((3, 4, 5, 6, 7), 4_908_833, 6_064_106),
    ],
)
def test_layers_of_table_2_build_and_step(base, cases, shared, v4, v3):
    row, _, model, *_ = one_epoch(replace(base, version="v4", phi=None, shared=shared), cases)
    assert count_parameters(model) == v4 and row["grad_seg"] > 0
    three = train.resolve(replace(base, version="v3", shared=shared, classifier="pet"), "petct", 0)
    assert count_parameters(train.build_model(three)) == v3


def test_nothing_shared_has_no_shared_gradient(base, cases):
    row, *_ = one_epoch(replace(base, version="v1", shared=()), cases)
    assert row["loss"] > 0 and not [name for name in row if name.startswith("grad_")]


@pytest.mark.parametrize(
    "theta, lr, low, high",
    [("learn", 1e-3, 0.498, 0.502), ("learn", 10.0, 0, 1), ("0.3", 10.0, 0.3, 0.3)],
)
def test_theta_is_learned_within_0_and_1(base, cases, theta, lr, low, high):
    config = replace(base, version="v4", phi=None, theta=theta, lr=lr)
    row, before, model, *_ = one_epoch(config, cases, steps=2)
    assert low <= round(row["theta"], 6) <= high and row["theta"] == model.theta.item()
    assert torch.equal(model.theta, before["theta"]) == (theta != "learn")


def test_learning_rate_falls_to_a_tenth(base):
    class Loader:
        batch_sampler = argparse.Namespace()

        def __iter__(self):
            raise InterruptedError("by now the learning rate is set")

    config = train.resolve(replace(base, lr=1e-3, lr_drop=3), "petct", False)
    model, rates = train.build_model(config), []
    optimizer = train.make_optimizer(model, config, CPU)
    for epoch in range(5):
        with pytest.raises(InterruptedError):
            train.train_epoch(
                epoch, None, model, Loader(), optimizer, None, config, CPU, None, None
            )
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 2)


# ------------------------------------------------------------------ a run and its folder


def test_run_folder_is_complete(base, finished):
    run, result, rows = finished
    files = {p.name for p in run.iterdir()}
    assert files == {
        "config.json", "splits.json", "metrics.csv", "last.pt", "best.pt", "curves.png",
        "examples.png", "summary.json", "test_studies.csv", "tensorboard", ".lock",
    }  # fmt: skip
    record = json.loads((run / "config.json").read_text())
    assert train.as_config(record["config"]) == train.resolve(base, "petct", False)
    assert record["torch"] == str(torch.__version__) and len(record["commit"].split("+")[0]) in (
        0,
        40,
    )
    for name in ("curves.png", "examples.png"):
        picture = matplotlib.image.imread(run / name)
        assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05
    [events] = (run / "tensorboard").iterdir()
    assert all(tag in events.read_bytes() for tag in (b"train/loss", b"gradient/seg", b"val_dice"))


def test_metrics_have_a_row_per_epoch(finished):
    run, _, rows = finished
    frame = pd.read_csv(run / "metrics.csv")
    own = TERMS["v3"] | {f"grad_{term}" for term in TERMS["v3"]}
    assert set(frame) == {"epoch", "lr", "loss", "val_dice", *own, *CLOCK}
    assert frame["epoch"].tolist() == [1, 2] and not frame.isna().any(axis=None)
    assert np.allclose(frame[sorted(TERMS["v3"])].sum(axis=1), frame["loss"])
    assert (frame["patches_per_s"] > 0).all() and frame["data_wait"].between(0, 1).all()
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["loss"] for row in rows] == pytest.approx(frame["loss"].tolist(), rel=1e-12)


def plain_types(value):
    if isinstance(value, dict):
        return all(plain_types(v) for pair in value.items() for v in pair)
    if isinstance(value, list):
        return all(map(plain_types, value))
    if isinstance(value, tuple):  # betas of Adam
        return all(type(v) is float for v in value)
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


def test_checkpoints_hold_plain_types(finished):
    run, *_ = finished
    frame = pd.read_csv(run / "metrics.csv").set_index("epoch")
    last, best = (torch.load(run / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert plain_types(dict(last, model=dict(last["model"])))
    assert last["epoch"] == 2 and last["config"]["shared"] == [5]
    assert best["val_dice"] == last["best_dice"] == pytest.approx(frame["val_dice"].max())
    assert best["epoch"] == frame["val_dice"].idxmax()
    network = train.build_model(train.Config(version="v3", kind="petct"))
    network.load_state_dict(last["model"])
    if best["epoch"] == 2:
        assert all(torch.equal(v, best["model"][k]) for k, v in last["model"].items())


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
    means = json.loads((run / "summary.json").read_text())["systems"]["model"]
    assert means["fpv_ml"]["n"] == 3 and means["dice"]["n"] == len(ill)


def test_test_results_can_be_had_again(finished, tmp_path, capsys):
    """eval.py on the finished run measures what train.py wrote."""
    run, *_ = finished
    evaluation.run_command([str(run), "--out", str(tmp_path)])
    again = pd.read_csv(tmp_path / "run" / "test_studies.csv")
    pd.testing.assert_frame_equal(again, pd.read_csv(run / "test_studies.csv"))


def test_a_run_is_not_overwritten(base, finished):
    run, *_ = finished
    before = {p: p.stat().st_mtime_ns for p in run.iterdir()}
    with pytest.raises(UserError, match="holds a run already. Add --resume"):
        train.train(base)
    assert {p: p.stat().st_mtime_ns for p in run.iterdir()} == before


@pytest.mark.parametrize(
    "change", [{"lr": 1e-2}, {"shared": (4,)}, {"seed": 2}, {"fold": 1}, {"phi": "none"}]
)
def test_a_run_goes_on_with_its_own_settings_only(base, finished, change):
    [name] = change
    with pytest.raises(UserError, match=f"goes on with its own settings.*{name} was"):
        train.train(replace(base, resume=True, **change))


def test_a_run_does_not_shrink(base, finished):
    with pytest.raises(UserError, match="has 2 epochs already, more than --epochs 1"):
        train.train(replace(base, resume=True, epochs=1))


def test_a_finished_run_returns_its_results(base, finished, monkeypatch):
    run, result, _ = finished
    monkeypatch.setattr(evaluation, "evaluate", None)  # neither trained nor tested again
    assert train.train(replace(base, resume=True)) == result


def test_resume_takes_the_saved_options(base, finished):
    run, *_ = finished
    config = train.parse(["--resume", "--out", str(run), "--epochs", "5"])
    resolved = train.resolve(base, "petct", False)
    assert config == replace(resolved, resume=True, epochs=5)
    assert train.parse(["--resume", "--out", "new", "--lr", "1"]).lr == 1
    with pytest.raises(UserError, match="--resume: say which run with --out"):
        train.parse(["--resume"])


def test_saved_options_of_other_code_are_refused(finished, tmp_path):
    run, *_ = finished
    record = json.loads((run / "config.json").read_text())
    record["config"]["momentum"] = 0.9
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="momentum.*unknown here"):
        train.parse(["--resume", "--out", str(tmp_path)])


def test_a_loss_that_is_no_number_stops_the_run(base, tmp_path, monkeypatch, no_figures):
    """The second epoch diverges: the checkpoint of the first is kept."""
    true_epoch, out = train.train_epoch, tmp_path / "run"

    def diverge(epoch, *args):
        row = true_epoch(epoch, *args)
        return row | {"loss": float("nan")} if epoch == 1 else row

    monkeypatch.setattr(train, "train_epoch", diverge)
    with pytest.raises(UserError, match="the loss is nan in epoch 2"):
        train.train(replace(base, out=str(out), steps=1))
    assert train.load_checkpoint(out / "last.pt")["epoch"] == 1
    assert pd.read_csv(out / "metrics.csv")["epoch"].tolist() == [1]


# ------------------------------------------------------------------ killed and resumed


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train_until(moment, config):
    """train() in a process that is killed as kill -9 does it, at `moment`."""
    if moment == "in an epoch":
        seed = train.step_seed
        train.step_seed = lambda *at: die() if at[1:3] == (1, 1) else seed(*at)
    elif moment == "in the test":
        evaluation.to_native = lambda *args: die()
    else:
        action, name, turn = moment.split(" of ")
        done = []

        def hit(path):
            done.extend([1] if f"/{name}" in str(path) or f"/.{name}" in str(path) else [])
            return len(done) == int(turn)

        save, move = torch.save, os.replace

        def half_save(content, file):
            if hit(file.name):
                file.write(b"PK half of a checkpoint")
                file.flush()
                die()
            save(content, file)

        def half_move(source, target):
            if hit(target):
                die()
            move(source, target)

        if action == "saving":
            torch.save = half_save
        else:
            os.replace = half_move
    train.train(config)


@pytest.fixture(scope="module")
def start():
    """Start a function in a fresh process that has train imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])

    def start(function, *args):
        process = context.Process(target=function, args=args, daemon=True)
        process.start()
        return process

    return start


@pytest.mark.parametrize(
    "moment, epochs_kept",
    [
        ("saving of best.pt of 1", 0),
        ("in an epoch", 1),
        ("saving of last.pt of 2", 1),
        ("moving of last.pt of 2", 1),
        ("in the test", 2),
    ],
)
@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(
    base, finished, start, tmp_path, no_figures, moment, epochs_kept
):
    run = tmp_path / "run"
    config = replace(base, out=str(run))
    process = start(train_until, moment, config)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    kept = train.load_checkpoint(run / "last.pt")["epoch"] if epochs_kept else 0
    assert kept == epochs_kept and (run / "last.pt").exists() == (epochs_kept > 0)
    reported = []
    result = train.train(train.parse(["--resume", "--out", str(run)]), reported.append)
    assert [row["epoch"] for row in reported] == [1, 2][epochs_kept:]
    assert_same_run(run, finished[0])
    assert result == finished[1] | {"run": str(run)}
    assert not [p for p in run.iterdir() if p.suffix == ".tmp"]


def test_more_epochs_continue_a_finished_run(base, finished, tmp_path, no_figures):
    run = tmp_path / "run"
    first = train.train(replace(base, out=str(run), epochs=1))
    assert first["epochs"] == 1
    result = train.train(train.parse(["--resume", "--out", str(run), "--epochs", "2"]))
    assert_same_run(run, finished[0])
    assert result == finished[1] | {"run": str(run)}
    for name in ("best.pt", "last.pt"):
        assert (run / name).read_bytes() == (finished[0] / name).read_bytes(), name


# ------------------------------------------------------------------ several processes


def hold(run):
    with train.only_writer(run):
        (run / "held").touch()
        time.sleep(600)


def test_one_process_writes_a_run(base, start, tmp_path):
    """The lock holds while its process lives, and no longer."""
    process = start(hold, tmp_path)
    while not (tmp_path / "held").exists() and process.is_alive():
        time.sleep(0.05)
    with pytest.raises(UserError, match="another process is writing this run"):
        train.train(replace(base, out=str(tmp_path)))
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "held"}
    process.kill()
    process.join()
    with train.only_writer(tmp_path):
        pass


def test_workers_do_not_change_the_weights(base, finished, tmp_path, no_figures):
    train.train(replace(base, out=str(tmp_path), workers=2))
    assert_same_run(tmp_path, finished[0])


def rank_of_a_run(config):
    """One rank of a data-parallel run; writes what it saw to <out>.<rank>.json."""
    models, keys, writes, hashes = [], [], [], []
    build, read, save = train.build_model, train.Patches.batch, train.save_checkpoint
    train.build_model = lambda config: models.append(build(config)) or models[0]
    train.Patches.batch = lambda self, own, pinned: keys.extend(own) or read(self, own, pinned)
    train.save_checkpoint = lambda path, content: writes.append(path.name) or save(path, content)

    def digest():
        whole = hashlib.sha256()
        for value in models[0].state_dict().values():
            whole.update(value.contiguous().numpy().tobytes())
        return whole.hexdigest()

    result = train.train(config, lambda row: hashes.append(digest()))
    seen = {"keys": keys, "writes": writes, "hashes": hashes, "result": result}
    Path(f"{config.out}.{os.environ['RANK']}.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_two_processes_train_one_network(base, cases, tmp_path):
    """Ten steps under torchrun: one set of weights, the same crops in total, one writer."""
    run = tmp_path / "run"
    config = replace(base, out=str(run), epochs=2, steps=5, batch_size=4)
    options = json.dumps(train.plain(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", __file__, options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(f"{run}.{rank}.json").read_text()) for rank in (0, 1))
    assert one["hashes"] == two["hashes"] and len(set(one["hashes"])) == 2
    assert two["writes"] == [] and one["writes"].count("last.pt") == 2
    assert one["result"] == two["result"]
    together = sorted(map(tuple, one["keys"] + two["keys"]))
    assert together == [(epoch, i) for epoch in (0, 1) for i in range(20)]
    assert len(one["keys"]) == len(two["keys"]) == 20
    frame = pd.read_csv(run / "metrics.csv")
    assert frame["epoch"].tolist() == [1, 2]
    splits = json.loads((run / "splits.json").read_text())
    assert pd.read_csv(run / "test_studies.csv")["study"].tolist() == splits["test"]


def test_batch_must_divide_by_the_processes(base, cases, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Ranks, "__init__", lambda self, device: self.__dict__.update(
        world=4, rank=0, main=True))  # fmt: skip
    monkeypatch.setattr(train.Ranks, "barrier", lambda self: None)
    with pytest.raises(UserError, match="--batch-size 2 does not divide by 4 devices"):
        train.train(replace(base, out=str(tmp_path / "run")))


def test_the_command_ends_with_one_message_and_code_2(base, cases):
    """As a user runs it: no traceback, nothing on stdout but the data."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", base.data, "--cache", base.cache]
    done = subprocess.run(
        [*command, "--version", "v4", "--lambda-rec", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --lambda-rec has no effect on v4")
    assert done.stderr.count("\n") == 1


def test_a_start_that_made_no_checkpoint_leaves_no_splits(base, tmp_path, monkeypatch, no_figures):
    """Interrupted before its first checkpoint, then started with another fold."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(replace(base, out=str(run)))
    first = json.loads((run / "splits.json").read_text())
    train.train(replace(base, out=str(run), fold=1, epochs=1, steps=1))
    assert json.loads((run / "splits.json").read_text()) != first


@pytest.mark.slow
def test_killed_with_workers_it_can_go_on_at_once(base, cases, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(run)]
    run.mkdir()
    config = train.plain(replace(base, out=str(run), workers=2, steps=500))
    (run / "config.json").write_text(json.dumps({"config": config}))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (run / "splits.json").exists():
        time.sleep(0.1)
    time.sleep(5)
    process.kill()
    process.wait()
    with train.only_writer(run):
        pass


@pytest.mark.parametrize("damage", ["flipped", "other version", "list", "no model"])
def test_damaged_checkpoints(finished, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    best = run / "best.pt"
    if damage == "flipped":
        data = bytearray(best.read_bytes())
        data[len(data) // 2] ^= 0x40
        best.write_bytes(data)
    elif damage == "other version":
        model = train.build_model(train.Config(version="v4", kind="petct"))
        torch.save({"model": model.state_dict(), "epoch": 1, "val_dice": 0.0}, best)
    else:
        torch.save([1] if damage == "list" else {"epoch": 1}, best)
    with pytest.raises(UserError, match="best.pt"):
        evaluation.run_command([str(run)])


@pytest.mark.parametrize("option", [["--overlap", "1"], ["--window-batch", "0"]])
def test_prediction_checks_its_options(base, finished, tmp_path, option):
    with pytest.raises(UserError, match=option[0]):
        evaluation.run_command(
            [str(finished[0]), "--predict", base.data, "--out", str(tmp_path), *option]
        )


def test_runs_of_one_name_are_not_written_over_each_other(finished, tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(finished[0], tmp_path / folder / "run")
    out = tmp_path / "out"
    runs = [str(tmp_path / folder / "run") for folder in ("a", "b")]
    with pytest.raises(UserError, match="one name"):
        evaluation.run_command([*runs, "--out", str(out)])


@pytest.mark.parametrize(
    "options",
    [
        {"phi": "blur"},
        {"rec": "L1"},
        {"amp": "fp32"},
        {"window_weights": "gauss"},
        {"class_label": "study"},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
        {"split_seed": -1},
        {"noise_sigma": -1.0},
        {"lambda_rec": -1.0},
        {"spacing": (float("nan"),)},
    ],
)
def test_values_that_mean_nothing_are_refused(options):
    with pytest.raises(UserError):
        train.resolve(replace(train.Config(), **options), "petct", False)


def test_a_run_that_failed_before_training_leaves_its_name_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "v2-L5").mkdir(parents=True)
    assert train.name_run(train.Config()).name == "v2-L5"


@pytest.mark.parametrize(
    "options",
    [
        {"version": "v4", "rec": "mse"},
        {"version": "v2", "class_label": "volume"},
        {"version": "v1", "classifier": "pet"},
        {"version": "v2", "phi": "none", "shuffle_count": 3},
        {"version": "v2", "noise_sigma": 0.1},
        {"version": "v4", "modality": "ct"},
        {"version": "ct", "bottleneck": "joint"},
        {"version": "v2", "recipe": "own"},
        {"version": "v3_ct_only", "modality": "pet"},
    ],
)
def test_options_that_would_be_ignored_are_refused(options):
    with pytest.raises(UserError, match="--"):
        train.resolve(replace(train.Config(), **options), "petct", False)


def test_a_value_too_few_for_batch_norm_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="batch norm"):
        train.train(replace(base, out=str(tmp_path / "run"), batch_size=1))


def test_git_is_not_needed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train.about()["commit"] == ""


if __name__ == "__main__":
    rank_of_a_run(train.as_config(json.loads(sys.argv[1])))
