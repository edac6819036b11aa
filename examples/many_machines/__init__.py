"""Work of sepme spread over machines."""
