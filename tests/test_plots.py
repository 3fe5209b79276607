"""plots.py: what is drawn in the figures of the paper, from a search and from runs."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import matplotlib.text
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import las, petct_arrays, write_nifti
from matplotlib.patches import PathPatch, Rectangle

import eval as evaluation
import plots
import train
from data import Case, UserError, write_json

ROOT = Path(__file__).parent.parent
SETS = ["3", "4", "5", "6", "7", "4 5 6", "3 4 5 6 7"]
TABLE_2 = """
v1 none    57.39 62.88 61.92 61.91 62.06 62.08 58.06
v1 noise   59.76 62.83 62.34 62.21 62.65 62.36 60.86
v1 shuffle 62.75 63.97 64.57 63.80 63.09 63.01 62.72
v2 none    58.42 63.34 62.15 61.74 62.24 62.49 59.00
v2 noise   59.96 64.00 62.62 62.21 62.85 63.01 61.44
v2 shuffle 63.15 64.28 65.50 64.08 63.69 63.29 63.33
v3 none    59.12 63.36 62.78 62.25 63.01 63.22 60.01
v3 noise   60.23 64.33 63.01 62.89 63.22 63.30 60.51
v3 shuffle 63.33 64.55 65.91 64.44 64.00 63.43 63.34
v4 0.1     59.61 63.78 63.65 63.23 60.58 61.79 60.81
v4 0.2     58.65 62.66 64.24 63.35 62.30 63.99 56.79
v4 0.3     61.67 63.76 64.22 62.26 61.89 61.33 58.21
v4 0.4     58.95 62.93 58.43 63.64 56.15 60.69 59.40
v4 0.5     59.86 61.84 61.00 62.48 60.38 60.51 57.79
v4 learn   60.89 60.94 60.81 58.48 56.52 59.63 47.42
"""
LAMBDAS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]


@pytest.fixture(autouse=True)
def tidy():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    plots.plt.close("all")


def trial(version="v3", shared="5", dice=None, **options):
    """A row of results.csv; without a Dice, of a trial that waits."""
    row = {"trial": "", "search": "mine", "status": "waiting" if dice is None else "done"}
    row |= {"reason": None, "kind": "petct"}
    row |= {"version": version, "shared": shared, "phi": "shuffle", "theta": None}
    row |= {"lambda_rec": 1e-4, "lambda_cls": 1e-3 if version == "v3" else None, "lr": 1e-3}
    row |= {"seed": 0, "epochs": 400, "epochs_done": 400, "val_dice": 0.9, "test_dice": dice}
    return row | options


def write_search(folder, rows):
    folder.mkdir(exist_ok=True)
    frame = pd.DataFrame(rows).assign(trial=[f"t{i}" for i in range(len(rows))])
    frame.to_csv(folder / "results.csv", index=False)
    return folder


def search(tmp_path, rows):
    return plots.read_trials(write_search(tmp_path / "search", rows) / "results.csv")


def table_2():
    rows = []
    for line in TABLE_2.strip().splitlines():
        version, method, *values = line.split()
        own = {"phi": "none", "theta": method} if version == "v4" else {"phi": method}
        pairs = zip(SETS, values, strict=True)
        rows += [trial(version, layers, float(v) / 100, **own) for layers, v in pairs]
    return rows


def boxes(axis):
    """Middle, quartiles of every box, from left to right."""
    ends = [p.get_path().get_extents() for p in axis.patches if isinstance(p, PathPatch)]
    return sorted(((e.x0 + e.x1) / 2, e.y0, e.y1) for e in ends)


def medians(axis):
    """The thick lines of the boxes, from left to right."""
    thick = [line for line in axis.get_lines() if line.get_linewidth() == 1.4]
    return [y for _, y in sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in thick)]


def dots(axis, marker="o"):
    """The values of each group of dots, from left to right."""
    lines = [line for line in axis.get_lines() if line.get_marker() == marker]
    return [list(line.get_ydata()) for line in sorted(lines, key=lambda n: n.get_xdata()[0])]


def labels(axis):
    return [text.get_text().replace("\n", "") for text in axis.get_xticklabels()]


# ------------------------------------------------------------------ results.csv


def test_trials_keep_sets_and_theta_as_text(tmp_path):
    rows = [trial(dice=0.5), trial(shared="none", phi="none"), trial("v4", theta="0.20", dice=0.4)]
    rows[1]["reason"] = "NA"
    trials = search(tmp_path, rows)
    assert list(trials["shared"]) == ["5", "none", "5"]
    assert list(trials["phi"]) == ["shuffle", "none", "shuffle"]
    assert trials["theta"].isna().tolist() == [True, True, False] and trials["theta"][2] == "0.20"
    assert trials["test_dice"].isna().tolist() == [False, True, False]
    assert trials["reason"][1] == "NA"  # only an empty field is no value
    assert trials["dice"].fillna(0).tolist() == [50, 0, 40]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"", "not the results of a search"),
        (b"\xff\xfe\x00\x80", "not the results of a search"),
        (b"study,dice\na,0.5\n", "no column trial, search, status"),
        (b"1,2\n3,4,5\n6,7,8,9,10\n", "not the results of a search"),
    ],
)
def test_a_foreign_file_is_named(tmp_path, content, message):
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        plots.read_trials(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_search_without_results_and_a_dice_that_is_no_number(tmp_path):
    with pytest.raises(UserError, match="not the results of a search"):
        search(tmp_path, [trial(dice="good"), trial(dice=0.5)])
    write_search(tmp_path / "search", [trial()])
    with pytest.raises(UserError, match="none of its 1 trials has a test Dice yet"):
        plots.draw_search(tmp_path / "search", tmp_path / "figures")


def test_searches_that_share_a_folder_do_not_mix(tmp_path):
    names = ("layers", "lambdas", "free", "mine", "theta lambdas", "table2", "")
    trials = search(tmp_path, [trial("v3", "5", 0.5, search=name) for name in names])
    for table, expected in (
        ("lambdas", {"lambdas", "mine", "theta lambdas"}),
        ("table 2", {"layers", "mine", "theta lambdas", "table2"}),
    ):
        [(about, part)] = plots.comparable(trials, table)
        assert set(part["search"]) == expected and about == ""


def test_only_comparable_trials_share_a_figure(tmp_path):
    """Those that differ in what is compared, in seed or place, or in what one does not read."""
    rows = [
        trial("v1", "5", 0.60, seed=0, workers=1, phi="noise", noise_sigma=0.3),
        trial("v1", "3", 0.50, seed=1, workers=2, phi="none"),  # reads no noise_sigma
        trial("v1", "5", 0.10, lr=1e-2, phi="noise", noise_sigma=0.3),
        trial("v1", "5", 0.20, phi="noise", noise_sigma=0.1),
        trial("v1", "5", None, phi="noise", noise_sigma=0.1, lr=5e-5),  # waits
    ]
    trials = search(tmp_path, rows)
    found = {about: sorted(part["trial"]) for about, part in plots.comparable(trials, "table 2")}
    assert found == {
        "noise_sigma 0.3, lr 0.001": ["t0", "t1"],
        "noise_sigma 0.1, lr 0.001": ["t1", "t3"],
        "noise_sigma 0.3, lr 0.01": ["t2"],
        "noise_sigma 0.1, lr 5e-05": ["t4"],
    }


# --------------------------------------------------------------- Figs. 4-6 of the paper's Table 2


def test_fig_5_draws_the_bold_numbers_of_table_2(tmp_path):
    figure, said = plots.shared_curves(search(tmp_path, table_2()[::-1]))  # rows in any order
    [axis] = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert lines == {
        "v1": pytest.approx([62.75, 63.97, 64.57, 63.80, 63.09, 63.01, 62.72]),
        "v2": pytest.approx([63.15, 64.28, 65.50, 64.08, 63.69, 63.29, 63.33]),
        "v3": pytest.approx([63.33, 64.55, 65.91, 64.44, 64.00, 63.43, 63.34]),
        "v4": pytest.approx([61.67, 63.78, 64.24, 63.64, 62.30, 63.99, 60.81]),
    }
    assert labels(axis) == ["{3}", "{4}", "{5}", "{6}", "{7}", "{4,5,6}", "{3,4,5,6,7}"]
    assert said == axis.get_title(loc="right") == "1 seed" and "%" in axis.get_ylabel()
    for look in ("get_color", "get_marker", "get_linestyle"):  # told apart in grey as well
        assert len({getattr(line, look)() for line in axis.get_lines()}) == 4


def test_fig_4_has_a_box_per_version_and_phi_over_all_sets(tmp_path):
    figure, _ = plots.phi_boxes(search(tmp_path, table_2()))
    [axis] = figure.axes
    found = boxes(axis)
    assert len(found) == 9  # v1, v2, v3, each plain, with noise, shuffled; no v4
    assert found[0][1:] == pytest.approx((59.985, 62.07))  # v1, L2
    assert [round(x) for x, *_ in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    expected = [61.92, 62.34, 63.09, 62.15, 62.62, 63.69, 62.78, 63.01, 64.00]
    assert medians(axis) == pytest.approx(expected)
    assert dots(axis)[8] == pytest.approx([63.33, 64.55, 65.91, 64.44, 64.00, 63.43, 63.34])
    assert labels(axis) == ["v1", "v2", "v3"]
    [legend] = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["L2", "L2 + noise", "L2 + shuffling"]
    hatches = [p.get_hatch() for p in axis.patches[:3]]
    assert len(set(hatches)) == 3
    for patch, handle in zip(axis.patches[:3], legend.get_patches(), strict=True):
        assert patch.get_facecolor() == handle.get_facecolor()
        assert (patch.get_hatch() or "") * 2 == (handle.get_hatch() or "")


def test_fig_6_boxes_hold_the_fixed_thetas_and_the_learned_one_is_beside(tmp_path):
    figure, _ = plots.theta_boxes(search(tmp_path, table_2()))
    [axis] = figure.axes
    found = boxes(axis)
    assert len(found) == 7 and found[2][1:] == pytest.approx((61.00, 64.22))  # L = {5}
    assert medians(axis)[2] == pytest.approx(63.65)
    assert dots(axis)[2] == pytest.approx([63.65, 64.24, 64.22, 58.43, 61.00])
    [learned] = dots(axis, "*")
    assert learned == pytest.approx([60.89, 60.94, 60.81, 58.48, 56.52, 59.63, 47.42])
    whiskers = [line for line in axis.get_lines() if line.get_marker() in ("None", "")]
    low = min(min(line.get_ydata()) for line in whiskers)
    assert low == pytest.approx(56.15)  # whiskers reach the worst fixed θ, not the learned one
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["fixed θ, 0.1 to 0.5", "learned θ"]


def test_an_unfinished_search_draws_what_is_there_and_counts_the_rest(tmp_path):
    rows = table_2()
    for row in rows:
        if (row["version"], row["shared"]) == ("v3", "5"):
            row |= {"status": "running", "test_dice": None}
    del rows[0]  # a cell that is not even planned is missing too
    trials = search(tmp_path, rows)
    figure, said = plots.shared_curves(trials)
    v3 = list(figure.axes[0].get_lines()[2].get_ydata())
    assert np.isnan(v3[2]) and v3[3] == pytest.approx(64.44)
    assert said == "1 seed; 4 of 105 cells missing"
    figure, said = plots.phi_boxes(trials)
    assert said == "1 seed; 4 of 63 cells missing"
    assert [len(values) for values in dots(figure.axes[0])] == [6, 7, 7, 7, 7, 7, 6, 6, 6]
    assert plots.theta_boxes(trials)[1] == "1 seed"


def test_other_sets_follow_those_of_the_paper(tmp_path):
    sets = ["none", "4 5", "8", "5", "4 5 6", "3"]
    rows = [trial("v1", layers, 0.5 + i / 100) for i, layers in enumerate(sets)]
    [axis] = plots.shared_curves(search(tmp_path, rows))[0].axes
    assert labels(axis) == ["{3}", "{5}", "{4,5,6}", "none", "{8}", "{4,5}"]
    assert list(axis.get_lines()[0].get_ydata()) == pytest.approx([55, 53, 54, 50, 52, 51])


def test_brain_tumours_are_compared_by_the_whole_tumour(tmp_path):
    rows = [
        trial(
            version, layers, None, kind="mri", phi="none", test_dice_whole=dice, test_dice_core=0.1
        )
        for version, layers, dice in (("v2", "5", 0.9), ("v2", "3", 0.8), ("v1", "5", 0.7))
    ]
    [axis] = plots.shared_curves(search(tmp_path, rows))[0].axes
    v1, v2 = axis.get_lines()
    assert list(v2.get_ydata()) == pytest.approx([80, 90]) and v1.get_ydata()[1] == 70
    assert "whole tumour" in axis.get_ylabel()


# ------------------------------------------------------------------ Fig. 1 of the supplement


def lambda_rows(seeds=(0, 1)):
    """v3 over the 5 x 5 grid; best at λ_rec 1e-4, λ_class 1e-2; seeds are 1 % around the mean."""
    return [
        trial(dice=0.6 - 0.01 * abs(i - 3) - 0.02 * abs(j - 1) + 0.01 * (2 * seed - 1) * side,
              lambda_rec=rec, lambda_cls=cls, seed=seed)
        for i, rec in enumerate(LAMBDAS)
        for j, cls in enumerate(LAMBDAS)
        for seed, side in zip(seeds, (1, 1), strict=False)
    ]  # fmt: skip


def test_lambda_map_shows_means_over_seeds_and_frames_the_best(tmp_path):
    rows = lambda_rows()
    lost = [r for r in rows if r["lambda_rec"] == 1e-1 and r["lambda_cls"] == 1e-5]
    for row in lost:
        row |= {"status": "failed", "test_dice": None}
    rows += [trial("v2", "5", 0.99)]  # of another version
    figure, said = plots.lambda_map(search(tmp_path, rows[::-1]))
    axis, bar = figure.axes
    values = axis.images[0].get_array()  # rows λ_class, columns λ_rec, both rising
    away = np.abs(np.arange(5)[::-1] - 3), np.abs(np.arange(5)[::-1] - 1)
    expected = 60 - away[0][None, :] - 2.0 * away[1][:, None]
    assert values.mask.sum() == 1 and values.mask[0, 4]
    np.testing.assert_allclose(values.compressed(), expected[~values.mask])
    assert said == axis.get_title(loc="right") == "mean of 2 seeds; 1 of 25 cells missing"
    [frame] = [p for p in axis.patches if isinstance(p, Rectangle)]
    middle = frame.get_x() + frame.get_width() / 2, frame.get_y() + frame.get_height() / 2
    assert middle == pytest.approx((1, 3))
    assert labels(axis) == [f"$10^{{-{k}}}$" for k in (5, 4, 3, 2, 1)]
    assert [t.get_text() for t in axis.get_yticklabels()] == labels(axis)
    assert "rec" in axis.get_xlabel() and "class" in axis.get_ylabel()
    assert axis.get_ylim() == (-0.5, 4.5)
    texts = {t.get_position(): t for t in axis.texts}
    assert texts[1, 3].get_text() == "60.00" and texts[1, 3].get_weight() == "bold"
    assert texts[4, 0].get_text() == "" and texts[0, 0].get_text() == "53.00"
    assert "Dice (%)" in bar.get_ylabel()


def test_a_cell_with_fewer_seeds_counts_and_is_told(tmp_path):
    rows = lambda_rows()
    rows[1]["test_dice"] = None
    figure, said = plots.lambda_map(search(tmp_path, rows))
    assert said == "mean of 1 to 2 seeds"
    assert figure.axes[0].images[0].get_array()[4, 4] == pytest.approx(54)  # seed 0 alone, 55 - 1


def test_a_part_of_another_is_no_group(tmp_path):
    """The second trial's λ_class parts it from the third, which reads no σ of the noise."""
    rows = [
        trial("v1", "5", 0.6, phi="noise", noise_sigma=0.3),
        trial("v3", "5", 0.5, phi="noise", noise_sigma=0.5, lambda_cls=1e-1),
        trial("v3", "5", 0.4, phi="none", lambda_cls=1e-5),
    ]
    parts = [part for _, part in plots.comparable(search(tmp_path, rows), "table 2")]
    assert [list(part["trial"]) for part in parts] == [["t0", "t2"], ["t1"]]


def test_brain_tumour_versions_share_a_figure_with_the_weights_that_are_their_own(tmp_path):
    rows = [
        trial(version, layers, None, kind="mri", phi="none", test_dice_whole=0.5, lambda_seg=weight)
        for version, weight in (("v1", 1 / 3), ("v2", 1 / 3), ("v2-rec", 0.5))
        for layers in ("3", "5")
    ]
    [(about, part)] = plots.comparable(search(tmp_path, rows), "table 2")
    assert about == "" and len(part) == 6
    rows[0]["lambda_seg"] = 0.1
    assert len(plots.comparable(search(tmp_path, rows), "table 2")) == 3


def test_figures_are_grouped_by_the_trials_that_they_draw(tmp_path):
    """Neither v3_ct_only nor what v3 alone reads parts the figure of v4."""
    rows = [trial("v4", s, 0.5, phi="none", theta=t) for s in ("3", "5") for t in ("0.1", "0.2")]
    rows += [trial(dice=0.6, shuffle_count=n) for n in (1, 30)]
    rows += [trial("v3_ct_only", dice=0.6, modality="ct")]
    plots.draw_search(write_search(tmp_path / "search", rows), tmp_path / "out")
    found = {path.stem for path in (tmp_path / "out").iterdir()}
    assert found == {"fig5_shared-shuffle_count_1", "fig5_shared-shuffle_count_30", "fig6_theta"}


def test_each_setting_has_its_own_figure(tmp_path, capsys):
    rows = [trial("v1", s, d, lr=lr, seed=k) for s, d, lr, k in (
        ("5", 0.60, 1e-3, 0), ("5", 0.64, 1e-3, 1), ("5", 0.65, 1e-2, 0), ("5", 0.55, 1e-2, 1),
        ("3", 0.50, 1e-3, 0), ("3", 0.52, 1e-3, 1),
    )]  # fmt: skip
    trials = search(tmp_path, rows)
    (about, part), (other, rest) = plots.comparable(trials, "table 2")
    assert (about, other) == ("lr 0.001", "lr 0.01")
    figure, said = plots.shared_curves(part, about)
    assert list(figure.axes[0].get_lines()[0].get_ydata()) == pytest.approx([51, 62])
    assert said == figure.axes[0].get_title(loc="right") == "mean of 2 seeds; lr 0.001"
    plots.draw_search(tmp_path / "search", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "fig5_shared-lr_0.001.png",
        "fig5_shared-lr_0.001.pdf",
    }
    said = capsys.readouterr().out
    assert "fig5_shared     not drawn: compares sets L, the search does not (lr 0.01)" in said


# ------------------------------------------------------------------ files and the command


def test_the_command_writes_what_the_search_compares(tmp_path, capsys):
    folder = write_search(tmp_path / "search", table_2())
    plots.run_command([str(folder)])
    names = ["fig4_phi", "fig5_shared", "fig6_theta"]
    found = {p.name for p in (folder / "figures").iterdir()}  # and no trial's folder is needed
    assert found == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    for name in names:
        picture = matplotlib.image.imread(folder / "figures" / f"{name}.png")
        assert picture.shape[1] == 990 and picture[..., :3].std() > 0.05  # 3.3 in at 300 dpi
        pdf = (folder / "figures" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/CIDFontType2" in pdf and b"/Type3" not in pdf
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*names, "fig_s1_lambdas"]
    assert "not drawn: compares λ of v3" in lines[3]
    plots.run_command([str(write_search(folder, lambda_rows())), "--out", str(tmp_path / "out")])
    assert {p.stem for p in (tmp_path / "out").iterdir()} == {"fig_s1_lambdas"}


def test_no_text_of_a_figure_is_cut_off_or_too_small(tmp_path):
    rows = table_2() + [trial("v1", " ".join("12345678"[: n + 2]), 0.6) for n in range(3)]
    trials = search(tmp_path, rows[1:])
    grid = search(tmp_path, lambda_rows()[:-1])
    about = "batch_size 8, weight_decay 1, lr 0.0001, schedule poly, clip 1"  # two lines with it
    for table, _, draw in plots.SEARCH_FIGURES.values():
        figure, _ = draw(grid if table == "lambdas" else trials, about)
        figure.draw_without_rendering()
        extent, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(extent.x0, extent.y0, width - extent.x1, height - extent.y1) >= 0
        sizes = [n.get_fontsize() for n in figure.findobj(matplotlib.text.Text) if n.get_text()]
        assert min(sizes) >= 6
        for axis in figure.axes:
            along = [t.get_window_extent() for t in axis.get_xticklabels() if t.get_text()]
            assert all(a.x1 < b.x0 for a, b in zip(along, along[1:], strict=False))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Give the folder of a search"),
        (["{tmp}/search", "--qualitative", "x"], "Give the folder of a search"),
        (["{tmp}/nowhere"], "nowhere/results.csv: No such file"),
        (["{tmp}/search", "--study", "a"], "go with --qualitative"),
        (["{tmp}/search", "--device", "cpu"], "go with --qualitative"),
        (["{tmp}/search"], "no figure to draw"),
        (["--qualitative", "{tmp}/search"], "say where to with --out"),
        (["--qualitative", "{tmp}/search", "--out", "{tmp}/o"], "no such checkpoint"),
    ],
)
def test_bad_commands_end_with_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    write_search(tmp_path / "search", [trial(dice=0.5)])
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["plots.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        plots.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.startswith("error: ") and message in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "search" / "figures").exists() and not (tmp_path / "o").exists()


def test_the_script_itself(tmp_path):
    command = [sys.executable, str(ROOT / "plots.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- Φ and the plane of Figs. 7 and 8


def settings(phi, **options):
    given = {"noise_sigma": 0.3, "shuffle_edge": 4, "shuffle_count": 2, "patch": (16, 16, 16)}
    return SimpleNamespace(**{"phi": phi, "seed": 3} | given | options)


def test_noise_of_a_study_has_the_largest_sigma():
    image = np.random.default_rng(0).random((2, 32, 24, 40)).astype(np.float32)
    state = torch.random.get_rng_state()
    seen, said = plots.phi_of_study(image, settings("noise"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert (seen[0] - image[0]).std() == pytest.approx(0.3, rel=0.02) and "0.3" in said
    np.testing.assert_array_equal(seen[1], image[1])
    again, _ = plots.phi_of_study(image, settings("noise"))
    other, _ = plots.phi_of_study(image, settings("noise", seed=4))
    assert (again == seen).all() and not (other == seen).all()
    plain, said = plots.phi_of_study(image, settings("none"))
    assert (plain == image).all() and said == ""


def test_shuffling_touches_the_share_of_a_training_crop():
    image = np.arange(2 * 64 * 48 * 64, dtype=np.float32).reshape(2, 64, 48, 64)
    seen, said = plots.phi_of_study(image, settings("shuffle"))
    assert said == "96 cubes of 4³"  # 2 of a crop of 16³, 48 crops' worth of voxels
    touched = (seen[0] != image[0]).mean()
    assert 0.8 * 2 * 64 / 16**3 < touched <= 2 * 64 / 16**3
    np.testing.assert_array_equal(np.sort(seen[0], axis=None), image[0].ravel())
    np.testing.assert_array_equal(seen[1], image[1])
    thin = image[:, :3]  # thinner than a cube: cubes as large as fit
    assert plots.phi_of_study(thin, settings("shuffle"))[1] == "11 cubes of 3³"
    assert plots.phi_of_study(image[:, :8, :8, :8], settings("shuffle"))[1] == "1 cube of 4³"
    assert plots.phi_of_study(thin, settings("shuffle", shuffle_count=0))[1] == "0 cubes of 3³"


def test_the_plane_goes_through_the_largest_lesion():
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[2:5, 3:6, 2:6] = 1  # the largest: 36 voxels, and most of it in plane 4
    truth[6, 4, 3], truth[5, 4, 3] = 1, 1
    truth[::3, 15, ::3] = 2  # 49 voxels in one plane, each a lesion of its own
    assert plots.largest_lesion(truth, 1) == 4
    assert plots.largest_lesion(np.zeros_like(truth), 1) == 10


@pytest.mark.parametrize("kind", ["petct", "mri"])
def test_a_view_cuts_every_map_in_the_plane_as_radiologists_look(monkeypatch, kind):
    shape = (6, 7, 8)
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    code = (100 * x + 10 * y + z).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[1, 2, 5] = 2 if kind == "mri" else 1
    case = Case({}, arrays={"images": np.stack([code, code + 1000]), "label": label})
    version = "v2" if kind == "mri" else "v3"
    model = SimpleNamespace(variant=plots.VARIANTS[kind][version])
    margin = np.where(x == 3, 1.0, -1.0)[None].repeat(len(model.variant.classes), 0)
    monkeypatch.setattr(plots, "all_outputs", lambda model, image, *a: {
        "margin": margin.copy(), "pet_rec": image[:1] + 0.5,
    })  # fmt: skip
    config = SimpleNamespace(kind=kind, spacing=(2.0, 4.0, 3.0))
    view = plots.View(model, case, config, None, np.stack([-code, code]))
    if kind == "petct":  # stored L, A, S; the head is above and the patient's left at the right
        assert view.at == 2 and view.aspect == 1.5
        top_left, top_right, bottom_left = (0, 2, 7), (5, 2, 7), (0, 2, 0)
        assert view.maps["true lesion"].sum() == 1 and view.maps["true lesion"][2, 1]
        assert view.maps["found lesion"][:, 3].all() and view.maps["found lesion"].sum() == 8
    else:  # stored R, A, S; the nose is above and the patient's left at the right
        assert view.at == 5 and view.aspect == 2
        top_left, top_right, bottom_left = (5, 6, 5), (0, 6, 5), (5, 0, 5)
        assert view.maps["true core"][4, 4] and view.maps["true whole"].sum() == 1
        assert not view.maps["true edema"].any() and view.maps["found whole"].sum() == 7
    for corner, at in ((top_left, (0, 0)), (top_right, (0, -1)), (bottom_left, (-1, 0))):
        value = code[corner]
        assert view.maps["ct"][at] == value and view.maps["pet"][at] == value + 1000
        assert view.maps["seen"][at] == -value and view.maps["pet_rec"][at] == -value + 0.5


# ------------------------------------------------------------------ Figs. 7 and 8


def untrained(folder, data, names, test, version, spacing, **options):
    """A run as train.py leaves it, but for its training."""
    config = train.Config(
        version=version, data=str(data), cache=str(data.parent / "cache"), device="cpu", threads=1,
        workers=0, amp="none", patch=(16, 16, 16), spacing=spacing, **options,
    )  # fmt: skip
    config = train.resolve(config, "mri" if spacing[0] == 1 else "petct", phantom=False)
    folder.mkdir()
    content = {"model": train.build_model(config).state_dict(), "epoch": 1, "val_dice": 0.5}
    train.save_checkpoint(folder / "best.pt", content)
    write_json(folder / "config.json", {"config": train.plain(config)})
    rest = [name for name in names if name not in test]
    write_json(folder / "splits.json", {"train": rest[:1], "val": rest[1:], "test": test})
    return folder


@pytest.fixture(scope="module")
def petct(tmp_path_factory):
    """Untrained runs in a folder and their five studies; the third has the largest lesion."""
    root = tmp_path_factory.mktemp("fig7")
    for i in range(5):
        arrays = petct_arrays(i, lesion=i > 0)
        if i == 2:
            arrays["SEG"][6:14, 4:12, 9:13] = 1
        folder = root / "data" / f"PETCT_{i:010x}" / "01-01-2000-NA-PET-CT"
        for stem, array in arrays.items():
            write_nifti(folder / f"{stem}.nii.gz", array, las())
    names = sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in root.rglob("SUV.nii.gz"))
    spacing = (4.0, 4.0, 5.0)
    for version, phi in (("v1", "noise"), ("v1", "shuffle"), ("v2", "none"), ("v3", None)):
        test = names[2:] if version == "v3" else names[1:4]
        run = root / f"{version}-{phi or 'shuffle'}"
        untrained(run, root / "data", names, test, version, spacing, phi=phi)
    untrained(root / "v4", root / "data", names, names[1:4], "v4", spacing, theta=0.4, shared=())
    untrained(root / "other", root / "data", names, names[:2], "v2", spacing)
    untrained(root / "nnunet", root / "data", names, names[1:4], "nnunet", spacing)
    untrained(root / "coarse", root / "data", names, names[1:4], "v2", (8.0, 8.0, 8.0))
    return root, names


def panels(figure, columns):
    return np.array(figure.axes).reshape(-1, columns)


def boxed(axis):
    return any(spine.get_visible() for spine in axis.spines.values()) and axis.get_frame_on()


def shown(axis):
    return np.asarray(axis.images[0].get_array())


def test_fig_7_has_a_row_per_run_in_the_papers_order(petct):
    root, names = petct
    order = ["v1-noise", "v1-shuffle", "v2-none", "v3-shuffle", "v4"]
    figure, name, said = plots.qualitative([root / n for n in reversed(order)])
    assert name == "fig7" and said.startswith(f"{names[2]}, coronal slice ")
    axes = panels(figure, 6)
    said_rows = [axis.get_ylabel() for axis in axes[:, 0]]
    assert said_rows == ["v1-noise", "v1-shuffle", "v2", "v3-shuffle", "v4"]
    titles = [axis.get_title().split("\n")[0] for axis in axes[0]]
    assert titles == ["CT, Φ($x_C$)", "PET", "CT branch", "PET branch", "bottleneck", "truth"]
    # the final segmentation: of the PET branch, for v4 fused; no other panel is in a box
    assert [np.flatnonzero([boxed(a) for a in row]).tolist() for row in axes] == [[3]] * 4 + [[4]]
    # v1 has neither a bottleneck decoder nor a fusion
    assert [bool(row[4].images) for row in axes] == [False, False, True, True, True]
    notes = [row[4].get_xlabel() for row in axes[2:]]
    assert notes == ["reconstruction", "reconstruction", "fused, θ = 0.4"]

    case, config, model = opened(root / "v1-noise", names[2])
    image = np.asarray(case.load("images"), np.float32)
    truth = np.asarray(case.load("label"))
    at = int(said.split()[-1])
    assert at == (truth > 0).sum((0, 2)).argmax()
    seen, _ = plots.phi_of_study(image, config)
    for row, ct in zip(axes, [seen, None, image, None, image], strict=True):
        if ct is not None:
            np.testing.assert_array_equal(shown(row[0]), np.rot90(ct[0][:, at]))
        np.testing.assert_array_equal(shown(row[1]), np.rot90(image[1][:, at]))
    # the CT branch undoes the noise that is shown beside it
    out = plots.all_outputs(model, seen, config, torch.device("cpu"))
    np.testing.assert_allclose(shown(axes[0, 2]), np.rot90(out["ct_rec"][0][:, at]), atol=1e-6)
    assert figure.get_figwidth() <= 7.001 and figure.get_figheight() <= 8.801


def opened(run, study):
    model, config, _, _ = evaluation.load_run(run, "best", {})
    config, cases = train.open_data(config, lambda text: None)
    return next(case for case in cases if case.name == study), config, model


def fake_view(version, kind="petct"):
    """A View of 4 x 4 maps that differ from each other."""
    view = plots.View.__new__(plots.View)
    view.kind, view.variant, view.aspect, view.at = kind, plots.VARIANTS[kind][version], 1.0, 0
    heads = {"v1": ["ct_rec", "pet_seg"], "v2": ["ct_rec", "pet_seg", "pet_rec"],
             "v4": ["ct_seg", "pet_seg", "fused"]}  # fmt: skip
    if kind == "mri":
        heads = {"v1": ["ct_seg", "pet_seg"], "v2": ["ct_seg", "pet_seg", "btl_seg"],
                 "v2-rec": ["ct_rec", "pet_seg", "pet_rec"]}  # fmt: skip
    masks = ["lesion"] if kind == "petct" else ["edema", "core", "whole"]
    names = ["ct", "pet", "seen", *heads[version]]
    names += [f"{of} {mask}" for of in ("found", "true") for mask in masks]
    rng = np.random.default_rng(0)
    view.maps = {name: rng.random((4, 4)) for name in names}
    for name in names:
        if " " in name:
            view.maps[name] = view.maps[name] > 0.5
    view.head = np.ones((4, 4), bool)
    return view


def test_masks_of_fig_7():
    for version, at in (("v1", 3), ("v2", 3), ("v4", 4)):
        view = fake_view(version)
        row = plots.petct_row(view, "", "θ = 0.2")
        assert row[at]["lines"] == {"prediction": view.maps["found lesion"]}  # identity: `is`
        assert row[at]["image"] is view.maps["pet"] and row[5]["image"] is view.maps["pet"]
        assert row[5]["lines"] == {"truth": view.maps["true lesion"]}
        assert row[0]["image"] is view.maps["seen"] and row[1]["image"] is view.maps["pet"]
    for at, name in ((2, "ct_seg"), (3, "pet_seg")):  # of v4
        np.testing.assert_array_equal(row[at]["lines"]["prediction"], view.maps[name] > 0.5)
        assert row[at]["image"] is view.maps[name[:-4]]


@pytest.mark.parametrize("version", ["v1", "v2", "v2-rec"])
def test_masks_of_fig_8(version):
    view = fake_view(version, "mri")
    row = plots.mri_row(view, "", "")
    maps = view.maps
    assert len(row) == 7 and [p["final"] for p in row if p].count(True) == 1 and row[5]["final"]
    assert row[5]["lines"] == {"whole": maps["found whole"]}
    assert row[6]["lines"] == {"edema": maps["true edema"], "core": maps["true core"]}
    np.testing.assert_array_equal(row[0]["image"], maps["seen"])
    both = {"edema": maps["found edema"], "core": maps["found core"]}
    if version == "v2-rec":
        np.testing.assert_array_equal(row[2]["image"], maps["ct_rec"])
        assert row[3]["lines"] == both and row[4]["image"] is maps["pet_rec"]
    else:
        assert row[2]["lines"] == {"edema": both["edema"]} and "core" in row[3]["lines"]
        assert row[3]["lines"] == {"core": both["core"]}
        np.testing.assert_array_equal(row[3]["image"], maps["pet"])
        assert (row[4] is None) == (version == "v1")
    if version == "v2":
        np.testing.assert_array_equal(row[4]["lines"]["whole"], maps["btl_seg"] > 0.5)


def test_mri_backgrounds_are_black_and_reconstructions_have_the_scale_of_their_originals():
    view = fake_view("v2-rec", "mri")
    view.head[0, 0] = False
    panels = {name: view.panel(name) for name in ("ct", "seen", "ct_rec", "pet", "pet_rec")}
    for name, panel in panels.items():
        low = panel["span"][0]
        corner = view.maps[name][0, 0] if name.endswith("rec") else low
        assert panel["image"][0, 0] == corner and panel["image"][1, 1] == view.maps[name][1, 1]
    assert panels["ct_rec"]["span"] == panels["ct"]["span"] == panels["seen"]["span"]
    assert panels["pet_rec"]["span"] == panels["pet"]["span"] != panels["ct"]["span"]


def test_the_study_can_be_chosen_among_those_all_runs_test(petct, tmp_path, capsys):
    root, names = petct
    runs = [str(root / n) for n in ("v2-none", "v3-shuffle")]
    plots.run_command(["--qualitative", *runs, "--study", names[3], "--out", str(tmp_path / "o")])
    assert f"   {names[3]}, coronal slice" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"fig7.png", "fig7.pdf"}
    for outside in (names[1], names[4], "nobody"):  # each tested by one of the two at most
        with pytest.raises(UserError, match=f"--study {outside}: not in the test part"):
            plots.qualitative([Path(run) for run in runs], outside)


def test_two_runs_of_one_kind_are_told_apart_by_their_names(petct, tmp_path):
    root, _ = petct
    (tmp_path / "again").symlink_to(root / "v4")
    figure, *_ = plots.qualitative([root / "v4", tmp_path / "again"])
    assert [axis.get_ylabel() for axis in panels(figure, 6)[:, 0]] == ["v4", "again"]


@pytest.mark.parametrize(
    "second, message",
    [
        ("other", "No study is in the test part of all"),
        ("nnunet", "is no Mirror U-Net"),
        ("coarse", "kind or spacing differ"),
        ("nowhere", "no such checkpoint"),
    ],
)
def test_runs_that_do_not_go_together(petct, second, message):
    root, _ = petct
    with pytest.raises(UserError, match=message):
        plots.qualitative([root / "v3-shuffle", root / second])


def test_fig_8_has_a_row_per_brain_tumour_run(msd, tmp_path):
    data, names = msd(3), [f"BRATS_{i:03d}" for i in range(1, 4)]
    runs = [
        untrained(tmp_path / version, data, names, names[2:], version, (1.0, 1.0, 1.0))
        for version in ("v2-rec", "v2", "v1")
    ]
    figure, name, said = plots.qualitative(runs)
    plots.publish(figure, tmp_path, name)
    picture = matplotlib.image.imread(tmp_path / "fig8.png")
    assert picture.shape[1] == pytest.approx(2100, abs=2)  # 7 in at 300 dpi
    axes = panels(figure, 7)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["v1", "v2", "v2-rec-shuffle"]
    assert name == "fig8" and said.startswith("BRATS_003, axial slice ")
    assert [[boxed(a) for a in row].index(True) for row in axes] == [5, 5, 5]
    assert [bool(row[4].images) for row in axes] == [False, True, True]
