"""phantom.py: the simulated cohort is what it says, and the same as ever."""

import gzip
import hashlib
from collections import defaultdict

import numpy as np
import pytest
from scipy import ndimage

from phantom import write_phantom
from studies import find_studies, read_study

# of the names and unpacked bytes of the first three patients' files: seed 0, commit c7d4e3d
PINNED = "1d4695860c86ffae11e7667ed36d18a98d878ebd221d90c65245dee807270d21"


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
    for file in sorted(cohort.rglob("*.nii.gz")):
        seen.update(file.relative_to(cohort).as_posix().encode())
        seen.update(gzip.decompress(file.read_bytes()))
    assert seen.hexdigest() == PINNED


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
    (patient,) = (tmp_path / "other").iterdir()
    assert not (cohort / patient.name).exists()


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
    with pytest.raises(FileExistsError):
        write_phantom(root, patients=1)
    assert list(tmp_path.rglob("*")) == [root, root / "theirs"]
