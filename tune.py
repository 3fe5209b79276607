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
from common import Parser, UserError, command_line, read_json, write_json
from config import (
    OPTIONS,
    Config,
    add_flags,
    applicable_options,
    check_options,
    comparison_key,
    flag_of,
    format_value,
    options_from_args,
    resolve,
    to_dict,
    variant_for,
)
from eval import LATE_FUSIONS, eval_command
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
from tables import SEARCH_TABLES, SHARED_SETS, asked_by, groups_for_table
from train import train

# ------------------------------------------------------------------ what a search varies

LAMBDAS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]  # supplement Fig. 1
THETAS = [0.1, 0.2, 0.3, 0.4, 0.5, "learn"]  # Table 2
PHIS = ["none", "noise", "shuffle"]


def as_grid(options: dict) -> dict[str, list]:
    """The grid of which `options` is the only combination."""
    return {name: [value] for name, value in options.items()}


def expand_grid(grid: dict[str, list]) -> list[dict]:
    """Every combination of the values of a grid's options; those of the last one vary fastest."""
    combinations = itertools.product(*grid.values())
    return [dict(zip(grid, values, strict=True)) for values in combinations]


# A search is one grid or several: every combination of the values of its options is a trial.
SPACES = {
    "lambdas": [
        {
            "version": ["v3"],
            "shared": [(5,)],
            "phi": ["shuffle"],
            "lambda_rec": LAMBDAS,
            "lambda_cls": LAMBDAS,
        }
    ],
    "layers": [{"version": ["v1", "v2", "v3"], "phi": PHIS, "shared": SHARED_SETS}],
    "theta": [{"version": ["v4"], "theta": THETAS, "shared": SHARED_SETS}],
}
SPACES["table2"] = SPACES["layers"] + SPACES["theta"]
for comparison, arms in COMPARISONS.items():
    SPACES[comparison] = [as_grid(arm) for arm in arms.values()]

# --search free draws an entry of a list, each number of a range with probability 1/2, or a number
# between the ends of a pair, uniformly in its logarithm.
FREE = {
    "version": ["v1", "v2", "v3", "v4"],
    "shared": range(1, 9),
    "phi": PHIS,
    "noise_sigma": (0.05, 1),
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
        if isinstance(choices, tuple):
            options[name] = float(f"{np.exp(rng.uniform(*np.log(choices))):.3g}")
        elif isinstance(choices, range):
            options[name] = tuple(item for item in choices if rng.random() < 0.5)
        else:
            if name == "version":
                choices = [version for version in choices if version in VARIANTS[kind]]
            options[name] = choices[rng.integers(len(choices))]
    return options


def search_options(
    search: str, given: dict, seeds: list[int], folds: list[int], samples: int | None, kind: str
) -> list[dict]:
    """The options of each trial of a search; those in `given` hold for all trials.

    Raises UserError if a given option is one that the search itself sets, or has no effect.
    """
    grids = SPACES.get(search, [])
    if search in COMPARISONS:
        for name in given:
            if any(name in grid for grid in grids):
                raise UserError(f"{flag_of(name)}: --search {search} sets it. Leave it out.")

    trials = []
    for fold, seed in itertools.product(folds, seeds):  # all seeds of a fold first
        fixed = {**given, "fold": fold, "seed": seed}
        for grid in grids:
            trials += expand_grid({**grid, **as_grid(fixed)})
        if search == "free":
            for number in range(samples or 32):
                trials.append({**draw_options(seed, number, kind), **fixed})

    needed = list(given)
    for grid in grids:
        needed += [name for name, values in grid.items() if len(values) > 1]
    return leave_out_unused(search, trials, needed, kind)


def leave_out_unused(search: str, trials: list[dict], needed: list[str], kind: str) -> list[dict]:
    """The options of each trial that apply to its version: without λ_cls, say, if that is v2.

    Raises UserError if an option of `needed` applies to no trial.
    """
    kept, used = [], set()
    for options in trials:
        applies = applicable_options(Config(**options), kind)
        kept.append({name: value for name, value in options.items() if applies[name]})
        used.update(kept[-1])

    for name in needed:
        if name not in used:
            problem = f"{flag_of(name)} has no effect on {trials[0]['version']}"
            remedy = "Leave it out, or choose another --search or --version"
            raise UserError(f"--search {search}: {problem}. {remedy}.")
    return kept


# ------------------------------------------------------------------ the folders of the trials


def trial_name(trial: Config, studies: str) -> str:
    """The folder of a trial: what searches vary, and a hash of all that sets two trials apart."""
    words = [trial.version, f"L{''.join(map(str, trial.shared)) or 'none'}"]
    prefixes = {"phi": "", "theta": "theta", "lambda_rec": "rec", "lambda_cls": "cls"}
    for name, prefix in prefixes.items():
        value = getattr(trial, name)
        if value not in (None, "none"):
            words.append(prefix + format_value(value))
    if trial.fold:
        words.append(f"fold{trial.fold}")
    identity = [trial.version, comparison_key(trial), trial.seed, trial.fold, studies]
    return "-".join([*words, f"seed{trial.seed}", short_hash(identity)])


def parse_folds(words: list[str], config: Config) -> list[int]:
    """The folds that --fold names; "all" are those of --splits, if it has several, or of --folds.

    Raises UserError.
    """
    if words == ["all"]:
        if config.splits is None:
            return list(range(config.folds))
        content = read_json(Path(config.splits))
        return list(range(len(content))) if isinstance(content, list) else [0]

    if not all(word.isdecimal() for word in words):
        raise UserError(f"--fold {' '.join(words)}: expected numbers from 0, or all.")
    return [int(word) for word in words]


def prepare_trials(args: argparse.Namespace, given: dict) -> list[Config]:
    """Read the data and give each trial of the search a folder with its trial.json.

    Returns the trials' configs. Raises UserError.
    """
    data = find_data(Config(**given))
    simulated = "data" not in given
    splitting = {name: given[name] for name in ("folds", "splits") if name in given}
    splitting = resolve(Config(**splitting), data.kind, simulated)
    several = args.search in COMPARISONS  # claims rest on three seeds and all folds
    folds = parse_folds(args.fold or ["all" if several else "0"], splitting)
    seeds = args.seed or ([0, 1, 2] if several else [0])

    configs, v5 = [], []
    for options in search_options(args.search, given, seeds, folds, args.samples, data.kind):
        config = resolve(Config(**options), data.kind, simulated)
        configs.append(config)
        if variant_for(config, data.kind).organ_branch:
            v5.append(config)

    # One pass over the studies, before the trials share its cache; v5 alone needs the organ maps.
    cases = load_cases(data, (v5 or configs)[0])
    organ_maps = {case.name: case.meta.digests["organs"] for case in cases if case.organs}
    positive = {case.name for case in cases if case.has_lesion}
    splits = {}
    for fold in folds:
        splits[fold] = choose_splits(replace(configs[0], fold=fold), cases)
        if args.search == "free" and positive.isdisjoint(splits[fold]["val"]):
            raise UserError("--search free: no lesion to validate on. Give other --splits.")

    trials = {}  # by folder: two samples of --search free may be the same
    for config in configs:
        parts = splits[config.fold]
        name = trial_name(config, short_hash([parts, organ_maps] if config in v5 else parts))
        if args.search == "free":  # it may be stopped early, so it is no trial of a grid
            name = f"free-{name}"
        run = args.out / name
        trials[run] = replace(config, out=str(run), resume=True, check=False)
        record_trial(trials[run], args.search, cohort_hash(parts))
    return list(trials.values())


def record_trial(trial: Config, search: str, cohort: str) -> None:
    """Add the search to the trial.json of a trial, which is written if there is none."""
    run = Path(trial.out)
    run.mkdir(exist_ok=True)
    record = {"searches": [], "config": trial, "studies": cohort}
    with suppress(UserError):  # it is missing or damaged
        record = load_trial_record(run)

    if search not in record["searches"]:
        record["searches"].append(search)
        write_json(run / "trial.json", record | {"config": to_dict(record["config"])})


# ------------------------------------------------------------------ one trial


def status_of(trial: Config) -> str:
    return trial_status(Path(trial.out), trial.epochs)["status"]


@contextmanager
def print_to(path: Path):
    """Append all that is printed to a file, line by line."""
    with open(path, "a", 1, "utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def run_trial(task: dict) -> None:
    """Train one trial, in a process of Ray's, from its last checkpoint if there is one.

    An error ends the trial, not the search: failed.txt says why. Ray tries again if the process
    died, or if another one still writes the folder.
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
            if isinstance(error, FolderBusy):
                time.sleep(10)
                raise


# ------------------------------------------------------------------ Ray


class TrialLines:
    """Prints a line per trial that ends, and writes results.csv; a callback of Ray's."""

    def __init__(self, out: Path, total: int):
        self.out, self.total = out, total
        self.screen = sys.stdout  # what Ray prints goes to ray.log
        self.began = time.monotonic()
        self.ended = {}  # the status of each trial that ended, by its folder's name

    def on_trial_complete(self, trial, **info) -> None:
        """Ray calls this when a trial is done, failed or was stopped by ASHA."""
        run, epochs = Path(trial.config["trial"].out), trial.config["trial"].epochs
        result = trial_status(run, epochs)
        self.ended[run.name] = result["status"]
        read_trials(self.out)  # writes results.csv

        ended = len(self.ended)
        failed = list(self.ended.values()).count("failed")
        seconds = (time.monotonic() - self.began) / ended * (self.total - ended)
        left = timedelta(seconds=round(seconds))
        dice = "" if result["val_dice"] is None else f", val Dice {result['val_dice']:.4f}"
        line = f"{ended}/{self.total} ended, {failed} failed, {left} left: "
        line += f"{run.name} {result['status']}{dice} {result['reason']}"
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
    """CPUs and GPUs of each trial: those of the flags, else one CPU and a GPU if there are any.

    nodes: as ray.nodes() returns them. Raises UserError if no node has so many.
    """
    sizes = []
    for node in nodes:
        if node["Alive"]:
            sizes.append((node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)))

    cpus, gpus = args.cpus_per_trial, args.gpus_per_trial
    if cpus is None:
        cpus = 1
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
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no Dice to report
        "RAY_memory_monitor_refresh_ms": "0",  # it kills trials for memory that others use
    }
    host, _, port = address.rpartition(":")
    if address == "local":
        settings["RAY_AUTH_TOKEN"] = os.urandom(32).hex()
        # Set before the import, this makes every server listen on the loopback interface only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    elif host and port.isdecimal():  # Ray would wait for minutes if nobody answers
        socket.create_connection((host, int(port)), timeout=10).close()
    for name, value in settings.items():
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
    """Let Ray, which has been started, run the trials. Returns the status of those that ended."""
    import ray
    from ray import tune

    device = trials[0].device
    resources = resources_per_trial(ray.nodes(), args, device)
    if resources["gpu"] == 0 and device == "auto":
        device = "cpu"  # otherwise trials without a GPU would all take the first one
    threads = trials[0].threads or max(1, int(resources["cpu"]))
    print(f"ray        a trial has {resources['cpu']:g} CPU and {resources['gpu']:g} GPU\n")

    class Callback(TrialLines, tune.Callback):
        """TrialLines does not need Ray."""

    lines = Callback(args.out, len(trials))
    trials = [replace(trial, device=device, threads=threads) for trial in trials]

    with print_to(args.out / "ray.log"):
        tune.run(
            run_trial,
            name=".ray",
            storage_path=str(args.out),
            config={"trial": tune.grid_search(trials), "cwd": os.getcwd()},
            resources_per_trial=resources,
            max_concurrent_trials=args.max_concurrent or 0,
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


def fuse_late_trials(trials: list[Config]) -> None:
    """Late fusion for Table 3 of the finished trials of ct and pet of one seed and fold.

    Each fusion has a folder beside those of the trials.
    """
    folders = {}
    for trial in trials:
        if status_of(trial) == "done":
            folders[trial.version, trial.fold, trial.seed] = Path(trial.out)

    for (version, fold, seed), ct in folders.items():
        pet = folders.get(("pet", fold, seed))
        if version != "ct" or pet is None:
            continue
        for join in LATE_FUSIONS:
            out = ct.with_name(f"late_fusion_{join}-{ct.name}")
            if (out / "splits.json").exists():  # it is written last
                continue
            try:
                eval_command([str(ct), str(pet), "--late-fusion", join, "--out", str(out)])
            except UserError as error:
                print(f"not fused  {out}: {error}", file=sys.stderr)


# ------------------------------------------------------------------ the report


def report_search(folder: Path) -> str:
    """The tables of a search folder: Table 2, the λ grid of supplement Fig. 1, the claims, the best
    trials of --search free, and what is in none of them."""
    trials = read_trials(folder)
    counts = [f"{count} {status}" for status, count in trials["status"].value_counts().items()]
    parts = [f"{folder}: {len(trials)} trials, {', '.join(counts)}"]
    shown = set()
    for name, table in SEARCH_TABLES.items():
        for about, group in groups_for_table(trials[trials.apply(table.belongs, axis=1)], name):
            if group["dice"].notna().any():
                parts.append(table.text(group, about))
                shown.update(group.index)
    for about, group in claim_groups(trials):
        parts.append(claims_text(group, about))
        shown.update(group.index)

    free = asked_by(trials, "free")
    if free.any():
        best = list_best_trials(trials[free], limit=10)
        parts.append(f"Best validation Dice of --search free\n{best}")
    others = trials[(trials["status"] == "done") & ~trials.index.isin(shown) & ~free]
    if len(others):
        parts.append(f"In none of the paper's tables\n{list_best_trials(others)}")
    for trial in trials[trials["status"] == "failed"].itertuples():
        parts.append(f"failed: {trial.trial}: {trial.reason}")
    return "\n\n".join(parts)


LISTED = [
    "version",
    "shared",
    "phi",
    "shuffle_count",
    "noise_sigma",
    "lambda_rec",
    "lambda_cls",
    "theta",
    "lr",
    "seed",
    "status",
    "epochs_done",
    "val_dice",
    "dice",
]


def list_best_trials(trials: pd.DataFrame, limit: int | None = None) -> str:
    """The trials with the best validation Dice, a line each."""
    best = trials.sort_values("val_dice", ascending=False)[LISTED][:limit]
    best = best.dropna(axis="columns", how="all").rename(columns={"dice": "test Dice in %"})
    best = best.astype(object).where(best.notna(), "")
    return best.to_string(index=False, float_format="{:.4g}".format)


# ------------------------------------------------------------------ the command


def parse_tune(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The search's own options, and those of train.py that hold for all trials."""
    parser = Parser(description="Options of train.py hold for all trials.")
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--search", choices=(*SPACES, "free"), help="what varies, see the README")
    command.add_argument("--report", metavar="DIR", help="print the tables of a search folder")
    add = parser.add_argument
    add("--out", help="folder of the search [runs/<search>]")
    add("--seed", type=int, nargs="+", metavar="", help="seeds [0; claims, organs: 0 1 2]")
    add("--fold", nargs="+", metavar="", help="folds, or all [0; claims, organs: all]")
    add("--samples", type=int, metavar="", help="trials of --search free for each seed [32]")
    add("--address", help="address of a Ray cluster [RAY_ADDRESS, else this machine alone]")
    add("--gpus-per-trial", type=float, metavar="", help="[1 if there is one]; 0.5: two share it")
    add("--cpus-per-trial", type=float, metavar="", help="processors of each trial [1]")
    add("--max-concurrent", type=int, metavar="", help="trials at once [as the resources allow]")
    names = OPTIONS.keys() - {"out", "resume", "seed", "fold"}
    add_flags(parser, names)
    args = parser.parse_args(argv)

    if args.report is not None:
        others = [value for name, value in vars(args).items() if name != "report"]
        if any(value is not None for value in others):
            raise UserError("--report takes no other option. Leave them out.")
    if args.samples is not None and (args.search != "free" or args.samples < 1):
        raise UserError(f"--samples {args.samples}: it is for --search free, and at least 1.")
    if args.max_concurrent is not None and args.max_concurrent < 1:
        raise UserError(f"--max-concurrent {args.max_concurrent}: at least 1.")

    for name in ("cpus_per_trial", "gpus_per_trial"):
        value = getattr(args, name)
        if value is not None and not value >= 0:  # also if it is NaN
            raise UserError(f"{flag_of(name)} {value:g}: a number, at least 0.")

    given = options_from_args(args, names)
    for seed in args.seed or [0]:
        check_options(Config(**given, seed=seed))
    for name in ("data", "cache", "splits", "organs"):
        if name in given:
            given[name] = str(Path(given[name]).resolve())
    args.out = Path(args.out or f"runs/{args.search}").resolve()
    return args, given


def tune_command(argv: list[str] | None = None) -> None:
    """python tune.py: see the top of the file."""
    args, given = parse_tune(argv)
    if args.report is not None:
        print(report_search(Path(args.report)))
        return

    with lock_folder(args.out):
        trials = prepare_trials(args, given)
        unfinished = [trial for trial in trials if status_of(trial) != "done"]
        done = len(trials) - len(unfinished)
        print(f"search     {args.out}: {len(trials)} trials, {done} finished before", flush=True)

        ended = {}
        if unfinished:
            ended = run_with_ray(args, unfinished)
        fuse_late_trials(trials)
        read_trials(args.out)  # writes results.csv

    print(f"\nresults    {args.out / 'results.csv'}; tables: python tune.py --report '{args.out}'")
    left = 0
    for trial in unfinished:
        stopped_by_asha = ended.get(Path(trial.out).name) == "unfinished"
        left += status_of(trial) != "done" and not stopped_by_asha
    if left:
        print(f"{left} trials are not finished: the same command goes on.", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    command_line(tune_command)
