"""Mirror U-Net against the paper's layers, the released code's sizes and MONAI's U-Net."""

import itertools
import math

import numpy as np
import pytest
import torch

import mirror_unet
from mirror_unet import EDEMA_CORE, LESION, VARIANTS, MirrorUNet, Task, Variant, decide, margins

torch.set_num_threads(1)  # tensors are small: more threads only wait for each other

# Parameters of layers 1-8. Layer 1: convolutions 448 and 6,928, norms and PReLUs 66, shortcut 448.
SIZES = [7_890, 55_522, 221_634, 885_634, 2_688_770, 774_530, 138_434, 34_658]
TABLE_2 = {  # L: parameters of v4 and of v3 (whose classifier sees PET), from the released code
    (3,): (9_396_201, 10_551_474), (4,): (8_732_201, 9_887_474), (5,): (6_929_065, 8_084_338),
    (6,): (8_843_305, 9_998_578), (7,): (9_479_401, 10_634_674),
    (4, 5, 6): (5_268_901, 6_424_174), (3, 4, 5, 6, 7): (4_908_833, 6_064_106),
}  # fmt: skip
ALL = tuple(range(1, 9))
FIELDS = {  # channels of every field that a version fills; tumor is one logit per sample
    ("petct", "v1"): {"seg": 2, "pet": 2, "ct": 1},
    ("petct", "v2"): {"seg": 2, "pet": 2, "ct": 1, "btl": 1},
    ("petct", "v3"): {"seg": 2, "pet": 2, "ct": 1, "btl": 1, "tumor": 0},
    ("petct", "v4"): {"seg": 2, "pet": 2, "ct": 2},
    ("petct", "v5"): {"seg": 2, "pet": 2, "ct": 2, "btl": 1, "tumor": 0},
    ("mri", "v1"): {"seg": 3, "pet": 2, "ct": 2},
    ("mri", "v2"): {"seg": 3, "pet": 2, "ct": 2, "btl": 2},
    ("mri", "v2-rec"): {"seg": 3, "pet": 3, "ct": 1, "btl": 1},
}
SMALL = (2, 1, 32, 16, 16)
ORGANS, THREE = Task("organs", ("liver", "spleen", "bladder")), Task("mask", ("a", "b", "c"))
BOTH, CT_ONLY, PET_ONLY = [True, True], [True, False], [False, True]


def sizes_only(version="v4", shared=(5,), **options):
    """A network without storage: enough to count parameters and compare identities."""
    with torch.device("meta"):
        return MirrorUNet(version, shared, **options)


def count(*args, **options):
    return mirror_unet.count_parameters(sizes_only(*args, **options))


def net_of(kind, version, channels=(4, 8, 8, 16, 16), **options):
    torch.manual_seed(0)
    return MirrorUNet(version, kind=kind, channels=channels, **options)


def wave(phase, shape=SMALL):
    t = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((torch.sin(0.37 * t + phase) + 1) / 2).float().reshape(shape)


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_counts_of_layers_and_other_networks():
    net = sizes_only("v1", shared=())
    assert [size(layer) for layer in net.pet] == [*SIZES, 1_845]
    assert [size(layer) for layer in net.ct] == [*SIZES, 896]
    assert size(net.pet) == 4_808_917  # MONAI's UNet with one input and two output channels
    assert count(shared=()) == 9_617_834 + 1  # two branches and θ
    assert count(shared=ALL) == 4_808_917 + 1_845 + 1  # one more output
    v4, v3 = TABLE_2[(5,)]
    assert count("v1") == v4 - 949  # CT ends in one channel, not two: 1,845 - 896
    assert count("v2") == v4 - 949 + 1_100_153
    assert count("v3") == v3 + 256  # T sees CT too: its 1^3 convolution has 256 more
    # Layer 5 has two batch norms of 256 channels, each with a scale and a shift.
    assert count(norm="private") == v4 + 2 * 2 * 256
    joint = sizes_only("v2", bottleneck="joint")  # not counted
    assert size(joint.joint) == 2 * (512 * 256 + 256)
    assert mirror_unet.count_parameters(joint) == count("v2")
    for shared in ((), (5,), (2, 7)):  # features meet without weights of their own
        assert size(sizes_only("v2", shared, bottleneck="mean")) == count("v2", shared)
    # The last layer of D_BTL with n channels: transposed convolution 16 * n * 27 + n, norm 2n,
    # PReLU 1, convolution n * n * 27 + n, norm 2n, PReLU 1: 467 for n = 1 (a reconstruction) and
    # 986 for n = 2 (the whole tumour). The output layer of a branch with n channels: 32 * n * 27
    # + n, 2n, 1, n * n * 27 + n: 896, 1,845 and, for edema and core in one softmax, 2,848.
    two_branches = 9_617_834 - SIZES[4] + 1
    assert count("v1", kind="mri") == two_branches
    assert count("v2", kind="mri") == two_branches + 1_100_153 - 467 + 986
    assert count("v2-rec", kind="mri") == two_branches - 2 * 1_845 + 2_848 + 896 + 1_100_153


@pytest.mark.parametrize("shared", TABLE_2)
def test_organs_cost_a_wider_output_layer(shared):
    ten = tuple(f"organ {i}" for i in range(10))
    wider = (32 * 11 * 27 + 11 + 2 * 11 + 1 + 11 * 11 * 27 + 11) - 896  # 11 channels in place of 1
    v3 = TABLE_2[shared][1] + 256
    pinned = {
        (3,): 10_563_650, (4,): 9_899_650, (5,): 8_096_514, (6,): 10_010_754, (7,): 10_646_850,
        (4, 5, 6): 6_436_350, (3, 4, 5, 6, 7): 6_076_282,
    }  # fmt: skip
    assert count("v5", shared, organs=ten) == v3 + wider == pinned[shared]


def test_v5_is_v3_but_for_what_its_ct_branch_puts_out():
    v3 = net_of("petct", "v3").eval()
    v5 = net_of("petct", "v5", organs=("a", "b", "c")).eval()
    assert v5.variant.tasks["ct"].classes == ("a", "b", "c") and v5.variant.organs == "ct"
    wider = {n for n, p in v5.state_dict().items() if n.startswith("ct.8.")}
    v3.load_state_dict(v5.state_dict() | {n: v3.state_dict()[n] for n in wider})
    with torch.no_grad():
        theirs, ours = v3(wave(0.0), wave(1.0)), v5(wave(0.0), wave(1.0))
    for name in ("seg", "pet", "btl", "tumor"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    expected = [0.068587, 0.062778, -0.082879, 0.194570]
    assert ours.ct[0, :, 3, 7, 11].tolist() == pytest.approx(expected, abs=1e-5)
    assert (
        depends(v5, lambda out: out.seg) == PET_ONLY and depends(v5, lambda out: out.ct) == CT_ONLY
    )
    for bottleneck in ("joint", "mean"):
        net = net_of("petct", "v5", bottleneck=bottleneck).eval()
        assert depends(net, lambda out: out.seg) == depends(net, lambda out: out.ct) == BOTH


@pytest.mark.parametrize("norm", ["shared", "private"])
def test_values_of_monai(norm):
    # MONAI 1.6.1: UNet(3, 1, out, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), given the
    # weights of each branch leaf by leaf, and its up layers 512-64-32-16-1 those of D_BTL. After a
    # training pass running statistics count; MONAI's two U-Nets keep their own, as "private" does.
    train = {
        "seg": [-0.249847, -0.393218, -0.028158, -0.404300, 0.118689],
        "ct": [-0.431283, 1.684632, 0.140816, 1.061775, 0.052403],
        "btl": [0.151149, -1.020643, 0.323071, 0.438292, 0.059468],
    }
    evaluation = {
        "seg": [0.000115, 0.395717, 0.286251, 0.048715, -0.065079],
        "ct": [0.104122, 0.262410, 0.205593, 0.592918, 0.139632],
        "btl": [0.050551, 0.060951, 0.028182, 0.049550, 0.048049],
    }
    voxels = [(0, 0, 0), (3, 7, 11), (16, 40, 16), (31, 0, 5), (20, 29, 30)]
    net = net_of("petct", "v2", channels=mirror_unet.CHANNELS, norm=norm)
    ct, pet = wave(0.0, (1, 1, 32, 48, 32)), wave(1.0, (1, 1, 32, 48, 32))
    for mode, expected in [(True, train), (False, evaluation)][: 1 + (norm == "private")]:
        with torch.no_grad():
            out = net.train(mode)(ct, pet)
        for field, values in expected.items():  # the last channel of each
            found = [getattr(out, field)[0, -1][voxel].item() for voxel in voxels]
            assert found == pytest.approx(values, abs=1e-4), (mode, field)


@pytest.mark.parametrize("shared", [*TABLE_2, (), ALL])
def test_exactly_the_listed_layers_are_one_module_as_table_2_counts(shared):
    net = sizes_only(shared=shared)
    if shared in TABLE_2:
        found = (mirror_unet.count_parameters(net), count("v3", shared, classifier="pet"))
        assert found == TABLE_2[shared]
    pairs = list(enumerate(zip(net.ct, net.pet, strict=True), start=1))
    assert tuple(i for i, (ct, pet) in pairs if ct is pet) == shared
    listed = [id(p) for i in shared for p in net.pet[i - 1].parameters()]
    assert [id(p) for p in net.shared_parameters()] == listed


def test_private_norms_share_everything_but_the_batch_norms():
    net = sizes_only(shared=(5, 6), norm="private")
    pairs = zip(net.ct[4:6].modules(), net.pet[4:6].modules(), strict=True)
    same = [(a is b, isinstance(a, torch.nn.BatchNorm3d)) for a, b in pairs if not [*a.children()]]
    assert same.count((False, True)) == 2 + 2  # norms
    assert same.count((True, False)) == 5 + 4 == len(same) - 4  # convolutions and PReLUs
    assert len(net.shared_parameters()) == 2 * (3 + 2) + (2 + 2)  # weights, biases; slopes


@pytest.mark.parametrize(
    "options",
    [
        {"bottleneck": "own"}, {"bottleneck": "joint"}, {"bottleneck": "mean"},
        {"bottleneck": "mean", "shared": (2, 7), "norm": "private"},
        {"bottleneck": "mean", "shared": (8,)},
    ],
)  # fmt: skip
@pytest.mark.parametrize(("kind", "version"), FIELDS)
def test_a_version_fills_its_fields_each_by_itself_too(kind, version, options):
    net, channels = net_of(kind, version, **options), FIELDS[kind, version]
    assert set(net.heads) == set(channels)
    out = {k: v for k, v in net(wave(0.0), wave(1.0))._asdict().items() if v is not None}
    shapes = {name: (2, c, *SMALL[2:]) if c else (2,) for name, c in channels.items()}
    assert {name: tuple(value.shape) for name, value in out.items()} == shapes
    sum(value.square().sum() for value in out.values()).backward()
    idle = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []  # every weight serves some task
    net.eval()
    full = net(wave(0.0), wave(1.0))
    for name in net.heads:
        alone = net(wave(0.0), wave(1.0), heads=(name,))
        assert torch.allclose(getattr(alone, name), getattr(full, name), atol=1e-6)


def test_variants_have_the_tasks_of_fig_2_and_what_follows_from_them():
    petct, mri, one, two = VARIANTS["petct"], VARIANTS["mri"], ("pet",), ("ct", "pet")
    for variant, mask, fused, exclusive, restores, classes in (
        (petct["v3"], one, False, True, True, ("lesion",)),
        (petct["v4"], two, True, True, False, ("lesion",)),
        (mri["v2"], two, False, False, False, ("edema", "core")),
        (mri["v2-rec"], one, False, True, True, ("edema", "core")),
        (Variant(ct=THREE, pet=THREE), two, True, True, False, ("a", "b", "c")),
        (Variant(ct=ORGANS, pet=LESION), one, False, True, False, ("lesion",)),
    ):
        assert (tuple(variant.mask), variant.fused, variant.exclusive) == (mask, fused, exclusive)
        assert (variant.restores, variant.classes) == (restores, classes)
    rows = {(kind, version): VARIANTS[kind][version] for kind, version in FIELDS}
    for key, row in rows.items():  # Φ keeps CT's reconstruction from copying
        assert (row.phi == "shuffle") == (FIELDS[key]["ct"] == 1) == (row.ct.target == "ct")
        assert row.btl is None or row.btl.target == ("pet" if row.phi else "mask")
        assert row.tumor == ("tumor" in FIELDS[key]) and row.join is None
    found = {slot: task.classes for slot, task in rows["mri", "v2"].tasks.items()}
    assert found == {"ct": ("edema",), "pet": ("core",), "btl": ("whole",)}


def test_a_row_of_your_own_is_a_version(monkeypatch):
    monkeypatch.setitem(VARIANTS["petct"], "organs", Variant(ct=ORGANS, pet=LESION))
    monkeypatch.setitem(VARIANTS["petct"], "three", Variant(ct=THREE, pet=THREE))
    net = net_of("petct", "organs")
    out = net(wave(0.0), wave(1.0))
    assert net.heads == ("seg", "ct", "pet") and torch.equal(out.seg, out.pet)
    assert (out.ct.shape[1], out.seg.shape[1]) == (4, 2)
    out = net_of("petct", "three", theta=0.2)(wave(0.0), wave(1.0))
    assert torch.allclose(out.seg, 0.2 * out.ct + 0.8 * out.pet, atol=1e-6)


def depends(net, pick):
    """Whether pick(out) changes with the CT slot and with the PET slot."""
    ct, pet = wave(0.0), wave(1.0)
    with torch.no_grad():
        base, *others = map(pick, (net(ct, pet), net(wave(2.0), pet), net(ct, wave(2.0))))
    return [not torch.equal(base, other) for other in others]


def test_each_output_sees_the_images_it_should_and_runs_no_more():
    net = net_of("petct", "v3", shared=())
    net(wave(0.0), wave(1.0), heads=("seg",))
    runs = [branch[0].convs[0][1].num_batches_tracked.item() for branch in (net.ct, net.pet)]
    assert runs == [0, 1]  # the CT branch never ran
    for version, training in (("v1", False), ("v2", False), ("v3", False), ("v3", True)):
        own = net_of("petct", version).train(training)
        joint = net_of("petct", version, bottleneck="joint").train(training)
        assert depends(own, lambda out: out.seg) == PET_ONLY
        assert depends(joint, lambda out: out.seg) == BOTH  # CT reaches the mask
        for shared in ((1,), (5,), (8,), ()):  # by any layer of L, and by these alone
            mean = net_of("petct", version, bottleneck="mean", shared=shared).train(training)
            assert depends(mean, lambda out: out.seg) == (BOTH if shared else PET_ONLY)
    assert depends(joint.eval(), lambda out: out.ct) == BOTH
    v2 = net_of("petct", "v2").eval()
    assert depends(v2, lambda out: out.ct) == CT_ONLY
    assert depends(v2, lambda out: out.btl) == BOTH
    for theta, expected in ((0.0, PET_ONLY), (0.3, BOTH), (1.0, CT_ONLY)):
        assert depends(net_of("petct", "v4", theta=theta).eval(), lambda out: out.seg) == expected
    for sees, expected in (("both", BOTH), ("pet", PET_ONLY)):
        v3 = net_of("petct", "v3", classifier=sees).eval()
        assert depends(v3, lambda out: out.tumor) == expected
    for version in ("v1", "v2"):
        net = net_of("mri", version).eval()
        assert depends(net, lambda out: out.seg[:, 1]) == CT_ONLY  # edema from FLAIR
        assert depends(net, lambda out: out.seg[:, 2]) == PET_ONLY  # core from T1Gd


def test_mean_features_go_on_where_l_says_and_run_what_they_need():
    net = net_of("petct", "v3", shared=(2, 5, 7), bottleneck="mean", norm="private")
    ct, pet = wave(0.0), wave(1.0)
    with torch.no_grad():
        a1, b1 = net.ct[0](ct), net.pet[0](pet)
        m2 = (net.ct[1](a1) + net.pet[1](b1)) / 2
        a3, b3 = net.ct[2](m2), net.pet[2](m2)
        a4, b4 = net.ct[3](a3), net.pet[3](b3)
        m5 = (net.ct[4](a4) + net.pet[4](b4)) / 2
        a6, b6 = (up(torch.cat([s, m5], 1)) for up, s in ((net.ct[5], a4), (net.pet[5], b4)))
        a7, b7 = (up(torch.cat(x, 1)) for up, *x in ((net.ct[6], a3, a6), (net.pet[6], b3, b6)))
        m7 = torch.cat([m2, (a7 + b7) / 2], 1)  # the skip from a layer of L is its mean
        a8, b8 = net.ct[7](m7), net.pet[7](m7)
        expected = {
            "ct": net.ct[8](torch.cat([a1, a8], 1)), "seg": net.pet[8](torch.cat([b1, b8], 1)),
            "btl": net.btl_decoder(torch.cat([m5, m5], 1)),
        }  # fmt: skip
        for name, value in expected.items():
            assert torch.equal(getattr(net(ct, pet), name), value), name
    for shared, runs in (((5,), [1, 0]), ((7,), [1, 1]), ((), [0, 0])):
        net = net_of("petct", "v3", shared=shared, bottleneck="mean")
        net(ct, pet, heads=("seg",))
        ran = (net.ct[0].convs[0][1], net.ct[7].up[1])  # in the encoder and the decoder of CT
        assert [norm.num_batches_tracked.item() for norm in ran] == runs


@pytest.mark.parametrize(("kind", "version"), FIELDS)
def test_without_layers_in_l_the_mean_is_own_bit_for_bit(kind, version):
    own, mean = (net_of(kind, version, shared=(), bottleneck=b) for b in ("own", "mean"))
    torch.manual_seed(0)  # for dropout
    expected = own(wave(0.0), wave(1.0))
    torch.manual_seed(0)
    for a, b in zip(expected, mean(wave(0.0), wave(1.0)), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_mean_keeps_the_memory_layout_and_the_precision_of_its_layers():
    net = net_of("petct", "v2", shared=(2, 6), bottleneck="mean")
    seen = []
    for layer in (net.pet[2], net.pet[6]):
        layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    net = net.to(memory_format=torch.channels_last_3d)
    full = net(wave(0.0), wave(1.0)).seg
    assert all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in seen)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(wave(0.0), wave(1.0)).seg
    assert {x.dtype for x in seen[2:]} == {torch.bfloat16} == {half.dtype}
    assert (full - half).abs().max() < 0.1 * full.abs().max()


def test_theta_can_be_learned():
    net = net_of("petct", "v4", theta="learn")
    out = net(wave(0.0), wave(1.0))
    assert torch.allclose(out.seg, (out.pet + out.ct) / 2, atol=1e-6)
    out.seg[:, 1].mean().backward()  # d/dθ of (1 - θ) pet + θ ct is ct - pet
    expected = (out.ct - out.pet)[:, 1].mean().item()
    assert net.theta.grad.item() == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3
    assert not sizes_only("v1", theta="learn").theta.requires_grad  # nothing to weigh there
    assert not sizes_only("v4", theta=0.2).theta.requires_grad


def test_classifier_is_its_formula():
    torch.manual_seed(0)
    head, bottoms = mirror_unet.Classifier(64).eval(), wave(0.0, (2, 64, 12, 12, 12))
    weight, bias, _, _, slope, w1, b1, w2, b2 = head.parameters()  # the norm is still the identity
    x = torch.einsum("bcwhd,c->bwhd", bottoms, weight.flatten()) + bias
    x = torch.where(x > 0, x, slope * x)
    x = x.reshape(2, 6, 2, 6, 2, 6, 2).mean((2, 4, 6)).flatten(1)  # to 6^3
    expected = ((x @ w1.T + b1).relu() @ w2.T + b2)[:, 0]
    assert torch.allclose(head(bottoms), expected, rtol=1e-3, atol=1e-5)
    assert [layer.p for layer in head if isinstance(layer, torch.nn.Dropout)] == [0.5]


def test_bad_options_patches_and_heads_are_refused():
    for options, message in (
        ({"version": "v6"}, "v6 .*choose from v1, v2, v3, v4, v5"),
        ({"version": "v4", "kind": "mri"}, "v4 .*choose from v1, v2, v2-rec"),
        ({"kind": "ultrasound"}, "not defined for ultrasound: choose from petct, mri"),
        ({"shared": (0, 5)}, r"shared layers \[0, 5\]"),
        ({"shared": (9,)}, r"shared layers \[9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            MirrorUNet(**options)
    net, fits = sizes_only("v1"), torch.zeros(1, 1, 32, 32, 32)
    odd, colour = torch.zeros(1, 1, 32, 24, 32), torch.zeros(1, 2, 32, 32, 32)
    for ct, pet in ((odd, odd), (colour, colour), (fits, fits[..., :16]), (fits[0], fits[0])):
        with pytest.raises(ValueError, match="sides that divide by 16"):
            net(ct, pet)
    with pytest.raises(ValueError, match=r"heads \['btl', 'tumor'\]: .* has seg, ct, pet"):
        net(fits, fits, heads=("seg", "btl", "tumor"))


def ties(channels):
    """Margins (channels, 4 ** channels, 1, 1): every combination of four levels."""
    grid = list(itertools.product([-1.5, 0.0, 0.5, 2.0], repeat=channels))
    return np.array(grid).T.reshape(channels, -1, 1, 1)


def one_softmax(margin):
    """Classes present by the larger logit; the background, 0, and then the first win a tie."""
    winner = np.concatenate([np.zeros_like(margin[:1]), margin]).argmax(0)
    return np.stack([winner == k + 1 for k in range(len(margin))])


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_decisions(of):
    for variant in (VARIANTS["petct"]["v4"], Variant(pet=EDEMA_CORE), Variant(pet=THREE)):
        margin = ties(len(variant.classes))
        assert np.array_equal(np.asarray(decide(of(margin), variant)), one_softmax(margin))
    assert np.array_equal(np.asarray(decide(of(ties(2)), VARIANTS["mri"]["v1"])), ties(2) > 0)
    for task in (LESION, EDEMA_CORE):  # late fusion
        one, other = np.split(ties(2 * len(task.classes)), 2)
        a, b, mean = one_softmax(one), one_softmax(other), one_softmax(one + other)
        for mode, expected in (("logits", mean), ("union", a | b), ("intersection", a & b)):
            both = of(np.concatenate([one, other]))
            found = decide(both, Variant(pet=task, join=mode))
            assert np.array_equal(np.asarray(found), expected), mode
        assert (mean != (a | b)).any() and (mean != (a & b)).any()


def test_decisions_of_the_brain_tumour_branches_are_their_own_argmax():
    with torch.no_grad():
        out = net_of("mri", "v1")(wave(0.0), wave(1.0))
    present = decide(margins(out.seg)[0], VARIANTS["mri"]["v1"])
    assert torch.equal(present[0], out.ct[0].argmax(0) == 1)
    assert torch.equal(present[1], out.pet[0].argmax(0) == 1)
    assert (present[0] & present[1]).any() and not present.all()
