import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hbm_e2e import requirements
from hbm_e2e.errors import HarnessError, ToolMissing
from hbm_e2e.places import PACKAGE_ROOT
from hbm_e2e.toolchain import MODULES, PROGRAMS, GoModule, Toolchain


def test_every_program_is_pinned_in_a_module_with_checksums() -> None:
    for module in MODULES:
        pins = (module.folder / "go.mod").read_text()
        assert pins.startswith(f"module hbm-partition/e2e/{module.name}\n")
        assert "replace" not in pins
        if "require" in pins:
            assert (module.folder / "go.sum").stat().st_size > 0


def test_programs_report_the_pinned_version() -> None:
    version = Toolchain().kubernetes_version()
    assert version.startswith("v1.35.")
    (link,) = (flag for flag in MODULES[0].flags() if "gitVersion" in flag)
    assert f"gitVersion={version}" in link
    assert "gitMajor=1 " in link
    assert link.endswith("gitMinor=35")


def test_a_changed_pin_is_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = GoModule("pause", {"pause": "."})
    before = module.digest()
    shutil.copytree(module.folder, tmp_path / "pause")
    with (tmp_path / "pause" / "go.mod").open("a") as pins:
        pins.write("// changed\n")
    monkeypatch.setattr("hbm_e2e.toolchain.TOOLS", tmp_path)
    assert module.digest() != before


def test_what_is_not_built_is_said_with_the_command_that_builds_it(tmp_path: Path) -> None:
    toolchain = Toolchain(tmp_path)
    assert toolchain.missing() == list(PROGRAMS)
    with pytest.raises(ToolMissing, match=r"kubelet is not built: run .* -m hbm_e2e build"):
        toolchain.path("kubelet")
    with pytest.raises(HarnessError, match="no such program: kubelt"):
        toolchain.build(["kubelt"])


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
def test_two_builds_at_once_make_one_program(tmp_path: Path) -> None:
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        for build in [
            pool.submit(Toolchain(tmp_path).build, ["pause"], said.append) for _ in range(2)
        ]:
            build.result()
    assert len(said) == 1
    program = Toolchain(tmp_path).path("pause")
    assert program.stat().st_mode & stat.S_IXUSR
    with subprocess.Popen([program]) as pause:
        pause.terminate()
        assert pause.wait(20) in (0, -15)


def test_missing_debian_packages_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(requirements.PACKAGES, "no-such-program", "its-package")
    monkeypatch.setitem(requirements.PACKAGES, "no-such-program-either", "its-package")
    assert requirements.missing_packages().count("its-package") == 1


def test_the_command_line_says_in_one_line_that_nothing_is_up(tmp_path: Path) -> None:
    environ = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(PACKAGE_ROOT),
        "HBM_E2E_NAME": "nowhere",
    }
    result = subprocess.run(
        [sys.executable, "-m", "hbm_e2e", "status"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "cluster nowhere is not up\n"
