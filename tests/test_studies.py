"""studies.py: layouts by what the fixtures wrote, reading by the arrays that were written."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import (
    MSD_CHANNELS,
    las,
    mri_arrays,
    on_own_grids,
    petct_arrays,
    stored_as,
    write_decathlon,
    write_nifti,
    write_nnunet,
    write_study,
)

import studies
from common import UserError
from studies import BadStudy, Finding, Layout, Source, Study, StudyFolder, find_studies, read_study

STEMS = {"ct": "CTres", "pet": "SUV", "label": "SEG"}


def write_petct(folder, arrays, end=".nii.gz"):
    write_study(folder, arrays, end=end)
    ct, pet, label = [folder / (stem + end) for stem in STEMS.values()]
    return Study("case", "patient", "petct", Source(ct), Source(pet), label)


@pytest.fixture
def study(tmp_path):
    return write_petct(tmp_path / "study", petct_arrays(0))


def assert_read(study, arrays):
    for slot, volume in read_study(study).items():
        np.testing.assert_allclose(volume.data, arrays[STEMS[slot]], atol=1e-4, err_msg=slot)
        np.testing.assert_allclose(volume.affine, las(), atol=1e-5)


def findings_of(study):
    with pytest.raises(BadStudy) as caught:
        read_study(study)
    assert "\n" not in "".join(map(str, caught.value.findings))
    return caught.value.findings


def message_of(root, **options):
    """The line of the UserError that find_studies must raise."""
    with pytest.raises(UserError) as caught:
        find_studies(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(root, **changes):
    """Change keys of a dataset.json."""
    path = root / "dataset.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


# ------------------------------------------------------------------ layouts


def test_links_are_followed_once(tcia, tmp_path):
    root = tcia(2, root=tmp_path / "PETCT_cohort")  # whose name is not that of a patient
    links = tmp_path / "links"
    links.mkdir()
    (links / "all").symlink_to(root)
    (root / "loop").symlink_to(links)
    for start in (root, links):
        folder = find_studies(start)
        assert (len(folder.studies), folder.findings) == (2, [])


@pytest.mark.parametrize("channels", [("CT", "PET"), ("PET", "CT"), ("other", "suv", "CT-res")])
def test_channels_of_nnunet_go_by_name(tmp_path, channels):
    arrays = petct_arrays(0)
    ct, pet, mask = arrays.values()
    images = {"CT": ct, "CT-res": ct, "PET": pet, "suv": pet, "other": mask}
    write_nnunet(tmp_path, {"a": [*(images[name] for name in channels), mask]}, channels)
    folder = find_studies(tmp_path)
    assert (folder.kind, folder.layout, folder.patients_known) == ("petct", "nnU-Net raw", False)
    (study,) = folder.studies
    assert (study.name, study.patient) == ("a", "a")
    assert_read(study, arrays)


@pytest.mark.parametrize(
    "channels",
    [MSD_CHANNELS, ("T2w", "t1gd", "T1w", "FLAIR"), ("T1-Gd", "flair"), ("T1w", "FLAIR", "T1ce")],
)
def test_channels_and_classes_of_the_decathlon(tmp_path, channels):
    arrays = mri_arrays(0)
    flair, t1gd = arrays["FLAIR"], arrays["t1gd"]
    arrays.update({"T1-Gd": t1gd, "T1ce": t1gd, "flair": flair})
    labels = {"0": "background", "1": "enhancing tumor", "2": "Edema", "3": "necrosis"}
    write_decathlon(tmp_path, {"BRATS_001": arrays}, channels, labels)
    folder = find_studies(tmp_path)
    assert (folder.kind, folder.layout) == ("mri", "Medical Segmentation Decathlon")
    (study,) = folder.studies
    assert folder.patients_known and study.patient == "BRATS_001"
    volumes = read_study(study)
    assert np.array_equal(volumes["ct"].data, flair)
    assert np.array_equal(volumes["pet"].data, t1gd)
    assert np.array_equal(volumes["label"].data, np.choose(arrays["label"], (0, 2, 1, 2)))

    stack = np.stack([flair, t1gd] * 3, -1)
    write_nifti(study.pet.path, stack, np.eye(4))
    (finding,) = findings_of(study)
    assert "wrong dimensions (16, 14, 12, 6)" in finding.problem
    assert f"{len(channels)} channels" in finding.remedy


@pytest.mark.parametrize("layout", ["tcia", "nnunet", "msd"])
def test_uncompressed_and_hidden_files(request, layout):
    root = request.getfixturevalue(layout)(1)
    for file in list(root.rglob("*.nii.gz")):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.rename(file.with_name("._case_001_0000.nii.gz"))  # as an archive from a Mac
    for name in ("__MACOSX/PETCT_0000000000/study", ".cache", "PETCT_0000000000/.ipynb"):
        (root / name).mkdir(parents=True)
    if layout == "msd":
        rewrite(root, training=[])  # so that the files on disk are listed
    folder = find_studies(root)
    assert (len(folder.studies), folder.findings) == (1, [])
    read_study(folder.studies[0])


def test_cases_that_end_as_channels_do(msd):
    root = msd(1)
    for file in list(root.rglob("BRATS_*")):
        file.rename(file.with_name("BRATS_0001.nii.gz"))
    rewrite(root, training=[{"image": "./imagesTr/BRATS_0001.nii.gz"}])
    folder = find_studies(root)
    assert folder.layout == "Medical Segmentation Decathlon" and folder.findings == []
    assert [study.name for study in folder.studies] == ["BRATS_0001"]


def test_studies_to_predict(nnunet, tcia):
    root = nnunet(2)
    (root / "imagesTs").mkdir()
    assert len(find_studies(root, labelled=False).studies) == 2  # as there are no test images
    for i in range(2):
        shutil.copy(root / f"imagesTr/case_000_000{i}.nii.gz", root / f"imagesTs/t_000{i}.nii.gz")
    assert [study.name for study in find_studies(root).studies] == ["case_000", "case_001"]
    for start in (root, root / "imagesTs"):
        folder = find_studies(start, labelled=False)
        assert folder.layout == "nnU-Net raw" and folder.findings == []
        assert [(study.name, study.label) for study in folder.studies] == [("t", None)]
    assert "no studies found" in message_of(root / "imagesTs")

    start = next(tcia(1).glob("PETCT_*/*"))
    (start / "SEG.nii.gz").unlink()
    folder = find_studies(start, labelled=False)
    assert [study.label for study in folder.studies] == [None] and folder.findings == []
    assert list(read_study(folder.studies[0])) == ["pet", "ct"]


def test_a_layout_is_a_row(tmp_path, monkeypatch):
    def read(root, request):
        yield "a note"
        for name in ("s1", "s2"):
            ct = Source(root / f"{name}.ct.nii")
            pet = Source(root / f"{name}.pet.nii")
            yield Study(name, None, "petct", ct, pet, root / "mask.nii")

    assert "<case>_{flair,t1ce,seg}.nii.gz or -{t2f,t1c,seg} (BraTS)" in message_of(tmp_path)
    monkeypatch.setattr(studies, "LAYOUTS", (*studies.LAYOUTS, Layout("ours", "*.ct.nii", read)))
    first, second = [*read(tmp_path, None)][1:]
    for source in (first.ct, first.pet, second.ct):
        source.path.touch()
    study = replace(first, patient="s1", label=None)
    missing = Finding(str(second.pet.path), "missing file", "Copy it there, or take s2 out")
    expected = StudyFolder(tmp_path, "petct", "ours", [study], [missing], False, ["a note"])
    assert find_studies(tmp_path, labelled=False) == expected


def test_options_without_effect(tcia, nnunet):
    message = message_of(tcia(1), channels=["ct=0", "pet=1"])
    assert message == "--channels has no effect on AutoPET (TCIA) here. Leave it out."
    message = message_of(nnunet(1), labelled=False, lesion_labels=(1,))
    assert message.startswith("--lesion-labels has no effect on nnU-Net raw")


BAD_CONTENTS = (
    ("channels are named CT, CT", {"channel_names": {"0": "CT", "1": "CT"}}),
    ("none is guessed", {"channel_names": {"0": "CT", "1": "PET", "2": "SUV"}}),
    ("Expected channel_names", {"channel_names": {}}),
    ("Expected channel_names", {"channel_names": ["CT", "PET"]}),
    ("Expected channel_names", {"channel_names": {"CT": 0, "PET": 1}}),
    ("and labels", {"labels": None}),
    ("and labels", {"labels": {"background": 0, "a": [[1], 2]}}),
    ("--lesion-labels 1 2", {"labels": {"background": 0, "a": 1, "b": 2}}),
    ("damaged", {"training": [3]}),
    ("damaged", {"training": [{"label": "a"}]}),
    ("Expected channel_names", "[1]"),
)


@pytest.mark.parametrize("expected, change", BAD_CONTENTS)
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
    assert studies.find_channels({"0": name, "1": "CT"}) == ("petct", 1, 0)


NAME_THEM = "--lesion-labels 1 2"
LABELS = (  # kind, names and values, --lesion-labels; classes of 1, 2 ... or words of the refusal
    ("petct", "background 0, anything 1", (), [1]),
    ("petct", "background 0, lesion 1 3, x 2", (), [1, 0, 1]),
    ("petct", "background 0, GTVp 1, GTVn 2, GTVx 3", (), [1, 1, 0]),
    ("petct", "background 0, lung cancer 1, no lesion 2, non-tumor 3", (), [1, 0, 0]),
    ("petct", "background 0, tumorous 1, Liver_metastasis 2", (), [0, 1]),
    ("petct", "background 0, peri tumor 1, node 2", (), NAME_THEM),
    ("petct", "background 0, a 1, b 2", (2,), [0, 1]),
    ("petct", "background 0, a 1, b 2", (3,), NAME_THEM),
    ("petct", "background 0, a 1, b 2", (2, 3), NAME_THEM),
    ("petct", "tumor 1", (), "Expected 0 for the background"),
    ("mri", "background 0, edema 1, tumor 2", (), [1, 2]),
    ("mri", "background 0, edema 1, tumor 2, ignore 3", (), "Voxels to ignore"),
    ("mri", "background 0, NCR 1, ED 2, ET 3", (), [2, 1, 2]),
    ("mri", "background 0, NETC 1, SNFH 2, ET 3, RC 4", (), [2, 1, 2, 0]),
    ("mri", "background 0, whole tumor 1 2 3, tumor core 2 3, enhancing tumor 3", (), [1, 2, 2]),
    ("mri", "background 0, edema 1, tumor 2, ventricle 3", (), "edema, and tumour parts"),
    ("mri", "background 0, whole tumor 1 2", (), "edema, and tumour parts"),
)


@pytest.mark.parametrize("kind, text, lesion_labels, expected", LABELS)
def test_labels_by_their_names(kind, text, lesion_labels, expected):
    labels = {}
    for entry in text.split(", "):
        name = entry.rstrip("0123456789 ")
        labels[name] = [int(value) for value in entry.removeprefix(name).split()]
    names = studies.labels_by_value(labels)

    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"^labels .*{expected}"):
            studies.find_classes(kind, names, lesion_labels)
        return
    classes = studies.find_classes(kind, names, lesion_labels)
    assert classes == tuple(enumerate([0, *expected]))


def touch(root, *names):
    for name in names:
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_hecktor_of_2022_to_train_and_to_predict(tmp_path):
    touch(tmp_path, "imagesTr/A-1__CT", "imagesTr/A-1__PT", "imagesTr/A-1__RTDOSE", "labelsTr/A-1")
    touch(tmp_path, "imagesTs/B-1__CT", "imagesTs/B-1__PT", "labelsTr/A-2")
    folder = find_studies(tmp_path)
    assert [study.name for study in folder.studies] == ["A-1"]
    missing = [Path(finding.file).name for finding in folder.findings]
    assert missing == ["A-2__PT.nii.gz", "A-2__CT.nii.gz"]

    for start in (tmp_path, tmp_path / "imagesTs"):
        folder = find_studies(start, labelled=False)
        assert folder.layout.startswith("HECKTOR") and folder.findings == []
        assert [(study.name, study.label) for study in folder.studies] == [("B-1", None)]


def test_hecktor_of_2025_has_its_masks_in_one_task_of_three(tmp_path):
    touch(tmp_path, "Task 1/A-1/A-1__CT", "Task 1/A-1/A-1__PT", "Task 1/A-1/A-1")
    touch(tmp_path, "Task 2/A-1/A-1__CT", "Task 2/A-1/A-1__PT", "Task 2/A-1/A-1__CTPlanning")
    for labelled in (True, False):
        folder = find_studies(tmp_path, labelled=labelled)
        assert folder.findings == []
        assert [study.ct.path.parent.parent.name for study in folder.studies] == ["Task 1"]
    (study,) = find_studies(tmp_path / "Task 2", labelled=False).studies
    assert (study.name, study.reference) == ("A-1", "ct")


def test_patients_that_differ_in_case_only(nnunet):
    root = nnunet(2, name="fdg_0011F3DEAF_{:02d}-01-2003")
    for file in list(root.rglob("*_01-01*")):
        file.rename(file.with_name(file.name.replace("F3DEAF", "f3deaf")))
    assert {study.patient for study in find_studies(root).studies} == {"fdg_0011F3DEAF"}


@pytest.mark.parametrize("layout", ["tcia", "nnunet", "msd"])
def test_missing_file(request, layout):
    root = request.getfixturevalue(layout)(2)
    for path in sorted(root.rglob("*.nii.gz")):
        away = path.rename(path.with_suffix(".away"))
        folder = find_studies(root)
        (finding,) = folder.findings
        assert finding[:2] == (str(path), "missing file") and "Copy it there" in finding.remedy
        assert len(folder.studies) == 1
        away.rename(path)


def test_mask_without_images_and_patient_without_files(nnunet, tcia):
    root = nnunet(2)
    images = sorted(root.glob("imagesTr/case_001_*"))
    for file in images:
        file.unlink()
    assert sorted(finding.file for finding in find_studies(root).findings) == [*map(str, images)]
    assert find_studies(root, labelled=False).findings == []
    root = tcia(1)
    empty = root / "PSMA_00000000000000ff" / "study"
    empty.mkdir(parents=True)
    folder = find_studies(root)
    assert {Path(finding.file).parent for finding in folder.findings} == {empty}
    assert len(folder.studies) == 1


def test_studies_and_files_that_are_there_twice(tcia):
    root = tcia(2)
    shutil.copytree(root / "PETCT_0000000000", root / "copy/PETCT_0000000000")
    file = next(root.glob("PETCT_0000000001/*/SUV.nii.gz"))
    file.with_suffix("").touch()
    folder = find_studies(root)
    duplicate, ambiguous = sorted(folder.findings, key=lambda finding: finding.problem)
    assert duplicate.problem.startswith("duplicate case PETCT_0000000000/01-01-2000")
    assert ambiguous[:2] == (str(file), "there as .nii and as .nii.gz")
    assert [study.patient for study in folder.studies] == ["PETCT_0000000000"]


# ------------------------------------------------------------------ the input check


DAMAGES = [
    ("not a NIfTI", lambda raw: b""),
    ("cannot be read", lambda raw: raw[:1]),
    ("cannot be read", lambda raw: raw[:30]),
    ("cannot be read", lambda raw: raw[:-9]),
    ("cannot be read", lambda raw: raw[:-1]),
    ("cannot be read", lambda raw: raw[:100] + bytes(9) + raw[109:]),
    ("cannot be read (CRC", lambda raw: raw[:-8] + bytes(4) + raw[-4:]),
    ("cannot be read (Not a gzipped file", gzip.decompress),
    ("not a NIfTI", lambda raw: gzip.compress(b"x" * 1000)),
    ("shorter", lambda raw: gzip.compress(gzip.decompress(raw)[:-1])),
]


@pytest.mark.parametrize("words, damage", DAMAGES)
def test_damaged_file(study, words, damage):
    study.label.write_bytes(damage(study.label.read_bytes()))
    (finding,) = findings_of(study)
    assert finding.file == str(study.label) and words in finding.problem


HEADERS = (  # fields, or one item of a field, and the words of the problem
    ({"pixdim 1": 0}, "spacing [0.0, 4.0, 5.0] mm is not above zero"),
    ({"pixdim 2": np.inf}, "not above zero"),
    ({"srow_x": 0}, "its affine is not that of a scan in mm"),
    ({"srow_z 3": np.nan}, "affine"),
    ({"srow_x 0": 0, "srow_y 0": 4}, "affine"),  # two axes are parallel
    ({"pixdim 1": 4000, "srow_x 0": 4000}, "affine"),  # micrometres
    ({"pixdim 1": 1e-3, "srow_x 0": 1e-3}, "affine"),
    ({"dim 0": 2}, "wrong dimensions (24, 20)"),
    ({"dim 3": 1}, "wrong dimensions"),
    ({"dim 0": 4, "dim 4": 2}, "wrong dimensions"),
    ({"datatype": 32, "dim 3": 9}, "complex64"),
    ({"datatype": 128, "dim 1": 2}, "('R', 'u1')"),
    ({"dim 3": 19}, "shorter than its header says"),
    ({"vox_offset": 356}, "shorter"),
    ({"vox_offset": np.nan}, "not a NIfTI"),
    ({"scl_slope": 1, "scl_inter": np.nan}, "not a NIfTI"),
)


def change_header(raw, fields, **options):
    """The bytes of a NIfTI file with other fields of its header; "dim 3" is an item of dim."""
    header = nib.Nifti1Header(raw[:348], **options)
    for name, value in fields.items():
        field, *index = name.split()
        header[field][tuple(map(int, index)) or ...] = value
    return header.binaryblock + raw[348:]


@pytest.mark.parametrize("fields, words", HEADERS)
def test_bad_header(tmp_path, fields, words):
    study = write_petct(tmp_path, petct_arrays(0), end=".nii")
    raw = study.pet.path.read_bytes()
    study.pet.path.write_bytes(change_header(raw, fields, check=False))
    (finding,) = findings_of(study)
    assert finding.file == str(study.pet.path) and words in finding.problem


BAD_VALUES = [
    ("CTres", np.nan, "NaN or Inf"),
    ("SUV", np.inf, "NaN or Inf"),
    ("SUV", -np.inf, "NaN or Inf"),
    ("SEG", np.nan, "NaN or Inf"),
    ("SEG", 2, "label values [2.0] outside the expected set {0, 1}"),
    ("SEG", -1, "label values [-1.0] outside the expected set {0, 1}"),
    ("SEG", 0.5, "label values [0.5] outside the expected set {0, 1}"),
]


@pytest.mark.parametrize("stem, value, words", BAD_VALUES)
def test_bad_values(tmp_path, stem, value, words):
    arrays = petct_arrays(0)
    arrays[stem] = arrays[stem].astype(np.float32)
    arrays[stem][0, 0, 0] = value
    (finding,) = findings_of(write_petct(tmp_path, arrays))
    assert words in finding.problem and finding.file.endswith(f"{stem}.nii.gz")


def test_affine_tolerance(study):
    mask = petct_arrays(0)["SEG"]
    write_nifti(study.label, mask, las(origin=(30.0, -19.51, -500.0)))  # 0.49 mm off
    assert list(read_study(study)) == ["pet", "ct", "label"]
    write_nifti(study.label, mask, las(origin=(30.0, -19.49, -500.0)))
    (finding,) = findings_of(study)
    assert "corners lie up to 0.51 mm apart" in finding.problem
    assert finding.file == str(study.label) and finding.remedy.endswith("--own-grids")


def write_own_grids(folder, mask="SUV", **changed):
    """A study whose images lie on grids of their own; changed: array and affine by stem."""
    images = on_own_grids(petct_arrays(0), mask)
    for stem, (array, affine) in {**images, **changed}.items():
        write_nifti(folder / f"{stem}.nii.gz", array, affine)
    ct, pet, label = [folder / f"{stem}.nii.gz" for stem in STEMS.values()]
    return Study("case", "patient", "petct", Source(ct), Source(pet), label, own_grids=True)


@pytest.mark.parametrize("mask, slot", [("SUV", "pet"), ("CTres", "ct")])
def test_images_on_grids_of_their_own(tmp_path, mask, slot):
    study = write_own_grids(tmp_path, mask)
    volumes = read_study(study)
    for name, stem in STEMS.items():
        array, affine = on_own_grids(petct_arrays(0), mask)[stem]
        assert np.array_equal(volumes[name].data, array)
        assert np.allclose(volumes[name].affine, affine)
    assert studies.reference_slot(study, volumes) == slot

    # Without a mask the layout tells on which grid one would lie.
    without = replace(study, label=None, reference="ct")
    assert studies.reference_slot(without, read_study(without)) == "ct"


@pytest.mark.parametrize("axes", ["LAS", "RAS", "PIR"])  # RAS and LAS differ in handedness
def test_values_on_two_grids_are_those_on_one(tmp_path, axes):
    one_grid = write_petct(tmp_path / "one", petct_arrays(0))
    ct, affine = on_own_grids(petct_arrays(0))["CTres"]
    study = write_own_grids(tmp_path, CTres=stored_as(ct, affine, axes))
    expected = studies.check_values(one_grid, read_study(one_grid))
    assert studies.check_values(study, read_study(study)) == expected


def test_a_mask_on_no_grid_of_its_images(tmp_path):
    mask = petct_arrays(0)["SEG"]
    study = write_own_grids(tmp_path, SEG=(mask, las(origin=(31.0, -20.0, -500.0))))
    (finding,) = findings_of(study)
    assert finding.file == str(study.label)
    assert finding.problem.startswith("affine differs from that of SUV.nii.gz: corners lie up to 1")
    assert "; its shape (24, 20, 18) differs from (48, 40, 18) of CTres.nii" in finding.problem


@pytest.mark.parametrize(
    "shift, share",
    [(0, ""), (44, ""), (52, "only 46% of it"), (88, "only 8% of it"), (400, "only 0% of it")],
)
def test_fields_of_view_that_hardly_overlap(tmp_path, shift, share):
    pet = np.ones((24, 20, 18), np.float32)
    pet[:, :, 9:] = 2  # The warm half is as long as the cold one.
    ct, affine = on_own_grids(petct_arrays(0))["CTres"]
    affine[0, 3] -= shift
    study = write_own_grids(tmp_path, SUV=(pet, las()), CTres=(ct, affine))
    if not share:
        read_study(study)
        return
    (finding,) = findings_of(study)
    assert finding.file == str(study.pet.path)
    assert finding.problem == f"{share} lies inside the field of view of CTres.nii.gz"


def test_a_wide_pet_around_a_narrow_ct(tmp_path):
    ct, affine = on_own_grids(petct_arrays(0))["CTres"]
    wide = np.zeros((48, 40, 18), np.float32)
    wide[12:36, 10:30] = petct_arrays(0)["SUV"]
    study = write_own_grids(tmp_path, SUV=(wide, las(origin=(78.0, -60.0, -500.0))))
    study = replace(study, label=None)
    assert studies.check_values(study, read_study(study))["warnings"] == []


def test_every_finding_of_a_study(study):
    arrays = petct_arrays(0)  # 23 steps of 4 mm against 4.05 mm: 1.15 mm at the far end
    write_nifti(study.ct.path, arrays["CTres"], las((4.05, 4.0, 5.0)))
    write_nifti(study.label, arrays["SEG"][:-1], las())
    drift, shape = findings_of(study)
    assert "1.15 mm apart" in drift.problem and drift.file == str(study.ct.path)
    assert "shape (23, 20, 18) differs from (24, 20, 18) of SUV.nii.gz" in shape.problem

    write_nifti(study.label, arrays["SEG"] * 7, las())
    study.pet.path.write_bytes(b"no")
    study.ct.path.unlink()
    study.ct.path.mkdir()
    findings = findings_of(study)
    assert [finding.file for finding in findings] == [*map(str, study.paths)]
    assert "cannot be read" in findings[1].problem and "directory" in findings[1].problem


def rescaled(array, affine, slope, inter):
    raw = nib.Nifti1Image(array, affine).to_bytes()
    return change_header(raw, {"scl_slope": slope, "scl_inter": inter})


def with_qform(array, affine):
    image = nib.Nifti1Image(array, None)
    image.set_qform(affine, 1)
    return image.to_bytes()


def with_comment(array, affine):
    image = nib.Nifti1Image(array, affine)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"made by a scanner"))
    return image.to_bytes()


def in_two_members(array, affine):
    raw = nib.Nifti1Image(array, affine).to_bytes()
    return gzip.compress(raw[:50]) + gzip.compress(raw[50:]) + bytes(512)


BIG_ENDIAN = nib.Nifti1Header(endianness=">")
LEGAL = {  # other files of the same values: bytes of an array and an affine
    "NIfTI-2": lambda a, m: nib.Nifti2Image(a, m).to_bytes(),
    "big-endian": lambda a, m: nib.Nifti1Image(a, m, BIG_ENDIAN).to_bytes(),
    "trailing axes": lambda a, m: nib.Nifti1Image(a[..., None, None], m).to_bytes(),
    "float64": lambda a, m: nib.Nifti1Image(a.astype(float), m).to_bytes(),
    "scaled": lambda a, m: rescaled(2 * a + 6, m, slope=0.5, inter=-3),
    "DICOM": lambda a, m: rescaled(a + np.float32(9), m, slope=1, inter=-9),
    "slope zero": lambda a, m: rescaled(a, m, slope=0, inter=0),
    "qform": with_qform,
    "extension": with_comment,
    "two gzip members and padding": in_two_members,
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_files(tmp_path, name):
    arrays = petct_arrays(0)
    study = write_petct(tmp_path, arrays, ".nii.gz" if "gzip" in name else ".nii")
    for slot, source in study.sources.items():
        source.path.write_bytes(LEGAL[name](arrays[STEMS[slot]], las()))
    assert_read(study, arrays)
