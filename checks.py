"""What cannot be right in the images of a study: a table of measurements and their limits.

A new check is a row of CHECKS and, if it needs a new number, a line in `measure_images`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BODY_SUV = 0.2  # SUV of the body, skin included, lies above this; SUV of air lies below.
AIR_HU = -900  # CT of air lies below this.


class Check(NamedTuple):
    """A study fails the check if the measured number is above the limit."""

    slot: str  # The message names the file of this image: ct, pet or label.
    measured: str  # A key of what measure_images returns.
    limit: float
    problem: str  # The text of the message, in which {} is replaced by the measured number.
    remedy: str
    refused: bool = True  # False: unlikely but possible, so that a warning is printed.


# The order matters: the first check that a study fails often explains the failures after it.
CHECKS = (
    Check(
        "pet",
        "sides_differ",
        0,
        "sform and qform disagree on left and right",
        "Correct the one that is wrong, in all files of the study",
    ),
    Check(
        "pet",
        "pet_below_air",
        0.01,
        "{:.0%} of its voxels lie below -20 and look like HU",
        "Are CT and PET swapped? Correct the files, dataset.json or --channels",
    ),
    Check(
        "pet",
        "empty",
        0,
        "no body found, the image is empty",
        "Give SUV in g/ml; for MRI, skull-stripped images with background 0",
    ),
    Check("pet", "pet_constant", 0, "all its voxels are equal", "Convert it again"),
    Check("ct", "ct_constant", 0, "all its voxels are equal", "Convert it again"),
    Check(
        "pet",
        "pet_scaled",
        0,
        "all its values lie in [0, 1] and look scaled",
        "Give SUV in g/ml",
    ),
    Check("ct", "ct_scaled", 0, "all its values lie in [0, 1] and look scaled", "Give HU"),
    Check(
        "pet",
        "pet_highest",
        5000,  # Even a full bladder or the site of injection is far below.
        "values up to {:.6g} are not SUV in g/ml (Bq/ml?)",
        "Convert it to SUV by body weight first",
    ),
    Check(
        "pet",
        "pet_median",
        100,
        "a median of {:.4g} in the body is not SUV in g/ml (Bq/ml?)",
        "Convert it to SUV by body weight first",
    ),
    Check(
        "ct",
        "ct_median",
        500,
        "a median of {:.4g} in the body is not HU",
        "Are these values without their offset (intercept, often -1024)? Convert it again",
    ),
    Check(
        "label",
        "mask_of_body",
        0.9,
        "it covers {:.0%} of the body",
        "Is it full or inverted? Correct it",
    ),
    Check(
        "label",
        "mask_in_air",
        0.5,
        "{:.0%} of it lies in air",
        "Is it flipped or shifted? Correct it",
    ),
    Check(
        "label",
        "mask_of_body",
        0.5,
        "it covers {:.0%} of the body",
        "Is it inverted? If so, correct it",
        refused=False,
    ),
)


def measure_images(images: dict[str, np.ndarray], units: bool) -> dict[str, float]:
    """Compute the numbers that CHECKS compares with its limits.

    images: ct, pet and, if the study has a mask, label, each (W, H, D).
    units: whether ct is in HU and pet in SUV; without, only an empty study is recognised.

    To save time, shares are of every fourth voxel and the medians, which are those in the body, of
    every sixteenth. A median is NaN if none of these voxels lies in the body.
    """
    ct = images["ct"]
    pet = images["pet"]
    if not units:
        return {"empty": not (ct.any() or pet.any())}

    fourth = np.s_[:, ::4]
    sixteenth = np.s_[::2, ::4, ::2]
    measured = {"pet_below_air": np.count_nonzero(pet[fourth] < -20) / pet[fourth].size}

    body = pet[sixteenth] > BODY_SUV
    for slot, image in (("ct", ct), ("pet", pet)):
        lowest = float(image.min())
        highest = float(image.max())
        measured[f"{slot}_constant"] = lowest == highest
        measured[f"{slot}_scaled"] = 0 <= lowest < highest <= 1
        measured[f"{slot}_highest"] = highest
        measured[f"{slot}_median"] = (
            float(np.median(image[sixteenth][body])) if body.any() else np.nan
        )
    measured["empty"] = measured["pet_highest"] <= BODY_SUV

    if "label" in images:
        mask = images["label"] != 0
        body = pet[fourth] > BODY_SUV
        in_body = np.count_nonzero(mask[fourth] & body)
        measured["mask_of_body"] = in_body / max(1, np.count_nonzero(body))

        # A lesion may be small, so every voxel of the mask is counted.
        voxels = np.flatnonzero(mask.ravel(order="F"))
        is_air = pet.ravel(order="F")[voxels] < BODY_SUV
        is_air &= ct.ravel(order="F")[voxels] < AIR_HU
        measured["mask_in_air"] = np.count_nonzero(is_air) / max(1, len(voxels))
    return measured


def failed_checks(measured: dict[str, float]) -> Iterator[tuple[Check, str]]:
    """Yield each check that fails, with its problem in words."""
    for check in CHECKS:
        value = measured.get(check.measured, 0)
        if value > check.limit:
            yield check, check.problem.format(value)
