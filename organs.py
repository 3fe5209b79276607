"""Organ maps, which v5 learns: where they lie, how they are read, and what their values are called.

A map is a NIfTI file of any grid, of values 1, 2, ... It lies in the folder that --organs names, by
the name of its study as published for autoPET III. An organs.json beside it may name the values.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache import Case, read_cases, write_cases
from common import UserError, read_json
from grids import resample_to
from preprocess import CaseMeta, content_hash, flat_indices, labels_to_cached
from studies import (
    BadStudy,
    Finding,
    Study,
    list_findings,
    missing_or_ambiguous,
    nifti,
    read_nifti,
    stems,
)

MAX_ORGANS = 254  # in a batch 255 stands for unknown


def published_name(name: str) -> str:
    """A study's name without what differs between the places where AutoPET is published:
    PETCT_01/a  b and fdg_01_a b become the same."""
    without_tracer = re.sub("^(fdg|petct)_", "", name, flags=re.IGNORECASE)
    return re.sub("[ /_]+", "_", without_tracer)


def find_maps(studies: list[Study], directory: Path, required: bool = True) -> dict[str, Path]:
    """The map of each study that has one in `directory`, by the study's name.

    Raises UserError if there is no such folder, if two maps are of one study and, where they are
    required, if there is none.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder. Give --organs the one that holds the maps.")

    file_stems: dict[str, str] = {}
    for stem in stems(directory):
        other = file_stems.setdefault(published_name(stem), stem)
        if other != stem:
            raise UserError(f"{directory}: {stem} and {other} are of one study. Keep one.")

    maps = {}
    for study in studies:
        stem = file_stems.get(published_name(study.name))
        if stem:
            maps[study.name] = nifti(directory, stem)
    if required and not maps:
        raise UserError(
            f"{directory}: no organ map of a study such as {studies[0].name}. Name the maps as "
            "autoPET III names the studies."
        )
    return maps


# ------------------------------------------------------------------ the maps


def read_map(study: Study, case: Case) -> tuple[dict[str, np.ndarray], CaseMeta]:
    """The arrays of a study's map, and a CaseMeta for them: organs, uint8 on the cached grid, and,
    as of a mask, native_label and native_class. Each voxel has the organ of the nearest in the map.

    Raises BadStudy for a damaged map, impossible values, and a map that lies elsewhere.
    """

    def bad_map(problem: str, remedy: str) -> BadStudy:
        return BadStudy(Finding(str(study.organs), problem, remedy))

    findings = list(missing_or_ambiguous(study.organs, study.name))
    if findings:
        raise BadStudy(*findings)
    volume = read_nifti(study.organs)

    labels = volume.data.astype(np.uint8)
    if (labels != volume.data).any() or labels.max() > MAX_ORGANS:
        problem = f"values other than whole numbers from 0 to {MAX_ORGANS}"
        raise bad_map(problem, "Number the organs 1, 2, ...")
    if volume.sides_differ or (case.meta.facts["placed"] and not volume.placed):
        problem = "its header does not say where it lies, or says two different things"
        raise bad_map(problem, "Give it the sform of the study's images")

    # From its own grid to the native one of the study.
    labels = resample_to(labels, volume.affine, case.meta.native_grid, order=0, outside=0)
    if volume.data.any() and not labels.any():
        raise bad_map("lies beside the study", "Give the map of this study")

    indices = flat_indices(labels)
    organs = labels.ravel(order="F")[indices]
    arrays = {
        "organs": labels_to_cached(case.meta, labels),
        "native_label": indices,
        "native_class": organs,
    }
    digests = {"organs": content_hash(np.concatenate([indices, organs]))}
    facts = {"highest": int(labels.max())}
    return arrays, replace(case.meta, facts=facts, digests=digests, arrays={})


def attach_organs(
    cases: list[Case],
    studies: list[Study],
    maps: dict[str, Path],
    config,
    say,
) -> list[Case]:
    """The cases with their organ maps, as find_maps has them, from the cache.

    What is not in the cache, with --check every map, is read. Raises UserError for bad maps, unless
    --skip-bad leaves these out.
    """
    by_name = {case.name: case for case in cases}
    with_map = []
    folders = {}
    for study in studies:
        if study.name in maps and study.name in by_name:
            with_map.append(replace(study, organs=maps[study.name]))
            # Beside the study's own folder lies one for each file that was ever its map.
            folder = by_name[study.name].folder
            key = content_hash(str(maps[study.name].resolve()).encode())[:8]
            folders[study.name] = folder.with_name(f"{folder.name}.organs-{key}")

    def make(study: Study) -> tuple[dict[str, np.ndarray], CaseMeta]:
        return read_map(study, by_name[study.name])

    organs = {} if config.check else read_cases(with_map, folders)
    missing = [study for study in with_map if study.name not in organs]
    findings = write_cases(missing, make, folders, config.workers)
    organs |= read_cases(missing, folders)
    if findings:
        problems = f"the organ maps have {list_findings(findings)}"
        if not config.skip_bad:
            raise UserError(f"{problems}\nFix them, or go on without them: --skip-bad.")
        say(f"left out   {problems}")

    for name, organ_map in organs.items():
        case = by_name[name]
        meta = replace(case.meta, digests=case.meta.digests | organ_map.meta.digests)
        by_name[name] = replace(case, meta=meta, organs=organ_map)
    return list(by_name.values())


# ------------------------------------------------------------------ their names


def organ_names_for(
    cases: list[Case],
    directory: Path | None,
    known: tuple[str, ...],
    say,
) -> tuple[str, ...]:
    """The names of organs 1, 2, ... in the maps: those that a run already knows, else those in the
    directory's organs.json, else organ 1, organ 2, ... Raises UserError for empty maps, and for
    organs that do not fit the names."""
    with_map = [case for case in cases if case.organs]
    count = max((case.organs.meta.facts["highest"] for case in with_map), default=0)
    if not (count or known):
        raise UserError(f"{directory}: its organ maps are empty, or none is left. Fix them.")

    saved = read_organ_names(directory) if directory else ()
    names = known or saved
    if not names:
        names = tuple(f"organ {number}" for number in range(1, count + 1))
    if count > len(names) or (saved and saved != names):
        raise UserError(
            f"{directory}: maps of values up to {count}, named {', '.join(saved) or 'nowhere'}; "
            f"expected {', '.join(names)}. Use other maps."
        )

    say(f"organs     {len(with_map)} of {len(cases)} studies have a map of {', '.join(names)}")
    if with_map and known and not saved:
        say("           no organs.json: their values are taken for the organs that the run learnt")
    return names


def read_organ_names(directory: Path) -> tuple[str, ...]:
    """The names of organs 1, 2, ... in organs.json, () without one: an object of numbers and names,
    in either direction. Raises UserError."""

    def parse(content: dict) -> tuple[str, ...]:
        by_number = {}
        for key, value in content.items():
            number, name = (key, value) if str(key).isdecimal() else (value, key)
            by_number[int(number)] = f"{name:s}"
        by_number.pop(0, None)  # background

        names = tuple(by_number[number] for number in range(1, len(by_number) + 1))
        if not 0 < len(set(names)) == len(names) <= MAX_ORGANS or not all(names):
            raise ValueError("no names, or one twice")
        return names

    path = directory / "organs.json"
    if not path.exists():
        return ()
    return read_json(path, parse, 'Expected {"1": "spleen", "2": ...}, no number left out')
