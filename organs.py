"""Organ maps beside the studies, which v5 learns: where they lie, and what their values are called.

A map is a NIfTI file of any grid, of values 1, 2, ... It lies in the folder that --organs names, by
the study's name; without, as ORGANS.nii.gz in the study's folder or in organsTr beside labelsTr. An
organs.json beside them may name the values.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from cache import Case, cached_case, fill_cache, run_parallel
from files import UserError, read_json
from preprocess import hash_of, to_cached
from studies import BadStudy, Finding, Study, list_findings, misplaced, nifti, read_nifti, stems

MOST = 254  # organs; in a batch 255 stands for what is not known


def plain_name(name: str) -> str:
    """A study's name as those who publish maps may have it: PETCT_01/a  b and fdg_01_a b alike."""
    return re.sub("[ /_]+", "_", re.sub("(?i)^(fdg|petct)_", "", name))


def find_maps(studies: list[Study], root: Path, config) -> dict[str, Path]:
    """The map of each study that has one, by the study's name. Raises UserError if --organs is no
    folder or holds two of one study, and if no study has one, unless it is a run that knows."""
    given = config.organs and Path(config.organs)
    if given and not given.is_dir():
        raise UserError(f"--organs {given}: no such folder. Give the one that holds the maps.")
    maps: dict[str, str] = {}
    for stem in stems(given) if given else ():
        if (other := maps.setdefault(plain_name(stem), stem)) != stem:
            raise UserError(f"--organs {given}: {stem} and {other} are of one study. Keep one.")
    found = {}
    for study in studies:
        folder = study.pet.path.parent
        places = [(folder, "ORGANS"), (folder.parent / "organsTr", study.name)]
        places = [(given, maps.get(plain_name(study.name), ""))] if given else places
        if paths := [path for path in (nifti(*place) for place in places) if path.exists()]:
            found[study.name] = paths[0]
    if not found and not config.organ_names:
        raise UserError(
            f"{given or root}: no organ map for a study of {root}. Give the folder of the maps "
            "with --organs, or put ORGANS.nii.gz into the studies' folders (an older simulated "
            "cohort: remove it, it is written again with maps)."
        )
    return found


def read_map(study: Study, case: Case) -> tuple[dict, dict]:
    """The map of a study, each voxel of its files and of its cache that of the nearest in the map:
    arrays and meta as preprocess has them; native_organ as its native_class.

    Raises BadStudy for a damaged map, other values than whole numbers up to MOST, another place.
    """
    path, meta = study.organs, case.meta
    if wrong := list(misplaced(path, study.name)):
        raise BadStudy(*wrong)
    volume = read_nifti(path)
    labels = volume.data.astype(np.uint8)
    if (labels != volume.data).any() or labels.max() > MOST:
        found = f"values other than whole numbers from 0 to {MOST}"
        raise BadStudy(Finding(str(path), found, "Number the organs 1, 2, ..."))
    if volume.sides_differ or (meta["facts"]["placed"] and not volume.placed):
        found = "its header does not say where it lies, or says two different things"
        raise BadStudy(Finding(str(path), found, "Give it the sform of the study's images"))
    shape = meta["native_shape"]
    to_map = np.linalg.inv(volume.affine) @ meta["native_affine"]  # from voxels to voxels
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    places = to_map[:3, :3] @ corners + to_map[:3, 3:]
    if (places.max(1) < 0).any() or (places.min(1) > np.array(labels.shape) - 1).any():
        raise BadStudy(Finding(str(path), "lies beside the study", "Give the map of this study"))
    if labels.shape != tuple(shape) or not np.allclose(to_map, np.eye(4), atol=1e-3):
        grid = to_map[:3, :3], to_map[:3, 3], tuple(shape)
        labels = ndimage.affine_transform(labels, *grid, order=0, mode="grid-constant")
    plain = labels.ravel(order="F")
    flat = np.flatnonzero(plain).astype(np.uint32)
    arrays = {"organs": to_cached(meta, labels), "native_organs": flat, "native_organ": plain[flat]}
    found = {"native_shape": shape, "highest": int(labels.max()), "facts": {"allowed": []}}
    return arrays, found | {"digests": {"organs": hash_of(np.concatenate([flat, plain[flat]]))}}


def read_maps(cases: list[Case], studies: list[Study], config, say) -> list[Case]:
    """The cases, with the organs of `studies`, which have a map, from the cache; what is not there
    (with --check all of them) is read. Raises UserError for bad maps, unless --skip-bad."""
    by_name = {case.name: case for case in cases}

    def folder(study: Study) -> Path:  # of its own for each place of a map
        own, place = by_name[study.name].folder, str(study.organs.resolve()).encode()
        return own.with_name(f"{own.name}.organs-{hash_of(place)[:8]}")

    def fill(study: Study) -> list[Finding]:
        return fill_cache(study, partial(read_map, study, by_name[study.name]), folder(study))

    todo = [study for study in studies if config.check or not cached_case(folder(study), study)]
    if findings := run_parallel(todo, fill, config.workers):
        problems = f"the organ maps have {list_findings(findings)}"
        if not config.skip_bad:
            raise UserError(f"{problems}\nMend them, or go on without them: --skip-bad.")
        say(f"left out   {problems}")
    for study in studies:
        if organs := cached_case(folder(study), study):
            case = by_name[study.name]
            digests = case.meta["digests"] | organs.meta["digests"]
            meta = case.meta | {"digests": digests}
            by_name[study.name] = replace(case, meta=meta, organs=organs)
    return [by_name[case.name] for case in cases]


def add_organs(cases: list[Case], studies: list[Study], maps, root: Path, config, say) -> tuple:
    """The cases, with their organs as find_maps has the `maps`, and the names of the organs; a run
    keeps its own. Raises UserError for bad or empty maps, and organs that do not fit."""
    given, known = config.organs and Path(config.organs), config.organ_names
    place, mapped = given or root, {case.name for case in cases} & {*maps}
    with_map = [replace(s, organs=maps[s.name]) for s in studies if s.name in mapped]
    cases = read_maps(cases, with_map, config, say)
    highest = [case.organs.meta["highest"] for case in cases if case.organs]
    most, named = max(highest, default=0), names_of([given] if given else [root, root / "organsTr"])
    if not (most or known):
        raise UserError(f"{place}: its organ maps are empty, or none is left. Mend them.")
    names = known or named or tuple(f"organ {i}" for i in range(1, most + 1))
    if most > len(names) or (named or names) != names:
        what = f"maps of values up to {most}, named {', '.join(named) or 'nowhere'}"
        raise UserError(f"{place}: {what}; expected {', '.join(names)}. Use other maps.")
    say(f"organs     {len(highest)} of {len(cases)} studies have a map of {', '.join(names)}")
    if highest and known and not named:
        say("           no organs.json: their values are taken for the organs that the run learnt")
    return cases, names


def names_of(folders: list[Path]) -> tuple[str, ...]:
    """The names of organs 1, 2, ... by the first organs.json in the folders, () without one: an
    object of numbers and names, in either direction. Raises UserError."""

    def take(content: dict) -> tuple[str, ...]:
        pairs = [(k, v) if str(k).isdecimal() else (v, k) for k, v in content.items()]
        named = {int(number): f"{name:s}" for number, name in pairs if int(number)}
        names = tuple(named[number] for number in range(1, len(named) + 1))
        if not 0 < len({*names}) == len(names) <= MOST or not all(names):
            raise ValueError("no names, or one twice")
        return names

    for path in (folder / "organs.json" for folder in folders):
        if path.exists():
            return read_json(path, take, 'Expected {"1": "spleen", "2": ...}, no number left out')
    return ()
