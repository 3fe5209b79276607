"""Every option of a run, once: its default, range, flag, and which versions read it.

Config is the options, the argument of train() and what a run saves. resolve() fills in what was
not given, by version and kind of data, and refuses what does not fit; key_of() says which runs are
the same but for their seed.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace

from baselines import ONE_MODALITY, SYSTEMS, Row
from checks import ALLOWABLE
from files import Parser, UserError
from mirror_unet import CHANNELS, DATA_NAMES, MASKS, STRIDE, VARIANTS, Variant, variant_of


def option(default, help: str, **rule):
    """A field of Config and what is known of it.

    rule, all optional: choices; span, the lowest and the highest number; words
    that may stand for a number; multiple, what it divides by; lengths, how many numbers it has
    (one may stand for three); fill, what None becomes: a value, one for each kind of data
    (by_data) or a function of the variant and the config; used, whether a variant of Mirror U-Net
    reads it (a compared system does if its row says so); idle, its value where it is not read;
    launch, it does not change the weights.
    """
    return field(default=default, metadata={"help": help, **rule})


def mirror(variant: Variant, config: Config) -> bool:
    return True


def shuffles(variant: Variant, config: Config) -> bool:
    return bool(variant.phi) and (config.phi or variant.phi) == "shuffle"


def by_data(petct, mri, phantom) -> dict:
    return {"petct": petct, "mri": mri, "phantom": phantom}


LEAST_0, LEAST_1, SHARE, SEEDS = (0, math.inf), (1, math.inf), (0, 1), (0, 2**63 - 1)
MOST = 10**9  # of a count: more than this, be it epochs or threads, is a slip of the hand
BOTTLENECKS = {"own": "", "joint": ", joint bottleneck (0.26 M more)", "mean": ", mean in L"}
GROUPS = {  # as -h lists them, by the first option of each
    "version": "task", "rec": "losses", "data": "data", "out": "training", "overlap": "inference",
    "amp": "machine",
}  # fmt: skip


# fmt: off
@dataclass(frozen=True)
class Config:
    """Every option of a run. None: as `fill` says for the version and the kind of data.

    The values are those of Sec. 3.4 and the supplement; those of the phantom are for a quick look
    on two CPU cores. The README lists what is ours or the released code's.
    """

    version: str = option("v2", "task combination (Fig. 2) or compared system, as below")
    shared: tuple[int, ...] = option(
        (5,), "shared layers L of 1..8; none if empty", span=(1, 8), used=mirror)
    widths: tuple[int, ...] = option(
        CHANNELS, "channels of layers 1-5", lengths=(5,), span=LEAST_1, used=mirror)
    bottleneck: str = option(
        "own", "decoders start from their own bottom (Eq. 1), or from both; mean: CT and PET "
        "features meet in L", choices=tuple(BOTTLENECKS), used=mirror)
    norm: str = option(
        "shared", "batch norms of shared layers", choices=("shared", "private"), used=mirror)
    classifier: str = option(
        "both", "bottoms that T sees; pet: as in the released code", choices=("both", "pet"),
        used=lambda v, c: v.tumor)
    modality: str = option(
        "both", "v1-v3, v5: give both branches CT or PET (Sec. 4.2)", choices=("both", "ct", "pet"),
        used=lambda v, c: v.restores and v.classes == ("lesion",))
    ct: str = option(
        "own", "whose CT (MRI: FLAIR) the network is given and restores; other: another patient's, "
        "a control", choices=("own", "other"))
    theta: float | str | None = option(
        None, "v4: weight of CT in Eq. 4, or learn [0.2]", fill=0.2, span=SHARE, words=("learn",),
        used=lambda v, c: v.fused)
    phi: str | None = option(
        None, "Φ on CT [shuffle where it applies; v5: none]", choices=("none", "noise", "shuffle"),
        fill=lambda v, c: v.phi, idle="none", used=lambda v, c: bool(v.phi))
    noise_sigma: float = option(
        0.3, "Φ noise: its sd is drawn from U(0, this)", span=LEAST_0,
        used=lambda v, c: bool(v.phi) and c.phi == "noise")
    shuffle_edge: int = option(
        16, "Φ shuffle: edge of a cube in voxels", span=LEAST_1, used=shuffles)
    shuffle_count: int = option(
        1, "Φ shuffle: cubes per crop; 1 touches 0.5 %% of 96^3, 30 an eighth", span=LEAST_0,
        used=shuffles)

    rec: str = option(
        "l2", "reconstruction term: the paper's norm or the released code's MSE",
        choices=("l2", "mse"), used=lambda v, c: v.restores)
    lambda_rec: float | None = option(
        None, "λ_rec [1e-4 with l2, 1e-3 with mse]", span=LEAST_0, used=lambda v, c: v.restores,
        fill=lambda v, c: 1e-4 if c.rec == "l2" else 1e-3)
    lambda_seg: float | None = option(
        None, "λ_seg [0.5; MRI v1, v2: 1/3 per task]", span=LEAST_0,
        used=lambda v, c: not v.fused, fill=lambda v, c: 0.5 if v.exclusive else 1 / 3)
    lambda_cls: float | None = option(
        None, "λ_class of v3 [1e-3]", span=LEAST_0, fill=1e-3, used=lambda v, c: v.tumor)
    lambda_org: float | None = option(
        None, "λ_org of v5 [0.1]", span=LEAST_0, fill=0.1, used=lambda v, c: bool(v.organs))
    class_label: str = option(
        "crop", "what T learns: the crop, or its study, has a lesion", choices=("crop", "volume"),
        used=lambda v, c: v.tumor)

    data: str | None = option(
        None, "folder of studies; without it a simulated cohort is made", launch=True)
    kind: str | None = option(None, "")  # petct or mri, found from the data: no flag
    organs: str | None = option(
        None, "v5: folder of organ maps; else ORGANS.nii.gz in a study's folder, or organsTr",
        launch=True, used=lambda v, c: bool(v.organs))
    organ_names: tuple[str, ...] = option((), "")  # found from the maps
    spacing: tuple[float, ...] | None = option(
        None, "voxel size in mm; one or three", lengths=(1, 3), span=(0.01, 100),
        fill=by_data((2.0, 2.0, 3.0), (1.0, 1.0, 1.0), (5.0, 5.0, 6.0)))
    patch: tuple[int, ...] | None = option(
        None, "sides of a crop, divisible by 16; one or three", lengths=(1, 3), span=(1, 4096),
        multiple=STRIDE, fill=by_data((96, 96, 96), (224, 224, 144), (48, 48, 48)))
    lesion_p: float | None = option(
        None, "probability that a lesion voxel is a crop's centre [2/3]", span=SHARE, fill=2 / 3)
    crops: int | None = option(
        None, "crops per study and epoch", span=LEAST_1, fill=by_data(4, 1, 4))
    folds: int | None = option(
        None, "the data are split into this many folds by patient", fill=by_data(5, 5, 3))
    fold: int = option(0, "the fold that is the test part")
    split_seed: int = option(0, "seed of the split", span=SEEDS)
    splits: str | None = option(None, "JSON with train, val, test, instead of folds")
    channels: tuple[str, ...] = option(
        (), "which channel is which, if their names do not tell: ct=0 pet=1", launch=True)
    lesion_labels: tuple[int, ...] = option(
        (), "values of the masks that are lesions, if the labels' names do not tell",
        span=LEAST_1, launch=True)
    allow: tuple[str, ...] = option(
        (), "findings of the input check that may pass, as they are named there",
        choices=ALLOWABLE, launch=True)
    cache: str = option("cache", "folder of the preprocessed studies", launch=True)
    check: bool = option(False, "read and check all files again", launch=True)
    skip_bad: bool = option(False, "leave out studies that fail the input check", launch=True)

    out: str | None = option(
        None, "run folder; default runs/<version>-L<layers>, numbered", launch=True)
    resume: bool = option(
        False, "go on with the run in --out (or start it), also to more --epochs", launch=True)
    epochs: int | None = option(
        None, "passes over the training studies", span=LEAST_1, launch=True,
        fill=by_data(400, 400, 10))
    steps: int | None = option(None, "steps per epoch [all crops once]", span=LEAST_1)
    batch_size: int | None = option(
        None, "crops per step, over all devices", span=LEAST_1, fill=by_data(4, 4, 2))
    recipe: str = option(
        "matched", "of a compared system: Mirror U-Net's or its own", choices=("matched", "own"))
    optimizer: str | None = option(
        None, "Adam or SGD with Nesterov momentum 0.99 [adam]", choices=("adam", "sgd"),
        fill="adam")
    lr: float | None = option(None, "learning rate [1e-3]", span=LEAST_0, fill=1e-3)
    schedule: str | None = option(
        None, "of lr: a tenth from --lr-drop on, polynomial 0.9, cosine, or 0.985 per epoch [step]",
        choices=("step", "poly", "cosine", "exp"), fill="step")
    lr_drop: int | None = option(
        None, "lr is a tenth after this epoch; 0: never", span=LEAST_0, fill=by_data(250, 250, 8))
    weight_decay: float | None = option(None, "weight decay [1e-6]", span=LEAST_0, fill=1e-6)
    clip: float | None = option(None, "largest gradient norm; 0: any [0]", span=LEAST_0, fill=0.0)
    select: str = option(
        "dice", "what chooses best.pt on the validation part: Dice, or the mean of it and of empty "
        "masks in healthy studies", choices=("dice", "healthy"))
    seed: int = option(0, "seed of weights, crops, Φ and dropout", span=SEEDS)
    val_every: int | None = option(
        None, "validate every so many epochs", span=LEAST_1, fill=by_data(5, 5, 2))

    overlap: float | None = option(
        None, "overlap of inference windows [0.25]", span=(0, 0.99), fill=0.25)
    window_weights: str | None = option(
        None, "weights inside a window [constant]", choices=("constant", "gaussian"),
        fill="constant")
    window_batch: int = option(4, "inference windows at once", span=LEAST_1, launch=True)

    amp: str = option(
        "auto", "mixed precision [bf16 on CUDA, none elsewhere]",
        choices=("auto", "none", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile the network", launch=True)
    device: str = option("auto", "device", choices=("auto", "cpu", "cuda", "mps"), launch=True)
    threads: int = option(0, "CPU threads of torch; 0: as torch chooses", span=LEAST_0, launch=True)
    workers: int = option(
        2, "threads that read crops, and that preprocess", span=LEAST_0, launch=True)
# fmt: on


OPTIONS = {f.name: f for f in fields(Config)}
# What a launch decides and the weights do not depend on. All the rest must stay the same when a run
# goes on; `epochs` may grow. `data` may have moved: the splits name the studies.
LAUNCH = {name for name, f in OPTIONS.items() if f.metadata.get("launch")}


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ------------------------------------------------------------------ versions


def mirror_version(config: Config) -> str:
    """The version of Mirror U-Net behind a name: v3 for v3_ct_only."""
    return ONE_MODALITY.get(config.version, (config.version, None))[0]


def system_of(config: Config) -> Row | None:
    """The row of a compared system, None for Mirror U-Net."""
    return SYSTEMS.get(config.version)


def tasks(config: Config, kind: str) -> Variant:
    """The tasks of the config's version, a compared system's being the mask. Raises UserError."""
    if system_of(config):
        return Variant(pet=MASKS[kind])
    try:
        return variant_of(kind, mirror_version(config))
    except ValueError as error:
        others = ", ".join((*ONE_MODALITY, *SYSTEMS))
        raise UserError(f"--version: {error}; or a compared system: {others}.") from None


def title(config: Config) -> str:
    """What is trained, in words."""
    if system_of(config):
        return f"{config.version}, {config.recipe} recipe"
    layers = ", ".join(map(str, config.shared))
    features = BOTTLENECKS[config.bottleneck]
    return f"Mirror U-Net {config.version}, L={{{layers}}}, Φ {config.phi}{features}"


def reads(config: Config, kind: str) -> dict[str, bool]:
    """Whether the config's version reads each option."""
    variant, system = tasks(config, kind), system_of(config)

    def read(name: str, used) -> bool:
        return used is None or (name in system.reads if system else used(variant, config))

    return {name: read(name, f.metadata.get("used")) for name, f in OPTIONS.items()}


# ------------------------------------------------------------------ settling a config


def resolve(config: Config, kind: str, phantom: bool) -> Config:
    """Fill the Nones for this kind of data and reject what does not fit. Raises UserError."""
    if config.kind not in (None, kind):
        what = f"{DATA_NAMES[kind]} studies, the run was made for {DATA_NAMES[config.kind]}"
        raise UserError(f"--data: holds {what}. Give data of that kind.")
    variant, system = tasks(config, kind), system_of(config)
    if config.recipe == "own" and not (system and system.own):
        raise UserError(f"--recipe own: none is known for {config.version}. Leave it out.")
    own = system.own if config.recipe == "own" else {}
    modality = ONE_MODALITY.get(config.version, (None, config.modality))[1]
    if variant.organs and config.ct != "own":
        raise UserError(f"--ct other: {config.version} learns the organs of the own CT. Leave it.")
    if config.modality not in ("both", modality):
        raise UserError(f"--modality {config.modality}: {config.version} is {modality} alone.")
    values = {}
    for name, used in reads(config, kind).items():
        rule, given = OPTIONS[name].metadata, getattr(config, name)
        if not used:
            idle = rule.get("idle", OPTIONS[name].default)
            if given not in (OPTIONS[name].default, idle):
                what = f"{flag_of(name)} has no effect on {config.version} here"
                raise UserError(f"{what}. Leave it out.")
            values[name] = idle
        elif given is None:
            fill = own.get(name, rule.get("fill"))
            fill = fill["phantom" if phantom else kind] if isinstance(fill, dict) else fill
            values[name] = fill(variant, config) if callable(fill) else fill
    config = check(replace(config, **values | {"kind": kind, "modality": modality}))
    if config.phi == "shuffle" and config.shuffle_edge > min(config.patch):
        raise UserError(f"--shuffle-edge {config.shuffle_edge} exceeds a side of {config.patch}.")
    return config


def check(config: Config) -> Config:
    """Every option against its rule; sides are made three, L is sorted. Raises UserError with the
    flag, the value and what is allowed."""
    values = {"shared": tuple(sorted(set(config.shared)))}
    for name, f in OPTIONS.items():
        value, rule = getattr(config, name), f.metadata
        if value is None:
            continue
        many = value if isinstance(value, tuple) else (value,)
        wrong = [broken(v, rule) for v in many if broken(v, rule)]
        if len(many) not in (lengths := rule.get("lengths", (len(many),))):
            wrong = [f"give {' or '.join(map(str, lengths))} numbers"]
        if wrong:
            raise UserError(f"{flag_of(name)} {value or repr(value)}: {wrong[0]}.")
        if lengths == (1, 3):
            values[name] = many * (3 // len(many))
    return replace(config, **values)


def broken(value, rule: dict) -> str:
    """Which part of its rule a value breaks, in words; empty if none."""
    if value == "":
        return "an empty string is no value. Give one, or leave the option out"
    if "choices" in rule and value not in rule["choices"]:
        return f"choose from {', '.join(rule['choices'])}"
    words = rule.get("words", ())
    if "span" in rule and value not in words:
        low, high = rule["span"]
        if isinstance(value, int) and value > MOST and high == math.inf:
            high = MOST
        if isinstance(value, str) or not (low <= value <= high and value < math.inf):
            span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            return " or ".join((f"a number, {span}", *words))
    if "multiple" in rule and value % rule["multiple"]:
        return f"every side must divide by {rule['multiple']}"
    return ""


# ------------------------------------------------------------------ flags


def add_flags(parser: argparse.ArgumentParser, names=OPTIONS) -> None:
    """A flag per field of Config (or of `names`), in groups; unset flags leave no attribute."""
    for name, f in OPTIONS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        if name in names and f.metadata["help"]:
            group.add_argument(flag_of(name), default=argparse.SUPPRESS, **as_flag(name))


def as_flag(name: str) -> dict:
    """What argparse is told of an option: its type and number of values by its annotation."""
    f = OPTIONS[name]
    rule, told = f.metadata, {"help": f.metadata["help"]}
    if f.type == "bool":
        return told | {"action": "store_true"}
    kind = {"int": int, "float": float, "str": str}[re.search("int|float|str", f.type).group()]

    def number_or_word(text: str):
        return text if text in rule["words"] else kind(text)

    number_or_word.__name__ = " or ".join(("number", *rule.get("words", ())))  # as argparse says
    told |= {"type": number_or_word if "words" in rule else kind, "choices": rule.get("choices")}
    told["metavar"] = None if told["choices"] else ""
    if f.type.startswith("tuple"):
        told["nargs"] = "+" if "lengths" in rule else "*"
    if f.default is not None:
        told["help"] += f" [{in_words(f.default)}]"
    elif isinstance(fill := rule.get("fill"), dict):
        told["help"] += f" [{'; '.join(f'{k} {in_words(v)}' for k, v in fill.items())}]"
    return told


def versions_in_words() -> str:
    """Every name that --version takes."""
    lines = [f"{DATA_NAMES[kind]}: {' '.join(rows)}" for kind, rows in VARIANTS.items()]
    lines += [f"one modality: {' '.join(ONE_MODALITY)}", f"compared systems: {' '.join(SYSTEMS)}"]
    return "--version\n" + "\n".join(f"  {line}" for line in lines)


def as_options(args: argparse.Namespace, names=OPTIONS) -> dict:
    """The options among parsed arguments, lists as tuples."""
    given = {name: value for name, value in vars(args).items() if name in names}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def read_settings(words: list[str]) -> dict:
    """Options from words such as spacing=4,4,6. Raises UserError."""
    parser, line = Parser(), []
    add_flags(parser)
    for name, _, value in (word.partition("=") for word in words):
        line += [flag_of(name), *filter(None, value.split(","))]  # shared= is the empty L
    given = as_options(parser.parse_args(line))
    settled = check(replace(Config(), **given))
    return {name: getattr(settled, name) for name in given}


# ------------------------------------------------------------------ saved, and compared


def plain(config: Config, weights_only: bool = False) -> dict:
    """The config in plain types; weights_only leaves out all that a launch decides (LAUNCH)."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    left_out = LAUNCH if weights_only else {"resume", "check"}
    return {k: v for k, v in values.items() if k not in left_out}


def as_config(saved: dict) -> Config:
    """A checked Config from a saved dict. Raises UserError for an option that this version does not
    know, or whose type or value is not allowed."""
    if unknown := sorted(set(saved) - set(OPTIONS)):
        remedy = "use the code that made the run"
        raise UserError(f"saved options {unknown} are unknown here: {remedy}.")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    for name, value in values.items():  # check() sees to the numbers in a tuple
        kinds = re.sub(r"\[.*?\]", "", OPTIONS[name].type).replace("float", "float | int")
        if type(value).__name__.removesuffix("Type") not in kinds.split(" | "):
            raise UserError(f"saved option {name} is no {OPTIONS[name].type}. Restore it.")
    return check(Config(**values))


# What does not part two runs: the launch, the device's precision, and what repeats a comparison.
REPEATS = (LAUNCH - {"epochs"}) | {"amp", "seed", "fold", "splits", "version", "recipe", "kind"}


def key_of(config: Config) -> dict:
    """The one rule of sameness: runs of equal keys may stand in one table or be averaged.

    The key of a resolved config holds the kind of data (the phantom is one) and the options, the
    budget among them, that differ from the defaults of its own version, recipe and data.
    """
    phantom = config.data is None
    usual = resolve(Config(version=config.version, recipe=config.recipe), config.kind, phantom)
    own = {n: getattr(config, n) for n in OPTIONS if n not in REPEATS}
    differ = {name: value for name, value in own.items() if value != getattr(usual, name)}
    return {"data": "phantom" if phantom else config.kind} | differ


def in_words(value) -> str:
    """An option's value as tables and names show it: L as "4 5 6", none if empty."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "none"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
