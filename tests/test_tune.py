"""tune.py: the grids, names of trials, what folders say, the tables; and searches that are killed.

The searches at the end start Ray on this machine alone, on a cohort of nine small studies.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import plots
import train
import tune
from data import UserError, write_json, write_phantom

ROOT = Path(__file__).parent.parent
TINY = ["--patch", "16", "--spacing", "16", "--epochs", "2", "--steps", "2", "--val-every", "1",
        "--workers", "0", "--window-batch", "8"]  # fmt: skip


def configs(search, given=None, seeds=(0,), samples=8, kind="petct"):
    """The resolved configs of a search."""
    asked = tune.settings(search, given or {}, list(seeds), samples, kind)
    return [train.resolve(replace(train.Config(), **values), kind, True) for values in asked]


# ------------------------------------------------------------------ the spaces


def test_table2_is_the_105_trainings_of_the_paper():
    names = {
        f"{version} {row} {','.join(map(str, shared))}"
        for version, rows in {
            **dict.fromkeys(("v1", "v2", "v3"), ("none", "noise", "shuffle")),
            "v4": ("0.1", "0.2", "0.3", "0.4", "0.5", "learn"),
        }.items()
        for row in rows
        for shared in ((3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7))
    }
    found = [
        f"{c.version} {c.theta if c.version == 'v4' else c.phi} {','.join(map(str, c.shared))}"
        for c in configs("table2")
    ]
    assert len(found) == 105 and set(found) == names
    assert len(configs("layers")) == 63 and len(configs("theta")) == 42
    assert set(tune.PAPER_TABLE2) == {tuple(name.split()[:2]) for name in names}
    assert {len(row) for row in tune.PAPER_TABLE2.values()} == {7}


def test_lambdas_is_the_grid_of_the_supplement():
    found = configs("lambdas")
    weights = [0.1, 0.01, 0.001, 0.0001, 0.00001]
    assert [(c.lambda_rec, c.lambda_cls) for c in found] == [
        (r, c) for r in weights for c in weights
    ]
    assert {(c.version, c.shared, c.phi, c.lambda_seg) for c in found} == {
        ("v3", (5,), "shuffle", 0.5)
    }


def test_repeated_seeds_repeat_the_grid_and_given_options_hold_for_all():
    found = configs("theta", {"lr": 1e-4, "shared": (2,)}, seeds=(0, 1))
    assert [(c.theta, c.seed) for c in found] == [(t, s) for s in (0, 1) for t in tune.THETAS]
    assert {(c.lr, c.shared) for c in found} == {(1e-4, (2,))}
    assert {c.version for c in configs("layers", {"version": "v3"})} == {"v3"}
    some = configs("table2", {"lambda_cls": 0.5, "shuffle_count": 30, "phi": "shuffle"})
    assert {(c.version, c.lambda_cls) for c in some} == {
        ("v1", None),
        ("v2", None),
        ("v3", 0.5),
        ("v4", None),
    }
    assert {(c.version, c.phi, c.shuffle_count) for c in some} == {
        ("v1", "shuffle", 30),
        ("v2", "shuffle", 30),
        ("v3", "shuffle", 30),
        ("v4", "none", 1),
    }
    with pytest.raises(UserError, match="--theta has no effect on v1"):  # no trial reads it
        configs("layers", {"theta": 0.3})
    with pytest.raises(UserError, match="--version: .*v9"):
        configs("layers", {"version": "v9"})
    with pytest.raises(UserError, match="--version: .*v3"):
        configs("layers", kind="mri")


def test_free_samples_depend_on_their_seed_and_number_alone():
    few, many = configs("free", samples=5), configs("free", samples=300)
    assert few == many[:5]
    assert configs("free", seeds=(1,), samples=5) != few
    assert {c.version for c in many} == {"v1", "v2", "v3", "v4"}
    assert {layer for c in many for layer in c.shared} == set(range(1, 9))
    assert len({c.shared for c in many}) > 100 and () in {
        c.shared for c in configs("free", samples=999)
    }
    weights = np.log10([c.lambda_rec for c in many if c.lambda_rec])
    assert (
        -5 <= weights.min() < -4.8 and -1.2 < weights.max() <= -1 and abs(weights.mean() + 3) < 0.2
    )
    assert {c.shuffle_count for c in many if c.phi != "shuffle"} == {1}  # unread: not drawn
    assert len({c.shuffle_count for c in many if c.phi == "shuffle"}) == 4
    assert {c.noise_sigma for c in many if c.phi != "noise"} == {0.3}
    fixed = configs(
        "free", {"version": "v3", "shared": (5,), "phi": "shuffle", "lr": 1e-3}, samples=20
    )
    assert {(c.version, c.shared, c.phi, c.lr) for c in fixed} == {("v3", (5,), "shuffle", 1e-3)}
    assert len({(c.lambda_rec, c.lambda_cls) for c in fixed}) == 20


def test_the_name_tells_the_settings_and_changes_with_all_that_matters():
    splits = {"train": ["a"], "val": ["b"], "test": ["c"]}
    config = configs("lambdas")[7]
    name = tune.name_of(config, splits)
    assert re.fullmatch(r"v3-L5-shuffle-rec0\.01-cls0\.001-seed0-[0-9a-f]{8}", name)
    for change in ({"epochs": 11}, {"lr": 2e-3}, {"batch_size": 3}, {"shuffle_count": 2}):
        assert tune.name_of(replace(config, **change), splits) != name
    assert tune.name_of(config, splits | {"test": ["d"]}) != name
    for same in (train.LAUNCH | {"splits"}) - {"epochs"}:
        assert tune.name_of(replace(config, **{same: "other"}), splits) == name
    assert tune.name_of(configs("theta")[-1], splits).startswith("v4-L34567-theta_learn-seed0-")
    everything = configs("table2", seeds=(0, 1))
    assert len({tune.name_of(c, splits) for c in everything}) == 210


# ------------------------------------------------------------------ folders and tables


def state(run, epochs):
    found = tune.look(run, epochs)
    return found["status"], found["reason"]


def make_trial(
    root, name, search="table2", status="done", dice=0.5, rows=None, studies="s", **changes
):
    """A trial's folder as a search leaves it."""
    kind = changes.pop("kind", "petct")
    options = {"epochs": 4, "val_every": 1} | changes
    config = train.resolve(replace(train.Config(), **options), kind, kind == "petct")
    run = root / name
    run.mkdir(parents=True)
    record = {"searches": search.split(), "config": train.plain(config), "studies": studies}
    write_json(run / "trial.json", record)
    if status != "waiting":
        write_json(run / "config.json", {"config": train.plain(config)})
        rows = rows or [0.1, 0.3, 0.2]
        plots.write_metrics(
            run,
            [{"epoch": i + 1, "val_dice": v, "seconds": 10.0, "val_seconds": 1.5}
             for i, v in enumerate(rows)],
        )  # fmt: skip
    if status == "done":
        whole = "dice" if kind == "petct" else "dice_whole"
        metrics = {whole: {"mean": dice, "n": 3}, "fpv_ml": {"mean": 2.5, "n": 6}}
        summary = {
            "epochs": config.epochs,
            "val_dice": 0.3,
            "seconds": 50.0,
            "gpu_memory_mb": 123.0,
        }
        write_json(run / "summary.json", summary | {"systems": {"model": metrics}})
    if status == "stopped":
        write_json(run / "stopped.json", {"epoch": 3, "val_dice": 0.3})
    if status == "failed":
        (run / "failed.txt").write_text("the loss is nan\n\nTraceback\n")
    return run, config


def test_results_have_a_row_per_trial_from_its_folder(tmp_path):
    states = ("done", "stopped", "failed", "unfinished", "waiting")
    for status in states:
        make_trial(tmp_path, status, status=status, version="v4", shared=())
    make_trial(tmp_path, "going", status="unfinished")
    tune.Results(tmp_path).write(running={"going"})
    frame = plots.read_trials(tmp_path / "results.csv").set_index("trial")
    assert [frame.status[s] for s in (*states, "going")] == [*states, "running"]
    done, stopped = frame.loc["done"], frame.loc["stopped"]
    assert (done.test_dice, done.test_fpv_ml, done.seconds, done.gpu_memory_mb) == (
        0.5,
        2.5,
        50,
        123,
    )
    assert (done.shared, done.theta, done.phi, done.epochs) == ("none", "0.2", "none", 4)
    assert stopped.reason == "by ASHA after epoch 3" and np.isnan(stopped.test_dice)
    assert (stopped.epochs_done, stopped.val_dice, stopped.seconds) == (3, 0.3, 34.5)
    assert frame.reason["failed"] == "the loss is nan"
    assert frame.epochs_done["waiting"] == 0 and done.folder == "done"
    # another budget is another trial, even in a folder that was made for this one
    assert state(tmp_path / "done", 5)[0] == "unfinished"


def test_the_report_is_table_2_with_the_papers_figures_beside_ours(tmp_path):
    i = 0
    for (version, row), figures in tune.PAPER_TABLE2.items():
        for shared, dice in zip(tune.SHARED, figures, strict=True):
            knobs = {"theta": row} if version == "v4" else {"phi": row}
            for seed, shift in ((0, -0.01), (1, 0.01)):  # their mean is the paper's figure
                make_trial(tmp_path, f"t{i}", version=version, shared=shared, seed=seed,
                           dice=dice / 100 + shift, **knobs)  # fmt: skip
                i += 1
    text = tune.report(tmp_path)
    lines = text.splitlines()
    assert "210 trials, 210 done" in lines[0] and "mean of 2 seeds" in text
    pairs = re.findall(r"([\d.]+)(\**) \(([\d.]+)(\**)\)", text)
    assert len(pairs) == 105 and all(a == c and b == d for a, b, c, d in pairs)
    shuffled = next(line for line in lines if line.startswith("v3  L2 + shuffling"))
    assert shuffled.split()[4] == "63.33*" and "65.91** (65.91**)" in shuffled
    assert [a for a, b, _, _ in pairs if b == "**"] == ["64.57", "65.50", "65.91", "64.24"]
    assert sum(b != "" for _, b, _, _ in pairs) == 28  # a best one in each of 4 x 7 boxes


def test_the_report_keeps_budgets_apart_and_names_what_is_missing(tmp_path):
    make_trial(tmp_path, "a", version="v1", phi="noise", dice=0.6)
    make_trial(tmp_path, "b", version="v1", phi="noise", dice=0.2, lr=0.1)
    make_trial(tmp_path, "c", version="v4", dice=0.4)
    make_trial(tmp_path, "d", version="v4", status="failed", theta=0.5)
    text = tune.report(tmp_path)
    assert "lr 0.001" in text and "lr 0.1" in text
    assert "60.00** (62.34)" in text and "20.00** (62.34)" in text
    assert "failed: d: the loss is nan" in text and "1 failed" in text
    assert text.count("– (") == 105 * 2 - 3


def figures_of(text):
    """Our figures in Table 2, without the missing ones."""
    return re.findall(r"(\d+\.\d\d)\** \(", text)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"steps": 2}, ["steps default", "steps 2"]),
        ({"epochs": 8}, ["epochs 4", "epochs 8"]),
        ({"studies": "t"}, ["studies s", "studies t"]),
        ({"fold": 1, "studies": "t"}, ["fold 0, studies s", "fold 1, studies t"]),
        ({"version": "v3", "lr": 0.1}, ["lr 0.001", "lr 0.1"]),  # of another version too
    ],
)
def test_seeds_of_one_setting_on_the_same_studies_are_averaged_and_no_others(
    changes, said, tmp_path
):
    own = dict(version="v1", phi="noise")
    make_trial(tmp_path, "a", dice=0.6, **own, workers=2, data="here", cache="c", splits="x.json")
    make_trial(tmp_path, "b", dice=0.5, **own, workers=4, data="there", seed=1, skip_bad=True)
    text = tune.report(tmp_path)
    assert "; mean of 2 seeds\n" in text and figures_of(text) == ["55.00"]
    make_trial(tmp_path, "c", dice=0.1, **own | changes)
    one, other = tune.report(tmp_path).split("Table 2")[1:]
    assert (figures_of(one), figures_of(other)) == (["55.00"], ["10.00"])
    assert [part.splitlines()[0].split("; ")[-1] for part in (one, other)] == said


def test_validation_dice_is_no_test_dice(tmp_path):
    make_trial(tmp_path, "f", "free", "stopped", version="v2", rows=[0.9])
    make_trial(tmp_path, "g", version="v1", phi="noise", dice=None)  # no lesion in its test part
    text = tune.report(tmp_path)
    assert "test Dice" not in text and "90" not in text and "Table 2" not in text


def test_brain_tumours_stand_beside_the_tables_of_pet_ct(tmp_path):
    make_trial(tmp_path, "a", version="v1", phi="none", kind="mri", dice=0.7)
    make_trial(tmp_path, "b", version="v1", phi="none", dice=0.6)
    trials = plots.read_trials(search_of(tmp_path)).set_index("trial")
    assert trials["dice"].to_dict() == {"a": 70, "b": 60}
    table, listed = tune.report(tmp_path).split("Table 2")[1].split("In none of")
    assert figures_of(table) == ["60.00"] and "70" in listed and "; 1 seed\n" in table


def search_of(folder):
    tune.refresh(folder)
    return folder / "results.csv"


def test_what_a_writer_of_the_folder_says_is_reported(tmp_path):
    make_trial(tmp_path, "a", version="v1", phi="noise", dice=0.6)
    search_of(tmp_path)
    make_trial(tmp_path, "b", version="v1", phi="none", dice=0.5)
    before = (tmp_path / "results.csv").read_bytes()
    with train.only_writer(tmp_path):
        tune.Results(tmp_path).write(running={"a"})  # an ended one is not running
        assert (tmp_path / "results.csv").read_bytes() != before
    figures = tmp_path / "figures"
    make_trial(tmp_path, "c", version="v1", phi="shuffle", dice=0.4)
    plots.draw_search(tmp_path, figures)  # reads the folders too
    assert (figures / "fig4_phi.png").exists()
    trials = plots.read_trials(tmp_path / "results.csv")
    assert trials["status"].tolist() == ["done"] * 3


def test_every_finished_trial_is_shown(tmp_path):
    for name, count, dice in (("a", 30, 0.1), ("b", 1, 0.2)):
        make_trial(tmp_path, name, version="v1", phi="shuffle", shuffle_count=count, dice=dice)
    make_trial(tmp_path, "c", version="v1", phi="none", lr=0.01, dice=0.3)
    make_trial(tmp_path, "d", version="v1", phi="none", lr=0.001, dice=0.4)
    text = tune.report(tmp_path)
    tables = text.split("Table 2")[1:]
    found = {part.splitlines()[0].split("; ")[-1]: figures_of(part) for part in tables}
    assert found == {
        "shuffle_count 30, lr 0.001": ["40.00", "10.00"],
        "shuffle_count 1, lr 0.001": ["40.00", "20.00"],
        "lr 0.01": ["30.00"],
    }
    assert len(tables) == 3
    assert "In none of" not in text


def test_the_report_of_lambdas_and_of_free(tmp_path):
    for i, (rec, dice) in enumerate(((1e-1, 0.31), (1e-5, 0.42))):
        make_trial(tmp_path, f"l{i}", "lambdas", version="v3", phi="shuffle", lambda_rec=rec,
                   lambda_cls=1e-2, dice=dice)  # fmt: skip
    make_trial(tmp_path, "f0", "free", "stopped", version="v2", shared=(1, 8), rows=[0.9])
    make_trial(tmp_path, "f1", "free", version="v4", theta="learn")
    text = tune.report(tmp_path)
    rows = [line.split() for line in text.splitlines()]
    assert ["0.1", "31.00"] in rows and ["1e-05", "42.00*"] in rows
    make_trial(tmp_path, "l2", "lambdas", version="v3", phi="shuffle", lambda_rec=1e-1,
               lambda_cls=1e-1, dice=0.25)  # fmt: skip
    rows = [line.split() for line in tune.report(tmp_path).splitlines()]
    assert ["0.1", "0.01"] in rows and ["0.1", "25.00", "31.00"] in rows
    listed = text[text.index("--search free") :]
    assert re.search(r"v2\s+1 8.*stopped", listed) and re.search(r"v4\s+5.*learn.*done", listed)
    assert listed.index("v2") < listed.index("v4")


def test_an_option_that_only_some_trials_read_parts_no_table(tmp_path):
    for i, values in enumerate(tune.settings(
        "layers", {"shuffle_count": 30, "noise_sigma": 0.5, "shared": (5,)}, [0], 0, "petct"
    )):  # fmt: skip
        make_trial(tmp_path, f"t{i}", dice=i / 100, **values)
    text = tune.report(tmp_path)
    assert text.count("Table 2") == 1 and len(re.findall(r"\d\.00\** \(", text)) == 9
    frame = plots.read_trials(tmp_path / "results.csv")
    assert sorted(frame["shuffle_count"].dropna()) == [30] * 3
    assert sorted(frame["noise_sigma"].dropna()) == [0.5] * 3
    make_trial(tmp_path, "weak", version="v1", phi="shuffle", shuffle_count=3, dice=0.01)
    first, second = tune.report(tmp_path).split("Table 2")[1:]  # strong, weak: both with the L2 row
    assert "shuffle_count 30" in first and "shuffle_count 3\n" in second
    assert all(re.search(r"v1  L2 .*0\.00\** \(61\.92", part) for part in (first, second))


def test_a_trial_that_two_searches_ask_for_stands_in_both_tables(tmp_path):
    run, config = make_trial(tmp_path, "t", "lambdas", version="v3", phi="shuffle", dice=0.6591)
    for _ in range(2):
        tune.announce(tune.Trial("t", replace(config, out=str(run)), "s"), "layers")
    assert tune.read_json(run / "trial.json")["searches"] == ["lambdas", "layers"]
    text = tune.report(tmp_path)
    assert "65.91** (65.91**)" in text and "65.91*\n" in text


def test_trials_outside_the_papers_tables_are_listed_and_do_not_mix(tmp_path):
    make_trial(tmp_path, "a", "lambdas", version="v3", phi="shuffle", lambda_rec=0.1,
               lambda_cls=0.1, dice=0.9)  # fmt: skip
    make_trial(tmp_path, "b", "lambdas", version="v3_ct_only", phi="shuffle", lambda_rec=0.1,
               lambda_cls=0.1, dice=0.1)  # fmt: skip
    make_trial(tmp_path, "c", "lambdas", version="v2", lambda_rec=0.1, dice=0.2)
    make_trial(tmp_path, "d", "theta", version="v4", theta=0.25, dice=0.3)
    make_trial(tmp_path, "e", "layers", version="v1", shared=(2,), dice=0.4)
    text = tune.report(tmp_path)
    assert "version v3, modality both\n" in text and "v3_ct_only, modality ct\n" in text
    assert "90.00*\n" in text and "10.00*\n" in text and "50.00" not in text
    listed = text[text.index("In none of the paper's tables") :].splitlines()[2:]
    assert [line.split()[0] for line in listed] == ["v2", "v4", "v1"]  # their val Dice is equal


BAD = {
    "trial.json": (b"[]", b"{}", b"", b"garbage"),
    "summary.json": (
        b"[]",
        b"null",
        b"",
        b"{}",
        b'{"epochs": 4, "systems": {"model": {"dice": {"mean": 0.5}, "fpv_ml": {"mean": "x"}}}}',
    ),
    "metrics.csv": (
        b"",
        b"garbage",
        b"\xff\xfe",
        b"epoch,val_dice\n1,0.5\n",
        b"epoch,val_dice,seconds,val_seconds\n1,high,1,1\n",
    ),
    "stopped.json": (b"{}", b"[]", b""),
    "failed.txt": (b"", b"\n \n", b"\xff"),
}


def test_a_finished_trial_keeps_its_results_whatever_happens_to_its_metrics(tmp_path):
    run, _ = make_trial(tmp_path, "a", version="v1", phi="noise", dice=0.6)
    (run / "metrics.csv").write_bytes(b"garbage")
    row = tune.row_of(run)
    assert (row["status"], row["test_dice"], row["val_dice"]) == ("done", 0.6, 0.3)
    assert (row["epochs_done"], row["seconds"]) == (4, 50.0)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"searches": ["layers"], "config": {}}', b'{"searches": null}',
     b'{"searches": "layers", "config": {}}', b'{"searches": [1], "config": {}}',
     b'{"searches": [], "config": {}}', b'{"searches": ["layers"], "config": {"lr": "high"}}'],
)  # fmt: skip
def test_the_same_command_writes_a_damaged_trial_json_again(content, tmp_path):
    run, config = make_trial(tmp_path, "t", "layers", version="v1", phi="noise", dice=0.6)
    whole = (run / "trial.json").read_bytes()
    (run / "trial.json").write_bytes(content)
    assert "failed: t: damaged folder: trial.json" in tune.report(tmp_path)
    tune.announce(tune.Trial("t", replace(config, out=str(run), workers=9), "s"), "layers")
    assert tune.row_of(run)["test_dice"] == 0.6 and tune.row_of(run)["search"] == "layers"
    tune.announce(tune.Trial("t", replace(config, out=str(run)), "t"), "theta")
    assert tune.row_of(run)["studies"] == "t"  # other studies: only the searches are kept
    assert tune.row_of(run)["search"] == "layers theta"
    (run / "trial.json").write_bytes(whole)  # a whole one stays, with what its training had
    tune.announce(tune.Trial("t", replace(config, out=str(run), workers=9), "s"), "layers")
    assert (run / "trial.json").read_bytes() == whole


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_of_one_trial_ends_neither_search_nor_report(name, tmp_path):
    make_trial(tmp_path, "good", version="v1", phi="noise", dice=0.6)
    run, _ = make_trial(tmp_path, "bad", status="unfinished", version="v2")
    for content in BAD[name]:
        (run / name).write_bytes(content)
        assert tune.look(run, 4)["status"] == "failed" or name == "trial.json"
        text = tune.report(tmp_path)
        assert "60.00** (62.34)" in text and "failed: bad: " in text and "50.00" not in text


def test_report_needs_no_ray(tmp_path):
    make_trial(tmp_path, "a", version="v1", phi="noise", dice=0.6)
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')")
    done = call("--report", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0 and "60.00** (62.34)" in done.stdout
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "results.csv", alone)
    assert "60.00** (62.34)" in tune.report(alone)


# ------------------------------------------------------------------ the command


def command(*words):
    return [sys.executable, str(ROOT / "tune.py"), *map(str, words)]


def call(*words, cwd):
    env = os.environ | {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*words), cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give either --search, or --report"),
        (["--search", "lambdas", "--report", "x"], "give either --search, or --report"),
        (["--report", ""], "results.csv: No such file or directory"),
        (["--report", "x", "--samples", "3"], "--samples has no effect on --report"),
        (["--report", "x", "--lr", "1"], "--lr has no effect on --report"),
        (["--report", "nowhere"], "nowhere/results.csv: No such file or directory"),
        (["--search", "layers", "--samples", "3"], "--samples has no effect on --search layers"),
        (["--search", "free", "--samples", "0"], "--samples 0: at least 1"),
        (["--search", "lambdas", "--max-concurrent", "0"], "--max-concurrent 0: at least 1"),
        (["--search", "lambdas", "--patch", "20"], "--patch (20, 20, 20): every side must divide"),
        (["--search", "theta", "--lambda-cls", "1"], "--lambda-cls has no effect on v4"),
        (["--search", "lambdas", "--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_options_end_with_one_line_before_anything_is_made(
    words, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        tune.run_command(words)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "data").exists()


def test_a_second_search_in_one_folder_is_refused(tmp_path):
    code = (
        f"import train, pathlib, time\nwith train.only_writer(pathlib.Path({str(tmp_path)!r})):\n"
    )
    code += "    print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    other.stdout.readline()
    try:
        with pytest.raises(UserError, match="another process is writing"):
            tune.run_command(["--search", "lambdas", "--out", str(tmp_path)])
    finally:
        other.kill()
        other.communicate()


# ------------------------------------------------------------------ machines


def fake_ray(*resources):
    nodes = [{"Alive": True, "Resources": own} for own in resources]
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    return SimpleNamespace(nodes=lambda: [*nodes, dead])


@pytest.mark.parametrize(
    "nodes, words, expected",
    [
        ([{"CPU": 8.0}], [], (1, 0)),
        ([{"CPU": 8.0}], ["--cpus-per-trial", "4"], (4, 0)),
        ([{"CPU": 32.0, "GPU": 4.0}], [], (3, 1)),  # a trial and its two loading processes
        ([{"CPU": 8.0, "GPU": 4.0}], [], (2, 1)),
        ([{"CPU": 8.0, "GPU": 4.0}], ["--gpus-per-trial", "0.5"], (1, 0.5)),
        ([{"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}], ["--workers", "9"], (8, 1)),
        ([{"CPU": 8.0, "GPU": 4.0}], ["--device", "cpu"], (1, 0)),
        ([{"CPU": 8.0}], ["--gpus-per-trial", "1"], "--gpus-per-trial 1: Ray sees no GPU"),
        ([{"CPU": 8.0, "GPU": 4.0}], ["--gpus-per-trial", "2"], "a trial trains on one GPU"),
        ([{"CPU": 8.0}, {"CPU": 4.0}], ["--cpus-per-trial", "9"], "above 0 and at most 8"),
        ([{"CPU": 8.0}], ["--cpus-per-trial", "0"], "--cpus-per-trial 0"),
    ],
)
def test_what_a_trial_takes_of_the_machines(nodes, words, expected):
    args, given = tune.parse(["--search", "lambdas", *words])
    config = replace(train.Config(), **given)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            tune.share_out(fake_ray(*nodes), args, config)
    else:
        need = tune.share_out(fake_ray(*nodes), args, config)
        assert (need["cpu"], need["gpu"]) == expected


def test_a_node_that_lacks_a_folder_or_sees_another_one_is_found_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ticket").touch()
    paths = {"--out": str(tmp_path / "out"), "--data": str(tmp_path)}
    assert tune.probe(paths, "ticket") == []
    (line,) = tune.probe(paths | {"--cache": str(tmp_path / "gone")}, "ticket")
    assert line == f"--cache {tmp_path / 'gone'} is missing"
    (line,) = tune.probe(paths, "other")
    assert "is another folder than on the first node" in line


# ------------------------------------------------------------------ early stopping


class FakeTrial(SimpleNamespace):
    """What the scheduler asks of a trial of Ray's."""

    def __init__(self, run):
        super().__init__(trial_id=f"ray-{run}", config={"task": {"config": {"out": str(run)}}})


def test_a_restart_replays_ended_trials_into_the_scheduler_and_stopped_ones_say_so(tmp_path):
    trials = []
    for name, status, rows in (
        ("good", "done", [0.5, 0.6, 0.7]),
        ("fair", "stopped", [0.4]),
        ("bad", "stopped", [0.1]),
        ("hurt", "done", None),
        ("new", "waiting", None),
        ("late", "waiting", None),
    ):
        run, config = make_trial(tmp_path, name, "free", status, rows=rows, version="v2")
        trials.append(tune.Trial(name, replace(config, out=str(run))))
    (tmp_path / "hurt" / "metrics.csv").write_bytes(b"garbage")  # done nevertheless
    scheduler = tune.halving(trials)
    (bracket,) = scheduler._brackets
    assert sorted(bracket._rungs[-1][1].values()) == [0.1, 0.4, 0.5]
    assert list(bracket._rungs[0][1].values()) == [0.7]  # after three epochs
    decisions = {}
    for name, dice in (("new", 0.43), ("late", 0.44)):  # the cut is at 0.4333, then at 0.43
        trial = FakeTrial(tmp_path / name)
        scheduler.on_trial_add(None, trial)
        told = {"epoch": 1, "val_dice": dice, "ended": False}
        decisions[name] = scheduler.on_trial_result(None, trial, told)
    assert decisions == {"new": "STOP", "late": "CONTINUE"}
    assert state(tmp_path / "new", 4) == ("stopped", "by ASHA after epoch 1")
    assert not (tmp_path / "late" / "stopped.json").exists()
    # the last report of a trial that has its results is no reason to call it stopped
    told = {"epoch": 4, "val_dice": 0.0, "ended": True}
    scheduler.on_trial_result(None, trial, told)
    assert not (tmp_path / "late" / "stopped.json").exists()

    # nor does a trial that failed have a Dice to be judged by
    failed = {"epoch": 4, "ended": True}
    assert scheduler.on_trial_result(None, trial, failed) == "CONTINUE"


@pytest.mark.parametrize(
    "epochs, judged", [(1, [1]), (2, [1]), (10, [3]), (100, [33]), (400, [133])]
)
def test_no_judgement_comes_near_the_end(epochs, judged, tmp_path):
    _, config = make_trial(tmp_path, "t", "free", "waiting", version="v2")
    scheduler = tune.halving([tune.Trial("t", replace(config, epochs=epochs, out=str(tmp_path)))])
    assert [milestone for milestone, _ in scheduler._brackets[0]._rungs] == judged


def test_time_left_counts_the_epochs_of_this_launch(tmp_path, monkeypatch, capsys):
    trials = []
    for name in ("old", "new", "bad"):
        run, config = make_trial(tmp_path, name, status="waiting", version="v2")
        trials.append(tune.Trial(name, replace(config, epochs=100, out=str(run))))
    clock = [1000.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    table = tune.Table(trials, tune.Results(tmp_path))
    table.started("old")
    for epoch in range(1, 91):  # done before
        table.reported("old", {"epoch": epoch, "ended": False, "replayed": True})
    assert table.left() == ""
    clock[0] += 50
    table.reported("old", {"epoch": 95, "ended": False})
    assert table.left() == str(tune.timedelta(seconds=10 * (5 + 100 + 100)))
    (tmp_path / "bad" / "failed.txt").write_text("no memory\nmore")
    table.started("bad")
    table.reported("bad", {"epoch": 100, "ended": True})
    table.ended("bad")
    assert table.left() == str(tune.timedelta(seconds=10 * (5 + 100)))
    words = capsys.readouterr().out.split()
    assert words[:9] == ["0:00:50", "0/3", "0", "1", "1", "1", "0:17:30", "bad,", "failed:"]


def test_a_reason_is_one_line():
    assert tune.reason_of(ValueError("bad\nmore")) == "bad"
    assert tune.reason_of(KeyError()) == "KeyError"
    assert tune.reason_of(OSError("x\nTraceback (most recent call last):\n f\nE: y")) == "E: y"
    assert tune.reason_of(OSError("\x1b[36mray::probe()\x1b[39m (pid=1)\n f\nE: y")) == "E: y"


def test_a_full_disk_does_not_end_a_search(tmp_path, monkeypatch):
    run, config = make_trial(tmp_path, "t", status="waiting", version="v2")
    trial = tune.Trial("t", replace(config, out=str(run)))
    table = tune.Table([trial], tune.Results(tmp_path))
    monkeypatch.setattr(tune.Results, "write", lambda *args: os.listdir(tmp_path / "nowhere"))
    table.started("t")


def test_a_trial_whose_process_or_folder_is_gone_does_not_stop_the_others(tmp_path, capsys):
    trials = []
    for name in ("dead", "gone", "fine"):
        run, config = make_trial(tmp_path, name, status="waiting", version="v2")
        trials.append(tune.Trial(name, replace(config, out=str(run))))
    table = tune.Table(trials, tune.Results(tmp_path))
    tell = tune.callback(table)
    ray = [SimpleNamespace(config={"task": {"config": {"out": t.config.out}}}) for t in trials]
    shutil.rmtree(trials[1].run)
    for trial in ray[:2]:
        tell.on_trial_start(0, [], trial)
        tell.on_trial_error(0, [], trial)
    assert state(trials[0].run, 4)[1].startswith("its process died again and again")
    assert (table.count("failed"), table.count("waiting")) == (1, 2)
    assert "dead, failed: its process died" in capsys.readouterr().out
    frame = plots.read_trials(tmp_path / "results.csv").set_index("trial")
    assert frame["status"].to_dict() == {"dead": "failed", "fine": "waiting"}


# ------------------------------------------------------------------ whole searches, killed


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("tune")
    write_phantom(root / "data", patients=6)
    return root


def start(cohort, *words):
    """A search as a process group of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        command(*words, "--data", cohort / "data", *TINY), cwd=cohort, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(found, seconds=120):
    until = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return result


def holders(run):
    """Processes that have the run's lock open."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == str(run / ".lock"):
                found.append(int(fd.parts[2]))
        except OSError:
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds processes in /proc")
@pytest.mark.slow
def test_a_search_whose_worker_and_driver_are_killed_ends_as_if_never_killed(cohort):
    """Two trials, one at a time: kill -9 of the first one's process, which Ray starts again; kill
    -9 of the driver with one trial done and one running; started again at once, while that one's
    process may still live."""
    out = cohort / "grid"
    words = ["--search", "lambdas", "--version", "v1", "--phi", "none", "--lambda-rec", "0.1",
             "--seed", "0", "1", "--out", out, "--max-concurrent", "1"]  # fmt: skip
    driver = start(cohort, *words)
    wait_for(lambda: len(list(out.glob("*/trial.json"))) == 2)
    first, second = sorted(path.parent for path in out.glob("*-seed*/trial.json"))
    os.kill(wait_for(lambda: holders(first))[0], signal.SIGKILL)
    both = {first, second}
    (done,) = wait_for(lambda: {run for run in both if state(run, 2)[0] == "done"})
    (other,) = both - {done}
    wait_for(lambda: (other / "config.json").exists())
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert state(other, 2)[0] == "unfinished"
    before = {p.name: p.read_bytes() for p in done.iterdir() if p.is_file()}
    before.pop("last.pt", None)  # the restart removes it if the kill came before that

    again = start(cohort, *words)
    text, _ = again.communicate(timeout=240)
    assert again.returncode == 0, text
    assert "2 trials, 1 finished before" in text
    assert re.search(r"2/2 +0 +0 +0 +0 ", text.splitlines()[-3])
    assert {p.name: p.read_bytes() for p in done.iterdir() if p.is_file()} == before
    frame = plots.read_trials(out / "results.csv").set_index("trial")
    assert frame["status"].tolist() == ["done"] * 2
    alone = cohort / "alone"
    saved = train.saved_config(other)
    result = train.train(replace(saved, out=str(alone)))
    ours, plain = (torch.load(run / "best.pt", weights_only=True) for run in (other, alone))
    assert all(torch.equal(ours["model"][k], v) for k, v in plain["model"].items())
    row = frame.loc[other.name]
    assert row.test_dice == pytest.approx(result["test"]["dice"], abs=1e-12)
    assert row.val_dice == pytest.approx(result["val_dice"], abs=1e-12)
    # its last.pt is gone, and still the run is a finished one that nothing overwrites
    assert not (other / "last.pt").exists()
    assert train.train(replace(saved, resume=True))["test"]["dice"] == result["test"]["dice"]
    with pytest.raises(UserError, match="no last.pt to go on from"):
        train.train(replace(saved, resume=True, epochs=3))
    with pytest.raises(UserError, match="holds a run already"):
        train.train(saved)


def test_a_trial_that_cannot_train_says_why_and_ends_quietly(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("ray.tune.report", told.append)
    run, config = make_trial(tmp_path, "t", status="waiting", version="v1", phi="none")
    write_phantom(tmp_path / "data", patients=6)
    (run / "last.pt").write_bytes(b"damaged")
    own = replace(config, out=str(run), data=str(tmp_path / "data"), cache=str(tmp_path / "cache"),
                  spacing=(16.0,) * 3, patch=(16,) * 3, workers=0)  # fmt: skip
    task = {"cwd": os.getcwd(), "config": train.plain(own) | {"resume": True}}
    tune.run_trial({"task": task})
    assert told == [{"epoch": 4, "ended": True}]
    status, reason = state(run, 4)
    assert status == "failed" and reason.startswith(f"{run / 'last.pt'}: not a readable checkpoint")
    assert "Traceback" in (run / "failed.txt").read_text()
    told.clear()
    took = {"seconds": 1.0, "val_seconds": 0.0}
    plots.write_metrics(run, [{"epoch": 1, **took}, {"epoch": 2, "val_dice": 0.5, **took}])
    tune.run_trial({"task": task})  # the epochs before are told again, for ASHA
    assert told[0] == {"epoch": 1, "ended": False, "replayed": True}
    assert told[1] == {"epoch": 2, "ended": False, "val_dice": 0.5, "replayed": True}
    tune.run_trial({"task": task | {"cwd": str(tmp_path / "gone")}})
    assert state(run, 4) == ("failed", f"[Errno 2] No such file or directory: '{tmp_path}/gone'")


@pytest.mark.slow
def test_a_free_search_goes_on_from_its_ended_trials_and_stops_the_worse_one(cohort):
    """The first of two samples is there already, better than any; the second must be stopped."""
    out = cohort / "free"
    words = ["--search", "free", "--samples", "2", "--version", "v1", "--shared", "5", "--phi",
             "none", "--seed", "1", "--out", out]  # fmt: skip
    args, given = tune.parse([*map(str, words), "--data", str(cohort / "data"), *TINY])
    given["cache"] = str(cohort / "cache")
    good, bad = tune.plan(args, given)
    assert good.name.startswith("free-v1-L5-rec")  # no grid takes a stopped trial for its own
    assert re.fullmatch("[0-9a-f]{8}", good.studies)
    good.run.mkdir(parents=True)
    write_json(good.run / "trial.json", {"searches": ["free"], "config": train.plain(good.config)})
    write_json(good.run / "summary.json", {"epochs": 2, "systems": {"model": {}}})
    plots.write_metrics(good.run, [{"epoch": 1, "val_dice": 0.9, "seconds": 1.0}])
    done = start(cohort, *words)
    text, _ = done.communicate(timeout=240)
    assert done.returncode == 0, text
    assert "2 trials, 1 finished before" in text
    frame = plots.read_trials(out / "results.csv").set_index("trial")
    assert frame.status[good.name] == "done" and frame.status[bad.name] == "stopped"
    assert frame.epochs_done[bad.name] == 1 and "stopped by ASHA after epoch 1" in text
    assert (bad.run / "best.pt").exists() and not (bad.run / "last.pt").exists()
    before = {p.name: p.read_bytes() for p in bad.run.iterdir() if p.is_file()}
    assert tune.search(args, given) == 0  # nothing to do, so Ray is not started
    assert {p.name: p.read_bytes() for p in bad.run.iterdir() if p.is_file()} == before
    assert not (good.run / "best.pt").exists()
