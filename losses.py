"""The losses of Mirror U-Net: Eq. 1-4 of the paper and the brain tumour tasks of the supplement.

Each equation is one function that returns its weighted terms by name; their sum is the loss.
`batch` holds the targets of a step by name:
    ct, pet    (B, 1, W, H, D), untransformed
    mask       (B, W, H, D), integer
    tumor      (B,) float, 1 where the crop (or, with --class-label volume, the study) has a lesion
    organs     (B, W, H, D), integer; UNKNOWN_ORGANS throughout a crop of a study without a map
`w`, a config.Config, holds the weights lambda_rec, _seg, _cls and _org, and rec, "l2" or "mse".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirror_unet import Output

Terms = dict[str, Tensor]
UNKNOWN_ORGANS = 255


def dice_ce(y: Tensor, logits: Tensor, smooth: float = 1e-5) -> Tensor:
    """L_DiceCE: soft Dice of the foreground classes plus cross-entropy over all, weighted 1:1.

    y (B, W, H, D) integer classes, logits (B, 1 + K, W, H, D). Dice is taken over the whole batch
    (a crop without lesion has no Dice of its own), with plain, not squared, denominators.
    """
    log_p = logits.float().log_softmax(dim=1)
    p = log_p[:, 1:].exp()  # (B, K, W, H, D)
    foreground = [y == label for label in range(1, logits.shape[1])]
    g = torch.stack(foreground, dim=1)  # (B, K, W, H, D)

    axes = (0, 2, 3, 4)
    overlap = (p * g).sum(axes)  # (K,)
    total = p.sum(axes) + g.sum(axes)
    soft_dice = (2 * overlap + smooth) / (total + smooth)
    cross_entropy = F.nll_loss(log_p, y.long())
    return (1 - soft_dice).mean() + cross_entropy


def reconstruction(x: Tensor, x_hat: Tensor, rec: str = "l2") -> Tensor:
    """The reconstruction term of Eq. 1 and 2 for x and x_hat (B, 1, W, H, D).

    rec: "l2" is ||x - x_hat||_2 of each sample, averaged over the batch. "mse" is the released
    code's mean squared error, at equal λ several hundred times weaker on the shared layers at 96^3.
    """
    difference = x.float() - x_hat.float()
    if rec == "mse":
        return difference.square().mean()
    norms = torch.linalg.vector_norm(difference.flatten(1), dim=1)  # (B,)
    return norms.mean()


def tumor_bce(out: Output, batch: dict) -> Tensor:
    """L_BCE of Eq. 3 between T's logit and whether there is a tumour."""
    return F.binary_cross_entropy_with_logits(out.tumor.float(), batch["tumor"].float())


def loss_v1(out: Output, batch: dict, w) -> Terms:
    """Eq. 1: λ_rec ||x_C - D_C(E_C(Φ(x_C)))||_2 + λ_seg L_DiceCE(y, D_P(E_P(x_P))).

    For v2-rec of the supplement x_C is FLAIR and y has the classes edema and core.
    """
    rec_ct = reconstruction(batch["ct"], out.ct, w.rec)
    seg = dice_ce(batch["mask"], out.seg)
    return {
        "rec_ct": w.lambda_rec * rec_ct,
        "seg": w.lambda_seg * seg,
    }


def loss_v2(out: Output, batch: dict, w) -> Terms:
    """Eq. 2: Eq. 1 + λ_rec ||x_P - D_BTL(E_C(x_C) ⊕ E_P(x_P))||_2.

    As in the released code E_C has seen Φ(x_C), where Eq. 2 prints x_C: one pass serves both terms.
    """
    terms = loss_v1(out, batch, w)
    rec_pet = reconstruction(batch["pet"], out.btl, w.rec)
    terms["rec_pet"] = w.lambda_rec * rec_pet
    return terms


def loss_v3(out: Output, batch: dict, w) -> Terms:
    """Eq. 3: Eq. 2 + λ_class L_BCE(c, T(E_C(x_C) ⊕ E_P(x_P)))."""
    terms = loss_v2(out, batch, w)
    terms["cls"] = w.lambda_cls * tumor_bce(out, batch)
    return terms


def loss_v4(out: Output, batch: dict, w) -> Terms:
    """Eq. 4: L_DiceCE(y, (1 - θ) D_P(E_P(x_P)) + θ D_C(E_C(x_C))); the network sums the logits."""
    return {"seg": dice_ce(batch["mask"], out.seg)}


def loss_mri_v1(out: Output, batch: dict, w) -> Terms:
    """Supplement, Fig. 2 (v1): λ_seg DiceCE of edema on FLAIR and of core on T1Gd."""
    edema = batch["mask"] == 1
    core = batch["mask"] == 2
    seg_edema = dice_ce(edema, out.ct)
    seg_core = dice_ce(core, out.pet)
    return {
        "seg_edema": w.lambda_seg * seg_edema,
        "seg_core": w.lambda_seg * seg_core,
    }


def loss_mri_v2(out: Output, batch: dict, w) -> Terms:
    """Supplement, Fig. 2 (v2): v1 + λ_seg DiceCE of the whole tumour on the bottleneck decoder."""
    whole = batch["mask"] > 0
    terms = loss_mri_v1(out, batch, w)
    terms["seg_whole"] = w.lambda_seg * dice_ce(whole, out.btl)
    return terms


def loss_v5(out: Output, batch: dict, w) -> Terms:
    """Not the paper's: Eq. 3 with λ_org L_DiceCE(o, D_C(E_C(x_C))) in place of CT's reconstruction.

    The organ term runs over the crops of those studies whose organs o are known.
    """
    known = batch["organs"][:, 0, 0, 0] != UNKNOWN_ORGANS  # (B,)
    organs = 0 * out.ct.float().sum()  # a batch without a map teaches no organ
    if known.any():
        organs = dice_ce(batch["organs"][known], out.ct[known])
    seg = dice_ce(batch["mask"], out.seg)
    rec_pet = reconstruction(batch["pet"], out.btl, w.rec)
    return {
        "organs": w.lambda_org * organs,
        "seg": w.lambda_seg * seg,
        "rec_pet": w.lambda_rec * rec_pet,
        "cls": w.lambda_cls * tumor_bce(out, batch),
    }


LOSSES = {
    "petct": {
        "v1": loss_v1,
        "v2": loss_v2,
        "v3": loss_v3,
        "v4": loss_v4,
        "v5": loss_v5,
    },
    "mri": {
        "v1": loss_mri_v1,
        "v2": loss_mri_v2,
        "v2-rec": loss_v2,
    },
}


def gradient_norms(terms: Terms, shared: list[nn.Parameter]) -> dict[str, float]:
    """L2 norm of each term's gradient on the shared layers: how much each task shapes them.

    Keeps the graph for the backward pass that follows. Empty if nothing is shared (L = {}).
    """
    if not shared:
        return {}
    norms = {}
    for name, term in terms.items():
        # materialize_grads: a parameter that the term does not reach has the gradient 0.
        gradients = torch.autograd.grad(term, shared, retain_graph=True, materialize_grads=True)
        squared_sums = [gradient.float().square().sum() for gradient in gradients]
        norms[name] = float(torch.stack(squared_sums).sum().sqrt())
    return norms
