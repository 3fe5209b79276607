"""Images on grids of their own: each voxel must come from the place that the affines say. Here it
tells where it is from, as the images are functions of the place in mm."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import las, make_config, stored_as, write_nifti
from nibabel import Nifti1Image
from nibabel.affines import apply_affine
from nibabel.processing import resample_from_to
from scipy import ndimage
from scipy.spatial.transform import Rotation

import cache
import eval as evaluation
from grids import Grid, inside_view, resample_to, same_grid, share_inside
from mirror_unet import MirrorUNet
from preprocess import PREPROCESSING, labels_to_native, logits_to_native, preprocess
from studies import Source, Study

# The ranges clip no planted value, and hold it within 0.1 HU and 0.01 SUV in float16.
HU = (-200.0, 200.0)
SUV = (0.0, 20.0)
SETTINGS = replace(
    PREPROCESSING["petct"],
    spacing=(4.0, 4.0, 4.0),
    clip=(HU, SUV),
    margin_mm=0.0,
)
CENTER = np.array([12.0, -7.0, 300.0])


def make_grid(shape, spacing, center=CENTER, axes="LAS", angles=(0, 0, 0)):
    """A grid around a place in mm, turned by angles in degrees and stored with other axes."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = turn @ las(spacing, origin=(0, 0, 0))
    affine[:3, 3] = center - apply_affine(affine, np.subtract(shape, 1) / 2)
    stored, affine = stored_as(np.empty(shape), affine, axes)
    return Grid(stored.shape, affine)


def places(grid):
    """The place of each voxel in mm, (W, H, D, 3)."""
    indices = np.moveaxis(np.indices(grid.shape), 0, -1)
    return apply_affine(grid.affine, indices)


NEARBY = CENTER + (-1.3, 1.8, 1.1)
FINE = {"shape": (75, 66, 25), "spacing": (1.2, 1.2, 3.27)}
PET = make_grid((20, 18, 22), (4.1, 4.1, 3.3))
CTS = {
    "parallel": make_grid(**FINE, center=NEARBY),
    "oblique": make_grid(**FINE, angles=(4, -7, 10)),
    "other hand": make_grid(**FINE, center=NEARBY, axes="RAS"),
    "other axes": make_grid(**FINE, axes="PIR"),
    "smaller": make_grid((52, 56, 25), (1.2, 1.2, 2.5), center=CENTER + (10, 0, 0)),
    "larger": make_grid((90, 90, 60), (1.6, 1.6, 2.0), angles=(0, 0, 10)),
}
both_ways = pytest.mark.parametrize("reference", ["pet", "ct"])


def planted(place, direction):
    """HU or SUV at places in mm, rising along a direction."""
    return (place - CENTER) @ direction


def warm(place):
    return 10 + planted(place, direction=(0.08, -0.12, 0.04))


def rising(place):
    return planted(place, direction=(1, 0, 0))


def write_study(folder, ct_grid, reference, ct=rising, pet=warm, pet_grid=PET, side=20):
    """A study of planted images, and its mask on the grid of `reference`: a cube around CENTER."""
    mask_grid = pet_grid if reference == "pet" else ct_grid
    mask = (np.abs(places(mask_grid) - CENTER) <= side / 2).all(-1)
    ct_image = ct(places(ct_grid)).astype(np.float32)
    pet_image = pet(places(pet_grid)).astype(np.float32)
    study = Study(
        name="case",
        patient="patient",
        kind="petct",
        ct=Source(write_nifti(folder / "ct.nii", ct_image, ct_grid.affine)),
        pet=Source(write_nifti(folder / "pet.nii", pet_image, pet_grid.affine)),
        label=write_nifti(folder / "mask.nii", mask.astype(np.uint8), mask_grid.affine),
        own_grids=True,
    )
    return study, mask


# ------------------------------------------------------------------ the right place


def voxels_beyond(grid, place):
    """How far places lie beyond the outermost voxel centres of a grid, in its voxels."""
    index = apply_affine(np.linalg.inv(grid.affine), place)
    return np.maximum(-index, index - np.subtract(grid.shape, 1)).max(-1)


def check_places(error_mm, beyond):
    """What is linear is interpolated exactly, but where borders are clamped and smoothed: there
    the value is from within half a voxel of 4 mm."""
    inner = np.pad(beyond[2:-2, 2:-2, 2:-2] < -5, 2)
    assert inner.any()
    assert error_mm[inner].max() < 0.11
    assert error_mm[beyond < 0.49].max() < 2


@both_ways
@pytest.mark.parametrize("name", CTS)
def test_every_voxel_comes_from_its_place(name, reference, tmp_path):
    for direction in np.eye(3):
        planted_ct = partial(planted, direction=direction)
        study, _ = write_study(tmp_path, CTS[name], reference, ct=planted_ct)
        arrays, meta = preprocess(study, SETTINGS)
        ct, pet = arrays["images"].astype(float)
        ct = ct * 400 - 200
        pet = pet * 20

        place = places(meta.cached_grid)
        beyond_ct = voxels_beyond(CTS[name], place)
        beyond_pet = voxels_beyond(PET, place)
        check_places(np.abs(ct - planted_ct(place)), beyond_ct)
        check_places(np.abs(pet - warm(place)) / 0.24, beyond_pet)

        # Beyond an image's field of view lies air, of CT clipped to -200 HU.
        if reference == "pet":
            assert (ct[beyond_ct > 0.51] == -200).all()
        else:
            assert (pet[beyond_pet > 0.51] == 0).all()


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_a_ct_on_the_cached_grid_is_scaled_too(dtype, tmp_path):
    """It needs no resampling. Its voxels are a read-only view of the file, in the file's type."""
    study, _ = write_study(tmp_path, CTS["parallel"], "pet")
    _, meta = preprocess(study, SETTINGS)
    grid = meta.cached_grid
    hu = np.rint(rising(places(grid))).astype(dtype)
    write_nifti(study.ct.path, hu, grid.affine)

    arrays, meta = preprocess(study, SETTINGS)
    assert meta.cached_grid.shape == grid.shape != meta.native_grid.shape
    expected = (np.clip(hu, *HU) + 200) / 400
    np.testing.assert_allclose(arrays["images"][0], expected, atol=5e-4)


@both_ways
@pytest.mark.parametrize("name", CTS)
def test_every_label_is_that_of_the_nearest_voxel(name, reference, tmp_path):
    study, mask = write_study(tmp_path, CTS[name], reference)
    arrays, meta = preprocess(study, SETTINGS)
    grid = PET if reference == "pet" else CTS[name]
    assert same_grid(meta.native_grid, grid)

    index = apply_affine(np.linalg.inv(grid.affine), places(meta.cached_grid))
    nearest = np.clip(np.rint(index), 0, np.subtract(grid.shape, 1)).astype(int)
    expected = mask[tuple(np.moveaxis(nearest, -1, 0))]
    halfway = (np.abs(index % 1 - 0.5) < 1e-3).any(-1)  # either neighbour is as near
    assert arrays["label"].any()
    assert (arrays["label"] == expected)[~halfway].all()

    settings = replace(
        SETTINGS, spacing=tuple(meta.native_spacing)
    )  # so that the way back is exact
    arrays, meta = preprocess(study, settings)
    assert np.array_equal(labels_to_native(meta, arrays["label"]), mask)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", CTS)
def test_cubes_lie_where_nibabel_puts_them(name, order):
    ways = [(PET, CTS[name]), (CTS[name], PET)]
    for source, target in ways:
        cube = (np.abs(places(source) - CENTER) <= (14, 12, 15)).all(-1).astype(np.float32)
        result = resample_to(cube, source.affine, target, order=order, outside=0)
        reference = resample_from_to(Nifti1Image(cube, source.affine), target, order=order)
        difference = np.abs(result - reference.get_fdata())
        if order == 1:
            assert difference.max() < 2e-5
        else:
            assert difference.mean() < 1e-3  # halfway, either neighbour is as near

        voxel = abs(np.linalg.det(target.affine))
        assert result.sum() * voxel == pytest.approx(28 * 24 * 30, rel=0.25)
        middle = np.average(places(target).reshape(-1, 3), axis=0, weights=result.ravel())
        assert np.abs(middle - places(source)[cube > 0].mean(axis=0)).max() < 1


# ------------------------------------------------------------------ fields of view


def line(count, step, start):
    """A grid of 4 x 4 voxels in section whose centres begin at `start` mm along x."""
    affine = np.diag([step, 1.0, 1.0, 1.0])
    affine[0, 3] = start
    return Grid((count, 4, 4), affine)


def test_share_inside():
    grid = line(10, step=2, start=0)
    other = line(30, step=1, start=9.5)  # its field of view begins at 9 mm
    everywhere = np.ones(grid.shape, bool)
    assert inside_view(grid, other)[:, 0, 0].tolist() == [False] * 5 + [True] * 5
    assert share_inside(grid, other, everywhere) == 0.5
    assert share_inside(grid, other, np.indices(grid.shape)[0] < 6) == pytest.approx(1 / 6)
    assert share_inside(grid, grid, everywhere) == 1


@pytest.mark.parametrize(
    "order, inside", [(1, [0, 0.25, 0.75, 1.25, 1.75, 2]), (0, [0, 0, 1, 1, 2, 2])]
)
def test_border_voxels_end_at_their_faces(order, inside):
    source = line(3, step=1, start=0)
    image = np.indices(source.shape)[0].astype(float)
    target = line(9, step=0.5, start=-0.75)
    result = resample_to(image, source.affine, target, order=order, outside=-5)
    assert result[:, 1, 1].tolist() == [-5, *inside, -5, -5]

    far = line(9, step=0.5, start=1000)
    assert (resample_to(image, source.affine, far, order=order, outside=-5) == -5).all()


# ------------------------------------------------------------------ smoothing


def test_coarse_grids_are_smoothed_as_scikit_image_does():
    image = np.random.default_rng(0).normal(size=(60, 50, 20)).astype(np.float32)
    affine = np.diag([4.0, 3.0, 1.7, 1.0])
    affine[:3, 3] = (7.3, 8.1, 2.2)
    target = Grid((10, 12, 8), affine)
    result = resample_to(image, np.eye(4), target, order=1, outside=0, smooth=True)

    smoothed = ndimage.gaussian_filter(image, sigma=(1.5, 1.0, 0.0), mode="nearest")
    positions = np.moveaxis(places(target), -1, 0)
    expected = ndimage.map_coordinates(smoothed, positions, order=1)
    np.testing.assert_allclose(result, expected, atol=1e-5)


@both_ways
def test_fine_stripes_of_ct_do_not_alias(reference, tmp_path):
    def stripes(place):
        return 200 * (np.floor(place[..., 0]) % 2)

    ct_grid = make_grid((90, 90, 30), (1.0, 1.0, 3.0))
    study, _ = write_study(tmp_path, ct_grid, reference, ct=stripes)
    arrays, _ = preprocess(study, SETTINGS)
    ct = arrays["images"][0].astype(float) * 400 - 200
    assert np.abs(ct[2:-2, 2:-2, 2:-2] - 100).max() < 10

    # On one grid images are resampled as ever.
    study, _ = write_study(tmp_path, ct_grid, reference, ct=stripes, pet_grid=ct_grid)
    arrays, _ = preprocess(replace(study, own_grids=False), SETTINGS)
    assert np.abs(arrays["images"][0].astype(float) * 400 - 300).max() > 50


# ------------------------------------------------------------------ the reference grid


@both_ways
@pytest.mark.parametrize("name", ["parallel", "oblique", "other hand"])
def test_a_perfect_prediction_has_a_dice_of_1(name, reference, tmp_path, monkeypatch):
    study, mask = write_study(tmp_path, CTS[name], reference)
    findings = cache.write_case(study, lambda: preprocess(study, SETTINGS), tmp_path / "case")
    assert findings == []
    case = cache.read_case(tmp_path / "case", study)
    assert np.array_equal(case.native_labels(), mask)

    logits = np.where(case.load("label"), 1.0, -1.0)[None]
    inference = evaluation.Inference({"seg": logits}, 0.0)
    monkeypatch.setattr(evaluation, "infer", lambda *args: inference)
    config = make_config("v1", data="somewhere")
    model = MirrorUNet("v1", channels=(4, 8, 8, 16, 16))
    loaded = SimpleNamespace(model=model, config=config, device="cpu")

    def score(to_native):
        monkeypatch.setattr(evaluation, "logits_to_native", to_native)
        return evaluation.score_case(loaded, case)

    row = score(lambda *args: mask.astype(np.uint8))
    voxel = abs(np.linalg.det(case.meta.native_affine))  # mm³
    assert row["dice"] == 1
    assert row["mtv_pred_ml"] == pytest.approx(mask.sum() * voxel / 1000)
    assert score(logits_to_native)["dice"] > 0.8  # what voxels of 4 mm leave of 20 mm


def test_body_and_thresholds_lie_on_the_grid_of_the_mask(tmp_path):
    def ball(place):
        return np.maximum(0, 8 - np.linalg.norm(place - CENTER, axis=-1) / 3)

    ct_grid = CTS["parallel"]
    study, _ = write_study(tmp_path, ct_grid, "ct", pet=ball, side=8)
    arrays, meta = preprocess(study, replace(SETTINGS, margin_mm=6.0))
    distance = np.linalg.norm(places(ct_grid) - CENTER, axis=-1).ravel(order="F")
    for name, radius in (("native_suv4", 12), ("native_suv2.5", 16.5)):
        above = np.zeros(distance.size, bool)
        above[arrays[name]] = True
        assert above[distance < radius - 2.5].all()  # interpolation cuts a peak
        assert not above[distance > radius + 0.5].any()

    corners = meta.cached_grid.corners
    radius = 23.4 + 6  # to SUV 0.2, and the margin
    assert np.abs(corners.min(axis=0) - CENTER + radius).max() < 5
    assert np.abs(corners.max(axis=0) - CENTER - radius).max() < 5


def test_own_grids_make_a_cached_study_stale(tmp_path):
    study, _ = write_study(tmp_path, PET, "pet")
    others = [replace(study, own_grids=False), replace(study, reference="ct")]
    folder = tmp_path / "case"
    assert cache.write_case(study, lambda: preprocess(study, SETTINGS), folder) == []
    assert cache.read_case(folder, study)
    for other in others:
        assert cache.read_case(folder, other) is None


@both_ways
@pytest.mark.parametrize("name", ["smaller", "larger"])
def test_the_cache_is_not_larger_than_it_says(name, reference, tmp_path):
    study, _ = write_study(tmp_path, CTS[name], reference)
    arrays, _ = preprocess(study, SETTINGS)
    size = arrays["images"].nbytes + arrays["label"].nbytes
    assert size <= cache.largest_size(study, SETTINGS) < 10 * size
