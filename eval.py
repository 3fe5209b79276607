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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from cache import Case
from common import (
    Parser,
    UserError,
    atomic,
    command_line,
    progress,
    read_json,
    to_stderr,
    write_json,
)
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
    write_csv,
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


def sliding_window(
    apply: Callable,
    image: np.ndarray,
    config: Config,
    device: torch.device,
) -> dict[str, Tensor]:
    """Apply a function to windows of `image` (2, W, H, D) and average its maps where they overlap.

    apply: windows (B, 2, w, h, d) on `device` -> maps (B, K, w, h, d), float32, by name; if memory
    runs out, it is called again for the same windows. Returns the maps (K, W, H, D) by name. Raises
    UserError if the device has no memory for a single window.
    """
    # Without enough memory the sums move to the CPU, then the windows go one by one.
    cpu = torch.device("cpu")
    attempts = [(device, config.window_batch), (cpu, config.window_batch), (cpu, 1)]
    for sum_device, batch in dict.fromkeys(attempts):  # equal ones once
        try:
            return stitch_windows(apply, image, config, batch, device, sum_device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()

    remedy = "Close what else runs there, or use --device cpu"
    raise UserError(f"{device} has no memory for one window of {config.patch}. {remedy}.")


def window_at(corner, sides) -> tuple[slice, ...]:
    """The index of a box of all channels, from its first voxel and its sides (w, h, d)."""
    return (slice(None), *map(slice, corner, np.add(corner, sides).tolist()))


def stitch_windows(
    apply: Callable,
    image: np.ndarray,
    config: Config,
    batch: int,
    device: torch.device,
    sum_device: torch.device,
) -> dict[str, Tensor]:
    """One attempt of sliding_window: `batch` windows at once, the sums on `sum_device`."""
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
        maps = apply(inputs.to(device, torch.float32))

        for name, values in maps.items():
            if name not in sums:
                shape = (values.shape[1], *image.shape[1:])
                sums[name] = torch.zeros(shape, device=sum_device)
            for window, window_map in zip(group, values, strict=True):
                sums[name][window] += window_map.to(sum_device) * weight
        for window in group:
            weight_sum[window] += weight

    inside = window_at(before, sizes)  # without the zeros
    for name, total in sums.items():
        total /= weight_sum
        sums[name] = total[inside]
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


def infer(loaded: LoadedRun, images: np.ndarray, heads=("seg",)) -> Inference:
    """Run a network over the images (2, W, H, D) of a preprocessed study, in windows.

    loaded: its model is a Network, or an Ensemble, which has the head "seg" alone; train.State will
    do as well. heads: the fields of mirror_unet.Output to compute; no others are run.
    """
    model, config, device = loaded.model, loaded.config, loaded.device
    if isinstance(model, Ensemble):
        return model.infer(images)

    tumor_scores = []

    @torch.inference_mode()
    def run_windows(windows: Tensor) -> dict[str, Tensor]:
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
    for head, values in sliding_window(run_windows, images, config, device).items():
        maps[head] = values.cpu().numpy()
    return Inference(maps, tumor=max(tumor_scores, default=math.nan))


LATE_FUSIONS = ("logits", "union", "intersection")  # of Table 3


@dataclass(frozen=True)
class Ensemble:
    """Trained networks that evaluation and prediction take as one; each keeps its own config.

    join: "logits" takes the mean of their foreground logits; for a CT-only and a PET-only network
    the mask is that of the sum, LF-Logit of Table 3. "union" and "intersection" join the masks that
    each has decided.
    """

    members: list[LoadedRun]
    join: str = "logits"
    scored_branches = ()

    @property
    def variant(self) -> Variant:
        """The mask alone: an ensemble neither reconstructs nor classifies."""
        first = self.members[0].model.variant
        return Variant(**first.mask_tasks)  # by branch, ct and pet

    def infer(self, images: np.ndarray) -> Inference:
        """Foreground logits (K, W, H, D), or (members · K, W, H, D) if `decide` joins masks."""
        logits = (infer(member, images).maps["seg"] for member in self.members)
        if self.join == "logits":
            seg = sum(logits) / len(self.members)  # only two members' logits are held at once
        else:
            seg = np.concatenate(list(logits))
        return Inference({"seg": seg}, tumor=math.nan)

    def decide(self, foreground: np.ndarray) -> np.ndarray:
        """Which classes are present, bool (K, W, H, D), from the logits of `infer`."""
        if self.join == "logits":
            return decide(foreground, self.variant)
        join = np.logical_or if self.join == "union" else np.logical_and
        parts = np.split(foreground, len(self.members))
        return join.reduce([decide(part, self.variant) for part in parts])


def class_bitmask(foreground: np.ndarray, decide: Callable) -> np.ndarray:
    """uint8 (W, H, D) whose bit k says that `decide` finds class k present in the logits.

    For metrics, as classes may overlap; files take the label_map.
    """
    classes = np.zeros(foreground.shape[1:], np.uint8)
    for k, present in enumerate(decide(foreground)):
        classes |= present.astype(np.uint8) << k
    return classes


def label_map(foreground: np.ndarray) -> np.ndarray:
    """uint8 labels 0, 1 .. K; where several classes are present, the highest logit wins."""
    labels = np.zeros(foreground.shape[1:], np.uint8)
    highest = np.zeros_like(foreground[0])  # the background has the logit 0
    for label, logits in enumerate(foreground, start=1):
        labels[logits > highest] = label
        highest = np.maximum(highest, logits)
    return labels


def find_organs(loaded: LoadedRun, images: np.ndarray, meta: CaseMeta) -> np.ndarray:
    """The organs (v5) of a preprocessed study, a uint8 label map on the grid of its files."""
    branch = loaded.model.variant.organ_branch
    inference = infer(loaded, images, heads=(branch,))
    return labels_to_native(meta, label_map(inference.maps[branch]))


# ------------------------------------------------------------------ evaluation


def evaluate(
    loaded: LoadedRun, cases: list[Case], native: bool = True, bar: str = ""
) -> list[dict]:
    """The score_case of each study; bar: the name of a progress bar, if there is to be one."""
    studies = progress(cases, bar, "study") if bar else cases
    return [score_case(loaded, case, native) for case in studies]


def score_case(loaded: LoadedRun, case: Case, native: bool = True) -> dict:
    """The metrics of one study by the name of their column.

    native: on the grid of the study's mask, and not only for the mask but also for single branches
    (ct_*, pet_*), the SUV thresholds of PET/CT (suv4_*, suv2.5_*), organs and T. Otherwise, as in
    validation, for the mask on the cached grid.
    """
    model, variant = loaded.model, loaded.model.variant
    heads = ["seg"]
    if native:
        heads += model.scored_branches
        if variant.tumor:
            heads.append("tumor")
    inference = infer(loaded, case.load("images"), heads)

    # Every mask to score, as a bit map, by the prefix of its columns. The labels 1 and 2 of the
    # true mask are the bits of its first and second class already.
    classify = partial(class_bitmask, decide=model.decide)
    if native:
        truth = case.native_labels()
        spacing = nib.affines.voxel_sizes(np.array(case.meta.native_affine))
        masks = {"": logits_to_native(case.meta, inference.maps["seg"], classify)}
        if loaded.config.kind == "petct":
            for suv in THRESHOLDS_SUV:
                masks[f"suv{suv:g}_"] = case.native_above(suv)
        for branch in model.scored_branches:
            masks[f"{branch}_"] = logits_to_native(case.meta, inference.maps[branch], classify)
    else:
        truth, spacing = case.load("label"), case.meta.spacing
        masks = {"": classify(inference.maps["seg"])}

    row = {"study": case.name, "patient": case.patient, "has_lesion": case.has_lesion}
    for prefix, mask in masks.items():
        for name, value in score_study(mask, truth, variant.classes, spacing).items():
            if not prefix or "_true_" not in name:  # the true volume is the same for all
                row[prefix + name] = value

    # A second inference, so that the logits of all organs do not lie in memory beside the mask's.
    if native and variant.organ_branch and case.organs:
        organs = find_organs(loaded, case.load("images"), case.meta)
        names = variant.tasks[variant.organ_branch].classes
        row |= organ_dices(organs, case.organs.native_labels(), names)
    if "tumor" in heads:
        row["tumor_score"] = inference.tumor
    return row


def tumor_threshold(loaded: LoadedRun, cases: list[Case], gather=list) -> float | None:
    """The best_threshold on T's scores of the cases; None if the network has no T.

    gather: makes one list of the lists of several processes, each with its own cases.
    """
    if not loaded.model.variant.tumor:
        return None
    scores = []
    for case in cases:
        inference = infer(loaded, case.load("images"), heads=("tumor",))
        scores.append((inference.tumor, case.has_lesion))
    return best_threshold(gather(scores))


def best_threshold(scores: list[tuple[float, bool]]) -> float:
    """The threshold on T's study score with the best balanced accuracy.

    scores: of each study, and whether it has a lesion. The threshold is 1/2 or the middle between
    two neighbouring scores; of equally good ones it is that nearest to 1/2. It is 1/2 if all
    studies have a lesion, or none.
    """
    values, has_lesion = np.reshape(scores, (-1, 2)).T
    has_lesion = has_lesion > 0
    if has_lesion.all() or not has_lesion.any():
        return 0.5

    def quality(threshold: float) -> tuple[float, float]:
        called = values > threshold
        sensitivity = called[has_lesion].mean()
        specificity = (~called)[~has_lesion].mean()
        return sensitivity + specificity, -abs(threshold - 0.5)

    ordered = np.unique(values)
    middles = (ordered[:-1] + ordered[1:]) / 2
    return float(max([0.5, *middles], key=quality))


def add_tumor_calls(rows: list[dict], threshold: float | None) -> None:
    """Add to each study that has a score of T whether it is above the threshold, 0 or 1."""
    if threshold is None:
        return
    for row in rows:
        if "tumor_score" in row:
            row["tumor_called"] = float(row["tumor_score"] > threshold)


def summarize_validation(rows: list[dict]) -> dict[str, float]:
    """What metrics.csv holds of the validation studies; NaN where there are none.

    val_dice: the mean over the studies with a lesion and, for brain tumours, over whole, edema and
    core. val_fpv_healthy_ml: the mean FPV of the studies without a lesion (PET/CT).
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
    """Write <part>_studies.csv and a summary; returns what summarize_studies makes of the rows.

    The summary is summary.json for the test part, <part>_summary.json for others; it holds `facts`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{part}_studies.csv", rows)

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


def find_unlabelled(folder: Path, config: Config) -> StudyFolder:
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


def refuse_existing(targets: list[Path]) -> None:
    """Raises UserError if one of these files is there."""
    existing = list(filter(Path.exists, targets))
    if existing:
        count = f"exists already, as do {len(existing) - 1} more files"
        raise UserError(f"{existing[0]}: {count}. Add --overwrite, or choose another --out.")


def predict(
    loaded: LoadedRun,
    folder: Path,
    out: Path,
    overwrite: bool = False,
    organs_out: Path | None = None,
) -> list[Path]:
    """Write the mask of every study below `folder` to `out`/<study>.nii.gz; returns the paths.

    A mask has 1 for lesions, of brain tumours 1 for edema and 2 for core. It lies on the grid of
    the image study.reference, PET in most layouts. organs_out: the folder of the organ maps (v5)
    and their names. Raises UserError for a run that cannot predict, for studies of another kind
    than the run's, for masks that exist (unless overwrite) and, after all studies, for bad ones
    (unless config.skip_bad).
    """
    model, config = loaded.model, loaded.config
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
    if not overwrite:
        refuse_existing(targets)

    findings, written = list(data.findings), []
    for study in progress(data.studies, "predict", "study"):
        try:
            arrays, meta = preprocess(study, settings_for(config))
        except BadStudy as error:
            findings += error.findings
            continue
        for warning in meta.facts["warnings"]:
            to_stderr(warning)

        inference = infer(loaded, arrays["images"])
        mask = logits_to_native(meta, inference.maps["seg"], label_map)
        path = out / mask_name(study)
        reference = study.sources[study.reference].path
        write_mask(path, mask, reference)
        written.append(path)
        if organs_out:
            organs = find_organs(loaded, arrays["images"], meta)
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
# What replaces the options of a run that describe its own data when it is given other data.
OTHER_DATA = {"channels": (), "lesion_labels": (), "own_grids": False, "organs": None}
# The options that the runs of an ensemble have in common, and those of a late fusion.
ENSEMBLE_ALIKE = ("kind", "spacing", "ct")
LATE_FUSION_ALIKE = (*ENSEMBLE_ALIKE, "patch", "modality", "overlap", "window_weights")


def refuse_unlike(runs: list[Path], name: str, values: list) -> None:
    """Raises UserError if the runs differ in the values that they have of something."""
    for run, value in zip(runs, values, strict=True):
        if value != values[0]:
            raise UserError(f"{run}: differs from {runs[0]} in {name}. Choose runs that agree.")


def open_model(
    runs: list[Path], checkpoint: str, given: dict, join: str | None = None
) -> LoadedRun:
    """A run as load_run opens it, or several as an Ensemble with the config of the first.

    join: one of LATE_FUSIONS, for a run of `ct` and one of `pet`; without it several runs are
    averaged. Raises UserError if the runs cannot be joined.
    """
    members = [load_run(run, checkpoint, given) for run in runs]
    if len(members) == 1:
        return members[0]

    versions = [member.config.version for member in members]
    if join and versions != ["ct", "pet"]:
        order = " and ".join(versions)
        raise UserError(f"--late-fusion takes a run of `ct`, then one of `pet`, not {order}.")

    alike = LATE_FUSION_ALIKE if join else ENSEMBLE_ALIKE
    for name in alike:
        refuse_unlike(runs, name, [getattr(member.config, name) for member in members])
    refuse_unlike(runs, "classes", [member.model.variant.classes for member in members])
    return members[0]._replace(model=Ensemble(members, join or "logits"))


def load_part(run: Path, part: str | None, given: dict, config: Config) -> tuple[str, list[Case]]:
    """The name of the part of a run's splits to evaluate, and its studies, with CT as in --ct.

    config: the run's, as load_run returns it. Raises UserError, also for studies or organ maps of
    another kind.
    """
    # As in train(); what the run has settled stays as it is.
    data = find_data(config, to_stderr)
    config = resolve(config, data.kind)
    cases = load_cases(data, config, to_stderr)
    config = with_organ_names(config, cases, to_stderr)

    part, cases = choose_cases(run, part, given, cases)
    return part, with_swapped_ct(cases, config.ct)


def choose_cases(
    run: Path, part: str | None, given: dict, cases: list[Case]
) -> tuple[str, list[Case]]:
    """The name of the part of a run's splits to evaluate, and its studies.

    part: None is "test", but "all" for another --data of which the run knows no study. Raises
    UserError if the part is empty or if a study of it is missing.
    """
    splits = load_splits(run)
    names = {case.name for case in cases}
    if part is None:
        knows_some = not names.isdisjoint(itertools.chain(*splits.values()))
        part = "test" if knows_some or "data" not in given else "all"

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
    loaded = open_model(runs, args.checkpoint, given, args.late_fusion)
    splits = [load_splits(each) for each in runs]
    # With other splits a run may have trained on the test studies of the first one. An ensemble can
    # also be tested on --data of its own, and is told below what it has seen of them.
    if args.late_fusion or (args.ensemble and "data" not in given):
        refuse_unlike(runs, "splits", splits)
    folder = results_folder(run, args)

    part, cases = load_part(run, args.part, given, loaded.config)
    names = {case.name for case in cases}
    for each, parts in zip(runs, splits, strict=True):
        seen = names.intersection(parts["train"] + parts["val"])
        if seen:
            count = f"{len(seen)} of these {len(names)} studies"
            to_stderr(f"{each}: {count} trained or selected it")

    rows = evaluate(loaded, cases, bar=f"{folder.name} {part}")
    if (run / "summary.json").exists():
        summary = read_json(run / "summary.json", parse=dict)
        add_tumor_calls(rows, summary.get("tumor_threshold"))
    facts = {
        "run": str(run),
        "checkpoint": args.checkpoint,
        "checkpoint_epoch": loaded.checkpoint["epoch"],
        "val_dice": loaded.checkpoint["val_dice"],
        "data": loaded.config.data,
    }
    systems = write_results(folder, part, rows, facts)

    if args.late_fusion:  # the folder is a row of the paper's Table 3, as that of a run is
        record = {"late_fusion": args.late_fusion, "runs": list(map(str, runs))}
        save_config(folder, loaded.config, loaded.device.type, **record)
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
    actions(
        "--ensemble",
        action="store_true",
        help="score the mean of the runs' logits; --predict of several runs takes it too",
    )
    actions("--predict", type=Path, metavar="DIR", help="predict the studies in DIR, unlabelled")
    add(
        "--part",
        choices=("train", "val", "test", "all"),
        help="part of the run's splits [test; all for studies it has not seen]",
    )
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
        loaded = open_model(args.runs, args.checkpoint, given)
        for path in predict(loaded, args.predict, args.out, args.overwrite, args.organs_out):
            print(path)
        return

    joined = args.late_fusion or args.ensemble
    groups = [args.runs] if joined else [[run] for run in args.runs]
    print_results([evaluate_runs(runs, args, given) for runs in groups])


def print_results(evaluations: list[Evaluation]) -> None:
    """Print a table with a column for each system of each evaluation."""
    systems = {}
    for evaluation in evaluations:
        systems |= systems_of_run(evaluation.name, evaluation.systems)

    # An SUV threshold is the same for all runs on the same studies: one column, after the runs. On
    # different studies it has no one value; each summary.json has its own.
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
