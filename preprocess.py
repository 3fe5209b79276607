"""Preprocessing of a study (Sec. 3.4), and the way back to the grid of its files.

Arrays are (W, H, D) in the order of the anatomical axes that `Preprocessing.axes` names.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import nibabel as nib
import numpy as np
from nibabel import orientations

from checks import BODY_SUV
from studies import Study, judge, read_study

CACHE_FORMAT = 3  # raise it when the content of the cache changes
THRESHOLD_SUV = 4.0  # the row "SUV ≥ 4 threshold" of the evaluation


@dataclass(frozen=True)
class Preprocessing:
    """Everything that shapes the cached arrays; all of it is in the cache's key."""

    kind: str
    spacing: tuple[float, float, float]  # mm, along `axes`
    axes: str  # anatomical direction of rising index: L(eft) A(nterior) S(uperior), ...
    clip: tuple[tuple[float, float], tuple[float, float]] | None  # HU, SUV; None: no units, z-score
    margin_mm: float = 10.0  # kept around the body
    body_suv: float = BODY_SUV  # the body is the box of voxels above it
    threshold_suv: float = THRESHOLD_SUV
    format: int = CACHE_FORMAT


PREPROCESSING = {
    "petct": Preprocessing("petct", (2.0, 2.0, 3.0), "LAS", ((-100.0, 250.0), (0.0, 15.0))),
    "mri": Preprocessing("mri", (1.0, 1.0, 1.0), "RAS", None),
}


def preprocessing(config) -> Preprocessing:
    """The preprocessing of a resolved Config: its kind's, at its spacing."""
    return replace(PREPROCESSING[config.kind], spacing=tuple(config.spacing))


def interpolate(image: np.ndarray, axis: int, positions: np.ndarray) -> np.ndarray:
    """Linear interpolation of float32 `image` along one axis, clamped at its borders."""
    last = image.shape[axis] - 1
    positions = np.clip(positions, 0, last)
    if len(positions) == last + 1 and np.allclose(positions, np.arange(last + 1), atol=1e-6):
        return image
    low = np.minimum(positions.astype(np.int64), max(last - 1, 0))
    weight = (positions - low).astype(np.float32)
    below = image.take(low, axis)
    above = image.take(np.minimum(low + 1, last), axis)
    above -= below
    above *= weight.reshape([-1 if a == axis else 1 for a in range(3)])
    below += above
    return below


def resample(image: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """Linear resampling at the grid of `positions`, in voxels per axis; axis by axis, which is
    exact because the map between two grids with the same axes is diagonal."""
    for axis in sorted(range(3), key=lambda a: len(positions[a]) / image.shape[a]):  # shrink first
        image = interpolate(image, axis, positions[axis])
    return image


def nearest(labels: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """As resample, of labels: each the value of the nearest voxel."""
    grids = zip(positions, labels.shape, strict=True)
    indices = [np.minimum(np.rint(p).astype(np.int64), n - 1) for p, n in grids]
    return np.ascontiguousarray(labels[np.ix_(*indices)])


def grid_positions(shape, spacing, new_spacing) -> list[np.ndarray]:
    """Where the new grid samples the old one, in old voxels; both start at the same centre. The
    count is that of MONAI's Spacing: the distance of the end voxels, rounded to new voxels."""
    grids = zip(shape, spacing, new_spacing, strict=True)
    return [np.arange(round((n - 1) * s / t + 1)) * (t / s) for n, s, t in grids]


def body_box(body: np.ndarray, margin) -> list[list[int]]:
    """[start, stop] per axis of the True voxels, grown by `margin` voxels within the volume."""
    box = []
    for axis, count in enumerate(body.shape):
        inside = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        grow = int(margin[axis])
        box.append([max(int(inside[0]) - grow, 0), min(int(inside[-1]) + 1 + grow, count)])
    return box


def zscore(image: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the brain (voxels that are not 0); the rest stays 0."""
    brain = image != 0
    values = image[brain].astype(np.float64)
    scaled = np.zeros_like(image)
    scaled[brain] = (values - values.mean()) / max(values.std(), 1e-8) if len(values) else 0
    return scaled


def preprocess(study: Study, settings: Preprocessing, allow=()) -> tuple[dict, dict]:
    """Read, check, crop to the body, resample and scale one study (Sec. 3.4): arrays and meta.

    images: float16 (2, W, H, D), CT first; with a mask: label, uint8 (W, H, D); lesion, uint32 flat
    indices of its foreground; and what native_mask adds. allow: see studies.judge. Raises BadStudy.
    """
    volumes = read_study(study)
    facts = judge(study, volumes, allow)
    pet, affine = volumes["pet"].data, volumes["pet"].affine
    wanted = orientations.axcodes2ornt(settings.axes)
    to_axes = orientations.ornt_transform(nib.io_orientation(affine), wanted)
    turn = partial(orientations.apply_orientation, ornt=to_axes)
    turned_affine = affine @ orientations.inv_ornt_aff(to_axes, pet.shape)
    spacing = np.linalg.norm(turned_affine[:3, :3], axis=0)
    margin = np.ceil(settings.margin_mm / spacing)
    body = pet > settings.body_suv if settings.clip else (pet != 0) | (volumes["ct"].data != 0)
    box = body_box(turn(body), margin)
    del body
    crop, counts = tuple(slice(*b) for b in box), [stop - start for start, stop in box]
    positions = grid_positions(counts, spacing, settings.spacing)
    meta = {
        "name": study.name, "patient": study.patient, "lesion_voxels": None,
        "shape": [len(p) for p in positions], "spacing": list(settings.spacing),
        "native_shape": [int(n) for n in pet.shape], "native_spacing": spacing.tolist(),
        "native_affine": affine.tolist(), "to_axes": to_axes.tolist(), "box": box, "facts": facts,
    }  # fmt: skip
    arrays = {}
    if study.label:
        label = volumes.pop("label").data
        arrays = native_mask(label, pet, settings)
        meta["lesion_voxels"] = len(arrays["native_label"])
        arrays["label"] = to_cached(meta, label)
        arrays["lesion"] = np.flatnonzero(arrays["label"]).astype(np.uint32)
        del label
    del pet
    arrays["images"] = np.empty((2, *meta["shape"]), np.float16)
    for i, slot in enumerate(("ct", "pet")):
        image = turn(volumes.pop(slot).data)[crop].astype(np.float32, order="C")
        image = resample(image, positions)
        if settings.clip is None:
            image = zscore(image)
        else:
            low, high = settings.clip[i]
            np.clip(image, low, high, out=image)
            image -= low
            image /= high - low
        arrays["images"][i] = image
    seen = {"ct": arrays["images"][0], "pet": arrays["images"][1]}
    if study.label:
        seen["label"] = np.concatenate([arrays["native_label"], arrays["native_class"]])
    meta["digests"] = {slot: hash_of(array) for slot, array in seen.items()}
    return arrays, meta


def hash_of(content) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def native_mask(label: np.ndarray, pet: np.ndarray, settings: Preprocessing) -> dict:
    """On the files' grid, as uint32 flat indices in Fortran order: native_label, the mask (its
    classes are native_class, uint8), and of PET/CT native_hot, the SUV above the threshold."""
    plain = label.ravel(order="F")
    flat = np.flatnonzero(plain)
    arrays = {"native_label": flat.astype(np.uint32), "native_class": plain[flat]}
    if settings.clip is not None:
        hot = pet.ravel(order="F") >= settings.threshold_suv
        arrays["native_hot"] = np.flatnonzero(hot).astype(np.uint32)
    return arrays


def to_cached(meta: dict, labels: np.ndarray) -> np.ndarray:
    """Labels on the study's own grid, on the cached one: each that of the nearest voxel."""
    turned = orientations.apply_orientation(labels, np.array(meta["to_axes"]))
    inside = turned[tuple(slice(*b) for b in meta["box"])]
    return nearest(inside, grid_positions(inside.shape, meta["native_spacing"], meta["spacing"]))


def to_native(meta: dict, margin: np.ndarray, classify: Callable | None = None) -> np.ndarray:
    """Map margins (K, W, H, D) on the cached grid to a uint8 label map on the study's own: each is
    interpolated linearly, `classify` turns (K, w, h, d) into classes; outside the body box is 0.
    Without it, in place of margins, labels (W, H, D), by the nearest voxel."""
    steps = zip(meta["native_spacing"], meta["spacing"], meta["box"], strict=True)
    positions = [np.arange(stop - start) * (s / t) for s, t, (start, stop) in steps]
    if classify:
        images = (m.astype(np.float32, copy=False) for m in margin)
        inside = classify(np.stack([resample(image, positions) for image in images]))
    else:
        inside = nearest(margin, positions)
    to_axes = np.array(meta["to_axes"])
    turned = [meta["native_shape"][a] for a in np.argsort(to_axes[:, 0])]
    full = np.zeros(turned, np.uint8)
    full[tuple(slice(*b) for b in meta["box"])] = inside
    back = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), to_axes)
    return orientations.apply_orientation(full, back)
