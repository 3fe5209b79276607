"""Tiny copies of the folders that users have, by their real names: each trains and predicts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import las, mri_arrays, petct_arrays, write_nifti

import eval
import train
from files import write_json
from runs import load_checkpoint
from studies import find_studies, read_study

HEX = [f"{i:x}{i:x}7c1e09ab" for i in range(3)]
FDG = [f"fdg_{x}_0{x[0]}-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-1{x[0]}445" for x in HEX]
PSMA = [f"psma_{x}2f84be_2018-04-1{i}" for i, x in enumerate(HEX)]
MRI = {"flair": "FLAIR", "t1": "T1w", "t1ce": "t1gd", "t2": "T2w"}  # suffix -> mri_arrays
MRI_2023 = {"t2f": "FLAIR", "t1n": "T1w", "t1c": "t1gd", "t2w": "T2w"}


def nnunet(cases, channels, labels, arrays, splits=False):
    """A writer of an nnU-Net raw folder; arrays(i) gives the images in order, then the mask."""

    def write(root):
        for i, case in enumerate(cases):
            *images, mask = arrays(i)
            for k, image in enumerate(images):
                write_nifti(root / f"imagesTr/{case}_{k:04d}.nii.gz", image, las())
            write_nifti(root / f"labelsTr/{case}.nii.gz", mask, las())
        names = {str(k): name for k, name in enumerate(channels)}
        content = {"channel_names": names, "labels": labels, "file_ending": ".nii.gz"}
        write_json(root / "dataset.json", content | {"numTraining": len(cases) + 1})
        if splits:
            folds = [{"train": cases[:2], "val": cases[2:]}, {"train": cases[1:], "val": cases[:1]}]
            write_json(root / "splits_final.json", folds)

    return write


def brats(folders, suffixes, between, end, labels, mask="seg", named=True):
    """A writer of BraTS; labels: the values of background, edema, core and enhancing tumour."""

    def write(root):
        for i, folder in enumerate(folders):
            made, case = mri_arrays(i), folder.split("/")[-1] if named else ""
            for suffix, name in suffixes.items():
                write_nifti(root / folder / f"{case}{between}{suffix}{end}", made[name], las())
            seg = np.choose(made["label"], labels).astype(np.uint8)
            if labels == NEW:
                seg[2, 2, 2] = 4  # the cavity of a resection is no tumour
            stem = mask if i == 0 and mask != "seg" else f"{case}{between}seg"
            write_nifti(root / folder / f"{stem}{end}", seg, las())

    return write


def tree(patients):
    def write(root):
        for i, patient in enumerate(patients):
            for stem, array in petct_arrays(i).items():
                write_nifti(
                    root / patient / "01-01-2000-NA-PET-CT" / f"{stem}.nii.gz", array, las()
                )

    return write


def decathlon(root):
    for i in range(3):
        made, case = mri_arrays(i), f"BRATS_{i:03d}.nii.gz"
        stack = np.stack([made[name] for name in MRI.values()], -1)
        write_nifti(root / "imagesTr" / case, stack, las())
        write_nifti(root / "labelsTr" / case, made["label"], las())
    labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    names = {str(k): name for k, name in enumerate(MRI.values())}
    write_json(root / "dataset.json", {"modality": names, "labels": labels})


def pet_ct(i, lesion=1, other=None):
    made = petct_arrays(i)
    if other:  # a corner of the body that is no lesion
        made["SEG"][12, 9, 3] = other
    return made["CTres"], made["SUV"], made["SEG"] * np.uint8(lesion) if lesion > 1 else made["SEG"]


def gtv(i):
    ct, pet, mask = pet_ct(i)
    mask[11] *= 2
    return ct, pet, mask


def four(i):
    made = mri_arrays(i)
    return *(made[name] for name in MRI.values()), made["label"]


TUMOUR = {"background": 0, "tumor": 1}
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
PARTS = {"background": 0, "SNFH": 1, "NETC": 2, "ET": 3}
CTS, T2, T3 = ("CT", "CT"), [f"BraTS20_Training_00{i}" for i in range(3)], "BraTS-GLI-0000{}-10{}"
OLD, NEW, IN_2018 = (0, 2, 1, 4), (0, 2, 1, 3), [f"HGG/Brats18_TCIA0{i}_1" for i in range(3)]
IN_2024 = [T3.format(i // 2, i % 2) for i in range(5)]

# Its writer, the options that it needs, names and patients, words that the console says.
ROWS = {
    "autoPET III, FDG": (nnunet(FDG, CTS, TUMOUR, pet_ct), {}, FDG, [f"fdg_{x}" for x in HEX],
                         ["both channels are named CT", "numTraining 4, 3 masks"]),
    "autoPET III, PSMA": (nnunet(PSMA, CTS, TUMOUR, pet_ct), {}, PSMA,
                          [f"psma_{x}2f84be" for x in HEX], ["0 is CT and 1 is SUV"]),
    "its splits": (nnunet(FDG, CTS, TUMOUR, pet_ct, splits=True), {"splits": "splits_final.json"},
                   FDG, [f"fdg_{x}" for x in HEX], []),
    "channels by number": (nnunet(PSMA, ("x", "y"), TUMOUR, pet_ct),
                           {"channels": ("ct=0", "pet=1")}, PSMA,
                           [f"psma_{x}2f84be" for x in HEX], []),
    "one label": (nnunet("abc", ("CT", "FDG-PET"), {"background": 0, "uptake": 1}, pet_ct), {},
                  [*"abc"], [*"abc"], ["names do not tell the patient"]),
    "HECKTOR": (nnunet("abc", ("CT", "PT"), {"background": 0, "GTVp": 1, "GTVn": 2}, gtv), {},
                [*"abc"], [*"abc"], []),
    "named lesions": (nnunet("abc", ("CT", "SUVbw"), {"background": 0, "liver": 3, "peri lesion": 2,
                      "primary_tumour": 1}, lambda i: pet_ct(i, other=3)), {}, [*"abc"], [*"abc"],
                      ["lesions: 1 primary tumour; background: 2 peri lesion, 3 liver"]),
    "lesions by number": (nnunet("abc", ("CT", "PET"), {"background": 0, "hot": 1, "warm": 2}, gtv),
                          {"lesion_labels": (1, 2)}, [*"abc"], [*"abc"], []),
    "BraTS 2018": (brats(IN_2018, MRI, "_", ".nii.gz", OLD), {},
                   [n[4:] for n in IN_2018], [n[4:] for n in IN_2018], []),
    "BraTS, cases named by folders": (
        brats(T2, MRI, "", ".nii.gz", OLD, named=False), {}, T2, T2, []),
    "BraTS 2020": (brats(T2, MRI, "_", ".nii", OLD, mask="W39_1998.09.19_Segm"), {}, T2, T2, []),
    "BraTS 2024": (brats(IN_2024, MRI_2023, "-", ".nii.gz", NEW), {}, IN_2024,
                   [name[:15] for name in IN_2024], []),
    "regions": (nnunet("abc", MRI, REGIONS, four), {}, [*"abc"], [*"abc"], []),
    "parts": (nnunet("abc", MRI, PARTS, four), {}, [*"abc"], [*"abc"], []),
    "Decathlon": (decathlon, {}, [f"BRATS_00{i}" for i in range(3)],
                  [f"BRATS_00{i}" for i in range(3)], []),
    "AutoPET tree": (tree([f"PETCT_{x}" for x in HEX]), {},
                     [f"PETCT_{x}/01-01-2000-NA-PET-CT" for x in HEX],
                     [f"PETCT_{x}" for x in HEX], []),
    "PSMA tree": (tree([f"PSMA_{x}2f84be" for x in HEX]), {},
                  [f"PSMA_{x}2f84be/01-01-2000-NA-PET-CT" for x in HEX],
                  [f"PSMA_{x}2f84be" for x in HEX], []),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_layout_trains_and_predicts(base, tmp_path, monkeypatch, capsys, row):
    write, options, names, patients, words = ROWS[row]
    root = tmp_path / "data of a user"
    write(root)
    told = options | {n: str(root / f) for n, f in options.items() if n == "splits"}
    named = {n: options[n] for n in ("channels", "lesion_labels") if n in options}
    found = find_studies(root, **named)
    assert [s.name for s in found.studies] == sorted(names) and found.findings == []
    assert [s.patient for s in found.studies] == sorted(patients)
    order = sorted(range(len(names)), key=lambda i: names[i])
    for i, study in zip(order, found.studies, strict=True):
        volumes = read_study(study)
        made = petct_arrays(i) if found.kind == "petct" else mri_arrays(i)
        ct, pet = ("CTres", "SUV") if found.kind == "petct" else ("FLAIR", "t1gd")
        truth = made["SEG"] if found.kind == "petct" else np.minimum(made["label"], 2)
        for slot, array in (("ct", made[ct]), ("pet", made[pet]), ("label", truth)):
            assert np.array_equal(volumes[slot].data, array), slot
    monkeypatch.setattr(train.plots, "pictures", lambda *args: None)
    config = replace(
        base, version="v2", data=str(root), cache=str(tmp_path / "cache"), epochs=1, steps=1,
        phi=None, spacing=(8.0,) * 3, out=str(tmp_path / "run"), **told,
    )  # fmt: skip
    train.train(config)
    said = capsys.readouterr().out
    assert all(word in said for word in words), said
    if "splits" in options:
        splits = json.loads((tmp_path / "run/splits.json").read_text())
        assert splits["test"] == FDG[2:] and {*splits["train"], *splits["val"]} == {*FDG[:2]}
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1
    to_predict = ["--channels", *options["channels"]] if "channels" in options else []
    line = [str(tmp_path / "run"), "--predict", str(root), "--out", str(tmp_path / "masks")]
    eval.run_command(line + to_predict)
    masks = {path.name for path in (tmp_path / "masks").iterdir()}
    assert masks == {f"{name.replace('/', '__')}.nii.gz" for name in names}
    if row == "autoPET III, FDG":
        (root / "dataset.json").unlink()
        shutil.rmtree(tmp_path / "masks")
        line[2] = str(root / "imagesTr")
        eval.run_command(line)
        assert {path.name for path in (tmp_path / "masks").iterdir()} == masks
        assert "_0000 is taken for CT and _0001 for PET" in capsys.readouterr().err
