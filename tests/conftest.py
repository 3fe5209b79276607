"""Small studies on disk in each layout, one cohort with a finished run, and runs made by hand."""

import contextlib
import gzip
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import runs
import train
from common import write_json
from config import Config, resolve, to_dict
from phantom import write_phantom

SHAPE = (24, 20, 18)
SPACING = (4.0, 4.0, 5.0)
PETCT_LABELS = {"background": 0, "tumor": 1}
MSD_CHANNELS = ("FLAIR", "T1w", "t1gd", "T2w")
MSD_LABELS = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}


# ------------------------------------------------------------------ images


def petct_arrays(seed, lesion=True, shape=SHAPE):
    """CT (int16), SUV (float32) and SEG (uint8): a noisy ellipsoid in air, axes L, A, S."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1.2, 1.2, n) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    body = x**2 + y**2 + z**2 < 1
    suv = np.where(body, rng.uniform(0.5, 3, shape), 0).astype(np.float32)
    ct = np.where(body, rng.integers(-150, 300, shape), -1000).astype(np.int16)
    seg = np.zeros(shape, np.uint8)
    if lesion:
        center = tuple(slice(n // 2 - 2, n // 2 + 1) for n in shape)
        seg[center] = 1
        suv[center] = 8
    return {"CTres": ct, "SUV": suv, "SEG": seg}


def on_own_grids(arrays, mask="SUV"):
    """petct_arrays as a scanner makes them, with CT finer than SUV: array and affine by stem.

    Each voxel of CT is cut into four. mask: CTres or SUV, whose grid SEG has.
    """
    images = {}
    for stem, array in arrays.items():
        images[stem] = (array, las())
        if stem == "CTres" or (stem, mask) == ("SEG", "CTres"):
            fine = array.repeat(2, axis=0).repeat(2, axis=1)
            images[stem] = (fine, las((2.0, 2.0, 5.0), (31.0, -21.0, -500.0)))
    return images


def mri_arrays(seed, shape=(16, 14, 12)):
    """Channels by name (int16) and label (uint8, 0 to 3): a box of brain, axes R, A, S."""
    rng = np.random.default_rng(seed)
    brain = np.zeros(shape, bool)
    brain[2:-2, 2:-3, 1:-2] = True
    arrays = {}
    for i, name in enumerate(MSD_CHANNELS, start=1):
        values = rng.integers(100 * i, 150 * i, shape)
        arrays[name] = np.where(brain, values, 0).astype(np.int16)

    label = np.zeros(shape, np.uint8)
    label[5:11, 4:9, 3:9] = 1
    label[7:9, 5:8, 4:8] = 2
    label[8, 6, 4:6] = 3
    return {**arrays, "label": label}


def las(spacing=SPACING, origin=(30.0, -20.0, -500.0)):
    """Affine of an image whose indices rise to the patient's left, front and head."""
    affine = np.diag((-spacing[0], spacing[1], spacing[2], 1.0))
    affine[:3, 3] = origin
    return affine


def stored_as(array, affine, axes):
    """An (L, A, S) array and its affine as a file with other `axes`, such as PIR, holds them."""
    order = []
    flips = []
    to_array = np.zeros((4, 4))  # from indices in the file to indices in `array`
    to_array[3, 3] = 1
    for k, axis in enumerate(axes):
        i = next(i for i, pair in enumerate(("LR", "AP", "SI")) if axis in pair)
        flip = axis not in "LAS"
        order.append(i)
        if flip:
            flips.append(k)
        to_array[i, k] = -1 if flip else 1
        to_array[i, 3] = array.shape[i] - 1 if flip else 0
    turned = np.flip(array.transpose(order), tuple(flips))
    return np.ascontiguousarray(turned), affine @ to_array


def write_nifti(path, array, affine, image=nib.Nifti1Image):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = image(array, affine).to_bytes()
    path.write_bytes(gzip.compress(raw, 1, mtime=0) if path.suffix == ".gz" else raw)
    return path


# ------------------------------------------------------------------ layouts


def write_study(folder, arrays, affine=None, end=".nii.gz"):
    """A file per image: the study's folder in the AutoPET tree and in BraTS. arrays: by stem."""
    for stem, array in arrays.items():
        write_nifti(Path(folder) / f"{stem}{end}", array, las() if affine is None else affine)


def write_nnunet(root, cases, channels=("CT", "PET"), labels=PETCT_LABELS, **more_keys):
    """An nnU-Net raw folder. cases: a name each, with the images in the order of `channels` and
    then the mask; more_keys: of dataset.json."""
    for name, (*images, mask) in cases.items():
        for k, image in enumerate(images):
            write_nifti(root / "imagesTr" / f"{name}_{k:04d}.nii.gz", image, las())
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", mask, las())
    content = {
        "channel_names": {str(k): channel for k, channel in enumerate(channels)},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    write_json(root / "dataset.json", {**content, **more_keys})


def write_decathlon(root, cases, channels=MSD_CHANNELS, labels=MSD_LABELS, affine=None):
    """A Decathlon folder with 4D files. cases: a name each, with the arrays of mri_arrays()."""
    affine = np.eye(4) if affine is None else affine
    training = []
    for name, arrays in cases.items():
        stack = np.stack([arrays[channel] for channel in channels], -1)
        image = write_nifti(root / "imagesTr" / f"{name}.nii.gz", stack, affine)
        label = write_nifti(root / "labelsTr" / f"{name}.nii.gz", arrays["label"], affine)
        training.append({"image": f"./imagesTr/{image.name}", "label": f"./labelsTr/{label.name}"})
    content = {
        "modality": {str(k): channel for k, channel in enumerate(channels)},
        "labels": labels,
        "training": training,
    }
    write_json(root / "dataset.json", content)


@pytest.fixture
def tcia(tmp_path):
    """tcia(4) writes four AutoPET studies, one a patient, every other without a lesion."""

    def write(count=2, root=tmp_path / "autopet"):
        for i in range(count):
            folder = root / f"PETCT_{i:010x}" / "01-01-2000-NA-PET-CT"
            write_study(folder, petct_arrays(i, lesion=i % 2 == 0))
        return root

    return write


@pytest.fixture
def nnunet(tmp_path):
    """nnunet(2, ("PET", "CT")) writes an nnU-Net raw folder with the channels in that order."""

    def write(count=2, channels=("CT", "PET"), root=tmp_path / "Dataset001", name="case_{:03d}"):
        stems = {"CT": "CTres", "PET": "SUV"}
        cases = {}
        for i in range(count):
            arrays = petct_arrays(i, lesion=i % 2 == 0)
            images = [arrays[stems[channel]] for channel in channels]
            cases[name.format(i)] = [*images, arrays["SEG"]]
        write_nnunet(root, cases, channels)
        return root

    return write


@pytest.fixture
def msd(tmp_path):
    """msd(2) writes a Decathlon Task01 folder: 4D files with the channels in the given order."""

    def write(count=2, channels=MSD_CHANNELS, labels=MSD_LABELS, root=tmp_path / "Task01"):
        cases = {f"BRATS_{i + 1:03d}": mri_arrays(i) for i in range(count)}
        write_decathlon(root, cases, channels, labels)
        return root

    return write


# ------------------------------------------------------------------ one real run


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A run small enough for tests: 9 studies, 3 in each part, 2 epochs of 2 steps, narrow."""
    root = tmp_path_factory.mktemp("base")
    write_phantom(root / "data", patients=6)
    return Config(
        version="v3",
        data=str(root / "data"),
        cache=str(root / "cache"),
        out=str(root / "run"),
        device="cpu",
        amp="none",
        threads=1,
        workers=0,
        epochs=2,
        steps=2,
        batch_size=2,
        patch=(16, 16, 16),
        spacing=(16.0, 16.0, 16.0),
        folds=3,
        val_every=1,
        phi="noise",
        seed=1,
        lr=3e-3,
        widths=(4, 8, 8, 16, 16),
    )


@pytest.fixture(scope="session")
def finished(base):
    """The folder of base's finished run, what train() returned and what it reported. Read only."""
    rows = []
    result = train.train(base, rows.append)
    return Path(base.out), result, rows


@pytest.fixture(scope="session")
def cases(base):
    folder = runs.find_data(base)
    config = resolve(base, folder.kind)
    return runs.load_cases(folder, config)


# ------------------------------------------------------------------ runs and trials made by hand


def make_config(version="v1", kind="petct", **options):
    """A resolved config: of the simulated cohort, unless `data` is given or the kind is mri."""
    if kind == "mri":
        options.setdefault("data", "tumours")
    config = Config(version=version, **options)
    return resolve(config, kind)


def make_run(root, name, config, rows, age=0, **record):
    """The folder of a finished run as train.py leaves it, but for its weights.

    rows: of test_studies.csv, with "study". age: seconds before an arbitrary moment. record: more
    of config.json, such as late_fusion.
    """
    run = root / name
    run.mkdir(parents=True)
    write_json(run / "config.json", {"config": to_dict(config), **record})
    test = [row["study"] for row in rows]
    write_json(run / "splits.json", {"train": [], "val": [], "test": test})
    results = run / "test_studies.csv"
    pd.DataFrame(rows).to_csv(results, index=False)
    os.utime(results, (1e9 - age, 1e9 - age))
    return run


def make_trial(
    root,
    name,
    config,
    status="done",
    searches=("table2",),
    studies="s",
    val_dices=(0.1, 0.3, 0.2),
    dice=0.5,
    reason="the loss is nan",
    **summary,
):
    """The folder of a search's trial as tune.py leaves it, but for its weights.

    status: waiting, unfinished, done or failed. studies: the hash of its cohort. val_dices: of its
    epochs so far, which took 10 s and 1.5 s of validation each. dice: mean of the test part.
    summary: more of summary.json.
    """
    run = root / name
    run.mkdir(parents=True, exist_ok=True)
    record = {"searches": list(searches), "config": to_dict(config), "studies": studies}
    write_json(run / "trial.json", record)
    if status == "waiting":
        return run

    write_json(run / "config.json", {"config": to_dict(config)})
    rows = []
    for epoch, val_dice in enumerate(val_dices, start=1):
        rows.append({"epoch": epoch, "val_dice": val_dice, "seconds": 10.0, "val_seconds": 1.5})
    if rows:
        runs.write_csv(run / "metrics.csv", rows)

    if status == "done":
        metric = "dice" if config.kind == "petct" else "dice_whole"
        content = {
            "epochs": config.epochs,
            "val_dice": max(val_dices, default=None),
            "seconds": 50.0,
            "gpu_memory_mb": None,
            "systems": {"model": {metric: {"mean": dice, "n": 3}}},
        }
        write_json(run / "summary.json", {**content, **summary})
    if status == "failed":
        (run / "failed.txt").write_text(f"{reason}\n\nTraceback\n")
    return run


@contextlib.contextmanager
def other_writer(folder):
    """Another process that holds the lock of the folder."""
    code = "import fcntl, time\nfile = open('.lock', 'a+b')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
    words = [sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()
