"""Drives on which a file may lose its content while it is memory-mapped: network and removable ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from comfy.cli_args import args

# Types of file systems, as psutil names them on Linux and macOS. FUSE's are mostly of a network; "fuseblk" is
# a local NTFS. FAT stands for sticks and cards, which psutil does not mark on Linux.
NETWORK = {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "webdav", "ncpfs", "9p", "drvfs"}
NETWORK |= {"afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "vboxsf", "vmhgfs", "prl_fs", "fuse"}
REMOVABLE = {"vfat", "msdos", "exfat", "iso9660", "udf"}
OPTIONS = {"remote", "removable", "cdrom"}  # of Windows


def may_stay_mapped(path: Path) -> bool:
    """Return False for a path on a network or removable drive, and with ComfyUI's --disable-mmap.

    If such a drive fails, or another computer cuts the file, reading the mapping ends the process.
    """
    drive = drive_of(path)
    return not (args.disable_mmap or (drive and is_unsafe(drive.fstype, drive.opts)))


def drive_of(path: Path) -> Any:
    """The mounted drive that holds a path, of psutil.disk_partitions; None if the system names none."""
    path = path.resolve()
    drives = [drive for drive in psutil.disk_partitions(all=True) if path.is_relative_to(drive.mountpoint)]
    # the last of several on one mount point hides the others
    return max(reversed(drives), key=lambda drive: len(Path(drive.mountpoint).parts), default=None)


def is_unsafe(kind: str, options: str) -> bool:
    """Return True for the type and the mount options of a network or removable drive."""
    kind = kind.lower()
    return (
        kind in NETWORK | REMOVABLE
        or kind.startswith("fuse.")
        or bool(OPTIONS & set(options.lower().split(",")))
    )
