"""Speed of every stage, by the very functions that train.py and eval.py call.

    python bench.py studies --data DIR      write simulated studies of AutoPET's size
    python bench.py preprocess --data DIR   a study from its files to the cache
    python bench.py data --data DIR         training crops from the cache
    python bench.py scale --studies 1014    start of training on many cached studies
    python bench.py step                    one training step
    python bench.py loss                    L_DiceCE, forward and backward
    python bench.py infer                   sliding windows over a volume
    python bench.py metrics                 Dice, FPV and FNV of a study
    python bench.py train --data DIR        train.py against the step alone, and what it writes
    python bench.py gpu --out FILE          every row of a GPU, in less than ten minutes

Each prints one JSON line on stdout, all else goes to stderr; --out FILE appends it. `seconds` holds
the wall time of each repeat, `cpu_seconds` this process's processor time (its workers' are not in
it), peak_rss_mb the most memory of this process since the timing began, and peak_rss_tree_mb that
of it and its workers together (pages that they share count in each). Inputs are seeded; the options
of train.py are taken too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

try:
    import nibabel as nib
except ImportError:  # step, loss, infer and metrics read no images
    nib = sys.modules["nibabel"] = mock.MagicMock(__version__="absent")

import data
import eval as evaluation
import plots
import train
from losses import dice_ce
from mirror_unet import count_parameters

# seconds since the machine started, when the imports were done; Linux only, as is the row `scale`
READY = time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else 0.0
# One step of the released code's v3: 0.5 (Dice + CE) + 1e-3 MSE of both images + 0.5 BCE.
RELEASED = dict(version="v3", phi="none", classifier="pet", rec="mse", lambda_rec=5e-4,
                lambda_cls=0.5, weight_decay=1e-5)  # fmt: skip
# Rows of `gpu`; the last one needs nibabel and writes its studies first.
GPU = (
    "step", "step --amp none", "step --compile", "step --batch-size 16",
    "step --batch-size 16 --compile", "loss", "infer", "infer --heads all", "infer --amp none",
    "train --epochs 3 --steps 100",
)  # fmt: skip


# ------------------------------------------------------------------ measuring


def status_mb(pid: int | str, field: str) -> float:
    """VmHWM (peak), VmRSS or RssAnon (private) of a process in MB; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return 0.0


def family() -> list[int]:
    """This process and all that descend from it."""
    pids = [os.getpid()]
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return pids


class Memory(threading.Thread):
    """Peaks of resident and of private memory over this process and its workers, in MB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.resident = self.private = 0.0
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        self.start()

    def run(self):
        while True:
            pids = family()
            self.resident = max(self.resident, sum(status_mb(p, "VmRSS") for p in pids))
            self.private = max(self.private, sum(status_mb(p, "RssAnon") for p in pids))
            time.sleep(0.05)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action, device: torch.device, warmup: int, repeat: int):
    """Wall and processor seconds of each repeat after `warmup` more, and the last result."""
    wall, cpu = [], []
    for i in range(-warmup, repeat):
        synchronize(device)
        start = time.perf_counter(), time.process_time()
        result = action()
        synchronize(device)
        if i >= 0:
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
    return wall, cpu, result


@contextlib.contextmanager
def clocked(parts: dict, **places):
    """Add up in `parts` the seconds inside functions: name=(module, "function")."""
    with contextlib.ExitStack() as stack:
        for part, (module, function) in places.items():
            inner = getattr(module, function)

            def measured(*args, part=part, inner=inner, **kwargs):
                start = time.perf_counter()
                try:
                    return inner(*args, **kwargs)
                finally:
                    parts[part] = parts.get(part, 0.0) + time.perf_counter() - start

            stack.enter_context(mock.patch.object(module, function, measured))
        yield


def environment(device: torch.device) -> dict:
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    found = {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "nibabel": nib.__version__, "cpu": cpu, "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "load1": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def report(args, config, memory, wall, cpu, rate, units, values, parts=None, **more) -> dict:
    """The result of a row; `units` were done in each of the `wall` seconds."""
    device = train.choose_device(config.device)
    median = statistics.median(wall)
    gpu = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {
        "schema": 1, "side": "ours", "impl": "ours", "task": args.task,
        "settings": {k: v for k, v in vars(args).items() if k not in ("task", "out", "row")},
        "seconds": wall, "median": median, "best": min(wall), "cpu_seconds": cpu,
        rate: units / median,
        "peak_rss_mb": status_mb("self", "VmHWM"), "peak_rss_tree_mb": memory.resident,
        "peak_private_tree_mb": memory.private, "peak_gpu_mb": gpu,
        "values": values, "parts": parts or {}, **more, "env": environment(device),
    }  # fmt: skip


# ------------------------------------------------------------------ seeded inputs


def ball(volume: np.ndarray, centre, radius: float, spacing, value, add: bool = False) -> None:
    """Set the voxels within `radius` mm of `centre` (in voxels) to `value`, or add it to them."""
    reach = [radius / s + 1 for s in spacing]
    box = tuple(
        slice(max(0, int(c - r)), min(n, int(c + r) + 2))
        for c, r, n in zip(centre, reach, volume.shape, strict=True)
    )
    grid = np.ogrid[box]
    distance = sum(((g - c) * s) ** 2 for g, c, s in zip(grid, centre, spacing, strict=True))
    inside = distance <= radius**2
    volume[box][inside] = volume[box][inside] + value if add else value


def body(shape, spacing, blobs: int, seed) -> dict[str, np.ndarray]:
    """CTres (HU), SUV and SEG of a crude body: an elliptic cylinder in air with hot lesions."""
    rng = np.random.default_rng(seed)
    w, h, d = shape
    x, y, _ = np.ogrid[:w, :h, :d]
    radius = ((x - w / 2) / (0.38 * w)) ** 2 + ((y - h / 2) / (0.28 * h)) ** 2
    inside = np.broadcast_to(radius <= 1, shape)
    bone = (radius >= 0.1) & (radius <= 0.16)
    tissue = np.where(bone, 600.0, np.where(radius <= 1, 40.0, -1000.0)).astype(np.float32)
    ct = tissue + rng.standard_normal(shape, np.float32) * 15
    noise = np.abs(rng.standard_normal(shape, np.float32))
    suv = np.where(inside, np.float32(0.8), np.float32(0))
    suv += noise * np.where(inside, np.float32(0.3), np.float32(0.01))
    seg = np.zeros(shape, np.uint8)
    for _ in range(blobs):
        angle, out = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.7) ** 0.5
        centre = (
            w / 2 + 0.38 * w * out * np.cos(angle),
            h / 2 + 0.28 * h * out * np.sin(angle),
            rng.uniform(0.1, 0.9) * d,
        )
        size = rng.uniform(8, 22)
        ball(seg, centre, size, spacing, 1)
        ball(suv, centre, size, spacing, np.float32(rng.uniform(4, 14)), add=True)
    return {"CTres": ct, "SUV": suv, "SEG": seg}


def write_studies(root: Path, count: int, shape, spacing, blobs: int = 8, seed: int = 0) -> Path:
    """`count` studies in the layout of AutoPET below `root`."""
    for i in range(count):
        folder = root / f"PETCT_{i:04d}" / "study"
        folder.mkdir(parents=True, exist_ok=True)
        affine = np.diag((-spacing[0], spacing[1], spacing[2], 1.0))
        for name, array in body(shape, spacing, blobs, [seed, i]).items():
            nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    return root


def label_pair(shape, spacing, lesions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mask and prediction: a fifth of the lesions missed, the others moved, some false ones."""
    rng = np.random.default_rng([seed, 77])
    mask, pred = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)

    def anywhere():
        return np.array([rng.uniform(0.1, 0.9) * n for n in shape])

    for _ in range(lesions):
        centre, radius = anywhere(), rng.uniform(3, 25)
        ball(mask, centre, radius, spacing, 1)
        if rng.random() > 0.2:
            moved = centre + rng.uniform(-1.5, 1.5, 3)
            ball(pred, moved, radius * rng.uniform(0.8, 1.15), spacing, 1)
    for _ in range(max(1, lesions // 3)):
        ball(pred, anywhere(), rng.uniform(2, 8), spacing, 1)
    return mask, pred


def batch_of_patches(batch: int, patch, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as data.Patches gives it; two of three patches hold two lesions."""
    rng = np.random.default_rng([seed, 9])
    image = rng.random((batch, 2, *patch), np.float32)
    mask = np.zeros((batch, *patch), np.uint8)
    for b in range(batch):
        for _ in range(2 if b % 3 != 2 else 0):
            centre = [rng.uniform(0.2, 0.8) * n for n in patch]
            ball(mask[b], centre, 0.12 * min(patch), (1, 1, 1), 1)
    return {
        "image": torch.from_numpy(image).half(),
        "mask": torch.from_numpy(mask),
        "tumor": torch.from_numpy(mask.any((1, 2, 3)).astype(np.float32)),
    }


# ------------------------------------------------------------------ the rows


def settle(args, **defaults) -> tuple[train.Config, torch.device]:
    """The resolved config of a row without data (its defaults, then the flags) and its device."""
    names = train.Config.__dataclass_fields__.keys() - {"out"}  # here the file of the results
    flags = {k: v for k, v in vars(args).items() if k in names}
    config = train.resolve(replace(train.Config(**defaults), **as_tuples(flags)), "petct", False)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = train.choose_device(config.device)
    return train.choose_amp(config, device), device


def as_tuples(flags: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}


def say(text: str) -> None:
    print(text, file=sys.stderr)


def small(device: torch.device) -> dict:
    """What a step is measured with: the paper's batch on a GPU, a small one on a CPU."""
    return {} if device.type == "cuda" else {"batch_size": 2, "patch": (64, 64, 64)}


def training_step(config, device):
    """What train.train_step takes after the batch, as train() makes it."""
    model = train.build_model(config).to(device, memory_format=torch.channels_last_3d).train()
    optimizer = train.make_optimizer(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    net = train.parallel(model, config, device, train.Ranks(device))
    return net, model, optimizer, scaler, config, device, {}


def bench_step(args) -> dict:
    device = train.choose_device(getattr(args, "device", "auto"))
    config, device = settle(args, **RELEASED, **small(device))
    item = batch_of_patches(config.batch_size, config.patch, config.seed)
    if device.type == "cuda":
        item = {name: tensor.pin_memory() for name, tensor in item.items()}
    state = training_step(config, device)
    losses, memory = [], Memory()

    def step():
        losses.append(sum(train.train_step(item, *state).values()))

    (first,), *_ = timed(step, device, 0, 1)  # compilation and the choice of algorithms
    wall, cpu, _ = timed(step, device, args.warmup, args.repeat)
    values = {"first_loss": float(losses[0]), "last_loss": float(losses[-1])}
    values["n_params"] = count_parameters(state[1])
    more = {"first_call_s": first, "amp": config.amp}
    return report(
        args, config, memory, wall, cpu, "patches_per_s", config.batch_size, values, **more
    )


def bench_loss(args) -> dict:
    config, device = settle(args, version="v3")
    item = batch_of_patches(config.batch_size, config.patch, config.seed)
    mask = item["mask"].to(device)
    torch.manual_seed(config.seed)
    logits = torch.randn(len(mask), 2, *config.patch).to(device).requires_grad_()
    memory = Memory()

    def once():
        logits.grad = None
        loss = dice_ce(mask, logits)
        loss.backward()
        return loss.detach()

    wall, cpu, loss = timed(once, device, args.warmup, args.repeat)
    values = {"loss": float(loss), "grad_abs_sum": float(logits.grad.abs().sum())}
    return report(args, config, memory, wall, cpu, "patches_per_s", len(mask), values)


def bench_infer(args) -> dict:
    config, device = settle(args, version="v3", overlap=0.5, window_weights="gaussian")
    rng = np.random.default_rng([config.seed, 5])
    image = np.load(args.volume) if args.volume else rng.random((2, *args.shape), np.float32)
    model = train.build_model(config).to(device, memory_format=torch.channels_last_3d)
    heads = {"seg": ("seg",), "test": ("seg", "tumor"), "all": model.heads}[args.heads]
    memory = Memory()

    def once():
        return evaluation.infer(model, image, config, device, heads)

    wall, cpu, (margin, _) = timed(once, device, args.warmup, args.repeat)
    values = {"mean_margin": float(margin.mean()), "foreground_voxels": int((margin > 0).sum())}
    voxels = int(np.prod(image.shape[1:]))
    return report(args, config, memory, wall, cpu, "voxels_per_s", voxels, values, amp=config.amp)


def bench_metrics(args) -> dict:
    config, device = settle(args)
    mask, pred = label_pair(args.shape, args.millimetres, args.lesions, config.seed)
    memory = Memory()

    def once():
        return evaluation.score(pred, mask, ("lesion",), args.millimetres)

    wall, cpu, values = timed(once, device, args.warmup, args.repeat)
    return report(args, config, memory, wall, cpu, "voxels_per_s", mask.size, values)


def bench_preprocess(args) -> dict:
    config, device = settle(args)
    settings = data.preprocessing(config)
    studies = data.find_studies(Path(config.data)).studies[: args.limit]
    memory, parts, metas = Memory(), {}, []

    def once():
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            for i, study in enumerate(studies):
                if findings := data.fill_cache(study, settings, Path(scratch) / f"{i}"):
                    raise data.UserError("\n".join(map(str, findings)))
                metas.append(data.read_json(Path(scratch) / f"{i}" / "meta.json"))

    places = dict(
        load=(data, "read_study"), resample=(data, "resample"), digest=(data.hashlib, "blake2b"),
        save=(data.np, "save"), sync=(data.os, "fsync"),
    )  # fmt: skip
    timed(once, device, args.warmup, 0) if args.warmup else None
    with clocked(parts, **places):
        wall, cpu, _ = timed(once, device, 0, args.repeat)
    meta = metas[-1]
    whole = data.grid_positions(meta["native_shape"], meta["native_spacing"], meta["spacing"])
    voxels = int(np.prod([len(p) for p in whole]))  # of the study, before the crop to the body
    values = {"voxels_per_study": voxels, "voxels_kept": int(np.prod(meta["shape"]))}
    parts = {name: seconds / len(metas) for name, seconds in parts.items()}
    units = voxels * len(studies)
    return report(args, config, memory, wall, cpu, "voxels_per_s", units, values, parts)


def open_crops(config, device):
    """Config, crops of all studies and the loader, as train() opens them; steps of an epoch."""
    config, cases = train.open_data(config, say)
    crops = data.Patches(cases, config.patch, config.seed, config.lesion_p, config.class_label)
    steps = config.steps or -(-len(cases) * config.crops // config.batch_size)
    schedule = data.Schedule(steps, config.batch_size)
    loader = data.Loader(crops, schedule, config.workers, pinned=device.type == "cuda")
    return config, crops, loader


def bench_data(args) -> dict:
    config, device = settle(args, version="v3", steps=50)
    start = time.perf_counter()
    config, crops, loader = open_crops(config, device)
    opened = time.perf_counter() - start
    memory, epoch = Memory(), 0

    def once():
        nonlocal epoch
        loader.batch_sampler.epoch, found = epoch, 0
        for item in loader:
            image = item["image"].to(device, non_blocking=True)
            found += int(item["mask"].to(device).flatten(1).any(1).sum())
        epoch += 1
        return found, image

    wall, cpu, (found, image) = timed(once, device, args.warmup, args.repeat)
    # train.train_step makes float32 of it, which counts in the row `step`
    parts = {"to_float32": len(loader) * min(timed(image.float, device, 1, 5)[0])}
    patches = len(loader) * config.batch_size
    values = {"patches_per_epoch": patches, "foreground_fraction": found / patches}
    more = {"studies": len(crops.cases), "cold_seconds": opened}
    return report(args, config, memory, wall, cpu, "patches_per_s", patches, values, parts, **more)


def bench_scale(args) -> dict:
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    parts = {"import": READY - int(started) / os.sysconf("SC_CLK_TCK")}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        args.data, args.cache = str(Path(scratch) / "studies"), str(Path(scratch) / "cache")
        write_studies(Path(args.data), args.studies, (24, 20, 18), (4, 4, 5), blobs=1)
        config, device = settle(args, version="v3", patch=(48, 48, 48))
        start = time.perf_counter()
        train.open_data(config, say)
        filled = time.perf_counter() - start
        memory = Memory()

        def once():
            opened, crops, loader = open_crops(config, device)
            train.choose_splits(opened, crops.cases, None)
            return next(iter(loader))

        places = dict(open=(train, "open_data"), splits=(train, "choose_splits"))
        with clocked(parts, **places):
            wall, cpu, _ = timed(once, device, 0, args.repeat)
    parts = {k: v if k == "import" else v / args.repeat for k, v in parts.items()}
    return report(
        args, config, memory, wall, cpu, "studies_per_s", args.studies, {}, parts,
        fill_seconds=filled, start_seconds=statistics.median(wall) + parts["import"],
    )  # fmt: skip


def step_alone(config, device) -> list[float]:
    """Seconds of training steps on a batch that is there already."""
    item = batch_of_patches(config.batch_size, config.patch, config.seed)
    state = training_step(config, device)
    return timed(lambda: train.train_step(item, *state), device, 3, 10)[0]


def bench_train(args) -> dict:
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if "data" not in args:
            args.data = str(write_studies(Path(scratch) / "studies", 3, AUTOPET, MILLIMETRES))
        device = train.choose_device(getattr(args, "device", "auto"))
        defaults = dict(version="v3", epochs=2, steps=20, folds=3, out=f"{scratch}/run",
                        cache=f"{scratch}/cache", val_every=10**6) | small(device)  # fmt: skip
        config, device = settle(args, **defaults)
        alone = step_alone(config, device)
        memory, rows, parts = Memory(), [], {}
        places = dict(
            checkpoints=(train, "save_epoch"), tensorboard=(plots, "log_epoch"),
            curves=(plots, "curves"), console=(plots, "epoch_line"),
        )  # fmt: skip
        with clocked(parts, **places), contextlib.redirect_stdout(sys.stderr):
            train.train(config, lambda row: rows.append(row | parts))
        parts = {k: rows[-1].get(k, 0) / len(rows) for k in places}  # without the test's figures
    rates = [row["patches_per_s"] for row in rows]
    epoch = statistics.mean(row["seconds"] for row in rows)
    step = config.batch_size / statistics.median(alone)
    values = {
        "step_alone_patches_per_s": step, "share_of_step": statistics.median(rates) / step,
        "data_wait": [row["data_wait"] for row in rows],
        "overhead_share": sum(parts.values()) / epoch, "steps": config.steps,
    }  # fmt: skip
    wall = [row["seconds"] for row in rows]
    units = config.batch_size * config.steps
    return report(args, config, memory, wall, [], "patches_per_s", units, values, parts)


def bench_gpu(args) -> None:
    """Every row of GPU in a process of its own; a row that fails or takes too long is left out."""
    end = time.monotonic() + 570
    for row in GPU:
        command = [sys.executable, __file__, *shlex.split(row), "--out", args.out]
        try:
            left = max(1, min(180, end - time.monotonic()))
            subprocess.run(command, timeout=left, check=True, stdout=sys.stderr)
        except subprocess.SubprocessError as error:
            say(f"{row}: {error}")


# ------------------------------------------------------------------ command line

AUTOPET, MILLIMETRES = (400, 400, 326), (2.036, 2.036, 3.0)


def bench_studies(args) -> None:
    write_studies(Path(args.data), args.count, args.shape, args.millimetres)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = top.add_subparsers(dest="task", required=True)

    def add(name: str, row, flags=(), warmup: int = 1, repeat: int = 5):
        own = rows.add_parser(name)
        own.set_defaults(row=row)
        own.add_argument("--warmup", type=int, default=warmup, help="[%(default)s]")
        own.add_argument("--repeat", type=int, default=repeat, help="[%(default)s]")
        own.add_argument("--out", help="append the JSON line to this file")
        own.add_argument("--scratch", help="where temporary folders go")
        train.add_flags(own, {"device", "threads", "seed", *flags})
        return own

    network = {"version", "amp", "compile", "patch"}
    read = {"data", "cache", "workers", "spacing"}
    crops = {"patch", "batch_size", "steps"}
    add("step", bench_step, network | {"batch_size", "phi"}, warmup=3, repeat=10)
    add("loss", bench_loss, {"patch", "batch_size"}, warmup=3, repeat=10)
    infer = add("infer", bench_infer, network | {"overlap", "window_weights", "window_batch"})
    infer.add_argument("--heads", choices=("seg", "test", "all"), default="seg",
                       help="what --predict computes, what the test computes, or all")  # fmt: skip
    infer.add_argument("--shape", type=int, nargs=3, default=(200, 200, 300))
    infer.add_argument("--volume", help=".npy of (2, W, H, D), scaled")
    metrics = add("metrics", bench_metrics)
    metrics.add_argument("--shape", type=int, nargs=3, default=(400, 400, 300))
    metrics.add_argument("--millimetres", type=float, nargs=3, default=(2.04, 2.04, 3.0))
    metrics.add_argument("--lesions", type=int, default=40)
    preprocess = add("preprocess", bench_preprocess, {"data", "spacing"}, warmup=0, repeat=3)
    preprocess.add_argument("--limit", type=int, default=1, help="studies [%(default)s]")
    add("data", bench_data, read | crops)
    scale = add("scale", bench_scale, {"workers"}, repeat=3)
    scale.add_argument("--studies", type=int, default=1014)
    add("train", bench_train, read | crops | network | {"epochs"})
    studies = rows.add_parser("studies")
    studies.set_defaults(row=bench_studies, out=None)
    studies.add_argument("--data", required=True)
    studies.add_argument("--count", type=int, default=2)
    studies.add_argument("--shape", type=int, nargs=3, default=AUTOPET)
    studies.add_argument("--millimetres", type=float, nargs=3, default=MILLIMETRES)
    gpu = rows.add_parser("gpu")
    gpu.set_defaults(row=bench_gpu)
    gpu.add_argument("--out", required=True, help="file that takes the JSON lines")
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):
        result = args.row(args)
    if result is None:
        return
    line = json.dumps(result)
    print(line)
    if args.out:
        with open(args.out, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    train.command_line(main)
