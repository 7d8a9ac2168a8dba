"""The commands of a document, run as a reader runs them: from top to bottom, in one shell."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hbm_e2e.errors import HarnessError
from hbm_e2e.kubectl import CommandFailed

_HEADING = re.compile(r"^## (?:\d+\. )?(?P<title>.+)$")
_FENCE = re.compile(r"^```(?P<language>\w*)\s*$")


@dataclass(frozen=True)
class Block:
    """One `sh` block of a page, with the `##` heading it stands under (without its number)."""

    chapter: str
    text: str


def sh_blocks(page: Path) -> list[Block]:
    """All `sh` blocks of a Markdown page, in order."""
    blocks: list[Block] = []
    chapter = ""
    language: str | None = None
    lines: list[str] = []
    for line in page.read_text().splitlines():
        fence = _FENCE.match(line)
        if language is None:
            heading = _HEADING.match(line)
            if heading:
                chapter = heading["title"]
            elif fence:
                language, lines = fence["language"], []
        elif fence:
            if language == "sh":
                blocks.append(Block(chapter, "\n".join(lines) + "\n"))
            language = None
        else:
            lines.append(line)
    return blocks


class Shell:
    """bash in a folder. Variables set by one block are there in the next, as at a prompt."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._environ = {**os.environ, **environ}
        self._variables = folder / ".variables"

    def __call__(self, text: str, timeout_s: float = 420) -> str:
        """What the commands print; the first that fails ends it with `CommandFailed`."""
        remembered = f'[ ! -f "{self._variables}" ] || . "{self._variables}"'
        script = (
            f'set -euo pipefail\n{remembered}\nset -a\n{text}\nexport -p > "{self._variables}"\n'
        )
        try:
            result = subprocess.run(
                ["bash", "-c", script],
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode(errors="replace") if error.stdout else ""
            raise HarnessError(f"{text}took longer than {timeout_s:g} s: {said}") from error
        if result.returncode:
            raise CommandFailed([text], result.returncode, result.stdout)
        return result.stdout


def programs(folder: Path, **paths: Path | str) -> Path:
    """A folder for PATH in which each program has the name that documents use."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(shutil.which(path) or path)
    return folder
