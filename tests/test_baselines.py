"""The compared systems against the sizes, values and losses of their own public code."""

import copy
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import baselines
from baselines import SYSTEMS, System, SystemRow, Valindria
from losses import dice_ce
from mirror_unet import (
    MASK_TASK,
    Output,
    Variant,
    count_parameters,
    decide,
    encode,
    foreground_logits,
)

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
FIELDS = {  # of the output, beside `seg`
    "nnunet": {"extra"},
    "blackbean": {"extra"},
    "sfnet": {"extra"},
    "andrearczyk": {"tumor"},
    "deepmts": {"tumor"},
    "weninger": {"ct", "btl", "tumor"},
    "valindria": {"ct", "pet"},
}
CLASSES = {"petct": 2, "mri": 3}
SIDES = (32, 32, 32)
LIGHT = [name for name in SYSTEMS if name != "blackbean"]  # that is nnunet with more channels
STEPS = [("petct", name) for name in LIGHT]
STEPS += [("mri", "nnunet"), ("mri", "weninger"), ("mri", "valindria")]


def build_system(name, kind="petct", side=96):
    config = SimpleNamespace(kind=kind, patch=(side, side, side), norm="shared")
    return SYSTEMS[name].build(config)


@cache
def sizes_only(name, kind="petct", side=96):
    with torch.device("meta"):
        return build_system(name, kind, side)


def small_net(name, kind="petct"):
    torch.manual_seed(0)
    return build_system(name, kind, 32)


def wave(phase, sides=SIDES):
    t = torch.arange(2 * math.prod(sides), dtype=torch.float64)
    return ((torch.sin(0.37 * t + phase) + 1) / 2).float().reshape(2, 1, *sides)


CT = wave(0.0)
PET = wave(1.0)


def batch_of(ct, pet, classes=2):
    mask = torch.arange(ct.numel()) // 7 % 11 % classes
    return {
        "ct": ct,
        "pet": pet,
        "mask": mask.reshape(ct.shape)[:, 0],
        "tumor": torch.tensor([1.0, 0.0]),
    }


def system_loss(name, out, batch):
    return SYSTEMS[name].loss(out, batch, None)


def fill(net):
    """Weights that no random generator decides."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            values = torch.sin(1.3 * torch.arange(p.numel(), dtype=torch.float64) + i)
            scaled = values * math.sqrt(2 / p[0].numel()) if p.dim() > 1 else 0.5 + 0.2 * values
            p.copy_(scaled.reshape(p.shape))
    return net


def has_gradient(tensor):
    return tensor.grad is not None and bool(tensor.grad.any())


def trained(module):
    """Whether any of its parameters has a gradient other than zero."""
    return any(map(has_gradient, module.parameters()))


def record_inputs(module):
    """A list to which every call of the module appends its first input."""
    inputs = []
    module.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    return inputs


# ------------------------------------------------------------------ all systems


@pytest.mark.parametrize("name", COUNTS)
def test_every_system_has_its_size(name):
    petct, mri = COUNTS[name]
    assert count_parameters(sizes_only(name)) == petct
    assert count_parameters(sizes_only(name, "mri")) == mri


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_a_step_fills_the_fields_and_trains_every_parameter(kind, name):
    classes = CLASSES[kind]
    net = small_net(name, kind)
    out = net(CT, PET)
    fields = {"seg"} | FIELDS.get(name, set())
    assert set(net.heads) == fields
    for field, value in out._asdict().items():
        if field not in fields:
            assert value is None
        elif field == "tumor":
            assert value.shape == (2,)
        elif field != "extra":
            channels = 1 if name == "weninger" and field != "seg" else classes
            assert value.shape == (2, channels, *SIDES)
            assert field == "seg" or net.variant.tasks[field].channels == channels

    assert net.variant.classes == MASK_TASK[kind].classes
    assert net.variant.one_softmax
    assert net.variant.tumor == ("tumor" in fields)
    terms = system_loss(name, out, batch_of(CT, PET, classes))
    sum(terms.values()).backward()
    for p in net.parameters():
        assert p.grad is not None
        assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("name", LIGHT)
def test_the_mask_alone_equals_the_full_pass_and_sees_what_it_should(name):
    net = small_net(name).eval().requires_grad_(False)
    ct = CT[:1].clone().requires_grad_()
    pet = PET[:1].clone().requires_grad_()
    alone = net(ct, pet, heads=("seg",))
    alone.seg[:, 1].sum().backward()
    assert has_gradient(ct) == (name != "pet")
    assert has_gradient(pet) == (name != "ct")

    with torch.inference_mode():
        full = net(ct, pet)
        assert torch.equal(alone.seg, full.seg)
        for field in set(net.heads) - {"seg", *net.scored_branches}:
            assert getattr(alone, field) is None
            if field != "extra":
                value = getattr(net(ct, pet, heads=(field,)), field)
                assert torch.equal(value, getattr(full, field))
    present = decide(foreground_logits(alone.seg)[0], net.variant)
    assert torch.equal(present[0], alone.seg[0].argmax(0) == 1)


@pytest.mark.parametrize("name", SYSTEMS)
def test_patches_that_do_not_fit_are_refused(name):
    net = sizes_only(name)
    limits = f"divide by {net.stride} and are at least {net.min_side}"
    for side in (net.min_side - net.stride, net.min_side + net.stride // 2):
        image = torch.zeros(1, 1, net.min_side, side, net.min_side)
        with pytest.raises(ValueError, match=limits):
            net(image, image)


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_differs_between_systems_is_in_their_rows(name):
    learns_tumor = name in ("andrearczyk", "deepmts", "weninger")
    expected = ("class_label",) if learns_tumor else ()
    assert SYSTEMS[name].options == (("norm",) if name == "valindria" else expected)
    assert sizes_only(name).one_branch_per_step == (name == "valindria")


def test_deep_supervision_is_that_of_nnunet_and_blackbean():
    assert SYSTEMS["nnunet"].loss is baselines.loss_deep
    assert SYSTEMS["blackbean"].loss is baselines.loss_deep


def test_an_unknown_kind_of_data_is_refused():
    with pytest.raises(ValueError, match=r"'ct'.*petct, mri"):
        build_system("pet", "ct")


def smallest_map(name, side):
    """The smallest side of what a 3^3 convolution of the system sees in a patch of side^3."""
    net = copy.deepcopy(sizes_only(name, side=side))
    records = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size > (1, 1, 1):
            records.append(record_inputs(layer))
    image = torch.empty(1, 1, side, side, side, device="meta")
    net(image, image)
    sides = []
    for inputs in records:
        for x in inputs:
            sides.extend(x.shape[2:])
    return min(sides)


def test_bf16_has_no_maps_of_2_voxels_on_the_cpu():
    """There torch 2.13 leaves the weight gradient of a bf16 conv3d over 2x2x2 maps unset."""
    for name in SYSTEMS:
        side = sizes_only(name).bf16_min_side
        assert side == (64 if name == "deepmts" else 48)
        if name in ("pet", "andrearczyk", "deepmts"):
            assert smallest_map(name, side) > 2
    assert smallest_map("deepmts", 48) == 2
    assert smallest_map("pet", 32) == 2


class Tiny(System):
    """What the README tells a fork to write."""

    def __init__(self, kind="petct"):
        super().__init__(kind)
        self.conv = nn.Conv3d(2, self.classes, 3, padding=1)

    def compute(self, images, wanted):
        return Output(self.conv(images))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_system_of_your_own_is_a_class_and_a_row(monkeypatch, kind):
    monkeypatch.setitem(SYSTEMS, "tiny", SystemRow(lambda c: Tiny(c.kind)))
    net = small_net("tiny", kind)
    out = net(CT, PET, **net.step_options(1))
    terms = system_loss("tiny", out, batch_of(CT, PET, CLASSES[kind]))
    assert list(terms) == ["seg"]
    terms["seg"].backward()
    assert trained(net)

    assert net.variant == Variant(pet=MASK_TASK[kind])
    assert net.heads == ("seg",)
    assert net.theta is None
    assert net.scored_branches == ()
    assert net.shared_parameters() == []
    present = net.decide(foreground_logits(out.seg)[0])
    assert present.shape == (CLASSES[kind] - 1, *SIDES)
    with pytest.raises(ValueError, match="has seg"):
        net(CT, PET, heads=("tumor",))


# MONAI 1.6.1: UNet(3, 2, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch");
# SegResNet(3, 16, 2, 3, dropout_prob=0.2). dynamic_network_architectures 0.4.4: PlainConvUNet with
# widths 32-64-128-256. Each was given the weights of fill() and ran once in training mode, then in
# eval mode, where the second sample is compared.
@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("pet", "petct", [1.284988, 1.114496, 1.125401]),
        ("early_fusion", "petct", [1.215678, 1.303514, 1.106546]),
        ("early_fusion", "mri", [1.801966, 0.500982, 1.377795]),
        ("nnunet", "petct", [-0.165499, 0.022957, -0.025459]),
        ("segresnet", "mri", [0.611982, 0.451815, 0.586395]),
    ],
)
def test_values_of_the_public_networks(name, kind, expected):
    net = fill(small_net(name, kind))
    with torch.inference_mode():
        net(CT, PET)  # in training mode, for the running statistics of the batch norms
        seg = net.eval()(CT[1:], PET[1:]).seg
    voxels = [(3, 7, 11), (16, 20, 16), (31, 0, 5)]
    computed = [seg[0, -1][voxel].item() for voxel in voxels]
    assert computed == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------ each system


def test_middle_fusion_joins_the_bottoms_and_every_skip():
    net = small_net("middle_fusion").eval()
    inputs = [record_inputs(layer) for layer in net.decoder]
    with torch.inference_mode():
        net(CT, PET)
        maps = encode({"ct": net.ct, "pet": net.pet}, {"ct": CT, "pet": PET})
    pairs = {}
    for number, x in maps.items():
        pairs[number] = torch.cat([x["ct"], x["pet"]], dim=1)
    assert torch.equal(inputs[0][0], torch.cat([pairs[4], pairs[5]], dim=1))
    for (x,), number in zip(inputs, (4, 3, 2, 1), strict=True):
        skip = pairs[number]
        assert torch.equal(x[:, : skip.shape[1]], skip)


def test_nnunet_has_a_stage_per_halving_of_the_patch():
    cubes = {32: 4, 48: 4, 64: 5, 96: 5, 112: 5, 128: 6, 144: 5, 192: 6, 256: 7}
    for side, stages in cubes.items():
        assert baselines.stages_of((side, side, side)) == stages
    assert baselines.stages_of((224, 224, 144)) == 5  # 144 does not divide by 32
    assert baselines.stages_of((128, 96, 128)) == 5
    # dynamic_network_architectures: 31,196,458 for 2 -> 2, 31,198,068 for 2 -> 4, so that a class
    # more has 805: the five decoder widths and a bias for each
    six = sizes_only("nnunet", "mri", 128)
    assert count_parameters(six) == (31_196_458 + 31_198_068) / 2 == 31_196_458 + 805


def test_nnunet_has_logits_at_every_size():
    image = torch.empty(1, 1, 64, 32, 32, device="meta")
    out = sizes_only("nnunet", side=64)(image, image)
    sizes = [out.seg, *out.extra["deep"]]
    for logits, s in zip(sizes, (1, 2, 4, 8), strict=True):
        assert logits.shape == (1, 2, 64 // s, 32 // s, 32 // s)


def test_nnunet_starts_with_weights_of_he():
    for conv in small_net("nnunet").down[1:].modules():
        if isinstance(conv, nn.Conv3d):
            expected = math.sqrt(2 / (1 + 0.01**2) / conv.weight[0].numel())
            assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
            assert not conv.bias.any()


def test_deep_supervision_weights():
    for weights in ([1, 0], [2 / 3, 1 / 3, 0], [8 / 15, 4 / 15, 2 / 15, 1 / 15, 0]):
        assert baselines.deep_weights(len(weights)) == pytest.approx(weights)


def test_deep_supervision_compares_every_size_with_the_nearest_voxel():
    mask = torch.arange(2 * 8**3) * 7 % 11 % 2
    mask = mask.reshape(2, 8, 8, 8)
    sizes = []
    for n in (8, 4, 2):
        logits = 3 * torch.sin(0.7 * torch.arange(4 * n**3))
        sizes.append(logits.reshape(2, 2, n, n, n))
    out = Output(sizes[0], extra={"deep": sizes[1:]})
    loss = system_loss("nnunet", out, {"mask": mask})["seg"]
    half = mask[:, 1::2, 1::2, 1::2]  # the voxels nearest to the centres of the coarse ones
    expected = 2 / 3 * dice_ce(mask, sizes[0]) + 1 / 3 * dice_ce(half, sizes[1])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("filters", "count"), [(16, 4_702_227), (32, 18_798_627)])
def test_size_of_the_published_segresnet(filters, count):
    with torch.device("meta"):
        net = baselines.SegResNet("mri", filters)
        net.encoder = baselines.res_encoder(4, filters, bias=False)  # MONAI: four modalities
    assert count_parameters(net) == count


def test_size_of_the_published_sfnet():
    # SFNet.py: 32 filters, three modalities in, three sigmoids and two fusion maps out
    with torch.device("meta"):
        decoder = baselines.ResDecoder(32, bias=True, align_corners=True)
        encoder = baselines.res_encoder(3, 32, bias=True)
    heads = (32 + 1) * (3 + 2)
    assert count_parameters(encoder) + 2 * count_parameters(decoder) + heads == 20_007_109


def test_size_of_the_published_unet_of_deepmts():
    net = sizes_only("deepmts")  # networks.py
    parts = [net.down, net.up, net.logits]
    assert sum(map(count_parameters, parts)) == 2_664_066


# MONAI 1.6.1: SSIMMetric(3, data_range=1.0, win_size=11, kernel_sigma=1.5).
def test_ssim_equals_monai():
    x = wave(0.0, (13, 12, 14))
    y = 0.7 * wave(1.0, (13, 12, 14)) + 0.3 * x**2
    assert baselines.ssim(x, y).item() == pytest.approx(0.743385, abs=1e-5)
    with pytest.raises(ValueError, match="at least 11"):  # room for the window
        baselines.ssim(x[..., :10], x[..., :10])


@pytest.mark.parametrize("w", [0.0, 0.25, 1.0])  # from CT to PET
def test_the_fusion_loss_of_sfnet(w):
    ct = wave(0.0, (12, 12, 12))
    pet = 0.5 * wave(1.0, (12, 12, 12)) ** 2
    batch = batch_of(ct, pet)
    seg = torch.zeros(2, 2, 12, 12, 12)
    extra = {"weight": torch.full_like(ct, w), "s": torch.tensor(0.5)}
    terms = system_loss("sfnet", Output(seg, extra=extra), batch)

    def mse(x, y):
        return (x - y).square().mean().item()

    def unlike(x, y):
        return 1 - baselines.ssim(x, y).item()

    f = w * pet + (1 - w) * ct
    fusion = 2 * mse(f, pet) + mse(f, ct) + 2 * unlike(f, ct) + unlike(f, pet)
    assert set(terms) == {"seg", "fusion"}
    assert terms["fusion"].item() == pytest.approx(math.exp(-0.5) * fusion + 0.5, abs=1e-5)
    assert terms["seg"].item() == pytest.approx(dice_ce(batch["mask"], seg).item())


def test_the_mask_of_sfnet_has_skips_and_its_fusion_weights_have_none():
    net = small_net("sfnet").eval()
    full_size_maps = []
    net.encoder[0].register_forward_hook(lambda _, __, x: full_size_maps.append(x))
    for level in net.encoder[1:]:  # cut the other way from the full-size map to the decoders
        level.register_forward_hook(lambda _, __, x: x.detach())
    out = net(CT, PET)
    for output, has_skip in ((out.seg, True), (out.extra["weight"], False)):
        (gradient,) = torch.autograd.grad(output.sum(), full_size_maps[0], allow_unused=True)
        assert (gradient is not None) == has_skip


def test_sfnet_weighs_by_a_sigmoid():
    net = small_net("sfnet").eval()
    with torch.inference_mode():
        net.weight.weight.zero_()
        net.weight.bias.fill_(math.log(3))
        extra = net(CT, PET).extra
    assert set(extra) == {"weight", "s"}
    assert torch.allclose(extra["weight"], torch.full_like(CT, 0.75))
    assert extra["s"].item() == 0
    assert net.s.requires_grad


@pytest.mark.parametrize(
    ("name", "weight"), [("andrearczyk", 0.1), ("deepmts", 1), ("weninger", 0.1)]
)
def test_the_weight_of_the_classification(name, weight):
    ct = wave(0.0, (4, 4, 4))
    batch = batch_of(ct, ct)
    seg = torch.zeros(2, 2, 4, 4, 4)
    out = Output(seg, ct=ct + 0.5, btl=ct - 0.2, tumor=torch.tensor([2.0, -1.0]))
    bce = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    expected = {"seg": dice_ce(batch["mask"], seg), "cls": weight * bce}
    if name == "weninger":  # 0.1 times the mean over both images
        expected["rec_ct"] = 0.1 * 0.25 / 2
        expected["rec_pet"] = 0.1 * 0.04 / 2
    terms = system_loss(name, out, batch)
    assert terms.keys() == expected.keys()
    for term, value in expected.items():
        assert float(terms[term]) == pytest.approx(float(value))


def test_the_classifier_of_andrearczyk_reads_every_encoder_stage_and_no_decoder():
    net = small_net("andrearczyk").eval()
    assert [stage[0].conv[0].kernel_size[0] for stage in net.down] == [7, 3, 3, 3, 3]
    inputs = record_inputs(net.classifier)
    net(CT, PET, heads=("tumor",)).tumor.sum().backward()
    assert inputs[0].shape == (2, 8 + 16 + 32 + 64 + 128)
    assert all(map(trained, net.down))
    for part in (net.up, net.convs, net.full_size, net.logits):
        assert not trained(part)


@pytest.mark.parametrize(("stage", "factor"), [(0, 8), (1, 4), (2, 2)])
def test_coarse_stages_of_andrearczyk_add_to_the_last_one(stage, factor):
    net = small_net("andrearczyk").eval()
    inputs = record_inputs(net.logits)
    with torch.inference_mode():
        for p in net.convs[-1].parameters():
            p.zero_()
        for i, conv in enumerate(net.full_size):
            conv.bias.fill_(1.0 if i == stage else -1e9)
        net(CT, PET)

    x = inputs[0][:, :, :8, :8, :8]
    blocks = x[:, :, ::factor, ::factor, ::factor]
    for axis in (2, 3, 4):
        blocks = blocks.repeat_interleave(factor, axis)
    assert torch.equal(x, blocks)
    assert x.any()
    if factor < 8:  # there is more than one block
        half = factor // 2
        values = x[:, :, ::half, ::half, ::half].unique()
        assert len(values) > 8


def test_the_classifier_of_deepmts_sees_the_foreground_and_its_outcome_reaches_the_mask():
    net = small_net("deepmts", "mri").eval()
    inputs = record_inputs(net.dense_net)
    out = net(CT, PET)
    assert torch.equal(inputs[0][:, :2], torch.cat([CT, PET], dim=1))
    assert torch.allclose(inputs[0][:, 2], 1 - out.seg.softmax(dim=1)[:, 0], atol=1e-6)
    out.tumor.sum().backward()
    assert trained(net.logits)
    assert trained(net.up)


def test_weninger_reconstructs_both_images_from_the_bottom_alone():
    net = small_net("weninger").eval()
    assert [convs[0].in_channels for convs in net.rec_decoder.convs] == [128, 64, 32]
    assert [convs[0].in_channels for convs in net.decoder.convs] == [192, 96, 48]
    bottoms = record_inputs(net.rec_decoder)
    out = net(CT, PET)
    both = net.rec_decoder(bottoms[0])
    assert torch.equal(torch.cat([out.ct, out.btl], dim=1), both)
    (out.tumor.sum() + out.ct.sum()).backward()
    assert trained(net.down)
    assert not trained(net.decoder)


def test_valindria_draws_either_branch_for_half_of_the_steps():
    net = sizes_only("valindria")
    branches = [net.step_options(number)["branch"] for number in range(20)]
    assert branches.count("ct") == branches.count("pet") == 10
    assert sizes_only("ct").step_options(1) == {}


@pytest.mark.parametrize(("branch", "other"), [("ct", "pet"), ("pet", "ct")])
def test_valindria_trains_one_branch(branch, other):
    net = small_net("valindria")
    out = net(CT, PET, branch=branch)
    assert torch.equal(out.seg, getattr(out, branch))
    assert getattr(out, other) is None
    system_loss("valindria", out, batch_of(CT, PET))["seg"].backward()
    trained_ids = {id(p) for p in net.parameters() if p.grad is not None}
    assert trained_ids == {id(p) for p in getattr(net, branch).parameters()}


def test_valindria_decides_by_the_mean_of_both_branches():
    net = small_net("valindria").eval()
    with torch.inference_mode():
        out = net(CT, PET)
        assert torch.equal(out.ct, net(CT, PET, branch="ct").seg)
        assert torch.equal(out.pet, net(CT, PET, branch="pet").seg)
    assert torch.allclose(out.seg, (out.ct + out.pet) / 2)


def test_valindria_shares_its_bottom_and_may_keep_the_norms_apart():
    net = Valindria()
    for number, (ct, pet) in enumerate(zip(net.ct, net.pet, strict=True), start=1):
        assert (ct is pet) == (number == 5)
    assert sum(p.numel() for p in net.shared_parameters()) == 2_688_770

    apart = Valindria(norm="private")
    assert apart.ct[4].shortcut is apart.pet[4].shortcut
    for a, b in zip(apart.ct[4].modules(), apart.pet[4].modules(), strict=True):
        assert not isinstance(a, nn.BatchNorm3d) or a is not b
