"""A client of redis-server on a Unix socket: redis_client.py SOCKET FOLDER, or with --loaded after them.

One line on standard input asks for a round: keys of every type are written, saved by a forked child in the middle, changed, deleted
and read back, while redis-benchmark works beside. It answers with hashes, the same in every round, and a line ".".

--loaded: the server has loaded what the last round saved; a round reads it. At the end of its input it shuts the server down.
"""

import hashlib
import re
import socket
import subprocess
import sys

KEPT = 10_000
KEYS = 24_000
BATCH = 1_000


class Server:
    """One connection. Commands are sent in batches, then their answers are read."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.answers = self.socket.makefile("rb", 1 << 16)

    def ask(self, commands):
        """The answers, in order. An error answer ends the program."""
        commands = list(commands)
        for first in range(0, len(commands), BATCH):
            batch = commands[first : first + BATCH]
            self.socket.sendall(b"".join(map(encoded, batch)))
            for _ in batch:
                yield self.answer()

    def all(self, *commands):
        return list(self.ask(commands))

    def answer(self):
        line = self.answers.readline()
        kind, rest = line[:1], line[1:-2]
        if kind in (b"+", b":"):
            return rest
        if kind == b"$":
            length = int(rest)
            return None if length < 0 else self.answers.read(length + 2)[:-2]
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        sys.exit(f"the server answered {line!r}")


def encoded(command):
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in command]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def text(index, length):
    """Bytes that only this index has."""
    return (b"%x." % (index * 0x9E3779B97F4A7C15 % (1 << 64)) * (length // 4 + 1))[:length]


def written(prefix, index):
    """Commands that make one key; its type goes by its index."""
    key, many = f"{prefix}:{index}", range(index % 23 + 1)
    kind = index % 8
    if kind < 3:
        length = 20_000 if index % 128 == 0 else 16 + index * 37 % 700
        return [("SET", key, text(index, length))]
    if kind == 3:
        return [("RPUSH", key, *(text(index + one, 24) for one in many))]
    if kind == 4:
        return [("HSET", key, *(part for one in many for part in (f"field {one}", text(index ^ one, 30))))]
    if kind == 5:
        return [("SADD", key, *(index * one % 1009 for one in many))]
    if kind == 6:
        return [("ZADD", key, *(part for one in many for part in (index * one % 997, f"member {one}")))]
    return [("SETBIT", key, index % 9000, 1), ("APPEND", key, f"end {index}")]


def changed(index):
    """Commands that change, replace or delete one key of a round."""
    key, kind = f"r:{index}", index % 8
    if index % 11 == 0:
        return ("DEL", key)
    if index % 13 == 0:
        return ("SET", key, f"replaced {index}")
    changes = [("APPEND", key, " longer" * 9), ("SETRANGE", key, 5, "inside"), ("GETSET", key, text(index + 1, 300))]
    changes += [("LSET", key, 0, f"first {index}"), ("HSET", key, "field 0", "changed", "new", index)]
    changes += [("SADD", key, "one more"), ("ZINCRBY", key, 1.5, "member 0"), ("SETBIT", key, 20_000, 1)]
    return changes[kind]


def hashed(server, prefix, count):
    """A hash of all keys that a prefix has."""
    keys = [f"{prefix}:{index}" for index in range(count)]
    kinds = list(server.ask(("TYPE", key) for key in keys))
    readers = {
        b"string": lambda key: ("GET", key),
        b"list": lambda key: ("LRANGE", key, 0, -1),
        b"hash": lambda key: ("HGETALL", key),
        b"set": lambda key: ("SMEMBERS", key),
        b"zset": lambda key: ("ZRANGE", key, 0, -1, "WITHSCORES"),
        b"none": lambda key: ("GET", key),
    }
    digest = hashlib.sha256()
    answers = server.ask(readers[kind](key) for kind, key in zip(kinds, keys))
    for kind, key, answer in zip(kinds, keys, answers):
        # The order inside of a set or hash is the server's own.
        if kind == b"hash":
            answer = sorted(zip(answer[::2], answer[1::2]))
        if kind == b"set":
            answer = sorted(answer)
        digest.update(f"{key} {kind} {answer}\n".encode())
    return digest.hexdigest()


def saving(server):
    state = server.all(("INFO", "persistence"))[0].decode()
    if re.search("rdb_last_bgsave_status:(.*)\r", state)[1] != "ok":
        sys.exit(f"the forked child failed to save: {state}")
    return "rdb_bgsave_in_progress:1" in state


def output(command):
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode != 0:
        sys.exit(f"{command} ended with {ended.returncode}: {ended.stdout}")
    return ended.stdout


def play(server, path, folder):
    load = ["redis-benchmark", "-s", path, "--dbnum", "1", "-q", "-P", "16", "-c", "20", "-n", "4000", "-r", "1000"]
    load = subprocess.Popen(load + ["-t", "set,get,incr,lpush,lpop,sadd,hset,zadd,mset"], stdout=subprocess.DEVNULL)
    for _ in server.ask(command for index in range(KEYS) for command in written("r", index)):
        pass
    if load.wait() != 0:
        sys.exit(f"redis-benchmark ended with {load.returncode}")
    server.all(("SELECT", 1), ("FLUSHDB", "ASYNC"), ("SELECT", 0), ("BGSAVE",))
    for _ in server.ask(changed(index) for index in range(KEYS)):
        pass
    print("changed", hashed(server, "r", KEYS))
    kept = hashed(server, "kept", KEPT)
    print("kept", kept)
    while saving(server):
        # The child shares these pages; nothing that it does may show here.
        if hashed(server, "kept", KEPT) != kept:
            sys.exit("the kept keys changed while they were being saved")
    found = re.search(r"\d+ keys read", output(["redis-check-rdb", f"{folder}/dump.rdb"]))
    print("saved", found[0])
    server.all(("UNLINK", *(f"r:{index}" for index in range(KEYS))))


def main():
    path, folder = sys.argv[1:3]
    loaded = sys.argv[3:] == ["--loaded"]
    server = Server(path)
    if not loaded:
        for _ in server.ask(command for index in range(KEPT) for command in written("kept", index)):
            pass
    for _ in sys.stdin:
        if loaded:
            print("loaded", hashed(server, "r", KEYS), hashed(server, "kept", KEPT))
        else:
            play(server, path, folder)
        print(".", flush=True)
    server.socket.sendall(encoded(("SHUTDOWN", "NOSAVE")))
    if server.answers.read() != b"":
        sys.exit("the server refuses to shut down")


main()
