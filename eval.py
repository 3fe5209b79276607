"""Evaluation and prediction of trained runs.

    python eval.py runs/A runs/B            one table for the test studies of several runs
    python eval.py runs/A --predict STUDIES --out DIR    masks (NIfTI) for studies without labels

From top to bottom: inference in windows over a whole study, its metrics on the grid of the study's
own files, masks as files, runs that are joined to one, and the command line.
"""

import argparse
import gzip
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cache import Case
from common import Parser, UserError, atomic, command_line, progress, read_json, write_json
from config import Config, add_flags, flag_of, options_from_args, resolve
from data import select_modality, with_swapped_ct
from devices import autocast
from metrics import (
    THRESHOLDS,
    empty_mask_rule,
    mean_without_nan,
    organ_dices,
    results_table,
    score_study,
    summarize_studies,
    systems_of_run,
)
from mirror_unet import DATA_NAMES, Variant, decide, foreground_logits
from preprocess import (
    THRESHOLDS_SUV,
    CaseMeta,
    labels_to_native,
    logits_to_native,
    preprocess,
    settings_for,
)
from runs import (
    LoadedRun,
    find_data,
    load_cases,
    load_run,
    load_splits,
    save_config,
    with_organ_names,
)
from studies import BadStudy, Study, StudyFolder, find_studies, list_findings

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
    return weight.clamp_min(1e-3)  # the sums are divided by the weights, in far corners too


def sliding_window(run: Callable, image, config, device) -> dict[str, Tensor]:
    """Apply `run` to windows of `image` (2, W, H, D) and average its maps where they overlap.

    run: windows (B, 2, w, h, d) on `device` -> maps (B, K, w, h, d) by name; without enough memory
    it is called for some of them again. Returns the maps (K, W, H, D), float32, by name. Raises
    UserError if the device has no memory for a single window.
    """
    # Without enough memory the sums move to the CPU, then the windows go one by one.
    cpu = torch.device("cpu")
    attempts = [(device, config.window_batch), (cpu, config.window_batch), (cpu, 1)]
    for sum_device, batch in dict.fromkeys(attempts):
        try:
            return stitch_windows(run, image, config, batch, device=device, sum_device=sum_device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()

    remedy = "Close what else runs there, or use --device cpu"
    raise UserError(f"{device} has no memory for one window of {config.patch}. {remedy}.")


def window_at(corner, sides) -> tuple[slice, ...]:
    """The index of a box of all channels, from its first voxel and its sides (w, h, d)."""
    return (slice(None), *map(slice, corner, np.add(corner, sides).tolist()))


def stitch_windows(run, image, config: Config, batch: int, *, device, sum_device):
    """One attempt of sliding_window, with the sums on `sum_device`."""
    # An image that is smaller than a window gets zeros around it, as in training.
    patch, sizes = config.patch, image.shape[1:]
    lack = np.maximum(np.subtract(patch, sizes), 0)
    before = lack // 2
    image = np.pad(image, [(0, 0), *zip(before, lack - before, strict=True)])
    image = torch.from_numpy(image).to(sum_device)

    starts = map(window_starts, image.shape[1:], patch, [config.overlap] * 3)
    windows = [window_at(corner, patch) for corner in itertools.product(*starts)]
    weight = window_weights(patch, config.window_weights).to(sum_device)
    weight_sum = torch.zeros((1, *image.shape[1:]), device=sum_device)
    sums: dict[str, Tensor] = {}
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        inputs = torch.stack([image[window] for window in group])
        maps = run(inputs.to(device, torch.float32))

        for name, values in maps.items():
            if name not in sums:
                shape = (values.shape[1], *image.shape[1:])
                sums[name] = torch.zeros(shape, device=sum_device)
            for window, window_map in zip(group, values, strict=True):
                sums[name][window] += window_map.to(sum_device, torch.float32) * weight
        for window in group:
            weight_sum[window] += weight

    for name, total in sums.items():
        total /= weight_sum
        sums[name] = total[window_at(before, sizes)]
    return sums


# ------------------------------------------------------------------ inference


class Inference(NamedTuple):
    """What a network puts out over a whole study (W, H, D), float32.

    maps: by head, the foreground logits (K, W, H, D) of one with classes, "seg" among them, or the
        image (1, W, H, D) of one that reconstructs.
    tumor: the highest tumour probability of a window, NaN unless it was asked for.
    """

    maps: dict[str, np.ndarray]
    tumor: float


def infer(model, images: np.ndarray, config, device, heads=("seg",)) -> Inference:
    """Run a network over the images (2, W, H, D) of a preprocessed study, in windows.

    model: a Network, or an Ensemble, which has the head "seg" alone. heads: the fields of
    mirror_unet.Output to compute; no others are run.
    """
    if isinstance(model, Ensemble):
        return model.infer(images, device)

    tumor_scores = []

    @torch.inference_mode()
    def run(windows: Tensor) -> dict[str, Tensor]:
        windows = select_modality(windows, config.modality)
        with autocast(device, config.amp):
            output = model(windows[:, :1], windows[:, 1:], heads=tuple(heads))

        maps = {}
        for head in heads:
            values = getattr(output, head).float()
            if head == "tumor":
                tumor_scores.append(values.sigmoid().max().item())
            elif values.shape[1] == 1:  # an image
                maps[head] = values
            else:
                maps[head] = foreground_logits(values)
        return maps

    model.eval()
    maps = {}
    for head, values in sliding_window(run, images, config, device).items():
        maps[head] = values.cpu().numpy()
    return Inference(maps, tumor=max(tumor_scores, default=math.nan))


LATE_FUSIONS = ("logits", "union", "intersection")  # of Table 3


@dataclass(frozen=True)
class Ensemble:
    """Trained networks that evaluation and prediction take as one; each keeps its own config.

    join: "logits" takes the mean of their foreground logits; for a CT-only and a PET-only network
    it has the mask of their sum. "union" and "intersection" join the masks that each has decided.
    """

    members: list[LoadedRun]
    join: str = "logits"
    branches = ()

    @property
    def variant(self) -> Variant:
        """The mask alone: an ensemble neither reconstructs nor classifies."""
        return Variant(**self.members[0].model.variant.mask_tasks)

    def infer(self, images: np.ndarray, device) -> Inference:
        """Foreground logits (K, W, H, D), or (members · K, W, H, D) if `decide` joins masks."""
        members = (infer(m.model, images, m.config, device).maps["seg"] for m in self.members)
        if self.join == "logits":
            seg = sum(members) / len(self.members)  # only two members' logits are held at once
        else:
            seg = np.concatenate(list(members))
        return Inference({"seg": seg}, math.nan)

    def decide(self, foreground: np.ndarray) -> np.ndarray:
        """Which classes are present, bool (K, W, H, D), from the logits of `infer`."""
        if self.join == "logits":
            return decide(foreground, self.variant)
        join = np.logical_or if self.join == "union" else np.logical_and
        parts = np.split(foreground, len(self.members))
        return join.reduce([decide(part, self.variant) for part in parts])


def class_bitmask(foreground: np.ndarray, decide: Callable) -> np.ndarray:
    """uint8 (W, H, D) whose bit k says that `decide` finds class k present in the logits."""
    classes = np.zeros(foreground.shape[1:], np.uint8)
    for k, present in enumerate(decide(foreground)):
        classes |= present.astype(np.uint8) << k
    return classes


def label_map(foreground: np.ndarray) -> np.ndarray:
    """uint8 labels 0, 1 .. K; where several classes are present, the highest logit wins."""
    labels = np.zeros(foreground.shape[1:], np.uint8)
    highest = np.zeros_like(foreground[0])
    for label, logits in enumerate(foreground, start=1):
        labels[logits > highest] = label
        highest = np.maximum(highest, logits)
    return labels


def find_organs(model, images: np.ndarray, meta: CaseMeta, config, device) -> np.ndarray:
    """The organs (v5) of a preprocessed study, a uint8 label map on the grid of its files."""
    branch = model.variant.organ_branch
    inference = infer(model, images, config, device, heads=(branch,))
    return labels_to_native(meta, label_map(inference.maps[branch]))


# ------------------------------------------------------------------ evaluation


def evaluate(
    model, cases: list[Case], config, device, native: bool = True, bar: str = ""
) -> list[dict]:
    """The score_case of each study; bar: the name of a progress bar, if there is to be one."""
    studies = progress(cases, bar, "study") if bar else cases
    return [score_case(model, case, config, device, native) for case in studies]


def score_case(model, case: Case, config, device, native: bool = True) -> dict:
    """The metrics of one study by the name of their column.

    native: on the grid of the study's mask, with further columns: of PET/CT suv4_*, the metrics of
    the voxels with SUV >= 4, and so for each of THRESHOLDS_SUV; those of each of the network's
    branches; organ Dice; the score of T. Without, as in validation, the mask's metrics on the
    cached grid.
    """
    variant = model.variant
    heads = ["seg"]
    if native:
        heads += model.branches
    if native and variant.tumor:
        heads.append("tumor")
    inference = infer(model, case.load("images"), config, device, heads)

    # Every mask to score, as a bit map, by the prefix of its columns. As the classes 1 and 2 of the
    # true mask are disjoint, their labels are the same numbers as their bits.
    classify = partial(class_bitmask, decide=model.decide)
    if native:
        truth = case.native_labels()
        spacing = np.linalg.norm(np.array(case.meta.native_affine)[:3, :3], axis=0)
        masks = {"": logits_to_native(case.meta, inference.maps["seg"], classify)}
        if settings_for(config).clip:  # images with units
            for suv in THRESHOLDS_SUV:
                masks[f"suv{suv:g}_"] = case.native_above(suv)
        for branch in model.branches:
            masks[f"{branch}_"] = logits_to_native(case.meta, inference.maps[branch], classify)
    else:
        truth, spacing = case.load("label"), case.meta.spacing
        masks = {"": classify(inference.maps["seg"])}

    row = {"study": case.name, "patient": case.patient, "has_lesion": case.has_lesion}
    for prefix, mask in masks.items():
        for name, value in score_study(mask, truth, variant.classes, spacing).items():
            if not prefix or "_true_" not in name:  # the true volume is the same for all
                row[prefix + name] = value

    if native and variant.organ_branch and case.organs:
        organs = find_organs(model, case.load("images"), case.meta, config, device)
        names = variant.tasks[variant.organ_branch].classes
        row |= organ_dices(organs, case.organs.native_labels(), names)
    if "tumor" in heads:
        row["tumor_score"] = inference.tumor
    return row


def tumor_threshold(model, cases: list[Case], config, device, gather=list) -> float | None:
    """The best_threshold on T's scores of the cases, None without T.

    gather: makes one list of the lists of several processes, each with its own cases.
    """
    if not model.variant.tumor:
        return None
    scores = []
    for case in cases:
        inference = infer(model, case.load("images"), config, device, heads=("seg", "tumor"))
        scores.append((inference.tumor, case.has_lesion))
    return best_threshold(gather(scores))


def best_threshold(scores: list[tuple[float, bool]]) -> float:
    """The threshold on T's study score with the best balanced accuracy.

    scores: of each study, and whether it has a lesion. The threshold is 1/2 or the middle between
    two neighbouring scores, of equally good ones that nearest to 1/2; 1/2 unless there are studies
    of both kinds.
    """
    values = np.array([score for score, _ in scores])
    has_lesion = np.array([lesion for _, lesion in scores], bool)
    if has_lesion.all() or not has_lesion.any():
        return 0.5

    def quality(threshold: float) -> tuple[float, float]:
        called = values > threshold
        balanced_accuracy = called[has_lesion].mean() + (~called)[~has_lesion].mean()
        return balanced_accuracy, -abs(threshold - 0.5)

    ordered = np.unique(values)
    middles = (ordered[:-1] + ordered[1:]) / 2
    return float(max([0.5, *middles], key=quality))


def add_tumor_calls(rows: list[dict], threshold: float | None) -> None:
    """Add to each study with a score whether T calls a lesion at this threshold, 0 or 1."""
    for row in rows:
        if threshold is not None and "tumor_score" in row:
            row["tumor_called"] = float(row["tumor_score"] > threshold)


def summarize_validation(rows: list[dict]) -> dict[str, float]:
    """What metrics.csv holds of the validation studies; NaN where there are none.

    val_dice: the mean over the studies with a lesion, and over classes. val_fpv_healthy_ml: the
    mean FPV of the studies without a lesion (PET/CT).
    """
    dices, volumes = [], []
    for row in rows:
        if row["has_lesion"]:
            dices += [row[name] for name in row if name.startswith("dice")]
        elif "fpv_ml" in row:
            volumes.append(row["fpv_ml"])

    means = {"val_dice": mean_without_nan(dices)}
    if volumes:
        means["val_fpv_healthy_ml"] = mean_without_nan(volumes)
    return means


def write_results(folder: Path, part: str, rows: list[dict], facts: dict) -> dict[str, dict]:
    """Write <part>_studies.csv and a summary, and return the means by whose mask they are of.

    The summary is summary.json for the test part, <part>_summary.json for others; it holds `facts`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{part}_studies.csv") as file:
        file.write(pd.DataFrame(rows).to_csv(index=False).encode())

    means = summarize_studies(rows)
    rule = empty_mask_rule(means["model"])
    name = "summary.json" if part == "test" else f"{part}_summary.json"
    write_json(folder / name, {"rule": rule, "part": part, **facts, "systems": means})
    return means


# ------------------------------------------------------------------ prediction


def write_mask(path: Path, mask: np.ndarray, source: Path) -> None:
    """Write a uint8 mask as NIfTI in the geometry of `source`, header codes included."""
    image = nib.load(source)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"Mirror U-Net mask"

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(gzip.compress(type(image)(mask, None, header).to_bytes(), 6, mtime=0))


def mask_name(study: Study) -> str:
    return f"{study.name.replace('/', '__')}.nii.gz"


def find_unlabelled(folder: Path, config) -> StudyFolder:
    """The studies to predict. Raises UserError if they are of another kind than the run's."""
    data = find_studies(
        folder,
        labelled=False,
        channels=config.channels,
        lesion_labels=config.lesion_labels,
        own_grids=config.own_grids,
    )
    if data.kind != config.kind:
        kinds = f"{DATA_NAMES[data.kind]} studies, the run was trained on {DATA_NAMES[config.kind]}"
        raise UserError(f"{folder}: holds {kinds}. Choose a run of that kind.")
    for note in data.notes:
        to_stderr(note)
    return data


def predict(
    run: LoadedRun, folder: Path, out: Path, overwrite: bool = False, organs_out: Path | None = None
) -> list[Path]:
    """Write the mask of every study below `folder` to `out`/<study>.nii.gz; returns the paths.

    A mask has 1 for lesions, of brain tumours 1 for edema and 2 for core. It lies on the grid of
    the image study.reference, PET in most layouts. organs_out: the folder of the organ maps (v5)
    and their names. Raises UserError for a run that cannot predict, for studies of another kind
    than the run's, for masks that exist (unless overwrite) and, after all studies, for bad ones
    (unless config.skip_bad).
    """
    model, config = run.model, run.config
    if config.ct != "own":
        raise UserError("--predict: a run with --ct other is a control. Choose one without.")
    if organs_out and not model.variant.organ_branch:
        raise UserError("--organs-out: these runs learnt no organs. Leave it out.")
    data = find_unlabelled(folder, config)

    folders, targets = [out], []
    if organs_out:
        folders.append(organs_out)
        targets.append(organs_out / "organs.json")
    for study, place in itertools.product(data.studies, folders):
        targets.append(place / mask_name(study))
    existing = list(filter(Path.exists, targets))
    if existing and not overwrite:
        count = f"exists already, as do {len(existing) - 1} more files"
        raise UserError(f"{existing[0]}: {count}. Add --overwrite, or choose another --out.")

    findings, written = list(data.findings), []
    for study in progress(data.studies, "predict", "study"):
        try:
            arrays, meta = preprocess(study, settings_for(config))
        except BadStudy as error:
            findings += error.findings
            continue
        for warning in meta.facts["warnings"]:
            to_stderr(warning)

        inference = infer(model, arrays["images"], config, run.device)
        mask = logits_to_native(meta, inference.maps["seg"], label_map)
        path = out / mask_name(study)
        reference = study.sources[study.reference].path
        write_mask(path, mask, reference)
        written.append(path)
        if organs_out:
            organs = find_organs(model, arrays["images"], meta, config, run.device)
            write_mask(organs_out / path.name, organs, reference)

    if organs_out and written:
        write_json(organs_out / "organs.json", dict(enumerate(config.organ_names, start=1)))
    if findings:
        message = f"{len(written)} studies were predicted; {list_findings(findings)}"
        if not config.skip_bad:
            raise UserError(message)
        to_stderr(f"left out   {message}")
    return written


# ------------------------------------------------------------------ runs that are evaluated

# The options of a run that evaluation takes; those not given stay as the run had them.
EVAL_OPTIONS = (
    "data",
    "cache",
    "device",
    "amp",
    "threads",
    "workers",
    "overlap",
    "window_weights",
    "window_batch",
    "check",
    "skip_bad",
    "channels",
    "lesion_labels",
    "own_grids",
    "organs",
)
# What a run was told about its own data does not hold for other data.
OTHER_DATA = {"channels": (), "lesion_labels": (), "own_grids": False, "organs": None}
# The options that the runs of an ensemble have in common, and those of a late fusion.
ENSEMBLE_ALIKE = ("kind", "spacing", "ct")
LATE_FUSION_ALIKE = (*ENSEMBLE_ALIKE, "patch", "modality", "overlap", "window_weights")


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def unlike(run: Path, first: Path, name: str) -> UserError:
    return UserError(f"{run}: differs from {first} in {name}. Choose runs that agree.")


def open_model(
    runs: list[Path], checkpoint: str, given: dict, join: str | None = None
) -> LoadedRun:
    """As runs.load_run, of one run or of several as an Ensemble, with the config of the first.

    join: one of LATE_FUSIONS, of a run of `ct` and one of `pet`; without it, several runs are
    averaged. Raises UserError if the runs cannot be joined.
    """
    opened = [load_run(run, checkpoint, given) for run in runs]
    if len(opened) == 1:
        return opened[0]

    versions = [member.config.version for member in opened]
    if join and versions != ["ct", "pet"]:
        order = " and ".join(versions)
        raise UserError(f"--late-fusion takes a run of `ct`, then one of `pet`, not {order}.")
    first = opened[0]
    for run, member in zip(runs, opened, strict=True):
        for name in LATE_FUSION_ALIKE if join else ENSEMBLE_ALIKE:
            if getattr(member.config, name) != getattr(first.config, name):
                raise unlike(run, runs[0], name)
        if member.model.variant.classes != first.model.variant.classes:
            raise unlike(run, runs[0], "classes")
    return first._replace(model=Ensemble(opened, join or "logits"))


def choose_cases(
    run: Path, part: str | None, given: dict, cases: list[Case]
) -> tuple[str, list[Case]]:
    """The part to evaluate and its studies.

    The part is one of the run's own splits, "test" by default, or "all" of another --data. Raises
    UserError if it is empty or if a study of it is missing.
    """
    splits = load_splits(run)
    names = {case.name for case in cases}
    if part is None:
        knows_data = not names.isdisjoint(itertools.chain(*splits.values()))
        part = "test" if knows_data or "data" not in given else "all"

    chosen = names if part == "all" else set(splits[part])
    if not chosen:
        raise UserError(f"{run / 'splits.json'}: its {part} part is empty. Restore it.")
    missing = sorted(chosen - names)
    if missing:
        raise UserError(
            f"{run}: {len(missing)} studies of its {part} part are not in the data, the first is "
            f"{missing[0]}. Give their folder with --data, or --part all."
        )
    return part, [case for case in cases if case.name in chosen]


class Evaluation(NamedTuple):
    """What came out of a run, or of several as one."""

    name: str  # the heading of its column
    studies: set[str]  # names of those that were evaluated
    systems: dict[str, dict]  # means, as write_results returns them


def evaluate_runs(runs: list[Path], args: argparse.Namespace, given: dict) -> Evaluation:
    """Evaluate a run, the late fusion of two or an ensemble, and write the results.

    The studies are a part of the first run's splits, or all of another --data.
    """
    run = runs[0]
    model, config, device, checkpoint = open_model(runs, args.checkpoint, given, args.late_fusion)
    splits = [load_splits(each) for each in runs]
    # With other splits a run may have trained on the test studies of the first one.
    if args.late_fusion or (args.ensemble and "data" not in given):
        for other, parts in zip(runs, splits, strict=True):
            if parts != splits[0]:
                raise unlike(other, run, "splits")
    folder = results_folder(run, args)

    data = find_data(config, to_stderr)
    config = resolve(config, data.kind, simulated=config.data is None)
    cases = load_cases(data, config, to_stderr)
    config = with_organ_names(config, cases, data, to_stderr)

    part, cases = choose_cases(run, args.part, given, cases)
    names = {case.name for case in cases}
    for each, parts in zip(runs, splits, strict=True):
        seen = names.intersection(parts["train"] + parts["val"])
        if seen:
            count = f"{len(seen)} of these {len(names)} studies"
            to_stderr(f"{each}: {count} trained or selected it")

    cases = with_swapped_ct(cases, config.ct)
    rows = evaluate(model, cases, config, device, bar=f"{folder.name} {part}")
    if (run / "summary.json").exists():
        summary = read_json(run / "summary.json", parse=dict)
        add_tumor_calls(rows, summary.get("tumor_threshold"))
    facts = {
        "run": str(run),
        "checkpoint": args.checkpoint,
        "checkpoint_epoch": checkpoint["epoch"],
        "val_dice": checkpoint["val_dice"],
        "data": config.data,
    }
    systems = write_results(folder, part, rows, facts)

    if args.late_fusion:  # the folder is a row of the paper's Table 3, as that of a run is
        sources = list(map(str, runs))
        save_config(folder, config, device.type, late_fusion=args.late_fusion, runs=sources)
        write_json(folder / "splits.json", splits[0])
    joined = args.late_fusion or args.ensemble
    return Evaluation(str(folder if joined else run), names, systems)


def results_folder(run: Path, args: argparse.Namespace) -> Path:
    """Where the results go. Raises UserError if a run lies there, whose results would be lost."""
    if args.late_fusion:
        folder = args.out or run.parent / f"late_fusion_{args.late_fusion}"
    elif args.ensemble:
        folder = args.out
    else:
        folder = args.out / run.name if args.out else run / "evaluation"

    # A late fusion leaves a config.json itself, which the next one may replace.
    has_config = not args.late_fusion and (folder / "config.json").exists()
    if has_config or (folder / "metrics.csv").exists():
        raise UserError(f"{folder}: holds a run, whose results would be lost. Use another --out.")
    return folder


# ------------------------------------------------------------------ command line


def parse_eval(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a trained run")
    actions = parser.add_mutually_exclusive_group().add_argument
    actions("--late-fusion", choices=LATE_FUSIONS, help="join a run of ct and one of pet (Table 3)")
    ensemble = "score the mean of the runs' logits; --predict of several runs takes it too"
    actions("--ensemble", action="store_true", help=ensemble)
    actions("--predict", type=Path, metavar="DIR", help="predict the studies in DIR, unlabelled")
    part = "part of the run's splits [test; all for studies it has not seen]"
    add("--part", choices=("train", "val", "test", "all"), help=part)
    add("--checkpoint", default="best", choices=("best", "last"))
    add("--organs-out", type=Path, metavar="DIR", help="folder of the organ maps of --predict (v5)")
    add("--overwrite", action="store_true", help="replace the masks of --predict in --out")
    add("--out", type=Path, metavar="DIR", help="folder of the results or masks")
    add_flags(parser, EVAL_OPTIONS)
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not go together."""
    partners = {"overwrite": "predict", "organs_out": "predict", "ensemble": "out"}
    for name, partner in partners.items():
        if getattr(args, name) and not getattr(args, partner):
            raise UserError(f"{flag_of(name)} goes with --{partner}. Give both, or leave it out.")

    if args.predict:
        for name in ("part", "data", "organs"):
            if getattr(args, name, None) is not None:
                raise UserError(f"{flag_of(name)} has no effect here. Leave it out.")
        if not args.out:
            raise UserError("--predict: give the folder of the masks with --out.")
    if args.organs_out and args.organs_out.resolve() == args.out.resolve():
        raise UserError("--organs-out: the masks lie in --out. Give another folder.")

    if args.late_fusion and len(args.runs) != 2:
        raise UserError("--late-fusion takes two runs, such as runs/ct runs/pet.")
    joined = args.late_fusion or args.ensemble or args.predict
    names = {run.name for run in args.runs}
    if args.out and not joined and len(names) < len(args.runs):
        raise UserError("--out: two runs have one name and would overwrite each other there.")


def eval_command(argv: list[str] | None = None) -> None:
    """python eval.py: see the top of the file."""
    args = parse_eval(argv)
    given = options_from_args(args, EVAL_OPTIONS)
    if args.predict or "data" in given:
        given = OTHER_DATA | given
    if args.predict:
        run = open_model(args.runs, args.checkpoint, given)
        for path in predict(run, args.predict, args.out, args.overwrite, args.organs_out):
            print(path)
        return

    joined = args.late_fusion or args.ensemble
    groups = [args.runs] if joined else [[run] for run in args.runs]
    print_results([evaluate_runs(runs, args, given) for runs in groups])


def print_results(evaluations: list[Evaluation]) -> None:
    systems = {}
    for evaluation in evaluations:
        systems |= systems_of_run(evaluation.name, evaluation.systems)

    # A threshold needs no run: on the same studies one column, behind those of the runs, is right
    # for all of them. On different studies it has no one value; each summary.json has its own.
    same_studies = all(e.studies == evaluations[0].studies for e in evaluations)
    for name in list(systems):
        if name.startswith(tuple(THRESHOLDS)):  # or of one tracer
            threshold = systems.pop(name)
            if same_studies:
                systems[name] = threshold
    print(results_table(systems))
    if not same_studies:
        print("These runs were tested on different studies: their rows are not comparable.")


if __name__ == "__main__":
    command_line(eval_command)
