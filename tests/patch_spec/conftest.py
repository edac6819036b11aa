from hypothesis import settings

# Other processes share the machine; a slow moment is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
