"""config.py: defaults, what is refused, flags, what is saved, and which runs are the same."""

import argparse
from dataclasses import asdict, fields, replace

import pytest

import config
import train
from baselines import ONE_MODALITY, SYSTEMS
from config import (
    LAUNCH,
    OPTIONS,
    Config,
    add_flags,
    as_config,
    in_words,
    key_of,
    plain,
    resolve,
    title,
)
from files import UserError
from mirror_unet import VARIANTS


@pytest.mark.parametrize(
    "kind, version, phantom, expected",
    [
        ("petct", "v1", False, {  # Sec. 3.4
            "epochs": 400, "batch_size": 4, "patch": (96, 96, 96), "spacing": (2, 2, 3),
            "lr": 1e-3, "weight_decay": 1e-6, "lesion_p": 2 / 3, "lambda_rec": 1e-4,
            "lambda_seg": 0.5, "lambda_cls": None, "theta": None, "phi": "shuffle", "folds": 5,
            "overlap": 0.25, "lr_drop": 250, "optimizer": "adam", "schedule": "step", "clip": 0,
        }),
        ("petct", "v2", False, {"lambda_rec": 1e-4, "lambda_seg": 0.5, "lambda_cls": None}),
        ("petct", "v3", False, {"lambda_rec": 1e-4, "lambda_seg": 0.5, "lambda_cls": 1e-3}),
        ("petct", "v4", False, {
            "lambda_rec": None, "lambda_seg": None, "lambda_cls": None, "theta": 0.2,
            "phi": "none",
        }),
        ("mri", "v1", False, {  # supplement
            "patch": (224, 224, 144), "spacing": (1, 1, 1), "lambda_seg": 1 / 3,
            "lambda_rec": None, "theta": None, "phi": "none", "crops": 1,
        }),
        ("mri", "v2", False, {"lambda_seg": 1 / 3, "lambda_rec": None, "phi": "none"}),
        ("mri", "v2-rec", False, {"lambda_seg": 0.5, "lambda_rec": 1e-4, "phi": "shuffle"}),
        ("petct", "v2", True, {"patch": (48, 48, 48), "folds": 3, "lr": 1e-3, "epochs": 10}),
        ("petct", "v3_ct_only", False, {"modality": "ct", "lambda_cls": 1e-3, "phi": "shuffle"}),
        ("petct", "v5", False, {"lambda_org": 0.1, "lambda_cls": 1e-3, "phi": "none"}),
        ("petct", "nnunet", False, {"lambda_seg": None, "phi": "none", "theta": None}),
    ],
)  # fmt: skip
def test_defaults_are_those_of_the_paper(kind, version, phantom, expected):
    config = resolve(Config(version=version), kind, phantom)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.kind == kind
    optional = {"data", "organs", "out", "steps", "splits", "theta"}
    optional |= {name for name in OPTIONS if name.startswith("lambda")}
    assert not [n for n, v in asdict(config).items() if v is None and n not in optional]


def test_the_title_says_where_features_meet():
    for bottleneck, words in (("own", "shuffle"), ("joint", "0.26 M more)"), ("mean", "mean in L")):
        config = resolve(Config(version="v2", bottleneck=bottleneck), "petct", False)
        assert title(config).startswith("Mirror U-Net v2, L={5}") and title(config).endswith(words)


def test_what_is_asked_for_is_kept():
    asked = Config(
        version="v3", epochs=7, patch=(32,), spacing=(4.0,), shared=(7, 3, 3), phi="none",
        lambda_rec=0.0, lr_drop=0, rec="mse",
    )  # fmt: skip
    config = resolve(asked, "petct", False)
    assert (config.epochs, config.lr_drop, config.phi, config.lambda_rec) == (7, 0, "none", 0.0)
    assert (config.patch, config.spacing, config.shared) == ((32,) * 3, (4.0,) * 3, (3, 7))
    assert resolve(replace(asked, lambda_rec=None), "petct", False).lambda_rec == 1e-3
    assert resolve(config, "petct", False) == config  # settled once
    assert resolve(Config(version="v4", theta=0.3), "petct", False).theta == 0.3
    assert resolve(Config(version="v4", theta="learn"), "petct", False).theta == "learn"


def test_a_systems_own_recipe_yields_to_what_is_asked_for():
    own = resolve(Config(version="nnunet", recipe="own", lr=0.5), "petct", False)
    assert (own.optimizer, own.lr, own.epochs, own.patch) == ("sgd", 0.5, 1000, (128, 128, 128))
    assert own.steps == 250 and own.crops == 4
    assert resolve(Config(version="nnunet"), "petct", False).optimizer == "adam"


NAN = float("nan")


@pytest.mark.parametrize(
    "kind, options, flag",
    [
        ("petct", {"version": "v4", "lambda_rec": 1e-4}, "--lambda-rec has no effect on v4"),
        ("petct", {"version": "v4", "lambda_seg": 0.5}, "--lambda-seg"),
        ("petct", {"version": "v2", "lambda_cls": 1e-3}, "--lambda-cls"),
        ("petct", {"version": "v1", "theta": 0.3}, "--theta"),
        ("petct", {"version": "v4", "theta": 1.5}, "--theta 1.5: a number, from 0 to 1 or learn"),
        ("petct", {"version": "v4", "theta": NAN}, "--theta"),
        ("petct", {"version": "v4", "theta": "auto"}, "--theta"),
        ("petct", {"version": "v4", "phi": "shuffle"}, "--phi"),
        ("petct", {"version": "v4", "rec": "mse"}, "--rec"),
        ("petct", {"version": "v2", "class_label": "volume"}, "--class-label"),
        ("petct", {"version": "v1", "classifier": "pet"}, "--classifier"),
        ("petct", {"version": "v2", "phi": "none", "shuffle_count": 3}, "--shuffle-count"),
        ("petct", {"version": "v2", "noise_sigma": 0.1}, "--noise-sigma"),
        ("petct", {"version": "v4", "modality": "ct"}, "--modality"),
        ("petct", {"version": "v3_ct_only", "modality": "pet"}, "--modality pet"),
        ("petct", {"version": "ct", "bottleneck": "joint"}, "--bottleneck"),
        ("petct", {"ct": "none"}, "--ct none: choose from own, other"),
        ("petct", {"bottleneck": "both"}, "--bottleneck both: choose from own, joint, mean"),
        ("petct", {"version": "nnunet", "shared": (4,)}, "--shared"),
        ("petct", {"version": "weninger", "lambda_rec": 1.0}, "--lambda-rec"),
        ("petct", {"version": "segresnet", "norm": "private"}, "--norm"),
        ("petct", {"version": "v2", "recipe": "own"}, "--recipe own"),
        ("petct", {"version": "valindria", "recipe": "own"}, "--recipe own"),
        ("mri", {"version": "v2", "phi": "noise"}, "--phi"),
        ("mri", {"version": "v3"}, "--version: v3 is not defined for brain tumour MRI"),
        ("mri", {"version": "v2-rec", "modality": "ct"}, "--modality"),
        ("petct", {"version": "v2-rec"}, "--version: v2-rec"),
        ("petct", {"version": "V2"}, "--version: V2.*or a compared system: .*nnunet"),
        ("petct", {"kind": "mri"}, "--data: holds PET/CT studies"),
        ("petct", {"patch": (40,)}, r"--patch \(40,\): every side must divide by 16"),
        ("petct", {"patch": (32, 32, 8)}, "--patch"),
        ("petct", {"patch": (32, 32)}, r"--patch \(32, 32\): give 1 or 3 numbers"),
        ("petct", {"patch": (0,)}, "--patch"),
        ("petct", {"widths": (4, 8)}, "--widths"),
        ("petct", {"spacing": (2.0, 0.0, 3.0)}, "--spacing"),
        ("petct", {"spacing": (NAN,)}, "--spacing"),
        ("petct", {"patch": (16,), "shuffle_edge": 17}, "--shuffle-edge 17"),
        ("petct", {"shuffle_edge": 0}, "--shuffle-edge 0"),
        ("petct", {"shuffle_count": -1}, "--shuffle-count"),
        ("petct", {"shared": (0,)}, "--shared"),
        ("petct", {"shared": (5, 9)}, "--shared"),
        ("petct", {"epochs": 0}, "--epochs 0: a number, at least 1"),
        ("petct", {"steps": 0}, "--steps 0"),
        ("petct", {"batch_size": 0}, "--batch-size 0"),
        ("petct", {"crops": 0}, "--crops 0"),
        ("petct", {"val_every": 0}, "--val-every 0"),
        ("petct", {"workers": -1}, "--workers -1"),
        ("petct", {"window_batch": 0}, "--window-batch 0"),
        ("petct", {"overlap": 1.0}, "--overlap 1.0"),
        ("petct", {"overlap": -0.1}, "--overlap -0.1"),
        ("petct", {"lesion_p": 1.01}, "--lesion-p 1.01"),
        ("petct", {"phi": "blur"}, "--phi blur: choose from none, noise, shuffle"),
        ("petct", {"amp": "fp32"}, "--amp fp32"),
        ("petct", {"lr": -1.0}, "--lr -1.0"),
        ("petct", {"lr": NAN}, "--lr nan"),
        ("petct", {"weight_decay": -1.0}, "--weight-decay"),
        ("petct", {"lambda_rec": -1.0}, "--lambda-rec"),
        ("petct", {"seed": 2**63}, "--seed"),
        ("petct", {"split_seed": -1}, "--split-seed"),
    ],
)
def test_options_that_do_not_fit_are_named(kind, options, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        resolve(replace(Config(), **options), kind, False)


def test_every_option_is_a_flag_in_a_group_and_every_name_of_version_is_listed(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    names = {f.name for f in fields(Config)} - {"kind", "organ_names"}  # found from the data
    assert flags == {f"--{name.replace('_', '-')}" for name in names} | {"-h", "--help"}
    with pytest.raises(SystemExit) as end:
        train.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "0.5 % of 96^3" in text and "inference:" in text
    listed = text[text.index("--version\n") :].split()
    assert {*SYSTEMS, *ONE_MODALITY, *VARIANTS["petct"], *VARIANTS["mri"]} <= set(listed)


def test_command_line_gives_a_config():
    assert train.parse([]) == Config()
    line = (
        "--version v4 --shared 4 5 6 --theta learn --patch 32 --spacing 2 2.5 3 --lr 0.01 "
        "--epochs 3 --steps 5 --compile --lambda-seg 0.25 --lr-drop 0 --out runs/a"
    )
    expected = Config(
        version="v4", shared=(4, 5, 6), theta="learn", patch=(32,), spacing=(2.0, 2.5, 3.0),
        lr=0.01, epochs=3, steps=5, compile=True, lambda_seg=0.25, lr_drop=0, out="runs/a",
    )  # fmt: skip
    assert train.parse(line.split()) == expected
    assert train.parse(["--shared"]).shared == ()


@pytest.mark.parametrize("line", ["--phi blur", "--epochs 1.5", "--kind mri", "--rec", "stray"])
def test_bad_command_lines_end_with_code_2(line, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(line.split())
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_saved_config_comes_back_and_unknown_options_are_refused():
    config = resolve(Config(version="v4", data="d", out="o"), "petct", False)
    saved = plain(config)
    assert saved["shared"] == [5] and as_config(saved) == config
    assert set(plain(config)) - set(plain(config, weights_only=True)) == LAUNCH - {
        "resume",
        "check",
    }
    with pytest.raises(UserError, match="momentum.*unknown here"):
        as_config(saved | {"momentum": 0.9})


def key(version="v3", kind="petct", data="d", **options):
    return key_of(resolve(Config(version=version, data=data, **options), kind, data is None))


def test_runs_are_the_same_but_for_seed_fold_and_launch():
    """Of all versions with their defaults; what only some read parts those alone."""
    rows = ["v1", "v2", "v3", "v4", "v3_pet_only", *SYSTEMS]
    assert all(key(version) == {"data": "petct"} for version in rows)
    assert key("nnunet", recipe="own") == {"data": "petct"}
    same = dict(seed=3, fold=2, splits="s.json", out="o", workers=7, cache="c", amp="none")
    assert key(**same, data="elsewhere") == key()
    assert key(lambda_rec=0.1) == {"data": "petct", "lambda_rec": 0.1}
    assert key("v4", theta=0.3, shared=(4,)) == {"data": "petct", "theta": 0.3, "shared": (4,)}
    assert key("nnunet", ct="other") == {"data": "petct", "ct": "other"}
    assert key(epochs=7) == {"data": "petct", "epochs": 7}
    assert key(epochs=400) == {"data": "petct"} and key(steps=3) == {"data": "petct", "steps": 3}
    assert key(data=None) == {"data": "phantom"} and key("v2", kind="mri") == {"data": "mri"}
    assert key(data=None, epochs=400) == {"data": "phantom", "epochs": 400}
    words = [in_words(value) for value in ((4, 5, 6), (), None, 1e-4, 30, "noise")]
    assert words == ["4 5 6", "none", "default", "0.0001", "30", "noise"]


def test_settings_in_words():
    given = config.read_settings(["shared=", "spacing=4,4,6", "patch=32", "bottleneck=joint"])
    assert given == {
        "shared": (), "spacing": (4.0, 4.0, 6.0), "patch": (32, 32, 32), "bottleneck": "joint",
    }  # fmt: skip
    with pytest.raises(UserError, match="--patch"):
        config.read_settings(["patch=7"])
    with pytest.raises(SystemExit):
        config.read_settings(["nonsense=3"])
