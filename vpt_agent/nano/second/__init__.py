"""The shipped model's second version: all perception kinds, trained from scratch on a CPU."""
