"""What a run folder holds and how it is opened; what a search folder holds.

A run folder holds config.json, splits.json, metrics.csv, last.pt, best.pt and, after the last
epoch, summary.json and test_studies.csv. A search folder holds results.csv and a run folder for
each trial, with its trial.json.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import platform
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pandas as pd
import scipy
import torch

from cache import Case, prepare
from common import (
    UserError,
    atomic,
    of_type,
    progress,
    read_json,
    reading,
    remove_stale_files,
    to_stderr,
    write_json,
)
from config import (
    OPTIONS,
    Config,
    applicable_options,
    check_options,
    format_value,
    from_dict,
    mirror_version,
    resolve,
    system_of,
    to_dict,
    variant_for,
)
from devices import choose_amp, choose_device, set_threads
from losses import LOSSES
from mirror_unet import DATA_NAMES, DEFAULT_THETA, IMAGE_NAMES, MirrorUNet, Network
from organs import attach_organs, find_maps, organ_names_for
from phantom import PHANTOM, write_phantom
from preprocess import settings_for
from splits import PARTS, make_splits, read_splits
from studies import StudyFolder, find_studies, summarize_facts

# ------------------------------------------------------------------ the data of a config


def find_data(config: Config, say=print) -> StudyFolder:
    """The studies below --data; without it the simulated cohort, which the first use writes.

    Raises UserError.
    """
    config = check_options(config)
    if config.data is None and not PHANTOM.exists():
        say(f"data       no --data given: writing a simulated PET/CT cohort to {PHANTOM}")
        write_phantom(PHANTOM, progress=lambda visits: progress(visits, "simulate", "study"))
    root = Path(config.data or PHANTOM)
    return find_studies(
        root,
        channels=config.channels,
        lesion_labels=config.lesion_labels,
        own_grids=config.own_grids,
    )


def load_cases(data: StudyFolder, config: Config, say=print) -> list[Case]:
    """The studies, checked, preprocessed and cached; for v5 with their organ maps.

    config: resolved. Raises UserError.
    """
    # The maps come first, as reading the studies may take hours.
    maps = {}
    if variant_for(config, config.kind).organ_branch:
        maps = find_organ_maps(data, config)

    cases = prepare(
        data,
        settings_for(config),
        Path(config.cache),
        workers=config.workers,
        check=config.check,
        skip_bad=config.skip_bad,
        say=say,
    )
    if maps:
        cases = attach_organs(cases, data.studies, maps, config, say)

    simulated = "" if config.data else ", simulated"
    patients = len({case.patient for case in cases})
    with_lesion = sum(case.has_lesion for case in cases)
    say(
        f"data       {data.root} ({data.layout}{simulated}): {len(cases)} studies of "
        f"{patients} patients, {with_lesion} with a lesion"
    )
    notes = [*data.notes, *summarize_facts([case.meta.facts for case in cases])]
    if not data.patients_known:
        notes.append("names do not tell the patient: each case counts as one; see --splits")
    for note in notes:
        say(f"           {note}")
    return cases


def organ_folder(config: Config) -> Path | None:
    """The folder of the organ maps: --organs, or that of the simulated cohort."""
    if config.organs:
        return Path(config.organs)
    return PHANTOM / "organs" if config.data is None else None


def find_organ_maps(data: StudyFolder, config: Config) -> dict[str, Path]:
    """The organ maps by study.

    Raises UserError if there is none, except for a trained run: it knows its organs without.
    """
    directory = organ_folder(config)
    trained = bool(config.organ_names)
    if directory:
        return find_maps(data.studies, directory, required=not trained)
    if not trained:
        raise UserError(f"{config.version} learns organs. Give the folder of their maps: --organs.")
    return {}


def with_organ_names(config: Config, cases: list[Case], say=print) -> Config:
    """The resolved config with the names of the organs that v5 learns; other versions' as it is."""
    if not variant_for(config, config.kind).organ_branch:
        return config
    names = organ_names_for(cases, organ_folder(config), config.organ_names, say)
    return replace(config, organ_names=names)


def choose_splits(
    config: Config, cases: list[Case], run: Path | None = None, say=print
) -> dict[str, list[str]]:
    """The names of the studies of each part.

    They are those of `run`, which resumes, else those of --splits, else folds by patient. Raises
    UserError if `run` has other splits than --splits, if no training study has a lesion, or if
    there are organ maps but none of a training study.
    """
    # A run has a copy of its splits, so the file of --splits may be gone when it resumes.
    from_file = None
    if config.splits and (not run or Path(config.splits).is_file()):
        from_file = read_splits(Path(config.splits), cases, config.fold, config.skip_bad, say)

    if run:
        splits = read_splits(run / "splits.json", cases, 0, config.skip_bad, say)
        if from_file and from_file != splits:
            remedy = "Restore it, or use another --out"
            raise UserError(f"{config.splits}: not the splits of {run}. {remedy}.")
    else:
        splits = from_file or make_splits(cases, config.folds, config.fold, config.split_seed)

    training = [case for case in cases if case.name in splits["train"]]
    if not any(case.has_lesion for case in training):
        raise UserError("No study of the training part has a lesion. Give other --splits or data.")
    if any(case.organs for case in cases) and not any(case.organs for case in training):
        raise UserError("No study of the training part has an organ map. Give other --splits.")
    return splits


# ------------------------------------------------------------------ what a run is made from


def study_fingerprints(parts: dict[str, list[Case]], kind: str) -> dict[str, str]:
    """The hash of each image of each study, and the study's place in the splits.

    The keys are the words for an error, such as "NAME (CT)" and "NAME (splits)".
    """
    titles = dict(zip(("ct", "pet"), IMAGE_NAMES[kind], strict=True), label="mask", organs="organs")
    fingerprints = {}
    for part, cases in parts.items():
        for position, case in enumerate(cases):
            for image, digest in case.meta.digests.items():
                fingerprints[f"{case.name} ({titles[image]})"] = digest
            fingerprints[f"{case.name} (splits)"] = f"{part} {position}"
    return fingerprints


def refuse_changed_studies(run: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Raises UserError if the study_fingerprints are not those that the run began with."""
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        names = f"{', '.join(changed[:4])} ({len(changed)} in all)"
        remedy = "Restore the data and splits, or use another --out"
        raise UserError(f"{run}: changed since the run began: {names}. {remedy}.")


def short_hash(content) -> str:
    """Eight characters that tell settings or splits apart; content is what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def cohort_hash(splits: dict[str, list[str]]) -> str:
    """Eight characters for the studies of all parts, the same for every fold of a cohort."""
    return short_hash(sorted(set().union(*splits.values())))


def build_model(config: Config) -> Network:
    """The seeded network of a resolved config. Raises UserError if the patch does not fit it."""
    torch.manual_seed(config.seed)
    system = system_of(config)
    if system:
        model = system.build(config)
    else:
        model = MirrorUNet(
            version=mirror_version(config),
            shared=config.shared,
            kind=config.kind,
            theta=DEFAULT_THETA if config.theta is None else config.theta,
            bottleneck=config.bottleneck,
            norm=config.norm,
            classifier=config.classifier,
            channels=config.widths,
            organs=config.organ_names,
        )

    if min(config.patch) < model.min_side or any(side % model.stride for side in config.patch):
        sides = f"sides that divide by {model.stride} and are at least {model.min_side}"
        raise UserError(f"--patch {config.patch}: {config.version} takes {sides}.")
    return model


def loss_function(config: Config) -> Callable:
    """The loss of a resolved config: an equation of the paper, or that of a compared system."""
    system = system_of(config)
    return system.loss if system else LOSSES[config.kind][mirror_version(config)]


# ------------------------------------------------------------------ the folder of a run


class FolderBusy(UserError):
    """Another process is writing the folder."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when the process ends, however it ends.

    Raises FolderBusy if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+b") as file:
        try:  # not flock: child processes would inherit it and outlive a killed run by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            finding = "another process is writing this run"
            raise FolderBusy(f"{folder}: {finding}. Wait for it, or use another --out.") from None
        yield


def lock_run_folder(config: Config, stack: contextlib.ExitStack) -> Path:
    """Choose the folder of a run and lock it until `stack` ends.

    It is --out, or else runs/<version>-L<layers> (runs/<system> for a compared system), with a
    number behind it if that is taken, be it by a run that starts at this moment.
    """
    if config.out:
        folder = Path(config.out)
        stack.enter_context(lock_folder(folder))
        return folder

    name = config.version
    if not system_of(config):
        name += "-L" + ("".join(map(str, config.shared)) or "none")
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        if not (folder / "config.json").exists():
            with contextlib.suppress(FolderBusy):
                stack.enter_context(lock_folder(folder))
                return folder


def is_finished(run: Path, epochs: int) -> bool:
    """Whether the run has the test results of so many epochs."""
    return (run / "summary.json").exists() and load_summary(run)["epochs"] == epochs


def can_resume(run: Path, config: Config) -> bool:
    """Whether there is a run to go on with. Raises UserError rather than overwrite or mix runs."""
    remove_stale_files(run)
    last = run / "last.pt"
    if not last.exists() and not (run / "summary.json").exists():
        return False
    if not config.resume:
        raise UserError(f"{run}: holds a run already. Add --resume, or choose another --out.")

    if last.exists():
        checkpoint = load_checkpoint(last)
    elif is_finished(run, config.epochs):  # a search keeps only best.pt of a trial that has ended
        checkpoint = load_checkpoint(run / "best.pt")
    else:
        finding = "has summary.json but no last.pt (a search removes it when a trial ends)"
        raise UserError(f"{run}: {finding}. Use another --out.")

    refuse_changed_options(run, checkpoint["config"], to_dict(config, weights_only=True))
    if checkpoint["epoch"] > config.epochs:
        finding = f"has {checkpoint['epoch']} epochs already, more than --epochs {config.epochs}"
        raise UserError(f"{run}: {finding}. Give more, or use another --out.")
    return True


def changed_options(saved: dict, now: dict) -> str:
    """The options that differ between two configs, as to_dict gives them, in words; "" if none."""
    changes = []
    for name in sorted(saved):
        if saved[name] != now.get(name):
            changes.append(f"{name} was {saved[name]}, now {now.get(name)}")
    return "; ".join(changes)


def refuse_changed_options(run: Path, saved: dict, now: dict) -> None:
    """Raises UserError if two configs, as to_dict gives them, differ."""
    changes = changed_options(saved, now)
    if changes:
        finding = f"a run resumes with the options that it began with ({changes})"
        raise UserError(f"{run}: {finding}. Use another --out.")


# ------------------------------------------------------------------ the files of a run

RESTORE = "Restore it, or train anew with another --out"
TEST_AGAIN = (
    "Remove summary.json and resume the run, which tests it again; of a search's trial remove the "
    "folder, and the search trains it again"
)
OUTCOME = ("val_dice", "seconds", "gpu_memory_mb")  # what summary.json and results.csv both have


def save_config(run: Path, config: Config, device: str, **extra) -> None:
    """Write config.json: options, type of the device, versions, the git commit of the code."""
    record = {"config": to_dict(config), "ran_on": device, **extra, "commit": git_commit()}
    record["python"] = platform.python_version()
    for module in (torch, np, scipy, nibabel, pd):
        record[module.__name__] = str(module.__version__)
    record["platform"] = platform.platform()
    write_json(run / "config.json", record)


def git_commit() -> str:
    """The commit of this code, with +changes if its files differ from it; "" without git."""
    words = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    git = ["git", "-C", str(Path(__file__).parent), *words]
    with contextlib.suppress(OSError):  # git is not installed
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ""


def load_config(run: Path) -> Config:
    """The resolved config of a run. Raises UserError if config.json is missing or not ours."""

    def parse_config(record: dict) -> Config:
        config = from_dict(record["config"])
        if config.kind not in DATA_NAMES:
            raise ValueError(f"saved option kind is {config.kind}")
        return resolve(config, config.kind)

    return read_json(run / "config.json", parse_config, RESTORE)


def load_splits(run: Path) -> dict[str, list[str]]:
    """The names of each part of a run. Raises UserError if splits.json is missing or damaged."""

    def parse_splits(content: dict) -> dict[str, list[str]]:
        splits = {}
        for part in PARTS:
            splits[part] = [of_type(name, str) for name in content[part]]
        return splits

    return read_json(run / "splits.json", parse_splits, RESTORE)


def load_summary(run: Path) -> dict:
    """The "epochs" of a tested run, its OUTCOME, and as "test" the mean of each metric.

    Raises UserError if summary.json is missing or damaged.
    """

    def parse_summary(content: dict) -> dict:
        summary = {"test": {}}
        for name in ("epochs", *OUTCOME):
            summary[name] = of_type(content.get(name), int | float | None)
        for name, statistics in content["systems"]["model"].items():
            summary["test"][name] = of_type(statistics["mean"], int | float | None)
        return summary

    return read_json(run / "summary.json", parse_summary, TEST_AGAIN)


def load_result(run: Path) -> dict:
    """What train() returns of a finished run: what does not depend on how often it resumed."""
    summary = load_summary(run)
    result = {"run": str(run)}
    for name in ("epochs", "val_dice", "test"):
        result[name] = summary[name]
    return result


def save_checkpoint(path: Path, content: dict) -> None:
    with atomic(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, *needed: str) -> dict:
    """A checkpoint of plain types and tensors; it has a model, its config and epoch.

    needed: further keys that it must have. Raises UserError if it is missing or damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint. Train the run first.")
    types = {"epoch": int, "best_dice": float, "val_dice": float}  # all else is a dict
    with reading(path, RESTORE):
        with zipfile.ZipFile(path) as file:  # torch.load does not test the checksums
            if file.testzip():
                raise ValueError("its checksum is wrong")

        content = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("model", "config", "epoch", *needed):
            of_type(content[name], types.get(name, dict))
        return content


def write_csv(path: Path, rows: list[dict] | pd.DataFrame) -> None:
    """Write a table; what a dict lacks is an empty field."""
    with atomic(path) as file:
        file.write(pd.DataFrame(rows).to_csv(index=False).encode())


def read_metrics(run: Path, epochs: float = math.inf) -> list[dict]:
    """The rows of metrics.csv up to `epochs`, without empty fields; [] if there is no file.

    Raises UserError if it is damaged.
    """
    path = run / "metrics.csv"
    if not path.exists():
        return []
    with reading(path, "Restore it; if it is removed, --resume goes on without these rows"):
        frame = pd.read_csv(path, dtype=float).astype({"epoch": int})  # an error if there is text
        if not frame["epoch"].is_monotonic_increasing or frame["seconds"].isna().any():
            raise ValueError("an epoch is missing")

        rows = []
        for record in frame[frame["epoch"] <= epochs].to_dict("records"):
            rows.append({name: value for name, value in record.items() if not pd.isna(value)})
        return rows


def training_seconds(rows: list[dict]) -> float:
    """The seconds that the epochs of these rows of metrics.csv took, with their validation."""
    return sum(row["seconds"] + row.get("val_seconds", 0) for row in rows)


def peak_gpu_memory(rows: list[dict]) -> float | None:
    """The most MB that an epoch of these rows took on a GPU; None if none used one."""
    return max((row.get("gpu_memory_mb", 0) for row in rows), default=0) or None


def loss_term_names(columns) -> list[str]:
    """The weighted loss terms: the columns of metrics.csv without a fixed name or prefix."""
    others = {"epoch", "lr", "loss", "theta", "patches_per_s", "data_wait", "seconds"}
    prefixes = ("grad_", "gate_", "val_", "gpu_")
    return [name for name in columns if name not in others and not name.startswith(prefixes)]


# ------------------------------------------------------------------ a trained run


class LoadedRun(NamedTuple):
    """A trained network on its device, with the config to use it by."""

    model: Network
    config: Config
    device: torch.device
    checkpoint: dict  # model, config, epoch and val_dice; of last.pt val_dice is None


def load_run(run: Path, checkpoint: str, given: dict) -> LoadedRun:
    """Open a trained run.

    checkpoint: "best" or "last". given: options to use in place of the run's own. Raises UserError.
    """
    weights = load_checkpoint(run / f"{checkpoint}.pt")
    saved = load_config(run)
    changes = changed_options(weights["config"], to_dict(saved, weights_only=True))
    if changes:
        finding = f"config.json is not that of {checkpoint}.pt ({changes})"
        raise UserError(f"{run}: {finding}. {RESTORE}.")
    val_dice = weights.get("val_dice", math.nan)  # last.pt has none
    weights["val_dice"] = None if math.isnan(val_dice) else val_dice

    config = replace(saved, **given)
    if not variant_for(saved, saved.kind).organ_branch:
        config = replace(config, organs=None)  # --organs is for a v5 that is opened beside this run
    config = resolve(config, saved.kind)

    device = choose_device(config.device)
    trained_on = read_json(run / "config.json").get("ran_on")
    if "amp" not in given and device.type != trained_on:  # another device has another precision
        config = replace(config, amp="auto")
    model = build_model(config)
    config = choose_amp(config, device, model)
    set_threads(config.threads, to_stderr)

    with reading(run / f"{checkpoint}.pt", "It must fit config.json: do not mix runs"):
        model.load_state_dict(weights["model"])
    model = model.to(device, memory_format=torch.channels_last_3d)
    return LoadedRun(model, config, device, weights)


# ------------------------------------------------------------------ the files of a search

# The options that are columns of results.csv: not the folder, which "trial" names, nor what is not
# saved, nor what the maps say.
SETTINGS = [name for name in OPTIONS if name not in ("out", "resume", "check", "organ_names")]


def load_trial_record(run: Path) -> dict:
    """The content of trial.json.

    It has "searches", which asked for the trial, its "config", here a Config, and "studies", a hash
    of them. Raises UserError if the file is missing or damaged.
    """

    def parse_record(record: dict) -> dict:
        return {
            **record,
            "searches": [of_type(name, str) for name in record["searches"]],
            "studies": of_type(record["studies"], str),
            "config": from_dict(record["config"]),
        }

    return read_json(run / "trial.json", parse_record, "The search's command writes it again")


def trial_status(run: Path, epochs: int) -> dict:
    """A trial's "status", its "reason", "epochs_done", OUTCOME and, if it is done, test_<metric>.

    The status is waiting, unfinished, failed or done. Whatever is wrong with the files of one trial
    must not end the search or its report: such a trial has failed.
    """
    result = {"status": "waiting", "reason": "", "epochs_done": 0, **dict.fromkeys(OUTCOME)}
    try:
        if is_finished(run, epochs):
            summary = load_summary(run)
            result |= {"status": "done", "epochs_done": epochs}
            result |= {name: summary[name] for name in OUTCOME}
            result |= {f"test_{name}": mean for name, mean in summary["test"].items()}
            return result

        if (run / "config.json").exists():
            result["status"] = "unfinished"
        rows = read_metrics(run, epochs)
        if rows:
            dices = [row["val_dice"] for row in rows if "val_dice" in row]
            result["epochs_done"] = rows[-1]["epoch"]
            result["val_dice"] = max(dices, default=None)
            result["seconds"] = round(training_seconds(rows), 1)
            result["gpu_memory_mb"] = peak_gpu_memory(rows)
        if (run / "failed.txt").exists():
            message = (run / "failed.txt").read_text(errors="replace")
            result |= {"status": "failed", "reason": message.partition("\n")[0]}
    except Exception as error:
        reason = f"damaged folder: {type(error).__name__}: {error}".partition("\n")[0]
        result |= {"status": "failed", "reason": reason}
    return result


def trial_row(run: Path) -> dict:
    """A row of results.csv, with "config", the trial's Config, or None if trial.json is damaged.

    It has every option that applies to the trial's version, and its trial_status.
    """
    row = {"trial": run.name, "search": "unknown", "status": "failed", "reason": ""}
    row |= dict.fromkeys((*SETTINGS, "studies", "epochs_done", *OUTCOME, "config"))
    try:
        record = load_trial_record(run)
    except UserError as error:
        return row | {"reason": f"damaged folder: {error}"}

    config = record["config"]
    applies = applicable_options(config, config.kind)
    for name in SETTINGS:
        if applies[name] or name == "phi":  # where Φ does not apply it is "none", as in Table 2
            row[name] = format_value(getattr(config, name))
    row |= {"search": " ".join(record["searches"]), "studies": record["studies"], "config": config}
    return row | trial_status(run, config.epochs)


def read_trials(folder: Path) -> pd.DataFrame:
    """The trials of a search folder, a trial_row each; writes them as results.csv.

    Two more columns are not in that file: "run", the trial's folder, and "dice", its test Dice in %
    (MRI: of the whole tumour). Raises UserError if the folder holds no trials.
    """
    records = sorted(folder.glob("*/trial.json"))
    if not records:
        raise UserError(f"{folder}: no trials of a search. Give the folder of one.")
    trials = pd.DataFrame([trial_row(record.parent) for record in records])

    # A full disk must not end the report; results.csv is written again with the next.
    with contextlib.suppress(OSError):
        write_csv(folder / "results.csv", trials.drop(columns="config"))

    trials["run"] = [record.parent for record in records]
    trials["dice"] = np.nan
    for name in ("test_dice", "test_dice_whole"):  # of PET/CT, of MRI
        if name in trials:
            trials["dice"] = trials["dice"].fillna(100 * trials[name].astype(float))
    return trials
