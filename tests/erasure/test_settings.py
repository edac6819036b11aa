from dataclasses import fields

from patch_spec import limits
from sepme_cli.erasure.settings import Settings
from sepme_cli.recipe import SETTINGS

#: Of numbers that there must be some of, that may be nothing, and that may be anything.
SOME = {"steps", "rank", "batch_size", "sampling_steps"}
ANY = {"seed", "threshold", "momentum", "start"}


def test_what_is_said_replaces_the_defaults() -> None:
    assert Settings.of({}) == Settings()
    assert Settings.of({"rank": 7, "lr": 0.5}) == Settings(rank=7, lr=0.5)


def test_what_a_recipe_may_say_of_each() -> None:
    allowed = Settings.allowed()
    names = [field.name for field in fields(Settings)]
    assert list(allowed) == names
    for name in names:
        one, default = allowed[name], getattr(Settings(), name)
        assert one.kind is type(default)
        assert one.least <= default <= one.most
        assert one.choices == ()
        nothing = -limits.SAFE_INTEGER if name in ANY else 0
        assert one.least == {"pictures": 2}.get(name, 1 if name in SOME else nothing), name
        most = {"rank": limits.RANK, "pruned_share": 1, "pruned_steps": 1}
        assert one.most == most.get(name, limits.SAFE_INTEGER), name
    assert SETTINGS["dtype"].kind is str
    assert SETTINGS["dtype"].choices == ("auto", "fp32", "fp16", "bf16")
