"""Files as a careful program reads and writes them, whatever is in them."""
