"""metrics.py: worked values of the challenge, means over studies, and tables of results."""

import io
import json
import math
import re

import numpy as np
import pandas as pd
import pytest

import metrics

# ------------------------------------------------------------------ one study


def boxes(*corners_and_sides):
    """A mask of 12^3 with boxes, each (first voxel, side)."""
    mask = np.zeros((12, 12, 12), np.uint8)
    for (x, y, z), side in corners_and_sides:
        mask[x : x + side, y : y + side, z : z + side] = 1
    return mask


CUBE = ((2, 2, 2), 3)
SHIFTED = ((4, 2, 2), 3)
INSIDE = ((3, 3, 3), 1)
FAR = ((9, 9, 9), 2)
DOT = ((5, 5, 5), 1)
EDGE = ((6, 6, 5), 1)  # shares an edge with DOT
CORNER = ((6, 6, 6), 1)  # shares a corner with DOT


@pytest.mark.parametrize(
    "truth, pred, dice, fpv, fnv",
    [
        ([CUBE], [], 0, 0, 0.324),
        ([], [FAR], 0, 0.096, 0),
        ([CUBE], [SHIFTED, FAR], 18 / 62, 0.096, 0),
        ([CUBE, FAR], [INSIDE], 2 / 36, 0, 0.096),
        ([DOT], [DOT, EDGE], 2 / 3, 0, 0),
        ([DOT], [DOT, CORNER], 2 / 3, 0.012, 0),
        ([], [], math.nan, 0, 0),
    ],
)
def test_worked_values_of_the_challenge(truth, pred, dice, fpv, fnv):
    spacing = (2, 2, 3)
    truth = 2 * boxes(*truth)
    pred = boxes(*pred)
    pred = -pred.cumsum(axis=0, dtype=float) * pred  # any value but 0 is foreground
    assert metrics.dice(pred, truth) == pytest.approx(dice, nan_ok=True)
    assert metrics.false_positive_volume(pred, truth, spacing) == pytest.approx(fpv)
    assert metrics.false_negative_volume(pred, truth, spacing) == pytest.approx(fnv)


def score(pred, truth):
    return metrics.score_study(pred, truth, ("lesion",), (1, 1, 1))


def test_lesions_are_counted_by_their_components():
    """Of three lesions, two touching in a corner only, one is found by two parts of the mask; one
    part is false."""
    truth = boxes(((1, 1, 1), 2), ((3, 3, 3), 2))
    truth[8, 1:9, 8] = 1
    pred = np.zeros_like(truth)
    for voxel in ((8, 1, 8), (8, 6, 8), (0, 11, 11)):
        pred[voxel] = 1

    row = score(pred, truth)
    assert row["lesions_found"] == 1
    assert row["lesions_missed"] == 2
    assert row["lesions_false"] == 1
    assert row["lesion_f1"] == pytest.approx(2 / 5)
    assert math.isnan(score(0 * pred, 0 * truth)["lesion_f1"])
    assert score(0 * pred, truth)["lesion_f1"] == 0


def test_masks_on_other_grids_are_refused():
    cube = np.ones((4, 4, 4))
    for shape in ((4, 4, 1), (4, 4)):
        with pytest.raises(ValueError, match="different grids"):
            metrics.dice(np.ones(shape), cube)
    with pytest.raises(ValueError, match="one number per axis"):
        metrics.false_negative_volume(cube, cube, (1, 1, 1, 1))


def test_every_class_of_several_has_its_scores():
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[0], truth[1] = 1, 2  # edema, core
    pred = np.zeros_like(truth)
    pred[0], pred[2] = 3, 1  # both on the edema, edema on nothing
    assert metrics.score_study(pred, truth, ("edema", "core"), (1, 1, 10)) == {
        "dice_whole": 0.5,
        "dice_edema": pytest.approx(2 / 3),
        "dice_core": 0.0,
        "whole_pred_ml": 0.32,
        "edema_pred_ml": 0.32,
        "core_pred_ml": 0.16,
        "whole_true_ml": 0.32,
        "edema_true_ml": 0.16,
        "core_true_ml": 0.16,
    }
    assert list(metrics.named_masks(pred, ("edema", "other"))) == ["edema", "other"]


# ------------------------------------------------------------------ many studies


STUDIES = """
study has_lesion dice fpv_ml fnv_ml mtv_pred_ml mtv_true_ml tumor_score
a     True       0.2  1      4      10          8           0.9
b     True       0.6  3      0      20          16          0.4
c     True       0    0      5      0           6           0.6
d     False      0    8      0      8           0           0.5
e     False      nan  0      0      0           0           0.2
"""  # d is a false alarm: its Dice does not count
TABLE = pd.read_csv(io.StringIO(STUDIES), sep=" +", engine="python")
TABLE["patient"] = TABLE["study"]
for name in ("dice", "fpv_ml", "fnv_ml", "mtv_pred_ml"):
    TABLE[f"suv4_{name}"] = 2 * TABLE[name]
ROWS = TABLE.to_dict("records")


def mean_and_count(value):
    return pytest.approx(value["mean"]), value["n"]


def test_means_hold_the_studies_that_count():
    summary = metrics.summarize_studies(ROWS)
    assert list(summary) == ["model", "SUV ≥ 4 threshold"]
    model, threshold = summary.values()
    expected = {
        "dice": (0.8 / 3, 3),
        "fpv_ml": (12 / 5, 5),
        "fpv_healthy_ml": (4.0, 2),
        "fnv_ml": (3.0, 3),
        "mtv_pred_ml": (10.0, 3),
        "mtv_true_ml": (10.0, 3),
        "tumor_accuracy": (0.8, 5),
        "tumor_auc": (5 / 6, 5),
    }
    assert {name: mean_and_count(value) for name, value in model.items()} == expected
    assert model["mtv_pred_ml"]["std"] == pytest.approx(10)
    assert threshold["fpv_healthy_ml"]["mean"] == 8
    assert threshold["mtv_true_ml"]["mean"] == 10
    assert "tumor_auc" not in threshold


def test_a_mean_without_studies_is_none():
    positive = metrics.summarize_studies(ROWS[:1])["model"]
    negative = metrics.summarize_studies(ROWS[3:])["model"]
    assert positive["fpv_healthy_ml"] == {"mean": None, "std": None, "n": 0}
    assert positive["dice"] == {"mean": 0.2, "std": None, "n": 1}
    assert negative["dice"]["n"] == 0
    assert negative["fpv_ml"]["n"] == 2
    json.dumps([positive, negative], allow_nan=False)


AUTOPET_NAMES = ["fdg_0", "FDG_1", "psma_2", "psma_3", "fdg_4"]
DEEP_PSMA_NAMES = ["train_0/FDG", "train_1/FDG", "train_0/PSMA", "train_2/PSMA", "train_2/FDG"]


@pytest.mark.parametrize("names", [AUTOPET_NAMES, DEEP_PSMA_NAMES])
def test_tracers_have_means_of_their_own(names):
    rows = [{**row, "study": name} for row, name in zip(ROWS, names, strict=True)]
    summary = metrics.summarize_studies(rows)
    assert list(summary)[:3] == ["model", "model, fdg", "model, psma"]
    assert summary["model"] == metrics.summarize_studies(ROWS)["model"]
    assert mean_and_count(summary["model, fdg"]["dice"]) == (0.4, 2)
    assert mean_and_count(summary["model, psma"]["fpv_ml"]) == (4.0, 2)
    assert list(metrics.systems_of_run("a\\1", summary))[:2] == ["a\\1", "a\\1, fdg"]
    assert "model, fdg" not in metrics.summarize_studies(rows[:2])


@pytest.mark.parametrize(
    "scores, has_lesion, accuracy, auc",
    [
        ([0.1, 0.2, 0.9], [1, 1, 0], 0, 0),
        ([0.6, 0.6, 0.6], [1, 0, 0], 1 / 3, 0.5),  # ties count half
        ([0.9, 0.2], [1, 1], 0.5, None),
        ([0.9, 0.2], [0, 0], 0.5, None),
    ],
)
def test_accuracy_and_auc_by_hand(scores, has_lesion, accuracy, auc):
    rows = []
    for score, lesion in zip(scores, has_lesion, strict=True):
        rows.append({**ROWS[0], "has_lesion": bool(lesion), "tumor_score": score})
    means = metrics.summarize_studies(rows)["model"]
    assert means["tumor_accuracy"] == {"mean": pytest.approx(accuracy), "n": len(scores)}
    assert means["tumor_auc"]["mean"] == (auc if auc is None else pytest.approx(auc))


# ------------------------------------------------------------------ tables


def test_the_table_shows_means_intervals_and_counts():
    summary = metrics.summarize_studies(ROWS)
    lines = metrics.results_table(metrics.systems_of_run("mine", summary)).splitlines()
    assert lines[0].split() == ["mine", "SUV", "≥", "4", "threshold"]
    cells = [re.split("  +", line) for line in lines[1:]]
    assert cells[0] == ["Dice", "0.267 [0.000, 0.600] (3)", "0.533 [0.000, 1.200] (3)"]
    assert cells[1][0] == "FPV ml"
    assert cells[1][1].startswith("2.400 [")
    assert cells[6] == ["T accuracy", "0.800 (5)", "-"]
    assert "studies with a lesion" in lines[9]
    assert len(lines) == 10


def test_mri_leaves_out_classes_that_no_study_has():
    rows = pd.DataFrame(
        {
            "study": ["a", "b"],
            "patient": ["a", "b"],
            "has_lesion": True,
            "dice_whole": 0.5,
            "dice_edema": [0.25, 0.75],
            "dice_core": [math.nan, 0.0],
        }
    )
    model = metrics.summarize_studies(rows.to_dict("records"))["model"]
    assert [mean_and_count(mean) for mean in model.values()] == [(0.5, 2), (0.5, 2), (0.0, 1)]
    lines = metrics.results_table({"mine": model}).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["whole", "edema", "core"]
    assert "core ∪ edema" in lines[4]


def test_columns_are_aligned_and_markdown_has_pipes():
    rows = [["", "Dice", "n"], ["v1", "0.5", "12"], ["longer", "-", "3"]]
    assert metrics.align_columns(rows).splitlines() == [
        "        Dice   n",
        "v1       0.5  12",
        "longer     -   3",
    ]
    assert metrics.align_columns(rows, markdown=True).splitlines() == [
        "|        | Dice |  n |",
        "| ------ | ---: | -: |",
        "| v1     |  0.5 | 12 |",
        "| longer |    - |  3 |",
    ]
