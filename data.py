"""From cached studies to a batch: training crops, and Φ of Eq. 1.

Patches                     crops drawn as a pure function of (seed, epoch, index)
lend_ct                     studies with the CT of another patient
Schedule, Loader            batches of an epoch, read ahead
add_noise, shuffle_voxels   Φ, on the device
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
from files import UserError
from losses import UNKNOWN

# Label maps of a batch, and the cached arrays that they are cut from.
LABELS = {"mask": "label", "organs": "organs"}

# ------------------------------------------------------------------ crops


def draw_crop(case: Case, patch: tuple[int, int, int], lesion_p: float, rng) -> tuple[slice, ...]:
    """Slices of one crop, which may reach beyond a volume smaller than the patch.

    With probability `lesion_p` (Sec. 3.4: 2/3) a lesion voxel is at the centre, else any voxel
    is; without lesion always any voxel. Where that would leave the volume, the crop is moved in.
    """
    shape = case.meta["shape"]
    lesion_drawn = rng.random() < lesion_p
    if lesion_drawn and case.has_lesion and len(lesions := case.load("lesion")):
        centre = np.unravel_index(int(lesions[rng.integers(len(lesions))]), shape)
    else:
        centre = [rng.integers(n) for n in shape]
    return place_crop(centre, patch, shape)


def place_crop(centre, patch, shape) -> tuple[slice, ...]:
    """Slices of a crop around the voxel `centre`, moved into the volume if it is large enough."""
    crop = []
    for c, p, n in zip(centre, patch, shape, strict=True):
        start = min(max(int(c) - p // 2, 0), n - p) if n >= p else -((p - n) // 2)
        crop.append(slice(start, start + p))
    return tuple(crop)


def read_crop(array: np.ndarray, crop: tuple[slice, ...], out: np.ndarray) -> None:
    """array[..., crop] of a (mapped) array into `out`, zeros beyond its borders; reads no more."""
    shape = array.shape[-3:]
    inside = tuple(slice(max(s.start, 0), min(s.stop, n)) for s, n in zip(crop, shape, strict=True))
    if crop != inside:
        out[:] = 0
    place = (slice(i.start - s.start, i.stop - s.start) for s, i in zip(crop, inside, strict=True))
    out[(..., *place)] = array[(..., *inside)]


@lru_cache(maxsize=4)
def visiting_order(seed: int, epoch: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, turn)).permutation(count)


class Patches:
    """Training crops. Item (epoch, index) is a pure function of it and the seed.

    Every study is visited once before any is visited again. An item holds image float16
    (2, W, H, D), CT first; mask uint8 (W, H, D); tumor, 1.0 if the crop (or, by
    class_label="volume", the study) has a lesion. By ct="other" the CT is that of another patient.
    organs: it holds them too, like the mask, UNKNOWN throughout where a study has no map.
    """

    def __init__(
        self, cases, patch, seed: int, lesion_p=2 / 3, class_label="crop", ct="own", organs=False
    ):
        self.cases, self.patch, self.seed = cases, tuple(patch), seed
        self.lesion_p, self.class_label, self.ct = lesion_p, class_label, ct
        self.labels = LABELS if organs else {"mask": LABELS["mask"]}

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {name: tensor[0] for name, tensor in self.batch([key]).items()}

    def batch(self, keys: list[tuple[int, int]], pinned: bool = False) -> dict:
        """The items of `keys`, stacked; in page-locked memory, which a GPU reads faster, if pinned.
        Each voxel is copied once, from the cache to its place in the batch."""
        new = partial(torch.empty, pin_memory=pinned)
        batch = {"image": new((len(keys), 2, *self.patch), dtype=torch.float16)}
        for name in self.labels:
            batch[name] = new((len(keys), *self.patch), dtype=torch.uint8)
        batch["tumor"] = new(len(keys))
        for i, (epoch, index) in enumerate(keys):
            turn, place = divmod(index, len(self.cases))
            case = self.cases[visiting_order(self.seed, epoch, turn, len(self.cases))[place]]
            rng = np.random.default_rng((self.seed, epoch, index, 1))
            crop = draw_crop(case, self.patch, self.lesion_p, rng)
            read_crop(case.load("images"), crop, batch["image"][i].numpy())
            if self.ct == "other":
                self.read_other_ct(case, crop, (epoch, index), batch["image"][i, :1].numpy())
            for name, array in self.labels.items():
                source = case.organs if name == "organs" else case
                if source:
                    read_crop(source.load(array), crop, batch[name][i].numpy())
                else:
                    batch[name][i] = UNKNOWN
            ill = case.has_lesion if self.class_label == "volume" else batch["mask"][i].any()
            batch["tumor"][i] = float(ill)
        return batch

    def read_other_ct(self, case: Case, crop, key: tuple[int, int], out: np.ndarray) -> None:
        """The CT of a study of another patient, drawn from (seed, *key), into `out`: its crop whose
        centre lies at the same fraction of its sides."""
        others = [c for c in self.cases if c.patient != case.patient]
        other = others[np.random.default_rng((self.seed, *key, 2)).integers(len(others))]
        shape = other.meta["shape"]
        sides = zip(crop, case.meta["shape"], shape, strict=True)
        centre = [(s.start + s.stop) // 2 * theirs // own for s, own, theirs in sides]
        read_crop(other.load("images")[:1], place_crop(centre, self.patch, shape), out)


@dataclass(frozen=True)
class Borrower(Case):
    """A study whose CT is that of `lender`, middle upon middle, cut or padded with zeros."""

    lender: Case | None = None

    def load(self, array: str) -> np.ndarray:
        found = super().load(array)
        if array == "images":
            found, ct = np.array(found), self.lender.load(array)[:1]
            middle = [n // 2 for n in ct.shape[1:]]
            read_crop(ct, place_crop(middle, found.shape[1:], ct.shape[1:]), found[:1])
        return found


def lend_ct(cases: list[Case], ct: str = "other") -> list[Case]:
    """The studies, by ct="other" with the CT of the next patient by name, the last one with that of
    the first. Raises UserError for studies of one patient."""
    if ct == "own":
        return cases
    first = {c.patient: c for c in sorted(cases, key=lambda c: c.name, reverse=True)}
    patients = sorted(first)
    if len(patients) == 1:
        raise UserError(f"--ct other: {cases[0].name} has no other patient in its part. Add one.")
    following = dict(zip(patients, [*patients[1:], patients[0]], strict=True))
    return [Borrower(c.meta, c.folder, lender=first[following[c.patient]]) for c in cases]


class Schedule:
    """Batches of (epoch, index) for one of `world` processes; together they are one batch."""

    def __init__(self, steps: int, batch_size: int, rank: int = 0, world: int = 1):
        self.steps, self.batch_size = steps, batch_size
        self.rank, self.world, self.epoch = rank, world, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            first = step * self.batch_size
            yield [(self.epoch, first + i) for i in range(self.rank, self.batch_size, self.world)]

    def __len__(self) -> int:
        return self.steps


class Loader:
    """Batches of an epoch, which `workers` threads read ahead; without any the caller waits.

    Threads are enough, as copying leaves Python's lock to others. Processes would copy each batch
    once more, through shared memory, and take three times as long.
    """

    def __init__(self, crops: Patches, schedule: Schedule, workers: int, pinned: bool = False):
        self.batch_sampler, self.workers = schedule, workers
        self.read = partial(crops.batch, pinned=pinned)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict]:
        if not self.workers:
            yield from map(self.read, self.batch_sampler)
            return
        pool = ThreadPoolExecutor(self.workers)
        jobs = (pool.submit(self.read, keys) for keys in self.batch_sampler)
        try:
            ahead = deque(islice(jobs, 2 * self.workers))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(islice(jobs, 1))
                yield batch
        finally:  # also if the caller stops early
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------ Φ (Eq. 1)


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
    if edge > min(ct.shape[2:]):
        raise ValueError(f"--shuffle-edge {edge} exceeds a side of the patch {tuple(ct.shape[2:])}")
    out = ct.clone()
    for _ in range(count):
        starts = [int(torch.randint(n - edge + 1, ())) for n in ct.shape[2:]]
        cube = out[(..., *(slice(s, s + edge) for s in starts))]
        voxels = cube.flatten(1)
        order = torch.rand(voxels.shape, device=ct.device).argsort(dim=1)
        cube.copy_(voxels.gather(1, order).view(cube.shape))
    return out
