"""The one exception of the format: which rule of SPEC.md is broken, where, and by what."""


class FormatError(Exception):
    """Bytes or values that SPEC.md does not allow.

    rule: the rule's number in SPEC.md, "H3". message: what is wrong. where: the tensor or field
    it is about. expected, found: the two sides of a failed comparison, in words.
    """

    def __init__(
        self,
        rule: str,
        message: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        super().__init__(message)
        self.rule = rule
        self.message = message
        self.where = where
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)

    def __str__(self) -> str:
        place = "" if self.where is None else f"{self.where}: "
        sides = [
            f"{word} {side}"
            for word, side in (("expected", self.expected), ("found", self.found))
            if side is not None
        ]
        comparison = f" ({', '.join(sides)})" if sides else ""
        return f"{place}{self.message}{comparison} [rule {self.rule}]"
