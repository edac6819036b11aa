from dataclasses import fields

from patch_spec import limits
from sepme_cli.erasure.settings import OF_PRUNING, Settings
from sepme_cli.recipe import SETTINGS

#: Of numbers that there must be some of, that may be nothing, and that may be anything.
SOME = {"steps", "rank", "batch_size", "sampling_steps", "robust_rounds"}
ANY = {"seed", "threshold", "momentum", "start"}


def test_what_is_said_replaces_the_defaults() -> None:
    assert Settings.of({}) == Settings()
    assert Settings.of({"rank": 7, "lr": 0.5}) == Settings(rank=7, lr=0.5)


def test_what_older_patches_do_not_record_is_recorded_where_it_says_something() -> None:
    plain, robust = Settings(rank=3), Settings(rank=3, robust="both")
    assert plain.recorded["rank"] == 3
    assert robust.recorded == {**plain.recorded, "robust": "both", "robust_rounds": 1}
    newer = {"robust", "robust_rounds", *OF_PRUNING}
    assert set(plain.recorded) == {f.name for f in fields(Settings)} - newer
    assert [Settings(robust=r).derived_rounds for r in ("none", "phrasings", "embeddings")] == [
        0, 0, 1,
    ]  # fmt: skip


def test_what_a_recipe_may_say_of_each() -> None:
    allowed = Settings.allowed()
    names = [field.name for field in fields(Settings)]
    assert list(allowed) == names
    for name in names:
        one, default = allowed[name], getattr(Settings(), name)
        assert one.kind is type(default)
        if one.kind is str:
            assert default in one.choices
            continue
        assert one.least <= default <= one.most
        assert one.choices == ()
        nothing = -limits.SAFE_INTEGER if name in ANY else 0
        assert one.least == {"pictures": 2}.get(name, 1 if name in SOME else nothing), name
        most = {"rank": limits.RANK, "robust_rounds": 3, "pruned_share": 1, "pruned_steps": 1}
        assert one.most == most.get(name, limits.SAFE_INTEGER), name
    assert SETTINGS["dtype"].kind is str
    assert SETTINGS["dtype"].choices == ("auto", "fp32", "fp16", "bf16")
