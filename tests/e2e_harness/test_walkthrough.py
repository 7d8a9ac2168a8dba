from pathlib import Path

import pytest
from hbm_e2e.images import PROJECT
from hbm_e2e.kubectl import CommandFailed
from hbm_e2e.tables import rows, samples
from hbm_e2e.walkthrough import Block, Shell, sh_blocks

PAGE = """\
# Page
```sh
echo before
```
## 1. First

```text
sh
```
```sh
echo one
echo two
```
## Second
```yaml
key: value
```
"""


def test_blocks_of_a_page_are_its_sh_blocks_under_their_headings(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert sh_blocks(page) == [
        Block("", "echo before\n"),
        Block("First", "echo one\necho two\n"),
    ]


def test_the_kubernetes_page_begins_with_an_installation_and_ends_with_its_removal() -> None:
    blocks = sh_blocks(PROJECT / "docs" / "kubernetes.md")
    assert blocks[0].text.startswith("helm install hbm ")
    assert blocks[-1].text.startswith("helm uninstall hbm ")


def test_a_variable_of_one_block_is_there_in_the_next(tmp_path: Path) -> None:
    shell = Shell(tmp_path, {"GIVEN": "given"})
    assert shell('NAME="two words"; echo $GIVEN\n') == "given\n"
    assert shell('echo "$NAME"\n') == "two words\n"


@pytest.mark.parametrize("text", ["false\necho on\n", "false | cat\n", "echo $MISSING\n"])
def test_a_block_fails_with_its_first_command(tmp_path: Path, text: str) -> None:
    with pytest.raises(CommandFailed):
        Shell(tmp_path, {})(text)


def test_a_blank_cell_of_a_table_is_blank() -> None:
    table = "NAME   READY   P99\nfirst  True    1.5\nsecond         \n"
    assert rows(table) == [
        {"NAME": "first", "READY": "True", "P99": "1.5"},
        {"NAME": "second", "READY": "", "P99": ""},
    ]


def test_samples_of_metrics() -> None:
    text = '# HELP a\n# TYPE a counter\na_total{child="admin"} 2.0\nb 1e-3\nc NaN\n'
    found = samples(text)
    assert found['a_total{child="admin"}'] == 2
    assert found["b"] == 0.001
