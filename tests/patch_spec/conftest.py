import os

from hypothesis import settings

# Other processes share the machine; a slow moment is no failure.
settings.register_profile("patient", deadline=None)
# Of a mutant that needs luck to be found, nobody can say whether a test would notice it.
settings.register_profile("mutants", deadline=None, max_examples=20, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "patient"))
