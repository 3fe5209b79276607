"""Train Mirror U-Net: python train.py --version v2 --shared 5

Config is every option, once: the flag, the argument of train() and what a run saves. DEFAULTS
is what a kind of data sets where nothing was asked for. train() is the loop.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import scipy
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import eval as evaluation
import plots
from baselines import CLASSIFYING, MASKS, ONE_MODALITY, SYSTEMS
from data import (
    PHANTOM,
    Case,
    Loader,
    Patches,
    Schedule,
    UserError,
    add_noise,
    atomic,
    find_studies,
    make_splits,
    prepare,
    preprocessing,
    progress,
    read_json,
    read_splits,
    shuffle_voxels,
    write_json,
    write_phantom,
)
from losses import LOSSES, Batch, gradient_norms
from mirror_unet import DATA_NAMES, STRIDE, MirrorUNet, Variant, count_parameters, variant_of


def option(default=None, help="", **more):
    """A field of Config with what its flag needs: help, choices, type, nargs."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    """Every option of a run. None means: as DEFAULTS says for the kind of data."""

    version: str = option(
        "v2",
        "task combination, Fig. 2: v1 v2 v3 v4; MRI: v1 v2 v2-rec; or a row of baselines.SYSTEMS",
    )
    shared: tuple[int, ...] = option(
        (5,), "shared layers L of 1..8; none if empty", type=int, nargs="*"
    )
    data: str | None = option(None, "folder of studies; without it a simulated cohort is made")
    kind: str | None = option(None, "petct or mri, found from the data", flag=False)
    out: str | None = option(None, "run folder; default runs/<version>-L<layers>, numbered")
    resume: bool = option(False, "go on with the run in --out (or start it), also to more --epochs")

    modality: str = option(
        "both", "v1-v3: give both branches CT or PET (Sec. 4.2)", choices=("both", "ct", "pet")
    )
    bottleneck: str = option(
        "own", "decoders start from their own bottom (Eq. 1) or from both", choices=("own", "joint")
    )
    norm: str = option("shared", "batch norms of shared layers", choices=("shared", "private"))
    classifier: str = option(
        "both", "bottoms that T sees; pet: as in the released code", choices=("both", "pet")
    )
    theta: str | float | None = option(None, "v4: weight of CT in Eq. 4, or learn [0.2]")
    phi: str | None = option(
        None, "Φ on CT [shuffle where it applies]", choices=("none", "noise", "shuffle")
    )
    noise_sigma: float = option(0.3, "Φ noise: its sd is drawn from U(0, this)")
    shuffle_edge: int = option(16, "Φ shuffle: edge of a cube in voxels")
    shuffle_count: int = option(
        1, "Φ shuffle: cubes per crop; 1 touches 0.5 %% of 96^3, 30 an eighth"
    )
    rec: str = option(
        "l2",
        "reconstruction term: the paper's norm or the released code's MSE",
        choices=("l2", "mse"),
    )
    lambda_rec: float | None = option(None, "λ_rec [1e-4 with l2, 1e-3 with mse]")
    lambda_seg: float | None = option(None, "λ_seg [0.5; MRI v1, v2: 1/3 per task]")
    lambda_cls: float | None = option(None, "λ_class of v3 [1e-3]")
    class_label: str = option(
        "crop", "what T learns: the crop, or its study, has a lesion", choices=("crop", "volume")
    )

    epochs: int | None = option(None, "passes over the training studies", type=int)
    steps: int | None = option(None, "steps per epoch [all crops once]", type=int)
    batch_size: int | None = option(None, "crops per step, over all devices", type=int)
    crops: int | None = option(None, "crops per study and epoch", type=int)
    patch: tuple[int, ...] | None = option(
        None, "sides of a crop, divisible by 16; one or three", type=int, nargs="+"
    )
    spacing: tuple[float, ...] | None = option(
        None, "voxel size in mm; one or three", type=float, nargs="+"
    )
    lesion_p: float | None = option(
        None, "probability that a lesion voxel is a crop's centre [2/3]", type=float
    )
    recipe: str = option(
        "matched", "of a compared system: Mirror U-Net's or its own", choices=("matched", "own")
    )
    optimizer: str | None = option(
        None, "Adam or SGD with Nesterov momentum 0.99 [adam]", choices=("adam", "sgd")
    )
    lr: float | None = option(None, "learning rate [1e-3]", type=float)
    schedule: str | None = option(
        None,
        "of lr: a tenth from --lr-drop on, polynomial 0.9, cosine, or 0.985 per epoch [step]",
        choices=("step", "poly", "cosine", "exp"),
    )
    lr_drop: int | None = option(None, "lr is a tenth after this epoch; 0: never", type=int)
    weight_decay: float | None = option(None, "weight decay [1e-6]", type=float)
    clip: float | None = option(None, "largest gradient norm; 0: any [0]", type=float)

    amp: str = option(
        "auto",
        "mixed precision [bf16 on CUDA, none elsewhere]",
        choices=("auto", "none", "bf16", "fp16"),
    )
    compile: bool = option(False, "torch.compile the network")
    device: str = option("auto", "device", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(0, "CPU threads of torch; 0: as torch chooses")
    workers: int = option(2, "threads that read crops, processes that preprocess")
    seed: int = option(0, "seed of weights, crops, Φ and dropout")

    folds: int | None = option(None, "the data are split into this many folds by patient", type=int)
    fold: int = option(0, "the fold that is the test part")
    split_seed: int = option(0, "seed of the split")
    splits: str | None = option(None, "JSON with train, val, test, instead of folds")
    val_every: int | None = option(None, "validate every so many epochs", type=int)
    overlap: float | None = option(None, "overlap of inference windows [0.25]", type=float)
    window_weights: str | None = option(
        None, "weights inside a window [constant]", choices=("constant", "gaussian")
    )
    window_batch: int = option(4, "inference windows at once")
    cache: str = option("cache", "folder of the preprocessed studies")
    check: bool = option(False, "read and check all files again")
    skip_bad: bool = option(False, "leave out studies that fail the input check")


# The recipe of all systems (Sec. 3.4; the released code's lr falls at epoch 250).
RECIPE = dict(optimizer="adam", lr=1e-3, schedule="step", weight_decay=1e-6, clip=0.0,
              lesion_p=2 / 3, overlap=0.25, window_weights="constant")  # fmt: skip
DEFAULTS = {
    # Sec. 3.4; in the released code an epoch is 4 crops of every PET/CT study, 1 of an MRI.
    "petct": dict(epochs=400, batch_size=4, crops=4, patch=(96, 96, 96), spacing=(2.0, 2.0, 3.0),
                  lr_drop=250, val_every=5, folds=5),
    "mri": dict(epochs=400, batch_size=4, crops=1, patch=(224, 224, 144), spacing=(1.0, 1.0, 1.0),
                lr_drop=250, val_every=5, folds=5),
    # A quick look on two CPU cores, not the paper's recipe.
    "phantom": dict(epochs=10, batch_size=2, crops=4, patch=(48, 48, 48), spacing=(5.0, 5.0, 6.0),
                    lr_drop=8, val_every=2, folds=3),
}  # fmt: skip

# What a launch decides and the weights do not depend on. All the rest must stay the same when a run
# goes on; `epochs` may grow. `data` may have moved: the splits name the studies.
LAUNCH = {"out", "resume", "data", "cache", "check", "skip_bad", "workers", "device", "threads",
          "compile", "window_batch", "epochs"}  # fmt: skip


def mirror_version(config: Config) -> str:
    """The version of Mirror U-Net behind a name: v3 for v3_ct_only."""
    return ONE_MODALITY.get(config.version, (config.version, None))[0]


def resolve(config: Config, kind: str, phantom: bool) -> Config:
    """Fill the Nones for this kind of data and reject what does not fit. Raises UserError."""
    system = SYSTEMS.get(config.version)
    variant, modality = tasks(config, kind), ONE_MODALITY.get(config.version, (None, None))[1]
    if modality and config.modality not in ("both", modality):
        raise UserError(f"--modality {config.modality}: {config.version} is {modality} alone.")
    if config.kind not in (None, kind):
        raise UserError(
            f"--data: holds {DATA_NAMES[kind]} studies, the run was made for "
            f"{DATA_NAMES[config.kind]}. Give data of that kind."
        )
    table = RECIPE | DEFAULTS["phantom" if phantom else kind]
    if config.recipe == "own":
        if not (system and system.own):
            raise UserError(f"--recipe own: none is known for {config.version}. Leave it out.")
        table |= system.own
    values = {k: v for k, v in table.items() if getattr(config, k) is None} | {"kind": kind}
    values["modality"] = modality or config.modality
    used = reads(config, kind)
    refuse_unused(config, used)
    defaults = {
        "theta": 0.2,
        "lambda_rec": 1e-4 if config.rec == "l2" else 1e-3,
        "lambda_seg": 0.5 if variant.exclusive else 1 / 3,
        "lambda_cls": 1e-3,
    }
    for name, default in defaults.items():
        if getattr(config, name) is None:
            values[name] = default if used[name] else None
    if config.phi is None:
        values["phi"] = "shuffle" if variant.phi else "none"
    config = replace(config, **values)
    for name in ("patch", "spacing"):
        value = getattr(config, name)
        if len(value) not in (1, 3) or not all(0 < side < math.inf for side in value):
            raise UserError(f"--{name} {value}: give one or three numbers above zero.")
        config = replace(config, **{name: tuple(value) * (3 // len(value))})
    if any(side % STRIDE for side in config.patch):
        raise UserError(f"--patch {config.patch}: every side must divide by {STRIDE}.")
    if config.phi == "shuffle" and config.shuffle_edge > min(config.patch):
        raise UserError(f"--shuffle-edge {config.shuffle_edge} exceeds a side of {config.patch}.")
    return check_numbers(config)


def tasks(config: Config, kind: str) -> Variant:
    """The tasks of the config's version, a compared system's being the mask. Raises UserError."""
    if config.version in SYSTEMS:
        return Variant(*2 * (MASKS[kind],))
    try:
        return variant_of(kind, mirror_version(config))
    except ValueError as error:
        others = ", ".join((*ONE_MODALITY, *SYSTEMS))
        raise UserError(f"--version: {error}; or a compared system: {others}.") from None


def reads(config: Config, kind: str) -> dict[str, bool]:
    """Whether this version reads each of the options that not every version has."""
    system, variant = config.version in SYSTEMS, tasks(config, kind)
    rec = "rec" in (variant.ct, variant.btl)
    return {
        "phi": variant.phi,
        "theta": variant.fused and not system,
        "lambda_rec": rec,
        "lambda_seg": not variant.fused,
        "lambda_cls": variant.tumor,
        "shared": not system,
        "rec": rec,
        "class_label": variant.tumor or config.version in CLASSIFYING,
        "classifier": variant.tumor,
        "bottleneck": not system,
        "norm": not system or config.version == "valindria",
        "modality": rec and variant.pet == "lesion",
        "noise_sigma": config.phi == "noise" and variant.phi,
        "shuffle_edge": config.phi in (None, "shuffle") and variant.phi,
        "shuffle_count": config.phi in (None, "shuffle") and variant.phi,
    }


def refuse_unused(config: Config, used: dict[str, bool]) -> None:
    """Raise UserError for an option that was set and that this version does not read."""
    if config.phi not in (None, "none") and not used["phi"]:
        raise UserError(
            f"--phi {config.phi}: {config.version} reconstructs no CT here. Use --phi none."
        )
    for name, applies in used.items():
        if name != "phi" and not applies and getattr(config, name) != getattr(Config, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} has no effect on {config.version} here. Leave it out.")


def check_numbers(config: Config) -> Config:
    """Ranges of the plain numbers. Raises UserError with the flag and the value."""
    if not set(config.shared) <= set(range(1, 9)):
        raise UserError(f"--shared {sorted(config.shared)}: L is a subset of 1 to 8 (Sec. 3.2).")
    config = replace(config, shared=tuple(sorted(set(config.shared))))
    for f in fields(config):  # the command line checks choices, a caller of train() does not
        if "choices" in f.metadata and getattr(config, f.name) not in f.metadata["choices"]:
            flag = f"--{f.name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(config, f.name)}: one of {f.metadata['choices']}.")
    for name in (
        "lr",
        "weight_decay",
        "clip",
        "noise_sigma",
        "lambda_rec",
        "lambda_seg",
        "lambda_cls",
    ):
        if not 0 <= (getattr(config, name) or 0) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: at least 0.")
    least = dict(epochs=1, batch_size=1, crops=1, val_every=1, lr_drop=0, workers=0, threads=0,
                 window_batch=1, shuffle_edge=1, shuffle_count=0, seed=0, split_seed=0)  # fmt: skip
    for name, low in least.items():
        if getattr(config, name) < low:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(config, name)}: the least is {low}.")
    if max(config.seed, config.split_seed) >= 2**63:
        raise UserError("--seed and --split-seed: below 2^63.")
    if config.steps is not None and config.steps < 1:
        raise UserError(f"--steps {config.steps}: the least is 1.")
    if not 0 <= config.overlap < 1:
        raise UserError(f"--overlap {config.overlap}: at least 0 and below 1.")
    if not 0 <= config.lesion_p <= 1:
        raise UserError(f"--lesion-p {config.lesion_p}: between 0 and 1.")
    if config.theta not in (None, "learn"):
        try:
            theta = float(config.theta)
        except ValueError:
            theta = math.nan
        if not 0 <= theta <= 1:
            raise UserError(f"--theta {config.theta}: a number from 0 to 1, or learn.")
        config = replace(config, theta=theta)
    return config


def add_flags(parser: argparse.ArgumentParser, names=None) -> None:
    """A flag per field of Config (or of `names`); unset flags leave no attribute behind."""
    for f in fields(Config):
        if f.metadata.get("flag") is False or (names is not None and f.name not in names):
            continue
        kwargs = {k: v for k, v in f.metadata.items() if k != "flag"}
        if isinstance(f.default, bool):
            kwargs["action"] = "store_true"
        else:
            kwargs.setdefault("type", type(f.default) if f.default is not None else str)
            kwargs["metavar"] = "" if "choices" not in kwargs else None
            if f.name.startswith("lambda"):
                kwargs["type"] = float
            if f.default not in (None, (), ""):
                shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
                kwargs["help"] += f" [{shown:.3g}]" if isinstance(shown, float) else f" [{shown}]"
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **kwargs)


# ------------------------------------------------------------------ devices


def choose_device(name: str) -> torch.device:
    """The device that --device names; auto takes CUDA, then MPS, then the CPU."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not mps):
        raise UserError(f"--device {name}: torch {torch.__version__} sees none. Use --device cpu.")
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def choose_amp(config: Config, device: torch.device) -> Config:
    """Settle --amp for the device. Raises UserError for what would train on garbage."""
    amp = config.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "none"
    # torch 2.13 leaves the weight gradient of a bf16 conv3d over 2x2x2 maps unset on the CPU;
    # the DenseNet of DeepMTS, unpadded, has such maps at 48^3 too
    least = (4 if config.version == "deepmts" else 3) * STRIDE
    if amp == "bf16" and device.type == "cpu" and min(config.patch) < least:
        raise UserError(
            f"--amp bf16 with --patch {config.patch} on the CPU: torch computes wrong gradients "
            f"for sides below {least}. Use --amp none."
        )
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU. Use --amp none on the CPU.")
    return replace(config, amp=amp)


class Ranks:
    """The processes that torchrun started; alone, rank 0 of 1."""

    def __init__(self, device: torch.device):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.main = self.rank == 0
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # the others wait while rank 0 preprocesses, which may take hours
            dist.init_process_group(backend, timeout=timedelta(days=2))

    def barrier(self) -> None:
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    def gather(self, rows: list) -> list:
        """The rows of all ranks, in the order of the undivided list."""
        if self.world == 1:
            return rows
        parts = [None] * self.world
        dist.all_gather_object(parts, rows)
        return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def average_buffers(self, model: nn.Module) -> None:
        """Give every rank the mean of the batch norms' running statistics."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                self.mean(buffer)

    def first(self, action: Callable):
        """The result of `action` on rank 0, sent to every rank."""
        result = [action() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(result)
        return result[0]


# ------------------------------------------------------------------ parts of a run


def build_model(config: Config) -> nn.Module:
    """The seeded network of a resolved config. Raises UserError if the patch does not fit it."""
    torch.manual_seed(config.seed)
    if config.version in SYSTEMS:
        model = SYSTEMS[config.version].build(config)
        if any(side % model.stride or side < model.least for side in config.patch):
            raise UserError(
                f"--patch {config.patch}: {config.version} takes sides that divide by "
                f"{model.stride} and are at least {model.least}."
            )
        return model
    theta = 0.2 if config.theta is None else config.theta
    return MirrorUNet(
        mirror_version(config), config.shared, config.kind, theta, config.bottleneck, config.norm,
        config.classifier,
    )  # fmt: skip


def open_data(config: Config, say: Callable[[str], None] = print) -> tuple[Config, list[Case]]:
    """Find, check and preprocess the studies; the config resolved for their kind.

    Without config.data the simulated cohort is written on first use. Raises UserError.
    """
    root = Path(config.data or PHANTOM)
    if config.data is None and not root.exists():
        say(f"data       no --data given: writing a simulated PET/CT cohort to {root}")
        write_phantom(root, progress=lambda visits: progress(visits, "simulate", "study"))
    found = find_studies(root)
    config = resolve(config, found.kind, phantom=config.data is None)
    cases = prepare(
        root, found, preprocessing(config), Path(config.cache), config.workers, config.check,
        config.skip_bad, say,
    )  # fmt: skip
    patients = len({case.patient for case in cases})
    ill = sum(case.has_lesion for case in cases)
    simulated = ", simulated" if config.data is None else ""
    say(
        f"data       {root} ({found.layout}{simulated}): {len(cases)} studies of {patients} "
        f"patients, {ill} with a lesion"
    )
    if not found.patients_known:
        say("           names do not tell the patient: each case counts as one; see --splits")
    return config, cases


def choose_splits(config: Config, cases: list[Case], run: Path | None) -> dict[str, list[str]]:
    """The splits of the run that goes on, if any, else those of --splits, else folds by patient."""
    given = run / "splits.json" if run else config.splits
    if given:
        return read_splits(Path(given), cases)
    return make_splits(cases, config.folds, config.fold, config.split_seed)


def name_run(config: Config) -> Path:
    """runs/<version>-L<layers>, with a number behind it if that is taken; systems have no L."""
    layers = "" if config.version in SYSTEMS else f"-L{''.join(map(str, config.shared)) or 'none'}"
    base = Path("runs") / f"{config.version}{layers}"
    names = [base, *(base.with_name(f"{base.name}-{i}") for i in range(2, 10000))]
    return next(path for path in names if not (path / "config.json").exists())


class Busy(UserError):
    """Another process is writing the folder."""


@contextlib.contextmanager
def only_writer(run: Path):
    """Hold the folder's lock, which the system frees when the process ends, however it does.

    Raises Busy if another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a+b") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                # not flock: workers would inherit it and outlive a killed run by seconds
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(
                f"{run}: another process is writing this run. Wait for it, or use another --out."
            ) from None
        yield


def plain(config: Config, weights_only: bool = False) -> dict:
    """The config in plain types; weights_only leaves out all that a launch decides (LAUNCH)."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    left_out = LAUNCH if weights_only else {"resume", "check"}
    return {k: v for k, v in values.items() if k not in left_out}


def as_config(saved: dict) -> Config:
    """A Config from a saved dict. Raises UserError for options that this version does not know."""
    known = {f.name for f in fields(Config)}
    if unknown := sorted(set(saved) - known):
        raise UserError(
            f"saved options {unknown} are unknown here: use the code that made the run."
        )
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def saved_config(run: Path) -> Config:
    """The config of a run folder. Raises UserError if it is missing or not one of ours."""
    saved = read_json(run / "config.json")
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"{run / 'config.json'}: holds no config. Restore it, or train anew.")
    return as_config(saved["config"])


def about() -> dict:
    """Versions and the git commit that made a run."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:  # git is not installed
            return ""

    changed = "+changes" if git("status", "--porcelain", "-uno") else ""
    return {
        "commit": git("rev-parse", "HEAD") + changed,
        "python": platform.python_version(),
        **{m.__name__: str(m.__version__) for m in (torch, np, scipy, nibabel, pd)},
        "platform": platform.platform(),
    }


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of plain types and tensors. Raises UserError if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not test the checksums
            if file.testzip():
                raise ValueError("its checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"model", "epoch"} <= content.keys():
            raise ValueError("it holds no network")
        return content
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint. Train the run first.") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason}).") from None


def save_checkpoint(path: Path, content: dict) -> None:
    with atomic(path) as file:
        torch.save(canonical(content), file)


def canonical(content):
    """The same content whose bytes do not tell a resumed run from one that was never stopped:
    pickle writes equal strings shorter if they are one object, so make them one."""
    if isinstance(content, dict):
        return {canonical(key): canonical(value) for key, value in content.items()}
    if isinstance(content, list):
        return [canonical(value) for value in content]
    return sys.intern(content) if isinstance(content, str) else content


def step_seed(*numbers: int) -> int:
    """A seed for Φ and dropout from (seed, epoch, step, rank), so that nothing need be saved."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def loss_function(config: Config) -> Callable:
    """The loss of a resolved config: an equation of the paper, or that of a compared system."""
    if config.version in SYSTEMS:
        return SYSTEMS[config.version].loss
    return LOSSES[config.kind][mirror_version(config)]


def learning_rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    done = epoch / config.epochs
    return (
        config.lr
        * {
            "step": 0.1 if config.lr_drop and epoch >= config.lr_drop else 1,
            "poly": (1 - done) ** 0.9,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "exp": 0.985**epoch,
        }[config.schedule]
    )


def transform_ct(ct: torch.Tensor, config: Config) -> torch.Tensor:
    """Φ(x_C) of Eq. 1, in training only."""
    if config.phi == "noise":
        return add_noise(ct, config.noise_sigma)
    if config.phi == "shuffle":
        return shuffle_voxels(ct, config.shuffle_edge, config.shuffle_count)
    return ct


def make_optimizer(model: nn.Module, config: Config, device: torch.device):
    """Adam (Sec. 3.4) or SGD (nnU-Net); learned scalars (θ, SF-Net's s) do not decay."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if p.dim()], "weight_decay": config.weight_decay}]
    if scalars := [p for p in learned if not p.dim()]:
        groups.append({"params": scalars, "weight_decay": 0.0})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.99, nesterov=True)
    return torch.optim.Adam(groups, lr=config.lr, fused=device.type in ("cuda", "cpu"))


def val_dice(rows: list[dict]) -> float:
    """Mean Dice over the validation studies with a lesion, and over classes; NaN without any."""
    columns = ("dice", "dice_whole", "dice_edema", "dice_core")
    values = [row[c] for row in rows if row["has_lesion"] for c in columns if c in row]
    values = [v for v in values if not math.isnan(v)]
    return float(np.mean(values)) if values else math.nan


# ------------------------------------------------------------------ training


def train_step(
    item, net, model, optimizer, scaler, config, device, options, norms=None
) -> dict[str, torch.Tensor]:
    """One update of the weights from a batch of data.Patches; its weighted loss terms by name.

    options: what forward is given beside the images (model.step_options). norms: a dict that takes
    each term's gradient norm on the shared layers.
    """
    image = item["image"].to(device, non_blocking=True).float()  # (B, 2, W, H, D)
    image = evaluation.see(image, config.modality)
    ct, pet = image[:, :1], image[:, 1:]
    mask, tumor = (item[name].to(device, non_blocking=True) for name in ("mask", "tumor"))
    with evaluation.autocast(device, config.amp):
        out = net(transform_ct(ct, config), pet, **options)
    terms = loss_function(config)(out, Batch(ct, pet, mask, tumor), config)
    if norms is not None:
        norms |= gradient_norms(terms, model.shared_parameters())
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(sum(terms.values())).backward()
    if config.clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    scaler.step(optimizer)
    scaler.update()
    if config.theta == "learn":  # the weight of CT stays a weight
        model.theta.data.clamp_(0, 1)
    return {name: term.detach() for name, term in terms.items()}


def train_epoch(epoch, net, model, loader, optimizer, scaler, config, device, ranks, bar) -> dict:
    """One pass; its row of metrics.csv. `net` is `model`, compiled or data-parallel if asked."""
    lr = learning_rate(config, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    loader.batch_sampler.epoch = epoch
    sums, norms, waited, seen = None, {}, 0.0, 0
    started = waiting = time.perf_counter()
    for step, item in enumerate(loader):
        waited += time.perf_counter() - waiting
        torch.manual_seed(step_seed(config.seed, epoch, step, ranks.rank))
        options = model.step_options(step_seed(config.seed, epoch, step))  # equal on all ranks
        first = norms if step == 0 else None
        terms = train_step(item, net, model, optimizer, scaler, config, device, options, first)
        values = torch.stack(list(terms.values()))
        sums = values if sums is None else sums + values
        crops = len(item["tumor"]) * ranks.world
        seen += crops
        bar.update(crops)
        waiting = time.perf_counter()
    means = dict(zip(terms, ranks.mean(sums / (step + 1)).tolist(), strict=True))  # waits here
    seconds = time.perf_counter() - started
    row = {"epoch": epoch + 1, "lr": lr, "loss": sum(means.values()), **means}
    row |= {f"grad_{name}": norm for name, norm in norms.items()}
    if config.theta is not None:
        row["theta"] = model.theta.item()
    return row | {
        "patches_per_s": seen / seconds,
        "data_wait": waited / seconds,
        "seconds": seconds,
    }


def train(config: Config, report: Callable[[dict], None] | None = None) -> dict:
    """Train, validate and test one run; returns {"run", "epochs", "val_dice", "test": {...}}.

    report: called after each epoch with its row of metrics.csv. Raises UserError for bad input.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    ranks = Ranks(device)
    say = print if ranks.main else lambda text: None
    for turn in (True, False):  # rank 0 fills the cache, then the others read it
        if ranks.main == turn:
            check = config.check and turn  # only rank 0 may rewrite the cache
            config, cases = open_data(replace(config, check=check), say)
        ranks.barrier()
    config = choose_amp(config, device)
    if config.batch_size % ranks.world:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide by {ranks.world} devices."
        )
    run = Path(ranks.first(lambda: config.out or str(name_run(config))))
    with only_writer(run) if ranks.main else contextlib.nullcontext():
        return train_in(run, config, cases, device, ranks, report, say)


def train_in(run: Path, config: Config, cases, device, ranks: Ranks, report, say) -> dict:
    """train() once the data are open and the run folder is ours."""
    saved = ranks.first(lambda: start_run(run, config))
    if saved and ranks.first(lambda: is_finished(run, config.epochs)):
        say(
            f"finished   {run} has its {config.epochs} epochs and test results; --epochs extends it"
        )
        return result_of(run)
    splits = ranks.first(lambda: choose_splits(config, cases, run if saved else None))
    by_name = {case.name: case for case in cases}
    parts = {part: [by_name[name] for name in names] for part, names in splits.items()}
    if not any(case.has_lesion for case in parts["val"]):
        say("splits     no lesion in the validation part: best.pt is the last validated epoch")

    model = build_model(config).to(device, memory_format=torch.channels_last_3d)
    if max(config.patch) <= model.one_value and config.batch_size == ranks.world:
        raise UserError(
            f"--patch {config.patch} with one crop per device leaves batch norm a single value at "
            "the bottom. Use a larger --patch or --batch-size."
        )
    optimizer = make_optimizer(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    start, best_dice, rows = 0, -math.inf, []
    if saved:
        checkpoint = load_checkpoint(run / "last.pt")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start, best_dice = checkpoint["epoch"], checkpoint["best_dice"]
        rows = plots.read_metrics(run, start)
    if ranks.main:
        write_json(run / "splits.json", splits)
        write_json(run / "config.json", {"config": plain(config), "ran_on": device.type, **about()})
    crops = Patches(parts["train"], config.patch, config.seed, config.lesion_p, config.class_label)
    steps = config.steps or -(-len(crops.cases) * config.crops // config.batch_size)
    schedule = Schedule(steps, config.batch_size, ranks.rank, ranks.world)
    loader = Loader(crops, schedule, config.workers, pinned=device.type == "cuda")
    net = parallel(model, config, device, ranks)
    say(
        f"model      {title(config)}, {count_parameters(model) / 1e6:.2f} M parameters\n"
        f"splits     {', '.join(f'{len(own)} {part}' for part, own in parts.items())}\n"
        f"run        {run}, epochs {start + 1} to {config.epochs} of {steps} steps of "
        f"{config.batch_size} crops {config.patch}, {device}, amp {config.amp}"
    )
    writer = plots.tensorboard(run, start) if ranks.main and start < config.epochs else None
    total = (config.epochs - start) * steps * config.batch_size
    drawn = time.perf_counter()
    with tqdm(total=total, unit="patch", leave=False, disable=None if ranks.main else True) as bar:
        for epoch in range(start, config.epochs):
            row = train_epoch(
                epoch, net, model, loader, optimizer, scaler, config, device, ranks, bar
            )
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"{run}: the loss is {row['loss']} in epoch {epoch + 1}. The checkpoint before "
                    "it is kept; try a lower --lr, or --amp none."
                )
            ranks.average_buffers(model)
            if (epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs:
                began = time.perf_counter()
                mine = parts["val"][ranks.rank :: ranks.world]
                scored = evaluation.evaluate(model, mine, config, device, native=False)
                row["val_dice"] = val_dice(ranks.gather(scored))
                row["val_seconds"] = time.perf_counter() - began
            if device.type == "cuda":
                row["gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
            rows.append(row)
            if ranks.main:
                best_dice = save_epoch(run, config, model, optimizer, scaler, rows, best_dice)
                plots.log_epoch(writer, row)
                spent = seconds_of(rows[-(epoch + 1 - start) :]) / (epoch + 1 - start)
                left = spent * (config.epochs - epoch - 1)
                tqdm.write(plots.epoch_line(row, left, first=epoch == start))
                if time.perf_counter() - drawn > 180:  # a figure takes a second or two
                    plots.curves(run)
                    drawn = time.perf_counter()
            if report:
                report(row)
    if writer:
        writer.close()
    return test(run, config, model, parts["test"], rows, device, ranks, say)


def seconds_of(rows: list[dict]) -> float:
    """How long the epochs of these rows of metrics.csv took, with their validation."""
    return sum(row["seconds"] + row.get("val_seconds", 0) for row in rows)


def is_finished(run: Path, epochs: int) -> bool:
    """Whether the run has the test results of so many epochs and no later ones."""
    summary = run / "summary.json"
    if not summary.exists() or read_json(summary).get("epochs") != epochs:
        return False
    # tune.py removes last.pt once the results are there; else it may be ahead of them
    last = run / "last.pt"
    return not last.exists() or load_checkpoint(last)["epoch"] == epochs


def title(config: Config) -> str:
    """What is trained, in words."""
    if config.version in SYSTEMS:
        return f"{config.version}, {config.recipe} recipe"
    layers = ", ".join(map(str, config.shared))
    joint = ", joint bottleneck (0.26 M more)" if config.bottleneck == "joint" else ""
    return f"Mirror U-Net {config.version}, L={{{layers}}}, Φ {config.phi}{joint}"


def save_epoch(run, config, model, optimizer, scaler, rows: list[dict], best_dice: float) -> float:
    """Write best.pt if the epoch's validation is the best so far, metrics.csv, then last.pt, in
    this order: whatever a kill leaves, going on from last.pt writes the rest again. Returns the
    best validation Dice. Without lesions to validate on, the last validated epoch is the best."""
    shared = {"config": plain(config, weights_only=True), "epoch": rows[-1]["epoch"]}
    weights = shared | {"model": model.state_dict()}
    dice = rows[-1].get("val_dice", -math.inf)
    if dice > best_dice or (math.isnan(dice) and best_dice == -math.inf):
        best_dice = max(best_dice, -math.inf if math.isnan(dice) else dice)
        save_checkpoint(run / "best.pt", weights | {"val_dice": dice})
    plots.write_metrics(run, rows)
    resume_state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    save_checkpoint(run / "last.pt", weights | resume_state | {"best_dice": best_dice})
    return best_dice


def start_run(run: Path, config: Config) -> bool:
    """Whether the run goes on from last.pt. Raises UserError rather than overwrite or mix runs."""
    last = run / "last.pt"
    for leftover in run.glob(".*.tmp"):  # of a process that was killed while writing
        leftover.unlink()
    ended = [run / name for name in ("summary.json", "stopped.json") if (run / name).exists()]
    if not config.resume:
        if last.exists() or ended:
            raise UserError(f"{run}: holds a run already. Add --resume, or choose another --out.")
        return False
    if not last.exists() and not ended:
        return False
    if not last.exists() and not is_finished(run, config.epochs):
        raise UserError(
            f"{run}: has {ended[0].name} but no last.pt to go on from (a search removes it when a "
            "trial ends). Use another --out."
        )
    checkpoint = load_checkpoint(last if last.exists() else run / "best.pt")
    saved, now = checkpoint["config"], plain(config, weights_only=True)
    changed = sorted(k for k in saved if saved[k] != now.get(k))
    if changed:
        what = "; ".join(f"{k} was {saved[k]}, now {now.get(k)}" for k in changed)
        raise UserError(f"{run}: a run goes on with its own settings ({what}). Use another --out.")
    before = saved_config(run).epochs
    if config.schedule in ("poly", "cosine") and before != config.epochs:
        raise UserError(
            f"{run}: --schedule {config.schedule} was laid out for {before} epochs; going on to "
            f"{config.epochs} would be neither. Use another --out."
        )
    if checkpoint["epoch"] > config.epochs:
        raise UserError(
            f"{run}: has {checkpoint['epoch']} epochs already, more than --epochs {config.epochs}."
        )
    return True


def parallel(model: nn.Module, config: Config, device: torch.device, ranks: Ranks) -> nn.Module:
    """The network as the loop calls it: data-parallel under torchrun, compiled with --compile."""
    net: nn.Module = model
    if ranks.world > 1:
        # buffers are averaged before validation instead (Ranks.average_buffers)
        ids = [device.index] if device.type == "cuda" else None
        net = nn.parallel.DistributedDataParallel(
            net,
            device_ids=ids,
            broadcast_buffers=False,
            find_unused_parameters=config.version == "valindria",  # a step runs one branch
        )
    if config.compile:
        # gradient_norms walks the graph before backward() does
        torch._functorch.config.donated_buffer = False
        net = torch.compile(net)
    return net


def test(run: Path, config: Config, model, cases, rows: list, device, ranks: Ranks, say) -> dict:
    """Evaluate best.pt on the test part: test_studies.csv, summary.json, curves and examples.

    rows: those of metrics.csv, for what the run took in all.
    """
    ranks.barrier()  # rank 0 may still be writing best.pt
    began = time.perf_counter()
    best = load_checkpoint(run / "best.pt")
    model.load_state_dict(best["model"])
    mine = cases[ranks.rank :: ranks.world]
    bar = "test" if ranks.main else ""
    scored = ranks.gather(evaluation.evaluate(model, mine, config, device, bar=bar))
    if ranks.main:
        plots.curves(run)
        plots.examples(run / "examples.png", model, cases, config, device)
        facts = {
            "checkpoint_epoch": best["epoch"],
            "epochs": config.epochs,
            "val_dice": None if math.isnan(best["val_dice"]) else best["val_dice"],
            "seconds": round(seconds_of(rows) + time.perf_counter() - began, 1),
            "gpu_memory_mb": max((row.get("gpu_memory_mb", 0) for row in rows), default=0) or None,
        }
        summary = evaluation.write_results(run, "test", scored, config.kind, facts)
        say(f"\ntest       best.pt of epoch {best['epoch']}, {len(scored)} studies\n")
        say(evaluation.results_table(evaluation.rows_of(run.name, summary), config.kind))
        say(f"\n{run}: summary.json, test_studies.csv, curves.png, examples.png")
    ranks.barrier()
    return result_of(run)


def result_of(run: Path) -> dict:
    """What train() returns, from the summary.json of a finished run."""
    summary = read_json(run / "summary.json")
    test_means = {k: v["mean"] for k, v in summary["systems"]["model"].items()}
    return {
        "run": str(run), "epochs": summary["epochs"], "val_dice": summary["val_dice"],
        "test": test_means,
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> Config:
    """The command line as a Config; with --resume, on top of what the run in --out has saved."""
    parser = argparse.ArgumentParser(
        description="Train Mirror U-Net, then test it. Without --data on a simulated cohort.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=100),
    )
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    for name in ("shared", "patch", "spacing"):
        if name in given:
            given[name] = tuple(given[name])
    base = Config()
    if given.get("resume"):
        if "out" not in given:
            raise UserError("--resume: say which run with --out RUN_FOLDER.")
        if (Path(given["out"]) / "config.json").exists():
            base = saved_config(Path(given["out"]))
    return replace(base, **given)


def command_line(action: Callable[[], None]) -> None:
    """Run a command: bad input ends with one clear message and exit code 2, Ctrl-C with 130."""
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}. Choose another path.", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            "stopped; what was finished is kept (train.py --resume or the same search goes on)",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def main() -> None:
    command_line(lambda: train(parse()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    from train import main  # so that the classes here are train.X for whoever imports train

    main()
