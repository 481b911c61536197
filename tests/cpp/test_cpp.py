"""Builds the client in C++ and runs its tests against a real Triton server.

It is done with gcc, with clang and under sanitizers, and the style is checked. All of it takes
minutes, so only `make cpp` runs it, with ``CIDALLOC_CPP=1``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import Server
from tls import make_certificate, terminated

from cidalloc.devserver import demo
from cidalloc.devserver.demo.sequences import FIRST, SECOND, expected_sums
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(600),
    pytest.mark.skipif("CIDALLOC_CPP" not in os.environ, reason="`make cpp` runs it"),
]

ROOT = Path(__file__).parent.parent.parent
CPP = ROOT / "cpp"

BUILDS = {
    "gcc": ("g++", "-O2"),
    "clang": ("clang++", "-O2"),
    "address": ("g++", "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"),
    "thread": ("g++", "-O1 -g -fsanitize=thread"),
}
"""A compiler and its flags, by the name of the build."""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server with managers of several kinds, and the environment of the tests."""
    folder, state = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("state")
    demo.write_repository(folder, Settings(fresh=True))
    quick = {"cooldown_ms": 0, "unended_cooldown_ms": 0, "min_ttl_ms": 100, "fresh": True}
    first = 0
    for name, other in (
        ("quick", {"grace_ms": 300}),
        ("patient", {}),
        ("pair", {"capacity": 2}),
        ("volatile", {}),
        ("kept", {"fresh": False, "state": str(state), "max_ttl_ms": 2000, "grace_ms": 500}),
        ("wide", {"first": 2**40}),
        ("sliced", {"first": 2**20, "capacity": 2**16, "slice": "3/64"}),
    ):
        first += 100_000
        settings = {"first": first, "capacity": 90_000, **quick, **other}
        export(folder, Settings(**settings), name=name)
    accumulator = folder / demo.MODEL
    for name, old, new in (
        ("narrow_sequence", "TYPE_UINT64", "TYPE_INT32"),
        ("idle_sequence", "idle_microseconds: 5000000", "idle_microseconds: 200000"),
    ):
        shutil.copytree(accumulator, folder / name)
        config = folder / name / "config.pbtxt"
        config.write_text(config.read_text().replace(old, new).replace(demo.MODEL, name))
    certificate = make_certificate(folder.parent, "server")
    explicit = ["--model-control-mode=explicit", "--load-model=*"]
    with (
        Server(folder, arguments=explicit) as triton,
        terminated(triton.http_port, certificate) as port,
    ):
        command = Path(sys.executable).parent / "cidalloc"
        environment = {
            **os.environ,
            "CIDALLOC_URL": triton.http_url,
            "CIDALLOC_TLS_URL": f"https://127.0.0.1:{port}",
            "CIDALLOC_CA": str(certificate.cert),
            "CIDALLOC_DRAIN": f"{command} drain {state}",
        }
        yield triton, environment


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, (command, done.stdout[-9000:], done.stderr[-9000:])
    return done.stdout


def build(folder: Path, name: str, *targets: str) -> Path:
    """Build some targets, and return the folder with the programs."""
    compiler, flags = BUILDS[name]
    configure = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS={flags}"]
    run("cmake", "-S", CPP, "-B", folder, "-DCIDALLOC_TESTS=ON", *configure)
    for target in targets:
        run("cmake", "--build", folder, "--target", target, "--parallel", "2")
    return folder


@pytest.mark.parametrize("name", BUILDS)
def test_client(name: str, server: tuple[Server, dict[str, str]], tmp_path: Path) -> None:
    programs = build(tmp_path, name, "test_cidalloc")
    print(run(programs / "test_cidalloc", env=server[1]))


def test_example(server: tuple[Server, dict[str, str]], tmp_path: Path) -> None:
    """It prints the sums that the demo of the Python client prints."""
    programs = build(tmp_path, "gcc", "simple_sequence")
    printed = run(programs / "simple_sequence", server[0].http_url).splitlines()
    expected = zip(expected_sums(FIRST), expected_sums(SECOND), strict=True)
    assert printed[3:] == [f"[{step}] {a} : {b}" for step, (a, b) in enumerate(expected)]


def test_installed_package(server: tuple[Server, dict[str, str]], tmp_path: Path) -> None:
    """CMake and pkg-config both find what was installed."""
    prefix, consumer = tmp_path / "prefix", CPP / "tests" / "consumer.cc"
    run("cmake", "-S", CPP, "-B", tmp_path / "build", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    run("cmake", "--install", tmp_path / "build")
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.14)\nproject(consumer CXX)\n"
        f"find_package(cidalloc 0.1 REQUIRED)\nadd_executable(consumer {consumer})\n"
        "target_link_libraries(consumer cidalloc::cidalloc)\n"
    )
    run("cmake", "-S", project, "-B", project, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", project)
    path = {**os.environ, "PKG_CONFIG_PATH": f"{prefix}/share/pkgconfig"}
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "cidalloc", env=path))
    run("g++", "-std=c++17", consumer, "-o", tmp_path / "consumer", *flags)
    url = server[0].http_url
    for program in (project / "consumer", tmp_path / "consumer"):
        assert int(run(program, url)) > 0


def test_speed(server: tuple[Server, dict[str, str]], tmp_path: Path) -> None:
    """The benchmark runs; how fast it is, is not a matter of a test."""
    programs = build(tmp_path, "gcc", "bench_ids")
    print("\n" + (printed := run(programs / "bench_ids", server[0].http_url, "quick")))
    assert [line.split()[0] for line in printed.splitlines()][:1] == ["cidalloc"]


def test_style(tmp_path: Path) -> None:
    sources = [path for kind in ("hpp", "cc") for path in sorted(CPP.glob(f"*/*.{kind}"))]
    run("clang-format", "--dry-run", "--Werror", *sources)
    build(tmp_path, "clang")
    flags = ["-std=c++17", f"-I{CPP / 'include'}", f"-I{CPP / 'tests'}"]
    units = [path for path in sources if path.suffix == ".cc"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda unit: run("clang-tidy", "--quiet", unit, "--", *flags), units))
