"""Every option of a run, once: its default, its range, its flag and the versions it applies to.

A Config is the command line, the argument of train() and what a run saves. resolve() gives every
option that applies a value, by version and kind of data, and refuses what does not fit;
comparison_key() says which runs differ in nothing but their seed.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import NamedTuple

from baselines import ONE_MODALITY, SYSTEMS, SystemRow
from common import Parser, UserError
from mirror_unet import (
    BOTTLENECKS,
    CHANNELS,
    CLASSIFIERS,
    DATA_NAMES,
    DEFAULT_THETA,
    MASKS,
    NORMS,
    STRIDE,
    VARIANTS,
    Variant,
    find_variant,
)

MAX_COUNT = 10**9  # Upper bound of every integer option; larger values are typing errors.
COUNT = (0, MAX_COUNT)
POSITIVE_COUNT = (1, MAX_COUNT)
POSITIVE = (0, math.inf)  # of a real number; zero is allowed
SHARE = (0, 1)
SEEDS = (0, 2**63 - 1)


class ByData(NamedTuple):
    """A default that depends on the data; those of the phantom suit two CPU cores."""

    petct: object
    mri: object
    phantom: object


def option(default, help: str, **rule):
    """A field of Config with its rule, of which all parts are optional.

    choices: the words allowed. limits: the lowest and the highest number. lengths: how many numbers
    a tuple may have. fill: what resolve() puts in place of None, which is a value, a ByData or a
    function of the variant and the config. applies: a function of the variant and Φ that says
    whether Mirror U-Net uses the option; a compared system does if its row lists it.
    """
    return field(default=default, metadata={"help": help, **rule})


def is_mirror(variant: Variant, phi: str) -> bool:
    """Every variant of Mirror U-Net, and of the compared systems none."""
    return True


# ------------------------------------------------------------------ the options


@dataclass(frozen=True)
class Config:
    """Every option of a run. None stands for the default of the version and the kind of data.

    The values are those of Sec. 3.4 and of the supplement. PAPER.md lists which are our own or the
    released code's.
    """

    version: str = option("v2", "task combination (Fig. 2) or compared system, see below")
    shared: tuple[int, ...] = option(
        (5,),
        "shared layers L, of 1 to 8; none if empty",
        limits=(1, 8),
        applies=is_mirror,
    )
    widths: tuple[int, ...] = option(
        CHANNELS,
        "channels of layers 1 to 5",
        lengths=(5,),
        limits=POSITIVE_COUNT,
        applies=is_mirror,
    )
    bottleneck: str = option(
        "own",
        "features that a decoder starts from: its own branch's (Eq. 1) or those of both",
        choices=BOTTLENECKS,
        applies=is_mirror,
    )
    norm: str = option(
        "shared",
        "whether shared layers share their batch norms",
        choices=NORMS,
        applies=is_mirror,
    )
    classifier: str = option(
        "both",
        "bottlenecks that T sees; the released code takes pet",
        choices=CLASSIFIERS,
        applies=lambda variant, phi: variant.tumor,
    )
    modality: str = option(
        "both",
        "images of v1-v3 and v5; ct or pet goes to both branches (Sec. 4.2)",
        choices=("both", "ct", "pet"),
        applies=lambda variant, phi: variant.reconstructs and variant.classes == ("lesion",),
    )
    ct: str = option(
        "own",
        "patient whose CT (MRI: FLAIR) is given and reconstructed; other is a control",
        choices=("own", "other"),
    )
    theta: float | str | None = option(
        None,
        f"θ, the weight of CT in Eq. 4, or learn (v4) [{DEFAULT_THETA}]",
        limits=SHARE,
        choices=("learn",),
        fill=DEFAULT_THETA,
        applies=lambda variant, phi: variant.fused,
    )
    phi: str | None = option(
        None,
        "Φ, the change of the CT [shuffle where it applies; v5: none]",
        choices=("none", "noise", "shuffle"),
        fill=lambda variant, config: variant.phi,
        applies=lambda variant, phi: variant.takes_phi,
    )
    noise_sigma: float = option(
        0.3,
        "largest standard deviation of Φ noise, which is drawn from U(0, σ)",
        limits=POSITIVE,
        applies=lambda variant, phi: phi == "noise",
    )
    shuffle_edge: int = option(
        16,
        "edge in voxels of a cube of Φ shuffle",
        limits=POSITIVE_COUNT,
        applies=lambda variant, phi: phi == "shuffle",
    )
    shuffle_count: int = option(
        1,
        "cubes of Φ shuffle per crop; 1 touches 0.5 %% of 96^3, 30 an eighth",
        limits=COUNT,
        applies=lambda variant, phi: phi == "shuffle",
    )

    rec: str = option(
        "l2",
        "reconstruction term: the paper's norm or the released code's MSE",
        choices=("l2", "mse"),
        applies=lambda variant, phi: variant.reconstructs,
    )
    lambda_rec: float | None = option(
        None,
        "λ_rec, the weight of reconstruction [1e-4 with l2, 1e-3 with mse]",
        limits=POSITIVE,
        fill=lambda variant, config: 1e-4 if config.rec == "l2" else 1e-3,
        applies=lambda variant, phi: variant.reconstructs,
    )
    lambda_seg: float | None = option(
        None,
        "λ_seg, the weight of segmentation [0.5; MRI v1, v2: 1/3 per task]",
        limits=POSITIVE,
        fill=lambda variant, config: 0.5 if variant.one_softmax else 1 / 3,
        applies=lambda variant, phi: not variant.fused,
    )
    lambda_cls: float | None = option(
        None,
        "λ_class, the weight of T (v3, v5) [1e-3]",
        limits=POSITIVE,
        fill=1e-3,
        applies=lambda variant, phi: variant.tumor,
    )
    lambda_org: float | None = option(
        None,
        "λ_org, the weight of the organs (v5) [0.1]",
        limits=POSITIVE,
        fill=0.1,
        applies=lambda variant, phi: bool(variant.organ_branch),
    )
    class_label: str = option(
        "crop",
        "what T learns to find a lesion in: the crop or its whole study",
        choices=("crop", "volume"),
        applies=lambda variant, phi: variant.tumor,
    )

    data: str | None = option(None, "folder of studies; without it a simulated cohort is made")
    kind: str | None = option(None, "")  # petct or mri; found in the data, so it has no flag
    organs: str | None = option(
        None,
        "folder of organ maps, named like the studies of autoPET III (v5)",
        applies=lambda variant, phi: bool(variant.organ_branch),
    )
    organ_names: tuple[str, ...] = option((), "")  # found in the maps
    spacing: tuple[float, ...] | None = option(
        None,
        "voxel size in mm, one or three",
        lengths=(1, 3),
        limits=(0.01, 100),
        fill=ByData((2.0, 2.0, 3.0), (1.0, 1.0, 1.0), (5.0, 5.0, 6.0)),
    )
    patch: tuple[int, ...] | None = option(
        None,
        f"sides of a crop in voxels, one or three, divisible by {STRIDE}",
        lengths=(1, 3),
        limits=(1, 4096),
        fill=ByData((96, 96, 96), (224, 224, 144), (48, 48, 48)),
    )
    lesion_p: float = option(
        2 / 3, "probability that the centre of a crop is a lesion voxel", limits=SHARE
    )
    crops: int | None = option(
        None, "crops per study and epoch", limits=POSITIVE_COUNT, fill=ByData(4, 1, 4)
    )
    folds: int | None = option(
        None,
        "number of parts into which the patients are split",
        limits=POSITIVE_COUNT,
        fill=ByData(5, 5, 3),
    )
    fold: int = option(0, "fold that is the test part")
    split_seed: int = option(0, "seed of the split", limits=SEEDS)
    splits: str | None = option(None, "JSON file with train, val and test in place of folds")
    channels: tuple[str, ...] = option(
        (), "number of each channel, such as ct=0 pet=1, if the names do not tell"
    )
    lesion_labels: tuple[int, ...] = option(
        (), "values of the masks that are lesions, if the names do not tell", limits=POSITIVE_COUNT
    )
    own_grids: bool = option(
        False, "the images lie on grids of their own, in a layout that promises one"
    )
    cache: str = option("cache", "folder of the preprocessed studies")
    check: bool = option(False, "read and check all files again")
    skip_bad: bool = option(False, "leave out studies that fail the input check")

    out: str | None = option(None, "run folder [runs/<version>-L<layers>, numbered]")
    resume: bool = option(
        False, "continue the run in --out, also to more --epochs; start it if there is none"
    )
    epochs: int | None = option(
        None, "passes over the training studies", limits=POSITIVE_COUNT, fill=ByData(400, 400, 10)
    )
    steps: int | None = option(None, "steps per epoch [all crops once]", limits=POSITIVE_COUNT)
    batch_size: int | None = option(
        None, "crops per step, over all devices", limits=POSITIVE_COUNT, fill=ByData(4, 4, 2)
    )
    lr: float = option(1e-3, "learning rate", limits=POSITIVE)
    lr_drop: int | None = option(
        None,
        "epoch after which the learning rate is a tenth; 0 for never",
        limits=COUNT,
        fill=ByData(250, 250, 8),
    )
    weight_decay: float = option(1e-6, "weight decay", limits=POSITIVE)
    seed: int = option(0, "seed of weights, crops, Φ and dropout", limits=SEEDS)
    val_every: int | None = option(
        None, "epochs from one validation to the next", limits=POSITIVE_COUNT, fill=ByData(5, 5, 2)
    )

    overlap: float = option(0.25, "overlap of inference windows", limits=(0, 0.99))
    window_weights: str = option(
        "constant", "weights inside an inference window", choices=("constant", "gaussian")
    )
    window_batch: int = option(4, "inference windows at once", limits=POSITIVE_COUNT)

    amp: str = option(
        "auto",
        "mixed precision; auto is bf16 on CUDA, none elsewhere",
        choices=("auto", "none", "bf16", "fp16"),
    )
    compile: bool = option(False, "compile the network with torch.compile")
    device: str = option("auto", "device", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(0, "CPU threads of torch; 0: as torch chooses", limits=COUNT)
    workers: int = option(2, "threads that read crops, and that preprocess", limits=COUNT)


OPTIONS = {f.name: f for f in fields(Config)}

# What a launch decides and the weights do not depend on. All other options stay the same when a run
# is resumed; `epochs` may grow, and `data` may have moved, since the splits name the studies.
LAUNCH_OPTIONS = {
    "data",
    "organs",
    "channels",
    "lesion_labels",
    "own_grids",
    "cache",
    "check",
    "skip_bad",
    "out",
    "resume",
    "epochs",
    "window_batch",
    "compile",
    "device",
    "threads",
    "workers",
}

GROUPS = {  # headings of -h, by the first option below each
    "version": "task",
    "rec": "losses",
    "data": "data",
    "out": "training",
    "overlap": "inference",
    "amp": "machine",
}


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ------------------------------------------------------------------ versions


def mirror_version(config: Config) -> str:
    """The version of Mirror U-Net behind a name: v3 for v3_ct_only."""
    one_modality = ONE_MODALITY.get(config.version)
    return one_modality.version if one_modality else config.version


def system_of(config: Config) -> SystemRow | None:
    """The row of a compared system, None for Mirror U-Net."""
    return SYSTEMS.get(config.version)


def variant_for(config: Config, kind: str) -> Variant:
    """The tasks of the config's version; a compared system's is the mask. Raises UserError."""
    if system_of(config):
        return Variant(pet=MASKS[kind])
    try:
        return find_variant(kind, mirror_version(config))
    except ValueError as error:
        others = ", ".join((*ONE_MODALITY, *SYSTEMS))
        raise UserError(f"--version: {error}; or a compared system: {others}.") from None


def describe_run(config: Config) -> str:
    """What is trained, in words."""
    if system_of(config):
        return config.version
    layers = ", ".join(map(str, config.shared))
    joint = ", joint bottleneck (0.26 M more)" if config.bottleneck == "joint" else ""
    return f"Mirror U-Net {config.version}, L={{{layers}}}, Φ {config.phi}{joint}"


def applicable_options(config: Config, kind: str) -> dict[str, bool]:
    """Whether each option applies to the config's version."""
    variant = variant_for(config, kind)
    system = system_of(config)
    phi = (config.phi or variant.phi) if variant.takes_phi else "none"

    applicable = {}
    for name, f in OPTIONS.items():
        applies = f.metadata.get("applies")
        if applies and system:
            applicable[name] = name in system.options
        else:
            applicable[name] = applies is None or applies(variant, phi)
    return applicable


# ------------------------------------------------------------------ settling a config


def resolve(config: Config, kind: str, simulated: bool) -> Config:
    """The config with a value for every option that applies to its version and data.

    kind: petct or mri. simulated: the data are the phantom, which has defaults of its own. Raises
    UserError for options that do not apply or do not fit each other.
    """
    if config.kind not in (None, kind):
        kinds = f"{DATA_NAMES[kind]} studies, the run was made for {DATA_NAMES[config.kind]}"
        raise UserError(f"--data: holds {kinds}. Give data of that kind.")

    version = config.version
    variant = variant_for(config, kind)
    if variant.organ_branch and config.ct != "own":
        raise UserError(f"--ct {config.ct}: {version} learns organs of the own CT. Leave it out.")

    # v3_ct_only and v3_pet_only settle the modality by their name.
    if version in ONE_MODALITY:
        only = ONE_MODALITY[version].modality
        if config.modality not in ("both", only):
            raise UserError(f"--modality {config.modality}: {version} is {only}. Leave it out.")
        config = replace(config, modality=only)

    values = {"kind": kind}
    for name, applies in applicable_options(config, kind).items():
        value = getattr(config, name)
        default = OPTIONS[name].default
        fill = OPTIONS[name].metadata.get("fill")

        # What does not apply keeps its default, so that equal runs have equal configs.
        if not applies:
            unused = "none" if name == "phi" else default  # Φ has a word for "not at all"
            if value not in (default, unused):
                raise UserError(f"{flag_of(name)} has no effect on {version} here. Leave it out.")
            values[name] = unused
        elif value is None and fill:
            if isinstance(fill, ByData):
                fill = getattr(fill, "phantom" if simulated else kind)
            values[name] = fill(variant, config) if callable(fill) else fill

    config = check_options(replace(config, **values))
    if config.phi == "shuffle" and config.shuffle_edge > min(config.patch):
        raise UserError(f"--shuffle-edge {config.shuffle_edge} exceeds a side of {config.patch}.")
    return config


def check_options(config: Config) -> Config:
    """Check every option against its rule; sort L and make three sides of one.

    Raises UserError with the flag, the value and what is allowed.
    """
    values = {"shared": tuple(sorted(set(config.shared)))}
    for name, f in OPTIONS.items():
        value = getattr(config, name)
        if value is None:  # resolve() fills it in
            continue
        items = value if isinstance(value, tuple) else (value,)
        lengths = f.metadata.get("lengths", (len(items),))

        violations = [rule_violation(item, f.metadata) for item in items]
        if len(items) not in lengths:
            violations = [f"give {' or '.join(map(str, lengths))} numbers"]
        if name == "patch" and any(side % STRIDE for side in items):
            violations.append(f"every side must divide by {STRIDE}")
        for violation in filter(None, violations):
            raise UserError(f"{flag_of(name)} {value or repr(value)}: {violation}.")

        if lengths == (1, 3):
            values[name] = items * (3 // len(items))
    return replace(config, **values)


def rule_violation(value, rule: dict) -> str:
    """What a word or number breaks of its option's rule, in words; empty if nothing."""
    choices = rule.get("choices", ())
    if value == "":
        return "an empty string is no value. Give one, or leave the option out"
    if value in choices:
        return ""
    if "limits" in rule:
        low, high = rule["limits"]
        # NaN compares with nothing, so that it fails as well.
        if isinstance(value, str) or not (low <= value <= high and value < math.inf):
            span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            return " or ".join((f"a number, {span}", *choices))
    elif choices:
        return f"choose from {', '.join(choices)}"
    return ""


# ------------------------------------------------------------------ flags


def add_flags(parser: argparse.ArgumentParser, names=OPTIONS) -> None:
    """A flag per field of Config (or of `names`), in groups; flags not given leave no attribute."""
    for name, f in OPTIONS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        if name in names and f.metadata["help"]:
            group.add_argument(flag_of(name), default=argparse.SUPPRESS, **argparse_keywords(name))


def argparse_keywords(name: str) -> dict:
    """An option's type, number of values and help for add_argument, by its annotation and rule."""
    f = OPTIONS[name]
    rule = f.metadata
    if f.type == "bool":
        return {"help": rule["help"], "action": "store_true"}

    keywords = {"help": rule["help"], "type": value_type(f.type), "metavar": ""}

    # The help ends with the default; where that depends on the version, its text says so.
    fill = rule.get("fill")
    if f.default is not None:
        keywords["help"] += f" [{format_value(f.default)}]"
    elif isinstance(fill, ByData):
        defaults = [f"{kind} {format_value(value)}" for kind, value in fill._asdict().items()]
        keywords["help"] += f" [{'; '.join(defaults)}]"

    if "choices" in rule and "limits" not in rule:
        keywords["choices"] = rule["choices"]
        keywords["metavar"] = None
    if f.type.startswith("tuple"):
        keywords["nargs"] = "+" if "lengths" in rule else "*"
    return keywords


def value_type(annotation: str):
    """The function that reads a word of the command line into an option of this type."""
    if "float | str" in annotation:
        return number_or_word
    for kind in (int, float):
        if kind.__name__ in annotation:
            return kind
    return str


def number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # check_options() knows which words are allowed


def list_versions() -> str:
    """Every name that --version takes, as the end of -h shows them."""
    lines = ["--version"]
    for kind, variants in VARIANTS.items():
        lines.append(f"  {DATA_NAMES[kind]}: {' '.join(variants)}")
    lines.append(f"  one modality: {' '.join(ONE_MODALITY)}")
    lines.append(f"  compared systems: {' '.join(SYSTEMS)}")
    return "\n".join(lines)


def options_from_args(args: argparse.Namespace, names=OPTIONS) -> dict:
    """The options among parsed arguments, with lists as tuples."""
    given = {}
    for name, value in vars(args).items():
        if name in names:
            given[name] = as_tuple(value)
    return given


def as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


def parse_settings(words: list[str]) -> dict:
    """Options from words such as spacing=4,4,6. Raises UserError."""
    line = []
    for word in words:
        name, _, value = word.partition("=")
        line.append(flag_of(name))
        if value:  # `shared=` is the empty L
            line.extend(value.split(","))

    parser = Parser()
    add_flags(parser)
    given = options_from_args(parser.parse_args(line))
    checked = check_options(replace(Config(), **given))
    return {name: getattr(checked, name) for name in given}


# ------------------------------------------------------------------ saved, and compared


def to_dict(config: Config, weights_only: bool = False) -> dict:
    """The config in plain types; weights_only leaves out LAUNCH_OPTIONS."""
    left_out = LAUNCH_OPTIONS if weights_only else {"resume", "check"}
    values = {}
    for name, value in asdict(config).items():
        if name not in left_out:
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


def from_dict(saved: dict) -> Config:
    """A checked Config from a saved dict.

    Raises UserError for an option that is not known here, or whose type or value is not allowed.
    """
    unknown = sorted(set(saved) - set(OPTIONS))
    if unknown:
        raise UserError(f"saved options {unknown} are unknown here: use the code of the run.")

    values = {}
    for name, value in saved.items():
        values[name] = as_tuple(value)
        # "tuple[int, ...] | None" allows tuple and None; check_options() sees to what it holds.
        allowed = re.sub(r"\[.*?\]", "", OPTIONS[name].type).replace("float", "float | int")
        if type(values[name]).__name__.removesuffix("Type") not in allowed.split(" | "):
            raise UserError(f"saved option {name} is no {OPTIONS[name].type}. Restore it.")
    return check_options(Config(**values))


# What does not set two runs apart: the launch, the device's precision, and what repeats a run.
NOT_COMPARED = (LAUNCH_OPTIONS - {"epochs"}) | {"amp", "seed", "fold", "splits", "version", "kind"}


def comparison_key(config: Config) -> dict:
    """The one rule of sameness: runs of equal keys may share a table or be averaged.

    config is resolved. The key holds the kind of data (the phantom is one) and the options, the
    budget among them, that differ from the defaults of its own version and data.
    """
    simulated = config.data is None
    defaults = resolve(Config(version=config.version), config.kind, simulated)
    key = {"data": "phantom" if simulated else config.kind}
    for name in OPTIONS:
        value = getattr(config, name)
        if name not in NOT_COMPARED and value != getattr(defaults, name):
            key[name] = value
    return key


def format_value(value) -> str:
    """An option's value as tables and names show it: L as "4 5 6", or "none" if empty."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "none"
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)
