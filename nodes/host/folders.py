"""Folders of EasyRef's files: checkpoints in models/easyref, MLLM folders there, in text_encoders and in LLM.

Reference tokens are saved in output/easyref, and searched there and in input/easyref. The tiny models shipped
with the pack are in folders of the pack, which are searched last.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import folder_paths

from ...easyref_core.checkpoint.formats import BASE_MLLM, RELEASE
from ...easyref_core.tiny.worlds import BASE, WORLDS
from ...easyref_core.utils.errors import shorten

log = logging.getLogger(__name__)

FOLDER = "easyref"
MLLM_KINDS = (FOLDER, "text_encoders", "LLM")
FROM_CHECKPOINT = "from the checkpoint"
# after the name of a repository; the revision is not in the name, because it changes
CACHE_SUFFIX = "(Hugging Face cache)"
NO_CHECKPOINT = "no file in models/easyref"
TOKENS = "easyref_tokens"  # the host's name of the folders with reference tokens
TOKENS_FOLDER = "easyref"  # in the host's output and input folders
NO_TOKENS = "no file in output/easyref"
# reserved by Windows
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|clock\$|com[\d¹²³]|lpt[\d¹²³])(\..*)?", re.I)
MAX_PREFIX_LENGTH = 1000  # characters
MAX_NAME_BYTES = 255 - len("_00001_.safetensors")
SHIPPED = {name: world.weights for name, world in WORLDS.items()}  # folders of the tiny models
# the checkpoints there; the other files belong to the demo's SDXL
SHIPPED_CHECKPOINTS = tuple(world.easyref for world in WORLDS.values())


def register_folders() -> None:
    """Register models/easyref, models/LLM (as other packs do) and the folders of tokens with the host.

    Folders of extra_model_paths.yaml are kept. The shipped folders come last, so that a user's file of the
    same name takes precedence.
    """
    models = Path(folder_paths.models_dir)
    kinds = {
        FOLDER: (folder_paths.supported_pt_extensions, [models / FOLDER, *SHIPPED.values()]),
        "LLM": (set(), [models / "LLM"]),
        TOKENS: (
            {".safetensors"},
            [saved_tokens(), Path(folder_paths.get_input_directory()) / TOKENS_FOLDER],
        ),
    }
    for kind, (extensions, folders) in kinds.items():
        paths, known = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        added = [str(path) for path in folders]
        paths = [*paths, *(path for path in added if path not in paths)]
        folder_paths.folder_names_and_paths[kind] = (paths, known or extensions)


def make_checkpoint_folder() -> None:
    """Create models/easyref, so that users see where checkpoints belong. Logs a warning if that fails."""
    folder = Path(folder_paths.models_dir) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # read-only, or a file of that name; the nodes work with other folders
        log.warning(
            "EasyRef: the folder %s could not be created (%s). Create it, or name another folder as easyref "
            "in "
            "extra_model_paths.yaml.",
            folder,
            error,
        )


def checkpoints() -> list[str]:
    """Names of the weight files in the EasyRef folders, without those inside MLLM folders.

    The shipped ones come last, and never first, because the first is the default.
    """
    names = [name for name in folder_paths.get_filename_list(FOLDER) if not _inside_mllm(name)]
    of_user = [name for name in names if not _is_shipped(name)]
    shipped = [name for name in SHIPPED_CHECKPOINTS if name in names and name not in of_user]
    return [*(of_user or [NO_CHECKPOINT]), *shipped]


def find_checkpoint(name: str) -> Path:
    """Full path of a listed checkpoint.

    Raises FileNotFoundError that names the searched folders and their files.
    """
    path = None if name == NO_CHECKPOINT else folder_paths.get_full_path(FOLDER, name)
    if path is not None and is_inside(Path(path), folder_paths.get_folder_paths(FOLDER)):
        return Path(path)
    present = [file for file in checkpoints() if file != NO_CHECKPOINT]
    missing = "No EasyRef checkpoint was found."
    if name != NO_CHECKPOINT:
        missing = f"EasyRef checkpoint {shorten(repr(name))} was not found."
    raise FileNotFoundError(
        f"{missing} Download the checkpoint (.safetensors) from {RELEASE} into models/easyref. Searched: "
        f"{', '.join(folder_paths.get_folder_paths(FOLDER))}; there: "
        f"{', '.join(present) or 'no weight files'}."
    )


def mllm_folders() -> dict[str, Path]:
    """{listed name: folder} of every folder with a config.json of Qwen2-VL, in Hugging Face caches too."""
    folders: dict[str, Path] = {}
    for kind in MLLM_KINDS:
        for base in map(Path, folder_paths.get_folder_paths(kind)):
            for config in sorted((*base.glob("*/config.json"), *base.glob("*/*/config.json"))):
                if _is_qwen2_vl(config):
                    folders.setdefault(f"{kind}/{config.parent.relative_to(base).as_posix()}", config.parent)
            for repository, folder in _cached_mllms(base):
                folders.setdefault(f"{kind}/{repository} {CACHE_SUFFIX}", folder)
    return folders


def find_mllm(name: str) -> Path | None:
    """Folder of a listed MLLM; None for FROM_CHECKPOINT. Raises FileNotFoundError like find_checkpoint."""
    if name == FROM_CHECKPOINT:
        return None
    folders = mllm_folders()
    if name in folders:
        return folders[name]
    searched = [base for kind in MLLM_KINDS for base in folder_paths.get_folder_paths(kind)]
    raise FileNotFoundError(
        f"MLLM folder {shorten(repr(name))} was not found. Put all files of {BASE_MLLM} into a separate "
        f"folder in models/easyref, models/text_encoders or models/LLM. Searched: {', '.join(searched)}; "
        f"Qwen2-VL folders there: {', '.join(folders) or 'none'}."
    )


def saved_tokens() -> Path:
    """Folder in which reference tokens are saved."""
    return Path(folder_paths.get_output_directory()) / TOKENS_FOLDER


def new_tokens_file(prefix: str) -> Path:
    """An unused path in output/easyref, <prefix>_00001_.safetensors, whose folder is created.

    Raises ValueError for a prefix that is empty, leads out of the folder, or is not a valid name on one of
    the systems that ComfyUI runs on.
    """
    parts = re.split(r"[/\\]", prefix)
    allowed = len(prefix) <= MAX_PREFIX_LENGTH and all(map(_is_valid_name, parts))
    if not allowed or not _stays_inside(saved_tokens().joinpath(*parts[:-1]), saved_tokens()):
        raise ValueError(
            f"filename_prefix is {shorten(repr(prefix))}; wanted the start of a file's name in "
            f"{saved_tokens()}, such as tokens or faces/anna."
        )
    folder, name, number, _, _ = folder_paths.get_save_image_path(prefix, str(saved_tokens()))
    return Path(folder) / f"{name}_{number:05}_.safetensors"


def subfolder(path: Path) -> str:
    """Folder of a file, relative to the output folder, as the host's UI needs it."""
    return path.parent.relative_to(folder_paths.get_output_directory()).as_posix()


def token_files() -> list[str]:
    """Names of the files that may contain reference tokens, or NO_TOKENS."""
    names = folder_paths.get_filename_list(TOKENS)
    return [name for name in names if tokens_path(name)] or [NO_TOKENS]


def find_tokens(name: str) -> Path:
    """Full path of a listed file of reference tokens. Raises FileNotFoundError like find_checkpoint."""
    path = None if name == NO_TOKENS else tokens_path(name)
    if path is not None:
        return path
    present = [file for file in token_files() if file != NO_TOKENS]
    raise FileNotFoundError(
        f"The file of reference tokens {shorten(repr(name))} was not found. Searched: "
        f"{', '.join(folder_paths.get_folder_paths(TOKENS))}; there: "
        f"{', '.join(present) or 'no .safetensors files'}. Save tokens with Save Reference Tokens, or put a "
        "saved file into input/easyref."
    )


def state_of(files: Iterable[Path]) -> str:
    """Fingerprint that changes when one of the files is replaced or written to, even at the same size."""
    stats = (file.stat() for file in files)
    return " ".join(f"{s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for s in stats)


def tiny_base(world: str) -> Path:
    """Folder of a shipped tiny SDXL. Raises FileNotFoundError if the pack was installed without it."""
    base = SHIPPED[world] / BASE
    if not (base / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The tiny model of the demo is not in {base}. Install the complete pack again."
        )
    return base


def _is_valid_name(name: str) -> bool:
    """True if a file or folder can have this name on every system.

    Windows reserves names of devices, and uses : for alternate streams.
    """
    forbidden = any(character in '<>:"|?*' or not character.isprintable() for character in name)
    short = len(name.encode(errors="replace")) <= MAX_NAME_BYTES
    return short and bool(name) and name == name.rstrip(". ") and not forbidden and not DEVICE.fullmatch(name)


def _stays_inside(path: Path, folder: Path) -> bool:
    """True if a path, which may not exist yet, is in a folder after links are resolved."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _inside_mllm(name: str) -> bool:
    folder = Path(name).parent
    return folder != Path(".") and any(
        _is_qwen2_vl(Path(base) / folder / "config.json") for base in folder_paths.get_folder_paths(FOLDER)
    )


def _is_shipped(name: str) -> bool:
    path = Path(folder_paths.get_full_path(FOLDER, name) or "")
    return any(path.is_relative_to(folder) for folder in SHIPPED.values())


def tokens_path(name: str) -> Path | None:
    """Path of a file of tokens; None if it is elsewhere after links are resolved.

    Unlike checkpoints, which users link on purpose, files in these folders may come from other people.
    """
    folders = folder_paths.get_folder_paths(TOKENS)
    path = folder_paths.get_full_path(TOKENS, name)
    if path is None or not is_inside(Path(path), folders) or Path(name).anchor or ".." in Path(name).parts:
        return None
    return Path(path) if any(_stays_inside(Path(path), Path(folder)) for folder in folders) else None


def is_inside(path: Path, folders: list[str]) -> bool:
    """True if a path is in one of the folders. A link may point elsewhere on purpose; `..` may not."""
    absolute = Path(path).absolute()
    return ".." not in absolute.parts and any(
        absolute.is_relative_to(Path(base).absolute()) for base in folders
    )


def _cached_mllms(base: Path) -> Iterator[tuple[str, Path]]:
    """(repository, folder) of every Qwen2-VL in a Hugging Face cache:
    models--<owner>--<name>/snapshots/<revision>.
    """
    for cache in sorted((*base.glob("models--*"), *base.glob("*/models--*"))):
        if folder := _snapshot(cache):
            yield cache.name.removeprefix("models--").replace("--", "/"), folder


def _snapshot(cache: Path) -> Path | None:
    """The revision in refs/main, else the newest one; None if no revision is a Qwen2-VL."""
    try:
        main = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    # main is only compared with the present folders, because a path made of it could lead anywhere
    folders = [config.parent for config in cache.glob("snapshots/*/config.json") if _is_qwen2_vl(config)]
    return max(folders, key=lambda folder: (folder.name == main, folder.stat().st_mtime_ns), default=None)


def _is_qwen2_vl(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "qwen2_vl"
    except (OSError, ValueError, AttributeError):
        return False
