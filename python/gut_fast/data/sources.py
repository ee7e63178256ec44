"""The files of a data set: where they are looked for, how they are fetched, and what is said when one is wrong."""

from __future__ import annotations

import importlib.util
import os
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gut_fast.files import FileError
from gut_fast.requirements import pip_install

__all__ = ["Download", "Source"]

FOLDER_VARIABLE = "GUT_FAST_DATA"
"""The environment variable with the folder of the user's data sets, which is used unless a folder is given."""

SYSTEM_SHARES = ("/usr/local/share", "/usr/share")


@dataclass(frozen=True)
class Download:
    """A file or an archive on the web.

    Args:
        url: its address; a name that ends in ``.tgz`` or ``.tar.gz`` is that of an archive, which is unpacked.
        md5: its check sum.
        subfolder: where it goes in a folder of data sets.
    """

    url: str
    md5: str
    subfolder: str = ""

    def fetch(self, root: Path) -> None:
        """Downloads the file into a folder of data sets, unless it is there; pooch checks and unpacks it.

        Raises:
            ImportError: pooch is not installed.
            OSError, ValueError, tarfile.TarError: the download failed, has a wrong check sum, or cannot be unpacked.
        """
        try:
            import pooch
        except ImportError as error:
            raise ImportError(f"downloads need pooch; install it with: {pip_install('pooch')}") from error
        is_archive = self.url.endswith((".tgz", ".tar.gz"))
        pooch.retrieve(
            self.url,
            known_hash=f"md5:{self.md5}",
            fname=self.url.rpartition("/")[2],
            path=root / self.subfolder,
            processor=pooch.Untar(extract_dir=".") if is_archive else None,
            progressbar=importlib.util.find_spec("tqdm") is not None,
        )


@dataclass(frozen=True)
class Source:
    """The files of one data set.

    Args:
        name: name of the data set.
        files: names of its files and folders; a file may have been compressed to ``.gz``.
        subfolders: where the files may lie in a folder of data sets; ``""`` is that folder itself.
        downloads: where the files come from.
        package: the Debian package that has them in share/datasets.
    """

    name: str
    files: tuple[str, ...]
    subfolders: tuple[str, ...]
    downloads: tuple[Download, ...]
    package: str | None = None

    def find(self, folder: str | Path | None, download: bool) -> Path:
        """The first place that has all files, whose content is not checked yet.

        Places are in `folder`; without it in the folder of GUT_FAST_DATA, then where the Debian package puts the files.
        If no place has all files and `download` is set, they are downloaded.

        Raises:
            FileNotFoundError: files are missing; the message names the first and says how to get it.
            ValueError: there is no folder to download to.
            ImportError: pooch, which downloads, is not installed.
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
            raise FileNotFoundError(f"{self.name}: {self._what_is_missing(places)}; {self._advice}")
        return place

    def file(self, place: Path, name: str) -> Path:
        """The path of the file called `name`, or of the compressed file if there is no other."""
        path = place / name
        return path if path.exists() else place / f"{name}.gz"

    def damaged(self, path: Path, reason: str) -> FileError:
        """The error for a file that is damaged or another one, with what to do."""
        return FileError(f"{self.name}: {path} {reason}. Remove it, then {self._advice}")

    @property
    def _advice(self) -> str:
        """A clause that says how to get the files."""
        package = "" if self.package is None else f"`apt-get install {self.package}`, or "
        return (
            f"get it by {package}download=True (--download); if it is somewhere already, name the folder with folder= "
            f"(--data-folder) or {FOLDER_VARIABLE}"
        )

    def _places(self, root: Path | None) -> list[Path]:
        if root is None:
            return []
        # The folder may be one of several data sets, or that of this set alone.
        return [*([root] if root.name in self.subfolders else []), *(root / sub for sub in self.subfolders)]

    def _package_places(self) -> list[Path]:
        if self.package is None:
            return []
        shares = [f"{sys.prefix}/share", *os.environ.get("XDG_DATA_DIRS", "").split(os.pathsep), *SYSTEM_SHARES]
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
            for download in self.downloads:
                download.fetch(root)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise OSError(
                f"{self.name}: the download into {root} failed ({error}); try again, or fetch the files elsewhere and "
                f"name their folder with folder= (--data-folder) or {FOLDER_VARIABLE}"
            ) from error
