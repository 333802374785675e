"""Random numbers, sorted, gathered, summed up: compare_numpy.py NUMBERS"""

import hashlib
import sys

import numpy

count = int(sys.argv[1])
rng = numpy.random.default_rng(5)
noise = rng.integers(0, 1 << 40, count, dtype=numpy.int64)
ordered = numpy.sort(noise)
sums = noise[::3].cumsum()
gathered = noise[rng.permutation(count)]
digest = hashlib.sha256()
for part in (ordered, sums, gathered, noise ^ gathered):
    digest.update(part.tobytes())
print(digest.hexdigest())
