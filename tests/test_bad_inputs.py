"""Every command on bad input: one clear line, exit code 2, and nothing that was there is changed.

A line of TABLE reads

    HARM PATH VALUE -> COMMAND => WORDS ... WORDS

The harm (a key of HARMS) is done to a file in a copy of small folders, then the command must end
with an error that holds the words; without an arrow, nothing is done before. @ in the words is the
path. $NAME is a text of NAMES. A command after "!" runs in a process of its own, variables of the
environment may precede it.
"""

import gzip
import json
import os
import runpy
import shlex
import shutil
import signal
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_nifti

import plots
import runs
import train
from common import write_json
from config import to_dict

ROOT = Path(__file__).parent.parent
PATIENT_1 = "PETCT_0000000001/a"
STUDY = "tcia/PETCT_0000000002/a"
NAMES = {
    "TRAIN": "train --out new --patch 16 --spacing 8 --epochs 1 --steps 1 --batch-size 2 "
    "--workers 0 --data",
    "RESUME": "train --out run --resume --epochs 3",
    "PREDICT": "eval run --out m --predict",
    "SEARCH": "tune --search lambdas --out new --data",
    "LIST": "nn/dataset.json",
    "PET": f"{STUDY}/SUV.nii.gz",
    "CT": f"{STUDY}/CTres.nii.gz",
    "SEG": f"{STUDY}/SEG.nii.gz",
    "PIECE": "nn/imagesTr/case_001_0000.nii.gz",
    "MASK": "m/PETCT_0000000001__a.nii.gz",
    "CHANGED": "run: a run resumes with the options that it began with",
    "HUGE": "9" * 999,
    "STUDY": STUDY,
    "FOLDS": json.dumps([{"train": [PATIENT_1], "val": [PATIENT_1]}]),
}
TABLE = r"""
# folders
! studies nn --channels ct=x => --channels ct=x: expected names
$TRAIN $LIST => $LIST: a file. Give --data
$TRAIN no => no: no such folder
folder e -> $TRAIN e => @: no studies found. Expected dataset.json
copy nn e/nn -> $TRAIN e => e: no studies found. a dataset.json lies in e/nn
text e/a.zip -> $TRAIN e => @ is an archive. Unpack
text e/p/1.dcm -> $TRAIN e => @ is DICOM. Convert
text e/p/x.mha -> $TRAIN e => @ is no NIfTI. Convert

# dataset.json
folder $LIST -> $TRAIN nn => @: Is a directory
cut $LIST -> $TRAIN nn => @: damaged
pipe $LIST -> $TRAIN nn => @: not a file
gone $LIST -> $TRAIN nn => nn: no studies found. imagesTr without dataset.json
gone nn/imagesTr -> $TRAIN nn => nn: no studies found. No .nii.gz or .nii lies in its imagesTr
edit $LIST {"labels": {"background": 0, "a": 1, "ignore": 2}} -> $TRAIN nn => @: labels ... Voxels to ignore
edit $LIST {"labels": {"background": 1, "tumor": 0}} -> $TRAIN nn => @: labels ... Expected 0 for
edit $LIST {"labels": {"background": 0, "a": 1, "b": 2}} -> $TRAIN nn => @: labels ... --lesion-labels 1 2
copy tcia nn/more -> $TRAIN nn => nn: holds nnU-Net raw and AutoPET (TCIA)

# labels and channels
$TRAIN nn --channels ct:0 => --channels ct:0: expected names
$TRAIN nn --channels ct=0 pet=9 => nn/imagesTr/case_000_0009.nii.gz: missing file
$TRAIN nn --channels ct=0 x=1 => channels are named ct, x
$TRAIN nn --channels ct=0 pet=0 => channels are named pet
$TRAIN nn --lesion-labels 7 => $LIST: labels ... --lesion-labels 1 2
$TRAIN msd --lesion-labels 1 => --lesion-labels has no effect on Medical
$TRAIN tcia --channels ct=0 pet=1 => --channels has no effect on AutoPET

# images and values
locked $CT -> $TRAIN tcia => @: cannot be read ... Permission
copy tcia/PETCT_0000000001 tcia/x/PETCT_0000000001 -> $TRAIN tcia => duplicate case PETCT_
copy $PET tcia/PETCT_0000000001/a/SUV.nii.gz -> $TRAIN tcia => the same image as PETCT_
copy $PET $STUDY/SUV.nii -> $TRAIN tcia => @: there as .nii and as .nii.gz
move $CT 9 -> $TRAIN tcia => @: affine differs from that of SUV.nii.gz ... their own: --own-grids
move $CT 9 -> $PREDICT tcia => @: affine differs from that of SUV.nii.gz ... their own: --own-grids
move $CT 70 -> $TRAIN tcia --own-grids => $PET: only ... of it lies inside the field of view of CTres
move $SEG 9 -> $TRAIN tcia --own-grids => @: affine differs from that of SUV ... its affine differs
infinite_slope $PET -> $TRAIN tcia => @: scl_slope is infinite
offset $CT 1024 -> $TRAIN tcia => @: a median of ... is not HU
constant $PET -> $TRAIN tcia => @: all its voxels are equal
folder $PET -> $TRAIN tcia => @: not a file
pipe $PET -> $TRAIN tcia => @: not a file
gone $CT -> $TRAIN tcia => @: missing file

# splits
split s.json -> $TRAIN tcia --splits s.json => @: train is empty
split s.json 0 1 4 -> $TRAIN tcia --splits s.json => @: patient PETCT_0000000004 is in train and in test
split s.json 0 77 -> $TRAIN tcia --splits s.json => @: 1 studies are not in the data, the first is PETCT
split s.json 1 -> $TRAIN tcia --splits s.json => of the training part has a lesion ... --splits
split s.json 0 1 2 -> $TRAIN tcia --splits s.json --fold 2 => --fold 2 has no effect on s.json
json s.json {"train": [], "test": []} -> $TRAIN tcia --splits s.json => @: expected the keys train, val, test
json s.json $FOLDS -> $TRAIN tcia --splits s.json => @: patient PETCT_0000000001 is in train and in val
json s.json $FOLDS -> $TRAIN tcia --splits s.json --fold 2 => @: has 1 folds
folder s.json -> $TRAIN tcia --splits s.json => @: Is a directory
pipe s.json -> $TRAIN tcia --splits s.json => @: not a file
text s.json -> $TRAIN tcia --splits s.json => @: damaged
$TRAIN tcia --splits no => no: No such file
$TRAIN tcia --folds 7 => 6 patients are too few for 7 folds
$TRAIN tcia --fold 5 => --fold 5 of --folds 5

# training
$TRAIN tcia --version nnunet --shared 4 => --shared has no effect on nnunet
$TRAIN tcia --version v9 => --version: v9 is not defined for PET/CT
$TRAIN tcia --epochs $HUGE => --epochs $HUGE: a number, from 1 to 1000000000
$TRAIN tcia --workers 1$HUGE => --workers 1$HUGE: a number, from 0 to 1000000000
$TRAIN tcia --theta auto => --theta auto: a number, from 0 to 1 or learn
$TRAIN tcia --lr 1e38 --steps 4 => new: the loss is nan in epoch 1 ... --lr
$TRAIN tcia --lr nan => --lr nan: a number
$TRAIN tcia --patch 160000 => --patch (160000,): a number, from 1 to 4096
$TRAIN tcia --vers v3 => unrecognized arguments: --vers v3
$TRAIN tcia --patch 20 => --patch (20,): every side must divide by 16
$TRAIN tcia --out $LIST => $LIST: File exists. Choose another path
$TRAIN tcia --out run => run: holds a run already. Add --resume
$TRAIN tcia --cache $LIST => $LIST/tcia- ... Not a directory
$TRAIN '' => an empty string
! WORLD_SIZE=two $TRAIN tcia => WORLD_SIZE=two RANK=0
WORLD_SIZE=2 RANK=5 MASTER_ADDR=x MASTER_PORT=1 $TRAIN tcia => WORLD_SIZE=2 RANK=5

# evaluation
eval => arguments are required: RUN
eval no => no/best.pt: no such checkpoint. Train
eval $LIST => $LIST/best.pt: no such checkpoint
eval run --data msd => --data: holds brain tumour MRI studies
eval mri --data tcia => --data: holds PET/CT studies ... brain tumour MRI
eval run run --late-fusion union => --late-fusion takes a run of `ct` ... not v3 and v3
eval run --late-fusion union => --late-fusion takes two runs
eval run --ensemble => --ensemble goes with --out
eval run --overwrite => --overwrite goes with --predict
eval run run --out x => two runs have one name
copy run e/run -> eval run --out e => e/run: holds a run

# prediction
$PREDICT tcia --data nn => --data has no effect here
$PREDICT tcia --part val => --part has no effect here
$PREDICT tcia --organs-out m => the masks lie in --out
$PREDICT tcia --ensemble => not allowed with argument
eval run --predict tcia => give the folder of the masks with --out
$PREDICT tcia --lesion-labels 1 => --lesion-labels has no effect on AutoPET
$PREDICT tcia --out $LIST => $LIST: File exists
$PREDICT msd => msd: holds brain tumour MRI studies
$PREDICT '' => '': an empty string
$PREDICT no => no: no such folder
pipe $CT -> $PREDICT tcia => @: not a file ... 5 studies were predicted
scale $PET 1000 -> $PREDICT tcia => Are CT and PET swapped?
text $MASK -> $PREDICT tcia => @: exists already ... --overwrite
gone $PIECE -> $PREDICT nn/imagesTr => @: missing file
copy tcia nn/imagesTr/x -> $PREDICT nn/imagesTr => nn/imagesTr: holds nnU-Net raw and AutoPET

# run folders
cut run/splits.json -> eval run => @: damaged
pipe run/splits.json -> eval run => @: not a file
locked run/splits.json -> eval run => @: Permission
edit run/splits.json {"test": []} -> eval run => @: its test part is empty
cut run/best.pt -> eval run => @: damaged
pipe run/best.pt -> eval run => @: not a file
copy mri/best.pt run/best.pt -> eval run => run: config.json is not that of best.pt
cut run/config.json -> eval run => @: damaged
pipe run/config.json -> eval run => @: not a file
option run/config.json {"shared": [5, 6]} -> eval run => run: config.json is not that of best.pt (shared
option run/config.json {"kind": null} -> eval run => @: damaged (ValueError: saved option kind is None)
option run/config.json {"momentum": 1} -> eval run => @: saved options ['momentum'] are unknown
text $CT -> eval run => @: cannot be read

# resume
train --resume => --resume: say which run with --out
gone run/config.json -> train --out run --resume => @: No such file
cut run/summary.json -> train --out run --resume => @: damaged
pipe run/summary.json -> train --out run --resume => @: not a file
gone run/last.pt -> $RESUME => run: has summary.json but no last.pt
cut run/last.pt -> $RESUME => @: damaged
pipe run/last.pt -> $RESUME => @: not a file
cut run/metrics.csv -> $RESUME => @: damaged
pipe run/metrics.csv -> $RESUME => @: not a file
copy mri/splits.json run/splits.json -> $RESUME => splits.json: 5 studies are not in
offset $CT 40 -> $RESUME => run: changed since the run began: PETCT_
roll $SEG -> $RESUME => (mask)
$RESUME --lr 1 => $CHANGED (lr was 0.001, now 1.0)
$RESUME --version v1 => $CHANGED (version was v3, now v1)
$RESUME --splits s.json => $CHANGED (splits was None
$RESUME --epochs 1 => run: has 2 epochs already, more than --epochs 1
$RESUME --data msd => --data: holds brain tumour MRI studies

# tables and figures
tables nn --table 3 => nn: no run of Table 3 with test results
plots --qualitative run mri --out f => mri: its kind or spacing differ
plots search => search: no figure to draw of fig_s1_lambdas
plots run => run: no trials of a search
plots no => no: no trials of a search
plots search --qualitative run => not allowed with argument
plots search --study a => go with --qualitative
plots search --device cpu => go with --qualitative
plots --qualitative run => say where to write the figure with --out
plots --qualitative no --out f => no/best.pt: no such checkpoint
cut search/a/trial.json -> plots search => @: damaged

# timing
bench => required: task
bench preprocess --data tcia --limit 0 => --limit: 0 is no number from 1
bench metrics --repeat 0 => --repeat: 0 is no number from 1

# searches
tune => --search --report is required
tune --search all => --search: invalid choice
tune --search theta --version v1 --data tcia => --search theta: --theta has no effect on v1
tune --search free --samples 0 => --samples 0: a number, at least 1
tune --search theta --samples 3 => --samples 3: it is for --search free
tune --report search --lr 1 => --report takes no other option
tune --report nn => nn: no trials of a search
$SEARCH tcia --seed 0 -1 => --seed -1: a number, from 0
$SEARCH tcia --seed 1$HUGE => --seed 1$HUGE: a number, from 0
$SEARCH tcia --cpus-per-trial nan => --cpus-per-trial nan: a number, at least 0
$SEARCH tcia --gpus-per-trial -1 => --gpus-per-trial -1: a number, at least 0
$SEARCH tcia --out $LIST => $LIST: File exists
$SEARCH tcia --address 127.0.0.1:1 => Ray, 127.0.0.1:1: ... refused
$SEARCH msd => --version: v3 is not defined for brain tumour MRI
split s.json 0 1 2 -> tune --search free --samples 1 --out new --data tcia --splits s.json => --search free: no lesion to validate on ... --splits
"""  # noqa: E501

# ------------------------------------------------------------------ harms


def gone(path, value):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def pipe(path, value):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path, value):
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def cut(path, value):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def text(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")


def locked(path, value):
    if os.geteuid() == 0:
        pytest.skip("root may read it")
    path.chmod(0)


def copy(path, value):
    Path(value).parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, value)
    else:
        shutil.copy(path, value)


def edit(path, value):
    """Other values of keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **json.loads(value)}))


def option(path, value):
    """Other options in config.json."""
    content = json.loads(path.read_text())
    content["config"].update(json.loads(value))
    path.write_text(json.dumps(content))


def split(path, value):
    """Splits whose training part holds the studies of these numbers."""
    parts = {"train": map(int, value.split()), "val": [3], "test": [4, 5]}
    names = {}
    for part, numbers in parts.items():
        names[part] = [f"PETCT_{number:010x}/a" for number in numbers]
    path.write_text(json.dumps(names))


def change_voxels(path, change):
    image = nib.load(path)
    write_nifti(path, change(np.asarray(image.dataobj)), image.affine)


def move(path, value):
    """Let the image lie by so many mm to the right."""
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += float(value)
    write_nifti(path, np.asarray(image.dataobj), affine)


def infinite_slope(path, value):
    raw = gzip.decompress(path.read_bytes())
    header = nib.Nifti1Header(raw[:348], check=False)
    header["scl_slope"] = np.inf
    header["scl_inter"] = 0
    path.write_bytes(gzip.compress(header.binaryblock + raw[348:], 1))


HARMS = {
    "gone": gone,
    "pipe": pipe,
    "folder": folder,
    "cut": cut,
    "text": text,
    "locked": locked,
    "copy": copy,
    "edit": edit,
    "option": option,
    "split": split,
    "json": lambda path, value: path.write_text(value),
    "offset": lambda path, value: change_voxels(path, lambda a: a + np.int16(value)),
    "scale": lambda path, value: change_voxels(path, lambda a: a * float(value) - 1000),
    "constant": lambda path, value: change_voxels(path, lambda a: a * 0 + 3),
    "roll": lambda path, value: change_voxels(path, lambda a: np.roll(a, 1, 0)),
    "move": move,
    "infinite_slope": infinite_slope,
}


# ------------------------------------------------------------------ the test


@pytest.fixture
def place(tmp_path, tmp_path_factory, monkeypatch, tcia, nnunet, msd, base):
    """A copy of studies in three layouts, a run of each kind and a search; the working folder."""
    made = tmp_path_factory.getbasetemp() / "bad_inputs"
    if not made.exists():
        for visit in tcia(6, root=made / "tcia").glob("*/*"):
            visit.rename(visit.with_name("a"))
        nnunet(2, root=made / "nn")
        msd(5, root=made / "msd")
        with monkeypatch.context() as patch:
            patch.chdir(made)
            patch.setattr(plots, "draw_examples", lambda *args: None)
            config = replace(base, cache="cache", lr=1e-3, phi=None, folds=5)
            train.train(replace(config, data="tcia", out="run", spacing=(8.0,) * 3))
            train.train(replace(config, version="v1", data="msd", out="mri", spacing=(2.0,) * 3))
            saved = to_dict(runs.load_config(Path("run")))
            Path("search/a").mkdir(parents=True)
            record = {"searches": [], "studies": "", "config": saved}
            write_json(Path("search/a/trial.json"), record)
            shutil.rmtree("cache")
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    yield
    signal.alarm(0)


def contents():
    files = {}
    for path in Path().rglob("*"):
        if path.is_file() and path.name != ".lock" and os.access(path, os.R_OK):
            files[path] = path.read_bytes()
    return files


def run_command(monkeypatch, capsys, command):
    """The exit code of a command of TABLE, and what it prints as errors."""
    script, *words = shlex.split(command.removeprefix("! "))
    while "=" in script:
        monkeypatch.setenv(*script.split("="))
        script, *words = words
    file = str(ROOT / f"{script}.py")
    if command.startswith("!"):
        done = subprocess.run([sys.executable, file, *words], capture_output=True, text=True)
        return done.returncode, done.stderr

    monkeypatch.setattr(sys, "argv", [file, *words])
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # what hangs ends with code 130
    signal.alarm(60)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(file, run_name="__main__")
    return end.value.code, capsys.readouterr().err


ROWS = [line for line in TABLE.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:70])
def test_bad_input_ends_with_one_line(place, monkeypatch, capsys, row):
    row = string.Template(row).substitute(NAMES)
    command, words = row.split(" => ")
    harm, _, command = command.rpartition(" -> ")
    if harm:
        name, path, value = f"{harm}  ".split(" ", 2)
        HARMS[name](Path(path), value.strip())
        words = words.replace("@", path)

    before = contents()
    code, message = run_command(monkeypatch, capsys, command)
    assert code == 2
    assert "Traceback" not in message
    assert message.count("error: ") == 1, message
    _, *findings = message[message.index("error: ") :].splitlines()
    assert all(line.startswith("  ") for line in findings[:-1]), message  # perhaps with a foot
    assert all(part in message for part in words.split(" ... ")), message
    after = contents()
    assert {path: after.get(path) for path in before} == before
