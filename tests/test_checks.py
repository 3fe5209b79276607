"""checks.py: what cannot be is refused, what is unlikely is a warning, and its neighbours pass."""

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, on_own_grids, petct_arrays, write_nifti, write_study

import eval
from common import UserError
from studies import (
    BadStudy,
    check_values,
    find_studies,
    read_study,
    studies_command,
)

SIDES = [np.linspace(-1.2, 1.2, side) for side in SHAPE]
X, Y, Z = np.meshgrid(*SIDES, indexing="ij")
BODY = X**2 + Y**2 + Z**2 < 1
LESION = petct_arrays(0)["SEG"] > 0
CHANCE = np.random.default_rng(0).random(SHAPE)


def mask_of(share):
    """A mask of that share of the body, as diffuse disease has it."""
    return np.where(BODY, share > CHANCE, 0).astype(np.uint8)


def some(share, value):
    """A change of PET that gives so large a share of its voxels that value."""
    return lambda pet: np.where(share > CHANCE, value, pet)


# The image that is changed, how, and the problem that is found in it.
IMPOSSIBLE = (
    ("SUV", lambda pet: 500 * pet - 1000, "of its voxels lie below -20 and look like HU"),
    ("SUV", some(0.02, -21), "2% of its voxels lie below -20"),
    ("SUV", lambda pet: 0 * pet, "no body found"),
    ("SUV", lambda pet: 0 * pet + 2, "all its voxels are equal"),
    ("CTres", lambda ct: 0 * ct - 1000, "all its voxels are equal"),
    ("SUV", lambda pet: np.clip(pet / 4, 0, 1), "look scaled"),
    ("CTres", lambda ct: (ct + 1000) / 1300, "look scaled"),
    ("SUV", lambda pet: 5000 * pet, "values up to 40000 are not SUV"),
    ("SUV", lambda pet: 100 * pet, "a median of 17"),
    ("CTres", lambda ct: ct + np.int16(1024), "is not HU"),
    ("SEG", lambda mask: mask * 0 + 1, "it covers 100% of the body"),
    ("SEG", lambda mask: 1 - mask, "of the body"),
    ("SEG", lambda mask: mask_of(0.95), "it covers 95% of the body"),
    ("SEG", lambda mask: np.roll(mask, 11, 0), "85% of it lies in air"),
)
POSSIBLE = {
    "ringing beside a bladder": ("SUV", some(0.008, -25)),
    "SUV of -0.5": ("SUV", some(0.3, -0.5)),
    "a bladder of SUV 300": ("SUV", lambda pet: np.where(LESION, 300, pet)),
    "a lesion without uptake": ("SUV", lambda pet: np.where(LESION, 0.1, pet)),
    "a lesion in the lungs": ("CTres", lambda ct: np.where(LESION, np.int16(-950), ct)),
    "CT clipped": ("CTres", lambda ct: np.clip(ct, -160, 240)),
    "padding of -2000": ("CTres", lambda ct: np.where(BODY, ct, np.int16(-2000))),
    "a head": ("CTres", lambda ct: ct + np.int16(300)),
    "diffuse disease": ("SEG", lambda mask: mask_of(0.2)),
    "mask reaching into air": ("SEG", lambda mask: np.roll(mask, (9, 3, 2), (0, 1, 2))),
}


def write_changed(root, stem="SUV", change=np.array, patient=1, mask=""):
    """Write the study of a patient with one image changed; return the study and its folder.

    mask: CTres or SUV, whose grid the mask has; these then lie on grids of their own.
    """
    folder = root / f"PETCT_{patient:010x}/study"
    arrays = petct_arrays(patient)
    arrays[stem] = change(arrays[stem])
    if mask:
        for name, image in on_own_grids(arrays, mask).items():
            write_nifti(folder / f"{name}.nii.gz", *image)
    else:
        write_study(folder, arrays)
    return find_studies(root, own_grids=bool(mask)).studies[-1], folder


@pytest.mark.parametrize("stem, change, problem", IMPOSSIBLE)
@pytest.mark.parametrize("mask", ["", "SUV", "CTres"])
def test_impossible_images(tmp_path, stem, change, problem, mask):
    study, folder = write_changed(tmp_path, stem, change, mask=mask)
    with pytest.raises(BadStudy) as caught:
        check_values(study, read_study(study))
    (finding,) = caught.value.findings
    assert finding.file == str(folder / f"{stem}.nii.gz") and problem in finding.problem


@pytest.mark.parametrize("name", POSSIBLE)
def test_possible_images(tmp_path, capsys, name):
    write_changed(tmp_path, *POSSIBLE[name])
    studies_command([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "no problem was found" in printed and "warning" not in printed


def test_an_unlikely_mask_is_a_warning(tmp_path, capsys):
    _, folder = write_changed(tmp_path, "SEG", lambda mask: mask_of(0.6))
    studies_command([str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"warning: {folder / 'SEG.nii.gz'}: it covers 6" in printed
    assert "no problem was found" in printed


def test_swapped_images_are_refused_in_prediction_too(finished, tmp_path):
    for patient in range(3):
        study, _ = write_changed(tmp_path / "data", patient=patient)
    swapped = study.pet.path.rename(tmp_path / "x")
    study.ct.path.rename(study.pet.path)
    swapped.rename(study.ct.path)
    with pytest.raises(UserError, match="1 problems in 1 files(.|\n)*Are CT and PET swapped"):
        studies_command([str(tmp_path / "data")])
    masks = tmp_path / "masks"
    with pytest.raises(UserError, match="Are CT and PET swapped"):
        eval.eval_command(
            [str(finished[0]), "--predict", str(tmp_path / "data"), "--out", str(masks)]
        )
    assert len(list(masks.iterdir())) == 2  # the others are predicted


@pytest.mark.parametrize("stem", ["CTres", "SUV", "SEG"])
@pytest.mark.parametrize("mask", ["", "SUV"])
def test_sform_against_qform(tmp_path, stem, mask):
    study, folder = write_changed(tmp_path, mask=mask)
    path = folder / f"{stem}.nii.gz"
    image = nib.load(path)
    image.set_qform(image.affine @ np.diag((-1, 1, 1, 1)), 1)
    image.to_filename(path)
    with pytest.raises(BadStudy, match="sform and qform disagree on left and right"):
        check_values(study, read_study(study))
    image.affine[0, 3] += 1  # 1 mm apart is no matter
    image.set_qform(image.affine, 1)
    image.to_filename(path)
    assert check_values(study, read_study(study))["placed"]


def test_a_header_that_does_not_tell_the_place(tmp_path, capsys):
    _, folder = write_changed(tmp_path)
    for path in folder.iterdir():
        image = nib.load(path)
        image.set_sform(None, 0)
        image.set_qform(None, 0)
        image.to_filename(path)
    for patient in (2, 3):
        write_changed(tmp_path, patient=patient)
    studies_command([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "1 studies have neither sform nor qform: left and right are guessed" in printed
    assert "median SUV 1.87 and HU 95 in the body" in printed
    assert "3 of 3 patients, 3 with a lesion" in printed
