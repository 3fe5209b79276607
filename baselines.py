"""The systems of Tables 3-5 that Mirror U-Net is compared with, each with its own loss.

Every network is called as MirrorUNet is, on ct and pet (B, 1, W, H, D), and returns an Output whose
`seg` holds the logits of one softmax: background and lesion, or background, edema and core. For MRI
the CT slot holds FLAIR, the PET slot T1Gd. Networks that fuse early see both as channels, CT first.

A docstring says where a system comes from and, under "Choice", what is ours: the papers were
written for other data, and Sec. 4.2 does not say how they were carried over.

Losses take what those in losses.py take, but have weights of their own: `w` is not read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import Terms, dice_ce, reconstruction
from mirror_unet import (
    CHANNELS,
    CT,
    MASKS,
    PET,
    STRIDE,
    Down,
    Network,
    Output,
    Up,
    Variant,
    decode,
    encode,
    margins,
    share,
    unet_layers,
)


class System(Network):
    """One softmax decides all classes of the mask. Raises ValueError for an unknown `kind`."""

    heads = ("seg",)

    def __init__(self, kind: str = "petct"):
        super().__init__()
        if kind not in MASKS:
            raise ValueError(f"unknown kind of data {kind!r}: choose from {', '.join(MASKS)}")
        self.variant = Variant(pet=MASKS[kind], tumor="tumor" in self.heads)
        self.classes = MASKS[kind].channels  # with the background


def loss_seg(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE of the mask alone; for Valindria et al. of the one branch that the step ran."""
    return {"seg": dice_ce(batch["mask"], out.seg)}


def presence(out: Output, batch: dict) -> Tensor:
    """L_BCE of the tumour logit: is there a lesion?"""
    return F.binary_cross_entropy_with_logits(out.tumor.float(), batch["tumor"].float())


def he_init(net: nn.Module, slope: float = 0.0, uniform: bool = False) -> None:
    """He's weights and no bias for every convolution, as nnU-Net and DeepMTS start."""
    draw = nn.init.kaiming_uniform_ if uniform else nn.init.kaiming_normal_
    for layer in net.modules():
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            draw(layer.weight, a=slope)
            nn.init.zeros_(layer.bias)


def outputs(stages: nn.ModuleList, x: Tensor, halve: Callable | None = None) -> list[Tensor]:
    """What each stage puts out, given what the one before did; `halve` pools in between."""
    maps = []
    for stage in stages:
        x = stage(halve(x, 2) if halve and maps else x)
        maps.append(x)
    return maps


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
        slots, branches = {"ct": ct, "pet": pet}, {"seg": self.layers}
        seen = torch.cat([slots[name] for name in self.images], dim=1)
        maps = encode(branches, {"seg": seen})
        return Output(**decode(branches, maps, maps[-1]))


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
        pairs = encode({"ct": self.ct, "pet": self.pet}, {"ct": ct, "pet": pet})
        *skips, x = [torch.cat([pair["ct"], pair["pet"]], dim=1) for pair in pairs]
        for layer, skip in zip(self.decoder, reversed(skips), strict=True):
            x = layer(torch.cat([skip, x], dim=1))
        return Output(x)


class LateFusion(Network):
    """Two trained networks as one (LF of Table 3); mirror_unet.decide joins their masks.

    Source: Table 3, a CT-only and a PET-only network.
    Choice: "logits" is the mean of both networks' margins, which has the mask of their sum.
    mode: one of LATE_FUSIONS. `seg` is (B, 1 + 2K, W, H, D): zeros, then the margins of both.
    """

    heads = ("seg",)

    def __init__(self, ct: Network, pet: Network, mode: str):
        super().__init__()
        self.ct, self.pet = ct, pet
        self.variant = replace(pet.variant, join=mode)

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        self.wanted(ct, pet, heads)
        # In float32: bf16 margins would round what the networks say when run for themselves.
        segs = [net(ct, pet, heads=("seg",)).seg.float() for net in (self.ct, self.pet)]
        found = torch.cat([margins(seg) for seg in segs], dim=1)
        return Output(torch.cat([torch.zeros_like(found[:, :1]), found], dim=1))


# ------------------------------------------------------------------ nnU-Net and Blackbean


def double_conv(cin: int, cout: int, stride: int = 1, affine=True, slope=0.01) -> nn.Sequential:
    """A stage of nnU-Net: twice 3^3 convolution, instance norm, leaky ReLU; the first strided."""
    layers = []
    for conv in (nn.Conv3d(cin, cout, 3, stride, 1), nn.Conv3d(cout, cout, 3, 1, 1)):
        layers += [conv, nn.InstanceNorm3d(cout, affine=affine), nn.LeakyReLU(slope, inplace=True)]
    return nn.Sequential(*layers)


class PlainUNet(System):
    """nnU-Net's network: one stage per width, each at half the size of the one before.

    Transposed 2^3 convolutions lead up; every decoder stage has a 1^3 convolution to logits.
    """

    heads = ("seg", "extra")

    def __init__(self, kind: str, widths: tuple[int, ...]):
        super().__init__(kind)
        self.stride = 2 ** (len(widths) - 1)
        self.least = 2 * self.stride  # instance norm needs more than one voxel at the bottom
        pairs = list(pairwise(widths))
        first = double_conv(2, widths[0])
        self.down = nn.ModuleList([first, *(double_conv(a, b, stride=2) for a, b in pairs)])
        pairs.reverse()
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in pairs)
        self.decoder = nn.ModuleList(double_conv(2 * a, a) for a, _ in pairs)
        self.logits = nn.ModuleList(nn.Conv3d(a, self.classes, 1) for a, _ in pairs)
        he_init(self, slope=0.01)

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        want = self.wanted(ct, pet, heads)
        *skips, x = outputs(self.down, torch.cat([ct, pet], dim=1))
        maps = []
        for up, stage, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
            maps.append(x)
        if "extra" not in want:
            return Output(self.logits[-1](x))
        *deep, seg = (logits(x) for logits, x in zip(self.logits, maps, strict=True))
        return Output(seg, extra={"deep": deep[::-1]})  # logits at 1/2, 1/4, ... of the size


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


def deep_weights(outputs: int) -> list[float]:
    """Weights of deep supervision, full size first: powers of 1/2, the last 0, with sum 1."""
    halves = [0.5**i for i in range(outputs - 1)]
    return [half / sum(halves) for half in halves] + [0.0] if halves else [1.0]


def loss_deep(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE at every size with the weights of nnU-Net (4/7, 2/7, 1/7, 0 for four).

    The mask is brought to a size by the nearest voxel. The term of weight 0 is there so that its
    logits have a gradient, which data-parallel training asks for.
    """
    sizes = (out.seg, *out.extra["deep"])
    mask, total = batch["mask"][:, None].float(), 0
    for weight, logits in zip(deep_weights(len(sizes)), sizes, strict=True):
        y = F.interpolate(mask, logits.shape[2:], mode="nearest-exact")[:, 0]
        total = total + weight * dice_ce(y, logits)
    return {"seg": total}


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


def res_encoder(cin: int, width: int, bias: bool) -> nn.ModuleList:
    """1, 2, 2, 4 blocks at 1, 2, 4, 8 times `width`, each level at half the size of the last."""
    levels = nn.ModuleList()
    for i, blocks in enumerate((1, 2, 2, 4)):
        cout = width * 2**i
        conv = nn.Conv3d(cin, cout, 3, 2 if i else 1, 1, bias=False)
        start = [conv] if i else [conv, nn.Dropout3d(0.2)]
        levels.append(nn.Sequential(*start, *(PreActivation(cout, bias) for _ in range(blocks))))
        cin = cout
    return levels


class ResDecoder(nn.Module):
    """Per level a 1^3 convolution, trilinear doubling, the skip added if given, and one block."""

    def __init__(self, width: int, bias: bool, align_corners: bool):
        super().__init__()
        self.grow = nn.Upsample(None, 2, "trilinear", align_corners)
        widths = [4 * width, 2 * width, width]
        self.narrow = nn.ModuleList(nn.Conv3d(2 * w, w, 1, bias=bias) for w in widths)
        self.blocks = nn.ModuleList(PreActivation(w, bias) for w in widths)

    def forward(self, x: Tensor, skips: list[Tensor] | None = None) -> Tensor:
        for i, (narrow, block) in enumerate(zip(self.narrow, self.blocks, strict=True)):
            x = self.grow(narrow(x))
            x = block(x if skips is None else x + skips[-1 - i])
        return x


class SegResNet(System):
    """The winner of BraTS 2018 without its autoencoder branch (Table 5).

    Source: Myronenko 2018; MONAI's `SegResNet` with 16 filters, as in MONAI's BraTS tutorial, which
    the released code follows.
    Choice: T1Gd and FLAIR in, one softmax out, like every system here; the tutorial has four
    modalities and three sigmoids.
    """

    def __init__(self, kind: str = "mri", filters: int = 16):
        super().__init__(kind)
        self.encoder = res_encoder(2, filters, bias=False)
        self.decoder = ResDecoder(filters, bias=False, align_corners=False)
        self.logits = nn.Sequential(
            nn.GroupNorm(8, filters), nn.ReLU(inplace=True), nn.Conv3d(filters, self.classes, 1)
        )

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        self.wanted(ct, pet, heads)
        *skips, x = outputs(self.encoder, torch.cat([ct, pet], dim=1))
        return Output(self.logits(self.decoder(x, skips)))


class SFNet(System):
    """Segmentation beside image fusion: a second decoder weighs one modality against the other.

    Source: Liu et al. 2022; yuliu316316/SF-Net. The fused image is f = w B + (1 - w) A; the loss
    keeps the structure of A and the intensities of B.
    Choice: A is CT (FLAIR), B is PET (T1Gd), so one map w instead of one for each of two pairs; 16
    filters instead of 32; a softmax for the mask.
    """

    heads = ("seg", "extra")

    def __init__(self, kind: str = "petct", filters: int = 16):
        super().__init__(kind)
        self.encoder = res_encoder(2, filters, bias=True)
        self.decoder = ResDecoder(filters, bias=True, align_corners=True)
        self.logits = nn.Conv3d(filters, self.classes, 1)
        self.fusion_decoder = ResDecoder(filters, bias=True, align_corners=True)
        self.weight = nn.Conv3d(filters, 1, 1)
        self.s = nn.Parameter(torch.zeros(()))  # the fusion loss counts e^-s

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        want = self.wanted(ct, pet, heads)
        *skips, x = outputs(self.encoder, torch.cat([ct, pet], dim=1))
        seg = self.logits(self.decoder(x, skips)) if "seg" in want else None
        extra = None
        if "extra" in want:
            extra = {"weight": self.weight(self.fusion_decoder(x)).sigmoid(), "s": self.s}
        return Output(seg, extra=extra)


def ssim(x: Tensor, y: Tensor, span: float = 1.0, size: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity of x and y (B, 1, W, H, D) with values in a range of `span`.

    Means, variances and covariance are those under a Gaussian window of size^3, only where it lies
    inside (sides of at least `size`). Raises ValueError for smaller patches.
    """
    if min(x.shape[2:]) < size:
        raise ValueError(f"SSIM of {tuple(x.shape)}: every side must be at least {size}")
    x, y = x.float(), y.float()
    t = torch.arange(size, dtype=torch.float64) - size // 2
    window = torch.exp(-t.square() / (2 * sigma**2))
    window = (window / window.sum()).tolist()
    moments = torch.cat([x, y, x * x, y * y, x * y])
    for axis in (2, 3, 4):
        # Sums, not convolutions: a GPU may run those in TF32, too coarse for E[x^2] - E[x]^2.
        inside = moments.shape[axis] - size + 1
        moments = sum(g * moments.narrow(axis, i, inside) for i, g in enumerate(window))
    mx, my, xx, yy, xy = moments.chunk(5)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (luminance * structure).mean()


def loss_sfnet(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE + e^-s L_fusion + s with the learned s, A = CT and B = PET, where

    L_fusion = 2 MSE(f, B) + MSE(f, A) + 2 (1 - SSIM(f, A)) + (1 - SSIM(f, B)).
    """
    a, b, s = batch["ct"].float(), batch["pet"].float(), out.extra["s"]
    weight = out.extra["weight"].float()
    f = weight * b + (1 - weight) * a
    intensity = 2 * F.mse_loss(f, b) + F.mse_loss(f, a)
    structure = 2 * (1 - ssim(f, a)) + (1 - ssim(f, b))
    return loss_seg(out, batch, w) | {"fusion": torch.exp(-s) * (intensity + structure) + s}


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
        pairs = list(pairwise(widths))
        first = nn.Sequential(Projected(2, 8, kernel=7), Projected(8, 8))
        deeper = [nn.Sequential(Projected(a, b), Projected(b, b)) for a, b in pairs]
        self.down = nn.ModuleList([first, *deeper])
        pairs.reverse()
        ups = [nn.ConvTranspose3d(b, a, 3, 2, 1, output_padding=1) for a, b in pairs]
        self.up = nn.ModuleList(ups)
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
        maps = outputs(self.down, torch.cat([ct, pet], dim=1), F.max_pool3d)
        seg = self.decode(maps) if "seg" in want else None
        tumor = self.classifier(averages(maps)) if "tumor" in want else None
        return Output(seg, tumor=tumor)

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


def loss_andrearczyk(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE + 0.1 L_BCE; the original's outcome is survival, its weight is not published."""
    return loss_seg(out, batch, w) | {"cls": 0.1 * presence(out, batch)}


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
    bf16_least = 4 * STRIDE  # the DenseNet, unpadded, has maps of 2^3 at 48^3 too

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        widths = (8, 16, 32, 64, 128)
        pairs = list(pairwise((2, *widths)))
        down = [Residual(a, b, n) for (a, b), n in zip(pairs, (2, 2, 3, 3, 4), strict=True)]
        up = [Residual(a + b, a, n) for (a, b), n in zip(pairs[1:], (2, 2, 3, 3), strict=True)]
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(reversed(up))
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
        maps = outputs(self.down, images, F.max_pool3d)
        *skips, x = maps
        for stage, skip in zip(self.up, reversed(skips), strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1))
        seg, tumor = self.logits(x), None
        if "tumor" in want:
            foreground = seg.softmax(dim=1)[:, 1:].sum(dim=1, keepdim=True)
            narrow = [layer(m) for layer, m in zip(self.narrow, maps, strict=True)]
            dense = self.dense_net(torch.cat([images, foreground], dim=1))
            parts = [self.from_unet(averages(narrow)), self.from_dense_net(averages(dense))]
            tumor = self.classifier(torch.cat(parts, dim=1))
        return Output(seg if "seg" in want else None, tumor=tumor)


def loss_deepmts(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE + L_BCE, one to one as in the original with its Cox loss."""
    return loss_seg(out, batch, w) | {"cls": presence(out, batch)}


# ------------------------------------------------------------------ Weninger et al.


def double_relu(cin: int, cout: int) -> nn.Sequential:
    return double_conv(cin, cout, affine=False, slope=0.0)


class WeningerDecoder(nn.Module):
    """Three transposed convolutions, each followed by two convolutions, with or without skips."""

    def __init__(self, filters: int, cout: int, skips: bool):
        super().__init__()
        widths = (4 * filters, 2 * filters, filters)
        ups = [nn.ConvTranspose3d(2 * w, 2 * w, 3, 2, 1, output_padding=1) for w in widths]
        self.up = nn.ModuleList(
            nn.Sequential(up, nn.InstanceNorm3d(up.out_channels), nn.ReLU(inplace=True))
            for up in ups
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

    heads = ("seg", "ct", "btl", "tumor")

    def __init__(self, kind: str = "petct", filters: int = 16):
        super().__init__(kind)
        self.variant = replace(self.variant, ct=CT, btl=PET)
        widths = (2, filters, 2 * filters, 4 * filters, 8 * filters)
        self.down = nn.ModuleList(double_relu(a, b) for a, b in pairwise(widths))
        self.decoder = WeningerDecoder(filters, self.classes, skips=True)
        self.rec_decoder = WeningerDecoder(filters, 2, skips=False)
        self.classifier = nn.Sequential(
            nn.Linear(8 * filters, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0)
        )

    def forward(self, ct: Tensor, pet: Tensor, heads: tuple[str, ...] | None = None) -> Output:
        want = self.wanted(ct, pet, heads)
        *skips, x = outputs(self.down, torch.cat([ct, pet], dim=1), F.max_pool3d)
        out = {}
        if "seg" in want:
            out["seg"] = self.decoder(x, skips)
        if want & {"ct", "btl"}:
            rec = self.rec_decoder(x)  # (B, 2, W, H, D)
            out["ct"], out["btl"] = rec[:, :1], rec[:, 1:]
        if "tumor" in want:
            out["tumor"] = self.classifier(averages([x]))
        return Output(**out)


def loss_weninger(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE + 0.1 MSE over both images + 0.1 L_BCE (supplement, Sec. 3)."""
    return loss_seg(out, batch, w) | {
        "rec_ct": 0.1 * reconstruction(batch["ct"], out.ct, "mse") / 2,
        "rec_pet": 0.1 * reconstruction(batch["pet"], out.btl, "mse") / 2,
        "cls": 0.1 * presence(out, batch),
    }


class Valindria(System):
    """One branch per modality with a shared bottom, trained on one modality per step.

    Source: Valindria et al. 2018, whose code is not public; Sec. 4.2 and the released code.
    Choice: the branches of v4 with L = {5}; a training step draws its modality with
    probability 1/2; otherwise the mask is the mean of both branches' logits.
    norm: "shared" or "private" batch norms in the shared layer, as in MirrorUNet.
    """

    heads = ("seg", "ct", "pet")
    branches = ("ct", "pet")
    alternates = True

    def __init__(self, kind: str = "petct", norm: str = "shared"):
        super().__init__(kind)
        self.variant = replace(self.variant, ct=self.variant.pet)
        pet, ct = unet_layers(), unet_layers()
        ct[4] = share(pet[4], norm == "private")
        width = 2 * CHANNELS[0]
        self.pet = nn.ModuleList([*pet, Up(width, self.classes, bare=True)])
        self.ct = nn.ModuleList([*ct, Up(width, self.classes, bare=True)])

    def step_options(self, number: int) -> dict:
        return {"branch": self.branches[number % 2]}

    def forward(self, ct, pet, heads=None, branch: str | None = None) -> Output:
        """branch: "ct" or "pet" runs that branch only, and its logits are `seg`."""
        want = self.wanted(ct, pet, heads)
        branches, images = {"ct": self.ct, "pet": self.pet}, {"ct": ct, "pet": pet}
        run = [name for name in images if branch in (None, name) and want & {"seg", name}]
        maps = encode(branches, {name: images[name] for name in run})
        out = decode(branches, maps, maps[-1])
        if "seg" in want:
            out["seg"] = sum(out.values()) / len(out)
        return Output(**out)


# ------------------------------------------------------------------ the table of systems


@dataclass(frozen=True)
class Row:
    """A compared system: how a resolved config.Config builds it, its loss, and its own recipe.

    own: options that --recipe own sets, as far as they are known; the matched recipe is that of
    Mirror U-Net for all. reads: options of its network or loss that most systems lack.
    """

    build: Callable[[object], System]
    loss: Callable = loss_seg
    own: dict = field(default_factory=dict)
    reads: tuple[str, ...] = ()


SGD = dict(optimizer="sgd", weight_decay=3e-5, schedule="poly", clip=12.0, epochs=1000, steps=250,
           batch_size=2, lesion_p=1 / 3, overlap=0.5, window_weights="gaussian")  # fmt: skip
SYSTEMS = {
    # Table 3
    "ct": Row(lambda c: UNet(c.kind, ("ct",))),
    "pet": Row(lambda c: UNet(c.kind, ("pet",))),
    "early_fusion": Row(lambda c: UNet(c.kind)),
    "middle_fusion": Row(lambda c: MiddleFusion(c.kind)),
    # Table 4
    "nnunet": Row(lambda c: NNUNet(c.kind, c.patch), loss_deep,
                  SGD | dict(lr=1e-2, patch=(128, 128, 128))),
    "blackbean": Row(lambda c: Blackbean(c.kind), loss_deep,
                     SGD | dict(lr=1e-4, patch=(192, 192, 192))),
    "sfnet": Row(lambda c: SFNet(c.kind), loss_sfnet,
                 dict(lr=1e-4, weight_decay=1e-5, batch_size=2, epochs=200, lr_drop=0)),
    "andrearczyk": Row(lambda c: Andrearczyk(c.kind), loss_andrearczyk,
                       dict(lr=1e-3, schedule="cosine", patch=(144, 144, 144)), ("class_label",)),
    "deepmts": Row(lambda c: DeepMTS(c.kind), loss_deepmts,
                   dict(lr=1e-4, batch_size=8, patch=(128, 128, 128), lr_drop=100),
                   ("class_label",)),
    "weninger": Row(lambda c: Weninger(c.kind), loss_weninger,
                    dict(lr=5e-3, weight_decay=1e-5, schedule="exp"), ("class_label",)),
    "valindria": Row(lambda c: Valindria(c.kind, c.norm), reads=("norm",)),
    # Table 5
    "segresnet": Row(lambda c: SegResNet(c.kind),
                     own=dict(lr=1e-4, weight_decay=1e-5, schedule="cosine", epochs=300,
                              batch_size=1, overlap=0.5)),
}  # fmt: skip
# Mirror U-Net that is given one modality in both places, in training and in evaluation (Table 4).
ONE_MODALITY = {"v3_ct_only": ("v3", "ct"), "v3_pet_only": ("v3", "pet")}
LATE_FUSIONS = ("logits", "union", "intersection")  # of a `ct` and a `pet` run, Table 3
