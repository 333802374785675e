/* Calls that do not wait, jobs, and what happens when copies and allocations fail. */
#define _GNU_SOURCE
#include "check.h"

void without_waiting(const struct bench *bench)
{
    const uint64_t len = 4 * MIB, pages = len / PAGE;
    uint64_t *memory = anonymous(len), *buffer = malloc(len);
    uint8_t *fates = malloc(pages);
    uhmm_pending *pending = NULL, *first = NULL;
    uhmm_migrate_report moved;
    uhmm_access_report accessed;
    uhmm_job_report finished;

    TRUE_THAT(buffer != NULL && fates != NULL);
    fill(memory, len, 20);
    OK(uhmm_adopt(bench->session, memory, len));

    /* While the agent stands still nothing is answered, and waiting can end before the answer comes. */
    int64_t agent = 0;
    OK(uhmm_agent(bench->session, &agent));
    TRUE_THAT(agent > 0);
    OK(uhmm_pause_agent(bench->session, 1000));
    OK(uhmm_migrate_async(bench->session, memory, len, bench->device, &pending));
    SAME(uhmm_pending_poll(pending), 0);
    SAME(uhmm_pending_wait(pending, 1), 0);
    FAILS(uhmm_pending_migrated(pending, &moved, NULL, 0), EBUSY);
    SAME(uhmm_pending_wait(pending, -1), 1);
    SAME(uhmm_pending_poll(pending), 1);
    for (int twice = 0; twice < 2; twice++) {
        memset(fates, 0xee, pages);
        OK(uhmm_pending_migrated(pending, &moved, fates, pages));
        SAME(moved.moved_pages, pages);
        EXPECT_BYTE(fates, pages, UHMM_PAGE_MOVED);
    }
    FAILS(uhmm_pending_migrated(pending, &moved, fates, pages - 1), EINVAL);
    FAILS(uhmm_pending_finished(pending, &finished, NULL, 0), EINVAL);
    FAILS(uhmm_pending_accessed(pending, NULL, 0, &accessed), EINVAL);
    OK(uhmm_pending_free(pending));
    FAILS(uhmm_pending_free(pending), EINVAL);
    FAILS(uhmm_pending_poll(pending), EINVAL);
    FAILS(uhmm_pending_wait(NULL, 0), EINVAL);

    OK(uhmm_prefetch_async(bench->session, memory, len, NULL, &pending));
    SAME(uhmm_pending_wait(pending, 30000), 1);
    OK(uhmm_pending_migrated(pending, &moved, NULL, 0));
    SAME(moved.moved_pages, pages);
    OK(uhmm_pending_free(pending));
    EXPECT(memory, len, 20);

    /* Two accesses at once, on different halves. */
    OK(uhmm_device_read_async(bench->device, memory, len / 2, 0, &first));
    OK(uhmm_device_read_async(bench->device, memory + len / 16, len / 2, 30000, &pending));
    SAME(uhmm_pending_wait(pending, -1), 1);
    SAME(uhmm_pending_wait(first, -1), 1);
    memset(buffer, 0, len);
    OK(uhmm_pending_accessed(first, buffer, len / 2, &accessed));
    SAME(accessed.page_count, pages / 2);
    OK(uhmm_pending_accessed(pending, buffer + len / 16, len / 2, NULL));
    EXPECT(buffer, len, 20);
    FAILS(uhmm_pending_accessed(first, buffer, PAGE, NULL), EINVAL);
    OK(uhmm_pending_free(first));
    OK(uhmm_pending_free(pending));

    fill(buffer, len, 21);
    OK(uhmm_device_write_async(bench->device, memory, buffer, len, 0, &pending));
    /* The bytes were taken before the call came back. */
    memset(buffer, 0xff, len);
    SAME(uhmm_pending_wait(pending, -1), 1);
    OK(uhmm_pending_accessed(pending, NULL, 0, &accessed));
    SAME(accessed.page_count, pages);
    OK(uhmm_pending_free(pending));
    EXPECT(memory, len, 21);

    OK(uhmm_device_fetch_add_async(bench->device, memory, len, 3, 0, &pending));
    SAME(uhmm_pending_wait(pending, -1), 1);
    OK(uhmm_pending_accessed(pending, buffer, len, NULL));
    EXPECT(buffer, len, 21);
    OK(uhmm_pending_free(pending));
    for (uint64_t i = 0; i < len / 8; i++)
        SAME(memory[i], word(21, i) + 3);

    OK(uhmm_device_exclusive_async(bench->device, memory, PAGE, 0, &pending));
    SAME(uhmm_pending_wait(pending, -1), 1);
    OK(uhmm_pending_accessed(pending, NULL, 0, &accessed));
    SAME(accessed.page_count, 1);
    OK(uhmm_pending_free(pending));
    FAILS(uhmm_check_exclusive(bench->session, memory, PAGE), EPERM);

    /* An error of the call itself comes with its answer. */
    OK(uhmm_protect(bench->session, memory, PAGE, 0));
    OK(uhmm_device_read_async(bench->device, memory, PAGE, 0, &pending));
    SAME(uhmm_pending_wait(pending, -1), 1);
    FAILS(uhmm_pending_accessed(pending, NULL, 0, NULL), EFAULT);
    FAILS(uhmm_pending_accessed(pending, NULL, 0, NULL), EFAULT);
    OK(uhmm_pending_free(pending));
    OK(uhmm_protect(bench->session, memory, PAGE, UHMM_PROTECT_READ | UHMM_PROTECT_WRITE));

    FAILS(uhmm_migrate_async(bench->session, memory, 1, bench->device, &pending), EINVAL);
    FAILS(uhmm_migrate_async(bench->session, memory, len, bench->device, NULL), EINVAL);
    FAILS(uhmm_device_read_async(bench->device, memory, len, 0, NULL), EINVAL);
    OK(uhmm_release(bench->session, memory, len));
    for (uint64_t i = 0; i < len / 8; i++)
        SAME(memory[i], word(21, i) + 3);
    OK(munmap(memory, len));
    free(buffer);
    free(fates);
}

struct node {
    struct node *next;
    uint64_t value;
};

void jobs(const struct bench *bench)
{
    const uint64_t len = MIB;
    uint64_t *memory = NULL, sum = 0, results[2] = {0, 0};
    uhmm_job_report report;
    uhmm_pending *pending = NULL;

    OK(uhmm_allocate(bench->session, len, (void **)&memory));
    fill(memory, len, 30);
    for (uint64_t i = 0; i < len / 8; i++)
        sum += word(30, i);
    /* The device follows the program's own pointers; nothing was moved before. */
    uint64_t sum_args[] = {(uintptr_t)memory, len};
    OK(uhmm_run(bench->device, "sum", sum_args, 2, UHMM_JOB_IDEMPOTENT, 30000, &report, results, 2));
    SAME(report.result_count, 1);
    SAME(results[0], sum);
    SAME(results[1], 0);
    TRUE_THAT(report.fault_count > 0 && report.run_time_ns > 0);
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_DEVICE);

    /* The same, of a job that says what it uses: there is nothing left to fault in. */
    uhmm_job_range used = {memory, len, UHMM_JOB_READS}, wrong = {memory, len, 2};
    OK(uhmm_migrate(bench->session, memory, len, NULL, NULL, NULL, 0));
    OK(uhmm_run_with(bench->device, "sum", sum_args, 2, &used, 1, UHMM_JOB_IDEMPOTENT, 30000, &report, results, 2));
    SAME(results[0], sum);
    SAME(report.fault_count, 0);
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_DEVICE);
    FAILS(uhmm_run_with(bench->device, "sum", sum_args, 2, &wrong, 1, 0, 0, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_run_with(bench->device, "sum", sum_args, 2, NULL, 1, 0, 0, NULL, NULL, 0), EINVAL);

    uint64_t fill_args[] = {(uintptr_t)memory, len, 0x77};
    used.access = UHMM_JOB_WRITES;
    OK(uhmm_migrate(bench->session, memory, len, NULL, NULL, NULL, 0));
    OK(uhmm_submit_with(bench->device, "fill", fill_args, 3, &used, 1, 0, 0, &pending));
    SAME(uhmm_pending_wait(pending, -1), 1);
    OK(uhmm_pending_finished(pending, &report, results, 2));
    SAME(report.fault_count, 0);
    OK(uhmm_pending_free(pending));
    EXPECT_BYTE(memory, len, 0x77);
    OK(uhmm_submit(bench->device, "fill", fill_args, 3, 0, 0, &pending));
    SAME(uhmm_pending_wait(pending, -1), 1);
    OK(uhmm_pending_finished(pending, &report, results, 2));
    SAME(report.result_count, 0);
    FAILS(uhmm_pending_migrated(pending, NULL, NULL, 0), EINVAL);
    OK(uhmm_pending_free(pending));
    EXPECT_BYTE(memory, len, 0x77);

    struct node *nodes = (struct node *)memory;
    for (int i = 0; i < 1000; i++)
        nodes[i] = (struct node){.next = i < 999 ? &nodes[i + 1] : NULL, .value = (uint64_t)i};
    uint64_t walk_args[] = {(uintptr_t)nodes, offsetof(struct node, next), offsetof(struct node, value)};
    OK(uhmm_run(bench->device, "list_walk", walk_args, 3, UHMM_JOB_IDEMPOTENT, 0, NULL, results, 2));
    SAME(results[0], 1000);
    SAME(results[1], 999 * 1000 / 2);
    /* A list without an end meets its deadline. */
    nodes[999].next = nodes;
    FAILS(uhmm_run(bench->device, "list_walk", walk_args, 3, 0, 100, NULL, NULL, 0), ETIMEDOUT);
    nodes[999].next = NULL;

    TRUE_THAT(uhmm_run(bench->device, "no such kernel", NULL, 0, 0, 0, NULL, NULL, 0) < 0);
    FAILS(uhmm_run(bench->device, NULL, NULL, 0, 0, 0, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_run(bench->device, "sum", NULL, 2, 0, 0, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_run(bench->device, "sum", sum_args, 2, 2, 0, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_run(bench->device, "sum", sum_args, 2, 0, 0, NULL, NULL, 1), EINVAL);
    FAILS(uhmm_submit(bench->device, "sum", sum_args, 2, 0, 0, NULL), EINVAL);
    OK(uhmm_free(bench->session, memory));
}

/* One migration with one failure ordered: the page that met it stays where it was, with its bytes. */
static void migrate_with_failure(const struct bench *bench, uint64_t *memory, uhmm_device *to, uint32_t point,
                                 uint8_t fate)
{
    uhmm_migrate_report report;
    uint8_t found = 0xee;

    OK(uhmm_inject(bench->session, point, 1));
    OK(uhmm_migrate(bench->session, memory, PAGE, to, &report, &found, 1));
    SAME(found, fate);
    SAME(report.moved_pages, 0);
    SAME(report.pages[fate], 1);
    EXPECT_RESIDENCY(bench->session, memory, PAGE, to == NULL ? UHMM_RESIDENCY_DEVICE : UHMM_RESIDENCY_SYSTEM);
    OK(uhmm_migrate(bench->session, memory, PAGE, to, &report, &found, 1));
    SAME(found, UHMM_PAGE_MOVED);
}

void injected_failures(const struct bench *bench)
{
    const uint64_t len = 2 * MIB;
    for (int shared = 0; shared < 2; shared++) {
        uint64_t *memory = NULL;
        uhmm_migrate_report report;

        if (shared)
            OK(uhmm_allocate(bench->session, len, (void **)&memory));
        else
            memory = anonymous(len);
        fill(memory, len, 60);
        if (!shared)
            OK(uhmm_adopt(bench->session, memory, len));
        migrate_with_failure(bench, memory, bench->device, UHMM_FAIL_COPY_OUT, UHMM_PAGE_IO);
        migrate_with_failure(bench, memory, NULL, UHMM_FAIL_COPY_HOME, UHMM_PAGE_IO);
        migrate_with_failure(bench, memory, bench->device, UHMM_FAIL_FRAMES, UHMM_PAGE_NO_MEMORY);
        EXPECT(memory, len, 60);
        /* Without 2 MiB in one piece, small pieces do. */
        OK(uhmm_inject(bench->session, UHMM_FAIL_HUGE_FRAMES, 1));
        OK(uhmm_migrate(bench->session, memory, len, bench->device, &report, NULL, 0));
        SAME(report.pages[UHMM_PAGE_MOVED] + report.pages[UHMM_PAGE_ALREADY_THERE], len / PAGE);
        EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_DEVICE);
        EXPECT(memory, len, 60);
        /* Disarmed: nothing fails. */
        OK(uhmm_inject(bench->session, UHMM_FAIL_HUGE_FRAMES, 0));
        OK(uhmm_inject(bench->session, UHMM_FAIL_COPY_OUT, 1));
        OK(uhmm_inject(bench->session, UHMM_FAIL_COPY_OUT, 0));
        OK(uhmm_migrate(bench->session, memory, PAGE, bench->device, &report, NULL, 0));
        SAME(report.pages[UHMM_PAGE_IO], 0);
        if (shared) {
            OK(uhmm_free(bench->session, memory));
        } else {
            OK(uhmm_release(bench->session, memory, len));
            EXPECT(memory, len, 60);
            OK(munmap(memory, len));
        }
    }
    FAILS(uhmm_inject(bench->session, 99, 1), EINVAL);
    FAILS(uhmm_inject(NULL, UHMM_FAIL_FRAMES, 1), EINVAL);
}
