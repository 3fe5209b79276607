"""eval.py: metrics, sliding windows, masks on the grid of the files, and the commands."""

import itertools
import json
import math
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

import eval as evaluation
from baselines import LATE_FUSIONS
from cache import Case
from config import Config, resolve
from files import UserError, write_json
from mirror_unet import VARIANTS, MirrorUNet, Network, Output
from preprocess import PREPROCESSING, preprocess
from runs import build_model, save_checkpoint, save_config
from studies import Source, Study

# ------------------------------------------------------------------ metrics


def blocks(*boxes):
    """A mask of 12^3 with boxes, each (first voxel, side)."""
    mask = np.zeros((12, 12, 12), np.uint8)
    for (x, y, z), side in boxes:
        mask[x : x + side, y : y + side, z : z + side] = 1
    return mask


CUBE, FAR, DOT = ((2, 2, 2), 3), ((9, 9, 9), 2), ((5, 5, 5), 1)


@pytest.mark.parametrize(
    "truth, pred, dice, fpv, fnv",
    [
        ([CUBE], [], 0, 0, 0.324),
        ([], [FAR], 0, 0.096, 0),
        ([CUBE], [((4, 2, 2), 3), FAR], 18 / 62, 0.096, 0),
        ([CUBE, FAR], [((3, 3, 3), 1)], 2 / 36, 0, 0.096),
        ([DOT], [DOT, ((6, 6, 5), 1)], 2 / 3, 0, 0),
        ([DOT], [DOT, ((6, 6, 6), 1)], 2 / 3, 0.012, 0),
        ([], [], math.nan, 0, 0),
    ],
)
def test_worked_values_of_the_challenge(truth, pred, dice, fpv, fnv):
    truth, spacing = 2 * blocks(*truth), (2, 2, 3)
    pred = -blocks(*pred).cumsum(axis=0, dtype=float) * blocks(*pred)  # any value but 0
    assert evaluation.dice(pred, truth) == pytest.approx(dice, nan_ok=True)
    assert evaluation.false_positive_volume(pred, truth, spacing) == pytest.approx(fpv)
    assert evaluation.false_negative_volume(pred, truth, spacing) == pytest.approx(fnv)


def test_lesions_are_counted_by_their_components():
    """Of three lesions, two touching in a corner only, one is found by two parts of the mask; one
    part is false."""
    truth, pred = np.zeros((2, 12, 12, 12), np.uint8)
    truth[1:3, 1:3, 1:3] = truth[3:5, 3:5, 3:5] = truth[8, 1:9, 8] = 1
    pred[8, 1, 8] = pred[8, 6, 8] = pred[0, 11, 11] = 1
    row = evaluation.score(pred, truth, ("lesion",), (1, 1, 1))
    counts = {name: row[f"lesions_{name}"] for name in ("found", "missed", "false")}
    assert counts == {"found": 1, "missed": 2, "false": 1}
    assert row["lesion_f1"] == pytest.approx(2 / 5)
    assert math.isnan(evaluation.score(0 * pred, 0 * truth, ("lesion",), (1, 1, 1))["lesion_f1"])
    assert evaluation.score(0 * pred, truth, ("lesion",), (1, 1, 1))["lesion_f1"] == 0


def test_masks_on_other_grids_are_refused():
    cube = np.ones((4, 4, 4))
    for shape in ((4, 4, 1), (4, 4), (4, 4, 5)):
        with pytest.raises(ValueError, match="different grids"):
            evaluation.dice(np.ones(shape), cube)
    with pytest.raises(ValueError, match="different grids"):
        evaluation.false_positive_volume(np.ones((4, 4, 1)), cube, (1, 1, 1))
    with pytest.raises(ValueError, match="one number per axis"):
        evaluation.false_negative_volume(cube, cube, (1, 1, 1, 1))


def test_bits_and_labels():
    """Own branches (MRI v1): both classes may be present, a label map takes the likelier. Of one
    softmax, the argmax."""
    margin = np.array([[2.0, 3.0, -1.0, -1.0, 0.0], [1.0, 4.0, 1.0, -2.0, 0.0]])[:, :, None, None]
    assert evaluation.bits(margin, VARIANTS["mri"]["v1"]).ravel().tolist() == [3, 3, 2, 0, 0]
    assert evaluation.label_map(margin).ravel().tolist() == [1, 2, 2, 0, 0]
    logits = np.random.default_rng(0).normal(size=(3, 5, 6, 7))
    margin, labels = logits[1:] - logits[:1], logits.argmax(0)  # bits 1, 2 are the numbers 1, 2
    assert (evaluation.bits(margin, VARIANTS["mri"]["v2-rec"]) == labels).all()
    assert (evaluation.label_map(margin) == labels).all()


def test_score_names_every_class_of_several():
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
    assert [*evaluation.named_masks(pred, ("edema", "other"))] == ["edema", "other"]


def test_validation_is_over_ill_studies_and_classes_and_over_empty_masks_of_healthy_ones():
    lesion = [(True, 0.4, 2), (False, 0.0, 3), (True, 0.6, 1), (False, math.nan, 0)]
    rows = [
        {"has_lesion": ill, "dice": dice, "mtv_pred_ml": ml, "fpv_ml": ml}
        for ill, dice, ml in lesion
    ]
    found = evaluation.validation(rows)
    assert found == {"val_dice": 0.5, "val_healthy": 2 / 4, "val_fpv_healthy_ml": 1.5}
    brain = {"has_lesion": True, "dice_whole": 0.3, "dice_edema": math.nan, "dice_core": 0.9}
    assert evaluation.validation([brain]) == {"val_dice": pytest.approx(0.6), "val_healthy": 0.6}
    found = evaluation.validation(rows[1:2])
    assert math.isnan(found["val_dice"]) and found["val_healthy"] == 0


@pytest.mark.parametrize(
    "ill, healthy, place",
    [
        ([0.9, 0.8], [0.7, 0.6], 0.75), ([0.9, 0.2], [0.1, 0.05], 0.15), ([0.9], [0.1], 0.5),
        ([0.9, 0.95], [0.8, 0.97], 0.85), ([0.9], [], 0.5), ([], [0.9], 0.5),
        ([0.95, 0.7], [0.8, 0.6], 0.65),  # as good as 0.875
    ],
)  # fmt: skip
def test_the_threshold_of_T_parts_the_validation_studies(ill, healthy, place):
    scores = [(s, True) for s in ill] + [(s, False) for s in healthy]
    assert evaluation.best_threshold(scores) == pytest.approx(place)
    rows = [{"tumor_score": s} for s in (place, place + 0.01)]
    evaluation.call_tumors(rows, place)
    assert [row["tumor_called"] for row in rows] == [0, 1]


# ------------------------------------------------------------------ sliding windows


@pytest.mark.parametrize(
    "size, patch, overlap, starts",  # what MONAI 1.6.1's dense_patch_slices gives
    [
        (96, 96, 0.25, [0]), (100, 96, 0.25, [0, 4]), (169, 96, 0.25, [0, 72, 73]),
        (200, 96, 0.3, [0, 67, 104]), (20, 10, 0.7, [0, 3, 6, 9, 10]),
        (64, 16, 0.0, [0, 16, 32, 48]), (65, 16, 0.0, [0, 16, 32, 48, 49]),
        (120, 80, 0.8, [0, 15, 30, 40]), (18, 16, 0.999, [0, 1, 2]),
    ],
)  # fmt: skip
def test_window_starts_are_those_of_monai(size, patch, overlap, starts):
    assert evaluation.window_starts(size, patch, overlap) == starts


@pytest.mark.parametrize("shape", [(16, 8, 12), (40, 33, 29), (7, 30, 5), (1, 1, 1), (17, 9, 13)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("batch", [3, 1000])
def test_sliding_the_identity_returns_the_image(shape, overlap, batch):
    image = np.random.default_rng(0).integers(-99, 99, (2, *shape)).astype(np.float16)
    for weights in ("constant", "gaussian"):
        result, best = evaluation.sliding_window(
            lambda windows: (windows[:, :1], None), image, (16, 8, 12), overlap, weights, batch
        )
        assert result.dtype == torch.float32 and math.isnan(best)
        # sums of whole numbers are exact
        assert np.allclose(result.numpy(), image[:1], rtol=0 if weights == "constant" else 1e-5)


@pytest.mark.parametrize("kind", ["constant", "gaussian"])
def test_windows_are_averaged_by_their_weights(kind):
    """Two windows whose maps rise from 0 to 15 along the first axis, the second 8 voxels on."""
    x, image = torch.arange(16.0), np.zeros((2, 24, 8, 12), np.float32)
    maps = x[:, None, None].expand(2, 1, 16, 8, 12)
    found, _ = evaluation.sliding_window(lambda w: (maps, None), image, (16, 8, 12), 0.5, kind)
    weight = evaluation.window_weights((16, 8, 12), kind)
    w = weight[:, 4, 6]
    middle = (w[8:] * x[8:] + w[:8] * x[:8]) / (w[8:] + w[:8])
    assert torch.allclose(found[0, :, 4, 6], torch.cat([x[:8], middle, x[8:]]), atol=1e-5)
    sides = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in (16, 8, 12)]
    expected = np.maximum(np.einsum("i,j,k->ijk", *sides), 1e-3) if kind == "gaussian" else 1
    assert np.allclose(weight, expected, rtol=1e-5)


NOISE = np.random.default_rng(2).uniform(0.5, 1, (2, 32, 32, 32)).astype(np.float16)


@pytest.mark.parametrize("memory", [0, 1, 5, 8])
def test_out_of_memory_takes_fewer_windows(memory):
    batches = []

    def run(windows):
        batches.append(len(windows))
        if len(windows) > memory:
            raise torch.OutOfMemoryError("simulated")
        return windows[:, :1], windows[:, 1].amax((1, 2, 3))

    args = run, NOISE, (16, 16, 16), 0.25, "constant", 8
    if not memory:
        with pytest.raises(UserError, match=r"no memory for one window of \(16, 16, 16\)"):
            evaluation.sliding_window(*args)
        return
    found, best = evaluation.sliding_window(*args)
    assert np.allclose(found, NOISE[:1]) and best == NOISE[1].max()
    assert batches[0] == 8 and set(batches[1:]) == ({1} if memory < 8 else {8, 3})


CONFIG = replace(
    Config(), kind="petct", patch=(16, 16, 16), spacing=(4.0, 4.0, 4.0), amp="none",
    device="cpu", threads=1, workers=0, overlap=0.25, window_weights="constant",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "version, heads, modality, seen",
    [
        ("v4", ("ct",), "both", (0, 1)), ("v3", ("seg", "tumor"), "both", (0, 1)),
        ("v3", ("seg", "tumor"), "ct", (0, 0)), ("v3", ("seg", "tumor"), "pet", (1, 1)),
    ],
)  # fmt: skip
def test_infer_is_the_network_on_each_window(version, heads, modality, seen):
    """The 8 windows of 16^3 side by side, each on its own."""
    torch.manual_seed(0)
    model = MirrorUNet(version, channels=(4, 8, 8, 16, 16)).train()
    config, scores = replace(CONFIG, modality=modality, overlap=0.0), []
    margin, tumor = evaluation.infer(model, NOISE, config, CPU, heads)
    for corner in itertools.product((0, 16), repeat=3):
        box = tuple(slice(c, c + 16) for c in corner)
        images = [torch.from_numpy(NOISE[i][box])[None, None].float() for i in seen]
        with torch.no_grad():
            out = model(*images)
        logits = getattr(out, heads[0])[0].numpy()
        assert np.allclose(margin[(slice(None), *box)], logits[1:] - logits[:1], atol=1e-5)
        scores.append(out.tumor.sigmoid().item() if "tumor" in heads else math.nan)
    assert tumor == pytest.approx(max(scores), abs=1e-6, nan_ok=True)


# ------------------------------------------------------------------ the grid of the files


class Threshold(Network):
    """Segments what has more than SUV 5, so that the right mask is known; its CT branch nothing."""

    variant = VARIANTS["petct"]["v1"]

    def forward(self, ct, pet, heads):
        assert not self.training
        maps = {"seg": 15 * pet - 5, "ct": pet - 2}
        return Output(**{h: torch.cat([torch.zeros_like(pet), maps[h]], dim=1) for h in heads})


class Brightness(Network):
    """MRI v1 stand-in: edema where FLAIR is above its mean, core where T1Gd is, more strongly."""

    def forward(self, ct, pet, heads):
        return Output(seg=torch.cat([torch.zeros_like(ct), ct, 2 * pet], dim=1))


def turned(degrees, spacing, order=(0, 1, 2), signs=(1, 1, 1)):
    """An affine with rotated, permuted or flipped axes; spacing along the anatomical axes."""
    rotation = Rotation.from_euler("ZX", (degrees, degrees / 2), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(np.multiply(spacing, signs))[:, order]
    affine[:3, 3] = (-61.5, 40.25, -700)
    return affine


def scaled(pet, affine):
    """Stored as integers with a slope, a range of display and an extension of the header."""
    image = nib.Nifti1Image(np.rint(pet * 4).astype(np.int16), affine)
    image.header.set_slope_inter(0.25, 0)
    image.header["cal_max"] = 30
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 500))
    return image


GRIDS = {  # affine, codes of qform and sform, PET file
    "RAS": (turned(0, (4, 4, 4)), (1, 1), "SUV.nii.gz", nib.Nifti1Image),
    "LAS": (turned(0, (4, 4, 4), signs=(-1, 1, 1)), (0, 2), "SUV.nii.gz", nib.Nifti2Image),
    "oblique": (turned(25, (3, 3, 5), signs=(-1, -1, 1)), (1, 0), "SUV.nii", nib.Nifti1Image),
    "permuted": (
        turned(0, (2, 3, 5), order=(2, 0, 1), signs=(1, -1, -1)), (1, 4), "SUV.nii", nib.Nifti2Image
    ),
    "cyclic": (
        turned(15, (2, 3, 5), order=(1, 2, 0), signs=(-1, 1, -1)), (1, 1), "SUV.nii.gz", scaled
    ),
}  # fmt: skip
SHAPE = (22, 17, 28)


def l_shaped_study(folder, grid):
    """A body of SUV 0.5 in air with a lesion that no flip or turn maps to itself; PET, its file."""
    affine, (qform, sform), name, make = GRIDS[grid]
    pet = np.zeros(SHAPE, np.float32)
    pet[3:21, 4:16, 2:25] = 0.5
    pet[5:16, 6:9, 4:8] = pet[5:9, 6:14, 4:8] = pet[5:9, 6:9, 4:20] = 10
    image = make(pet, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    image.header.set_xyzt_units("mm", "sec")
    folder.mkdir(parents=True)
    nib.save(image, folder / name)
    ct = np.where(pet > 0, 40, -1000).astype(np.int16)
    nib.save(nib.Nifti1Image(ct, affine), folder / "CTres.nii.gz")
    return pet, folder / name


def predict(tmp_path, scan, model=None, **options):
    """The mask that is predicted for tmp_path/in, and its path. It must have the grid of `scan` in
    every field of the header that a viewer may use."""
    args = (model or Threshold()).eval(), replace(CONFIG, **options), tmp_path / "in"
    [path] = evaluation.predict(*args, tmp_path / "out", CPU, overwrite=True)
    image, scan = nib.load(path), nib.load(scan)
    assert type(image) is type(scan)
    mask, scan = image.header, scan.header
    assert mask.get_data_shape() == scan.get_data_shape()[:3]
    assert mask.get_data_dtype() == np.uint8 and mask.get_slope_inter() in ((1, 0), (None, None))
    assert np.array_equal(mask.get_best_affine(), scan.get_best_affine())
    assert mask.get_zooms() == scan.get_zooms()[:3] and mask["cal_max"] == 0
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_y", "xyzt_units"):
        assert np.array_equal(mask[field], scan[field])
    assert mask["pixdim"][0] == scan["pixdim"][0]
    return np.asarray(image.dataobj), path


@pytest.mark.parametrize("grid", GRIDS)
def test_prediction_lies_on_the_voxels_of_the_scan(tmp_path, grid):
    pet, scan = l_shaped_study(tmp_path / "in" / "PETCT_1" / "a", grid)
    affine = GRIDS[grid][0]
    turn = np.abs(nib.io_orientation(affine)[:, 0]).astype(int)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(turn)]  # along L, A, S
    mask, path = predict(tmp_path, scan, spacing=tuple(lengths))
    assert path == tmp_path / "out" / "PETCT_1__a.nii.gz" and np.array_equal(mask, pet > 5)
    resampled, _ = predict(tmp_path, scan, spacing=(3.7, 2.9, 4.1))
    assert evaluation.dice(resampled, pet > 5) > 0.8


def test_mask_of_a_4d_file_is_3d_and_holds_both_classes(msd, tmp_path):
    """FLAIR is bright in a box, T1Gd in a part of it."""
    msd(1, root=tmp_path / "in").joinpath("imagesTr").rename(tmp_path / "in" / "imagesTs")
    image = np.zeros((20, 18, 16, 4), np.float32)
    image[2:18, 2:16, 2:14] = 1
    image[4:10, 4:10, 4:10, 0] = image[4:7, 4:10, 4:10, 2] = 9
    scan = tmp_path / "in" / "imagesTs" / "BRATS_001.nii.gz"
    nib.save(nib.Nifti1Image(image, np.diag((-1.0, -1, 1, 1))), scan)
    mask, _ = predict(tmp_path, scan, Brightness(), kind="mri", spacing=(1.0, 1.0, 1.0))
    assert np.array_equal(mask, np.where(image[..., 2] == 9, 2, image[..., 0] == 9))


def test_bad_studies_are_reported_after_the_good_ones_are_written(tmp_path, capsys):
    l_shaped_study(tmp_path / "in" / "PETCT_1" / "a", "RAS")
    _, broken = l_shaped_study(tmp_path / "in" / "PETCT_0" / "b", "RAS")
    broken.write_bytes(broken.read_bytes()[:200])
    args = (Threshold().eval(), CONFIG, tmp_path / "in", tmp_path / "out", CPU)
    with pytest.raises(
        UserError, match="1 studies were predicted; 1 problems .*\n.*b/SUV.nii.gz: cannot be"
    ):
        evaluation.predict(*args)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["PETCT_1__a.nii.gz"]
    with pytest.raises(UserError, match="PETCT_1__a.nii.gz: exists already.* Add --overwrite"):
        evaluation.predict(*args, skip_bad=True)
    assert len(evaluation.predict(*args, skip_bad=True, overwrite=True)) == 1
    assert "b/SUV.nii.gz: cannot be" in capsys.readouterr().err


def case_of(folder, label):
    """The study of l_shaped_study with a mask, preprocessed at its own 2 x 3 x 5 mm; its PET."""
    pet, scan = l_shaped_study(folder, "permuted")
    path = folder / "SEG.nii.gz"
    nib.save(nib.Nifti1Image(label, GRIDS["permuted"][0]), path)
    study = Study("p/s", "p", "petct", Source(folder / "CTres.nii.gz"), Source(scan), path)
    arrays, meta = preprocess(study, replace(PREPROCESSING["petct"], spacing=(2.0, 3.0, 5.0)))
    for name, array in arrays.items():
        np.save(folder / name, array)
    meta["arrays"] = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    return Case(meta, folder), pet


def test_evaluation_is_on_the_grid_of_the_files(tmp_path):
    """Known Dice, FPV, FNV and MTV in ml, and the threshold at SUV 4; an ill study, a healthy."""
    label = np.zeros(SHAPE, np.uint8)
    healthy, pet = case_of(tmp_path / "healthy", label)
    label[5:9, 6:9, 4:20] = 1  # one arm of the L, 192 voxels
    label[18:20, 13:15, 22:24] = 1  # missed: cold
    case, _ = case_of(tmp_path / "ill", label)
    model, voxel, hot = Threshold().eval(), 0.03, int((pet > 5).sum())
    model.branches = ("ct",)
    row, alarm = evaluation.evaluate(model, [case, healthy], CONFIG, CPU)
    assert row["study"] == "p/s" and row["patient"] == "p" and row["has_lesion"] is True
    assert alarm["has_lesion"] is False
    for prefix in ("", "suv4_"):  # the lesion has SUV 10: both thresholds mark the same
        assert row[f"{prefix}dice"] == pytest.approx(2 * 192 / (hot + 200))
        assert row[f"{prefix}fpv_ml"] == alarm[f"{prefix}fnv_ml"] == alarm[f"{prefix}dice"] == 0
        assert row[f"{prefix}fnv_ml"] == pytest.approx(8 * voxel)
        assert row[f"{prefix}mtv_pred_ml"] == pytest.approx(hot * voxel)
        assert alarm[f"{prefix}fpv_ml"] == pytest.approx(hot * voxel)
    assert row["mtv_true_ml"] == pytest.approx(200 * voxel) == row["ct_fnv_ml"]
    assert row["ct_dice"] == row["ct_mtv_pred_ml"] == 0 and "ct_mtv_true_ml" not in row
    [cached] = evaluation.evaluate(model, [case], CONFIG, CPU, native=False)
    assert cached["dice"] == pytest.approx(row["dice"])
    assert not {"suv4_dice", "ct_dice"} & {*cached}


# ------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def others(tmp_path_factory, base, finished):
    """Untrained runs of v1, ct and pet on the data and splits of the finished one."""
    root = tmp_path_factory.mktemp("others")
    for i, version in enumerate(("v1", "ct", "pet")):
        own = {} if version == "v1" else {"widths": Config().widths, "phi": None}
        config = replace(base, version=version, seed=i, **own)
        config = resolve(config, "petct", phantom=False)
        content = {"model": build_model(config).state_dict(), "epoch": 7, "val_dice": 0.25}
        (root / version).mkdir()
        save_checkpoint(root / version / "best.pt", content)
        save_config(root / version, config, "cpu")
        shutil.copy(finished[0] / "splits.json", root / version)
    return root


def evaluate(*words):
    evaluation.run_command([str(word) for word in words])


def test_table_of_two_runs(others, finished, tmp_path, capsys):
    """The finished run has the results that it had, an untrained one others."""
    run = finished[0]
    evaluate(run, others / "v1", "--out", tmp_path)
    table = capsys.readouterr().out.splitlines()
    assert re.split("  +", table[0].strip()) == [str(run), str(others / "v1"), "SUV ≥ 4 threshold"]
    assert [line.split("  ")[0] for line in table[1:3]] == ["Dice", "FPV ml"]
    assert "T accuracy" in table[8] and len(table) == 12
    found = (tmp_path / run.name / "test_studies.csv").read_bytes()
    assert found == (run / "test_studies.csv").read_bytes() and b"tumor_score" in found
    frame = pd.read_csv(tmp_path / "v1" / "test_studies.csv")
    summary = json.loads((tmp_path / "v1" / "summary.json").read_text())
    assert sorted(frame["study"]) == json.loads((run / "splits.json").read_text())["test"]
    mean = frame.loc[frame["has_lesion"], "dice"].mean()
    assert summary["systems"]["model"]["dice"]["mean"] == pytest.approx(mean)
    assert (summary["checkpoint_epoch"], summary["part"], summary["val_dice"]) == (7, "test", 0.25)
    assert summary["rule"] == table[-1] and "tumor_score" not in frame


def test_an_ensemble_averages_the_margins(base, cases, others, finished, tmp_path, capsys):
    """Of two networks with other windows: the mask of the mean of both margins, and its scores."""
    patch, runs = (32, 32, 32), [finished[0], tmp_path / "v1"]
    shutil.copytree(others / "v1", runs[1])
    config = json.loads((runs[1] / "config.json").read_text())
    write_json(runs[1] / "config.json", {**config, "config": config["config"] | {"patch": patch}})
    name = json.loads((runs[0] / "splits.json").read_text())["test"][0]
    case = next(case for case in cases if case.name == name)
    opened = [evaluation.load_run(run, "best", {}) for run in runs]
    images = case.load("images")
    one, other = (evaluation.infer(net, images, own, CPU)[0] for net, own, *_ in opened)
    assert not np.allclose(one, other)
    mask = evaluation.to_native(case.meta, (one + other) / 2, evaluation.label_map)
    shutil.copytree(Path(base.data, name), tmp_path / "in" / name)
    evaluate(*runs, "--predict", tmp_path / "in", "--out", tmp_path / "masks")
    [path] = (tmp_path / "masks").iterdir()
    assert np.array_equal(np.asarray(nib.load(path).dataobj), mask)
    evaluate(*runs, "--ensemble", "--out", tmp_path / "both")
    row = pd.read_csv(tmp_path / "both" / "test_studies.csv", index_col="study").loc[name]
    assert row["mtv_pred_ml"] == pytest.approx(mask.sum() * 5 * 5 * 6 / 1000)
    assert "tumor_score" not in row and str(tmp_path / "both") in capsys.readouterr().out
    write_json(runs[1] / "splits.json", {"train": ["a"], "val": ["b"], "test": [name]})
    with pytest.raises(UserError, match="the other runs have other splits"):
        evaluate(*runs, "--ensemble", "--out", tmp_path / "both")
    capsys.readouterr()
    both = ("--ensemble", "--out", tmp_path / "both", "--data", base.data)
    write_json(runs[1] / "splits.json", {"train": [name], "val": ["b"], "test": ["c"]})
    evaluate(*runs, *both)
    assert f"{runs[1]}: 1 of these" in capsys.readouterr().err  # not of the first run alone
    write_json(
        runs[1] / "config.json", config | {"config": config["config"] | {"spacing": [9] * 3}}
    )
    with pytest.raises(UserError, match="its spacing is not that of"):
        evaluate(*runs, "--predict", tmp_path / "in", "--out", tmp_path / "masks")


def test_an_ensemble_refuses_runs_of_other_classes(monkeypatch):
    def opened(run, *_):
        return SimpleNamespace(variant=SimpleNamespace(classes=(run.name,))), Config(), None, None

    monkeypatch.setattr(evaluation, "load_run", opened)
    with pytest.raises(UserError, match="core: its classes is not that of edema"):
        evaluation.open_runs([Path("edema"), Path("core")], "best", {})


def test_predictions_of_unlabelled_studies_match_the_evaluation(base, finished, tmp_path, capsys):
    """--predict writes what the evaluation measured: the same volume."""
    frame = pd.read_csv(finished[0] / "test_studies.csv").set_index("study")
    name, volume = frame["mtv_pred_ml"].idxmax(), frame["mtv_pred_ml"].max()
    shutil.copytree(Path(base.data, name), tmp_path / "in" / name)
    (tmp_path / "in" / name / "SEG.nii.gz").unlink()
    evaluate(finished[0], "--predict", tmp_path / "in", "--out", tmp_path / "masks")
    path = tmp_path / "masks" / f"{name.replace('/', '__')}.nii.gz"
    assert capsys.readouterr().out == f"{path}\n"
    mask = nib.load(path)
    found = np.asarray(mask.dataobj).sum() * np.prod(mask.header.get_zooms()) / 1000
    assert found == pytest.approx(volume, rel=1e-4) and volume > 0


def test_other_parts_and_moved_data(base, finished, tmp_path, capsys):
    run, splits = finished[0], json.loads((finished[0] / "splits.json").read_text())
    evaluate(run, "--part", "val", "--out", tmp_path)
    own = tmp_path / run.name
    assert {path.name for path in own.iterdir()} == {"val_studies.csv", "val_summary.json"}
    shutil.copytree(base.data, tmp_path / "moved")
    moved = ("--data", tmp_path / "moved", "--cache", tmp_path / "cache", "--out", tmp_path)
    evaluate(run, *moved)  # still the test part
    assert sorted(pd.read_csv(own / "test_studies.csv")["study"]) == splits["test"]
    capsys.readouterr()
    evaluate(run, *moved, "--part", "all")
    assert "6 of these 9 studies trained or selected it" in capsys.readouterr().err
    part, chosen = evaluation.choose_cases(run, None, {"data": "x"}, [Case({"name": "new"})])
    assert part == "all" and len(chosen) == 1  # it has seen none of these
    with pytest.raises(UserError, match="3 studies of its test part are not in the data"):
        evaluation.choose_cases(run, "test", {"data": "x"}, chosen)


def test_late_fusion_is_what_its_name_says(others, tmp_path, capsys):
    """Of two sets of voxels, the union and the intersection together are as large as the two."""
    pair = [others / "ct", others / "pet"]
    evaluate(*pair, "--out", tmp_path)
    folders = {run.name: tmp_path / run.name for run in pair}
    for mode in LATE_FUSIONS:
        capsys.readouterr()
        evaluate(*pair, "--late-fusion", mode)
        folder = folders[mode] = others / f"late_fusion_{mode}"
        assert capsys.readouterr().out.splitlines()[0].split()[0] == str(folder)
        record = json.loads((folder / "config.json").read_text())
        assert record["late_fusion"] == mode and record["runs"] == [str(run) for run in pair]
        assert record["config"]["version"] == "ct" and (folder / "splits.json").exists()
    tables = {name: pd.read_csv(path / "test_studies.csv") for name, path in folders.items()}
    ml = pd.DataFrame({name: table["mtv_pred_ml"] for name, table in tables.items()})
    assert np.allclose(ml["union"] + ml["intersection"], ml["ct"] + ml["pet"])
    assert (ml["intersection"] < ml[["ct", "pet", "logits"]].min(axis=1)).all()
    assert (ml["union"] > ml[["ct", "pet", "logits"]].max(axis=1)).all()


@pytest.mark.parametrize(
    "name, value",
    [
        ("overlap", 0.5), ("patch", [32] * 3), ("spacing", [20.0] * 3), ("ct", "other"),
        ("splits", {}),
    ],
)  # fmt: skip
def test_late_fusion_refuses_runs_that_differ(others, tmp_path, name, value):
    other = shutil.copytree(others / "pet", tmp_path / name)
    if name == "splits":
        write_json(other / "splits.json", dict.fromkeys(("train", "val", "test"), []))
    else:
        config = json.loads((other / "config.json").read_text())["config"]
        write_json(other / "config.json", {"config": config | {name: value}})
    with pytest.raises(UserError, match=f"{name}: its {name} is not that of"):
        evaluate(others / "ct", other, "--late-fusion", "union", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--predict", "{data}"], "--predict: give the folder of the masks"),
        (["--with", "phi=none"], "--with goes with --table"),
        (["--ensemble"], "--ensemble goes with"),
        (["--predict", "{data}", "--table", "3"], "choose one"),
        (["--overwrite"], "--overwrite goes with --predict"),
        (["--predict", "{data}", "--out", ""], "'': an empty string is no value"),
        (["--data="], "'--data=': an empty string is no value"),
        (["--table", "3", "--part", "val"], "--part has no effect"),
        (["{pet}", "--table", "3"], "--table takes one folder"),
        (["--late-fusion", "union"], "--late-fusion takes two runs"),
        (["{pet}/../ct", "--late-fusion", "union"], "a run of `ct`, then .* not ct and ct"),
        (["{pet}/../ct", "--out", "x"], "two runs have one name"),
        (["{pet}", "--late-fusion", "union", "--out", "{run}"], "holds a run"),
        (["--out", "{full}"], "holds a run"),
        (["--data", "{data}/nothing"], "no such folder"),
        (["--data", "{mri}"], "made for PET/CT"),
        (["--predict", "{mri}", "--out", "{mri}/masks"], "the run was trained on PET/CT"),
        (["--overlap", "1"], "--overlap 1.0"),
        (["--checkpoint", "last"], "no such checkpoint"),
    ],
)
def test_commands_that_cannot_be_done(
    others, base, finished, msd, tmp_path, monkeypatch, capsys, options, message
):
    """They end with one message and exit code 2."""
    places = {"data": base.data, "mri": msd(1), "run": finished[0], "pet": others / "pet"}
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "metrics.csv").touch()
    words = [option.format(**places, full=tmp_path) for option in options]
    monkeypatch.setattr(sys, "argv", ["eval.py", str(others / "ct"), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(evaluation.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ")
    assert re.search(message, err) and err.count("\n") == 1
