"""Mirror U-Net (Sec. 3): two residual 3D U-Nets, one per modality, joined at the shared layers L.

Tensors are (B, C, W, H, D): batch, channels, voxel axes in array order. A branch is the list of
layers 1-8 of Fig. 3 and its own output layer:

    index  1      2       3       4        5         6            7        8       output
    layer  down   down    down    down     bottom    up           up       up      up
    width  1->16  16->32  32->64  64->128  128->256  128+256->64  128->32  64->16  32->task

Every up layer doubles the size and starts from the concatenation of the encoder's map of that
size and what came up. Sides of a patch must divide by 16.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

CHANNELS = (16, 32, 64, 128, 256)
STRIDE = 16  # four layers of stride 2
TASK_CHANNELS = {"rec": 1, "lesion": 2, "edema": 2, "core": 2, "whole": 2, "edema+core": 3}


@dataclass(frozen=True)
class Variant:
    """Which task sits where (Fig. 2). For MRI the CT slot holds FLAIR, the PET slot T1Gd."""

    ct: str  # task of the CT branch, a key of TASK_CHANNELS
    pet: str  # task of the PET branch
    btl: str | None = None  # task of the bottleneck decoder; "rec" reconstructs the PET slot
    tumor: bool = False  # classifier T on the bottleneck
    phi: bool = False  # Φ(x_C) replaces the input of the CT branch in training

    @property
    def fused(self) -> bool:
        """Both branches segment the same thing: their logits are summed with θ (Eq. 4)."""
        return self.ct == self.pet

    @property
    def exclusive(self) -> bool:
        """The classes of `seg` come from one softmax; else each is decided on its own branch."""
        return self.fused or self.ct == "rec"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground channels of `seg`, in order."""
        return ("lesion",) if self.pet == "lesion" else ("edema", "core")


VARIANTS = {
    "petct": {  # Sec. 3.1, Eq. 1-4
        "v1": Variant(ct="rec", pet="lesion", phi=True),
        "v2": Variant(ct="rec", pet="lesion", btl="rec", phi=True),
        "v3": Variant(ct="rec", pet="lesion", btl="rec", tumor=True, phi=True),
        "v4": Variant(ct="lesion", pet="lesion"),
    },
    "mri": {  # Sec. 3.3, Fig. 2 of the supplement
        "v1": Variant(ct="edema", pet="core"),
        "v2": Variant(ct="edema", pet="core", btl="whole"),
        "v2-rec": Variant(ct="rec", pet="edema+core", btl="rec", phi=True),
    },
}
NOT_FOR_MRI = {
    "v3": "every patient there has a tumour, so there is nothing to classify, Sec. 3.3",
    "v4": "its branches segment two classes, so there are no logits to sum",
}
DATA_NAMES = {"petct": "PET/CT", "mri": "brain tumour MRI"}


def variant_of(kind: str, version: str) -> Variant:
    """The row of VARIANTS. Raises ValueError with the versions that this kind of data has."""
    if kind not in VARIANTS:
        raise ValueError(f"unknown kind of data {kind!r}: choose from {', '.join(VARIANTS)}")
    if version not in VARIANTS[kind]:
        why = f" ({NOT_FOR_MRI[version]})" if version in NOT_FOR_MRI and kind == "mri" else ""
        raise ValueError(
            f"{version} is not defined for {DATA_NAMES[kind]}{why}: "
            f"choose from {', '.join(VARIANTS[kind])}"
        )
    return VARIANTS[kind][version]


class Output(NamedTuple):
    """What `MirrorUNet.forward` returns; a task that the version lacks is None.

    seg: logits of the final mask. PET/CT (B, 2, W, H, D): background, lesion. MRI (B, 3, W, H, D):
        background, edema, core; in v1 and v2 these are 0 and each branch's foreground minus
        background, so that a class is present where its logit is above 0.
    ct_rec, pet_rec: reconstructions (B, 1, W, H, D), in the units of the inputs.
    tumor: logit (B,) of T. btl_seg: whole-tumour logits (B, 2, W, H, D) of the bottleneck decoder.
    ct_seg, pet_seg: logits of a branch that segments.
    extra: what only the loss of one compared system reads, by name (baselines.py).
    """

    seg: Tensor | None = None
    ct_rec: Tensor | None = None
    pet_rec: Tensor | None = None
    tumor: Tensor | None = None
    btl_seg: Tensor | None = None
    ct_seg: Tensor | None = None
    pet_seg: Tensor | None = None
    extra: dict | None = None


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


def unet_layers() -> list[nn.Module]:
    """Layers 1-8 of one branch; the output layer depends on the branch's task."""
    c1, c2, c3, c4, c5 = CHANNELS
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

    def __init__(self, out_channels: int):
        c1, c2, c3, _, c5 = CHANNELS
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


class MirrorUNet(nn.Module):
    """Mirror U-Net for one row of VARIANTS.

    version, kind: the row. shared: L, any subset of 1..8, also empty.
    theta: weight of the CT branch in Eq. 4, a number in [0, 1] or "learn" (from 0.5; v4 only).
    bottleneck: "own" decodes each branch from its own bottom (Eq. 1 and the released code: the
        mask of v1-v3 does not see CT at inference); "joint" starts each decoder from both bottoms
        through a 1^3 convolution (Fig. 1).
    norm: "shared" or "private" batch norms inside the shared layers.
    classifier: T sees "both" bottoms (Eq. 3) or only "pet" (the released code).
    Raises ValueError for a value outside these.
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
    ):
        super().__init__()
        for name, value, allowed in (
            ("bottleneck", bottleneck, ("own", "joint")),
            ("norm", norm, ("shared", "private")),
            ("classifier", classifier, ("both", "pet")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}: choose from {', '.join(allowed)}")
        shared = (shared,) if isinstance(shared, int) else tuple(shared)
        if not set(shared) <= set(range(1, 9)):
            raise ValueError(f"shared layers {sorted(shared)}: L is a subset of 1..8 (Sec. 3.2)")
        try:
            start = 0.5 if theta == "learn" else float(theta)
        except (TypeError, ValueError):
            start = math.nan
        if not 0 <= start <= 1:
            raise ValueError(f"theta {theta}: a number in [0, 1] or 'learn' (Eq. 4)")
        self.variant = variant_of(kind, version)
        self.classifier_sees_ct = classifier == "both"

        ct_task, pet_task = TASK_CHANNELS[self.variant.ct], TASK_CHANNELS[self.variant.pet]
        pet = unet_layers()
        ct = [  # a shared layer is one module held by both lists (Sec. 3.2)
            share(pet[i - 1], norm == "private") if i in shared else layer
            for i, layer in enumerate(unet_layers(), start=1)
        ]
        self.pet = nn.ModuleList([*pet, Up(2 * CHANNELS[0], pet_task, bare=True)])
        self.ct = nn.ModuleList([*ct, Up(2 * CHANNELS[0], ct_task, bare=True)])
        both = 2 * CHANNELS[-1]
        self.joint = nn.ModuleDict()
        if bottleneck == "joint":
            self.joint.update({m: nn.Conv3d(both, CHANNELS[-1], 1) for m in ("ct", "pet")})
        btl = self.variant.btl
        self.btl_decoder = BottleneckDecoder(TASK_CHANNELS[btl]) if btl else None
        seen = both if self.classifier_sees_ct else CHANNELS[-1]
        self.classifier = Classifier(seen) if self.variant.tumor else None
        # Registered in every version, as in the released code, so that parameter counts agree.
        learned = theta == "learn" and self.variant.fused
        self.theta = nn.Parameter(torch.tensor(start), requires_grad=learned)

    @property
    def heads(self) -> tuple[str, ...]:
        """The fields of Output that this version fills."""
        v = self.variant
        fields = {
            "seg": True,
            "ct_rec": v.ct == "rec",
            "pet_rec": v.btl == "rec",
            "tumor": v.tumor,
            "btl_seg": v.btl == "whole",
            "ct_seg": v.ct != "rec",
            "pet_seg": True,
        }
        return tuple(name for name, present in fields.items() if present)

    one_value = STRIDE  # side of a patch that leaves batch norm one voxel at the bottom

    def step_options(self, number: int) -> dict:
        """What a training step passes to forward: nothing here (see baselines.System)."""
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that both branches hold, each once: the shared representation (Sec. 3.2)."""
        ct = {id(p) for p in self.ct.parameters()}
        return [p for p in self.pet.parameters() if id(p) in ct]

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        """Run the network on ct and pet, each (B, 1, W, H, D); FLAIR and T1Gd for MRI.

        heads: the fields of Output to compute, all by default; what they do not need is not run.
        Raises ValueError for a head that the version lacks, a side of the patch that does not
        divide by 16, or shapes that differ.
        """
        fits = ct.dim() == 5 and ct.shape[1] == 1 and not any(n % STRIDE for n in ct.shape[2:])
        if ct.shape != pet.shape or not fits:
            raise ValueError(
                f"CT {tuple(ct.shape)} and PET {tuple(pet.shape)}: give both the same shape, "
                f"(B, 1, W, H, D) with sides that divide by {STRIDE}"
            )
        v, want = self.variant, set(self.heads if heads is None else heads)
        if absent := want - set(self.heads):
            raise ValueError(f"heads {sorted(absent)}: this version has {', '.join(self.heads)}")
        run_ct = bool(want & {"ct_rec", "ct_seg"}) or ("seg" in want and v.ct != "rec")
        run_pet = bool(want & {"seg", "pet_seg"})
        run_btl, run_cls = bool(want & {"pet_rec", "btl_seg"}), "tumor" in want
        joint = len(self.joint) > 0
        see_ct = run_ct or run_btl or (run_cls and self.classifier_sees_ct) or joint
        see_pet = run_pet or run_btl or run_cls or joint

        ct_skips = encode(self.ct, ct) if see_ct else None
        pet_skips = encode(self.pet, pet) if see_pet else None
        both = None
        if run_btl or joint or (run_cls and self.classifier_sees_ct):
            both = torch.cat([ct_skips[-1], pet_skips[-1]], dim=1)  # ⊕ of Eq. 2-3, (B, 512, ...)
        out = {}
        if run_ct:
            ct_out = decode(self.ct, ct_skips, self.start("ct", ct_skips, both))
            out["ct_rec" if v.ct == "rec" else "ct_seg"] = ct_out
        if run_pet:
            out["pet_seg"] = decode(self.pet, pet_skips, self.start("pet", pet_skips, both))
            out["seg"] = self.final(out["pet_seg"], out.get("ct_seg"))
        if run_btl:
            out["pet_rec" if v.btl == "rec" else "btl_seg"] = self.btl_decoder(both)
        if run_cls:
            out["tumor"] = self.classifier(both if self.classifier_sees_ct else pet_skips[-1])
        return Output(**out)

    def start(self, branch: str, skips: list[Tensor], both: Tensor | None) -> Tensor:
        """Where a branch's decoder starts: its own bottom, or both bottoms if joint."""
        return self.joint[branch](both) if branch in self.joint else skips[-1]

    def final(self, pet_seg: Tensor, ct_seg: Tensor | None) -> Tensor | None:
        """The logits `seg` from those of the branches."""
        if self.variant.ct == "rec":
            return pet_seg
        if ct_seg is None:
            return None
        if self.variant.fused:  # before the softmax, Eq. 4
            return (1 - self.theta) * pet_seg + self.theta * ct_seg
        edema, core = ct_seg[:, 1] - ct_seg[:, 0], pet_seg[:, 1] - pet_seg[:, 0]
        return torch.stack([torch.zeros_like(edema), edema, core], dim=1)


def encode(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """Outputs of layers 1-5; the last one is the bottom (B, 256, W/16, H/16, D/16)."""
    maps = []
    for layer in layers[:5]:
        x = layer(x)
        maps.append(x)
    return maps


def decode(layers: nn.ModuleList, maps: list[Tensor], x: Tensor) -> Tensor:
    """Layers 6-8 and the output layer from the bottom x, with the encoder's maps as skips."""
    for layer, skip in zip(layers[5:], reversed(maps[:4]), strict=True):
        x = layer(torch.cat([skip, x], dim=1))
    return x


def margins(seg: Tensor) -> Tensor:
    """Foreground logits minus the background's: (B, 1 + K, ...) -> (B, K, ...), linear in seg."""
    return seg[:, 1:] - seg[:, :1]


def decide(margin, variant: Variant):
    """Which classes are present: booleans (K, W, H, D) from margins (K, W, H, D), NumPy or torch.

    K runs over variant.classes. After one softmax the larger logit wins; where edema and core sit
    on branches of their own (MRI v1, v2), each is decided there and both may be present.
    """
    present = margin > 0
    if variant.exclusive and len(margin) == 2:
        first_wins = margin[0] >= margin[1]
        present[0] &= first_wins
        present[1] &= ~first_wins
    return present


def count_parameters(model: nn.Module) -> int:
    """Parameters, a shared one counted once; the joint 1^3 convolutions are left out."""
    joint = sum(p.numel() for n, p in model.named_parameters() if n.startswith("joint."))
    return sum(p.numel() for p in model.parameters()) - joint
