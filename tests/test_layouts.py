"""Tiny copies of the folders that users have, by their real names: each trains and predicts."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from conftest import (
    MSD_LABELS,
    PETCT_LABELS,
    las,
    mri_arrays,
    on_own_grids,
    petct_arrays,
    write_decathlon,
    write_nifti,
    write_nnunet,
    write_study,
)

import eval
import train
from common import write_json
from runs import load_checkpoint
from studies import find_studies, read_study, studies_command

FLAIR_TO_T2 = ("FLAIR", "T1w", "t1gd", "T2w")  # the images of mri_arrays
HEX = ["007c1e09ab", "117c1e09ab", "227c1e09ab"]
FDG = [f"fdg_{x}_0{x[0]}-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-1{x[0]}445" for x in HEX]
PSMA = [f"psma_{x}2f84be_2018-04-1{x[0]}" for x in HEX]


def petct_images(i):
    return [*petct_arrays(i).values()]


def gtv_images(i):
    """A lesion of two labels."""
    ct, pet, mask = petct_images(i)
    mask[11] *= 2
    return ct, pet, mask


def liver_images(i):
    """A corner of the body has label 3, which is no lesion."""
    ct, pet, mask = petct_images(i)
    mask[12, 9, 3] = 3
    return ct, pet, mask


def mri_images(i):
    arrays = mri_arrays(i)
    return [arrays[name] for name in (*FLAIR_TO_T2, "label")]


def nnunet(cases, channels=("CT", "PET"), labels=PETCT_LABELS, images=petct_images):
    """A writer of an nnU-Net raw folder, where images(i) are those of a case, then the mask."""

    def write(root):
        arrays = {case: images(i) for i, case in enumerate(cases)}
        write_nnunet(root, arrays, channels, labels)

    return write


def write_autopet(root):
    nnunet(FDG, ("CT", "CT"))(root)
    folds = [{"train": FDG[:2], "val": FDG[2:]}, {"train": FDG[1:], "val": FDG[:1]}]
    write_json(root / "splits_final.json", folds)


def brats(folders, ends, separator="_", mask="seg", labels=(0, 2, 1, 4), end=".nii.gz"):
    """A writer of BraTS; labels: the values of background, edema, core and enhancing tumour.

    mask: the first case names its mask so.
    """

    def write(root):
        for i, folder in enumerate(folders):
            *images, label = mri_images(i)
            seg = np.choose(label, labels).astype(np.uint8)
            if ends[0] == "t2f":
                seg[2, 2, 2] = 4  # the cavity of a resection is no tumour
            case = folder.split("/")[-1]
            arrays = {}
            for name, image in zip((*ends, "seg"), (*images, seg), strict=True):
                arrays[f"{case}{separator}{name}" if separator else name] = image
            if mask != "seg" and i == 0:
                arrays[mask] = arrays.pop(f"{case}{separator}seg")
            write_study(root / folder, arrays, end=end)

    return write


def write_tree(root):
    for i, x in enumerate(HEX):
        write_study(root / f"PETCT_{x}" / "01-01-2000-NA-PET-CT", petct_arrays(i))


def write_own_grids(folder, names, i, mask="SUV", images=petct_images):
    """The images of a study on grids of their own. names: of the files of CT, PET and mask."""
    arrays = dict(zip(("CTres", "SUV", "SEG"), images(i), strict=True))
    for name, image in zip(names, on_own_grids(arrays, mask).values(), strict=True):
        write_nifti(folder / f"{name}.nii.gz", *image)


def write_sarcoma(root):
    for i, name in enumerate(SARCOMA):
        write_own_grids(root / name, ("CT_image", "PET_image", "PET_mask"), i)
        (root / name / "CT_mask.nii.gz").write_text("not read")


def write_hecktor_2022(root):
    for i, name in enumerate(HECKTOR):
        images = (f"imagesTr/{name}__CT", f"imagesTr/{name}__PT", f"labelsTr/{name}")
        write_own_grids(root, images, i, "CTres", gtv_images)
    (root / "hecktor2022_endpoint_training.csv").write_text("PatientID")


def write_hecktor_2025(root):
    for i, name in enumerate(HECKTOR):
        images = (f"{name}__CT", f"{name}__PT", name)
        write_own_grids(root / "Task 1" / name, images, i, "CTres", gtv_images)
        for task in ("Task 2", "Task 3"):
            shutil.copytree(root / "Task 1" / name, root / task / name)
        (root / "Task 2" / name / f"{name}__RTDOSE.nii.gz").write_text("not read")


def write_deep_psma(root):
    for i, name in enumerate(DEEP_PSMA):
        write_own_grids(root / name, ("CT", "PET", "TTB"), i)
        (root / name / "totseg_24.nii.gz").write_text("not read")


def write_nnunet_on_own_grids(root):
    nnunet(ABC)(root)
    for i, case in enumerate(ABC):
        ct, affine = on_own_grids(petct_arrays(i))["CTres"]
        write_nifti(root / "imagesTr" / f"{case}_0000.nii.gz", ct, affine)


def decathlon(root):
    cases = {f"BRATS_00{i}": mri_arrays(i) for i in range(3)}
    write_decathlon(root, cases, FLAIR_TO_T2, MSD_LABELS, las())


SARCOMA = [f"STS_00{i}" for i in range(1, 4)]
HECKTOR = ["CHUM-001", "CHUP-002", "USZ-003"]
DEEP_PSMA = [f"train_000{i}/{tracer}" for i in (1, 2, 3) for tracer in ("FDG", "PSMA")]
BRATS_2020 = [f"BraTS20_Training_00{i}" for i in range(3)]
BRATS_2018 = [f"Brats18_TCIA0{i}_1" for i in range(3)]
BRATS_2024 = [f"BraTS-GLI-0000{i // 2}-10{i % 2}" for i in range(5)]
OLD_ENDS = ("flair", "t1", "t1ce", "t2")
NEW_ENDS = ("t2f", "t1n", "t1c", "t2w")
GTVS = {"background": 0, "GTVp": 1, "GTVn": 2}
NAMED = {"background": 0, "liver": 3, "peri lesion": 2, "primary_tumour": 1}
FDG_PATIENTS = [f"fdg_{x}" for x in HEX]
PSMA_PATIENTS = [f"psma_{x}2f84be" for x in HEX]


class Example(NamedTuple):
    write: Callable
    names: list[str]
    patients: list[str] = []  # none: as the names
    words: tuple[str, ...] = ()  # what is printed
    options: dict = {}


ABC = ["a", "b", "c"]
NUMBERED = {"channels": ("ct=0", "pet=1")}
EXAMPLES = {
    "autoPET III, FDG": Example(
        write_autopet,
        FDG,
        FDG_PATIENTS,
        ("both channels are named CT", "0 is CT and 1 is SUV"),
    ),
    "channels by number": Example(nnunet(PSMA, ("x", "y")), PSMA, PSMA_PATIENTS, options=NUMBERED),
    "one label": Example(
        nnunet(ABC, ("CT", "FDG-PET"), {"background": 0, "uptake": 1}),
        ABC,
        words=("names do not tell the patient",),
    ),
    "HECKTOR": Example(nnunet(ABC, ("CT", "PT"), GTVS, gtv_images), ABC),
    "named lesions": Example(
        nnunet(ABC, ("CT", "SUVbw"), NAMED, liver_images),
        ABC,
        words=("have the classes {0: 0, 1: 1, 2: 0, 3: 0}",),
    ),
    "lesions by number": Example(
        nnunet(ABC, labels={"background": 0, "hot": 1, "warm": 2}, images=gtv_images),
        ABC,
        options={"lesion_labels": (1, 2)},
    ),
    "BraTS 2018": Example(brats([f"HGG/{name}" for name in BRATS_2018], OLD_ENDS), BRATS_2018),
    "BraTS, cases named by folders": Example(brats(BRATS_2020, OLD_ENDS, separator=""), BRATS_2020),
    "BraTS 2020": Example(
        brats(BRATS_2020, OLD_ENDS, mask="W39_1998.09.19_Segm", end=".nii"),
        BRATS_2020,
    ),
    "BraTS 2024": Example(
        brats(BRATS_2024, NEW_ENDS, separator="-", labels=(0, 2, 1, 3)),
        BRATS_2024,
        [name[:15] for name in BRATS_2024],
    ),
    "Decathlon": Example(decathlon, [f"BRATS_00{i}" for i in range(3)]),
    "AutoPET tree": Example(
        write_tree,
        [f"PETCT_{x}/01-01-2000-NA-PET-CT" for x in HEX],
        [f"PETCT_{x}" for x in HEX],
    ),
    "Soft-tissue-Sarcoma": Example(write_sarcoma, SARCOMA),
    "HECKTOR 2022": Example(write_hecktor_2022, HECKTOR),
    "HECKTOR 2025": Example(write_hecktor_2025, HECKTOR),
    "DEEP-PSMA": Example(
        write_deep_psma,
        DEEP_PSMA,
        [name[:10] for name in DEEP_PSMA],
        words=("run, fdg", "run, psma"),
    ),
    "own grids in nnU-Net raw": Example(
        write_nnunet_on_own_grids, ABC, options={"own_grids": True}
    ),
}


@pytest.mark.parametrize(
    "name", ["Soft-tissue-Sarcoma", "HECKTOR 2022", "HECKTOR 2025", "DEEP-PSMA"]
)
def test_missing_files_of_a_layout(tmp_path, name):
    EXAMPLES[name].write(tmp_path)
    studies = find_studies(tmp_path).studies
    for path in studies[0].paths:
        away = path.rename(path.with_suffix(".away"))
        folder = find_studies(tmp_path)
        (finding,) = folder.findings
        assert finding[:2] == (str(path), "missing file")
        assert folder.studies == studies[1:]
        away.rename(path)


def arrays_of(study, i):
    """What the files of the i-th study of an example hold, by slot."""
    if study.kind == "mri":
        ct, _, pet, _, label = mri_images(i)
        return {"ct": ct, "pet": pet, "label": np.minimum(label, 2)}

    arrays = petct_arrays(i)
    if study.own_grids:
        mask = "CTres" if study.reference == "ct" else "SUV"
        for stem, (array, _) in on_own_grids(arrays, mask).items():
            arrays[stem] = array
    return {"ct": arrays["CTres"], "pet": arrays["SUV"], "label": arrays["SEG"]}


def as_flags(options):
    flags = []
    for name, values in options.items():
        flags.append(f"--{name.replace('_', '-')}")
        if values is not True:
            flags += map(str, values)
    return flags


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_layout_trains_and_predicts(base, tmp_path, monkeypatch, capsys, name):
    example = EXAMPLES[name]
    root = tmp_path / "data of a user"
    example.write(root)
    splits = root / "splits_final.json"
    folder = find_studies(root, **example.options)
    assert [study.name for study in folder.studies] == example.names and folder.findings == []
    studies_command([str(root), *as_flags(example.options)])
    assert capsys.readouterr().out.startswith(f"layout     {folder.layout}, {folder.kind}\n")
    patients = [study.patient for study in folder.studies]
    assert patients == (example.patients or example.names)

    for i, study in enumerate(folder.studies):
        volumes = read_study(study)
        for slot, array in arrays_of(study, i).items():
            assert np.array_equal(volumes[slot].data, array), slot

    monkeypatch.setattr(train.plots, "draw_examples", lambda *args: None)
    config = replace(
        base,
        version="v2",
        data=str(root),
        cache=str(tmp_path / "cache"),
        epochs=1,
        steps=1,
        phi=None,
        spacing=(8.0,) * 3,
        splits=str(splits) if splits.exists() else None,
        out=str(tmp_path / "run"),
        **example.options,
    )
    train.train(config)
    printed = capsys.readouterr().out
    for words in (folder.layout, *example.words):
        assert words in printed
    if splits.exists():
        chosen = json.loads((tmp_path / "run/splits.json").read_text())
        assert chosen["test"] == FDG[2:] and sorted(chosen["train"] + chosen["val"]) == FDG[:2]
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1

    line = [str(tmp_path / "run"), "--out", str(tmp_path / "masks"), "--predict", str(root)]
    options = {**example.options}
    options.pop("lesion_labels", None)  # There are no masks to read.
    eval.eval_command([*line, *as_flags(options)])
    masks = {path.name for path in (tmp_path / "masks").iterdir()}
    assert masks == {f"{name.replace('/', '__')}.nii.gz" for name in example.names}
    for study in folder.studies:
        written = nib.load(tmp_path / "masks" / eval.mask_name(study))
        reference = nib.load(study.label)
        assert written.shape == reference.shape and np.all(written.affine == reference.affine)
        assert study.reference == ("ct" if "HECKTOR 20" in name else "pet")
    if name == "autoPET III, FDG":
        (root / "dataset.json").unlink()
        shutil.rmtree(tmp_path / "masks")
        eval.eval_command([*line[:-1], str(root / "imagesTr")])
        assert {path.name for path in (tmp_path / "masks").iterdir()} == masks
        assert "_0000 is taken for CT and _0001 for PET" in capsys.readouterr().err
