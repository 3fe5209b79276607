"""The machine: which device, which precision, and the processes that torchrun starts."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from common import UserError
from config import Config
from mirror_unet import Network

# The variables that torchrun sets for each process, with their values for a single process.
SINGLE_PROCESS = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}


def choose_device(name: str) -> torch.device:
    """The device that --device names; auto takes CUDA, then MPS, then the CPU."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }

    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise UserError(f"--device {name}: torch {torch.__version__} sees none. Use --device cpu.")

    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """The device in words, and whether torch could use a GPU but sees none."""
    if device.type == "cpu" and torch.version.cuda and not torch.cuda.is_available():
        return f"{device} (this torch is built for CUDA but sees no GPU)"
    return str(device)


def set_threads(wanted: int, say: Callable[[str], None]) -> None:
    """Set the number of torch's threads, at most one per core of this process; 0 leaves it."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1

    if wanted > cores:
        say(f"threads    {cores}, one per core, in place of --threads {wanted}")
    if wanted:
        torch.set_num_threads(min(wanted, cores))


def choose_amp(config: Config, device: torch.device, network=Network) -> Config:
    """Settle --amp for the device. Raises UserError where training would go wrong."""
    amp = config.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "none"

    if amp == "bf16" and device.type == "cpu" and min(config.patch) < network.bf16_min_side:
        raise UserError(
            f"--amp bf16 with --patch {config.patch} on the CPU: torch computes wrong gradients "
            f"for sides below {network.bf16_min_side}. Use --amp none."
        )
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU. Use --amp none on the CPU.")
    return replace(config, amp=amp)


def autocast(device: torch.device, amp: str):
    """Mixed precision for the forward pass: amp "none", "bf16" or "fp16"."""
    if amp == "none":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16)


def read_ranks() -> tuple[int, int]:
    """The number of processes that torchrun started, and the rank of this one.

    Raises UserError if the variables that it sets make no sense.
    """
    values = {}
    for name, default in SINGLE_PROCESS.items():
        values[name] = os.environ.get(name, default)

    try:
        world = int(values["WORLD_SIZE"])
        rank = int(values["RANK"])
        has_address = values["MASTER_ADDR"] and int(values["MASTER_PORT"])
        valid = 0 <= rank < world and (world == 1 or has_address)
    except ValueError:
        valid = False

    if not valid:
        variables = " ".join(f"{name}={value}" for name, value in values.items())
        remedy = "Unset these variables, or start with torchrun"
        raise UserError(f"{variables} is not what torchrun sets. {remedy}.")
    return world, rank


class Ranks:
    """The processes that torchrun started; a single process is rank 0 of 1."""

    def __init__(self, device: torch.device):
        self.world, self.rank = read_ranks()
        self.main = self.rank == 0
        self.say = print if self.main else lambda text: None

        if self.world > 1 and not dist.is_initialized():
            backend = "gloo"
            if device.type == "cuda":
                backend = "cpu:gloo,cuda:nccl"
                torch.cuda.set_device(device)
            # The others wait while rank 0 preprocesses, which may take hours.
            dist.init_process_group(backend, timeout=timedelta(days=2))

    def barrier(self) -> None:
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    def gather(self, rows: list) -> list:
        """The rows of all ranks, in the order of the undivided list.

        Rank r holds the rows r, r + world, r + 2 world, ... of that list.
        """
        if self.world == 1:
            return rows
        parts = [None] * self.world
        dist.all_gather_object(parts, rows)

        undivided = []
        for i in range(len(parts[0])):
            for part in parts:
                undivided.extend(part[i : i + 1])  # the last ranks may hold one row less
        return undivided

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

    def on_main(self, action: Callable):
        """The result of `action` on rank 0, sent to every rank."""
        result = [action() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(result)  # which replaces None on the other ranks
        return result[0]

    def wrap(self, model: Network, device: torch.device, compiled: bool) -> nn.Module:
        """The network as the loop calls it: data-parallel under torchrun, compiled if asked."""
        net: nn.Module = model
        if self.world > 1:
            net = nn.parallel.DistributedDataParallel(
                net,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,  # average_buffers() does it before validation
                find_unused_parameters=model.one_branch_per_step,
            )

        if compiled:
            # losses.gradient_norms walks the graph before backward() does
            torch._functorch.config.donated_buffer = False
            net = torch.compile(net)
        return net
