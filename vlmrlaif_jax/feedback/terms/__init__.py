"""Terms of a reward: samples, functions, built-in rules and their combination."""
