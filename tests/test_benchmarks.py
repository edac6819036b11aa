"""The documents say what the measurements say, and the measurements are what they claim to be."""

from itertools import chain
from pathlib import Path

import pytest

from benchmarks import bare, comparison, document, real_model, rounds
from benchmarks.english import OBJECT_NAMES, STYLE_NAMES, English, probes

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
        "benchmarks.bare table",
        "benchmarks.bare table",
        "benchmarks.bare synonyms",
        "benchmarks.bare many-table",
        "benchmarks.rounds table",
        "benchmarks.attacked beside",
        "benchmarks.doors table",
        "benchmarks.encoders table",
        "benchmarks.sequence table",
        "benchmarks.memorised table",
        "benchmarks.speed table",
        "benchmarks.large table",
        "benchmarks.t5 table",
        "benchmarks.attacked table",
    ]


@pytest.mark.usefixtures("at_root")
def test_a_stale_block_is_filled_anew_and_the_rest_is_left_alone() -> None:
    block = "before\n<!-- python -m benchmarks.bare table -->\n{}<!-- end -->\nafter\n"
    found = document.refreshed(block.format("| stale |\n"))
    assert "stale" not in found
    assert "| erased |" in found
    assert found.startswith("before\n<!--")
    assert found.endswith("<!-- end -->\nafter\n")
    assert document.refreshed(found) == found == document.refreshed(block.format(""))


def test_what_defaults_were_chosen_on_is_not_reported() -> None:
    assert not {*bare.CHOSEN_ON} & {*bare.order()}
    assert len(bare.order()) == len(STYLE_NAMES) + len(OBJECT_NAMES) - len(bare.CHOSEN_ON)
    reported = {name for sets in rounds.states().values() for names in sets for name in names}
    assert reported.isdisjoint(chain.from_iterable(rounds.tuning()))
    assert {len(names) for sets in rounds.states().values() for names in sets} == {1, 10, 50, 100}


@pytest.mark.parametrize("names", [("cat",), ("woodcut",), ("woodcut", "cat", "dog", "lion")])
@pytest.mark.usefixtures("at_root")
def test_only_what_is_erased_is_named_where_it_is_looked_for(names: tuple[str, ...]) -> None:
    shown = probes(names, English())
    for part, captions in shown.items():
        assert captions or (part == "near" and names == ("woodcut",))
        for one in captions:
            assert any(one.names(name) for name in names) == (part in ("erased", "unseen"))
            said = one.text.lower()
            assert STYLE_NAMES[one.style] in said and OBJECT_NAMES[one.object] in said
    seeds = [one.seed for one in shown["erased"]]
    assert len({*seeds}) == len(seeds)


def test_a_score_is_low_where_one_thing_is_lost() -> None:
    def row(erased: int, near: int, style: int) -> dict[str, list[int]]:
        counts = {
            "erased object": (erased, 8),
            "near object": (near, 10),
            "others style": (style, 9),
        }
        before = {f"{key}, before": [n, n] for key, (_, n) in counts.items()}
        return {key: [hits, n] for key, (hits, n) in counts.items()} | before

    assert rounds.score(row(0, 10, 9)) == pytest.approx(1)
    assert rounds.score(row(4, 10, 9)) == pytest.approx(0.75)
    assert rounds.score(row(0, 0, 9)) == pytest.approx(0, abs=1e-6)
    assert rounds.score(row(8, 10, 9)) == pytest.approx(0, abs=1e-6)


def test_what_is_kept_moves_by_what_its_weights_move_it() -> None:
    bench = comparison.Bench()
    caption = comparison.JUDGED.asked(("ink",))[0][-1:]
    weights = dict(bench.model.denoiser.stored_weights())
    assert bench.moved(weights, caption) == 0.0
    name = next(iter(weights))
    before = weights[name].clone()
    assert bench.moved({name: weights[name] * 2}, caption) > 0.1
    assert bench.model.denoiser.network.get_parameter(name).equal(before.float()), "put back"


@pytest.mark.slow
@pytest.mark.usefixtures("at_root")
def test_ones_own_model_is_measured_as_the_canvas_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that the README names, on the canvas with the canvas's judge."""
    line = (
        "real_model examples/english-sd.safetensors --judge examples:judge --styles woodcut "
        "--objects cat --pictures 2 --steps 4 --guidance 3 --beside 1 --out"
    )
    monkeypatch.setattr("sys.argv", [*line.split(), str(tmp_path / "out")])
    real_model.main()
    told = capsys.readouterr().out
    assert "pictures on cpu in fp32: about" in told
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.strip() in told
    rows = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("|")}
    assert {"erased", "erased, unseen phrasings", "woodcut", "cat"} <= rows.keys()
    before, after = rows["cat"].split("|")[2:4]
    assert float(after.strip(" %")) < float(before.strip(" %"))
    for name in ("woodcut", "cat"):
        assert (tmp_path / "out" / f"{name}.sepme").exists()
        assert (tmp_path / "out" / name / "report.html").exists()
