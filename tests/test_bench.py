"""bench.py on tiny inputs, and the equalities behind what it measures.

The inputs are those of the peers' side: the sums below were computed by its own generator.
"""

import gzip
import json
import time

import numpy as np
import pytest
import torch

import bench
import data
import eval as evaluation
import train
from data import Case, Loader, Patches, Schedule

FIELDS = {
    "task", "settings", "seconds", "median", "best", "cpu_seconds", "peak_rss_mb",
    "peak_rss_tree_mb", "peak_gpu_mb", "values", "parts", "env",
}  # fmt: skip
SHAPE, MILLIMETRES = (30, 24, 20), (8.0, 8.0, 12.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Three simulated studies of a few thousand voxels."""
    return bench.write_studies(tmp_path_factory.mktemp("bench") / "s", 3, SHAPE, MILLIMETRES, 3)


def run(line, capsys, *more):
    """What one command prints: one JSON line."""
    bench.main([*line.split(), *map(str, more)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


# ------------------------------------------------------------------ the command


ROWS = {
    "step --patch 16 --warmup 0 --repeat 2": "patches_per_s",
    "loss --patch 16 --batch-size 2 --warmup 0 --repeat 2": "patches_per_s",
    "infer --patch 16 --shape 20 16 30 --warmup 0 --repeat 2": "voxels_per_s",
    "infer --patch 16 --shape 20 16 30 --heads all --warmup 0 --repeat 2": "voxels_per_s",
    "metrics --shape 40 40 30 --millimetres 8 8 12 --lesions 6 --repeat 2": "voxels_per_s",
    "scale --studies 4 --workers 1 --repeat 2": "studies_per_s",
}


@pytest.mark.parametrize("line", ROWS)
def test_a_row_prints_the_fields_of_the_peers(line, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    row = run(line, capsys, "--device", "cpu", "--threads", 1, "--out", out)
    assert row.keys() >= FIELDS | {ROWS[line]} and row["task"] == line.split()[0]
    assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
    assert min(row["seconds"]) == row["best"] <= row["median"] <= max(row["seconds"])
    assert 50 < row["peak_rss_mb"] < 20_000 and row[ROWS[line]] > 0
    assert json.loads(out.read_text()) == row


def test_rows_that_read_studies(studies, capsys, tmp_path):
    read = ("--data", studies, "--spacing", 6, "--device", "cpu", "--threads", 1)
    row = run("preprocess --repeat 1 --limit 2 --scratch", capsys, tmp_path, *read)
    whole = data.grid_positions(SHAPE, MILLIMETRES, (6, 6, 6))
    assert row["values"]["voxels_per_study"] == np.prod([len(p) for p in whole])
    assert 0 < row["values"]["voxels_kept"] < row["values"]["voxels_per_study"]
    assert {"load", "resample", "save"} <= row["parts"].keys() and not list(tmp_path.iterdir())
    for workers in (0, 2):
        cached = ("--cache", tmp_path, "--workers", workers, "--steps", 3, "--batch-size", 2)
        row = run("data --patch 16 --warmup 0 --repeat 2", capsys, *read, *cached)
        assert row["values"]["patches_per_epoch"] == 6 and row["studies"] == 3
        assert row["patches_per_s"] == pytest.approx(6 / row["median"])


@pytest.mark.slow
def test_training_beside_the_step_alone(studies, capsys, tmp_path):
    options = (
        "train --patch 16 --batch-size 2 --steps 2 --epochs 2 --workers 1 --threads 1 --spacing 12"
    )
    read = ("--device", "cpu", "--data", studies, "--cache", tmp_path, "--scratch", tmp_path)
    row = run(options, capsys, *read, "--out", tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row
    assert row["patches_per_s"] == pytest.approx(4 / row["median"]) and len(row["seconds"]) == 2
    assert row["values"]["share_of_step"] > 0
    assert set(row["parts"]) == {"checkpoints", "tensorboard", "curves", "console"}
    assert row["parts"]["checkpoints"] > 0
    assert row["values"]["overhead_share"] == pytest.approx(
        sum(row["parts"].values()) / np.mean(row["seconds"])
    )


@pytest.mark.slow
def test_gpu_rows_go_on_after_one_that_fails(monkeypatch, tmp_path, capfd):
    good = "loss --device cpu --patch 16 --batch-size 1 --repeat 1"
    monkeypatch.setattr(bench, "GPU", ("loss --device cpu --patch 7", good))
    out = tmp_path / "rows.jsonl"
    bench.main(["gpu", "--out", str(out)])
    assert [json.loads(line)["settings"]["patch"] for line in out.read_text().splitlines()] == [
        [16]
    ]
    assert "--patch 7" in capfd.readouterr().err


def test_studies_command_writes_a_cohort(tmp_path, capsys):
    bench.main(["studies", "--data", str(tmp_path), "--count", "2", "--shape", "12", "10", "8"])
    assert len(data.find_studies(tmp_path).studies) == 2 and not capsys.readouterr().out


# ------------------------------------------------------------------ inputs of both sides


def test_inputs_are_those_of_the_peers():
    ct, suv, seg = bench.body(SHAPE, MILLIMETRES, 3, [0, 0]).values()
    assert ct.sum(dtype=float) == pytest.approx(-9186947.905004501)
    assert suv.sum(dtype=float) == pytest.approx(6093.8262595338465) and seg.sum() == 111
    mask, pred = bench.label_pair((40, 40, 30), (8.0, 8.0, 12.0), 6)
    assert (mask.sum(), pred.sum(), (mask & pred).sum()) == (125, 117, 44)
    item = bench.batch_of_patches(3, (32, 32, 32))
    assert item["mask"].sum((1, 2, 3)).tolist() == [470, 467, 0]
    assert item["tumor"].tolist() == [1, 1, 0] and item["image"].dtype == torch.float16
    assert float(item["image"].double().sum()) == pytest.approx(98383.42418193817, rel=1e-6)


# ------------------------------------------------------------------ crops


@pytest.fixture(scope="module")
def cached(studies, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    config = train.Config(data=str(studies), cache=cache, workers=1, spacing=(6.0,))
    return train.open_data(config, lambda text: None)[1]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("patch", [(8, 6, 10), (16, 48, 12)])
def test_batches_are_slices_of_the_cached_studies(cached, workers, patch):
    crops = Patches(cached, patch, seed=3)
    loader = Loader(crops, Schedule(7, 3), workers)
    for epoch in (0, 4):
        loader.batch_sampler.epoch = epoch
        batches = list(loader)
        assert len(batches) == len(loader) == 7
        for k in range(21):
            case = cached[int(data.visiting_order(3, epoch, k // 3, 3)[k % 3])]
            rng = np.random.default_rng((3, epoch, k, 1))
            crop = data.draw_crop(case, patch, 2 / 3, rng)
            images, label = (np.load(case.folder / f"{name}.npy") for name in ("images", "label"))
            wanted = [np.arange(s.start, s.stop) for s in crop]
            there = [(i >= 0) & (i < n) for i, n in zip(wanted, label.shape, strict=True)]
            read = np.ix_(*(i[ok] for i, ok in zip(wanted, there, strict=True)))
            place = np.ix_(*there)
            image, mask = np.zeros((2, *patch), np.float16), np.zeros(patch, np.uint8)
            image[(slice(None), *place)], mask[place] = images[(slice(None), *read)], label[read]
            batch = {name: tensor[k % 3] for name, tensor in batches[k // 3].items()}
            assert np.array_equal(batch["image"], image) and batch["image"].dtype == torch.float16
            assert np.array_equal(batch["mask"], mask) and batch["mask"].dtype == torch.uint8
            assert float(batch["tumor"]) == mask.any()


def test_a_loader_reads_only_a_few_batches_ahead(cached):
    asked = []

    class Slow(Patches):
        def batch(self, keys, pinned):
            asked.append(keys)
            return super().batch(keys, pinned)

    batches = iter(Loader(Slow(cached, (8, 8, 8), seed=0), Schedule(100, 2), workers=2))
    next(batches)
    time.sleep(0.3)
    assert len(asked) == 5  # two for each thread, and one for the batch that was taken
    batches.close()
    assert len(asked) == 5


def test_what_fails_while_reading_reaches_the_caller(cached, tmp_path):
    gone = Case(cached[0].meta, tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        next(iter(Loader(Patches([gone], (8, 8, 8), seed=0), Schedule(2, 1), workers=2)))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)),
        np.arange(5, dtype=np.uint32),
        np.zeros(0, np.uint32),
    ],
)
def test_arrays_are_mapped_as_numpy_reads_them(tmp_path, array):
    np.save(tmp_path / "images.npy", array)
    mapped = Case({}, tmp_path).load("images")
    assert mapped.dtype == array.dtype and np.array_equal(mapped, array)
    assert mapped.flags.f_contiguous == array.flags.f_contiguous and not mapped.flags.writeable


# ------------------------------------------------------------------ files, masks


def test_gunzip_of_several_streams():
    a, b = b"ab" * 3000, b"cd" * 3000
    one, two = gzip.compress(a), gzip.compress(b)
    assert data.gunzip(one) == a
    assert data.gunzip(one + gzip.compress(b + b)) == a + b + b
    assert data.gunzip(one + bytes(8)) == a
    assert data.gunzip(gzip.compress(b"")) == b""
    for damaged in (one[:-9], one[:-8] + b"1234" + one[-4:], two[:20] + b"\xff" * 9 + two[29:]):
        with pytest.raises((EOFError, OSError, data.zlib.error)):
            data.gunzip(damaged)


def test_the_mask_alone_equals_the_mask_of_all_heads():
    config = train.resolve(train.Config(version="v3", patch=(16,), overlap=0.5), "petct", False)
    model, device = train.build_model(config), torch.device("cpu")
    image = np.random.default_rng(0).random((2, 24, 16, 20), np.float32)
    alone, _ = evaluation.infer(model, image, config, device)
    every, tumor = evaluation.infer(model, image, config, device, model.heads)
    np.testing.assert_allclose(alone, every, atol=1e-5)
    assert np.array_equal(alone > 0, every > 0) and 0 < tumor < 1
