/* Programs that have much of something. The first argument is the run directory, the second says of what. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

static uhmm_session *session;
static uhmm_device *device;

/* A terabyte of which three pages were touched: nothing takes as long as a look at each page would. */
static void sparse(void)
{
    uint64_t len = (uint64_t)1 << 40;
    uint8_t *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TRUE_THAT(p != MAP_FAILED);
    OK(uhmm_adopt(session, p, len));
    OK(uhmm_advise(session, p, len, UHMM_ADVISE_READ_MOSTLY, NULL, 1));
    uhmm_attributes_info known;
    OK(uhmm_attributes(session, p, len, &known));
    TRUE_THAT(known.read_mostly);
    OK(uhmm_advise(session, p, len, UHMM_ADVISE_READ_MOSTLY, NULL, 0));
    OK(uhmm_pin(session, p, len));
    OK(uhmm_unpin(session, p, len));
    uint64_t touched[3] = {0, len / 2, len - PAGE};
    for (int i = 0; i < 3; i++)
        p[touched[i]] = (uint8_t)(i + 1);
    EXPECT_RESIDENCY(session, p, len, UHMM_RESIDENCY_SYSTEM);
    for (int i = 0; i < 3; i++)
        OK(uhmm_migrate(session, p + touched[i], PAGE, device, NULL, NULL, 0));
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < 3; i++)
            SAME(p[touched[i]], i + 1);
        SAME(p[len / 4], 0);
        _Exit(0);
    }
    int status;
    SAME(waitpid(child, &status, 0), child);
    SAME(status, 0);
    printf("kill the pager\n");
    fflush(stdout);
    SAME(getchar(), 'k');
    for (int i = 0; i < 3; i++)
        SAME(p[touched[i]], i + 1);
    OK(uhmm_migrate(session, p, len, NULL, NULL, NULL, 0));
    OK(madvise(p, len, MADV_DONTNEED));
    SAME(p[len / 2], 0);
    OK(uhmm_release(session, p, len));
    OK(uhmm_adopt(session, p, len));
    OK(munmap(p, len));
    void *shared;
    OK(uhmm_allocate(session, len, &shared));
    ((uint8_t *)shared)[len / 2] = 5;
    OK(uhmm_migrate(session, (uint8_t *)shared + len / 2, PAGE, device, NULL, NULL, 0));
    OK(uhmm_pin(session, shared, len));
    OK(uhmm_unpin(session, shared, len));
    SAME(((uint8_t *)shared)[len / 2], 5);
    OK(uhmm_discard(session, shared, len));
    SAME(((uint8_t *)shared)[len / 2], 0);
    OK(uhmm_free(session, shared));
}

/* Thousands of regions, and then the process ends. */
static void regions(void)
{
    uint64_t count = 2000;
    uint8_t *p = anonymous(2 * count * PAGE);
    for (uint64_t i = 0; i < count; i++)
        OK(uhmm_adopt(session, p + 2 * i * PAGE, PAGE));
    printf("regions are there\n");
    fflush(stdout);
    SAME(getchar(), 'k');
}

/* Forks as fast as it can, with pages on the device, until its input ends. */
static void fork_storm(void)
{
    uint64_t len = 16 * MIB;
    uint8_t *p = anonymous(len);
    fill(p, len, 3);
    OK(uhmm_adopt(session, p, len));
    OK(uhmm_migrate(session, p, len, device, NULL, NULL, 0));
    printf("storm\n");
    fflush(stdout);
    pid_t reader = fork();
    if (reader == 0) {
        getchar();
        _Exit(0);
    }
    for (int status; waitpid(reader, &status, WNOHANG) == 0;) {
        pid_t child = fork();
        if (child == 0)
            _Exit(0);
        TRUE_THAT(child > 0);
        SAME(waitpid(child, &status, 0), child);
    }
    EXPECT(p, len, 3);
}

static uint8_t *dropped;
static volatile int over;

static void *drop(void *share)
{
    uint8_t *mine = dropped + (uintptr_t)share * MIB;
    while (!over) {
        for (int page = 0; page < 16; page++) {
            SAME(mine[page * PAGE], 0);
            mine[page * PAGE] = 1;
        }
        OK(madvise(mine, MIB, MADV_DONTNEED));
    }
    return NULL;
}

/* Sixteen threads that drop memory all the time. */
static void drops(void)
{
    dropped = anonymous(16 * MIB);
    OK(uhmm_adopt(session, dropped, 16 * MIB));
    pthread_t threads[16];
    for (uintptr_t share = 0; share < 16; share++)
        OK(pthread_create(&threads[share], NULL, drop, (void *)share));
    printf("storm\n");
    fflush(stdout);
    getchar();
    over = 1;
    for (int i = 0; i < 16; i++)
        OK(pthread_join(threads[i], NULL));
}

static uint8_t *away;

static void *touch(void *nothing)
{
    EXPECT(away, 8 * MIB, 4);
    return nothing;
}

/* Its memory is on the device, and it may have no more: a thread waits until it may. */
static void limit(void)
{
    away = anonymous(8 * MIB);
    fill(away, 8 * MIB, 4);
    OK(uhmm_adopt(session, away, 8 * MIB));
    OK(uhmm_migrate(session, away, 8 * MIB, device, NULL, NULL, 0));
    pthread_t thread;
    printf("away\n");
    fflush(stdout);
    SAME(getchar(), 'k');
    OK(pthread_create(&thread, NULL, touch, NULL));
    OK(pthread_join(thread, NULL));
}

int main(int count, char **arguments)
{
    SAME(count, 3);
    OK(uhmm_connect(arguments[1], &session));
    OK(uhmm_device_open(session, "soft0", &device));
    const char *what[] = {"sparse", "regions", "forks", "drops", "limit"};
    void (*parts[])(void) = {sparse, regions, fork_storm, drops, limit};
    for (int i = 0; i < 5; i++)
        if (strcmp(arguments[2], what[i]) == 0)
            parts[i]();
    printf("ok\n");
    return 0;
}
