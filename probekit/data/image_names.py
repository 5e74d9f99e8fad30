"""Which image of a dataset is meant by a name that a table gives it."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pandas as pd

from probekit.data.report import ReadingReport
from probekit.data.tables import IMAGE_SUFFIXES, image_name

Parts = tuple[str, ...]
# Folders whose images may have the same names as those of another such folder.
SPLIT_FOLDER = re.compile(r"train|val|test|dev", re.IGNORECASE)


def _normal_form(part: str) -> str:
    return unicodedata.normalize("NFC", part)


def _decoded(part: str) -> str:
    return _normal_form(unquote(part))


def _in_small_letters(part: str) -> str:
    return _normal_form(_decoded(part).casefold())


def _without_ending(part: str) -> str:
    stem, ending = posixpath.splitext(_in_small_letters(part))
    return stem if ending in IMAGE_SUFFIXES else stem + ending


def _coco_number(part: str) -> str:
    """Return the number in the file names that COCO gives its images, old and new; else ""."""
    match = re.fullmatch(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg", part)
    return match[1] if match else ""


# What may differ between a name and that of the image file ▶ what is compared. The first rule by
# which a name fits an image counts. Later rules are for images that no name fits better.
NAME_RULES: dict[str, Callable[[str], str]] = {
    "": str,
    "Unicode form": _normal_form,
    "percent signs": _decoded,
    "capitals": _in_small_letters,
    "ending": _without_ending,
}
# Then the folders are left out: of COCO's names, whose numbers are unique, and of others, unless
# they are folders of splits.
FOLDER_RULES: dict[str, Callable[[str], str]] = {"COCO release": _coco_number} | {
    f"folders, {rule}".removesuffix(", "): compared for rule, compared in NAME_RULES.items()
}


@dataclass
class NameMatches:
    """Names of a table, and the images that they mean.

    Attributes
    ----------
    image_of : dict
        Ids of images by name.
    differing : dict
        By what differs, a name and the file that it means for each name that is not as the file is
        called.
    unmatched : list of str
        The names that fit no image, or several.
    """

    image_of: dict[str, Hashable] = field(default_factory=dict)
    differing: dict[str, dict[str, str]] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)

    def note(self, report: ReadingReport, table: Path) -> None:
        """Add to a report how many names differ from those of the files, and in what."""
        for rule, files in self.differing.items():
            name, file = next(iter(files.items()))
            report.note(
                table,
                "names of images",
                outcome="corrected",
                count=len(files),
                reason=f"they differ from the files' in: {rule}",
                first=f"{name}, read as {file}",
            )


def match_names(
    names: Iterable[str], images: pd.DataFrame, *, folder: Path | None = None
) -> NameMatches:
    """Find the images that names mean: their file names, or the ends of their paths.

    Parameters
    ----------
    names : iterable of str
        The names, as a table has them.
    images : DataFrame
        Of a :class:`~probekit.data.dataset.Dataset`.
    folder : Path, optional
        The folder of a table that lies within the dataset. Names start there, and only images in it
        are meant, if it has any.

    Returns
    -------
    NameMatches

    Raises
    ------
    ValueError
        A name is exactly that of several images.
    """
    paths = {
        image_id: PurePosixPath(Path(file).as_posix()) for image_id, file in images.file.items()
    }
    matches = NameMatches()
    parts_of = {name: _name_parts(name) for name in dict.fromkeys(names)}
    open_names = [name for name, parts in parts_of.items() if parts]
    if folder is not None:
        start = PurePosixPath(Path(folder).as_posix())
        image_of_path = {str(path): image_id for image_id, path in paths.items()}
        for name in open_names:
            path = posixpath.normpath(start / _with_slashes(name))
            if path in image_of_path:
                matches.image_of[name] = image_of_path[path]
        inside = {one: path for one, path in paths.items() if start in path.parents}
        paths = inside or paths
    rules = [(rule, compared, True) for rule, compared in NAME_RULES.items()]
    rules += [(rule, compared, False) for rule, compared in FOLDER_RULES.items()]
    for rule, compared, with_folders in rules:
        open_names = [name for name in open_names if name not in matches.image_of]
        if not open_names:
            break
        candidates = _candidates(
            open_names, parts_of, paths, compared=compared, with_folders=with_folders
        )
        _accept(candidates, matches, rule=rule, paths=paths)
    matches.unmatched = [name for name in parts_of if name not in matches.image_of]
    return matches


def _with_slashes(name: str) -> str:
    return image_name(name).replace("\\", "/")


def _name_parts(name: str) -> Parts:
    """Return the folders and the file of a name, without ``..`` at its beginning."""
    if not name.strip():
        return ()
    parts = PurePosixPath(posixpath.normpath(_with_slashes(name))).parts
    while parts and parts[0] == "..":
        parts = parts[1:]
    return parts


def _candidates(
    names: Iterable[str],
    parts_of: dict[str, Parts],
    paths: dict[Hashable, PurePosixPath],
    *,
    compared: Callable[[str], str],
    with_folders: bool,
) -> dict[str, list[Hashable]]:
    """Return the images that each name fits by a rule."""
    wanted = {}
    for name in names:
        folders, file = parts_of[name][:-1], parts_of[name][-1]
        may_differ = compared is _coco_number or not any(map(SPLIT_FOLDER.search, folders))
        if with_folders:
            wanted[name] = tuple(map(compared, (*folders, file)))
        elif may_differ and compared(file):
            wanted[name] = (compared(file),)
    wanted_files = {parts[-1] for parts in wanted.values()}
    images_of_file: dict[str, list[tuple[Hashable, Parts]]] = defaultdict(list)
    for image_id, path in paths.items():
        file = compared(path.name)
        if file in wanted_files:
            folders = tuple(map(compared, path.parts[:-1])) if with_folders else ()
            images_of_file[file].append((image_id, (*folders, file)))
    return {
        name: [
            image_id
            for image_id, image_parts in images_of_file[parts[-1]]
            if image_parts[-len(parts) :] == parts
        ]
        for name, parts in wanted.items()
    }


def _accept(
    candidates: dict[str, list[Hashable]],
    matches: NameMatches,
    *,
    rule: str,
    paths: dict[Hashable, PurePosixPath],
) -> None:
    """Take the images that fit, if nothing else can be meant."""
    taken = set(matches.image_of.values())
    names_of: dict[Hashable, list[str]] = defaultdict(list)
    for name, image_ids in candidates.items():
        if len(image_ids) > 1 and not rule:
            raise ValueError(
                f"{name} is the name of {len(image_ids)} images: write the folders before it, too"
            )
        if len(image_ids) == 1:
            names_of[image_ids[0]].append(name)
    for image_id, names in names_of.items():
        is_certain = rule in ("", "COCO release") or (len(names) == 1 and image_id not in taken)
        if not is_certain:
            continue
        for name in names:
            matches.image_of[name] = image_id
            if rule:
                matches.differing.setdefault(rule, {})[name] = paths[image_id].name
