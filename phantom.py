"""The simulated whole-body FDG-PET/CT cohort that stands in when there are no data.

A study is painted organ by organ; foci of harmless uptake, CT findings without any, and lesions
grow where there is room; noise and the scanner's blur follow. Lesions and foci look alike in PET:
the density on CT tells them apart. The files depend on the seed alone, byte for byte, and those of
a patient not on how many there are.

    python phantom.py --patients 200 --out DIR [--seed 1]    a larger cohort, for --data DIR
"""

import argparse
import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from files import UserError, command_line, progress, sweep, unfinished, write_json, writing

VERSION = 2  # of the content; another one has other names of studies, so that no splits fit both
PHANTOM = Path(f"data/phantom{VERSION}")  # where train.py writes it

# fmt: off
SPACING = np.array((5.0, 5.0, 6.0))  # mm
PSF_SIGMA = 7.0 / 2.355 / SPACING  # voxels, for a point spread of 7 mm FWHM
STATURE = 648.0  # mm from mid-thigh to the crown: a small body, to keep the volumes small
SPINE = ((0, -74, 100), (0, -62, 160), (0, -44, 250), (0, -60, 380), (0, -32, 470), (0, -16, 525))

# Reference body in mm: x to the patient's right, y forward, z up from mid-thigh. Each organ is a
# chain of capsules, or an ellipsoid where there is only one point; later ones overwrite earlier.
# Organ, mirrored too, points, semi-axes or radius, HU, range of the SUV (g/ml) of each piece.
ORGANS = (
    ("lung", True, ((64, 2, 388),), (54, 70, 76), -820, (0.3, 0.5)),
    ("mediastinum", False, ((0, -6, 405),), (24, 42, 70), 35, (1.1, 1.4)),
    ("heart", False, ((-16, 20, 362),), (46, 42, 40), 42, (1.3, 1.7)),
    ("heart wall", False, ((-20, 18, 365), (-30, 28, 357)), 27, 45, (1.5, 9.0)),
    ("heart cavity", False, ((-6, 4, 378), (-27, 25, 359)), 14, 40, (1.3, 1.7)),
    ("liver", False, ((52, 8, 297),), (66, 64, 46), 62, (2.1, 2.8)),
    ("liver, left lobe", False, ((-8, 30, 306),), (46, 34, 26), 62, (2.1, 2.8)),
    ("stomach", False, ((-52, 18, 292),), (30, 32, 30), 25, (1.2, 2.4)),
    ("spleen", False, ((-80, -34, 298),), (22, 32, 36), 52, (1.7, 2.2)),
    ("skull", False, ((0, 0, 580),), (52, 65, 49), 850, (0.8, 1.1)),
    ("brain", False, ((0, 0, 581),), (44, 57, 41), 36, (6.0, 11.0)),
    ("salivary gland", True, ((38, 12, 512),), (9, 12, 14), 30, (1.5, 3.0)),
    ("psoas", True, ((26, -36, 270), (34, -30, 190), (58, 5, 120)), 14, 55, (0.6, 0.8)),
    ("disc", False, SPINE, (18, 15, 16), 105, (0.9, 1.1)),
    ("vertebra", False, SPINE, (18, 15, 16), 250, (1.1, 1.4)),
    ("hip", True, ((78, -8, 116),), 21, 330, (0.9, 1.3)),
    ("femur", True, ((70, 0, -10), (92, -8, 82), (80, -8, 112)), 12, 420, (0.8, 1.1)),
    ("humerus", True, ((116, -8, 447),), (17, 18, 17), 330, (0.9, 1.3)),
    ("clavicle", True, ((12, 52, 452), (60, 36, 462), (108, 4, 462)), 6, 450, (0.8, 1.1)),
    ("aorta", False, ((-6, 8, 415), (-14, -34, 420), (-4, -18, 205)), 11, 45, (1.5, 1.8)),
    ("airway", False, ((0, 24, 525), (0, 10, 470), (0, -2, 408)), 8, -980, (0.2, 0.4)),
    ("kidney", True, ((54, -46, 252),), (20, 19, 35), 38, (4.0, 9.0)),
    ("kidney pelvis", True, ((47, -42, 252),), (7, 8, 13), 12, (8.0, 16.0)),
    ("colon", False, ((82, 14, 168), (88, 12, 205), (84, 14, 240), (44, 48, 238), (0, 54, 226),
                      (-46, 48, 240), (-84, 10, 252), (-90, 2, 210), (-84, 4, 168),
                      (-42, 10, 152)), 12, 15, (1.2, 5.0)),
    ("small bowel", False, ((34, 34, 210), (-28, 36, 204), (-38, 26, 184), (30, 24, 182),
                            (26, 30, 162), (-18, 30, 160)), 10, 28, (1.0, 3.2)),
    ("bladder", False, ((0, 18, 112),), (29, 25, 22), 6, (5.0, 25.0)),
)
# The organs of the maps, 1, 2, ..., by how the names above begin.
MAPPED = (
    "spleen", "kidney", "liver", "bladder", "lung", "brain", "heart", "stomach", "salivary gland"
)
# Half the width and depth of the trunk at heights z, in mm.
WIDE = ((68, 84, 104, 150, 200, 262, 340, 420, 450, 466, 480, 500, 520),
        (1, 70, 128, 136, 132, 120, 132, 140, 138, 112, 52, 44, 42))
DEEP = ((68, 84, 140, 200, 262, 350, 420, 455, 475, 500, 520),
        (60, 78, 88, 84, 82, 92, 90, 70, 50, 48, 46))
# What grows in the body: smallest radius in mm, median SUV (None: as around), rows to draw from:
# mirrored at random, lowest and highest centre, largest radius or semi-axes in mm, range of HU in
# which the centre lies, HU painted (None: CT stays, and the spot keeps to that range).
ANY, FAT, BONE, BOWEL = (-2000, 2000), (-120, -90), (150, 2000), (15, 28)
LESIONS = 9, 6.5, (
    (True, (22, -12, 470), (32, 12, 488), 14, ANY, 40),  # neck
    (True, (0, 0, 400), (16, 18, 436), 18, ANY, 40),  # mediastinum
    (True, (94, -14, 412), (108, 14, 432), 16, ANY, 40),  # axilla
    (True, (46, -36, 350), (84, 36, 425), 22, ANY, 40),  # lung
    (False, (30, -20, 275), (85, 36, 318), 26, ANY, 40),  # liver
    (True, (4, -28, 170), (26, 4, 265), 20, ANY, 40),  # retroperitoneum
    (True, (4, 8, 160), (44, 40, 230), 18, ANY, 40),  # mesentery
    (True, (0, -64, 150), (6, -50, 440), 18, ANY, 40),  # spine
    (True, (72, -48, 160), (92, -20, 190), 20, ANY, 40),  # pelvic bone
    (True, (50, 30, 84), (68, 46, 108), 16, ANY, 40),  # groin
)
FOCI = 9, 5.0, (  # harmless uptake, in PET like that of lesions
    (True, (18, -14, 462), (36, 14, 490), 15, ANY, -95),  # brown fat, neck
    (True, (88, -16, 408), (110, 16, 436), 15, ANY, -95),  # brown fat, axilla
    (True, (0, 0, 400), (18, 20, 440), 15, ANY, -95),  # brown fat, mediastinum
    (True, (0, -66, 150), (10, -48, 440), 16, BONE, 500),  # worn vertebra
    (True, (66, -52, 150), (96, -16, 195), 16, BONE, 500),  # sacroiliac joint
    (True, (64, -14, 96), (84, 10, 124), 16, BONE, 500),  # hip joint
    (True, (60, -60, 320), (115, 60, 445), 16, BONE, 500),  # rib fracture
    (True, (0, 0, 150), (95, 60, 255), 16, BOWEL, None),  # bowel
    (True, (22, -30, 150), (40, 0, 225), (9, 9, 32), ANY, 8),  # ureter
    (True, (0, -40, 120), (90, 40, 440), 15, ANY, None),  # nothing to see on CT
)
FINDINGS = 8, None, (  # on CT alone
    (False, (30, -20, 275), (85, 36, 318), 20, ANY, 8),  # cyst of the liver
    (True, (46, -36, 350), (84, 36, 425), 14, ANY, 40),  # scar of the lung
    (True, (22, -12, 470), (32, 12, 488), 12, ANY, 40),  # node of the neck
    (True, (94, -14, 412), (108, 14, 432), 13, ANY, 40),  # of the axilla
    (True, (4, -28, 170), (40, 40, 265), 13, FAT, 40),  # of the abdomen
    (True, (50, 30, 84), (68, 46, 108), 14, ANY, 40),  # of the groin
)
# fmt: on


def draw_frame(x, y, z, fat):
    """Draw body, fat, belly, ribs and pelvis: HU, SUV, room for soft organs, room for bones."""
    wide, deep = np.interp(z, *WIDE), np.interp(z, *DEEP)
    # Squared distance from the axis, where 1 is the skin.
    trunk = np.where((z > 68) & (z < 520), (x / wide) ** 2 + (y / deep) ** 2, np.inf)
    thigh = np.where(z < 110, ((np.abs(x) - 64) / 62) ** 2 + (y / 74) ** 2, np.inf)
    head = (x / 59) ** 2 + ((y - 4) / 74) ** 2 + ((z - 562) / 70) ** 2
    jaw = (x / 48) ** 2 + ((y - 26) / 46) ** 2 + ((z - 518) / 36) ** 2
    depth = np.minimum(np.minimum(trunk, thigh), np.minimum(head, jaw))
    ribs = (trunk > 0.78**2) & (trunk < 0.87**2) & (z > 300) & (z < 458)
    bowl = (x / 106) ** 2 + ((y + 4) / 76) ** 2 + ((z - 178) / 76) ** 2
    pelvis = (bowl > 0.78) & (bowl < 1) & (y < 26) & (np.abs(x) > 30) & (z > 116) & (z < 212)
    ct, suv = np.full_like(depth, -1000, np.float32), np.zeros_like(depth, np.float32)
    for mask, hu, uptake in (
        (depth < 1, 50, 0.7),
        ((depth < 1) & (depth > (1 - fat) ** 2) & (z < 490), -105, 0.3),
        ((trunk < 0.74**2) & (z > 128) & (z < 335), -95, 0.4),
        (ribs & ((z + 0.45 * y) % 25 < 10), 320, 0.9),
        (pelvis, 380, 1.3),
    ):
        ct[mask], suv[mask] = hu, uptake
    return ct, suv, (trunk < 0.77**2) | (z < 130) | (z > 465), depth < 0.95**2


def capsule_mask(grid, start, stop, radii):
    """Mask of the points around a straight piece, and the slice along z that it lies in."""
    low, high = sorted((start[2], stop[2]))
    part = slice(*np.searchsorted(grid[2].ravel(), (low - radii[2], high + radii[2])))
    axes = (grid[0], grid[1], grid[2][..., part])
    offset = [(axis - s) / r for axis, s, r in zip(axes, start, radii, strict=True)]
    way = (stop - start) / radii
    along = sum(o * w for o, w in zip(offset, way, strict=True)) / max(way @ way, 1e-9)
    along = np.clip(along, 0, 1)  # stays 0 for an ellipsoid, whose piece has no length
    return sum((o - along * w) ** 2 for o, w in zip(offset, way, strict=True)) < 1, part


def draw_spots(rng, wanted, law, origin, step, ct, suv, inner, taken):
    """Paint `wanted` irregular ellipsoids of LESIONS, FOCI or FINDINGS into ct and suv; their mask.

    They lie where `inner` has room and nothing is `taken`, which grows by them.
    """
    smallest, median, rows = law
    spots = np.zeros(ct.shape, np.uint8)
    while wanted:
        mirrored, low, high, largest, (lowest, highest), hu = rows[rng.integers(len(rows))]
        place = rng.uniform(low, high) * (rng.choice((-1, 1)) if mirrored else 1, 1, 1)
        centre = (place - origin) / step
        box = tuple(slice(int(c) - 7, int(c) + 8) for c in centre)
        tissue = (ct[box] >= lowest) & (ct[box] <= highest)
        offset = (np.mgrid[box] - centre.reshape(3, 1, 1, 1)) * SPACING.reshape(3, 1, 1, 1)
        radius = smallest + (np.array(largest) - smallest) * rng.beta(1.3, 1.6)
        shape = np.diag(rng.uniform(0.88, 1.15, 3)) + rng.normal(0, 0.08, (3, 3))
        level = (np.tensordot(shape / radius, offset, 1) ** 2).sum(0)
        wave = np.tensordot(rng.normal(0, 1.5 / radius, 3), offset, 1) + rng.uniform(0, 6.3)
        mask = level * (1 + 0.2 * np.sin(wave)) < 1
        if hu is None:
            mask &= tissue
        value = np.clip(np.exp(rng.normal(np.log(median or 1), 0.4)), 3.5, 12.0)
        near = ndimage.binary_dilation(mask, iterations=2)
        clear = tissue[7, 7, 7] and not taken[box][near].any() and inner[box][mask].all()
        # Hot enough to stand out from its surroundings, though not from the rest of the body.
        if clear and mask.sum() >= 15 and not (median and value <= 2 * suv[box][near].max()):
            spots[box][mask] = 1
            if hu is not None:
                ct[box][mask] = hu
            if median:
                suv[box][mask] = value
            taken[box] |= mask
            wanted -= 1
    return spots


def draw_study(anatomy, study, tumour):
    """One simulated PET/CT study, with 1 to 6 lesions if `tumour`.

    Foci and CT findings follow one law in all patients. anatomy: random generator of the shapes, of
    which the same state gives the same patient; study: that of uptake, spots and noise. Returns CT
    (int16, HU), SUV (float32, g/ml), lesions (uint8, 0 or 1) and organs (uint8, of MAPPED), each
    (X, Y, Z) of 5 x 5 x 6 mm, and the affine (4, 4) from voxels to RAS+ mm.
    """
    girth, stature = anatomy.uniform(0.95, 1.18), anatomy.uniform(0.93, 1.07)
    half = np.ceil(np.array((142, 98)) * girth / SPACING[:2]).astype(int) + (5, 4)
    shape = (*(2 * half), round(STATURE * stature / SPACING[2]))
    middle = (np.array(shape) - 1) / 2
    step = SPACING / (-girth, girth, stature)  # voxels run to the patient's left (LAS), x right
    origin = np.array((0, 0, STATURE / 2)) - middle * step
    axes = zip(np.ogrid[tuple(map(slice, shape))], step, origin, strict=True)
    grid = [(a * s + o).astype(np.float32) for a, s, o in axes]
    fat = 0.06 + 0.3 * (girth - 0.95) * anatomy.uniform(0.5, 1)
    ct, suv, soft, inner = draw_frame(*grid, fat)
    organs = np.zeros(shape, np.uint8)
    taken = np.zeros(shape, bool)  # at first by organs that are hot anyway
    for organ, mirrored, points, radii, hu, (low, high) in ORGANS:
        pairs = list(zip(points, points[1:], strict=False)) or [points * 2]
        number = next((i for i, name in enumerate(MAPPED, 1) if organ.startswith(name)), 0)
        uptakes = np.exp(study.uniform(np.log(low), np.log(high), len(pairs)))
        for side in (1, -1) if mirrored else (1,):
            shift = anatomy.normal(0, 2, 3)
            size = radii * anatomy.uniform(0.93, 1.07, 3)
            for ends, uptake in zip(pairs, uptakes, strict=True):
                mask, part = capsule_mask(grid, *(ends * np.array((side, 1, 1)) + shift), size)
                mask &= (soft if hu < 100 else inner)[..., part]
                if organ == "vertebra":
                    mask &= grid[2][..., part] % 21 > 6  # leave the discs
                ct[..., part][mask], suv[..., part][mask] = hu, uptake
                organs[..., part][mask] = number
                if organ.split()[0] in ("brain", "heart", "kidney", "bladder"):
                    taken[..., part] |= mask
    body = origin, step, ct, suv, inner, taken
    draw_spots(study, study.integers(1, 4), FOCI, *body)
    draw_spots(study, study.integers(0, 4), FINDINGS, *body)
    seg = draw_spots(study, study.integers(1, 7) if tumour else 0, LESIONS, *body)
    noise = study.standard_normal((2, *shape), dtype=np.float32)
    ct = np.clip(ndimage.gaussian_filter(ct, 0.35) + 9 * noise[0], -1024, 2000).astype(np.int16)
    suv = ndimage.gaussian_filter(suv + 0.4 * np.sqrt(suv) * noise[1], PSF_SIGMA)
    suv = np.round(np.maximum(suv, 0) * 128) / 128  # short mantissas compress well
    affine = np.diag((*SPACING * (-1, 1, 1), 1.0))
    affine[:3, 3] = middle * SPACING * (1, -1, -1)
    affine[2, 3] += round(study.uniform(-900, -600))
    return ct, suv.astype(np.float32), seg, organs, affine


def write_phantom(root: Path, patients=36, seed=0, progress: Callable = iter) -> None:
    """Write a simulated whole-body FDG-PET/CT cohort into `root`; simulated, not clinical.

    Every other patient has lesions, and the first four of these come twice, with new lesions in
    the same anatomy. Each study is root/PETCT_<id>/<study>/{SUV,CTres,SEG,ORGANS}.nii.gz, as
    draw_study gives it, and root/organs.json names the organs. `root`, absent or empty, appears
    once all is written. `progress` wraps their list. Raises UserError if `root` holds something.
    """
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: is not empty. Give another folder.")
    root.parent.mkdir(parents=True, exist_ok=True)
    sweep(root.parent)
    visits = [(p, v) for p in range(patients) for v in ((1, 2) if p in (0, 2, 4, 6) else (1,))]
    partial = unfinished(root)
    try:
        for patient, visit in progress(visits):
            anatomy = np.random.default_rng([seed, patient])
            study = np.random.default_rng([seed, patient, visit, VERSION])
            month, day, number = study.integers((1, 1, 10000), (13, 29, 100000))
            folder = partial / f"PETCT_{anatomy.integers(16**10):010x}"
            folder /= f"{month:02d}-{day:02d}-{1999 + visit}-NA-PET-CT Ganzkoerper-{number}"
            folder.mkdir(parents=True)
            *arrays, affine = draw_study(anatomy, study, tumour=patient % 2 == 0)
            for name, array in zip(("CTres", "SUV", "SEG", "ORGANS"), arrays, strict=True):
                image = nib.Nifti1Image(array, affine)
                image.header.set_xyzt_units("mm")
                image.header["descrip"] = b"SIMULATED phantom, not clinical"
                data = gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)
                with writing(root):
                    (folder / f"{name}.nii.gz").write_bytes(data)
        write_json(partial / "organs.json", dict(enumerate(MAPPED, 1)))
        try:
            os.replace(partial, root)
        except OSError:
            if not root.is_dir():  # else another start was faster and wrote the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run_command(argv: list[str] | None = None) -> None:
    """python phantom.py: see the top of the file."""
    parser = argparse.ArgumentParser(description="Write a simulated PET/CT cohort.")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--patients", type=int, default=36, help="every other one is ill [36]")
    parser.add_argument("--seed", type=int, default=0, help="other patients [0]")
    args = parser.parse_args(argv)
    if args.patients < 1 or args.seed < 0:
        raise UserError("--patients is at least 1, --seed at least 0.")
    write_phantom(
        args.out, args.patients, args.seed, lambda visits: progress(visits, "simulate", "study")
    )


if __name__ == "__main__":
    command_line(run_command)
