"""tune.py: what a search varies, its folders, console, ASHA and report; a search that is killed."""

import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import make_config, make_trial, other_writer

import claims
import runs
import tables
import train
import tune
from common import UserError, write_json
from config import LAUNCH_OPTIONS, Config

ROOT = Path(__file__).parent.parent
FEW = "--patch 16 --spacing 16 --epochs 2 --steps 2 --val-every 1 --widths 4 8 8 16 16"
ONE = "--search lambdas --phi none --lambda-rec 0.1 --lambda-cls 0.1"  # a grid of one trial

# ------------------------------------------------------------------ what a search varies


def configs(search, given=None, seeds=(0,), samples=8):
    """The different configs of a search on PET/CT."""
    args = SimpleNamespace(search=search, seed=seeds, samples=samples)
    configs = []
    for options in tune.search_options(args, given or {}, "petct"):
        config = make_config(**options)
        if config not in configs:
            configs.append(config)
    return configs


def test_claims_repeat_their_arms_by_seed():
    trials = configs("claims", seeds=(0, 1))
    arms = list(claims.ARMS)
    assert [claims.arm_of(trial) for trial in trials] == 2 * arms
    assert [trial.seed for trial in trials[:: len(arms)]] == [0, 1]
    organ_arms = [claims.arm_of(trial) for trial in configs("organs")]
    assert organ_arms == list(claims.COMPARISONS["organs"])
    with pytest.raises(UserError, match="--lambda-rec: --search claims sets it"):
        configs("claims", {"lambda_rec": 0.1})


def test_claims_have_three_seeds_and_all_folds_by_default():
    args, _ = tune.parse_tune(["--search", "claims"])
    assert (args.seed, args.fold) == ([0, 1, 2], ["all"])
    args, _ = tune.parse_tune(["--search", "free"])
    assert (args.seed, args.fold, args.samples) == ([0], ["0"], 32)


def test_folds_are_given_by_number_or_all(tmp_path):
    config = make_config(folds=4)
    assert tune.parse_folds(["all"], config) == [0, 1, 2, 3]
    assert tune.parse_folds(["2", "0"], config) == [2, 0]
    with pytest.raises(UserError, match="--fold -1: expected numbers"):
        tune.parse_folds(["-1"], config)
    file = tmp_path / "splits.json"
    for content, folds in (([{}, {}], [0, 1]), ({}, [0])):
        write_json(file, content)
        assert tune.parse_folds(["all"], make_config(splits=str(file))) == folds


def test_the_grids_are_those_of_table_2_and_of_the_supplement():
    trials = configs("table2")
    cells = [(trial.version, str(trial.theta or trial.phi)) for trial in trials]
    assert cells[::7] == list(tables.PAPER_TABLE2)
    assert sorted(cells) == sorted(7 * cells[::7])
    sets = [(3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7)]
    assert [trial.shared for trial in trials] == 15 * sets
    assert configs("layers") + configs("theta") == trials

    weights = [0.1, 0.01, 0.001, 0.0001, 0.00001]
    trials = configs("lambdas")
    assert [trial.lambda_cls for trial in trials] == 5 * weights
    assert [trial.lambda_rec for trial in trials[::5]] == weights
    for trial in trials:
        assert (trial.version, trial.shared, trial.phi) == ("v3", (5,), "shuffle")


def test_given_options_hold_for_all_trials_that_they_apply_to(monkeypatch):
    trials = configs("theta", {"lr": 1e-4, "shared": (2,)}, seeds=(0, 1))
    assert [trial.theta for trial in trials] == 2 * tune.THETAS
    assert [trial.seed for trial in trials[::6]] == [0, 1]
    assert {(trial.lr, trial.shared) for trial in trials} == {(1e-4, (2,))}

    trials = configs("table2", {"lambda_cls": 0.5, "shuffle_count": 30, "phi": "shuffle"})
    settings = {(trial.version, trial.lambda_cls, trial.shuffle_count) for trial in trials}
    assert settings == {
        ("v1", None, 30),
        ("v2", None, 30),
        ("v3", 0.5, 30),
        ("v4", None, 1),
    }

    monkeypatch.setitem(tune.SPACES, "rates", tune.expand_grid(version=["v2"], lr=[1e-4, 1e-3]))
    assert [trial.lr for trial in configs("rates")] == [1e-4, 1e-3]


def test_free_samples_depend_on_their_seed_and_number_alone():
    many = configs("free", samples=300)
    assert configs("free", samples=5) == many[:5]
    assert configs("free", samples=5, seeds=(1,)) != many[:5]
    assert tune.draw_options(1, 7, "mri") == {
        "version": "v2",
        "shared": (3, 5, 6, 7),
        "phi": "noise",
        "noise_sigma": 0.0986,
        "shuffle_count": 10,
        "lambda_rec": 0.0185,
        "lambda_cls": 0.000981,
        "theta": 0.5,
        "lr": 0.00721,
    }
    assert {c.shuffle_count for c in many if c.phi != "shuffle"} == {1}  # has no effect: left out
    assert {c.shuffle_count for c in many if c.phi == "shuffle"} == {1, 3, 10, 30}
    for fixed in configs("free", {"version": "v3", "shared": (5,), "lr": 1e-3}):
        assert (fixed.version, fixed.shared, fixed.lr) == ("v3", (5,), 1e-3)


# ------------------------------------------------------------------ the folders of the trials


def test_a_name_changes_with_all_that_sets_trials_apart():
    config = configs("lambdas")[7]
    name = tune.trial_name(config, "s")
    assert re.fullmatch(r"v3-L5-shuffle-rec0\.01-cls0\.001-seed0-[0-9a-f]{8}", name)
    assert tune.trial_name(config, "t") != name
    assert tune.trial_name(replace(config, fold=1), "s").startswith(f"{name[:-14]}fold1-seed0-")
    changes = {
        "epochs": 11,
        "lr": 2e-3,
        "shuffle_count": 2,
        "version": "v2",
        "fold": 1,
        "seed": 1,
    }
    for option, value in changes.items():
        other = tune.trial_name(replace(config, **{option: value}), "s")
        assert other[-8:] != name[-8:]
    for option in {*LAUNCH_OPTIONS, "amp", "splits"} - {"epochs", "data"}:
        assert tune.trial_name(replace(config, **{option: "other"}), "s") == name
    learned = tune.trial_name(configs("theta")[-1], "s")
    assert learned.startswith("v4-L34567-thetalearn-seed0-")


@pytest.mark.parametrize(
    "line, message",
    [
        ("--search layers --samples 3", "--samples 3: it is for --search free"),
        ("--search lambdas --max-concurrent -1", "--max-concurrent -1: a number, at least 0"),
        ("--search theta --lambda-cls 1", "--lambda-cls has no effect on v4"),
        ("--search lambdas --version v2", "--lambda-cls has no effect on v2"),
        ("--search layers --version nnunet", "--phi has no effect on nnunet"),
        ("--search layers --theta 0.3", "--theta has no effect on v1"),
        ("--search layers --cache=", "--cache '': an empty string"),
    ],
)
def test_what_cannot_be_done_ends_with_one_line(base, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        tune.tune_command([*line.split(), "--data", base.data])
    assert not list(tmp_path.glob("cache"))


def test_values_are_checked_before_the_cohort_is_simulated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--lr -1"):
        tune.tune_command(["--search", "lambdas", "--lr", "-1"])
    assert not list(tmp_path.iterdir())


def prepare(base, root, line):
    """Arguments and trials of a search in root/out on the session's cohort."""
    places = ["--out", str(root / "out"), "--data", base.data, "--cache", base.cache]
    args, given = tune.parse_tune([*line.split(), *FEW.split(), *places])
    args.out.mkdir(exist_ok=True)
    return args, tune.prepare_trials(args, given)


def test_a_trial_has_a_record_of_the_searches_that_asked_for_it(base, tmp_path, monkeypatch):
    args, (trial,) = prepare(base, tmp_path, ONE)
    run = Path(trial.out)
    record = runs.load_trial_record(run)
    assert trial.resume
    assert not trial.check
    assert record["searches"] == ["lambdas"]
    assert Path(record["config"].data).is_absolute()

    layers = ONE.replace("lambdas", "layers --version v3 --shared 5")
    prepare(base, tmp_path, f"{layers} --window-batch 9")
    assert runs.load_trial_record(run) == {**record, "searches": ["lambdas", "layers"]}
    (run / "trial.json").write_bytes(b"[]")
    assert prepare(base, tmp_path, ONE)[1] == [trial]
    assert runs.load_trial_record(run) == record

    free = ONE.replace("lambdas", "free --version v3 --shared 5") + " --lr 0.001 --samples 3"
    (sample,) = prepare(base, tmp_path, free)[1]
    assert Path(sample.out).name == f"free-{run.name}"
    alone = free.replace("--samples 3", "--samples 1")  # a search of a single config
    assert prepare(base, tmp_path, alone)[1] == [sample]
    monkeypatch.setattr(tune, "choose_splits", lambda *args: {"val": []})
    with pytest.raises(UserError, match="no lesion to validate on"):
        prepare(base, tmp_path, free)

    trials = prepare(base, tmp_path, f"{ONE} --fold 2 0 --folds 3 --seed 4 1")[1]
    assert [(trial.fold, trial.seed) for trial in trials] == [(2, 4), (2, 1), (0, 4), (0, 1)]
    records = [runs.load_trial_record(Path(trial.out)) for trial in trials]
    assert len({record["studies"] for record in records}) == 1
    assert "-fold2-seed4-" in trials[0].out
    assert [record["config"].out for record in records] == [trial.out for trial in trials]

    args.address = "127.0.0.1:1"
    with pytest.raises(UserError, match="127.0.0.1:1: .*refused.* The same command goes on"):
        tune.run_with_ray(args, [trial])
    assert "Traceback" in (args.out / "ray.log").read_text()


# ------------------------------------------------------------------ one trial, and Ray


@pytest.mark.parametrize(
    "nodes, line, expected",
    [
        ([(8, 0)], "", (1, 0)),
        ([(8, 2)], "", (1, 1)),
        ([(8, 2)], "--device cpu", (1, 0)),
        ([(8, 0), (4, 1)], "--gpus-per-trial 0.5 --cpus-per-trial 3", (3, 0.5)),
        ([(8, 0), (99, 9)], "--gpus-per-trial 1", None),  # a node of 99 CPUs is dead
        ([(8, 4)], "--gpus-per-trial 2", None),
        ([(8, 0), (99, 0)], "--cpus-per-trial 9", None),
        ([(8, 0), (4, 1)], "--cpus-per-trial 8 --gpus-per-trial 1", None),
        ([(8, 0)], "--cpus-per-trial 0", None),
    ],
)
def test_resources_are_those_of_the_flags_if_a_node_has_them(nodes, line, expected):
    args, given = tune.parse_tune(["--search", "lambdas", *line.split()])
    seen = []
    for cpus, gpus in nodes:
        seen.append({"Alive": cpus < 99, "Resources": {"CPU": cpus, "GPU": gpus}})
    device = given.get("device", "auto")
    if expected:
        resources = tune.resources_per_trial(seen, args, device)
        assert (resources["cpu"], resources["gpu"]) == expected
    else:
        with pytest.raises(UserError, match=line):
            tune.resources_per_trial(seen, args, device)


def ray_trial(run, epochs=4):
    """What Ray's callbacks and schedulers see of a trial."""
    config = Config(out=str(run), epochs=epochs)
    return SimpleNamespace(trial_id=run.name, config={"trial": config})


@pytest.mark.parametrize(
    "epochs, decisions",
    [
        (1, [1]),
        (2, [1]),
        (4, [3, 1]),
        (10, [3]),
        (400, [133]),
    ],
)
def test_asha_decides_after_a_third_of_the_epochs_and_never_near_the_end(epochs, decisions):
    (bracket,) = tune.make_asha(epochs)._brackets
    assert [epoch for epoch, _ in bracket._rungs] == decisions


def test_asha_stops_two_trials_of_three(tmp_path):
    asha = tune.make_asha(4)
    actions = []
    for i, dice in enumerate((0.5, 0.4, 0.1, 0.6)):
        trial = ray_trial(tmp_path / str(i))
        asha.on_trial_add(None, trial)
        report = {"epoch": 1, "val_dice": dice}
        actions.append(asha.on_trial_result(None, trial, report))
    assert actions == ["CONTINUE", "STOP", "STOP", "CONTINUE"]


def test_a_line_per_ended_trial_with_counts_and_the_time_left(tmp_path, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    config = make_config("v2", epochs=4)
    make_trial(tmp_path, "fine", config, val_dices=[0.25])
    for name in ("dead", "gone", "next"):
        make_trial(tmp_path, name, config, status="waiting")
    shutil.rmtree(tmp_path / "gone")
    lines = tune.TrialLines(tmp_path, total=4)

    clock[0] += 90
    lines.on_trial_complete(trial=ray_trial(tmp_path / "fine"), iteration=1, trials=[])
    line = capsys.readouterr().out
    assert line == "1/4 ended, 0 failed, 0:04:30 left: fine done, val Dice 0.2500\n"
    clock[0] += 90
    lines.on_trial_error(trial=ray_trial(tmp_path / "dead"), iteration=2, trials=[])
    line = capsys.readouterr().out
    assert line.startswith("2/4 ended, 1 failed, 0:03:00 left: dead failed its process died")
    lines.on_trial_error(trial=ray_trial(tmp_path / "gone"))
    assert lines.ended == {"fine": "done", "dead": "failed", "gone": "waiting"}
    statuses = pd.read_csv(tmp_path / "results.csv").set_index("trial")["status"]
    assert statuses.to_dict() == {"fine": "done", "dead": "failed", "next": "waiting"}


def test_a_trial_says_why_it_failed_and_ray_tries_again_if_another_writes(
    base, tmp_path, monkeypatch
):
    slept = []
    monkeypatch.setattr(tune.time, "sleep", slept.append)
    run = tmp_path / "t"
    trial = replace(
        make_config("v2", epochs=4),
        out=str(run),
        data=base.data,
        cache=base.cache,
        resume=True,
    )
    make_trial(tmp_path, "t", trial, status="waiting")
    task = {"cwd": os.getcwd(), "trial": trial}

    def reason():
        status = runs.trial_status(run, 4)
        assert status["status"] == "failed"
        return status["reason"]

    (run / "last.pt").write_bytes(b"damaged")
    tune.run_trial(task)
    assert reason().startswith(f"{run / 'last.pt'}: damaged (BadZipFile")
    assert "Traceback" in (run / "failed.txt").read_text()
    with other_writer(run), pytest.raises(runs.FolderBusy):
        tune.run_trial(task)
    assert slept == [10]
    assert "another process is writing" in reason()
    tune.run_trial({**task, "cwd": str(tmp_path / "gone")})
    assert reason().endswith(f"No such file or directory: '{tmp_path}/gone'")

    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError):  # a node that does not see the folder makes none
        tune.run_trial(task)
    assert not run.exists()


def test_a_trial_reports_its_dice_but_for_the_last_epoch_and_leaves_no_last_pt(
    tmp_path, monkeypatch
):
    reports = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    run = make_trial(tmp_path, "t", make_config("v2"))
    (run / "last.pt").touch()
    trial = make_config("v2", epochs=3, out=str(run))

    def fake_train(config, report):
        report({"epoch": 1})
        for epoch in (2, 3):
            report({"epoch": epoch, "val_dice": epoch / 10, "loss": 1.0})

    monkeypatch.setattr(tune, "train", fake_train)
    tune.run_trial({"cwd": os.getcwd(), "trial": trial})
    assert reports == [{"epoch": 2, "val_dice": 0.2}]
    assert not (run / "last.pt").exists()


# ------------------------------------------------------------------ the report


def make_listed(root, name, search, version="v1", val_dice=0.3, **more):
    """A finished trial of a search; more: of make_trial, and options of its config."""
    trial = {"searches": [search], "val_dices": [val_dice]}
    for key in ("dice", "status", "studies"):
        if key in more:
            trial[key] = more.pop(key)
    config = make_config(version, epochs=4, **more)
    return make_trial(root, name, config, **trial)


def test_the_report_keeps_settings_apart_and_names_what_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # it needs no Ray
    make_listed(tmp_path, "a", "table2", phi="noise", dice=0.6)
    make_listed(tmp_path, "a1", "table2", phi="noise", dice=0.5, seed=1, workers=2)
    make_listed(tmp_path, "b", "table2", phi="noise", dice=0.2, lr=0.1)
    make_listed(tmp_path, "c", "table2", "v4", dice=0.4)
    make_listed(tmp_path, "d", "table2", "v4", theta=0.5, status="failed")
    make_listed(tmp_path, "e", "table2", "v2", dice=0.1, studies="t")
    (make_listed(tmp_path, "f", "table2") / "trial.json").write_text("[]")

    tune.tune_command(["--report", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.startswith(f"{tmp_path}: 7 trials, 5 done, 2 failed\n\nTable 2")
    tables_2 = text.split("Table 2")[1:]
    words = "mean of 1 to 2 runs (seeds, folds); 1 of 3 cells missing; lr default, studies s\n"
    assert words in tables_2[0]
    assert "55.00** (62.34)" in tables_2[0]
    dices = [re.findall(r"(\d+\.\d\d)\** \(", table) for table in tables_2]
    assert dices == [["55.00", "40.00"], ["10.00"], ["20.00"]]
    assert "failed: d: the loss is nan" in text
    assert "failed: f: damaged folder" in text
    assert "In none of" not in text


def test_the_report_lists_free_trials_and_those_of_no_table(tmp_path):
    make_listed(tmp_path, "grid", "lambdas", "v3_ct_only", dice=0.1)
    make_listed(tmp_path, "claim", "claims", "v3")
    make_listed(tmp_path, "a", "lambdas", "v2", val_dice=0.4)
    make_listed(tmp_path, "b", "theta", "v4", val_dice=0.3, theta=0.25)
    make_listed(tmp_path, "c", "layers", val_dice=0.2, shared=(2,))
    make_listed(tmp_path, "d", "layers", val_dice=0.1, kind="mri", dice=0.7)
    make_listed(tmp_path, "f0", "free", "v2", val_dice=0.9, shared=(1, 8))
    for i in range(11):
        make_listed(tmp_path, f"f{i + 1}", "free", val_dice=0.1)

    text = tune.report_search(tmp_path)
    head, free, others = re.split("Best validation.*\n|In none of.*\n", text)
    assert "Test Dice of v3_ct_only in percent" in head
    assert "10.00*\n" in head
    assert "Claims of Sec. 4" in head
    heading, *lines = [line.split() for line in free.strip().splitlines()]
    assert heading[:3] == ["version", "shared", "phi"]
    assert "theta" not in heading
    assert lines[0][:3] == ["v2", "1", "8"]  # the best ones first
    assert len(lines) == 10
    lines = [line.split() for line in others.splitlines()[1:]]
    assert [line[0] for line in lines] == ["v2", "v4", "v1", "v1"]
    assert lines[-1][-1] == "70"


# ------------------------------------------------------------------ a real Ray


def wait_for(condition):
    until = time.monotonic() + 300
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def writer_of(run):
    """The process that holds the run's lock, 0 if none."""
    with open(run / ".lock", "a+b") as file:
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        return struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, query))[-1]


def start_search(base, root, line):
    """tune.py as a process, which prints to root/printed.txt."""
    words = [*FEW.split(), *line.split(), "--data", base.data, "--cache", base.cache]
    words += ["--max-concurrent", "2", "--out", root / "out"]
    with open(root / "printed.txt", "w") as file:
        return subprocess.Popen(
            [sys.executable, ROOT / "tune.py", *words],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
        )


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux who holds a lock")
@pytest.mark.slow
def test_a_search_whose_worker_and_driver_are_killed_ends_as_if_never_killed(base, tmp_path):
    """Two trials: kill -9 of one's process, which Ray starts again; kill -9 of the driver with one
    trial done and one running; started again at once."""
    out, printed = tmp_path / "out", tmp_path / "printed.txt"
    line = f"{ONE} --seed 0 1"
    driver = start_search(base, tmp_path, line)
    wait_for(lambda: len(list(out.glob("*/trial.json"))) == 2)
    both = {path.parent for path in out.glob("*/trial.json")}
    os.kill(wait_for(lambda: max(map(writer_of, both))), 9)
    (done,) = wait_for(lambda: {run for run in both if (run / "summary.json").exists()})
    (other,) = both - {done}
    wait_for(lambda: (other / "last.pt").exists())
    driver.kill()
    pid = writer_of(other)  # it outlives the driver by seconds and could finish the trial
    if pid:
        os.kill(pid, 9)
    assert driver.wait()
    assert not (other / "summary.json").exists()

    before = {path.name: path.read_bytes() for path in done.iterdir() if path.is_file()}
    again = start_search(base, tmp_path, line)
    assert again.wait(timeout=600) == 0, printed.read_text()
    assert not list(Path("/tmp/ray").glob(f"session_*_{again.pid}"))
    assert re.search(r"2 trials, 1 finished before[^$]*1/1 ended, 0 failed", printed.read_text())
    for name, content in before.items():
        assert (done / name).read_bytes() == content
    assert not (out / ".ray").exists()
    assert not (other / "last.pt").exists()

    rows = pd.read_csv(out / "results.csv", index_col="trial")
    alone = replace(runs.load_config(other), out=str(tmp_path / "alone"))
    test = train.train(alone)["test"]
    weights = runs.load_checkpoint(other / "best.pt")["model"]
    expected = runs.load_checkpoint(Path(alone.out, "best.pt"))["model"]
    for name, value in expected.items():
        assert weights[name].equal(value)
    assert rows.loc[other.name, "test_dice"] == pytest.approx(test["dice"], abs=1e-12)


@pytest.mark.slow
def test_a_free_search_ends_well_though_asha_stops_trials_and_skips_finished_ones(base, tmp_path):
    line = "--search free --version v1 --samples 4 --epochs 4"
    search = start_search(base, tmp_path, line)
    assert search.wait(timeout=600) == 0, (tmp_path / "printed.txt").read_text()
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(rows["status"]) <= {"done", "unfinished"}
    assert "done" in set(rows["status"])

    done = rows["status"].eq("done").sum()
    again = start_search(base, tmp_path, line)
    assert again.wait(timeout=600) == 0
    printed = (tmp_path / "printed.txt").read_text()
    assert f"4 trials, {done} finished before" in printed
