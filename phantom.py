"""The simulated whole-body FDG-PET/CT cohort that stands in when there are no data.

A study is painted organ by organ. Then lesions, foci of harmless uptake and CT findings without
uptake grow where there is room; noise and the scanner's blur follow. Lesions and foci look alike in
PET: the density on CT tells them apart. The files depend on the seed alone, byte for byte, and the
files of a patient do not depend on how many patients there are.

    python phantom.py --patients 200 --out DIR [--seed 1]    a larger cohort, for --data DIR
"""

import gzip
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from common import (
    Parser,
    UserError,
    command_line,
    progress,
    remove_stale_files,
    temporary_path,
    write_json,
    writing,
)

VERSION = 2  # of the content; another one has other names of studies, so that no splits fit both
PHANTOM = Path(f"data/phantom{VERSION}")  # where train.py writes it

# ------------------------------------------------------------------ the reference patient


def table_rows(text: str) -> list[list[str]]:
    """The columns of each line of a text table; a line that ends with a comma goes on."""
    rows = []
    for line in text.strip().replace(",\n", " ").splitlines():
        rows.append(line.split("|"))
    return rows


def numbers(text: str) -> np.ndarray:
    return np.array(text.replace(",", " ").split(), float)


class Organ(NamedTuple):
    """A chain of capsules, or an ellipsoid where there is only one point."""

    name: str
    sides: tuple[int, ...]  # factors on x: (1, -1) for an organ on both sides
    radii: np.ndarray  # mm, one for all axes, or semi-axes
    hu: float
    suv: np.ndarray  # g/ml, range of the uptake of each piece
    points: np.ndarray  # (N, 3), mm


def read_organs(text: str) -> list[Organ]:
    organs = []
    for name, sides, radii, hu, suv, points in table_rows(text):
        organ = Organ(
            name=name.strip(),
            sides=(1, -1) if "both" in sides else (1,),
            radii=numbers(radii),
            hu=float(hu),
            suv=numbers(suv),
            points=numbers(points).reshape(-1, 3),
        )
        organs.append(organ)
    return organs


class Region(NamedTuple):
    """A place where spots of one kind grow, and their look there."""

    mirrored: bool  # on either side
    low: np.ndarray  # mm, lowest and highest centre
    high: np.ndarray
    largest: np.ndarray  # mm, radius or semi-axes
    tissue: np.ndarray  # HU, range in which the centre lies
    hu: float | None  # painted; None: CT stays, and the spot keeps to that range


class SpotLaw(NamedTuple):
    """How the spots of one kind grow: lesions, foci or findings."""

    smallest: float  # radius, mm
    median_suv: float | None  # None: the uptake stays
    regions: list[Region]


def read_regions(text: str) -> list[Region]:
    regions = []
    for _, sides, low, high, largest, tissue, hu in table_rows(text):
        region = Region(
            mirrored="either" in sides,
            low=numbers(low),
            high=numbers(high),
            largest=numbers(largest),
            tissue=numbers(tissue),
            hu=None if "stays" in hu else float(hu),
        )
        regions.append(region)
    return regions


SPACING = np.array((5.0, 5.0, 6.0))  # mm
PSF_SIGMA = 7.0 / 2.355 / SPACING  # voxels, for a point spread of 7 mm FWHM
STATURE = 648.0  # mm from mid-thigh to the crown: a small body, to keep the volumes small
AUTOPET_SHAPE = (400, 400, 326)  # usual there
AUTOPET_SPACING = np.array((2.036, 2.036, 3.0))  # mm

# Reference body in mm: x to the patient's right, y forward, z up from mid-thigh. Later organs
# overwrite earlier ones.
# Name | sides | radius or semi-axes | HU | SUV, lowest and highest | points
ORGANS = read_organs("""
lung             | both | 54 70 76 | -820 | 0.3 0.5 | 64 2 388
mediastinum      | one  | 24 42 70 | 35   | 1.1 1.4 | 0 -6 405
heart            | one  | 46 42 40 | 42   | 1.3 1.7 | -16 20 362
heart wall       | one  | 27       | 45   | 1.5 9.0 | -20 18 365, -30 28 357
heart cavity     | one  | 14       | 40   | 1.3 1.7 | -6 4 378, -27 25 359
liver            | one  | 66 64 46 | 62   | 2.1 2.8 | 52 8 297
liver, left lobe | one  | 46 34 26 | 62   | 2.1 2.8 | -8 30 306
stomach          | one  | 30 32 30 | 25   | 1.2 2.4 | -52 18 292
spleen           | one  | 22 32 36 | 52   | 1.7 2.2 | -80 -34 298
skull            | one  | 52 65 49 | 850  | 0.8 1.1 | 0 0 580
brain            | one  | 44 57 41 | 36   | 6.0 11  | 0 0 581
salivary gland   | both | 9 12 14  | 30   | 1.5 3.0 | 38 12 512
psoas            | both | 14       | 55   | 0.6 0.8 | 26 -36 270, 34 -30 190, 58 5 120
disc             | one  | 18 15 16 | 105  | 0.9 1.1 | 0 -74 100, 0 -62 160, 0 -44 250, 0 -60 380,
                                                      0 -32 470, 0 -16 525
vertebra         | one  | 18 15 16 | 250  | 1.1 1.4 | 0 -74 100, 0 -62 160, 0 -44 250, 0 -60 380,
                                                      0 -32 470, 0 -16 525
hip              | both | 21       | 330  | 0.9 1.3 | 78 -8 116
femur            | both | 12       | 420  | 0.8 1.1 | 70 0 -10, 92 -8 82, 80 -8 112
humerus          | both | 17 18 17 | 330  | 0.9 1.3 | 116 -8 447
clavicle         | both | 6        | 450  | 0.8 1.1 | 12 52 452, 60 36 462, 108 4 462
aorta            | one  | 11       | 45   | 1.5 1.8 | -6 8 415, -14 -34 420, -4 -18 205
airway           | one  | 8        | -980 | 0.2 0.4 | 0 24 525, 0 10 470, 0 -2 408
kidney           | both | 20 19 35 | 38   | 4.0 9.0 | 54 -46 252
kidney pelvis    | both | 7 8 13   | 12   | 8.0 16  | 47 -42 252
colon            | one  | 12       | 15   | 1.2 5.0 | 82 14 168, 88 12 205, 84 14 240, 44 48 238,
                                                      0 54 226, -46 48 240, -84 10 252, -90 2 210,
                                                      -84 4 168, -42 10 152
small bowel      | one  | 10       | 28   | 1.0 3.2 | 34 34 210, -28 36 204, -38 26 184, 30 24 182,
                                                      26 30 162, -18 30 160
bladder          | one  | 29 25 22 | 6    | 5.0 25  | 0 18 112
""")

# The organs of the maps, 1, 2, ..., by how the names above begin.
MAPPED = (
    "spleen",
    "kidney",
    "liver",
    "bladder",
    "lung",
    "brain",
    "heart",
    "stomach",
    "salivary gland",
)

# At heights z, half the width and half the depth of the trunk in mm.
WIDTH_AT = numbers("68 84 104 150 200 262 340 420 450 466 480 500 520")
HALF_WIDTH = numbers("1 70 128 136 132 120 132 140 138 112 52 44 42")
DEPTH_AT = numbers("68 84 140 200 262 350 420 455 475 500 520")
HALF_DEPTH = numbers("60 78 88 84 82 92 90 70 50 48 46")

# What grows in the body.
# Place | sides | lowest centre | highest centre | largest radius or semi-axes | HU at the centre,
# lowest and highest | HU painted
LESION_REGIONS = """
neck            | either | 22 -12 470 | 32 12 488  | 14 | -2000 2000 | 40
mediastinum     | either | 0 0 400    | 16 18 436  | 18 | -2000 2000 | 40
axilla          | either | 94 -14 412 | 108 14 432 | 16 | -2000 2000 | 40
lung            | either | 46 -36 350 | 84 36 425  | 22 | -2000 2000 | 40
liver           | one    | 30 -20 275 | 85 36 318  | 26 | -2000 2000 | 40
retroperitoneum | either | 4 -28 170  | 26 4 265   | 20 | -2000 2000 | 40
mesentery       | either | 4 8 160    | 44 40 230  | 18 | -2000 2000 | 40
spine           | either | 0 -64 150  | 6 -50 440  | 18 | -2000 2000 | 40
pelvic bone     | either | 72 -48 160 | 92 -20 190 | 20 | -2000 2000 | 40
groin           | either | 50 30 84   | 68 46 108  | 16 | -2000 2000 | 40
"""
FOCUS_REGIONS = """
brown fat, neck        | either | 18 -14 462 | 36 14 490  | 15     | -2000 2000 | -95
brown fat, axilla      | either | 88 -16 408 | 110 16 436 | 15     | -2000 2000 | -95
brown fat, mediastinum | either | 0 0 400    | 18 20 440  | 15     | -2000 2000 | -95
worn vertebra          | either | 0 -66 150  | 10 -48 440 | 16     | 150 2000   | 500
sacroiliac joint       | either | 66 -52 150 | 96 -16 195 | 16     | 150 2000   | 500
hip joint              | either | 64 -14 96  | 84 10 124  | 16     | 150 2000   | 500
rib fracture           | either | 60 -60 320 | 115 60 445 | 16     | 150 2000   | 500
bowel                  | either | 0 0 150    | 95 60 255  | 16     | 15 28      | stays
ureter                 | either | 22 -30 150 | 40 0 225   | 9 9 32 | -2000 2000 | 8
nothing to see on CT   | either | 0 -40 120  | 90 40 440  | 15     | -2000 2000 | stays
"""
FINDING_REGIONS = """
cyst of the liver   | one    | 30 -20 275 | 85 36 318  | 20 | -2000 2000 | 8
scar of the lung    | either | 46 -36 350 | 84 36 425  | 14 | -2000 2000 | 40
node of the neck    | either | 22 -12 470 | 32 12 488  | 12 | -2000 2000 | 40
node of the axilla  | either | 94 -14 412 | 108 14 432 | 13 | -2000 2000 | 40
node of the abdomen | either | 4 -28 170  | 40 40 265  | 13 | -120 -90   | 40
node of the groin   | either | 50 30 84   | 68 46 108  | 14 | -2000 2000 | 40
"""
LESIONS = SpotLaw(9, 6.5, read_regions(LESION_REGIONS))
FOCI = SpotLaw(9, 5.0, read_regions(FOCUS_REGIONS))  # harmless, in PET like lesions
FINDINGS = SpotLaw(8, None, read_regions(FINDING_REGIONS))  # on CT alone

# ------------------------------------------------------------------ a patient, a study


@dataclass
class Body:
    """A patient that is being painted; each volume (X, Y, Z).

    `grid` holds the coordinates x, y and z of the voxels in mm of the reference body, which are
    `origin` + index * `step`.
    """

    origin: np.ndarray  # mm
    step: np.ndarray  # mm
    grid: list[np.ndarray]  # (X, 1, 1), (1, Y, 1), (1, 1, Z)
    ct: np.ndarray  # HU
    suv: np.ndarray  # g/ml
    organs: np.ndarray  # numbers of MAPPED
    soft: np.ndarray  # bool: room for soft organs
    inner: np.ndarray  # bool: room for bones and spots
    taken: np.ndarray  # bool: no room for spots


class SimulatedStudy(NamedTuple):
    """One PET/CT study; each volume (X, Y, Z)."""

    ct: np.ndarray  # int16, HU
    suv: np.ndarray  # float32, g/ml
    seg: np.ndarray  # uint8, 1 in lesions
    organs: np.ndarray  # uint8, numbers of MAPPED
    affine: np.ndarray  # (4, 4), from voxels to RAS+ mm


# ------------------------------------------------------------------ painting


def draw_study(anatomy, study, tumour: bool) -> SimulatedStudy:
    """Simulate one PET/CT study of 5 x 5 x 6 mm voxels, with 1 to 6 lesions if `tumour`.

    Foci and CT findings are drawn alike in all patients.
    anatomy: the random generator of the shapes; from the same state it draws the same patient.
    study: the random generator of uptake, spots and noise.
    """
    girth = anatomy.uniform(0.95, 1.18)
    stature = anatomy.uniform(0.93, 1.07)
    fat = 0.06 + 0.3 * (girth - 0.95) * anatomy.uniform(0.5, 1)

    body = draw_frame(girth, stature, fat)
    paint_organs(body, anatomy, study)

    foci = study.integers(1, 4)
    draw_spots(study, foci, FOCI, body)
    findings = study.integers(0, 4)
    draw_spots(study, findings, FINDINGS, body)
    lesions = study.integers(1, 7) if tumour else 0
    seg = draw_spots(study, lesions, LESIONS, body)

    # The scanner: blur and noise. Short mantissas of the SUV compress well.
    shape = seg.shape
    noise = study.standard_normal((2, *shape), dtype=np.float32)
    ct = ndimage.gaussian_filter(body.ct, 0.35) + 9 * noise[0]
    suv = ndimage.gaussian_filter(body.suv + 0.4 * np.sqrt(body.suv) * noise[1], PSF_SIGMA)
    suv = np.round(np.maximum(suv, 0) * 128) / 128

    # Indices rise to the patient's left, front and head.
    affine = np.diag((*SPACING * (-1, 1, 1), 1.0))
    affine[:3, 3] = (np.array(shape) - 1) / 2 * SPACING * (1, -1, -1)
    affine[2, 3] += round(study.uniform(-900, -600))

    return SimulatedStudy(
        ct=np.clip(ct, -1024, 2000).astype(np.int16),
        suv=suv.astype(np.float32),
        seg=seg,
        organs=body.organs,
        affine=affine,
    )


def draw_frame(girth: float, stature: float, fat: float) -> Body:
    """Draw skin, fat, belly, ribs and pelvis of a patient.

    girth, stature: factors on the reference body; fat: thickness of its layer, of the half-width.
    """
    half = np.ceil(np.array((142, 98)) * girth / SPACING[:2]).astype(int) + (5, 4)
    shape = (*(2 * half), round(STATURE * stature / SPACING[2]))
    step = SPACING / (-girth, girth, stature)  # voxels run to the patient's left, x to the right
    origin = np.array((0, 0, STATURE / 2)) - (np.array(shape) - 1) / 2 * step
    grid = []
    for axis, indices in enumerate(np.ogrid[tuple(map(slice, shape))]):
        grid.append((indices * step[axis] + origin[axis]).astype(np.float32))
    x, y, z = grid

    # Squared distance from the axis of each part, where 1 is the skin.
    half_width = np.interp(z, WIDTH_AT, HALF_WIDTH)
    half_depth = np.interp(z, DEPTH_AT, HALF_DEPTH)
    trunk = (x / half_width) ** 2 + (y / half_depth) ** 2
    trunk = np.where((z > 68) & (z < 520), trunk, np.inf)
    thigh = ((np.abs(x) - 64) / 62) ** 2 + (y / 74) ** 2
    thigh = np.where(z < 110, thigh, np.inf)
    head = (x / 59) ** 2 + ((y - 4) / 74) ** 2 + ((z - 562) / 70) ** 2
    jaw = (x / 48) ** 2 + ((y - 26) / 46) ** 2 + ((z - 518) / 36) ** 2
    depth = np.minimum(np.minimum(trunk, thigh), np.minimum(head, jaw))
    inside = depth < 1

    under_skin = inside & (depth > (1 - fat) ** 2) & (z < 490)
    belly = (trunk < 0.74**2) & (z > 128) & (z < 335)
    cage = (trunk > 0.78**2) & (trunk < 0.87**2) & (z > 300) & (z < 458)
    ribs = cage & ((z + 0.45 * y) % 25 < 10)
    bowl = (x / 106) ** 2 + ((y + 4) / 76) ** 2 + ((z - 178) / 76) ** 2
    pelvis = (bowl > 0.78) & (bowl < 1) & (y < 26) & (np.abs(x) > 30) & (z > 116) & (z < 212)

    ct = np.full(shape, -1000, np.float32)
    suv = np.zeros(shape, np.float32)
    tissues = (
        (inside, 50, 0.7),
        (under_skin, -105, 0.3),
        (belly, -95, 0.4),
        (ribs, 320, 0.9),
        (pelvis, 380, 1.3),
    )
    for mask, hu, uptake in tissues:
        ct[mask] = hu
        suv[mask] = uptake

    return Body(
        origin=origin,
        step=step,
        grid=grid,
        ct=ct,
        suv=suv,
        organs=np.zeros(shape, np.uint8),
        soft=(trunk < 0.77**2) | (z < 130) | (z > 465),
        inner=depth < 0.95**2,
        taken=np.zeros(shape, bool),
    )


def paint_organs(body: Body, anatomy, study) -> None:
    """Paint ORGANS into a body, each at a place, of a size and with an uptake drawn at random."""
    for organ in ORGANS:
        points = organ.points
        pieces = list(pairwise(points)) or [(points[0], points[0])]
        number = organ_number(organ.name)
        hot = organ.name.split()[0] in ("brain", "heart", "kidney", "bladder")
        room = body.soft if organ.hu < 100 else body.inner
        uptakes = np.exp(study.uniform(*np.log(organ.suv), len(pieces)))

        for side in organ.sides:
            shift = anatomy.normal(0, 2, 3)
            radii = organ.radii * anatomy.uniform(0.93, 1.07, 3)
            for piece, uptake in zip(pieces, uptakes, strict=True):
                start, stop = piece * np.array((side, 1, 1)) + shift
                mask, slab = capsule_mask(body.grid, start, stop, radii)
                mask &= room[slab]
                if organ.name == "vertebra":
                    mask &= body.grid[2][slab] % 21 > 6  # leave the discs

                body.ct[slab][mask] = organ.hu
                body.suv[slab][mask] = uptake
                body.organs[slab][mask] = number
                if hot:  # no spot would stand out there
                    body.taken[slab] |= mask


def organ_number(name: str) -> int:
    """The number of an organ in the maps, 0 if it is in none."""
    for number, beginning in enumerate(MAPPED, start=1):
        if name.startswith(beginning):
            return number
    return 0


def capsule_mask(grid, start, stop, radii) -> tuple[np.ndarray, tuple]:
    """Mask of the points around a straight piece, and the slab along z that it lies in."""
    low, high = sorted((start[2], stop[2]))
    limits = np.searchsorted(grid[2].ravel(), (low - radii[2], high + radii[2]))
    slab = np.s_[..., slice(*limits)]

    # In units of the radii: the offset from the start, and the piece itself.
    x = (grid[0] - start[0]) / radii[0]
    y = (grid[1] - start[1]) / radii[1]
    z = (grid[2][slab] - start[2]) / radii[2]
    piece = (stop - start) / radii
    dx, dy, dz = piece

    along = (x * dx + y * dy + z * dz) / max(piece @ piece, 1e-9)
    along = np.clip(along, 0, 1)  # stays 0 for an ellipsoid, whose piece has no length
    distance = (x - along * dx) ** 2 + (y - along * dy) ** 2 + (z - along * dz) ** 2
    return distance < 1, slab


def draw_spots(rng, count: int, law: SpotLaw, body: Body) -> np.ndarray:
    """Paint `count` irregular ellipsoids of LESIONS, FOCI or FINDINGS into a body; their mask.

    They lie where there is inner room that is not taken, and take it.
    """
    spots = np.zeros(body.ct.shape, np.uint8)
    while count:
        region = law.regions[rng.integers(len(law.regions))]
        place = rng.uniform(region.low, region.high)
        if region.mirrored:
            place[0] *= rng.choice((-1, 1))
        centre = (place - body.origin) / body.step
        box = tuple(slice(int(c) - 7, int(c) + 8) for c in centre)

        offset = (np.mgrid[box] - centre.reshape(3, 1, 1, 1)) * SPACING.reshape(3, 1, 1, 1)
        radius = law.smallest + (np.array(region.largest) - law.smallest) * rng.beta(1.3, 1.6)
        mask = irregular_ellipsoid(rng, offset, radius)
        lowest, highest = region.tissue
        tissue = (body.ct[box] >= lowest) & (body.ct[box] <= highest)
        if region.hu is None:
            mask &= tissue
        value = np.clip(np.exp(rng.normal(np.log(law.median_suv or 1), 0.4)), 3.5, 12.0)

        # Try again elsewhere if there is no room.
        if not tissue[7, 7, 7] or mask.sum() < 15 or not body.inner[box][mask].all():
            continue
        near = ndimage.binary_dilation(mask, iterations=2)
        if body.taken[box][near].any():
            continue
        # Hot enough to stand out from its surroundings, though not from the rest of the body.
        if law.median_suv and value <= 2 * body.suv[box][near].max():
            continue

        spots[box][mask] = 1
        if region.hu is not None:
            body.ct[box][mask] = region.hu
        if law.median_suv:
            body.suv[box][mask] = value
        body.taken[box] |= mask
        count -= 1
    return spots


def irregular_ellipsoid(rng, offset: np.ndarray, radius) -> np.ndarray:
    """Mask of a sheared ellipsoid with a wavy surface. offset (3, ...), from its centre in mm."""
    shape = np.diag(rng.uniform(0.88, 1.15, 3)) + rng.normal(0, 0.08, (3, 3))
    level = (np.tensordot(shape / radius, offset, 1) ** 2).sum(0)
    wave = np.tensordot(rng.normal(0, 1.5 / radius, 3), offset, 1) + rng.uniform(0, 6.3)
    return level * (1 + 0.2 * np.sin(wave)) < 1


# ------------------------------------------------------------------ writing


def write_phantom(
    root: Path,
    patients: int = 36,
    seed: int = 0,
    progress: Callable = iter,
    large: bool = False,
) -> None:
    """Write a simulated whole-body FDG-PET/CT cohort into `root`; simulated, not clinical.

    Every other patient has lesions, and the first four of these come twice, with new lesions in
    the same anatomy. Each study is root/PETCT_<id>/<study>/{SUV,CTres,SEG}.nii.gz, and its organs
    are root/organs/fdg_<id>_<study>.nii.gz, named by the organs.json there. `root`, absent
    or empty, appears once all is written. `progress` wraps the list of studies; large: see enlarge.
    Raises UserError if `root` holds something.
    """
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: is not empty. Give another folder.")
    root.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_files(root.parent)

    visits = []
    for patient in range(patients):
        visits.append((patient, 1))
        if patient in (0, 2, 4, 6):
            visits.append((patient, 2))

    unfinished = temporary_path(root)
    try:
        for patient, visit in progress(visits):
            write_study(unfinished, seed, patient, visit, large)
        write_json(unfinished / "organs" / "organs.json", dict(enumerate(MAPPED, start=1)))
        try:
            os.replace(unfinished, root)
        except OSError:
            if not root.is_dir():  # else another start was faster and wrote the same
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_study(root: Path, seed: int, patient: int, visit: int, large: bool) -> None:
    """Simulate a study and write its files below `root`."""
    anatomy = np.random.default_rng([seed, patient])
    study = np.random.default_rng([seed, patient, visit, VERSION])
    month, day, number = study.integers((1, 1, 10000), (13, 29, 100000))
    patient_id = f"{anatomy.integers(16**10):010x}"
    study_id = f"{month:02d}-{day:02d}-{1999 + visit}-NA-PET-CT Ganzkoerper-{number}"

    simulated = draw_study(anatomy, study, tumour=patient % 2 == 0)
    if large:
        simulated = enlarge(simulated)

    folder = root / f"PETCT_{patient_id}" / study_id
    images = {
        folder / "CTres.nii.gz": simulated.ct,
        folder / "SUV.nii.gz": simulated.suv,
        folder / "SEG.nii.gz": simulated.seg,
        root / "organs" / f"fdg_{patient_id}_{study_id}.nii.gz": simulated.organs,
    }
    for path, array in images.items():
        image = nib.Nifti1Image(array, simulated.affine)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = b"SIMULATED phantom, not clinical"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def enlarge(study: SimulatedStudy) -> SimulatedStudy:
    """A study with as many voxels as those of AutoPET have, to measure speed.

    Air is added beside the body, each voxel is repeated, and noise keeps the files from compressing
    to little.
    """
    volumes = []
    for volume in study[:4]:
        width, height, _ = volume.shape
        air = ((width // 4, width // 4), (height // 4, height // 4), (0, 0))
        volume = np.pad(volume, air, "edge")
        for axis, count in enumerate(AUTOPET_SHAPE):
            repeated = np.arange(count) * volume.shape[axis] // count
            volume = volume.take(repeated, axis)
        volumes.append(volume)

    ct, suv, seg, organs = volumes
    noise = np.random.default_rng(0).standard_normal(AUTOPET_SHAPE, np.float32)
    ct = ct + (9 * noise).astype(np.int16)
    suv = suv + np.abs(noise) / 100
    affine = np.diag((*AUTOPET_SPACING * (-1, 1, 1), 1.0))
    return SimulatedStudy(ct, suv, seg, organs, affine)


def phantom_command(argv: list[str] | None = None) -> None:
    """python phantom.py: see the top of the file."""
    parser = Parser(description="Write a simulated PET/CT cohort.")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--patients", type=int, default=36, help="every other one has lesions [36]")
    parser.add_argument("--seed", type=int, default=0, help="other patients [0]")
    parser.add_argument("--large", action="store_true", help="as many voxels as AutoPET has")
    args = parser.parse_args(argv)
    if args.patients < 1 or args.seed < 0:
        raise UserError("--patients is at least 1, --seed at least 0.")

    def show(visits: list) -> Callable:
        return progress(visits, "simulate", "study")

    write_phantom(args.out, args.patients, args.seed, show, args.large)


if __name__ == "__main__":
    command_line(phantom_command)
