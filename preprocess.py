"""Preprocessing of a study (Sec. 3.4), and the way back to the grid of its files.

A study has two grids. The native one is that of its files, with axes in any order. The cached one,
(W, H, D), is that of the preprocessed arrays: its axes are the anatomical ones that
`Preprocessing.axes` names, it is cropped to a box around the body, and its spacing is the same for
all studies.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import nibabel as nib
import numpy as np
from nibabel import orientations

from checks import BODY_SUV
from studies import Study, check_values, read_study

CACHE_FORMAT = 4  # raise it when the content of the cache changes
THRESHOLD_SUV = 4.0  # the row "SUV ≥ 4 threshold" of the evaluation
Window = tuple[float, float]  # of values, the lowest and the highest


@dataclass(frozen=True)
class Preprocessing:
    """Everything that shapes the cached arrays; all of it is in the cache's key."""

    kind: str
    spacing: tuple[float, float, float]  # mm, along `axes`
    axes: str  # anatomical direction of rising index: L(eft) A(nterior) S(uperior), ...
    clip: tuple[Window, Window] | None  # HU, SUV; None: no units, z-score
    margin_mm: float = 10.0  # kept around the body
    body_suv: float = BODY_SUV  # the body is the box of voxels above it
    threshold_suv: float = THRESHOLD_SUV
    format: int = CACHE_FORMAT


PREPROCESSING = {
    "petct": Preprocessing(
        kind="petct",
        spacing=(2.0, 2.0, 3.0),
        axes="LAS",
        clip=((-100.0, 250.0), (0.0, 15.0)),
    ),
    "mri": Preprocessing(
        kind="mri",
        spacing=(1.0, 1.0, 1.0),
        axes="RAS",
        clip=None,
    ),
}


def settings_for(config) -> Preprocessing:
    """The preprocessing of a resolved Config: that of its kind of data, at its spacing."""
    return replace(PREPROCESSING[config.kind], spacing=tuple(config.spacing))


@dataclass
class CaseMeta:
    """What is known of a preprocessed study beside its arrays, in plain types for meta.json."""

    name: str
    patient: str
    shape: list[int]  # cached grid
    spacing: list[float]  # cached grid, mm
    native_shape: list[int]  # in the axes of the files
    native_spacing: list[float]  # mm, along the anatomical axes
    native_affine: list[list[float]]  # from voxels of the files to mm
    to_axes: list[list[float]]  # nibabel's orientation from the axes of the files to the anatomical
    box: list[list[int]]  # [start, stop] of the kept part, in native voxels per anatomical axis
    facts: dict  # as studies.check_values has them
    lesion_voxels: int | None = None  # of the mask on the native grid; None without a mask
    digests: dict[str, str] = field(default_factory=dict)  # hash of each image and of the mask
    sources: dict = field(default_factory=dict)  # fingerprints of the files, filled by cache.py
    arrays: dict = field(default_factory=dict)  # dtype and shape by name, filled by cache.py


# ------------------------------------------------------------------ one study


def preprocess(study: Study, settings: Preprocessing) -> tuple[dict[str, np.ndarray], CaseMeta]:
    """Read, check, crop to the body, resample and scale one study (Sec. 3.4).

    Returns the arrays to be cached, and what is known of the study. Raises BadStudy.

    images: float16 (2, W, H, D), CT first
    label, lesion: the mask, uint8 (W, H, D), and the flat indices of its foreground, uint32
    native_label, native_class: flat_indices of the mask on the native grid, and its classes, uint8
    native_hot: flat_indices of the SUV at or above the threshold on the native grid (PET/CT)

    A study without a mask has the images alone.
    """
    volumes = read_study(study)
    facts = check_values(study, volumes)
    meta = plan_grid(study, volumes, settings, facts)

    # A study is large: each volume is let go as soon as it was used.
    arrays = {}
    if study.label:
        label = volumes.pop("label").data

        # On the native grid, where the evaluation counts.
        arrays["native_label"] = flat_indices(label)
        arrays["native_class"] = label.ravel(order="F")[arrays["native_label"]]
        if settings.clip:
            hot = volumes["pet"].data >= settings.threshold_suv
            arrays["native_hot"] = flat_indices(hot)

        # On the cached grid, for training.
        arrays["label"] = labels_to_cached(meta, label)
        arrays["lesion"] = np.flatnonzero(arrays["label"]).astype(np.uint32)
        del label

    images = np.empty((2, *meta.shape), np.float16)
    windows = settings.clip or (None, None)
    for channel, slot in enumerate(("ct", "pet")):
        image = image_to_cached(meta, volumes.pop(slot).data)
        images[channel] = scale(image, windows[channel])
        meta.digests[slot] = content_hash(images[channel])
    arrays["images"] = images

    if study.label:
        meta.lesion_voxels = len(arrays["native_label"])
        mask = np.concatenate([arrays["native_label"], arrays["native_class"]])
        meta.digests["label"] = content_hash(mask)
    return arrays, meta


def plan_grid(
    study: Study,
    volumes: dict,
    settings: Preprocessing,
    facts: dict,
) -> CaseMeta:
    """Lay the cached grid of a study around its body."""
    pet = volumes["pet"].data
    affine = volumes["pet"].affine

    # From the axes of the files to the anatomical ones.
    axes = orientations.axcodes2ornt(settings.axes)
    to_axes = orientations.ornt_transform(nib.io_orientation(affine), axes)
    turned_affine = affine @ orientations.inv_ornt_aff(to_axes, pet.shape)
    native_spacing = np.linalg.norm(turned_affine[:3, :3], axis=0)

    # The body is warm in PET. In MRI the skull is stripped, and all but the brain is 0.
    body = pet > settings.body_suv
    if settings.clip is None:
        body = (pet != 0) | (volumes["ct"].data != 0)
    margin = np.ceil(settings.margin_mm / native_spacing)
    box = body_box(orientations.apply_orientation(body, to_axes), margin)

    counts = [stop - start for start, stop in box]
    positions = grid_positions(counts, native_spacing, settings.spacing)
    return CaseMeta(
        name=study.name,
        patient=study.patient,
        shape=list(map(len, positions)),
        spacing=list(settings.spacing),
        native_shape=list(pet.shape),
        native_spacing=native_spacing.tolist(),
        native_affine=affine.tolist(),
        to_axes=to_axes.tolist(),
        box=box,
        facts=facts,
    )


def body_box(body: np.ndarray, margin) -> list[list[int]]:
    """[start, stop] per axis of the True voxels, grown by `margin` voxels within the volume."""
    box = []
    for axis, count in enumerate(body.shape):
        other_axes = tuple({0, 1, 2} - {axis})
        occupied = np.flatnonzero(body.any(axis=other_axes))
        grow = int(margin[axis])
        start = max(int(occupied[0]) - grow, 0)
        stop = min(int(occupied[-1]) + 1 + grow, count)
        box.append([start, stop])
    return box


def flat_indices(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask that are not 0, as uint32 indices in Fortran order."""
    return np.flatnonzero(mask.ravel(order="F")).astype(np.uint32)


def scale(image: np.ndarray, window: Window | None) -> np.ndarray:
    """Clip to the window and scale it to [0, 1], in place. Without a window (MRI), scale the brain,
    the voxels that are not 0, to zero mean and unit variance; the others stay 0."""
    if window:
        low, high = window
        np.clip(image, low, high, out=image)
        image -= low
        image /= high - low
        return image

    scaled = np.zeros_like(image)
    brain = image != 0
    if brain.any():
        values = image[brain].astype(np.float64)
        deviation = max(values.std(), 1e-8)
        scaled[brain] = (values - values.mean()) / deviation
    return scaled


def content_hash(content) -> str:
    """32 hexadecimal digits that tell the bytes of an array, or bytes, from others."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# ------------------------------------------------------------------ from grid to grid


def image_to_cached(meta: CaseMeta, image: np.ndarray) -> np.ndarray:
    """Resample an image on the native grid linearly to the cached one; float32 (W, H, D)."""
    inside = crop_to_body(meta, image).astype(np.float32, order="C")
    return resample_linear(inside, cached_positions(meta))


def labels_to_cached(meta: CaseMeta, labels: np.ndarray) -> np.ndarray:
    """Resample labels on the native grid to the cached one: each that of the nearest voxel."""
    return resample_nearest(crop_to_body(meta, labels), cached_positions(meta))


def logits_to_native(
    meta: CaseMeta,
    foreground: np.ndarray,
    classify: Callable,
) -> np.ndarray:
    """Map foreground logits (K, W, H, D) on the cached grid to a uint8 label map on the native one.

    Each is interpolated linearly, then `classify` turns (K, w, h, d) into classes (w, h, d). All
    outside of the body's box is background.
    """
    positions = native_positions(meta)
    resampled = []
    for logits in foreground:
        logits = logits.astype(np.float32, copy=False)
        resampled.append(resample_linear(logits, positions))
    return uncrop(meta, classify(np.stack(resampled)))


def labels_to_native(meta: CaseMeta, labels: np.ndarray) -> np.ndarray:
    """Map labels (W, H, D) on the cached grid to the native one, by the nearest voxel; uint8."""
    return uncrop(meta, resample_nearest(labels, native_positions(meta)))


def cached_positions(meta: CaseMeta) -> list[np.ndarray]:
    """Where the cached grid samples the body's box, in native voxels per axis."""
    counts = [stop - start for start, stop in meta.box]
    return grid_positions(counts, meta.native_spacing, meta.spacing)


def native_positions(meta: CaseMeta) -> list[np.ndarray]:
    """Where the native grid samples the cached arrays in the body's box, in cached voxels."""
    positions = []
    for axis, (start, stop) in enumerate(meta.box):
        step = meta.native_spacing[axis] / meta.spacing[axis]
        positions.append(np.arange(stop - start) * step)
    return positions


def grid_positions(shape, spacing, new_spacing) -> list[np.ndarray]:
    """Where a new grid samples an old one, in old voxels per axis; their first voxels coincide.

    The count is that of MONAI's Spacing: the distance of the end voxels, rounded to new voxels.
    """
    positions = []
    for count, old, new in zip(shape, spacing, new_spacing, strict=True):
        new_count = round((count - 1) * old / new + 1)
        positions.append(np.arange(new_count) * (new / old))
    return positions


def crop_to_body(meta: CaseMeta, volume: np.ndarray) -> np.ndarray:
    """The body's box of a volume on the native grid, in the anatomical axes; a view."""
    turned = orientations.apply_orientation(volume, np.array(meta.to_axes))
    return turned[box_slices(meta)]


def uncrop(meta: CaseMeta, inside: np.ndarray) -> np.ndarray:
    """Undo crop_to_body: a uint8 volume on the native grid, 0 outside of the body's box."""
    to_axes = np.array(meta.to_axes)
    order = np.argsort(to_axes[:, 0])  # the axis of the files that becomes each anatomical one
    turned = np.zeros(np.array(meta.native_shape)[order], np.uint8)
    turned[box_slices(meta)] = inside

    to_files = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), to_axes)
    return orientations.apply_orientation(turned, to_files)


def box_slices(meta: CaseMeta) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in meta.box)


def resample_linear(image: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """Sample a float32 image at the grid of `positions`, in voxels per axis.

    Axis by axis, which is exact, as the map between two grids with the same axes is diagonal.
    """
    growth = np.array(list(map(len, positions))) / image.shape
    for axis in np.argsort(growth, kind="stable"):  # what shrinks first leaves less to do
        image = interpolate(image, axis, positions[axis])
    return image


def interpolate(image: np.ndarray, axis: int, positions: np.ndarray) -> np.ndarray:
    """Interpolate a float32 image linearly along one axis, clamped at its borders."""
    last = image.shape[axis] - 1
    positions = np.clip(positions, 0, last)
    same_count = len(positions) == last + 1
    if same_count and np.allclose(positions, np.arange(last + 1), atol=1e-6):
        return image

    low = np.minimum(positions.astype(np.int64), max(last - 1, 0))
    along_axis = [1, 1, 1]
    along_axis[axis] = -1
    weight = (positions - low).astype(np.float32).reshape(along_axis)

    # below + weight * (above - below), in place: these arrays are as large as a study
    below = image.take(low, axis)
    above = image.take(np.minimum(low + 1, last), axis)
    above -= below
    above *= weight
    below += above
    return below


def resample_nearest(labels: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """As resample_linear, of labels: each the value of the nearest voxel."""
    indices = []
    for places, count in zip(positions, labels.shape, strict=True):
        nearest = np.rint(places).astype(np.int64)
        indices.append(np.minimum(nearest, count - 1))
    return np.ascontiguousarray(labels[np.ix_(*indices)])
