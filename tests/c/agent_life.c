/* Births and deaths: of the agent alone, of the program, of its children, by exec, and of the program that others share their memory with. */
#include "agent.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/wait.h>

static int pidfd_of(pid_t pid)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    TRUE_THAT(fd >= 0);
    return fd;
}

/* Waits for the end of a process; its number may be another's afterwards. */
static void wait_end(int pidfd)
{
    struct pollfd end = {.fd = pidfd, .events = POLLIN};
    SAME(poll(&end, 1, ANSWER_MS), 1);
    OK(close(pidfd));
}

static atomic_bool over;
static _Atomic uint64_t rounds;

struct mover {
    const struct bench *bench;
    pthread_t thread;
    uint64_t seed;
};

/* Moves memory of its own out and home until all is over. */
static void *move_in_a_loop(void *argument)
{
    const struct mover *mover = argument;
    const uint64_t len = 2 * MIB;
    void *memory = anonymous(len);
    fill(memory, len, mover->seed);
    OK(uhmm_adopt(mover->bench->session, memory, len));
    while (!atomic_load(&over)) {
        uhmm_migrate_report report;
        OK(migrates(mover->bench, memory, len, &report));
        EXPECT(memory, len, mover->seed);
        if (report.moved_pages == len / PAGE)
            atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}

static void begin_movers(const struct bench *bench, struct mover *movers, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        movers[i] = (struct mover){.bench = bench, .seed = 100 + i};
        OK(pthread_create(&movers[i].thread, NULL, move_in_a_loop, &movers[i]));
    }
}

static void end_movers(struct mover *movers, uint64_t count)
{
    atomic_store(&over, true);
    for (uint64_t i = 0; i < count; i++)
        OK(pthread_join(movers[i].thread, NULL));
}

/* Whole rounds pass within two seconds. */
static void goes_on(uint64_t count)
{
    const uint64_t before = atomic_load(&rounds);
    const double begun = now();
    while (atomic_load(&rounds) < before + count) {
        TRUE_THAT(now() - begun < 2);
        sched_yield();
    }
}

/* The OOM killer, or an operator, kills the agent alone, again and again. Expected: another one goes on within two seconds, and bytes are right. */
void agent_killed(struct bench *bench)
{
    struct mover movers[2];
    begin(bench);
    begin_movers(bench, movers, 2);
    for (int kills = 0; kills < 12; kills++) {
        goes_on(3);
        pid_t agent = agent_pid();
        TRUE_THAT(agent > 0);
        int pidfd = pidfd_of(agent);
        OK(kill(agent, SIGKILL));
        wait_end(pidfd);
    }
    goes_on(5);
    end_movers(movers, 2);
    TRUE_THAT(agent_pid() > 0);
}

static void says_that_the_agent_is_gone(const struct bench *bench, const void *memory, uint64_t len)
{
    uhmm_migrate_report report;
    /* One that came before the pager gave the agent up waits for that, and its pages stay. */
    int first = migrates(bench, memory, len, &report);
    TRUE_THAT(first == -EIO || (first == 0 && report.pages[UHMM_PAGE_IO] == len / PAGE));
    said(migrates(bench, memory, len, &report), EIO, "agent");
}

/* The same, and no other agent may be started, since the program has installed a filter. Expected: -EIO with a text; pages that are out come home. */
void agent_killed_for_good(struct bench *bench)
{
    const uint64_t len = MIB;
    begin(bench);
    void *early = put_out(bench, len, 1), *late = put_out(bench, len, 2), *home = put_out(bench, len, 3);
    EXPECT(home, len, 3);
    filter(SYS_personality, SECCOMP_RET_ERRNO | EPERM);
    pid_t agent = agent_pid();
    TRUE_THAT(agent > 0);
    int pidfd = pidfd_of(agent);
    OK(kill(agent, SIGKILL));
    wait_end(pidfd);
    EXPECT(early, len, 1);
    says_that_the_agent_is_gone(bench, home, len);
    SAME(agent_pid(), 0);
    EXPECT(home, len, 3);
    ask("kill pager");
    EXPECT(late, len, 2);
    EXPECT(early, len, 1);
    says_that_the_agent_is_gone(bench, home, len);
    EXPECT(home, len, 3);
}

/* No processes, but threads: what many sandboxes allow. */
static void forbid_processes(void)
{
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 2),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args)),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 0, 2),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
    };
    install(steps, sizeof steps / sizeof steps[0]);
}

/* Connect under a filter that forbids processes. Expected: the session works, with a thread. */
void clone_forbidden(struct bench *bench)
{
    forbid_processes();
    SAME(fork(), -1);
    begin(bench);
    void *memory = put_out(bench, 4 * MIB, 1);
    SAME(agent_pid(), 0);
    TRUE_THAT(thread_named("uhmm-agent") > 0);
    for (int round = 0; round < 10; round++)
        moves(bench, memory, 4 * MIB, 1);
    uhmm_migrate_report report;
    OK(migrates(bench, memory, 4 * MIB, &report));
    ask("kill pager");
    EXPECT(memory, 4 * MIB, 1);
    moves(bench, memory, 4 * MIB, 1);
    OK(uhmm_release(bench->session, memory, 4 * MIB));
    OK(uhmm_device_close(bench->device));
    OK(uhmm_disconnect(bench->session));
    SAME(thread_named("uhmm-agent"), 0);
}

/* The test itself, under such a filter: it asks for what C does not show. */
void clone_forbidden_exec(struct bench *bench)
{
    (void)bench;
    const char *program = getenv("UHMM_TEST_PROGRAM"), *name = getenv("UHMM_TEST_NAME");
    TRUE_THAT(program != NULL && name != NULL);
    forbid_processes();
    execl(program, program, "--exact", name, "--nocapture", (char *)NULL);
    SAME(errno, 0);
}

/* What a child does that was forked while its parent's threads were inside libuhmm. */
static void child_of_fork(const struct bench *bench, const void *memory, uint64_t len, bool connects)
{
    struct bench own = *bench;
    EXPECT(memory, len, 1);
    if (connects) {
        OK(uhmm_in_child(bench->session, &own.session));
        OK(uhmm_device_open(own.session, "soft0", &own.device));
        for (int round = 0; round < 3; round++)
            moves(&own, memory, len, 1);
    }
    _exit(0);
}

/* Threads are inside libuhmm when the program forks. Expected: children read what they have inherited, and may connect. */
void fork_inside(struct bench *bench)
{
    const uint64_t len = MIB;
    struct mover movers[4];
    begin(bench);
    SAME(uhmm_fork_supported(bench->session), 1);
    void *memory = put_out(bench, len, 1);
    begin_movers(bench, movers, 4);
    for (int i = 0; i < 24; i++) {
        int status = 0;
        goes_on(1);
        pid_t child = fork();
        TRUE_THAT(child >= 0);
        if (child == 0)
            OK(prctl(PR_SET_PDEATHSIG, SIGKILL));
        if (child == 0)
            child_of_fork(bench, memory, len, i % 2 == 1);
        SAME(waitpid(child, &status, 0), child);
        SAME(status, 0);
        moves(bench, memory, len, 1);
    }
    end_movers(movers, 4);
}

/* A program becomes another one while its memory moves. Expected: what was on the device is given back; the new program may connect. */
void exec_inside(struct bench *bench)
{
    static struct mover movers[4];
    begin(bench);
    put_out(bench, 8 * MIB, 1);
    begin_movers(bench, movers, 4);
    goes_on(8);
    execl("/proc/self/exe", "agent", bench->run_dir, "after_exec", (char *)NULL);
    SAME(errno, 0);
}

void after_exec(struct bench *bench)
{
    ask("no spaces are left");
    /* The agent of the program that was here before is no child that wait() finds. */
    SAME(waitpid(-1, NULL, WNOHANG), -1);
    SAME(errno, ECHILD);
    begin(bench);
    moves(bench, put_out(bench, 8 * MIB, 2), 8 * MIB, 2);
}

static void say_who_is_the_agent(void)
{
    char text[64];
    snprintf(text, sizeof text, "agent %d", agent_pid());
    ask(text);
}

static void stay(struct bench *bench, uint32_t pause_ms)
{
    begin(bench);
    void *memory = put_out(bench, 16 * MIB, 1);
    moves(bench, memory, 4 * MIB, 1);
    if (pause_ms > 0)
        OK(uhmm_pause_agent(bench->session, pause_ms));
    say_who_is_the_agent();
}

/* A program that the test ends, one way or the other. Expected: its agent is gone within a second. */
void stays(struct bench *bench)
{
    stay(bench, 0);
}

/* The same in the middle of migrations. */
void stays_moving(struct bench *bench)
{
    static struct mover movers[4];
    begin(bench);
    begin_movers(bench, movers, 4);
    goes_on(4);
    say_who_is_the_agent();
}

/* The same while the agent does nothing. */
void stays_paused(struct bench *bench)
{
    stay(bench, 60000);
}

static struct {
    void *memory;
    int parent;
    char stack[1 << 16] __attribute__((aligned(16)));
} outliving;

/* Shares the memory and has its own descriptors; the program that had adopted it has ended. */
static int outlives(void *argument)
{
    (void)argument;
    /* Nobody ends it when it hangs. */
    alarm(30);
    wait_end(outliving.parent);
    for (int i = 0; i < 3; i++)
        ask("look");
    EXPECT(outliving.memory, 4 * MIB, 1);
    SAME(write(1, "ok memory_outlives\n", 19), 19);
    _exit(0);
}

/* A process that shares the program's memory (as a sanitizer's does) outlives it. Expected: it reads right bytes; it used to read zeros. */
void memory_outlives(struct bench *bench)
{
    begin(bench);
    outliving.memory = put_out(bench, 4 * MIB, 1);
    outliving.parent = pidfd_of(getpid());
    TRUE_THAT(clone(outlives, outliving.stack + sizeof outliving.stack, CLONE_VM, NULL) > 0);
    _exit(0);
}
