"""Pictures: curves.png and examples.png of a run, and the figures of the paper.

    python plots.py SEARCH                             Figs. 4-6 and supplement Fig. 1 of a search
    python plots.py --qualitative RUN ... --out DIR    Fig. 7, or Fig. 8 of brain tumour runs

A volume is (W, H, D); a plane cut from it is (rows, columns), as it is seen on the page.
"""

import itertools
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
from common import Parser, UserError, atomic, command_line, to_stderr
from config import Config, add_flags, options_from_args
from data import shuffle_voxels
from eval import EVAL_OPTIONS, class_bitmask, infer, label_map, load_part
from metrics import CONNECTIVITY_18, named_masks
from mirror_unet import IMAGE_NAMES, LESION, UNIONS, VARIANTS, Network, Task, Variant, decide
from preprocess import PREPROCESSING, THRESHOLDS_SUV
from runs import LoadedRun, load_run, loss_term_names, read_metrics, read_trials
from tables import PHIS, VERSIONS, RunGroup, braces, groups_for_table, lambda_grid, table_2

matplotlib.use("Agg")  # a compute node has no screen
matplotlib.rcParams["pdf.fonttype"] = 42  # the text of a PDF stays text
# The palette of Okabe and Ito, whose colours a colour-blind reader can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def read_style(text: str) -> dict[str, str]:
    """Settings for matplotlib.rc_context from lines such as "font.size: 7"."""
    return dict(line.split(": ") for line in text.strip().split("\n"))


# For graphs in a column of 3.3 inches or on a page of 7 inches.
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
""")
# For rows of images.
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
""")
EXAMPLES = 4  # the most studies in examples.png


def save(figure: Figure, *paths: Path, **options) -> None:
    """Write a figure in the format of each path's suffix, without a date, and close it."""
    for path in paths:
        with atomic(path) as file:
            no_date = {"CreationDate": None}
            figure.savefig(file, format=path.suffix[1:], metadata=no_date, **options)
    plt.close(figure)


# ------------------------------------------------------------------ the pictures of a run


def draw_curves(run: Path) -> None:
    """Draw curves.png: loss terms, gradients on the shared layers, validation, speed, and gates."""
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
    gates = [name for name in frame if name.startswith("gate_")]
    if gates:
        columns["Gates: mean |g|"] = gates

    # Without studies that have no lesion, or without shared layers, an axis would stay empty.
    frame = frame.dropna(axis="columns", how="all")
    for title, names in list(columns.items()):
        if not set(names) & set(frame):
            del columns[title]

    size = (4 * len(columns), 3.6)
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained")
    for axis, title in zip(axes, columns, strict=True):
        styles = itertools.product((".-", ".--", ".:"), COLORS)  # for more lines than colours
        for name, (style, color) in zip(columns[title], styles, strict=False):
            if name in frame:  # an epoch without validation has an empty cell
                axis.plot(frame[name].dropna(), style, color=color, label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

        if title.startswith("Weighted"):  # a term with a learned weight may be negative
            axis.set_yscale("log" if (frame[losses] > 0).all(axis=None) else "symlog")
        elif title.startswith("Gradient"):
            axis.set_yscale("log")
        elif title == "Validation: Dice":
            axis.set_ylim(0, 1)
        elif title == "Speed":
            axis.set_ylim(0)
    save(figure, run / "curves.png", dpi=110)


def draw_examples(run: Path, loaded: LoadedRun, cases: list[Case]) -> None:
    """Draw examples.png in the manner of Fig. 7: a row for each of at most EXAMPLES studies.

    From the studies with a lesion, the largest lesion volume first, it takes every
    len // EXAMPLES-th. loaded: train.State will do as well.
    """
    positive = [case for case in cases if case.has_lesion]
    positive.sort(key=lambda case: case.meta.lesion_voxels, reverse=True)
    step = max(1, len(positive) // EXAMPLES)
    chosen = positive[::step][:EXAMPLES] or cases[:1]

    rows = [study_panels(loaded, case) for case in chosen]
    labels = [case.name.split("/")[0] for case in chosen]
    figure = draw_grid(rows, labels, loaded.config)
    save(figure, run / "examples.png", dpi=110, bbox_inches="tight")


# ------------------------------------------------------------------ a study in one plane


class Look(NamedTuple):
    """How studies of one kind of data are drawn."""

    figure: str  # name of the paper's figure
    plane: str
    across: int  # the axis of a volume (W, H, D) that the plane cuts
    up: int  # the axis that is vertical on the page; that to the right is always W
    mirrored: bool  # left and right are flipped, so that the patient's right is at the left
    background: str  # the image under a mask
    titles: dict[str, str]  # of columns, where the paper's figure has its own


LOOKS = {
    "petct": Look(
        figure="fig7",
        plane="coronal",
        across=1,
        up=2,
        mirrored=False,
        background="pet",
        titles={"ct_input": "CT, Φ($x_C$)", "btl": "bottleneck\nor fused"},
    ),
    "mri": Look(
        figure="fig8",
        plane="axial",
        across=2,
        up=1,
        mirrored=True,
        background="ct",
        titles={},
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

    inputs: dict[str, Panel]  # the images "ct" and "pet", and "ct_input" of the CT branch
    background: Panel  # of masks
    outputs: dict[str, np.ndarray]  # foreground logits or an image, (channels, rows, columns)
    predicted: dict[str, np.ndarray]  # masks by name, those of UNIONS among them
    truth: dict[str, np.ndarray]


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
    across = look.across - 3  # counted from the end
    plane = np.rot90(volume.take(index, axis=across), axes=(-2, -1))
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


def infer_plane(loaded: LoadedRun, case: Case, heads, phi_input: PhiInput | None) -> StudyPlane:
    """Run the network over a whole study and cut all maps in the plane of its largest lesion.

    heads: the outputs beside "seg". phi_input: what the network is given; None for the study's own
    images.
    """
    variant, kind = loaded.model.variant, loaded.config.kind
    images = np.asarray(case.load("images"), np.float32)
    labels = np.asarray(case.load("label"))
    network_input = phi_input.images if phi_input else images
    maps = infer(loaded, network_input, heads=("seg", *heads)).maps

    look = LOOKS[kind]
    index = largest_lesion_plane(labels, look.across)
    outputs = {head: cut_plane(volume, look, index) for head, volume in maps.items()}
    masks = class_bitmask(outputs["seg"], loaded.model.decide)
    ct_input = cut_plane(network_input[0], look, index)
    inputs = input_panels(cut_plane(images, look, index), ct_input, kind)
    return StudyPlane(
        inputs,
        background=replace(inputs[look.background], note=""),
        outputs=outputs,
        predicted=named_masks(masks, variant.classes),
        # The labels 1 and 2 are the bits of the first and the second class already.
        truth=named_masks(cut_plane(labels, look, index), variant.classes),
    )


def outlined(
    background: Panel,
    masks: dict[str, np.ndarray],
    classes: tuple[str, ...],
    lesion: str = "prediction",
    note: str = "",
) -> Panel:
    """The masks of these classes over an image; lesion: the name of the lesion in the legend."""
    outlines = {}
    for name in classes:
        outlines[lesion if name == "lesion" else name] = masks[name]
    return replace(background, outlines=outlines, note=note)


def task_panel(
    slot: str,
    task: Task,
    plane: StudyPlane,
    variant: Variant,
    kind: str,
    paper: bool,
) -> Panel:
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
        one_softmax = Variant(pet=task)  # so that decide() takes these logits for one softmax's
        masks = class_bitmask(output, partial(decide, variant=one_softmax))
        note = "segmentation" if task == LESION else " and ".join(task.classes)
        return outlined(background, named_masks(masks, task.classes), task.classes, note=note)

    # 1 - p(background) = 1 - 1 / (1 + Σ exp of the foreground logits), without overflow
    return Panel(expit(logsumexp(output, axis=0)), (0, 1), "inferno", note=task.title)


def study_panels(
    loaded: LoadedRun, case: Case, phi_input: PhiInput | None = None
) -> dict[str, Panel]:
    """The row of a study, by the keys of TITLES: inputs, the output of each task, masks, the truth.

    phi_input: what the network is given for the paper's Figs. 7 and 8, which frame the panel that
    shows the final mask. Otherwise that mask and, for PET/CT, the SUV threshold have panels of
    their own.
    """
    paper = phi_input is not None
    model, kind = loaded.model, loaded.config.kind
    variant = model.variant
    # The mask of most compared systems is no output of a branch, but "seg" alone.
    tasks = {slot: task for slot, task in variant.tasks.items() if slot in model.heads}
    plane = infer_plane(loaded, case, tasks, phi_input)
    if variant.fused and model.theta is not None:  # Eq. 4; Valindria's branches have no θ
        tasks["seg"] = variant.pet

    inputs = plane.inputs
    panels = {
        "ct_input": replace(inputs["ct_input"], note=phi_input.note if paper else ""),
        "pet_input": inputs["pet"],
        "truth": outlined(plane.background, plane.truth, variant.classes, lesion="truth"),
    }
    for slot, task in tasks.items():
        panels[slot] = task_panel(slot, task, plane, variant, kind, paper)

    if paper:
        frame_final_mask(panels, plane, model)
    else:
        mask = outlined(plane.background, plane.predicted, variant.classes)
        panels["mask"] = replace(mask, is_final=True)
        if kind == "petct":
            hot = inputs["pet"].image * HIGHEST_SUV >= THRESHOLDS_SUV[0]
            panels["threshold"] = replace(plane.background, outlines={"prediction": hot})
    return panels


def frame_final_mask(panels: dict[str, Panel], plane: StudyPlane, model: Network) -> None:
    """In `panels` of the paper's figure, frame that of the final mask."""
    unions = {name: mask for name, mask in plane.predicted.items() if name in UNIONS}
    if unions:  # brain tumours: the mask is the union of its classes
        final = "union"
        note = " ∪ ".join(model.variant.classes)
        panels["union"] = replace(plane.background, outlines=unions, note=note)
    elif "seg" in panels:  # v4: it takes the place of the bottleneck, which v4 lacks
        final = "btl"
        panels["btl"] = replace(panels.pop("seg"), note=f"fused, θ = {model.theta.item():.2g}")
    else:  # v1-v3: the output of D_P
        final = "pet"
    panels[final] = replace(panels[final], is_final=True)


def draw_panel(axis, panel: Panel, aspect: float, tinted: bool, legend: dict) -> None:
    """Draw a panel. aspect: height of a voxel over its width. tinted: masks are.

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
        if tinted:
            axis.contourf(mask, [0.5, 1.5], colors=line.get_color(), alpha=0.35)

    for spine in axis.spines.values():
        spine.set(visible=panel.is_final, color=COLORS[1], linewidth=2)


@matplotlib.rc_context(GRID_STYLE)
def draw_grid(rows: list[dict[str, Panel]], labels, config: Config, paper: bool = False) -> Figure:
    """Draw rows of panels with their labels at the left.

    For the paper the grid is at most 7 inches wide and 8.8 inches high.
    """
    look = LOOKS[config.kind]
    used = set().union(*rows)
    columns = [name for name in TITLES if name in used]

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
            count = round(share * ct.numel() / edge**3)
            if config.shuffle_count:  # a small study still shows what a cube is
                count = max(count, 1)
            ct = shuffle_voxels(ct, edge, count)
            note = f"{count} {'cube' if count == 1 else 'cubes'} of {edge}³"

    return PhiInput(np.concatenate([ct[0].numpy(), images[1:]]), note)


class TestedRun(NamedTuple):
    """A trained run and its test studies by name."""

    name: str
    loaded: LoadedRun
    cases: dict[str, Case]


def open_test_studies(run: Path, given: dict) -> TestedRun:
    """Load a Mirror U-Net of both modalities and find its test studies. Raises UserError."""
    loaded = load_run(run, "best", given)
    config = loaded.config
    if config.version not in VARIANTS[config.kind] or config.modality != "both":
        raise UserError(f"{run}: this is no Mirror U-Net of both modalities. Leave it out.")
    _, cases = load_part(run, "test", given, config)
    return TestedRun(run.name, loaded, {case.name: case for case in cases})


def choose_study(tested: list[TestedRun], study: str | None) -> str:
    """The study to draw: `study`, or of those that all runs test the one with most lesion."""
    first, *others = tested
    volumes = {}  # in mm³
    for name, case in sorted(first.cases.items()):
        if all(name in other.cases for other in others):
            volumes[name] = case.meta.lesion_voxels * np.prod(case.meta.native_spacing)

    if not volumes:
        raise UserError("No study is in the test part of all of these runs. Use the same splits.")
    if study and study not in volumes:
        raise UserError(f"--study {study}: not in the test part of all runs, as {min(volumes)} is.")
    return study or max(volumes, key=volumes.get)


def draw_qualitative(runs: list[Path], study: str | None, given: dict, out: Path) -> None:
    """Write Fig. 7 of PET/CT runs, Fig. 8 of brain tumour runs: a row per run, all of one study.

    A row comes from one pass with Φ(x_C). With --bottleneck own the mask does not see CT, so it is
    that of testing. study: one in the test part of every run; None is that with most lesion. given:
    options that replace those of the runs. Raises UserError.
    """
    tested = []
    for run in runs:
        tested.append(open_test_studies(run, given))
        config, first = tested[-1].loaded.config, tested[0].loaded.config
        if (config.kind, config.spacing) != (first.kind, first.spacing):
            raise UserError(f"{run}: its kind or spacing differ from those of {runs[0]}.")
    study = choose_study(tested, study)

    versions, phis = list(VARIANTS[config.kind]), list(PHIS)

    def paper_order(trained: TestedRun) -> tuple[int, int]:
        """By version, then by Φ."""
        config = trained.loaded.config
        return versions.index(config.version), phis.index(config.phi)

    tested.sort(key=paper_order)
    rows, labels = [], []
    for trained in tested:
        config = trained.loaded.config
        case = trained.cases[study]
        images = np.asarray(case.load("images"), np.float32)
        rows.append(study_panels(trained.loaded, case, phi_of_study(images, config)))
        labels.append(f"{config.version}-{config.phi}".removesuffix("-none"))
    if len(set(labels)) < len(labels):
        labels = [trained.name for trained in tested]

    look = LOOKS[config.kind]
    index = largest_lesion_plane(np.asarray(case.load("label")), look.across)
    figure = draw_grid(rows, labels, config, paper=True)
    publish(figure, out, look.figure, f"{study}, {look.plane} slice {index}")


# ------------------------------------------------------------------ figures of a search

HATCHES = ("", "////", "xxxx")
MARKERS = "osD^v"
DASHES = ("-", "--", (0, (6, 1)), ":", "-.")
DICE_LABELS = {"petct": "test Dice (%)", "mri": "test Dice, whole tumour (%)"}


def fit_to_sets(axis, layer_sets) -> None:
    """Name the sets L along the x axis, a long one on two lines; many get the width of a page."""
    names = []
    for layers in layer_sets:
        name = layers if layers == "none" else braces(layers)
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


def draw_lambda_map(axis, table: pd.DataFrame) -> None:
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


def draw_phi_boxes(axis, table: pd.DataFrame) -> None:
    """Fig. 4: a box per version and Φ over all sets L of shared layers."""
    versions = [version for version in VERSIONS if version in table.index]
    phis = list(PHIS)
    for (version, phi), values in table.iterrows():
        number = phis.index(phi)
        x = versions.index(version) + 0.27 * (number - 1)
        draw_box(axis, x, values.dropna(), width=0.22, number=number, label=PHIS[phi])
    axis.set_xticks(range(len(versions)), versions)


def draw_shared_curves(axis, table: pd.DataFrame) -> None:
    """Fig. 5: a line per version over the sets L; a dot is the best of its Φ or θ."""
    best = table.groupby("version").max()
    for version, color, marker, dashes in zip(VERSIONS, COLORS, MARKERS, DASHES, strict=False):
        if version in best.index:
            (line,) = axis.plot(range(best.shape[1]), best.loc[version], label=version)
            line.set(color=color, marker=marker, linestyle=dashes, markersize=4)
    fit_to_sets(axis, best.columns)


def draw_theta_boxes(axis, table: pd.DataFrame) -> None:
    """Fig. 6: v4, a box per set L over the fixed θ; the learned θ is a star beside it."""
    table = table.loc["v4"]
    fixed = table.drop(index="learn", errors="ignore")
    label = f"fixed θ, {min(fixed.index)} to {max(fixed.index)}"
    for number, layers in enumerate(fixed):
        draw_box(axis, number, fixed[layers].dropna(), width=0.46, number=0, label=label)

    if "learn" in table.index:
        places = np.arange(table.shape[1]) + 0.38
        axis.plot(places, table.loc["learn"], "*", color=COLORS[1], label="learned θ")
    fit_to_sets(axis, table.columns)


class SearchFigure(NamedTuple):
    """A figure of comparable trials of a search."""

    table: str  # the row of tables.SEARCH_TABLES that chooses the trials
    versions: tuple[str, ...]
    compared: list[str]  # the options along its axes
    draw: Callable  # draws the numbers of the table on an axis


PHI_VERSIONS = ("v1", "v2", "v2-rec", "v3")
SEARCH_FIGURES = {
    "fig_s1_lambdas": SearchFigure(
        "lambdas", ("v3",), ["lambda_rec", "lambda_cls"], draw_lambda_map
    ),
    "fig4_phi": SearchFigure("table 2", PHI_VERSIONS, ["phi"], draw_phi_boxes),
    "fig5_shared": SearchFigure("table 2", VERSIONS, ["shared"], draw_shared_curves),
    "fig6_theta": SearchFigure("table 2", ("v4",), ["theta"], draw_theta_boxes),
}
DICE_TABLES = {"table 2": table_2, "lambdas": lambda_grid}


@matplotlib.rc_context(PAPER_STYLE)
def draw_search_figure(row: SearchFigure, trials: pd.DataFrame, about: str) -> tuple[Figure, str]:
    """Draw a row of SEARCH_FIGURES; returns the figure and what its numbers are.

    about: how these trials differ from others of the search. Raises UserError unless the trials
    differ in what the figure compares and have a test Dice.
    """
    if len(trials[row.compared].drop_duplicates()) < 2:
        raise UserError(f"compares {' and '.join(row.compared)}, the search does not")
    values, about = DICE_TABLES[row.table](trials, about)

    figure, axis = plt.subplots(figsize=(3.3, 2.4))
    axis.set_ylabel(DICE_LABELS[trials["kind"].iloc[0]])
    axis.set_title(textwrap.fill(about, 54), loc="right", color="0.3")
    axis.grid(axis="y")
    row.draw(axis, values)

    handles, labels = axis.get_legend_handles_labels()
    if labels:
        handle_of = dict(zip(labels, handles, strict=True))  # each label once
        labels = sorted(handle_of)
        figure.legend(map(handle_of.get, labels), labels, loc="outside upper center", ncols=4)
    return figure, about


@matplotlib.rc_context(PAPER_STYLE)
def draw_claims(trials: pd.DataFrame, about: str) -> tuple[Figure, str]:
    """Draw a dot and an interval for each claim whose two sides ended; the paper's is a cross.

    Returns the figure and how many claims are decided. Raises UserError if no claim has both sides.
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
    return figure, f"{text}; {about}" if about else text


def publish(figure: Figure, out: Path, name: str, about: str) -> None:
    """Write a figure for print as PNG and PDF, and print where it is."""
    out.mkdir(parents=True, exist_ok=True)
    save(figure, out / f"{name}.png", out / f"{name}.pdf", dpi=300)
    print(f"{name:<15} {out / name}.png, .pdf   {about}")


def draw_search(search: Path, out: Path) -> None:
    """Draw each figure of a search once for each group of comparable trials.

    Raises UserError if there are trials for none.
    """
    trials = read_trials(search)
    for trial in trials[trials["config"].isna()].itertuples():
        to_stderr(f"left out   {trial.trial}: {trial.reason}")

    draws = {"claims": draw_claims}
    groups = {"claims": claim_groups(trials)}
    for name, row in SEARCH_FIGURES.items():
        draws[name] = partial(draw_search_figure, row)
        with_version = trials[trials["version"].isin(row.versions)]
        # Without a trial there is a group of none, to say why the figure is absent.
        groups[name] = groups_for_table(with_version, row.table) or [RunGroup("", trials[:0])]

    published = 0
    reasons = {}  # the first one why a figure was not drawn
    for name, parts in groups.items():
        for number, (group, part) in enumerate(parts, start=1):
            try:
                figure, about = draws[name](part, group)
            except UserError as error:
                reasons.setdefault(name, f"{error} ({group})" if group else f"{error}")
                continue
            file_name = name
            if group:  # a file's name must not be too long
                suffix = re.sub(r"[^\w.]+", "_", group) if len(group) < 150 else str(number)
                file_name += f"-{suffix}"
            publish(figure, out, file_name, about)
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
    add, either = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    either.add_argument("search", nargs="?", type=Path, help="folder of a search: Figs. 4-6, S1")
    text = "draw Fig. 7 or 8 of these runs"
    either.add_argument("--qualitative", nargs="+", type=Path, metavar="RUN", help=text)
    add("--study", help="draw this study of the runs' test parts [the one with most lesion]")
    add("--out", type=Path, metavar="DIR", help="write the figures here [SEARCH/figures]")
    add_flags(parser, EVAL_OPTIONS)
    args = parser.parse_args(argv)
    given = options_from_args(args, EVAL_OPTIONS)

    if args.search and (args.study or given):
        raise UserError("--study and options of runs go with --qualitative. Leave them out.")
    if args.qualitative and args.out is None:
        raise UserError("--qualitative: say where to write the figure with --out DIR.")

    if args.search:
        draw_search(args.search, args.out or args.search / "figures")
    else:
        draw_qualitative(args.qualitative, args.study, given, args.out)


if __name__ == "__main__":
    command_line(plots_command)
