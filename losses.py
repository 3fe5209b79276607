"""The losses of Mirror U-Net: Eq. 1-4 of the paper and the brain tumour tasks of the supplement.

Each equation is one function that returns its weighted terms by name; their sum is the loss.
`w` holds the weights: w.lambda_rec, w.lambda_seg, w.lambda_cls, and w.rec, "l2" or "mse".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_unet import Output


class Batch(NamedTuple):
    """Targets of one step: ct, pet (B, 1, W, H, D) untransformed; mask (B, W, H, D) integer;
    tumor (B,) float, 1 where the crop (or, with --class-label volume, the study) has a lesion."""

    ct: Tensor
    pet: Tensor
    mask: Tensor
    tumor: Tensor


def dice_ce(y: Tensor, logits: Tensor, smooth: float = 1e-5) -> Tensor:
    """L_DiceCE: soft Dice of the foreground classes plus cross-entropy over all, weighted 1:1.

    y (B, W, H, D) integer classes, logits (B, 1 + K, W, H, D). Dice is taken over the whole batch
    (a crop without lesion has no Dice of its own), with plain, not squared, denominators.
    """
    log_p = logits.float().log_softmax(dim=1)
    p = log_p[:, 1:].exp()
    g = torch.stack([y == k for k in range(1, logits.shape[1])], dim=1)
    axes = (0, 2, 3, 4)
    overlap, total = (p * g).sum(axes), p.sum(axes) + g.sum(axes)
    soft_dice = (2 * overlap + smooth) / (total + smooth)
    return (1 - soft_dice).mean() + F.nll_loss(log_p, y.long())


def reconstruction(x: Tensor, x_hat: Tensor, rec: str = "l2") -> Tensor:
    """The reconstruction term of Eq. 1 and 2 for x and x_hat (B, 1, W, H, D).

    "l2": ||x - x_hat||_2 of each sample, averaged over the batch. "mse": the released code's mean
    squared error, at equal λ several hundred times weaker on the shared layers at 96^3.
    """
    difference = x.float() - x_hat.float()
    if rec == "mse":
        return difference.square().mean()
    return torch.linalg.vector_norm(difference.flatten(1), dim=1).mean()


def loss_v1(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """Eq. 1: λ_rec ||x_C - D_C(E_C(Φ(x_C)))||_2 + λ_seg L_DiceCE(y, D_P(E_P(x_P))).

    For v2-rec of the supplement x_C is FLAIR and y has the classes edema and core.
    """
    return {
        "rec_ct": w.lambda_rec * reconstruction(batch.ct, out.ct_rec, w.rec),
        "seg": w.lambda_seg * dice_ce(batch.mask, out.seg),
    }


def loss_v2(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """Eq. 2: Eq. 1 + λ_rec ||x_P - D_BTL(E_C(x_C) ⊕ E_P(x_P))||_2.

    As in the released code E_C has seen Φ(x_C), where Eq. 2 prints x_C: one pass serves both terms.
    """
    rec_pet = w.lambda_rec * reconstruction(batch.pet, out.pet_rec, w.rec)
    return loss_v1(out, batch, w) | {"rec_pet": rec_pet}


def loss_v3(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """Eq. 3: Eq. 2 + λ_class L_BCE(c, T(E_C(x_C) ⊕ E_P(x_P)))."""
    bce = F.binary_cross_entropy_with_logits(out.tumor.float(), batch.tumor.float())
    return loss_v2(out, batch, w) | {"cls": w.lambda_cls * bce}


def loss_v4(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """Eq. 4: L_DiceCE(y, (1 - θ) D_P(E_P(x_P)) + θ D_C(E_C(x_C))); the network sums the logits."""
    return {"seg": dice_ce(batch.mask, out.seg)}


def loss_mri_v1(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """Supplement, Fig. 2 (v1): λ_seg DiceCE of edema on FLAIR and of core on T1Gd."""
    return {
        "seg_edema": w.lambda_seg * dice_ce(batch.mask == 1, out.ct_seg),
        "seg_core": w.lambda_seg * dice_ce(batch.mask == 2, out.pet_seg),
    }


def loss_mri_v2(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """Supplement, Fig. 2 (v2): v1 + λ_seg DiceCE of the whole tumour on the bottleneck decoder."""
    whole = w.lambda_seg * dice_ce(batch.mask > 0, out.btl_seg)
    return loss_mri_v1(out, batch, w) | {"seg_whole": whole}


LOSSES = {
    "petct": {"v1": loss_v1, "v2": loss_v2, "v3": loss_v3, "v4": loss_v4},
    "mri": {"v1": loss_mri_v1, "v2": loss_mri_v2, "v2-rec": loss_v2},
}


# ------------------------------------------------------------------ the compared systems
# Dice + cross-entropy and what each adds. Their weights are constants of their own; w is not read.


def loss_seg(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """L_DiceCE of the mask alone; for Valindria et al. of the one branch that the step ran."""
    return {"seg": dice_ce(batch.mask, out.seg)}


def deep_weights(outputs: int) -> list[float]:
    """Weights of deep supervision, full size first: powers of 1/2, the last 0, with sum 1."""
    halves = [0.5**i for i in range(outputs - 1)]
    return [half / sum(halves) for half in halves] + [0.0] if halves else [1.0]


def loss_deep(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """L_DiceCE at every size with the weights of nnU-Net (4/7, 2/7, 1/7, 0 for four).

    The mask is brought to a size by the nearest voxel. The term of weight 0 is there so that its
    logits have a gradient, which data-parallel training asks for.
    """
    sizes = (out.seg, *out.extra["deep"])
    total = 0
    for weight, logits in zip(deep_weights(len(sizes)), sizes, strict=True):
        y = F.interpolate(batch.mask[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0]
        total = total + weight * dice_ce(y, logits)
    return {"seg": total}


def ssim(x: Tensor, y: Tensor, span: float = 1.0, size: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity of x and y (B, 1, W, H, D) with values in a range of `span`.

    Means, variances and covariance are those under a Gaussian window of size^3, only where it lies
    inside (sides of at least `size`). Raises ValueError for smaller patches.
    """
    if min(x.shape[2:]) < size:
        raise ValueError(f"SSIM of {tuple(x.shape)}: every side must be at least {size}")
    x, y = x.float(), y.float()
    t = torch.arange(size, dtype=torch.float64) - size // 2
    window = torch.exp(-t.square() / (2 * sigma**2))
    window = (window / window.sum()).tolist()
    moments = torch.cat([x, y, x * x, y * y, x * y])
    for axis in (2, 3, 4):
        # Sums, not convolutions: a GPU may run those in TF32, too coarse for E[x^2] - E[x]^2.
        inside = moments.shape[axis] - size + 1
        moments = sum(g * moments.narrow(axis, i, inside) for i, g in enumerate(window))
    mx, my, xx, yy, xy = moments.chunk(5)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (luminance * structure).mean()


def fuse(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """SF-Net's fused image f = w B + (1 - w) A."""
    return weight * b + (1 - weight) * a


def loss_sfnet(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """L_DiceCE + e^-s L_fusion + s with the learned s, A = CT and B = PET, where

    L_fusion = 2 MSE(f, B) + MSE(f, A) + 2 (1 - SSIM(f, A)) + (1 - SSIM(f, B)).
    """
    a, b, s = batch.ct.float(), batch.pet.float(), out.extra["s"]
    f = fuse(out.extra["weight"].float(), a, b)
    intensity = 2 * F.mse_loss(f, b) + F.mse_loss(f, a)
    structure = 2 * (1 - ssim(f, a)) + (1 - ssim(f, b))
    return loss_seg(out, batch, w) | {"fusion": torch.exp(-s) * (intensity + structure) + s}


def presence(out: Output, batch: Batch) -> Tensor:
    """L_BCE of the tumour logit: is there a lesion?"""
    return F.binary_cross_entropy_with_logits(out.tumor.float(), batch.tumor.float())


def loss_andrearczyk(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """L_DiceCE + 0.1 L_BCE; the original's outcome is survival, its weight is not published."""
    return loss_seg(out, batch, w) | {"cls": 0.1 * presence(out, batch)}


def loss_deepmts(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """L_DiceCE + L_BCE, one to one as in the original with its Cox loss."""
    return loss_seg(out, batch, w) | {"cls": presence(out, batch)}


def loss_weninger(out: Output, batch: Batch, w) -> dict[str, Tensor]:
    """L_DiceCE + 0.1 MSE over both images + 0.1 L_BCE (supplement, Sec. 3)."""
    return loss_seg(out, batch, w) | {
        "rec_ct": 0.1 * reconstruction(batch.ct, out.ct_rec, "mse") / 2,
        "rec_pet": 0.1 * reconstruction(batch.pet, out.pet_rec, "mse") / 2,
        "cls": 0.1 * presence(out, batch),
    }


# ------------------------------------------------------------------ which task shapes what


def gradient_norms(terms: dict[str, Tensor], shared: list[nn.Parameter]) -> dict[str, float]:
    """L2 norm of each term's gradient on the shared layers: which task shapes them, and how much.

    Keeps the graph for the backward pass that follows. Empty if nothing is shared (L = {}).
    """
    norms = {}
    for name, term in terms.items() if shared else ():
        grads = torch.autograd.grad(term, shared, retain_graph=True, allow_unused=True)
        squares = [g.float().square().sum() for g in grads if g is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return norms
