/* What the parts of the agent's program share: see agent.c. */
#ifndef AGENT_H
#define AGENT_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "check.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

/* A call that is not answered after so many milliseconds hangs. */
#define ANSWER_MS 10000

double now(void);

/* Asks the test to do something, and waits until it is done. System calls alone: filters and closed files do not matter. */
void ask(const char *what);

void begin(struct bench *bench);

/* Adopted memory of this pattern that lies on the device. */
void *put_out(const struct bench *bench, uint64_t len, uint64_t seed);

/* The error of a migration to the device. One that is not answered in time ends the program. */
int migrates(const struct bench *bench, const void *memory, uint64_t len, uhmm_migrate_report *report);

/* All of it moves to the device, and its bytes are right. */
void moves(const struct bench *bench, const void *memory, uint64_t len, uint64_t seed);

/* A call failed with this number, and its text says this. */
void said(int found, int error, const char *words);

/* The agent's process: a child of one of our threads. 0: there is none. */
pid_t agent_pid(void);

/* The number of our thread of this name; 0: there is none. */
pid_t thread_named(const char *name);

/* A number of /proc/self/status, like "VmRSS:". */
long status_of(const char *name);

/* From now on all threads get this instead of one system call. */
void filter(long call, uint32_t action);

/* Installs a filter for all threads. */
void install(struct sock_filter *steps, unsigned short count);

/* From now on an ordinary user that may use the system. */
void become_ordinary(void);

#define PART(name_) void name_(struct bench *bench)

/* agent_memory.c */
PART(own_heap);
PART(own_arena);
PART(free_while_moving);
PART(unmap_while_moving);
PART(mlockall_after);
PART(mlockall_onfault);
PART(mlockall_before);
PART(memlock_limit);
PART(address_space_limit);
PART(process_limit);
PART(pid_namespace);
/* agent_signals.c */
PART(signalfd_term);
PART(alarm_handler);
PART(ctrl_c);
/* agent_barriers.c */
PART(set_user);
PART(change_root);
PART(no_connect);
PART(killed_on_ioctl);
PART(killed_on_madvise);
PART(descriptors_closed);
PART(descriptors_reused);
PART(descriptors_limit);
PART(sdk_killed_in_send);
PART(sdk_killed_in_receive);
PART(sdk_killed_in_wait);
/* agent_life.c */
PART(agent_killed);
PART(agent_killed_for_good);
PART(clone_forbidden);
PART(clone_forbidden_exec);
PART(fork_inside);
PART(exec_inside);
PART(after_exec);
PART(stays);
PART(stays_moving);
PART(stays_paused);
PART(memory_outlives);

#endif
