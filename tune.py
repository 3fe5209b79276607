"""Search over λ, θ and L with Ray Tune: python tune.py --search lambdas

SPACES says what each search varies. A trial is train() in a run folder of its own below --out.
These folders are the truth and Ray only schedules, so the same command again finishes a search
that was stopped, killed or widened. python tune.py --report DIR prints its tables, without Ray.
"""

import argparse
import itertools
import os
import shutil
import socket
import sys
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from claims import COMPARISONS, claim_groups, claims_text
from common import Parser, UserError, command_line, read_json, to_stderr, write_json
from config import (
    OPTIONS,
    Config,
    add_flags,
    applicable_options,
    check_options,
    flag_of,
    format_value,
    options_from_args,
    resolve,
    to_dict,
    unusual_options,
    variant_for,
)
from mirror_unet import VARIANTS
from runs import (
    FolderBusy,
    choose_splits,
    cohort_hash,
    find_data,
    load_cases,
    load_trial_record,
    lock_folder,
    read_trials,
    short_hash,
    trial_status,
)
from tables import PHIS, SEARCH_TABLES, SHARED_SETS, asked_by, groups_for_table
from train import train

# ------------------------------------------------------------------ what a search varies

LAMBDAS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]  # supplement Fig. 1
THETAS = [0.1, 0.2, 0.3, 0.4, 0.5, "learn"]  # Table 2


def expand_grid(**axes: list) -> list[dict]:
    """The options of each point of a grid, whose last axis varies fastest.

    axes: the values of each option.
    """
    points = itertools.product(*axes.values())
    return [dict(zip(axes.keys(), values, strict=True)) for values in points]


# The options of each trial of a search; all others are the defaults.
SPACES = {
    "lambdas": expand_grid(version=["v3"], lambda_rec=LAMBDAS, lambda_cls=LAMBDAS),
    "layers": expand_grid(version=["v1", "v2", "v3"], phi=list(PHIS), shared=SHARED_SETS),
    "theta": expand_grid(version=["v4"], theta=THETAS, shared=SHARED_SETS),
}
SPACES["table2"] = SPACES["layers"] + SPACES["theta"]
for comparison, arms in COMPARISONS.items():
    SPACES[comparison] = list(arms.values())

# What a trial of --search free draws from.
FREE = {
    "version": ["v1", "v2", "v3", "v4"],  # a list: one of it
    "shared": range(1, 9),  # a range: each of its numbers with probability 1/2
    "phi": list(PHIS),
    "noise_sigma": (0.05, 1),  # a pair: a number between its ends, uniform in its logarithm
    "shuffle_count": [1, 3, 10, 30],
    "lambda_rec": (1e-5, 1e-1),
    "lambda_cls": (1e-5, 1e-1),
    "theta": THETAS,
    "lr": (1e-4, 1e-2),
}


def draw_options(seed: int, number: int, kind: str) -> dict:
    """Sample `number` of --search free: the same for a seed, however many are drawn."""
    rng = np.random.default_rng([seed, number])
    options = {}
    for name, choices in FREE.items():
        if name == "version":
            choices = [version for version in choices if version in VARIANTS[kind]]

        if isinstance(choices, range):
            value = tuple(item for item in choices if rng.random() < 0.5)
        elif isinstance(choices, tuple):
            value = np.exp(rng.uniform(*np.log(choices)))
            value = float(f"{value:.3g}")  # short in tables and names of folders
        else:
            value = choices[rng.integers(len(choices))]
        options[name] = value
    return options


def search_options(args: argparse.Namespace, given: dict, kind: str) -> list[dict]:
    """The options of each trial of a search on one fold: a dict for each seed and row of its space.

    Options that do not apply to the trial's version are left out. args, given: of parse_tune. kind:
    of the data. Raises UserError for an option that applies to no trial, or that an arm of a claim
    settles.
    """
    space = SPACES.get(args.search, [])
    varied = []  # names of the options that the space sets
    for options in space:
        varied.extend(options.keys())

    # The arms of a claim cannot be changed.
    for name in given:
        if args.search in COMPARISONS and name in varied:
            raise UserError(f"{flag_of(name)}: --search {args.search} sets it. Leave it out.")

    trials = []
    used = set()  # names of the options that some trial uses
    for seed in args.seed:
        if args.search == "free":
            space = [draw_options(seed, number, kind) for number in range(args.samples)]
        for options in space:
            # A given option takes the place of an axis of a grid. Of the trials that this makes
            # equal, prepare_trials keeps one.
            options = {**options, **given, "seed": seed}
            applies = applicable_options(Config(**options), kind)
            trial = {name: value for name, value in options.items() if applies[name]}
            trials.append(trial)
            used.update(trial.keys())

    for name in (*given, *varied):
        if name not in used:
            problem = f"{flag_of(name)} has no effect on {trials[0]['version']}"
            remedy = "Leave it out, or choose another --search or --version"
            raise UserError(f"--search {args.search}: {problem}. {remedy}.")
    return trials


# ------------------------------------------------------------------ the folders of the trials


def trial_name(trial: Config, inputs_hash: str) -> str:
    """The name of a trial's folder, such as v3-L5-shuffle-rec0.01-cls0.001-seed0-0123abcd.

    It shows the options that searches vary, and ends with a hash of all that sets two trials apart.
    inputs_hash: of the splits, and of the organ maps if the trial learns them.
    """
    # The name of a compared system, which shares no layers, shows L5 too: the unused default.
    words = [trial.version, f"L{''.join(map(str, trial.shared)) or 'none'}"]
    prefixes = {"phi": "", "theta": "theta", "lambda_rec": "rec", "lambda_cls": "cls"}
    for name, prefix in prefixes.items():
        value = getattr(trial, name)
        if value not in (None, "none"):  # it does not apply, or Φ is left out
            words.append(prefix + format_value(value))
    if trial.fold:
        words.append(f"fold{trial.fold}")
    identity = [trial.version, unusual_options(trial), trial.seed, trial.fold, inputs_hash]
    return "-".join([*words, f"seed{trial.seed}", short_hash(identity)])


def parse_folds(words: list[str], config: Config) -> list[int]:
    """The folds that --fold names.

    "all" are those of --splits (a single one, if it holds no list), else of --folds. Raises
    UserError.
    """
    if words == ["all"]:
        count = config.folds
        if config.splits:
            content = read_json(Path(config.splits))
            count = len(content) if isinstance(content, list) else 1
        return list(range(count))

    if not all(word.isdecimal() for word in words):
        raise UserError(f"--fold {' '.join(words)}: expected numbers from 0, or all.")
    return [int(word) for word in words]


def learns_organs(config: Config) -> bool:
    return variant_for(config, config.kind).organ_branch is not None


def prepare_trials(args: argparse.Namespace, given: dict) -> list[Config]:
    """Cache the studies, split them, and give each trial a folder with its trial.json.

    args, given: of parse_tune. Returns the config of each trial, whose `out` is its folder. Raises
    UserError.
    """
    # What is trained on each fold.
    data = find_data(Config(**given))
    configs = []
    for options in search_options(args, given, data.kind):
        configs.append(resolve(Config(**options), data.kind))
    folds = parse_folds(args.fold, configs[0])

    # The studies are cached once, before the trials read them. The images are cached alike for all
    # trials; a config that learns organs has the organ maps read too.
    with_organs = [config for config in configs if learns_organs(config)]
    reads_most = with_organs[0] if with_organs else configs[0]
    cases = load_cases(data, reads_most)
    organ_maps = {case.name: case.meta.digests["organs"] for case in cases if case.organs}

    # The splits of each fold. The options that decide them are the same in all trials.
    splits = {}
    for fold in folds:
        splits[fold] = choose_splits(replace(configs[0], fold=fold), cases)
        validated = [case for case in cases if case.name in splits[fold]["val"]]
        if args.search == "free" and not any(case.has_lesion for case in validated):
            raise UserError("--search free: no lesion to validate on. Give other --splits.")

    # Each config is trained on each fold, in a folder of its own. Equal trials have the same folder
    # and are one: draws may be equal, or rows of a grid in which an axis was replaced.
    trials = {}  # by folder
    for fold, config in itertools.product(folds, configs):
        # resume also starts a run that is not there. load_cases above has done what check asks for.
        trial = replace(config, fold=fold, resume=True, check=False)
        parts = splits[fold]
        inputs = [parts, organ_maps] if learns_organs(trial) else parts
        name = trial_name(trial, short_hash(inputs))
        if args.search == "free":  # it may be stopped early, so it is no trial of a grid
            name = f"free-{name}"
        run = args.out / name
        trials[run] = replace(trial, out=str(run))
        record_trial(trials[run], args.search, cohort_hash(parts))
    return list(trials.values())


def record_trial(trial: Config, search: str, cohort: str) -> None:
    """Add the search to the trial.json of a trial, which begins anew if missing or damaged."""
    run = Path(trial.out)
    run.mkdir(exist_ok=True)
    try:
        record = load_trial_record(run)
    except UserError:
        record = {"searches": [], "config": trial, "studies": cohort}

    if search not in record["searches"]:
        record["searches"].append(search)
        write_json(run / "trial.json", record | {"config": to_dict(record["config"])})


# ------------------------------------------------------------------ one trial


@contextmanager
def print_to(path: Path):
    """Append all that is printed to a file, line by line."""
    with open(path, "a", 1, "utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def run_trial(task: dict) -> None:
    """Train one trial, in a process of Ray's, from its last checkpoint if there is one.

    task: the trial's config, and "cwd", the folder of the command. An error ends the trial, not the
    search: failed.txt says why. If the process died, or another one still writes the folder, Ray
    tries again.
    """
    from ray import tune

    trial = task["trial"]
    run = Path(trial.out)

    def report_epoch(row: dict) -> None:
        # Not the last epoch: ASHA must not stop a trial before its test results are there.
        if "val_dice" in row and row["epoch"] < trial.epochs:
            tune.report({"epoch": row["epoch"], "val_dice": row["val_dice"]})

    with print_to(run / "log.txt"):
        try:
            (run / "failed.txt").unlink(missing_ok=True)
            os.chdir(task["cwd"])  # relative paths mean what they mean to the user
            train(trial, report_epoch)
            (run / "last.pt").unlink(missing_ok=True)  # best.pt stays
        except Exception as error:
            message = str(error).strip() or repr(error)
            text = f"{message}\n\n{traceback.format_exc()}"
            (run / "failed.txt").write_text(text, encoding="utf-8")
            if isinstance(error, FolderBusy):  # perhaps for seconds: Ray tries again
                time.sleep(10)
                raise


# ------------------------------------------------------------------ Ray


class TrialLines:
    """Prints a line per trial that ends, and writes results.csv; a callback of Ray's."""

    def __init__(self, out: Path, total: int):
        self.out, self.total = out, total
        self.screen = sys.stdout  # what Ray prints goes to ray.log
        self.began = time.monotonic()
        self.ended = {}  # the status with which each trial ended, by its folder's name

    def on_trial_complete(self, trial, **info) -> None:
        """Ray calls this when a trial is done, failed or was stopped by ASHA."""
        config = trial.config["trial"]
        name = Path(config.out).name
        result = trial_status(Path(config.out), config.epochs)
        self.ended[name] = result["status"]
        read_trials(self.out)  # writes results.csv

        ended = len(self.ended)
        failed = list(self.ended.values()).count("failed")
        seconds = (time.monotonic() - self.began) / ended * (self.total - ended)
        left = timedelta(seconds=round(seconds))
        dice = "" if result["val_dice"] is None else f", val Dice {result['val_dice']:.4f}"
        line = f"{ended}/{self.total} ended, {failed} failed, {left} left: "
        line += f"{name} {result['status']}{dice} {result['reason']}"
        print(line.rstrip(), file=self.screen, flush=True)

    def on_trial_error(self, trial, **info) -> None:
        """Ray calls this when the process of a trial died too often."""
        failed = Path(trial.config["trial"].out, "failed.txt")
        with suppress(OSError):  # its folder may be gone
            if not failed.exists():
                failed.write_text("its process died (memory?), or does not see this folder\n")
        self.on_trial_complete(trial)


def make_asha(epochs: int):
    """ASHA on the validation Dice: after a third of the epochs one trial in three goes on.

    Before that, Dice is near 0. There is no decision in the last fifth, where it would save little.
    """
    from ray.tune.schedulers import ASHAScheduler

    first = max(1, round(epochs / 3))
    return ASHAScheduler(
        time_attr="epoch",
        metric="val_dice",
        mode="max",
        max_t=max(first, int(0.8 * epochs)),
        grace_period=first,
        reduction_factor=3,
        stop_last_trials=False,
    )


def resources_per_trial(nodes: list[dict], args: argparse.Namespace, device: str) -> dict:
    """CPUs and GPUs of each trial: those of the flags, else one CPU, and one GPU if a node has one.

    nodes: as ray.nodes() returns them. Raises UserError if no node has so many.
    """
    sizes = []
    for node in nodes:
        if node["Alive"]:
            sizes.append((node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)))

    cpus, gpus = args.cpus_per_trial, args.gpus_per_trial
    if gpus is None:
        gpus = int(device in ("auto", "cuda") and any(node_gpus for _, node_gpus in sizes))

    fits = any(cpus <= node_cpus and gpus <= node_gpus for node_cpus, node_gpus in sizes)
    if not fits or cpus == 0 or gpus > 1:
        raise UserError(
            f"--cpus-per-trial {cpus:g} --gpus-per-trial {gpus:g}: a trial takes more than 0 CPUs "
            f"and at most one GPU of one node; Ray has nodes of (CPU, GPU) {sizes}."
        )
    return {"cpu": cpus, "gpu": gpus}


@contextmanager
def ray_session(address: str):
    """Ray on the cluster at `address`, or "local": on this machine, which only it can reach."""
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no Dice to report
        "RAY_memory_monitor_refresh_ms": "0",  # it kills trials for memory that others use
    }
    host, _, port = address.rpartition(":")
    if address == "local":
        environment["RAY_AUTH_TOKEN"] = os.urandom(32).hex()
        # Set before the import, this makes every server listen on the loopback interface only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    elif host and port.isdecimal():  # Ray would wait for minutes if nobody answers
        socket.create_connection((host, int(port)), timeout=10).close()
    for name, value in environment.items():
        os.environ.setdefault(name, value)

    import ray

    session = ray.init(
        address,
        logging_level="CRITICAL",
        log_to_driver=False,
        include_dashboard=False,
    )
    try:
        yield
    finally:
        ray.shutdown()
        if address == "local":  # Ray leaves a folder of logs in /tmp
            shutil.rmtree(session.address_info["session_dir"], ignore_errors=True)


def schedule_trials(args: argparse.Namespace, trials: list[Config]) -> dict[str, str]:
    """Let Ray run the trials, in a ray_session. Returns TrialLines.ended."""
    import ray
    from ray import tune

    device = trials[0].device
    resources = resources_per_trial(ray.nodes(), args, device)
    if resources["gpu"] == 0 and device == "auto":
        device = "cpu"  # otherwise trials without a GPU would all take the first one
    threads = trials[0].threads or max(1, int(resources["cpu"]))
    print(f"ray        a trial has {resources['cpu']:g} CPU and {resources['gpu']:g} GPU\n")

    class Callback(TrialLines, tune.Callback):
        """TrialLines for Ray, which is imported only here, to train."""

    lines = Callback(args.out, len(trials))
    trials = [replace(trial, device=device, threads=threads) for trial in trials]

    with print_to(args.out / "ray.log"):
        tune.run(
            run_trial,
            name=".ray",
            storage_path=str(args.out),
            config={"trial": tune.grid_search(trials), "cwd": os.getcwd()},
            resources_per_trial=resources,
            max_concurrent_trials=args.max_concurrent,
            max_failures=3,
            raise_on_failed_trial=False,
            scheduler=make_asha(trials[0].epochs) if args.search == "free" else None,
            callbacks=[lines],
            verbose=0,
        )
    return lines.ended


def run_with_ray(args: argparse.Namespace, trials: list[Config]) -> dict[str, str]:
    """Start Ray, or join a cluster, and run schedule_trials. Raises UserError if Ray fails."""
    address = args.address or os.environ.get("RAY_ADDRESS", "local")
    try:
        with ray_session(address):
            ended = schedule_trials(args, trials)
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        with suppress(OSError), print_to(args.out / "ray.log"):
            traceback.print_exc()
        problem = str(error).strip().partition("\n")[0] + " (see ray.log)"
        raise UserError(f"Ray, {address}: {problem}. The same command goes on.") from None
    shutil.rmtree(args.out / ".ray", ignore_errors=True)  # Ray's own state is not needed again
    return ended


# ------------------------------------------------------------------ the report


def report_search(folder: Path) -> str:
    """The tables of a search folder, and lists of the trials that are in none of them."""
    trials = read_trials(folder)
    counts = [f"{count} {status}" for status, count in trials["status"].value_counts().items()]
    sections = [f"{folder}: {len(trials)} trials, {', '.join(counts)}"]

    shown = set()
    for name, table in SEARCH_TABLES.items():
        belongs = trials.apply(table.belongs, axis=1)
        for about, group in groups_for_table(trials[belongs], name):
            if group["dice"].notna().any():
                sections.append(table.text(group, about))
                shown.update(group.index)
    for about, group in claim_groups(trials):
        sections.append(claims_text(group, about))
        shown.update(group.index)

    free = asked_by(trials, "free")
    if free.any():
        best = list_best_trials(trials[free], limit=10)
        sections.append(f"Best validation Dice of --search free\n{best}")
    others = trials[(trials["status"] == "done") & ~trials.index.isin(shown) & ~free]
    if len(others):
        sections.append(f"In none of the tables\n{list_best_trials(others)}")
    for trial in trials[trials["status"] == "failed"].itertuples():
        sections.append(f"failed: {trial.trial}: {trial.reason}")
    return "\n\n".join(sections)


LISTED = (  # columns
    "version shared phi shuffle_count noise_sigma lambda_rec lambda_cls theta lr seed status "
    "epochs_done val_dice dice"
)


def list_best_trials(trials: pd.DataFrame, limit: int | None = None) -> str:
    """The trials with the best validation Dice (all, if there is no limit), a line each."""
    best = trials.sort_values("val_dice", ascending=False)[LISTED.split()][:limit]
    best = best.dropna(axis="columns", how="all").rename(columns={"dice": "test Dice in %"})
    best = best.astype(object).where(best.notna(), "")
    return best.to_string(index=False, float_format="{:.4g}".format)


# ------------------------------------------------------------------ the command


def parse_tune(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The search's own options, and those of train.py that are given for all trials.

    Raises UserError for a value that is not allowed.
    """
    parser = Parser(description="Options of train.py hold for all trials.")
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--search", choices=(*SPACES, "free"), help="what varies, see the README")
    command.add_argument("--report", metavar="DIR", help="print the tables of a search folder")
    add = parser.add_argument
    add("--out", help="folder of the search [runs/<search>]")
    add("--seed", type=int, nargs="+", metavar="", help="seeds [0; claims, organs: 0 1 2]")
    add("--fold", nargs="+", metavar="", help="folds, or all [0; claims, organs: all]")
    add("--samples", type=int, default=32, metavar="", help="draws of --search free per seed [32]")
    add("--address", help="address of a Ray cluster [RAY_ADDRESS, else this machine alone]")
    add("--gpus-per-trial", type=float, metavar="", help="[1 if there is one]; 0.5: two share it")
    add("--cpus-per-trial", type=float, default=1, metavar="", help="CPUs of each trial [1]")
    add("--max-concurrent", type=int, default=0, metavar="", help="trials at once [0: all]")
    names = OPTIONS.keys() - {"out", "resume", "seed", "fold"}
    add_flags(parser, names)
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        if args.report and name != "report" and value != parser.get_default(name):
            raise UserError(f"--report takes no other option. Leave {flag_of(name)} out.")
    if args.search != "free" and args.samples != parser.get_default("samples"):
        raise UserError(f"--samples {args.samples}: it is for --search free. Leave it out.")
    lowest = {"samples": 1, "max_concurrent": 0, "cpus_per_trial": 0, "gpus_per_trial": 0}
    for name, limit in lowest.items():
        value = getattr(args, name)
        if value is not None and not value >= limit:  # also if it is NaN
            raise UserError(f"{flag_of(name)} {value:g}: a number, at least {limit}.")

    # Claims rest on three seeds and all folds.
    is_comparison = args.search in COMPARISONS
    args.seed = args.seed or ([0, 1, 2] if is_comparison else [0])
    args.fold = args.fold or ["all" if is_comparison else "0"]
    args.out = Path(args.out or f"runs/{args.search}").resolve()

    given = options_from_args(args, names)
    for seed in args.seed:
        check_options(Config(**given, seed=seed))
    for name in ("data", "cache", "splits", "organs"):
        if name in given:
            given[name] = str(Path(given[name]).resolve())
    return args, given


def tune_command(argv: list[str] | None = None) -> None:
    """python tune.py: see the top of the file."""
    args, given = parse_tune(argv)
    if args.report is not None:
        print(report_search(Path(args.report)))
        return

    with lock_folder(args.out):
        trials = prepare_trials(args, given)
        unfinished = []
        for trial in trials:
            if trial_status(Path(trial.out), trial.epochs)["status"] != "done":
                unfinished.append(trial)
        done = len(trials) - len(unfinished)
        print(f"search     {args.out}: {len(trials)} trials, {done} finished before", flush=True)
        ended = run_with_ray(args, unfinished) if unfinished else {}
        read_trials(args.out)  # writes results.csv

    print(f"\nresults    {args.out / 'results.csv'}; tables: python tune.py --report '{args.out}'")
    statuses = list(ended.values())  # unfinished: stopped by ASHA
    left = len(unfinished) - statuses.count("done") - statuses.count("unfinished")
    if left:
        to_stderr(f"{left} trials are not finished: the same command goes on.")
        raise SystemExit(1)


if __name__ == "__main__":
    command_line(tune_command)
