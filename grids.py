"""Grids of voxels in the world, and the way of an image from one of them to another.

A grid has a shape (W, H, D) and an affine (4, 4), which maps the indices of a voxel to the place of
its centre in mm. The field of view of an image ends at the faces of its outermost
voxels, half a voxel beyond their centres.
"""

from typing import NamedTuple

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

TOLERANCE_MM = 0.5  # Corners of two grids that count as one may lie this far apart.
FACE = 0.5 + 1e-3  # From a voxel's centre to its face, in voxels, with room for rounding.


class Grid(NamedTuple):
    """Where the voxels of an image lie."""

    shape: tuple[int, ...]
    affine: np.ndarray  # (4, 4), from voxels to mm

    @property
    def corners(self) -> np.ndarray:
        """The centres (8, 3) of the voxels at its corners, in mm."""
        indices = np.indices((2, 2, 2)).reshape(3, 8).T * np.subtract(self.shape, 1)
        return apply_affine(self.affine, indices)


def same_grid(grid: Grid, other: Grid) -> bool:
    """Whether two grids have one shape and, within TOLERANCE_MM, the same corners."""
    return not grid_difference(grid, other, other_name="the other")


def grid_difference(grid: Grid, other: Grid, other_name: str) -> str:
    """How a grid differs from another, in words; empty if they agree within TOLERANCE_MM."""
    if grid.shape != other.shape:
        return f"shape {grid.shape} differs from {other.shape} of {other_name}"

    distance = np.linalg.norm(grid.corners - other.corners, axis=1).max()  # mm
    if distance <= TOLERANCE_MM:
        return ""
    return (
        f"affine differs from that of {other_name}: corners lie up to {distance:.3g} mm "
        f"apart, {TOLERANCE_MM} mm is tolerated"
    )


def voxels_between(grid: Grid, affine: np.ndarray) -> np.ndarray:
    """The affine (4, 4) from the voxels of a grid to those of an image with this affine.

    An entry that moves even the far end of the grid by less than 0.01 voxel of the image is a
    rounding error and becomes 0, so that parallel axes are seen as such.
    """
    to_image = np.linalg.inv(affine) @ grid.affine
    axes = to_image[:3, :3]  # a view; column j: one step along axis j of the grid
    moved = np.abs(axes) * grid.shape  # over the whole length of axis j
    axes[moved < 0.01] = 0
    return to_image


def inside_view(grid: Grid, other: Grid) -> np.ndarray:
    """Where the voxel centres of `grid` lie in the field of view of `other`; bool (W, H, D)."""
    to_other = voxels_between(grid, other.affine)[:3].astype(np.float32)
    indices = np.ix_(*map(np.arange, grid.shape))
    inside = np.ones(grid.shape, bool)
    for row, count in zip(to_other, other.shape, strict=True):
        position = row[3]  # along one axis of `other`, in its voxels
        for step, index in zip(row[:3], indices, strict=True):
            # Adding a zero step too would broadcast what is a line into a volume.
            if step:
                position = position + step * index.astype(np.float32)
        inside &= (position >= -FACE) & (position <= count - 1 + FACE)
    return inside


def share_inside(grid: Grid, other: Grid, where: np.ndarray) -> float:
    """The share of the voxels of `grid` at which `where` is True that lie, with their centres, in
    the field of view of `other`. where: bool (W, H, D), at least one True."""
    return float(inside_view(grid, other)[where].mean())


# ------------------------------------------------------------------ images


def resample_to(
    image: np.ndarray,
    affine: np.ndarray,
    grid: Grid,
    order: int,
    outside: float,
    smooth: bool = False,
) -> np.ndarray:
    """Bring an image (W, H, D) with its affine to a grid, in one step.

    order: 1 interpolates linearly and returns float32, 0 takes the nearest voxel.
    outside: the value beyond the field of view of the image.
    smooth: smooth the image first along axes where the grid is much coarser (smooth_for_steps).

    An image that already lies on this grid (same_grid) is returned itself, whatever the order: not
    copied, in its own type, and read-only if it was.
    """
    image_grid = Grid(image.shape, affine)
    if same_grid(image_grid, grid):
        return image

    to_image = voxels_between(grid, affine)
    axes = to_image[:3, :3]
    # Per axis of the image: how many of its voxels lie between two samples.
    steps = np.linalg.norm(axes, axis=1)

    # A whole body is large: what lies far from the grid is cut off before it is smoothed. The
    # margin is the reach of smooth_for_steps, as SciPy cuts a Gaussian at 4 σ = 2 (step - 1).
    corners = apply_affine(np.linalg.inv(affine), grid.corners)
    image, first = crop_around(image, corners, margin=1 + 2 * steps)
    offset = to_image[:3, 3] - first

    if order:
        image = image.astype(np.float32, order="C")
    if smooth:
        image = smooth_for_steps(image, steps)

    if np.count_nonzero(axes) == 3:  # Each axis of the grid is parallel to one of the image.
        parallel = np.abs(axes).argmax(axis=0)  # the axis of the image, for each of the grid
        positions = []
        for grid_axis, image_axis in enumerate(parallel):
            step = axes[image_axis, grid_axis]
            positions.append(step * np.arange(grid.shape[grid_axis]) + offset[image_axis])
        resample = resample_linear if order else resample_nearest
        resampled = resample(image.transpose(parallel), positions)
    else:
        resampled = ndimage.affine_transform(
            image,
            axes,
            offset=offset,
            output_shape=grid.shape,
            order=order,
            mode="nearest",
        )
    resampled[~inside_view(grid, image_grid)] = outside
    return resampled


def crop_around(image: np.ndarray, points: np.ndarray, margin) -> tuple[np.ndarray, np.ndarray]:
    """The part of an image that holds the points (N, 3) and a margin (3,), all in voxels, and the
    index of its first voxel. Beside the image, a part of one voxel remains."""
    last = np.subtract(image.shape, 1)
    first = np.clip(np.floor(points.min(axis=0) - margin), 0, last).astype(int)
    last = np.clip(np.ceil(points.max(axis=0) + margin), 0, last).astype(int)
    return image[tuple(map(slice, first, last + 1))], first


def smooth_for_steps(image: np.ndarray, steps) -> np.ndarray:
    """Smooth an image along each axis on which it is to be sampled at steps of over two voxels.

    By the rule of scikit-image's `resize` with anti_aliasing, a Gaussian of (step - 1) / 2 voxels.
    Without it, what is finer than a step would appear as something coarse (aliasing).
    """
    for axis, step in enumerate(steps):
        if step > 2:
            image = ndimage.gaussian_filter1d(image, (step - 1) / 2, axis, mode="nearest")
    return image


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
    """Sample labels at the grid of `positions`, each time the nearest voxel.

    Halfway between two voxels it is the one with the even index.
    """
    indices = []
    for places, count in zip(positions, labels.shape, strict=True):
        nearest = np.rint(places).astype(np.int64)
        indices.append(np.clip(nearest, 0, count - 1))
    return np.ascontiguousarray(labels[np.ix_(*indices)])
