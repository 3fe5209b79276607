"""The claims of Sec. 4: pairs of versions that a search trains alike, and what their tests decide.

Each side of a claim is an arm: the defaults but for a few options. tune.py trains the arms
(--search claims, organs), on several seeds and all folds.
"""

import math
from typing import NamedTuple

import pandas as pd

from certainty import interval
from common import UserError
from config import OPTIONS, Config, resolve
from metrics import METRICS, Metric, align_columns, metric_values
from tables import RunGroup, asked_by, group_comparable_runs, read_test_studies

ARMS = {
    "v1": {"version": "v1"},
    "v2": {"version": "v2"},
    "v3": {"version": "v3"},
    "v4": {"version": "v4"},
    "v3 without Φ": {"version": "v3", "phi": "none"},
    "PET": {"version": "pet"},
    "early fusion": {"version": "early_fusion"},
    "v3 joint": {"version": "v3", "bottleneck": "joint"},
    "v1, another's CT": {"version": "v1", "ct": "other"},
    "v4, another's CT": {"version": "v4", "ct": "other"},
    "v1, nothing shared": {"version": "v1", "shared": ()},
    "v1, no reconstruction": {"version": "v1", "lambda_rec": 0.0},
}
ORGAN_ARMS = {  # the CT branch learns organs
    "v5": {"version": "v5"},
    "v5 joint": {"version": "v5", "bottleneck": "joint"},
}
ALL_ARMS = ARMS | ORGAN_ARMS
ARM_OPTIONS = set().union(*ALL_ARMS.values())  # those in which arms differ
COMPARISONS = {  # the arms that each search trains
    "claims": ARMS,
    "organs": ORGAN_ARMS | {name: ARMS[name] for name in ("v3", "v3 joint", "early fusion")},
}


class Claim(NamedTuple):
    """An arm minus another one in a metric; paper: the paper's difference, NaN if it has none."""

    plus: str
    minus: str
    metric: str
    paper: float = math.nan


CLAIMS = (
    Claim("v2", "v1", "dice", 0.93),
    Claim("v3", "v2", "dice", 0.41),
    Claim("v3", "v4", "dice", 1.67),
    Claim("v3", "v3 without Φ", "dice", 3.13),
    Claim("v3", "PET", "dice", 4.92),
    Claim("v3", "early fusion", "dice", 11.02),
    Claim("PET", "early fusion", "dice", 6.10),
    Claim("v3", "v2", "fpv_ml", -1.28),
    Claim("v3", "v2", "fpv_healthy_ml"),
    Claim("v3 joint", "v3", "dice"),
    Claim("v1", "v1, another's CT", "dice"),  # controls: is CT the cause, or sharing it?
    Claim("v4", "v4, another's CT", "dice"),
    Claim("v1", "v1, nothing shared", "dice"),
    Claim("v1", "v1, no reconstruction", "dice"),
    Claim("v5", "v3", "dice"),  # beyond the paper
    Claim("v5 joint", "v3 joint", "dice"),
)
NO_VERDICT = ("not run", "left out")  # in place of a verdict


def arm_of(config: Config) -> str | None:
    """The name of the arm that a trial belongs to; None if it is in none."""
    for name, options in ALL_ARMS.items():
        if options["version"] != config.version:
            continue
        # The default of λ_rec depends on --rec, which a search may give to all arms.
        arm = resolve(Config(rec=config.rec, data=config.data, **options), config.kind)
        if all(getattr(arm, option) == getattr(config, option) for option in ARM_OPTIONS):
            return name
    return None


def claim_groups(trials: pd.DataFrame) -> list[RunGroup]:
    """The trials of COMPARISONS by what holds for all arms: budget, cohort, learning rate."""
    compared = set(ARM_OPTIONS)
    for name, field in OPTIONS.items():
        if "applies" in field.metadata:  # only some of the arms read it
            compared.add(name)
    return group_comparable_runs(trials[asked_by(trials, *COMPARISONS)], compared)


def verdict(low: float, high: float, by_seed: list[float], paper: float) -> str:
    """Decide a claim from the interval (low, high) of its difference and from that of each seed.

    It is decided only if the interval excludes 0 and all of at least three seeds agree. It is
    supported if the difference has the sign of the paper's; without a figure of the paper, the
    verdict is which of both is ahead.
    """
    signs = {math.copysign(1, difference) for difference in by_seed}
    excludes_zero = low > 0 or high < 0
    if not excludes_zero or len(by_seed) < 3 or len(signs) > 1:
        return "not decided"
    if math.isnan(paper):
        return "higher" if low > 0 else "lower"
    return "supported" if (low > 0) == (paper > 0) else "contradicted"


def arm_values(trials: pd.DataFrame, arm: str, metric: Metric) -> tuple[pd.DataFrame, dict]:
    """A metric of an arm by study, a column per seed; and the patient of each study.

    Dice is in %, volumes are in ml. Raises UserError for a study that was tested twice with a seed.
    """
    scale = 100 if metric.name == "dice" else 1
    patients, folds_by_seed = {}, {}
    for trial in trials[trials["arm"] == arm].itertuples():
        studies = read_test_studies(trial.run, [metric])
        patients |= studies["patient"].to_dict()
        folds = folds_by_seed.setdefault(trial.config.seed, [])
        folds.append(scale * metric_values(studies, metric))

    columns = {}
    for seed, folds in folds_by_seed.items():
        columns[seed] = pd.concat(folds)
        if not columns[seed].index.is_unique:
            problem = f"two trials of seed {seed} were tested on one study"
            raise UserError(f"{arm}: {problem}, with other settings or splits. Use another --out.")
    return pd.DataFrame(columns), patients


def paired_differences(
    trials: pd.DataFrame, plus: str, minus: str, metric: Metric
) -> tuple[pd.DataFrame, pd.Series]:
    """Differences of two arms by study, a column per seed; and the patient of each study.

    Only of the seeds and folds that both arms have. Raises UserError as arm_values does.
    """
    plus_values, patients = arm_values(trials, plus, metric)
    minus_values, _ = arm_values(trials, minus, metric)
    differences = plus_values - minus_values
    differences = differences.dropna(axis=0, how="all").dropna(axis=1, how="all")
    return differences, pd.Series(patients, dtype=object)


def asked_claims(trials: pd.DataFrame) -> list[Claim]:
    """The claims about arms that the searches of these trials have."""
    arms = set()
    for search in COMPARISONS:
        if asked_by(trials, search).any():
            arms.update(COMPARISONS[search])
    return [claim for claim in CLAIMS if claim.plus in arms and claim.minus in arms]


def confidence_level(trials: pd.DataFrame) -> float:
    """The level of each interval, so that those of all claims hold together at 95 %."""
    return 1 - 0.05 / len(asked_claims(trials))


def claims_table(trials: pd.DataFrame) -> pd.DataFrame:
    """A row per claim: the paper's difference, ours with its interval, and the verdict.

    Columns: claim, paper, here, low, high, seeds (how many agree), patients, verdict. A row whose
    verdict is in NO_VERDICT has no numbers, a `reason` if it was left out.
    """
    done = trials[(trials["status"] == "done") & trials["config"].notna()]
    done = done.assign(arm=done["config"].map(arm_of))
    metrics = {metric.name: metric for metric in METRICS}
    level = confidence_level(trials)

    rows = []
    for plus, minus, metric_name, paper in asked_claims(trials):
        metric = metrics[metric_name]
        row = {"claim": f"{plus} - {minus}, {metric.title}", "paper": paper}
        rows.append(row)  # the verdict and the numbers follow
        try:
            differences, patients = paired_differences(done, plus, minus, metric)
        except UserError as error:
            row.update(verdict="left out", reason=str(error))
            continue
        if differences.empty:
            row["verdict"] = "not run"
            continue

        by_seed = differences.mean()
        mean = float(differences.stack().mean())
        low, high = interval(differences, patients, level)
        agreeing = (by_seed * mean > 0).sum()
        row.update(
            here=mean,
            low=low,
            high=high,
            seeds=f"{agreeing} of {len(by_seed)}",
            patients=patients[differences.index].nunique(),
            verdict=verdict(low, high, list(by_seed), paper),
        )
    return pd.DataFrame(rows)


def claims_text(trials: pd.DataFrame, about: str) -> str:
    """The claims as a table, in the order of CLAIMS."""
    title = f"here ({100 * confidence_level(trials):.1f} %)"
    rows = [["claim", "paper", title, "seeds", "patients", "verdict"]]
    reasons = {}  # each once
    for row in claims_table(trials).to_dict("records"):
        paper = "–" if math.isnan(row["paper"]) else f"{row['paper']:+.2f}"
        cells = ["", "", ""]
        if row["verdict"] not in NO_VERDICT:
            difference = f"{row['here']:+.1f} [{row['low']:.1f}, {row['high']:.1f}]"
            cells = [difference, row["seeds"], f"{row['patients']:.0f}"]
        rows.append([row["claim"], paper, *cells, row["verdict"]])
        if row["verdict"] == "left out":
            reasons[f"left out: {row['reason']}"] = None

    heading = "Claims of Sec. 4: Dice in %, volumes in ml"
    if about:
        heading += f"; {about}"
    return "\n".join([heading, align_columns(rows), *reasons])
