"""Mirror U-Net against the paper's layers, the released code's sizes and MONAI's U-Net."""

import itertools
import math

import numpy as np
import pytest
import torch

import mirror_unet
from mirror_unet import (
    EDEMA_CORE,
    LESION,
    VARIANTS,
    MirrorUNet,
    Task,
    Variant,
    count_parameters,
    decide,
    foreground_logits,
)

torch.set_num_threads(1)  # tensors are small: more threads only wait for each other

# Parameters of layers 1-8. Layer 1: convolutions 448 and 6,928, norms and PReLUs 66, shortcut 448.
SIZES = [7_890, 55_522, 221_634, 885_634, 2_688_770, 774_530, 138_434, 34_658]
BOTTLENECK_DECODER = 1_100_153
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
ORGANS = Task("organs", ("liver", "spleen", "bladder"))
THREE = Task("mask", ("a", "b", "c"))
BOTH, CT_ONLY, PET_ONLY = [True, True], [True, False], [False, True]


def sizes_only(version="v4", shared=(5,), **options):
    """A network without storage: enough to count parameters and compare identities."""
    with torch.device("meta"):
        return MirrorUNet(version, shared, **options)


def count(*args, **options):
    return count_parameters(sizes_only(*args, **options))


def net_of(kind, version, channels=(4, 8, 8, 16, 16), **options):
    torch.manual_seed(0)
    return MirrorUNet(version, kind=kind, channels=channels, **options)


def wave(phase, shape=SMALL):
    t = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((torch.sin(0.37 * t + phase) + 1) / 2).float().reshape(shape)


def depends(net, field, channel=slice(None)):
    """Whether a field of the output changes with the CT slot and with the PET slot."""
    ct, pet = wave(0.0), wave(1.0)
    other = wave(2.0)
    with torch.no_grad():
        base = getattr(net(ct, pet), field)[:, channel]
        other_ct = getattr(net(other, pet), field)[:, channel]
        other_pet = getattr(net(ct, other), field)[:, channel]
    return [not torch.equal(base, other_ct), not torch.equal(base, other_pet)]


# ------------------------------------------------------------------ sizes and sharing


def test_counts_of_layers_and_other_networks():
    net = sizes_only("v1", shared=())
    assert [count_parameters(layer) for layer in net.pet] == [*SIZES, 1_845]
    assert [count_parameters(layer) for layer in net.ct] == [*SIZES, 896]
    assert count_parameters(net.pet) == 4_808_917  # MONAI's UNet, one channel in and two out
    assert count(shared=()) == 9_617_834 + 1  # two branches and θ
    assert count(shared=ALL) == 4_808_917 + 1_845 + 1  # one more output
    v4, v3 = TABLE_2[(5,)]
    assert count("v1") == v4 - 949  # CT ends in one channel, not two: 1,845 - 896
    assert count("v2") == v4 - 949 + BOTTLENECK_DECODER
    assert count("v3") == v3 + 256  # T sees CT too: its 1^3 convolution has 256 more
    # Layer 5 has two batch norms of 256 channels, each with a scale and a shift.
    assert count(norm="private") == v4 + 2 * 2 * 256
    assert count("v2", bottleneck="joint") == count("v2") + 2 * (512 * 256 + 256)


def test_counts_of_the_brain_tumour_networks():
    # The last layer of D_BTL with n channels: transposed convolution 16 * n * 27 + n, norm 2n,
    # PReLU 1, convolution n * n * 27 + n, norm 2n, PReLU 1: 467 for n = 1 (a reconstruction) and
    # 986 for n = 2 (the whole tumour). The output layer of a branch with n channels: 32 * n * 27
    # + n, 2n, 1, n * n * 27 + n: 896, 1,845 and, for edema and core in one softmax, 2,848.
    two_branches = 9_617_834 - SIZES[4] + 1
    outputs = 2 * 1_845
    assert count("v1", kind="mri") == two_branches
    assert count("v2", kind="mri") == two_branches + BOTTLENECK_DECODER - 467 + 986
    v2_rec = two_branches - outputs + 2_848 + 896 + BOTTLENECK_DECODER
    assert count("v2-rec", kind="mri") == v2_rec


@pytest.mark.parametrize("shared", [*TABLE_2, (), ALL])
def test_exactly_the_listed_layers_are_one_module_as_table_2_counts(shared):
    net = sizes_only(shared=shared)
    if shared in TABLE_2:
        v3 = count("v3", shared, classifier="pet")
        assert (count_parameters(net), v3) == TABLE_2[shared]
        ten_organs = [f"organ {i}" for i in range(10)]
        wider = (32 * 11 * 27 + 11 + 2 * 11 + 1 + 11 * 11 * 27 + 11) - 896  # 11 channels, not 1
        assert count("v5", shared, organs=tuple(ten_organs)) == v3 + 256 + wider
    listed = []
    for number, (ct, pet) in enumerate(zip(net.ct, net.pet, strict=True), start=1):
        assert (ct is pet) == (number in shared)
        if number in shared:
            listed.extend(pet.parameters())
    assert list(map(id, net.shared_parameters())) == list(map(id, listed))


def test_private_norms_share_everything_but_the_batch_norms():
    net = sizes_only(shared=(5, 6), norm="private")
    shared, private = [], []
    for a, b in zip(net.ct[4:6].modules(), net.pet[4:6].modules(), strict=True):
        if not list(a.children()):
            (shared if a is b else private).append(type(a))
    assert private == 4 * [torch.nn.BatchNorm3d]
    assert len(shared) == 5 + 4 and torch.nn.BatchNorm3d not in shared  # convolutions and PReLUs
    assert len(net.shared_parameters()) == 2 * (3 + 2) + (2 + 2)  # weights, biases; slopes


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("norm", ["shared", "private"])
def test_values_of_monai(norm):
    # MONAI 1.6.1: UNet(3, 1, out, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), given the
    # weights of each branch leaf by leaf, and its up layers 512-64-32-16-1 those of D_BTL. After a
    # training pass running statistics count; MONAI's two U-Nets keep their own, as "private" does.
    train = {
        "seg": [-0.393218, -0.028158, -0.404300],
        "ct": [1.684632, 0.140816, 1.061775],
        "btl": [-1.020643, 0.323071, 0.438292],
    }
    evaluation = {
        "seg": [0.395717, 0.286251, 0.048715],
        "ct": [0.262410, 0.205593, 0.592918],
        "btl": [0.060951, 0.028182, 0.049550],
    }
    voxels = [(3, 7, 11), (16, 40, 16), (31, 0, 5)]

    net = net_of("petct", "v2", channels=mirror_unet.CHANNELS, norm=norm)
    ct = wave(0.0, (1, 1, 32, 48, 32))
    pet = wave(1.0, (1, 1, 32, 48, 32))
    for training, expected in ((True, train), (False, evaluation)):
        with torch.no_grad():
            out = net.train(training)(ct, pet)
        if not training and norm == "shared":
            continue
        for field, values in expected.items():
            last_channel = getattr(out, field)[0, -1]
            computed = [last_channel[voxel].item() for voxel in voxels]
            assert computed == pytest.approx(values, abs=1e-4), (training, field)


def test_v5_is_v3_but_for_what_its_ct_branch_puts_out():
    v3 = net_of("petct", "v3").eval()
    v5 = net_of("petct", "v5", organs=("a", "b", "c")).eval()
    assert v5.variant.organ_branch == "ct"
    assert v5.variant.tasks["ct"].classes == ("a", "b", "c")

    weights = v5.state_dict()
    for name, value in v3.state_dict().items():
        if name.startswith("ct.8."):  # the output layer, which is wider in v5
            weights[name] = value
    v3.load_state_dict(weights)
    with torch.no_grad():
        out_v3 = v3(wave(0.0), wave(1.0))
        out_v5 = v5(wave(0.0), wave(1.0))
    for name in ("seg", "pet", "btl", "tumor"):
        assert torch.equal(getattr(out_v5, name), getattr(out_v3, name))

    expected = [0.068587, 0.062778, -0.082879, 0.194570]
    assert out_v5.ct[0, :, 3, 7, 11].tolist() == pytest.approx(expected, abs=1e-5)
    assert depends(v5, "seg") == PET_ONLY
    assert depends(v5, "ct") == CT_ONLY
    joint = net_of("petct", "v5", bottleneck="joint").eval()
    assert depends(joint, "seg") == depends(joint, "ct") == BOTH


def test_theta_can_be_learned():
    net = net_of("petct", "v4", theta="learn")
    out = net(wave(0.0), wave(1.0))
    assert torch.allclose(out.seg, (out.pet + out.ct) / 2, atol=1e-6)
    out.seg[:, 1].mean().backward()  # d/dθ of (1 - θ) pet + θ ct is ct - pet
    expected = (out.ct - out.pet)[:, 1].mean().item()
    assert net.theta.grad.item() == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3
    assert not sizes_only("v1", theta="learn").theta.requires_grad  # nothing to weigh there
    fixed = MirrorUNet("v4").theta
    assert fixed.item() == pytest.approx(0.2) and not fixed.requires_grad


def test_classifier_is_its_formula():
    torch.manual_seed(0)
    head = mirror_unet.Classifier(64).eval()
    bottoms = wave(0.0, (2, 64, 12, 12, 12))
    weight, bias, _, _, slope, w1, b1, w2, b2 = head.parameters()  # the norm is still the identity
    x = torch.einsum("bcwhd,c->bwhd", bottoms, weight.flatten()) + bias
    x = torch.where(x > 0, x, slope * x)
    x = x.reshape(2, 6, 2, 6, 2, 6, 2).mean((2, 4, 6)).flatten(1)  # to 6^3
    x = (x @ w1.T + b1).relu()
    expected = (x @ w2.T + b2)[:, 0]
    assert torch.allclose(head(bottoms), expected, rtol=1e-3, atol=1e-5)
    dropout = head[5]
    assert isinstance(dropout, torch.nn.Dropout) and dropout.p == 0.5


# ------------------------------------------------------------------ what each output sees


@pytest.mark.parametrize("bottleneck", ["own", "joint"])
@pytest.mark.parametrize(("kind", "version"), FIELDS)
def test_a_version_fills_its_fields_each_by_itself_too(kind, version, bottleneck):
    net = net_of(kind, version, bottleneck=bottleneck)
    channels = FIELDS[kind, version]
    assert set(net.heads) == set(channels)
    out = net(wave(0.0), wave(1.0))

    total = 0
    for name, value in out._asdict().items():
        if name not in channels:
            assert value is None
            continue
        shape = (2, channels[name], *SMALL[2:]) if name != "tumor" else (2,)
        assert value.shape == shape
        total = total + value.square().sum()
    total.backward()
    for name, parameter in net.named_parameters():  # every weight serves some task
        assert parameter.grad is not None or not parameter.requires_grad, name

    net.eval()
    full = net(wave(0.0), wave(1.0))
    for name in net.heads:
        alone = net(wave(0.0), wave(1.0), heads=(name,))
        assert torch.allclose(getattr(alone, name), getattr(full, name), atol=1e-6)


def test_inference_of_the_mask_runs_no_ct_branch():
    net = net_of("petct", "v3", shared=())
    net(wave(0.0), wave(1.0), heads=("seg",))
    first_norms = [branch[0].convs[0][1] for branch in (net.ct, net.pet)]
    assert [norm.num_batches_tracked.item() for norm in first_norms] == [0, 1]


@pytest.mark.parametrize(
    ("kind", "version", "options", "field", "expected"),
    [
        ("petct", "v1", {}, "seg", PET_ONLY),
        ("petct", "v2", {}, "seg", PET_ONLY),
        ("petct", "v3", {}, "seg", PET_ONLY),
        ("petct", "v1", {"bottleneck": "joint"}, "seg", BOTH),  # CT reaches the mask
        ("petct", "v3", {"bottleneck": "joint"}, "seg", BOTH),
        ("petct", "v3", {"bottleneck": "joint"}, "ct", BOTH),
        ("petct", "v2", {}, "ct", CT_ONLY),
        ("petct", "v2", {}, "btl", BOTH),
        ("petct", "v4", {"theta": 0.0}, "seg", PET_ONLY),
        ("petct", "v4", {"theta": 0.3}, "seg", BOTH),
        ("petct", "v4", {"theta": 1.0}, "seg", CT_ONLY),
    ],
)
def test_each_output_sees_the_images_it_should(kind, version, options, field, expected):
    net = net_of(kind, version, **options)
    assert depends(net, field) == expected  # in training
    assert depends(net.eval(), field) == expected


def test_the_classifier_and_each_brain_tumour_class_see_what_they_should():
    for sees, expected in (("both", BOTH), ("pet", PET_ONLY)):
        v3 = net_of("petct", "v3", classifier=sees).eval()
        assert depends(v3, "tumor", None) == expected
    for version in ("v1", "v2"):
        net = net_of("mri", version).eval()
        assert depends(net, "seg", 1) == CT_ONLY  # edema from FLAIR
        assert depends(net, "seg", 2) == PET_ONLY  # core from T1Gd


# ------------------------------------------------------------------ variants


def test_variants_have_the_tasks_of_fig_2_and_what_follows_from_them():
    petct, mri = VARIANTS["petct"], VARIANTS["mri"]
    one, two = ["pet"], ["ct", "pet"]
    lesion, parts = ("lesion",), ("edema", "core")
    for variant, mask, fused, one_softmax, reconstructs, classes in (
        (petct["v3"], one, False, True, True, lesion),
        (petct["v4"], two, True, True, False, lesion),
        (mri["v2"], two, False, False, False, parts),
        (mri["v2-rec"], one, False, True, True, parts),
        (Variant(ct=THREE, pet=THREE), two, True, True, False, ("a", "b", "c")),
        (Variant(ct=ORGANS, pet=LESION), one, False, True, False, lesion),
    ):
        assert list(variant.mask_tasks) == mask
        assert (variant.fused, variant.one_softmax) == (fused, one_softmax)
        assert (variant.reconstructs, variant.classes) == (reconstructs, classes)

    for (kind, version), fields in FIELDS.items():
        variant = VARIANTS[kind][version]
        restores_ct = fields["ct"] == 1
        assert (variant.phi == "shuffle") == restores_ct  # Φ keeps CT from being copied
        assert variant.takes_phi == (restores_ct or version == "v5")
        if variant.btl:
            assert variant.btl.target == ("pet" if variant.takes_phi else "mask")
        assert variant.tumor == ("tumor" in fields)
    tasks = {slot: task.classes for slot, task in mri["v2"].tasks.items()}
    assert tasks == {"ct": ("edema",), "pet": ("core",), "btl": ("whole",)}


def test_a_row_of_your_own_is_a_version(monkeypatch):
    monkeypatch.setitem(VARIANTS["petct"], "organs", Variant(ct=ORGANS, pet=LESION))
    monkeypatch.setitem(VARIANTS["petct"], "three", Variant(ct=THREE, pet=THREE))
    net = net_of("petct", "organs")
    out = net(wave(0.0), wave(1.0))
    assert net.heads == ("seg", "ct", "pet") and torch.equal(out.seg, out.pet)
    assert (out.ct.shape[1], out.seg.shape[1]) == (4, 2)
    out = net_of("petct", "three", theta=0.2)(wave(0.0), wave(1.0))
    assert torch.allclose(out.seg, 0.2 * out.ct + 0.8 * out.pet, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v6"}, "v6 .*choose from v1, v2, v3, v4, v5"),
        ({"version": "v4", "kind": "mri"}, "v4 .*choose from v1, v2, v2-rec"),
        ({"kind": "ultrasound"}, "not defined for ultrasound: choose from petct, mri"),
        ({"shared": (0, 5)}, r"shared layers \[0, 5\]"),
        ({"shared": (9,)}, r"shared layers \[9\]"),
        ({"bottleneck": "mean"}, "bottleneck 'mean': choose from own, joint"),
        ({"norm": "none"}, "norm 'none': choose from shared, private"),
        ({"classifier": "ct"}, "classifier 'ct': choose from both, pet"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MirrorUNet(**options)


def test_bad_patches_and_heads_are_refused():
    net = sizes_only("v1")
    fits = torch.zeros(1, 1, 32, 32, 32)
    odd = torch.zeros(1, 1, 32, 24, 32)
    colour = torch.zeros(1, 2, 32, 32, 32)
    for ct, pet in ((odd, odd), (colour, colour), (fits, fits[..., :16]), (fits[0], fits[0])):
        with pytest.raises(ValueError, match="sides that divide by 16"):
            net(ct, pet)
    with pytest.raises(ValueError, match=r"heads \['btl', 'tumor'\]: .* has seg, ct, pet"):
        net(fits, fits, heads=("seg", "btl", "tumor"))


# ------------------------------------------------------------------ decisions


def ties(channels):
    """Foreground logits (channels, 4 ** channels, 1, 1): every combination of four levels."""
    grid = list(itertools.product([-1.5, 0.0, 0.5, 2.0], repeat=channels))
    return np.array(grid).T.reshape(channels, -1, 1, 1)


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_decisions(convert):
    for variant in (VARIANTS["petct"]["v4"], Variant(pet=EDEMA_CORE), Variant(pet=THREE)):
        foreground = ties(len(variant.classes))
        background = np.zeros_like(foreground[:1])
        winner = np.concatenate([background, foreground]).argmax(0)  # the first wins a tie
        present = np.asarray(decide(convert(foreground), variant))
        for k in range(len(foreground)):
            assert np.array_equal(present[k], winner == k + 1)
    separate = decide(convert(ties(2)), VARIANTS["mri"]["v1"])
    assert np.array_equal(np.asarray(separate), ties(2) > 0)


def test_decisions_of_the_brain_tumour_branches_are_their_own_argmax():
    net = net_of("mri", "v1")
    with torch.no_grad():
        out = net(wave(0.0), wave(1.0))
    present = net.decide(foreground_logits(out.seg)[0])
    assert torch.equal(present[0], out.ct[0].argmax(0) == 1)
    assert torch.equal(present[1], out.pet[0].argmax(0) == 1)
    assert (present[0] & present[1]).any() and not present.all()
