"""Pictures: curves.png and examples.png of a run, and the paper's figures:

python plots.py SEARCH                 Figs. 4-6 and supplement Fig. 1 from the trials in SEARCH
python plots.py --qualitative RUN ... --out DIR    Fig. 7, or Fig. 8 of brain tumour runs
"""

import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from scipy.special import softmax

from cache import Case
from config import add_flags, as_options
from data import lend_ct, shuffle_voxels
from devices import autocast
from eval import EIGHTEEN, EVAL_OPTIONS, bits, choose_cases, named_masks, see, sliding_window
from files import Parser, UserError, atomic, command_line
from mirror_unet import IMAGE_NAMES, UNIONS, VARIANTS, Variant
from preprocess import PREPROCESSING, THRESHOLD_SUV
from runs import load_run, open_data, read_metrics, read_trials, terms_of
from tables import (
    NO_VERDICT,
    PHIS,
    VERSIONS,
    claim_groups,
    claims,
    groups_of,
    lambda_grid,
    table_2,
)

matplotlib.use("Agg")  # no screen on a compute node
matplotlib.rcParams["pdf.fonttype"] = 42  # fonts embedded whole, as text
# Okabe and Ito's palette, told apart by colour-blind readers
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def pictures(run: Path, model, cases: list[Case], config, device) -> None:
    """All that a finished run draws, of its test studies."""
    curves(run)
    examples(run / "examples.png", model, cases, config, device)


def save(figure, *paths: Path, **how) -> None:
    """Write a figure in the format that each name ends in, without a date, and close it."""
    for path in paths:
        with atomic(path) as file:
            form = {"format": path.suffix[1:], "metadata": {"CreationDate": None}}
            figure.savefig(file, **{"dpi": 110, **form, **how})
    plt.close(figure)


def curves(run: Path) -> None:
    """curves.png: loss terms, validation Dice, each task's gradient on the shared layers, speed."""
    if not (rows := read_metrics(run)):  # the file was lost
        return
    frame = pd.DataFrame(rows).set_index("epoch")
    terms = terms_of(frame)
    figure, (loss, dice, norm, speed) = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for color, term in zip(COLORS * len(terms), terms, strict=False):
        loss.plot(frame[term], color=color, label=term)
        if f"grad_{term}" in frame:
            norm.plot(frame[f"grad_{term}"], color=color, label=term)
    loss.plot(frame["loss"], color="black", linestyle="--", label="loss")
    if "val_dice" in frame:
        dice.plot(frame["val_dice"].dropna(), color=COLORS[0], marker="o", label="Dice")
    if "val_fpv_healthy_ml" in frame:
        dice.twinx().plot(frame["val_fpv_healthy_ml"].dropna(), color=COLORS[1])
        dice.plot([], [], color=COLORS[1], label="healthy FPV, ml (right)")
    speed.plot(frame["patches_per_s"], color=COLORS[0], label="patches per second")
    speed.plot(100 * frame["data_wait"], color=COLORS[1], label="waiting for data, %")
    positive = (frame[[*terms, "loss"]] > 0).all(axis=None)  # a learned weight may not be
    loss.set(title="Weighted loss terms", yscale="log" if positive else "symlog")
    dice.set(title="Validation", ylim=(0, 1))
    norm.set(title="Gradient norm on the shared layers", yscale="log")
    speed.set(title="Speed", ylim=(0, None))
    for axis in (loss, dice, norm, speed):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    save(figure, run / "curves.png")


# ------------------------------------------------------------------ a study in one plane

LOOKS = {  # of kinds of data; under: the image below a mask; titles: special ones of the figure
    "petct": SimpleNamespace(figure="fig7", plane="coronal", across=1, up=2, under="pet",
                             titles={"seen": "CT, Φ($x_C$)", "btl": "bottleneck\nor fused"},
                             dice="test Dice (%)"),
    "mri": SimpleNamespace(figure="fig8", plane="axial", across=2, up=1, under="ct", titles={},
                           dice="test Dice, whole tumour (%)"),
}  # fmt: skip
TITLES = {  # the columns of examples.png and Figs. 7 and 8, as far as study_row fills them
    "seen": "{ct}", "image": "{pet}", "ct": "{ct} branch", "pet": "{pet} branch",
    "btl": "bottleneck", "seg": "fused with θ", "hot": f"SUV ≥ {THRESHOLD_SUV:g}",
    "union": "united", "mask": "prediction", "truth": "truth",
}  # fmt: skip
OUTLINES = {  # of masks by name; in grey, edema and core look alike
    "truth": (COLORS[2], "-"), "prediction": (COLORS[1], "-"), "edema": (COLORS[4], "-"),
    "core": (COLORS[5], "--"), "whole": (COLORS[3], "-"),
}  # fmt: skip


@torch.inference_mode()
def all_outputs(model, images: np.ndarray, config, device) -> dict[str, np.ndarray]:
    """The mask "seg" and what the tasks put out over a study (2, W, H, D), by field of Output:
    logits (1 + classes, W, H, D) or an image (1, W, H, D)."""
    widths = {"seg": 1 + len(model.variant.classes)}
    widths |= {s: task.channels for s, task in model.variant.tasks.items() if s in model.heads}

    def run(windows):
        with autocast(device, config.amp):
            windows = see(windows, config.modality)
            out = model(windows[:, :1], windows[:, 1:], heads=tuple(widths))
        return torch.cat([getattr(out, field).float() for field in widths], dim=1), None

    model.eval()
    how = config.patch, config.overlap, config.window_weights, config.window_batch
    stitched, _ = sliding_window(run, images, *how, device)
    parts = torch.split(stitched.cpu(), [*widths.values()])
    return {field: part.numpy() for field, part in zip(widths, parts, strict=True)}


def largest_lesion(truth: np.ndarray, axis: int) -> int:
    """The plane across `axis` that cuts most of the largest lesion; the middle one without any."""
    regions, count = ndimage.label(truth > 0, EIGHTEEN)
    if not count:
        return truth.shape[axis] // 2
    largest = regions == np.bincount(regions.ravel())[1:].argmax() + 1
    return int(largest.sum(axis=tuple({0, 1, 2} - {axis})).argmax())


def input_panels(maps: dict[str, np.ndarray], clip) -> dict[str, dict]:
    """The inputs in grey; those without units (clip None) on a black background."""
    if clip:
        grey = {"ct": (0, 1, "gray"), "pet": (0, 10 / clip[1][1], "gray_r")}  # SUV 0 to 10
    else:
        grey = {name: (*np.percentile(maps[name], (0.5, 99.8)), "gray") for name in ("ct", "pet")}
        head = (maps["ct"] != 0) | (maps["pet"] != 0)
        maps = {name: np.where(head, m, m.min()) for name, m in maps.items()}
    grey["seen"] = grey["ct"]
    return {name: {"image": m, "colors": grey[name]} for name, m in maps.items()}


def study_row(model, case: Case, config, device, paper=False, seen=None, phi="") -> tuple:
    """The panels of a study by key of TITLES, in the plane of its largest lesion, and this plane.

    Inputs, a panel for each task, the final mask in a red box, truth. A task has an image or the
    probability of its foreground; for the paper outlines of its classes, if the mask has them, and
    the box is around the union of all, the fusion or a branch. seen: what the network gets in place
    of the study's images (2, W, H, D); phi: a note on it.
    """
    variant, look, settings = model.variant, LOOKS[config.kind], PREPROCESSING[config.kind]
    names = dict(zip(("ct", "pet"), IMAGE_NAMES[config.kind], strict=True))
    images, truth = np.asarray(case.load("images"), np.float32), np.asarray(case.load("label"))
    seen, at = images if seen is None else seen, largest_lesion(truth, look.across)

    def cut(whole: np.ndarray) -> np.ndarray:  # (..., W, H, D) -> (..., rows, columns)
        plane = np.rot90(whole.take(at, look.across - 3), axes=(-2, -1))
        return plane[..., ::-1] if settings.axes[0] == "R" else plane  # the patient's right is left

    def masks(logits: np.ndarray, variant: Variant) -> dict[str, np.ndarray]:
        return named_masks(bits(logits[1:] - logits[0], variant), variant.classes)

    def outlined(panel: dict, masks: dict, note="", classes=variant.classes, alone="prediction"):
        lines = {c if len(variant.classes) > 1 else alone: masks[c] for c in classes}
        return panel | {"note": note, "lines": lines}

    out = {field: cut(m) for field, m in all_outputs(model, seen, config, device).items()}
    found, true = masks(out["seg"], variant), named_masks(cut(truth), variant.classes)
    inputs = {"ct": cut(images[0]), "pet": cut(images[1]), "seen": cut(seen[0])}
    inputs = input_panels(inputs, settings.clip)
    under, suv = inputs[look.under], "SUV 0-10" if settings.clip else ""
    row = {"seen": inputs["seen"] | {"note": phi}, "image": inputs["pet"] | {"note": suv}}
    tasks = {slot: task for slot, task in variant.tasks.items() if slot in out}
    if variant.fused and model.theta is not None:
        tasks["seg"] = variant.pet  # of both branches by θ (Eq. 4)
    for slot, task in tasks.items():
        if not task.classes:
            note = task.title if task.target == slot else f"{names[task.target]} {task.title}"
            row[slot] = inputs[task.target] | {"image": out[slot][0], "note": note}
        elif slot == variant.organs:
            labels = out[slot].argmax(axis=0)
            own = {name: labels == number for number, name in enumerate(task.classes, 1)}
            row[slot] = inputs["ct"] | {"note": task.title, "lines": own}
        elif paper and {*task.classes} <= {*found}:
            note = " and ".join(task.classes) if len(variant.classes) > 1 else "segmentation"
            own = masks(out[slot], Variant(pet=task))
            row[slot] = outlined(inputs.get(slot, under), own, note, task.classes)
        else:
            image = 1 - softmax(out[slot], axis=0)[0]
            row[slot] = {"image": image, "colors": (0, 1, "inferno"), "note": task.title}
    if settings.clip and not paper:
        hot = inputs["pet"]["image"] * settings.clip[1][1] >= THRESHOLD_SUV
        row["hot"] = inputs["pet"] | {"note": "", "lines": {"prediction": hot}}
    final, row["truth"] = [*variant.mask], outlined(under, true, alone="truth")
    if not paper:
        final, row["mask"] = ["mask"], outlined(under, found)
    elif union := {name: found[name] for name in UNIONS if name in found}:
        note = " ∪ ".join(variant.classes)
        final, row["union"] = ["union"], under | {"note": note, "lines": union}
    elif "seg" in row:  # in the place of the bottleneck, which such a variant lacks
        theta = f"fused, θ = {model.theta.item():.2g}"
        final, row["btl"] = ["btl"], row.pop("seg") | {"note": theta}
    return row | {name: row[name] | {"final": True} for name in final}, at


def draw_grid(rows: list[dict], labels, config, paper: bool = False):
    """Rows of study_row with labels at the left; for the paper 7 inches wide, at most 8.8 high."""
    look, (ct, pet) = LOOKS[config.kind], IMAGE_NAMES[config.kind]
    titles = TITLES | (look.titles if paper else {})
    titles = {n: t.format(ct=ct, pet=pet) for n, t in titles.items() if any(n in r for r in rows)}
    panels = [panel for row in rows for panel in row.values()]
    aspect = config.spacing[look.up] / config.spacing[0]
    ratio = np.clip(max(aspect * np.divide(*p["image"].shape) for p in panels), 0.6, 2.2)
    width = 1.55  # inches, as all below
    if paper:
        width = min(6.8 / len(titles), (8.3 / len(rows) - 0.18) / ratio + 0.05)
    size = (len(titles) * width + 0.2, len(rows) * ((width - 0.05) * ratio + 0.18) + 0.5)
    figure = plt.figure(figsize=size, layout="compressed")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    found = dict.fromkeys(n for p in panels for n, m in p.get("lines", {}).items() if m.any())
    styles = {name: OUTLINES.get(name, (f"C{i}", "-")) for i, name in enumerate(found)}
    for (i, j), axis in np.ndenumerate(axes):
        panel = rows[i].get([*titles][j])
        axis.set(xticks=[], yticks=[], frame_on=bool(panel), box_aspect=None if panel else ratio)
        if not panel:
            continue
        low, high, colors = panel["colors"]
        axis.imshow(panel["image"], cmap=colors, vmin=low, vmax=high, aspect=aspect)
        axis.set_xlabel(panel["note"], fontsize=6, labelpad=2)
        for name, mask in panel.get("lines", {}).items():
            if mask.any():
                color, dashes = styles[name]
                axis.contour(mask, levels=[0.5], colors=[color], linewidths=0.9, linestyles=dashes)
                axis.contourf(mask, levels=[0.5, 1.5], colors=[color], alpha=0.35 * paper)
        for spine in axis.spines.values():
            spine.set(visible=panel.get("final", False), color=COLORS[1], linewidth=2)
    for axis, title in zip(axes[0], titles.values(), strict=True):
        axis.set_title(title, fontsize=7, pad=3)
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label, fontsize=7, labelpad=3)
    handles = [plt.Line2D([], [], c=c, ls=dashes, label=n) for n, (c, dashes) in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def examples(path: Path, model, cases: list[Case], config, device, most: int = 4) -> None:
    """examples.png in the manner of Fig. 7: a row per study, through its largest lesion."""
    ill = sorted((c for c in cases if c.has_lesion), key=lambda c: -c.meta["lesion_voxels"])
    chosen = ill[:: max(1, len(ill) // most)][:most] or cases[:1]
    rows = [study_row(model, case, config, device)[0] for case in chosen]
    figure = draw_grid(rows, [case.name.split("/")[0] for case in chosen], config)
    save(figure, path, bbox_inches="tight")


def phi_of_study(images: np.ndarray, config) -> tuple[np.ndarray, str]:
    """Φ(x_C) over a whole study (2, W, H, D), seeded by the run's seed, and what it was: noise with
    the largest σ of training, or cubes that touch the same share of the voxels as in a crop."""
    ct, said = torch.tensor(images[None, :1]), ""  # (1, 1, W, H, D)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.phi == "noise":
            ct += config.noise_sigma * torch.randn_like(ct)
            said = f"noise, σ = {config.noise_sigma:g}"
        elif config.phi == "shuffle":
            edge = min(config.shuffle_edge, *ct.shape[2:])
            share = config.shuffle_count * config.shuffle_edge**3 / np.prod(config.patch)
            count = max(round(share * ct.numel() / edge**3), min(config.shuffle_count, 1))
            ct = shuffle_voxels(ct, edge, count)
            said = f"{count} cube{'s' * (count != 1)} of {edge}³"
    return np.concatenate([ct[0].numpy(), images[1:]]), said


def qualitative(runs: list[Path], study: str | None = None, given: dict | None = None):
    """Fig. 7 from PET/CT runs, Fig. 8 from brain tumour runs: a row per run, all of one study.

    A row is from one pass with Φ(x_C); with --bottleneck own the mask is that of testing. study: of
    the test part of every run, by default that with the most lesion. given: options in place of the
    runs'. Returns the figure, its name, and the study with its plane. Raises UserError.
    """
    opened = []
    for run in runs:
        model, config, device, _ = load_run(run, "best", given or {})
        if config.version not in VARIANTS[config.kind] or config.modality != "both":
            raise UserError(f"{run}: is no Mirror U-Net of both modalities. Leave it out.")
        config, cases = open_data(config, lambda text: print(text, file=sys.stderr))
        _, cases = choose_cases(run, "test", given or {}, cases)
        cases = lend_ct(cases, config.ct)
        opened.append((run, config, model, device, {case.name: case for case in cases}))
        if len({(other.kind, other.spacing) for _, other, *_ in opened}) > 1:
            raise UserError(f"{run}: kind or spacing differ from those of {runs[0]}.")
    order = [(version, phi) for version in VARIANTS[config.kind] for phi in PHIS]
    opened.sort(key=lambda o: order.index((o[1].version, o[1].phi)))
    first, *others = (cases for *_, cases in opened)
    common = {n: case.meta for n, case in sorted(first.items()) if all(n in o for o in others)}
    if not common:
        raise UserError("No study is in the test part of all of these runs. Use the same splits.")
    if study is not None and study not in common:
        raise UserError(f"--study {study}: not in the test part of all runs, as {min(common)} is.")
    volume = {n: m["lesion_voxels"] * np.prod(m["native_spacing"]) for n, m in common.items()}
    study, rows, labels = study or max(volume, key=volume.get), [], []
    for _, config, model, device, cases in opened:
        seen, phi = phi_of_study(np.asarray(cases[study].load("images"), np.float32), config)
        row, at = study_row(model, cases[study], config, device, True, seen, phi)
        rows.append(row)
        labels.append(config.version + (f"-{config.phi}" if config.phi != "none" else ""))
    if len({*labels}) < len(labels):
        labels = [run.name for run, *_ in opened]
    look, figure = LOOKS[config.kind], draw_grid(rows, labels, config, paper=True)
    return figure, look.figure, f"{study}, {look.plane} slice {at}"


# ------------------------------------------------------------------ figures of a search

HATCHES, MARKERS, DASHES = ("", "////", "xxxx"), "osD^v", ("-", "--", (0, (6, 1)), ":", "-.")
PAPER = {  # fonts and lines for a column of 3.3 or a page of 7 inches
    "font.size": 7, "axes.titlesize": 6, "axes.labelsize": 7, "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "axes.linewidth": 0.6, "lines.linewidth": 1,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "hatch.linewidth": 0.4, "grid.alpha": 0.3,
    "grid.linewidth": 0.5, "legend.frameon": False, "legend.borderaxespad": 0.4, "axes.titlepad": 3,
    "legend.borderpad": 0, "axes.axisbelow": True, "figure.constrained_layout.use": True,
}  # fmt: skip


def name_sets(axis, sets) -> None:
    """The sets L along the x axis, a long one on two lines; many take two columns of a page."""
    names = [s if s == "none" else f"{{{s.replace(' ', ',')}}}" for s in sets]
    axis.set_xticks(range(len(names)), [re.sub(r"(\d,\d,\d,)", r"\1\n", name) for name in names])
    axis.set(xlabel="shared layers L", xlim=(-0.6, len(names) - 0.4))
    axis.figure.set_figwidth(3.3 if len(names) < 9 else 7.0)


def draw_box(axis, at: float, values, width: float, number: int, name: str) -> None:
    """Quartiles and median; whiskers reach the extremes; a dot per value, in Table 2's order."""
    line, color = {"color": "black", "linewidth": 0.7}, COLORS[number]
    face = {"facecolor": matplotlib.colors.to_rgba(color, 0.45), "hatch": HATCHES[number]}
    axis.boxplot(
        [values], positions=[at], widths=width, whis=(0, 100), showfliers=False, manage_ticks=False,
        patch_artist=True, whiskerprops=line, capprops=line, medianprops=line | {"linewidth": 1.4},
        boxprops=face | line, label=name,
    )  # fmt: skip
    spread = at + width * np.linspace(-0.3, 0.3, len(values) + 2)[1:-1]
    axis.plot(spread, values, "o", markersize=2.6, color=color, mec="white", mew=0.4, zorder=3)


def lambda_map(axis, table: pd.DataFrame) -> None:
    """Fig. 1 of the supplement: test Dice of v3 over λ_rec and λ_class, the best one framed."""
    values = table.to_numpy().T
    image = axis.imshow(values, cmap="viridis", origin="lower", aspect="auto")
    for i, j in np.argwhere(~np.isnan(values)):
        best = values[i, j] == np.nanmax(values)
        style = {"weight": "bold" if best else "normal", "ha": "center", "va": "center"}
        style["color"] = "white" if image.norm(values[i, j]) < 0.6 else "black"
        axis.text(j, i, f"{values[i, j]:.2f}", fontsize=6.5, **style)
        if best:
            frame = plt.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, lw=1.6, ec="black")
            axis.add_patch(frame)
    power = matplotlib.ticker.LogFormatterSciNotation()
    axis.set_xticks(range(len(table.index)), map(power, table.index))
    axis.set_yticks(range(len(table.columns)), map(power, table.columns))
    axis.figure.colorbar(image, label=axis.get_ylabel(), pad=0.02)
    axis.set(xlabel=r"$λ_{\mathrm{rec}}$", ylabel=r"$λ_{\mathrm{class}}$")
    axis.patch.set(facecolor="0.9", edgecolor="0.6", hatch="////")  # seen where a cell is missing
    axis.grid(False)
    axis.figure.set_figheight(2.8)


def phi_boxes(axis, table: pd.DataFrame) -> None:
    """Fig. 4: a box per version and Φ over all sets L of shared layers."""
    versions = [v for v in VERSIONS if v in table.index]
    for (version, phi), values in table.iterrows():
        i, j = versions.index(version), [*PHIS].index(phi)
        draw_box(axis, i + 0.27 * (j - 1), values.dropna(), 0.22, j, PHIS[phi])
    axis.set_xticks(range(len(versions)), versions)


def shared_curves(axis, table: pd.DataFrame) -> None:
    """Fig. 5: a line per version over the sets L; a dot is the best Φ or θ, bold in Table 2."""
    best = table.groupby("version").max()
    for version, color, marker, dashes in zip(VERSIONS, COLORS, MARKERS, DASHES, strict=False):
        if version in best.index:
            style = {"color": color, "marker": marker, "linestyle": dashes, "markersize": 4}
            axis.plot(range(best.shape[1]), best.loc[version], label=version, **style)
    name_sets(axis, best.columns)


def theta_boxes(axis, table: pd.DataFrame) -> None:
    """Fig. 6: v4, a box per set L over the fixed θ; the learned θ is a star beside it."""
    table = table.loc["v4"]
    fixed, learned = table.drop(index="learn", errors="ignore"), "learn" in table.index
    name = f"fixed θ, {min(fixed.index)} to {max(fixed.index)}"
    for i, layers in enumerate(fixed):
        draw_box(axis, i - 0.1 * learned, fixed[layers].dropna(), 0.46, 0, name)
    if learned:
        star = {"marker": "*", "ls": "", "markersize": 6, "color": COLORS[1], "label": "learned θ"}
        axis.plot(np.arange(table.shape[1]) + 0.28, table.loc["learn"], **star)
    name_sets(axis, table.columns)


# A figure of comparable trials: their table (tables.SEARCH_TABLES) and versions, the options that
# it compares and what these are called, the numbers, and how they are drawn on an axis.
SEARCH_FIGURES = {
    "fig_s1_lambdas": (
        "lambdas", ["v3"], ["lambda_rec", "lambda_cls"], "λ of v3", lambda_grid, lambda_map
    ),
    "fig4_phi": ("table 2", ["v1", "v2", "v2-rec", "v3"], ["phi"], "Φ", table_2, phi_boxes),
    "fig5_shared": ("table 2", VERSIONS, ["shared"], "sets L", table_2, shared_curves),
    "fig6_theta": ("table 2", ["v4"], ["theta"], "θ", table_2, theta_boxes),
}  # fmt: skip


@matplotlib.rc_context(PAPER)
def search_figure(name: str, trials: pd.DataFrame, about: str = ""):
    """A figure of SEARCH_FIGURES and what it says; about: what parts the trials from others.
    Raises UserError unless they differ in what it compares and have a test Dice."""
    _, _, compared, what, numbers, draw = SEARCH_FIGURES[name]
    if len(trials[compared].drop_duplicates()) < 2:
        raise UserError(f"compares {what}, the search does not")
    table, said = numbers(trials, about)
    figure, axis = plt.subplots(figsize=(3.3, 2.4))
    axis.set_ylabel(LOOKS[trials["kind"].iloc[0]].dice)
    axis.set_title(textwrap.fill(said, 54), loc="right", color="0.3")
    axis.grid(axis="y")
    draw(axis, table)
    handles, names = axis.get_legend_handles_labels()
    if names:
        shown = dict(sorted(zip(names, handles, strict=True), key=lambda pair: pair[0]))
        figure.legend(shown.values(), shown, loc="outside upper center", ncols=4, handlelength=3)
    return figure, said


@matplotlib.rc_context(PAPER)
def claims_figure(trials: pd.DataFrame):
    """A dot and an interval for each claim of which both sides ended, the paper's value as a cross;
    and what it says. Raises UserError without one."""
    table = claims(trials)
    table = table[~table["verdict"].isin(NO_VERDICT)].iloc[::-1]
    if table.empty:
        raise UserError("both sides of a claim, the search has none")
    figure, axis = plt.subplots(figsize=(5.2, 0.9 + 0.24 * len(table)), layout="constrained")
    axis.axvline(0, color="0.6", linewidth=0.8)
    for place, row in enumerate(table.to_dict("records")):
        color = "0.55" if row["verdict"] == "not decided" else COLORS[0]
        axis.plot([row["low"], row["high"]], [place, place], color=color)
        axis.plot(row["here"], place, "o", color=color)
    axis.plot(table["paper"], range(len(table)), "x", color=COLORS[1], label="paper")
    axis.set_yticks(range(len(table)), table["claim"])
    axis.set_xlabel("difference (Dice in %, volumes in ml)")
    axis.grid(axis="x")
    axis.legend(loc="best")
    decided = (table["verdict"] != "not decided").sum()
    return figure, "claims", f"{decided} of {len(table)} claims decided"


def publish(out: Path, figure, name: str, said: str) -> None:
    """Write a figure for print as PNG and PDF, and tell where."""
    out.mkdir(parents=True, exist_ok=True)
    save(figure, out / f"{name}.png", out / f"{name}.pdf", dpi=300)
    print(f"{name:<15} {out / name}.png, .pdf   {said}")


def draw_search(search: Path, out: Path) -> None:
    """All that the search has trials for, by comparable group. Raises UserError if nothing."""
    trials = read_trials(search)
    for trial in trials[trials["config"].isna()].itertuples():
        print(f"left out   {trial.trial}: {trial.reason}", file=sys.stderr)
    drawn, reasons = 0, {}
    for i, (about, part) in enumerate(claim_groups(trials), 1):
        try:
            figure, name, said = claims_figure(part)
        except UserError as error:
            reasons.setdefault("claims", f"{error} ({about})" if about else f"{error}")
            continue
        said = "; ".join(filter(None, (said, about)))
        publish(out, figure, f"{name}-{i}" if about else name, said)
        drawn += 1
    for name, (table, versions, *_) in SEARCH_FIGURES.items():
        groups = groups_of(trials[trials["version"].isin(versions)], table)
        for i, (about, part) in enumerate(groups or [("", trials[:0])], 1):
            try:
                figure, said = search_figure(name, part, about)
            except UserError as error:
                reasons.setdefault(name, f"{error} ({about})" if about else f"{error}")
                continue
            words = re.sub(r"[^\w.]+", "_", about) if len(about) < 150 else str(i)
            publish(out, figure, name + (words and f"-{words}"), said)
            drawn += 1
    if not drawn:
        why = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        raise UserError(f"{search}: no figure to draw of {why}.")
    for name, reason in reasons.items():
        print(f"{name:<16}not drawn: {reason}")


def run_command(argv: list[str] | None = None) -> None:
    """python plots.py: see the top of the file."""
    parser = Parser(description="Draw the figures of the paper.")
    parser.add_argument("search", nargs="?", type=Path, help="folder of a search: Figs. 4-6, S1")
    parser.add_argument("--qualitative", nargs="+", type=Path, metavar="RUN", help="Fig. 7 or 8")
    parser.add_argument("--study", help="of the runs' test parts [the one with most lesion]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="[SEARCH/figures]")
    add_flags(parser, EVAL_OPTIONS)
    args = parser.parse_args(argv)
    given = as_options(args, EVAL_OPTIONS)
    if bool(args.search) == bool(args.qualitative):
        raise UserError("Give the folder of a search, or --qualitative and folders of runs.")
    if args.search and (args.study or given):
        raise UserError("--study and options of runs go with --qualitative. Leave them out.")
    if args.qualitative and args.out is None:
        raise UserError("--qualitative: say where to with --out DIR.")
    if args.search:
        return draw_search(args.search, args.out or args.search / "figures")
    publish(args.out, *qualitative(args.qualitative, args.study, given))


if __name__ == "__main__":
    command_line(run_command)
