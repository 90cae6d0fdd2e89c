"""Which of two models replies better, by a third that reads both replies in both orders."""
