"""The paper's Tables 2-5 and the λ grid of its supplement beside ours, from run folders.

    python tables.py RUNS --table 4        Table 3, 4 or 5 from the runs below RUNS

From top to bottom: which runs may share a table, the tables of a search, Tables 3-5. plots.py draws
some of the numbers, claims.py judges them.
"""

import io
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from certainty import holm, interval, sign_flip
from common import Parser, UserError, atomic, command_line, read_json, reading
from config import (
    OPTIONS,
    Config,
    applicable_options,
    format_value,
    parse_settings,
    unusual_options,
)
from metrics import Metric, align_columns, metric_values, metrics_by_name
from runs import TEST_AGAIN, cohort_hash, is_finished, load_config, load_splits, write_csv

# ------------------------------------------------------------------ which runs may share a table

# Three functions decide this, each by the one before it:
# 1. unusual_options, in config.py, lists where a run differs from the defaults of its version.
# 2. group_comparable_runs puts runs together that agree in this list, their version and their
#    studies, but for the options that a table compares.
# 3. runs_for_table, for Tables 3-5, first leaves out each run with an unusual option that --with
#    does not ask for.


class RunGroup(NamedTuple):
    """Runs that may share a table; about: how they differ from the other groups, in words."""

    about: str
    runs: pd.DataFrame


def describe(settings: dict) -> str:
    """Options by name, in words; None is the default."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in settings.items())


def group_comparable_runs(runs: pd.DataFrame, compared: Collection[str]) -> list[RunGroup]:
    """Group the runs whose version, studies and unusual options agree, except for `compared`.

    runs: with the columns config (resolved; a run without one is left out) and studies, a
    cohort_hash. compared: names of what may differ within a group. The group with the fewest
    unusual options comes first.
    """
    runs = runs[runs["config"].notna()]
    positions = {}  # of the runs of each group, by the settings that they have in common
    for position, run in enumerate(runs.itertuples()):
        settings = unusual_options(run.config)
        settings.update(version=run.config.version, studies=run.studies)
        in_common = tuple(item for item in settings.items() if item[0] not in compared)
        positions.setdefault(in_common, []).append(position)
    group_settings = sorted(positions, key=len)

    # A group is described by what differs between groups.
    differing = []
    for name in (*OPTIONS, "studies"):
        if len({dict(in_common).get(name) for in_common in group_settings}) > 1:
            differing.append(name)

    groups = []
    for in_common in group_settings:
        settings = dict(in_common)
        about = describe({name: settings.get(name) for name in differing})
        groups.append(RunGroup(about, runs.iloc[positions[in_common]]))
    return groups


# The budget and the kind of data: a table of the paper may have any, but one for all its rows.
SAME_IN_ALL_ROWS = {"epochs", "steps", "crops", "batch_size", "data"}


def deviating_options(config: Config, given: dict) -> list[str]:
    """The options that keep a run out of a table of the paper; none if it belongs there.

    An option deviates if its value is not the one given for the table or, if none is given, not
    the default. Any value does for those of SAME_IN_ALL_ROWS if none is given, and for a given
    option that does not apply to the run's version.
    """
    not_default = unusual_options(config).keys() - SAME_IN_ALL_ROWS - given.keys()

    applies = applicable_options(config, config.kind)
    not_as_given = set()
    for name, value in given.items():
        if applies[name] and getattr(config, name) != value:
            not_as_given.add(name)
    return sorted(not_default | not_as_given)


def runs_for_table(runs: pd.DataFrame, given: dict) -> tuple[list[RunGroup], list[str]]:
    """Choose the runs without deviating options, and group them by budget, data and studies.

    runs: of finished_runs. given: the options of --with, each with its value for the table. Returns
    the groups, and a line for each run that is left out, with the settings that deviate.
    """
    is_chosen = []  # for each run
    left_out = []
    for run in runs.itertuples():
        deviating = deviating_options(run.config, given)
        is_chosen.append(not deviating)
        if deviating:
            settings = {name: getattr(run.config, name) for name in deviating}
            left_out.append(f"{run.run}: {describe(settings)}")

    # The rows are different systems, and a given option may apply to some of them only, so that the
    # others have its default. Rows may therefore differ in all options but SAME_IN_ALL_ROWS.
    compared = OPTIONS.keys() - SAME_IN_ALL_ROWS
    return group_comparable_runs(runs[np.array(is_chosen, bool)], compared), left_out


# ------------------------------------------------------------------ the tables of a search

SHARED_SETS = [(3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7)]  # Table 2, Fig. 3
SETS = [format_value(shared) for shared in SHARED_SETS]
VERSIONS = ("v1", "v2", "v2-rec", "v3", "v4")  # the paper's
PHIS = {"none": "L2", "noise": "L2 + noise", "shuffle": "L2 + shuffling"}  # names of Table 2
# Table 2 of the paper, Dice in percent: a row per training, in the order of SHARED_SETS.
PAPER_TABLE2 = {
    ("v1", "none"): (57.39, 62.88, 61.92, 61.91, 62.06, 62.08, 58.06),
    ("v1", "noise"): (59.76, 62.83, 62.34, 62.21, 62.65, 62.36, 60.86),
    ("v1", "shuffle"): (62.75, 63.97, 64.57, 63.80, 63.09, 63.01, 62.72),
    ("v2", "none"): (58.42, 63.34, 62.15, 61.74, 62.24, 62.49, 59.00),
    ("v2", "noise"): (59.96, 64.00, 62.62, 62.21, 62.85, 63.01, 61.44),
    ("v2", "shuffle"): (63.15, 64.28, 65.50, 64.08, 63.69, 63.29, 63.33),
    ("v3", "none"): (59.12, 63.36, 62.78, 62.25, 63.01, 63.22, 60.01),
    ("v3", "noise"): (60.23, 64.33, 63.01, 62.89, 63.22, 63.30, 60.51),
    ("v3", "shuffle"): (63.33, 64.55, 65.91, 64.44, 64.00, 63.43, 63.34),
    ("v4", "0.1"): (59.61, 63.78, 63.65, 63.23, 60.58, 61.79, 60.81),
    ("v4", "0.2"): (58.65, 62.66, 64.24, 63.35, 62.30, 63.99, 56.79),
    ("v4", "0.3"): (61.67, 63.76, 64.22, 62.26, 61.89, 61.33, 58.21),
    ("v4", "0.4"): (58.95, 62.93, 58.43, 63.64, 56.15, 60.69, 59.40),
    ("v4", "0.5"): (59.86, 61.84, 61.00, 62.48, 60.38, 60.51, 57.79),
    ("v4", "learn"): (60.89, 60.94, 60.81, 58.48, 56.52, 59.63, 47.42),
}


class DiceTable(NamedTuple):
    """Test Dice in percent, the mean over seeds and folds, NaN where missing; about: in words."""

    values: pd.DataFrame
    about: str


def dice_table(trials: pd.DataFrame, axes: list[str], about: str) -> DiceTable:
    """The Dice of `trials` by options: the last of `axes` has a column for each value.

    Its words count the runs of a cell and the missing cells, and end with `about`. Raises UserError
    if no trial has a test Dice.
    """
    cells = trials.groupby(axes)["dice"]
    values, counts = cells.mean().unstack(), cells.count()
    if not counts.any():
        raise UserError("its trials have no test Dice yet")

    fewest, most = counts[counts > 0].min(), counts.max()
    words = "1 run"
    if most > 1:
        span = most if fewest == most else f"{fewest} to {most}"
        words = f"mean of {span} runs (seeds, folds)"
    missing = values.isna().sum().sum()
    if missing:
        words += f"; {missing} of {values.size} cells missing"
    if about:
        words += f"; {about}"
    return DiceTable(values, words)


def set_order(layers: str) -> tuple:
    """Sort the sets L: the paper's as in Table 2, then no layer, then the others by size."""
    place = SETS.index(layers) if layers in SETS else len(SETS)
    return place, layers != "none", len(layers), layers


def braces(layers: str) -> str:
    """A set L as the paper writes it: {4,5,6} for "4 5 6"."""
    return f"{{{layers.replace(' ', ',')}}}"


def table_2(trials: pd.DataFrame, about: str) -> DiceTable:
    """Table 2: rows (version, Φ; of v4 θ), columns the sets L."""
    trials = trials.assign(method=trials["theta"].fillna(trials["phi"]))
    values, about = dice_table(trials, ["version", "method", "shared"], about)
    return DiceTable(values[sorted(values, key=set_order)], about)


def lambda_grid(trials: pd.DataFrame, about: str) -> DiceTable:
    """Supplement Fig. 1: rows λ_rec, columns λ_cls, both rising."""
    trials = trials.astype({"lambda_rec": float, "lambda_cls": float})
    return dice_table(trials, ["lambda_rec", "lambda_cls"], about)


def mark_best(values: pd.DataFrame, column_mark: str) -> pd.DataFrame:
    """The numbers as text, with a mark behind the best of each column and * behind that of all."""
    best = values.max()
    text = values.map("{:.2f}".format).replace("nan", "–")
    text = text.mask(values == best, text + column_mark)
    return text.mask(values == best.max(), text + "*")


def table_2_text(trials: pd.DataFrame, about: str) -> str:
    """Table 2, here and in the paper, with marks for its bold and its underlined figures."""
    values, about = table_2(trials, about)
    paper = pd.DataFrame(PAPER_TABLE2.values(), pd.MultiIndex.from_tuples(PAPER_TABLE2), SETS)
    values = values.reindex(index=paper.index, columns=SETS)

    rows = [["", *map(braces, SETS)]]
    for version in paper.index.unique(level=0):
        ours = mark_best(values.loc[version], "*")
        papers = mark_best(paper.loc[version], "*")
        for method, cells in (ours + " (" + papers + ")").iterrows():
            name = "learned θ" if method == "learn" else PHIS.get(method, f"θ = {method}")
            rows.append([f"{version}  {name}", *cells])

    title = f"Table 2: test Dice in percent, in brackets the paper's; {about}"
    return f"{title}\n{align_columns(rows)}\n* best of a set L, ** best of all, in each version"


def lambda_text(trials: pd.DataFrame, about: str) -> str:
    """Supplement Fig. 1 as a table, both weights falling."""
    values, about = lambda_grid(trials, about)
    values = values.iloc[::-1, ::-1]
    rows = [["", *map("{:g}".format, values)]]
    for weight, cells in mark_best(values, "").iterrows():
        rows.append([f"{weight:g}", *cells])

    version = trials["version"].iloc[0]  # of all, as trials of others are another group
    title = f"Test Dice of {version} in percent over λ_rec (rows) and λ_cls (columns); {about}"
    return f"{title}\n{align_columns(rows)}\n* best"


def in_table_2(trial: pd.Series) -> bool:
    cell = trial["version"], trial["theta"] or trial["phi"]  # as text, or None
    return cell in PAPER_TABLE2 and trial["shared"] in SETS and trial["kind"] == "petct"


class SearchTable(NamedTuple):
    """A table that --report prints, and plots.py draws.

    searches: those whose trials it is of. compared: the options on its axes. belongs: whether it
    has a cell for a trial. text: how it is printed.
    """

    searches: set[str]
    compared: set[str]
    belongs: Callable[[pd.Series], bool]
    text: Callable[[pd.DataFrame, str], str]


SEARCH_TABLES = {
    "table 2": SearchTable(
        searches={"layers", "theta", "table2"},
        compared={"version", "phi", "theta", "shared"},
        belongs=in_table_2,
        text=table_2_text,
    ),
    "lambdas": SearchTable(
        searches={"lambdas"},
        compared={"lambda_rec", "lambda_cls"},
        belongs=lambda trial: trial["lambda_cls"] is not None,  # a version with T has both
        text=lambda_text,
    ),
}


def asked_by(trials: pd.DataFrame, *searches: str) -> pd.Series:
    """Whether one of the searches asked for each trial."""
    return trials["search"].str.split().map(set(searches).intersection).astype(bool)


def groups_for_table(trials: pd.DataFrame, table: str) -> list[RunGroup]:
    """The comparable groups of the trials that a row of SEARCH_TABLES is of."""
    row = SEARCH_TABLES[table]
    return group_comparable_runs(trials[asked_by(trials, *row.searches)], row.compared)


# ------------------------------------------------------------------ Tables 3-5


class PaperRow(NamedTuple):
    """A system, its name in the paper, and the paper's value of each metric of the table."""

    system: str
    title: str
    figures: tuple[float, float, float]


class PaperTable(NamedTuple):
    """A table of the paper; reference: the system that the others are tested against."""

    kind: str
    metrics: tuple[str, ...]
    reference: str
    rows: tuple[PaperRow, ...]


PAPER_TABLES = {
    3: PaperTable("petct", ("dice", "fpv_ml", "fnv_ml"), reference="v3", rows=(
        PaperRow("ct", "CT", (26.00, 15.64, 44.15)),
        PaperRow("pet", "PET", (60.99, 5.38, 2.15)),
        PaperRow("early_fusion", "EF", (54.89, 4.98, 3.13)),
        PaperRow("middle_fusion", "MF", (55.53, 4.77, 3.02)),
        PaperRow("late_fusion_logits", "LF-Logit", (57.41, 4.88, 2.88)),
        PaperRow("late_fusion_union", "LF-∪", (59.89, 3.95, 3.01)),
        PaperRow("late_fusion_intersection", "LF-∩", (21.60, 1.67, 99.74)),
        PaperRow("v1", "Mirror U-Net (v1)", (64.57, 2.93, 1.66)),
        PaperRow("v2", "Mirror U-Net (v2)", (65.50, 2.83, 0.94)),
        PaperRow("v3", "Mirror U-Net (v3)", (65.91, 1.55, 0.76)),
        PaperRow("v4", "Ablation (v4)", (64.24, 2.93, 1.99)),
    )),
    4: PaperTable("petct", ("dice", "fpv_ml", "fnv_ml"), reference="v3", rows=(
        PaperRow("nnunet", "nnUNet", (62.75, 2.83, 1.59)),
        PaperRow("blackbean", "Blackbean", (63.15, 2.55, 1.76)),
        PaperRow("sfnet", "SF-Net", (61.21, 3.44, 2.95)),
        PaperRow("andrearczyk", "Andrearczyk et al.", (61.45, 2.98, 1.89)),
        PaperRow("deepmts", "DeepMTS", (61.91, 3.22, 2.76)),
        PaperRow("weninger", "Weninger et al.", (61.22, 3.98, 2.82)),
        PaperRow("v3_ct_only", "CT-only Mirror U-Net (v3)", (12.37, 28.24, 50.02)),
        PaperRow("v3_pet_only", "PET-only Mirror U-Net (v3)", (56.14, 4.81, 3.02)),
        PaperRow("v4", "Mirror U-Net (v4)", (64.24, 2.93, 1.99)),
        PaperRow("valindria", "Valindria et al.", (39.84, 7.89, 17.00)),
        PaperRow("v3", "Mirror U-Net (v3)", (65.91, 1.55, 0.76)),
    )),
    5: PaperTable("mri", ("dice_whole", "dice_edema", "dice_core"), reference="v2", rows=(
        PaperRow("v1", "Mirror U-Net (v1)", (88.37, 71.91, 82.22)),
        PaperRow("v2-rec", "Mirror U-Net (v2)-rec", (91.12, 77.12, 84.56)),
        PaperRow("nnunet", "nnUNet", (89.10, 76.35, 84.05)),
        PaperRow("segresnet", "SegResNet", (91.29, 77.01, 84.22)),
        PaperRow("v2", "Mirror U-Net (v2)", (92.52, 78.12, 85.84)),
    )),
}  # fmt: skip


DEFINITIONS = (
    "here: Dice in % over studies with a lesion, volumes in ml, on the studies' own grids; the "
    "paper gives neither its rule for empty masks nor a plausible unit. In brackets 95 % intervals "
    "by bootstrap over patients; p by flips of the signs of patients' mean differences, with "
    "Holm's correction within a metric."
)


def finished_runs(number: int, root: Path) -> pd.DataFrame:
    """The runs below `root` that Table `number` lists and that have test results.

    Columns: run (its folder), system, config (resolved) and studies, a cohort_hash. Trials of a
    search count if `root` is its folder.
    """
    table = PAPER_TABLES[number]
    systems = {row.system for row in table.rows}
    rows = []
    for file in sorted(root.glob("**/test_studies.csv")):
        run = file.parent
        if not (run / "config.json").exists():  # another evaluation of a run
            continue
        if (run / "trial.json").exists() and run.parent != root:
            continue
        config = load_config(run)  # of a late fusion: that of its CT run, see eval.py
        late_fusion = read_json(run / "config.json").get("late_fusion")
        if not late_fusion and not is_finished(run, config.epochs):
            continue  # it trains on: these results are of fewer epochs

        system = f"late_fusion_{late_fusion}" if late_fusion else config.version
        if config.kind == table.kind and system in systems:
            rows.append((run, system, config, cohort_hash(load_splits(run))))
    return pd.DataFrame(rows, columns=["run", "system", "config", "studies"])


def read_test_studies(run: Path, metrics: list[Metric]) -> pd.DataFrame:
    """test_studies.csv by study, with the metrics as numbers. Raises UserError if it is damaged."""
    path = run / "test_studies.csv"
    with reading(path, TEST_AGAIN):
        text = path.read_text(encoding="utf-8")
        studies = pd.read_csv(io.StringIO(text), index_col="study")
        if not text.endswith("\n") or studies["has_lesion"].dtype != bool or studies.index.hasnans:
            raise ValueError("a row is cut short")
        types = {metric.column.format(""): float for metric in metrics}  # of the model's mask
        return studies.astype({"patient": str, **types})


def pool_seeds_and_folds(runs: pd.DataFrame, metrics: list[Metric]) -> tuple[pd.DataFrame, str]:
    """The test studies of runs of one system, and how many there are, in words.

    The values of a study are averaged over seeds; the studies of several folds stand together.
    """
    tested = pd.concat([read_test_studies(run, metrics) for run in runs["run"]])
    rules = dict.fromkeys(tested, "mean") | {"has_lesion": "first", "patient": "first"}
    studies = tested.groupby(level="study").agg(rules)

    seeds = runs["config"].map(lambda config: config.seed).nunique()
    folds = runs["config"].map(lambda config: config.fold).nunique()
    words = f"{seeds} seeds × {folds} folds"
    if len(runs) != seeds * folds:  # copies, gaps, or other splits
        words += f" in {len(runs)} runs"
    return studies, f"{words}, {len(studies)} studies, {studies['patient'].nunique()} patients"


def estimate(name: str, values: pd.Series, patients: pd.Series) -> dict[str, float]:
    """Columns of the CSV: the mean of the values of studies, its 95 % interval, their number."""
    low, high = interval(values, patients)
    mean = values.mean()
    return {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_n": len(values)}


def compare_to_reference(metric: Metric, studies: pd.DataFrame, reference) -> dict[str, float]:
    """Columns of the CSV: a system's value of a metric, and its difference from the reference.

    Dice is in %, volumes are in ml. The difference is that on the studies that both have, with the
    p of sign_flip. studies, reference: their test studies; the reference may be None.
    """
    name = metric.name
    scale = 100 if name.startswith("dice") else 1
    values = metric_values(studies, metric) * scale
    row = estimate(name, values, studies["patient"])

    if reference is not None and reference is not studies:
        gains = (values - metric_values(reference, metric) * scale).dropna()  # by study
        row |= estimate(f"{name}_gain", gains, studies["patient"])
        row[f"{name}_p"] = sign_flip(gains, studies["patient"])
    return row


def beside_paper(number: int, runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The paper's figures beside ours, as a table and as Markdown with notes.

    It has a row per system in the paper's order, also if it was not run.
    """
    paper = PAPER_TABLES[number]
    by_name = metrics_by_name(paper.metrics)
    metrics = [by_name[name] for name in paper.metrics]
    studies, words = {}, {}
    for system, system_runs in runs.groupby("system"):
        studies[system], words[system] = pool_seeds_and_folds(system_runs, metrics)
    reference = studies.get(paper.reference)

    rows = []
    for system, title, figures in paper.rows:
        row = {"system": system, "title": title, "runs": words.get(system, "")}
        for metric, figure in zip(metrics, figures, strict=True):
            row[f"{metric.name}_paper"] = figure
            if system in studies:
                row |= compare_to_reference(metric, studies[system], reference)
        rows.append(row)
    table = pd.DataFrame(rows)

    for name in paper.metrics:
        if f"{name}_p" in table:
            table[f"{name}_p"] = holm(table[f"{name}_p"])  # NaN, as of the reference, stays

    notes = [DEFINITIONS]
    missing = [row.system for row in paper.rows if row.system not in studies]
    if missing:
        notes.append(f"not run: {', '.join(missing)}")
    if len({frozenset(tested.index) for tested in studies.values()}) > 1:
        notes.append("These runs were tested on different studies: their rows are not comparable.")
    text = align_columns(format_table(table, metrics, paper.reference), markdown=True)
    return table, "\n\n".join([text, *notes])


def format_table(table: pd.DataFrame, metrics: list[Metric], reference: str) -> list[list[str]]:
    """The cells of a table of the paper as text, its heading first."""
    rows = table.to_dict("records")
    text = pd.DataFrame({"Method": table["title"]})
    for metric in metrics:
        columns = {
            "paper": (f"{metric.name}_paper", ".2f"),
            "here": (metric.name, ".2f"),
            f"minus {reference}": (f"{metric.name}_gain", "+.2f"),
            "p": (f"{metric.name}_p", ".3f"),
        }
        for title, (name, form) in columns.items():
            text[f"{metric.title} {title}"] = [format_estimate(row, name, form) for row in rows]
    text["runs"] = table["runs"]
    return [list(text), *text.to_numpy()]


def format_estimate(row: dict, name: str, form: str) -> str:
    """A number of a row, with its interval if there is one; a dash if there is no number."""
    if math.isnan(row.get(name, math.nan)):
        return "-"
    text = f"{row[name]:{form}}"
    low = row.get(f"{name}_low", math.nan)
    if not math.isnan(low):
        text += f" [{low:{form}}, {row[f'{name}_high']:{form}}]"
    return text


def write_paper_table(number: int, root: Path, out: Path, given: dict) -> str:
    """Write Table `number` from the runs below `root` as table<number>.csv and .md in `out`.

    Each group of runs_for_table has a table of its own. Returns the Markdown, which also reads as
    text. Raises UserError if no run belongs to the table.
    """
    runs = finished_runs(number, root)
    if runs.empty:
        problem = f"no run of Table {number} with test results"
        raise UserError(f"{root}: {problem}. Give the folder that holds them.")
    groups, left_out = runs_for_table(runs, given)

    tables, texts = [], []
    for about, group_runs in groups or [RunGroup("", runs[:0])]:  # without any: the paper alone
        table, text = beside_paper(number, group_runs)
        tables.append(table.assign(about=about))
        texts.append(f"**{about}**\n\n{text}" if about else text)
    if left_out:
        texts.append("\n\n".join(["Other settings, in no row (see --with):", *left_out]))
    text = "\n\n".join(texts)

    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"table{number}.csv", pd.concat(tables))
    with atomic(out / f"table{number}.md") as file:
        file.write(f"{text}\n".encode())
    return text


def tables_command(argv: list[str] | None = None) -> None:
    """python tables.py: see the top of the file."""
    parser = Parser(description="Print and write a table of the paper, its figures beside ours.")
    add = parser.add_argument
    add("root", type=Path, metavar="RUNS", help="the folder that holds the runs")
    add("--table", type=int, choices=PAPER_TABLES, required=True)
    add(
        "--with",
        dest="settings",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="show the runs with these settings in place of the defaults, such as spacing=4,4,6",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the table [RUNS]")
    args = parser.parse_args(argv)
    if not args.root.is_dir():
        raise UserError(f"{args.root}: no such folder. Give the folder that holds the runs.")

    given = parse_settings(args.settings)
    print(write_paper_table(args.table, args.root, args.out or args.root, given))


if __name__ == "__main__":
    command_line(tables_command)
