"""phantom.py: the simulated cohort is what it says, and the same as ever."""

import gzip
import hashlib
import json
import runpy
import sys
from collections import defaultdict

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import phantom
from files import UserError
from phantom import write_phantom
from studies import find_studies, read_study

# of the names and unpacked bytes of the first three patients' files: seed 0. Other content needs
# another VERSION in phantom.py too.
PINNED = 2, "1b5ce9be252fc377723f547da0e91714f000ff5487b47da0d3b03b339c3b43ed"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three patients: the first and the last come twice, with lesions; the second is healthy."""
    root, seen = tmp_path_factory.mktemp("phantom") / "cohort", []

    def watch(visits):
        for visit in visits:
            seen.append(root.exists())
            yield visit

    write_phantom(root, patients=3, progress=watch)
    assert seen == [False] * 5  # the folder appears when all is written
    return root


def test_the_files_are_those_of_the_pinned_hash(cohort):
    seen = hashlib.sha256()
    for file in sorted(cohort.rglob("[CS]*.nii.gz")):
        seen.update(file.relative_to(cohort).as_posix().encode())
        seen.update(gzip.decompress(file.read_bytes()))
    assert (phantom.VERSION, seen.hexdigest()) == PINNED


def test_a_patient_is_the_same_in_a_cohort_of_any_size(cohort, tmp_path):
    argv = ["phantom.py", "--patients", "2", "--out", str(tmp_path / "two")]
    assert run_as_command(argv) == 0
    files = sorted((tmp_path / "two").rglob("*.nii.gz"))
    assert len(files) == 3 * 4  # the first patient comes twice
    for file in files:
        assert file.read_bytes() == (cohort / file.relative_to(tmp_path / "two")).read_bytes()


def run_as_command(argv):
    """The exit code of python phantom.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(phantom.__file__, run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


@pytest.mark.parametrize("words", [[], ["--patients", "0"], ["--seed", "-1"]])
def test_commands_that_cannot_be_done_leave_one_line(tmp_path, capsys, words):
    out = tmp_path if words else tmp_path / "kept"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").touch()
    assert run_as_command(["phantom.py", "--out", str(out), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and (words or f"error: {out}: is not empty" in err)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "mine"]


def spots_of(seed, tumour):
    """Foci, findings, lesions of a study: HU, SUV and ml of each of their parts; their masks."""
    masks, draw = [], phantom.draw_spots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "draw_spots", lambda *a: masks.append(draw(*a)) or masks[-1])
        rngs = (np.random.default_rng([seed, i]) for i in (1, 2))
        ct, suv, seg, *_ = phantom.draw_study(*rngs, tumour=tumour)
    assert masks[2] is seg
    rows = []
    for mask in masks:
        parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
        inside = [parts == i for i in range(1, count + 1)]
        values = [(np.median(ct[p]), suv[p].max(), p.sum() * 0.15) for p in inside]
        rows.append(np.reshape(values, (-1, 3)))
    return rows, masks


def test_only_ct_tells_foci_from_lesions_and_all_patients_have_them():
    drawn = [spots_of(seed, seed % 2 == 0) for seed in range(24)]
    foci, findings, lesions = (
        np.concatenate(rows) for rows in zip(*[d[0] for d in drawn], strict=True)
    )
    assert {len(rows[0]) for rows, _ in drawn} <= {1, 2, 3} and len(foci) > 1.5 * 24
    for column in (1, 2):  # SUV and ml: most foci look like some lesion
        low, high = np.quantile(lesions[:, column], [0.05, 0.95])
        assert np.mean((low < foci[:, column]) & (foci[:, column] < high)) > 0.6
    hu = foci[:, 0]
    assert np.mean(np.abs(lesions[:, 0] - 40) < 20) > 0.9
    assert np.mean(np.abs(hu - 40) > 20) > 0.7 and (hu < -60).any() and (hu > 250).any()
    assert np.median(findings[:, 1]) < 3 < lesions[:, 1].min() and len(findings) > 24
    for seed in (0, 1):  # the law of foci and findings does not know who is ill
        ill, healthy = (spots_of(seed, tumour)[1] for tumour in (True, False))
        assert ill[2].any() and not healthy[2].any()
        assert all(np.array_equal(a, b) for a, b in zip(ill[:2], healthy[:2], strict=True))
        assert not (ill[0] & ill[2]).any()


def test_studies_look_like_autopet(cohort):
    found = find_studies(cohort)
    assert (found.layout, found.findings) == ("AutoPET (TCIA)", [])
    lesions = defaultdict(list)
    for study in found.studies:
        ct, suv, seg = (
            volume.data for volume in map(read_study(study).get, ("ct", "pet", "label"))
        )
        assert ct.min() < -900 and ct.max() > 300 and suv.min() == 0
        lesions[study.patient].append(ndimage.label(seg, np.ones((3, 3, 3)))[1])
        assert not seg.any() or suv[seg > 0].mean() > 2.5
    assert sorted(map(len, lesions.values())) == [1, 2, 2] and max(max(lesions.values())) <= 6
    assert sorted(all(counts) for counts in lesions.values()) == [False, True, True]


def test_another_seed_gives_other_patients(cohort, tmp_path):
    write_phantom(tmp_path / "other", patients=1, seed=1)
    (patient,) = (tmp_path / "other").glob("PETCT_*")
    assert not (cohort / patient.name).exists()


def test_organs_lie_where_ct_and_pet_show_them(cohort):
    names = json.loads((cohort / "organs.json").read_text())
    assert [*names] == [str(i) for i in range(1, len(phantom.MAPPED) + 1)]
    number = {name: int(i) for i, name in names.items()}
    for study in find_studies(cohort).studies:
        ct, suv = (volume.data for volume in map(read_study(study).get, ("ct", "pet")))
        image = nib.load(study.pet.path.with_name("ORGANS.nii.gz"))
        organs = np.asarray(image.dataobj)
        assert (image.affine == nib.load(study.pet.path).affine).all()
        middle = {name: np.median(ct[organs == i]) for name, i in number.items()}
        assert middle["lung"] < -700 and -30 < middle["bladder"] < 30 and middle["liver"] > 45
        uptake = {name: np.median(suv[organs == i]) for name, i in number.items()}
        assert min(uptake["brain"], uptake["bladder"]) > 4 > 1 > uptake["lung"]
        right, left = (np.argwhere(organs == number[n])[:, 0].mean() for n in ("liver", "spleen"))
        assert right < left and not organs[0].any()  # indices rise to the left
        sizes = np.bincount(organs.ravel())
        assert sizes[1:].min() > 50 and sizes[number["lung"]] > sizes[number["heart"]]


def test_it_appears_complete_or_not_at_all(tmp_path):
    root = tmp_path / "cohort"

    def stop(visits):
        yield visits[0]
        raise KeyboardInterrupt

    def overtaken(visits):  # by another start, which wrote the same
        yield from visits
        root.mkdir()
        (root / "theirs").touch()

    with pytest.raises(KeyboardInterrupt):
        write_phantom(root, patients=1, progress=stop)
    assert list(tmp_path.iterdir()) == []
    write_phantom(root, patients=1, progress=overtaken)
    with pytest.raises(UserError, match="is not empty"):
        write_phantom(root, patients=1)
    assert list(tmp_path.rglob("*")) == [root, root / "theirs"]
