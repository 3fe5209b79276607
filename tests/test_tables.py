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
        ("noise_sigma default, steps default, lr default", [0, 1]),
        ("noise_sigma 0.1, steps default, lr default", [2]),
        ("noise_sigma default, steps default, lr 0.1", [3, 5]),
        ("noise_sigma default, steps 2, lr 0.1", [6]),
    ]
    assert grouped(configs[:2], *METHOD) == {"": [0, 1]}
    assert grouped(configs[3:5]) == {"": [0]}
    assert grouped([None]) == {}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"shared": ()}, ["shared default", "shared none"]),
        ({"epochs": 8}, ["epochs default", "epochs 8"]),
        ({"version": "v3_ct_only"}, ["version v3", "version v3_ct_only"]),
    ],
)
def test_groups_name_the_option_in_which_they_differ(changed, words):
    pair = [make_config("v3"), make_config(**{"version": "v3", **changed})]
    assert grouped(pair) == {words[0]: [0], words[1]: [1]}
    assert len(grouped(pair, *changed)) == 1


def test_cohorts_and_kinds_of_data_are_apart_but_not_the_defaults_of_versions():
    twice = [make_config()] * 2
    assert grouped(twice, studies=["s", "t"]) == {"studies s": [0], "studies t": [1]}
    assert len(grouped([make_config(), make_config(data="real")])) == 2  # one is simulated

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
    usual = {"version": "v1", "phi": "none", "theta": None, "dice": 1}
    rows = [{**usual, "shared": shared} for shared in ("none", "1 8", "4 5 6", "7", "3", "2")]
    rows.append({**rows[0], "dice": 3})
    rows.append({**rows[1], "phi": "noise"})
    trials = pd.DataFrame(rows)
    values, about = tables.table_2(trials, "lr 0.1")
    assert list(values) == ["3", "7", "4 5 6", "none", "2", "1 8"]
    assert values.loc[("v1", "none"), "none"] == 2
    assert about == "mean of 1 to 2 runs (seeds, folds); 5 of 12 cells missing; lr 0.1"
    with pytest.raises(UserError, match="no test Dice yet"):
        tables.table_2(trials.assign(dice=np.nan), "")


def test_the_lambda_grid_falls_and_marks_its_best_cell():
    trials = pd.DataFrame(
        {
            "version": "v3",
            "lambda_rec": ["1e-05", "0.1", "0.1"],
            "lambda_cls": ["0.01", "0.01", "0.1"],
            "dice": [42, 31, 25],
        }
    )
    title, *lines = tables.lambda_text(trials, "").splitlines()
    assert title.startswith("Test Dice of v3 in percent")
    assert title.endswith("1 run; 1 of 4 cells missing")
    assert [line.split() for line in lines] == [
        ["0.1", "0.01"],
        ["0.1", "25.00", "31.00"],
        ["1e-05", "–", "42.00*"],
        ["*", "best"],
    ]


def test_the_trials_of_a_table_are_those_of_its_searches(tmp_path):
    config = make_config("v3")
    make_trial(tmp_path, "a", config, searches=["lambdas"])
    make_trial(tmp_path, "b", config, searches=["lambdas", "layers"])
    make_trial(tmp_path, "c", config, searches=["claims"])
    make_trial(tmp_path, "d", make_config("v3", shared=(2,)), searches=["claims", "theta"])
    trials = read_trials(tmp_path)
    assert list(tables.asked_by(trials, "layers", "lambdas")) == [True, True, False, False]
    ((_, table_2),) = tables.groups_for_table(trials, "table 2")
    ((_, grid),) = tables.groups_for_table(trials, "lambdas")
    assert list(table_2["trial"]) == ["b", "d"]
    assert list(grid["trial"]) == ["a", "b"]
    assert list(trials.apply(tables.in_table_2, axis=1)) == [True, True, True, False]


# ------------------------------------------------------------------ Tables 3-5


def study_rows(shift=0.0, studies="abcdef", metrics=("dice", "fpv_ml", "fnv_ml")):
    """A row per study; study i has i/10 + (1 + i) shift in all metrics, the first four a lesion."""
    rows = []
    for i, study in enumerate(studies):
        row = {"study": study, "patient": study, "has_lesion": i < 4}
        row.update(dict.fromkeys(metrics, i / 10 + shift * (1 + i)))
        rows.append(row)
    return rows


@pytest.fixture
def make_tested(tmp_path):
    """Makes a run of a version with its test results; late: the late fusion that it is."""

    def make(name, version, shift=0.0, studies="abcdef", kind="petct", late=None, **options):
        config = make_config(version, kind, **options)
        rows = study_rows(shift, studies, tables.PAPER_TABLES[5 if kind == "mri" else 3].metrics)
        record = {"late_fusion": late} if late else {}
        run = make_run(tmp_path, name, config, rows, **record)
        write_json(run / "splits.json", {"train": ["g"], "val": [], "test": list("abcdef")})
        write_json(run / "summary.json", {"epochs": config.epochs, "systems": {"model": {}}})
        return run

    return make


def paper_table(number, root):
    """The words and tables of the groups, tables by system, the last text, and the other runs."""
    groups, others = tables.runs_for_table(tables.finished_runs(number, root), {})
    by_group = {}
    for about, runs in groups:
        table, text = tables.beside_paper(number, runs)
        by_group[about] = table.set_index("system")
    return by_group, text, others


def test_the_papers_table_beside_ours(make_tested, tmp_path):
    make_tested("a", "ct", 0.01)
    fusion = make_tested("late/b", "ct", late="union")
    write_json(fusion / "summary.json", {})  # a fusion has no epochs
    make_tested("c", "v3", 0.1)
    (make_tested("a/evaluation", "ct", 0.9) / "config.json").unlink()

    out = tmp_path / "out"
    text = tables.write_paper_table(3, tmp_path, out, {})
    assert (out / "table3.md").read_text() == f"{text}\n"
    lines = [line.split() for line in text.splitlines() if line.startswith("| ")]
    methods = [line[1] for line in lines]
    assert methods[:6] == ["Method", "-----------------", "CT", "PET", "EF", "MF"]
    assert len(lines) == 13
    assert lines[3][3:9] == ["60.99", "|", "-", "|", "-", "|"]
    assert "not run: pet, early_fusion, middle_fusion, late_fusion_logits, " in text
    assert "different studies" not in text
    assert text.count("neither its rule") == 1

    table = pd.read_csv(out / "table3.csv").set_index("system")
    assert table.loc["pet", "dice_paper"] == 60.99
    assert np.isnan(table.loc["pet", "dice"])
    ct = table.loc["ct"]
    means = summarize_studies(study_rows(0.01))["model"]
    for metric, scale, count in (("dice", 100, 4), ("fpv_ml", 1, 6), ("fnv_ml", 1, 4)):
        assert ct[metric] == pytest.approx(scale * means[metric]["mean"])
        assert ct[f"{metric}_n"] == count
        assert ct[f"{metric}_low"] < ct[metric] < ct[f"{metric}_high"]

    # Study i: i/10 + (1 + i)/100 against i/10 + (1 + i)/10, four with a lesion. All differences
    # have one sign: p is 2 / 2^4, and twice that by Holm, since two rows were tested.
    assert ct["dice_gain"] == pytest.approx(-100 * 0.09 * 2.5)
    assert ct["dice_gain_n"] == 4
    assert ct["dice_p"] == pytest.approx(2 * 2 / 16)
    assert ct["dice_gain_low"] < ct["dice_gain"] < ct["dice_gain_high"] < 0
    assert re.search(r"\| -22.50 \[-.*\] \|  0.250 \|", text)
    assert table["dice_gain"].notna().sum() == 2
    assert table.loc["late_fusion_union", "dice"] == 15
    assert tables.write_paper_table(3, tmp_path, out, {}) == text  # no other draws


def test_a_row_holds_the_runs_of_its_system_with_its_defaults(make_tested, tmp_path, capsys):
    make_tested("v3", "v3")
    make_tested("made", "v3", 0.5, shared=(3,), bottleneck="joint", phi="none", lambda_cls=0.0)
    make_tested("ct alone", "v3", 0.5, modality="ct")
    make_tested("fast", "nnunet", 0.5, lr=0.1)
    make_tested("sfnet", "sfnet", studies="abcde")
    make_tested("mri", "v2", kind="mri")
    make_tested("of another table", "v1", lr=0.2)
    (make_tested("untested", "v4") / "summary.json").unlink()
    write_json(make_tested("search/trial", "v4") / "trial.json", {})

    groups, text, others = paper_table(4, tmp_path)
    (table,) = groups.values()
    assert list(groups) == [""]
    assert list(table.index[table["runs"] != ""]) == ["sfnet", "v3"]
    assert table.loc["v3", "dice"] == 15
    assert "tested on different studies" in text
    assert others == [
        f"{tmp_path / 'ct alone'}: modality ct",
        f"{tmp_path / 'fast'}: lr 0.1",
        f"{tmp_path / 'made'}: bottleneck joint, lambda_cls 0, phi none, shared 3",
    ]

    words = "--table 4 --with shared=3 bottleneck=joint phi=none lambda_cls=0 --out"
    out = tmp_path / "out"
    tables.tables_command([str(tmp_path), *words.split(), str(out)])
    table = pd.read_csv(out / "table4.csv").set_index("system")
    assert table.loc["v3", "dice"] == pytest.approx(15 + 50 * 2.5)
    usual = f"{tmp_path / 'v3'}: bottleneck own, lambda_cls 0.001, phi shuffle, shared 5"
    assert usual in capsys.readouterr().out
    groups, *_ = paper_table(4, tmp_path / "search")  # its own folder
    assert groups[""].loc["v4", "dice"] == 15


def test_seeds_are_averaged_and_folds_pooled(make_tested, tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.1)):
        make_tested(f"a{seed}", "v3", shift, seed=seed)
        make_tested(f"b{seed}", "v3", shift, "ghijkl", seed=seed, fold=1)
    make_tested("quick", "v3", 0.5, steps=3)
    make_tested("quick, a copy", "v3", 0.5, steps=3)
    longer = make_tested("goes on to more", "v3", 0.5, epochs=20)
    write_json(longer / "summary.json", {"epochs": 10, "systems": {"model": {}}})

    groups, _, others = paper_table(4, tmp_path)
    assert list(groups) == ["steps default", "steps 3"]
    assert others == []
    row = groups["steps default"].loc["v3"]
    assert row["runs"] == "2 seeds × 2 folds, 12 studies, 12 patients"
    assert row["dice_n"] == 8
    assert row["dice"] == pytest.approx(100 * (0.15 + 0.25 / 2))  # the other seed has 0.25 more
    runs = groups["steps 3"].loc["v3", "runs"]
    assert runs == "1 seeds × 1 folds in 2 runs, 6 studies, 6 patients"
    pooled, _ = tables.pool_seeds_and_folds(tables.finished_runs(4, tmp_path)[:2], [])
    assert pooled.loc["c", "dice"] == pytest.approx(0.2 + 0.3 / 2)
    assert len(pooled) == 6

    other = make_tested("other cohort", "v3", 0.5)
    write_json(other / "splits.json", {"train": ["x"], "val": [], "test": ["y"]})
    groups, *_ = paper_table(4, tmp_path)
    assert len(groups) == 3
    assert all("studies " in about for about in groups)


def test_table_5_and_a_folder_without_runs(make_tested, tmp_path):
    with pytest.raises(UserError, match="no run of Table 5 with test results"):
        tables.write_paper_table(5, tmp_path, tmp_path, {})
    with pytest.raises(UserError, match="nowhere: no such folder"):
        tables.tables_command([str(tmp_path / "nowhere"), "--table", "5"])

    make_tested("v1", "v1", 0.1, "a", kind="mri")
    fast = make_tested("v2", "v2", kind="mri", lr=0.1)
    text = tables.write_paper_table(5, tmp_path, tmp_path, {"lr": 0.1})
    assert "not run: v1, v2-rec, nnunet, segresnet" in text
    assert "lr 0.001" in text
    assert tables.write_paper_table(5, tmp_path, tmp_path, {}).endswith(f"{fast}: lr 0.1")

    make_tested("usual v2", "v2", kind="mri")
    groups, text, _ = paper_table(5, tmp_path)
    table = groups[""]
    assert table.loc["v2", "dice_edema"] == pytest.approx(25)
    assert np.isnan(table.loc["v2", "dice_core_p"])
    assert " 10.00 " in text
    assert table.loc["v1", "dice_core_gain_n"] == 1
    assert np.isnan(table.loc["v1", "dice_core_low"])


HEADING = "study,patient,has_lesion,dice,fpv_ml,fnv_ml\n"


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "[]"),
        ("splits.json", "[]"),
        ("splits.json", '{"test": 5}'),
        ("test_studies.csv", ""),
        ("test_studies.csv", "study,has_lesion\na,True\n"),
        ("test_studies.csv", f"{HEADING}a,a,True,0.1,x,1\n"),
        ("test_studies.csv", f"{HEADING}a,a,True,0.1,1,1\nb\n"),
        ("test_studies.csv", f"{HEADING}a,a,True,0.1,1,1"),
        ("test_studies.csv", f"{HEADING},a,True,0.1,1,1\n"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(make_tested, tmp_path, name, content):
    run = make_tested("a", "ct")
    (run / name).write_text(content)
    with pytest.raises(UserError, match=f"^{run / name}: damaged.*[.]$"):
        tables.write_paper_table(3, tmp_path, tmp_path, {})
