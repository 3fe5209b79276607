"""bench.py on tiny inputs: what its rows print, and that they do the work that they always did."""

import gc
import json
import subprocess
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch

import bench
import train

FIELDS = {"schema", "side", "impl", "task", "settings", "median", "best", "peak_rss_mb", "env"}
INFER = {"mean_margin": 0.0229342561215, "foreground_voxels": 4958}
ROWS = {  # what the first bench.py found, whose inputs the peers' side shares
    "step --patch 16 --warmup 0": {
        "first_loss": 1.2452871799, "last_loss": 1.1198699474, "n_params": 8084338},
    "infer --patch 16 --shape 20 16 30": INFER,
    "infer --patch 16 --shape 20 16 30 --heads all": INFER,
    "metrics --shape 40 40 30 --millimetres 8 8 12 --lesions 6": {
        "dice": 4 / 11, "fpv_ml": 2.304, "fnv_ml": 0, "mtv_pred_ml": 89.856, "mtv_true_ml": 96},
}  # fmt: skip


def run(line, capsys, *more):
    """What one command prints: one JSON line."""
    bench.main([*line.split(), *map(str, more), "--device", "cpu", "--threads", "1"])
    [text] = capsys.readouterr().out.splitlines()
    return json.loads(text)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    bench.main(f"studies --data {root} --count 3 --shape 40 30 54 --millimetres 10 10 12".split())
    return root


@pytest.mark.parametrize("line", ROWS)
def test_a_row_prints_what_it_always_did(line, capsys, tmp_path):
    row = run(line, capsys, "--repeat", 2, "--out", tmp_path / "rows.jsonl")
    assert row.keys() > FIELDS and row == json.loads((tmp_path / "rows.jsonl").read_text())
    values = {name: row["values"][name] for name in ROWS[line]}
    assert values == pytest.approx(ROWS[line], rel=4e-4)
    assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
    assert min(row["seconds"]) == row["best"] <= row["median"] <= max(row["seconds"])
    rate = row.get("patches_per_s") or row["voxels_per_s"]
    assert rate * row["median"] == pytest.approx(np.prod(row["settings"].get("shape", 2)))


def test_memory_is_the_peak_since_the_timing_began():
    cpu = torch.device("cpu")
    gc.collect()
    found, last = bench.measure(lambda: int(np.ones(2**28, np.uint8)[-1]), cpu, 0, 1)  # 256 MB
    assert last == 1
    idle, _ = bench.measure(gc.collect, cpu, 0, 1)
    assert found["peak_rss_mb"] - idle["peak_rss_mb"] > 240


def test_rows_that_read_studies(studies, capsys, tmp_path):
    for name, kind in {"CTres": np.int16, "SUV": np.float32, "SEG": np.uint8}.items():
        image = nib.load(studies / "PETCT_0000000002" / "study" / f"{name}.nii.gz")
        assert image.shape == (40, 30, 54) and image.header.get_zooms() == (10, 10, 12)
        assert image.get_data_dtype() == kind
    read = ("--data", studies, "--spacing", 12, "--scratch", tmp_path)
    row = run("preprocess --repeat 2 --limit 2", capsys, *read)
    voxels = 34 * 25 * 54  # at 12 mm
    assert row["values"]["voxels_per_study"] == voxels
    assert 0.1 < row["values"]["voxels_kept"] / voxels < 0.5  # air lies beside the body
    assert row["voxels_per_s"] * row["median"] == pytest.approx(2 * voxels)
    assert not list(tmp_path.iterdir())
    for workers in (0, 2):
        cached = ("--cache", tmp_path, "--workers", workers, "--steps", 3, "--batch-size", 2)
        row = run("data --patch 16 --warmup 0 --repeat 2", capsys, *read, *cached)
        assert row["values"] == {"patches_per_epoch": 6, "foreground_fraction": 1}
        assert row["patches_per_s"] * row["median"] == pytest.approx(6) and row["studies"] == 3


def test_a_step_of_v5(capsys):
    line = "step --version v5 --patch 16 --batch-size 2 --warmup 0 --repeat 1 --widths 4 8 8 16 16"
    assert run(line, capsys)["median"] > 0


def test_training_beside_the_step_alone(studies, capsys, tmp_path, monkeypatch):
    for figure in ("curves", "examples"):
        monkeypatch.setattr(train.plots, figure, lambda *args: None)
    line = "train --patch 16 --steps 2 --epochs 3 --workers 0 --spacing 12 --widths 4 8 8 16 16"
    row = run(line, capsys, "--data", studies, "--scratch", tmp_path, "--cache", tmp_path / "cache")
    assert row["patches_per_s"] == pytest.approx(4 / row["median"]) and len(row["seconds"]) == 3
    assert row["values"]["share_of_step"] > 0 and len(row["values"]["data_wait"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.slow
def test_gpu_rows_go_on_after_one_that_fails_without_nibabel(monkeypatch, tmp_path, capfd):
    (tmp_path / "nibabel.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench, "GPU", ("stuck", "metrics --device cpu --shape 9 9 9 --lesions 1"))
    outcomes = [subprocess.TimeoutExpired("stuck", 180), mock.DEFAULT]  # the second really runs
    start = mock.Mock(wraps=subprocess.run, side_effect=outcomes)
    monkeypatch.setattr(subprocess, "run", start)
    bench.main(["gpu", "--out", str(tmp_path / "rows.jsonl")])
    assert json.loads((tmp_path / "rows.jsonl").read_text())["env"]["nibabel"] == "absent"
    printed = capfd.readouterr()
    assert "stuck: " in printed.err and not printed.out
