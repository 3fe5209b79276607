"""preprocess.py and cache.py against answers derived another way: by hand, by scipy, or from how
data were made."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import las, mri_arrays, petct_arrays, stored_as, write_nifti, write_study
from scipy import ndimage
from scipy.spatial.transform import Rotation

import cache
from common import UserError
from grids import resample_linear
from preprocess import (
    PREPROCESSING,
    labels_to_native,
    logits_to_native,
    preprocess,
)
from studies import Source, Study, find_studies, read_study

PETCT = PREPROCESSING["petct"]
MRI = PREPROCESSING["mri"]
NAME = "PETCT_0000000000/01-01-2000-NA-PET-CT"


def make_study(folder, arrays, affine, **fields):
    write_study(folder, arrays, affine, ".nii")
    ct, pet, label = (folder / f"{stem}.nii" for stem in arrays)
    study = Study(
        name="case",
        patient="patient",
        kind="petct",
        ct=Source(ct),
        pet=Source(pet),
        label=label,
    )
    return replace(study, **fields)


def turned_to(axes, arrays, affine):
    """The arrays as files with other axes hold them, and the affine of these."""
    turned = {}
    for stem, array in arrays.items():
        turned[stem], turned_affine = stored_as(array, affine, axes)
    return turned, turned_affine


def prepare(root, folder, say=str, **options):
    studies = find_studies(root)
    settings = PREPROCESSING[studies.kind]
    return cache.prepare(studies, settings, folder, workers=1, say=say, **options)


def message_of(*args, **options):
    with pytest.raises(UserError) as caught:
        prepare(*args, **options)
    return str(caught.value)


def sample(image, grid, order=1):
    return ndimage.map_coordinates(image.astype(float), grid, order=order, mode="nearest")


# ------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("spacing", [(4.07, 4.07, 5), (1.3, 1.1, 2), (2, 2, 3), (5, 5, 6)])
def test_resampling_is_linear_at_exact_places(tmp_path, spacing):
    arrays = petct_arrays(3)
    got, meta = preprocess(make_study(tmp_path, arrays, las(spacing)), PETCT)
    body = np.argwhere(arrays["SUV"] > 0.2)
    margin = np.ceil(10 / np.array(spacing))
    first = np.maximum(body.min(0) - margin, 0)
    last = np.minimum(body.max(0) + margin, np.array(arrays["SUV"].shape) - 1)
    step = np.array((2, 2, 3)) / spacing
    counts = np.round((last - first) / step + 1).astype(int)  # as MONAI's Spacing: halves to even
    assert meta.shape == counts.tolist()

    indices = np.moveaxis(np.indices(counts), 0, -1)
    grid = np.minimum(indices * step + first, last)
    grid = np.moveaxis(grid, -1, 0)
    ct = np.clip(sample(arrays["CTres"], grid), -100, 250)
    pet = np.clip(sample(arrays["SUV"], grid), 0, 15)
    expected = [(ct + 100) / 350, pet / 15]
    np.testing.assert_allclose(got["images"], expected, atol=1e-3)
    halves = (np.abs(grid % 1 - 0.5) < 1e-6).any(0)  # either neighbour is as near
    label = sample(arrays["SEG"], grid, order=0)
    assert np.array_equal(got["label"][~halves], label[~halves])
    assert np.array_equal(got["lesion"], np.flatnonzero(got["label"]))


def test_resample_beyond_the_border():
    image = np.random.default_rng(0).normal(size=(5, 1, 7)).astype(np.float32)
    positions = list(map(np.array, ([0, 0.25, 3.9, 4.4], [0, 0.5], [0, 0.6, 5.9, 6])))
    expected = sample(image, np.meshgrid(*positions, indexing="ij"))
    np.testing.assert_allclose(resample_linear(image, positions), expected, atol=1e-6)


def test_mri_is_resampled_then_scaled(tmp_path):
    arrays = mri_arrays(0)
    stored = {name: arrays[name] for name in ("FLAIR", "t1gd", "label")}
    affine = np.diag((-1.4, -1.0, 2.0, 1.0))  # LPS, as BraTS has it
    classes = ((0, 0), (1, 1), (2, 2), (3, 2))
    study = make_study(tmp_path, stored, affine, kind="mri", classes=classes)
    got, meta = preprocess(study, replace(MRI, margin_mm=1000.0))  # the margin is all: no crop
    assert meta.shape == [22, 14, 23]

    positions = [np.arange(22) / 1.4, np.arange(14.0), np.arange(23) / 2]
    grid = np.meshgrid(*positions, indexing="ij")
    for channel, name in enumerate(("FLAIR", "t1gd")):
        image = sample(arrays[name][::-1, ::-1], grid)
        brain = image[image != 0]
        expected = np.where(image != 0, (image - brain.mean()) / brain.std(), 0)
        np.testing.assert_allclose(got["images"][channel], expected, atol=3e-3)
    nearest = np.rint(positions[0]).astype(int)
    expected = np.minimum(arrays["label"], 2)[::-1, ::-1][nearest]
    assert np.array_equal(got["label"][:, :, ::2], expected)
    assert "native_suv4" not in got

    got, meta = preprocess(replace(study, label=None), MRI)
    assert set(got) == {"images"}
    assert meta.lesion_voxels is None


def is_class(logits):
    return (logits[0] > 0.5).astype(np.uint8)


@pytest.mark.parametrize("axes", ["LAS", "RPI", "PIR", "SLA", "ARS", "IPL"])
def test_order_of_axes_does_not_matter(tmp_path, axes):
    spacing = (4.0, 3.0, 5.0)
    arrays = petct_arrays(0)
    arrays["SEG"] = (arrays["SUV"] > 2).astype(np.uint8)  # in the body, no symmetry
    expected, meta = preprocess(make_study(tmp_path / "las", arrays, las(spacing)), PETCT)
    turned, affine = turned_to(axes, arrays, las(spacing))
    study = make_study(tmp_path / "turned", turned, affine)
    got, turned_meta = preprocess(study, PETCT)
    for name in ("images", "label", "lesion"):
        assert np.array_equal(got[name], expected[name]), name
    for slot in ("ct", "pet"):
        assert turned_meta.digests[slot] == meta.digests[slot]

    got, meta = preprocess(study, replace(PETCT, spacing=spacing))  # so that the way back is exact
    back = logits_to_native(meta, got["label"][None], is_class)
    assert back.dtype == np.uint8
    assert np.array_equal(back, turned["SEG"])
    assert np.array_equal(labels_to_native(meta, got["label"]), turned["SEG"])


@pytest.mark.parametrize(
    "spacing, axis, degrees",
    [((1.2, 3.1, 4.4), "z", 0), ((4.0, 4.0, 5.0), "z", 20), ((2.5, 3.0, 1.7), "xy", (30, -25))],
)
def test_a_lesion_stays_at_its_place(tmp_path, spacing, axis, degrees):
    arrays = petct_arrays(0)
    arrays["SEG"][:] = 0
    arrays["SEG"][5:14, 6:14, 7:15] = 1
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler(axis, degrees, degrees=True).as_matrix()
    turned, affine = turned_to("PIR", arrays, turn @ las(spacing))
    got, meta = preprocess(make_study(tmp_path, turned, affine), PETCT)
    back = logits_to_native(meta, got["label"][None].astype(np.float16), is_class)
    shift = np.argwhere(back).mean(0) - np.argwhere(turned["SEG"]).mean(0)
    assert np.linalg.norm(affine[:3, :3] @ shift) < max(spacing) / 2
    assert int(back.sum()) == pytest.approx(576, rel=0.3)


def test_outside_of_the_body_is_background(tmp_path):
    arrays = petct_arrays(0)
    arrays["SUV"][:8] = 0
    settings = replace(PETCT, margin_mm=4.5)
    _, meta = preprocess(make_study(tmp_path, arrays, las()), settings)
    back = logits_to_native(meta, np.ones((1, *meta.shape)), is_class)
    assert meta.box[0][0] == 6  # two voxels of 4 mm
    assert not back[:6].any()
    assert back[6:-2, 10, 9].all()


# ------------------------------------------------------------------ the cache


def test_cached_arrays_are_those_of_preprocess(tcia, msd, tmp_path):
    turned, affine = turned_to("PIR", petct_arrays(0), las())
    write_study(tcia(2) / NAME, turned, affine)
    for root in (tmp_path / "autopet", msd(2)):
        folder = find_studies(root)
        cases = prepare(root, tmp_path / "cache")
        for case, study in zip(cases, folder.studies, strict=True):
            arrays, meta = preprocess(study, PREPROCESSING[folder.kind])
            assert replace(case.meta, sources={}, arrays={}) == meta
            assert (case.name, case.patient) == (study.name, study.patient)
            assert case.has_lesion == bool(arrays["label"].any())
            for name, array in arrays.items():
                assert np.array_equal(case.load(name), array)
            assert not case.load("images").flags.writeable
            volumes = read_study(study)  # masks are kept on their grid
            assert np.array_equal(case.native_labels(), volumes["label"].data)
            if folder.kind == "petct":
                for threshold in (4, 2.5):
                    expected = volumes["pet"].data >= threshold
                    assert np.array_equal(case.native_above(threshold), expected)


def test_second_start_reads_nothing(tcia, tmp_path, monkeypatch):
    root = tcia(2)
    folder = tmp_path / "cache"
    lines = []
    first = prepare(root, folder)
    monkeypatch.chdir(tmp_path)
    for path in (root, Path(root.name)):  # the same folder by another path
        again = prepare(path, folder, lines.append)
        assert [case.meta for case in again] == [case.meta for case in first]
    assert lines == []


def test_every_setting_has_its_own_cache(tmp_path):
    def folder_of(name, **changes):
        return cache.cache_folder(tmp_path, tmp_path / name, replace(PETCT, **changes))

    folders = {folder_of("a"), folder_of("x/../a"), folder_of("b")}
    assert len(folders) == 2
    for field in fields(PETCT):
        folders.add(folder_of("a", **{field.name: "other"}))
    assert len(folders) == 2 + len(fields(PETCT))


def test_changed_files_are_read_again(tcia, tmp_path):
    root = tcia(2)
    folder = tmp_path / "cache"
    lines = []
    before = [np.array(case.load("images")) for case in prepare(root, folder)]
    write_nifti(root / NAME / "SUV.nii.gz", petct_arrays(0)["SUV"] * 1.5, las())
    cases = prepare(root, folder, say=lines.append)
    assert not np.array_equal(cases[0].load("images"), before[0])
    assert np.array_equal(cases[1].load("images"), before[1])
    assert not list(folder.rglob(".*"))
    file = root / NAME / "SEG.nii.gz"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))  # the time is enough
    prepare(root, folder, say=lines.append)
    assert len(lines) == 2
    assert all("1 of 2 studies to read, at most 0.00 GB" in line for line in lines)


def test_changed_names_are_read_again(msd, tmp_path):
    root = msd(1)
    lines = []
    path = root / "dataset.json"
    images = np.array(prepare(root, tmp_path / "cache")[0].load("images"))
    for key, a, b in (("labels", "1", "2"), ("modality", "0", "2")):
        content = json.loads(path.read_text())
        names = content[key]
        names[a], names[b] = names[b], names[a]
        path.write_text(json.dumps(content))
        (case,) = prepare(root, tmp_path / "cache", say=lines.append)
    assert len(lines) == 2
    assert np.array_equal(case.load("images"), images[::-1])


@pytest.mark.parametrize(
    "file, change",
    [
        ("meta.json", lambda text: text[:50]),
        ("meta.json", lambda text: "[1]"),
        ("meta.json", lambda text: text.replace('"shape"', '"form"')),
        ("meta.json", lambda text: text.replace('"case', '"cas')),
        ("meta.json", lambda text: text.replace('"checksum": "', '"checksum": "0')),
        ("lesion.npy", lambda text: text[:-1]),
        ("lesion.npy", lambda text: text + " "),
    ],
)
def test_a_damaged_study_is_made_again(nnunet, tmp_path, file, change):
    root = nnunet(1)
    folder = tmp_path / "cache"
    lines = []
    (case,) = prepare(root, folder)
    path = case.folder / file
    content = path.read_text("latin-1")
    path.write_text(change(content), "latin-1")
    (again,) = prepare(root, folder, say=lines.append)
    assert "1 of 1 studies to read" in lines[0]
    assert again.meta == case.meta
    assert path.read_text("latin-1") == content
    assert not list(case.folder.parent.glob(".*"))

    path.unlink()
    assert len(prepare(root, folder)) == 1
    assert path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_preprocessing_is_gone_at_once_and_later_swept(tcia, tmp_path, number):
    """Killed while both studies are written."""
    root = tcia(2)
    folder = tmp_path / "cache"
    code = f"""
import os, time, numpy, pathlib, cache, preprocess, studies
numpy.lib.format.write_array_header_1_0 = lambda *args: os.write(2, b"1\\n") and time.sleep(60)
settings = preprocess.PREPROCESSING["petct"]
cache.prepare(studies.find_studies(pathlib.Path({str(root)!r})), settings, {str(folder)!r})"""
    words = {"cwd": Path(cache.__file__).parent, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **words) as process:
        assert [process.stderr.readline() for _ in range(2)] == ["1\n", "1\n"]
        process.send_signal(number)
        assert process.wait(5) == -number
        assert process.stderr.read() == ""  # nobody holds the pipe: no child is left
    (base,) = folder.iterdir()
    stale = list(base.glob(".*.tmp"))
    assert len(stale) == 2
    assert len(list(base.iterdir())) == 3

    for path in stale:
        os.utime(path, (0, time.time() - 90_000))
    assert len(prepare(root, folder)) == 2
    assert sorted(path.name[:6] for path in base.iterdir()) == ["PETCT_", "PETCT_", "settin"]


@pytest.mark.parametrize("number, error", [(errno.EIO, UserError), (errno.ENOSPC, OSError)])
def test_failed_write_leaves_nothing(tcia, tmp_path, monkeypatch, number, error):
    def fail(file, header):
        file.write(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", fail)
    with pytest.raises(error) as caught:
        prepare(tcia(2), tmp_path / "cache")
    (base,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in base.iterdir()] == ["settings.json"]
    if error is UserError:  # a finding for each study
        message = str(caught.value)
        assert message.count("Input/output") == 2
        assert "--cache" in message
    else:  # the first study names what is full
        assert Path(caught.value.filename).parent == base


def test_check_finds_damage_that_keeps_size_and_time(tcia, tmp_path):
    root = tcia(2)
    folder = tmp_path / "cache"
    prepare(root, folder)
    file = root / NAME / "SUV.nii.gz"
    stat = file.stat()
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 255
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(prepare(root, folder)) == 2
    assert str(file) in message_of(root, folder, check=True)
    assert len(prepare(root, folder, check=True, skip_bad=True)) == 1
    assert "1 problems" in message_of(root, folder)  # what an earlier check passed is gone


def test_file_that_changes_while_it_is_read(tcia, tmp_path, monkeypatch):
    def touch(study, settings):
        os.utime(study.pet.path, (0, 0))
        return preprocess(study, settings)

    monkeypatch.setattr(cache, "preprocess", touch)
    assert "changed while it was read. Start again" in message_of(tcia(1), tmp_path / "cache")


def test_all_bad_studies_are_reported(tcia, tmp_path):
    root = tcia(5)
    lines = []
    missing, cut, odd, good, copy = sorted(root.glob("*/*"))
    (missing / "CTres.nii.gz").unlink()
    (cut / "SUV.nii.gz").write_bytes((cut / "SUV.nii.gz").read_bytes()[:-4])
    write_nifti(odd / "SEG.nii.gz", petct_arrays(2)["SEG"] * 3, las())
    suv = petct_arrays(4)["SUV"].astype(">f8")  # the same image in another encoding
    write_nifti(good / "SUV.nii.gz", suv, las())
    expected = [
        f"{missing}/CTres.nii.gz: missing file.",
        f"{cut}/SUV.nii.gz: cannot be read",
        f"{odd}/SEG.nii.gz: label values",
        f"{copy}/SUV.nii.gz: duplicate case: the same image as {good.parent.name}/",
    ]
    for _ in range(2):  # the second time the good ones come from the cache
        head, *problems, foot = message_of(root, tmp_path / "cache").splitlines()
        assert head == "the input check found 4 problems in 4 files:"
        assert foot.startswith("1 studies are fine.")
        assert "--skip-bad" in foot
        for problem, words in zip(problems, expected, strict=True):
            assert problem.strip().startswith(words)
    (case,) = prepare(root, tmp_path / "cache", skip_bad=True, say=lines.append)
    assert case.patient == good.parent.name
    assert lines[-1].startswith("left out   4 problems in 4 files:")
    assert all(words in lines[-1] for words in expected)


def test_an_interrupt_leaves_the_rest_undone(tcia, tmp_path, monkeypatch):
    begun = []
    go = threading.Event()

    def wait(study, make, folder):
        begun.append(study.name)
        go.wait(10)
        return []

    def interrupt(jobs, *args):
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write_case", wait)
    monkeypatch.setattr(cache, "progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(tcia(3), tmp_path / "cache")
    assert begun == [NAME]
