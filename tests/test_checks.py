"""checks.py: what cannot be right ends with one line and exit code 2, what is near it passes."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, las, petct_arrays, write_nifti

import eval
import studies
import train
from checks import ALLOWABLE, CHECKS
from files import command_line
from runs import open_data

AXES = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in SHAPE], indexing="ij")
BODY = sum(axis**2 for axis in AXES) < 1
CT, PET, MASK = "CTres", "SUV", "SEG"


def far(mask, share):
    """A mask of that share of the body, as diffuse disease has it."""
    return (BODY & (np.random.default_rng(0).random(SHAPE) < share)).astype(np.uint8)


def thin(share, value):
    """Makes so large a share of the voxels of PET that value."""
    at = np.random.default_rng(1).random(SHAPE) < share
    return lambda pet: np.where(at, value, pet).astype(np.float32)


# What is done to the arrays of a study; the check that must fail, or None if they are sound.
INPUTS = {
    "CT and PET swapped": ("swapped", lambda a: {CT: a[PET], PET: a[CT].astype(np.float32)}),
    "2 % of PET below -20": ("swapped", lambda a: {PET: thin(0.02, -21)(a[PET])}),
    "ringing beside a bladder": (None, lambda a: {PET: thin(0.008, -25)(a[PET])}),
    "SUV of -0.5": (None, lambda a: {PET: thin(0.3, -0.5)(a[PET])}),
    "PET of zeros": ("", lambda a: {PET: 0 * a[PET]}),
    "PET constant": ("constant", lambda a: {PET: 0 * a[PET] + 2}),
    "CT constant": ("constant", lambda a: {CT: 0 * a[CT] - 1000}),
    "PET in [0, 1]": ("scaled", lambda a: {PET: np.clip(a[PET] / 4, 0, 1)}),
    "CT in [0, 1]": ("scaled", lambda a: {CT: ((a[CT] + 1000) / 1300).astype(np.float32)}),
    "PET in Bq/ml": ("suv", lambda a: {PET: 5000 * a[PET]}),
    "PET in Bq/ml, low": ("suv", lambda a: {PET: 100 * a[PET]}),
    "a bladder of SUV 300": (None, lambda a: {PET: np.where(a[MASK] > 0, 300, a[PET])}),
    "CT without its offset": ("offset", lambda a: {CT: a[CT] + np.int16(1024)}),
    "CT clipped": (None, lambda a: {CT: np.clip(a[CT], -160, 240)}),
    "padding of -2000": (None, lambda a: {CT: np.where(BODY, a[CT], np.int16(-2000))}),
    "padding of -3024": (None, lambda a: {CT: np.where(BODY, a[CT], np.int16(-3024))}),
    "a head": (None, lambda a: {PET: np.where(BODY, 3 * a[PET], 0), CT: a[CT] + np.int16(300)}),
    "mask full": ("mask", lambda a: {MASK: np.ones(SHAPE, np.uint8)}),
    "mask inverted": ("mask", lambda a: {MASK: 1 - a[MASK]}),
    "mask of the body": ("mask", lambda a: {MASK: far(a[MASK], 0.6)}),
    "diffuse disease": (None, lambda a: {MASK: far(a[MASK], 0.2)}),
    "mask in air": ("flipped", lambda a: {MASK: np.roll(a[MASK], 11, 0)}),
    "mask reaching into air": (None, lambda a: {MASK: np.roll(a[MASK], (9, 3, 2), (0, 1, 2))}),
}


def write(root, change, patients=3):
    for i in range(patients):
        arrays = petct_arrays(i)
        for stem, array in (arrays | (change(arrays) if i == 1 else {})).items():
            write_nifti(root / f"PETCT_{i:010x}/study/{stem}.nii.gz", array, las())
    return root


def fails(action, capsys):
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        command_line(action)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", INPUTS)
def test_impossible_inputs_and_their_neighbours(base, tmp_path, capsys, name):
    check, change = INPUTS[name]
    root = write(tmp_path / "data", change)
    config = replace(base, data=str(root), cache=str(tmp_path / "cache"), out=str(tmp_path / "run"))
    if check is None:
        assert len(open_data(config)[1]) == 3
        studies.run_command([str(root)])
        assert "no problem was found" in capsys.readouterr().out
        return
    remedies = [row.remedy for row in CHECKS if row.name == check]
    for action in (lambda: train.train(config), lambda: studies.run_command([str(root)])):
        message = fails(action, capsys)
        (line,) = (line for line in message.splitlines() if line.startswith("  "))
        assert line.startswith(f"  {root}/PETCT_0000000001/study/")
        assert any(remedy in line for remedy in remedies)
    assert not (tmp_path / "run").exists()
    if check:
        assert f"--allow {check}" in line
        allowing = replace(config, allow=tuple(ALLOWABLE))
        allowed = [case.meta["facts"]["allowed"] for case in open_data(allowing)[1]]
        assert allowed[0] == allowed[2] == [] and check in allowed[1]
        assert f"1 studies passed by --allow {check}" in capsys.readouterr().out
        assert line in fails(lambda: open_data(config), capsys)  # it passed once only


def test_predict_checks_too(base, finished, tmp_path, capsys):
    root = write(tmp_path / "data", INPUTS["CT and PET swapped"][1])
    line = [str(finished[0]), "--predict", str(root), "--out", str(tmp_path / "masks")]
    assert "swapped" in fails(lambda: eval.run_command(line), capsys)
    assert len(list((tmp_path / "masks").iterdir())) == 2  # the others are predicted
    eval.run_command([*line[:4], str(tmp_path / "all"), "--allow", "swapped", "suv"])
    assert len(list((tmp_path / "all").iterdir())) == 3


@pytest.mark.parametrize("stem", [CT, PET, MASK])
def test_sform_against_qform(base, tmp_path, capsys, stem):
    root = write(tmp_path / "data", lambda a: {})
    path, mirrored = root / f"PETCT_0000000002/study/{stem}.nii.gz", las() @ np.diag((-1, 1, 1, 1))
    image = nib.load(path)
    image.set_qform(mirrored, 1)
    image.to_filename(path)
    config = replace(base, data=str(root), cache=str(tmp_path / "cache"))
    assert "sform and qform disagree on left and right" in fails(lambda: open_data(config), capsys)
    image.set_qform(las((4.0, 4.0, 5.0), (31.0, -20.0, -500.0)), 1)  # 1 mm apart is no matter
    image.to_filename(path)
    assert len(open_data(config)[1]) == 3


def test_a_header_that_says_nothing(base, tmp_path, capsys):
    root = write(tmp_path / "data", lambda a: {})
    for path in (root / "PETCT_0000000002/study").iterdir():
        image = nib.load(path)
        image.set_sform(None, 0)
        image.set_qform(None, 0)
        image.to_filename(path)
    open_data(replace(base, data=str(root), cache=str(tmp_path / "cache")))
    said = capsys.readouterr().out
    assert "1 studies have neither sform nor qform: left and right are guessed" in said
    assert "median SUV 1.7" in said and "in the body" in said
