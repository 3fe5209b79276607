"""data.py: crops of numbered voxels, Φ by statistics."""

import hashlib
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache import Case
from common import UserError
from data import (
    Loader,
    Patches,
    Schedule,
    add_noise,
    select_modality,
    shuffle_voxels,
    with_swapped_ct,
)
from losses import UNKNOWN_ORGANS
from preprocess import CaseMeta

KEYS = [(1, i) for i in range(24)]
PATCH = (4, 4, 4)
CUBE = (30, 30, 30)
UNREAD = ("spacing", "native_shape", "native_spacing", "native_affine", "to_axes", "box", "facts")


@pytest.fixture
def store(tmp_path):
    """store(name, images, label) makes a cached case of the patient name[0]."""

    def make(name, images, label):
        (tmp_path / name).mkdir()
        lesion = np.flatnonzero(label)
        arrays = {
            "images": images.astype("f2"),
            "label": label,
            "lesion": lesion.astype("u4"),
        }
        meta = CaseMeta(
            name=name,
            patient=name[0],
            shape=list(label.shape),
            lesion_voxels=len(lesion),
            **dict.fromkeys(UNREAD),
        )
        for array, values in arrays.items():
            np.save(tmp_path / name / f"{array}.npy", values)
            meta.arrays[array] = (values.dtype.str, values.shape)
        return Case(meta, tmp_path / name)

    return make


def all_numbers(shape):
    return np.arange(1, np.prod(shape) + 1).reshape(shape)


@pytest.fixture
def numbered(store):
    """numbered(shape, lesions) makes a cached case whose voxels are numbered from 1 upwards."""

    def make(shape=(9, 9, 9), lesions=(), name="a"):
        label = np.zeros(shape, np.uint8)
        for voxel in lesions:
            label[voxel] = 1
        images = np.stack(np.divmod(all_numbers(shape), 2048))  # float16 holds 2048 at most
        return store(name, images, label)

    return make


def item_of(patches, index, epoch=0):
    batch = patches.batch([(epoch, index)])
    return {name: tensor[0] for name, tensor in batch.items()}


def first_item(case, patch=PATCH, **options):
    return item_of(Patches([case], patch, seed=0, **options), 0)


def voxel_numbers(item):
    """The numbers of the voxels of a crop; 0 beyond the volume."""
    high, low = item["image"].long().numpy()
    return high * 2048 + low


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ crops


@pytest.mark.parametrize("p, count", [(2 / 3, 1200), (0.0, 200), (1.0, 200)])
def test_lesions_are_at_the_centre_of_two_thirds(numbered, p, count):
    shape = (40, 36, 30)
    case = numbered(shape, [(20, 18, 16), (14, 15, 13)])
    patches = Patches([case], (8, 6, 5), seed=0, lesion_p=p)
    middles = []
    for i in range(count):
        item = item_of(patches, i)
        if item["mask"][4, 3, 2]:
            middles.append(voxel_numbers(item)[4, 3, 2])
    assert len(middles) / count == pytest.approx(p, abs=0.045 if 0 < p < 1 else 0)
    if p:  # either is drawn as often
        numbers, counts = np.unique(middles, return_counts=True)
        voxels = np.transpose(np.unravel_index(numbers - 1, shape))
        assert voxels.tolist() == [[14, 15, 13], [20, 18, 16]]
        assert counts[0] / len(middles) == pytest.approx(0.5, abs=0.1)


def test_other_crops_lie_anywhere(numbered):
    patches = Patches([numbered((30, 4, 4))], PATCH, seed=0, lesion_p=1.0)
    starts = []
    for i in range(1200):
        first = voxel_numbers(item_of(patches, i))[0, 0, 0]
        starts.append((first - 1) // 16)
    counts = np.bincount(starts)
    assert len(counts) == 27
    inner = counts[1:26]  # the borders collect what is moved in
    assert inner.min() > 15
    assert inner.max() < 75  # 40 expected


def test_crops_stay_inside(numbered):
    case = numbered((20, 16, 12), [(19, 0, 11)])
    item = first_item(case, (8, 8, 8), lesion_p=1.0)
    corner = all_numbers((20, 16, 12))[12:, :8, 4:]
    assert np.array_equal(voxel_numbers(item), corner)
    assert item["image"].dtype == torch.float16
    assert item["mask"].nonzero().tolist() == [[7, 0, 7]]


def test_small_volumes_are_padded_with_zeros(numbered):
    case = numbered((3, 6, 4), [(1, 5, 2)])
    item = first_item(case, (6, 4, 5), lesion_p=1.0)
    expected = np.zeros((6, 4, 5))
    expected[1:4, :, :4] = all_numbers((3, 6, 4))[:, 2:]
    assert np.array_equal(voxel_numbers(item), expected)
    assert item["mask"].nonzero().tolist() == [[2, 3, 2]]


@pytest.mark.parametrize("class_label", ["crop", "volume"])
def test_labels_of_a_crop(numbered, class_label):
    case = numbered(CUBE, [(2, 2, 2)])
    without = numbered(name="b")
    batch = Patches([case], PATCH, 0, class_label=class_label).batch(KEYS)
    has_lesion = batch["mask"].flatten(1).max(1).values
    labels = set(zip(has_lesion.tolist(), batch["tumor"].tolist(), strict=True))
    assert labels == {(1, 1.0), (0, float(class_label == "volume"))}
    item = first_item(without, class_label=class_label)
    assert item["tumor"] == 0


def test_a_lesion_may_be_lost_in_resampling(numbered):
    case = numbered()
    case.meta.lesion_voxels = 1
    assert not first_item(case, lesion_p=1.0)["mask"].any()


def test_organs_of_a_crop(numbered):
    case = numbered(CUBE, [(2, 2, 2)])
    np.save(case.folder / "organs.npy", 7 * np.load(case.folder / "label.npy"))
    meta = replace(case.meta, arrays={"organs": case.meta.arrays["label"]})
    with_map = replace(case, organs=Case(meta, case.folder))
    item = first_item(with_map, lesion_p=1.0, organs=True)
    assert list(item) == ["image", "mask", "organs", "tumor"]
    assert torch.equal(item["organs"], 7 * item["mask"])
    assert item["mask"].sum() == 1
    assert list(first_item(with_map)) == ["image", "mask", "tumor"]

    beyond = first_item(with_map, (40, 4, 4), organs=True)  # no organ is there
    assert beyond["organs"][0].max() == 0
    unknown = first_item(case, (40, 4, 4), organs=True)
    assert (unknown["organs"] == UNKNOWN_ORGANS).all()  # also there


def test_crops_depend_on_seed_epoch_and_index_only(numbered):
    plane = np.s_[:, :, 9]
    cases = [numbered((20, 20, 20), [plane], name) for name in "abc"]

    def draw(seed=4, epoch=1, indices=range(24)):
        patches = Patches(cases, (5, 5, 5), seed, lesion_p=0.3)
        return [item_of(patches, i, epoch) for i in indices]

    items = draw()
    torch.manual_seed(1)
    np.random.seed(1)
    backwards = draw(indices=range(23, -1, -1))
    assert all(map(same, items, backwards[::-1]))
    assert sum(map(same, items, draw(seed=5))) < 3
    assert sum(map(same, items, draw(epoch=2))) < 3
    assert sum(map(same, items[:1] * 23, items[1:])) < 3


def test_each_study_once_per_round(numbered):
    cases = [numbered((2, 2, k + 2), name=f"{k}") for k in range(5)]
    patches = Patches(cases, (2, 2, 6), seed=0)
    sizes = np.zeros((10, 5))
    for i in range(50):
        sizes.flat[i] = np.count_nonzero(voxel_numbers(item_of(patches, i)))
    assert (np.sort(sizes) == [8, 12, 16, 20, 24]).all()
    assert len(np.unique(sizes, axis=0)) > 5


# ------------------------------------------------------------------ the CT of another patient


@pytest.fixture
def of_patients(store):
    """of_patients("ab") makes studies a1, a2, b1, b2 of two sizes, whose CT is 1, 2, 3, 4; PET
    numbers the planes of the first axis."""

    def make(letters="abcd"):
        cases = []
        for k in range(1, 2 * len(letters) + 1):
            name = f"{letters[(k - 1) // 2]}{2 - k % 2}"
            shape = (20, 12, 8) if k % 3 else (40, 8, 10)
            plane = 1.0 + np.indices(shape)[0]
            images = np.stack([0 * plane + k, plane])
            cases.append(store(name, images, (plane == 5).astype("u1")))
        return cases

    return make


def test_crops_with_the_patients_ct_are_as_ever(of_patients):
    digest = hashlib.sha256()
    patches = Patches(of_patients(), (8, 10, 8), 7)
    for epoch, index in KEYS:
        for tensor in item_of(patches, index, epoch).values():
            digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == "7ec1952524b245b1"  # of commit c25df52


def test_the_ct_of_the_next_patient(of_patients):
    cases = of_patients("abc")
    assert with_swapped_ct(cases, "own") is cases
    for swapped in with_swapped_ct(cases[::-1], "other"):
        case = replace(swapped.lender, meta=swapped.meta, folder=swapped.folder)
        ct, pet = swapped.load("images")
        assert swapped.name == case.name
        assert np.array_equal(swapped.load("label"), case.load("label"))
        assert np.array_equal(pet, case.load("images")[1])

        constant = {"a": 3, "b": 5, "c": 1}[case.patient]  # of the next patient's first study
        lender = (20, 12, 8) if constant % 3 else (40, 8, 10)
        common = np.minimum(ct.shape, lender)
        filled = np.argwhere(ct)  # middle upon middle, zeros around
        assert len(filled) == np.prod(common)
        assert (filled.min(0) == (ct.shape - common) // 2).all()
        assert np.count_nonzero(ct == constant) == len(filled)
    with pytest.raises(UserError, match="--ct other: a1 has no other patient in its part"):
        with_swapped_ct(cases[:2], "other")


@pytest.mark.parametrize("patch", [(8, 8, 8), (24, 10, 9)])
def test_training_crops_are_those_of_the_swapped_volumes(of_patients, patch):
    cases = of_patients("abc")
    swapped = with_swapped_ct(cases, "other")
    crops = Patches(swapped, patch, seed=3).batch(KEYS)
    volumes = [case.load("images") for case in swapped]
    for case, images in zip(cases, volumes, strict=True):
        np.save(case.folder / "images.npy", images)
    assert same(crops, Patches(cases, patch, seed=3).batch(KEYS))


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_items_in_turn(numbered, workers):
    cases = [numbered((12, 10, 11), [(5, 5, 5)], name) for name in "abc"]
    patches = Patches(cases, (4, 14, 4), seed=0)
    loader = Loader(patches, Schedule(steps=7, batch_size=3), workers)
    assert len(loader) == 7
    for epoch in (0, 5):
        loader.schedule.epoch = epoch
        batches = list(loader)
        assert len(batches) == 7
        for step, batch in enumerate(batches):
            for k in range(3):
                item = {name: tensor[k] for name, tensor in batch.items()}
                assert same(item, item_of(patches, 3 * step + k, epoch))


def test_a_loader_reads_only_a_few_batches_ahead(numbered):
    patches = Patches([numbered()], (8, 8, 8), 0)
    keys = []
    batch = patches.batch
    patches.batch = lambda *args: keys.append(args) or batch(*args)
    batches = iter(Loader(patches, Schedule(100, 2), workers=2))
    next(batches)
    time.sleep(0.2)
    assert len(keys) == 5  # two for each thread, and one for the batch that was taken
    batches.close()
    assert len(keys) == 5


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_a_batch(world):
    ranks = [Schedule(3, 4, rank, world) for rank in range(world)]
    for rank in ranks:
        assert len(list(rank)) == rank.steps
        assert rank.epoch == 0
        rank.epoch = 7
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert all(parts)
        keys = sorted(sum(parts, []))
        assert keys == [(7, 4 * step + i) for i in range(4)]


# ------------------------------------------------------------------ what the network is given


def test_one_modality_fills_both_places():
    images = torch.arange(8.0).view(2, 2, 2, 1, 1)
    assert select_modality(images, "both") is images
    for channel, modality in enumerate(("ct", "pet")):
        for selected in select_modality(images, modality).unbind(1):
            assert torch.equal(selected, images[:, channel])


def test_noise_has_one_strength_for_a_batch_that_is_drawn_evenly():
    torch.manual_seed(0)
    ct = torch.rand(2, 1, 16, 16, 16)
    kept = ct.clone()
    noise = torch.stack([add_noise(ct) - ct for _ in range(400)])  # (400, 2, 1, 16, 16, 16)
    assert torch.equal(ct, kept)
    assert torch.equal(add_noise(ct, 0.0), ct)
    assert noise[0].unique().numel() > 0.9 * noise[0].numel()

    first, strengths = noise.flatten(2).std(2).unbind(1)
    ratio = first / strengths
    assert ratio.min() > 0.9
    assert ratio.max() < 1.1
    share = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert torch.allclose(strengths.quantile(share), 0.3 * share, atol=0.03)  # uniform

    whitened = noise[:, 1].flatten(1) / strengths[:, None]
    within = (whitened.abs() < 1).float()
    assert whitened.mean() == pytest.approx(0, abs=0.01)
    assert within.mean() == pytest.approx(0.6827, abs=0.01)  # a normal distribution


def test_shuffling_permutes_cubes_of_a_sample_each_anywhere():
    torch.manual_seed(0)
    ct = torch.arange(3.0 * 9 * 6 * 5).view(3, 1, 9, 6, 5)
    kept = ct.clone()
    starts = []
    for _ in range(300):
        out = shuffle_voxels(ct, edge=4)
        low, high = (out != ct).nonzero()[:, 2:].aminmax(dim=0)
        x, y, z = map(slice, low, high + 1)
        before = ct[..., x, y, z].flatten(1)
        after = out[..., x, y, z].flatten(1)
        assert before.shape == (3, 4**3)
        assert (before != after).float().mean() > 0.9
        assert torch.equal(after.sort(1).values, before)
        assert len(after.argsort(1).unique(dim=0)) == 3
        starts.append(low)
    assert torch.equal(ct, kept)
    starts = torch.stack(starts)
    assert starts.amin(0).tolist() == [0, 0, 0]
    assert starts.amax(0).tolist() == [5, 2, 1]
    assert len(starts.unique(dim=0)) == 6 * 3 * 2  # every possible start


def test_as_many_cubes_are_shuffled_as_asked():
    torch.manual_seed(0)
    ct = torch.arange(64.0**3).view(1, 1, 64, 64, 64)
    for count, least in ((0, 0), (1, 500), (20, 15 * 512)):
        changed = (shuffle_voxels(ct, 8, count) != ct).sum()
        assert least <= changed <= count * 512
    assert 4000 < (shuffle_voxels(ct) != ct).sum() <= 16**3  # the default: one cube of 16
    with pytest.raises(ValueError, match="--shuffle-edge 65"):
        shuffle_voxels(ct, 65)
