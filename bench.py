"""Speed of each stage, measured with the functions that train.py and eval.py call.

    python bench.py step                    one training step
    python bench.py infer                   sliding windows over a volume
    python bench.py metrics                 Dice, FPV and FNV of a study
    python bench.py preprocess --data DIR   a study from its files to the cache
    python bench.py data --data DIR         training crops from the cache
    python bench.py gpu --out FILE          every row of a GPU, in less than ten minutes

A row prints one JSON line, which --out FILE appends; everything else goes to stderr. `seconds` and
`cpu_seconds` hold the wall and processor time of each repeat, peak_rss_mb the most memory since the
timing began. Inputs are seeded; the options of train.py that a row uses are taken too. Without
--data the studies are those of the simulated cohort, preprocessed like real ones.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

# `gpu` runs step and infer, which read no images and write no log, on a machine without these two.
try:
    import nibabel as nib
except ImportError:
    nib = sys.modules["nibabel"] = mock.MagicMock(__version__="absent")
    sys.modules["nibabel.affines"] = nib.affines
try:
    import tensorboardX  # noqa: F401
except ImportError:
    sys.modules["tensorboardX"] = mock.MagicMock()

import runs
import train
from cache import read_case, write_case
from common import Parser, UserError, command_line, to_stderr
from config import OPTIONS, Config, add_flags, options_from_args, resolve
from devices import Ranks, choose_amp, choose_device, set_threads
from eval import infer
from metrics import score_study
from mirror_unet import count_parameters
from phantom import PHANTOM
from preprocess import grid_positions, preprocess, settings_for
from studies import find_studies

# One step of the released code's v3: 0.5 (Dice + CE) + 1e-3 MSE of both images + 0.5 BCE.
RELEASED = {
    "version": "v3",
    "phi": "none",
    "classifier": "pet",
    "rec": "mse",
    "lambda_rec": 5e-4,
    "lambda_cls": 0.5,
    "weight_decay": 1e-5,
}
ON_CPU = {"batch_size": 2, "patch": (64, 64, 64)}  # of a step; a GPU takes the paper's batch
HEADS = {  # of infer: what a prediction computes, what the test computes, everything
    "seg": ("seg",),
    "test": ("seg", "tumor"),
    "all": (),
}
GPU = (
    "step",
    "step --amp none",
    "step --compile",
    "step --batch-size 16",
    "step --batch-size 16 --compile",
    "infer",
    "infer --heads all",
    "infer --amp none",
)

# ------------------------------------------------------------------ measuring


def measure(action, device: torch.device, warmup: int, repeat: int) -> tuple[dict, object]:
    """Times of `repeat` calls after `warmup` calls, with the most memory; and the last result."""
    wall = []
    cpu = []
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # peak_mb() counts from here on
    for _ in range(warmup + repeat):
        wall_start = time.perf_counter()
        cpu_start = time.process_time()
        result = action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)

    timing = {"seconds": wall[warmup:], "cpu_seconds": cpu[warmup:], "peak_rss_mb": peak_mb()}
    if device.type == "cuda":
        timing["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return timing, result


def peak_mb() -> float:
    """The most memory of this process in MB; 0 where there is no /proc."""
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return 0.0


def describe_machine(device: torch.device) -> dict:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "nibabel": nib.__version__,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": info.partition("model name")[2].partition("\n")[0].strip("\t :"),
        "load1": round(os.getloadavg()[0], 2),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def report(args, device, timing: dict, rate: str, units: int, values: dict, **facts) -> dict:
    """The JSON line of a row. rate: its name; units: the work done in each of the `seconds`."""
    median = float(np.median(timing["seconds"]))
    left_out = ("task", "out", "row")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    return {
        "schema": 1,
        "side": "ours",
        "impl": "ours",
        "task": args.task,
        "settings": settings,
        **timing,
        "median": median,
        "best": min(timing["seconds"]),
        rate: units / median,
        "values": values,
        **facts,
        "env": describe_machine(device),
    }


# ------------------------------------------------------------------ seeded inputs


def draw_ball(volume: np.ndarray, center, radius: float, spacing) -> None:
    """Set the voxels within `radius` mm of `center`, in voxels, to 1."""
    reach = radius / np.array(spacing)
    low = np.maximum(0, center - reach).astype(int)
    high = np.minimum(volume.shape, center + reach + 1).astype(int)
    offsets = (np.indices(high - low).T + low - center) * spacing  # mm; (D, H, W, 3)
    box = tuple(map(slice, low, high))
    squares = (offsets**2).sum(-1).T
    volume[box][squares <= radius**2] = 1


def label_pair(shape, spacing, lesions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mask and prediction: a fifth of the lesions missed, the others moved, some false ones."""
    rng = np.random.default_rng([seed, 77])
    mask, pred = np.zeros((2, *shape), np.uint8)
    for _ in range(lesions):
        center = rng.uniform(0.1, 0.9, 3) * shape
        radius = rng.uniform(3, 25)
        draw_ball(mask, center, radius, spacing)
        if rng.random() > 0.2:
            moved = center + rng.uniform(-1.5, 1.5, 3)
            draw_ball(pred, moved, radius * rng.uniform(0.8, 1.15), spacing)
    for _ in range(max(1, lesions // 3)):
        draw_ball(pred, rng.uniform(0.1, 0.9, 3) * shape, rng.uniform(2, 8), spacing)
    return mask, pred


def batch_of_patches(batch: int, patch, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as data.Patches gives it; two of three patches hold two lesions."""
    rng = np.random.default_rng([seed, 9])
    image = torch.from_numpy(rng.random((batch, 2, *patch), np.float32)).half()
    mask = np.zeros((batch, *patch), np.uint8)
    for b in range(batch):
        for _ in range(2 if b % 3 != 2 else 0):
            draw_ball(mask[b], rng.uniform(0.2, 0.8, 3) * patch, 0.12 * min(patch), (1, 1, 1))
    tumor = torch.from_numpy(mask.any((1, 2, 3)).astype(np.float32))
    return {"image": image, "mask": torch.from_numpy(mask), "tumor": tumor}


# ------------------------------------------------------------------ the rows


def settle(args, on_cpu=None, **defaults) -> tuple[Config, torch.device]:
    """The config of a row and its device: the options given, then `on_cpu`, then `defaults`.

    There is always --data, so that what is not given is as the paper has it.
    """
    device = choose_device(getattr(args, "device", "auto"))
    options = {"data": str(PHANTOM), **defaults}
    if device.type == "cpu" and on_cpu:
        options.update(on_cpu)
    options.update(options_from_args(args, OPTIONS.keys() - {"out"}))  # --out takes the results
    config = resolve(Config(**options), "petct")
    set_threads(config.threads, to_stderr)
    return choose_amp(config, device), device


def bench_step(args) -> dict:
    config, device = settle(args, ON_CPU, **RELEASED)
    model = runs.build_model(config)
    state = train.make_state(Path(), config, device, Ranks(device), model)

    batch = batch_of_patches(config.batch_size, config.patch, config.seed)
    if model.variant.organ_branch:
        batch["organs"] = batch["mask"]
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    step = partial(train.train_step, state, batch, model.step_options(config.seed))

    first, terms = measure(step, device, 0, 1)  # compiles and chooses algorithms
    values = {"first_loss": float(sum(terms.values())), "n_params": count_parameters(model)}
    timing, terms = measure(step, device, args.warmup, args.repeat)
    values["last_loss"] = float(sum(terms.values()))
    facts = {"first_call_s": first["seconds"][0], "amp": config.amp}
    return report(args, device, timing, "patches_per_s", config.batch_size, values, **facts)


def bench_infer(args) -> dict:
    config, device = settle(args, version="v3", overlap=0.5, window_weights="gaussian")
    rng = np.random.default_rng([config.seed, 5])
    image = rng.random((2, *args.shape), np.float32)
    model = runs.build_model(config).to(device, memory_format=torch.channels_last_3d)
    heads = HEADS[args.heads] or model.heads
    action = partial(infer, runs.LoadedRun(model, config, device, {}), image, heads)
    timing, inference = measure(action, device, args.warmup, args.repeat)

    logits = inference.maps["seg"]
    values = {"mean_margin": float(logits.mean()), "foreground_voxels": int((logits > 0).sum())}
    return report(args, device, timing, "voxels_per_s", image[0].size, values, amp=config.amp)


def bench_metrics(args) -> dict:
    config, device = settle(args)
    mask, pred = label_pair(args.shape, args.millimetres, args.lesions, config.seed)
    action = partial(score_study, pred, mask, ("lesion",), args.millimetres)
    timing, values = measure(action, device, args.warmup, args.repeat)
    return report(args, device, timing, "voxels_per_s", mask.size, values)


def bench_preprocess(args) -> dict:
    config, device = settle(args)
    studies = find_studies(Path(config.data)).studies[: args.limit]
    settings = settings_for(config)

    def action():
        with TemporaryDirectory() as scratch:
            for i, study in enumerate(studies):
                folder = Path(scratch, f"{i}")
                findings = write_case(study, partial(preprocess, study, settings), folder)
                if findings:
                    raise UserError("\n".join(map(str, findings)))
            return read_case(folder, study).meta

    timing, meta = measure(action, device, args.warmup, args.repeat)
    voxels = 1  # of the last study, before the crop to the body
    for positions in grid_positions(meta.native_shape, meta.native_spacing, meta.spacing):
        voxels *= len(positions)
    values = {"voxels_per_study": voxels, "voxels_kept": int(np.prod(meta.shape))}
    return report(args, device, timing, "voxels_per_s", voxels * len(studies), values)


def bench_data(args) -> dict:
    config, device = settle(args, version="v3", steps=50)
    start = time.perf_counter()
    cases = runs.load_cases(runs.find_data(config), config)
    state = SimpleNamespace(config=config, device=device, ranks=Ranks(device))
    loader = train.make_loader(cases, state)
    facts = {"studies": len(cases), "cold_seconds": time.perf_counter() - start}

    def action():
        lesions = 0
        for batch in loader:
            batch["image"].to(device, non_blocking=True)
            lesions += int(batch["mask"].to(device).flatten(1).any(1).sum())
        loader.schedule.epoch += 1
        return lesions

    timing, lesions = measure(action, device, args.warmup, args.repeat)
    patches = len(loader) * config.batch_size
    values = {"patches_per_epoch": patches, "foreground_fraction": lesions / patches}
    return report(args, device, timing, "patches_per_s", patches, values, **facts)


def bench_gpu(args) -> None:
    """Every row of GPU in a process of its own; one that fails or takes too long is left out."""
    end = time.monotonic() + 570
    for row in GPU:
        command = [sys.executable, __file__, *row.split(), "--out", args.out]
        seconds_left = max(1, min(180, end - time.monotonic()))
        try:
            subprocess.run(command, timeout=seconds_left, check=True, stdout=sys.stderr)
        except subprocess.SubprocessError as error:
            to_stderr(f"{row}: {error}")


# ------------------------------------------------------------------ command line


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1")
    return int(text)


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)

    def add_row(row: Callable, options: str, warmup: int = 1, repeat: int = 5) -> Callable:
        """The add_argument of a row's command.

        options: those of train.py that it takes beside --device, --threads and --seed.
        """
        command = tasks.add_parser(row.__name__.removeprefix("bench_"))
        command.set_defaults(row=row)
        command.add_argument("--warmup", type=int, default=warmup)
        command.add_argument("--repeat", type=positive_int, default=repeat)
        command.add_argument("--out", help="append the JSON line to this file")
        add_flags(command, f"device threads seed {options}".split())
        return command.add_argument

    network = "version widths amp compile patch"
    add_row(bench_step, f"{network} batch_size phi", warmup=3, repeat=10)

    add = add_row(bench_infer, f"{network} overlap window_weights window_batch")
    add("--shape", type=positive_int, nargs=3, default=(200, 200, 300))
    add("--heads", choices=HEADS, default="seg")

    add = add_row(bench_metrics, "")
    add("--shape", type=positive_int, nargs=3, default=(400, 400, 300))
    add("--millimetres", type=float, nargs=3, default=(2.04, 2.04, 3.0))
    add("--lesions", type=int, default=40)

    add = add_row(bench_preprocess, "data spacing", warmup=0, repeat=3)
    add("--limit", type=positive_int, default=1, help="number of studies")

    add_row(bench_data, "data cache workers spacing steps patch batch_size")

    gpu_rows = tasks.add_parser("gpu")
    gpu_rows.set_defaults(row=bench_gpu)
    gpu_rows.add_argument("--out", required=True, help="file that takes the JSON lines")
    return parser


def bench_command(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with redirect_stdout(sys.stderr):
        result = args.row(args)
    if result:
        line = json.dumps(result)
        print(line)
        if args.out:
            with open(args.out, "a") as file:
                print(line, file=file)


if __name__ == "__main__":
    command_line(bench_command)
