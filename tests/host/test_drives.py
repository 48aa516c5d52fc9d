"""Weights stay mapped on local drives only; elsewhere, and with --disable-mmap, they are copied."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from devkit.host import golden

LOCAL = [
    ("ext4", "rw,relatime"),
    ("btrfs", "rw"),
    ("apfs", "rw,local"),
    ("NTFS", "rw,fixed"),
    ("fuseblk", "rw"),
]
UNSAFE = [
    *(("nfs4", "rw"), ("cifs", "rw"), ("fuse.sshfs", "rw"), ("9p", "rw"), ("smbfs", "rw"), ("exfat", "rw")),
    *(("NTFS", "rw,removable"), ("", "rw,remote"), ("CDFS", "ro,cdrom")),
]


def mount(monkeypatch: pytest.MonkeyPatch, **drives: tuple[str, str]) -> None:
    partitions = [
        SimpleNamespace(mountpoint=point, fstype=kind, opts=options)
        for point, (kind, options) in drives.items()
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: partitions)


@pytest.fixture
def drives(pack):
    return golden.part(pack, "nodes.host.drives")


@pytest.mark.parametrize("drive", LOCAL + UNSAFE)
def test_mapping_depends_on_the_drive(drives, monkeypatch, tmp_path: Path, drive: tuple[str, str]) -> None:
    mount(monkeypatch, **{"/": ("ext4", "rw"), str(tmp_path): drive})
    assert drives.may_stay_mapped(tmp_path / "models" / "easyref.safetensors") == (drive in LOCAL)
    assert drives.may_stay_mapped(tmp_path.parent)


def test_last_mount_on_a_point_counts(drives, monkeypatch, tmp_path: Path) -> None:
    partitions = [SimpleNamespace(mountpoint=str(tmp_path), fstype=kind, opts="") for kind in ("nfs", "ext4")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: partitions)
    assert drives.may_stay_mapped(tmp_path)


def test_link_to_another_drive_is_followed(drives, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "share")
    mount(monkeypatch, **{str(tmp_path): ("ext4", ""), str(tmp_path / "share"): ("nfs", "")})
    assert not drives.may_stay_mapped(tmp_path / "link" / "file")


def test_weights_are_copied_where_mapping_is_unsafe(pack, drives, monkeypatch) -> None:
    assert golden.load(pack).model.checkpoint.mapped
    monkeypatch.setattr(drives.args, "disable_mmap", True)
    model = golden.load(pack).model
    assert not model.checkpoint.mapped
