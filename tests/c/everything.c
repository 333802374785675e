/*
 * What must not be managed, and everything else under management: `everything RUN_DIR PART`.
 * The system has one software device, soft0, of 64 MiB with an aperture. A part ends with "ok PART".
 */
#define _GNU_SOURCE
#include "check.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <linux/capability.h>

/* A call that is refused, with words that name what. */
#define REFUSED(call_, errno_, words_)                                                        \
    do {                                                                                      \
        char said_[2048];                                                                     \
        SAME(call_, -(errno_));                                                               \
        uhmm_last_error(said_, sizeof said_);                                                 \
        if (strstr(said_, words_) == NULL)                                                    \
            give_up(__FILE__, __LINE__, "the text does not say \"" words_ "\"", 0, 1);        \
    } while (0)

/* In static memory: the heap is what this is about. */
static uhmm_range managed[4096];

static uint64_t read_managed(const struct bench *bench)
{
    uint64_t count = 0;
    OK(uhmm_adopted_ranges(bench->session, managed, sizeof managed / sizeof managed[0], &count));
    TRUE_THAT(count <= sizeof managed / sizeof managed[0]);
    for (uint64_t i = 1; i < count; i++)
        TRUE_THAT(managed[i - 1].addr + managed[i - 1].len_bytes < managed[i].addr);
    return count;
}

/* All of a range is managed. */
static bool is_managed(const struct bench *bench, const void *addr, uint64_t len)
{
    const uint64_t start = (uintptr_t)addr, count = read_managed(bench);
    for (uint64_t i = 0; i < count; i++)
        if (managed[i].addr <= start && start + len <= managed[i].addr + managed[i].len_bytes)
            return true;
    return false;
}

/* Any of it is. */
static bool is_touched(const struct bench *bench, const void *addr, uint64_t len)
{
    const uint64_t start = (uintptr_t)addr, count = read_managed(bench);
    for (uint64_t i = 0; i < count; i++)
        if (managed[i].addr < start + len && start < managed[i].addr + managed[i].len_bytes)
            return true;
    return false;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Nothing tells when libuhmm has looked again. */
static void wait_until_managed(const struct bench *bench, const void *addr, uint64_t len)
{
    const double begun = now();
    while (!is_managed(bench, addr, len)) {
        TRUE_THAT(now() - begun < 2);
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

static void *map(uint64_t len, int rights, int flags)
{
    void *memory = mmap(NULL, len, rights, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    TRUE_THAT(memory != MAP_FAILED);
    return memory;
}

static char *page_of(const void *addr)
{
    return (char *)((uintptr_t)addr & ~(uintptr_t)(PAGE - 1));
}

/* Where the kernel says a mapping of this name begins. */
static void *named(const char *name)
{
    char line[512];
    void *found = NULL;
    FILE *maps = fopen("/proc/self/maps", "r");
    TRUE_THAT(maps != NULL);
    while (found == NULL && fgets(line, sizeof line, maps) != NULL)
        if (strstr(line, name) != NULL)
            found = (void *)strtoul(line, NULL, 16);
    fclose(maps);
    return found;
}

/* The page of this session that a forked child reads: the only one that is registered before anything is adopted. */
static void *sentinel(void)
{
    char line[512];
    void *start = NULL;
    FILE *maps = fopen("/proc/self/smaps", "r");
    TRUE_THAT(maps != NULL);
    while (fgets(line, sizeof line, maps) != NULL) {
        if (line[0] < 'A' || line[0] > 'Z')
            start = (void *)strtoul(line, NULL, 16);
        if (strncmp(line, "VmFlags:", 8) == 0 && strstr(line, " um") != NULL)
            break;
    }
    fclose(maps);
    return start;
}

/* A thread that stands still, with memory of its own. */
struct still {
    pthread_t thread;
    pthread_barrier_t ready;
    pthread_barrier_t end;
    void *on_stack;
    void *words;
    char **chunks;
    uint64_t chunk_count;
};

enum { CHUNK = 1000 };

static void *stand_still(void *argument)
{
    struct still *still = argument;
    size_t len;
    char local = 0;
    still->on_stack = &local;
    OK(syscall(SYS_get_robust_list, 0, &still->words, &len));
    /* In this thread's arena. */
    still->chunks = still->chunk_count > 0 ? calloc(still->chunk_count, sizeof *still->chunks) : NULL;
    for (uint64_t i = 0; i < still->chunk_count; i++) {
        still->chunks[i] = malloc(CHUNK);
        TRUE_THAT(still->chunks[i] != NULL);
        fill(still->chunks[i], CHUNK, i);
    }
    pthread_barrier_wait(&still->ready);
    pthread_barrier_wait(&still->end);
    for (uint64_t i = 0; i < still->chunk_count; i++) {
        EXPECT(still->chunks[i], CHUNK, i);
        free(still->chunks[i]);
    }
    free(still->chunks);
    return NULL;
}

static void begin_still(struct still *still, uint64_t chunk_count)
{
    still->chunk_count = chunk_count;
    OK(pthread_barrier_init(&still->ready, NULL, 2));
    OK(pthread_barrier_init(&still->end, NULL, 2));
    OK(pthread_create(&still->thread, NULL, stand_still, still));
    pthread_barrier_wait(&still->ready);
}

static void end_still(struct still *still)
{
    pthread_barrier_wait(&still->end);
    OK(pthread_join(still->thread, NULL));
}

static void refusals(const struct bench *bench)
{
    struct still still = {0};
    void *words = NULL;
    size_t len;
    char *memory;

    TRUE_THAT(sentinel() != NULL);
    REFUSED(uhmm_adopt(bench->session, sentinel(), PAGE), EPERM, "sentinel");
    OK(syscall(SYS_get_robust_list, 0, &words, &len));
    REFUSED(uhmm_adopt(bench->session, page_of(words), PAGE), EPERM, "when the thread ends");
    begin_still(&still, 0);
    REFUSED(uhmm_adopt(bench->session, page_of(still.words), PAGE), EPERM, "pthread_join");
    end_still(&still);

    TRUE_THAT(named("[stack]") != NULL && named("[vdso]") != NULL && named("[vvar]") != NULL);
    REFUSED(uhmm_adopt(bench->session, named("[stack]"), PAGE), EINVAL, "grows downwards");
    REFUSED(uhmm_adopt(bench->session, named("[vdso]"), PAGE), EINVAL, "[vdso]");
    REFUSED(uhmm_adopt(bench->session, named("[vvar]"), PAGE), EINVAL, "[vvar]");
    if (named("[vsyscall]") != NULL)
        FAILS(uhmm_adopt(bench->session, named("[vsyscall]"), PAGE), EFAULT);
    memory = map(4 * PAGE, PROT_READ | PROT_WRITE, MAP_GROWSDOWN);
    REFUSED(uhmm_adopt(bench->session, memory, 4 * PAGE), EINVAL, "MAP_GROWSDOWN");
    OK(munmap(memory, 4 * PAGE));
    memory = map(4 * PAGE, PROT_READ | PROT_WRITE, 0);
    OK(mprotect(memory + 2 * PAGE, PAGE, PROT_READ | PROT_EXEC));
    REFUSED(uhmm_adopt(bench->session, memory, 4 * PAGE), EINVAL, "executable");
    /* Nothing of it was adopted; the rest can be, on its own, and so can memory of few rights. */
    TRUE_THAT(!is_touched(bench, memory, 4 * PAGE));
    OK(uhmm_adopt(bench->session, memory, 2 * PAGE));
    OK(mprotect(memory + 2 * PAGE, PAGE, PROT_NONE));
    OK(mprotect(memory + 3 * PAGE, PAGE, PROT_READ));
    OK(uhmm_adopt(bench->session, memory, 4 * PAGE));
    OK(uhmm_release(bench->session, memory, 4 * PAGE));
    OK(munmap(memory, 4 * PAGE));
    FAILS(uhmm_adopted_ranges(bench->session, managed, 4, NULL), EINVAL);
    FAILS(uhmm_adopted_ranges(bench->session, NULL, 4, &(uint64_t){0}), EINVAL);
    FAILS(uhmm_adopt_all(NULL, NULL), EINVAL);
}

/* mseal() where the kernel has it: what may be written still moves, both ways. */
static void sealed(const struct bench *bench)
{
    uint64_t *memory = map(4 * PAGE, PROT_READ | PROT_WRITE, 0);
    uhmm_migrate_report report;
    fill(memory, 4 * PAGE, 9);
    if (syscall(462, memory, 4 * PAGE, 0) != 0)
        return;
    OK(uhmm_adopt(bench->session, memory, 4 * PAGE));
    OK(uhmm_migrate(bench->session, memory, 4 * PAGE, bench->device, &report, NULL, 0));
    SAME(report.moved_pages, 4);
    EXPECT(memory, 4 * PAGE, 9);
    OK(uhmm_release(bench->session, memory, 4 * PAGE));
}

static struct still arena;
static char *chunks[2000];

/* Everything is adopted; heap, an arena and plain memory have contents. */
static uint64_t *begin_everything(const struct bench *bench, uhmm_adopted_all *report)
{
    uint64_t *plain = map(4 * MIB, PROT_READ | PROT_WRITE, 0);
    for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++) {
        TRUE_THAT((chunks[i] = malloc(CHUNK)) != NULL);
        fill(chunks[i], CHUNK, i);
    }
    fill(plain, 4 * MIB, 77);
    begin_still(&arena, 2000);
    OK(uhmm_adopt_all(bench->session, report));
    return plain;
}

static void end_everything(uint64_t *plain)
{
    end_still(&arena);
    for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++) {
        EXPECT(chunks[i], CHUNK, i);
        free(chunks[i]);
    }
    EXPECT(plain, 4 * MIB, 77);
    OK(munmap(plain, 4 * MIB));
}

/* What is adopted and what is left alone, at once and later; nothing moves. */
static void finds(const struct bench *bench)
{
    uhmm_adopted_all report = {0};
    char local = 0, *locked = map(MIB, PROT_READ | PROT_WRITE, 0), *dontfork = map(MIB, PROT_READ | PROT_WRITE, 0);
    char *wiped = map(MIB, PROT_READ | PROT_WRITE, 0), *code = map(MIB, PROT_READ | PROT_WRITE | PROT_EXEC, 0);
    char *reserved = map(64 * MIB, PROT_NONE, 0), *shared, *small, *later;
    uint64_t *plain, count;
    void *words = NULL;
    size_t len;

    OK(mlock(locked, MIB));
    OK(madvise(dontfork, MIB, MADV_DONTFORK));
    OK(madvise(wiped, MIB, MADV_WIPEONFORK));
    shared = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    TRUE_THAT(shared != MAP_FAILED);
    /* Alone between two pages that are not adopted. */
    small = (char *)map(3 * PAGE, PROT_NONE, 0) + PAGE;
    OK(mprotect(small, PAGE, PROT_READ));
    OK(syscall(SYS_get_robust_list, 0, &words, &len));

    plain = begin_everything(bench, &report);
    TRUE_THAT(report.region_count >= 3 && report.bytes >= 8 * MIB && report.already_bytes == 0);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_SHARED] >= MIB);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_FILE] > 0);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_KERNEL] > 0);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_EXECUTABLE] >= MIB);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_GROWS_DOWN] > 0);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_NO_ACCESS] >= 64 * MIB);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_THREAD_STACK] > 0);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_LOCKED] >= MIB);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_NOT_INHERITED] >= MIB);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_WIPED_IN_CHILDREN] >= MIB);
    SAME(report.left_alone_bytes[UHMM_LEFT_QUOTA], 0);

    TRUE_THAT(is_managed(bench, plain, 4 * MIB));
    for (size_t i = 0; i < 2000; i += 100) {
        TRUE_THAT(is_managed(bench, page_of(chunks[i]), PAGE));
        TRUE_THAT(is_managed(bench, page_of(arena.chunks[i]), PAGE));
    }
    TRUE_THAT(!is_touched(bench, page_of(&local), PAGE));
    TRUE_THAT(!is_touched(bench, page_of(words), PAGE));
    TRUE_THAT(!is_touched(bench, page_of(arena.on_stack), PAGE));
    TRUE_THAT(!is_touched(bench, page_of(arena.words), PAGE));
    TRUE_THAT(!is_touched(bench, locked, MIB) && !is_touched(bench, dontfork, MIB) && !is_touched(bench, wiped, MIB));
    TRUE_THAT(!is_touched(bench, code, MIB) && !is_touched(bench, reserved, 64 * MIB));
    TRUE_THAT(!is_touched(bench, shared, MIB) && !is_touched(bench, small, PAGE));
    count = read_managed(bench);
    OK(uhmm_adopted_ranges(bench->session, NULL, 0, &count));
    TRUE_THAT(count >= 3);

    /* What appears later, also where something else was a moment ago. */
    later = map(MIB, PROT_READ | PROT_WRITE, 0);
    wait_until_managed(bench, later, MIB);
    for (int round = 0; round < 5; round++) {
        OK(munmap(later, MIB));
        TRUE_THAT(mmap(later, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == later);
        wait_until_managed(bench, later, MIB);
    }
    OK(mprotect(reserved + 8 * MIB, MIB, PROT_READ | PROT_WRITE));
    wait_until_managed(bench, reserved + 8 * MIB, MIB);
    /* Given back by the program: that stays so. */
    OK(uhmm_release(bench->session, later, MIB));
    OK(uhmm_adopt_all(bench->session, &report));
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_RELEASED] >= MIB && report.already_bytes >= 8 * MIB);
    TRUE_THAT(!is_touched(bench, later, MIB));
    OK(uhmm_adopt(bench->session, later, MIB));
    TRUE_THAT(is_managed(bench, later, MIB));
    OK(munmap(later, MIB));
    end_everything(plain);
}

/* All of the heap, an arena and plain memory leaves and comes home again. */
static void migrates(const struct bench *bench)
{
    uhmm_adopted_all report;
    uint64_t *plain = begin_everything(bench, &report);
    for (int round = 0; round < 20; round++) {
        const uint64_t count = read_managed(bench);
        for (uint64_t i = 0; i < count; i++) {
            const void *addr = (const void *)(uintptr_t)managed[i].addr;
            const uint64_t len = managed[i].len_bytes < 8 * MIB ? managed[i].len_bytes : 8 * MIB;
            const int error = uhmm_migrate(bench->session, addr, len, bench->device, NULL, NULL, 0);
            /* It may be unmapped by now. */
            TRUE_THAT(error == 0 || error == -EFAULT || error == -EINVAL);
        }
    }
    end_everything(plain);
}

static atomic_bool over;

/* Half of all managed memory is moved out, again and again. */
static void *move_half(void *argument)
{
    const struct bench *bench = argument;
    while (!atomic_load(&over)) {
        const uint64_t count = read_managed(bench);
        for (uint64_t i = 0; i < count && !atomic_load(&over); i++) {
            const uint64_t half = managed[i].len_bytes / 2 / PAGE * PAGE;
            const uint64_t len = half < 2 * MIB ? half : 2 * MIB;
            if (len > 0)
                uhmm_migrate(bench->session, (const void *)(uintptr_t)managed[i].addr, len, bench->device, NULL, NULL, 0);
        }
    }
    return NULL;
}

static void *churn(void *argument)
{
    const uint64_t seed = (uintptr_t)argument;
    for (uint64_t i = 0; i < 50; i++) {
        const uint64_t len = 64 << i % 12;
        void *memory = malloc(len);
        TRUE_THAT(memory != NULL);
        fill(memory, len, seed + i);
        EXPECT(memory, len, seed + i);
        free(memory);
    }
    return NULL;
}

enum { CHURNERS = 24, ROUNDS = 40 };

/* Threads begin and end while memory moves: no stack is managed when its thread ends, so every join returns. */
static void threads_end(const struct bench *bench)
{
    pthread_t mover, churners[CHURNERS];
    uhmm_adopted_all report;
    uint64_t *plain = begin_everything(bench, &report);
    OK(pthread_create(&mover, NULL, move_half, (void *)bench));
    for (uintptr_t round = 0; round < ROUNDS; round++) {
        for (uintptr_t i = 0; i < CHURNERS; i++)
            OK(pthread_create(&churners[i], NULL, churn, (void *)(round * CHURNERS + i)));
        for (int i = 0; i < CHURNERS; i++)
            OK(pthread_join(churners[i], NULL));
    }
    atomic_store(&over, true);
    OK(pthread_join(mover, NULL));
    end_everything(plain);
}

/* Memory that is managed and becomes a thread's stack is given back. */
static void becomes_a_stack(const struct bench *bench)
{
    struct still still = {0};
    pthread_attr_t attributes;
    uhmm_adopted_all report;
    char *stack = map(MIB, PROT_READ | PROT_WRITE, 0);
    double begun;

    OK(uhmm_adopt_all(bench->session, &report));
    TRUE_THAT(is_managed(bench, stack, MIB));
    OK(pthread_attr_init(&attributes));
    OK(pthread_attr_setstack(&attributes, stack, MIB));
    OK(pthread_barrier_init(&still.ready, NULL, 2));
    OK(pthread_barrier_init(&still.end, NULL, 2));
    OK(pthread_create(&still.thread, &attributes, stand_still, &still));
    pthread_barrier_wait(&still.ready);
    begun = now();
    while (is_touched(bench, page_of(still.words), PAGE)) {
        TRUE_THAT(now() - begun < 2);
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
    end_still(&still);
    OK(munmap(stack, MIB));
}

/* The manifest allows two regions. */
static void quota(const struct bench *bench)
{
    uhmm_adopted_all report;
    begin_everything(bench, &report);
    SAME(report.region_count, 2);
    TRUE_THAT(report.left_alone_bytes[UHMM_LEFT_QUOTA] > 0);
    OK(uhmm_adopt_all(bench->session, &report));
    SAME(report.region_count, 0);
    end_still(&arena);
}

static atomic_int handled;

static void on_signal(int number)
{
    (void)number;
    TRUE_THAT(syscall(SYS_gettid) == getpid());
    atomic_fetch_add(&handled, 1);
}

/* A signal of the process never runs its handler on the thread that looks for memory. */
static void signals(const struct bench *bench)
{
    struct sigaction action = {.sa_handler = on_signal};
    char name[64] = "", path[64];
    bool found = false;
    OK(sigaction(SIGUSR1, &action, NULL));
    OK(uhmm_adopt_all(bench->session, NULL));
    for (pid_t tid = getpid(); tid < getpid() + 64 && !found; tid++) {
        snprintf(path, sizeof path, "/proc/self/task/%d/comm", tid);
        FILE *comm = fopen(path, "r");
        if (comm == NULL)
            continue;
        found = fgets(name, sizeof name, comm) != NULL && strcmp(name, "uhmm-adopt\n") == 0;
        fclose(comm);
        if (found) {
            /* To that thread: it stays pending. */
            OK(syscall(SYS_tgkill, getpid(), tid, SIGUSR1));
        }
    }
    TRUE_THAT(found);
    OK(uhmm_adopt_all(bench->session, NULL));
    SAME(atomic_load(&handled), 0);
    OK(raise(SIGUSR1));
    SAME(atomic_load(&handled), 1);
}

/* This process may from now on make userfaultfds for user mode only. */
static bool give_up_privilege(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {0};
    if (getuid() != 0)
        return true;
    if (access("/dev/userfaultfd", F_OK) == 0
        && (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0
            || mount("/dev/null", "/dev/userfaultfd", NULL, MS_BIND, NULL) != 0))
        return false;
    if (syscall(SYS_capget, &head, data) != 0)
        return false;
    data[0].effective &= ~(1u << CAP_SYS_PTRACE);
    data[0].permitted &= ~(1u << CAP_SYS_PTRACE);
    return syscall(SYS_capset, &head, data) == 0;
}

static void user_mode_only(const struct bench *bench)
{
    stack_t stack = {.ss_size = 64 << 10}, none = {.ss_flags = SS_DISABLE};
    uhmm_adopted_all report;
    char *heap = named("[heap]");

    if (uhmm_system_calls_wait(bench->session) != 0)
        return; /* vm.unprivileged_userfaultfd is 1 here. */
    REFUSED(uhmm_adopt_all(bench->session, &report), EPERM, "vm.unprivileged_userfaultfd=1");
    stack.ss_sp = map(stack.ss_size, PROT_READ | PROT_WRITE, 0);
    OK(sigaltstack(&stack, NULL));
    REFUSED(uhmm_adopt(bench->session, stack.ss_sp, stack.ss_size), EPERM, "alternate signal stack");
    OK(sigaltstack(&none, NULL));
    OK(uhmm_adopt(bench->session, stack.ss_sp, stack.ss_size));
    OK(uhmm_release(bench->session, stack.ss_sp, stack.ss_size));
    TRUE_THAT(heap != NULL);
    REFUSED(uhmm_adopt(bench->session, heap, (uint64_t)((char *)sbrk(0) - heap) / PAGE * PAGE), EPERM, "objects of uhmm's own");
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(const struct bench *);
    } parts[] = {
        {"refusals", refusals},
        {"sealed", sealed},
        {"finds", finds},
        {"migrates", migrates},
        {"threads_end", threads_end},
        {"becomes_a_stack", becomes_a_stack},
        {"signals", signals},
        {"quota", quota},
        {"user_mode_only", user_mode_only},
    };
    if (argc != 3) {
        fprintf(stderr, "usage: %s RUN_DIR PART\n", argv[0]);
        return 2;
    }
    struct bench bench = {.run_dir = argv[1]};
    if (strcmp(argv[2], "user_mode_only") == 0 && !give_up_privilege()) {
        perror("This account may not give up its privilege");
        return 3;
    }
    OK(uhmm_connect(bench.run_dir, &bench.session));
    OK(uhmm_device_open(bench.session, "soft0", &bench.device));
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (strcmp(argv[2], parts[i].name) != 0)
            continue;
        parts[i].run(&bench);
        OK(uhmm_device_close(bench.device));
        OK(uhmm_disconnect(bench.session));
        printf("ok %s\n", parts[i].name);
        return 0;
    }
    fprintf(stderr, "there is no part %s\n", argv[2]);
    return 2;
}
