"""The losses against hand computation, NumPy and MONAI; each λ against its own gradient."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from losses import (
    LOSSES,
    Batch,
    dice_ce,
    gradient_norms,
    loss_mri_v1,
    loss_mri_v2,
    loss_v1,
    loss_v2,
    loss_v3,
    loss_v4,
    reconstruction,
)
from mirror_unet import VARIANTS, MirrorUNet, Output

torch.set_num_threads(1)  # tensors are small: more threads only wait for each other

TERMS = {  # the terms that each weight scales
    "lambda_rec": {"rec_ct", "rec_pet"},
    "lambda_seg": {"seg", "seg_edema", "seg_core", "seg_whole"},
    "lambda_cls": {"cls"},
}
NAMES = {
    ("petct", "v1"): {"rec_ct", "seg"},
    ("petct", "v2"): {"rec_ct", "seg", "rec_pet"},
    ("petct", "v3"): {"rec_ct", "seg", "rec_pet", "cls"},
    ("petct", "v4"): {"seg"},
    ("mri", "v1"): {"seg_edema", "seg_core"},
    ("mri", "v2"): {"seg_edema", "seg_core", "seg_whole"},
    ("mri", "v2-rec"): {"rec_ct", "seg", "rec_pet"},
}


def weights(rec="l2", **changed):
    return SimpleNamespace(
        **{"lambda_rec": 0.01, "lambda_seg": 0.7, "lambda_cls": 0.3, "rec": rec} | changed
    )


# Dice + cross-entropy


def example(classes):
    """Logits (2, classes, 4, 5, 6) and a mask whose second crop has no lesion."""
    t = torch.arange(2 * classes * 120, dtype=torch.float64)
    logits = (3 * torch.sin(0.7 * t)).float().reshape(2, classes, 4, 5, 6)
    y = (torch.arange(240) * 7 % 11 % classes).reshape(2, 4, 5, 6)
    y[1] = 0
    return y, logits


# MONAI 1.6.1: DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
@pytest.mark.parametrize(("classes", "expected"), [(2, 2.545417), (3, 3.412932)])
def test_dice_ce_equals_monai(classes, expected):
    assert dice_ce(*example(classes)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_dice_ce_equals_a_loop_over_voxels(classes):
    y, logits = (t.double().numpy() for t in example(classes))
    overlap, predicted, true = np.zeros(classes), np.zeros(classes), np.zeros(classes)
    cross_entropy = 0.0
    for sample, *voxel in np.ndindex(y.shape):
        e = np.exp(logits[(sample, slice(None), *voxel)])
        p, label = e / e.sum(), int(y[(sample, *voxel)])
        predicted += p
        true[label] += 1
        overlap[label] += p[label]
        cross_entropy -= np.log(p[label]) / y.size
    dice = [(2 * overlap[k] + 1e-5) / (predicted[k] + true[k] + 1e-5) for k in range(1, classes)]
    expected = 1 - np.mean(dice) + cross_entropy
    assert dice_ce(*example(classes)).item() == pytest.approx(expected, abs=1e-5)


def test_an_empty_mask_has_a_finite_loss_that_lowers_the_foreground():
    logits = torch.zeros(1, 2, 4, 4, 4, requires_grad=True)
    loss = dice_ce(torch.zeros(1, 4, 4, 4), logits)
    assert loss.item() == pytest.approx(1 + math.log(2), abs=1e-5)  # Dice 0, p = 1/2 everywhere
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert (gradient[:, 1] > 0).all() and (gradient[:, 0] < 0).all()


def test_an_empty_prediction_of_an_empty_mask_costs_nothing():
    logits = torch.zeros(1, 2, 4, 4, 4)
    logits[:, 0] = 40.0
    assert dice_ce(torch.zeros(1, 4, 4, 4), logits).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_summed_in_float32(dtype):
    logits = torch.zeros(1, 2, 48, 48, 48)
    logits[:, 1] = 4.0  # 110,592 voxels with p = 0.98: their sum overflows float16
    y = torch.ones(1, 48, 48, 48)
    loss = dice_ce(y, logits.to(dtype))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dice_ce(y, logits).item(), abs=1e-6)

    x, x_hat = torch.zeros(1, 1, 2, 2, 2), torch.full((1, 1, 2, 2, 2), 300.0)  # 300^2 overflows
    norm = reconstruction(x, x_hat.to(dtype))
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(300 * math.sqrt(8), rel=1e-2)  # bfloat16 has 8 bits


# Reconstruction


def differing(*differences):
    """x and x_hat (B, 1, 2, 2, 2): sample b differs by differences[b] in its first voxels."""
    x = torch.arange(8.0 * len(differences)).reshape(-1, 1, 2, 2, 2)
    x_hat = x.clone()
    for sample, values in zip(x_hat.flatten(1), differences, strict=True):
        sample[: len(values)] += torch.tensor(values)
    return x, x_hat


def test_reconstruction_is_the_mean_norm_or_the_mean_square():
    x, x_hat = differing((3.0, -4.0), (5.0, 0.0, 12.0))
    assert reconstruction(x, x_hat).item() == pytest.approx((5 + 13) / 2)
    assert reconstruction(x, x_hat, "mse").item() == pytest.approx((25 + 169) / 16)


@pytest.mark.parametrize("rec", ["l2", "mse"])
def test_a_perfect_reconstruction_has_a_finite_gradient(rec):
    x, x_hat = differing((), (3.0, 4.0))  # the first sample is perfect
    x_hat.requires_grad_()
    (gradient,) = torch.autograd.grad(reconstruction(x, x_hat, rec), x_hat)
    assert gradient[0].eq(0).all()
    expected = {"l2": [0.6 / 2, 0.8 / 2], "mse": [2 * 3 / 16, 2 * 4 / 16]}[rec]
    assert gradient[1].flatten()[:2].tolist() == pytest.approx(expected)


# Eq. 1-4


def flat(p, voxels=8, batch=2):
    """Logits (B, 2, 2, 2, 2) that give every voxel the foreground probability p."""
    logits = torch.zeros(batch, 2, 2, 2, voxels // 4)
    logits[:, 1] = math.log(p / (1 - p))
    return logits


def flat_dice_ce(p, lesion, n=16):
    """DiceCE of `flat(p)` where `lesion` of n voxels are foreground."""
    dice = 2 * p * lesion / (p * n + lesion)
    return 1 - dice - (lesion * math.log(p) + (n - lesion) * math.log(1 - p)) / n


def petct():
    """Outputs and targets whose every term is known: norms 9 and 7.5, lesion 4 of 16 voxels."""
    ct, ct_rec = differing((3.0, 4.0), (5.0, 12.0))
    pet, pet_rec = (50 + t for t in differing((8.0, 6.0), (3.0, -4.0)))
    mask = torch.zeros(2, 2, 2, 2, dtype=torch.long)
    mask[0, 0] = 1
    tumor = torch.tensor([0.0, math.log(3)])  # probabilities 1/2 and 3/4
    out = Output(seg=flat(0.8), ct_rec=ct_rec, pet_rec=pet_rec, tumor=tumor)
    return out, Batch(ct, pet, mask, torch.tensor([1.0, 0.0]))


BCE = (math.log(2) + math.log(4)) / 2  # -log(1/2) for the tumour, -log(1 - 3/4) for the healthy one


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (loss_v1, {"rec_ct": 0.01 * 9, "seg": 0.7 * flat_dice_ce(0.8, 4)}),
        (loss_v2, {"rec_ct": 0.01 * 9, "seg": 0.7 * flat_dice_ce(0.8, 4), "rec_pet": 0.01 * 7.5}),
        (
            loss_v3,
            {
                "rec_ct": 0.01 * 9,
                "seg": 0.7 * flat_dice_ce(0.8, 4),
                "rec_pet": 0.01 * 7.5,
                "cls": 0.3 * BCE,
            },
        ),
        (loss_v4, {"seg": flat_dice_ce(0.8, 4)}),
    ],
)
def test_equations_1_to_4(loss, expected):
    terms = loss(*petct(), weights())
    assert {name: t.item() for name, t in terms.items()} == pytest.approx(expected, abs=1e-5)
    assert sum(terms.values()).item() == pytest.approx(sum(expected.values()), abs=1e-5)


def test_equations_2_and_3_with_mean_squared_errors():
    terms = loss_v3(*petct(), weights(rec="mse"))
    assert terms["rec_ct"].item() == pytest.approx(0.01 * (25 + 169) / 16)
    assert terms["rec_pet"].item() == pytest.approx(0.01 * (100 + 25) / 16)


def test_brain_tumour_losses():
    mask = torch.zeros(2, 2, 2, 2, dtype=torch.long)
    mask[0, 0], mask[1, 1, 1] = 1, 2  # 4 voxels of edema, 2 of core
    out = Output(ct_seg=flat(0.8), pet_seg=flat(0.6), btl_seg=flat(0.3))
    batch = Batch(ct=None, pet=None, mask=mask, tumor=None)
    expected = {
        "seg_edema": 0.7 * flat_dice_ce(0.8, 4),
        "seg_core": 0.7 * flat_dice_ce(0.6, 2),
    }
    terms = {name: t.item() for name, t in loss_mri_v1(out, batch, weights()).items()}
    assert terms == pytest.approx(expected, abs=1e-5)
    expected["seg_whole"] = 0.7 * flat_dice_ce(0.3, 6)
    terms = {name: t.item() for name, t in loss_mri_v2(out, batch, weights()).items()}
    assert terms == pytest.approx(expected, abs=1e-5)


def test_every_variant_has_a_loss():
    assert {k: set(v) for k, v in LOSSES.items()} == {k: set(v) for k, v in VARIANTS.items()}


# Every variant


def random_outputs(kind):
    """Outputs that all require gradients, of any version of `kind`, and targets."""
    torch.manual_seed(0)
    classes = 2 if kind == "petct" else 3
    shapes = {"seg": classes, "ct_rec": 1, "pet_rec": 1, "btl_seg": 2, "ct_seg": 2, "pet_seg": 2}
    fields = {name: torch.randn(2, c, 4, 4, 4) for name, c in shapes.items()}
    out = Output(**fields, tumor=torch.randn(2))
    ct, pet = torch.rand(2, 2, 1, 4, 4, 4)
    mask = torch.randint(0, classes, (2, 4, 4, 4))
    for tensor in out[:-1]:  # extra is of the compared systems
        tensor.requires_grad_()
    return out, Batch(ct, pet, mask, torch.tensor([1.0, 0]))


@pytest.mark.parametrize(("kind", "version"), NAMES)
def test_a_weight_of_zero_removes_exactly_its_terms(kind, version):
    out, batch = random_outputs(kind)
    fields = out[:-1]

    def gradient(terms):
        total = sum(terms.values())
        grads = torch.autograd.grad(total, fields, allow_unused=True, retain_graph=True)
        pairs = zip(grads, fields, strict=True)
        return torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for g, t in pairs])

    loss = LOSSES[kind][version]
    terms = loss(out, batch, weights())
    assert set(terms) == NAMES[kind, version]
    full = gradient(terms)
    for name, scaled in TERMS.items():
        without = gradient(loss(out, batch, weights(**{name: 0.0})))
        own = {n: term for n, term in terms.items() if n in scaled}
        if version == "v4" or not own:  # Eq. 4 has no weights
            assert torch.equal(without, full)
        else:
            assert all(gradient({n: term}).norm() > 1e-3 for n, term in own.items())
            torch.testing.assert_close(full - gradient(own), without, rtol=1e-4, atol=1e-8)


def sure(classes_present):
    """Logits that are certain of the integer mask given."""
    one_hot = torch.nn.functional.one_hot(classes_present.long()).movedim(-1, 1)
    return 40.0 * one_hot.float() - 20


@pytest.mark.parametrize(("kind", "version"), NAMES)
def test_a_perfect_prediction_costs_nothing(kind, version):
    mask = torch.arange(16).reshape(2, 2, 2, 2) % (2 if kind == "petct" else 3)
    ct, pet = torch.rand(2, 2, 1, 2, 2, 2)
    out = Output(
        seg=sure(mask),
        ct_rec=ct,
        pet_rec=pet,
        tumor=torch.tensor([20.0, -20.0]),
        btl_seg=sure(mask > 0),
        ct_seg=sure(mask == 1),
        pet_seg=sure(mask == 2) if kind == "mri" else None,
    )
    terms = LOSSES[kind][version](out, Batch(ct, pet, mask, torch.tensor([1.0, 0.0])), weights())
    for name, term in terms.items():
        assert 0 <= term.item() < 1e-5, name


# Gradient norms of the terms


def test_gradient_norms_by_hand():
    a, b = (torch.nn.Parameter(torch.tensor(v)) for v in ([3.0, 4.0], [12.0]))
    elsewhere = torch.nn.Parameter(torch.tensor(1.0))
    terms = {
        "squares": (a.square().sum() + b.square().sum()) / 2,  # gradient (3, 4, 12)
        "only a": 2 * a.sum(),  # gradient (2, 2)
        "not shared": 5 * elsewhere,
    }
    norms = gradient_norms(terms, [a, b])
    assert norms == pytest.approx({"squares": 13.0, "only a": math.sqrt(8), "not shared": 0.0})
    assert a.grad is None
    sum(terms.values()).backward()  # the graph is still there
    assert a.grad.tolist() == [5.0, 6.0] and elsewhere.grad.item() == 5.0


@pytest.mark.parametrize(("kind", "version"), NAMES)
def test_every_task_shapes_the_shared_layer(kind, version):
    torch.manual_seed(0)
    net = MirrorUNet(version, kind=kind)
    ct, pet = torch.rand(2, 2, 1, 32, 16, 16)
    mask = torch.randint(0, 2 if kind == "petct" else 3, (2, 32, 16, 16))
    batch = Batch(ct, pet, mask, torch.tensor([1.0, 0.0]))
    terms = LOSSES[kind][version](net(ct, pet), batch, weights())
    norms = gradient_norms(terms, net.shared_parameters())
    assert set(norms) == NAMES[kind, version]
    assert min(norms.values()) > 1e-4
    name = list(terms)[-1]
    terms[name].backward()
    squares = sum(p.grad.square().sum().item() for p in net.pet[4].parameters())
    assert norms[name] == pytest.approx(math.sqrt(squares), rel=1e-4)


def test_no_gradient_norms_without_shared_layers():
    term = torch.ones(1, requires_grad=True).sum()
    with torch.device("meta"):
        nothing = MirrorUNet(shared=()).shared_parameters()
    assert gradient_norms({"seg": term}, nothing) == {}
    term.backward()
