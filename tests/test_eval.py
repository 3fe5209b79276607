"""eval.py: sliding windows, masks on the grid of the files, runs joined to one, the commands."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.signal.windows import gaussian
from scipy.spatial.transform import Rotation

import eval as evaluation
from cache import Case, read_case, write_case
from common import UserError, write_json
from config import Config, resolve, to_dict
from eval import LATE_FUSIONS, Ensemble
from metrics import dice
from mirror_unet import VARIANTS, MirrorUNet, Network, Output
from preprocess import PREPROCESSING, logits_to_native, preprocess
from runs import LoadedRun, build_model, load_run, save_checkpoint, save_config
from studies import Source, Study

CPU = torch.device("cpu")
CONFIG = Config(
    kind="petct",
    patch=(16, 16, 16),
    spacing=(4.0, 4.0, 4.0),
    amp="none",
    device="cpu",
    threads=1,
    workers=0,
    overlap=0.25,
    window_weights="constant",
)
LESION = VARIANTS["petct"]["v1"]


def read_json(path):
    return json.loads(path.read_text())


def opened(model, **options):
    """The model as load_run would return it."""
    return LoadedRun(model, replace(CONFIG, **options), CPU, {})


# ------------------------------------------------------------------ classes and thresholds


EDEMA = [2.0, 3.0, -1.0, -1.0, 0.0]
CORE = [1.0, 4.0, 1.0, -2.0, 0.0]
TWO_CLASSES = np.reshape([EDEMA, CORE], (2, 5, 1, 1))


def network(kind, version):
    model = Network()
    model.variant = VARIANTS[kind][version]
    return model


def digits(mask):
    return "".join(map(str, mask.astype(int).ravel()))


@pytest.mark.parametrize(
    "version, mask",
    [
        ("v2-rec", "12200"),  # of one softmax the larger logit wins
        ("v1", "33200"),  # on branches of their own both may be present
    ],
)
def test_bitmasks_and_labels(version, mask):
    bitmask = evaluation.class_bitmask(TWO_CLASSES, network("mri", version).decide)
    assert digits(bitmask) == mask
    assert digits(evaluation.label_map(TWO_CLASSES)) == "12200"


def test_an_ensemble_joins_the_masks_of_its_members():
    members = [opened(network("petct", "v1"))] * 2
    for join, mask in {"union": "11100", "intersection": "11000"}.items():
        assert digits(Ensemble(members, join).decide(TWO_CLASSES)) == mask
    assert digits(Ensemble(members).decide(TWO_CLASSES[1:])) == "11100"


def test_validation_is_over_lesions_and_classes():
    rows = [
        {"has_lesion": True, "dice": 0.4, "fpv_ml": 9.0},
        {"has_lesion": True, "dice": 0.6, "fpv_ml": 9.0},
        {"has_lesion": False, "dice": 0.0, "fpv_ml": 0.0},
        {"has_lesion": False, "dice": 0.0, "fpv_ml": 3.0},
    ]
    means = evaluation.summarize_validation(rows)
    assert means == {"val_dice": 0.5, "val_fpv_healthy_ml": 1.5}
    assert math.isnan(evaluation.summarize_validation(rows[2:])["val_dice"])
    brain = {"dice_whole": 0.3, "dice_edema": math.nan, "dice_core": 0.9}
    means = evaluation.summarize_validation([{"has_lesion": True, **brain}])
    assert means == {"val_dice": pytest.approx(0.6)}


@pytest.mark.parametrize(
    "positive, negative, threshold",
    [
        ([0.9, 0.8], [0.7, 0.6], 0.75),
        ([0.9, 0.2], [0.1, 0.05], 0.15),
        ([0.9], [0.1], 0.5),
        ([0.9, 0.95], [0.8, 0.97], 0.85),
        ([0.9], [], 0.5),
        ([], [0.9], 0.5),
        ([0.95, 0.7], [0.8, 0.6], 0.65),  # as good as 0.875
    ],
)
def test_the_threshold_of_T_is_chosen_on_the_validation_studies(positive, negative, threshold):
    scores = [(score, True) for score in positive]
    scores += [(score, False) for score in negative]
    assert evaluation.best_threshold(scores) == pytest.approx(threshold)
    rows = [{"tumor_score": threshold}, {"tumor_score": threshold + 0.01}]
    evaluation.add_tumor_calls(rows, threshold)
    assert [row["tumor_called"] for row in rows] == [0, 1]


# ------------------------------------------------------------------ sliding windows


@pytest.mark.parametrize(
    "size, patch, overlap, starts",  # what MONAI 1.6.1's dense_patch_slices gives
    [
        (96, 96, 0.25, [0]),
        (169, 96, 0.25, [0, 72, 73]),
        (200, 96, 0.3, [0, 67, 104]),
        (64, 16, 0.0, [0, 16, 32, 48]),
        (65, 16, 0.0, [0, 16, 32, 48, 49]),
        (18, 16, 0.999, [0, 1, 2]),
    ],
)
def test_window_starts_are_those_of_monai(size, patch, overlap, starts):
    assert evaluation.window_starts(size, patch, overlap) == starts


def slide(run, image, **options):
    """The map that run(windows) makes, over the whole image."""
    config = replace(CONFIG, **options)
    maps = evaluation.sliding_window(lambda windows: {"seg": run(windows)}, image, config, CPU)
    return maps["seg"].numpy()


@pytest.mark.parametrize("shape", [(40, 33, 29), (7, 30, 5), (17, 9, 13)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("weights, error", [("constant", 0), ("gaussian", 1e-5)])
def test_sliding_the_identity_returns_the_image(shape, overlap, weights, error):
    image = np.random.default_rng(0).integers(-99, 99, (2, *shape)).astype(np.float16)
    result = slide(
        lambda windows: windows[:, :1],
        image,
        patch=(16, 8, 12),
        overlap=overlap,
        window_weights=weights,
        window_batch=3,
    )
    assert result.dtype == np.float32
    assert np.allclose(result, image[:1], rtol=error)  # sums of whole numbers are exact


def test_gaussian_weights_fall_to_a_floor():
    x, y, z = [gaussian(side, side / 8) for side in (16, 8, 12)]
    product = np.einsum("i,j,k->ijk", x, y, z)
    weights = evaluation.window_weights((16, 8, 12), "gaussian")
    assert np.allclose(weights, np.maximum(product, 1e-3), rtol=1e-5)


@pytest.mark.parametrize("kind", ["constant", "gaussian"])
def test_windows_are_averaged_by_their_weights(kind):
    """Two windows whose maps rise from 0 to 15 along the first axis, the second 8 voxels on."""
    x = torch.arange(16.0)
    rising = x[:, None, None].expand(2, 1, 16, 8, 8)
    image = np.zeros((2, 24, 8, 8), np.float32)
    result = slide(
        lambda windows: rising,
        image,
        patch=(16, 8, 8),
        overlap=0.5,
        window_weights=kind,
    )
    weight = evaluation.window_weights((16, 8, 8), kind)[:, 4, 4]
    first, second = weight[8:], weight[:8]
    middle = (first * x[8:] + second * x[:8]) / (first + second)
    expected = torch.cat([x[:8], middle, x[8:]])
    assert np.allclose(result[0, :, 4, 4], expected, atol=1e-5)


NOISE = np.random.default_rng(2).uniform(0.5, 1, (2, 32, 32, 32)).astype(np.float16)


@pytest.mark.parametrize("memory", [0, 1, 5, 8])
def test_out_of_memory_takes_fewer_windows(memory):
    batches = []

    def run(windows):
        batches.append(len(windows))
        if len(windows) > memory:
            raise torch.OutOfMemoryError("simulated")
        return windows[:, :1]

    if not memory:
        with pytest.raises(UserError, match=r"no memory for one window of \(16, 16, 16\)"):
            slide(run, NOISE, window_batch=8)
        return
    result = slide(run, NOISE, window_batch=8)
    assert np.allclose(result, NOISE[:1])
    assert batches[0] == 8
    assert set(batches[1:]) == ({1} if memory < 8 else {8, 3})


@pytest.mark.parametrize(
    "modality, channels",
    [
        ("both", [0, 1]),
        ("pet", [1, 1]),
    ],
)
def test_infer_is_the_network_on_each_window(modality, channels):
    """The 8 windows of 16^3 side by side, each on its own."""
    torch.manual_seed(0)
    model = MirrorUNet("v3", channels=(4, 8, 8, 16, 16)).train()
    loaded = opened(model, modality=modality, overlap=0.0)
    maps, tumor = evaluation.infer(loaded, NOISE, heads=("seg", "ct", "tumor"))
    scores = []
    for x, y, z in itertools.product((0, 16), repeat=3):
        box = np.s_[:, x : x + 16, y : y + 16, z : z + 16]
        ct, pet = torch.from_numpy(NOISE[box]).float()[channels, None, None]
        with torch.no_grad():
            output = model(ct, pet)
        background, lesion = output.seg[0].numpy()
        assert np.allclose(maps["seg"][box], lesion - background, atol=1e-5)
        assert np.allclose(maps["ct"][box], output.ct[0], atol=1e-5)  # an image
        scores.append(output.tumor.sigmoid().item())
    assert tumor == pytest.approx(max(scores), abs=1e-6)
    assert evaluation.infer(loaded, NOISE, heads=("tumor",)) == ({}, tumor)
    assert math.isnan(evaluation.infer(loaded, NOISE).tumor)


# ------------------------------------------------------------------ the grid of the files


class Threshold(Network):
    """Segments what has more than SUV 5, so that the right mask is known; its CT branch nothing."""

    variant = LESION

    def forward(self, ct, pet, heads):
        assert not self.training
        background = torch.zeros_like(pet)
        foreground = {"seg": 15 * pet - 5, "ct": pet - 2}
        output = {}
        for head in heads:
            output[head] = torch.cat([background, foreground[head]], dim=1)
        return Output(**output)


class Brightness(Network):
    """MRI v1 stand-in: edema where FLAIR is above its mean, core where T1Gd is, more strongly."""

    variant = VARIANTS["mri"]["v1"]

    def forward(self, ct, pet, heads):
        background = torch.zeros_like(ct)
        return Output(seg=torch.cat([background, ct, 2 * pet], dim=1))


def turned(degrees, spacing, order=(0, 1, 2), signs=(1, 1, 1)):
    """An affine with rotated, permuted or flipped axes; spacing along the anatomical axes."""
    rotation = Rotation.from_euler("ZX", (degrees, degrees / 2), degrees=True).as_matrix()
    scale = np.diag(np.multiply(spacing, signs))
    return nib.affines.from_matvec(rotation @ scale[:, order], (-61.5, 40.25, -700))


NIFTI_1, NIFTI_2 = nib.Nifti1Image, nib.Nifti2Image
GRIDS = {  # affine, codes of qform and sform, PET file, its class
    "RAS": (
        turned(0, (4, 4, 4)),
        (1, 1),
        "SUV.nii.gz",
        NIFTI_1,
    ),
    "oblique": (
        turned(25, (3, 3, 5), signs=(-1, -1, 1)),
        (1, 0),
        "SUV.nii",
        NIFTI_1,
    ),
    "permuted": (
        turned(0, (2, 3, 5), order=(2, 0, 1), signs=(1, -1, -1)),
        (1, 4),
        "SUV.nii",
        NIFTI_2,
    ),
    "cyclic": (
        turned(15, (2, 3, 5), order=(1, 2, 0), signs=(-1, 1, -1)),
        (0, 2),
        "SUV.nii.gz",
        NIFTI_2,
    ),
}
SHAPE = (22, 17, 28)


def l_shaped_study(folder, grid):
    """A body of SUV 0.5 in air with a lesion that no flip or turn maps to itself; PET, its file."""
    affine, (qform, sform), name, make = GRIDS[grid]
    pet = np.zeros(SHAPE, np.float32)
    pet[3:21, 4:16, 2:25] = 0.5
    pet[5:16, 6:9, 4:8] = 10
    pet[5:9, 6:14, 4:8] = 10
    pet[5:9, 6:9, 4:20] = 10
    image = make(pet, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 30  # a range of display
    folder.mkdir(parents=True)
    nib.save(image, folder / name)
    ct = np.where(pet > 0, 40, -1000).astype(np.int16)
    nib.save(NIFTI_1(ct, affine), folder / "CTres.nii.gz")
    return pet, folder / name


def predict(tmp_path, scan, model=None, **options):
    """The mask that is predicted for tmp_path/in, and its path. It must have the grid of `scan` in
    every field of the header that a viewer may use."""
    loaded = opened(model or Threshold(), **options)
    [path] = evaluation.predict(loaded, tmp_path / "in", tmp_path / "out", overwrite=True)
    image, scan = nib.load(path), nib.load(scan)
    assert type(image) is type(scan)
    mask, scan = image.header, scan.header
    assert mask.get_data_shape() == scan.get_data_shape()[:3]
    assert mask.get_data_dtype() == np.uint8
    assert np.array_equal(mask.get_best_affine(), scan.get_best_affine())
    assert np.array_equal(mask["pixdim"][:4], scan["pixdim"][:4])
    assert mask["cal_max"] == 0
    for field in ("qform_code", "sform_code", "quatern_b", "srow_y", "xyzt_units"):
        assert np.array_equal(mask[field], scan[field])
    return np.asarray(image.dataobj), path


@pytest.mark.parametrize("grid", GRIDS)
def test_prediction_lies_on_the_voxels_of_the_scan(tmp_path, grid):
    pet, scan = l_shaped_study(tmp_path / "in" / "PETCT_1" / "a", grid)
    affine = GRIDS[grid][0]
    axes = np.abs(nib.io_orientation(affine)[:, 0]).astype(int)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(axes)]  # along L, A, S
    mask, path = predict(tmp_path, scan, spacing=tuple(lengths))
    assert path == tmp_path / "out" / "PETCT_1__a.nii.gz"
    assert np.array_equal(mask, pet > 5)
    resampled, _ = predict(tmp_path, scan, spacing=(3.7, 2.9, 4.1))
    assert dice(resampled, pet > 5) > 0.8


def test_mask_of_a_4d_file_is_3d_and_holds_both_classes(msd, tmp_path):
    """FLAIR is bright in a box, T1Gd in a part of it."""
    images = msd(1, root=tmp_path / "in") / "imagesTr"
    scan = images.rename(images.with_name("imagesTs")) / "BRATS_001.nii.gz"
    image = np.zeros((20, 18, 16, 4), np.float32)
    image[2:18, 2:16, 2:14] = 1
    flair, t1gd = image[..., 0], image[..., 2]
    flair[4:10, 4:10, 4:10] = 9
    t1gd[4:7, 4:10, 4:10] = 9
    nib.save(NIFTI_1(image, np.diag((-1.0, -1, 1, 1))), scan)
    mask, _ = predict(tmp_path, scan, Brightness(), kind="mri", spacing=(1.0, 1.0, 1.0))
    assert np.array_equal(mask, np.where(t1gd == 9, 2, flair == 9))


def test_bad_studies_are_reported_after_the_good_ones_are_written(tmp_path, capsys):
    l_shaped_study(tmp_path / "in" / "PETCT_1" / "a", "RAS")
    _, broken = l_shaped_study(tmp_path / "in" / "PETCT_0" / "b", "RAS")
    broken.write_bytes(broken.read_bytes()[:200])
    strict, lenient = opened(Threshold()), opened(Threshold(), skip_bad=True)
    places = tmp_path / "in", tmp_path / "out"
    report = "1 studies were predicted; 1 problems .*\n.*b/SUV.nii.gz: cannot be"
    with pytest.raises(UserError, match=report):
        evaluation.predict(strict, *places)
    assert [path.name for path in places[1].iterdir()] == ["PETCT_1__a.nii.gz"]
    with pytest.raises(UserError, match="PETCT_1__a.nii.gz: exists already.* Add --overwrite"):
        evaluation.predict(lenient, *places)
    assert len(evaluation.predict(lenient, *places, overwrite=True)) == 1
    assert "b/SUV.nii.gz: cannot be" in capsys.readouterr().err


def case_of(folder, label):
    """The study of l_shaped_study with a mask, preprocessed at its own 2 x 3 x 5 mm; its PET."""
    pet, scan = l_shaped_study(folder, "permuted")
    path = folder / "SEG.nii.gz"
    nib.save(NIFTI_1(label, GRIDS["permuted"][0]), path)
    study = Study("p/s", "p", "petct", Source(folder / "CTres.nii.gz"), Source(scan), path)
    settings = replace(PREPROCESSING["petct"], spacing=(2.0, 3.0, 5.0))
    assert not write_case(study, lambda: preprocess(study, settings), folder / "cached")
    return read_case(folder / "cached", study), pet


def test_evaluation_is_on_the_grid_of_the_files(tmp_path):
    """Known Dice, FPV, FNV and MTV in ml, and the threshold at SUV 4, with and without lesions."""
    label = np.zeros(SHAPE, np.uint8)
    negative, pet = case_of(tmp_path / "negative", label)
    label[5:9, 6:9, 4:20] = 1  # one arm of the L, 192 voxels
    label[18:20, 13:15, 22:24] = 1  # missed: cold
    positive, _ = case_of(tmp_path / "positive", label)
    model = Threshold()
    model.scored_branches = ("ct",)
    loaded = opened(model)
    row, alarm = evaluation.evaluate(loaded, [positive, negative])
    assert (row["study"], row["patient"], row["has_lesion"]) == ("p/s", "p", True)
    hot = int((pet > 5).sum())
    hot_ml = pytest.approx(hot * 0.03)
    for prefix in ("", "suv4_", "suv2.5_"):  # the lesion has SUV 10: all thresholds mark the same
        assert row[f"{prefix}dice"] == pytest.approx(2 * 192 / (hot + 200))
        assert row[f"{prefix}fpv_ml"] == alarm[f"{prefix}fnv_ml"] == alarm[f"{prefix}dice"] == 0
        assert row[f"{prefix}fnv_ml"] == pytest.approx(8 * 0.03)
        assert row[f"{prefix}mtv_pred_ml"] == alarm[f"{prefix}fpv_ml"] == hot_ml
    assert row["mtv_true_ml"] == row["ct_fnv_ml"] == pytest.approx(200 * 0.03)
    assert row["ct_dice"] == row["ct_mtv_pred_ml"] == 0
    assert "ct_mtv_true_ml" not in row
    [cached] = evaluation.evaluate(loaded, [positive], native=False)
    assert cached["dice"] == pytest.approx(row["dice"])
    assert {"suv4_dice", "ct_dice"}.isdisjoint(cached)


# ------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def others(tmp_path_factory, base, finished):
    """Untrained runs of v1, ct and pet on the data and splits of the finished one."""
    root = tmp_path_factory.mktemp("others")
    for seed, version in enumerate(("v1", "ct", "pet")):
        config = replace(base, version=version, seed=seed)
        if version != "v1":
            config = replace(config, widths=Config().widths, phi=None)
        config = resolve(config, "petct")
        content = {"epoch": 7, "val_dice": 0.25}
        content["model"] = build_model(config).state_dict()
        content["config"] = to_dict(config, weights_only=True)
        (root / version).mkdir()
        save_checkpoint(root / version / "best.pt", content)
        save_config(root / version, config, "cpu")
        shutil.copy(finished[0] / "splits.json", root / version)
    return root


def evaluate(*words):
    evaluation.eval_command([str(word) for word in words])


def read_studies(folder):
    return pd.read_csv(folder / "test_studies.csv", index_col="study")


def change_config(run, **values):
    """Change the options of a run, in its record and in its checkpoint."""
    record = read_json(run / "config.json")
    record["config"].update(values)
    write_json(run / "config.json", record)
    checkpoint = torch.load(run / "best.pt")
    checkpoint["config"].update(values)
    torch.save(checkpoint, run / "best.pt")


def test_table_of_two_runs(others, finished, tmp_path, capsys):
    """The finished run has the results that it had, an untrained one others."""
    run = finished[0]
    evaluate(run, others / "v1", "--out", tmp_path)
    table = capsys.readouterr().out.splitlines()
    heading = re.split("  +", table[0].strip())
    thresholds = ["SUV ≥ 4 threshold", "SUV ≥ 2.5 threshold"]
    assert heading == [str(run), str(others / "v1"), *thresholds]
    assert "T accuracy" in table[8] and len(table) == 12
    results = (tmp_path / run.name / "test_studies.csv").read_bytes()
    assert results == (run / "test_studies.csv").read_bytes()
    assert b"tumor_score" in results

    frame = read_studies(tmp_path / "v1")
    assert sorted(frame.index) == read_json(run / "splits.json")["test"]
    assert "tumor_score" not in frame
    summary = read_json(tmp_path / "v1" / "summary.json")
    facts = [summary[name] for name in ("checkpoint_epoch", "part", "val_dice", "rule")]
    assert facts == [7, "test", 0.25, table[-1]]
    mean = frame.loc[frame["has_lesion"], "dice"].mean()
    assert summary["systems"]["model"]["dice"]["mean"] == pytest.approx(mean)


def test_an_ensemble_averages_the_logits(base, cases, others, finished, tmp_path, capsys):
    """Of two networks with other windows: the mask of the mean of both, and its scores."""
    runs = [finished[0], shutil.copytree(others / "v1", tmp_path / "v1")]
    change_config(runs[1], patch=[32, 32, 32])
    name = read_json(runs[0] / "splits.json")["test"][0]
    case = next(case for case in cases if case.name == name)
    foregrounds = []
    for run in runs:
        loaded = load_run(run, "best", {})
        foregrounds.append(evaluation.infer(loaded, case.load("images")).maps["seg"])
    mask = logits_to_native(case.meta, sum(foregrounds) / 2, evaluation.label_map)

    shutil.copytree(Path(base.data, name), tmp_path / "in" / name)
    evaluate(*runs, "--predict", tmp_path / "in", "--out", tmp_path / "masks")
    [path] = (tmp_path / "masks").iterdir()
    assert np.array_equal(np.asarray(nib.load(path).dataobj), mask)
    evaluate(*runs, "--ensemble", "--out", tmp_path / "both")
    row = read_studies(tmp_path / "both").loc[name]
    assert row["mtv_pred_ml"] == pytest.approx(mask.sum() * 0.15)
    assert "tumor_score" not in row
    assert str(tmp_path / "both") in capsys.readouterr().out


def test_an_ensemble_has_not_seen_its_test_studies(base, others, finished, tmp_path, capsys):
    runs = [finished[0], shutil.copytree(others / "v1", tmp_path / "v1")]
    name = read_json(runs[0] / "splits.json")["test"][0]
    write_json(runs[1] / "splits.json", {"train": [name], "val": ["b"], "test": ["c"]})
    words = (*runs, "--ensemble", "--out", tmp_path / "both")
    with pytest.raises(UserError, match="in splits"):
        evaluate(*words)
    evaluate(*words, "--data", base.data)
    assert f"{runs[1]}: 1 of these" in capsys.readouterr().err  # not of the first run alone


def test_other_parts_and_moved_data(base, cases, finished, tmp_path, capsys):
    run = finished[0]
    results = tmp_path / run.name
    evaluate(run, "--part", "val", "--out", tmp_path)
    assert {path.name for path in results.iterdir()} == {"val_studies.csv", "val_summary.json"}
    shutil.copytree(base.data, tmp_path / "moved")
    moved = ("--data", tmp_path / "moved", "--cache", tmp_path / "cache", "--out", tmp_path)
    evaluate(run, *moved)  # still the test part
    test = read_json(run / "splits.json")["test"]
    assert sorted(read_studies(results).index) == test
    capsys.readouterr()
    evaluate(run, *moved, "--part", "all")
    assert "6 of these 9 studies trained or selected it" in capsys.readouterr().err

    new = [Case(replace(cases[0].meta, name="new"), None)]
    part, chosen = evaluation.choose_cases(run, None, {"data": "x"}, new)
    assert part == "all" and chosen == new  # it has seen none of these
    with pytest.raises(UserError, match="3 studies of its test part are not in the data"):
        evaluation.choose_cases(run, "test", {"data": "x"}, new)


def test_late_fusion_is_what_its_name_says(others, tmp_path, capsys):
    """Of two sets of voxels, the union and the intersection together are as large as the two."""
    runs = ct, pet = others / "ct", others / "pet"
    evaluate(ct, pet, "--out", tmp_path)
    folders = [tmp_path / "ct", tmp_path / "pet"]
    for join in LATE_FUSIONS:
        capsys.readouterr()
        evaluate(ct, pet, "--late-fusion", join)
        folder = others / f"late_fusion_{join}"
        folders.append(folder)
        assert capsys.readouterr().out.split()[0] == str(folder)
        record = read_json(folder / "config.json")
        assert record["late_fusion"] == join
        assert record["runs"] == [*map(str, runs)]
        assert record["config"]["version"] == "ct"
        assert (folder / "splits.json").exists()
    ml = [read_studies(folder)["mtv_pred_ml"] for folder in folders]
    ct, pet, logits, union, intersection = ml
    assert np.allclose(union + intersection, ct + pet)
    assert (intersection < np.minimum(logits, pet)).all()
    assert (union > np.maximum(logits, pet)).all()


DIFFERENT = {"overlap": 0.5, "patch": [32, 32, 32], "ct": "other"}


@pytest.mark.parametrize("name, value", DIFFERENT.items())
def test_late_fusion_refuses_runs_that_differ(others, tmp_path, name, value):
    other = shutil.copytree(others / "pet", tmp_path / "pet")
    words = (others / "ct", other, "--late-fusion", "union", "--out", tmp_path / "out")
    write_json(other / "splits.json", {"train": [], "val": [], "test": []})
    with pytest.raises(UserError, match="pet: differs from .* in splits"):
        evaluate(*words)
    change_config(other, **{name: value})
    with pytest.raises(UserError, match=f"pet: differs from .* in {name}"):
        evaluate(*words)
    assert not (tmp_path / "out").exists()
