"""Every command on bad input: one clear line, exit code 2, and nothing that was there is changed.

ROWS: a group, the command of its rows ("! " before: in a process of its own) and the rows. A row is
the rest of the command line, or what is done before to a file of a copy of small folders (HARM, the
path, and what that takes); then words that the line must hold, ": ..." behind the path.
"""

import gzip
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_nifti

import files
import plots
import train
from config import plain
from runs import saved_config


def image(path, change=lambda a: a, header=()):
    """Other values in an image, other fields of its header."""
    found = nib.load(path)
    raw = write_nifti(path, change(np.asarray(found.dataobj)), found.affine).read_bytes()
    made = nib.Nifti1Header((raw := gzip.decompress(raw))[:348], check=False)
    for field, value in dict(header).items():
        made[field] = value
    path.write_bytes(gzip.compress(made.binaryblock + raw[348:], 1))


def edit(path, more):
    """Other values of keys of a JSON file, in config.json of options."""
    content = json.loads(path.read_text())
    own = {"config": content["config"] | more} if path.name == "config.json" else more
    path.write_text(json.dumps(content | own))


HARM = {
    "gone": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "pipe": lambda path: (path.unlink(missing_ok=True), os.mkfifo(path)),
    "folder": lambda path: (path.unlink(missing_ok=True), path.mkdir(parents=True)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text("x")),
    "locked": lambda path: path.chmod(0) if os.geteuid() else pytest.skip("root may read it"),
    "json": lambda path, content: path.write_text(json.dumps(content)), "edit": edit,
    "copy": lambda path, to: (shutil.copytree if path.is_dir() else shutil.copy)(path, to),
    "voxels": image, "header": lambda path, fields: image(path, header=fields),
    "split": lambda path, train=(0, 1, 2): path.write_text(
        json.dumps({p: [NAME.format(i) for i in own] for p, own in (("train", train), *PARTS)})
    ),
}  # fmt: skip
NAME, LIST, PIECE = "PETCT_{:010x}/a", "nn/dataset.json", "nn/imagesTr/case_001_0000.nii.gz"
PET, CT, SEG = (f"tcia/{NAME.format(2)}/{stem}.nii.gz" for stem in ("SUV", "CTres", "SEG"))
MASK, CONFIG = "m/PETCT_0000000001__a.nii.gz", "run/config.json"
T = "train --out new --patch 16 --spacing 8 --epochs 1 --steps 1 --batch-size 2 --workers 0 --data "
FOLD = {"train": [NAME.format(0), NAME.format(1)], "val": [NAME.format(1)]}
BACK, BIG, PARTS = {"background": 0}, 9**99, (("val", [3]), ("test", [4, 5]))
GO, ENV = "train --out run --resume --epochs 3 ", "WORLD_SIZE=2 RANK=5 MASTER_ADDR=x MASTER_PORT=1 "
BROKEN = ("cut", ": damaged"), ("pipe", ": not a file"), ("locked", ": ")
# fmt: off
ROWS = [
    ("folders", "! studies ", [("nn --channels ct=x", "--channels ct=x: expected names")]),
    ("folders", T, [(LIST, f"{LIST}: a file. Give --data"), ("no", "no: no such folder")]),
    ("folders", T + "e", [("folder", "e", ": no studies found. Expected dataset.json"),
        ("copy", "nn", Path("e/nn"), "e: no studies found. a dataset.json lies in e/nn"),
        ("text", "e/a.zip", " is an archive. Unpack"), ("text", "e/p/1.dcm", " is DICOM. Convert"),
        ("text", "e/p/x.mha", " is no NIfTI. Convert")]),
    ("dataset.json", T + "nn", [("folder", LIST, ": Is a directory"), ("cut", LIST, ": damaged"),
        ("gone", "nn/imagesTr", "nn: no studies found. No .nii.gz or .nii lies in its imagesTr"),
        ("edit", LIST, {"labels": BACK | {"a": 1, "ignore": 2}}, ": labels", "Voxels to ignore"),
        ("edit", LIST, {"labels": {"background": 1, "tumor": 0}}, ": labels", "Expected 0 for"),
        ("edit", LIST, {"labels": BACK | {"a": 1, "b": 2}}, ": labels", "--lesion-labels 1 2"),
        ("copy", "tcia", Path("nn/more"), "nn: holds nnU-Net raw and AutoPET (TCIA)"),
        ("gone", LIST, "nn: no studies found. imagesTr without dataset.json"),
        ("pipe", LIST, ": not a file")]),
    ("labels and channels", T + "nn ", [("--channels ct:0", "--channels ct:0: expected names"),
        ("--channels ct=0 pet=9", "nn/imagesTr/case_000_0009.nii.gz: missing file"),
        ("--lesion-labels 7", f"{LIST}: labels", "--lesion-labels 1 2"),
        ("--channels ct=0 x=1", "--channels: channels are named ct, x"),
        ("--channels ct=0 pet=0", "--channels: channels are named pet")]),
    ("images and values", T + "tcia", [("locked", CT, ": cannot be read", "Permission"),
        ("copy", "tcia/PETCT_0000000001", Path("tcia/x/PETCT_0000000001"), "duplicate case PETCT_"),
        ("header", PET, {"scl_slope": np.inf, "scl_inter": 0}, ": scl_slope is infinite"),
        ("voxels", CT, lambda a: a + np.int16(1024), ": a median of", "--allow offset"),
        ("copy", PET, Path(PET.replace("02/", "01/")), "the same image as PETCT_"),
        ("voxels", PET, lambda a: a * 0 + 3, ": all its voxels are equal"),
        ("copy", PET, Path(PET[:-3]), ": there as .nii and as .nii.gz"),
        ("folder", PET, ": not a file"), ("gone", CT, ": missing file"),
        ("pipe", PET, ": not a file")]),
    ("splits", T + "tcia --splits s.json", [("split", "s.json", (), ": train is empty"),
        ("json", "s.json", {"train": [], "test": []}, ": expected the keys train, val, test"),
        ("split", "s.json", (0, 1, 4), ": patient PETCT_0000000004 is in train and in test"),
        ("split", "s.json", (0, 77), ": 1 studies are not in the data, the first is PETCT"),
        ("json", "s.json", [FOLD], ": patient PETCT_0000000001 is in train and in val"),
        ("split", "s.json", (1,), "of the training part has a lesion", "--splits"),
        ("folder", "s.json", ": Is a directory"), ("pipe", "s.json", ": not a file"),
        ("text", "s.json", ": damaged")]),
    ("splits", T + "tcia --splits s.json --fold 2", [("json", "s.json", [FOLD], ": has 1 folds"),
        ("split", "s.json", "--fold 2 has no effect on s.json")]),
    ("splits", T + "tcia ", [("--folds 7", "6 patients are too few for 7 folds"),
        ("--fold 5", "--fold 5 of --folds 5"), ("--splits no", "no: No such file")]),
    ("training", T + "tcia ", [("--version nnunet --shared 4", "--shared has no effect on nnunet"),
        ("--data msd --lesion-labels 1", "--lesion-labels has no effect on Medical"),
        (f"--epochs {9**999}", f"--epochs {9**999}: a number, from 1 to 1000000000"),
        ("--version v4 --theta 2", "--theta 2.0: a number, from 0 to 1 or learn"),
        (f"--workers {BIG}", f"--workers {BIG}: a number, from 0 to 1000000000"),
        ("--lr 1e38 --steps 4", "new: the loss is nan in epoch 1", "--lr"),
        ("--theta auto", "--theta: invalid number or learn value: 'auto'"),
        ("--patch 160000", "--patch (160000,): a number, from 1 to 4096"),
        ("--channels ct=0 pet=1", "--channels has no effect on AutoPET"),
        (f"--out {LIST}", f"{LIST}: File exists. Choose another path"),
        ("--patch 20", "--patch (20,): every side must divide by 16"),
        ("--version v9", "--version: v9 is not defined for PET/CT"),
        ("--shared 5 9", "--shared (5, 9): a number, from 1 to 8"),
        ("--out run", "run: holds a run already. Add --resume"), ("--lr nan", "--lr nan: a number"),
        (f"--cache {LIST}", f"{LIST}/tcia-", "Not a directory"),
        ("--lambda-cls 1", "--lambda-cls has no effect on v2"), ("--allow x", "choice: 'x'")]),
    ("training", "! ", [("WORLD_SIZE=two " + T + "tcia", "WORLD_SIZE=two RANK=0")]),
    ("training", "", [(ENV + T + "tcia", "WORLD_SIZE=2 RANK=5"), (T + "''", "an empty string")]),
    ("evaluation", "eval ", [("run --data msd", "--data: holds brain tumour MRI studies"),
        ("run run --late-fusion union", "--late-fusion takes a run of `ct`", "not v3 and v3"),
        ("mri --data tcia", "--data: holds PET/CT studies", "brain tumour MRI"),
        (". --table 3 --device cpu", "--device has no effect here"),
        ("nn --table 3", "nn: no run of Table 3 with test results"),
        (f"{LIST} --table 3", "--table takes one folder"), ("", "arguments are required: RUN"),
        ("no", "no/best.pt: no such checkpoint. Train"),
        (LIST, f"{LIST}/best.pt: no such checkpoint")]),
    ("prediction", "eval run --out m --predict ", [("tcia --data nn", "--data has no effect here"),
        ("tcia --lesion-labels 1", "--lesion-labels has no effect on AutoPET"),
        ("msd", "msd: holds brain tumour MRI studies"), ("''", "'': an empty string"),
        (f"tcia --out {LIST}", f"{LIST}: File exists"), ("no", "no: no such folder")]),
    ("prediction", "eval run --out m --predict tcia", [
        ("voxels", PET, lambda a: a * 1000 - 1000, "Are CT and PET swapped?", "--allow swapped"),
        ("pipe", CT, ": not a file", "5 studies were predicted"),
        ("text", MASK, ": exists already", "--overwrite")]),
    ("prediction", "eval run --out m --predict nn/imagesTr", [("gone", PIECE, ": missing file"),
        ("copy", "tcia", Path("nn/imagesTr/x"), "nn/imagesTr: holds nnU-Net raw and AutoPET")]),
    ("run folders", "eval run", [*((harm, "run/splits.json", word) for harm, word in BROKEN),
        ("copy", "mri/best.pt", Path("run/best.pt"), "run: config.json is not that of best.pt"),
        ("edit", CONFIG, {"shared": [5, 6]}, "run: config.json is not that of best.pt (shared"),
        ("edit", CONFIG, {"kind": None}, ": damaged (ValueError: saved option kind is None)"),
        ("edit", CONFIG, {"momentum": 1}, ": saved options ['momentum'] are unknown"),
        ("edit", "run/splits.json", {"test": []}, ": its test part is empty"),
        *((harm, "run/best.pt", word) for harm, word in BROKEN), ("text", CT, ": cannot be read"),
        *((harm, CONFIG, word) for harm, word in BROKEN)]),
    ("run folders", "eval . --table 3", [(h, "run/test_studies.csv", w) for h, w in BROKEN]),
    ("run folders", "train --out run --resume", [("gone", "run/config.json", ": No such file"),
        *((harm, "run/summary.json", word) for harm, word in BROKEN)]),
    ("resume", GO, [("gone", "run/last.pt", "run: has summary.json but no last.pt"),
        ("copy", "mri/splits.json", Path("run/splits.json"), "splits.json: 5 studies are not in"),
        ("voxels", CT, lambda a: a + np.int16(40), "run: changed since the run began: PETCT_"),
        *((harm, "run/metrics.csv", ": ") for harm, _ in BROKEN),
        *((harm, "run/last.pt", word) for harm, word in BROKEN),
        ("voxels", SEG, lambda a: np.roll(a, 1, 0), "(mask)")]),
    ("resume", GO, [("--lr 1", "run: a run goes on with its own settings (lr was 0.001, now 1.0)"),
        ("--version v1", "run: a run goes on with its own settings (version was v3, now v1)"),
        ("--splits s.json", "run: a run goes on with its own settings (splits was None"),
        ("--epochs 1", "run: has 2 epochs already, more than --epochs 1"),
        ("--data msd", "--data: holds brain tumour MRI studies")]),
    ("resume", "train --resume", [("", "--resume: say which run with --out")]),
    ("figures", "plots ", [("--qualitative run mri --out f", "mri: kind or spacing differ"),
        ("search", "search: no figure to draw of fig_s1_lambdas"),
        ("run", "run: no trials of a search"), ("no", "no: no trials of a search")]),
    ("figures", "plots search", [("cut", "search/a/trial.json", ": damaged")]),
    ("timing", "bench ", [("preprocess --data tcia --limit 0", "--limit: 0 is no number from 1"),
        (f"infer --volume {LIST} --patch 16", f"{LIST}: damaged", ".npy file of two images"),
        ("metrics --repeat 0", "--repeat: 0 is no number from 1"), ("", "required: task")]),
    ("searches", "tune ", [("--report search --lr 1", "--report takes no other option"),
        ("--search theta --version v1", "--version v1: theta, which the search varies"),
        ("--search free --samples 0", "--samples 0: of free at least 1"),
        ("--search all", "--search: invalid choice"), ("--report nn", "nn: no trials of a search"),
        ("", "--search --report is required")]),
    ("searches", "tune --search lambdas --out new ", [("--seed 0 -1", "--seed -1: the least is 0"),
        ("--cpus-per-trial nan", "--cpus-per-trial nan: a number, at least 0"),
        ("--data tcia --address 127.0.0.1:1", "Ray, 127.0.0.1:1: ", "refused"),
        ("--gpus-per-trial -1", "--gpus-per-trial -1: a number, at least 0"),
        ("--data msd", "--version: v3 is not defined for brain tumour MRI"),
        (f"--seed {BIG}", f"--seed {BIG}: a number, from 0"),
        (f"--out {LIST}", f"{LIST}: File exists")]),
    ("searches", "tune --search free --samples 1 --out new --data tcia --splits s.json", [
        ("split", "s.json", "--search free: no lesion to validate on", "--splits")]),
]
# fmt: on


@pytest.fixture
def place(tmp_path, tmp_path_factory, monkeypatch, tcia, nnunet, msd, base):
    """A copy of studies in three layouts, a run of each kind and a search; the working folder."""
    made = tmp_path_factory.getbasetemp() / "bad_inputs"
    if not made.exists():
        for folder in tcia(6, root=made / "tcia").glob("*/*"):
            folder.rename(folder.with_name("a"))
        nnunet(2, root=made / "nn"), msd(5, root=made / "msd")
        with monkeypatch.context() as patch:
            patch.chdir(made)
            patch.setattr(plots, "pictures", lambda *args: None)
            own = replace(base, data="tcia", cache="cache", out="run", lr=None, phi=None, folds=5)
            train.train(replace(own, spacing=(8.0,) * 3))
            train.train(replace(own, version="v1", data="msd", out="mri", spacing=(2.0,) * 3))
            record = {"searches": [], "studies": "", "config": plain(saved_config(Path("run")))}
            Path("search/a").mkdir(parents=True)
            Path("search/a/trial.json").write_text(json.dumps(record))
            shutil.rmtree("cache")
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    yield
    signal.alarm(0)


def contents():
    found = [path for path in Path().rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in found if os.access(path, os.R_OK)}


CASES = [(group, line, row) for group, line, rows in ROWS for row in rows]
IDS = [f"{g}, {' '.join(map(str, row[: 1 + (row[0] in HARM)]))[:60]}" for g, _, row in CASES]


@pytest.mark.parametrize("group, line, row", CASES, ids=IDS)
def test_bad_input_ends_with_one_line(place, monkeypatch, capsys, group, line, row):
    first, *words = row
    if first in HARM:
        path, given = words[0], [word for word in words if not isinstance(word, str)]
        HARM[first](Path(path), *given)
        words = [path * (word[0] in ":/ ") + word for word in words[1 + len(given) :]]
    else:
        line += first
    script, *rest = shlex.split(line.lstrip("! "))
    while "=" in script:
        monkeypatch.setenv(*script.split("="))
        script, *rest = rest
    file, before = str(Path(files.__file__).with_name(f"{script}.py")), contents()
    if line.startswith("!"):
        done = subprocess.run([sys.executable, file, *rest], capture_output=True, text=True)
        code, said = done.returncode, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", [file, *rest])
        signal.signal(signal.SIGALRM, signal.default_int_handler)  # what hangs ends with code 130
        signal.alarm(60)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(file, run_name="__main__")
        code, said = end.value.code, capsys.readouterr().err
    assert code == 2 and "Traceback" not in said and said.count("error: ") == 1, said
    _, *more = said[said.index("error: ") :].splitlines()
    assert all(text.startswith("  ") for text in more[:-1]), said  # findings, perhaps a foot
    assert all(word in said for word in words), said
    after = contents()
    assert {path: after.get(path) for path in before} == before
