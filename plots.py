"""Figures and records of a run: metrics.csv, TensorBoard events, curves.png and examples.png.
The paper's figures:

    python plots.py SEARCH                 Figs. 4-6 and supplement Fig. 1 from SEARCH/results.csv
    python plots.py --qualitative RUN ... --out DIR    Fig. 7, or Fig. 8 of brain tumour runs
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen on a compute node
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy import ndimage

import eval as evaluation
from data import PREPROCESSING, THRESHOLD_SUV, Case, UserError, atomic, shuffle_voxels
from mirror_unet import VARIANTS, margins

# Okabe and Ito's palette, told apart by colour-blind readers
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OUTLINES = {"truth": COLORS[2], "prediction": COLORS[1], "edema": COLORS[4], "core": COLORS[5],
            "whole": COLORS[3]}  # fmt: skip
TERMS = ("rec_ct", "rec_pet", "seg", "seg_edema", "seg_core", "seg_whole", "fusion", "cls")

# ------------------------------------------------------------------ records


def write_metrics(run: Path, rows: list[dict]) -> None:
    """metrics.csv: a row per epoch; empty where an epoch has no such value."""
    with atomic(run / "metrics.csv") as file:
        file.write(pd.DataFrame(rows).to_csv(index=False).encode())


def read_metrics(run: Path, epochs: int) -> list[dict]:
    """The rows of metrics.csv up to `epochs`, the last epoch that last.pt holds."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    rows = pd.read_csv(path).query("epoch <= @epochs").to_dict("records")
    return [{k: v for k, v in row.items() if not pd.isna(v)} for row in rows]


def tensorboard(run: Path, start: int):
    """A TensorBoard writer that hides what an interrupted run logged after epoch `start`."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:  # the events are an extra; metrics.csv holds the same numbers
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)


def log_epoch(writer, row: dict) -> None:
    for name, value in row.items() if writer else ():
        if name != "epoch":
            group = "gradient" if name.startswith("grad_") else "train"
            writer.add_scalar(f"{group}/{name.removeprefix('grad_')}", value, row["epoch"])
    if writer:
        writer.flush()


def epoch_line(row: dict, left: float, first: bool) -> str:
    """One aligned line per epoch, under a heading before the first; left: seconds to the end."""
    terms = [t for t in TERMS if t in row]
    head = f"{'epoch':>5}{'loss':>9}" + "".join(f"{t:>11}" for t in terms)
    head += f"{'val Dice':>10}{'patches/s':>11}{'wait':>6}{'left':>9}"
    line = f"{row['epoch']:>5}{row['loss']:>9.4f}" + "".join(f"{row[t]:>11.4f}" for t in terms)
    dice = f"{row['val_dice']:.4f}" if "val_dice" in row else ""
    line += f"{dice:>10}{row['patches_per_s']:>11.1f}{row['data_wait']:>6.0%}"
    line += f"{timedelta(seconds=round(left))!s:>9}"
    return f"{head}\n{line}" if first else line


# ------------------------------------------------------------------ curves


def curves(run: Path) -> None:
    """curves.png: loss terms, validation Dice, each task's gradient on the shared layers, speed."""
    frame = pd.read_csv(run / "metrics.csv")
    terms = [t for t in TERMS if t in frame]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    epoch = frame["epoch"]
    for color, term in zip(COLORS, terms, strict=False):
        axes[0].plot(epoch, frame[term], color=color, label=term)
        if f"grad_{term}" in frame:
            axes[2].plot(epoch, frame[f"grad_{term}"], color=color, label=term)
    axes[0].plot(epoch, frame["loss"], color="black", linestyle="--", label="loss")
    positive = bool((frame[[*terms, "loss"]] > 0).all(axis=None))  # a learned weight may not be
    axes[0].set(title="Weighted loss terms", yscale="log" if positive else "symlog")
    axes[2].set(title="Gradient norm on the shared layers", yscale="log")
    if "val_dice" in frame:
        dice = frame.dropna(subset="val_dice")
        axes[1].plot(dice["epoch"], dice["val_dice"], color=COLORS[0], marker="o", label="val")
    axes[1].set(title="Validation Dice", ylim=(0, 1))
    axes[3].plot(epoch, frame["patches_per_s"], color=COLORS[0], label="patches per second")
    axes[3].plot(epoch, 100 * frame["data_wait"], color=COLORS[1], label="waiting for data, %")
    axes[3].set(title="Speed", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save(figure, run / "curves.png")


def save(figure, *paths: Path, dpi: int = 110) -> None:
    """Write a figure in the format that each name ends in, and close it."""
    for path in paths:
        with atomic(path) as file:
            undated = {"metadata": {"CreationDate": None}} if path.suffix == ".pdf" else {}
            figure.savefig(file, format=path.suffix[1:], dpi=dpi, **undated)
    plt.close(figure)


# ------------------------------------------------------------------ images of a study


@torch.inference_mode()
def all_outputs(model, image: np.ndarray, config, device) -> dict[str, np.ndarray]:
    """Every head over the whole study by name, each (K, W, H, D); logits as probabilities."""
    names: list[tuple[str, int]] = []

    def run(windows):
        with evaluation.autocast(device, config.amp):
            windows = evaluation.see(windows, config.modality)
            out = model(windows[:, :1], windows[:, 1:])
        maps = {"margin": margins(out.seg)}
        if model.variant.fused and model.theta is not None:  # the θ-combination of v4
            maps["fused"] = out.seg.float().softmax(1)[:, 1:]
        for name in ("ct_rec", "pet_rec"):
            maps[name] = getattr(out, name)
        for name in ("ct_seg", "pet_seg", "btl_seg"):
            value = getattr(out, name)
            maps[name] = None if value is None else 1 - value.float().softmax(1)[:, :1]
        maps = {name: value.float() for name, value in maps.items() if value is not None}
        names[:] = [(name, value.shape[1]) for name, value in maps.items()]
        return torch.cat(list(maps.values()), dim=1), None

    model.eval()
    stitched, _ = evaluation.sliding_window(
        run, image, config.patch, config.overlap, config.window_weights, config.window_batch, device
    )
    parts = torch.split(stitched.cpu(), [width for _, width in names])
    return {name: part.numpy() for (name, _), part in zip(names, parts, strict=True)}


def largest_lesion(truth: np.ndarray, axis: int) -> int:
    """The plane across `axis` that cuts most of the largest lesion; the middle one without any."""
    regions, count = ndimage.label(truth > 0, evaluation.EIGHTEEN)
    if not count:
        return truth.shape[axis] // 2
    largest = regions == np.bincount(regions.ravel())[1:].argmax() + 1
    return int(largest.sum(axis=tuple({0, 1, 2} - {axis})).argmax())


class View:
    """One study in one plane: inputs, all outputs and masks by name, each (rows, columns).

    Coronal through a body, axial through a head, seen as radiologists do: the patient's right is
    at the left. `seen` is what the network gets in place of the study's own images.
    """

    def __init__(self, model, case: Case, config, device, seen: np.ndarray | None = None):
        image = np.asarray(case.load("images"), np.float32)
        truth = np.asarray(case.load("label"))
        seen = image if seen is None else seen
        out = all_outputs(model, seen, config, device)
        self.kind, self.variant = config.kind, model.variant
        names = model.variant.classes
        found = evaluation.named_masks(evaluation.bits(out.pop("margin"), model.variant), names)
        maps = {"ct": image[0], "pet": image[1], "seen": seen[0]}
        maps |= {name: value[0] for name, value in out.items()}
        maps |= {f"found {name}": mask for name, mask in found.items()}
        masks = evaluation.named_masks(truth, names)
        maps |= {f"true {name}": mask for name, mask in masks.items()}
        axis, up = (1, 2) if config.kind == "petct" else (2, 1)
        self.at = largest_lesion(truth, axis)
        self.aspect = config.spacing[up] / config.spacing[0]
        step = -1 if PREPROCESSING[config.kind].axes[0] == "R" else 1
        self.maps = {n: np.rot90(m.take(self.at, axis))[:, ::step] for n, m in maps.items()}
        self.head = (self.maps["ct"] != 0) | (self.maps["pet"] != 0)

    def panel(self, name: str, title: str = "", final: bool = False, **outlined) -> dict:
        """What draw_panel draws: an image with its grey or colour scale, and masks by name.

        A reconstruction has the scale of its original. The background of MRI inputs is black.
        """
        image = self.maps[name]
        style = {"cmap": "gray", "span": (0, 1)}
        if name.endswith("_seg") or name == "fused":
            style = {"cmap": "inferno", "span": (0, 1)}
        elif self.kind == "mri":
            source = self.maps["pet" if name.startswith("pet") else "ct"]
            style["span"] = tuple(np.percentile(source, (0.5, 99.8)))
            if name in ("ct", "pet", "seen"):
                image = np.where(self.head, image, style["span"][0])
        elif name.startswith("pet"):  # SUV 0 to 10
            style = {"cmap": "gray_r", "span": (0, 10 / PREPROCESSING["petct"].clip[1][1])}
        shown = {"image": image, "aspect": self.aspect, "title": title, "final": final}
        return shown | style | {"lines": outlined}


def draw_panel(axis, panel: dict, fill: float = 0.0) -> None:
    """An image and the outlines of masks, filled with opacity `fill`; the final one in a box."""
    low, high = panel["span"]
    axis.imshow(panel["image"], cmap=panel["cmap"], vmin=low, vmax=high, aspect=panel["aspect"])
    for name, mask in panel["lines"].items():
        if mask.any():
            style = "dashed" if name == "core" else "solid"  # in grey, edema looks alike
            color = [OUTLINES[name]]
            axis.contour(mask, levels=[0.5], colors=color, linewidths=0.9, linestyles=style)
            if fill:
                axis.contourf(mask, levels=[0.5, 1.5], colors=color, alpha=fill)
    for spine in axis.spines.values():
        spine.set(visible=panel["final"], color=COLORS[1], linewidth=2)


def draw_grid(rows, labels, titles=None, width=1.5, highest=np.inf, fill=0.0):
    """A figure of rows of panels (None: an empty place), with labels at the left.

    titles: of the columns; a panel's own title then stands below it, else above the first row.
    width: of a panel in inches, less if the figure would exceed the height `highest`.
    """
    panels = [panel for row in rows for panel in row if panel]
    sizes = [(*p["image"].shape, p["aspect"]) for p in panels]
    ratio = min(max(max(high * a / wide for high, wide, a in sizes), 0.6), 2.2)
    two = any("\n" in name for name in titles or [panel["title"] for panel in rows[0]])
    left, gap, below, bottom = 0.2, 0.05, 0.13 if titles else 0.0, 0.24  # inches
    top = 0.32 if two else 0.2
    room = (highest - top - bottom) / len(rows) - below - gap
    width = min(width, room / ratio)
    high, columns = width * ratio, len(rows[0])
    size = (left + columns * (width + gap), top + bottom + len(rows) * (high + below + gap))
    figure = plt.figure(figsize=size)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            x, y = left + j * (width + gap), size[1] - top - high - i * (high + below + gap)
            box = (x / size[0], y / size[1], width / size[0], high / size[1])
            axis = figure.add_axes(box, xticks=[], yticks=[], frame_on=panel is not None)
            if panel:
                draw_panel(axis, panel, fill)
            if panel and titles:
                axis.set_xlabel(panel["title"], fontsize=6, labelpad=2)
            if i == 0:
                axis.set_title(titles[j] if titles else panel["title"], fontsize=7, pad=3)
            if j == 0:
                axis.set_ylabel(labels[i], fontsize=7 if titles else 6, labelpad=3)
    drawn = {name for panel in panels for name, mask in panel["lines"].items() if mask.any()}
    handles = [
        Line2D([], [], color=color, linestyle="--" if name == "core" else "-", label=name)
        for name, color in OUTLINES.items()
        if name in drawn
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def examples(path: Path, model, cases: list[Case], config, device, most: int = 4) -> None:
    """examples.png in the manner of Fig. 7: a row per study, through its largest lesion.

    Columns: CT, PET, the output of each branch, of the bottleneck decoder (or the fusion), for
    PET/CT what a threshold of SUV 4 would mark, the prediction and the truth.
    """
    ill = sorted((c for c in cases if c.has_lesion), key=lambda c: -c.meta["lesion_voxels"])
    step = max(1, len(ill) // most)
    chosen = ill[::step][:most] or cases[:1]
    rows = [example_row(View(model, case, config, device)) for case in chosen]
    save(draw_grid(rows, [case.name.split("/")[0] for case in chosen]), path)


def example_row(view: View) -> list[dict]:
    """The panels of one study, titled."""
    petct, variant = view.kind == "petct", view.variant
    ct, pet = ("CT", "PET") if petct else ("FLAIR", "T1Gd")
    of_pet = {"edema+core": "whole"}.get(variant.pet, variant.pet)  # 1 - p(background)
    titles = {
        "ct": ct,
        "pet": f"{pet} (SUV 0-10)" if petct else pet,
        "ct_rec": f"{ct} branch:\nreconstruction",
        "ct_seg": f"{ct} branch:\np({variant.ct})",
        "pet_seg": f"{pet} branch:\np({of_pet})",
        "pet_rec": f"{'bottleneck' if variant.btl else 'reconstruction'}:\n{pet}",
        "btl_seg": "bottleneck:\np(whole)",
        "fused": "fused with θ:\np(lesion)",
    }
    row = [view.panel(name, title) for name, title in titles.items() if name in view.maps]
    if petct:
        hot = view.maps["pet"] * PREPROCESSING["petct"].clip[1][1] >= THRESHOLD_SUV
        row.append(view.panel("pet", "SUV ≥ 4", prediction=hot))
    for of, title in (("found", "prediction"), ("true", "truth")):
        masks = {title if petct else n: view.maps[f"{of} {n}"] for n in variant.classes}
        row.append(view.panel("pet" if petct else "ct", title, **masks))
    return row


# ------------------------------------------------------------------ Figs. 7 and 8


def phi_of_study(image: np.ndarray, config) -> tuple[np.ndarray, str]:
    """Φ(x_C) over a whole study (2, W, H, D) at the strength of training, and what it was.

    Noise has the largest σ that training draws. Shuffling takes as many cubes as touch the same
    share of the voxels as in a training crop. Both are seeded by the run's seed.
    """
    ct, said = torch.tensor(image[None, :1]), ""  # (1, 1, W, H, D)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.phi == "noise":
            ct = ct + config.noise_sigma * torch.randn_like(ct)
            said = f"noise, σ = {config.noise_sigma:g}"
        elif config.phi == "shuffle":
            edge = min(config.shuffle_edge, *ct.shape[2:])
            share = config.shuffle_count * config.shuffle_edge**3 / np.prod(config.patch)
            count = max(round(share * ct.numel() / edge**3), min(config.shuffle_count, 1))
            ct = shuffle_voxels(ct, edge, count)
            said = f"{count} cube{'s' * (count != 1)} of {edge}³"
    return np.concatenate([ct[0].numpy(), image[1:]]), said


def qualitative(runs: list[Path], study: str | None = None, given: dict | None = None):
    """Fig. 7 from PET/CT runs, Fig. 8 from brain tumour runs: a row per run, all of one study.

    Fig. 7: CT as the network sees it in training (phi_of_study), PET, both branches, the
    bottleneck's PET (v2, v3) or the θ-combination (v4), truth. Fig. 8: FLAIR, T1Gd, both branches,
    the bottleneck, the union of edema and core, truth. The final segmentation is in a red box. All
    of a row is from one pass with Φ(x_C); with --bottleneck own the mask is that of testing.

    study: of the test part of every run; by default the one with the most lesion volume.
    given: options of train.Config in place of the runs'. Returns the figure, its name, and the
    study with its plane. Raises UserError.
    """
    from train import open_data

    opened = []
    for run in runs:
        model, config, device, _ = evaluation.load_run(run, "best", given or {})
        if config.version not in VARIANTS[config.kind] or config.modality != "both":
            raise UserError(f"{run}: is no Mirror U-Net of both modalities. Leave it out.")
        config, cases = open_data(config, lambda text: print(text, file=sys.stderr))
        test = argparse.Namespace(part="test")
        _, cases = evaluation.choose_cases(run, test, given or {}, cases)
        opened.append((run, model, config, device, {case.name: case for case in cases}))
    kind, spacing = opened[0][2].kind, opened[0][2].spacing
    for run, _, config, *_ in opened:
        if (config.kind, config.spacing) != (kind, spacing):
            raise UserError(f"{run}: kind or spacing differ from those of {opened[0][0]}.")
    opened.sort(key=lambda o: (VERSIONS.index(o[2].version), [*PHIS].index(o[2].phi)))
    common = set.intersection(*({*cases} for *_, cases in opened))
    if not common:
        raise UserError("No study is in the test part of all of these runs. Use the same splits.")
    if study is not None and study not in common:
        raise UserError(f"--study {study}: not in the test part of all runs, as {min(common)} is.")

    def volume(name: str) -> float:
        meta = opened[0][-1][name].meta
        return meta["lesion_voxels"] * np.prod(meta["native_spacing"])

    study = study or max(sorted(common), key=volume)
    rows, labels = [], []
    for _, model, config, device, cases in opened:
        seen, said = phi_of_study(np.asarray(cases[study].load("images"), np.float32), config)
        view = View(model, cases[study], config, device, seen)
        theta = "" if model.theta is None else f"θ = {model.theta.item():.2g}"
        rows.append((petct_row if kind == "petct" else mri_row)(view, said, theta))
        labels.append(config.version + (f"-{config.phi}" if config.phi != "none" else ""))
    if len({*labels}) < len(labels):
        labels = [o[0].name for o in opened]
    if kind == "petct":
        titles = ["CT, Φ($x_C$)", "PET", "CT branch", "PET branch", "bottleneck\nor fused", "truth"]
    else:
        titles = ["FLAIR", "T1Gd", "FLAIR branch", "T1Gd branch", "bottleneck", "united", "truth"]
    width = (7 - 0.2) / len(titles) - 0.05
    figure = draw_grid(rows, labels, titles, width, highest=8.8, fill=0.35)
    plane = "coronal" if kind == "petct" else "axial"
    return figure, "fig7" if kind == "petct" else "fig8", f"{study}, {plane} slice {view.at}"


def petct_row(view: View, said: str, theta: str) -> list[dict | None]:
    """A row of Fig. 7; the last column but one is empty for v1."""
    maps, final = view.maps, {"prediction": view.maps["found lesion"], "final": True}
    row = [view.panel("seen", said), view.panel("pet")]
    if view.variant.fused:
        row.append(view.panel("ct", "segmentation", prediction=maps["ct_seg"] > 0.5))
        row.append(view.panel("pet", "segmentation", prediction=maps["pet_seg"] > 0.5))
        row.append(view.panel("pet", f"fused, {theta}", **final))
    else:
        row.append(view.panel("ct_rec", "reconstruction"))
        row.append(view.panel("pet", "segmentation", **final))
        row.append(view.panel("pet_rec", "reconstruction") if "pet_rec" in maps else None)
    return [*row, view.panel("pet", truth=maps["true lesion"])]


def mri_row(view: View, said: str, theta: str) -> list[dict | None]:
    """A row of Fig. 8; the bottleneck is empty for v1."""
    maps = view.maps
    edema, core = {"edema": maps["found edema"]}, {"core": maps["found core"]}
    row = [view.panel("seen", said), view.panel("pet")]
    if "ct_rec" in maps:  # v2-rec
        row.append(view.panel("ct_rec", "reconstruction"))
        row.append(view.panel("pet", "edema and core", **edema, **core))
        row.append(view.panel("pet_rec", "T1Gd reconstruction"))
    else:
        row += [view.panel("ct", "edema", **edema), view.panel("pet", "core", **core), None]
        if "btl_seg" in maps:
            row[-1] = view.panel("ct", "whole", whole=maps["btl_seg"] > 0.5)
    row.append(view.panel("ct", "edema ∪ core", final=True, whole=maps["found whole"]))
    return [*row, view.panel("ct", edema=maps["true edema"], core=maps["true core"])]


# ------------------------------------------------------------------ figures of a search

VERSIONS = ("v1", "v2", "v2-rec", "v3", "v4")
PHIS = {"none": "L2", "noise": "L2 + noise", "shuffle": "L2 + shuffling"}  # names of Table 2
HATCHES, MARKERS, DASHES = ("", "////", "xxxx"), "osD^v", ("-", "--", (0, (6, 1)), ":", "-.")
PAPER = {  # fonts and lines for a column of 3.3 or a page of 7 inches
    "font.size": 7, "axes.titlesize": 6, "axes.labelsize": 7, "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "axes.linewidth": 0.6, "lines.linewidth": 1,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "hatch.linewidth": 0.4, "grid.alpha": 0.3,
    "grid.linewidth": 0.5, "legend.frameon": False, "legend.borderaxespad": 0.4, "axes.titlepad": 3,
    "legend.borderpad": 0, "axes.axisbelow": True, "figure.constrained_layout.use": True,
}  # fmt: skip


def read_trials(path: Path) -> pd.DataFrame:
    """The trials of a search, a row each, from its results.csv; empty values are NaN.

    `shared` and `theta` are text; `dice` is added: the test Dice in %, for MRI of the whole tumour.
    Raises UserError if the file is missing or not of a search.
    """
    words = ("trial", "search", "status", "reason", "kind", "version", "shared", "phi", "theta")
    text = dict.fromkeys(words, str)
    others = dict.fromkeys(("lambda_rec", "lambda_cls", "test_dice", "test_dice_whole"), float)
    others["studies"] = str  # a hash, though it may look like a number
    try:
        trials = pd.read_csv(path, dtype=text | others, keep_default_na=False, na_values=[""])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Give the folder of a search.") from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not the results of a search ({reason}).") from None
    needed = [*text, "lambda_rec", "lambda_cls", "seed", "epochs_done", "val_dice"]
    if missing := [name for name in needed if name not in trials]:
        raise UserError(f"{path}: not the results of a search (no column {', '.join(missing)}).")
    trials["search"] = trials["search"].fillna("")
    trials["dice"] = np.nan
    for name in ("test_dice", "test_dice_whole"):
        if name in trials:
            trials["dice"] = trials["dice"].fillna(100 * trials[name])
    return trials


def comparable(trials: pd.DataFrame, table: str) -> list[tuple[str, pd.DataFrame]]:
    """The trials of a table (a key of TABLES) in groups that differ only in what it compares, in
    their seed and in what a launch decides; and in words what parts the groups.

    An option that a trial does not read (NaN) parts it from no other, nor does a λ_seg that is the
    version's own: those of brain tumours have one each.
    """
    from train import LAUNCH, Config

    others, compared = TABLES[table]
    trials = trials[np.array([bool(set(own.split()) - others) for own in trials["search"]], bool)]
    if trials.empty:
        return []
    aside = {*compared, "seed", "splits"} | LAUNCH - {"epochs"}  # `studies` tells the splits apart
    options = [name for name in (*(f.name for f in fields(Config)), "studies") if name in trials]
    weights = trials.groupby("version")["lambda_seg"].nunique() if "lambda_seg" in trials else 0
    if "version" in compared and np.max(weights) < 2:
        aside.add("lambda_seg")
    options = [name for name in options if name not in aside and trials[name].nunique() > 1]
    groups = [trials]
    for name in options:
        groups = [part for group in groups for part in split(group, name)]
    rows = [set(group.index) for group in groups]
    found = []
    for i, (own, group) in enumerate(zip(rows, groups, strict=True)):
        if not any(own < other for other in rows) and own not in rows[:i]:
            values = {name: group[name].dropna() for name in options}
            words = [f"{n} {in_words(v.iloc[0])}" for n, v in values.items() if len(v)]
            found.append((", ".join(words), group))
    return found


def in_words(value) -> str:
    """A value of results.csv, where a column with gaps holds its whole numbers as 30.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def split(trials: pd.DataFrame, name: str) -> list[pd.DataFrame]:
    """The trials by the value of an option; those without one are in every part."""
    values, unread = trials[name].dropna().unique(), trials[name].isna()
    return [trials[(trials[name] == value) | unread] for value in values] or [trials]


def dice_table(trials: pd.DataFrame, rows: list[str], column: str) -> tuple[pd.DataFrame, str]:
    """Test Dice in % of `trials` by `rows` and `column`, the mean over seeds, NaN where missing;
    and in words of how many seeds. Raises UserError if there is none."""
    cells = trials.groupby([*rows, column])["dice"]
    table, seeds = cells.mean().unstack(column), cells.count()
    if not seeds.any():
        raise UserError("its trials have no test Dice yet")
    if column == "shared":
        table = table[sorted(table, key=set_order)]
    low, high = seeds[seeds > 0].min(), seeds.max()
    few = f"{low} to " if low < high else ""
    return table, "1 seed" if high == 1 else f"mean of {few}{high} seeds"


def told(table: pd.DataFrame, seeds: str, about: str) -> str:
    """What a figure says of its table: the seeds, missing cells, and what parts it from others."""
    missing = int(table.isna().sum().sum())
    gaps = f"{missing} of {table.size} cells missing" if missing else ""
    return "; ".join(filter(None, (seeds, gaps, about)))


def table_2(trials: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Table 2: rows (version, Φ or, for v4, θ), columns the sets L; as dice_table."""
    return dice_table(trials.assign(method=methods(trials)), ["version", "method"], "shared")


def methods(trials: pd.DataFrame) -> pd.Series:
    """The method of each trial in Table 2: Φ or, for v4, θ."""
    return trials["theta"].where(trials["version"] == "v4", trials["phi"])


def set_order(layers: str) -> tuple:
    """Sorts the sets L: the paper's as in Table 2, then others by size."""
    from tune import SHARED

    paper = [" ".join(map(str, shared)) for shared in SHARED]
    known = paper.index(layers) if layers in paper else len(paper)
    return known, layers != "none", len(layers), layers


def of_version(trials: pd.DataFrame, versions, compared: list[str], what: str) -> pd.DataFrame:
    """The trials of these versions. Raises UserError unless they vary what a figure compares."""
    trials = trials[trials["version"].isin(versions)]
    if len(trials[compared].drop_duplicates()) < 2:
        raise UserError(f"compares {what}, the search does not")
    return trials


def search_axis(trials: pd.DataFrame, said: str, places: int = 0):
    """A figure of one column, of two for many places, for Dice in % over the sets L."""
    figure, axis = plt.subplots(figsize=(3.3 if places < 9 else 7.0, 2.4))
    whole = ", whole tumour" if (trials["kind"] == "mri").any() else ""
    axis.set_ylabel(f"test Dice{whole} (%)")
    axis.set_title(textwrap.fill(said, 54), loc="right", color="0.3")
    axis.grid(axis="y")
    return figure, axis


def name_sets(axis, sets) -> None:
    """The sets L along the x axis, a long one on two lines."""

    def name(layers: str) -> str:
        numbers = layers.split()
        lines = [",".join(numbers[i : i + 3]) for i in range(0, len(numbers), 3)]
        return layers if layers == "none" else "{" + ",\n".join(lines) + "}"

    axis.set_xticks(range(len(sets)), [name(layers) for layers in sets])
    axis.set_xlim(-0.6, len(sets) - 0.4)
    axis.set_xlabel("shared layers L")


def draw_box(axis, at: float, values, width: float, color: str, hatch: str = "") -> None:
    """Quartiles and median; whiskers reach the extremes; a dot per value, in Table 2's order."""
    line = {"color": "black", "linewidth": 0.7}
    axis.boxplot(
        [values], positions=[at], widths=width, whis=(0, 100), showfliers=False, manage_ticks=False,
        patch_artist=True, whiskerprops=line, capprops=line, medianprops=line | {"linewidth": 1.4},
        boxprops={"facecolor": matplotlib.colors.to_rgba(color, 0.45), "hatch": hatch, **line},
    )  # fmt: skip
    spread = at + width * np.linspace(-0.3, 0.3, len(values) + 2)[1:-1]
    axis.plot(spread, values, "o", markersize=2.6, color=color, mec="white", mew=0.4, zorder=3)


@matplotlib.rc_context(PAPER)
def lambda_map(trials: pd.DataFrame, about: str = ""):
    """Fig. 1 of the supplement: test Dice of v3 over λ_rec and λ_class, the best one framed."""
    trials = of_version(trials, ["v3"], ["lambda_rec", "lambda_cls"], "λ of v3")
    table, seeds = dice_table(trials, ["lambda_cls"], "lambda_rec")
    said = told(table, seeds, about)
    values = np.ma.masked_invalid(table.to_numpy())
    figure, axis = plt.subplots(figsize=(3.3, 2.8))
    image = axis.imshow(values, cmap="viridis", origin="lower", aspect="auto")
    for (i, j), value in np.ndenumerate(table.to_numpy()):
        best, dark = value == values.max(), image.norm(value) < 0.6
        axis.text(
            j, i, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center",
            color="white" if dark else "black", weight="bold" if best else "normal", fontsize=6.5,
        )  # fmt: skip
        if best:
            frame = Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, lw=1.6, ec="black")
            axis.add_patch(frame)

    def powers(values) -> list[str]:
        exponents = [np.log10(value) if value > 0 else 0.5 for value in values]
        whole = [abs(e - round(e)) < 1e-6 for e in exponents]
        return [
            f"$10^{{{round(e)}}}$" if w else f"{v:g}"
            for v, e, w in zip(values, exponents, whole, strict=True)
        ]

    axis.set_xticks(range(table.shape[1]), powers(table.columns))
    axis.set_yticks(range(table.shape[0]), powers(table.index))
    axis.set(xlabel=r"$λ_{\mathrm{rec}}$", ylabel=r"$λ_{\mathrm{class}}$")
    axis.patch.set(facecolor="0.9", edgecolor="0.6", hatch="////")  # seen where a cell is missing
    axis.set_title(textwrap.fill(said, 54), loc="right", color="0.3")
    figure.colorbar(image, label="test Dice (%)", pad=0.02)
    return figure, said


@matplotlib.rc_context(PAPER)
def phi_boxes(trials: pd.DataFrame, about: str = ""):
    """Fig. 4: a box per version and Φ over all sets L of shared layers."""
    versions = [v for v in VERSIONS if v != "v4" and v in {*trials["version"]}]
    trials = of_version(trials, versions, ["phi"], "Φ")
    table, seeds = table_2(trials)
    said = told(table, seeds, about)
    figure, axis = search_axis(trials, said)
    for i, version in enumerate(versions):
        for j, phi in enumerate(PHIS):
            values = table.loc[[(version, phi)]] if (version, phi) in table.index else table[:0]
            values = values.to_numpy().ravel()
            if (values := values[~np.isnan(values)]).size:
                draw_box(axis, i + 0.27 * (j - 1), values, 0.22, COLORS[j], HATCHES[j])
    handles = [
        Patch(facecolor=matplotlib.colors.to_rgba(color, 0.45), ec="black", lw=0.7, hatch=h * 2)
        for color, h in zip(COLORS, HATCHES, strict=False)
    ]
    figure.legend(handles, PHIS.values(), loc="outside upper center", ncols=3)
    axis.set_xticks(range(len(versions)), versions)
    return figure, said


@matplotlib.rc_context(PAPER)
def shared_curves(trials: pd.DataFrame, about: str = ""):
    """Fig. 5: a line per version over the sets L; a dot is the best Φ or θ, bold in Table 2."""
    versions = [v for v in VERSIONS if v in {*trials["version"]}]
    trials = of_version(trials, versions, ["shared"], "sets L")
    table, seeds = table_2(trials)
    said = told(table, seeds, about)
    best = table.groupby("version").max()
    figure, axis = search_axis(trials, said, best.shape[1])
    for version in versions:
        k = VERSIONS.index(version)
        axis.plot(
            range(best.shape[1]), best.loc[version], label=version, color=COLORS[k],
            marker=MARKERS[k], linestyle=DASHES[k], markersize=4,
        )  # fmt: skip
    name_sets(axis, best.columns)
    figure.legend(loc="outside upper center", ncols=len(versions), handlelength=3)
    return figure, said


@matplotlib.rc_context(PAPER)
def theta_boxes(trials: pd.DataFrame, about: str = ""):
    """Fig. 6: v4, a box per set L over the fixed θ; the learned θ is a star beside it."""
    trials = of_version(trials.dropna(subset="theta"), ["v4"], ["theta"], "θ")
    table, seeds = table_2(trials)
    said = told(table, seeds, about)
    table = table.loc["v4"]
    figure, axis = search_axis(trials, said, table.shape[1])
    learned = "learn" in table.index
    for i, layers in enumerate(table):
        fixed = table.drop(index="learn", errors="ignore")[layers].dropna()
        if len(fixed):
            draw_box(axis, i - 0.1 * learned, fixed, 0.46, COLORS[0])
    handles = [Patch(facecolor=matplotlib.colors.to_rgba(COLORS[0], 0.45), ec="black", lw=0.7)]
    numbers = [theta for theta in table.index if theta != "learn"]
    names = [f"fixed θ, {min(numbers)} to {max(numbers)}"]
    if learned:
        star = {"marker": "*", "markersize": 6, "color": COLORS[1], "linestyle": "none"}
        handles += axis.plot(np.arange(table.shape[1]) + 0.28, table.loc["learn"], **star)
        names.append("learned θ")
    name_sets(axis, table.columns)
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    return figure, said


# The searches of tune.py whose trials are not for a table, and what the table compares.
TABLES = {
    "table 2": ({"lambdas", "free"}, {"version", "phi", "theta", "shared"}),
    "lambdas": ({"layers", "theta", "table2", "free"}, {"lambda_rec", "lambda_cls"}),
}
SEARCH_FIGURES = {  # the table, the versions that are drawn, and how
    "fig_s1_lambdas": ("lambdas", ("v3",), lambda_map),
    "fig4_phi": ("table 2", tuple(v for v in VERSIONS if v != "v4"), phi_boxes),
    "fig5_shared": ("table 2", VERSIONS, shared_curves),
    "fig6_theta": ("table 2", ("v4",), theta_boxes),
}


# ------------------------------------------------------------------ command line


def publish(figure, out: Path, name: str) -> str:
    """Write a figure for print as PNG and PDF; where, in words."""
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # fonts embedded whole, as text
        save(figure, out / f"{name}.png", out / f"{name}.pdf", dpi=300)
    return f"{name:<15} {out / name}.png, .pdf"


def draw_search(search: Path, out: Path) -> None:
    """Every figure whose comparison the search makes, for each group of comparable trials.

    Raises UserError if there is none.
    """
    from tune import refresh

    refresh(search)
    trials = read_trials(search / "results.csv")
    if trials["dice"].isna().all():
        raise UserError(f"{search}: none of its {len(trials)} trials has a test Dice yet.")
    drawn, reasons = 0, {}
    for name, (table, versions, draw) in SEARCH_FIGURES.items():
        groups = comparable(trials[trials["version"].isin(versions)], table)
        if not groups:
            reasons[name] = "the search has no trials for it"
        for i, (about, part) in enumerate(groups, 1):
            try:
                figure, said = draw(part, about)
            except UserError as error:
                reasons.setdefault(name, str(error) + (about and f" ({about})"))
                continue
            words = re.sub(r"[^\w.]+", "_", about) if len(about) < 150 else str(i)
            print(f"{publish(figure, out, name + (words and f'-{words}'))}   {said}")
            drawn += 1
    if not drawn:
        why = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        raise UserError(f"{search}: no figure to draw of {why}.")
    for name, reason in reasons.items():
        print(f"{name:<16}not drawn: {reason}")


def run_command(argv: list[str] | None = None) -> None:
    """python plots.py: see the top of the file."""
    from train import add_flags

    parser = argparse.ArgumentParser(description="Draw the figures of the paper.")
    parser.add_argument("search", nargs="?", type=Path, help="folder of a search: Figs. 4-6, S1")
    parser.add_argument(
        "--qualitative", nargs="+", type=Path, metavar="RUN", help="folders of runs: Fig. 7 or 8"
    )
    parser.add_argument("--study", help="of the runs' test parts [the one with most lesion]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="[SEARCH/figures]")
    add_flags(parser, evaluation.EVAL_OPTIONS)
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if k in evaluation.EVAL_OPTIONS}
    if bool(args.search) == bool(args.qualitative):
        raise UserError("Give the folder of a search, or --qualitative and folders of runs.")
    if args.search:
        if args.study or given:
            raise UserError("--study and options of runs go with --qualitative. Leave them out.")
        draw_search(args.search, args.out or args.search / "figures")
    elif args.out is None:
        raise UserError("--qualitative: say where to with --out DIR.")
    else:
        figure, name, said = qualitative(args.qualitative, args.study, given)
        print(f"{publish(figure, args.out, name)}   {said}")


def main() -> None:
    from train import command_line

    command_line(run_command)


if __name__ == "__main__":
    from plots import main  # one copy of this module, the one that train imports

    main()
