"""eval.py: metrics, sliding windows, masks on the grid of the files, tables and the commands."""

import contextlib
import io
import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import eval as evaluation
import train
from data import (
    PREPROCESSING,
    Case,
    Source,
    Study,
    UserError,
    preprocess,
    write_json,
    write_phantom,
)
from mirror_unet import VARIANTS, MirrorUNet, Output

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------ metrics


def blocks(*boxes, shape=(12, 12, 12)):
    """A mask of boxes, each (first voxel, side)."""
    mask = np.zeros(shape, np.uint8)
    for (x, y, z), side in boxes:
        mask[x : x + side, y : y + side, z : z + side] = 1
    return mask


CUBE, FAR = ((2, 2, 2), 3), ((9, 9, 9), 2)


@pytest.mark.parametrize(
    "truth, pred, dice, fpv, fnv",
    [
        ([CUBE], [], 0, 0, 0.324),
        ([], [FAR], 0, 0.096, 0),
        ([CUBE], [((4, 2, 2), 3), FAR], 18 / 62, 0.096, 0),
        ([CUBE, FAR], [((3, 3, 3), 1)], 2 / 36, 0, 0.096),
        ([((5, 5, 5), 1)], [((5, 5, 5), 1), ((6, 6, 5), 1)], 2 / 3, 0, 0),
        ([((5, 5, 5), 1)], [((5, 5, 5), 1), ((6, 6, 6), 1)], 2 / 3, 0.012, 0),
        ([], [], math.nan, 0, 0),
    ],
)
def test_worked_values_of_the_challenge(truth, pred, dice, fpv, fnv):
    truth, pred, spacing = blocks(*truth), blocks(*pred), (2, 2, 3)
    assert evaluation.dice(pred, truth) == pytest.approx(dice, nan_ok=True)
    assert evaluation.false_positive_volume(pred, truth, spacing) == pytest.approx(fpv)
    assert evaluation.false_negative_volume(pred, truth, spacing) == pytest.approx(fnv)


def test_any_value_but_zero_is_foreground():
    """A component of labels 1 and 2 is one; the challenge's script would cut it in two."""
    pred = np.zeros((6, 6, 6))
    pred[1, 1, 1], pred[2, 1, 1], pred[3, 1, 1] = 1, 2, -3
    truth = blocks(((1, 1, 1), 1), shape=(6, 6, 6))
    assert evaluation.dice(pred, truth) == 0.5
    assert evaluation.false_positive_volume(pred, truth, (1, 1, 1)) == 0
    assert evaluation.false_negative_volume(2 * truth, pred > 1, (10, 10, 10)) == 1


@pytest.mark.parametrize("metric", ["dice", "false_positive_volume", "false_negative_volume"])
@pytest.mark.parametrize("shape", [(4, 4, 1), (4, 4), (4, 4, 5)])
def test_masks_on_other_grids_are_refused(metric, shape):
    more = () if metric == "dice" else ((1, 1, 1),)
    with pytest.raises(ValueError, match="different grids"):
        getattr(evaluation, metric)(np.ones(shape), np.ones((4, 4, 4)), *more)


def unmatched_by_flood_fill(a, b):
    """Voxels of the 18-connected components of a that miss b, grown voxel by voxel."""
    near = [d for d in itertools.product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, d)) < 3]
    left, lost = {tuple(v) for v in np.argwhere(a)}, 0
    while left:
        todo = [left.pop()]
        component = set(todo)
        while todo:
            voxel = todo.pop()
            for step in near:
                other = tuple(np.add(voxel, step))
                if other in left:
                    left.remove(other)
                    component.add(other)
                    todo.append(other)
        lost += 0 if any(b[v] for v in component) else len(component)
    return lost


@pytest.mark.parametrize("seed", range(12))
def test_fpv_and_fnv_agree_with_a_flood_fill(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(3, 11, 3))
    pred, truth = (rng.random(shape) < rng.choice([0.03, 0.08, 0.15]) for _ in range(2))
    spacing = (2.0, 0.7, 3.1)
    expected = [unmatched_by_flood_fill(a, b) * 4.34e-3 for a, b in ((pred, truth), (truth, pred))]
    assert evaluation.false_positive_volume(pred, truth, spacing) == pytest.approx(expected[0])
    assert evaluation.false_negative_volume(pred, truth, spacing) == pytest.approx(expected[1])


# ------------------------------------------------------------------ classes


def test_bits_and_labels_where_edema_and_core_overlap():
    """Own branches (MRI v1): both may be present, whole is their union, a label map takes one."""
    margin = np.array([[2.0, 3.0, -1.0, -1.0, 0.0], [1.0, 4.0, 1.0, -2.0, 0.0]])[:, :, None, None]
    classes = evaluation.bits(margin.copy(), VARIANTS["mri"]["v1"])
    assert classes.ravel().tolist() == [3, 3, 2, 0, 0]
    masks = evaluation.named_masks(classes, ("edema", "core"))
    assert masks["edema"].ravel().tolist() == [True, True, False, False, False]
    assert masks["core"].ravel().tolist() == [True, True, True, False, False]
    assert masks["whole"].ravel().tolist() == [True, True, True, False, False]
    assert evaluation.label_map(margin).ravel().tolist() == [1, 2, 2, 0, 0]


def test_bits_of_one_softmax_are_its_argmax():
    logits = np.random.default_rng(0).normal(size=(3, 5, 6, 7))
    margin = logits[1:] - logits[:1]
    classes = evaluation.bits(margin.copy(), VARIANTS["mri"]["v2-rec"])
    assert (classes == logits.argmax(0)).all()  # bits 1, 2 are the numbers 1, 2
    assert (evaluation.label_map(margin) == logits.argmax(0)).all()
    lesion = evaluation.bits(margin[:1].copy(), VARIANTS["petct"]["v1"])
    assert (lesion == (margin[0] > 0)).all()


def test_score_of_mri_names_every_class():
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[0], truth[1] = 1, 2  # edema, core
    pred = np.zeros_like(truth)
    pred[0], pred[2] = 3, 1  # both on the edema, edema on nothing
    row = evaluation.score(pred, truth, ("edema", "core"), (1, 1, 10))
    assert row == {
        "dice_whole": 0.5, "dice_edema": pytest.approx(2 / 3), "dice_core": 0.0,
        "whole_pred_ml": 0.32, "edema_pred_ml": 0.32, "core_pred_ml": 0.16,
        "whole_true_ml": 0.32, "edema_true_ml": 0.16, "core_true_ml": 0.16,
    }  # fmt: skip


# ------------------------------------------------------------------ sliding windows


@pytest.mark.parametrize(
    "size, patch, overlap, starts",  # what MONAI 1.6.1's dense_patch_slices gives
    [
        (96, 96, 0.25, [0]),
        (100, 96, 0.25, [0, 4]),
        (168, 96, 0.25, [0, 72]),
        (169, 96, 0.25, [0, 72, 73]),
        (200, 96, 0.3, [0, 67, 104]),
        (50, 16, 0.5, [0, 8, 16, 24, 32, 34]),
        (17, 16, 0.9, [0, 1]),
        (20, 10, 0.7, [0, 3, 6, 9, 10]),
        (64, 16, 0.0, [0, 16, 32, 48]),
        (65, 16, 0.0, [0, 16, 32, 48, 49]),
        (120, 80, 0.8, [0, 15, 30, 40]),
        (33, 32, 0.99, [0, 1]),
    ],
)
def test_window_starts_are_those_of_monai(size, patch, overlap, starts):
    assert evaluation.window_starts(size, patch, overlap) == starts


@pytest.mark.parametrize("patch", [1, 7, 16, 96])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9, 0.999])
def test_windows_cover_every_voxel_and_stay_inside(patch, overlap):
    for size in range(patch, patch + 70):
        starts = evaluation.window_starts(size, patch, overlap)
        covered = {start + i for start in starts for i in range(patch)}
        assert covered == set(range(size))
        assert len(set(starts)) == len(starts)


def identity(windows):
    return windows[:, :1], None


@pytest.mark.parametrize("shape", [(16, 8, 12), (40, 33, 29), (7, 30, 5), (1, 1, 1), (17, 9, 13)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_sliding_the_identity_returns_the_image(shape, overlap, batch):
    image = np.random.default_rng(0).integers(-99, 99, (2, *shape)).astype(np.float16)
    result, best = evaluation.sliding_window(identity, image, (16, 8, 12), overlap, batch=batch)
    assert result.dtype == torch.float32 and math.isnan(best)
    assert np.array_equal(result.numpy(), image[:1])  # sums of whole numbers are exact
    smooth, _ = evaluation.sliding_window(
        identity, image, (16, 8, 12), overlap, "gaussian", batch=batch
    )
    assert np.allclose(smooth.numpy(), image[:1], rtol=1e-5)


def test_gaussian_weights_are_highest_in_the_middle():
    weight = evaluation.window_weights((16, 8, 12), "gaussian").numpy()
    sides = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in (16, 8, 12)]
    expected = np.maximum(np.einsum("i,j,k->ijk", *sides), 1e-3)
    assert np.allclose(weight, expected, rtol=1e-5)
    assert (evaluation.window_weights((4, 5, 6), "constant") == torch.ones(4, 5, 6)).all()


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 3, 3, padding=1))


def slide_naively(run, image, patch, overlap, weight):
    """Window by window and axis by axis, in float64, for volumes not smaller than a window."""
    shape = image.shape[1:]
    total, norm = 0, np.zeros(shape)
    steps = [int(p * (1 - overlap)) for p in patch]
    for corner in itertools.product(*(range(0, n, s) for n, s in zip(shape, steps, strict=True))):
        ends = [min(c + p, n) for c, p, n in zip(corner, patch, shape, strict=True)]
        box = tuple(slice(e - p, e) for e, p in zip(ends, patch, strict=True))
        axes = zip(corner, steps, patch, shape, strict=True)
        if any(c > 0 and c - s + p >= n for c, s, p, n in axes):
            continue  # the window before has already reached the border
        values = np.zeros((3, *shape))
        values[(slice(None), *box)] = run(image[(slice(None), *box)]) * weight
        total = total + values
        norm[box] += weight
    return total / norm


@pytest.mark.parametrize("kind", ["constant", "gaussian"])
@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_sliding_window_agrees_with_a_naive_loop(kind, overlap):
    network, patch = small_network(), (16, 8, 12)
    image = np.random.default_rng(1).normal(size=(2, 25, 19, 30)).astype(np.float32)
    weight = evaluation.window_weights(patch, kind).double().numpy()

    @torch.no_grad()
    def alone(window):
        return network(torch.from_numpy(window)[None])[0].double().numpy()

    @torch.no_grad()
    def together(windows):
        return network(windows), None

    result, _ = evaluation.sliding_window(together, image, patch, overlap, kind, batch=4)
    assert np.allclose(
        result.numpy(), slide_naively(alone, image, patch, overlap, weight), atol=1e-5
    )


class Counting:
    """`network` on channel 1 alone, with the windows it was given and a score for each."""

    def __init__(self, memory=math.inf):
        self.network, self.memory = small_network(), memory
        self.batches = []

    @torch.no_grad()
    def __call__(self, windows):
        self.batches.append(len(windows))
        if len(windows) > self.memory:
            raise torch.OutOfMemoryError("simulated")
        return self.network(windows[:, 1:].repeat(1, 2, 1, 1, 1)), windows[:, 1].amax((1, 2, 3))


def half_empty():
    """CT everywhere, PET in one corner of the volume only."""
    image = np.random.default_rng(2).uniform(0.5, 1, (2, 32, 32, 32)).astype(np.float32)
    image[1, 20:] = image[1, :, 16:] = 0
    return image


def test_blank_windows_are_computed_once():
    """Not reading CT: of the 8 windows the 6 without PET share one answer, with the same map."""
    short, full = Counting(), Counting()
    args = (half_empty(), (16, 16, 16), 0.0, "constant", 3)
    blank_once, best = evaluation.sliding_window(short, *args, reads=(1,))
    every_one, same = evaluation.sliding_window(full, *args)
    assert sum(short.batches) == 1 + 4 and sum(full.batches) == 8
    assert torch.allclose(blank_once, every_one, atol=1e-6)
    assert best == same == half_empty()[1].max()


def test_an_empty_volume_is_one_window():
    run = Counting()
    result, best = evaluation.sliding_window(run, np.zeros((2, 40, 40, 40), np.float16), (16,) * 3)
    assert run.batches == [1] and best == 0
    blank = run.network(torch.zeros(1, 2, 16, 16, 16))[0, :, 8, 8, 8]
    assert torch.allclose(result[:, 20, 20, 20], blank, atol=1e-6)


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_out_of_memory_takes_fewer_windows(memory):
    args = (half_empty(), (16, 16, 16), 0.25, "gaussian", 8)
    run = Counting(memory)
    small, best = evaluation.sliding_window(run, *args)
    full, same = evaluation.sliding_window(Counting(), *args)
    assert torch.allclose(small, full, atol=1e-6) and best == same
    assert run.batches[0] == 8 and max(run.batches[4:]) <= memory


def test_out_of_memory_for_one_window_says_so():
    with pytest.raises(UserError, match=r"no memory for one window of \(16, 16, 16\)"):
        evaluation.sliding_window(Counting(0), half_empty(), (16, 16, 16))


CONFIG = replace(
    train.Config(), kind="petct", patch=(16, 16, 16), spacing=(4.0, 4.0, 4.0), amp="none",
    device="cpu", threads=1, workers=0, overlap=0.25, window_weights="constant",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "version, bottleneck, heads",
    [
        ("v1", "own", ("seg",)),  # the mask does not see CT (Eq. 1)
        ("v2", "joint", ("seg",)),
        ("v4", "own", ("seg",)),
        ("v3", "own", ("seg", "tumor")),  # T sees CT (Eq. 3)
    ],
)
@pytest.mark.parametrize("pet", [0, 1])
def test_windows_without_pet_still_see_their_ct(version, bottleneck, heads, pet):
    """The 8 windows of 16^3 side by side, most or all of them without PET, each on its own."""
    torch.manual_seed(0)
    model = MirrorUNet(version, bottleneck=bottleneck).eval()
    image = half_empty()
    image[0, 16:] *= -1
    image[1] *= pet
    config = replace(CONFIG, bottleneck=bottleneck, overlap=0.0)
    scores, ran = [], []
    with model.register_forward_pre_hook(lambda _, given: ran.append(len(given[0]))):
        margin, tumor = evaluation.infer(model, image, config, CPU, heads)
    assert sum(ran) == (1 + 4 * pet if version == "v1" else 8)
    for corner in itertools.product((0, 16), repeat=3):
        box = (slice(None), *(slice(c, c + 16) for c in corner))
        window = torch.from_numpy(image[box])[None]
        with torch.no_grad():
            out = model(window[:, :1], window[:, 1:])
        assert np.allclose(margin[box], (out.seg[:, 1:] - out.seg[:, :1])[0], atol=1e-5)
        scores.append(out.tumor.sigmoid().item() if "tumor" in heads else math.nan)
    assert tumor == pytest.approx(max(scores), abs=1e-6, nan_ok=True)


# ------------------------------------------------------------------ the grid of the files


class Threshold(nn.Module):
    """Segments what has more than SUV 5, so that the right mask is known."""

    variant = VARIANTS["petct"]["v1"]

    def forward(self, ct, pet, heads):
        assert heads == ("seg",) and not self.training
        return Output(seg=torch.cat([torch.zeros_like(pet), 15 * pet - 5], dim=1))


def turned(degrees, spacing, order=(0, 1, 2), signs=(1, 1, 1)):
    """An affine with rotated, permuted or flipped axes; spacing along the anatomical axes."""
    a, b = np.radians(degrees), np.radians(degrees / 2)
    about_z = [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]
    about_x = [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    affine = np.eye(4)
    affine[:3, :3] = np.array(about_z) @ about_x @ np.diag(np.multiply(spacing, signs))[:, order]
    affine[:3, 3] = (-61.5, 40.25, -700)
    return affine


GRIDS = {
    "RAS": turned(0, (4, 4, 4)),
    "LAS": turned(0, (4, 4, 4), signs=(-1, 1, 1)),
    "anisotropic": turned(0, (2.5, 3, 5)),
    "oblique": turned(25, (3, 3, 5), signs=(-1, -1, 1)),
    "permuted": turned(0, (2, 3, 5), order=(2, 0, 1), signs=(1, -1, -1)),
    "cyclic": turned(15, (2, 3, 5), order=(1, 2, 0), signs=(-1, 1, -1)),
}
SHAPE = (22, 17, 28)


def l_shaped_study(folder, affine, name="SUV.nii.gz", make=nib.Nifti1Image, codes=(1, 1)):
    """A body of SUV 0.5 in air with a lesion that no flip or turn maps to itself; PET, its file."""
    pet = np.zeros(SHAPE, np.float32)
    pet[3:21, 4:16, 2:25] = 0.5
    pet[5:16, 6:9, 4:8] = pet[5:9, 6:14, 4:8] = pet[5:9, 6:9, 4:20] = 10
    folder.mkdir(parents=True)
    image = make(pet, affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, folder / name)
    nib.save(nib.Nifti1Image(np.full(SHAPE, 40, np.int16), affine), folder / "CTres.nii.gz")
    return pet, folder / name


def assert_opens_over(mask, scan):
    """Same grid in every field of the header that a viewer may use."""
    mask, scan = mask.header, scan.header
    assert mask.get_data_shape() == scan.get_data_shape()[:3]
    assert mask.get_data_dtype() == np.uint8 and mask.get_slope_inter() in ((1, 0), (None, None))
    assert np.array_equal(mask.get_best_affine(), scan.get_best_affine())
    assert mask.get_zooms() == scan.get_zooms()[:3]
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_y", "xyzt_units"):
        assert np.array_equal(mask[field], scan[field])
    assert mask["pixdim"][0] == scan["pixdim"][0]


@pytest.mark.parametrize("grid", GRIDS)
def test_prediction_lies_on_the_voxels_of_the_scan(tmp_path, grid):
    affine = GRIDS[grid]
    pet, scan = l_shaped_study(tmp_path / "in" / "PETCT_1" / "a", affine)
    turn = np.abs(nib.io_orientation(affine)[:, 0]).astype(int)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    spacing = tuple(lengths[np.argsort(turn)])  # along L, A, S as the files have it
    config = replace(CONFIG, spacing=spacing)
    [path] = evaluation.predict(Threshold().eval(), config, tmp_path / "in", tmp_path / "out", CPU)
    assert path == tmp_path / "out" / "PETCT_1__a.nii.gz"
    mask = nib.load(path)
    assert_opens_over(mask, nib.load(scan))
    assert np.array_equal(np.asarray(mask.dataobj), pet > 5)


@pytest.mark.parametrize("grid", GRIDS)
def test_resampled_prediction_overlaps_the_lesion(tmp_path, grid):
    pet, scan = l_shaped_study(tmp_path / "in", GRIDS[grid])
    config = replace(CONFIG, spacing=(3.7, 2.9, 4.1))
    [path] = evaluation.predict(Threshold().eval(), config, tmp_path / "in", tmp_path / "out", CPU)
    assert_opens_over(nib.load(path), nib.load(scan))
    assert evaluation.dice(np.asarray(nib.load(path).dataobj), pet > 5) > 0.8


@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (1, 4)])
@pytest.mark.parametrize(
    "name, make", [("SUV.nii", nib.Nifti1Image), ("SUV.nii.gz", nib.Nifti2Image)]
)
def test_header_codes_and_formats_are_kept(tmp_path, codes, name, make):
    pet, scan = l_shaped_study(tmp_path / "in", GRIDS["oblique"], name, make, codes)
    [path] = evaluation.predict(Threshold().eval(), CONFIG, tmp_path / "in", tmp_path / "out", CPU)
    mask = nib.load(path)
    assert type(mask) is make
    assert_opens_over(mask, nib.load(scan))


def test_scaled_integers_and_header_extensions(tmp_path):
    pet, scan = l_shaped_study(tmp_path / "in", GRIDS["LAS"])
    image = nib.Nifti1Image(np.rint(pet * 4).astype(np.int16), GRIDS["LAS"])
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 500))
    image.header.set_slope_inter(0.25, 0)
    image.header["cal_max"] = 30
    data = image.to_bytes()
    scan.with_name("SUV.nii").write_bytes(data)
    scan.unlink()
    [path] = evaluation.predict(Threshold().eval(), CONFIG, tmp_path / "in", tmp_path / "out", CPU)
    mask = nib.load(path)
    assert set(np.unique(mask.get_fdata())) == {0, 1} and mask.header["cal_max"] == 0
    stored = nib.load(scan.with_name("SUV.nii")).get_fdata()
    assert np.array_equal(np.asarray(mask.dataobj), stored > 5)


class Brightness(nn.Module):
    """MRI v1 stand-in: edema where FLAIR is above its mean, core where T1Gd is, more strongly."""

    variant = VARIANTS["mri"]["v1"]

    def forward(self, ct, pet, heads):
        return Output(seg=torch.cat([torch.zeros_like(ct), ct, 2 * pet], dim=1))


def brain(root, folder="imagesTs"):
    """One Decathlon case of four channels; FLAIR is bright in a box, T1Gd in a part of it."""
    image = np.zeros((20, 18, 16, 4), np.float32)
    image[2:18, 2:16, 2:14] = 1
    image[4:10, 4:10, 4:10, 0] = 9
    image[4:7, 4:10, 4:10, 2] = 9
    label = np.zeros((20, 18, 16), np.uint8)
    label[4:10, 4:10, 4:10] = 1
    label[4:7, 4:10, 4:10] = 3
    (root / folder).mkdir(parents=True)
    affine = np.diag((-1.0, -1, 1, 1))
    nib.save(nib.Nifti1Image(image, affine), root / folder / "BRATS_001.nii.gz")
    if folder == "imagesTr":
        (root / "labelsTr").mkdir()
        nib.save(nib.Nifti1Image(label, affine), root / "labelsTr" / "BRATS_001.nii.gz")
    names = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    labels = {
        "0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour",
    }  # fmt: skip
    write_json(root / "dataset.json", {"modality": names, "labels": labels})
    return label


def test_mask_of_a_4d_file_is_3d_and_holds_both_classes(tmp_path):
    label = brain(tmp_path / "in")
    config = replace(CONFIG, kind="mri", version="v1", spacing=(1.0, 1.0, 1.0))
    [path] = evaluation.predict(Brightness().eval(), config, tmp_path / "in", tmp_path / "o", CPU)
    assert_opens_over(nib.load(path), nib.load(tmp_path / "in" / "imagesTs" / "BRATS_001.nii.gz"))
    expected = np.where(label == 3, 2, label)  # 1 edema, 2 core
    assert np.array_equal(np.asarray(nib.load(path).dataobj), expected)


def test_bad_studies_are_reported_after_the_good_ones_are_written(tmp_path, capsys):
    l_shaped_study(tmp_path / "in" / "PETCT_1" / "a", GRIDS["RAS"])
    _, broken = l_shaped_study(tmp_path / "in" / "PETCT_0" / "b", GRIDS["RAS"])
    broken.write_bytes(broken.read_bytes()[:200])
    args = (Threshold().eval(), CONFIG, tmp_path / "in", tmp_path / "out", CPU)
    with pytest.raises(UserError, match="1 studies were predicted:\n.*truncated gzip"):
        evaluation.predict(*args)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["PETCT_1__a.nii.gz"]
    assert len(evaluation.predict(*args, skip_bad=True)) == 1
    assert "truncated gzip" in capsys.readouterr().err


def case_of(folder, label, spacing=(4.0, 4.0, 4.0), grid="permuted"):
    """The study of l_shaped_study with a mask, preprocessed in memory."""
    pet, scan = l_shaped_study(folder, GRIDS[grid])
    path = folder / "SEG.nii.gz"
    nib.save(nib.Nifti1Image(label, GRIDS[grid]), path)
    study = Study("p/s", "p", "petct", Source(folder / "CTres.nii.gz"), Source(scan), path)
    arrays, meta = preprocess(study, replace(PREPROCESSING["petct"], spacing=spacing))
    return Case(meta, arrays=arrays), pet


def test_evaluation_is_on_the_grid_of_the_files(tmp_path):
    """Known Dice, FPV, FNV and MTV in ml at 2 x 3 x 5 mm, and the threshold at SUV 4."""
    label = np.zeros(SHAPE, np.uint8)
    label[5:9, 6:9, 4:20] = 1  # one arm of the L
    label[18:20, 13:15, 22:24] = 1  # missed: cold
    case, pet = case_of(tmp_path / "s", label, spacing=(2.0, 3.0, 5.0))
    [row] = evaluation.evaluate(Threshold().eval(), [case], CONFIG, CPU)
    voxel = 0.03
    hot = int((pet > 5).sum())
    assert row["study"] == "p/s" and row["patient"] == "p" and row["has_lesion"] is True
    for prefix in ("", "suv4_"):  # the lesion has SUV 10: both thresholds mark the same
        assert row[f"{prefix}dice"] == pytest.approx(2 * 4 * 3 * 16 / (hot + 4 * 3 * 16 + 8))
        assert row[f"{prefix}fpv_ml"] == 0
        assert row[f"{prefix}fnv_ml"] == pytest.approx(8 * voxel)
        assert row[f"{prefix}mtv_pred_ml"] == pytest.approx(hot * voxel)
    assert row["mtv_true_ml"] == pytest.approx((4 * 3 * 16 + 8) * voxel)
    [cached] = evaluation.evaluate(Threshold().eval(), [case], CONFIG, CPU, native=False)
    assert cached["dice"] == pytest.approx(row["dice"])
    assert "suv4_dice" not in cached


def test_healthy_study_counts_false_alarms(tmp_path):
    case, pet = case_of(tmp_path / "s", np.zeros(SHAPE, np.uint8))
    [row] = evaluation.evaluate(Threshold().eval(), [case], CONFIG, CPU)
    assert row["has_lesion"] is False and row["dice"] == 0 and row["fnv_ml"] == 0
    assert row["fpv_ml"] == row["mtv_pred_ml"] > 0
    assert row["suv4_fpv_ml"] == pytest.approx((pet >= 4).sum() * 0.03)


# ------------------------------------------------------------------ tables


def study_row(ill, dice, fpv, fnv, pred, true, tumor=0.0):
    own = {"dice": dice, "fpv_ml": fpv, "fnv_ml": fnv, "mtv_pred_ml": pred}
    hot = {f"suv4_{name}": 2 * value for name, value in own.items()}
    return {"has_lesion": ill} | own | hot | {"mtv_true_ml": true, "tumor_score": tumor}


ROWS = [
    study_row(True, 0.2, 1.0, 4.0, 10.0, 8.0, 0.9),
    study_row(True, 0.6, 3.0, 0.0, 20.0, 16.0, 0.4),
    study_row(True, 0.0, 0.0, 5.0, 0.0, 6.0, 0.6),
    study_row(False, 0.0, 8.0, 0.0, 8.0, 0.0, 0.5),  # a false alarm: its Dice of 0 is left out
    study_row(False, math.nan, 0.0, 0.0, 0.0, 0.0, 0.2),
]


def test_means_say_how_many_studies_they_hold():
    summary = evaluation.summarize(ROWS, "petct")
    model = {name: (v["mean"], v["n"]) for name, v in summary["model"].items()}
    assert model == {
        "dice": (pytest.approx(0.8 / 3), 3), "fpv_ml": (pytest.approx(12 / 5), 5),
        "fpv_healthy_ml": (4.0, 2), "fnv_ml": (3.0, 3), "mtv_pred_ml": (10.0, 3),
        "mtv_true_ml": (10.0, 3), "tumor_accuracy": (pytest.approx(0.8), 5),
        "tumor_auc": (pytest.approx(5 / 6), 5),
    }  # fmt: skip
    assert summary["model"]["mtv_pred_ml"]["std"] == pytest.approx(10)
    threshold = summary["SUV ≥ 4 threshold"]
    assert threshold["dice"] == {
        "mean": pytest.approx(1.6 / 3), "n": 3, "std": pytest.approx(np.std([0.4, 1.2, 0], ddof=1)),
    }  # fmt: skip
    assert threshold["fpv_healthy_ml"]["mean"] == 8 and "tumor_auc" not in threshold


def test_one_kind_of_patient_only():
    ill = evaluation.summarize(ROWS[:1], "petct")["model"]
    assert ill["fpv_healthy_ml"] == {"mean": None, "std": None, "n": 0}
    assert ill["dice"] == {"mean": 0.2, "std": None, "n": 1}
    healthy = evaluation.summarize(ROWS[3:], "petct")["model"]
    assert healthy["dice"]["n"] == 0 and healthy["fpv_ml"]["n"] == 2
    json.dumps([ill, healthy], allow_nan=False)


def test_mri_leaves_out_classes_that_nobody_has():
    rows = [
        {"has_lesion": True, "dice_whole": 0.5, "dice_edema": 0.25, "dice_core": math.nan},
        {"has_lesion": True, "dice_whole": 1.0, "dice_edema": 0.75, "dice_core": 0.0},
    ]
    model = evaluation.summarize(rows, "mri")["model"]
    assert [(v["mean"], v["n"]) for v in model.values()] == [(0.75, 2), (0.5, 2), (0.0, 1)]
    assert list(model) == ["dice_whole", "dice_edema", "dice_core"]


@pytest.mark.parametrize(
    "scores, ill, accuracy, auc",
    [
        ([0.9, 0.8, 0.1], [1, 1, 0], 1, 1),
        ([0.1, 0.2, 0.9], [1, 1, 0], 0, 0),
        ([0.7, 0.3, 0.7, 0.3], [1, 1, 0, 0], 0.5, 0.5),
        ([0.6, 0.6, 0.6], [1, 0, 0], 1 / 3, 0.5),  # ties count half
        ([0.9, 0.4, 0.7, 0.1, 0.2], [1, 1, 0, 0, 0], 3 / 5, 5 / 6),
        ([0.9, 0.2], [1, 1], 0.5, None),
        ([0.9, 0.2], [0, 0], 0.5, None),
    ],
)
def test_accuracy_and_auc_by_hand(scores, ill, accuracy, auc):
    result = evaluation.classification(pd.Series(scores), pd.Series(ill, dtype=bool))
    assert result["tumor_accuracy"] == {"mean": pytest.approx(accuracy), "n": len(scores)}
    assert result["tumor_auc"]["mean"] == (auc if auc is None else pytest.approx(auc))


def test_table_shows_means_counts_and_the_rule():
    summary = evaluation.summarize(ROWS, "petct")
    lines = evaluation.results_table(evaluation.rows_of("mine", summary), "petct").splitlines()
    assert lines[0].split("  ")[0] == "" and "healthy FPV ml" in lines[0]
    assert lines[1].startswith("mine") and "0.267 (3)" in lines[1] and "2.400 (5)" in lines[1]
    assert lines[2].startswith("SUV ≥ 4 threshold") and lines[2].rstrip().endswith("-")
    assert len({len(line) for line in lines[:3]}) == 1  # aligned
    assert "studies with a lesion" in lines[3]


# ------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort") / "data"
    write_phantom(root, patients=4, seed=1)
    return root


@pytest.fixture(scope="module")
def runs(cohort):
    """Untrained runs of v1 and v3 as train.py would leave them, tested on three studies."""
    folders = []
    names = sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in cohort.rglob("SUV.nii.gz"))
    for version in ("v1", "v3"):
        config = train.Config(
            version=version, data=str(cohort), cache=str(cohort.parent / "cache"), device="cpu",
            threads=1, workers=0, patch=(32, 32, 32), spacing=(10.0, 10.0, 12.0), amp="none",
        )  # fmt: skip
        config = train.resolve(config, "petct", phantom=False)
        run = cohort.parent / version
        run.mkdir()
        content = {"model": train.build_model(config).state_dict(), "epoch": 7, "val_dice": 0.25}
        train.save_checkpoint(run / "best.pt", content)
        write_json(run / "config.json", {"config": train.plain(config)})
        splits = {"train": names[:2], "val": names[2:3], "test": names[3:]}
        write_json(run / "splits.json", splits)
        folders.append(run)
    return folders


@pytest.fixture(scope="module")
def table(runs):
    """What `python eval.py v1 v3` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluation.run_command([str(run) for run in runs])
    return out.getvalue().splitlines()


def test_table_of_two_runs(table, runs):
    names = [line.split("  ")[0] for line in table[1:4]]
    assert [Path(name).name for name in names] == ["v1", "v3", "SUV ≥ 4 threshold"]
    assert "T accuracy" in table[0] and len(table) == 5
    for run in runs:
        frame = pd.read_csv(run / "evaluation" / "test_studies.csv")
        summary = json.loads((run / "evaluation" / "summary.json").read_text())
        assert sorted(frame["study"]) == json.loads((run / "splits.json").read_text())["test"]
        assert ("tumor_score" in frame) == (run.name == "v3")
        mean = frame.loc[frame["has_lesion"], "dice"].mean()
        assert summary["systems"]["model"]["dice"]["mean"] == pytest.approx(mean)
        assert summary["checkpoint_epoch"] == 7 and summary["part"] == "test"


def test_predictions_of_unlabelled_studies_match_the_evaluation(
    table, runs, cohort, tmp_path, capsys
):
    """--predict writes what the evaluation measured: the same volume for each study."""
    frame = pd.read_csv(runs[0] / "evaluation" / "test_studies.csv").set_index("study")
    for name in frame.index:
        shutil.copytree(cohort / name, tmp_path / "in" / name)
        (tmp_path / "in" / name / "SEG.nii.gz").unlink()
    out = tmp_path / "masks"
    evaluation.run_command(
        [str(runs[0]), "--predict", str(tmp_path / "in"), "--out", str(out), "--device", "cpu"]
    )
    assert capsys.readouterr().out.split("\n")[:-1] == [str(p) for p in sorted(out.iterdir())]
    for name, row in frame.iterrows():
        mask = nib.load(out / f"{name.replace('/', '__')}.nii.gz")
        assert_opens_over(mask, nib.load(cohort / name / "SUV.nii.gz"))
        volume = np.asarray(mask.dataobj).sum() * 0.15
        assert volume == pytest.approx(row["mtv_pred_ml"]) and volume > 0


def test_other_parts_and_folders_leave_the_test_results_alone(table, runs, tmp_path, capsys):
    results = runs[0] / "evaluation" / "test_studies.csv"
    before = results.read_bytes()
    evaluation.run_command([str(runs[0]), "--part", "val", "--out", str(tmp_path)])
    assert {p.name for p in (tmp_path / "v1").iterdir()} == {"val_studies.csv", "val_summary.json"}
    assert results.read_bytes() == before and not (runs[0] / "summary.json").exists()
    assert "v1" in capsys.readouterr().out


def test_a_run_saved_before_an_option_existed_is_still_read(table, runs, tmp_path):
    run = tmp_path / "old"
    shutil.copytree(runs[0], run)
    record = json.loads((run / "config.json").read_text())
    for name in ("optimizer", "overlap", "modality", "recipe"):
        del record["config"][name]
    (run / "config.json").write_text(json.dumps(record))
    assert evaluation.load_run(run, "best", {})[1].overlap == 0.25


def test_moved_data_are_still_tested_on_the_test_part(table, runs, cohort, tmp_path, capsys):
    shutil.copytree(cohort, tmp_path / "moved")
    moved = ["--data", str(tmp_path / "moved"), "--out", str(tmp_path / "out")]
    evaluation.run_command([str(runs[0]), *moved])
    splits = json.loads((runs[0] / "splits.json").read_text())
    frame = pd.read_csv(tmp_path / "out" / "v1" / "test_studies.csv")
    assert sorted(frame["study"]) == splits["test"]
    capsys.readouterr()
    evaluation.run_command([str(runs[0]), *moved, "--part", "all"])
    seen = len(splits["train"]) + len(splits["val"])
    assert f"{seen} of these" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--predict", "{data}"], "--predict takes one run, and --out"),
        (["--data", "{data}/nothing"], "no such folder"),
        (["--data", "{mri}"], "made for PET/CT"),
        (["--predict", "{mri}", "--out", "{mri}/masks"], "the run was trained on PET/CT"),
        (["--overlap", "1"], "--overlap 1.0"),
    ],
)
def test_commands_that_cannot_be_done(runs, cohort, tmp_path, options, message):
    brain(tmp_path / "mri", "imagesTr")
    options = [o.format(data=cohort, mri=tmp_path / "mri") for o in options]
    with pytest.raises(UserError, match=message):
        evaluation.run_command([str(runs[0]), *options])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_damaged_checkpoints_are_named(runs, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    whole = (run / "best.pt").read_bytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not a checkpoint"}
    (run / "best.pt").unlink()
    if damage != "missing":
        (run / "best.pt").write_bytes(content[damage])
    message = "no such checkpoint" if damage == "missing" else "not a readable checkpoint"
    with pytest.raises(UserError, match=f"best.pt: {message}"):
        evaluation.run_command([str(run)])


def test_the_command_ends_with_one_message_and_code_2(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"PK\x03\x04 damaged")
    command = [sys.executable, str(ROOT / "eval.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
