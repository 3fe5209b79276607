"""The metrics of one study, their means over many, and the table that shows them.

Dice, FPV, FNV and the rules for empty masks are those of the AutoPET challenge of 2022. Masks are
(W, H, D), spacings are in mm and volumes in ml.
"""

import itertools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage, stats

from certainty import interval
from mirror_unet import UNIONS
from preprocess import THRESHOLDS_SUV, body_box

CONNECTIVITY_18 = ndimage.generate_binary_structure(3, 2)  # faces and edges join, corners do not

# ------------------------------------------------------------------ one study


def binary_masks(pred, mask) -> tuple[np.ndarray, np.ndarray]:
    """Both as booleans, where all but 0 is foreground. Raises ValueError if their shapes differ."""
    pred = np.asarray(pred).astype(bool, copy=False)
    mask = np.asarray(mask).astype(bool, copy=False)
    if pred.shape != mask.shape:
        raise ValueError(f"prediction {pred.shape} and mask {mask.shape} lie on different grids")
    return pred, mask


def dice(pred, mask) -> float:
    """2 |G ∩ P| / (|G| + |P|) of two masks; NaN if both are empty, 0 if only one is."""
    pred, mask = binary_masks(pred, mask)
    total = np.count_nonzero(pred) + np.count_nonzero(mask)
    if total == 0:
        return math.nan
    return float(2 * np.count_nonzero(pred & mask) / total)


class ComponentOverlap(NamedTuple):
    """The 18-connected components of a mask, counted by whether they touch another mask."""

    touching: int
    apart: int
    apart_voxels: int  # voxels of all components that do not touch


def component_overlap(mask, other) -> ComponentOverlap:
    """Label the components of `mask`; one voxel of `other` inside a component touches it."""
    mask, other = binary_masks(mask, other)
    if not mask.any():
        return ComponentOverlap(touching=0, apart=0, apart_voxels=0)

    # Lesions fill a small part of the body, and labelling takes time in proportion to the volume.
    box = tuple(slice(start, stop) for start, stop in body_box(mask, margin=(0, 0, 0)))
    mask, other = mask[box], other[box]
    components, count = ndimage.label(mask, CONNECTIVITY_18)

    touched = np.zeros(count + 1, bool)
    touched[components[other]] = True
    touched[0] = False  # the background
    touching = int(touched.sum())
    sizes = np.bincount(components[mask], minlength=count + 1)
    return ComponentOverlap(touching, count - touching, int(sizes[~touched].sum()))


def volume_ml(voxels: int, mask, spacing) -> float:
    """The volume of so many voxels of the mask's grid in ml; spacing in mm per axis."""
    if len(np.atleast_1d(spacing)) != np.ndim(mask):
        raise ValueError(f"spacing {spacing}: one number per axis of {np.shape(mask)}, in mm")
    return float(voxels * np.prod(spacing) / 1000)


def false_positive_volume(pred, mask, spacing) -> float:
    """FPV in ml: the components of `pred` that touch no voxel of `mask`."""
    return volume_ml(component_overlap(pred, mask).apart_voxels, pred, spacing)


def false_negative_volume(pred, mask, spacing) -> float:
    """FNV in ml: the components of `mask` that touch no voxel of `pred`."""
    return volume_ml(component_overlap(mask, pred).apart_voxels, mask, spacing)


def lesion_detection(lesions: ComponentOverlap, predicted: ComponentOverlap) -> dict[str, float]:
    """Numbers of found, missed and falsely found lesions, and their F1.

    A lesion is found if it shares a voxel with the prediction. F1 is NaN if both masks are empty.
    """
    total = 2 * lesions.touching + lesions.apart + predicted.apart
    return {
        "lesions_found": lesions.touching,
        "lesions_missed": lesions.apart,
        "lesions_false": predicted.apart,
        "lesion_f1": 2 * lesions.touching / total if total else math.nan,
    }


def named_masks(classes: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Masks by name from a map whose bit k is class names[k]; the unions of classes come first."""
    masks = {}
    for bit, name in enumerate(names):
        masks[name] = (classes >> bit & 1).astype(bool)

    unions = {}
    for union, parts in UNIONS.items():
        if set(parts) <= set(names):
            unions[union] = np.any([masks[part] for part in parts], axis=0)
    return unions | masks


def score_study(
    pred: np.ndarray, truth: np.ndarray, names: tuple[str, ...], spacing
) -> dict[str, float]:
    """The metrics of one study by name, from two bit maps (see named_masks) on one grid.

    One class has the metrics of the challenge, several have the Dice and the volumes of each.
    """
    pred_masks, true_masks = named_masks(pred, names), named_masks(truth, names)
    if len(names) == 1:
        return score_lesions(pred_masks[names[0]], true_masks[names[0]], spacing)

    voxel_ml = np.prod(spacing) / 1000
    scores = {}
    for name, mask in pred_masks.items():
        scores[f"dice_{name}"] = dice(mask, true_masks[name])
    for name, mask in pred_masks.items():
        scores[f"{name}_pred_ml"] = float(mask.sum() * voxel_ml)
    for name, mask in true_masks.items():
        scores[f"{name}_true_ml"] = float(mask.sum() * voxel_ml)
    return scores


def score_lesions(pred: np.ndarray, truth: np.ndarray, spacing) -> dict[str, float]:
    """The metrics of the challenge, the metabolic tumour volumes (MTV) and the lesion counts."""
    lesions = component_overlap(truth, pred)
    predicted = component_overlap(pred, truth)
    voxel_ml = np.prod(spacing) / 1000
    return {
        "dice": dice(pred, truth),
        "fpv_ml": volume_ml(predicted.apart_voxels, pred, spacing),
        "fnv_ml": volume_ml(lesions.apart_voxels, truth, spacing),
        "mtv_pred_ml": float(pred.sum() * voxel_ml),
        "mtv_true_ml": float(truth.sum() * voxel_ml),
        **lesion_detection(lesions, predicted),
    }


def organ_dices(pred: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Dice of each organ from two label maps, and their mean; NaN where an organ is in neither."""
    labels = len(names) + 1
    pred_sizes = np.bincount(pred[pred > 0], minlength=labels)
    true_sizes = np.bincount(truth[truth > 0], minlength=labels)
    common = np.bincount(pred[(pred == truth) & (pred > 0)], minlength=labels)
    with np.errstate(invalid="ignore"):
        dices = (2 * common / (pred_sizes + true_sizes))[1:].tolist()

    scores = {"organ_dice": mean_without_nan(dices)}
    for name, value in zip(names, dices, strict=True):
        scores[f"organ_dice_{name}"] = value
    return scores


def mean_without_nan(values) -> float:
    """The mean of those values that are numbers; NaN if none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan


# ------------------------------------------------------------------ many studies

# A threshold on SUV, which needs no network, by the name of its row: the prefix of its columns.
THRESHOLDS = {f"SUV ≥ {suv:g} threshold": f"suv{suv:g}_" for suv in THRESHOLDS_SUV}
# Whose mask a metric is of, and how the columns of its metrics begin.
MASK_SOURCES = {"model": "", "CT branch": "ct_", "PET branch": "pet_", **THRESHOLDS}


def mean_and_interval(values: pd.Series, studies: pd.DataFrame) -> dict:
    """The mean of n values, their standard deviation, and low and high, its 95 % interval.

    Without values the mean is None; of a single patient there is no interval.
    """
    count = len(values)
    result = {
        "mean": float(values.mean()) if count else None,
        "std": float(values.std(ddof=1)) if count > 1 else None,
        "n": count,
    }
    low, high = interval(values, studies["patient"])
    if not math.isnan(low):
        result.update(low=low, high=high)
    return result


def accuracy(scores: pd.Series, studies: pd.DataFrame) -> dict:
    """The share of studies that a score above 1/2 calls rightly: with a lesion, or without."""
    return {"mean": float(((scores > 0.5) == studies["has_lesion"]).mean()), "n": len(scores)}


def roc_auc(scores: pd.Series, studies: pd.DataFrame) -> dict:
    """The area under the ROC curve; None if all studies, or none, have a lesion."""
    positive = scores[studies["has_lesion"]]
    negative = scores[~studies["has_lesion"]]
    pairs = len(positive) * len(negative)
    area = float(stats.mannwhitneyu(positive, negative).statistic / pairs) if pairs else None
    return {"mean": area, "n": len(scores)}


class Metric(NamedTuple):
    """A row of the tables of results.

    column: in <part>_studies.csv, where {} stands for a prefix of MASK_SOURCES.
    studies: which of them count: "all", those with a lesion ("positive") or without ("negative").
    average: a function of their values and of their rows.
    """

    name: str
    title: str
    column: str
    studies: str = "all"
    average: Callable = mean_and_interval


METRICS = (
    Metric("dice", "Dice", "{}dice", "positive"),
    Metric("fpv_ml", "FPV ml", "{}fpv_ml"),
    Metric("fpv_healthy_ml", "healthy FPV ml", "{}fpv_ml", "negative"),
    Metric("fnv_ml", "FNV ml", "{}fnv_ml", "positive"),
    Metric("lesion_f1", "lesion F1", "{}lesion_f1"),
    Metric("organ_dice", "organ Dice", "{}organ_dice"),
    Metric("mtv_pred_ml", "MTV ml", "{}mtv_pred_ml", "positive"),
    Metric("mtv_true_ml", "true MTV ml", "mtv_true_ml", "positive"),
    Metric("tumor_accuracy", "T accuracy", "{}tumor_score", average=accuracy),
    Metric("tumor_accuracy_val", "T accuracy, own cut", "{}tumor_called", average=accuracy),
    Metric("tumor_auc", "T AUC", "{}tumor_score", average=roc_auc),
)
EMPTY_MASK_RULES = {  # by a metric that shows which kind of data it is
    "fpv_ml": "Dice, FNV, MTV: studies with a lesion (n). FPV: all studies; a false alarm in a "
    "healthy study counts there. Empty masks as in AutoPET 2022; the studies' own grid.",
    "dice_whole": "Dice; whole = core ∪ edema. A class absent from mask and prediction is left out "
    "(n).",
}


def metrics_by_name(names) -> dict[str, Metric]:
    """METRICS by name, and one for each dice_<class> and organ_dice_<organ> among the names."""
    metrics = {metric.name: metric for metric in METRICS}
    for name in names:
        if re.match("(organ_)?dice_", name):
            title = re.sub("^(organ_)?dice_", "", name)
            metrics[name] = Metric(name, title, "{}" + name)
    return metrics


def metric_values(studies: pd.DataFrame, metric: Metric, prefix: str = "") -> pd.Series:
    """The values that count for a metric: those of its studies, where there is a number."""
    has_lesion = studies["has_lesion"].astype(bool)
    if metric.studies == "positive":
        studies = studies[has_lesion]
    elif metric.studies == "negative":
        studies = studies[~has_lesion]
    return studies[metric.column.format(prefix)].dropna().astype(float)


def metric_means(studies: pd.DataFrame, prefix: str) -> dict[str, dict]:
    """{metric: {"mean", "n", ...}} of the columns that begin with a prefix of MASK_SOURCES."""
    means = {}
    for name, metric in metrics_by_name(studies).items():
        if metric.column.format(prefix) in studies:
            values = metric_values(studies, metric, prefix)
            means[name] = metric.average(values, studies.loc[values.index])
    return means


def summarize_studies(rows: list[dict]) -> dict[str, dict]:
    """The metric_means of each source of masks, from a row per study.

    rows: they hold study, patient, has_lesion and metrics. Where the studies' names hold different
    tracers, as those of AutoPET (fdg_...) and DEEP-PSMA (.../FDG) do, there is also
    "<source>, <tracer>".
    """
    studies = pd.DataFrame(rows)
    tracers = studies["study"].str.extract(r"(?i)(?:^|/)(fdg|psma)(?:_|$)")[0].str.lower()
    summary = {}
    for source, prefix in MASK_SOURCES.items():
        if not studies.columns.str.startswith(prefix).any():
            continue
        summary[source] = metric_means(studies, prefix)
        if tracers.nunique() > 1:
            for tracer, part in studies.groupby(tracers):
                summary[f"{source}, {tracer}"] = metric_means(part, prefix)
    return summary


# ------------------------------------------------------------------ tables of results


def empty_mask_rule(names) -> str:
    """Which studies count for the metrics `names`, in whole sentences."""
    return "\n".join(rule for name, rule in EMPTY_MASK_RULES.items() if name in names)


def align_columns(rows: list[list[str]], markdown: bool = False) -> str:
    """Rows of text, the heading first, as a table: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    dashes = ["-" * (width - 1) + ":" for width in widths]
    dashes[0] = "-" * widths[0]

    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        lines.insert(1, f"| {' | '.join(dashes)} |")
    return "\n".join(lines)


def format_mean(value: dict) -> str:
    """A mean as the table shows it, with its 95 % interval and (n); a dash if there is none."""
    if value.get("mean") is None:
        return "-"
    spread = f" [{value['low']:.3f}, {value['high']:.3f}]" if "low" in value else ""
    return f"{value['mean']:.3f}{spread} ({value['n']})"


def results_table(systems: dict[str, dict]) -> str:
    """A column per system and a row per metric, and below the rule for empty masks."""
    names = list(itertools.chain(*systems.values()))
    rows = [["", *systems]]
    for name, metric in metrics_by_name(names).items():
        if name in names:
            cells = [metric.title]
            for means in systems.values():
                cells.append(format_mean(means.get(name, {})))
            rows.append(cells)
    return f"{align_columns(rows)}\n{empty_mask_rule(names)}"


def systems_of_run(name: str, summary: dict) -> dict[str, dict]:
    """The summary of a run as columns of results_table: its name stands in place of "model"."""
    return {source.replace("model", name): means for source, means in summary.items()}
