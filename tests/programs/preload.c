/*
 * For tests, by LD_PRELOAD: puts all memory of a program under management and keeps migrating half of it to soft0, the other half in the
 * next round, for as long as the program lives.
 *
 *   UHMM_RUN_DIR              where the system runs
 *   UHMM_PRELOAD_REPORT       file that gets one line when the program exits: what was done
 *   UHMM_PRELOAD_NO_MIGRATE   adopts, but moves nothing: to tell which of both a failure comes from
 *
 * Nothing is inherited by children: a forked one has no such thread, and programs that are executed run without this library.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "uhmm.h"

enum {
    RANGES = 1 << 16,
    ERRNOS = 134,
    LEFT = 64,
};

#define PIECE ((uint64_t)2 << 20)
#define PAGE ((uint64_t)UHMM_PAGE_BYTES)

/* Counters of the moving thread; the thread that exits reads them while it still works. */
static struct {
    _Atomic uint64_t rounds, calls, moved_pages;
    /* Sums over all rounds: what is under management, and what is resident beside it. */
    _Atomic uint64_t adopted_bytes, left_bytes;
    _Atomic uint64_t fates[UHMM_PAGE_FATES];
    _Atomic uint64_t errors[ERRNOS];
} done;

static uhmm_session *session;
static uhmm_device *device;
static uhmm_range ranges[RANGES];
static char smaps[4 << 20];
/* Private memory of the last round that was resident and not under management. */
static struct {
    uint64_t begin, bytes;
} left[LEFT];
static atomic_bool ending;
static pid_t owner;
static char report_path[4096];

static void give_up(const char *what)
{
    char text[1024];
    uhmm_last_error(text, sizeof text);
    fprintf(stderr, "preload: %s: %s\n", what, text);
    fflush(NULL);
    _exit(98);
}

/* A range may be unmapped by now, and services die: errors are counted, never fatal. */
static void count_error(int answer)
{
    int number = answer < 0 && -answer < ERRNOS ? -answer : 0;
    done.errors[number]++;
}

static void move_out(uint64_t begin, uint64_t end)
{
    uhmm_migrate_report report = {0};
    int answer = uhmm_migrate(session, (const void *)begin, end - begin, device, &report, NULL, 0);
    done.calls++;
    if (answer != 0) {
        count_error(answer);
        return;
    }
    done.moved_pages += report.moved_pages;
    for (size_t fate = 0; fate < UHMM_PAGE_FATES; fate++)
        done.fates[fate] += report.pages[fate];
}

/* Every second piece of 2 MiB, by its address: the others are for the next round. */
static void move_half(const uhmm_range *range, uint64_t round)
{
    uint64_t last = (uint64_t)range->addr + range->len_bytes;
    uint64_t end;
    for (uint64_t begin = (uint64_t)range->addr; begin < last && !ending; begin = end) {
        end = (begin / PIECE + 1) * PIECE;
        if (end > last)
            end = last;
        if ((begin / PIECE + round) % 2 == 0)
            move_out(begin, end);
    }
}

static uint64_t adopted_between(uint64_t begin, uint64_t end, uint64_t count)
{
    uint64_t bytes = 0;
    for (uint64_t index = 0; index < count; index++) {
        uint64_t first = (uint64_t)ranges[index].addr, last = first + ranges[index].len_bytes;
        first = first > begin ? first : begin;
        last = last < end ? last : end;
        bytes += last > first ? last - first : 0;
    }
    return bytes;
}

static void read_smaps(void)
{
    int file = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);
    size_t length = 0;
    ssize_t got = 0;
    while (file >= 0 && (got = read(file, smaps + length, sizeof smaps - 1 - length)) > 0)
        length += (size_t)got;
    if (file < 0 || got < 0 || length == 0 || smaps[length - 1] != '\n')
        give_up("/proc/self/smaps cannot be read");
    close(file);
    smaps[length] = 0;
}

static void count_mapping(uint64_t begin, uint64_t end, uint64_t resident, uint64_t count, int *listed)
{
    uint64_t adopted = adopted_between(begin, end, count);
    uint64_t bytes = end - begin - adopted < resident ? end - begin - adopted : resident;
    done.adopted_bytes += adopted;
    done.left_bytes += bytes;
    if (bytes > 16 * PAGE && *listed < LEFT) {
        left[*listed].begin = begin;
        left[*listed].bytes = bytes;
        ++*listed;
    }
}

/*
 * How much of the program's private memory is under management. What is left alone counts as far as it is resident: a thread's stack
 * is a mapping of 8 MiB with a few pages in it.
 */
static void compare_with_mappings(uint64_t count)
{
    read_smaps();
    uint64_t begin = 0, end = 0;
    int listed = 0;
    memset(left, 0, sizeof left);
    for (char *line = smaps; *line != 0; line = strchr(line, '\n') + 1) {
        char rights[5] = "";
        uint64_t first, last, resident_kib;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &first, &last, rights) == 3) {
            begin = first;
            end = strcmp(rights, "rw-p") == 0 ? last : first;
        } else if (sscanf(line, "Rss: %" SCNu64 " kB", &resident_kib) == 1 && begin < end) {
            count_mapping(begin, end, resident_kib << 10, count, &listed);
        }
    }
}

static void *keep_moving(void *unused)
{
    (void)unused;
    for (uint64_t round = 0; !ending; round++) {
        uint64_t count = 0;
        int answer = uhmm_adopted_ranges(session, ranges, RANGES, &count);
        if (answer != 0) {
            count_error(answer);
            continue;
        }
        if (count > RANGES)
            give_up("more ranges than there is room for");
        compare_with_mappings(count);
        for (uint64_t index = 0; index < count; index++)
            move_half(&ranges[index], round);
        done.rounds++;
    }
    return NULL;
}

static void start_moving(void)
{
    /* The program's signals are for the program's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    if (pthread_create(&thread, NULL, keep_moving, NULL) != 0)
        give_up("pthread_create");
    pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("UHMM_PRELOAD_REPORT");
    if (path == NULL || strlen(path) >= sizeof report_path)
        give_up("UHMM_PRELOAD_REPORT does not name a file");
    strcpy(report_path, path);
    unsetenv("LD_PRELOAD");
    owner = getpid();
    if (uhmm_connect(NULL, &session) != 0)
        give_up("uhmm_connect");
    if (uhmm_device_open(session, "soft0", &device) != 0)
        give_up("uhmm_device_open");
    if (uhmm_adopt_all(session, NULL) != 0)
        give_up("uhmm_adopt_all");
    if (getenv("UHMM_PRELOAD_NO_MIGRATE") == NULL)
        start_moving();
}

/* The moving thread is not waited for: the program's exit finds it at work, as it would find a runtime's threads. */
__attribute__((destructor)) static void end(void)
{
    if (getpid() != owner)
        return;
    ending = true;
    FILE *file = fopen(report_path, "w");
    if (file == NULL)
        give_up("the report cannot be written");
    fprintf(file, "rounds=%" PRIu64 " calls=%" PRIu64 " moved_pages=%" PRIu64, done.rounds, done.calls, done.moved_pages);
    fprintf(file, " adopted_bytes=%" PRIu64 " left_bytes=%" PRIu64, done.adopted_bytes, done.left_bytes);
    for (int fate = 0; fate < UHMM_PAGE_FATES; fate++)
        fprintf(file, " fate%d=%" PRIu64, fate, done.fates[fate]);
    for (int number = 0; number < ERRNOS; number++)
        if (done.errors[number] != 0)
            fprintf(file, " errno%d=%" PRIu64, number, done.errors[number]);
    for (int index = 0; index < LEFT && left[index].bytes != 0; index++)
        fprintf(file, " left=%" PRIx64 "+%" PRIx64, left[index].begin, left[index].bytes);
    fprintf(file, "\n");
    fclose(file);
}
