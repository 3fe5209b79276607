"""Organ maps and v5, which learns them: where maps lie, their grids, what a run makes of them."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import SPACING, las, stored_as, write_nifti

import eval as evaluation
import organs
import train
import tune
from config import Config, resolve
from files import UserError
from mirror_unet import MirrorUNet
from organs import find_maps, names_of, plain_name
from phantom import MAPPED
from preprocess import to_native
from runs import open_data, saved_config
from studies import find_studies

PLACE = las()
SETTINGS = dict(spacing=(8.0, 8.0, 10.0), workers=0)


def blocks(shape):
    """Organs 1, 2 and 4 as boxes in the body."""
    labels = np.zeros(shape, np.uint8)
    w, h, d = shape
    labels[w // 4 : w // 2, h // 3 : h // 2, d // 3 : d // 2] = 1
    labels[w // 2 : 3 * w // 4, h // 3 : h // 2, d // 3 : d // 2] = 2
    labels[w // 3 : w // 2, h // 2 : 2 * h // 3, d // 2 : 2 * d // 3] = 4
    return labels


def opened(root, tmp_path, **more):
    """open_data for v5: config, cases by name, what it said."""
    said = []
    config = Config(version="v5", data=str(root), cache=str(tmp_path / "cache"), **SETTINGS | more)
    config, cases = open_data(config, said.append)
    return config, {case.name: case for case in cases}, "\n".join(said)


def put_maps(root, count=None, affine=PLACE, labels=None):
    """ORGANS.nii.gz into the folder of each study of an AutoPET tree, or of the first few."""
    for folder in sorted(root.glob("PETCT_*/*"))[:count]:
        shape = nib.load(folder / "SUV.nii.gz").shape
        write_nifti(folder / "ORGANS.nii.gz", blocks(shape) if labels is None else labels, affine)


# ------------------------------------------------------------------ where they lie


@pytest.mark.parametrize(
    "study, stem",
    [
        ("fdg_01f_03-NA-PET-CT Ganz  primaer-1", "PETCT_01f_03-NA-PET-CT_Ganz__primaer-1"),
        ("PETCT_01f/03-NA-PET-CT Ganz  primaer-1", "fdg_01f_03-NA-PET-CT Ganz  primaer-1"),
        ("psma_95b_2018", "psma_95b_2018"),
        ("case_001", "case_001"),
    ],
)  # fmt: skip
def test_maps_are_found_by_the_names_of_their_studies(study, stem, tmp_path, tcia):
    root = tcia(1)
    (one,) = find_studies(root).studies
    for name in (stem, "fdg_another"):
        write_nifti(tmp_path / "maps" / f"{name}.nii.gz", np.ones((2, 2, 2), np.uint8), las())
    config = Config(version="v5", organs=str(tmp_path / "maps"))
    found = find_maps([replace(one, name=study)], root, config)
    assert found == {study: tmp_path / "maps" / f"{stem}.nii.gz"}


def test_names_that_are_not_alike_stay_apart():
    assert plain_name("fdg_a_b") == plain_name("PETCT_a/b") == plain_name("a  b") == "a_b"
    assert len({*map(plain_name, ("fdg_ab", "a_b", "fdg_A_b", "a-b", "psma_ab"))}) == 5


def test_maps_beside_the_studies(tmp_path, tcia, nnunet):
    put_maps(tcia(3), 2)
    config, cases, said = opened(tmp_path / "autopet", tmp_path)
    assert [bool(case.organs) for case in cases.values()] == [True, True, False]
    assert config.organ_names == ("organ 1", "organ 2", "organ 3", "organ 4")
    assert "organs     2 of 3 studies have a map of organ 1, organ 2, organ 3, organ 4" in said
    root = nnunet(2)
    for path in sorted((root / "labelsTr").glob("*.nii.gz")):
        write_nifti(root / "organsTr" / path.name, blocks(nib.load(path).shape), las())
    (root / "organsTr" / "organs.json").write_text(json.dumps({"a": 1, "b": 2, "c": 3, "d": 4}))
    config, cases, _ = opened(root, tmp_path)
    assert config.organ_names == ("a", "b", "c", "d") and all(c.organs for c in cases.values())


@pytest.mark.parametrize(
    "content, names",
    [
        ({"1": "spleen", "2": "left kidney"}, ("spleen", "left kidney")),
        ({"background": 0, "b": 2, "a": 1}, ("a", "b")),
    ],
)
def test_names_in_either_direction(content, names, tmp_path):
    (tmp_path / "organs.json").write_text(json.dumps(content))
    assert names_of([tmp_path / "elsewhere", tmp_path]) == names and names_of([]) == ()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"1": "a", "3": "b"}, "KeyError: 2"), ({"1": "a", "2": "a"}, "no names, or one twice"),
        ({}, "no names"), ({"0": "background"}, "no names"), ({"1": ""}, "no names"),
        (["a"], "AttributeError"), ({"1": 5}, "ValueError"),
        ({str(i): f"{i}" for i in range(1, 256)}, "no names"),
    ],
)  # fmt: skip
def test_names_that_are_none(content, why, tmp_path):
    (tmp_path / "organs.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"organs.json: damaged .*{why}.*Expected"):
        names_of([tmp_path])


# ------------------------------------------------------------------ grids


def by_world(labels, affine, shape, target):
    """The label whose voxel is nearest in space to each voxel of a grid, one by one."""
    found = np.zeros(shape, np.uint8)
    back = np.linalg.inv(affine)
    for voxel in np.ndindex(*shape):
        place = back @ target @ [*voxel, 1]
        index = tuple(int(np.floor(x + 0.5)) for x in place[:3])
        if all(0 <= i < n for i, n in zip(index, labels.shape, strict=True)):
            found[voxel] = labels[index]
    return found


def maps_of_grids():
    fine = blocks((48, 40, 18))  # half the voxels of SHAPE's, and shifted by less than one
    yield "own", blocks((24, 20, 18)), las()
    yield "turned", *stored_as(blocks((24, 20, 18)), las(), "PIR")
    yield "finer", fine, las((2.0, 2.0, 5.0), (30.7, -20.4, -500.0))
    yield "a part", blocks((10, 20, 18)), las(origin=(30.0 - 4 * 8, -20.0, -500.0))


@pytest.mark.parametrize("name, labels, affine", list(maps_of_grids()))
def test_every_voxel_takes_the_nearest(name, labels, affine, tmp_path, tcia):
    root = tcia(1)
    put_maps(root, affine=affine, labels=labels)
    (case,) = opened(root, tmp_path)[1].values()
    shape = tuple(case.meta["native_shape"])
    expected = by_world(labels, affine, shape, np.array(case.meta["native_affine"]))
    native = case.organs.native("native_organs", case.organs.load("native_organ"))
    assert native.dtype == np.uint8 and (native == expected).all()
    assert {*np.unique(native)} == {0, 1, 2, 4}
    cached, label = case.organs.load("organs"), case.load("label")
    assert cached.shape == label.shape
    steps = [
        np.arange(n) * t / s
        for n, t, s in zip(label.shape, case.meta["spacing"], SPACING, strict=True)
    ]
    starts = [start for start, _ in case.meta["box"]]
    nearest = [
        s + np.minimum(np.rint(p).astype(int), b - s - 1)
        for s, p, (_, b) in zip(starts, steps, case.meta["box"], strict=True)
    ]
    assert (cached == expected[np.ix_(*nearest)]).all()  # both run L, A, S


def test_the_way_back_takes_the_nearest_too(tmp_path, tcia):
    root = tcia(1)
    put_maps(root)
    (case,) = opened(root, tmp_path, spacing=SPACING)[1].values()
    native = case.organs.native("native_organs", case.organs.load("native_organ"))
    assert (to_native(case.meta, np.asarray(case.organs.load("organs"))) == native).all()
    (coarse,) = opened(root, tmp_path)[1].values()
    found = to_native(coarse.meta, np.asarray(coarse.organs.load("organs")))
    assert {*np.unique(found)} == {0, 1, 2, 4} and 0.5 < (
        found[native > 0] == native[native > 0]
    ).mean() < 1


# ------------------------------------------------------------------ what cannot be used


def damage(kind, folder, tmp_path):
    path, shape = folder / "ORGANS.nii.gz", (24, 20, 18)
    path.unlink()
    if kind == "beside":
        write_nifti(path, blocks(shape), las(origin=(5000.0, -20.0, -500.0)))
    elif kind == "fractions":
        write_nifti(path, blocks(shape) * np.float32(0.5), las())
    elif kind == "negative":
        write_nifti(path, -blocks(shape).astype(np.int16), las())
    elif kind == "too many":
        write_nifti(path, blocks(shape).astype(np.int16) * 100, las())
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"no image")


@pytest.mark.parametrize(
    "kind, words",
    [
        ("beside", "lies beside the study. Give the map of this study"),
        ("fractions", "values other than whole numbers from 0 to 254"),
        ("negative", "values other than whole numbers from 0 to 254"),
        ("too many", "values other than whole numbers from 0 to 254"),
        ("folder", "not a file"),
        ("text", "cannot be read"),
    ],
)
def test_bad_maps_are_findings(kind, words, tmp_path, tcia):
    root = tcia(2)
    put_maps(root)
    damage(kind, sorted(root.glob("*/*"))[0], tmp_path)
    with pytest.raises(UserError, match=f"organ maps have 1 problems in 1 files:\n.*{words}"):
        opened(root, tmp_path)


def test_what_does_not_fit_is_refused(tmp_path, tcia):
    root, maps = tcia(2), tmp_path / "maps"
    with pytest.raises(UserError, match="autopet: no organ map for a study of .*--organs"):
        opened(root, tmp_path)
    assert not (tmp_path / "cache").exists()  # it is said before the studies are read
    with pytest.raises(UserError, match="--organs .*maps: no such folder"):
        opened(root, tmp_path, organs=str(maps))
    maps.mkdir()
    with pytest.raises(UserError, match="maps: no organ map for a study of .*autopet"):
        opened(root, tmp_path, organs=str(maps))
    name = find_studies(root).studies[0].name
    for stem in (name.replace("/", "_"), name.replace("/", "__")):
        write_nifti(maps / f"{stem}.nii.gz", blocks((24, 20, 18)), las())
    with pytest.raises(UserError, match="are of one study. Keep one"):
        opened(root, tmp_path, organs=str(maps))
    (maps / f"{stem}.nii.gz").unlink()
    (maps / "organs.json").write_text('{"1": "a", "2": "b", "3": "c"}')
    with pytest.raises(UserError, match="values up to 4, named a, b, c; expected a, b, c"):
        opened(root, tmp_path, organs=str(maps))
    (maps / "organs.json").write_text('{"1": "a", "2": "b", "3": "c", "4": "d"}')
    assert opened(root, tmp_path, organs=str(maps))[0].organ_names == ("a", "b", "c", "d")
    with pytest.raises(UserError, match="named a, b, c, d; expected w, x, y, z. Use other maps"):
        opened(root, tmp_path, organs=str(maps), organ_names=tuple("wxyz"))
    (maps / "organs.json").unlink()
    with pytest.raises(
        UserError, match="values up to 4, named nowhere; expected w. Use other maps"
    ):
        opened(root, tmp_path, organs=str(maps), organ_names=("w",))
    assert (
        opened(root, tmp_path, organs=str(maps), organ_names=tuple("wxyz"))[0].organ_names[0] == "w"
    )
    for options, words in (
        ({"version": "v3", "organs": "maps"}, "--organs has no effect on v3"),
        ({"version": "v3", "lambda_org": 1.0}, "--lambda-org has no effect on v3"),
        ({"version": "pet", "organs": "maps"}, "--organs has no effect on pet"),
        ({"version": "v5", "ct": "other"}, "--ct other: v5 learns the organs of the own CT"),
    ):
        with pytest.raises(UserError, match=words):
            resolve(Config(**options), "petct", False)


def test_maps_can_be_left_out_and_read_again(tmp_path, tcia, monkeypatch):
    root = tcia(3)
    put_maps(root)
    damage("text", sorted(root.glob("*/*"))[0], tmp_path)
    with pytest.raises(UserError, match="go on without them: --skip-bad"):
        opened(root, tmp_path)
    _, cases, said = opened(root, tmp_path, skip_bad=True)
    assert [bool(case.organs) for case in cases.values()] == [False, True, True]
    assert "left out   the organ maps have 1 problems" in said and "organs     2 of 3" in said
    cached = next((tmp_path / "cache").rglob("organs.npy"))
    raw = bytearray(cached.read_bytes())
    raw[-1] ^= 1
    cached.write_bytes(raw)  # which a look at its size does not tell
    opened(root, tmp_path, skip_bad=True, check=True)
    assert cached.read_bytes()[-1] == raw[-1] ^ 1
    put_maps(root, labels=np.zeros((24, 20, 18), np.uint8))
    with pytest.raises(UserError, match="its organ maps are empty, or none is left"):
        opened(root, tmp_path)


def test_two_folders_of_maps_have_a_cache_each(tmp_path, tcia):
    root = tcia(1)
    put_maps(root)
    (study,) = find_studies(root).studies
    stem = study.name.replace("/", "_")
    write_nifti(tmp_path / "maps" / f"{stem}.nii.gz", 2 * blocks((24, 20, 18)), las())
    (one,) = opened(root, tmp_path)[1].values()
    before = np.array(one.organs.load("organs"))
    (two,) = opened(root, tmp_path, organs=str(tmp_path / "maps"))[1].values()
    assert (one.organs.load("organs") == before).all()
    assert (two.organs.load("organs") == 2 * before).all()


def test_a_header_must_say_where_the_map_lies(tmp_path, tcia):
    root = tcia(1)
    put_maps(root)
    path = next(root.rglob("ORGANS.nii.gz"))
    labels = np.asarray(nib.load(path).dataobj) + 0  # before the file goes
    for codes in ((0, 0), (1, 1)):
        header = nib.Nifti1Header()
        header.set_data_dtype(np.uint8)
        header.set_sform(las(), codes[0])
        header.set_qform(np.diag([-1, 1, 1, 1]) @ las(), codes[1])
        path.unlink()
        nib.save(nib.Nifti1Image(labels, None, header), path)
        with pytest.raises(UserError, match="does not say where it lies, or says two different"):
            opened(root, tmp_path)


def test_the_training_part_needs_a_map(base, finished, tmp_path):
    data = copy_of(base.data, tmp_path / "data")
    splits = json.loads((finished[0] / "splits.json").read_text())
    for name in splits["train"]:
        (data / name / "ORGANS.nii.gz").unlink()
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    own = dict(data=str(data), cache=str(tmp_path / "cache"), out=str(tmp_path / "run"))
    config = replace(base, version="v5", phi=None, splits=str(tmp_path / "splits.json"), **own)
    with pytest.raises(UserError, match="No study of the training part has an organ map"):
        train.train(config)


def test_a_map_is_read_once_and_again_when_it_changed(tmp_path, tcia, monkeypatch):
    root, reads = tcia(2), []
    put_maps(root)
    read = organs.read_map
    monkeypatch.setattr(
        organs, "read_map", lambda study, case: reads.append(study.name) or read(study, case)
    )
    digests = [case.meta["digests"] for case in opened(root, tmp_path)[1].values()]
    assert len(reads) == 2 and all("organs" in own for own in digests)
    stamps = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.is_file()
    }
    assert opened(root, tmp_path)[1].keys() and len(reads) == 2
    put_maps(root, 1, labels=blocks((24, 20, 18))[::-1])
    again = [case.meta["digests"] for case in opened(root, tmp_path)[1].values()]
    assert len(reads) == 3 and again[0] != digests[0] and again[1] == digests[1]
    own = {name: value for name, value in again[0].items() if name != "organs"}
    assert own.items() <= digests[0].items()  # what v3 reads is untouched
    changed = {
        file.parent.name for file, stamp in stamps.items() if file.stat().st_mtime_ns != stamp
    }
    assert len(changed) == 1 and ".organs-" in changed.pop()
    _, cases = open_data(
        Config(version="v3", data=str(root), cache=str(tmp_path / "cache"), **SETTINGS), str
    )
    assert not any(case.organs or "organs" in case.meta["digests"] for case in cases)


# ------------------------------------------------------------------ Dice


def test_dice_of_organs():
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, (2, 9, 8, 7)).astype(np.uint8)
    truth[truth == 3] = 0
    pred[pred == 3] = 1
    found = evaluation.organ_dices(pred, truth, ("a", "b", "c", "d"))
    expected = {n: evaluation.dice(pred == i, truth == i) for i, n in enumerate("ab", 1)}
    assert {n: found[f"organ_dice_{n}"] for n in "ab"} == pytest.approx(expected)
    assert np.isnan([found["organ_dice_c"], found["organ_dice_d"]]).all()  # in neither
    assert found["organ_dice"] == pytest.approx(sum(expected.values()) / 2)
    only = evaluation.organ_dices(pred, truth * 0, ("a", "b", "c", "d"))
    assert only["organ_dice_a"] == 0 and np.isnan(
        evaluation.organ_dices(0 * pred, 0 * pred, ("a",))["organ_dice"]
    )


def test_the_metrics_of_a_study_are_of_its_own_grid(tmp_path, tcia, monkeypatch):
    root = tcia(1)
    put_maps(root)
    model = MirrorUNet("v5", organs=tuple("abcd"), channels=(4, 8, 8, 16, 16))
    for spacing in (SPACING, SETTINGS["spacing"]):
        config, cases, _ = opened(root, tmp_path, spacing=spacing)
        (case,) = cases.values()
        cached = np.asarray(case.organs.load("organs"))

        def infer(model, image, config, device, heads, cached=cached):
            wanted = [cached == i for i in range(1, 5)] if heads == ("ct",) else [cached < 0]
            return np.where(wanted, 1.0, -1.0), 0.5

        monkeypatch.setattr(evaluation, "infer", infer)
        row = evaluation.study_row(model, case, config, "cpu", native=True)
        truth = case.organs.native("native_organs", case.organs.load("native_organ"))
        found = to_native(case.meta, cached)
        for number, name in enumerate("abcd", 1):
            expected = evaluation.dice(found == number, truth == number)
            assert row[f"organ_dice_{name}"] == pytest.approx(expected, nan_ok=True)
        mean = np.mean([row[f"organ_dice_{name}"] for name in "abd"])
        assert row["organ_dice"] == pytest.approx(mean) and (mean == 1) == (spacing == SPACING)
        cached_row = evaluation.study_row(model, case, config, "cpu", native=False)
        assert not [name for name in cached_row if name.startswith("organ")]


# ------------------------------------------------------------------ a run


def copy_of(source, target, skip="nothing"):
    """A copy of a folder of studies, without the files of a name."""
    for file in sorted(Path(source).rglob("*")):
        if file.is_file() and file.name != skip:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="module")
def organ_run(base, tmp_path_factory):
    """A finished v5 run on the studies of `base`; one of them has lost its map."""
    root = tmp_path_factory.mktemp("v5")
    copy_of(base.data, root / "data")
    next(iter(sorted((root / "data").rglob("ORGANS.nii.gz")))).unlink()
    config = replace(base, version="v5", data=str(root / "data"), cache=str(root / "cache"),
                     out=str(root / "run"), phi=None)  # fmt: skip
    return config, train.train(config)


def test_v5_trains_is_tested_and_goes_on(organ_run, monkeypatch, capsys):
    config, result = organ_run
    run = Path(config.out)
    assert saved_config(run).organ_names == MAPPED
    metrics = pd.read_csv(run / "metrics.csv")
    assert {"organs", "seg", "rec_pet", "cls"} <= {*metrics} and "rec_ct" not in metrics
    assert (metrics["organs"] > 0).all() and (metrics["grad_organs"] > 0).all()
    studies = pd.read_csv(run / "test_studies.csv")
    dices = studies[[f"organ_dice_{name}" for name in MAPPED]]
    assert studies["organ_dice"].to_numpy() == pytest.approx(dices.mean(axis=1).to_numpy())
    assert result["test"]["organ_dice"] == pytest.approx(studies["organ_dice"].mean())
    assert (run / "examples.png").stat().st_size > 10_000
    longer = replace(config, epochs=3, resume=True)
    assert train.train(longer)["epochs"] == 3
    lost = next(Path(config.data).rglob("ORGANS.nii.gz"))
    content = lost.read_bytes()
    try:
        lost.unlink()
        with pytest.raises(UserError, match=r"changed since the run began: .*\(organs\)"):
            train.train(replace(config, epochs=4, resume=True))
    finally:
        lost.write_bytes(content)


def test_v5_predicts_organs(organ_run, tmp_path, monkeypatch, capsys):
    config, _ = organ_run
    out, maps = tmp_path / "masks", tmp_path / "organs"
    line = [config.out, "--predict", config.data, "--out", str(out), "--organs-out", str(maps)]
    evaluation.run_command(line)
    written = sorted(path.name for path in maps.glob("*.nii.gz"))
    assert written == sorted(path.name for path in out.glob("*.nii.gz")) and len(written) == 9
    assert [*json.loads((maps / "organs.json").read_text()).values()] == [*MAPPED]
    mask, organ_map = (nib.load(folder / written[0]) for folder in (out, maps))
    assert mask.shape == organ_map.shape and (mask.affine == organ_map.affine).all()
    assert organ_map.get_data_dtype() == np.uint8 and np.asarray(organ_map.dataobj).max() <= len(
        MAPPED
    )
    with pytest.raises(UserError, match="exists already, as do 18 more"):
        evaluation.run_command(line)
    (tmp_path / "masks").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="exists already, as do 9 more"):
        evaluation.run_command(line)
    with pytest.raises(UserError, match="--organs-out: the masks lie in --out"):
        evaluation.run_command([*line[:-1], str(out)])
    with pytest.raises(UserError, match="--organs has no effect here"):
        evaluation.run_command([*line[:5], "--organs", str(maps)])


def test_v3_and_v5_stand_in_one_table(organ_run, finished, base, tmp_path, capsys):
    data = copy_of(base.data, tmp_path / "data", skip="ORGANS.nii.gz")
    names = [study.name for study in find_studies(data).studies]
    for name in names[:4]:
        source = (Path(base.data) / name / "ORGANS.nii.gz").read_bytes()
        (tmp_path / "maps").mkdir(exist_ok=True)
        (tmp_path / "maps" / f"{name.replace('/', '_')}.nii.gz").write_bytes(source)
    line = ["--data", str(data), "--organs", str(tmp_path / "maps"), "--part", "all"]
    line += ["--cache", str(tmp_path / "c"), "--out", str(tmp_path / "out")]
    (tmp_path / "v5").symlink_to(organ_run[0].out)
    evaluation.run_command([str(finished[0]), str(tmp_path / "v5"), *line])
    told = capsys.readouterr()
    (row,) = [row for row in told.out.splitlines() if row.startswith("organ Dice")]
    assert "(4)" in row and " - " in row
    assert "organs     4 of 9 studies" in told.err and "no organs.json: their values" in told.err


def test_trials_of_other_maps_are_others(base, tmp_path):
    names = []
    for number in (1, 2):
        maps = tmp_path / f"maps{number}"
        for study in find_studies(Path(base.data)).studies:
            image = nib.load(study.pet.path.with_name("ORGANS.nii.gz"))
            labels = np.minimum(np.asarray(image.dataobj), number)
            write_nifti(maps / f"{study.name.replace('/', '_')}.nii.gz", labels, image.affine)
        line = f"--search organs --fold 0 --seed 0 --data {base.data} --organs {maps} --patch 16 "
        line += f"--spacing 16 --out {tmp_path / 'search'} --folds 3 --cache {tmp_path / 'c'}"
        with tune.only_writer(tmp_path / "search"):
            names.append([Path(trial.out).name for trial in tune.plan(*tune.parse(line.split()))])
    one, two = names
    v5 = [name.startswith("v5") for name in one]
    assert [a != b for a, b in zip(one, two, strict=True)] == v5 and sum(v5) == 3


def test_organs_out_is_refused_where_there_are_none(finished, organ_run, tmp_path):
    run, data = str(finished[0]), organ_run[0].data
    with pytest.raises(UserError, match="--organs-out: these runs learnt no organs"):
        evaluation.run_command(
            [run, "--predict", data, "--out", str(tmp_path), "--organs-out", str(tmp_path / "o")]
        )
    with pytest.raises(UserError, match="--organs-out goes with --predict"):
        evaluation.run_command([run, "--organs-out", str(tmp_path)])
    several = [organ_run[0].out, organ_run[0].out]
    with pytest.raises(UserError, match="--organs-out: these runs learnt no organs"):
        evaluation.run_command(
            [
                *several,
                "--predict",
                data,
                "--out",
                str(tmp_path),
                "--organs-out",
                str(tmp_path / "o"),
            ]
        )


def test_studies_without_maps_are_scored_for_their_lesions(organ_run, base, tmp_path, capsys):
    bare = copy_of(base.data, tmp_path / "bare", skip="ORGANS.nii.gz")
    run = organ_run[0].out
    evaluation.run_command(
        [run, "--data", str(bare), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "out")]
    )
    told = capsys.readouterr()
    assert "organs     0 of 9 studies have a map" in told.err and "organ Dice" not in told.out
    assert "Dice" in told.out
