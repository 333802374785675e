/*
 * A program of which a part is hot, for `uhmm run`: knows nothing of uhmm. It fills `MIB` MiB of malloc'ed memory and then, for every line that it
 * reads, touches many words of a quarter of it and, now and then, one of all; every word must be what it was. A line "shift" moves the hot quarter on
 * by an eighth first, "idle" touches nothing for a second. It answers with "TOUCHES MICROSECONDS RESIDENT_KIB" and exits with 3 at the end of its input.
 *
 *   hot_set MIB [TOUCHES]     TOUCHES of a round, in thousands [default: 4000]
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { WORDS = (1 << 20) / 8, HOT_PART = 4, SHIFT_PART = 8, COLD_EVERY = 1 << 16 };

static uint64_t *words;
static size_t count;
static uint64_t state = 88172645463325252u;

static uint64_t random_word(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static uint64_t value(size_t index)
{
    return index * 0x9e3779b97f4a7c15u + 1;
}

static void touch(size_t index)
{
    if (words[index] != value(index)) {
        printf("word %zu is wrong\n", index);
        exit(1);
    }
    if (index % 4 == 0)
        ((volatile uint64_t *)words)[index] = value(index);
}

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
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

int main(int argc, char **argv)
{
    count = argc > 1 ? strtoul(argv[1], NULL, 10) * WORDS : 0;
    uint64_t touches = (argc > 2 ? strtoul(argv[2], NULL, 10) : 4000) * 1000;
    if (count == 0)
        return 2;
    words = malloc(count * sizeof *words);
    if (words == NULL)
        return 1;
    for (size_t index = 0; index < count; index++)
        words[index] = value(index);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("built");
    char line[64];
    size_t hot = 0;
    while (fgets(line, sizeof line, stdin) != NULL) {
        if (strcmp(line, "shift\n") == 0)
            hot = (hot + count / SHIFT_PART) % count;
        uint64_t begun = now_us();
        if (strcmp(line, "idle\n") == 0) {
            struct timespec second = { .tv_sec = 1 };
            nanosleep(&second, NULL);
        } else {
            for (uint64_t nth = 0; nth < touches; nth++)
                touch(nth % COLD_EVERY == 0 ? random_word() % count : (hot + random_word() % (count / HOT_PART)) % count);
        }
        printf("%" PRIu64 " %" PRIu64 " %" PRIu64 "\n", touches, now_us() - begun, resident_kib());
    }
    return 3;
}
