"""What the documents show is what the software does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def blocks(document: str, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_integration_guide_runs() -> None:
    code = "\n".join(blocks("docs/integrate-your-server.md", "python"))
    assert "set_target_alpha" in code
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_plan_of_the_guide_runs() -> None:
    (command,) = [
        line
        for block in blocks("docs/integrate-your-server.md", "")
        for line in block.splitlines()
        if line.startswith("hbm ")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "hbm_cli.main", *shlex.split(command)[1:]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
    for named in re.findall(r"`(docs/[\w./-]+)`", text):
        assert (ROOT / named).exists(), f"{document.name} names {named}"


def test_every_command_has_a_short_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hbm_cli.main", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for command in ("bench", "demo", "explain", "plan", "router", "serve", "sidecar", "sweep"):
        line = re.search(rf"^  {command} +(\S.*)$", done.stdout, flags=re.MULTILINE)
        assert line, f"{command} is missing or says nothing"


def shown_commands() -> list[str]:
    """Command lines of ours in fenced blocks and in running text, comments and `$` left out."""
    found = set()
    for document in DOCUMENTS:
        text = document.read_text()
        fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        for line in lines:
            command = re.search(r"(?:^|-- )((?:hbm|make|python -m hbm_\w+)(?: .*|$))", line.strip())
            if command and not command[1].split()[-1].isupper():  # `hbm bench NAME`
                found.add(re.split(r"\s+(?:#|>|2>|\|)\s*", command[1])[0].strip())
    return sorted(found)


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_that_is_shown_exists(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With `--help` at its end it says so when it knows all that stands before."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert not [word for word in words[1:] if "=" not in word and word not in targets]
        return
    from hbm_cli.main import main as hbm
    from hbm_load.cli import app as load

    run = hbm if words[0] == "hbm" else load
    arguments = words[1:] if words[0] == "hbm" else words[3:]
    monkeypatch.setattr(sys, "argv", [words[0], *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        run()
    out, err = capfd.readouterr()
    assert ended.value.code in (0, None), err
    assert "Usage:" in out
