"""Mirror U-Net against the paper's layers, the released code's sizes and MONAI's U-Net."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

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
GATES = {  # L: parameters that gates add to any version, from the widths of its layers
    (3,): 8_448,  # two of 64 * 64 weights, 64 biases and 64 numbers g
    (4,): 33_280,
    (5,): 132_096,
    (6,): 8_448,
    (7,): 2_176,
    (4, 5, 6): 173_824,
    (3, 4, 5, 6, 7): 184_448,
}
ALL = tuple(range(1, 9))

# Channels of every field that a version fills; tumor is one logit per sample.
CHANNELS = """
petct v1     seg 2 pet 2 ct 1
petct v2     seg 2 pet 2 ct 1 btl 1
petct v3     seg 2 pet 2 ct 1 btl 1 tumor 0
petct v4     seg 2 pet 2 ct 2
petct v5     seg 2 pet 2 ct 2 btl 1 tumor 0
mri   v1     seg 3 pet 2 ct 2
mri   v2     seg 3 pet 2 ct 2 btl 2
mri   v2-rec seg 3 pet 3 ct 1 btl 1
"""
FIELDS = {}
for line in CHANNELS.strip().splitlines():
    kind, version, *words = line.split()
    FIELDS[kind, version] = dict(zip(words[::2], map(int, words[1::2]), strict=True))

SMALL = (2, 1, 32, 16, 16)
ORGANS = Task("organs", ("liver", "spleen", "bladder"))
THREE = Task("mask", ("a", "b", "c"))


def sizes_only(version="v4", shared=(5,), **options):
    """A network without storage: enough to count parameters and compare identities."""
    with torch.device("meta"):
        return MirrorUNet(version, shared, **options)


def count(*args, **options):
    return count_parameters(sizes_only(*args, **options))


def small_net(kind, version, channels=(4, 8, 8, 16, 16), **options):
    torch.manual_seed(0)
    return MirrorUNet(version, kind=kind, channels=channels, **options)


def wave(phase, shape=SMALL):
    t = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((torch.sin(0.37 * t + phase) + 1) / 2).float().reshape(shape)


CT = wave(0.0)
PET = wave(1.0)
OTHER = wave(2.0)


def seen_by(net, field, channel=slice(None)):
    """The slots with which a field of the output changes, "ct", "pet" or "ct pet"."""
    slots = []
    with torch.no_grad():
        base = getattr(net(CT, PET), field)[:, channel]
        for slot, ct, pet in (("ct", OTHER, PET), ("pet", CT, OTHER)):
            if not torch.equal(base, getattr(net(ct, pet), field)[:, channel]):
                slots.append(slot)
    return " ".join(slots)


# ------------------------------------------------------------------ sizes and sharing


def test_counts_of_layers_and_other_networks():
    net = sizes_only("v1", shared=())
    assert [count_parameters(layer) for layer in net.pet] == [*SIZES, 1_845]
    assert [count_parameters(layer) for layer in net.ct] == [*SIZES, 896]
    assert count_parameters(net.pet) == 4_808_917  # MONAI's UNet, one channel in and two out
    assert count(shared=()) == 9_617_834 + 1  # two branches and θ
    assert count(shared=ALL) == 4_808_917 + 1_845 + 1  # one more output

    v4, v3 = TABLE_2[(5,)]
    v1 = v4 - 949  # CT ends in one channel, not two: 1,845 - 896
    v2 = v1 + BOTTLENECK_DECODER
    assert count("v1") == v1
    assert count("v2") == v2
    assert count("v3") == v3 + 256  # T sees CT too: its 1^3 convolution has 256 more
    # Layer 5 has two batch norms of 256 channels, each with a scale and a shift.
    assert count(norm="private") == v4 + 2 * 2 * 256
    assert count("v2", bottleneck="joint") == v2 + 2 * (512 * 256 + 256)


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
def test_exactly_the_listed_layers_are_one_module(shared):
    net = sizes_only(shared=shared)
    parameters = []
    for number, (ct, pet) in enumerate(zip(net.ct, net.pet, strict=True), start=1):
        assert (ct is pet) == (number in shared)
        if number in shared:
            parameters.extend(pet.parameters())
    assert list(map(id, net.shared_parameters())) == list(map(id, parameters))


@pytest.mark.parametrize("shared", TABLE_2)
def test_sizes_of_table_2(shared):
    v4, v3 = TABLE_2[shared]
    assert count("v4", shared) == v4
    assert count("v3", shared, classifier="pet") == v3
    ten_organs = tuple(f"organ {i}" for i in range(10))
    wider = (32 * 11 * 27 + 11 + 2 * 11 + 1 + 11 * 11 * 27 + 11) - 896  # 11 channels, not 1
    assert count("v5", shared, organs=ten_organs) == v3 + 256 + wider


@pytest.mark.parametrize("shared", TABLE_2)
def test_sizes_of_table_2_with_gates(shared):
    widths = dict(zip(ALL, (16, 32, 64, 128, 256, 64, 32, 16), strict=True))
    assert GATES[shared] == sum(2 * (widths[i] ** 2 + 2 * widths[i]) for i in shared)
    for version in ("v1", "v2", "v3", "v4", "v5"):
        own = count(version, shared)
        assert count(version, shared, bottleneck="gate") == own + GATES[shared]


def test_private_norms_share_everything_but_the_batch_norms():
    net = sizes_only(shared=(5, 6), norm="private")
    shared = []
    private = []
    for a, b in zip(net.ct[4:6].modules(), net.pet[4:6].modules(), strict=True):
        if not list(a.children()):
            (shared if a is b else private).append(type(a))
    assert private == 4 * [nn.BatchNorm3d]
    assert len(shared) == 5 + 4  # convolutions and PReLUs
    assert nn.BatchNorm3d not in shared
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

    net = small_net("petct", "v2", channels=mirror_unet.CHANNELS, norm=norm)
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
    v3 = small_net("petct", "v3").eval()
    v5 = small_net("petct", "v5", organs=("a", "b", "c")).eval()
    assert v5.variant.organ_branch == "ct"
    assert v5.variant.tasks["ct"].classes == ("a", "b", "c")

    weights = v5.state_dict()
    for name, value in v3.state_dict().items():
        if name.startswith("ct.8."):  # the output layer, which is wider in v5
            weights[name] = value
    v3.load_state_dict(weights)
    with torch.no_grad():
        out_v3 = v3(CT, PET)
        out_v5 = v5(CT, PET)
    for name in ("seg", "pet", "btl", "tumor"):
        assert torch.equal(getattr(out_v5, name), getattr(out_v3, name))
    expected = [0.068587, 0.062778, -0.082879, 0.194570]
    assert out_v5.ct[0, :, 3, 7, 11].tolist() == pytest.approx(expected, abs=1e-5)


def test_theta_can_be_learned():
    net = small_net("petct", "v4", theta="learn")
    out = net(CT, PET)
    assert torch.allclose(out.seg, (out.pet + out.ct) / 2, atol=1e-6)
    out.seg[:, 1].mean().backward()  # d/dθ of (1 - θ) pet + θ ct is ct - pet
    expected = (out.ct - out.pet)[:, 1].mean().item()
    assert net.theta.grad.item() == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3

    assert not sizes_only("v1", theta="learn").theta.requires_grad  # nothing to weigh there
    fixed = MirrorUNet("v4").theta
    assert fixed.item() == pytest.approx(0.2)
    assert not fixed.requires_grad


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
    assert isinstance(dropout, nn.Dropout)
    assert dropout.p == 0.5


# ------------------------------------------------------------------ gates


def open_gates(net):
    with torch.no_grad():
        for gate in net.gates.values():
            gate.g.uniform_(-0.5, 0.5)


@pytest.mark.parametrize("shared", [*TABLE_2, (), ALL])
@pytest.mark.parametrize(("kind", "version"), FIELDS)
def test_a_network_with_gates_starts_as_own(kind, version, shared):
    own = small_net(kind, version, shared=shared)
    gated = small_net(kind, version, shared=shared, bottleneck="gate")
    weights = gated.state_dict()
    for name, value in own.state_dict().items():
        assert torch.equal(weights.pop(name), value), name
    gates = [f"gates.{branch}_{i}" for i in shared for branch in ("ct", "pet")]
    assert {name.rsplit(".g")[0].rsplit(".conv")[0] for name in weights} == set(gates)

    for training in (True, False):
        outputs = []
        for net in (own, gated):
            torch.manual_seed(1)  # of dropout
            outputs.append(net.train(training)(CT, PET))
        for field in own.heads:
            assert torch.equal(getattr(outputs[0], field), getattr(outputs[1], field)), field
    for name, value in own.named_buffers():
        assert torch.equal(gated.get_buffer(name), value), name


def test_both_gates_of_a_layer_take_the_maps_from_before():
    gates = nn.ModuleDict({"ct_1": mirror_unet.Gate(2), "pet_1": mirror_unet.Gate(2)})
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # of the two channels
    for gate, numbers in zip(gates.values(), ([2.0, 3.0], [5.0, 7.0]), strict=True):
        gate.load_state_dict(
            {
                "conv.weight": swap.reshape(2, 2, 1, 1, 1),
                "conv.bias": torch.ones(2),
                "g": torch.tensor(numbers),
            }
        )
    ct = torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1, 1)
    pet = torch.tensor([100.0, 1000.0]).reshape(1, 2, 1, 1, 1)
    layers = nn.ModuleList([nn.Identity()])
    branches = {"ct": layers, "pet": layers}
    with torch.no_grad():
        maps = mirror_unet.run_layer(branches, 1, {"ct": ct, "pet": pet}, gates)
    assert maps["ct"].flatten().tolist() == [1 + 2 * 1001, 10 + 3 * 101]
    assert maps["pet"].flatten().tolist() == [100 + 5 * 11, 1000 + 7 * 2]


@pytest.mark.parametrize("shared", [*TABLE_2, (8,), ALL])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_the_mask_sees_ct_once_the_gates_are_open(version, shared):
    options = {"shared": shared, "bottleneck": "gate", "classifier": "pet"}
    net = small_net("petct", version, **options).eval()
    assert seen_by(net, "seg") == "pet"
    assert seen_by(net, "ct") == "ct"
    open_gates(net)
    assert seen_by(net, "seg") == "ct pet"
    assert seen_by(net, "ct") == "ct pet"

    full = net(CT, PET)
    for name in net.heads:
        alone = net(CT, PET, heads=(name,))
        assert torch.equal(getattr(alone, name), getattr(full, name)), name


# L of the gates | wanted | encoded | decoded
RUNS = """
5   | seg   | ct pet | pet
8   | seg   | ct pet | ct pet
5 6 | seg   | ct pet | ct pet
5   | ct    | ct pet | ct
6   | ct    | ct pet | ct pet
5 6 | tumor | ct pet |
6   | btl   | ct pet |
    | seg   | pet    | pet
"""


@pytest.mark.parametrize("row", RUNS.strip("\n").splitlines())
def test_gates_run_the_branches_that_they_need(row):
    layers, wanted, *expected = map(str.strip, row.split("|"))
    shared = tuple(map(int, layers.split()))
    net = sizes_only("v3", shared, bottleneck="gate", classifier="pet")
    assert [" ".join(names) for names in net.branches_to_run((wanted,))] == expected


# ------------------------------------------------------------------ what each output sees


@pytest.mark.parametrize("bottleneck", ["own", "joint", "gate"])
@pytest.mark.parametrize(("kind", "version"), FIELDS)
def test_a_version_fills_its_fields_each_by_itself_too(kind, version, bottleneck):
    net = small_net(kind, version, bottleneck=bottleneck)
    channels = FIELDS[kind, version]
    assert set(net.heads) == set(channels)
    out = net(CT, PET)

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
    full = net(CT, PET)
    for name in net.heads:
        alone = net(CT, PET, heads=(name,))
        assert torch.allclose(getattr(alone, name), getattr(full, name), atol=1e-6)


def test_inference_of_the_mask_runs_no_ct_branch():
    net = small_net("petct", "v3", shared=())
    net(CT, PET, heads=("seg",))
    for branch, runs in ((net.ct, 0), (net.pet, 1)):
        first_norm = branch[0].convs[0][1]
        assert first_norm.num_batches_tracked == runs


# version | its options | field of the output | slots that it sees
SEEN = """
v1 |                   | seg | pet
v2 |                   | seg | pet
v3 |                   | seg | pet
v5 |                   | seg | pet
v1 | bottleneck joint  | seg | ct pet
v3 | bottleneck joint  | seg | ct pet
v3 | bottleneck joint  | ct  | ct pet
v5 | bottleneck joint  | seg | ct pet
v5 | bottleneck joint  | ct  | ct pet
v2 |                   | ct  | ct
v5 |                   | ct  | ct
v2 |                   | btl | ct pet
v4 | theta 0           | seg | pet
v4 | theta 0.3         | seg | ct pet
v4 | theta 1           | seg | ct
"""


@pytest.mark.parametrize("row", SEEN.strip().splitlines())
def test_each_output_sees_the_images_it_should(row):
    version, options, field, slots = map(str.strip, row.split("|"))
    words = options.split()
    net = small_net("petct", version, **dict(zip(words[::2], words[1::2], strict=True)))
    assert seen_by(net, field) == slots  # in training
    assert seen_by(net.eval(), field) == slots


def test_the_classifier_and_each_brain_tumour_class_see_what_they_should():
    for classifier, slots in (("both", "ct pet"), ("pet", "pet")):
        v3 = small_net("petct", "v3", classifier=classifier).eval()
        assert seen_by(v3, "tumor", None) == slots
    for version in ("v1", "v2"):
        net = small_net("mri", version).eval()
        assert seen_by(net, "seg", 1) == "ct"  # edema from FLAIR
        assert seen_by(net, "seg", 2) == "pet"  # core from T1Gd


# ------------------------------------------------------------------ variants


# variant | branches of the mask | fused | one softmax | reconstructs | classes
PROPERTIES = """
v3     | pet    | False | True  | True  | lesion
v4     | ct pet | True  | True  | False | lesion
v2     | ct pet | False | False | False | edema core
v2-rec | pet    | False | True  | True  | edema core
three  | ct pet | True  | True  | False | a b c
organs | pet    | False | True  | False | lesion
"""


@pytest.mark.parametrize("row", PROPERTIES.strip().splitlines())
def test_what_follows_from_the_tasks_of_a_variant(row):
    variants = {
        **VARIANTS["petct"],
        **VARIANTS["mri"],
        "three": Variant(ct=THREE, pet=THREE),
        "organs": Variant(ct=ORGANS, pet=LESION),
    }
    name, *expected = map(str.strip, row.split("|"))
    variant = variants[name]
    properties = [
        " ".join(variant.mask_tasks),
        str(variant.fused),
        str(variant.one_softmax),
        str(variant.reconstructs),
        " ".join(variant.classes),
    ]
    assert properties == expected


@pytest.mark.parametrize(("kind", "version"), FIELDS)
def test_variants_have_the_tasks_of_fig_2(kind, version):
    fields = FIELDS[kind, version]
    variant = VARIANTS[kind][version]
    restores_ct = fields["ct"] == 1
    assert (variant.phi == "shuffle") == restores_ct  # Φ keeps CT from being copied
    assert variant.takes_phi == (restores_ct or version == "v5")
    assert variant.tumor == ("tumor" in fields)
    if variant.btl:
        assert variant.btl.target == ("pet" if variant.takes_phi else "mask")


def test_the_brain_tumour_tasks_of_v2():
    classes = {slot: task.classes for slot, task in VARIANTS["mri"]["v2"].tasks.items()}
    assert classes == {"ct": ("edema",), "pet": ("core",), "btl": ("whole",)}


def test_a_row_of_your_own_is_a_version(monkeypatch):
    monkeypatch.setitem(VARIANTS["petct"], "organs", Variant(ct=ORGANS, pet=LESION))
    monkeypatch.setitem(VARIANTS["petct"], "three", Variant(ct=THREE, pet=THREE))
    net = small_net("petct", "organs")
    out = net(CT, PET)
    assert net.heads == ("seg", "ct", "pet")
    assert torch.equal(out.seg, out.pet)
    assert out.ct.shape[1] == 4
    assert out.seg.shape[1] == 2
    out = small_net("petct", "three", theta=0.2)(CT, PET)
    assert torch.allclose(out.seg, 0.2 * out.ct + 0.8 * out.pet, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v6"}, "v6 .*choose from v1, v2, v3, v4, v5"),
        ({"version": "v4", "kind": "mri"}, "v4 .*choose from v1, v2, v2-rec"),
        ({"kind": "ultrasound"}, "not defined for ultrasound: choose from petct, mri"),
        ({"shared": (0, 5)}, r"shared layers \[0, 5\]"),
        ({"shared": (9,)}, r"shared layers \[9\]"),
        ({"bottleneck": "mean"}, "bottleneck 'mean': choose from own, joint, gate"),
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
    odd = fits[..., :24]
    two_channels = fits.repeat(1, 2, 1, 1, 1)
    for ct, pet in (
        (odd, odd),
        (two_channels, two_channels),
        (fits, fits[..., :16]),
        (fits[0], fits[0]),
    ):
        with pytest.raises(ValueError, match="sides that divide by 16"):
            net(ct, pet)
    with pytest.raises(ValueError, match=r"heads \['btl', 'tumor'\]: .* has seg, ct, pet"):
        net(fits, fits, heads=("seg", "btl", "tumor"))


# ------------------------------------------------------------------ decisions


def ties(channels):
    """Foreground logits (channels, 4 ** channels, 1, 1): every combination of four levels."""
    grid = itertools.product([-1.5, 0.0, 0.5, 2.0], repeat=channels)
    return np.array(list(grid)).T.reshape(channels, -1, 1, 1)


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
    net = small_net("mri", "v1")
    with torch.no_grad():
        out = net(CT, PET)
    edema, core = net.decide(foreground_logits(out.seg)[0])
    assert torch.equal(edema, out.ct[0].argmax(0) == 1)
    assert torch.equal(core, out.pet[0].argmax(0) == 1)
    assert (edema & core).any()
    assert not (edema & core).all()
