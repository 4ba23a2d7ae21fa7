"""The container, without a container engine: the steps of the Dockerfile, run in folders of this machine.

The steps are read from the Dockerfile itself; only its absolute paths are moved under a temporary folder. Three things
differ from an image. No step reaches the network, and torch is not installed anew, which would take minutes: the
packages of the environment that runs the tests are put behind those of the fresh one, where pip finds its requirements
met. The package itself is not among them: it comes from the wheel that the steps build. The step that makes the image's
user is left out: the machine keeps its users. And what the checkout's kernels have been compiled to is put beside the
wheel's, which are the same.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bdh_batch import cli, settings

ROOT = Path(__file__).parent.parent
MOVED = ("/opt/bdh-batch", "/dist")
"""The image's folders outside of its work directories."""

MAKES_A_USER = "useradd"
READY_SECONDS = 900
STEP_SECONDS = 900


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments of an instruction in exec form (a JSON list), or in shell words."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def stages(dockerfile: str) -> list[list[Instruction]]:
    """The instructions of each stage, each starting with its FROM."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    found: list[list[Instruction]] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, text = line.split(maxsplit=1)
            if name == "FROM":
                found.append([])
            found[-1].append(Instruction(name, " ".join(text.split())))
    return found


def only(stage: Sequence[Instruction], name: str) -> Instruction:
    (instruction,) = [instruction for instruction in stage if instruction.name == name]
    return instruction


BUILDER, RUNTIME = stages((ROOT / "Dockerfile").read_text())


class Image:
    """What the Dockerfile's steps make, with the image's root at a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            # Nothing of the machine's own settings of pip, Python and the server; and no index.
            **{name: os.environ[name] for name in ("LANG", "TMPDIR", "NUMBA_CACHE_DIR") if name in os.environ},
            "HOME": str(root),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "EXTRAS": "encryption,redis,s3",
        }

    def moved(self, text: str) -> str:
        return re.sub(rf"(?<![\w./-])({'|'.join(map(re.escape, MOVED))})\b", rf"{self.root}\1", text)

    def build(self, stage: Sequence[Instruction]) -> None:
        work = self.root
        for step in stage:
            match step.name:
                case "WORKDIR":
                    work = self.root / step.text.lstrip("/")
                    work.mkdir(parents=True, exist_ok=True)
                case "ARG":
                    name, _, value = step.text.partition("=")
                    self.environment.setdefault(name, value)
                case "ENV":
                    name, _, value = self.moved(step.text).partition("=")
                    self.environment[name] = value.replace("$PATH", self.environment["PATH"])
                case "COPY" if not step.text.startswith("--from"):
                    self._copy(step.words, work)
                case "RUN" if MAKES_A_USER not in step.text:
                    self._run(step.text, work)

    def _copy(self, words: Sequence[str], work: Path) -> None:
        *sources, target = words
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, work / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, work / target)

    def _run(self, command: str, work: Path) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", self.moved(command)],
            cwd=work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STEP_SECONDS,
        )
        assert done.returncode == 0, f"RUN {command}\n{done.stdout}"
        for packages in self.root.glob("opt/*/lib/python*/site-packages"):
            (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    image = Image(tmp_path_factory.mktemp("image"))
    image.build(BUILDER)
    image.build(RUNTIME)
    (kernels,) = image.root.glob("opt/bdh-batch/lib/python*/site-packages/bdh_batch/kernels")
    compiled = kernels / "__pycache__"
    compiled.mkdir(exist_ok=True)
    for file in (ROOT / "bdh_batch" / "kernels" / "__pycache__").glob("*.nb[ci]"):
        shutil.copy(file, compiled)
    return image


@pytest.fixture
def environment(image: Image) -> dict[str, str]:
    """The container's, with a free port and a small part of the memory for the states."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return {**image.environment, "BDH_SERVER__PORT": str(port), "BDH_ENGINE__STATE_MEMORY": "128 MiB"}


@pytest.fixture
def container(image: Image, environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """What the image's CMD starts, in an empty folder."""
    server = subprocess.Popen(only(RUNTIME, "CMD").words, cwd=tmp_path, env=environment)
    yield server
    server.kill()
    server.wait()


def test_a_container_starts_answers_is_healthy_and_stops(
    container: subprocess.Popen[bytes], environment: dict[str, str], tmp_path: Path
) -> None:
    base = f"http://127.0.0.1:{environment['BDH_SERVER__PORT']}"
    wait_until_ready(f"{base}/readyz", container)

    request = urllib.request.Request(
        f"{base}/v1/completions",
        json.dumps({"prompt": "ROMEO:\n", "max_tokens": 5}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        completion = json.load(response)
    assert completion["model"] == "bdh-shakespeare"
    assert completion["usage"]["completion_tokens"] == 5

    assert health(environment, tmp_path) == 0
    container.send_signal(signal.SIGTERM)
    assert container.wait(300) == 0
    assert health(environment, tmp_path) == 1


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended with exit code {server.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail(f"not ready within {READY_SECONDS} s")


def health(environment: dict[str, str], folder: Path) -> int:
    """The exit code of the image's HEALTHCHECK."""
    command = Instruction("CMD", only(RUNTIME, "HEALTHCHECK").text.partition(" CMD ")[2]).words
    return subprocess.run(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL, timeout=300).returncode


def test_the_package_comes_from_the_wheel(image: Image, tmp_path: Path) -> None:
    code = (
        "import bdh_batch; from bdh_batch.processes.model_settings import bundled_model; "
        "print(bdh_batch.__file__, bundled_model(), sep='\\n')"
    )
    output = subprocess.check_output(["python", "-c", code], cwd=tmp_path, env=image.environment, text=True)
    for path in output.splitlines():
        assert Path(path).is_relative_to(image.root / "opt" / "bdh-batch")
    assert Path(output.splitlines()[0]).with_name("py.typed").is_file()


def test_an_unknown_variant_is_refused(image: Image) -> None:
    (step,) = [step for step in BUILDER if step.name == "RUN" and "$VARIANT" in step.text]
    environment = {**image.environment, "VARIANT": "tpu"}
    done = subprocess.run(["sh", "-c", image.moved(step.text)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "VARIANT is cpu or cuda, not tpu\n")


def test_every_install_takes_the_tested_versions() -> None:
    installs = [part for step in BUILDER if step.name == "RUN" for part in step.text.split(";;") if " install " in part]
    assert len(installs) == 4
    assert all("-c constraints.txt" in install for install in installs)


def test_the_image_does_not_run_as_root() -> None:
    user = only(RUNTIME, "USER").text
    assert user not in ("root", "0")
    assert any(step.text.startswith(MAKES_A_USER) and step.text.endswith(user) for step in RUNTIME)


def test_the_image_exposes_the_default_port() -> None:
    assert only(RUNTIME, "EXPOSE").text == str(settings.Server().port)


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {source for step in BUILDER if step.name == "COPY" for source in step.words[:-1]}
    assert kept == copied
    assert all((ROOT / source).exists() for source in copied)


COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def with_defaults(text: str) -> str:
    """Compose's ${NAME:-default} where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """The paths in the container, each with what is mounted there."""
    found = {}
    for volume in service["volumes"]:
        source, target, mode = volume.split(":")
        assert mode == "ro", f"{target} can be written to"
        found[target] = ROOT / source
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_a_composed_server_understands_its_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = SERVICES[name]
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, value)
    program, *arguments = [with_defaults(word) for word in service["command"]]
    assert program == only(RUNTIME, "CMD").words[0]
    options = cli._parser().parse_args(arguments)
    folders = mounts(service)
    assert str(options.config) in folders
    resolved = settings.load(folders[str(options.config)], cli._overrides(options))

    assert resolved.settings.server.host == "0.0.0.0"
    assert service["ports"] == [f"127.0.0.1:8000:{resolved.settings.server.port}"]
    assert f":{resolved.settings.server.port}/readyz" in service["healthcheck"]["test"][-1]
    assert int(service["stop_grace_period"].removesuffix("s")) > resolved.settings.server.drain_seconds
    path = resolved.settings.model.path
    assert path is not None
    assert (folders[str(path.parent)] / path.name / "config.json").is_file()


def test_the_gpu_is_reserved_only_where_the_profile_asks_for_it() -> None:
    (plain,) = [service for service in SERVICES.values() if "profiles" not in service]
    (gpu,) = [service for service in SERVICES.values() if service.get("profiles") == ["gpu"]]
    assert "deploy" not in plain
    assert gpu["build"]["args"]["VARIANT"] == "cuda"
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_build_argument_is_the_dockerfiles(name: str) -> None:
    build = SERVICES[name]["build"]
    given = build["args"] if isinstance(build, dict) else {}
    assert given.keys() <= {step.text.partition("=")[0] for step in BUILDER if step.name == "ARG"}
