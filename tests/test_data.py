"""data.py: crops of numbered voxels, Φ by statistics."""

import hashlib
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache import Case
from data import Loader, Patches, Schedule, add_noise, lend_ct, shuffle_voxels
from files import UserError
from losses import UNKNOWN

KEYS = [(1, i) for i in range(24)]


@pytest.fixture
def stored(tmp_path):
    """stored(shape, lesions) makes a cached case whose voxels are numbered from 1 upwards."""

    def make(shape, lesions=(), name="a"):
        label = np.zeros(shape, np.uint8)
        label[tuple(np.transpose(lesions))] = len(lesions) > 0
        place = np.arange(1, label.size + 1).reshape(shape)  # float16 holds 2048 at most
        (tmp_path / name).mkdir()
        arrays = {"images": np.stack(np.divmod(place, 2048)).astype("f2"), "label": label}
        arrays["lesion"] = np.flatnonzero(label).astype(np.uint32)
        for array, values in arrays.items():
            np.save(tmp_path / name / f"{array}.npy", values)
        meta = {"name": name, "patient": name, "shape": shape, "lesion_voxels": len(lesions)}
        meta["arrays"] = {n: (a.dtype.str, a.shape) for n, a in arrays.items()}
        return Case(meta, tmp_path / name)

    return make


def places(item):
    """The numbers of the voxels of a crop; 0 beyond the volume."""
    return (item["image"][0].double() * 2048 + item["image"][1]).long().numpy()


def test_lesions_are_at_the_centre_of_two_thirds(stored):
    shape, voxels = (40, 36, 30), [(20, 18, 16), (14, 15, 13)]
    case = stored(shape, voxels)
    for p, count in ((2 / 3, 1200), (0.0, 200), (1.0, 200)):
        crops = Patches([case], (8, 6, 5), seed=0, lesion_p=p)
        drawn = [crops[0, i] for i in range(count)]
        middles = Counter(places(item)[4, 3, 2] for item in drawn if item["mask"][4, 3, 2])
        assert abs(middles.total() / count - p) < (0.045 if 0 < p < 1 else 0.01)
        if p:  # either is drawn as often
            assert set(middles) == {1 + np.ravel_multi_index(v, shape) for v in voxels}
            assert abs(middles.most_common()[0][1] / middles.total() - 0.5) < 0.1


def test_other_crops_lie_anywhere(stored):
    crops = Patches([stored((30, 4, 4))], (4, 4, 4), seed=0, lesion_p=1.0)
    starts = Counter(int((places(crops[0, i])[0, 0, 0] - 1) // 16) for i in range(1200))
    assert set(starts) == set(range(27))  # every place, and the borders collect what is moved in
    inner = [starts[i] for i in range(1, 26)]
    assert min(inner) > 15 and max(inner) < 75  # 40 expected


def test_crops_stay_inside_and_small_volumes_are_padded_with_zeros(stored):
    item = Patches([stored((20, 16, 12), [(19, 0, 11)])], (8, 8, 8), 0, lesion_p=1.0)[0, 0]
    expected = np.arange(1, 20 * 16 * 12 + 1).reshape(20, 16, 12)[12:20, 0:8, 4:12]
    assert np.array_equal(places(item), expected) and item["image"].dtype == torch.float16
    assert np.argwhere(item["mask"].numpy()).tolist() == [[7, 0, 7]]
    item = Patches([stored((3, 6, 4), [(1, 5, 2)], "b")], (6, 4, 5), 3, lesion_p=1.0)[0, 0]
    expected = np.zeros((6, 4, 5))
    expected[1:4, :, :4] = np.arange(1, 73).reshape(3, 6, 4)[:, 2:6]
    assert np.array_equal(places(item), expected)
    assert np.argwhere(item["mask"].numpy()).tolist() == [[2, 3, 2]]


@pytest.fixture
def of_patients(tmp_path):
    """Studies a1, a2, b1 .. of four patients, of two sizes, whose CT is constant: 1, 2, 3 ..; PET
    numbers the first axis."""

    def make(letters="abcd"):
        cases = []
        for k, name in enumerate([f"{p}{i}" for p in letters for i in (1, 2)], start=1):
            shape = (20, 12, 8) if k % 3 else (40, 8, 10)
            place = np.broadcast_to(np.arange(1.0, shape[0] + 1)[:, None, None], shape)
            (tmp_path / name).mkdir()
            arrays = {
                "images": np.stack([0 * place + k, place]).astype("f2"),
                "label": (place == 5).astype(np.uint8),
                "lesion": np.flatnonzero(place == 5).astype(np.uint32),
            }
            for array, values in arrays.items():
                np.save(tmp_path / name / f"{array}.npy", values)
            meta = {"name": name, "patient": name[0], "shape": shape, "lesion_voxels": 1}
            meta["arrays"] = {n: (a.dtype.str, a.shape) for n, a in arrays.items()}
            cases.append(Case(meta, tmp_path / name))
        return cases

    return make


def test_another_patients_ct_stands_in_the_crop(of_patients):
    cases = of_patients()
    own, other = (Patches(cases, (8, 8, 8), 3, ct=ct) for ct in ("own", "other"))
    seen, back = set(), {i: other[1, i] for i in reversed(range(200))}
    for i in range(200):
        a, b = own[1, i], Patches(cases, (8, 8, 8), 3, ct="other")[1, i]
        assert same(b, back[i])  # whatever was drawn before
        for name in ("mask", "tumor"):
            assert torch.equal(a[name], b[name])
        assert torch.equal(a["image"][1], b["image"][1])
        [mine], [lent] = a["image"][0].unique().tolist(), b["image"][0].unique().tolist()
        assert (mine - 1) // 2 != (lent - 1) // 2  # two studies a patient
        seen.add((mine, lent))
    assert len(seen) > 40  # of 48
    batches = [[*Loader(other, Schedule(6, 4, r, 2), w)] for r, w in ((0, 0), (1, 3))]
    for step, pair in enumerate(zip(*batches, strict=True)):
        for r, batch in enumerate(pair):
            for k in range(2):
                item = {name: tensor[k] for name, tensor in batch.items()}
                assert same(item, other[0, 4 * step + 2 * k + r])


def test_the_other_crop_lies_at_the_same_fraction_of_the_volume(stored):
    """CT is the number of the plane there, so a body twice as long has twice the number."""
    one, two = (stored(s, [v], n) for s, v, n in (
        ((40, 8, 8), (30, 4, 4), "a"), ((80, 8, 8), (24, 4, 4), "b")))  # fmt: skip
    for case in (one, two):
        planes = np.arange(case.meta["shape"][0], dtype="f2")[None, :, None, None]
        images = np.load(case.folder / "images.npy")
        np.save(case.folder / "images.npy", np.broadcast_to(planes, images.shape).astype("f2"))
    crops = Patches([one, two], (8, 8, 8), 0, lesion_p=1.0, ct="other")
    middles = {tuple(crops[0, i]["image"][:, 4, 4, 4].int().tolist()) for i in range(2)}
    assert middles == {(60, 30), (12, 24)}


def test_crops_with_the_own_ct_are_as_ever(of_patients):
    digest = hashlib.sha256()
    for item in map(Patches(of_patients(), (8, 10, 8), 7).__getitem__, KEYS):
        for tensor in item.values():
            digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == "7ec1952524b245b1"  # of commit c25df52


def test_studies_borrow_the_ct_of_the_next_patient(of_patients):
    cases = of_patients("abc")
    assert lend_ct(cases, "own") is cases
    for case, lent in zip(cases, lend_ct(cases[::-1], "other")[::-1], strict=True):
        own, found = case.load("images"), lent.load("images")
        assert lent.name == case.name and np.array_equal(lent.load("label"), case.load("label"))
        assert found.shape == own.shape and np.array_equal(found[1], own[1])
        constant = {"a": 3, "b": 5, "c": 1}[case.patient]  # of the next patient's first study
        theirs = (20, 12, 8) if constant % 3 else (40, 8, 10)
        overlap = [min(n, m) for n, m in zip(own.shape[1:], theirs, strict=True)]
        where = np.argwhere(found[0])  # middle upon middle, zeros around
        assert set(np.unique(found[0])) - {0} == {constant} and len(where) == np.prod(overlap)
        assert (
            where.min(0) == [(n - o) // 2 for n, o in zip(own.shape[1:], overlap, strict=True)]
        ).all()
    with pytest.raises(UserError, match="--ct other: a1 has no other patient in its part"):
        lend_ct(cases[:2], "other")


def test_labels_of_a_crop(stored):
    case, healthy = stored((30, 30, 30), [(2, 2, 2)]), stored((9, 9, 9), name="b")
    for class_label in ("crop", "volume"):
        crops = Patches([case], (4, 4, 4), 0, class_label=class_label)
        drawn = {(bool(crops[key]["mask"].any()), float(crops[key]["tumor"])) for key in KEYS}
        assert drawn == {(True, 1.0), (False, float(class_label == "volume"))}
        assert Patches([healthy], (4, 4, 4), 0, class_label=class_label)[0, 0]["tumor"] == 0.0
    healthy.meta["lesion_voxels"] = 1  # lost in resampling
    assert not Patches([healthy], (4, 4, 4), 0, lesion_p=1.0)[0, 0]["mask"].any()
    np.save(case.folder / "organs.npy", 7 * np.load(case.folder / "label.npy"))
    mapped = Case({"arrays": {"organs": case.meta["arrays"]["label"]}}, case.folder)
    with_map = replace(case, organs=mapped)
    item = Patches([with_map], (4, 4, 4), 0, lesion_p=1.0, organs=True)[0, 0]
    assert list(item) == ["image", "mask", "organs", "tumor"]
    assert torch.equal(item["organs"], 7 * item["mask"]) and item["mask"].sum() == 1
    assert list(Patches([with_map], (4, 4, 4), 0)[0, 0]) == ["image", "mask", "tumor"]
    beyond = Patches([with_map], (40, 4, 4), 0, organs=True)[0, 0]  # no organ is there
    assert beyond["organs"][0].max() == 0
    unknown = Patches([case], (40, 4, 4), 0, organs=True)[0, 0]
    assert (unknown["organs"] == UNKNOWN).all()  # also there


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_crops_depend_on_seed_epoch_and_index_only(stored):
    voxels = [(i, j, 9) for i in range(20) for j in range(20)]
    cases = [stored((20, 20, 20), voxels, name) for name in "abc"]
    once, again, other = (Patches(cases, (5, 5, 5), seed, lesion_p=0.3) for seed in (4, 4, 5))
    forth = [once[key] for key in KEYS]
    torch.manual_seed(1)
    np.random.seed(1)
    back = [again[key] for key in reversed(KEYS)]
    assert all(map(same, forth, reversed(back)))
    assert sum(map(same, forth, [other[key] for key in KEYS])) < 3
    assert sum(map(same, forth, [once[2, i] for _, i in KEYS])) < 3
    assert sum(same(forth[0], item) for item in forth[1:]) < 3


def test_each_study_once_per_round(stored):
    crops = Patches([stored((2, 2, k + 2), name=f"{k}") for k in range(5)], (2, 2, 6), seed=0)
    seen = np.reshape([np.count_nonzero(places(crops[0, i])) for i in range(50)], (10, 5))
    assert (np.sort(seen) == [8, 12, 16, 20, 24]).all() and len({*map(tuple, seen)}) > 5


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_items_in_turn(stored, workers):
    crops = Patches([stored((12, 10, 11), [(5, 5, 5)], n) for n in "abc"], (4, 14, 4), seed=0)
    loader = Loader(crops, Schedule(steps=7, batch_size=3), workers)
    for loader.batch_sampler.epoch in (0, 5):
        batches = list(loader)
        assert len(batches) == len(loader) == 7
        for k in range(21):
            item = {name: tensor[k % 3] for name, tensor in batches[k // 3].items()}
            assert same(item, crops[loader.batch_sampler.epoch, k])


def test_a_loader_reads_only_a_few_batches_ahead(stored, monkeypatch):
    asked, batch = [], Patches.batch
    monkeypatch.setattr(Patches, "batch", lambda *a, **kw: asked.append(a) or batch(*a, **kw))
    batches = iter(Loader(Patches([stored((9, 9, 9))], (8, 8, 8), 0), Schedule(100, 2), workers=2))
    next(batches)
    time.sleep(0.2)
    assert len(asked) == 5  # two for each thread, and one for the batch that was taken
    batches.close()
    assert len(asked) == 5


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_a_batch(world):
    ranks = [Schedule(3, 4, rank, world) for rank in range(world)]
    for rank in ranks:
        assert len(rank) == len(list(rank)) == 3 and rank.epoch == 0
        rank.epoch = 7
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert all(parts) and sorted(sum(parts, [])) == [(7, 4 * step + i) for i in range(4)]


def test_noise_has_one_strength_for_a_batch_that_is_drawn_evenly():
    torch.manual_seed(0)
    ct = torch.rand(2, 1, 16, 16, 16)
    kept = ct.clone()
    noise = torch.stack([add_noise(ct) - ct for _ in range(400)])  # (400, 2, 1, 16, 16, 16)
    assert torch.equal(ct, kept) and torch.equal(add_noise(ct, 0.0), ct)
    first, strengths = noise.flatten(2).std(2).unbind(1)
    assert (first / strengths - 1).abs().max() < 0.1
    share = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert (strengths.quantile(share) - 0.3 * share).abs().max() < 0.03  # uniform
    whitened = (noise[:, 1].flatten(1) / strengths[:, None]).flatten()
    assert abs(whitened.mean()) < 0.01 and noise[0].unique().numel() > 0.9 * noise[0].numel()
    assert abs((whitened.abs() < 1).float().mean() - 0.6827) < 0.01  # a normal distribution


def test_shuffling_permutes_cubes_of_a_sample_each_anywhere():
    torch.manual_seed(0)
    ct = torch.arange(3.0 * 9 * 6 * 5).view(3, 1, 9, 6, 5)
    kept, starts = ct.clone(), []
    for _ in range(300):
        out = shuffle_voxels(ct, edge=4)
        low, high = (ends[2:].tolist() for ends in (out != ct).nonzero().aminmax(dim=0))
        box = (..., *(slice(a, b + 1) for a, b in zip(low, high, strict=True)))
        before, after = ct[box].flatten(1), out[box].flatten(1)
        assert before.shape == (3, 4**3) and (before != after).float().mean() > 0.9
        assert torch.equal(after.sort(1).values, before)
        orders = after.argsort(1)
        assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
        starts.append(low)
    assert torch.equal(ct, kept)
    for axis, last in zip(zip(*starts, strict=True), (5, 2, 1), strict=True):
        assert set(axis) == set(range(last + 1))  # every possible start


def test_as_many_cubes_are_shuffled_as_asked():
    torch.manual_seed(0)
    ct = torch.arange(64.0**3).view(1, 1, 64, 64, 64)
    share = [(shuffle_voxels(ct, 8, n) != ct).sum().item() for n in (0, 1, 20)]
    assert share[0] == 0 and 500 < share[1] <= 512 and 15 * 512 < share[2] <= 20 * 512
    assert 4000 < (shuffle_voxels(ct) != ct).sum() <= 16**3  # the default: one cube of 16
    with pytest.raises(ValueError, match="--shuffle-edge 65"):
        shuffle_voxels(ct, 65)
