"""Which studies train, validate and test: folds by patient, or a file that names them."""

from collections import Counter
from pathlib import Path

import numpy as np

from cache import Case
from files import UserError, read_json

PARTS = ("train", "val", "test")


def make_splits(cases: list[Case], folds: int = 5, fold: int = 0, seed: int = 0) -> dict:
    """Names of the studies by part: test is fold `fold` of `folds`, val a tenth of the rest.

    All studies of a patient fall into one part; patients with and without tumour are dealt
    separately, so that every fold has its share of both. Raises UserError if a part stays empty.
    """
    if not 0 <= fold < folds or folds < 2:
        why = "folds count from 0, and 2 is the least"
        raise UserError(f"--fold {fold} of --folds {folds}: {why}.")
    dealt = deal(cases, seed)
    test = dealt[fold::folds]
    splits = hold_out([patient for patient in dealt if patient not in test], cases)
    splits["test"] = names_of(test, cases)
    if len(dealt) < folds or not all(splits.values()):
        why = f"too few for {folds} folds: each of train, val and test needs one"
        remedy = "Add studies, use fewer --folds or give --splits"
        raise UserError(f"{len(dealt)} patients are {why}. {remedy}.")
    return splits


def by_tumour(patients: list[str], cases: list[Case]) -> list[list[str]]:
    """Those with a lesion in any study, and those without."""
    ill = {case.patient for case in cases if case.has_lesion}
    return [[p for p in patients if (p in ill) == sick] for sick in (True, False)]


def deal(cases: list[Case], seed: int) -> list[str]:
    """Tumour patients, then healthy ones, each shuffled: dealing in turn spreads both."""
    patients = list(dict.fromkeys(c.patient for c in sorted(cases, key=lambda c: c.name)))
    rng = np.random.default_rng(seed)
    return [own[i] for own in by_tumour(patients, cases) for i in rng.permutation(len(own))]


def hold_out(patients: list[str], cases: list[Case]) -> dict[str, list[str]]:
    """The studies that train and those of a tenth of the patients that validate: of those with and
    without tumour at least one each, but the last of a kind trains."""
    val = []
    for own in by_tumour(patients, cases):
        val += own[: min(-(-len(own) // 10), len(own) - 1)]
    val = val or (patients[:1] if len(patients) > 1 else [])
    train = [patient for patient in patients if patient not in val]
    return {"train": names_of(train, cases), "val": names_of(val, cases)}


def names_of(patients: list[str], cases: list[Case]) -> list[str]:
    return sorted(case.name for case in cases if case.patient in {*patients})


def read_splits(path: Path, cases: list[Case], fold=0, skip_bad=False, say=print) -> dict:
    """A splits file: {"train": [...], "val": [...], "test": [...]} of study names, or nnU-Net's
    splits_final.json, of whose `fold` val is the test part and a tenth of train's patients
    validates. skip_bad: names that are not among `cases` are left out, and said.

    Raises UserError for a missing part, an unknown study, or a patient in two parts.
    """
    splits = read_json(path)
    nnunet = isinstance(splits, list) and splits
    if fold and not nnunet:
        raise UserError(f"--fold {fold} has no effect on {path}, which is one split. Leave it out.")
    if nnunet:
        if not 0 <= fold < len(splits):
            raise UserError(f"{path}: has {len(splits)} folds. Give a --fold below, from 0.")
        splits = splits[fold]
    wanted = ("train", "val") if nnunet else PARTS
    if not isinstance(splits, dict) or set(splits) != set(wanted):
        keys = ", ".join(wanted)
        raise UserError(f"{path}: expected the keys {keys}, each a list of studies. Correct it.")
    for part, names in splits.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: {part} is not a list of studies. Correct it.")
    patients = {case.name: case.patient for case in cases}
    if unknown := sorted({name for names in splits.values() for name in names} - patients.keys()):
        what = f"{path}: {len(unknown)} studies are not in the data, the first is {unknown[0]}"
        if not skip_bad:
            raise UserError(f"{what}. Correct the names or --data.")
        say(f"splits     {what}: left out")
        splits = {part: [n for n in names if n in patients] for part, names in splits.items()}
    check_parts(path, splits, patients)
    if nnunet:
        chosen = [case for case in cases if case.name in splits["train"]]
        splits = hold_out(deal(chosen, seed=0), chosen) | {"test": splits["val"]}
    if empty := [part for part, names in splits.items() if not names]:
        raise UserError(f"{path}: {empty[0]} is empty. Give it at least one study.")
    return splits


def check_parts(path: Path, splits: dict[str, list[str]], patients: dict[str, str]) -> None:
    """Raises UserError for a study that is there twice, or a patient in two parts."""
    part_of: dict[str, str] = {}
    for part, names in splits.items():
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(f"{path}: {name} is in {part} twice. Take one out.")
            if (other := part_of.setdefault(patients[name], part)) != part:
                what = f"patient {patients[name]} is in {other} and in {part}"
                raise UserError(f"{path}: {what}. Keep all studies of a patient together.")
