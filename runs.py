"""What a run folder holds and how it is opened; what a search folder holds.

A run: config.json, splits.json, metrics.csv, last.pt, best.pt and, after the last epoch,
summary.json and test_studies.csv. A search: a run folder for each trial, with its trial.json, and
results.csv.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import platform
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import scipy
import torch

import config as options
from cache import Case, prepare
from config import OPTIONS, Config, as_config, plain, resolve, system_of
from devices import choose_amp, choose_device, use_threads
from files import UserError, atomic, progress, read_json, reading, sweep, write_json
from losses import LOSSES
from mirror_unet import DATA_NAMES, IMAGE_NAMES, MirrorUNet, Network
from organs import add_organs, find_maps
from phantom import PHANTOM, write_phantom
from preprocess import preprocessing
from splits import PARTS, make_splits, read_splits
from studies import find_studies, summarize

# ------------------------------------------------------------------ what a config stands for


def open_data(config: Config, say: Callable[[str], None] = print) -> tuple[Config, list[Case]]:
    """Find, check and preprocess the studies; the config resolved for their kind. Without
    config.data the simulated cohort is written on first use. Raises UserError."""
    root = Path(options.check(config).data or PHANTOM)
    if config.data is None and not root.exists():
        say(f"data       no --data given: writing a simulated PET/CT cohort to {root}")
        write_phantom(root, progress=lambda visits: progress(visits, "simulate", "study"))
    found = find_studies(root, True, config.channels, config.lesion_labels)
    config = resolve(config, found.kind, phantom=config.data is None)
    learns_organs = options.tasks(config, found.kind).organs
    # before hours of reading
    maps = find_maps(found.studies, root, config) if learns_organs else {}
    how = config.workers, config.check, config.skip_bad, config.allow, say
    cases = prepare(root, found, preprocessing(config), Path(config.cache), *how)
    if learns_organs:
        cases, names = add_organs(cases, found.studies, maps, root, config, say)
        config = replace(config, organ_names=names)
    patients = len({case.patient for case in cases})
    ill = sum(case.has_lesion for case in cases)
    layout = found.layout + (", simulated" if config.data is None else "")
    holds = f"{len(cases)} studies of {patients} patients, {ill} with a lesion"
    say(f"data       {root} ({layout}): {holds}")
    if not found.patients_known:
        found.notes.append("names do not tell the patient: each case counts as one; see --splits")
    for note in found.notes + summarize([case.meta["facts"] for case in cases]):
        say(f"           {note}")
    return config, cases


def choose_splits(config: Config, cases: list[Case], run: Path | None) -> dict[str, list[str]]:
    """The splits of the run that goes on, if any, else those of --splits, else folds by patient.
    Raises UserError if that run's are not those of --splits, or if nobody who trains has a lesion.
    """
    begun, given = run and run / "splits.json", config.splits and Path(config.splits)
    told = (cases, config.fold, config.skip_bad)
    if begun:
        splits = read_splits(begun, cases, 0, config.skip_bad)  # of its fold alone
    elif given:
        splits = read_splits(given, *told)
    else:
        splits = make_splits(cases, config.folds, config.fold, config.split_seed)
    if begun and given and given.is_file() and read_splits(given, *told) != splits:
        raise UserError(f"{given}: not the splits of {run}. Restore it, or use another --out.")
    if not any(case.has_lesion for case in cases if case.name in splits["train"]):
        raise UserError("No study of the training part has a lesion. Give other --splits or data.")
    mapped = {case.name for case in cases if case.organs}
    if mapped and mapped.isdisjoint(splits["train"]):
        raise UserError("No study of the training part has an organ map. Give other --splits.")
    return splits


def studies_of(parts: dict[str, list[Case]], kind: str) -> dict[str, str]:
    """What a run is made from: the digest of each image of a study, and its place in the splits."""
    titles, found = dict(zip(("ct", "pet"), IMAGE_NAMES[kind], strict=True)), {}
    titles |= {"label": "mask", "organs": "organs"}
    for part, cases in parts.items():
        for i, case in enumerate(cases):
            for slot, own in case.meta["digests"].items():
                found[f"{case.name} ({titles[slot]})"] = own
            found[f"{case.name} (splits)"] = f"{part} {i}"
    return found


def refuse_changes(run: Path, began: dict, now: dict) -> None:
    """Raises UserError if the studies, as of studies_of, are not those that the run began with."""
    if changed := [what for what in {**began, **now} if began.get(what) != now.get(what)]:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        what = f"changed since the run began: {', '.join(changed[:4])}{more}"
        raise UserError(f"{run}: {what}. Restore the data and splits, or use another --out.")


def digest(content) -> str:
    """Eight letters that tell settings or splits apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def cohort_of(splits: dict[str, list[str]]) -> str:
    """Tells the studies of all parts from others; folds of one cohort have them in common."""
    return digest(sorted({name for names in splits.values() for name in names}))


def build_model(config: Config) -> Network:
    """The seeded network of a resolved config. Raises UserError if the patch does not fit it."""
    torch.manual_seed(config.seed)
    if system := system_of(config):
        model = system.build(config)
    else:
        theta = 0.2 if config.theta is None else config.theta
        how = config.bottleneck, config.norm, config.classifier, config.widths, config.organ_names
        version = options.mirror_version(config)
        model = MirrorUNet(version, config.shared, config.kind, theta, *how)
    if any(side % model.stride or side < model.least for side in config.patch):
        sides = f"sides that divide by {model.stride} and are at least {model.least}"
        raise UserError(f"--patch {config.patch}: {config.version} takes {sides}.")
    return model


def loss_function(config: Config) -> Callable:
    """The loss of a resolved config: an equation of the paper, or that of a compared system."""
    system = system_of(config)
    return system.loss if system else LOSSES[config.kind][options.mirror_version(config)]


def claim_run(config: Config, stack: contextlib.ExitStack) -> str:
    """Lock the folder of a run until `stack` ends: --out, or runs/<version>-L<layers> (systems have
    no L), with a number behind it if that is taken, be it by a run that starts at this moment."""
    if config.out:
        stack.enter_context(only_writer(Path(config.out)))
        return config.out
    layers = "" if system_of(config) else f"-L{''.join(map(str, config.shared)) or 'none'}"
    base = Path("runs") / f"{config.version}{layers}"
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not (path / "config.json").exists():
            with contextlib.suppress(Busy):
                stack.enter_context(only_writer(path))
                return str(path)


# ------------------------------------------------------------------ the files of a run


class Busy(UserError):
    """Another process is writing the folder."""


@contextlib.contextmanager
def only_writer(run: Path):
    """Hold the folder's lock, which the system frees when the process ends, however it does.
    Raises Busy if another process holds it."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a+b") as file:
        try:  # not flock: child processes would inherit it and outlive a killed run by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            what = "another process is writing this run. Wait for it, or use another --out"
            raise Busy(f"{run}: {what}.") from None
        yield


def save_config(run: Path, config: Config, device: str, **more) -> None:
    """config.json: the options, the device, versions and the git commit that made the run."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:  # git is not installed
            return ""

    changed = "+changes" if git("status", "--porcelain", "-uno") else ""
    about = {
        "commit": git("rev-parse", "HEAD") + changed,
        "python": platform.python_version(),
        **{m.__name__: str(m.__version__) for m in (torch, np, scipy, nibabel, pd)},
        "platform": platform.platform(),
    }
    write_json(run / "config.json", {"config": plain(config), "ran_on": device, **more, **about})


RESTORE = "Restore it, or train anew with another --out"
TEST_AGAIN = (
    "Remove summary.json; --resume tests the run again (of a search's trial, which has no last.pt "
    "any more, remove the folder; the search trains it again)"
)


def saved_config(run: Path) -> Config:
    """The config of a run folder. Raises UserError if it is missing or not one of ours."""

    def take(saved: dict) -> Config:
        config = as_config(saved["config"])
        if config.kind not in DATA_NAMES:
            raise ValueError(f"saved option kind is {config.kind}")
        return config

    return read_json(run / "config.json", take, RESTORE)


def saved_splits(run: Path) -> dict[str, list[str]]:
    """The names of each part of a run. Raises UserError if splits.json is missing or damaged."""

    def take(splits: dict) -> dict:
        return {part: [f"{name:s}" for name in splits[part]] for part in PARTS}

    return read_json(run / "splits.json", take, RESTORE)


def save_checkpoint(path: Path, content: dict) -> None:
    with atomic(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, *needed: str) -> dict:
    """A checkpoint of plain types and tensors, with a network, its epoch and all that is `needed`.
    Raises UserError if it is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint. Train the run first.")
    numbers = {"epoch": int, "best_dice": float, "val_dice": float}
    with reading(path, RESTORE):
        with zipfile.ZipFile(path) as file:  # torch.load does not test the checksums
            if file.testzip():
                raise ValueError("its checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("model", "epoch", *needed):
            if not isinstance(content[name], numbers.get(name, dict)):
                raise TypeError(f"its {name} is a {type(content[name]).__name__}")
        return content


def write_metrics(run: Path, rows: list[dict]) -> None:
    """metrics.csv: a row per epoch; empty where an epoch has no such value."""
    with atomic(run / "metrics.csv") as file:
        file.write(pd.DataFrame(rows).to_csv(index=False).encode())


def read_metrics(run: Path, epochs: float = math.inf) -> list[dict]:
    """The rows of metrics.csv up to `epochs`, [] without the file. Raises UserError if damaged."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    with reading(path, "Restore it; if it is removed, --resume goes on without these rows"):
        frame = pd.read_csv(path).astype({"epoch": int})  # neither text nor NaN
        if not frame["epoch"].is_monotonic_increasing or frame["seconds"].isna().any():
            raise ValueError("an epoch is missing")
        rows = frame[frame["epoch"] <= epochs].to_dict("records")
        return [{k: v + 0 for k, v in row.items() if not pd.isna(v)} for row in rows]


def seconds_of(rows: list[dict]) -> float:
    """How long the epochs of these rows of metrics.csv took, with their validation."""
    return sum(row["seconds"] + row.get("val_seconds", 0) for row in rows)


def most_gpu_memory(rows: list[dict]) -> float | None:
    """The most MB that an epoch of these rows took on a GPU, None without one."""
    return max((row.get("gpu_memory_mb", 0) for row in rows), default=0) or None


def terms_of(names) -> list[str]:
    """The weighted loss terms among the columns of metrics.csv: all that is nothing else."""
    others = {"epoch", "lr", "loss", "theta", "patches_per_s", "data_wait", "seconds"}
    return [n for n in names if n not in others and not n.startswith(("grad_", "val_", "gpu_"))]


def is_finished(run: Path, epochs: int) -> bool:
    """Whether the run has the test results of so many epochs."""
    return (run / "summary.json").exists() and saved_summary(run)["epochs"] == epochs


def saved_summary(run: Path) -> dict:
    """Of summary.json OUTCOME, epochs and, as test, the mean of each metric. Raises UserError."""

    def take(summary: dict) -> dict:
        means = {name: value["mean"] for name, value in summary["systems"]["model"].items()}
        told = {name: summary.get(name) for name in ("epochs", *OUTCOME)}
        if not all(isinstance(n, (int, float, type(None))) for n in {**told, **means}.values()):
            raise TypeError("text in place of a number")
        return told | {"test": means}

    return read_json(run / "summary.json", take, TEST_AGAIN)


def difference(saved: dict, now: dict) -> str:
    """Which options differ between two plain configs, in words; empty if none does."""
    changed = sorted(name for name in saved if saved[name] != now.get(name))
    return "; ".join(f"{name} was {saved[name]}, now {now.get(name)}" for name in changed)


def refuse_settings(run: Path, saved: dict, now: dict) -> None:
    """Raises UserError if two plain configs differ."""
    if what := difference(saved, now):
        raise UserError(f"{run}: a run goes on with its own settings ({what}). Use another --out.")


def can_go_on(run: Path, config: Config) -> bool:
    """Whether the run goes on from what it has. Raises UserError rather than overwrite or mix."""
    sweep(run)
    last, best = run / "last.pt", run / "best.pt"
    ended = [name for name in ("summary.json", "stopped.json") if (run / name).exists()]
    if not (last.exists() or ended):
        return False
    if not config.resume:
        raise UserError(f"{run}: holds a run already. Add --resume, or choose another --out.")
    if not last.exists() and not is_finished(run, config.epochs):
        why = f"has {ended[0]} but no last.pt to go on from (a search removes it when a trial ends)"
        raise UserError(f"{run}: {why}. Use another --out.")
    checkpoint = load_checkpoint(last if last.exists() else best, "config")
    refuse_settings(run, checkpoint["config"], plain(config, weights_only=True))
    before, done = saved_config(run).epochs, checkpoint["epoch"]
    if config.schedule in ("poly", "cosine") and before != config.epochs:
        why = f"was laid out for {before} epochs; going on to {config.epochs} would be neither"
        raise UserError(f"{run}: --schedule {config.schedule} {why}. Use another --out.")
    if done > config.epochs:
        raise UserError(f"{run}: has {done} epochs already, more than --epochs {config.epochs}.")
    return True


def result_of(run: Path) -> dict:
    """What train() returns, from the summary.json of a finished run."""
    summary = saved_summary(run)
    return {"run": str(run)} | {name: summary[name] for name in ("epochs", "val_dice", "test")}


def load_run(run: Path, checkpoint: str, given: dict):
    """Model, config, device and checkpoint of a trained run, with the options `given` in place of
    the run's. checkpoint: "best" or "last". Raises UserError."""
    weights = load_checkpoint(run / f"{checkpoint}.pt", *["val_dice"] * (checkpoint == "best"))
    saved = saved_config(run)
    if what := difference(weights.get("config", {}), plain(saved, weights_only=True)):
        raise UserError(f"{run}: config.json is not that of {checkpoint}.pt ({what}). {RESTORE}.")
    dice_then = weights.pop("val_dice", math.nan)  # last.pt has none
    weights["val_dice"] = None if math.isnan(dice_then) else dice_then
    with reading(run / "config.json", RESTORE):  # its version, and what that does not read
        resolve(saved, saved.kind, phantom=saved.data is None)
    if not options.tasks(saved, saved.kind).organs:  # it may stand beside one that reads them
        given = {name: value for name, value in given.items() if name != "organs"}
    config = replace(saved, **given)
    config = resolve(config, config.kind, phantom=config.data is None)
    device = choose_device(config.device)
    if "amp" not in given and device.type != read_json(run / "config.json").get("ran_on"):
        config = replace(config, amp="auto")  # trained on another kind of device
    model = build_model(config)
    config = choose_amp(config, device, model)
    use_threads(config.threads, lambda text: print(text, file=sys.stderr))
    with reading(run / f"{checkpoint}.pt", "It must fit config.json: do not mix runs"):
        model.load_state_dict(weights["model"])
    return model.to(device, memory_format=torch.channels_last_3d), config, device, weights


# ------------------------------------------------------------------ the files of a search

ENDED = ("done", "stopped")
SETTINGS = [name for name in OPTIONS if name not in ("out", "resume", "check", "organ_names")]
OUTCOME = ("epochs_done", "val_dice", "seconds", "gpu_memory_mb")


def look(run: Path, epochs: int) -> dict:
    """What a trial's folder says: its status and why, and what came out so far. Whatever is wrong
    with the files of one trial, it must not end the search or the report."""
    found = dict.fromkeys(OUTCOME) | {"reason": "", "epochs_done": 0}
    try:
        if is_finished(run, epochs):
            summary = saved_summary(run)
            found |= {name: summary[name] for name in OUTCOME} | {"epochs_done": epochs}
            found |= {f"test_{name}": mean for name, mean in summary["test"].items()}
            return found | {"status": "done"}
        if rows := read_metrics(run, epochs):
            found |= {
                "epochs_done": rows[-1]["epoch"],
                "val_dice": max((r["val_dice"] for r in rows if "val_dice" in r), default=None),
                "seconds": round(seconds_of(rows), 1),
                "gpu_memory_mb": most_gpu_memory(rows),
            }
        if (run / "stopped.json").exists():
            reason = f"by ASHA after epoch {read_json(run / 'stopped.json')['epoch']}"
            return found | {"status": "stopped", "reason": reason}
        if (run / "failed.txt").exists():
            first = (run / "failed.txt").read_text(errors="replace").partition("\n")[0]
            return found | {"status": "failed", "reason": first}
        return found | {"status": "unfinished" if (run / "config.json").exists() else "waiting"}
    except Exception as error:
        reason = f"damaged folder: {type(error).__name__}: {error}".splitlines()[0]
        return found | {"status": "failed", "reason": reason}


def read_record(run: Path) -> dict:
    """trial.json: searches that asked for the trial, its config, a hash of its studies. Raises
    UserError."""

    def take(record: dict) -> dict:
        searches = [f"{name:s}" for name in record["searches"]]
        kept = {"searches": searches, "studies": f"{record['studies']:s}"}
        return record | kept | {"config": as_config(record["config"])}

    return read_json(run / "trial.json", take, "The search's command writes it again")


def row_of(run: Path) -> dict:
    """A row of results.csv: every setting that the trial reads, what came out, and the folder;
    beside it `config`, None where trial.json is damaged."""
    row = {"trial": run.name, "search": "unknown", "status": "failed", "reason": ""}
    row |= dict.fromkeys((*SETTINGS, "studies", *OUTCOME, "config"))
    try:
        record = read_record(run)
    except UserError as error:
        return row | {"reason": f"damaged folder: {error}"}
    config = record["config"]
    used = options.reads(config, config.kind)
    row |= {n: options.in_words(getattr(config, n)) for n in SETTINGS if used[n] or n == "phi"}
    row |= {"search": " ".join(record["searches"]), "studies": record["studies"]}
    return row | {"config": config} | look(run, config.epochs)


def read_trials(folder: Path, running=()) -> pd.DataFrame:
    """The trials of a search folder, a row_of each, also written as results.csv; and `run`, the
    folder, and `dice`, the test Dice in %, for MRI of the whole tumour. running: names of trials
    that train now. Raises UserError if the folder holds no trials."""
    trials = pd.DataFrame([row_of(f.parent) for f in sorted(folder.glob("*/trial.json"))])
    if trials.empty:
        raise UserError(f"{folder}: no trials of a search. Give the folder of one.")
    now = trials["trial"].isin(list(running)) & ~trials["status"].isin(ENDED)
    trials.loc[now, ["status", "reason"]] = "running", ""
    with contextlib.suppress(OSError), atomic(folder / "results.csv") as file:  # or the next time
        file.write(trials.drop(columns="config").to_csv(index=False).encode())
    trials["run"], trials["dice"] = [folder / name for name in trials["trial"]], np.nan
    for name in ("test_dice", "test_dice_whole"):
        if name in trials:
            trials["dice"] = trials["dice"].fillna(100 * trials[name].astype(float))
    return trials
