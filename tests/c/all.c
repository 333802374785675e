/*
 * Uses every function of uhmm.h against a running system and compares every byte: `all RUN_DIR`.
 * The system has one software device, soft0, of 64 MiB with an aperture, and its manifest says fault_injection = true.
 */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(const struct bench *);
    } parts[] = {
        {"handles_and_errors", handles_and_errors},
        {"devices", devices},
        {"shared_memory", shared_memory},
        {"private_memory", private_memory},
        {"device_accesses", device_accesses},
        {"protections", protections},
        {"without_waiting", without_waiting},
        {"jobs", jobs},
        {"advice", advice},
        {"pins_and_eviction", pins_and_eviction},
        {"hot_ranges", hot_ranges},
        {"snapshots", snapshots},
        {"counters_and_trace", counters_and_trace},
        {"injected_failures", injected_failures},
        {"threads", threads},
        {"forks", forks},
    };
    if (argc != 2 && argc != 3) {
        fprintf(stderr, "usage: %s RUN_DIR [PART]\n", argv[0]);
        return 2;
    }
    struct bench bench = {.run_dir = argv[1]};
    SAME(uhmm_last_error(NULL, 0), 0);
    OK(uhmm_connect(bench.run_dir, &bench.session));
    OK(uhmm_device_open(bench.session, "soft0", &bench.device));
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (argc == 3 && strcmp(argv[2], parts[i].name) != 0)
            continue;
        parts[i].run(&bench);
        printf("ok %s\n", parts[i].name);
        fflush(stdout);
    }
    OK(uhmm_device_close(bench.device));
    OK(uhmm_disconnect(bench.session));
    FAILS(uhmm_device_close(bench.device), EINVAL);
    FAILS(uhmm_disconnect(bench.session), EINVAL);
    FAILS(uhmm_fork_supported(bench.session), EINVAL);
    puts("all parts passed");
    return 0;
}

void handles_and_errors(const struct bench *bench)
{
    char text[256];
    uhmm_session *other = NULL;
    uint64_t space = 0, other_space = 0;

    FAILS(uhmm_connect("/nowhere/at/all", &other), ENOTCONN);
    TRUE_THAT(other == NULL);
    size_t len = uhmm_last_error(text, sizeof text);
    SAME(len, strlen(text));
    TRUE_THAT(strstr(text, "/nowhere/at/all") != NULL);
    /* A short buffer gets the beginning, the length is still the whole. */
    char first[5];
    SAME(uhmm_last_error(first, sizeof first), len);
    SAME(strlen(first), 4);
    SAME(memcmp(first, text, 4), 0);
    /* What succeeds leaves the text alone. */
    OK(uhmm_space(bench->session, &space));
    SAME(uhmm_last_error(NULL, 0), len);

    FAILS(uhmm_connect(bench->run_dir, NULL), EINVAL);
    FAILS(uhmm_connect("\xff\xfe", &other), EINVAL);
    FAILS(uhmm_space(NULL, &space), EINVAL);
    FAILS(uhmm_space(bench->session, NULL), EINVAL);
    FAILS(uhmm_space((uhmm_session *)text, &space), EINVAL);
    FAILS(uhmm_space((uhmm_session *)bench->device, &space), EINVAL);
    FAILS(uhmm_space(bench->session, (uint64_t *)(void *)(text + 1 + (uintptr_t)text % 2)), EINVAL);
    FAILS(uhmm_in_child(bench->session, &other), EINVAL);

    TRUE_THAT(uhmm_system_calls_wait(bench->session) >= 0 && uhmm_system_calls_wait(bench->session) <= 1);
    TRUE_THAT(uhmm_fork_supported(bench->session) >= 0 && uhmm_fork_supported(bench->session) <= 1);
    FAILS(uhmm_system_calls_wait(NULL), EINVAL);

    /* A second session of the same process is a space of its own. */
    OK(uhmm_connect(bench->run_dir, &other));
    OK(uhmm_space(other, &other_space));
    TRUE_THAT(other_space != space);
    OK(uhmm_disconnect(other));
    FAILS(uhmm_space(other, &other_space), EINVAL);
}

void devices(const struct bench *bench)
{
    uhmm_device *device = NULL;
    uhmm_device_info info;
    char usage[256];
    bool has_sum = false;

    FAILS(uhmm_device_open(bench->session, "../pager", &device), EINVAL);
    FAILS(uhmm_device_open(bench->session, "soft9", &device), ENOENT);
    FAILS(uhmm_device_open(bench->session, NULL, &device), EINVAL);
    FAILS(uhmm_device_open(bench->session, "soft0", NULL), EINVAL);
    FAILS(uhmm_device_open(NULL, "soft0", &device), EINVAL);
    TRUE_THAT(device == NULL);

    OK(uhmm_device_open(bench->session, "soft0", &device));
    OK(uhmm_device_describe(device, &info));
    SAME(strcmp(info.name, "soft0"), 0);
    SAME(strcmp(info.driver, "soft"), 0);
    SAME(info.id, 0);
    SAME(info.aperture, true);
    SAME(info.memory_bytes, 64 * MIB);
    TRUE_THAT(info.kernel_count >= 5);
    for (size_t i = 0; i < info.kernel_count; i++) {
        OK(uhmm_device_kernel(device, i, usage, sizeof usage));
        has_sum |= strncmp(usage, "sum(", 4) == 0;
    }
    TRUE_THAT(has_sum);
    OK(uhmm_device_kernel(device, 0, usage, 3));
    SAME(strlen(usage), 2);
    FAILS(uhmm_device_kernel(device, info.kernel_count, usage, sizeof usage), ENOENT);
    FAILS(uhmm_device_kernel(device, 0, NULL, sizeof usage), EINVAL);
    FAILS(uhmm_device_describe(device, NULL), EINVAL);
    FAILS(uhmm_device_describe((uhmm_device *)bench->session, &info), EINVAL);
    OK(uhmm_device_close(device));
    FAILS(uhmm_device_describe(device, &info), EINVAL);
}

enum { THREADS = 4 };

struct worker {
    const struct bench *bench;
    uint64_t *memory;
    uint64_t len_bytes;
    uint64_t seed;
};

/* One thread's part of `threads`: its own range, its own device handle, its own last error. */
static void *work(void *argument)
{
    const struct worker *worker = argument;
    const uint64_t len = worker->len_bytes;
    uint64_t *buffer = malloc(len);
    char text[256], own[32];

    TRUE_THAT(buffer != NULL);
    snprintf(own, sizeof own, "no-device-%" PRIu64, worker->seed);
    for (uint64_t round = 0; round < 8; round++) {
        uhmm_device *device = NULL;
        const uint64_t seed = worker->seed + round;

        OK(uhmm_device_open(worker->bench->session, "soft0", &device));
        fill(worker->memory, len, seed);
        OK(uhmm_migrate(worker->bench->session, worker->memory, len, device, NULL, NULL, 0));
        OK(uhmm_device_read(device, worker->memory, buffer, len, NULL));
        EXPECT(buffer, len, seed);
        OK(uhmm_prefetch(worker->bench->session, worker->memory, len, NULL, NULL));
        EXPECT(worker->memory, len, seed);
        FAILS(uhmm_device_open(worker->bench->session, own, &device), ENOENT);
        uhmm_last_error(text, sizeof text);
        TRUE_THAT(strstr(text, own) != NULL);
        OK(uhmm_device_close(device));
    }
    free(buffer);
    return NULL;
}

void threads(const struct bench *bench)
{
    const uint64_t len = 256 * PAGE;
    uint64_t *memory = anonymous(len);
    struct worker workers[THREADS];
    pthread_t ids[THREADS];

    OK(uhmm_adopt(bench->session, memory, len));
    for (int i = 0; i < THREADS; i++) {
        const uint64_t part = len / THREADS;
        workers[i] = (struct worker){bench, memory + i * (part / 8), part, 1000 * (i + 1)};
        OK(pthread_create(&ids[i], NULL, work, &workers[i]));
    }
    for (int i = 0; i < THREADS; i++)
        OK(pthread_join(ids[i], NULL));
    for (int i = 0; i < THREADS; i++)
        EXPECT(workers[i].memory, workers[i].len_bytes, workers[i].seed + 7);
    OK(uhmm_release(bench->session, memory, len));
    OK(munmap(memory, len));
}

/* The child's part of `forks`: its own session, its own bytes. */
static void child(const struct bench *parents, uint64_t *memory, uint64_t *shared, uint64_t len_bytes, uint64_t *buffer)
{
    struct bench own = {.run_dir = parents->run_dir};
    uint64_t space = 0, parents_space = 0;
    uhmm_access_report report;

    FAILS(uhmm_space(parents->session, &parents_space), EINVAL);
    FAILS(uhmm_device_read(parents->device, memory, buffer, PAGE, NULL), EINVAL);
    OK(uhmm_in_child(parents->session, &own.session));
    FAILS(uhmm_in_child(own.session, &own.session), EINVAL);
    OK(uhmm_space(own.session, &space));
    TRUE_THAT(space > 0);
    OK(uhmm_device_open(own.session, "soft0", &own.device));
    EXPECT(memory, PAGE, 70);
    /* The device writes the child's pages, not the parent's. */
    fill(buffer, len_bytes, 71);
    OK(uhmm_device_write(own.device, memory, buffer, len_bytes, &report));
    SAME(report.page_count, len_bytes / PAGE);
    EXPECT(memory, len_bytes, 71);
    memset(buffer, 0, len_bytes);
    OK(uhmm_device_read(own.device, memory, buffer, len_bytes, NULL));
    EXPECT(buffer, len_bytes, 71);
    /* Shared memory has one content for both; only the parent's session can free it. */
    EXPECT(shared, len_bytes, 72);
    fill(buffer, len_bytes, 73);
    OK(uhmm_device_write(own.device, shared, buffer, len_bytes, NULL));
    EXPECT(shared, len_bytes, 73);
    FAILS(uhmm_free(own.session, shared), ENOENT);
    OK(uhmm_device_close(own.device));
    OK(uhmm_disconnect(own.session));
    /* The parent's handles are left alone. */
    OK(uhmm_device_close(parents->device));
    OK(uhmm_disconnect(parents->session));
    FAILS(uhmm_space(parents->session, &parents_space), EINVAL);
}

void forks(const struct bench *bench)
{
    const uint64_t len = 16 * PAGE;
    uint64_t *memory = anonymous(len), *buffer = malloc(len), *shared = NULL;
    uhmm_session *none = NULL;
    uhmm_migrate_report moved;
    int status = -1, supported = uhmm_fork_supported(bench->session);

    TRUE_THAT(buffer != NULL);
    fill(memory, len, 70);
    OK(uhmm_adopt(bench->session, memory, len));
    OK(uhmm_allocate(bench->session, len, (void **)&shared));
    for (int migrated = 0; migrated < 2; migrated++) {
        fill(shared, len, 72);
        if (migrated) {
            OK(uhmm_migrate(bench->session, shared, len, bench->device, NULL, NULL, 0));
            OK(uhmm_migrate(bench->session, memory, len, bench->device, &moved, NULL, 0));
            SAME(moved.pages[UHMM_PAGE_MOVED] + moved.pages[UHMM_PAGE_ALREADY_THERE], len / PAGE);
        }
        fflush(NULL);
        pid_t pid = fork();
        TRUE_THAT(pid >= 0);
        if (pid == 0) {
            /* Without fork events the child has none of the managed memory, and is told so. */
            if (supported == 1)
                child(bench, memory, shared, len, buffer);
            else
                FAILS(uhmm_in_child(bench->session, &none), ENOENT);
            _exit(0);
        }
        SAME(waitpid(pid, &status, 0), pid);
        SAME(status, 0);
        EXPECT(memory, len, 70);
        EXPECT(shared, len, supported == 1 ? 73 : 72);
    }
    OK(uhmm_free(bench->session, shared));
    OK(uhmm_release(bench->session, memory, len));
    EXPECT(memory, len, 70);
    OK(munmap(memory, len));
    free(buffer);
}
