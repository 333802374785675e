/* Programs that put something between themselves and the system after connect: another user, another root, filters, closed descriptors. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define LEN (4 * MIB)

/* The pager dies and another one begins; every byte that was on the device comes home all the same. */
static void comes_home_after_a_restart(const struct bench *bench, const void *memory)
{
    EXPECT_RESIDENCY(bench->session, memory, LEN, UHMM_RESIDENCY_DEVICE);
    ask("kill pager");
    EXPECT(memory, LEN, 1);
}

/* No connection can be made any more. Expected: the call ends with an error in time. */
static void ends_with_an_error(const struct bench *bench, const void *memory)
{
    uhmm_migrate_report report;
    const double begun = now();
    said(migrates(bench, memory, LEN, &report), EPERM, "may not connect");
    TRUE_THAT(now() - begun < 3);
    EXPECT(memory, LEN, 1);
}

/* A daemon gives up its privilege: the run directory is not its any more. */
void set_user(struct bench *bench)
{
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    OK(setresgid(65534, 65534, 65534));
    OK(setresuid(65534, 65534, 65534));
    comes_home_after_a_restart(bench, memory);
    ends_with_an_error(bench, memory);
}

/* A daemon locks itself into an empty folder. libuhmm's thread has its own root: new calls work too. */
void change_root(struct bench *bench)
{
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    TRUE_THAT(getenv("UHMM_TEST_FOLDER") != NULL);
    OK(chroot(getenv("UHMM_TEST_FOLDER")));
    OK(chdir("/"));
    comes_home_after_a_restart(bench, memory);
    moves(bench, memory, LEN, 1);
}

/* A sandbox without sockets: connect fails. */
void no_connect(struct bench *bench)
{
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    filter(SYS_connect, SECCOMP_RET_ERRNO | EPERM);
    comes_home_after_a_restart(bench, memory);
    ends_with_an_error(bench, memory);
}

/* A sandbox that ends the program at its first ioctl; the agent, which lives by them, is another process. */
void killed_on_ioctl(struct bench *bench)
{
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    filter(SYS_ioctl, SECCOMP_RET_KILL_PROCESS);
    moves(bench, memory, LEN, 1);
    moves(bench, memory, LEN, 1);
    uhmm_migrate_report report;
    OK(migrates(bench, memory, LEN, &report));
    comes_home_after_a_restart(bench, memory);
    moves(bench, memory, LEN, 1);
}

/* The same for madvise, which ends the thread. */
void killed_on_madvise(struct bench *bench)
{
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    filter(SYS_madvise, SECCOMP_RET_KILL_THREAD);
    moves(bench, memory, LEN, 1);
    uhmm_migrate_report report;
    OK(migrates(bench, memory, LEN, &report));
    comes_home_after_a_restart(bench, memory);
    moves(bench, memory, LEN, 1);
}

/* A daemon closes all that it does not know. Expected: nothing of libuhmm's is among it. */
void descriptors_closed(struct bench *bench)
{
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    OK(close_range(3, ~0u, 0));
    moves(bench, memory, LEN, 1);
    uhmm_migrate_report report;
    OK(migrates(bench, memory, LEN, &report));
    comes_home_after_a_restart(bench, memory);
    moves(bench, memory, LEN, 1);
}

/* It opens files then, which get the numbers. Expected: nothing is written to them; the agent's eventfd used to be. */
void descriptors_reused(struct bench *bench)
{
    static const char words[] = "nobody else's";
    char path[] = "/tmp/uhmm-strange-XXXXXX", found[64];
    struct stat about;
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    OK(close_range(3, ~0u, 0));
    int file = mkstemp(path);
    TRUE_THAT(file >= 0);
    OK(unlink(path));
    SAME(write(file, words, sizeof words), sizeof words);
    for (int i = 0; i < 200; i++)
        TRUE_THAT(dup(file) > 0);
    /* Who wrote, wrote behind the words; who set its length, made it shorter. */
    for (int round = 0; round < 20; round++)
        moves(bench, memory, LEN, 1);
    uhmm_migrate_report report;
    OK(migrates(bench, memory, LEN, &report));
    comes_home_after_a_restart(bench, memory);
    moves(bench, memory, LEN, 1);
    OK(fstat(file, &about));
    SAME(about.st_size, sizeof words);
    SAME(pread(file, found, sizeof found, 0), sizeof words);
    OK(memcmp(found, words, sizeof words));
}

/* No descriptor is left to be opened, and stays so. Expected: the connection to the new pager is made all the same. */
void descriptors_limit(struct bench *bench)
{
    struct rlimit limit = {64, 64};
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    OK(setrlimit(RLIMIT_NOFILE, &limit));
    while (open("/dev/null", O_RDONLY) >= 0)
        ;
    SAME(errno, EMFILE);
    comes_home_after_a_restart(bench, memory);
    moves(bench, memory, LEN, 1);
}

/* A sandbox ends whatever thread makes a call that only libuhmm's own thread makes. Expected: calls end with an error; memory comes home. */
static void sdk_killed(struct bench *bench, const long *calls, size_t count)
{
    begin(bench);
    void *memory = put_out(bench, LEN, 1);
    for (size_t i = 0; i < count; i++)
        filter(calls[i], SECCOMP_RET_KILL_THREAD);
    uhmm_migrate_report report;
    uhmm_residency_run run;
    size_t runs;
    void *other = anonymous(MIB);
    TRUE_THAT(migrates(bench, memory, LEN, &report) < 0);
    const double begun = now();
    TRUE_THAT(uhmm_residency(bench->session, memory, LEN, &run, 1, &runs) < 0);
    TRUE_THAT(uhmm_adopt(bench->session, other, MIB) < 0);
    TRUE_THAT(uhmm_last_error(NULL, 0) > 10);
    SAME(thread_named("uhmm-links"), 0);
    /* A fork does not wait for it either, and its child reads what is still on the device. */
    pid_t child = fork();
    TRUE_THAT(child >= 0);
    if (child == 0) {
        OK(prctl(PR_SET_PDEATHSIG, SIGKILL));
        EXPECT(memory, LEN, 1);
        _exit(0);
    }
    int status;
    SAME(waitpid(child, &status, 0), child);
    OK(status);
    EXPECT(memory, LEN, 1);
    uhmm_device_close(bench->device);
    uhmm_disconnect(bench->session);
    TRUE_THAT(now() - begun < 15);
}

void sdk_killed_in_send(struct bench *bench)
{
    sdk_killed(bench, (const long[]){SYS_sendmsg}, 1);
}

void sdk_killed_in_receive(struct bench *bench)
{
    sdk_killed(bench, (const long[]){SYS_recvmsg}, 1);
}

void sdk_killed_in_wait(struct bench *bench)
{
    sdk_killed(bench, (const long[]){SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2}, 3);
}
