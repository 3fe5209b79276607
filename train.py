"""Train Mirror U-Net: python train.py --version v2 --shared 5

train() is the whole run on one page; the rest of the file is what it calls, in this order.
"""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import plots
import runs
from cache import Case
from common import Parser, UserError, command_line, reading, write_json, writing
from config import (
    LAUNCH_OPTIONS,
    Config,
    add_flags,
    check_options,
    describe_run,
    list_versions,
    options_from_args,
    resolve,
    to_dict,
)
from data import Loader, Patches, Schedule, select_modality, transform_ct, with_swapped_ct
from devices import Ranks, autocast, choose_amp, choose_device, describe_device, set_threads
from eval import add_tumor_calls, evaluate, summarize_validation, tumor_threshold, write_results
from losses import gradient_norms
from metrics import results_table, systems_of_run
from mirror_unet import Network, count_parameters

try:
    from tensorboardX import SummaryWriter
except ImportError:
    SummaryWriter = None  # a run then writes no TensorBoard events


@dataclass
class State:
    """A run in training: the network, what updates it, and how far it is."""

    run: Path
    config: Config
    device: torch.device
    ranks: Ranks
    model: Network
    wrapped: nn.Module  # the model as the loop calls it: compiled or data-parallel if asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # epochs done
    best_dice: float = -math.inf  # on the validation part, so far
    rows: list[dict] = field(default_factory=list)  # of metrics.csv
    fingerprints: dict[str, str] = field(default_factory=dict)  # see runs.study_fingerprints


def train(config: Config, report: Callable[[dict], None] | None = None) -> dict:
    """Train, validate and test one run.

    report: called after each epoch with its row of metrics.csv. Returns {"run", "epochs",
    "val_dice", "test": {metric: mean}}. Raises UserError for bad input.
    """
    # The machine. Under torchrun rank 0 reads and writes, and sends what it read to the others.
    device = choose_device(config.device)
    ranks = Ranks(device)
    set_threads(config.threads, ranks.say)

    # The studies, and the config settled for them.
    data = ranks.on_main(lambda: runs.find_data(config, ranks.say))
    config = resolve(config, data.kind)
    cases = ranks.on_main(lambda: runs.load_cases(data, config, ranks.say))
    config = runs.with_organ_names(config, cases, ranks.say)

    # The network is built first, so that a config it refuses leaves no run folder behind.
    model = runs.build_model(config)
    config = choose_amp(config, device, model)

    with ExitStack() as stack:
        # The run folder: a new one, or one whose run resumes. `stack` keeps it locked to the end.
        run = ranks.on_main(lambda: runs.lock_run_folder(config, stack))
        resumes = ranks.on_main(lambda: runs.can_resume(run, config))
        if resumes and ranks.on_main(lambda: runs.is_finished(run, config.epochs)):
            ranks.say(f"finished   {run} has its test results; --epochs extends it")
            return runs.load_result(run)

        # Which studies train, validate and test.
        splits = ranks.on_main(
            lambda: runs.choose_splits(config, cases, run if resumes else None, ranks.say)
        )
        parts = divide_cases(cases, splits, config.ct)
        check_batch_size(config, model, ranks.world, len(parts["train"]))

        state = make_state(run, config, device, ranks, model)
        state.fingerprints = runs.study_fingerprints(parts, config.kind)
        if resumes:
            restore(state)

        # From here on files are written.
        if ranks.main:
            write_json(run / "splits.json", splits)
            runs.save_config(run, config, device.type)
        loader = make_loader(parts["train"], state)
        print_run_summary(state, parts, loader)

        with Log(state, len(loader) * config.batch_size) as log:
            for epoch in range(state.epoch, config.epochs):
                row = train_epoch(state, loader, epoch, log.bar)
                if (epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs:
                    row |= validate(state, parts["val"])
                save_epoch(state, row)
                log.write_epoch()
                if report:
                    report(row)

        return test_best_checkpoint(state, parts["val"], parts["test"])


# ------------------------------------------------------------------ before the first epoch


def divide_cases(cases: list[Case], splits: dict, ct: str) -> dict[str, list[Case]]:
    """The studies of each part, in the order of the splits.

    ct: --ct; with "other" each study is given the CT of another patient of the same part.
    """
    by_name = {case.name: case for case in cases}
    parts = {}
    for part, names in splits.items():
        studies = [by_name[name] for name in names]
        parts[part] = with_swapped_ct(studies, ct)
    return parts


def check_batch_size(config: Config, model: Network, world: int, study_count: int) -> None:
    """Refuse a --batch-size that `world` processes cannot train with.

    Raises UserError if it is much larger than an epoch, if the processes cannot share it, or if it
    is one crop per process of the smallest patch. study_count: of the training part.
    """
    batch = f"--batch-size {config.batch_size}"
    crops = study_count * config.crops
    # A batch of up to 4, the default for real data, may exceed an epoch: it then holds a study
    # more often than --crops times.
    if config.batch_size > max(crops, 4):
        finding = f"more than the {crops} crops of an epoch, of {study_count} training studies"
        raise UserError(f"{batch}: {finding}. Use a smaller one, or more --crops.")

    if config.batch_size % world:
        raise UserError(f"{batch} does not divide by {world} devices.")

    # On the smallest patch the deepest maps of Mirror U-Net and DeepMTS have one voxel, and batch
    # norm would have a single value per channel. Networks with instance norm are refused too,
    # though one crop would do: the rule is the same for all systems.
    smallest_patch = max(config.patch) <= model.min_side
    if smallest_patch and config.batch_size == world:
        finding = "is the smallest of this network; with one crop per device it"
        reason = "leaves batch norm a single value at the bottom, if the network has it"
        remedy = "Use a larger --patch or --batch-size"
        raise UserError(f"--patch {config.patch} {finding} {reason}. {remedy}.")


def make_state(
    run: Path,
    config: Config,
    device: torch.device,
    ranks: Ranks,
    model: Network,
) -> State:
    """The state of a run before its first epoch."""
    model = model.to(device, memory_format=torch.channels_last_3d)
    return State(
        run=run,
        config=config,
        device=device,
        ranks=ranks,
        model=model,
        wrapped=ranks.wrap(model, device, config.compile),
        optimizer=make_optimizer(model, config, device),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
    )


def restore(state: State) -> None:
    """Bring a new state to where last.pt left the run.

    Raises UserError if the studies are no longer those that the run began with.
    """
    last = state.run / "last.pt"
    stateful = ("model", "optimizer", "scaler")
    checkpoint = runs.load_checkpoint(last, *stateful, "best_dice", "studies")
    runs.refuse_changed_studies(state.run, checkpoint["studies"], state.fingerprints)
    with reading(last, "Do not mix runs"):
        for name in stateful:
            getattr(state, name).load_state_dict(checkpoint[name])
    state.epoch = checkpoint["epoch"]
    state.best_dice = checkpoint["best_dice"]

    state.rows = runs.read_metrics(state.run, state.epoch)
    if state.rows and state.rows[-1]["epoch"] < state.epoch:
        raise UserError(f"{state.run / 'metrics.csv'}: ends before last.pt. Restore or remove it.")


def make_optimizer(model: Network, config: Config, device: torch.device) -> torch.optim.Adam:
    """Adam (Sec. 3.4). Learned scalars (θ, SF-Net's s) and gates have no weight decay.

    It would close the gates again, from which is read whether the loss opens them.
    """
    gates = {id(gate.g) for gate in model.gates.values()}
    weights = []
    undecayed = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 0 and id(parameter) not in gates
            group = weights if decays else undecayed
            group.append(parameter)

    groups = [{"params": weights, "weight_decay": config.weight_decay}]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    return torch.optim.Adam(groups, lr=config.lr, fused=device.type in ("cuda", "cpu"))


def make_loader(cases: list[Case], state: State) -> Loader:
    """The batches of an epoch: --steps of them, or every study --crops times."""
    config = state.config
    patches = Patches(
        cases,
        config.patch,
        config.seed,
        lesion_p=config.lesion_p,
        class_label=config.class_label,
        organs=bool(config.organ_names),
    )
    steps = config.steps or math.ceil(len(cases) * config.crops / config.batch_size)
    schedule = Schedule(steps, config.batch_size, state.ranks.rank, state.ranks.world)
    return Loader(patches, schedule, config.workers, pinned=state.device.type == "cuda")


def print_run_summary(state: State, parts: dict[str, list[Case]], loader: Loader) -> None:
    """Say what is trained, on which studies, and for how long."""
    config, say = state.config, state.ranks.say
    consequences = {"val": "best.pt is the last validated epoch", "test": "no Dice, no FNV"}
    for part, consequence in consequences.items():
        if not any(case.has_lesion for case in parts[part]):
            say(f"splits     no lesion in the {part} part: {consequence}")

    parameters = count_parameters(state.model) / 1e6
    sizes = ", ".join(f"{len(cases)} {part}" for part, cases in parts.items())
    say(f"model      {describe_run(config)}, {parameters:.2f} M parameters")
    say(f"splits     {sizes}")
    say(
        f"run        {state.run}, epochs {state.epoch + 1} to {config.epochs} of {len(loader)} "
        f"steps of {config.batch_size} crops {config.patch}, {describe_device(state.device)}, "
        f"amp {config.amp}"
    )


# ------------------------------------------------------------------ a step, an epoch


def step_seed(*numbers: int) -> int:
    """A random integer from (seed, epoch, step) or (seed, epoch, step, rank), always the same.

    It seeds Φ and dropout, or picks the branch that Valindria trains: no random state need be
    saved.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def learning_rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch: --lr, and a tenth of it once --lr-drop epochs are done.

    epoch: counted from 0, so it is the number of epochs done.
    """
    dropped = config.lr_drop and epoch >= config.lr_drop
    return config.lr * 0.1 if dropped else config.lr


def train_step(
    state: State,
    batch: dict,
    forward_options: dict,
    gradient_norms_out: dict | None = None,
) -> dict[str, torch.Tensor]:
    """One update of the weights; returns the weighted loss terms by name.

    batch: images and targets as data.Patches gives them.
    forward_options: see Network.step_options.
    gradient_norms_out: a dict that is filled with the norm of each term's gradient on the shared
        layers; None: they are not computed, as that is slow.
    """
    config, optimizer, scaler = state.config, state.optimizer, state.scaler
    on_device = {}
    for name, value in batch.items():
        on_device[name] = value.to(state.device, non_blocking=True)
    images = select_modality(on_device.pop("image").float(), config.modality)  # (B, 2, W, H, D)
    ct, pet = images[:, :1], images[:, 1:]

    # Φ changes what the CT branch is given, not what it has to reconstruct.
    with autocast(state.device, config.amp):
        output = state.wrapped(transform_ct(ct, config), pet, **forward_options)
    # With --modality ct or pet both targets are that one image.
    targets = {**on_device, "ct": ct, "pet": pet}
    terms = runs.loss_function(config)(output, targets, config)  # config holds the weights λ
    if gradient_norms_out is not None:
        gradient_norms_out.update(gradient_norms(terms, state.model.shared_parameters()))

    optimizer.zero_grad(set_to_none=True)
    scaler.scale(sum(terms.values())).backward()
    scaler.step(optimizer)
    scaler.update()
    if config.theta == "learn":
        state.model.theta.data.clamp_(0, 1)  # Eq. 4 weighs CT by θ and PET by 1 - θ

    return {name: term.detach() for name, term in terms.items()}


def train_epoch(state: State, loader: Loader, epoch: int, bar: tqdm) -> dict:
    """One pass over the crops; returns its row of metrics.csv.

    Raises UserError if the loss is not a finite number.
    """
    config, ranks, model = state.config, state.ranks, state.model
    lr = learning_rate(config, epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    model.train()
    loader.schedule.epoch = epoch

    sums = 0  # over the steps: one value per loss term, in the order of `terms`
    first_norms = {}  # gradient norms of the first step
    seconds_waited = 0.0  # for the loader
    started = waiting_since = time.perf_counter()
    for step, batch in enumerate(loader):
        seconds_waited += time.perf_counter() - waiting_since
        torch.manual_seed(step_seed(config.seed, epoch, step, ranks.rank))
        # All ranks must train the same branches, so this number does not depend on the rank.
        random_number = step_seed(config.seed, epoch, step)
        forward_options = model.step_options(random_number)
        terms = train_step(state, batch, forward_options, first_norms if step == 0 else None)
        sums = sums + torch.stack(list(terms.values()))
        bar.update(config.batch_size)
        waiting_since = time.perf_counter()

    # tolist() waits for the device, so the clock is read after it.
    means = ranks.mean(sums / len(loader)).tolist()
    seconds = time.perf_counter() - started
    loss = sum(means)
    if not math.isfinite(loss):
        remedy = "The checkpoint before it is kept; try a lower --lr, or --amp none"
        raise UserError(f"{state.run}: the loss is {loss} in epoch {epoch + 1}. {remedy}.")
    ranks.average_buffers(model)

    row = {"epoch": epoch + 1, "lr": lr, "loss": loss}
    term_names = list(terms)  # the same in every step
    row.update(zip(term_names, means, strict=True))
    for name, norm in first_norms.items():
        row[f"grad_{name}"] = norm
    if config.theta is not None:
        row["theta"] = model.theta.item()
    for name, gate in model.gates.items():
        row[f"gate_{name}"] = gate.g.abs().mean().item()
    row["patches_per_s"] = len(loader) * config.batch_size / seconds
    row["data_wait"] = seconds_waited / seconds  # as a share of the time
    row["seconds"] = seconds
    return row


# ------------------------------------------------------------------ validation, checkpoints, test


def validate(state: State, cases: list[Case]) -> dict:
    """Score the validation studies on the cached grid; returns the means, and the seconds taken."""
    started = time.perf_counter()
    ranks = state.ranks
    share = cases[ranks.rank :: ranks.world]
    rows = evaluate(state, share, native=False)
    means = summarize_validation(ranks.gather(rows))
    return means | {"val_seconds": time.perf_counter() - started}


def save_epoch(state: State, row: dict) -> None:
    """Write best.pt if the epoch's validation is the best so far, metrics.csv, then last.pt.

    In this order a kill at any moment does no harm: resuming from last.pt writes the others again.
    """
    if state.device.type == "cuda":
        row["gpu_memory_mb"] = torch.cuda.max_memory_allocated(state.device) / 2**20
    state.rows.append(row)
    state.epoch = row["epoch"]
    if not state.ranks.main:
        return

    checkpoint = {
        "config": to_dict(state.config, weights_only=True),
        "epoch": state.epoch,
        "model": state.model.state_dict(),
    }
    if is_best(row, state.best_dice):
        dice = row["val_dice"]
        if not math.isnan(dice):
            state.best_dice = dice
        runs.save_checkpoint(state.run / "best.pt", {**checkpoint, "val_dice": dice})

    runs.write_csv(state.run / "metrics.csv", state.rows)
    checkpoint["optimizer"] = state.optimizer.state_dict()
    checkpoint["scaler"] = state.scaler.state_dict()
    checkpoint["best_dice"] = state.best_dice
    checkpoint["studies"] = state.fingerprints
    runs.save_checkpoint(state.run / "last.pt", checkpoint)


def is_best(row: dict, best_dice: float) -> bool:
    """Whether an epoch becomes best.pt. best_dice: the best Dice before it, -inf if there is none.

    Without a lesion to validate on, Dice is always NaN, and the last validated epoch is the best.
    """
    if "val_dice" not in row:
        return False
    if math.isnan(row["val_dice"]):
        return best_dice == -math.inf
    return row["val_dice"] > best_dice


def test_best_checkpoint(state: State, val: list[Case], test: list[Case]) -> dict:
    """Score best.pt on the test part: test_studies.csv, summary.json, curves.png, examples.png.

    The threshold on T's study score is chosen on the validation part. Returns what train() does.
    """
    run, config, ranks = state.run, state.config, state.ranks
    ranks.barrier()  # the first rank may still be writing best.pt
    started = time.perf_counter()
    best = runs.load_checkpoint(run / "best.pt", "val_dice")
    with reading(run / "best.pt", "Do not mix runs"):
        state.model.load_state_dict(best["model"])

    share = slice(ranks.rank, None, ranks.world)
    bar = "test" if ranks.main else ""
    rows = ranks.gather(evaluate(state, test[share], bar=bar))
    threshold = tumor_threshold(state, val[share], gather=ranks.gather)
    add_tumor_calls(rows, threshold)

    if ranks.main:
        plots.draw_curves(run)
        plots.draw_examples(run, state, test)
        seconds = runs.training_seconds(state.rows) + time.perf_counter() - started
        facts = {
            "checkpoint_epoch": best["epoch"],
            "epochs": config.epochs,
            "val_dice": None if math.isnan(best["val_dice"]) else best["val_dice"],
            "seconds": round(seconds, 1),
            "gpu_memory_mb": runs.peak_gpu_memory(state.rows),
            "tumor_threshold": threshold,
        }
        summary = write_results(run, "test", rows, facts)
        ranks.say(f"\ntest       best.pt of epoch {best['epoch']}, {len(rows)} studies\n")
        ranks.say(results_table(systems_of_run(run.name, summary)))
        ranks.say(f"\n{run}: summary.json, test_studies.csv, curves.png, examples.png")

    ranks.barrier()
    return runs.load_result(run)


# ------------------------------------------------------------------ what a run prints


class Log:
    """A progress bar, a line per epoch, TensorBoard events and, every three minutes, curves.png.

    Only rank 0 prints and writes. crops: those of one epoch.
    """

    def __init__(self, state: State, crops: int):
        self.state = state
        self.start = state.epoch  # epochs done before this launch
        self.drawn = time.perf_counter()
        epochs_to_do = state.config.epochs - self.start
        self.bar = tqdm(
            total=epochs_to_do * crops,
            unit="patch",
            leave=False,
            disable=None if state.ranks.main else True,
        )

        # purge_step hides what an interrupted run logged later. The writer's own thread never
        # flushes: it would die of a full disk without a word, and the run wait for it for ever.
        self.events = state.run / "tensorboard"
        self.writer = None
        if SummaryWriter and state.ranks.main and epochs_to_do:
            with writing(self.events):
                self.writer = SummaryWriter(
                    str(self.events),
                    purge_step=self.start + 1,
                    max_queue=1000,
                    flush_secs=10**6,
                )

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        if self.writer:
            try:
                self.writer.close()
            except OSError:  # a full disk, which write_epoch() has reported
                events = self.writer.file_writer.event_writer
                events._worker.stop()
                events.close = lambda: None  # else it is tried again when Python ends

    def write_epoch(self) -> None:
        """Report the last row of metrics.csv."""
        rows = self.state.rows
        row = rows[-1]
        if self.writer:
            with writing(self.events):
                self.log_events(row)

        if not self.state.ranks.main:
            return
        epochs_done = row["epoch"] - self.start
        seconds_per_epoch = runs.training_seconds(rows[-epochs_done:]) / epochs_done
        seconds_left = seconds_per_epoch * (self.state.config.epochs - row["epoch"])
        tqdm.write(epoch_line(row, seconds_left, heading=epochs_done == 1))

        if time.perf_counter() - self.drawn > 180:  # a figure takes a second or two
            plots.draw_curves(self.state.run)
            self.drawn = time.perf_counter()

    def log_events(self, row: dict) -> None:
        for name, value in row.items():
            group = "gradient" if name.startswith("grad_") else "train"
            if name != "epoch":
                tag = f"{group}/{name.removeprefix('grad_')}"
                self.writer.add_scalar(tag, value, row["epoch"])
        self.writer.flush()


def epoch_line(row: dict, seconds_left: float, heading: bool) -> str:
    """One aligned line per epoch, under a heading before the first."""
    head = f"{'epoch':>5}{'loss':>9}"
    line = f"{row['epoch']:>5}{row['loss']:>9.4f}"
    for term in runs.loss_term_names(row):
        head += f"{term:>11}"
        line += f"{row[term]:>11.4f}"

    dice = f"{row['val_dice']:.4f}" if "val_dice" in row else ""
    left = str(timedelta(seconds=round(seconds_left)))
    head += f"{'val Dice':>10}{'patches/s':>11}{'wait':>6}{'left':>9}"
    line += f"{dice:>10}{row['patches_per_s']:>11.1f}{row['data_wait']:>6.0%}{left:>9}"
    return f"{head}\n{line}" if heading else line


# ------------------------------------------------------------------ the command


def parse_train(argv: list[str] | None = None) -> Config:
    """The command line as a Config; with --resume, on top of what the run in --out has saved."""
    parser = Parser(
        description="Train Mirror U-Net, then test it. Without --data on a simulated cohort.",
        epilog=list_versions(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    given = options_from_args(parser.parse_args(argv))
    if not given.get("resume"):
        return Config(**given)

    if "out" not in given:
        raise UserError("--resume: say which run with --out RUN_FOLDER.")
    run = Path(given["out"])
    files_of_a_run = ("config.json", "last.pt", "best.pt", "summary.json")
    if not any((run / name).exists() for name in files_of_a_run):
        return Config(**given)

    # Only options that were given are compared; train() would complain of a changed --version in
    # other words. can_resume() compares --amp, once it is known what auto stands for.
    saved = runs.load_config(run)
    checked = check_options(Config(**given))
    asked = {}
    for name in given:
        if name not in LAUNCH_OPTIONS and name != "amp":
            asked[name] = getattr(checked, name)
    runs.refuse_changed_options(run, to_dict(saved), to_dict(replace(saved, **asked)))
    return replace(saved, **given)


def train_command() -> None:
    command_line(lambda: train(parse_train()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    train_command()
