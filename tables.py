"""The paper's Tables 2-5 and the λ grid of its supplement beside ours, from run folders.

From top to bottom: how a table is printed, the metrics of a run, which runs may share a table, the
tables of a search, Tables 3-5. Numbers only; plots.py draws some of them.
"""

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from certainty import holm, interval, sign_flip
from config import OPTIONS, Config, in_words, key_of, reads, resolve
from files import UserError, atomic, read_json, reading
from preprocess import THRESHOLD_SUV
from runs import TEST_AGAIN, cohort_of, is_finished, read_trials, saved_config, saved_splits


def aligned(rows: list[list[str]], markdown: bool = False) -> str:
    """Rows of text, the heading first, as a table: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if markdown:
        rows = [rows[0], ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], *rows[1:]]
    lines = []
    for first, *others in rows:
        right = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        cells = [first.ljust(widths[0]), *right]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------------ the metrics of a run

THRESHOLD = f"SUV ≥ {THRESHOLD_SUV:g} threshold"
# Whose mask a study's metrics are of, and the prefix of their columns.
SYSTEMS = {"model": "", "CT branch": "ct_", "PET branch": "pet_", THRESHOLD: "suv4_"}


def mean(values: pd.Series, ill: pd.Series) -> dict:
    n = len(values)
    std = float(values.std(ddof=1)) if n > 1 else None
    return {"mean": float(values.mean()) if n else None, "std": std, "n": n}


def accuracy(scores: pd.Series, ill: pd.Series) -> dict:
    return {"mean": float(((scores > 0.5) == ill).mean()), "n": len(scores)}


def auc(scores: pd.Series, ill: pd.Series) -> dict:
    """The area under the ROC curve; None if all studies, or none, have a lesion."""
    pairs = int(ill.sum() * (~ill).sum())
    area = float(stats.mannwhitneyu(scores[ill], scores[~ill])[0] / pairs) if pairs else None
    return {"mean": area, "n": len(scores)}


class Metric(NamedTuple):
    """A column of the tables of results.

    column: of <part>_studies.csv, {} for a prefix of SYSTEMS. whom: of "all" studies, the "ill",
    with a lesion, or the "healthy". average: of their values, also given which of them are ill.
    """

    name: str
    title: str
    column: str
    whom: str = "all"
    average: Callable = mean


METRICS = (
    Metric("dice", "Dice", "{}dice", "ill"),
    Metric("fpv_ml", "FPV ml", "{}fpv_ml"),
    Metric("fpv_healthy_ml", "healthy FPV ml", "{}fpv_ml", "healthy"),
    Metric("fnv_ml", "FNV ml", "{}fnv_ml", "ill"),
    Metric("lesion_f1", "lesion F1", "{}lesion_f1"),
    Metric("organ_dice", "organ Dice", "{}organ_dice"),
    Metric("mtv_pred_ml", "MTV ml", "{}mtv_pred_ml", "ill"),
    Metric("mtv_true_ml", "true MTV ml", "mtv_true_ml", "ill"),
    Metric("tumor_accuracy", "T accuracy", "{}tumor_score", average=accuracy),
    Metric("tumor_accuracy_val", "T accuracy, own cut", "{}tumor_called", average=accuracy),
    Metric("tumor_auc", "T AUC", "{}tumor_score", average=auc),
)
RULES = {  # by a metric that they are about
    "fpv_ml": "Dice, FNV, MTV: studies with a lesion (n). FPV: all studies; a false alarm in a "
    "healthy study counts there. Empty masks as in AutoPET 2022; the studies' own grid.",
    "dice_whole": "Dice; whole = core ∪ edema. A class absent from mask and prediction is left out "
    "(n).",
}


def metrics_of(names) -> dict[str, Metric]:
    """METRICS by name, and one for each class whose Dice, dice_<class> or organ_dice_<organ>, is
    among the names."""
    known = {metric.name: metric for metric in METRICS}
    classes = [name for name in names if re.match("(organ_)?dice_", name)]
    titles = {name: re.sub("^(organ_)?dice_", "", name) for name in classes}
    return known | {name: Metric(name, title, "{}" + name) for name, title in titles.items()}


def counted(studies: pd.DataFrame, metric: Metric, prefix: str = "") -> pd.Series:
    """The values that count for a metric: those of its studies, where there is one."""
    ill = studies["has_lesion"].astype(bool)
    chosen = {"all": ill | True, "ill": ill, "healthy": ~ill}[metric.whom]
    return studies.loc[chosen, metric.column.format(prefix)].dropna().astype(float)


def means_of(studies: pd.DataFrame, prefix: str) -> dict:
    """{metric: {"mean", "std", "n", "low", "high"}} of the columns with a prefix of SYSTEMS; low
    and high, if there are several patients, are the 95 % interval."""
    found = {}
    for name, metric in metrics_of(studies).items():
        if metric.column.format(prefix) in studies:
            values = counted(studies, metric, prefix)
            ill = studies["has_lesion"].astype(bool)[values.index]
            found[name] = metric.average(values, ill)
            if metric.average is mean and len(values) > 1:
                low, high = interval(values, studies.get("patient", studies.index.to_series()))
                found[name] |= {} if math.isnan(low) else {"low": low, "high": high}
    return found


def summarize(rows: list[dict]) -> dict:
    """Means over studies: {system: means_of}; where names tell several tracers, as those of AutoPET
    do, also "<system>, <tracer>"."""
    studies, summary = pd.DataFrame(rows), {}
    names = studies.get("study", pd.Series("", studies.index))
    tracers = names.str.extract(r"(?i)^(fdg|psma)_")[0].str.lower()
    for system, prefix in SYSTEMS.items():
        if studies.columns.str.startswith(prefix).any():
            summary[system] = means_of(studies, prefix)
            for tracer, part in studies.groupby(tracers) if tracers.nunique() > 1 else ():
                summary[f"{system}, {tracer}"] = means_of(part, prefix)
    return summary


def rule_of(names) -> str:
    return "\n".join(rule for name, rule in RULES.items() if name in names)


def results_table(systems: dict[str, dict]) -> str:
    """A column per system; mean, 95 % interval and (n) per metric; and the rule for empty masks."""
    names = dict.fromkeys(name for own in systems.values() for name in own)
    shown = {name: metric.title for name, metric in metrics_of(names).items() if name in names}

    def cell(value: dict) -> str:
        spread = f" [{value['low']:.3f}, {value['high']:.3f}]" if "low" in value else ""
        return "-" if value.get("mean") is None else f"{value['mean']:.3f}{spread} ({value['n']})"

    rows = [
        [title, *(cell(own.get(n, {})) for own in systems.values())] for n, title in shown.items()
    ]
    return f"{aligned([['', *systems], *rows])}\n{rule_of(names)}"


def rows_of(name: str, summary: dict) -> dict[str, dict]:
    """The systems of results_table for one run: the model under the run's name, then the others."""
    return {re.sub("^model", lambda _: name, system): own for system, own in summary.items()}


# ------------------------------------------------------------------ which runs may share a table


def comparable(runs: pd.DataFrame, compared) -> list[tuple[str, pd.DataFrame]]:
    """Groups of runs that differ in nothing but `compared`, seed, fold and what a launch decides.

    runs: with the columns `config`, resolved (None where it is damaged: left out), and `studies`,
    their cohort_of. compared: names of options. Returns what parts a group from the others, in
    words, and its rows; those whose options are the usual ones come first.
    """
    groups: dict[tuple, list] = {}
    for run in runs[runs["config"].notna()].itertuples():
        more = {name: getattr(run.config, name) for name in ("version", "recipe")}
        key = key_of(run.config) | more | {"studies": run.studies}
        key = tuple((name, value) for name, value in key.items() if name not in compared)
        groups.setdefault(key, []).append(run.Index)
    options = (*OPTIONS, "studies")
    parting = [name for name in options if len({dict(key).get(name) for key in groups}) > 1]
    found = []
    for key in sorted(groups, key=len):
        part, words = runs.loc[groups[key]], []
        for name in parting:  # not in the key: the version's default, None if it does not read it
            values = [dict(key).get(name), *(getattr(c, name, None) for c in part["config"])]
            words.append(f"{name} {in_words(next((v for v in values if v is not None), None))}")
        found.append((", ".join(words), part))
    return found


# ------------------------------------------------------------------ the tables of a search

SHARED = [(3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7)]  # Table 2, Fig. 3
SETS = [in_words(shared) for shared in SHARED]
VERSIONS = ("v1", "v2", "v2-rec", "v3", "v4")
PHIS = {"none": "L2", "noise": "L2 + noise", "shuffle": "L2 + shuffling"}  # names of Table 2
# Table 2 of the paper, Dice in percent: a row per training, in the order of SHARED.
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


def set_order(layers: str) -> tuple:
    """Sorts the sets L: the paper's as in Table 2, then others by size."""
    known = SETS.index(layers) if layers in SETS else len(SETS)
    return known, layers != "none", len(layers), layers


def dice_table(trials: pd.DataFrame, rows: list[str], column: str, about: str = ""):
    """Test Dice in % of `trials` by `rows` and `column`, the mean over seeds and folds, NaN where
    missing.

    Also in words: how many runs and missing cells, and `about`. Raises UserError without a Dice.
    """
    cells = trials.groupby([*rows, column])["dice"]
    table, seeds = cells.mean().unstack(column), cells.count()
    if not seeds.any():
        raise UserError("its trials have no test Dice yet")
    low, high, gaps = seeds[seeds > 0].min(), seeds.max(), table.isna().sum().sum()
    few = f"{low} to " if low < high else ""
    said = "1 run" if high == 1 else f"mean of {few}{high} runs (seeds, folds)"
    missing = f"{gaps} of {table.size} cells missing" if gaps else ""
    return table, "; ".join(filter(None, (said, missing, about)))


def table_2(trials: pd.DataFrame, about: str = "") -> tuple[pd.DataFrame, str]:
    """Table 2: rows (version, Φ or, where it is read, θ), columns the sets L; as dice_table."""
    trials = trials.assign(method=trials["theta"].fillna(trials["phi"]))
    table, said = dice_table(trials, ["version", "method"], "shared", about)
    return table[sorted(table, key=set_order)], said


def lambda_grid(trials: pd.DataFrame, about: str = "") -> tuple[pd.DataFrame, str]:
    """Supplement Fig. 1: rows λ_rec, columns λ_cls, both rising; as dice_table."""
    trials = trials.astype({"lambda_rec": float, "lambda_cls": float})
    return dice_table(trials, ["lambda_rec"], "lambda_cls", about)


def marked(values, of_all: str = "**", of_column: str = "*") -> list[list[str]]:
    """Numbers as text; the best of all, and those of each column, have a mark behind them."""
    values = np.array(values, float)
    best = np.nan_to_num(values, nan=-np.inf).max(axis=0)

    def text(value: float, top: float) -> str:
        mark = of_all if value == best.max() else of_column if value == top else ""
        return "–" if np.isnan(value) else f"{value:.2f}{mark}"

    return [list(map(text, row, best)) for row in values]


def table_2_text(trials: pd.DataFrame, about: str) -> str:
    """Table 2, here and in the paper, with the marks of its bold and underlined figures."""
    table, said = table_2(trials, about)
    table = table.reindex(index=pd.MultiIndex.from_tuples(PAPER_TABLE2), columns=SETS)
    rows = [["", *(f"{{{layers.replace(' ', ',')}}}" for layers in SETS)]]
    for version in dict.fromkeys(version for version, _ in PAPER_TABLE2):
        keys = [key for key in PAPER_TABLE2 if key[0] == version]
        ours, papers = marked(table.loc[keys]), marked([PAPER_TABLE2[key] for key in keys])
        for (_, method), own, theirs in zip(keys, ours, papers, strict=True):
            name = (PHIS | {"learn": "learned θ"}).get(method, f"θ = {method}")
            rows.append([f"{version}  {name}", *map("{} ({})".format, own, theirs)])
    said = f"Table 2: test Dice in percent, in brackets the paper's; {said}"
    return f"{said}\n{aligned(rows)}\n* best of its box, ** also best of its version"


def lambda_text(trials: pd.DataFrame, about: str) -> str:
    """Supplement Fig. 1 as a table."""
    table, said = lambda_grid(trials, about)
    table = table.iloc[::-1, ::-1]
    cells = zip(table.index, marked(table, of_all="*", of_column=""), strict=True)
    rows = [["", *map("{:g}".format, table)], *([f"{weight:g}", *row] for weight, row in cells)]
    said = f"Test Dice in percent over λ_rec (rows) and λ_cls (columns); {said}"
    return f"{said}\n{aligned(rows)}\n* best"


def in_table_2(trial) -> bool:
    cell = trial["version"], trial["theta"] or trial["phi"]
    return cell in PAPER_TABLE2 and trial["shared"] in SETS and trial["kind"] == "petct"


# A table of a search: the options that it compares, the searches whose trials are not meant for it,
# which of the others are printed in it, and how.
SEARCH_TABLES = {
    "table 2": (
        {"version", "phi", "theta", "shared"}, {"lambdas", "free", "claims", "organs"}, in_table_2,
        table_2_text,
    ),
    "lambdas": (
        {"lambda_rec", "lambda_cls"}, {"layers", "theta", "table2", "free", "claims", "organs"},
        lambda trial: None not in (trial["lambda_rec"], trial["lambda_cls"]), lambda_text,
    ),
}  # fmt: skip


def of_search(trials: pd.DataFrame, search: str) -> np.ndarray:
    """Which trials a search asked for."""
    return np.array([search in searches.split() for searches in trials["search"]], bool)


def groups_of(trials: pd.DataFrame, table: str) -> list[tuple[str, pd.DataFrame]]:
    """The comparable groups of the trials that are meant for a row of SEARCH_TABLES."""
    compared, others, *_ = SEARCH_TABLES[table]
    meant = trials["search"].map(lambda searches: bool({*searches.split()} - others)).astype(bool)
    return comparable(trials[meant], compared)


def report(folder: Path) -> str:
    """The tables of a search folder: Table 2, the λ grid of supplement Fig. 1, the best of free."""
    trials = read_trials(folder)
    counts = ", ".join(f"{n} {status}" for status, n in trials["status"].value_counts().items())
    parts, shown = [f"{folder}: {len(trials)} trials, {counts}"], set()
    for name, (_, _, takes, text) in SEARCH_TABLES.items():
        for about, part in groups_of(trials[trials.apply(takes, axis=1)], name):
            if part["dice"].notna().any():
                parts.append(text(part, about))
                shown |= set(part.index)
    for about, part in claim_groups(trials):
        parts.append(claims_text(part, about))
        shown |= set(part.index)
    free = of_search(trials, "free")
    other = (trials["status"] == "done") & ~trials.index.isin(shown) & ~free
    if free.any():
        parts.append(f"Best validation Dice of --search free\n{listing(trials[free], most=10)}")
    if other.any():
        parts.append(f"In none of the paper's tables\n{listing(trials[other])}")
    failed = trials[trials["status"] == "failed"].itertuples()
    return "\n\n".join([*parts, *(f"failed: {trial.trial}: {trial.reason}" for trial in failed)])


def listing(trials: pd.DataFrame, most: int | None = None) -> str:
    """The trials with the best validation Dice, a line each."""
    names = ["version", "shared", "phi", "shuffle_count", "noise_sigma", "lambda_rec", "lambda_cls",
             "theta", "lr", "seed", "status", "epochs_done", "val_dice", "dice"]  # fmt: skip
    best = trials.sort_values("val_dice", ascending=False)[names][:most].dropna(axis=1, how="all")

    def cell(value) -> str:
        return "" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value)

    heading = [*best.rename(columns={"dice": "test Dice in %"})]
    return aligned([heading, *([cell(v) for v in row] for row in best.to_numpy(object))])


# ------------------------------------------------------------------ the claims of Sec. 4

ARMS = {  # what --search claims trains, each with the defaults but for this
    "v1": {"version": "v1"},
    "v2": {"version": "v2"},
    "v3": {"version": "v3"},
    "v4": {"version": "v4"},
    "v3 without Φ": {"version": "v3", "phi": "none"},
    "PET": {"version": "pet"},
    "early fusion": {"version": "early_fusion"},
    "v3 joint": {"version": "v3", "bottleneck": "joint"},
    "v3 mean": {"version": "v3", "bottleneck": "mean"},
    "v1, another's CT": {"version": "v1", "ct": "other"},
    "v4, another's CT": {"version": "v4", "ct": "other"},
    "v1, nothing shared": {"version": "v1", "shared": ()},
    "v1, no reconstruction": {"version": "v1", "lambda_rec": 0.0},
}
MORE_ARMS = {  # and with --samples all
    "v3, noise": {"version": "v3", "phi": "noise"},
    "v1 without Φ": {"version": "v1", "phi": "none"},
    "v2 without Φ": {"version": "v2", "phi": "none"},
    "v3, L={3}": {"version": "v3", "shared": (3,)},
    "v3, L={3,4,5,6,7}": {"version": "v3", "shared": (3, 4, 5, 6, 7)},
    "CT": {"version": "ct"},
    "middle fusion": {"version": "middle_fusion"},
    "v3, CT alone": {"version": "v3_ct_only"},
    "v3, PET alone": {"version": "v3_pet_only"},
    "v3, another's CT": {"version": "v3", "ct": "other"},
}
ORGAN_ARMS = {  # what the CT branch learns
    "v5": {"version": "v5"},
    "v5 joint": {"version": "v5", "bottleneck": "joint"},
    "v5 mean": {"version": "v5", "bottleneck": "mean"},
}
COMPARISONS = {  # what each search of arms trains
    "claims": ARMS,
    "organs": ORGAN_ARMS | {n: ARMS[n] for n in ("v3", "v3 joint", "v3 mean", "early fusion")},
}
EVERY_ARM = ARMS | MORE_ARMS | ORGAN_ARMS
CLAIMS = (  # an arm minus another one, a metric, and the difference in the paper
    ("v2", "v1", "dice", 0.93),
    ("v3", "v2", "dice", 0.41),
    ("v3", "v4", "dice", 1.67),
    ("v3", "v3 without Φ", "dice", 3.13),
    ("v3", "PET", "dice", 4.92),
    ("v3", "early fusion", "dice", 11.02),
    ("PET", "early fusion", "dice", 6.10),
    ("v3", "v2", "fpv_ml", -1.28),
    ("v3", "v2", "fpv_healthy_ml", math.nan),
    ("v3 joint", "v3", "dice", math.nan),
    ("v3 mean", "v3", "dice", math.nan),
    ("v3 mean", "early fusion", "dice", math.nan),
    ("v1", "v1, another's CT", "dice", math.nan),  # controls: is CT the cause, or sharing it?
    ("v4", "v4, another's CT", "dice", math.nan),
    ("v1", "v1, nothing shared", "dice", math.nan),
    ("v1", "v1, no reconstruction", "dice", math.nan),
    ("v5", "v3", "dice", math.nan),  # beyond the paper
    ("v5 joint", "v3 joint", "dice", math.nan),
    ("v5 mean", "v3 mean", "dice", math.nan),
    ("v5 mean", "early fusion", "dice", math.nan),
)
NO_VERDICT = ("not run", "left out")  # in place of one


def arm_of(config: Config) -> str | None:
    """Which of the arms a trial is."""
    names = {name for options in EVERY_ARM.values() for name in options}
    for title, options in EVERY_ARM.items():
        if options["version"] == config.version:
            arm = resolve(Config(rec=config.rec, **options), config.kind, config.data is None)
            if all(getattr(arm, name) == getattr(config, name) for name in names):
                return title
    return None


def claim_groups(trials: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The trials of COMPARISONS by what holds for all arms: budget, cohort, learning rate."""
    apart = {name for options in EVERY_ARM.values() for name in options}
    apart |= {name for name, f in OPTIONS.items() if "used" in f.metadata}  # some arms read them
    asked = trials[np.any([of_search(trials, name) for name in COMPARISONS], axis=0)]
    return comparable(asked, apart | {"recipe"})


def verdict(low: float, high: float, by_seed: list[float], paper: float) -> str:
    """The one rule: decided only if the interval excludes 0 and all of at least three seeds agree;
    supported if in the direction of the paper or, without a figure of it, which of both is ahead.
    """
    signs = {math.copysign(1, gain) for gain in by_seed}
    if not (low > 0 or high < 0) or len(by_seed) < 3 or len(signs) > 1:
        return "not decided"
    if math.isnan(paper):
        return "higher" if low > 0 else "lower"
    return "supported" if (low > 0) == (paper > 0) else "contradicted"


def gains(trials: pd.DataFrame, plus: str, minus: str, metric: Metric) -> tuple:
    """Differences of two arms by study, a column per seed, in % or ml, and the studies' patients;
    of the seeds and folds that both have. Raises UserError for a study tested twice in a column."""
    scale, sides, patients = 100 if metric.name == "dice" else 1, [], {}
    for arm in (plus, minus):
        columns = {}
        for trial in trials[trials["arm"] == arm].itertuples():
            studies = tested_studies(trial.run, [metric])
            columns.setdefault(trial.config.seed, []).append(scale * counted(studies, metric))
            patients |= studies.get("patient", studies.index.to_series()).to_dict()
        columns = {seed: pd.concat(own) for seed, own in columns.items()}
        if twice := [seed for seed, own in columns.items() if not own.index.is_unique]:
            what = f"two trials of seed {twice[0]} were tested on one study"
            raise UserError(f"{arm}: {what}, with other settings or splits. Use another --out.")
        sides.append(pd.DataFrame(columns))
    difference = (sides[0] - sides[1]).dropna(axis=0, how="all").dropna(axis=1, how="all")
    return difference, pd.Series(patients, dtype=object)


def asked_claims(trials: pd.DataFrame) -> list[tuple]:
    """The rows of CLAIMS for which the searches of the trials train both arms."""
    searches = [arms for name, arms in COMPARISONS.items() if of_search(trials, name).any()]
    return [row for row in CLAIMS if any({*row[:2]} <= {*arms} for arms in searches)]


def level_of(trials: pd.DataFrame) -> float:
    """Of each interval, so that those of all claims that were asked hold together at 95 %."""
    return 1 - 0.05 / len(asked_claims(trials))


def claims(trials: pd.DataFrame) -> pd.DataFrame:
    """A row per row of asked_claims from the finished trials: what it says, the paper's difference,
    ours with its interval at level_of, seeds that agree, patients, verdict; or the reason why it
    cannot be told."""
    done = trials[(trials["status"] == "done") & trials["config"].notna()]
    done = done.assign(arm=done["config"].map(arm_of))
    rows, level = [], level_of(trials)
    for plus, minus, name, paper in asked_claims(trials):
        metric = metrics_of(())[name]
        row = {"claim": f"{plus} - {minus}, {metric.title}", "paper": paper}
        try:
            difference, patients = gains(done, plus, minus, metric)
        except UserError as error:
            rows.append(row | {"verdict": "left out", "reason": str(error)})
            continue
        if difference.empty:
            rows.append(row | {"verdict": "not run"})
            continue
        by_seed, (low, high) = difference.mean(), interval(difference, patients, level)
        here = float(difference.stack().mean())
        agree = int((np.sign(by_seed) == math.copysign(1, here)).sum())
        rows.append(row | {
            "here": here, "low": low, "high": high, "seeds": f"{agree} of {len(by_seed)}",
            "patients": patients[difference.index].nunique(),
            "verdict": verdict(low, high, list(by_seed), paper),
        })  # fmt: skip
    return pd.DataFrame(rows)


def claims_text(trials: pd.DataFrame, about: str = "") -> str:
    """The claims as a table, in the order of CLAIMS."""
    level = f"here ({100 * level_of(trials):.1f} %)"
    text = [["claim", "paper", level, "seeds", "patients", "verdict"]]
    table = claims(trials)
    for row in table.to_dict("records"):
        paper = "–" if math.isnan(row["paper"]) else f"{row['paper']:+.2f}"
        ours = [""] * 3
        if row["verdict"] not in NO_VERDICT:
            ours = [f"{row['here']:+.1f} [{row['low']:.1f}, {row['high']:.1f}]", row["seeds"]]
            ours.append(str(int(row["patients"])))
        text.append([row["claim"], paper, *ours, row["verdict"]])
    reasons = table["reason"].dropna().unique() if "reason" in table else ()
    said = "; ".join(filter(None, ("Claims of Sec. 4: Dice in %, volumes in ml", about)))
    return "\n".join([said, aligned(text), *(f"left out: {reason}" for reason in reasons)])


# ------------------------------------------------------------------ Tables 3-5

# A table of the paper: the kind of data, its metrics, the system that the others are tested against
# and its rows: our name, its name, its figures.
PAPER_TABLES = {
    3: ("petct", ("dice", "fpv_ml", "fnv_ml"), "v3", (
        ("ct", "CT", 26.00, 15.64, 44.15),
        ("pet", "PET", 60.99, 5.38, 2.15),
        ("early_fusion", "EF", 54.89, 4.98, 3.13),
        ("middle_fusion", "MF", 55.53, 4.77, 3.02),
        ("late_fusion_logits", "LF-Logit", 57.41, 4.88, 2.88),
        ("late_fusion_union", "LF-∪", 59.89, 3.95, 3.01),
        ("late_fusion_intersection", "LF-∩", 21.60, 1.67, 99.74),
        ("v1", "Mirror U-Net (v1)", 64.57, 2.93, 1.66),
        ("v2", "Mirror U-Net (v2)", 65.50, 2.83, 0.94),
        ("v3", "Mirror U-Net (v3)", 65.91, 1.55, 0.76),
        ("v4", "Ablation (v4)", 64.24, 2.93, 1.99),
    )),
    4: ("petct", ("dice", "fpv_ml", "fnv_ml"), "v3", (
        ("nnunet", "nnUNet", 62.75, 2.83, 1.59),
        ("blackbean", "Blackbean", 63.15, 2.55, 1.76),
        ("sfnet", "SF-Net", 61.21, 3.44, 2.95),
        ("andrearczyk", "Andrearczyk et al.", 61.45, 2.98, 1.89),
        ("deepmts", "DeepMTS", 61.91, 3.22, 2.76),
        ("weninger", "Weninger et al.", 61.22, 3.98, 2.82),
        ("v3_ct_only", "CT-only Mirror U-Net (v3)", 12.37, 28.24, 50.02),
        ("v3_pet_only", "PET-only Mirror U-Net (v3)", 56.14, 4.81, 3.02),
        ("v4", "Mirror U-Net (v4)", 64.24, 2.93, 1.99),
        ("valindria", "Valindria et al.", 39.84, 7.89, 17.00),
        ("v3", "Mirror U-Net (v3)", 65.91, 1.55, 0.76),
    )),
    5: ("mri", ("dice_whole", "dice_edema", "dice_core"), "v2", (
        ("v1", "Mirror U-Net (v1)", 88.37, 71.91, 82.22),
        ("v2-rec", "Mirror U-Net (v2)-rec", 91.12, 77.12, 84.56),
        ("nnunet", "nnUNet", 89.10, 76.35, 84.05),
        ("segresnet", "SegResNet", 91.29, 77.01, 84.22),
        ("v2", "Mirror U-Net (v2)", 92.52, 78.12, 85.84),
    )),
}  # fmt: skip


BUDGET = ("epochs", "steps", "crops", "batch_size")  # one for all rows of a table
DEFINITIONS = (
    "here: Dice in % over studies with a lesion, volumes in ml, on the studies' own grids; the "
    "paper gives neither its rule for empty masks nor a plausible unit. In brackets 95 % intervals "
    "by bootstrap over patients; p by flips of the signs of patients' mean differences, with "
    "Holm's correction within a metric."
)


def finished_runs(number: int, root: Path) -> pd.DataFrame:
    """Runs below `root` that Table `number` lists and that have test results: their run, system,
    config and studies.

    Only what train.py and --late-fusion write counts, not other evaluations of a run; trials of a
    search count if `root` is its folder. A system is "<version>", with " own" for --recipe own.
    """
    (kind, *_, listed), rows = PAPER_TABLES[number], []
    for file in sorted(root.glob("**/test_studies.csv")):
        run = file.parent
        if not (run / "config.json").exists():
            continue
        config, saved = saved_config(run), read_json(run / "config.json")
        late, fused = saved.get("late_fusion"), saved.get("runs", ())
        of_search = any((Path(part) / "trial.json").exists() for part in (run, *fused))
        if of_search and run.parent != root:
            continue
        if not late and (run / "summary.json").exists() and not is_finished(run, config.epochs):
            continue  # it goes on to more epochs: its results are of fewer
        system = f"late_fusion_{late}" if late else config.version
        if config.kind == kind and system in [name for name, *_ in listed]:
            system += " own" if config.recipe == "own" else ""
            config = resolve(config, kind, config.data is None)  # it may be older than an option
            rows.append((run, system, config, cohort_of(saved_splits(run))))
    return pd.DataFrame(rows, columns=["run", "system", "config", "studies"])


def tested_studies(run: Path, metrics: list[Metric]) -> pd.DataFrame:
    """test_studies.csv by study, its metrics numbers. Raises UserError if it is damaged."""
    with reading(run / "test_studies.csv", TEST_AGAIN):
        text = (run / "test_studies.csv").read_text(encoding="utf-8")
        studies = pd.read_csv(io.StringIO(text), index_col="study")
        if not text.endswith("\n") or studies["has_lesion"].dtype != bool or studies.index.hasnans:
            raise ValueError("a row is cut short")
        return studies.astype({metric.column.format(""): float for metric in metrics})


def asked_for(runs: pd.DataFrame, given: dict) -> tuple[list[tuple[str, pd.DataFrame]], list[str]]:
    """Which runs a table of the paper holds: those with the defaults of their system and data, but
    for what is `given` for all rows, and for the budget. A group for each kind of data, cohort and
    budget, with what tells it in words; and of each other run, what parts it from these."""
    groups, others, apart = {}, [], ("data", "studies", *BUDGET)
    for run in runs.itertuples():
        key, used = key_of(run.config), reads(run.config, run.config.kind)
        key["studies"] = run.studies
        wanted = {name: value for name, value in given.items() if used[name]}
        group = tuple(key.pop(name, None) for name in apart)
        wrong = [n for n in wanted if getattr(run.config, n) != wanted[n]]
        wrong += [name for name in key if name not in wanted]
        if wrong:
            words = ", ".join(f"{n} {in_words(getattr(run.config, n))}" for n in sorted(wrong))
            others.append(f"{run.run}: {words}")
        else:
            groups.setdefault(group, []).append(run.Index)
    parting = [i for i in range(len(apart)) if len({group[i] for group in groups}) > 1]
    found = []
    for group in sorted(groups, key=lambda group: (len(group) - group.count(None), str(group))):
        about = ", ".join(f"{apart[i]} {in_words(group[i])}" for i in parting)
        found.append((about, runs.loc[groups[group]]))
    return found, others


def pool(runs: pd.DataFrame, metrics: list[Metric]) -> tuple[pd.DataFrame, str]:
    """The test studies of runs that differ in seed and fold alone: a study's seeds are averaged,
    the studies of several folds stand together. And how many they are, in words."""
    everything = pd.concat([tested_studies(run, metrics) for run in runs["run"]])
    if "patient" not in everything:
        everything["patient"] = everything.index
    how = dict.fromkeys(everything, "mean") | {"has_lesion": "first", "patient": "first"}
    studies = everything.groupby(level="study").agg(how)
    seeds, folds = (len({getattr(c, n) for c in runs["config"]}) for n in ("seed", "fold"))
    count = f"{len(studies)} studies, {studies['patient'].nunique()} patients"
    several = f" in {len(runs)} runs" if len(runs) != seeds * folds else ""  # copies, gaps, splits
    return studies, f"{seeds} seeds × {folds} folds{several}, {count}"


def figures(metric: Metric, studies: pd.DataFrame, reference: pd.DataFrame | None) -> dict:
    """Ours for a system and a metric: the mean over the test studies (Dice in %, volumes in ml) as
    in summarize, its 95 % interval, and how many they are; the difference from the reference on
    the studies that both have, its interval and the p of sign_flip."""
    scale = 100 if metric.name.startswith("dice") else 1
    values = counted(studies, metric) * scale
    low, high = interval(values, studies["patient"])
    found = {"": values.mean(), "_low": low, "_high": high, "_n": len(values)}
    if reference is not None and reference is not studies:
        gain = (values - counted(reference, metric) * scale).dropna()  # by the studies' names
        low, high = interval(gain, studies["patient"])
        found |= {"_gain": gain.mean(), "_gain_low": low, "_gain_high": high, "_gain_n": len(gain)}
        found["_p"] = sign_flip(gain, studies["patient"])
    return found


def beside_paper(number: int, runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The paper's figures beside ours: a row per system in the paper's order, also if it was not
    run, then own recipes. And as Markdown, with notes."""
    _, names, reference, listed = PAPER_TABLES[number]
    own = [(f"{name} own", f"{title}, own recipe", *[math.nan] * 3) for name, title, *_ in listed]
    listed = [*listed, *(row for row in own if row[0] in {*runs["system"]})]
    metrics = [metrics_of(names)[name] for name in names]
    pooled = {name: pool(part, metrics) for name, part in runs.groupby("system")}
    tested = {name: studies for name, (studies, _) in pooled.items()}
    rows = []
    for name, title, *published in listed:
        rows.append({"system": name, "title": title, "runs": pooled.get(name, ("", ""))[1]})
        for metric, figure in zip(metrics, published, strict=True):
            rows[-1][f"{metric.name}_paper"] = figure
            if name in tested:
                ours = figures(metric, tested[name], tested.get(reference))
                rows[-1] |= {metric.name + key: value for key, value in ours.items()}
    table = pd.DataFrame(rows)
    for metric in metrics:
        if f"{metric.name}_p" in table:
            table[f"{metric.name}_p"] = holm(list(table[f"{metric.name}_p"]))
    notes = [DEFINITIONS]
    if missing := [name for name, *_ in listed if name not in tested]:
        notes.append(f"not run: {', '.join(missing)}")
    if len({frozenset(studies.index) for studies in tested.values()}) > 1:
        notes.append("These runs were tested on different studies: their rows are not comparable.")
    return table, "\n\n".join([aligned(as_text(table, metrics, reference), markdown=True), *notes])


def as_text(table: pd.DataFrame, metrics: list[Metric], reference: str) -> list[list[str]]:
    """The cells of a table of the paper, its heading first."""

    def number(row: dict, name: str, form: str) -> str:
        value, low, high = (row.get(name + end, math.nan) for end in ("", "_low", "_high"))
        spread = "" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]"
        return "-" if pd.isna(value) else f"{value:{form}}{spread}"

    parts = ("paper", "here", f"minus {reference}", "p")
    text = [["Method", *(f"{metric.title} {part}" for metric in metrics for part in parts), "runs"]]
    for row in table.to_dict("records"):
        text.append([row["title"]])
        for name in (metric.name for metric in metrics):
            text[-1].append(number(row, f"{name}_paper", ".2f"))
            text[-1].append(number(row, name, ".2f") if row["runs"] else "not run")
            text[-1] += [number(row, f"{name}_gain", "+.2f"), number(row, f"{name}_p", ".3f")]
        text[-1].append(row["runs"])
    return text


def paper_table(
    number: int, root: Path, given=()
) -> tuple[list[tuple[str, pd.DataFrame, str]], list]:
    """Table `number` of the paper from the runs below `root`, as beside_paper, for each budget and
    kind of data, which stands before it in words; and the runs that stand in none of them."""
    runs = finished_runs(number, root)
    groups, others = asked_for(runs, dict(given))
    return [(about, *beside_paper(number, part)) for about, part in groups or [("", runs)]], others


def write_paper_table(number: int, root: Path, out: Path, given=()) -> str:
    """Write table<number>.csv, with all groups, and .md; the Markdown, which also reads as text."""
    found, others = paper_table(number, root, given)
    if not others and not any(table["runs"].any() for _, table, _ in found):
        why = f"no run of Table {number} with test results"
        raise UserError(f"{root}: {why}. Give the folder that holds them.")
    texts = [f"**{about}**\n\n{text}" if about else text for about, _, text in found]
    if others:
        texts.append("\n\n".join(["Other settings, in no row (see --with):", *others]))
    text = "\n\n".join(texts)
    everything = pd.concat([table.assign(about=about) for about, table, _ in found])
    out.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("csv", everything.to_csv(index=False)), ("md", f"{text}\n")):
        with atomic(out / f"table{number}.{suffix}") as file:
            file.write(content.encode())
    return text
