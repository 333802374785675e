/* What the parts of the C program share. Every check that fails says where, what, and uhmm's own words, and ends the program. */
#ifndef CHECK_H
#define CHECK_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "uhmm.h"

#define PAGE ((uint64_t)UHMM_PAGE_BYTES)
#define MIB ((uint64_t)1 << 20)

static inline void give_up(const char *file, int line, const char *what, int64_t found, int64_t expected)
{
    char text[1024];
    uhmm_last_error(text, sizeof text);
    fprintf(stderr, "%s:%d: %s: found %" PRId64 ", expected %" PRId64 "; last error: %s\n", file, line, what, found,
            expected, text);
    /* Not exit(): a forked child must not run its parent's handlers. */
    fflush(NULL);
    _Exit(1);
}

/* Equal numbers. */
#define SAME(found_, expected_)                                                       \
    do {                                                                              \
        int64_t f_ = (int64_t)(found_), e_ = (int64_t)(expected_);                    \
        if (f_ != e_)                                                                 \
            give_up(__FILE__, __LINE__, #found_, f_, e_);                             \
    } while (0)

#define TRUE_THAT(condition_) SAME(!!(condition_), 1)

/* A call that must succeed. */
#define OK(call_) SAME(call_, 0)

/* A call that must fail with this number, and say something. */
#define FAILS(call_, errno_)                                                          \
    do {                                                                              \
        SAME(call_, -(errno_));                                                       \
        TRUE_THAT(uhmm_last_error(NULL, 0) > 10);                                     \
    } while (0)

/* What every part works with. */
struct bench {
    const char *run_dir;
    uhmm_session *session;
    uhmm_device *device;
};

/* Recognisable contents: every word says where it is and under which seed. */
static inline uint64_t word(uint64_t seed, uint64_t index)
{
    uint64_t mixed = (index + 1 + (seed << 40)) * UINT64_C(0xd1342543de82ef95);
    return mixed ^ (mixed >> 31);
}

static inline void fill(void *memory, uint64_t len_bytes, uint64_t seed)
{
    volatile uint64_t *words = memory;
    for (uint64_t i = 0; i < len_bytes / 8; i++)
        words[i] = word(seed, i);
}

/* Which pages are wrong, and in how many words: a lost page looks otherwise than a word that somebody has written. */
static inline void tell_what_is_wrong(const void *memory, uint64_t len_bytes, uint64_t seed)
{
    const volatile uint64_t *words = memory;
    uint64_t per_page = PAGE / 8;
    for (uint64_t first = 0, told = 0; first < len_bytes / 8 && told < 64; first += per_page) {
        uint64_t wrong = 0, zero = 0, at = 0;
        for (uint64_t i = first; i < first + per_page && i < len_bytes / 8; i++) {
            uint64_t found = words[i];
            if (found != word(seed, i) && wrong++ == 0)
                at = i;
            zero += found == 0;
        }
        if (wrong > 0 && told++ < 64)
            fprintf(stderr, "%p: %" PRIu64 " words are wrong, %" PRIu64 " are 0; the first wrong one is number %" PRIu64 "\n",
                    (const void *)((uintptr_t)memory + first * 8), wrong, zero, at);
    }
}

static inline void expect_at(const char *file, int line, const void *memory, uint64_t len_bytes, uint64_t seed)
{
    const volatile uint64_t *words = memory;
    for (uint64_t i = 0; i < len_bytes / 8; i++) {
        uint64_t found = words[i];
        if (found != word(seed, i)) {
            tell_what_is_wrong(memory, len_bytes, seed);
            give_up(file, line, "a word of the pattern", (int64_t)found, (int64_t)word(seed, i));
        }
    }
}

static inline void expect_byte_at(const char *file, int line, const void *memory, uint64_t len_bytes, uint8_t value)
{
    const volatile uint8_t *bytes = memory;
    for (uint64_t i = 0; i < len_bytes; i++)
        if (bytes[i] != value)
            give_up(file, line, "a byte", bytes[i], value);
}

#define EXPECT(memory_, len_, seed_) expect_at(__FILE__, __LINE__, memory_, len_, seed_)
#define EXPECT_BYTE(memory_, len_, value_) expect_byte_at(__FILE__, __LINE__, memory_, len_, value_)

/* Private anonymous memory that begins at a multiple of 2 MiB. */
static inline void *anonymous(uint64_t len_bytes)
{
    uint8_t *memory = mmap(NULL, len_bytes + 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TRUE_THAT(memory != MAP_FAILED);
    uint64_t before = (2 * MIB - (uintptr_t)memory % (2 * MIB)) % (2 * MIB);
    if (before > 0)
        OK(munmap(memory, before));
    OK(munmap(memory + before + len_bytes, 2 * MIB - before));
    return memory + before;
}

/* All pages of the range are of one residency. */
static inline void expect_residency_at(const char *file, int line, uhmm_session *session, const void *addr,
                                       uint64_t len_bytes, uint8_t residency)
{
    uhmm_residency_run runs[64];
    size_t count = 0;
    uint64_t pages = 0;
    int error = uhmm_residency(session, addr, len_bytes, runs, 64, &count);
    if (error != 0 || count == 0 || count > 64)
        give_up(file, line, "the number of residency runs", error != 0 ? error : (int64_t)count, 1);
    for (size_t i = 0; i < count; i++) {
        if (runs[i].first_page != pages || runs[i].residency != residency)
            give_up(file, line, "the residency of a run", runs[i].residency, residency);
        pages += runs[i].page_count;
    }
    if (pages != len_bytes / PAGE)
        give_up(file, line, "the pages of all runs", (int64_t)pages, (int64_t)(len_bytes / PAGE));
}

#define EXPECT_RESIDENCY(session_, addr_, len_, residency_) \
    expect_residency_at(__FILE__, __LINE__, session_, addr_, len_, residency_)

/* The parts; each says "ok NAME" when all of it was as it must be. */
void handles_and_errors(const struct bench *bench);
void devices(const struct bench *bench);
void shared_memory(const struct bench *bench);
void private_memory(const struct bench *bench);
void device_accesses(const struct bench *bench);
void protections(const struct bench *bench);
void without_waiting(const struct bench *bench);
void jobs(const struct bench *bench);
void advice(const struct bench *bench);
void pins_and_eviction(const struct bench *bench);
void hot_ranges(const struct bench *bench);
void snapshots(const struct bench *bench);
void counters_and_trace(const struct bench *bench);
void injected_failures(const struct bench *bench);
void threads(const struct bench *bench);
void forks(const struct bench *bench);

#endif
