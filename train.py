"""Train Mirror U-Net: python train.py --version v2 --shared 5

train() is the loop; the rest of the file is what it calls, in this order.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import plots
import runs
from cache import Case
from config import LAUNCH, Config, add_flags, as_options, check, plain, title, versions_in_words
from console import Log
from data import Loader, Patches, Schedule, add_noise, lend_ct, shuffle_voxels
from devices import Ranks, autocast, choose_amp, choose_device, describe, use_threads
from eval import call_tumors, evaluate, see, tumor_threshold, validation, write_results
from files import Parser, UserError, command_line, reading, write_json
from losses import gradient_norms
from mirror_unet import Network, count_parameters
from tables import results_table, rows_of


@dataclass
class State:
    """A run in training: the network, what updates it, and how far it is."""

    run: Path
    config: Config
    device: torch.device
    ranks: Ranks
    model: Network  # the weights
    net: nn.Module  # the same as the loop calls it, compiled or data-parallel if asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # epochs done
    best: float = -math.inf  # of --select, so far
    rows: list[dict] = field(default_factory=list)  # of metrics.csv
    studies: dict = field(default_factory=dict)  # what it trains on, as runs.studies_of has it


def train(config: Config, report: Callable[[dict], None] | None = None) -> dict:
    """Train, validate and test one run; returns {"run", "epochs", "val_dice", "test": {...}}.
    report: called after each epoch with its row of metrics.csv. Raises UserError for bad input."""
    device = choose_device(config.device)
    ranks = Ranks(device)
    use_threads(config.threads, ranks.say)
    config, cases = open_on_all(config, ranks)
    model = runs.build_model(config)
    config = choose_amp(config, device, model)
    with ExitStack() as stack:
        run = Path(ranks.first(lambda: runs.claim_run(config, stack)))
        goes_on = ranks.first(lambda: runs.can_go_on(run, config))
        if goes_on and ranks.first(lambda: runs.is_finished(run, config.epochs)):
            done = f"has its {config.epochs} epochs and test results; --epochs extends it"
            ranks.say(f"finished   {run} {done}")
            return runs.result_of(run)
        splits = ranks.first(lambda: runs.choose_splits(config, cases, run if goes_on else None))
        by_name = {case.name: case for case in cases}
        parts = {part: [by_name[name] for name in names] for part, names in splits.items()}
        refuse_batches(config, model, ranks.world, len(parts["train"]))
        studies = runs.studies_of(parts, config.kind)
        lent = {part: lend_ct(own, config.ct) for part, own in parts.items()}
        state = resume_or_start(run, config, device, ranks, model, goes_on, studies)
        if ranks.main:
            write_json(run / "splits.json", splits)
            runs.save_config(run, config, device.type)
        loader = load_crops(parts["train"], state)
        introduce(state, parts, loader)
        crops = len(loader) * config.batch_size
        with Log(run, state.epoch, config.epochs, crops, ranks.main) as log:
            for epoch in range(state.epoch, config.epochs):
                row = train_epoch(state, loader, epoch, log.bar)
                if (epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs:
                    row |= validate(state, lent["val"])
                save_epoch(state, row)
                log.tell(state.rows)
                if report:
                    report(row)
        return test(state, lent["val"], lent["test"])


# ------------------------------------------------------------------ before the first epoch


def open_on_all(config: Config, ranks: Ranks) -> tuple[Config, list[Case]]:
    """open_data on every rank: the first one fills the cache, then the others read it."""
    for turn in (True, False):
        if ranks.main == turn:
            check = config.check and turn  # only the first may rewrite the cache
            config, cases = runs.open_data(replace(config, check=check), ranks.say)
        ranks.barrier()
    return config, cases


def refuse_batches(config: Config, model: Network, world: int, studies: int) -> None:
    batch = f"--batch-size {config.batch_size}"
    if config.batch_size > max(crops := studies * config.crops, 4):
        what = f"more than the {crops} crops of an epoch, of {studies} training studies"
        raise UserError(f"{batch}: {what}. Use a smaller one, or more --crops.")
    if config.batch_size % world:
        raise UserError(f"{batch} does not divide by {world} devices.")
    if max(config.patch) <= model.least and config.batch_size == world:
        why = "with one crop per device leaves batch norm a single value at the bottom"
        raise UserError(f"--patch {config.patch} {why}. Use a larger --patch or --batch-size.")


def load_crops(cases: list[Case], state: State) -> Loader:
    """The batches of an epoch: --steps, or every study --crops times."""
    config, ranks = state.config, state.ranks
    how = config.lesion_p, config.class_label, config.ct, bool(config.organ_names)
    crops = Patches(cases, config.patch, config.seed, *how)
    steps = config.steps or -(-len(cases) * config.crops // config.batch_size)
    schedule = Schedule(steps, config.batch_size, ranks.rank, ranks.world)
    return Loader(crops, schedule, config.workers, pinned=state.device.type == "cuda")


def make_optimizer(model: nn.Module, config: Config, device: torch.device):
    """Adam (Sec. 3.4) or SGD (nnU-Net); learned scalars (θ, SF-Net's s) do not decay."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if p.dim()], "weight_decay": config.weight_decay}]
    if scalars := [p for p in learned if not p.dim()]:
        groups.append({"params": scalars, "weight_decay": 0.0})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.99, nesterov=True)
    return torch.optim.Adam(groups, lr=config.lr, fused=device.type in ("cuda", "cpu"))


def introduce(state: State, parts: dict[str, list[Case]], loader: Loader) -> None:
    """Say what is trained on what."""
    config, say = state.config, state.ranks.say
    for part, then in (("val", "best.pt is the last validated epoch"), ("test", "no Dice, no FNV")):
        if not any(case.has_lesion for case in parts[part]):
            say(f"splits     no lesion in the {part} part: {then}")
    say(
        f"model      {title(config)}, {count_parameters(state.model) / 1e6:.2f} M parameters\n"
        f"splits     {', '.join(f'{len(own)} {part}' for part, own in parts.items())}\n"
        f"run        {state.run}, epochs {state.epoch + 1} to {config.epochs} of {len(loader)} "
        f"steps of {config.batch_size} crops {config.patch}, {describe(state.device)}, "
        f"amp {config.amp}"
    )


# ------------------------------------------------------------------ a step, an epoch


def step_seed(*numbers: int) -> int:
    """A seed for Φ and dropout from (seed, epoch, step, rank), so that nothing need be saved."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def learning_rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    done = epoch / config.epochs
    share = {
        "step": 0.1 if config.lr_drop and epoch >= config.lr_drop else 1,
        "poly": (1 - done) ** 0.9,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "exp": 0.985**epoch,
    }
    return config.lr * share[config.schedule]


def transform_ct(ct: torch.Tensor, config: Config) -> torch.Tensor:
    """Φ(x_C) of Eq. 1, in training only."""
    if config.phi == "noise":
        return add_noise(ct, config.noise_sigma)
    if config.phi == "shuffle":
        return shuffle_voxels(ct, config.shuffle_edge, config.shuffle_count)
    return ct


def train_step(state: State, item: dict, options: dict, norms: dict | None = None) -> dict:
    """One update of the weights from a batch of data.Patches; its weighted loss terms by name.

    options: what forward is given beside the images (Network.step_options). norms: a dict that
    takes each term's gradient norm on the shared layers.
    """
    config, model, optimizer, scaler = state.config, state.model, state.optimizer, state.scaler
    item = {name: value.to(state.device, non_blocking=True) for name, value in item.items()}
    image = see(item.pop("image").float(), config.modality)  # (B, 2, W, H, D)
    ct, pet = image[:, :1], image[:, 1:]
    with autocast(state.device, config.amp):
        out = state.net(transform_ct(ct, config), pet, **options)
    terms = runs.loss_function(config)(out, {"ct": ct, "pet": pet, **item}, config)
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


def train_epoch(state: State, loader: Loader, epoch: int, bar: tqdm) -> dict:
    """One pass over the crops; its row of metrics.csv. Raises UserError if the loss diverges."""
    config, ranks, lr = state.config, state.ranks, learning_rate(state.config, epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.model.train()
    loader.batch_sampler.epoch = epoch
    sums, norms, waited = 0, {}, 0.0
    started = waiting = time.perf_counter()
    for step, item in enumerate(loader):
        waited += time.perf_counter() - waiting
        torch.manual_seed(step_seed(config.seed, epoch, step, ranks.rank))
        options = state.model.step_options(step_seed(config.seed, epoch, step))  # equal on all
        terms = train_step(state, item, options, norms if step == 0 else None)
        sums = sums + torch.stack(list(terms.values()))
        bar.update(config.batch_size)
        waiting = time.perf_counter()
    means = dict(zip(terms, ranks.mean(sums / len(loader)).tolist(), strict=True))  # waits here
    seconds = time.perf_counter() - started
    loss = sum(means.values())
    if not math.isfinite(loss):
        remedy = "The checkpoint before it is kept; try a lower --lr, or --amp none"
        raise UserError(f"{state.run}: the loss is {loss} in epoch {epoch + 1}. {remedy}.")
    ranks.average_buffers(state.model)
    row = {"epoch": epoch + 1, "lr": lr, "loss": loss, **means}
    row |= {f"grad_{name}": norm for name, norm in norms.items()}
    if config.theta is not None:
        row["theta"] = state.model.theta.item()
    rate = len(loader) * config.batch_size / seconds
    return row | {"patches_per_s": rate, "data_wait": waited / seconds, "seconds": seconds}


# ------------------------------------------------------------------ validation, test, checkpoints


def validate(state: State, cases: list[Case]) -> dict:
    """eval.validation of the validation studies, on the cached grid, and the seconds it took."""
    began, ranks = time.perf_counter(), state.ranks
    mine = cases[ranks.rank :: ranks.world]
    scored = evaluate(state.model, mine, state.config, state.device, native=False)
    found = validation(ranks.gather(scored))
    return found | {"val_seconds": time.perf_counter() - began}


def test(state: State, val: list[Case], cases: list[Case]) -> dict:
    """Evaluate best.pt on the test part: test_studies.csv, summary.json, curves and examples.

    Where T's scores part ill from healthy is chosen on the validation part.
    """
    run, config, ranks = state.run, state.config, state.ranks
    ranks.barrier()  # rank 0 may still be writing best.pt
    began = time.perf_counter()
    best = runs.load_checkpoint(run / "best.pt", "val_dice")
    with reading(run / "best.pt", "Do not mix runs"):
        state.model.load_state_dict(best["model"])
    mine = slice(ranks.rank, None, ranks.world)
    bar = "test" if ranks.main else ""
    scored = ranks.gather(evaluate(state.model, cases[mine], config, state.device, bar=bar))
    told = state.model, val[mine], config, state.device
    threshold = tumor_threshold(*told, gather=ranks.gather)
    call_tumors(scored, threshold)
    if ranks.main:
        plots.pictures(run, state.model, cases, config, state.device)
        facts = {
            "checkpoint_epoch": best["epoch"],
            "epochs": config.epochs,
            "val_dice": None if math.isnan(best["val_dice"]) else best["val_dice"],
            "seconds": round(runs.seconds_of(state.rows) + time.perf_counter() - began, 1),
            "gpu_memory_mb": runs.most_gpu_memory(state.rows),
            "tumor_threshold": threshold,
        }
        summary = write_results(run, "test", scored, facts)
        ranks.say(f"\ntest       best.pt of epoch {best['epoch']}, {len(scored)} studies\n")
        ranks.say(results_table(rows_of(run.name, summary)))
        ranks.say(f"\n{run}: summary.json, test_studies.csv, curves.png, examples.png")
    ranks.barrier()
    return runs.result_of(run)


def resume_or_start(run: Path, config, device, ranks, model, goes_on, studies=None) -> State:
    """The state of a run before its next epoch, from last.pt if it goes on. Raises UserError if its
    studies are no longer those that it began with."""
    model = model.to(device, memory_format=torch.channels_last_3d)
    state = State(
        run, config, device, ranks, model,
        net=ranks.parallel(model, device, config.compile),
        optimizer=make_optimizer(model, config, device),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        studies=studies or {},
    )  # fmt: skip
    if goes_on:
        stateful = ("model", "optimizer", "scaler")
        checkpoint = runs.load_checkpoint(run / "last.pt", *stateful, "best_dice")
        if isinstance(began := checkpoint.get("studies"), dict):
            runs.refuse_changes(run, began, state.studies)
        else:
            ranks.say("resume     an older run: whether its studies changed is not known")
        with reading(run / "last.pt", "Do not mix runs"):
            for name in stateful:
                getattr(state, name).load_state_dict(checkpoint[name])
        state.epoch, state.best = checkpoint["epoch"], checkpoint["best_dice"]
        state.rows = runs.read_metrics(run, state.epoch)
        if state.rows and state.rows[-1]["epoch"] < state.epoch:
            raise UserError(f"{run / 'metrics.csv'}: ends before last.pt. Restore or remove it.")
    return state


def save_epoch(state: State, row: dict) -> None:
    """Write best.pt if the epoch's validation is the best so far, metrics.csv, then last.pt, in
    this order: whatever a kill leaves, going on from last.pt writes the rest again. Without
    lesions to validate on, the last validated epoch is the best."""
    if state.device.type == "cuda":
        row["gpu_memory_mb"] = torch.cuda.max_memory_allocated(state.device) / 2**20
    state.rows.append(row)
    state.epoch = row["epoch"]
    if not state.ranks.main:
        return
    settings = {"config": plain(state.config, weights_only=True), "epoch": state.epoch}
    weights = settings | {"model": state.model.state_dict()}
    score = row.get(f"val_{state.config.select}", -math.inf)
    if score > state.best or (math.isnan(score) and state.best == -math.inf):
        state.best = max(state.best, -math.inf if math.isnan(score) else score)
        runs.save_checkpoint(state.run / "best.pt", weights | {"val_dice": row["val_dice"]})
    runs.write_metrics(state.run, state.rows)
    to_go_on = {name: getattr(state, name).state_dict() for name in ("optimizer", "scaler")}
    to_go_on |= {"best_dice": state.best, "studies": state.studies}
    runs.save_checkpoint(state.run / "last.pt", weights | to_go_on)


def parse(argv: list[str] | None = None) -> Config:
    """The command line as a Config; with --resume, on top of what the run in --out has saved."""
    parser = Parser(
        description="Train Mirror U-Net, then test it. Without --data on a simulated cohort.",
        epilog=versions_in_words(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    given = as_options(parser.parse_args(argv))
    resume, run = given.get("resume"), Path(given.get("out", ""))
    if resume and "out" not in given:
        raise UserError("--resume: say which run with --out RUN_FOLDER.")
    files = ("config.json", "last.pt", "best.pt", "summary.json")  # of a run that began
    saved = resume and any((run / name).exists() for name in files)
    if not saved:
        return Config(**given)
    config = runs.saved_config(run)
    # said before what another version or Φ does not read; auto may stand for the same precision
    own = {name: getattr(check(Config(**given)), name) for name in given if name not in LAUNCH}
    runs.refuse_settings(run, plain(config), plain(replace(config, **own | {"amp": config.amp})))
    return replace(config, **given)


def main() -> None:
    command_line(lambda: train(parse()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
