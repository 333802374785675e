/*
 * What programs do to a library that lives in them, and what becomes of their memory then: `agent RUN_DIR PART`.
 * The system has one software device, soft0, of 64 MiB. A part says "ask ..." when the test is to do something, and ends with "ok PART".
 */
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <time.h>

double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

void ask(const char *what)
{
    char line[256], answer = 0;
    int len = snprintf(line, sizeof line, "ask %s\n", what);
    SAME(write(1, line, (size_t)len), len);
    while (answer != '\n')
        SAME(read(0, &answer, 1), 1);
}

void begin(struct bench *bench)
{
    OK(uhmm_connect(bench->run_dir, &bench->session));
    OK(uhmm_device_open(bench->session, "soft0", &bench->device));
}

void *put_out(const struct bench *bench, uint64_t len, uint64_t seed)
{
    void *memory = anonymous(len);
    fill(memory, len, seed);
    OK(uhmm_adopt(bench->session, memory, len));
    uhmm_migrate_report report;
    OK(migrates(bench, memory, len, &report));
    SAME(report.moved_pages, len / PAGE);
    return memory;
}

int migrates(const struct bench *bench, const void *memory, uint64_t len, uhmm_migrate_report *report)
{
    uhmm_pending *pending;
    int error = uhmm_migrate_async(bench->session, memory, len, bench->device, &pending);
    if (error != 0)
        return error;
    SAME(uhmm_pending_wait(pending, ANSWER_MS), 1);
    error = uhmm_pending_migrated(pending, report, NULL, 0);
    OK(uhmm_pending_free(pending));
    return error;
}

void moves(const struct bench *bench, const void *memory, uint64_t len, uint64_t seed)
{
    uhmm_migrate_report report;
    OK(migrates(bench, memory, len, &report));
    SAME(report.moved_pages + report.pages[UHMM_PAGE_ALREADY_THERE], len / PAGE);
    EXPECT(memory, len, seed);
}

void said(int found, int error, const char *words)
{
    char text[2048];
    SAME(found, -error);
    uhmm_last_error(text, sizeof text);
    if (strstr(text, words) == NULL) {
        fprintf(stderr, "the text does not say \"%s\": ", words);
        give_up(__FILE__, __LINE__, "words", 0, 1);
    }
}

/* Reads a small file of /proc. */
static bool read_file(const char *path, char *text, size_t capacity)
{
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return false;
    size_t len = fread(text, 1, capacity - 1, file);
    text[len] = 0;
    fclose(file);
    return true;
}

static bool is_named(const char *format, long number, const char *name)
{
    char path[64], comm[64];
    snprintf(path, sizeof path, format, number);
    if (!read_file(path, comm, sizeof comm))
        return false;
    comm[strcspn(comm, "\n")] = 0;
    return strcmp(comm, name) == 0;
}

static pid_t agent_among(const char *children)
{
    char *next = NULL;
    for (long pid; (pid = strtol(children, &next, 10)) > 0; children = next)
        if (is_named("/proc/%ld/comm", pid, "uhmm-agent"))
            return (pid_t)pid;
    return 0;
}

pid_t agent_pid(void)
{
    char path[300], text[4096];
    struct dirent *entry;
    pid_t found = 0;
    DIR *tasks = opendir("/proc/self/task");
    TRUE_THAT(tasks != NULL);
    while (found == 0 && (entry = readdir(tasks)) != NULL) {
        snprintf(path, sizeof path, "/proc/self/task/%s/children", entry->d_name);
        if (entry->d_name[0] != '.' && read_file(path, text, sizeof text))
            found = agent_among(text);
    }
    closedir(tasks);
    return found;
}

pid_t thread_named(const char *name)
{
    struct dirent *entry;
    pid_t found = 0;
    DIR *tasks = opendir("/proc/self/task");
    TRUE_THAT(tasks != NULL);
    while (found == 0 && (entry = readdir(tasks)) != NULL)
        if (atol(entry->d_name) > 0 && is_named("/proc/self/task/%ld/comm", atol(entry->d_name), name))
            found = atoi(entry->d_name);
    closedir(tasks);
    return found;
}

long status_of(const char *name)
{
    char text[8192];
    TRUE_THAT(read_file("/proc/self/status", text, sizeof text));
    const char *line = strstr(text, name);
    TRUE_THAT(line != NULL);
    return strtol(line + strlen(name), NULL, 10);
}

void install(struct sock_filter *steps, unsigned short count)
{
    struct sock_fprog program = {.len = count, .filter = steps};
    OK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    OK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
}

void filter(long call, uint32_t action)
{
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    install(steps, 4);
}

void become_ordinary(void)
{
    ask("open to others");
    OK(setresgid(65534, 65534, 65534));
    OK(setresuid(65534, 65534, 65534));
    /* The kernel takes /proc/self away from who has changed its user; a program that was started so has it. */
    OK(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
}

int main(int argc, char **argv)
{
#define ENTRY(name_) {#name_, name_}
    static const struct {
        const char *name;
        void (*run)(struct bench *);
    } parts[] = {
        ENTRY(own_heap), ENTRY(own_arena), ENTRY(free_while_moving), ENTRY(unmap_while_moving), ENTRY(mlockall_after), ENTRY(mlockall_onfault),
        ENTRY(mlockall_before), ENTRY(memlock_limit), ENTRY(address_space_limit), ENTRY(process_limit), ENTRY(pid_namespace),
        ENTRY(signalfd_term), ENTRY(alarm_handler), ENTRY(ctrl_c), ENTRY(set_user), ENTRY(change_root), ENTRY(no_connect),
        ENTRY(killed_on_ioctl), ENTRY(killed_on_madvise), ENTRY(descriptors_closed), ENTRY(descriptors_reused),
        ENTRY(descriptors_limit), ENTRY(sdk_killed_in_send), ENTRY(sdk_killed_in_receive), ENTRY(sdk_killed_in_wait),
        ENTRY(agent_killed), ENTRY(agent_killed_for_good), ENTRY(clone_forbidden), ENTRY(clone_forbidden_exec),
        ENTRY(fork_inside), ENTRY(exec_inside), ENTRY(after_exec), ENTRY(stays), ENTRY(stays_moving),
        ENTRY(stays_paused), ENTRY(memory_outlives),
    };
    if (argc < 3) {
        fprintf(stderr, "usage: %s RUN_DIR PART\n", argv[0]);
        return 2;
    }
    struct bench bench = {.run_dir = argv[1]};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (strcmp(argv[2], parts[i].name) != 0)
            continue;
        parts[i].run(&bench);
        printf("ok %s\n", parts[i].name);
        fflush(stdout);
        return 0;
    }
    fprintf(stderr, "there is no part %s\n", argv[2]);
    return 2;
}
