"""Beginnings of Python code and prose, of which servers are asked for greedy continuations."""

PROMPTS = [
    "The import statement",
    "class Queue:\n    def __init__(self",
    "def main():\n    parser = argparse.ArgumentParser(",
    "Raised when an operation",
    "A list comprehension consists of",
    "    @property\n    def name(self):\n",
    "If the file cannot be",
    '"""Utilities for',
]
