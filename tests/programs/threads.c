/*
 * 24 threads that allocate, grow, shrink and free blocks of random sizes, with the allocator that the C library gives. Every byte of a
 * block is checked before it is freed or resized. Threads end and begin all the time, and a thread begins with the blocks that one
 * before it has left, so blocks are freed in threads that did not allocate them.
 *
 * One line on standard input asks for a round; it answers with a checksum, the same in every round, and a line ".".
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    THREADS = 24,
    GENERATIONS = 8,  /* threads that follow each other in a round, for each of the 24 */
    BLOCKS = 48,      /* that a thread has at most */
    STEPS = 400,      /* of a thread */
    KEPT_BYTES = 16 << 20,
};

struct block {
    uint8_t *bytes;
    size_t len_bytes;
    uint64_t seed;
};

/* What one thread leaves for the one that follows it. */
struct place {
    pthread_t thread;
    uint64_t id;
    struct block blocks[BLOCKS];
    uint64_t checksum;
};

static struct place places[THREADS];

static uint64_t next(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

static uint64_t mix(uint64_t sum, uint64_t value)
{
    sum = (sum ^ value) * UINT64_C(0xd1342543de82ef95);
    return sum ^ (sum >> 29);
}

static void give_up(const char *what, const struct block *block, size_t at)
{
    fprintf(stderr, "%s: block %p of %zu bytes, byte %zu\n", what, (void *)block->bytes, block->len_bytes, at);
    fflush(NULL);
    abort();
}

static uint8_t pattern(const struct block *block, size_t at)
{
    return (uint8_t)((block->seed + at) * UINT64_C(0x9e3779b97f4a7c15) >> 56);
}

static void fill(const struct block *block, size_t from)
{
    for (size_t at = from; at < block->len_bytes; at++)
        block->bytes[at] = pattern(block, at);
}

static void check(const struct block *block, size_t len_bytes)
{
    for (size_t at = 0; at < len_bytes; at++)
        if (block->bytes[at] != pattern(block, at))
            give_up("a byte is not what was written", block, at);
}

/* Mostly small, some that grow an arena, a few with a mapping of their own. */
static size_t some_size(uint64_t *random)
{
    uint64_t kind = next(random) % 64;
    if (kind == 0)
        return 1 + next(random) % (1 << 20);
    if (kind < 8)
        return 1 + next(random) % (64 << 10);
    return 1 + next(random) % (2 << 10);
}

static void allocate(struct block *block, uint64_t *random)
{
    block->len_bytes = some_size(random);
    block->seed = next(random);
    if (next(random) % 4 == 0) {
        block->bytes = calloc(1, block->len_bytes);
        for (size_t at = 0; block->bytes != NULL && at < block->len_bytes; at++)
            if (block->bytes[at] != 0)
                give_up("calloc gave a byte that is not zero", block, at);
    } else {
        block->bytes = malloc(block->len_bytes);
    }
    if (block->bytes == NULL)
        give_up("no memory", block, 0);
    fill(block, 0);
}

static void resize(struct block *block, uint64_t *random)
{
    size_t before = block->len_bytes;
    size_t after = some_size(random);
    uint8_t *bytes = realloc(block->bytes, after);
    if (bytes == NULL)
        give_up("no memory to resize", block, 0);
    block->bytes = bytes;
    block->len_bytes = after;
    check(block, before < after ? before : after);
    if (after > before)
        fill(block, before);
}

static void release(struct block *block)
{
    check(block, block->len_bytes);
    free(block->bytes);
    *block = (struct block){0};
}

static void *live(void *argument)
{
    struct place *place = argument;
    uint64_t random = (place->id + 1) * UINT64_C(0x9e3779b97f4a7c15);
    for (int step = 0; step < STEPS; step++) {
        struct block *block = &place->blocks[next(&random) % BLOCKS];
        uint64_t action = next(&random) % 3;
        if (block->bytes == NULL)
            allocate(block, &random);
        else if (action == 0)
            resize(block, &random);
        else
            release(block);
        uint64_t shown = block->bytes == NULL ? 0 : block->bytes[block->len_bytes / 2];
        place->checksum = mix(place->checksum, block->len_bytes ^ shown << 56);
    }
    return NULL;
}

static void begin(struct place *place, uint64_t id)
{
    place->id = id;
    int error = pthread_create(&place->thread, NULL, live, place);
    if (error != 0) {
        fprintf(stderr, "pthread_create: %s\n", strerror(error));
        exit(1);
    }
}

static uint64_t play(void)
{
    memset(places, 0, sizeof places);
    for (uint64_t index = 0; index < THREADS; index++)
        begin(&places[index], index);
    for (uint64_t generation = 1; generation <= GENERATIONS; generation++) {
        for (uint64_t index = 0; index < THREADS; index++) {
            pthread_join(places[index].thread, NULL);
            if (generation < GENERATIONS)
                begin(&places[index], generation * THREADS + index);
        }
    }
    uint64_t sum = 0;
    for (uint64_t index = 0; index < THREADS; index++) {
        for (int block = 0; block < BLOCKS; block++)
            if (places[index].blocks[block].bytes != NULL)
                release(&places[index].blocks[block]);
        sum = mix(sum, places[index].checksum);
    }
    return sum;
}

int main(void)
{
    /* Written once and read in every round: what is cold stays right too. */
    struct block kept = {malloc(KEPT_BYTES), KEPT_BYTES, 4711};
    if (kept.bytes == NULL)
        give_up("no memory", &kept, 0);
    fill(&kept, 0);
    char line[16];
    while (fgets(line, sizeof line, stdin) != NULL) {
        uint64_t sum = play();
        check(&kept, kept.len_bytes);
        printf("threads %016" PRIx64 "\n.\n", sum);
        fflush(stdout);
    }
    release(&kept);
    return 0;
}
