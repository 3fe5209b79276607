"""phantom.py: the simulated cohort is what it says, and the same as ever."""

import gzip
import hashlib
import json
from collections import defaultdict

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import phantom
from common import UserError
from organs import find_maps
from phantom import phantom_command, write_phantom
from studies import find_studies, read_study

# Hash of the names and unpacked bytes of the first three patients' files, by seed 0. Other content
# needs another VERSION in phantom.py too.
PINNED = 2, "1b5ce9be252fc377723f547da0e91714f000ff5487b47da0d3b03b339c3b43ed"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three patients: the first and the last come twice, with lesions; the second has none."""
    root = tmp_path_factory.mktemp("phantom") / "cohort"
    exists = []

    def watch(visits):
        for visit in visits:
            exists.append(root.exists())
            yield visit

    write_phantom(root, patients=3, progress=watch)
    assert exists == [False] * 5  # the folder appears when all is written
    return root


def test_the_files_are_those_of_the_pinned_hash(cohort):
    digest = hashlib.sha256()
    for file in sorted(cohort.rglob("[CS]*.nii.gz")):
        digest.update(file.relative_to(cohort).as_posix().encode())
        digest.update(gzip.decompress(file.read_bytes()))
    assert (phantom.VERSION, digest.hexdigest()) == PINNED


def test_a_patient_is_the_same_in_a_cohort_of_any_size(cohort, tmp_path):
    two = tmp_path / "two"
    phantom_command(["--patients", "2", "--out", str(two)])
    files = sorted(two.rglob("*.nii.gz"))
    assert len(files) == 3 * 4  # the first patient comes twice
    for file in files:
        assert file.read_bytes() == (cohort / file.relative_to(two)).read_bytes()


@pytest.mark.parametrize("words", ["--out .", "--out new --patients 0", "--out new --seed -1"])
def test_commands_that_cannot_be_done(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is not empty. Give another|is at least"):
        phantom_command(words.split())
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def spots_of(seed, tumour):
    """The masks of foci, findings and lesions of a study; of each a table of the HU, SUV and ml of
    its spots."""
    masks = []
    draw = phantom.draw_spots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "draw_spots", lambda *args: masks.append(draw(*args)) or masks[-1])
        rngs = [np.random.default_rng([seed, i]) for i in (1, 2)]
        study = phantom.draw_study(*rngs, tumour)
    assert masks[2] is study.seg

    tables = []
    for mask in masks:
        parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
        numbers = range(1, count + 1)
        hu = ndimage.median(study.ct, parts, numbers)
        suv = ndimage.maximum(study.suv, parts, numbers)
        tables.append(np.transpose([hu, suv, 0.15 * ndimage.sum(mask, parts, numbers)]))
    return masks, tables


def test_only_ct_tells_foci_from_lesions_and_all_patients_have_them():
    drawn = [spots_of(seed, seed % 2 == 0)[1] for seed in range(24)]
    foci, findings, lesions = map(np.concatenate, zip(*drawn, strict=True))
    assert {len(tables[0]) for tables in drawn} <= {1, 2, 3}
    assert len(foci) > 1.5 * 24
    for column in (1, 2):  # SUV and ml: most foci look like some lesion
        low, high = np.quantile(lesions[:, column], [0.05, 0.95])
        assert np.mean((low < foci[:, column]) & (foci[:, column] < high)) > 0.6
    hu = foci[:, 0]
    assert np.mean(np.abs(lesions[:, 0] - 40) < 20) > 0.9
    assert np.mean(np.abs(hu - 40) > 20) > 0.7
    assert hu.min() < -60
    assert hu.max() > 250
    assert np.median(findings[:, 1]) < 3 < lesions[:, 1].min()
    assert len(findings) > 24


@pytest.mark.parametrize("seed", [0, 1])
def test_foci_and_findings_do_not_depend_on_lesions(seed):
    with_lesion, without = (spots_of(seed, tumour)[0] for tumour in (True, False))
    assert with_lesion[2].any()
    assert not without[2].any()
    assert np.array_equal(with_lesion[:2], without[:2])
    assert not (with_lesion[0] & with_lesion[2]).any()


def test_studies_look_like_autopet(cohort):
    folder = find_studies(cohort)
    assert (folder.layout, folder.findings) == ("AutoPET (TCIA)", [])
    lesions = defaultdict(list)
    for study in folder.studies:
        volumes = read_study(study)
        ct, suv, seg = (volumes[slot].data for slot in ("ct", "pet", "label"))
        assert ct.min() < -900
        assert ct.max() > 300
        assert suv.min() == 0
        lesions[study.patient].append(ndimage.label(seg, np.ones((3, 3, 3)))[1])
        assert not seg.any() or suv[seg > 0].mean() > 2.5
    assert sorted(map(len, lesions.values())) == [1, 2, 2]
    assert max(max(lesions.values())) <= 6
    assert sorted(map(all, lesions.values())) == [False, True, True]


def test_another_seed_gives_other_patients(cohort, tmp_path):
    write_phantom(tmp_path / "other", patients=1, seed=1)
    (patient,) = (tmp_path / "other").glob("PETCT_*")
    assert not (cohort / patient.name).exists()


def test_organs_lie_where_ct_and_pet_show_them(cohort):
    names = json.loads((cohort / "organs" / "organs.json").read_text())
    assert list(names) == [str(i) for i in range(1, len(phantom.MAPPED) + 1)]
    studies = find_studies(cohort).studies
    maps = find_maps(studies, cohort / "organs")
    assert len(maps) == 5
    for study in studies:
        volumes = read_study(study)
        image = nib.load(maps[study.name])
        organs = np.asarray(image.dataobj)
        assert (image.affine == volumes["pet"].affine).all()
        hu = {}
        suv = {}
        for number, name in names.items():
            hu[name] = np.median(volumes["ct"].data[organs == int(number)])
            suv[name] = np.median(volumes["pet"].data[organs == int(number)])
        assert hu["lung"] < -700
        assert -30 < hu["bladder"] < 30
        assert hu["liver"] > 45
        assert min(suv["brain"], suv["bladder"]) > 4 > 1 > suv["lung"]

        number = {name: int(number) for number, name in names.items()}
        right, left = (np.argwhere(organs == number[n])[:, 0].mean() for n in ("liver", "spleen"))
        assert right < left
        assert not organs[0].any()  # indices rise to the left
        assert np.bincount(organs.ravel()).min() > 50


def test_a_large_study_has_the_size_of_autopet():
    rngs = [np.random.default_rng(i) for i in (1, 2)]
    small = phantom.draw_study(*rngs, tumour=True)
    large = phantom.enlarge(small)
    assert large.ct.shape == large.organs.shape == (400, 400, 326)
    assert large.ct.dtype == np.int16
    assert large.suv.dtype == np.float32
    assert np.diag(large.affine).tolist() == [-2.036, 2.036, 3, 1]
    middle = large.seg[67:333, 67:333]  # air lies around
    assert middle.sum() == large.seg.sum()
    assert middle.mean() == pytest.approx(small.seg.mean(), rel=0.1)


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
