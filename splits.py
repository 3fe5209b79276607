"""Which studies train, validate and test: folds by patient, or a file that names the studies."""

from collections import Counter
from pathlib import Path

import numpy as np

from cache import Case
from common import UserError, read_json

PARTS = ("train", "val", "test")


def make_splits(cases: list[Case], folds: int = 5, fold: int = 0, seed: int = 0) -> dict:
    """The names of the studies by part: fold `fold` tests, a tenth of the others validates.

    All studies of a patient fall into one part. Patients with and without a lesion are dealt
    separately, so that every fold has its share of both. Raises UserError if a part stays empty.
    """
    if not 0 <= fold < folds or folds < 2:
        raise UserError(
            f"--fold {fold} of --folds {folds}: there must be at least 2 folds, counted from 0."
        )

    patients = shuffle_patients(cases, seed)
    tested = patients[fold::folds]
    others = [patient for patient in patients if patient not in tested]
    splits = hold_out(others, cases)
    splits["test"] = study_names(tested, cases)

    if len(patients) < folds or not all(splits.values()):
        raise UserError(
            f"{len(patients)} patients are too few for {folds} folds: each of train, val and test "
            "needs one. Add studies, use fewer --folds or give --splits."
        )
    return splits


def group_by_lesion(patients: list[str], cases: list[Case]) -> tuple[list[str], list[str]]:
    """The patients with a lesion in any of their studies, and those without."""
    positive = {case.patient for case in cases if case.has_lesion}
    with_lesion = []
    without_lesion = []
    for patient in patients:
        group = with_lesion if patient in positive else without_lesion
        group.append(patient)
    return with_lesion, without_lesion


def shuffle_patients(cases: list[Case], seed: int) -> list[str]:
    """The patients with a lesion, shuffled, then those without: every n-th is a share of both."""
    by_name = sorted(cases, key=lambda case: case.name)  # The order on disk does not matter.
    patients = list(dict.fromkeys(case.patient for case in by_name))
    rng = np.random.default_rng(seed)

    shuffled = []
    for group in group_by_lesion(patients, cases):
        for index in rng.permutation(len(group)):
            shuffled.append(group[index])
    return shuffled


def hold_out(patients: list[str], cases: list[Case]) -> dict[str, list[str]]:
    """The names of the studies that train, and of those of a tenth of the patients to validate.

    At least one patient with and one without a lesion validates, unless it is the only one.
    """
    val = []
    for group in group_by_lesion(patients, cases):
        tenth = -(-len(group) // 10)  # rounded up
        val += group[: min(tenth, len(group) - 1)]
    if not val and len(patients) > 1:
        val = patients[:1]

    train = [patient for patient in patients if patient not in val]
    return {"train": study_names(train, cases), "val": study_names(val, cases)}


def study_names(patients: list[str], cases: list[Case]) -> list[str]:
    """The sorted names of all studies of the patients."""
    return sorted(case.name for case in cases if case.patient in patients)


def read_splits(path: Path, cases: list[Case], fold=0, skip_bad=False, say=print) -> dict:
    """Read the names of the studies by part from a file.

    The file is {"train": [...], "val": [...], "test": [...]} or nnU-Net's splits_final.json, a list
    of folds. There the val part of `fold` becomes the test part, and a tenth of the patients of its
    train part validates. skip_bad: names that are not among the cases are left out, with a line.

    Raises UserError for a missing part, an unknown study, or a patient in two parts.
    """
    content = read_json(path)
    is_nnunet = isinstance(content, list) and len(content) > 0
    if fold and not is_nnunet:
        raise UserError(f"--fold {fold} has no effect on {path}: it is one split. Leave it out.")
    if is_nnunet and not 0 <= fold < len(content):
        raise UserError(f"{path}: has {len(content)} folds. Give a --fold below, from 0.")

    splits = content[fold] if is_nnunet else content
    check_form(path, splits, ("train", "val") if is_nnunet else PARTS)

    patients = {case.name: case.patient for case in cases}
    unknown = sorted(set(sum(splits.values(), [])) - set(patients))
    if unknown:
        first = unknown[0]
        problem = f"{path}: {len(unknown)} studies are not in the data, the first is {first}"
        if not skip_bad:
            raise UserError(f"{problem}. Correct the names or --data.")
        say(f"splits     {problem}: left out")
        for part, names in splits.items():
            splits[part] = [name for name in names if name in patients]
    check_parts(path, splits, patients)

    # In a fold of nnU-Net, val is what is not trained on: it tests, and others validate.
    if is_nnunet:
        trained = [case for case in cases if case.name in splits["train"]]
        held_out = hold_out(shuffle_patients(trained, seed=0), trained)
        splits = {**held_out, "test": splits["val"]}
    for part, names in splits.items():
        if not names:
            raise UserError(f"{path}: {part} is empty. Give it at least one study.")
    return splits


def check_form(path: Path, splits, parts: tuple[str, ...]) -> None:
    """Raise UserError unless splits are lists of names of studies, one for each part."""
    if not isinstance(splits, dict) or set(splits) != set(parts):
        keys = ", ".join(parts)
        raise UserError(f"{path}: expected the keys {keys}, each a list of studies. Correct it.")
    for part, names in splits.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: {part} is not a list of studies. Correct it.")


def check_parts(path: Path, splits: dict[str, list[str]], patients: dict[str, str]) -> None:
    """Raise UserError for a study that is named twice, or a patient in two parts.

    patients: the patient of each study by its name.
    """
    part_of_patient: dict[str, str] = {}
    for part, names in splits.items():
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(f"{path}: {name} is in {part} twice. Take one out.")

            patient = patients[name]
            first_part = part_of_patient.setdefault(patient, part)
            if first_part != part:
                problem = f"patient {patient} is in {first_part} and in {part}"
                raise UserError(f"{path}: {problem}. Keep all studies of a patient together.")
