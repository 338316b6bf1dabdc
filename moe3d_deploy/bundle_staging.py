"""What lies beside a bundle while it is written: the lock, the staging folder, the replaced bundle."""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe3d_deploy.errors import BundleError
from moe3d_deploy.files import exclusive_lock
from moe3d_deploy.manifest import MANIFEST_NAME


@contextmanager
def writer_lock(final: Path) -> Iterator[None]:
    """One writer at a time for one bundle name. The lock lies beside the bundle, which is replaced as a whole."""
    busy = BundleError(f"bundle {final} is being written by another process; wait until it has ended")
    with exclusive_lock(final.with_name(f".{final.name}.lock"), busy):
        yield


def sibling(final: Path, kind: str) -> Path:
    """A new hidden name beside the bundle; `kind` is partial (staged) or old (replaced)."""
    return final.with_name(f".{final.name}.{kind}-{secrets.token_hex(8)}")


def leftovers(final: Path, kind: str) -> list[Path]:
    """What a writer that was killed left of this kind."""
    pattern = re.compile(rf"{re.escape(f'.{final.name}.{kind}-')}[0-9a-f]{{16}}")
    if not final.parent.is_dir():
        return []
    return [entry for entry in final.parent.iterdir() if pattern.fullmatch(entry.name)]


def clean_up(final: Path) -> None:
    """Remove staged and replaced folders of this name; put the old bundle back if its successor never came."""
    for folder in leftovers(final, "partial"):
        shutil.rmtree(folder)
    for folder in leftovers(final, "old"):
        if (final / MANIFEST_NAME).exists():
            shutil.rmtree(folder)
        else:
            folder.rename(final)
