"""plots.py: what is drawn in the figures of the paper, from a search and from runs."""

import itertools
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.patches import Rectangle
from matplotlib.text import Text

import plots
from baselines import Valindria, Weninger
from config import Config, plain, resolve
from files import UserError, write_json
from mirror_unet import LESION, VARIANTS, Output, Task, Variant
from runs import build_model, load_run, save_checkpoint, save_config
from tables import PAPER_TABLE2, SETS


@pytest.fixture(autouse=True)
def closed():
    yield
    plots.plt.close("all")  # also what a test kept from being saved


def trial(version="v3", shared="5", dice=np.nan, **options):
    """A row of runs.read_trials; without a Dice, of a trial that waits."""
    row = {"version": version, "shared": shared, "dice": dice, "kind": "petct", "phi": "shuffle"}
    return row | {"theta": None, "lambda_rec": None, "lambda_cls": None} | options


def table_2(*waiting):
    """Table 2 of the paper, a trial per cell; waiting: numbers of trials that have no Dice yet."""
    rows = []
    for (version, method), dices in PAPER_TABLE2.items():
        own = {"phi": "none", "theta": method} if version == "v4" else {"phi": method}
        rows += [trial(version, s, dice, **own) for s, dice in zip(SETS, dices, strict=True)]
    return [row | {"dice": np.nan} if i in waiting else row for i, row in enumerate(rows)]


def lambda_rows():
    """v3 over the 5 x 5 grid; best at λ_rec 1e-4, λ_class 1e-2; two seeds 1 % around the mean."""
    return [
        trial(dice=60 - abs(i - 4) - 2 * abs(j - 2) + shift, lambda_rec=10**-i, lambda_cls=10**-j)
        for i, j, shift in itertools.product(range(1, 6), range(1, 6), (-1, 1))
    ]


def draw(name, rows, about=""):
    """The figure of these rows as the command draws it, its axis, and what it says."""
    plots.plt.close("all")
    trials = pd.DataFrame(rows)
    drawn = trials["version"].isin(plots.SEARCH_FIGURES[name][1])
    figure, said = plots.search_figure(name, trials[drawn], about)
    return figure, figure.axes[0], said


def lines(axis, **looks):
    """The values of the lines that look so, from left to right."""
    found = [n for n in axis.lines if all(getattr(n, f"get_{k}")() == v for k, v in looks.items())]
    return [list(n.get_ydata()) for n in sorted(found, key=lambda n: list(n.get_xdata())[:1])]


def texts(things):
    return [thing.get_text().replace("\n", "") for thing in things]


def test_fig_5_draws_the_bold_numbers_of_table_2():
    figure, axis, said = draw("fig5_shared", table_2(35, 44, 51, 58)[::-1])  # rows in any order
    assert lines(axis, label="v1") == [[62.75, 63.97, 64.57, 63.80, 63.09, 63.01, 62.72]]
    assert lines(axis, label="v2") == [[59.96, 64.28, 65.50, 64.08, 63.69, 63.29, 63.33]]
    v3 = [63.33, 64.55, np.nan, 64.44, 64.00, 63.43, 63.34]
    assert lines(axis, label="v3") == [pytest.approx(v3, nan_ok=True)]
    assert lines(axis, label="v4") == [[61.67, 63.78, 64.24, 63.64, 62.30, 63.99, 60.81]]
    sets = ["{3}", "{4}", "{5}", "{6}", "{7}", "{4,5,6}", "{3,4,5,6,7}"]
    assert texts(axis.get_xticklabels()) == sets and axis.get_ylabel() == "test Dice (%)"
    assert said == axis.get_title(loc="right") == "1 run; 4 of 105 cells missing"
    assert texts(figure.legends[0].get_texts()) == ["v1", "v2", "v3", "v4"]
    for look in ("get_color", "get_marker", "get_linestyle"):  # told apart in grey as well
        assert len({getattr(line, look)() for line in axis.lines}) == 4


def test_fig_4_has_a_box_per_version_and_phi_over_all_sets():
    figure, axis, said = draw("fig4_phi", table_2(1)[1:])  # a cell that is not planned counts too
    assert said == "1 run; 2 of 63 cells missing"
    expected = [61.92, 62.34, 63.09, 62.15, 62.62, 63.69, 62.78, 63.01, 64.00]  # no v4
    assert [y for y, _ in lines(axis, linewidth=1.4)] == pytest.approx(expected)  # the medians
    dots = lines(axis, marker="o")
    assert dots[8] == pytest.approx(PAPER_TABLE2["v3", "shuffle"]) and len(dots[0]) == 5
    [legend] = figure.legends
    assert texts(axis.get_xticklabels()) == ["v1", "v2", "v3"]
    assert texts(legend.get_texts()) == ["L2", "L2 + noise", "L2 + shuffling"]
    left = sorted(axis.patches, key=lambda p: p.get_path().get_extents().x0)[:3]
    looks = [(p.get_facecolor(), p.get_hatch()) for p in (*left, *legend.get_patches())]
    assert looks[:3] == looks[3:] and len({hatch for _, hatch in looks}) == 3


def test_fig_6_boxes_hold_the_fixed_thetas_and_the_learned_one_is_beside():
    figure, axis, _ = draw("fig6_theta", table_2(63, 70, 77, 84, 91))  # no fixed θ with L = {3}
    assert lines(axis, linewidth=1.4)[2][0] == pytest.approx(63.65)  # L = {5}
    dots = [[], [63.78, 62.66, 63.76, 62.93, 61.84], [63.65, 64.24, 64.22, 58.43, 61.00]]
    assert lines(axis, marker="o")[:3] == dots
    assert lines(axis, marker="*") == [pytest.approx(PAPER_TABLE2["v4", "learn"])]
    low = np.nanmin([min(values) for values in lines(axis, linewidth=0.7)])
    assert low == pytest.approx(56.15)  # whiskers reach the worst fixed θ, not the learned one
    assert texts(figure.legends[0].get_texts()) == ["fixed θ, 0.1 to 0.5", "learned θ"]


def test_lambda_map_shows_means_over_seeds_and_frames_the_best():
    rows = lambda_rows()
    rows[8]["dice"] = rows[9]["dice"] = np.nan  # λ_rec 1e-1, λ_class 1e-5
    figure, axis, said = draw("fig_s1_lambdas", rows[::-1] + [trial("v2", dice=99)])
    values = axis.images[0].get_array()  # rows λ_class, columns λ_rec, both rising
    np.testing.assert_allclose(values[:, 1], [54, 56, 58, 60, 58])
    np.testing.assert_allclose(values[3], [59, 60, 59, 58, 57])
    assert values.mask.sum() == 1 and values.mask[0, 4] and axis.get_ylim() == (-0.5, 4.5)
    assert (
        said
        == axis.get_title(loc="right")
        == "mean of 2 runs (seeds, folds); 1 of 25 cells missing"
    )
    frames = [p.get_center() for p in axis.patches if isinstance(p, Rectangle)]
    assert frames == [pytest.approx((1, 3))] and "10^{-5}" in texts(axis.get_xticklabels())[0]
    assert "rec" in axis.get_xlabel() and "class" in axis.get_ylabel()
    [bold] = [cell for cell in axis.texts if cell.get_weight() == "bold"]
    assert (bold.get_text(), bold.get_position()) == ("60.00", (1, 3)) and len(axis.texts) == 24


def test_no_text_of_a_figure_is_cut_off_or_too_small():
    many = table_2() + [trial("v1", s, 60) for s in ("none", "1 2 3", "1 2 3 4 5 6 7")]
    many = [row | {"kind": "mri"} for row in many]
    about = "batch_size 8, weight_decay 1, lr 0.0001, schedule poly, clip 1"  # two lines with it
    for name, (table, *_) in plots.SEARCH_FIGURES.items():
        figure, axis, _ = draw(name, lambda_rows()[2:] if table == "lambdas" else many[1:], about)
        figure.draw_without_rendering()
        extent, size = figure.get_tightbbox().extents, figure.get_size_inches()
        assert min(extent) >= 0 and (extent[2:] <= size).all()
        assert size[0] == pytest.approx(7 if name == "fig5_shared" else 3.3)
        assert min(n.get_fontsize() for n in figure.findobj(Text) if n.get_text()) >= 6
        names = axis.get_xticklabels()
        along = [t.get_window_extent() for t in names]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(along))
        if name == "fig5_shared":
            assert axis.get_ylabel() == "test Dice, whole tumour (%)"
            assert [t.get_text() for t in names[7:9]] == ["none", "{1,2,3}"]
            assert names[9].get_text() == "{1,2,3,\n4,5,6,\n7}"


def make_search(folder, rows):
    """The folder of a search with finished trials: (version, Dice, options) each."""
    for i, (version, dice, options) in enumerate(rows):
        config = resolve(Config(version=version, data="x", **options), "petct", phantom=False)
        run = folder / f"t{i}"
        run.mkdir(parents=True)
        told = {"searches": ["mine"], "config": plain(config), "studies": "s"}
        write_json(run / "trial.json", told)
        told = {"epochs": 400, "systems": {"model": {"dice": {"mean": dice, "n": 3}}}}
        write_json(run / "summary.json", told)
    return folder


def test_the_command_writes_what_the_search_compares(tmp_path, capsys):
    rows = [("v4", 0.5 + t, {"theta": t, "shared": (3,)}) for t in (0.1, 0.2)]
    plots.run_command([str(make_search(tmp_path, rows))])
    stem = tmp_path / "figures" / "fig6_theta"
    assert {*stem.parent.iterdir()} == {stem.with_suffix(".png"), stem.with_suffix(".pdf")}
    picture, pdf = plots.plt.imread(f"{stem}.png"), stem.with_suffix(".pdf").read_bytes()
    assert picture.shape[1] == 990 and picture[..., :3].std() > 0.05  # 3.3 in at 300 dpi
    assert b"/CIDFontType2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    assert capsys.readouterr().out.splitlines() == [
        f"fig6_theta      {stem}.png, .pdf   1 run",
        "fig_s1_lambdas  not drawn: compares λ of v3, the search does not",
        "fig4_phi        not drawn: compares Φ, the search does not",
        "fig5_shared     not drawn: compares sets L, the search does not",
    ]


def test_each_group_of_comparable_trials_has_its_own_figure(tmp_path, capsys, monkeypatch):
    drawn = {}  # neither v3_ct_only nor what v3 alone reads parts the figure of v4
    monkeypatch.setattr(plots, "save", lambda f, *paths, dpi: drawn.update({paths[0].stem: f}))
    rows = [("v4", 0.5, {"shared": (s,), "theta": t}) for s in (3, 5) for t in (0.1, 0.2)]
    rows += [("v3", 0.6, {"shuffle_count": 30, "shared": (s,)}) for s in (3, 5)]
    rows += [("v3", dice, {"shared": (5,), "seed": i}) for i, dice in enumerate((0.5, 0.7))]
    rows += [("v3_ct_only", 0.6, {"shared": (s,)}) for s in (3, 5)]
    plots.draw_search(make_search(tmp_path, rows), tmp_path / "out")
    assert [*drawn] == ["fig5_shared-shuffle_count_1", "fig5_shared-shuffle_count_30", "fig6_theta"]
    for figure, dices in zip(drawn.values(), ([np.nan, 60], [60, 60]), strict=False):
        assert lines(figure.axes[0], label="v3") == [pytest.approx(dices, nan_ok=True)]
    assert "compares Φ, the search does not (shuffle_count 1)" in capsys.readouterr().out


BAD = [
    ("", "Give the folder of a search"), ("@/search --qualitative x", "Give the folder of"),
    ("@/nowhere", "nowhere: no trials of a search"), ("@/search --study a", "go with --qualita"),
    ("@/search --device cpu", "go with --qualitative"), ("@/search", "no figure to draw of fig_s1"),
    ("--qualitative @/search", "say where to with --out"),
    ("--qualitative @/search --out @/o", "no such checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize("command, message", BAD)
def test_bad_commands_end_with_code_2(tmp_path, monkeypatch, capsys, command, message):
    make_search(tmp_path / "search", [("v3", 0.5, {})])
    monkeypatch.setattr(sys, "argv", ["plots.py", *command.replace("@", str(tmp_path)).split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(plots.__file__, run_name="__main__")  # the script itself
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.startswith("error: ") and message in said.err
    assert said.err.count("\n") == 1 and said.out == "" and not any(tmp_path.glob("**/*.png"))


def test_curves_show_every_term_of_the_loss(tmp_path, monkeypatch):
    rows = {"epoch": [1, 2], "lr": 1, "loss": [3, 2], "rec_ct": [1, 0.5], "organs": [2, -0.1]}
    rows |= {"grad_rec_ct": [7, 8], "patches_per_s": 5.0, "data_wait": 0.5, "seconds": 1}
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path, **how: figures.append(figure))
    for more in ({}, {"val_dice": [np.nan, 0.25], "val_seconds": 9}):
        pd.DataFrame(rows | more).to_csv(tmp_path / "metrics.csv", index=False)
        plots.curves(tmp_path)
    drawn = [{n.get_label(): list(n.get_ydata()) for n in a.lines} for a in figures[1].axes]
    assert drawn == [
        {"rec_ct": [1, 0.5], "organs": [2, -0.1], "loss": [3, 2]}, {"Dice": [0.25]},
        {"rec_ct": [7, 8]}, {"patches per second": [5, 5], "waiting for data, %": [50, 50]},
    ]  # fmt: skip
    assert figures[0].axes[0].get_yscale() == "symlog" and not figures[0].axes[1].lines


def settings(kind="petct", **options):
    config = Config(kind=kind, spacing=(2.0, 4.0, 3.0), patch=(16, 16, 16), overlap=0, amp="none",
                    window_weights="constant", shuffle_edge=4, shuffle_count=2)  # fmt: skip
    return replace(config, **options)


def test_phi_of_a_study_has_the_strength_of_training():
    image = np.arange(2 * 64 * 48 * 64, dtype=np.float32).reshape(2, 64, 48, 64) / 1e5
    state = torch.random.get_rng_state()
    noisy, said = plots.phi_of_study(image, settings(phi="noise"))
    assert (noisy[0] - image[0]).std() == pytest.approx(0.3, rel=0.02) and said == "noise, σ = 0.3"
    assert (plots.phi_of_study(image, settings(phi="noise"))[0] == noisy).all()
    assert torch.equal(state, torch.random.get_rng_state())
    shuffled, said = plots.phi_of_study(image, settings(phi="shuffle"))
    assert said == "96 cubes of 4³"  # 2 of a crop of 16³, 48 crops' worth of voxels
    assert 0.8 * 2 * 64 / 16**3 < (shuffled[0] != image[0]).mean() <= 2 * 64 / 16**3
    np.testing.assert_array_equal(np.sort(shuffled[0], axis=None), np.sort(image[0], axis=None))
    assert (noisy[1] == image[1]).all() and (shuffled[1] == image[1]).all()
    thin = image[:, :3]  # its cubes are as large as fit
    for part, n, said in ((thin, 2, "11 cubes of 3³"), (thin, 0, "0 cubes of 3³"),
                          (image[:, :8, :8, :8], 2, "1 cube of 4³")):  # fmt: skip
        assert plots.phi_of_study(part, settings(phi="shuffle", shuffle_count=n))[1] == said


def test_the_plane_goes_through_the_largest_lesion():
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[2:5, 3:6, 2:6] = truth[5:7, 4, 3] = 1  # the largest: 38 voxels, and most in plane 4
    truth[::3, 15, ::3] = 2  # 49 voxels in one plane, each a lesion of its own
    assert plots.largest_lesion(truth, 1) == 4
    assert plots.largest_lesion(np.zeros_like(truth), 1) == 10


X, Y, Z = np.meshgrid(np.arange(6), np.arange(7), np.arange(8), indexing="ij")
CODE = (100 * X + 10 * Y + Z).astype(np.float32)


class Fixed:
    """A network that puts out the same maps (channels, 6, 7, 8) whatever it sees."""

    def __init__(self, variant, maps):
        self.variant, self.heads, self.eval = variant, ("seg", *variant.tasks), lambda: None
        self.maps = {slot: torch.tensor(np.stack(m))[None].float() for slot, m in maps.items()}
        self.theta = torch.tensor(0.4) if variant.fused else None

    def __call__(self, ct, pet, heads):
        return Output(**{name: self.maps[name] for name in heads})


def row_of(variant, maps, kind="petct", label=0 * X, **options):
    images = np.stack([CODE, CODE / 1000]) * ((X < 5) | (kind == "petct"))  # a head in air
    arrays = {"images": images, "label": label.astype(np.uint8)}
    case, given = SimpleNamespace(load=arrays.get), settings(kind, patch=(6, 7, 8))
    return plots.study_row(Fixed(variant, maps), case, given, "cpu", **options)


@pytest.mark.parametrize("kind", ["petct", "mri"])
def test_a_row_cuts_every_map_in_the_plane_as_radiologists_look(kind):
    label = np.where((X == 1) & (Y == 2) & (Z == 5), 2 if kind == "mri" else 1, 0)
    logits = [0 * X, np.where(X == 3, 1, -1), 0 * X - 2][: 3 if kind == "mri" else 2]
    variant = VARIANTS[kind]["v2-rec" if kind == "mri" else "v2"]
    maps = {"ct": [CODE + 0.5], "pet": logits, "btl": [CODE + 0.25], "seg": logits}
    row, at = row_of(variant, maps, kind, label, seen=np.stack([-CODE, CODE]), paper=True)
    truth, found = row["truth"]["lines"], row["pet"]["lines"]
    if kind == "petct":  # stored L, A, S; the head is above and the patient's left at the right
        assert at == 2 and truth["truth"].sum() == 1 and truth["truth"][2, 1]
        assert found["prediction"][:, 3].all() and found["prediction"].sum() == 8
        corners = {(0, 0): (0, 2, 7), (0, -1): (5, 2, 7), (-1, 0): (0, 2, 0)}
    else:  # stored R, A, S; the nose is above and the patient's left at the right
        assert at == 5 and truth["core"][4, 4] and not truth["edema"].any()
        assert found["edema"][:, 2].all() and found["edema"].sum() == 7
        corners = {(0, 1): (4, 6, 5), (0, -1): (0, 6, 5), (-1, 1): (4, 0, 5)}
        assert (row["seen"]["image"][:, 0] == row["seen"]["image"].min()).all()  # black air
    for place, voxel in corners.items():
        shown, code = [row[n]["image"][place] for n in ("seen", "image", "ct", "btl")], CODE[voxel]
        assert shown == [-code, code / 1000, code + 0.5, code + 0.25]
    seen, image, ct, btl = (row[name]["colors"] for name in ("seen", "image", "ct", "btl"))
    assert seen == ct != btl == image


ROWS = [  # notes on the tasks of a version in examples.png and in the paper's figure; ! is final
    ("petct", "v3", "ct=reconstruction pet=p(lesion) btl=PET_reconstruction",
     "ct=reconstruction pet!=segmentation btl=PET_reconstruction"),
    ("petct", "v4", "ct=p(lesion) pet=p(lesion) seg=p(lesion)",
     "ct=segmentation pet=segmentation btl!=fused,_θ_=_0.4"),
    ("mri", "v2", "ct=p(edema) pet=p(core) btl=p(whole)",
     "ct=edema pet=core btl=whole union!=edema_∪_core"),
    ("mri", "v2-rec", "ct=reconstruction pet=p(whole) btl=T1Gd_reconstruction",
     "ct=reconstruction pet=edema_and_core btl=T1Gd_reconstruction union!=edema_∪_core"),
]  # fmt: skip


@pytest.mark.parametrize("kind, version, told, paper", ROWS)
def test_a_row_has_a_panel_for_each_task(kind, version, told, paper):
    variant, rng = VARIANTS[kind][version], np.random.default_rng(0)
    maps = {s: rng.normal(size=(t.channels, 6, 7, 8)) for s, t in variant.tasks.items()}
    maps["seg"] = rng.normal(size=(1 + len(variant.classes), 6, 7, 8))
    for drawn, expected in ((False, f"{told} mask!="), (True, paper)):
        row, at = row_of(variant, maps, kind, paper=drawn)
        hot = [panel["lines"]["prediction"].sum() for n, panel in row.items() if n == "hot"]
        suv_4 = (CODE >= 267).take(at, 1).sum()  # PET is CODE / 1000, and 1 is SUV 15
        assert hot == [suv_4] * (kind == "petct" and not drawn)
        found = {n: p for n, p in row.items() if n not in ("seen", "image", "hot", "truth")}
        notes = [f"{n}{'!' * p.get('final', 0)}={p['note']}" for n, p in found.items()]
        assert " ".join(note.replace(" ", "_") for note in notes) == expected
        if "fused" in expected:
            found["seg"] = found.pop("btl")
        for slot in {*found} & {*maps}:  # what is drawn is of the slot
            plane, panel = maps[slot].take(at, plots.LOOKS[kind].across + 1), found[slot]
            image = 1 - 1 / np.exp(plane - plane[0]).sum(0) if len(plane) > 1 else plane[0]
            for k, mask in enumerate(panel.get("lines", {}).values(), 1):
                assert mask.sum() == (plane.argmax(0) == k).sum()
            assert "lines" in panel or panel["image"].sum() == pytest.approx(image.sum(), 1e-4)
        figure = plots.draw_grid([row], ["name"], settings(kind), drawn)
        assert [a.spines["top"].get_visible() for a in figure.axes].count(True) == 1


def test_a_task_with_other_classes_needs_no_change_here():
    organs = Task("organs", ("liver", "spleen"), "p(organ)")
    ct, pet = [0 * X, X - 2, 0 * X], [0 * X, 3 - X]
    for target, seg, boxed in (
        ("organs", pet, ["PET branch"]), ("mask", [*ct, pet[1]], ["CT branch", "PET branch"])
    ):  # fmt: skip
        variant = Variant(ct=replace(organs, target=target), pet=LESION)
        row, _ = row_of(variant, {"ct": ct, "pet": pet, "seg": seg}, paper=True)
        figure = plots.draw_grid([row], ["name"], settings(), paper=True)
        assert [a.get_title() for a in figure.axes if a.spines["top"].get_visible()] == boxed
        panel, outlines = row["ct"], texts(figure.legends[0].get_texts())
        if target == "organs":  # of labels that the mask has not: outlines on CT
            assert panel["note"] == "p(organ)" and outlines == ["liver", "prediction"]
            assert (panel["image"] == row["seen"]["image"]).all()
            liver = np.rot90(
                (X > 2)[:, 0]
            )  # in the plane of the other slots, of which all are alike
            assert (panel["lines"]["liver"] == liver).all() and not panel["lines"]["spleen"].any()
        else:
            assert panel["note"] == "liver and spleen" and outlines == ["liver", "lesion"]
            assert len({line.get_color() for line in figure.legends[0].get_lines()}) == 2


def test_examples_of_compared_systems(cases, base, tmp_path, monkeypatch):
    config, drawn = resolve(base, "petct", phantom=False), []
    monkeypatch.setattr(plots, "save", lambda figure, path, **how: drawn.append(figure.axes))
    for network, second in ((Weninger(), "bottleneck"), (Valindria(), "PET branch")):
        plots.examples(tmp_path, network, cases, config, torch.device("cpu"), most=2)
        titles = ["CT", "PET", "CT branch", second, "SUV ≥ 4", "prediction", "truth"]
        assert texts(axis.title for axis in drawn.pop()) == [*titles, *[""] * 7]  # two rows


@pytest.fixture(scope="module")
def runs(base, cases, tmp_path_factory):
    """Untrained runs that test three studies each, and the names of all studies."""
    root, names = tmp_path_factory.mktemp("runs"), sorted(case.name for case in cases)
    for name, first, options in (
        ("v1", 3, {"version": "v1"}), ("v2", 2, {"version": "v2", "phi": "none"}),
        ("v4", 3, {"version": "v4", "phi": None, "theta": 0.3}), ("far", 6, {}),
        ("ct", 3, {"version": "v3_ct_only"}), ("coarse", 3, {"spacing": (20.0, 20.0, 20.0)}),
    ):  # fmt: skip
        config = resolve(replace(base, **options), "petct", phantom=False)
        (root / name).mkdir()
        content = {"model": build_model(config).state_dict(), "epoch": 1, "val_dice": 0.5}
        save_checkpoint(root / name / "best.pt", content)
        save_config(root / name, config, "cpu")
        splits = {"train": [], "val": [], "test": names[first : first + 3]}
        write_json(root / name / "splits.json", splits)
    return root, names


def test_fig_7_has_a_row_per_run_in_the_papers_order(runs, cases):
    root, names = runs
    figure, name, said = plots.qualitative([root / n for n in ("v4", "v2", "v1")])
    largest = max(cases, key=lambda c: (c.name in names[3:5], c.meta["lesion_voxels"]))
    assert name == "fig7" and said.startswith(f"{largest.name}, coronal slice ")
    axes = np.array(figure.axes).reshape(3, 6)
    assert texts(a.yaxis.label for a in axes[:, 0]) == ["v1-noise", "v2", "v4"]
    titles = ["CT, Φ($x_C$)", "PET", "CT branch", "PET branch", "bottleneckor fused", "truth"]
    assert texts(a.title for a in axes[0]) == titles
    assert [a.axison and bool(a.images) for a in axes[:, 4]] == [False, True, True]
    boxed = [[a.images and a.spines["top"].get_visible() for a in row] for row in axes]
    assert [row.index(True) for row in boxed] == [3, 3, 4]
    assert axes[0, 0].get_xlabel() == "noise, σ = 0.3"
    images, at = np.asarray(largest.load("images"), np.float32), int(said.split()[-1])
    model, config, *_ = load_run(root / "v1", "best", {})
    seen, _ = plots.phi_of_study(images, config)  # whose noise the CT branch undoes
    out = plots.all_outputs(model, seen, config, torch.device("cpu"))["ct"]
    for axis, shown in ((axes[0, 0], seen[0]), (axes[1, 0], images[0]), (axes[0, 2], out[0])):
        np.testing.assert_allclose(axis.images[0].get_array(), np.rot90(shown[:, at]), atol=1e-6)
    assert figure.get_figwidth() <= 7.001 and figure.get_figheight() <= 8.801


def test_runs_that_do_not_go_together_and_the_choice_of_the_study(runs, tmp_path):
    root, names = runs
    (tmp_path / "again").symlink_to(root / "v4")
    figure, _, said = plots.qualitative([root / "v4", tmp_path / "again"], names[3])
    found = [text for text in texts(a.yaxis.label for a in figure.axes) if text]
    assert found == ["v4", "again"] and said.startswith(names[3])
    for second, study, message in (
        ("far", None, "No study is in the test part of all"), ("ct", None, "is no Mirror U-Net"),
        ("coarse", None, "kind or spacing differ"), ("nowhere", None, "no such checkpoint"),
        ("v2", names[5], f"--study {names[5]}: not in the test part"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            plots.qualitative([root / "v1", root / second], study)
