"""Studies as they lie on disk: the layouts of their folders, and reading and checking one of them.

A new layout is a row of LAYOUTS: what lies there, and a generator of its studies as they should
be, none in other folders. find_studies finds what is missing, read_study what is wrong in files.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from files import UserError, read_json

nib.imageglobals.logger.setLevel("CRITICAL")  # bad headers are reported by our own check

TOLERANCE_MM = 0.5  # how far corners of images of one study may lie apart
NIFTI, END = (".nii.gz", ".nii"), re.compile(r"\.nii(\.gz)?$")
CHANNEL_NAMES = {  # names in dataset.json, lower case, letters and digits only
    "petct": {"ct": ("ct", "ctres"), "pet": ("pet", "suv", "pt", "petsuv")},
    "mri": {"ct": ("flair", "t2flair", "t2f"), "pet": ("t1gd", "t1ce", "t1c", "t1wce")},
}


class Finding(NamedTuple):
    """One thing wrong with the data."""

    file: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.found}. {self.remedy}."


class BadStudy(Exception):
    """Raised with the findings of one study."""

    findings = property(lambda self: list(self.args))


class Source(NamedTuple):
    """An image on disk: a 3D file, or one channel of a 4D file."""

    path: Path
    channel: int | None = None
    channels: int | None = None  # how many the 4D file must have


@dataclass(frozen=True)
class Study:
    """One study as it lies on disk. For MRI the slot ct holds FLAIR and pet T1Gd."""

    name: str
    patient: str | None  # None, only in a reader: its layout does not tell
    kind: str  # a key of cache.PREPROCESSING
    ct: Source
    pet: Source
    label: Path | None
    classes: tuple[tuple[int, int], ...] = ((0, 0), (1, 1))  # value in the file -> our class

    @property
    def sources(self) -> dict[str, Source]:
        """What it is made of, by slot: pet, ct and, if it has a mask, label."""
        label = {"label": Source(self.label)} if self.label else {}
        return {"pet": self.pet, "ct": self.ct} | label


class Found(NamedTuple):
    """What find_studies saw below a folder."""

    kind: str
    layout: str
    studies: list[Study]
    findings: list[Finding]
    patients_known: bool  # False where a layout does not tell which studies share a patient


# ------------------------------------------------------------------ layouts


def nifti(folder: Path, stem: str) -> Path:
    """folder/stem.nii.gz or .nii, whichever exists; the former if neither does."""
    paths = [folder / (stem + end) for end in NIFTI]
    return next((path for path in paths if path.exists()), paths[0])


def stems(folder: Path) -> list[str]:
    """Its NIfTI files without their ends, sorted, and without those that archives of Macs hide."""
    return sorted(END.sub("", f.name) for f in folder.glob("[!.]*") if END.search(f.name))


def read_tree(root: Path, labelled: bool) -> Iterator[Study]:
    """AutoPET as TCIA distributes it. Through links, but each real folder once."""
    seen = set()
    for path, names, _ in os.walk(root, followlinks=True):
        folder, real = Path(path), Path(path).resolve()
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(n for n in names if not n.startswith(".") and n != "__MACOSX")
        ct, pet, seg = (nifti(folder, stem) for stem in ("CTres", "SUV", "SEG"))
        of_patient = re.fullmatch(r"PETCT_[0-9a-f]{10}", folder.parent.name)
        if of_patient or any(file.exists() for file in (ct, pet, seg)):
            patient = real.parent.name
            yield Study(f"{patient}/{real.name}", patient, "petct", Source(ct), Source(pet), seg)


class Dataset(NamedTuple):
    """What a dataset.json says, and where the images and masks that it describes lie."""

    kind: str
    slots: tuple[int, int]  # the channels of ct and pet
    channels: int
    classes: tuple[tuple[int, int], ...]
    listed: list[str]  # cases that it names for training
    images: Path
    masks: Path


def read_dataset(root: Path, labelled: bool) -> Dataset | None:
    """The dataset.json in `root` or, as `root` may be an images folder to predict, beside it."""
    beside = not labelled and not (root / "dataset.json").is_file()
    path = (root.parent if beside else root) / "dataset.json"
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        names = content.get("channel_names") or content["modality"]
        kind, slots = find_channels(path, names)
        classes = find_classes(path, kind, content["labels"])
        entries = content.get("training") or []
        entries = [Path(e["image"] if isinstance(e, dict) else e) for e in entries]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = "channel_names (or modality) and labels, each an object of numbers and names"
        raise UserError(f"{path}: expected {expected} ({error!r}). Correct it.") from None
    test = not labelled and stems(root / "imagesTs")
    images = root if beside else root / ("imagesTs" if test else "imagesTr")
    masks = path.with_name("labelsTs" if images.name == "imagesTs" else "labelsTr")
    listed = [END.sub("", e.name) for e in entries] if images.name == "imagesTr" else []
    return Dataset(kind, slots, len(names), classes, listed, images, masks)


def find_channels(path: Path, names: dict[str, str]) -> tuple[str, tuple[int, int]]:
    """Kind of data and the channels of ct and pet, by the names in dataset.json."""
    plain = {int(i): re.sub(r"[^a-z0-9]", "", str(name).lower()) for i, name in names.items()}
    for kind, slots in CHANNEL_NAMES.items():
        ct, pet = ([i for i, n in plain.items() if n in slots[slot]] for slot in ("ct", "pet"))
        if len(ct) == len(pet) == 1:
            return kind, (ct[0], pet[0])
    raise UserError(
        f"{path}: channels are named {', '.join(map(str, names.values()))}. Name exactly one CT "
        "and one PET (or SUV), or one FLAIR and one T1Gd (or T1ce), so that none is guessed."
    )


def find_classes(path: Path, kind: str, labels: dict) -> tuple[tuple[int, int], ...]:
    """Value in the label file -> our class, from `labels` of dataset.json in either direction."""
    pairs = [(k, v) if str(k).isdecimal() else (v, k) for k, v in labels.items()]
    values = {int(value): str(name).lower() for value, name in sorted(pairs)}
    if kind == "petct":
        if set(values) != {0, 1}:
            raise UserError(f"{path}: labels {values}. Expected background 0 and tumour 1 only.")
        return ((0, 0), (1, 1))
    if 0 not in values or not any("edema" in n for n in values.values()) or len(values) < 3:
        raise UserError(f"{path}: labels {values}. Expected 0 background, edema, and tumour parts.")
    return tuple((v, 0 if v == 0 else 1 if "edema" in n else 2) for v, n in values.items())


def read_nnunet(root: Path, labelled: bool) -> Iterator[Study]:
    """A file for each channel of a case. Names tell the patient as autoPET III has them."""
    data = read_dataset(root, labelled)
    count = Counter(stems(data.images) if data else ())
    if not any(re.search(r"_\d{4}$", stem) and stem not in data.listed for stem in count):
        return
    cases = {re.sub(r"_\d{4}$", "", stem) for stem in count}
    cases.update(stems(data.masks) if labelled else ())  # whose images may be missing
    for case in sorted(cases):
        patient = re.match(r"(?:fdg|psma|PETCT)_[0-9a-f]{8,}", case, re.IGNORECASE)
        names, mask = [f"{case}_{i:04d}" for i in data.slots], nifti(data.masks, case)
        images = [Source(nifti(data.images, name)) for name in names]
        for _ in range(max(1, *(count[name] for name in names))):  # both .nii and .nii.gz
            yield Study(case, patient and patient[0], data.kind, *images, mask, data.classes)


def read_decathlon(root: Path, labelled: bool) -> Iterator[Study]:
    """A file for each case, with all channels."""
    data = read_dataset(root, labelled)
    for case in (data.listed or stems(data.images)) if data else ():
        file, mask = nifti(data.images, case), nifti(data.masks, case)
        images = [Source(file, i, data.channels) for i in data.slots]
        yield Study(case, case, data.kind, *images, mask, data.classes)


class Layout(NamedTuple):
    """A way in which studies lie in folders."""

    name: str
    sign: str  # what lies there
    read: Callable[[Path, bool], Iterator[Study]]  # of a folder, and whether masks are needed


LAYOUTS = (  # the first that yields a study counts
    Layout("nnU-Net raw", "dataset.json, imagesTr/<id>_0000.nii.gz", read_nnunet),
    Layout("Medical Segmentation Decathlon", "dataset.json, imagesTr/<id>.nii.gz", read_decathlon),
    Layout("AutoPET (TCIA)", "PETCT_*/<study>/{SUV,CTres,SEG}.nii.gz", read_tree),
)


def find_studies(root: Path, labelled: bool = True) -> Found:
    """All studies below `root`, whichever layout it has, and what is missing or there twice.

    labelled: training and evaluation need a mask per study; prediction does not (then imagesTs is
    taken before imagesTr, and `root` may also be an images folder or a single study).
    Raises UserError if nothing that looks like a study is there.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Give --data the folder that holds the studies.")
    for layout in LAYOUTS:
        if wanted := list(layout.read(root, labelled)):
            break
    else:
        expected = ", or ".join(f"{row.sign} ({row.name})" for row in LAYOUTS)
        raise UserError(f"{root}: no studies found. Expected {expected}.")
    studies, findings, seen = [], [], {}
    for study in wanted:
        label = study.label if labelled else None
        study = replace(study, patient=study.patient or study.name, label=label)
        missing = sorted({str(s.path) for s in study.sources.values() if not s.path.exists()})
        remedy = f"Copy it there, or take {study.name} out"
        findings += [Finding(file, "missing file", remedy) for file in missing]
        if study.name in seen:
            twice = f"duplicate case {study.name}, also in {seen[study.name]}"
            findings.append(Finding(str(study.pet.path), twice, "Keep one of the two"))
        elif not missing:
            studies.append(study)
        seen.setdefault(study.name, study.pet.path.parent)
    return Found(wanted[0].kind, layout.name, studies, findings, all(s.patient for s in wanted))


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


def read_nifti(path: Path, channels: int | None = None) -> Volume:
    """Read and check a 3D file, or a 4D file of so many channels.

    The whole gzip stream is read, so that its checksum is tested. Raises BadStudy: damaged, not
    NIfTI, other axes, impossible spacing, affine not invertible, NaN or Inf.
    """

    def bad(found: str, remedy: str = "Download or convert it again") -> BadStudy:
        return BadStudy(Finding(str(path), found, remedy))

    try:
        raw = path.read_bytes()
        raw = gunzip(raw) if path.name.endswith(".gz") else raw
    except (EOFError, OSError, zlib.error) as error:
        raise bad(f"cannot be read ({error})") from None
    try:
        kind = nib.Nifti2Image if nib.Nifti2Header.may_contain_header(raw) else nib.Nifti1Image
        image, header = kind.from_bytes(raw), kind.header_class
        spacing = header(raw[: header.sizeof_hdr], check=False)["pixdim"][1:4]  # not yet mended
    except Exception as error:  # any failure of the parser means the same to the user
        raise bad(f"not a NIfTI file ({error})") from None
    shape, affine, stored = image.shape, image.affine, image.dataobj
    axes = 3 if channels is None else 4
    while len(shape) > axes and shape[-1] == 1:  # (W, H, D, 1) is a 3D image
        shape = shape[:-1]
    usable = len(shape) == axes and min(shape) > 1 and stored.dtype.kind in "iufb"
    if not usable or channels not in (None, shape[-1]):
        expected = "3 axes" if channels is None else f"3 axes and {channels} channels"
        raise bad(f"wrong dimensions {shape} of type {stored.dtype}", f"Expected {expected}")
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise bad(f"spacing {spacing.tolist()} mm is not above zero", "Correct its pixdim")
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 1e-12:
        raise bad("the affine is not invertible", "Correct sform and qform in its header")
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if steps.min() < 0.01 or steps.max() > 100:
        raise bad(f"spacing {steps.tolist()} is not that of a scan in mm", "Correct its header")
    if stored.offset + math.prod(shape) * stored.dtype.itemsize > len(raw):
        raise bad("shorter than its header says")
    data = np.ndarray(shape, stored.dtype, raw, stored.offset, order="F")  # nibabel would copy it
    if (stored.slope, stored.inter) != (1, 0):
        data = data * np.float32(stored.slope) + np.float32(stored.inter)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise bad("NaN or Inf voxels", "Repair the conversion that wrote it")
    return Volume(data, affine)


def read_label(path: Path, classes: tuple[tuple[int, int], ...]) -> Volume:
    """Read a mask as uint8 classes. Raises BadStudy for a value outside `classes`."""
    data, affine = read_nifti(path)
    mapped, known = np.zeros(data.shape, np.uint8, order="F"), 0
    for value, ours in classes:
        here = data == value
        known += np.count_nonzero(here)
        if ours:
            mapped[here] = ours
    if known < data.size:
        values = [value for value, _ in classes]
        unknown = ", ".join(f"{v:g}" for v in np.unique(data[~np.isin(data, values)])[:5])
        found = f"label values {unknown} outside the expected set {set(values)}"
        remedy = "Correct the mask, or its names in dataset.json"
        raise BadStudy(Finding(str(path), found, remedy))
    return Volume(mapped, affine)


def difference(a: Volume, b: Volume, name: str) -> str:
    """How the grid of `a` differs from that of `b`, the file `name`; empty if they agree."""
    if a.data.shape != b.data.shape:
        return f"shape {a.data.shape} differs from {b.data.shape} of {name}"
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in a.data.shape])).reshape(3, -1)
    gaps = (a.affine - b.affine)[:3] @ np.vstack([corners, np.ones(8)])
    apart = np.linalg.norm(gaps, axis=0).max()  # mm
    found = f"affine differs from that of {name}: corners lie up to {apart:.3g} mm apart, "
    return f"{found}{TOLERANCE_MM} mm is tolerated" if apart > TOLERANCE_MM else ""


def read_study(study: Study) -> dict[str, Volume]:
    """The images of a study by slot: ct, pet and, if it has a mask, label, all on one grid.

    Raises BadStudy with every finding, not only the first.
    """
    reads = {s.path: partial(read_nifti, s.path, s.channels) for s in (study.pet, study.ct)}
    if study.label:
        reads[study.label] = partial(read_label, study.label, study.classes)
    files, findings, volumes = {}, [], {}
    for path, read in reads.items():  # each once: a 4D file holds both images
        try:
            files[path] = read()
        except BadStudy as error:
            findings += error.findings
    for slot, (path, channel, _) in study.sources.items():
        if path in files:
            data, affine = files[path]
            volumes[slot] = Volume(data if channel is None else data[..., channel], affine)
    for slot, volume in volumes.items():
        if found := difference(volume, volumes.get("pet", volume), study.pet.path.name):
            path = str(study.sources[slot].path)
            findings.append(Finding(path, found, "Resample it to that image's grid first"))
    if findings:
        raise BadStudy(*findings)
    return volumes
