"""The losses against hand computation and MONAI; each λ against its own gradient."""

import math
from types import SimpleNamespace

import pytest
import torch

from losses import LOSSES, UNKNOWN_ORGANS, dice_ce, gradient_norms, reconstruction
from mirror_unet import MirrorUNet, Output

torch.set_num_threads(1)  # tensors are small: more threads only wait for each other

WEIGHTS = {
    "lambda_rec": 0.01,
    "lambda_seg": 0.7,
    "lambda_cls": 0.3,
    "lambda_org": 0.2,
}
TERMS = {
    "petct v1": "rec_ct seg",
    "petct v2": "rec_ct seg rec_pet",
    "petct v3": "rec_ct seg rec_pet cls",
    "petct v4": "seg",
    "petct v5": "organs seg rec_pet cls",
    "mri v1": "seg_edema seg_core",
    "mri v2": "seg_edema seg_core seg_whole",
    "mri v2-rec": "rec_ct seg rec_pet",
}


def loss_terms(version, out, batch, kind="petct", **options):
    """The terms of a version's loss; options: weights other than WEIGHTS, or rec."""
    weights = SimpleNamespace(**{"rec": "l2", **WEIGHTS, **options})
    return LOSSES[kind][version](out, batch, weights)


def check_losses(version, out, batch, expected, **options):
    terms = loss_terms(version, out, batch, **options)
    values = {name: term.item() for name, term in terms.items()}
    assert values == pytest.approx(expected, abs=1e-5), version


def wave_example(classes):
    """Logits (2, classes, 4, 5, 6) and a mask whose second crop has no lesion."""
    t = torch.arange(2 * classes * 120, dtype=torch.float64)
    logits = 3 * torch.sin(0.7 * t).reshape(2, classes, 4, 5, 6)
    y = torch.arange(240) * 7 % 11 % classes
    y = y.reshape(2, 4, 5, 6)
    y[1] = 0
    return y, logits.float()


# MONAI 1.6.1: DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
@pytest.mark.parametrize(("classes", "monai"), [(2, 2.545417), (3, 3.412932)])
def test_dice_ce_equals_monai(classes, monai):
    y, logits = wave_example(classes)
    assert dice_ce(y, logits).item() == pytest.approx(monai, abs=1e-5)


def test_an_empty_mask_has_a_finite_loss_that_lowers_the_foreground():
    y = torch.zeros(1, 4, 4, 4)
    logits = torch.zeros(1, 2, 4, 4, 4, requires_grad=True)
    loss = dice_ce(y, logits)
    assert loss.item() == pytest.approx(1 + math.log(2), abs=1e-5)  # Dice 0, p = 1/2 everywhere
    loss.backward()
    assert (logits.grad[:, 1] > 0).all()
    assert (logits.grad[:, 0] < 0).all()
    assert logits.grad.isfinite().all()

    background = torch.zeros(1, 2, 4, 4, 4)
    background[:, 0] = 40.0
    assert dice_ce(y, background).item() == pytest.approx(0, abs=1e-5)  # a correct empty mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_summed_in_float32(dtype):
    logits = torch.zeros(1, 2, 48, 48, 48)
    logits[:, 1] = 4.0  # 110,592 voxels with p = 0.98: their sum overflows float16
    y = torch.ones(1, 48, 48, 48)
    loss = dice_ce(y, logits.to(dtype))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dice_ce(y, logits).item(), abs=1e-6)

    x = torch.zeros(1, 1, 2, 2, 2)
    norm = reconstruction(x, x.to(dtype) + 300)  # 300^2 overflows float16
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(300 * math.sqrt(8), rel=1e-2)  # bfloat16 has 8 bits


def differing(*differences):
    """x and x_hat (B, 1, 2, 2, 2): sample b differs by differences[b] in its first two voxels."""
    x = torch.arange(8.0 * len(differences)).reshape(-1, 1, 2, 2, 2)
    x_hat = x.clone()
    x_hat[:, 0, 0, 0] += torch.tensor(differences)
    return x, x_hat


@pytest.mark.parametrize(
    ("rec", "loss", "slopes"),
    [
        ("l2", (0 + 5) / 2, [0.6 / 2, 0.8 / 2]),
        ("mse", 25 / 16, [2 * 3 / 16, 2 * 4 / 16]),
    ],
)
def test_reconstruction_is_the_mean_norm_or_the_mean_square(rec, loss, slopes):
    x, x_hat = differing((0.0, 0.0), (3.0, 4.0))  # the first is perfect: its gradient is finite
    x_hat.requires_grad_()
    term = reconstruction(x, x_hat, rec)
    term.backward()
    assert term.item() == pytest.approx(loss)
    perfect, other = x_hat.grad
    assert not perfect.any()
    assert other[0, 0, 0].tolist() == pytest.approx(slopes)


def flat(p):
    """Logits (2, 2, 2, 2, 2) that give every voxel the foreground probability p."""
    logits = torch.zeros(2, 2, 2, 2, 2)
    logits[:, 1] = math.log(p / (1 - p))
    return logits


def flat_dice_ce(p, lesion, n=16):
    """DiceCE of `flat(p)` where `lesion` of n voxels are foreground."""
    dice = 2 * p * lesion / (p * n + lesion)
    log_likelihood = lesion * math.log(p) + (n - lesion) * math.log(1 - p)
    return 1 - dice - log_likelihood / n


def mask_with(*voxels):
    """A mask (2, 2, 2, 2) of two crops, with label 1, 2, ... at each of the places."""
    mask = torch.zeros(2, 2, 2, 2, dtype=torch.uint8)
    for label, place in enumerate(voxels, start=1):
        mask[place] = label
    return mask


HAS_TUMOR = torch.tensor([1.0, 0.0])


def test_equations_1_to_4():
    ct, ct_rec = differing((3.0, 4.0), (5.0, 12.0))  # norms 5 and 13, mean 9
    pet, pet_rec = differing((8.0, 6.0), (3.0, -4.0))  # norms 10 and 5, mean 7.5
    mask = mask_with((0, 0))  # 4 of 16 voxels
    tumor = torch.tensor([0.0, math.log(3)])  # probabilities 1/2 and 3/4
    out = Output(seg=flat(0.8), ct=ct_rec, btl=50 + pet_rec, tumor=tumor)
    batch = {"ct": ct, "pet": 50 + pet, "mask": mask, "tumor": HAS_TUMOR}
    seg = flat_dice_ce(0.8, 4)

    terms = {"rec_ct": 0.01 * 9, "seg": 0.7 * seg}
    check_losses("v1", out, batch, terms)
    terms["rec_pet"] = 0.01 * 7.5
    check_losses("v2", out, batch, terms)
    bce = (math.log(2) + math.log(4)) / 2  # -log(1/2) for the tumour, -log(1 - 3/4) without
    terms["cls"] = 0.3 * bce
    check_losses("v3", out, batch, terms)
    terms["rec_ct"] = 0.01 * (25 + 169) / 16
    terms["rec_pet"] = 0.01 * (100 + 25) / 16
    check_losses("v3", out, batch, terms, rec="mse")
    check_losses("v4", out, batch, {"seg": seg})


def test_organs_take_the_place_of_ct_where_they_are_known():
    mask = mask_with((0, 0))  # 4 voxels of lesion
    organs = mask_with((0, 0, 0, 0))  # 1 voxel of the organ
    pet, pet_rec = differing((8.0, 6.0), (3.0, -4.0))
    out = Output(seg=flat(0.8), ct=flat(0.6), btl=pet_rec, tumor=torch.zeros(2))
    batch = {
        "pet": pet,
        "mask": mask,
        "organs": organs,
        "tumor": HAS_TUMOR,
    }
    terms = {
        "rec_pet": 0.01 * 7.5,
        "cls": 0.3 * math.log(2),
        "seg": 0.7 * flat_dice_ce(0.8, 4),
    }

    terms["organs"] = 0.2 * flat_dice_ce(0.6, 1)
    check_losses("v5", out, batch, terms)
    organs[1] = UNKNOWN_ORGANS  # 8 voxels are left
    terms["organs"] = 0.2 * flat_dice_ce(0.6, 1, 8)
    check_losses("v5", out, batch, terms)
    organs[0] = UNKNOWN_ORGANS
    terms["organs"] = 0.0
    check_losses("v5", out, batch, terms)
    out = out._replace(ct=torch.full((2, 11, 2, 2, 2), -6e4).half())  # whose sum is not a half
    check_losses("v5", out, batch, terms)


def test_brain_tumour_losses():
    mask = mask_with((0, 0), (1, 1, 1))  # 4 voxels of edema, 2 of core
    out = Output(ct=flat(0.8), pet=flat(0.6), btl=flat(0.3))
    terms = {
        "seg_edema": 0.7 * flat_dice_ce(0.8, 4),
        "seg_core": 0.7 * flat_dice_ce(0.6, 2),
    }
    check_losses("v1", out, {"mask": mask}, terms, kind="mri")
    terms["seg_whole"] = 0.7 * flat_dice_ce(0.3, 6)
    check_losses("v2", out, {"mask": mask}, terms, kind="mri")


@pytest.mark.parametrize("row", TERMS)
def test_every_term_has_its_weight_and_shapes_the_shared_layer(row):
    kind, version = row.split()
    torch.manual_seed(0)
    net = MirrorUNet(version, kind=kind, channels=(4, 8, 8, 16, 16))
    ct, pet = torch.rand(2, 2, 1, 32, 16, 16)
    mask = torch.randint(0, 2 if kind == "petct" else 3, (2, 32, 16, 16))
    batch = {
        "ct": ct,
        "pet": pet,
        "mask": mask,
        "tumor": HAS_TUMOR,
        "organs": 1 - mask,
    }
    out = net(ct, pet)

    terms = loss_terms(version, out, batch, kind)
    assert list(terms) == TERMS[row].split()
    for weight, value in WEIGHTS.items():
        doubled = loss_terms(version, out, batch, kind, **{weight: 2 * value})
        for name, term in terms.items():
            scaled = name.startswith(weight[-3:]) and version != "v4"  # Eq. 4 has no weights
            assert doubled[name].item() == pytest.approx(term.item() * (1 + scaled))

    norms = gradient_norms(terms, net.shared_parameters())
    assert set(norms) == set(terms)
    assert min(norms.values()) > 1e-4
    name = list(terms)[-1]
    terms[name].backward()  # the graph is still there
    gradients = [parameter.grad.flatten() for parameter in net.pet[4].parameters()]
    assert norms[name] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-4)


def test_gradient_norms_by_hand():
    a = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    b = torch.nn.Parameter(torch.tensor([12.0]))
    elsewhere = torch.nn.Parameter(torch.tensor(1.0))
    terms = {
        "squares": (a.square().sum() + b.square().sum()) / 2,  # gradient (3, 4, 12)
        "only a": 2 * a.sum(),  # gradient (2, 2)
        "not shared": 5 * elsewhere,
    }
    expected = {"squares": 13.0, "only a": math.sqrt(8), "not shared": 0.0}
    assert gradient_norms(terms, [a, b]) == pytest.approx(expected)
    assert a.grad is None
    assert gradient_norms(terms, []) == {}
