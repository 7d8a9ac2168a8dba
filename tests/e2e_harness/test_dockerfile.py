import pytest
from hbm_e2e import dockerfile
from hbm_e2e.errors import HarnessError
from hbm_e2e.images import PROJECT, TARGETS

MANY = """\
# head
ARG BASE=debian:12
FROM ${BASE} AS python
RUN one

FROM python AS small-build
RUN two
FROM python AS huge-build
RUN gigabytes
FROM python AS small
COPY --from=small-build /a /a
FROM python AS huge
COPY --chown=1 --from=huge-build /a /a
"""


def test_a_target_keeps_what_it_is_made_of_and_nothing_else() -> None:
    assert dockerfile.only(MANY, "small") == (
        "# head\nARG BASE=debian:12\n"
        "FROM ${BASE} AS python\nRUN one\n\n"
        "FROM python AS small-build\nRUN two\n"
        "FROM python AS small\nCOPY --from=small-build /a /a\n"
    )
    assert "gigabytes" in dockerfile.only(MANY, "huge")


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(HarnessError, match=r"no target 'smal' .*small-build"):
        dockerfile.only(MANY, "smal")


@pytest.mark.parametrize("target", TARGETS)
def test_the_projects_targets_do_not_build_the_server(target: str) -> None:
    text = (PROJECT / "images" / "Dockerfile").read_text()
    pruned = dockerfile.only(text, target)
    assert f" AS {target}\n" in pruned
    assert "server-dependencies" in text
    assert "server-dependencies" not in pruned


def test_what_a_dockerfile_copies_out_of_its_context_is_known() -> None:
    text = "FROM a AS b\nCOPY two one ./\nCOPY --chown=1 three/ /\nCOPY --from=b /x /y\nADD one /\n"
    assert dockerfile.sources(text) == ["one", "three/", "two"]


def test_an_edit_of_one_room_builds_only_the_images_that_hold_it() -> None:
    text = (PROJECT / "images" / "Dockerfile").read_text()
    holding = {
        room: {t for t in TARGETS if room in dockerfile.sources(dockerfile.only(text, t))}
        for room in ("operator", "router", "sidecar", "policy", "serving", "README.md")
    }
    assert holding == {
        "operator": {"operator"},
        "router": {"router"},
        "sidecar": {"sidecar"},
        "policy": {"sidecar"},
        "serving": set(),
        "README.md": set(),
    }
