/* Signals of the program's never land on libuhmm's threads, nor on the agent. */
#include "agent.h"

#include <signal.h>
#include <stdatomic.h>
#include <sys/signalfd.h>
#include <sys/time.h>

/* A server reads its SIGTERM from a signalfd: blocked after connect, in all threads that it knows. Expected: it reads it; it used to die of it. */
void signalfd_term(struct bench *bench)
{
    struct signalfd_siginfo info;
    sigset_t set;
    begin(bench);
    void *memory = put_out(bench, MIB, 1);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    OK(sigprocmask(SIG_BLOCK, &set, NULL));
    int fd = signalfd(-1, &set, 0);
    TRUE_THAT(fd >= 0);
    for (int round = 0; round < 20; round++) {
        OK(kill(getpid(), SIGTERM));
        moves(bench, memory, MIB, 1);
        SAME(read(fd, &info, sizeof info), sizeof info);
        SAME(info.ssi_signo, SIGTERM);
    }
}

static volatile uint64_t *counter;
static atomic_int handled;

static void on_alarm(int number)
{
    (void)number;
    counter[0]++;
    atomic_fetch_add(&handled, 1);
}

/*
 * A timer's handler writes to adopted memory; every thread of the program blocks it while that memory moves. Expected: it waits until
 * it is unblocked; it used to run on the agent, which then waited for itself.
 */
void alarm_handler(struct bench *bench)
{
    const uint64_t len = 2 * MIB;
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    sigset_t set;
    begin(bench);
    counter = put_out(bench, len, 1);
    TRUE_THAT(signal(SIGALRM, on_alarm) != SIG_ERR);
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    OK(pthread_sigmask(SIG_BLOCK, &set, NULL));
    OK(setitimer(ITIMER_REAL, &often, NULL));
    for (int round = 0; round < 50; round++) {
        moves(bench, (const void *)counter, len, 1);
        SAME(handled, 0);
    }
    OK(setitimer(ITIMER_REAL, &never, NULL));
    uhmm_migrate_report report;
    OK(migrates(bench, (const void *)counter, len, &report));
    OK(pthread_sigmask(SIG_UNBLOCK, &set, NULL));
    SAME(handled, 1);
    SAME(counter[0], word(1, 0) + 1);
}

static void on_interrupt(int number)
{
    (void)number;
    atomic_fetch_add(&handled, 1);
}

/* Ctrl-C goes to the whole process group. Expected: the program's handler runs once, not in the agent too. */
void ctrl_c(struct bench *bench)
{
    OK(setpgid(0, 0));
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART};
    OK(sigaction(SIGINT, &action, NULL));
    begin(bench);
    void *memory = put_out(bench, MIB, 1);
    for (int round = 1; round <= 20; round++) {
        OK(kill(0, SIGINT));
        /* An agent that had got it would have run the handler before it does this. */
        moves(bench, memory, MIB, 1);
        SAME(handled, round);
    }
    TRUE_THAT(agent_pid() > 0);
}
