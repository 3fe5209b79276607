"""Mirror U-Net (Sec. 3): two residual 3D U-Nets, one per modality, joined at the shared layers L.

Tensors are (B, C, W, H, D): batch, channels, voxel axes in array order. A branch is the list of
layers 1-8 of Fig. 3 and its own output layer:

    index  1      2       3       4        5         6            7        8       output
    layer  down   down    down    down     bottom    up           up       up      up
    width  1->16  16->32  32->64  64->128  128->256  128+256->64  128->32  64->16  32->task

Every up layer doubles the size and starts from the concatenation of the encoder's map of that
size and what came up. Sides of a patch must divide by 16.
"""

import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

CHANNELS = (16, 32, 64, 128, 256)
STRIDE = 16  # four layers of stride 2
UNIONS = {"whole": ("edema", "core")}  # classes that are made of others (Sec. 3.3)


@dataclass(frozen=True)
class Task:
    """What one decoder learns: classes of a label map or, without any, an image to restore.

    target: its name in a batch, "ct" and "pet" the images, "mask" and "organs" the label maps.
    classes: of its softmax, the background left out; a name of UNIONS stands for all of its parts.
    title: what tables and pictures call its output.
    """

    target: str
    classes: tuple[str, ...] = ()
    title: str = "reconstruction"

    @property
    def channels(self) -> int:
        return 1 + len(self.classes)


CT, PET = Task("ct"), Task("pet")
LESION = Task("mask", ("lesion",), "p(lesion)")
EDEMA = Task("mask", ("edema",), "p(edema)")
CORE = Task("mask", ("core",), "p(core)")
WHOLE = Task("mask", ("whole",), "p(whole)")
ORGANS = Task("organs", ("organ",), "organs")  # as many classes as the maps have: variant_of
EDEMA_CORE = Task("mask", ("edema", "core"), "p(whole)")  # one softmax, drawn as 1 - p(background)


@dataclass(frozen=True)
class Variant:
    """Which task sits where (Fig. 2). For MRI the CT slot holds FLAIR, the PET slot T1Gd.

    Branches with a task on the label map "mask" make the final mask: one alone is it, two of the
    same classes are summed with θ (Eq. 4), two of different classes decide each for itself.
    """

    ct: Task | None = None  # of the CT branch
    pet: Task | None = None  # of the PET branch
    btl: Task | None = None  # of the bottleneck decoder
    tumor: bool = False  # classifier T on the bottleneck
    phi: str | None = None  # Φ(x_C) replaces the input of the CT branch in training: the usual one
    join: str | None = None  # of two networks' masks (late fusion): logits, union, intersection

    @property
    def tasks(self) -> dict[str, Task]:
        """The decoders by the name of their output."""
        return {s: t for s in ("ct", "pet", "btl") if (t := getattr(self, s))}

    @property
    def mask(self) -> dict[str, Task]:
        """The branches that make the final mask."""
        return {s: t for s, t in self.tasks.items() if s != "btl" and t.target == "mask"}

    @property
    def fused(self) -> bool:
        """Both branches segment the same thing."""
        return len(self.mask) == 2 and self.ct == self.pet

    @property
    def exclusive(self) -> bool:
        """The classes of the mask come from one softmax; else each from its own branch."""
        return self.fused or len(self.mask) == 1

    @property
    def organs(self) -> str | None:
        """The branch that segments organs."""
        return next((s for s, t in self.tasks.items() if t.target == "organs"), None)

    @property
    def restores(self) -> bool:
        """Some decoder reconstructs an image."""
        return any(not task.classes for task in self.tasks.values())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes of the mask, in the order of their labels 1, 2, ..."""
        return tuple(dict.fromkeys(c for task in self.mask.values() for c in task.classes))


VARIANTS = {
    "petct": {  # Sec. 3.1, Eq. 1-4
        "v1": Variant(ct=CT, pet=LESION, phi="shuffle"),
        "v2": Variant(ct=CT, pet=LESION, btl=PET, phi="shuffle"),
        "v3": Variant(ct=CT, pet=LESION, btl=PET, tumor=True, phi="shuffle"),
        "v4": Variant(ct=LESION, pet=LESION),
        "v5": Variant(ct=ORGANS, pet=LESION, btl=PET, tumor=True, phi="none"),  # not the paper's
    },
    "mri": {  # Sec. 3.3, Fig. 2 of the supplement
        "v1": Variant(ct=EDEMA, pet=CORE),
        "v2": Variant(ct=EDEMA, pet=CORE, btl=WHOLE),
        "v2-rec": Variant(ct=CT, pet=EDEMA_CORE, btl=PET, phi="shuffle"),
    },
}
MASKS = {"petct": LESION, "mri": EDEMA_CORE}  # the mask from one softmax (baselines.py)
DATA_NAMES = {"petct": "PET/CT", "mri": "brain tumour MRI"}
IMAGE_NAMES = {"petct": ("CT", "PET"), "mri": ("FLAIR", "T1Gd")}  # in the CT and the PET slot


def variant_of(kind: str, version: str, organs: tuple[str, ...] = ()) -> Variant:
    """The row of VARIANTS; organs: the names of those that the data have, in place of its own.
    Raises ValueError with the versions that this kind of data has."""
    if version in (rows := VARIANTS.get(kind, {})):
        row = rows[version]
        named = {row.organs: replace(ORGANS, classes=organs)} if row.organs and organs else {}
        return replace(row, **named)
    known = f"{DATA_NAMES.get(kind, kind)}: choose from {', '.join(rows or VARIANTS)}"
    raise ValueError(f"{version} is not defined for {known}")


class Output(NamedTuple):
    """What a network returns; what it lacks, or was not asked for, is None.

    seg: logits of the final mask. PET/CT (B, 2, W, H, D): background, lesion. MRI (B, 3, W, H, D):
        background, edema, core; in v1 and v2 these are 0 and each branch's foreground minus
        background, so that a class is present where its logit is above 0.
    ct, pet, btl: what the decoders put out, by their Task: logits (B, 1 + classes, W, H, D), or an
        image (B, 1, W, H, D) in the units of the inputs.
    tumor: logit (B,) of T. extra: what only the loss of one system in baselines.py reads.
    """

    seg: Tensor | None = None
    ct: Tensor | None = None
    pet: Tensor | None = None
    btl: Tensor | None = None
    tumor: Tensor | None = None
    extra: dict | None = None


class Network(nn.Module):
    """What training and evaluation ask of MirrorUNet and of the systems in baselines.py."""

    variant: Variant
    heads: tuple[str, ...]  # the fields of Output that it fills
    stride = STRIDE  # the sides of a patch divide by this
    least = STRIDE  # and are no smaller than this
    # torch 2.13 leaves the weight gradient of a bf16 conv3d over 2x2x2 maps unset on the CPU
    bf16_least = 3 * STRIDE
    alternates = False  # a training step runs a part of the weights only
    branches: tuple[str, ...] = ()  # outputs that are evaluated beside the mask

    def __init__(self):
        super().__init__()
        self.register_parameter("theta", None)  # MirrorUNet has one

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that the lists of layers `ct` and `pet` both hold, each once (Sec. 3.2)."""
        ct, pet = (getattr(self, branch, None) for branch in ("ct", "pet"))
        known = {id(p) for p in ct.parameters()} if ct else {}
        return [p for p in pet.parameters() if id(p) in known] if pet else []

    def step_options(self, number: int) -> dict:
        """What a training step passes to forward; number: random, the same on all devices."""
        return {}

    def wanted(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None) -> set[str]:
        """The fields of Output to compute: `heads`, or all.

        Raises ValueError for patches that do not fit, or heads that the network lacks.
        """
        sides = ct.shape[2:]
        fits = ct.dim() == 5 and ct.shape[1] == 1 and not any(n % self.stride for n in sides)
        if ct.shape != pet.shape or not fits or min(sides) < self.least:
            least = f" and are at least {self.least}" if self.least > self.stride else ""
            raise ValueError(
                f"CT {tuple(ct.shape)} and PET {tuple(pet.shape)}: give both the same shape, "
                f"(B, 1, W, H, D) with sides that divide by {self.stride}{least}"
            )
        want = set(self.heads if heads is None else heads)
        if absent := want - set(self.heads):
            raise ValueError(f"heads {sorted(absent)}: this version has {', '.join(self.heads)}")
        return want


class ConvNormAct(nn.Sequential):
    """3D convolution, batch norm, PReLU. `up` makes it a transposed one of stride 2."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, up: bool = False):
        if up:
            conv = nn.ConvTranspose3d(cin, cout, kernel, 2, kernel // 2, output_padding=1)
        else:
            conv = nn.Conv3d(cin, cout, kernel, stride, kernel // 2)
        super().__init__(conv, nn.BatchNorm3d(cout), nn.PReLU())


class Down(nn.Module):
    """Two convolutions beside a shortcut; layers 1-4 (stride 2) and the bottom, 5 (stride 1)."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.convs = nn.Sequential(ConvNormAct(cin, cout, stride=stride), ConvNormAct(cout, cout))
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
    down = [Down(1, c1, 2), Down(c1, c2, 2), Down(c2, c3, 2), Down(c3, c4, 2), Down(c4, c5, 1)]
    return [*down, Up(c4 + c5, c3), Up(2 * c3, c2), Up(2 * c2, c1)]


def share(layer: nn.Module, private_norm: bool) -> nn.Module:
    """The module that the CT branch holds for a shared layer: the PET branch's own.

    With `private_norm` the convolutions and PReLUs are the same objects, the batch norms copies.
    """
    if not private_norm:
        return layer
    leaves = [m for m in layer.modules() if not list(m.children())]
    kept = {id(m): m for m in leaves if not isinstance(m, nn.BatchNorm3d)}
    return copy.deepcopy(layer, memo=kept)


class BottleneckDecoder(nn.Sequential):
    """D_BTL of Eq. 2: both bottoms, concatenated, up to the full size without skips."""

    def __init__(self, out_channels: int, channels: tuple[int, ...] = CHANNELS):
        c1, c2, c3, _, c5 = channels
        super().__init__(Up(2 * c5, c3), Up(c3, c2), Up(c2, c1), Up(c1, out_channels))


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


class MirrorUNet(Network):
    """Mirror U-Net for one row of VARIANTS.

    version, kind: the row. shared: L, any subset of 1..8, also empty.
    theta: weight of the CT branch in Eq. 4, a number in [0, 1] or "learn" (from 0.5; v4 only).
    bottleneck: "own" decodes each branch from its own bottom (Eq. 1 and the released code: the
        mask of v1-v3 does not see CT at inference); "joint" starts each decoder from both bottoms
        through a 1^3 convolution (Fig. 1); "mean" gives both branches the mean of their outputs
        at every layer in L, without new weights.
    norm: "shared" or "private" batch norms inside the shared layers.
    classifier: T sees "both" bottoms (Eq. 3) or only "pet" (the released code).
    channels: widths of layers 1-5. organs: names of those that v5 learns.
    Raises ValueError for a kind, version or layer that there is not.
    """

    def __init__(
        self,
        version: str = "v2",
        shared: tuple[int, ...] = (5,),
        kind: str = "petct",
        theta: float | str = 0.2,
        bottleneck: str = "own",
        norm: str = "shared",
        classifier: str = "both",
        channels: tuple[int, ...] = CHANNELS,
        organs: tuple[str, ...] = (),
    ):
        super().__init__()
        if not set(shared) <= set(range(1, 9)):
            raise ValueError(f"shared layers {sorted(shared)}: L is a subset of 1..8 (Sec. 3.2)")
        self.variant = variant_of(kind, version, organs)
        self.heads = ("seg", *self.variant.tasks, *(("tumor",) if self.variant.tumor else ()))
        self.classifier_sees_ct = classifier == "both"

        pet = unet_layers(channels)
        ct = [  # a shared layer is one module held by both lists (Sec. 3.2)
            share(pet[i - 1], norm == "private") if i in shared else layer
            for i, layer in enumerate(unet_layers(channels), start=1)
        ]
        top, bottom = 2 * channels[0], channels[-1]
        self.pet = nn.ModuleList([*pet, Up(top, self.variant.pet.channels, bare=True)])
        self.ct = nn.ModuleList([*ct, Up(top, self.variant.ct.channels, bare=True)])
        self.meet = frozenset(shared if bottleneck == "mean" else ())
        self.joint = nn.ModuleDict()
        if bottleneck == "joint":
            self.joint.update({b: nn.Conv3d(2 * bottom, bottom, 1) for b in ("ct", "pet")})
        btl = self.variant.btl
        self.btl_decoder = BottleneckDecoder(btl.channels, channels) if btl else None
        seen = 2 * bottom if self.classifier_sees_ct else bottom
        self.classifier = Classifier(seen) if self.variant.tumor else None
        # Registered in every version, as in the released code, so that parameter counts agree.
        learned = theta == "learn"
        start = torch.tensor(0.5 if learned else float(theta))
        self.theta = nn.Parameter(start, requires_grad=learned and self.variant.fused)

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        """Run the network on ct and pet, each (B, 1, W, H, D); FLAIR and T1Gd for MRI.

        heads: the fields of Output to compute, all by default; what they do not need is not run.
        Raises ValueError as `wanted` does.
        """
        want = self.wanted(ct, pet, heads)
        decoded = {"ct", "pet"} & (want | ({*self.variant.mask} if "seg" in want else set()))
        if decoded and self.meet & {6, 7, 8}:
            decoded = {"ct", "pet"}
        join = "btl" in want or ("tumor" in want and self.classifier_sees_ct) or len(self.joint)
        encoded = decoded | ({"pet"} if "tumor" in want else set())
        if join or self.meet & {1, 2, 3, 4, 5}:
            encoded = {"ct", "pet"}

        branches, images = {"ct": self.ct, "pet": self.pet}, {"ct": ct, "pet": pet}
        maps = encode(branches, {b: x for b, x in images.items() if b in encoded}, self.meet)
        both = torch.cat([*maps[-1].values()], dim=1) if join else None  # ⊕, (B, 512, ...)
        starts = {b: self.start(b, x, both) for b, x in maps[-1].items() if b in decoded}
        out = decode(branches, maps, starts, self.meet)
        if "seg" in want:
            out["seg"] = self.final(*(out[branch] for branch in self.variant.mask))
        if "btl" in want:
            out["btl"] = self.btl_decoder(both)
        if "tumor" in want:
            out["tumor"] = self.classifier(both if self.classifier_sees_ct else maps[-1]["pet"])
        return Output(**out)

    def start(self, branch: str, bottom: Tensor, both: Tensor | None) -> Tensor:
        """Where a branch's decoder starts: its own bottom, or both bottoms if joint."""
        return self.joint[branch](both) if branch in self.joint else bottom

    def final(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """The logits `seg` from those of the branches in Variant.mask, CT before PET."""
        if second is None:
            return first
        if self.variant.fused:  # before the softmax, Eq. 4
            return (1 - self.theta) * second + self.theta * first
        found = torch.cat([margins(first), margins(second)], dim=1)
        return torch.cat([torch.zeros_like(found[:, :1]), found], dim=1)


def advance(branches, number: int, x: dict[str, Tensor], meet=()) -> dict[str, Tensor]:
    """One layer of every branch in x; where features meet, the mean of their outputs for each."""
    x = {name: branches[name][number - 1](value) for name, value in x.items()}
    return dict.fromkeys(x, sum(x.values()) / len(x)) if x and number in meet else x


def encode(branches, x: dict[str, Tensor], meet=()) -> list[dict[str, Tensor]]:
    """Outputs of layers 1-5 by branch; the last ones are the bottoms (B, 256, W/16, H/16, D/16).

    branches: lists of layers by name. x: the images of those to run. meet: the layers, 1..8, at
    which features meet.
    """
    maps = []
    for number in range(1, 6):
        x = advance(branches, number, x, meet)
        maps.append(x)
    return maps


def decode(branches, maps: list[dict], x: dict[str, Tensor], meet=()) -> dict[str, Tensor]:
    """Layers 6-8 and the output layer from the bottoms x, with the encoders' maps as skips."""
    for number, skips in zip((6, 7, 8, 9), reversed(maps[:4]), strict=True):
        joined = {name: torch.cat([skips[name], value], dim=1) for name, value in x.items()}
        x = advance(branches, number, joined, meet)
    return x


def margins(seg: Tensor) -> Tensor:
    """Foreground logits minus the background's: (B, 1 + K, ...) -> (B, K, ...), linear in seg."""
    return seg[:, 1:] - seg[:, :1]


def decide(margin, variant: Variant):
    """Which classes are present: booleans (K, W, H, D) from margins (K, W, H, D), NumPy or torch.

    K runs over variant.classes. After one softmax the larger logit wins; where edema and core sit
    on branches of their own (MRI v1, v2), each is decided there and both may be present. For late
    fusion the margins of two networks, (2K, W, H, D), are averaged, or their masks joined.
    """
    if variant.join:
        half, alone = len(margin) // 2, replace(variant, join=None)
        one, other = margin[:half], margin[half:]
        if variant.join == "logits":
            return decide((one + other) / 2, alone)
        one, other = decide(one, alone), decide(other, alone)
        return one | other if variant.join == "union" else one & other
    present = margin > 0
    if variant.exclusive and len(margin) > 1:
        winner = margin.argmax(0)
        for k in range(len(margin)):
            present[k] &= winner == k
    return present


def count_parameters(model: nn.Module) -> int:
    """Parameters, a shared one counted once; the joint 1^3 convolutions are left out."""
    joint = sum(p.numel() for n, p in model.named_parameters() if n.startswith("joint."))
    return sum(p.numel() for p in model.parameters()) - joint
