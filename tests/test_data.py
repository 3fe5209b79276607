"""data.py against answers derived another way: by hand, by scipy, or from how data were made."""

import gzip
import json
import os
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import MSD_CHANNELS, las, mri_arrays, petct_arrays, stored_as, write_nifti
from scipy import ndimage
from torch.utils.data import DataLoader

import data
from data import BadStudy, Case, Patches, Schedule, Source, Study, UserError

PETCT, MRI = data.PREPROCESSING["petct"], data.PREPROCESSING["mri"]
WHOLE = 1000.0  # mm of margin: no crop
STEMS = ("CTres", "SUV", "SEG")


def petct_study(folder, end=".nii.gz"):
    ct, suv, seg = (folder / (stem + end) for stem in STEMS)
    return Study("case", "patient", "petct", Source(ct), Source(suv), seg)


def write_petct(folder, arrays, affine, end=".nii.gz", **kwargs):
    for stem in STEMS:
        write_nifti(folder / (stem + end), arrays[stem], affine, **kwargs)
    return petct_study(folder, end)


def findings_of(study):
    with pytest.raises(BadStudy) as caught:
        data.preprocess(study, PETCT if study.kind == "petct" else MRI)
    return caught.value.findings


def scaled_petct(arrays):
    """Sec. 3.4 by hand: HU in [-100, 250] and SUV in [0, 15], each to [0, 1]."""
    ct = (np.clip(arrays["CTres"].astype(float), -100, 250) + 100) / 350
    return np.stack([ct, np.clip(arrays["SUV"].astype(float), 0, 15) / 15])


def prepare(root, cache, settings=None, **kwargs):
    found = data.find_studies(root)
    kwargs.setdefault("say", lambda line: None)
    settings = settings or data.PREPROCESSING[found.kind]
    return data.prepare(root, found, settings, cache, workers=1, **kwargs)


def message_of(call, *args, **kwargs):
    """The text of the UserError that `call` must raise."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ------------------------------------------------------------------ layouts


def test_tcia_layout(tcia):
    found = data.find_studies(tcia(3))
    assert (found.kind, found.layout, found.patients_known) == ("petct", "AutoPET (TCIA)", True)
    assert [s.name for s in found.studies] == [
        f"PETCT_{i:010x}/01-01-2000-NA-PET-CT" for i in range(3)
    ]
    assert [s.patient for s in found.studies] == [f"PETCT_{i:010x}" for i in range(3)]
    assert found.findings == []


@pytest.mark.parametrize("channels", [("CT", "PET"), ("PET", "CT"), ("other", "suv", "CTres")])
def test_nnunet_channels_go_by_name(nnunet, channels):
    root = nnunet(1, ("CT", "PET"))
    place = {"CT": 0, "CTres": 0, "PET": 1, "suv": 1}
    files = [root / f"imagesTr/case_000_{i:04d}.nii.gz" for i in range(2)]
    raw = [file.read_bytes() for file in files]
    for i, channel in enumerate(channels):
        target = root / f"imagesTr/case_000_{i:04d}.nii.gz"
        target.write_bytes(raw[place[channel]] if channel in place else b"not used")
    description = json.loads((root / "dataset.json").read_text())
    description["channel_names"] = {str(i): name for i, name in enumerate(channels)}
    (root / "dataset.json").write_text(json.dumps(description))
    found = data.find_studies(root)
    assert (found.kind, found.layout) == ("petct", "nnU-Net raw")
    assert not found.patients_known
    settings = replace(PETCT, spacing=(4.0, 4.0, 5.0), margin_mm=WHOLE)
    arrays, _ = data.preprocess(found.studies[0], settings)
    np.testing.assert_allclose(arrays["images"], scaled_petct(petct_arrays(0)), atol=1e-3)


@pytest.mark.parametrize(
    "channels",
    [MSD_CHANNELS, ("T2w", "t1gd", "T1w", "FLAIR"), ("T1-Gd", "flair"), ("T1w", "FLAIR", "T1ce")],
)
def test_msd_channels_go_by_name(tmp_path, msd, channels):
    root = msd(1)
    made, of = mri_arrays(0), {"T1-Gd": "t1gd", "T1ce": "t1gd", "flair": "FLAIR"}
    stack = np.stack([made[of.get(name, name)] for name in channels], -1)
    write_nifti(root / "imagesTr/BRATS_001.nii.gz", stack, np.eye(4))
    description = json.loads((root / "dataset.json").read_text())
    description["modality"] = {str(i): name for i, name in enumerate(channels)}
    (root / "dataset.json").write_text(json.dumps(description))
    found = data.find_studies(root)
    assert (found.kind, found.layout) == ("mri", "Medical Segmentation Decathlon")
    arrays, _ = data.preprocess(found.studies[0], replace(MRI, margin_mm=WHOLE))
    for slot, name in enumerate(("FLAIR", "t1gd")):
        image = made[name].astype(float)
        brain = image[image != 0]
        expected = np.where(image != 0, (image - brain.mean()) / brain.std(), 0)
        np.testing.assert_allclose(arrays["images"][slot], expected, atol=2e-3)


def test_msd_classes_go_by_name(msd):
    labels = {"0": "background", "1": "enhancing tumor", "2": "Oedema", "3": "necrosis"}
    found = data.find_studies(msd(1, labels=labels))
    arrays, meta = data.preprocess(found.studies[0], replace(MRI, margin_mm=WHOLE))
    assert np.array_equal(arrays["label"], np.choose(mri_arrays(0)["label"], (0, 2, 1, 2)))
    assert meta["lesion_voxels"] == np.count_nonzero(mri_arrays(0)["label"])


def test_hidden_files_are_ignored(tcia, nnunet, msd):
    roots = [tcia(1), nnunet(1), msd(1)]
    (roots[0] / "PETCT_0000000000/01-01-2000-NA-PET-CT/._SUV.nii.gz").write_bytes(b"mac")
    (roots[0] / "PETCT_0000000000/.DS_Store").write_bytes(b"mac")
    for root in roots[1:]:
        (root / "imagesTr/._case_000_0000.nii.gz").write_bytes(b"mac")
        (root / "labelsTr/._case_000.nii.gz").write_bytes(b"mac")
    description = json.loads((roots[2] / "dataset.json").read_text())
    del description["training"]  # so that the files on disk are listed
    (roots[2] / "dataset.json").write_text(json.dumps(description))
    for root in roots:
        found = data.find_studies(root)
        assert (len(found.studies), found.findings) == (1, [])


def test_folders_of_mac_archives_are_ignored(tcia):
    root = tcia(1)
    copy = root / "__MACOSX" / "PETCT_0000000000" / "01-01-2000-NA-PET-CT"
    copy.mkdir(parents=True)
    (copy / "._SUV.nii.gz").write_bytes(b"mac")
    (root / "PETCT_0000000000" / ".ipynb_checkpoints").mkdir()
    found = data.find_studies(root)
    assert (len(found.studies), found.findings) == (1, [])


def test_root_may_be_called_like_a_patient(tcia, tmp_path):
    found = data.find_studies(tcia(2, root=tmp_path / "PETCT_cohort"))
    assert (len(found.studies), found.findings) == (2, [])


def test_uncompressed_files(tcia, nnunet, msd):
    for root in (tcia(1), nnunet(1), msd(1)):
        for file in list(root.rglob("*.nii.gz")):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
        found = data.find_studies(root)
        assert (len(found.studies), found.findings) == (1, [])
        data.preprocess(found.studies[0], data.PREPROCESSING[found.kind])


def test_msd_names_that_end_in_four_digits(msd):
    root = msd(2)
    for file in list(root.rglob("BRATS_*")):
        file.rename(file.with_name(file.name.replace("BRATS_", "BRATS_0")))
    text = (root / "dataset.json").read_text().replace("BRATS_", "BRATS_0")
    (root / "dataset.json").write_text(text)
    found = data.find_studies(root)
    assert [s.name for s in found.studies] == ["BRATS_0001", "BRATS_0002"]
    assert found.findings == []


def test_patients_of_nnunet_names(nnunet):
    root = nnunet(2, name="fdg_0011f3deaf_{:02d}-01-2003-NA-PET-CT")
    found = data.find_studies(root)
    assert found.patients_known
    assert {s.patient for s in found.studies} == {"fdg_0011f3deaf"}


def test_studies_without_labels(nnunet, tcia):
    root = nnunet(2)
    (root / "imagesTr").rename(root / "imagesTs")
    shutil.rmtree(root / "labelsTr")
    for folder in (root, root / "imagesTs"):
        found = data.find_studies(folder, labelled=False)
        assert [(s.name, s.label) for s in found.studies] == [
            ("case_000", None),
            ("case_001", None),
        ]
    study = next(tcia(1).glob("PETCT_*/*"))
    (study / "SEG.nii.gz").unlink()
    found = data.find_studies(study, labelled=False)
    assert [s.label for s in found.studies] == [None]
    arrays, meta = data.preprocess(found.studies[0], PETCT)
    assert set(arrays) == {"images"} and meta["lesion_voxels"] is None


def test_links_are_followed_once(tcia, tmp_path):
    root, links = tcia(2), tmp_path / "links"
    links.mkdir()
    (links / "all").symlink_to(root)
    (root / "loop").symlink_to(links)
    assert len(data.find_studies(links).studies) == 2


def test_no_studies(tmp_path):
    assert "no such folder" in message_of(data.find_studies, tmp_path / "nowhere")
    assert "no studies found" in message_of(data.find_studies, tmp_path)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"channel_names": {"0": "CT", "1": "CT"}}, "channels are named CT, CT"),
        ({"channel_names": {"0": "CT"}}, "channels are named CT"),
        ({"channel_names": {"0": "CT", "1": "PET", "2": "SUV"}}, "none is guessed"),
        ({"channel_names": {}}, "no channel_names"),
        ({"channel_names": ["CT", "PET"]}, "channel_names"),
        ({"channel_names": {"CT": 0, "PET": 1}}, "channel"),
        ({"labels": None}, "labels"),
        ({"labels": ["background", "tumor"]}, "labels"),
        ({"labels": {"background": 0, "a": 1, "b": 2}}, "Expected background 0 and tumour 1"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "labels"),
        ({"labels": {"background": "none"}}, "labels"),
    ],
)
def test_bad_dataset_json(nnunet, change, expected):
    root = nnunet(1)
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = message_of(data.find_studies, root)
    assert expected in message and "dataset.json" in message and "\n" not in message


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00"])
def test_dataset_json_is_not_an_object(nnunet, text):
    root = nnunet(1)
    (root / "dataset.json").write_text(text)
    assert "dataset.json" in message_of(data.find_studies, root)


def test_msd_labels_need_an_edema(msd):
    message = message_of(data.find_studies, msd(1, labels={"0": "background", "1": "tumor"}))
    assert "edema" in message and "\n" not in message


@pytest.mark.parametrize("stem", STEMS)
def test_missing_file(tcia, stem):
    root = tcia(2)
    file = root / "PETCT_0000000000/01-01-2000-NA-PET-CT" / f"{stem}.nii.gz"
    file.unlink()
    found = data.find_studies(root)
    assert [(f.file, f.found) for f in found.findings] == [(str(file), "missing file")]
    assert len(found.studies) == 1


@pytest.mark.parametrize("part", ["imagesTr/case_000_0000", "imagesTr/case_000_0001", "labelsTr/x"])
def test_missing_file_of_nnunet(nnunet, part):
    root = nnunet(2)
    file = root / f"{part.replace('x', 'case_000')}.nii.gz"
    file.unlink()
    found = data.find_studies(root)
    assert [(f.file, f.found) for f in found.findings] == [(str(file), "missing file")]
    assert [s.name for s in found.studies] == ["case_001"]


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_missing_file_of_msd(msd, folder):
    root = msd(2)
    file = root / folder / "BRATS_002.nii.gz"
    file.unlink()
    found = data.find_studies(root)
    assert [(f.file, f.found) for f in found.findings] == [(str(file), "missing file")]
    assert [s.name for s in found.studies] == ["BRATS_001"]


def test_mask_without_image(nnunet):
    root = nnunet(2)
    for file in root.glob("imagesTr/case_001_*"):
        file.unlink()
    found = data.find_studies(root)
    assert [f.found for f in found.findings] == ["missing file"] * len(found.findings)
    assert "case_001" in found.findings[0].file


def test_same_name_twice(tcia, nnunet):
    root = tcia(2)
    shutil.copytree(root / "PETCT_0000000000", root / "copy" / "PETCT_0000000000")
    other = nnunet(2)
    image = other / "imagesTr/case_000_0001.nii.gz"
    image.with_suffix("").write_bytes(gzip.decompress(image.read_bytes()))
    for folder in (root, other):
        found = data.find_studies(folder)
        assert [f.found.startswith("duplicate case") for f in found.findings] == [True]
        assert len(found.studies) == 2


# ------------------------------------------------------------------ the input check


@pytest.mark.parametrize("cut", [0, 1, 5, 10, 30, 0.5, -9, -8, -4, -1])
@pytest.mark.parametrize("stem", ["SUV", "SEG"])
def test_truncated_gzip(tmp_path, stem, cut):
    study = write_petct(tmp_path, petct_arrays(0), las())
    file = tmp_path / f"{stem}.nii.gz"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * cut) if isinstance(cut, float) else cut])
    (finding,) = findings_of(study)
    assert finding.file == str(file) and "\n" not in str(finding)
    assert "gzip" in finding.found or cut == 0


def swap_byte(raw, place):
    raw = bytearray(raw)
    raw[place] ^= 255
    return bytes(raw)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda raw: swap_byte(raw, 0), "gzip"),
        (lambda raw: swap_byte(raw, len(raw) // 2), "gzip"),
        (lambda raw: swap_byte(raw, -5), "gzip"),  # the checksum
        (lambda raw: gzip.decompress(raw), "gzip"),
        (lambda raw: b"a text file", "gzip"),
        (lambda raw: gzip.compress(b"a text file"), "not a NIfTI"),
        (lambda raw: gzip.compress(b"x" * 1000), "not a NIfTI"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "shorter"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:352]), "shorter"),
    ],
)
def test_unreadable_file(tmp_path, damage, words):
    study = write_petct(tmp_path, petct_arrays(0), las())
    file = study.ct.path
    file.write_bytes(damage(file.read_bytes()))
    (finding,) = findings_of(study)
    assert finding.file == str(file) and words in finding.found and "\n" not in str(finding)


def test_folder_instead_of_file(tmp_path):
    study = write_petct(tmp_path, petct_arrays(0), las())
    study.ct.path.unlink()
    study.ct.path.mkdir()
    (finding,) = findings_of(study)
    assert "cannot be read" in finding.found


def header_with(**values):
    """Bytes of a 24x20x18 float32 NIfTI-1 file with header fields set without any check."""
    array = np.ones((24, 20, 18), np.float32)
    image = nib.Nifti1Image(array, las())
    raw = image.to_bytes()
    header = nib.Nifti1Header(raw[:348], check=False)
    for name, value in values.items():
        field, *index = name.split("__")
        header[field][tuple(map(int, index)) or ...] = value
    return header.binaryblock + raw[348:]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"pixdim__1": 0}, "spacing"),
        ({"pixdim__3": -5}, "spacing"),
        ({"pixdim__2": np.nan}, "spacing"),
        ({"pixdim__2": np.inf}, "spacing"),
        ({"srow_x": 0}, ""),
        ({"srow_z": np.nan}, "affine"),
        ({"pixdim__1": 4e12, "srow_x__0": 4e12}, "spacing"),
        ({"pixdim__1": 4000, "srow_x__0": 4000}, "spacing"),  # micrometres
        ({"dim__0": 2}, "dimensions"),
        ({"dim__1": -24}, "dimensions"),
        ({"dim__3": 1}, "dimensions"),
        ({"dim__0": 4, "dim__4": 2}, "dimensions"),
        ({"datatype": 32, "dim__3": 9}, "dimensions"),  # complex
        ({"datatype": 128, "dim__1": 2}, "dimensions"),  # RGB
        ({"datatype": 9999}, "not a NIfTI"),
        ({"dim__3": 19}, "shorter"),
        ({"vox_offset": 356}, "shorter"),
        ({"vox_offset": 0}, "data begin at"),
        ({"vox_offset": -1000}, "data begin at"),
        ({"vox_offset": np.nan}, ""),
        ({"vox_offset": np.inf}, ""),
        ({"vox_offset": 1e30}, ""),
        ({"scl_slope": 1, "scl_inter": np.nan}, ""),
        ({"magic": b"ni1"}, "not a NIfTI"),
    ],
)
def test_bad_header(tmp_path, values, words):
    study = write_petct(tmp_path, petct_arrays(0), las(), end=".nii")
    study.pet.path.write_bytes(header_with(**values))
    (finding,) = findings_of(study)
    assert finding.file == str(study.pet.path)
    assert words in finding.found and "\n" not in str(finding)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stem", STEMS)
def test_not_a_number(tmp_path, stem, value):
    arrays = petct_arrays(0)
    arrays[stem] = arrays[stem].astype(np.float32)
    arrays[stem][0, 0, 0] = value
    (finding,) = findings_of(write_petct(tmp_path, arrays, las()))
    assert finding.found == "NaN or Inf voxels" and f"{stem}.nii.gz" in finding.file


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_label_values(tmp_path, value):
    arrays = petct_arrays(0)
    arrays["SEG"] = arrays["SEG"].astype(np.float32)
    arrays["SEG"][3, 4, 5] = value
    (finding,) = findings_of(write_petct(tmp_path, arrays, las()))
    assert f"label values {value} outside the expected set {{0, 1}}" in finding.found


def test_label_values_of_msd(msd):
    root = msd(1)
    label = mri_arrays(0)["label"]
    label[0, 0, 0] = 4
    write_nifti(root / "labelsTr/BRATS_001.nii.gz", label, np.eye(4))
    (finding,) = findings_of(data.find_studies(root).studies[0])
    assert "label values 4 outside the expected set {0, 1, 2, 3}" in finding.found


def test_channel_count_of_msd(msd):
    root = msd(1)
    stack = np.stack([mri_arrays(0)[name] for name in MSD_CHANNELS[:3]], -1)
    write_nifti(root / "imagesTr/BRATS_001.nii.gz", stack, np.eye(4))
    (finding,) = findings_of(data.find_studies(root).studies[0])
    assert "3 channels, dataset.json names 4" in finding.found


@pytest.mark.parametrize("stem", ["CTres", "SEG"])
@pytest.mark.parametrize("shift, passes", [(0.3, True), (0.49, True), (0.51, False), (1.0, False)])
def test_affine_tolerance(tmp_path, stem, shift, passes):
    arrays = petct_arrays(0)
    study = write_petct(tmp_path, arrays, las())
    moved = las()
    moved[1, 3] += shift
    write_nifti(tmp_path / f"{stem}.nii.gz", arrays[stem], moved)
    if passes:
        assert set(data.read_study(study)) == {"ct", "pet", "label"}
    else:
        (finding,) = findings_of(study)
        assert f"corners lie up to {shift:g} mm apart" in finding.found
        assert f"{stem}.nii.gz" in finding.file


def test_spacing_that_drifts_apart(tmp_path):
    arrays = petct_arrays(0)  # 23 steps of 4 mm against 4.05 mm: 1.15 mm at the far end
    study = write_petct(tmp_path, arrays, las())
    write_nifti(study.ct.path, arrays["CTres"], las((4.05, 4.0, 5.0)))
    assert "1.15 mm apart" in findings_of(study)[0].found


def test_shapes_disagree(tmp_path):
    arrays = petct_arrays(0)
    study = write_petct(tmp_path, arrays | {"SEG": arrays["SEG"][:-1]}, las())
    (finding,) = findings_of(study)
    assert "shape (23, 20, 18) differs from (24, 20, 18)" in finding.found


def test_every_finding_of_a_study(tmp_path):
    arrays = petct_arrays(0)
    study = write_petct(tmp_path, arrays | {"SEG": arrays["SEG"] * 7}, las())
    study.pet.path.write_bytes(b"")
    study.ct.path.write_bytes(b"no")
    files = [study.ct.path, study.pet.path, study.label]
    assert sorted(f.file for f in findings_of(study)) == sorted(map(str, files))


def test_empty_image(tmp_path):
    arrays = petct_arrays(0)
    (finding,) = findings_of(write_petct(tmp_path, arrays | {"SUV": arrays["SUV"] * 0}, las()))
    assert "no body found" in finding.found and "SUV" in finding.remedy


def test_becquerels_are_not_taken_for_suv(tmp_path):
    arrays = petct_arrays(0)
    (finding,) = findings_of(write_petct(tmp_path, arrays | {"SUV": arrays["SUV"] * 5000}, las()))
    assert "not SUV" in finding.found and "body weight" in finding.remedy


def damage_studies(root):
    """Four bad studies of five: what was done and to which file."""
    study = [root / f"PETCT_{i:010x}/01-01-2000-NA-PET-CT" for i in range(5)]
    (study[0] / "CTres.nii.gz").unlink()
    file = study[1] / "SUV.nii.gz"
    file.write_bytes(file.read_bytes()[:-4])
    write_nifti(study[2] / "SEG.nii.gz", petct_arrays(2)["SEG"] * 3, las())
    shutil.copy(study[4] / "SUV.nii.gz", study[3] / "SUV.nii.gz")  # same shape, another label
    return [
        (study[0] / "CTres.nii.gz", "missing file"),
        (study[1] / "SUV.nii.gz", "truncated gzip"),
        (study[2] / "SEG.nii.gz", "label values 3 outside"),
        (study[4] / "SUV.nii.gz", "duplicate case: the same image as PETCT_0000000003"),
    ]


def test_all_bad_studies_are_reported(tcia, tmp_path):
    root = tcia(5)
    bad = damage_studies(root)
    for _ in range(2):  # the second time the good ones come from the cache
        head, *lines, foot = message_of(prepare, root, tmp_path / "cache").splitlines()
        assert head == "the input check found 4 problems in 4 files; 1 studies are fine:"
        assert "--skip-bad" in foot and len(lines) == 4
        for (file, found), line in zip(bad, lines, strict=True):
            assert line.startswith(f"  {file}: {found}") and line.endswith(".")


def test_skip_bad(tcia, tmp_path):
    root, said = tcia(5), []
    bad = damage_studies(root)
    cases = prepare(root, tmp_path / "cache", skip_bad=True, say=said.append)
    assert [c.patient for c in cases] == ["PETCT_0000000003"]
    assert all(str(file) in said[-1] and found in said[-1] for file, found in bad)


def test_same_image_in_another_encoding(tcia, tmp_path):
    root = tcia(2)
    suv = petct_arrays(0)["SUV"].astype(">f8")
    write_nifti(root / "PETCT_0000000001/01-01-2000-NA-PET-CT/SUV.nii.gz", suv, las())
    message = message_of(prepare, root, tmp_path / "cache")
    assert "duplicate case: the same image as PETCT_0000000000" in message


def test_killed_worker(tcia, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "preprocess", lambda *args: os._exit(1))
    message = message_of(prepare, tcia(1), tmp_path / "cache")
    assert "--workers" in message and "\n" not in message


def test_message_of_the_check_with_one_bad_study(nnunet, tmp_path):
    root = nnunet(2)
    (root / "labelsTr/case_001.nii.gz").unlink()
    said = []
    assert len(prepare(root, tmp_path / "cache", skip_bad=True, say=said.append)) == 1
    assert "missing file" in said[-1] and "case_001" in said[-1]


# ------------------------------------------------------------------ odd but legal files


def as_stored(array, kind):
    """The same values in another encoding: bytes and the end of the file name."""
    image = nib.Nifti2Image if kind == "NIfTI-2" else nib.Nifti1Image
    if kind == "trailing axes":
        array = array[..., None, None]
    if kind == "float64":
        array = array.astype(np.float64)
    if kind == "big-endian":
        header = nib.Nifti1Header(endianness=">")
        header.set_data_dtype(array.dtype.newbyteorder(">"))
        nifti = nib.Nifti1Image(array, las(), header)
    elif kind == "scaled":
        nifti = nib.Nifti1Image(array, las())
        raw = nifti.to_bytes()
        header = nib.Nifti1Header(raw[:348])
        header["scl_slope"], header["scl_inter"] = 0.5, -3
        stored = ((array.astype(np.float64) + 3) / 0.5).astype(array.dtype)
        return header.binaryblock + raw[348:352] + stored.tobytes("F"), ".nii"
    else:
        nifti = image(array, las())
    if kind == "qform":
        nifti.set_sform(None, 0)
        nifti.set_qform(las(), 1)
    if kind == "units unknown":
        nifti.header["xyzt_units"] = 0
    raw = nifti.to_bytes()
    if kind == "extension":
        nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"made by a scanner"))
        raw = nifti.to_bytes()
    if kind == "slope zero":
        header = nib.Nifti1Header(raw[:348])
        header["scl_slope"] = 0
        raw = header.binaryblock + raw[348:]
    if kind == "two gzip members":
        return gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]), ".nii.gz"
    if kind == "padded gzip":
        return gzip.compress(raw) + bytes(512), ".nii.gz"
    return raw, ".nii"


@pytest.mark.parametrize(
    "kind",
    [
        "plain", "NIfTI-2", "trailing axes", "float64", "big-endian", "scaled", "qform",
        "units unknown", "extension", "slope zero", "two gzip members", "padded gzip",
    ],
)  # fmt: skip
def test_legal_files(tmp_path, kind):
    arrays = petct_arrays(0)
    study = write_petct(tmp_path / "plain", arrays, las())
    expected, meta = data.preprocess(study, PETCT)
    for stem in STEMS:
        raw, end = as_stored(arrays[stem].copy(), kind)
        (tmp_path / f"{stem}{end}").write_bytes(raw)
    got, got_meta = data.preprocess(petct_study(tmp_path, end), PETCT)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-3, err_msg=name)
    assert {k for k in meta if meta[k] != got_meta[k]} <= {"digest"}


def test_ct_with_the_intercept_of_dicom(tmp_path):
    arrays = petct_arrays(0)
    study = write_petct(tmp_path, arrays, las(), end=".nii")
    nifti = nib.Nifti1Image((arrays["CTres"] + 1024).astype(np.uint16), las())
    raw = nifti.to_bytes()
    header = nib.Nifti1Header(raw[:348])
    header["scl_slope"], header["scl_inter"] = 1, -1024
    study.ct.path.write_bytes(header.binaryblock + raw[348:])
    assert np.array_equal(data.read_nifti(study.ct.path, 3).data, arrays["CTres"])


def test_msd_with_a_trailing_axis_and_floats(msd):
    root = msd(1)
    settings = replace(MRI, margin_mm=WHOLE)
    expected, _ = data.preprocess(data.find_studies(root).studies[0], settings)
    made = mri_arrays(0)
    stack = np.stack([made[name] for name in MSD_CHANNELS], -1)[..., None].astype(np.float32)
    write_nifti(root / "imagesTr/BRATS_001.nii.gz", stack, np.eye(4))
    label = made["label"].astype(np.float64)[..., None]
    write_nifti(root / "labelsTr/BRATS_001.nii.gz", label, np.eye(4))
    got, _ = data.preprocess(data.find_studies(root).studies[0], settings)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


# ------------------------------------------------------------------ geometry


@pytest.mark.parametrize(
    "shape, spacing, expected",  # shapes that MONAI's Spacing((2, 2, 3)) gives
    [
        ((24, 20, 18), (2.04, 2.04, 3), (24, 20, 18)),
        ((33, 17, 29), (4.07, 4.07, 5.0), (66, 34, 48)),
        ((400, 10, 326), (2.0364, 2.0364, 3.0), (407, 10, 326)),
        ((7, 9, 11), (1, 1.5, 2.5), (4, 7, 9)),
        ((24, 20, 18), (5, 5, 6), (58, 48, 35)),  # 57.5 + 1 rounds to even
        ((10, 11, 12), (3, 3, 4.5), (14, 16, 18)),
        ((8, 6, 4), (1, 1, 1.5), (4, 4, 2)),
    ],
)
def test_count_of_voxels(shape, spacing, expected):
    positions = data.grid_positions(shape, spacing, (2, 2, 3))
    assert tuple(map(len, positions)) == expected


@pytest.mark.parametrize("spacing", [(4.07, 4.07, 5.0), (1.3, 1.1, 2.0), (2.0, 2.0, 3.0)])
def test_resampling_is_linear_at_exact_places(tmp_path, spacing):
    arrays = petct_arrays(3)
    study = write_petct(tmp_path, arrays, las(spacing))
    got, meta = data.preprocess(study, PETCT)

    starts, counts = [], []
    for axis in range(3):
        inside = np.flatnonzero((arrays["SUV"] > 0.2).any(tuple({0, 1, 2} - {axis})))
        margin = int(np.ceil(10 / spacing[axis]))
        first = max(0, inside[0] - margin)
        last = min(arrays["SUV"].shape[axis] - 1, inside[-1] + margin)
        starts.append(first)
        counts.append(int(np.round((last - first) * spacing[axis] / (2, 2, 3)[axis])) + 1)
    assert meta["shape"] == counts
    grid = np.indices(counts).astype(float)
    for axis in range(3):
        stop = meta["box"][axis][1] - 1
        grid[axis] = starts[axis] + grid[axis] * (2, 2, 3)[axis] / spacing[axis]
        grid[axis] = np.minimum(grid[axis], stop)
    for i, (stem, low, high) in enumerate((("CTres", -100, 250), ("SUV", 0, 15))):
        image = arrays[stem].astype(np.float64)
        image = ndimage.map_coordinates(image, grid, order=1, mode="nearest")
        expected = (np.clip(image, low, high) - low) / (high - low)
        np.testing.assert_allclose(got["images"][i], expected, atol=1e-3)
    nearest = ndimage.map_coordinates(arrays["SEG"], grid, order=0, mode="nearest")
    halves = (np.abs(grid % 1 - 0.5) < 1e-6).any(0)  # either neighbour is as near
    assert np.array_equal(got["label"][~halves], nearest[~halves])
    assert np.array_equal(got["lesion"], np.flatnonzero(got["label"]))


def test_resample_beyond_the_border():
    image = np.random.default_rng(0).normal(size=(5, 1, 7)).astype(np.float32)
    positions = [np.array([0, 0.25, 3.9, 4.4]), np.array([0, 0.5]), np.linspace(0, 6, 11)]
    grid = np.meshgrid(*positions, indexing="ij")
    expected = ndimage.map_coordinates(image.astype(float), grid, order=1, mode="nearest")
    np.testing.assert_allclose(data.resample(image, positions), expected, atol=1e-6)


def test_native_arrays(tmp_path):
    arrays = petct_arrays(0)
    seg, affine = stored_as(arrays["SEG"], las(), "PIR")
    suv, _ = stored_as(arrays["SUV"], las(), "PIR")
    ct, _ = stored_as(arrays["CTres"], las(), "PIR")
    study = write_petct(tmp_path, {"SEG": seg, "SUV": suv, "CTres": ct}, affine)
    got, meta = data.preprocess(study, PETCT)
    case = Case(meta, arrays=got)
    assert np.array_equal(case.native("native_label", case.load("native_class")), seg)
    assert np.array_equal(case.native("native_hot"), suv >= 4)
    assert case.has_lesion and meta["lesion_voxels"] == 27


@pytest.mark.parametrize("axes", ["RPI", "PIR", "SLA", "ARS", "IPL"])
def test_order_of_axes_does_not_matter(tmp_path, axes):
    arrays = petct_arrays(1) | {"SEG": petct_arrays(0)["SEG"]}
    expected, _ = data.preprocess(write_petct(tmp_path / "las", arrays, las()), PETCT)
    turned = {stem: stored_as(array, las(), axes)[0] for stem, array in arrays.items()}
    affine = stored_as(arrays["SUV"], las(), axes)[1]
    got, _ = data.preprocess(write_petct(tmp_path / axes, turned, affine), PETCT)
    for name in ("images", "label", "lesion"):
        assert np.array_equal(got[name], expected[name]), name


def test_mri_is_resampled_then_scaled(tmp_path):
    made, sources = mri_arrays(0), []
    affine = np.diag((-1.4, -1.0, 2.0, 1.0))  # LPS, as BraTS has it
    for name in ("FLAIR", "t1gd"):
        sources.append(Source(write_nifti(tmp_path / f"{name}.nii", made[name], affine)))
    label = write_nifti(tmp_path / "label.nii", made["label"], affine)
    classes = ((0, 0), (1, 1), (2, 2), (3, 2))
    study = Study("a", "a", "mri", *sources, label, classes)
    got, meta = data.preprocess(study, replace(MRI, margin_mm=WHOLE))
    assert meta["shape"] == [22, 14, 23]
    positions = [np.arange(22) / 1.4, np.arange(14.0), np.arange(23) / 2]
    grid = np.minimum(np.meshgrid(*positions, indexing="ij"), [[[[15]]], [[[13]]], [[[11]]]])
    for i, name in enumerate(("FLAIR", "t1gd")):
        image = made[name][::-1, ::-1].astype(np.float64)
        image = ndimage.map_coordinates(image, grid, order=1, mode="nearest")
        brain = image[image != 0]
        expected = np.where(image != 0, (image - brain.mean()) / brain.std(), 0)
        np.testing.assert_allclose(got["images"][i], expected, atol=3e-3)
    nearest = np.ix_(np.rint(np.arange(22) / 1.4).astype(int), range(14), range(12))
    expected = np.minimum(made["label"], 2)[::-1, ::-1][nearest]
    assert np.array_equal(got["label"][:, :, ::2], expected)


def is_class(margin):
    return (margin[0] > 0.5).astype(np.uint8)


@pytest.mark.parametrize("axes", ["LAS", "RPI", "PIR", "SLA", "IAR"])
def test_back_to_native_is_exact(tmp_path, axes):
    spacing = (4.0, 3.0, 5.0)
    arrays = petct_arrays(0)
    arrays["SEG"] = (arrays["SUV"] > 2).astype(np.uint8)  # in the body, no symmetry
    turned = {stem: stored_as(array, las(spacing), axes)[0] for stem, array in arrays.items()}
    affine = stored_as(arrays["SUV"], las(spacing), axes)[1]
    settings = replace(PETCT, spacing=spacing)
    got, meta = data.preprocess(write_petct(tmp_path, turned, affine), settings)
    back = data.to_native(json.loads(json.dumps(meta)), got["label"][None], is_class)
    assert back.dtype == np.uint8 and np.array_equal(back, turned["SEG"])


def rotation(degrees, axis):
    angle, (i, j) = np.deg2rad(degrees), [a for a in range(3) if a != axis]
    turn = np.eye(4)
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


@pytest.mark.parametrize(
    "spacing, turn",
    [
        ((1.2, 3.1, 4.4), np.eye(4)),
        ((4.0, 4.0, 5.0), rotation(20, 2)),
        ((2.5, 3.0, 1.7), rotation(30, 0) @ rotation(-25, 1)),
    ],
)
@pytest.mark.parametrize("axes", ["LAS", "PIR"])
def test_lesion_stays_at_its_place(tmp_path, spacing, turn, axes):
    arrays = petct_arrays(0)
    arrays["SEG"][:] = 0
    arrays["SEG"][5:14, 6:14, 7:15] = 1
    affine = turn @ las(spacing)
    turned = {stem: stored_as(array, affine, axes)[0] for stem, array in arrays.items()}
    stored = stored_as(arrays["SEG"], affine, axes)[1]
    got, meta = data.preprocess(write_petct(tmp_path, turned, stored), PETCT)
    back = data.to_native(meta, got["label"][None].astype(np.float16), is_class)

    def middle_mm(mask):
        return (stored @ [*np.argwhere(mask).mean(0), 1])[:3]

    gap = middle_mm(back) - middle_mm(turned["SEG"])
    assert np.linalg.norm(gap) < max(spacing) / 2
    assert int(back.sum()) == pytest.approx(576, rel=0.3)


def test_outside_of_the_body_is_background(tmp_path):
    arrays = petct_arrays(0)
    arrays["SUV"][:8] = 0
    settings = replace(PETCT, margin_mm=4.5)
    got, meta = data.preprocess(write_petct(tmp_path, arrays, las()), settings)
    back = data.to_native(meta, np.ones((1, *meta["shape"])), is_class)
    assert meta["box"][0][0] == 6  # two voxels of 4 mm
    assert not back[:6].any() and back[6:-2, 10, 9].all()


# ------------------------------------------------------------------ the cache


def test_second_start_reads_nothing(tcia, tmp_path, monkeypatch):
    root, cache = tcia(2), tmp_path / "cache"
    first = prepare(root, cache)

    def never(*args):
        raise AssertionError("read again")

    monkeypatch.setattr(data, "run_parallel", never)
    monkeypatch.setattr(data, "read_nifti", never)
    second = prepare(root, cache, say=never)
    assert [c.meta for c in second] == [c.meta for c in first]
    assert isinstance(second[0].load("images"), np.memmap)
    assert not second[0].load("images").flags.writeable
    with pytest.raises(AssertionError):
        prepare(root, cache, check=True)


def test_same_folder_by_another_path(tcia, tmp_path, monkeypatch):
    root, cache = tcia(1), tmp_path / "cache"
    prepare(root, cache)
    monkeypatch.chdir(tmp_path)
    said = []
    prepare(Path(root.name), cache, say=said.append)
    assert said == []


def test_cached_arrays_are_those_of_preprocess(msd, tmp_path):
    root = msd(2)
    cases = prepare(root, tmp_path / "cache")
    for case, study in zip(cases, data.find_studies(root).studies, strict=True):
        arrays, meta = data.preprocess(study, MRI)
        assert case.meta.items() >= json.loads(json.dumps(meta)).items()
        assert all(np.array_equal(case.load(name), array) for name, array in arrays.items())


@pytest.mark.parametrize("field", [f.name for f in fields(PETCT)])
def test_every_setting_has_its_own_cache(tmp_path, field):
    other = {
        "kind": "mri", "spacing": (2.0, 2.0, 3.1), "axes": "RAS", "clip": None, "margin_mm": 5.0,
        "body_suv": 0.3, "threshold_suv": 2.5, "format": -1,
    }  # fmt: skip
    changed = replace(PETCT, **{field: other[field]})
    folder = data.cache_folder(tmp_path, tmp_path / "a", PETCT)
    assert data.cache_folder(tmp_path, tmp_path / "a", changed) != folder
    assert data.cache_folder(tmp_path, tmp_path / "b", PETCT) != folder
    assert data.cache_folder(tmp_path, tmp_path / "x" / ".." / "a", PETCT) == folder


def test_changed_file_is_read_again(tcia, tmp_path):
    root, cache = tcia(2), tmp_path / "cache"
    before = [np.array(c.load("images")) for c in prepare(root, cache)]
    arrays, said = petct_arrays(0), []
    file = root / "PETCT_0000000000/01-01-2000-NA-PET-CT/SUV.nii.gz"
    write_nifti(file, arrays["SUV"] * 1.5, las())
    cases = prepare(root, cache, say=said.append)
    assert "1 of 2 studies to read" in said[0]
    assert not np.array_equal(cases[0].load("images"), before[0])
    assert np.array_equal(cases[1].load("images"), before[1])
    assert not [p for p in cache.rglob("*") if p.name.startswith(".")]


def test_changed_time_is_enough_to_read_again(tcia, tmp_path):
    root, cache, said = tcia(1), tmp_path / "cache", []
    prepare(root, cache)
    file = next(root.rglob("SEG.nii.gz"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))
    prepare(root, cache, say=said.append)
    assert "1 of 1 studies to read" in said[0]


@pytest.mark.parametrize("change", ["labels", "modality"])
def test_changed_names_are_read_again(msd, tmp_path, change):
    root, cache = msd(1), tmp_path / "cache"
    first = prepare(root, cache)[0]
    label, images = np.array(first.load("label")), np.array(first.load("images"))
    path = root / "dataset.json"
    description = json.loads(path.read_text())
    names = description[change]
    a, b = ("1", "2") if change == "labels" else ("0", "2")
    names[a], names[b] = names[b], names[a]
    path.write_text(json.dumps(description))
    case = prepare(root, cache)[0]
    if change == "labels":
        assert np.array_equal(case.load("label") == 1, mri_arrays(0)["label"][crop_of(case)] == 2)
        assert not np.array_equal(case.load("label"), label)
    else:
        assert np.array_equal(case.load("images"), images[::-1])


def crop_of(case):
    return tuple(slice(*b) for b in case.meta["box"])


@pytest.mark.parametrize("left", ["temporary folder", "no meta", "cut meta"])
def test_half_written_cache_is_not_used(tcia, tmp_path, left):
    root, cache = tcia(1), tmp_path / "cache"
    case = prepare(root, cache)[0]
    expected = np.array(case.load("images"))
    if left == "temporary folder":
        case.folder.rename(case.folder.with_name(f".{case.folder.name}.123.tmp"))
    elif left == "no meta":
        (case.folder / "meta.json").unlink()
        np.save(case.folder / "images.npy", np.zeros(3))
    else:
        text = (case.folder / "meta.json").read_text()
        (case.folder / "meta.json").write_text(text[: len(text) // 2])
    said = []
    (case,) = prepare(root, cache, say=said.append)
    assert "1 of 1 studies to read" in said[0]
    assert np.array_equal(case.load("images"), expected)


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    study = write_petct(tmp_path / "study", petct_arrays(0), las())

    def full_disk(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    folder = tmp_path / "cache" / "case"
    (finding,) = data.fill_cache(study, PETCT, folder)
    assert "No space left on device" in finding.found
    assert list((tmp_path / "cache").iterdir()) == []


def test_check_finds_damage_that_keeps_size_and_time(tcia, tmp_path):
    root, cache = tcia(2), tmp_path / "cache"
    assert len(prepare(root, cache)) == 2
    file = next(root.rglob("SUV.nii.gz"))
    stat, raw = file.stat(), file.read_bytes()
    file.write_bytes(swap_byte(raw, len(raw) // 2))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert str(file) in message_of(prepare, root, cache, check=True)
    assert len(prepare(root, cache, check=True, skip_bad=True)) == 1


def test_cache_that_cannot_be_written(tcia, tmp_path):
    (tmp_path / "cache").write_text("a file")
    message = message_of(prepare, tcia(1), tmp_path / "cache")
    assert "cache" in message and "\n" not in message


# ------------------------------------------------------------------ splits


def cohort(patients, studies_each=1, ill=lambda p: p % 3 == 0):
    return [
        Case({"name": f"p{p:03d}/s{s}", "patient": f"p{p:03d}", "lesion_voxels": 5 * ill(p)})
        for p in range(patients)
        for s in range(studies_each)
    ]


def patients_in(part):
    return {name.split("/")[0] for name in part}


@pytest.mark.parametrize("patients, folds", [(30, 5), (23, 4), (11, 2), (7, 3)])
def test_folds_by_patient(patients, folds):
    cases = cohort(patients, 2)
    names = {c.name for c in cases}
    ill = {c.patient for c in cases if c.has_lesion}
    tested, shares = Counter(), []
    for fold in range(folds):
        splits = data.make_splits(cases, folds, fold)
        assert splits == data.make_splits(cases[::-1], folds, fold)  # whatever the order on disk
        train, val, test = (patients_in(splits[part]) for part in ("train", "val", "test"))
        assert not train & val and not train & test and not val & test
        assert set().union(*splits.values()) == names
        assert sum(map(len, splits.values())) == len(names)
        tested.update(test)
        shares.append((len(test & ill), len(test - ill)))
    assert set(tested.values()) == {1} and len(tested) == patients
    for counts in zip(*shares, strict=True):
        assert max(counts) - min(counts) <= 1


def test_validation_is_a_tenth_of_each_kind():
    cases = cohort(150, ill=lambda p: p % 2 == 0)
    val = data.make_splits(cases, 5, 0)["val"]  # 60 ill and 60 healthy are not in the test fold
    ill = {c.name for c in cases if c.has_lesion}
    assert (len(ill & set(val)), len(set(val) - ill)) == (6, 6)


def test_split_seed_matters():
    cases = cohort(40)
    assert data.make_splits(cases, seed=1) == data.make_splits(cases, seed=1)
    assert data.make_splits(cases, seed=1) != data.make_splits(cases, seed=2)


@pytest.mark.parametrize("folds, fold", [(5, 5), (5, -1), (1, 0), (0, 0)])
def test_bad_folds(folds, fold):
    assert "--folds" in message_of(data.make_splits, cohort(20), folds, fold)


@pytest.mark.parametrize("patients, folds, fold", [(0, 5, 0), (2, 2, 0), (3, 5, 4)])
def test_too_few_patients(patients, folds, fold):
    assert "too few" in message_of(data.make_splits, cohort(patients), folds, fold)


def test_three_patients_are_enough():
    splits = data.make_splits(cohort(3), folds=3, fold=0)
    assert sorted(map(len, splits.values())) == [1, 1, 1]


def test_splits_file_round_trip(tmp_path):
    cases = cohort(20, 2)
    splits = data.make_splits(cases)
    data.write_json(tmp_path / "splits.json", splits)
    assert data.read_splits(tmp_path / "splits.json", cases) == splits
    subset = {"train": ["p000/s0"], "val": ["p001/s0"], "test": ["p002/s1"]}
    data.write_json(tmp_path / "splits.json", subset)
    assert data.read_splits(tmp_path / "splits.json", cases) == subset


GOOD = {"train": ["p000/s0"], "val": ["p001/s0"], "test": ["p002/s0"]}


@pytest.mark.parametrize(
    "content, words",
    [
        ({"train": ["p000/s0"], "val": ["p001/s0"]}, "expected the keys"),
        (GOOD | {"more": []}, "expected the keys"),
        ([], "expected the keys"),
        (None, "expected the keys"),
        (GOOD | {"test": []}, "test is empty"),
        (GOOD | {"test": ["p009/s9"]}, "the first is p009/s9"),
        (GOOD | {"test": ["p000/s1"]}, "patient p000 is in train and in test"),
        (GOOD | {"test": ["p000/s0"]}, "patient p000 is in train and in test"),
        (GOOD | {"test": None}, "list"),
        (GOOD | {"test": 3}, "list"),
        (GOOD | {"test": "p002/s0"}, ""),
        (GOOD | {"test": [["p002/s0"]]}, ""),
        (GOOD | {"test": [1, "p003"]}, ""),
        (GOOD | {"test": {"p002/s0": 1}}, "list"),
        (GOOD | {"test": ["p002/s0", "p002/s0"]}, "p002/s0"),
    ],
)
def test_bad_splits(tmp_path, content, words):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(content))
    message = message_of(data.read_splits, path, cohort(4, 2))
    assert str(path) in message and words in message and "\n" not in message


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff\xfe"])
def test_splits_that_are_not_json(tmp_path, raw):
    path = tmp_path / "splits.json"
    assert "No such file" in message_of(data.read_splits, path, [])
    path.write_bytes(raw)
    assert "not valid JSON" in message_of(data.read_splits, path, [])
    assert "directory" in message_of(data.read_splits, tmp_path, [])


# ------------------------------------------------------------------ crops


def in_memory(shape, lesions=(), name="a"):
    """A case whose image says where each voxel is, with lesions at the given voxels."""
    label = np.zeros(shape, np.uint8)
    for voxel in lesions:
        label[voxel] = 1
    place = np.arange(1, label.size + 1, dtype=np.float32).reshape(shape)
    return Case(
        {"name": name, "patient": name, "shape": list(shape), "lesion_voxels": len(lesions)},
        arrays={
            "images": np.stack([place, -place]),
            "label": label,
            "lesion": np.flatnonzero(label).astype(np.uint32),
        },
    )


def test_lesions_are_at_the_centre_of_two_thirds():
    voxels = [(20, 18, 16), (14, 15, 13)]
    crops = Patches([in_memory((40, 36, 30), voxels)], (8, 6, 5), seed=0)
    drawn = [crops[0, i] for i in range(1500)]
    centred = np.mean([item["mask"][4, 3, 2].item() for item in drawn])
    assert abs(centred - 2 / 3) < 0.04  # three standard deviations
    middles = Counter(item["image"][0, 4, 3, 2].item() for item in drawn if item["mask"][4, 3, 2])
    assert set(middles) == {1 + np.ravel_multi_index(v, (40, 36, 30)) for v in voxels}
    assert abs(middles.most_common()[0][1] / sum(middles.values()) - 0.5) < 0.06
    for p, share in ((0.0, 0.0), (1.0, 1.0)):
        only = Patches([in_memory((40, 36, 30), voxels)], (8, 6, 5), seed=0, lesion_p=p)
        centred = np.mean([only[0, i]["mask"][4, 3, 2].item() for i in range(300)])
        assert abs(centred - share) < 0.01


def test_other_crops_lie_anywhere():
    crops = Patches([in_memory((30, 4, 4))], (4, 4, 4), seed=0, lesion_p=1.0)
    starts = Counter(int((crops[0, i]["image"][0, 0, 0, 0].item() - 1) // 16) for i in range(2000))
    assert set(starts) == set(range(27))  # every place, and the borders collect what is moved in
    inner = [starts[i] for i in range(1, 26)]
    assert min(inner) > 30 and max(inner) < 110  # 67 expected


def test_crops_stay_inside():
    shape, corner = (20, 16, 12), (19, 0, 11)
    item = Patches([in_memory(shape, [corner])], (8, 8, 8), seed=0, lesion_p=1.0)[0, 0]
    place = np.arange(1, np.prod(shape) + 1).reshape(shape)
    assert np.array_equal(item["image"][0].numpy(), place[12:20, 0:8, 4:12])
    assert np.array_equal(item["image"][1].numpy(), -place[12:20, 0:8, 4:12])
    assert item["mask"].sum() == 1 and item["mask"][7, 0, 7] == 1


def test_small_volumes_are_padded_with_zeros():
    shape = (3, 6, 4)
    item = Patches([in_memory(shape, [(1, 5, 2)])], (6, 4, 5), seed=3, lesion_p=1.0)[0, 0]
    expected = np.zeros((6, 4, 5))
    expected[1:4, :, :4] = np.arange(1, 73).reshape(shape)[:, 2:6]
    assert np.array_equal(item["image"][0].numpy(), expected)
    assert np.argwhere(item["mask"].numpy()).tolist() == [[2, 3, 2]]


def test_label_of_a_crop():
    case = in_memory((30, 30, 30), [(2, 2, 2)])
    for class_label in ("crop", "volume"):
        crops = Patches([case], (4, 4, 4), 0, class_label=class_label)
        items = [crops[0, i] for i in range(60)]
        assert {item["mask"].any().item() for item in items} == {True, False}
        for item in items:
            assert item["tumor"] == (class_label == "volume" or item["mask"].any().item())
    healthy = Patches([in_memory((9, 9, 9))], (4, 4, 4), 0, class_label="volume")
    assert healthy[0, 0]["tumor"] == 0.0


def test_lesion_lost_in_resampling():
    case = in_memory((9, 9, 9))
    case.meta["lesion_voxels"] = 1  # on the file's grid, but not on the cached one
    assert Patches([case], (4, 4, 4), 0, lesion_p=1.0)[0, 0]["mask"].sum() == 0


def same(a, b):
    return all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_crops_depend_on_seed_epoch_and_index_only():
    voxels = [(i, j, 9) for i in range(20) for j in range(20)]
    cases = [in_memory((20, 20, 20), voxels, name) for name in "abc"]
    once = Patches(cases, (5, 5, 5), seed=4, lesion_p=0.3)
    forth = {i: once[1, i] for i in range(12)}
    again = Patches(cases, (5, 5, 5), seed=4, lesion_p=0.3)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(same(forth[i], again[1, i]) for i in reversed(range(12)))
    other = Patches(cases, (5, 5, 5), seed=5, lesion_p=0.3)
    for items in ([other[1, i] for i in range(12)], [once[2, i] for i in range(12)]):
        assert sum(same(forth[i], items[i]) for i in range(12)) < 3
    assert sum(same(forth[0], forth[i]) for i in range(1, 12)) < 3


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_through_a_loader(workers):
    cases = [in_memory((12, 10, 11), [(5, 5, 5)], name) for name in "abc"]
    crops = Patches(cases, (4, 4, 4), seed=0)
    schedule = Schedule(steps=4, batch_size=3)
    loader = DataLoader(crops, batch_sampler=schedule, num_workers=workers)
    for epoch in (0, 5):
        schedule.epoch = epoch
        batches = list(loader)
        assert len(batches) == len(loader) == 4
        for step, batch in enumerate(batches):
            for k in range(3):
                expected = crops[epoch, 3 * step + k]
                assert same({name: batch[name][k] for name in batch}, expected)


def test_each_study_once_per_round():
    cases = [in_memory((4, 4, 4), name=name) for name in "abcde"]
    for i, case in enumerate(cases):
        case.arrays["images"][:] = i
    crops = Patches(cases, (4, 4, 4), seed=0)
    seen = [int(crops[0, i]["image"][0, 0, 0, 0]) for i in range(50)]
    rounds = [tuple(seen[i : i + 5]) for i in range(0, 50, 5)]
    assert all(sorted(r) == [0, 1, 2, 3, 4] for r in rounds)
    assert len(set(rounds)) > 5


class Recorder:
    """An array that notes what is read of it."""

    def __init__(self, array):
        self.array, self.shape, self.ndim, self.read = array, array.shape, array.ndim, []

    def __getitem__(self, key):
        self.read.append(key)
        return self.array[key]


def test_only_the_patch_is_read():
    array = np.arange(2 * 10 * 8 * 6).reshape(2, 10, 8, 6)
    recorder = Recorder(array)
    part = data.read_crop(recorder, (slice(7, 10), slice(-1, 9), slice(2, 4)))
    assert recorder.read == [(..., slice(7, 10), slice(0, 8), slice(2, 4))]
    assert np.array_equal(part[:, :, 1:-1], array[:, 7:10, :, 2:4])
    assert not part[:, :, [0, -1]].any()
    assert part.base is None or part.base is not array


# ------------------------------------------------------------------ schedule


def test_schedule_of_one_process():
    schedule = Schedule(steps=2, batch_size=3)
    assert list(schedule) == [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)]]
    schedule.epoch = 7
    assert list(schedule)[1] == [(7, 3), (7, 4), (7, 5)] and len(schedule) == 2


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_a_batch(world):
    whole = Schedule(steps=3, batch_size=4)
    ranks = [Schedule(3, 4, rank, world) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [list(rank)[step] for rank in ranks]
        assert sorted(sum(parts, [])) == batch
        assert all(parts)


# ------------------------------------------------------------------ Φ


def test_noise_strength():
    torch.manual_seed(0)
    ct = torch.rand(1, 1, 16, 16, 16)
    kept = ct.clone()
    noise = torch.stack([data.add_noise(ct) - ct for _ in range(400)])
    strengths = noise.flatten(1).std(1)
    assert torch.equal(ct, kept)
    assert strengths.max() < 0.31 and strengths.max() > 0.28 and strengths.min() < 0.01
    counts = torch.histc(strengths, 3, 0, 0.3)  # uniform: 133 in each third
    assert counts.min() > 100 and counts.max() < 167
    whitened = (noise.flatten(1) / strengths[:, None]).flatten()
    assert abs(whitened.mean()) < 0.01
    assert abs((whitened.abs() < 1).float().mean() - 0.6827) < 0.01  # a normal distribution


def test_noise_is_one_strength_for_a_batch_and_new_for_each_voxel():
    torch.manual_seed(1)
    noise = data.add_noise(torch.zeros(4, 1, 16, 16, 16), sigma=2.0)
    strengths = noise.flatten(1).std(1)
    assert strengths.max() / strengths.min() < 1.1
    assert noise.unique().numel() > 0.95 * noise.numel()
    assert torch.equal(data.add_noise(torch.ones(1, 1, 2, 2, 2), 0.0), torch.ones(1, 1, 2, 2, 2))


def numbered(batch, *shape):
    return torch.arange(batch * int(np.prod(shape)), dtype=torch.float32).view(batch, 1, *shape)


def test_shuffling_permutes_one_cube():
    torch.manual_seed(0)
    ct = numbered(3, 40, 24, 20)
    kept = ct.clone()
    out = data.shuffle_voxels(ct)
    assert torch.equal(ct, kept)
    changed = (out != ct)[:, 0]
    low, high = changed.nonzero().amin(0)[1:], changed.nonzero().amax(0)[1:]
    assert (high - low + 1).tolist() == [16, 16, 16]
    box = (0, *(slice(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True)))
    orders = []
    for before, after in zip(ct, out, strict=True):
        assert (before != after)[box].float().mean() > 0.99  # the same box in each sample
        values = before[box].flatten()
        assert torch.equal(values, after[box].flatten().sort().values)
        orders.append(after[box].flatten().argsort())
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])


def test_shuffled_cubes_lie_anywhere_and_as_many_as_asked():
    torch.manual_seed(0)
    ct = numbered(1, 9, 6, 5)
    starts = set()
    for _ in range(300):
        moved = (data.shuffle_voxels(ct, edge=4) != ct)[0, 0].nonzero()
        starts.add(tuple(moved.amin(0).tolist()))
    assert {s[0] for s in starts} == set(range(6))  # the last possible start is 5
    assert {s[1] for s in starts} == {0, 1, 2} and {s[2] for s in starts} == {0, 1}
    big = numbered(1, 64, 64, 64)
    share = [(data.shuffle_voxels(big, 8, n) != big).sum().item() for n in (0, 1, 20)]
    assert share[0] == 0 and 500 < share[1] <= 512 and 15 * 512 < share[2] <= 20 * 512
    assert torch.equal(data.shuffle_voxels(big, 8, 20).flatten().sort().values, big.flatten())


def test_shuffling_is_reproducible():
    ct = numbered(2, 20, 20, 20)
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append((data.shuffle_voxels(ct), data.add_noise(ct)))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))


def test_cube_must_fit():
    ct = numbered(1, 16, 16, 15)
    with pytest.raises(ValueError, match="--shuffle-edge 16"):
        data.shuffle_voxels(ct, 16)
    assert not torch.equal(data.shuffle_voxels(ct, 15), ct)


# ------------------------------------------------------------------ the simulated cohort


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "cohort"
    seen = []

    def watch(visits):
        for visit in visits:
            seen.append(root.exists())
            yield visit

    data.write_phantom(root, patients=4, progress=watch)
    assert seen == [False] * 6  # the folder appears when all is written
    return root


def test_phantom_layout(phantom):
    found = data.find_studies(phantom)
    assert found.layout == "AutoPET (TCIA)" and found.findings == []
    per_patient = Counter(study.patient for study in found.studies)
    assert sorted(per_patient.values()) == [1, 1, 2, 2]
    ill = Counter()
    for study in found.studies:
        volumes = {slot: nib.load(source) for slot, source in files_of(study).items()}
        assert [str(v.get_data_dtype()) for v in volumes.values()] == ["int16", "float32", "uint8"]
        for volume in volumes.values():
            assert volume.header.get_zooms() == (5.0, 5.0, 6.0)
            assert nib.aff2axcodes(volume.affine) == ("L", "A", "S")
        ct, suv, seg = (np.asanyarray(v.dataobj) for v in volumes.values())
        assert ct.min() < -900 and ct.max() > 300 and suv.min() == 0
        labels, count = ndimage.label(seg, np.ones((3, 3, 3)))
        assert set(np.unique(seg)) <= {0, 1} and count <= 6
        if count:
            assert suv[seg > 0].mean() > 2.5
        ill[study.patient] += bool(count)
    assert sorted(ill.values()) == [0, 0, 2, 2]


def files_of(study):
    return {"ct": study.ct.path, "pet": study.pet.path, "label": study.label}


def test_phantom_passes_the_check(phantom, tmp_path):
    found = data.find_studies(phantom)
    cases = data.prepare(phantom, found, PETCT, tmp_path, say=lambda line: None)
    assert len(cases) == 6 and sum(c.has_lesion for c in cases) == 4
    for case in cases:
        images = case.load("images")
        assert images.dtype == np.float16 and images.min() >= 0 and images.max() <= 1


def test_phantom_is_the_same_again(phantom, tmp_path):
    data.write_phantom(tmp_path / "again", patients=2)
    files = [p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.nii.gz")]
    assert len(files) == 9
    for file in files:
        assert (phantom / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    data.write_phantom(tmp_path / "other", patients=1, seed=1)
    assert not {p.name for p in (tmp_path / "other").iterdir()} & {
        p.name for p in phantom.iterdir()
    }


def test_phantom_appears_complete_or_not_at_all(tmp_path):
    def stop(visits):
        yield visits[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_phantom(tmp_path / "cohort", patients=1, progress=stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        data.write_phantom(tmp_path / "cohort", patients=1)
    assert [p.name for p in (tmp_path / "cohort").iterdir()] == ["notes.txt"]
