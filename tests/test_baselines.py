"""The compared systems against the sizes, values and losses of their own public code."""

import copy
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import baselines
from baselines import LATE_FUSIONS, SYSTEMS, LateFusion, Row, System, Valindria
from losses import dice_ce
from mirror_unet import MASKS, Output, Variant, decide, encode, margins

torch.set_num_threads(1)  # tensors are small: more threads only wait for each other

# Parameters for PET/CT (two classes) and MRI (three), at 96^3. From MONAI 1.6.1: the U-Nets, early
# fusion, segresnet; from dynamic_network_architectures 0.4.4: nnunet and blackbean; from the
# systems' own code: sfnet, andrearczyk and deepmts, see below. The others are sums over layers.
COUNTS = {
    "ct": (4_808_917, 4_809_920),
    "pet": (4_808_917, 4_809_920),
    "early_fusion": (4_809_781, 4_810_784),
    "middle_fusion": (9_401_903, 9_403_338),
    "nnunet": (16_548_456, 16_548_940),
    "blackbean": (22_583_016, 22_583_500),
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
    "weninger": {"ct": 1, "btl": 1, "tumor": 0},
    "valindria": {"ct": 2, "pet": 2},
}
CLASSES = {"petct": 2, "mri": 3}
SIDES = (32, 32, 32)
LIGHT = [name for name in SYSTEMS if name != "blackbean"]  # that is nnunet with more channels


def build_system(name, kind="petct", patch=(96, 96, 96)):
    return SYSTEMS[name].build(SimpleNamespace(kind=kind, patch=patch, norm="shared"))


@cache
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


def images_of(name, batch=2):
    return [wave(phase, sides_of(name), batch) for phase in (0.0, 1.0)]


def batch_of(ct, pet, classes=2):
    mask = (torch.arange(ct.numel()) // 7 % 11 % classes).reshape(ct.shape)[:, 0]
    return {"ct": ct, "pet": pet, "mask": mask, "tumor": torch.tensor([1.0, 0.0])}


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


@pytest.mark.parametrize("name", COUNTS)
def test_every_system_has_its_size(name):
    assert tuple(size(sizes_only(name, kind)) for kind in CLASSES) == COUNTS[name]


def test_nnunet_has_a_stage_per_halving_of_the_patch_each_with_an_output():
    cubes = {32: 4, 48: 4, 64: 5, 80: 5, 96: 5, 112: 5, 128: 6, 144: 5, 160: 6, 192: 6, 256: 7}
    assert {side: baselines.stages_of((side,) * 3) for side in cubes} == cubes
    assert baselines.stages_of((224, 224, 144)) == 5  # 144 does not divide by 32
    assert baselines.stages_of((128, 96, 128)) == 5
    # dynamic_network_architectures: 31,196,458 for 2 -> 2, 31,198,068 for 2 -> 4, so that a class
    # more has 805: the five decoder widths and a bias for each
    six = sizes_only("nnunet", "mri", (128, 128, 128))
    assert size(six) == (31_196_458 + 31_198_068) / 2 == 31_196_458 + 805
    patches = torch.empty(2, 1, 1, 64, 32, 32, device="meta")
    out = sizes_only("nnunet", patch=(64, 64, 64))(*patches)
    shapes = [tuple(x.shape) for x in (out.seg, *out.extra["deep"])]
    assert shapes == [(1, 2, 64 // s, 32 // s, 32 // s) for s in (1, 2, 4, 8)]


def test_sizes_of_the_published_configurations():
    with torch.device("meta"):
        for filters, count in ((16, 4_702_227), (32, 18_798_627)):  # MONAI, four modalities in
            net = baselines.SegResNet("mri", filters)
            net.encoder = baselines.res_encoder(4, filters, bias=False)
            assert size(net) == count
        # SFNet.py: 32 filters, three modalities in, three sigmoids and two fusion maps out
        decoders = [baselines.ResDecoder(32, bias=True, align_corners=True) for _ in range(2)]
        heads = [nn.Conv3d(32, 3, 1), nn.Conv3d(32, 2, 1)]
        assert size(baselines.res_encoder(3, 32, bias=True), *decoders, *heads) == 20_007_109
        net = baselines.DeepMTS()  # networks.py
        assert size(net.down, net.up, net.logits) == 2_664_066


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "petct") for n in LIGHT] + [(n, "mri") for n in ("nnunet", "weninger", "valindria")],
)
def test_a_step_fills_the_fields_and_trains_every_parameter(name, kind):
    net, (ct, pet), classes = net_of(name, kind), images_of(name), CLASSES[kind]
    out = net(ct, pet)
    expected = {"seg": classes} | OTHERS.get(name, {})
    expected |= {f: classes for f in expected if expected[f] == 2}  # a branch that segments
    shapes = {
        f: (2, channels, *ct.shape[2:]) if channels else (2,) for f, channels in expected.items()
    }
    filled = {field: value for field, value in out._asdict().items() if value is not None}
    assert set(filled.pop("extra", {})) == FILLED.get(name, set())
    assert {field: tuple(value.shape) for field, value in filled.items()} == shapes
    assert set(net.heads) == set(expected) | ({"extra"} if name in FILLED else set())
    assert net.variant.classes == (("lesion",) if kind == "petct" else ("edema", "core"))
    assert net.variant.mask and net.variant.exclusive
    tasks = {slot: t.channels for slot, t in net.variant.tasks.items() if slot in net.heads}
    assert tasks == {f: c for f, c in expected.items() if f not in ("seg", "tumor")}
    assert net.variant.tumor == ("tumor" in expected) == ("class_label" in SYSTEMS[name].reads)
    terms = SYSTEMS[name].loss(out, batch_of(ct, pet, classes), None)
    sum(terms.values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", LIGHT)
def test_the_mask_alone_equals_the_full_pass_and_sees_what_it_should(name):
    net, (ct, pet) = net_of(name).eval().requires_grad_(False), images_of(name, batch=1)
    alone = net(ct.requires_grad_(), pet.requires_grad_(), heads=("seg",))
    alone.seg[:, 1].sum().backward()
    sees = {n for n, x in (("ct", ct), ("pet", pet)) if x.grad is not None and x.grad.any()}
    assert sees == ({name} if name in ("ct", "pet") else {"ct", "pet"})
    with torch.inference_mode():
        full = net(ct, pet)
        assert torch.equal(alone.seg, full.seg)
        others = set(net.heads) - {"seg", *net.branches}
        assert all(getattr(alone, field) is None for field in others)
        for field in others - {"extra"}:
            assert torch.equal(getattr(net(ct, pet, heads=(field,)), field), getattr(full, field))
    present = decide(margins(alone.seg)[0], net.variant)
    assert torch.equal(present[0], alone.seg[0].argmax(0) == 1)


@pytest.mark.parametrize("name", SYSTEMS)
def test_patches_that_do_not_fit_are_refused(name):
    net = sizes_only(name)
    odd, small = net.stride + net.stride // 2, net.least - net.stride
    for bad in ((net.least, net.least, odd), (net.least, small, net.least)):
        with pytest.raises(ValueError, match=f"divide by {net.stride}"):
            net(torch.zeros(1, 1, *bad), torch.zeros(1, 1, *bad))
    cube = torch.zeros(1, 1, 64, 64, 64)
    with pytest.raises(ValueError, match="same shape"):
        net(cube, cube[..., :32])
    net = sizes_only("nnunet", patch=(128, 128, 128))
    with pytest.raises(ValueError, match="divide by 32 and are at least 64"):
        net(cube[..., :32], cube[..., :32])


def test_what_differs_between_systems_is_in_their_rows():
    told = dict.fromkeys(("andrearczyk", "deepmts", "weninger"), ("class_label",))
    reads = {name: row.reads for name, row in SYSTEMS.items() if row.reads}
    assert reads == told | {"valindria": ("norm",)}
    assert [n for n in SYSTEMS if sizes_only(n).alternates] == ["valindria"]
    assert SYSTEMS["blackbean"].loss is SYSTEMS["nnunet"].loss is baselines.loss_deep
    with pytest.raises(ValueError, match=r"'ct'.*petct, mri"):
        build_system("pet", "ct")


def smallest_map(name, side):
    """The smallest side of what a 3^3 convolution of the system sees in a patch of side^3."""
    net, seen = copy.deepcopy(sizes_only(name, patch=(side,) * 3)), []
    for layer in net.modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size > (1, 1, 1):
            layer.register_forward_hook(lambda _, args, __: seen.append(min(args[0].shape[2:])))
    net(*torch.empty(2, 1, 1, side, side, side, device="meta"))
    return min(seen)


def test_bf16_has_no_maps_of_2_voxels_on_the_cpu():
    """There torch 2.13 leaves the weight gradient of a bf16 conv3d over 2x2x2 maps unset."""
    least = {name: sizes_only(name).bf16_least for name in SYSTEMS}
    assert least == {name: 64 if name == "deepmts" else 48 for name in SYSTEMS}
    assert all(smallest_map(name, least[name]) > 2 for name in ("pet", "andrearczyk", "deepmts"))
    assert smallest_map("deepmts", 48) == 2 == smallest_map("pet", 32)


class Tiny(System):
    """What the README tells a fork to write."""

    def __init__(self, kind="petct"):
        super().__init__(kind)
        self.layers = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU())
        self.output = nn.Conv3d(4, self.classes, 3, padding=1)

    def forward(self, ct, pet, heads=None):
        self.wanted(ct, pet, heads)
        return Output(self.output(self.layers(torch.cat([ct, pet], dim=1))))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_system_of_your_own_is_a_class_and_a_row(monkeypatch, kind):
    monkeypatch.setitem(SYSTEMS, "tiny", Row(lambda c: Tiny(c.kind)))
    net, (ct, pet) = net_of("tiny", kind), images_of("tiny")
    out = net(ct, pet, **net.step_options(1))
    (term,) = SYSTEMS["tiny"].loss(out, batch_of(ct, pet, CLASSES[kind]), None).values()
    term.backward()
    assert all(p.grad.any() for p in net.parameters())
    assert net.variant == Variant(pet=MASKS[kind]) and net.heads == ("seg",)
    assert (net.theta, net.branches, net.shared_parameters()) == (None, (), [])
    assert decide(margins(out.seg)[0], net.variant).shape == (CLASSES[kind] - 1, *ct.shape[2:])
    with pytest.raises(ValueError, match="has seg"):
        net(ct, pet, heads=("tumor",))


# MONAI 1.6.1: UNet(3, 2, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch");
# SegResNet(3, 16, 2, 3, dropout_prob=0.2). dynamic_network_architectures 0.4.4: PlainConvUNet with
# widths 32-64-128-256. Each was given the weights of fill() and ran once in training mode, then in
# eval mode, where the second sample is compared.
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("pet", "petct", [1.209627, 1.284988, 1.114496, 1.125401, 1.356290]),
        ("early_fusion", "petct", [1.105591, 1.215678, 1.303514, 1.106546, 0.944894]),
        ("early_fusion", "mri", [1.101930, 1.801966, 0.500982, 1.377795, 2.355477]),
        ("nnunet", "petct", [-0.028564, -0.165499, 0.022957, -0.025459, -0.098975]),
        ("segresnet", "mri", [0.855106, 0.611982, 0.451815, 0.586395, 0.527981]),
    ],
)
def test_values_of_the_public_networks(name, kind, expected):
    net, ct, pet = fill(build_system(name, kind, SIDES)), wave(0.0, SIDES), wave(1.0, SIDES)
    with torch.inference_mode():
        if any(isinstance(layer, nn.BatchNorm3d) for layer in net.modules()):
            net(ct, pet)  # in training mode, for the running statistics
        seg = net.eval()(ct[1:], pet[1:]).seg
    voxels = [(0, 0, 0), (3, 7, 11), (16, 20, 16), (31, 0, 5), (20, 29, 30)]
    found = [seg[0, -1][voxel].item() for voxel in voxels]
    assert found == pytest.approx(expected, abs=1e-4)


def test_middle_fusion_joins_the_bottoms_and_every_skip():
    net, images = net_of("middle_fusion").eval(), images_of("middle_fusion")
    seen = []
    for layer in net.decoder:
        layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.inference_mode():
        net(*images)
        slots = dict(zip(("ct", "pet"), images, strict=True))
        maps = encode({"ct": net.ct, "pet": net.pet}, slots)
    *skips, bottom = [torch.cat([pair["ct"], pair["pet"]], dim=1) for pair in maps]
    assert torch.equal(seen[0], torch.cat([skips[-1], bottom], dim=1))
    for x, skip in zip(seen, reversed(skips), strict=True):
        assert torch.equal(x[:, : skip.shape[1]], skip)


def test_nnunet_starts_with_weights_of_he():
    convs = [m for m in net_of("nnunet").down.modules() if isinstance(m, nn.Conv3d)][1:]
    assert not any(conv.bias.any() for conv in convs)
    for conv in convs:
        expected = math.sqrt(2 / (1 + 0.01**2) / conv.weight[0].numel())
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)


def test_deep_supervision_weights():
    for weights in ([1, 0], [2 / 3, 1 / 3, 0], [4 / 7, 2 / 7, 1 / 7, 0]):
        assert baselines.deep_weights(len(weights)) == pytest.approx(weights)
    assert baselines.deep_weights(5) == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15, 0])


def test_deep_supervision_compares_every_size_with_the_nearest_voxel():
    mask = (torch.arange(2 * 8**3) * 7 % 11 % 2).reshape(2, 8, 8, 8)
    logits = [3 * torch.sin(0.7 * torch.arange(4 * n**3)).reshape(2, 2, n, n, n) for n in (8, 4, 2)]
    out = Output(logits[0], extra={"deep": tuple(logits[1:])})
    found = baselines.loss_deep(out, {"mask": mask}, None)["seg"]
    half = mask[:, 1::2, 1::2, 1::2]  # the voxels nearest to the centres of the coarse ones
    expected = 2 / 3 * dice_ce(mask, logits[0]) + 1 / 3 * dice_ce(half, logits[1])
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


# MONAI 1.6.1: SSIMMetric(3, data_range=span, win_size=11, kernel_sigma=1.5).
@pytest.mark.parametrize(("span", "monai"), [(1.0, 0.743385), (2.0, 0.746377)])
def test_ssim_equals_monai(span, monai):
    x, y = (wave(phase, (13, 12, 14)) for phase in (0.0, 1.0))
    y = 0.7 * y + 0.3 * x**2
    assert baselines.ssim(x, y, span=span).item() == pytest.approx(monai, abs=1e-5)
    with pytest.raises(ValueError, match="at least 11"):  # room for the window
        baselines.ssim(x[..., :10], x[..., :10])


def test_the_fusion_loss_of_sfnet():
    ct, pet = wave(0.0, (12, 12, 12)), 0.5 * wave(1.0, (12, 12, 12)) ** 2
    batch, s = batch_of(ct, pet), torch.tensor(0.5)
    seg = torch.zeros(2, 2, 12, 12, 12)

    def mse(x, y):
        return (x - y).square().mean().item()

    def unlike(x, y):
        return 1 - baselines.ssim(x, y).item()

    for w in (0.0, 0.25, 1.0):  # from CT to PET
        f = w * pet + (1 - w) * ct
        fusion = 2 * mse(f, pet) + mse(f, ct) + 2 * unlike(f, ct) + unlike(f, pet)
        out = Output(seg, extra={"weight": torch.full_like(ct, w), "s": s})
        terms = baselines.loss_sfnet(out, batch, None)
        assert set(terms) == {"seg", "fusion"}
        assert terms["fusion"].item() == pytest.approx(math.exp(-0.5) * fusion + 0.5, abs=1e-5)
        assert terms["seg"].item() == pytest.approx(dice_ce(batch["mask"], seg).item())


def test_sfnet_weighs_by_a_sigmoid_of_a_decoder_without_skips():
    net, (ct, pet) = net_of("sfnet").eval(), images_of("sfnet", batch=1)
    first, *below = net.encoder
    skips = []
    first.register_forward_hook(lambda _, __, x: skips.append(x))
    for level in below:  # cut the other way from the full-size map to the decoders
        level.register_forward_hook(lambda _, __, x: x.detach())
    out = net(ct, pet)
    for logits, reaches in ((out.seg, True), (out.extra["weight"], False)):
        gradient = torch.autograd.grad(logits.sum(), skips[0], allow_unused=True)[0]
        assert (gradient is not None) == reaches
    with torch.inference_mode():
        net.weight.weight.zero_()
        net.weight.bias.fill_(math.log(3))
        extra = net(ct, pet).extra
    assert torch.allclose(extra["weight"], torch.full_like(ct, 0.75))
    assert extra["s"].item() == 0 and net.s.requires_grad


@pytest.mark.parametrize(
    ("name", "weight"), [("andrearczyk", 0.1), ("deepmts", 1), ("weninger", 0.1)]
)
def test_the_weight_of_the_classification(name, weight):
    ct, pet = wave(0.0, (4, 4, 4)), wave(1.0, (4, 4, 4))
    seg, tumor = torch.zeros(2, 2, 4, 4, 4), torch.tensor([2.0, -1.0])
    out = Output(seg, ct=ct + 0.5, btl=pet - 0.2, tumor=tumor)
    batch = batch_of(ct, pet)
    terms = SYSTEMS[name].loss(out, batch, None)
    bce = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert terms.pop("cls").item() == pytest.approx(weight * bce, rel=1e-5)
    assert terms.pop("seg").item() == pytest.approx(dice_ce(batch["mask"], out.seg).item())
    if name == "weninger":  # 0.1 times the mean over both images
        assert terms.pop("rec_ct").item() == pytest.approx(0.1 * 0.25 / 2, rel=1e-5)
        assert terms.pop("rec_pet").item() == pytest.approx(0.1 * 0.04 / 2, rel=1e-5)
    assert terms == {}


def test_the_classifier_of_andrearczyk_reads_every_encoder_stage_and_no_decoder():
    net, (ct, pet) = net_of("andrearczyk").eval(), images_of("andrearczyk")
    assert net.classifier[1].in_features == 8 + 16 + 32 + 64 + 128
    assert [stage[0].conv[0].kernel_size[0] for stage in net.down] == [7, 3, 3, 3, 3]
    seen = []
    net.classifier.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    net(ct, pet, heads=("tumor",)).tumor.sum().backward()
    assert seen[0].shape == (2, 248)
    assert all(trained(stage) for stage in net.down)
    assert not any(trained(part) for part in (net.up, net.convs, net.full_size, net.logits))


def test_coarse_stages_of_andrearczyk_add_to_the_last_one():
    net, (ct, pet) = net_of("andrearczyk").eval(), images_of("andrearczyk")
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


def test_the_classifier_of_deepmts_sees_the_foreground_and_its_outcome_reaches_the_mask():
    net, (ct, pet) = net_of("deepmts", "mri").eval(), images_of("deepmts")
    seen = []
    net.dense_net.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    out = net(ct, pet)
    assert torch.equal(seen[0][:, :2], torch.cat([ct, pet], dim=1))
    assert torch.allclose(seen[0][:, 2], 1 - out.seg.softmax(dim=1)[:, 0], atol=1e-6)
    out.tumor.sum().backward()
    assert trained(net.logits) and trained(net.up)


def test_weninger_reconstructs_both_images_from_the_bottom_alone():
    net, (ct, pet) = net_of("weninger").eval(), images_of("weninger")
    widths = [convs[0].in_channels for convs in net.rec_decoder.convs]
    assert widths == [128, 64, 32]
    assert [convs[0].in_channels for convs in net.decoder.convs] == [192, 96, 48]
    bottoms = []
    net.down[-1].register_forward_hook(lambda _, __, x: bottoms.append(x))
    out = net(ct, pet)
    rec = net.rec_decoder(bottoms[0])
    assert torch.equal(torch.cat([out.ct, out.btl], dim=1), rec)
    (out.tumor.sum() + out.ct.sum()).backward()
    assert trained(net.down) and not trained(net.decoder)


def test_valindria_trains_one_branch_and_decides_by_the_mean_of_both():
    net, images = net_of("valindria"), images_of("valindria")
    shared = {id(p) for p in net.shared_parameters()}
    assert sum(p.numel() for p in net.shared_parameters()) == 2_688_770
    options = [net.step_options(number) for number in range(20)]
    assert net_of("ct").step_options(1) == {}
    for branch, other in (("ct", "pet"), ("pet", "ct")):
        assert options.count({"branch": branch}) == 10
        net.zero_grad()
        out = net(*images, branch=branch)
        assert torch.equal(out.seg, getattr(out, branch)) and getattr(out, other) is None
        sum(SYSTEMS["valindria"].loss(out, batch_of(*images), None).values()).backward()
        assert all(p.grad is not None for p in getattr(net, branch).parameters())
        private = [p for p in getattr(net, other).parameters() if id(p) not in shared]
        assert private and all(p.grad is None for p in private)
    with torch.inference_mode():
        out = net.eval()(*images)
        ct, pet = (net(*images, branch=name).seg for name in ("ct", "pet"))
    assert torch.equal(out.ct, ct) and torch.equal(out.pet, pet)
    assert torch.allclose(out.seg, (ct + pet) / 2)


def test_valindria_shares_its_bottom_and_may_keep_the_norms_apart():
    net = Valindria()
    assert [a is b for a, b in zip(net.ct, net.pet, strict=True)] == [i == 4 for i in range(9)]
    apart = Valindria(norm="private")
    assert apart.ct[4] is not apart.pet[4]
    assert apart.ct[4].shortcut is apart.pet[4].shortcut
    norms = [m for m in apart.ct[4].modules() if isinstance(m, nn.BatchNorm3d)]
    assert {id(m) for m in norms}.isdisjoint(id(m) for m in apart.pet[4].modules())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_late_fusion_is_one_network_with_the_margins_of_two(kind, amp):
    nets, (ct, pet) = [Tiny(kind), Tiny(kind)], images_of("ct")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        alone = [margins(net(ct, pet).seg.float()) for net in nets]
        for mode in LATE_FUSIONS:
            fused = LateFusion(*nets, mode).eval()
            assert fused.heads == ("seg",)
            assert fused.variant == replace(nets[0].variant, join=mode)
            assert fused.variant.classes == nets[0].variant.classes
            seg = fused(ct, pet, heads=("seg",)).seg
            assert seg[:, 0].eq(0).all() and torch.equal(margins(seg), torch.cat(alone, dim=1))
    with pytest.raises(ValueError, match="has seg"):
        fused(ct, pet, heads=("seg", "tumor"))
    with pytest.raises(ValueError, match="divide by 16"):
        fused(ct[..., :8], pet[..., :8])
