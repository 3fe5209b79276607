"""Pictures: curves.png and examples.png of a run, and the figures of the paper.

    python plots.py SEARCH                             Figs. 4-6 and supplement Fig. 1 of a search
    python plots.py --qualitative RUN ... --out DIR    Fig. 7, or Fig. 8 of brain tumour runs

A volume is (W, H, D); a plane cut from it is (rows, columns), as it is seen on the page.
"""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from scipy.special import expit, logsumexp

from cache import Case
from claims import NO_VERDICT, claim_groups, claims_table
from common import Parser, UserError, atomic, command_line
from config import Config, add_flags, options_from_args, resolve
from data import shuffle_voxels, with_swapped_ct
from eval import EVAL_OPTIONS, choose_cases, class_bitmask, infer, label_map, to_stderr
from metrics import CONNECTIVITY_18, named_masks
from mirror_unet import IMAGE_NAMES, LESION, UNIONS, VARIANTS, Network, Task, Variant, decide
from preprocess import PREPROCESSING, THRESHOLDS_SUV
from runs import (
    find_data,
    load_cases,
    load_run,
    loss_term_names,
    read_metrics,
    read_trials,
    with_organ_names,
)
from tables import PHIS, VERSIONS, RunGroup, groups_for_table, lambda_grid, table_2

matplotlib.use("Agg")  # a compute node has no screen
matplotlib.rcParams["pdf.fonttype"] = 42  # fonts are embedded whole, as text
# The palette of Okabe and Ito, whose colours a colour-blind reader can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def read_style(text: str) -> dict[str, str]:
    """Settings of matplotlib, one a line, as in its style files."""
    return dict(line.split(": ") for line in text.strip().split("\n"))


PAPER_STYLE = read_style("""
font.size: 7
axes.titlesize: 6
axes.labelsize: 7
xtick.labelsize: 6.5
ytick.labelsize: 6.5
legend.fontsize: 6.5
axes.linewidth: 0.6
lines.linewidth: 1
xtick.major.width: 0.6
ytick.major.width: 0.6
hatch.linewidth: 0.4
grid.alpha: 0.3
grid.linewidth: 0.5
legend.frameon: False
legend.borderaxespad: 0.4
legend.borderpad: 0
legend.handlelength: 3
axes.titlepad: 3
axes.axisbelow: True
figure.constrained_layout.use: True
boxplot.showfliers: False
boxplot.patchartist: True
boxplot.boxprops.linewidth: 0.7
boxplot.whiskerprops.linewidth: 0.7
boxplot.capprops.linewidth: 0.7
boxplot.medianprops.linewidth: 1.4
boxplot.medianprops.color: black
""")  # for a column of 3.3 inches or a page of 7 inches
GRID_STYLE = read_style("""
axes.titlesize: 7
axes.titlepad: 3
axes.labelsize: 7
axes.labelpad: 2
legend.fontsize: 7
legend.frameon: False
figure.constrained_layout.w_pad: 0.02
figure.constrained_layout.h_pad: 0.02
figure.constrained_layout.wspace: 0
figure.constrained_layout.hspace: 0
""")  # for rows of images


class DrawnFigure(NamedTuple):
    """A figure, the name of its file, and what the console says of it."""

    figure: Figure
    name: str
    about: str


def save(figure: Figure, *paths: Path, **options) -> None:
    """Write a figure in the format of each path's suffix, without a date, and close it."""
    for path in paths:
        with atomic(path) as file:
            no_date = {"CreationDate": None}
            figure.savefig(file, format=path.suffix[1:], metadata=no_date, **options)
    plt.close(figure)


# ------------------------------------------------------------------ the pictures of a run


def pictures(run: Path, model: Network, cases: list[Case], config: Config, device) -> None:
    """Draw all pictures of a finished run; cases are its test studies."""
    curves(run)
    examples(run / "examples.png", model, cases, config, device)


def curves(run: Path) -> None:
    """Draw curves.png: loss terms, validation, gradients on the shared layers, and speed."""
    rows = read_metrics(run)
    if not rows:  # the file was lost
        return

    frame = pd.DataFrame(rows).set_index("epoch")
    frame["patches per second"] = frame["patches_per_s"]
    frame["waiting for data, %"] = 100 * frame["data_wait"]
    losses = [*loss_term_names(rows[0]), "loss"]
    columns = {
        "Weighted loss terms": losses,
        "Gradient norm on the shared layers": [f"grad_{name}" for name in losses],
        "Validation: Dice": ["val_dice"],
        "Validation: FPV of healthy studies, ml": ["val_fpv_healthy_ml"],
        "Speed": ["patches per second", "waiting for data, %"],
    }
    figure, axes = plt.subplots(1, len(columns), figsize=(20, 3.6), layout="constrained")
    for axis, title in zip(axes, columns, strict=True):
        for name, color in zip(columns[title], COLORS * len(losses), strict=False):
            if name in frame:  # an epoch without validation has an empty cell
                axis.plot(frame[name].dropna(), ".-", color=color, label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)

    # A term with a learned weight may be negative.
    positive = (frame[losses] > 0).all(axis=None)
    axes[0].set_yscale("log" if positive else "symlog")
    axes[1].set_yscale("log")
    axes[2].set_ylim(0, 1)
    axes[4].set_ylim(0)
    save(figure, run / "curves.png", dpi=110)


def examples(path: Path, model: Network, cases: list[Case], config: Config, device, most=4) -> None:
    """Draw examples.png in the manner of Fig. 7: a row for each of at most `most` studies.

    They are spread evenly over the studies with a lesion, from the largest lesion volume down.
    """
    positive = [case for case in cases if case.has_lesion]
    positive.sort(key=lambda case: case.meta.lesion_voxels, reverse=True)
    step = max(1, len(positive) // most)
    chosen = positive[::step][:most] or cases[:1]

    rows = [study_panels(model, case, config, device).panels for case in chosen]
    labels = [case.name.split("/")[0] for case in chosen]
    save(draw_grid(rows, labels, config), path, dpi=110, bbox_inches="tight")


# ------------------------------------------------------------------ a study in one plane


class Look(NamedTuple):
    """How studies of one kind of data are drawn."""

    figure: str  # name of the paper's figure
    plane: str
    across: int  # the axis of a volume (W, H, D) that the plane cuts
    up: int  # the axis that is vertical on the page
    mirrored: bool  # the axis to the right of the page is turned, as the patient's right is left
    background: str  # the image under a mask
    titles: dict[str, str]  # of columns, where the paper's figure has its own
    dice: str  # what the figures of a search call the Dice


LOOKS = {
    "petct": Look(
        figure="fig7",
        plane="coronal",
        across=1,
        up=2,
        mirrored=False,
        background="pet",
        titles={"ct_input": "CT, Φ($x_C$)", "btl": "bottleneck\nor fused"},
        dice="test Dice (%)",
    ),
    "mri": Look(
        figure="fig8",
        plane="axial",
        across=2,
        up=1,
        mirrored=True,
        background="ct",
        titles={},
        dice="test Dice, whole tumour (%)",
    ),
}
TITLES = {  # the columns, from left to right; those that no row fills are left out
    "ct_input": "{ct}",
    "pet_input": "{pet}",
    "ct": "{ct} branch",
    "pet": "{pet} branch",
    "btl": "bottleneck",
    "seg": "fused with θ",
    "threshold": f"SUV ≥ {THRESHOLDS_SUV[0]:g}",
    "union": "united",
    "mask": "prediction",
    "truth": "truth",
}
HIGHEST_SUV = PREPROCESSING["petct"].clip[1][1]  # which the scaled image holds as 1
OUTLINES = {  # colours of masks by name
    "truth": COLORS[2],
    "prediction": COLORS[1],
    "edema": COLORS[4],
    "core": COLORS[5],
    "whole": COLORS[3],
}


@dataclass(frozen=True)
class Panel:
    """One picture in a row: an image, the outlines of masks over it, and a note below it."""

    image: np.ndarray  # (rows, columns)
    limits: tuple[float, float]  # the values that the colour map spans
    colormap: str
    note: str = ""
    outlines: dict[str, np.ndarray] = field(default_factory=dict)  # masks, by name in the legend
    is_final: bool = False  # it shows the final mask, and is framed


class PhiInput(NamedTuple):
    """A whole study as the network is given it in Figs. 7 and 8, and what Φ did to it."""

    images: np.ndarray  # (2, W, H, D)
    note: str


class StudyPlane(NamedTuple):
    """What a network made of a study, in one plane."""

    index: int
    inputs: dict[str, Panel]  # the images "ct" and "pet", and "ct_input" of the CT branch
    background: Panel  # of masks
    outputs: dict[str, np.ndarray]  # the maps of eval.infer, (channels, rows, columns)
    predicted: dict[str, np.ndarray]  # masks by name, those of UNIONS among them
    truth: dict[str, np.ndarray]


class StudyPanels(NamedTuple):
    """The panels of a study by the keys of TITLES, and the index of its plane."""

    panels: dict[str, Panel]
    index: int


def largest_lesion_plane(truth: np.ndarray, axis: int) -> int:
    """The index along `axis` with most voxels of the largest lesion; the middle without any."""
    components, count = ndimage.label(truth > 0, CONNECTIVITY_18)
    if not count:
        return truth.shape[axis] // 2

    sizes = np.bincount(components.ravel())[1:]
    voxels = np.nonzero(components == sizes.argmax() + 1)
    return int(np.bincount(voxels[axis]).argmax())


def cut_plane(volume: np.ndarray, look: Look, index: int) -> np.ndarray:
    """(..., W, H, D) -> (..., rows, columns), with the patient's right at the left."""
    plane = np.rot90(volume.take(index, axis=look.across - 3), axes=(-2, -1))
    return plane[..., ::-1] if look.mirrored else plane


def input_panels(images: np.ndarray, ct_input: np.ndarray, kind: str) -> dict[str, Panel]:
    """The inputs in grey, from planes (2, rows, columns), CT first, and (rows, columns)."""
    if kind == "petct":
        return {
            "ct": Panel(images[0], (0, 1), "gray"),
            "pet": Panel(images[1], (0, 10 / HIGHEST_SUV), "gray_r", note="SUV 0-10"),
            "ct_input": Panel(ct_input, (0, 1), "gray"),
        }

    # MRI has no units, and its air is drawn black.
    panels = {}
    for name, image in (("ct", images[0]), ("pet", images[1]), ("ct_input", ct_input)):
        low, high = np.percentile(image, (0.5, 99.8))
        panels[name] = Panel(np.where(images.any(axis=0), image, low), (low, high), "gray")
    return panels


def infer_plane(model: Network, case: Case, config: Config, device, phi_input) -> StudyPlane:
    """Run the network over a whole study and cut all maps in the plane of its largest lesion.

    phi_input: what the network is given; None for the study's own images.
    """
    images = np.asarray(case.load("images"), np.float32)
    labels = np.asarray(case.load("label"))
    network_input = phi_input.images if phi_input else images
    slots = [slot for slot in model.variant.tasks if slot in model.heads]
    maps = infer(model, network_input, config, device, heads=("seg", *slots)).maps

    look = LOOKS[config.kind]
    index = largest_lesion_plane(labels, look.across)
    outputs = {head: cut_plane(volume, look, index) for head, volume in maps.items()}
    masks = class_bitmask(outputs["seg"], model.decide)
    ct_input = cut_plane(network_input[0], look, index)
    inputs = input_panels(cut_plane(images, look, index), ct_input, config.kind)
    return StudyPlane(
        index,
        inputs,
        background=replace(inputs[look.background], note=""),
        outputs=outputs,
        predicted=named_masks(masks, model.variant.classes),
        # Labels 1 and 2 exclude each other, so as bits they are the same numbers.
        truth=named_masks(cut_plane(labels, look, index), model.variant.classes),
    )


def outlined(background: Panel, masks, classes, lesion="prediction", note="") -> Panel:
    """The masks of these classes over an image; lesion: the name of the lesion in the legend."""
    outlines = {}
    for name in classes:
        outlines[lesion if name == "lesion" else name] = masks[name]
    return replace(background, outlines=outlines, note=note)


def task_panel(slot: str, task: Task, plane: StudyPlane, variant: Variant, kind, paper) -> Panel:
    """What one decoder puts out.

    An image is drawn like the one it reconstructs, organs as outlines on CT, all else as the
    probability of the foreground; for the paper as outlines, if the mask has these classes.
    """
    output = plane.outputs[slot]

    if not task.classes:
        note = task.title
        if task.target != slot:
            names = dict(zip(("ct", "pet"), IMAGE_NAMES[kind], strict=True))
            note = f"{names[task.target]} {task.title}"
        return replace(plane.inputs[task.target], image=output[0], note=note)

    if slot == variant.organ_branch:
        labels = label_map(output)
        organs = {name: labels == label for label, name in enumerate(task.classes, start=1)}
        return replace(plane.inputs["ct"], outlines=organs, note=task.title)

    if paper and set(task.classes) <= set(plane.predicted):
        background = plane.inputs.get(slot, plane.background)
        masks = class_bitmask(output, partial(decide, variant=Variant(pet=task)))
        note = "segmentation" if task == LESION else " and ".join(task.classes)
        return outlined(background, named_masks(masks, task.classes), task.classes, note=note)

    # 1 - p(background) = 1 - 1 / (1 + Σ exp of the foreground logits), without overflow
    return Panel(expit(logsumexp(output, axis=0)), (0, 1), "inferno", note=task.title)


def study_panels(
    model: Network, case: Case, config: Config, device, phi_input: PhiInput | None = None
) -> StudyPanels:
    """The row of a study: inputs, a panel for each task, the final mask in a frame, the truth.

    phi_input: what the network is given for the paper's Figs. 7 and 8. There the final mask is the
    union of its classes, the fusion of both branches, or the output of one. Else it has a panel of
    its own, and PET/CT one more for the SUV threshold.
    """
    paper = phi_input is not None
    variant = model.variant
    plane = infer_plane(model, case, config, device, phi_input)
    inputs = plane.inputs

    panels = {
        "ct_input": replace(inputs["ct_input"], note=phi_input.note if paper else ""),
        "pet_input": inputs["pet"],
        "truth": outlined(plane.background, plane.truth, variant.classes, lesion="truth"),
    }
    tasks = {slot: task for slot, task in variant.tasks.items() if slot in plane.outputs}
    if variant.fused and model.theta is not None:  # both branches by θ (Eq. 4)
        tasks["seg"] = variant.pet
    for slot, task in tasks.items():
        panels[slot] = task_panel(slot, task, plane, variant, config.kind, paper)

    if paper:
        mark_final_mask(panels, plane, model)
    else:
        mask = outlined(plane.background, plane.predicted, variant.classes)
        panels["mask"] = replace(mask, is_final=True)
        if config.kind == "petct":
            hot = inputs["pet"].image * HIGHEST_SUV >= THRESHOLDS_SUV[0]
            panels["threshold"] = replace(plane.background, outlines={"prediction": hot})
    return StudyPanels(panels, plane.index)


def mark_final_mask(panels: dict[str, Panel], plane: StudyPlane, model: Network) -> None:
    """Frame the panel of the paper's figure that shows the final mask, or add it to `panels`."""
    final = list(model.variant.mask_tasks)
    unions = {name: mask for name, mask in plane.predicted.items() if name in UNIONS}
    if unions:
        final = ["union"]
        note = " ∪ ".join(model.variant.classes)
        panels["union"] = replace(plane.background, outlines=unions, note=note)
    elif "seg" in panels:
        # It takes the place of the bottleneck, which a variant with θ lacks.
        final = ["btl"]
        panels["btl"] = replace(panels.pop("seg"), note=f"fused, θ = {model.theta.item():.2g}")

    for name in final:
        panels[name] = replace(panels[name], is_final=True)


def draw_panel(axis, panel: Panel, aspect: float, filled: bool, legend: dict) -> None:
    """Draw a panel. aspect: height of a voxel over its width. filled: masks are tinted.

    legend: lines by the name of their mask, to which those of the panel are added.
    """
    axis.imshow(panel.image, panel.colormap, aspect=aspect).set_clim(panel.limits)
    axis.set_xlabel(panel.note, fontsize=6)

    for name, mask in panel.outlines.items():
        if not mask.any():
            continue
        color = OUTLINES.get(name, f"C{len(legend)}")
        dashes = "--" if name == "core" else "-"  # in grey it looks like edema
        line = legend.setdefault(name, plt.Line2D([], [], c=color, ls=dashes, label=name))
        axis.contour(mask, [0.5], colors=line.get_color(), linewidths=0.9, linestyles=dashes)
        if filled:
            axis.contourf(mask, [0.5, 1.5], colors=line.get_color(), alpha=0.35)

    for spine in axis.spines.values():
        spine.set(visible=panel.is_final, color=COLORS[1], linewidth=2)


@matplotlib.rc_context(GRID_STYLE)
def draw_grid(rows: list[dict[str, Panel]], labels, config: Config, paper: bool = False) -> Figure:
    """Draw rows of panels with their labels at the left.

    For the paper the grid is at most 7 inches wide and 8.8 inches high.
    """
    look = LOOKS[config.kind]
    filled = set().union(*rows)
    columns = [name for name in TITLES if name in filled]

    # Every cell has the shape of the tallest study; ratio is height over width.
    aspect = config.spacing[look.up] / config.spacing[0]
    heights, widths = np.transpose([row["truth"].image.shape for row in rows])
    ratio = np.clip(max(aspect * heights / widths), 0.6, 2.2)
    cell_width = 1.5  # inches, as are all sizes below
    if paper:
        cell_width = min(6.8 / len(columns) - 0.05, (8.3 / len(rows) - 0.18) / ratio)
    width = len(columns) * (cell_width + 0.05) + 0.2
    height = len(rows) * (cell_width * ratio + 0.18) + 0.5
    figure = plt.figure(figsize=(width, height), layout="compressed")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)

    legend = {}
    for (row_number, column_number), axis in np.ndenumerate(axes):
        panel = rows[row_number].get(columns[column_number])
        axis.set(xticks=[], yticks=[])
        if panel:
            draw_panel(axis, panel, aspect, paper, legend)
        else:
            axis.set(frame_on=False, box_aspect=ratio)
    figure.legend(handles=list(legend.values()), loc="outside lower center", ncols=3)

    titles = TITLES | look.titles if paper else TITLES
    ct_name, pet_name = IMAGE_NAMES[config.kind]
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(titles[name].format(ct=ct_name, pet=pet_name))
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    return figure


# ------------------------------------------------------------------ Figs. 7 and 8


def phi_of_study(images: np.ndarray, config: Config) -> PhiInput:
    """Φ(x_C) over a whole study (2, W, H, D), seeded by the run's seed.

    The noise has the largest σ of training; shuffled cubes touch the same share of the voxels as
    in a crop.
    """
    ct = torch.tensor(images[None, :1])  # (1, 1, W, H, D)
    note = ""

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.phi == "noise":
            ct += config.noise_sigma * torch.randn_like(ct)
            note = f"noise, σ = {config.noise_sigma:g}"
        elif config.phi == "shuffle":
            edge = min(config.shuffle_edge, *ct.shape[2:])
            share = config.shuffle_count * config.shuffle_edge**3 / np.prod(config.patch)
            count = max(round(share * ct.numel() / edge**3), min(config.shuffle_count, 1))
            ct = shuffle_voxels(ct, edge, count)
            note = f"{count} {'cube' if count == 1 else 'cubes'} of {edge}³"

    return PhiInput(np.concatenate([ct[0].numpy(), images[1:]]), note)


class OpenedRun(NamedTuple):
    """A trained run and its test studies by name."""

    run: Path
    config: Config
    model: Network
    device: torch.device
    cases: dict[str, Case]


def open_test_studies(run: Path, given: dict) -> OpenedRun:
    """Load a Mirror U-Net of both modalities and find its test studies. Raises UserError."""
    model, config, device, _ = load_run(run, "best", given)
    if config.version not in VARIANTS[config.kind] or config.modality != "both":
        raise UserError(f"{run}: this is no Mirror U-Net of both modalities. Leave it out.")

    folder = find_data(config, to_stderr)
    config = resolve(config, folder.kind, simulated=config.data is None)
    cases = load_cases(folder, config, to_stderr)
    config = with_organ_names(config, cases, folder, to_stderr)

    _, cases = choose_cases(run, "test", given, cases)
    cases = with_swapped_ct(cases, config.ct)
    return OpenedRun(run, config, model, device, {case.name: case for case in cases})


def choose_study(opened: list[OpenedRun], study: str | None) -> str:
    """The study to draw: `study`, or of those that all runs test the one with most lesion."""
    first, *others = opened
    volumes = {}  # in mm³
    for name, case in sorted(first.cases.items()):
        if all(name in other.cases for other in others):
            volumes[name] = case.meta.lesion_voxels * np.prod(case.meta.native_spacing)

    if not volumes:
        raise UserError("No study is in the test part of all of these runs. Use the same splits.")
    if study and study not in volumes:
        raise UserError(f"--study {study}: not in the test part of all runs, as {min(volumes)} is.")
    return study or max(volumes, key=volumes.get)


def qualitative(runs: list[Path], study: str | None = None, given: dict | None = None):
    """Fig. 7 from PET/CT runs, Fig. 8 from brain tumour runs: a row per run, all of one study.

    A row comes from one pass with Φ(x_C); with --bottleneck own the mask is that of testing.
    study: one in the test part of every run, by default that with most lesion. given: options that
    replace those of the runs. Returns a DrawnFigure. Raises UserError.
    """
    opened = []
    for run in runs:
        opened.append(open_test_studies(run, given or {}))
        config, first = opened[-1].config, opened[0].config
        if (config.kind, config.spacing) != (first.kind, first.spacing):
            raise UserError(f"{run}: its kind or spacing differ from those of {runs[0]}.")
    study = choose_study(opened, study)

    # The rows of the paper: by version, then by Φ.
    versions, phis = list(VARIANTS[config.kind]), list(PHIS)
    opened.sort(key=lambda o: (versions.index(o.config.version), phis.index(o.config.phi)))

    rows, labels = [], []
    for _, config, model, device, cases in opened:
        images = np.asarray(cases[study].load("images"), np.float32)
        phi_input = phi_of_study(images, config)
        panels, index = study_panels(model, cases[study], config, device, phi_input)
        rows.append(panels)
        labels.append(f"{config.version}-{config.phi}".removesuffix("-none"))
    if len(set(labels)) < len(labels):
        labels = [one.run.name for one in opened]

    look = LOOKS[config.kind]
    figure = draw_grid(rows, labels, config, paper=True)
    return DrawnFigure(figure, look.figure, f"{study}, {look.plane} slice {index}")


# ------------------------------------------------------------------ figures of a search

HATCHES = ("", "////", "xxxx")
MARKERS = "osD^v"
DASHES = ("-", "--", (0, (6, 1)), ":", "-.")


def name_sets(axis, layer_sets) -> None:
    """Name the sets L along the x axis, a long one on two lines; many take a page's width."""
    names = []
    for layers in layer_sets:
        name = layers if layers == "none" else f"{{{layers.replace(' ', ',')}}}"
        names.append(re.sub(r"(\d,\d,\d,)", r"\1\n", name))
    axis.set_xticks(range(len(names)), names)
    axis.set(xlabel="shared layers L", xlim=(-0.6, len(names) - 0.4))
    axis.figure.set_figwidth(3.3 if len(names) < 9 else 7.0)


def draw_box(axis, x: float, values, width: float, number: int, label: str) -> None:
    """Draw quartiles, the median, whiskers to the extremes, and a dot per value in table order.

    number: which colour and hatch.
    """
    color = COLORS[number]
    face = matplotlib.colors.to_rgba(color, 0.45)
    axis.boxplot(
        [values],
        positions=[x],
        widths=width,
        whis=(0, 100),
        manage_ticks=False,
        boxprops={"facecolor": face, "hatch": HATCHES[number]},
        label=label,
    )
    dots = x + width * np.linspace(-0.3, 0.3, len(values) + 2)[1:-1]
    axis.plot(dots, values, "o", markersize=2.6, color=color, mec="white", mew=0.4, zorder=3)


def lambda_map(axis, table: pd.DataFrame) -> None:
    """Fig. 1 of the supplement: test Dice of v3 over λ_rec and λ_class, the best one framed."""
    values = table.to_numpy().T
    image = axis.imshow(values, cmap="viridis", origin="lower", aspect="auto")

    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        color = "white" if image.norm(value) < 0.6 else "black"
        frame = {"facecolor": "none"} if value == np.nanmax(values) else None
        axis.text(column, row, f"{value:.2f}", color=color, bbox=frame, ha="center", va="center")

    as_power = matplotlib.ticker.LogFormatterSciNotation()
    axis.set_xticks(range(len(table.index)), map(as_power, table.index))
    axis.set_yticks(range(len(table.columns)), map(as_power, table.columns))
    axis.figure.colorbar(image, label=axis.get_ylabel(), pad=0.02)
    axis.set(xlabel=r"$λ_{\mathrm{rec}}$", ylabel=r"$λ_{\mathrm{class}}$")
    axis.patch.set(facecolor="0.9", edgecolor="0.6", hatch="////")  # seen where a cell is missing
    axis.grid(False)
    axis.figure.set_figheight(2.8)


def phi_boxes(axis, table: pd.DataFrame) -> None:
    """Fig. 4: a box per version and Φ over all sets L of shared layers."""
    versions = [version for version in VERSIONS if version in table.index]
    phis = list(PHIS)
    for (version, phi), values in table.iterrows():
        number = phis.index(phi)
        x = versions.index(version) + 0.27 * (number - 1)
        draw_box(axis, x, values.dropna(), width=0.22, number=number, label=PHIS[phi])
    axis.set_xticks(range(len(versions)), versions)


def shared_curves(axis, table: pd.DataFrame) -> None:
    """Fig. 5: a line per version over the sets L; a dot is the best Φ or θ, bold in Table 2."""
    best = table.groupby("version").max()
    for version, color, marker, dashes in zip(VERSIONS, COLORS, MARKERS, DASHES, strict=False):
        if version in best.index:
            (line,) = axis.plot(range(best.shape[1]), best.loc[version], label=version)
            line.set(color=color, marker=marker, linestyle=dashes, markersize=4)
    name_sets(axis, best.columns)


def theta_boxes(axis, table: pd.DataFrame) -> None:
    """Fig. 6: v4, a box per set L over the fixed θ; the learned θ is a star beside it."""
    table = table.loc["v4"]
    fixed = table.drop(index="learn", errors="ignore")
    label = f"fixed θ, {min(fixed.index)} to {max(fixed.index)}"
    for number, layers in enumerate(fixed):
        draw_box(axis, number, fixed[layers].dropna(), width=0.46, number=0, label=label)

    if "learn" in table.index:
        places = np.arange(table.shape[1]) + 0.38
        axis.plot(places, table.loc["learn"], "*", color=COLORS[1], label="learned θ")
    name_sets(axis, table.columns)


class SearchFigure(NamedTuple):
    """A figure of comparable trials of a search."""

    table: str  # the row of tables.SEARCH_TABLES that chooses the trials
    versions: tuple[str, ...]
    compared: list[str]  # the options along its axes
    title: str  # what a message calls these options
    numbers: Callable  # trials -> tables.DiceTable
    draw: Callable  # draws the numbers on an axis


PHI_VERSIONS = ("v1", "v2", "v2-rec", "v3")
SEARCH_FIGURES = {
    "fig_s1_lambdas": SearchFigure(
        "lambdas", ("v3",), ["lambda_rec", "lambda_cls"], "λ of v3", lambda_grid, lambda_map
    ),
    "fig4_phi": SearchFigure("table 2", PHI_VERSIONS, ["phi"], "Φ", table_2, phi_boxes),
    "fig5_shared": SearchFigure("table 2", VERSIONS, ["shared"], "sets L", table_2, shared_curves),
    "fig6_theta": SearchFigure("table 2", ("v4",), ["theta"], "θ", table_2, theta_boxes),
}


@matplotlib.rc_context(PAPER_STYLE)
def search_figure(name: str, trials: pd.DataFrame, about: str = "") -> DrawnFigure:
    """Draw a row of SEARCH_FIGURES; about: how these trials differ from others of the search.

    Raises UserError unless the trials differ in what the figure compares and have a test Dice.
    """
    row = SEARCH_FIGURES[name]
    if len(trials[row.compared].drop_duplicates()) < 2:
        raise UserError(f"compares {row.title}, the search does not")
    table = row.numbers(trials, about)

    figure, axis = plt.subplots(figsize=(3.3, 2.4))
    axis.set_ylabel(LOOKS[trials["kind"].iloc[0]].dice)
    axis.set_title(textwrap.fill(table.about, 54), loc="right", color="0.3")
    axis.grid(axis="y")
    row.draw(axis, table.values)

    handles, labels = axis.get_legend_handles_labels()
    if labels:
        handle_of = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0]))
        figure.legend(
            handle_of.values(),
            handle_of.keys(),
            loc="outside upper center",
            ncols=4,
        )
    return DrawnFigure(figure, name, table.about)


@matplotlib.rc_context(PAPER_STYLE)
def claims_figure(trials: pd.DataFrame, about: str = "") -> DrawnFigure:
    """Draw a dot and an interval for each claim whose two sides ended; the paper's is a cross.

    Raises UserError without one.
    """
    table = claims_table(trials)
    table = table[~table["verdict"].isin(NO_VERDICT)].iloc[::-1]  # the first claim is on top
    if table.empty:
        raise UserError("needs both sides of a claim, the search has none")

    places = range(len(table))
    is_decided = table["verdict"] != "not decided"
    colors = np.where(is_decided, COLORS[0], "0.55")
    figure, axis = plt.subplots(figsize=(5.2, 0.9 + 0.24 * len(table)))
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.hlines(places, table["low"], table["high"], colors)
    axis.scatter(table["here"], places, color=colors)
    axis.plot(table["paper"], places, "x", color=COLORS[1], label="paper")
    axis.set_yticks(places, table["claim"])
    axis.set_xlabel("difference (Dice in %, volumes in ml)")
    axis.grid(axis="x")
    axis.legend()

    text = f"{is_decided.sum()} of {len(table)} claims decided"
    return DrawnFigure(figure, "claims", f"{text}; {about}" if about else text)


def publish(out: Path, drawn: DrawnFigure, suffix: str = "") -> None:
    """Write a figure for print as PNG and PDF, and print where it is."""
    name = drawn.name + suffix
    out.mkdir(parents=True, exist_ok=True)
    save(drawn.figure, out / f"{name}.png", out / f"{name}.pdf", dpi=300)
    print(f"{name:<15} {out / name}.png, .pdf   {drawn.about}")


def draw_search(search: Path, out: Path) -> None:
    """Draw each figure of a search once for each group of comparable trials.

    Raises UserError if there are trials for none.
    """
    trials = read_trials(search)
    for trial in trials[trials["config"].isna()].itertuples():
        to_stderr(f"left out   {trial.trial}: {trial.reason}")

    groups = {"claims": claim_groups(trials)}
    for name, row in SEARCH_FIGURES.items():
        with_version = trials[trials["version"].isin(row.versions)]
        groups[name] = groups_for_table(with_version, row.table) or [RunGroup("", trials[:0])]

    published = 0
    reasons = {}  # the first one why a figure was not drawn
    for name, parts in groups.items():
        draw = claims_figure if name == "claims" else partial(search_figure, name)
        for number, (about, part) in enumerate(parts, start=1):
            try:
                drawn = draw(part, about)
            except UserError as error:
                reasons.setdefault(name, f"{error} ({about})" if about else f"{error}")
                continue
            suffix = re.sub(r"[^\w.]+", "_", about) if len(about) < 150 else str(number)
            publish(out, drawn, f"-{suffix}" if about else "")
            published += 1

    if not published:
        listed = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        raise UserError(f"{search}: no figure to draw of {listed}.")
    for name, reason in reasons.items():
        print(f"{name:<16}not drawn: {reason}")


# ------------------------------------------------------------------ command line


def plots_command(argv: list[str] | None = None) -> None:
    """Run python plots.py, as the top of this file describes it."""
    parser = Parser(description="Draw the figures of the paper.")
    add = parser.add_argument
    add("search", nargs="?", type=Path, help="folder of a search: Figs. 4-6, S1")
    add("--qualitative", nargs="+", type=Path, metavar="RUN", help="draw Fig. 7 or 8 of these runs")
    add("--study", help="draw this study of the runs' test parts [the one with most lesion]")
    add("--out", type=Path, metavar="DIR", help="write the figures here [SEARCH/figures]")
    add_flags(parser, EVAL_OPTIONS)
    args = parser.parse_args(argv)
    given = options_from_args(args, EVAL_OPTIONS)

    if bool(args.search) == bool(args.qualitative):
        raise UserError("Give the folder of a search, or --qualitative and folders of runs.")
    if args.search and (args.study or given):
        raise UserError("--study and options of runs go with --qualitative. Leave them out.")
    if args.qualitative and args.out is None:
        raise UserError("--qualitative: say where to write the figure with --out DIR.")

    if args.search:
        draw_search(args.search, args.out or args.search / "figures")
    else:
        publish(args.out, qualitative(args.qualitative, args.study, given))


if __name__ == "__main__":
    command_line(plots_command)
