"""The cache of preprocessed studies, which training reads memory-mapped."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from common import (
    DISK_FULL,
    UserError,
    atomic,
    progress,
    remove_stale_files,
    temporary_path,
    write_json,
)
from preprocess import CaseMeta, Preprocessing, content_hash, preprocess
from studies import BadStudy, Finding, Study, StudyFolder, list_findings

NPY_HEADER = 128  # bytes before the data of an .npy file of few axes


@dataclass(frozen=True)
class Case:
    """One preprocessed study: what is known of it, and its arrays below `folder`."""

    meta: CaseMeta
    folder: Path | None = None
    organs: "Case | None" = None  # its organ map, cached in the same way (organs.py)

    @property
    def name(self) -> str:
        return self.meta.name

    @property
    def patient(self) -> str:
        return self.meta.patient

    @property
    def has_lesion(self) -> bool:
        return bool(self.meta.lesion_voxels)

    def load(self, array: str) -> np.ndarray:
        """One of the arrays of `preprocess`. Mapped anew each time, so that nothing is kept."""
        dtype, shape = self.meta.arrays[array]
        with open(self.folder / f"{array}.npy", "rb") as file:  # five times as fast as np.load
            return np.memmap(file, dtype, "r", NPY_HEADER, tuple(shape))

    def native_labels(self) -> np.ndarray:
        """The classes of the mask, or the organs of a map, on the native grid; uint8."""
        return self.native_volume("native_label", self.load("native_class"))

    def native_above(self, threshold: float) -> np.ndarray:
        """1 where the SUV reaches one of preprocess.THRESHOLDS_SUV, on the native grid; uint8."""
        return self.native_volume(f"native_suv{threshold:g}", 1)

    def native_volume(self, array: str, values) -> np.ndarray:
        """A uint8 volume on the native grid of `values` at the flat indices in `array`."""
        volume = np.zeros(math.prod(self.meta.native_shape), np.uint8)
        volume[self.load(array)] = values
        return volume.reshape(self.meta.native_shape, order="F")


# ------------------------------------------------------------------ one study


def file_fingerprints(study: Study) -> dict[str, list]:
    """What a study is made of, which a later start compares instead of reading."""
    fingerprints = {
        "classes": [list(pair) for pair in study.classes],
        "own_grids": [study.own_grids, study.reference],
    }
    for slot, source in study.sources.items():
        stat = source.path.stat()
        fingerprints[slot] = [source.path.name, source.channel, stat.st_size, stat.st_mtime_ns]
    return fingerprints


def with_checksum(content: dict) -> dict:
    """The content of a meta.json with a hash of it, by which damage shows."""
    text = json.dumps(content, sort_keys=True)
    return content | {"checksum": content_hash(text.encode())}


def read_case(folder: Path, study: Study) -> Case | None:
    """The cached study if it is complete and was made from the files as they are now."""
    # Whatever a killed process or a damaged disk left behind is no cached study.
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        saved = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        checksum = saved.pop("checksum")
        meta = CaseMeta(**saved)
        damaged = with_checksum(saved)["checksum"] != checksum
        if damaged or meta.sources != file_fingerprints(study):
            return None

        for array, (dtype, shape) in meta.arrays.items():
            size = NPY_HEADER + np.dtype(dtype).itemsize * math.prod(shape)
            if (folder / f"{array}.npy").stat().st_size != size:
                return None
        return Case(meta, folder)
    return None


def write_case(study: Study, make: Callable, folder: Path) -> list[Finding]:
    """Write the arrays and the CaseMeta that `make`, such as preprocess, returns into `folder`,
    which appears complete or not at all. Returns what is wrong with the study."""
    temporary = temporary_path(folder)
    try:
        sources = file_fingerprints(study)
        arrays, meta = make()
        write_arrays(temporary, arrays, replace(meta, sources=sources))

        if folder.exists():  # made from other versions of the files
            stale = temporary_path(folder)
            os.replace(folder, stale)
            shutil.rmtree(stale, ignore_errors=True)
        with suppress(OSError):  # another process was faster: its folder is as good
            os.replace(temporary, folder)

        if read_case(folder, study):
            return []
        problem, remedy = "changed while it was read", "Start again"
    except BadStudy as error:
        shutil.rmtree(folder, ignore_errors=True)  # a version that an earlier check passed
        return error.findings
    except Exception as error:  # the other studies are still to be checked
        if getattr(error, "errno", None) in DISK_FULL:  # but they could not be kept either
            error.filename = str(folder)
            raise
        problem = f"cannot be preprocessed ({type(error).__name__}: {error})"
        remedy = "Check the space and permissions of --cache, and the memory (fewer --workers)"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [Finding(str(study.organs or study.pet.path), problem, remedy)]


def write_arrays(folder: Path, arrays: dict[str, np.ndarray], meta: CaseMeta) -> None:
    """Write the .npy files and meta.json of a study."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        meta.arrays[name] = [array.dtype.str, list(array.shape)]
        with atomic(folder / f"{name}.npy") as file:
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(array)  # np.save would not report a full disk
    write_json(folder / "meta.json", with_checksum(asdict(meta)))


# ------------------------------------------------------------------ all studies


def cache_folder(cache: Path, root: Path, settings: Preprocessing) -> Path:
    """cache/<name>-<key>; the key holds the data folder and every setting of the preprocessing."""
    root = Path(root).resolve()
    key = json.dumps([str(root), asdict(settings)], sort_keys=True)
    return Path(cache) / f"{root.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def largest_size(study: Study, settings: Preprocessing) -> int:
    """Bytes of a cached study at most, by the header of its mask or, without one, of the image on
    whose grid it would lie: as if the body filled the volume."""
    with suppress(Exception):  # the check reports what cannot be read
        header = nib.load(study.label or study.sources[study.reference].path).header
        extent = np.array(header.get_data_shape()[:3]) * np.abs(header.get_zooms()[:3])
        voxels = np.prod(np.ceil(extent / settings.spacing) + 1)
        return int(voxels * 5)  # two float16 and a uint8
    return 0


def read_cases(studies: list[Study], folders: dict[str, Path]) -> dict[str, Case]:
    """The studies that are in the cache, by name; folders: where each belongs, by name too."""
    cases = {}
    for study in studies:
        case = read_case(folders[study.name], study)
        if case:
            cases[study.name] = case
    return cases


def write_cases(
    studies: list[Study],
    make: Callable,
    folders: dict[str, Path],
    workers: int,
) -> list[Finding]:
    """write_case for all studies, `workers` at a time; all findings. make: takes a study.

    Threads are enough: unpacking, resampling and writing leave Python's lock to others. And no
    thread survives a killed process.
    """
    findings = []
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        jobs = []
        for study in studies:
            folder = folders[study.name]
            jobs.append(pool.submit(write_case, study, partial(make, study), folder))
        for job in progress(as_completed(jobs), "preprocess", "study", len(jobs)):
            findings += job.result()
    finally:  # after Ctrl-C the studies in hand are finished, the others not begun
        pool.shutdown(cancel_futures=True)
    return findings


def find_duplicates(cases: dict[str, Case], studies: list[Study]) -> dict[str, Finding]:
    """A finding for each case, by name, whose PET is that of another with an earlier name."""
    paths = {study.name: str(study.pet.path) for study in studies}
    first_with: dict[str, str] = {}
    duplicates = {}
    for name, case in sorted(cases.items()):
        first = first_with.setdefault(case.meta.digests["pet"], name)
        if first != name:
            problem = f"duplicate case: the same image as {first}"
            duplicates[name] = Finding(paths[name], problem, "Keep one of the two")
    return duplicates


def prepare(
    folder: StudyFolder,
    settings: Preprocessing,
    cache: Path,
    workers: int = 2,
    check: bool = False,
    skip_bad: bool = False,
    say: Callable[[str], None] = print,
) -> list[Case]:
    """Every study of `folder` from the cache.

    What is not in the cache, with `check` every study, is read, checked and preprocessed. After all
    of them, raises UserError if some are bad, unless `skip_bad` leaves these out.
    """
    base = cache_folder(cache, folder.root, settings)
    remove_stale_files(base)
    folders = {study.name: base / study.name.replace("/", "__") for study in folder.studies}
    cases = {} if check else read_cases(folder.studies, folders)
    missing = [study for study in folder.studies if study.name not in cases]

    findings = list(folder.findings)
    if missing:
        base.mkdir(parents=True, exist_ok=True)
        size = sum(largest_size(study, settings) for study in missing)
        free = shutil.disk_usage(base).free
        say(
            f"cache      {base}: {len(missing)} of {len(folders)} studies to read, "
            f"at most {size / 1e9:.2f} GB ({free / 1e9:.0f} GB free)"
        )
        data = str(folder.root.resolve())
        write_json(base / "settings.json", {"data": data, **asdict(settings)})
        make = partial(preprocess, settings=settings)
        findings += write_cases(missing, make, folders, workers)
        cases |= read_cases(missing, folders)

    duplicates = find_duplicates(cases, folder.studies)
    findings += duplicates.values()
    good = []
    for study in folder.studies:  # in their order
        if study.name in cases and study.name not in duplicates:
            good.append(cases[study.name])

    if findings:
        problems = list_findings(findings)
        if not skip_bad:
            raise UserError(
                f"the input check found {problems}\n{len(good)} studies are fine. "
                "Fix the others, or leave them out with --skip-bad."
            )
        say(f"left out   {problems}")
    return good
