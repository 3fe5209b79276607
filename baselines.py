"""The systems of Tables 3-5 that Mirror U-Net is compared with, each written out here.

Every network is called as MirrorUNet is, on ct and pet (B, 1, W, H, D), and returns an Output whose
`seg` holds the logits of one softmax: background and lesion, or background, edema and core. For MRI
the CT slot holds FLAIR, the PET slot T1Gd. Networks that fuse early see both as channels, CT first.

A docstring says where a system comes from and, under "Choice", what is ours: the papers were
written for other data, and Sec. 4.2 does not say how they were carried over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import loss_andrearczyk, loss_deep, loss_deepmts, loss_seg, loss_sfnet, loss_weninger
from mirror_unet import (
    CHANNELS,
    STRIDE,
    TASK_CHANNELS,
    ConvNormAct,
    Down,
    Output,
    Up,
    Variant,
    decode,
    encode,
    share,
    unet_layers,
)

MASKS = {"petct": "lesion", "mri": "edema+core"}  # the task of `seg`, a key of TASK_CHANNELS


class System(nn.Module):
    """What the networks here have in common, and what training and evaluation ask of them."""

    heads: tuple[str, ...] = ("seg",)  # the fields of Output that the network fills
    stride = STRIDE  # the sides of a patch divide by this
    least = STRIDE  # and are no smaller than this
    one_value = STRIDE  # side of a patch that leaves batch norm one voxel; 0 without batch norm
    theta = None  # Mirror U-Net has one

    def __init__(self, kind: str = "petct"):
        super().__init__()
        if kind not in MASKS:
            raise ValueError(f"unknown kind of data {kind!r}: choose from {', '.join(MASKS)}")
        # Both branches of this variant have the task of `seg`: one softmax decides all classes.
        self.variant = Variant(MASKS[kind], MASKS[kind], tumor="tumor" in self.heads)
        self.classes = TASK_CHANNELS[MASKS[kind]]

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that two branches share; none unless the network has two."""
        return []

    def step_options(self, number: int) -> dict:
        """What a training step passes to forward; number: random, the same on all devices."""
        return {}

    def wanted(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None) -> set[str]:
        """The fields to compute: `heads`, or all. Raises ValueError for patches that do not fit."""
        if ct.shape != pet.shape or any(n % self.stride or n < self.least for n in ct.shape[2:]):
            least = f" and are at least {self.least}" if self.least > self.stride else ""
            raise ValueError(
                f"CT {tuple(ct.shape)} and PET {tuple(pet.shape)}: give both the same shape, "
                f"(B, 1, W, H, D) with sides that divide by {self.stride}{least}"
            )
        return set(self.heads if heads is None else heads)


def he_init(net: nn.Module, slope: float = 0.0, uniform: bool = False) -> None:
    """He's weights and no bias for every convolution, as nnU-Net and DeepMTS start."""
    draw = nn.init.kaiming_uniform_ if uniform else nn.init.kaiming_normal_
    for layer in net.modules():
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            draw(layer.weight, a=slope)
            nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------ Table 3


class UNet(System):
    """One branch of Mirror U-Net alone: CT-only, PET-only and, on both, early fusion (EF).

    Source: Table 3, whose systems share Mirror U-Net's U-Net; the released code's `UNet`.
    images: what the network sees, "ct", "pet" or both as channels of the first layer.
    """

    def __init__(self, kind: str = "petct", images: tuple[str, ...] = ("ct", "pet")):
        super().__init__(kind)
        self.images = images
        first = Down(len(images), CHANNELS[0], 2)
        output = Up(2 * CHANNELS[0], self.classes, bare=True)
        self.layers = nn.ModuleList([first, *unet_layers()[1:], output])

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        self.wanted(ct, pet, heads)
        slots = {"ct": ct, "pet": pet}
        maps = encode(self.layers, torch.cat([slots[name] for name in self.images], dim=1))
        return Output(decode(self.layers, maps, maps[-1]))


class MiddleFusion(System):
    """Two encoders and one decoder (MF of Table 3).

    Source: Table 3; neither the paper nor the released code says how.
    Choice: layers 1-5 of Mirror U-Net per modality, each with its own bottom; the bottoms and, at
    every size, the skips are concatenated for one decoder of the usual widths.
    """

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        c1, c2, c3, c4, c5 = CHANNELS
        self.ct = nn.ModuleList(unet_layers()[:5])
        self.pet = nn.ModuleList(unet_layers()[:5])
        ups = [Up(2 * (c4 + c5), c3), Up(c3 + 2 * c3, c2), Up(c2 + 2 * c2, c1)]
        self.decoder = nn.ModuleList([*ups, Up(c1 + 2 * c1, self.classes, bare=True)])

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        self.wanted(ct, pet, heads)
        pairs = zip(encode(self.ct, ct), encode(self.pet, pet), strict=True)
        *skips, x = [torch.cat(pair, dim=1) for pair in pairs]
        for layer, skip in zip(self.decoder, reversed(skips), strict=True):
            x = layer(torch.cat([skip, x], dim=1))
        return Output(x)


# ------------------------------------------------------------------ Table 4, segmentation only


def double_conv(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    """A stage of nnU-Net: twice 3^3 convolution, instance norm, leaky ReLU; the first strided."""

    def single(cin: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv3d(cin, cout, 3, stride, 1)
        return [conv, nn.InstanceNorm3d(cout, affine=True), nn.LeakyReLU(0.01, inplace=True)]

    return nn.Sequential(*single(cin, stride), *single(cout, 1))


class PlainUNet(System):
    """nnU-Net's network: one stage per width, each at half the size of the one before.

    Transposed 2^3 convolutions lead up; every decoder stage has a 1^3 convolution to logits.
    """

    heads = ("seg", "extra")
    one_value = 0

    def __init__(self, kind: str, widths: tuple[int, ...]):
        super().__init__(kind)
        self.stride = 2 ** (len(widths) - 1)
        self.least = 2 * self.stride  # instance norm needs more than one voxel at the bottom
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        first = double_conv(2, widths[0])
        self.down = nn.ModuleList([first, *(double_conv(a, b, stride=2) for a, b in pairs)])
        pairs.reverse()
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in pairs)
        self.decoder = nn.ModuleList(double_conv(2 * a, a) for a, _ in pairs)
        self.logits = nn.ModuleList(nn.Conv3d(a, self.classes, 1) for a, _ in pairs)
        he_init(self, slope=0.01)

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        want = self.wanted(ct, pet, heads)
        x, maps, deep = torch.cat([ct, pet], dim=1), [], []
        for stage in self.down:
            x = stage(x)
            maps.append(x)
        levels = zip(self.up, self.decoder, self.logits, reversed(maps[:-1]), strict=True)
        for up, stage, logits, skip in levels:
            x = stage(torch.cat([up(x), skip], dim=1))
            if "extra" in want and logits is not self.logits[-1]:
                deep.append(logits(x))
        extra = {"deep": tuple(reversed(deep))} if "extra" in want else None
        return Output(self.logits[-1](x), extra=extra)


def stages_of(patch: tuple[int, ...]) -> int:
    """Stages of nnU-Net for a patch: halved while all sides stay whole and at least 4 voxels.

    96^3 has five, 128^3 six. 224 x 224 x 144 has five, as 144 does not divide by 32.
    """
    stages, sides = 1, list(patch)
    while all(side % 2 == 0 and side >= 8 for side in sides):
        stages, sides = stages + 1, [side // 2 for side in sides]
    return stages


class NNUNet(PlainUNet):
    """nnU-Net's full-resolution 3D U-Net with deep supervision.

    Source: Isensee et al. 2021; MIC-DKFZ/nnUNet, its `PlainConvUNet`. Widths double from 32 to at
    most 320.
    Choice: the number of stages follows our patch (five at 96^3), in the matched recipe. All axes
    are halved together, where nnU-Net's planner stops each axis on its own and pads the patch.
    """

    def __init__(self, kind: str = "petct", patch: tuple[int, ...] = (96, 96, 96)):
        super().__init__(kind, tuple(min(32 * 2**i, 320) for i in range(stages_of(patch))))


class Blackbean(PlainUNet):
    """Winner of AutoPET 2022: nnU-Net fixed to five stages, up to 512 channels.

    Source: Ye et al. 2022; Yejin0111/autoPET2022_Blackbean, one trainer file for nnU-Net v1.
    Choice: our patch instead of 192^3, CT as the first channel instead of PET, and nnU-Net v2's
    biases in the transposed convolutions and logits, where v1 has none.
    """

    def __init__(self, kind: str = "petct"):
        super().__init__(kind, (32, 64, 128, 256, 512))


class BlackbeanReleased(System):
    """Blackbean as Mirror U-Net's released code has it: one convolution per layer, no shortcut.

    Source: the released code, MONAI's `UNet` with 32-64-128-256-512 channels, no residual units,
    instance norm without weights, PReLU; no deep supervision.
    """

    least = 2 * STRIDE  # instance norm needs more than one voxel at the bottom
    one_value = 0

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        c1, c2, c3, c4, c5 = (32, 64, 128, 256, 512)

        def layer(cin: int, cout: int, stride: int = 2, up: bool = False) -> nn.Sequential:
            conv, _, act = ConvNormAct(cin, cout, stride=stride, up=up)
            return nn.Sequential(conv, nn.InstanceNorm3d(cout), act)

        down = [layer(2, c1), layer(c1, c2), layer(c2, c3), layer(c3, c4), layer(c4, c5, stride=1)]
        up = [layer(c4 + c5, c3, up=True), layer(2 * c3, c2, up=True), layer(2 * c2, c1, up=True)]
        output = nn.ConvTranspose3d(2 * c1, self.classes, 3, 2, 1, output_padding=1)
        self.layers = nn.ModuleList([*down, *up, output])

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        self.wanted(ct, pet, heads)
        maps = encode(self.layers, torch.cat([ct, pet], dim=1))
        return Output(decode(self.layers, maps, maps[-1]))


# ------------------------------------------------------------------ SegResNet and SF-Net


class PreActivation(nn.Module):
    """Twice group norm, ReLU, 3^3 convolution, beside the identity."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        layers = []
        for _ in range(2):
            conv = nn.Conv3d(width, width, 3, padding=1, bias=bias)
            layers += [nn.GroupNorm(8, width), nn.ReLU(inplace=True), conv]
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x) + x


class ResEncoder(nn.Module):
    """1, 2, 2, 4 blocks at 1, 2, 4, 8 times `width`, each level at half the size of the last."""

    def __init__(self, cin: int, width: int, bias: bool):
        super().__init__()
        self.levels = nn.ModuleList()
        for i, blocks in enumerate((1, 2, 2, 4)):
            cout = width * 2**i
            conv = nn.Conv3d(cin, cout, 3, 2 if i else 1, 1, bias=False)
            start = [conv] if i else [conv, nn.Dropout3d(0.2)]
            self.levels.append(
                nn.Sequential(*start, *(PreActivation(cout, bias) for _ in range(blocks)))
            )
            cin = cout

    def forward(self, x: Tensor) -> list[Tensor]:  # maps at W, W/2, W/4, W/8
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


class ResDecoder(nn.Module):
    """Per level a 1^3 convolution, trilinear doubling, the skip added if given, and one block."""

    def __init__(self, width: int, bias: bool, align_corners: bool):
        super().__init__()
        self.align_corners = align_corners
        widths = [4 * width, 2 * width, width]
        self.narrow = nn.ModuleList(nn.Conv3d(2 * w, w, 1, bias=bias) for w in widths)
        self.blocks = nn.ModuleList(PreActivation(w, bias) for w in widths)

    def forward(self, x: Tensor, skips: list[Tensor] | None = None) -> Tensor:
        for i, (narrow, block) in enumerate(zip(self.narrow, self.blocks, strict=True)):
            x = F.interpolate(
                narrow(x), scale_factor=2, mode="trilinear", align_corners=self.align_corners
            )
            x = block(x if skips is None else x + skips[-1 - i])
        return x


class SegResNet(System):
    """The winner of BraTS 2018 without its autoencoder branch (Table 5).

    Source: Myronenko 2018; MONAI's `SegResNet` with 16 filters, as in MONAI's BraTS tutorial, which
    the released code follows.
    Choice: T1Gd and FLAIR in, one softmax out, like every system here; the tutorial has four
    modalities and three sigmoids.
    """

    one_value = 0

    def __init__(self, kind: str = "mri", filters: int = 16):
        super().__init__(kind)
        self.encoder = ResEncoder(2, filters, bias=False)
        self.decoder = ResDecoder(filters, bias=False, align_corners=False)
        self.logits = nn.Sequential(
            nn.GroupNorm(8, filters), nn.ReLU(inplace=True), nn.Conv3d(filters, self.classes, 1)
        )

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        self.wanted(ct, pet, heads)
        *skips, x = self.encoder(torch.cat([ct, pet], dim=1))
        return Output(self.logits(self.decoder(x, skips)))


class SFNet(System):
    """Segmentation beside image fusion: a second decoder weighs one modality against the other.

    Source: Liu et al. 2022; yuliu316316/SF-Net. The fused image is f = w B + (1 - w) A; the loss
    keeps the structure of A and the intensities of B.
    Choice: A is CT (FLAIR), B is PET (T1Gd), so one map w instead of one for each of two pairs; 16
    filters instead of 32; a softmax for the mask.
    """

    heads = ("seg", "extra")
    one_value = 0

    def __init__(self, kind: str = "petct", filters: int = 16):
        super().__init__(kind)
        self.encoder = ResEncoder(2, filters, bias=True)
        self.decoder = ResDecoder(filters, bias=True, align_corners=True)
        self.logits = nn.Conv3d(filters, self.classes, 1)
        self.fusion_decoder = ResDecoder(filters, bias=True, align_corners=True)
        self.weight = nn.Conv3d(filters, 1, 1)
        self.s = nn.Parameter(torch.zeros(()))  # the fusion loss counts e^-s

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        want = self.wanted(ct, pet, heads)
        *skips, x = self.encoder(torch.cat([ct, pet], dim=1))
        seg = self.logits(self.decoder(x, skips)) if "seg" in want else None
        extra = None
        if "extra" in want:
            extra = {"weight": self.weight(self.fusion_decoder(x)).sigmoid(), "s": self.s}
        return Output(seg, extra=extra)


# ------------------------------------------------------------------ Andrearczyk et al.


class Projected(nn.Module):
    """3D convolution, ReLU, batch norm, beside a 1^3 convolution with the same."""

    def __init__(self, cin: int, cout: int, kernel: int = 3):
        super().__init__()

        def layer(k: int) -> nn.Sequential:
            conv = nn.Conv3d(cin, cout, k, padding=k // 2)
            return nn.Sequential(conv, nn.ReLU(inplace=True), nn.BatchNorm3d(cout))

        self.conv, self.project = layer(kernel), layer(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.project(x)


class Andrearczyk(System):
    """Segmentation and an outcome predicted from the averages of every encoder stage.

    Source: Andrearczyk et al. 2021; vandrearczyk/multitask-guided-radiomics, model_multitask.py, of
    the same author (that it is exactly the cited network is inferred).
    Choice: the outcome is whether there is a lesion, not survival; one logit per class instead of a
    sigmoid; PyTorch's defaults for initial weights and batch norm.
    """

    heads = ("seg", "tumor")

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        widths = (8, 16, 32, 64, 128)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        first = nn.Sequential(Projected(2, 8, kernel=7), Projected(8, 8))
        deeper = [nn.Sequential(Projected(a, b), Projected(b, b)) for a, b in pairs]
        self.down = nn.ModuleList([first, *deeper])
        pairs.reverse()
        up = [nn.ConvTranspose3d(b, a, 3, 2, 1, output_padding=1) for a, b in pairs]
        self.up = nn.ModuleList(up)
        self.convs = nn.ModuleList(nn.Conv3d(2 * a, a, 3, padding=1) for a, _ in pairs)
        self.full_size = nn.ModuleList(nn.Conv3d(a, 8, 1) for a, _ in pairs[:-1])
        self.logits = nn.Sequential(
            nn.Conv3d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv3d(8, self.classes, 1)
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(sum(widths), 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, 1), nn.Flatten(0),
        )  # fmt: skip

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        want = self.wanted(ct, pet, heads)
        x, maps = torch.cat([ct, pet], dim=1), []
        for stage in self.down:
            x = stage(F.max_pool3d(x, 2) if maps else x)
            maps.append(x)
        out = {}
        if "seg" in want:
            out["seg"] = self.decode(maps)
        if "tumor" in want:
            out["tumor"] = self.classifier(averages(maps))
        return Output(**out)

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Logits from the maps of the five stages; every decoder stage adds to the last one."""
        *skips, x = maps
        added = 0
        for i, (up, conv) in enumerate(zip(self.up, self.convs, strict=True)):
            x = conv(torch.cat([up(x).relu(), skips[-1 - i]], dim=1)).relu()
            if i < len(self.full_size):
                added = added + F.interpolate(self.full_size[i](x).relu(), scale_factor=8 // 2**i)
        return self.logits(x + added)


def averages(maps: list[Tensor]) -> Tensor:
    """Averages over the volume of maps (B, C_i, ...), concatenated: (B, sum of C_i)."""
    return torch.cat([x.mean(dim=(2, 3, 4)) for x in maps], dim=1)


# ------------------------------------------------------------------ DeepMTS


def conv_norm_relu(cin: int, cout: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv3d(cin, cout, kernel, padding=kernel // 2)
    return nn.Sequential(conv, nn.BatchNorm3d(cout), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """`convs` convolutions, each beside a shortcut; the first shortcut is a 1^3 convolution."""

    def __init__(self, cin: int, cout: int, convs: int):
        super().__init__()
        self.shortcut = conv_norm_relu(cin, cout, kernel=1)
        self.first = conv_norm_relu(cin, cout)
        self.others = nn.ModuleList(conv_norm_relu(cout, cout) for _ in range(convs - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.shortcut(x)
        for conv in self.others:
            x = conv(x) + x
        return x


class Dense(nn.Sequential):
    """A layer of a dense block: its 16 new channels are appended to what it was given."""

    def __init__(self, cin: int, hidden: int = 64, growth: int = 16):
        super().__init__(
            nn.BatchNorm3d(cin), nn.ReLU(inplace=True), nn.Conv3d(cin, hidden, 1),
            nn.Dropout(0.05),
            nn.BatchNorm3d(hidden), nn.ReLU(inplace=True), nn.Conv3d(hidden, growth, 3, padding=1),
            nn.Dropout(0.05),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], dim=1)


class DenseNet(nn.Module):
    """Dense blocks of 4, 8, 16 layers on (B, 3, W, H, D); maps of 16, 32, 64 channels come out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(3, 24, 3, 2), nn.Dropout(0.05), nn.MaxPool3d(3, 2))
        self.blocks, self.norms = nn.ModuleList(), nn.ModuleList()
        cin = 24
        for layers, cout in ((4, 16), (8, 32), (16, 64)):
            dense = [Dense(cin + 16 * i) for i in range(layers)]
            cin += 16 * layers
            transition = [nn.BatchNorm3d(cin), nn.ReLU(inplace=True), nn.Conv3d(cin, cout, 1)]
            self.blocks.append(nn.Sequential(*dense, *transition, nn.Dropout(0.05)))
            self.norms.append(nn.BatchNorm3d(cout))
            cin = cout

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.first(x), []
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = block(F.avg_pool3d(x, 2) if maps else x)
            maps.append(norm(x).relu())
        return maps


class DeepMTS(System):
    """A cascade: a DenseNet sees the predicted mask with the images and predicts the outcome.

    Source: Meng et al. 2022; MungoMeng/Survival-DeepMTS, networks.py. The outcome is read from both
    the U-Net's and the DenseNet's maps, so its gradient reaches the mask.
    Choice: the outcome is whether there is a lesion, not survival, and there are no clinical data;
    for MRI the DenseNet sees the probability of edema or core. The original's L2 penalty of 0.1 on
    the outcome's linear layers is left out; PyTorch's defaults for batch norm.
    """

    heads = ("seg", "tumor")
    least = 2 * STRIDE  # what the DenseNet, unpadded, needs for its last map
    one_value = 2 * STRIDE

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        widths = (8, 16, 32, 64, 128)
        cins = (2, *widths[:-1])
        stages = zip(cins, widths, (2, 2, 3, 3, 4), strict=True)
        self.down = nn.ModuleList(Residual(a, b, convs) for a, b, convs in stages)
        stages = zip(widths[:-1], widths[1:], (2, 2, 3, 3), strict=True)
        up = [Residual(a + b, a, convs) for a, b, convs in stages]
        self.up = nn.ModuleList(reversed(up))
        self.logits = nn.Conv3d(widths[0], self.classes, 1)
        self.narrow = nn.ModuleList(conv_norm_relu(w, w // 2, kernel=1) for w in widths)
        self.dense_net = DenseNet()
        he_init(self, uniform=True)
        self.from_unet = nn.Sequential(nn.Dropout(0.5), nn.Linear(124, 64), nn.ReLU())
        self.from_dense_net = nn.Sequential(nn.Dropout(0.5), nn.Linear(112, 64), nn.ReLU())
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, 1), nn.Flatten(0))

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        want = self.wanted(ct, pet, heads)
        images = torch.cat([ct, pet], dim=1)
        x, maps = images, []
        for stage in self.down:
            x = stage(F.max_pool3d(x, 2) if maps else x)
            maps.append(x)
        for stage, skip in zip(self.up, reversed(maps[:-1]), strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1))
        seg, tumor = self.logits(x), None
        if "tumor" in want:
            foreground = seg.softmax(dim=1)[:, 1:].sum(dim=1, keepdim=True)
            narrow = [layer(m) for layer, m in zip(self.narrow, maps, strict=True)]
            dense = self.dense_net(torch.cat([images, foreground], dim=1))
            parts = [self.from_unet(averages(narrow)), self.from_dense_net(averages(dense))]
            tumor = self.classifier(torch.cat(parts, dim=1))
        return Output(seg if "seg" in want else None, tumor=tumor)


# ------------------------------------------------------------------ Weninger et al.


def instance_relu(conv: nn.Module) -> list[nn.Module]:
    return [conv, nn.InstanceNorm3d(conv.out_channels), nn.ReLU(inplace=True)]


def double_relu(cin: int, cout: int) -> nn.Sequential:
    first, second = nn.Conv3d(cin, cout, 3, padding=1), nn.Conv3d(cout, cout, 3, padding=1)
    return nn.Sequential(*instance_relu(first), *instance_relu(second))


class WeningerDecoder(nn.Module):
    """Three transposed convolutions, each followed by two convolutions, with or without skips."""

    def __init__(self, filters: int, cout: int, skips: bool):
        super().__init__()
        widths = (4 * filters, 2 * filters, filters)
        self.up = nn.ModuleList(
            nn.Sequential(
                *instance_relu(nn.ConvTranspose3d(2 * w, 2 * w, 3, 2, 1, output_padding=1))
            )
            for w in widths
        )
        self.convs = nn.ModuleList(double_relu(3 * w if skips else 2 * w, w) for w in widths)
        self.output = nn.Conv3d(filters, cout, 1)

    def forward(self, x: Tensor, skips: list[Tensor] | None = None) -> Tensor:
        for i, (up, convs) in enumerate(zip(self.up, self.convs, strict=True)):
            x = up(x)
            x = convs(x if skips is None else torch.cat([x, skips[-1 - i]], dim=1))
        return self.output(x)


class Weninger(System):
    """One encoder for segmentation, reconstruction of the images and tumour classification.

    Source: Weninger et al. 2019. Its code is not public; the network is that group's earlier U-Net,
    weningerleon/BraTS2018, unet3d.py.
    Choice: 16 filters; the second decoder, without skips, reconstructs both images; the classifier
    reads the averages of the bottom (128 ReLU 1) and tells whether there is a lesion.
    """

    heads = ("seg", "ct_rec", "pet_rec", "tumor")
    one_value = 0

    def __init__(self, kind: str = "petct", filters: int = 16):
        super().__init__(kind)
        widths = (2, filters, 2 * filters, 4 * filters, 8 * filters)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.down = nn.ModuleList(double_relu(a, b) for a, b in pairs)
        self.decoder = WeningerDecoder(filters, self.classes, skips=True)
        self.rec_decoder = WeningerDecoder(filters, 2, skips=False)
        self.classifier = nn.Sequential(
            nn.Linear(8 * filters, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0)
        )

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        want = self.wanted(ct, pet, heads)
        x, maps = torch.cat([ct, pet], dim=1), []
        for stage in self.down:
            x = stage(F.max_pool3d(x, 2) if maps else x)
            maps.append(x)
        out = {}
        if "seg" in want:
            out["seg"] = self.decoder(x, maps[:-1])
        if want & {"ct_rec", "pet_rec"}:
            rec = self.rec_decoder(x)  # (B, 2, W, H, D)
            out["ct_rec"], out["pet_rec"] = rec[:, :1], rec[:, 1:]
        if "tumor" in want:
            out["tumor"] = self.classifier(averages([x]))
        return Output(**out)


# ------------------------------------------------------------------ Valindria et al.


class Valindria(System):
    """One branch per modality with a shared bottom, trained on one modality per step.

    Source: Valindria et al. 2018, whose code is not public; Sec. 4.2 and the released code.
    Choice: the branches of v4 with L = {5}; a training step draws its modality with
    probability 1/2; otherwise the mask is the mean of both branches' logits.
    norm: "shared" or "private" batch norms in the shared layer, as in MirrorUNet.
    """

    heads = ("seg", "ct_seg", "pet_seg")
    branches = ("ct", "pet")  # reported beside their mean

    def __init__(self, kind: str = "petct", norm: str = "shared"):
        super().__init__(kind)
        pet, ct = unet_layers(), unet_layers()
        ct[4] = share(pet[4], norm == "private")
        width = 2 * CHANNELS[0]
        self.pet = nn.ModuleList([*pet, Up(width, self.classes, bare=True)])
        self.ct = nn.ModuleList([*ct, Up(width, self.classes, bare=True)])

    def shared_parameters(self) -> list[nn.Parameter]:
        ct = {id(p) for p in self.ct.parameters()}
        return [p for p in self.pet.parameters() if id(p) in ct]

    def step_options(self, number: int) -> dict:
        return {"branch": ("ct", "pet")[number % 2]}

    def forward(
        self,
        ct: Tensor,
        pet: Tensor,
        heads: tuple[str, ...] | None = None,
        branch: str | None = None,
    ) -> Output:
        """branch: "ct" or "pet" runs that branch only, and its logits are `seg`."""
        want = self.wanted(ct, pet, heads)
        out = {}
        for name, layers, image in (("ct", self.ct, ct), ("pet", self.pet, pet)):
            if branch in (None, name) and want & {"seg", f"{name}_seg"}:
                maps = encode(layers, image)
                out[f"{name}_seg"] = decode(layers, maps, maps[-1])
        if "seg" in want:
            out["seg"] = sum(out.values()) / len(out)
        return Output(**out)


# ------------------------------------------------------------------ the table of systems


@dataclass(frozen=True)
class Row:
    """A compared system: how a resolved train.Config builds it, its loss, and its own recipe.

    own: options that --recipe own sets, as far as they are known; the matched recipe is that of
    Mirror U-Net for all.
    """

    build: Callable[[object], System]
    loss: Callable = loss_seg
    own: dict = field(default_factory=dict)


SYSTEMS = {
    # Table 3
    "ct": Row(lambda c: UNet(c.kind, ("ct",))),
    "pet": Row(lambda c: UNet(c.kind, ("pet",))),
    "early_fusion": Row(lambda c: UNet(c.kind)),
    "middle_fusion": Row(lambda c: MiddleFusion(c.kind)),
    # Table 4
    "nnunet": Row(
        lambda c: NNUNet(c.kind, c.patch),
        loss_deep,
        dict(optimizer="sgd", lr=1e-2, weight_decay=3e-5, schedule="poly", clip=12.0, epochs=1000,
             steps=250, batch_size=2, patch=(128, 128, 128), lesion_p=1 / 3, overlap=0.5,
             window_weights="gaussian"),
    ),
    "blackbean": Row(
        lambda c: Blackbean(c.kind),
        loss_deep,
        dict(optimizer="sgd", lr=1e-4, weight_decay=3e-5, schedule="poly", clip=12.0, epochs=1000,
             steps=250, batch_size=2, patch=(192, 192, 192), lesion_p=1 / 3, overlap=0.5,
             window_weights="gaussian"),
    ),
    "blackbean_released": Row(
        lambda c: BlackbeanReleased(c.kind),
        own=dict(optimizer="sgd", lr=1e-4, weight_decay=1e-3, schedule="poly", epochs=1000,
                 steps=250, batch_size=1, patch=(192, 192, 192), lesion_p=1 / 2),
    ),
    "sfnet": Row(
        lambda c: SFNet(c.kind),
        loss_sfnet,
        dict(lr=1e-4, weight_decay=1e-5, batch_size=2, epochs=200, lr_drop=0),
    ),
    "andrearczyk": Row(
        lambda c: Andrearczyk(c.kind),
        loss_andrearczyk,
        dict(lr=1e-3, schedule="cosine", patch=(144, 144, 144)),
    ),
    "deepmts": Row(
        lambda c: DeepMTS(c.kind),
        loss_deepmts,
        dict(lr=1e-4, batch_size=8, patch=(128, 128, 128), lr_drop=100),
    ),
    "weninger": Row(
        lambda c: Weninger(c.kind), loss_weninger, dict(lr=5e-3, weight_decay=1e-5, schedule="exp")
    ),
    "valindria": Row(lambda c: Valindria(c.kind, c.norm)),
    # Table 5
    "segresnet": Row(
        lambda c: SegResNet(c.kind),
        own=dict(lr=1e-4, weight_decay=1e-5, schedule="cosine", epochs=300, batch_size=1,
                 overlap=0.5),
    ),
}  # fmt: skip
CLASSIFYING = ("andrearczyk", "deepmts", "weninger")  # systems that learn --class-label
# Mirror U-Net that is given one modality in both places, in training and in evaluation (Table 4).
ONE_MODALITY = {"v3_ct_only": ("v3", "ct"), "v3_pet_only": ("v3", "pet")}
LATE_FUSIONS = ("logits", "union", "intersection")  # of a `ct` and a `pet` run, Table 3

# The paper's Tables 3-5, in its order: our name, its name, then Dice, FPV, FNV (Tables 3, 4) or
# Dice of whole, edema, core (Table 5).
PAPER_TABLES = {
    3: (
        ("ct", "CT", 26.00, 15.64, 44.15),
        ("pet", "PET", 60.99, 5.38, 2.15),
        ("early_fusion", "EF", 54.89, 4.98, 3.13),
        ("middle_fusion", "MF", 55.53, 4.77, 3.02),
        ("late_fusion_logits", "LF-Logit", 57.41, 4.88, 2.88),
        ("late_fusion_union", "LF-∪", 59.89, 3.95, 3.01),
        ("late_fusion_intersection", "LF-∩", 21.60, 1.67, 99.74),
        ("v1", "Mirror U-Net (v1)", 64.57, 2.93, 1.66),
        ("v2", "Mirror U-Net (v2)", 65.50, 2.83, 0.94),
        ("v3", "Mirror U-Net (v3)", 65.91, 1.55, 0.76),
        ("v4", "Ablation (v4)", 64.24, 2.93, 1.99),
    ),
    4: (
        ("nnunet", "nnUNet", 62.75, 2.83, 1.59),
        ("blackbean", "Blackbean", 63.15, 2.55, 1.76),
        ("sfnet", "SF-Net", 61.21, 3.44, 2.95),
        ("andrearczyk", "Andrearczyk et al.", 61.45, 2.98, 1.89),
        ("deepmts", "DeepMTS", 61.91, 3.22, 2.76),
        ("weninger", "Weninger et al.", 61.22, 3.98, 2.82),
        ("v3_ct_only", "CT-only Mirror U-Net (v3)", 12.37, 28.24, 50.02),
        ("v3_pet_only", "PET-only Mirror U-Net (v3)", 56.14, 4.81, 3.02),
        ("v4", "Mirror U-Net (v4)", 64.24, 2.93, 1.99),
        ("valindria", "Valindria et al.", 39.84, 7.89, 17.00),
        ("v3", "Mirror U-Net (v3)", 65.91, 1.55, 0.76),
    ),
    5: (
        ("v1", "Mirror U-Net (v1)", 88.37, 71.91, 82.22),
        ("v2-rec", "Mirror U-Net (v2)-rec", 91.12, 77.12, 84.56),
        ("nnunet", "nnUNet", 89.10, 76.35, 84.05),
        ("segresnet", "SegResNet", 91.29, 77.01, 84.22),
        ("v2", "Mirror U-Net (v2)", 92.52, 78.12, 85.84),
    ),
}
