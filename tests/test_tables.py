"""tables.py: how results are averaged, which runs share a table, reports, the paper's tables."""

import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import tables
from certainty import interval
from config import Config, plain, resolve
from files import UserError, write_json


def test_columns_are_aligned_and_markdown_has_pipes():
    rows = [["", "Dice", "n"], ["v1", "0.5", "12"], ["longer", "-", "3"]]
    lines = ["        Dice   n", "v1       0.5  12", "longer     -   3"]
    assert tables.aligned(rows).splitlines() == lines
    assert tables.aligned(rows, markdown=True).splitlines() == [
        "|        | Dice |  n |", "| ------ | ---: | -: |",
        "| v1     |  0.5 | 12 |", "| longer |    - |  3 |",
    ]  # fmt: skip


# ------------------------------------------------------------------ the metrics of a run


def study_row(ill, dice, fpv, fnv, pred, true, tumor=0.0):
    own = {"dice": dice, "fpv_ml": fpv, "fnv_ml": fnv, "mtv_pred_ml": pred}
    hot = {f"suv4_{name}": 2 * value for name, value in own.items()}
    return {"has_lesion": ill} | own | hot | {"mtv_true_ml": true, "tumor_score": tumor}


ROWS = [
    study_row(True, 0.2, 1.0, 4.0, 10.0, 8.0, 0.9),
    study_row(True, 0.6, 3.0, 0.0, 20.0, 16.0, 0.4),
    study_row(True, 0.0, 0.0, 5.0, 0.0, 6.0, 0.6),
    study_row(False, 0.0, 8.0, 0.0, 8.0, 0.0, 0.5),  # a false alarm: its Dice of 0 is left out
    study_row(False, math.nan, 0.0, 0.0, 0.0, 0.0, 0.2),
]


def test_means_say_how_many_studies_they_hold():
    summary = tables.summarize(ROWS)
    means = {name: (v["mean"], v["n"]) for name, v in summary["model"].items()}
    assert means == means | {
        "dice": (pytest.approx(0.8 / 3), 3), "fpv_ml": (pytest.approx(12 / 5), 5),
        "fpv_healthy_ml": (4.0, 2), "fnv_ml": (3.0, 3), "mtv_pred_ml": (10.0, 3),
        "mtv_true_ml": (10.0, 3), "tumor_accuracy": (pytest.approx(0.8), 5),
        "tumor_auc": (pytest.approx(5 / 6), 5),
    }  # fmt: skip
    assert summary["model"]["mtv_pred_ml"]["std"] == pytest.approx(10)
    threshold = summary["SUV ≥ 4 threshold"]
    assert threshold["fpv_healthy_ml"]["mean"] == 8 and threshold["mtv_true_ml"]["mean"] == 10
    assert [*summary] == ["model", "SUV ≥ 4 threshold"] and "tumor_auc" not in threshold
    lines = tables.results_table(tables.rows_of("mine", summary)).splitlines()
    assert lines[0].split() == ["mine", "SUV", "≥", "4", "threshold"]
    cells = [re.split("  +", line) for line in lines[1:]]
    assert cells[0] == ["Dice", "0.267 [0.000, 0.600] (3)", "0.533 [0.000, 1.200] (3)"]
    assert cells[1][0] == "FPV ml" and cells[1][1].startswith("2.400 [")
    assert cells[6] == ["T accuracy", "0.800 (5)", "-"]
    assert "studies with a lesion" in lines[9] and len(lines) == 10
    ill, healthy = (tables.summarize(rows)["model"] for rows in (ROWS[:1], ROWS[3:]))
    assert ill["fpv_healthy_ml"] == {"mean": None, "std": None, "n": 0}
    assert ill["dice"] == {"mean": 0.2, "std": None, "n": 1}
    assert healthy["dice"]["n"] == 0 and healthy["fpv_ml"]["n"] == 2
    json.dumps([ill, healthy], allow_nan=False)


def test_tracers_that_names_tell_have_means_of_their_own():
    names = ["fdg_0", "FDG_1", "psma_2", "psma_3", "fdg_4"]
    rows = [row | {"study": name} for row, name in zip(ROWS, names, strict=True)]
    summary = tables.summarize(rows)
    assert [*summary][:3] == ["model", "model, fdg", "model, psma"]
    assert summary["model"] == tables.summarize(ROWS)["model"]
    assert summary["model, fdg"]["dice"]["mean"] == pytest.approx(0.4)
    assert (summary["model, psma"]["dice"]["mean"], summary["model, psma"]["fpv_ml"]["n"]) == (0, 2)
    assert [*tables.rows_of("a\\1", summary)][:2] == ["a\\1", "a\\1, fdg"]
    assert "model, fdg" not in tables.summarize([row | {"study": "fdg_0"} for row in rows])


def test_mri_leaves_out_classes_that_nobody_has():
    rows = [{"dice_whole": 0.5, "dice_edema": 0.25, "dice_core": math.nan},
            {"dice_whole": 1.0, "dice_edema": 0.75, "dice_core": 0.0}]  # fmt: skip
    model = tables.summarize([row | {"has_lesion": True} for row in rows])["model"]
    assert [(v["mean"], v["n"]) for v in model.values()] == [(0.75, 2), (0.5, 2), (0.0, 1)]
    lines = tables.results_table({"mine": model}).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["whole", "edema", "core"]
    assert "core ∪ edema" in lines[4]


@pytest.mark.parametrize(
    "scores, ill, accuracy, auc",
    [
        ([0.1, 0.2, 0.9], [1, 1, 0], 0, 0),
        ([0.6, 0.6, 0.6], [1, 0, 0], 1 / 3, 0.5),  # ties count half
        ([0.9, 0.2], [1, 1], 0.5, None),
        ([0.9, 0.2], [0, 0], 0.5, None),
    ],
)
def test_accuracy_and_auc_by_hand(scores, ill, accuracy, auc):
    rows = [{"has_lesion": bool(i), "tumor_score": s} for s, i in zip(scores, ill, strict=True)]
    found = tables.summarize(rows)["model"]
    assert found["tumor_accuracy"] == {"mean": pytest.approx(accuracy), "n": len(scores)}
    assert found["tumor_auc"]["mean"] == (auc if auc is None else pytest.approx(auc))


# ------------------------------------------------------------------ which runs may share a table


def config_of(kind="petct", version="v1", **options):
    """A resolved config; the phantom's, or of brain tumours."""
    data = {"data": "tumours"} if kind == "mri" else {}
    config = replace(Config(version=version), **data | options)
    return resolve(config, kind, phantom=config.data is None)


def grouped(configs, *compared, studies="s"):
    """The groups as {words: the numbers of their runs}."""
    runs = pd.DataFrame({"config": configs, "studies": studies})
    return {about: list(part.index) for about, part in tables.comparable(runs, compared)}


METHOD = ("version", "phi", "theta", "shared")


def test_only_comparable_runs_share_a_table():
    configs = [
        config_of(seed=0, workers=1, phi="noise"),
        config_of(seed=1, workers=2, phi="none", shared=(3,), out="there", splits="x.json"),
        config_of(phi="noise", noise_sigma=0.1),
        config_of(lr=0.1),
        None,  # damaged
        config_of(version="v4", lr=0.1, theta="learn"),
        config_of(version="v3", steps=2, lr=0.1),
    ]
    assert [*grouped(configs, *METHOD).items()] == [  # what is usual comes first
        ("noise_sigma 0.3, steps default, lr 0.001", [0, 1]),
        ("noise_sigma 0.1, steps default, lr 0.001", [2]),
        ("noise_sigma 0.3, steps default, lr 0.1", [3, 5]),
        ("noise_sigma 0.3, steps 2, lr 0.1", [6]),
    ]
    assert grouped(configs[:2], *METHOD) == {"": [0, 1]}
    assert grouped(configs[3:5]) == {"": [0]} and grouped([None]) == {}


def test_what_parts_two_runs_is_told():
    for changed, said in (
        ({"shared": ()}, ["shared 5", "shared none"]),
        ({"epochs": 8}, ["epochs 10", "epochs 8"]),
        ({"version": "v3_ct_only"}, ["version v3", "version v3_ct_only"]),
    ):
        pair = [config_of(version="v3"), config_of(**{"version": "v3"} | changed)]
        assert grouped(pair) == {said[0]: [0], said[1]: [1]}
        assert len(grouped(pair, *changed)) == 1
    recipes = [config_of(version="sfnet"), config_of(version="sfnet", recipe="own")]
    assert grouped(recipes) == {"recipe matched": [0], "recipe own": [1]}
    assert grouped([config_of()] * 2, studies=["s", "t"]) == {"studies s": [0], "studies t": [1]}
    # an option that only some read parts those: no group overlaps another
    some = [config_of(shuffle_count=30), config_of(), config_of(phi="none")]
    assert grouped(some, *METHOD) == {"shuffle_count 1": [1, 2], "shuffle_count 30": [0]}
    assert len(grouped([config_of(), config_of(data="real")])) == 2  # the phantom is another kind
    # the defaults of a version part no runs
    versions = [config_of("mri", v) for v in ("v1", "v2", "v2-rec")]  # λ_seg 1/3, 1/3, 1/2
    assert grouped(versions, *METHOD) == {"": [0, 1, 2]}
    weighed = config_of("mri", "v1", lambda_seg=0.1)
    assert [*grouped([*versions, weighed], *METHOD).values()] == [[0, 1, 2], [3]]


# ------------------------------------------------------------------ the report of a search


def make_trial(
    root, name, search="table2", dice=0.5, val=0.3, studies="s", kind="petct", **options
):
    """A trial's folder as a search leaves it; one that failed if its Dice is text."""
    config = config_of(kind, **{"epochs": 4} | options)
    run = root / name
    run.mkdir(parents=True)
    record = {"searches": search.split(), "config": plain(config), "studies": studies}
    write_json(run / "trial.json", record)
    if isinstance(dice, str):
        (run / "failed.txt").write_text(f"{dice}\n\nTraceback\n")
        return
    model = {"dice" if kind == "petct" else "dice_whole": {"mean": dice, "n": 3}}
    told = {"epochs": 4, "val_dice": val, "seconds": 50.0, "gpu_memory_mb": None}
    write_json(run / "summary.json", told | {"systems": {"model": model}})


def figures_of(text):
    """Our figures in Table 2, without the missing ones."""
    return re.findall(r"(\d+\.\d\d)\** \(", text)


def test_table_2_of_the_paper_has_the_papers_marks():
    rows = [
        {"version": version, "phi": "none" if version == "v4" else method, "shared": shared,
         "theta": method if version == "v4" else None, "dice": dice + shift}
        for (version, method), dices in tables.PAPER_TABLE2.items()
        for shared, dice in zip(tables.SETS, dices, strict=True)
        for shift in (-1, 1)  # two seeds, whose mean is the paper's figure
    ]  # fmt: skip
    text = tables.table_2_text(pd.DataFrame(rows), "lr 0.1")
    assert "mean of 2 runs (seeds, folds); lr 0.1\n" in text
    pairs = re.findall(r"([\d.]+)(\**) \(([\d.]+)(\**)\)", text)
    assert len(pairs) == 105 and all(a == c and b == d for a, b, c, d in pairs)
    shuffled = next(line for line in text.splitlines() if line.startswith("v3  L2 + shuffling"))
    assert shuffled.split()[4] == "63.33*" and "65.91** (65.91**)" in shuffled
    assert [a for a, b, _, _ in pairs if b == "**"] == ["64.57", "65.50", "65.91", "64.24"]
    assert sum(b != "" for _, b, _, _ in pairs) == 28  # a best one in each of 4 x 7 boxes


def test_table_2_averages_the_folds_of_a_cohort(tmp_path):
    for fold, dice in ((0, 0.4), (1, 0.6)):
        make_trial(tmp_path, f"f{fold}", fold=fold, dice=dice)
    make_trial(tmp_path, "far", dice=0.1, studies="another cohort")
    parts = tables.report(tmp_path).split("Table 2")[1:]
    assert [figures_of(part) for part in parts] == [["50.00"], ["10.00"]]
    assert "mean of 2 runs (seeds, folds)" in parts[0]


def test_other_sets_follow_those_of_the_paper_and_seeds_and_gaps_are_told():
    shared = ["none", "1 8", "4 5 6", "7", "3", "2"]
    rows = [{"version": "v1", "phi": "none", "theta": None, "shared": s, "dice": 1} for s in shared]
    rows += [rows[0] | {"dice": 3}, rows[1] | {"phi": "noise"}]
    table, said = tables.table_2(pd.DataFrame(rows))
    assert list(table) == ["3", "7", "4 5 6", "none", "2", "1 8"]
    assert table.loc[("v1", "none"), "none"] == 2
    assert said == "mean of 1 to 2 runs (seeds, folds); 5 of 12 cells missing"
    with pytest.raises(UserError, match="no test Dice yet"):
        tables.table_2(pd.DataFrame(rows).assign(dice=np.nan))


def test_the_report_keeps_settings_apart_and_names_what_is_missing(tmp_path):
    make_trial(tmp_path, "a", phi="noise", dice=0.6, workers=1)
    make_trial(tmp_path, "a1", phi="noise", dice=0.5, seed=1, workers=2, skip_bad=True)
    make_trial(tmp_path, "b", phi="noise", dice=0.2, lr=0.1)
    make_trial(tmp_path, "c", version="v4", dice=0.4)
    make_trial(tmp_path, "d", version="v4", theta=0.5, dice="the loss is nan")
    make_trial(tmp_path, "e", version="v2", phi="noise", dice=0.1, studies="t")
    make_trial(tmp_path, "f")
    (tmp_path / "f" / "trial.json").write_text("[]")
    text = tables.report(tmp_path)
    assert text.startswith(f"{tmp_path}: 7 trials, 5 done, 2 failed\n\nTable 2")
    first, second, third = text.split("Table 2")[1:]
    assert (
        "; mean of 1 to 2 runs (seeds, folds); 1 of 3 cells missing; lr 0.001, studies s\n" in first
    )  # of d
    assert figures_of(first) == ["55.00", "40.00"] and "55.00** (62.34)" in first
    assert "; 1 run; lr 0.001, studies t\n" in second and figures_of(second) == ["10.00"]
    assert "; 1 run; lr 0.1, studies s\n" in third and figures_of(third) == ["20.00"]
    assert "failed: d: the loss is nan" in text and "failed: f: damaged folder" in text
    assert "In none of" not in text and (tmp_path / "results.csv").exists()


def test_the_report_of_lambdas_of_free_and_of_what_is_outside_the_papers_tables(tmp_path):
    for search, rec, cls, dice in (
        ("lambdas layers", 1e-1, 1e-2, 0.31),  # stands in the tables of both
        ("lambdas", 1e-5, 1e-2, 0.42),
        ("mine", 1e-1, 1e-1, 0.25),
    ):
        own = dict(search=search, lambda_rec=rec, lambda_cls=cls, dice=dice)
        make_trial(tmp_path, search, version="v3", **own)
    make_trial(tmp_path, "b", "lambdas", version="v3_ct_only", dice=0.1, lambda_rec=0.5)
    make_trial(tmp_path, "c", "lambdas", version="v2", lambda_rec=0.1, dice=0.2, val=0.4)
    make_trial(tmp_path, "d", "theta", version="v4", theta=0.25, dice=0.3)
    make_trial(tmp_path, "e", "layers", shared=(2,), dice=0.4, val=0.2)
    make_trial(tmp_path, "f", "layers", kind="mri", dice=0.7, val=0.1)
    make_trial(tmp_path, "g", phi="noise", dice=None, val=0.9)  # no lesion in its test part
    make_trial(tmp_path, "f0", "free", version="v2", shared=(1, 8), val=0.9)
    make_trial(tmp_path, "f1", "free", version="v4", theta="learn")
    for i in range(10):
        make_trial(tmp_path, f"g{i}", "free", lambda_rec=0.25, val=0.1)
    head, free, other = re.split("Best validation.*\n|In none of.*\n", tables.report(tmp_path))
    assert head.count("Table 2") == 2 and figures_of(head) == ["31.00", "25.00"]
    rows = [line.split() for line in head.splitlines()]
    at = rows.index(["0.1", "0.01"])  # both fall
    assert rows[at + 1 : at + 3] == [["0.1", "25.00", "31.00"], ["1e-05", "–", "42.00*"]]
    assert "1 run; 1 of 4 cells missing; version v3\n" in head
    assert "1 run; version v3_ct_only\n" in head and "10.00*\n" in head
    heading, *listed = [line.split() for line in free.strip().splitlines()]
    assert heading[:3] == ["version", "shared", "phi"] and "noise_sigma" not in heading
    assert [words[:2] for words in listed[:3]] == [["v2", "1"], ["v4", "5"], ["v1", "5"]]
    assert len(listed) == 10  # the best ones first
    _, *listed = [line.split() for line in other.splitlines()]
    assert [words[0] for words in listed] == ["v1", "v2", "v4", "v1", "v1"]
    assert listed[-1][-1] == "70"


# ------------------------------------------------------------------ the claims of Sec. 4


def test_arms_are_told_apart_by_their_options():
    for title, options in tables.EVERY_ARM.items():
        config = config_of(**options | {"seed": 5, "fold": 2, "epochs": 3, "lr": 0.1})
        assert tables.arm_of(config) == title
    assert tables.arm_of(config_of(version="v3", shared=(4,))) is None
    for plus, minus, metric, _ in tables.CLAIMS:
        searches = [arms for arms in tables.COMPARISONS.values() if {plus, minus} <= {*arms}]
        assert searches and metric in tables.metrics_of(())


@pytest.mark.parametrize(
    "low, high, seeds, paper, said",
    [
        (0.1, 2, [1, 1, 1], 0.4, "supported"), (0.1, 2, [1, 1, 1], -0.4, "contradicted"),
        (-2, -0.1, [-1, -1, -1, -1], 3.0, "contradicted"), (-2, -0.1, [-1] * 3, -1, "supported"),
        (-0.1, 2, [1, 1, 1], 0.4, "not decided"), (0.1, 2, [1, 1], 0.4, "not decided"),
        (0.1, 2, [3, 3, -1], 0.4, "not decided"), (0.1, 2, [1] * 3, math.nan, "higher"),
        (-2, -0.1, [-1] * 3, math.nan, "lower"),
    ],
)  # fmt: skip
def test_the_verdict_needs_the_interval_and_three_seeds(low, high, seeds, paper, said):
    assert tables.verdict(low, high, seeds, paper) == said


def make_claim(root, arm, dices, seed, fold, healthy=0.0, name="", studies="s", **more):
    """A finished trial of an arm: the Dice of the ill studies of a fold, and a healthy study."""
    name = name or f"{arm}-{seed}-{fold}"
    options = tables.ARMS[arm] | {"seed": seed, "fold": fold} | more
    make_trial(root, name, "claims", dice=0.5, studies=studies, **options)
    rows = [{"study": f"p{fold}{i}/{v}", "patient": f"p{fold}{i}", "has_lesion": True, "dice": dice,
             "fpv_ml": 0.0} for i, dice in enumerate(dices) for v in "ab"]  # fmt: skip
    rows.append(rows[0] | {"study": f"h{fold}", "has_lesion": False, "fpv_ml": healthy})
    pd.DataFrame(rows).to_csv(root / name / "test_studies.csv", index=False)


def test_claims_are_differences_over_patients_and_seeds(tmp_path):
    """v3 is ahead of v2 by 0.1, 0.2 or 0.3 in all studies of a seed; of v1 in one seed of three."""
    base = np.array([0.2, 0.3, 0.4, 0.5])
    for seed in range(3):
        for fold in range(2):
            make_claim(tmp_path, "v2", base, seed, fold, healthy=5.0)
            make_claim(tmp_path, "v3", base + 0.1 * (1 + seed), seed, fold, healthy=2.0)
            make_claim(tmp_path, "v1", base + (0.3 if seed else 0) + 0.1, seed, fold)
    make_claim(tmp_path, "PET", base, 0, 0)
    found = tables.claims(tables.read_trials(tmp_path)).set_index("claim")
    row = found.loc["v3 - v2, Dice"]
    assert row["here"] == pytest.approx(20) and row["seeds"] == "3 of 3" and row["patients"] == 8
    assert 9.99 < row["low"] < row["high"] < 30.01 and row["verdict"] == "supported"
    assert found.loc["v3 - v2, healthy FPV ml", "here"] == pytest.approx(-3)
    assert found.loc["v3 - v2, healthy FPV ml", "verdict"] == "lower"
    row = found.loc["v2 - v1, Dice"]
    assert row["here"] == pytest.approx(-30) and row["verdict"] == "contradicted"
    row = found.loc["v3 - PET, Dice"]  # one seed, one fold
    assert (row["seeds"], row["patients"], row["verdict"]) == ("1 of 1", 4, "not decided")
    assert found.loc["v3 - v4, Dice", "verdict"] == "not run"
    text = tables.report(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("v3 - v2, Dice"))
    assert re.split("  +", line)[1:2] == ["+0.41"] and line.endswith(
        "3 of 3         8     supported"
    )
    assert "In none of the paper's tables" not in text


def test_the_level_of_a_claim_is_divided_by_their_number(tmp_path):
    rng = np.random.default_rng(0)
    ours, theirs = rng.uniform(0, 1, (2, 3, 12))
    for seed in range(3):
        make_claim(tmp_path, "v3", ours[seed], seed, 0)
        make_claim(tmp_path, "v2", theirs[seed], seed, 0)
    row = tables.claims(tables.read_trials(tmp_path)).set_index("claim").loc["v3 - v2, Dice"]
    gain = pd.DataFrame(100 * np.repeat(ours - theirs, 2, axis=1).T)  # two studies of a patient
    level = 1 - 0.05 / 16  # of --search claims
    patients = pd.Series(np.repeat([f"p0{i}" for i in range(12)], 2))
    wanted = interval(gain, patients, level)
    assert (row["low"], row["high"]) == pytest.approx(wanted)


def test_claims_keep_settings_apart_and_say_what_cannot_be_told(tmp_path):
    """Trials of another budget have claims of their own; of another class label, nobody knows."""
    base = np.array([0.2, 0.3, 0.4, 0.5])
    for seed in range(3):
        make_claim(tmp_path, "v2", base, seed, 0)
        make_claim(tmp_path, "v3", base + 0.1, seed, 0)
        make_claim(tmp_path, "v2", base, seed, 0, name=f"long v2 {seed}", steps=9)
        make_claim(tmp_path, "v3", base - 0.1, seed, 0, name=f"long v3 {seed}", steps=9)
        make_claim(tmp_path, "v1", base, seed, 0, rec="mse")
    groups = tables.claim_groups(tables.read_trials(tmp_path))
    assert [about for about, _ in groups] == ["steps default", "steps 9"]
    rows = [tables.claims(part).set_index("claim").loc["v3 - v2, Dice"] for _, part in groups]
    assert [row["here"] for row in rows] == pytest.approx([10, -10])
    assert [row["verdict"] for row in rows] == ["supported", "contradicted"]
    found = tables.claims(groups[0][1]).set_index("claim")
    assert found.loc["v2 - v1, Dice", "here"] == pytest.approx(0)  # rec holds for all arms
    make_claim(tmp_path, "v3", base - 0.3, 0, 1, name="of another cohort", studies="t")
    cohorts = [about for about, _ in tables.claim_groups(tables.read_trials(tmp_path))]
    assert len(cohorts) == 3 and sum("studies t" in about for about in cohorts) == 1
    shutil.rmtree(tmp_path / "of another cohort")
    make_claim(tmp_path, "v3", base, 1, 0, name="volume", class_label="volume")
    make_trial(tmp_path, "broken", "claims", **tables.ARMS["v1"] | {"seed": 7})
    text = tables.report(tmp_path)
    assert "left out: v3: two trials of seed 1 were tested on one study" in text
    assert f"left out: {tmp_path / 'broken' / 'test_studies.csv'}: No such file" in text
    assert text.count("supported") == 0 and text.count("contradicted") == 1


# ------------------------------------------------------------------ Tables 3-5


def make_run(root, name, shift=0.0, late="", age=0, kind="petct", studies="abcdef", **options):
    """What train.py leaves of a run that is `age` seconds old; the first four studies are ill."""
    run, (_, metrics, *_) = root / name, tables.PAPER_TABLES[3 if kind == "petct" else 5]
    run.mkdir(parents=True)
    more = {"late_fusion": late} if late else {}
    write_json(run / "config.json", {"config": plain(config_of(kind, **options))} | more)
    write_json(run / "splits.json", {"train": [], "val": [], "test": list("abcdef")})
    rows = [
        {"study": study, "has_lesion": i < 4} | dict.fromkeys(metrics, i / 10 + shift * (1 + i))
        for i, study in enumerate(studies)
    ]
    pd.DataFrame(rows).to_csv(run / "test_studies.csv", index=False)
    os.utime(run / "test_studies.csv", (1e9 - age, 1e9 - age))
    return tables.summarize(rows)["model"]


def test_the_papers_table_beside_ours(tmp_path):
    means = make_run(tmp_path, "a", 0.01, version="ct")
    make_run(tmp_path, "late/b", late="union", version="ct")
    make_run(tmp_path, "c", 0.1, version="v3")
    make_run(tmp_path / "a", "evaluation", 0.9, version="ct")
    (tmp_path / "a" / "evaluation" / "config.json").unlink()
    text = tables.write_paper_table(3, tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "table3.md").read_text() == text + "\n"
    titles = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert titles[0] == "Method" and titles[2:6] == ["CT", "PET", "EF", "MF"] and len(titles) == 13
    assert "not run: pet, early_fusion, middle_fusion, late_fusion_logits, " in text
    assert text.count("not run") == 3 * 8 + 1 and "different studies" not in text
    assert text.count("neither its rule") == 1
    table = pd.read_csv(tmp_path / "out" / "table3.csv").set_index("system")
    assert table.loc["pet", "dice_paper"] == 60.99 and np.isnan(table.loc["pet", "dice"])
    own = table.loc["ct"]
    for metric, scale in (("dice", 100), ("fpv_ml", 1), ("fnv_ml", 1)):  # one rule who counts
        assert own[metric] == pytest.approx(scale * means[metric]["mean"])
        assert own[f"{metric}_n"] == means[metric]["n"] == (6 if metric == "fpv_ml" else 4)
        assert own[f"{metric}_low"] < own[metric] < own[f"{metric}_high"]
    # Study i: i/10 + (1 + i)/100 against i/10 + (1 + i)/10, four ill ones. All differences have one
    # sign: p of the exact test is 2 / 2^4, and twice that by Holm, since two rows were tested.
    assert own["dice_gain"] == pytest.approx(-100 * 0.09 * 2.5) and own["dice_gain_n"] == 4
    assert own["dice_p"] == pytest.approx(2 * 2 / 16)
    assert own["dice_gain_low"] < own["dice_gain"] < own["dice_gain_high"] < 0
    assert table["dice_gain"].notna().sum() == 2 and table.loc["late_fusion_union", "dice"] == 15
    assert tables.write_paper_table(3, tmp_path, tmp_path / "out") == text  # no other draws


FABRICATED = dict(shared=(3,), bottleneck="joint", phi="none", lambda_cls=0.0)


def test_a_row_holds_the_runs_of_its_system_with_its_defaults(tmp_path):
    make_run(tmp_path, "v3", version="v3")
    make_run(tmp_path, "fabricated", 0.5, version="v3", **FABRICATED)
    make_run(tmp_path, "ct alone", 0.5, version="v3", modality="ct")
    make_run(tmp_path, "fast", 0.5, version="nnunet", lr=0.1)
    make_run(tmp_path, "own", version="nnunet", recipe="own", studies="abcde")
    make_run(tmp_path, "mri", version="v2", kind="mri")
    make_run(tmp_path, "of another table", version="v1", lr=0.2)
    make_run(tmp_path, "search/trial", version="v4")
    write_json(tmp_path / "search" / "trial" / "trial.json", {})
    make_run(tmp_path, "of a system that is gone", version="nnunet")
    foreign = tmp_path / "of a system that is gone" / "config.json"
    foreign.write_text(foreign.read_text().replace("nnunet", "blackbean_released"))
    ([(about, table, text)], others), root = tables.paper_table(4, tmp_path), tmp_path
    filled = table[table["runs"] != ""].set_index("system")
    assert about == "" and [*filled.index] == ["v3", "nnunet own"]
    assert filled.loc["v3", "dice"] == 15 and "nnUNet, own recipe" in text
    assert "tested on different studies" in text
    assert others == [
        f"{root / 'ct alone'}: modality ct",
        f"{root / 'fabricated'}: bottleneck joint, lambda_cls 0, phi none, shared 3",
        f"{root / 'fast'}: lr 0.1",
    ]
    assert all(other in tables.write_paper_table(4, root, root) for other in others)
    ([(_, table, _)], others) = tables.paper_table(4, tmp_path, FABRICATED)
    filled = table[table["runs"] != ""].set_index("system")
    assert filled.loc["v3", "dice"] == pytest.approx(15 + 50 * 2.5)
    assert f"{root / 'v3'}: bottleneck own, lambda_cls 0.001, phi shuffle, shared 5" in others
    [(about, table, _)], _ = tables.paper_table(4, tmp_path / "search")  # its own folder
    assert about == "" and table.set_index("system").loc["v4", "dice"] == 15


def test_seeds_are_averaged_and_folds_pooled(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.1)):
        make_run(tmp_path, f"a{seed}", shift, version="v3", seed=seed)
        make_run(tmp_path, f"b{seed}", shift, version="v3", seed=seed, fold=1, studies="ghijkl")
    make_run(tmp_path, "quick", 0.5, version="v3", steps=3)
    make_run(tmp_path, "quick, a copy", 0.5, version="v3", steps=3)
    found, others = tables.paper_table(4, tmp_path)
    assert [about for about, *_ in found] == ["steps default", "steps 3"] and others == []
    row = found[0][1].set_index("system").loc["v3"]
    assert row["runs"] == "2 seeds × 2 folds, 12 studies, 12 patients" and row["dice_n"] == 8
    told = {"epochs": 10, "systems": {"model": {}}}
    make_run(tmp_path, "goes on to more", 0.5, version="v3", epochs=20)
    write_json(tmp_path / "goes on to more" / "summary.json", told)
    assert len(tables.paper_table(4, tmp_path)[0]) == len(found)
    runs = found[1][1].set_index("system").loc["v3", "runs"]
    assert runs == "1 seeds × 1 folds in 2 runs, 6 studies, 6 patients"
    # Study i of four: i/10, and in the other seed (1 + i)/10 more.
    assert row["dice"] == pytest.approx(100 * (0.15 + 0.25 / 2))
    runs = tables.finished_runs(4, tmp_path)
    studies, _ = tables.pool(runs.iloc[[0, 1]], [])
    assert studies.loc["c", "dice"] == pytest.approx(0.2 + 0.3 / 2) and len(studies) == 6
    make_run(tmp_path, "other cohort", 0.5, version="v3")
    write_json(
        tmp_path / "other cohort" / "splits.json", {"train": ["x"], "val": [], "test": ["y"]}
    )
    found, _ = tables.paper_table(4, tmp_path)
    assert len(found) == 3 and all(about.startswith("studies ") for about, *_ in found)


def test_table_5_and_a_folder_without_runs(tmp_path):
    [(_, table, text)], _ = tables.paper_table(5, tmp_path)
    assert not table["runs"].any() and "not run: v1, v2-rec, nnunet, segresnet, v2" in text
    make_run(tmp_path, "v2", kind="mri", version="v2")
    make_run(tmp_path, "v1", 0.1, kind="mri", version="v1", studies="a")
    [(_, table, text)], _ = tables.paper_table(5, tmp_path)
    v1, v2 = (table.set_index("system").loc[name] for name in ("v1", "v2"))
    assert v2["dice_edema"] == pytest.approx(25) and np.isnan(v2["dice_core_p"])
    assert v1["dice_core_gain_n"] == 1 and np.isnan(v1["dice_core_low"]) and " 10.00 " in text


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "[]"), ("splits.json", "[]"), ("test_studies.csv", ""),
        ("test_studies.csv", "study,has_lesion\na,True\n"), ("splits.json", '{"test": 5}'),
        ("test_studies.csv", "study,has_lesion,dice,fpv_ml,fnv_ml\na,True,0.1,x,1\n"),
        ("test_studies.csv", "study,has_lesion,dice,fpv_ml,fnv_ml\na,True,0.1,1,1\nb"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content):
    make_run(tmp_path, "a", version="ct")
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path / 'a' / name}: damaged.*[.]$"):
        tables.paper_table(3, tmp_path)
