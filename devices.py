"""The machine: which device, which precision, and the processes that torchrun starts."""

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from config import Config
from files import UserError
from mirror_unet import Network

# What torchrun tells its processes in the environment, as it is without it.
ALONE = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}


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


def describe(device: torch.device) -> str:
    """The device in words, and whether torch could use a GPU but sees none."""
    blind = device.type == "cpu" and torch.version.cuda and not torch.cuda.is_available()
    return f"{device} (this torch is built for CUDA but sees no GPU)" if blind else str(device)


def use_threads(wanted: int, say: Callable[[str], None]) -> None:
    """The number of torch's threads, at most one per core that the process may use; 0: torch's."""
    free = getattr(os, "sched_getaffinity", None)
    cores = len(free(0)) if free else os.cpu_count() or 1
    if wanted > cores:
        say(f"threads    {cores}, one per core, in place of --threads {wanted}")
    if wanted:
        torch.set_num_threads(min(wanted, cores))


def choose_amp(config: Config, device: torch.device, network=Network) -> Config:
    """Settle --amp for the device. Raises UserError for what would train on garbage."""
    amp = config.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "none"
    if amp == "bf16" and device.type == "cpu" and min(config.patch) < network.bf16_least:
        why = f"torch computes wrong gradients for sides below {network.bf16_least}"
        given = f"--amp bf16 with --patch {config.patch} on the CPU"
        raise UserError(f"{given}: {why}. Use --amp none.")
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU. Use --amp none on the CPU.")
    return replace(config, amp=amp)


def autocast(device: torch.device, amp: str):
    """Mixed precision for the forward pass: amp "none", "bf16" or "fp16"."""
    if amp == "none":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16)


def place_among_ranks() -> tuple[int, int]:
    """How many processes torchrun started, and which this one is. Raises UserError."""
    found = {name: os.environ.get(name, default) for name, default in ALONE.items()}
    told = " ".join(f"{name}={value}" for name, value in found.items())
    with suppress(ValueError):
        world, rank = int(found["WORLD_SIZE"]), int(found["RANK"])
        if 0 <= rank < world and (world == 1 or found["MASTER_ADDR"] and int(found["MASTER_PORT"])):
            return world, rank
    raise UserError(f"{told} is not what torchrun sets. Unset these variables, or start with it.")


class Ranks:
    """The processes that torchrun started; alone, rank 0 of 1."""

    def __init__(self, device: torch.device):
        self.world, self.rank = place_among_ranks()
        self.main = self.rank == 0
        self.say = print if self.main else lambda text: None
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

    def parallel(self, model: Network, device: torch.device, compiled: bool) -> nn.Module:
        """The network as the loop calls it: data-parallel under torchrun, compiled if asked."""
        net: nn.Module = model
        if self.world > 1:
            # buffers are averaged before validation instead (average_buffers)
            on = {"device_ids": [device.index]} if device.type == "cuda" else {}
            how = {"broadcast_buffers": False, "find_unused_parameters": model.alternates}
            net = nn.parallel.DistributedDataParallel(net, **on, **how)
        if compiled:
            # losses.gradient_norms walks the graph before backward() does
            torch._functorch.config.donated_buffer = False
            net = torch.compile(net)
        return net
