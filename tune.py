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
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np

import config as options
import runs
from baselines import LATE_FUSIONS
from config import Config, plain
from devices import choose_device
from eval import run_command as evaluate
from files import Parser, UserError, command_line, read_json, write_json
from mirror_unet import VARIANTS
from runs import ENDED, Busy, look, only_writer, read_metrics
from studies import find_studies
from tables import COMPARISONS, MORE_ARMS, SHARED, report
from train import train

# ------------------------------------------------------------------ what a search varies

LAMBDAS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]  # supplement Fig. 1
THETAS = [0.1, 0.2, 0.3, 0.4, 0.5, "learn"]  # Table 2
PHIS = ["none", "noise", "shuffle"]


def as_grid(arm: dict) -> dict[str, list]:
    """The grid of one trial."""
    return {name: [value] for name, value in arm.items()}


# A search is one grid or several: every combination of the values of its options is a trial.
SPACES = {
    "lambdas": [
        dict(version=["v3"], shared=[(5,)], phi=["shuffle"], lambda_rec=LAMBDAS, lambda_cls=LAMBDAS)
    ],
    "layers": [dict(version=["v1", "v2", "v3"], phi=PHIS, shared=SHARED)],
    "theta": [dict(version=["v4"], theta=THETAS, shared=SHARED)],
}
SPACES["table2"] = SPACES["layers"] + SPACES["theta"]
SPACES |= {n: [*map(as_grid, arms.values())] for n, arms in COMPARISONS.items()}
MORE = {"claims": [*map(as_grid, MORE_ARMS.values())]}  # with --samples all
SEEDS = dict.fromkeys(COMPARISONS, [0, 1, 2])  # by default; of the other searches 0, and fold 0

# --search free draws one of a list, each of a range with probability 1/2, or a number between two
# (its logarithm is uniform); an option that the drawn version does not read is left out.
FREE = dict(
    version=["v1", "v2", "v3", "v4"], shared=range(1, 9), phi=PHIS, noise_sigma=(0.05, 1),
    shuffle_count=[1, 3, 10, 30], lambda_rec=(1e-5, 1e-1), lambda_cls=(1e-5, 1e-1), theta=THETAS,
    lr=(1e-4, 1e-2),
)  # fmt: skip
# ASHA judges its trials by the validation Dice after this part of the epochs (it is near 0 before)
# and, if there are so many, after REDUCTION times as many; one in REDUCTION goes on.
FIRST_JUDGED, REDUCTION = 1 / 3, 3
# In a trial's name, beside version, L and seed.
WORDS = {"phi": "", "theta": "theta", "lambda_rec": "rec", "lambda_cls": "cls"}


def settings(search: str, given: dict, seeds: list[int], folds: list[int], samples, kind: str):
    """The options of each trial; one in `given` holds for all, in place of the search's.

    What its version does not read is left out, such as λ_cls of v2; but a given option that no
    trial reads stays, so that resolve() refuses it. Raises UserError.
    """
    arms = [*SPACES[search], *MORE.get(search, ())] if search in COMPARISONS else []
    arms = {name for arm in arms for name in arm}
    if fixed := sorted(arms & given.keys()):
        raise UserError(f"{options.flag_of(fixed[0])}: --search {search} sets it. Leave it out.")
    asked, spaces = [], [*SPACES.get(search, ()), *(MORE[search] if samples == "all" else ())]
    for repeat in itertools.product(folds, seeds):  # all seeds of a fold first
        own = dict(zip(("fold", "seed"), repeat, strict=True))
        if search == "free":
            asked += [draw(own["seed"], i, kind) | given | own for i in range(samples or 32)]
        for space in spaces:
            grid = space | {name: [value] for name, value in (given | own).items()}
            rows = itertools.product(*grid.values())
            asked += [dict(zip(grid, row, strict=True)) for row in rows]
    used = [options.reads(Config(**values), kind) for values in asked]
    axes = {name for space in SPACES.get(search, ()) for name in space if len(space[name]) > 1}
    nobody = {name for name in given.keys() | axes if not any(read[name] for read in used)}
    if idle := sorted(nobody - given.keys()):
        flags = f"--search {search} --version {asked[0]['version']}"
        raise UserError(f"{flags}: {idle[0]}, which the search varies, is not read. Change either.")
    return [
        {name: value for name, value in values.items() if read[name] or name in nobody}
        for values, read in zip(asked, used, strict=True)
    ]


def draw(seed: int, number: int, kind: str) -> dict:
    """Sample `number` of --search free: the same for a seed, however many are drawn."""
    rng, drawn = np.random.default_rng([seed, number]), {}
    for name, knob in FREE.items():
        if isinstance(knob, tuple):
            drawn[name] = float(f"{np.exp(rng.uniform(*np.log(knob))):.3g}")
        elif isinstance(knob, range):
            drawn[name] = tuple(item for item in knob if rng.random() < 0.5)
        else:
            items = [item for item in knob if name != "version" or item in VARIANTS[kind]]
            drawn[name] = items[rng.integers(len(items))]
    return drawn


def name_of(trial: Config, studies: str) -> str:
    """Its settings in words, and a hash of all that parts two trials."""
    words = [trial.version, f"L{''.join(map(str, trial.shared)) or 'none'}"]
    values = {word: getattr(trial, name) for name, word in WORDS.items()}
    words += [word + options.in_words(v) for word, v in values.items() if v not in (None, "none")]
    words += [f"fold{trial.fold}"] if trial.fold else []
    parts = [trial.version, trial.recipe, options.key_of(trial), trial.seed, trial.fold, studies]
    return "-".join([*words, f"seed{trial.seed}", runs.digest(parts)])


def plan(args: argparse.Namespace, given: dict) -> list[Config]:
    """All trials that were asked for, with their folders; the data are read. Raises UserError."""
    phantom, free = "data" not in given, args.search == "free"
    told = (given.get("channels", ()), given.get("lesion_labels", ()))
    kind = "petct" if phantom else find_studies(Path(given["data"]), True, *told).kind
    usual = {name: given[name] for name in ("folds", "splits") if name in given}
    usual = options.resolve(Config(**usual), kind, phantom)
    seeds = args.seed or SEEDS.get(args.search, [0])
    folds = folds_of(args.fold or (["all"] if args.search in SEEDS else ["0"]), usual)
    asked = settings(args.search, given, seeds, folds, args.samples, kind)
    configs = [options.resolve(Config(**values), kind, phantom) for values in asked]
    # one pass over the studies before the trials, which share its memory-mapped cache
    with_organs = [c for c in configs if options.tasks(c, kind).organs]
    _, cases = runs.open_data([*with_organs, *configs][0])
    maps = {case.name: case.meta["digests"]["organs"] for case in cases if case.organs}
    splits = {
        fold: runs.choose_splits(replace(configs[0], fold=fold), cases, None) for fold in folds
    }
    ill = {case.name for case in cases if case.has_lesion}
    if free and not all(ill & {*own["val"]} for own in splits.values()):
        raise UserError("--search free: no lesion to validate on. Give other --splits.")
    trials = {}
    for config in configs:  # a free one is no grid's trial: it may be stopped
        read = [splits[config.fold], maps] if config in with_organs else splits[config.fold]
        studies = runs.digest(read)
        run = args.out / (("free-" if free else "") + name_of(config, studies))
        run.mkdir(exist_ok=True)
        trials[run] = replace(config, out=str(run), resume=True, check=False)
        cohort = runs.cohort_of(splits[config.fold])
        record = {"searches": [], "config": trials[run], "studies": cohort}
        with suppress(UserError):  # none yet, or damaged
            record = runs.read_record(run)
        if args.search not in record["searches"]:
            record["searches"].append(args.search)
            write_json(run / "trial.json", record | {"config": plain(record["config"])})
    return list(trials.values())


def folds_of(words: list[str], config: Config) -> list[int]:
    """The folds that --fold names; "all" of them are those of the splits file, if it has several.

    Raises UserError.
    """
    if words == ["all"]:
        content = read_json(Path(config.splits)) if config.splits else range(config.folds)
        return [*range(len(content))] if isinstance(content, (list, range)) else [0]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--fold {' '.join(words)}: expected numbers from 0, or all.")
    return [int(word) for word in words]


def state(trial: Config) -> dict:
    """What its folder says; of a trial that ended last.pt goes, unless its process still lives."""
    found, last = look(Path(trial.out), trial.epochs), Path(trial.out, "last.pt")
    if found["status"] in ENDED and last.exists():
        with suppress(Busy, OSError), only_writer(last.parent):
            last.unlink()
    return found


def run_trial(task: dict) -> None:
    """In a process of Ray's: train() in the trial's folder, from its last checkpoint if any.

    An error ends the trial, not the search: failed.txt says why. Ray tries again if the process
    died, or if another one still writes the folder.
    """
    from ray import tune

    trial, run = task["trial"], Path(task["trial"].out)

    def tell(row: dict) -> None:
        """Not of the last epoch: nothing may stop a trial before its test results are there."""
        if "val_dice" in row and row["epoch"] < trial.epochs:
            tune.report({"epoch": row["epoch"], "val_dice": row["val_dice"]})

    with open(run / "log.txt", "a", 1, "utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            (run / "failed.txt").unlink(missing_ok=True)
            os.chdir(task["cwd"])  # relative paths mean what they mean to the user
            for row in read_metrics(run, trial.epochs):  # ASHA may not have seen them
                tell(row)
            train(trial, tell)
        except Exception as error:
            why = f"{str(error).strip() or repr(error)}\n\n{traceback.format_exc()}"
            (run / "failed.txt").write_text(why, encoding="utf-8")
            if isinstance(error, Busy):
                time.sleep(10)
                raise


# ------------------------------------------------------------------ Ray


class Console:
    """Ray's callback: results.csv at each event, a line when a trial ends or none did for long."""

    def __init__(self, trials: list[Config], out: Path):
        self.trials, self.out = trials, out
        self.screen = sys.stdout  # which Ray does not write to
        self.seen = {}  # Ray's word for the state of each trial, by folder
        self.began = self.last = time.monotonic()
        self.silence, self.told = 300, 0  # seconds without a line; lines

    def on_trial_result(self, trial, result, **info) -> None:
        if result.get("done"):  # says the scheduler: a trial that ends by itself does not
            run, told = Path(trial.config["trial"].out), ("epoch", "val_dice")
            with suppress(OSError):  # without it the next launch goes on with the trial
                write_json(run / "stopped.json", {name: result[name] for name in told})

    def on_step_end(self, trials, **info) -> None:
        """Comes several times a second. TERMINATED: done, stopped or failed; ERROR: died."""
        now = {Path(trial.config["trial"].out): trial.status for trial in trials}
        changed = [run for run in now if now[run] != self.seen.get(run)]
        told = [run for run in changed if now[run] in ("TERMINATED", "ERROR")]
        running = [run for run in now if now[run] == "RUNNING"]
        self.seen = now
        for failed in (run / "failed.txt" for run in changed if now[run] == "ERROR"):
            with suppress(OSError):  # its folder may be gone
                if not failed.exists():
                    failed.write_text("its process died (memory?), or does not see this folder\n")
        if changed:
            runs.read_trials(self.out, [run.name for run in running])
        if time.monotonic() - self.last > self.silence:
            told += running[:1]
        for run in told:
            self.line(run)

    def line(self, run: Path) -> None:
        """Where the search is, and one of its trials."""
        self.last = time.monotonic()
        found = {Path(trial.out): state(trial) for trial in self.trials}
        dices = [own["val_dice"] or 0 for own in found.values() if own["status"] in ENDED]
        counts = Counter([own["status"] for own in found.values()] + list(self.seen.values()))
        spent, over = self.last - self.began, counts["TERMINATED"] + counts["ERROR"]
        rest = len(found) - len(dices) - counts["failed"]
        left = timedelta(seconds=round(spent / over * rest)) if over else "unknown"
        own = found[run]
        cells = {
            "elapsed": timedelta(seconds=round(spent)), "left": left,
            "done": f"{counts['done']}/{len(found)}", "stopped": counts["stopped"],
            "failed": counts["failed"], "running": counts["RUNNING"],
            "val Dice": f"{own['val_dice'] or 0:.4f}", "best": f"{max(dices, default=0):.4f}",
        }  # fmt: skip
        if not self.told:
            print("".join(f"{name:>10}" for name in cells) + "  trial", file=self.screen)
        self.told += 1
        line = "".join(f"{cell!s:>10}" for cell in cells.values())
        print(f"{line}  {run.name} {own['status']} {own['reason']}", file=self.screen, flush=True)


def halving(trials: list[Config]):
    """ASHA on the validation Dice, with the epochs of ended trials replayed into it."""
    from ray.tune.schedulers import ASHAScheduler

    epochs = trials[0].epochs
    first = max(1, round(epochs * FIRST_JUDGED))
    last = max(first, int(0.8 * epochs))  # a judgement near the end would save nothing
    asha = ASHAScheduler("epoch", "val_dice", "max", last, first, REDUCTION, stop_last_trials=False)
    for trial in trials:
        if state(trial)["status"] in ENDED:
            past = argparse.Namespace(trial_id=trial.out)
            asha.on_trial_add(None, past)
            with suppress(Exception):  # damage to the metrics.csv of an ended trial stops nobody
                for row in read_metrics(Path(trial.out), epochs - 1):
                    asha.on_trial_result(None, past, row)
    return asha


def share_out(nodes: list[dict], args: argparse.Namespace, config: Config) -> dict[str, float]:
    """Processors and GPUs of each trial, from the flags or from Ray's `nodes`."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    sizes = [(node.get("CPU", 0), node.get("GPU", 0)) for node in alive]
    gpus, cpus = args.gpus_per_trial, args.cpus_per_trial
    if gpus is None:
        gpus = int(config.device in ("auto", "cuda") and any(gpu for _, gpu in sizes))
    fit = [(cpu, gpu) for cpu, gpu in sizes if gpu >= gpus]
    if cpus is None and gpus and fit:  # also for its readers, if every GPU can have so many
        cpus = max(1, min(1 + config.workers, *(cpu // (gpu / gpus) for cpu, gpu in fit)))
    cpus = 1 if cpus is None else cpus
    if not (0 <= gpus <= 1 and 0 < cpus <= max((cpu for cpu, _ in fit), default=0)):
        raise UserError(
            f"--cpus-per-trial {cpus:g} --gpus-per-trial {gpus:g}: above 0 processors and at most "
            f"one GPU, of a node; Ray sees nodes of (CPU, GPU) {sizes}."
        )
    return {"cpu": cpus, "gpu": gpus}


def list_trials(trials: list[Config], at_once: int) -> None:
    """Print each trial and its state, and the hours that the rest will take: by the seconds per
    crop of those that ended, with so many trials at once."""
    rest, paces = 0.0, []
    for trial in trials:
        found = state(trial)
        crops = (trial.steps or 0) * trial.batch_size or trial.crops  # of an epoch, or of a study
        print(f"{found['status']:<11}{Path(trial.out).name}")
        if found["status"] in ENDED and found["seconds"]:
            paces.append(found["seconds"] / (found["epochs_done"] * crops))
        else:
            rest += (trial.epochs - found["epochs_done"]) * crops
    hours = f"{rest * float(np.mean(paces)) / at_once / 3600:.1f} hours" if paces else "unknown"
    print(f"{len(trials)} trials, {len(paces)} ended; left: {hours}, {at_once} at once")


def schedule(args: argparse.Namespace, trials: list[Config], todo: list[Config]) -> None:
    """Let Ray run the trials of `todo`, on a cluster or on this machine alone."""
    address = args.address or os.environ.get("RAY_ADDRESS", "local")
    host, _, port = address.rpartition(":")
    quiet = dict(
        RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",  # a trial that fails has no Dice to report
        RAY_memory_monitor_refresh_ms="0",  # it kills trials for memory that others use
    )  # fmt: skip
    os.environ.update(quiet | os.environ)
    if address == "local":
        os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
        # before the import: every server of this Ray listens on the loopback interface only
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    session = None
    try:
        if host and port.isdecimal():  # Ray would wait minutes for nobody
            socket.create_connection((host, int(port)), timeout=10).close()
        import ray
        from ray import tune

        silent = dict(logging_level="CRITICAL", log_to_driver=False, include_dashboard=False)
        session = ray.init(address, **silent)
        need = share_out(ray.nodes(), args, todo[0])
        mps = not need["gpu"] and choose_device(todo[0].device).type == "mps"
        launch = {"threads": todo[0].threads or max(1, int(need["cpu"]))}
        if todo[0].device == "auto" and not need["gpu"] and not mps:
            launch["device"] = "cpu"  # else trials without a GPU would all take the first one
        print(f"ray        {address}; a trial has {need['cpu']:g} CPU and {need['gpu']:g} GPU\n")
        # Ray takes its own kind of callback only, and Console does not need Ray
        callback = type("Callback", (Console, tune.Callback), {})(trials, args.out)
        tasks, log = [replace(trial, **launch) for trial in todo], args.out / "ray.log"
        with open(log, "a", 1, "utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            tune.run(
                run_trial, name=".ray", storage_path=str(args.out), verbose=0, max_failures=3,
                raise_on_failed_trial=False,
                config={"cwd": os.getcwd(), "trial": tune.grid_search(tasks)},
                resources_per_trial=need, max_concurrent_trials=args.max_concurrent or int(mps),
                callbacks=[callback], scheduler=halving(trials) if args.search == "free" else None,
            )  # fmt: skip
        ray.shutdown()
        shutil.rmtree(args.out / ".ray", ignore_errors=True)  # Ray's own state: not needed again
    except Exception as error:
        if isinstance(error, (UserError, BrokenPipeError)):
            raise
        with suppress(OSError), open(args.out / "ray.log", "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        said = str(error).strip().partition("\n")[0] + " (see ray.log)"
        raise UserError(f"Ray, {address}: {said}. The same command goes on.") from None
    finally:
        if session:
            ray.shutdown()
            if address == "local":  # a folder of logs in /tmp, which Ray leaves there
                shutil.rmtree(session.address_info["session_dir"], ignore_errors=True)


def fuse(trials: list[Config]) -> None:
    """Late fusion, for Table 3, of trials of ct and pet of one seed and fold that ended; each in a
    folder beside them."""
    done = [trial for trial in trials if state(trial)["status"] == "done"]
    places = {(trial.version, trial.fold, trial.seed): Path(trial.out) for trial in done}
    for (version, *repeat), ct in places.items():
        if version == "ct" and (pet := places.get(("pet", *repeat))):
            for mode in LATE_FUSIONS:
                out = ct.with_name(f"late_fusion_{mode}-{ct.name}")
                if (out / "splits.json").exists():  # which is written last
                    continue
                try:
                    evaluate([str(ct), str(pet), "--late-fusion", mode, "--out", str(out)])
                except UserError as error:
                    print(f"not fused  {out}: {error}", file=sys.stderr)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The search's own options, and those of train.py that hold for all trials."""
    parser = Parser(description="Options of train.py hold for all trials.")
    command = parser.add_mutually_exclusive_group(required=True).add_argument
    command("--search", choices=(*SPACES, "free"), help="see the README; free: sampled, with ASHA")
    command("--report", metavar="DIR", help="print the tables of a search folder")
    own = parser.add_argument
    own("--out", help="folder of the search [runs/<search>]")
    own("--seed", type=int, nargs="+", metavar="", help="seeds [0; claims, organs: 0 1 2]")
    own("--fold", nargs="+", metavar="", help="folds, or all [0; claims, organs: all]")
    own("--samples", metavar="", help="trials of --search free for each seed [32]; claims: all")
    own("--address", help="of a Ray cluster [RAY_ADDRESS, else this machine alone]")
    own("--gpus-per-trial", type=float, metavar="", help="[1 if there is one]; 0.5: two share it")
    own("--cpus-per-trial", type=float, metavar="", help="[1; with GPUs 1 + --workers]; threads")
    own("--list", action="store_true", default=None, help="show the trials; do not train")
    own("--max-concurrent", type=int, metavar="", help="trials at once [as the resources allow]")
    names = options.OPTIONS.keys() - {"out", "resume", "seed", "fold"}
    options.add_flags(parser, names)
    args = parser.parse_args(argv)
    others = [value for name, value in vars(args).items() if value is not None and name != "report"]
    if args.report is not None and others:
        raise UserError("--report takes no other option. Leave them out.")
    if args.samples is not None and not (args.samples == "all" and args.search in MORE):
        if args.search != "free" or not args.samples.isdecimal() or int(args.samples) < 1:
            raise UserError(f"--samples {args.samples}: of free at least 1, of claims all.")
        args.samples = int(args.samples)
    if args.max_concurrent is not None and args.max_concurrent < 1:
        raise UserError(f"--max-concurrent {args.max_concurrent}: at least 1.")
    for name in ("gpus_per_trial", "cpus_per_trial"):
        if (given := getattr(args, name)) is not None and not 0 <= given <= options.MOST:
            raise UserError(f"{options.flag_of(name)} {given:g}: a number, at least 0.")
    if args.seed and min(args.seed) < 0:
        raise UserError(f"--seed {min(args.seed)}: the least is 0.")
    args.out = Path(args.out or f"runs/{args.search}").resolve()
    given = options.as_options(args, names)
    options.check(Config(**given))  # before an empty path becomes the working folder
    paths = given.keys() & {"data", "cache", "splits", "organs"}
    given |= {name: str(Path(given[name]).resolve()) for name in paths}
    return args, given


def main(argv: list[str] | None = None) -> None:
    args, given = parse(argv)
    if args.report is not None:
        print(report(Path(args.report)))
        return
    with only_writer(args.out):
        trials = plan(args, given)
        if args.list:
            return list_trials(trials, args.max_concurrent or 1)
        todo = [trial for trial in trials if state(trial)["status"] not in ENDED]
        done = len(trials) - len(todo)
        print(f"search     {args.out}: {len(trials)} trials, {done} finished before", flush=True)
        if todo:
            schedule(args, trials, todo)
        fuse(trials)
        runs.read_trials(args.out)
    print(f"\nresults    {args.out / 'results.csv'}; tables: python tune.py --report '{args.out}'")
    if left := sum(state(trial)["status"] not in ENDED for trial in trials):
        print(f"{left} trials are not finished: the same command goes on.", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    command_line(main)
