/* Memory that libuhmm lives on, locked memory, limits, and an address space whose number is somebody else's. */
#include "agent.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

enum { CHUNKS = 1000, CHUNK = 1000, ROUNDS = 100 };

/* Chunks of one arena that keep their bytes while others come and go beside them. */
static void churn(uint64_t round)
{
    void *chunks[64];
    for (uint64_t i = 0; i < 64; i++) {
        TRUE_THAT((chunks[i] = malloc(64 + i * 100)) != NULL);
        fill(chunks[i], 64 + i * 100, round + i);
    }
    for (uint64_t i = 0; i < 64; i++) {
        EXPECT(chunks[i], 64 + i * 100, round + i);
        free(chunks[i]);
    }
}

static void fill_chunks(void **chunks)
{
    for (uint64_t i = 0; i < CHUNKS; i++) {
        TRUE_THAT((chunks[i] = malloc(CHUNK)) != NULL);
        fill(chunks[i], CHUNK, i);
    }
}

static void expect_chunks(void *const *chunks)
{
    for (uint64_t i = 0; i < CHUNKS; i++)
        EXPECT(chunks[i], CHUNK, i);
}

/* True: adopted. Else it is refused with a text that says why, which may be only where the kernel cannot wait for the page. */
static bool adopts_or_says_why(const struct bench *bench, void *start, uint64_t len)
{
    int error = uhmm_adopt(bench->session, start, len);
    if (error == 0)
        return true;
    SAME(uhmm_system_calls_wait(bench->session), 0);
    said(error, EPERM, "uhmm's own");
    return false;
}

/* The bytes of a mapping: of this name, or that begins here. */
static uint64_t find_mapping(const char *name, uint64_t *start)
{
    char line[512];
    uint64_t from = 0, end = 0;
    bool found = false;
    FILE *maps = fopen("/proc/self/maps", "r");
    TRUE_THAT(maps != NULL);
    while (!found && fgets(line, sizeof line, maps) != NULL)
        if (sscanf(line, "%" SCNx64 "-%" SCNx64, &from, &end) == 2)
            found = name != NULL ? strstr(line, name) != NULL : from == *start;
    fclose(maps);
    TRUE_THAT(found);
    *start = from;
    return end - from;
}

/* The program adopts its [heap], which libuhmm's own objects lie on, and moves it in a loop. Expected: bytes stay right; the first move used to hang. */
void own_heap(struct bench *bench)
{
    static void *chunks[CHUNKS];
    uint64_t moved = 0;
    begin(bench);
    fill_chunks(chunks);
    uint64_t start = 0, len = find_mapping("[heap]", &start);
    TRUE_THAT(len > CHUNKS * CHUNK);
    if (!adopts_or_says_why(bench, (void *)start, len))
        return;
    for (uint64_t round = 0; round < ROUNDS; round++) {
        uhmm_migrate_report report;
        OK(uhmm_migrate(bench->session, (void *)start, len, bench->device, &report, NULL, 0));
        moved += report.moved_pages;
        churn(round);
        expect_chunks(chunks);
    }
    TRUE_THAT(moved > ROUNDS);
}

struct arena {
    pthread_barrier_t ready;
    void *chunks[CHUNKS];
    atomic_bool over;
};

static void *use_arena(void *argument)
{
    struct arena *arena = argument;
    fill_chunks(arena->chunks);
    pthread_barrier_wait(&arena->ready);
    for (uint64_t round = 0; !atomic_load(&arena->over); round++) {
        churn(round);
        expect_chunks(arena->chunks);
    }
    return NULL;
}

/* A thread's malloc arena is moved in a loop while the thread goes on. Expected: as for the heap. */
void own_arena(struct bench *bench)
{
    static struct arena arena;
    pthread_t thread;
    uint64_t moved = 0;
    begin(bench);
    OK(pthread_barrier_init(&arena.ready, NULL, 2));
    OK(pthread_create(&thread, NULL, use_arena, &arena));
    pthread_barrier_wait(&arena.ready);
    /* glibc: the pieces of an arena begin at multiples of 64 MiB. */
    uint64_t start = (uint64_t)arena.chunks[0] & ~(64 * MIB - 1);
    const uint64_t len = find_mapping(NULL, &start);
    TRUE_THAT(len > CHUNKS * CHUNK);
    if (adopts_or_says_why(bench, (void *)start, len)) {
        for (int round = 0; round < ROUNDS; round++) {
            uhmm_migrate_report report;
            OK(uhmm_migrate(bench->session, (void *)start, len, bench->device, &report, NULL, 0));
            moved += report.moved_pages;
        }
        TRUE_THAT(moved > ROUNDS);
    }
    atomic_store(&arena.over, true);
    OK(pthread_join(thread, NULL));
}

static double free_until;

static void *free_in_a_loop(void *argument)
{
    const struct bench *bench = argument;
    for (uint64_t round = 0; now() < free_until; round++) {
        uint8_t *chunk = malloc(100000);
        TRUE_THAT(chunk != NULL);
        uint64_t start = ((uint64_t)chunk + PAGE - 1) & ~(PAGE - 1), end = ((uint64_t)chunk + 100000) & ~(PAGE - 1);
        uint64_t seed = (uint64_t)pthread_self() + round;
        uhmm_pending *pending;
        fill((void *)start, end - start, seed);
        OK(uhmm_adopt(bench->session, (void *)start, end - start));
        OK(uhmm_migrate_async(bench->session, (void *)start, end - start, bench->device, &pending));
        if (round % 2 == 0)
            EXPECT((void *)start, end - start, seed);
        free(chunk);
        SAME(uhmm_pending_wait(pending, ANSWER_MS), 1);
        OK(uhmm_pending_free(pending));
    }
    return NULL;
}

/*
 * malloc, adopt, migrate without waiting, free, in 24 threads with glibc as it comes. Expected: goes on; free() waits for a page with the arena's
 * lock held, and the agent used to want that lock.
 */
void free_while_moving(struct bench *bench)
{
    pthread_t threads[24];
    begin(bench);
    free_until = now() + 3;
    for (int i = 0; i < 24; i++)
        OK(pthread_create(&threads[i], NULL, free_in_a_loop, bench));
    for (int i = 0; i < 24; i++)
        OK(pthread_join(threads[i], NULL));
}

/* Memory of a slot of the thread's own, always at the same place, like the top of malloc's heap, which brk() gives back and takes again. */
static void *fresh(uint64_t slot, uint64_t len)
{
    void *place = (void *)(UINT64_C(0x510000000000) + slot * 16 * MIB);
    SAME(mmap(place, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0), place);
    return place;
}

static atomic_uint_fast64_t slots;

static void *unmap_in_a_loop(void *argument)
{
    const struct bench *bench = argument;
    const uint64_t slot = atomic_fetch_add(&slots, 1), len = 24 * PAGE;
    for (uint64_t round = 0; now() < free_until; round++) {
        void *memory = fresh(slot, len);
        uhmm_pending *pending;
        fill(memory, len, slot + round);
        OK(uhmm_adopt(bench->session, memory, len));
        OK(uhmm_migrate_async(bench->session, memory, len, bench->device, &pending));
        if (round % 3 == 0)
            sched_yield();
        OK(munmap(memory, len));
        /* Other memory from here on, adopted every other time. */
        memory = fresh(slot, len);
        fill(memory, len, ~round);
        if (round % 2 == 0)
            OK(uhmm_adopt(bench->session, memory, len));
        SAME(uhmm_pending_wait(pending, ANSWER_MS), 1);
        OK(uhmm_pending_free(pending));
        EXPECT(memory, len, ~round);
        OK(munmap(memory, len));
    }
    return NULL;
}

/*
 * mmap, adopt, migrate without waiting, munmap, mmap at the same place, in 24 threads. Expected: the new memory keeps what is written to it; an agent
 * that came late used to take it for the old one.
 */
void unmap_while_moving(struct bench *bench)
{
    pthread_t threads[24];
    begin(bench);
    free_until = now() + 3;
    for (int i = 0; i < 24; i++)
        OK(pthread_create(&threads[i], NULL, unmap_in_a_loop, bench));
    for (int i = 0; i < 24; i++)
        OK(pthread_join(threads[i], NULL));
}

/* Rounds of moving out and home: locked memory and memory in use stay what they were. */
static void rounds_take_nothing(const struct bench *bench, uint64_t len)
{
    void *memory = anonymous(len);
    fill(memory, len, 1);
    OK(uhmm_adopt(bench->session, memory, len));
    long locked = 0, resident = 0;
    for (int round = 0; round < 6; round++) {
        uhmm_migrate_report report;
        OK(uhmm_migrate(bench->session, memory, len, bench->device, &report, NULL, 0));
        SAME(report.moved_pages, len / PAGE);
        EXPECT(memory, len, 1);
        /* The first round finds libuhmm's own tables. */
        if (round == 0) {
            locked = status_of("VmLck:");
            resident = status_of("VmRSS:");
            TRUE_THAT(locked >= (long)(len >> 10));
        }
        SAME(status_of("VmLck:"), locked);
    }
    TRUE_THAT(status_of("VmRSS:") < resident + 2048);
}

/* Real-time programs lock all that they have and will have. Expected: pages move as without; scratch used to be born locked, and nothing moved. */
void mlockall_after(struct bench *bench)
{
    begin(bench);
    OK(mlockall(MCL_CURRENT | MCL_FUTURE));
    rounds_take_nothing(bench, 8 * MIB);
}

/* The same, from the first touch on. Expected: no 8 MiB that stay behind in each round. */
void mlockall_onfault(struct bench *bench)
{
    begin(bench);
    OK(mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT));
    rounds_take_nothing(bench, 8 * MIB);
}

/* The agent's memory is made under mlockall. Expected: it is not locked: less than 8 MiB more is after connect. */
void mlockall_before(struct bench *bench)
{
    OK(mlockall(MCL_CURRENT | MCL_FUTURE));
    begin(bench);
    rounds_take_nothing(bench, 8 * MIB);
}

/* An ordinary user has locked all that it may. Expected: pages that are locked stay where they are, as PINNED; unlocked, they move. */
void memlock_limit(struct bench *bench)
{
    const uint64_t len = 16 * PAGE;
    struct rlimit limit = {len, len};
    uhmm_migrate_report report;
    OK(setrlimit(RLIMIT_MEMLOCK, &limit));
    become_ordinary();
    begin(bench);
    void *memory = anonymous(len);
    fill(memory, len, 1);
    OK(mlock(memory, len));
    OK(uhmm_adopt(bench->session, memory, len));
    OK(migrates(bench, memory, len, &report));
    SAME(report.pages[UHMM_PAGE_PINNED], len / PAGE);
    SAME(report.moved_pages, 0);
    EXPECT(memory, len, 1);
    OK(munlock(memory, len));
    OK(migrates(bench, memory, len, &report));
    SAME(report.moved_pages, len / PAGE);
    EXPECT(memory, len, 1);
}

/* The program may not have the addresses that the agent needs. Expected: an error that names the limit; with a higher one it connects. */
void address_space_limit(struct bench *bench)
{
    struct rlimit limit;
    become_ordinary();
    OK(getrlimit(RLIMIT_AS, &limit));
    limit.rlim_cur = (rlim_t)status_of("VmSize:") * 1024 + 4 * MIB;
    OK(setrlimit(RLIMIT_AS, &limit));
    said(uhmm_connect(bench->run_dir, &bench->session), ENOMEM, "RLIMIT_AS");
    limit.rlim_cur = limit.rlim_max;
    OK(setrlimit(RLIMIT_AS, &limit));
    begin(bench);
    moves(bench, put_out(bench, MIB, 1), MIB, 1);
}

/* The user has as many processes and threads as it may: of some that it takes to connect, the last one is not made. Expected: an error that names the
 * limit, not a filter; with room it connects, and an agent that is killed where there is none is followed by another one when there is. */
void process_limit(struct bench *bench)
{
    struct rlimit limit;
    int refused = 0, answer = 0;
    ask("open to others");
    /* Nobody else's processes count. */
    uid_t alone = 100000 + (uid_t)getpid();
    OK(setresgid(alone, alone, alone));
    OK(setresuid(alone, alone, alone));
    OK(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
    OK(getrlimit(RLIMIT_NPROC, &limit));
    for (limit.rlim_cur = 1; limit.rlim_cur < 10; limit.rlim_cur++) {
        OK(setrlimit(RLIMIT_NPROC, &limit));
        answer = uhmm_connect(bench->run_dir, &bench->session);
        if (answer == 0)
            break;
        said(answer, EAGAIN, "ulimit -u");
        said(answer, EAGAIN, "pids.max");
        refused++;
    }
    OK(answer);
    TRUE_THAT(refused >= 2);
    OK(uhmm_device_open(bench->session, "soft0", &bench->device));
    void *memory = put_out(bench, MIB, 1);
    pid_t first = agent_pid();
    TRUE_THAT(first > 0);
    rlim_t room = limit.rlim_cur;
    limit.rlim_cur = 1;
    OK(setrlimit(RLIMIT_NPROC, &limit));
    OK(kill(first, SIGKILL));
    /* Longer than it takes to find that there is no room, and than the pager waits. */
    for (double end = now() + 1.5; now() < end;)
        usleep(10000);
    EXPECT(memory, MIB, 1);
    limit.rlim_cur = room;
    OK(setrlimit(RLIMIT_NPROC, &limit));
    uhmm_migrate_report report = {0};
    for (double end = now() + 20; report.moved_pages != MIB / PAGE;) {
        TRUE_THAT(now() < end);
        migrates(bench, memory, MIB, &report);
        usleep(10000);
    }
    TRUE_THAT(agent_pid() != first);
    EXPECT(memory, MIB, 1);
}

#define FIXED ((void *)0x500000000000)

static void *fixed(uint64_t len)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    SAME(mmap(FIXED, len, PROT_READ | PROT_WRITE, flags, -1, 0), FIXED);
    return FIXED;
}

/* What a process in a container does whose number, in the host, is another process's. */
static void work_in_namespace(struct bench *bench, pid_t number, uint64_t len)
{
    static uint8_t buffer[MIB];
    SAME(getpid(), number);
    void *memory = fixed(len);
    begin(bench);
    for (uint64_t seed = 5; seed < 8; seed++) {
        fill(memory, len, seed);
        if (seed == 5)
            OK(uhmm_adopt(bench->session, memory, len));
        uhmm_migrate_report report;
        OK(migrates(bench, memory, len, &report));
        SAME(report.moved_pages, len / PAGE);
        OK(uhmm_device_read(bench->device, memory, buffer, len, NULL));
        EXPECT(buffer, len, seed);
        EXPECT(memory, len, seed);
    }
    OK(uhmm_release(bench->session, memory, len));
    EXPECT(memory, len, 7);
    OK(uhmm_disconnect(bench->session));
}

static int result_of(pid_t child)
{
    int status = 0;
    TRUE_THAT(child > 0);
    SAME(waitpid(child, &status, 0), child);
    return status;
}

/* First process of the namespace: its child gets the number of the process outside. */
static void first_of_namespace(struct bench *bench, pid_t number, uint64_t len)
{
    /* Its end is that of all in the namespace. */
    OK(prctl(PR_SET_PDEATHSIG, SIGKILL));
    FILE *last = fopen("/proc/sys/kernel/ns_last_pid", "w");
    TRUE_THAT(last != NULL);
    TRUE_THAT(fprintf(last, "%d", number - 1) > 0);
    OK(fclose(last));
    pid_t child = fork();
    if (child == 0)
        work_in_namespace(bench, number, len);
    if (child == 0)
        _exit(0);
    _exit(result_of(child) == 0 ? 0 : 1);
}

/*
 * A PID namespace under the host's /proc. A process of the host with the program's number has the same range, and nothing in it. Expected: right
 * bytes; holes used to be read from that process.
 */
void pid_namespace(struct bench *bench)
{
    const uint64_t len = MIB;
    pid_t other = fork();
    if (other == 0) {
        OK(prctl(PR_SET_PDEATHSIG, SIGKILL));
        fixed(len);
        for (;;)
            pause();
    }
    TRUE_THAT(other > 0);
    OK(unshare(CLONE_NEWPID));
    pid_t first = fork();
    if (first == 0)
        first_of_namespace(bench, other, len);
    int status = result_of(first);
    OK(kill(other, SIGKILL));
    result_of(other);
    OK(status);
}
