"""What the test vectors are made from: examples that are right, and cases that break one rule."""
