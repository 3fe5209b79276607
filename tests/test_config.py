"""config.py: defaults, what is refused, flags, what is saved, and which runs are the same."""

import argparse
from dataclasses import asdict, fields, replace

import pytest
from conftest import make_config

import train
from baselines import ONE_MODALITY, SYSTEMS
from common import UserError
from config import (
    LAUNCH_OPTIONS,
    NOT_COMPARED,
    OPTIONS,
    Config,
    add_flags,
    applicable_options,
    describe_run,
    format_value,
    from_dict,
    parse_settings,
    resolve,
    to_dict,
    unusual_options,
)
from mirror_unet import VARIANTS

PAPER = {  # Sec. 3.4
    "epochs": 400,
    "batch_size": 4,
    "patch": (96, 96, 96),
    "spacing": (2, 2, 3),
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "lesion_p": 2 / 3,
    "folds": 5,
    "overlap": 0.25,
    "lr_drop": 250,
    "lambda_rec": 1e-4,
    "lambda_seg": 0.5,
    "lambda_cls": None,
    "theta": None,
    "phi": "shuffle",
}
PAPER_V4 = {"lambda_rec": None, "lambda_seg": None, "theta": 0.2, "phi": "none"}
PAPER_MRI = {  # of the supplement
    "patch": (224, 224, 144),
    "spacing": (1, 1, 1),
    "lambda_seg": 1 / 3,
    "lambda_rec": None,
    "theta": None,
    "phi": "none",
    "crops": 1,
}
PHANTOM = {"patch": (48, 48, 48), "folds": 3, "lr": 1e-3, "epochs": 10, "lr_drop": 8}


@pytest.mark.parametrize(
    "version, kind, data, expected",
    [
        ("v1", "petct", "d", PAPER),
        ("v2", "petct", "d", PAPER),
        ("v3", "petct", "d", {**PAPER, "lambda_cls": 1e-3}),
        ("v4", "petct", "d", {**PAPER, **PAPER_V4}),
        ("v1", "mri", "d", PAPER_MRI),
        ("v2", "mri", "d", PAPER_MRI),
        ("v2-rec", "mri", "d", {"lambda_seg": 0.5, "lambda_rec": 1e-4, "phi": "shuffle"}),
        ("v2", "petct", None, PHANTOM),
        ("v3_ct_only", "petct", "d", {"modality": "ct", "lambda_cls": 1e-3, "phi": "shuffle"}),
        ("v5", "petct", "d", {"lambda_org": 0.1, "lambda_cls": 1e-3, "phi": "none"}),
        ("nnunet", "petct", "d", {"lambda_seg": None, "phi": "none", "theta": None}),
    ],
)
def test_defaults_are_those_of_the_paper(version, kind, data, expected):
    values = asdict(make_config(version, kind, data=data))
    assert {name: values[name] for name in expected} == expected
    assert values["kind"] == kind
    unset = {name for name, value in values.items() if value is None}
    optional = {"data", "organs", "out", "steps", "splits", "theta"}
    assert all(name in optional or name.startswith("lambda") for name in unset)


def test_the_run_is_described():
    assert describe_run(make_config("v2")) == "Mirror U-Net v2, L={5}, Φ shuffle"
    joint = make_config("v2", bottleneck="joint")
    assert describe_run(joint).endswith("Φ shuffle, joint bottleneck")
    gate = make_config("v2", bottleneck="gate")
    assert describe_run(gate).endswith("Φ shuffle, gate bottleneck")
    assert describe_run(make_config("nnunet")) == "nnunet"


def test_given_options_are_kept():
    given = Config(
        version="v3",
        epochs=7,
        patch=(32,),
        spacing=(4.0,),
        shared=(7, 3, 3),
        phi="none",
        lambda_rec=0.0,
        lr_drop=0,
        rec="mse",
    )
    config = resolve(given, "petct")
    assert (config.epochs, config.lr_drop, config.phi, config.lambda_rec) == (7, 0, "none", 0.0)
    assert (config.patch, config.spacing, config.shared) == ((32,) * 3, (4.0,) * 3, (3, 7))
    assert resolve(config, "petct") == config  # settled once
    assert resolve(replace(given, lambda_rec=None), "petct").lambda_rec == 1e-3
    for theta in (0.3, "learn"):
        assert make_config("v4", theta=theta).theta == theta


def test_options_of_phi_apply_with_it():
    def applies(name, version, **options):
        return applicable_options(Config(version=version, **options), "petct")[name]

    assert applies("shuffle_count", "v3") and not applies("shuffle_count", "v3", phi="none")
    assert applies("noise_sigma", "v5", phi="noise") and not applies("noise_sigma", "v3")
    assert not applies("shuffle_count", "v4", phi="shuffle") and not applies("phi", "v4")
    assert applies("class_label", "andrearczyk") and not applies("class_label", "nnunet")


# A command line for PET/CT or MRI, and how the message begins.
MISFITS = r"""
petct --version v4 --lambda-rec 1e-4      : --lambda-rec has no effect on v4 here. Leave it out
petct --version v4 --lambda-seg 0.5       : --lambda-seg has no effect
petct --version v2 --lambda-cls 1e-3      : --lambda-cls has no effect
petct --version v1 --theta 0.3            : --theta has no effect
petct --version v4 --theta 1.5            : --theta 1.5: a number, from 0 to 1 or learn
petct --version v4 --theta nan            : --theta nan
petct --version v4 --theta auto           : --theta auto
petct --version v4 --phi shuffle          : --phi has no effect
petct --version v4 --rec mse              : --rec has no effect
petct --version v4 --noise-sigma 0.1      : --noise-sigma has no effect
petct --version v2 --noise-sigma 0.1      : --noise-sigma has no effect
petct --version v2 --phi none --shuffle-count 3 : --shuffle-count has no effect
petct --version v2 --class-label volume   : --class-label has no effect
petct --version v1 --classifier pet       : --classifier has no effect
petct --version v4 --modality ct          : --modality has no effect
petct --version v3_ct_only --modality pet : --modality pet: v3_ct_only is ct
petct --version v5 --ct other             : --ct other: v5 learns organs
petct --version ct --bottleneck joint     : --bottleneck has no effect
petct --version ct --bottleneck gate      : --bottleneck has no effect
petct --version nnunet --shared 4         : --shared has no effect
petct --version weninger --lambda-rec 1   : --lambda-rec has no effect
petct --version segresnet --norm private  : --norm has no effect
petct --version v2-rec                    : --version: v2-rec
petct --version V2                        : --version: V2.*or a compared system: .*nnunet
mri --version v2 --phi noise              : --phi has no effect
mri --version v3                          : --version: v3 is not defined for brain tumour MRI
mri --version v2-rec --modality ct        : --modality has no effect
petct --patch 40                          : --patch \(40,\): every side must divide by 16
petct --patch 32 32 8                     : --patch
petct --patch 32 32                       : --patch \(32, 32\): give 1 or 3 numbers
petct --patch 0                           : --patch
petct --patch 16 --shuffle-edge 17        : --shuffle-edge 17
petct --widths 4 8                        : --widths
petct --spacing 2 0 3                     : --spacing
petct --spacing nan                       : --spacing
petct --shuffle-edge 0                    : --shuffle-edge 0
petct --shuffle-count -1                  : --shuffle-count
petct --shared 0                          : --shared
petct --shared 5 9                        : --shared
petct --epochs 0                          : --epochs 0: a number, from 1 to 1000000000
petct --epochs 1000000001                 : --epochs 1000000001: a number, from 1
petct --steps 0                           : --steps 0
petct --batch-size 0                      : --batch-size 0
petct --crops 0                           : --crops 0
petct --val-every 0                       : --val-every 0
petct --workers -1                        : --workers -1
petct --window-batch 0                    : --window-batch 0
petct --overlap 1.0                       : --overlap 1.0: a number, from 0 to 0.99
petct --overlap -0.1                      : --overlap -0.1
petct --lesion-p 1.01                     : --lesion-p 1.01
petct --lr -1                             : --lr -1.0: a number, at least 0
petct --lr nan                            : --lr nan
petct --lr inf                            : --lr inf
petct --weight-decay -1                   : --weight-decay
petct --lambda-rec -1                     : --lambda-rec
petct --seed 9223372036854775808          : --seed
petct --split-seed -1                     : --split-seed
"""


@pytest.mark.parametrize("row", MISFITS.strip().splitlines())
def test_options_that_do_not_fit_are_named(row):
    line, message = row.split(" : ", 1)
    kind, *words = line.split()
    with pytest.raises(UserError, match=f"^{message}"):
        resolve(train.parse_train(words), kind)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "mri"}, "--data: holds PET/CT studies"),
        ({"phi": "blur"}, "--phi blur: choose from none, noise, shuffle"),
        ({"cache": ""}, "--cache '': an empty string"),
    ],
)
def test_options_of_a_script_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        resolve(Config(**options), "petct")


def test_every_option_is_a_flag_in_a_group_and_every_version_is_listed(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = set()
    for action in parser._actions:
        flags.update(action.option_strings)
    names = {f.name for f in fields(Config)} - {"kind", "organ_names"}  # found in the data
    assert flags == {f"--{name.replace('_', '-')}" for name in names} | {"-h", "--help"}

    with pytest.raises(SystemExit) as end:
        train.parse_train(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "0.5 % of 96^3" in text and "inference:" in text
    listed = text[text.index("--version\n") :].split()
    assert {*SYSTEMS, *ONE_MODALITY, *VARIANTS["petct"], *VARIANTS["mri"]} <= set(listed)


def test_command_line_gives_a_config():
    assert train.parse_train([]) == Config()
    line = (
        "--version v4 --shared 4 5 6 --theta learn --patch 32 --spacing 2 2.5 3 --lr 0.01 "
        "--epochs 3 --steps 5 --compile --lambda-seg 0.25 --lr-drop 0 --out runs/a"
    )
    expected = Config(
        version="v4",
        shared=(4, 5, 6),
        theta="learn",
        patch=(32,),
        spacing=(2.0, 2.5, 3.0),
        lr=0.01,
        epochs=3,
        steps=5,
        compile=True,
        lambda_seg=0.25,
        lr_drop=0,
        out="runs/a",
    )
    assert train.parse_train(line.split()) == expected
    assert train.parse_train(["--shared"]).shared == ()
    assert train.parse_train(["--theta", "0.3"]).theta == 0.3


@pytest.mark.parametrize("line", ["--phi blur", "--epochs 1.5", "--kind mri", "--rec", "stray"])
def test_bad_command_lines_end_with_code_2(line, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse_train(line.split())
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_saved_config_comes_back():
    config = make_config("v4", data="d", out="o")
    saved = to_dict(config)
    assert saved["shared"] == [5]
    assert from_dict(saved) == config
    assert saved.keys() == OPTIONS.keys() - {"resume", "check"}
    assert to_dict(config, weights_only=True).keys() == OPTIONS.keys() - LAUNCH_OPTIONS
    assert OPTIONS.keys() >= LAUNCH_OPTIONS | NOT_COMPARED


@pytest.mark.parametrize(
    "change, message",
    [
        ({"momentum": 0.9}, "momentum.*unknown here"),
        ({"lr": None}, "saved option lr is no float"),
        ({"epochs": 1.5}, "saved option epochs is no int"),
        ({"shared": 5}, "saved option shared is no tuple"),
        ({"shared": [9]}, "--shared"),
    ],
)
def test_a_saved_config_that_is_damaged(change, message):
    saved = to_dict(make_config("v3"))
    assert from_dict({**saved, "lr": 1}).lr == 1  # JSON may hold a whole number
    with pytest.raises(UserError, match=message):
        from_dict({**saved, **change})


def key(version="v3", kind="petct", data="d", **options):
    return unusual_options(make_config(version, kind, data=data, **options))


def test_runs_are_the_same_but_for_seed_fold_and_launch():
    """All versions with their defaults; an option that only some use sets those alone apart."""
    for version in ("v1", "v2", "v3", "v4", "v3_pet_only", *SYSTEMS):
        assert key(version) == {"data": "petct"}
    assert key(seed=3, fold=2, splits="s.json", out="o", workers=7, amp="none") == key()
    assert key(data="elsewhere", cache="c") == key()
    assert key(lambda_rec=0.1) == {"data": "petct", "lambda_rec": 0.1}
    assert key("v4", theta=0.3, shared=(4,)) == {"data": "petct", "theta": 0.3, "shared": (4,)}
    assert key("nnunet", ct="other") == {"data": "petct", "ct": "other"}
    assert key(epochs=7) == {"data": "petct", "epochs": 7}
    assert key(epochs=400) == {"data": "petct"}
    assert key(steps=3) == {"data": "petct", "steps": 3}
    assert key(data=None) == {"data": "phantom"}
    assert key(data=None, epochs=400) == {"data": "phantom", "epochs": 400}
    assert key("v2", kind="mri") == {"data": "mri"}


def test_values_in_words():
    words = [format_value(value) for value in ((4, 5, 6), (), None, 1e-4, 30, "noise")]
    assert words == ["4 5 6", "none", "default", "0.0001", "30", "noise"]


def test_settings_in_words():
    settings = parse_settings(["shared=", "spacing=4,4,6", "patch=32", "bottleneck=joint"])
    assert settings == {
        "shared": (),
        "spacing": (4.0, 4.0, 6.0),
        "patch": (32, 32, 32),
        "bottleneck": "joint",
    }
    with pytest.raises(UserError, match="--patch"):
        parse_settings(["patch=7"])
    with pytest.raises(SystemExit):
        parse_settings(["nonsense=3"])
