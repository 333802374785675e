"""A large dict of lists and a large list, read and changed first in order, then at random: compare_dict.py ENTRIES"""

import hashlib
import random
import sys

count = int(sys.argv[1])
rng = random.Random(7)
entries = {}
numbers = []
for index in range(count):
    entries["key%d" % index] = [index, "value %d" % (index * 7919 % count)]
    numbers.append(index * 3.5)
digest = hashlib.sha256()
for turn in range(3):
    for step in range(count // 4):
        index = step if turn == 0 else rng.randrange(count)
        entry = entries["key%d" % index]
        entry[0] += 1
        numbers[index] += entry[0]
    digest.update(repr(sum(numbers)).encode())
for key, entry in entries.items():
    digest.update(("%s%d%s" % (key, entry[0], entry[1])).encode())
print(digest.hexdigest())
