"""`make arm`: tests the code for the CPU as a 64-bit Arm runs it, cross-compiled, and emulated by qemu.

`make arm-wheel` keeps the wheel in `dist`. Compiler, emulator and an Arm's Python are Debian's packages, which
need its apt but no root; they and PyTorch for Arm are unpacked in `.cache/arm` and kept for the next time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from run import KERNELS, PYTEST, Part, report  # noqa: E402

FOLDER = ROOT / ".cache" / "arm"
HOST, TARGET, SITE = FOLDER / "host", FOLDER / "target", FOLDER / "site"
SOURCE, TESTED = FOLDER / "source", FOLDER / "tested"

RELEASE = "bookworm"
TRIPLE = "aarch64-linux-gnu"
# The emulator and GCC for Arm, with the libraries that it is made with and for.
HOST_PACKAGES = (
    *("qemu-user-static", f"binutils-{TRIPLE}", f"cpp-12-{TRIPLE}", f"gcc-12-{TRIPLE}", f"g++-12-{TRIPLE}"),
    *("libc6-arm64-cross", "libc6-dev-arm64-cross", "linux-libc-dev-arm64-cross", "libgcc-12-dev-arm64-cross"),
    *("libgcc-s1-arm64-cross", "libstdc++6-arm64-cross", "libstdc++-12-dev-arm64-cross"),
    *("libbinutils", "libctf0", "libctf-nobfd0", "libgmp10", "libisl23", "libjansson4", "libmpc3", "libmpfr6"),
)
TARGET_PACKAGES = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1", "libstdc++6"),
    *("libbz2-1.0", "libcrypt1", "libdb5.3", "libexpat1", "libffi8", "liblzma5", "libncursesw6", "libreadline8"),
    *("libsqlite3-0", "libssl3", "libtinfo6", "libuuid1", "zlib1g"),
)
# PyTorch and the tests, with what they need on a CPU. The oldest PyTorch, as the newest one's wheel for Arm needs CUDA.
WHEELS = (
    *("torch==2.10.0", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "numpy", "sympy"),
    *("setuptools", "typing-extensions", "pytest", "iniconfig", "packaging", "pluggy", "pygments"),
    *("hypothesis", "sortedcontainers"),
)
PARTS = ("ceit", "ceit_kernels", "csrc", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# What the processor computes; what PyTorch's machinery makes of it is the same on all. Side by side, the longest first.
TESTS = {
    "LeFF": ("leff/test_cpu.py",),
    "the rest": (
        *("i2t/test_cpu.py", "add_norm/test_cpu.py", "attention/test_cpu.py", "lca/test_cpu.py"),
        *("common/test_matmul.py", "linear"),
    ),
}
NOT_HERE = "not registration and not compiles and not forked and not finite_differences"


def run(*command: object, **options: object) -> str:
    """What a command prints; ends this program where it fails."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{done.stdout}\narm: failed with status {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def once(folder: Path, content: Sequence[str], make) -> None:
    """Make a folder anew unless it was made of the same content."""
    stamp = folder.with_suffix(".made")
    if stamp.exists() and stamp.read_text().split() == [*content]:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make()
    stamp.write_text("\n".join(content))


def unpack(architecture: str, packages: Iterable[str], folder: Path) -> None:
    """Unpack Debian packages in a folder, by an apt whose lists and settings are its own."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        sys.exit("arm: expected Debian's apt-get and dpkg-deb on PATH")
    apt = FOLDER / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    signed = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    (apt / "sources.list").write_text(f"deb {signed} http://deb.debian.org/debian {RELEASE} main\n")
    settings = (
        *(f"APT::Architecture={architecture}", f"APT::Architectures={architecture}", "APT::Sandbox::User=root"),
        *("Acquire::Languages=none", f"Dir::Etc::SourceList={apt}/sources.list", "Dir::Etc::SourceParts=-"),
        *(f"Dir::State={apt}", f"Dir::State::Lists={apt}/lists", f"Dir::State::Status={apt}/status"),
        *(f"Dir::Cache={apt}/cache", f"Dir::Cache::Archives={apt}/cache/archives"),
    )
    options = [word for setting in settings for word in ("-o", setting)]
    run("apt-get", *options, "-q", "update")
    debs = apt / f"debs-{architecture}"
    debs.mkdir(exist_ok=True)
    run("apt-get", *options, "-q", "download", *packages, cwd=debs)
    for deb in debs.glob("*.deb"):
        run("dpkg-deb", "-x", deb, folder)
    shutil.rmtree(debs)


def script(path: Path, text: str) -> Path:
    """Write a program for the shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def install_wheels() -> None:
    """Install PyTorch and pytest for Arm beside each other."""
    tags = [word for name in ("2_28", "2_27", "2_17") for word in ("--platform", f"manylinux_{name}_aarch64")]
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.11", *tags, "--target", SITE)
    run(sys.executable, "-m", "pip", "install", *options, *WHEELS)


def build_wheel() -> Path:
    """The wheel for Arm, cross-compiled."""
    once(HOST, HOST_PACKAGES, lambda: unpack("amd64", HOST_PACKAGES, HOST))
    once(SITE, WHEELS, install_wheels)
    # Anew, but for the objects, which are compiled again only where a file has changed.
    for path in (*SOURCE.glob("*"), *SOURCE.glob("build/*")):
        if path.name not in ("build", "native"):
            shutil.rmtree(path, ignore_errors=True)
    unwanted = shutil.ignore_patterns("_native*", "_build.json", "__pycache__")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, SOURCE / part, ignore=unwanted)
        else:
            shutil.copy2(ROOT / part, SOURCE / part)
    libraries = f"{HOST}/usr/lib/x86_64-linux-gnu:{HOST}/lib/x86_64-linux-gnu"
    compiler = f'exec {HOST}/usr/bin/{TRIPLE}-g++-12 --sysroot={HOST} "$@"'
    environment = {
        **os.environ,
        "CXX": str(script(FOLDER / "c++", f"LD_LIBRARY_PATH={libraries} {compiler}")),
        "CEIT_KERNELS_CUDA": "0",
        "PYTHONPATH": str(SITE),  # whose PyTorch is compiled for
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    }
    options = ("--quiet", "--no-deps", "--no-build-isolation", "-w", FOLDER / "dist")
    shutil.rmtree(FOLDER / "dist", ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", *options, SOURCE, env=environment)
    (wheel,) = (FOLDER / "dist").glob("*.whl")
    return wheel


def parts(wheel: Path, arguments: Sequence[str]) -> list[Part]:
    """The tests of what a wheel installs, or what pytest's arguments name of them."""
    once(TARGET, TARGET_PACKAGES, lambda: unpack("arm64", TARGET_PACKAGES, TARGET))
    shutil.rmtree(TESTED, ignore_errors=True)
    shutil.unpack_archive(wheel, TESTED, "zip")
    for part in ("tests", "pyproject.toml"):
        (TESTED / part).symlink_to(ROOT / part)
    emulator = f"{HOST}/usr/bin/qemu-aarch64-static -cpu neoverse-n1 -L {TARGET}"
    here = f'test "$PWD" = {ROOT} && cd {TESTED}'
    python = script(FOLDER / "python", f'{here}; exec {emulator} {TARGET}/usr/bin/python3.11 "$@"')
    # Processes that tests start are emulated too.
    (TESTED / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(python)!r}\n")
    environment = {"PYTHONPATH": f"{TESTED}:{SITE}", "PYTHONDONTWRITEBYTECODE": "1"}
    chosen = {name: ("-k", NOT_HERE, *(f"{KERNELS}/{test}" for test in tests)) for name, tests in TESTS.items()}
    return [
        Part(f"Arm, {name}", (*PYTEST, "-p", "no:cacheprovider", *of_part), environment, str(python))
        for name, of_part in ({"as asked": arguments} if arguments else chosen).items()
    ]


def main(arguments: Sequence[str]) -> int:
    """Build the wheel, and test or keep it; returns the exit status."""
    if arguments[:1] not in (["test"], ["wheel"]):
        print("usage: python .ci/arm.py test [PYTEST'S ARGUMENTS] | wheel", file=sys.stderr)
        return 2
    wheel = build_wheel()
    if arguments[0] == "test":
        return report(parts(wheel, arguments[1:]))
    (ROOT / "dist").mkdir(exist_ok=True)
    print(shutil.copy2(wheel, ROOT / "dist"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
