"""bench.py on tiny inputs: what its rows print, and that they do the work that they always did."""

import gc
import json
import subprocess
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import petct_arrays, write_study

import bench

FIELDS = {"schema", "side", "impl", "task", "settings", "median", "best", "peak_rss_mb", "env"}
INFER = {"mean_margin": 0.0229342561215, "foreground_voxels": 4958}
ROWS = {  # as the first bench.py printed them; the inputs are shared with other codebases
    "step --patch 16 --warmup 0": {
        "first_loss": 1.2452871799,
        "last_loss": 1.1198699474,
        "n_params": 8084338,
    },
    "infer --patch 16 --shape 20 16 30": INFER,
    "infer --patch 16 --shape 20 16 30 --heads all": INFER,
    "metrics --shape 40 40 30 --millimetres 8 8 12 --lesions 6": {
        "dice": 4 / 11,
        "fpv_ml": 2.304,
        "fnv_ml": 0,
        "mtv_pred_ml": 89.856,
        "mtv_true_ml": 96,
    },
}


def run(line, capsys, *words):
    """What one command prints: one JSON line."""
    bench.bench_command([*line.split(), *map(str, words), "--device", "cpu", "--threads", "1"])
    [text] = capsys.readouterr().out.splitlines()
    return json.loads(text)


@pytest.mark.parametrize("line", ROWS)
def test_a_row_prints_what_it_always_did(line, capsys, tmp_path):
    row = run(line, capsys, "--repeat", 2, "--out", tmp_path / "rows.jsonl")
    assert row.keys() > FIELDS
    assert row == json.loads((tmp_path / "rows.jsonl").read_text())
    assert ROWS[line] == pytest.approx({name: row["values"][name] for name in ROWS[line]}, rel=4e-4)
    assert len(row["seconds"]) == len(row["cpu_seconds"]) == 2
    assert min(row["seconds"]) == row["best"] <= row["median"] <= max(row["seconds"])
    rate = row.get("patches_per_s") or row["voxels_per_s"]
    assert rate * row["median"] == pytest.approx(np.prod(row["settings"].get("shape", 2)))


def test_memory_is_the_peak_since_the_timing_began():
    cpu = torch.device("cpu")
    gc.collect()
    timing, last = bench.measure(lambda: int(np.ones(2**28, np.uint8)[-1]), cpu, 0, 1)  # 256 MB
    assert last == 1
    idle, _ = bench.measure(gc.collect, cpu, 0, 1)
    assert timing["peak_rss_mb"] - idle["peak_rss_mb"] > 240


def test_rows_that_read_studies(capsys, tmp_path):
    for i in range(3):
        write_study(tmp_path / "data" / f"PETCT_{i:010x}" / "a", petct_arrays(i))
    shared = ("--data", tmp_path / "data", "--spacing", 8)

    row = run("preprocess --repeat 2 --limit 2", capsys, *shared)
    voxels = 12 * 10 * 12  # 24 x 20 x 18 of 4 x 4 x 5 mm, at 8 mm
    assert row["values"]["voxels_per_study"] == voxels
    assert 0.4 < row["values"]["voxels_kept"] / voxels <= 1  # air lies beside the body
    assert row["voxels_per_s"] * row["median"] == pytest.approx(2 * voxels)

    for workers in (0, 2):
        cached = ("--cache", tmp_path, "--workers", workers, "--steps", 3, "--batch-size", 2)
        row = run("data --patch 16 --warmup 0 --repeat 2", capsys, *shared, *cached)
        assert row["values"]["patches_per_epoch"] == 6
        assert 0.5 < row["values"]["foreground_fraction"] <= 1
        assert row["patches_per_s"] * row["median"] == pytest.approx(6)
        assert row["studies"] == 3


def test_a_step_of_v5(capsys):
    line = "step --version v5 --patch 16 --batch-size 2 --warmup 0 --repeat 1 --widths 4 8 8 16 16"
    assert run(line, capsys)["median"] > 0


@pytest.mark.slow
def test_gpu_rows_go_on_after_one_that_fails_without_nibabel(monkeypatch, tmp_path, capfd):
    for module in ("nibabel", "tensorboardX", "ray"):
        (tmp_path / f"{module}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = ("stuck", "metrics --device cpu --shape 9 9 9 --lesions 1")
    monkeypatch.setattr(bench, "GPU", rows)
    outcomes = [subprocess.TimeoutExpired("stuck", 180), mock.DEFAULT]  # the second really runs
    start = mock.Mock(wraps=subprocess.run, side_effect=outcomes)
    monkeypatch.setattr(subprocess, "run", start)
    bench.bench_command(["gpu", "--out", str(tmp_path / "rows.jsonl")])
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["env"]["nibabel"] == "absent"
    printed = capfd.readouterr()
    assert "stuck: " in printed.err
    assert not printed.out
