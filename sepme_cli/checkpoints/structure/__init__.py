"""What a checkpoint is: dtypes, families, names, folders, headers."""
