"""The systems of Tables 3-5 that Mirror U-Net is compared with, each with its own loss.

Every network is called as MirrorUNet is, on ct and pet (B, 1, W, H, D); for MRI these are FLAIR and
T1Gd. Its Output has in `seg` the logits of one softmax: background and lesion, or background, edema
and core.

A docstring says where a system comes from and, under "Choice", what is ours: the papers were
written for other data, and Sec. 4.2 does not say how they were carried over. All are trained with
the recipe of Mirror U-Net.

Losses are called as those in losses.py are, but have weights of their own: `w` is not read.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import Terms, dice_ce, reconstruction, tumor_bce
from mirror_unet import (
    CHANNELS,
    CT,
    MASK_TASK,
    PET,
    SKIPS,
    STRIDE,
    Down,
    Heads,
    Network,
    Output,
    Up,
    Variant,
    decode,
    encode,
    output_layer,
    share,
    unet_layers,
)


class System(Network):
    """A network in which one softmax decides all classes of the mask.

    A subclass defines `compute`, and `heads` if it has others than the mask. Raises ValueError for
    an unknown kind of data.
    """

    heads = ("seg",)

    def __init__(self, kind: str = "petct"):
        super().__init__()
        if kind not in MASK_TASK:
            raise ValueError(f"unknown kind of data {kind!r}: choose from {', '.join(MASK_TASK)}")
        self.variant = Variant(pet=MASK_TASK[kind], tumor="tumor" in self.heads)
        self.classes = MASK_TASK[kind].channels  # with the background

    def forward(self, ct: Tensor, pet: Tensor, heads: Heads = None, **options) -> Output:
        """See MirrorUNet.forward; options: those of step_options."""
        self.check_inputs(ct, pet, heads)
        images = torch.cat([ct, pet], dim=1)
        return self.compute(images, heads or self.heads, **options)

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        """The wanted fields of Output from the images (B, 2, W, H, D), CT first."""
        raise NotImplementedError


def loss_seg(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE of the mask alone; for Valindria et al. of the one branch that the step ran."""
    return {"seg": dice_ce(batch["mask"], out.seg)}


def he_init(net: nn.Module, slope: float = 0.0, uniform: bool = False) -> None:
    """He's weights and no bias for every convolution, as nnU-Net and DeepMTS start."""
    draw_weights = nn.init.kaiming_uniform_ if uniform else nn.init.kaiming_normal_
    for layer in net.modules():
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            draw_weights(layer.weight, a=slope)
            nn.init.zeros_(layer.bias)


def run_stages(stages: nn.ModuleList, x: Tensor, pool: bool = False) -> list[Tensor]:
    """The outputs of stages that run one after the other, with max-pooling between if `pool`."""
    maps = []
    for stage in stages:
        if pool and maps:
            x = F.max_pool3d(x, 2)
        x = stage(x)
        maps.append(x)
    return maps


def volume_averages(maps: list[Tensor]) -> Tensor:
    """Averages over the volume of maps (B, C_i, ...), concatenated: (B, sum of C_i)."""
    return torch.cat([x.mean(dim=(2, 3, 4)) for x in maps], dim=1)


# ------------------------------------------------------------------ Table 3


class UNet(System):
    """One branch of Mirror U-Net alone: CT-only, PET-only and, on both, early fusion (EF).

    Source: Table 3, whose systems share Mirror U-Net's U-Net; the released code's `UNet`.
    channels: which images the network sees, 0 (CT), 1 (PET) or both.
    """

    def __init__(self, kind: str = "petct", channels: tuple[int, ...] = (0, 1)):
        super().__init__(kind)
        self.channels = channels
        first = Down(len(channels), CHANNELS[0], stride=2)
        output = output_layer(CHANNELS, self.variant.pet)
        self.layers = nn.ModuleList([first, *unet_layers()[1:], output])

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        seen = images[:, self.channels]
        branches = {"seg": self.layers}
        maps = encode(branches, {"seg": seen})
        outputs = decode(branches, maps[5], maps)
        return Output(**outputs)


class MiddleFusion(System):
    """Two encoders and one decoder (MF of Table 3).

    Source: Table 3; neither the paper nor the released code describes it.
    Choice: layers 1-5 of Mirror U-Net per modality, each with its own bottom; the bottoms and, at
    every size, the skips are concatenated for one decoder of the usual widths.
    """

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        c1, c2, c3, c4, c5 = CHANNELS
        self.ct = nn.ModuleList(unet_layers()[:5])
        self.pet = nn.ModuleList(unet_layers()[:5])
        self.decoder = nn.ModuleList(
            [
                Up(2 * c4 + 2 * c5, c3),
                Up(2 * c3 + c3, c2),
                Up(2 * c2 + c2, c1),
                Up(2 * c1 + c1, self.classes, bare=True),
            ]
        )

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        ct, pet = images.split(1, dim=1)
        maps = encode({"ct": self.ct, "pet": self.pet}, {"ct": ct, "pet": pet})

        x = torch.cat([maps[5]["ct"], maps[5]["pet"]], dim=1)
        for layer, skip in zip(self.decoder, SKIPS.values(), strict=True):
            x = layer(torch.cat([maps[skip]["ct"], maps[skip]["pet"], x], dim=1))
        return Output(x)


# ------------------------------------------------------------------ nnU-Net and Blackbean


def double_conv(cin: int, cout: int, stride: int = 1, affine=True, slope=0.01) -> nn.Sequential:
    """A stage of nnU-Net: twice 3^3 convolution, instance norm, leaky ReLU; the first strided."""
    return nn.Sequential(
        nn.Conv3d(cin, cout, 3, stride, padding=1),
        nn.InstanceNorm3d(cout, affine=affine),
        nn.LeakyReLU(slope, inplace=True),
        nn.Conv3d(cout, cout, 3, padding=1),
        nn.InstanceNorm3d(cout, affine=affine),
        nn.LeakyReLU(slope, inplace=True),
    )


class PlainUNet(System):
    """nnU-Net's network: one stage per width, each at half the size of the one before.

    Transposed 2^3 convolutions lead up; every decoder stage has a 1^3 convolution to logits.
    """

    heads = ("seg", "extra")

    def __init__(self, kind: str, widths: tuple[int, ...]):
        super().__init__(kind)
        self.stride = 2 ** (len(widths) - 1)
        self.min_side = 2 * self.stride  # instance norm needs more than one voxel at the bottom

        self.down = nn.ModuleList([double_conv(2, widths[0])])
        for fine, coarse in pairwise(widths):
            self.down.append(double_conv(fine, coarse, stride=2))

        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        self.logits = nn.ModuleList()
        for coarse, fine in pairwise(reversed(widths)):
            self.up.append(nn.ConvTranspose3d(coarse, fine, 2, stride=2))
            self.decoder.append(double_conv(2 * fine, fine))
            self.logits.append(nn.Conv3d(fine, self.classes, 1))
        he_init(self, slope=0.01)

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        *skips, x = run_stages(self.down, images)
        maps = []
        for up, stage, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
            maps.append(x)

        if "extra" not in wanted:
            return Output(self.logits[-1](x))
        *deep, seg = [logits(x) for logits, x in zip(self.logits, maps, strict=True)]
        return Output(seg, extra={"deep": deep[::-1]})  # logits at 1/2, 1/4, ... of the size


def stages_of(patch: tuple[int, ...]) -> int:
    """Stages of nnU-Net for a patch: halved while all sides stay whole and at least 4 voxels.

    96^3 has five, 128^3 six. 224 x 224 x 144 has five, as 144 does not divide by 32.
    """
    stages = 1
    sides = list(patch)
    while all(side % 2 == 0 and side >= 8 for side in sides):
        stages += 1
        sides = [side // 2 for side in sides]
    return stages


class NNUNet(PlainUNet):
    """nnU-Net's full-resolution 3D U-Net with deep supervision.

    Source: Isensee et al. 2021; MIC-DKFZ/nnUNet, its `PlainConvUNet`. Widths double from 32 to at
    most 320.
    Choice: the number of stages follows our patch (five at 96^3). All axes are halved together,
    where nnU-Net's planner stops each axis on its own and pads the patch.
    """

    def __init__(self, kind: str = "petct", patch: tuple[int, ...] = (96, 96, 96)):
        widths = [min(32 * 2**stage, 320) for stage in range(stages_of(patch))]
        super().__init__(kind, tuple(widths))


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
    return [half / sum(halves) for half in halves] + [0.0]


def loss_deep(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE at every size with the weights of nnU-Net (4/7, 2/7, 1/7, 0 for four).

    The mask is brought to a size by the nearest voxel. The term of weight 0 is there so that its
    logits have a gradient, which data-parallel training asks for.
    """
    sizes = [out.seg, *out.extra["deep"]]
    mask = batch["mask"][:, None].float()  # (B, 1, W, H, D)
    total = 0
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
    for level, blocks in enumerate((1, 2, 2, 4)):
        cout = width * 2**level
        stride = 1 if level == 0 else 2
        layers = [nn.Conv3d(cin, cout, 3, stride, padding=1, bias=False)]
        if level == 0:
            layers.append(nn.Dropout3d(0.2))
        for _ in range(blocks):
            layers.append(PreActivation(cout, bias))
        levels.append(nn.Sequential(*layers))
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
        for level, (narrow, block) in enumerate(zip(self.narrow, self.blocks, strict=True)):
            x = self.grow(narrow(x))
            if skips is not None:
                x = x + skips[-1 - level]
            x = block(x)
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
            nn.GroupNorm(8, filters),
            nn.ReLU(inplace=True),
            nn.Conv3d(filters, self.classes, 1),
        )

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        *skips, bottom = run_stages(self.encoder, images)
        return Output(self.logits(self.decoder(bottom, skips)))


class SFNet(System):
    """Segmentation beside image fusion: a second decoder weighs one modality against the other.

    Source: Liu et al. 2022; yuliu316316/SF-Net. The fused image is f = w B + (1 - w) A; the loss
    keeps the structure of A and the intensities of B.
    Choice: A is CT (FLAIR), B is PET (T1Gd), so one map w instead of one for each of two pairs; 16
    filters instead of 32; a softmax for the mask.
    """

    heads = ("seg", "extra")

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        filters = 16
        self.encoder = res_encoder(2, filters, bias=True)
        self.decoder = ResDecoder(filters, bias=True, align_corners=True)
        self.logits = nn.Conv3d(filters, self.classes, 1)
        self.fusion_decoder = ResDecoder(filters, bias=True, align_corners=True)
        self.weight = nn.Conv3d(filters, 1, 1)
        self.s = nn.Parameter(torch.zeros(()))  # the fusion loss counts e^-s

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        *skips, bottom = run_stages(self.encoder, images)
        seg = self.logits(self.decoder(bottom, skips)) if "seg" in wanted else None
        if "extra" not in wanted:
            return Output(seg)
        weight = self.weight(self.fusion_decoder(bottom)).sigmoid()  # (B, 1, W, H, D)
        return Output(seg, extra={"weight": weight, "s": self.s})


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean structural similarity of x and y (B, 1, W, H, D) with values in [0, 1].

    Means, variances and covariance are those under a Gaussian window of 11^3 with sd 1.5, only
    where it lies inside. Raises ValueError for patches with a smaller side.
    """
    size = 11
    sigma = 1.5
    if min(x.shape[2:]) < size:
        raise ValueError(f"SSIM of {tuple(x.shape)}: every side must be at least {size}")
    x = x.float()
    y = y.float()
    t = torch.arange(size, dtype=torch.float64) - size // 2
    window = torch.exp(-t.square() / (2 * sigma**2))
    window = (window / window.sum()).tolist()

    # Sums, not convolutions: a GPU may run those in TF32, too coarse for E[x^2] - E[x]^2.
    moments = torch.cat([x, y, x * x, y * y, x * y])
    for axis in (2, 3, 4):
        inside = moments.shape[axis] - size + 1
        smoothed = 0
        for offset, weight in enumerate(window):
            smoothed = smoothed + weight * moments.narrow(axis, offset, inside)
        moments = smoothed

    mx, my, xx, yy, xy = moments.chunk(5)
    c1 = 0.01**2
    c2 = 0.03**2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (luminance * structure).mean()


def loss_sfnet(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE + e^-s L_fusion + s with the learned s, A = CT and B = PET, where

    L_fusion = 2 MSE(f, B) + MSE(f, A) + 2 (1 - SSIM(f, A)) + (1 - SSIM(f, B)).
    """
    a = batch["ct"].float()
    b = batch["pet"].float()
    weight = out.extra["weight"].float()
    f = weight * b + (1 - weight) * a
    intensity = 2 * F.mse_loss(f, b) + F.mse_loss(f, a)
    structure = 2 * (1 - ssim(f, a)) + (1 - ssim(f, b))

    s = out.extra["s"]
    terms = loss_seg(out, batch, w)
    terms["fusion"] = torch.exp(-s) * (intensity + structure) + s
    return terms


# ------------------------------------------------------------------ Andrearczyk et al.


def conv_relu_norm(cin: int, cout: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv3d(cin, cout, kernel, padding=kernel // 2)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.BatchNorm3d(cout))


class Projected(nn.Module):
    """3D convolution, ReLU, batch norm, beside a 1^3 convolution with the same."""

    def __init__(self, cin: int, cout: int, kernel: int = 3):
        super().__init__()
        self.conv = conv_relu_norm(cin, cout, kernel)
        self.project = conv_relu_norm(cin, cout, kernel=1)

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
        self.down = nn.ModuleList([nn.Sequential(Projected(2, 8, kernel=7), Projected(8, 8))])
        for fine, coarse in pairwise(widths):
            stage = nn.Sequential(Projected(fine, coarse), Projected(coarse, coarse))
            self.down.append(stage)

        ups = (64, 32, 16, 8)  # widths of the decoder's stages
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(2 * w, w, 3, 2, padding=1, output_padding=1) for w in ups
        )
        self.convs = nn.ModuleList(nn.Conv3d(2 * w, w, 3, padding=1) for w in ups)
        self.full_size = nn.ModuleList(nn.Conv3d(w, 8, 1) for w in ups[:-1])

        self.logits = nn.Sequential(
            nn.Conv3d(8, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv3d(8, self.classes, 1),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(sum(widths), 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 1),
            nn.Flatten(0),
        )

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        maps = run_stages(self.down, images, pool=True)
        seg = self.decode(maps) if "seg" in wanted else None
        tumor = self.classifier(volume_averages(maps)) if "tumor" in wanted else None
        return Output(seg, tumor=tumor)

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Logits from the maps of the five stages; every decoder stage adds to the last one."""
        *skips, x = maps
        added = 0
        for level, (up, conv) in enumerate(zip(self.up, self.convs, strict=True)):
            x = torch.cat([up(x).relu(), skips[-1 - level]], dim=1)
            x = conv(x).relu()
            if level < len(self.full_size):
                coarse = self.full_size[level](x).relu()
                added = added + F.interpolate(coarse, scale_factor=8 // 2**level)
        return self.logits(x + added)


def loss_andrearczyk(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE + 0.1 L_BCE; the original's outcome is survival, its weight is not published."""
    terms = loss_seg(out, batch, w)
    terms["cls"] = 0.1 * tumor_bce(out, batch)
    return terms


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

    def __init__(self, cin: int):
        super().__init__(
            nn.BatchNorm3d(cin),
            nn.ReLU(inplace=True),
            nn.Conv3d(cin, 64, 1),
            nn.Dropout(0.05),
            nn.BatchNorm3d(64),
            nn.ReLU(inplace=True),
            nn.Conv3d(64, 16, 3, padding=1),
            nn.Dropout(0.05),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], dim=1)


class DenseNet(nn.Module):
    """Dense blocks of 4, 8, 16 layers on (B, 3, W, H, D); maps of 16, 32, 64 channels come out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv3d(3, 24, 3, stride=2),
            nn.Dropout(0.05),
            nn.MaxPool3d(3, stride=2),
        )
        self.blocks = nn.ModuleList()
        self.norms = nn.ModuleList()

        channels = 24
        for dense_layers, cout in ((4, 16), (8, 32), (16, 64)):
            layers = []
            for _ in range(dense_layers):
                layers.append(Dense(channels))
                channels += 16

            layers += [nn.BatchNorm3d(channels), nn.ReLU(inplace=True)]
            layers += [nn.Conv3d(channels, cout, 1), nn.Dropout(0.05)]
            self.blocks.append(nn.Sequential(*layers))
            self.norms.append(nn.BatchNorm3d(cout))
            channels = cout

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.first(x)
        maps = []
        for block, norm in zip(self.blocks, self.norms, strict=True):
            if maps:
                x = F.avg_pool3d(x, 2)
            x = block(x)
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
    min_side = 2 * STRIDE  # what the DenseNet, unpadded, needs for its last map
    bf16_min_side = 4 * STRIDE  # the DenseNet, unpadded, has maps of 2^3 at 48^3 too

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        widths = (8, 16, 32, 64, 128)
        self.down = nn.ModuleList(
            [
                Residual(2, 8, 2),
                Residual(8, 16, 2),
                Residual(16, 32, 3),
                Residual(32, 64, 3),
                Residual(64, 128, 4),
            ]
        )
        ups = [
            Residual(8 + 16, 8, 2),
            Residual(16 + 32, 16, 2),
            Residual(32 + 64, 32, 3),
            Residual(64 + 128, 64, 3),
        ]
        self.up = nn.ModuleList(reversed(ups))
        self.logits = nn.Conv3d(8, self.classes, 1)

        self.narrow = nn.ModuleList(conv_norm_relu(w, w // 2, kernel=1) for w in widths)
        self.dense_net = DenseNet()
        he_init(self, uniform=True)

        # 124 channels of the narrowed maps of the U-Net, 112 of the DenseNet's
        self.from_unet = nn.Sequential(nn.Dropout(0.5), nn.Linear(124, 64), nn.ReLU())
        self.from_dense_net = nn.Sequential(nn.Dropout(0.5), nn.Linear(112, 64), nn.ReLU())
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, 1), nn.Flatten(0))

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        maps = run_stages(self.down, images, pool=True)
        *skips, x = maps
        for stage, skip in zip(self.up, reversed(skips), strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1))
        seg = self.logits(x)

        tumor = self.classify(images, seg, maps) if "tumor" in wanted else None
        return Output(seg if "seg" in wanted else None, tumor=tumor)

    def classify(self, images: Tensor, seg: Tensor, maps: list[Tensor]) -> Tensor:
        """The tumour's logit (B,) from the images, the mask's logits and the encoder's maps."""
        foreground = seg.softmax(dim=1)[:, 1:].sum(dim=1, keepdim=True)  # (B, 1, W, H, D)
        dense_maps = self.dense_net(torch.cat([images, foreground], dim=1))
        unet_maps = [narrow(x) for narrow, x in zip(self.narrow, maps, strict=True)]

        from_unet = self.from_unet(volume_averages(unet_maps))  # (B, 64)
        from_dense_net = self.from_dense_net(volume_averages(dense_maps))  # (B, 64)
        return self.classifier(torch.cat([from_unet, from_dense_net], dim=1))


def loss_deepmts(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE + L_BCE, one to one as in the original with its Cox loss."""
    terms = loss_seg(out, batch, w)
    terms["cls"] = tumor_bce(out, batch)
    return terms


# ------------------------------------------------------------------ Weninger et al.


def double_relu(cin: int, cout: int) -> nn.Sequential:
    return double_conv(cin, cout, affine=False, slope=0.0)


class WeningerDecoder(nn.Module):
    """Three transposed convolutions, each followed by two convolutions, with or without skips."""

    def __init__(self, cout: int, skips: bool):
        super().__init__()
        widths = (64, 32, 16)
        self.up = nn.ModuleList()
        for w in widths:
            up = nn.ConvTranspose3d(2 * w, 2 * w, 3, 2, padding=1, output_padding=1)
            self.up.append(nn.Sequential(up, nn.InstanceNorm3d(2 * w), nn.ReLU(inplace=True)))
        self.convs = nn.ModuleList(double_relu(3 * w if skips else 2 * w, w) for w in widths)
        self.output = nn.Conv3d(16, cout, 1)

    def forward(self, x: Tensor, skips: list[Tensor] | None = None) -> Tensor:
        for level, (up, convs) in enumerate(zip(self.up, self.convs, strict=True)):
            x = up(x)
            if skips is not None:
                x = torch.cat([x, skips[-1 - level]], dim=1)
            x = convs(x)
        return self.output(x)


class Weninger(System):
    """One encoder for segmentation, reconstruction of the images and tumour classification.

    Source: Weninger et al. 2019. Its code is not public; the network is that group's earlier U-Net,
    weningerleon/BraTS2018, unet3d.py.
    Choice: 16 filters; the second decoder, without skips, reconstructs both images; the classifier
    reads the averages of the bottom (128 ReLU 1) and tells whether there is a lesion.
    """

    heads = ("seg", "ct", "btl", "tumor")

    def __init__(self, kind: str = "petct"):
        super().__init__(kind)
        self.variant = replace(self.variant, ct=CT, btl=PET)
        self.down = nn.ModuleList(double_relu(a, b) for a, b in pairwise((2, 16, 32, 64, 128)))
        self.decoder = WeningerDecoder(self.classes, skips=True)
        self.rec_decoder = WeningerDecoder(2, skips=False)
        self.classifier = nn.Sequential(
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 1),
            nn.Flatten(0),
        )

    def compute(self, images: Tensor, wanted: tuple[str, ...]) -> Output:
        *skips, bottom = run_stages(self.down, images, pool=True)

        outputs = {}
        if "seg" in wanted:
            outputs["seg"] = self.decoder(bottom, skips)
        if "ct" in wanted or "btl" in wanted:
            images = self.rec_decoder(bottom)  # (B, 2, W, H, D)
            outputs["ct"] = images[:, :1]
            outputs["btl"] = images[:, 1:]
        if "tumor" in wanted:
            outputs["tumor"] = self.classifier(volume_averages([bottom]))
        return Output(**outputs)


def loss_weninger(out: Output, batch: dict, w) -> Terms:
    """L_DiceCE + 0.1 MSE over both images + 0.1 L_BCE (supplement, Sec. 3)."""
    terms = loss_seg(out, batch, w)
    terms["rec_ct"] = 0.1 * reconstruction(batch["ct"], out.ct, "mse") / 2
    terms["rec_pet"] = 0.1 * reconstruction(batch["pet"], out.btl, "mse") / 2
    terms["cls"] = 0.1 * tumor_bce(out, batch)
    return terms


# ------------------------------------------------------------------ Valindria et al.


class Valindria(System):
    """One branch per modality with a shared bottom, trained on one modality per step.

    Source: Valindria et al. 2018, whose code is not public; Sec. 4.2 and the released code.
    Choice: the branches of v4 with L = {5}; a training step draws its modality with
    probability 1/2; otherwise the mask is the mean of both branches' logits.
    norm: "shared" or "private" batch norms in the shared layer, as in MirrorUNet.
    """

    heads = ("seg", "ct", "pet")
    scored_branches = ("ct", "pet")
    one_branch_per_step = True

    def __init__(self, kind: str = "petct", norm: str = "shared"):
        super().__init__(kind)
        self.variant = replace(self.variant, ct=self.variant.pet)
        pet = unet_layers()
        ct = unet_layers()
        ct[4] = share(pet[4], private_norm=norm == "private")
        self.pet = nn.ModuleList([*pet, output_layer(CHANNELS, self.variant.pet)])
        self.ct = nn.ModuleList([*ct, output_layer(CHANNELS, self.variant.ct)])

    def step_options(self, number: int) -> dict:
        return {"branch": self.scored_branches[number % 2]}

    def compute(self, images: Tensor, wanted: tuple[str, ...], branch: str = "") -> Output:
        """branch: "ct" or "pet" runs that branch only, and its logits are `seg`."""
        inputs = {}
        for name, image in zip(("ct", "pet"), images.split(1, dim=1), strict=True):
            if branch in ("", name) and ("seg" in wanted or name in wanted):
                inputs[name] = image

        branches = {"ct": self.ct, "pet": self.pet}
        maps = encode(branches, inputs)
        outputs = decode(branches, maps[5], maps)
        if "seg" in wanted:
            outputs["seg"] = sum(outputs.values()) / len(outputs)
        return Output(**outputs)


# ------------------------------------------------------------------ the table of systems


class SystemRow(NamedTuple):
    """A compared system: how a resolved config.Config builds it, and its loss.

    options: those of its network or loss that most systems lack.
    """

    build: Callable[[object], System]
    loss: Callable = loss_seg
    options: tuple[str, ...] = ()


SYSTEMS = {
    # Table 3
    "ct": SystemRow(lambda c: UNet(c.kind, channels=(0,))),
    "pet": SystemRow(lambda c: UNet(c.kind, channels=(1,))),
    "early_fusion": SystemRow(lambda c: UNet(c.kind)),
    "middle_fusion": SystemRow(lambda c: MiddleFusion(c.kind)),
    # Table 4
    "nnunet": SystemRow(lambda c: NNUNet(c.kind, c.patch), loss_deep),
    "blackbean": SystemRow(lambda c: Blackbean(c.kind), loss_deep),
    "sfnet": SystemRow(lambda c: SFNet(c.kind), loss_sfnet),
    "andrearczyk": SystemRow(lambda c: Andrearczyk(c.kind), loss_andrearczyk, ("class_label",)),
    "deepmts": SystemRow(lambda c: DeepMTS(c.kind), loss_deepmts, ("class_label",)),
    "weninger": SystemRow(lambda c: Weninger(c.kind), loss_weninger, ("class_label",)),
    "valindria": SystemRow(lambda c: Valindria(c.kind, c.norm), options=("norm",)),
    # Table 5
    "segresnet": SystemRow(lambda c: SegResNet(c.kind)),
}


class OneModality(NamedTuple):
    """Mirror U-Net with one modality in both places, in training and in evaluation (Table 4)."""

    version: str
    modality: str


ONE_MODALITY = {
    "v3_ct_only": OneModality("v3", "ct"),
    "v3_pet_only": OneModality("v3", "pet"),
}
