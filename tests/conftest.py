"""Small studies on disk, in each of the three layouts; and one cohort with a finished run."""

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import train
from config import Config
from phantom import write_phantom
from runs import open_data

SHAPE = (24, 20, 18)
SPACING = (4.0, 4.0, 5.0)
MSD_CHANNELS = ("FLAIR", "T1w", "t1gd", "T2w")
MSD_LABELS = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}


def petct_arrays(seed, lesion=True, shape=SHAPE):
    """CT (int16), SUV (float32) and SEG (uint8): a noisy ellipsoid in air, axes L, A, S."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in shape], indexing="ij")
    body = sum(g**2 for g in grid) < 1
    suv = np.where(body, rng.uniform(0.5, 3, shape), 0).astype(np.float32)
    ct = np.where(body, rng.integers(-150, 300, shape), -1000).astype(np.int16)
    seg = np.zeros(shape, np.uint8)
    if lesion:
        seg[tuple(slice(n // 2 - 2, n // 2 + 1) for n in shape)] = 1
        suv[seg > 0] = 8
    return {"CTres": ct, "SUV": suv, "SEG": seg}


def mri_arrays(seed, shape=(16, 14, 12)):
    """Channels by name (int16) and label (uint8, 0 to 3): a box of brain, axes R, A, S."""
    rng = np.random.default_rng(seed)
    brain = np.zeros(shape, bool)
    brain[2:-2, 2:-3, 1:-2] = True
    arrays = {
        name: np.where(brain, rng.integers(100 * (i + 1), 150 * (i + 1), shape), 0).astype(np.int16)
        for i, name in enumerate(MSD_CHANNELS)
    }
    label = np.zeros(shape, np.uint8)
    label[5:11, 4:9, 3:9], label[7:9, 5:8, 4:8], label[8, 6, 4:6] = 1, 2, 3
    return arrays | {"label": label}


def las(spacing=SPACING, origin=(30.0, -20.0, -500.0)):
    """Affine of an image whose indices rise to the patient's left, front and head."""
    affine = np.diag((-spacing[0], spacing[1], spacing[2], 1.0))
    affine[:3, 3] = origin
    return affine


def stored_as(array, affine, axes):
    """An (L, A, S) array and its affine as a file with other `axes`, such as PIR, holds them."""
    source = ["LR", "AP", "SI"]
    order = [next(i for i, pair in enumerate(source) if axis in pair) for axis in axes]
    flips = [axis not in "LAS" for axis in axes]
    index = np.zeros((4, 4))  # from indices in the file to indices in `array`
    index[3, 3] = 1
    for k, (i, flip) in enumerate(zip(order, flips, strict=True)):
        index[i, k] = -1 if flip else 1
        index[i, 3] = array.shape[i] - 1 if flip else 0
    turned = array.transpose(order)[tuple(slice(None, None, -1 if f else 1) for f in flips)]
    return np.ascontiguousarray(turned), affine @ index


def write_nifti(path, array, affine, image=nib.Nifti1Image):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = image(array, affine).to_bytes()
    path.write_bytes(gzip.compress(raw, 1, mtime=0) if path.suffix == ".gz" else raw)
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A run small enough for tests: 9 studies, 3 in each part, 2 epochs of 2 steps, narrow."""
    root = tmp_path_factory.mktemp("base")
    write_phantom(root / "data", patients=6)
    return Config(
        version="v3", data=str(root / "data"), cache=str(root / "cache"), device="cpu", amp="none",
        threads=1, workers=0, epochs=2, steps=2, batch_size=2, patch=(16, 16, 16),
        spacing=(16.0, 16.0, 16.0), folds=3, val_every=1, phi="noise", seed=1, lr=3e-3,
        widths=(4, 8, 8, 16, 16), out=str(root / "run"),
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished(base):
    """The folder of base's finished run, what train() returned and what it reported. Read only."""
    rows = []
    result = train.train(base, rows.append)
    return Path(base.out), result, rows


@pytest.fixture(scope="session")
def cases(base):
    return open_data(base)[1]


@pytest.fixture
def tcia(tmp_path):
    """tcia(4) writes four AutoPET studies, one a patient, every other healthy; their folder."""

    def write(count=2, root=tmp_path / "autopet"):
        for i in range(count):
            folder = root / f"PETCT_{i:010x}" / "01-01-2000-NA-PET-CT"
            for stem, array in petct_arrays(i, lesion=i % 2 == 0).items():
                write_nifti(folder / f"{stem}.nii.gz", array, las())
        return root

    return write


@pytest.fixture
def nnunet(tmp_path):
    """nnunet(2, ("PET", "CT")) writes an nnU-Net raw folder with the channels in that order."""

    def write(count=2, channels=("CT", "PET"), root=tmp_path / "Dataset001", name="case_{:03d}"):
        stems = {"CT": "CTres", "PET": "SUV"}
        for i in range(count):
            arrays, case = petct_arrays(i, lesion=i % 2 == 0), name.format(i)
            for k, channel in enumerate(channels):
                array = arrays[stems[channel]]
                write_nifti(root / "imagesTr" / f"{case}_{k:04d}.nii.gz", array, las())
            write_nifti(root / "labelsTr" / f"{case}.nii.gz", arrays["SEG"], las())
        text = json.dumps(
            {
                "channel_names": dict(enumerate(channels)),
                "labels": {"background": 0, "tumor": 1},
                "numTraining": count,
                "file_ending": ".nii.gz",
            }
        )
        (root / "dataset.json").write_text(text)
        return root

    return write


@pytest.fixture
def msd(tmp_path):
    """msd(2) writes a Decathlon Task01 folder: 4D files with the channels in the given order."""

    def write(count=2, channels=MSD_CHANNELS, labels=MSD_LABELS, root=tmp_path / "Task01"):
        affine, cases = np.eye(4), [f"BRATS_{i:03d}" for i in range(1, count + 1)]
        for i, case in enumerate(cases):
            arrays = mri_arrays(i)
            stack = np.stack([arrays[name] for name in channels], -1)
            write_nifti(root / "imagesTr" / f"{case}.nii.gz", stack, affine)
            write_nifti(root / "labelsTr" / f"{case}.nii.gz", arrays["label"], affine)
        text = json.dumps(
            {
                "modality": {str(i): name for i, name in enumerate(channels)},
                "labels": labels,
                "training": [
                    {"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"}
                    for c in cases
                ],
            }
        )
        (root / "dataset.json").write_text(text)
        return root

    return write
