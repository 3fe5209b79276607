"""Studies as they lie on disk: find them in a folder, read them and check them.

    python studies.py DIR      print what a folder holds, and everything that is wrong with it

A new layout of folders is a row of LAYOUTS and a generator of its studies. The generator yields
each study as it should be, even if files are missing, and nothing in folders of other layouts; it
may also yield notes to the user, as text.
find_studies finds missing files, read_study damaged ones, check_values impossible values.
"""

import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from checks import failed_checks, measure_images
from common import Parser, UserError, command_line, progress, read_json, reading
from grids import Grid, grid_difference, resample_to, same_grid, share_inside

nib.imageglobals.logger.setLevel("CRITICAL")  # Bad headers are reported by our own checks.

Classes = tuple[tuple[int, int], ...]  # Pairs of a value in a label file and our class.
HECKTOR_CLASSES = ((0, 0), (1, 1), (2, 1))  # 1 is the primary tumour, 2 are lymph nodes.


class Finding(NamedTuple):
    """One thing that is wrong with the data."""

    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}. {self.remedy}."


class BadStudy(Exception):
    """Raised with the findings of one study as its arguments."""

    @property
    def findings(self) -> list[Finding]:
        return list(self.args)


class Source(NamedTuple):
    """An image on disk: a 3D file, or one channel of a 4D file."""

    path: Path
    channel: int | None = None
    channels: int | None = None  # The number of channels that the 4D file must have.


@dataclass(frozen=True)
class Study:
    """One study as it lies on disk. For MRI the slot ct holds FLAIR and pet holds T1Gd."""

    name: str
    patient: str | None  # None, which collect_studies replaces: names do not tell the patient.
    kind: str  # A key of preprocess.PREPROCESSING.
    ct: Source
    pet: Source
    label: Path | None
    classes: Classes = ((0, 0), (1, 1))
    organs: Path | None = None  # Set by organs.py, which reads the map.
    reference: str = "pet"  # The slot of the image on whose grid masks lie.
    own_grids: bool = False  # The images may lie on grids of their own.

    @property
    def sources(self) -> dict[str, Source]:
        """The images by slot: pet, ct and, where the study has them, label and organs."""
        sources = {"pet": self.pet, "ct": self.ct}
        if self.label:
            sources["label"] = Source(self.label)
        if self.organs:
            sources["organs"] = Source(self.organs)
        return sources

    @property
    def paths(self) -> list[Path]:
        """The files of the images, each once."""
        return list(dict.fromkeys(source.path for source in self.sources.values()))


class StudyFolder(NamedTuple):
    """The content of a folder of studies, as find_studies returns it."""

    root: Path
    kind: str
    layout: str
    studies: list[Study]
    findings: list[Finding]
    patients_known: bool  # False: the layout does not tell which studies share a patient.
    notes: list[str]  # How the folder was understood, for the user.


class Channels(NamedTuple):
    """The numbers of the channels that hold ct and pet, and the kind of data that they tell."""

    kind: str
    ct: int
    pet: int


class Request(NamedTuple):
    """What is asked of a folder beside its path."""

    labelled: bool  # Every study needs a mask.
    channels: Channels | None  # In place of the names in dataset.json.
    lesion_labels: tuple[int, ...]  # Values of lesions, in place of the labels' names.
    own_grids: bool  # The images may lie on grids of their own, whatever the layout promises.


# ------------------------------------------------------------------ files and folders

NIFTI_END = re.compile(r"\.nii(\.gz)?$")


def nifti(folder: Path, stem: str) -> Path:
    """The path of folder/stem.nii.gz or .nii, whichever exists; the former if neither does."""
    compressed = folder / f"{stem}.nii.gz"
    plain = folder / f"{stem}.nii"
    return plain if plain.exists() and not compressed.exists() else compressed


def stems(folder: Path) -> list[str]:
    """The sorted names of the NIfTI files in a folder, without .nii.gz or .nii.

    Hidden files are left out: archives that were packed on a Mac hold some that are no images.
    """
    names = [path.name for path in folder.glob("[!.]*") if NIFTI_END.search(path.name)]
    return sorted(NIFTI_END.sub("", name) for name in names)


def walk_folders(root: Path) -> Iterator[Path]:
    """Yield root and all folders below it. Links are followed, but each folder is seen once."""
    seen = set()
    for path, names, _ in os.walk(root, followlinks=True):
        real = Path(path).resolve()
        if real in seen:
            names.clear()  # os.walk does not descend into names that are taken out.
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if name[0] != "." and name != "__MACOSX")
        yield Path(path)


def missing_or_ambiguous(path: Path, study_name: str) -> Iterator[Finding]:
    """What is wrong with a file before it is opened."""
    if not path.exists():
        yield Finding(str(path), "missing file", f"Copy it there, or take {study_name} out")
    elif not path.is_file():  # Reading a pipe would wait for ever.
        yield Finding(str(path), "not a file", f"Replace it, or take {study_name} out")

    if path.suffix == ".gz" and path.with_suffix("").exists():
        yield Finding(str(path), "there as .nii and as .nii.gz", "Keep one of the two")


# ------------------------------------------------------------------ dataset.json

# Patterns of the names of ct and pet in dataset.json, in lower case without spaces and signs.
CHANNEL_NAMES = {
    "petct": (r"ct|ctres", r"pet|suv|pt|petsuv|suvbw|fdgpet|psmapet"),
    "mri": (r"flair|t2flair|t2f", r"t1gd|t1ce|t1c|t1wce"),
}

# The class of a label is that of the first pattern in its name. For PET/CT class 1 is lesion, and
# every other name is background; for MRI 1 is edema and 2 the tumour core.
LABEL_NAMES = {
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

# The patient at the head of a study's name in AutoPET's download, which is nnU-Net raw.
AUTOPET_PATIENT = re.compile(r"(?:fdg|psma|PETCT)_[0-9a-f]{8,}", re.IGNORECASE)


class Dataset(NamedTuple):
    """What a dataset.json says, and the folders of the images and masks that it describes."""

    channels: Channels
    count: int  # The number of channels.
    classes: Classes
    training: list[str]  # The cases that are listed for training.
    images: Path
    masks: Path
    notes: list[str]


def read_dataset(root: Path, request: Request) -> Dataset | None:
    """Read the dataset.json in root or, where root is an images folder to predict, beside it.

    To predict, images alone will do, if they are named as nnU-Net names CT and PET. Returns None
    for any other folder. Raises UserError if dataset.json cannot be understood.
    """
    beside = not request.labelled and not (root / "dataset.json").exists()
    home = root.parent if beside else root
    path = home / "dataset.json"

    # Test images are those to predict, if there are any.
    images = root
    if not beside:
        has_test_images = not request.labelled and stems(root / "imagesTs")
        images = root / ("imagesTs" if has_test_images else "imagesTr")

    notes = []
    if path.exists():
        content = read_json(path)
    elif beside and any(stem.endswith("_0001") for stem in stems(root)):
        content = {"channel_names": {"0": "CT", "1": "PET"}}
        if not request.channels:
            notes.append("no dataset.json: _0000 is taken for CT and _0001 for PET (or --channels)")
    else:
        return None

    classes = ((0, 0),)  # Without masks there are no labels to understand.
    training = []
    expected = "Expected channel_names (or modality) and labels, both with numbers and names"
    with reading(path, expected):
        names = content.get("channel_names") or content["modality"]
        is_autopet = all(map(AUTOPET_PATIENT.match, stems(images)))
        if request.channels:
            channels = request.channels
        elif list(names.values()) == ["CT", "CT"] and is_autopet:
            notes.append("both channels are named CT; as AutoPET has them, 0 is CT and 1 is SUV")
            channels = Channels("petct", 0, 1)
        else:
            channels = find_channels(names)

        if request.labelled:
            labels = labels_by_value(content["labels"])
            classes = find_classes(channels.kind, labels, request.lesion_labels)
            if len(classes) > 2:  # more than the background and one label
                notes.append(f"labels {labels} have the classes {dict(classes)}")

        if images.name == "imagesTr":
            for entry in content.get("training") or []:
                image = entry["image"] if isinstance(entry, dict) else entry
                training.append(NIFTI_END.sub("", Path(image).name))
    return Dataset(
        channels=channels,
        count=len(names),
        classes=classes,
        training=training,
        images=images,
        masks=home / "labelsTr",
        notes=notes,
    )


def find_channels(names: dict) -> Channels:
    """Find ct and pet by the names of the channels, which are given by number.

    Raises UserError unless one channel of each has a known name.
    """
    plain_names = {
        int(number): re.sub("[^a-z0-9]", "", str(name).lower()) for number, name in names.items()
    }
    for kind, (ct_pattern, pet_pattern) in CHANNEL_NAMES.items():
        ct = [number for number, name in plain_names.items() if re.fullmatch(ct_pattern, name)]
        pet = [number for number, name in plain_names.items() if re.fullmatch(pet_pattern, name)]
        if len(ct) == len(pet) == 1:
            return Channels(kind, ct[0], pet[0])
    raise UserError(
        f"channels are named {', '.join(map(str, names.values()))}. Name exactly one CT and one "
        "PET (or SUV), or one FLAIR and one T1Gd (or T1ce), so that none is guessed; or give "
        "their numbers: --channels ct=0 pet=1."
    )


def parse_channels(words) -> Channels | None:
    """The channels that words such as ("ct=0", "pet=1") name. Raises UserError for other words."""
    names = {}
    for word in words:
        if not re.fullmatch(r"\w+=\d+", word):
            raise UserError(f"--channels {word}: expected names and numbers such as ct=0 pet=1.")
        name, number = word.split("=")
        names[number] = name
    return find_channels(names) if names else None


def labels_by_value(labels: dict) -> dict[int, list[str]]:
    """The names of each value in a label file, lower-case words, from `labels` of dataset.json.

    These may be {name: value} or {value: name}. A name with several values is a region, so that a
    value may have several names.
    """
    names: dict[int, list[str]] = {}
    for key, entry in labels.items():
        name, values = (entry, key) if str(key).isdecimal() else (key, entry)
        words = re.findall("[a-z0-9]+", str(name).lower())
        for value in values if isinstance(values, list) else [values]:
            names.setdefault(int(value), []).append(" ".join(words))
    return dict(sorted(names.items()))


def find_classes(kind: str, names: dict[int, list[str]], lesion_labels) -> Classes:
    """Our class of each value in a label file.

    names: of each value, see labels_by_value. lesion_labels: for PET/CT, the values that are
    lesions whatever their names. Raises UserError if a class is not clear.
    """
    foreground = {value: words for value, words in names.items() if value}
    if kind == "petct" and lesion_labels:
        classes = dict.fromkeys(foreground, 0) | dict.fromkeys(lesion_labels, 1)
    elif kind == "petct" and len(set(map(tuple, foreground.values()))) == 1:
        classes = dict.fromkeys(foreground, 1)  # The only label is the lesions, whatever its name.
    else:
        classes = {value: class_of_names(kind, words) for value, words in foreground.items()}

    all_names = sum(foreground.values(), [])
    remedy = None
    if 0 not in names or any("background" in name for name in all_names):
        remedy = "Expected 0 for the background"
    elif any("ignore" in name for name in all_names):
        remedy = "Voxels to ignore are not supported: give them a label or take them out"
    elif kind == "mri" and set(classes.values()) not in ({1, 2}, {0, 1, 2}):
        remedy = "Expected 0 background, edema, and tumour parts"
    elif kind == "petct" and (1 not in classes.values() or classes.keys() != foreground.keys()):
        remedy = "Say which values are lesions: --lesion-labels 1 2"
    if remedy:
        raise UserError(f"labels {names}. {remedy}.")
    return ((0, 0), *classes.items())


def class_of_names(kind: str, names: list[str]) -> int | None:
    """The class of a value by its names, or None if one of them is not known.

    A value of several regions belongs to the innermost: the core lies inside the whole tumour.
    """
    classes = []
    for name in names:
        matches = [number for number, words in LABEL_NAMES[kind] if re.search(words, name)]
        if not matches:
            return None
        classes.append(matches[0])
    return max(classes)


# ------------------------------------------------------------------ layouts


class FolderNames(NamedTuple):
    """How a layout with a folder for each study names its files and folders."""

    ct: str
    pet: str
    label: str
    nested: bool = True  # Each patient has a folder, and in it one for each study.
    folder: str = ".*"  # The pattern of <folder above>/<folder>.
    empty: str = ""  # The pattern of those that are studies even if they hold no such file.


AUTOPET_FOLDERS = FolderNames(
    ct="CTres",
    pet="SUV",
    label="SEG",
    empty=r"(PETCT_[0-9a-f]{10}|PSMA_[0-9a-f]{16})/.*",
)
SARCOMA_FOLDERS = FolderNames(ct="CT_image", pet="PET_image", label="PET_mask", nested=False)
DEEP_PSMA_FOLDERS = FolderNames(ct="CT", pet="PET", label="TTB", folder=".*/(PSMA|FDG)")


def read_folders(names: FolderNames, root: Path, request: Request) -> Iterator[Study]:
    """PET/CT with a folder for each study, whose files have the same names in all folders."""
    for folder in walk_folders(root):
        ct = nifti(folder, names.ct)
        pet = nifti(folder, names.pet)
        label = nifti(folder, names.label)

        real = folder.resolve()
        name = f"{real.parent.name}/{real.name}"
        has_files = any(file.exists() for file in (ct, pet, label))
        is_study = has_files and re.fullmatch(names.folder, name)
        if is_study or re.fullmatch(names.empty, name):
            patient = real.parent.name if names.nested else real.name
            name = name if names.nested else patient
            yield Study(name, patient, "petct", Source(ct), Source(pet), label)


def read_hecktor(root: Path, request: Request) -> Iterator[Study]:
    """HECKTOR: all patients in imagesTr and labelsTr (2022), or a folder for each (2025, 2026)."""
    patients = {}  # The patients of each folder that holds images.
    for folder in walk_folders(root):
        images = [stem for stem in stems(folder) if stem.endswith(("__CT", "__PT"))]
        other_task = {"Task 2", "Task 3"}.intersection(folder.relative_to(root).parts)
        if images and not other_task:  # The patients of other tasks are those of Task 1.
            patients[folder] = {stem.split("__")[0] for stem in images}

    # The test images have no masks; those to predict are the test images, if there are any.
    has_test_images = any(folder.name == "imagesTs" for folder in patients)
    unused = "imagesTr" if has_test_images and not request.labelled else "imagesTs"
    for folder, names in patients.items():
        if folder.name == unused:
            continue
        masks = folder
        if folder.name.startswith("images"):
            masks = folder.with_name(folder.name.replace("images", "labels"))
            if request.labelled:
                names.update(stems(masks))  # The images of a mask may be missing.
        for name in sorted(names):
            ct = Source(nifti(folder, f"{name}__CT"))
            pet = Source(nifti(folder, f"{name}__PT"))
            yield Study(name, name, "petct", ct, pet, nifti(masks, name), HECKTOR_CLASSES)


class BratsNames(NamedTuple):
    """How some years of BraTS name the files of a case and its labels."""

    flair: str  # The end of a file's name.
    t1gd: str
    patient: str  # The pattern of the patient at the head of a case's name.
    classes: Classes


BRATS = (
    # 2018 to 2021. Labels: 1 necrotic core, 2 edema, 4 enhancing tumour.
    BratsNames("flair", "t1ce", r".+", ((0, 0), (1, 2), (2, 1), (4, 2))),
    # 2023 and 2024. Labels: 3 enhancing tumour, 4 resection cavity.
    BratsNames("t2f", "t1c", r"BraTS-\w+-\d+", ((0, 0), (1, 2), (2, 1), (3, 2), (4, 0))),
)


def read_brats(root: Path, request: Request) -> Iterator[Study]:
    """BraTS as it is distributed: a folder for each case, perhaps below HGG and LGG."""
    for folder in walk_folders(root):
        files = {re.split("[_-]", stem)[-1].lower(): stem for stem in stems(folder)}
        for names in BRATS:
            if names.flair not in files and names.t1gd not in files:
                continue
            # What is missing would begin as the files that are there.
            end, stem = next(iter(files.items()))
            prefix = stem[: -len(end)]
            flair = files.get(names.flair, prefix + names.flair)
            t1gd = files.get(names.t1gd, prefix + names.t1gd)
            masks = [stem for stem in files.values() if "seg" in stem.lower()]
            mask = masks[0] if masks else f"{prefix}seg"
            patient = re.match(names.patient, folder.name)
            yield Study(
                name=folder.name,
                patient=patient[0] if patient else None,
                kind="mri",
                ct=Source(nifti(folder, flair)),
                pet=Source(nifti(folder, t1gd)),
                label=nifti(folder, mask),
                classes=names.classes,
            )


def read_nnunet(root: Path, request: Request) -> Iterator[Study | str]:
    """nnU-Net raw: a file for each channel of a case. AutoPET's names tell the patient."""
    dataset = read_dataset(root, request)
    if dataset is None:
        return
    files = stems(dataset.images)
    # The Decathlon's BRATS_0001 also ends in four digits, but dataset.json lists it as a case.
    if not any(re.search(r"_\d{4}$", stem) and stem not in dataset.training for stem in files):
        return

    yield from dataset.notes
    cases = {re.sub(r"_\d{4}$", "", stem) for stem in files}
    if request.labelled:
        cases.update(stems(dataset.masks))  # The images of a mask may be missing.
    for case in sorted(cases):
        patient = AUTOPET_PATIENT.match(case)
        yield Study(
            name=case,
            patient=patient[0] if patient else None,
            kind=dataset.channels.kind,
            ct=Source(nifti(dataset.images, f"{case}_{dataset.channels.ct:04d}")),
            pet=Source(nifti(dataset.images, f"{case}_{dataset.channels.pet:04d}")),
            label=nifti(dataset.masks, case),
            classes=dataset.classes,
        )


def read_decathlon(root: Path, request: Request) -> Iterator[Study | str]:
    """Medical Segmentation Decathlon: a 4D file for each case, with all channels."""
    dataset = read_dataset(root, request)
    if dataset is None:
        return
    yield from dataset.notes
    for case in dataset.training or stems(dataset.images):
        file = nifti(dataset.images, case)
        yield Study(
            name=case,
            patient=case,
            kind=dataset.channels.kind,
            ct=Source(file, dataset.channels.ct, dataset.count),
            pet=Source(file, dataset.channels.pet, dataset.count),
            label=nifti(dataset.masks, case),
            classes=dataset.classes,
        )


class Layout(NamedTuple):
    """A way in which studies lie in folders."""

    name: str
    files: str  # The files that are expected, for the user.
    read: Callable[[Path, Request], Iterator[Study | str]]  # Yields studies, and notes as str.
    described: bool = False  # dataset.json names channels and labels; options may replace them.
    reference: str = "pet"  # The slot of the image on whose grid masks lie.
    own_grids: bool = False  # The images lie on grids of their own, as the scanner made them.


# A folder has the first of these layouts that yields a study; a later one may see the same files.
LAYOUTS = (
    Layout(
        "nnU-Net raw",
        "dataset.json, imagesTr/<id>_0000.nii.gz or, to predict, <id>_{0000,0001}.nii.gz alone",
        read_nnunet,
        described=True,
    ),
    Layout(
        "Medical Segmentation Decathlon",
        "dataset.json, imagesTr/<id>.nii.gz",
        read_decathlon,
        described=True,
    ),
    Layout(
        "AutoPET (TCIA)",
        "PETCT_*/<study>/{SUV,CTres,SEG}.nii.gz",
        partial(read_folders, AUTOPET_FOLDERS),
    ),
    Layout("BraTS", "<case>/<case>_{flair,t1ce,seg}.nii.gz or -{t2f,t1c,seg}", read_brats),
    Layout(
        "Soft-tissue-Sarcoma (IBSI)",
        "<patient>/{CT_image,PET_image,PET_mask}.nii.gz",
        partial(read_folders, SARCOMA_FOLDERS),
        own_grids=True,
    ),
    Layout(
        "HECKTOR 2022, 2025 and 2026",
        "imagesTr/<id>__{CT,PT}.nii.gz or <id>/<id>__{CT,PT}.nii.gz",
        read_hecktor,
        reference="ct",
        own_grids=True,
    ),
    Layout(
        "DEEP-PSMA",
        "<patient>/{PSMA,FDG}/{CT,PET,TTB}.nii.gz",
        partial(read_folders, DEEP_PSMA_FOLDERS),
        own_grids=True,
    ),
)


# What users have in a folder in which no layout is recognised: the pattern of the name of a file or
# folder, the problem and the remedy.
NOT_READ = (
    (r"dataset\.json", "a dataset.json lies in {folder}", "Give that folder"),
    (r"imagesTr", "imagesTr without dataset.json", "Write one, as nnU-Net describes it"),
    (r".*\.(mh[ad]|nrrd)", "{file} is no NIfTI", "Convert such files to .nii.gz"),
    (r".*\.(dcm|ima)|DICOMDIR", "{file} is DICOM", "Convert it to .nii.gz, PET to SUV"),
    (r".*\.(zip|tar|tgz|tar\.gz|7z)", "{file} is an archive", "Unpack it"),
)


def explain_no_studies(root: Path) -> str:
    """What lies in a folder in which no layout is recognised, and what to do about it."""
    # With a dataset.json only the images are missing, or of a kind that is not read.
    has_description = (root / "dataset.json").exists()
    for path, folders, files in os.walk(root / "imagesTr" if has_description else root):
        for pattern, problem, remedy in NOT_READ:
            for name in sorted(folders + files):
                if re.fullmatch(pattern, name, re.IGNORECASE):
                    problem = problem.format(folder=path, file=Path(path, name))
                    return f"{problem}. {remedy}."

    if has_description:
        return "No .nii.gz or .nii lies in its imagesTr. Copy the images there."
    expected = [f"{layout.files} ({layout.name})" for layout in LAYOUTS]
    return f"Expected {', or '.join(expected)}."


# ------------------------------------------------------------------ finding the studies of a folder


class Recognised(NamedTuple):
    """A layout that was recognised in a folder, and what it yielded."""

    layout: Layout
    studies: list[Study]
    notes: list[str]

    @property
    def files(self) -> set[Path]:
        return {path for study in self.studies for path in study.paths}


def find_studies(
    root: Path,
    labelled: bool = True,
    channels=(),
    lesion_labels=(),
    own_grids: bool = False,
) -> StudyFolder:
    """Find all studies below `root`, whichever layout it has, and what is missing or there twice.

    labelled: every study needs a mask. Without, imagesTs is taken before imagesTr, and `root` may
    also be an images folder or a single study. channels, lesion_labels: such as ("ct=0", "pet=1")
    and (1, 2), where the names in dataset.json do not tell. own_grids: the images of a study may
    lie on grids of their own, also in a layout that promises one grid.

    Raises UserError if no studies are there, or if it is not clear which or what they are.
    """
    if not root.is_dir():
        problem = "a file" if root.exists() else "no such folder"
        raise UserError(
            f"{root}: {problem}. Give --data the folder that holds the studies, unpacked."
        )

    request = Request(labelled, parse_channels(channels), tuple(lesion_labels), own_grids)
    recognised = recognise_layouts(root, request)
    if not recognised:
        raise UserError(f"{root}: no studies found. {explain_no_studies(root)}")
    refuse_two_layouts(root, recognised)

    layout, candidates, notes = recognised[0]
    kind = candidates[0].kind
    refuse_flags_without_effect(layout, kind, request)
    studies, findings = collect_studies(candidates, layout, request)
    return StudyFolder(
        root=root,
        kind=kind,
        layout=layout.name,
        studies=studies,
        findings=findings,
        patients_known=all(study.patient for study in candidates),
        notes=notes,
    )


def recognise_layouts(root: Path, request: Request) -> list[Recognised]:
    """The layouts that yield a study of the folder, in the order of LAYOUTS."""
    recognised = []
    for layout in LAYOUTS:
        studies = []
        notes = []
        for item in layout.read(root, request):
            group = studies if isinstance(item, Study) else notes
            group.append(item)
        if studies:
            recognised.append(Recognised(layout, studies, notes))
    return recognised


def refuse_two_layouts(root: Path, recognised: list[Recognised]) -> None:
    """Raise UserError if a later layout sees none of the files that the first one sees."""
    first, *others = recognised
    for other in others:
        if first.files.isdisjoint(other.files):
            raise UserError(
                f"{root}: holds {first.layout.name} and {other.layout.name} "
                f"({other.studies[0].name}). Give a folder that holds one of them."
            )


def refuse_flags_without_effect(layout: Layout, kind: str, request: Request) -> None:
    """Raise UserError if an option is given that changes nothing for this layout."""
    unused = None
    if request.channels and not layout.described:
        unused = "--channels"

    # Without masks there are no labels, and those of MRI go by their names alone.
    takes_lesion_labels = layout.described and request.labelled and kind == "petct"
    if request.lesion_labels and not takes_lesion_labels:
        unused = "--lesion-labels"
    if unused:
        raise UserError(f"{unused} has no effect on {layout.name} here. Leave it out.")


def collect_studies(
    candidates: list[Study], layout: Layout, request: Request
) -> tuple[list[Study], list[Finding]]:
    """The studies whose files are all there, and findings on the others.

    Each study gets a patient, and what its layout and the request say of all studies.
    """
    studies = []
    findings = []
    folders: dict[str, Path] = {}  # The first folder of each study's name.
    spellings: dict[str, str] = {}  # Patients whose ids differ in case only are one.
    for study in candidates:
        # Where the layout does not tell the patient, each study counts as one of its own.
        patient = study.patient or study.name
        patient = spellings.setdefault(patient.lower(), patient)
        study = replace(
            study,
            patient=patient,
            label=study.label if request.labelled else None,
            reference=layout.reference,
            own_grids=layout.own_grids or request.own_grids,
        )

        problems = []
        for path in study.paths:
            problems.extend(missing_or_ambiguous(path, study.name))
        findings += problems

        if study.name in folders:
            problem = f"duplicate case {study.name}, also in {folders[study.name]}"
            findings.append(Finding(str(study.pet.path), problem, "Keep one of the two"))
        else:
            folders[study.name] = study.pet.path.parent
            if not problems:
                studies.append(study)
    return studies, findings


# ------------------------------------------------------------------ reading one study


class Volume(NamedTuple):
    """A NIfTI file: data (W, H, D) in the order of its axes, and its affine (4, 4) in mm."""

    data: np.ndarray
    affine: np.ndarray
    placed: bool = True  # False: neither sform nor qform says where it lies.
    sides_differ: bool = False  # sform and qform disagree on left and right.

    @property
    def grid(self) -> Grid:
        return Grid(self.data.shape, self.affine)


def bad_file(path: Path, problem: str, remedy: str = "Download or convert it again") -> BadStudy:
    return BadStudy(Finding(str(path), problem, remedy))


def read_nifti(path: Path, channels: int | None = None) -> Volume:
    """Read and check a 3D file, or a 4D file of so many channels.

    Raises BadStudy for a damaged file (the checksum of .nii.gz is tested), one that is no NIfTI,
    other axes, an impossible spacing or affine, and NaN or Inf.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise bad_file(path, f"cannot be read ({error})") from None

    # pixdim and scl_slope are read from the header as it is stored; nibabel corrects them.
    try:
        is_nifti2 = nib.Nifti2Header.may_contain_header(raw)
        image_class = nib.Nifti2Image if is_nifti2 else nib.Nifti1Image
        image = image_class.from_bytes(raw)
        header_class = image_class.header_class
        stored_header = header_class(raw[: header_class.sizeof_hdr], check=False)
        spacing = stored_header["pixdim"][1:4]
        slope = stored_header["scl_slope"]
    except Exception as error:  # Any failure of the parser means the same to the user.
        raise bad_file(path, f"not a NIfTI file ({error})") from None

    # A trailing axis of one, (W, H, D, 1), makes no difference.
    shape = image.shape
    axes = 3 if channels is None else 4
    while len(shape) > axes and shape[-1] == 1:
        shape = shape[:-1]

    voxels = image.dataobj
    usable = len(shape) == axes and min(shape) > 1 and voxels.dtype.kind in "iufb"
    if not usable or channels not in (None, shape[-1]):
        problem = f"wrong dimensions {shape} of type {voxels.dtype}"
        raise bad_file(path, problem, f"Expected 3 axes and {channels or 'no'} channels")

    if not np.all(np.isfinite(spacing) & (spacing > 0)):
        problem = f"spacing {spacing.tolist()} mm is not above zero"
        raise bad_file(path, problem, "Correct its pixdim")
    if not is_affine_of_scan(image.affine):
        problem = "its affine is not that of a scan in mm, with an inverse"
        raise bad_file(path, problem, "Correct sform and qform in its header")

    if np.isinf(slope):  # nibabel takes it for no scaling, which NaN means.
        raise bad_file(path, "scl_slope is infinite")
    if voxels.offset + math.prod(shape) * voxels.dtype.itemsize > len(raw):
        raise bad_file(path, "shorter than its header says")

    # nibabel would copy the voxels; this is a view of the bytes.
    data = np.ndarray(shape, voxels.dtype, raw, voxels.offset, order="F")
    if (voxels.slope, voxels.inter) != (1, 0):
        data = data * np.float32(voxels.slope) + np.float32(voxels.inter)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise bad_file(path, "NaN or Inf voxels", "Repair the conversion that wrote it")
    return Volume(data, image.affine, *read_placement(image.header))


def is_affine_of_scan(affine: np.ndarray) -> bool:
    """Whether an affine is finite, has an inverse and a spacing of 0.01 to 100 mm."""
    axes = affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    in_range = np.all((spacing >= 0.01) & (spacing <= 100))
    return in_range and np.isfinite(affine).all() and abs(np.linalg.det(axes)) > 1e-12


def read_placement(header) -> tuple[bool, bool]:
    """Whether a header says where the image lies, and whether it says two different things."""
    sform, _ = header.get_sform(coded=True)  # None if the header holds no sform.
    qform = None
    with suppress(Exception):  # nibabel reads a damaged qform only if there is no sform.
        qform, _ = header.get_qform(coded=True)
    if sform is None or qform is None:
        return sform is not None or qform is not None, False
    qform_to_sform = sform[:3, :3] @ np.linalg.inv(qform[:3, :3])
    return True, bool(qform_to_sform[0, 0] < 0)


def read_label(path: Path, classes: Classes) -> Volume:
    """Read a mask as uint8 classes (W, H, D). Raises BadStudy for a value outside `classes`."""
    volume = read_nifti(path)
    data = volume.data
    mapped = np.zeros(data.shape, np.uint8, order="F")
    known_voxels = 0
    for value, class_number in classes:
        has_value = data == value
        known_voxels += np.count_nonzero(has_value)
        if class_number:
            mapped[has_value] = class_number

    if known_voxels < data.size:
        known = [value for value, _ in classes]
        unknown = np.unique(data[~np.isin(data, known)])[:5].tolist()
        problem = f"label values {unknown} outside the expected set {set(known)}"
        raise bad_file(path, problem, "Correct the mask, or its names in dataset.json")
    return volume._replace(data=mapped)


def read_study(study: Study) -> dict[str, Volume]:
    """Read the images of a study by slot: pet, ct and, if it has a mask, label.

    They lie on one grid, unless study.own_grids: then the grid of the mask is that of pet or of ct.
    Raises BadStudy with every finding, not only the first.
    """
    files = {}  # Each file is read once: a 4D file holds both images.
    findings = []
    for path in study.paths:
        try:
            if path == study.label:
                files[path] = read_label(path, study.classes)
            else:
                files[path] = read_nifti(path, study.pet.channels)
        except BadStudy as error:
            findings += error.findings

    volumes = {}
    for slot, source in study.sources.items():
        if source.path in files:
            volume = files[source.path]
            if source.channel is not None:
                volume = volume._replace(data=volume.data[..., source.channel])
            volumes[slot] = volume

    compare = compare_own_grids if study.own_grids else compare_grids
    findings += compare(study, volumes)
    if findings:
        raise BadStudy(*findings)
    return volumes


def compare_grids(study: Study, volumes: dict[str, Volume]) -> Iterator[Finding]:
    """Every image of a study that does not lie on the grid of its PET, if that could be read."""
    for slot, volume in volumes.items():
        reference = volumes.get("pet", volume)
        problem = grid_difference(volume.grid, reference.grid, study.pet.path.name)
        if problem:
            remedy = "Resample it to that grid, or say that the images have their own: --own-grids"
            yield Finding(str(study.sources[slot].path), problem, remedy)


def compare_own_grids(study: Study, volumes: dict[str, Volume]) -> Iterator[Finding]:
    """What is wrong with the grids of images that may lie on grids of their own."""
    if not {"pet", "ct"} <= volumes.keys():
        return
    pet = volumes["pet"]
    ct = volumes["ct"]

    if "label" in volumes:
        label = volumes["label"]
        to_pet = grid_difference(label.grid, pet.grid, study.pet.path.name)
        to_ct = grid_difference(label.grid, ct.grid, study.ct.path.name)
        if to_pet and to_ct:
            problem = f"{to_pet}; its {to_ct}"
            yield Finding(str(study.label), problem, "Resample it to one of these grids")

    # PET is often wider than CT, but what lies there is air.
    warm = pet.data > pet.data.mean()
    share = share_inside(pet.grid, ct.grid, warm) if warm.any() else 1
    if share < 0.5:
        problem = f"only {share:.0%} of it lies inside the field of view of {study.ct.path.name}"
        yield Finding(str(study.pet.path), problem, "Are both of one study? Correct the affines")


def reference_slot(study: Study, volumes: dict[str, Volume]) -> str:
    """The slot of the image, pet or ct, on whose grid the mask of a study lies or would lie."""
    label = volumes.get("label")
    if label is None:
        return study.reference
    return "pet" if same_grid(label.grid, volumes["pet"].grid) else "ct"


# ------------------------------------------------------------------ checking the values


def check_values(study: Study, volumes: dict[str, Volume]) -> dict:
    """Compare the values of a study with the CHECKS of checks.py.

    Returns its facts: suv and hu, the medians in the body (None for MRI), placed, whether all
    headers say where the images lie, and warnings in words. Raises BadStudy with the first check
    that refuses the study.
    """
    grid = volumes[reference_slot(study, volumes)].grid
    images = {}
    for slot, volume in volumes.items():
        # Its lowest value beyond its field of view adds no value that the image does not have.
        lowest = volume.data.min()
        images[slot] = resample_to(volume.data, volume.affine, grid, order=0, outside=lowest)

    measured = measure_images(images, units=study.kind == "petct")
    measured["sides_differ"] = any(volume.sides_differ for volume in volumes.values())

    warnings = []
    for check, problem in failed_checks(measured):
        finding = Finding(str(study.sources[check.slot].path), problem, check.remedy)
        if check.refused:
            raise BadStudy(finding)
        warnings.append(f"warning: {finding}")
    return {
        "suv": measured.get("pet_median"),
        "hu": measured.get("ct_median"),
        "placed": all(volume.placed for volume in volumes.values()),
        "warnings": warnings,
    }


def summarize_facts(facts: list[dict]) -> list[str]:
    """Lines on the facts of all studies (see check_values), to let the user see what is off."""
    lines = []
    medians = [(study["suv"], study["hu"]) for study in facts if study["suv"] is not None]
    if medians:
        suv, hu = np.median(medians, axis=0)
        lines.append(f"median SUV {suv:.2f} and HU {hu:.0f} in the body")

    unplaced = sum(not study["placed"] for study in facts)
    if unplaced:
        lines.append(f"{unplaced} studies have neither sform nor qform: left and right are guessed")

    for study in facts:
        lines += study["warnings"]
    return lines


def list_findings(findings: list[Finding]) -> str:
    """The number of findings and of their files, then a line for each finding."""
    files = {finding.file for finding in findings}
    lines = "".join(f"\n  {finding}" for finding in sorted(findings))
    return f"{len(findings)} problems in {len(files)} files:{lines}"


# ------------------------------------------------------------------ the command


def check_study(study: Study) -> tuple[dict | None, list[Finding]]:
    """Read and check a study: its facts, or None and the findings."""
    try:
        volumes = read_study(study)
        facts = check_values(study, volumes)
    except BadStudy as error:
        return None, error.findings
    has_lesion = "label" in volumes and volumes["label"].data.any()
    return {**facts, "has_lesion": has_lesion}, []


def studies_command(argv: list[str] | None = None) -> None:
    """Print what a folder holds. Raises UserError with all findings, if there are any."""
    parser = Parser(description="Print what a folder of studies holds, and what is wrong with it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--predict", action="store_true", help="The studies have no masks.")
    parser.add_argument("--channels", nargs="+", default=(), metavar="", help="Such as ct=0 pet=1.")
    parser.add_argument("--lesion-labels", nargs="+", type=int, default=(), metavar="")
    parser.add_argument("--own-grids", action="store_true", help="Of CT and PET, in any layout.")
    args = parser.parse_args(argv)

    # How the folder was understood, with the files of its first study as an example.
    folder = find_studies(
        args.folder,
        labelled=not args.predict,
        channels=args.channels,
        lesion_labels=args.lesion_labels,
        own_grids=args.own_grids,
    )
    print(f"layout     {folder.layout}, {folder.kind}")
    for note in folder.notes:
        print(f"           {note}")
    for study in folder.studies[:1]:
        for slot, source in study.sources.items():
            channel = "" if source.channel is None else f", channel {source.channel}"
            print(f"{slot:<11}{source.path}{channel}")

    count = len(folder.studies)
    facts = []
    findings = list(folder.findings)
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(check_study, folder.studies)
        for study_facts, study_findings in progress(results, "check", "study", count):
            findings += study_findings
            if study_facts:
                facts.append(study_facts)

    patients = {study.patient for study in folder.studies}
    positive = sum(study["has_lesion"] for study in facts)
    print(f"studies    {count} of {len(patients)} patients, {positive} with a lesion")
    for line in summarize_facts(facts):
        print(f"           {line}")
    if findings:
        raise UserError(list_findings(findings))
    print("no problem was found")


if __name__ == "__main__":
    command_line(studies_command)
