"""The cache of preprocessed studies, which training reads memory-mapped."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from files import FULL, UserError, atomic, progress, sweep, unfinished, write_json
from preprocess import Preprocessing, hash_of, preprocess
from studies import BadStudy, Finding, Found, Study, list_findings

NPY_HEADER = 128  # bytes before the data of an .npy file of few axes


@dataclass(frozen=True)
class Case:
    """One preprocessed study: `meta`, and its arrays memory-mapped below `folder`."""

    meta: dict
    folder: Path | None = None
    organs: "Case | None" = None  # its organ map, where it is read and there (organs.py)

    name = property(lambda self: self.meta["name"])
    patient = property(lambda self: self.meta["patient"])
    has_lesion = property(lambda self: bool(self.meta["lesion_voxels"]))

    def load(self, array: str) -> np.ndarray:
        """One of the arrays of `preprocess`. Mapped anew each time, so that nothing is kept."""
        dtype, shape = self.meta["arrays"][array]
        with open(self.folder / f"{array}.npy", "rb") as file:  # five times as fast as np.load
            return np.memmap(file, dtype, "r", NPY_HEADER, tuple(shape))

    def native(self, array: str, values=1) -> np.ndarray:
        """A mask on the study's own grid, uint8, from flat indices: native_label or native_hot."""
        full = np.zeros(int(np.prod(self.meta["native_shape"])), np.uint8)
        full[self.load(array)] = values
        return full.reshape(self.meta["native_shape"], order="F")


def stamps(study: Study) -> dict[str, list]:
    """What a study is made of, which a later start compares instead of reading."""
    found = {"classes": [list(pair) for pair in study.classes]}
    for slot, source in study.sources.items():
        stat = source.path.stat()
        found[slot] = [source.path.name, source.channel, stat.st_size, stat.st_mtime_ns]
    return found


def cache_folder(cache: Path, root: Path, settings: Preprocessing) -> Path:
    """cache/<name>-<key>; the key holds the data folder and every setting of the preprocessing."""
    root = Path(root).resolve()
    key = json.dumps([str(root), asdict(settings)], sort_keys=True)
    return Path(cache) / f"{root.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def sealed(meta: dict) -> dict:
    """meta with a hash of all the rest, by which damage shows."""
    rest = {name: value for name, value in meta.items() if name != "seal"}
    return rest | {"seal": hash_of(json.dumps(rest, sort_keys=True).encode())}


def cached_case(folder: Path, study: Study, allow=()) -> Case | None:
    """The cached study if it is complete, was made from the files as they are now, and passed no
    check that `allow` does not name."""
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        passed = {*meta["facts"]["allowed"]} <= {*allow}
        if not passed or meta != sealed(meta) or meta["sources"] != stamps(study):
            return None
        types = {name: (np.dtype(t), math.prod(n)) for name, (t, n) in meta["arrays"].items()}
        sizes = {name: NPY_HEADER + t.itemsize * count for name, (t, count) in types.items()}
        found = {name: (folder / f"{name}.npy").stat().st_size for name in sizes}
        return Case(meta, folder) if found == sizes else None
    return None


def fill_cache(study: Study, make: Callable, folder: Path, allow=()) -> list[Finding]:
    """Write the arrays and meta that `make` finds, as preprocess does, into `folder`, which appears
    complete or not at all; the findings."""
    temporary = unfinished(folder)
    try:
        sources = stamps(study)
        arrays, meta = make()
        meta["arrays"] = {name: [array.dtype.str, [*array.shape]] for name, array in arrays.items()}
        temporary.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            with atomic(temporary / f"{name}.npy") as file:
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(file, header)
                file.write(array)  # np.save does not say that a disk is full
        write_json(temporary / "meta.json", sealed(meta | {"sources": sources}))
        if folder.exists():  # made from other versions of the files
            stale = unfinished(folder.with_name(f"{folder.name}.old"))
            os.replace(folder, stale)
            shutil.rmtree(stale, ignore_errors=True)
        with suppress(OSError):  # another process was faster: take its
            os.replace(temporary, folder)
        if cached_case(folder, study, allow):
            return []
        found, remedy = "changed while it was read", "Start again"
    except BadStudy as error:
        shutil.rmtree(folder, ignore_errors=True)  # a version that an earlier check passed
        return error.findings
    except Exception as error:  # the others shall still be checked
        if getattr(error, "errno", None) in FULL:  # but not be kept either
            error.filename = str(folder)
            raise
        found = f"cannot be preprocessed ({type(error).__name__}: {error})"
        remedy = "Check the space and permissions of --cache, and the memory (fewer --workers)"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [Finding(str(study.organs or study.pet.path), found, remedy)]


def most_bytes(study: Study, settings: Preprocessing) -> int:
    """Upper bound of a cached study from its header: as if the body filled the volume."""
    with suppress(Exception):  # unreadable: the check will say so
        header = nib.load(study.pet.path).header
        extent = np.array(header.get_data_shape()[:3]) * np.abs(header.get_zooms()[:3])
        return int(np.prod(np.ceil(extent / settings.spacing)) * 5)  # two float16 and a uint8
    return 0


def run_parallel(todo: list[Study], fill: Callable, workers: int) -> list[Finding]:
    """`fill` for all studies, `workers` at a time; all findings. In threads: unpacking, resampling
    and writing leave Python's lock to others, and nothing survives a killed process."""
    findings, pool = [], ThreadPoolExecutor(max(1, workers))
    try:
        jobs = [pool.submit(fill, study) for study in todo]
        for job in progress(as_completed(jobs), "preprocess", "study", len(jobs)):
            findings += job.result()
    finally:  # Ctrl-C: the studies in hand are finished, the others not begun
        pool.shutdown(cancel_futures=True)
    return findings


def same_images(cases: list[Case], studies: list[Study]) -> dict[str, Finding]:
    """A finding for each case, by name, whose image is that of another with an earlier name."""
    first, findings = {}, {}
    paths = {study.name: str(study.pet.path) for study in studies}
    for case in sorted(cases, key=lambda c: c.name):
        other = first.setdefault(case.meta["digests"]["pet"], case)
        if other is not case:
            found = f"duplicate case: the same image as {other.name}"
            findings[case.name] = Finding(paths[case.name], found, "Keep one of the two")
    return findings


def prepare(
    root, found: Found, settings, cache, workers=2, check=False, skip_bad=False, allow=(), say=print
) -> list[Case]:
    """Every study of `found` from the cache; what is not there (with `check` all of them) is read,
    checked and preprocessed. After all of them, raises UserError for bad ones, unless `skip_bad`.
    """
    base = cache_folder(cache, root, settings)
    folders = {study.name: base / study.name.replace("/", "__") for study in found.studies}

    def cached(study: Study) -> Case | None:
        return cached_case(folders[study.name], study, allow)

    def fill(study: Study) -> list[Finding]:
        make = partial(preprocess, study, settings, allow)
        return fill_cache(study, make, folders[study.name], allow)

    sweep(base)
    cases = {study.name: None if check else cached(study) for study in found.studies}
    todo = [study for study in found.studies if cases[study.name] is None]
    findings = list(found.findings)
    if todo:
        size = sum(most_bytes(study, settings) for study in todo)
        base.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(base).free
        room = f"at most {size / 1e9:.2f} GB ({free / 1e9:.0f} GB free)"
        say(f"cache      {base}: {len(todo)} of {len(cases)} studies to read, {room}")
        write_json(base / "settings.json", {"data": str(Path(root).resolve()), **asdict(settings)})
        findings += run_parallel(todo, fill, workers)
        cases |= {study.name: cached(study) for study in todo}
    read = [case for case in cases.values() if case]
    twice = same_images(read, found.studies)
    good = [case for case in read if case.name not in twice]
    findings += twice.values()
    if findings:
        problems = list_findings(findings)
        if not skip_bad:
            remedy = "Mend the others, or leave them out with --skip-bad"
            rest = f"{len(good)} studies are fine. {remedy}."
            raise UserError(f"the input check found {problems}\n{rest}")
        say(f"left out   {problems}")
    return good
