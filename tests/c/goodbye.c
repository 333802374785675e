/* A session that ends while its process goes on: every byte stays, and the place at the pager is free. The system has room for few. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <sys/wait.h>
#include <unistd.h>

#define LEN (4 * MIB)

static void connects(struct bench *bench)
{
    OK(uhmm_connect(bench->run_dir, &bench->session));
    OK(uhmm_device_open(bench->session, "soft0", &bench->device));
}

static void leaves(struct bench *bench)
{
    OK(uhmm_device_close(bench->device));
    OK(uhmm_disconnect(bench->session));
}

/* Adopted memory of this pattern, on the device. */
static void out(const struct bench *bench, void *memory, uint64_t seed)
{
    uhmm_migrate_report report;
    fill(memory, LEN, seed);
    OK(uhmm_adopt(bench->session, memory, LEN));
    OK(uhmm_migrate(bench->session, memory, LEN, bench->device, &report, NULL, 0));
    SAME(report.moved_pages, LEN / PAGE);
}

/* Session after session, where there is room for one only. */
static void again_and_again(struct bench *bench)
{
    void *memory = anonymous(LEN), *more = anonymous(LEN), *allocated;
    void *file = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    TRUE_THAT(file != MAP_FAILED);
    for (uint64_t round = 1; round <= 8; round++) {
        connects(bench);
        out(bench, memory, round);
        out(bench, more, round + 100);
        OK(uhmm_allocate(bench->session, LEN, &allocated));
        fill(allocated, LEN, round);
        OK(uhmm_migrate(bench->session, allocated, LEN, bench->device, NULL, NULL, 0));
        fill(file, LEN, round + 200);
        OK(uhmm_adopt(bench->session, file, LEN));
        /* Both copies are valid, and both are protected. */
        if (round % 2 == 0)
            OK(uhmm_advise(bench->session, more, LEN, UHMM_ADVISE_READ_MOSTLY, NULL, 0));
        leaves(bench);
        EXPECT(memory, LEN, round);
        EXPECT(more, LEN, round + 100);
        EXPECT(file, LEN, round + 200);
        fill(more, LEN, 7);
        EXPECT(more, LEN, 7);
    }
    OK(munmap(memory, LEN));
    OK(munmap(more, LEN));
    OK(munmap(file, LEN));
}

/* A pending job still runs. */
static void while_it_works(struct bench *bench)
{
    void *memory = anonymous(LEN);
    connects(bench);
    out(bench, memory, 1);
    for (int round = 0; round < 20; round++) {
        uhmm_pending *pending;
        OK(uhmm_migrate_async(bench->session, memory, LEN, bench->device, &pending));
        OK(uhmm_pending_free(pending));
        OK(uhmm_device_read_async(bench->device, memory, LEN, 0, &pending));
        OK(uhmm_pending_free(pending));
    }
    leaves(bench);
    EXPECT(memory, LEN, 1);
    connects(bench);
    leaves(bench);
}

/* Room for two: parent and child. The child that says goodbye has its bytes, and its place is free. */
static void in_child(struct bench *bench)
{
    void *memory = anonymous(LEN);
    connects(bench);
    SAME(uhmm_fork_supported(bench->session), 1);
    out(bench, memory, 3);
    pid_t pid = fork();
    TRUE_THAT(pid >= 0);
    if (pid == 0) {
        struct bench own = {.run_dir = bench->run_dir};
        OK(uhmm_in_child(bench->session, &own.session));
        OK(uhmm_device_open(own.session, "soft0", &own.device));
        OK(uhmm_migrate(own.session, memory, LEN, own.device, NULL, NULL, 0));
        leaves(&own);
        EXPECT(memory, LEN, 3);
        connects(&own);
        out(&own, memory, 4);
        leaves(&own);
        EXPECT(memory, LEN, 4);
        _exit(0);
    }
    int status;
    SAME(waitpid(pid, &status, 0), pid);
    SAME(status, 0);
    EXPECT(memory, LEN, 3);
    leaves(bench);
    connects(bench);
    leaves(bench);
}

/* A child shows memory that its parent has allocated: its session has to go on, and nobody's bytes are lost. */
static void child_with_allocated(struct bench *bench)
{
    void *shared, *memory = anonymous(LEN);
    connects(bench);
    OK(uhmm_allocate(bench->session, LEN, &shared));
    fill(shared, LEN, 5);
    out(bench, memory, 6);
    OK(uhmm_migrate(bench->session, shared, LEN, bench->device, NULL, NULL, 0));
    pid_t pid = fork();
    TRUE_THAT(pid >= 0);
    if (pid == 0) {
        struct bench own = {.run_dir = bench->run_dir};
        OK(uhmm_in_child(bench->session, &own.session));
        OK(uhmm_disconnect(own.session));
        EXPECT(shared, LEN, 5);
        EXPECT(memory, LEN, 6);
        fill(shared, LEN, 8);
        _exit(0);
    }
    int status;
    SAME(waitpid(pid, &status, 0), pid);
    SAME(status, 0);
    EXPECT(shared, LEN, 8);
    leaves(bench);
    EXPECT(memory, LEN, 6);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(struct bench *);
    } parts[] = {
        {"again_and_again", again_and_again},
        {"while_it_works", while_it_works},
        {"in_child", in_child},
        {"child_with_allocated", child_with_allocated},
    };
    if (argc != 3) {
        fprintf(stderr, "usage: %s RUN_DIR PART\n", argv[0]);
        return 2;
    }
    struct bench bench = {.run_dir = argv[1]};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (strcmp(argv[2], parts[i].name) == 0) {
            parts[i].run(&bench);
            printf("ok %s\n", parts[i].name);
            return 0;
        }
    }
    fprintf(stderr, "there is no part %s\n", argv[2]);
    return 2;
}
