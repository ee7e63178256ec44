"""Where the files of a data set are looked for, and what is said when one is missing or damaged."""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Source", "torchvision_datasets"]

FOLDER_VARIABLE = "GUT_FAST_DATA"
"""Names the folder of the user's data sets, unless one is given."""

SYSTEM_SHARES = ("/usr/local/share", "/usr/share")


def torchvision_datasets() -> Any:
    """`torchvision.datasets`, which is imported only where a set needs it. Raises ImportError if it cannot be."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, AttributeError) as error:  # one built for another torch raises any of these
        raise ImportError(
            f"this data set is read with torchvision, which cannot be imported ({error}); "
            'install the one for your torch: pip install "gut_fast[data]"'
        ) from error
    return datasets


@dataclass(frozen=True)
class Source:
    """The files of one data set.

    Args:
        name: of the data set.
        files: their names, those of folders too; a file may have been compressed to ``.gz``.
        subfolders: where they may lie in a folder of data sets; ``""`` is that folder itself.
        download: fetches them into a folder of data sets.
        package: the Debian package that has them in share/datasets.
    """

    name: str
    files: tuple[str, ...]
    subfolders: tuple[str, ...]
    download: Callable[[Path], object]
    package: str | None = None

    def find(self, folder: str | Path | None, download: bool) -> Path:
        """The first place that has all files; what is in them has not been looked at.

        Places are in `folder`; without it in the folder of GUT_FAST_DATA, then where the Debian package puts them. If
        none has all, and it is asked to, it downloads them.

        Raises:
            FileNotFoundError: files are missing; the message names the first and says how to get it.
            ValueError: a download without a folder to write to.
            OSError: the download failed.
        """
        chosen = os.environ.get(FOLDER_VARIABLE) if folder is None else folder
        root = Path(chosen).expanduser() if chosen else None
        places = [*self._places(root), *(self._package_places() if folder is None else [])]
        place = self._complete(places)
        if place is None and download:
            if root is None:
                raise ValueError(
                    f"{self.name}: a download needs a folder to write to; name one with folder= (--data-folder) "
                    f"or {FOLDER_VARIABLE}"
                )
            self._download(root)
            place = self._complete(self._places(root))
            if place is None:
                raise FileNotFoundError(
                    f"{self.name}: {self._what_is_missing(places)} even after the download, which leaves a folder "
                    "that is there already as it is; remove that folder and try again"
                )
        if place is None:
            raise FileNotFoundError(f"{self.name}: {self._what_is_missing(places)}; {self._advice}")
        return place

    def file(self, place: Path, name: str) -> Path:
        """The file of that name, or the compressed one."""
        path = place / name
        return path if path.exists() else place / f"{name}.gz"

    def damaged(self, path: Path, reason: str) -> RuntimeError:
        """The error for a file that is not what it should be."""
        return RuntimeError(f"{self.name}: {path} {reason}. Remove it, then {self._advice}")

    @property
    def _advice(self) -> str:
        """How to get the files."""
        package = "" if self.package is None else f"`apt-get install {self.package}`, or "
        return (
            f"get it by {package}download=True (--download); if it is somewhere already, name the folder with folder= "
            f"(--data-folder) or {FOLDER_VARIABLE}"
        )

    def _places(self, root: Path | None) -> list[Path]:
        if root is None:
            return []
        # The folder may be that of data sets or that of this set.
        return [*([root] if root.name in self.subfolders else []), *(root / sub for sub in self.subfolders)]

    def _package_places(self) -> list[Path]:
        if self.package is None:
            return []
        shares = [f"{sys.prefix}/share", *os.environ.get("XDG_DATA_DIRS", "").split(os.pathsep)]
        shares += SYSTEM_SHARES
        folder = self.package.removeprefix("dataset-")
        return [Path(share) / "datasets" / folder for share in dict.fromkeys(shares) if share]

    def _missing(self, place: Path) -> list[str]:
        return [name for name in self.files if not self.file(place, name).exists()]

    def _complete(self, places: Sequence[Path]) -> Path | None:
        return next((place for place in places if not self._missing(place)), None)

    def _what_is_missing(self, places: Sequence[Path]) -> str:
        for place in places:
            missing = self._missing(place)
            if len(missing) < len(self.files):
                return f"{place / missing[0]} is missing"
        looked_in = ", ".join(map(str, places)) or f"no folder: none is given and {FOLDER_VARIABLE} is not set"
        return f"{self.files[0]} is missing (looked in {looked_in})"

    def _download(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.download(root)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise OSError(
                f"{self.name}: the download into {root} failed ({error}); try again, or fetch the files elsewhere and "
                f"name their folder with folder= (--data-folder) or {FOLDER_VARIABLE}"
            ) from error
