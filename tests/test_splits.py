"""splits.py: folds counted by hand, files that must be refused."""

from collections import Counter

import pytest

from cache import Case
from files import UserError, write_json
from splits import make_splits, read_splits


def cohort(patients, studies_each=1, every=3):
    return [
        Case({"name": f"p{p:03d}/s{s}", "patient": f"p{p:03d}", "lesion_voxels": p % every == 0})
        for p in range(patients)
        for s in range(studies_each)
    ]


@pytest.mark.parametrize("patients, folds", [(30, 5), (23, 4), (11, 2), (3, 3)])
def test_folds_by_patient(patients, folds):
    cases = cohort(patients, 2)
    ill = {c.patient for c in cases if c.has_lesion}
    tested, shares = Counter(), []
    for fold in range(folds):
        splits = make_splits(cases, folds, fold)
        assert splits == make_splits(cases[::-1], folds, fold)  # whatever the order on disk
        assert sorted(sum(splits.values(), [])) == [c.name for c in cases]
        parts = {part: {name.split("/")[0] for name in names} for part, names in splits.items()}
        assert sum(map(len, parts.values())) == patients and all(parts.values())
        tested.update(parts["test"])
        shares.append((len(parts["test"] & ill), len(parts["test"] - ill)))
    assert set(tested.values()) == {1} and len(tested) == patients
    for counts in zip(*shares, strict=True):
        assert max(counts) - min(counts) <= 1


def test_validation_is_a_tenth_of_each_kind_and_the_seed_matters():
    cases = cohort(150, every=2)
    splits = make_splits(cases, 5, 0)  # 60 ill and 60 healthy are not in the test fold
    ill = {c.name for c in cases if c.has_lesion}
    assert (len(ill & set(splits["val"])), len(set(splits["val"]) - ill)) == (6, 6)
    assert splits == make_splits(cases, 5, 0, seed=0) != make_splits(cases, 5, 0, seed=1)


FOLDS = [(9, 5, 5), (9, 5, -1), (9, 1, 0), (9, 0, 0), (0, 5, 0), (2, 2, 0), (3, 5, 4)]


@pytest.mark.parametrize("patients, folds, fold", FOLDS)
def test_bad_folds(patients, folds, fold):
    few = f"{patients} patients are too few for {folds} folds"
    words = few if patients < 9 else f"--fold {fold} of --folds {folds}"
    with pytest.raises(UserError, match=f"^{words}: "):
        make_splits(cohort(patients), folds, fold)


GOOD = {"train": ["p000/s0"], "val": ["p001/s0"], "test": ["p002/s0"]}
SPLITS = (
    ("expected the keys", {"train": ["p000/s0"], "val": ["p001/s0"]}),
    ("expected the keys", GOOD | {"more": []}), ("expected the keys", []),
    ("test is empty", GOOD | {"test": []}),
    ("1 studies are not in the data, the first is p009/s9", GOOD | {"test": ["p009/s9"]}),
    ("patient p000 is in train and in test", GOOD | {"test": ["p000/s1"]}),
    ("test is not a list", GOOD | {"test": None}), ("not a list", GOOD | {"test": "p002/s0"}),
    ("not a list", GOOD | {"test": [["p002/s0"]]}),
    ("p002/s0 is in test twice", GOOD | {"test": ["p002/s0", "p002/s0"]}),
)  # fmt: skip


@pytest.mark.parametrize("words, content", SPLITS)
def test_bad_splits_file(tmp_path, words, content):
    path = tmp_path / "splits.json"
    write_json(path, content)
    with pytest.raises(UserError, match=f"^{path}: .*{words}.*$"):
        read_splits(path, cohort(4, 2))
    write_json(path, GOOD)
    assert read_splits(path, cohort(4, 2)) == GOOD


def test_splits_of_nnunet(tmp_path):
    cases, path, said = cohort(30, 2), tmp_path / "splits_final.json", []
    names = [case.name for case in cases]
    folds = [{"train": names[12:], "val": names[:12]}, {"train": names[:48], "val": names[48:]}]
    write_json(path, folds)
    for fold, content in enumerate(folds):
        splits = read_splits(path, cases, fold)
        assert splits["test"] == content["val"]
        assert sorted(splits["train"] + splits["val"]) == sorted(content["train"])
        ill = {name for name in splits["val"] if int(name[1:4]) % 3 == 0}
        assert (len(ill), len(splits["val"])) == (2, 6)  # of 8 and 16 patients; two studies each
        assert not {n[:4] for n in splits["val"]} & {n[:4] for n in splits["train"]}
    with pytest.raises(UserError, match="has 2 folds"):
        read_splits(path, cases, 2)
    bad = cases[3:]  # the first patient, and a study of the second, were left out
    with pytest.raises(UserError, match="3 studies are not in the data, the first is p000/s0"):
        read_splits(path, bad)
    splits = read_splits(path, bad, skip_bad=True, say=said.append)
    assert splits["test"] == names[3:12] and "3 studies are not in the data" in said[0]
    write_json(path, [{"train": names[1:], "val": names[:1]}])
    with pytest.raises(UserError, match="patient p000 is in train and in val"):
        read_splits(path, cases)
