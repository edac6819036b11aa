"""One thin file a command: parse, call one operation, render. Operations are imported when run."""
