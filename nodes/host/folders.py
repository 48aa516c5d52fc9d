"""Where EasyRef's files are: checkpoints in models/easyref, MLLM folders there, in text_encoders and in LLM.

Reference tokens are saved in output/easyref, and found there and in input/easyref. The tiny model that comes with the
pack lies in a folder of the pack, which is searched last.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import comfy.text_encoders
import folder_paths

from ...easyref_core.checkpoint.formats import BASE_MLLM, RELEASE
from ...easyref_core.utils.errors import shorten

log = logging.getLogger(__name__)

FOLDER = "easyref"
MLLM_KINDS = (FOLDER, "text_encoders", "LLM")
FROM_CHECKPOINT = "from the checkpoint"
IN_CACHE = (
    "(Hugging Face cache)"  # after the name of a repository; the revision is not in the name, as it changes
)
NOTHING_FOUND = "no file in models/easyref"
TOKENS = "easyref_tokens"  # the host's name of the folders that hold reference tokens
TOKENS_FOLDER = "easyref"  # in the host's output and input folders
NO_TOKENS = "no file in output/easyref"
# of Windows
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|clock\$|com[\d¹²³]|lpt[\d¹²³])(\..*)?", re.I)
LONGEST_PREFIX = 1000  # characters
LONGEST_NAME = 255 - len("_00001_.safetensors")  # bytes
SHIPPED = Path(__file__).absolute().parents[2] / "easyref_core" / "tiny" / "weights"
TINY = "tiny_easyref.safetensors"  # the checkpoint there; the rest are parts of the demo's other models


def register_folders() -> None:
    """Add models/easyref, and models/LLM as other packs know it, beside what extra_model_paths.yaml already named.

    The shipped folder is the last of models/easyref, where a file of the user's with the same name comes first.
    """
    models = Path(folder_paths.models_dir)
    own = {
        FOLDER: (folder_paths.supported_pt_extensions, [models / FOLDER, SHIPPED]),
        "LLM": (set(), [models / "LLM"]),
        TOKENS: (
            {".safetensors"},
            [saved_tokens(), Path(folder_paths.get_input_directory()) / TOKENS_FOLDER],
        ),
    }
    for kind, (extensions, folders) in own.items():
        paths, known = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        added = [str(path) for path in folders]
        paths = [*paths, *(path for path in added if path not in paths)]
        folder_paths.folder_names_and_paths[kind] = (paths, known or extensions)


def make_checkpoint_folder() -> None:
    """Create models/easyref, so that people see where checkpoints belong. Logs a warning if it cannot be created."""
    folder = Path(folder_paths.models_dir) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # read-only, or a file of that name: the nodes work with other folders
        log.warning(
            "EasyRef: the folder %s could not be created (%s). Create it, or name another folder as easyref in "
            "extra_model_paths.yaml.",
            folder,
            error,
        )


def checkpoints() -> list[str]:
    """Names of the weight files in the EasyRef folders, those inside MLLM folders left out.

    The demo's comes last, behind a word that there is no other: nobody shall take it for a default.
    """
    names = [name for name in folder_paths.get_filename_list(FOLDER) if not _inside_mllm(name)]
    own = [name for name in names if not _is_shipped(name)]
    return [*(own or [NOTHING_FOUND]), *(name for name in names if name == TINY and name not in own)]


def find_checkpoint(name: str) -> Path:
    """Full path of a listed checkpoint. Raises FileNotFoundError saying where it was looked for and what is there."""
    path = None if name == NOTHING_FOUND else folder_paths.get_full_path(FOLDER, name)
    if path is not None and _is_inside(Path(path), folder_paths.get_folder_paths(FOLDER)):
        return Path(path)
    present = [file for file in checkpoints() if file != NOTHING_FOUND]
    missing = "No EasyRef checkpoint was found."
    if name != NOTHING_FOUND:
        missing = f"EasyRef checkpoint {shorten(repr(name))} was not found."
    raise FileNotFoundError(
        f"{missing} Download the checkpoint (.safetensors) from {RELEASE} into models/easyref. "
        f"Searched: {', '.join(folder_paths.get_folder_paths(FOLDER))}; there: {', '.join(present) or 'no weight files'}."
    )


def mllm_folders() -> dict[str, Path]:
    """{shown name: folder} of every Qwen2-VL folder, told by the config.json in it, and of those in Hugging Face caches."""
    found: dict[str, Path] = {}
    for kind in MLLM_KINDS:
        for base in map(Path, folder_paths.get_folder_paths(kind)):
            for config in sorted((*base.glob("*/config.json"), *base.glob("*/*/config.json"))):
                if _is_qwen2_vl(config):
                    found.setdefault(f"{kind}/{config.parent.relative_to(base).as_posix()}", config.parent)
            for repository, folder in _cached_mllms(base):
                found.setdefault(f"{kind}/{repository} {IN_CACHE}", folder)
    return found


def find_mllm(name: str) -> Path | None:
    """Folder of a listed MLLM; None for FROM_CHECKPOINT. Raises FileNotFoundError like find_checkpoint."""
    if name == FROM_CHECKPOINT:
        return None
    folders = mllm_folders()
    if name in folders:
        return folders[name]
    searched = [base for kind in MLLM_KINDS for base in folder_paths.get_folder_paths(kind)]
    raise FileNotFoundError(
        f"MLLM folder {shorten(repr(name))} was not found. Put all files of {BASE_MLLM} into a folder of their own in "
        "models/easyref, models/text_encoders or models/LLM. "
        f"Searched: {', '.join(searched)}; Qwen2-VL folders there: {', '.join(folders) or 'none'}."
    )


def saved_tokens() -> Path:
    """The folder that reference tokens are saved in."""
    return Path(folder_paths.get_output_directory()) / TOKENS_FOLDER


def new_tokens_file(prefix: str) -> Path:
    """A path in output/easyref that is not taken: <prefix>_00001_.safetensors. Its folder is made.

    Raises ValueError for a prefix that is empty, leads out of the folder, or is no name on one of the systems that
    ComfyUI runs on.
    """
    parts = re.split(r"[/\\]", prefix)
    allowed = len(prefix) <= LONGEST_PREFIX and all(map(_is_name, parts))
    if not allowed or not _stays_inside(saved_tokens().joinpath(*parts[:-1]), saved_tokens()):
        raise ValueError(
            f"filename_prefix is {shorten(repr(prefix))}; wanted the start of a file's name in {saved_tokens()}, such as tokens or "
            "faces/anna."
        )
    folder, name, number, _, _ = folder_paths.get_save_image_path(prefix, str(saved_tokens()))
    return Path(folder) / f"{name}_{number:05}_.safetensors"


def subfolder(path: Path) -> str:
    """Where in the output folder a file lies, as the host names it."""
    return path.parent.relative_to(folder_paths.get_output_directory()).as_posix()


def token_files() -> list[str]:
    """Names of the files that may hold reference tokens, or a word that there is none."""
    names = folder_paths.get_filename_list(TOKENS)
    return [name for name in names if _tokens_path(name)] or [NO_TOKENS]


def find_tokens(name: str) -> Path:
    """Full path of a listed file of reference tokens. Raises FileNotFoundError like find_checkpoint."""
    path = None if name == NO_TOKENS else _tokens_path(name)
    if path is not None:
        return path
    present = [file for file in token_files() if file != NO_TOKENS]
    raise FileNotFoundError(
        f"The file of reference tokens {shorten(repr(name))} was not found. Searched: "
        f"{', '.join(folder_paths.get_folder_paths(TOKENS))}; there: {', '.join(present) or 'no .safetensors files'}. "
        "Save tokens with Save Reference Tokens, or put a saved file into input/easyref."
    )


def state_of(files: Iterable[Path]) -> str:
    """By which the host knows whether files are still the same: another file under a name is noticed, and one that was
    written to, also where it has the size and the time of the old one."""
    found = [file.stat() for file in files]
    return " ".join(f"{s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for s in found)


def tiny_base() -> Path:
    """Folder of the tiny SDXL that comes with the pack. Raises FileNotFoundError where the pack was installed without."""
    base = SHIPPED / "base"
    if not (base / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The tiny model of the demo is not in {base}. Install the pack anew, as a whole."
        )
    return base


def host_tokenizer() -> Path:
    """The tokenizer ComfyUI ships for Qwen2.5-VL: Qwen2-VL's vocabulary and merges, and a few tokens of later models."""
    return Path(comfy.text_encoders.__path__[0]) / "qwen25_tokenizer"


def _is_name(name: str) -> bool:
    """Whether a file or folder can be called so anywhere. Windows has names for devices, and a : for other streams."""
    forbidden = any(character in '<>:"|?*' or not character.isprintable() for character in name)
    short = len(name.encode(errors="replace")) <= LONGEST_NAME
    return short and bool(name) and name == name.rstrip(". ") and not forbidden and not DEVICE.fullmatch(name)


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path that need not exist yet is in a folder, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _inside_mllm(name: str) -> bool:
    folder = Path(name).parent
    return folder != Path(".") and any(
        _is_qwen2_vl(Path(base) / folder / "config.json") for base in folder_paths.get_folder_paths(FOLDER)
    )


def _is_shipped(name: str) -> bool:
    return Path(folder_paths.get_full_path(FOLDER, name) or "").is_relative_to(SHIPPED)


def _tokens_path(name: str) -> Path | None:
    """Where a file of tokens lies; None for what really lies elsewhere: what others send into these folders is no
    model that a user has linked there."""
    folders = folder_paths.get_folder_paths(TOKENS)
    path = folder_paths.get_full_path(TOKENS, name)
    if path is None or not _is_inside(Path(path), folders) or Path(name).anchor or ".." in Path(name).parts:
        return None
    return Path(path) if any(_stays_inside(Path(path), Path(folder)) for folder in folders) else None


def _is_inside(path: Path, folders: list[str]) -> bool:
    """A link may point elsewhere on purpose; `..` in the name may not."""
    absolute = Path(path).absolute()
    return ".." not in absolute.parts and any(
        absolute.is_relative_to(Path(base).absolute()) for base in folders
    )


def _cached_mllms(base: Path) -> Iterator[tuple[str, Path]]:
    """(repository, folder) of every Qwen2-VL in a Hugging Face cache: models--<owner>--<name>/snapshots/<revision>."""
    for cache in sorted((*base.glob("models--*"), *base.glob("*/models--*"))):
        if folder := _snapshot(cache):
            yield cache.name.removeprefix("models--").replace("--", "/"), folder


def _snapshot(cache: Path) -> Path | None:
    """The revision that refs/main names, else the newest one; None if no revision is a Qwen2-VL."""
    try:
        main = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    # main is compared with the folders that are there, and never made into a path
    folders = [config.parent for config in cache.glob("snapshots/*/config.json") if _is_qwen2_vl(config)]
    return max(folders, key=lambda folder: (folder.name == main, folder.stat().st_mtime_ns), default=None)


def _is_qwen2_vl(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "qwen2_vl"
    except (OSError, ValueError, AttributeError):
        return False
