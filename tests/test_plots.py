"""plots.py: what the figures of the paper show, from a search and from runs."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_config, make_run, make_trial
from matplotlib.text import Text
from scipy.special import softmax

import plots
from baselines import Valindria, Weninger
from common import UserError
from config import Config, resolve, to_dict
from mirror_unet import VARIANTS, Output, decide, find_variant
from runs import LoadedRun, build_model, save_checkpoint
from tables import PAPER_TABLE2, SHARED_SETS


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plots.plt.close("all")  # also those that a test kept from being saved


@pytest.fixture
def saved(monkeypatch):
    """The figures that would have been written, by the stem of their file."""
    figures = {}

    def keep(figure, *paths, **options):
        figures[paths[0].stem] = figure

    monkeypatch.setattr(plots, "save", keep)
    return figures


def trial(version="v3", **columns):
    """A row of runs.read_trials; without a Dice, one of a trial that waits."""
    row = {
        "version": version,
        "shared": "5",
        "dice": np.nan,
        "kind": "petct",
        "phi": "shuffle",
        "theta": None,
        "lambda_rec": None,
        "lambda_cls": None,
    }
    return {**row, **columns}


def paper_trials(*waiting):
    """A trial for each cell of the paper's Table 2; waiting: numbers of those without a Dice."""
    sets = [" ".join(map(str, layers)) for layers in SHARED_SETS]
    rows = []
    for (version, method), dices in PAPER_TABLE2.items():
        for shared, dice in zip(sets, dices, strict=True):
            options = {"phi": method}
            if version == "v4":
                options = {"phi": "none", "theta": method}
            rows.append(trial(version, shared=shared, dice=dice, **options))
    for number in waiting:
        rows[number]["dice"] = np.nan
    return rows


def lambda_trials():
    """v3 over the 5 x 5 grid, best at λ_rec 1e-4 and λ_class 1e-2; two seeds 1 % off the mean."""
    powers = range(1, 6)
    rows = []
    for i, j, shift in itertools.product(powers, powers, (-1, 1)):
        dice = 60 - abs(i - 4) - 2 * abs(j - 2) + shift
        weights = {"lambda_rec": 10**-i, "lambda_cls": 10**-j}
        rows.append(trial(dice=dice, **weights))
    return rows


def draw(name, rows, about=""):
    """The figure of these trials, its main axis, and what the console says of it."""
    plots.plt.close("all")
    trials = pd.DataFrame(rows)
    row = plots.SEARCH_FIGURES[name]
    trials = trials[trials["version"].isin(row.versions)]
    figure, about = plots.draw_search_figure(row, trials, about)
    return figure, figure.axes[0], about


def lines(axis, look, value):
    """The values of the lines that look so, from left to right."""
    chosen = [line for line in axis.lines if plots.plt.getp(line, look) == value]
    chosen.sort(key=lambda line: list(line.get_xdata())[:1])
    return [list(line.get_ydata()) for line in chosen]


def line(axis, label):
    """The values of the only line with this label."""
    [values] = lines(axis, "label", label)
    return values


def numbers(text):
    return pytest.approx([float(word) for word in text.split()], nan_ok=True)


def texts(things):
    return [thing.get_text().replace("\n", "") for thing in things]


def legend(figure):
    """The words of the figure's only legend."""
    [box] = figure.legends
    return ", ".join(texts(box.get_texts()))


def row_names(figure):
    """The labels at the left of the rows of panels."""
    labels = texts(axis.yaxis.label for axis in figure.axes)
    return [label for label in labels if label]


def test_fig_5_draws_the_bold_numbers_of_table_2():
    rows = paper_trials(51, 58)[::-1]  # in any order; of v3 with L = {5}
    figure, axis, about = draw("fig5_shared", rows)
    assert line(axis, "v1") == list(PAPER_TABLE2["v1", "shuffle"])
    assert line(axis, "v3")[:3] == numbers("63.33 64.55 62.78")
    assert line(axis, "v4") == numbers("61.67 63.78 64.24 63.64 62.30 63.99 60.81")

    assert axis.get_ylabel() == "test Dice (%)"
    names = texts(axis.get_xticklabels())
    assert (names[0], names[-1]) == ("{3}", "{3,4,5,6,7}")
    assert about == axis.get_title(loc="right") == "1 run; 2 of 105 cells missing"
    assert legend(figure) == "v1, v2, v3, v4"


def test_fig_4_has_a_box_per_version_and_phi_over_all_sets():
    figure, axis, about = draw("fig4_phi", paper_trials(1)[1:])  # one waits, one is not planned
    assert about == "1 run; 2 of 63 cells missing"
    medians = [values[0] for values in lines(axis, "linewidth", 1.4)]
    v1, v2, v3 = "61.92 62.34 63.09", "62.15 62.62 63.69", "62.78 63.01 64.00"
    assert medians == numbers(f"{v1} {v2} {v3}")  # no v4
    dots = lines(axis, "marker", "o")
    assert dots[8] == pytest.approx(PAPER_TABLE2["v3", "shuffle"])

    assert texts(axis.get_xticklabels()) == ["v1", "v2", "v3"]
    assert legend(figure) == "L2, L2 + noise, L2 + shuffling"
    hatches = [box.get_hatch() for box in axis.patches[:3]]
    assert hatches == ["////", "", "xxxx"]


def test_fig_6_has_boxes_of_the_fixed_thetas_and_a_star_for_the_learned_one():
    rows = paper_trials(63, 70, 77, 84, 91)  # no fixed θ with L = {3}
    figure, axis, _ = draw("fig6_theta", rows)
    dots = lines(axis, "marker", "o")
    assert dots[0] == []
    assert dots[1] == numbers("63.78 62.66 63.76 62.93 61.84")
    [stars] = lines(axis, "marker", "*")
    assert stars == pytest.approx(PAPER_TABLE2["v4", "learn"])
    whiskers = np.concatenate(lines(axis, "linewidth", 0.7))
    assert np.nanmin(whiskers) == pytest.approx(56.15)  # of the fixed θ, not of the learned one
    assert legend(figure) == "fixed θ, 0.1 to 0.5, learned θ"


def test_lambda_map_shows_means_over_seeds_and_frames_the_best():
    rows = [*lambda_trials(), trial("v2", dice=99)]
    rows[8]["dice"] = rows[9]["dice"] = np.nan  # λ_rec 1e-1, λ_class 1e-5
    _, axis, about = draw("fig_s1_lambdas", rows[::-1])
    values = axis.images[0].get_array()  # rows λ_class, columns λ_rec, both rising
    assert list(values[:, 1]) == numbers("54 56 58 60 58")
    assert list(values[3]) == numbers("59 60 59 58 57")
    missing = np.argwhere(values.mask)
    assert missing.tolist() == [[0, 4]]
    assert axis.get_ylim() == (-0.5, 4.5)
    assert about == "mean of 2 runs (seeds, folds); 1 of 25 cells missing"

    [framed] = [text for text in axis.texts if text.get_bbox_patch()]
    assert framed.get_text() == "60.00"
    assert framed.get_position() == (1, 3)
    assert len(axis.texts) == 24
    assert "10^{-5}" in texts(axis.get_xticklabels())[0]
    assert "rec" in axis.get_xlabel() and "class" in axis.get_ylabel()


@pytest.mark.parametrize("name", plots.SEARCH_FIGURES)
def test_no_text_of_a_figure_is_cut_off_or_too_small(name):
    rows = lambda_trials()[2:]
    if name != "fig_s1_lambdas":
        rows = paper_trials()[1:]
        for layers in ("none", "1 2 3", "1 2 3 4 5 6 7"):
            rows.append(trial("v1", shared=layers, dice=60))
    for row in rows:
        row["kind"] = "mri"
    about = "batch_size 8, weight_decay 1, lr 0.0001, epochs 100, steps 25"  # takes two lines
    figure, axis, _ = draw(name, rows, about)
    figure.draw_without_rendering()
    left, bottom, right, top = figure.get_tightbbox().extents
    width, height = figure.get_size_inches()
    assert min(left, bottom) >= 0
    assert right <= width and top <= height
    assert width == pytest.approx(7 if name == "fig5_shared" else 3.3)
    for text in figure.findobj(Text):
        assert text.get_fontsize() >= 6 or not text.get_text()
    labels = [label.get_window_extent() for label in axis.get_xticklabels()]
    for left, right in itertools.pairwise(labels):
        assert left.x1 < right.x0


def make_search(folder, rows):
    """The folder of a search with finished trials: (version, Dice, options) each."""
    for number, (version, dice, options) in enumerate(rows):
        config = make_config(version, data="x", **options)
        make_trial(folder, f"t{number}", config, searches=["table2"], dice=dice)
    return folder


def test_the_command_writes_what_the_search_compares(tmp_path, capsys):
    make_search(tmp_path, [("v4", 0.6, {"theta": 0.1}), ("v4", 0.7, {"theta": 0.2})])
    plots.plots_command([str(tmp_path)])
    png = tmp_path / "figures" / "fig6_theta.png"
    pdf = png.with_suffix(".pdf")
    assert set(png.parent.iterdir()) == {png, pdf}

    picture = plots.plt.imread(png)
    assert picture.shape[1] == 990  # 3.3 inches at 300 dpi
    assert picture[..., :3].std() > 0.05
    content = pdf.read_bytes()
    assert b"/CIDFontType2" in content
    assert b"/Type3" not in content and b"CreationDate" not in content
    assert capsys.readouterr().out.splitlines() == [
        f"fig6_theta      {png}, .pdf   1 run",
        "fig_s1_lambdas  not drawn: compares lambda_rec and lambda_cls, the search does not",
        "fig4_phi        not drawn: compares phi, the search does not",
        "fig5_shared     not drawn: compares shared, the search does not",
    ]


def test_each_group_of_comparable_trials_has_its_own_figure(tmp_path, capsys, saved):
    rows = [("v3", 0.5, {"seed": 0}), ("v3", 0.7, {"seed": 1})]
    for layers in ((3,), (5,)):
        rows.append(("v3", 0.6, {"shuffle_count": 30, "shared": layers}))
        for theta in (0.1, 0.2):  # --shuffle-count does not apply to v4
            rows.append(("v4", 0.5, {"shared": layers, "theta": theta}))
    plots.draw_search(make_search(tmp_path, rows), tmp_path / "out")

    few, many = "fig5_shared-shuffle_count_default", "fig5_shared-shuffle_count_30"
    assert list(saved) == [few, many, "fig6_theta"]
    assert line(saved[few].axes[0], "v3") == numbers("nan 60")
    assert line(saved[many].axes[0], "v3") == numbers("60 60")
    assert "compares phi, the search does not (shuffle_count default)" in capsys.readouterr().out


def test_curves_show_every_term_of_the_loss(tmp_path, saved):
    metrics = """epoch,loss,rec_ct,organs,grad_rec_ct,val_dice,patches_per_s,data_wait,seconds
1,3,1,2,7,,5,0.5,1
2,2,0.5,-0.1,8,0.25,6,0.5,1
"""
    (tmp_path / "metrics.csv").write_text(metrics)
    plots.draw_curves(tmp_path)
    loss, gradient, dice, speed = saved["curves"].axes  # none for the FPV of healthy studies
    assert line(loss, "rec_ct") == [1, 0.5]
    assert line(loss, "organs") == [2, -0.1]
    assert line(loss, "loss") == [3, 2]
    assert loss.get_yscale() == "symlog"  # a term with a learned weight may be negative
    assert line(gradient, "grad_rec_ct") == [7, 8]
    assert line(dice, "val_dice") == [0.25]
    assert line(speed, "waiting for data, %") == [50, 50]


def test_curves_have_an_axis_for_gates_if_there_are_any(tmp_path, saved):
    metrics = """epoch,loss,seg,gate_ct_5,gate_pet_5,val_dice,patches_per_s,data_wait,seconds
1,3,3,0.01,0.02,,5,0.5,1
2,2,2,0.03,0.04,0.25,6,0.5,1
"""
    (tmp_path / "metrics.csv").write_text(metrics)
    plots.draw_curves(tmp_path)
    loss, dice, speed, gates = saved["curves"].axes  # none for gradients on shared layers
    assert dice.get_ylim() == (0, 1)
    assert speed.get_ylim()[0] == 0
    assert {curve.get_label() for curve in loss.lines} == {"seg", "loss"}
    assert line(gates, "gate_ct_5") == [0.01, 0.03]
    assert line(gates, "gate_pet_5") == [0.02, 0.04]


# ------------------------------------------------------------------ a study in one plane


def settings(kind="petct", **options):
    return Config(
        kind=kind,
        spacing=(2.0, 4.0, 3.0),
        **{"patch": (16, 16, 16), **options},
        overlap=0,
        amp="none",
        window_weights="constant",
        shuffle_edge=4,
    )


def test_phi_of_a_study_has_the_strength_of_training():
    shape = (2, 64, 48, 64)
    images = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 1e5
    config = settings(phi="noise")
    noisy, note = plots.phi_of_study(images, config)
    assert note == "noise, σ = 0.3"
    assert np.std(noisy[0] - images[0]) == pytest.approx(0.3, rel=0.02)
    assert (plots.phi_of_study(images, config).images == noisy).all()
    assert (noisy[1] == images[1]).all()

    config = settings(phi="shuffle", shuffle_count=2)
    shuffled, note = plots.phi_of_study(images, config)
    assert note == "96 cubes of 4³"  # 2 of a crop of 16³; the study has 48 crops' voxels
    share = np.mean(shuffled[0] != images[0]) / (2 * 4**3 / 16**3)
    assert 0.8 < share <= 1
    assert (shuffled[1] == images[1]).all()


@pytest.mark.parametrize(
    "shape, count, note",
    [
        ((3, 48, 64), 2, "11 cubes of 3³"),  # as large as fit into a thin study
        ((3, 48, 64), 0, "0 cubes of 3³"),
        ((8, 8, 8), 2, "1 cube of 4³"),
    ],
)
def test_phi_of_a_small_study(shape, count, note):
    images = np.zeros((2, *shape), np.float32)
    config = settings(phi="shuffle", shuffle_count=count)
    assert plots.phi_of_study(images, config).note == note


def test_the_plane_goes_through_the_largest_lesion():
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[2:5, 3:6, 2:6] = truth[5:7, 4, 3] = 1  # the largest: 38 voxels, and most in plane 4
    truth[::3, 15, ::3] = 2  # 49 voxels in one plane, each a lesion of its own
    assert plots.largest_lesion_plane(truth, axis=1) == 4
    assert plots.largest_lesion_plane(np.zeros_like(truth), axis=1) == 10


SHAPE = (6, 7, 8)
X, Y, Z = np.indices(SHAPE)
CODE = (100 * X + 10 * Y + Z).astype(np.float32)  # tells where a voxel is from
ZERO = np.zeros(SHAPE)
MIDDLE = {"petct": 3, "mri": 4}  # the plane that is cut where there is no lesion


class FixedNetwork:
    """A network that puts out the same maps (channels, 6, 7, 8) whatever it sees."""

    def __init__(self, variant, maps):
        self.variant = variant
        self.heads = ("seg", *variant.tasks)
        self.theta = torch.tensor(0.4) if variant.fused else None
        self.maps = {}
        for head, channels in maps.items():
            self.maps[head] = torch.tensor(np.stack(channels))[None].float()

    def eval(self):
        pass

    def decide(self, foreground):
        return decide(foreground, self.variant)

    def __call__(self, ct, pet, heads):
        return Output(**{head: self.maps[head] for head in heads})


def panels_of(variant, maps, kind="petct", label=ZERO, paper=False):
    """study_panels of a study whose CT is CODE and whose PET is CODE / 1000."""
    images = np.stack([CODE, CODE / 1000])
    if kind == "mri":
        images[:, 5] = 0  # the head lies in air
    arrays = {"images": images, "label": label.astype(np.uint8)}
    case = SimpleNamespace(load=arrays.get)
    phi_input = None
    if paper:
        phi_input = plots.PhiInput(np.stack([-CODE, CODE]), "Φ")
    config = settings(kind, patch=SHAPE)
    loaded = LoadedRun(FixedNetwork(variant, maps), config, "cpu", {})
    return plots.study_panels(loaded, case, phi_input)


CORNERS = {  # upper left, upper right and lower left: the patient's left is at the right
    "petct": "27 527 20",  # stored L, A, S: the head is above; 100 X + 10 Y + Z
    "mri": "562 62 502",  # stored R, A, S: the nose is above
}


@pytest.mark.parametrize("kind", CORNERS)
def test_planes_are_cut_as_radiologists_look(kind):
    plane = plots.cut_plane(CODE, plots.LOOKS[kind], index=2)
    corners = [plane[0, 0], plane[0, -1], plane[-1, 0]]
    assert corners == numbers(CORNERS[kind])


NOTES = """
petct v3 examples ct=reconstruction pet=p(lesion) btl=PET_reconstruction mask!=
petct v3 paper ct=reconstruction pet!=segmentation btl=PET_reconstruction
petct v4 examples ct=p(lesion) pet=p(lesion) seg=p(lesion) mask!=
petct v4 paper ct=segmentation pet=segmentation btl!=fused,_θ_=_0.4
mri v2 examples ct=p(edema) pet=p(core) btl=p(whole) mask!=
mri v2 paper ct=edema pet=core btl=whole union!=edema_∪_core
mri v2-rec examples ct=reconstruction pet=p(whole) btl=T1Gd_reconstruction mask!=
mri v2-rec paper ct=reconstruction pet=edema_and_core btl=T1Gd_reconstruction union!=edema_∪_core
"""  # below the tasks of a version in examples.png and in the paper's figure; ! has the frame


@pytest.mark.parametrize("line", NOTES.strip().splitlines())
def test_a_row_has_a_panel_for_each_task(line):
    kind, version, figure, *expected = line.split()
    paper = figure == "paper"
    variant = VARIANTS[kind][version]
    rng = np.random.default_rng(0)
    channels = {"seg": 1 + len(variant.classes)}
    for slot, task in variant.tasks.items():
        channels[slot] = task.channels
    maps = {slot: rng.normal(size=(count, *SHAPE)) for slot, count in channels.items()}
    panels = panels_of(variant, maps, kind, paper=paper)

    figure = plots.draw_grid([panels], ["name"], settings(kind), paper)
    frames = [axis.spines["top"].get_visible() for axis in figure.axes]
    assert sum(frames) == 1

    notes = []
    for name, panel in panels.items():
        if name not in ("ct_input", "pet_input", "threshold", "truth"):
            frame = "!" if panel.is_final else ""
            notes.append(f"{name}{frame}={panel.note}".replace(" ", "_"))
    assert notes == expected

    # What is drawn is the map of its slot.
    if variant.fused and paper:
        panels["seg"] = panels.pop("btl")
    for slot in panels.keys() & maps.keys():
        plane = plots.cut_plane(maps[slot], plots.LOOKS[kind], MIDDLE[kind])
        labels = plane.argmax(axis=0)
        panel = panels[slot]
        for label, mask in enumerate(panel.outlines.values(), start=1):
            assert (mask == (labels == label)).all()
        if not panel.outlines:
            image = plane[0]
            if len(plane) > 1:
                image = 1 - softmax(plane, axis=0)[0]
            assert np.allclose(panel.image, image, atol=1e-4)


@pytest.mark.parametrize("paper", [False, True])
def test_inputs_truth_and_threshold(paper):
    label = (X == 1) & (Y == 2) & (Z == 5)
    maps = {"ct": [ZERO], "pet": [ZERO, ZERO], "seg": [ZERO, ZERO]}
    panels = panels_of(VARIANTS["petct"]["v1"], maps, label=label, paper=paper)
    plane = np.rot90(CODE[:, 2])
    ct = -plane if paper else plane
    assert np.array_equal(panels["ct_input"].image, ct)
    assert np.allclose(panels["pet_input"].image, plane / 1000)
    truth = panels["truth"].outlines["truth"]
    assert np.argwhere(truth).tolist() == [[2, 1]]

    assert ("threshold" in panels) == (not paper)
    if not paper:  # PET is CODE / 1000, where 1 is SUV 15
        hot = panels["threshold"].outlines["prediction"]
        assert np.array_equal(hot, plane >= 267)


def test_air_is_black_in_mri():
    two = [ZERO, ZERO]
    maps = {"ct": two, "pet": two, "btl": two, "seg": [ZERO] * 3}
    panels = panels_of(VARIANTS["mri"]["v2"], maps, "mri")
    for name in ("ct_input", "pet_input"):
        panel = panels[name]
        assert panel.image[0, 0] == panel.limits[0]


def test_organs_are_outlined_on_ct():
    variant = find_variant("petct", "v5", organs=("liver", "spleen"))
    ct, pet = [ZERO, X - 2, ZERO], [ZERO, 3 - X]
    maps = {"ct": ct, "pet": pet, "btl": [ZERO], "seg": pet}
    panels = panels_of(variant, maps, paper=True)
    panel = panels["ct"]
    assert panel.note == "organs"
    assert np.array_equal(panel.image, -panels["ct_input"].image)
    liver = np.rot90((X > 2)[:, 0])  # all planes are alike
    assert np.array_equal(panel.outlines["liver"], liver)
    assert not panel.outlines["spleen"].any()

    figure = plots.draw_grid([panels], ["name"], settings(), paper=True)
    assert legend(figure) == "liver, prediction"


@pytest.mark.parametrize(
    "network, third",
    [
        (Weninger, "bottleneck"),
        (Valindria, "PET branch"),
    ],
)
def test_examples_of_compared_systems(cases, base, tmp_path, saved, monkeypatch, network, third):
    monkeypatch.setattr(plots, "EXAMPLES", 2)
    config = resolve(base, "petct")
    loaded = LoadedRun(network(), config, torch.device("cpu"), {})
    plots.draw_examples(tmp_path, loaded, cases)
    titles = ["CT", "PET", "CT branch", third, "SUV ≥ 4", "prediction", "truth"]
    axes = saved["examples"].axes
    assert texts(axis.title for axis in axes) == titles + [""] * 7  # two rows

    positive = [case for case in cases if case.has_lesion]
    positive.sort(key=lambda case: -case.meta.lesion_voxels)
    chosen = [positive[0], positive[len(positive) // 2]]
    assert row_names(saved["examples"]) == [case.patient for case in chosen]


# ------------------------------------------------------------------ Fig. 7

RUNS = {  # by name: the first of the three studies that it tests, and its options
    "v1": (3, {"version": "v1"}),
    "v2": (2, {"version": "v2", "phi": "none"}),
    "v4": (3, {"version": "v4", "phi": None, "theta": 0.3}),
    "far": (6, {}),
    "ct": (3, {"version": "v3_ct_only"}),
    "coarse": (3, {"spacing": (20.0, 20.0, 20.0)}),
}


@pytest.fixture(scope="module")
def runs(base, cases, tmp_path_factory):
    """The folder of the untrained RUNS, and the names of all studies."""
    root = tmp_path_factory.mktemp("runs")
    names = sorted(case.name for case in cases)
    for name, (first, options) in RUNS.items():
        config = resolve(replace(base, **options), "petct")
        tested = [{"study": study} for study in names[first : first + 3]]
        run = make_run(root, name, config, tested)
        content = {
            "model": build_model(config).state_dict(),
            "config": to_dict(config, weights_only=True),
            "epoch": 1,
            "val_dice": 0.5,
        }
        save_checkpoint(run / "best.pt", content)
    return root, names


def draw_runs(folders, out, capsys, study=None):
    """What the console says of the figure of these runs."""
    plots.draw_qualitative(folders, study, {}, out)
    return capsys.readouterr().out


def test_fig_7_has_a_row_per_run_in_the_papers_order(runs, cases, tmp_path, saved, capsys):
    root, names = runs
    about = draw_runs([root / "v4", root / "v2", root / "v1"], tmp_path, capsys)
    tested = [case for case in cases if case.name in names[3:5]]  # by all three
    largest = max(tested, key=lambda case: case.meta.lesion_voxels)
    plane = plots.largest_lesion_plane(largest.load("label"), 1)
    assert about.endswith(f"{largest.name}, coronal slice {plane}\n")

    figure = saved["fig7"]
    axes = np.array(figure.axes).reshape(3, 6)
    assert row_names(figure) == ["v1-noise", "v2", "v4"]
    titles = ["CT, Φ($x_C$)", "PET", "CT branch", "PET branch", "bottleneckor fused", "truth"]
    assert texts(axis.title for axis in axes[0]) == titles
    fifth = [bool(axis.images) for axis in axes[:, 4]]
    assert fifth == [False, True, True]
    for row, framed in zip(axes, (3, 3, 4), strict=True):
        assert row[framed].spines["top"].get_visible()
    assert axes[0, 0].get_xlabel() == "noise, σ = 0.3"
    assert figure.get_figwidth() <= 7.001
    assert figure.get_figheight() <= 8.801


def test_equal_rows_of_fig_7_have_the_names_of_their_runs(runs, tmp_path, saved, capsys):
    root, names = runs
    (tmp_path / "again").symlink_to(root / "v4")
    folders = [root / "v4", tmp_path / "again"]
    about = draw_runs(folders, tmp_path, capsys, names[3])
    assert row_names(saved["fig7"]) == ["v4", "again"]
    assert names[3] in about


BAD_RUNS = {  # beside v1
    "far": "No study is in the test part of all",
    "ct": "this is no Mirror U-Net",
    "coarse": "kind or spacing differ",
    "nowhere": "no such checkpoint",
}


@pytest.mark.parametrize("second", BAD_RUNS)
def test_runs_that_do_not_go_together_are_refused(runs, tmp_path, capsys, second):
    root, _ = runs
    with pytest.raises(UserError, match=BAD_RUNS[second]):
        draw_runs([root / "v1", root / second], tmp_path, capsys)


def test_a_study_that_not_all_runs_test_is_refused(runs, tmp_path, capsys):
    root, names = runs
    with pytest.raises(UserError, match=f"--study {names[5]}: not in the test part"):
        draw_runs([root / "v1", root / "v2"], tmp_path, capsys, names[5])
