"""Data of Mirror U-Net: readers, input check, preprocessing (Sec. 3.4), splits, crops, Φ.

From disk to a batch, top to bottom:

    find_studies   recognises AutoPET (TCIA), nnU-Net raw and Decathlon folders by what is in them
    preprocess     reads one study, checks it, crops, resamples and scales it
    prepare        does so once per study, in parallel, into a memory-mapped cache
    make_splits    train / validation / test by patient
    Patches        crops drawn as a pure function of (seed, epoch, index)
    add_noise, shuffle_voxels   Φ of Eq. 1, on the device
    write_phantom  the simulated cohort that stands in when there are no data

Arrays are (W, H, D) in the order of the anatomical axes that `Preprocessing.axes` names.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel import orientations
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

nib.imageglobals.logger.setLevel("CRITICAL")  # bad headers are reported by our own check

CACHE_FORMAT = 2  # raise it when the content of the cache changes
GEOMETRY_TOLERANCE_MM = 0.5  # how far corners of images of one study may lie apart
BODY_SUV = 0.2  # the body is the box of voxels above it; air is below, skin and fat above
IMPOSSIBLE_SUV = 5000.0  # even a full bladder or an injection site stays far below
THRESHOLD_SUV = 4.0  # the row "SUV ≥ 4 threshold" of the evaluation
PHANTOM = Path("data/phantom")


class UserError(Exception):
    """Bad input: the message says which file, what was found and what to do. Exit code 2."""


class Finding(NamedTuple):
    """One thing wrong with the data."""

    file: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.found}. {self.remedy}."


class BadStudy(Exception):
    """Raised with the findings of one study; safe to send between processes."""

    def __init__(self, findings: list[Finding]):
        super().__init__(findings)
        self.findings = findings


def progress(items, name: str, unit: str, total: int | None = None):
    """A progress bar on a terminal; none in a log file, where lines of results say enough."""
    return tqdm(items, name, total, unit=unit, leave=False, disable=None)


@contextmanager
def atomic(path: Path) -> Iterator:
    """A binary file that appears at `path` complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    with atomic(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path):
    """Parse a JSON file. Raises UserError if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Give the path of a JSON file.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Repair or replace it.") from None


# ------------------------------------------------------------------ finding studies


class Source(NamedTuple):
    """An image on disk: a 3D file, or one channel of a 4D file."""

    path: Path
    channel: int | None = None
    channels: int = 1  # how many the 4D file must have


@dataclass(frozen=True)
class Study:
    """One study as it lies on disk. For MRI the slot ct holds FLAIR and pet T1Gd."""

    name: str
    patient: str
    kind: str  # a key of PREPROCESSING
    ct: Source
    pet: Source
    label: Path | None
    classes: tuple[tuple[int, int], ...] = ((0, 0), (1, 1))  # value in the file -> our class


class Found(NamedTuple):
    """What find_studies saw below a folder."""

    kind: str
    layout: str
    studies: list[Study]
    findings: list[Finding]
    patients_known: bool  # False where a layout does not tell which studies share a patient


CHANNEL_NAMES = {  # names in dataset.json, lower case, letters and digits only
    "petct": {"ct": ("ct", "ctres"), "pet": ("pet", "suv", "pt", "petsuv")},
    "mri": {"ct": ("flair", "t2flair", "t2f"), "pet": ("t1gd", "t1ce", "t1c", "t1wce")},
}
NIFTI = (".nii.gz", ".nii")


def find_studies(root: Path, labelled: bool = True) -> Found:
    """All studies below `root`, whichever layout it has.

    labelled: training and evaluation need a mask per study; prediction does not (then imagesTs is
    taken before imagesTr, and `root` may also be an images folder or a single study).
    Raises UserError if nothing that looks like a study is there.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Give --data the folder that holds the studies.")
    for folder in (root, root.parent):
        if (folder / "dataset.json").is_file() and (folder == root or not labelled):
            images = None if folder == root else root
            return find_dataset_json(folder, images, labelled)
    return find_tcia(root, labelled)


def nifti(folder: Path, stem: str) -> Path:
    """folder/stem.nii.gz or .nii, whichever exists; the former if neither does."""
    present = [folder / (stem + end) for end in NIFTI if (folder / (stem + end)).exists()]
    return present[0] if present else folder / (stem + NIFTI[0])


def folders_below(root: Path) -> Iterator[Path]:
    """root and the folders below it, through links, each real folder once, sorted."""
    seen = set()
    for path, names, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(n for n in names if not n.startswith(".") and n != "__MACOSX")
        yield Path(path)


def find_tcia(root: Path, labelled: bool) -> Found:
    """AutoPET as TCIA distributes it: PETCT_*/<study>/{SUV,CTres,SEG}.nii.gz."""
    studies, findings, seen = [], [], {}
    for folder in folders_below(root):
        ct, pet, seg = (nifti(folder, stem) for stem in ("CTres", "SUV", "SEG"))
        is_study = ct.exists() or pet.exists() or seg.exists()
        if not is_study and not re.fullmatch(r"PETCT_[0-9a-f]{10}", folder.parent.name):
            continue
        real = folder.resolve()
        name = f"{real.parent.name}/{real.name}"
        missing = [f for f in (ct, pet, *([seg] if labelled else ())) if not f.exists()]
        findings += [
            Finding(str(f), "missing file", "Copy it there, or convert it again from DICOM")
            for f in missing
        ]
        if name in seen:
            findings.append(
                Finding(str(folder), f"duplicate case, also at {seen[name]}", "Keep one of the two")
            )
        elif not missing:
            studies.append(
                Study(
                    name,
                    real.parent.name,
                    "petct",
                    Source(ct),
                    Source(pet),
                    seg if seg.exists() else None,
                )
            )
        seen.setdefault(name, folder)
    if not studies and not findings:
        raise UserError(
            f"{root}: no studies found. Expected PETCT_*/<study>/{{SUV,CTres,SEG}}.nii.gz "
            "(AutoPET from TCIA), or a dataset.json with imagesTr and labelsTr beside it "
            "(nnU-Net or Medical Segmentation Decathlon)."
        )
    return Found("petct", "AutoPET (TCIA)", studies, findings, True)


def find_channels(path: Path, names: dict[str, str]) -> tuple[str, dict[str, int]]:
    """Kind of data and the channel of each slot, by the names in dataset.json."""
    if not all(str(i).isdecimal() for i in names):
        raise UserError(f'{path}: channels {names}. Expected numbers with names, as {{"0": "CT"}}.')
    plain = {int(i): re.sub(r"[^a-z0-9]", "", str(name).lower()) for i, name in names.items()}
    for kind, slots in CHANNEL_NAMES.items():
        hits = {slot: [i for i, n in plain.items() if n in ok] for slot, ok in slots.items()}
        if all(len(found) == 1 for found in hits.values()):
            return kind, {slot: found[0] for slot, found in hits.items()}
    raise UserError(
        f"{path}: channels are named {', '.join(map(str, names.values()))}. Name exactly one CT "
        "and one PET (or SUV), or one FLAIR and one T1Gd (or T1ce), so that none is guessed."
    )


def find_classes(path: Path, kind: str, labels: dict) -> tuple[tuple[int, int], ...]:
    """Value in the label file -> our class, from `labels` of dataset.json in either direction."""
    pairs = [(k, v) if str(k).isdecimal() else (v, k) for k, v in labels.items()]
    if not all(str(value).isdecimal() for value, _ in pairs):
        raise UserError(f"{path}: labels {labels}. Expected one whole number for each name.")
    values = {int(value): str(name).lower() for value, name in pairs}
    if kind == "petct":
        if set(values) != {0, 1}:
            raise UserError(f"{path}: labels {values}. Expected background 0 and tumour 1 only.")
        return ((0, 0), (1, 1))
    if 0 not in values or not any("edema" in n for n in values.values()) or len(values) < 3:
        raise UserError(f"{path}: labels {values}. Expected 0 background, edema, and tumour parts.")
    return tuple((v, 0 if v == 0 else 1 if "edema" in n else 2) for v, n in sorted(values.items()))


def patient_of(case: str) -> str | None:
    """Patient in names like fdg_<id>_<date> (autoPET III), PETCT_<id>_...; None if not told."""
    match = re.match(r"(?:fdg|psma|PETCT)_[0-9a-f]{8,}", case, re.IGNORECASE)
    return match.group(0) if match else None


def find_dataset_json(root: Path, images: Path | None, labelled: bool) -> Found:
    """nnU-Net raw (one 3D file a channel) or Decathlon (one 4D file a case), by dataset.json."""
    path = root / "dataset.json"
    dataset = read_json(path)
    dataset = dataset if isinstance(dataset, dict) else {}
    names = dataset.get("channel_names") or dataset.get("modality")
    if not all(isinstance(part, dict) and part for part in (names, dataset.get("labels"))):
        raise UserError(
            f"{path}: no channel_names (or modality) and labels, each an object. Add them."
        )
    kind, channel = find_channels(path, names)
    classes = find_classes(path, kind, dataset["labels"])
    if images is None:
        test = root / "imagesTs"
        use_test = not labelled and test.is_dir() and any(nifti_files(test))
        images = test if use_test else root / "imagesTr"
    if not images.is_dir():
        raise UserError(f"{images}: no such folder. The images of {path} belong there.")
    labels = root / "labelsTr" if images.name != "imagesTs" else root / "labelsTs"
    files = list(nifti_files(images))
    listed = {stem_of(file) for _, (file,) in msd_rows(images, dataset, [])}
    if any(re.search(r"_\d{4}$", stem_of(f)) and stem_of(f) not in listed for f in files):
        layout, rows = "nnU-Net raw", nnunet_rows(images, files, channel)
    else:
        layout, rows = "Medical Segmentation Decathlon", msd_rows(images, dataset, files)
    studies, findings, seen = [], [], set()
    for case, sources in rows:
        if layout.startswith("Medical"):
            sources = {s: Source(sources[0], i, len(names)) for s, i in channel.items()}
        seg = nifti(labels, case)
        needed = [s.path for s in sources.values()] + ([seg] if labelled else [])
        missing = sorted({str(f) for f in needed if not f.exists()})
        findings += [
            Finding(f, "missing file", f"Copy it there, or take {case} out") for f in missing
        ]
        if case in seen:
            findings.append(
                Finding(str(sources["pet"].path), f"duplicate case {case}", "Keep one of the two")
            )
        elif not missing:
            label = seg if seg.exists() else None
            patient = patient_of(case) or case
            studies.append(
                Study(case, patient, kind, sources["ct"], sources["pet"], label, classes)
            )
        seen.add(case)
    if labelled and layout == "nnU-Net raw" and labels.is_dir():
        findings += [
            Finding(
                str(images / f"{stem_of(f)}_*.nii.gz"),
                "missing file",
                f"Copy it there, or take {f.name} out",
            )
            for f in nifti_files(labels)
            if stem_of(f) not in seen
        ]
    if not studies and not findings:
        raise UserError(f"{images}: no .nii.gz images found. Copy them there.")
    known = layout.startswith("Medical") or all(patient_of(s.name) for s in studies)
    return Found(kind, layout, studies, findings, known)


def nifti_files(folder: Path) -> Iterator[Path]:
    """NIfTI files of a folder, sorted, without the hidden ones that archives from Macs carry."""
    for file in sorted(folder.iterdir()):
        if file.name.endswith(NIFTI) and not file.name.startswith("."):
            yield file


def stem_of(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def nnunet_rows(images: Path, files: list[Path], channel: dict[str, int]) -> list:
    """(case, sources by slot) per case; one row more for each file that a case has twice."""
    count = Counter(stem_of(f) for f in files)
    cases = sorted({re.sub(r"_\d{4}$", "", stem) for stem in count})
    rows = []
    for case in cases:
        stems = {slot: f"{case}_{i:04d}" for slot, i in channel.items()}
        sources = {slot: Source(nifti(images, stem)) for slot, stem in stems.items()}
        rows += [(case, sources)] * max(1, *(count[stem] for stem in stems.values()))
    return rows


def msd_rows(images: Path, dataset: dict, files: list[Path]) -> list:
    """(case, [file]) per entry of dataset.json, or per file where it lists none."""
    entries = dataset.get("training") or []
    listed = [str(e.get("image", "")) if isinstance(e, dict) else str(e) for e in entries]
    if images.name == "imagesTr" and listed:
        files = [nifti(images, stem_of(Path(entry))) for entry in listed]
    return [(stem_of(file), [file]) for file in files]


# ------------------------------------------------------------------ reading and checking one study


class Volume(NamedTuple):
    """A NIfTI file: data in the file's axes, affine (4, 4) in mm."""

    data: np.ndarray
    affine: np.ndarray


def gunzip(raw: bytes) -> bytes:
    """gzip.decompress, in a buffer of the right size from the start: the stream's end tells it."""
    size = int.from_bytes(raw[-4:], "little")
    with suppress(zlib.error):  # damaged: gzip says how
        whole = zlib.decompress(raw, 31, min(size, 1032 * len(raw)) + 1)
        if len(whole) == size:  # else there are several streams, or zeros behind the last
            return whole
    return gzip.decompress(raw)


def read_nifti(path: Path, dimensions: int) -> Volume:
    """Read and check one file; the whole gzip stream, so that its checksum is tested.

    Raises BadStudy: unreadable or truncated, not NIfTI, not `dimensions` axes, spacing not above
    zero, affine not invertible, NaN or Inf.
    """

    def bad(found: str, remedy: str) -> BadStudy:
        return BadStudy([Finding(str(path), found, remedy)])

    again = "Download or convert it again"
    try:
        raw = path.read_bytes()
        if path.name.endswith(".gz"):
            raw = gunzip(raw)
    except EOFError:
        raise bad("truncated gzip, the stream ends early", again) from None
    except gzip.BadGzipFile as error:
        raise bad(f"unreadable gzip ({error})", again) from None
    except zlib.error as error:
        raise bad(f"damaged gzip ({error})", again) from None
    except OSError as error:
        raise bad(
            f"cannot be read ({error.strerror})", "Check the path and its permissions"
        ) from None
    try:
        kind = (
            nib.Nifti2Header if raw[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
        )
        header = kind(raw[: kind.sizeof_hdr], check=False)
        if header["magic"] not in (b"n+1", b"n+2\0\r\n\x1a\n", b"n+2"):
            raise ValueError("no NIfTI magic")
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        spacing, affine = np.array(header["pixdim"][1:4]), header.get_best_affine()
        (slope, intercept), offset = header.get_slope_inter(), int(header["vox_offset"])
        if not kind.sizeof_hdr <= offset <= len(raw):
            raise ValueError(f"its data begin at byte {offset}")
    except Exception as error:  # any failure of the parser means the same to the user
        raise bad(f"not a NIfTI file ({error})", again) from None
    while len(shape) > dimensions and shape[-1] == 1:  # (W, H, D, 1) is a 3D image
        shape = shape[:-1]
    if len(shape) != dimensions or min(shape) < 2 or dtype.kind not in "iufb":
        raise bad(
            f"wrong dimensions {tuple(map(int, shape))} of type {dtype}",
            f"Expected {dimensions} axes of numbers",
        )
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise bad(
            f"spacing {spacing.tolist()} mm is not above zero", "Correct pixdim in its header"
        )
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 1e-12:
        raise bad("the affine is not invertible", "Correct sform and qform in its header")
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if steps.min() < 0.01 or steps.max() > 100:
        raise bad(f"spacing {steps.tolist()} is not that of a scan in mm", "Correct its header")
    try:
        data = np.ndarray(shape, dtype, raw, offset, order="F")
    except (TypeError, ValueError):
        raise bad("shorter than its header says", again) from None
    if (slope not in (None, 1)) or (intercept not in (None, 0)):
        data = data * np.float32(slope) + np.float32(intercept)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise bad("NaN or Inf voxels", "Repair the conversion that wrote it")
    return Volume(data, affine)


def read_label(path: Path, classes: tuple[tuple[int, int], ...]) -> Volume:
    """Read a mask as uint8 classes. Raises BadStudy for a value outside `classes`."""
    volume = read_nifti(path, 3)
    data, known = volume.data, np.zeros(volume.data.shape, bool, order="F")
    mapped = np.zeros(data.shape, np.uint8, order="F")
    for value, ours in classes:
        here = data == value
        known |= here
        if ours:
            mapped[here] = ours
    if not known.all():
        unknown = ", ".join(f"{v:g}" for v in np.unique(data[~known])[:5])
        expected = ", ".join(str(value) for value, _ in classes)
        found = f"label values {unknown} outside the expected set {{{expected}}}"
        raise BadStudy(
            [Finding(str(path), found, "Correct the mask, or its names in dataset.json")]
        )
    return Volume(mapped, volume.affine)


def corner_gap(a: Volume, b: Volume) -> float:
    """Largest distance in mm between matching corners of two grids of one shape."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in a.data.shape])).reshape(3, -1)
    gap = (a.affine - b.affine)[:3] @ np.vstack([corners, np.ones(8)])
    return float(np.linalg.norm(gap, axis=0).max())


def read_study(study: Study) -> dict[str, Volume]:
    """The images of a study by slot: ct, pet and, if it has a mask, label, all on one grid.

    Raises BadStudy with every finding, not only the first.
    """
    volumes, findings = {}, []
    if study.pet.channel is not None:  # one 4D file holds both
        try:
            both = read_nifti(study.pet.path, 4)
            if both.data.shape[3] != study.pet.channels:
                found = f"wrong dimensions: {both.data.shape[3]} channels, dataset.json names "
                remedy = "Correct dataset.json or the file"
                raise BadStudy(
                    [Finding(str(study.pet.path), f"{found}{study.pet.channels}", remedy)]
                )
            for slot, source in (("pet", study.pet), ("ct", study.ct)):
                volumes[slot] = both._replace(data=both.data[..., source.channel])
        except BadStudy as error:
            findings += error.findings
    else:
        for slot, source in (("pet", study.pet), ("ct", study.ct)):
            try:
                volumes[slot] = read_nifti(source.path, 3)
            except BadStudy as error:
                findings += error.findings
    if study.label is not None:
        try:
            volumes["label"] = read_label(study.label, study.classes)
        except BadStudy as error:
            findings += error.findings
    paths = {"ct": study.ct.path, "label": study.label}
    for slot in volumes.keys() & paths.keys() if "pet" in volumes else ():
        a, b = volumes[slot], volumes["pet"]
        if a.data.shape != b.data.shape:
            found = f"shape {a.data.shape} differs from {b.data.shape} of {study.pet.path.name}"
        elif (gap := corner_gap(a, b)) > GEOMETRY_TOLERANCE_MM:
            found = (
                f"affine differs from that of {study.pet.path.name}: corners lie up to {gap:.3g} "
                f"mm apart, {GEOMETRY_TOLERANCE_MM} mm is tolerated"
            )
        else:
            continue
        findings.append(Finding(str(paths[slot]), found, "Resample it to that image's grid first"))
    if findings:
        raise BadStudy(findings)
    return volumes


# ------------------------------------------------------------------ preprocessing (Sec. 3.4)


@dataclass(frozen=True)
class Preprocessing:
    """Everything that shapes the cached arrays; all of it is in the cache's key."""

    kind: str
    spacing: tuple[float, float, float]  # mm, along `axes`
    axes: str  # anatomical direction of rising index: L(eft) A(nterior) S(uperior), ...
    clip: tuple[tuple[float, float], tuple[float, float]] | None  # HU, SUV; None: z-score
    margin_mm: float = 10.0  # kept around the body
    body_suv: float = BODY_SUV
    threshold_suv: float = THRESHOLD_SUV
    format: int = CACHE_FORMAT


PREPROCESSING = {
    "petct": Preprocessing("petct", (2.0, 2.0, 3.0), "LAS", ((-100.0, 250.0), (0.0, 15.0))),
    "mri": Preprocessing("mri", (1.0, 1.0, 1.0), "RAS", None),
}


def preprocessing(config) -> Preprocessing:
    """The preprocessing of a resolved train.Config: its kind's, at its spacing."""
    return replace(PREPROCESSING[config.kind], spacing=tuple(config.spacing))


def interpolate(image: np.ndarray, axis: int, positions: np.ndarray) -> np.ndarray:
    """Linear interpolation of float32 `image` along one axis, clamped at its borders."""
    last = image.shape[axis] - 1
    positions = np.clip(positions, 0, last)
    if len(positions) == last + 1 and np.allclose(positions, np.arange(last + 1), atol=1e-6):
        return image
    low = np.minimum(positions.astype(np.int64), max(last - 1, 0))
    weight = (
        (positions - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    )
    below = image.take(low, axis)
    above = image.take(np.minimum(low + 1, last), axis)
    above -= below
    above *= weight
    below += above
    return below


def resample(image: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """Linear resampling at the grid of `positions`, in voxels per axis; axis by axis, which is
    exact because the map between two grids with the same axes is diagonal."""
    order = sorted(range(3), key=lambda a: len(positions[a]) / image.shape[a])  # shrink first
    for axis in order:
        image = interpolate(image, axis, positions[axis])
    return image


def grid_positions(shape, spacing, new_spacing) -> list[np.ndarray]:
    """Where the new grid samples the old one, in old voxels; both start at the same centre.

    The count is that of MONAI's Spacing: the distance of the end voxels, rounded to new voxels.
    """
    counts = [
        round((n - 1) * s / t + 1) for n, s, t in zip(shape, spacing, new_spacing, strict=True)
    ]
    return [np.arange(c) * (t / s) for c, s, t in zip(counts, spacing, new_spacing, strict=True)]


def body_box(body: np.ndarray, margin) -> list[list[int]]:
    """[start, stop] per axis of the True voxels, grown by `margin` voxels within the volume."""
    box = []
    for axis in range(3):
        inside = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        grow = int(margin[axis])
        box.append(
            [max(int(inside[0]) - grow, 0), min(int(inside[-1]) + 1 + grow, body.shape[axis])]
        )
    return box


def preprocess(study: Study, settings: Preprocessing) -> tuple[dict[str, np.ndarray], dict]:
    """Read, check, crop to the body, resample and scale one study (Sec. 3.4).

    Returns arrays and meta. Arrays: images float16 (2, W, H, D), CT first; and, with a mask, label
    uint8 (W, H, D), lesion uint32 flat indices of its foreground, native_label uint32 and
    native_class uint8 (the mask on the file's grid, as flat indices in Fortran order), and for
    PET/CT native_hot, the voxels with SUV >= THRESHOLD_SUV. Raises BadStudy.
    """
    volumes = read_study(study)
    pet = volumes["pet"]
    shape, affine = pet.data.shape, pet.affine
    to_axes = orientations.ornt_transform(
        nib.io_orientation(affine), orientations.axcodes2ornt(settings.axes)
    )

    def turn(image: np.ndarray) -> np.ndarray:
        return orientations.apply_orientation(image, to_axes)

    turned_affine = affine @ orientations.inv_ornt_aff(to_axes, shape)
    spacing = np.linalg.norm(turned_affine[:3, :3], axis=0)
    if settings.kind == "petct":
        if (highest := float(pet.data.max())) > IMPOSSIBLE_SUV:
            found = f"values up to {highest:.6g} are not SUV in g/ml (Bq/ml?)"
            remedy = "Convert it to SUV by body weight first"
            raise BadStudy([Finding(str(study.pet.path), found, remedy)])
        body = turn(pet.data) > settings.body_suv
        remedy = f"SUV in g/ml exceed {settings.body_suv} in a body; give SUV, not Bq/ml or zeros"
    else:
        body = (turn(pet.data) != 0) | (turn(volumes["ct"].data) != 0)
        remedy = "Give skull-stripped images with background 0, as the Decathlon has them"
    if not body.any():
        raise BadStudy([Finding(str(study.pet.path), "no body found, the image is empty", remedy)])
    box = body_box(body, np.ceil(settings.margin_mm / spacing))
    del body
    crop = tuple(slice(*b) for b in box)
    positions = grid_positions([b[1] - b[0] for b in box], spacing, settings.spacing)

    plain = np.asfortranarray(turn(pet.data), np.float32)  # however the file stores it
    digest = hashlib.blake2b(plain.T, digest_size=16).hexdigest()
    del plain
    arrays = {}
    if "label" in volumes:
        label = volumes["label"].data
        flat = np.flatnonzero(label.ravel(order="F"))
        arrays["native_label"] = flat.astype(np.uint32)
        arrays["native_class"] = label.ravel(order="F")[flat]
        nearest = [
            np.minimum(np.rint(p).astype(np.int64), b[1] - b[0] - 1)
            for p, b in zip(positions, box, strict=True)
        ]
        arrays["label"] = np.ascontiguousarray(turn(label)[crop][np.ix_(*nearest)])
        arrays["lesion"] = np.flatnonzero(arrays["label"]).astype(np.uint32)
        if settings.kind == "petct":
            hot = pet.data.ravel(order="F") >= settings.threshold_suv
            arrays["native_hot"] = np.flatnonzero(hot).astype(np.uint32)
            del hot
        del label, volumes["label"]
    images = np.empty((2, *map(len, positions)), np.float16)
    for i, slot in enumerate(("ct", "pet")):
        image = turn(volumes.pop(slot).data)[crop].astype(np.float32, order="C")
        image = resample(image, positions)
        if settings.clip is not None:
            low, high = settings.clip[i]
            np.clip(image, low, high, out=image)
            image -= low
            image /= high - low
            images[i] = image
        else:
            images[i] = zscore(image)
    meta = {
        "name": study.name,
        "patient": study.patient,
        "shape": [int(n) for n in images.shape[1:]],
        "spacing": list(settings.spacing),
        "native_shape": [int(n) for n in shape],
        "native_spacing": spacing.tolist(),
        "native_affine": affine.tolist(),
        "to_axes": to_axes.tolist(),
        "box": box,
        "lesion_voxels": len(arrays["native_label"]) if study.label else None,
        "digest": digest,
    }
    return arrays | {"images": images}, meta


def zscore(image: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the brain (voxels that are not 0); the rest stays 0."""
    brain = image != 0
    values = image[brain].astype(np.float64)
    scaled = np.zeros_like(image)
    scaled[brain] = (values - values.mean()) / max(values.std(), 1e-8) if len(values) else 0
    return scaled


def to_native(meta: dict, margin: np.ndarray, classify: Callable) -> np.ndarray:
    """Map margins (K, W, H, D) on the cached grid to a uint8 label map on the study's own grid.

    Each margin is interpolated linearly; `classify` turns (K, w, h, d) into classes; outside the
    body box the answer is 0.
    """
    box, spacing = meta["box"], meta["native_spacing"]
    steps = zip(spacing, meta["spacing"], box, strict=True)
    positions = [np.arange(b[1] - b[0]) * (s / t) for s, t, b in steps]
    inside = np.stack([resample(m.astype(np.float32, copy=False), positions) for m in margin])
    to_axes = np.array(meta["to_axes"])
    turned = [meta["native_shape"][a] for a in np.argsort(to_axes[:, 0])]
    full = np.zeros(turned, np.uint8)
    full[tuple(slice(*b) for b in box)] = classify(inside)
    return orientations.apply_orientation(full, invert_orientation(to_axes))


def invert_orientation(ornt: np.ndarray) -> np.ndarray:
    """The orientation transform that undoes `ornt`."""
    inverse = np.empty_like(ornt)
    for axis, (target, flip) in enumerate(ornt):
        inverse[int(target)] = (axis, flip)
    return inverse


# ------------------------------------------------------------------ the cache


@dataclass(frozen=True)
class Case:
    """One preprocessed study: `meta` and its arrays, memory-mapped below `folder` or in memory."""

    meta: dict
    folder: Path | None = None
    arrays: dict | None = None

    @property
    def name(self) -> str:
        return self.meta["name"]

    @property
    def patient(self) -> str:
        return self.meta["patient"]

    @property
    def has_lesion(self) -> bool:
        return bool(self.meta["lesion_voxels"])

    def load(self, array: str) -> np.ndarray:
        """One of the arrays of `preprocess`. Mapped anew each time, so that nothing is kept."""
        if self.arrays is not None:
            return self.arrays[array]
        with open(self.folder / f"{array}.npy", "rb") as file:  # five times as fast as np.load
            dtype, start, shape, order = npy_header(file.read(128))
            return np.memmap(file, dtype, "r", start, shape, order)

    def native(self, array: str, values=1) -> np.ndarray:
        """A mask on the study's own grid, uint8, from flat indices: native_label or native_hot."""
        full = np.zeros(int(np.prod(self.meta["native_shape"])), np.uint8)
        full[self.load(array)] = values
        return full.reshape(self.meta["native_shape"], order="F")


@lru_cache(maxsize=4096)
def npy_header(raw: bytes) -> tuple:
    """Type, first byte of the data, shape and order of an array, from the head of its .npy file."""
    file = io.BytesIO(raw)
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype, file.tell(), shape, "F" if fortran else "C"


def stamps(study: Study) -> dict[str, list]:
    """What a study is made of: name, channel, size and time of the file of each slot, and the
    classes. A later start compares it instead of reading."""
    slots = {"ct": study.ct, "pet": study.pet}
    if study.label:
        slots["label"] = Source(study.label)
    found = {slot: (source, source.path.stat()) for slot, source in slots.items()}
    return {
        slot: [source.path.name, source.channel, stat.st_size, stat.st_mtime_ns]
        for slot, (source, stat) in found.items()
    } | {"classes": [list(pair) for pair in study.classes]}


def cache_folder(cache: Path, root: Path, settings: Preprocessing) -> Path:
    """cache/<name>-<key>; the key holds the data folder and every setting of the preprocessing."""
    key = json.dumps([str(Path(root).resolve()), asdict(settings)], sort_keys=True)
    return (
        Path(cache) / f"{Path(root).resolve().name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    )


def cached_case(folder: Path, study: Study) -> Case | None:
    """The cached study if it is complete and was made from the files as they are now."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return Case(meta, folder) if meta["sources"] == stamps(study) else None
    except (OSError, ValueError, KeyError):
        return None


def fill_cache(study: Study, settings: Preprocessing, folder: Path) -> list[Finding]:
    """Preprocess one study into `folder`, which appears complete or not at all; the findings."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        sources = stamps(study)
        arrays, meta = preprocess(study, settings)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, array in arrays.items():
            with atomic(temporary / f"{name}.npy") as file:
                np.save(file, array)
        write_json(temporary / "meta.json", meta | {"sources": sources})
        if folder.exists():  # made from other versions of the files
            stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.replace(folder, stale)
            shutil.rmtree(stale, ignore_errors=True)
        try:
            os.replace(temporary, folder)
        except OSError:
            if cached_case(folder, study) is None:  # else another process was faster: take its
                raise
        return []
    except BadStudy as error:
        shutil.rmtree(folder, ignore_errors=True)  # a version that an earlier check passed
        return error.findings
    except OSError as error:
        found = f"cannot be read or written ({error.strerror})"
        remedy = "Check the disk's space and permissions, or choose another --cache"
        return [Finding(str(error.filename or folder), found, remedy)]
    except MemoryError:
        found = "not enough memory to read it"
        return [Finding(str(study.pet.path), found, "Use fewer --workers or a larger machine")]
    except Exception as error:  # the others shall still be checked
        found = f"cannot be preprocessed ({type(error).__name__}: {error})"
        return [Finding(str(study.pet.path), found, "Look at the file; if it is fine, report this")]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def most_bytes(study: Study, settings: Preprocessing) -> int:
    """Upper bound of a cached study from its header: as if the body filled the volume."""
    try:
        header = nib.load(study.pet.path).header
        extent = np.array(header.get_data_shape()[:3]) * np.abs(header.get_zooms()[:3])
        return int(np.prod(np.ceil(extent / settings.spacing)) * 5)  # two float16 and a uint8
    except Exception:  # unreadable: the check will say so
        return 0


def prepare(
    root: Path,
    found: Found,
    settings: Preprocessing,
    cache: Path,
    workers: int = 2,
    check: bool = False,
    skip_bad: bool = False,
    say: Callable[[str], None] = print,
) -> list[Case]:
    """Every study of `found` from the cache, preprocessing what is not there yet.

    The input check is part of that one read; `check` reads everything again. All studies are gone
    through before the bad ones are reported. Raises UserError if there are any, unless `skip_bad`.
    """
    base = cache_folder(cache, root, settings)
    folders = {s.name: base / s.name.replace("/", "__") for s in found.studies}
    cases = {s.name: None if check else cached_case(folders[s.name], s) for s in found.studies}
    todo = [s for s in found.studies if cases[s.name] is None]
    findings = list(found.findings)
    if todo:
        size = sum(most_bytes(study, settings) for study in todo)
        try:
            base.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{base}: cannot be written ({error.strerror}). Choose another --cache."
            ) from None
        for leftover in (*base.glob(".*.tmp"), *base.glob(".*.old")):  # of a killed process
            if time.time() - leftover.stat().st_mtime > 86400:
                shutil.rmtree(leftover, ignore_errors=True)
        free = shutil.disk_usage(base).free
        say(
            f"cache      {base}: {len(todo)} of {len(cases)} studies to read, at most "
            f"{size / 1e9:.2f} GB ({free / 1e9:.0f} GB free)"
        )
        write_json(base / "settings.json", {"data": str(Path(root).resolve()), **asdict(settings)})
        findings += run_parallel(todo, settings, folders, workers)
        cases |= {study.name: cached_case(folders[study.name], study) for study in todo}
        said = {finding.file for finding in findings}
        for study in todo:
            files = {str(p) for p in (study.pet.path, study.ct.path, study.label) if p}
            if cases[study.name] is None and not said & files:
                found_now = "changed while it was read"
                findings.append(Finding(str(study.pet.path), found_now, "Start again"))
    bad = {f.file for f in findings}
    good = [case for case in cases.values() if case is not None]
    first: dict[str, Case] = {}
    for case in sorted(good, key=lambda c: c.name):
        other = first.setdefault(case.meta["digest"], case)
        if other is not case:
            path = next(str(s.pet.path) for s in found.studies if s.name == case.name)
            same = f"duplicate case: the same image as {other.name}"
            findings.append(Finding(path, same, "Keep one of the two"))
            bad.add(path)
            good.remove(case)
    if findings:
        lines = "\n".join(f"  {finding}" for finding in sorted(findings))
        if not skip_bad:
            raise UserError(
                f"the input check found {len(findings)} problems in {len(bad)} files; {len(good)} "
                f"studies are fine:\n{lines}\n"
                "Mend them, or leave their studies out with --skip-bad."
            )
        say(f"left out   {len(findings)} problems in {len(bad)} files (--skip-bad):\n{lines}")
    return good


def run_parallel(todo: list[Study], settings, folders: dict, workers: int) -> list[Finding]:
    """fill_cache for all studies, `workers` at a time, with a progress bar; all findings."""
    findings = []
    try:
        with ProcessPoolExecutor(max(1, workers)) as pool:
            jobs = [pool.submit(fill_cache, s, settings, folders[s.name]) for s in todo]
            for job in progress(as_completed(jobs), "preprocess", "study", len(jobs)):
                findings += job.result()
    except BrokenProcessPool:
        raise UserError(
            "a preprocessing worker was killed, probably for memory: use fewer --workers. "
            "What was finished is kept."
        ) from None
    return findings


# ------------------------------------------------------------------ splits


def make_splits(cases: list[Case], folds: int = 5, fold: int = 0, seed: int = 0) -> dict:
    """Names of the studies by part: test is fold `fold` of `folds`, val a tenth of the rest.

    All studies of a patient fall into one part; patients with and without tumour are dealt
    separately, so that every fold has its share of both. Raises UserError if a part stays empty.
    """
    if not 0 <= fold < folds or folds < 2:
        raise UserError(
            f"--fold {fold} of --folds {folds}: folds count from 0, and 2 is the least."
        )
    by_patient = defaultdict(list)
    for case in sorted(cases, key=lambda c: c.name):
        by_patient[case.patient].append(case)
    rng = np.random.default_rng(seed)
    dealt = []  # tumour patients, then healthy ones, each shuffled: dealing in turn spreads both
    for ill in (True, False):
        group = [p for p, own in by_patient.items() if any(c.has_lesion for c in own) == ill]
        dealt += [group[i] for i in rng.permutation(len(group))]
    test = dealt[fold::folds]
    rest = [p for p in dealt if p not in set(test)]
    ill = [p for p in rest if any(c.has_lesion for c in by_patient[p])]
    healthy = [p for p in rest if p not in set(ill)]
    # a tenth of each, at least one, but the last of a kind stays in training
    val = [
        p for group in (ill, healthy) for p in group[: min(-(-len(group) // 10), len(group) - 1)]
    ]
    val = val or rest[:1] if len(rest) > 1 else val
    train = [p for p in rest if p not in set(val)]
    parts = {"train": train, "val": val, "test": test}
    if not all(parts.values()):
        raise UserError(
            f"{len(by_patient)} patients are too few for {folds} folds: each of train, val and "
            "test needs one. Add studies, use fewer --folds or give --splits."
        )
    return {part: sorted(c.name for p in ps for c in by_patient[p]) for part, ps in parts.items()}


def read_splits(path: Path, cases: list[Case]) -> dict[str, list[str]]:
    """A splits file: {"train": [...], "val": [...], "test": [...]} of study names.

    Raises UserError for a missing part, an unknown study, or a patient in two parts.
    """
    splits = read_json(path)
    if not isinstance(splits, dict) or set(splits) != {"train", "val", "test"}:
        raise UserError(f"{path}: expected the keys train, val and test, each a list of studies.")
    for part, names in splits.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: {part} is not a list of studies. Correct it.")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{path}: {twice[0]} is in {part} twice. Take one out.")
    patients = {case.name: case.patient for case in cases}
    unknown = sorted({n for names in splits.values() for n in names} - patients.keys())
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} studies are not in the data, the first is {unknown[0]}. "
            "Correct the names or --data."
        )
    part_of: dict[str, str] = {}
    for part, names in splits.items():
        if not names:
            raise UserError(f"{path}: {part} is empty. Give it at least one study.")
        for name in names:
            if part_of.setdefault(patients[name], part) != part:
                raise UserError(
                    f"{path}: patient {patients[name]} is in {part_of[patients[name]]} and in "
                    f"{part}. Keep all studies of a patient together."
                )
    return splits


# ------------------------------------------------------------------ crops


def draw_crop(case: Case, patch: tuple[int, int, int], lesion_p: float, rng) -> tuple[slice, ...]:
    """Slices of one crop, which may reach beyond a volume smaller than the patch.

    With probability `lesion_p` (Sec. 3.4: 2/3) a lesion voxel is at the centre, else any voxel
    is; without lesion always any voxel. Where that would leave the volume, the crop is moved in.
    """
    shape = case.meta["shape"]
    lesion_drawn = rng.random() < lesion_p
    if lesion_drawn and case.has_lesion and len(lesions := case.load("lesion")):
        centre = np.unravel_index(int(lesions[rng.integers(len(lesions))]), shape)
    else:
        centre = [rng.integers(n) for n in shape]
    crop = []
    for c, p, n in zip(centre, patch, shape, strict=True):
        start = min(max(int(c) - p // 2, 0), n - p) if n >= p else -((p - n) // 2)
        crop.append(slice(start, start + p))
    return tuple(crop)


def read_crop(array: np.ndarray, crop: tuple[slice, ...], out: np.ndarray | None = None):
    """array[..., crop] of a (mapped) array, zeros beyond its borders; reads nothing else. Into
    `out`, which has its shape, if given."""
    shape = array.shape[-3:]
    inside = tuple(slice(max(s.start, 0), min(s.stop, n)) for s, n in zip(crop, shape, strict=True))
    part = array[(..., *inside)]
    if out is None:
        out = np.empty((*part.shape[:-3], *(s.stop - s.start for s in crop)), part.dtype)
    if crop != inside:
        out[:] = 0
    place = (slice(i.start - s.start, i.stop - s.start) for s, i in zip(crop, inside, strict=True))
    out[(..., *place)] = part
    return out


@lru_cache(maxsize=4)
def visiting_order(seed: int, epoch: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, turn)).permutation(count)


class Patches(torch.utils.data.Dataset):
    """Training crops. Item (epoch, index) is a pure function of it and the seed.

    Every study is visited once before any is visited again. An item holds image float16
    (2, W, H, D), CT first; mask uint8 (W, H, D); tumor, 1.0 if the crop (or, by
    class_label="volume", the study) has a lesion.
    """

    def __init__(self, cases, patch, seed: int, lesion_p: float = 2 / 3, class_label: str = "crop"):
        self.cases, self.patch, self.seed = cases, tuple(patch), seed
        self.lesion_p, self.class_label = lesion_p, class_label

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {name: tensor[0] for name, tensor in self.batch([key]).items()}

    def batch(self, keys: list[tuple[int, int]], pinned: bool = False) -> dict:
        """The items of `keys`, stacked; in page-locked memory, which a GPU reads faster, if pinned.
        Each voxel is copied once, from the cache to its place in the batch."""
        dtype = getattr(torch, self.cases[0].load("images").dtype.name)
        new = partial(torch.empty, pin_memory=pinned)
        image = new((len(keys), 2, *self.patch), dtype=dtype)
        mask = new((len(keys), *self.patch), dtype=torch.uint8)
        tumor = new(len(keys))
        for i, (epoch, index) in enumerate(keys):
            turn, place = divmod(index, len(self.cases))
            case = self.cases[visiting_order(self.seed, epoch, turn, len(self.cases))[place]]
            rng = np.random.default_rng((self.seed, epoch, index, 1))
            crop = draw_crop(case, self.patch, self.lesion_p, rng)
            read_crop(case.load("images"), crop, image[i].numpy())
            ill = read_crop(case.load("label"), crop, mask[i].numpy()).any()
            tumor[i] = float(case.has_lesion if self.class_label == "volume" else ill)
        return {"image": image, "mask": mask, "tumor": tumor}


class Schedule(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one of `world` processes; together they are one batch."""

    def __init__(self, steps: int, batch_size: int, rank: int = 0, world: int = 1):
        self.steps, self.batch_size = steps, batch_size
        self.rank, self.world, self.epoch = rank, world, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            first = step * self.batch_size
            yield [(self.epoch, first + i) for i in range(self.rank, self.batch_size, self.world)]

    def __len__(self) -> int:
        return self.steps


class Loader:
    """Batches of an epoch, which `workers` threads read ahead; without any the caller waits.

    Threads are enough, as copying leaves Python's lock to others. Processes would copy each batch
    once more, through shared memory, and take three times as long.
    """

    def __init__(self, crops: Patches, schedule: Schedule, workers: int, pinned: bool = False):
        self.batch_sampler, self.workers = schedule, workers
        self.read = partial(crops.batch, pinned=pinned)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict]:
        if not self.workers:
            yield from map(self.read, self.batch_sampler)
            return
        pool, batches = ThreadPoolExecutor(self.workers), iter(self.batch_sampler)
        try:
            ahead = deque(
                pool.submit(self.read, keys) for keys in islice(batches, 2 * self.workers)
            )
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self.read, keys) for keys in islice(batches, 1))
                yield batch
        finally:  # also if the caller stops early
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------ Φ (Eq. 1)


def add_noise(ct: Tensor, sigma: float = 0.3) -> Tensor:
    """G(x_C): Gaussian noise whose standard deviation is drawn from U(0, sigma), once per batch.

    ct (B, 1, W, H, D), in its scaled units. Returns a new tensor.
    """
    strength = torch.rand((), device=ct.device) * sigma
    return ct + torch.randn_like(ct) * strength


def shuffle_voxels(ct: Tensor, edge: int = 16, count: int = 1) -> Tensor:
    """S(x_C): permute the voxels of `count` random cubes, so that skips cannot copy CT.

    ct (B, 1, W, H, D); edge in voxels. The cubes lie at the same places across the batch; each
    sample has its own permutation. Returns a new tensor. Raises ValueError if a cube does not fit.
    """
    if edge > min(ct.shape[2:]):
        raise ValueError(f"--shuffle-edge {edge} exceeds a side of the patch {tuple(ct.shape[2:])}")
    out = ct.clone()
    for _ in range(count):
        starts = [int(torch.randint(n - edge + 1, ())) for n in ct.shape[2:]]
        cube = out[(..., *(slice(s, s + edge) for s in starts))]
        voxels = cube.flatten(1)
        order = torch.rand(voxels.shape, device=ct.device).argsort(dim=1)
        cube.copy_(voxels.gather(1, order).view(cube.shape))
    return out


# ------------------------------------------------------------------ the simulated cohort

# fmt: off
PHANTOM_SPACING = np.array((5.0, 5.0, 6.0))  # mm
PSF_SIGMA = 7.0 / 2.355 / PHANTOM_SPACING  # voxels, for a point spread of 7 mm FWHM
STATURE = 648.0  # mm from mid-thigh to the crown: a small body, to keep the volumes small
SPINE = ((0, -74, 100), (0, -62, 160), (0, -44, 250), (0, -60, 380), (0, -32, 470), (0, -16, 525))

# Reference body in mm: x to the patient's right, y forward, z up from mid-thigh. Each organ is a
# chain of capsules, or an ellipsoid where there is only one point; later ones overwrite earlier.
# Organ, mirrored too, points, semi-axes or radius, HU, range of the SUV (g/ml) of each piece.
ORGANS = (
    ("lung", True, ((64, 2, 388),), (54, 70, 76), -820, (0.3, 0.5)),
    ("mediastinum", False, ((0, -6, 405),), (24, 42, 70), 35, (1.1, 1.4)),
    ("heart", False, ((-16, 20, 362),), (46, 42, 40), 42, (1.3, 1.7)),
    ("heart wall", False, ((-20, 18, 365), (-30, 28, 357)), 27, 45, (1.5, 9.0)),
    ("heart cavity", False, ((-6, 4, 378), (-27, 25, 359)), 14, 40, (1.3, 1.7)),
    ("liver", False, ((52, 8, 297),), (66, 64, 46), 62, (2.1, 2.8)),
    ("liver, left lobe", False, ((-8, 30, 306),), (46, 34, 26), 62, (2.1, 2.8)),
    ("stomach", False, ((-52, 18, 292),), (30, 32, 30), 25, (1.2, 2.4)),
    ("spleen", False, ((-80, -34, 298),), (22, 32, 36), 52, (1.7, 2.2)),
    ("skull", False, ((0, 0, 580),), (52, 65, 49), 850, (0.8, 1.1)),
    ("brain", False, ((0, 0, 581),), (44, 57, 41), 36, (6.0, 11.0)),
    ("salivary gland", True, ((38, 12, 512),), (9, 12, 14), 30, (1.5, 3.0)),
    ("psoas", True, ((26, -36, 270), (34, -30, 190), (58, 5, 120)), 14, 55, (0.6, 0.8)),
    ("disc", False, SPINE, (18, 15, 16), 105, (0.9, 1.1)),
    ("vertebra", False, SPINE, (18, 15, 16), 250, (1.1, 1.4)),
    ("hip", True, ((78, -8, 116),), 21, 330, (0.9, 1.3)),
    ("femur", True, ((70, 0, -10), (92, -8, 82), (80, -8, 112)), 12, 420, (0.8, 1.1)),
    ("humerus", True, ((116, -8, 447),), (17, 18, 17), 330, (0.9, 1.3)),
    ("clavicle", True, ((12, 52, 452), (60, 36, 462), (108, 4, 462)), 6, 450, (0.8, 1.1)),
    ("aorta", False, ((-6, 8, 415), (-14, -34, 420), (-4, -18, 205)), 11, 45, (1.5, 1.8)),
    ("airway", False, ((0, 24, 525), (0, 10, 470), (0, -2, 408)), 8, -980, (0.2, 0.4)),
    ("kidney", True, ((54, -46, 252),), (20, 19, 35), 38, (4.0, 9.0)),
    ("kidney pelvis", True, ((47, -42, 252),), (7, 8, 13), 12, (8.0, 16.0)),
    ("colon", False, ((82, 14, 168), (88, 12, 205), (84, 14, 240), (44, 48, 238), (0, 54, 226),
                      (-46, 48, 240), (-84, 10, 252), (-90, 2, 210), (-84, 4, 168),
                      (-42, 10, 152)), 12, 15, (1.2, 5.0)),
    ("small bowel", False, ((34, 34, 210), (-28, 36, 204), (-38, 26, 184), (30, 24, 182),
                            (26, 30, 162), (-18, 30, 160)), 10, 28, (1.0, 3.2)),
    ("bladder", False, ((0, 18, 112),), (29, 25, 22), 6, (5.0, 25.0)),
)
# Where lesions grow: mirrored at random, lowest and highest centre, largest radius in mm.
SITES = (
    (True, (22, -12, 470), (32, 12, 488), 14),  # neck
    (True, (0, 0, 400), (16, 18, 436), 18),  # mediastinum
    (True, (94, -14, 412), (108, 14, 432), 16),  # axilla
    (True, (46, -36, 350), (84, 36, 425), 22),  # lung
    (False, (30, -20, 275), (85, 36, 318), 26),  # liver
    (True, (4, -28, 170), (26, 4, 265), 20),  # retroperitoneum
    (True, (0, -64, 150), (6, -50, 440), 18),  # spine
    (True, (72, -48, 160), (92, -20, 190), 20),  # pelvic bone
    (True, (50, 30, 84), (68, 46, 108), 16),  # groin
)
# fmt: on


def draw_frame(x, y, z, fat):
    """Draw body, fat, belly, ribs and pelvis: HU, SUV, room for soft organs, room for bones."""
    wide = np.interp(
        z,
        (68, 84, 104, 150, 200, 262, 340, 420, 450, 466, 480, 500, 520),
        (1, 70, 128, 136, 132, 120, 132, 140, 138, 112, 52, 44, 42),
    )
    deep = np.interp(
        z,
        (68, 84, 140, 200, 262, 350, 420, 455, 475, 500, 520),
        (60, 78, 88, 84, 82, 92, 90, 70, 50, 48, 46),
    )
    # Squared distance from the axis, where 1 is the skin.
    trunk = np.where((z > 68) & (z < 520), (x / wide) ** 2 + (y / deep) ** 2, np.inf)
    thigh = np.where(z < 110, ((np.abs(x) - 64) / 62) ** 2 + (y / 74) ** 2, np.inf)
    head = (x / 59) ** 2 + ((y - 4) / 74) ** 2 + ((z - 562) / 70) ** 2
    jaw = (x / 48) ** 2 + ((y - 26) / 46) ** 2 + ((z - 518) / 36) ** 2
    depth = np.minimum(np.minimum(trunk, thigh), np.minimum(head, jaw))
    ribs = (trunk > 0.78**2) & (trunk < 0.87**2) & (z > 300) & (z < 458)
    bowl = (x / 106) ** 2 + ((y + 4) / 76) ** 2 + ((z - 178) / 76) ** 2
    pelvis = (bowl > 0.78) & (bowl < 1) & (y < 26) & (np.abs(x) > 30) & (z > 116) & (z < 212)
    ct, suv = np.full_like(depth, -1000, np.float32), np.zeros_like(depth, np.float32)
    for mask, hu, uptake in (
        (depth < 1, 50, 0.7),
        ((depth < 1) & (depth > (1 - fat) ** 2) & (z < 490), -105, 0.3),
        ((trunk < 0.74**2) & (z > 128) & (z < 335), -95, 0.4),
        (ribs & ((z + 0.45 * y) % 25 < 10), 320, 0.9),
        (pelvis, 380, 1.3),
    ):
        ct[mask], suv[mask] = hu, uptake
    return ct, suv, (trunk < 0.77**2) | (z < 130) | (z > 465), depth < 0.95**2


def capsule_mask(grid, start, stop, radii):
    """Mask of the points around a straight piece, and the slice along z that it lies in."""
    low, high = sorted((start[2], stop[2]))
    part = slice(*np.searchsorted(grid[2].ravel(), (low - radii[2], high + radii[2])))
    axes = (grid[0], grid[1], grid[2][..., part])
    offset = [(axis - s) / r for axis, s, r in zip(axes, start, radii, strict=True)]
    way = (stop - start) / radii
    along = sum(o * w for o, w in zip(offset, way, strict=True)) / max(way @ way, 1e-9)
    along = np.clip(along, 0, 1)  # stays 0 for an ellipsoid, whose piece has no length
    return sum((o - along * w) ** 2 for o, w in zip(offset, way, strict=True)) < 1, part


def draw_lesion(rng, centre, largest):
    """Draw one slightly irregular ellipsoid at a voxel: its mask, in a box of 15 voxels a side."""
    box = tuple(slice(int(c) - 7, int(c) + 8) for c in centre)
    offset = (np.mgrid[box] - centre.reshape(3, 1, 1, 1)) * PHANTOM_SPACING.reshape(3, 1, 1, 1)
    radius = 10 + (largest - 10) * rng.beta(1.3, 1.6)
    shape = np.diag(rng.uniform(0.88, 1.15, 3)) + rng.normal(0, 0.08, (3, 3))
    level = (np.tensordot(shape / radius, offset, 1) ** 2).sum(0)
    wave = np.tensordot(rng.normal(0, 1.5 / radius, 3), offset, 1) + rng.uniform(0, 6.3)
    return level * (1 + 0.2 * np.sin(wave)) < 1, box


def draw_study(anatomy, study, tumour):
    """Draw one simulated PET/CT study.

    Args:
        anatomy: random generator of the shapes; the same state again gives the same patient.
        study: random generator of uptake, lesions and noise.
        tumour: whether to draw 1 to 6 lesions.

    Returns:
        CT (int16, HU), SUV (float32, g/ml) and lesions (uint8, 0 or 1), each (X, Y, Z) with
        voxels of 5 x 5 x 6 mm, and the affine (4, 4) from voxels to RAS+ mm.
    """
    girth, stature = anatomy.uniform(0.95, 1.18), anatomy.uniform(0.93, 1.07)
    half = np.ceil(np.array((142, 98)) * girth / PHANTOM_SPACING[:2]).astype(int) + (5, 4)
    shape = (*(2 * half), round(STATURE * stature / PHANTOM_SPACING[2]))
    middle = (np.array(shape) - 1) / 2
    step = PHANTOM_SPACING / (
        -girth,
        girth,
        stature,
    )  # voxels run to the patient's left (LAS), x right
    origin = np.array((0, 0, STATURE / 2)) - middle * step
    axes = zip(np.ogrid[tuple(map(slice, shape))], step, origin, strict=True)
    grid = [(a * s + o).astype(np.float32) for a, s, o in axes]
    fat = 0.06 + 0.3 * (girth - 0.95) * anatomy.uniform(0.5, 1)
    ct, suv, soft, inner = draw_frame(*grid, fat)
    forbidden = np.zeros(shape, bool)
    for organ, mirrored, points, radii, hu, (low, high) in ORGANS:
        pairs = list(zip(points, points[1:], strict=False)) or [points * 2]
        uptakes = np.exp(study.uniform(np.log(low), np.log(high), len(pairs)))
        for side in (1, -1) if mirrored else (1,):
            shift = anatomy.normal(0, 2, 3)
            size = radii * anatomy.uniform(0.93, 1.07, 3)
            for ends, uptake in zip(pairs, uptakes, strict=True):
                mask, part = capsule_mask(grid, *(ends * np.array((side, 1, 1)) + shift), size)
                mask &= (soft if hu < 100 else inner)[..., part]
                if organ == "vertebra":
                    mask &= grid[2][..., part] % 21 > 6  # leave the discs
                ct[..., part][mask], suv[..., part][mask] = hu, uptake
                if organ.split()[0] in ("brain", "heart", "kidney", "bladder"):
                    forbidden[..., part] |= mask

    seg, normal = np.zeros(shape, np.uint8), suv.copy()
    wanted = study.integers(1, 7) if tumour else 0
    while wanted:
        mirrored, low, high, largest = SITES[study.integers(len(SITES))]
        place = study.uniform(low, high) * (study.choice((-1, 1)) if mirrored else 1, 1, 1)
        mask, box = draw_lesion(study, (place - origin) / step, largest)
        value = np.clip(np.exp(study.normal(np.log(6.5), 0.4)), 3.5, 12.0)
        near = ndimage.binary_dilation(mask, iterations=2)
        clear = not (forbidden[box] | (seg[box] > 0))[near].any() and inner[box][mask].all()
        # Hot enough to stand out from its surroundings, though not from the rest of the body.
        if clear and mask.sum() >= 15 and value > 2 * normal[box][near].max():
            ct[box][mask], suv[box][mask], seg[box][mask] = 40, value, 1
            wanted -= 1

    noise = study.standard_normal((2, *shape), dtype=np.float32)
    ct = np.clip(ndimage.gaussian_filter(ct, 0.35) + 9 * noise[0], -1024, 2000).astype(np.int16)
    suv = ndimage.gaussian_filter(suv + 0.4 * np.sqrt(suv) * noise[1], PSF_SIGMA)
    suv = np.round(np.maximum(suv, 0) * 128) / 128  # short mantissas compress well
    affine = np.diag((*PHANTOM_SPACING * (-1, 1, 1), 1.0))
    affine[:3, 3] = middle * PHANTOM_SPACING * (1, -1, -1) + (
        0,
        0,
        round(study.uniform(-900, -600)),
    )
    return ct, suv.astype(np.float32), seg, affine


def write_phantom(
    root: Path, patients: int = 36, seed: int = 0, progress: Callable[[list], Iterable] = iter
) -> None:
    """Write a simulated whole-body FDG-PET/CT cohort; simulated, not clinical.

    Half of the patients are healthy. The first four of the others come twice, with new lesions in
    the same anatomy. Each study is ``root/PETCT_<id>/<study>/{SUV,CTres,SEG}.nii.gz``: SUV
    (float32, g/ml), CT (int16, HU) and lesions (uint8, 0 or 1) on one grid of 5 x 5 x 6 mm. The
    files depend on the seed alone, and ``root`` appears only once all of them are written.

    Args:
        root: the cohort's folder, absent or empty.
        patients: number of patients, of whom every other one has lesions.
        seed: seed of the cohort.
        progress: wraps the list of studies to iterate over, such as ``tqdm``.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty")
    root.parent.mkdir(parents=True, exist_ok=True)
    visits = [(p, v) for p in range(patients) for v in ((1, 2) if p in (0, 2, 4, 6) else (1,))]
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as partial:
        for patient, visit in progress(visits):
            anatomy = np.random.default_rng([seed, patient])
            study = np.random.default_rng([seed, patient, visit])
            month, day, number = study.integers((1, 1, 10000), (13, 29, 100000))
            folder = Path(partial, root.name, f"PETCT_{anatomy.integers(16**10):010x}")
            folder /= f"{month:02d}-{day:02d}-{1999 + visit}-NA-PET-CT Ganzkoerper-{number}"
            folder.mkdir(parents=True)
            *arrays, affine = draw_study(anatomy, study, tumour=patient % 2 == 0)
            for name, array in zip(("CTres", "SUV", "SEG"), arrays, strict=True):
                image = nib.Nifti1Image(array, affine)
                image.header.set_xyzt_units("mm")
                image.header["descrip"] = b"SIMULATED phantom, not clinical"
                data = gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)
                (folder / f"{name}.nii.gz").write_bytes(data)
        try:
            os.replace(Path(partial, root.name), root)
        except OSError:
            if not root.is_dir():  # else another start was faster and wrote the same
                raise
