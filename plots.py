"""Figures and records of a run: metrics.csv, TensorBoard events, curves.png and examples.png."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen on a compute node
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.lines import Line2D

import eval as evaluation
from data import PREPROCESSING, THRESHOLD_SUV, Case, atomic
from mirror_unet import margins

# Okabe and Ito's palette, told apart by colour-blind readers
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OUTLINES = {"truth": COLORS[2], "prediction": COLORS[1], "edema": COLORS[4], "core": COLORS[5]}
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


def save(figure, path: Path) -> None:
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------ examples, after Fig. 7


@torch.inference_mode()
def all_outputs(model, image: np.ndarray, config, device) -> dict[str, np.ndarray]:
    """Every head over the whole study by name, each (K, W, H, D); logits as probabilities."""
    names: list[tuple[str, int]] = []

    def run(windows):
        with evaluation.autocast(device, config.amp):
            windows = evaluation.see(windows, config.modality)
            out = model(windows[:, :1], windows[:, 1:])
        maps = {"margin": margins(out.seg)}
        if (
            model.variant.fused and model.theta is not None
        ):  # the θ-combination, last column of Fig. 7
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


def examples(path: Path, model, cases: list[Case], config, device, most: int = 4) -> None:
    """examples.png in the manner of Fig. 7: a row per study, through its largest lesion.

    Columns: CT, PET, the output of each branch, of the bottleneck decoder (or the fusion), the
    prediction, for PET/CT what a threshold of SUV 4 would mark, and the truth.
    """
    ill = sorted((c for c in cases if c.has_lesion), key=lambda c: -c.meta["lesion_voxels"])
    step = max(1, len(ill) // most)
    chosen = ill[::step][:most] or cases[:1]
    rows = [example_row(model, case, config, device) for case in chosen]
    titles = list(rows[0])
    high = max(next(iter(r.values()))["image"].shape[0] for r in rows)
    wide = max(next(iter(r.values()))["image"].shape[1] for r in rows)
    ratio = min(max(high / wide, 0.6), 2.2)
    size = (1.5 * len(titles), 1.5 * ratio * len(rows) + 0.75)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False)
    for i, row in enumerate(rows):
        for j, title in enumerate(titles):
            draw_panel(axes[i][j], **row[title])
            if i == 0:
                axes[i][j].set_title(title, fontsize=8)
        axes[i][0].set_ylabel(chosen[i].name.split("/")[0], fontsize=6)
    drawn = {name for row in rows for panel in row.values() for name in panel["lines"]}
    lines = [Line2D([], [], color=OUTLINES[name], label=name) for name in OUTLINES if name in drawn]
    figure.legend(handles=lines, loc="lower center", ncols=2, fontsize=8, frameon=False)
    top, bottom = 0.45 / size[1], 0.3 / size[1]  # room for the titles and the legend
    figure.subplots_adjust(
        left=0.02, right=0.995, top=1 - top, bottom=bottom, wspace=0.04, hspace=0.04
    )
    save(figure, path)


def example_row(model, case: Case, config, device) -> dict[str, dict]:
    """The panels of one study by title: an image (rows, columns), its range, masks to outline."""
    image = np.asarray(case.load("images"), np.float32)
    truth = np.asarray(case.load("label"))
    out = all_outputs(model, image, config, device)
    bits = evaluation.bits(out.pop("margin"), model.variant)
    petct = config.kind == "petct"
    # coronal through the body, axial through the head: the plane with the most lesion
    axis = 1 if petct else 2
    area = (truth > 0).sum(axis=tuple({0, 1, 2} - {axis}))
    at = int(area.argmax()) if area.any() else truth.shape[axis] // 2

    def cut(volume):
        return np.rot90(volume.take(at, axis))

    aspect = (
        config.spacing[2] / config.spacing[0] if petct else config.spacing[1] / config.spacing[0]
    )
    names = model.variant.classes

    def outlines(classes, whole):
        if petct:
            return {whole: cut(classes > 0)}
        masks = evaluation.named_masks(classes, names)
        return {name: cut(masks[name]) for name in names}

    def panel(volume, cmap="gray", span=(None, None), **outlined):
        return {
            "image": cut(volume),
            "cmap": cmap,
            "span": span,
            "aspect": aspect,
            "lines": outlined,
        }

    ct_name, pet_name = ("CT", "PET (SUV 0-10)") if petct else ("FLAIR", "T1Gd")
    top_suv = PREPROCESSING["petct"].clip[1][1]  # what 1.0 stands for
    pet_style = {"cmap": "gray_r", "span": (0, 10 / top_suv)} if petct else {}
    panels = {ct_name: panel(image[0]), pet_name: panel(image[1], **pet_style)}
    decoder = "bottleneck" if model.variant.btl else "reconstruction"
    of_pet = {"edema+core": "whole"}.get(model.variant.pet, model.variant.pet)  # 1 - p(background)
    heat = {"cmap": "inferno", "span": (0, 1)}
    titles = {
        "ct_rec": (f"{ct_name} branch: reconstruction", {}),
        "ct_seg": (f"{ct_name} branch: p({model.variant.ct})", heat),
        "pet_seg": (f"{pet_name.split()[0]} branch: p({of_pet})", heat),
        "pet_rec": (f"{decoder}: {pet_name.split()[0]}", pet_style),
        "btl_seg": ("bottleneck: p(whole)", heat),
        "fused": ("fused with θ: p(lesion)", heat),
    }
    for name, (title, style) in titles.items():
        if name in out:
            panels[title.replace(": ", ":\n")] = panel(out[name][0], **style)
    base = {"volume": image[1], **pet_style} if petct else {"volume": image[0]}
    if petct:
        hot = image[1] * top_suv >= THRESHOLD_SUV
        panels["SUV ≥ 4"] = panel(**base, prediction=cut(hot))
    panels["prediction"] = panel(**base, **outlines(bits, "prediction"))
    panels["truth"] = panel(**base, **outlines(truth, "truth"))
    return panels


def draw_panel(axis, image, cmap, span, aspect, lines) -> None:
    axis.imshow(image, cmap=cmap, vmin=span[0], vmax=span[1], aspect=aspect)
    for name, mask in lines.items():
        if mask.any():
            axis.contour(mask, levels=[0.5], colors=[OUTLINES[name]], linewidths=1.0)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def read_trials(path: Path) -> pd.DataFrame:
    text = dict.fromkeys(("trial", "status", "version", "shared", "phi", "theta"), str)
    from data import UserError

    try:
        return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Give the folder of a search.") from None
