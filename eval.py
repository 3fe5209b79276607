"""Evaluation and prediction of trained runs.

    python eval.py runs/A runs/B            one table for the test studies of several runs
    python eval.py runs/A --predict STUDIES --out DIR    masks (NIfTI) for studies without labels

Dice, FPV and FNV follow the AutoPET challenge, on the grid of the study's own files.
"""

import argparse
import gzip
import itertools
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

import tables
from baselines import LATE_FUSIONS, LateFusion
from cache import Case
from config import Config, add_flags, as_options, flag_of, read_settings
from data import lend_ct
from devices import autocast
from files import Parser, UserError, atomic, command_line, progress, read_json, write_json
from mirror_unet import DATA_NAMES, UNIONS, Variant, decide, margins
from preprocess import body_box, preprocess, preprocessing, to_native
from runs import load_run, open_data, save_config, saved_splits
from studies import BadStudy, find_studies, list_findings

EIGHTEEN = ndimage.generate_binary_structure(3, 2)  # faces and edges join, corners do not

# ------------------------------------------------------------------ metrics of the challenge


def binary_pair(pred, mask) -> tuple[np.ndarray, np.ndarray]:
    pred, mask = (a if a.dtype == bool else a != 0 for a in map(np.asarray, (pred, mask)))
    if pred.shape != mask.shape:
        raise ValueError(f"prediction {pred.shape} and mask {mask.shape} lie on different grids")
    return pred, mask


def dice(pred, mask) -> float:
    """2 |G ∩ P| / (|G| + |P|) of two masks of one shape; non-zero is foreground. Empty masks as in
    AutoPET 2022: NaN if both are empty, 0 if only one is."""
    pred, mask = binary_pair(pred, mask)
    total = np.count_nonzero(pred) + np.count_nonzero(mask)
    return float(2 * np.count_nonzero(pred & mask) / total) if total else math.nan


class Regions(NamedTuple):
    """The 18-connected components of one mask beside another: how many touch it, how many do not,
    and the voxels of these."""

    touching: int
    apart: int
    apart_voxels: int


def regions(mask, other) -> Regions:
    mask, other = binary_pair(mask, other)
    if not mask.any():
        return Regions(0, 0, 0)
    box = tuple(slice(*ends) for ends in body_box(mask, margin=(0, 0, 0)))
    mask, other = mask[box], other[box]
    numbers, count = ndimage.label(mask, EIGHTEEN)
    touched = np.zeros(count + 1, bool)
    touched[numbers[other]] = True
    touched[0] = False  # the background
    sizes = np.bincount(numbers[mask], minlength=count + 1)
    touching = int(touched.sum())
    return Regions(touching, count - touching, int(sizes[~touched].sum()))


def volume(voxels: int, mask, spacing) -> float:
    """Voxels in ml; spacing in mm per axis of the mask."""
    if len(np.atleast_1d(spacing)) != np.ndim(mask):
        raise ValueError(f"spacing {spacing}: one number per axis of {np.shape(mask)}, in mm")
    return float(voxels * np.prod(spacing) / 1000)


def false_positive_volume(pred, mask, spacing) -> float:
    """FPV in ml: the 18-connected components of pred that touch no voxel of mask, both (W, H, D);
    spacing in mm per axis, in the same order."""
    return volume(regions(pred, mask).apart_voxels, pred, spacing)


def false_negative_volume(pred, mask, spacing) -> float:
    """FNV in ml: the 18-connected components of mask that touch no voxel of pred."""
    return volume(regions(mask, pred).apart_voxels, mask, spacing)


def detection(theirs: Regions, ours: Regions) -> dict[str, float]:
    """Lesions found (they share a voxel with the prediction), missed and falsely found, and their
    F1, which is NaN for a study that has and finds none; from the regions of mask and prediction.
    """
    found, wrong = theirs.touching, theirs.apart + ours.apart
    f1 = 2 * found / (2 * found + wrong) if found + wrong else math.nan
    counts = {"lesions_found": found, "lesions_missed": theirs.apart, "lesions_false": ours.apart}
    return counts | {"lesion_f1": f1}


def named_masks(classes: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Masks by name from a map whose bit k is class names[k], the unions of such classes first."""
    masks = {name: (classes >> bit & 1).astype(bool) for bit, name in enumerate(names)}
    unions = {name: parts for name, parts in UNIONS.items() if {*parts} <= {*names}}
    return {u: np.any([masks[p] for p in parts], axis=0) for u, parts in unions.items()} | masks


def score(pred: np.ndarray, truth: np.ndarray, names: tuple[str, ...], spacing) -> dict[str, float]:
    """Metrics of one study from two bit maps (see named_masks) on one grid: of a single class those
    of the challenge, of several the Dice and the volumes of each."""
    ml = np.prod(spacing) / 1000
    p, g = named_masks(pred, names), named_masks(truth, names)
    if len(names) > 1:
        row = {f"dice_{name}": dice(p[name], g[name]) for name in p}
        row |= {f"{name}_pred_ml": float(p[name].sum() * ml) for name in p}
        return row | {f"{name}_true_ml": float(g[name].sum() * ml) for name in p}
    [p], [g] = p.values(), g.values()
    theirs, ours = regions(g, p), regions(p, g)
    return {
        "dice": dice(p, g),
        "fpv_ml": volume(ours.apart_voxels, p, spacing),
        "fnv_ml": volume(theirs.apart_voxels, g, spacing),
        "mtv_pred_ml": float(p.sum() * ml),
        "mtv_true_ml": float(g.sum() * ml),
        **detection(theirs, ours),
    }


def organ_dices(pred: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """Dice of each organ from two label maps (W, H, D), and their mean; NaN where in neither."""
    both = [np.bincount(m, minlength=len(names) + 1) for m in (pred[pred > 0], truth[truth > 0])]
    hits = np.bincount(pred[(pred == truth) & (pred > 0)], minlength=len(names) + 1)
    with np.errstate(invalid="ignore"):
        dices = (2 * hits / sum(both))[1:]
    own = {f"organ_dice_{name}": float(d) for name, d in zip(names, dices, strict=True)}
    return {"organ_dice": mean_of(own.values())} | own


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


def sliding_window(run, image, patch, overlap=0.25, weights="constant", batch=4, device="cpu"):
    """Apply `run` to windows of `image` (2, W, H, D) and average where they overlap.

    run: (B, 2, w, h, d) on `device` -> maps (B, K, w, h, d) and scores (B,) or None. Returns the
    map (K, W, H, D), float32, and the highest score (NaN without). Without enough device memory the
    sums move to the CPU, then the windows go one by one.
    """
    device, cpu = torch.device(device), torch.device("cpu")
    for home, together in dict.fromkeys([(device, batch), (cpu, batch), (cpu, 1)]):
        try:
            return stitch(run, image, patch, overlap, weights, together, device, home)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    remedy = "Close what else runs there, or use --device cpu"
    raise UserError(f"{device} has no memory for one window of {tuple(patch)}. {remedy}.")


def stitch(run, image, patch, overlap, weights, batch, device, home):
    """One attempt of sliding_window with the sums on the device `home`."""
    lack = [max(p - n, 0) for p, n in zip(patch, image.shape[1:], strict=True)]
    before = [n // 2 for n in lack]  # smaller than a window: zeros around, as in training
    inner = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    image = np.pad(image, [(0, 0), *((b, n - b) for b, n in zip(before, lack, strict=True))])
    shape = image.shape[1:]
    starts = [window_starts(n, p, overlap) for n, p in zip(shape, patch, strict=True)]
    axes = [[slice(i, i + p) for i in axis] for axis, p in zip(starts, patch, strict=True)]
    boxes = list(itertools.product(*axes))
    weight = window_weights(patch, weights).to(home)
    image = torch.from_numpy(image).to(home)
    total, norm, best = None, torch.zeros(shape, device=home), math.nan
    for first in range(0, len(boxes), batch):
        group = boxes[first : first + batch]
        windows = torch.stack([image[(slice(None), *box)] for box in group])
        maps, scores = run(windows.to(device, torch.float32))
        if total is None:
            total = torch.zeros((maps.shape[1], *shape), device=home)
        for box, values in zip(group, maps, strict=True):
            total[(slice(None), *box)] += values.to(home, torch.float32) * weight
            norm[box] += weight
        if scores is not None:
            best = float(np.fmax(best, scores.max().item()))
    total /= norm
    return total[(slice(None), *inner)], best


SEEN = {"both": [0, 1], "ct": [0, 0], "pet": [1, 1]}  # which image fills the CT and the PET place


def see(images: Tensor, modality: str) -> Tensor:
    """What the network is given of images (B, 2, W, H, D): both, or one modality in both places
    (CT-only and PET-only Mirror U-Net, Sec. 4.2)."""
    return images if modality == "both" else images[:, SEEN[modality]]


def infer(model, image: np.ndarray, config, device, heads=("seg",)) -> tuple[np.ndarray, float]:
    """Margins (K, W, H, D) of the first of `heads` for one preprocessed study and, if "tumor" is
    another, the highest tumour probability of a window (else NaN). Only `heads` are computed."""
    if isinstance(model, Ensemble):
        margins_of = (infer(net, image, own, device)[0] for net, own in model.members)
        return sum(margins_of) / len(model.members), math.nan

    @torch.inference_mode()
    def run(windows: Tensor):
        with autocast(device, config.amp):
            windows = see(windows, config.modality)
            out = model(windows[:, :1], windows[:, 1:], heads=heads)
        tumor = None if out.tumor is None else out.tumor.float().sigmoid()
        return margins(getattr(out, heads[0]).float()), tumor

    model.eval()
    how = config.patch, config.overlap, config.window_weights, config.window_batch
    margin, tumor = sliding_window(run, image, *how, device)
    return margin.cpu().numpy(), tumor


def find_organs(model, image: np.ndarray, config, device) -> np.ndarray:
    """The organs (v5) of a preprocessed study, a uint8 label map on its grid."""
    return label_map(infer(model, image, config, device, (model.variant.organs,))[0])


def bits(margin: np.ndarray, variant) -> np.ndarray:
    """uint8 map whose bit k says that class k of the variant is present."""
    present = decide(margin, variant)
    return sum(p.astype(np.uint8) << k for k, p in enumerate(present)).astype(np.uint8)


def label_map(margin: np.ndarray) -> np.ndarray:
    """uint8 labels 0, 1 .. K; where two classes are present, the larger margin wins."""
    labels, best = np.zeros(margin.shape[1:], np.uint8), np.zeros_like(margin[0])
    for k, m in enumerate(margin, start=1):
        labels[m > best] = k
        best = np.maximum(best, m)
    return labels


# ------------------------------------------------------------------ evaluation


def evaluate(model, cases: list[Case], config, device, native: bool = True, bar: str = "") -> list:
    """A dict of metrics per study, as study_row has it; bar: the name of a progress bar, if any."""
    chosen = progress(cases, bar, "study") if bar else cases
    return [study_row(model, case, config, device, native) for case in chosen]


def study_row(model, case: Case, config: Config, device, native: bool) -> dict:
    """The metrics of one study by name, in training on the cached grid.

    native: on the grid of the study's files, with more columns: of PET/CT suv4_*, the same metrics
    of the voxels with SUV >= 4; those of each of the network's branches; the score of T.
    """
    spacing, truth = case.meta["spacing"], case.load("label")
    if native:
        spacing = np.linalg.norm(np.array(case.meta["native_affine"])[:3, :3], axis=0)
        # classes 1 and 2 of a mask are disjoint, so as bits they are the same numbers
        truth = case.native("native_label", case.load("native_class"))
    row = {"study": case.name, "patient": case.patient, "has_lesion": case.has_lesion}

    def add(prefix: str, mask: np.ndarray) -> None:
        own = score(mask, truth, model.variant.classes, spacing)
        row.update({prefix + k: v for k, v in own.items() if not prefix or "_true_" not in k})

    def add_output(prefix: str, *heads: str) -> float:
        margin, tumor = infer(model, case.load("images"), config, device, heads)
        classify = partial(bits, variant=model.variant)
        add(prefix, to_native(case.meta, margin, classify) if native else classify(margin))
        return tumor

    scored = native and model.variant.tumor
    tumor = add_output("", "seg", *(("tumor",) if scored else ()))
    if native and preprocessing(config).clip:  # images with units
        add("suv4_", case.native("native_hot"))
    for branch in model.branches if native else ():
        add_output(f"{branch}_", branch)
    if native and model.variant.organs and case.organs:
        found = to_native(case.meta, find_organs(model, case.load("images"), config, device))
        true = case.organs.native("native_organs", case.organs.load("native_organ"))
        row |= organ_dices(found, true, model.variant.tasks[model.variant.organs].classes)
    return row | ({"tumor_score": tumor} if scored else {})


def tumor_threshold(model, cases: list[Case], config, device, gather=list) -> float | None:
    """Where the scores of T, of a study the highest of its windows, part ill from healthy best;
    None without T. gather: of several processes, each with its cases, all their scores."""
    if not model.variant.tumor:
        return None
    scored = (infer(model, c.load("images"), config, device, ("seg", "tumor")) for c in cases)
    pairs = zip(scored, cases, strict=True)
    return best_threshold(gather([(score, case.has_lesion) for (_, score), case in pairs]))


def best_threshold(scores: list[tuple[float, bool]]) -> float:
    """Between two neighbouring scores, where the mean of sensitivity and specificity is highest
    (of several such places the one nearest to 1/2); 1/2 if all studies are ill, or none."""
    ill, healthy = ([s for s, sick in scores if sick == wanted] for wanted in (True, False))
    if not ill or not healthy:
        return 0.5
    known = sorted({s for s, _ in scores})
    places = [0.5, *((a + b) / 2 for a, b in itertools.pairwise(known))]

    def balanced(place: float) -> float:
        return np.mean([s > place for s in ill]) + np.mean([s <= place for s in healthy])

    return max(places, key=lambda place: (balanced(place), -abs(place - 0.5)))


def call_tumors(rows: list[dict], threshold: float | None) -> None:
    """Add to each row of a study whether T calls it ill at a threshold, if it has a score."""
    for row in rows:
        if threshold is not None and "tumor_score" in row:
            row["tumor_called"] = float(row["tumor_score"] > threshold)


def mean_of(values) -> float:
    """Of those that are numbers; NaN without any."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan


def dices_of(row: dict) -> list[float]:
    return [value for name, value in row.items() if name.split("_")[0] == "dice"]


def validation(rows: list[dict]) -> dict[str, float]:
    """What metrics.csv holds of the validation studies; NaN where there are none.

    val_dice: over those with a lesion, and over classes. val_healthy: the mean over all studies of
    Dice, that of a healthy study being 1 if its mask is empty and else 0. val_fpv_healthy_ml: the
    FPV of healthy studies (PET/CT).
    """
    ill = [row for row in rows if row["has_lesion"]]
    sound = [row for row in rows if not row["has_lesion"]]
    empty = [not any(row[n] for n in row if n.endswith("pred_ml")) for row in sound]
    found = {"val_dice": mean_of(value for row in ill for value in dices_of(row))}
    found["val_healthy"] = mean_of([*(mean_of(dices_of(row)) for row in ill), *map(float, empty)])
    if any("fpv_ml" in row for row in sound):
        found["val_fpv_healthy_ml"] = mean_of(row["fpv_ml"] for row in sound)
    return found


def write_results(folder: Path, part: str, rows: list[dict], facts: dict) -> dict:
    """Write <part>_studies.csv and, for test, summary.json, else <part>_summary.json, into folder;
    returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{part}_studies.csv") as file:
        file.write(pd.DataFrame(rows).to_csv(index=False).encode())
    summary = tables.summarize(rows)
    about = {"rule": tables.rule_of(summary["model"]), "part": part, **facts, "systems": summary}
    write_json(folder / ("summary.json" if part == "test" else f"{part}_summary.json"), about)
    return summary


# ------------------------------------------------------------------ prediction


def write_mask(path: Path, mask: np.ndarray, source: Path) -> None:
    """Write a uint8 mask in the geometry of `source`, header codes included, as NIfTI."""
    header = nib.load(source).header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"Mirror U-Net mask"
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(gzip.compress(kind(mask, None, header).to_bytes(), 6, mtime=0))


def predict(
    model, config, folder: Path, out: Path, device, skip_bad=False, overwrite=False, organs_out=None
):
    """Masks (1 lesion; MRI 1 edema, 2 core) of every study below `folder`, in
    `out`/<study>.nii.gz; their paths. Maps of organs (v5) in `organs_out`, with their names.

    Raises UserError for a control, for studies of another kind than the run's, for masks that are
    there (unless overwrite) and, after the rest, for bad ones (unless skip_bad).
    """
    if config.ct != "own":
        raise UserError("--predict: a run with --ct other is a control. Choose one without.")
    found = find_studies(folder, False, config.channels, config.lesion_labels)
    if found.kind != config.kind:
        here, there = DATA_NAMES[found.kind], DATA_NAMES[config.kind]
        what = f"holds {here} studies, the run was trained on {there}"
        raise UserError(f"{folder}: {what}. Choose a run of that kind.")
    for note in found.notes:
        print(note, file=sys.stderr)
    if organs_out and not model.variant.organs:
        raise UserError("--organs-out: these runs learnt no organs. Leave it out.")
    findings, written = list(found.findings), []
    names = {study.name: f"{study.name.replace('/', '__')}.nii.gz" for study in found.studies}
    places = [place / name for place in (out, organs_out) if place for name in names.values()]
    places += [organs_out / "organs.json"] if organs_out else []
    if not overwrite and (there := [mask for mask in places if mask.exists()]):
        what = f"exists already, as do {len(there) - 1} more masks"
        raise UserError(f"{there[0]}: {what}. Add --overwrite, or choose another --out.")
    for study in progress(found.studies, "predict", "study"):
        try:
            arrays, meta = preprocess(study, preprocessing(config), config.allow)
        except BadStudy as error:
            findings += error.findings
            continue
        margin, _ = infer(model, arrays["images"], config, device)
        written.append(out / names[study.name])
        write_mask(written[-1], to_native(meta, margin, label_map), study.pet.path)
        if organs_out:
            organs = to_native(meta, find_organs(model, arrays["images"], config, device))
            write_mask(organs_out / names[study.name], organs, study.pet.path)
    if organs_out and written:
        write_json(organs_out / "organs.json", dict(enumerate(config.organ_names, 1)))
    if findings:
        message = f"{len(written)} studies were predicted; {list_findings(findings)}"
        if not skip_bad:
            raise UserError(message)
        print(f"left out   {message}", file=sys.stderr)
    return written


# ------------------------------------------------------------------ command line

# Options of a run that evaluation takes; what is not given stays as the run had it.
EVAL_OPTIONS = (
    "data", "cache", "device", "amp", "threads", "workers", "overlap", "window_weights",
    "window_batch", "check", "skip_bad", "channels", "lesion_labels", "allow", "organs",
)  # fmt: skip
# Where a run has its own, these hold for its own data only.
OF_DATA = {"channels": (), "lesion_labels": (), "allow": (), "organs": None}
# What the runs of an ensemble have in common, and those of a late fusion.
ALIKE = ("kind", "spacing", "ct")
FUSED_ALIKE = (*ALIKE, "patch", "modality", "overlap", "window_weights")


def refuse_unlike(runs: list[Path], configs: list, names: tuple, **more: list) -> None:
    """Raises UserError unless the options `names`, and each list of `more`, are the same for all
    runs."""
    found = {name: [getattr(config, name) for config in configs] for name in names} | more
    for name, values in found.items():
        for run, value in zip(runs, values, strict=True):
            if value != values[0]:
                what = f"its {name} is not that of {runs[0]}"
                raise UserError(f"{run}: {what}. Choose runs that agree.")


def fuse_late(runs: list[Path], mode: str, checkpoint: str, given: dict):
    """As load_run, of a run of `ct` and one of `pet` as one network. Raises UserError if they
    cannot be joined."""
    opened = [load_run(run, checkpoint, given) for run in runs]
    networks, configs = [o[0] for o in opened], [o[1] for o in opened]
    if (versions := [config.version for config in configs]) != ["ct", "pet"]:
        found = " and ".join(versions)
        raise UserError(f"--late-fusion takes a run of `ct`, then one of `pet`, not {found}.")
    refuse_unlike(runs, configs, FUSED_ALIKE, splits=[saved_splits(run) for run in runs])
    return LateFusion(*networks, mode), *opened[0][1:]


@dataclass(frozen=True)
class Ensemble:
    """Trained networks, each with its config, whose margins infer averages."""

    members: list[tuple]
    variant: Variant  # the mask alone
    branches = ()


def open_runs(runs: list[Path], checkpoint: str, given: dict):
    """As load_run, of one run or of several as an ensemble, whose other results are those of the
    first. Raises UserError if their kind, spacing, ct or classes differ."""
    opened = [load_run(run, checkpoint, given) for run in runs]
    members = [(net, own) for net, own, *_ in opened]
    classes = [net.variant.classes for net, _ in members]
    refuse_unlike(runs, [own for _, own in members], ALIKE, classes=classes)
    model = opened[0][0]
    if len(runs) > 1:
        mask = {slot: model.variant.mask.get(slot) for slot in ("ct", "pet")}
        model = Ensemble(members, replace(model.variant, tumor=False, btl=None, **mask))
    return model, *opened[0][1:]


def choose_cases(run: Path, part: str | None, given: dict, cases: list[Case]):
    """The part to evaluate and its studies: one of the run's own splits ("test" by default), or
    "all" of another --data."""
    splits, names = saved_splits(run), {case.name for case in cases}
    known = names & {*itertools.chain(*splits.values())}
    part = part or ("test" if known or "data" not in given else "all")
    chosen = names if part == "all" else {*splits[part]}
    if not chosen:
        raise UserError(f"{run / 'splits.json'}: its {part} part is empty. Restore it.")
    if missing := sorted(chosen - names):
        what = f"{len(missing)} studies of its {part} part are not in the data, the first is"
        remedy = "Give their folder with --data, or --part all"
        raise UserError(f"{run}: {what} {missing[0]}. {remedy}.")
    return part, [case for case in cases if case.name in chosen]


def tell_seen(run: Path, chosen: set[str]) -> None:
    """Says so if the run has seen some of the chosen studies."""
    splits = saved_splits(run)
    if seen := chosen & {*splits["train"], *splits["val"]}:
        say = f"{run}: {len(seen)} of these {len(chosen)} studies trained or selected it"
        print(say, file=sys.stderr)


def evaluate_runs(runs: list[Path], args, given: dict):
    """Evaluate a run, the late fusion of two or an ensemble, on a part of its splits, or on all
    studies of another --data: its name, the summary, the kind of data and the studies' names."""
    run, mode = runs[0], args.late_fusion
    own_data = args.ensemble and "data" not in given
    if own_data and any(saved_splits(other) != saved_splits(run) for other in runs):
        raise UserError(f"{run}: the other runs have other splits. Give --data that none has seen.")
    if mode:
        model, config, device, weights = fuse_late(runs, mode, args.checkpoint, given)
        folder = args.out or run.parent / f"late_fusion_{mode}"
    else:
        model, config, device, weights = open_runs(runs, args.checkpoint, given)
        own = args.out / run.name if args.out else run / "evaluation"
        folder = args.out if args.ensemble else own
    if any((folder / name).exists() for name in ("metrics.csv", *["config.json"] * (not mode))):
        raise UserError(f"{folder}: holds a run, whose results would be lost. Use another --out.")
    config, cases = open_data(config, lambda text: print(text, file=sys.stderr))
    part, cases = choose_cases(run, args.part, given, cases)
    for each in runs:
        tell_seen(each, {case.name for case in cases})
    cases = lend_ct(cases, config.ct)
    rows = evaluate(model, cases, config, device, bar=f"{folder.name} {part}")
    if (run / "summary.json").exists():
        call_tumors(rows, read_json(run / "summary.json", lambda s: s.get("tumor_threshold")))
    facts = {"run": str(run), "checkpoint": args.checkpoint, "checkpoint_epoch": weights["epoch"],
             "val_dice": weights["val_dice"], "data": config.data}  # fmt: skip
    summary = write_results(folder, part, rows, facts)
    if mode:  # as a run has them, for the paper's Table 3
        save_config(folder, config, device.type, late_fusion=mode, runs=[str(run) for run in runs])
        write_json(folder / "splits.json", saved_splits(run))
    name = str(folder if mode or args.ensemble else run)
    return name, summary, config.kind, {row["study"] for row in rows}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a trained run")
    told = "the paper's table, from the runs below RUN"
    parser.add_argument("--table", type=int, choices=tables.PAPER_TABLES, help=told)
    told = "--table of runs with other settings than the defaults, such as spacing=4,4,6"
    parser.add_argument("--with", dest="given", nargs="+", metavar="OPTION=VALUE", help=told)
    parser.add_argument("--late-fusion", choices=LATE_FUSIONS, help="of the two runs, Table 3")
    told = "score the mean of the runs' margins; --predict of several runs takes it too"
    parser.add_argument("--ensemble", action="store_true", help=told)
    told = "of the run's splits [test; all for studies it has not seen]"
    parser.add_argument("--part", choices=("train", "val", "test", "all"), help=told)
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"))
    parser.add_argument("--predict", type=Path, metavar="DIR", help="studies without labels")
    told = "folder of the organ maps of --predict (v5)"
    parser.add_argument("--organs-out", type=Path, metavar="DIR", help=told)
    parser.add_argument("--overwrite", action="store_true", help="masks of --predict in --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results or masks")
    add_flags(parser, EVAL_OPTIONS)
    args = parser.parse_args(argv)
    if sum(map(bool, (args.predict, args.table, args.late_fusion, args.ensemble))) > 1:
        raise UserError("--predict, --table, --late-fusion and --ensemble: choose one.")
    goes = {"overwrite": "predict", "organs_out": "predict", "given": "table", "ensemble": "out"}
    for flag, goes_with in goes.items():
        if getattr(args, flag) and not getattr(args, goes_with):
            name = {"given": "with"}.get(flag, flag.replace("_", "-"))
            raise UserError(f"--{name} goes with --{goes_with}. Give both, or leave it out.")
    of_predict = ("part", "data", "organs") if args.predict else ()
    idle = ("part", *EVAL_OPTIONS) if args.table else of_predict
    if given := [name for name in idle if getattr(args, name, None) is not None]:
        raise UserError(f"{flag_of(given[0])} has no effect here. Leave it out.")
    if args.predict and not args.out:
        raise UserError("--predict: give the folder of the masks with --out.")
    if args.organs_out and args.organs_out.resolve() == args.out.resolve():
        raise UserError("--organs-out: the masks lie in --out. Give another folder.")
    if args.table and (len(args.runs) > 1 or not args.runs[0].is_dir()):
        raise UserError("--table takes one folder, the one that holds the runs.")
    if args.late_fusion and len(args.runs) != 2:
        raise UserError("--late-fusion takes two runs, such as runs/ct runs/pet.")
    joined = args.late_fusion or args.ensemble or args.predict
    if args.out and not joined and len({run.name for run in args.runs}) < len(args.runs):
        raise UserError("--out: two runs have one name and would overwrite each other there.")
    return args


def run_command(argv: list[str] | None = None) -> None:
    """python eval.py: see the top of the file."""
    args = parse(argv)
    given = as_options(args, EVAL_OPTIONS)
    if args.predict or "data" in given:
        given = OF_DATA | given
    if args.table:
        given, out = read_settings(args.given or []), args.out or args.runs[0]
        print(tables.write_paper_table(args.table, args.runs[0], out, given))
        return
    if args.predict:
        model, config, device, _ = open_runs(args.runs, args.checkpoint, given)
        how = device, config.skip_bad, args.overwrite, args.organs_out
        for path in predict(model, config, args.predict, args.out, *how):
            print(path)
        return
    systems, kinds, studies = {}, set(), []
    joined = args.late_fusion or args.ensemble
    for runs in [args.runs] if joined else [[run] for run in args.runs]:
        name, summary, kind, names = evaluate_runs(runs, args, given)
        systems |= tables.rows_of(name, summary)
        kinds.add(kind)
        studies.append(names)
        if len(kinds) > 1:
            raise UserError(f"{name}: its data are of another kind than those of the runs before.")
    threshold = systems.pop(tables.THRESHOLD, None)
    same = all(names == studies[0] for names in studies)
    if threshold and same:  # else it has no one value; each summary.json has its own
        systems[tables.THRESHOLD] = threshold
    print(tables.results_table(systems))
    if not same:
        print("These runs were tested on different studies: their rows are not comparable.")


if __name__ == "__main__":
    command_line(run_command)
