"""tables.py: which runs share a table, the tables of a search, the paper's tables beside ours."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import make_config, make_run, make_trial

import tables
from common import UserError, write_json
from metrics import summarize_studies
from runs import read_trials

METHOD = ("version", "phi", "theta", "shared")

# ------------------------------------------------------------------ which runs may share a table


def grouped(configs, *compared, studies="s"):
    """The groups as {words: the numbers of their runs}."""
    runs = pd.DataFrame({"config": configs, "studies": studies})
    groups = tables.group_comparable_runs(runs, compared)
    return {group.about: list(group.runs.index) for group in groups}


def test_only_comparable_runs_share_a_table():
    launch = {"seed": 1, "workers": 2, "out": "there", "splits": "x.json"}
    configs = [
        make_config(phi="noise"),
        make_config(phi="none", shared=(3,), **launch),
        make_config(phi="noise", noise_sigma=0.1),
        make_config(lr=0.1),
        None,  # damaged
        make_config("v4", lr=0.1, theta="learn"),
        make_config("v3", steps=2, lr=0.1),
    ]
    assert list(grouped(configs, *METHOD).items()) == [  # what is usual comes first
        ("noise_sigma 0.3, steps default, lr 0.001", [0, 1]),
        ("noise_sigma 0.1, steps default, lr 0.001", [2]),
        ("noise_sigma 0.3, steps default, lr 0.1", [3, 5]),
        ("noise_sigma 0.3, steps 2, lr 0.1", [6]),
    ]
    assert grouped(configs[:2], *METHOD) == {"": [0, 1]}
    assert grouped(configs[3:5]) == {"": [0]}
    assert grouped([None]) == {}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"shared": ()}, ["shared 5", "shared none"]),
        ({"epochs": 8}, ["epochs 10", "epochs 8"]),
        ({"version": "v3_ct_only"}, ["version v3", "version v3_ct_only"]),
    ],
)
def test_groups_name_the_option_in_which_they_differ(changed, words):
    options = {"version": "v3", **changed}
    pair = [make_config("v3"), make_config(**options)]
    assert grouped(pair) == {words[0]: [0], words[1]: [1]}
    assert len(grouped(pair, *changed)) == 1


def test_cohorts_and_kinds_of_data_are_apart_but_not_the_defaults_of_versions():
    twice = [make_config()] * 2
    assert grouped(twice, studies=["s", "t"]) == {"studies s": [0], "studies t": [1]}
    assert len(grouped([make_config(), make_config(data="real")])) == 2  # one is simulated

    some = [make_config(shuffle_count=30), make_config(), make_config(phi="none")]
    assert grouped(some, *METHOD) == {"shuffle_count 1": [1, 2], "shuffle_count 30": [0]}

    versions = [make_config(v, "mri") for v in ("v1", "v2", "v2-rec")]  # λ_seg 1/3, 1/3, 1/2
    assert grouped(versions, *METHOD) == {"": [0, 1, 2]}
    weighed = make_config("v1", "mri", lambda_seg=0.1)
    assert list(grouped([*versions, weighed], *METHOD).values()) == [[0, 1, 2], [3]]


# ------------------------------------------------------------------ the tables of a search


def test_table_2_of_the_paper_has_the_papers_marks():
    rows = []
    for (version, method), dices in tables.PAPER_TABLE2.items():
        option = {"phi": method, "theta": None}
        if version == "v4":
            option = {"phi": "none", "theta": method}
        for shared, dice in zip(tables.SETS, dices, strict=True):
            for shift in (-1, 1):  # two seeds, whose mean is the paper's figure
                row = {"version": version, "shared": shared, "dice": dice + shift}
                rows.append({**row, **option})

    text = tables.table_2_text(pd.DataFrame(rows), "lr 0.1")
    assert "mean of 2 runs (seeds, folds); lr 0.1\n" in text
    cells = re.findall(r"([\d.]+)(\**) \(([\d.]+)(\**)\)", text)
    assert len(cells) == 105
    for ours, our_mark, paper, paper_mark in cells:
        assert (ours, our_mark) == (paper, paper_mark)
    best = [ours for ours, mark, _, _ in cells if mark == "**"]
    assert best == ["64.57", "65.50", "65.91", "64.24"]
    assert sum(mark != "" for _, mark, _, _ in cells) == 28  # a best one in each of 4 x 7 boxes

    (line,) = [line for line in text.splitlines() if line.startswith("v3  L2 + shuffling")]
    assert line.split()[4] == "63.33*"
    assert "65.91** (65.91**)" in line


def test_other_sets_follow_those_of_the_paper_and_gaps_are_counted():
    rows = []
    for shared in ("none", "1 8", "4 5 6", "7", "3", "2"):
        row = {"version": "v1", "phi": "none", "theta": None, "shared": shared, "dice": 1}
        rows.append(row)
    rows.append({**rows[0], "dice": 3})
    rows.append({**rows[1], "phi": "noise"})
    values, about = tables.table_2(pd.DataFrame(rows))
    assert list(values) == ["3", "7", "4 5 6", "none", "2", "1 8"]
    assert values.loc[("v1", "none"), "none"] == 2
    assert about == "mean of 1 to 2 runs (seeds, folds); 5 of 12 cells missing"
    with pytest.raises(UserError, match="no test Dice yet"):
        tables.table_2(pd.DataFrame(rows).assign(dice=np.nan))


def test_the_lambda_grid_falls_and_marks_its_best_cell():
    trials = pd.DataFrame(
        {
            "lambda_rec": ["1e-05", "0.1", "0.1"],
            "lambda_cls": ["0.01", "0.01", "0.1"],
            "dice": [42, 31, 25],
        }
    )
    lines = tables.lambda_text(trials, "").splitlines()
    assert lines[0].endswith("1 run; 1 of 4 cells missing")
    cells = [line.split() for line in lines[1:4]]
    assert cells == [
        ["0.1", "0.01"],
        ["0.1", "25.00", "31.00"],
        ["1e-05", "–", "42.00*"],
    ]


def test_the_trials_of_a_table_are_those_of_its_searches(tmp_path):
    config = make_config("v3")
    make_trial(tmp_path, "a", config, searches=["lambdas"])
    make_trial(tmp_path, "b", config, searches=["lambdas", "layers"])
    make_trial(tmp_path, "c", config, searches=["mine"])
    trials = read_trials(tmp_path)
    assert list(tables.asked_by(trials, "layers", "theta")) == [False, True, False]
    ((_, table_2),) = tables.groups_for_table(trials, "table 2")
    ((_, grid),) = tables.groups_for_table(trials, "lambdas")
    assert list(table_2["trial"]) == ["b", "c"]
    assert list(grid["trial"]) == ["a", "b", "c"]
    assert list(trials.apply(tables.in_table_2, axis=1)) == [True] * 3


# ------------------------------------------------------------------ Tables 3-5


def study_rows(shift=0.0, studies="abcdef", metrics=("dice", "fpv_ml", "fnv_ml")):
    """A row per study; study i has i/10 + (1 + i) shift in all metrics, the first four a lesion."""
    rows = []
    for i, study in enumerate(studies):
        row = {"study": study, "patient": study, "has_lesion": i < 4}
        row.update(dict.fromkeys(metrics, i / 10 + shift * (1 + i)))
        rows.append(row)
    return rows


def make_tested(root, name, shift=0.0, studies="abcdef", late=None, **options):
    """A run of a system with its test results; late: of a late fusion."""
    config = make_config(**options)
    metrics = tables.PAPER_TABLES[5 if config.kind == "mri" else 3].metrics
    record = {"late_fusion": late} if late else {}
    run = make_run(root, name, config, study_rows(shift, studies, metrics), **record)
    splits = {"train": ["g"], "val": [], "test": list("abcdef")}
    write_json(run / "splits.json", splits)
    return run


def paper_table(number, root, **given):
    """The groups as (words, table by system, text), and the runs in none of them."""
    groups, others = tables.runs_for_table(tables.finished_runs(number, root), given)
    tested = []
    for about, runs in groups:
        table, text = tables.beside_paper(number, runs)
        tested.append((about, table.set_index("system"), text))
    return tested, others


def test_the_papers_table_beside_ours(tmp_path):
    make_tested(tmp_path, "a", 0.01, version="ct")
    make_tested(tmp_path, "late/b", late="union", version="ct")
    make_tested(tmp_path, "c", 0.1, version="v3")
    make_tested(tmp_path / "a", "evaluation", 0.9, version="ct")
    (tmp_path / "a" / "evaluation" / "config.json").unlink()

    text = tables.write_paper_table(3, tmp_path, tmp_path / "out", {})
    assert (tmp_path / "out" / "table3.md").read_text() == text + "\n"
    titles = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert titles[0] == "Method"
    assert titles[2:6] == ["CT", "PET", "EF", "MF"]
    assert len(titles) == 13
    assert "not run: pet, early_fusion, middle_fusion, late_fusion_logits, " in text
    assert text.count("not run") == 3 * 8 + 1
    assert "different studies" not in text
    assert text.count("neither its rule") == 1

    table = pd.read_csv(tmp_path / "out" / "table3.csv").set_index("system")
    assert table.loc["pet", "dice_paper"] == 60.99
    assert np.isnan(table.loc["pet", "dice"])
    ct = table.loc["ct"]
    means = summarize_studies(study_rows(0.01))["model"]
    for metric, scale in (("dice", 100), ("fpv_ml", 1), ("fnv_ml", 1)):
        assert ct[metric] == pytest.approx(scale * means[metric]["mean"])
        assert ct[f"{metric}_n"] == means[metric]["n"] == (6 if metric == "fpv_ml" else 4)
        assert ct[f"{metric}_low"] < ct[metric] < ct[f"{metric}_high"]

    # Study i: i/10 + (1 + i)/100 against i/10 + (1 + i)/10, four with a lesion. All differences
    # have one sign: p is 2 / 2^4, and twice that by Holm, since two rows were tested.
    assert ct["dice_gain"] == pytest.approx(-100 * 0.09 * 2.5)
    assert ct["dice_gain_n"] == 4
    assert ct["dice_p"] == pytest.approx(2 * 2 / 16)
    assert ct["dice_gain_low"] < ct["dice_gain"] < ct["dice_gain_high"] < 0
    assert table["dice_gain"].notna().sum() == 2
    assert table.loc["late_fusion_union", "dice"] == 15
    assert tables.write_paper_table(3, tmp_path, tmp_path / "out", {}) == text  # no other draws


def test_a_row_holds_the_runs_of_its_system_with_its_defaults(tmp_path, capsys):
    fabricated = {
        "shared": (3,),
        "bottleneck": "joint",
        "phi": "none",
        "lambda_cls": 0.0,
    }
    make_tested(tmp_path, "v3", version="v3")
    make_tested(tmp_path, "fabricated", 0.5, version="v3", **fabricated)
    make_tested(tmp_path, "ct alone", 0.5, version="v3", modality="ct")
    make_tested(tmp_path, "fast", 0.5, version="nnunet", lr=0.1)
    make_tested(tmp_path, "sfnet", version="sfnet", studies="abcde")
    make_tested(tmp_path, "mri", version="v2", kind="mri")
    make_tested(tmp_path, "of another table", version="v1", lr=0.2)
    trial = make_tested(tmp_path, "search/trial", version="v4")
    write_json(trial / "trial.json", {})

    ((about, table, text),), others = paper_table(4, tmp_path)
    assert about == ""
    assert list(table.index[table["runs"] != ""]) == ["sfnet", "v3"]
    assert table.loc["v3", "dice"] == 15
    assert "tested on different studies" in text
    assert others == [
        f"{tmp_path / 'ct alone'}: modality ct",
        f"{tmp_path / 'fabricated'}: bottleneck joint, lambda_cls 0, phi none, shared 3",
        f"{tmp_path / 'fast'}: lr 0.1",
    ]

    words = ["shared=3", "bottleneck=joint", "phi=none", "lambda_cls=0"]
    out = tmp_path / "out"
    tables.tables_command([str(tmp_path), "--table", "4", "--out", str(out), "--with", *words])
    table = pd.read_csv(out / "table4.csv").set_index("system")
    assert table.loc["v3", "dice"] == pytest.approx(15 + 50 * 2.5)
    usual = f"{tmp_path / 'v3'}: bottleneck own, lambda_cls 0.001, phi shuffle, shared 5"
    assert usual in capsys.readouterr().out
    ((about, table, _),), _ = paper_table(4, tmp_path / "search")  # its own folder
    assert about == ""
    assert table.loc["v4", "dice"] == 15


def test_seeds_are_averaged_and_folds_pooled(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.1)):
        make_tested(tmp_path, f"a{seed}", shift, version="v3", seed=seed)
        make_tested(tmp_path, f"b{seed}", shift, "ghijkl", version="v3", seed=seed, fold=1)
    make_tested(tmp_path, "quick", 0.5, version="v3", steps=3)
    make_tested(tmp_path, "quick, a copy", 0.5, version="v3", steps=3)
    longer = make_tested(tmp_path, "goes on to more", 0.5, version="v3", epochs=20)
    write_json(longer / "summary.json", {"epochs": 10, "systems": {"model": {}}})

    groups, others = paper_table(4, tmp_path)
    assert [about for about, *_ in groups] == ["steps default", "steps 3"]
    assert others == []
    row = groups[0][1].loc["v3"]
    assert row["runs"] == "2 seeds × 2 folds, 12 studies, 12 patients"
    assert row["dice_n"] == 8
    assert row["dice"] == pytest.approx(100 * (0.15 + 0.25 / 2))  # the other seed has 0.25 more
    runs = groups[1][1].loc["v3", "runs"]
    assert runs == "1 seeds × 1 folds in 2 runs, 6 studies, 6 patients"
    pooled, _ = tables.pool_seeds_and_folds(tables.finished_runs(4, tmp_path).iloc[[0, 1]], [])
    assert pooled.loc["c", "dice"] == pytest.approx(0.2 + 0.3 / 2)
    assert len(pooled) == 6

    other = make_tested(tmp_path, "other cohort", 0.5, version="v3")
    write_json(other / "splits.json", {"train": ["x"], "val": [], "test": ["y"]})
    groups, _ = paper_table(4, tmp_path)
    assert len(groups) == 3
    assert all("studies " in about for about, *_ in groups)


def test_table_5_and_a_folder_without_runs(tmp_path):
    with pytest.raises(UserError, match="no run of Table 5 with test results"):
        tables.write_paper_table(5, tmp_path, tmp_path, {})
    with pytest.raises(UserError, match="nowhere: no such folder"):
        tables.tables_command([str(tmp_path / "nowhere"), "--table", "5"])

    make_tested(tmp_path, "v1", 0.1, "a", kind="mri", version="v1")
    fast = make_tested(tmp_path, "v2", kind="mri", version="v2", lr=0.1)
    text = tables.write_paper_table(5, tmp_path, tmp_path, {"lr": 0.1})
    assert "not run: v1, v2-rec, nnunet, segresnet" in text
    assert "lr 0.001" in text
    assert tables.write_paper_table(5, tmp_path, tmp_path, {}).endswith(f"{fast}: lr 0.1")

    make_tested(tmp_path, "usual v2", kind="mri", version="v2")
    ((_, table, text),), _ = paper_table(5, tmp_path)
    assert table.loc["v2", "dice_edema"] == pytest.approx(25)
    assert np.isnan(table.loc["v2", "dice_core_p"])
    assert " 10.00 " in text
    assert table.loc["v1", "dice_core_gain_n"] == 1
    assert np.isnan(table.loc["v1", "dice_core_low"])


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "[]"),
        ("splits.json", "[]"),
        ("splits.json", '{"test": 5}'),
        ("test_studies.csv", ""),
        ("test_studies.csv", "study,has_lesion\na,True\n"),
        ("test_studies.csv", "study,has_lesion,dice,fpv_ml,fnv_ml\na,True,0.1,x,1\n"),
        ("test_studies.csv", "study,has_lesion,dice,fpv_ml,fnv_ml\na,True,0.1,1,1\nb"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content):
    run = make_tested(tmp_path, "a", version="ct")
    (run / name).write_text(content)
    with pytest.raises(UserError, match=f"^{run / name}: damaged.*[.]$"):
        tables.write_paper_table(3, tmp_path, tmp_path, {})
