"""Recipes on the command line: where they are written, and what becomes of them."""

from pathlib import Path

import pytest

from patch_spec.container import read_patch
from sepme_cli.recipe import TEMPLATE
from tests.cli.conftest import Run

POLICY = """
version: 1
concepts: [{name: ink, kind: style, aliases: [sumi]}]
settings: {rank: 3, ridge: 0.3}
"""


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text(POLICY)
    return tmp_path / "policy.yaml"


@pytest.mark.parametrize("line", ["recipe init", "recipe init -"])
def test_a_new_recipe_goes_to_standard_output(line: str, sepme: Run) -> None:
    assert sepme(*line.split(), "-q").out.decode() == TEMPLATE


def test_or_to_a_file(policy: Path, sepme: Run) -> None:
    assert sepme("recipe", "init", "new.yaml").status == 0
    assert policy.with_name("new.yaml").read_text() == TEMPLATE


def test_a_patch_is_named_after_its_recipe_and_says_so(
    policy: Path, small_model: Path, sepme: Run
) -> None:
    digest = sepme("recipe", "check", policy, "--json").json["digest"]
    made = sepme("erase", small_model, "--recipe", "policy.yaml", "--json").json
    assert (made["patch"], made["recipe"]) == ("policy.sepme", digest)
    assert digest in sepme("inspect", "policy.sepme", "-v").out.decode()


def test_options_override_the_settings_of_a_recipe_and_defaults_do_not(
    policy: Path, small_model: Path, sepme: Run
) -> None:
    def settings(*options: str) -> dict[str, object]:
        done = sepme("erase", small_model, "--recipe", policy, "-f", *options)
        assert done.status == 0
        (part,) = read_patch(Path("policy.sepme")).increments
        return dict(part.method.settings)

    plain, overridden = settings(), settings("--rank", "16", "--seed", "0")
    assert (plain["rank"], plain["ridge"]) == (3, 0.3)
    assert overridden == {**plain, "rank": 16}


def test_a_complaint_names_the_line(policy: Path, sepme: Run) -> None:
    policy.write_text("version: 1\nconcepts: [ink]\nsettings: {rank: 0}\n")
    assert sepme("recipe", "check", "policy.yaml").err.startswith("error: policy.yaml:3: ")


def test_a_check_writes_nothing_and_has_its_fields(
    policy: Path, small_model: Path, sepme: Run
) -> None:
    line = ("erase", small_model, "--recipe", policy, "--protect-neighbours", 2, "--check")
    found = sepme(*line, "--json").json
    assert found.keys() == {
        "method", "base", "recipe", "width", "concepts", "crowded", "interference",
        "collateral", "protection", "strengths", "refused", "expected_seconds", "warnings",
    }  # fmt: skip
    (concept,) = found["concepts"]
    assert concept.keys() == {
        "concept", "taken_for", "slug", "rank", "like", "separability", "leakage", "taken",
        "neighbours", "aliases", "nearly", "drags", "collateral", "reachability",
    }  # fmt: skip
    assert {drag.keys() == {"word", "kind", "change"} for drag in concept["drags"]} == {True}
    said = sepme(*line).out.decode()
    assert "writes nothing" in said
    assert all(word in said for word in concept["neighbours"])
    assert [path.name for path in policy.parent.iterdir()] == ["policy.yaml"]
