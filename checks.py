"""What cannot be right in the images of a study: a table of measurements and their limits.

A new check is a row of CHECKS, and a number in `measure` if none is there that tells it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BODY_SUV = 0.2  # the body lies above it, air below, skin above
AIR_HU = -900


class Check(NamedTuple):
    """Wrong where a measured number lies above its limit; `--allow name` lets it pass."""

    name: str  # empty: it may not pass
    slot: str  # whose file is named
    measured: str
    limit: float
    found: str  # in words, around the number
    remedy: str


# fmt: off
CHECKS = (  # the first that fails explains those that follow
    Check("sides", "pet", "sides_differ", 0, "sform and qform disagree on left and right",
          "Correct the one that is wrong, in all files of the study"),
    Check("swapped", "pet", "pet_below_air", 0.01,
          "{:.0%} of its voxels lie below -20 and look like HU",
          "Are CT and PET swapped? Correct the files, dataset.json or --channels"),
    Check("", "pet", "empty", 0, "no body found, the image is empty",
          "Give SUV in g/ml; of MRI, skull-stripped images with background 0"),
    Check("constant", "pet", "pet_constant", 0, "all its voxels are equal", "Convert it again"),
    Check("constant", "ct", "ct_constant", 0, "all its voxels are equal", "Convert it again"),
    Check("scaled", "pet", "pet_scaled", 0, "all its values lie in [0, 1] and look scaled",
          "Give SUV in g/ml"),
    Check("scaled", "ct", "ct_scaled", 0, "all its values lie in [0, 1] and look scaled",
          "Give HU"),
    Check("suv", "pet", "pet_highest", 5000,  # even a full bladder or an injection is far below
          "values up to {:.6g} are not SUV in g/ml (Bq/ml?)",
          "Convert it to SUV by body weight first"),
    Check("suv", "pet", "suv", 100, "a median of {:.4g} in the body is not SUV in g/ml (Bq/ml?)",
          "Convert it to SUV by body weight first"),
    Check("offset", "ct", "hu", 500, "a median of {:.4g} in the body is not HU",
          "Are these values without their offset (intercept, often -1024)? Convert it again"),
    Check("mask", "label", "mask_of_body", 0.5, "it covers {:.0%} of the body",
          "Is it full or inverted? Correct it"),
    Check("flipped", "label", "mask_in_air", 0.5, "{:.0%} of it lies in air",
          "Is it flipped or shifted? Correct it"),
)
# fmt: on
ALLOWABLE = sorted({check.name for check in CHECKS if check.name})


def measure(images: dict[str, np.ndarray], units: bool) -> dict[str, float]:
    """The numbers that CHECKS ask of a study: ct, pet and, if there, label, all (W, H, D).

    units: ct is in HU and pet in SUV. Counts are of every fourth voxel; suv and hu, the medians in
    the body, of every sixteenth, and NaN if none of them lies in it.
    """
    fourth, sixteenth = np.s_[:, ::4], np.s_[::2, ::4, ::2]
    ct, pet = images["ct"], images["pet"]
    if not units:
        return {"empty": not (ct.any() or pet.any())}
    found = {"pet_below_air": np.count_nonzero(pet[fourth] < -20) / pet[fourth].size}
    for slot, image in (("ct", ct), ("pet", pet)):
        low, high = float(image.min()), float(image.max())
        found |= {f"{slot}_constant": low == high, f"{slot}_scaled": 0 <= low < high <= 1}
        found[f"{slot}_highest"] = high
    found["empty"] = found["pet_highest"] <= BODY_SUV
    body = pet[sixteenth] > BODY_SUV
    for name, image in (("hu", ct), ("suv", pet)):
        found[name] = float(np.median(image[sixteenth][body])) if body.any() else np.nan
    if "label" in images:
        mask, body = images["label"] != 0, pet[fourth] > BODY_SUV
        found["mask_of_body"] = np.count_nonzero(mask[fourth] & body) / max(1, body.sum())
        at = np.flatnonzero(mask.ravel(order="F"))  # all of it: a lesion may be small
        in_air = (pet.ravel(order="F")[at] < BODY_SUV) & (ct.ravel(order="F")[at] < AIR_HU)
        found["mask_in_air"] = np.count_nonzero(in_air) / max(1, len(at))
    return found


def doubts(measured: dict[str, float]) -> Iterator[tuple[Check, str]]:
    """The checks that fail, and what was found in words."""
    for check in CHECKS:
        value = measured.get(check.measured, 0)
        if value > check.limit:
            yield check, check.found.format(value)
