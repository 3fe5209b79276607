"""studies.py: layouts by what the fixtures wrote, reading by the arrays that were written."""

import gzip
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import MSD_CHANNELS, las, mri_arrays, petct_arrays, write_nifti

import studies
from files import UserError
from studies import BadStudy, Finding, Found, Layout, Source, Study, find_studies, read_study

NAME = "PETCT_0000000000/01-01-2000-NA-PET-CT"
STEMS = {"ct": "CTres", "pet": "SUV", "label": "SEG"}


def write_petct(folder, arrays, affine, end=".nii.gz"):
    files = [write_nifti(folder / (stem + end), arrays[stem], affine) for stem in STEMS.values()]
    return Study("case", "patient", "petct", Source(files[0]), Source(files[1]), files[2])


@pytest.fixture
def study(tmp_path):
    return write_petct(tmp_path / "study", petct_arrays(0), las())


def assert_read(study, arrays):
    for slot, volume in read_study(study).items():
        np.testing.assert_allclose(volume.data, arrays[STEMS[slot]], atol=1e-4, err_msg=slot)
        np.testing.assert_allclose(volume.affine, las(), atol=1e-5)


def findings_of(study):
    with pytest.raises(BadStudy) as caught:
        read_study(study)
    assert all("\n" not in str(finding) for finding in caught.value.findings)
    return caught.value.findings


def message_of(root, **kwargs):
    """The line of the UserError that find_studies must raise."""
    with pytest.raises(UserError) as caught:
        find_studies(root, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(root, **changes):
    """Change keys of a dataset.json; None takes one out."""
    path = root / "dataset.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# ------------------------------------------------------------------ layouts


def test_tree_of_autopet(tcia, tmp_path):
    found = find_studies(tcia(3))
    assert (found.kind, found.layout, found.patients_known) == ("petct", "AutoPET (TCIA)", True)
    assert [(s.name, s.patient) for s in found.studies] == [
        (f"PETCT_{i:010x}/01-01-2000-NA-PET-CT", f"PETCT_{i:010x}") for i in range(3)
    ]
    assert found.findings == []
    assert_read(found.studies[1], petct_arrays(1, lesion=False))
    root, links = tcia(2, root=tmp_path / "PETCT_cohort"), tmp_path / "links"  # no patient's folder
    links.mkdir()
    (links / "all").symlink_to(root)
    (root / "loop").symlink_to(links)
    for folder in (root, links):  # links are followed once
        found = find_studies(folder)
        assert (len(found.studies), found.findings) == (2, [])


@pytest.mark.parametrize("channels", [("CT", "PET"), ("PET", "CT"), ("other", "suv", "CT-res")])
def test_channels_of_nnunet_go_by_name(nnunet, channels):
    root, place = nnunet(1), {"CT": 0, "CT-res": 0, "PET": 1, "suv": 1}
    raw = [(root / f"imagesTr/case_000_{i:04d}.nii.gz").read_bytes() for i in range(2)]
    for i, channel in enumerate(channels):
        content = raw[place[channel]] if channel in place else b"not used"
        (root / f"imagesTr/case_000_{i:04d}.nii.gz").write_bytes(content)
    rewrite(root, channel_names={str(i): name for i, name in enumerate(channels)})
    found = find_studies(root)
    assert (found.kind, found.layout, found.patients_known) == ("petct", "nnU-Net raw", False)
    assert [(s.name, s.patient) for s in found.studies] == [("case_000", "case_000")]
    assert_read(found.studies[0], petct_arrays(0))


@pytest.mark.parametrize(
    "channels",
    [MSD_CHANNELS, ("T2w", "t1gd", "T1w", "FLAIR"), ("T1-Gd", "flair"), ("T1w", "FLAIR", "T1ce")],
)
def test_channels_of_the_decathlon_go_by_name(msd, channels):
    root, made = msd(1), mri_arrays(0)
    of = {"T1-Gd": "t1gd", "T1ce": "t1gd", "flair": "FLAIR"}
    stack = np.stack([made[of.get(name, name)] for name in channels], -1)
    write_nifti(root / "imagesTr/BRATS_001.nii.gz", stack[..., None], np.eye(4))
    rewrite(root, modality={str(i): name for i, name in enumerate(channels)})
    found = find_studies(root)
    assert (found.kind, found.layout) == ("mri", "Medical Segmentation Decathlon")
    assert found.patients_known and [s.patient for s in found.studies] == ["BRATS_001"]
    volumes = read_study(found.studies[0])
    assert np.array_equal(volumes["ct"].data, made["FLAIR"])
    assert np.array_equal(volumes["pet"].data, made["t1gd"])
    assert np.array_equal(volumes["label"].data, np.minimum(made["label"], 2))


def test_classes_and_channels_of_the_decathlon(msd):
    labels = {"0": "background", "1": "enhancing tumor", "2": "Edema", "3": "necrosis"}
    root, made = msd(1, labels=labels), mri_arrays(0)
    (study,) = find_studies(root).studies
    label = read_study(study)["label"].data
    assert np.array_equal(label, np.choose(made["label"], (0, 2, 1, 2)))
    stack = np.stack([made[name] for name in MSD_CHANNELS[:3]], -1)
    write_nifti(root / "imagesTr/BRATS_001.nii.gz", stack, np.eye(4))
    (finding,) = findings_of(study)
    assert "wrong dimensions (16, 14, 12, 3)" in finding.found and "4 channels" in finding.remedy
    assert "edema" in message_of(msd(1, labels={"0": "background", "1": "tumor"}))


def test_uncompressed_and_hidden_files(tcia, nnunet, msd):
    for root in (tcia(1), nnunet(1), msd(1)):
        for file in list(root.rglob("*.nii.gz")):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.rename(file.with_name("._case_001_0000.nii.gz"))  # as an archive from a Mac
        for name in ("__MACOSX/PETCT_0000000000/study", ".cache", "PETCT_0000000000/.ipynb"):
            (root / name).mkdir(parents=True)
        if (root / "dataset.json").exists():
            rewrite(root, training=None)  # so that the files on disk are listed
        found = find_studies(root)
        assert (len(found.studies), found.findings) == (1, [])
        read_study(found.studies[0])


def test_names_of_cases(msd, nnunet):
    root = msd(1)
    for file in list(root.rglob("BRATS_*")):  # as nnU-Net ends the names of channels
        file.rename(file.with_name("BRATS_0001.nii.gz"))
    rewrite(root, training=[{"image": "./imagesTr/BRATS_0001.nii.gz"}])
    found = find_studies(root)
    assert found.layout == "Medical Segmentation Decathlon" and found.findings == []
    assert [s.name for s in found.studies] == ["BRATS_0001"]
    found = find_studies(nnunet(2, name="fdg_0011f3deaf_{:02d}-01-2003-NA-PET-CT"))
    assert found.patients_known and {s.patient for s in found.studies} == {"fdg_0011f3deaf"}


def test_studies_to_predict(nnunet, tcia):
    root = nnunet(2)
    (root / "imagesTs").mkdir()
    assert len(find_studies(root, labelled=False).studies) == 2  # as there are no test images
    for i in range(2):
        shutil.copy(root / f"imagesTr/case_000_000{i}.nii.gz", root / f"imagesTs/t_000{i}.nii.gz")
    assert [s.name for s in find_studies(root).studies] == ["case_000", "case_001"]
    for folder in (root, root / "imagesTs"):
        found = find_studies(folder, labelled=False)
        assert found.layout == "nnU-Net raw" and found.findings == []
        assert [(s.name, s.label) for s in found.studies] == [("t", None)]
    assert "no studies found" in message_of(root / "imagesTs")
    folder = next(tcia(1).glob("PETCT_*/*"))
    (folder / "SEG.nii.gz").unlink()
    found = find_studies(folder, labelled=False)
    assert [s.label for s in found.studies] == [None] and found.findings == []
    assert set(read_study(found.studies[0])) == {"pet", "ct"}


def test_a_layout_is_a_row(tmp_path, monkeypatch):
    def read(root, asked):
        yield "a note"
        for file in sorted(root.glob("*.ct.nii")):
            pet = Source(file.with_name(file.name.replace(".ct.", ".pet.")))
            yield Study(file.name[:2], None, "petct", Source(file), pet, root / "mask.nii")

    monkeypatch.setattr(studies, "LAYOUTS", (*studies.LAYOUTS, Layout("ours", "*.ct.nii", read)))
    for layout in studies.LAYOUTS:
        assert f"{layout.sign} ({layout.name})" in message_of(tmp_path).split("found. ")[1]
    assert "no such folder" in message_of(tmp_path / "nowhere")
    for name in ("s1.ct", "s1.pet", "s2.ct"):
        (tmp_path / f"{name}.nii").touch()
    found = find_studies(tmp_path, labelled=False)
    made = Study(
        "s1", "s1", "petct", *(Source(tmp_path / f"s1.{x}.nii") for x in ("ct", "pet")), None
    )
    missing = Finding(str(tmp_path / "s2.pet.nii"), "missing file", "Copy it there, or take s2 out")
    assert found == Found("petct", "ours", [made], [missing], False, ["a note"])


CONTENTS = (
    ("channels are named CT, CT", {"channel_names": {"0": "CT", "1": "CT"}}),
    ("none is guessed", {"channel_names": {"0": "CT", "1": "PET", "2": "SUV"}}),
    ("expected channel_names", {"channel_names": {}}),
    ("expected channel_names", {"channel_names": ["CT", "PET"]}),
    ("expected channel_names", {"channel_names": {"CT": 0, "PET": 1}}),
    ("and labels", {"labels": None}), ("and labels", {"labels": {"background": 0, "a": [[1], 2]}}),
    ("--lesion-labels 1 2", {"labels": {"background": 0, "a": 1, "b": 2}}),
    ("expected", {"training": [3]}), ("expected", {"training": [{"label": "a"}]}),
    ("damaged", "{"), ("expected channel_names", "[1]"),
)  # fmt: skip


@pytest.mark.parametrize("expected, change", CONTENTS)
def test_bad_dataset_json(nnunet, expected, change):
    root = nnunet(1)
    if isinstance(change, dict):
        rewrite(root, **change)
    else:
        (root / "dataset.json").write_text(change)
    message = message_of(root)
    assert message.startswith(f"{root / 'dataset.json'}: ") and expected in message


@pytest.mark.parametrize("name", ["SUVbw", "SUV-bw", "FDG-PET", "PSMA-PET", "PET_SUV", "PT", "pet"])
def test_names_of_pet(name):
    assert studies.find_channels(Path("x"), {"0": name, "1": "CT"}) == ("petct", (1, 0))


A, B = {"background": 0}, {"background": 0, "edema": 1, "tumor": 2}
LABELS = (  # kind, labels, --lesion-labels; classes by value, or the words of the refusal
    ("petct", A | {"anything": 1}, (), {0: 0, 1: 1}),
    ("petct", {"0": "background", "2": "x"}, (), {0: 0, 2: 1}),
    ("petct", A | {"lesion": [1, 3]}, (), {0: 0, 1: 1, 3: 1}),
    ("petct", A | {"GTVp": 1, "GTVn": 2, "GTVx": 3}, (), {0: 0, 1: 1, 2: 1, 3: 0}),
    ("petct", A | {"lung cancer": 1, "no lesion": 2, "non-tumor": 3}, (), {0: 0, 1: 1, 2: 0, 3: 0}),
    ("petct", A | {"tumorous": 1, "Liver_metastasis": 2}, (), {0: 0, 1: 0, 2: 1}),
    ("petct", A | {"peri tumor": 1, "node": 2}, (), "--lesion-labels 1 2"),
    ("petct", A | {"a": 1, "b": 2}, (2,), {0: 0, 1: 0, 2: 1}),
    ("petct", A | {"a": 1, "b": 2}, (3,), "--lesion-labels 1 2"),
    ("petct", A | {"tumor": 1, "ignore": 2}, (), "Voxels to ignore"),
    ("petct", {"tumor": 1}, (), "Expected 0 for the background"),
    ("petct", {"tumor": 0, "background": 1}, (), "Expected 0 for the background"),
    ("mri", B, (), {0: 0, 1: 1, 2: 2}),
    ("mri", B | {"ignore": 3}, (), "Voxels to ignore"),
    ("mri", A | {"NCR": 1, "ED": 2, "ET": 4}, (), {0: 0, 1: 2, 2: 1, 4: 2}),
    ("mri", A | {"NETC": 1, "SNFH": 2, "ET": 3, "RC": 4}, (), {0: 0, 1: 2, 2: 1, 3: 2, 4: 0}),
    ("mri", A | {"whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}, (),
     {0: 0, 1: 1, 2: 2, 3: 2}),
    ("mri", B | {"ventricle": 3}, (), "edema, and tumour parts"),
    ("mri", A | {"whole tumor": [1, 2]}, (), "edema, and tumour parts"),
)  # fmt: skip


@pytest.mark.parametrize("kind, labels, given, expected", LABELS)
def test_labels_by_their_names(kind, labels, given, expected):
    def read():
        return dict(studies.find_classes(Path("d.json"), kind, labels, given, []))

    if isinstance(expected, dict):
        assert read() == expected
    else:
        with pytest.raises(UserError, match=f"^d.json: labels .*{expected}"):
            read()


SEEN = (
    ("dataset.json lies in", "deep/dataset.json"), ("imagesTr without", "imagesTr/a_0000.nii.gz"),
    ("is no NIfTI. Convert such files", "a/b.mha"), ("DICOM", "a/1-001.dcm"),
    ("HECKTOR's raw form", "CHUM-001__CT.nii.gz"), ("Unpack it", "autopet.tar.gz"),
    ("Expected dataset.json", "x.nii.gz"),
)  # fmt: skip


@pytest.mark.parametrize("words, file", SEEN)
def test_what_is_not_read_says_what_it_saw(tmp_path, words, file):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert words in message_of(tmp_path)


def test_patients_that_differ_in_case_only(nnunet):
    root = nnunet(2, name="fdg_0011F3DEAF_{:02d}-01-2003")
    for file in list(root.rglob("*_01-01*")):
        file.rename(file.with_name(file.name.replace("F3DEAF", "f3deaf")))
    assert {study.patient for study in find_studies(root).studies} == {"fdg_0011F3DEAF"}


def test_a_pipe_is_no_file(tcia):
    root = tcia(1)
    path = next(root.rglob("SUV.nii.gz"))
    path.unlink()
    os.mkfifo(path)
    (finding,) = find_studies(root).findings
    assert finding[:2] == (str(path), "not a file")


@pytest.mark.parametrize("layout", ["tcia", "nnunet", "msd"])
def test_missing_file(request, layout):
    root = request.getfixturevalue(layout)(2)
    for path in sorted(root.rglob("*.nii.gz")):
        away = path.rename(path.with_suffix(".away"))
        found = find_studies(root)
        (finding,) = found.findings
        assert finding[:2] == (str(path), "missing file") and "Copy it there" in finding.remedy
        assert len(found.studies) == 1
        away.rename(path)


def test_mask_without_images_and_patient_without_files(nnunet, tcia):
    root = nnunet(2)
    images = sorted(root.glob("imagesTr/case_001_*"))
    for file in images:
        file.unlink()
    assert [f.file for f in find_studies(root).findings] == [str(file) for file in images]
    assert find_studies(root, labelled=False).findings == []
    folder = tcia(1) / "PETCT_00000000ff" / "study"
    folder.mkdir(parents=True)
    found = find_studies(folder.parent.parent)
    assert {Path(f.file).parent for f in found.findings} == {folder} and len(found.studies) == 1


def test_same_name_twice(tcia, nnunet):
    root, other = tcia(2), nnunet(2)
    shutil.copytree(root / "PETCT_0000000000", root / "copy" / "PETCT_0000000000")
    image = other / "imagesTr/case_000_0001.nii.gz"
    image.with_suffix("").write_bytes(gzip.decompress(image.read_bytes()))
    twice = "there as .nii and as .nii.gz"
    for folder, found_there, count in ((root, f"duplicate case {NAME}", 2), (other, twice, 1)):
        found = find_studies(folder)
        (finding,) = found.findings
        assert finding.found.startswith(found_there) and len(found.studies) == count


# ------------------------------------------------------------------ the input check


def swap_byte(raw, place):
    return raw[:place] + bytes([raw[place] ^ 255]) + raw[place:][1:]


DAMAGES = [
    ("not a NIfTI", lambda raw: b""),
    *(("cannot be read", lambda raw, n=n: raw[:n]) for n in (1, 5, 10, 30, 99, -9, -8, -4, -1)),
    ("cannot be read", lambda raw: swap_byte(raw, len(raw) // 2)),
    ("cannot be read (CRC", lambda raw: swap_byte(raw, len(raw) - 5)),
    ("cannot be read (Not a gzipped file", gzip.decompress),
    ("not a NIfTI", lambda raw: gzip.compress(b"x" * 1000)),
    ("shorter", lambda raw: gzip.compress(gzip.decompress(raw)[:-1])),
]


@pytest.mark.parametrize("words, damage", DAMAGES)
@pytest.mark.parametrize("slot", ["pet", "label"])
def test_damaged_file(study, slot, words, damage):
    file = study.sources[slot].path
    file.write_bytes(damage(file.read_bytes()))
    (finding,) = findings_of(study)
    assert finding.file == str(file) and words in finding.found


HEADERS = (
    ("spacing [0.0, 4.0, 5.0] mm is not above zero", {"pixdim__1": 0}),
    ("not above zero", {"pixdim__3": -5}), ("not above zero", {"pixdim__2": np.inf}),
    ("the affine is not invertible", {"srow_x": 0}), ("affine", {"srow_z": np.nan}),
    ("is not that of a scan in mm", {"pixdim__1": 4000, "srow_x__0": 4000}),  # micrometres
    ("wrong dimensions (24, 20)", {"dim__0": 2}), ("wrong dimensions", {"dim__3": 1}),
    ("wrong dimensions", {"dim__0": 4, "dim__4": 2}), ("complex64", {"datatype": 32, "dim__3": 9}),
    ("('R', 'u1')", {"datatype": 128, "dim__1": 2}), ("not a NIfTI", {"datatype": 9999}),
    ("shorter than its header says", {"dim__3": 19}), ("shorter", {"vox_offset": 356}),
    ("not a NIfTI", {"vox_offset": np.nan}), ("not a NIfTI", {"vox_offset": np.inf}),
    ("not a NIfTI", {"scl_slope": 1, "scl_inter": np.nan}), ("not a NIfTI", {"magic": b"abc"}),
)  # fmt: skip


@pytest.mark.parametrize("words, values", HEADERS)
def test_bad_header(tmp_path, words, values):
    study = write_petct(tmp_path, petct_arrays(0), las(), end=".nii")
    raw = nib.Nifti1Image(petct_arrays(0)["SUV"], las()).to_bytes()
    header = nib.Nifti1Header(raw[:348], check=False)
    for name, value in values.items():
        field, *index = name.split("__")
        header[field][tuple(map(int, index)) or ...] = value
    study.pet.path.write_bytes(header.binaryblock + raw[348:])
    (finding,) = findings_of(study)
    assert finding.file == str(study.pet.path) and words in finding.found


NO_NUMBER = [(s, v, "NaN or Inf") for s in STEMS.values() for v in (np.nan, np.inf, -np.inf)]
UNKNOWN = [("SEG", v, f"label values {v} outside the expected set {{0, 1}}") for v in (2, -1, 0.5)]


@pytest.mark.parametrize("stem, value, words", NO_NUMBER + UNKNOWN)
def test_bad_values(tmp_path, stem, value, words):
    arrays = petct_arrays(0)
    arrays[stem] = arrays[stem].astype(np.float32)
    arrays[stem][0, 0, 0] = value
    (finding,) = findings_of(write_petct(tmp_path, arrays, las()))
    assert words in finding.found and f"{stem}.nii.gz" in finding.file


@pytest.mark.parametrize("slot", ["ct", "label"])
def test_affine_tolerance(study, slot):
    file, array = study.sources[slot].path, petct_arrays(0)[STEMS[slot]]
    write_nifti(file, array, las(origin=(30.0, -19.51, -500.0)))  # 0.49 mm off
    assert set(read_study(study)) == {"ct", "pet", "label"}
    write_nifti(file, array, las(origin=(30.0, -19.49, -500.0)))
    (finding,) = findings_of(study)
    assert "corners lie up to 0.51 mm apart" in finding.found and finding.file == str(file)


def test_every_finding_of_a_study(study):
    arrays = petct_arrays(0)  # 23 steps of 4 mm against 4.05 mm: 1.15 mm at the far end
    write_nifti(study.ct.path, arrays["CTres"], las((4.05, 4.0, 5.0)))
    write_nifti(study.label, arrays["SEG"][:-1], las())
    drift, shape = findings_of(study)
    assert "1.15 mm apart" in drift.found and drift.file == str(study.ct.path)
    assert "shape (23, 20, 18) differs from (24, 20, 18) of SUV.nii.gz" in shape.found
    write_nifti(study.label, arrays["SEG"] * 7, las())
    study.pet.path.write_bytes(b"no")
    study.ct.path.unlink()
    study.ct.path.mkdir()
    findings = findings_of(study)
    assert [f.file for f in findings] == [str(s.path) for s in study.sources.values()]
    assert "cannot be read" in findings[1].found and "directory" in findings[1].found


COMMENT = nib.nifti1.Nifti1Extension("comment", b"made by a scanner")
KINDS = {  # the same values in other encodings: what is done to array, image, header and bytes
    "NIfTI-2": {"image": nib.Nifti2Image},
    "big-endian": {"image": lambda a, m: nib.Nifti1Image(a, m, nib.Nifti1Header(endianness=">"))},
    "trailing axes": {"array": lambda a: a[..., None, None]},
    "float64": {"array": np.float64},
    "scaled": {"array": lambda a: 2 * a + 6, "header": {"scl_slope": 0.5, "scl_inter": -3}},
    "DICOM": {"array": lambda a: a + np.float32(9), "header": {"scl_slope": 1, "scl_inter": -9}},
    "qform": {"then": lambda i: (i.set_sform(None, 0), i.set_qform(las(), 1))},
    "slope zero": {"header": {"scl_slope": 0}},
    "extension": {"then": lambda i: i.header.extensions.append(COMMENT)},
    "two gzip members": {"zip": lambda raw: gzip.compress(raw[:50]) + gzip.compress(raw[50:])},
    "two equal members": {
        "zip": lambda raw: gzip.compress(raw[: len(raw) // 2]) + gzip.compress(raw[len(raw) // 2 :])
    },
    "padded gzip": {"zip": lambda raw: gzip.compress(raw) + bytes(512)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_legal_files(tmp_path, kind):
    arrays, how = petct_arrays(0), KINDS[kind]
    study = write_petct(tmp_path, arrays, las(), ".nii.gz" if "zip" in how else ".nii")
    for slot, source in study.sources.items():
        array = how.get("array", np.array)(arrays[STEMS[slot]])
        image = how.get("image", nib.Nifti1Image)(array, las())
        how.get("then", id)(image)
        raw = image.to_bytes()
        if "header" in how:
            header = nib.Nifti1Header(raw[:348])
            for name, value in how["header"].items():
                header[name] = value
            raw = header.binaryblock + raw[348:]
        source.path.write_bytes(how.get("zip", bytes)(raw))
    assert_read(study, arrays)
