"""The compared systems against the sizes, values and losses of their own public code."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

import data
import eval as evaluation
import mirror_unet
import plots
import train
from baselines import (
    LATE_FUSIONS,
    ONE_MODALITY,
    SYSTEMS,
    Blackbean,
    NNUNet,
    ResDecoder,
    ResEncoder,
    SegResNet,
    UNet,
    Valindria,
    stages_of,
)
from data import Case, UserError
from losses import Batch, deep_weights, dice_ce, fuse, loss_deep, loss_sfnet, ssim
from mirror_unet import Output, decide, margins

torch.set_num_threads(1)  # tensors are small: more threads only wait for each other

# Parameters for PET/CT (two classes) and MRI (three), at 96^3. From MONAI 1.6.1: the U-Nets, early
# fusion, blackbean_released, segresnet; from dynamic_network_architectures 0.4.4: nnunet and
# blackbean; from the systems' own code: sfnet, andrearczyk and deepmts, see below. The others are
# sums over their layers.
COUNTS = {
    "ct": (4_808_917, 4_809_920),
    "pet": (4_808_917, 4_809_920),
    "early_fusion": (4_809_781, 4_810_784),
    "middle_fusion": (9_401_903, 9_403_338),
    "nnunet": (16_548_456, 16_548_940),
    "blackbean": (22_583_016, 22_583_500),
    "blackbean_released": (7_913_738, 7_915_467),
    "sfnet": (5_004_948, 5_004_965),
    "andrearczyk": (1_546_627, 1_546_636),  # with one output channel 1,546,618, and 9 for another
    "deepmts": (3_709_671, 3_709_680),
    "weninger": (3_074_053, 3_074_070),
    "valindria": (6_929_064, 6_931_070),  # Mirror U-Net v4 with L = {5}, less θ
    "segresnet": (4_701_346, 4_701_363),
}
FILLED = {"nnunet": {"deep"}, "blackbean": {"deep"}, "sfnet": {"weight", "s"}}  # of `extra`
OTHERS = {  # fields beside `seg`, with their channels; tumor is one logit per sample
    "andrearczyk": {"tumor": 0},
    "deepmts": {"tumor": 0},
    "weninger": {"ct_rec": 1, "pet_rec": 1, "tumor": 0},
    "valindria": {"ct_seg": 2, "pet_seg": 2},
}
CLASSES = {"petct": 2, "mri": 3}
SIDES = (32, 32, 32)
LIGHT = [name for name in SYSTEMS if name != "blackbean"]  # that is nnunet with more channels


def build_system(name, kind="petct", patch=(96, 96, 96)):
    return SYSTEMS[name].build(SimpleNamespace(kind=kind, patch=patch, norm="shared"))


def sizes_only(name, kind="petct", patch=(96, 96, 96)):
    with torch.device("meta"):
        return build_system(name, kind, patch)


def size(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def sides_of(name):
    return (32, 16, 16) if sizes_only(name, patch=(32, 16, 16)).least <= 16 else SIDES


def net_of(name, kind="petct"):
    torch.manual_seed(0)
    return build_system(name, kind, sides_of(name))


def wave(phase, sides, batch=2):
    t = torch.arange(batch * math.prod(sides), dtype=torch.float64)
    return ((torch.sin(0.37 * t + phase) + 1) / 2).float().reshape(batch, 1, *sides)


def images(name):
    return wave(0.0, sides_of(name)), wave(1.0, sides_of(name))


def batch_of(ct, pet, classes=2):
    mask = (torch.arange(ct.numel()) // 7 % 11 % classes).reshape(ct.shape)[:, 0]
    return Batch(ct, pet, mask, torch.tensor([1.0, 0.0]))


def fill(net):
    """Weights that no random generator decides."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            values = torch.sin(1.3 * torch.arange(p.numel(), dtype=torch.float64) + i)
            scaled = values * math.sqrt(2 / p[0].numel()) if p.dim() > 1 else 0.5 + 0.2 * values
            p.copy_(scaled.reshape(p.shape))
    return net


def trained(module):
    """Whether any of its parameters has a gradient other than zero."""
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


# Sizes


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_its_size(name):
    assert tuple(size(sizes_only(name, kind)) for kind in CLASSES) == COUNTS[name]


def test_nnunet_has_a_stage_per_halving_of_the_patch():
    cubes = {32: 4, 48: 4, 64: 5, 80: 5, 96: 5, 112: 5, 128: 6, 144: 5, 160: 6, 192: 6, 256: 7}
    assert {side: stages_of((side,) * 3) for side in cubes} == cubes
    assert stages_of((224, 224, 144)) == 5  # 144 does not divide by 32
    assert stages_of((128, 96, 128)) == 5
    # dynamic_network_architectures: 31,196,458 for 2 -> 2 and 805 for each class more, so that
    # 2 -> 4 has 31,198,068; 805 is the five decoder widths and a bias for each
    assert size(sizes_only("nnunet", "petct", (128, 128, 128))) == 31_196_458
    assert size(sizes_only("nnunet", "mri", (128, 128, 128))) == 31_196_458 + 805
    assert 31_196_458 + 2 * 805 == 31_198_068


def test_segresnet_has_the_sizes_of_monai_with_four_modalities():
    with torch.device("meta"):
        for filters, count in ((16, 4_702_227), (32, 18_798_627)):
            net = SegResNet("mri", filters)
            net.encoder = ResEncoder(4, filters, bias=False)
            assert size(net) == count


def test_sfnet_has_the_size_of_its_own_code():
    # SFNet.py: 32 filters, three modalities in, three sigmoids and two fusion maps out
    with torch.device("meta"):
        decoders = [ResDecoder(32, bias=True, align_corners=True) for _ in range(2)]
        heads = [nn.Conv3d(32, 3, 1), nn.Conv3d(32, 2, 1)]
        assert size(ResEncoder(3, 32, bias=True), *decoders, *heads) == 20_007_109


def test_deepmts_has_the_sizes_of_its_own_code():
    net = sizes_only("deepmts")
    assert size(net.down, net.up, net.logits) == 2_664_066
    assert size(net) == 3_709_671


# What all have in common


@pytest.mark.parametrize(
    ("name", "kind"), [(n, "petct") for n in SYSTEMS] + [(n, "mri") for n in LIGHT]
)
def test_a_step_fills_the_fields_and_trains_every_parameter(name, kind):
    net, (ct, pet), classes = net_of(name, kind), images(name), CLASSES[kind]
    out = net(ct, pet)
    expected = {"seg": classes} | OTHERS.get(name, {})
    expected |= {f: classes for f in expected if f.endswith("_seg")}
    for field, value in out._asdict().items():
        if field in expected:
            channels = expected[field]
            assert value.shape == ((2, channels, *ct.shape[2:]) if channels else (2,)), field
        elif field == "extra":
            assert set(value or {}) == FILLED.get(name, set())
        else:
            assert value is None, field
    assert set(net.heads) == set(expected) | ({"extra"} if name in FILLED else set())
    assert net.variant.classes == (("lesion",) if kind == "petct" else ("edema", "core"))
    assert net.variant.tumor == ("tumor" in expected)

    terms = SYSTEMS[name].loss(out, batch_of(ct, pet, classes), None)
    sum(terms.values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", LIGHT)
def test_the_mask_alone_equals_the_full_pass(name):
    net, (ct, pet) = net_of(name).eval(), images(name)
    with torch.inference_mode():
        full, alone = net(ct, pet), net(ct, pet, heads=("seg",))
        assert torch.equal(alone.seg, full.seg)
        others = set(net.heads) - {"seg", "ct_seg", "pet_seg"}
        assert all(getattr(alone, field) is None for field in others)
        for field in others:
            value = getattr(net(ct, pet, heads=(field,)), field)
            if field != "extra":
                assert torch.equal(value, getattr(full, field))
    present = decide(margins(alone.seg)[0], net.variant)
    assert torch.equal(present[0], alone.seg[0].argmax(0) == 1)


@pytest.mark.parametrize("name", SYSTEMS)
def test_patches_that_do_not_fit_are_refused(name):
    net = sizes_only(name)
    odd, small = net.stride + net.stride // 2, net.least - net.stride
    for bad in ((net.least, net.least, odd), (net.least, small, net.least)):
        with pytest.raises(ValueError, match=f"divide by {net.stride}"):
            net(torch.zeros(1, 1, *bad), torch.zeros(1, 1, *bad))
    ct, pet = wave(0.0, (64, 64, 64), 1), wave(0.0, (64, 64, 32), 1)
    with pytest.raises(ValueError, match="same shape"):
        net(ct, pet)


def test_nnunet_of_six_stages_says_what_it_needs():
    net = sizes_only("nnunet", patch=(128, 128, 128))
    with pytest.raises(ValueError, match="divide by 32 and are at least 64"):
        net(torch.zeros(1, 1, 96, 96, 48), torch.zeros(1, 1, 96, 96, 48))


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="middle_fusion"):
        train.resolve(train.Config(version="unet"), "petct", False)
    with pytest.raises(ValueError, match=r"'ct'.*petct, mri"):
        build_system("pet", "ct")
    assert set(COUNTS) <= set(SYSTEMS)


# MONAI 1.6.1: UNet(3, 2, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch");
# UNet(3, 2, 2, (32, 64, 128, 256, 512), (2, 2, 2, 2), num_res_units=0, norm="instance");
# SegResNet(3, 16, 2, 3, dropout_prob=0.2). dynamic_network_architectures 0.4.4: PlainConvUNet with
# widths 32-64-128-256. Each was given the weights of fill() and ran once in training mode, then in
# eval mode, which is compared.
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("pet", "petct", [1.209627, 1.284988, 1.114496, 1.125401, 1.356290]),
        ("early_fusion", "petct", [1.105591, 1.215678, 1.303514, 1.106546, 0.944894]),
        ("early_fusion", "mri", [1.101930, 1.801966, 0.500982, 1.377795, 2.355477]),
        ("blackbean_released", "petct", [-1.476083, 2.568176, 0.888685, -2.821692, 0.309076]),
        ("nnunet", "petct", [-0.028564, -0.165499, 0.022957, -0.025459, -0.098975]),
        ("segresnet", "mri", [0.855106, 0.611982, 0.451815, 0.586395, 0.527981]),
    ],
)
def test_values_of_the_public_networks(name, kind, expected):
    net, ct, pet = fill(build_system(name, kind, SIDES)), wave(0.0, SIDES), wave(1.0, SIDES)
    with torch.inference_mode():
        net(ct, pet)  # in training mode, for the batch norms' running statistics
        seg = net.eval()(ct, pet).seg
    voxels = [(0, 0, 0), (3, 7, 11), (16, 20, 16), (31, 0, 5), (20, 29, 30)]
    found = [seg[1, -1][voxel].item() for voxel in voxels]
    assert found == pytest.approx(expected, abs=1e-4)


# Table 3


@pytest.mark.parametrize(
    ("name", "sees"),
    [("ct", {"ct"}), ("pet", {"pet"})]
    + [(name, {"ct", "pet"}) for name in LIGHT if name not in ("ct", "pet")],
)
def test_the_mask_sees_what_it_should(name, sees):
    net = net_of(name).eval()
    inputs = dict(zip(("ct", "pet"), (x.requires_grad_() for x in images(name)), strict=True))
    net(**inputs).seg[:, 1].sum().backward()
    assert {n for n, x in inputs.items() if x.grad is not None and x.grad.any()} == sees


def test_early_fusion_is_the_single_branch_with_one_more_channel():
    one, two = UNet(images=("pet",)), UNet()
    shapes = [[p.shape for p in net.parameters()] for net in (one, two)]
    differ = [a for a, b in zip(*shapes, strict=True) if a != b]
    assert differ == [(16, 1, 3, 3, 3)] * 2  # the first convolution and its shortcut


def test_middle_fusion_joins_the_bottoms_and_every_skip():
    net, (ct, pet) = net_of("middle_fusion").eval(), images("middle_fusion")
    assert [layer.up[0].in_channels for layer in net.decoder] == [768, 192, 96, 48]
    seen = []
    for layer in net.decoder:
        layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    net(ct, pet)
    for x, own in zip(seen, (128, 64, 32, 16), strict=True):
        with torch.no_grad():
            assert torch.equal(x[:, :own], skip_of(net.ct, ct, own))
            assert torch.equal(x[:, own : 2 * own], skip_of(net.pet, pet, own))


def skip_of(layers, x, width):
    for layer in layers:
        x = layer(x)
        if x.shape[1] == width:
            return x
    raise AssertionError(width)


# nnU-Net and Blackbean


@pytest.mark.parametrize(
    ("outputs", "weights"),
    [
        (2, [1, 0]),
        (3, [2 / 3, 1 / 3, 0]),
        (4, [4 / 7, 2 / 7, 1 / 7, 0]),
        (5, [8 / 15, 4 / 15, 2 / 15, 1 / 15, 0]),
    ],
)
def test_deep_supervision_weights(outputs, weights):
    assert deep_weights(outputs) == pytest.approx(weights)
    assert sum(deep_weights(outputs)) == pytest.approx(1)


def test_deep_supervision_outputs_halve_in_size():
    net = NNUNet(patch=(64, 64, 64))
    with torch.inference_mode():
        out = net.eval()(wave(0.0, (64, 32, 32), 1), wave(1.0, (64, 32, 32), 1))
    shapes = [tuple(x.shape) for x in (out.seg, *out.extra["deep"])]
    assert shapes == [(1, 2, 64 // s, 32 // s, 32 // s) for s in (1, 2, 4, 8)]


def test_deep_supervision_compares_every_size_with_the_nearest_voxel():
    mask = (torch.arange(2 * 8**3) * 7 % 11 % 2).reshape(2, 8, 8, 8)
    logits = [3 * torch.sin(0.7 * torch.arange(4 * n**3)).reshape(2, 2, n, n, n) for n in (8, 4, 2)]
    out = Output(logits[0], extra={"deep": tuple(logits[1:])})
    found = loss_deep(out, Batch(None, None, mask, None), None)["seg"]
    half = mask[:, 1::2, 1::2, 1::2]  # the voxels nearest to the centres of the coarse ones
    expected = 2 / 3 * dice_ce(mask, logits[0]) + 1 / 3 * dice_ce(half, logits[1])
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_blackbean_is_nnunet_with_five_stages_up_to_512():
    with torch.device("meta"):
        ours, plain = Blackbean(), NNUNet(patch=(96, 96, 96))
    assert [stage[0].out_channels for stage in ours.down] == [32, 64, 128, 256, 512]
    assert [stage[0].out_channels for stage in plain.down] == [32, 64, 128, 256, 320]
    wide = [stage[0].out_channels for stage in sizes_only("nnunet", patch=(128,) * 3).down]
    assert wide == [32, 64, 128, 256, 320, 320]


def test_blackbean_as_released_has_one_convolution_per_layer():
    layers = sizes_only("blackbean_released").layers
    convs = [m for m in layers.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
    assert [m.out_channels for m in convs] == [32, 64, 128, 256, 512, 128, 64, 32, 2]
    assert {m.kernel_size for m in convs} == {(3, 3, 3)}


# SF-Net


def test_ssim_of_an_image_with_itself_is_1():
    x = torch.rand(2, 1, 13, 12, 14, generator=torch.Generator().manual_seed(0))
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-6)
    assert ssim(x, 1 - x).item() < 0


# MONAI 1.6.1: SSIMMetric(3, data_range=span, win_size=11, kernel_sigma=1.5) gives the same values.
@pytest.mark.parametrize(("span", "monai"), [(1.0, 0.743385), (2.0, 0.746377)])
def test_ssim_equals_gaussian_filters(span, monai):
    x, y = (wave(phase, (13, 12, 14))[:, 0].double().numpy() for phase in (0.0, 1.0))
    y = 0.7 * y + 0.3 * x**2

    def mean(z):  # a window of 11 reaches 5 voxels, so those at the rim are left out
        return np.stack([gaussian_filter(s, 1.5, truncate=3.5)[5:-5, 5:-5, 5:-5] for s in z])

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    tensors = [torch.from_numpy(z[:, None]) for z in (x, y)]
    found = ssim(*tensors, span=span).item()
    assert found == pytest.approx(expected.mean(), abs=1e-5)
    assert found == pytest.approx(monai, abs=1e-5)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 1, 10, 16, 16), torch.zeros(1, 1, 10, 16, 16))


def test_the_fused_image_is_b_where_the_weight_is_1_and_a_where_it_is_0():
    weight, a, b = torch.tensor([1.0, 0.0, 0.25]), torch.tensor([0.2] * 3), torch.tensor([0.6] * 3)
    assert fuse(weight, a, b).tolist() == pytest.approx([0.6, 0.2, 0.25 * 0.6 + 0.75 * 0.2])


def test_the_fusion_loss_of_sfnet():
    ct, pet = wave(0.0, (12, 12, 12)), 0.5 * wave(1.0, (12, 12, 12)) ** 2
    batch, s = batch_of(ct, pet), torch.tensor(0.5)
    seg = torch.zeros(2, 2, 12, 12, 12)

    def mse(x, y):
        return (x - y).square().mean().item()

    def unlike(x, y):
        return 1 - ssim(x, y).item()

    f = 0.25 * pet + 0.75 * ct
    between = 2 * mse(f, pet) + mse(f, ct) + 2 * unlike(f, ct) + unlike(f, pet)
    expected = {
        1.0: mse(pet, ct) + 2 * unlike(pet, ct),  # f = PET
        0.0: 2 * mse(pet, ct) + unlike(pet, ct),  # f = CT
        0.25: between,
    }
    for w, fusion in expected.items():
        out = Output(seg, extra={"weight": torch.full_like(ct, w), "s": s})
        terms = loss_sfnet(out, batch, None)
        assert set(terms) == {"seg", "fusion"}
        assert terms["fusion"].item() == pytest.approx(math.exp(-0.5) * fusion + 0.5, abs=1e-5)
        assert terms["seg"].item() == pytest.approx(dice_ce(batch.mask, seg).item())


def test_the_fusion_weight_of_sfnet_is_a_sigmoid_and_s_starts_at_0():
    net, (ct, pet) = net_of("sfnet").eval(), images("sfnet")
    with torch.inference_mode():
        net.weight.weight.zero_()
        net.weight.bias.fill_(math.log(3))
        extra = net(ct, pet).extra
    assert torch.allclose(extra["weight"], torch.full_like(ct, 0.75))
    assert extra["s"].item() == 0 and net.s.requires_grad


def test_only_the_segmentation_decoder_of_sfnet_has_skips():
    net, (ct, pet) = net_of("sfnet").eval(), images("sfnet")
    first, *below = net.encoder.levels
    skips = []
    first.register_forward_hook(lambda _, __, x: skips.append(x))
    for level in below:  # cut the other way from the full-size map to the decoders
        level.register_forward_hook(lambda _, __, x: x.detach())
    out = net(ct, pet)
    for logits, reaches in ((out.seg, True), (out.extra["weight"], False)):
        gradient = torch.autograd.grad(logits.sum(), skips[0], allow_unused=True)[0]
        assert (gradient is not None) == reaches


# The systems with a classifier


@pytest.mark.parametrize(
    ("name", "weight"), [("andrearczyk", 0.1), ("deepmts", 1), ("weninger", 0.1)]
)
def test_the_weight_of_the_classification(name, weight):
    ct, pet = wave(0.0, (4, 4, 4)), wave(1.0, (4, 4, 4))
    out = Output(torch.zeros(2, 2, 4, 4, 4), ct + 0.5, pet - 0.2, torch.tensor([2.0, -1.0]))
    terms = SYSTEMS[name].loss(out, batch_of(ct, pet), None)
    bce = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert terms.pop("cls").item() == pytest.approx(weight * bce, rel=1e-5)
    assert terms.pop("seg").item() == pytest.approx(dice_ce(batch_of(ct, pet).mask, out.seg).item())
    if name == "weninger":  # 0.1 times the mean over both images
        assert terms.pop("rec_ct").item() == pytest.approx(0.1 * 0.25 / 2, rel=1e-5)
        assert terms.pop("rec_pet").item() == pytest.approx(0.1 * 0.04 / 2, rel=1e-5)
    assert terms == {}


def test_the_classifier_of_andrearczyk_reads_every_encoder_stage_and_no_decoder():
    net, (ct, pet) = net_of("andrearczyk").eval(), images("andrearczyk")
    assert net.classifier[1].in_features == 8 + 16 + 32 + 64 + 128
    assert [stage[0].conv[0].kernel_size[0] for stage in net.down] == [7, 3, 3, 3, 3]
    seen = []
    net.classifier.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    net(ct, pet, heads=("tumor",)).tumor.sum().backward()
    assert seen[0].shape == (2, 248)
    assert all(trained(stage) for stage in net.down)
    assert not any(trained(part) for part in (net.up, net.convs, net.full_size, net.logits))


def test_coarse_stages_of_andrearczyk_add_to_the_last_one():
    net, (ct, pet) = net_of("andrearczyk").eval(), images("andrearczyk")
    seen = []
    net.logits.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.inference_mode():
        for p in net.convs[-1].parameters():
            p.zero_()
        for keep, factor in ((0, 8), (1, 4), (2, 2)):
            for i, conv in enumerate(net.full_size):
                conv.bias.fill_(1.0 if i == keep else -1e9)
            net(ct, pet)
            x = seen.pop()[:, :, :8, :8, :8]
            blocks = x[:, :, ::factor, ::factor, ::factor]
            for axis in (2, 3, 4):
                blocks = blocks.repeat_interleave(factor, axis)
            assert torch.equal(x, blocks) and x.any()
            finer = x[:, :, :: factor // 2, :: factor // 2, :: factor // 2]
            assert factor == 8 or len(finer.flatten().unique()) > 8


def test_the_outcome_of_deepmts_reaches_its_mask():
    net, (ct, pet) = net_of("deepmts").eval(), images("deepmts")
    net(ct, pet, heads=("tumor",)).tumor.sum().backward()
    assert trained(net.logits) and trained(net.up)


def test_the_classifier_of_deepmts_sees_the_probability_of_the_foreground():
    net, (ct, pet) = net_of("deepmts", "mri").eval(), images("deepmts")
    seen = []
    net.dense_net.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.inference_mode():
        seg = net(ct, pet).seg
    assert torch.equal(seen[0][:, :2], torch.cat([ct, pet], dim=1))
    assert torch.allclose(seen[0][:, 2], 1 - seg.softmax(dim=1)[:, 0], atol=1e-6)


def test_weninger_reconstructs_both_images_from_the_bottom_alone():
    net, (ct, pet) = net_of("weninger").eval(), images("weninger")
    widths = [convs[0].in_channels for convs in net.rec_decoder.convs]
    assert widths == [128, 64, 32]
    assert [convs[0].in_channels for convs in net.decoder.convs] == [192, 96, 48]
    bottoms = []
    net.down[-1].register_forward_hook(lambda _, __, x: bottoms.append(x))
    out = net(ct, pet)
    rec = net.rec_decoder(bottoms[0])
    assert torch.equal(torch.cat([out.ct_rec, out.pet_rec], dim=1), rec)
    (out.tumor.sum() + out.ct_rec.sum()).backward()
    assert trained(net.down) and not trained(net.decoder)


# Valindria et al.


@pytest.mark.parametrize(("branch", "other"), [("ct", "pet"), ("pet", "ct")])
def test_a_step_of_valindria_leaves_the_other_branch_alone(branch, other):
    net, (ct, pet) = net_of("valindria"), images("valindria")
    out = net(ct, pet, branch=branch)
    assert torch.equal(out.seg, getattr(out, f"{branch}_seg"))
    assert getattr(out, f"{other}_seg") is None
    sum(SYSTEMS["valindria"].loss(out, batch_of(ct, pet), None).values()).backward()
    shared = {id(p) for p in net.shared_parameters()}
    assert sum(p.numel() for p in net.shared_parameters()) == 2_688_770
    assert all(p.grad is not None for p in getattr(net, branch).parameters())
    private = [p for p in getattr(net, other).parameters() if id(p) not in shared]
    assert private and all(p.grad is None for p in private)


def test_the_mask_of_valindria_is_the_mean_of_its_branches():
    net, (ct, pet) = net_of("valindria").eval(), images("valindria")
    with torch.inference_mode():
        out = net(ct, pet)
        alone = [net(ct, pet, branch=name).seg for name in ("ct", "pet")]
    assert torch.equal(out.ct_seg, alone[0]) and torch.equal(out.pet_seg, alone[1])
    assert torch.allclose(out.seg, (alone[0] + alone[1]) / 2)


def test_valindria_shares_its_bottom_and_may_keep_the_norms_apart():
    net = Valindria()
    assert [a is b for a, b in zip(net.ct, net.pet, strict=True)] == [i == 4 for i in range(9)]
    apart = Valindria(norm="private")
    assert apart.ct[4] is not apart.pet[4]
    assert apart.ct[4].shortcut is apart.pet[4].shortcut
    norms = [m for m in apart.ct[4].modules() if isinstance(m, nn.BatchNorm3d)]
    assert {id(m) for m in norms}.isdisjoint(id(m) for m in apart.pet[4].modules())


def test_valindria_trains_one_modality_per_step():
    net, (ct, pet) = net_of("valindria"), images("valindria")
    options = [net.step_options(train.step_seed(0, 0, step)) for step in range(40)]
    assert 10 <= sum(o == {"branch": "ct"} for o in options) <= 30
    out = net(ct, pet, **options[0])
    assert (out.ct_seg is None) != (out.pet_seg is None)
    assert SYSTEMS["ct"].build(SimpleNamespace(kind="petct")).step_options(1) == {}


# The commands: every system trains, goes on, is tested and predicts like v1-v4.


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("systems")
    data.write_phantom(root / "data", patients=6)
    return root


@pytest.fixture(scope="module")
def quiet_figures():
    with pytest.MonkeyPatch.context() as patch:  # they have their own tests
        patch.setattr(plots, "curves", lambda *args: None)
        patch.setattr(plots, "examples", lambda *args: None)
        patch.setattr(plots, "tensorboard", lambda *args: None)
        yield


def config_of(root, version, **more):
    least = 32 if version[:5] in ("nnune", "black", "deepm") else 16
    options = dict(
        data=str(root / "data"), cache=str(root / "cache"), out=str(root / "runs" / version),
        device="cpu", amp="none", threads=1, workers=0, epochs=1, steps=1, batch_size=2,
        patch=(least, least, least), spacing=(18.0, 18.0, 18.0), folds=3, val_every=9,
    )  # fmt: skip
    return train.Config(version=version, **options | more)


ROWS = [*SYSTEMS, *ONE_MODALITY, "v3"]


@pytest.fixture(scope="module")
def system_runs(cohort, quiet_figures):
    """A run of one step for every row of the tables; their folder."""
    for version in ROWS:
        train.train(config_of(cohort, version))
    return cohort / "runs"


@pytest.mark.parametrize("version", ROWS)
def test_every_system_goes_on_is_evaluated_and_predicts(system_runs, cohort, version, tmp_path):
    run = system_runs / version
    result = train.train(config_of(cohort, version, epochs=2, resume=True))
    assert result["epochs"] == 2 and not np.isnan(result["test"]["fpv_ml"])
    assert len(pd.read_csv(run / "metrics.csv")) == 2
    study = sorted((cohort / "data").glob("PETCT_*/*"))[0]
    evaluation.run_command([str(run), "--predict", str(study), "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*.nii.gz"))) == 1


def margins_of(run, case):
    model, config, device, _ = evaluation.load_run(run, "best", {})
    return evaluation.infer(model, case.load("images"), config, device)[0]


@pytest.mark.parametrize("mode", LATE_FUSIONS)
def test_late_fusion_is_what_its_name_says(system_runs, cohort, mode):
    """Against the two runs' own masks on the cached grid, and its results on the studies' own."""
    evaluation.run_command(
        [str(system_runs / "ct"), str(system_runs / "pet"), "--late-fusion", mode]
    )
    rows = pd.read_csv(system_runs / f"late_fusion_{mode}" / "test_studies.csv")
    _, cases = train.open_data(config_of(cohort, "ct"), lambda text: None)
    case = next(c for c in cases if c.name == rows["study"][0])
    ct, pet = (margins_of(system_runs / name, case) for name in ("ct", "pet"))
    variant = mirror_unet.VARIANTS["petct"]["v1"]
    fused = evaluation.fuse_late(ct, pet, mode, variant) > 0
    masks = {"union": (ct > 0) | (pet > 0), "intersection": (ct > 0) & (pet > 0)}
    assert np.array_equal(fused, masks.get(mode, ct + pet > 0)[0])
    own = {
        name: data.to_native(case.meta, m, lambda m: (m[0] > 0).astype(np.uint8)) > 0
        for name, m in (("ct", ct), ("pet", pet))
    }
    native = {"union": own["ct"] | own["pet"], "intersection": own["ct"] & own["pet"]}
    if mode in native:
        ml = np.abs(np.linalg.det(np.array(case.meta["native_affine"])[:3, :3])) / 1000
        assert rows["mtv_pred_ml"][0] == pytest.approx(native[mode].sum() * ml)


# Margins of four voxels (CT +, PET +), (+, -), (-, +), (-, -); the sum is decided by the larger.
CT_MARGIN, PET_MARGIN = np.array([1.0, 1, -3, -1]), np.array([2.0, -3, 1, -2])


@pytest.mark.parametrize(
    "mode, expected",
    [("logits", [1, 0, 0, 0]), ("union", [1, 1, 1, 0]), ("intersection", [1, 0, 0, 0])],
)
def test_late_fusion_of_known_margins(mode, expected):
    pair = [m.reshape(1, 4, 1, 1) for m in (CT_MARGIN, PET_MARGIN)]
    variant = mirror_unet.VARIANTS["petct"]["v1"]
    assert evaluation.fuse_late(*pair, mode, variant).ravel().tolist() == expected
    weaker = pair[0], pair[1] / 10  # now CT's 1 outweighs PET's -0.3: only the sum changes
    expected = [1, 1, 0, 0] if mode == "logits" else expected
    assert evaluation.fuse_late(*weaker, mode, variant).ravel().tolist() == expected


def test_late_fusion_of_two_classes_is_that_of_the_masks():
    """One voxel, edema by one network and core by the other: union has both, intersection none."""
    a, b = (np.array(m).reshape(2, 1, 1, 1) for m in ([2.0, 1.0], [1.0, 2.0]))
    variant = mirror_unet.VARIANTS["mri"]["v2-rec"]
    assert evaluation.fuse_late(a, b, "union", variant).item() == 3
    assert evaluation.fuse_late(a, b, "intersection", variant).item() == 0


@pytest.mark.parametrize("version, slot", [("v3_ct_only", 0), ("v3_pet_only", 1)])
def test_one_modality_fills_both_places(system_runs, cohort, version, slot):
    """The mask does not move with the modality that is left out, in evaluation either."""
    _, cases = train.open_data(config_of(cohort, version), lambda text: None)
    image = np.array(cases[0].load("images"), np.float32)
    other, same = image.copy(), image.copy()
    other[1 - slot] = 0.5
    same[slot] = image[slot][::-1]
    run = [Case(cases[0].meta, arrays={"images": x}) for x in (image, other, same)]
    first, without, changed = (margins_of(system_runs / version, case) for case in run)
    assert np.array_equal(first, without) and not np.allclose(first, changed)


def test_the_papers_table_names_what_is_missing(system_runs, tmp_path):
    text = evaluation.write_paper_table(3, system_runs, tmp_path)
    titles = [line.split("|")[1].strip() for line in text.splitlines()[2:-2]]
    assert titles[:4] == ["CT", "PET", "EF", "MF"] and titles[-1] == "Ablation (v4)"
    assert "not run: v1, v2, v4" in text
    table = pd.read_csv(tmp_path / "table3.csv").set_index("system")
    frame = pd.read_csv(system_runs / "pet" / "test_studies.csv")
    ill = frame[frame["has_lesion"]]
    assert table.loc["pet", "dice"] == pytest.approx(100 * ill["dice"].mean())
    assert table.loc["pet", "fpv_ml_n"] == len(frame) and table.loc["pet", "dice_paper"] == 60.99
    assert (tmp_path / "table3.md").read_text() == text + "\n"
    assert "different studies" not in text and table["dice_p_n"].max() == len(ill)


def test_the_papers_table_keeps_runs_apart(system_runs, tmp_path):
    """Own recipes, MRI, one modality and other test studies take no row that is not theirs."""

    def copy(source, name, **changes):
        shutil.copytree(system_runs / source, tmp_path / name)
        record = json.loads((tmp_path / name / "config.json").read_text())
        record["config"] |= changes
        (tmp_path / name / "config.json").write_text(json.dumps(record))

    copy("v3", "v3")
    copy("v3", "mri", kind="mri")
    copy("v3", "ct alone", modality="ct")
    copy("nnunet", "own", recipe="own")
    table, notes = evaluation.paper_table(4, tmp_path)
    rows = table.set_index("system")["run"]
    assert rows["v3"] == str(tmp_path / "v3") and rows["nnunet"] == ""
    assert rows["v3_ct_only"] == str(tmp_path / "ct alone")
    assert rows["nnunet own"] == str(tmp_path / "own") and len(notes) == 1
    copy("v3", "again")
    studies = tmp_path / "own" / "test_studies.csv"
    pd.read_csv(studies)[:-1].to_csv(studies, index=False)
    notes = " ".join(evaluation.paper_table(4, tmp_path)[1])
    assert "v3: 2 runs" in notes and "not comparable" in notes


def test_a_run_is_not_written_over(system_runs):
    runs = [str(system_runs / name) for name in ("ct", "pet")]
    before = (system_runs / "ct" / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds a run"):
        evaluation.run_command([*runs, "--late-fusion", "union", "--out", runs[0]])
    with pytest.raises(UserError, match="holds a run"):
        evaluation.run_command([runs[0], "--out", str(system_runs)])
    with pytest.raises(UserError, match="takes a run of `ct`"):
        evaluation.run_command([runs[1], runs[1], "--late-fusion", "union"])
    assert (system_runs / "ct" / "config.json").read_bytes() == before


def test_each_branch_of_valindria_is_reported(system_runs):
    systems = json.loads((system_runs / "valindria" / "summary.json").read_text())["systems"]
    assert {"model", "CT branch", "PET branch"} <= set(systems)


def test_interval_and_paired_test():
    values = np.arange(10.0)
    low, high = evaluation.interval(values)
    assert 2 < low < 4.5 < high < 7 and evaluation.interval(values) == (low, high)
    names = [f"s{i}" for i in range(6)]
    a = pd.Series([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], names)
    # all six differences have one sign: p of the exact test is 2 / 2^6
    b = a - [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    assert evaluation.paired_p(a, b.sample(frac=1)) == pytest.approx(2 / 64)


def test_own_recipe_sets_what_was_not_asked_for():
    config = train.Config(version="nnunet", recipe="own", batch_size=4)
    config = train.resolve(config, "petct", False)
    assert (config.optimizer, config.lr, config.batch_size) == ("sgd", 1e-2, 4)
    rates = [train.learning_rate(config, epoch) for epoch in (0, 500)]
    assert config.steps == 250
    assert rates == pytest.approx([1e-2, 1e-2 * 0.5**0.9])
    matched = train.resolve(train.Config(version="nnunet"), "petct", False)
    assert (matched.optimizer, matched.lr, matched.epochs) == ("adam", 1e-3, 400)
