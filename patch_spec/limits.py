"""The numbers of SPEC.md, "Limits", each checked before memory is taken for what it limits."""

FORMAT_VERSION = 1

# The container, in bytes.
PATCH_HEADER_BYTES = 16 * 2**20
CHECKPOINT_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""
HEADER_PARTS = 2**22
"""Brackets that open, and commas: a parser takes up to a hundred bytes for each."""
TENSOR_NAME_BYTES = 1024
DIMENSIONS = 32

# Texts, in bytes of UTF-8.
CONCEPT_BYTES = 200
PROMPT_BYTES = 2000
WORD_BYTES = 64
"""Names of methods, settings and tools, and why an optimisation stopped."""
SLUG_LENGTH = 64
TARGET_BYTES = 255

# Counts.
INCREMENTS = 1024
PROMPTS = 4096
"""That stand for one concept."""
KEPT_PROMPTS = 65536
"""That a patch keeps: those of 1024 concepts that were taken out before, 64 of each."""
TARGETS = 1024
LAYERS = 2048
"""Of a base or a stack; and targets and layers of an increment: one of all of Stable Diffusion XL's
has a thousand."""
TEXT_ENCODERS = 4
SETTINGS = 64
WORST = 16
"""Words of a vocabulary that an increment changes most."""
STACK_ENTRIES = 1024

# Shapes and numbers.
RANK = 77
"""CLIP's token positions; the exactness of both products rests on it."""
WIDTH = 4096
"""The widest stream, T5-XXL's; the exactness of the operator product rests on it."""
OUT = 16384
LAYER_SIDE = 32768
"""Rows or columns of a layer: the products of a lora are exact whatever they are."""
EXPONENT = 64
"""Scales are powers of two from 2**-64 to 2**64."""
SAFE_INTEGER = 2**53 - 1
"""The largest magnitude of any number in a record (I-JSON, RFC 7493)."""
