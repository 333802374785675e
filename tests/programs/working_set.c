/*
 * A program with a working set, for `uhmm run`: knows nothing of uhmm. It builds `MIB` blocks of one MiB in malloc'ed memory, then for every line that
 * it reads makes a round over them in an order that changes, checks every word and changes some. It answers with "HASH RESIDENT_KIB" and exits
 * with 3 at the end of its input, or with 7 on SIGTERM.
 *
 *   working_set MIB     a line "fork" makes the round in a forked child too, and compares the two
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORDS = (1 << 20) / 8, PAGE_WORDS = 4096 / 8 };

static uint64_t **blocks;
static uint64_t *changes;
static size_t count;

/* Half of the words of a block are as if compressed, half are not. */
static uint64_t word(size_t block, size_t index, uint64_t change)
{
    uint64_t value = (block * 0x9e3779b97f4a7c15u) ^ (index * 0xc2b2ae3d27d4eb4fu) ^ change;
    return index % 2 == 0 ? value : block;
}

static void build(void)
{
    for (size_t block = 0; block < count; block++) {
        blocks[block] = malloc(1 << 20);
        if (blocks[block] == NULL)
            exit(1);
        for (size_t index = 0; index < WORDS; index++)
            blocks[block][index] = word(block, index, 0);
    }
}

static uint64_t visit(size_t block, uint64_t round, uint64_t hash)
{
    for (size_t index = 0; index < WORDS; index++) {
        uint64_t change = index % PAGE_WORDS == 0 ? changes[block] : 0;
        if (blocks[block][index] != word(block, index, change)) {
            printf("block %zu has a wrong word at %zu\n", block, index);
            exit(1);
        }
        hash = (hash ^ blocks[block][index]) * 0x100000001b3u;
    }
    changes[block] += round + 1;
    for (size_t index = 0; index < WORDS; index += PAGE_WORDS)
        blocks[block][index] = word(block, index, changes[block]);
    return hash;
}

/* Every block once, in steps that share no divisor with the count. */
static uint64_t round_over(uint64_t round)
{
    uint64_t hash = round;
    size_t step = count / 2 + round % 7 + 1;
    while (step > 1) {
        size_t a = step, b = count;
        while (b != 0) {
            size_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            break;
        step++;
    }
    for (size_t nth = 0; nth < count; nth++)
        hash = visit(nth * step % count, round, hash);
    return hash;
}

static uint64_t resident_kib(void)
{
    char line[256];
    uint64_t kib = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status != NULL && fgets(line, sizeof line, status) != NULL)
        sscanf(line, "VmRSS: %" SCNu64, &kib);
    if (status != NULL)
        fclose(status);
    return kib;
}

static uint64_t in_child(uint64_t round)
{
    int ends[2];
    uint64_t hash = 0;
    if (pipe(ends) != 0)
        exit(1);
    pid_t child = fork();
    if (child == 0) {
        hash = round_over(round);
        _exit(write(ends[1], &hash, sizeof hash) == sizeof hash ? 0 : 1);
    }
    int status = 1;
    if (child < 0 || read(ends[0], &hash, sizeof hash) != sizeof hash || waitpid(child, &status, 0) != child || status != 0)
        exit(1);
    close(ends[0]);
    close(ends[1]);
    return hash;
}

static void on_term(int number)
{
    (void)number;
    _exit(7);
}

int main(int argc, char **argv)
{
    count = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
    if (count < 2)
        return 2;
    blocks = calloc(count, sizeof *blocks);
    changes = calloc(count, sizeof *changes);
    signal(SIGTERM, on_term);
    setvbuf(stdout, NULL, _IOLBF, 0);
    build();
    puts("built");
    char line[64];
    for (uint64_t round = 0; fgets(line, sizeof line, stdin) != NULL; round++) {
        int forks = strcmp(line, "fork\n") == 0;
        uint64_t childs = forks ? in_child(round) : 0;
        uint64_t hash = round_over(round);
        if (forks && childs != hash)
            return 1;
        printf("%016" PRIx64 " %" PRIu64 "\n", hash, resident_kib());
    }
    return 3;
}
