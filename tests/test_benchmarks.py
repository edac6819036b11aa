"""The documents say what the measurements say, and the measurements are what they claim to be."""

from itertools import chain
from pathlib import Path

import pytest

from benchmarks import ablations, comparison, document
from benchmarks.plots import Panel, small_multiples
from benchmarks.scenes import CONCEPTS, SCENES, State, captions, states
from benchmarks.scenes_table import role, table

ROOT = Path(__file__).parent.parent


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", document.DOCUMENTS, ids=str)
@pytest.mark.usefixtures("at_root")
def test_a_document_says_what_the_results_say(path: Path) -> None:
    text = path.read_text()
    assert document.refreshed(text) == text, "run python -m benchmarks.results"


def test_the_documents_hold_every_table() -> None:
    said = list(chain.from_iterable(document.commands(p.read_text()) for p in document.DOCUMENTS))
    assert said == [
        "benchmarks.comparison summary",
        "benchmarks.alone table",
        "benchmarks.comparison table",
        "benchmarks.scenes table",
        "benchmarks.ablations table closed-form",
        "benchmarks.ablations table sepme",
        "benchmarks.scale table",
    ]


@pytest.mark.usefixtures("at_root")
def test_a_stale_block_is_filled_anew_and_the_rest_is_left_alone() -> None:
    block = "before\n<!-- python -m benchmarks.alone table -->\n{}<!-- end -->\nafter\n"
    found = document.refreshed(block.format("| stale |\n"))
    assert "stale" not in found
    assert "| erased |" in found
    assert found.startswith("before\n<!--")
    assert found.endswith("<!-- end -->\nafter\n")
    assert document.refreshed(found) == found == document.refreshed(block.format(""))


def test_concepts_go_and_come_as_a_scene_says() -> None:
    labels = [state.label for state in states("4")]
    assert labels == [
        *(":", "123:123", "123+45:12345", "123+45:235"),
        *("123+45+6:2356", "123+45+6:12356"),
    ]


def test_the_same_choice_of_the_same_increments_is_drawn_once() -> None:
    made_later = State(patches=((1, 2), (3, 4)), out=(1,))
    assert made_later.label == State(patches=((1, 2),), out=(1,)).label == "12:1"
    together, apart = State(((1, 2, 3, 4),), (1, 2, 3, 4)), State(((1, 2), (3, 4)), (1, 2, 3, 4))
    assert together.label != apart.label
    assert State(((1, 2),), ()).label == State().label


@pytest.mark.parametrize("scene", SCENES)
def test_every_scene_touches_six_concepts_and_no_more(scene: str) -> None:
    touched = {number for state in states(scene) for number in state.out}
    assert touched == {1, 2, 3, 4, 5, 6}
    assert {kind: len(names) for kind, names in CONCEPTS.items()} == {"style": 8, "object": 9}


def test_every_concept_of_a_scene_is_drawn_equally_often() -> None:
    for kind, pictures in (("style", 16), ("object", 8)):
        asked = captions(kind)
        assert {sum(c.names(name) for c in asked) for name in CONCEPTS[kind]} == {pictures}


def test_a_concept_is_restored_only_after_it_was_out() -> None:
    outs = [[], ["a"], ["b"], ["a"]]
    assert [role("a", t, outs) for t in range(4)] == ["regular", "erased", "restored", "erased"]
    assert [role("b", t, outs) for t in range(4)] == ["regular", "regular", "erased", "restored"]


def test_a_scene_reads_like_the_papers_table() -> None:
    def found(a: int, b: int, moved: float) -> dict[str, dict[str, object]]:
        return {"recognised": {"b": [b, 8], "a": [a, 8]}, "pixels": {"a": moved, "b": 0.25}}

    text = table(
        "T", ["a", "b"], [[], ["a"], []], [found(8, 8, 0), found(1, 8, 50), found(6, 8, 2)]
    )
    lines = text.splitlines()
    assert lines[2:6] == [
        "|  | before | out: a | back: a |",
        "|---|---|---|---|",
        "| a | 100 | **12** | *75* (2.00) |",
        "| b | 100 | 100 | 100 |",
    ]
    assert lines[6].startswith("| all erased |  | 12.5% [")
    assert lines[7].endswith("of 8 (2.00) |")


@pytest.mark.parametrize(
    ("method", "name"), [(m, name) for m, names in ablations.ABLATIONS.items() for name in names]
)
def test_an_ablation_has_its_default_and_shares_its_row(method: str, name: str) -> None:
    default = ablations.default_of(method, name)
    values = ablations.ABLATIONS[method][name]
    assert default in values
    keys = [ablations.key(method, name, value, "five") for value in values]
    assert len(set(keys)) == len(values)
    assert [key for key in keys if "/default/" in key] == [keys[values.index(default)]]
    first = next(iter(ablations.ABLATIONS[method]))
    plain = ablations.default_of(method, first)
    assert ablations.key(method, first, plain, "five") == keys[values.index(default)]


def test_defaults_are_not_chosen_by_what_methods_are_compared_by() -> None:
    compared = set(chain.from_iterable(comparison.STATES.values()))
    assert compared.isdisjoint(chain.from_iterable(ablations.STATES.values()))


def test_small_multiples_are_one_picture(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    panel = Panel("rank", ["1", "2"], {"erased": [50.0, float("nan")]}, marked=1)
    other = Panel("", ["1", "2"], {"moved": [1.0, 2.0], "erased": [0.0, 0.0]})
    small_multiples([[panel, other], [panel]], file, labels=["%", "of 255"])
    assert file.read_bytes().startswith(b"\x89PNG")


def test_what_is_kept_moves_by_what_its_weights_move_it() -> None:
    bench = comparison.Bench()
    caption = comparison.JUDGED.asked(("ink",))[0][-1:]
    weights = dict(bench.model.stored_weights())
    assert bench.moved(weights, caption) == 0.0
    name = next(iter(weights))
    before = weights[name].clone()
    assert bench.moved({name: weights[name] * 2}, caption) > 0.1
    assert bench.model.unet.get_parameter(name).equal(before.float()), "put back"
