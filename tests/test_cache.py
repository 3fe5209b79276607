"""cache.py against answers derived another way: by hand, by scipy, or from how data were made."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import las, mri_arrays, petct_arrays, stored_as, write_nifti
from scipy import ndimage
from scipy.spatial.transform import Rotation

import cache
import files
import preprocess as preprocessing
from files import HERE, UserError
from preprocess import PREPROCESSING, preprocess, to_native
from studies import BadStudy, Source, Study, find_studies, read_study

PETCT, MRI = PREPROCESSING["petct"], PREPROCESSING["mri"]
WHOLE = 1000.0  # mm of margin: no crop
NAME = "PETCT_0000000000/01-01-2000-NA-PET-CT"


def write_study(folder, arrays, affine):
    files = [write_nifti(folder / f"{stem}.nii", arrays[stem], affine) for stem in arrays]
    return Study("case", "patient", "petct", Source(files[0]), Source(files[1]), files[2])


def turned_to(axes, arrays, affine):
    """The arrays as files with other axes hold them, and the affine of these."""
    turned = {stem: stored_as(array, affine, axes)[0] for stem, array in arrays.items()}
    return turned, stored_as(arrays["SUV"], affine, axes)[1]


def prepare(root, folder, say=lambda line: None, **more):
    found = find_studies(root)
    return cache.prepare(root, found, PREPROCESSING[found.kind], folder, 1, say=say, **more)


def message_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        prepare(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("factor, words", [(0, "no body found"), (5000, "are not SUV in g/ml")])
def test_images_that_are_not_suv(tmp_path, factor, words):
    arrays = petct_arrays(0)
    study = write_study(tmp_path, arrays | {"SUV": arrays["SUV"] * factor}, las())
    with pytest.raises(BadStudy) as caught:
        preprocess(study, PETCT)
    (finding,) = caught.value.findings
    assert finding.file == str(study.pet.path) and words in finding.found
    assert "SUV" in finding.remedy


@pytest.mark.parametrize(
    "spacing", [(4.07, 4.07, 5.0), (1.3, 1.1, 2.0), (2.0, 2.0, 3.0), (5, 5, 6)]
)
def test_resampling_is_linear_at_exact_places(tmp_path, spacing):
    arrays, ratio = petct_arrays(3), np.array((2, 2, 3)) / spacing
    got, meta = preprocess(write_study(tmp_path, arrays, las(spacing)), PETCT)
    inside, margin = np.argwhere(arrays["SUV"] > 0.2), np.ceil(10 / np.array(spacing))
    first = np.maximum(inside.min(0) - margin, 0)
    last = np.minimum(inside.max(0) + margin, np.array(arrays["SUV"].shape) - 1)
    counts = np.round((last - first) / ratio + 1).astype(int)  # as MONAI's Spacing: halves to even
    assert meta["shape"] == counts.tolist()
    grid = np.moveaxis(np.indices(counts), 0, -1) * ratio + first
    grid = np.moveaxis(np.minimum(grid, last), -1, 0)
    for i, (stem, low, high) in enumerate((("CTres", -100, 250), ("SUV", 0, 15))):
        image = arrays[stem].astype(np.float64)
        image = ndimage.map_coordinates(image, grid, order=1, mode="nearest")
        expected = (np.clip(image, low, high) - low) / (high - low)
        np.testing.assert_allclose(got["images"][i], expected, atol=1e-3)
    nearest = ndimage.map_coordinates(arrays["SEG"], grid, order=0, mode="nearest")
    halves = (np.abs(grid % 1 - 0.5) < 1e-6).any(0)  # either neighbour is as near
    assert np.array_equal(got["label"][~halves], nearest[~halves])
    assert np.array_equal(got["lesion"], np.flatnonzero(got["label"]))


def test_resample_beyond_the_border():
    image = np.random.default_rng(0).normal(size=(5, 1, 7)).astype(np.float32)
    positions = [np.array([0, 0.25, 3.9, 4.4]), np.array([0, 0.5]), np.linspace(0, 6, 11)]
    grid = np.meshgrid(*positions, indexing="ij")
    expected = ndimage.map_coordinates(image.astype(float), grid, order=1, mode="nearest")
    np.testing.assert_allclose(preprocessing.resample(image, positions), expected, atol=1e-6)


def test_mri_is_resampled_then_scaled(tmp_path):
    made, affine = mri_arrays(0), np.diag((-1.4, -1.0, 2.0, 1.0))  # LPS, as BraTS has it
    study = write_study(tmp_path, {name: made[name] for name in ("FLAIR", "t1gd", "label")}, affine)
    study = replace(study, kind="mri", classes=((0, 0), (1, 1), (2, 2), (3, 2)))
    got, meta = preprocess(study, replace(MRI, margin_mm=WHOLE))
    assert meta["shape"] == [22, 14, 23]
    positions = [np.arange(22) / 1.4, np.arange(14.0), np.arange(23) / 2]
    grid = np.minimum(np.meshgrid(*positions, indexing="ij"), [[[[15]]], [[[13]]], [[[11]]]])
    for i, name in enumerate(("FLAIR", "t1gd")):
        image = made[name][::-1, ::-1].astype(np.float64)
        image = ndimage.map_coordinates(image, grid, order=1, mode="nearest")
        brain = image[image != 0]
        expected = np.where(image != 0, (image - brain.mean()) / brain.std(), 0)
        np.testing.assert_allclose(got["images"][i], expected, atol=3e-3)
    nearest = np.ix_(np.rint(np.arange(22) / 1.4).astype(int), range(14), range(12))
    expected = np.minimum(made["label"], 2)[::-1, ::-1][nearest]
    assert np.array_equal(got["label"][:, :, ::2], expected) and "native_hot" not in got
    got, meta = preprocess(replace(study, label=None), MRI)
    assert set(got) == {"images"} and meta["lesion_voxels"] is None


def is_class(margin):
    return (margin[0] > 0.5).astype(np.uint8)


@pytest.mark.parametrize("axes", ["LAS", "RPI", "PIR", "SLA", "ARS", "IPL"])
def test_order_of_axes_does_not_matter(tmp_path, axes):
    spacing, arrays = (4.0, 3.0, 5.0), petct_arrays(0)
    arrays["SEG"] = (arrays["SUV"] > 2).astype(np.uint8)  # in the body, no symmetry
    expected, meta = preprocess(write_study(tmp_path / "las", arrays, las(spacing)), PETCT)
    turned, affine = turned_to(axes, arrays, las(spacing))
    study = write_study(tmp_path / "turned", turned, affine)
    got, again = preprocess(study, PETCT)
    for name in ("images", "label", "lesion"):
        assert np.array_equal(got[name], expected[name]), name
    assert [again["digests"][n] == meta["digests"][n] for n in ("ct", "pet")] == [True, True]
    got, meta = preprocess(study, replace(PETCT, spacing=spacing))  # so that the way back is exact
    back = to_native(json.loads(json.dumps(meta)), got["label"][None], is_class)
    assert back.dtype == np.uint8 and np.array_equal(back, turned["SEG"])


def turning(axis, degrees):
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler(axis, degrees, degrees=True).as_matrix()
    return turn


@pytest.mark.parametrize(
    "spacing, turn",
    [
        ((1.2, 3.1, 4.4), np.eye(4)),
        ((4.0, 4.0, 5.0), turning("z", 20)),
        ((2.5, 3.0, 1.7), turning("xy", (30, -25))),
    ],
)
def test_a_lesion_stays_at_its_place(tmp_path, spacing, turn):
    arrays = petct_arrays(0)
    arrays["SEG"][:] = 0
    arrays["SEG"][5:14, 6:14, 7:15] = 1
    turned, affine = turned_to("PIR", arrays, turn @ las(spacing))
    got, meta = preprocess(write_study(tmp_path, turned, affine), PETCT)
    back = to_native(meta, got["label"][None].astype(np.float16), is_class)
    middles = [np.argwhere(mask).mean(0) for mask in (back, turned["SEG"])]
    assert np.linalg.norm(affine[:3, :3] @ (middles[0] - middles[1])) < max(spacing) / 2
    assert int(back.sum()) == pytest.approx(576, rel=0.3)


def test_outside_of_the_body_is_background(tmp_path):
    arrays = petct_arrays(0)
    arrays["SUV"][:8] = 0
    settings = replace(PETCT, margin_mm=4.5)
    _, meta = preprocess(write_study(tmp_path, arrays, las()), settings)
    back = to_native(meta, np.ones((1, *meta["shape"])), is_class)
    assert meta["box"][0][0] == 6  # two voxels of 4 mm
    assert not back[:6].any() and back[6:-2, 10, 9].all()


# ------------------------------------------------------------------ the cache


def test_cached_arrays_are_those_of_preprocess(tcia, msd, tmp_path):
    for root in (tcia(2), msd(2)):
        found = find_studies(root)
        turned, affine = turned_to("PIR", petct_arrays(0), las())
        for stem, array in turned.items() if found.kind == "petct" else ():
            write_nifti(root / NAME / f"{stem}.nii.gz", array, affine)
        for case, study in zip(prepare(root, tmp_path / "cache"), found.studies, strict=True):
            arrays, meta = preprocess(study, PREPROCESSING[found.kind])
            assert case.meta.items() >= json.loads(json.dumps(meta)).items()
            assert (case.name, case.patient) == (study.name, study.patient)
            assert case.has_lesion == bool(arrays["label"].any())
            assert all(np.array_equal(case.load(name), array) for name, array in arrays.items())
            assert not case.load("images").flags.writeable
            files = read_study(study)  # masks are kept on their grid
            native = case.native("native_label", case.load("native_class"))
            assert np.array_equal(native, files["label"].data)
            if found.kind == "petct":
                assert np.array_equal(case.native("native_hot"), files["pet"].data >= 4)


def test_second_start_reads_nothing(tcia, tmp_path, monkeypatch):
    root, folder, said = tcia(2), tmp_path / "cache", []
    first = prepare(root, folder)
    monkeypatch.chdir(tmp_path)
    (first[0].folder.parent / f".a.999999999@{HERE}.tmp").mkdir()  # but it sweeps
    for path in (root, Path(root.name)):  # the same folder by another path
        assert [c.meta for c in prepare(path, folder, said.append)] == [c.meta for c in first]
    assert said == [] and not list(first[0].folder.parent.glob(".*"))


def test_every_setting_has_its_own_cache(tmp_path):
    changed = [replace(PETCT, **{field.name: "other"}) for field in fields(PETCT)]
    folders = {cache.cache_folder(tmp_path, tmp_path / "a", s) for s in (PETCT, *changed)}
    folders.add(cache.cache_folder(tmp_path, tmp_path / "x" / ".." / "a", PETCT))
    assert len(folders) == 1 + len(changed)
    assert cache.cache_folder(tmp_path, tmp_path / "b", PETCT) not in folders


def test_changed_files_are_read_again(tcia, tmp_path):
    root, folder, said = tcia(2), tmp_path / "cache", []
    before = [np.array(c.load("images")) for c in prepare(root, folder)]
    write_nifti(root / NAME / "SUV.nii.gz", petct_arrays(0)["SUV"] * 1.5, las())
    cases = prepare(root, folder, say=said.append)
    assert not np.array_equal(cases[0].load("images"), before[0])
    assert np.array_equal(cases[1].load("images"), before[1])
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]
    file = root / NAME / "SEG.nii.gz"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))  # the time is enough
    prepare(root, folder, say=said.append)
    assert len(said) == 2 and all("1 of 2 studies to read, at most 0.00 GB" in s for s in said)


def test_changed_names_are_read_again(msd, tmp_path):
    root, said = msd(1), []
    path = root / "dataset.json"
    images = np.array(prepare(root, tmp_path / "cache")[0].load("images"))
    for key, a, b in (("labels", "1", "2"), ("modality", "0", "2")):
        description = json.loads(path.read_text())
        names = description[key]
        names[a], names[b] = names[b], names[a]
        path.write_text(json.dumps(description))
        (case,) = prepare(root, tmp_path / "cache", say=said.append)
    assert len(said) == 2 and np.array_equal(case.load("images"), images[::-1])


@pytest.mark.parametrize("left", ["temporary folder", "no meta", "cut meta", "list", "cut array"])
def test_what_a_kill_leaves_is_not_used(tcia, tmp_path, left):
    root, folder, said = tcia(1), tmp_path / "cache", []
    case = prepare(root, folder)[0]
    expected, meta = np.array(case.load("images")), case.folder / "meta.json"
    if left == "temporary folder":
        case.folder.rename(case.folder.with_name(f".{case.folder.name}.999999999@{HERE}.tmp"))
    elif left == "no meta":
        meta.unlink()
        np.save(case.folder / "images.npy", np.zeros(3))
    elif left == "cut array":
        os.truncate(case.folder / "images.npy", 1000)
    else:
        meta.write_text("[1]" if left == "list" else meta.read_text()[:50])
    (case,) = prepare(root, folder, say=said.append)
    assert "1 of 1 studies to read" in said[0]
    assert np.array_equal(case.load("images"), expected)
    assert not list(case.folder.parent.glob(".*"))


@pytest.mark.parametrize("change", [{"shape": [9] * 3}, {"native_spacing": None}, {"digests": {}}])
def test_a_changed_description_is_made_again(tcia, tmp_path, change):
    root, folder = tcia(1), tmp_path / "cache"
    (case,) = prepare(root, folder)
    path = case.folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (again,) = prepare(root, folder)
    assert again.meta == case.meta == json.loads(path.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_preprocessing_is_gone_at_once_and_the_next_start_sweeps(tcia, tmp_path, number):
    """Killed while the first of two studies is written."""
    root, folder = tcia(2), tmp_path / "cache"
    code = f"""
import os, time, numpy, pathlib, cache, preprocess, studies
numpy.lib.format.write_array_header_1_0 = lambda *args: os.write(2, b"1\\n") and time.sleep(60)
root, settings = pathlib.Path({str(root)!r}), preprocess.PREPROCESSING["petct"]
cache.prepare(root, studies.find_studies(root), settings, {str(folder)!r}, workers=2)"""
    words = {"cwd": Path(cache.__file__).parent, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **words) as process:
        said = [process.stderr.readline() for _ in range(2)]
        process.send_signal(number)
        assert process.wait(5) == -number and said == ["1\n", "1\n"], said
        assert process.stderr.read() == ""  # nobody holds the pipe: no child is left
    (base,) = folder.iterdir()
    left = [path.name for path in base.iterdir()]
    assert len(left) == 3 and sum(name.endswith(".tmp") for name in left) == 2
    assert len(prepare(root, folder)) == 2
    assert sorted(path.name.startswith("PETCT_") for path in base.iterdir()) == [False, True, True]


def test_failed_write_leaves_nothing(tcia, tmp_path, monkeypatch):
    def full_disk(file, header):
        file.write(b"half")
        raise error

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):  # files.command_line makes one line of it
        prepare(tcia(2), tmp_path / "file")
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full_disk)
    for number, caught in ((errno.EIO, UserError), (errno.ENOSPC, OSError)):
        error = OSError(number, os.strerror(number))
        with pytest.raises(caught) as end:
            prepare(tcia(2), tmp_path / "cache")
        (folder,) = (tmp_path / "cache").iterdir()
        assert [path.name for path in folder.iterdir()] == ["settings.json"]
        if caught is UserError:  # a finding for each study
            assert str(end.value).count("Input/output") == 2 and "--cache" in str(end.value)
    assert (end.value.errno, Path(end.value.filename).parent) == (28, folder)  # the first one


def test_check_finds_damage_that_keeps_size_and_time(tcia, tmp_path):
    root, folder = tcia(2), tmp_path / "cache"
    assert len(prepare(root, folder)) == 2
    file = root / NAME / "SUV.nii.gz"
    stat, raw = file.stat(), bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 255
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(prepare(root, folder)) == 2
    assert str(file) in message_of(root, folder, check=True)
    assert len(prepare(root, folder, check=True, skip_bad=True)) == 1
    assert "1 problems" in message_of(root, folder)  # what an earlier check passed is gone


def test_file_that_changes_while_it_is_read(tcia, tmp_path, monkeypatch):
    def touch(study, *args):
        os.utime(study.pet.path, (0, 0))
        return preprocess(study, *args)

    monkeypatch.setattr(cache, "preprocess", touch)
    assert "changed while it was read. Start again" in message_of(tcia(1), tmp_path / "cache")


def test_all_bad_studies_are_reported(tcia, tmp_path):
    root, said = tcia(5), []
    study = [root / f"PETCT_{i:010x}/01-01-2000-NA-PET-CT" for i in range(5)]
    (study[0] / "CTres.nii.gz").unlink()
    (study[1] / "SUV.nii.gz").write_bytes((study[1] / "SUV.nii.gz").read_bytes()[:-4])
    write_nifti(study[2] / "SEG.nii.gz", petct_arrays(2)["SEG"] * 3, las())
    suv = petct_arrays(4)["SUV"].astype(">f8")  # the same image in another encoding
    write_nifti(study[3] / "SUV.nii.gz", suv, las())
    bad = [
        f"  {study[0]}/CTres.nii.gz: missing file.",
        f"  {study[1]}/SUV.nii.gz: cannot be read",
        f"  {study[2]}/SEG.nii.gz: label values 3 outside",
        f"  {study[4]}/SUV.nii.gz: duplicate case: the same image as PETCT_0000000003/",
    ]
    for _ in range(2):  # the second time the good ones come from the cache
        head, *lines, foot = message_of(root, tmp_path / "cache").splitlines()
        assert head == "the input check found 4 problems in 4 files:"
        assert foot.startswith("1 studies are fine.") and "--skip-bad" in foot and len(lines) == 4
        assert all(line.startswith(start) for start, line in zip(bad, lines, strict=True))
    cases = prepare(root, tmp_path / "cache", skip_bad=True, say=said.append)
    assert [c.patient for c in cases] == ["PETCT_0000000003"]
    assert said[-1].startswith("left out   4 problems in 4 files:")
    assert all(start in said[-1] for start in bad)


def test_an_interrupt_leaves_the_rest_undone(tcia, tmp_path, monkeypatch):
    begun, go = [], threading.Event()

    def slow(study, *args):
        begun.append(study.name)
        go.wait(10)
        return []

    def interrupt(jobs, *args):
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "fill_cache", slow)
    monkeypatch.setattr(cache, "progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(tcia(3), tmp_path / "cache")
    assert begun == [NAME]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")
def test_a_full_disk_ends_the_preprocessing_with_one_line(tcia, tmp_path, monkeypatch, capsys):
    """The arrays of the first study go to a disk that is full."""
    true = files.unfinished

    def full(path):
        if path.suffix == ".npy":
            true(path).symlink_to("/dev/full")
        return true(path)

    monkeypatch.setattr(files, "unfinished", full)
    root = tcia(3)
    with pytest.raises(SystemExit) as end:
        files.command_line(lambda: prepare(root, tmp_path / "cache"))
    (base,) = (tmp_path / "cache").iterdir()
    assert [path.name for path in base.iterdir()] == ["settings.json"] and end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {base}/PETCT_") and line.count("\n") == 1
    assert ": the disk is full, No space left on device. Make room; " in line
    monkeypatch.undo()
    assert len(prepare(root, tmp_path / "cache")) == 3
