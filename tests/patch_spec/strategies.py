"""What several property tests draw from."""

from hypothesis import strategies as st

from patch_spec.errors import FormatError
from patch_spec.text import clean_text


def _clean(text: str) -> str:
    try:
        return clean_text(text, 60)
    except FormatError:
        return "x"


texts = st.text(max_size=20).map(_clean)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
