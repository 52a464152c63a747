"""Build entry point; the metadata is in pyproject.toml, what is compiled and why in csrc/native_build.py."""

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))

from native_build import BuildError, Plan, build, decide  # noqa: E402

BUILDS = {"bdist_wheel", "build", "build_ext", "build_py", "develop", "editable_wheel", "install"}
record: dict[str, object] = {}


def say(message: str) -> None:
    """Print a line that pip shows with -v."""
    print(f"ceit_kernels: {message}", flush=True)


def planned() -> Plan:
    """The plan, if this run of setup.py builds anything."""
    if not BUILDS.intersection(sys.argv):
        return Plan("none", "nothing is built")
    try:
        plan = decide()
    except BuildError as error:
        sys.exit(f"ceit_kernels: {error}")
    say(f"building {plan.describe()}")
    record.update(kind=plan.kind, reason=plan.reason)
    return plan


PLAN = planned()


class BuildNative(build_ext):
    """Compiles with ninja; where that fails and nobody insisted on CUDA, goes on as pure Python."""

    def build_extension(self, ext: Extension) -> None:
        """Write the library where setuptools wants it."""
        try:
            seconds = build(PLAN, Path(self.get_ext_fullpath(ext.name)), ROOT / "build" / "native")
        except BuildError as error:
            if os.environ.get("CEIT_KERNELS_CUDA") == "1":
                sys.exit(f"ceit_kernels: {error}")
            say(f"{error}\nceit_kernels: going on without compiled code; CEIT_KERNELS_CUDA=1 makes this an error")
            record.update(kind="none", reason=str(error).splitlines()[0] + " pip install -v shows more")
            return
        say(f"compiled in {seconds:.0f} s")
        record.update(reason=f"{PLAN.describe()}, compiled in {seconds:.0f} s")

    def get_ext_filename(self, fullname: str) -> str:
        """One name for every Python: the library uses no Python API."""
        return str(Path(*fullname.split("."))) + ".abi3.so"

    def copy_extensions_to_source(self) -> None:
        """Leave out, for an editable installation, what did not compile."""
        if record.get("kind") != "none":
            super().copy_extensions_to_source()


class BuildPython(build_py):
    """Also leaves a record of what was built, which ``ceit_kernels.status()`` reads."""

    def run(self) -> None:
        """Compile before the record is written."""
        super().run()
        if PLAN.kind != "none":
            self.run_command("build_ext")
        folder = ROOT / "ceit_kernels" if self.editable_mode else Path(self.build_lib) / "ceit_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(record))


setup(
    ext_modules=[Extension("ceit_kernels._native", [], py_limited_api=True)] if PLAN.kind != "none" else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if PLAN.kind != "none" else {},
)
