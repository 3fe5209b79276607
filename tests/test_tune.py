"""tune.py: what a search varies, names, folders, the console, ASHA; and a search that is killed."""

import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from test_runs import other_writer

import eval as evaluation
import runs
import tables
import train
import tune
from config import LAUNCH, Config, plain, resolve
from files import UserError, write_json

ROOT = Path(__file__).parent.parent
FEW = "--patch 16 --spacing 16 --epochs 2 --steps 2 --val-every 1 --widths 4 8 8 16 16"
TINY = dict(
    patch=(16, 16, 16), epochs=1, steps=1, batch_size=2, threads=1, workers=0, amp="none",
    device="cpu",
)  # fmt: skip
WITH_TINY = ("patch=16", "spacing=16", "folds=3")
ONE = "--search lambdas --phi none --lambda-rec 0.1 --lambda-cls 0.1"  # a grid of one trial


def configs(search, given=None, seeds=(0,), samples=8, kind="petct", folds=(0,)):
    asked = tune.settings(search, given or {}, list(seeds), list(folds), samples, kind)
    return [resolve(Config(**values), kind, True) for values in asked]


def test_claims_repeat_their_arms_by_fold_and_seed():
    found = configs("claims", seeds=(0, 1), folds=(0, 2))
    assert len(found) == 4 * len(tables.ARMS)
    assert [tables.arm_of(c) for c in found[: len(tables.ARMS)]] == [*tables.ARMS]
    places = [(c.fold, c.seed) for c in found[:: len(tables.ARMS)]]
    assert places == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert len(configs("claims", samples="all")) == len(tables.ARMS | tables.MORE_ARMS)
    assert [tables.arm_of(c) for c in configs("organs")] == [*tables.COMPARISONS["organs"]]
    usual = resolve(Config(folds=4), "petct", True)
    assert tune.folds_of(["all"], usual) == [0, 1, 2, 3] and tune.folds_of(["2", "0"], usual) == [
        2,
        0,
    ]
    with pytest.raises(UserError, match="--lambda-rec: --search claims sets it"):
        configs("claims", {"lambda_rec": 0.1})
    with pytest.raises(UserError, match="--fold -1: expected numbers"):
        tune.folds_of(["-1"], usual)


def test_the_grids_are_those_of_table_2_and_of_the_supplement():
    rows = dict.fromkeys(("v1", "v2", "v3"), ("none", "noise", "shuffle"))
    rows["v4"] = (0.1, 0.2, 0.3, 0.4, 0.5, "learn")
    sets = [(3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7)]
    found = {(c.version, c.theta or c.phi, c.shared) for c in configs("table2")}
    assert found == {(v, row, layers) for v in rows for row in rows[v] for layers in sets}
    assert [len(configs(search)) for search in ("table2", "layers", "theta")] == [105, 63, 42]
    weights, found = [0.1, 0.01, 0.001, 0.0001, 0.00001], configs("lambdas")
    pairs = [(rec, cls) for rec in weights for cls in weights]
    assert [(c.lambda_rec, c.lambda_cls) for c in found] == pairs
    assert {(c.version, c.shared, c.phi) for c in found} == {("v3", (5,), "shuffle")}


def test_seeds_repeat_the_grid_and_given_options_hold_for_all_that_read_them(monkeypatch):
    found = configs("theta", {"lr": 1e-4, "shared": (2,)}, seeds=(0, 1))
    assert [(c.theta, c.seed) for c in found] == [(t, s) for s in (0, 1) for t in tune.THETAS]
    assert {(c.lr, c.shared) for c in found} == {(1e-4, (2,))}
    some = configs("table2", {"lambda_cls": 0.5, "shuffle_count": 30, "phi": "shuffle"})
    found = {(c.version, c.lambda_cls, c.phi, c.shuffle_count) for c in some}
    rows = {(v, 0.5 if v == "v3" else None, "shuffle", 30) for v in ("v1", "v2", "v3")}
    assert found == rows | {("v4", None, "none", 1)}
    with pytest.raises(UserError, match="--theta has no effect on v1"):  # no trial reads it
        configs("layers", {"theta": 0.3})
    monkeypatch.setitem(tune.SPACES, "rates", [dict(version=["v2"], lr=[1e-4, 1e-3])])
    assert [(c.version, c.lr) for c in configs("rates")] == [("v2", 1e-4), ("v2", 1e-3)]


def test_free_samples_depend_on_their_seed_and_number_alone():
    many = configs("free", samples=300)
    assert many[:5] == configs("free", samples=5) != configs("free", seeds=(1,), samples=5)
    assert tune.draw(1, 7, "mri") == dict(
        version="v2", shared=(3, 5, 6, 7), phi="noise", noise_sigma=0.0986, shuffle_count=10,
        lambda_rec=0.0185, lambda_cls=0.000981, theta=0.5, lr=0.00721,
    )  # fmt: skip
    assert {c.shuffle_count for c in many if c.phi != "shuffle"} == {1}  # unread: left out
    assert {c.shuffle_count for c in many if c.phi == "shuffle"} == {1, 3, 10, 30}
    fixed = configs("free", {"version": "v3", "shared": (5,), "lr": 1e-3}, samples=20)
    assert {(c.version, c.shared, c.lr) for c in fixed} == {("v3", (5,), 1e-3)}


def test_the_name_tells_the_settings_and_changes_with_all_that_parts_trials():
    config = configs("lambdas")[7]
    name = tune.name_of(config, "s")
    assert re.fullmatch(r"v3-L5-shuffle-rec0\.01-cls0\.001-seed0-[0-9a-f]{8}", name)
    other = dict(epochs=11, lr=2e-3, batch_size=3, shuffle_count=2, fold=1, seed=1, version="v2")
    for option, value in other.items():
        assert tune.name_of(replace(config, **{option: value}), "s")[-8:] != name[-8:]
    assert tune.name_of(config, "t") != name
    systems = [Config(version="nnunet", recipe=recipe) for recipe in ("matched", "own")]
    assert len({tune.name_of(resolve(c, "petct", True), "s") for c in systems}) == 2
    for same in {*LAUNCH, "amp", "splits"} - {"epochs", "data"}:
        assert tune.name_of(replace(config, **{same: "other"}), "s") == name
    assert tune.name_of(configs("theta")[-1], "s").startswith("v4-L34567-thetalearn-seed0-")
    assert len({tune.name_of(c, "s") for c in configs("table2", seeds=(0, 1))}) == 210


def test_what_cannot_be_done_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, message in (
        ("--report x --lr 1", "--report takes no other option"),
        ("--report nowhere", "nowhere: no trials"),
        ("--search layers --samples 3", "--samples 3: of free at least 1"),
        ("--search free --samples 0", "--samples 0: of free at least 1"),
        ("--search free --seed -1", "--seed -1"),
        ("--search lambdas --max-concurrent 0", "--max-concurrent 0: at least 1"),
        ("--search lambdas --patch 20", "--patch .*20.*: every side must"),
        ("--search theta --lambda-cls 1", "--lambda-cls has no effect on v4"),
        (
            "--search theta --version v1",
            "--version v1: theta, which the search varies, is not read",
        ),
        ("--search lambdas --version v2", "--version v2: lambda_cls, which"),
        ("--search layers --version nnunet", "--version nnunet: phi, which"),
        ("--search layers --cache=", "--cache '': an empty string"),
        ("--search lambdas --data nowhere", "nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            tune.main(line.split())
    assert not list(tmp_path.glob("cache")) and not list(tmp_path.glob("data"))


def plan(base, root, line):
    """Arguments and trials of a search in root/out on the session's cohort."""
    places = ["--out", str(root / "out"), "--data", base.data, "--cache", base.cache]
    args, given = tune.parse([*line.split(), *FEW.split(), *places])
    args.out.mkdir(exist_ok=True)
    return args, tune.plan(args, given)


def test_a_trials_record_and_a_report_without_ray(base, tmp_path, monkeypatch, capsys):
    args, (trial,) = plan(base, tmp_path, ONE)
    run = Path(trial.out)
    assert tune.parse(["--search", "free", "--data", "x"])[1] == {"data": str(Path("x").resolve())}
    record = runs.read_record(run)
    assert trial.resume and not trial.check and record["searches"] == ["lambdas"]
    plan(
        base,
        tmp_path,
        ONE.replace("lambdas", "layers --version v3 --shared 5") + " --window-batch 9",
    )  # kept
    assert runs.read_record(run) == record | {"searches": ["lambdas", "layers"]}
    (run / "trial.json").write_bytes(b"[]")
    assert plan(base, tmp_path, ONE)[1] == [trial]
    assert runs.read_record(run) == record
    free = ONE.replace("lambdas", "free --version v3 --shared 5") + " --lr 0.001 --samples 3"
    samples = plan(base, tmp_path, free)[1]
    assert [Path(sample.out).name for sample in samples] == [f"free-{run.name}"]
    monkeypatch.setattr(tune.runs, "choose_splits", lambda *args: {"val": []})
    with pytest.raises(UserError, match="no lesion to validate on"):
        plan(base, tmp_path, free)
    args.address = "127.0.0.1:1"
    with pytest.raises(UserError, match="127.0.0.1:1: .*refused.* The same command goes on"):
        tune.schedule(args, [trial], [trial])
    monkeypatch.setitem(sys.modules, "ray", None)
    tune.main(["--report", str(args.out)])  # needs no Ray
    assert "2 trials, 2 waiting" in capsys.readouterr().out


def make_trial(root, name, status="waiting", dices=(), epochs=4):
    """A trial's folder as a search leaves it."""
    run = root / name
    run.mkdir(parents=True, exist_ok=True)
    config = resolve(Config(version="v2", epochs=epochs, out=str(run)), "petct", True)
    record = {"searches": ["free"], "config": plain(config), "studies": "s"}
    write_json(run / "trial.json", record)
    if dices:
        rows = [{"epoch": i, "val_dice": v, "seconds": 1.0} for i, v in enumerate(dices, start=1)]
        runs.write_metrics(run, rows)
    end = {"epochs": epochs, "epoch": len(dices), "val_dice": max(dices, default=None)}
    if status in ("done", "stopped"):
        name = {"done": "summary.json", "stopped": "stopped.json"}[status]
        write_json(run / name, end | {"systems": {"model": {}}})
    return config


def test_late_fusion_of_the_trials_that_ended(base, tmp_path, capsys):
    trials, root = [], tmp_path / "search"
    for version, seed in (("ct", 0), ("pet", 0), ("ct", 1), ("pet", 2)):
        out = root / f"{version}-{seed}"
        config = Config(version=version, seed=seed, out=str(out), **TINY)
        own = dict(data=base.data, cache=base.cache, spacing=base.spacing, folds=3)
        trials.append(resolve(replace(config, **own), "petct", False))
        train.train(trials[-1])
        write_json(out / "trial.json", {})
    tune.fuse([trials[0], replace(trials[1], epochs=2)])  # the second one has not ended
    assert not [*root.glob("late_fusion*")]
    tune.fuse(trials)
    names = {f"late_fusion_{mode}-ct-0" for mode in ("logits", "union", "intersection")}
    assert {path.name for path in root.glob("late_fusion*")} == names
    before = {path: path.stat().st_mtime_ns for path in root.glob("late*/*")}
    tune.fuse(trials)
    assert {path: path.stat().st_mtime_ns for path in root.glob("late*/*")} == before
    capsys.readouterr()
    evaluation.run_command([str(root), "--table", "3", "--with", *WITH_TINY])
    rows = capsys.readouterr().out.splitlines()
    done = [row.split("|")[1].strip() for row in rows if "1 seeds" in row or "2 seeds" in row]
    assert done == ["CT", "PET", "LF-Logit", "LF-∪", "LF-∩"]
    assert tables.finished_runs(3, tmp_path).empty  # a search's runs are of its folder alone
    (root / "pet-0" / "best.pt").write_bytes(b"")
    (root / "late_fusion_union-ct-0" / "splits.json").unlink()  # as a kill leaves it
    tune.fuse(trials)
    assert "not fused" in (said := capsys.readouterr().err) and "best.pt" in said


def test_the_list_tells_the_hours_left(tmp_path, capsys):
    """A trial of 4 epochs took 4000 s; two more and half of a third are left, two at once."""
    trials = [make_trial(tmp_path, "a", "done", [0.1, 0.2, 0.3, 0.3]), make_trial(tmp_path, "b")]
    trials += [make_trial(tmp_path, "c", dices=[0.1, 0.2]), make_trial(tmp_path, "d")]
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    write_json(tmp_path / "a" / "summary.json", summary | {"seconds": 4000})
    tune.list_trials(trials, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["done", "a"] and lines[1].split() == ["waiting", "b"]
    assert lines[-1] == "4 trials, 1 ended; left: 1.4 hours, 2 at once"


def test_last_pt_goes_when_a_trial_ended_and_its_process_is_gone(tmp_path):
    trials = [make_trial(tmp_path, s, s, [0.5]) for s in ("done", "stopped", "waiting")]
    last = [Path(trial.out, "last.pt") for trial in trials]
    for path in last:
        path.touch()
    with other_writer(tmp_path / "stopped"):
        assert [tune.state(trial)["status"] for trial in trials] == ["done", "stopped", "waiting"]
        assert [path.exists() for path in last] == [False, True, True]
        with pytest.raises(UserError, match="another process is writing"):  # nor a whole search
            tune.main(["--search", "lambdas", "--out", trials[1].out])
    assert tune.state(trials[1]) and [path.exists() for path in last] == [False, False, True]


def test_what_a_trial_takes_of_the_machines():
    dead = (99, 9)  # a node that is gone
    for nodes, line, expected in (
        ([(8, 0), dead], "", (1, 0)), ([(8, 0)], "--cpus-per-trial 4", (4, 0)),
        ([(32, 4)], "", (3, 1)), ([(8, 4)], "", (2, 1)),  # a trial and, if they fit, two readers
        ([(8, 4)], "--gpus-per-trial 0.5", (1, 0.5)), ([(8, 4)], "--device cpu", (1, 0)),
        ([(8, 0), (16, 2)], "--workers 9", (8, 1)), ([(8, 0), dead], "--gpus-per-trial 1", None),
        ([(8, 4)], "--gpus-per-trial 2", None), ([(8, 0), dead], "--cpus-per-trial 9", None),
        ([(8, 0)], "--cpus-per-trial 0", None),
    ):  # fmt: skip
        args, given = tune.parse(["--search", "lambdas", *line.split()])
        nodes = [{"Alive": cpu < 99, "Resources": {"CPU": cpu, "GPU": gpu}} for cpu, gpu in nodes]
        with nullcontext() if expected else pytest.raises(UserError, match=line):
            assert tuple(tune.share_out(nodes, args, Config(**given)).values()) == expected


def ray_trial(run, word="RUNNING"):
    """What Ray's callbacks and schedulers see of a trial."""
    return SimpleNamespace(trial_id=run.name, config={"trial": Config(out=str(run))}, status=word)


def test_ended_trials_are_replayed_into_asha_and_stopped_ones_say_so(tmp_path):
    past = {"good": ("done", [0.5, 0.6, 0.7]), "fair": ("stopped", [0.4]), "new": (), "late": ()}
    past |= {"bad": ("stopped", [0.1]), "hurt": ("done", [0.9])}
    trials = [make_trial(tmp_path, name, *own) for name, own in past.items()]
    (tmp_path / "hurt" / "metrics.csv").write_bytes(b"garbage")  # done nevertheless
    scheduler = tune.halving(trials)
    (second, first) = [list(values.values()) for _, values in scheduler._brackets[0]._rungs]
    assert (first, second) == ([0.5, 0.4, 0.1], [0.7])  # after one epoch and after three
    for name, dice, decision in (("new", 0.43, "STOP"), ("late", 0.44, "CONTINUE")):  # cut: 0.4333
        trial, row = ray_trial(tmp_path / name), {"epoch": 1, "val_dice": dice}
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, row) == decision
        row["done"] = decision == "STOP"  # as Ray tells it
        tune.Console(trials, tmp_path).on_trial_result(trial=trial, result=row)
    assert [tune.state(trial)["status"] for trial in trials[2:4]] == ["stopped", "waiting"]
    for epochs, judged in ((1, [1]), (2, [1]), (10, [3]), (400, [133])):  # never near the end
        (bracket,) = tune.halving([make_trial(tmp_path, "t", epochs=epochs)])._brackets
        assert [milestone for milestone, _ in bracket._rungs] == judged


def test_the_console_goes_on_whatever_a_trial_does(tmp_path, monkeypatch, capsys):
    clock, names = [1000.0], ("fine", "dead", "gone", "next")
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    console = tune.Console([make_trial(tmp_path, name) for name in names], tmp_path)

    def step(seconds, **words):
        clock[0] += seconds
        ray = [ray_trial(tmp_path / name, word) for name, word in words.items()]
        console.on_step_end(iteration=1, trials=ray)
        table = pd.read_csv(tmp_path / "results.csv").set_index("trial")["status"]
        return capsys.readouterr().out.splitlines(), table.to_dict()

    three = dict.fromkeys(names[:3], "RUNNING")
    assert step(0, **three) == ([], dict.fromkeys(three, "running") | {"next": "waiting"})
    (heading, line), _ = step(301, **three)
    assert heading.split()[:6] == ["elapsed", "left", "done", "stopped", "failed", "running"]
    assert line.split()[:6] == ["0:05:01", "unknown", "0/4", "0", "0", "3"]
    assert line.endswith("  fine waiting ") and len(line) - len("fine waiting ") == 82
    make_trial(tmp_path, "fine", "done", [0.25])
    shutil.rmtree(tmp_path / "gone")
    lines, table = step(99, fine="TERMINATED", dead="ERROR", gone="ERROR")
    # three are over after 400 s; the lost one and the next are left
    start = ["0:06:40", "0:04:27", "1/4", "0", "1", "0"]
    assert lines[0].split() == [*start, "0.2500", "0.2500", "fine", "done"]
    assert lines[1].split()[:12] == [*start, "0.0000", "0.2500", "dead", "failed", "its", "process"]
    assert table == {"fine": "done", "dead": "failed", "next": "waiting"} and len(lines) == 3
    monkeypatch.setattr(tune.runs, "atomic", lambda path: os.listdir(tmp_path / "nowhere"))
    step(0, next="RUNNING")  # as if the disk were full


def test_a_trial_says_why_it_failed_and_tells_again_the_epochs_before(base, tmp_path, monkeypatch):
    told, slept = [], []
    monkeypatch.setattr("ray.tune.report", told.append)
    monkeypatch.setattr(tune.time, "sleep", slept.append)
    trial, run = make_trial(tmp_path, "t"), tmp_path / "t"
    trial = replace(trial, data=base.data, cache=base.cache, resume=True)
    task = {"cwd": os.getcwd(), "trial": trial}
    (run / "last.pt").write_bytes(b"damaged")
    tune.run_trial(task)
    assert tune.state(trial)["status"] == "failed" and told == []
    assert tune.state(trial)["reason"].startswith(f"{run / 'last.pt'}: damaged (BadZipFile")
    assert "Traceback" in (run / "failed.txt").read_text()
    rows = [{"epoch": 1}, *({"epoch": i, "val_dice": i / 10} for i in (2, 3, 4))]
    runs.write_metrics(run, [row | {"seconds": 1.0} for row in rows])
    tune.run_trial(task)  # not the last one: its test results are to come
    assert told == rows[1:3]
    with other_writer(run), pytest.raises(runs.Busy):  # so that Ray tries again
        tune.run_trial(task)
    assert slept and "another process is writing" in tune.state(trial)["reason"]
    tune.run_trial(task | {"cwd": str(tmp_path / "gone")})
    assert tune.state(trial)["reason"].endswith(f"No such file or directory: '{tmp_path}/gone'")
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError):  # a node that does not see the folder makes none
        tune.run_trial(task)
    assert not run.exists()


def wait_for(found):
    until = time.monotonic() + 120
    while not (result := found()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return result


def writer_of(run):
    """The process that holds the run's lock, 0 if none."""
    with open(run / ".lock", "a+b") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        return struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux who holds a lock")
@pytest.mark.slow
def test_a_search_whose_worker_and_driver_are_killed_ends_as_if_never_killed(base, tmp_path):
    """Two trials: kill -9 of one's process, which Ray starts again; kill -9 of the driver with one
    trial done and one running; started again at once."""
    out, printed = tmp_path / "grid", tmp_path / "printed.txt"
    words = f"{ONE} {FEW} --seed 0 1 --max-concurrent 2 --data {base.data} --cache {base.cache}"
    words = [sys.executable, ROOT / "tune.py", *words.split(), "--out", out]

    def start():
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(printed, "w") as file:
            return subprocess.Popen(words, cwd=tmp_path, env=env, stdout=file, stderr=file)

    driver = start()
    wait_for(lambda: len(list(out.glob("*/trial.json"))) == 2)
    both = {path.parent for path in out.glob("*/trial.json")}
    os.kill(wait_for(lambda: max(map(writer_of, both))), 9)
    (done,) = wait_for(lambda: {run for run in both if (run / "summary.json").exists()})
    (other,) = both - {done}
    wait_for(lambda: (other / "last.pt").exists())
    driver.kill()
    if pid := writer_of(other):  # it outlives the driver by seconds and could end the trial
        os.kill(pid, 9)
    assert driver.wait() and not (other / "summary.json").exists()
    before = {p.name: p.read_bytes() for p in done.iterdir() if p.is_file()}
    before.pop("last.pt", None)  # the restart removes it if the kill came before that
    again = start()
    assert again.wait(timeout=240) == 0, printed.read_text()
    assert not list(Path("/tmp/ray").glob(f"session_*_{again.pid}"))
    assert re.search(r"2 trials, 1 finished before[^$]*2/2 +0 +0 ", printed.read_text())
    assert {p.name: p.read_bytes() for p in done.iterdir() if p.is_file()} == before
    assert not (out / ".ray").exists() and not (other / "last.pt").exists()
    rows = pd.read_csv(out / "results.csv", index_col="trial")
    alone = replace(runs.saved_config(other), out=str(tmp_path / "alone"))
    test = train.train(alone)["test"]
    ours = runs.load_checkpoint(other / "best.pt")["model"]
    for name, value in runs.load_checkpoint(Path(alone.out, "best.pt"))["model"].items():
        assert ours[name].equal(value)
    assert rows.loc[other.name, "test_dice"] == pytest.approx(test["dice"], abs=1e-12)
