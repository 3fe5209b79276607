"""claims.py: which arm a trial is, differences over patients and seeds, and the verdicts."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from conftest import make_config, make_trial

import claims
from certainty import interval
from metrics import metrics_by_name
from runs import read_trials

DICES = np.array([0.2, 0.3, 0.4, 0.5])


def make_claim(root, arm, dices, seed, fold=0, healthy=0.0, name="", studies="s", **options):
    """A finished trial of an arm. Two studies of each patient have the patient's Dice; a study
    without a lesion has a false positive volume of `healthy` ml."""
    rows = []
    for i, dice in enumerate(dices):
        patient = f"p{fold}{i}"
        for visit in "ab":
            row = {"study": f"{patient}/{visit}", "patient": patient, "has_lesion": True}
            rows.append({**row, "dice": dice, "fpv_ml": 0.0})
    rows.append({**rows[0], "study": f"h{fold}", "has_lesion": False, "fpv_ml": healthy})

    options = {"epochs": 4, **claims.ARMS[arm], "seed": seed, "fold": fold, **options}
    run = make_trial(
        root,
        name or f"{arm}-{seed}-{fold}",
        make_config(**options),
        searches=["claims"],
        studies=studies,
    )
    pd.DataFrame(rows).to_csv(run / "test_studies.csv", index=False)
    return run


def claims_of(trials):
    return claims.claims_table(trials).set_index("claim")


def test_arms_are_told_apart_by_their_options():
    for name, options in claims.ALL_ARMS.items():
        config = make_config(**options, seed=5, fold=2, epochs=3, lr=0.1)
        assert claims.arm_of(config) == name
    assert claims.arm_of(make_config("v3", shared=(4,))) is None
    for claim in claims.CLAIMS:
        arms = {claim.plus, claim.minus}
        assert any(arms <= set(search) for search in claims.COMPARISONS.values())
        assert claim.metric in metrics_by_name(())


@pytest.mark.parametrize(
    "low, high, seeds, paper, verdict",
    [
        (0.1, 2, [1, 1, 1], 0.4, "supported"),
        (0.1, 2, [1, 1, 1], -0.4, "contradicted"),
        (-2, -0.1, [-1] * 4, 3.0, "contradicted"),
        (-2, -0.1, [-1] * 3, -1, "supported"),
        (-0.1, 2, [1, 1, 1], 0.4, "not decided"),
        (0.1, 2, [1, 1], 0.4, "not decided"),
        (0.1, 2, [3, 3, -1], 0.4, "not decided"),
        (0.1, 2, [1] * 3, math.nan, "higher"),
        (-2, -0.1, [-1] * 3, math.nan, "lower"),
    ],
)
def test_the_verdict_needs_the_interval_and_three_seeds(low, high, seeds, paper, verdict):
    assert claims.verdict(low, high, seeds, paper) == verdict


def test_claims_are_differences_over_patients_and_seeds(tmp_path):
    """v3 is ahead of v2 by 0.1, 0.2 or 0.3 in the studies of a seed, v1 by 0.1 or 0.4."""
    for seed in range(3):
        for fold in range(2):
            make_claim(tmp_path, "v2", DICES, seed, fold, healthy=5.0)
            make_claim(tmp_path, "v3", DICES + 0.1 * (1 + seed), seed, fold, healthy=2.0)
            make_claim(tmp_path, "v1", DICES + (0.4 if seed else 0.1), seed, fold)
    make_claim(tmp_path, "PET", DICES, seed=0)
    trials = read_trials(tmp_path)
    table = claims_of(trials)

    row = table.loc["v3 - v2, Dice"]
    assert row["here"] == pytest.approx(20)
    assert 9.99 < row["low"] < row["high"] < 30.01
    assert row["seeds"] == "3 of 3"
    assert row["patients"] == 8
    assert row["verdict"] == "supported"
    row = table.loc["v3 - v2, healthy FPV ml"]
    assert row["here"] == pytest.approx(-3)
    assert row["verdict"] == "lower"
    row = table.loc["v2 - v1, Dice"]
    assert row["here"] == pytest.approx(-30)
    assert row["verdict"] == "contradicted"
    row = table.loc["v3 - PET, Dice"]  # one seed, one fold
    assert (row["seeds"], row["patients"], row["verdict"]) == ("1 of 1", 4, "not decided")
    assert table.loc["v3 - v4, Dice", "verdict"] == "not run"

    lines = claims.claims_text(trials, "lr 0.1").splitlines()
    assert lines[0] == "Claims of Sec. 4: Dice in %, volumes in ml; lr 0.1"
    (line,) = [line for line in lines if line.startswith("v3 - v2, Dice")]
    assert re.split("  +", line)[1] == "+0.41"
    assert line.endswith("3 of 3         8     supported")


def test_the_level_of_a_claim_is_divided_by_their_number(tmp_path):
    rng = np.random.default_rng(0)
    plus, minus = rng.uniform(0, 1, (2, 3, 12))
    for seed in range(3):
        make_claim(tmp_path, "v3", plus[seed], seed)
        make_claim(tmp_path, "v2", minus[seed], seed)
    row = claims_of(read_trials(tmp_path)).loc["v3 - v2, Dice"]

    differences = pd.DataFrame(100 * np.repeat(plus - minus, 2, axis=1).T)
    patients = pd.Series(np.repeat([f"p0{i}" for i in range(12)], 2))  # two studies each
    level = 1 - 0.05 / 14  # of --search claims
    expected = interval(differences, patients, level)
    assert (row["low"], row["high"]) == pytest.approx(expected)


def test_claims_keep_budgets_and_cohorts_apart(tmp_path):
    for seed in range(3):
        make_claim(tmp_path, "v2", DICES, seed)
        make_claim(tmp_path, "v3", DICES + 0.1, seed)
        make_claim(tmp_path, "v2", DICES, seed, name=f"long v2 {seed}", steps=9)
        make_claim(tmp_path, "v3", DICES - 0.1, seed, name=f"long v3 {seed}", steps=9)
        make_claim(tmp_path, "v1", DICES, seed, rec="mse")
    groups = claims.claim_groups(read_trials(tmp_path))
    assert [group.about for group in groups] == ["steps default", "steps 9"]
    rows = [claims_of(group.runs).loc["v3 - v2, Dice"] for group in groups]
    assert [row["here"] for row in rows] == pytest.approx([10, -10])
    assert [row["verdict"] for row in rows] == ["supported", "contradicted"]
    row = claims_of(groups[0].runs).loc["v2 - v1, Dice"]
    assert row["here"] == pytest.approx(0)  # rec holds for all arms

    make_claim(tmp_path, "v3", DICES, 0, fold=1, name="of another cohort", studies="t")
    cohorts = [group.about for group in claims.claim_groups(read_trials(tmp_path))]
    assert len(cohorts) == 3
    assert sum("studies t" in about for about in cohorts) == 1


def test_a_claim_that_cannot_be_computed_is_left_out_with_the_reason(tmp_path):
    for seed in range(3):
        make_claim(tmp_path, "v2", DICES, seed)
        make_claim(tmp_path, "v3", DICES + 0.1, seed)
    make_claim(tmp_path, "v3", DICES, 1, name="volume", class_label="volume")
    broken = make_claim(tmp_path, "v1", DICES, 7)
    (broken / "test_studies.csv").unlink()
    text = claims.claims_text(read_trials(tmp_path), "")
    assert text.count("left out: v3: two trials of seed 1 were tested on one study") == 1
    assert f"left out: {broken / 'test_studies.csv'}: No such file" in text
    assert "supported" not in text
