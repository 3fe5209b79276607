"""Studies as they lie on disk: the layouts of their folders, and reading and checking one of them.

    python studies.py DIR      what a folder holds, and everything that is wrong with it

A new layout is a row of LAYOUTS: what lies there, and a generator of its studies as they should
be, none in other folders. find_studies finds what is missing, read_study what is wrong in files,
judge what cannot be right in their values.
"""

import gzip
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from checks import ALLOWABLE, doubts, measure
from files import Parser, UserError, command_line, progress, read_json

nib.imageglobals.logger.setLevel("CRITICAL")  # bad headers are reported by our own check

TOLERANCE_MM = 0.5  # how far corners of images of one study may lie apart
NIFTI, END = (".nii.gz", ".nii"), re.compile(r"\.nii(\.gz)?$")
CHANNEL_NAMES = {  # of ct and pet in dataset.json, lower case, letters and digits only
    "petct": (r"ct|ctres", r"pet|suv|pt|petsuv|suvbw|fdgpet|psmapet"),
    "mri": (r"flair|t2flair|t2f", r"t1gd|t1ce|t1c|t1wce"),
}
LABEL_NAMES = {  # the first pattern in a label's name tells its class; MRI: 1 edema, 2 core
    "petct": (
        (1, r"(?<!no )(?<!non )(?<!peri )\b(tumou?rs?|lesions?|gtv[pn]?|cancer|metastas[ie]s)\b"),
        (0, ""),
    ),
    "mri": (
        (1, r"\b(o?edema|ed|snfh|whole)\b"),
        (0, r"\b(resection|cavity|rc)\b"),
        (2, r"\b(core|tumou?r|necro(sis|tic)|enhancing|ncr|netc?|et)\b"),
    ),
}
Classes = tuple[tuple[int, int], ...]  # value in a label file -> our class
OFFICIAL = re.compile(r"(?:fdg|psma|PETCT)_[0-9a-f]{8,}", re.IGNORECASE)  # a patient of AutoPET


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
    kind: str  # a key of preprocess.PREPROCESSING
    ct: Source
    pet: Source
    label: Path | None
    classes: Classes = ((0, 0), (1, 1))
    organs: Path | None = None  # only where organs.py reads its map

    @property
    def sources(self) -> dict[str, Source]:
        """What it is made of, by slot: pet, ct and, if there, label and organs."""
        more = {slot: getattr(self, slot) for slot in ("label", "organs")}
        images = {"pet": self.pet, "ct": self.ct}
        return images | {slot: Source(path) for slot, path in more.items() if path}


class Found(NamedTuple):
    """What find_studies saw below a folder."""

    kind: str
    layout: str
    studies: list[Study]
    findings: list[Finding]
    patients_known: bool  # False where a layout does not tell which studies share a patient
    notes: list[str]  # what a user should know of how it was read


class Asked(NamedTuple):
    """What a reader is asked for beside a folder."""

    labelled: bool = True  # masks are needed
    channels: dict[int, str] = {}  # names in place of dataset.json's
    lesions: tuple[int, ...] = ()  # values of lesions in place of what the labels' names say


# ------------------------------------------------------------------ layouts


def nifti(folder: Path, stem: str) -> Path:
    """folder/stem.nii.gz or .nii, whichever exists; the former if neither does."""
    paths = [folder / (stem + end) for end in NIFTI]
    return next((path for path in paths if path.exists()), paths[0])


def stems(folder: Path) -> list[str]:
    """Its NIfTI files without their ends, sorted, and without those that archives of Macs hide."""
    return sorted(END.sub("", f.name) for f in folder.glob("[!.]*") if END.search(f.name))


def folders(root: Path) -> Iterator[tuple[Path, Path]]:
    """All folders below `root`, and where they really lie; through links, but each of them once."""
    seen = set()
    for path, names, _ in os.walk(root, followlinks=True):
        real = Path(path).resolve()
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(n for n in names if not n.startswith(".") and n != "__MACOSX")
        yield Path(path), real


def read_tree(root: Path, asked: Asked) -> Iterator[Study]:
    """AutoPET as TCIA distributes it."""
    for folder, real in folders(root):
        ct, pet, seg = (nifti(folder, stem) for stem in ("CTres", "SUV", "SEG"))
        of_patient = re.fullmatch(r"PETCT_[0-9a-f]{10}|PSMA_[0-9a-f]{16}", folder.parent.name)
        if of_patient or any(file.exists() for file in (ct, pet, seg)):
            patient = real.parent.name
            yield Study(f"{patient}/{real.name}", patient, "petct", Source(ct), Source(pet), seg)


# How 2018-2021, then 2023 and 2024 end the names of a case's FLAIR and T1Gd, where a case's name
# tells the patient, and the labels: necrotic core, edema, enhancing tumour, resection cavity.
BRATS = (
    ("flair", "t1ce", r".+", ((0, 0), (1, 2), (2, 1), (4, 2))),
    ("t2f", "t1c", r"BraTS-\w+-\d+", ((0, 0), (1, 2), (2, 1), (3, 2), (4, 0))),
)


def read_brats(root: Path, asked: Asked) -> Iterator[Study]:
    """BraTS as it is distributed: a folder for each case, perhaps below HGG and LGG."""
    for folder, _ in folders(root):
        ends = {re.split("[_-]", stem)[-1].lower(): stem for stem in stems(folder)}
        for flair, t1gd, patients, classes in BRATS:
            if not {flair, t1gd} & ends.keys():
                continue
            case = re.match(r"(.*[_-])?", next(iter(ends.values())))[0]
            images = [Source(nifti(folder, ends.get(end, case + end))) for end in (flair, t1gd)]
            masks = [stem for stem in ends.values() if "seg" in stem.lower()]
            mask = nifti(folder, masks[0] if masks else f"{case}seg")
            patient = re.match(patients, folder.name)
            yield Study(folder.name, patient and patient[0], "mri", *images, mask, classes)


class Dataset(NamedTuple):
    """What a dataset.json says, and where the images and masks that it describes lie."""

    kind: str
    slots: tuple[int, int]  # the channels of ct and pet
    channels: int
    classes: Classes
    listed: list[str]  # cases that it names for training
    images: Path
    masks: Path
    notes: list[str]


def read_dataset(root: Path, asked: Asked) -> Dataset | None:
    """The dataset.json in `root` or, as `root` may be an images folder to predict, beside it."""
    beside = not asked.labelled and not (root / "dataset.json").exists()
    path = (root.parent if beside else root) / "dataset.json"
    if not path.exists():
        return None
    content, notes = read_json(path), []
    test = not asked.labelled and stems(root / "imagesTs")
    images = root if beside else root / ("imagesTs" if test else "imagesTr")
    masks = path.with_name("labelsTs" if images.name == "imagesTs" else "labelsTr")
    try:
        names = content.get("channel_names") or content["modality"]
        known = asked.channels or name_official(names, stems(images), notes)
        kind, slots = find_channels("--channels" if asked.channels else path, known)
        classes = ((0, 0),)  # no masks, no labels to understand
        if asked.labelled:
            classes = find_classes(path, kind, content["labels"], asked.lesions, notes)
        entries = content.get("training") or []
        entries = [Path(e["image"] if isinstance(e, dict) else e) for e in entries]
        count = content.get("numTraining")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = "channel_names (or modality) and labels, each an object of numbers and names"
        raise UserError(f"{path}: expected {expected} ({error!r}). Correct it.") from None
    listed = [END.sub("", e.name) for e in entries] if images.name == "imagesTr" else []
    here = len(stems(masks))
    if asked.labelled and count not in (None, here):  # users delete cases
        notes.append(f"dataset.json says numTraining {count}, {here} masks are there")
    return Dataset(kind, slots, len(names), classes, listed, images, masks, notes)


def name_official(names: dict[str, str], files: list[str], notes: list[str]) -> dict[str, str]:
    """The names of channels, mended where the AutoPET download calls both of its two "CT"."""
    both_ct = [str(name).lower() for name in names.values()] == ["ct", "ct"]
    if not (both_ct and files and all(OFFICIAL.match(file) for file in files)):
        return names
    notes.append("both channels are named CT; as in AutoPET's download, 0 is CT and 1 is SUV")
    return {"0": "CT", "1": "SUV"}


def channels_by_number(words) -> dict[int, str]:
    """{0: "ct", 1: "pet"} of ("ct=0", "pet=1"). Raises UserError."""
    for word in words:
        if not re.fullmatch(r"\w+=\d+", word):
            raise UserError(f"--channels {word}: expected names and numbers such as ct=0 pet=1.")
    return {int(number): name for name, number in (word.split("=") for word in words)}


def find_channels(path: Path | str, names: dict) -> tuple[str, tuple[int, int]]:
    """Kind of data and the channels of ct and pet, by the names in dataset.json."""
    plain = {int(i): re.sub(r"[^a-z0-9]", "", str(name).lower()) for i, name in names.items()}
    for kind, patterns in CHANNEL_NAMES.items():
        ct, pet = ([i for i, n in plain.items() if re.fullmatch(p, n)] for p in patterns)
        if len(ct) == len(pet) == 1:
            return kind, (ct[0], pet[0])
    raise UserError(
        f"{path}: channels are named {', '.join(map(str, names.values()))}. Name exactly one CT "
        "and one PET (or SUV), or one FLAIR and one T1Gd (or T1ce), so that none is guessed; or "
        "give their numbers: --channels ct=0 pet=1."
    )


def find_classes(path: Path, kind: str, labels: dict, lesions, notes: list[str]) -> Classes:
    """Value in the label file -> our class, from `labels` of dataset.json in either direction. A
    name may have several values (a region), and a value several names."""
    names: dict[int, list[str]] = {}
    for key, label in labels.items():
        name, values = (label, key) if str(key).isdecimal() else (key, label)
        for value in values if isinstance(values, list) else [values]:
            plain = " ".join(re.findall("[a-z0-9]+", str(name).lower()))
            names.setdefault(int(value), []).append(plain)

    def refuse(why: str) -> UserError:
        return UserError(f"{path}: labels {labels}. {why}.")

    parts = {value: own for value, own in sorted(names.items()) if value}
    if 0 not in names or any("background" in own for own in parts.values()):
        raise refuse("Expected 0 for the background")
    if any("ignore" in own for own in parts.values()):
        raise refuse("Voxels to ignore are not supported: give them a label or take them out")
    classes = {value: class_of(kind, own) for value, own in parts.items()}
    if kind == "mri":
        if not {1, 2} <= {*classes.values()} <= {0, 1, 2}:
            raise refuse("Expected 0 background, edema, and tumour parts")
    elif lesions:
        classes = {value: int(value in lesions) for value in parts}
    elif len({tuple(own) for own in parts.values()}) == 1:  # whatever its name
        classes = dict.fromkeys(parts, 1)
    if kind == "petct" and (1 not in classes.values() or not {*lesions} <= {*parts}):
        raise refuse("Say which values are lesions: --lesion-labels 1 2")
    own = {c: [f"{v} {' '.join(parts[v])}" for v in parts if classes[v] == c] for c in (1, 0)}
    if kind == "petct" and own[0]:
        notes.append(f"lesions: {', '.join(own[1])}; background: {', '.join(own[0])}")
    return ((0, 0), *classes.items())


def class_of(kind: str, names: list[str]) -> int | None:
    """The class of a value by its names, of which regions have several: core lies inside whole."""
    rows = LABEL_NAMES[kind]
    found = [next((c for c, words in rows if re.search(words, name)), None) for name in names]
    return None if None in found else max(found)


def read_nnunet(root: Path, asked: Asked) -> Iterator[Study | str]:
    """A file for each channel of a case. Names tell the patient as AutoPET III has them."""
    data = read_dataset(root, asked)
    found = stems(data.images) if data else []
    if not any(re.search(r"_\d{4}$", stem) and stem not in data.listed for stem in found):
        return
    yield from data.notes
    cases = {re.sub(r"_\d{4}$", "", stem) for stem in found}
    cases.update(stems(data.masks) if asked.labelled else ())  # whose images may be missing
    for case in sorted(cases):
        patient, mask = OFFICIAL.match(case), nifti(data.masks, case)
        images = [Source(nifti(data.images, f"{case}_{i:04d}")) for i in data.slots]
        yield Study(case, patient and patient[0], data.kind, *images, mask, data.classes)


def read_decathlon(root: Path, asked: Asked) -> Iterator[Study | str]:
    """A file for each case, with all channels."""
    data = read_dataset(root, asked)
    yield from data.notes if data else ()
    for case in (data.listed or stems(data.images)) if data else ():
        file, mask = nifti(data.images, case), nifti(data.masks, case)
        images = [Source(file, i, data.channels) for i in data.slots]
        yield Study(case, case, data.kind, *images, mask, data.classes)


def read_images(root: Path, asked: Asked) -> Iterator[Study | str]:
    """Images alone, to predict: a file for each channel of a case, as nnU-Net names them."""
    cases = [stem.removesuffix("_0001") for stem in stems(root) if stem.endswith("_0001")]
    if asked.labelled or not cases:
        return
    names = asked.channels or {0: "CT", 1: "PET"}
    kind, slots = find_channels("--channels" if asked.channels else root, names)
    if not asked.channels:
        yield "no dataset.json: _0000 is taken for CT and _0001 for PET (else: --channels)"
    for case in cases:
        images = [Source(nifti(root, f"{case}_{i:04d}")) for i in slots]
        yield Study(case, None, kind, *images, None)


class Layout(NamedTuple):
    """A way in which studies lie in folders."""

    name: str
    sign: str  # what lies there
    read: Callable[[Path, Asked], Iterator[Study | str]]  # studies, and notes for the user
    flags: tuple[str, ...] = ()  # the options that it reads


DESCRIBED = ("--channels", "--lesion-labels")  # in place of what dataset.json says
LAYOUTS = (  # a folder has the first that yields a study; others may see the same files
    Layout("nnU-Net raw", "dataset.json, imagesTr/<id>_0000.nii.gz", read_nnunet, DESCRIBED),
    Layout(
        "Medical Segmentation Decathlon", "dataset.json, imagesTr/<id>.nii.gz", read_decathlon,
        DESCRIBED,
    ),
    Layout("AutoPET (TCIA)", "PETCT_*/<study>/{SUV,CTres,SEG}.nii.gz", read_tree),
    Layout("BraTS", "<case>/<case>_{flair,t1ce,seg}.nii.gz or -{t2f,t1c,seg}", read_brats),
    Layout(
        "images to predict", "<id>_0000.nii.gz, <id>_0001.nii.gz", read_images, DESCRIBED[:1]
    ),
)  # fmt: skip
UNREAD = (  # what else may lie there: its name, what it is, and what to do
    (r"dataset\.json", "a dataset.json lies in {folder}", "Give that folder"),
    (r"imagesTr", "imagesTr without dataset.json", "Write one, as nnU-Net describes it"),
    (r".*\.(mh[ad]|nrrd)", "{file} is no NIfTI", "Convert such files to .nii.gz"),
    (r".*\.(dcm|ima)|DICOMDIR", "{file} is DICOM", "Convert it to .nii.gz, PET to SUV"),
    (r".*__(CT|PT)\.nii\.gz", "{file} is HECKTOR's raw form", "Give nnU-Net raw on one grid"),
    (r".*\.(zip|tar|tgz|tar\.gz|7z)", "{file} is an archive", "Unpack it"),
)


def explain_nothing(root: Path) -> str:
    """What lies below a folder in which no layout was recognised, and what to do."""
    described = (root / "dataset.json").exists()  # then that file and imagesTr are in their place
    for path, names, files in os.walk(root):
        for sign, what, remedy in UNREAD[2 * described :] if path == str(root) else UNREAD:
            if hits := [n for n in sorted(names + files) if re.fullmatch(sign, n, re.IGNORECASE)]:
                return f"{what.format(folder=path, file=Path(path, hits[0]))}. {remedy}."
    if described:
        return "No .nii.gz or .nii lies in its imagesTr. Copy the images there."
    return "Expected " + ", or ".join(f"{row.sign} ({row.name})" for row in LAYOUTS) + "."


def find_studies(root: Path, labelled: bool = True, channels=(), lesion_labels=()) -> Found:
    """All studies below `root`, whichever layout it has, and what is missing or there twice.

    labelled: a mask per study is needed; without, imagesTs is taken before imagesTr, and `root` may
    also be an images folder or a single study. channels: such as ("ct=0", "pet=1"), where the names
    in dataset.json do not tell. Raises UserError if nothing that looks like a study is there.
    """
    if not root.is_dir():
        what = "a file" if root.exists() else "no such folder"
        raise UserError(f"{root}: {what}. Give --data the folder that holds the studies, unpacked.")
    asked = Asked(labelled, channels_by_number(channels), tuple(lesion_labels))
    read = {layout: list(layout.read(root, asked)) for layout in LAYOUTS}
    seen_by = {row: [s for s in items if isinstance(s, Study)] for row, items in read.items()}
    seen_by = {row: own for row, own in seen_by.items() if own}
    if not seen_by:
        raise UserError(f"{root}: no studies found. {explain_nothing(root)}")
    (layout, wanted), *others = seen_by.items()
    files = {source.path for study in wanted for source in study.sources.values()}
    for other, own in others:
        if files.isdisjoint(source.path for study in own for source in study.sources.values()):
            raise UserError(
                f"{root}: holds {layout.name} and {other.name} ({own[0].name}). Give a folder that "
                "holds one of them."
            )
    lesions = labelled and wanted[0].kind == "petct"  # of MRI the labels' names alone tell
    told = ((channels, True), (lesion_labels, lesions))
    for flag, (given, used) in zip(DESCRIBED, told, strict=True):
        if given and not (used and flag in layout.flags):
            raise UserError(f"{flag} has no effect on {layout.name} here. Leave it out.")
    studies, findings, seen, spelling = [], [], {}, {}
    for study in wanted:
        patient = study.patient or study.name  # ids that differ in case only are one patient
        patient = spelling.setdefault(patient.lower(), patient)
        study = replace(study, patient=patient, label=study.label if labelled else None)
        paths = sorted({source.path for source in study.sources.values()})
        lack = [finding for path in paths for finding in misplaced(path, study.name)]
        if study.name in seen:
            twice = f"duplicate case {study.name}, also in {seen[study.name]}"
            findings.append(Finding(str(study.pet.path), twice, "Keep one of the two"))
        elif not lack:
            studies.append(study)
        findings += lack
        seen.setdefault(study.name, study.pet.path.parent)
    notes = [item for item in read[layout] if isinstance(item, str)]
    known = all(study.patient for study in wanted)
    return Found(wanted[0].kind, layout.name, studies, findings, known, notes)


def misplaced(path: Path, study: str) -> Iterator[Finding]:
    """What is wrong with a file before it is opened."""
    if not path.exists():
        yield Finding(str(path), "missing file", f"Copy it there, or take {study} out")
    elif not path.is_file():  # reading a pipe would wait for ever
        yield Finding(str(path), "not a file", f"Replace it, or take {study} out")
    stem = END.sub("", path.name)
    if all(path.with_name(stem + end).exists() for end in NIFTI):
        yield Finding(str(path), "there as .nii and as .nii.gz", "Keep one of the two")


# ------------------------------------------------------------------ reading and checking one study


class Volume(NamedTuple):
    """A NIfTI file: data in the file's axes, affine (4, 4) in mm."""

    data: np.ndarray
    affine: np.ndarray
    placed: bool = True  # False: neither sform nor qform says where it lies
    sides_differ: bool = False  # sform and qform disagree on left and right


def gunzip(raw: bytes) -> bytes:
    """gzip.decompress, in a buffer of the right size from the start: the stream's end tells it."""
    size = int.from_bytes(raw[-4:], "little")
    equal = raw[-4:] + b"\x1f\x8b\x08"  # the end of a stream of that size, and another behind it
    with suppress(zlib.error):  # damaged: gzip says how
        whole = zlib.decompress(raw, 31, min(size, 1032 * len(raw)) + 1)
        if len(whole) == size and equal not in raw:  # else several, or zeros behind the last
            return whole
    return gzip.decompress(raw)


def read_nifti(path: Path, channels: int | None = None) -> Volume:
    """Read and check a 3D file, or a 4D file of so many channels. Raises BadStudy: damaged (the
    checksum is tested), not NIfTI, other axes, impossible spacing or affine, NaN or Inf."""

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
        plain = header(raw[: header.sizeof_hdr], check=False)  # not yet mended
        spacing, slope = plain["pixdim"][1:4], plain["scl_slope"]
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
    if np.isinf(slope):  # which nibabel takes for no scaling; NaN means that
        raise bad("scl_slope is infinite")
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
    return Volume(data, affine, *placement(image.header))


def placement(header) -> tuple[bool, bool]:
    """Whether a header says where the image lies, and whether it says two different things."""
    forms = [header.get_sform(coded=True)]
    with suppress(Exception):  # nibabel reads a damaged qform only if there is no sform
        forms.append(header.get_qform(coded=True))
    own = [form for form, code in forms if code > 0]
    if len(own) < 2:
        return bool(own), False
    return True, bool((own[0][:3, :3] @ np.linalg.inv(own[1][:3, :3]))[0, 0] < 0)


def read_label(path: Path, classes: Classes) -> Volume:
    """Read a mask as uint8 classes. Raises BadStudy for a value outside `classes`."""
    volume = read_nifti(path)
    data = volume.data
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
    return volume._replace(data=mapped)


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
    """The images of a study by slot: ct, pet and, if it has a mask, label, all on one grid. Raises
    BadStudy with every finding, not only the first."""
    files, findings, volumes = {}, [], {}
    for path, channels in {s.path: s.channels for s in study.sources.values()}.items():
        try:  # each file once: a 4D file holds both images
            label = path == study.label
            files[path] = read_label(path, study.classes) if label else read_nifti(path, channels)
        except BadStudy as error:
            findings += error.findings
    for slot, (path, channel, _) in study.sources.items():
        if path in files:
            part = ... if channel is None else (..., channel)
            volumes[slot] = files[path]._replace(data=files[path].data[part])
    for slot, volume in volumes.items():
        if found := difference(volume, volumes.get("pet", volume), study.pet.path.name):
            path = str(study.sources[slot].path)
            findings.append(Finding(path, found, "Resample it to that image's grid first"))
    if findings:
        raise BadStudy(*findings)
    return volumes


def judge(study: Study, volumes: dict[str, Volume], allow=()) -> dict:
    """What is known of a study by its values, and which checks were let pass because `allow` names
    them. Raises BadStudy with the first of CHECKS that fails, which explains those behind it."""
    images = {slot: volume.data for slot, volume in volumes.items()}
    measured = measure(images, units=study.kind == "petct")
    measured["sides_differ"] = any(volume.sides_differ for volume in volumes.values())
    allowed = set()
    for check, found in doubts(measured):
        if check.name not in allow:
            pass_it = f"; if it is right: --allow {check.name}" if check.name else ""
            remedy = f"{check.remedy}{pass_it}"
            raise BadStudy(Finding(str(study.sources[check.slot].path), found, remedy))
        allowed.add(check.name)
    facts = {name: measured.get(name) for name in ("suv", "hu")}
    facts["placed"] = all(volume.placed for volume in volumes.values())
    return facts | {"allowed": sorted(allowed)}


def summarize(facts: list[dict]) -> list[str]:
    """Lines on the facts of all studies (see judge), for the user to see what is off."""
    lines = []
    if units := [(own["suv"], own["hu"]) for own in facts if own["suv"] is not None]:
        suv, hu = np.median(units, axis=0)
        lines.append(f"median SUV {suv:.2f} and HU {hu:.0f} in the body")
    if lost := sum(not own["placed"] for own in facts):
        lines.append(f"{lost} studies have neither sform nor qform: left and right are guessed")
    for name, count in Counter(name for own in facts for name in own["allowed"]).items():
        lines.append(f"{count} studies passed by --allow {name}")
    return lines


def list_findings(findings: list[Finding]) -> str:
    """How many, in how many files, and each in a line."""
    files = len({finding.file for finding in findings})
    lines = "\n".join(f"  {finding}" for finding in sorted(findings))
    return f"{len(findings)} problems in {files} files:\n{lines}"


def run_command(argv: list[str] | None = None) -> None:
    """python studies.py: what a folder holds. Raises UserError with all findings, if any."""
    parser = Parser(description="What a folder of studies holds, and its faults.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--predict", action="store_true", help="studies without masks")
    parser.add_argument("--channels", nargs="+", default=(), metavar="", help="such as ct=0 pet=1")
    parser.add_argument("--lesion-labels", nargs="+", type=int, default=(), metavar="")
    parser.add_argument("--allow", nargs="+", default=(), choices=ALLOWABLE)
    args = parser.parse_args(argv)
    found = find_studies(args.folder, not args.predict, args.channels, args.lesion_labels)

    def check(study: Study) -> dict | BadStudy:
        try:
            volumes = read_study(study)
            lesion = "label" in volumes and volumes["label"].data.any()
            return judge(study, volumes, args.allow) | {"lesion": lesion}
        except BadStudy as error:
            return error

    print(f"layout     {found.layout}, {found.kind}")
    for note in found.notes:
        print(f"           {note}")
    for first in found.studies[:1]:
        for slot, source in first.sources.items():
            channel = "" if source.channel is None else f", channel {source.channel}"
            print(f"{slot:<11}{source.path}{channel}")
        if first.label:
            print(f"labels     value in the file -> class: {dict(first.classes)}")
    count = len(found.studies)
    with ThreadPoolExecutor(2) as pool:
        results = list(progress(pool.map(check, found.studies), "check", "study", count))
    good = [own for own in results if isinstance(own, dict)]
    patients = len({study.patient for study in found.studies})
    ill = sum(own["lesion"] for own in good)
    print(f"studies    {count} of {patients} patients, {ill} with a lesion")
    for line in summarize(good):
        print(f"           {line}")
    bad = [f for own in results if isinstance(own, BadStudy) for f in own.findings]
    if findings := found.findings + bad:
        raise UserError(list_findings(findings))
    print("no problem was found")


if __name__ == "__main__":
    command_line(run_command)
