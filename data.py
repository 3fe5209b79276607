"""From cached studies to a batch: training crops, and Φ of Eq. 1.

Patches                         training crops, each drawn from (seed, epoch, index) alone
with_swapped_ct                 studies with the CT of another patient
Schedule, Loader                batches of an epoch, read ahead
select_modality, transform_ct   what the network is given of a batch, on the device
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from cache import Case
from common import UserError
from losses import UNKNOWN_ORGANS

Shape = tuple[int, int, int]
Crop = tuple[slice, slice, slice]  # may reach beyond a volume

# ------------------------------------------------------------------ crops


def draw_crop(case: Case, patch: Shape, lesion_p: float, rng) -> Crop:
    """Slices of one crop, which may reach beyond a volume smaller than the patch.

    With probability `lesion_p` (Sec. 3.4: 2/3) it is drawn around a lesion voxel, else around any
    voxel, so that by chance more than `lesion_p` of the crops contain a lesion. In a study without
    a lesion it is always drawn around any voxel. See place_crop for the borders.
    """
    shape = case.meta.shape
    # Also drawn where there is no lesion, so that a random centre does not depend on the mask.
    lesion_drawn = rng.random() < lesion_p
    lesion = case.load("lesion") if lesion_drawn and case.has_lesion else ()

    if len(lesion):  # empty: not drawn, no lesion, or a small one that was lost in resampling
        voxel = lesion[rng.integers(len(lesion))]
        centre = np.unravel_index(int(voxel), shape)
    else:
        centre = [rng.integers(side) for side in shape]
    return place_crop(centre, patch, shape)


def place_crop(centre, patch, shape) -> Crop:
    """Slices of a crop around the voxel `centre`, moved where it would leave the volume.

    Along an axis on which the volume is smaller than the patch, the crop is centred on the volume
    and reaches beyond it on both sides.
    """
    crop = []
    for middle, length, side in zip(centre, patch, shape, strict=True):
        if side >= length:
            start = int(middle) - length // 2
            start = min(max(start, 0), side - length)
        else:
            start = -((length - side) // 2)
        crop.append(slice(start, start + length))
    return tuple(crop)


def shift(cut: slice, offset: int) -> slice:
    return slice(cut.start + offset, cut.stop + offset)


def clip_crop(crop: Crop, shape) -> tuple[Crop, Crop]:
    """The part of a crop inside a volume: its slices in the volume, and in the crop itself."""
    in_volume = []
    in_crop = []
    for cut, side in zip(crop, shape, strict=True):
        start = min(max(cut.start, 0), side)
        stop = min(max(cut.stop, 0), side)
        part = slice(start, stop)
        in_volume.append(part)
        in_crop.append(shift(part, -cut.start))
    return tuple(in_volume), tuple(in_crop)


def read_crop(array: np.ndarray, crop: Crop, out: np.ndarray) -> None:
    """Copy array[..., crop] into `out`, with zeros beyond the array's borders.

    Of an array that is mapped from a file no voxel outside the crop is read.
    """
    in_volume, in_crop = clip_crop(crop, array.shape[-3:])
    if crop != in_volume:
        out[:] = 0
    out[(..., *in_crop)] = array[(..., *in_volume)]


@lru_cache(maxsize=4)
def visiting_order(seed: int, epoch: int, turn: int, count: int) -> np.ndarray:
    """The order in which pass number `turn` of an epoch visits the studies, by their index."""
    return np.random.default_rng((seed, epoch, turn)).permutation(count)


@dataclass
class Patches:
    """Training crops. The item of a key (epoch, index) depends on the key and `seed` alone.

    index: the number of the crop within the epoch, counted over all processes. Every study is
    visited once before any is visited again. An item holds image float16
    (2, W, H, D), CT first; mask uint8 (W, H, D); tumor, 1.0 if the crop (or, by
    class_label="volume", the study) has a lesion.
    organs: whether an item also holds the organ map, uint8 (W, H, D), which is UNKNOWN_ORGANS
    throughout for a study without one.
    """

    cases: list[Case]
    patch: Shape
    seed: int
    lesion_p: float = 2 / 3
    class_label: str = "crop"
    organs: bool = False

    def batch(self, keys: list[tuple[int, int]], pinned: bool = False) -> dict[str, Tensor]:
        """The items of `keys`, stacked.

        Each voxel is copied once, from the cache to its place in the batch. pinned: the batch lies
        in page-locked memory, which a GPU reads faster.
        """
        new = partial(torch.empty, pin_memory=pinned)
        shape = (len(keys), *self.patch)
        batch = {
            "image": new((len(keys), 2, *self.patch), dtype=torch.float16),
            "mask": new(shape, dtype=torch.uint8),
        }
        if self.organs:
            batch["organs"] = new(shape, dtype=torch.uint8)
        batch["tumor"] = new(len(keys))
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}  # the same memory

        for i, (epoch, index) in enumerate(keys):
            case, crop = self.draw(epoch, index)
            mask = arrays["mask"][i]
            read_images(case, crop, arrays["image"][i])
            read_crop(case.load("label"), crop, mask)

            if self.organs and case.organs:
                read_crop(case.organs.load("organs"), crop, arrays["organs"][i])
            elif self.organs:
                arrays["organs"][i] = UNKNOWN_ORGANS

            of_volume = self.class_label == "volume"
            arrays["tumor"][i] = case.has_lesion if of_volume else mask.any()
        return batch

    def draw(self, epoch: int, index: int) -> tuple[Case, Crop]:
        """The study and the crop of an item."""
        turn, position = divmod(index, len(self.cases))
        order = visiting_order(self.seed, epoch, turn, len(self.cases))
        case = self.cases[order[position]]

        # The 1 sets this seed apart from those of visiting_order.
        rng = np.random.default_rng((self.seed, epoch, index, 1))
        return case, draw_crop(case, self.patch, self.lesion_p, rng)


# ------------------------------------------------------------------ the CT of another patient


@dataclass(frozen=True)
class SwappedCT(Case):
    """A study with the CT of `lender`, middle upon middle, cut or padded with zeros."""

    lender: Case | None = None

    def load(self, array: str) -> np.ndarray:
        """As Case.load; the images are copied."""
        if array != "images":
            return super().load(array)
        images = np.empty((2, *self.meta.shape), np.float16)
        whole = tuple(slice(0, side) for side in self.meta.shape)
        read_images(self, whole, images)
        return images


def read_images(case: Case, crop: Crop, out: np.ndarray) -> None:
    """The crop of both images of a study into `out` (2, *patch), CT first, as read_crop does."""
    read_crop(Case.load(case, "images"), crop, out)  # the study's own, also of a SwappedCT
    if not isinstance(case, SwappedCT):
        return

    # Lay the study's volume upon the lender's, middle upon middle; the crop is a part of it.
    lender_ct = case.lender.load("images")[:1]
    lender_shape = lender_ct.shape[1:]
    middle = [side // 2 for side in lender_shape]
    volume_in_lender = place_crop(middle, case.meta.shape, lender_shape)
    in_volume, in_crop = clip_crop(crop, case.meta.shape)
    crop_in_lender = []
    for cut, whole in zip(in_volume, volume_in_lender, strict=True):
        crop_in_lender.append(shift(cut, whole.start))
    ct = out[(slice(0, 1), *in_crop)]
    read_crop(lender_ct, tuple(crop_in_lender), ct)


def with_swapped_ct(cases: list[Case], ct: str) -> list[Case]:
    """The studies with their own CT or, for ct="other", each with the CT of the next patient.

    Patients are sorted by name, and the last one is given the CT of the first. Raises UserError for
    studies of one patient.
    """
    if ct == "own":
        return cases
    first_case = {}
    for case in sorted(cases, key=lambda c: c.name):
        first_case.setdefault(case.patient, case)
    patients = sorted(first_case)
    if len(patients) == 1:
        raise UserError(f"--ct other: {cases[0].name} has no other patient in its part. Add one.")

    swapped = []
    for case in cases:
        following = patients.index(case.patient) + 1
        lender = first_case[patients[following % len(patients)]]
        swapped.append(SwappedCT(case.meta, case.folder, case.organs, lender))
    return swapped


# ------------------------------------------------------------------ batches


@dataclass
class Schedule:
    """The keys (epoch, index) of each batch, for process `rank` of `world`, which share a batch.

    `epoch` is set before each pass.
    """

    steps: int
    batch_size: int
    rank: int = 0
    world: int = 1
    epoch: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            first = step * self.batch_size
            share = range(first + self.rank, first + self.batch_size, self.world)
            yield [(self.epoch, index) for index in share]


@dataclass
class Loader:
    """The batches of an epoch, which `workers` threads read ahead; with 0 the caller waits.

    Threads are enough, as copying leaves Python's lock to others. Processes would copy each batch
    once more, through shared memory, and take three times as long.
    """

    patches: Patches
    schedule: Schedule
    workers: int
    pinned: bool = False

    def __len__(self) -> int:
        return self.schedule.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if not self.workers:
            for keys in self.schedule:
                yield self.patches.batch(keys, self.pinned)
            return

        pool = ThreadPoolExecutor(self.workers)
        jobs = (pool.submit(self.patches.batch, keys, self.pinned) for keys in self.schedule)
        try:
            ahead = deque(islice(jobs, 2 * self.workers))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(islice(jobs, 1))
                yield batch
        finally:  # also if the caller stops early
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------ what the network is given


def select_modality(images: Tensor, modality: str) -> Tensor:
    """Images (B, 2, W, H, D) as they are, or with one of the two in both places.

    modality: "both", or "ct" or "pet" for CT-only and PET-only Mirror U-Net (Sec. 4.2).
    """
    if modality == "both":
        return images
    channel = 0 if modality == "ct" else 1
    return images[:, [channel, channel]]


def transform_ct(ct: Tensor, config) -> Tensor:
    """Φ(x_C) of Eq. 1, which is applied in training only."""
    if config.phi == "noise":
        return add_noise(ct, config.noise_sigma)
    if config.phi == "shuffle":
        return shuffle_voxels(ct, config.shuffle_edge, config.shuffle_count)
    return ct


def add_noise(ct: Tensor, sigma: float = 0.3) -> Tensor:
    """G(x_C): Gaussian noise whose standard deviation is drawn from U(0, sigma), once per batch.

    ct (B, 1, W, H, D), in its scaled units. Returns a new tensor.
    """
    strength = torch.rand((), device=ct.device) * sigma
    return ct + torch.randn_like(ct) * strength


def shuffle_voxels(ct: Tensor, edge: int = 16, count: int = 1) -> Tensor:
    """S(x_C): permute the voxels of `count` random cubes, so that skips cannot copy CT.

    ct (B, 1, W, H, D); edge in voxels. The cubes lie at the same places across the batch; each
    sample has its own permutation. Returns a new tensor. Raises ValueError if a cube does not fit.
    """
    sides = ct.shape[2:]
    if edge > min(sides):
        raise ValueError(f"--shuffle-edge {edge} exceeds a side of the patch {tuple(sides)}")

    out = ct.clone()
    for _ in range(count):
        box = []
        for side in sides:
            start = int(torch.randint(side - edge + 1, ()))
            box.append(slice(start, start + edge))
        cube = out[(..., *box)]  # a view

        voxels = cube.flatten(1)  # (B, edge³)
        order = torch.rand(voxels.shape, device=ct.device).argsort(dim=1)
        shuffled = voxels.gather(1, order)
        cube.copy_(shuffled.view(cube.shape))
    return out
