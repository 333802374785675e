/* Errors that say what they mean, what a driver's author selects, and what comes home before the end. Each part runs as a process of its own. */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *words(void)
{
    static char text[1024];
    uhmm_last_error(text, sizeof text);
    return text;
}

/* A call that fails with this number and names this. */
#define TELLS(call_, errno_, name_)                                      \
    do {                                                                 \
        FAILS(call_, errno_);                                            \
        TRUE_THAT(strstr(words(), name_) != NULL);                       \
        TRUE_THAT(strstr(words(), "::") == NULL);                        \
    } while (0)

static void errors(const struct bench *bench)
{
    uhmm_session *s = bench->session;
    uhmm_device *d = bench->device;
    uint64_t buffer[4 * UHMM_PAGE_BYTES / 8];
    void *allocated = NULL;

    TELLS(uhmm_allocate(s, (uint64_t)1 << 63, &allocated), ENOMEM, "9223372036854775808");
    TELLS(uhmm_allocate(s, -PAGE, &allocated), ENOMEM, "address space");
    TELLS(uhmm_allocate(s, (uint64_t)1 << 50, &allocated), ENOMEM, "vm.max_map_count");
    uint8_t *memory = anonymous(4 * PAGE);
    TELLS(uhmm_migrate(s, memory + 8, PAGE, d, NULL, NULL, 0), EINVAL, "starts at");
    TELLS(uhmm_migrate(s, memory, 4 * PAGE, d, NULL, NULL, 0), EFAULT, "in no region");

    /* Managed in part, wherever the part is, is a hole. */
    OK(uhmm_adopt(s, memory + PAGE, PAGE));
    TELLS(uhmm_migrate(s, memory, 4 * PAGE, d, NULL, NULL, 0), EINVAL, "hole");
    TELLS(uhmm_migrate(s, memory + PAGE, 2 * PAGE, d, NULL, NULL, 0), EINVAL, "hole");
    /* What is not adopted stays as it is, and the rest is released. */
    OK(uhmm_release(s, memory, 4 * PAGE));
    TELLS(uhmm_migrate(s, memory + PAGE, PAGE, d, NULL, NULL, 0), EFAULT, "in no region");

    /* What was allocated is managed already, and is freed by its owner. */
    OK(uhmm_allocate(s, 4 * PAGE, &allocated));
    fill(allocated, 4 * PAGE, 1);
    OK(uhmm_adopt(s, allocated, 4 * PAGE));
    OK(uhmm_release(s, allocated, 4 * PAGE));
    OK(uhmm_migrate(s, allocated, 4 * PAGE, d, NULL, NULL, 0));
    EXPECT(allocated, 4 * PAGE, 1);
    OK(uhmm_free(s, allocated));

    /* A file that was sealed after it was mapped: the program writes through its mapping, nobody else may. */
    int sealed = memfd_create("sealed", MFD_ALLOW_SEALING);
    OK(ftruncate(sealed, 4 * PAGE));
    uint8_t *mapped = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, sealed, 0);
    TRUE_THAT(mapped != MAP_FAILED);
    fill(mapped, 4 * PAGE, 2);
    OK(fcntl(sealed, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
    OK(uhmm_adopt(s, mapped, 4 * PAGE));
    OK(uhmm_adopt(s, mapped + PAGE, PAGE));
    OK(uhmm_device_read(d, mapped, buffer, 4 * PAGE, NULL));
    EXPECT(buffer, 4 * PAGE, 2);
    TELLS(uhmm_device_write(d, mapped, buffer, 4 * PAGE, NULL), EPERM, "sealed");
    EXPECT(mapped, 4 * PAGE, 2);
    uint64_t job[2] = {(uintptr_t)mapped, PAGE / 8};
    TELLS(uhmm_run(d, "no such kernel", job, 2, 0, 0, NULL, NULL, 0), ENOENT, "sum");
}

/* As many mappings as a process may have. */
static void no_mapping_left(const struct bench *bench)
{
    uint8_t *memory = anonymous(64 * PAGE);
    fill(memory, 64 * PAGE, 3);
    OK(uhmm_adopt(bench->session, memory, 16 * PAGE));
    void *allocated = NULL, *last = NULL;
    for (int i = 0;; i++) {
        void *more = mmap(NULL, PAGE, i % 2 ? PROT_READ : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (more == MAP_FAILED)
            break;
        last = more;
    }
    SAME(errno, ENOMEM);
    TELLS(uhmm_adopt(bench->session, memory + 32 * PAGE, PAGE), ENOMEM, "vm.max_map_count");
    TELLS(uhmm_allocate(bench->session, PAGE, &allocated), ENOMEM, "vm.max_map_count");
    TELLS(uhmm_protect(bench->session, memory + PAGE, PAGE, UHMM_PROTECT_READ), ENOMEM, "vm.max_map_count");
    EXPECT(memory, 64 * PAGE, 3);
    OK(munmap(last, PAGE));
}

/* The program has become another user, whom the run directory does not concern. */
static void closed_directory(const struct bench *bench)
{
    uhmm_session *another = NULL;
    uhmm_device *device = NULL;
    uint64_t value;
    if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0) {
        perror("This account may not become another");
        exit(3);
    }
    TELLS(uhmm_connect(bench->run_dir, &another), EPERM, bench->run_dir);
    TELLS(uhmm_device_open(bench->session, "soft7", &device), EPERM, bench->run_dir);
    TELLS(uhmm_stat(bench->session, "pager", "regions", &value), EPERM, bench->run_dir);
    TELLS(uhmm_empty_device(bench->session, bench->device, NULL), EPERM, bench->run_dir);
}

/* Pages that stay for a failure have a reason. */
static void reasons(const struct bench *bench)
{
    uhmm_session *s = bench->session;
    uint8_t *memory = anonymous(8 * PAGE);
    uhmm_migrate_report report;
    fill(memory, 8 * PAGE, 4);
    OK(uhmm_adopt(s, memory, 8 * PAGE));
    OK(uhmm_inject(s, UHMM_FAIL_COPY_OUT, 1));
    OK(uhmm_migrate(s, memory, 8 * PAGE, bench->device, &report, NULL, 0));
    TRUE_THAT(report.pages[UHMM_PAGE_IO] > 0);
    TRUE_THAT(strstr(words(), "injection") != NULL);
    OK(uhmm_inject(s, UHMM_FAIL_FRAMES, 1));
    OK(uhmm_migrate(s, memory, 8 * PAGE, bench->device, &report, NULL, 0));
    TRUE_THAT(report.pages[UHMM_PAGE_NO_MEMORY] > 0);
    TRUE_THAT(strstr(words(), "full") != NULL);
    TRUE_THAT(strstr(words(), "injection") == NULL);
    EXPECT(memory, 8 * PAGE, 4);
    OK(uhmm_release(s, memory, 8 * PAGE));

    /* One call, two reasons: each page has its own. */
    uint8_t fates[8];
    OK(uhmm_adopt(s, memory, 4 * PAGE));
    OK(uhmm_adopt(s, memory + 4 * PAGE, 4 * PAGE));
    OK(uhmm_inject(s, UHMM_FAIL_COPY_OUT, 1));
    OK(uhmm_inject(s, UHMM_FAIL_FRAMES, 2));
    OK(uhmm_migrate(s, memory, 8 * PAGE, bench->device, &report, fates, 8));
    SAME(fates[0], UHMM_PAGE_IO);
    SAME(fates[4], UHMM_PAGE_NO_MEMORY);
    TRUE_THAT(strstr(words(), "injection") != NULL);
    TRUE_THAT(strstr(words(), "full") != NULL);
    /* What failed before is no reason for what fails now. */
    OK(uhmm_inject(s, UHMM_FAIL_FRAMES, 1));
    OK(uhmm_migrate(s, memory, 4 * PAGE, bench->device, &report, fates, 4));
    SAME(fates[0], UHMM_PAGE_NO_MEMORY);
    TRUE_THAT(strstr(words(), "injection") == NULL);
    OK(uhmm_migrate(s, memory, 8 * PAGE, bench->device, NULL, NULL, 0));
    /* Bringing home all there is does not begin with a migration. */
    OK(uhmm_inject(s, UHMM_FAIL_COPY_HOME, 1));
    int answer = uhmm_release(s, memory, 8 * PAGE);
    if (answer != 0) {
        SAME(answer, -EIO);
        TRUE_THAT(strstr(words(), "injection") != NULL);
    }
    EXPECT(memory, 8 * PAGE, 4);
}

static void selections(const struct bench *bench)
{
    uhmm_session *s = bench->session;
    uhmm_device *d = bench->device;
    uint8_t *memory = anonymous(8 * PAGE), fates[8];
    uint64_t buffer[8 * UHMM_PAGE_BYTES / 8], pages = 0;
    uhmm_migrate_report report;
    uhmm_access_report access;
    fill(memory, 8 * PAGE, 5);
    OK(uhmm_adopt(s, memory, 8 * PAGE));
    TELLS(uhmm_device_peek(d, memory, buffer, 8 * PAGE, &pages), ENOENT, "maps nothing");
    OK(uhmm_migrate_some(s, memory, 4 * PAGE, d, UHMM_MIGRATE_FROM_SYSTEM | UHMM_MIGRATE_AND_MAP, &report, fates, 8));
    SAME(report.moved_pages, 4);
    OK(uhmm_device_peek(d, memory, buffer, 8 * PAGE, &pages));
    SAME(pages, 4);
    EXPECT(buffer, 4 * PAGE, 5);
    OK(uhmm_device_read(d, memory, buffer, 4 * PAGE, &access));
    SAME(access.fault_count, 0);
    EXPECT_RESIDENCY(s, memory + 4 * PAGE, 4 * PAGE, UHMM_RESIDENCY_SYSTEM);
    OK(uhmm_migrate_some(s, memory, 8 * PAGE, d, UHMM_MIGRATE_FROM_DEVICE, &report, NULL, 0));
    SAME(report.moved_pages, 4);
    SAME(report.pages[UHMM_PAGE_ALREADY_THERE], 4);
    TELLS(uhmm_migrate_some(s, memory, 8 * PAGE, d, 3, &report, NULL, 0), EINVAL, "flags");
    OK(uhmm_migrate_some(s, memory, 8 * PAGE, d, 0, &report, NULL, 0));
    SAME(report.moved_pages, 8);
    OK(uhmm_empty_device(s, d, &pages));
    SAME(pages, 8);
    OK(uhmm_migrate(s, memory, 8 * PAGE, d, NULL, NULL, 0));
    OK(uhmm_inject(s, UHMM_FAIL_SYSTEM_HUGE, 0));
    OK(uhmm_inject(s, UHMM_FAIL_SYSTEM_PAGES, 1));
    OK(uhmm_stay_home(s, true, &pages));
    SAME(pages, 8);
    OK(uhmm_stay_home(s, false, NULL));
    EXPECT(memory, 8 * PAGE, 5);
}

/* What a debugger reads of another process; it cannot wait for a page. */
static ssize_t peek(pid_t pid, void *into, size_t len_bytes, const void *at)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/mem", pid);
    int mem = open(path, O_RDONLY);
    TRUE_THAT(mem >= 0);
    ssize_t found = pread(mem, into, len_bytes, (off_t)(uintptr_t)at);
    close(mem);
    return found;
}

static volatile uint64_t *crash_at;

/* The crashing child of a tracer: its pages are at home when the signal comes for the second time. */
static void crash(const char *run_dir, int say, bool by_instruction)
{
    struct bench mine = {.run_dir = run_dir};
    OK(uhmm_connect(run_dir, &mine.session));
    OK(uhmm_device_open(mine.session, "soft0", &mine.device));
    uint8_t *memory = anonymous(64 * PAGE);
    fill(memory, 32 * PAGE, 6);
    OK(uhmm_adopt(mine.session, memory, 64 * PAGE));
    OK(uhmm_migrate(mine.session, memory, 64 * PAGE, mine.device, NULL, NULL, 0));
    OK(uhmm_home_on_fatal_signals(mine.session, 30000));
    SAME(ptrace(PTRACE_TRACEME, 0, NULL, NULL), 0);
    TRUE_THAT(write(say, &memory, sizeof memory) == sizeof memory);
    if (by_instruction)
        *crash_at = 1;
    abort();
}

static void crashes(const struct bench *bench, bool by_instruction, int signal)
{
    int says[2];
    uint64_t found[64 * UHMM_PAGE_BYTES / 8];
    uint8_t *memory = NULL;
    OK(pipe(says));
    pid_t child = fork();
    if (child == 0)
        crash(bench->run_dir, says[1], by_instruction);
    close(says[1]);
    SAME(read(says[0], &memory, sizeof memory), sizeof memory);
    for (int times = 0; times < 2; times++) {
        int status = 0;
        SAME(waitpid(child, &status, 0), child);
        TRUE_THAT(WIFSTOPPED(status));
        SAME(WSTOPSIG(status), signal);
        if (times == 0) {
            /* Before the handler: a page on a device is an error. */
            TRUE_THAT(peek(child, found, PAGE, memory) != (ssize_t)PAGE);
            SAME(ptrace(PTRACE_CONT, child, NULL, signal), 0);
        }
    }
    SAME(peek(child, found, 64 * PAGE, memory), 64 * PAGE);
    EXPECT(found, 32 * PAGE, 6);
    EXPECT_BYTE((uint8_t *)found + 32 * PAGE, 32 * PAGE, 0);
    SAME(ptrace(PTRACE_CONT, child, NULL, signal), 0);
    int status = 0;
    SAME(waitpid(child, &status, 0), child);
    TRUE_THAT(WIFSIGNALED(status));
    SAME(WTERMSIG(status), signal);
}

static void fatal_signals(const struct bench *bench)
{
    crashes(bench, false, SIGABRT);
    crashes(bench, true, SIGSEGV);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(const struct bench *);
        bool alone;
    } parts[] = {
        {"errors", errors, false},
        {"no_mapping_left", no_mapping_left, false},
        {"closed_directory", closed_directory, false},
        {"reasons", reasons, false},
        {"selections", selections, false},
        {"fatal_signals", fatal_signals, true},
    };
    if (argc != 3) {
        fprintf(stderr, "usage: %s RUN_DIR PART\n", argv[0]);
        return 2;
    }
    struct bench bench = {.run_dir = argv[1]};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (strcmp(argv[2], parts[i].name) != 0)
            continue;
        if (!parts[i].alone) {
            OK(uhmm_connect(bench.run_dir, &bench.session));
            OK(uhmm_device_open(bench.session, "soft0", &bench.device));
        }
        parts[i].run(&bench);
        printf("ok %s\n", parts[i].name);
        return 0;
    }
    fprintf(stderr, "there is no part %s\n", argv[2]);
    return 2;
}
