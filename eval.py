"""Evaluation and prediction of trained runs.

    python eval.py runs/A runs/B            one table for the test studies of several runs
    python eval.py runs/A --predict STUDIES --out DIR    masks (NIfTI) for studies without labels

Dice, FPV and FNV follow the AutoPET challenge, on the grid of the study's own files.
"""

from __future__ import annotations

import argparse
import gzip
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage, stats
from torch import Tensor

from baselines import LATE_FUSIONS, PAPER_TABLES
from data import (
    THRESHOLD_SUV,
    BadStudy,
    Case,
    UserError,
    atomic,
    body_box,
    find_studies,
    preprocess,
    preprocessing,
    progress,
    read_json,
    to_native,
    write_json,
)
from mirror_unet import DATA_NAMES, decide, margins

EIGHTEEN = ndimage.generate_binary_structure(3, 2)  # faces and edges join, corners do not
THRESHOLD = f"SUV ≥ {THRESHOLD_SUV:g} threshold"

# ------------------------------------------------------------------ metrics of the challenge


def binary_pair(pred, mask) -> tuple[np.ndarray, np.ndarray]:
    pred, mask = (a if a.dtype == bool else a != 0 for a in map(np.asarray, (pred, mask)))
    if pred.shape != mask.shape:
        raise ValueError(f"prediction {pred.shape} and mask {mask.shape} lie on different grids")
    return pred, mask


def dice(pred, mask) -> float:
    """2 |G ∩ P| / (|G| + |P|) of two masks of one shape; non-zero is foreground.

    Empty masks as in AutoPET 2022: NaN if both are empty, 0 if only one is.
    """
    pred, mask = binary_pair(pred, mask)
    total = np.count_nonzero(pred) + np.count_nonzero(mask)
    return float(2 * np.count_nonzero(pred & mask) / total) if total else math.nan


def false_positive_volume(pred, mask, spacing) -> float:
    """FPV in ml: the 18-connected components of pred that touch no voxel of mask.

    pred, mask (W, H, D); spacing in mm per axis, in the same order.
    """
    pred, mask = binary_pair(pred, mask)
    return unmatched_volume(pred, mask, spacing)


def false_negative_volume(pred, mask, spacing) -> float:
    """FNV in ml: the 18-connected components of mask that touch no voxel of pred."""
    pred, mask = binary_pair(pred, mask)
    return unmatched_volume(mask, pred, spacing)


def unmatched_volume(a: np.ndarray, b: np.ndarray, spacing) -> float:
    """Volume in ml of the components of a without a voxel of b; labelled inside a's box only."""
    if len(np.atleast_1d(spacing)) != a.ndim:
        raise ValueError(f"spacing {spacing}: one number per axis of {a.shape}, in mm")
    if not a.any():
        return 0.0
    box = tuple(slice(*ends) for ends in body_box(a, margin=(0, 0, 0)))
    a, b = a[box], b[box]
    regions, count = ndimage.label(a, EIGHTEEN)
    touched = np.zeros(count + 1, bool)
    touched[regions[b]] = True
    touched[0] = True
    sizes = np.bincount(regions[a], minlength=count + 1)
    return float(sizes[~touched].sum() * np.prod(spacing) / 1000)


def named_masks(classes: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Masks by name from a map whose bit k is class names[k]; whole = core ∪ edema (Sec. 3.3)."""
    masks = {name: (classes >> bit & 1).astype(bool) for bit, name in enumerate(names)}
    if "core" in masks:
        masks["whole"] = classes > 0
    return masks


def score(pred: np.ndarray, truth: np.ndarray, names: tuple[str, ...], spacing) -> dict[str, float]:
    """Metrics of one study from two bit maps (see named_masks) on one grid."""
    ml = np.prod(spacing) / 1000
    p, g = named_masks(pred, names), named_masks(truth, names)
    if names == ("lesion",):
        return {
            "dice": dice(p["lesion"], g["lesion"]),
            "fpv_ml": false_positive_volume(p["lesion"], g["lesion"], spacing),
            "fnv_ml": false_negative_volume(p["lesion"], g["lesion"], spacing),
            "mtv_pred_ml": float(p["lesion"].sum() * ml),
            "mtv_true_ml": float(g["lesion"].sum() * ml),
        }
    row = {f"dice_{name}": dice(p[name], g[name]) for name in ("whole", "edema", "core")}
    row |= {f"{name}_pred_ml": float(p[name].sum() * ml) for name in ("whole", "edema", "core")}
    return row | {
        f"{name}_true_ml": float(g[name].sum() * ml) for name in ("whole", "edema", "core")
    }


# ------------------------------------------------------------------ sliding windows


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis; the last window ends at the border."""
    step = max(1, int(patch * (1 - overlap)))
    count = max(1, math.ceil((size - patch) / step) + 1)
    return [min(i * step, size - patch) for i in range(count)]


def window_weights(patch, kind: str) -> Tensor:
    """Weight of each voxel of a window (W, H, D): "constant", or "gaussian" with σ = side / 8."""
    if kind == "constant":
        return torch.ones(tuple(patch))
    weight = torch.ones(())
    for side in patch:
        x = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (x / (side / 8)) ** 2)
    return weight.clamp_min(1e-3)  # far corners must not divide by nothing


def sliding_window(
    run: Callable,
    image: np.ndarray,
    patch,
    overlap: float = 0.25,
    weights: str = "constant",
    batch: int = 4,
    device: str | torch.device = "cpu",
    reads: tuple[int, ...] = (0, 1),
) -> tuple[Tensor, float]:
    """Apply `run` to windows of `image` (2, W, H, D) and average where they overlap.

    run: (B, 2, w, h, d) on `device` -> maps (B, K, w, h, d) and scores (B,) or None. reads: the
    channels that run depends on; windows that are zero in all of them have one answer, which is
    computed once. Returns the map (K, W, H, D), float32, and the highest score (NaN without).
    Runs out of device memory? Then the sums move to the CPU, then fewer windows go at once.
    """
    device = torch.device(device)
    home = device
    while True:
        try:
            return stitch(run, image, patch, overlap, weights, batch, device, home, reads)
        except torch.OutOfMemoryError:
            if home.type != "cpu":
                home = torch.device("cpu")
            elif batch > 1:
                batch //= 2
            else:
                raise UserError(
                    f"{device} has no memory for one window of {tuple(patch)}. Close what else "
                    "runs there, or use --device cpu."
                ) from None
        torch.cuda.empty_cache()


def stitch(run, image, patch, overlap, weights, batch, device, home, reads):
    """One attempt of sliding_window with the sums on the device `home`."""
    lack = [max(p - n, 0) for p, n in zip(patch, image.shape[1:], strict=True)]
    if any(lack):  # smaller than a window: zeros around, as in training
        image = np.pad(image, [(0, 0), *((n // 2, n - n // 2) for n in lack)])
    shape = image.shape[1:]
    axes = [window_starts(n, p, overlap) for n, p in zip(shape, patch, strict=True)]
    corners = [(x, y, z) for x in axes[0] for y in axes[1] for z in axes[2]]
    boxes = [
        tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True)) for corner in corners
    ]
    weight = window_weights(patch, weights).to(home)
    total, norm, best = None, torch.zeros(shape, device=home), -math.inf

    def add(box, values, value_score):
        nonlocal total, best
        if total is None:
            total = torch.zeros((values.shape[0], *shape), device=home)
        total[(slice(None), *box)] += values.to(home, torch.float32) * weight
        norm[box] += weight
        if value_score is not None:
            best = max(best, float(value_score))

    image = torch.from_numpy(np.array(image))  # a copy: a memory map is read-only
    blank = [not image[(list(reads), *box)].any() for box in boxes]
    busy = [box for box, empty in zip(boxes, blank, strict=True) if not empty]
    image = image.to(home)
    if any(blank):
        maps, scores = run(torch.zeros((1, 2, *patch), device=device))
        for box in (b for b, empty in zip(boxes, blank, strict=True) if empty):
            add(box, maps[0], None if scores is None else scores[0])
    for first in range(0, len(busy), batch):
        group = busy[first : first + batch]
        windows = torch.stack([image[(slice(None), *box)] for box in group])
        maps, scores = run(windows.to(device, torch.float32))
        for i, box in enumerate(group):
            add(box, maps[i], None if scores is None else scores[i])
    total /= norm
    before = [n // 2 for n in lack]
    inner = tuple(slice(b, n - (m - b)) for b, n, m in zip(before, shape, lack, strict=True))
    return total[(slice(None), *inner)], best if best > -math.inf else math.nan


def autocast(device: torch.device, amp: str):
    """Mixed precision for the forward pass: amp "none", "bf16" or "fp16"."""
    if amp == "none":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16)


def see(images: Tensor, modality: str) -> Tensor:
    """What the network is given of images (B, 2, W, H, D): both, or one modality in both places
    (CT-only and PET-only Mirror U-Net, Sec. 4.2)."""
    return {"both": images, "ct": images[:, [0, 0]], "pet": images[:, [1, 1]]}[modality]


def infer(model, image: np.ndarray, config, device, heads=("seg",)) -> tuple[np.ndarray, float]:
    """Margins (K, W, H, D) of the first of `heads` for one preprocessed study and, if "tumor" is
    another, the highest tumour probability of a window (else NaN). Only `heads` are computed."""
    pet_alone = config.bottleneck == "own" and model.variant.ct == "rec" and heads == ("seg",)
    reads = {"both": (1,) if pet_alone else (0, 1), "ct": (0,), "pet": (1,)}[config.modality]

    @torch.inference_mode()
    def run(windows: Tensor):
        with autocast(device, config.amp):
            windows = see(windows, config.modality)
            out = model(windows[:, :1], windows[:, 1:], heads=heads)
        tumor = None if out.tumor is None else out.tumor.float().sigmoid()
        return margins(getattr(out, heads[0]).float()), tumor

    model.eval()
    margin, tumor = sliding_window(
        run, image, config.patch, config.overlap, config.window_weights, config.window_batch,
        device, reads,
    )  # fmt: skip
    return margin.cpu().numpy(), tumor


def bits(margin: np.ndarray, variant) -> np.ndarray:
    """uint8 map whose bit k says that class k of the variant is present."""
    present = decide(margin, variant)
    return sum(p.astype(np.uint8) << k for k, p in enumerate(present)).astype(np.uint8)


def fuse_late(a: np.ndarray, b: np.ndarray, mode: str, variant) -> np.ndarray:
    """Bits of the late fusion of two networks' margins (Table 3): "logits" averages them, which has
    the mask of their sum; "union" and "intersection" are those of their masks."""
    if mode == "logits":
        return bits((a + b) / 2, variant)
    a, b = bits(a, variant), bits(b, variant)
    return a | b if mode == "union" else a & b


def label_map(margin: np.ndarray) -> np.ndarray:
    """uint8 labels 0, 1 .. K; where two classes are present, the larger margin wins."""
    labels = np.zeros(margin.shape[1:], np.uint8)
    best = np.zeros(margin.shape[1:], np.float32)
    for k, m in enumerate(margin, start=1):
        wins = m > best
        labels[wins] = k
        np.maximum(best, m, out=best)
    return labels


# ------------------------------------------------------------------ evaluation


def evaluate(
    model, cases: list[Case], config, device, native: bool = True, bar: str = "", late=None
) -> list:
    """A row of metrics per study, a dict.

    native: on the grid of the study's files (the reported results); else on the cached grid (the
    validation during training). For PET/CT a native row also has the columns suv4_*, the same
    metrics of the voxels with SUV >= 4. late: (second model, its config, mode of LATE_FUSIONS).
    """
    names = model.variant.classes
    heads = ("seg", "tumor") if model.variant.tumor and native and not late else ("seg",)
    rows = []
    for case in progress(cases, bar, "study") if bar else cases:
        margin, tumor = infer(model, case.load("images"), config, device, heads)

        def classify(m):
            return bits(m, model.variant)

        if late:
            partner, partner_config, mode = late
            second, _ = infer(partner, case.load("images"), partner_config, device)
            margin = np.concatenate([margin, second])

            def classify(m, mode=mode):
                return fuse_late(*np.split(m, 2), mode, model.variant)

        row = {"study": case.name, "patient": case.patient, "has_lesion": case.has_lesion}
        if native:
            spacing = native_spacing(case)
            pred = to_native(case.meta, margin, classify)
            # classes 1 and 2 of a mask are disjoint, so as bits they are the same numbers
            truth = case.native("native_label", case.load("native_class"))
        else:
            spacing = case.meta["spacing"]
            pred, truth = bits(margin, model.variant), case.load("label")
        row |= score(pred, truth, names, spacing)
        if native and names == ("lesion",):
            hot = score(case.native("native_hot"), truth, names, spacing)
            row |= {f"suv4_{k}": v for k, v in hot.items() if k != "mtv_true_ml"}
            for branch in getattr(model, "branches", ()):  # Valindria's, each for itself
                alone, _ = infer(model, case.load("images"), config, device, (f"{branch}_seg",))
                mask = to_native(case.meta, alone, lambda m: bits(m, model.variant))
                own = score(mask, truth, names, spacing)
                row |= {f"{branch}_{k}": v for k, v in own.items() if k != "mtv_true_ml"}
        if "tumor" in heads:
            row["tumor_score"] = tumor
        rows.append(row)
    return rows


def native_spacing(case: Case) -> np.ndarray:
    """Spacing in mm along the axes of the study's files."""
    return np.linalg.norm(np.array(case.meta["native_affine"])[:3, :3], axis=0)


def summarize(rows: list[dict], kind: str) -> dict:
    """Means over studies with their counts: {system: {metric: {"mean", "std", "n"}}}.

    PET/CT: Dice, FNV and MTV over the studies with a lesion, FPV over all of them and over the
    healthy ones alone. MRI: Dice per class over the studies where mask or prediction has it.
    """
    frame = pd.DataFrame(rows)

    def mean(column: str, chosen) -> dict:
        values = frame.loc[chosen, column].dropna().astype(float)
        n = len(values)
        return {
            "mean": float(values.mean()) if n else None,
            "std": float(values.std(ddof=1)) if n > 1 else None,
            "n": n,
        }

    everyone = pd.Series(True, index=frame.index)
    if kind == "mri":
        return {
            "model": {f"dice_{c}": mean(f"dice_{c}", everyone) for c in ("whole", "edema", "core")}
        }
    ill = frame["has_lesion"].astype(bool)
    summary = {}
    systems = {"model": "", "CT branch": "ct_", "PET branch": "pet_", THRESHOLD: "suv4_"}
    for system, prefix in systems.items():
        if f"{prefix}dice" not in frame:
            continue
        summary[system] = {
            "dice": mean(f"{prefix}dice", ill),
            "fpv_ml": mean(f"{prefix}fpv_ml", everyone),
            "fpv_healthy_ml": mean(f"{prefix}fpv_ml", ~ill),
            "fnv_ml": mean(f"{prefix}fnv_ml", ill),
            "mtv_pred_ml": mean(f"{prefix}mtv_pred_ml", ill),
            "mtv_true_ml": mean("mtv_true_ml", ill),
        }
    if "tumor_score" in frame:
        summary["model"] |= classification(frame["tumor_score"], ill)
    return summary


def classification(scores: pd.Series, ill: pd.Series) -> dict:
    """Accuracy at 0.5 and AUC of the study scores of T (v3); AUC is None with one class only."""
    n, positive = len(scores), int(ill.sum())
    auc = None
    if 0 < positive < n:
        u = stats.mannwhitneyu(scores[ill], scores[~ill]).statistic
        auc = float(u / (positive * (n - positive)))
    accuracy = float(((scores > 0.5) == ill).mean())
    return {"tumor_accuracy": {"mean": accuracy, "n": n}, "tumor_auc": {"mean": auc, "n": n}}


TITLES = {
    "dice": "Dice", "fpv_ml": "FPV ml", "fpv_healthy_ml": "healthy FPV ml", "fnv_ml": "FNV ml",
    "mtv_pred_ml": "MTV ml", "mtv_true_ml": "true MTV ml", "tumor_accuracy": "T accuracy",
    "tumor_auc": "T AUC", "dice_whole": "whole", "dice_edema": "edema", "dice_core": "core",
}  # fmt: skip
RULES = {
    "petct": "Dice, FNV, MTV: studies with a lesion (n). FPV: all studies; a false alarm in a "
    "healthy study counts there. Empty masks as in AutoPET 2022; the studies' own grid.",
    "mri": "Dice; whole = core ∪ edema. A class absent from mask and prediction is left out (n).",
}


def results_table(systems: dict[str, dict], kind: str) -> str:
    """Aligned text: a row per system, mean and (n) per metric, and the rule for empty masks."""
    columns = [c for c in TITLES if any(c in s for s in systems.values())]

    def cell(value: dict | None) -> str:
        if not value or value["mean"] is None:
            return "-"
        return f"{value['mean']:.3f} ({value['n']})"

    rows = [["", *(TITLES[c] for c in columns)]]
    rows += [[name, *(cell(s.get(c)) for c in columns)] for name, s in systems.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        lines.append(
            "  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        )
    return "\n".join([*lines, RULES[kind]])


def rows_of(name: str, summary: dict) -> dict[str, dict]:
    """The rows of results_table for one run: the model under the run's name, then the threshold."""
    return {name if system == "model" else system: values for system, values in summary.items()}


def write_results(folder: Path, part: str, rows: list[dict], kind: str, about: dict) -> dict:
    """Write <part>_studies.csv and, for test, summary.json, else <part>_summary.json, into folder;
    returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{part}_studies.csv") as file:
        file.write(pd.DataFrame(rows).to_csv(index=False).encode())
    summary = summarize(rows, kind)
    name = "summary.json" if part == "test" else f"{part}_summary.json"
    write_json(folder / name, {"rule": RULES[kind], "part": part, **about, "systems": summary})
    return summary


# ------------------------------------------------------------------ the paper's Tables 3-5


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % confidence interval of the mean over studies, by bootstrap with a fixed seed."""
    if len(values) < 2:
        return math.nan, math.nan
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def paired_p(ours: pd.Series, theirs: pd.Series) -> float:
    """p of Wilcoxon's signed-rank test on the studies that both have; NaN if all are equal."""
    both = pd.concat([ours, theirs], axis=1, join="inner").dropna()
    difference = both.iloc[:, 0] - both.iloc[:, 1]
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else math.nan


def finished_runs(root: Path, kind: str) -> dict[str, list[Path]]:
    """Runs below `root` with test results, by system, newest last; "<system> own" for --recipe own.

    Only what train.py and --late-fusion write counts, not other evaluations of a run; trials of a
    search count if `root` is its folder.
    """
    runs: dict[str, list[Path]] = {}
    for summary in sorted(root.glob("**/summary.json"), key=lambda path: path.stat().st_mtime):
        run = summary.parent
        if not ((run / "config.json").exists() and (run / "test_studies.csv").exists()):
            continue
        if (run / "trial.json").exists() and run.parent != root:
            continue
        record = read_json(run / "config.json")
        saved = record.get("config", {}) if isinstance(record, dict) else {}
        name = saved.get("version")
        if name is None or saved.get("kind") != kind:
            continue
        if saved.get("modality", "both") != "both" and not name.endswith("_only"):
            name = f"{name}_{saved['modality']}_only"
        own = " own" if saved.get("recipe", "matched") == "own" else ""
        runs.setdefault(name + own, []).append(run)
    return runs


def paper_table(number: int, root: Path) -> tuple[pd.DataFrame, list[str]]:
    """Table `number` of the paper: a row per system in its order, its figures beside ours.

    Ours are means over the test studies (Dice in %, volumes in ml) as in `summarize`, with 95 %
    bootstrap intervals (_low, _high), counts (_n) and, for Dice, the p of a paired test against
    Mirror U-Net v3 (Table 5: v2) on the _p_n studies that both have. A system without a run keeps
    its row, empty; runs with their own recipe follow in rows of their own. Also returns what a
    reader of the table must know.
    """
    mri = number == 5
    runs = finished_runs(root, "mri" if mri else "petct")
    metrics = (
        [f"dice_{c}" for c in ("whole", "edema", "core")] if mri else ["dice", "fpv_ml", "fnv_ml"]
    )
    reference = "v2" if mri else "v3"
    listed = list(PAPER_TABLES[number])
    listed += [
        (f"{name} own", f"{title}, own recipe", *[math.nan] * 3)
        for name, title, *_ in PAPER_TABLES[number]
        if f"{name} own" in runs
    ]
    frames = {
        name: pd.read_csv(runs[name][-1] / "test_studies.csv").set_index("study")
        for name, *_ in listed
        if name in runs
    }
    rows = []
    for name, title, *published in listed:
        row = {"system": name, "title": title, "run": str(runs[name][-1]) if name in runs else ""}
        for metric, figure in zip(metrics, published, strict=True):
            keys = ("", "_low", "_high", "_n", "_p", "_p_n")
            row |= {f"{metric}_paper": figure} | {f"{metric}{key}": math.nan for key in keys}
            if name not in frames:
                continue
            values, ours = (per_study(frames.get(n), metric) for n in (name, reference))
            low, high = interval(values.to_numpy())
            found = {"": values.mean(), "_low": low, "_high": high, "_n": len(values)}
            if ours is not None and name != reference and metric.startswith("dice"):
                found["_p_n"] = len(values.index.intersection(ours.index))
                found["_p"] = paired_p(ours, values)
            row |= {f"{metric}{key}": value for key, value in found.items()}
        rows.append(row)
    notes = []
    if missing := [name for name, *_ in listed if name not in frames]:
        notes.append(f"not run: {', '.join(missing)}")
    for name in frames:
        if len(runs[name]) > 1:
            notes.append(f"{name}: {len(runs[name])} runs, the newest is {runs[name][-1]}")
    if len({frozenset(frame.index) for frame in frames.values()}) > 1:
        notes.append("These runs were tested on different studies: their rows are not comparable.")
    return pd.DataFrame(rows), notes


def per_study(frame: pd.DataFrame | None, metric: str) -> pd.Series | None:
    """One metric by study: Dice in %, FNV and Dice of PET/CT where there is a lesion."""
    if frame is None:
        return None
    everyone = metric == "fpv_ml" or metric.startswith("dice_")
    kept = frame if everyone else frame[frame["has_lesion"].astype(bool)]
    return kept[metric].dropna() * (100 if metric.startswith("dice") else 1)


def write_paper_table(number: int, root: Path, out: Path) -> str:
    """Write table<number>.csv and .md into `out`; the Markdown, which also reads well as text."""
    table, notes = paper_table(number, root)
    names = {"dice": "Dice", "fpv_ml": "FPV", "fnv_ml": "FNV", "dice_whole": "Whole",
             "dice_edema": "Edema", "dice_core": "Core"}  # fmt: skip
    metrics = [m for m in names if m in table]

    def here(row, m: str) -> str:
        if not row["run"]:
            return "not run"
        if pd.isna(row[m]):
            return "-"
        spread = f" [{row[f'{m}_low']:.1f}-{row[f'{m}_high']:.1f}]" if row[f"{m}_n"] > 1 else ""
        return f"{row[m]:.2f}{spread} n={row[f'{m}_n']:.0f}"

    rows = [["Method", *(f"{names[m]} {who}" for m in metrics for who in ("paper", "here"))]]
    for _, row in table.iterrows():
        papers = {m: row[f"{m}_paper"] for m in metrics}
        cells = [(f"{p:.2f}" if p == p else "-", here(row, m)) for m, p in papers.items()]
        rows.append([row["title"], *(text for pair in cells for text in pair)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    text = "\n".join([*lines, *(["", *notes] if notes else [])])
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / f"table{number}.csv") as file:
        file.write(table.to_csv(index=False).encode())
    with atomic(out / f"table{number}.md") as file:
        file.write((text + "\n").encode())
    return text


# ------------------------------------------------------------------ prediction


def write_mask(path: Path, mask: np.ndarray, source: Path) -> None:
    """Write a uint8 mask in the geometry of `source`, header codes included, as NIfTI."""
    header = nib.load(source).header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"Mirror U-Net mask"
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(gzip.compress(kind(mask, None, header).to_bytes(), 6, mtime=0))


def predict(
    model, config, studies_dir: Path, out: Path, device, skip_bad: bool = False
) -> list[Path]:
    """Masks for every study below `studies_dir`, written to `out`/<study>.nii.gz; the paths.

    Labels: 1 lesion; MRI 1 edema, 2 core. Raises UserError for studies of another kind than the
    run's and, after all good ones are written, for bad ones (unless skip_bad).
    """
    found = find_studies(studies_dir, labelled=False)
    if found.kind != config.kind:
        raise UserError(
            f"{studies_dir}: holds {DATA_NAMES[found.kind]} studies, the run was trained on "
            f"{DATA_NAMES[config.kind]}. Choose a run of that kind."
        )
    findings, written = list(found.findings), []
    for study in progress(found.studies, "predict", "study"):
        try:
            arrays, meta = preprocess(replace(study, label=None), preprocessing(config))
        except BadStudy as error:
            findings += error.findings
            continue
        margin, _ = infer(model, arrays["images"], config, device)
        path = out / f"{study.name.replace('/', '__')}.nii.gz"
        write_mask(path, to_native(meta, margin, label_map), study.pet.path)
        written.append(path)
    if findings:
        lines = "\n".join(f"  {finding}" for finding in sorted(findings))
        message = f"{len(findings)} problems; {len(written)} studies were predicted:\n{lines}"
        if not skip_bad:
            raise UserError(message)
        print(f"left out   {message}", file=sys.stderr)
    return written


# ------------------------------------------------------------------ command line

# Options of train.Config that evaluation takes; what is not given stays as the run had it.
EVAL_OPTIONS = (
    "data", "cache", "device", "amp", "threads", "workers", "overlap", "window_weights",
    "window_batch", "check", "skip_bad",
)  # fmt: skip


def load_run(run: Path, checkpoint: str, given: dict):
    """Model, config and device of a trained run, with the options `given` on the command line."""
    from train import (
        build_model,
        choose_amp,
        choose_device,
        load_checkpoint,
        resolve,
        saved_config,
    )

    weights = load_checkpoint(run / f"{checkpoint}.pt")
    dice_then = weights.pop("val_dice", math.nan)  # last.pt has none
    weights["val_dice"] = None if math.isnan(dice_then) else dice_then
    config = replace(saved_config(run), **given)
    config = resolve(config, config.kind, phantom=config.data is None)
    device = choose_device(config.device)
    if "amp" not in given and device.type != read_json(run / "config.json").get("ran_on"):
        config = replace(config, amp="auto")  # trained on another kind of device
    config = choose_amp(config, device)
    if config.threads:
        torch.set_num_threads(config.threads)
    model = build_model(config)
    try:
        model.load_state_dict(weights["model"])
    except RuntimeError:
        raise UserError(
            f"{run / checkpoint}.pt: its network is not that of config.json. Do not mix runs."
        ) from None
    return model.to(device, memory_format=torch.channels_last_3d), config, device, weights


def choose_cases(run: Path, args, given: dict, cases: list[Case]) -> tuple[str, list[Case]]:
    """The part to evaluate and its studies: --part of the run's own splits ("test"), or "all" of
    another --data. Says so if the run has seen some of them."""
    names = read_json(run / "splits.json")
    known = {name for own in names.values() for name in own} & {case.name for case in cases}
    part = args.part or ("test" if known or "data" not in given else "all")
    if part == "all":
        chosen = cases
    else:
        chosen = [case for case in cases if case.name in set(names[part])]
        if missing := sorted(set(names[part]) - {case.name for case in chosen}):
            raise UserError(
                f"{run}: {len(missing)} studies of its {part} part are not in the data, the first "
                f"is {missing[0]}. Give their folder with --data, or --part all."
            )
    seen = {case.name for case in chosen} & {*names["train"], *names["val"]}
    if seen:
        say = f"{run}: {len(seen)} of these {len(chosen)} studies trained or selected it"
        print(say, file=sys.stderr)
    return part, chosen


def evaluate_run(run: Path, args, given: dict, late: Path | None = None):
    """Evaluate one run on a part of its splits, or on all studies of another --data; with `late`,
    its late fusion with that run.

    Returns the summary, the kind of data and the names of the studies.
    """
    from train import open_data, plain

    model, config, device, weights = load_run(run, args.checkpoint, given)
    config, cases = open_data(config, lambda text: print(text, file=sys.stderr))
    part, cases = choose_cases(run, args, given, cases)
    partner = None
    folder = args.out / run.name if args.out else run / "evaluation"
    if late:
        second, second_config, _, _ = load_run(late, args.checkpoint, given)
        if (config.version, second_config.version) != ("ct", "pet"):
            raise UserError(
                f"--late-fusion takes a run of `ct`, then one of `pet`, not {config.version} and "
                f"{second_config.version}."
            )
        same = ("kind", "spacing")
        if [getattr(config, n) for n in same] != [getattr(second_config, n) for n in same]:
            raise UserError(f"{late}: kind or spacing differ from those of {run}.")
        if read_json(run / "splits.json") != read_json(late / "splits.json"):
            raise UserError(f"{late}: trained on other studies than {run}. Use the same splits.")
        partner = (second, second_config, args.late_fusion)
        version = f"late_fusion_{args.late_fusion}"
        folder = args.out or run.parent / version
        if (folder / "last.pt").exists():
            raise UserError(f"{folder}: holds a run, which would be lost. Use another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        record = plain(replace(config, version=version)) | {"runs": [str(run), str(late)]}
        write_json(folder / "config.json", {"config": record})
    if (folder / "last.pt").exists():
        raise UserError(f"{folder}: holds a run, whose results would be lost. Use another --out.")
    rows = evaluate(model, cases, config, device, bar=f"{folder.name} {part}", late=partner)
    facts = {
        "run": str(run),
        "checkpoint": args.checkpoint,
        "checkpoint_epoch": weights["epoch"],
        "val_dice": weights["val_dice"],
        "data": config.data,
    }
    summary = write_results(folder, part, rows, config.kind, facts)
    return summary, config.kind, frozenset(row["study"] for row in rows), folder


def run_command(argv: list[str] | None = None) -> None:
    """python eval.py: see the top of the file."""
    from train import add_flags

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument(
        "--table", type=int, choices=(3, 4, 5), help="the paper's table, from the runs below RUN"
    )
    parser.add_argument("--late-fusion", choices=LATE_FUSIONS, help="of the two runs, Table 3")
    parser.add_argument(
        "--part",
        choices=("train", "val", "test", "all"),
        help="of the run's splits [test; all for studies it has not seen]",
    )
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"))
    parser.add_argument("--predict", type=Path, metavar="DIR", help="studies without labels")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results or masks")
    add_flags(parser, EVAL_OPTIONS)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in EVAL_OPTIONS}
    if sum(map(bool, (args.predict, args.table, args.late_fusion))) > 1:
        raise UserError("--predict, --table and --late-fusion: choose one.")
    if (args.predict or args.table) and args.part:
        raise UserError("--part has no effect here. Leave it out.")
    if args.predict:
        if len(args.runs) > 1 or args.out is None:
            raise UserError("--predict takes one run, and --out for the folder of the masks.")
        model, config, device, _ = load_run(args.runs[0], args.checkpoint, given)
        for path in predict(model, config, args.predict, args.out, device, config.skip_bad):
            print(path)
        return
    if args.table:
        if len(args.runs) > 1 or not args.runs[0].is_dir():
            raise UserError("--table takes one folder, the one that holds the runs.")
        print(write_paper_table(args.table, args.runs[0], args.out or args.runs[0]))
        return
    if args.late_fusion:
        if len(args.runs) != 2:
            raise UserError("--late-fusion takes two runs, such as runs/ct runs/pet.")
        summary, kind, _, folder = evaluate_run(args.runs[0], args, given, late=args.runs[1])
        print(results_table(rows_of(str(folder), summary), kind))
        return
    if args.out and len({run.name for run in args.runs}) < len(args.runs):
        raise UserError("--out: two runs have one name and would overwrite each other there.")
    systems, kinds, studies = {}, set(), set()
    for run in args.runs:
        if run.name.startswith("late_fusion_") and not (run / "best.pt").exists():
            raise UserError(f"{run}: is a late fusion; --late-fusion or --table show its results.")
        summary, kind, names, _ = evaluate_run(run, args, given)
        systems |= rows_of(str(run), summary)
        kinds.add(kind)
        studies.add(names)
        if len(kinds) > 1:
            raise UserError(f"{run}: its data are of another kind than those of the runs before.")
    threshold = systems.pop(THRESHOLD, None)
    if threshold and len(studies) == 1:  # else it has no one value; each summary.json has its own
        systems[THRESHOLD] = threshold
    print(results_table(systems, kinds.pop()))
    if len(studies) > 1:
        print("These runs were tested on different studies: their rows are not comparable.")


def main() -> None:
    from train import command_line

    command_line(run_command)


if __name__ == "__main__":
    from eval import main  # one copy of this module, the one that train imports

    main()
