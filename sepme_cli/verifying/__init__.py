"""Whether what files say of themselves is true."""
