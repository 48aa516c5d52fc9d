"""The statements of SECURITY.md about the sources and the distributions are true."""

from __future__ import annotations

import ast
import re
from importlib import metadata

import pytest

from devkit.hosts import ROOT
from devkit.project import pyproject

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
PROJECT = pyproject()["project"]
SOURCES = [*ROOT.glob("nodes/**/*.py"), *ROOT.glob("easyref_core/**/*.py")]

NO_MODULES = set(
    "subprocess socket urllib requests http httpx aiohttp ftplib telnetlib smtplib pickle marshal shelve "
    "dill joblib ctypes cffi webbrowser huggingface_hub pip".split()
)
NO_CALLS = set(
    "eval exec compile __import__ os.system os.popen os.startfile os.execv os.spawnv torch.hub.load "
    "numpy.load np.load".split()
)

# The benchmark may ask the hub for a model that its user names; SECURITY.md says so.
ALLOWED = {"easyref_core/mrbench/extractors.py": {"huggingface_hub"}}


def found_in(source: str) -> set[str]:
    """The forbidden modules and calls of a source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & NO_MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module.partition(".")[0]} & NO_MODULES
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            found |= {name} & NO_CALLS
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.add("torch.load without weights_only")
            if keywords.get("trust_remote_code", "False") != "False":
                found.add("trust_remote_code")
    return found


@pytest.mark.parametrize("name", [file.relative_to(ROOT).as_posix() for file in SOURCES])
def test_source_does_nothing_forbidden(name: str) -> None:
    assert found_in((ROOT / name).read_text(encoding="utf-8")) == ALLOWED.get(name, set())


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec('1')",
        "import pickle\npickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "from urllib.request import urlopen",
        "import requests",
        "import socket",
        "import subprocess",
        "os.system('ls')",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert len(found_in(source)) == 1


def test_only_training_and_its_data_import_transformers() -> None:
    """Its loaders may run code of a model's folder and use the network."""
    importing = [
        file for file in SOURCES if re.search(r"^ *(import|from) transformers", file.read_text("utf-8"), re.M)
    ]
    rooms = {file.relative_to(ROOT).parts[1] for file in importing}
    assert rooms == {"training", "mrbench", "tiny"}


LISTED = dict(re.findall(r"^\| ([a-z][a-z0-9-]+) \| ([^|]+) \| [^|]+ \|$", SECURITY, re.M))
EXTRAS = [
    re.match(r"[\w-]+", wanted)[0] for extra in PROJECT["optional-dependencies"].values() for wanted in extra
]


@pytest.mark.parametrize("name", sorted(set(EXTRAS) - {PROJECT["name"]}))
def test_distribution_is_listed(name: str) -> None:
    assert name in LISTED


@pytest.mark.parametrize("name", sorted(set(LISTED) - {"distribution"}))
def test_licence_is_what_the_package_says(name: str) -> None:
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    said = [about.get("License-Expression"), (about.get("License") or "").partition("\n")[0]]
    said += [
        text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or [] if text.startswith("License")
    ]
    assert any(text and text.strip() in LISTED[name] for text in said), said


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", SECURITY))))
def test_linked_file_exists(link: str) -> None:
    assert (ROOT / link).is_file()
