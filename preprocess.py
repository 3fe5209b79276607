"""Preprocessing of a study (Sec. 3.4), and the way back to the grid of its files.

A study has two grids. The native one is that of its mask, with axes in any order; its images lie
there too, or each on a grid of its own. The cached one, (W, H, D), is that of the preprocessed
arrays: its axes are the anatomical ones that `Preprocessing.axes` names, it is cropped to a box
around the body, and its spacing is the same for all studies.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import nibabel as nib
import numpy as np
from nibabel import orientations

from checks import BODY_SUV
from grids import (
    Grid,
    resample_linear,
    resample_nearest,
    resample_to,
    same_grid,
    smooth_for_steps,
)
from studies import Study, Volume, check_values, read_study, reference_slot

CACHE_FORMAT = 5  # raise it when the content of the cache changes
OUTSIDE_HU = -1000.0  # air, beyond the field of view of a CT
THRESHOLDS_SUV = (4.0, 2.5)  # the rows "SUV ≥ 4 threshold" and "SUV ≥ 2.5 threshold" of tables
Range = tuple[float, float]  # the lowest and the highest value


@dataclass(frozen=True)
class Preprocessing:
    """Everything that shapes the cached arrays; all of it is in the cache's key."""

    kind: str
    spacing: tuple[float, float, float]  # mm, along `axes`
    axes: str  # anatomical direction of rising index: L(eft) A(nterior) S(uperior), ...
    clip: tuple[Range, Range] | None  # HU, SUV; None: no units, z-score
    margin_mm: float = 10.0  # kept around the body
    body_suv: float = BODY_SUV  # what is warmer is the body
    thresholds_suv: tuple[float, ...] = THRESHOLDS_SUV
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
    native_shape: list[int]  # in the axes of the mask's file
    native_spacing: list[float]  # mm; in the anatomical axes, unlike native_shape
    native_affine: list[list[float]]  # (4, 4) from voxels of the mask's file to mm
    to_axes: list[list[float]]  # (3, 2) to the anatomical axes, as nibabel's ornt_transform has it
    box: list[list[int]]  # [start, stop] of the kept part, in native voxels per anatomical axis
    facts: dict  # as studies.check_values has them
    lesion_voxels: int | None = None  # of the mask on the native grid; None without a mask
    digests: dict[str, str] = field(default_factory=dict)  # hash of each image and of the mask
    sources: dict = field(default_factory=dict)  # fingerprints of the files, filled by cache.py
    arrays: dict = field(default_factory=dict)  # dtype and shape by name, filled by cache.py

    @property
    def native_grid(self) -> Grid:
        return Grid(tuple(self.native_shape), np.array(self.native_affine))

    @property
    def cached_grid(self) -> Grid:
        # Cached voxels to native voxels in the anatomical axes, to voxels of the file, to mm.
        cached_to_turned = np.diag([*np.divide(self.spacing, self.native_spacing), 1])
        cached_to_turned[:3, 3] = [start for start, _ in self.box]
        turned_to_file = orientations.inv_ornt_aff(np.array(self.to_axes), self.native_shape)
        affine = self.native_affine @ turned_to_file @ cached_to_turned
        return Grid(tuple(self.shape), affine)


# ------------------------------------------------------------------ one study


def preprocess(study: Study, settings: Preprocessing) -> tuple[dict[str, np.ndarray], CaseMeta]:
    """Read, check, crop to the body, resample and scale one study (Sec. 3.4).

    Returns the arrays to be cached, and what is known of the study. Raises BadStudy.

    images: float16 (2, W, H, D), CT first
    label: the mask on the cached grid, uint8 (W, H, D)
    lesion: nonzero voxels of `label`, uint32 indices in C order
    native_label: nonzero voxels of the mask on the native grid, uint32 indices in Fortran order
    native_class: the class of each voxel in native_label, uint8
    native_suv4, native_suv2.5: voxels of at least this SUV on the native grid, indexed like
        native_label (PET/CT)

    A study without a mask has the images alone.
    """
    volumes = read_study(study)
    facts = check_values(study, volumes)
    native = volumes[reference_slot(study, volumes)].grid
    meta = plan_grid(study, volumes, native, settings, facts)

    # A study is large: each volume is let go as soon as it was used.
    arrays = {}
    if study.label:
        label = volumes.pop("label").data

        # On the native grid, where the evaluation counts.
        arrays["native_label"] = flat_indices(label)
        arrays["native_class"] = label.ravel(order="F")[arrays["native_label"]]
        if settings.kind == "petct":
            suv = on_grid(volumes["pet"], native, order=1)
            for threshold in settings.thresholds_suv:
                arrays[f"native_suv{threshold:g}"] = flat_indices(suv >= threshold)
            del suv

        # On the cached grid, for training.
        arrays["label"] = labels_to_cached(meta, label)
        arrays["lesion"] = np.flatnonzero(arrays["label"]).astype(np.uint32)
        del label

    images = np.empty((2, *meta.shape), np.float16)
    ranges = settings.clip or (None, None)
    for channel, slot in enumerate(("ct", "pet")):
        image = image_to_cached(study, meta, slot, volumes.pop(slot))
        images[channel] = scale(image, ranges[channel])
        meta.digests[slot] = content_hash(images[channel])
    arrays["images"] = images

    if study.label:
        meta.lesion_voxels = len(arrays["native_label"])
        mask = np.concatenate([arrays["native_label"], arrays["native_class"]])
        meta.digests["label"] = content_hash(mask)
    return arrays, meta


def plan_grid(
    study: Study,
    volumes: dict[str, Volume],
    native: Grid,
    settings: Preprocessing,
    facts: dict,
) -> CaseMeta:
    """Lay the cached grid of a study around its body.

    Its axes are those of the native grid, in the order and direction of settings.axes.
    """
    # From the axes of the files to the anatomical ones.
    wanted = orientations.axcodes2ornt(settings.axes)
    to_axes = orientations.ornt_transform(nib.io_orientation(native.affine), wanted)
    turned_affine = native.affine @ orientations.inv_ornt_aff(to_axes, native.shape)
    native_spacing = np.linalg.norm(turned_affine[:3, :3], axis=0)

    # The body is warm in PET. In MRI the skull is stripped, and all but the brain is 0. The nearest
    # voxel (order=0) is good enough for a box; preprocess() interpolates for the SUV thresholds.
    pet = on_grid(volumes["pet"], native, order=0)
    if settings.kind == "petct":
        body = pet > settings.body_suv
    else:
        body = (pet != 0) | (on_grid(volumes["ct"], native, order=0) != 0)
    margin = np.ceil(settings.margin_mm / native_spacing)
    box = body_box(orientations.apply_orientation(body, to_axes), margin)

    counts = [stop - start for start, stop in box]
    positions = grid_positions(counts, native_spacing, settings.spacing)
    return CaseMeta(
        name=study.name,
        patient=study.patient,
        shape=list(map(len, positions)),
        spacing=list(settings.spacing),
        native_shape=list(native.shape),
        native_spacing=native_spacing.tolist(),
        native_affine=native.affine.tolist(),
        to_axes=to_axes.tolist(),
        box=box,
        facts=facts,
    )


def on_grid(volume: Volume, grid: Grid, order: int) -> np.ndarray:
    """The data of an image on a grid, see grids.resample_to; 0 beyond its field of view."""
    return resample_to(volume.data, volume.affine, grid, order, outside=0)


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


def scale(image: np.ndarray, limits: Range | None) -> np.ndarray:
    """Clip a float32 image to its limits and scale it to [0, 1]; the image itself is changed.

    Without limits (MRI) a new image is returned: the brain, which are the voxels that are not 0,
    has zero mean and unit variance, and the others stay 0.
    """
    if limits:
        low, high = limits
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


def image_to_cached(study: Study, meta: CaseMeta, slot: str, volume: Volume) -> np.ndarray:
    """Resample an image of a study linearly to the cached grid; a new array, float32 (W, H, D).

    In a study with own_grids every image, also the one on the native grid, is smoothed first along
    axes where the cached grid is much coarser. In other studies none is, like in MONAI's Spacing.
    """
    if same_grid(volume.grid, meta.native_grid):
        inside = crop_to_body(meta, volume.data).astype(np.float32, order="C")
        if study.own_grids:
            inside = smooth_for_steps(inside, np.divide(meta.spacing, meta.native_spacing))
        return resample_linear(inside, cached_positions(meta))

    is_ct = study.kind == "petct" and slot == "ct"
    resampled = resample_to(
        volume.data,
        volume.affine,
        meta.cached_grid,
        order=1,
        outside=OUTSIDE_HU if is_ct else 0.0,
        smooth=True,
    )
    # An image that lies on the cached grid comes back itself: read-only, in its file's type.
    return resampled.astype(np.float32, order="C")


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

    As in MONAI's Spacing, there are round((count - 1) * old / new + 1) new voxels.
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
    order = np.argsort(to_axes[:, 0])  # the axis of the file that becomes each anatomical one
    turned = np.zeros(np.array(meta.native_shape)[order], np.uint8)
    turned[box_slices(meta)] = inside

    # the inverse of to_axes: in nibabel's terms RAS is the identity
    to_files = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), to_axes)
    return orientations.apply_orientation(turned, to_files)


def box_slices(meta: CaseMeta) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in meta.box)
