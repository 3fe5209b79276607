"""Mirror U-Net (Sec. 3): two residual 3D U-Nets, one per modality, joined at the shared layers L.

Tensors are (B, C, W, H, D): batch, channels, voxel axes in array order. "ct" and "pet" name a slot:
its image, its branch, its task and its output. For brain tumour MRI the CT slot holds FLAIR, the
PET slot T1Gd.

A branch is the list of layers 1-8 of Fig. 3 and an output layer of its own, here with number 9.
Layers 1-4 halve the size, layers 6-9 double it. The arrows are skips, which carry a map of the
encoder to the decoder, where it is concatenated with what comes from below:

    layer 1: 1 -> 16    ------------------------------> layer 9: 16+16 -> task
      layer 2: 16 -> 32    -----------------------> layer 8: 32+32 -> 16
        layer 3: 32 -> 64    ----------------> layer 7: 64+64 -> 32
          layer 4: 64 -> 128    --------> layer 6: 128+256 -> 64
                  layer 5, the bottom: 128 -> 256

The sides of a patch must be multiples of 16.
"""

import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

CHANNELS = (16, 32, 64, 128, 256)
STRIDE = 16  # four layers of stride 2
DEFAULT_THETA = 0.2  # weight of the CT branch in Eq. 4
BOTTLENECKS = ("own", "joint", "gate")
NORMS = ("shared", "private")
CLASSIFIERS = ("both", "pet")
UNIONS = {"whole": ("edema", "core")}  # a class that is others together (Sec. 3.3)


@dataclass(frozen=True)
class Task:
    """What one decoder learns: to segment classes or, if there are none, to reconstruct an image.

    target: its name in a batch. "ct" and "pet" are images, "mask" and "organs" label maps.
    classes: classes of its softmax, without the background; "whole" is edema and core together.
    title: what pictures call its output.
    """

    target: str
    classes: tuple[str, ...] = ()
    title: str = "reconstruction"

    @property
    def channels(self) -> int:
        return 1 + len(self.classes)


CT = Task("ct")
PET = Task("pet")
LESION = Task("mask", ("lesion",), "p(lesion)")
EDEMA = Task("mask", ("edema",), "p(edema)")
CORE = Task("mask", ("core",), "p(core)")
WHOLE = Task("mask", ("whole",), "p(whole)")
EDEMA_CORE = Task("mask", ("edema", "core"), "p(whole)")  # one softmax, drawn as 1 - p(background)
ORGANS = Task("organs", ("organ",), "organs")  # find_variant puts in the classes of the organ maps


@dataclass(frozen=True)
class Variant:
    """Which task sits where (Fig. 2).

    The branches whose target is "mask" make the final mask. A single one is the mask; two with
    the same classes are summed with θ (Eq. 4); two with different classes decide independently.
    """

    ct: Task | None = None  # task of the CT branch
    pet: Task | None = None  # task of the PET branch
    btl: Task | None = None  # task of the bottleneck decoder
    tumor: bool = False  # whether the classifier T sits on the bottleneck
    phi: str = "none"  # the default of --phi: Φ of Φ(x_C), which the CT branch sees in training

    @property
    def tasks(self) -> dict[str, Task]:
        """The task of each decoder, by the name of the decoder's output."""
        slots = {"ct": self.ct, "pet": self.pet, "btl": self.btl}
        return {name: task for name, task in slots.items() if task}

    @property
    def mask_tasks(self) -> dict[str, Task]:
        """The tasks of the branches that make the final mask, CT before PET."""
        mask_tasks = {}
        for name, task in self.tasks.items():
            if name != "btl" and task.target == "mask":
                mask_tasks[name] = task
        return mask_tasks

    @property
    def takes_phi(self) -> bool:
        """Whether Φ applies: the CT branch reconstructs CT, or segments organs (default: no Φ)."""
        return self.ct is not None and self.ct.target != "mask"

    @property
    def fused(self) -> bool:
        """Whether both branches segment the same classes, and θ sums their logits (Eq. 4)."""
        return len(self.mask_tasks) == 2 and self.ct == self.pet

    @property
    def one_softmax(self) -> bool:
        """Whether one softmax decides all classes of the mask, not one softmax per branch."""
        return self.fused or len(self.mask_tasks) == 1

    @property
    def organ_branch(self) -> str | None:
        """The name of the branch that segments organs, None if there is none."""
        for name, task in self.tasks.items():
            if task.target == "organs":
                return name
        return None

    @property
    def reconstructs(self) -> bool:
        """Whether some decoder reconstructs an image."""
        return any(not task.classes for task in self.tasks.values())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes of the mask, in the order of their labels 1, 2, ..."""
        names = []
        for task in self.mask_tasks.values():
            names.extend(task.classes)
        return tuple(dict.fromkeys(names))


VARIANTS = {
    "petct": {  # Sec. 3.1, Eq. 1-4
        "v1": Variant(ct=CT, pet=LESION, phi="shuffle"),
        "v2": Variant(ct=CT, pet=LESION, btl=PET, phi="shuffle"),
        "v3": Variant(ct=CT, pet=LESION, btl=PET, tumor=True, phi="shuffle"),
        "v4": Variant(ct=LESION, pet=LESION),
        "v5": Variant(ct=ORGANS, pet=LESION, btl=PET, tumor=True),  # not the paper's
    },
    "mri": {  # Sec. 3.3, Fig. 2 of the supplement; ct and CT are FLAIR, pet and PET are T1Gd
        "v1": Variant(ct=EDEMA, pet=CORE),
        "v2": Variant(ct=EDEMA, pet=CORE, btl=WHOLE),
        "v2-rec": Variant(ct=CT, pet=EDEMA_CORE, btl=PET, phi="shuffle"),
    },
}
MASK_TASK = {"petct": LESION, "mri": EDEMA_CORE}  # of a compared system, with one softmax
DATA_NAMES = {"petct": "PET/CT", "mri": "brain tumour MRI"}
IMAGE_NAMES = {"petct": ("CT", "PET"), "mri": ("FLAIR", "T1Gd")}  # in the CT and the PET slot


def find_variant(kind: str, version: str, organs: tuple[str, ...] = ()) -> Variant:
    """The row of VARIANTS for a kind of data and a version.

    organs: names of the organs in the data's maps; they become the classes of an organ branch.
    Raises ValueError with the versions that this kind of data has.
    """
    variants = VARIANTS.get(kind, {})
    if version not in variants:
        choices = ", ".join(variants or VARIANTS)
        data_name = DATA_NAMES.get(kind, kind)
        raise ValueError(f"{version} is not defined for {data_name}: choose from {choices}")

    variant = variants[version]
    if organs and variant.organ_branch:
        task = replace(ORGANS, classes=organs)
        variant = replace(variant, **{variant.organ_branch: task})
    return variant


class Output(NamedTuple):
    """What a network returns. A field that it lacks, or did not compute, is None.

    A branch that was decoded for the mask is filled in even if only `seg` was asked for.

    seg: logits of the final mask. PET/CT (B, 2, W, H, D): background, lesion. MRI (B, 3, W, H, D):
        background, edema, core; in v1 and v2 these are 0 and each branch's foreground minus
        background, so that a class is present where its logit is above 0.
    ct, pet, btl: outputs of the decoders, by their Task: logits (B, 1 + classes, W, H, D), or an
        image (B, 1, W, H, D) in the units of the inputs.
    tumor: logit (B,) of T. extra: what only the loss of one system in baselines.py reads.
    """

    seg: Tensor | None = None
    ct: Tensor | None = None
    pet: Tensor | None = None
    btl: Tensor | None = None
    tumor: Tensor | None = None
    extra: dict | None = None


Heads = tuple[str, ...] | None  # the fields of Output to compute; None: all that there are


class Network(nn.Module):
    """What training and evaluation ask of MirrorUNet and of the systems in baselines.py."""

    variant: Variant
    heads: tuple[str, ...]  # the fields of Output that it fills
    stride = STRIDE  # the sides of a patch are multiples of it
    min_side = STRIDE  # the smallest side of a patch
    # On the CPU torch 2.13 leaves the weight gradient of a bf16 conv3d over 2x2x2 maps unset, so
    # there the bottom must be 3x3x3.
    bf16_min_side = 3 * STRIDE
    one_branch_per_step = False  # a training step leaves one branch out (Valindria)
    scored_branches: tuple[str, ...] = ()  # outputs that are evaluated beside the mask

    def __init__(self):
        super().__init__()
        # Every network has these attributes.
        self.register_parameter("theta", None)
        self.gates = nn.ModuleDict()

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that the branches `ct` and `pet` both hold, each once (Sec. 3.2).

        Empty for a network that does not have these two branches.
        """
        if not hasattr(self, "ct") or not hasattr(self, "pet"):
            return []
        held_by_ct = {id(p) for p in self.ct.parameters()}
        return [p for p in self.pet.parameters() if id(p) in held_by_ct]

    def step_options(self, number: int) -> dict:
        """Further arguments of forward in a training step.

        number: a random integer to draw from; the same on all devices.
        """
        return {}

    def decide(self, foreground):
        """Which classes of this network's mask are present; see the function decide()."""
        return decide(foreground, self.variant)

    def check_inputs(self, ct: Tensor, pet: Tensor, heads: Heads) -> None:
        """Raises ValueError for patches that do not fit, or heads that the network lacks."""
        sides = ct.shape[2:]
        fits = (
            ct.shape == pet.shape
            and ct.dim() == 5
            and ct.shape[1] == 1
            and min(sides) >= self.min_side
            and not any(side % self.stride for side in sides)
        )
        if not fits:
            raise ValueError(
                f"CT {tuple(ct.shape)} and PET {tuple(pet.shape)}: give both the same shape, "
                f"(B, 1, W, H, D) with sides that divide by {self.stride} and are at least "
                f"{self.min_side}"
            )

        absent = set(heads or ()) - set(self.heads)
        if absent:
            raise ValueError(f"heads {sorted(absent)}: this version has {', '.join(self.heads)}")


# ------------------------------------------------------------------ layers


class ConvNormAct(nn.Sequential):
    """3D convolution, batch norm, PReLU. `up` makes it a transposed one of stride 2."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, up: bool = False):
        padding = kernel // 2
        if up:
            conv = nn.ConvTranspose3d(cin, cout, kernel, 2, padding, output_padding=1)
        else:
            conv = nn.Conv3d(cin, cout, kernel, stride, padding)
        super().__init__(conv, nn.BatchNorm3d(cout), nn.PReLU())


class Down(nn.Module):
    """Two convolutions beside a shortcut; layers 1-4 (stride 2) and the bottom, 5 (stride 1)."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.convs = nn.Sequential(
            ConvNormAct(cin, cout, stride=stride),
            ConvNormAct(cout, cout),
        )
        kernel = 3 if stride > 1 else 1
        self.shortcut = nn.Conv3d(cin, cout, kernel, stride, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:  # (B, cin, W, H, D) -> (B, cout, W/s, H/s, D/s)
        return self.convs(x) + self.shortcut(x)


class Up(nn.Module):
    """Transposed convolution to twice the size, then one convolution beside the identity.

    `bare` (the output layer) leaves norm and activation out of that last convolution.
    """

    def __init__(self, cin: int, cout: int, bare: bool = False):
        super().__init__()
        self.up = ConvNormAct(cin, cout, up=True)
        self.conv = nn.Conv3d(cout, cout, 3, padding=1) if bare else ConvNormAct(cout, cout)

    def forward(self, x: Tensor) -> Tensor:  # (B, cin, W, H, D) -> (B, cout, 2W, 2H, 2D)
        x = self.up(x)
        return self.conv(x) + x


def unet_layers(channels: tuple[int, ...] = CHANNELS) -> list[nn.Module]:
    """Layers 1-8 of one branch; the output layer depends on the branch's task."""
    c1, c2, c3, c4, c5 = channels
    return [
        Down(1, c1, stride=2),
        Down(c1, c2, stride=2),
        Down(c2, c3, stride=2),
        Down(c3, c4, stride=2),
        Down(c4, c5, stride=1),
        Up(c4 + c5, c3),
        Up(c3 + c3, c2),
        Up(c2 + c2, c1),
    ]


def output_layer(channels: tuple[int, ...], task: Task) -> Up:
    """Layer 9 of one branch, to the full size and as many channels as its task has."""
    return Up(2 * channels[0], task.channels, bare=True)


def share(layer: nn.Module, private_norm: bool) -> nn.Module:
    """The module that the CT branch holds for a shared layer: the PET branch's own.

    With `private_norm` the convolutions and PReLUs are the same objects, the batch norms copies.
    """
    if not private_norm:
        return layer
    shared_types = (nn.Conv3d, nn.ConvTranspose3d, nn.PReLU)
    shared = {id(m): m for m in layer.modules() if isinstance(m, shared_types)}
    return copy.deepcopy(layer, memo=shared)  # what memo holds counts as copied already


class BottleneckDecoder(nn.Sequential):
    """D_BTL of Eq. 2: both bottoms, concatenated, up to the full size without skips."""

    def __init__(self, out_channels: int, channels: tuple[int, ...] = CHANNELS):
        c1, c2, c3, _, c5 = channels
        super().__init__(
            Up(c5 + c5, c3),
            Up(c3, c2),
            Up(c2, c1),
            Up(c1, out_channels),  # with norm and PReLU (not bare), as in the released code
        )


class Classifier(nn.Sequential):
    """T of Eq. 3: (B, cin, w, h, d) -> logit (B,).

    Pooling to 6^3 makes it independent of the patch; at 96^3 the bottom is 6^3 and it does nothing.
    """

    def __init__(self, cin: int, side: int = 6):
        super().__init__(
            ConvNormAct(cin, 1, kernel=1),
            nn.AdaptiveAvgPool3d(side),
            nn.Flatten(),
            nn.Linear(side**3, 256),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(256, 1),
            nn.Flatten(0),
        )


class Gate(nn.Module):
    """h + g ⊙ conv1(h'): what a branch's map h takes from the other branch's, at first nothing.

    conv1 is a 1^3 convolution; g holds a number per channel and starts at 0.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv3d(width, width, 1)
        self.g = nn.Parameter(torch.zeros(width))

    def forward(self, own: Tensor, other: Tensor) -> Tensor:  # all (B, width, W, H, D)
        return own + self.g.view(-1, 1, 1, 1) * self.conv(other)


# ------------------------------------------------------------------ the U

SKIPS = {6: 4, 7: 3, 8: 2, 9: 1}  # decoder layer: encoder layer whose map it is given too

Branches = dict[str, nn.ModuleList]  # layers 1-9 of each branch, by its name
ByBranch = dict[str, Tensor]  # one image or feature map of each branch, by its name
Gates = nn.ModuleDict  # by the branch whose map a Gate changes and the layer, as ct_5
NO_GATES = Gates()


def run_layer(branches: Branches, number: int, inputs: ByBranch, gates: Gates) -> ByBranch:
    """Layer `number` of every branch in `inputs`, each on its own input, then the gates."""
    outputs = {name: branches[name][number - 1](x) for name, x in inputs.items()}

    gated = dict(outputs)  # Each gate sees the maps from before both.
    for name, other in (("ct", "pet"), ("pet", "ct")):
        gate = f"{name}_{number}"
        if name in outputs and gate in gates:
            gated[name] = gates[gate](outputs[name], outputs[other])
    return gated


def encode(branches: Branches, images: ByBranch, gates: Gates = NO_GATES) -> dict[int, ByBranch]:
    """Layers 1-5 of every branch in `images`, in step: their outputs by the layer's number.

    The images are (B, 1, W, H, D), layer 5 puts out the bottoms (B, 256, W/16, H/16, D/16).
    """
    maps = {}
    outputs = images
    for number in (1, 2, 3, 4, 5):
        outputs = run_layer(branches, number, outputs, gates)
        maps[number] = outputs
    return maps


def decode(
    branches: Branches,
    bottoms: ByBranch,
    maps: dict[int, ByBranch],
    gates: Gates = NO_GATES,
) -> ByBranch:
    """Layers 6-9 of every branch in `bottoms`, in step: outputs (B, C, W, H, D).

    Each layer concatenates the encoder's map of its size to what comes from below, and doubles
    the size. bottoms: (B, 256, W/16, H/16, D/16) each. maps: by layer, as encode returns them.
    """
    outputs = bottoms
    for number, skip in SKIPS.items():
        inputs = {name: torch.cat([maps[skip][name], x], dim=1) for name, x in outputs.items()}
        outputs = run_layer(branches, number, inputs, gates)
    return outputs


# ------------------------------------------------------------------ the network


class MirrorUNet(Network):
    """Mirror U-Net for one row of VARIANTS.

    version, kind: the row. shared: L, any subset of 1..8, also empty.
    theta: weight of the CT branch in Eq. 4, a number in [0, 1] or "learn" (from 0.5; v4 only).
    bottleneck: "own" decodes each branch from its own bottom (Eq. 1 and the released code: the
        mask of v1-v3 does not see CT at inference); "joint" starts each decoder from both bottoms
        through a 1^3 convolution (Fig. 1); "gate" puts a Gate for each branch behind every layer
        of L, and is "own" until training opens one.
    norm: "shared" or "private" batch norms inside the shared layers.
    classifier: what T sees, "both" bottoms (Eq. 3) or only that of "pet" (the released code).
    channels: widths of layers 1-5. organs: names of the organs that v5 learns.
    Raises ValueError for a kind, version, layer or choice that does not exist.
    """

    def __init__(
        self,
        version: str = "v2",
        shared: tuple[int, ...] = (5,),
        kind: str = "petct",
        theta: float | str = DEFAULT_THETA,
        bottleneck: str = "own",
        norm: str = "shared",
        classifier: str = "both",
        channels: tuple[int, ...] = CHANNELS,
        organs: tuple[str, ...] = (),
    ):
        super().__init__()
        if not set(shared) <= set(range(1, 9)):
            raise ValueError(f"shared layers {sorted(shared)}: L is a subset of 1..8 (Sec. 3.2)")
        check_choice("bottleneck", bottleneck, BOTTLENECKS)
        check_choice("norm", norm, NORMS)
        check_choice("classifier", classifier, CLASSIFIERS)

        self.variant = find_variant(kind, version, organs)
        self.mask_branches = tuple(self.variant.mask_tasks)
        self.heads = ("seg", *self.variant.tasks)
        if self.variant.tumor:
            self.heads += ("tumor",)

        # The two branches. A shared layer is one module that both lists hold (Sec. 3.2).
        pet = unet_layers(channels)
        ct = unet_layers(channels)
        for number in shared:
            ct[number - 1] = share(pet[number - 1], private_norm=norm == "private")
        self.pet = nn.ModuleList([*pet, output_layer(channels, self.variant.pet)])
        self.ct = nn.ModuleList([*ct, output_layer(channels, self.variant.ct)])

        # What sits on the bottoms, each of `bottom` channels.
        bottom = channels[-1]
        self.joint = None
        if bottleneck == "joint":
            self.joint = nn.ModuleDict()
            for branch in ("ct", "pet"):
                self.joint[branch] = nn.Conv3d(2 * bottom, bottom, 1)
        self.btl_decoder = None
        if self.variant.btl:
            self.btl_decoder = BottleneckDecoder(self.variant.btl.channels, channels)
        self.classifier_sees_ct = classifier == "both"
        self.classifier = None
        if self.variant.tumor:
            self.classifier = Classifier(2 * bottom if self.classifier_sees_ct else bottom)

        # v4 alone uses θ. The others hold it frozen, so that they have as many parameters as the
        # released code.
        learned = theta == "learn"
        self.theta = nn.Parameter(
            torch.tensor(0.5 if learned else float(theta)),
            requires_grad=learned and self.variant.fused,
        )

        # The gates come last, so that all other weights draw the random numbers of "own".
        self.gated_decoder = bottleneck == "gate" and max(shared, default=0) > 5
        if bottleneck == "gate":
            self.add_gates(shared, channels)

    def add_gates(self, shared: tuple[int, ...], channels: tuple[int, ...]) -> None:
        """A gate behind every layer of L, in both branches."""
        widths = (*channels, *channels[2::-1])  # that layers 1-8 put out
        for number in sorted(shared):
            for branch in ("ct", "pet"):
                self.gates[f"{branch}_{number}"] = Gate(widths[number - 1])

    def forward(self, ct: Tensor, pet: Tensor, heads: Heads = None) -> Output:
        """Run the network on ct and pet, each (B, 1, W, H, D).

        heads: the fields of Output to compute, all by default; what they do not need is not run.
        Raises ValueError as check_inputs does.
        """
        self.check_inputs(ct, pet, heads)
        wanted = heads or self.heads
        to_encode, to_decode = self.branches_to_run(wanted)
        branches = {"ct": self.ct, "pet": self.pet}
        images = {"ct": ct, "pet": pet}

        # E_C and E_P
        maps = encode(branches, {name: images[name] for name in to_encode}, self.gates)
        bottoms = maps[5]  # (B, 256, W/16, H/16, D/16) each

        # E_C(x_C) ⊕ E_P(x_P), what D_BTL and T see (Eq. 2 and 3)
        both = None
        if len(bottoms) == 2:
            both = torch.cat([bottoms["ct"], bottoms["pet"]], dim=1)  # (B, 512, W/16, ...)

        # D_C and D_P, each from its own bottom or, with bottleneck "joint", from both
        inputs = {name: bottoms[name] for name in to_decode}
        if self.joint is not None:
            inputs = {name: self.joint[name](both) for name in to_decode}
        outputs = decode(branches, inputs, maps, self.gates)  # (B, the task's channels, W, H, D)

        # The final mask, D_BTL and T
        if "seg" in wanted:
            outputs["seg"] = self.final_mask(outputs)  # (B, 1 + classes, W, H, D)
        if "btl" in wanted:
            outputs["btl"] = self.btl_decoder(both)  # (B, channels of the task, W, H, D)
        if "tumor" in wanted:
            seen = both if self.classifier_sees_ct else bottoms["pet"]
            outputs["tumor"] = self.classifier(seen)  # (B,)
        return Output(**outputs)

    def branches_to_run(self, wanted: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """The branches that must be encoded for the wanted heads, and those decoded as well.

        With bottleneck "own" the mask of v1-v3 needs PET's branch alone. CT's is encoded only if
        its own output, D_BTL or a T that sees both bottoms is wanted too. Gates need the maps of
        both encoders and, behind layers 6-8, of both decoders.
        """
        to_decode = []
        for name in ("ct", "pet"):
            if name in wanted or ("seg" in wanted and name in self.mask_branches):
                to_decode.append(name)
        if to_decode and self.gated_decoder:
            to_decode = ["ct", "pet"]

        tumor_sees_ct = "tumor" in wanted and self.classifier_sees_ct
        branches_meet = self.joint is not None or len(self.gates) > 0
        needs_both = "btl" in wanted or tumor_sees_ct or branches_meet

        to_encode = []
        for name in ("ct", "pet"):
            seen_by_tumor = "tumor" in wanted and name == "pet"
            if name in to_decode or seen_by_tumor or needs_both:
                to_encode.append(name)
        return to_encode, to_decode

    def final_mask(self, logits: ByBranch) -> Tensor:
        """The field `seg` of Output from the logits (B, 1 + K, W, H, D) of the mask's branches."""
        if len(self.mask_branches) == 1:  # v1-v3: D_P is the mask
            return logits[self.mask_branches[0]]
        if self.variant.fused:  # before the softmax, Eq. 4
            return (1 - self.theta) * logits["pet"] + self.theta * logits["ct"]

        # MRI v1 and v2: each branch decides its own classes, against a background of logit 0.
        foregrounds = [foreground_logits(logits[branch]) for branch in self.mask_branches]
        background = torch.zeros_like(foregrounds[0][:, :1])
        return torch.cat([background, *foregrounds], dim=1)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r}: choose from {', '.join(choices)}")


def foreground_logits(seg: Tensor) -> Tensor:
    """Foreground logits minus the background's: (B, 1 + K, ...) -> (B, K, ...), linear in seg."""
    return seg[:, 1:] - seg[:, :1]


def decide(foreground, variant: Variant):
    """Which classes are present: booleans (K, W, H, D) from foreground_logits (K, W, H, D).

    NumPy or torch; K runs over variant.classes. After one softmax the largest logit wins. Where
    edema and core sit on branches of their own (MRI v1, v2), each is decided there and both may be
    present.
    """
    present = foreground > 0
    if variant.one_softmax and len(foreground) > 1:
        winner = foreground.argmax(0)
        for k in range(len(foreground)):
            present[k] &= winner == k
    return present


def count_parameters(model: nn.Module) -> int:
    """How many parameters the model has, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
