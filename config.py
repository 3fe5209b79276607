"""Every option of a run, once: its default, its range, its flag and the versions it applies to.

A Config is the command line, the argument of train() and what a run saves. resolve() gives every
option that applies a value, by version and kind of data, and refuses what does not fit;
unusual_options() lists how a run differs from the defaults, by which runs are grouped in tables.
"""

from __future__ import annotations  # the type of a field is text, see value_type and from_dict

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
    MASK_TASK,
    NORMS,
    STRIDE,
    VARIANTS,
    Variant,
    find_variant,
)

# Limits of options. A count of more than 10**9 is a typing error.
COUNT = (0, 10**9)
POSITIVE_COUNT = (1, 10**9)
NOT_NEGATIVE = (0, math.inf)
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
    function of the variant and the config. applies: a function of the variant that says whether
    Mirror U-Net uses the option; a compared system does if its row lists it. Without this part
    everything uses the option. unused: its value where it does not apply [the default].
    """
    return field(default=default, metadata={"help": help, **rule})


def every_version(variant: Variant) -> bool:
    """The rule of an option that all versions of Mirror U-Net use; compared systems do not."""
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
        applies=every_version,
    )
    widths: tuple[int, ...] = option(
        CHANNELS,
        "channels of layers 1 to 5",
        lengths=(5,),
        limits=POSITIVE_COUNT,
        applies=every_version,
    )
    bottleneck: str = option(
        "own",
        "features that a decoder starts from: its own branch's (Eq. 1), those of both, or its own "
        "with learned gates to the other branch behind the layers L",
        choices=BOTTLENECKS,
        applies=every_version,
    )
    norm: str = option(
        "shared",
        "whether shared layers share their batch norms",
        choices=NORMS,
        applies=every_version,
    )
    classifier: str = option(
        "both",
        "bottlenecks that T sees; the released code takes pet",
        choices=CLASSIFIERS,
        applies=lambda variant: variant.tumor,
    )
    modality: str = option(
        "both",
        "images of v1-v3 and v5; ct or pet goes to both branches (Sec. 4.2)",
        choices=("both", "ct", "pet"),
        # Of PET/CT all but v4, whose branches would segment one image twice.
        applies=lambda variant: variant.reconstructs and variant.classes == ("lesion",),
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
        applies=lambda variant: variant.fused,
    )
    phi: str | None = option(
        None,
        "Φ, the change of the CT [shuffle where it applies; v5: none]",
        choices=("none", "noise", "shuffle"),
        fill=lambda variant, config: variant.phi,
        applies=lambda variant: variant.takes_phi,
        unused="none",
    )
    noise_sigma: float = option(
        0.3,
        "largest standard deviation of Φ noise, which is drawn from U(0, σ)",
        limits=NOT_NEGATIVE,
        applies=lambda variant: variant.phi == "noise",
    )
    shuffle_edge: int = option(
        16,
        "edge in voxels of a cube of Φ shuffle",
        limits=POSITIVE_COUNT,
        applies=lambda variant: variant.phi == "shuffle",
    )
    shuffle_count: int = option(
        1,
        "cubes of Φ shuffle per crop; 1 touches 0.5 %% of 96^3, 30 an eighth",
        limits=COUNT,
        applies=lambda variant: variant.phi == "shuffle",
    )

    rec: str = option(
        "l2",
        "reconstruction term: the paper's norm or the released code's MSE",
        choices=("l2", "mse"),
        applies=lambda variant: variant.reconstructs,
    )
    lambda_rec: float | None = option(
        None,
        "λ_rec, the weight of reconstruction [1e-4 with l2, 1e-3 with mse]",
        limits=NOT_NEGATIVE,
        fill=lambda variant, config: 1e-4 if config.rec == "l2" else 1e-3,
        applies=lambda variant: variant.reconstructs,
    )
    lambda_seg: float | None = option(
        None,
        "λ_seg, the weight of segmentation [0.5; MRI v1, v2: 1/3 per task]",
        limits=NOT_NEGATIVE,
        fill=lambda variant, config: 0.5 if variant.one_softmax else 1 / 3,
        applies=lambda variant: not variant.fused,
    )
    lambda_cls: float | None = option(
        None,
        "λ_class, the weight of T (v3, v5) [1e-3]",
        limits=NOT_NEGATIVE,
        fill=1e-3,
        applies=lambda variant: variant.tumor,
    )
    lambda_org: float | None = option(
        None,
        "λ_org, the weight of the organs (v5) [0.1]",
        limits=NOT_NEGATIVE,
        fill=0.1,
        applies=lambda variant: variant.organ_branch,
    )
    class_label: str = option(
        "crop",
        "what T learns to find a lesion in: the crop or its whole study",
        choices=("crop", "volume"),
        applies=lambda variant: variant.tumor,
    )

    data: str | None = option(None, "folder of studies; without it a simulated cohort is made")
    kind: str | None = option(None, "")  # petct or mri; found in the data, so it has no flag
    organs: str | None = option(
        None,
        "folder of organ maps, named like the studies of autoPET III (v5)",
        applies=lambda variant: variant.organ_branch,
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
    lr: float = option(1e-3, "learning rate", limits=NOT_NEGATIVE)
    lr_drop: int | None = option(
        None,
        "epoch after which the learning rate is a tenth; 0 for never",
        limits=COUNT,
        fill=ByData(250, 250, 8),
    )
    weight_decay: float = option(1e-6, "weight decay", limits=NOT_NEGATIVE)
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

# The headings of -h, by the option whose flag is the first below each. Flags come in the order of
# the fields of Config.
GROUPS = {
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
        return Variant(pet=MASK_TASK[kind])
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
    bottleneck = "" if config.bottleneck == "own" else f", {config.bottleneck} bottleneck"
    return f"Mirror U-Net {config.version}, L={{{layers}}}, Φ {config.phi}{bottleneck}"


def applicable_options(config: Config, kind: str) -> dict[str, bool]:
    """Whether each option applies to the config's version."""
    system = system_of(config)
    variant = variant_for(config, kind)
    if variant.takes_phi and config.phi:
        # Whether noise_sigma and shuffle_* apply depends on the run's Φ, not on the version's.
        variant = replace(variant, phi=config.phi)

    applicable = {}
    for name, option_field in OPTIONS.items():
        applies = option_field.metadata.get("applies")
        if applies is None:
            applicable[name] = True
        elif system:
            applicable[name] = name in system.options
        else:
            applicable[name] = bool(applies(variant))
    return applicable


# ------------------------------------------------------------------ settling a config


def resolve(config: Config, kind: str) -> Config:
    """The config with a value for every option that applies to its version and data.

    kind: petct or mri. Without config.data the defaults are those of the simulated cohort. Raises
    UserError for options that do not apply or do not fit each other.
    """
    if config.kind not in (None, kind):
        kinds = f"{DATA_NAMES[kind]} studies, the run was made for {DATA_NAMES[config.kind]}"
        raise UserError(f"--data: holds {kinds}. Give data of that kind.")
    config = replace(config, kind=kind)

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

    values = {}
    for name, applies in applicable_options(config, kind).items():
        value = getattr(config, name)
        default = OPTIONS[name].default
        rule = OPTIONS[name].metadata
        fill = rule.get("fill")

        # What does not apply has one value, so that equal runs have equal configs.
        if not applies:
            values[name] = rule.get("unused", default)
            if value not in (default, values[name]):
                raise UserError(f"{flag_of(name)} has no effect on {version} here. Leave it out.")
        elif value is None and isinstance(fill, ByData):
            values[name] = getattr(fill, kind if config.data else "phantom")
        elif value is None:
            values[name] = fill(variant, config) if callable(fill) else fill

    config = check_options(replace(config, **values))
    if config.phi == "shuffle" and config.shuffle_edge > min(config.patch):
        raise UserError(f"--shuffle-edge {config.shuffle_edge} exceeds a side of {config.patch}.")
    return config


def check_options(config: Config) -> Config:
    """The config with L sorted, and one spacing or patch side written as three.

    Raises UserError for an option that breaks its rule, with the flag, the value and what is
    allowed.
    """
    values = {"shared": tuple(sorted(set(config.shared)))}
    for name, option_field in OPTIONS.items():
        value = getattr(config, name)
        if value is None:  # resolve() fills it in
            continue

        rule = option_field.metadata
        items = value if isinstance(value, tuple) else (value,)
        lengths = rule.get("lengths")
        violations = [rule_violation(item, rule) for item in items]
        if lengths and len(items) not in lengths:
            violations = [f"give {' or '.join(map(str, lengths))} numbers"]
        if name == "patch" and any(side % STRIDE for side in items):
            violations.append(f"every side must divide by {STRIDE}")
        for violation in filter(None, violations):  # the first one is enough
            raise UserError(f"{flag_of(name)} {value or repr(value)}: {violation}.")

        if lengths == (1, 3) and len(items) == 1:
            values[name] = items * 3
    return replace(config, **values)


def rule_violation(value, rule: dict) -> str:
    """How a word or a number breaks its option's rule, in words; "" if it does not."""
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
    for name, option_field in OPTIONS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        if name in names and option_field.metadata["help"]:
            group.add_argument(flag_of(name), default=argparse.SUPPRESS, **argparse_keywords(name))


def argparse_keywords(name: str) -> dict:
    """An option's type, number of values and help for add_argument, by its type and rule."""
    option_field = OPTIONS[name]
    default, rule = option_field.default, option_field.metadata
    text = rule["help"]
    if option_field.type == "bool":
        return {"help": text, "action": "store_true"}

    # The help ends with the default; where that depends on the version, its text says so.
    fill = rule.get("fill")
    if default is not None:
        text += f" [{format_value(default)}]"
    elif isinstance(fill, ByData):
        defaults = [f"{kind} {format_value(value)}" for kind, value in fill._asdict().items()]
        text += f" [{'; '.join(defaults)}]"

    keywords = {"help": text, "type": value_parser(option_field.type), "metavar": ""}
    if "choices" in rule and "limits" not in rule:
        keywords.update(choices=rule["choices"], metavar=None)
    if option_field.type.startswith("tuple"):
        keywords["nargs"] = "+" if "lengths" in rule else "*"
    return keywords


def value_parser(type_name: str):
    """The function that makes an option of this type from a word of the command line."""
    if "float | str" in type_name:
        return number_or_word
    if "float" in type_name:
        return float
    return int if "int" in type_name else str


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
    """The options that the command line gives, with lists as tuples; `given` in other modules."""
    given = {}
    for name, value in vars(args).items():
        if name in names:
            given[name] = list_to_tuple(value)
    return given


def list_to_tuple(value):
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
    checked = check_options(Config(**given))
    return {name: getattr(checked, name) for name in given}


# ------------------------------------------------------------------ saved, and compared


def to_dict(config: Config, weights_only: bool = False) -> dict:
    """The config in plain types, without --resume and --check, which are of a single launch.

    weights_only: without all of LAUNCH_OPTIONS.
    """
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
        values[name] = list_to_tuple(value)
        # A field's type is text: "tuple[int, ...] | None" allows the types tuple and NoneType.
        # check_options() checks what the tuple holds.
        annotation = OPTIONS[name].type
        allowed = re.sub(r"\[.*?\]", "", annotation).replace("None", "NoneType")
        if "float" in allowed:
            allowed += " | int"
        if type(values[name]).__name__ not in allowed.split(" | "):
            raise UserError(f"saved option {name} is no {annotation}. Restore it.")
    return check_options(Config(**values))


# Options that unusual_options() leaves out: those of the launch, the device's precision, and what
# repeats a run on other splits or from other weights. Also the version, which decides the defaults
# to compare with, and the kind of data, which unusual_options() gives under the name `data`.
NOT_COMPARED = (LAUNCH_OPTIONS - {"epochs"}) | {"amp", "seed", "fold", "splits", "version", "kind"}


def unusual_options(config: Config) -> dict:
    """The options, with values, in which a run differs from the defaults of its version and data.

    config: resolved. The options of NOT_COMPARED are left out. There is always "data": "petct",
    "mri" or "phantom", the simulated cohort. Runs of one version on the same studies with equal
    unusual options repeat each other; tables.py averages them, and says what may share a table.
    """
    defaults = resolve(Config(version=config.version, data=config.data), config.kind)

    # The kind of data and not their folder, which may have moved.
    unusual = {"data": config.kind if config.data else "phantom"}
    for name in OPTIONS:
        value = getattr(config, name)
        if name not in NOT_COMPARED and value != getattr(defaults, name):
            unusual[name] = value
    return unusual


def format_value(value) -> str:
    """An option's value as tables and names show it: L as "4 5 6", or "none" if empty."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "none"
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)
