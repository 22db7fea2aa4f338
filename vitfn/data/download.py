"""Fetching a file whose size and checksum are known: resumed, verified, with a bar."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

from vitfn.errors import InputError

_CHUNK = 1 << 18


def md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download_file(url: str, path: Path, size: int, checksum: str) -> None:
    """`url` at `path`, once it has `size` bytes and the MD5 `checksum`; until then, and after a break, at `path`.part.

    Raises InputError where the network fails (calling again goes on from there) or the checksum does not match.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=30) as response:
                if response.status != 206:  # the server starts from the beginning
                    have = 0
                with (
                    part.open("ab" if have else "wb") as file,
                    tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path.name) as bar,
                ):
                    while chunk := response.read(_CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"--download: {url}: {error}; the same command goes on from there") from None
    found, found_size = md5(part), part.stat().st_size
    if found_size < size:
        raise InputError(
            f"--download: {url}: found {found_size:,} of {size:,} bytes; the same command goes on from there"
        )
    if found != checksum:
        part.unlink()
        raise InputError(f"--download: {url}: found MD5 {found}, expected {checksum}; try again")
    os.replace(part, path)
