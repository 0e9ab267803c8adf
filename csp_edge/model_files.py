"""Which of the files beside each other are a model and its projector."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from csp_edge.errors import ModelError, ProjectorError
from csp_edge.gguf_check import check_pair
from csp_edge.gguf_file import part_path, read_architecture, read_header


class ModelFiles(NamedTuple):
    """A language model and its projector."""

    model: Path
    mmproj: Path | None


def find_model(path: str | os.PathLike[str]) -> ModelFiles:
    """The model at `path`, a .gguf file or a folder that holds one, and its projector.

    The projector is a GGUF of architecture "clip" beside the model whose embedding size fits.
    Of several the one with "mmproj" in its name, then the one whose name shares most with the
    model's, then the first by name. Of a split model (-00001-of-00003.gguf) the first part.

    Raises:
        ModelError: there is no such file, no model in the folder or more than one, or the file
            is a projector.
    """
    try:
        path = Path(path)
    except TypeError:
        raise ModelError(f"{path!r}: give a path, a str or PathLike[str]") from None
    try:
        if path.is_dir():
            return _in_folder(path)
        if not path.exists():
            raise ModelError(f"{path}: no such file or folder")
        model = part_path(path, 1)
        if read_architecture(model) == "clip":
            raise ModelError(f"{path}: a projector, give the model it belongs to")
        return ModelFiles(model, _fitting(model, _projectors(_gguf_files(path.parent))))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {getattr(error, 'strerror', error)}") from None


def _in_folder(folder: Path) -> ModelFiles:
    files = _gguf_files(folder)
    projectors = _projectors(files)
    models = [path for path in files if path not in projectors]
    if not models:
        raise ModelError(f"{folder}: holds no model (*.gguf)")
    if len(models) > 1:
        names = ", ".join(path.name for path in models[:3]) + (", ..." if len(models) > 3 else "")
        raise ModelError(f"{folder}: holds {len(models)} models ({names}), give one of them")
    return ModelFiles(models[0], _fitting(models[0], projectors))


def _gguf_files(folder: Path) -> list[Path]:
    """Of split models the first part alone."""
    files = (path for path in folder.iterdir() if path.suffix == ".gguf" and path.is_file())
    return sorted(path for path in files if path == part_path(path, 1))


def _projectors(files: list[Path]) -> list[Path]:
    found = []
    for path in files:
        try:
            if read_architecture(path) == "clip":
                found.append(path)
        except ModelError:
            continue  # a corrupt neighbour is no reason to refuse the model
    return found


def _fitting(model: Path, candidates: list[Path]) -> Path | None:
    if not candidates:
        return None
    header = read_header(model)
    fitting = []
    for path in candidates:
        try:
            check_pair(header, read_header(path))
        except (ModelError, ProjectorError):
            continue
        fitting.append(path)

    def likeness(path: Path) -> tuple[bool, int]:
        return "mmproj" in path.name.lower(), len(_words(model) & _words(path))

    return max(fitting, key=likeness, default=None)


def _words(path: Path) -> set[str]:
    return set(re.split(r"\W+|_", path.stem.lower()))
