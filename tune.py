"""Search over λ, θ and L with Ray Tune: python tune.py --search lambdas

SPACES says what each search varies. A trial is train() in a run folder of its own below --out.
These folders are the truth and Ray only schedules, so the same command again finishes a search
that was stopped, killed or widened. python tune.py --report DIR prints its table, without Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

import plots
from data import PHANTOM, UserError, atomic, find_studies, read_json, write_json
from mirror_unet import VARIANTS
from train import (
    Busy,
    Config,
    add_flags,
    as_config,
    check_numbers,
    choose_splits,
    command_line,
    only_writer,
    open_data,
    plain,
    reads,
    resolve,
    seconds_of,
    train,
)

# ------------------------------------------------------------------ what a search varies

SHARED = [(3,), (4,), (5,), (6,), (7,), (4, 5, 6), (3, 4, 5, 6, 7)]  # Table 2, Fig. 3
LAMBDAS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]  # supplement Fig. 1
THETAS = [0.1, 0.2, 0.3, 0.4, 0.5, "learn"]  # Table 2

# A search is one grid or several: every combination of the values of its options is a trial.
SPACES = {
    "lambdas": [
        dict(version=["v3"], shared=[(5,)], phi=["shuffle"], lambda_rec=LAMBDAS, lambda_cls=LAMBDAS)
    ],
    "layers": [
        dict(version=["v1", "v2", "v3"], phi=["none", "noise", "shuffle"], shared=SHARED),
    ],
    "theta": [dict(version=["v4"], theta=THETAS, shared=SHARED)],
}
SPACES["table2"] = SPACES["layers"] + SPACES["theta"]


def reason_of(error: Exception) -> str:
    """An error in one line; of a traceback, as Ray sends it, the last."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1 if "Traceback" in text or "ray::" in text else 0].strip()


def between(low: float, high: float):
    """Values whose logarithm is uniform, to three digits."""
    return lambda rng: float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.3g}")


def subset(items):
    """Each item with probability 1/2."""
    return lambda rng: tuple(item for item in items if rng.random() < 0.5)


# --search free draws each option; those that the drawn version does not read are left out.
FREE = dict(
    version=["v1", "v2", "v3", "v4"],
    shared=subset(range(1, 9)),
    phi=["none", "noise", "shuffle"],
    noise_sigma=between(0.05, 1),
    shuffle_count=[1, 3, 10, 30],
    lambda_rec=between(1e-5, 1e-1),
    lambda_cls=between(1e-5, 1e-1),
    theta=THETAS,
    lr=between(1e-4, 1e-2),
)
# ASHA on the validation Dice: judged after this part of the epochs (before that it says little: it
# is near 0 whatever the settings) and, if that leaves room, after REDUCTION times as many, and so
# on; one in REDUCTION goes on.
FIRST_JUDGED, REDUCTION = 1 / 3, 3

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
ROW_NAMES = plots.PHIS | {"learn": "learned θ"}

# ------------------------------------------------------------------ trials


@dataclass(frozen=True)
class Trial:
    """A training of a search: its name, which is its folder's, and its resolved config."""

    name: str
    config: Config
    studies: str = ""  # a hash of the splits

    @property
    def run(self) -> Path:
        return Path(self.config.out)


def settings(search: str, given: dict, seeds: list[int], samples: int, kind: str) -> list[dict]:
    """The options of each trial. An option in `given` holds for all, in place of the space's.

    Where only some of the trials read it, the others leave it out. Raises UserError.
    """
    trials = []
    for seed in seeds:
        if search == "free":
            trials += [draw(seed, i, kind) | given | {"seed": seed} for i in range(samples)]
        for grid in SPACES.get(search, ()):
            names = [name for name in grid if name not in given]
            for values in itertools.product(*(grid[name] for name in names)):
                trials.append(dict(zip(names, values, strict=True)) | given | {"seed": seed})
    return leave_out_unread(trials, given, kind)


def leave_out_unread(trials: list[dict], given: dict, kind: str) -> list[dict]:
    """The trials without the options that their versions do not read, such as λ_cls of v2.

    A given option that no trial reads stays, so that resolve() refuses it.
    """
    unread = []
    for trial in trials:
        config = Config(version=trial["version"], phi=trial.get("phi"))
        unread.append({name for name, used in reads(config, kind).items() if not used})
    nobody = set.intersection(*unread) & given.keys()
    return [
        {name: value for name, value in trial.items() if name in nobody or name not in skip}
        for trial, skip in zip(trials, unread, strict=True)
    ]


def draw(seed: int, number: int, kind: str) -> dict:
    """Sample `number` of --search free: the same for a seed, however many are drawn."""
    rng = np.random.default_rng([seed, number])
    knobs = FREE | {"version": [v for v in FREE["version"] if v in VARIANTS[kind]]}
    return {
        name: knob(rng) if callable(knob) else knob[rng.integers(len(knob))]
        for name, knob in knobs.items()
    }


def fixed(config: Config) -> dict:
    """The settings that make a trial what it is: those of its weights, and the budget."""
    values = plain(config, weights_only=True) | {"epochs": config.epochs}
    del values["splits"]  # a path; its studies count
    return values


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def name_of(config: Config, splits: dict) -> str:
    """The settings in words and a hash of all of them, of the budget and of the studies."""
    parts = [config.version, "L" + ("".join(map(str, config.shared)) or "none")]
    if config.phi != "none":
        parts.append(config.phi)
    for word, value in (
        ("theta", config.theta),
        ("rec", config.lambda_rec),
        ("cls", config.lambda_cls),
    ):
        if value is not None:
            parts.append(f"{word}{value:g}" if isinstance(value, float) else f"{word}_{value}")
    return "-".join([*parts, f"seed{config.seed}", digest([fixed(config), splits])])


def plan(args: argparse.Namespace, given: dict) -> list[Trial]:
    """All trials that were asked for, checked before anything starts, with the data preprocessed.

    Raises UserError.
    """
    phantom = "data" not in given
    kind = "petct" if phantom else find_studies(Path(given["data"])).kind
    asked = settings(args.search, given, args.seed, args.samples, kind)
    configs = [resolve(replace(Config(), **values), kind, phantom) for values in asked]
    # one pass over the studies before the trials, which share its memory-mapped cache
    _, cases = open_data(configs[0])
    splits = choose_splits(configs[0], cases, None)
    if args.search == "free" and not any(c.has_lesion for c in cases if c.name in splits["val"]):
        raise UserError(
            "--search free judges by the validation Dice, and no study of the validation part has "
            "a lesion. Give other --splits or --split-seed."
        )
    trials = {}
    for config in configs:
        # apart from a grid's trial with the same settings: this one may be stopped
        name = ("free-" if args.search == "free" else "") + name_of(config, splits)
        out = str(Path(args.out, name).resolve())
        config = replace(config, out=out, resume=True, check=False)
        trials.setdefault(name, Trial(name, config, digest(splits)))
    return list(trials.values())


# ------------------------------------------------------------------ what the folders say


ENDED = ("done", "stopped")
SETTINGS = [f.name for f in fields(Config) if f.name not in ("out", "resume", "check")]
OUTCOME = ("epochs_done", "val_dice", "seconds", "gpu_memory_mb")


def number(value) -> float | None:
    """Raises what float() raises; None stays."""
    return None if value is None else float(value)


def look(run: Path, epochs: int) -> dict:
    """What a trial's folder says: its status and why, and what came out so far.

    Whatever is wrong with the files of one trial, it must not end the search or the report.
    """
    found = dict.fromkeys(OUTCOME) | {"reason": "", "epochs_done": 0}
    try:
        if (run / "summary.json").exists():
            summary = read_json(run / "summary.json")
            if summary["epochs"] == epochs:
                found |= {name: number(summary.get(name)) for name in OUTCOME}
                found["epochs_done"] = epochs
                means = summary["systems"]["model"].items()
                found |= {f"test_{name}": number(values["mean"]) for name, values in means}
                return found | {"status": "done"}
        rows = plots.read_metrics(run, epochs)
        if rows:
            dices = [number(row["val_dice"]) for row in rows if "val_dice" in row]
            found |= {
                "epochs_done": rows[-1]["epoch"],
                "val_dice": max(dices, default=None),
                "seconds": round(seconds_of(rows), 1),
                "gpu_memory_mb": max(row.get("gpu_memory_mb", 0) for row in rows) or None,
            }
        if (run / "stopped.json").exists():
            reason = f"by ASHA after epoch {read_json(run / 'stopped.json')['epoch']}"
            return found | {"status": "stopped", "reason": reason}
        if (run / "failed.txt").exists():
            text = (run / "failed.txt").read_text(encoding="utf-8", errors="replace")
            reason = text.split("\n")[0].strip() or "failed.txt does not say why"
            return found | {"status": "failed", "reason": reason}
        return found | {"status": "unfinished" if (run / "config.json").exists() else "waiting"}
    except Exception as error:
        return found | {"status": "failed", "reason": f"damaged folder: {reason_of(error)}"}


def read_record(run: Path) -> dict:
    """trial.json: the searches that asked for the trial, its config and a hash of its studies."""
    record = read_json(run / "trial.json")
    if not (
        isinstance(record, dict)
        and isinstance(record.get("config"), dict)
        and isinstance(record.get("searches"), list)
        and all(isinstance(name, str) for name in record["searches"])
    ):
        raise UserError(f"{run / 'trial.json'}: not a trial's record.")
    return {"studies": f"unknown, {record['config'].get('splits')}"} | record  # of older code


def row_of(run: Path) -> dict:
    """A row of results.csv: every setting that the trial reads, what came out, and the folder."""
    row = {"trial": run.name, "search": "unknown", "status": "failed", "reason": ""}
    row |= dict.fromkeys((*SETTINGS, "studies", *OUTCOME)) | {"folder": run.name}
    try:
        record = read_record(run)
        config = check_numbers(as_config(record["config"]))
        unread = [name for name, used in reads(config, config.kind).items() if not used]
    except Exception:
        return row | {"reason": "damaged folder: trial.json (the search's command writes it again)"}
    row |= {name: in_csv(getattr(config, name)) for name in SETTINGS}
    row |= {name: None for name in unread if name != "phi"}
    row |= {"search": " ".join(record["searches"]), "studies": record["studies"]}
    return row | look(run, config.epochs)


def in_csv(value):
    """An option as results.csv shows it: L as "4 5 6" or "none"; only an unread one is empty."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "default" if value is None else value


class Results:
    """results.csv of a search folder. Rows of ended trials are read once."""

    def __init__(self, folder: Path):
        self.folder, self.ended = folder, {}

    def write(self, running=()) -> None:
        """Read the trials' folders and rewrite results.csv; `running`: names of trials."""
        rows = []
        for file in sorted(self.folder.glob("*/trial.json")):
            row = self.ended.get(file.parent) or row_of(file.parent)
            if row["status"] in ENDED:
                self.ended[file.parent] = row
            elif file.parent.name in running:
                row |= {"status": "running", "reason": ""}
            rows.append(row)
        if not rows:
            return
        frame = pd.DataFrame(rows).sort_values("trial")
        last = ["seconds", "gpu_memory_mb", "folder"]
        frame = frame[[name for name in frame if name not in last] + last]
        with atomic(self.folder / "results.csv") as file:
            file.write(frame.to_csv(index=False).encode())


def when_free(action: Callable, patience: float):
    """action(), once the process that writes the folder has gone. Raises Busy if it stays."""
    until = time.monotonic() + patience
    while True:
        try:
            return action()
        except Busy:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def tidy(trials: list[Trial], patience: float = 0) -> None:
    """Of a trial that ended the best checkpoint is kept; not while its process lives."""

    def remove(run: Path) -> None:
        with only_writer(run):
            (run / "last.pt").unlink(missing_ok=True)

    for trial in trials:
        left = (trial.run / "last.pt").exists()
        if left and look(trial.run, trial.config.epochs)["status"] in ENDED:
            with contextlib.suppress(Busy):
                when_free(lambda run=trial.run: remove(run), patience)


# ------------------------------------------------------------------ a trial, in Ray's process


def run_trial(trial: dict) -> None:
    """train() in the trial's folder, from its last checkpoint if it has one.

    Bad input or a raised error ends the trial, not the search: failed.txt says why. Only a process
    that dies is started again by Ray.
    """
    from ray import tune

    task = trial["task"]
    run, epochs = Path(task["config"]["out"]), task["config"]["epochs"]

    def report(row: dict, **more) -> None:
        if row["epoch"] < epochs:  # the last one is told when its test results are there
            dice = {"val_dice": row["val_dice"]} if "val_dice" in row else {}
            tune.report({"epoch": row["epoch"], "ended": False, **dice, **more})

    try:
        os.chdir(task["cwd"])  # relative paths mean what they mean to the user
        (run / "failed.txt").unlink(missing_ok=True)
        with (
            open(run / "log.txt", "a", buffering=1, encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            # ASHA may not have seen the epochs of a launch before; for a grid they say where it is
            for row in plots.read_metrics(run, epochs):
                report(row, replayed=True)
            # a killed search may have left a process that still writes here
            when_free(lambda: train(as_config(task["config"]), report), patience=180)
    except Exception as error:
        with atomic(run / "failed.txt") as file:
            file.write(f"{reason_of(error)}\n\n{traceback.format_exc()}".encode())
    tune.report({"epoch": epochs, "ended": True})


# ------------------------------------------------------------------ Ray


def start_ray(address: str | None):
    """Ray, connected to a cluster or on this machine alone; returns the module."""
    for key, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: only our own lines
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every epoch validates
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AUTH_MODE": "token",
    }.items():
        os.environ.setdefault(key, value)
    here = str(Path(__file__).resolve().parent)
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": paths, "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    if not address:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # before the import: every server of this Ray listens on the loopback interface only
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray's own watch kills trials for memory that others use, and the search with them
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    else:
        knock(address)
    try:
        import ray
    except ImportError:
        raise UserError('--search needs Ray: pip install "ray[tune]==2.60.0".') from None
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level="CRITICAL",
            log_to_driver=False,
            runtime_env={"env_vars": env},
        )
    except Exception as error:
        if not address:
            raise UserError(f"Ray did not start: {reason_of(error)}") from None
        raise UserError(
            f"--address {address}: no Ray cluster answers ({reason_of(error)}). "
            "See `ray status` there."
        ) from None
    return ray


def knock(address: str) -> None:
    """Raises UserError if nothing listens at host:port, for which Ray would wait minutes."""
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nobody answers ({error.strerror or error}). Start Ray there."
        ) from None


def share_out(ray, args, config: Config) -> dict[str, float]:
    """Processors and GPUs of each trial, from the flags or from what Ray sees."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
    most = max(gpu for _, gpu in nodes)
    gpus, cpus = args.gpus_per_trial, args.cpus_per_trial
    if gpus is None:
        gpus = 1.0 if most and config.device in ("auto", "cuda") else 0.0
    if not 0 <= gpus <= 1:
        raise UserError(f"--gpus-per-trial {gpus:g}: a trial trains on one GPU or a part of one.")
    if gpus > most:
        raise UserError(f"--gpus-per-trial {gpus:g}: Ray sees no GPU here. Use 0.")
    if cpus is None and gpus:  # a trial and its readers, if every GPU can have so many
        fit = min(cpu // (gpu / gpus) for cpu, gpu in nodes if gpu >= gpus)
        cpus = max(1, min(1 + config.workers, fit))
    cpus = 1 if cpus is None else cpus
    if cpus <= 0 or not any(cpu >= cpus and gpu >= gpus for cpu, gpu in nodes):
        most = max((cpu for cpu, gpu in nodes if gpu >= gpus), default=0)
        raise UserError(
            f"--cpus-per-trial {cpus:g}: above 0 and at most {most:g}, as a node has for a trial."
        )
    return {"cpu": cpus, "gpu": gpus}


def probe(paths: dict[str, str], ticket: str) -> list[str]:
    """What is wrong on the node where this runs: one line for each."""
    wrong = [f"{what} {path} is missing" for what, path in paths.items() if not Path(path).exists()]
    folder = Path(paths["--out"])
    if folder.exists() and not (folder / ticket).exists():
        wrong.append(f"--out {folder} is another folder than on the first node")
    if folder.exists() and not os.access(folder, os.W_OK):
        wrong.append(f"--out {folder} cannot be written")
    try:
        import train as _  # noqa: F401
    except ImportError as error:
        wrong.append(f"train.py cannot be imported ({error})")
    return wrong


def probe_nodes(ray, trial: Trial, out: Path) -> None:
    """Every node must see the code, the data, the cache and the output. Raises UserError."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    paths = {
        "--out": str(out),
        "--cache": str(Path(trial.config.cache).resolve()),
        "--data": str(Path(trial.config.data or PHANTOM).resolve()),
        "working folder": os.getcwd(),
        "the code": str(Path(__file__).resolve().parent),
    }
    if trial.config.splits:
        paths["--splits"] = trial.config.splits
    ticket = f".probe-{secrets.token_hex(8)}"
    (out / ticket).touch()
    problems = []
    try:
        ask = ray.remote(num_cpus=0)(probe)
        asked = {
            node["NodeManagerAddress"]: ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(paths, ticket)
            for node in ray.nodes()
            if node["Alive"]
        }
        for address, answer in asked.items():
            try:
                problems += [f"  {address}: {line}" for line in ray.get(answer, timeout=120)]
            except Exception as error:
                problems.append(f"  {address}: no answer ({reason_of(error)})")
    finally:
        (out / ticket).unlink(missing_ok=True)
    if problems:
        raise UserError(
            "the nodes must share code, data, cache and output under the same paths:\n"
            + "\n".join(problems)
        )


def run_of(trial) -> Path:
    """The run folder of a trial as Ray holds it."""
    return Path(trial.config["task"]["config"]["out"])


def halving(trials: list[Trial]):
    """ASHA on the validation Dice, with the epochs of ended trials replayed into it.

    A stopped trial says so in its folder, and its best checkpoint is kept.
    """
    from ray.tune.schedulers import ASHAScheduler

    class Halving(ASHAScheduler):
        def on_trial_result(self, controller, trial, result):
            decision = super().on_trial_result(controller, trial, result)
            if decision == self.STOP and not result["ended"]:
                run = run_of(trial)
                told = {key: result.get(key) for key in ("epoch", "val_dice")}
                write_json(run / "stopped.json", told)
            return decision

    epochs = trials[0].config.epochs
    first = max(1, round(epochs * FIRST_JUDGED))
    scheduler = Halving(
        time_attr="epoch", metric="val_dice", mode="max", grace_period=first,
        max_t=max(first, int(0.8 * epochs)),  # a judgement near the end would save nothing
        reduction_factor=REDUCTION, stop_last_trials=False,
    )  # fmt: skip
    for trial in trials:
        if look(trial.run, epochs)["status"] not in ENDED:
            continue
        past = SimpleNamespace(trial_id=trial.name)
        scheduler.on_trial_add(None, past)
        with contextlib.suppress(Exception):  # it ended; damage to its metrics.csv stops nobody
            for row in plots.read_metrics(trial.run, epochs - 1):
                ASHAScheduler.on_trial_result(scheduler, None, past, row)
    return scheduler


class Table:
    """The console: a line when a trial ends, and every few minutes while none does."""

    quiet = 300  # seconds without a line

    def __init__(self, trials: list[Trial], results: Results):
        self.trials, self.results = {t.name: t for t in trials}, results
        self.screen = sys.stdout  # which Ray does not write to
        found = {t.name: look(t.run, t.config.epochs) for t in trials}
        self.status = {name: own["status"] for name, own in found.items()}
        self.at = {}  # epochs that trials of this launch began with and have now
        self.began = self.last = time.monotonic()
        dices = [own.get("val_dice") for own in found.values() if own["status"] in ENDED]
        self.best = max((dice for dice in dices if dice is not None), default=np.nan)

    def count(self, *wanted: str) -> int:
        return sum(status in wanted for status in self.status.values())

    def left(self) -> str:
        """Time left, by the epochs per second of this launch; stopped trials make it an excess."""
        done = sum(now - first for first, now in self.at.values())
        spent = time.monotonic() - self.began
        open_ = [n for n, s in self.status.items() if s in ("running", "waiting", "unfinished")]
        todo = sum(self.trials[n].config.epochs - self.at.get(n, (0, 0))[1] for n in open_)
        return str(timedelta(seconds=round(todo * spent / done))) if done else ""

    def heading(self) -> None:
        columns = ("elapsed", "done", "stopped", "failed", "running", "waiting", "val Dice", "best",
                   "left")  # fmt: skip
        print("".join(f"{c:>10}" for c in columns) + "  trial", file=self.screen, flush=True)

    def line(self, name: str, dice: float, note: str = "") -> None:
        self.last = time.monotonic()
        cells = [
            timedelta(seconds=round(self.last - self.began)),
            f"{self.count('done')}/{len(self.trials)}",
            self.count("stopped"),
            self.count("failed"),
            self.count("running"),
            self.count("waiting", "unfinished"),
            f"{dice:.4f}" if np.isfinite(dice) else "",
            f"{self.best:.4f}" if np.isfinite(self.best) else "",
            self.left(),
        ]
        text = "".join(f"{cell!s:>10}" for cell in cells) + f"  {name}{note}"
        print(text, file=self.screen, flush=True)

    def started(self, name: str) -> None:
        self.status[name] = "running"
        self.write()

    def reported(self, name: str, result: dict) -> None:
        if result["ended"]:
            return
        now = result["epoch"]
        first, _ = self.at.get(name, (now - 1, 0))
        self.at[name] = (now if result.get("replayed") else first, now)
        if time.monotonic() - self.last > self.quiet:
            self.line(name, result.get("val_dice", np.nan), f", epoch {now}")

    def ended(self, name: str) -> None:
        trial = self.trials[name]
        found = look(trial.run, trial.config.epochs)
        status, reason = found["status"], found["reason"]
        self.status[name] = status
        self.at[name] = (self.at.get(name, (0, 0))[0], found.get("epochs_done", 0))
        tidy([trial])
        self.write()
        dice = found.get("val_dice")
        dice = np.nan if dice is None else dice
        self.best = np.fmax(self.best, dice)
        notes = {"done": "", "stopped": f", stopped {reason}"}
        self.line(name, dice, notes.get(status, f", {status}: {reason}"))

    def write(self) -> None:
        running = {name for name, status in self.status.items() if status == "running"}
        with contextlib.suppress(OSError):  # a full disk, say; the next event writes it again
            self.results.write(running)


def callback(table: Table):
    """Ray's events, told to the table."""
    from ray import tune

    class Tell(tune.Callback):
        def on_trial_start(self, iteration, trials, trial, **info):
            table.started(run_of(trial).name)

        def on_trial_result(self, iteration, trials, trial, result, **info):
            table.reported(run_of(trial).name, result)

        def on_trial_complete(self, iteration, trials, trial, **info):
            table.ended(run_of(trial).name)

        def on_trial_error(self, iteration, trials, trial, **info):
            failed = run_of(trial) / "failed.txt"
            with contextlib.suppress(OSError):  # its folder may be gone
                if not failed.exists():
                    with atomic(failed) as file:
                        file.write(b"its process died again and again; memory may be short\n")
            table.ended(run_of(trial).name)

    return Tell()


def announce(trial: Trial, search: str) -> None:
    """Write trial.json, with the searches that asked for the trial, unless it says so already."""
    trial.run.mkdir(exist_ok=True)
    record = {"searches": [], "config": plain(trial.config), "studies": trial.studies}
    with contextlib.suppress(UserError, TypeError):  # none yet, or damaged
        found = read_record(trial.run)
        if fixed(as_config(found["config"])) == fixed(trial.config):
            record["searches"] = found["searches"]
            if found["studies"] == trial.studies:
                record = found  # with the places that it was trained from
    if search not in record["searches"]:
        write_json(trial.run / "trial.json", record | {"searches": [*record["searches"], search]})


def search(args: argparse.Namespace, given: dict) -> int:
    """Run the trials that are not done; returns how many are left."""
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        trials = plan(args, given)
        for old in (*out.glob(".ray-*"), *out.glob(".probe-*")):  # of a killed search
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for trial in trials:
            announce(trial, args.search)
        results = Results(out)
        table = Table(trials, results)
        todo = [t for t in trials if table.status[t.name] not in ENDED]
        results.write()
        finished = len(trials) - len(todo)
        print(f"search     {out}: {len(trials)} trials, {finished} finished before", flush=True)
        if todo:
            schedule(args, trials, todo, out, table)
        tidy(trials, patience=20)
        results.write()
        left = [t for t in trials if look(t.run, t.config.epochs)["status"] not in ENDED]
    folder = shlex.quote(str(args.out))
    print(f"\nresults    {out / 'results.csv'}; tables: python tune.py --report {folder}")
    return len(left)


def schedule(args, trials: list[Trial], todo: list[Trial], out: Path, table: Table) -> None:
    """Let Ray run the trials of `todo`."""
    address = args.address or os.environ.get("RAY_ADDRESS")
    address = None if address == "local" else address
    ray = start_ray(address)
    from ray import tune

    scratch = Path(tempfile.mkdtemp(prefix=".ray-", dir=out))  # Ray's own state: not needed again
    try:
        need = share_out(ray, args, todo[0].config)
        if address:
            probe_nodes(ray, todo[0], out)
        mps = torch.backends.mps.is_available() and not need["gpu"]
        base = {"threads": todo[0].config.threads or max(1, int(need["cpu"]))}
        if todo[0].config.device == "auto" and not need["gpu"] and not mps:
            base["device"] = "cpu"  # else trials without a GPU would all take the first one
        tasks = [
            {"cwd": os.getcwd(), "config": plain(replace(t.config, **base)) | {"resume": True}}
            for t in todo
        ]
        print(
            f"ray        {address or 'this machine'}: {need['cpu']:g} CPU and {need['gpu']:g} GPU "
            f"per trial, {base['threads']} threads; each trial writes log.txt in its folder\n"
        )
        table.heading()
        tuner = tune.Tuner(
            tune.with_resources(run_trial, need),
            param_space={"task": tune.grid_search(tasks)},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=args.max_concurrent or (1 if mps else None),
                scheduler=halving(trials) if args.search == "free" else None,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(scratch), verbose=0, callbacks=[callback(table)],
                failure_config=tune.FailureConfig(max_failures=3),
            ),
        )  # fmt: skip
        # a node that dies says so in a hundred lines
        with (
            open(out / "ray.log", "a", buffering=1, encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            tuner.fit()
    except (ray.exceptions.RayError, tune.TuneError) as error:
        with open(out / "ray.log", "a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        raise UserError(
            f"Ray ended the search: {reason_of(error)} (see {out / 'ray.log'}). "
            "The same command goes on."
        ) from None
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


# ------------------------------------------------------------------ the report


def refresh(folder: Path) -> None:
    """Write results.csv anew from the trials' folders, which know more if the search was killed."""
    if any(folder.glob("*/trial.json")):
        with contextlib.suppress(Busy, OSError), only_writer(folder):  # a running search writes it
            Results(folder).write()


def report(folder: Path) -> str:
    """The tables of a search folder: Table 2, the λ grid of supplement Fig. 1, the best of free."""
    refresh(folder)
    trials = plots.read_trials(folder / "results.csv")
    counts = ", ".join(f"{n} {status}" for status, n in trials["status"].value_counts().items())
    parts = [f"{folder}: {len(trials)} trials, {counts}"]
    shown = set()
    weighed = trials["lambda_rec"].notna() & trials["lambda_cls"].notna()
    for own, kind, table in (
        (trials[in_table2(trials)], "table 2", table2),
        (trials[weighed], "lambdas", lambda_table),
    ):
        for about, part in plots.comparable(own, kind):
            if part["dice"].notna().any():
                parts.append(table(part, about and f"; {about}"))
                shown |= set(part.index)
    free = trials[["free" in searches.split() for searches in trials["search"]]]
    if len(free):
        parts.append("Best validation Dice of --search free\n" + listing(free))
    other = trials[(trials["status"] == "done") & ~trials.index.isin(shown | set(free.index))]
    if len(other):
        parts.append("In none of the paper's tables\n" + listing(other, most=len(other)))
    failed = trials[trials["status"] == "failed"]
    parts += [f"failed: {row.trial}: {row.reason}" for row in failed.itertuples()]
    return "\n\n".join(parts)


def in_table2(trials: pd.DataFrame) -> np.ndarray:
    """Which trials stand in Table 2: those of its rows and sets L, of PET/CT."""
    rows = plots.methods(trials)
    keys = zip(trials["version"], rows, trials["shared"], trials["kind"], strict=True)
    sets = [in_csv(shared) for shared in SHARED]
    known = [(v, row) in PAPER_TABLE2 and s in sets and k == "petct" for v, row, s, k in keys]
    return np.array(known, bool)


def table2(trials: pd.DataFrame, about: str) -> str:
    """Table 2: test Dice in percent, here and in the paper.

    * is the best of a box (a version and an L), ** also the best of its version, as the paper's
    bold and underlined figures. Seeds are averaged.
    """
    sets = [in_csv(shared) for shared in SHARED]
    table, said = plots.table_2(trials)
    table = table.reindex(index=pd.MultiIndex.from_tuples(PAPER_TABLE2), columns=sets)
    lines = [
        f"Table 2: test Dice in percent, in brackets the paper's; {said}{about}",
        f"{'':<21}" + "".join(f"{'{' + s.replace(' ', ',') + '}':<18}" for s in sets).rstrip(),
    ]
    for version in ("v1", "v2", "v3", "v4"):
        keys = [key for key in PAPER_TABLE2 if key[0] == version]
        ours, papers = marked(table.loc[keys]), marked([PAPER_TABLE2[key] for key in keys])
        for (_, name), own, theirs in zip(keys, ours, papers, strict=True):
            label = ROW_NAMES.get(name, f"θ = {name}")
            pairs = (f"{a} ({b})" for a, b in zip(own, theirs, strict=True))
            lines.append(f"{version:<4}{label:<17}{''.join(f'{p:<18}' for p in pairs)}".rstrip())
    return "\n".join([*lines, "* best of its box, ** also best of its version"])


def marked(values) -> list[list[str]]:
    """The values of a version's rows (one a column per L) as text, the best ones marked."""
    values = np.array(values, float)
    best = np.where(np.isfinite(values), values, -np.inf).max(axis=0)

    def text(value: float, top: float) -> str:
        mark = "**" if value == best.max() else "*" if value == top else ""
        return f"{value:.2f}{mark}" if np.isfinite(value) else "–"

    return [[text(v, top) for v, top in zip(row, best, strict=True)] for row in values]


def lambda_table(trials: pd.DataFrame, about: str) -> str:
    """Supplement Fig. 1 as a table: test Dice in percent over λ_rec (rows) and λ_cls (columns)."""
    table, said = plots.dice_table(trials, ["lambda_rec"], "lambda_cls")
    table = table.sort_index(ascending=False).sort_index(axis=1, ascending=False)
    best = table.max(axis=None)
    lines = [f"Test Dice in percent over λ_rec (rows) and λ_cls (columns); {said}{about}"]
    lines.append(f"{'':<8}" + "".join(f"{value:>8g} " for value in table.columns).rstrip())
    for weight, row in table.iterrows():
        texts = (f"{v:.2f}{'*' if v == best else ' '}" if np.isfinite(v) else "– " for v in row)
        lines.append(f"{weight:<8g}{''.join(f'{text:>9}' for text in texts)}".rstrip())
    return "\n".join([*lines, "* best"])


def listing(frame: pd.DataFrame, most: int = 10) -> str:
    """The trials with the best validation Dice, a line each."""
    names = ["version", "shared", "phi", "shuffle_count", "noise_sigma", "lambda_rec", "lambda_cls",
             "theta", "lr", "seed", "status", "epochs_done", "val_dice", "dice"]  # fmt: skip
    frame = frame.sort_values("val_dice", ascending=False).head(most)
    frame = frame[[name for name in names if name in frame and frame[name].notna().any()]]
    frame = frame.rename(columns={"dice": "test Dice in %"})
    return frame.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.4g}")


# ------------------------------------------------------------------ command line


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The search's own options, and those of train.py that hold for all trials."""
    parser = argparse.ArgumentParser(
        description="Search over λ, θ and L with Ray Tune. The options of train.py (see there) "
        "hold for all trials, in place of what the search has for them.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=100),
    )
    parser.add_argument(
        "--search", choices=(*SPACES, "free"),
        help="lambdas: supplement Fig. 1; layers, theta, or both: table2; free: sampled, with ASHA",
    )  # fmt: skip
    parser.add_argument("--report", metavar="DIR", help="print the tables of a search folder")
    parser.add_argument("--out", help="folder of the search [runs/<search>]")
    parser.add_argument(
        "--seed", type=int, nargs="+", action="extend", metavar="", help="one or more seeds [0]"
    )
    parser.add_argument(
        "--samples", type=int, metavar="", help="trials of --search free, for each seed [32]"
    )
    parser.add_argument("--address", help="of a Ray cluster [RAY_ADDRESS, else this machine alone]")
    parser.add_argument(
        "--gpus-per-trial", type=float, metavar="",
        help="[1 if there is one] 0.5: two trials share a GPU, and each may take half its memory",
    )  # fmt: skip
    parser.add_argument(
        "--cpus-per-trial", type=float, metavar="",
        help="[1; with GPUs 1 + --workers if there are so many]; also the threads of a trial",
    )  # fmt: skip
    parser.add_argument(
        "--max-concurrent", type=int, metavar="", help="trials at once [as the resources allow]"
    )
    options = {f.name for f in fields(Config)} - {"out", "resume", "seed"}
    add_flags(parser.add_argument_group("options of train.py, for all trials"), options)
    args = parser.parse_args(argv)
    if (args.search is None) == (args.report is None):
        raise UserError("give either --search, or --report with the folder of a search.")
    if args.report is not None:
        for name, value in vars(args).items():
            if value is not None and name != "report":
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} has no effect on --report. Leave it out.")
        return args, {}
    if args.samples is not None and args.search != "free":
        raise UserError(f"--samples has no effect on --search {args.search}. Leave it out.")
    if any(seed < 0 for seed in args.seed or ()):
        raise UserError(f"--seed {min(args.seed)}: the least is 0.")
    for name in ("samples", "max_concurrent"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1.")
    args.samples, args.seed = args.samples or 32, args.seed or [0]
    args.out = args.out or f"runs/{args.search}"
    given = {name: value for name, value in vars(args).items() if name in options}
    for name in ("data", "cache", "splits"):  # trials may run elsewhere
        if name in given:
            given[name] = str(Path(given[name]).resolve())
    return args, {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def run_command(argv: list[str] | None = None) -> int:
    """python tune.py: see the top of the file. Returns the exit code."""
    args, given = parse(argv)
    if args.report is not None:
        print(report(Path(args.report)))
        return 0
    left = search(args, given)
    if left:
        print(f"{left} trials are not finished: the same command goes on.", file=sys.stderr)
    return 1 if left else 0


def main() -> None:
    def action() -> None:
        code = run_command()
        if code:
            raise SystemExit(code)

    command_line(action)


if __name__ == "__main__":
    from tune import main  # so that Ray's processes find run_trial by its name

    main()
