"""Speed of every stage, by the very functions that train.py and eval.py call.

    python bench.py studies --data DIR      write simulated studies of AutoPET's size
    python bench.py preprocess --data DIR   a study from its files to the cache
    python bench.py data --data DIR         training crops from the cache
    python bench.py step                    one training step
    python bench.py infer                   sliding windows over a volume
    python bench.py metrics                 Dice, FPV and FNV of a study
    python bench.py train --data DIR        train.py against the step alone
    python bench.py gpu --out FILE          every row of a GPU, in less than ten minutes

Each prints one JSON line, which --out FILE appends; all else goes to stderr. `seconds` and
`cpu_seconds` hold the wall and processor time of each repeat, peak_rss_mb the most memory since the
timing began. Inputs are seeded; the options of train.py that a row reads are taken too.
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

try:
    import nibabel as nib
except ImportError:  # step, infer and metrics read no images
    nib = sys.modules["nibabel"] = mock.MagicMock(__version__="absent")

import cache
import preprocess
import runs
import train
from config import MOST, OPTIONS, Config, add_flags, as_options, resolve
from devices import Ranks, choose_amp, choose_device
from eval import infer, score
from files import Parser, UserError, command_line, read_json, reading
from mirror_unet import count_parameters
from phantom import PHANTOM, draw_study
from studies import find_studies

AUTOPET, MILLIMETRES = (400, 400, 326), (2.036, 2.036, 3.0)
SMALL = dict(batch_size=2, patch=(64, 64, 64))  # of a step on a CPU; on a GPU the paper's batch
# One step of the released code's v3: 0.5 (Dice + CE) + 1e-3 MSE of both images + 0.5 BCE.
RELEASED = dict(version="v3", phi="none", classifier="pet", rec="mse", lambda_rec=5e-4,
                lambda_cls=0.5, weight_decay=1e-5)  # fmt: skip
GPU = (  # the last row needs nibabel and writes its studies first
    "step", "step --amp none", "step --compile", "step --batch-size 16",
    "step --batch-size 16 --compile", "infer", "infer --heads all", "infer --amp none",
    "train --epochs 3 --steps 100",
)  # fmt: skip

# ------------------------------------------------------------------ measuring


def peak_mb() -> float:
    """The most memory of this process in MB; 0 where there is no /proc."""
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return 0.0


def measure(action, device: torch.device, warmup: int, repeat: int) -> tuple[dict, object]:
    """Seconds of each repeat after `warmup` more, and the most memory; and the last result."""
    wall, cpu, on_gpu = [], [], device.type == "cuda"
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    for _ in range(warmup + repeat):
        start = time.perf_counter(), time.process_time()
        result = action()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    found = {"seconds": wall[warmup:], "cpu_seconds": cpu[warmup:], "peak_rss_mb": peak_mb()}
    if on_gpu:
        found["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found, result


def report(args, device, found: dict, rate: str, units: int, values: dict, **more) -> dict:
    """The result of a row; `units` were done in each of the `seconds` that measure() found."""
    median = float(np.median(found["seconds"]))
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    env = {
        "python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
        "nibabel": nib.__version__, "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "cpu": info.partition("model name")[2].partition("\n")[0].strip("\t :"),
        "load1": round(os.getloadavg()[0], 2), "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }  # fmt: skip
    return {
        "schema": 1, "side": "ours", "impl": "ours", "task": args.task,
        "settings": {k: v for k, v in vars(args).items() if k not in ("task", "out", "row")},
        **found, "median": median, "best": min(found["seconds"]), rate: units / median,
        "values": values, **more, "env": env,
    }  # fmt: skip


# ------------------------------------------------------------------ seeded inputs


def write_studies(root: Path, count: int, shape=AUTOPET, spacing=MILLIMETRES) -> None:
    """`count` phantoms in AutoPET's layout below `root`, with air beside them and each voxel
    repeated until they have the shape; noise keeps the files from compressing to little."""
    for i in range(count):
        rng = np.random.default_rng(i)
        images = draw_study(rng, rng, tumour=True)[:3]
        air = [(n // 4, n // 4) for n in images[0].shape[:2]] + [(0, 0)]
        ct, suv, seg = (np.pad(image, air, "edge") for image in images)
        grown = zip(ct.shape, shape, strict=True)
        repeat = np.ix_(*(np.arange(wanted) * n // wanted for n, wanted in grown))
        noise = rng.standard_normal(shape, np.float32)
        ct, suv = ct[repeat] + (9 * noise).astype(np.int16), suv[repeat] + np.abs(noise) / 100
        folder = root / f"PETCT_{i:010x}" / "study"
        folder.mkdir(parents=True, exist_ok=True)
        affine = np.diag((-spacing[0], *spacing[1:], 1.0))
        for name, image in (("CTres", ct), ("SUV", suv), ("SEG", seg[repeat])):
            nib.save(nib.Nifti1Image(image, affine), folder / f"{name}.nii.gz")


def ball(volume: np.ndarray, centre, radius: float, spacing) -> None:
    """Set the voxels within `radius` mm of `centre`, in voxels, to 1."""
    box = tuple(
        slice(max(0, int(c - radius / s - 1)), min(n, int(c + radius / s + 3)))
        for c, s, n in zip(centre, spacing, volume.shape, strict=True)
    )
    axes = zip(np.ogrid[box], centre, spacing, strict=True)
    volume[box][sum(((g - c) * s) ** 2 for g, c, s in axes) <= radius**2] = 1


def label_pair(shape, spacing, lesions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mask and prediction: a fifth of the lesions missed, the others moved, some false ones."""
    rng = np.random.default_rng([seed, 77])
    mask, pred = np.zeros((2, *shape), np.uint8)
    for _ in range(lesions):
        centre, radius = rng.uniform(0.1, 0.9, 3) * shape, rng.uniform(3, 25)
        ball(mask, centre, radius, spacing)
        if rng.random() > 0.2:
            moved = centre + rng.uniform(-1.5, 1.5, 3)
            ball(pred, moved, radius * rng.uniform(0.8, 1.15), spacing)
    for _ in range(max(1, lesions // 3)):
        ball(pred, rng.uniform(0.1, 0.9, 3) * shape, rng.uniform(2, 8), spacing)
    return mask, pred


def batch_of_patches(batch: int, patch, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as data.Patches gives it; two of three patches hold two lesions."""
    rng = np.random.default_rng([seed, 9])
    image = torch.from_numpy(rng.random((batch, 2, *patch), np.float32)).half()
    mask = np.zeros((batch, *patch), np.uint8)
    for b in range(batch):
        for _ in range(2 if b % 3 != 2 else 0):
            ball(mask[b], rng.uniform(0.2, 0.8, 3) * patch, 0.12 * min(patch), (1, 1, 1))
    tumor = torch.from_numpy(mask.any((1, 2, 3)).astype(np.float32))
    return {"image": image, "mask": torch.from_numpy(mask), "tumor": tumor}


# ------------------------------------------------------------------ the rows


def settle(args, small=(), **defaults) -> tuple[Config, torch.device]:
    """The config of a row: its defaults, `small` on a CPU, then the options given; its device."""
    device = choose_device(getattr(args, "device", "auto"))
    defaults |= () if device.type == "cuda" else small
    given = as_options(args, OPTIONS.keys() - {"out"})  # here the file of the results
    config = resolve(Config(**defaults | given), "petct", phantom=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    return choose_amp(config, device), device


def ready_step(config: Config, device: torch.device):
    """The network, and one call of train.train_step on a batch that is there already."""
    item = batch_of_patches(config.batch_size, config.patch, config.seed)
    model = runs.build_model(config)
    item |= {"organs": item["mask"]} if model.variant.organs else {}
    if device.type == "cuda":
        item = {name: tensor.pin_memory() for name, tensor in item.items()}
    state = train.resume_or_start(Path(), config, device, Ranks(device), model, goes_on=False)
    return model, partial(train.train_step, state, item, model.step_options(config.seed))


def bench_step(args) -> dict:
    config, device = settle(args, SMALL, **RELEASED)
    model, step = ready_step(config, device)
    first, terms = measure(step, device, 0, 1)  # compiles and chooses algorithms
    values = {"first_loss": float(sum(terms.values())), "n_params": count_parameters(model)}
    found, terms = measure(step, device, args.warmup, args.repeat)
    values["last_loss"] = float(sum(terms.values()))
    more = {"first_call_s": first["seconds"][0], "amp": config.amp}
    return report(args, device, found, "patches_per_s", config.batch_size, values, **more)


def bench_infer(args) -> dict:
    config, device = settle(args, version="v3", overlap=0.5, window_weights="gaussian")
    rng = np.random.default_rng([config.seed, 5])
    if args.volume:
        with reading(args.volume, "Give an .npy file of two images, CT and PET"):
            image = np.load(args.volume).astype(np.float32, copy=False)
            if image.ndim != 4 or len(image) != 2:
                raise ValueError(f"shape {image.shape}")
    else:
        image = rng.random((2, *args.shape), np.float32)
    model = runs.build_model(config).to(device, memory_format=torch.channels_last_3d)
    heads = {"seg": ("seg",), "test": ("seg", "tumor"), "all": model.heads}[args.heads]
    once = partial(infer, model, image, config, device, heads)
    found, (margin, _) = measure(once, device, args.warmup, args.repeat)
    values = {"mean_margin": float(margin.mean()), "foreground_voxels": int((margin > 0).sum())}
    return report(args, device, found, "voxels_per_s", image[0].size, values, amp=config.amp)


def bench_metrics(args) -> dict:
    config, device = settle(args)
    mask, pred = label_pair(args.shape, args.millimetres, args.lesions, config.seed)
    once = partial(score, pred, mask, ("lesion",), args.millimetres)
    found, values = measure(once, device, args.warmup, args.repeat)
    return report(args, device, found, "voxels_per_s", mask.size, values)


def bench_preprocess(args) -> dict:
    config, device = settle(args)
    studies = find_studies(Path(config.data or PHANTOM)).studies[: args.limit]
    settings = preprocess.preprocessing(config)

    def once():
        with TemporaryDirectory(dir=args.scratch) as scratch:
            for i, study in enumerate(studies):
                make = partial(preprocess.preprocess, study, settings)
                if findings := cache.fill_cache(study, make, Path(scratch, f"{i}")):
                    raise UserError("\n".join(map(str, findings)))
            return read_json(Path(scratch, f"{i}", "meta.json"))

    found, meta = measure(once, device, args.warmup, args.repeat)
    whole = preprocess.grid_positions(meta["native_shape"], meta["native_spacing"], meta["spacing"])
    voxels = int(np.prod([len(p) for p in whole]))  # of the study, before the crop to the body
    values = {"voxels_per_study": voxels, "voxels_kept": int(np.prod(meta["shape"]))}
    return report(args, device, found, "voxels_per_s", voxels * len(studies), values)


def bench_data(args) -> dict:
    config, device = settle(args, version="v3", steps=50)
    start = time.perf_counter()
    config, cases = runs.open_data(config)
    state = SimpleNamespace(config=config, device=device, ranks=Ranks(device))
    loader = train.load_crops(cases, state)
    more = {"studies": len(cases), "cold_seconds": time.perf_counter() - start}

    def once():
        lesions = 0
        for item in loader:
            item["image"].to(device, non_blocking=True)
            lesions += int(item["mask"].to(device).flatten(1).any(1).sum())
        loader.batch_sampler.epoch += 1
        return lesions

    found, lesions = measure(once, device, args.warmup, args.repeat)
    patches = len(loader) * config.batch_size
    values = {"patches_per_epoch": patches, "foreground_fraction": lesions / patches}
    return report(args, device, found, "patches_per_s", patches, values, **more)


def bench_train(args) -> dict:
    rows, short = [], dict(version="v3", epochs=2, steps=20, folds=3, val_every=10**6)
    with TemporaryDirectory(dir=args.scratch) as scratch:
        if "data" not in args:
            args.data = f"{scratch}/studies"
            write_studies(Path(args.data), 3)
        folders = {"out": f"{scratch}/run", "cache": f"{scratch}/cache"}
        config, device = settle(args, SMALL, **short, **folders)
        alone = measure(ready_step(config, device)[1], device, 3, 10)[0]["seconds"]
        found, _ = measure(partial(train.train, config, rows.append), device, 0, 1)
    found |= {"seconds": [row["seconds"] for row in rows], "cpu_seconds": []}
    step = config.batch_size / float(np.median(alone))
    rate = float(np.median([row["patches_per_s"] for row in rows]))
    values = {"step_alone_patches_per_s": step, "share_of_step": rate / step}
    values |= {"steps": config.steps, "data_wait": [row["data_wait"] for row in rows]}
    units = config.batch_size * config.steps
    return report(args, device, found, "patches_per_s", units, values)


def bench_studies(args) -> None:
    write_studies(Path(args.data), args.count, args.shape, args.millimetres)


def bench_gpu(args) -> None:
    """Every row of GPU in a process of its own; one that fails or takes too long is left out."""
    end = time.monotonic() + 570
    for row in GPU:
        command = [sys.executable, __file__, *row.split(), "--out", args.out]
        left = max(1, min(180, end - time.monotonic()))
        try:
            subprocess.run(command, timeout=left, check=True, stdout=sys.stderr)
        except subprocess.SubprocessError as error:
            print(f"{row}: {error}", file=sys.stderr)


# ------------------------------------------------------------------ command line


LEAST = {"warmup": 0, "lesions": 0, "millimetres": 0.01}  # of a row's own numbers; else 1


def number(name: str, kind: type) -> Callable:
    """What argparse calls for the option `name`: a number that makes sense."""

    def read(text: str):
        least = LEAST.get(name, 1)
        if kind is not str and not least <= kind(text) <= MOST:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least} to {MOST}")
        return kind(text)

    read.__name__ = kind.__name__  # as argparse names it
    return read


def parser() -> Parser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = top.add_subparsers(dest="task", required=True)

    def add(row, **own) -> Parser:
        """A command and its own options, by their defaults; a tuple's takes three numbers."""
        command = tasks.add_parser(row.__name__.removeprefix("bench_"))
        command.set_defaults(row=row)
        for name, default in own.items():
            one, count = (default[0], 3) if isinstance(default, tuple) else (default, None)
            kind = number(name, type(one))
            command.add_argument(f"--{name}", type=kind, nargs=count, default=default)
        return command

    def measured(row, options="", warmup=1, repeat=5, **own) -> Parser:
        command = add(row, warmup=warmup, repeat=repeat, **own)
        command.add_argument("--out", help="append the JSON line to this file")
        command.add_argument("--scratch", help="where temporary folders go")
        add_flags(command, f"device threads seed {options}".split())
        return command

    network, crops = "version widths amp compile patch", "data cache workers spacing steps"
    measured(bench_step, f"{network} batch_size phi", warmup=3, repeat=10)
    windows = f"{network} overlap window_weights window_batch"
    measured(bench_infer, windows, shape=(200, 200, 300), volume="").add_argument(
        "--heads", choices=("seg", "test", "all"), default="seg",
        help="what --predict computes, what the test computes, or all")  # fmt: skip
    measured(bench_metrics, shape=(400, 400, 300), millimetres=(2.04, 2.04, 3.0), lesions=40)
    measured(bench_preprocess, "data spacing", warmup=0, repeat=3, limit=1)
    measured(bench_data, f"{crops} patch batch_size")
    measured(bench_train, f"{crops} {network} batch_size epochs")
    studies = add(bench_studies, count=2, shape=AUTOPET, millimetres=MILLIMETRES)
    studies.add_argument("--data", required=True)
    add(bench_gpu).add_argument("--out", required=True, help="file that takes the JSON lines")
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with redirect_stdout(sys.stderr):
        result = args.row(args)
    if result:
        line = json.dumps(result)
        print(line)
        if args.out:
            with open(args.out, "a") as file:
                print(line, file=file)


if __name__ == "__main__":
    command_line(main)
