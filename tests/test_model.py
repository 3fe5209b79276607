"""Mirror U-Net against the paper's layers, the released code's sizes and MONAI's U-Net."""

import itertools
import math

import numpy as np
import pytest
import torch

from mirror_unet import (
    VARIANTS,
    Classifier,
    MirrorUNet,
    count_parameters,
    decide,
    encode,
    margins,
    variant_of,
)

torch.set_num_threads(1)  # tensors are small: more threads only wait for each other

# Parameters of layers 1-8. Layer 1: convolutions 448 and 6,928, norms and PReLUs 66, shortcut 448.
SIZES = [7_890, 55_522, 221_634, 885_634, 2_688_770, 774_530, 138_434, 34_658]
TABLE_2 = {  # L: parameters of v4 and of v3 (whose classifier sees PET), from the released code
    (3,): (9_396_201, 10_551_474),
    (4,): (8_732_201, 9_887_474),
    (5,): (6_929_065, 8_084_338),
    (6,): (8_843_305, 9_998_578),
    (7,): (9_479_401, 10_634_674),
    (4, 5, 6): (5_268_901, 6_424_174),
    (3, 4, 5, 6, 7): (4_908_833, 6_064_106),
}
ALL = tuple(range(1, 9))
FIELDS = {  # channels of every field that a version fills; tumor is one logit per sample
    ("petct", "v1"): {"seg": 2, "pet_seg": 2, "ct_rec": 1},
    ("petct", "v2"): {"seg": 2, "pet_seg": 2, "ct_rec": 1, "pet_rec": 1},
    ("petct", "v3"): {"seg": 2, "pet_seg": 2, "ct_rec": 1, "pet_rec": 1, "tumor": 0},
    ("petct", "v4"): {"seg": 2, "pet_seg": 2, "ct_seg": 2},
    ("mri", "v1"): {"seg": 3, "pet_seg": 2, "ct_seg": 2},
    ("mri", "v2"): {"seg": 3, "pet_seg": 2, "ct_seg": 2, "btl_seg": 2},
    ("mri", "v2-rec"): {"seg": 3, "pet_seg": 3, "ct_rec": 1, "pet_rec": 1},
}
SMALL = (2, 1, 32, 16, 16)


def sizes_only(version="v4", shared=(5,), **options):
    """A network without storage: enough to count parameters and compare identities."""
    with torch.device("meta"):
        return MirrorUNet(version, shared, **options)


def net_of(kind, version, **options):
    torch.manual_seed(0)
    return MirrorUNet(version, kind=kind, **options)


def wave(phase, shape=SMALL):
    t = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((torch.sin(0.37 * t + phase) + 1) / 2).float().reshape(shape)


def size(module):
    return sum(p.numel() for p in module.parameters())


def filled(out):
    return {name: value for name, value in out._asdict().items() if value is not None}


# Parameter counts


def test_every_layer_has_the_size_of_the_released_code():
    net = sizes_only("v1", shared=())
    assert [size(layer) for layer in net.pet] == [*SIZES, 1_845]
    assert [size(layer) for layer in net.ct] == [*SIZES, 896]
    assert size(net.pet) == 4_808_917  # MONAI's UNet with one input and two output channels


@pytest.mark.parametrize("shared", TABLE_2)
def test_counts_for_each_column_of_table_2(shared):
    v4, v3 = TABLE_2[shared]
    count = {v: count_parameters(sizes_only(v, shared)) for v in VARIANTS["petct"]}
    assert count["v4"] == v4
    assert count["v1"] == v4 - 949  # CT ends in one channel instead of two: 1,845 - 896
    assert count["v2"] == count["v1"] + 1_100_153
    assert count["v3"] == v3 + 256  # T sees 256 channels of CT too: its 1^3 conv has 256 more
    assert count_parameters(sizes_only("v3", shared, classifier="pet")) == v3


def test_counts_with_nothing_shared_and_with_everything_shared():
    assert count_parameters(sizes_only(shared=())) == 9_617_834 + 1  # two branches and θ
    assert count_parameters(sizes_only(shared=ALL)) == 4_808_917 + 1_845 + 1  # one more output


def test_counts_of_the_brain_tumour_versions():
    # The last layer of D_BTL with n channels: transposed convolution 16 * n * 27 + n, norm 2n,
    # PReLU 1, convolution n * n * 27 + n, norm 2n, PReLU 1: 467 for n = 1 (a reconstruction) and
    # 986 for n = 2 (the whole tumour). The output layer of a branch with n channels: 32 * n * 27
    # + n, 2n, 1, n * n * 27 + n: 896, 1,845 and, for edema and core in one softmax, 2,848.
    two_branches = 9_617_834 - SIZES[4] + 1
    count = {v: count_parameters(sizes_only(v, kind="mri")) for v in VARIANTS["mri"]}
    assert count["v1"] == two_branches
    assert count["v2"] == two_branches + 1_100_153 - 467 + 986
    assert count["v2-rec"] == two_branches - 2 * 1_845 + 2_848 + 896 + 1_100_153


def test_joint_convolutions_are_not_counted_and_private_norms_are():
    joint = sizes_only("v2", bottleneck="joint")
    assert count_parameters(joint) == count_parameters(sizes_only("v2"))
    assert size(joint.joint) == 2 * (512 * 256 + 256)
    # Layer 5 has two batch norms of 256 channels, each with a scale and a shift.
    assert count_parameters(sizes_only(norm="private")) == TABLE_2[(5,)][0] + 2 * 2 * 256


# Known answers


@pytest.mark.parametrize("norm", ["shared", "private"])
def test_values_of_monai(norm):
    # MONAI 1.6.1: UNet(3, 1, out, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), given the
    # weights of each branch leaf by leaf, and its up layers 512-64-32-16-1 those of D_BTL. In the
    # second half both ran in eval mode after that one pass, so running statistics count; the two
    # U-Nets of MONAI keep their own, as "private" norms do.
    train = {
        "seg": [-0.249847, -0.393218, -0.028158, -0.404300, 0.118689],
        "ct_rec": [-0.431283, 1.684632, 0.140816, 1.061775, 0.052403],
        "pet_rec": [0.151149, -1.020643, 0.323071, 0.438292, 0.059468],
    }
    evaluation = {
        "seg": [0.000115, 0.395717, 0.286251, 0.048715, -0.065079],
        "ct_rec": [0.104122, 0.262410, 0.205593, 0.592918, 0.139632],
        "pet_rec": [0.050551, 0.060951, 0.028182, 0.049550, 0.048049],
    }
    voxels = [(0, 0, 0), (3, 7, 11), (16, 40, 16), (31, 0, 5), (20, 29, 30)]
    net = net_of("petct", "v2", norm=norm)
    ct, pet = wave(0.0, (1, 1, 32, 48, 32)), wave(1.0, (1, 1, 32, 48, 32))
    for mode, expected in ((True, train), (False, evaluation)):
        if not mode and norm == "shared":
            continue
        with torch.no_grad():
            out = net.train(mode)(ct, pet)
        for field, values in expected.items():  # the last channel of each
            found = [getattr(out, field)[0, -1][voxel].item() for voxel in voxels]
            assert found == pytest.approx(values, abs=1e-4), (mode, field)


# Sharing (Sec. 3.2)


@pytest.mark.parametrize("shared", [*TABLE_2, (), ALL])
def test_exactly_the_listed_layers_are_one_module(shared):
    net = sizes_only(shared=shared)
    pairs = list(enumerate(zip(net.ct, net.pet, strict=True), start=1))
    assert tuple(i for i, (ct, pet) in pairs if ct is pet) == shared
    both = {id(p) for p in net.ct.parameters()} & {id(p) for p in net.pet.parameters()}
    listed = [p for i in shared for p in net.pet[i - 1].parameters()]
    assert both == {id(p) for p in listed}
    assert [id(p) for p in net.shared_parameters()] == [id(p) for p in listed]


def test_private_norms_share_everything_but_the_batch_norms():
    net = sizes_only(shared=(5, 6), norm="private")
    leaves = []
    for ct, pet in zip(net.ct[4:6], net.pet[4:6], strict=True):
        pairs = zip(ct.modules(), pet.modules(), strict=True)
        leaves += [(a, b) for a, b in pairs if not list(a.children())]
    norms = [(a, b) for a, b in leaves if isinstance(a, torch.nn.BatchNorm3d)]
    rest = [(a, b) for a, b in leaves if not isinstance(a, torch.nn.BatchNorm3d)]
    assert len(norms) == 2 + 2 and all(a is not b for a, b in norms)
    assert len(rest) == 5 + 4 and all(a is b for a, b in rest)  # convolutions and PReLUs
    assert len(net.shared_parameters()) == 2 * (3 + 2) + (2 + 2)  # weights, biases; slopes


def test_reconstructing_ct_trains_the_shared_layer_of_the_pet_branch():
    net = net_of("petct", "v1", shared=(5,))
    net(wave(0.0), wave(1.0)).ct_rec.square().sum().backward()
    reached = [all(p.grad is not None for p in layer.parameters()) for layer in net.pet]
    assert reached == [i == 5 for i in range(1, 10)]
    assert all(p.grad is None for layer in net.pet[:4] for p in layer.parameters())
    assert net.pet[4].shortcut.weight.grad.norm() > 0


# What a version returns


@pytest.mark.parametrize(("kind", "version"), FIELDS)
def test_a_version_fills_its_fields(kind, version):
    net, channels = net_of(kind, version), FIELDS[kind, version]
    out = net(wave(0.0), wave(1.0))
    found = {name: tuple(value.shape) for name, value in filled(out).items()}
    assert found == {name: (2, c, *SMALL[2:]) if c else (2,) for name, c in channels.items()}
    assert set(net.heads) == set(channels)
    sum(value.square().sum() for value in filled(out).values()).backward()
    idle = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []  # every weight serves some task


def test_every_variant_is_tested_and_has_the_tasks_of_fig_2():
    rows = {(kind, version): row for kind, of in VARIANTS.items() for version, row in of.items()}
    assert set(rows) == set(FIELDS)
    for key, row in rows.items():
        assert row.phi == ("ct_rec" in FIELDS[key])  # Φ keeps a reconstruction from copying
        assert len(row.classes) == FIELDS[key]["seg"] - 1
    for version in ("v1", "v2"):
        assert (rows["mri", version].ct, rows["mri", version].pet) == ("edema", "core")
    assert rows["mri", "v1"].classes == ("edema", "core")


@pytest.mark.parametrize(
    ("kind", "version", "bottleneck"), [*((*f, "own") for f in FIELDS), ("petct", "v3", "joint")]
)
def test_a_single_head_equals_the_full_pass(kind, version, bottleneck):
    net = net_of(kind, version, bottleneck=bottleneck).eval()
    with torch.no_grad():
        full = net(wave(0.0), wave(1.0))
        for name in net.heads:
            alone = net(wave(0.0), wave(1.0), heads=(name,))
            torch.testing.assert_close(getattr(alone, name), getattr(full, name))


def test_a_head_leaves_alone_what_it_does_not_need():
    net = net_of("petct", "v3", shared=())
    out = net(wave(0.0), wave(1.0), heads=("seg",))
    assert set(filled(out)) == {"seg", "pet_seg"}
    assert net.ct[0].convs[0][1].num_batches_tracked == 0  # the CT branch never ran
    assert net.pet[0].convs[0][1].num_batches_tracked == 1


# Which input a mask depends on


def depends(net, mask):
    """Whether mask(out) changes with the CT slot and with the PET slot."""
    ct, pet = wave(0.0), wave(1.0)
    with torch.no_grad():
        base, other_ct, other_pet = net(ct, pet), net(wave(2.0), pet), net(ct, wave(2.0))
    return [not torch.equal(mask(base), mask(other)) for other in (other_ct, other_pet)]


@pytest.mark.parametrize(
    ("version", "training"), [("v1", False), ("v2", False), ("v3", False), ("v3", True)]
)
def test_the_mask_sees_ct_only_with_a_joint_bottleneck(version, training):
    def seg(out):
        return out.seg

    assert depends(net_of("petct", version).train(training), seg) == [False, True]
    joint = net_of("petct", version, bottleneck="joint").train(training)
    assert depends(joint, seg) == [True, True]


def test_reconstruction_sees_pet_only_with_a_joint_bottleneck():
    assert depends(net_of("petct", "v2").eval(), lambda out: out.ct_rec) == [True, False]
    joint = net_of("petct", "v2", bottleneck="joint").eval()
    assert depends(joint, lambda out: out.ct_rec) == [True, True]
    assert depends(net_of("petct", "v2").eval(), lambda out: out.pet_rec) == [True, True]


@pytest.mark.parametrize(
    ("theta", "expected"), [(0.0, [False, True]), (0.3, [True, True]), (1.0, [True, False])]
)
def test_theta_weighs_ct_against_pet_in_the_mask_of_v4(theta, expected):
    assert depends(net_of("petct", "v4", theta=theta).eval(), lambda out: out.seg) == expected


def test_edema_comes_from_flair_and_core_from_t1gd():
    for version in ("v1", "v2"):
        net = net_of("mri", version).eval()
        assert depends(net, lambda out: out.seg[:, 1]) == [True, False]
        assert depends(net, lambda out: out.seg[:, 2]) == [False, True]
    assert depends(net_of("mri", "v2-rec").eval(), lambda out: out.seg) == [False, True]


# θ of Eq. 4


def test_a_fixed_theta_sums_the_logits():
    net = net_of("petct", "v4", theta=0.2)
    out = net(wave(0.0), wave(1.0))
    torch.testing.assert_close(out.seg, 0.8 * out.pet_seg + 0.2 * out.ct_seg)
    assert not net.theta.requires_grad


def test_a_learned_theta_starts_halfway_and_gets_its_gradient():
    net = net_of("petct", "v4", theta="learn")
    out = net(wave(0.0), wave(1.0))
    torch.testing.assert_close(out.seg, (out.pet_seg + out.ct_seg) / 2)
    out.seg[:, 1].mean().backward()  # d/dθ of (1 - θ) pet + θ ct is ct - pet
    expected = (out.ct_seg - out.pet_seg)[:, 1].mean().item()
    assert net.theta.grad.item() == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3


@pytest.mark.parametrize(("kind", "version"), [f for f in FIELDS if f != ("petct", "v4")])
def test_versions_without_fusion_have_no_theta_to_learn(kind, version):
    assert not sizes_only(version, kind=kind, theta="learn").theta.requires_grad


# The classifier T (Eq. 3)


@pytest.mark.parametrize("sides", [(32, 32, 32), (48, 64, 32), (96, 96, 96)])
def test_classifier_takes_any_patch(sides):
    net = net_of("petct", "v3").eval()
    ct, pet = wave(0.0, (1, 1, *sides)), wave(1.0, (1, 1, *sides))
    with torch.no_grad():
        assert net(ct, pet, heads=("tumor",)).tumor.shape == (1,)


@pytest.mark.parametrize("side", [6, 12])  # of the bottom: 96 / 16, where nothing is pooled; 192
def test_classifier_is_its_formula(side):
    torch.manual_seed(0)
    head = Classifier(512).eval()
    bottoms = wave(0.0, (2, 512, side, side, side))
    weight, bias, _, _, slope, w1, b1, w2, b2 = head.parameters()  # the norm is still the identity
    x = torch.einsum("bcwhd,c->bwhd", bottoms, weight.flatten()) + bias
    x = torch.where(x > 0, x, slope * x)
    if side == 12:
        x = x.reshape(2, 6, 2, 6, 2, 6, 2).mean((2, 4, 6))
    x = x.flatten(1)
    expected = ((x @ w1.T + b1).relu() @ w2.T + b2)[:, 0]
    torch.testing.assert_close(head(bottoms), expected, rtol=1e-3, atol=1e-5)
    assert [layer.p for layer in head if isinstance(layer, torch.nn.Dropout)] == [0.5]


@pytest.mark.parametrize(("sees", "ct_matters"), [("both", True), ("pet", False)])
def test_classifier_sees_the_bottoms_it_is_meant_to(sees, ct_matters):
    net = net_of("petct", "v3", classifier=sees).eval()
    assert depends(net, lambda out: out.tumor) == [ct_matters, True]
    ct, pet = wave(0.0).requires_grad_(), wave(1.0).requires_grad_()
    tumor = net(ct, pet).tumor
    to_ct, to_pet = torch.autograd.grad(tumor.sum(), (ct, pet), allow_unused=True)
    assert to_pet.norm() > 0
    assert (to_ct is not None and to_ct.norm().item() > 0) == ct_matters


def test_bottleneck_decoder_gets_both_bottoms_and_no_skips():
    net = net_of("petct", "v2").eval()
    with torch.no_grad():
        bottoms = [encode(net.ct, wave(0.0))[-1], encode(net.pet, wave(1.0))[-1]]
        assert [tuple(b.shape) for b in bottoms] == [(2, 256, 2, 1, 1)] * 2
        expected = net.btl_decoder(torch.cat(bottoms, dim=1))
        torch.testing.assert_close(net(wave(0.0), wave(1.0)).pet_rec, expected)


# Errors


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_versions_that_brain_tumours_lack_are_refused(version):
    with pytest.raises(ValueError, match=f"{version} .*choose from v1, v2, v2-rec"):
        MirrorUNet(version, kind="mri")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v5"}, "v5 .*choose from v1, v2, v3, v4"),
        ({"kind": "ultrasound"}, "'ultrasound': choose from petct, mri"),
        ({"shared": (0, 5)}, r"shared layers \[0, 5\]"),
        ({"shared": (9,)}, r"shared layers \[9\]"),
        ({"theta": 1.1}, "theta 1.1"),
        ({"theta": -0.1}, "theta -0.1"),
        ({"theta": float("nan")}, "theta nan"),
        ({"bottleneck": "none"}, "bottleneck 'none': choose from own, joint"),
        ({"norm": "group"}, "norm 'group': choose from shared, private"),
        ({"classifier": "ct"}, "classifier 'ct': choose from both, pet"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MirrorUNet(**options)


@pytest.mark.parametrize(
    ("ct", "pet"),
    [
        ((1, 1, 32, 24, 32), (1, 1, 32, 24, 32)),
        ((1, 1, 32, 32, 31), (1, 1, 32, 32, 31)),
        ((1, 1, 32, 32, 32), (1, 1, 32, 32, 16)),
        ((2, 1, 32, 32, 32), (1, 1, 32, 32, 32)),
    ],
)
def test_bad_patches_are_refused(ct, pet):
    with pytest.raises(ValueError, match="sides that divide by 16"):
        sizes_only("v1")(torch.zeros(ct), torch.zeros(pet))


# From logits to classes


TIES = np.array(list(itertools.product([-1.5, 0.0, 0.5, 2.0], repeat=2))).T.reshape(2, 4, 2, 2)


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_one_softmax_decides_for_the_largest_logit(of):
    both = decide(of(TIES), variant_of("mri", "v2-rec"))
    one = decide(of(TIES[:1]), variant_of("petct", "v4"))
    for voxel in np.ndindex(TIES.shape[1:]):
        edema, core = TIES[0][voxel], TIES[1][voxel]
        winner = int(np.argmax([0.0, edema, core]))  # the first of equals
        assert [bool(both[0][voxel]), bool(both[1][voxel])] == [winner == 1, winner == 2]
        assert bool(one[0][voxel]) == (edema > 0)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_branches_of_their_own_decide_alone(of, version):
    present = decide(of(TIES), variant_of("mri", version))
    for voxel in np.ndindex(TIES.shape[1:]):
        assert bool(present[0][voxel]) == (TIES[0][voxel] > 0)
        assert bool(present[1][voxel]) == (TIES[1][voxel] > 0)


def test_margins_are_foreground_minus_background():
    seg = torch.tensor([1.0, 4.0, -2.0]).reshape(1, 3, 1, 1, 1)
    assert margins(seg).flatten().tolist() == [3.0, -3.0]


def test_decisions_of_the_brain_tumour_branches_are_their_own_argmax():
    variant = variant_of("mri", "v1")
    with torch.no_grad():
        out = net_of("mri", "v1")(wave(0.0), wave(1.0))
    present = decide(margins(out.seg)[0], variant)
    assert torch.equal(present[0], out.ct_seg[0].argmax(0) == 1)
    assert torch.equal(present[1], out.pet_seg[0].argmax(0) == 1)
    assert (present[0] & present[1]).any() and not present.all()
