"""Python's own structures and numpy's arrays, with whole numbers only, so that every run gives the same bits.

One line on standard input asks for a round; it answers with hashes, the same in every round, and a line ".".
"""

import hashlib
import random
import sys

import numpy

# Made once and read in every round: what is cold stays right too.
TABLE = numpy.random.Generator(numpy.random.PCG64(4711)).integers(0, 1 << 40, 3 << 20, dtype=numpy.int64)
NAMES = {f"name {number}": [number, str(number * 7)] for number in range(60_000)}


def structures(digest):
    """Dictionaries, lists, sets and strings: many small objects full of pointers."""
    rng = random.Random(42)
    pairs = [(rng.randrange(1 << 30), f"text {rng.randrange(1000)}") for _ in range(60_000)]
    pairs.sort()
    groups = {}
    for number, text in pairs:
        groups.setdefault(text, []).append(number)
    for text in sorted(groups):
        digest.update(f"{text}: {len(groups[text])} {sum(groups[text])}\n".encode())
    for text in list(groups)[::2]:
        del groups[text]
    digest.update(str(sum(len(numbers) for numbers in groups.values())).encode())
    distinct = {number % 5003 for number, _ in pairs}
    digest.update(f"{len(distinct)} {sum(distinct)}".encode())
    joined = "".join(text for _, text in pairs)
    digest.update(joined.encode())
    for name in sorted(NAMES):
        digest.update(f"{name}{NAMES[name]}".encode())


def arrays(digest):
    """Products, sorts and gathers; temporaries of some MiB come and go."""
    generator = numpy.random.Generator(numpy.random.PCG64(7))
    left = generator.integers(-1000, 1000, (240, 400), dtype=numpy.int64)
    right = generator.integers(-1000, 1000, (400, 240), dtype=numpy.int64)
    product = left @ right
    for _ in range(3):
        product = (left @ (right @ product.T % 9973)) % 9973
    digest.update(product.tobytes())
    numbers = generator.integers(0, 1 << 30, 300_000, dtype=numpy.int64)
    order = numpy.argsort(numbers, kind="stable")
    digest.update(numpy.sort(numbers)[::7].tobytes())
    digest.update(numpy.cumsum(numbers[order[::-1]])[::11].tobytes())
    digest.update(TABLE[numbers % len(TABLE)].sum().tobytes())
    digest.update(TABLE.sum().tobytes())
    blocks = [numpy.full(20_000, number, dtype=numpy.int32) for number in range(100)]
    digest.update(numpy.concatenate(blocks[::3])[::101].tobytes())


def main():
    for _ in sys.stdin:
        for part in (structures, arrays):
            digest = hashlib.sha256()
            part(digest)
            print(part.__name__, digest.hexdigest())
        print(".", flush=True)


main()
