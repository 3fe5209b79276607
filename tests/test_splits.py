"""splits.py: folds counted by hand, files that must be refused."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from common import UserError, write_json
from splits import PARTS, make_splits, read_splits


def cohort(patients, every=3):
    """Two cases of each patient; every third patient, or as given, has a lesion."""
    cases = []
    for number in range(2 * patients):
        patient = f"p{number // 2:03d}"
        name = f"{patient}/s{number % 2}"
        has_lesion = number // 2 % every == 0
        cases.append(SimpleNamespace(name=name, patient=patient, has_lesion=has_lesion))
    return cases


@pytest.mark.parametrize("patients, folds", [(30, 5), (23, 4), (11, 2), (3, 3)])
def test_folds_by_patient(patients, folds):
    cases = cohort(patients)
    tested = Counter()
    shares = []
    for fold in range(folds):
        splits = make_splits(cases, folds, fold)
        assert splits == make_splits(cases[::-1], folds, fold)  # whatever the order on disk
        assert sorted(sum(splits.values(), [])) == [case.name for case in cases]
        parts = []
        for part in PARTS:
            parts.append({name[:4] for name in splits[part]})
        assert sum(map(len, parts)) == patients and all(parts)
        tested.update(parts[-1])
        positive = sum(int(patient[1:]) % 3 == 0 for patient in parts[-1])
        shares.append((positive, len(parts[-1]) - positive))
    assert set(tested.values()) == {1} and len(tested) == patients
    assert np.ptp(shares, axis=0).max() <= 1


def test_validation_is_a_tenth_of_each_kind_and_the_seed_matters():
    cases = cohort(150, every=2)
    splits = make_splits(cases, 5, 0)  # 60 with and 60 without a lesion are not in the test fold
    with_lesion = [int(name[1:4]) % 2 == 0 for name in splits["val"]]
    assert sorted(with_lesion) == 12 * [False] + 12 * [True]  # two studies each
    assert splits != make_splits(cases, 5, 0, seed=1)


FOLDS = [(9, 5, 5), (9, 5, -1), (9, 1, 0), (9, 0, 0), (0, 5, 0), (2, 2, 0), (3, 5, 0)]


@pytest.mark.parametrize("patients, folds, fold", FOLDS)
def test_bad_folds(patients, folds, fold):
    words = f"--fold {fold} of --folds {folds}"
    if patients < 9:
        words = f"{patients} patients are too few for {folds} folds"
    with pytest.raises(UserError, match=f"^{words}: "):
        make_splits(cohort(patients), folds, fold)


GOOD = {"train": ["p000/s0"], "val": ["p001/s0"], "test": ["p002/s0"]}
BAD_SPLITS = (  # others are rows of test_bad_inputs.py
    ("expected the keys", {**GOOD, "more": []}),
    ("expected the keys", []),
    ("test is empty", {**GOOD, "test": []}),
    ("patient p000 is in train and in test", {**GOOD, "test": ["p000/s1"]}),
    ("test is not a list", {**GOOD, "test": None}),
    ("not a list", {**GOOD, "test": "p002/s0"}),
    ("not a list", {**GOOD, "test": [["p002/s0"]]}),
    ("p002/s0 is in test twice", {**GOOD, "test": ["p002/s0", "p002/s0"]}),
)


@pytest.mark.parametrize("words, content", BAD_SPLITS)
def test_bad_splits_file(tmp_path, words, content):
    path = tmp_path / "splits.json"
    write_json(path, content)
    with pytest.raises(UserError, match=f"^{path}: .*{words}.*$"):
        read_splits(path, cohort(4))
    write_json(path, GOOD)
    assert read_splits(path, cohort(4)) == GOOD


def test_splits_of_nnunet(tmp_path):
    path = tmp_path / "splits_final.json"
    cases = cohort(30)
    names = [case.name for case in cases]
    folds = [{"train": names[12:], "val": names[:12]}, {"train": names[1:48], "val": names[48:]}]
    write_json(path, folds)
    for fold, content in enumerate(folds):
        splits = read_splits(path, cases, fold)
        assert splits["test"] == content["val"]
        assert sorted(splits["train"] + splits["val"]) == sorted(content["train"])
        patients = {int(name[1:4]) for name in splits["val"]}  # of 8 with and 16 without a lesion
        assert sorted(patient % 3 == 0 for patient in patients) == [False, False, True]
        assert not patients & {int(name[1:4]) for name in splits["train"]}
    with pytest.raises(UserError, match="has 2 folds"):
        read_splits(path, cases, 2)


def test_splits_that_name_other_studies(tmp_path):
    path = tmp_path / "splits_final.json"
    names = [case.name for case in cohort(30)]
    write_json(path, [{"train": names[12:], "val": names[:12]}])
    cases = cohort(30)[3:]  # without the first patient and a study of the second
    with pytest.raises(UserError, match="3 studies are not in the data, the first is p000/s0"):
        read_splits(path, cases)
    lines = []
    splits = read_splits(path, cases, skip_bad=True, say=lines.append)
    assert splits["test"] == names[3:12] and "3 studies are not in the data" in lines[0]
