"""What an erasure is asked for and what it would do, before any increment is made."""
