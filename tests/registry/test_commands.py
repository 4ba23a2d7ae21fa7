"""Every command of `bdh-batch model` that keeps models by name, as it is typed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from bdh_batch import cli as command_line
from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.errors import CheckpointError
from bdh_batch.registry import download
from bdh_batch.registry.add import MOST_PARTS, AddOptions, add
from bdh_batch.registry.locate import locate
from bdh_batch.registry.store import Store
from tests.conftest import eventually
from tests.model import formats
from tests.registry.conftest import CPU, FILES, TINY, Run, left_in, loads, sha256
from tests.registry.web import Web

if TYPE_CHECKING:
    from tests.launcher import Launcher

CONFIG = BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)


def config_of(model: Path) -> dict[str, object]:
    return dict(json.loads((model / "config.json").read_text()))


def blobs(store: Store) -> list[Path]:
    return sorted(store.blob("x").parent.iterdir())


class TestAdd:
    def test_a_folder(self, run: Run, store: Store, model: Path) -> None:
        assert "bdh-batch serve --model mine" in run("add", model, "--id", "mine")
        shutil.rmtree(model.rename(model.with_name("gone")))
        assert loads("mine")
        manifest = store.read("mine")
        assert (manifest.format, manifest.entry, manifest.revision) == ("safetensors", None, None)
        assert manifest.config["n_layer"] == config_of(TINY)["n_layer"]
        assert [file.name for file in manifest.files] == list(FILES)

    @pytest.mark.parametrize(
        "write",
        [formats.native, formats.bare, formats.hf_folder, formats.hf_shards, formats.hf_pickle, formats.trainer],
    )
    def test_every_kind_of_checkpoint_that_is_served(self, run: Run, tmp_path: Path, write: formats.Writer) -> None:
        path = write(tmp_path, CONFIG, formats.random_state(CONFIG))
        run("add", path, "--id", "mine")
        assert load_model(locate(Path("mine")).path, torch.float32, CPU).config.n_layer == 3

    def test_a_file_and_what_lies_beside_it(self, run: Run, store: Store, model: Path) -> None:
        (model / "generation_config.json").write_text("{}")
        (model / "notes.txt").write_text("not part of it")
        run("add", model / "model.safetensors", "--id", "mine")
        assert store.read("mine").entry == "model.safetensors"
        assert {file.name for file in store.read("mine").files} == {*FILES, "generation_config.json"}
        assert loads("mine")

    def test_the_folder_of_a_file_url(self, run: Run, model: Path) -> None:
        run("add", f"file://{model}", "--id", "mine")
        assert loads("mine")

    def test_a_tokenizer_in_a_folder_of_its_own_comes_along(self, run: Run, store: Store, model: Path) -> None:
        (model / "tokenizer").mkdir()
        (model / "tokenizer" / "tokenizer_config.json").write_text('{"type": "byte"}')
        run("add", model, "--id", "mine")
        assert [file.name for file in store.read("mine").files] == [*FILES, "tokenizer_config.json"]
        assert loads("mine")

    def test_arrays_of_mlx(self, run: Run, store: Store, web: Web, tmp_path: Path) -> None:
        """They are no pickle, so that they may come from elsewhere."""
        file = formats.mlx(tmp_path, CONFIG, formats.random_state(CONFIG))
        web.files[f"/m/{file.name}"] = file.read_bytes()
        run("add", f"{web.url}/m/{file.name}", "--id", "mine")
        manifest = store.read("mine")
        assert (manifest.format, manifest.kind) == ("npz", "MLX trainer")
        assert loads("mine")

    def test_a_folder_behind_a_url(self, run: Run, store: Store, web: Web, model: Path) -> None:
        (model / "chat_template.jinja").write_text("{{ messages }}")
        url = web.serve_folder(model)
        run("add", f"{url}/?token=secret", "--id", "mine")
        assert loads("mine")
        assert {file.name for file in store.read("mine").files} == {*FILES, "chat_template.jinja"}
        assert store.read("mine").source == f"{url}/"
        assert "secret" not in (store.root / "manifests" / "mine.json").read_text()
        assert not any(store.downloads.iterdir())

    def test_shards_behind_a_url(self, run: Run, store: Store, web: Web, tmp_path: Path) -> None:
        folder = tmp_path / "shards"
        folder.mkdir()
        formats.hf_shards(folder, CONFIG, formats.random_state(CONFIG))
        run("add", web.serve_folder(folder), "--id", "mine")
        assert len(store.read("mine").files) == 4
        assert loads("mine")

    def test_a_file_behind_a_url_that_is_cut_off_three_times(
        self, run: Run, web: Web, tmp_path: Path, model: Path
    ) -> None:
        weights = (model / "model.safetensors").read_bytes()
        web.files["/w.safetensors"] = weights
        web.cuts["/w.safetensors"] = [10, 50_000, 100_000]
        url = f"{web.url}/w.safetensors"
        run("add", url, "--id", "mine", "--sha256", hashlib.sha256(weights).hexdigest().upper())
        assert web.sent == len(weights)
        located = locate(Path("mine"))
        assert located.path.read_bytes() == weights
        assert load_file(located.path).keys() == load_file(model / "model.safetensors").keys()

    def test_it_goes_on_where_an_earlier_command_ended(
        self, run: Run, refused: Run, store: Store, web: Web, model: Path
    ) -> None:
        url = web.serve_folder(model)
        web.cuts["/model/model.safetensors"] = [100_000] + [0] * download.MOST_STALLED
        assert "the same command resumes after the 100,000 bytes" in refused("add", url, "--id", "mine")
        assert store.names() == []
        run("add", url, "--id", "mine")
        assert web.of("/model/model.safetensors")[-1]["range"] == "bytes=100000-"
        assert loads("mine")

    def test_content_that_is_there_is_not_fetched_again(self, run: Run, store: Store, web: Web, model: Path) -> None:
        run("add", model, "--id", "mine")
        url = web.serve_folder(model)
        run("add", url, "--id", "theirs", "--sha256", sha256(model / "model.safetensors"))
        assert web.of("/model/model.safetensors") == []
        assert len(blobs(store)) == 2
        damage(store, "mine", "model.safetensors")
        run("add", url, "--id", "again", "--sha256", sha256(model / "model.safetensors"))
        assert "as it was added" in run("verify")

    @pytest.mark.parametrize("killed", [False, True])
    def test_two_processes_at_once(
        self,
        launcher: Launcher,
        store: Store,
        web: Web,
        model: Path,
        caplog: pytest.LogCaptureFixture,
        tmp_path: Path,
        killed: bool,
    ) -> None:
        """Another process has half of the weights when this one wants them, and goes on or is killed."""
        url, path = web.serve_folder(model), "/model/model.safetensors"
        web.held[path] = threading.Event()
        with (tmp_path / "log").open("wb") as log:
            env = os.environ | {"BDH_CACHE": str(store.root)}
            other = launcher.start(["model", "add", url, "--id", "mine"], env, log)
        with ThreadPoolExecutor(1) as pool:
            try:
                eventually(lambda: bool(web.of(path)))
                ours = pool.submit(add, store, url, "mine", AddOptions(most_bytes=10**9))
                eventually(lambda: "waiting for another process" in caplog.text)
            finally:
                if killed:
                    other.kill()
                    other.wait(300)
                web.held[path].set()
            assert ours.result(300).id == "mine"
            assert other.wait(300) == (-signal.SIGKILL if killed else 0)
        assert loads("mine")
        assert len(blobs(store)) == 2
        assert not any(store.downloads.iterdir())

    def test_an_interrupted_command_says_so_and_the_next_goes_on(
        self, run: Run, store: Store, web: Web, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        url, path = web.serve_folder(model), "/model/model.safetensors"
        web.held[path] = threading.Event()

        def interrupt() -> None:
            eventually(lambda: any(file.stat().st_size for file in store.downloads.glob("*/data")))
            os.kill(os.getpid(), signal.SIGINT)  # the main thread's, which waits for the other half

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
        try:
            with ThreadPoolExecutor(1) as pool:
                interrupting = pool.submit(interrupt)
                assert command_line.main(["model", "add", url, "--id", "mine"]) == 130
                interrupting.result(300)
        finally:
            signal.signal(signal.SIGINT, before)
        assert capsys.readouterr().err.count("\n") == 1
        web.held.pop(path).set()
        run("add", url, "--id", "mine")
        assert "range" in web.of(path)[-1]
        assert loads("mine")

    def test_a_name_is_taken_once(self, run: Run, refused: Run, tmp_path: Path, model: Path) -> None:
        run("add", model, "--id", "mine")
        assert "there is a model mine already" in refused("add", model, "--id", "mine")
        other = tmp_path / "other"
        other.mkdir()
        formats.native(other, CONFIG, formats.random_state(CONFIG))
        run("add", other, "--id", "mine", "--force")
        assert load_model(locate(Path("mine")).path, torch.float32, CPU).config.n_layer == 3

    @pytest.mark.parametrize(
        "name",
        ["..", "a..b", "../x", "a/b", "/abs", "a\\b", ".hidden", "-flag", "", "a\nb", "a\x00b", "a b", "é", "x" * 129],
    )
    def test_a_name_that_could_be_a_path_is_refused(self, refused: Run, store: Store, model: Path, name: str) -> None:
        assert "--id" in refused("add", model, f"--id={name}")
        assert not store.root.exists()

    @pytest.mark.parametrize(
        ("source", "part"),
        [
            ("ftp://127.0.0.1/model", "not from ftp"),
            ("s3://bucket/model", "not from s3"),
            ("javascript://x", "not from javascript"),
            ("http://", "has no host"),
            ("http://[::", "is not a URL"),
            ("http://127.0.0.1:1/m.zip", ".zip files are not read"),
            ("file://elsewhere/model", "file:///absolute/path"),
            ("file:model", "file:///absolute/path"),
            ("file:///no%00where", "file:///absolute/path"),
            ("hf:name", "hf:ORG/NAME"),
            ("hf:org/../x", "hf:ORG/NAME"),
            ("hf:org/name/more", "hf:ORG/NAME"),
            ("hf:org/name@", "hf:ORG/NAME"),
            ("hf:org/name@a..b", "hf:ORG/NAME"),
            ("hf://org/name", "hf:ORG/NAME"),
            ("nowhere", "there is no model at"),
            ("a\nb", "is expected"),
            ("", "is expected"),
            ("/dev/null", "not a regular file"),
        ],
    )
    def test_a_source_that_is_none_is_refused(self, refused: Run, store: Store, source: str, part: str) -> None:
        assert part in refused("add", source, "--id", "mine")
        assert left_in(store) == []

    def test_a_pickle_from_elsewhere_needs_a_flag(
        self, run: Run, refused: Run, store: Store, web: Web, tmp_path: Path
    ) -> None:
        folder = tmp_path / "pickle"
        folder.mkdir()
        file = formats.trainer(folder, CONFIG, formats.random_state(CONFIG))
        url = f"{web.serve_folder(folder)}/{file.name}"
        for source in (url, f"file://{file}", f"file://{folder}"):
            assert "--allow-pickle" in refused("add", source, "--id", "mine")
        assert web.asked == []
        run("add", url, "--id", "mine", "--allow-pickle")
        assert store.read("mine").format == "torch"
        assert loads("mine")
        run("add", file, "--id", "local")

    @pytest.mark.parametrize("write", [formats.hf_pickle, formats.hf_pickle_shards])
    def test_so_does_a_folder_of_them(
        self, run: Run, refused: Run, web: Web, tmp_path: Path, write: formats.Writer
    ) -> None:
        folder = tmp_path / "pickle"
        folder.mkdir()
        write(folder, CONFIG, formats.random_state(CONFIG))
        url = web.serve_folder(folder)
        assert "--allow-pickle" in refused("add", url, "--id", "mine")
        assert not [path for path, _ in web.asked if path.endswith(".bin")]
        run("add", url, "--id", "mine", "--allow-pickle")
        assert loads("mine")

    def test_an_evil_pickle_is_refused_even_then(self, refused: Run, store: Store, web: Web) -> None:
        web.files["/evil.pt"] = b"cos\nsystem\n(S'touch /tmp/evil'\ntR."
        line = refused("add", f"{web.url}/evil.pt", "--id", "mine", "--allow-pickle")
        assert f"{web.url}/evil.pt: evil.pt" in line
        assert left_in(store) == []

    def test_what_is_not_a_model_leaves_nothing(self, refused: Run, store: Store, web: Web, model: Path) -> None:
        (model / "config.json").write_text('{"n_layer": 2, "runes": true}')
        url = web.serve_folder(model)
        for source in (url, model):
            assert f"{source}: config.json: config: unknown fields" in refused("add", source, "--id", "mine")
            assert left_in(store) == []

    @pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\nb", ""])
    def test_an_index_leads_to_files_of_its_folder_only(
        self, refused: Run, store: Store, web: Web, tmp_path: Path, name: str
    ) -> None:
        folder = tmp_path / "shards"
        folder.mkdir()
        formats.hf_shards(folder, CONFIG, formats.random_state(CONFIG))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"encoder": name}}))
        for source in (web.serve_folder(folder), folder):
            assert "cannot be the name of a model's file" in refused("add", source, "--id", "mine")
            assert left_in(store) == []

    def test_an_index_lists_a_bounded_number_of_files(self, refused: Run, web: Web, model: Path) -> None:
        index = {"weight_map": {str(number): f"{number}.safetensors" for number in range(MOST_PARTS + 1)}}
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "lists 1,001 files, more than 1,000" in refused("add", web.serve_folder(model), "--id", "mine")

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
    def test_a_page_of_apology_is_not_taken_for_a_file(
        self, refused: Run, store: Store, web: Web, model: Path, name: str
    ) -> None:
        (model / name).write_text("<!doctype html><p>We could not find that.")
        assert f"{name}: not JSON" in refused("add", web.serve_folder(model), "--id", "mine")
        assert left_in(store) == []

    def test_progress_is_shown_on_a_terminal(
        self, web: Web, store: Store, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = web.serve_folder(model)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert command_line.main(["model", "add", url, "--id", "mine"]) == 0
        assert "model.safetensors: 100%" in capsys.readouterr().err

    def test_a_link_out_of_the_folder_is_not_followed(self, refused: Run, store: Store, model: Path) -> None:
        (model / "tokenizer_config.json").symlink_to("/etc/hostname")
        assert "not a regular file in its folder" in refused("add", model, "--id", "mine")
        assert left_in(store) == []

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("0" * 64, "and " + "0" * 64 + " was expected"),
            ("config.json=" + "0" * 64, "was expected"),
            ("tokenizer.json=" + "0" * 64, "the model has no tokenizer.json"),
            ("abc", "64 hexadecimal digits"),
            ("../x=" + "0" * 64, "64 hexadecimal digits"),
        ],
    )
    def test_a_checksum_that_does_not_match(
        self, refused: Run, store: Store, web: Web, model: Path, text: str, part: str
    ) -> None:
        for source in (web.serve_folder(model), model):
            assert part in refused("add", source, "--id", "mine", "--sha256", text)
            assert left_in(store) == []

    def test_checksums_of_shards_are_given_by_name(self, run: Run, refused: Run, tmp_path: Path) -> None:
        formats.hf_shards(tmp_path, CONFIG, formats.random_state(CONFIG))
        shards = sorted(tmp_path.glob("*.safetensors"))
        assert "give NAME=HEX" in refused("add", tmp_path, "--id", "mine", "--sha256", "0" * 64)
        run("add", tmp_path, "--id", "mine", *(f"--sha256={file.name}={sha256(file)}" for file in shards))

    @pytest.mark.parametrize(
        ("size", "part"), [("100 KiB", "more than 100.0 KiB"), ("x", "--max-size"), ("0", "--max-size")]
    )
    def test_a_model_beyond_the_bound(
        self, refused: Run, store: Store, web: Web, model: Path, size: str, part: str
    ) -> None:
        for source in (web.serve_folder(model), model):
            assert part in refused("add", source, "--id", "mine", "--max-size", size)
            assert left_in(store) == []

    def test_a_full_disk_leaves_nothing(self, refused: Run, store: Store, web: Web, model: Path) -> None:
        """A limit on the size of files ends the writing half-way, as a full disk does."""
        most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for source in (web.serve_folder(model), model):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            try:
                line = refused("add", source, "--id", "mine")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
            assert "there is no room for the model (File too large)" in line
            assert left_in(store) == []

    def test_a_cache_that_cannot_be_written(
        self, refused: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("BDH_CACHE", str(tmp_path / "file" / "cache"))
        assert "cannot be used (Not a directory)" in refused("add", model, "--id", "mine")


class TestListAndShow:
    def test_list(self, run: Run, model: Path) -> None:
        assert run("list") == ""
        assert json.loads(run("list", "--json")) == []
        run("add", model, "--id", "mine")
        head, row = run("list").splitlines()
        assert head.split() == ["NAME", "SIZE", "FORMAT", "ADDED", "SOURCE"]
        assert row.split()[0] == "mine"
        assert row.endswith(str(model))
        (manifest,) = json.loads(run("list", "--json"))
        assert manifest["id"] == "mine"

    def test_a_damaged_manifest_hides_no_other(
        self, run: Run, store: Store, model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("add", model, "--id", "mine")
        (store.root / "manifests" / "bad.json").write_text("{")
        assert command_line.main(["model", "list"]) == 2
        printed = capsys.readouterr()
        assert "mine" in printed.out
        assert "bad.json: not JSON" in printed.err
        run("remove", "bad")
        run("list")

    def test_show(self, run: Run, refused: Run, store: Store, model: Path) -> None:
        run("add", model, "--id", "mine")
        text = run("show", "mine")
        for part in (str(model), sha256(model / "model.safetensors"), "safetensors", "n_layer", str(store.root)):
            assert part in text
        manifest = json.loads(run("show", "mine", "--json"))
        assert manifest.keys() == {
            *("version", "id", "source", "revision", "format", "entry", "files", "config", "kind", "variant", "created")
        }
        assert "kind        upstream: norm after every layer, RoPE of base 65,536, interleaved" in text
        assert {file["name"]: (file["sha256"], file["size"]) for file in manifest["files"]} == {
            name: (sha256(model / name), (model / name).stat().st_size) for name in FILES
        }
        assert "the registry has no model 'none': it has: mine" in refused("show", "none")
        assert "the registry has no model '../mine'" in refused("show", "../mine")


def damage(store: Store, name: str, file: str, at: int = 100_000) -> Path:
    """Flips one bit of a file's content."""
    (record,) = [each for each in store.read(name).files if each.name == file]
    blob = store.blob(record.sha256)
    content = bytearray(blob.read_bytes())
    content[at] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    return blob


class TestVerify:
    def test_what_is_right(self, run: Run, model: Path) -> None:
        assert run("verify") == ""
        run("add", model, "--id", "mine")
        run("add", model, "--id", "again")
        assert run("verify").count("is as it was added") == 2
        assert run("verify", "mine").startswith("mine (2 files")

    def test_one_flipped_bit_is_found_and_mended(self, run: Run, refused: Run, store: Store, model: Path) -> None:
        run("add", model, "--id", "mine")
        blob = damage(store, "mine", "model.safetensors")
        line = refused("verify", "mine")
        assert f"mine: model.safetensors is damaged: its SHA-256 is {sha256(blob)}" in line
        run("add", model, "--id", "mine", "--force")
        assert "as it was added" in run("verify")

    def test_what_is_missing_cut_or_foreign_is_found(self, run: Run, refused: Run, store: Store, model: Path) -> None:
        run("add", model, "--id", "mine")
        config, weights = (store.blob(sha256(model / name)) for name in FILES)
        folder = store.snapshot(store.read("mine"))
        (folder / "tokenizer.json").write_text("{}")
        weights.chmod(0o644)
        weights.write_bytes(b"cut")
        config.unlink()
        line = refused("verify")
        for part in (
            "the content of config.json is missing",
            "model.safetensors has 3 bytes",
            "tokenizer.json is not one",
        ):
            assert part in line
        with pytest.raises(CheckpointError, match=r"mine is damaged: .*; add it again, with --force"):
            locate(Path("mine"))
        run("add", model, "--id", "mine", "--force")
        assert "as it was added" in run("verify")

    def test_a_link_that_leads_elsewhere_is_found(self, run: Run, refused: Run, store: Store, model: Path) -> None:
        run("add", model, "--id", "mine")
        link = store.snapshot(store.read("mine")) / "config.json"
        link.unlink()
        link.symlink_to(model / "config.json")
        assert "config.json is not linked to its content" in refused("verify")


class TestRemoveAndPrune:
    def test_prune_deletes_what_no_model_needs(self, run: Run, store: Store, model: Path, tmp_path: Path) -> None:
        assert run("prune") == "deleted 0 files, 0 B\n"
        other = tmp_path / "other"
        shutil.copytree(model, other)
        (other / "generation_config.json").write_text('{"temperature": 0.5}')
        run("add", model, "--id", "mine")
        run("add", other, "--id", "other")
        assert len(blobs(store)) == 3
        assert "other is removed" in run("remove", "other")
        assert len(blobs(store)) == 3
        assert run("prune") == "deleted 1 file, 20 B\n"
        assert loads("mine")
        run("remove", "mine")
        run("prune")
        assert left_in(store) == []

    def test_prune_deletes_downloads_that_were_broken_off(
        self, run: Run, refused: Run, store: Store, web: Web, model: Path
    ) -> None:
        web.cuts["/model/model.safetensors"] = [100_000] + [0] * download.MOST_STALLED
        refused("add", web.serve_folder(model), "--id", "mine")
        assert left_in(store)
        run("prune")
        assert left_in(store) == []

    def test_prune_leaves_alone_what_is_being_added(self, run: Run, store: Store, model: Path) -> None:
        with store.staging() as folder:
            (folder / "data").write_text("half of a file")
            run("prune")
            assert (folder / "data").is_file()

    def test_prune_does_nothing_where_it_does_not_know_what_is_needed(
        self, run: Run, refused: Run, store: Store, model: Path
    ) -> None:
        run("add", model, "--id", "mine")
        file = store.root / "manifests" / "mine.json"
        file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
        assert "a manifest of version 2; this program reads version 1" in refused("prune")
        assert len(blobs(store)) == 2

    def test_a_model_that_is_not_there(self, refused: Run, store: Store) -> None:
        assert "the registry has no model 'none': it is empty" in refused("remove", "none")
        assert "the registry has no model '../x'" in refused("remove", "../x")

    def test_a_model_in_use_is_forgotten_and_its_files_stay(self, run: Run, store: Store, model: Path) -> None:
        run("add", model, "--id", "mine")
        located = locate(Path("mine"))
        assert "a server uses it" in run("remove", "mine")
        run("prune")
        assert load_model(located.path, torch.float32, CPU)
        located.close()
        run("prune")
        assert left_in(store) == []
