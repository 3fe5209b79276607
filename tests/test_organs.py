"""Organ maps and v5, which learns them: their names, their grids, what a run makes of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import SHAPE, SPACING, las, make_config, stored_as, write_nifti

import eval as evaluation
import metrics
import organs
import runs
import train
import tune
from common import UserError
from mirror_unet import MirrorUNet
from organs import find_maps, published_name, read_organ_names
from phantom import MAPPED
from preprocess import labels_to_native
from runs import LoadedRun, load_config
from studies import find_studies

LETTERS = ("a", "b", "c", "d")


def blocks(shape=SHAPE):
    """Organs 1, 2 and 4 as boxes in the body."""
    labels = np.zeros((12, 6, 6), np.uint8)
    labels[3:6, 2, 2] = 1
    labels[6:9, 2, 2] = 2
    labels[4:6, 3, 3] = 4
    for axis, side in enumerate(shape):
        index = np.arange(side) * labels.shape[axis] // side
        labels = labels.take(index, axis)
    return labels


@pytest.fixture
def mapped(tcia, tmp_path):
    """mapped(2, labels, affine) writes two studies and, into tmp_path/maps, their maps."""

    def write(count=1, labels=None, affine=None):
        root = tcia(count)
        for study in find_studies(root).studies:
            path = tmp_path / "maps" / f"{study.name.replace('/', '_')}.nii.gz"
            array = blocks() if labels is None else labels
            write_nifti(path, array, las() if affine is None else affine)
        return root

    return write


@pytest.fixture
def opened(tmp_path):
    """opened(root) gives the cases of v5, in their order, the names of the organs, and lines."""

    def read(root, **options):
        options = {"version": "v5", "spacing": (8.0, 8.0, 10.0), "workers": 0, **options}
        options.setdefault("organs", str(tmp_path / "maps"))
        config = make_config(data=str(root), cache=str(tmp_path / "cache"), **options)
        folder = runs.find_data(config)
        lines = []
        cases = runs.load_cases(folder, config, lines.append)
        names = runs.with_organ_names(config, cases, lines.append).organ_names
        return cases, names, "\n".join(lines)

    return read


# ------------------------------------------------------------------ names


def test_names_of_one_study_are_alike_and_others_apart():
    for name in ("fdg_01f_03-NA Ganz  primaer-1", "PETCT_01f/03-NA_Ganz__primaer-1"):
        assert published_name(name) == "01f_03-NA_Ganz_primaer-1"
    others = ("fdg_ab", "a_b", "fdg_A_b", "a-b", "psma_ab", "case_001")
    assert len(set(map(published_name, others))) == 6


def test_maps_are_found_by_the_names_of_their_studies(tcia, tmp_path):
    (study,) = find_studies(tcia(1)).studies
    for stem in ("fdg_01_a b", "fdg_another"):
        write_nifti(tmp_path / "maps" / f"{stem}.nii.gz", blocks(), las())
    studies = [replace(study, name=name) for name in ("PETCT_01/a b", "PETCT_02/a b")]
    expected = {"PETCT_01/a b": tmp_path / "maps" / "fdg_01_a b.nii.gz"}
    assert find_maps(studies, tmp_path / "maps") == expected
    assert find_maps(studies[1:], tmp_path / "maps", required=False) == {}
    with pytest.raises(UserError, match="maps: no organ map of a study such as PETCT_02/a b"):
        find_maps(studies[1:], tmp_path / "maps")
    write_nifti(tmp_path / "maps" / "PETCT_01_a_b.nii", blocks(), las())
    with pytest.raises(UserError, match="are of one study. Keep one"):
        find_maps(studies, tmp_path / "maps")


@pytest.mark.parametrize(
    "content, names",
    [
        ({"1": "spleen", "2": "left kidney"}, ("spleen", "left kidney")),
        ({"background": 0, "b": 2, "a": 1}, ("a", "b")),
        ({str(i): f"organ {i}" for i in range(1, 255)}, None),
    ],
)
def test_names_in_either_direction(content, names, tmp_path):
    assert read_organ_names(tmp_path) == ()
    (tmp_path / "organs.json").write_text(json.dumps(content))
    assert read_organ_names(tmp_path) == (names or tuple(content.values()))


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"1": "a", "3": "b"}', "KeyError: 2"),
        ('{"1": "a", "2": "a"}', "no names, or one twice"),
        ("{}", "no names"),
        ('{"0": "background"}', "no names"),
        ('{"1": ""}', "no names"),
        ('["a"]', "AttributeError"),
        ('{"1": 5}', "ValueError"),
        (json.dumps({str(i): f"{i}" for i in range(1, 256)}), "no names"),
    ],
)
def test_names_that_are_none(content, words, tmp_path):
    (tmp_path / "organs.json").write_text(content)
    with pytest.raises(UserError, match=f"organs.json: damaged .*{words}.*Expected"):
        read_organ_names(tmp_path)


def test_names_must_fit_the_maps(mapped, opened, tmp_path):
    root = mapped(1)
    names = tmp_path / "maps" / "organs.json"
    assert opened(root)[1] == ("organ 1", "organ 2", "organ 3", "organ 4")
    names.write_text('{"1": "a", "2": "b", "3": "c"}')
    with pytest.raises(UserError, match="values up to 4, named a, b, c; expected a, b, c. Use"):
        opened(root)
    names.write_text('{"1": "a", "2": "b", "3": "c", "4": "d"}')
    assert opened(root)[1] == LETTERS
    with pytest.raises(UserError, match="named a, b, c, d; expected w, x, y, z. Use other maps"):
        opened(root, organ_names=tuple("wxyz"))
    names.unlink()
    with pytest.raises(UserError, match="values up to 4, named nowhere; expected w. Use other"):
        opened(root, organ_names=("w",))
    _, known, lines = opened(root, organ_names=LETTERS)
    assert known == LETTERS
    assert "no organs.json: their values" in lines


# ------------------------------------------------------------------ grids


def by_world(labels, affine, shape, target):
    """The label whose voxel is nearest in space to each voxel of a grid, one by one."""
    nearest = np.zeros(shape, np.uint8)
    to_labels = np.linalg.inv(affine) @ target
    for voxel in np.ndindex(*shape):
        index = np.floor(to_labels @ [*voxel, 1] + 0.5).astype(int)[:3]
        if (index >= 0).all() and (index < labels.shape).all():
            nearest[voxel] = labels[tuple(index)]
    return nearest


GRIDS = {
    "own": (blocks(), las()),
    "turned": stored_as(blocks(), las(), "PIR"),
    "finer": (blocks((48, 40, 18)), las((2.0, 2.0, 5.0), (30.7, -20.4, -500.0))),
    "a part": (blocks((10, 20, 18)), las(origin=(30.0 - 4 * 8, -20.0, -500.0))),
}


@pytest.mark.parametrize("labels, affine", GRIDS.values(), ids=GRIDS)
def test_every_voxel_takes_the_nearest(labels, affine, mapped, opened):
    ((case,), _, _) = opened(mapped(1, labels, affine))
    meta = case.meta
    expected = by_world(labels, affine, tuple(meta.native_shape), np.array(meta.native_affine))
    native = case.organs.native_labels()
    assert native.dtype == np.uint8
    assert (native == expected).all()
    assert set(np.unique(native)) == {0, 1, 2, 4}

    indices = []  # both grids run L, A, S
    for count, (start, stop) in zip(meta.shape, meta.box, strict=True):
        nearest = np.rint(2.0 * np.arange(count)).astype(int)
        indices.append(np.minimum(start + nearest, stop - 1))
    assert (case.organs.load("organs") == expected[np.ix_(*indices)]).all()


def test_the_way_back_takes_the_nearest_too(mapped, opened):
    root = mapped(1)
    for spacing in (SPACING, (8.0, 8.0, 10.0)):
        ((case,), _, _) = opened(root, spacing=spacing)
        native = case.organs.native_labels()
        back = labels_to_native(case.meta, np.asarray(case.organs.load("organs")))
        assert set(np.unique(back)) == {0, 1, 2, 4}
        share = (back == native)[native > 0].mean()
        assert share == 1 if spacing == SPACING else 0.5 < share < 1


# ------------------------------------------------------------------ maps that cannot be used


NUMBERS = "values other than whole numbers from 0 to 254"
BAD_MAPS = [
    (blocks(), las(origin=(5000.0, -20.0, -500.0)), "lies beside the study. Give the map of"),
    (blocks() * np.float32(0.5), las(), NUMBERS),
    (-blocks().astype(np.int16), las(), NUMBERS),
    (blocks().astype(np.int16) * 100, las(), NUMBERS),
    ((blocks() > 0).astype(np.int16) * 255, las(), NUMBERS),
]


@pytest.mark.parametrize("labels, affine, words", BAD_MAPS)
def test_bad_maps_are_findings(labels, affine, words, mapped, opened, tmp_path):
    root = mapped(2)
    write_nifti(min((tmp_path / "maps").iterdir()), labels, affine)
    with pytest.raises(UserError, match=f"organ maps have 1 problems in 1 files:\n.*{words}"):
        opened(root)


@pytest.mark.parametrize("codes", [(0, 0), (1, 1)])
def test_a_header_must_say_where_the_map_lies(codes, mapped, opened, tmp_path):
    root = mapped(1)
    (path,) = (tmp_path / "maps").iterdir()
    header = nib.Nifti1Header()
    header.set_sform(las(), codes[0])
    header.set_qform(np.diag([-1, 1, 1, 1]) @ las(), codes[1])
    nib.save(nib.Nifti1Image(blocks(), None, header), path)
    with pytest.raises(UserError, match="does not say where it lies, or says two different"):
        opened(root)


def test_maps_must_be_there(mapped, opened, tmp_path):
    root = mapped(1, np.zeros(SHAPE, np.uint8))
    with pytest.raises(UserError, match="no such folder. Give --organs"):
        opened(root, organs=str(tmp_path / "nowhere"))
    assert not (tmp_path / "cache").exists()  # it is said before the studies are read
    with pytest.raises(UserError, match="maps: its organ maps are empty, or none is left"):
        opened(root)


def test_maps_can_be_left_out_and_read_again(mapped, opened, tmp_path):
    root = mapped(3)
    min((tmp_path / "maps").iterdir()).write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read.*\n.*go on without them: --skip-bad"):
        opened(root)
    cases, _, lines = opened(root, skip_bad=True)
    assert [bool(case.organs) for case in cases] == [False, True, True]
    assert "left out   the organ maps have 1 problems" in lines
    assert "organs     2 of 3 studies have a map of organ 1, organ 2, organ 3, organ 4" in lines

    cached = next((tmp_path / "cache").rglob("organs.npy"))
    raw = cached.read_bytes()
    cached.write_bytes(raw[:-1] + b"x")  # which a look at its size does not tell
    opened(root, skip_bad=True, check=True)
    assert cached.read_bytes() == raw


def test_each_file_of_a_map_has_a_cache(mapped, opened, tmp_path):
    root = mapped(1)
    ((one,), _, _) = opened(root)
    before = np.array(one.organs.load("organs"))
    (path,) = (tmp_path / "maps").iterdir()
    write_nifti(tmp_path / "other" / path.name, 2 * blocks(), las())
    ((two,), _, _) = opened(root, organs=str(tmp_path / "other"))
    assert (one.organs.load("organs") == before).all()
    assert (two.organs.load("organs") == 2 * before).all()


def test_a_map_is_read_once_and_again_when_it_changed(mapped, opened, tmp_path, monkeypatch):
    root = mapped(2)
    reads = []
    read_map = organs.read_map
    monkeypatch.setattr(organs, "read_map", lambda *args: reads.append(1) or read_map(*args))
    first = [case.meta.digests for case in opened(root)[0]]
    opened(root)
    assert len(reads) == 2

    write_nifti(min((tmp_path / "maps").iterdir()), blocks()[::-1], las())
    again = [case.meta.digests for case in opened(root)[0]]
    assert len(reads) == 3
    assert again[1] == first[1]
    assert again[0].pop("organs") != first[0].pop("organs")
    assert again[0] == first[0]  # what v3 reads is untouched
    cases = opened(root, version="v3", organs=None)[0]
    assert not any(case.organs or "organs" in case.meta.digests for case in cases)


# ------------------------------------------------------------------ Dice


def test_dice_of_organs():
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, (2, 9, 8, 7)).astype(np.uint8)
    truth[truth == 3] = 0
    pred[pred == 3] = 1
    dices = metrics.organ_dices(pred, truth, LETTERS)
    a, b = (metrics.dice(pred == i, truth == i) for i in (1, 2))
    expected = [a, b, np.nan, np.nan]  # two are in neither
    assert [dices[f"organ_dice_{n}"] for n in LETTERS] == pytest.approx(expected, nan_ok=True)
    assert dices["organ_dice"] == pytest.approx((a + b) / 2)
    assert metrics.organ_dices(pred, truth * 0, LETTERS)["organ_dice_a"] == 0
    assert np.isnan(metrics.organ_dices(0 * pred, 0 * pred, ("a",))["organ_dice"])


@pytest.mark.parametrize("spacing", [SPACING, (8.0, 8.0, 10.0)])
def test_the_metrics_of_a_study_are_of_its_own_grid(spacing, mapped, opened, monkeypatch):
    ((case,), _, _) = opened(mapped(1), spacing=spacing)
    model = MirrorUNet("v5", organs=LETTERS, channels=(4, 8, 8, 16, 16))
    cached = np.asarray(case.organs.load("organs"))

    def infer(loaded, images, heads=("seg",)):
        maps = dict.fromkeys(heads, np.full((1, *cached.shape), -1.0))
        maps["ct"] = np.where([cached == i for i in range(1, 5)], 1.0, -1.0)
        return evaluation.Inference(maps, 0.5)

    monkeypatch.setattr(evaluation, "infer", infer)
    loaded = LoadedRun(model, make_config("v5"), "cpu", {})
    row = evaluation.score_case(loaded, case, native=True)
    back = labels_to_native(case.meta, cached)
    expected = metrics.organ_dices(back, case.organs.native_labels(), LETTERS)
    assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert (row["organ_dice"] == 1) == (spacing == SPACING)
    row = evaluation.score_case(loaded, case, native=False)
    assert not any(name.startswith("organ") for name in row)


# ------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def organ_run(base, tmp_path_factory):
    """A finished v5 run on the studies of `base`; one of them has lost its map."""
    root = tmp_path_factory.mktemp("v5")
    shutil.copytree(Path(base.data) / "organs", root / "organs")
    min((root / "organs").glob("fdg*")).unlink()
    folders = {name: str(root / name) for name in ("organs", "cache", "out")}
    config = replace(base, version="v5", phi=None, **folders)
    return config, train.train(config)


def evaluate(*words):
    evaluation.eval_command(list(map(str, words)))


def test_v5_trains_is_tested_and_goes_on(organ_run):
    config, result = organ_run
    run = Path(config.out)
    assert load_config(run).organ_names == MAPPED
    rows = pd.read_csv(run / "metrics.csv")
    assert {"organs", "seg", "rec_pet", "cls"} <= set(rows)
    assert "rec_ct" not in rows
    assert (rows["organs"] > 0).all()
    assert (rows["grad_organs"] > 0).all()
    studies = pd.read_csv(run / "test_studies.csv")
    dices = studies[[f"organ_dice_{name}" for name in MAPPED]].mean(axis=1)
    assert np.allclose(studies["organ_dice"], dices)
    assert result["test"]["organ_dice"] == pytest.approx(dices.mean())
    assert (run / "examples.png").stat().st_size > 10_000
    assert train.train(replace(config, epochs=3, resume=True))["epochs"] == 3

    lost = min(Path(config.organs).glob("fdg*"))
    content = lost.read_bytes()
    lost.unlink()
    try:
        with pytest.raises(UserError, match=r"changed since the run began: .*\(organs\)"):
            train.train(replace(config, epochs=4, resume=True))
    finally:
        lost.write_bytes(content)


def test_the_training_part_needs_a_map(base, finished, tmp_path):
    shutil.copytree(Path(base.data) / "organs", tmp_path / "organs")
    splits = finished[0] / "splits.json"
    for name in json.loads(splits.read_text())["train"]:
        map_name = name.replace("PETCT", "fdg").replace("/", "_")
        (tmp_path / "organs" / f"{map_name}.nii.gz").unlink()
    folders = {name: str(tmp_path / name) for name in ("organs", "cache", "out")}
    config = replace(base, version="v5", phi=None, splits=str(splits), **folders)
    with pytest.raises(UserError, match="No study of the training part has an organ map"):
        train.train(config)


def test_v5_predicts_organs(organ_run, base, tmp_path):
    run = organ_run[0].out
    out = tmp_path / "masks"
    maps = tmp_path / "organs"
    words = (run, "--predict", base.data, "--out", out, "--organs-out", maps)
    evaluate(*words)
    written = sorted(path.name for path in maps.glob("*.nii.gz"))
    assert written == sorted(path.name for path in out.iterdir())
    assert len(written) == 9
    assert tuple(json.loads((maps / "organs.json").read_text()).values()) == MAPPED
    mask, organ_map = (nib.load(folder / written[0]) for folder in (out, maps))
    assert mask.shape == organ_map.shape
    assert (mask.affine == organ_map.affine).all()
    assert organ_map.get_data_dtype() == np.uint8
    assert np.asarray(organ_map.dataobj).max() <= len(MAPPED)

    with pytest.raises(UserError, match="exists already"):
        evaluate(*words)
    out.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="exists already"):
        evaluate(*words)
    with pytest.raises(UserError, match="--organs has no effect here"):
        evaluate(*words[:5], "--organs", maps)


def test_v3_and_v5_stand_in_one_table(organ_run, finished, base, tmp_path, capsys):
    maps = sorted((Path(base.data) / "organs").glob("fdg*"))
    (tmp_path / "maps").mkdir()
    for path in maps[:4]:
        shutil.copy(path, tmp_path / "maps")
    (tmp_path / "v5").symlink_to(organ_run[0].out)
    folders = ("--cache", tmp_path / "cache", "--out", tmp_path / "out")
    words = ("--data", base.data, "--organs", tmp_path / "maps", "--part", "all", *folders)
    evaluate(finished[0], tmp_path / "v5", *words)
    output = capsys.readouterr()
    (row,) = [line for line in output.out.splitlines() if line.startswith("organ Dice")]
    assert "(4)" in row
    assert " - " in row
    assert "organs     4 of 9 studies" in output.err
    assert "no organs.json: their" in output.err


def test_studies_without_maps_are_scored_for_their_lesions(organ_run, base, tmp_path, capsys):
    folders = ("--cache", tmp_path / "cache", "--out", tmp_path / "out")
    evaluate(organ_run[0].out, "--data", base.data, *folders)
    output = capsys.readouterr()
    assert "organs     0 of 9 studies have a map" in output.err
    assert "Dice" in output.out
    assert "organ Dice" not in output.out


def test_organs_out_is_refused_where_there_are_none(finished, organ_run, base, tmp_path):
    words = ("--predict", base.data, "--out", tmp_path, "--organs-out", tmp_path / "o")
    for chosen in ([finished[0]], [organ_run[0].out, organ_run[0].out]):
        with pytest.raises(UserError, match="--organs-out: these runs learnt no organs"):
            evaluate(*chosen, *words)
    with pytest.raises(UserError, match="--organs-out goes with --predict"):
        evaluate(finished[0], "--organs-out", tmp_path)


def test_trials_of_other_maps_are_others(base, tmp_path):
    names = []
    (tmp_path / "search").mkdir()
    for highest in (1, 2):
        folder = tmp_path / f"maps{highest}"
        for path in (Path(base.data) / "organs").glob("fdg*"):
            image = nib.load(path)
            labels = np.minimum(np.asarray(image.dataobj), highest)
            write_nifti(folder / path.name, labels, image.affine)
        words = f"--search organs --fold 0 --seed 0 --data {base.data} --organs {folder} --patch 16"
        words += f" --spacing 16 --out {tmp_path}/search --folds 3 --cache {tmp_path}/cache"
        trials = tune.prepare_trials(*tune.parse_tune(words.split()))
        names.append([Path(trial.out).name for trial in trials])
    differs = [one != two for one, two in zip(*names, strict=True)]
    assert differs == [name.startswith("v5") for name in names[0]]
    assert sum(differs) == 2
